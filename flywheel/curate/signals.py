"""The columns of an episode as arrays, and what several checks ask of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flywheel.curate import columns
from flywheel.episode import Episode, as_array
from flywheel.episode.sealing import GAP_PERIODS
from flywheel.schema import Limit, Manifest, Mode

Floats = NDArray[np.float64]
Recorded = NDArray[np.float32]  # as the episode holds it: what is long is not made longer
STILL_S = 0.01  # shorter runs of one value are chance


class Survey(NamedTuple):
    """What two passes over a joint signal ``[N, J]`` find."""

    low: Recorded  # [J]
    high: Recorded  # [J]
    still: NDArray[np.int64]  # [R, 3] joint, first and last row of each run of one value, to the last bit

    @classmethod
    def of(cls, values: Recorded, free: NDArray[np.bool_], shortest: int) -> Survey:
        """Of a signal of at least one tick; ``free`` as for ``columns.runs_of_one_value``."""
        low, high = columns.ends(values)
        return cls(low, high, columns.runs_of_one_value(values, free, shortest))


@dataclass(frozen=True)
class Signals:
    """The columns of an episode as arrays: ``N`` ticks of ``J`` joints, ``F`` frames."""

    manifest: Manifest
    t_ns: NDArray[np.int64]  # [N]
    q: Recorded  # [N, J] rad
    dq: Recorded  # [N, J] rad/s
    q_ref: Recorded  # [N, J] rad
    tau: Recorded  # [N, J] N·m
    mode: NDArray[np.uint8]  # [N]
    torque_cut: NDArray[np.bool_]  # [N] System 1 says that a torque was brought down to its limit
    tool: Recorded  # [N] command, 0..1
    held: NDArray[np.bool_]  # [N]
    anchor_ns: NDArray[np.int64]  # [N] capture time behind the chunk in force, where there is one
    chunk_id: NDArray[np.int64]  # [N] -1 where there is none
    frame_ns: NDArray[np.int64]  # [F]
    tick: NDArray[np.int64]  # [F] the control row of each frame
    state: Floats  # [F, S]
    action: Floats  # [F, A]
    operator: NDArray[np.bool_]  # [F]
    events: list[dict[str, Any]]  # rows of the table of events

    @classmethod
    def of(cls, e: Episode) -> Signals:
        """From the tables of a verified episode."""
        c, f = e.control, e.frames
        t, frame = as_array(c, "t_ns"), as_array(f, "t_ns")
        return cls(
            manifest=e.manifest,
            t_ns=t,
            q=as_array(c, "q"),
            dq=as_array(c, "dq"),
            q_ref=as_array(c, "q_ref"),
            tau=as_array(c, "tau"),
            mode=as_array(c, "mode"),
            torque_cut=(as_array(c, "limits") & Limit.TORQUE.value) > 0,
            tool=as_array(c, "tool_cmd"),
            held=as_array(c, "held") > 0,
            anchor_ns=t - as_array(c, "chunk_age_ns"),
            chunk_id=as_array(c, "chunk_id"),
            frame_ns=frame,
            tick=np.clip(np.searchsorted(t, frame), 0, max(len(t) - 1, 0)),
            state=as_array(f, "state").astype(np.float64),
            action=as_array(f, "action").astype(np.float64),
            operator=as_array(f, "intervention").astype(bool),
            events=e.events.to_pylist(),
        )

    @cached_property
    def step_ns(self) -> NDArray[np.int64]:
        """From each tick to the next ``[N-1]``."""
        return np.diff(self.t_ns)

    @cached_property
    def gap(self) -> NDArray[np.int64]:
        """Rows after which ticks are missing, ascending."""
        return np.flatnonzero(self.step_ns > GAP_PERIODS * 1e9 / self.manifest.control_hz)

    @cached_property
    def joints(self) -> dict[str, Survey]:
        """Of ``q``, ``dq`` and ``tau``. Torques may only be expected to vary while the robot has power and
        is not at its limit. At least one tick."""
        shortest = max(2, round(STILL_S * self.manifest.control_hz))
        anywhere = np.empty(0, bool)
        free = (self.mode < Mode.STOP_1) & ~self.torque_cut
        return {
            "q": Survey.of(self.q, anywhere, shortest),
            "dq": Survey.of(self.dq, anywhere, shortest),
            "tau": Survey.of(self.tau, free, shortest),
        }

    @cached_property
    def frame_q(self) -> Floats:
        """Joints at each frame ``[F, J]``, rad."""
        return self.q[self.tick].astype(np.float64)

    @cached_property
    def frame_motion(self) -> Floats:
        """How far the joints went from each frame to the next ``[F-1]``, rad (Euclidean)."""
        return np.asarray(np.linalg.norm(np.diff(self.frame_q, axis=0), axis=1))

    @cached_property
    def last_release(self) -> int | None:
        """The row in which something held was held no more, the last time; None if there is none."""
        rows = np.flatnonzero(self.held[:-1] & ~self.held[1:]) + 1
        return int(rows[-1]) if len(rows) else None
