"""Does one measure order policies as another does? Of a twin's outcomes against the robots'."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's, with average ranks for ties; 0 where one side is constant."""
    x, y = _two(a, b)
    p, q = ranks(x), ranks(y)
    norm = math.sqrt(float(p @ p) * float(q @ q))
    return float(p @ q) / norm if norm else 0.0


def mean_maximum_rank_violation(proxy: ArrayLike, real: ArrayLike) -> float:
    """How much it costs to believe the proxy's order, in the unit of ``real``; 0 if it orders as ``real``.

    For each policy the largest real difference to any that the proxy puts on its wrong side, averaged over
    the policies (Li et al., CoRL 2024, arXiv:2405.05941, eq. 1-2). Unlike a correlation it does not mind an
    order that is wrong among policies that are as good as equal.
    """
    s, r = _two(proxy, real)
    wrong = (s[:, None] < s[None, :]) != (r[:, None] < r[None, :])
    return float(np.max(np.where(wrong, np.abs(r[:, None] - r[None, :]), 0.0), axis=1).mean())


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average ranks, about their mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group] - (values.size + 1) / 2)


def _two(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if x.size != y.size or x.size < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"need two or more pairs of finite values, got {x.size} and {y.size}")
    return x, y
