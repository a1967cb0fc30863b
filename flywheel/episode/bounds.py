"""How large an episode may be before it is taken for an attack, and what a Parquet file would inflate to.

A file from outside says of itself how much memory it takes. What it says is bounded by what the manifest
admits (rows that fit its window and rates), and what it does not say is refused: encodings by which a few
bytes become many.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flywheel import schema
from flywheel.schema import FileEntry, Manifest

FILE_BYTES_MAX = 4 << 30
WINDOW_NS_MAX = 3600 * 1_000_000_000
EVENTS_MAX = 100_000
TEXT_BYTES_MAX = 64 << 20  # all texts of a file together
FEW_BYTES = 1 << 16  # of one column of one row group: ROW_GROUPS_MAX of them are TEXT_BYTES_MAX
ROW_GROUPS_MAX = 1024
_SLACK_ROWS = 1000
_THRIFT = {
    "thrift_string_size_limit": 16 << 20,
    "thrift_container_size_limit": 100_000,
    "schema_depth_limit": 8,
}
# Encodings in which a value takes about as many bytes as it has. Not among them for pictures: a dictionary
# (one picture, a thousand times) and shared prefixes.
_PLAIN = {"PLAIN", "RLE", "BIT_PACKED"}
_FLAT = _PLAIN | {"BYTE_STREAM_SPLIT", "RLE_DICTIONARY", "PLAIN_DICTIONARY", "DELTA_BINARY_PACKED"}
_TEXT = _PLAIN | {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}


def no_plain_file(path: Path, found: os.stat_result | None = None) -> str | None:
    """Why a path is no file of its own: a link, a pipe, a device; None if it is one.

    ``found``: its ``lstat``, where it was taken already. Raises ``OSError`` where there is nothing.
    """
    mode = (found or path.lstat()).st_mode
    if stat.S_ISREG(mode):
        return None
    kinds = {"a link": stat.S_ISLNK, "a directory": stat.S_ISDIR, "a pipe": stat.S_ISFIFO}
    return f"is {next((k for k, test in kinds.items() if test(mode)), 'a device')}, not a file of the episode"


def open_parquet(f: BinaryIO, texts: Sequence[str] = ()) -> pq.ParquetFile:
    """A Parquet file of unknown origin; ``texts``: its columns of text, for ``read_bounded``.

    Raises ``KeyError`` where it has no such column.
    """
    return pq.ParquetFile(f, page_checksum_verification=True, read_dictionary=list(texts) or None, **_THRIFT)


def too_large(entry: FileEntry, manifest: Manifest) -> str | None:
    """Why a manifest's line about a file cannot be true of a recording; None if it can."""
    if entry.bytes > FILE_BYTES_MAX:
        return f"{entry.bytes} bytes, at most {FILE_BYTES_MAX}"
    low, high = manifest.window_ns
    if high - low > WINDOW_NS_MAX:
        return f"window of {(high - low) / 1e9:.0f} s, at most {WINDOW_NS_MAX // 10**9}"
    rate = {schema.CONTROL_FILE: manifest.control_hz, schema.FRAMES_FILE: manifest.policy_hz}.get(entry.name)
    most = EVENTS_MAX if rate is None else 2 * rate * (high - low) / 1e9 + _SLACK_ROWS
    return f"{entry.rows} rows, at most {most:.0f} fit its window" if entry.rows > most else None


def inflates(file: pq.ParquetFile, layout: pa.Schema, entry: FileEntry) -> str | None:
    """Why a file could take far more memory than its bytes and rows let expect; None if it cannot.

    Of texts only ``read_bounded`` can tell.
    """
    meta = file.metadata
    if meta.num_row_groups > ROW_GROUPS_MAX:
        return f"{meta.num_row_groups} row groups, at most {ROW_GROUPS_MAX}"
    for g in range(meta.num_row_groups):
        group = meta.row_group(g)
        for i, field in enumerate(layout):
            name, kind = field.name, field.type
            picture = pa.types.is_binary(kind)
            values = entry.rows * (int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 1)
            allowed = _PLAIN if picture else _TEXT if pa.types.is_string(kind) else _FLAT
            column = group.column(i)
            if not allowed.issuperset(column.encodings):
                return f"column {name} is encoded as {min(set(column.encodings) - allowed)}"
            if column.num_values > max(values, entry.rows):
                return f"column {name} has {column.num_values} values in {entry.rows} rows"
            # What is not compressed cannot inflate; what is, is numbers or text.
            most = entry.bytes if picture else 64 * max(values, entry.rows) + (16 << 20)
            if column.total_uncompressed_size > most:
                return f"column {name} says that it inflates to {column.total_uncompressed_size} bytes"
            if picture and column.compression != "UNCOMPRESSED":
                return f"column {name}: pictures are not compressed again"
    return None


def read_bounded(file: pq.ParquetFile, layout: pa.Schema, texts: Sequence[str]) -> pa.Table | str:
    """The table, or why its texts are too much. The file was opened with these ``texts``: they are read as
    dictionaries, so that a long one that repeats is held once while we look at it."""
    total, parts = 0, []
    at = [layout.get_field_index(n) for n in texts]
    for g in range(file.num_row_groups):
        table = file.read_row_group(g, use_threads=False)
        total += sum(_text_bytes(column) for i in at for column in table.column(i).chunks)
        if total > TEXT_BYTES_MAX:
            return f"texts of more than {TEXT_BYTES_MAX} bytes"
        for i in at:
            column = table.column(i)
            if pa.types.is_dictionary(column.type):
                plain = pa.chunked_array([c.dictionary_decode() for c in column.chunks], pa.string())
                table = table.set_column(i, layout.field(i), plain)
        parts.append(table)
    return pa.concat_tables(parts) if parts else layout.empty_table()


def _text_bytes(column: pa.Array) -> int:
    """What a column of text takes, or would take once each row has its own: exact where that is much."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    most = len(column) * int(column.dictionary.nbytes)
    if most <= FEW_BYTES:
        return most
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return pc.sum(lengths.take(column.indices)).as_py() or 0
