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
