"""Labels: how an attempt ended and failed, when, probably why, and how sure each of that is.

Labelling functions over signals and pictures vote (``functions.py``, ``causes.py``), a label model weighs
them (``model.py``), a classifier learns from people (``learned.py``); what is unsure becomes a question, and
answers teach the next turn (``choosing.py``, ``answers.py``).
"""

from flywheel.aspects import WORDS, Aspect, Cause, FailureMode, Intervention, Phase
from flywheel.label.answers import Answer, Answers, Question, Questions
from flywheel.label.pictures import Familiar
from flywheel.label.stage import (
    LABELS,
    LABELS_SCHEMA,
    METRICS,
    QUEUE,
    Label,
    LabelResult,
    label,
    label_episode,
    read_answers,
)

__all__ = [
    "LABELS",
    "LABELS_SCHEMA",
    "METRICS",
    "QUEUE",
    "WORDS",
    "Answer",
    "Answers",
    "Aspect",
    "Cause",
    "FailureMode",
    "Familiar",
    "Intervention",
    "Label",
    "LabelResult",
    "Phase",
    "Question",
    "Questions",
    "label",
    "label_episode",
    "read_answers",
]
