"""What the recorder remembers: the last seconds of the rings, ready to become Parquet.

Rows of the control ring stay as they are (152 bytes for five joints); of a frame its record and its JPEGs.
``forget`` bounds it in time: the pre-window, plus what is being recorded. ``image_bytes`` bounds the pictures
besides: over it the oldest frames go first, and count as lost.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flywheel import schema
from flywheel.edge.control_ring import ControlRing
from flywheel.edge.images import FrameRing
from flywheel.edge.link import Records, Ring
from flywheel.edge.rows import Rings
from flywheel.errors import EpisodeError

Event = dict[str, Any]  # t_ns, kind, name, detail (JSON text)
SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # how a JPEG begins and ends (ITU-T T.81, B.1.1.3)


class Shape:
    """What the rings say about the robot: numbers of joints, state, chunk and action; cameras; schemas."""

    def __init__(self, rings: Rings) -> None:
        frame = rings.frames.dtype
        self.joints = _length(rings.control.dtype, "q")
        self.frame, self.cameras = frame, rings.frames.cameras
        self.state_dim = _length(frame, "state")
        self.action_dim = _length(frame, "action")
        self.chunk = _length(frame, "chunk") // self.action_dim
        self.control_schema = schema.control_schema(self.joints)
        self.frames_schema = schema.frames_schema(self.cameras, self.state_dim, self.chunk, self.action_dim)


class _Frame(NamedTuple):
    """A frame: its record as it was, and its pictures."""

    t_ns: int
    record: bytes
    jpegs: tuple[bytes, ...]


class _Loss(NamedTuple):
    """Rows that were there between two times and are not here; taken as evenly spread."""

    from_ns: int
    to_ns: int
    rows: int


class History:
    """The newest rows of three kinds, oldest first, and where rows were lost between them."""

    def __init__(self, shape: Shape, image_bytes: int | None = None) -> None:
        self.shape = shape
        self.first_ns: int | None = None  # of the first control row ever seen: nothing is known before it
        self.last_ns: int | None = None
        self.first_frame_ns: int | None = None
        self.overflow = 0  # frames let go because of ``image_bytes``
        self._last_frame_ns: int | None = None
        self._image_bytes, self._held_bytes = image_bytes, 0
        self._control: deque[Records] = deque()
        self._frames: deque[_Frame] = deque()
        # With twice its time, less one for what happened just before an attempt began at the same instant.
        self._events: deque[tuple[int, Event]] = deque()
        self._losses: deque[_Loss] = deque()

    def resume(self, first_ns: int | None, first_frame_ns: int | None) -> None:
        """Rows since these times were here once: what of them does not come again is lost."""
        self.first_ns, self.first_frame_ns = first_ns, first_frame_ns
        self.last_ns = None if first_ns is None else first_ns - 1
        self._last_frame_ns = None if first_frame_ns is None else first_frame_ns - 1

    @property
    def oldest_ns(self) -> int | None:
        """Time of the oldest control row that it holds."""
        return int(self._control[0]["t_ns"][0]) if self._control else None

    @property
    def nbytes(self) -> int:
        """Bytes of rows and pictures that it holds."""
        control = sum(c.nbytes for c in self._control)
        return control + self._held_bytes + len(self._frames) * self.shape.frame.itemsize

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
            self.lose(int(t[0]), missed, self.last_ns)
        self.last_ns = int(t[-1])
        self._control.append(rows)

    def add_frames(self, rows: Records, missed: int, ring: FrameRing) -> None:
        """Remember frames; one without a whole picture of every camera is a loss."""
        t = rows["t_ns"]
        if missed and self.first_ns is not None:
            self.lose(int(t[0]), missed, self._last_frame_ns)
        if self.first_frame_ns is None:
            self.first_frame_ns = int(t[0])
        self._last_frame_ns = int(t[-1])
        for row in rows:
            t_ns = int(row["t_ns"])
            images = [ring.image(row, c) for c in self.shape.cameras]
            jpegs = tuple(i for i in images if i is not None and i[:2] == SOI and i[-2:] == EOI)
            if len(jpegs) < len(images):
                self.lose(t_ns, 1)
                continue
            self._frames.append(_Frame(t_ns, row.tobytes(), jpegs))
            self._held_bytes += sum(map(len, jpegs))
        while self._image_bytes is not None and self._held_bytes > self._image_bytes and self._frames:
            self.overflow += 1
            self.lose(self._frames[0].t_ns, 1)
            self._drop_frame()

    def add_event(self, event: Event) -> None:
        """Remember an event."""
        if event["kind"] == "task" and event["name"] == "start":
            self.close(event["t_ns"])
        self._events.append((2 * int(event["t_ns"]), event))

    def close(self, t_ns: int) -> None:
        """Events of this very instant belong to what ends now, not to what begins."""
        self._events = deque((2 * t_ns - 1 if e["t_ns"] == t_ns else at, e) for at, e in self._events)

    def lose(self, t_ns: int, rows: int, since_ns: int | None = None) -> None:
        """Note that rows were lost between ``since_ns`` (just before, if not given) and ``t_ns``."""
        self._losses.append(_Loss(t_ns - 1 if since_ns is None else min(since_ns, t_ns - 1), t_ns, rows))

    def forget(self, before_ns: int) -> None:
        """Let go of everything older."""
        while self._control and int(self._control[0]["t_ns"][-1]) < before_ns:
            self._control.popleft()
        while self._frames and self._frames[0].t_ns < before_ns:
            self._drop_frame()
        while self._events and self._events[0][1]["t_ns"] < before_ns:
            self._events.popleft()
        self._losses = deque(x for x in self._losses if x.to_ns >= before_ns)

    def _drop_frame(self) -> None:
        self._held_bytes -= sum(map(len, self._frames.popleft().jpegs))

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
        rows = np.frombuffer(b"".join(f.record for f in kept), self.shape.frame)
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
        found = 0
        for loss in self._losses:
            shared = min(loss.to_ns, end_ns) - max(loss.from_ns, start_ns)
            if shared > 0:
                found += round(loss.rows * shared / (loss.to_ns - loss.from_ns))
        return found


class News(NamedTuple):
    """What a source gave: rows, how many were lost before them, and from which one on they are news.

    Rows before ``fresh`` were looked at by a recorder before this one, and are only remembered again.
    """

    rows: Records
    missed: int
    fresh: int


class Source:
    """One ring, read on from where it was left; losses are carried over to the next rows that come.

    ``seen`` rows of it have been looked at in an earlier life: they are read again as far as they are there,
    and what is not counts as lost.
    """

    def __init__(self, ring: Ring, seen: int = 0, began: int | None = None) -> None:
        self._reader = ring.reader()
        self._reader.next_row = max(began or 0, 0)
        self._missed = 0
        self.seen = seen
        self.began = began  # the first row that there ever was for us

    def poll(self) -> News:
        """New rows and how many were lost before them."""
        batch = self._reader.poll()
        self._missed += batch.missed
        if not len(batch.rows):
            return News(batch.rows, 0, 0)
        missed, self._missed = self._missed, 0
        if self.began is None:
            self.began = batch.first
        fresh = min(max(self.seen - batch.first, 0), len(batch.rows))
        self.seen = max(self.seen, batch.first + len(batch.rows))
        return News(batch.rows, missed, fresh)


class ControlSource(Source):
    """The control ring. ``unseen``: of the rows that were lost before the last ``poll`` and that nobody has
    looked at, those in which the mode changed (``control_ring.change_dtype``)."""

    def __init__(self, ring: ControlRing, seen: int = 0, began: int | None = None) -> None:
        super().__init__(ring, seen, began)
        self._changes = ring.changes.reader()
        self._later = self.unseen = self._changes.poll(0).rows

    def poll(self) -> News:
        """New rows and how many were lost before them."""
        seen, known = self.seen, self.began is not None
        news = super().poll()
        changes = np.concatenate([self._later, self._changes.poll().rows])
        # A change is told of before its row, so what comes next may already be among them.
        self._later = changes[changes["row"] >= self.seen]
        lost = (changes["row"] >= seen) & (changes["row"] < self.seen - len(news.rows))
        self.unseen = changes[lost & known]
        return news


def text(raw: bytes) -> str:
    """A fixed-size text of a ring."""
    return raw.decode("utf-8", "replace")


def _length(dtype: np.dtype[np.void], name: str) -> int:
    return int(dtype[name].shape[0])


def _column(values: npt.NDArray[Any], kind: Any) -> pa.Array:
    values = np.ascontiguousarray(values)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)
    return pa.array(values.astype(kind.to_pandas_dtype(), copy=False), kind)
