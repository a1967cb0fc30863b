"""The ring of frames: fixed records, and beside them a ring of bytes for the pictures' real lengths.

A slot that could hold the largest JPEG would be twenty times what one takes (640×480 px: 1.5 MB against
some 60 kB). So a record says where its pictures begin, counted in bytes ever written, and how long they are.
The writer announces what it is about to overwrite before it does; a reader copies first and then looks
whether the announcement has come past what it copied. No lock, one writer, any number of readers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from flywheel.edge.link import HEADER_WORDS, Buffer, Records, Ring, Words, load, load_after, store


class FrameRing(Ring):
    """The last frames of one writer; ``image_bytes`` bound their pictures.

    ``dtype`` has ``at.<camera>`` and ``size.<camera>`` for each camera (``rows.frame_dtype``). ``buffer`` as
    for ``Ring``, of ``FrameRing.room(dtype, capacity, image_bytes)`` bytes.
    """

    def __init__(
        self, dtype: np.dtype[np.void], capacity: int, image_bytes: int, buffer: Buffer | None = None
    ) -> None:
        total = self.room(dtype, capacity, image_bytes)
        if buffer is not None and len(buffer) < total:
            raise ValueError(f"buffer of {len(buffer)} bytes: {total} needed")
        memory = memoryview(np.zeros(total // 8, np.int64) if buffer is None else buffer).cast("B")
        records = Ring.nbytes(dtype, capacity)
        super().__init__(dtype, capacity, memory[:records])
        part = np.frombuffer(memory[records:total], np.int64)
        self._head: Words = part[:HEADER_WORDS]
        self._bytes: npt.NDArray[np.uint8] = part[HEADER_WORDS:].view(np.uint8)
        self.cameras = tuple(n.removeprefix("at.") for n in self.dtype.names or () if n.startswith("at."))

    @staticmethod
    def room(dtype: np.dtype[np.void], capacity: int, image_bytes: int) -> int:
        """Bytes of buffer that it needs."""
        return Ring.nbytes(dtype, capacity) + HEADER_WORDS * 8 + -(-max(image_bytes, 8) // 8) * 8

    def push_frame(self, record: Records, images: Mapping[str, bytes]) -> None:
        """Append a record made by ``record()`` with its pictures.

        One that is longer than half of the memory for pictures is left out: its size is then 0.
        """
        capacity = len(self._bytes)
        for camera, data in images.items():
            n = len(data)
            record[f"size.{camera}"] = n if n <= capacity // 2 else 0
            if n > capacity // 2:
                continue
            at = load(self._head, 0)
            if at % capacity + n > capacity:  # in one piece
                at += capacity - at % capacity
            store(self._head, 0, at + n)
            begin = at % capacity
            self._bytes[begin : begin + n] = np.frombuffer(data, np.uint8)
            record[f"at.{camera}"] = at
        self.push(record)

    def image(self, row: np.void, camera: str) -> bytes | None:
        """A picture of a record that a reader got; None if there is none or it was overwritten."""
        at, n, capacity = int(row[f"at.{camera}"]), int(row[f"size.{camera}"]), len(self._bytes)
        begin = at % capacity
        if not 0 < n <= capacity - begin:
            return None
        data = self._bytes[begin : begin + n].tobytes()
        return data if load_after(self._head, 0) - at <= capacity else None
