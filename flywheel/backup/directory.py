"""A back-up directory: content by its sha256, and a manifest for each back-up that was finished.

    manifests/<UTC>.jsonl     what a back-up consists of: a line each, a last line that vouches for the others
    objects/<2>/<sha256>      content; never changed, shared by all back-ups of the directory
    secrets/<sha256>          signing keys and Airflow's, mode 0600: only where they were asked for
    unfinished.jsonl          what a back-up under way, or one that broke off, has copied so far

A manifest is written last (temp, fsync, rename), so a back-up that broke off has none, and the one before it
stays whole. Names in a manifest are never paths: content is found by its hash, other files by a fixed list.
The directory may come from anywhere, and nothing in it is believed before it was verified.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from flywheel.episode import fsync_directory
from flywheel.errors import ConfigError, IntegrityError, StoreError
from flywheel.schema import DIGEST, Strict
from flywheel.store import check_key

MANIFEST = re.compile(r"\d{8}-\d{6}-\d{6}")
DATABASE, EXPERIMENTS, ROOT = "airflow/airflow.db", "git/experiments.bundle", "keys/root.json"
FILES = (DATABASE, EXPERIMENTS, ROOT)
# Below the state directory. No name may begin with a dot, and none holds a further slash.
SECRETS = re.compile(
    r"keys/(retired/)?[A-Za-z0-9][A-Za-z0-9_.@+-]*\.pem|keys/ceremony\.json"
    r"|airflow/(airflow\.cfg|passwords\.json)"
)
REMEDY = "take another back-up with --verify, which mends what it can"
LINE_BYTES = 8192  # a key has 1024 bytes at most
PIECE_BYTES = 1 << 20


class Entry(Strict):
    """One thing that was copied: an object of the store by its key, a file or a secret by its name."""

    kind: Literal["object", "file", "secret"]
    name: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=DIGEST)
    etag: str = ""  # of an object, by which the next back-up sees that it did not change
    modified: float = 0.0  # UTC s, by the store

    def line(self) -> bytes:
        """One line of a manifest."""
        return self.model_dump_json().encode() + b"\n"


class End(Strict):
    """The last line: without it, or with another hash, a manifest counts for nothing."""

    schema_version: Literal[1] = 1
    entries: int = Field(ge=0)
    sha256: str = Field(pattern=DIGEST)  # of all lines before this one
    store: str  # where the objects came from
    damaged: tuple[str, ...] = ()  # objects that the store itself no longer gives back as they were
    left_out: tuple[str, ...] = ()


class Directory:
    """One back-up directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.secrets = root / "secrets"
        self.incoming = root / "incoming"
        self.manifests = root / "manifests"
        self.journal = root / "unfinished.jsonl"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the directory, made if it is not there. ``ConfigError`` if it is something else, or held."""
        if self.root.exists() and not self.manifests.is_dir() and any(self.root.iterdir()):
            raise ConfigError(f"{self.root}: holds other things than back-ups; name an empty directory")
        # Episodes show workplaces: a back-up is its owner's alone, as the store was.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.manifests, self.objects):
            path.mkdir(mode=0o700, exist_ok=True)
        with (self.root / ".lock").open("w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.root}: another back-up writes there; wait for it") from None
            shutil.rmtree(self.incoming, ignore_errors=True)
            self.incoming.mkdir(mode=0o700)
            try:
                yield
            finally:
                shutil.rmtree(self.incoming, ignore_errors=True)

    # -- manifests

    def finished(self) -> list[str]:
        """Names of the back-ups that were finished, the oldest first."""
        return sorted(p.stem for p in self.manifests.glob("*.jsonl") if MANIFEST.fullmatch(p.stem))

    def read(self, name: str = "") -> tuple[str, list[Entry], End]:
        """Name, entries and end of a back-up, the newest unless named; hashes and names of it are checked,
        content is not. Raises ``ConfigError`` where there is none, ``IntegrityError`` for a bad manifest."""
        known = self.finished()
        if not known:
            broken = " (one broke off: run `flywheel backup` again)" if self.journal.exists() else ""
            raise ConfigError(f"{self.root}: no finished back-up{broken}")
        if name and name not in known:
            raise ConfigError(f"{self.root}: no back-up {name!r}; there are {', '.join(known)}")
        name = name or known[-1]
        path = self.manifests / f"{name}.jsonl"
        entries: list[Entry] = []
        seen: set[tuple[str, str]] = set()
        digest, last = hashlib.sha256(), b""
        with _regular(path) as f:
            while line := f.readline(LINE_BYTES):
                if last:
                    digest.update(last)
                    entry = _entry(path, len(entries) + 1, last)
                    if (entry.kind, entry.name) in seen:
                        raise IntegrityError(f"{path}: names {entry.name} twice")
                    seen.add((entry.kind, entry.name))
                    entries.append(entry)
                last = line
        try:
            end = End.model_validate_json(last)
        except ValidationError:
            raise IntegrityError(f"{path}: has no end, so it was cut off; take another back-up") from None
        if (end.entries, end.sha256) != (len(entries), digest.hexdigest()):
            raise IntegrityError(f"{path}: is not what its last line says; take another back-up")
        return name, entries, end

    def seal(self, entries: Iterable[Entry], end: End) -> str:
        """Write a manifest durably, as the last thing of a back-up; its name. ``end`` is completed here."""
        for path in (*self.objects.iterdir(), self.objects, self.secrets):
            if path.is_dir():
                fsync_directory(path)
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
        part = self.manifests / f".{name}.part"
        digest, n = hashlib.sha256(), 0
        with part.open("wb") as f:
            for entry in entries:
                f.write(line := entry.line())
                digest.update(line)
                n += 1
            sealed = end.model_copy(update={"entries": n, "sha256": digest.hexdigest()})
            f.write(sealed.model_dump_json().encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        part.replace(self.manifests / f"{name}.jsonl")
        fsync_directory(self.manifests)
        self.journal.unlink(missing_ok=True)
        return name

    def copied(self) -> dict[str, Entry]:
        """By key: objects that the newest back-up and one that broke off have copied."""
        known: dict[str, Entry] = {}
        if self.finished():
            known |= {e.name: e for e in self.read()[1] if e.kind == "object"}
        try:
            lines = self.journal.read_bytes().splitlines()
        except FileNotFoundError:
            return known
        for line in lines:
            try:
                entry = Entry.model_validate_json(line)
            except ValidationError:
                continue  # it broke off within a line
            known[entry.name] = entry
        return known

    # -- content

    def path(self, entry: Entry) -> Path:
        """Where an entry's content lies."""
        if entry.kind == "secret":
            return self.secrets / entry.sha256
        return self.objects / entry.sha256[:2] / entry.sha256

    def has(self, entry: Entry) -> bool:
        """Whether the content is there, by its name and size; ``verify`` reads it."""
        try:
            return self.path(entry).lstat().st_size == entry.size
        except OSError:
            return False

    def keep(self, part: Path, entry: Entry) -> None:
        """Move a durable file from ``incoming`` to where it belongs."""
        path = self.path(entry)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part.replace(path)

    def verify(self, entry: Entry) -> Path:
        """Read an entry's content; ``IntegrityError`` names the entry if it is not what its hash says."""
        path, sha, size = self.path(entry), hashlib.sha256(), 0
        try:
            with _regular(path) as f:
                while piece := f.read(PIECE_BYTES):
                    sha.update(piece)
                    size += len(piece)
        except OSError as e:
            raise IntegrityError(f"{entry.name}: {path}: {e.strerror}; {REMEDY}") from None
        if (size, sha.hexdigest()) != (entry.size, entry.sha256):
            raise IntegrityError(
                f"{entry.name}: {path} was changed or damaged: it has sha256 {sha.hexdigest()[:12]} and "
                f"{size} bytes, not {entry.sha256[:12]} and {entry.size}; {REMEDY}"
            )
        return path


@contextmanager
def _regular(path: Path) -> Iterator[BufferedReader]:
    """Open a plain file for reading: what comes from elsewhere may hold links and pipes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        raise IntegrityError(f"{path}: {e.strerror}; a back-up holds plain files only") from None
    with os.fdopen(fd, "rb") as f:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise IntegrityError(f"{path}: is no plain file")
        yield f


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        entry = Entry.model_validate_json(line)
        if entry.kind == "object":
            check_key(entry.name)
        elif entry.kind == "file" and entry.name not in FILES:
            raise StoreError(f"file {entry.name!r}: a back-up has {', '.join(FILES)}")
        elif entry.kind == "secret" and not SECRETS.fullmatch(entry.name):
            raise StoreError(f"secret {entry.name!r}: no back-up has that")
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"])) or "line"
        raise IntegrityError(f"{path}: line {number}: {field}: {first['msg']}") from None
    except StoreError as e:
        raise IntegrityError(f"{path}: line {number}: {e}") from None
    return entry
