"""What is said of an episode: five aspects, each with its words."""

from __future__ import annotations

from enum import StrEnum

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
