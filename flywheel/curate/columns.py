"""One pass over what an episode is made of, compiled: curation should cost little more than reading it.

What is compiled checks no index. Nothing is sorted here: who knows numba's sort can make it quadratic.
"""

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
def drifts(
    q: NDArray[np.float32], went: NDArray[np.float64], begin: NDArray[np.int64], length: int
) -> tuple[NDArray[np.float64], float, int, int]:
    """How the joints ``q [N, C]`` moved from each row ``begin [M]`` to the one ``length`` later, against
    ``went [M, C]``.

    ``[3, C]``: sums of ``went`` squared, of the ways moved squared, and of both multiplied; then how far the
    two are apart at most, in which window and of which joint.
    """
    sums = np.zeros((3, q.shape[1]), np.float64)
    worst, window, joint = 0.0, 0, 0
    for k in range(len(begin)):
        for c in range(q.shape[1]):
            a = went[k, c]
            b = np.float64(q[begin[k] + length, c]) - np.float64(q[begin[k], c])
            sums[0, c] += a * a
            sums[1, c] += b * b
            sums[2, c] += a * b
            if abs(b - a) > worst:
                worst, window, joint = abs(b - a), k, c
    return sums, worst, window, joint


@compiled
def slip(anchor_ns: NDArray[np.int64], chunk_id: NDArray[np.int64], tolerance_ns: float) -> int:
    """The first row whose chunk is that of the row before, with an anchor farther away; -1: none."""
    for i in range(1, len(anchor_ns)):
        if anchor_ns[i] == anchor_ns[i - 1] or chunk_id[i] != chunk_id[i - 1] or chunk_id[i] < 0:
            continue
        if abs(np.float64(anchor_ns[i]) - np.float64(anchor_ns[i - 1])) > tolerance_ns:
            return i
    return -1


@compiled
def in_force(anchor_ns: NDArray[np.int64], followed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The anchors of the rows ``followed``, one for each stretch of rows with the same."""
    found = np.empty(len(anchor_ns), np.int64)
    count = 0
    for i in range(len(anchor_ns)):
        if followed[i] and (count == 0 or anchor_ns[i] != found[count - 1]):
            found[count] = anchor_ns[i]
            count += 1
    return found[:count].copy()


@compiled
def without_frame(anchor_ns: NDArray[np.int64], frame_ns: NDArray[np.int64], tolerance_ns: float) -> int:
    """How many of ``anchor_ns`` have no time of ``frame_ns`` that near; both ascend, frames one at least."""
    missing, at = 0, 0
    for anchor in anchor_ns:
        while at + 1 < len(frame_ns) and frame_ns[at + 1] <= anchor:
            at += 1
        off = abs(np.float64(anchor) - np.float64(frame_ns[at]))
        if at + 1 < len(frame_ns):
            off = min(off, np.float64(frame_ns[at + 1]) - np.float64(anchor))
        if off > tolerance_ns:
            missing += 1
    return missing


@compiled
def obedience(
    pose: NDArray[np.float64],
    target: NDArray[np.float64],
    mine: NDArray[np.bool_],
    busy: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], float]:
    """How ``pose [F, D]`` goes where ``target [F, D]`` asks, in the frames that are ``mine [F]`` with both
    their neighbours, with the arm ``busy [F-1]`` on the way there and after.

    These frames ``[K]``; ``[2, K]``: how far each asks to go, and how far the step after it is from the one
    that least squares on this command and on the last one expect; ``[3, D]``: squares of what was asked, of
    the steps, and both multiplied, by axis; the way of all steps.
    """
    frames, axes = pose.shape
    found = np.empty(frames, np.int64)
    count = 0
    for r in range(1, frames - 1):
        if mine[r - 1] and mine[r] and mine[r + 1] and busy[r - 1] and busy[r]:
            found[count] = r
            count += 1
    rows = found[:count].copy()
    each = np.zeros((2, count), np.float64)
    sums = np.zeros((3, axes), np.float64)
    ab = bb = by = way = 0.0
    for k in range(count):
        r = rows[k]
        asked = went = 0.0
        for d in range(axes):
            a, b = target[r, d] - pose[r, d], target[r - 1, d] - pose[r, d]
            y = pose[r + 1, d] - pose[r, d]
            sums[0, d] += a * a
            sums[1, d] += y * y
            sums[2, d] += a * y
            asked += a * a
            went += y * y
            ab += a * b
            bb += b * b
            by += b * y
        each[0, k] = np.sqrt(asked)
        way += np.sqrt(went)
    aa, ay = sums[0].sum(), sums[2].sum()
    det = aa * bb - ab * ab
    if det > 1e-12 * aa * bb:
        on_this, on_last = (ay * bb - by * ab) / det, (by * aa - ay * ab) / det
    else:  # one is a multiple of the other
        on_this, on_last = ay / aa if aa > 0 else 0.0, 0.0
    for k in range(count):
        r = rows[k]
        off = 0.0
        for d in range(axes):
            a, b = target[r, d] - pose[r, d], target[r - 1, d] - pose[r, d]
            rest = pose[r + 1, d] - pose[r, d] - on_this * a - on_last * b
            off += rest * rest
        each[1, k] = np.sqrt(off)
    return rows, each, sums, way


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
def colour_shares(pictures: NDArray[np.uint8], blocks: int) -> NDArray[np.float64]:
    """``[blocks, blocks, 2]``: shares of red and of green in the mean of ``pictures [N, H, W, 3]``, of the
    inner half of each side, by block."""
    n, h, w, _ = pictures.shape
    found = np.zeros((blocks, blocks, 2), np.float64)
    top, left = h // 4, w // 4
    height, width = h - 2 * top, w - 2 * left
    for i in range(blocks):
        first, last = top + i * height // blocks, top + (i + 1) * height // blocks
        last = max(last, first + 1)  # a pixel at least
        for j in range(blocks):
            begin, end = left + j * width // blocks, left + (j + 1) * width // blocks
            end = max(end, begin + 1)
            red = green = blue = np.int64(0)
            for k in range(n):
                for y in range(first, last):
                    for x in range(begin, end):
                        red += pictures[k, y, x, 0]
                        green += pictures[k, y, x, 1]
                        blue += pictures[k, y, x, 2]
            pixels = n * (last - first) * (end - begin)
            total = max(float(red + green + blue), float(pixels))  # black has no colour
            found[i, j, 0], found[i, j, 1] = red / total, green / total
    return found


@compiled
def light(
    pictures: NDArray[np.float32], down: int, across: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation ``[N]`` of ``pictures [N, H, W]``, of each ``down``-th row, ``across``-th column."""
    n, h, w = pictures.shape
    mean, deviation = np.empty(n, np.float64), np.empty(n, np.float64)
    for k in range(n):
        one = two = 0.0
        count = 0
        for i in range(0, h, down):
            for j in range(0, w, across):
                v = np.float64(pictures[k, i, j])
                one += v
                two += v * v
                count += 1
        mean[k] = one / count
        variance = two / count - mean[k] ** 2
        deviation[k] = np.sqrt(variance) if variance > 0 else 0.0
    return mean, deviation


@compiled
def laplacian_share(pictures: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Variance of the Laplacian over the variance of the picture (1 at least), of each of ``rows`` of
    ``pictures [N, H, W]``; ``H`` and ``W`` are 3 at least."""
    _, h, w = pictures.shape
    found = np.empty(len(rows), np.float64)
    sums = np.empty((4, w), np.float32)  # by column: such sums take several columns at once
    for k in range(len(rows)):
        g = pictures[rows[k]]
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
