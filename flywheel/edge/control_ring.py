"""The ring of control rows, and beside it the last changes of mode.

A thousand rows a second fill any memory soon, so a reader that is away for longer than the ring lasts loses
rows. That the robot stopped meanwhile must not be lost with them: each row whose mode differs from the one
before is kept a second time, with its number, in a small ring of its own. Modes change as often as chunks
come, at most, so that ring outlives the other one by far.

One writer, no lock, nothing allocated: as every ring (``flywheel.edge.link``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flywheel.edge.compiled import compiled
from flywheel.edge.link import Buffer, Records, Ring, aligned, ring_claim, ring_publish

Words = npt.NDArray[np.int64]

CHANGES = 1024  # a minute of a mode that changes with every chunk at 17 Hz

# Words 0 … of a control record, before its float32 part.
ROW_T, ROW_LATE, ROW_COMPUTE, ROW_CHUNK, ROW_AGE, ROW_MODE, ROW_LIMITS, ROW_HELD, ROW_HEADER = range(9)


def control_dtype(joints: int) -> np.dtype[np.void]:
    """``control.parquet`` as System 1 writes it; chunk id and age are -1 before the first chunk."""
    words = ("t_ns", "late_ns", "compute_ns", "chunk_id", "chunk_age_ns", "mode", "limits", "held")
    vectors = ("q", "dq", "q_ref", "tau")
    return aligned(
        [
            *((n, np.int64) for n in words),
            *((n, np.float32, (joints,)) for n in vectors),
            ("tool_cmd", np.float32),
        ]
    )


def change_dtype(control: np.dtype[np.void]) -> np.dtype[np.void]:
    """A control row (``control_dtype``) with its number in front, counted from the first ever written."""
    assert control.names is not None
    assert control.fields is not None
    return aligned([("row", np.int64), *((n, control.fields[n][0]) for n in control.names)])


@compiled
def control_publish(header: Words, rows: Words, changes_header: Words, changes: Words) -> None:
    """Make the claimed row of ``rows`` visible; before that, keep it as a change if its mode is a new one."""
    n = header[0]
    i = ring_claim(header, rows.shape[0])
    if n == 0 or rows[(n - 1) % rows.shape[0], ROW_MODE] != rows[i, ROW_MODE]:
        j = ring_claim(changes_header, changes.shape[0])
        changes[j, 0] = n
        for k in range(rows.shape[1]):
            changes[j, 1 + k] = rows[i, k]
        ring_publish(changes_header)
    ring_publish(header)


@compiled
def control_push(header: Words, rows: Words, changes_header: Words, changes: Words, row: Words) -> None:
    """Append one row."""
    i = ring_claim(header, rows.shape[0])
    for k in range(rows.shape[1]):
        rows[i, k] = row[k]
    control_publish(header, rows, changes_header, changes)


class ControlRing(Ring):
    """The last ``capacity`` control rows (``control_dtype``) and, in ``changes``, the last ``CHANGES`` of
    them whose mode was a new one (``change_dtype``).

    ``buffer`` as for ``Ring``, of ``ControlRing.room(dtype, capacity)`` bytes.
    """

    def __init__(self, dtype: np.dtype[np.void], capacity: int, buffer: Buffer | None = None) -> None:
        total = self.room(dtype, capacity)
        if buffer is not None and len(buffer) < total:
            raise ValueError(f"buffer of {len(buffer)} bytes: {total} needed")
        memory = memoryview(np.zeros(total // 8, np.int64) if buffer is None else buffer).cast("B")
        rows = Ring.nbytes(dtype, capacity)
        super().__init__(dtype, capacity, memory[:rows])
        self.changes = Ring(change_dtype(dtype), CHANGES, memory[rows:total])

    @staticmethod
    def room(dtype: np.dtype[np.void], capacity: int) -> int:
        """Bytes of buffer that it needs."""
        return Ring.nbytes(dtype, capacity) + Ring.nbytes(change_dtype(dtype), CHANGES)

    @property
    def memory(self) -> tuple[Words, Words, Words, Words]:
        """What compiled code works on: header and rows of the rows, then of the changes."""
        return self.header, self.rows, self.changes.header, self.changes.rows

    def push(self, record: Records) -> None:
        """Append a record made by ``record()``. One writer only."""
        if record.dtype != self.dtype or record.shape != (1,):
            raise ValueError(f"record of {record.dtype}{record.shape}: need {self.dtype}[1], as by record()")
        control_push(self.header, self.rows, self.changes.header, self.changes.rows, record.view(np.int64))
