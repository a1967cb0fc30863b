"""Both systems in one process on a simulated clock: deterministic, and as fast as the CPU allows.

The same ``System1`` and ``System2`` as on the wall clock. What takes time there takes a fixed, simulated
time here: a chunk becomes visible ``latency_ms`` after its observation, lateness and compute time are zero.
The same seed gives the same rows, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flywheel.config import EdgeSettings
from flywheel.edge.link import Records, Seqlock
from flywheel.edge.policy import ActionSource
from flywheel.edge.rows import EventLog, Rings, chunk_dtype
from flywheel.edge.system1 import System1
from flywheel.edge.system2 import Override, System2
from flywheel.errors import ConfigError
from flywheel.robot import Perception, Robot
from flywheel.schema import Mode


class Recording(Protocol):
    """A recorder, as seen from the loop that drives it."""

    def poll(self, now_ns: int) -> object:
        """Take what is new from the rings."""


@dataclass(frozen=True)
class TrackingError:
    """Distance between the reference and the joints, rad, over all ticks in which the robot was powered."""

    rms: float
    p99: float
    max: float


@dataclass(frozen=True)
class LockstepResult:
    """What a run was like. ``modes``: ticks by mode; ``stopped``: it ended in a category 0 or 1 stop."""

    ticks: int
    sim_s: float
    tracking: TrackingError
    modes: dict[str, int]
    limits: int
    chunks: int
    rejected: int
    infer_ns: tuple[int, ...]
    stopped: bool


class Lockstep:
    """One robot, simulated in step with its own control.

    ``perception`` may be the same object as ``robot``. With ``record``, images are encoded and frames go to
    ``rings.frames``; set ``recorder`` to have it polled every period of System 2.
    """

    def __init__(
        self,
        robot: Robot,
        perception: Perception,
        policy: ActionSource,
        settings: EdgeSettings | None = None,
        record: bool = False,
        jpeg_quality: int | Mapping[str, int] = 95,
        start_ns: int = 0,
    ) -> None:
        settings = EdgeSettings() if settings is None else settings
        self.period_ns = round(1e9 / settings.control_hz)
        self.policy_period_ns = round(1e9 / settings.policy_hz)
        if self.policy_period_ns % self.period_ns:
            raise ConfigError(
                f"edge.policy_hz={settings.policy_hz}: must divide edge.control_hz={settings.control_hz}"
            )
        self.latency_ns = round(settings.latency_ms * 1e6)
        self.now_ns = start_ns
        self.recorder: Recording | None = None
        self.robot = robot
        self._slot = Seqlock(chunk_dtype(robot.joints))
        sizes = {}
        if record:
            sizes = {c: (i.shape[0], i.shape[1]) for c, i in perception.observe().images.items()}
        self.rings = Rings.private(robot.joints, sizes, policy.bundle)
        self.events = EventLog(self.rings.events)
        self.system1 = System1(robot, settings.control_hz, self._slot, self.rings.control)
        self.system2 = System2(
            perception,
            policy,
            robot.limits,
            self._hold_back,
            self.events,
            self.rings.frames if record else None,
            jpeg_quality,
        )
        self._pending: deque[tuple[int, Records]] = deque()
        self._next_policy_ns = start_ns
        self._mode = self.system1.mode

    def reset(self, start_ns: int | None = None) -> None:
        """Begin a new episode: no chunk, no stop, hold where the arm is. Time goes on unless given."""
        self.now_ns = self.now_ns if start_ns is None else start_ns
        self._next_policy_ns = self.now_ns
        self._pending.clear()
        self.system1.reset()
        self._mode = self.system1.mode

    def run(
        self,
        duration_s: float,
        instruction: str,
        until: Callable[[], bool] | None = None,
        override: Override | None = None,
        check_s: float = 0.1,
    ) -> LockstepResult:
        """Run for ``duration_s`` of simulated time, or until ``until`` (asked every ``check_s``) says so.

        ``override`` is the operator: a target for an observation, or None to leave it to the policy.
        """
        s1, period = self.system1, self.period_ns
        start = self.now_ns
        end = start + round(duration_s * 1e9)
        check = max(round(check_s * 1e9), period)
        next_check = start + check
        stats = _Stats(self.rings, self.robot.joints)
        chunks, rejected = self.system2.chunk_id, self.system2.rejected
        infer_ns: list[int] = []
        while self.now_ns < end:
            now = self.now_ns
            if now >= self._next_policy_ns:
                self.system2.tick(now, instruction, override, self.latency_ns)
                infer_ns.append(self.system2.infer_ns)
                # The next one starts on the grid, but not before this one is done.
                late = max(self.latency_ns - 1, 0) // self.policy_period_ns
                self._next_policy_ns = now + (1 + late) * self.policy_period_ns
                stats.take()
                if self.recorder is not None:
                    self.recorder.poll(now)
            while self._pending and self._pending[0][0] <= now:
                self._slot.write(self._pending.popleft()[1])
            s1.tick(now)
            if s1.mode != self._mode:
                self._note_mode(now)
            self.now_ns = now + period
            if until is not None and self.now_ns >= next_check:
                next_check += check
                if until():
                    break
        stats.take()
        if self.recorder is not None:
            self.recorder.poll(self.now_ns)
        return LockstepResult(
            ticks=(self.now_ns - start) // period,
            sim_s=(self.now_ns - start) * 1e-9,
            tracking=stats.tracking(),
            modes=stats.modes(),
            limits=stats.limits,
            chunks=self.system2.chunk_id - chunks,
            rejected=self.system2.rejected - rejected,
            infer_ns=tuple(infer_ns),
            stopped=s1.mode >= Mode.STOP_1,
        )

    def _hold_back(self, chunk: Records) -> None:
        """System 2 published: System 1 sees it when inference would have been done."""
        self._pending.append((int(chunk["t0_ns"][0]) + self.latency_ns, chunk.copy()))

    def _note_mode(self, now: int) -> None:
        before, self._mode = Mode(self._mode), self.system1.mode
        detail = {"from": before.name.lower(), "limits": int(self.system1.limits_acted)}
        self.events.add(now, "mode", Mode(self._mode).name.lower(), detail)


class _Stats:
    """Sums up control rows as they come."""

    def __init__(self, rings: Rings, joints: int) -> None:
        self._reader = rings.control.reader(from_start=False)
        self._errors: list[npt.NDArray[np.float32]] = [np.zeros((0, joints), np.float32)]
        self._modes = np.zeros(len(Mode), np.int64)
        self.limits = 0

    def take(self) -> None:
        rows = self._reader.poll().rows
        if not len(rows):
            return
        powered = rows["mode"] < Mode.STOP_1
        self._errors.append((rows["q_ref"] - rows["q"])[powered])
        self._modes += np.bincount(rows["mode"], minlength=len(Mode))
        self.limits |= int(np.bitwise_or.reduce(rows["limits"]))

    def tracking(self) -> TrackingError:
        return tracking_error(np.concatenate(self._errors))

    def modes(self) -> dict[str, int]:
        return {m.name.lower(): int(self._modes[m]) for m in Mode if self._modes[m]}


def tracking_error(errors: npt.NDArray[np.float32]) -> TrackingError:
    """Of errors ``[ticks, joints]``: rms over all, p99 and maximum over ticks of the worst joint."""
    if not len(errors):
        return TrackingError(0.0, 0.0, 0.0)
    worst = np.abs(errors).max(axis=1)
    rms = float(np.sqrt(np.mean(errors.astype(np.float64) ** 2)))
    return TrackingError(rms, float(np.percentile(worst, 99)), float(worst.max()))
