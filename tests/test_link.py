"""What processes share: no torn record is ever read, and every row is read or counted as lost."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.edge.link import HEADER_WORDS, Arena, Ring, Seqlock, aligned

DTYPE = aligned([("number", np.int64), ("copies", np.int64, (200,)), ("tail", np.int8)])
WRITER = """
import sys
import numba
import numpy as np
from flywheel.edge.link import Arena, Ring, Seqlock, ring_push, slot_write
from tests.test_link import CAPACITY, DTYPE

@numba.njit
def write(slot, header, rows, payload, first, count):
    for n in range(first, first + count):
        payload[:-1] = n
        payload[-1] = n % 100
        slot_write(slot, payload)
        payload[:-1] = header[0]
        ring_push(header, rows, payload)

arena = Arena(int(sys.argv[1]), int(sys.argv[2]))
slot = Seqlock(DTYPE, arena.carve(Seqlock.nbytes(DTYPE)))
ring = Ring(DTYPE, CAPACITY, arena.carve(Ring.nbytes(DTYPE, CAPACITY)))
payload = np.zeros(DTYPE.itemsize // 8, np.int64)
n = int(slot.words[0]) + 1
write(slot.words, ring.header, ring.rows, payload, n, 1)
print("ready", flush=True)
while True:
    n += 50
    write(slot.words, ring.header, ring.rows, payload, n - 49, 50)
"""
CAPACITY = 32
SIZE = Seqlock.nbytes(DTYPE) + Ring.nbytes(DTYPE, CAPACITY) + 128


class Writer:
    """Another process that writes a slot and a ring as fast as it can."""

    def __init__(self, arena: Arena) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(arena.fd), str(arena.nbytes)],
            pass_fds=(arena.fd,),
            stdout=subprocess.PIPE,
            env=env,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def shared() -> tuple[Arena, Seqlock, Ring]:
    arena = Arena.create("flywheel-test", SIZE)
    slot = Seqlock(DTYPE, arena.carve(Seqlock.nbytes(DTYPE)))
    return arena, slot, Ring(DTYPE, CAPACITY, arena.carve(Ring.nbytes(DTYPE, CAPACITY)))


def test_no_torn_record_is_read_while_another_process_writes(shared: tuple[Arena, Seqlock, Ring]) -> None:
    arena, slot, ring = shared
    writer = Writer(arena)
    try:
        reader = ring.reader()
        out = slot.record()
        seen = slot.read(out)  # compiled now
        reads = rows = last = 0
        end = time.monotonic() + 30.0
        while min(reads, rows) < 1000:
            assert time.monotonic() < end
            after = slot.read(out, seen)
            if after != seen:
                reads += 1
                assert after > seen
                number = int(out["number"][0])
                assert number > last
                assert (out["copies"] == number).all()
                assert out["tail"][0] == number % 100
                seen, last = after, number
            batch = reader.poll()
            numbers = batch.rows["number"]
            rows += len(numbers)
            assert (numbers == batch.first + np.arange(len(numbers))).all()
            assert (batch.rows["copies"] == numbers[:, None]).all()
        assert rows + reader.missed == reader.next_row
    finally:
        writer.kill()
    # after kill -9 at a random instruction the reader still gets an answer, and a new writer goes on
    slot.read(out, seen)
    again = Writer(arena)
    try:
        end = time.monotonic() + 10.0
        now = slot.read(out, seen)
        while now == seen:
            assert time.monotonic() < end
            now = slot.read(out, seen)
    finally:
        again.kill()
    arena.close()


def test_a_writer_killed_in_mid_write_shows_the_old_value_until_the_next_one_writes() -> None:
    slot = Seqlock(DTYPE)
    record, out = slot.record(), slot.record()
    record["number"] = 7
    slot.write(record)
    seen = slot.read(out)
    slot.words[0] += 1
    slot.words[HEADER_WORDS] = 666
    assert slot.read(out) == 0
    assert out["number"][0] == 7
    assert slot.read(out, seen) == seen
    record["number"] = 8
    slot.write(record)
    assert slot.read(out, seen) > seen
    assert out["number"][0] == 8


def test_nothing_is_read_from_a_slot_that_was_never_written() -> None:
    slot = Seqlock(DTYPE)
    assert slot.read(slot.record()) == 0


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=60), st.integers(2, 9))
@settings(deadline=None)
def test_every_row_is_read_once_or_counted_as_missed(plan: list[int], capacity: int) -> None:
    """Positive numbers write that many rows, the others poll with that limit (0: without)."""
    dtype = aligned([("n", np.int64)])
    ring = Ring(dtype, capacity)
    record = ring.record()
    reader, other = ring.reader(), ring.reader()
    written = 0
    got: list[int] = []
    for p in [*plan, 0, -3, 0]:
        for _ in range(max(p, 0)):
            record["n"] = written
            ring.push(record)
            written += 1
        if p <= 0:
            batch = reader.poll(-p or None)
            assert list(batch.rows["n"]) == list(range(batch.first, batch.first + len(batch.rows)))
            got += batch.rows["n"].tolist()
    assert len(got) == len(set(got))
    assert len(got) + reader.missed == written == ring.written
    rest = other.poll()
    assert len(rest.rows) == min(written, capacity - 1)
    assert other.missed == written - len(rest.rows)
    assert len(ring.reader(from_start=False).poll().rows) == 0


def test_a_poll_does_not_hand_out_memory_that_the_writer_overwrites() -> None:
    ring = Ring(aligned([("n", np.int64)]), 4)
    record = ring.record()
    record["n"] = 1
    ring.push(record)
    rows = ring.reader().poll().rows
    for _ in range(9):
        record["n"] = 2
        ring.push(record)
    assert rows["n"].tolist() == [1]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        Seqlock(DTYPE).write(np.zeros(1, aligned([("x", np.int64)])))
    with pytest.raises(ValueError, match="need"):
        Ring(DTYPE, 4).push(np.zeros(2, DTYPE))
    with pytest.raises(ValueError, match=r"bytes: .* needed"):
        Seqlock(DTYPE, bytearray(8))
    with pytest.raises(ValueError, match="writable"):
        Seqlock(DTYPE, memoryview(bytes(Seqlock.nbytes(DTYPE))))
    with pytest.raises(ValueError, match="at least 2"):
        Ring(DTYPE, 1)
    with pytest.raises(ValueError, match="named fields"):
        aligned(np.int64)


def test_an_arena_has_no_name_and_too_small_a_one_is_refused() -> None:
    before = set(os.listdir("/dev/shm"))
    arena = Arena.create("flywheel-test", mmap.PAGESIZE)
    assert set(os.listdir("/dev/shm")) == before
    a, b = arena.carve(10), arena.carve(10)
    a[0] = 1
    assert b[0] == 0
    with pytest.raises(ValueError, match="too small"):
        arena.carve(mmap.PAGESIZE)
    arena.close()
    arena.close()
