"""Robots of other kinds: those that take positions, those whose I/O blocks, those of lerobot, one's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.link import Seqlock
from flywheel.edge.rows import chunk_dtype
from flywheel.edge.safety import ACCELERATION, JERK, VELOCITY
from flywheel.edge.system1 import System1
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray, JointState
from flywheel.robot.lerobot import plugins
from flywheel.robot.lerobot import wall_robot as lerobot_robot
from flywheel.robot.remote import LOST, SILENT, RemoteRobot
from flywheel.robot.servos import COUNTS, SerialServos
from flywheel.schema import Limit, Mode
from tests.example_robot import MyArm
from tests.robots import JOINTS, Tiny, limits, write_limits

MS = 1_000_000
STEP = 100 * MS
ROOT = Path(__file__).parents[1]


class Driven:
    """System 1 of any robot on a clock of its own, sent the same approach every 100 ms."""

    def __init__(self, robot: Any) -> None:
        self.robot = robot
        self.slot = Seqlock(chunk_dtype(JOINTS))
        self.ring = ControlRing(control_dtype(JOINTS), 1 << 12)
        self.system = System1(robot, robot.rate_hz, self.slot, self.ring)
        self.period = round(1e9 / robot.rate_hz)
        self.now = 0
        self.path: list[FloatArray] = []

    def send(self, goal: float) -> None:
        here = self.system.reference[0]
        t = 0.1 * np.arange(1, 17)[:, None]
        chunk = self.slot.record()
        chunk["t0_ns"], chunk["step_ns"], chunk["steps"], chunk["valid_ns"] = self.now, STEP, 16, 8 * STEP
        chunk["q"][0, :16] = goal + (here - goal) * np.exp(-2.0 * t)
        chunk["tool"] = 1.0
        self.slot.write(chunk)

    def run(self, seconds: float, goal: float | None = None) -> None:
        for k in range(round(seconds * self.robot.rate_hz)):
            if goal is not None and k * self.period % STEP < self.period:
                self.send(goal)
            self.system.tick(self.now)
            self.path.append(self.system.reference)
            self.now += self.period

    def check(self) -> None:
        p, t, dt = np.array(self.path), self.robot.limits.table(), self.period * 1e-9
        assert (np.abs(p[:, 1]) <= t[VELOCITY]).all()
        assert (np.abs(p[:, 2]) <= t[ACCELERATION] * (1 + 1e-9)).all()
        assert (np.abs(np.diff(p[:, 2], axis=0)) <= t[JERK] * dt * (1 + 1e-6)).all()


class Sdk:
    """Stands for a vendor's library: the arm is where it was told to be one period ago."""

    def __init__(self) -> None:
        self.q: FloatArray = np.zeros(JOINTS)
        self.told: list[FloatArray] = []
        self.grip = self.braked = self.open = False

    def positions(self) -> FloatArray:
        return self.q

    def velocities(self) -> FloatArray:
        return np.zeros(JOINTS)

    def protective_stop_open(self) -> bool:
        return self.open

    def move_to(self, q: FloatArray) -> None:
        self.q = q.copy()
        self.told.append(self.q)

    def gripper(self, on: bool) -> None:
        self.grip = on

    def brake(self) -> None:
        self.braked = True


@pytest.fixture
def limits_file(tmp_path: Path) -> Path:
    return write_limits(tmp_path / "limits.yaml")


# ── position streaming ────────────────────────────────────────────────────────────────────────────────


def test_a_robot_of_ones_own_takes_less_than_forty_lines_and_works(limits_file: Path) -> None:
    assert len((ROOT / "tests" / "example_robot.py").read_text().splitlines()) < 40
    sdk = Sdk()
    driven = Driven(MyArm(sdk, str(limits_file)))
    driven.run(4.0, 0.8)
    driven.check()
    np.testing.assert_allclose(sdk.q, 0.8, atol=2e-3)
    assert sdk.grip
    np.testing.assert_array_equal(np.array(sdk.told), np.array(driven.path)[:, 0])  # the limited reference
    sdk.open = True
    driven.run(0.5, 0.8)
    assert driven.system.mode == Mode.STOP_1
    assert sdk.braked


def test_a_stopped_position_robot_is_told_to_stay_where_it_is(limits_file: Path) -> None:
    sdk = Sdk()
    driven = Driven(MyArm(sdk, str(limits_file)))
    driven.run(1.0, 0.8)
    sdk.velocities = lambda: np.full(JOINTS, np.nan)  # type: ignore[method-assign]
    sdk.move_to = lambda q: sdk.told.append(q.copy())  # type: ignore[method-assign]
    driven.run(0.1, 0.8)
    assert driven.system.mode == Mode.STOP_0
    assert sdk.braked
    assert np.isfinite(sdk.told[-1]).all()
    assert np.ptp(np.array(sdk.told[-20:]), axis=0).max() == 0.0


def test_a_robot_cannot_write_into_the_reference_that_it_is_given() -> None:
    robot = Tiny()
    robot.takes = "position"
    system = System1(robot, 1000.0, Seqlock(chunk_dtype(JOINTS)), ControlRing(control_dtype(JOINTS), 8))
    with pytest.raises(ValueError, match="read-only"):
        system.command[0] = 1.0


@pytest.mark.parametrize("name", ["q", "dq", "bias", "mass", "tool"])
def test_a_robot_cannot_replace_the_arrays_that_system_1_reads(name: str) -> None:
    """A fresh array in ``out.q`` would leave System 1 with the last state for ever: it is copied instead."""
    state = JointState(2)
    before = getattr(state, name)
    setattr(state, name, np.ones_like(before))
    assert getattr(state, name) is before
    assert (before == 1.0).all()
    with pytest.raises(ValueError, match="broadcast"):
        setattr(state, name, np.zeros(9))


def test_a_robot_that_takes_something_else_is_refused() -> None:
    robot = Tiny()
    robot.takes = "velocity"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="takes = 'velocity'"):
        System1(robot, 1000.0, Seqlock(chunk_dtype(JOINTS)), ControlRing(control_dtype(JOINTS), 8))


# ── a device in a process of its own ──────────────────────────────────────────────────────────────────


class Flaky(SerialServos):
    """Servos that answer ten times, and then do what they are told to."""

    def __init__(self, what: str) -> None:
        super().__init__(JOINTS, 4_000_000)
        self._what, self._left = what, 10

    def exchange(self, q_ref: FloatArray | None, tool: float, out: JointState) -> None:
        self._left -= 1
        if self._left < 0 and self._what == "hang":
            time.sleep(3600)
        if self._left < 0 and self._what == "raise":
            raise OSError("the bus is gone")
        if self._what == "never":
            raise OSError("no such port")
        super().exchange(q_ref, tool, out)


def flaky(args: dict[str, Any]) -> Flaky:
    return Flaky(args["what"])


def wait_for(done: Any) -> None:
    end = time.monotonic() + 30.0
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("what", ["hang", "raise"])
def test_a_bus_that_falls_silent_is_a_stop_and_never_an_exception(what: str) -> None:
    robot = RemoteRobot("flaky", "tests.test_robots:flaky", {"what": what}, limits(), 100.0)
    try:
        state = JointState(JOINTS)
        robot.read(state)
        assert np.isfinite(state.q).all()

        def look(age_ms: float) -> bool:
            robot.read(state)
            return time.monotonic_ns() - state.t_ns > age_ms * MS

        wait_for(lambda: look(SILENT * 10 + 20))
        assert state.stop_input
        wait_for(lambda: look(LOST * 10 + 20))
        assert np.isnan(state.q).all()
        system = System1(robot, 100.0, Seqlock(chunk_dtype(JOINTS)), ControlRing(control_dtype(JOINTS), 8))
        system.tick(0)
        assert system.mode == Mode.STOP_0
        assert system.limits_acted & Limit.NOT_FINITE
    finally:
        robot.close()
    assert robot._process.returncode is not None


def test_a_device_that_cannot_be_connected_says_why() -> None:
    with pytest.raises(ConfigError, match=r"flaky: tests\.test_robots:flaky: OSError: no such port"):
        RemoteRobot("flaky", "tests.test_robots:flaky", {"what": "never"}, limits(), 100.0)
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        RemoteRobot("none", "no.such:device", {}, limits(), 100.0)


def test_servos_are_seen_with_their_lag_their_steps_and_their_latency() -> None:
    servos = SerialServos(JOINTS)
    servos.connect()
    out = JointState(JOINTS)
    start = time.monotonic()
    servos.exchange(np.array([0.5, -0.5]), 1.0, out)
    first = out.q.copy()
    assert time.monotonic() - start >= 2 * (8 + 5 * JOINTS) * 10 / 115_200
    assert (np.abs(first) < 0.5).all()
    turn = out.q * COUNTS / (2 * np.pi)
    np.testing.assert_allclose(turn, np.round(turn), atol=1e-6)
    while np.abs(out.q - [0.5, -0.5]).max() > 2e-3:
        servos.exchange(np.array([0.5, -0.5]), 1.0, out)
        assert time.monotonic() - start < 30.0
    servos.stop()
    servos.exchange(np.array([0.0, 0.0]), 1.0, out)
    assert np.abs(out.q - [0.5, -0.5]).max() < 2e-3
    servos.power_on()
    servos.exchange(None, 1.0, out)
    assert np.abs(out.q - [0.5, -0.5]).max() < 2e-3, "power alone moved it"


def test_a_device_that_was_stopped_takes_commands_again_when_it_has_power() -> None:
    robot = RemoteRobot("servos", "tests.test_robots:flaky", {"what": "nothing"}, limits(), 100.0)
    try:
        state = JointState(JOINTS)

        def at(goal: float) -> bool:
            robot.write(np.full(JOINTS, goal), 0.0)
            robot.read(state)
            return bool(np.abs(state.q - goal).max() < 3e-3)

        wait_for(lambda: at(0.2))
        robot.stop()
        seen = state.t_ns
        wait_for(lambda: at(0.0) or state.t_ns > seen + 300 * MS)
        assert np.abs(state.q - 0.2).max() < 3e-3, "it moved although it was stopped"
        robot.power_on()
        wait_for(lambda: at(0.1))
    finally:
        robot.close()


# ── lerobot ───────────────────────────────────────────────────────────────────────────────────────────

PLUGIN = """
from dataclasses import dataclass
from lerobot.robots import Robot, RobotConfig

@RobotConfig.register_subclass("little_arm")
@dataclass(kw_only=True)
class LittleArmConfig(RobotConfig):
    port: str
    calibrated: bool = True

class LittleArm(Robot):
    config_class = LittleArmConfig
    name = "little_arm"

    def __init__(self, config):
        super().__init__(config)
        self._config, self._on = config, False
        self._now = {"shoulder.pos": 10.0, "elbow.pos": 0.0, "gripper.pos": 0.0}

    observation_features = property(lambda self: dict.fromkeys(self._now, float) | {"front": (4, 4, 3)})
    action_features = property(lambda self: dict.fromkeys(self._now, float))
    is_connected = property(lambda self: self._on)
    is_calibrated = property(lambda self: self._config.calibrated)

    def connect(self, calibrate=True):
        assert not calibrate
        self._on = True

    def calibrate(self): raise AssertionError("asks a person")
    def configure(self): pass
    def get_observation(self): return dict(self._now)

    def send_action(self, action):
        self._now.update(action)
        return action

    def disconnect(self):
        self._on = False
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed plugin, and one beside it that nobody asked for."""
    for name, code in (("lerobot_robot_little", PLUGIN), ("lerobot_robot_other", "raise SystemExit(9)")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def lerobot_args(site: Path, **changes: Any) -> dict[str, Any]:
    degree = np.pi / 180
    return {
        "type": "little_arm",
        "plugin": "lerobot_robot_little",
        "config": {"port": "/dev/ttyACM0", "id": "one", "calibration_dir": str(site / "calibration")},
        "joints": [
            {"key": "shoulder.pos", "rad_per_unit": degree},
            {"key": "elbow.pos", "rad_per_unit": -degree, "offset_rad": 0.1},
        ],
        "tool": {"key": "gripper.pos", "zero": 0.0, "one": 100.0},
        "limits": str(write_limits(site / "limits.yaml")),
        "rate_hz": 50.0,
    } | changes


@pytest.mark.slow
def test_a_lerobot_plugin_is_found_imported_in_its_own_process_and_driven(site: Path) -> None:
    assert set(plugins()) >= {"lerobot_robot_little", "lerobot_robot_other"}
    robot = lerobot_robot(lerobot_args(site), memoryview(b""))
    try:
        state = JointState(JOINTS)
        robot.read(state)
        np.testing.assert_allclose(state.q, [10 * np.pi / 180, 0.1])
        robot.write(np.array([0.5, -0.25]), 1.0)

        def there() -> bool:
            robot.read(state)
            return state.held == 1.0

        wait_for(there)
        np.testing.assert_allclose(state.q, [0.5, -0.25])
        assert not state.stop_input
        robot.stop()
        robot.write(np.array([0.0, 0.0]), 0.0)
        wait_for(lambda: robot._process.poll() is None)
        robot.read(state)
        np.testing.assert_allclose(state.q, [0.5, -0.25])
    finally:
        robot.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plugin": "lerobot_robot_none"}, "plugin = 'lerobot_robot_none': no such distribution"),
        ({"type": "big_arm"}, "type = 'big_arm': lerobot knows .*little_arm"),
        ({"config": {"prot": "x"}}, "config of little_arm"),
        ({"tool": {"key": "hand.pos", "zero": 0.0, "one": 1.0}}, "little_arm has no 'hand.pos'"),
    ],
)
def test_what_is_wrong_with_a_lerobot_robot_is_named(site: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        lerobot_robot(lerobot_args(site, **changes), memoryview(b""))


def test_a_lerobot_robot_with_too_few_joints_is_refused_before_anything_is_started(site: Path) -> None:
    args = lerobot_args(site)
    args["joints"] = args["joints"][:1]
    with pytest.raises(ConfigError, match=r"1 are mapped, .*has limits for 2"):
        lerobot_robot(args, memoryview(b""))
    with pytest.raises(ConfigError, match="lerobot: rate_hz"):
        lerobot_robot(lerobot_args(site, rate_hz=1.0), memoryview(b""))


def test_system_1s_process_never_loads_lerobot() -> None:
    """The adapter imports it by name; this is what the contract on imports cannot see."""
    code = (
        "import sys, flywheel.robot.lerobot as adapter, flywheel.edge.processes, flywheel.edge.system1\n"
        "adapter.plugins()\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('lerobot', 'torch', 'draccus')])"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
