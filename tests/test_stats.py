"""Statistics against published values, and the properties that a gate leans on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from flywheel import stats

Table = tuple[int, int, int]  # gained, lost, pairs
counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tables = st.integers(1, 200).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda g: st.tuples(st.just(g), st.integers(0, n - g), st.just(n)))
)


# Newcombe, Stat. Med. 17 (1998) 857-872, Table I, methods 3 (score) and 5 (exact).
@pytest.mark.parametrize(
    ("k", "n", "score", "exact"),
    [
        (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
        (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
        (0, 20, (0.0, 0.1611), (0.0, 0.1684)),
        (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
    ],
)
def test_single_proportion_reproduces_newcombe_table_1(
    k: int, n: int, score: tuple[float, float], exact: tuple[float, float]
) -> None:
    w, c = stats.wilson(k, n), stats.clopper_pearson(k, n)
    assert (w.low, w.high) == pytest.approx(score, abs=5e-5)
    assert (c.low, c.high) == pytest.approx(exact, abs=5e-5)
    assert w.mean == c.mean == k / n
    assert w.n == c.n == n


@given(counts, st.floats(0.5, 0.999))
@settings(max_examples=40)  # the reference solves for the exact limits by bisection
def test_single_proportion_agrees_with_scipy(kn: tuple[int, int], confidence: float) -> None:
    k, n = kn
    reference = scipy_stats.binomtest(k, n)
    for got, want in (
        (stats.wilson(k, n, confidence), reference.proportion_ci(confidence, "wilson")),
        (stats.clopper_pearson(k, n, confidence), reference.proportion_ci(confidence, "exact")),
    ):
        assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)


@given(counts)
def test_intervals_hold_the_estimate_and_mirror_when_success_and_failure_swap(kn: tuple[int, int]) -> None:
    k, n = kn
    for f in (stats.wilson, stats.clopper_pearson):
        p, q = f(k, n), f(n - k, n)
        assert 0 <= p.low <= p.mean <= p.high <= 1
        assert (p.low, p.high) == pytest.approx((1 - q.high, 1 - q.low), abs=1e-9)


# Fagerland, Lydersen & Laake, Stat. Med. 33 (2014): Bentur et al. 2009 (1, 1, 7, 12) and Cavo et al. 2012
# (59, 6, 16, 80), a difference of first minus second; ours is second minus first.
@pytest.mark.parametrize(
    ("only_first", "only_second", "n", "low", "high", "digits"),
    [(1, 7, 21, -0.517, -0.026, 5e-4), (6, 16, 161, -0.1240, -0.0054, 5e-5)],
)
def test_paired_interval_reproduces_published_examples(
    only_first: int, only_second: int, n: int, low: float, high: float, digits: float
) -> None:
    got = stats.paired_interval(gained=only_first, lost=only_second, n=n)
    assert got == pytest.approx((low, high), abs=digits)
    assert stats.paired_interval(gained=only_second, lost=only_first, n=n) == pytest.approx(
        (-high, -low), abs=digits
    )


def test_mcnemar_reproduces_published_examples() -> None:
    assert stats.mcnemar(16, 6) == pytest.approx(0.052479, abs=5e-7)  # Cavo et al. 2012
    assert stats.mcnemar(0, 0) == 1.0
    assert stats.mcnemar(0, 5, "worse") == pytest.approx(0.5**5)
    assert stats.mcnemar(5, 0, "worse") == 1.0
    assert stats.mcnemar(5, 0, "better") == pytest.approx(0.5**5)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_agrees_with_the_binomial_test(gained: int, lost: int) -> None:
    assume(gained + lost)
    n = gained + lost
    assert stats.mcnemar(gained, lost) == pytest.approx(scipy_stats.binomtest(gained, n).pvalue, abs=1e-9)
    worse = scipy_stats.binomtest(lost, n, alternative="greater").pvalue
    assert stats.mcnemar(gained, lost, "worse") == pytest.approx(worse, abs=1e-9)


def test_without_a_discordant_pair_the_interval_has_its_closed_form() -> None:
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    for n in (1, 10, 100):
        low, high = stats.paired_interval(0, 0, n)
        assert (low, high) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-9)


@given(tables, st.floats(0.5, 0.999))
def test_paired_interval_holds_the_estimate_and_is_antisymmetric(table: Table, confidence: float) -> None:
    gained, lost, n = table
    low, high = stats.paired_interval(gained, lost, n, confidence)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    mirrored = stats.paired_interval(lost, gained, n, confidence)
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]), abs=1e-9)


@given(tables)
def test_one_more_lost_pair_never_looks_better(table: Table) -> None:
    gained, lost, n = table
    assume(gained + lost < n)
    assert stats.paired_interval(gained, lost + 1, n)[0] <= stats.paired_interval(gained, lost, n)[0] + 1e-12


@given(tables)
def test_more_confidence_never_narrows_an_interval(table: Table) -> None:
    narrow, wide = stats.paired_interval(*table, 0.9), stats.paired_interval(*table, 0.99)
    assert wide[0] <= narrow[0] + 1e-12
    assert wide[1] >= narrow[1] - 1e-12


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_difference_counts_pairs(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    d = stats.paired_difference(a, b)
    assert d.diff == pytest.approx(sum(b) / len(b) - sum(a) / len(a))
    assert d.gained - d.lost == sum(b) - sum(a)
    assert d.n == len(pairs)


def _table_probabilities(n: int, p_gained: float, p_lost: float) -> npt.NDArray[np.float64]:
    """P[gained, lost], exact trinomial."""
    g, lo = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    rest = n - g - lo
    return np.where(
        rest >= 0,
        scipy_stats.multinomial.pmf(
            np.stack([g, lo, np.maximum(rest, 0)], -1), n=n, p=[p_gained, p_lost, 1 - p_gained - p_lost]
        ),
        0.0,
    )


@pytest.mark.parametrize(("p_gained", "p_lost"), [(0.02, 0.02), (0.05, 0.10), (0.30, 0.05), (0.0, 0.05)])
def test_paired_interval_covers_the_truth_as_often_as_it_says(p_gained: float, p_lost: float) -> None:
    n = 60
    weight = _table_probabilities(n, p_gained, p_lost)
    covered = 0.0
    for g in range(n + 1):
        for lo in range(n + 1 - g):
            if weight[g, lo] > 1e-6:
                low, high = stats.paired_interval(g, lo, n)
                covered += weight[g, lo] * (low <= p_gained - p_lost <= high)
    assert 0.93 <= covered <= 0.999  # exact enumeration, no luck; an asymptotic method may dip a little


def test_non_inferiority_lets_a_candidate_at_the_margin_through_at_most_at_its_level() -> None:
    """The gate's use: lower limit at 90 % above -5 points; a candidate 5 points worse must be stopped."""
    n = 100
    weight = _table_probabilities(n, 0.03, 0.08)
    passed = sum(
        weight[g, lo]
        for g in range(n + 1)
        for lo in range(n + 1 - g)
        if weight[g, lo] > 1e-7 and stats.paired_interval(g, lo, n, 0.9)[0] > -0.05
    )
    assert passed <= 0.055


def test_reliability_demonstration_reproduces_the_known_trial_counts() -> None:
    assert [stats.trials_for_reliability(0.999, 0.95, f) for f in range(4)] == [2995, 4742, 6294, 7752]
    # The success-run theorem's classic rows: 90/90, 95/95, 99/90 without a failure.
    assert [stats.trials_for_reliability(p, c) for p, c in ((0.9, 0.9), (0.95, 0.95), (0.99, 0.9))] == [
        22,
        59,
        230,
    ]


@given(st.floats(0.5, 0.999), st.floats(0.5, 0.99), st.integers(0, 5))
@settings(max_examples=60)
def test_trials_are_exactly_enough(p: float, confidence: float, failures: int) -> None:
    n = stats.trials_for_reliability(p, confidence, failures)
    assert stats.proven_reliability(failures, n, confidence) >= p - 1e-9
    if n - 1 > failures:
        assert stats.proven_reliability(failures, n - 1, confidence) < p + 1e-9
    if failures == 0:
        exact = math.log(1 - confidence) / math.log(p)
        assert max(1, math.ceil(exact - 1e-9)) <= n <= max(1, math.ceil(exact + 1e-9))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
def test_percentiles_are_observed_values_in_order(values: list[float]) -> None:
    p = stats.percentiles(values)
    assert p.n == len(values)
    assert p.p50 <= p.p99 <= p.p999 <= p.max == max(values)
    assert {p.p50, p.p99, p.p999} <= set(values)
    assert sum(v <= p.p99 for v in values) >= 0.99 * len(values)


def test_percentiles_of_a_known_sample() -> None:
    assert stats.percentiles(range(1, 1001)) == (1000, 500.0, 990.0, 999.0, 1000.0)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_percentiles_refuse_missing_values_instead_of_skipping_them(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"empty|not finite"):
        stats.percentiles(bad)


def test_paired_ratio_sees_a_factor_through_noise_that_both_sides_share() -> None:
    shared = np.array([1.0, 5.0, 2.0, 9.0, 3.0])
    r = stats.paired_ratio(shared, shared * 1.5, floor=1e-6)
    assert (r.mean, r.low, r.high) == pytest.approx((1.5, 1.5, 1.5))
    assert r.n == 5


def test_paired_ratio_ignores_what_lies_below_the_floor() -> None:
    r = stats.paired_ratio([0.0, 1e-9, 3e-4], [9e-4, 0.0, 1e-5], floor=1e-3)
    assert (r.mean, r.low, r.high) == (1.0, 1.0, 1.0)


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=2, max_size=30))
def test_paired_ratio_inverts_when_the_sides_swap(pairs: list[tuple[float, float]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    r, s = stats.paired_ratio(a, b, 1e-3), stats.paired_ratio(b, a, 1e-3)
    assert r.low <= r.mean * (1 + 1e-9)
    assert r.mean <= r.high * (1 + 1e-9)
    assert r.mean == pytest.approx(1 / s.mean)
    assert r.low == pytest.approx(1 / s.high)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.wilson(1, 0),
        lambda: stats.wilson(3, 2),
        lambda: stats.wilson(1, 2, 1.0),
        lambda: stats.clopper_pearson(-1, 2),
        lambda: stats.paired_interval(2, 2, 3),
        lambda: stats.paired_difference([], []),
        lambda: stats.paired_difference([True], [True, False]),
        lambda: stats.mcnemar(-1, 0),
        lambda: stats.paired_ratio([1.0], [1.0], 1.0),
        lambda: stats.paired_ratio([1.0, math.nan], [1.0, 1.0], 1.0),
        lambda: stats.paired_ratio([1.0, 1.0], [1.0, 1.0], 0.0),
        lambda: stats.trials_for_reliability(1.0),
        lambda: stats.trials_for_reliability(0.9, failures=-1),
        lambda: stats.proven_reliability(3, 2),
    ],
)
def test_arguments_out_of_range_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"got|not finite"):
        call()


def test_unpaired_difference_reproduces_newcombes_examples() -> None:
    """Newcombe 1998 (17:873-890), table II, method 10: (56/70 - 48/80), (9/10 - 3/10), (10/10 - 0/10)."""
    for a, n_a, b, n_b, low, high in (
        (48, 80, 56, 70, 0.0524, 0.3339),
        (3, 10, 9, 10, 0.1705, 0.8090),
        (0, 10, 10, 10, 0.6075, 1.0000),
    ):
        d = stats.unpaired_difference(a, n_a, b, n_b)
        assert d.mean == pytest.approx(b / n_b - a / n_a)
        assert (d.low, d.high) == pytest.approx((low, high), abs=5e-5)


def test_unpaired_ratio_is_welchs_interval_and_needs_two_values_a_side() -> None:
    ttest_ind = scipy_stats.ttest_ind

    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0.0, 0.3, 9), rng.lognormal(0.5, 0.8, 14)
    r = stats.unpaired_ratio(stats.log_moments(a, 1e-9), stats.log_moments(b, 1e-9), 0.9)
    expected = ttest_ind(np.log(b), np.log(a), equal_var=False).confidence_interval(0.9)
    assert (np.log(r.low), np.log(r.high)) == pytest.approx((expected.low, expected.high))
    below = stats.log_moments([0.0, 0.1, 0.5], 1.0)
    assert stats.unpaired_ratio(below, below)[:3] == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="two or more"):
        stats.unpaired_ratio(stats.log_moments([], 1.0), below)
    with pytest.raises(ValueError, match="not finite"):
        stats.log_moments([np.nan], 1.0)
    wild = stats.Moments(2, 0.0, 1e9)
    assert math.isfinite(stats.unpaired_ratio(wild, wild).high)
