"""Sequential statistics: exact levels by enumeration, closed forms, what a gate that stops early leans on."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy import stats as scipy_stats

from flywheel import stats

ALPHA = 0.05
Array = npt.NDArray[np.float64]
differences = st.lists(st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1), min_size=1, max_size=60)
nulls = st.floats(-0.9, 0.9)


def table(t: int, null: float) -> tuple[Array, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Capital after every table of ``t`` pairs, and how many each gained and lost; order does not matter."""
    gained, lost = np.array([(g, k) for g in range(t + 1) for k in range(t + 1 - g)]).T
    position = np.arange(t)
    series = np.where(position < gained[:, None], 1.0, np.where(position < (gained + lost)[:, None], -1.0, 0))
    return np.exp(stats.log_capital(series, null)[:, -1]), gained, lost


# Shares of pairs gained and lost whose difference is exactly -5 points, or 0.
BORDERS = [(0.0, 0.05, -0.05), (0.02, 0.07, -0.05), (0.30, 0.35, -0.05), (0.10, 0.10, 0.0), (0.45, 0.45, 0.0)]


@pytest.mark.parametrize(("p_gained", "p_lost", "null"), BORDERS)
def test_on_the_border_of_the_null_capital_is_fair(p_gained: float, p_lost: float, null: float) -> None:
    """The expected capital is exactly what one starts with: a bet at fair odds, whatever the share."""
    for t in (1, 7, 25):
        capital, gained, lost = table(t, null)
        rows = np.stack([gained, lost, t - gained - lost], -1)
        chance = scipy_stats.multinomial.pmf(rows, t, [p_gained, p_lost, 1 - p_gained - p_lost])
        assert float(chance @ capital) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("p_gained", "p_lost", "null"), BORDERS)
def test_looking_after_every_pair_errs_within_the_level_by_exact_enumeration(
    p_gained: float, p_lost: float, null: float
) -> None:
    """Every path of 60 pairs, stopped where capital first reaches 20; no luck is involved."""
    n, refused = 60, 0.0
    alive: Array = np.zeros((n + 2, n + 2))
    alive[0, 0] = 1.0
    for t in range(1, n + 1):
        after = alive * (1 - p_gained - p_lost)
        after[1:] += alive[:-1] * p_gained
        after[:, 1:] += alive[:, :-1] * p_lost
        capital, gained, lost = table(t, null)
        hit = capital >= 1 / ALPHA
        refused += float(after[gained[hit], lost[hit]].sum())
        after[gained[hit], lost[hit]] = 0.0
        alive = after
    assert refused + alive.sum() == pytest.approx(1.0)
    assert refused <= ALPHA


@pytest.mark.parametrize("p", [0.03, 0.3, 0.9, 0.999])
def test_a_confidence_sequence_covers_a_success_rate_at_all_times_together(p: float) -> None:
    """Coverage over every path of 80 trials; each limit misses with 2.5 % at most."""
    n, missed = 80, {"greater": 0.0, "less": 0.0}
    for side in ("greater", "less"):
        alive: Array = np.zeros(n + 2)
        alive[0] = 1.0
        for t in range(1, n + 1):
            after = alive * (1 - p)
            after[1:] += alive[:-1] * p
            series = (np.arange(t) < np.arange(t + 1)[:, None]).astype(float)
            path = stats.log_capital(series, p, "greater" if side == "greater" else "less", lowest=0.0)
            hit = path[:, -1] >= math.log(2 / ALPHA)
            missed[side] += float(after[: t + 1][hit].sum())
            after[: t + 1][hit] = 0.0
            alive = after
    assert max(missed.values()) <= ALPHA / 2
    assert sum(missed.values()) > 0 or p > 0.99


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (10, 0.9), (40, 0.95), (47, 0.2)])
def test_capital_after_successes_alone_has_its_closed_form(n: int, p: float) -> None:
    """∫ (1 + c (1 - p) / p)^n over Beta(2, 1/2) is Gauss's hypergeometric function (Euler's integral)."""
    want = float(special.hyp2f1(-n, 2.0, 2.5, -(1 - p) / p))
    assert stats.e_value([1.0] * n, p, lowest=0.0) == pytest.approx(want, rel=1e-9)


def test_the_capital_never_outgrows_the_best_gambler_of_the_success_run_theorem() -> None:
    """59 successes prove 95 % at 95 % in a fixed plan, p^-59 = 20.6; who hedges his bets needs a few more."""
    path = stats.log_capital(np.ones(200), 0.95, lowest=0.0)
    first = int(np.argmax(path >= math.log(20))) + 1
    assert stats.trials_for_reliability(0.95) == 59
    assert 59 < first <= 75
    assert all(path[:59] <= -np.arange(1, 60) * math.log(0.95))


def test_the_gates_two_plain_cases_are_decided_within_their_budgets() -> None:
    ties = stats.log_capital(np.zeros(100), -0.05)
    assert int(np.argmax(ties >= math.log(20))) + 1 <= 70, "100 % against 100 %, 5 points of margin"
    lifted = stats.log_capital(np.ones(20), 0.0)
    assert int(np.argmax(lifted >= math.log(20))) + 1 == 5, "five scenes gained and none lost"


@given(differences, nulls, st.integers(0, 59), st.floats(0, 1))
def test_a_better_value_anywhere_never_lowers_the_capital(
    values: list[float], null: float, at: int, by: float
) -> None:
    better = list(values)
    better[at % len(values)] = min(1.0, better[at % len(values)] + by)
    assert stats.log_capital(better, null)[-1] >= stats.log_capital(values, null)[-1] - 1e-9


@given(differences, st.tuples(nulls, nulls))
def test_a_higher_null_is_never_easier_to_refuse(values: list[float], both: tuple[float, float]) -> None:
    low, high = sorted(both)
    assert np.all(stats.log_capital(values, high) <= stats.log_capital(values, low) + 1e-9)


@given(differences, nulls)
def test_sides_mirror(values: list[float], null: float) -> None:
    mirrored = stats.log_capital([-v for v in values], -null, "less")
    assert mirrored == pytest.approx(stats.log_capital(values, null))
    a, b = stats.confidence_sequence(values), stats.confidence_sequence([-v for v in values])
    assert (a.low, a.high) == pytest.approx((-b.high, -b.low), abs=1e-9)


@given(differences, nulls)
def test_the_scale_of_the_values_does_not_matter(values: list[float], null: float) -> None:
    halved = [(v + 1) / 2 for v in values]
    other = stats.log_capital(halved, (null + 1) / 2, lowest=0.0)
    assert other == pytest.approx(stats.log_capital(values, null), abs=1e-6)


@given(differences)
@settings(max_examples=50)
def test_a_limit_lies_beyond_a_bar_exactly_where_capital_against_it_was_ever_enough(
    values: list[float],
) -> None:
    s = stats.confidence_sequence(values, 1 - 2 * ALPHA)
    assert s.n == len(values)
    for bar in (-0.05, 0.0, 0.3):
        enough = bool(stats.log_capital(values, bar).max() >= math.log(1 / ALPHA))
        assert (s.low > bar) == enough or s.low == pytest.approx(bar, abs=1e-6)


@given(differences)
@settings(max_examples=50)
def test_the_interval_never_widens_with_time(values: list[float]) -> None:
    found = [stats.confidence_sequence(values[: i + 1]) for i in range(0, len(values), 7)]
    assert all(b.low >= a.low - 1e-7 and b.high <= a.high + 1e-7 for a, b in pairwise(found))


def test_e_values_of_fresh_batches_multiply_to_an_e_value() -> None:
    """Two batches, the second taken only where the first was promising: the expectation stays at most 1."""
    p, null, n = 0.5, 0.5, 8
    k = np.arange(n + 1)
    chance = scipy_stats.binom.pmf(k, n, p)
    e = np.array([stats.e_value([1.0] * int(i) + [0.0] * (n - int(i)), null, lowest=0.0) for i in k])
    expected = sum(c * (v * float(chance @ e) if v > 1.5 else v) for c, v in zip(chance, e, strict=True))
    assert expected == pytest.approx(1.0)
    assert stats.e_value([], 0.0) == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.log_capital([0.0], 1.0),
        lambda: stats.log_capital([0.0], -1.0),
        lambda: stats.log_capital([1.5], 0.0),
        lambda: stats.log_capital([math.nan], 0.0),
        lambda: stats.log_capital([-0.1], 0.5, lowest=0.0),
        lambda: stats.confidence_sequence([]),
        lambda: stats.confidence_sequence([0.0], 1.0),
        lambda: stats.e_value([[0.0]], 0.0),
        lambda: stats.pairs_for_margin(0.1, 0.2, 0.05),
        lambda: stats.pairs_for_margin(0.6, 0.6, 0.05),
        lambda: stats.pairs_for_margin(0.1, 0.1, 0.05, power=1.0),
        lambda: stats.trials_left(3, 2),
    ],
)
def test_arguments_out_of_range_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="got"):
        call()


# ── plans of fixed size ────────────────────────────────────────────────────────────────────────────


def test_the_fixed_plan_for_ties_alone_has_its_closed_form() -> None:
    """z² / (n + z²) < margin, from the interval without a discordant pair."""
    z2 = float(special.ndtri(0.95)) ** 2
    assert stats.pairs_for_margin(0.0, 0.0, 0.05) == math.ceil(z2 * 0.95 / 0.05)


def test_the_fixed_plan_has_the_power_it_promises_by_brute_force() -> None:
    n = stats.pairs_for_margin(0.25, 0.05, 0.0, power=0.8)
    chance = {
        (g, k): float(scipy_stats.multinomial.pmf([g, k, n - g - k], n, [0.25, 0.05, 0.7]))
        for g in range(n + 1)
        for k in range(n + 1 - g)
    }
    power = sum(c for (g, k), c in chance.items() if c > 1e-9 and stats.paired_interval(g, k, n, 0.9)[0] > 0)
    assert 0.8 <= power < 0.87


def test_the_fixed_plan_agrees_with_the_normal_formula_where_it_is_good() -> None:
    """Equal policies: (z_alpha + z_beta)² discordant / margin² (Nam, Biometrics 53 (1997) 1422-1430)."""
    want = (special.ndtri(0.95) + special.ndtri(0.9)) ** 2 * 0.1 / 0.05**2
    assert stats.pairs_for_margin(0.05, 0.05, 0.05) == pytest.approx(want, rel=0.08)


def test_trials_left_count_down_to_the_published_plans() -> None:
    assert stats.trials_left(0, 1) == 2994
    assert stats.trials_left(1, 2995) == 4742 - 2995
    assert stats.trials_left(0, 2995) == 0
