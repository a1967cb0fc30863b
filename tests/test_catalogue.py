"""The catalogue under what happens to it: kills, races, strangers' manifests, damage, deletions."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.catalogue import COLUMNS, Ingested, ingest, ledger, newest
from flywheel.catalogue.ledger import LOG, PARTS, Ledger, Version, read_part
from flywheel.catalogue.rows import Sighting, row, table
from flywheel.errors import StoreRefused, StoreUnavailable
from flywheel.schema import EPISODE_FILES, MANIFEST_FILE, FileEntry, Manifest, Outcome
from flywheel.store import Store
from tests.samples import draft
from tests.stores import Fault, MemoryStore

FILES = tuple(FileEntry(name=n, rows=10, bytes=100, sha256="ab" * 32) for n in EPISODE_FILES)
DAY_NS = 86_400_000_000_000


class Killed(BaseException):
    """kill -9: nothing after it runs."""


def manifest(n: int, **fields: Any) -> Manifest:
    """The n-th of many episodes: a robot, a day and an outcome of its own."""
    values = {"robot": f"r{n % 3}", "outcome": list(Outcome)[n % len(Outcome)], "files": FILES}
    return draft(t0_ns=(n * 7 % 5) * DAY_NS, seed=n, **{**values, **fields})


def put(store: MemoryStore, *episodes: Manifest) -> None:
    for m in episodes:
        for name in EPISODE_FILES:
            store.put(m.prefix + name, b"rows")
        store.put(m.prefix + MANIFEST_FILE, m.to_bytes())


def filled(episodes: int, fault: Fault = lambda verb, key: None) -> MemoryStore:
    store = MemoryStore()
    put(store, *(manifest(n) for n in range(episodes)))
    store.fault = fault
    store.requests.clear()
    return store


def run(store: MemoryStore, **options: Any) -> Ingested:
    return ingest(cast(Store, store), batch_rows=options.pop("batch_rows", 7), **options)


def rows(store: MemoryStore) -> list[dict[str, Any]]:
    """What the catalogue says, whichever parts say it; when an unchanged file arrived again is no matter."""
    _, version = newest(cast(Store, store))
    tables = [read_part(cast(Store, store), p) for p in version.parts]
    whole = pa.concat_tables([*tables, COLUMNS.empty_table()]).sort_by("prefix")
    assert whole.schema == COLUMNS
    found = cast(list[dict[str, Any]], whole.drop_columns(["arrived_ns"]).to_pylist())
    assert len({r["prefix"] for r in found}) == len(found), "an episode is there twice"
    return found


def made_anew(store: MemoryStore) -> list[dict[str, Any]]:
    """What an empty catalogue of the same episodes would say."""
    clean = MemoryStore()
    clean.objects = {k: v for k, v in store.objects.items() if k.startswith("episodes/")}
    run(clean)
    return rows(clean)


# ── what an ingest does ──────────────────────────────────────────────────────────────────────────────


def test_each_manifest_is_read_once_and_has_its_row() -> None:
    store = filled(20)
    assert run(store) == Ingested(seen=20, read=20, refused=0, vanished=0)
    before = dict(store.objects)
    store.requests.clear()
    assert run(store) == Ingested(seen=20, read=0, refused=0, vanished=0)
    assert store.objects == before, "an ingest with no news wrote something"
    assert not [k for verb, k in store.requests if verb == "get" and k.startswith("episodes/")]
    m = manifest(3)
    it = next(r for r in rows(store) if r["episode_id"] == m.episode_id)
    assert (it["prefix"], it["robot"], it["outcome"], it["date"]) == (m.prefix, "r0", "dropped", m.date)
    assert (it["start_ns"], it["seconds"]) == (m.clock_epoch_ns + m.window_ns[0], 1.0)
    assert (it["triggers"], it["bytes"], it["frames_rows"]) == (["task_timeout"], 300, 10)
    assert it["refused"] is None


def test_an_episode_whose_manifest_has_not_arrived_is_none() -> None:
    store = filled(1)
    store.put(manifest(5).prefix + EPISODE_FILES[0], b"rows")
    store.put("episodes/notes/" + MANIFEST_FILE, b"{}")
    assert run(store).seen == 1


@given(st.permutations(range(8)), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_any_order_of_arrival_gives_the_same_catalogue(order: list[int], together: int) -> None:
    """Late ones with old dates included: the days of ``manifest`` go to and fro."""
    store = MemoryStore()
    for a in range(0, len(order), together):
        put(store, *(manifest(n) for n in order[a : a + together]))
        run(store, batch_rows=3)
    assert rows(store) == made_anew(store)
    assert len(rows(store)) == 8


def test_an_episode_that_is_uploaded_twice_is_there_once_and_not_read_again() -> None:
    store = filled(4)
    run(store)
    put(store, manifest(2))
    assert run(store).read == 0
    assert len(rows(store)) == 4


def test_a_manifest_that_was_restored_replaces_its_damaged_row() -> None:
    store = filled(3)
    m = manifest(1)
    store.put(m.prefix + MANIFEST_FILE, m.to_bytes()[:-20])
    assert run(store).refused == 1
    store.put(m.prefix + MANIFEST_FILE, m.to_bytes())
    assert run(store) == Ingested(seen=3, read=1, refused=0, vanished=0)
    assert rows(store) == made_anew(store)


def test_an_episode_that_was_deleted_leaves_the_catalogue() -> None:
    store = filled(9)
    run(store)
    for name in (*EPISODE_FILES, MANIFEST_FILE):
        store.delete(manifest(4).prefix + name)
    assert run(store).vanished == 1
    assert rows(store) == made_anew(store)


# ── killed, raced, cut off ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("done", [False, True], ids=["before the request", "after it"])
@pytest.mark.parametrize("rebuild", [False, True])
def test_an_ingest_killed_at_any_request_and_run_again_gives_the_same_catalogue(
    done: bool, rebuild: bool
) -> None:
    reference = filled(9)
    run(reference, rebuild=rebuild, batch_rows=4)
    requests, wanted = len(reference.requests), rows(reference)
    assert requests > 15
    for fatal in range(requests):
        store = filled(9, _killed_at(fatal, done))
        with pytest.raises((Killed, StoreUnavailable)):
            run(store, rebuild=rebuild, batch_rows=4)
        store.fault = lambda verb, key: None
        run(store)
        assert rows(store) == wanted, f"killed at request {fatal}"


def _killed_at(fatal: int, done: bool) -> Fault:
    """``done``: a write has its effect before the process dies."""
    count = 0

    def fault(verb: str, key: str) -> str | None:
        nonlocal count
        count += 1
        if count != fatal + 1:
            return None
        if done and verb in ("put", "create"):
            return "lost"
        raise Killed

    return fault


@pytest.mark.parametrize("rebuild", [False, True])
def test_two_ingests_at_once_lose_nothing_and_double_nothing(rebuild: bool) -> None:
    """The other one runs through just before each step of this one that it can disturb."""
    calm = filled(9)
    run(calm, batch_rows=4)
    steps = sum(verb in ("create", "list") for verb, _ in calm.requests)
    for at in range(steps):
        store = filled(9)
        other = _Other(store, at, rebuild)
        store.fault = other
        run(store, batch_rows=4)
        assert other.came
        store.fault = lambda verb, key: None
        run(store)
        assert len(rows(store)) == 10
        assert rows(store) == made_anew(store)


class _Other:
    """Another ingest that runs, with a new episode, just before the n-th request that it can disturb."""

    def __init__(self, store: MemoryStore, at: int, rebuild: bool) -> None:
        self._store, self._left, self._rebuild = store, at, rebuild
        self.came = False

    def __call__(self, verb: str, key: str) -> None:
        if self.came or verb not in ("create", "list"):
            return
        self._left -= 1
        if self._left < 0:
            self.came = True
            put(self._store, manifest(30))
            run(self._store, rebuild=self._rebuild, batch_rows=5)


def as_row(n: int, arrived: int = 0, etag: str = "a") -> pa.Table:
    m = manifest(n)
    return table([row(Sighting(m.prefix, 1, etag, arrived), m.to_bytes())])


def test_a_version_made_in_the_place_of_a_swept_one_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that slept while others made many versions, and old ones were removed."""
    monkeypatch.setattr(ledger, "KEPT_VERSIONS", 2)
    asleep = False

    def sleep(verb: str, key: str) -> None:
        nonlocal asleep
        if verb == "create" and key.startswith(LOG) and not asleep:
            asleep = True
            others = Ledger(cast(Store, store))
            for n in range(1, 6):
                others.publish(as_row(n))
                others.sweep()

    store = MemoryStore()
    Ledger(cast(Store, store)).publish(as_row(0))
    store.fault = sleep
    Ledger(cast(Store, store)).publish(as_row(9))
    assert asleep
    assert {r["seed"] for r in rows(store)} == {0, 1, 2, 3, 4, 5, 9}


def test_a_slow_writer_does_not_put_back_what_was_replaced_meanwhile() -> None:
    store = MemoryStore()
    writer = Ledger(cast(Store, store))
    writer.publish(as_row(1, arrived=20, etag="new"))
    writer.publish(as_row(1, arrived=10, etag="old"))
    assert [r["etag"] for r in rows(store)] == ["new"]
    writer.publish(as_row(1, arrived=30, etag="newest"))
    assert [r["etag"] for r in rows(store)] == ["newest"]


def test_a_store_that_goes_down_midway_says_so_and_what_was_published_stays() -> None:
    def down(verb: str, key: str) -> None:
        if published and verb == "get":
            raise StoreUnavailable("store: down")
        if verb == "create" and key.startswith(LOG):
            published.append(key)

    published: list[str] = []
    store = filled(30, down)
    with pytest.raises(StoreUnavailable):
        run(store)
    store.fault = lambda verb, key: None
    kept = len(rows(store))
    assert kept == 7
    assert run(store).read == 30 - kept
    assert rows(store) == made_anew(store)


def test_manifests_that_the_store_denies_do_not_keep_the_others_out() -> None:
    victim = manifest(3).prefix + MANIFEST_FILE

    def deny(verb: str, key: str) -> None:
        if verb == "get" and key == victim:
            raise StoreRefused(f"{key}: 403")

    store = filled(10, deny)
    with pytest.raises(StoreRefused, match="403"):
        run(store)
    assert len(rows(store)) == 9
    store.fault = lambda verb, key: None
    assert run(store).read == 1


# ── strangers' manifests ─────────────────────────────────────────────────────────────────────────────


def _edited(**fields: Any) -> bytes:
    return json.dumps({**json.loads(manifest(1).to_bytes()), **fields}).encode()


HOSTILE = {
    "truncated": (manifest(1).to_bytes()[:100], "malformed", "JSON"),
    "empty": (b"", "malformed", "JSON"),
    "not an object": (b"[1]", "unknown_version", "schema_version"),
    "deeply nested": (b"[" * 100_000, "malformed", "JSON"),
    "from the future": (_edited(schema_version=99), "unknown_version", "99"),
    "another site": (_edited(site="elsewhere"), "misplaced", "elsewhere"),
    "site with a slash": (_edited(site="../../releases"), "malformed", "site"),
    "unknown key": (_edited(evil=1), "malformed", "evil"),
    "seed beyond 64 bits": (_edited(seed=1 << 70), "out_of_range", "seed"),
    "window beyond 64 bits": (
        _edited(window_ns=[manifest(1).window_ns[0], 1 << 80]),
        "out_of_range",
        "end_ns",
    ),
    "bytes beyond 64 bits": (
        _edited(files=[{**f.model_dump(), "bytes": 1 << 66} for f in FILES]),
        "out_of_range",
        "bytes",
    ),
    "a year without number": (_edited(clock_epoch_ns=1 << 90), "malformed", "date"),
    "too large": (b" " * (1 << 20) + manifest(1).to_bytes(), "too_large", "more than"),
    "half a surrogate": (_edited(task="\ud800"), "malformed", ""),
    "a problem of a megabyte": (_edited(site="x" * 900_000), "malformed", "site"),
    "not text": (b"\xff\xfe{}", "malformed", ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_listed_with_its_reason_and_stops_nothing(name: str) -> None:
    data, reason, word = HOSTILE[name]
    store = filled(4)
    m = manifest(1)
    store.put(m.prefix + MANIFEST_FILE, data)
    assert run(store) == Ingested(seen=4, read=4, refused=1, vanished=0)
    bad = [r for r in rows(store) if r["refused"]]
    assert [(r["prefix"], r["refused"], r["site"], r["outcome"]) for r in bad] == [
        (m.prefix, reason, "lab", None)
    ]
    assert word in bad[0]["problem"]
    assert len(bad[0]["problem"]) <= 500
    assert run(store).read == 0, "it was read again"


def test_a_newer_reader_looks_again_at_what_an_older_one_did_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = filled(3)
    store.put(manifest(1).prefix + MANIFEST_FILE, _edited(schema_version=2))
    run(store)
    for module in ("flywheel.catalogue.rows", "flywheel.catalogue.ingesting"):
        monkeypatch.setattr(f"{module}.EPISODE_SCHEMA_VERSION", 2)
    assert run(store).read == 1
    assert run(store).read == 0
    assert len(rows(store)) == 3


# ── parts and versions ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("damage", ["flipped", "missing", "empty"])
def test_a_damaged_part_is_dropped_and_its_manifests_are_read_again(damage: str) -> None:
    store = filled(20)
    run(store)
    before = rows(store)
    _, version = newest(cast(Store, store))
    key = version.parts[0].key
    if damage == "missing":
        store.delete(key)
    else:
        data = bytearray(store.get(key))
        data[len(data) // 2] ^= 1
        store.put(key, bytes(data) if damage == "flipped" else b"")
    assert run(store).read == version.parts[0].rows
    assert rows(store) == before


def test_a_version_that_nobody_can_read_names_the_remedy_and_a_rebuild_is_one() -> None:
    store = filled(5)
    run(store)
    store.put(f"{LOG}/00000002.json", b'{"schema_version": 9, "parts": []}')
    with pytest.raises(Exception, match="--rebuild"):
        run(store)
    run(store, rebuild=True)
    assert rows(store) == made_anew(store)


def test_many_small_ingests_leave_few_parts_and_few_versions() -> None:
    store = MemoryStore()
    for n in range(80):
        put(store, manifest(n))
        run(store)
    _, version = newest(cast(Store, store))
    assert len(version.parts) <= 2 * ledger.FAN
    assert len(store.keys(f"{LOG}/")) <= ledger.KEPT_VERSIONS + 1
    assert rows(store) == made_anew(store)


def test_only_parts_that_no_version_names_are_swept_and_only_when_they_are_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = filled(20)
    run(store)
    orphan = PARTS + "0" * 32 + ".parquet"
    store.put(orphan, b"left by a crash")
    put(store, manifest(50))
    run(store)
    assert orphan in store.objects
    monkeypatch.setattr(ledger, "ORPHAN_AGE", timedelta(seconds=1))
    put(store, manifest(51))
    run(store)
    assert orphan not in store.objects
    assert rows(store) == made_anew(store)
    for key in store.keys(f"{LOG}/"):
        named = Version.model_validate_json(store.get(key)).parts
        assert all(p.key in store.objects for p in named), "a version that is kept names a part that is gone"


# ── everything together ──────────────────────────────────────────────────────────────────────────────

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "again", "damage", "delete", "ingest", "killed", "raced", "rebuild"]),
        st.integers(0, 9),
    ),
    max_size=14,
)


@given(EVENTS)
@settings(max_examples=60, deadline=None)
def test_whatever_happened_the_next_ingest_makes_it_true(events: list[tuple[str, int]]) -> None:
    store = MemoryStore()
    for what, n in events:
        m = manifest(n)
        if what in ("arrive", "again"):
            put(store, m)
        elif what == "damage":
            store.put(m.prefix + MANIFEST_FILE, m.to_bytes()[: 50 + n])
        elif what == "delete":
            store.delete(m.prefix + MANIFEST_FILE)
        elif what == "killed":
            left = 3 * n

            def kill(verb: str, key: str) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed

            store.fault = kill
            try:
                run(store, batch_rows=2)
            except Killed:
                pass
            finally:
                store.fault = lambda verb, key: None
        elif what == "raced":
            store.fault = _overtaken(store, m)
            run(store, batch_rows=2)
            store.fault = lambda verb, key: None
        else:
            run(store, batch_rows=2, rebuild=what == "rebuild")
    run(store)
    assert rows(store) == made_anew(store)


def _overtaken(store: MemoryStore, m: Manifest) -> Fault:
    """Another ingest, with one episode more, publishes just before this one."""
    done = False

    def fault(verb: str, key: str) -> None:
        nonlocal done
        if verb == "create" and key.startswith(LOG) and not done:
            done = True
            put(store, m)
            run(store, batch_rows=3)

    return fault
