"""System 1's control law: from waypoints to a reference that the arm can follow, and from it to torques.

Three pure, compiled parts, each working on arrays that the caller allocated once:

* ``sample``: the path through a chunk's waypoints, C1-continuous, starting from the reference that was really
  executed up to the splice;
* ``follow`` / ``coast``: the reference (q, dq, ddq), one tick further, never beyond the limits on position,
  velocity, acceleration and jerk, whatever the path asks for;
* ``control``: computed torque, or PD with bias compensation where the robot knows no inertia.

Units: rad, s, N·m. ``table`` is ``SafetyLimits.table()`` ``[6, n]``.
"""

from __future__ import annotations

from math import floor, sqrt

import numpy as np
import numpy.typing as npt

from flywheel.edge.compiled import compiled
from flywheel.edge.safety import ACCELERATION, JERK, LOWER, UPPER, VELOCITY
from flywheel.schema import Limit

FloatArray = npt.NDArray[np.float64]

# Rows of a reference or of a wanted state [3, n].
POS, VEL, ACC = range(3)
# Entries of the gains [7].
K_POS, K_VEL, OMEGA, ZETA, PD_P, PD_D, GAINS = range(7)

_POSITION, _VELOCITY = int(Limit.POSITION), int(Limit.VELOCITY)
_ACCELERATION, _JERK = int(Limit.ACCELERATION), int(Limit.JERK)
# The velocity guard is exact in ticks, but for rounding. The position guard reckons as if braking could begin
# between ticks; a bang-bang search at 0.25, 1, 4 and 10 ms found none that the margin does not cover.
_ROUNDING = 1e-9
_POSITION_MARGIN = 1e-3
REST_VELOCITY = 1e-4  # rad/s: slower than this the reference is set to rest


def gains(
    k_pos: float = 20.0,
    k_vel: float = 80.0,
    omega: float = 60.0,
    zeta: float = 1.0,
    pd_p: float = 400.0,
    pd_d: float = 20.0,
) -> FloatArray:
    """The gains of the loops.

    ``k_pos``, ``k_vel`` (1/s): how the reference closes on the path; k_vel = 4 k_pos is critically damped.
    ``omega`` (rad/s), ``zeta``: the closed loop where inertia is known. ``pd_p`` (N·m/rad), ``pd_d``
    (N·m·s/rad): the loop where it is not.
    """
    return np.array([k_pos, k_vel, omega, zeta, pd_p, pd_d])


# ── the path ──────────────────────────────────────────────────────────────────────────────────────────


@compiled
def tangent(d0: float, d1: float, h0: float, h1: float) -> float:
    """Slope at a waypoint between secants d0 (over h0) and d1 (over h1): no overshoot between waypoints.

    Weighted harmonic mean, zero at a turning point (Fritsch and Butland 1984, as in PCHIP).
    """
    if d0 * d1 <= 0.0:
        return 0.0
    w0 = 2.0 * h1 + h0
    w1 = h1 + 2.0 * h0
    return (w0 + w1) / (w0 / d0 + w1 / d1)


@compiled
def first_step(t_ns: int, start_ns: int, step_ns: int, steps: int) -> int:
    """The first waypoint to aim for from ``t_ns``; one less than half a step away is passed over.

    Waypoint k is due at ``start_ns + (k + 1) step_ns``. Returns ``steps`` if all of them are over.
    """
    k = (t_ns + step_ns // 2 - start_ns + step_ns - 1) // step_ns - 1
    return min(max(k, 0), steps)


@compiled
def sample(
    t_ns: int,
    q: FloatArray,
    start_ns: int,
    step_ns: int,
    steps: int,
    splice: FloatArray,
    splice_ns: int,
    first: int,
    want: FloatArray,
) -> int:
    """Where the path is at ``t_ns``: fills ``want`` [3, n] and returns the step k under way.

    ``q`` [≥ steps, n] waypoints, due at ``start_ns + (k + 1) step_ns``; ``splice`` [≥ 2, n] position and
    velocity at ``splice_ns``, from which the path leads to waypoint ``first``. Cubic Hermite segments, so
    position and velocity are continuous. After the last waypoint the path rests there.
    """
    k = max((t_ns - start_ns) // step_ns, first)
    if k >= steps:
        for i in range(want.shape[1]):
            want[POS, i] = q[steps - 1, i]
            want[VEL, i] = 0.0
            want[ACC, i] = 0.0
        return steps - 1
    step = step_ns * 1e-9
    end_ns = start_ns + (k + 1) * step_ns
    begin_ns = splice_ns if k == first else end_ns - step_ns
    h = (end_ns - begin_ns) * 1e-9
    u = min(max((t_ns - begin_ns) * 1e-9 / h, 0.0), 1.0)
    for i in range(want.shape[1]):
        if k == first:
            p0 = splice[POS, i]
            m0 = splice[VEL, i]
        else:
            p0 = q[k - 1, i]
            if k - 1 == first:
                h_prev = (begin_ns - splice_ns) * 1e-9
                d_prev = (p0 - splice[POS, i]) / h_prev
            else:
                h_prev = step
                d_prev = (p0 - q[k - 2, i]) / step
            m0 = tangent(d_prev, (q[k, i] - p0) / step, h_prev, step)
        p1 = q[k, i]
        d = (p1 - p0) / h
        m1 = tangent(d, (q[k + 1, i] - p1) / step, h, step) if k + 1 < steps else d
        # p(u) = p0 + h u (m0 + u (c2 + u c3)), u in [0, 1]
        c2 = 3.0 * d - 2.0 * m0 - m1
        c3 = m0 + m1 - 2.0 * d
        want[POS, i] = p0 + h * u * (m0 + u * (c2 + u * c3))
        want[VEL, i] = m0 + u * (2.0 * c2 + u * 3.0 * c3)
        want[ACC, i] = (2.0 * c2 + 6.0 * c3 * u) / h
    return k


# ── the reference ─────────────────────────────────────────────────────────────────────────────────────


@compiled
def approach(error: float, gain: float, limit: float) -> float:
    """Rate at which to close ``error``: ``gain · error`` near zero, and far away no faster than a
    deceleration of ``limit`` can still stop (the square-root law, joined smoothly)."""
    knee = limit / (gain * gain)
    if error > knee:
        return sqrt(2.0 * limit * (error - 0.5 * knee))
    if error < -knee:
        return -sqrt(2.0 * limit * (-error - 0.5 * knee))
    return gain * error


@compiled
def excursion(v: float, a: float, most_a: float, most_j: float) -> float:
    """How far the position still rises before it can stop, braking at once under both limits.

    From rest of acceleration, stopping from v takes v √(v/J) (or v/2 (v/A + A/J) where A is reached). A
    state with a ≠ 0 lies on such a manoeuvre, begun a/J later or earlier: Δv = a|a|/2J, Δp = va/J + a³/3J².
    """
    if a < 0.0:
        if v <= 0.0:
            return 0.0
        if v < a * a / (2.0 * most_j):  # already braking more than needed: release at once
            t = (-a - sqrt(a * a - 2.0 * most_j * v)) / most_j
            return t * (v + t * (0.5 * a + t * most_j / 6.0))
        top = v + a * a / (2.0 * most_j)
    else:
        top = v + a * a / (2.0 * most_j)
        if top <= 0.0:
            return 0.0
    rest = v * a / most_j + a * a * a / (3.0 * most_j * most_j)
    if top * most_j <= most_a * most_a:
        rise = rest + top * sqrt(top / most_j)
    else:
        rise = rest + 0.5 * top * (top / most_a + most_a / most_j)
    return max(rise, 0.0)  # falling, and turning round below where it is now


@compiled
def highest_acceleration(v: float, a: float, most_v: float, most_j: float, dt: float) -> float:
    """Greatest a' for this tick from which the velocity can still be held at ``most_v``.

    After the tick v' = v + (a + a') dt/2; taking a' back to zero adds a'²/2J; the sum may reach ``most_v``.
    """
    room = most_v - v - 0.5 * a * dt
    if room < 0.0:
        return 2.0 * room / dt
    half = 0.5 * most_j * dt
    return sqrt(half * half + 2.0 * most_j * room) - half


@compiled
def stoppable(
    p: float,
    v: float,
    a: float,
    new: float,
    dt: float,
    lower: float,
    upper: float,
    most_a: float,
    most_j: float,
) -> bool:
    """Whether the joint can still stop in range after a tick with acceleration from ``a`` to ``new``."""
    v1 = v + 0.5 * (a + new) * dt
    p1 = p + v * dt + (2.0 * a + new) * dt * dt / 6.0
    return (
        p1 + excursion(v1, new, most_a, most_j) <= upper
        and p1 - excursion(-v1, -new, most_a, most_j) >= lower
    )


@compiled
def advance(ref: FloatArray, i: int, wanted: float, dt: float, table: FloatArray) -> int:
    """Move joint ``i`` of the reference one tick, as close to acceleration ``wanted`` as the limits allow.

    Invariant: from the new state the joint can stop within its position range and never exceeds its
    velocity, using no more than its acceleration and jerk. Returns the limits that acted.
    """
    p = ref[POS, i]
    v = ref[VEL, i]
    a = ref[ACC, i]
    most_v = table[VELOCITY, i] * (1.0 - _ROUNDING)
    most_a = table[ACCELERATION, i]
    most_j = table[JERK, i]
    flags = 0
    new = wanted
    if np.isnan(new):
        new = -v / dt  # nothing sensible was asked for: come to rest
    if abs(new) > most_a:
        new = most_a if new > 0.0 else -most_a
        flags |= _ACCELERATION
    slew = most_j * dt
    if new > a + slew:
        new = a + slew
        flags |= _JERK
    elif new < a - slew:
        new = a - slew
        flags |= _JERK

    # A reference that is faster than the limit (the limit was lowered) may slow down, but not speed up.
    high = highest_acceleration(v, a, max(most_v, v + 0.5 * a * max(a, 0.0) / most_j), most_j, dt)
    low = -highest_acceleration(-v, -a, max(most_v, -v + 0.5 * a * min(a, 0.0) / most_j), most_j, dt)
    if new > high:
        new = max(high, a - slew)
        flags |= _VELOCITY
    elif new < low:
        new = min(low, a + slew)
        flags |= _VELOCITY

    # A reference that starts out of range (the robot was found there) may come back, but not go further.
    upper = max(table[UPPER, i] - _POSITION_MARGIN, p)
    lower = min(table[LOWER, i] + _POSITION_MARGIN, p)
    if not stoppable(p, v, a, new, dt, lower, upper, most_a, most_j):
        flags |= _POSITION
        new = min(max(0.0, a - slew), a + slew)  # gently, if that is enough
        if not stoppable(p, v, a, new, dt, lower, upper, most_a, most_j):
            rising = v + 0.5 * a * dt > 0.0
            new = max(a - slew, -most_a) if rising else min(a + slew, most_a)

    ref[POS, i] = p + v * dt + (2.0 * a + new) * dt * dt / 6.0
    ref[VEL, i] = v + 0.5 * (a + new) * dt
    ref[ACC, i] = new
    return flags


@compiled
def follow(ref: FloatArray, want: FloatArray, dt: float, gain: FloatArray, table: FloatArray) -> int:
    """Move the reference ``[3, n]`` one tick towards the wanted state ``[3, n]``."""
    flags = 0
    for i in range(ref.shape[1]):
        most_v = table[VELOCITY, i]
        v = want[VEL, i] + approach(want[POS, i] - ref[POS, i], gain[K_POS], 0.5 * table[ACCELERATION, i])
        v = min(max(v, -most_v), most_v)
        a = want[ACC, i] + approach(v - ref[VEL, i], gain[K_VEL], 0.5 * table[JERK, i])
        flags |= advance(ref, i, a, dt, table)
    return flags


@compiled
def quickest(v: float, a: float, target: float, most_j: float, dt: float) -> float:
    """The acceleration of this tick that brings the velocity to ``target`` soonest, without passing it.

    From a', reduced by J dt a tick, k whole ticks and a shorter one, the velocity still gains
    dt (a' + (a' - J dt) + … + (a' - k J dt)) beyond v + a dt/2. Solved for a': exact in ticks, so that it
    ends at the target with a = 0, and time-optimal but for the tick itself.
    """
    error = target - v - 0.5 * a * dt
    slew = most_j * dt
    k = floor((sqrt(0.25 * slew * slew + 2.0 * most_j * abs(error)) - 0.5 * slew) / slew)
    size = abs(error) / ((k + 1.0) * dt) + 0.5 * slew * k
    return size if error > 0.0 else -size


@compiled
def coast(ref: FloatArray, velocity: FloatArray, dt: float, table: FloatArray) -> bool:
    """Move the reference one tick towards ``velocity`` ``[n]`` (zeros: a ramp to rest); true if all rest."""
    rest = True
    for i in range(ref.shape[1]):
        most_v = table[VELOCITY, i]
        slew = table[JERK, i] * dt
        target = min(max(velocity[i], -most_v), most_v)
        before = ref[ACC, i]
        advance(ref, i, quickest(ref[VEL, i], ref[ACC, i], target, table[JERK, i], dt), dt, table)
        if target == 0.0 and abs(ref[VEL, i]) <= REST_VELOCITY and max(abs(before), abs(ref[ACC, i])) <= slew:
            ref[VEL, i] = 0.0
            ref[ACC, i] = 0.0
        rest = rest and ref[VEL, i] == 0.0 and ref[ACC, i] == 0.0
    return rest


# ── the torque ────────────────────────────────────────────────────────────────────────────────────────


@compiled
def control(
    q: FloatArray,
    dq: FloatArray,
    ref: FloatArray,
    bias: FloatArray,
    mass: FloatArray,
    gain: FloatArray,
    tau: FloatArray,
) -> None:
    """Torques that hold the joints to the reference; fills ``tau`` [n], not yet limited.

    With inertia M known: τ = M (q̈_r + 2ζω (q̇_r − q̇) + ω² (q_r − q)) + bias, so that the error obeys
    ë + 2ζω ė + ω² e = 0 (computed torque; Siciliano et al., Robotics, 8.5.2). Without (M = 0): PD + bias.
    """
    n = q.size
    w = gain[OMEGA]
    if mass[0, 0] > 0.0:
        for i in range(n):
            tau[i] = bias[i]
        for k in range(n):
            error = w * w * (ref[POS, k] - q[k]) + 2.0 * gain[ZETA] * w * (ref[VEL, k] - dq[k])
            accel = ref[ACC, k] + error
            for i in range(n):
                tau[i] += mass[i, k] * accel
    else:
        for i in range(n):
            tau[i] = bias[i] + gain[PD_P] * (ref[POS, i] - q[i]) + gain[PD_D] * (ref[VEL, i] - dq[i])
