"""How far apart values lie, whatever their middle: a change that every comparison of medians misses."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from flywheel.stats.estimates import Estimate, z_of
from flywheel.stats.ranks import rank_correlation

_LOG_RATIO = 12.0  # spreads that differ by more than exp(12) are as good as infinitely far apart


def quantile_range(values: ArrayLike, share: float = 0.8) -> float:
    """Width of the central ``share`` of a sample, in its unit: 0.8 is p90 - p10.

    For one run, to be compared over runs with ``paired_ratio``: the rows of a run are not independent, its
    runs are. Wide enough to use most of the rows, narrow enough that one stall does not decide it.
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    if x.size < 2 or not np.isfinite(x).all():
        raise ValueError(f"need two or more finite values, got {x.size}")
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    low, high = np.quantile(x, ((1 - share) / 2, (1 + share) / 2))
    return float(high - low)


def paired_spread_ratio(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Ratio of the spread of ``b`` to that of ``a`` over independent pairs (McCulloch 1987, inverted).

    If ``b / k`` spreads as ``a`` does, the sum and the difference of ``a`` and ``b / k`` are uncorrelated
    (Pitman 1939, Morgan 1939); Spearman's rank correlation asks whether they are, so neither the middles nor
    heavy tails matter. The interval holds the ``k`` that the t approximation of its test does not refuse;
    a ratio below 1 is a collapse, above 1 a growth. Needs ten pairs, and values that are not all the same.
    """
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if x.size != y.size or x.size < 10:
        raise ValueError(f"need ten or more pairs, got {x.size} and {y.size}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("pairs hold values that are not finite")
    z_of(confidence)
    x, y = x - np.median(x), y - np.median(y)
    if not x.any():
        raise ValueError("the first side has no spread, got the same value throughout")
    t = float(special.stdtrit(x.size - 2, 0.5 + confidence / 2))
    most = t / math.sqrt(x.size - 2 + t * t)  # correlations beyond are refused
    mean, low, high = (math.exp(_solve(x, y, target)) for target in (0.0, most, -most))
    return Estimate(mean, low, high, int(x.size))


def _solve(x: NDArray[np.float64], y: NDArray[np.float64], target: float) -> float:
    """Logarithm of the scale at which sum and difference have rank correlation ``target``; it falls."""
    lo, hi = -_LOG_RATIO, _LOG_RATIO
    for _ in range(30):
        mid = (lo + hi) / 2
        scaled = y * math.exp(-mid)
        # > 0 while y, scaled, still spreads more than x
        if rank_correlation(scaled + x, scaled - x) > target:
            lo = mid
        else:
            hi = mid
    return (lo + hi) / 2
