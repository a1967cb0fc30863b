"""Labelling functions for the cause: which barrier was hit, and the evidence for it. Hypotheses all of them.

A failure has many signs of one cause and few of the others: a sensor that lies shows in the tracking error,
a late policy in the age of its chunks, a changed scene in what the policy's encoder makes of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable

from flywheel.aspects import Cause
from flywheel.label.signals import TRACKING_ERROR_RAD, Signals
from flywheel.schema import Limit, Outcome, TriggerKind

STALE_SHARE = 0.2
REFUSED_CHUNKS = 3  # so many in one attempt are no accident; a loop that starves of them is not late
LATE_NS = 1_000_000  # a tick of the 1 kHz loop
OLD_CHUNK_PERIODS = 3.0  # of System 2: one that comes in time is replaced after one
NOVEL = 0.99  # of the training views lie nearer to their neighbours than what was seen
FAMILIAR = 0.90
DARK, GLARE = 0.08, 0.92  # mean brightness, 0..1

Found = tuple[Cause, str] | None


def succeeded(s: Signals) -> Found:
    """Nothing failed."""
    failed = s.manifest.outcome is not Outcome.SUCCESS or TriggerKind.OPERATOR_FAILURE in s.kinds
    return None if failed else (Cause.NONE, "it succeeded")


def unfit_chunk(s: Signals) -> Found:
    """The policy's output was not fit to be followed: units, shapes or a broken graph."""
    if s.not_finite:
        return Cause.INTEGRATION, "a chunk with NaN or infinity was refused"
    if s.refused_chunks >= REFUSED_CHUNKS:
        return Cause.INTEGRATION, f"{s.refused_chunks} of the policy's chunks were not fit to be followed"
    if TriggerKind.POLICY_INVALID in s.kinds:
        return Cause.INTEGRATION, "the policy made chunks that were not fit to be followed"
    return None


def protective_stop(s: Signals) -> Found:
    """A stop for people's or the cell's sake; one for a tracking error is the arm's."""
    if not s.stopped or s.stop_limits & Limit.TRACKING_ERROR:
        return None
    acted = ", ".join(x.name.lower() for x in Limit if x in s.stop_limits and x.name) or "no limit"
    return Cause.SAFETY, f"a protective stop; in the 100 ms before it acted: {acted}"


def stale_chunks(s: Signals) -> Found:
    """System 1 had to do without fresh chunks for long."""
    if s.stale_share > STALE_SHARE and s.refused_chunks < REFUSED_CHUNKS:
        return Cause.LATENCY, f"{s.stale_share:.0%} of the ticks had no fresh chunk"
    return None


def ran_out(s: Signals) -> Found:
    """The robot noticed itself that the policy was late."""
    late = TriggerKind.POLICY_LATE in s.kinds and s.refused_chunks < REFUSED_CHUNKS
    return (Cause.LATENCY, "the control loop ran out of fresh chunks") if late else None


def old_chunks(s: Signals) -> Found:
    """Chunks that were followed long after the picture that they were made of."""
    periods = s.chunk_age_p99_ns * s.manifest.policy_hz / 1e9
    if periods > OLD_CHUNK_PERIODS and s.refused_chunks < REFUSED_CHUNKS:
        return Cause.LATENCY, f"chunks were followed up to {s.chunk_age_p99_ns / 1e6:.0f} ms old (p99)"
    return None


def slow_loop(s: Signals) -> Found:
    """System 1 woke late."""
    late = s.late_p99_ns > LATE_NS
    return (Cause.LATENCY, f"the control loop was {s.late_p99_ns / 1e6:.1f} ms late (p99)") if late else None


def did_not_follow(s: Signals) -> Found:
    """Joints that do not go where they are sent: a drive, a brake or an encoder."""
    if s.error_lasted or (s.stopped and s.stop_limits & Limit.TRACKING_ERROR):
        return Cause.HARDWARE, f"tracking error {s.error_rad:.2f} rad, limit {TRACKING_ERROR_RAD}"
    return None


def stuck_joint(s: Signals) -> Found:
    """An encoder that does not change while the reference of its joint moves."""
    if s.stuck_joint is None:
        return None
    return Cause.HARDWARE, f"joint {s.stuck_joint} read the same value while it was sent elsewhere"


def vacuum_broke(s: Signals) -> Found:
    """The cup lost what it held although suction was commanded."""
    lost = s.lost_with_suction_ns is not None
    return (Cause.HARDWARE, "the vacuum broke although suction was commanded") if lost else None


def frozen_camera(s: Signals) -> Found:
    """The tool moved and the picture did not change by a bit."""
    if s.pictures is None or not s.pictures.frozen:
        return None
    return Cause.HARDWARE, f"camera {s.pictures.frozen!r} showed the same picture while the tool moved"


def no_light(s: Signals) -> Found:
    """Pictures in which nothing can be told apart, dark or blown out."""
    if s.pictures is None or DARK <= s.pictures.brightness <= GLARE:
        return None
    if s.pictures.novelty is not None and s.pictures.novelty <= FAMILIAR:
        return None  # a camera that is close to a dark box is used to that
    return Cause.DISTRIBUTION_SHIFT, f"the pictures' mean brightness is {s.pictures.brightness:.2f} of 1"


def robot_noticed(s: Signals) -> Found:
    """The robot's own measure called it out of distribution."""
    if TriggerKind.OUT_OF_DISTRIBUTION in s.kinds:
        return Cause.DISTRIBUTION_SHIFT, "what it saw was unlike what it was trained on"
    return None


def novelty(s: Signals) -> Found:
    """How far what it saw lies from what the policy was trained on, by the policy's own encoder."""
    if s.manifest.outcome is Outcome.SUCCESS or s.pictures is None or s.pictures.novelty is None:
        return None
    if s.pictures.novelty >= NOVEL:
        return (
            Cause.DISTRIBUTION_SHIFT,
            f"to the policy it looked less like its training than {s.pictures.novelty:.0%} of that",
        )
    if s.pictures.novelty <= FAMILIAR and s.nothing_wrong:
        return Cause.UNKNOWN, "it looked like the training, and the robot did in time what it was asked"
    return None


def did_as_asked(s: Signals) -> Found:
    """No sign of anything else: the policy asked for the wrong thing."""
    if s.manifest.outcome is Outcome.SUCCESS or s.stopped or not s.nothing_wrong:
        return None
    if s.kinds and s.kinds[0] is TriggerKind.OPERATOR_FAILURE:
        return None
    return (
        Cause.DISTRIBUTION_SHIFT,
        "the robot did what the policy asked, in time; the policy asked for the wrong thing",
    )


CAUSES: tuple[tuple[Callable[[Signals], Found], float], ...] = (
    (succeeded, 0.97),
    (unfit_chunk, 0.95),
    (protective_stop, 0.85),
    (stale_chunks, 0.85),
    (ran_out, 0.85),
    (old_chunks, 0.75),
    (slow_loop, 0.75),
    (did_not_follow, 0.80),
    (stuck_joint, 0.90),
    (vacuum_broke, 0.70),
    (frozen_camera, 0.90),
    (no_light, 0.75),
    (robot_noticed, 0.80),
    (novelty, 0.75),
    (did_as_asked, 0.55),
)
