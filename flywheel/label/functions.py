"""Labelling functions: each looks at one kind of evidence and names a failure mode, or abstains.

None of them is right always; where they agree, a label is worth something. The confidence of a label is the
weight of the functions that named it over the weight of all that named anything, plus ``DOUBT``: a single
witness stays below 0.7, two that contradict each other below 0.5. Weights are judgements, not measurements:
what the cell itself reports counts most, what is inferred from a threshold least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from flywheel.label.signals import TRACKING_ERROR_RAD, Signals
from flywheel.schema import Limit, Outcome, TriggerKind

DOUBT = 0.5
NEAR_M = 0.04  # a tool that came this near to the object was at it (a box is 4 to 5 cm wide)
STALE_SHARE = 0.2
LATE_NS = 1_000_000  # a tick of the 1 kHz loop


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


@dataclass(frozen=True)
class Vote:
    """What one labelling function concluded."""

    function: str
    mode: FailureMode
    weight: float


Function = Callable[[Signals], FailureMode | None]

_OUTCOME = {
    Outcome.SUCCESS: FailureMode.NONE,
    Outcome.WRONG_OBJECT: FailureMode.WRONG_OBJECT,
    Outcome.DROPPED: FailureMode.DROPPED,
    Outcome.STOPPED: FailureMode.SAFETY_STOP,
}  # a time-out says when it ended, not how it failed
_TRIGGER = {
    TriggerKind.WRONG_OBJECT: FailureMode.WRONG_OBJECT,
    TriggerKind.DROPPED_OBJECT: FailureMode.DROPPED,
    TriggerKind.SAFETY_STOP: FailureMode.SAFETY_STOP,
    TriggerKind.TRACKING_ERROR: FailureMode.TRACKING,
    TriggerKind.GRASP_LOST: FailureMode.DROPPED,
    TriggerKind.BASELINE: FailureMode.NONE,
    TriggerKind.OPERATOR_SUCCESS: FailureMode.NONE,
}


def outcome(s: Signals) -> FailureMode | None:
    """What the cell says of how the attempt ended."""
    return _OUTCOME.get(s.manifest.outcome)


def trigger(s: Signals) -> FailureMode | None:
    """What made the recorder keep the episode: the first trigger that says how it went.

    An operator who says that a success was none cannot say by a key what it was.
    """
    kinds = {x.kind for x in s.manifest.triggers}
    if TriggerKind.OPERATOR_FAILURE in kinds and s.manifest.outcome is Outcome.SUCCESS:
        return FailureMode.UNKNOWN
    named = [
        _TRIGGER[x.kind] for x in sorted(s.manifest.triggers, key=lambda x: x.t_ns) if x.kind in _TRIGGER
    ]
    return named[0] if named else None


def stop(s: Signals) -> FailureMode | None:
    """A stop in the control rows. One that a tracking error caused is a tracking failure."""
    if not s.stopped:
        return None
    return FailureMode.TRACKING if s.stop_limits & Limit.TRACKING_ERROR else FailureMode.SAFETY_STOP


def tracking(s: Signals) -> FailureMode | None:
    """The arm did not follow its reference for longer than a jolt lasts."""
    return FailureMode.TRACKING if s.error_lasted else None


def vacuum(s: Signals) -> FailureMode | None:
    """The story that the vacuum sensor tells: taken, lost, or never taken."""
    if s.manifest.outcome is Outcome.SUCCESS:
        return FailureMode.NONE if s.released_ns is not None and not s.held_at_end else None
    if s.stopped:
        return None
    if s.held_at_end:
        # Something hangs on the cup: the wrong thing, or the right one too late; others know which.
        return FailureMode.TIMED_OUT_CARRYING if s.manifest.outcome is Outcome.TIMEOUT else None
    if s.ever_held:
        return FailureMode.DROPPED
    return FailureMode.MISSED_GRASP if s.suction_on else FailureMode.NEVER_REACHED


def approach(s: Signals) -> FailureMode | None:
    """Whether the policy came to where the operator then took the object."""
    if s.nearest_m is None or s.ever_held or s.stopped or s.manifest.outcome is Outcome.SUCCESS:
        return None
    return FailureMode.MISSED_GRASP if s.nearest_m < NEAR_M else FailureMode.NEVER_REACHED


def correction(s: Signals) -> FailureMode | None:
    """What the operator did first: put down what hung on the cup (the wrong thing), or carry on with it."""
    if s.operator_put_down:
        return FailureMode.WRONG_OBJECT
    if s.operator_carried_on and s.manifest.outcome is Outcome.TIMEOUT:
        return FailureMode.TIMED_OUT_CARRYING
    return None


FUNCTIONS: tuple[tuple[Function, float], ...] = (
    (outcome, 1.0),
    (trigger, 1.0),
    (stop, 1.0),
    (correction, 0.8),
    (vacuum, 0.6),
    (approach, 0.5),
    (tracking, 0.4),
)


def vote(s: Signals) -> list[Vote]:
    """Every function's opinion; those that abstain are left out."""
    found = [(f, f(s), w) for f, w in FUNCTIONS]
    return [Vote(f.__name__, mode, w) for f, mode, w in found if mode is not None]


def tally(votes: list[Vote]) -> tuple[FailureMode, float]:
    """The failure mode of the greatest weight and the confidence in it, 0..1; the earlier mode in a tie."""
    if not votes:
        return FailureMode.UNKNOWN, 0.0
    weight = {m: sum(v.weight for v in votes if v.mode is m) for m in FailureMode}
    best = max(FailureMode, key=lambda m: weight[m])
    return best, weight[best] / (sum(weight.values()) + DOUBT)


def cause(s: Signals, mode: FailureMode) -> tuple[Cause, str]:
    """The likeliest barrier and the evidence for it; a hypothesis, in order of how direct the evidence is."""
    if mode is FailureMode.NONE:
        return Cause.NONE, "it succeeded"
    kinds = {x.kind for x in s.manifest.triggers}
    if s.not_finite:
        return Cause.INTEGRATION, "a chunk with NaN or infinity was refused"
    if TriggerKind.POLICY_INVALID in kinds:
        return Cause.INTEGRATION, "the policy made chunks that were not fit to be followed"
    if mode is FailureMode.SAFETY_STOP:
        acted = ", ".join(x.name.lower() for x in Limit if x in s.stop_limits and x.name) or "no limit"
        return Cause.SAFETY, f"a protective stop; in the 100 ms before it acted: {acted}"
    if s.stale_share > STALE_SHARE:
        return Cause.LATENCY, f"{s.stale_share:.0%} of the ticks had no fresh chunk"
    if TriggerKind.POLICY_LATE in kinds:
        return Cause.LATENCY, "the control loop ran out of fresh chunks"
    if s.late_p99_ns > LATE_NS:
        return Cause.LATENCY, f"the control loop was {s.late_p99_ns / 1e6:.1f} ms late (p99)"
    if mode is FailureMode.TRACKING:
        return Cause.HARDWARE, f"tracking error {s.error_rad:.2f} rad, limit {TRACKING_ERROR_RAD}"
    if s.lost_with_suction_ns is not None:
        return Cause.HARDWARE, "the vacuum broke although suction was commanded"
    if mode is FailureMode.UNKNOWN:
        return Cause.UNKNOWN, "no labelling function could tell"
    if TriggerKind.OUT_OF_DISTRIBUTION in kinds:
        return Cause.DISTRIBUTION_SHIFT, "what it saw was unlike what it was trained on"
    return (
        Cause.DISTRIBUTION_SHIFT,
        "the robot did what the policy asked, in time; the policy asked for the wrong thing",
    )
