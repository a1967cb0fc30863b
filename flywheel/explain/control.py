"""What the control loop saw, in numbers: modes, deadlines, tracking, the age of what it followed, limits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flywheel.episode import Episode, as_array
from flywheel.schema import Limit, Mode


@dataclass(frozen=True)
class Spread:
    """Of all ticks; in the unit that the field says."""

    p50: float
    p99: float
    worst: float


@dataclass(frozen=True)
class Control:
    """The whole window. Times are seconds from the first trigger."""

    ticks: int
    rate_hz: float
    modes: dict[str, float]  # share of the ticks, the most frequent first
    misses: int  # ticks that woke more than a period late
    late_us: Spread
    error_rad: Spread  # of the worst joint
    worst_joint: int
    worst_at_s: float
    chunk_age_ms: Spread  # of ticks that followed a chunk
    limits: dict[str, int]  # ticks in which a limit acted
    gaps: int
    drops: int


def controlled(e: Episode) -> Control:
    """Summarise ``control.parquet`` of a sound episode. Pure."""
    m, c = e.manifest, e.control
    t = as_array(c, "t_ns")
    zero = m.triggers[0].t_ns if m.triggers else m.window_ns[0]
    mode = as_array(c, "mode")
    late = as_array(c, "late_ns").astype(np.float64)
    error = np.abs(as_array(c, "q") - as_array(c, "q_ref"))
    row, joint = np.unravel_index(int(error.argmax()), error.shape) if error.size else (0, 0)
    following = as_array(c, "chunk_id") >= 0
    age = as_array(c, "chunk_age_ns").astype(np.float64)[following & (mode <= Mode.FALLBACK)]
    limits = as_array(c, "limits")
    counts = np.bincount(mode, minlength=len(Mode))
    order = sorted(Mode, key=lambda x: -int(counts[x]))
    return Control(
        ticks=len(t),
        rate_hz=m.control_hz,
        modes={x.name.lower(): float(counts[x]) / len(t) for x in order if counts[x]},
        misses=int((late > 1e9 / m.control_hz).sum()),
        late_us=_spread(late / 1e3),
        error_rad=_spread(error.max(axis=1, initial=0.0)),
        worst_joint=int(joint),
        worst_at_s=float((t[row] - zero) / 1e9) if len(t) else 0.0,
        chunk_age_ms=_spread(age / 1e6),
        limits={x.name.lower(): n for x in Limit if x.name and (n := int((limits & x > 0).sum()))},
        gaps=m.gaps,
        drops=m.drops,
    )


def _spread(values: NDArray[np.float64]) -> Spread:
    if not len(values):
        return Spread(0.0, 0.0, 0.0)
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return Spread(float(p50), float(p99), float(values.max()))
