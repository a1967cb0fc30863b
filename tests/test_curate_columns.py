"""The compiled passes of curation against the same in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flywheel.curate import columns
from flywheel.curate.checks import median_beyond, runs
from flywheel.curate.pictures import averages, sharpness

ANYWHERE = np.empty(0, bool)
EACH = settings(max_examples=60, deadline=None)  # the first one compiles


def coarse(seed: int, rows: int, channels: int) -> NDArray[np.float32]:
    """Values that often stay for some rows."""
    rng = np.random.default_rng(seed)
    changes = rng.random((rows, channels)) < rng.uniform(0.05, 0.9)
    return np.where(changes, rng.integers(0, 3, (rows, channels)), 0).cumsum(axis=0).astype(np.float32) % 4


@EACH
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 4), st.integers(2, 9), st.booleans())
def test_no_run_of_one_value_is_missed_and_none_is_made_up(
    seed: int, rows: int, channels: int, shortest: int, some_free: bool
) -> None:
    values = coarse(seed, rows, channels)
    free = np.random.default_rng(seed).random(rows) < 0.9 if some_free else ANYWHERE
    still = values[1:] == values[:-1]
    if some_free:
        still &= free[1:, None]
    found = columns.runs_of_one_value(values, free, shortest)
    assert found.tolist() == runs(still, shortest).tolist()
    assert np.allclose(
        columns.spans(values, found), [np.ptp(values[a : b + 1, c]) for c, a, b in found.tolist()]
    )


@EACH
@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(1, 7))
def test_extremes_are_those_of_every_channel(seed: int, rows: int, channels: int) -> None:
    values = np.random.default_rng(seed).normal(scale=1e3, size=(rows, channels)).astype(np.float32)
    assert columns.ends(values).tolist() == [values.min(axis=0).tolist(), values.max(axis=0).tolist()]


@EACH
@given(st.integers(0, 10_000), st.integers(3, 120), st.data())
def test_velocities_are_integrated_over_each_window_and_no_further(
    seed: int, rows: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.integers(500_000, 3_000_000, rows))
    rates = rng.normal(size=(rows, 3)).astype(np.float32)
    length = data.draw(st.integers(1, rows - 1))
    begin = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1 - length), max_size=8))), np.int64)
    expected = [
        np.trapezoid(
            rates[b : b + length + 1].astype(float), (t[b : b + length + 1] - t[b]) / 1e9, axis=0
        ).tolist()
        for b in begin.tolist()
    ]
    for row in range(rows):  # what lies in no window may be anything
        if not any(b <= row <= b + length for b in begin.tolist()):
            rates[row] = 3e38
    assert np.allclose(columns.integrals(t, rates, begin, length), np.reshape(expected, (-1, 3)), atol=1e-9)


@EACH
@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(3, 40))
def test_sharpness_is_the_laplacians_variance_over_the_pictures(seed: int, h: int, w: int) -> None:
    pictures = np.random.default_rng(seed).integers(0, 256, (3, h, w)).astype(np.float32)
    g = pictures.astype(np.float64)
    lap = g[:, :-2, 1:-1] + g[:, 2:, 1:-1] + g[:, 1:-1, :-2] + g[:, 1:-1, 2:] - 4 * g[:, 1:-1, 1:-1]
    expected = lap.var(axis=(1, 2)) / np.maximum(g.var(axis=(1, 2)), 1.0)
    assert np.allclose(sharpness(pictures), expected, rtol=1e-3)


def test_picture_too_small_for_a_laplacian_is_not_read_beyond_its_edge() -> None:
    assert sharpness(np.full((2, 2, 50), 7, np.float32)).tolist() == [0.0, 0.0]


@EACH
@given(st.integers(1, 70), st.integers(1, 9))
def test_averages_weigh_every_pixel_alike_within_its_block(size: int, count: int) -> None:
    found = averages(size, count)
    assert np.allclose(found.sum(axis=1), 1.0)
    if size >= count:
        values = np.random.default_rng(size).random(size)
        assert np.allclose(found @ values, [b.mean() for b in np.array_split(values, count)])


@EACH
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(-5, 0), st.floats(0.1, 5))
def test_a_median_is_told_only_where_it_lies_outside(values: list[float], low: float, high: float) -> None:
    found: Any = median_beyond(np.array(values), low, high)
    median = float(np.median(values))
    assert found == (None if low < median < high else median)
