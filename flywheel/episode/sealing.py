"""Write an episode so that a crash cannot leave half of one, and read it back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from flywheel import schema
from flywheel.episode.bounds import no_plain_file
from flywheel.errors import EpisodeError
from flywheel.schema import FileEntry, Manifest

MANIFEST_BYTES_MAX = 1 << 20
SYNC_BYTES = 8 << 20  # brought to disk at a time while an episode is written
READ_BYTES, READ_PAUSE_S = 1 << 20, 5e-4  # what follows a file that is written
GAP_PERIODS = 1.5  # farther apart than this, at least one row is missing


class UnknownVersion(EpisodeError):
    """The manifest has a schema version that this build does not read."""


@dataclass(frozen=True)
class Episode:
    """A sealed episode in memory; the tables have the schemas of ``flywheel.schema``."""

    manifest: Manifest
    control: pa.Table
    frames: pa.Table
    events: pa.Table


def new_episode_id(t_unix_ns: int, rng: np.random.Generator) -> str:
    """A UUID of version 7 (RFC 9562, sub-millisecond fraction in ``rand_a``): sorts by ``t_unix_ns``.

    Clock and randomness are given, so that a simulated run names its episodes alike every time.
    """
    ms, rest = divmod(t_unix_ns, 1_000_000)
    if not 0 <= ms < 1 << 48:
        raise EpisodeError(f"t_unix_ns={t_unix_ns}: not a time that a UUIDv7 can hold; is the clock set?")
    fraction = (rest << 12) // 1_000_000
    tail = int(rng.integers(0, 1 << 62))
    return str(uuid.UUID(int=ms << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | tail))


def as_array(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column as numpy: ``[rows]``, or ``[rows, n]`` for a fixed-size list; not for text and images."""
    column = in_one(table, name)
    if isinstance(column, pa.FixedSizeListArray):
        size = column.type.list_size
        if not column.null_count:  # the values as they lie there, which is what flatten would copy
            flat = column.values.slice(column.offset * size, len(column) * size)
        else:
            flat = column.flatten()
        return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), size)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def in_one(table: pa.Table, name: str) -> pa.Array:
    """A column as one array, which takes no copy where it is one already."""
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def count_gaps(table: pa.Table, rate_hz: float) -> int:
    """Places where more than ``GAP_PERIODS`` periods lie between two rows of a control or frame table.

    A tick that is late is no gap: where a row says by how much, it counts from its deadline.
    """
    return int(np.count_nonzero(np.diff(due_ns(table)) > GAP_PERIODS * 1e9 / rate_hz))


def due_ns(table: pa.Table) -> npt.NDArray[np.int64]:
    """When the rows should have been: ``t_ns - late_ns`` where there is such a column, else ``t_ns``."""
    t = as_array(table, "t_ns")
    return t - as_array(table, "late_ns") if "late_ns" in table.schema.names else t


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Write and fsync a file; its name is durable only once its directory is synced too."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


# ── seal ─────────────────────────────────────────────────────────────────────────────────────────────


def seal(
    parent: Path,
    draft: Manifest,
    control: pa.Table,
    frames: pa.Table,
    events: pa.Table,
    step: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write ``parent/<episode_id>/`` and return its manifest: ``draft`` with ``files`` and ``gaps``.

    ``prepare``, then ``commit``. The same tables give the same bytes. Sealing the same episode twice is
    harmless; sealing another one under a name already taken raises ``EpisodeError``, as do tables that do not
    fit the draft. A disk that is full or read-only raises ``OSError`` and leaves nothing behind. ``step`` is
    told each durable step before it is taken: the seam for tests that crash there.
    """
    manifest = prepare(parent, draft, control, frames, events, step)
    try:
        commit(parent, manifest, step)
    except OSError:
        shutil.rmtree(_partial(parent, manifest.episode_id), ignore_errors=True)
        raise
    return manifest


def prepare(
    parent: Path,
    draft: Manifest,
    control: pa.Table,
    frames: pa.Table,
    events: pa.Table,
    step: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Everything of ``seal`` but the name: a whole, durable episode that no reader finds yet."""
    tables = {schema.CONTROL_FILE: control, schema.FRAMES_FILE: frames, schema.EVENTS_FILE: events}
    for name, table in tables.items():
        check_schema(name, table.schema, draft)
    for row, camera in bad_images(frames, draft.cameras):
        raise EpisodeError(
            f"{draft.episode_id}: image.{camera} of frame {row} is no JPEG: rows and frames must be equal in "
            "number; leave the row out and count it as a drop"
        )
    final, partial = parent / draft.episode_id, _partial(parent, draft.episode_id)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(len(tables), "seal") as writers:
            writes = []
            for name, table in tables.items():
                step(f"write {name}")
                writes.append(writers.submit(_write_table, partial / name, table))
            entries = [w.result() for w in writes]
        gaps = count_gaps(control, draft.control_hz) + count_gaps(frames, draft.policy_hz)
        manifest = draft.model_copy(update={"files": tuple(entries), "gaps": gaps})
        step("write manifest")
        write_durably(partial / schema.MANIFEST_FILE, manifest.to_bytes())
        fsync_directory(partial)
        if final.exists() and read_manifest(final) != manifest:
            raise EpisodeError(f"{final}: an episode of that name is sealed already, with other content")
    except (OSError, EpisodeError, pa.ArrowException):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def commit(parent: Path, manifest: Manifest, step: Callable[[str], None] = lambda _: None) -> None:
    """Give a prepared episode its name. Once it has one, it is sealed; repeating this is harmless."""
    final, partial = parent / manifest.episode_id, _partial(parent, manifest.episode_id)
    step("rename")
    if final.exists():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.rename(final)
    step("sync parent")
    fsync_directory(parent)


def prepared(parent: Path) -> list[Manifest]:
    """Episodes that a crash kept from being committed although they are whole, hashes included."""
    found = []
    for partial in sorted(parent.glob(".*.partial")):
        try:
            manifest = read_manifest(partial)
            whole = all(schema.sha256_file(partial / f.name) == f.sha256 for f in manifest.files)
        except (EpisodeError, OSError):
            continue
        if whole and partial == _partial(parent, manifest.episode_id):
            found.append(manifest)
    return found


def sweep(parent: Path) -> int:
    """Remove what a crashed ``seal`` left in ``parent``; only for whoever seals there. Returns how many."""
    leftovers = [d for d in parent.glob(".*.partial") if d.is_dir()]
    for d in leftovers:
        shutil.rmtree(d)
    return len(leftovers)


def _partial(parent: Path, episode_id: str) -> Path:
    return parent / f".{episode_id}.partial"


class _Follower:
    """Reads a file while it is written, for its sha256, and brings to disk what there is.

    What was just written is still in memory, and Arrow writes it without Python's lock, so that encoding,
    hashing and the disk go on at the same time. Sealing is then about as quick as the slowest of them
    (``flywheel bench recorder``).
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._hash = hashlib.sha256()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_CREAT, 0o644)
        self._whole = threading.Event()
        self._syncer = ThreadPoolExecutor(1, "seal-sync")
        self._syncs: list[Future[None]] = []
        self._reader = ThreadPoolExecutor(1, "seal-hash")
        self._read = self._reader.submit(self._follow)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The file is whole (or given up): read the rest, and bring it to disk."""
        self._whole.set()
        try:
            self._reader.shutdown()
            self._syncer.shutdown()
            if kind is None:
                self._read.result()
                for sync in self._syncs:
                    sync.result()  # a disk says only once that it lost something
                os.fsync(self._fd)
        finally:
            os.close(self._fd)

    @property
    def sha256(self) -> str:
        """Of the whole file."""
        return self._hash.hexdigest()

    def _follow(self) -> None:
        piece = memoryview(bytearray(READ_BYTES))
        synced = 0
        while True:
            whole = self._whole.is_set()  # asked first: then what is read until the end is all
            if count := os.preadv(self._fd, [piece], self.size):
                self._hash.update(piece[:count])
                self.size += count
            elif whole:
                return
            else:
                self._whole.wait(READ_PAUSE_S)
            if self.size - synced > SYNC_BYTES:
                self._syncs.append(self._syncer.submit(os.fdatasync, self._fd))
                synced = self.size


# Columns of few distinct values. The rest are floats that hardly repeat, and images.
_DICTIONARY = {"mode", "held", "tool_cmd", "chunk_id", "limits"}
_DICTIONARY |= {"instruction", "policy_digest", "kind", "name"}


def _write_table(path: Path, table: pa.Table) -> FileEntry:
    names = table.schema.names
    plain = [n for n in names if n not in _DICTIONARY]
    with _Follower(path) as follower, pa.OSFile(str(path), "wb") as f:
        pq.write_table(
            table,
            f,
            compression={_leaf(table, n): "none" if n.startswith("image.") else "zstd" for n in names},
            use_dictionary=[n for n in names if n in _DICTIONARY],
            # Splitting floats into byte planes saves 15 % after zstd (measured, 18 s of 5 joints).
            column_encoding={
                _leaf(table, n): "BYTE_STREAM_SPLIT"
                for n in plain
                if pa.types.is_fixed_size_list(table.schema.field(n).type)
            },
            write_statistics=[_leaf(table, n) for n in names if not n.startswith("image.")],
            write_page_checksum=True,
        )
    return FileEntry(name=path.name, rows=table.num_rows, bytes=follower.size, sha256=follower.sha256)


def _leaf(table: pa.Table, name: str) -> str:
    """The Parquet path of a column: lists have their values two levels down."""
    is_list = pa.types.is_fixed_size_list(table.schema.field(name).type)
    return f"{name}.list.element" if is_list else name


# ── read ─────────────────────────────────────────────────────────────────────────────────────────────


def parse_manifest(data: bytes, source: str) -> Manifest:
    """A manifest from bytes that anybody may have written; ``EpisodeError`` names the field."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise EpisodeError(f"{source}: longer than {MANIFEST_BYTES_MAX} bytes")
    try:
        doc = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise EpisodeError(f"{source}: not JSON, perhaps truncated: {first_line(e)}") from None
    version = doc.get("schema_version") if isinstance(doc, dict) else None
    if version != schema.EPISODE_SCHEMA_VERSION or isinstance(version, bool):
        raise UnknownVersion(
            f"{source}: schema_version {version!r:.40} is unknown, this build reads "
            f"{schema.EPISODE_SCHEMA_VERSION}; upgrade flywheel if a newer one wrote it"
        )
    try:
        manifest = Manifest.model_validate_json(data)
        manifest.prefix  # noqa: B018  computing it shows that the times are times
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise EpisodeError(f"{source}: {where} = {first['input']!r:.80}: {first['msg']}") from None
    except (OverflowError, ValueError, OSError):
        raise EpisodeError(f"{source}: clock_epoch_ns + window_ns is no date") from None
    names = tuple(f.name for f in manifest.files)
    if names != schema.EPISODE_FILES:
        raise EpisodeError(f"{source}: files are {names!r:.200}, must be {schema.EPISODE_FILES}")
    if len(set(manifest.cameras)) != len(manifest.cameras):
        raise EpisodeError(f"{source}: cameras {manifest.cameras!r:.200} repeat a name")
    if manifest.window_ns[0] > manifest.window_ns[1]:
        raise EpisodeError(f"{source}: window_ns {manifest.window_ns} ends before it starts")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an episode's directory; a directory without one holds no episode (``EpisodeError``)."""
    path = directory / schema.MANIFEST_FILE
    try:
        if (why := no_plain_file(path)) is not None:  # a pipe would have us wait for ever
            raise EpisodeError(f"{path}: {why}")
        with path.open("rb") as f:
            data = f.read(MANIFEST_BYTES_MAX + 1)
    except FileNotFoundError:
        raise EpisodeError(f"{path}: no such file, so no episode: not sealed, or not all copied") from None
    except OSError as e:
        raise EpisodeError(f"{path}: cannot be read: {e.strerror}") from None
    return parse_manifest(data, str(path))


def read(directory: Path, verify_page_checksums: bool = True) -> Episode:
    """Load an episode. ``EpisodeError`` says which file is missing, truncated, corrupt or of another schema.

    Hashes and values are not looked at: that is ``verify``.
    """
    manifest = read_manifest(directory)
    tables = {}
    for entry in manifest.files:
        path = directory / entry.name
        try:
            with path.open("rb") as f:
                table = pq.ParquetFile(f, page_checksum_verification=verify_page_checksums).read()
        except FileNotFoundError:
            raise EpisodeError(f"{path}: missing, but in the manifest; pull the episode again") from None
        except (pa.ArrowException, OSError) as e:
            raise EpisodeError(f"{path}: truncated or corrupt: {first_line(e)}") from None
        check_schema(str(path), table.schema, manifest, entry.name)
        if table.num_rows != entry.rows:
            raise EpisodeError(f"{path}: {table.num_rows} rows, but the manifest says {entry.rows}")
        tables[entry.name] = table
    return Episode(manifest, *(tables[n] for n in schema.EPISODE_FILES))


def check_schema(source: str, found: pa.Schema, manifest: Manifest, name: str = "") -> None:
    """Raise ``EpisodeError`` unless ``found`` is what file ``name`` (default: ``source``) has to have."""
    expected = {
        schema.CONTROL_FILE: lambda: schema.control_schema(manifest.joints),
        schema.FRAMES_FILE: lambda: schema.frames_schema(
            manifest.cameras, manifest.state_dim, manifest.chunk, manifest.action_dim
        ),
        schema.EVENTS_FILE: lambda: schema.EVENTS_SCHEMA,
    }[name or source]()
    if found.equals(expected):
        return
    for field in expected:
        index = found.get_field_index(field.name)
        if index < 0:
            raise EpisodeError(f"{source}: column {field.name} is missing or given twice")
        if not found.field(index).equals(field):
            raise EpisodeError(f"{source}: column {field.name} is {found.field(index)}, expected {field}")
    raise EpisodeError(f"{source}: columns {found.names!r:.400}, expected {expected.names} in this order")


def bad_images(frames: pa.Table, cameras: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Row and camera of each image that does not begin and end as a JPEG does."""
    for camera in cameras:
        first = 0
        for chunk in frames.column(f"image.{camera}").chunks:
            for row in np.flatnonzero(~_whole_jpegs(chunk)).tolist():
                yield first + row, camera
            first += len(chunk)


def _whole_jpegs(pictures: pa.BinaryArray) -> npt.NDArray[np.bool_]:
    """Which begin with SOI and end with EOI (ITU-T T.81, table B.1); a null does not."""
    _, ends, data = pictures.buffers()
    if data is None or not len(pictures):
        return np.zeros(len(pictures), bool)
    at = np.frombuffer(ends, np.int32)[pictures.offset :][: len(pictures) + 1]
    found = np.diff(at) >= 4
    first, last = at[:-1][found], at[1:][found]
    octets = np.frombuffer(data, np.uint8)
    begins = (octets[first] == 0xFF) & (octets[first + 1] == 0xD8)
    found[found] = begins & (octets[last - 2] == 0xFF) & (octets[last - 1] == 0xD9)
    return found & np.asarray(pictures.is_valid()) if pictures.null_count else found


def first_line(error: Exception) -> str:
    """The first line of an error's text, shortened: libraries append stack traces."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
