"""What was read from the store, kept for a few seconds.

No request waits long for a store: what is older than ``ttl_s`` is read again in a thread of its own, one at a
time, and whoever asks meanwhile gets what there was, with its age and the reason why there is nothing newer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from flywheel.errors import FlywheelError, StoreUnavailable

TTL_S = 2.0
FIRST_S = 8.0  # what the first request waits for; later ones are given what there is
PATIENCE_S = 0.25
BACK_OFF_MAX_S = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen[T]:
    """What was read last. ``value`` is None before anything was; ``problem`` says why there is none newer."""

    value: T | None
    at_unix_s: float = 0.0
    problem: str = ""
    down: bool = False  # the problem is a store that does not answer


class Kept[T]:
    """One thing that is read again when it is asked for and old."""

    def __init__(
        self,
        read: Callable[[], T],
        ttl_s: float = TTL_S,
        *,
        first_s: float = FIRST_S,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._read, self._ttl_s, self._clock, self._unix = read, ttl_s, clock, unix
        self._first_s, self._patience_s = first_s, patience_s
        self._lock = threading.Lock()
        self._seen: Seen[T] = Seen(None)
        self._next = -float("inf")
        self._failures = 0
        self._reading: threading.Event | None = None

    def look(self) -> Seen[T]:
        """The newest there is; waits a moment for what is being read."""
        with self._lock:
            if self._reading is None and self._clock() >= self._next:
                self._reading = threading.Event()
                threading.Thread(target=self._refresh, args=(self._reading,), daemon=True).start()
            reading, first = self._reading, self._seen.value is None and not self._seen.problem
        if reading is not None:
            reading.wait(self._first_s if first else self._patience_s)
        with self._lock:
            return self._seen

    def _refresh(self, done: threading.Event) -> None:
        problem, down, value = "", False, None
        try:
            value = self._read()
        except FlywheelError as e:
            problem, down = str(e), isinstance(e, StoreUnavailable)
        except Exception as e:  # a document that no reader foresaw: told, and the page stays up
            log.exception("a part of the fleet page could not be read")
            problem = f"{type(e).__name__} while it was read; the server's log has more"
        with self._lock:
            if problem:
                self._failures += 1
                self._seen = Seen(self._seen.value, self._seen.at_unix_s, problem, down)
            else:
                self._failures = 0
                self._seen = Seen(value, self._unix())
            pause = min(self._ttl_s * 2**self._failures, max(BACK_OFF_MAX_S, self._ttl_s))
            self._next = self._clock() + pause
            self._reading = None
        done.set()


class Shelf[K: Hashable, V]:
    """The last ``size`` things that were made, by key; thread-safe, makes one key twice at worst."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._held: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """What is kept, or what ``make`` returns; nothing is kept of what it raises."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()
        with self._lock:
            self._held[key] = made
            self._held.move_to_end(key)
            while len(self._held) > self._size:
                self._held.popitem(last=False)
        return made
