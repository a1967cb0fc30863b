"""How the benchmarks count. What they measure is not tested: that would be a timed assertion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.edge.bench import HISTOGRAM_US, Taken, _histogram, _misses
from flywheel.edge.control_ring import control_dtype
from flywheel.edge.link import Records
from flywheel.robot.free import AMPLITUDE_RAD, JOINTS, FreeRobot, chunk, sine
from flywheel.schema import Mode

MS = 1_000_000


def rows(fates: list[str]) -> Records:
    """Ticks of a millisecond, some skipped, some late."""
    out = np.zeros(len(fates), control_dtype(JOINTS))
    out["mode"] = Mode.FOLLOW
    out["late_ns"] = [MS + 5 if f == "late" else 20_000 for f in fates]
    out["t_ns"] = np.arange(len(fates)) * MS + 10**12 + out["late_ns"]
    return out[[f != "skip" for f in fates]]


@given(st.lists(st.sampled_from(["on", "on", "skip", "late"]), max_size=40))
def test_misses_are_what_was_skipped_or_late_and_runs_of_them_are_found(fates: list[str]) -> None:
    fates = ["on", *fates, "on"]
    longest = run = 0
    for fate in fates:
        run = 0 if fate == "on" else run + 1
        longest = max(longest, run)
    missed = sum(f != "on" for f in fates)
    assert _misses(rows(fates), MS) == (missed, longest, len(fates))


def test_a_break_between_two_turns_is_no_miss_and_its_first_chunk_no_latency() -> None:
    """System 1 stands still while its peers have their turn."""
    a, b = rows(["on"] * 5), rows(["on", "on", "late", "on"])
    b["t_ns"] += 10**10
    a["chunk_id"], b["chunk_id"] = 1, [2, 2, 3, 3]
    taken = Taken(MS, [a, b], {1: 0, 2: 0, 3: int(b["t_ns"][2]) - 300_000})
    figures = taken.figures("idle")
    assert figures["idle_misses_ppm"] == pytest.approx(1e6 / 9)
    assert figures["idle_longest_miss_run"] == 1
    assert figures["idle_chunk_to_command_n"] == 1
    assert figures["idle_chunk_to_command_p50_us"] == pytest.approx(300.0)


def test_cyclictests_histogram_is_read_with_its_overflows() -> None:
    text = "# set to 0us\n000004 000010\n000017 000002\n# Total: 12\n# Histogram Overflows: 00003\n"
    counts = _histogram(text)
    assert (counts[4], counts[17], counts[HISTOGRAM_US], counts.sum()) == (10, 2, 3, 15)
    assert _histogram("").sum() == 0


def test_the_sine_has_no_step_where_its_clock_wraps() -> None:
    wrap = round(np.pi * 1e9)
    t = wrap * 7 + np.arange(-5, 5) * MS
    assert np.abs(np.diff(sine(t)[:, 0])).max() < 3e-3
    np.testing.assert_allclose(chunk(10**12, 3)[2], sine(np.array([10**12 + 300 * MS]))[0])
    assert sine(t).max() <= 2 * AMPLITUDE_RAD


def test_the_free_robot_moves_as_its_torques_say() -> None:
    robot = FreeRobot(250.0)
    for _ in range(250):
        robot.write(np.full(JOINTS, 0.2), 0.0)
    np.testing.assert_allclose(robot._dq, 1.0, rtol=1e-9)
    np.testing.assert_allclose(robot._q, 0.5, rtol=1e-9)
    robot.stop()
    assert not robot._dq.any()
