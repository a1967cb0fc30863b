"""What the recorder remembers: the last seconds of the rings, ready to become Parquet.

Rows of the control ring stay as they are (152 bytes for five joints); of a frame only the JPEGs' real bytes
are kept, not the ring's fixed slots. ``forget`` bounds it: the pre-window, plus what is being recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flywheel import schema
from flywheel.edge.link import Records, Ring
from flywheel.edge.rows import Rings
from flywheel.errors import EpisodeError

Event = dict[str, Any]  # t_ns, kind, name, detail (JSON text)


class Shape:
    """What the rings say about the robot: numbers of joints, state, chunk and action; cameras; schemas."""

    def __init__(self, rings: Rings) -> None:
        frame = rings.frames.dtype
        self.joints = _length(rings.control.dtype, "q")
        self.cameras = tuple(n.removeprefix("image.") for n in frame.names or () if n.startswith("image."))
        self.state_dim = _length(frame, "state")
        self.action_dim = _length(frame, "action")
        self.chunk = _length(frame, "chunk") // self.action_dim
        self.control_schema = schema.control_schema(self.joints)
        self.frames_schema = schema.frames_schema(self.cameras, self.state_dim, self.chunk, self.action_dim)
        self.frame_head = _head(frame, [f"image.{c}" for c in self.cameras])


class _Frame(NamedTuple):
    """A frame without the ring's padding: everything before the images as it was, and the images."""

    t_ns: int
    head: bytes
    jpegs: tuple[bytes, ...]


class History:
    """The newest rows of three kinds, oldest first, and where rows were lost between them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.first_ns: int | None = None  # of the first control row ever seen: nothing is known before it
        self.last_ns: int | None = None
        self._control: deque[Records] = deque()
        self._frames: deque[_Frame] = deque()
        # With twice its time, less one for what happened just before an attempt began at the same instant.
        self._events: deque[tuple[int, Event]] = deque()
        self._losses: deque[tuple[int, int]] = deque()  # time of the row that came after, rows lost

    def add_control(self, rows: Records, missed: int) -> None:
        """Remember control rows; ``missed`` rows were overwritten before they could be read."""
        t = rows["t_ns"]
        if self.last_ns is not None and (int(t[0]) <= self.last_ns or bool((np.diff(t) <= 0).any())):
            raise EpisodeError(
                f"control rows go back in time after t_ns={self.last_ns}: give a new clock a new recorder"
            )
        if self.first_ns is None:
            self.first_ns = int(t[0])  # what was overwritten before we came is no loss of ours
        elif missed:
            self._losses.append((int(t[0]), missed))
        self.last_ns = int(t[-1])
        self._control.append(rows)

    def add_frames(self, rows: Records, missed: int) -> None:
        """Remember frames; one without a picture of every camera is a loss."""
        if missed and self.first_ns is not None:
            self._losses.append((int(rows["t_ns"][0]), missed))
        head = rows.view(np.uint8).reshape(len(rows), -1)[:, : self.shape.frame_head.itemsize]
        for i in range(len(rows)):
            images = [(rows[f"image.{c}"][i], int(rows[f"size.{c}"][i])) for c in self.shape.cameras]
            t_ns = int(rows["t_ns"][i])
            if all(0 < size <= len(image) for image, size in images):
                jpegs = tuple(image[:size].tobytes() for image, size in images)
                self._frames.append(_Frame(t_ns, head[i].tobytes(), jpegs))
            else:
                self._losses.append((t_ns, 1))

    def add_event(self, event: Event) -> None:
        """Remember an event."""
        if event["kind"] == "task" and event["name"] == "start":
            self.close(event["t_ns"])
        self._events.append((2 * int(event["t_ns"]), event))

    def close(self, t_ns: int) -> None:
        """Events of this very instant belong to what ends now, not to what begins."""
        self._events = deque((2 * t_ns - 1 if e["t_ns"] == t_ns else at, e) for at, e in self._events)

    def lose(self, t_ns: int, rows: int) -> None:
        """Note that rows were lost just before ``t_ns``."""
        self._losses.append((t_ns, rows))

    def forget(self, before_ns: int) -> None:
        """Let go of everything older."""
        while self._control and int(self._control[0]["t_ns"][-1]) < before_ns:
            self._control.popleft()
        while self._frames and self._frames[0].t_ns < before_ns:
            self._frames.popleft()
        while self._events and self._events[0][1]["t_ns"] < before_ns:
            self._events.popleft()
        while self._losses and self._losses[0][0] < before_ns:
            self._losses.popleft()

    # Windows are half open, [start, end): what ends one begins the next.

    def control(self, start_ns: int, end_ns: int) -> pa.Table:
        """Control rows of a window as ``control.parquet``."""
        parts = [c for c in self._control if c["t_ns"][-1] >= start_ns and c["t_ns"][0] < end_ns]
        if not parts:
            return self.shape.control_schema.empty_table()
        # As plain words: numpy takes its time to find that hundreds of structured types are the same.
        rows = np.concatenate([c.view(np.int64) for c in parts]).view(parts[0].dtype)
        rows = rows[(rows["t_ns"] >= start_ns) & (rows["t_ns"] < end_ns)]
        columns = [_column(rows[f.name], f.type) for f in self.shape.control_schema]
        return pa.table(columns, schema=self.shape.control_schema)

    def frames(self, start_ns: int, end_ns: int) -> pa.Table:
        """Frames of a window as ``frames.parquet``."""
        kept = [f for f in self._frames if start_ns <= f.t_ns < end_ns]
        rows = np.frombuffer(b"".join(f.head for f in kept), self.shape.frame_head)
        images = {f"image.{c}": i for i, c in enumerate(self.shape.cameras)}
        columns = []
        for field in self.shape.frames_schema:
            if field.name in images:
                jpegs = [f.jpegs[images[field.name]] for f in kept]
                columns.append(pa.array(jpegs, field.type))
            elif pa.types.is_string(field.type):
                columns.append(pa.array([text(raw) for raw in rows[field.name]], field.type))
            else:
                columns.append(_column(rows[field.name], field.type))
        return pa.table(columns, schema=self.shape.frames_schema)

    def events(self, start_ns: int, end_ns: int) -> list[Event]:
        """Events of a window in order of time (those of several processes may have come in any order)."""
        found = [(at, e) for at, e in self._events if 2 * start_ns <= at < 2 * end_ns]
        return [e for _, e in sorted(found, key=lambda f: f[0])]

    def lost(self, start_ns: int, end_ns: int) -> int:
        """Rows that a window should have and does not."""
        return sum(n for t, n in self._losses if start_ns < t < end_ns)


class Source:
    """One ring, read on from where it was left; losses are carried over to the next rows that come."""

    def __init__(self, ring: Ring) -> None:
        self._reader = ring.reader()
        self._missed = 0

    def poll(self) -> tuple[Records, int]:
        """New rows and how many were lost before them."""
        batch = self._reader.poll()
        self._missed += batch.missed
        if not len(batch.rows):
            return batch.rows, 0
        missed, self._missed = self._missed, 0
        return batch.rows, missed


def text(raw: bytes) -> str:
    """A fixed-size text of a ring."""
    return raw.decode("utf-8", "replace")


def _length(dtype: np.dtype[np.void], name: str) -> int:
    return int(dtype[name].shape[0])


def _head(dtype: np.dtype[np.void], images: list[str]) -> np.dtype[np.void]:
    """The part of a record before its images, which have to come last."""
    fields: Mapping[str, Any] = dtype.fields or {}
    end = min((fields[n][1] for n in images), default=dtype.itemsize)
    names = [n for n in dtype.names or () if n not in images]
    if any(fields[n][1] >= end for n in names):
        raise ValueError(f"{dtype}: images must come last in a frame record")
    formats, offsets = [fields[n][0] for n in names], [fields[n][1] for n in names]
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": end})


def _column(values: npt.NDArray[Any], kind: Any) -> pa.Array:
    values = np.ascontiguousarray(values)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)
    return pa.array(values.astype(kind.to_pandas_dtype(), copy=False), kind)
