"""What is said of an episode: five aspects, each with its words; and the form that asks people for them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from flywheel.schema import Outcome


class FailureMode(StrEnum):
    """How the attempt failed, as a technician would put it."""

    NONE = "none"
    NEVER_REACHED = "never_reached"
    MISSED_GRASP = "missed_grasp"
    WRONG_OBJECT = "wrong_object"
    DROPPED = "dropped"
    TIMED_OUT_CARRYING = "timed_out_carrying"
    SAFETY_STOP = "safety_stop"
    TRACKING = "tracking"
    UNKNOWN = "unknown"


class Cause(StrEnum):
    """Which barrier between a trained policy and a working robot was probably hit."""

    NONE = "none"
    DISTRIBUTION_SHIFT = "distribution_shift"
    INTEGRATION = "integration"
    SAFETY = "safety"
    HARDWARE = "hardware"
    LATENCY = "latency"
    UNKNOWN = "unknown"


class Phase(StrEnum):
    """What the robot was at. ``recover`` is the operator's part; ``none`` where nothing failed."""

    NONE = "none"
    APPROACH = "approach"
    GRASP = "grasp"
    CARRY = "carry"
    PLACE = "place"
    RECOVER = "recover"


class Intervention(StrEnum):
    """Whether an operator took over."""

    NO = "no"
    YES = "yes"


class Aspect(StrEnum):
    """One question about an episode."""

    OUTCOME = "outcome"
    FAILURE_MODE = "failure_mode"
    PHASE = "phase"
    CAUSE = "cause"
    INTERVENTION = "intervention"


# The words of each aspect, in the order in which a tie is decided.
WORDS: dict[Aspect, tuple[str, ...]] = {
    Aspect.OUTCOME: tuple(Outcome),
    Aspect.FAILURE_MODE: tuple(FailureMode),
    Aspect.PHASE: tuple(p for p in Phase if p is not Phase.RECOVER),
    Aspect.CAUSE: tuple(Cause),
    Aspect.INTERVENTION: tuple(Intervention),
}

# What a form asks of each episode, and how it says it.
ASKED = {Aspect.FAILURE_MODE: "how it failed", Aspect.PHASE: "where in the task", Aspect.CAUSE: "why"}
NOTE = "note"


def field_name(aspect: Aspect, number: int) -> str:
    """Of the field that asks for an aspect of the form's question ``number`` (from 1)."""
    return f"{aspect.value}_{number:02d}"


def fields(count: int) -> dict[str, dict[str, Any]]:
    """The form's fields for so many questions, by name: JSON schema with default, title and words."""
    found: dict[str, dict[str, Any]] = {
        field_name(aspect, i): {
            "default": "",
            "type": "string",
            "enum": ["", *(str(w) for w in WORDS[aspect])],
            "title": f"{i}. {title}",
        }
        for i in range(1, count + 1)
        for aspect, title in ASKED.items()
    }
    title = "Note (kept with every answer)"
    return {**found, NOTE: {"default": "", "type": "string", "maxLength": 2000, "title": title}}
