"""Is a sound recording also a true one? What the signals of one episode say about each other.

``episode.verify`` has read the files and found them whole; here the columns are held against one another
and against the robot's limits. Each check has a reason code (``Fault``) and a bar in
``config.CheckSettings``. All of it is arithmetic over whole columns (``flywheel.curate.signals``); the loops
are over joints and over the few runs that are suspect.

The relations used, and where they come from:

* analytical redundancy: a position is the integral of its velocity (Chow and Willsky 1984, "Analytical
  redundancy and the design of robust failure detection systems", IEEE TAC 29:603–614), taken over short
  windows so that noise averages out;
* a chunk is anchored at the picture that it was made from, and so every anchor in the control table is the
  time of a frame (``edge.system2``);
* plausibility of ranges and runs of one value as in the WMO's quality control of observations (WMO-No. 8,
  Guide to Instruments and Methods of Observation, part V: range, step and persistence tests);
* an action is the target for the next step, so the step that follows is a first-order response to it: least
  squares of the step on this and the last command, judged by R².
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flywheel.config import CheckSettings
from flywheel.curate import columns
from flywheel.curate.signals import Floats, Recorded, Signals, Survey
from flywheel.edge.safety import SafetyLimits
from flywheel.episode import Episode, as_array, count_gaps
from flywheel.episode.sealing import GAP_PERIODS
from flywheel.errors import ConfigError
from flywheel.schema import Mode, Outcome, TriggerKind

DEGREES = 180.0 / np.pi
AXIS_SHARE = 0.05  # of the squared steps: an axis that goes less is not judged for itself
STEPS_MIN = 8  # of one phase, to say how actions explain states


class Fault(StrEnum):
    """Why an episode is quarantined although its files are whole."""

    GAP = "gap"
    CLOCK_JUMP = "clock_jump"
    CHUNK_WITHOUT_FRAME = "chunk_without_frame"
    UNITS = "units"
    JOINT_LIMITS = "joint_limits"
    FROZEN = "frozen"
    SATURATED = "saturated"
    DISCONTINUITY = "discontinuity"
    STATE_JOINTS = "state_joints"
    ACTION_STATE = "action_state"
    MIXED_POLICIES = "mixed_policies"
    OUTCOME = "outcome"
    INTERVENTION = "intervention"
    BLACK_IMAGE = "black_image"
    WHITE_IMAGE = "white_image"
    BLURRED_IMAGE = "blurred_image"
    STUCK_IMAGE = "stuck_image"
    IMAGE_MOTION = "image_motion"
    REPEATED = "repeated"
    MISPLACED = "misplaced"
    OTHER_OBJECT = "other_object"


@dataclass(frozen=True)
class Found:
    """One fault, with the figures that show it."""

    fault: Fault
    why: str

    def __str__(self) -> str:
        return f"{self.why} [{self.fault}]"


def check_signals(e: Episode, s: Signals, settings: CheckSettings) -> list[Found]:
    """Every fault that the tables show, the ones that explain others first."""
    if len(s.t_ns) < min(len(s.frame_ns), 2):
        return [Found(Fault.GAP, f"control has {len(s.t_ns)} rows beside {len(s.frame_ns)} frames")]
    if len(s.frame_ns) < 2:
        return []  # too short to contradict itself; and too short to be used
    found = [*_clocks(e, s), *_stuck_signals(s, settings), *_limits(s, settings)]
    if not found:  # else what follows would only repeat it in other words
        found += _integral(s, settings)
    if not found:
        found += _state_and_joints(s, settings)
    if not found:
        found += _actions(s, settings)
    return [*found, *_policies(e), *_intervention(e, s), *_outcome(s, settings)]


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────


def _clocks(e: Episode, s: Signals) -> list[Found]:
    m = s.manifest
    found = []
    for name, step, hz in (
        ("control", s.step_ns, m.control_hz),
        ("frames", np.diff(s.frame_ns), m.policy_hz),
    ):
        period = 1e9 / hz
        if (usual := median_beyond(step, period / GAP_PERIODS, period * GAP_PERIODS)) is not None:
            ratio = usual / period
            text = f"{name}: t_ns steps by {ratio:.4g} of a period at {hz:g} Hz; is it in ns?"
            found.append(Found(Fault.UNITS, text))
    gaps = count_gaps(e.control, m.control_hz) + count_gaps(e.frames, m.policy_hz)
    if gaps > m.gaps:
        found.append(Found(Fault.GAP, f"{gaps} gaps in the tables, the manifest declares {m.gaps}"))
    if not m.drops and (alone := _alone(s)) > 1:
        found.append(Found(Fault.GAP, f"{alone} frames lie before or after all rows of control"))
    if found:
        return found
    return _jumps(s) or _anchors(s)


def _alone(s: Signals) -> int:
    """Frames more than a period of the policy outside of the time that control has rows of."""
    period = 1e9 / s.manifest.policy_hz
    early, late = s.frame_ns < s.t_ns[0] - period, s.frame_ns > s.t_ns[-1] + period
    return int(np.count_nonzero(early | late))


def _jumps(s: Signals) -> list[Found]:
    """Time that passed on the clock alone: across the gap the arm, or the chunk in force, goes on as if
    nothing had been left out."""
    period, gap = 1.0 / s.manifest.control_hz, s.gap
    if len(gap):
        dt = s.step_ns[gap] / 1e9
        moved = s.q[gap + 1] - s.q[gap]
        speed = (s.dq[gap] + s.dq[gap + 1]) / 2
        should = np.abs(speed).max(axis=1) * dt
        off = np.abs(moved - speed * period).max(axis=1)
        jumped = (should > 0.05) & (off < 0.2 * should)
        if jumped.any():
            k = int(np.argmax(jumped))
            text = f"row {gap[k] + 1}: {dt[k]:.3g} s later the arm is where it was going to be"
            text += f" after {period:.3g} s"
            return [Found(Fault.CLOCK_JUMP, text)]
    if (k := columns.slip(s.anchor_ns, s.chunk_id, 1e9 * period)) > 0:
        by = (int(s.anchor_ns[k]) - int(s.anchor_ns[k - 1])) / 1e6
        text = f"row {k}: chunk {s.chunk_id[k]} moved by {by:.1f} ms while it was in force"
        return [Found(Fault.CLOCK_JUMP, text)]
    return []


def _anchors(s: Signals) -> list[Found]:
    """Frames against chunks: what System 1 followed was made from a picture, and that picture is a row."""
    followed = (s.chunk_id >= 0) & (s.mode != Mode.FALLBACK) & (s.anchor_ns >= s.frame_ns[0])
    tolerance = 1e9 / s.manifest.control_hz
    anchors = np.unique(columns.in_force(s.anchor_ns, followed))
    missing = columns.without_frame(anchors, s.frame_ns, tolerance)
    allowed = s.manifest.gaps + s.manifest.drops + max(1, len(anchors) // 50)
    if missing <= allowed:
        return []
    text = f"{missing} of {len(anchors)} chunks were made from frames that are not there ({allowed} may be)"
    return [Found(Fault.CHUNK_WITHOUT_FRAME, text)]


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────


def runs(flags: NDArray[np.bool_], shortest: int) -> NDArray[np.int64]:
    """``[R, 3]``: channel, first row and last row of each run of true flags ``[N-1, C]`` between rows.

    A flag says that a row equals the one before it, so a run of k flags is k + 1 rows.
    """
    n, channels = flags.shape
    wide = np.zeros((channels, n + 2), np.int8)
    wide[:, 1:-1] = flags.T
    found = np.flatnonzero(np.diff(wide.reshape(-1))).reshape(-1, 2)
    edges = found[found[:, 1] - found[:, 0] >= shortest]
    channel, first = np.divmod(edges[:, 0], n + 2)
    return np.column_stack([channel, first, first + edges[:, 1] - edges[:, 0]])


def _stuck_signals(s: Signals, settings: CheckSettings) -> list[Found]:
    """A signal that keeps one value, to the last bit, while the joint is told to move: once for long
    (frozen), or again and again at its own extreme (saturated)."""
    hz = s.manifest.control_hz
    for name, survey in s.joints.items():
        if not len(survey.still) or (name == "tau" and not (survey.low.any() or survey.high.any())):
            continue  # torques that are all 0 were not measured
        found = survey.still
        span = columns.spans(s.q_ref, found)
        if not (span > settings.frozen_motion_rad).any():
            continue
        found, span = found[span > 0], span[span > 0]
        if fault := _saturated(name, getattr(s, name), survey._replace(still=found), span, hz, settings):
            return fault
        long = (found[:, 2] - found[:, 1] >= settings.frozen_s * hz) & (span > settings.frozen_motion_rad)
        if long.any():
            joint, a, b = found[np.argmax(long)].tolist()
            seconds, told = (b - a) / hz, float(span[np.argmax(long)])
            text = f"{name}[{joint}] stands still for {seconds:.2f} s while told to move {told:.3f} rad"
            return [Found(Fault.FROZEN, text)]
    return _frozen_state(s, settings)


def _saturated(
    name: str, values: Recorded, survey: Survey, span: Floats, hz: float, settings: CheckSettings
) -> list[Found]:
    low, high, found = survey
    at = values[found[:, 1], found[:, 0]]
    ends = (at == low[found[:, 0]]) | (at == high[found[:, 0]])
    for joint in np.unique(found[ends, 0]).tolist():
        mine = ends & (found[:, 0] == joint)
        seconds = float((found[mine, 2] - found[mine, 1]).sum()) / hz
        # One stretch alone may be a joint that stopped.
        if (
            mine.sum() > 1
            and seconds > settings.saturated_s
            and span[mine].max() > settings.frozen_motion_rad
        ):
            text = f"{name}[{joint}] is cut off at {low[joint]:.4g} or {high[joint]:.4g}"
            return [Found(Fault.SATURATED, f"{text} for {seconds:.2f} s in all")]
    return []


def _frozen_state(s: Signals, settings: CheckSettings) -> list[Found]:
    pose = s.state[:, : settings.pose_dims]
    if not pose.shape[1]:
        return []
    still = (pose[1:] == pose[:-1]).all(axis=1, keepdims=True)
    if s.frame_motion[still[:, 0]].sum() <= settings.min_motion_rad:
        return []  # no part of it goes further
    for _, a, b in runs(still, 3).tolist():
        if (moved := float(s.frame_motion[a:b].sum())) > settings.min_motion_rad:
            text = f"state stands still for {b - a + 1} frames while the joints go {moved:.2f} rad"
            return [Found(Fault.FROZEN, text)]
    return []


@lru_cache(maxsize=16)
def robot_limits(path: str) -> SafetyLimits:
    """A robot's limits file, named from the working directory or from the checkout."""
    for at in (Path(path), Path(__file__).parents[2] / path):
        if at.is_file():
            return SafetyLimits.load(at)
    raise ConfigError(f"curate.checks.robots: {path!r}: no such file; name the limits file of your robot")


def _limits(s: Signals, settings: CheckSettings) -> list[Found]:
    """Outside of what the robot can do; the files with its number of joints are tried, one must admit it."""
    files = [_bounds(p, settings.joint_slack_rad) for p in settings.robots]
    objections = [_beyond(s, x) for x in files if len(x.q[0]) == s.q.shape[1]]
    if not objections or None in objections:
        return []
    first = next(x for x in objections if x is not None)
    least, greatest, _ = s.joints["q"]
    reach = float(max(-least.min(), greatest.max()))
    if reach > 2 * np.pi and float((greatest - least).max()) > settings.min_motion_rad * DEGREES / 4:
        return [
            Found(Fault.UNITS, f"{first}; {reach:.4g} would be {reach / DEGREES:.3g} rad if it were degrees")
        ]
    return [Found(Fault.JOINT_LIMITS, first)]


class _Bounds(NamedTuple):
    """Of each joint signal, the least and the greatest that a robot's limits allow ``[2, J]``."""

    q: Floats
    dq: Floats
    tau: Floats
    robot: str


@lru_cache(maxsize=64)
def _bounds(path: str, slack_rad: float) -> _Bounds:
    x = robot_limits(path)
    speed = np.array(x.velocity.max) * x.velocity.overspeed
    torque = np.array(x.torque.max) * 1.01
    low, high = np.array(x.position.lower) - slack_rad, np.array(x.position.upper) + slack_rad
    return _Bounds(np.stack([low, high]), np.stack([-speed, speed]), np.stack([-torque, torque]), x.robot)


def _beyond(s: Signals, x: _Bounds) -> str | None:
    for name, (low, high) in (("q", x.q), ("dq", x.dq), ("tau", x.tau)):
        least, greatest, _ = s.joints[name]
        if (least < low).any() or (greatest > high).any():
            values: Recorded = getattr(s, name)
            bad = (values < low) | (values > high)
            row, joint = np.unravel_index(int(np.argmax(bad)), bad.shape)
            return (
                f"{name}[{joint}] is {values[row, joint]:.4g} in row {row}, beyond"
                f" [{low[joint]:.4g}, {high[joint]:.4g}] of {x.robot}"
            )
    return None


def _integral(s: Signals, settings: CheckSettings) -> list[Found]:
    """Positions against the integral of velocities (trapezoids), over windows without a gap that overlap by
    half, so that a step is whole in one of them."""
    steps = len(s.step_ns)
    w = max(2, round(settings.window_s * s.manifest.control_hz))
    if steps < w:
        return []
    begin = np.append(np.arange(0, steps - w, w // 2), steps - w)
    if len(s.gap):
        begin = begin[np.searchsorted(s.gap, begin) == np.searchsorted(s.gap, begin + w)]
    if not len(begin):
        return []
    went = columns.integrals(s.t_ns, s.dq, begin, w)
    sums, drift, window, joint = columns.drifts(s.q, went, begin, w)
    for k, (power, moved, both) in enumerate(sums.T.tolist()):
        ratio = both / max(power, 1e-12)
        enough = np.sqrt(max(power, moved) / 2) > settings.min_motion_rad / 4
        if enough and not 1 / settings.max_unit_ratio < ratio < settings.max_unit_ratio:
            return [Found(Fault.UNITS, f"q[{k}] moves {ratio:.4g} times as far as dq[{k}] says")]
    if drift > settings.max_drift_rad:
        text = (
            f"q[{joint}] leaves the integral of its velocity by {drift:.3g} rad within"
            f" {settings.window_s:g} s, about row {int(begin[window]) + w}"
        )
        return [Found(Fault.DISCONTINUITY, text)]
    return []


# ── frames ───────────────────────────────────────────────────────────────────────────────────────────


def _state_and_joints(s: Signals, settings: CheckSettings) -> list[Found]:
    """The tool goes where the joints take it: path lengths in proportion, and each step linear in those of
    the joints, as by one Jacobian for the whole episode (Whitney 1969, "Resolved motion rate control of
    manipulators and human prostheses", IEEE TMMS 10:47–53)."""
    pose = s.state[:, : settings.pose_dims]
    turned = s.frame_motion
    if not pose.shape[1] or turned.sum() < settings.min_motion_rad or len(turned) < STEPS_MIN:
        return []
    step, turn = np.diff(pose, axis=0), np.diff(s.frame_q, axis=0)
    ratio = float(np.linalg.norm(step, axis=1).sum() / turned.sum())
    if not settings.min_pose_per_rad < ratio < settings.max_pose_per_rad:
        return [Found(Fault.UNITS, f"the state goes {ratio:.3g} (m or rad) for each rad of the joints")]
    if len(turn) < 2 * turn.shape[1]:
        return []  # anything would fit
    gram = turn.T @ turn  # with a little on its diagonal, for a joint that rests
    jacobian = np.linalg.solve(gram + 1e-9 * np.trace(gram) * np.eye(len(gram)), turn.T @ step)
    r2 = 1.0 - float(((step - turn @ jacobian) ** 2).sum() / max(float((step**2).sum()), 1e-12))
    if r2 < settings.min_state_joint_r2:
        return [Found(Fault.STATE_JOINTS, f"the joints do not explain where the state goes: R² {r2:.2f}")]
    return []


def median_beyond(values: NDArray[Any], low: float, high: float) -> float | None:
    """The median if it does not lie between the two; None if it does, which takes no sorting."""
    inside = np.count_nonzero((values > low) & (values < high))
    if 2 * inside > len(values):
        return None
    median = float(np.median(values))
    return None if low < median < high else median


def variation(a: Floats) -> float:
    """Deviation over mean; 0 where nothing moves."""
    return float(a.std() / a.mean()) if a.mean() > 0 else 0.0


def correlation(a: Floats, b: Floats) -> float:
    """Pearson's; 0 where one of the two is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def _actions(s: Signals, settings: CheckSettings) -> list[Found]:
    """Each phase for itself: a person's targets are followed closely, a bad policy's only roughly."""
    k = settings.pose_dims
    if not k or min(s.state.shape[1], s.action.shape[1]) < k:
        return []
    pose, target = s.state[:, :k], s.action[:, :k]
    # Rows in which the arm followed throughout, and in the step before: else the action was not executed.
    busy = np.maximum.reduceat(np.append(s.mode, 0), s.tick)[:-1] == Mode.FOLLOW
    for who, mine, least in (
        ("the operator's", s.operator, settings.min_action_r2),
        ("the policy's", ~s.operator, settings.min_policy_action_r2),
    ):
        rows, (asks, off), (asked, went, toward), way = columns.obedience(pose, target, mine, busy)
        if len(rows) < STEPS_MIN:
            continue
        if far := median_beyond(asks, -1.0, 10 * settings.max_action_error):
            return [
                Found(Fault.UNITS, f"{who} actions lie {far:.3g} from the states; are they in the same unit?")
            ]
        if s.operator is mine and (fault := _strays(asked, went, toward, settings)):
            return fault
        if way < settings.min_motion_rad * settings.min_pose_per_rad:
            continue
        r2 = 1.0 - float((off**2).sum()) / max(float(went.sum()), 1e-12)
        if r2 < least or toward.sum() <= 0:  # a step goes to where it is told, not away from it
            text = f"{who} actions do not explain the states that follow: R² {r2:.2f}"
            return [Found(Fault.ACTION_STATE, text)]
        worst = int(np.argmax(off))
        if off[worst] > settings.max_action_error:
            text = f"the step after frame {rows[worst]} is {off[worst]:.3g} off {who} action"
            return [Found(Fault.ACTION_STATE, text)]
    return []


def _strays(asked: Floats, went: Floats, toward: Floats, settings: CheckSettings) -> list[Found]:
    """A person's targets, from where the tool is, against its steps: along every axis that it goes, they ask
    for about as much, and in that direction. All ``[D]``: sums of squares, and of products."""
    least = AXIS_SHARE * float(went.sum())
    for axis, (a, y, t) in enumerate(zip(asked.tolist(), went.tolist(), toward.tolist(), strict=True)):
        if y > least and (t <= 0 or a > settings.max_action_ratio**2 * y):
            times = np.sign(t) * np.sqrt(a / y)
            text = (
                f"the operator's actions along state[{axis}] ask for {times:.2f} times the steps that follow"
            )
            return [Found(Fault.ACTION_STATE, text)]
    return []


# ── what is said of it ───────────────────────────────────────────────────────────────────────────────


def _policies(e: Episode) -> list[Found]:
    digests = [d for d in e.frames.column("policy_digest").unique().to_pylist() if d]
    if len(digests) > 1:
        return [Found(Fault.MIXED_POLICIES, f"frames of {len(digests)} policies: {_short(digests)}")]
    if digests and e.manifest.policy_digest and digests != [e.manifest.policy_digest]:
        told = e.manifest.policy_digest[:12]
        return [Found(Fault.MIXED_POLICIES, f"frames of {_short(digests)}, the manifest says {told}")]
    return []


def _short(digests: list[str]) -> str:
    return ", ".join(d[:12] for d in sorted(digests)[:4])


def _intervention(e: Episode, s: Signals) -> list[Found]:
    """Who was in control: the policy's chunk is recorded when it was the policy, and events say when not."""
    chunk = as_array(e.frames, "chunk")
    policy = chunk.any(axis=1)
    if (both := int((policy & s.operator).sum())) > 0:
        return [Found(Fault.INTERVENTION, f"{both} frames of the operator hold a chunk of the policy's")]
    infer = as_array(e.frames, "infer_ns") > 0
    if (both := int((infer & s.operator).sum())) > 0:
        return [Found(Fault.INTERVENTION, f"{both} frames of the operator took time to infer")]
    rows = [r for r in s.events if r["kind"] == "intervention" and r["name"] in ("on", "off")]
    if not rows:
        return []
    # Between two events who is in control is what the first of them said; before the first one, the other.
    on = np.array([r["name"] == "on" for r in rows])
    at = np.searchsorted([r["t_ns"] for r in rows], s.frame_ns, side="right")
    told = np.concatenate([[not on[0]], on])[at]
    if (wrong := int((told != s.operator).sum())) <= 2:
        return []
    text = f"in {wrong} frames the operator is or is not in control, other than the events say"
    return [Found(Fault.INTERVENTION, text)]


def _outcome(s: Signals, settings: CheckSettings) -> list[Found]:
    """What the manifest says of the end, against the events, the triggers and the tool."""
    m = s.manifest
    for by, told in (("policy", m.outcome), ("operator", m.operator_outcome)):
        seen = ended(s.events, by)
        if told is not None and seen is not None and told is not seen:
            return [Found(Fault.OUTCOME, f"{by}: {told.value} in the manifest, {seen.value} in the events")]
    failed = {TriggerKind.TASK_TIMEOUT, TriggerKind.WRONG_OBJECT, TriggerKind.DROPPED_OBJECT}
    if m.outcome is Outcome.SUCCESS and (kinds := failed & {t.kind for t in m.triggers}):
        return [Found(Fault.OUTCOME, f"success, but it was recorded because of {min(kinds).value}")]
    success = m.operator_outcome is Outcome.SUCCESS or (
        m.operator_outcome is None and m.outcome is Outcome.SUCCESS
    )
    if not success or not settings.success_lets_go:
        return []
    release = s.last_release
    if not s.held.any():
        return [Found(Fault.OUTCOME, "success, but nothing was ever held")]
    if release is None or s.held[-1]:
        return [Found(Fault.OUTCOME, "success, but what was held was never let go of")]
    around = s.tool[release : release + max(1, round(0.1 * m.control_hz))]
    if float(around.min()) > 0.5:
        return [Found(Fault.OUTCOME, "success, but what was held was lost while it was to be held")]
    return []


def ended(events: Sequence[Mapping[str, Any]], by: str) -> Outcome | None:
    """How the last attempt that ``by`` ("policy" or "operator") ended came out by the events."""
    for row in reversed(events):
        if (row["kind"], row["name"]) != ("task", "end"):
            continue
        try:
            detail = json.loads(row["detail"] or "{}")
        except ValueError:
            continue
        if not isinstance(detail, dict) or detail.get("by", "policy") != by:
            continue
        if isinstance(told := detail.get("outcome"), str) and told in Outcome:
            return Outcome(told)
    return None
