"""Whatever the store, the disk or a crash does: every sealed episode is in the store once, or still here."""

from __future__ import annotations

import errno
import itertools
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel import schema
from flywheel.edge.recorder import Recorder
from flywheel.edge.rules import priority
from flywheel.edge.spool import Queue, Spool, run
from flywheel.episode import ls, new_episode_id, pull, read_manifest, verify
from flywheel.errors import EpisodeError, IntegrityError, StoreRefused, StoreUnavailable
from flywheel.schema import Manifest, Trigger, TriggerKind
from tests.recording import IDENTITY, WINDOWS, Stage
from tests.samples import EPOCH_NS, sealed
from tests.stores import MemoryStore

S = 1_000_000_000
MB = 1 << 20


class Crash(BaseException):
    """The process ends here."""


def put_episode(root: Path, seed: int = 0, kind: TriggerKind = TriggerKind.TASK_TIMEOUT) -> Manifest:
    """A short episode that waits; later seeds are younger."""
    (root / "episodes").mkdir(parents=True, exist_ok=True)
    t = seed * 1_000_000
    name = new_episode_id(EPOCH_NS + t, np.random.default_rng(seed))
    trigger = Trigger(kind=kind, t_ns=t)
    return read_manifest(sealed(root / "episodes", 0.1, seed, triggers=(trigger,), episode_id=name))


def spool(root: Path, store: MemoryStore, quota: int = 100 * MB, **options: object) -> Spool:
    return Spool(root, store, quota, rng=np.random.default_rng(0), **options)  # type: ignore[arg-type]


def stored(store: MemoryStore, m: Manifest) -> bool:
    """Whether a reader finds the episode, whole and under its own name."""
    data = {e.name: store.objects.get(m.prefix + e.name) for e in m.files}
    return store.objects[m.prefix + schema.MANIFEST_FILE][0] == m.to_bytes() and all(
        d is not None and schema.sha256_bytes(d[0]) == e.sha256
        for e, d in zip(m.files, data.values(), strict=True)
    )


# ── the way of an episode ────────────────────────────────────────────────────────────────────────────


def test_an_episode_goes_up_file_by_file_manifest_last_then_the_marker(tmp_path: Path) -> None:
    store = MemoryStore()
    m = put_episode(tmp_path)
    result = spool(tmp_path, store).upload_once(0)
    assert result.uploaded == (m.episode_id,)
    assert (result.waiting, result.problems, result.retry_ns) == (0, {}, None)
    assert stored(store, m)
    writes = [(verb, key) for verb, key in store.requests if verb in ("put", "create")]
    assert [k.removeprefix(m.prefix) for _, k in writes[:4]] == [*schema.EPISODE_FILES, schema.MANIFEST_FILE]
    assert writes[3][0] == "create"
    assert list(tmp_path.glob("*/*")) == []


def test_the_marker_names_episode_and_arrival(tmp_path: Path) -> None:
    store = MemoryStore()
    m = put_episode(tmp_path, kind=TriggerKind.SAFETY_STOP)
    spool(tmp_path, store).upload_once(0)
    (key,) = store.keys("inbox/")
    arrived = store.objects[m.prefix + schema.MANIFEST_FILE][1]
    assert key == f"inbox/{round(arrived.timestamp()) * S:019d}-{m.episode_id}.json"
    doc = json.loads(store.objects[key][0])
    assert (doc["episode_id"], doc["prefix"], doc["triggers"]) == (m.episode_id, m.prefix, ["safety_stop"])
    assert doc["manifest_sha256"] == schema.sha256_bytes(m.to_bytes())


def test_what_matters_most_goes_first_then_the_oldest(tmp_path: Path) -> None:
    kinds = [
        TriggerKind.BASELINE,
        TriggerKind.TASK_TIMEOUT,
        TriggerKind.SAFETY_STOP,
        TriggerKind.TASK_TIMEOUT,
    ]
    ms = [put_episode(tmp_path, i, k) for i, k in enumerate(kinds)]
    s = spool(tmp_path, MemoryStore())
    assert s.pending() == [ms[2], ms[1], ms[3], ms[0]]
    assert s.upload_once(0).uploaded == tuple(ms[i].episode_id for i in (2, 1, 3, 0))


def test_listing_and_pulling_give_back_what_was_recorded(tmp_path: Path) -> None:
    store = MemoryStore()
    m = put_episode(tmp_path / "robot")
    spool(tmp_path / "robot", store).upload_once(0)
    listed = list(ls(store))  # type: ignore[arg-type]
    assert [(x.prefix, x.manifest, x.problem) for x in listed] == [(m.prefix, m, "")]
    assert list(ls(store, site="lab", robot="r2")) == []  # type: ignore[arg-type]
    assert list(ls(store, robot="r2")) == []  # type: ignore[arg-type]
    assert len(list(ls(store, date=m.date))) == 1  # type: ignore[arg-type]
    d = pull(store, m.prefix, tmp_path / "here")  # type: ignore[arg-type]
    assert verify(d) == []
    n = len(store.requests)
    assert pull(store, m.prefix, tmp_path / "here") == d  # type: ignore[arg-type]
    assert len(store.requests) == n + 1  # the manifest only


def test_pulling_what_was_tampered_with_leaves_nothing(tmp_path: Path) -> None:
    store = MemoryStore()
    m = put_episode(tmp_path / "robot")
    spool(tmp_path / "robot", store).upload_once(0)
    key = m.prefix + schema.FRAMES_FILE
    data, when = store.objects[key]
    store.objects[key] = (data[:-9] + b"tampered!", when)
    with pytest.raises(IntegrityError):
        pull(store, m.prefix, tmp_path / "here")  # type: ignore[arg-type]
    assert list((tmp_path / "here").iterdir()) == []
    moved = m.prefix.replace("robot=r1", "robot=r2")
    store.objects[moved + schema.MANIFEST_FILE] = (m.to_bytes(), when)
    with pytest.raises(EpisodeError, match="not where it belongs"):
        pull(store, moved, tmp_path / "here")  # type: ignore[arg-type]
    problems = {x.prefix: x.problem for x in ls(store)}  # type: ignore[arg-type]
    assert "not where it belongs" in problems[moved]


# ── a store that misbehaves ──────────────────────────────────────────────────────────────────────────


def test_a_store_that_is_down_is_tried_ever_later_and_loses_nothing(tmp_path: Path) -> None:
    down = True

    def fault(verb: str, key: str) -> None:
        if down:
            raise StoreUnavailable("cannot reach http://127.0.0.1:1; is it up?")

    store = MemoryStore(fault)
    ms = [put_episode(tmp_path, i) for i in range(3)]
    s, now, waits = spool(tmp_path, store), 0, []
    for _ in range(12):
        result = s.upload_once(now)
        assert result.waiting == 3
        assert result.problems == {"store": "cannot reach http://127.0.0.1:1; is it up?"}
        assert result.retry_ns is not None
        waits.append((result.retry_ns - now) / S)
        requests = len(store.requests)
        s.upload_once(result.retry_ns - 1)  # not yet
        assert len(store.requests) == requests == len(waits)  # one request a try, whatever waits
        now = result.retry_ns
    assert all(0.5 * 2**i <= w <= 2**i for i, w in enumerate(waits[:7]))
    assert all(60 <= w <= 120 for w in waits[7:])
    assert len(set(waits)) == 12  # jitter
    down = False
    assert len(s.upload_once(now).uploaded) == 3
    assert all(stored(store, m) for m in ms)
    assert s.problems == {}


def test_a_refusal_keeps_the_data_and_is_told(tmp_path: Path) -> None:
    """401 and 403: never taken for an upload, as others do."""

    def fault(verb: str, key: str) -> None:
        if verb != "get":
            raise StoreRefused("PUT: 403 AccessDenied: check the keys")

    store = MemoryStore(fault)
    ms = [put_episode(tmp_path, i) for i in range(6)]
    s = spool(tmp_path, store)
    result = s.upload_once(0)
    assert (result.uploaded, result.waiting) == ((), 6)
    assert len(result.problems) == 3  # then it does not go on asking
    assert all("403" in p for p in result.problems.values())
    assert store.objects == {}
    store.fault = lambda verb, key: None
    s.upload_once(400 * S)
    assert all(stored(store, m) for m in ms)


def test_one_episode_too_large_holds_up_no_other(tmp_path: Path) -> None:
    ms = [put_episode(tmp_path, i) for i in range(3)]

    def fault(verb: str, key: str) -> None:
        if verb == "put" and key.startswith(ms[1].prefix):
            raise StoreRefused("413 EntityTooLarge")

    store = MemoryStore(fault)
    s = spool(tmp_path, store)
    result = s.upload_once(0)
    assert set(result.uploaded) == {ms[0].episode_id, ms[2].episode_id}
    assert result.problems == {ms[1].episode_id: "413 EntityTooLarge"}
    assert result.retry_ns == 300 * S
    assert s.pending() == [ms[1]]
    assert verify(tmp_path / "episodes" / ms[1].episode_id) == []


@pytest.mark.parametrize("lie", ["lies", "forgets"])
@pytest.mark.parametrize("name", [*schema.EPISODE_FILES, schema.MANIFEST_FILE])
def test_a_store_that_does_not_keep_what_it_acknowledges(tmp_path: Path, lie: str, name: str) -> None:
    lying = True
    store = MemoryStore(
        lambda verb, key: lie if lying and verb in ("put", "create") and key.endswith(name) else None
    )
    m = put_episode(tmp_path)
    s = spool(tmp_path, store)
    result = s.upload_once(0)
    assert (result.uploaded, result.waiting) == ((), 1)
    assert m.episode_id in result.problems
    assert store.keys("inbox/") == []
    lying = False
    if (lie, name) == ("lies", schema.MANIFEST_FILE):  # never overwritten: a person has to look
        assert s.upload_once(301 * S).waiting == 1
        store.delete(m.prefix + name)
    assert s.upload_once(700 * S).uploaded == (m.episode_id,)
    assert stored(store, m)


def test_another_episode_under_the_same_name_is_neither_overwritten_nor_lost(tmp_path: Path) -> None:
    store = MemoryStore()
    m = put_episode(tmp_path)
    store.put(m.prefix + schema.MANIFEST_FILE, m.model_copy(update={"task": "another"}).to_bytes())
    before = dict(store.objects)
    result = spool(tmp_path, store).upload_once(0)
    assert "another episode of that name" in result.problems[m.episode_id]
    assert result.waiting == 1
    assert store.objects == before


def test_an_answer_that_gets_lost_makes_no_second_episode(tmp_path: Path) -> None:
    """Every request in turn is done without the robot hearing of it."""
    for n in itertools.count():
        root = tmp_path / str(n)
        count = itertools.count()
        store = MemoryStore(lambda verb, key, n=n, count=count: "lost" if next(count) == n else None)  # type: ignore[misc]
        m = put_episode(root)
        s = spool(root, store)
        for now in range(0, 1000, 200):
            s.upload_once(now * S)
        assert stored(store, m)
        assert len(store.keys("episodes/")) == 4
        assert len(store.keys("inbox/")) == 1
        assert s.pending() == []
        if next(count) <= n:
            assert n > 10
            return


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────────


def steps_of_an_upload(root: Path) -> list[str]:
    taken: list[str] = []
    put_episode(root)
    spool(root, MemoryStore(), step=taken.append).upload_once(0)
    return taken


def test_a_crash_at_any_step_is_made_good_by_the_next_start(tmp_path: Path) -> None:
    steps = steps_of_an_upload(tmp_path / "plain")
    assert len(steps) == len(set(steps)) >= 11
    for i, at in enumerate(steps):
        root, store = tmp_path / str(i), MemoryStore()
        m = put_episode(root)

        def crash(step: str, at: str = at) -> None:
            if step == at:
                raise Crash

        with pytest.raises(Crash):
            spool(root, store, step=crash).upload_once(0)
        n = len(store.requests)
        assert spool(root, store).upload_once(0).uploaded == (m.episode_id,)
        assert stored(store, m)
        assert len(store.keys("inbox/")) == 1
        assert list(root.glob("*/*")) == []
        again = [k for verb, k in store.requests[n:] if verb == "put" and k.startswith("episodes/")]
        done = [k for verb, k in store.requests[:n] if verb == "put" and k.startswith("episodes/")]
        assert not set(again) & set(done)  # resumed, not repeated


def test_a_crash_between_leaving_the_queue_and_the_disk_is_tidied(tmp_path: Path) -> None:
    put_episode(tmp_path)
    q = Queue(tmp_path, 100 * MB)
    (waiting,) = q.pending()
    waiting.path.rename(tmp_path / ".trash" / waiting.path.name)
    assert spool(tmp_path, MemoryStore()).pending() == []
    assert list(tmp_path.glob("*/*")) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_of_faults_and_crashes_loses_and_doubles_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("mixture")
    answers = st.sampled_from([None, None, None, "lost", "lies", "forgets", "down", "refused", "crash"])
    script = data.draw(st.lists(answers, max_size=60))
    pending = iter(script)

    def fault(verb: str, key: str) -> str | None:
        what = next(pending, None)
        if what == "crash":
            raise Crash
        if what == "down":
            raise StoreUnavailable("down")
        if what == "refused":
            raise StoreRefused("403")
        # A manifest that the store itself damages is for a person: see the test above. And a marker that is
        # gone looks like one that was claimed.
        spared = {"lies": key.endswith(schema.MANIFEST_FILE), "forgets": key.startswith("inbox/")}
        return None if what is None or spared.get(what) else what

    store = MemoryStore(fault)
    ms = [put_episode(root, i) for i in range(2)]
    s, now = spool(root, store), 0
    for _ in range(80):
        now += 400 * S
        try:
            left = s.upload_once(now).waiting
        except Crash:
            s = spool(root, store)
            continue
        waiting = {m.episode_id for m in s.pending()}
        for m in ms:
            assert m.episode_id in waiting or stored(store, m)
        if not left:
            break
    assert s.pending() == []
    assert all(stored(store, m) for m in ms)
    assert len(store.keys("episodes/")) == 8
    markers = [json.loads(store.objects[k][0])["episode_id"] for k in store.keys("inbox/")]
    assert sorted(markers) == sorted(m.episode_id for m in ms)


def test_two_uploaders_on_one_spool_never_work_on_the_same_episode(tmp_path: Path) -> None:
    m = put_episode(tmp_path)
    other = Queue(tmp_path, 100 * MB)
    store = MemoryStore()
    with other.hold(tmp_path / "episodes" / m.episode_id) as mine:
        assert mine
        assert spool(tmp_path, store).upload_once(0).uploaded == ()
        assert store.requests == []
        assert Queue(tmp_path, 0).enforce() == []  # nor is it dropped under the other's hands
    assert spool(tmp_path, store).upload_once(0).uploaded == (m.episode_id,)


# ── a disk that misbehaves ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_an_episode_damaged_on_the_robot_is_kept_aside_and_told(tmp_path: Path, damage: str) -> None:
    bad, good = put_episode(tmp_path, 0), put_episode(tmp_path, 1)
    path = tmp_path / "episodes" / bad.episode_id / schema.CONTROL_FILE
    match damage:
        case "flip":
            path.write_bytes(b"X" + path.read_bytes()[1:])
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "remove":
            path.unlink()
        case "manifest":
            path.with_name(schema.MANIFEST_FILE).write_bytes(b"{")
    store = MemoryStore()
    s = spool(tmp_path, store)
    result = s.upload_once(0)
    assert result.uploaded == (good.episode_id,)
    assert result.waiting == 0
    assert not [k for k in store.objects if bad.episode_id in k]
    (kept,) = (tmp_path / "damaged").iterdir()
    assert kept.name == f"{bad.episode_id}.0"
    assert (kept / "why.txt").read_text()
    assert bad.episode_id in result.problems or damage == "manifest"


def test_a_file_that_cannot_be_read_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = put_episode(tmp_path, 0), put_episode(tmp_path, 1)
    broken = True

    def disk(path: Path) -> str:
        if broken and bad.episode_id in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return schema.sha256_file(path)

    monkeypatch.setattr("flywheel.edge.spool.sha256_file", disk)
    s = spool(tmp_path, MemoryStore())
    result = s.upload_once(0)
    assert (result.uploaded, result.waiting) == ((good.episode_id,), 1)
    assert "Input/output error" in result.problems[bad.episode_id]
    broken = False
    assert s.upload_once(301 * S).uploaded == (bad.episode_id,)


def test_a_dropped_episode_whose_manifest_is_damaged_stops_nothing(tmp_path: Path) -> None:
    m, other = put_episode(tmp_path, 0), put_episode(tmp_path, 1)
    q = Queue(tmp_path, 100 * MB)
    assert q.make_room(1, 9) == [m.episode_id]
    (tmp_path / "dropped" / m.episode_id / schema.MANIFEST_FILE).write_bytes(b"")
    s = spool(tmp_path, MemoryStore())
    assert s.upload_once(0).uploaded == (other.episode_id,)
    assert s.upload_once(1).retry_ns is None


# ── the quota ────────────────────────────────────────────────────────────────────────────────────────


def test_the_quota_drops_the_least_important_and_oldest_and_keeps_their_manifests(tmp_path: Path) -> None:
    kinds = [
        TriggerKind.SAFETY_STOP,
        TriggerKind.BASELINE,
        TriggerKind.TASK_TIMEOUT,
        TriggerKind.BASELINE,
        TriggerKind.TASK_TIMEOUT,
    ]
    ms = [put_episode(tmp_path, i, k) for i, k in enumerate(kinds)]
    size = max(sum(f.bytes for f in m.files) for m in ms)
    down = True

    def fault(verb: str, key: str) -> None:
        if down:
            raise StoreUnavailable("down")

    store = MemoryStore(fault)
    s = spool(tmp_path, store, quota=round(2.5 * size))
    result = s.upload_once(0)
    assert result.dropped == tuple(ms[i].episode_id for i in (1, 3, 2))
    assert s.pending() == [ms[0], ms[4]]
    for i in (1, 2, 3):
        left = tmp_path / "dropped" / ms[i].episode_id
        assert [p.name for p in left.iterdir()] == [schema.MANIFEST_FILE]
        assert read_manifest(left) == ms[i]
    down = False
    s.upload_once(1000 * S)
    assert stored(store, ms[0])
    for i in (1, 2, 3):
        assert store.objects[ms[i].prefix + "dropped.json"][0] == ms[i].to_bytes()
        assert not store.exists(ms[i].prefix + schema.MANIFEST_FILE)  # and so no reader finds an episode
    assert [x.manifest for x in ls(store)] == [ms[0], ms[4]]  # type: ignore[arg-type]
    assert len(store.keys("inbox/")) == 2
    assert list((tmp_path / "dropped").iterdir()) == []


def test_what_got_to_the_store_after_all_is_not_reported_as_dropped(tmp_path: Path) -> None:
    def crash(step: str) -> None:
        if step == "remove":
            raise Crash

    store = MemoryStore()
    m = put_episode(tmp_path)
    with pytest.raises(Crash):
        spool(tmp_path, store, step=crash).upload_once(0)
    s = spool(tmp_path, store, quota=0)
    s.upload_once(0)
    assert stored(store, m)
    assert not store.exists(m.prefix + "dropped.json")
    assert list(tmp_path.glob("*/*")) == []


def test_a_crash_while_dropping_leaves_the_episode_or_its_manifest(tmp_path: Path) -> None:
    m = put_episode(tmp_path)
    q = Queue(tmp_path, 0)
    (waiting,) = q.pending()
    waiting.path.rename(tmp_path / "dropped" / m.episode_id)  # and then the power went
    again = Queue(tmp_path, 0)
    assert again.pending() == []
    assert [d.name for d in again.summaries()] == [m.episode_id]
    assert [p.name for p in (tmp_path / "dropped" / m.episode_id).iterdir()] == [schema.MANIFEST_FILE]


def test_room_is_never_made_at_the_cost_of_what_matters_more(tmp_path: Path) -> None:
    kinds = [TriggerKind.SAFETY_STOP, TriggerKind.BASELINE, TriggerKind.TASK_TIMEOUT]
    ms = [put_episode(tmp_path, i, k) for i, k in enumerate(kinds)]
    q = Queue(tmp_path, 100 * MB)
    assert q.make_room(1, priority(ms[2])) == [ms[1].episode_id]
    assert q.make_room(1 << 40, priority(ms[2])) == [ms[2].episode_id]
    assert q.make_room(1, priority(ms[2])) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not allowed here; the injected ENOSPC in test_recorder.py stands in")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full_gives_up_old_data_for_new_and_loses_no_manifest(small_disk: Path) -> None:
    root = small_disk / "spool"
    queue = Queue(root, 1 << 40)  # the quota is wrong: larger than the disk
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1600 << 10))
    stage = Stage(root / "episodes", make_room=queue.make_room)
    for i in range(12):
        stage.say("task", "start", seed=i)
        stage.play(1.0)
        stage.say("trigger", "dropped_object")
    stage.finish()
    status = stage.recorder.status
    assert (status.sealed, status.refused, status.abandoned) == (12, 0, 0)
    waiting = [q.manifest.seed for q in queue.pending()]
    dropped = [read_manifest(d).seed for d in queue.summaries()]
    assert waiting == list(range(len(dropped), 12))  # the youngest are whole …
    assert dropped == list(range(len(dropped)))  # … of the others the manifest is left
    assert len(dropped) > 3
    assert len(waiting) > 1
    for q in queue.pending():
        assert verify(q.path) == []


# ── together ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_recorded_reaches_the_store_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = MemoryStore()
    s = spool(tmp_path / "r1", store)
    stage = Stage(s.queue.episodes, WINDOWS, replace(IDENTITY, robot="r9"))
    stage.play(1.5)
    stage.say("trigger", "wrong_object")
    stage.play(1.0)
    (m,) = stage.sealed
    original = {p.name: p.read_bytes() for p in (s.queue.episodes / m.episode_id).iterdir()}
    assert s.upload_once(0).uploaded == (m.episode_id,)
    d = pull(store, m.prefix, tmp_path / "cloud")  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in d.iterdir()} == original
    assert isinstance(stage.recorder, Recorder)


def test_run_uploads_until_it_is_told_to_stop(tmp_path: Path) -> None:
    store = MemoryStore()
    m = put_episode(tmp_path)

    class Stop:
        waits = 0

        def wait(self, timeout: float) -> bool:
            self.waits += 1
            return self.waits > 2

    run(spool(tmp_path, store), Stop())
    assert stored(store, m)
