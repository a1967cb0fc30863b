"""The records that System 1 and System 2 put into rings, and the chunk that passes between them.

Field names are those of ``flywheel.schema``; the types are wider where that keeps a record in whole words.
Texts have a fixed capacity here and become variable in Parquet; pictures lie beside the records
(``FrameRing``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.images import FrameRing
from flywheel.edge.link import Records, Ring, aligned
from flywheel.schema import Bundle

CHUNK_STEPS = 64  # longest action chunk that a slot holds
INSTRUCTION_BYTES = 256
DETAIL_BYTES = 1024

# Words 0 … of a chunk record, before q [CHUNK_STEPS, joints] and tool [CHUNK_STEPS] (float64).
CHUNK_ID, CHUNK_T0, CHUNK_STEP, CHUNK_COUNT, CHUNK_VALID_NS, CHUNK_HEADER = 0, 1, 2, 3, 4, 5


def chunk_dtype(joints: int) -> np.dtype[np.void]:
    """A joint-space action chunk: step k is to be reached at ``t0_ns + (k + 1) * step_ns``.

    ``t0_ns`` is when the observation was captured; the chunk goes stale ``valid_ns`` after it.
    """
    return aligned(
        [
            ("chunk_id", np.int64),
            ("t0_ns", np.int64),
            ("step_ns", np.int64),
            ("steps", np.int64),
            ("valid_ns", np.int64),
            ("q", np.float64, (CHUNK_STEPS, joints)),
            ("tool", np.float64, (CHUNK_STEPS,)),
        ]
    )


def frame_dtype(
    cameras: Mapping[str, tuple[int, int]], state: int, chunk: int, action: int
) -> np.dtype[np.void]:
    """``frames.parquet`` as System 2 writes it; ``cameras`` maps names to (height, width).

    The JPEG of a camera is ``size.<camera>`` bytes from ``at.<camera>`` of the ring (``FrameRing``).
    """
    return aligned(
        [
            ("t_ns", np.int64),
            ("infer_ns", np.int64),
            ("state", np.float32, (state,)),
            ("action", np.float32, (action,)),
            ("chunk", np.float32, (chunk * action,)),
            ("intervention", np.bool_),
            ("instruction", f"S{INSTRUCTION_BYTES}"),
            ("policy_digest", "S64"),
            *((f"{word}.{c}", np.int64) for c in cameras for word in ("at", "size")),
        ]
    )


def image_bytes(cameras: Mapping[str, tuple[int, int]], frames: int) -> int:
    """Memory for the pictures of so many frames.

    One byte a pixel and 2 kB a picture (measured, quality 90 without chroma subsampling: 0.1 to 0.5 bytes a
    pixel; noise at quality 100 takes 4.3). Pictures that take more make the ring shorter, nothing else.
    """
    typical = sum(h * w + 2048 for h, w in cameras.values())
    worst = sum(5 * h * w + 2048 for h, w in cameras.values())
    return max(frames * typical, 4 * worst)


def event_dtype() -> np.dtype[np.void]:
    """``events.parquet``: texts are UTF-8, ``detail`` a JSON object."""
    return aligned([("t_ns", np.int64), ("kind", "S16"), ("name", "S64"), ("detail", f"S{DETAIL_BYTES}")])


def fill_event(
    row: Records, t_ns: int, kind: str, name: str, detail: Mapping[str, Any] | None = None
) -> None:
    """Fill an event record ``[1]``; a detail that does not fit is replaced by ``{"truncated": true}``."""
    text = json.dumps(detail or {}, sort_keys=True, ensure_ascii=False).encode()
    row["t_ns"] = t_ns
    row["kind"] = clip_text(kind, 16)
    row["name"] = clip_text(name, 64)
    row["detail"] = text if len(text) <= DETAIL_BYTES else b'{"truncated": true}'


def clip_text(text: str, nbytes: int) -> bytes:
    """UTF-8 of at most ``nbytes``, cut between characters."""
    return text.encode()[:nbytes].decode(errors="ignore").encode()


class EventLog:
    """Writes events into a ring. One process, one log: a ring has a single writer."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._row = ring.record()

    def add(self, t_ns: int, kind: str, name: str, detail: Mapping[str, Any] | None = None) -> None:
        """Append an event; kinds are those of ``schema.EVENTS_SCHEMA``."""
        fill_event(self._row, t_ns, kind, name, detail)
        self.ring.push(self._row)


@dataclass(frozen=True)
class Rings:
    """The three rings that a recorder polls."""

    control: ControlRing
    frames: FrameRing
    events: Ring

    @classmethod
    def private(
        cls,
        joints: int,
        cameras: Mapping[str, tuple[int, int]],
        bundle: Bundle,
        control_rows: int = 4096,
        frame_rows: int = 64,
        event_rows: int = 256,
    ) -> Rings:
        """In private memory, for lockstep."""
        frame = frame_dtype(cameras, len(bundle.state_names), bundle.chunk, len(bundle.action_names))
        return cls(
            ControlRing(control_dtype(joints), control_rows),
            FrameRing(frame, frame_rows, image_bytes(cameras, frame_rows)),
            Ring(event_dtype(), event_rows),
        )
