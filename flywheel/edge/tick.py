"""The compiled part of System 1's tick: everything between ``Robot.read`` and ``Robot.write``.

It takes a newer chunk if there is one, checks the envelope, asks the mode machine, moves the reference,
computes torques and appends a row to the ring, over arrays that are allocated once and known by their
addresses (``addresses``). It allocates nothing, takes no lock, makes no system call but for the clock when it
runs in real time, and raises nothing.

Splicing. A chunk is anchored at its observation, but steps count as done only while System 1 really moved:
``start = now - executed`` with ``executed`` the time spent following since the observation. From standstill
nothing was executed, so nothing is skipped, however long inference took. The path starts at the reference
that was executed, so that a new chunk never makes it jump.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel.edge import tracking
from flywheel.edge.compiled import compiled, floats_at, words_at
from flywheel.edge.control_ring import (
    ROW_AGE,
    ROW_CHUNK,
    ROW_COMPUTE,
    ROW_HEADER,
    ROW_HELD,
    ROW_LATE,
    ROW_LIMITS,
    ROW_MODE,
    ROW_T,
    control_publish,
)
from flywheel.edge.link import load as load_word
from flywheel.edge.link import ring_claim, slot_read
from flywheel.edge.mode import CARRY_ON, FOLLOW, STOP_0, STOP_1
from flywheel.edge.mode import step as mode_step
from flywheel.edge.realtime import clock_ns
from flywheel.edge.rows import (
    CHUNK_COUNT,
    CHUNK_HEADER,
    CHUNK_ID,
    CHUNK_STEP,
    CHUNK_STEPS,
    CHUNK_T0,
    CHUNK_VALID_NS,
)
from flywheel.edge.safety import (
    CATEGORY_0,
    CATEGORY_2,
    MAX_AGE_NS,
    PROTECTIVE,
    VELOCITY,
    admit_waypoints,
    check_speed,
    check_state,
    check_tool,
    check_tracking,
    clamp_torque,
    speed_allowed,
    speed_scale,
    stop_category,
)
from flywheel.edge.tracking import ACC, POS, VEL
from flywheel.schema import Limit

FloatArray = npt.NDArray[np.float64]
Words = npt.NDArray[np.int64]

# Words that the supervisor writes and System 1 reads.
COMMAND, RESET, HEARTBEAT, CONTROL_WORDS = 0, 1, 2, 8
HEARTBEAT_LIMIT_NS = 2_000_000_000  # a supervisor silent for longer is gone: ramp to rest and hold

# The state between ticks: integers …
(
    MODE,
    _SINCE,
    _STREAK,
    SEEN,
    _HAVE,
    _START,
    _SPLICE,
    _FIRST,
    _MOVING_SINCE,
    _STARTED,
    _RESET_SEEN,
    LIMITS,
    ACCEPTED,
    REFUSED,
    _CLOCK,
) = range(15)
INTS = _CLOCK + 2
# … and rows of floats, one column a joint; [tool command] is kept in the last row.
REF, _WANT, _SPLICED, _CARRY, TAU, _TOOL, ROWS = 0, 3, 6, 8, 9, 10, 11

_NOT_FINITE, _TRACKING = int(Limit.NOT_FINITE), int(Limit.TRACKING_ERROR)
_PROTECTIVE = int(Limit.PROTECTIVE_STOP)
_CLOCK_SLACK_NS = 5_000_000  # a chunk may seem this much younger than the tick that reads it
_STEP_NS_MIN, _STEP_NS_MAX = 1_000_000, 10_000_000_000


@compiled
def _waypoints(chunk: Words, joints: int) -> tuple[FloatArray, FloatArray]:
    """Views of a chunk record: q [CHUNK_STEPS, joints], tool [CHUNK_STEPS]."""
    floats = chunk[CHUNK_HEADER:].view(np.float64)
    cut = CHUNK_STEPS * joints
    return floats[:cut].reshape((CHUNK_STEPS, joints)), floats[cut : cut + CHUNK_STEPS]


@compiled
def _admit(chunk: Words, now: int, table: FloatArray) -> int:
    """Look over a chunk: limits that acted, negative if it is refused (see ``admit_waypoints``)."""
    steps = chunk[CHUNK_COUNT]
    if steps < 1 or steps > CHUNK_STEPS or chunk[CHUNK_T0] > now + _CLOCK_SLACK_NS:
        return -_NOT_FINITE
    if not _STEP_NS_MIN <= chunk[CHUNK_STEP] <= _STEP_NS_MAX:
        return -_NOT_FINITE
    q, tool = _waypoints(chunk, table.shape[1])
    return admit_waypoints(q, tool, steps, table)


@compiled
def _take(now: int, slot: Words, chunks: Words, ints: Words, table: FloatArray) -> tuple[bool, int]:
    """Take a newer chunk from the slot; returns whether there is a good one and the limits that acted."""
    seen = slot_read(slot, chunks[1], ints[SEEN])
    if seen in (ints[SEEN], -1):
        return False, 0
    ints[SEEN] = seen
    acted = _admit(chunks[1], now, table)
    if acted < 0:
        ints[REFUSED] += 1
        ints[_STREAK] = 0
        return False, -acted
    for i in range(chunks.shape[1]):  # not chunks[0] = chunks[1]: that costs 5 s more to compile
        chunks[0, i] = chunks[1, i]
    ints[_HAVE] = 1
    ints[_START] = chunks[0, CHUNK_T0]
    ints[ACCEPTED] += 1
    ints[_STREAK] += 1
    return True, acted


@compiled
def _fresh(now: int, chunk: Words, ints: Words, times: Words) -> bool:
    """Whether the newest good chunk can be followed now: young enough, and not used up."""
    if ints[_HAVE] == 0:
        return False
    if now - chunk[CHUNK_T0] > min(chunk[CHUNK_VALID_NS], times[MAX_AGE_NS]):
        return False
    return bool(now < ints[_START] + chunk[CHUNK_COUNT] * chunk[CHUNK_STEP])


@compiled
def _splice(now: int, was: int, chunk: Words, ints: Words, work: FloatArray) -> None:
    """Join the newest chunk to the reference executed so far."""
    if was in (FOLLOW, CARRY_ON):
        ints[_START] = max(chunk[CHUNK_T0], ints[_MOVING_SINCE])
    else:
        ints[_START] = now
        ints[_MOVING_SINCE] = now
    ints[_SPLICE] = now
    ints[_FIRST] = tracking.first_step(now, ints[_START], chunk[CHUNK_STEP], chunk[CHUNK_COUNT])
    for i in range(work.shape[1]):
        work[_SPLICED + POS, i] = work[REF + POS, i]
        work[_SPLICED + VEL, i] = work[REF + VEL, i]


@compiled
def _anchor(work: FloatArray, q: FloatArray, dq: FloatArray, table: FloatArray) -> None:
    """Put the reference where the arm really is, moving as it moves."""
    for i in range(q.size):
        most = table[VELOCITY, i]
        work[REF + POS, i] = q[i]
        work[REF + VEL, i] = min(max(dq[i], -most), most)
        work[REF + ACC, i] = 0.0


@compiled
def _rest(work: FloatArray, q: FloatArray) -> None:
    """Put the reference at ``q``, at rest."""
    for i in range(q.size):
        work[REF + POS, i] = q[i]
        work[REF + VEL, i] = 0.0
        work[REF + ACC, i] = 0.0


@compiled
def _at_rest(work: FloatArray) -> bool:
    """Whether the reference stands still."""
    moving = 0
    for i in range(work.shape[1]):
        if work[REF + VEL, i] != 0.0 or work[REF + ACC, i] != 0.0:
            moving += 1
    return moving == 0


@compiled
def _asked(now: int, flags: int, mode: int, control: Words, times: Words) -> int:
    """The most severe stop that anything asks for."""
    stop = stop_category(flags, times[PROTECTIVE])
    if mode == STOP_1 and flags & _TRACKING:
        stop = CATEGORY_0  # the controlled stop itself does not work
    beat = load_word(control, HEARTBEAT)
    if beat > 0 and now - beat > HEARTBEAT_LIMIT_NS:
        stop = max(stop, CATEGORY_2)
    return max(stop, min(max(load_word(control, COMMAND), 0), CATEGORY_0))


@compiled
def _move(
    now: int, mode: int, was: int, chunk: Words, ints: Words, work: FloatArray, dt: float,
    gain: FloatArray, table: FloatArray,
) -> int:  # fmt: skip
    """Move the reference one tick; returns the limits that acted."""
    ref = work[REF : REF + 3]
    if mode == FOLLOW:
        q, tool = _waypoints(chunk, work.shape[1])
        want = work[_WANT : _WANT + 3]
        k = tracking.sample(
            now, q, ints[_START], chunk[CHUNK_STEP], chunk[CHUNK_COUNT],
            work[_SPLICED : _SPLICED + 2], ints[_SPLICE], ints[_FIRST], want,
        )  # fmt: skip
        work[_TOOL, 0] = tool[k]
        return tracking.follow(ref, want, dt, gain, table)
    for i in range(work.shape[1]):
        if mode != CARRY_ON:
            work[_CARRY, i] = 0.0
        elif was != CARRY_ON:
            work[_CARRY, i] = work[REF + VEL, i]
    tracking.coast(ref, work[_CARRY], dt, table)
    return 0


@compiled
def _append(
    now: int, late: int, compute: int, held: float, q: FloatArray, dq: FloatArray, chunk: Words, ints: Words,
    work: FloatArray, header: Words, rows: Words, changes_header: Words, changes: Words,
) -> None:  # fmt: skip
    """Append the control row of this tick."""
    row = rows[ring_claim(header, rows.shape[0])]
    row[ROW_T] = now
    row[ROW_LATE] = late
    row[ROW_COMPUTE] = compute
    row[ROW_CHUNK] = chunk[CHUNK_ID] if ints[_HAVE] else -1
    row[ROW_AGE] = now - chunk[CHUNK_T0] if ints[_HAVE] else -1
    row[ROW_MODE] = ints[MODE]
    row[ROW_LIMITS] = ints[LIMITS]
    row[ROW_HELD] = 1 if held > 0.5 else 0
    n = q.size
    floats = row[ROW_HEADER:].view(np.float32)
    for i in range(n):
        floats[i] = q[i]
        floats[n + i] = dq[i]
        floats[2 * n + i] = work[REF + POS, i]
        floats[3 * n + i] = work[TAU, i]
    floats[4 * n] = work[_TOOL, 0]
    control_publish(header, rows, changes_header, changes)


@compiled
def _tick(
    now: int, late: int, held: float, human: float, stop_input: bool, wall: bool, torque: bool, dt: float,
    q: FloatArray, dq: FloatArray, bias: FloatArray, mass: FloatArray, tool: FloatArray,
    slot: Words, chunks: Words, ints: Words, work: FloatArray, control: Words, header: Words, rows: Words,
    changes_header: Words, changes: Words, live: FloatArray, table: FloatArray, scalars: FloatArray,
    times: Words, gain: FloatArray,
) -> tuple[bool, float]:  # fmt: skip
    """Everything between reading the joints and writing the command; returns (powered, tool command).

    ``live`` is ``table`` with the velocities that apply now; ``torque``: the robot takes torques.
    """
    broken = check_state(q, dq, bias, mass, table, scalars) | check_tool(tool, scalars)
    broken |= check_speed(tool, human, scalars)
    scale = speed_scale(speed_allowed(human, scalars), scalars)
    for i in range(q.size):
        live[VELOCITY, i] = scale * table[VELOCITY, i]
    sound = broken & _NOT_FINITE == 0
    if sound and ints[_STARTED] == 0:
        ints[_STARTED] = 1
        ints[_SINCE] = now
        _rest(work, q)
    was = ints[MODE]
    powered = was != STOP_0 and not (was == STOP_1 and _at_rest(work))
    if sound and powered:
        broken |= check_tracking(q, work[REF + POS], scalars)
    if stop_input:
        broken |= _PROTECTIVE

    new, acted = _take(now, slot, chunks, ints, table)
    fresh = _fresh(now, chunks[0], ints, times)
    if not fresh:
        ints[_STREAK] = 0
    resets = load_word(control, RESET)
    mode = mode_step(
        was, now - ints[_SINCE], fresh, ints[_STREAK], _at_rest(work),
        _asked(now, broken, was, control, times), resets != ints[_RESET_SEEN], times,
    )  # fmt: skip
    ints[_RESET_SEEN] = resets
    if mode != was:
        ints[_SINCE] = now
        ints[MODE] = mode
    if mode == FOLLOW and (new or was != FOLLOW):
        _splice(now, was, chunks[0], ints, work)
    if mode == STOP_1 and was != STOP_1 and broken & _TRACKING:
        _anchor(work, q, dq, table)  # what stands in the way is not pushed any further
    if mode != STOP_0:
        acted |= _move(now, mode, was, chunks[0], ints, work, dt, gain, live)

    powered = mode != STOP_0 and not (mode == STOP_1 and _at_rest(work))
    tau = work[TAU]
    if powered and torque:
        tracking.control(q, dq, work[REF : REF + 3], bias, mass, gain, tau)
        acted |= clamp_torque(tau, table)
    elif not powered:
        tau[:] = 0.0
        _rest(work, q if sound else work[REF + POS])  # a reset starts from where the arm is
    ints[LIMITS] = broken | acted
    compute = clock_ns(ints[_CLOCK : _CLOCK + 2]) - now if wall else 0
    _append(now, late, compute, held, q, dq, chunks[0], ints, work, header, rows, changes_header, changes)
    return powered, work[_TOOL, 0]


@compiled
def _words(listed: Words, k: int) -> Words:
    """Array ``k`` of a list by ``addresses``."""
    return words_at(listed[k, 0], listed[k, 1], listed[k, 2])


@compiled
def _floats(listed: Words, k: int) -> FloatArray:
    """Array ``k`` of a list by ``addresses``."""
    return floats_at(listed[k, 0], listed[k, 1], listed[k, 2])


@compiled
def tick_at(
    at: int, now: int, late: int, held: float, human: float, stop_input: bool, wall: bool, torque: bool,
    dt: float,
) -> tuple[bool, float]:  # fmt: skip
    """``_tick`` on the arrays whose addresses and shapes are listed at ``at`` (``addresses``)."""
    a = words_at(at, ARRAYS, 3)
    return _tick(
        now, late, held, human, stop_input, wall, torque, dt,
        _floats(a, 0)[0], _floats(a, 1)[0], _floats(a, 2)[0], _floats(a, 3), _floats(a, 4)[0],
        _words(a, 5)[0], _words(a, 6), _words(a, 7)[0], _floats(a, 8), _words(a, 9)[0], _words(a, 10)[0],
        _words(a, 11), _words(a, 12)[0], _words(a, 13), _floats(a, 14), _floats(a, 15), _floats(a, 16)[0],
        _words(a, 17)[0], _floats(a, 18)[0],
    )  # fmt: skip


ARRAYS = 19
_CHUNKS, _INTEGERS, _WORK = 6, 7, 8  # of them, those that a tick remembers by


@compiled
def copy_at(at: int, to: int) -> None:
    """Copy what a tick remembers from the arrays listed at ``at`` to those listed at ``to``."""
    a, b = words_at(at, ARRAYS, 3), words_at(to, ARRAYS, 3)
    for k in (_CHUNKS, _INTEGERS, _WORK):
        source, target = _words(a, k), _words(b, k)
        for row in range(source.shape[0]):
            for i in range(source.shape[1]):
                target[row, i] = source[row, i]


def addresses(arrays: tuple[npt.NDArray[Any], ...]) -> Words:
    """Address, rows and columns of each; a vector counts as one row."""
    listed = np.zeros((len(arrays), 3), np.int64)
    for row, a in zip(listed, arrays, strict=True):
        if not a.flags.c_contiguous or a.dtype not in (np.int64, np.float64):
            raise ValueError(f"array of {a.dtype}{a.shape}: compiled code needs contiguous 64-bit values")
        row[:] = a.ctypes.data, *np.atleast_2d(a).shape
    return listed
