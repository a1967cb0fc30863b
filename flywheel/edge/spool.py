"""From the robot's disk to the store, so that nothing acknowledged is lost and nothing gets there twice.

An episode leaves the queue (``queue``) for good only when the store's copy of every file was read back and
matched its sha256, the manifest was created after them, and the inbox marker after that. Each of these steps
may be repeated at any time with the same result: the manifest is a create-only key, and the marker's name
follows from the time at which the store received the manifest.

On a metered link manifests go at once, below ``fleet/pending/``, and data by priority or on request: see
``requests``.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flywheel.edge.queue import Queue, Queued
from flywheel.edge.requests import LOOK_S, Requests, answer, fetch
from flywheel.edge.rules import priority
from flywheel.episode import read_manifest
from flywheel.errors import (
    Conflict,
    EpisodeError,
    IntegrityError,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from flywheel.schema import MANIFEST_FILE, Manifest, sha256_bytes, sha256_file
from flywheel.store import ObjectInfo

__all__ = ["Queue", "Queued", "Spool", "Stop", "UploadResult", "run"]

DROPPED_KEY = "dropped.json"  # in the store, beside where the manifest would be
CLAIMED = "state/claimed"  # where a turn notes that an episode is its own, before it removes the marker
SENT_KEPT = 256  # manifests remembered after they were uploaded, to answer requests

BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 120.0
REFUSED_RETRY_S = 300.0  # nothing changes before a person acts; look again now and then
REFUSALS_MAX = 3  # in a row: then the store refuses everything, and the rest is not tried in this pass


class Uploads(Protocol):
    """What the spool needs of ``flywheel.store.Store``."""

    def put(self, key: str, data: bytes | Path, sha256: str | None = None) -> str: ...
    def put_file(self, key: str, path: Path, sha256: str) -> None: ...
    def create(self, key: str, data: bytes | Path, sha256: str | None = None) -> str: ...
    def get(self, key: str, sha256: str | None = None) -> bytes: ...
    def stat(self, key: str) -> ObjectInfo | None: ...
    def list(self, prefix: str) -> Iterator[ObjectInfo]: ...
    def delete(self, key: str) -> None: ...


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
        robot: str = "",
        metered: Callable[[], int | None] = lambda: None,
        clock_unix_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """``robot``, if given, is answered for when the cloud asks for windows (``requests``). ``metered``
        says what priority goes over the link by itself, None for all: asked before each episode."""
        self.queue = Queue(root, quota_bytes, step)
        self.queue.tidy()
        self.requests = Requests(root) if robot else None
        self._robot, self._metered, self._clock_unix_ns = robot, metered, clock_unix_ns
        self._look_ns = 0
        self._announced: set[str] = set()
        self._sent: deque[Manifest] = deque(maxlen=SENT_KEPT)
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
            self._ask(now_ns)
            self._pass(now_ns, uploaded)
        waiting = self.queue.pending()
        left = {q.manifest.episode_id for q in waiting} | {d.name for d in self.queue.summaries()}
        kept = left | {d.name.partition(".")[0] for d in self.queue.damaged.iterdir()}
        self.problems = {
            k: v for k, v in self.problems.items() if k in kept or (k == "store" and left) or "request" in k
        }
        due = [max(self._store_ns, self._episode_ns.get(i, 0)) for i in left]
        return UploadResult(
            tuple(uploaded), tuple(dropped), len(waiting), dict(self.problems), min(due, default=None)
        )

    def _pass(self, now_ns: int, uploaded: list[str]) -> None:
        refusals = 0
        wanted = self.requests.known() if self.requests is not None else []
        queued = self.queue.pending()
        queued.sort(key=lambda q: not any(r.wants(q.manifest) for r in wanted))  # what is asked for, first
        for q in [*queued, *self._summaries()]:
            episode_id = q.manifest.episode_id
            if now_ns < self._episode_ns.get(episode_id, 0):
                continue
            try:
                if self._held_back(q, any(r.wants(q.manifest) for r in wanted)):
                    self._announce(q)
                elif self._deal_with(q):
                    uploaded.append(episode_id)
                    self._sent.append(q.manifest)
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

    def _ask(self, now_ns: int) -> None:
        """Look for requests, now and then, and tell how far they are."""
        if self.requests is None or now_ns < self._look_ns:
            return
        self._look_ns = now_ns + round(LOOK_S * 1e9)
        try:
            for request in fetch(self._store, self._robot, self.problems):
                self.requests.keep(request)
            queued = [q.manifest for q in self.queue.pending()]
            answer(self._store, self.requests, queued, list(self._sent), self._clock_unix_ns())
        except (StoreError, OSError) as e:
            self.problems["requests"] = str(e)
        else:
            self.problems.pop("requests", None)

    def _held_back(self, q: Queued, wanted: bool) -> bool:
        """Whether an episode stays here because the link is metered; its manifest goes all the same."""
        least = self._metered()
        here = q.path.parent == self.queue.episodes
        return here and not wanted and least is not None and priority(q.manifest) < least

    def _announce(self, q: Queued) -> None:
        """Let the cloud know what there is, so that it can ask for it."""
        if q.manifest.episode_id in self._announced:
            return
        self._step("announce")
        data = (q.path / MANIFEST_FILE).read_bytes()
        key = _pending_key(q.manifest)
        self._store.put(key, data)
        if self._stored(key) != data:
            raise IntegrityError(f"{key}: the store does not give back what was put")
        self._announced.add(q.manifest.episode_id)

    def _withdraw(self, m: Manifest) -> None:
        if self.requests is not None or m.episode_id in self._announced:
            self._step("withdraw the announcement")
            self._store.delete(_pending_key(m))
            self._announced.discard(m.episode_id)

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
        self._withdraw(m)
        self._step("remove")
        self.queue.remove(q.path)

    def _upload_file(self, key: str, path: Path, sha256: str) -> None:
        found = self._store.stat(key)
        if found is not None and found.size == path.stat().st_size and self._matches(key, sha256):
            return  # from before a restart
        self._step(f"put {path.name}")
        self._store.put_file(key, path, sha256)
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
        found = self._stored(key)
        if found is None and self._store.stat(f"{CLAIMED}/{m.episode_id}") is not None:
            return  # a turn was quick
        if found != data:
            raise IntegrityError(
                f"{key}: the store does not give back what was put; look at the store's disks"
            )

    def _report_dropped(self, q: Queued) -> None:
        """Leave a dropped episode's manifest in the store, unless the whole episode got there after all."""
        if self._stored(q.manifest.prefix + MANIFEST_FILE) is None:
            self._step("report dropped")
            self._store.put(q.manifest.prefix + DROPPED_KEY, (q.path / MANIFEST_FILE).read_bytes())
        self._withdraw(q.manifest)  # there is nothing to ask for any more
        self._step("forget dropped")
        self.queue.remove(q.path)


def _pending_key(m: Manifest) -> str:
    return f"fleet/pending/{m.robot}/{m.episode_id}.json"


class Stop(Protocol):
    """An event of threading or multiprocessing."""

    def wait(self, timeout: float) -> bool:
        """Wait for it; whether it is set."""


def run(spool: Spool, stop: Stop, period_s: float = 1.0) -> None:
    """Upload until ``stop`` is set: the uploader as a process or thread of its own."""
    while not stop.wait(period_s):
        spool.upload_once(time.monotonic_ns())
