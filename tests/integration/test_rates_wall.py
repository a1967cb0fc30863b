"""Rates from 100 Hz to 4 kHz on the wall clock, with the robots that have them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flywheel.edge import realtime
from flywheel.edge.link import Records
from flywheel.edge.processes import Plan
from flywheel.edge.runtime import Wall
from flywheel.errors import ConfigError
from flywheel.robot.free import AMPLITUDE_RAD
from flywheel.schema import Mode
from tests.robots import BUNDLE, JOINTS, write_limits

pytestmark = [pytest.mark.integration, pytest.mark.slow]
STEP = 100_000_000


def plan(robot: str, limits: Path, rate_hz: float, joints: int, /, **args: Any) -> Plan:
    cpu, others = realtime.cores()
    return Plan(
        robot=robot, perception="", args={"rate_hz": rate_hz, **args}, joints=joints, cameras={},
        limits=str(limits), bundle_dir="", bundle=BUNDLE, instruction="", control_hz=rate_hz, cpu=cpu,
        others=tuple(sorted(others)),
    )  # fmt: skip


def drive(wall: Wall, seconds: float) -> Records:
    """Chunks of a slow cosine at 10 Hz; every row so far."""
    reader = wall.shared.control.reader()
    chunk = wall.shared.slot.record()
    start = time.monotonic()
    while (now := time.monotonic()) < start + seconds:
        t = now - start + 0.1 * np.arange(1, 17)
        chunk["chunk_id"] += 1
        chunk["t0_ns"], chunk["step_ns"], chunk["steps"] = time.monotonic_ns(), STEP, 16
        chunk["valid_ns"] = 10 * STEP
        chunk["q"][0, :16] = (AMPLITUDE_RAD * (1 - np.cos(2 * t)))[:, None]
        wall.shared.slot.write(chunk)
        wall.run(0.1)
    return reader.poll().rows


@pytest.mark.parametrize("rate_hz", [250.0, 4000.0])
def test_a_light_robot_is_controlled_at_its_rate(rate_hz: float) -> None:
    from flywheel.robot.free import JOINTS as N
    from flywheel.robot.free import LIMITS_FILE

    with Wall(plan("flywheel.robot.free:wall_robot", LIMITS_FILE, rate_hz, N)) as wall:
        rows = drive(wall, 1.5)
        found = wall.told["system1"]["self_test"]
        result = wall.result()
    period = round(1e9 / rate_hz)
    deadlines = rows["t_ns"] - rows["late_ns"]
    assert (np.diff(deadlines) % period == 0).all()
    assert (np.diff(deadlines) > 0).all()
    assert found["period_us"] == period / 1e3
    assert found["busy_p50_us"] < 0.8 * found["period_us"]
    assert result.self_test == found
    follow = rows[rows["mode"] == Mode.FOLLOW]
    assert len(follow)
    assert np.abs(follow["q"] - follow["q_ref"]).max() < 0.02


def test_position_servos_on_a_slow_bus_are_streamed_to_at_100_hz(tmp_path: Path) -> None:
    limits = write_limits(tmp_path / "limits.yaml")
    args = {"limits": str(limits)}
    with Wall(plan("flywheel.robot.servos:wall_robot", limits, 100.0, JOINTS, **args)) as wall:
        rows = drive(wall, 3.0)
    follow = rows[rows["mode"] == Mode.FOLLOW]
    assert len(follow) > 50
    assert np.ptp(follow["q_ref"], axis=0).min() > 0.3
    assert (np.abs(follow["q"] - follow["q_ref"]) < 0.25).all()  # the servos' own lag, and the bus's
    assert not rows["tau"].any()
    assert rows["mode"].max() < Mode.STOP_1


def test_system_1_refuses_to_start_on_a_robot_that_is_too_slow_for_its_rate(tmp_path: Path) -> None:
    limits = write_limits(tmp_path / "limits.yaml")
    with pytest.raises(ConfigError, match=r"system1: edge\.control_hz=4000: a tick of tiny takes"):
        Wall(plan("tests.integration.test_rates_wall:slow", limits, 4000.0, JOINTS)).__enter__()


def slow(args: dict[str, Any], world: memoryview) -> Any:
    from flywheel.robot import JointState
    from tests.robots import Tiny

    class Slow(Tiny):
        def read(self, out: JointState) -> None:
            super().read(out)
            end = time.monotonic_ns() + 300_000
            while time.monotonic_ns() < end:
                pass

    return Slow(dt=1 / 4000)
