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
@given(st.integers(0, 10_000), st.integers(2, 80), st.data())
def test_joints_are_held_against_the_way_that_their_velocities_say(
    seed: int, rows: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(rows, 3)).astype(np.float32)
    length = data.draw(st.integers(1, rows - 1))
    begin = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1 - length), min_size=1))), np.int64)
    went = rng.normal(size=(len(begin), 3))
    sums, worst, window, joint = columns.drifts(q, went, begin, length)
    moved = q[begin + length].astype(float) - q[begin]
    assert np.allclose(sums, [(went**2).sum(0), (moved**2).sum(0), (went * moved).sum(0)])
    assert worst == np.abs(moved - went).max() == np.abs(moved - went)[window, joint]


@EACH
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_chunk_that_slips_while_it_is_in_force_is_found_where_it_does(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    chunk = rng.integers(-1, 3, rows).cumsum() // 4
    anchor = chunk * 100 + rng.choice([0, 0, 0, 0, 5, 20], rows)
    told = [
        i
        for i in range(1, rows)
        if chunk[i] == chunk[i - 1] >= 0 and abs(int(anchor[i]) - int(anchor[i - 1])) > 10
    ]
    assert columns.slip(anchor, chunk, 10.0) == (told[0] if told else -1)


def test_forged_anchors_whose_difference_overflows_slip_all_the_same() -> None:
    anchor = np.array([2**63 - 1, -(2**63)])
    assert columns.slip(anchor, np.array([0, 0]), 1e6) == 1


@EACH
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(1, 30))
def test_anchors_without_a_frame_are_counted_once_each(seed: int, rows: int, frames: int) -> None:
    rng = np.random.default_rng(seed)
    anchor = rng.integers(-50, 300, rows).repeat(rng.integers(1, 4, rows))
    followed = rng.random(len(anchor)) < 0.8
    frame = np.sort(rng.choice(300, frames, replace=False))
    different = set(anchor[followed].tolist())
    missing = sum(int(np.abs(frame - a).min()) > 7 for a in different)
    found = np.unique(columns.in_force(anchor, followed))
    assert set(found.tolist()) == different
    assert columns.without_frame(found, frame, 7.0) == missing


@EACH
@given(st.integers(0, 10_000), st.integers(2, 60), st.booleans())
def test_steps_are_explained_as_least_squares_would(seed: int, frames: int, same: bool) -> None:
    rng = np.random.default_rng(seed)
    pose, target = rng.normal(size=(2, frames, 3))
    if same:  # the commands say nothing: there is no step to explain by them
        target[:] = pose[:] = pose[0]
    mine, busy = rng.random(frames) < 0.9, rng.random(frames - 1) < 0.9
    rows, (asks, off), sums, way = columns.obedience(pose, target, mine, busy)
    flow = mine[:-1] & mine[1:] & busy
    assert rows.tolist() == (np.flatnonzero(flow[1:] & flow[:-1]) + 1).tolist()
    here = pose[rows]
    step, told, before = pose[rows + 1] - here, target[rows] - here, target[rows - 1] - here
    assert np.allclose(asks, np.linalg.norm(told, axis=1))
    assert np.allclose(sums, [(told**2).sum(0), (step**2).sum(0), (told * step).sum(0)])
    assert np.isclose(way, np.linalg.norm(step, axis=1).sum())
    a = np.stack([told.reshape(-1), before.reshape(-1)], axis=1)
    gain = np.linalg.lstsq(a, step.reshape(-1), rcond=None)[0] if len(rows) else np.zeros(2)
    rest = (step.reshape(-1) - a @ gain).reshape(step.shape)
    assert np.allclose(off, np.linalg.norm(rest, axis=1), atol=1e-6)


@EACH
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40))
def test_colours_are_shares_of_the_light_in_each_block(seed: int, h: int, w: int) -> None:
    pictures = np.random.default_rng(seed).integers(0, 256, (2, h, w, 3), dtype=np.uint8)
    found = columns.colour_shares(pictures, 2)
    inner = pictures[:, h // 4 : h - h // 4, w // 4 : w - w // 4].astype(float)
    if min(inner.shape[1:3]) < 2:
        assert ((found >= 0) & (found <= 1)).all()
        return
    down, across = inner.shape[1] // 2, inner.shape[2] // 2
    block = inner[:, :down, :across].mean(axis=(0, 1, 2))
    assert np.allclose(found[0, 0], block[:2] / max(block.sum(), 1.0))


@EACH
@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(3, 40))
def test_sharpness_is_the_laplacians_variance_over_the_pictures(seed: int, h: int, w: int) -> None:
    pictures = np.random.default_rng(seed).integers(0, 256, (3, h, w)).astype(np.float32)
    g = pictures.astype(np.float64)
    lap = g[:, :-2, 1:-1] + g[:, 2:, 1:-1] + g[:, 1:-1, :-2] + g[:, 1:-1, 2:] - 4 * g[:, 1:-1, 1:-1]
    expected = lap.var(axis=(1, 2)) / np.maximum(g.var(axis=(1, 2)), 1.0)
    rows = np.array([2, 0, 2])
    assert np.allclose(sharpness(pictures, rows), expected[rows], rtol=1e-3)


@EACH
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_light_and_contrast_are_those_of_the_grid(seed: int, h: int, w: int, down: int, across: int) -> None:
    pictures = np.random.default_rng(seed).integers(0, 256, (2, h, w)).astype(np.float32)
    mean, deviation = columns.light(pictures, down, across)
    some = pictures[:, ::down, ::across].astype(np.float64)
    assert np.allclose(mean, some.mean(axis=(1, 2)))
    assert np.allclose(deviation, some.std(axis=(1, 2)), atol=1e-4)


def test_picture_too_small_for_a_laplacian_is_not_read_beyond_its_edge() -> None:
    assert sharpness(np.full((2, 2, 50), 7, np.float32), np.arange(2)).tolist() == [0.0, 0.0]


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
