"""What processes share: a slot that holds the newest value, and a ring that holds the last rows.

Both have one writer and any number of readers, take no lock and make no system call, so a reader or a writer
that is killed at any instruction cannot stop the other side. They lie in any writable buffer: shared memory
between processes (``Arena``) or private memory in lockstep, with the same code.

``Seqlock``: a sequence word, odd while a write is under way, then the payload (Lameter 2005; Boehm, "Can
seqlocks get along with programming language memory models?", MSPC 2012, for the fences).
``Ring``: a count of rows ever written, then the rows. A reader copies first and then drops what the writer
may have overwritten meanwhile, and counts it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from flywheel.edge.compiled import compiled, intrinsic

Words = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]
Buffer = memoryview | mmap.mmap | bytearray

HEADER_WORDS = 8  # a cache line, so that the payload is aligned
READ_RETRIES = 8  # a reader never spins: it may have displaced the writer from its core


def aligned(dtype: Any) -> np.dtype[np.void]:
    """A structured dtype with C alignment, padded to whole 8-byte words."""
    d = np.dtype(dtype, align=True)
    if d.names is None or d.fields is None:
        raise ValueError(f"{d}: a slot or ring holds structured records; give named fields")
    return np.dtype(
        {
            "names": list(d.names),
            "formats": [d.fields[n][0] for n in d.names],
            "offsets": [int(d.fields[n][1]) for n in d.names],
            "itemsize": -(-d.itemsize // 8) * 8,
        }
    )


# ── compiled: these run in the loop ───────────────────────────────────────────────────────────────────


@intrinsic
def _load(typingctx: Any, array: Any, index: Any) -> Any:
    """Atomic 64-bit load, then an acquire fence: what is read next cannot have been read before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ptr = _element(context, builder, signature, args)
        value = builder.load_atomic(ptr, "monotonic", 8)
        builder.fence("acquire")
        return value

    return types.int64(array, types.intp), codegen


@intrinsic
def _store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Release fence, atomic 64-bit store, release fence: orders it after earlier and before later writes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ptr = _element(context, builder, signature, args)
        builder.fence("release")
        builder.store_atomic(args[2], ptr, "monotonic", 8)
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def _acquire(typingctx: Any) -> Any:
    """Acquire fence: reads before it are done before reads after it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), codegen


def _element(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]], inbounds=True)


@compiled
def load(words: Words, index: int) -> int:
    """A word that another process writes."""
    return int(_load(words, index))


@compiled
def load_after(words: Words, index: int) -> int:
    """``load`` that cannot happen before the reads that come before it in the program."""
    _acquire()
    return int(_load(words, index))


@compiled
def store(words: Words, index: int, value: int) -> None:
    """A word that another process reads."""
    _store(words, index, value)


@compiled
def slot_write(slot: Words, payload: Words) -> None:
    """Publish ``payload`` in ``slot`` (header and payload words)."""
    # A writer killed half-way left an odd number: stay odd, but another one, so that every reader sees it.
    begin = (_load(slot, 0) + 1) | 1
    _store(slot, 0, begin)
    for i in range(payload.size):
        slot[HEADER_WORDS + i] = payload[i]
    _store(slot, 0, begin + 1)


@compiled
def slot_read(slot: Words, out: Words, seen: int) -> int:
    """Copy the newest payload into ``out`` and return its sequence.

    Returns ``seen`` and touches nothing if no newer one is there; returns -1 if every try met a write under
    way (then ``out`` holds garbage: pass a scratch buffer).
    """
    for _ in range(READ_RETRIES):
        before = _load(slot, 0)
        if before in (seen, 0):
            return seen
        if before & 1:
            continue
        for i in range(out.size):
            out[i] = slot[HEADER_WORDS + i]
        _acquire()
        if _load(slot, 0) == before:
            return int(before)
    return -1


@compiled
def ring_claim(header: Words, capacity: int) -> int:
    """Index of the row to fill next; ``ring_publish`` makes it visible. Writer only."""
    return int(header[0] % capacity)


@compiled
def ring_publish(header: Words) -> None:
    """Make the claimed row visible."""
    _store(header, 0, header[0] + 1)


@compiled
def ring_push(header: Words, rows: Words, row: Words) -> None:
    """Append one row; the oldest one is overwritten when the ring is full."""
    i = ring_claim(header, rows.shape[0])
    for k in range(rows.shape[1]):
        rows[i, k] = row[k]
    ring_publish(header)


@compiled
def ring_copy(header: Words, rows: Words, first: int, out: Words) -> int:
    """Copy rows ``first …`` into ``out``; returns how many rows were written when the copy had ended.

    A row is sound if fewer than ``capacity`` rows lie between it and that count.
    """
    capacity = rows.shape[0]
    for j in range(out.shape[0]):
        i = (first + j) % capacity
        for k in range(rows.shape[1]):
            out[j, k] = rows[i, k]
    _acquire()
    return int(_load(header, 0))


# ── Python: the same, for what runs beside the loop ───────────────────────────────────────────────────


class Seqlock:
    """The newest record of one writer.

    ``words`` (int64, header and payload) is what compiled code works on. ``buffer`` must stay alive and
    hold ``Seqlock.nbytes(dtype)`` bytes, zeros at first; without one, private memory is used.
    """

    def __init__(self, dtype: np.dtype[np.void], buffer: Buffer | None = None) -> None:
        self.dtype = aligned(dtype)
        self.words: Words = _words(buffer, self.nbytes(dtype))
        self._scratch: Words = np.zeros(self.dtype.itemsize // 8, np.int64)

    @staticmethod
    def nbytes(dtype: np.dtype[np.void]) -> int:
        """Bytes of buffer that a slot of ``dtype`` needs."""
        return HEADER_WORDS * 8 + aligned(dtype).itemsize

    def record(self) -> Records:
        """A zeroed record ``[1]`` to fill and write."""
        return np.zeros(1, self.dtype)

    def write(self, record: Records) -> None:
        """Publish a record made by ``record()``."""
        slot_write(self.words, _as_words(record, self.dtype, 1))

    def read(self, out: Records, seen: int = 0) -> int:
        """Copy the newest record into ``out`` (by ``record()``) and return its sequence.

        Returns ``seen`` (0: nothing was ever written) and leaves ``out`` alone when there is no newer one, or
        when a write was under way at every try; the next call will find it.
        """
        sequence = slot_read(self.words, self._scratch, seen)
        if sequence in (seen, -1):
            return seen
        _as_words(out, self.dtype, 1)[:] = self._scratch
        return sequence


class Batch(NamedTuple):
    """What a reader got: ``rows``, the sequence number of the first, and how many were lost before it."""

    rows: Records
    first: int
    missed: int


class Ring:
    """The last ``capacity`` records of one writer, numbered from 0.

    ``buffer`` must stay alive and hold ``Ring.nbytes(dtype, capacity)`` bytes, zeros at first; without one,
    private memory is used.
    """

    def __init__(self, dtype: np.dtype[np.void], capacity: int, buffer: Buffer | None = None) -> None:
        if capacity < 2:
            raise ValueError(f"capacity={capacity}: a ring needs at least 2 rows")
        self.dtype = aligned(dtype)
        self.capacity = capacity
        words = _words(buffer, self.nbytes(dtype, capacity))
        self.header: Words = words[:HEADER_WORDS]
        self.rows: Words = words[HEADER_WORDS:].reshape(capacity, -1)

    @staticmethod
    def nbytes(dtype: np.dtype[np.void], capacity: int) -> int:
        """Bytes of buffer that a ring needs."""
        return HEADER_WORDS * 8 + capacity * aligned(dtype).itemsize

    @property
    def written(self) -> int:
        """Rows ever written."""
        return load(self.header, 0)

    def record(self) -> Records:
        """A zeroed record ``[1]`` to fill and push."""
        return np.zeros(1, self.dtype)

    def push(self, record: Records) -> None:
        """Append a record made by ``record()``. One writer only."""
        ring_push(self.header, self.rows, _as_words(record, self.dtype, 1))

    def reader(self, from_start: bool = True) -> Reader:
        """A reader of its own position: of what is still there, or only of rows to come."""
        return Reader(self, 0 if from_start else self.written)


class Reader:
    """One reader's place in a ring. ``missed`` counts the rows that were overwritten before it came."""

    def __init__(self, ring: Ring, next_row: int) -> None:
        self.ring = ring
        self.next_row = next_row
        self.missed = 0

    def poll(self, limit: int | None = None) -> Batch:
        """The rows since the last call, at most ``limit``, oldest first, as a copy."""
        ring = self.ring
        written = ring.written
        # The row before `written - capacity + 1` may be under overwrite right now.
        start = max(self.next_row, written - ring.capacity + 1)
        n = written - start
        if limit is not None:
            n = min(n, limit)
        out = np.empty((max(n, 0), ring.rows.shape[1]), np.int64)
        after = ring_copy(ring.header, ring.rows, start, out)
        torn = min(max(after - ring.capacity + 1 - start, 0), len(out))
        first = start + torn
        missed = first - self.next_row
        self.missed += missed
        self.next_row = start + len(out)
        return Batch(out[torn:].reshape(-1).view(ring.dtype), first, missed)


class Arena:
    """Anonymous shared memory, handed to child processes as an inherited file descriptor.

    It has no name, so nothing can be left behind: the kernel frees it when the last process that maps it
    ends, however it ends (``memfd_create``, Linux).
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
        self._map = mmap.mmap(fd, nbytes)
        self._used = 0

    @classmethod
    def create(cls, name: str, nbytes: int) -> Arena:
        """Fresh zeroed memory; ``name`` only shows in /proc. Nobody can change its size any more: memory
        that shrank under System 1 would be its death by SIGBUS."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(fd, nbytes)

    def carve(self, nbytes: int) -> memoryview:
        """The next ``nbytes``, aligned to a cache line; carve in the same order in every process."""
        start = self._used
        self._used = -(-(start + nbytes) // 64) * 64
        if self._used > self.nbytes:
            raise ValueError(f"arena of {self.nbytes} bytes is too small: {self._used} needed so far")
        return memoryview(self._map)[start : start + nbytes]

    def close(self) -> None:
        """Close the descriptor; the mapping goes when the last view of it does."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _words(buffer: Buffer | None, nbytes: int) -> Words:
    if buffer is None:
        return np.zeros(nbytes // 8, np.int64)
    if len(buffer) < nbytes:
        raise ValueError(f"buffer of {len(buffer)} bytes: {nbytes} needed")
    words = np.frombuffer(buffer, np.int64, nbytes // 8)
    if not words.flags.writeable or words.ctypes.data % 8:
        raise ValueError("buffer must be writable and aligned to 8 bytes")
    return words


def _as_words(record: Records, dtype: np.dtype[np.void], n: int) -> Words:
    if record.dtype != dtype or record.shape != (n,):
        raise ValueError(f"record of {record.dtype}{record.shape}: need {dtype}[{n}], as made by record()")
    return record.view(np.int64)
