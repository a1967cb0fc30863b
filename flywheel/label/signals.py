"""What the tables of an episode say about the attempt: a few numbers per episode, computed once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flywheel.aspects import Phase
from flywheel.episode import Episode, as_array
from flywheel.label.pictures import Familiar, Pictures, look
from flywheel.schema import NO_FAULT, Limit, Manifest, Mode, TriggerKind

TOOL_STATE = 5  # the embedded policy's state: tool x, y, z (m), held, suction
LONG_ERROR_NS = 50_000_000  # a tracking error counts when it lasts this long
TRACKING_ERROR_RAD = 0.15
STUCK_NS = 200_000_000  # an encoder's reading that stays the same for so long ...
STUCK_MOVED_RAD = 0.05  # ... while its reference goes this far
STALE_MODES = (Mode.CARRY_ON, Mode.RAMP, Mode.HOLD, Mode.FALLBACK)
REFUSED = ("policy", "rejected")  # System 2's event
WHOLE_STOP = (Mode.STOP_1, Mode.STOP_0)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Signals:
    """The attempt of the policy: from the window's start to the failure or the operator, whichever is first.

    Positions are of the tool, m, robot base frame; ``None`` where the episode does not show it.
    """

    manifest: Manifest
    interventions: tuple[tuple[int, int], ...]  # [start_ns, end_ns) of each stretch of the operator
    failed_ns: int  # the first fault that is not the operator; else where the policy's part ends
    ever_held: bool
    held_at_end: bool
    suction_on: bool  # the policy tried to grasp
    lost_with_suction_ns: int | None  # the vacuum broke although suction was commanded
    released_ns: int | None  # the last time the policy let go of something
    nearest_m: float | None  # how near the policy came to where the operator then took the object
    operator_put_down: bool  # the operator took over with something held, and let go before carrying on
    operator_carried_on: bool  # the operator took over with something held, and finished with it
    stopped: bool  # a protective stop was in force
    stop_limits: Limit  # limits that acted in the 100 ms before that stop
    error_rad: float  # largest tracking error of any joint
    error_lasted: bool  # it stayed above ``TRACKING_ERROR_RAD`` for ``LONG_ERROR_NS``
    not_finite: bool  # a chunk with NaN or infinity was refused
    stale_share: float  # share of ticks without a fresh chunk
    late_p99_ns: float
    chunk_age_p99_ns: float
    refused_chunks: int  # of the policy, that were not fit to be followed
    stuck_joint: int | None  # whose encoder stood still while its reference moved
    frames_without_chunk: bool  # somebody else than the policy was in control
    segments: tuple[tuple[Phase, int, int], ...]  # the whole episode by phase, [start_ns, end_ns)
    pictures: Pictures | None

    @property
    def kinds(self) -> tuple[TriggerKind, ...]:
        """What fired, in the order of time."""
        return tuple(x.kind for x in sorted(self.manifest.triggers, key=lambda x: x.t_ns))

    @property
    def astray(self) -> bool:
        """Whether the arm did not go where it was sent: a limit acted for it, or a joint stood still."""
        return bool(self.stop_limits & Limit.TRACKING_ERROR) or self.stuck_joint is not None

    @property
    def phase(self) -> Phase:
        """Where in the task it failed: approach, grasp, carry or place."""
        if self.held_at_end or self.lost_with_suction_ns is not None:
            return Phase.CARRY
        if self.ever_held:
            return Phase.PLACE
        return Phase.GRASP if self.suction_on else Phase.APPROACH

    @property
    def nothing_wrong(self) -> bool:
        """Whether the robot did what the policy asked, in time."""
        bad = {TriggerKind.POLICY_INVALID, TriggerKind.POLICY_LATE}
        sound = not (self.stopped or self.not_finite or self.error_lasted or bad & set(self.kinds))
        lost = self.lost_with_suction_ns is not None or self.stuck_joint is not None
        return sound and not lost and self.stale_share <= 0.2 and self.late_p99_ns <= 1_000_000

    def features(self) -> dict[str, float]:
        """Numbers for the classifier, all finite; what was not measured is left out."""
        found = {
            "ever_held": float(self.ever_held),
            "held_at_end": float(self.held_at_end),
            "suction_on": float(self.suction_on),
            "lost_with_suction": float(self.lost_with_suction_ns is not None),
            "released": float(self.released_ns is not None),
            "put_down": float(self.operator_put_down),
            "carried_on": float(self.operator_carried_on),
            "stopped": float(self.stopped),
            "stuck": float(self.stuck_joint is not None),
            "refused_log": float(np.log1p(self.refused_chunks)),
            "frozen": float(self.pictures is not None and bool(self.pictures.frozen)),
            "error_rad": min(self.error_rad, 3.2),
            "stale_share": self.stale_share,
            "late_log_ns": float(np.log1p(max(self.late_p99_ns, 0.0))),
            "age_log_ns": float(np.log1p(max(self.chunk_age_p99_ns, 0.0))),
        }
        if self.nearest_m is not None:
            found["nearest_m"] = min(self.nearest_m, 2.0)
        if self.pictures is not None:
            found["brightness"] = self.pictures.brightness
            found["sharpness_log"] = float(np.log(self.pictures.sharpness + 1e-6))
            if self.pictures.novelty is not None:
                found["novelty"] = self.pictures.novelty
        return {k: round(v, 9) for k, v in found.items()}


def intervals(flags: NDArray[np.bool_], t_ns: NDArray[np.int64], period_ns: int) -> list[tuple[int, int]]:
    """``[start_ns, end_ns)`` of each run of true flags; a row lasts until the next, the last one a period."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    ends = np.append(t_ns, t_ns[-1] + period_ns if len(t_ns) else 0)
    return [(int(t_ns[a]), int(ends[b])) for a, b in edges.reshape(-1, 2)]


def signals(e: Episode, familiar: Familiar | None = None) -> Signals:
    """Reduce the tables of a sound episode to ``Signals``. Without ``familiar`` novelty is not measured."""
    m = e.manifest
    t_frame = as_array(e.frames, "t_ns")
    operator = as_array(e.frames, "intervention").astype(bool)
    taken_over = intervals(operator, t_frame, round(1e9 / m.policy_hz))
    handover = taken_over[0][0] if taken_over else m.window_ns[1]
    failures = [x.t_ns for x in m.triggers if x.kind not in NO_FAULT | {TriggerKind.INTERVENTION}]
    failed = min([handover, *failures])
    t = as_array(e.control, "t_ns")
    mine = t <= failed
    if not mine.any():  # the window holds nothing of the policy's part
        mine = np.zeros(len(t), dtype=bool)
        mine[:1] = True
    held = as_array(e.control, "held").astype(bool)
    suction = as_array(e.control, "tool_cmd") > 0.5
    mode = as_array(e.control, "mode")
    limits = as_array(e.control, "limits")
    q, q_ref = as_array(e.control, "q"), as_array(e.control, "q_ref")
    error = np.abs(q - q_ref).max(axis=1, initial=0.0)
    stop = np.flatnonzero(np.isin(mode, WHOLE_STOP))
    before_stop = slice(max(0, stop[0] - 100), stop[0] + 1) if len(stop) else slice(0, 0)
    let_go = np.flatnonzero(held[:-1] & ~held[1:] & mine[1:]) + 1
    broke = [int(t[i]) for i in let_go if suction[i]]
    long_rows = max(1, round(LONG_ERROR_NS * m.control_hz / 1e9))
    put_down, carried_on = _operator_start(held, t, taken_over)
    return Signals(
        manifest=m,
        interventions=tuple(taken_over),
        failed_ns=int(failed),
        ever_held=bool(held[mine].any()),
        held_at_end=bool(held[mine][-1]),
        suction_on=bool(suction[mine].any()),
        lost_with_suction_ns=broke[-1] if broke else None,
        released_ns=int(t[let_go[-1]]) if len(let_go) else None,
        nearest_m=_nearest(e, held, t, failed, handover if taken_over else None),
        operator_put_down=put_down,
        operator_carried_on=carried_on,
        stopped=bool(len(stop)) and bool(t[stop[0]] < handover),
        stop_limits=Limit(int(np.bitwise_or.reduce(limits[before_stop], initial=0))),
        error_rad=float(error[mine].max(initial=0.0)),
        error_lasted=_longest(error[mine] > TRACKING_ERROR_RAD) >= long_rows,
        not_finite=bool((limits[mine] & Limit.NOT_FINITE).any()),
        stale_share=float(np.isin(mode[mine], STALE_MODES).mean()),
        late_p99_ns=float(np.quantile(as_array(e.control, "late_ns")[mine], 0.99)),
        chunk_age_p99_ns=float(np.quantile(as_array(e.control, "chunk_age_ns")[mine], 0.99)),
        refused_chunks=_refused(e, handover),
        stuck_joint=_stuck(q[mine], q_ref[mine], max(2, round(STUCK_NS * m.control_hz / 1e9))),
        frames_without_chunk=bool((~as_array(e.frames, "chunk").any(axis=1)).any()),
        segments=_segments(held, suction, t, taken_over, round(1e9 / m.control_hz)),
        pictures=look(e, int(failed), familiar),
    )


def _refused(e: Episode, until_ns: int) -> int:
    """Chunks that System 2 threw away before the operator took over."""
    mine = as_array(e.events, "t_ns") < until_ns
    names = zip(e.events.column("kind").to_pylist(), e.events.column("name").to_pylist(), strict=True)
    return sum(m and said == REFUSED for m, said in zip(mine.tolist(), names, strict=True))


def _stuck(q: NDArray[np.float32], q_ref: NDArray[np.float32], rows: int) -> int | None:
    """The joint that read one and the same value over ``rows`` rows in which it was sent elsewhere."""
    if len(q) <= rows:
        return None
    for j in range(q.shape[1]):
        went = np.abs(q_ref[rows:, j] - q_ref[:-rows, j]) > STUCK_MOVED_RAD
        changes = np.concatenate([[0], np.cumsum(np.diff(q[:, j]) != 0)])
        if bool((went & (changes[rows:] == changes[:-rows])).any()):
            return j
    return None


def _segments(
    held: NDArray[np.bool_],
    suction: NDArray[np.bool_],
    t: NDArray[np.int64],
    taken_over: list[tuple[int, int]],
    period_ns: int,
) -> tuple[tuple[Phase, int, int], ...]:
    """Every tick is in one phase: by what the cup holds and sucks, or the operator's."""
    order = (Phase.APPROACH, Phase.GRASP, Phase.CARRY, Phase.PLACE, Phase.RECOVER)
    placed = np.cumsum(np.concatenate([[False], held[:-1] & ~held[1:]])) > 0
    at = np.where(held, 2, np.where(suction, 1, np.where(placed, 3, 0)))
    for start, end in taken_over:
        at[(t >= start) & (t < end)] = 4
    found = [
        (order[k], start, end) for k in range(len(order)) for start, end in intervals(at == k, t, period_ns)
    ]
    return tuple(sorted(found, key=lambda x: x[1]))


def _longest(flags: NDArray[np.bool_]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _operator_start(
    held: NDArray[np.bool_], t: NDArray[np.int64], taken_over: list[tuple[int, int]]
) -> tuple[bool, bool]:
    """Whether the operator, taking over with something on the cup, put it down first or carried on."""
    if not taken_over:
        return False, False
    theirs = held[t >= taken_over[0][0]]
    if not len(theirs) or not theirs[0]:
        return False, False
    pieces = len(np.flatnonzero(~theirs[:-1] & theirs[1:]))  # taken again after having been let go
    return pieces > 0, pieces == 0


def _nearest(
    e: Episode, held: NDArray[np.bool_], t: NDArray[np.int64], failed: int, handover: int | None
) -> float | None:
    """The operator's last grasp shows where the object lay; how near the policy's tool came to it."""
    if handover is None or e.manifest.state_dim != TOOL_STATE:
        return None
    grasps = np.flatnonzero(~held[:-1] & held[1:] & (t[1:] >= handover)) + 1
    t_frame = as_array(e.frames, "t_ns")
    policy = t_frame <= min(failed, handover - 1)
    if not len(grasps) or not policy.any():
        return None
    tool: Floats = as_array(e.frames, "state")[:, :3].astype(np.float64)
    at = tool[int(np.argmin(np.abs(t_frame - t[grasps[-1]])))]
    return float(np.linalg.norm(tool[policy] - at, axis=1).min())
