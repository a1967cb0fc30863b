"""Claims on the inbox: every episode in exactly one turn, whatever crashes and whoever races."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.claims import INBOX, LOG, Backlog, Claims, backlog, claim, claims_of, settle
from flywheel.config import TriggerSettings
from flywheel.errors import StoreUnavailable
from tests.bucket import BucketStore, Killed


class Inbox(BucketStore):
    """The real store on a bucket in memory; ``seam`` is told the number of each request before it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seam: Callable[[int], None] = lambda _: None
        self.server.before = lambda verb, key: self.seam(self.server.requests)

    def held(self) -> list[str]:
        """What is there, without a request."""
        return sorted(self.server.objects)


def episode_id(n: int) -> str:
    return str(uuid.UUID(int=n))


def leave_marker(store: Inbox, n: int, arrival: int | None = None) -> None:
    body = {
        "episode_id": episode_id(n),
        "prefix": f"episodes/site=s/robot=r/date=2026-01-01/{episode_id(n)}/",
    }
    store.server.overwrite(f"{INBOX}{arrival or n + 1:019d}-{episode_id(n)}.json", json.dumps(body).encode())


def inbox(store: Inbox) -> list[str]:
    return [k for k in store.held() if k.startswith(INBOX)]


def owners(store: Inbox) -> dict[str, list[str]]:
    """Episode -> turns whose claims.json holds it."""
    found: dict[str, list[str]] = {}
    for key in store.held():
        if key.startswith("claimed/"):
            claims = Claims.model_validate_json(store.server.data(key))
            for c in claims.episodes:
                found.setdefault(c.episode_id, []).append(claims.turn)
    return found


def drain(store: Inbox) -> None:
    """Later turns, undisturbed, until nothing is left."""
    store.seam = lambda _: None
    for n in range(20):
        if not claim(store, f"turn-late-{n}", 3).episodes:
            return
    raise AssertionError("the inbox never became empty")


def filled(count: int = 5) -> Inbox:
    store = Inbox()
    for n in range(count):
        leave_marker(store, n)
    return store


def operations_of_a_claim() -> int:
    store = filled()
    claim(store, "turn-a", 3)
    return store.server.requests


def test_the_oldest_arrivals_are_claimed_first_and_their_markers_removed() -> None:
    store = filled(5)
    claims = claim(store, "turn-a", 3)
    assert [c.episode_id for c in claims.episodes] == [episode_id(n) for n in range(3)]
    assert len(inbox(store)) == 2
    assert claims_of(store, "turn-a") == claims


def test_a_repeated_claim_returns_the_same_and_takes_no_more() -> None:
    store = filled(5)
    first = claim(store, "turn-a", 3)
    assert claim(store, "turn-a", 3) == first
    assert len(inbox(store)) == 2


def test_an_empty_inbox_records_nothing() -> None:
    store = Inbox()
    assert claim(store, "turn-a", 3).episodes == ()
    assert store.held() == []


def test_too_small_a_backlog_is_left_for_a_later_turn() -> None:
    store = filled(2)
    thresholds = TriggerSettings(min_episodes=3, max_wait_s=60)
    assert claim(store, "turn-a", 9, lambda b: b.due(thresholds)).episodes == ()
    assert len(inbox(store)) == 2
    later = datetime.now(UTC) + timedelta(seconds=61)
    assert len(claim(store, "turn-a", 9, lambda b: b.due(thresholds), later).episodes) == 2


def test_a_marker_that_comes_twice_is_one_episode() -> None:
    store = filled(2)
    leave_marker(store, 0, arrival=77)
    assert len(claim(store, "turn-a", 9).episodes) == 2
    assert inbox(store) == []


def test_a_marker_repeated_after_its_turn_is_removed_and_claimed_by_nobody() -> None:
    store = filled(2)
    claim(store, "turn-a", 9)
    leave_marker(store, 0, arrival=99)
    assert claim(store, "turn-b", 9).episodes == ()
    assert inbox(store) == []


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"episode_id": "x"}', b"\xff"])
def test_a_malformed_marker_is_dealt_with_and_named_rather_than_waking_the_wheel_for_ever(
    body: bytes,
) -> None:
    store = filled(1)
    store.server.overwrite(f"{INBOX}{9:019d}-{episode_id(7)}.json", body)
    claims = claim(store, "turn-a", 9)
    assert [bool(c.problem) for c in claims.episodes] == [False, True]
    assert inbox(store) == []


@pytest.mark.parametrize("name", ["junk", "../../etc.json", "1-x.json", f"1-{'0' * 36}.json.part"])
def test_a_key_that_is_no_marker_neither_counts_nor_stops_the_wheel(name: str) -> None:
    store = filled(1)
    store.server.overwrite(INBOX + name, b"?")
    assert backlog(store).count == 1
    assert len(claim(store, "turn-a", 9).episodes) == 1
    assert inbox(store) == [INBOX + name]
    assert backlog(store).count == 0


def test_a_marker_cannot_name_another_episode_than_its_key() -> None:
    store = Inbox()
    body = json.dumps({"episode_id": episode_id(2), "prefix": "episodes/x/"}).encode()
    store.server.overwrite(f"{INBOX}{1:019d}-{episode_id(1)}.json", body)
    (only,) = claim(store, "turn-a", 9).episodes
    assert episode_id(2) in only.problem


@pytest.mark.parametrize("step", range(1, operations_of_a_claim() + 1))
@pytest.mark.parametrize("comes_back", [True, False])
def test_killed_at_any_step_nothing_is_lost_or_claimed_twice(step: int, comes_back: bool) -> None:
    store = filled(5)

    def kill(n: int) -> None:
        if n == step:
            raise Killed

    store.seam = kill
    with pytest.raises(Killed):
        claim(store, "turn-a", 3)
    store.seam = lambda _: None
    if comes_back:
        assert len(claim(store, "turn-a", 3).episodes) == 3
    drain(store)
    assert {e: len(t) for e, t in owners(store).items()} == {episode_id(n): 1 for n in range(5)}
    assert inbox(store) == []


@pytest.mark.parametrize("step", range(1, operations_of_a_claim() + 1))
def test_a_turn_that_claims_in_the_middle_of_anothers_claim_shares_no_episode(step: int) -> None:
    store = filled(5)

    def intrude(n: int) -> None:
        if n == step:
            store.seam = lambda _: None
            claim(store, "turn-b", 3)

    store.seam = intrude
    first = {c.episode_id for c in claim(store, "turn-a", 3).episodes}
    second = {c.episode_id for c in claims_of(store, "turn-b").episodes}
    assert first
    assert second
    assert not first & second
    drain(store)
    assert sorted(owners(store)) == [episode_id(n) for n in range(5)]


@pytest.mark.parametrize("step", range(1, operations_of_a_claim() + 1))
def test_a_turn_that_dies_in_the_middle_of_anothers_claim_shares_no_episode(step: int) -> None:
    for death in range(1, operations_of_a_claim() + 1):
        store = filled(5)

        def intrude(n: int, store: Inbox = store, death: int = death) -> None:
            if n != step:
                return

            def kill(n: int) -> None:
                if n == step + death:
                    raise Killed

            store.seam = kill
            with suppress(Killed):
                claim(store, "turn-b", 3)
            store.seam = lambda _: None

        store.seam = intrude
        claim(store, "turn-a", 3)
        drain(store)
        assert {e: len(t) for e, t in owners(store).items()} == {episode_id(n): 1 for n in range(5)}, death


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.booleans()), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), min_size=1, max_size=10),
)
def test_any_sequence_of_deaths_turns_and_repeated_markers_gives_each_episode_one_turn(
    attempts: list[tuple[int, int, bool]], markers: list[tuple[int, int]]
) -> None:
    store = Inbox()
    waiting = list(markers)
    for turn, dies_after, another in attempts:
        for n, arrival in waiting[: 2 if another else 1]:
            leave_marker(store, n, arrival)
        waiting = waiting[2 if another else 1 :]
        at = store.server.requests + dies_after

        def kill(n: int, at: int = at) -> None:
            if n >= at:
                raise Killed

        store.seam = kill
        with suppress(Killed):
            claim(store, f"turn-{turn}", 2)
    for n, arrival in waiting:
        leave_marker(store, n, arrival)
    drain(store)
    assert all(len(turns) == 1 for turns in owners(store).values())
    assert set(owners(store)) == {episode_id(n) for n, _ in markers}
    assert inbox(store) == []


def test_a_store_that_fails_half_way_loses_nothing() -> None:
    store = filled(4)

    def fail(n: int) -> None:
        if n > 10:
            raise StoreUnavailable("down")

    store.seam = fail
    with pytest.raises(StoreUnavailable):
        claim(store, "turn-a", 4)
    drain(store)
    assert sorted(owners(store)) == [episode_id(n) for n in range(4)]


def test_a_claim_whose_turn_died_is_finished_by_whoever_comes_next() -> None:
    store = filled(3)
    log = f"{LOG}/00000001.json"

    def kill(_: int) -> None:
        if log in store.held():
            raise Killed

    store.seam = kill
    with pytest.raises(Killed):
        claim(store, "turn-a", 3)
    store.seam = lambda _: None
    assert settle(store) == 1
    assert len(claims_of(store, "turn-a").episodes) == 3
    assert inbox(store) == []


def test_a_backlog_is_due_by_count_or_by_age_and_never_when_empty() -> None:
    thresholds = TriggerSettings(min_episodes=5, max_wait_s=100)
    assert not Backlog(0, 1e9).due(thresholds)
    assert not Backlog(4, 99).due(thresholds)
    assert Backlog(5, 0).due(thresholds)
    assert Backlog(1, 100).due(thresholds)


def test_the_age_of_a_backlog_is_by_the_stores_clock() -> None:
    store, now = filled(2), datetime.now(UTC)
    assert 29 < backlog(store, now + timedelta(seconds=30)).oldest_s <= 30
    assert backlog(store, now - timedelta(hours=1)).oldest_s == 0.0
