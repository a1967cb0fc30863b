"""Small-sample statistics of the gate and the reports: proportions, paired differences, tails, reliability.

Pure functions of numbers: no I/O, no clock, no random state. Arguments out of range raise ``ValueError``,
because they are a caller's mistake and never a user's. A confidence is two-sided unless a name says
otherwise: a one-sided test at level ``alpha`` reads one limit of the interval at ``1 - 2 * alpha``.

Sources
    Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212.
    Clopper & Pearson, Biometrika 26 (1934) 404-413.
    McNemar, Psychometrika 12 (1947) 153-157 (exact conditional form: the sign test on the discordant pairs).
    Tango, Stat. Med. 17 (1998) 891-908 (score interval of a difference of paired proportions).
    Newcombe, Stat. Med. 17 (1998) 857-872 and Fagerland et al., Stat. Med. 33 (2014) 2850-2875, which
    compare the choices and hold the worked examples that the tests reproduce.
    Kalibera & Jones, ISMM (2013) 63-74 (ratios of paired runs with an interval, for timings).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from flywheel.schema import Proportion

_EXP_MAX = 700.0  # exp(710) overflows


class Estimate(NamedTuple):
    """A figure, its confidence interval and the number of observations (or pairs) behind it."""

    mean: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """A difference of success rates, ``b - a``, over the same seeds; ``p`` is the exact McNemar test."""

    diff: float
    low: float
    high: float
    n: int
    gained: int  # pairs that only b solved
    lost: int  # pairs that only a solved
    p: float


class Percentiles(NamedTuple):
    """Tail of a sample by nearest rank, in the unit of the sample: each is a value that was observed."""

    n: int
    p50: float
    p99: float
    p999: float
    max: float


def _z(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return float(special.ndtri(0.5 + confidence / 2))


def _count(k: int, n: int) -> None:
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n and n >= 1, got k={k}, n={n}")


def wilson(k: int, n: int, confidence: float = 0.95) -> Proportion:
    """Score interval of ``k`` successes in ``n`` trials (Wilson 1927).

    centre ``(k + z²/2) / (n + z²)``, half width ``z sqrt(k (n - k) / n + z²/4) / (n + z²)``.
    """
    _count(k, n)
    z = _z(confidence)
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    # At k = 0 and k = n the limit is exactly 0 or 1; rounding must not push it inside.
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return Proportion(mean=k / n, low=low, high=high, n=n)


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Proportion:
    """Exact interval of ``k`` successes in ``n`` trials: coverage never below ``confidence`` (1934)."""
    _count(k, n)
    _z(confidence)
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(special.betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(special.betaincinv(k + 1, n - k, 1 - tail))
    return Proportion(mean=k / n, low=low, high=high, n=n)


def _tango_score(delta: float, gained: int, lost: int, n: int) -> float:
    """Score statistic of the hypothesis that the paired difference is ``delta`` (Tango 1998).

    Falls monotonically with ``delta``. The nuisance parameter, the probability of a lost pair, is put
    at its maximum-likelihood value under the hypothesis, the larger root of ``2n x² + u x + v = 0``.
    """
    u = (2 * n - gained + lost) * delta - (gained + lost)
    v = -lost * delta * (1 - delta)
    p_lost = (math.sqrt(max(0.0, u * u - 8 * n * v)) - u) / (4 * n)
    variance = n * (2 * p_lost + delta * (1 - delta))
    distance = gained - lost - n * delta
    if variance <= 0.0:  # only where no pair can be discordant, or all must be
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def paired_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval for ``(gained - lost) / n``.

    Holds its level for few pairs and for none discordant, and its lower limit exceeds ``-margin``
    exactly where Tango's non-inferiority test at that margin rejects.
    """
    if n < 1 or gained < 0 or lost < 0 or gained + lost > n:
        raise ValueError(f"need gained, lost >= 0 and gained + lost <= n, got {gained}, {lost}, {n}")
    z = _z(confidence)

    def solve(target: float, lo: float, hi: float) -> float:
        for _ in range(60):  # 2 / 2**60: below the spacing of doubles
            mid = (lo + hi) / 2
            if _tango_score(mid, gained, lost, n) > target:
                lo = mid
            else:
                hi = mid
        return (lo + hi) / 2

    diff = (gained - lost) / n
    low = -1.0 if lost == n else solve(z, -1.0, diff)
    high = 1.0 if gained == n else solve(-z, diff, 1.0)
    return low, high


def paired_difference(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> Difference:
    """Success of ``b`` minus success of ``a`` over the same seeds, in the same order."""
    if len(a) != len(b) or not a:
        raise ValueError(f"need two samples of the same seeds, got {len(a)} and {len(b)}")
    gained = sum(1 for x, y in zip(a, b, strict=True) if y and not x)
    lost = sum(1 for x, y in zip(a, b, strict=True) if x and not y)
    n = len(a)
    low, high = paired_interval(gained, lost, n, confidence)
    return Difference((gained - lost) / n, low, high, n, gained, lost, mcnemar(gained, lost))


def mcnemar(
    gained: int, lost: int, alternative: Literal["two-sided", "worse", "better"] = "two-sided"
) -> float:
    """Exact conditional p-value: given the discordant pairs, ``lost ~ Binomial(gained + lost, 1/2)``.

    ``worse`` asks whether more was lost than chance explains, ``better`` whether more was gained.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"counts must not be negative, got {gained}, {lost}")
    m = gained + lost
    if m == 0:
        return 1.0
    if alternative == "two-sided":
        return min(1.0, 2 * float(special.bdtr(min(gained, lost), m, 0.5)))
    # P(X >= k) = P(X <= m - k) at one half
    return float(special.bdtr(gained if alternative == "worse" else lost, m, 0.5))


def percentiles(values: ArrayLike) -> Percentiles:
    """Nearest-rank p50, p99, p99.9 and maximum; empty or not finite is refused, never skipped."""
    x = np.asarray(values, dtype=np.float64).ravel()
    if x.size == 0:
        raise ValueError("percentiles of an empty sample")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {x.size} values are not finite")
    p50, p99, p999 = (float(v) for v in np.quantile(x, (0.5, 0.99, 0.999), method="inverted_cdf"))
    return Percentiles(int(x.size), p50, p99, p999, float(x.max()))


def paired_ratio(a: ArrayLike, b: ArrayLike, floor: float, confidence: float = 0.95) -> Estimate:
    """Geometric mean of ``b / a`` over paired runs, with Student's interval on the logarithms.

    Both sides are lifted to ``floor`` first: differences below it do not matter, so they add no noise,
    and a zero has a ratio. Needs two pairs; values must be finite.
    """
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if x.size != y.size or x.size < 2:
        raise ValueError(f"need two or more pairs, got {x.size} and {y.size}")
    if not floor > 0 or not math.isfinite(floor):
        raise ValueError(f"floor must be positive, got {floor}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("paired runs hold values that are not finite")
    _z(confidence)
    logs = np.log(np.maximum(y, floor)) - np.log(np.maximum(x, floor))
    n = int(logs.size)
    mean = float(logs.mean())
    t = float(special.stdtrit(n - 1, 0.5 + confidence / 2))
    half = t * float(logs.std(ddof=1)) / math.sqrt(n)
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half), n)


def unpaired_difference(k_a: int, n_a: int, k_b: int, n_b: int, confidence: float = 0.95) -> Estimate:
    """Difference of two independent success rates, ``b - a`` (Newcombe 1998, hybrid score, his method 10).

    ``d - sqrt((p_b - low_b)² + (high_a - p_a)²)`` and likewise above, from the two Wilson intervals.
    """
    a, b = wilson(k_a, n_a, confidence), wilson(k_b, n_b, confidence)
    d = b.mean - a.mean
    low = d - math.hypot(b.mean - b.low, a.high - a.mean)
    high = d + math.hypot(b.high - b.mean, a.mean - a.low)
    return Estimate(d, low, high, n_a + n_b)


class Moments(NamedTuple):
    """Count, mean and variance (n - 1) of the logarithms of positive values: for ``unpaired_ratio``."""

    n: int
    mean: float
    var: float


def log_moments(values: ArrayLike, floor: float) -> Moments:
    """``Moments`` of values lifted to ``floor``, below which differences do not matter; empty gives n = 0."""
    if not floor > 0 or not math.isfinite(floor):
        raise ValueError(f"floor must be positive, got {floor}")
    x = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(x).all():
        raise ValueError("values that are not finite have no logarithm")
    if x.size == 0:
        return Moments(0, 0.0, 0.0)
    logs = np.log(np.maximum(x, floor))
    return Moments(int(x.size), float(logs.mean()), float(logs.var(ddof=1)) if x.size > 1 else 0.0)


def unpaired_ratio(a: Moments, b: Moments, confidence: float = 0.95) -> Estimate:
    """Ratio of two independent geometric means, ``b / a``, with Welch's interval on the logarithms.

    Welch, Biometrika 34 (1947) 28-35. Needs two values on each side.
    """
    if a.n < 2 or b.n < 2:
        raise ValueError(f"need two or more values on each side, got {a.n} and {b.n}")
    _z(confidence)
    va, vb = a.var / a.n, b.var / b.n
    d, v = b.mean - a.mean, va + vb
    half = 0.0
    if v > 0:
        df = v * v / (va * va / (a.n - 1) + vb * vb / (b.n - 1))
        half = float(special.stdtrit(df, 0.5 + confidence / 2)) * math.sqrt(v)
    low, mean, high = (math.exp(min(max(x, -_EXP_MAX), _EXP_MAX)) for x in (d - half, d, d + half))
    return Estimate(mean, low, high, a.n + b.n)


def trials_for_reliability(p: float, confidence: float = 0.95, failures: int = 0) -> int:
    """Least number of trials that proves reliability ``p`` when ``failures`` of them fail.

    The least ``n`` with ``P(X <= failures | n, 1 - p) <= 1 - confidence``: inverting the one-sided
    Clopper-Pearson limit. Without a failure it is ``ceil(log(1 - confidence) / log(p))``.
    """
    if not 0.0 < p < 1.0:
        raise ValueError(f"reliability must lie in (0, 1), got {p}")
    if failures < 0:
        raise ValueError(f"failures must not be negative, got {failures}")
    _z(confidence)

    def proven(n: int) -> bool:
        return float(special.bdtr(failures, n, 1 - p)) <= 1 - confidence

    low, high = failures, failures + 1  # nothing is proven while every trial failed
    while not proven(high):
        low, high = high, high * 2
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (low, mid) if proven(mid) else (mid, high)
    return high


def proven_reliability(failures: int, n: int, confidence: float = 0.95) -> float:
    """One-sided lower limit of the success rate after ``failures`` in ``n`` trials (exact)."""
    _count(failures, n)
    _z(confidence)
    if failures == n:
        return 0.0
    return float(special.betaincinv(n - failures, failures + 1, 1 - confidence))
