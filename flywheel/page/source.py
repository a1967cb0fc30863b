"""The store, and what is kept of it between requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from flywheel.errors import StoreUnavailable
from flywheel.page import episodes
from flywheel.page.failures import FailureLog, Index
from flywheel.page.kept import PATIENCE_S, TTL_S, Kept, Shelf
from flywheel.page.robots import Fleet, Tails, read_batches, read_fleet, read_tails
from flywheel.page.rollouts import Detail, Logs, Rollouts, read_detail
from flywheel.page.turns import TurnLog, Turns
from flywheel.rollout import Evidences
from flywheel.store import Store

AT_ONCE = 4  # episodes that are fetched at the same time


class Source:
    """Reads the store that ``open_store`` returns. ``keys`` is the directory with the trusted ``root.json``;
    None or one without it means that signatures are not checked here, and the page says so."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        keys: Path | None = None,
        *,
        ttl_s: float = TTL_S,
        patience_s: float = PATIENCE_S,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self.unix = unix
        self._open_store, self._ttl_s, self._patience_s = open_store, ttl_s, patience_s
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._reports, self._evidence = Evidences(), Evidences()
        logs, turns, index = Logs(keys), TurnLog(), Index()
        self.fleet: Kept[Fleet] = self._kept(lambda s: read_fleet(s, self._reports))
        self.rollouts: Kept[Rollouts] = self._kept(logs.read)
        self.failures: Kept[FailureLog] = self._kept(index.read)
        self.turns: Kept[Turns] = self._kept(turns.read)
        self._details: Shelf[str, Kept[Detail | None]] = Shelf(16)
        self._tails: Shelf[tuple[str, tuple[str, ...]], Kept[dict[str, Tails]]] = Shelf(32)
        self._batches: Shelf[tuple[str, str], Kept[list[Tails]]] = Shelf(32)
        self._opened: Shelf[str, episodes.Opened] = Shelf(8)
        self._thumbnails: Shelf[str, bytes] = Shelf(1024)
        self._fetching = threading.BoundedSemaphore(AT_ONCE)

    def store(self) -> Store:
        """The store; opened anew after it did not answer, because an embedded one may have moved."""
        with self._lock:
            if self._store is None:
                self._store = self._open_store()
            return self._store

    def detail(self, rollout_id: str) -> Kept[Detail | None]:
        """One rollout with its evidence."""

        def read(store: Store) -> Detail | None:
            known = self.rollouts.look().value
            now = round(self.unix() * 1e9)
            return None if known is None else read_detail(store, known, rollout_id, self._evidence, now)

        return self._details.get(rollout_id, lambda: self._kept(read))

    def tails(self, rollout_id: str, robots: tuple[str, ...]) -> Kept[dict[str, Tails]]:
        """The newest batches of a page's robots."""
        key = (rollout_id, robots)
        return self._tails.get(key, lambda: self._kept(lambda s: read_tails(s, rollout_id, robots)))

    def batches(self, rollout_id: str, robot: str) -> Kept[list[Tails]]:
        """The newest batches of one robot."""
        return self._batches.get(
            (rollout_id, robot), lambda: self._kept(lambda s: read_batches(s, rollout_id, robot, 20))
        )

    def episode(self, prefix: str) -> episodes.Opened:
        """One episode, drawn. Raises ``EpisodeError``, ``StoreError``."""
        return self._opened.get(prefix, lambda: self._fetch(lambda s: episodes.open_episode(s, prefix)))

    def thumbnail(self, prefix: str) -> bytes:
        """A JPEG of the moment of failure. Raises ``EpisodeError``, ``StoreError``."""
        return self._thumbnails.get(prefix, lambda: self._fetch(lambda s: episodes.thumbnail(s, prefix)))

    def _fetch[T](self, read: Callable[[Store], T]) -> T:
        if not self._fetching.acquire(timeout=20):
            raise StoreUnavailable("too many episodes are being fetched; try again in a moment")
        try:
            return self._ask(read)
        finally:
            self._fetching.release()

    def _kept[T](self, read: Callable[[Store], T]) -> Kept[T]:
        return Kept(lambda: self._ask(read), self._ttl_s, patience_s=self._patience_s, unix=self.unix)

    def _ask[T](self, read: Callable[[Store], T]) -> T:
        try:
            return read(self.store())
        except StoreUnavailable:
            with self._lock:
                self._store = None
            raise
