"""Labels: how an attempt failed, when, probably why, and how sure that is.

Labelling functions over the control, frame and event tables vote; ``functions.py`` holds them and how their
agreement becomes a confidence. Labels that are not sure ask for a person (``needs_review``).
"""

from flywheel.label.functions import Cause, FailureMode
from flywheel.label.stage import (
    LABELS,
    LABELS_SCHEMA,
    METRICS,
    Label,
    LabelResult,
    label,
    label_episode,
)

__all__ = [
    "LABELS",
    "LABELS_SCHEMA",
    "METRICS",
    "Cause",
    "FailureMode",
    "Label",
    "LabelResult",
    "label",
    "label_episode",
]
