"""What the functions of this package give back, and the checks of what they are given."""

from __future__ import annotations

from typing import NamedTuple

from scipy import special


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


class Moments(NamedTuple):
    """Count, mean and variance (n - 1) of the logarithms of positive values: for ``unpaired_ratio``."""

    n: int
    mean: float
    var: float


def z_of(confidence: float) -> float:
    """Two-sided normal quantile; ``ValueError`` if ``confidence`` is not in (0, 1)."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return float(special.ndtri(0.5 + confidence / 2))


def check_count(k: int, n: int) -> None:
    """``ValueError`` unless ``k`` of ``n`` trials is possible."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n and n >= 1, got k={k}, n={n}")
