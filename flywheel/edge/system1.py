"""System 1: one tick of the control loop, the same in both clocks.

A tick reads the joints, thinks and writes the command; what lies between ``Robot.read`` and ``Robot.write``
is one compiled call (``flywheel.edge.tick``). It allocates nothing (what Python needs for a few numbers comes
from its own free blocks), takes no lock, makes no system call but for the clock and the robot's own, logs
nothing and raises nothing.

A core that slept for most of a period has other things in its caches, and a tick then takes several times as
long as it needs. So a loop that wakes before its deadline rehearses it: the same call, on a copy of what it
remembers, which is thrown away (``rehearse``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel.edge import tracking
from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.link import Seqlock
from flywheel.edge.mode import HOLD, RAMP
from flywheel.edge.rows import chunk_dtype
from flywheel.edge.safety import SafetyLimits
from flywheel.edge.tick import (
    ACCEPTED,
    CONTROL_WORDS,
    INTS,
    LIMITS,
    MODE,
    REF,
    REFUSED,
    ROWS,
    SEEN,
    TAU,
    addresses,
    copy_at,
    tick_at,
)
from flywheel.edge.tracking import ACC, POS, VEL
from flywheel.errors import ConfigError
from flywheel.robot import JointState, Robot
from flywheel.schema import Limit, Mode

FloatArray = npt.NDArray[np.float64]
Words = npt.NDArray[np.int64]


class System1:
    """The loop body of one robot, and the state between its ticks.

    ``slot`` holds chunks (``rows.chunk_dtype``), ``ring`` takes control rows (``rows.control_dtype``),
    ``control`` are the supervisor's words (COMMAND, RESET, HEARTBEAT), all zero in lockstep. ``wall`` says
    that ``now_ns`` is CLOCK_MONOTONIC, so that compute time can be measured.
    """

    def __init__(
        self,
        robot: Robot,
        rate_hz: float,
        slot: Seqlock,
        ring: ControlRing,
        control: Words | None = None,
        wall: bool = False,
        gains: FloatArray | None = None,
    ) -> None:
        n = robot.joints
        limits: SafetyLimits = robot.limits
        if len(limits.joints) != n:
            raise ValueError(f"{robot.name} has {n} joints, its limits are for {len(limits.joints)}")
        if abs(robot.rate_hz - rate_hz) > 1e-6 * rate_hz:
            raise ConfigError(
                f"edge.control_hz={rate_hz:g}: {robot.name} takes commands at {robot.rate_hz:g} Hz"
            )
        if slot.dtype != chunk_dtype(n) or ring.dtype != control_dtype(n):
            raise ValueError(f"slot and ring must be made for {n} joints (rows.chunk_dtype, control_dtype)")
        if robot.takes not in ("torque", "position"):
            raise ConfigError(f"{robot.name}: takes = {robot.takes!r}; a robot takes 'torque' or 'position'")
        self.robot = robot
        self.state = JointState(n)
        self._ints: Words = np.zeros(INTS, np.int64)
        self._work: FloatArray = np.zeros((ROWS, n))
        self._flags = (wall, robot.takes == "torque", 1.0 / rate_hz)
        s = self.state
        words = np.zeros(CONTROL_WORDS, np.int64) if control is None else control
        table = limits.table()
        fixed = (limits.scalars(), limits.times(), tracking.gains() if gains is None else gains)

        def memory(ints: Words, work: FloatArray, ring: ControlRing) -> tuple[npt.NDArray[Any], ...]:
            chunks: Words = np.zeros((2, slot.dtype.itemsize // 8), np.int64)
            return (
                s.q, s.dq, s.bias, s.mass, s.tool, slot.words, chunks, ints, work, words,
                *ring.memory, table.copy(), table, *fixed,
            )  # fmt: skip

        # What a tick works on, and what a rehearsal does: it reads the same, and writes elsewhere.
        self._memory = (
            memory(self._ints, self._work, ring),
            memory(self._ints.copy(), self._work.copy(), ControlRing(ring.dtype, 2)),
        )
        self._listed = [addresses(m) for m in self._memory]
        self._at, self._rehearsal_at = (int(a.ctypes.data) for a in self._listed)
        # What the robot gets: it may look, but not touch.
        self.command: FloatArray = self._work[TAU if robot.takes == "torque" else REF + POS].view()
        self.command.flags.writeable = False
        self.reset()
        self.rehearse(0)  # compiles, or loads from the cache, before the loop starts

    def reset(self) -> None:
        """Forget everything: hold where the arm is found, with no chunk (a new episode)."""
        seen = self._ints[SEEN]
        self._ints[:] = 0
        self._ints[SEEN] = seen  # what was in the slot before is not news
        self._ints[MODE] = HOLD
        self._work[:] = 0.0
        self._stopped = False

    def tick(self, now_ns: int, late_ns: int = 0) -> None:
        """One period. ``now_ns`` is the time of waking, ``late_ns`` how long after the deadline that was."""
        # float() and bool(): another type would be compiled anew, for seconds, in the middle of the loop
        s = self.state
        robot = self.robot
        robot.read(s)
        powered, tool = tick_at(
            self._at, now_ns, late_ns, float(s.held), float(s.human_m), bool(s.stop_input), *self._flags
        )
        if powered:
            if self._stopped:
                self._stopped = False
                robot.power_on()
        elif not self._stopped:
            self._stopped = True
            robot.stop()
        robot.write(self.command, tool)

    def rehearse(self, now_ns: int) -> None:
        """What ``tick`` will have to do at ``now_ns`` but for the robot's part, without any effect."""
        s = self.state
        copy_at(self._at, self._rehearsal_at)
        tick_at(
            self._rehearsal_at, now_ns, 0, float(s.held), float(s.human_m), bool(s.stop_input), *self._flags
        )

    @property
    def mode(self) -> int:
        """The mode of the last tick (a ``schema.Mode``)."""
        return int(self._ints[MODE])

    @property
    def limits_acted(self) -> Limit:
        """The limits that acted in the last tick."""
        return Limit(int(self._ints[LIMITS]))

    @property
    def reference(self) -> FloatArray:
        """The reference executed so far: rows q (rad), dq, ddq; a copy, ``[3, n]``."""
        return self._work[REF : REF + 3].copy()

    @property
    def reference_now(self) -> FloatArray:
        """The same, as the memory in which it lies: ``[3, n]``, changed by every tick."""
        return self._work[REF : REF + 3]

    @property
    def counters(self) -> dict[str, int]:
        """Chunks taken and refused since the reset."""
        return {"accepted": int(self._ints[ACCEPTED]), "refused": int(self._ints[REFUSED])}

    @property
    def resting(self) -> bool:
        """Whether the reference stands still in a mode that keeps it so."""
        return self.mode >= int(Mode.HOLD) and not np.any(self._work[REF + VEL : REF + ACC + 1])


assert RAMP < HOLD  # Mode is ordered by degradation, ``resting`` relies on it
