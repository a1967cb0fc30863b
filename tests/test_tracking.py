"""The control law: smooth paths, references that never exceed a limit, torques by the formula."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import ruckig
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from flywheel.edge import tracking
from flywheel.edge.safety import ACCELERATION, JERK, LOWER, UPPER, VELOCITY
from flywheel.edge.tracking import (
    ACC,
    POS,
    VEL,
    advance,
    approach,
    coast,
    control,
    excursion,
    first_step,
    follow,
    sample,
    tangent,
)
from flywheel.robot import FloatArray
from flywheel.schema import Limit
from tests.robots import INERTIA, JOINTS, limits

MS = 1_000_000
STEP = 100 * MS
TABLE = limits().table()
GAINS = tracking.gains()
DT = 1e-3
RAMP_S = limits().ladder.ramp_s


def check_limits(path: FloatArray, dt: float) -> None:
    """``path`` [ticks, 3, n] of references: every limit holds at every tick, differences included."""
    eps = 1 + 1e-9
    assert (path[:, POS] >= TABLE[LOWER]).all()
    assert (path[:, POS] <= TABLE[UPPER]).all()
    assert (np.abs(path[:, VEL]) <= TABLE[VELOCITY] * eps).all()
    assert (np.abs(path[:, ACC]) <= TABLE[ACCELERATION] * eps).all()
    assert (np.abs(np.diff(path[:, ACC], axis=0)) <= TABLE[JERK] * dt * (1 + 1e-6)).all()
    # the rows belong together: v is the derivative of p, a of v (rest snaps v by at most REST_VELOCITY)
    slack = 2 * tracking.REST_VELOCITY
    moved = np.diff(path[:, POS], axis=0) / dt
    assert (np.abs(moved - (path[1:, VEL] + path[:-1, VEL]) / 2) <= TABLE[JERK] * dt * dt + slack).all()
    sped = np.diff(path[:, VEL], axis=0)
    assert (np.abs(sped - (path[1:, ACC] + path[:-1, ACC]) / 2 * dt) <= slack).all()


def drive(wanted: FloatArray, dt: float) -> FloatArray:
    """References [ticks + 1, 3, n] for accelerations asked for [ticks, n], from rest in the middle."""
    ref = np.zeros((3, JOINTS))
    path = [ref.copy()]
    for row in wanted:
        for i in range(JOINTS):
            advance(ref, i, float(row[i]), dt, TABLE)
        path.append(ref.copy())
    return np.array(path)


# ── the reference ─────────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2.5e-4, 1e-3, 4e-3, 1e-2]),
    st.sampled_from([1.0, 30.0, 1e6]),
    st.integers(1, 400),
)
@settings(max_examples=40, deadline=None)
def test_no_demand_makes_the_reference_exceed_a_limit(seed: int, dt: float, scale: float, hold: int) -> None:
    rng = np.random.default_rng(seed)
    ticks = 3000
    demands = rng.normal(scale=scale, size=(ticks // hold + 1, JOINTS))
    check_limits(drive(np.repeat(demands, hold, axis=0)[:ticks], dt), dt)


@pytest.mark.parametrize("demand", [math.inf, -math.inf, 1e308, -1e308])
@pytest.mark.parametrize("dt", [2.5e-4, 1e-3, 4e-3, 1e-2])
def test_a_demand_for_ever_ends_at_rest_just_inside_of_the_range(demand: float, dt: float) -> None:
    path = drive(np.full((round(4.0 / dt), JOINTS), demand), dt)
    check_limits(path, dt)
    edge = TABLE[UPPER if demand > 0 else LOWER]
    assert (np.abs(path[-1, POS] - edge) < 0.01).all()
    assert (np.abs(path[-1, VEL]) < max(0.02, 5 * dt)).all()


def test_a_demand_that_is_not_a_number_brings_the_arm_to_rest() -> None:
    path = drive(np.vstack([np.full((200, JOINTS), 9.0), np.full((600, JOINTS), math.nan)]), DT)
    check_limits(path, DT)
    assert (np.abs(path[200, VEL]) > 0.5).all()
    assert (np.abs(path[-1, VEL]) < 0.05).all()


def test_a_reference_found_out_of_range_comes_back_and_goes_no_further() -> None:
    ref = np.zeros((3, JOINTS))
    ref[POS] = TABLE[UPPER] + 0.1
    want = np.zeros((3, JOINTS))
    for _ in range(2000):
        before = ref[POS].copy()
        follow(ref, want, DT, GAINS, TABLE)
        assert (ref[POS] <= np.maximum(before, TABLE[UPPER]) + 1e-12).all()
    np.testing.assert_allclose(ref[POS], 0.0, atol=1e-3)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2.5e-4, 1e-3, 4e-3, 1e-2]))
@settings(max_examples=40, deadline=None)
def test_a_ramp_from_any_motion_rests_within_its_time_bound(seed: int, dt: float) -> None:
    rng = np.random.default_rng(seed)
    before = drive(np.repeat(rng.normal(scale=60.0, size=(4, JOINTS)), round(0.05 / dt), axis=0), dt)
    ref = before[-1].copy()
    path = [ref.copy()]
    rest = False
    while not rest:
        rest = coast(ref, np.zeros(JOINTS), dt, TABLE)
        path.append(ref.copy())
        assert len(path) * dt < RAMP_S
    check_limits(np.array(path), dt)
    assert not ref[VEL:].any()
    stays = ref.copy()
    coast(ref, np.zeros(JOINTS), dt, TABLE)
    np.testing.assert_array_equal(ref, stays)


def test_carrying_on_keeps_the_velocity() -> None:
    ref = drive(np.full((60, JOINTS), 10.0), DT)[-1].copy()
    ref[ACC] = 0.0
    velocity = ref[VEL].copy()
    for _ in range(100):
        assert not coast(ref, velocity, DT, TABLE)
    np.testing.assert_allclose(ref[VEL], velocity, rtol=1e-9)


# ── Ruckig as the judge ───────────────────────────────────────────────────────────────────────────────
# Berscheid and Kröger, Jerk-limited real-time trajectory generation, RSS 2021: time-optimal under the same
# limits. It allocates, and cannot be called from compiled code; what it would win is what these tests bound.


def optimal(state: FloatArray, i: int, goal: float | None) -> float:
    """Least time, s, from ``state`` [3] of joint ``i`` to rest, at ``goal`` or anywhere."""
    inp = ruckig.InputParameter(1)
    if goal is None:
        inp.control_interface = ruckig.ControlInterface.Velocity
    else:
        inp.target_position = [goal]
    inp.current_position, inp.current_velocity, inp.current_acceleration = ([float(x)] for x in state)
    inp.target_velocity = inp.target_acceleration = [0.0]
    inp.max_velocity = [float(TABLE[VELOCITY, i]) * (1 + 1e-9)]
    inp.max_acceleration, inp.max_jerk = [float(TABLE[ACCELERATION, i])], [float(TABLE[JERK, i])]
    planned = ruckig.Trajectory(1)
    assert ruckig.Ruckig(1).calculate(inp, planned) in (ruckig.Result.Working, ruckig.Result.Finished)
    return float(planned.duration)


def in_motion(rng: np.random.Generator, dt: float) -> FloatArray:
    """A reference [3, n] somewhere in the middle of something."""
    rows = rng.normal(scale=60.0, size=(4, JOINTS))
    ref: FloatArray = drive(np.repeat(rows, round(float(rng.uniform(0.01, 0.1)) / dt), axis=0), dt)[-1].copy()
    return ref


@given(st.integers(0, 2**32 - 1), st.sampled_from([2.5e-4, 1e-3, 4e-3, 1e-2]))
@settings(max_examples=60, deadline=None)
def test_a_ramp_to_rest_is_as_quick_as_ruckigs(seed: int, dt: float) -> None:
    """Six ticks beyond the optimum, at most (the range is out of the way: it may only make it longer)."""
    ref = in_motion(np.random.default_rng(seed), dt)
    best = max(optimal(ref[:, i], i, None) for i in range(JOINTS))
    path, rest = [ref.copy()], False
    while not rest:
        rest = coast(ref, np.zeros(JOINTS), dt, TABLE)
        path.append(ref.copy())
        assert len(path) * dt < 2.0
    check_limits(np.array(path), dt)
    assert (len(path) - 1) * dt <= best + 6 * dt


@given(st.integers(0, 2**32 - 1), st.sampled_from([2.5e-4, 1e-3, 4e-3]))
@settings(max_examples=40, deadline=None)
def test_a_new_target_is_reached_within_a_third_more_time_than_ruckig_takes(seed: int, dt: float) -> None:
    """To a milliradian: ``follow`` closes the last of it exponentially, which is what makes it calm."""
    rng = np.random.default_rng(seed)
    ref, want = in_motion(rng, dt), np.zeros((3, JOINTS))
    want[POS] = rng.uniform(TABLE[LOWER] + 0.1, TABLE[UPPER] - 0.1)
    best = max(optimal(ref[:, i], i, float(want[POS, i])) for i in range(JOINTS))
    path, away = [ref.copy()], 0
    for k in range(round((1.5 * best + 0.3) / dt)):
        follow(ref, want, dt, GAINS, TABLE)
        path.append(ref.copy())
        if np.abs(ref[POS] - want[POS]).max() > 1e-3:
            away = k + 1
    check_limits(np.array(path), dt)
    assert away * dt <= 1.33 * best + 0.03


@given(st.integers(0, 2**32 - 1), st.sampled_from([2.5e-4, 1e-3, 4e-3, 1e-2]))
@settings(max_examples=40, deadline=None)
def test_a_limit_that_is_lowered_in_motion_slows_the_arm_down_within_its_other_limits(
    seed: int, dt: float
) -> None:
    """A person comes near: the velocity limit falls below the velocity."""
    rng = np.random.default_rng(seed)
    ref, want = in_motion(rng, dt), np.zeros((3, JOINTS))
    live = TABLE.copy()
    path = [ref.copy()]
    for _ in range(8):
        live[VELOCITY] = TABLE[VELOCITY] * rng.choice([0.0, 0.01, 0.3, 1.0], JOINTS)
        want[POS] = rng.uniform(TABLE[LOWER], TABLE[UPPER])
        for _ in range(round(0.4 / dt)):
            follow(ref, want, dt, GAINS, live)
            path.append(ref.copy())
        assert (np.abs(ref[VEL]) <= live[VELOCITY] + 0.02).all()
    check_limits(np.array(path), dt)


@pytest.mark.parametrize("goal", [0.001, 0.05, 0.7, 1.4])
def test_a_leap_is_travelled_without_overshoot(goal: float) -> None:
    ref, want = np.zeros((3, JOINTS)), np.zeros((3, JOINTS))
    want[POS] = goal
    path = [ref.copy()]
    flags = 0
    for _ in range(2500):
        flags |= follow(ref, want, DT, GAINS, TABLE)
        path.append(ref.copy())
    check_limits(np.array(path), DT)
    np.testing.assert_allclose(ref[POS], goal, atol=1e-6)
    assert np.array(path)[:, POS].max() <= goal * 1.01 + 1e-4
    assert goal < 0.1 or flags & Limit.JERK


def test_a_smooth_path_is_followed_closely() -> None:
    ref, want = np.zeros((3, JOINTS)), np.zeros((3, JOINTS))
    worst = 0.0
    w = 3.0
    for k in range(4000):
        t = k * DT
        want[:] = np.array([1 - math.cos(w * t), w * math.sin(w * t), w * w * math.cos(w * t)])[:, None] * 0.4
        follow(ref, want, DT, GAINS, TABLE)
        if t > 1.0:
            worst = max(worst, np.abs(ref[POS] - want[POS]).max())
    assert worst < 2e-3


@given(st.floats(-3, 3), st.floats(-25, 25), st.sampled_from([(25.0, 1000.0), (25.0, 200.0), (5.0, 1000.0)]))
@example(-0.5, 15.0, (25.0, 200.0))  # falls further than it rises again
@settings(max_examples=100, deadline=None)
def test_excursion_is_what_braking_takes(v: float, a: float, most: tuple[float, float]) -> None:
    most_a, most_j = most
    a = max(-most_a, min(a, most_a))
    predicted = excursion(v, a, most_a, most_j)
    # integrate the braking manoeuvre finely: full jerk down while that is needed, then release
    p = top = 0.0
    h = 2e-5
    for _ in range(round(3.0 / h)):
        if v <= 0 and a <= 0:
            break
        release = a < 0 and v <= a * a / (2 * most_j)
        target = 0.0 if release else -most_a
        step = max(-most_j * h, min(target - a, most_j * h))
        p += v * h + a * h * h / 2
        v += a * h + step * h / 2
        a += step
        top = max(top, p)
    assert predicted == pytest.approx(top, abs=2e-3, rel=2e-3)


@given(st.floats(-10, 10), st.floats(0.1, 100), st.floats(0.1, 1000))
@settings(deadline=None)
def test_approach_is_odd_and_monotone_and_never_faster_than_linear(
    e: float, gain: float, limit: float
) -> None:
    rate = approach(e, gain, limit)
    assert rate == pytest.approx(-approach(-e, gain, limit))
    assert abs(rate) <= gain * abs(e) * (1 + 1e-9)
    assert approach(e + 0.1, gain, limit) >= rate
    assert rate * rate <= 2 * limit * abs(e) * (1 + 1e-9)


# ── the path ──────────────────────────────────────────────────────────────────────────────────────────


def along(q: FloatArray, splice: FloatArray, splice_ns: int, first: int, times: range) -> FloatArray:
    """Samples [times, 3, n] of a path that starts at time 0 with steps of 100 ms."""
    want = np.zeros((3, q.shape[1]))
    out = []
    for t in times:
        sample(t, q, 0, STEP, len(q), splice, splice_ns, first, want)
        out.append(want.copy())
    return np.array(out)


@given(st.integers(0, 2**32 - 1), st.integers(0, 250 * MS))
@settings(max_examples=50, deadline=None)
def test_the_path_is_smooth_from_the_splice_through_every_waypoint(seed: int, splice_ns: int) -> None:
    rng = np.random.default_rng(seed)
    q = np.cumsum(rng.normal(scale=0.2, size=(8, JOINTS)), axis=0)
    splice = rng.normal(scale=0.3, size=(2, JOINTS))
    first = first_step(splice_ns, 0, STEP, len(q))
    path = along(q, splice, splice_ns, first, range(splice_ns, 8 * STEP + 20 * MS, MS))
    np.testing.assert_allclose(path[0, :2], splice, atol=1e-12)
    for k in range(first, 8):
        want = np.zeros((3, JOINTS))
        sample((k + 1) * STEP, q, 0, STEP, 8, splice, splice_ns, first, want)
        np.testing.assert_allclose(want[POS], q[k], atol=1e-9)
    # C1: over a millisecond position and velocity change by their derivative and no more (the end apart,
    # where the path rests and the reference slows down by itself)
    inside = path[: (8 * STEP - splice_ns) // MS]
    most_v, most_a = (
        1.05 * np.abs(inside[:, r]).max() for r in (VEL, ACC)
    )  # 1.05: extremes lie between ticks
    assert (np.abs(np.diff(inside[:, POS], axis=0)) <= most_v * DT).all()
    assert (np.abs(np.diff(inside[:, VEL], axis=0)) <= most_a * DT).all()
    mean_v = (inside[1:, VEL] + inside[:-1, VEL]) / 2
    np.testing.assert_allclose(np.diff(inside[:, POS], axis=0) / DT, mean_v, atol=most_a * 1e-3)


def test_the_path_stays_between_neighbouring_waypoints() -> None:
    q = np.array([[0.1], [0.5], [0.5], [-0.3], [-0.2], [0.9]])
    path = along(q, np.zeros((2, 1)), 0, 0, range(0, 6 * STEP, MS))
    for k, (a, b) in enumerate(pairwise(np.vstack([[0.0], q])[:, 0])):
        part = path[k * 100 : (k + 1) * 100, POS, 0]
        assert part.min() >= min(a, b) - 1e-12
        assert part.max() <= max(a, b) + 1e-12


def test_slopes_agree_with_scipys_pchip() -> None:
    rng = np.random.default_rng(3)
    t = np.cumsum(rng.uniform(0.05, 0.3, 9))
    y = np.cumsum(rng.normal(size=9))
    slopes = PchipInterpolator(t, y).derivative()(t)
    h, d = np.diff(t), np.diff(y) / np.diff(t)
    mine = [tangent(d[k - 1], d[k], h[k - 1], h[k]) for k in range(1, 8)]
    np.testing.assert_allclose(mine, slopes[1:-1], atol=1e-12)


def test_after_its_last_waypoint_the_path_rests() -> None:
    q = np.array([[0.1, 0.2]])
    path = along(q, np.zeros((2, 2)), 0, 0, range(STEP, 3 * STEP, 50 * MS))
    np.testing.assert_array_equal(path[:, POS], np.broadcast_to(q, (4, 2)))
    assert not path[:, VEL:].any()


def test_a_waypoint_that_is_nearly_due_is_passed_over_instead_of_rushed_to() -> None:
    assert first_step(0, 0, STEP, 8) == 0
    assert first_step(50 * MS, 0, STEP, 8) == 0
    assert first_step(50 * MS + 1, 0, STEP, 8) == 1
    assert first_step(-10 * STEP, 0, STEP, 8) == 0
    assert first_step(8 * STEP, 0, STEP, 8) == 8
    assert first_step(99 * STEP, 0, STEP, 8) == 8


# ── the torque ────────────────────────────────────────────────────────────────────────────────────────


def test_computed_torque_gives_the_error_the_dynamics_that_it_promises() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    mass = root @ root.T + np.eye(4)
    q, dq, bias = rng.normal(size=(3, 4))
    ref = rng.normal(size=(3, 4))
    gains = tracking.gains(omega=30.0, zeta=0.7)
    tau = np.zeros(4)
    control(q, dq, ref, bias, mass, gains, tau)
    ddq = np.linalg.solve(mass, tau - bias)
    error = ref[ACC] - ddq + 2 * 0.7 * 30.0 * (ref[VEL] - dq) + 30.0**2 * (ref[POS] - q)
    np.testing.assert_allclose(error, 0.0, atol=1e-9)


def test_a_robot_without_known_inertia_is_held_by_pd_and_its_bias() -> None:
    q, dq, bias = np.array([0.1, 0.2]), np.array([0.3, -0.1]), np.array([5.0, -1.0])
    ref = np.array([[0.2, 0.2], [0.0, 0.0], [9.0, 9.0]])
    tau = np.zeros(2)
    control(q, dq, ref, bias, np.zeros((2, 2)), tracking.gains(pd_p=100.0, pd_d=10.0), tau)
    np.testing.assert_allclose(tau, [5.0 + 10.0 - 3.0, -1.0 + 1.0])


def test_closed_loop_error_decays() -> None:
    q, dq, tau = np.full(JOINTS, 0.1), np.zeros(JOINTS), np.zeros(JOINTS)
    for _ in range(400):
        control(q, dq, np.zeros((3, JOINTS)), np.zeros(JOINTS), np.eye(JOINTS) * INERTIA, GAINS, tau)
        dq += tau / INERTIA * DT
        q += dq * DT
    assert np.abs(q).max() < 1e-4
