"""Spread and many tests at once: what a comparison of medians misses, and what chance alone would find."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from flywheel import stats

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def draws(seed: int, n: int = 100) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two policies over the same scenes: part of what happens is the scene's doing."""
    rng = np.random.default_rng(seed)
    scene = rng.standard_normal(n)
    return 0.6 * scene + 0.8 * rng.standard_normal(n), 0.6 * scene + 0.8 * rng.standard_normal(n)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_collapse_and_a_growth_of_spread_at_the_same_median_are_seen(factor: float) -> None:
    a, b = draws(1)
    b = np.median(a) + factor * (b - np.median(b))
    assert float(np.median(b)) == pytest.approx(float(np.median(a)))
    r = stats.paired_spread_ratio(a, b)
    assert r.low <= r.mean <= r.high
    assert r.low < factor < r.high
    assert not r.low < 1.0 < r.high
    location = stats.paired_ratio(np.exp(a), np.exp(b), 1e-9)
    assert location.low < 1.0 < location.high, "which the comparison of middles does not see"


def test_the_interval_of_a_ratio_of_spreads_covers_it_as_often_as_it_says() -> None:
    """400 seeded draws at 90 %, one-sided misses within three standard errors of 5 %."""
    above = below = 0
    for seed in range(400):
        a, b = draws(seed, 40)
        r = stats.paired_spread_ratio(a, 1.7 * b, 0.9)
        below += r.high < 1.7
        above += r.low > 1.7
    assert 7 <= below <= 33
    assert 7 <= above <= 33


def test_one_is_inside_the_interval_exactly_where_spearmans_test_says_so() -> None:
    for seed in range(20):
        a, b = draws(seed, 30)
        b = 1.4 * b
        x, y = a - np.median(a), b - np.median(b)
        p = float(scipy_stats.spearmanr((y + x).tolist(), (y - x).tolist()).pvalue)
        r = stats.paired_spread_ratio(a, b)
        assert (r.low < 1.0 < r.high) == (p > 0.05)


@given(st.integers(0, 50), st.floats(0.1, 10), st.floats(-5, 5))
def test_spread_follows_scale_and_ignores_place(seed: int, scale: float, shift: float) -> None:
    a, b = draws(seed, 25)
    r, s = stats.paired_spread_ratio(a, b), stats.paired_spread_ratio(a, scale * b + shift)
    assert s.mean == pytest.approx(scale * r.mean, rel=0.05)
    swapped = stats.paired_spread_ratio(b, a)
    assert swapped.mean == pytest.approx(1 / r.mean, rel=0.05)


def test_a_side_that_does_not_move_at_all_is_the_extreme_collapse() -> None:
    a, _ = draws(3)
    r = stats.paired_spread_ratio(a, np.zeros(100))
    assert r.high < 1e-4
    with pytest.raises(ValueError, match="no spread"):
        stats.paired_spread_ratio(np.zeros(100), a)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=50), st.floats(0.1, 9), st.floats(-50, 50))
def test_a_range_of_quantiles_follows_scale_and_ignores_place(
    values: list[float], scale: float, shift: float
) -> None:
    width = stats.quantile_range(values)
    assert width >= 0
    moved = stats.quantile_range([scale * v + shift for v in values])
    assert moved == pytest.approx(scale * width, abs=1e-9)


def test_one_stall_in_thirty_does_not_decide_the_spread_of_a_run() -> None:
    calm = np.linspace(4.0, 6.0, 30)
    stalled = np.concatenate([calm[:-1], [80.0]])
    assert stats.quantile_range(stalled) == pytest.approx(stats.quantile_range(calm))


# ── many tests ─────────────────────────────────────────────────────────────────────────────────────


def test_holm_reproduces_the_textbook_example() -> None:
    """Four p-values, two refused at 5 % (the worked example of the Holm-Bonferroni method)."""
    adjusted = stats.holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(probabilities)
def test_holm_lies_between_nothing_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = stats.holm(p)
    for raw, got in zip(p, adjusted, strict=True):
        assert raw <= got <= min(1.0, len(p) * raw) + 1e-12
    order = np.argsort(p, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


def test_holm_errs_anywhere_with_its_level_at_most() -> None:
    """2,000 seeded draws of five true nulls that depend on each other."""
    rng = np.random.default_rng(0)
    z = 0.7 * rng.standard_normal((2000, 1)) + math.sqrt(0.51) * rng.standard_normal((2000, 5))
    p = scipy_stats.norm.sf(z)
    assert np.mean([min(stats.holm(list(row))) <= 0.05 for row in p]) <= 0.05


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.holm([0.5, 1.5]),
        lambda: stats.holm([math.nan]),
        lambda: stats.quantile_range([1.0]),
        lambda: stats.quantile_range([1.0, 2.0], 1.0),
        lambda: stats.paired_spread_ratio([1.0] * 5, [1.0] * 5),
        lambda: stats.paired_ratio_p([1.0, 1.0], [1.0, 1.0], 1.0, 0.0),
    ],
)
def test_arguments_out_of_range_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="got"):
        call()


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), min_size=3, max_size=20))
def test_the_p_value_of_a_ratio_refuses_exactly_what_its_interval_leaves_out(
    pairs: list[tuple[float, float]],
) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    r = stats.paired_ratio(a, b, 0.01, 0.9)
    p = stats.paired_ratio_p(a, b, 0.01, 1.2)
    assert (r.low > 1.2) == (p < 0.05) or r.low == pytest.approx(1.2, rel=1e-6)
