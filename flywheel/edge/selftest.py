"""What System 1 finds out about itself before it declares itself ready; the arm stands still meanwhile.

It looks at the table of limits, touches its memory, measures the clock, and then runs the real loop on the
real robot for a moment, with no chunk to follow: read, envelope, control law, ring, write, wake-ups. A loop
that cannot keep its period, a clock that is too coarse, limits that contradict each other and a robot that
does not say where it is, or does not hold still, are refused here and not found out in motion.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel.edge import realtime, tracking
from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.link import Seqlock
from flywheel.edge.rows import chunk_dtype
from flywheel.edge.safety import JERK, VELOCITY, SafetyLimits
from flywheel.edge.system1 import System1
from flywheel.edge.tracking import VEL
from flywheel.errors import ConfigError
from flywheel.robot import Robot
from flywheel.schema import Limit, Mode

SECONDS = 0.2  # of holding still
TICKS_MIN, TICKS_MAX = 20, 200
BUSY = 0.8  # of its period that a tick may take, median
COARSE = 0.02  # of the period that a step of the clock may be
STILL_RAD = 0.02  # that a joint may move while it is told to hold still
PAGE = 4096


@dataclass(frozen=True)
class SelfTest:
    """What was found; times in µs. ``busy``: from waking to the end of the tick, the robot's I/O included;
    ``rest_s``: how long the reference takes from full speed to rest; ``touched``: bytes of memory made
    present; ``missed``: deadlines missed while holding still."""

    ticks: int
    period_us: float
    busy_p50_us: float
    busy_p99_us: float
    busy_max_us: float
    late_p99_us: float
    missed: int
    clock_step_us: float
    clock_read_us: float
    rest_s: float
    touched: int
    moved_rad: float

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


def check_limits(limits: SafetyLimits, rate_hz: float) -> float:
    """Whether the limits can be kept at ``rate_hz``; returns the longest time from full speed to rest, s.

    Raises ``ConfigError``: the jerk is too small for one tick to change anything, or the robot cannot come to
    rest within the times that the ladder, the stops or the separation distance count on.
    """
    table = limits.table()
    dt = 1.0 / rate_hz
    ref = np.zeros((3, len(limits.joints)))
    ref[VEL] = table[VELOCITY]
    still = np.zeros(len(limits.joints))
    bounds = {"ladder.ramp_s": limits.ladder.ramp_s, "stops.bound_s": limits.stops.bound_s}
    if limits.separation is not None:
        bounds["separation.stopping_s"] = limits.separation.stopping_s
    wide = table.copy()
    wide[0], wide[1] = -np.inf, np.inf  # the time to rest does not depend on where the arm is
    ticks = 1
    while not tracking.coast(ref, still, dt, wide):
        ticks += 1
        if ticks * dt > 2.0 * max(bounds.values()):
            break
    for name, bound in bounds.items():
        if ticks * dt > bound:
            raise ConfigError(
                f"{limits.robot}: {name} = {bound:g}: from full speed the joints take {ticks * dt:.3f} s to "
                f"rest at {rate_hz:g} Hz; raise it, or acceleration.max and jerk.max (the least is "
                f"{table[JERK].min():g})"
            )
    return ticks * dt


def touch(*arrays: npt.NDArray[Any]) -> int:
    """Make every page of the arrays present, so that the loop meets no page fault; returns their bytes."""
    total = 0
    for a in arrays:
        words = a.reshape(-1).view(np.int64)
        words[:: PAGE // 8].sum()
        total += a.nbytes
    return total


def clock() -> tuple[float, float]:
    """The smallest step that CLOCK_MONOTONIC makes, and how long reading it takes, µs."""
    ts = realtime.timespec()
    realtime.clock_ns(ts)
    seen = np.array([realtime.clock_ns(ts) for _ in range(2000)])
    steps = np.diff(seen)
    smallest = int(steps[steps > 0].min()) if (steps > 0).any() else 10**9
    step = max(time.clock_getres(time.CLOCK_MONOTONIC) * 1e6, 1e-3)
    return max(step, 1e-3 if smallest < 1000 else smallest * 1e-3), float(np.median(steps)) * 1e-3


def self_test(robot: Robot, rate_hz: float, *memory: npt.NDArray[Any]) -> SelfTest:
    """Test a robot and its loop at ``rate_hz``, after ``realtime.claim``; ``memory`` is touched.

    Raises:
        ConfigError: System 1 must not start; the message says what to change.
    """
    rest_s = check_limits(robot.limits, rate_hz)
    touched = touch(*memory)
    step_us, read_us = clock()
    period_ns = round(1e9 / rate_hz)
    if step_us * 1e3 > COARSE * period_ns:
        raise ConfigError(
            f"CLOCK_MONOTONIC has steps of {step_us:.1f} µs, too coarse for edge.control_hz={rate_hz:g}; the "
            "kernel needs high-resolution timers (CONFIG_HIGH_RES_TIMERS)"
        )
    n = robot.joints
    slot, ring = Seqlock(chunk_dtype(n)), ControlRing(control_dtype(n), TICKS_MAX + 2)
    system1 = System1(robot, rate_hz, slot, ring, wall=True)
    status = np.zeros(realtime.STATUS_WORDS, np.int64)
    ticks = min(max(round(SECONDS * rate_hz), TICKS_MIN), TICKS_MAX)
    busy, late = np.zeros(ticks, np.int64), np.zeros(ticks, np.int64)
    start: npt.NDArray[np.float64] | None = None
    for k in range(ticks):
        now, late[k] = realtime.pace(status, period_ns)
        system1.tick(now, int(late[k]))
        busy[k] = time.monotonic_ns() - now
        if system1.limits_acted & Limit.NOT_FINITE:
            raise ConfigError(f"{robot.name}: its joint state is not finite: {_odd(system1)}")
        if start is None:
            start = system1.state.q.copy()
    assert start is not None
    moved = float(np.abs(system1.state.q - start).max())
    p50, p99 = (float(x) for x in np.percentile(busy * 1e-3, (50, 99), method="higher"))
    if p50 * 1e3 > BUSY * period_ns:
        raise ConfigError(
            f"edge.control_hz={rate_hz:g}: a tick of {robot.name} takes {p50:.0f} µs (median of {ticks}), "
            f"its period is {period_ns * 1e-3:.0f} µs; lower the rate, or make its read and write faster"
        )
    if moved > STILL_RAD and system1.mode < Mode.STOP_1:
        raise ConfigError(
            f"{robot.name} moved by {moved:.3f} rad while told to hold still; check signs, units and gains"
        )
    return SelfTest(
        ticks=ticks,
        period_us=period_ns * 1e-3,
        busy_p50_us=p50,
        busy_p99_us=p99,
        busy_max_us=float(busy.max()) * 1e-3,
        late_p99_us=float(np.percentile(late * 1e-3, 99, method="higher")),
        missed=int(status[realtime.SKIPPED] + status[realtime.LATE]),
        clock_step_us=step_us,
        clock_read_us=read_us,
        rest_s=rest_s,
        touched=touched,
        moved_rad=moved,
    )


def _odd(system1: System1) -> str:
    s = system1.state
    for name in ("q", "dq", "bias", "mass"):
        bad = np.argwhere(~np.isfinite(getattr(s, name)))
        if len(bad):
            where = tuple(int(i) for i in bad[0])
            return f"{name}{list(where)} = {getattr(s, name)[where]}"
    return "a value"
