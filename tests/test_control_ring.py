"""A change of mode outlives the rows that told of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.edge.control_ring import CHANGES, ControlRing, change_dtype, control_dtype

JOINTS = 3


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), min_size=1, max_size=60), st.integers(2, 64)
)
def test_each_change_is_kept_with_its_row_however_short_the_ring(
    runs: list[tuple[int, int]], capacity: int
) -> None:
    ring = ControlRing(control_dtype(JOINTS), capacity)
    row = ring.record()
    expected, n, was = [], 0, None
    for mode, length in runs:
        for _ in range(length):
            row["t_ns"], row["mode"], row["limits"] = 10 * n, mode, n % 7
            row["q"], row["q_ref"], row["tool_cmd"] = n, -n, 0.5
            ring.push(row)
            if mode != was:
                expected.append((n, row[0].copy()))
            n, was = n + 1, mode
    changes = ring.changes.reader().poll().rows
    assert ring.written == n
    assert changes["row"].tolist() == [k for k, _ in expected]
    for change, (_, kept) in zip(changes, expected, strict=True):
        for name in kept.dtype.names:
            assert np.array_equal(change[name], kept[name]), name


def test_a_mode_that_changes_for_ever_stays_in_its_memory() -> None:
    ring = ControlRing(control_dtype(JOINTS), 8)
    row = ring.record()
    for n in range(3 * CHANGES):
        row["mode"] = n % 2
        ring.push(row)
    assert ring.changes.reader().poll().rows["row"].tolist() == list(range(2 * CHANGES + 1, 3 * CHANGES))


@pytest.mark.parametrize("joints", range(1, 9))
def test_a_change_is_its_row_word_for_word(joints: int) -> None:
    """The tick copies words: the fields must lie where numpy looks for them."""
    row, change = control_dtype(joints), change_dtype(control_dtype(joints))
    assert row.names is not None
    assert row.fields is not None
    assert change.fields is not None
    assert [change.fields[n][1] - 8 for n in row.names] == [row.fields[n][1] for n in row.names]
    assert change.itemsize == row.itemsize + 8


def test_a_buffer_that_is_too_small_is_refused() -> None:
    dtype = control_dtype(JOINTS)
    with pytest.raises(ValueError, match="needed"):
        ControlRing(dtype, 16, bytearray(ControlRing.room(dtype, 16) - 8))
    with pytest.raises(ValueError, match="as by record"):
        ControlRing(dtype, 16).push(np.zeros(2, dtype))
