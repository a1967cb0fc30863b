"""Labelling functions: each looks at one kind of evidence and names a word of an aspect, or abstains.

None of them is right always; where they agree, a label is worth something (Ratner et al. 2017, "Snorkel").
``accuracy`` is how often a function is right before anybody has said so: a judgement, which answers and the
functions' agreement move (``model.py``). What the cell itself reports counts most, what is inferred from a
threshold least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from flywheel.aspects import Aspect, FailureMode, Intervention, Phase
from flywheel.label.causes import CAUSES
from flywheel.label.signals import Signals
from flywheel.schema import Outcome, TriggerKind

NEAR_M = 0.04  # a tool that came this near to the object was at it (a box is 4 to 5 cm wide)

Said = StrEnum | tuple[StrEnum, str] | None  # a word, perhaps with its evidence; None abstains


@dataclass(frozen=True)
class LabellingFunction:
    """``call`` answers for ``aspect``; its name is the function's."""

    aspect: Aspect
    call: Callable[[Signals], Said]
    accuracy: float

    @property
    def name(self) -> str:
        return self.call.__name__


@dataclass(frozen=True)
class Vote:
    """What one labelling function concluded; ``why`` is "" where the function's name says it."""

    aspect: Aspect
    function: str
    word: str
    why: str = ""


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
_ENDED = {
    TriggerKind.WRONG_OBJECT: Outcome.WRONG_OBJECT,
    TriggerKind.DROPPED_OBJECT: Outcome.DROPPED,
    TriggerKind.SAFETY_STOP: Outcome.STOPPED,
    TriggerKind.TASK_TIMEOUT: Outcome.TIMEOUT,
    TriggerKind.OPERATOR_SUCCESS: Outcome.SUCCESS,
}


# ── how it ended ────────────────────────────────────────────────────────────────────────────────────


def reported(s: Signals) -> Outcome:
    """What the cell says of how the attempt ended."""
    return s.manifest.outcome


def triggered(s: Signals) -> Outcome | None:
    """The first trigger that tells how an attempt ended."""
    named = [_ENDED[k] for k in s.kinds if k in _ENDED]
    return named[0] if named else None


def stopped(s: Signals) -> Outcome | None:
    """A stop in the control rows ends an attempt, whoever reports otherwise."""
    return Outcome.STOPPED if s.stopped else None


def emptied(s: Signals) -> Outcome | None:
    """The cup let go on command and hangs empty: as a success ends. One that still holds ran out of time."""
    if s.stopped:
        return None
    if s.held_at_end:
        return Outcome.TIMEOUT
    return Outcome.SUCCESS if s.released_ns is not None and not s.interventions else None


# ── how it failed ───────────────────────────────────────────────────────────────────────────────────


def outcome(s: Signals) -> FailureMode | None:
    """What the cell says of how the attempt ended. It cannot tell what a stop was for."""
    return None if s.stopped and s.astray else _OUTCOME.get(s.manifest.outcome)


def trigger(s: Signals) -> FailureMode | None:
    """What made the recorder keep the episode: the first trigger that says how it went.

    An operator who says that a success was none cannot say by a key what it was.
    """
    if TriggerKind.OPERATOR_FAILURE in s.kinds and s.manifest.outcome is Outcome.SUCCESS:
        return FailureMode.UNKNOWN
    named = [_TRIGGER[k] for k in s.kinds if k in _TRIGGER]
    if named and named[0] is FailureMode.SAFETY_STOP and s.astray:
        return FailureMode.TRACKING
    return named[0] if named else None


def stop(s: Signals) -> FailureMode | None:
    """A stop in the control rows. One of an arm that did not go where it was sent is a tracking failure."""
    if not s.stopped:
        return None
    return FailureMode.TRACKING if s.astray else FailureMode.SAFETY_STOP


def tracking(s: Signals) -> FailureMode | None:
    """The arm did not follow its reference for longer than a jolt lasts, or a joint did not move at all."""
    return FailureMode.TRACKING if s.error_lasted or s.stuck_joint is not None else None


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


# ── where in the task ───────────────────────────────────────────────────────────────────────────────


def cup(s: Signals) -> Phase | None:
    """What the cup held and sucked when it failed."""
    return None if s.manifest.outcome is Outcome.SUCCESS else s.phase


def finished(s: Signals) -> Phase | None:
    """A success failed nowhere."""
    return Phase.NONE if s.manifest.outcome is Outcome.SUCCESS else None


def carried_off(s: Signals) -> Phase | None:
    """A box that was not asked for is noticed when it is lifted."""
    return Phase.CARRY if s.manifest.outcome is Outcome.WRONG_OBJECT else None


def taken_over(s: Signals) -> Phase | None:
    """With something on the cup the operator took over from a carry; else from what the tool was near to."""
    if s.operator_put_down or s.operator_carried_on:
        return Phase.CARRY
    if s.nearest_m is None or s.ever_held:
        return None
    return Phase.GRASP if s.nearest_m < NEAR_M and s.suction_on else Phase.APPROACH


# ── who was in control ──────────────────────────────────────────────────────────────────────────────


def flagged(s: Signals) -> Intervention:
    """The operator's flag in the frames."""
    return Intervention.YES if s.interventions else Intervention.NO


def concluded(s: Signals) -> Intervention:
    """Whether the manifest says how a correction ended."""
    return Intervention.YES if s.manifest.operator_outcome is not None else Intervention.NO


def silent_policy(s: Signals) -> Intervention:
    """Frames without a chunk of the policy, which are the operator's."""
    return Intervention.YES if s.frames_without_chunk else Intervention.NO


_TABLE: tuple[tuple[Aspect, Callable[[Signals], Said], float], ...] = (
    (Aspect.OUTCOME, reported, 0.97),
    (Aspect.OUTCOME, triggered, 0.90),
    (Aspect.OUTCOME, stopped, 0.90),
    (Aspect.OUTCOME, emptied, 0.60),
    (Aspect.FAILURE_MODE, outcome, 0.95),
    (Aspect.FAILURE_MODE, trigger, 0.93),
    (Aspect.FAILURE_MODE, stop, 0.93),
    (Aspect.FAILURE_MODE, correction, 0.85),
    (Aspect.FAILURE_MODE, vacuum, 0.70),
    (Aspect.FAILURE_MODE, approach, 0.65),
    (Aspect.FAILURE_MODE, tracking, 0.60),
    (Aspect.PHASE, finished, 0.97),
    (Aspect.PHASE, cup, 0.85),
    (Aspect.PHASE, carried_off, 0.80),
    (Aspect.PHASE, taken_over, 0.65),
    *((Aspect.CAUSE, f, accuracy) for f, accuracy in CAUSES),
    (Aspect.INTERVENTION, flagged, 0.98),
    (Aspect.INTERVENTION, concluded, 0.95),
    (Aspect.INTERVENTION, silent_policy, 0.80),
)
FUNCTIONS = tuple(LabellingFunction(*row) for row in _TABLE)


def vote(s: Signals) -> tuple[Vote, ...]:
    """Every function's opinion; those that abstain are left out. Pure."""
    found = []
    for f in FUNCTIONS:
        said = f.call(s)
        if said is not None:
            word, why = said if isinstance(said, tuple) else (said, "")
            found.append(Vote(f.aspect, f.name, word.value, why))
    return tuple(found)
