"""One tick after another: chunks, splices, the ladder, stops. Each test is a way in which one goes wrong."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.link import Records, Seqlock
from flywheel.edge.rows import CHUNK_STEPS, chunk_dtype
from flywheel.edge.safety import (
    ACCELERATION,
    CATEGORY_0,
    CATEGORY_1,
    CATEGORY_2,
    JERK,
    LOWER,
    UPPER,
    VELOCITY,
)
from flywheel.edge.system1 import System1
from flywheel.edge.tick import COMMAND, CONTROL_WORDS, HEARTBEAT, HEARTBEAT_LIMIT_NS, RESET
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray, JointState
from flywheel.schema import Limit, Mode
from tests.robots import JOINTS, LIMITS, Tiny, limits

MS = 1_000_000
STEP = 100 * MS


class Rig:
    """A tiny robot, its System 1, and a clock; records every reference."""

    def __init__(self, rate_hz: float = 1000.0, **changes: Any) -> None:
        self.robot = Tiny(dt=1.0 / rate_hz)
        self.robot.limits = limits(**changes)
        self.table = self.robot.limits.table()
        self.slot = Seqlock(chunk_dtype(JOINTS))
        self.ring = ControlRing(control_dtype(JOINTS), 1 << 14)
        self.control = np.zeros(CONTROL_WORDS, np.int64)
        self.system = System1(self.robot, rate_hz, self.slot, self.ring, self.control)
        self.period = round(1e9 / rate_hz)
        self.now = 0
        self.ids = 0
        self.path: list[FloatArray] = []

    def send(
        self, points: Any, t0_ns: int | None = None, valid_s: float = 0.8, tool: float = 0.0, **raw: Any
    ) -> None:
        """Publish a chunk with waypoints ``points`` [T, n]; ``raw`` overwrites fields of the record."""
        q = np.atleast_2d(np.asarray(points, np.float64))
        c = self.slot.record()
        c["chunk_id"] = self.ids
        self.ids += 1
        c["t0_ns"] = self.now if t0_ns is None else t0_ns
        c["step_ns"] = STEP
        c["steps"] = len(q)
        c["valid_ns"] = round(valid_s * 1e9)
        c["q"][0, : len(q)] = q
        c["tool"][0, : len(q)] = tool
        for name, value in raw.items():
            c[name] = value  # e.g. one NaN for all waypoints
        self.slot.write(c)

    def run(self, seconds: float, each: Callable[[], None] | None = None, every_s: float = 0.1) -> None:
        """Tick; ``each`` is called every ``every_s``, at first at once."""
        gap = round(every_s * 1e9)
        start = self.now
        while self.now < start + round(seconds * 1e9):
            if each is not None and (self.now - start) % gap == 0:
                each()
            self.system.tick(self.now)
            self.path.append(self.system.reference)
            self.now += self.period

    def approach(self, goal: float = 1.0, rate: float = 2.0) -> FloatArray:
        """Waypoints of a calm approach to ``goal`` from where the reference is."""
        here = self.system.reference[0] if self.now else np.zeros(JOINTS)
        t = 0.1 * np.arange(1, 17)[:, None]
        points: FloatArray = goal + (here - goal) * np.exp(-rate * t)
        return points

    def follow(self, seconds: float = 0.6, goal: float = 1.0) -> None:
        """Get going."""
        self.run(seconds, lambda: self.send(self.approach(goal)))
        assert self.mode() == Mode.FOLLOW

    def mode(self) -> Mode:
        return Mode(self.system.mode)

    def rows(self) -> Records:
        """Every control row so far."""
        return self.ring.reader().poll().rows

    def check(self) -> None:
        """No limit was exceeded, and nothing jumped, in any reference so far."""
        p = np.array(self.path)
        dt = self.period * 1e-9
        t = self.table
        assert np.isfinite(p).all()
        assert ((p[:, 0] >= t[LOWER]) & (p[:, 0] <= t[UPPER])).all()
        assert (np.abs(p[:, 1]) <= t[VELOCITY]).all()
        assert (np.abs(p[:, 2]) <= t[ACCELERATION] * (1 + 1e-9)).all()
        assert (np.abs(np.diff(p[:, 2], axis=0)) <= t[JERK] * dt * (1 + 1e-6)).all()
        assert (np.abs(np.diff(p[:, 0], axis=0)) <= t[VELOCITY] * dt * 1.001).all()


# ── following ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rate_hz", [250.0, 1000.0, 4000.0])
def test_chunks_are_followed_to_their_goal_at_any_rate(rate_hz: float) -> None:
    rig = Rig(rate_hz)
    rig.run(4.0, lambda: rig.send(rig.approach(), tool=1.0))
    rig.check()
    np.testing.assert_allclose(rig.robot.q, 1.0, atol=2e-3)
    assert rig.robot.tool == 1.0
    rows = rig.rows()
    assert np.abs(rows["q"] - rows["q_ref"]).max() < 0.01
    assert (np.diff(rows["t_ns"]) == rig.period).all()
    assert rows["chunk_age_ns"].max() <= 100 * MS


def test_a_robot_that_knows_no_inertia_is_controlled_too() -> None:
    rig = Rig()
    rig.robot.knows_mass = False
    rig.run(4.0, lambda: rig.send(rig.approach()))
    rig.check()
    np.testing.assert_allclose(rig.robot.q, 1.0, atol=0.01)


def test_steps_are_not_skipped_from_standstill_however_long_inference_took() -> None:
    """A chunk computed for half a second while the arm stood still begins with its first step."""
    rig = Rig()
    rig.run(0.6)
    line = np.arange(1, 17)[:, None] * np.full((1, JOINTS), 0.02)
    rig.send(line, t0_ns=rig.now - 500 * MS)
    rig.run(0.001)
    rig.send(line, t0_ns=rig.now - 500 * MS)
    start = rig.now
    rig.run(0.2)
    assert rig.mode() == Mode.FOLLOW
    assert rig.rows()["mode"][rig.rows()["t_ns"] == start][0] == Mode.FOLLOW
    # 0.2 s after the start it is at the second waypoint, not at the seventh
    np.testing.assert_allclose(rig.robot.q, line[1], atol=0.004)
    rig.check()


def test_while_moving_a_chunk_is_joined_where_its_observation_says() -> None:
    """Chunks that come 60 ms after their observation: what was executed meanwhile is not executed again."""
    rig = Rig()
    speed = 0.5

    def line() -> None:
        seen = rig.now - 60 * MS
        due = seen * 1e-9 + 0.1 * np.arange(1, 17)
        rig.send((speed * due)[:, None] * np.ones((1, JOINTS)), t0_ns=seen)

    rig.run(2.0, line)
    np.testing.assert_allclose(rig.robot.q, 2.0 * speed, atol=0.01)
    rig.check()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_no_stream_of_chunks_makes_the_reference_jump_or_exceed_a_limit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig()

    def hostile() -> None:
        kind = rng.integers(0, 8)
        q = rng.uniform(-3, 3, size=(int(rng.integers(1, 20)), JOINTS))
        if kind == 0:
            q[rng.integers(0, len(q))] = rng.choice([math.nan, math.inf, -math.inf])
        if kind == 1:
            q[:] = 1e300
        t0 = rig.now - int(rng.integers(-20, 1500)) * MS
        raw: dict[str, Any] = {}
        if kind == 2:
            raw["steps"] = int(rng.choice([-1, 0, CHUNK_STEPS + 1, 2**62]))
        if kind == 3:
            raw["step_ns"] = int(rng.choice([0, -1, 1, 2**62]))
        if kind < 7:
            rig.send(q, t0, float(rng.uniform(-1, 3)), float(rng.choice([0, 1, math.nan])), **raw)

    rig.run(3.0, hostile, every_s=float(rng.choice([0.005, 0.04, 0.1])))
    rig.check()
    assert np.isfinite(rig.rows()["tau"]).all()


@pytest.mark.parametrize(
    ("bad", "flag"),
    [
        ({"q": math.nan}, Limit.NOT_FINITE),
        ({"q": math.inf}, Limit.NOT_FINITE),
        ({"tool": math.nan}, Limit.NOT_FINITE),
        ({"q": 9.0}, Limit.POSITION),
        ({"steps": 0}, Limit.NOT_FINITE),
        ({"steps": CHUNK_STEPS + 1}, Limit.NOT_FINITE),
        ({"step_ns": 0}, Limit.NOT_FINITE),
        ({"step_ns": 10**11}, Limit.NOT_FINITE),
        ({"t0_ns": 10**15}, Limit.NOT_FINITE),
    ],
)
def test_a_bad_chunk_is_refused_and_flagged_and_the_last_good_one_followed(
    bad: dict[str, Any], flag: Limit
) -> None:
    rig = Rig()
    rig.follow()
    good = rig.rows()["chunk_id"][-1]
    rig.send(rig.approach(), **bad)
    rig.run(0.05)
    rows = rig.rows()[-50:]
    assert (rows["chunk_id"] == good).all()
    assert rows["limits"][0] & flag
    assert rig.mode() == Mode.FOLLOW
    assert rig.system.counters["refused"] == 1
    rig.check()


def test_waypoints_a_little_out_of_range_are_pulled_in() -> None:
    rig = Rig()
    rig.run(3.0, lambda: rig.send(np.full((16, JOINTS), 2.1) * [1.0, 0.75]))
    rig.check()
    np.testing.assert_allclose(rig.robot.q, rig.table[UPPER], atol=5e-3)
    assert rig.system.counters["refused"] == 0


def test_a_writer_killed_half_way_leaves_the_last_chunk_in_force() -> None:
    rig = Rig()
    rig.follow()
    rig.slot.words[0] += 1  # odd: a write began and never ended
    rig.slot.words[9:] = -1
    rig.run(0.3)
    assert rig.mode() == Mode.FOLLOW
    rig.run(1.2)
    assert rig.mode() == Mode.HOLD
    rig.send(rig.approach())
    rig.run(0.05)
    rig.send(rig.approach())
    rig.run(0.05)
    assert rig.mode() == Mode.FOLLOW
    rig.check()


# ── the ladder ────────────────────────────────────────────────────────────────────────────────────────


def test_silence_walks_down_the_ladder_within_its_bounds() -> None:
    rig = Rig()
    rig.follow()
    last = rig.now - 100 * MS  # when the last chunk was captured
    rig.run(3.0)
    rig.check()
    rows = rig.rows()
    starts = {Mode(rows["mode"][i]): int(rows["t_ns"][i]) for i in np.flatnonzero(np.diff(rows["mode"])) + 1}
    assert list(starts) == [Mode.FOLLOW, Mode.CARRY_ON, Mode.RAMP, Mode.HOLD, Mode.FALLBACK]
    assert starts[Mode.CARRY_ON] == last + 800 * MS + MS
    assert starts[Mode.RAMP] == starts[Mode.CARRY_ON] + 100 * MS
    assert starts[Mode.HOLD] <= starts[Mode.RAMP] + 400 * MS
    assert starts[Mode.FALLBACK] == starts[Mode.HOLD] + 1000 * MS
    carried = rows[(rows["mode"] == Mode.CARRY_ON)]["dq"]
    assert np.abs(carried - carried[0]).max() < 0.02
    held = rows[rows["t_ns"] > starts[Mode.HOLD]]
    assert np.ptp(held["q_ref"], axis=0).max() == 0.0


def test_a_chunk_that_is_used_up_is_stale_even_if_young() -> None:
    rig = Rig()
    rig.follow()
    rig.send(rig.approach()[:2], valid_s=0.8)
    rig.run(0.25)
    assert rig.mode() == Mode.CARRY_ON


def test_the_limits_file_bounds_the_age_that_a_chunk_may_claim() -> None:
    rig = Rig()
    rig.follow()
    rig.send(rig.approach(), valid_s=1000.0)
    rig.run(1.002)
    assert rig.mode() == Mode.CARRY_ON


def test_every_change_of_mode_is_kept_beside_the_rows() -> None:
    rig = Rig()
    rig.follow()
    rig.run(2.0)  # the chunk runs out
    rig.control[COMMAND] = CATEGORY_1
    rig.run(0.5)
    rows = rig.rows()
    changes = rig.ring.changes.reader().poll().rows
    first = np.flatnonzero(np.diff(rows["mode"], prepend=-1))
    assert len(first) >= 5
    assert changes["row"].tolist() == first.tolist()
    for name in rows.dtype.names or ():
        assert np.array_equal(changes[name], rows[first][name]), name


def test_recovery_needs_chunks_in_a_row_and_does_not_jump() -> None:
    rig = Rig()
    rig.follow()
    rig.run(1.6)
    assert rig.mode() == Mode.HOLD
    rig.send(rig.approach(-0.9))
    rig.run(0.05)
    assert rig.mode() == Mode.HOLD
    rig.send(np.full((16, JOINTS), math.nan))  # a bad one breaks the row
    rig.run(0.05)
    rig.send(rig.approach(-0.9))
    rig.run(0.05)
    assert rig.mode() == Mode.HOLD
    rig.send(rig.approach(-0.9))
    rig.run(0.05)
    assert rig.mode() == Mode.FOLLOW
    rig.run(2.0, lambda: rig.send(rig.approach(-0.9)))
    rig.check()
    np.testing.assert_allclose(rig.robot.q, -0.9, atol=0.05)


def test_what_is_held_is_not_dropped_when_chunks_stop() -> None:
    rig = Rig()
    rig.run(0.5, lambda: rig.send(rig.approach(), tool=1.0))
    rig.run(3.0)
    assert rig.mode() == Mode.FALLBACK
    assert rig.robot.tool == 1.0


def test_a_supervisor_that_is_gone_brings_the_arm_to_rest() -> None:
    rig = Rig()
    rig.control[HEARTBEAT] = 1
    rig.run(1.9, lambda: rig.send(rig.approach()))
    assert rig.mode() == Mode.FOLLOW
    rig.run(1.0, lambda: rig.send(rig.approach(-0.5)))
    assert rig.mode() == Mode.HOLD
    assert rig.system.resting
    rig.control[HEARTBEAT] = rig.now
    rig.run(0.5, lambda: rig.send(rig.approach(-0.5)))
    assert rig.mode() == Mode.FOLLOW
    rig.check()


# ── people ────────────────────────────────────────────────────────────────────────────────────────────

SPEED = {"clause": "test clause", "max": 2.0}
SEPARATION = {
    "clause": "test clause", "human_speed_m_s": 1.6, "reaction_s": 0.1, "stopping_s": 0.4,
    "intrusion_m": 0.1, "sensor_m": 0.05, "robot_m": 0.05,
}  # fmt: skip
REACH = 2.0 / 3.0  # m: the tool of a one-joint arm is at its 2 m/s when the joint is at its 3 rad/s


def beside(rig: Rig, human_m: Callable[[], float]) -> None:
    """Somebody ``human_m`` away; the tool goes as fast as the first joint takes it."""

    def look(s: JointState) -> None:
        s.human_m = human_m()
        s.tool[:] = 0.0, 0.0, 0.0, REACH * abs(s.dq[0])

    rig.robot.disturb = look


def test_a_person_who_comes_near_slows_the_arm_down_and_does_not_stop_it() -> None:
    """1 m + 0.5 s · v away the tool may do v: 3 m is full speed, 1.4 m is 0.8 m/s."""
    rig = Rig(tool_speed=SPEED, separation=SEPARATION)
    beside(rig, lambda: 3.0)
    leaps = iter([1.9, -1.9, 1.9, -1.9, 1.9, -1.9, 1.9])
    goal = next(leaps)

    def there_and_back() -> None:
        nonlocal goal
        if abs(rig.system.reference[0, 0] - goal) < 0.02:
            goal = next(leaps)
        rig.send(np.full((16, JOINTS), [goal, 0.5 * goal]), valid_s=0.8)

    rig.run(2.0, there_and_back)
    fast = np.abs(np.array(rig.path)[:, 1, 0]).max()
    assert fast * REACH > 1.0
    before = len(rig.path)
    # Walked up to, not appeared: the arm has the time that the formula reckons with.
    steps = iter([*np.linspace(3.0, 1.4, 1600), *[1.4] * 10_000])
    beside(rig, lambda: float(next(steps)))
    rig.run(4.0, there_and_back)
    near = np.array(rig.path)[before + 1700 :, 1, 0]
    allowed = (1.4 - 1.0) / 0.5
    assert np.abs(near).max() * REACH <= allowed
    assert np.abs(near).max() * REACH > 0.8 * allowed
    assert rig.mode() == Mode.FOLLOW
    rig.check()


@pytest.mark.parametrize("distance", [0.9, math.nan, -math.inf])
@pytest.mark.parametrize(("category", "ends"), [(1, Mode.STOP_1), (2, Mode.HOLD)])
def test_a_person_too_near_or_out_of_sight_is_a_protective_stop(
    distance: float, category: int, ends: Mode
) -> None:
    rig = Rig(tool_speed=SPEED, separation=SEPARATION, stops=LIMITS["stops"] | {"protective": category})
    away = math.inf
    beside(rig, lambda: away)
    rig.follow()
    away = distance
    rig.run(0.5, lambda: rig.send(rig.approach()))
    assert rig.mode() == ends
    assert rig.rows()["limits"][-1] & Limit.SEPARATION
    rig.check()
    away = math.inf
    rig.run(0.5, lambda: rig.send(rig.approach()))
    assert rig.mode() == (Mode.FOLLOW if category == 2 else Mode.STOP_1)  # a category 1 stop is latched
    rig.check()


def test_where_contact_is_permitted_the_tool_stays_below_the_speed_that_hurts_nobody() -> None:
    contact = {
        "clause": "test clause", "moving_mass_kg": 8.0, "payload_kg": 1.0, "area_cm2": 1.0,
        "regions": [
            {"name": "hand", "force_n": 100.0, "pressure_n_cm2": 900.0, "stiffness_n_m": 75e3, "mass_kg": 0.6}
        ],
    }  # fmt: skip
    rig = Rig(tool_speed=SPEED, contact=contact)
    assert rig.robot.limits.contact is not None
    most = rig.robot.limits.contact.speed
    beside(rig, lambda: math.nan)  # nobody has to be seen
    rig.run(3.0, lambda: rig.send(np.full((16, JOINTS), 1.4)))
    speed = REACH * np.abs(np.array(rig.path)[:, 1, 0]).max()
    assert 0.8 * most < speed <= most
    assert rig.mode() == Mode.FOLLOW
    rig.check()
    rig.robot.disturb = lambda s: s.tool.__setitem__(3, most * 1.01)
    rig.run(0.001)
    assert rig.rows()["limits"][-1] & Limit.CONTACT
    assert rig.mode() == Mode.STOP_1


# ── the known failures of others ──────────────────────────────────────────────────────────────────────


def test_padding_after_a_short_chunk_is_never_executed() -> None:
    """Zeros behind the last step are no goal: elsewhere they decoded to the mean action of the data set."""
    rig = Rig()
    rig.follow(goal=1.4)
    rig.run(0.4, lambda: rig.send(rig.approach(1.4)))
    here = rig.system.reference[0].copy()
    rig.send(np.vstack([here + 0.02 * k for k in (1, 2, 3)]))  # the rest of the record is zeros
    assert not rig.slot.words[8 + 5 + 3 * JOINTS : 8 + 5 + CHUNK_STEPS * JOINTS].any()
    rig.path.clear()
    rig.run(2.0)
    assert np.array(rig.path)[:, 0].min() > here.min() - 0.01
    assert rig.mode() in (Mode.HOLD, Mode.FALLBACK)
    rig.check()


def test_a_slow_first_inference_is_not_remembered() -> None:
    """Elsewhere the warm-up's latency stayed the estimate for ever, and every later chunk skipped its start.

    A chunk that took 900 ms, at standstill, then chunks that take 20 ms: after it the arm moves exactly as
    one that never had the slow one.
    """
    paths = []
    for slow in (True, False):
        rig = Rig()
        rig.run(1.0)
        if slow:
            rig.send(np.zeros((16, JOINTS)), t0_ns=rig.now - 900 * MS)
        rig.run(0.5)
        rig.path.clear()
        begun = rig.now

        def line(rig: Rig = rig, begun: int = begun) -> None:
            seen = rig.now - 20 * MS
            due = (seen - begun) * 1e-9 + 0.1 * np.arange(1, 17)
            rig.send((0.4 * due)[:, None] * np.ones((1, JOINTS)), t0_ns=seen)

        rig.run(2.0, line)
        rig.check()
        paths.append(np.array(rig.path))
    np.testing.assert_array_equal(paths[0], paths[1])
    np.testing.assert_allclose(paths[0][-1, 0], 0.8, atol=0.03)


# ── stops ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_obstacle_stops_the_arm_and_is_not_pushed_any_further() -> None:
    rig = Rig()
    rig.follow()
    rig.robot.blocked = True
    rig.robot.dq[:] = 0.0
    rig.run(1.5, lambda: rig.send(rig.approach()))
    assert rig.mode() == Mode.STOP_1
    rows = rig.rows()
    at = int(np.flatnonzero(rows["mode"] == Mode.STOP_1)[0])
    assert rows["limits"][at] & Limit.TRACKING_ERROR
    assert np.abs(rows["q_ref"][at] - rows["q"][at]).max() < 0.01  # from where the arm is
    assert np.abs(rows["tau"][-1]).max() == 0.0
    assert rig.robot.stops == 1


@pytest.mark.parametrize("which", ["q", "dq", "bias", "mass"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measurement_that_is_no_number_removes_power_at_once(which: str, value: float) -> None:
    rig = Rig()
    rig.follow()

    def broken(s: JointState) -> None:
        getattr(s, which).flat[-1] = value

    rig.robot.disturb = broken
    rig.run(0.001)
    assert rig.mode() == Mode.STOP_0
    assert not rig.robot.tau.any()
    assert rig.robot.stops == 1
    rig.run(0.5, lambda: rig.send(rig.approach()))
    assert rig.mode() == Mode.STOP_0
    assert rig.robot.stops == 1
    assert (rig.rows()["limits"][-1] & Limit.NOT_FINITE) != 0
    assert np.isfinite(rig.system.reference).all()


@pytest.mark.parametrize(
    ("broken", "flag"),
    [
        (lambda s: s.q.__setitem__(0, 2.03), Limit.POSITION),
        (lambda s: s.dq.__setitem__(1, -2.6), Limit.VELOCITY),
        (lambda s: s.tool.__setitem__(3, 1.6), Limit.TOOL_SPEED),
        (lambda s: s.tool.__setitem__(0, 1.1), Limit.WORKSPACE),
    ],
)
def test_a_broken_limit_is_a_controlled_stop(broken: Callable[[JointState], None], flag: Limit) -> None:
    box = {"clause": "test clause", "lower": [-1.0, -1.0, 0.0], "upper": [1.0, 1.0, 2.0]}
    rig = Rig(tool_speed={"clause": "test clause", "max": 1.5}, workspace=box)
    rig.follow()
    rig.robot.disturb = broken
    rig.run(0.001)
    assert rig.mode() == Mode.STOP_1
    assert rig.rows()["limits"][-1] & flag


@pytest.mark.parametrize(("category", "ends"), [(1, Mode.STOP_1), (2, Mode.HOLD)])
def test_the_protective_stop_input_stops_smoothly(category: int, ends: Mode) -> None:
    rig = Rig(stops=LIMITS["stops"] | {"protective": category})
    rig.follow()

    def opened(s: JointState) -> None:
        s.stop_input = True

    rig.robot.disturb = opened
    rig.run(0.5, lambda: rig.send(rig.approach()))
    assert rig.mode() == ends
    rig.check()
    assert rig.rows()["limits"][-1] & Limit.PROTECTIVE_STOP
    assert rig.robot.stops == (1 if category == 1 else 0)


@pytest.mark.parametrize(
    ("command", "ends"), [(CATEGORY_2, Mode.HOLD), (CATEGORY_1, Mode.STOP_1), (CATEGORY_0, Mode.STOP_0)]
)
def test_the_supervisor_can_ask_for_any_stop_and_a_person_resets_it(command: int, ends: Mode) -> None:
    rig = Rig()
    rig.follow()
    rig.control[COMMAND] = command
    rig.run(0.5, lambda: rig.send(rig.approach()))
    assert rig.mode() == ends
    rig.control[RESET] += 1
    rig.run(0.3, lambda: rig.send(rig.approach()))
    assert rig.mode() == ends  # the command still stands
    rig.control[COMMAND] = 0
    rig.run(0.2, lambda: rig.send(rig.approach()))
    if ends != Mode.HOLD:
        assert rig.mode() == ends  # latched
        assert (rig.robot.stops, rig.robot.starts) == (1, 0)
        rig.control[RESET] += 1
        rig.run(0.3, lambda: rig.send(rig.approach()))
        assert (rig.robot.stops, rig.robot.starts) == (1, 1), "it follows without power"
    assert rig.mode() == Mode.FOLLOW
    if ends != Mode.STOP_0:  # brakes know no jerk limit
        rig.check()


@pytest.mark.parametrize("command", [-5, 99, 2**62, -(2**62)])
def test_garbage_in_the_command_word_is_harmless_or_a_stop(command: int) -> None:
    rig = Rig()
    rig.follow()
    rig.control[COMMAND] = command
    rig.run(0.2, lambda: rig.send(rig.approach()))
    assert rig.mode() == (Mode.FOLLOW if command < 0 else Mode.STOP_0)


def test_a_controlled_stop_that_does_not_follow_its_reference_loses_power() -> None:
    rig = Rig()
    rig.follow()
    rig.control[COMMAND] = CATEGORY_1

    def runaway(s: JointState) -> None:
        s.q[0] = rig.system.reference[0, 0] + 0.3

    rig.run(0.01)
    assert rig.mode() == Mode.STOP_1
    rig.robot.disturb = runaway
    rig.run(0.002)
    assert rig.mode() == Mode.STOP_0


# ── the loop ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_tick_allocates_nothing_that_stays() -> None:
    rig = Rig()
    rig.follow()
    system = rig.system
    robot = rig.robot
    robot.write = lambda tau, tool: None  # type: ignore[method-assign]
    robot.read = lambda out: None  # type: ignore[method-assign]
    for _ in range(100):
        system.tick(rig.now)
    gc.collect()
    gc.disable()
    try:
        before = sys.getallocatedblocks()
        for _ in range(2000):
            system.tick(rig.now)
        after = sys.getallocatedblocks()
    finally:
        gc.enable()
    assert after - before < 50  # one block a tick would be 2000


def test_a_rehearsal_leaves_no_trace_in_any_mode() -> None:
    """Two robots, one of which rehearses every tick, whatever comes: they and their rows stay the same."""
    plain, rehearsed = Rig(), Rig()
    tick = rehearsed.system.tick

    def after_rehearsal(now_ns: int, late_ns: int = 0) -> None:
        rehearsed.system.rehearse(now_ns)
        rehearsed.system.rehearse(now_ns + 1)
        tick(now_ns, late_ns)

    rehearsed.system.tick = after_rehearsal  # type: ignore[method-assign]
    for rig in (plain, rehearsed):
        rig.follow()
        rig.run(3.0)  # no more chunks: down the whole ladder
        rig.follow()
        rig.robot.q[0] = np.nan
        rig.run(0.05)
    assert rehearsed.rows().tobytes() == plain.rows().tobytes()
    assert {Mode.FOLLOW, Mode.HOLD, Mode.STOP_0} <= {Mode(m) for m in plain.rows()["mode"]}
    assert rehearsed.system.counters == plain.system.counters


def test_a_new_episode_forgets_the_last_one() -> None:
    rig = Rig()
    rig.follow()
    rig.robot.q[:] = 0.3
    rig.robot.dq[:] = 0.0
    rig.system.reset()
    rig.path.clear()
    rig.run(0.2)
    assert rig.mode() == Mode.HOLD
    np.testing.assert_array_equal(rig.robot.q, 0.3)
    assert rig.rows()["chunk_id"][-1] == -1
    rig.check()


def test_wrong_joints_are_refused_before_anything_moves() -> None:
    robot = Tiny()
    with pytest.raises(ValueError, match="made for 2 joints"):
        System1(robot, 1000.0, Seqlock(chunk_dtype(3)), ControlRing(control_dtype(2), 8))
    with pytest.raises(ConfigError, match=r"edge\.control_hz=500: tiny takes commands at 1000 Hz"):
        System1(robot, 500.0, Seqlock(chunk_dtype(2)), ControlRing(control_dtype(2), 8))
    robot.joints = 3
    with pytest.raises(ValueError, match="its limits are for 2"):
        System1(robot, 1000.0, Seqlock(chunk_dtype(3)), ControlRing(control_dtype(3), 8))


def test_heartbeats_are_not_looked_for_in_lockstep() -> None:
    rig = Rig()
    rig.run(3.0, lambda: rig.send(rig.approach()))
    assert rig.mode() == Mode.FOLLOW
    assert HEARTBEAT_LIMIT_NS < 3_000_000_000
