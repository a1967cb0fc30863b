"""lerobot's statistics of an episode, from memory.

Numbers go through lerobot's own function. So would pixels, and that would be most of what a dataset costs:
lerobot goes over them ten times, and sorts them. A pixel has 256 values, so here they are counted, and summed
once in lerobot's precision and order. The rest is lerobot's, and what comes out is the same to the last bit
(a test holds the two against each other). Only of pictures of 300 px and more lerobot's writer looks at some
of the pixels; here it is all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel.edge.compiled import compiled

Statistics = dict[str, NDArray[Any]]


def of_numbers(values: NDArray[Any]) -> Statistics:
    """Of a column ``[N]`` or ``[N, D]``: least, greatest, mean, deviation, count and quantiles."""
    from lerobot.datasets.compute_stats import get_feature_stats

    found: Statistics = get_feature_stats(values, axis=0, keepdims=values.ndim == 1)
    return found


def of_pictures(pictures: NDArray[np.uint8]) -> Statistics:
    """The same of pictures ``[N, H, W, 3]``, by channel ``[3, 1, 1]``, from 0 to 1."""
    from lerobot.datasets.compute_stats import RunningQuantileStats

    channels = pictures.shape[3]
    if pictures[..., 0].size < 2:
        alone = of_numbers(pictures.reshape(-1, channels))
        return {k: v if k == "count" else v.reshape(-1, 1, 1) / 255.0 for k, v in alone.items()}
    pixels = np.ascontiguousarray(pictures).reshape(-1, channels)
    total = np.intp(len(pixels))
    seen: Any = RunningQuantileStats()
    seen._count = len(pixels)
    seen._mean, seen._mean_of_squares = _sums(pixels)
    for sums in (seen._mean, seen._mean_of_squares):
        np.true_divide(sums, total, out=sums, casting="unsafe")  # as np.mean does
    counts = [np.bincount(pixels[:, c], minlength=256) for c in range(channels)]
    values = np.arange(256, dtype=np.float32)
    seen._min = np.array([values[n > 0][0] for n in counts])
    seen._max = np.array([values[n > 0][-1] for n in counts])
    bins = seen._num_quantile_bins
    seen._bin_edges = [
        np.linspace(low - 1e-10, high + 1e-10, bins + 1)
        for low, high in zip(seen._min, seen._max, strict=True)
    ]
    seen._histograms = [
        np.histogram(values, bins=edges, weights=n.astype(np.float64))[0]
        for n, edges in zip(counts, seen._bin_edges, strict=True)
    ]
    found: Statistics = seen.get_statistics()
    found = {k: v.reshape(-1, 1, 1) / 255.0 for k, v in found.items()}
    return found | {"count": np.array([len(pictures)])}


@compiled
def _sums(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """By channel of ``[M, 3]``: sums of the values and of their squares, one after the other, in single
    precision, as numpy adds rows."""
    one = np.zeros(pixels.shape[1], np.float32)
    two = np.zeros(pixels.shape[1], np.float32)
    for c in range(pixels.shape[1]):
        a = b = np.float32(0)
        for i in range(len(pixels)):
            value = np.float32(pixels[i, c])
            a += value
            b += value * value
        one[c], two[c] = a, b
    return one, two
