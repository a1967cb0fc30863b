"""One pass over what an episode is made of, compiled: curation should cost little more than reading it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flywheel.edge.compiled import compiled


@compiled
def ends(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Least and greatest ``[2, C]`` of each channel of ``values [N, C]``, N ≥ 1; finite values."""
    n, channels = values.shape
    found = np.empty((2, channels), np.float32)
    for c in range(channels):
        low = high = values[0, c]
        for i in range(n):
            value = values[i, c]
            low, high = min(low, value), max(high, value)
        found[0, c], found[1, c] = low, high
    return found


@compiled
def runs_of_one_value(
    values: NDArray[np.float32], free: NDArray[np.bool_], shortest: int
) -> NDArray[np.int64]:
    """``[R, 3]``: channel, first and last row of each run of one value in ``values [N, C]``, to the last bit,
    whose last row is ``shortest`` (2 at least) or more after its first.

    ``free [N]``: rows in which a run may go on; empty: all. Channel by channel, in the order of the rows.
    """
    n, channels = values.shape
    found = np.empty((channels * (n // (shortest + 1) + 1), 3), np.int64)
    count = 0
    every = shortest // 2  # a run has two rows of every so many, one after the other: no others are looked at
    for c in range(channels):
        i = every
        while i < n:
            here = values[i, c]
            if here != values[i - every, c]:
                i += every
                continue
            first, last = i, i
            while first > 0 and values[first - 1, c] == here and (len(free) == 0 or free[first]):
                first -= 1
            while last + 1 < n and values[last + 1, c] == here and (len(free) == 0 or free[last + 1]):
                last += 1
            if last - first >= shortest:
                found[count, 0], found[count, 1], found[count, 2] = c, first, last
                count += 1
            i = (last // every + 1) * every
    return found[:count].copy()


@compiled
def integrals(
    t_ns: NDArray[np.int64], rates: NDArray[np.float32], begin: NDArray[np.int64], length: int
) -> NDArray[np.float64]:
    """``[M, C]``: integrals of ``rates [N, C]`` (per second, trapezoids) from each row ``begin [M]``, which
    ascend, to the one ``length`` later."""
    channels = rates.shape[1]
    found = np.empty((len(begin), channels), np.float64)
    total = np.zeros(channels, np.float64)
    started = ended = 0
    row = begin[0] if len(begin) else 0
    while ended < len(begin):
        if started < len(begin) and row == begin[started]:
            for c in range(channels):
                found[started, c] = total[c]
            started += 1
        if row == begin[ended] + length:
            for c in range(channels):
                found[ended, c] = total[c] - found[ended, c]
            ended += 1
            continue
        if started == ended:  # between two windows nothing counts, however large
            row = begin[started]
            for c in range(channels):
                total[c] = 0.0
            continue
        until = begin[ended] + length
        if started < len(begin):
            until = min(until, begin[started])
        while row < until:
            half = (t_ns[row + 1] - t_ns[row]) * 0.5e-9
            for c in range(channels):
                total[c] += (np.float64(rates[row, c]) + np.float64(rates[row + 1, c])) * half
            row += 1
    return found


@compiled
def spans(values: NDArray[np.float32], parts: NDArray[np.int64]) -> NDArray[np.float64]:
    """``[R]``: greatest less least of ``values [N, C]`` in each of ``parts [R, 3]``: channel, first and last
    row."""
    found = np.empty(len(parts), np.float64)
    for k in range(len(parts)):
        c, first, last = parts[k, 0], parts[k, 1], parts[k, 2]
        low = high = values[first, c]
        for i in range(first, last + 1):
            low, high = min(low, values[i, c]), max(high, values[i, c])
        found[k] = high - low
    return found


@compiled
def laplacian_share(pictures: NDArray[np.float32]) -> NDArray[np.float64]:
    """Variance of the Laplacian over the variance of the picture (1 at least), of each of
    ``pictures [N, H, W]``; ``H`` and ``W`` are 3 at least."""
    n, h, w = pictures.shape
    found = np.empty(n, np.float64)
    sums = np.empty((4, w), np.float32)  # by column: such sums take several columns at once
    for k in range(n):
        g = pictures[k]
        level = g[h // 2, w // 2]  # near the mean, for the sake of the sums of squares
        sums[:] = 0
        for i in range(h):
            for j in range(w):
                v = g[i, j] - level
                sums[0, j] += v
                sums[1, j] += v * v
        for i in range(1, h - 1):
            for j in range(1, w - 1):
                v = g[i - 1, j] + g[i + 1, j] + g[i, j - 1] + g[i, j + 1] - np.float32(4) * g[i, j]
                sums[2, j] += v
                sums[3, j] += v * v
        every, inner = h * w, (h - 2) * (w - 2)
        one, two, lap_one, lap_two = 0.0, 0.0, 0.0, 0.0
        for j in range(w):
            one += sums[0, j]
            two += sums[1, j]
            lap_one += sums[2, j]
            lap_two += sums[3, j]
        variance = two / every - (one / every) ** 2
        found[k] = (lap_two / inner - (lap_one / inner) ** 2) / (variance if variance > 1.0 else 1.0)
    return found
