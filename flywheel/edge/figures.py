"""What a run on the wall clock was like: figures from the rows that the two systems left."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel.edge.link import Records
from flywheel.edge.lockstep import tracking_error
from flywheel.edge.processes import Shared
from flywheel.edge.rows import EventLog
from flywheel.schema import Mode

BUCKETS_US = (5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000, 10000, 50000)  # upper bounds
INFER_BUCKETS_MS = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000, 2500)
BATCHES = 1 << 15  # looks at 20 Hz: the last 27 minutes
_BOUNDS_NS = np.array(BUCKETS_US) * 1000
_INFER_BOUNDS_NS = np.array(INFER_BUCKETS_MS) * 1_000_000


def _histogram(ns: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many values fall into each bucket, by upper bounds, and above the last."""
    return np.bincount(np.searchsorted(bounds, ns), minlength=len(bounds) + 1)


@dataclass(frozen=True)
class Quantiles:
    """Of ``n`` values: nearest-rank quantiles, in the unit of the values; zeros if there are none."""

    p50: float
    p99: float
    p999: float
    max: float
    n: int
    spread: float = 0.0  # p90 - p10

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Quantiles:
        """Of an array of any length."""
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0, 0)
        p10, p50, p90, p99, p999 = np.percentile(values, (10, 50, 90, 99, 99.9), method="higher")
        spread = float(p90 - p10)
        return cls(float(p50), float(p99), float(p999), float(values.max()), len(values), spread)


@dataclass(frozen=True)
class WallResult:
    """What a run on the wall clock was like; times in ns.

    ``misses_ppm``: deadlines skipped or met a period late or more, per million; ``longest_miss_run`` in a
    row. ``rows_missed``: rows that the supervisor was too slow to read, so that they are in no figure.
    """

    seconds: float
    ticks: int
    late: Quantiles
    compute: Quantiles
    misses_ppm: float
    longest_miss_run: int
    tracking_rms_rad: float
    tracking_p99_rad: float
    tracking_max_rad: float
    chunk_age: Quantiles
    infer: Quantiles
    chunks: int
    rejected: int
    modes: dict[str, int]
    limits: int
    restarts: int
    rows_missed: int
    digest: str
    limits_sha256: str
    privileges: dict[str, Any]
    self_test: dict[str, Any]
    load: tuple[float, float, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Figures:
    """Sums up rows as they come, and turns changes of mode into events.

    Counts cover the whole run; quantiles cover its last ``BATCHES`` looks, so that memory stays bounded.
    """

    def __init__(self, shared: Shared, period_ns: int, events: EventLog) -> None:
        self._period = period_ns
        self._joints = shared.control.dtype["q"].shape[0]
        self._events = events
        self._control = shared.control.reader()
        self._frames = shared.frames.reader()
        self._system2 = shared.events.reader()
        self._kept: dict[str, deque[npt.NDArray[Any]]] = {
            k: deque(maxlen=BATCHES) for k in ("late", "compute", "age", "infer", "errors")
        }
        self._modes = np.zeros(len(Mode), np.int64)
        self._ticks = self._limits = self._chunks = self._rejected = 0
        self._missed = self._run = self._longest = 0
        self.late_counts = np.zeros(len(BUCKETS_US) + 1, np.int64)
        self.compute_counts = np.zeros(len(BUCKETS_US) + 1, np.int64)
        self.infer_counts = np.zeros(len(INFER_BUCKETS_MS) + 1, np.int64)
        self.late_sum_ns = self.compute_sum_ns = self.infer_sum_ns = 0
        self._mode = int(Mode.HOLD)
        self._age = -1
        self._first = self._last = self._deadline = -1

    def skip(self) -> None:
        """Start counting now: the start itself is not part of the figures."""
        for reader in (self._control, self._frames):
            reader.next_row = reader.ring.written
            reader.missed = 0

    def resume(self, since_ns: int) -> None:
        """Start counting with the first tick after ``since_ns``: another supervisor counted up to there."""
        rows = self._control.poll().rows
        self._control.next_row -= int((rows["t_ns"] > since_ns).sum())
        before = rows[rows["t_ns"] <= since_ns]
        if len(before):
            self._mode = int(before["mode"][-1])
        self._frames.next_row = self._frames.ring.written
        self._system2.next_row = self._system2.ring.written
        self._control.missed = self._frames.missed = 0

    @property
    def mode(self) -> Mode:
        """Of the last tick that was read."""
        return Mode(self._mode)

    @property
    def chunk_age_ns(self) -> int:
        """Age of the chunk in the last tick that was read; -1 if there is none."""
        return self._age

    @property
    def misses_ppm(self) -> float:
        """Deadlines missed, per million."""
        deadlines = (self._last - self._first) // self._period + 1 if self._ticks else 1
        return 1e6 * self._missed / deadlines

    @property
    def counts(self) -> dict[str, int]:
        """Ticks, deadlines missed and the longest run of those, chunks published and refused, limits that
        acted (bits)."""
        return {
            "ticks": self._ticks,
            "missed": self._missed,
            "longest": self._longest,
            "chunks": self._chunks,
            "rejected": self._rejected,
            "limits": self._limits,
        }

    def take(self) -> tuple[npt.NDArray[np.float64], int]:
        """Read what is new; returns how long each inference took (ms), and how many outputs were refused."""
        rows, _, lost = self._control.poll()
        if len(rows):
            self._count_misses(rows, lost)
            self._take_control(rows)
        frames = self._frames.poll().rows
        infer = frames["infer_ns"][~frames["intervention"]]
        if len(frames):
            self._chunks += len(frames)
            self._kept["infer"].append(infer)
            self.infer_sum_ns += int(infer.sum())
            self.infer_counts += _histogram(infer, _INFER_BOUNDS_NS)
        said = self._system2.poll().rows
        rejected = int(((said["kind"] == b"policy") & (said["name"] == b"rejected")).sum())
        self._rejected += rejected
        return infer * 1e-6, rejected

    def _count_misses(self, rows: Records, lost: int) -> None:
        """Deadlines lie on a grid: what is missing between two rows was skipped (see ``realtime.pace``)."""
        deadlines = rows["t_ns"] - rows["late_ns"]
        before = self._deadline if self._deadline >= 0 and not lost else int(deadlines[0]) - self._period
        skipped = np.diff(deadlines, prepend=before) // self._period - 1
        late = rows["late_ns"] >= self._period
        self._deadline = int(deadlines[-1])
        self._missed += int(skipped.sum() + late.sum())
        odd = np.flatnonzero((skipped > 0) | late)
        if len(odd) == 0 or odd[0] > 0:
            self._run = 0
        for k, i in enumerate(odd):
            if k and odd[k - 1] != i - 1:
                self._run = 0
            self._run += int(skipped[i])
            self._longest = max(self._longest, self._run)
            self._run = self._run + 1 if late[i] else 0
            self._longest = max(self._longest, self._run)
        if len(odd) and odd[-1] != len(rows) - 1:
            self._run = 0

    def _take_control(self, rows: Records) -> None:
        if self._first < 0:
            self._first = int(rows["t_ns"][0])
        self._last = int(rows["t_ns"][-1])
        self._ticks += len(rows)
        self._age = int(rows["chunk_age_ns"][-1])
        self.late_sum_ns += int(rows["late_ns"].sum())
        self.compute_sum_ns += int(rows["compute_ns"].sum())
        self.late_counts += _histogram(rows["late_ns"], _BOUNDS_NS)
        self.compute_counts += _histogram(rows["compute_ns"], _BOUNDS_NS)
        self._kept["late"].append(rows["late_ns"])
        self._kept["compute"].append(rows["compute_ns"])
        self._kept["age"].append(rows["chunk_age_ns"][rows["mode"] == Mode.FOLLOW])
        self._kept["errors"].append((rows["q_ref"] - rows["q"])[rows["mode"] < Mode.STOP_1])
        self._modes += np.bincount(rows["mode"], minlength=len(Mode))
        self._limits |= int(np.bitwise_or.reduce(rows["limits"]))
        for i in np.flatnonzero(np.diff(rows["mode"], prepend=self._mode)):
            detail = {"from": Mode(self._mode).name.lower(), "limits": int(rows["limits"][i])}
            self._mode = int(rows["mode"][i])
            self._events.add(int(rows["t_ns"][i]), "mode", Mode(self._mode).name.lower(), detail)

    def result(self, told: dict[str, dict[str, Any]], restarts: int) -> WallResult:
        """Figures of everything taken so far; ``told`` is what the processes said when they were ready."""
        kept = {
            k: np.concatenate([np.zeros(0, np.int64), *v]) for k, v in self._kept.items() if k != "errors"
        }
        tracking = tracking_error(
            np.concatenate([np.zeros((0, self._joints), np.float32), *self._kept["errors"]])
        )
        return WallResult(
            seconds=(self._last - self._first) * 1e-9,
            ticks=self._ticks,
            late=Quantiles.of(kept["late"]),
            compute=Quantiles.of(kept["compute"]),
            misses_ppm=self.misses_ppm,
            longest_miss_run=self._longest,
            tracking_rms_rad=tracking.rms,
            tracking_p99_rad=tracking.p99,
            tracking_max_rad=tracking.max,
            chunk_age=Quantiles.of(kept["age"]),
            infer=Quantiles.of(kept["infer"]),
            chunks=self._chunks,
            rejected=self._rejected,
            modes={m.name.lower(): int(self._modes[m]) for m in Mode if self._modes[m]},
            limits=self._limits,
            restarts=restarts,
            rows_missed=self._control.missed,
            digest=told.get("system2", {}).get("digest", ""),
            limits_sha256=told["system1"]["limits_sha256"],
            privileges=told["system1"]["privileges"],
            self_test=told["system1"].get("self_test", {}),
            load=os.getloadavg(),
        )
