"""What System 1 refuses before it moves: robots and limits that would have failed later, in motion."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from flywheel.edge import selftest
from flywheel.edge.selftest import check_limits, clock, self_test, touch
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray, JointState
from tests.robots import LIMITS, Tiny, limits


def test_a_sound_robot_passes_and_what_was_measured_is_told() -> None:
    robot = Tiny(dt=1 / 250)
    robot.q[:] = 0.3
    memory = np.zeros((100, 7), np.int64)
    found = self_test(robot, 250.0, memory)
    assert found.ticks == 50
    assert found.period_us == 4000.0
    assert 0 < found.busy_p50_us <= found.busy_p99_us <= found.busy_max_us
    assert found.touched == memory.nbytes
    assert 0 < found.rest_s < LIMITS["ladder"]["ramp_s"]
    assert found.moved_rad == 0.0
    np.testing.assert_array_equal(robot.q, 0.3)
    assert robot.stops == 0
    assert set(found.as_dict()) >= {"clock_step_us", "clock_read_us", "late_p99_us", "missed"}


def test_a_tick_that_cannot_fit_its_period_is_refused() -> None:
    class Slow(Tiny):
        def read(self, out: JointState) -> None:
            super().read(out)
            end = time.monotonic_ns() + 300_000
            while time.monotonic_ns() < end:
                pass

    with pytest.raises(ConfigError, match=r"edge\.control_hz=4000: a tick of tiny takes \d+ µs .* 250 µs"):
        self_test(Slow(dt=1 / 4000), 4000.0)


def test_a_clock_that_is_too_coarse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.clock_getres", lambda _: 4e-3)  # jiffies at 250 Hz
    with pytest.raises(ConfigError, match=r"steps of 4000\.0 µs, too coarse for edge\.control_hz=1000"):
        self_test(Tiny(), 1000.0)


def test_the_clock_is_measured_and_not_only_asked() -> None:
    step, read = clock()
    assert 0 < step <= 1000
    assert 0 < read < 1000


@pytest.mark.parametrize("which", ["q", "dq", "bias", "mass"])
def test_a_joint_state_that_is_not_finite_is_refused_by_name(which: str) -> None:
    robot = Tiny()

    def broken(s: JointState) -> None:
        getattr(s, which).flat[-1] = math.nan

    robot.disturb = broken
    with pytest.raises(ConfigError, match=rf"tiny: its joint state is not finite: {which}\[.*1\] = nan"):
        self_test(robot, 1000.0)


def test_a_robot_that_does_not_hold_still_is_refused() -> None:
    class Runaway(Tiny):
        def write(self, command: FloatArray, tool: float) -> None:
            self.q += 2e-4  # a gravity compensation of the wrong sign

    with pytest.raises(ConfigError, match=r"tiny moved by 0\.0\d+ rad while told to hold still"):
        self_test(Runaway(), 1000.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"ladder": LIMITS["ladder"] | {"ramp_s": 0.1}},
            r"ladder\.ramp_s = 0\.1: from full speed",
        ),
        ({"stops": LIMITS["stops"] | {"bound_s": 0.1}}, r"stops\.bound_s = 0\.1"),
        ({"jerk": LIMITS["jerk"] | {"max": [10.0, 10.0]}}, r"the least is 10"),
    ],
)
def test_limits_that_the_robot_cannot_keep_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_limits(limits(**changes), 1000.0)


@pytest.mark.parametrize("rate_hz", [100.0, 250.0, 4000.0])
def test_the_time_to_rest_hardly_depends_on_the_rate(rate_hz: float) -> None:
    finely = check_limits(limits(), 1000.0)
    assert check_limits(limits(), rate_hz) == pytest.approx(finely, abs=0.02 + 4 / rate_hz)


def test_every_page_is_touched() -> None:
    big = np.zeros((1 << 12, 16), np.int64)
    assert touch(big, big[:1]) == big.nbytes + big[:1].nbytes
    assert selftest.PAGE == 4096
