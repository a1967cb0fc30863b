"""Back-ups: consistent while the wheel turns, whole or recognisably not, and believed only once verified."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flywheel import backup
from flywheel.backup.order import TIERS, missing_numbers, tier_of
from flywheel.claims import INBOX, LOG, Claims, claim, claims_of
from flywheel.cli import app
from flywheel.edge.updater import Action
from flywheel.errors import ConfigError, IntegrityError, ServiceError, StoreError
from flywheel.rehearsal.site import Site
from flywheel.release import Publisher, ceremony
from flywheel.schema import Group, bundle_digest
from flywheel.store import Store
from tests.bucket import BucketStore, Killed
from tests.checkouts import git, make_checkout
from tests.deliveries import make_bundle, robot, stable, warm_up

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def site(site: Site) -> Site:
    site.server.arrived = dict.fromkeys(site.server.objects, datetime.now(UTC))
    return site


def arrive(store: BucketStore, n: int) -> str:
    """What a robot writes of an episode, in its order: files, manifest, marker."""
    episode = str(uuid.UUID(int=n))
    prefix = f"episodes/site=s/robot=r/date=2026-01-01/{episode}/"
    store.put(f"{prefix}control.parquet", b"rows %d" % n)
    store.create(f"{prefix}manifest.json", json.dumps({"episode_id": episode}).encode())
    marker = {"episode_id": episode, "prefix": prefix}
    store.put(f"{INBOX}{n:019d}-{episode}.json", json.dumps(marker).encode())
    return episode


def restored(directory: Path, tmp_path: Path, **options: Any) -> tuple[BucketStore, backup.Restored]:
    """A back-up in an empty store and an empty state directory."""
    into = BucketStore()
    done = backup.restore(directory, into, tmp_path / uuid.uuid4().hex, None, **options)
    return into, done


# ── consistent while everybody goes on ──────────────────────────────────────────────────────────────


def work(site: Site, begun: int) -> Iterator[Callable[[], object]]:
    """What the wheel does meanwhile, step by step, for ever."""
    n = begun
    while True:
        first, second = n, n + 1
        n += 2
        yield lambda k=first: arrive(site.store, k)  # type: ignore[misc]
        yield lambda k=first: claim(site.store, f"turn-{k}", 10)  # type: ignore[misc]
        yield lambda k=second: arrive(site.store, k)  # type: ignore[misc]
        yield lambda k=first: site.publisher.publish(  # type: ignore[misc]
            made := make_bundle(site.root / f"meanwhile-{k}", "new"), stable(made)
        )
        yield lambda k=second: (  # type: ignore[misc]
            site.store.put(f"rollouts/r/inputs/{k}.json", b"{}"),
            site.store.append_version("rollouts/r", _next(site.store, "rollouts/r"), b'{"input": "%d"}' % k),
        )


def _next(store: Store, log: str) -> int:
    head = store.latest(log)
    return head[0] + 1 if head else 1


def sound(store: BucketStore, home: Path) -> None:
    """Every name in the store has its object; every episode a marker or a claim, and at most one turn."""
    state = Publisher(store, home / "keys").load()
    for role in state.roles.values():
        for path, target in role.targets.items():
            prefix, _, name = path.rpartition("/")
            store.get(f"releases/targets/{prefix}/{target.hashes['sha256']}.{name}", target.hashes["sha256"])
    store.get("releases/metadata/timestamp.json")
    logs: dict[str, set[int]] = {}
    for key in store.server.objects:
        log, _, name = key.rpartition("/")
        if log in ("releases/log", LOG, "rollouts/r") and name.endswith(".json"):
            logs.setdefault(log, set()).add(int(name[:8]))
    for log, numbers in logs.items():
        assert numbers == set(range(1, max(numbers) + 1)), f"{log} has gaps: {sorted(numbers)}"
    for key in (k for k in store.server.objects if k.startswith("rollouts/r/0")):
        assert f"rollouts/r/inputs/{json.loads(store.get(key))['input']}.json" in store.server.objects
    # A turn that claims now takes all that waits, and finishes what others left.
    claim(store, "turn-after", 1000)
    owners: dict[str, list[str]] = {}
    for key in [k for k in store.server.objects if k.startswith("claimed/")]:
        for c in Claims.model_validate_json(store.get(key)).episodes:
            owners.setdefault(c.episode_id, []).append(key)
            assert f"{c.prefix}manifest.json" in store.server.objects, f"{key} names what is not there"
            assert f"{c.prefix}control.parquet" in store.server.objects
    there = {k.split("/")[-2] for k in store.server.objects if k.endswith("/manifest.json")}
    assert set(owners) == there, "an episode that no turn will ever take"
    assert all(len(found) == 1 for found in owners.values()), owners


CYCLE = 5  # steps of work


@pytest.mark.parametrize("every", [1, 7, "LIST"])
def test_a_backup_of_a_store_in_use_is_one_that_could_have_been(
    template: Site, tmp_path: Path, every: int | str
) -> None:
    """The wheel takes a step at every so many requests of the back-up; or five steps at one of its listings,
    each of them in turn."""
    at, listings = 0, 1
    while at < listings:
        found = _meanwhile(template, tmp_path / f"{at}", every, at)
        listings = found if every == "LIST" else 1
        at += 1


def _meanwhile(template: Site, tmp_path: Path, every: int | str, at: int) -> int:
    """One back-up during which work is done, and what comes of restoring it; how often it listed."""
    site = template.copy(tmp_path / "site")
    steps = work(site, 1)
    for _ in range(CYCLE + 3):  # one waits in the inbox
        next(steps)()
    lock, requests, listings = threading.RLock(), 0, 0

    def meanwhile(verb: str, key: str) -> None:
        nonlocal requests, listings
        with lock:
            site.server.before = lambda verb, key: None
            if isinstance(every, int):
                now = int(requests % every == 0)
            else:
                now = CYCLE * (verb == "LIST" and listings == at)
            for _ in range(now):
                next(steps)()
            requests, listings = requests + 1, listings + (verb == "LIST")
            site.server.before = meanwhile

    site.server.before = meanwhile
    made = backup.make(tmp_path / "b", site.store, site.root, None)
    site.server.before = lambda verb, key: None
    assert made.damaged == ()
    into, done = restored(tmp_path / "b", tmp_path)
    assert done.objects == made.objects
    sound(into, site.root)
    # The next one, in quiet, has everything.
    backup.make(tmp_path / "b", site.store, site.root, None)
    into, _ = restored(tmp_path / "b", tmp_path)
    held = {k: v[0] for k, v in site.server.objects.items()}
    assert {k: v[0] for k, v in into.server.objects.items()} == held
    return listings


def test_a_listing_that_shows_a_later_number_without_an_earlier_one_loses_neither() -> None:
    assert missing_numbers(["a/00000001.json", "a/00000004.json", "b/00000009.json", "a/x.json"]) == [
        "a/00000002.json",
        "a/00000003.json",
    ]


def test_everything_is_restored_before_what_names_it() -> None:
    """A restore writes the tiers backwards: who looks meanwhile never sees a name without its object."""
    prefix = "episodes/site=s/robot=r/date=d/e/"
    written_by_writers = [
        [f"{prefix}control.parquet", f"{prefix}manifest.json", f"{INBOX}{1:019d}-{uuid.UUID(int=1)}.json"],
        ["releases/targets/stable/ab.policy.onnx", "releases/metadata/1.stable.json",
         "releases/log/00000001.json", "releases/metadata/timestamp.json"],
        ["rollouts/r/inputs/ab.json", "rollouts/r/00000002.json"],
        [f"{LOG}/00000001.json", "state/claimed/e", "claimed/t/claims.json", f"{LOG}/00000001.settled"],
        ["dvc/files/md5/ab/cd", "dvc/files/md5/ab/ce.dir", "runs/t/workspace/dvc.lock",
         "runs/t/result.json"],
        ["bundles/ab/policy.onnx", "policies/ab.json", "runs/t/result.json"],
        ["catalogue/parts/a.parquet", "catalogue/log/00000001.json"],
        ["runs/t/source.patch", "runs/t/turn.json", "runs/t/workspace/dvc.lock"],
    ]  # fmt: skip
    for keys in written_by_writers:
        tiers = [tier_of(k) for k in keys]
        assert tiers == sorted(tiers, reverse=True), keys
    assert tier_of("something/new") == len(TIERS)


# ── whole, or recognisably not ──────────────────────────────────────────────────────────────────────


def test_killed_half_way_it_is_no_backup_and_the_next_run_copies_only_the_rest(
    site: Site, tmp_path: Path
) -> None:
    for n in range(1, 40):
        arrive(site.store, n)
    gets = 0

    def die(verb: str, key: str) -> None:
        nonlocal gets
        gets += verb == "GET"
        if gets > 60:
            raise Killed

    site.server.before = die
    with pytest.raises(Killed):
        backup.make(tmp_path / "b", site.store, site.root, None)
    site.server.before = lambda verb, key: None
    with pytest.raises(ConfigError, match=r"no finished back-up \(one broke off"):
        restored(tmp_path / "b", tmp_path)
    # Its last line was cut off in the middle, and half an object lies about.
    with (tmp_path / "b/unfinished.jsonl").open("ab") as f:
        f.write(b'{"kind":"object","na')
    (tmp_path / "b/incoming").mkdir(exist_ok=True)
    (tmp_path / "b/incoming/half").write_bytes(b"x")
    made = backup.make(tmp_path / "b", site.store, site.root, None)
    assert made.objects == len(site.server.objects)
    assert 0 < made.copied <= made.objects - 40
    assert not (tmp_path / "b/incoming").exists()
    again = backup.make(tmp_path / "b", site.store, site.root, None)
    assert (again.copied, again.objects) == (0, made.objects)
    into, done = restored(tmp_path / "b", tmp_path)
    assert done.objects == made.objects
    sound(into, site.root)


def test_a_backup_that_breaks_off_leaves_the_one_before_it_whole(site: Site, tmp_path: Path) -> None:
    first = backup.make(tmp_path / "b", site.store, site.root, None)
    held = {k: v[0] for k, v in site.server.objects.items()}
    arrive(site.store, 1)
    site.store.put("releases/metadata/timestamp.json", b"half of it")

    def die(verb: str, key: str) -> None:
        if verb == "GET" and key.startswith("episodes/"):
            raise Killed

    site.server.before = die
    with pytest.raises(Killed):
        backup.make(tmp_path / "b", site.store, site.root, None)
    into, done = restored(tmp_path / "b", tmp_path)
    assert done.name == first.name
    assert any("broke off" in note for note in done.notes)
    assert {k: v[0] for k, v in into.server.objects.items()} == held


def test_each_backup_of_a_directory_can_be_restored(site: Site, tmp_path: Path) -> None:
    first = backup.make(tmp_path / "b", site.store, site.root, None)
    site.store.put("fleet/robots/r1.json", b"changed")
    site.store.delete("releases/metadata/timestamp.json")
    backup.make(tmp_path / "b", site.store, site.root, None)
    into, _ = restored(tmp_path / "b", tmp_path, of=first.name)
    assert "releases/metadata/timestamp.json" in into.server.objects
    into, _ = restored(tmp_path / "b", tmp_path)
    assert "releases/metadata/timestamp.json" not in into.server.objects
    with pytest.raises(ConfigError, match=r"no back-up '\.\./x'"):
        restored(tmp_path / "b", tmp_path, of="../x")


def test_a_directory_of_other_things_is_not_written_to(site: Site, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("…")
    with pytest.raises(ConfigError, match="other things than back-ups"):
        backup.make(tmp_path / "b", site.store, site.root, None)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["thesis.tex"]


def test_two_backups_at_once_into_one_directory_are_refused(site: Site, tmp_path: Path) -> None:
    with (
        backup.Directory(tmp_path / "b").writing(),
        pytest.raises(ConfigError, match="another back-up writes there"),
    ):
        backup.make(tmp_path / "b", site.store, site.root, None)


def test_an_object_damaged_in_the_store_is_named_and_an_earlier_copy_kept(site: Site, tmp_path: Path) -> None:
    site.store.put("gates/a.json", b"sound")
    site.store.put("gates/b.json", b"sound")
    backup.make(tmp_path / "b", site.store, site.root, None)
    _, metadata = site.server.objects["gates/a.json"]
    site.server.objects["gates/a.json"] = (b"spoilt", metadata)
    site.store.put("gates/new.json", b"new")
    _, metadata = site.server.objects["gates/new.json"]
    site.server.objects["gates/new.json"] = (b"bad", metadata)
    made = backup.make(tmp_path / "b", site.store, site.root, None)
    assert len(made.damaged) == 2
    assert "gates/a.json" in made.damaged[0]
    assert "earlier back-up is kept" in made.damaged[0]
    into, done = restored(tmp_path / "b", tmp_path)
    assert into.server.data("gates/a.json") == b"sound"
    assert "gates/new.json" not in into.server.objects
    assert sum("damaged in the store" in note for note in done.notes) == 2


def test_dvcs_objects_without_a_stored_hash_are_held_against_their_names(site: Site, tmp_path: Path) -> None:
    key = "dvc/files/md5/5d/41402abc4b2a76b9719d911017c592"  # of "hello"
    site.server.objects[key] = (b"hello", {})
    assert backup.make(tmp_path / "b", site.store, site.root, None).damaged == ()
    site.server.objects[key] = (b"hellx", {})
    made = backup.make(tmp_path / "other", site.store, site.root, None)
    assert [key in line for line in made.damaged] == [True]


def test_keys_of_other_programs_do_not_stop_it(site: Site, tmp_path: Path) -> None:
    site.server.objects["folder/"] = (b"", {})
    site.server.objects["a/../b"] = (b"x", {})
    site.server.objects["probe/1"] = (b"x", {})
    made = backup.make(tmp_path / "b", site.store, site.root, None)
    assert len(made.left_out) == 2
    assert made.objects == len(site.server.objects) - 3


# ── believed only once verified ─────────────────────────────────────────────────────────────────────


def test_a_flipped_byte_is_refused_by_name_before_anything_is_written(site: Site, tmp_path: Path) -> None:
    site.store.put("gates/a.json", b"a gate report")
    backup.make(tmp_path / "b", site.store, site.root, None)
    entry = next(e for e in backup.Directory(tmp_path / "b").read()[1] if e.name == "gates/a.json")
    path = backup.Directory(tmp_path / "b").path(entry)
    path.write_bytes(b"a gatE report")
    into, home = BucketStore(), tmp_path / "home"
    with pytest.raises(IntegrityError, match=r"gates/a\.json: .* was changed or damaged"):
        backup.check(tmp_path / "b")
    with pytest.raises(IntegrityError, match=r"gates/a\.json: .* was changed or damaged"):
        backup.restore(tmp_path / "b", into, home, None)
    assert not into.server.objects
    assert not home.exists()
    # A link to a file with the right content is no content of the back-up either.
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(b"a gate report")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="plain files only"):
        backup.check(tmp_path / "b")
    path.unlink()
    path.write_bytes(b"a gatE report")
    assert backup.make(tmp_path / "b", site.store, site.root, None).copied == 0
    assert backup.make(tmp_path / "b", site.store, site.root, None, verify=True).copied == 1
    assert backup.check(tmp_path / "b").verified


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "../../etc/passwd"}, "relative"),
        ({"name": "a//b"}, "empty"),
        ({"name": "/etc/passwd"}, "empty, relative"),
        ({"sha256": "../../../etc/passwd"}, "sha256"),
        ({"size": -1}, "size"),
        ({"kind": "file", "name": "../.bashrc"}, "a back-up has"),
        ({"kind": "file", "name": "keys/timestamp-1.pem"}, "a back-up has"),
        ({"kind": "secret", "name": "keys/../../x.pem"}, "no back-up has that"),
        ({"kind": "secret", "name": "keys/retired/../../x.pem"}, "no back-up has that"),
        ({"kind": "secret", "name": "/etc/ssl/key.pem"}, "no back-up has that"),
        ({"more": 1}, "more"),
    ],
)
def test_a_manifest_that_names_what_no_backup_has_is_refused(
    site: Site, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    """It may come from anywhere, with hashes that agree."""
    backup.make(tmp_path / "b", site.store, site.root, None)
    path = next((tmp_path / "b/manifests").iterdir())
    *lines, end = path.read_bytes().splitlines(keepends=True)
    lines[-1] = json.dumps(json.loads(lines[-1]) | change).encode() + b"\n"
    sha = hashlib.sha256(b"".join(lines)).hexdigest()
    path.write_bytes(b"".join(lines) + json.dumps(json.loads(end) | {"sha256": sha}).encode() + b"\n")
    into = BucketStore()
    with pytest.raises(IntegrityError, match=says):
        backup.restore(tmp_path / "b", into, tmp_path / "home", None)
    assert not into.server.objects
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b.replace(b"fleet", b"fleeT", 1)])
def test_a_manifest_that_was_cut_off_or_changed_is_refused(
    site: Site, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    site.store.put("fleet/robots/r9.json", b"{}")
    backup.make(tmp_path / "b", site.store, site.root, None)
    path = next((tmp_path / "b/manifests").iterdir())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(IntegrityError):
        restored(tmp_path / "b", tmp_path)


def test_a_store_in_use_is_not_restored_into_and_nothing_is_ever_overwritten(
    site: Site, tmp_path: Path
) -> None:
    site.store.put("gates/a.json", b"backed up")
    made = backup.make(tmp_path / "b", site.store, site.root, None)
    into, home = BucketStore(), tmp_path / "home"
    into.put("gates/a.json", b"somebody's")
    into.put("gates/b.json", b"theirs alone")
    with pytest.raises(ConfigError, match="holds 2 objects"):
        backup.restore(tmp_path / "b", into, home, None)
    assert len(into.server.objects) == 2
    done = backup.restore(tmp_path / "b", into, home, None, into_existing=True)
    assert done.different == ["gates/a.json"]
    assert done.objects == made.objects - 1
    assert into.get("gates/a.json") == b"somebody's"
    # Again, as after a restore that broke off: there is nothing left to do.
    done = backup.restore(tmp_path / "b", into, home, None, into_existing=True)
    assert (done.objects, done.different) == (0, ["gates/a.json"])


def test_a_restore_that_is_killed_is_finished_by_another_and_shows_no_name_without_its_object(
    site: Site, tmp_path: Path
) -> None:
    for n in range(1, 6):
        arrive(site.store, n)
    claim(site.store, "turn-a", 3)
    made = backup.make(tmp_path / "b", site.store, site.root, None)
    into, home = BucketStore(), tmp_path / "home"
    puts = 0

    def die(verb: str, key: str) -> None:
        nonlocal puts
        puts += verb == "PUT"
        if puts > made.objects // 2:
            raise Killed

    into.server.before = die
    with pytest.raises(Killed):
        backup.restore(tmp_path / "b", into, home, None)
    into.server.before = lambda verb, key: None
    assert "releases/metadata/timestamp.json" not in into.server.objects
    assert not [k for k in into.server.objects if k.startswith(INBOX)]
    done = backup.restore(tmp_path / "b", into, home, None, into_existing=True)
    assert done.objects + done.present >= made.objects
    sound(into, site.root)
    assert len(claims_of(into, "turn-a").episodes) == 3


def test_another_fleets_backup_does_not_replace_the_anchor_of_trust(site: Site, tmp_path: Path) -> None:
    other = Site.make(tmp_path / "other")
    backup.make(tmp_path / "b", other.store, other.root, None)
    into = BucketStore()
    with pytest.raises(ConfigError, match="another fleet's trust"):
        backup.restore(tmp_path / "b", into, site.root, None, into_existing=True)
    assert not into.server.objects


def test_robots_that_saw_newer_metadata_follow_again_once_the_online_keys_are_rotated(
    site: Site, tmp_path: Path
) -> None:
    """A restore is a roll-back, which is what they are built to refuse."""
    backup.make(tmp_path / "b", site.store, site.root, None, keys=True)
    site.publisher.publish(site.new, stable(site.new))
    with robot(site.root, site.store, site.publisher) as r:
        assert r.poll(warm_up).action is Action.SWAPPED
        r.confirm()
    into = BucketStore()
    home = tmp_path / "home"
    done = backup.restore(tmp_path / "b", into, home, None, keys=True)
    assert "verified" in done.releases
    assert any("keys rotate timestamp" in note for note in done.notes)
    publisher = Publisher(into, home / "keys")
    third = make_bundle(tmp_path, "third")
    publisher.publish(third, stable(third))
    with robot(site.root, into, publisher) as r:
        found = r.poll(warm_up)
        assert found.action is not Action.SWAPPED
    ceremony.rotate(publisher, "timestamp")
    ceremony.rotate(publisher, "snapshot")
    with robot(site.root, into, publisher) as r:
        assert r.poll(warm_up).action is Action.SWAPPED
        active = r.active()
        assert active is not None
        assert active.digest == bundle_digest(third)
    release = publisher.current(Group.STABLE)
    assert release is not None
    assert release.digest == bundle_digest(third)


# ── keys, database, experiments ─────────────────────────────────────────────────────────────────────


def test_signing_keys_leave_only_when_asked_for_and_stay_their_owners(site: Site, tmp_path: Path) -> None:
    pems = {p.name: p.read_bytes() for p in (site.root / "keys").glob("*.pem")}
    (site.root / "airflow").mkdir()
    (site.root / "airflow/airflow.cfg").write_text("[core]\nfernet_key = very-secret\n")
    made = backup.make(tmp_path / "plain", site.store, site.root, None)
    assert made.secrets == 0
    content = b"".join(p.read_bytes() for p in (tmp_path / "plain").rglob("*") if p.is_file())
    for data in (*pems.values(), b"very-secret"):
        assert data not in content
    with pytest.raises(ConfigError, match="made without --keys"):
        restored(tmp_path / "plain", tmp_path, keys=True)

    made = backup.make(tmp_path / "b", site.store, site.root, None, keys=True)
    assert made.secrets == len(pems) + 1
    for path in (tmp_path / "b/secrets").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o700
    backup.restore(tmp_path / "b", BucketStore(), tmp_path / "h1", None)
    assert sorted(p.name for p in (tmp_path / "h1/keys").iterdir()) == ["root.json"]
    done = backup.restore(tmp_path / "b", BucketStore(), tmp_path / "h2", None, keys=True)
    assert done.secrets == len(pems) + 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "h2/keys").glob("*.pem")} == pems
    for path in (tmp_path / "h2").rglob("*.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "h2/keys").stat().st_mode) == 0o700
    assert not any(p in json.dumps(made.__dict__) for p in ("PRIVATE", "very-secret"))


def test_airflows_database_is_one_moments_state_while_tasks_write_to_it(site: Site, tmp_path: Path) -> None:
    db = site.root / "airflow/airflow.db"
    db.parent.mkdir()
    (site.root / "airflow/migrated").write_text("3.3.2")
    with closing(sqlite3.connect(db)) as c:
        c.execute("create table a (n)")
        c.execute("create table b (n)")
        c.commit()
    stop = threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(db, timeout=30)) as c:
            n = 0
            while not stop.is_set():
                with c:  # both rows, or neither
                    c.execute("insert into a values (?)", (n := n + 1,))
                    c.execute("insert into b values (?)", (n,))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        made = [backup.make(tmp_path / "b", site.store, site.root, None) for _ in range(2)]
    finally:
        stop.set()
        thread.join()
    assert "airflow/airflow.db" in made[-1].files
    home = tmp_path / "home"
    (home / "airflow").mkdir(parents=True)
    (home / "airflow/migrated").write_text("4.0.0")
    backup.restore(tmp_path / "b", BucketStore(), home, None)
    with closing(sqlite3.connect(home / "airflow/airflow.db")) as c:
        (a,) = c.execute("select count(*) from a").fetchone()
        (b,) = c.execute("select count(*) from b").fetchone()
    assert a == b
    assert not (home / "airflow/migrated").exists(), "the database would not be brought to this version"


def test_a_database_that_is_no_file_of_ours_is_said_to_be_missing_without_its_password(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql+psycopg2://airflow:hunter2@db/af")
    made = backup.make(tmp_path / "b", site.store, site.root, None)
    assert any("pg_dump" in note and "SQL_ALCHEMY_CONN" in note for note in made.notes)
    assert "hunter2" not in json.dumps(made.__dict__)
    monkeypatch.delenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN")
    (site.root / "airflow").mkdir()
    (site.root / "airflow/airflow.db").write_bytes(b"SQLite format 3\0 and then nonsense" * 100)
    with pytest.raises(ServiceError, match="Airflow's database"):
        backup.make(tmp_path / "b", site.store, site.root, None)


def test_experiments_come_back_beside_whatever_a_checkout_has(site: Site, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    head = git(checkout, "rev-parse", "HEAD")
    tree = git(checkout, "rev-parse", "HEAD^{tree}")
    ident = ("-c", "user.name=t", "-c", "user.email=t@localhost")

    def experiment(name: str, message: str) -> str:
        commit = git(checkout, *ident, "commit-tree", tree, "-p", head, "-m", message)
        git(checkout, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit)
        return commit

    one, two = experiment("turn-one", "one"), experiment("turn-two", "two")
    git(checkout, "update-ref", "refs/exps/exec/EXEC_HEAD", head)  # DVC's own, for a moment
    made = backup.make(tmp_path / "b", site.store, site.root, checkout)
    assert "git/experiments.bundle" in made.files

    fresh = tmp_path / "fresh"
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(fresh)], check=True)
    done = backup.restore(tmp_path / "b", BucketStore(), tmp_path / "h1", fresh)
    assert done.experiments == 3  # two turns and the branch
    lines = git(fresh, "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
    refs = {line.split()[0]: line.split()[1] for line in lines}
    base = f"refs/exps/{head[:2]}/{head[2:]}"
    assert refs == {f"{base}/turn-one": one, f"{base}/turn-two": two, "refs/flywheel/restored/main": head}

    three = experiment("turn-two", "another one of that name")
    done = backup.restore(tmp_path / "b", BucketStore(), tmp_path / "h2", checkout)
    assert git(checkout, "rev-parse", f"{base}/turn-two") == three
    assert done.different == [f"{base}/turn-two"]
    assert git(checkout, "rev-parse", "main") == head
    no = backup.restore(tmp_path / "b", BucketStore(), tmp_path / "h3", None)
    assert any("git clone" in note for note in no.notes)


def test_what_the_disk_refuses_is_one_line(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        backup.make(tmp_path / "file" / "b", site.store, site.root, None)
    assert os.listdir(tmp_path / "site")


def test_a_store_that_is_down_ends_it_with_the_stores_own_words(site: Site, tmp_path: Path) -> None:
    with site.server.down(), pytest.raises(StoreError, match="memory"):
        backup.make(tmp_path / "b", site.store, site.root, None)
    assert not list((tmp_path / "b/manifests").iterdir())


def test_the_commands_say_what_they_did_and_fail_where_something_was_damaged(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = BucketStore()
    stores = iter([site.store, site.store, into, into])
    monkeypatch.setattr(Store, "from_env", classmethod(lambda cls, *_, **__: next(stores)))
    monkeypatch.setenv("FLYWHEEL_STORE", "s3://test")
    monkeypatch.setenv("FLYWHEEL_HOME", str(site.root))
    monkeypatch.setenv("FLYWHEEL_CHECKOUT", str(make_checkout(tmp_path / "checkout")))
    directory = str(tmp_path / "b")

    def run(*args: str) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(app, [*args, "--json"])
        return done.exit_code, json.loads(done.stdout)

    code, made = run("backup", directory)
    assert code == 0
    assert made["objects"] == len(site.server.objects)
    assert "git/experiments.bundle" in made["files"]
    code, checked = run("restore", directory, "--check")
    assert (code, checked["written"], checked["verified"]) == (0, False, made["objects"] + 2)
    _, metadata = site.server.objects["releases/metadata/timestamp.json"]
    site.server.overwrite("gates/a.json", b"x")
    site.server.objects["gates/a.json"] = (b"y", metadata)
    code, made = run("backup", directory)
    assert code == 1
    assert "gates/a.json" in made["damaged"][0]
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path / "home"))
    code, done = run("restore", directory)
    assert (code, done["objects"]) == (0, made["objects"])
    into.put("releases/metadata/timestamp.json", b"somebody's")
    code, done = run("restore", directory, "--into-existing")
    assert (code, done["different"]) == (1, ["releases/metadata/timestamp.json"])
