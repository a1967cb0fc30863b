"""Copies a deployment into a back-up directory, while it runs. See ``order`` for what makes that consistent.

A second run copies only what is new, and one that broke off goes on: content lies under its hash, and what
was copied is noted as it is. Every object is read whole and held against the sha256 that was stored with it
(DVC's against the MD5 in its name); one that differs is named, and the others are copied all the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from flywheel.backup import local
from flywheel.backup.directory import Directory, End, Entry
from flywheel.backup.order import EPISODES, IGNORED, TIERS, Tier, episode_of, missing_numbers, tier_of
from flywheel.claims import LOG, MARKER, Claims
from flywheel.errors import ConfigError, IntegrityError, NotFound, StoreError, StoreRefused, StoreUnavailable
from flywheel.store import ObjectInfo, Store, check_key

READERS = 8
BATCH = 1000  # objects between two looks at the progress
_DVC = re.compile(r"dvc/files/md5/(?P<a>[0-9a-f]{2})/(?P<b>[0-9a-f]{30})(\.dir)?")

Progress = Callable[[int, int], None]  # objects so far, bytes copied so far


@dataclass(frozen=True)
class Made:
    """What a back-up holds, and what this run had to copy for it."""

    name: str
    directory: str
    objects: int
    bytes: int
    copied: int
    copied_bytes: int
    files: tuple[str, ...]
    secrets: int
    damaged: tuple[str, ...]  # in the store itself, with the reason
    left_out: tuple[str, ...]  # with the reason
    notes: tuple[str, ...]


def make(
    directory: Path,
    store: Store,
    home: Path,
    checkout: Path | None,
    *,
    keys: bool = False,
    verify: bool = False,
    on_progress: Progress = lambda _objects, _bytes: None,
) -> Made:
    """Back everything up into ``directory``. ``keys`` takes signing keys and Airflow's secrets along, and
    ``verify`` reads what earlier back-ups copied, and copies anew what was damaged since.

    Raises ``ConfigError`` for a directory of other things, and what the store and git raise. Damaged objects
    do not raise: the caller says so, and the back-up of everything else is there.
    """
    to = Directory(directory)
    try:
        with to.writing():
            return _Making(to, store, verify, on_progress).run(home, checkout, keys)
    except OSError as e:
        raise ConfigError(f"{e.filename or directory}: {e.strerror}") from None


class _Making:
    def __init__(self, to: Directory, store: Store, verify: bool, on_progress: Progress) -> None:
        self.to, self.store, self.verify, self.on_progress = to, store, verify, on_progress
        self.known = to.copied()
        self.entries: dict[str, Entry] = {}
        self.copied, self.copied_bytes = 0, 0
        self.damaged: list[str] = []
        self.left_out: list[str] = []
        self._lock = threading.Lock()

    def run(self, home: Path, checkout: Path | None, keys: bool) -> Made:
        local_entries, notes = [], []
        found, note = local.database(self.to, home, os.environ)
        local_entries += [found] if found else []
        notes += [note] if note else []
        with self.to.journal.open("ab", buffering=0) as journal, ThreadPoolExecutor(READERS) as pool:
            self.journal, self.pool = journal, pool
            before = {i.key for i in self.store.list(EPISODES) if episode_of(i.key)}
            for tier in TIERS:
                self._tier(tier)
            if checkout is not None:
                found, note = local.experiments(self.to, checkout)
                local_entries += [found] if found else []
                notes += [note] if note else []
            else:
                notes.append("no checkout here, so no experiments; set FLYWHEEL_CHECKOUT")
            self._rest(before)
        if (found := local.anchor(self.to, home)) is not None:
            local_entries.append(found)
        secrets = local.secrets(self.to, home) if keys else []
        entries = [*local_entries, *secrets, *sorted(self.entries.values(), key=lambda e: e.name)]
        end = End(
            entries=0,
            sha256="0" * 64,
            store=repr(self.store),
            damaged=tuple(sorted(self.damaged)),
            left_out=tuple(sorted(self.left_out)),
        )
        return Made(
            name=self.to.seal(entries, end),
            directory=str(self.to.root),
            objects=len(self.entries),
            bytes=sum(e.size for e in self.entries.values()),
            copied=self.copied,
            copied_bytes=self.copied_bytes,
            files=tuple(e.name for e in local_entries),
            secrets=len(secrets),
            damaged=end.damaged,
            left_out=end.left_out,
            notes=tuple(notes),
        )

    def _tier(self, tier: Tier) -> None:
        listed = [i for i in self.store.list(tier.prefix) if tier.holds(i.key)]
        missing = (self.store.stat(key) for key in missing_numbers(i.key for i in listed))
        self._copy([*listed, *(i for i in missing if i is not None)])

    def _rest(self, before: set[str]) -> None:
        """Everything that no class names; of the episodes, those that were there at the start."""
        named = self._named_episodes()
        batch: list[ObjectInfo] = []
        for info in self.store.list():
            key = info.key
            if key.startswith(IGNORED) or tier_of(key) < len(TIERS):
                continue
            if (episode := episode_of(key)) and key not in before and episode not in named:
                continue
            batch.append(info)
            if len(batch) == BATCH:
                self._copy(batch)
                batch = []
        self._copy(batch)

    def _named_episodes(self) -> set[str]:
        """Episodes that a copied marker or claim names."""
        found = {m["episode_id"] for key in self.entries if (m := MARKER.fullmatch(key)) is not None}
        for key, entry in self.entries.items():
            if not (key.startswith(f"{LOG}/") and key.endswith(".json")):
                continue
            try:
                claims = Claims.model_validate_json(self.to.path(entry).read_bytes())
            except ValidationError:
                continue  # copied as it is: the turn that reads it says what is wrong
            found |= {c.episode_id for c in claims.episodes}
        return found

    def _copy(self, listed: Iterable[ObjectInfo]) -> None:
        for entry in self.pool.map(self._one, listed):
            if entry is not None:
                self.entries[entry.name] = entry
        self.on_progress(len(self.entries), self.copied_bytes)

    def _one(self, info: ObjectInfo) -> Entry | None:
        modified = info.modified.timestamp()
        old = self.known.get(info.key)
        same = old is not None and (old.size, old.etag, old.modified) == (info.size, info.etag, modified)
        if old is not None and same and self.to.has(old) and self._sound(old):
            return old
        part = self.to.incoming / uuid.uuid4().hex
        try:
            check_key(info.key)
            sha = self.store.get_file(info.key, part)
            if (m := _DVC.fullmatch(info.key)) is not None:
                with part.open("rb") as f:
                    if hashlib.file_digest(f, "md5").hexdigest() != m["a"] + m["b"]:
                        raise IntegrityError(f"{info.key}: is not what its name says")
        except NotFound:
            return None  # removed since it was listed
        except IntegrityError as e:
            part.unlink(missing_ok=True)
            return self._damaged(info, old, e)
        except (StoreUnavailable, StoreRefused):
            raise
        except StoreError as e:  # a key that is not of this product
            with self._lock:
                self.left_out.append(str(e))
            return None
        entry = Entry(
            kind="object",
            name=info.key,
            size=part.stat().st_size,
            sha256=sha,
            etag=info.etag,
            modified=modified,
        )
        self.to.keep(part, entry)
        with self._lock:
            self.journal.write(entry.line())
            self.copied += 1
            self.copied_bytes += entry.size
        return entry

    def _sound(self, entry: Entry) -> bool:
        if not self.verify:
            return True
        try:
            self.to.verify(entry)
        except IntegrityError:
            return False
        return True

    def _damaged(self, info: ObjectInfo, old: Entry | None, why: IntegrityError) -> Entry | None:
        """An object that the store no longer gives back as it was: an earlier copy is the better one."""
        kept = old is not None and self.to.has(old) and self.store.recorded_sha256(info.key) == old.sha256
        with self._lock:
            self.damaged.append(f"{why}" + ("; the copy of an earlier back-up is kept" if kept else ""))
        return old if kept else None
