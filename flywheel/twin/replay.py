"""Recorded episodes, replayed in the twin: its arm under the recorded torques from the recorded state on.

Open loop, so the error grows with the window: it is reported over windows of several lengths, each from the
recorded state at its start. The sensors' noise is in it, that of the state at the start too.

What is replayed is the arm in free motion, and with what hangs on its cup: other things that it touches, and
where they lie, are in no episode of a real robot. Windows in which the cup or what hangs on it may have
touched something, in which the robot was stopped, or in which rows are missing, are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d, uniform_filter1d

from flywheel.episode import as_array, read
from flywheel.episode.sealing import due_ns
from flywheel.errors import EpisodeError
from flywheel.schema import MANIFEST_FILE, Mode, Strict, sha256_file
from flywheel.twin.arm import HISTORY, STATE, Arms, FloatArray, delayed, nominal_values, run
from flywheel.twin.cell import JOINTS, STEP_NS, twin_digest
from flywheel.twin.kinematics import forward
from flywheel.twin.parameters import JOINT_NAMES, SignalError, TwinParameters

WINDOWS_S = (0.1, 0.5, 1.0)
TRUST_WINDOW_S = 0.5  # by which the twin is judged
# Higher than anything that stands on the table: boxes are at most 0.052 m high, the bin 0.050 m.
CLEAR_M = 0.06
CARRYING_CLEAR_M = 0.11
DWELL_RAD_S, DWELL_ROWS, DWELL_SMOOTH = 0.02, 51, 11
STILL = 1e-3  # a signal that covers less than this, in its unit, has no range to compare with
SIGNALS = (
    *(("q", f"q.{n}", "rad") for n in JOINT_NAMES),
    *(("dq", f"dq.{n}", "rad/s") for n in JOINT_NAMES),
    *(("tool", f"tool.{a}", "m") for a in "xyz"),
)


@dataclass(frozen=True)
class Recorded:
    """What replay needs of an episode, at the rate of the twin's physics.

    ``state`` ``[N, 10]`` q, dq; ``tau`` ``[N, 5]`` N·m, given after that state was read; ``held`` ``[N]``;
    ``usable`` ``[N]``: powered, and no row missing before; ``clear`` ``[N]``: touches nothing.
    """

    episode_id: str
    sha256: str  # of its manifest
    robot: str
    state: FloatArray
    tau: FloatArray
    held: NDArray[np.bool_]
    usable: NDArray[np.bool_]
    clear: NDArray[np.bool_]


class Window(NamedTuple):
    """``steps`` of an episode from row ``start`` on, all of them free or all of them carrying."""

    episode: int
    start: int
    carrying: bool


class Windows(NamedTuple):
    """Windows cut out: starts ``[W, 10]``, torques with history ``[W, HISTORY + T, 5]``, what the robot did
    ``[W, T, 10]``."""

    where: tuple[Window, ...]
    starts: FloatArray
    tau: FloatArray
    states: FloatArray


class Replay(Strict):
    """How far the twin is from recorded episodes, per signal and length of window."""

    schema_version: Literal[1] = 1
    twin_digest: str
    episodes: dict[str, str]  # id -> sha256 of the manifest
    robots: tuple[str, ...]
    seconds: dict[str, float]  # of the rows: replayed (in the shortest windows), and left out by reason
    errors: tuple[SignalError, ...]


def load(directory: Path) -> Recorded:
    """Read an episode for replay.

    Raises:
        EpisodeError: it is unreadable, of another arm, at a rate that the twin's physics cannot make, or of a
            robot that takes positions and so recorded no torques.
    """
    e = read(directory)
    m = e.manifest
    if m.joints != JOINTS:
        raise EpisodeError(f"{directory}: joints = {m.joints}, the twin's arm has {JOINTS}")
    if abs(m.control_hz * STEP_NS - 1e9) > 1e3:
        raise EpisodeError(
            f"{directory}: control_hz = {m.control_hz:g}: the twin replays rows of {1e9 / STEP_NS:g} Hz"
        )
    c = e.control
    q, dq = as_array(c, "q").astype(np.float64), as_array(c, "dq").astype(np.float64)
    tau, held = as_array(c, "tau").astype(np.float64), as_array(c, "held") > 0
    if len(q) and not np.any(tau):
        raise EpisodeError(
            f"{directory}: tau is 0 throughout: the robot takes positions, and a replay needs its torques"
        )
    if not (np.isfinite(q).all() and np.isfinite(dq).all() and np.isfinite(tau).all()):
        raise EpisodeError(f"{directory}: q, dq or tau is not finite; `flywheel episodes verify` says where")
    late = np.diff(due_ns(c), prepend=due_ns(c)[:1] - STEP_NS) if len(q) else np.zeros(0)
    height = forward(q)[:, 2]
    return Recorded(
        episode_id=m.episode_id,
        sha256=sha256_file(directory / MANIFEST_FILE),
        robot=f"{m.site}/{m.robot}",
        state=np.hstack([q, dq]),
        tau=tau,
        held=held,
        usable=(as_array(c, "mode") < Mode.STOP_1) & (np.abs(late - STEP_NS) < 0.5 * STEP_NS),
        clear=height > np.where(held, CARRYING_CLEAR_M, CLEAR_M),
    )


def load_all(directories: Iterable[Path]) -> tuple[list[Recorded], dict[str, str]]:
    """Episodes that can be replayed, and why the others cannot, by name of their directory."""
    found: list[Recorded] = []
    refused: dict[str, str] = {}
    for d in directories:
        try:
            found.append(load(d))
        except EpisodeError as e:
            refused[d.name] = str(e).removeprefix(f"{d}: ")
    return found, refused


def windows(recorded: Sequence[Recorded], window_s: float, moving: bool = False) -> list[Window]:
    """Where windows of a length can be cut, next to each other, in episode order; with ``moving``, only where
    no joint dwells (``dwells``)."""
    steps = round(window_s * 1e9 / STEP_NS)
    found = []
    for i, r in enumerate(recorded):
        good = r.usable & r.clear & ~dwells(r.state[:, JOINTS:]) if moving else r.usable & r.clear
        changes = np.flatnonzero(np.diff(r.held.astype(np.int8)) != 0) + 1
        start = HISTORY
        while start + steps < len(good):
            # usable[k] says that row k follows row k - 1 at once, so the last state counts too
            bad = np.flatnonzero(~good[start : start + steps + 1])
            gap = np.flatnonzero(~r.usable[start - HISTORY : start])
            change = changes[(changes > start) & (changes <= start + steps)]
            if bad.size or gap.size or change.size:
                to = [start + int(bad[-1]) + 1] if bad.size else []
                to += [start + int(gap[-1]) + 1] if gap.size else []  # all of the history lies after it
                to += [int(change[-1])] if change.size else []
                start = max(to)
                continue
            found.append(Window(i, start, bool(r.held[start])))
            start += steps
    return found


def dwells(dq: FloatArray) -> NDArray[np.bool_]:
    """Rows ``[N]`` at which a joint stays near standstill, of velocities ``[N, 5]``, rad/s.

    Dry friction is not smooth there, and what a joint does depends on how a solver treats it rather than on
    the parameters (Armstrong-Hélouvry, Dupont and Canudas de Wit, Automatica 30 (1994) 1083). Passing through
    standstill is no dwelling.
    """
    smooth = np.abs(uniform_filter1d(dq, DWELL_SMOOTH, axis=0))
    return np.asarray((maximum_filter1d(smooth, DWELL_ROWS, axis=0) < DWELL_RAD_S).any(axis=1))


def cut(recorded: Sequence[Recorded], where: Sequence[Window], window_s: float) -> Windows:
    """The rows of windows."""
    steps = round(window_s * 1e9 / STEP_NS)
    starts = np.array([recorded[w.episode].state[w.start] for w in where]).reshape(-1, STATE)
    tau = [recorded[w.episode].tau[w.start - HISTORY : w.start + steps] for w in where]
    states = [recorded[w.episode].state[w.start + 1 : w.start + steps + 1] for w in where]
    return Windows(
        tuple(where),
        starts,
        np.array(tau).reshape(-1, HISTORY + steps, JOINTS),
        np.array(states).reshape(-1, steps, STATE),
    )


def predict(arms: Arms, w: Windows) -> FloatArray:
    """What the twin does in windows, ``[W, T, 10]``."""
    models = [arms.carrying if at.carrying else arms.free for at in w.where]
    return run(models, w.starts, delayed(w.tau, arms.values["delay"]))


def errors(recorded: Sequence[Recorded], arms: Arms, window_s: float) -> list[SignalError]:
    """Per signal, over all windows of a length; none where there is no such window."""
    where = windows(recorded, window_s)
    if not where:
        return []
    w = cut(recorded, where, window_s)
    real, twin = _signals(w.states), _signals(predict(arms, w))
    return summarise(real, twin, window_s)


def summarise(real: FloatArray, twin: FloatArray, window_s: float) -> list[SignalError]:
    """Errors of signals ``[W, T, 13]`` in the order of ``SIGNALS``; groups first."""
    off = twin - real
    rms = np.sqrt(np.mean(off**2, axis=(0, 1)))
    worst = np.abs(off).max(axis=(0, 1))
    wide = np.ptp(real.reshape(-1, real.shape[-1]), axis=0)
    group = np.array([g for g, _, _ in SIGNALS])
    found = []
    for name, unit in {g: u for g, _, u in SIGNALS}.items():
        k = np.flatnonzero(group == name)
        moving = k[wide[k] > STILL]
        found.append(
            SignalError(
                signal=name,
                unit=unit,
                window_s=window_s,
                windows=len(real),
                rms=float(np.sqrt(np.mean(rms[k] ** 2))),
                max=float(worst[k].max()),
                normalised=float((rms[moving] / wide[moving]).max()) if moving.size else None,
            )
        )
    for i, (_, name, unit) in enumerate(SIGNALS):
        found.append(
            SignalError(
                signal=name,
                unit=unit,
                window_s=window_s,
                windows=len(real),
                rms=float(rms[i]),
                max=float(worst[i]),
                normalised=float(rms[i] / wide[i]) if wide[i] > STILL else None,
            )
        )
    return found


def replay(
    recorded: Sequence[Recorded],
    parameters: TwinParameters | None = None,
    windows_s: Sequence[float] = WINDOWS_S,
) -> Replay:
    """Replay episodes in the twin, with its model's own parameters or identified ones.

    Raises:
        EpisodeError: no episode has a window of free motion.
    """
    arms = Arms(nominal_values() | (parameters.values if parameters is not None else {}))
    found = [e for s in windows_s for e in errors(recorded, arms, s)]
    shortest = min(windows_s)
    covered = len(windows(recorded, shortest)) * shortest
    rows = 1e-9 * STEP_NS
    seconds = {
        "recorded": rows * sum(len(r.state) for r in recorded),
        "replayed": covered,
        "stopped or missing": rows * sum(int(np.sum(~r.usable)) for r in recorded),
        "near other things": rows * sum(int(np.sum(r.usable & ~r.clear)) for r in recorded),
    }
    if not found:
        raise EpisodeError(
            f"no window of {shortest:g} s to replay in {len(recorded)} episodes: "
            + ", ".join(f"{s:.1f} s {what}" for what, s in seconds.items())
        )
    return Replay(
        twin_digest=twin_digest(parameters),
        episodes={r.episode_id: r.sha256 for r in recorded},
        robots=tuple(sorted({r.robot for r in recorded})),
        seconds=seconds,
        errors=tuple(found),
    )


def _signals(states: FloatArray) -> FloatArray:
    """q, dq and the tool's position, ``[..., 13]``."""
    return np.concatenate([states, forward(states[..., :JOINTS])], axis=-1)
