"""Whether confidences mean what they say: expected calibration error, with its interval and its noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 5
RESAMPLES = 1000


class Reliability(NamedTuple):
    """``noise``: the error that perfect confidences would show on as many labels, in 95 of 100 cases."""

    error: float
    low: float
    high: float
    noise: float
    n: int


def calibration_error(
    confidence: Sequence[float], right: Sequence[bool], bins: int = BINS, seed: int = 0
) -> Reliability:
    """Expected calibration error over bins of equal count: Σ_b n_b / n |mean confidence - share right|.

    Naeini, Cooper and Hauskrecht 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning";
    equal counts as in Nguyen and O'Connor 2015. ``low`` and ``high`` are the 95 % percentile bootstrap. Few
    labels show an error even where there is none; ``noise`` is how much (consistency resampling, Bröcker and
    Smith 2007, "Increasing the Reliability of Reliability Diagrams"). Raises ``ValueError`` without a label.
    """
    c, r = np.asarray(confidence, np.float64), np.asarray(right, bool)
    if not len(c) or len(c) != len(r):
        raise ValueError(f"{len(c)} confidences and {len(r)} outcomes: need as many, and at least one")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(c), size=(RESAMPLES, len(c)))
    low, high = np.quantile([_error(c[d], r[d], bins) for d in draws], (0.025, 0.975))
    perfect = [_error(c, rng.random(len(c)) < c, bins) for _ in range(RESAMPLES)]
    return Reliability(_error(c, r, bins), float(low), float(high), float(np.quantile(perfect, 0.95)), len(c))


def _error(c: NDArray[np.float64], r: NDArray[np.bool_], bins: int) -> float:
    order = np.argsort(c, kind="stable")
    gaps = [abs(c[b].mean() - r[b].mean()) * len(b) for b in np.array_split(order, min(bins, len(c)))]
    return float(sum(gaps) / len(c))
