"""The durable queue between the recorder and the store.

On disk, below one root::

    episodes/<id>/   sealed, not yet in the store (the recorder seals here; ``.<id>.partial`` is its own)
    damaged/<id>.n/  no longer what its manifest says: kept for a person, never uploaded
    dropped/<id>/    only the manifest is left: the quota took the rest
    .trash/          being removed

Every step from one place to another is one rename, so a crash leaves an episode in exactly one of them. An
episode leaves ``episodes/`` for good only when the store's copy of every file was read back and matched its
sha256, the manifest was created after them, and the inbox marker after that. Each of these steps may be
repeated at any time with the same result: the manifest is a create-only key, and the marker's name follows
from the time at which the store received the manifest.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flywheel.episode import fsync_directory, read_manifest
from flywheel.errors import (
    Conflict,
    EpisodeError,
    IntegrityError,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from flywheel.schema import EPISODE_FILES, MANIFEST_FILE, Manifest, TriggerKind, sha256_bytes, sha256_file
from flywheel.store import ObjectInfo

DROPPED_KEY = "dropped.json"  # in the store, beside where the manifest would be

BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 120.0
REFUSED_RETRY_S = 300.0  # nothing changes before a person acts; look again now and then
REFUSALS_MAX = 3  # in a row: then the store refuses everything, and the rest is not tried in this pass

_PRIORITY = {
    TriggerKind.SAFETY_STOP: 4,
    TriggerKind.DROPPED_OBJECT: 3,
    TriggerKind.WRONG_OBJECT: 3,
    TriggerKind.INTERVENTION: 3,
    TriggerKind.TASK_TIMEOUT: 2,
    TriggerKind.TRACKING_ERROR: 2,
    TriggerKind.BASELINE: 0,
}


def priority(manifest: Manifest) -> int:
    """How much an episode matters: that of its weightiest trigger. Uploaded first, dropped last."""
    return max((_PRIORITY[t.kind] for t in manifest.triggers), default=0)


class Uploads(Protocol):
    """What the spool needs of ``flywheel.store.Store``."""

    def put(self, key: str, data: bytes | Path, sha256: str | None = None) -> str: ...
    def create(self, key: str, data: bytes | Path, sha256: str | None = None) -> str: ...
    def get(self, key: str, sha256: str | None = None) -> bytes: ...
    def stat(self, key: str) -> ObjectInfo | None: ...


@dataclass(frozen=True)
class Queued:
    """An episode that waits."""

    path: Path
    manifest: Manifest
    nbytes: int


class Queue:
    """The spool on disk. Any number of processes may hold one on the same root."""

    def __init__(self, root: Path, quota_bytes: int, step: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self.episodes, self.damaged, self.dropped = (root / n for n in ("episodes", "damaged", "dropped"))
        self._trash = root / ".trash"
        for d in (self.episodes, self.damaged, self.dropped, self._trash):
            d.mkdir(parents=True, exist_ok=True)
        self.quota_bytes = quota_bytes
        self._step = step
        self._known: dict[str, Queued] = {}

    def pending(self) -> list[Queued]:
        """Episodes that wait, the first to be uploaded first: by priority, then the oldest."""
        names = {e.name for e in os.scandir(self.episodes) if e.is_dir() and not e.name.startswith(".")}
        for name in self._known.keys() - names:
            del self._known[name]
        for name in names - self._known.keys():
            path = self.episodes / name
            try:
                m = read_manifest(path)
            except EpisodeError as e:
                self.set_aside(path, str(e))
                continue
            self._known[name] = Queued(path, m, sum(f.bytes for f in m.files))
        return sorted(self._known.values(), key=lambda q: (-priority(q.manifest), q.manifest.episode_id))

    @contextmanager
    def hold(self, path: Path) -> Iterator[bool]:
        """Have an episode for oneself; yields False if another process has it, or has dealt with it."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield False
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield (path / MANIFEST_FILE).exists()
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Let go of an episode that is in the store."""
        self._move(path, self._trash)
        shutil.rmtree(self._trash / path.name, ignore_errors=True)

    def set_aside(self, path: Path, why: str) -> None:
        """Keep an episode that is not what its manifest says, out of the way and with the reason."""
        with suppress(FileNotFoundError):  # another process dealt with it
            kept = self._move(path, self.damaged)
            with suppress(OSError):  # a full disk: the reason is told all the same, only not kept
                (kept / "why.txt").write_text(why + "\n", encoding="utf-8")

    def drop(self, q: Queued) -> bool:
        """Give up an episode's data, not its manifest. Needs no free space. False if it is in use."""
        with self.hold(q.path) as mine:
            if mine:
                self._step("drop")
                self._move(q.path, self.dropped)
        if mine:
            self._strip(self.dropped / q.path.name)
        return mine

    def enforce(self) -> list[str]:
        """Drop until the quota is kept: the least important first, then the oldest. Returns their ids.

        Nothing is ever refused: the quota is kept after the fact.
        """
        return self._drop_until(lambda used, freed: used <= self.quota_bytes)

    def make_room(self, nbytes: int, most: int) -> list[str]:
        """Free ``nbytes`` for an episode of priority ``most``, at the cost of none that matters more."""
        return self._drop_until(lambda used, freed: freed >= nbytes, most)

    def summaries(self) -> list[Path]:
        """Dropped episodes of which only the manifest is left."""
        found = sorted(d for d in self.dropped.iterdir() if d.is_dir())
        for d in found:
            self._strip(d)  # a crash may have come between
        return found

    def tidy(self) -> None:
        """Finish removals that a crash cut short."""
        for d in self._trash.iterdir():
            shutil.rmtree(d, ignore_errors=True)

    def _drop_until(self, enough: Callable[[int, int], bool], most: int | None = None) -> list[str]:
        queued = self.pending()
        used, freed, dropped = sum(q.nbytes for q in queued), 0, []
        for q in sorted(queued, key=lambda q: (priority(q.manifest), q.manifest.episode_id)):
            if enough(used, freed) or (most is not None and priority(q.manifest) > most):
                break
            if self.drop(q):
                used, freed = used - q.nbytes, freed + q.nbytes
                dropped.append(q.manifest.episode_id)
        return dropped

    def _move(self, path: Path, to: Path) -> Path:
        target = to / path.name
        if to == self.damaged:  # nothing that was kept is overwritten
            target = next(t for n in itertools.count() if not (t := to / f"{path.name}.{n}").exists())
        elif target.exists():
            shutil.rmtree(target)
        path.rename(target)
        fsync_directory(to)
        fsync_directory(path.parent)
        self._known.pop(path.name, None)
        return target

    @staticmethod
    def _strip(path: Path) -> None:
        for name in EPISODE_FILES:
            (path / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class UploadResult:
    """One pass: what got through, what waits, and why (by episode id; ``store`` for all of them).

    ``retry_ns``: when the next pass makes sense; None when nothing waits.
    """

    uploaded: tuple[str, ...]
    dropped: tuple[str, ...]
    waiting: int
    problems: dict[str, str]
    retry_ns: int | None


class Spool:
    """Uploads a queue. Times are the caller's, on any one clock; ``rng`` is for jitter.

    ``step`` is told each step before it is taken: the seam for tests that crash there.
    """

    def __init__(
        self,
        root: Path,
        store: Uploads,
        quota_bytes: int,
        rng: np.random.Generator | None = None,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.queue = Queue(root, quota_bytes, step)
        self.queue.tidy()
        self.problems: dict[str, str] = {}
        self._store = store
        self._rng = np.random.default_rng() if rng is None else rng
        self._step = step
        self._failures = 0  # of the store, in a row
        self._store_ns = 0  # not before this time to the store …
        self._episode_ns: dict[str, int] = {}  # … nor with this episode

    def pending(self) -> list[Manifest]:
        """Manifests of the episodes that wait, the next one first."""
        return [q.manifest for q in self.queue.pending()]

    def upload_once(self, now_ns: int) -> UploadResult:
        """One pass over what waits and is due. Errors are not raised but told, and the data stay.

        A store that is down or slow is tried again with exponential back-off and jitter. A refusal (keys,
        policy, size), a store that gives back other bytes, another episode under the same name, or a file
        that cannot be read is in ``problems`` and is tried again after ``REFUSED_RETRY_S``.
        """
        dropped = self.queue.enforce()
        uploaded: list[str] = []
        if now_ns >= self._store_ns:
            self._pass(now_ns, uploaded)
        waiting = self.queue.pending()
        left = {q.manifest.episode_id for q in waiting} | {d.name for d in self.queue.summaries()}
        kept = left | {d.name.partition(".")[0] for d in self.queue.damaged.iterdir()}
        self.problems = {k: v for k, v in self.problems.items() if k in kept or (k == "store" and left)}
        due = [max(self._store_ns, self._episode_ns.get(i, 0)) for i in left]
        return UploadResult(
            tuple(uploaded), tuple(dropped), len(waiting), dict(self.problems), min(due, default=None)
        )

    def _pass(self, now_ns: int, uploaded: list[str]) -> None:
        refusals = 0
        for q in [*self.queue.pending(), *self._summaries()]:
            episode_id = q.manifest.episode_id
            if now_ns < self._episode_ns.get(episode_id, 0):
                continue
            try:
                if self._deal_with(q):
                    uploaded.append(episode_id)
            except StoreUnavailable as e:
                delay = min(BACKOFF_FIRST_S * 2.0**self._failures, BACKOFF_MAX_S)
                self._failures += 1
                self._store_ns = now_ns + round(delay * 1e9 * self._rng.uniform(0.5, 1.0))
                self.problems["store"] = str(e)
                return
            except (StoreError, OSError) as e:
                self.problems[episode_id] = str(e)
                self._episode_ns[episode_id] = now_ns + round(REFUSED_RETRY_S * 1e9)
                refusals += isinstance(e, StoreError)
                if refusals >= REFUSALS_MAX:
                    self._store_ns = now_ns + round(BACKOFF_MAX_S * 1e9)
                    return
                continue
            refusals = 0
            self._failures = 0
            self._episode_ns.pop(episode_id, None)
            self.problems.pop("store", None)

    def _summaries(self) -> Iterator[Queued]:
        for path in self.queue.summaries():
            try:
                yield Queued(path, read_manifest(path), 0)
            except EpisodeError as e:
                self.queue.set_aside(path, str(e))

    def _deal_with(self, q: Queued) -> bool:
        with self.queue.hold(q.path) as mine:
            if not mine:
                return False
            if q.path.parent == self.queue.dropped:
                self._report_dropped(q)
                return False
            for entry in q.manifest.files:
                path = q.path / entry.name
                if not path.is_file() or sha256_file(path) != entry.sha256:
                    why = f"{path}: not what its manifest says; not uploaded, kept in {self.queue.damaged}"
                    self.problems[q.manifest.episode_id] = why
                    self.queue.set_aside(q.path, why)
                    return False
            self._upload(q)
            return True

    def _upload(self, q: Queued) -> None:
        m = q.manifest
        key = m.prefix + MANIFEST_FILE
        manifest = (q.path / MANIFEST_FILE).read_bytes()
        self._step("look for the manifest")
        if self._stored(key) is None:
            for entry in m.files:
                self._upload_file(m.prefix + entry.name, q.path / entry.name, entry.sha256)
            self._step("create the manifest")
            with suppress(Conflict):  # an uploader before us; whether with the same episode is seen next
                self._store.create(key, manifest)
        self._step("read the manifest back")
        if self._store.get(key) != manifest:
            raise Conflict(
                f"{key}: the store holds another episode of that name; this one stays on the robot"
            )
        self._step("mark")
        self._mark(m, manifest)
        self._step("remove")
        self.queue.remove(q.path)

    def _upload_file(self, key: str, path: Path, sha256: str) -> None:
        found = self._store.stat(key)
        if found is not None and found.size == path.stat().st_size and self._matches(key, sha256):
            return  # from before a restart
        self._step(f"put {path.name}")
        self._store.put(key, path, sha256=sha256)
        self._step(f"read {path.name} back")
        if not self._matches(key, sha256):
            raise IntegrityError(
                f"{key}: the store does not give back what was put; look at the store's disks"
            )

    def _matches(self, key: str, sha256: str) -> bool:
        # The bytes, not what the store says of them: neither a checksum header nor a HEAD is a read.
        try:
            return sha256_bytes(self._store.get(key, sha256=sha256)) == sha256
        except (IntegrityError, NotFound):
            return False

    def _stored(self, key: str) -> bytes | None:
        try:
            return self._store.get(key)
        except NotFound:
            return None

    def _mark(self, m: Manifest, manifest: bytes) -> None:
        """Tell the inbox; under a name that is the same each time."""
        info = self._store.stat(m.prefix + MANIFEST_FILE)
        if info is None:
            raise StoreUnavailable(f"{m.prefix}{MANIFEST_FILE}: written and read, and now it is not there")
        marker = {
            "episode_id": m.episode_id,
            "prefix": m.prefix,
            "manifest_sha256": sha256_bytes(manifest),
            "priority": priority(m),
            "triggers": [t.kind for t in m.triggers],
        }
        arrived = round(info.modified.timestamp() * 1e6) * 1000
        data = json.dumps(marker, sort_keys=True).encode() + b"\n"
        key = f"inbox/{arrived:019d}-{m.episode_id}.json"
        self._store.put(key, data)
        if self._stored(key) not in (data, None):  # None: a turn has claimed it already
            raise IntegrityError(
                f"{key}: the store does not give back what was put; look at the store's disks"
            )

    def _report_dropped(self, q: Queued) -> None:
        """Leave a dropped episode's manifest in the store, unless the whole episode got there after all."""
        if self._stored(q.manifest.prefix + MANIFEST_FILE) is None:
            self._step("report dropped")
            self._store.put(q.manifest.prefix + DROPPED_KEY, (q.path / MANIFEST_FILE).read_bytes())
        self._step("forget dropped")
        self.queue.remove(q.path)


class Stop(Protocol):
    """An event of threading or multiprocessing."""

    def wait(self, timeout: float) -> bool:
        """Wait for it; whether it is set."""


def run(spool: Spool, stop: Stop, period_s: float = 1.0) -> None:
    """Upload until ``stop`` is set: the uploader as a process or thread of its own."""
    while not stop.wait(period_s):
        spool.upload_once(time.monotonic_ns())
