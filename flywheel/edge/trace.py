"""The executed reference of every tick in full precision, for benchmarks that judge it.

The control ring rounds to float32, which is enough to learn from and too little to differentiate three times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flywheel.edge.compiled import compiled
from flywheel.edge.link import Ring, Words, aligned, ring_claim, ring_publish

FloatArray = npt.NDArray[np.float64]


def trace_dtype(joints: int) -> np.dtype[np.void]:
    """One tick: time, then position, velocity, acceleration (rad, rad/s, rad/s²)."""
    return aligned([("t_ns", np.int64), ("ref", np.float64, (3, joints))])


@compiled
def _append(now: int, ref: FloatArray, header: Words, out: Words) -> None:
    row = out[ring_claim(header, out.shape[0])]
    row[0] = now
    floats = row[1:].view(np.float64)
    n = ref.shape[1]
    for k in range(3):
        for i in range(n):
            floats[k * n + i] = ref[k, i]
    ring_publish(header)


def tracer(ref: FloatArray, ring: Ring) -> Callable[[int], None]:
    """A function of the tick's time that appends ``ref`` ``[3, n]`` as it is then; compiled at once."""
    header, rows = ring.header, ring.rows
    _append(0, ref, header.copy(), rows.copy())
    return lambda now: _append(now, ref, header, rows)
