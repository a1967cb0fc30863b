"""Curation: pulled episodes in, a dataset version and a reason for every candidate out.

Each episode is examined, then chosen or not, and nothing is ever deleted: what is not used stays where it
lies and ``selection.parquet`` says why. A damaged episode is quarantined by its reason code and never stops
the stage. What is chosen are the operator's corrections: the frames in which a person (or the scripted
operator) was in control and ended well, each stretch an episode of its own. What the policy did before it
failed is no example to follow.

The outcome depends on the episodes alone, not on their order or on how often curation ran.
"""

from flywheel.curate.stage import DATASET, METRICS, SELECTION, SELECTION_SCHEMA, CurateResult, curate

__all__ = ["DATASET", "METRICS", "SELECTION", "SELECTION_SCHEMA", "CurateResult", "curate"]
