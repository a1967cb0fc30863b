"""Many tests at once: which of them may be believed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm (1979): refusing those up to ``alpha`` errs anywhere with ``alpha`` at most.

    Under any dependence. The k-th smallest of m is multiplied by ``m - k + 1`` and never falls below the one
    before it.
    """
    x = np.asarray(p, dtype=np.float64)
    if x.ndim != 1 or not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], got {list(p)}")
    order = np.argsort(x, kind="stable")
    stepped = np.maximum.accumulate(x[order] * np.arange(x.size, 0, -1))
    adjusted = np.empty_like(x)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(v) for v in adjusted]


def e_benjamini_hochberg(e: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which of these e-values are discoveries at false discovery rate ``alpha`` (e-BH, Wang & Ramdas 2022).

    Under any dependence. The k largest, for the most k such that the k-th largest is at least
    ``m / (alpha k)``.
    """
    x = np.asarray(e, dtype=np.float64)
    if x.ndim != 1 or not (x >= 0).all():
        raise ValueError(f"e-values must not be negative, got {list(e)}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    order = np.argsort(-x, kind="stable")
    k = np.arange(1, x.size + 1)
    passed = np.flatnonzero(k * x[order] >= x.size / alpha)
    found = np.zeros(x.size, bool)
    if passed.size:
        found[order[: passed[-1] + 1]] = True
    return [bool(v) for v in found]
