"""Success rates of a fixed number of trials, their differences, and demonstrated reliability."""

from __future__ import annotations

import math

from scipy import special

from flywheel.schema import Proportion
from flywheel.stats.estimates import Estimate, check_count, z_of


def wilson(k: int, n: int, confidence: float = 0.95) -> Proportion:
    """Score interval of ``k`` successes in ``n`` trials (Wilson 1927).

    centre ``(k + z²/2) / (n + z²)``, half width ``z sqrt(k (n - k) / n + z²/4) / (n + z²)``.
    """
    check_count(k, n)
    z = z_of(confidence)
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    # At k = 0 and k = n the limit is exactly 0 or 1; rounding must not push it inside.
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return Proportion(mean=k / n, low=low, high=high, n=n)


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Proportion:
    """Exact interval of ``k`` successes in ``n`` trials: coverage never below ``confidence`` (1934)."""
    check_count(k, n)
    z_of(confidence)
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(special.betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(special.betaincinv(k + 1, n - k, 1 - tail))
    return Proportion(mean=k / n, low=low, high=high, n=n)


def unpaired_difference(k_a: int, n_a: int, k_b: int, n_b: int, confidence: float = 0.95) -> Estimate:
    """Difference of two independent success rates, ``b - a`` (Newcombe 1998, hybrid score, his method 10).

    ``d - sqrt((p_b - low_b)² + (high_a - p_a)²)`` and likewise above, from the two Wilson intervals.
    """
    a, b = wilson(k_a, n_a, confidence), wilson(k_b, n_b, confidence)
    d = b.mean - a.mean
    low = d - math.hypot(b.mean - b.low, a.high - a.mean)
    high = d + math.hypot(b.high - b.mean, a.mean - a.low)
    return Estimate(d, low, high, n_a + n_b)


def trials_for_reliability(p: float, confidence: float = 0.95, failures: int = 0) -> int:
    """Least number of trials that proves reliability ``p`` when ``failures`` of them fail.

    The least ``n`` with ``P(X <= failures | n, 1 - p) <= 1 - confidence``: inverting the one-sided
    Clopper-Pearson limit. Without a failure it is ``ceil(log(1 - confidence) / log(p))``.
    """
    if not 0.0 < p < 1.0:
        raise ValueError(f"reliability must lie in (0, 1), got {p}")
    if failures < 0:
        raise ValueError(f"failures must not be negative, got {failures}")
    z_of(confidence)

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
    check_count(failures, n)
    z_of(confidence)
    if failures == n:
        return 0.0
    return float(special.betaincinv(n - failures, failures + 1, 1 - confidence))


def trials_left(failures: int, n: int, p: float = 0.999, confidence: float = 0.95) -> int:
    """Further trials, all of them successes, that prove reliability ``p`` after ``failures`` in ``n``."""
    check_count(failures, n)
    return max(0, trials_for_reliability(p, confidence, failures) - n)
