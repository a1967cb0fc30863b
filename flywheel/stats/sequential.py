"""Means of bounded values, looked at after every one of them: e-processes and confidence sequences.

A gambler who starts with 1 bets on each value in turn that the mean lies above ``null``, at odds that are
fair or worse where it does not. His capital after value t is

    K_t = Σ_j w_j Π_{i <= t} (1 + c_j (x_i - null) / (null - lowest)),     0 < c_j < 1,

the average over gamblers who each stake a constant share ``c_j`` of the most that cannot ruin them. While
the mean of every value, given those before it, is at most ``null``, K is a nonnegative supermartingale, so it
ever reaches ``1 / alpha`` with probability at most ``alpha`` (Ville 1939): it may be looked at after every
value and stopped at will. Nothing else is assumed: values need not be 0 or 1, nor alike, nor independent.

Those ``null`` that the capital has never refused are a confidence sequence: an interval for every time, all
of them right together with the stated confidence (Waudby-Smith & Ramdas 2024).

Success is a value in [0, 1], a paired difference of success or of task progress one in [-1, 1].
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from flywheel.stats.estimates import Estimate, z_of

Alternative = Literal["greater", "less"]
GAMBLERS = 24
# The shares have the density of Beta(2, 1/2): most of the capital bets high, as small samples ask for. Any
# prior is valid; compared over tied, rare and frequent differences at the gate's budgets, this one decided
# soonest. The nodes are Gauss and Jacobi's, so up to 47 values the average over gamblers is the integral.
SHARE_PRIOR = (2.0, 0.5)


@cache
def _gamblers() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares ``[GAMBLERS]`` and weights ``[GAMBLERS]``, which sum to 1."""
    a, b = SHARE_PRIOR
    x, w = special.roots_jacobi(GAMBLERS, b - 1, a - 1)
    return np.asarray((x + 1) / 2), np.asarray(w / w.sum())


def log_capital(
    values: ArrayLike,
    null: float,
    alternative: Alternative = "greater",
    *,
    lowest: float = -1.0,
    highest: float = 1.0,
) -> NDArray[np.float64]:
    """Logarithm of the capital after each value along the last axis; same shape as ``values``.

    An e-process against "the mean is at most ``null``" (``less``: at least). ``null`` must lie strictly
    between ``lowest`` and ``highest``, and values on or between them; ``ValueError`` otherwise.
    """
    x = np.asarray(values, dtype=np.float64)
    if not lowest < null < highest:
        raise ValueError(f"null must lie in ({lowest:g}, {highest:g}), got {null}")
    if x.size and not (np.isfinite(x).all() and x.min() >= lowest and x.max() <= highest):
        raise ValueError(f"values must be finite and in [{lowest:g}, {highest:g}], got {x.min()}, {x.max()}")
    if alternative == "less":
        x, null, lowest = -x, -null, -highest
    return _log_capital(x, null, lowest)


def _log_capital(x: NDArray[np.float64], null: float, lowest: float) -> NDArray[np.float64]:
    shares, weights = _gamblers()
    paths = np.log1p(((x - null) / (null - lowest))[..., np.newaxis] * shares)
    np.cumsum(paths, axis=-2, out=paths)
    best = paths.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(paths - best) @ weights) + best[..., 0])


def e_value(
    values: ArrayLike,
    null: float,
    alternative: Alternative = "greater",
    *,
    lowest: float = -1.0,
    highest: float = 1.0,
) -> float:
    """Capital after all the values: evidence against the mean being at most ``null`` (``less``: at least).

    E-values of batches that are fresh, each given those before it, may be multiplied, whatever made one take
    another batch; e-values of any dependence may be averaged (Vovk & Wang 2021). No value gives 1.
    """
    path = log_capital(values, null, alternative, lowest=lowest, highest=highest)
    if path.ndim != 1:
        raise ValueError(f"need one series, got {path.ndim} dimensions")
    return math.exp(min(float(path[-1]), 700.0)) if path.size else 1.0


def confidence_sequence(
    values: ArrayLike, confidence: float = 0.95, *, lowest: float = -1.0, highest: float = 1.0
) -> Estimate:
    """Mean of a series and its interval, as of the last value.

    The intersection of the intervals after every value so far: it covers the mean at all times together, so
    the series may be stopped for any reason. Each limit holds at the one-sided ``(1 + confidence) / 2``, and
    the lower one exceeds a bar exactly where ``log_capital`` against it has ever reached ``log(1 / alpha)``.
    Where the means drift so that no value fits all, the limits cross over.
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    if x.size == 0:
        raise ValueError("need one value or more, got none")
    z_of(confidence)
    target = -math.log((1 - confidence) / 2)
    log_capital(x, (lowest + highest) / 2, lowest=lowest, highest=highest)  # refuses what is out of range
    low = _limit(x, target, lowest, highest)
    high = -_limit(-x, target, -highest, -lowest)
    return Estimate(float(x.mean()), low, high, int(x.size))


def _limit(x: NDArray[np.float64], target: float, lowest: float, highest: float) -> float:
    """The largest mean against which the capital has ever reached ``target``; it falls with the mean."""

    def excess(mean: float) -> float:
        return float(_log_capital(x, mean, lowest).max()) - target

    edge = 1e-9 * (highest - lowest)
    if excess(lowest + edge) < 0:
        return lowest
    if excess(highest - edge) >= 0:
        return highest
    # One tolerance outwards, so that rounding never makes the interval too narrow.
    return float(optimize.brentq(excess, lowest + edge, highest - edge, xtol=edge)) - edge
