"""What the recorder must not forget when it is killed: a small document in memory that outlives it.

Two halves take turns. A half is written whole, then made valid by its sequence number; its checksum covers
both, so a writer that dies at any instruction leaves the document before or the document after, never a
mixture. It lies beside the rings that it speaks of, in the same shared memory, and goes when they go: after
a power cut there is nothing left that it could describe. (Sealed episodes do not depend on it.)
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from flywheel.edge.link import Buffer, Words

JOURNAL_BYTES = 1 << 20
_SEQUENCE, _LENGTH, _CHECKSUM, _HEADER = 0, 1, 2, 4


class Journal:
    """The newest document of one writer. ``buffer`` holds zeros at first and must stay alive."""

    def __init__(self, buffer: Buffer | None = None) -> None:
        memory = bytearray(JOURNAL_BYTES) if buffer is None else buffer
        half = len(memory) // 16 * 8
        view = memoryview(memory)
        self._halves: list[Words] = [np.frombuffer(view[i * half : (i + 1) * half], np.int64) for i in (0, 1)]
        self._sequence = max(int(h[_SEQUENCE]) for h in self._halves)

    @classmethod
    def at(cls, path: Path, nbytes: int = JOURNAL_BYTES) -> Self:
        """In a file: for rings that lie in one too. It survives the process, not the power."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, nbytes)
            return cls(mmap.mmap(fd, nbytes))
        finally:
            os.close(fd)

    @property
    def capacity(self) -> int:
        """Bytes that a document may have."""
        return (len(self._halves[0]) - _HEADER) * 8

    def save(self, document: Mapping[str, Any]) -> bool:
        """Replace the document; False, and the old one stays, if it is too long."""
        data = json.dumps(document, separators=(",", ":")).encode()
        if len(data) > self.capacity:
            return False
        self._sequence += 1
        half = self._halves[self._sequence % 2]
        half[_SEQUENCE] = 0
        half.view(np.uint8)[_HEADER * 8 : _HEADER * 8 + len(data)] = np.frombuffer(data, np.uint8)
        half[_LENGTH] = len(data)
        half[_CHECKSUM] = zlib.crc32(data, self._sequence & 0xFFFFFFFF)
        half[_SEQUENCE] = self._sequence
        return True

    def load(self) -> dict[str, Any] | None:
        """The newest whole document; None if there never was one."""
        for half in sorted(self._halves, key=lambda h: -int(h[_SEQUENCE])):
            sequence, length = int(half[_SEQUENCE]), int(half[_LENGTH])
            if sequence <= 0 or not 0 < length <= self.capacity:
                continue
            data = half.view(np.uint8)[_HEADER * 8 : _HEADER * 8 + length].tobytes()
            if zlib.crc32(data, sequence & 0xFFFFFFFF) == int(half[_CHECKSUM]):
                document: dict[str, Any] = json.loads(data)
                return document
        return None
