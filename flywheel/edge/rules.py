"""What each kind of trigger is worth and how it is debounced: a table, no logic.

``confirm`` and ``heal`` count samples of the signal that the kind watches (ticks of System 1 for what is seen
in control rows, ticks of System 2 for what is seen in frames and policy events): so many in a row that speak
for it raise it, so many against it clear it, and only a rise fires. ``priority`` decides what is uploaded
first and dropped last, and what goes over a metered link.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flywheel.schema import Manifest, Trigger, TriggerKind


@dataclass(frozen=True)
class Rule:
    """How a kind is treated. ``interval_s`` None is ``recorder.min_interval_s``."""

    priority: int
    confirm: int = 1
    heal: int = 1
    interval_s: float | None = None


# Counts are assumptions: long enough for a sensor's noise, short against what is to be seen.
RULES = {
    TriggerKind.SAFETY_STOP: Rule(4),
    TriggerKind.REQUEST: Rule(4, interval_s=0.0),
    TriggerKind.DROPPED_OBJECT: Rule(3),
    TriggerKind.WRONG_OBJECT: Rule(3),
    TriggerKind.INTERVENTION: Rule(3),
    TriggerKind.GRASP_LOST: Rule(3, confirm=20, heal=100),
    TriggerKind.OPERATOR_FAILURE: Rule(3),
    TriggerKind.TASK_TIMEOUT: Rule(2),
    TriggerKind.TRACKING_ERROR: Rule(2, confirm=5, heal=200),
    TriggerKind.POLICY_INVALID: Rule(2, confirm=1, heal=5),
    TriggerKind.POLICY_LATE: Rule(2, confirm=20, heal=500),
    TriggerKind.PLANT_SIGNAL: Rule(2),
    TriggerKind.OUT_OF_DISTRIBUTION: Rule(1, confirm=3, heal=5),
    TriggerKind.OPERATOR_SUCCESS: Rule(1),
    TriggerKind.CAMPAIGN: Rule(1),
    TriggerKind.BASELINE: Rule(0),
}


def weight(triggers: Iterable[Trigger]) -> int:
    """The priority of the weightiest."""
    return max((RULES[t.kind].priority for t in triggers), default=0)


def priority(manifest: Manifest) -> int:
    """How much an episode matters. Uploaded first, dropped last."""
    return weight(manifest.triggers)
