"""Which turn gets which failure: the inbox of the store, and claims on it.

A robot that uploaded an episode leaves a marker in ``inbox/``. A turn claims waiting episodes and removes
their markers. The rules, whatever crashes and however many turns claim at once:

* an episode belongs to at most one turn, for ever, even if its marker appears a second time;
* an episode is either in the inbox or in a claim, never in neither.

The claim itself is one create-only object, the next number of ``state/CLAIMS/``: of turns that race, one
wins and the others look again. Everything after it (marking the episodes as taken, ``claims.json``,
removing markers) only repeats what that object says, so whoever comes next can finish it for a turn that
died half-way: ``settle`` does, before anything new is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import BaseModel

from flywheel.config import TriggerSettings
from flywheel.errors import Conflict, NotFound, StoreError, StoreRefused, StoreUnavailable
from flywheel.schema import Strict
from flywheel.store import ObjectInfo, Store

INBOX = "inbox/"
LOG = "state/CLAIMS"
TAKEN = "state/claimed"
MARKER = re.compile(r"inbox/\d+-(?P<episode_id>[0-9a-f-]{36})\.json")


class Marker(BaseModel):
    """What is read of an inbox marker; a newer robot may say more."""

    episode_id: str
    prefix: str


class Claim(Strict):
    """One episode of a claim. ``problem`` says why it cannot be used; it is dealt with all the same."""

    episode_id: str
    prefix: str  # where it lies in the store
    marker: str  # key of the inbox marker
    problem: str = ""


class Claims(Strict):
    """``claimed/<turn>/claims.json``: the episodes of a turn, in order of arrival."""

    schema_version: int = 1
    turn: str
    episodes: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much waits: markers, and how long ago the store received the oldest."""

    count: int
    oldest_s: float

    def due(self, settings: TriggerSettings) -> bool:
        """Whether this much, or this old, starts a turn."""
        return self.count > 0 and (
            self.count >= settings.min_episodes or self.oldest_s >= settings.max_wait_s
        )


def backlog(store: Store, now: datetime | None = None) -> Backlog:
    """Look at the inbox. Ages are by the store's clock against ``now``: a robot's clock may be wrong."""
    return _backlog([info for info, _ in _markers(store)], now)


def claims_of(store: Store, turn: str) -> Claims:
    """The settled claims of a turn; ``NotFound`` if it has none."""
    return store.get_json(_claims_key(turn), Claims)


def claim(
    store: Store,
    turn: str,
    limit: int,
    enough: Callable[[Backlog], bool] = lambda _: True,
    now: datetime | None = None,
) -> Claims:
    """Claim up to ``limit`` waiting episodes for ``turn``, the oldest first.

    Called again for the same turn, it returns the same claims. With nothing new in the inbox, or a backlog
    that is not ``enough``, the claims are empty and nothing is recorded. Store errors pass through; whatever
    step they cut short is made good by the next call, of this turn or of another.
    """
    while True:
        newest = settle(store)
        if store.exists(_claims_key(turn)):
            return claims_of(store, turn)
        fresh = list(_fresh(store))
        if not fresh or not enough(_backlog([info for info, _ in fresh], now)):
            return Claims(turn=turn, episodes=())
        episodes = (_read(store, *f) for f in fresh[:limit])
        mine = Claims(turn=turn, episodes=tuple(e for e in episodes if e))
        try:
            store.append_version(LOG, newest + 1, mine.to_bytes())
        except Conflict:
            continue  # another turn claimed first: what it took is not ours


def settle(store: Store) -> int:
    """Finish what recorded claims have left undone; returns the number of the newest claim, 0 for none."""
    numbers, done = set[int](), set[int]()
    for info in store.list(f"{LOG}/"):
        stem, _, ending = info.key.removeprefix(f"{LOG}/").partition(".")
        (done if ending == "settled" else numbers).add(int(stem))
    for n in sorted(numbers - done):
        claims = store.get_json(f"{LOG}/{n:08d}.json", Claims)
        for c in claims.episodes:
            store.put(_taken_key(c.episode_id), claims.turn.encode())
        with suppress(Conflict):  # an earlier attempt came this far
            store.create(_claims_key(claims.turn), claims.to_bytes())
        for c in claims.episodes:
            store.delete(c.marker)
        store.put(f"{LOG}/{n:08d}.settled", b"")
    return max(numbers, default=0)


def _markers(store: Store) -> Iterator[tuple[ObjectInfo, str]]:
    """Markers and their episode ids, in order of arrival. Other keys in the inbox are not ours to touch."""
    for info in store.list(INBOX):
        if found := MARKER.fullmatch(info.key):
            yield info, found["episode_id"]


def _fresh(store: Store) -> Iterator[tuple[ObjectInfo, str]]:
    """Markers of episodes that no turn has, one an episode; other markers of an episode are removed."""
    seen: set[str] = set()
    for info, episode_id in _markers(store):
        if episode_id in seen or store.exists(_taken_key(episode_id)):
            store.delete(info.key)
            continue
        seen.add(episode_id)
        yield info, episode_id


def _read(store: Store, info: ObjectInfo, episode_id: str) -> Claim | None:
    try:
        marker = store.get_json(info.key, Marker)
    except NotFound:
        return None  # another turn settled meanwhile; our claim will lose its number and look again
    except (StoreUnavailable, StoreRefused):
        raise
    except StoreError as e:
        return Claim(episode_id=episode_id, prefix="", marker=info.key, problem=str(e))
    problem = "" if marker.episode_id == episode_id else f"its marker names episode {marker.episode_id!r}"
    return Claim(episode_id=episode_id, prefix=marker.prefix, marker=info.key, problem=problem)


def _backlog(markers: list[ObjectInfo], now: datetime | None) -> Backlog:
    oldest = min((m.modified for m in markers), default=None)
    age = ((now or datetime.now(UTC)) - oldest).total_seconds() if oldest else 0.0
    return Backlog(len(markers), max(age, 0.0))


def _claims_key(turn: str) -> str:
    return f"claimed/{turn}/claims.json"


def _taken_key(episode_id: str) -> str:
    return f"{TAKEN}/{episode_id}"
