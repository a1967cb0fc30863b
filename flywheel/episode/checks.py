"""Is this directory the episode that it says it is? Every doubt has a reason code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pyarrow as pa

from flywheel import schema
from flywheel.episode.bounds import (
    FILE_BYTES_MAX,
    inflates,
    no_plain_file,
    open_parquet,
    read_bounded,
    too_large,
)
from flywheel.episode.sealing import (
    Episode,
    UnknownVersion,
    as_array,
    bad_images,
    check_schema,
    count_gaps,
    due_ns,
    first_line,
    read_manifest,
)
from flywheel.errors import EpisodeError
from flywheel.schema import FileEntry, Manifest

WHOLE_BYTES_MAX = 32 << 20  # of a file that is read into memory before it is looked at

_FINITE = {
    schema.CONTROL_FILE: ("q", "dq", "q_ref", "tau", "tool_cmd"),
    schema.FRAMES_FILE: ("state", "action", "chunk"),
}


# The columns of text of each file.
_TEXTS = {
    name: [f.name for f in kind if pa.types.is_string(f.type)]
    for name, kind in (
        (schema.CONTROL_FILE, schema.control_schema(1)),
        (schema.FRAMES_FILE, schema.frames_schema((), 1, 1, 1)),
        (schema.EVENTS_FILE, schema.EVENTS_SCHEMA),
    )
}


class Reason(StrEnum):
    """Why an episode is not what it says it is."""

    NO_MANIFEST = "no_manifest"
    BAD_MANIFEST = "bad_manifest"
    UNKNOWN_VERSION = "unknown_version"
    MISSING_FILE = "missing_file"
    EXTRA_FILE = "extra_file"
    SHA256 = "sha256"
    CORRUPT = "corrupt"
    SCHEMA = "schema"
    ROWS = "rows"
    NOT_FINITE = "not_finite"
    TIME_ORDER = "time_order"
    WINDOW = "window"
    IMAGE = "image"
    NOT_A_FILE = "not_a_file"
    TOO_LARGE = "too_large"
    GAP = "gap"
    DROPS = "drops"


@dataclass(frozen=True)
class Problem:
    """One thing wrong. ``fatal`` ones bar the episode from training; the others are only surfaced."""

    reason: Reason
    file: str
    message: str
    column: str = ""
    row: int = -1
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.message} [{self.reason}]"


def verify(directory: Path) -> list[Problem]:
    """Everything wrong with an episode's directory, fatal problems first; empty for a sound episode.

    Bad input never raises: a missing, truncated, corrupt, forged or malformed file is a ``Problem``.
    """
    return inspect(directory)[0]


def inspect(directory: Path) -> tuple[list[Problem], Episode | None]:
    """``verify``, and the episode that was read for it; None where a problem is fatal."""
    path = directory / schema.MANIFEST_FILE
    if directory.is_symlink():
        return [Problem(Reason.NOT_A_FILE, directory.name, "is a link, not an episode's directory")], None
    try:
        if (why := no_plain_file(path)) is not None:
            return [Problem(Reason.NOT_A_FILE, schema.MANIFEST_FILE, why)], None
    except (FileNotFoundError, NotADirectoryError):
        return [Problem(Reason.NO_MANIFEST, schema.MANIFEST_FILE, f"there is none in {directory}")], None
    try:
        manifest = read_manifest(directory)
    except EpisodeError as e:
        reason = Reason.UNKNOWN_VERSION if isinstance(e, UnknownVersion) else Reason.BAD_MANIFEST
        return [Problem(reason, schema.MANIFEST_FILE, str(e).removeprefix(f"{path}: "))], None
    known = {schema.MANIFEST_FILE, *schema.EPISODE_FILES}
    problems = [
        Problem(Reason.EXTRA_FILE, name, "not part of an episode; remove it")
        for name in sorted(p.name for p in directory.iterdir())
        if name not in known
    ]
    tables: dict[str, pa.Table] = {}
    for entry in manifest.files:
        problems += _verify_file(directory / entry.name, entry, manifest, tables)
    if n := manifest.drops:
        text = f"{n} rows were lost while recording"
        problems.append(Problem(Reason.DROPS, schema.MANIFEST_FILE, text, fatal=False))
    problems.sort(key=lambda p: not p.fatal)
    if problems and problems[0].fatal:
        return problems, None
    return problems, Episode(manifest, *(tables[n] for n in schema.EPISODE_FILES))


def _verify_file(
    path: Path, entry: FileEntry, manifest: Manifest, tables: dict[str, pa.Table]
) -> list[Problem]:
    name = entry.name
    try:
        # Before anything is opened: a pipe would wait for ever, a device never end.
        there = path.lstat()
        if (why := no_plain_file(path, there)) is not None:
            return [Problem(Reason.NOT_A_FILE, name, why)]
        size = there.st_size
        if (why := too_large(entry, manifest)) is not None or size > FILE_BYTES_MAX:
            return [Problem(Reason.TOO_LARGE, name, why or f"{size} bytes")]
        if size != entry.bytes:
            text = f"has {size} bytes, the manifest says {entry.bytes}"
            return [Problem(Reason.SHA256, name, text)]
        data = _whole(path, size) if size <= WHOLE_BYTES_MAX else None  # what is hashed is then what is read
        digest = schema.sha256_file(path) if data is None else schema.sha256_bytes(data)
    except OSError as e:
        return [Problem(Reason.MISSING_FILE, name, f"the manifest lists it, but: {e.strerror}")]
    problems = []
    if digest != entry.sha256:
        text = f"sha256 is {digest[:12]}…, the manifest says {entry.sha256[:12]}…"
        problems.append(Problem(Reason.SHA256, name, text))
    try:
        with path.open("rb") if data is None else pa.BufferReader(data) as f:
            words = _TEXTS[name]
            try:
                file = open_parquet(f, words)
            except KeyError:  # one is missing, and its absence is told below
                file = open_parquet(f)
            # The footer first: a forged one must not make us inflate what the manifest does not admit.
            rows = file.metadata.num_rows
            if rows != entry.rows:
                text = f"{rows} rows, but the manifest says {entry.rows}"
                return [*problems, Problem(Reason.ROWS, name, text)]
            layout = file.schema.to_arrow_schema()
            check_schema(name, layout, manifest)
            if (why := inflates(file, layout, entry)) is not None:
                return [*problems, Problem(Reason.TOO_LARGE, name, why)]
            table = read_bounded(file, layout, words)
            if isinstance(table, str):
                return [*problems, Problem(Reason.TOO_LARGE, name, table)]
            table.validate(full=True)
    except EpisodeError as e:
        return [*problems, Problem(Reason.SCHEMA, name, str(e).removeprefix(f"{name}: "))]
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as e:
        return [*problems, Problem(Reason.CORRUPT, name, f"truncated or corrupt: {first_line(e)}")]
    tables[name] = table
    return problems + _verify_values(name, table, manifest)


def _whole(path: Path, size: int) -> bytes:
    """The file, or a byte more than ``size`` if it grew since: its hash is another one then."""
    with path.open("rb") as f:
        return f.read(size + 1)


def _verify_values(name: str, table: pa.Table, manifest: Manifest) -> list[Problem]:
    problems = []  # none for nulls: ``check_schema`` admits no column that could hold one
    for column in _FINITE.get(name, ()):
        values = as_array(table, column)
        finite = np.isfinite(values)
        if not finite.all():
            bad = ~(finite if values.ndim > 1 else finite[:, None]).all(axis=1)
            row = int(np.argmax(bad))
            text = f"{column} is NaN or infinite in {int(bad.sum())} rows, first in row {row}"
            problems.append(Problem(Reason.NOT_FINITE, name, text, column, row))
    t = as_array(table, "t_ns")
    # Rows are ticks of one loop and so strictly in order; events come from several processes and may tie.
    # Compared, not subtracted: what somebody made up may differ by more than an int64 holds.
    backwards = t[1:] < t[:-1] if name == schema.EVENTS_FILE else t[1:] <= t[:-1]
    if backwards.any():
        row = int(np.argmax(backwards)) + 1
        text = f"t_ns does not increase in row {row}: {t[row]} after {t[row - 1]}"
        problems.append(Problem(Reason.TIME_ORDER, name, text, "t_ns", row))
    low, high = manifest.window_ns
    # The end of an attempt is an event of the instant at which the next one may begin.
    last = high if name == schema.EVENTS_FILE else high - 1
    if not backwards.any() and (not len(t) or (low <= t[0] and t[-1] <= last)):
        outside = backwards[:0]  # in order, and so all lie between the first and the last
    else:
        outside = (t < low) | (t > last)
    if outside.any():
        row = int(np.argmax(outside))
        text = f"t_ns {t[row]} in row {row} is outside of the window [{low}, {high})"
        problems.append(Problem(Reason.WINDOW, name, text, "t_ns", row))
    if name == schema.EVENTS_FILE:
        return problems
    rate = manifest.control_hz if name == schema.CONTROL_FILE else manifest.policy_hz
    if n := count_gaps(table, rate):
        steps = np.diff(due_ns(table))
        row = int(np.argmax(steps)) + 1
        text = f"{n} gaps, the longest of {steps[row - 1] / 1e6:.1f} ms before row {row}"
        # A gap that the manifest counts is a fact of the recording; one that it does not is a forgery.
        problems.append(Problem(Reason.GAP, name, text, "t_ns", row, fatal=n > manifest.gaps))
    if name == schema.FRAMES_FILE:
        for row, camera in bad_images(table, manifest.cameras):
            text = f"image.{camera} is no whole JPEG in row {row}"
            problems.append(Problem(Reason.IMAGE, name, text, f"image.{camera}", row))
            break
    return problems
