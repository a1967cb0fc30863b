"""Timings and tracking errors: percentiles, and ratios of runs with an interval.

A run counts once, however many rows it has: rows of one run are not independent of each other.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from flywheel.stats.estimates import Estimate, Moments, Percentiles, z_of

_EXP_MAX = 700.0  # exp(710) overflows


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
    logs = _log_ratios(a, b, floor)
    z_of(confidence)
    n = int(logs.size)
    mean = float(logs.mean())
    t = float(special.stdtrit(n - 1, 0.5 + confidence / 2))
    half = t * float(logs.std(ddof=1)) / math.sqrt(n)
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half), n)


def paired_ratio_p(a: ArrayLike, b: ArrayLike, floor: float, most: float) -> float:
    """One-sided p-value of "``b / a`` is at most ``most``", by the test that ``paired_ratio`` inverts."""
    if not most > 0:
        raise ValueError(f"the most must be positive, got {most}")
    logs = _log_ratios(a, b, floor)
    excess, n = float(logs.mean()) - math.log(most), int(logs.size)
    error = float(logs.std(ddof=1)) / math.sqrt(n)
    if error == 0.0:
        return 0.0 if excess > 0 else 1.0
    return float(special.stdtr(n - 1, -excess / error))


def _log_ratios(a: ArrayLike, b: ArrayLike, floor: float) -> NDArray[np.float64]:
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if x.size != y.size or x.size < 2:
        raise ValueError(f"need two or more pairs, got {x.size} and {y.size}")
    if not floor > 0 or not math.isfinite(floor):
        raise ValueError(f"floor must be positive, got {floor}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("paired runs hold values that are not finite")
    return np.asarray(np.log(np.maximum(y, floor)) - np.log(np.maximum(x, floor)))


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
    z_of(confidence)
    va, vb = a.var / a.n, b.var / b.n
    d, v = b.mean - a.mean, va + vb
    half = 0.0
    if v > 0:
        df = v * v / (va * va / (a.n - 1) + vb * vb / (b.n - 1))
        half = float(special.stdtrit(df, 0.5 + confidence / 2)) * math.sqrt(v)
    low, mean, high = (math.exp(min(max(x, -_EXP_MAX), _EXP_MAX)) for x in (d - half, d, d + half))
    return Estimate(mean, low, high, a.n + b.n)
