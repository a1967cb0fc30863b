"""The mode machine, over all states × events."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from flywheel.edge.mode import step
from flywheel.edge.safety import CATEGORY_0, CATEGORY_1, CATEGORY_2, NO_STOP
from flywheel.schema import Mode
from tests.robots import limits

MS = 1_000_000
TIMES = limits().times()
BOUNDS = {Mode.CARRY_ON: 100 * MS, Mode.RAMP: 400 * MS, Mode.HOLD: 1000 * MS, Mode.STOP_1: 500 * MS}
ELAPSED = sorted({0, 5000 * MS} | {b + d for b in BOUNDS.values() for d in (-1, 0, 1)})
NEEDED = {Mode.FOLLOW: 0, Mode.CARRY_ON: 0, Mode.RAMP: 2, Mode.HOLD: 2, Mode.FALLBACK: 3}
Inputs = tuple[int, bool, int, bool, int, bool]
EVERY: list[Inputs] = list(
    itertools.product(
        ELAPSED,
        (False, True),
        range(5),
        (False, True),
        (NO_STOP, CATEGORY_2, CATEGORY_1, CATEGORY_0),
        (False, True),
    )
)
RUNGS = [Mode.FOLLOW, Mode.CARRY_ON, Mode.RAMP, Mode.HOLD, Mode.FALLBACK]


def next_mode(mode: Mode, i: Inputs) -> Mode:
    return Mode(step(int(mode), *i, TIMES))


@pytest.mark.parametrize("mode", list(Mode))
def test_compiled_and_plain_machine_agree_everywhere(mode: Mode) -> None:
    plain: Any = step
    for i in EVERY:
        assert next_mode(mode, i) == getattr(plain, "py_func", plain)(int(mode), *i, TIMES)


@pytest.mark.parametrize("mode", list(Mode))
def test_category_0_wins_over_everything(mode: Mode) -> None:
    assert {next_mode(mode, i) for i in EVERY if i[4] == CATEGORY_0} == {Mode.STOP_0}


@pytest.mark.parametrize("mode", RUNGS)
def test_category_1_is_taken_from_every_rung_at_once(mode: Mode) -> None:
    assert {next_mode(mode, i) for i in EVERY if i[4] == CATEGORY_1} == {Mode.STOP_1}


@pytest.mark.parametrize("mode", [Mode.STOP_0, Mode.STOP_1])
def test_a_stop_is_latched_until_a_person_resets_it_and_its_cause_is_gone(mode: Mode) -> None:
    for i in EVERY:
        _, _, _, at_rest, stop, reset = i
        free = reset and stop == NO_STOP and (mode == Mode.STOP_0 or at_rest)
        assert (next_mode(mode, i) < Mode.STOP_1) == free
        if free:
            assert next_mode(mode, i) == Mode.HOLD


def test_a_controlled_stop_that_overruns_its_bound_loses_power() -> None:
    for i in EVERY:
        elapsed, _, _, at_rest, stop, _ = i
        if stop != CATEGORY_0 and not at_rest:
            expected = Mode.STOP_0 if elapsed >= BOUNDS[Mode.STOP_1] else Mode.STOP_1
            assert next_mode(Mode.STOP_1, i) == expected


@pytest.mark.parametrize("mode", RUNGS)
def test_following_needs_a_fresh_chunk_enough_in_a_row_and_no_stop(mode: Mode) -> None:
    for i in EVERY:
        _, fresh, streak, _, stop, _ = i
        may = fresh and stop == NO_STOP and streak >= NEEDED[mode]
        assert (next_mode(mode, i) == Mode.FOLLOW) == may, (mode, i)


@pytest.mark.parametrize("mode", RUNGS)
def test_stale_chunks_lead_down_one_rung_at_a_time_and_never_up(mode: Mode) -> None:
    for i in EVERY:
        elapsed, fresh, _, at_rest, stop, _ = i
        if fresh or stop != NO_STOP:
            continue
        after = next_mode(mode, i)
        over = mode in BOUNDS and elapsed >= BOUNDS[mode]
        expected = {
            Mode.FOLLOW: Mode.CARRY_ON,
            Mode.CARRY_ON: Mode.RAMP if over else Mode.CARRY_ON,
            Mode.RAMP: Mode.HOLD if at_rest else Mode.STOP_1 if over else Mode.RAMP,
            Mode.HOLD: Mode.FALLBACK if over else Mode.HOLD,
            Mode.FALLBACK: Mode.FALLBACK,
        }[mode]
        assert after == expected


@pytest.mark.parametrize("mode", RUNGS)
def test_category_2_ramps_to_a_hold_and_keeps_it(mode: Mode) -> None:
    for i in EVERY:
        if i[4] == CATEGORY_2:
            after = next_mode(mode, i)
            if mode in (Mode.FOLLOW, Mode.CARRY_ON):
                assert after == Mode.RAMP
            else:
                assert after in (Mode.RAMP, Mode.HOLD, Mode.FALLBACK, Mode.STOP_1)
                assert after >= mode


def test_these_are_all_the_transitions_there_are() -> None:
    edges = {(m, n) for m in Mode for i in EVERY if (n := next_mode(m, i)) != m}
    down = {(a, b) for a, b in itertools.pairwise(RUNGS)}
    up = {(m, Mode.FOLLOW) for m in RUNGS[1:]}
    stops = {(m, s) for m in RUNGS for s in (Mode.STOP_1, Mode.STOP_0)}
    resets = {(Mode.STOP_1, Mode.HOLD), (Mode.STOP_0, Mode.HOLD), (Mode.STOP_1, Mode.STOP_0)}
    assert edges == down | up | stops | resets | {(Mode.FOLLOW, Mode.RAMP)}


@pytest.mark.parametrize("rests", [True, False])
def test_silence_ends_in_a_hold_or_a_stop_within_the_sum_of_the_bounds(rests: bool) -> None:
    mode, since, now = Mode.FOLLOW, 0, 0
    deadline = BOUNDS[Mode.CARRY_ON] + BOUNDS[Mode.RAMP] + BOUNDS[Mode.STOP_1] + 4 * MS
    while mode not in (Mode.HOLD, Mode.STOP_0):
        after = next_mode(mode, (now - since, False, 0, rests, NO_STOP, False))
        if after != mode:
            mode, since = after, now
        now += MS
        assert now <= deadline
    assert mode == (Mode.HOLD if rests else Mode.STOP_0)


def test_one_chunk_after_a_long_silence_does_not_start_the_arm() -> None:
    for mode in (Mode.RAMP, Mode.HOLD, Mode.FALLBACK):
        assert next_mode(mode, (0, True, 1, False, NO_STOP, False)) == mode
    assert np.all(TIMES[5:7] == (2, 3))
