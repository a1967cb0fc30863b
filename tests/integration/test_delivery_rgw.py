"""Delivery on a real object store: processes that are killed, publishers that race, and a whole rollout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flywheel import rollout
from flywheel.config import RolloutSettings
from flywheel.edge.updater import Action
from flywheel.errors import Conflict, IntegrityError, NotFound
from flywheel.release import Publisher
from flywheel.schema import (
    CanaryEvidence,
    Check,
    GateReport,
    Group,
    Release,
    RolloutStage,
    ShadowReport,
    Verdict,
    bundle_digest,
    cohort_draw,
    sha256_bytes,
    sha256_file,
)
from flywheel.store import Store
from tests.bucket import BucketStore
from tests.deliveries import make_bundle, robot, stable, upload, warm_up

pytestmark = pytest.mark.integration

TIMESTAMP = "releases/metadata/timestamp.json"


class Site:
    """A repository on the real store, with a base policy that a robot runs."""

    def __init__(self, root: Path, store: Store) -> None:
        self.root, self.store = root, store
        self.publisher = Publisher(store, root / "keys")
        self.publisher.init(("op",))
        self.base, self.new = make_bundle(root, "base"), make_bundle(root, "new", size=3_000_000)
        self.publisher.publish_first(self.base)
        self.poll("r1")

    def poll(self, name: str) -> str:
        with robot(self.root, self.store, self.publisher, name) as r:
            result = r.poll(warm_up)
            assert result.action in (Action.SWAPPED, Action.NONE, Action.STAGED), result
            r.confirm()
            return r.report().loaded_digest

    def refused(self, why: str) -> None:
        with robot(self.root, self.store, self.publisher, "r1") as r:
            result = r.poll(warm_up)
            assert (result.action, why in result.reason) == (Action.REFUSED, True), result
            active = r.active()
            assert active is not None
            assert active.digest == bundle_digest(self.base)

    def blob(self, name: str = "policy.onnx") -> str:
        """Key of the new policy's blob."""
        return f"releases/targets/stable/{sha256_file(self.new / name)}.{name}"


@pytest.fixture
def site(tmp_path: Path, store: Store) -> Site:
    return Site(tmp_path, store)


def child(code: str, env: dict[str, str], *args: str) -> subprocess.Popen[str]:
    """A Python process of its own; stdout is a pipe."""
    here = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **env, "PYTHONPATH": str(here)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test, whatever happens."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for p in started:
        if p.poll() is None:
            p.kill()
        p.wait()
        if p.stdout is not None:
            p.stdout.close()


def test_bucket_of_the_unit_tests_behaves_as_the_real_store(store: Store, tmp_path: Path) -> None:
    def behaviour(s: Store) -> list[object]:
        seen: list[object] = [s.put("a/b", b"1"), s.create("a/c", b"2"), s.append_version("v", 1, b"x")]
        for wrong, call in (
            (Conflict, lambda: s.create("a/c", b"3")),
            (Conflict, lambda: s.append_version("v", 1, b"y")),
            (NotFound, lambda: s.get("nothing")),
            (NotFound, lambda: s.stream("nothing")),
            (IntegrityError, lambda: s.get("a/b", "0" * 64)),
            (IntegrityError, lambda: s.put("a/d", b"4", "0" * 64)),
        ):
            with pytest.raises(wrong):
                call()
        s.put("v/nested/00000009.json", b"not a version of v")
        s.get_file("a/b", tmp_path / "b")
        seen += [
            s.get("a/b"),
            b"".join(s.stream("a/c")),
            (tmp_path / "b").read_bytes(),
            s.latest("v"),
            s.latest("w"),
        ]
        seen += [[i.key for i in s.list("a")], [i.key for i in s.list("v/", nested=False)], s.exists("a/c")]
        s.delete("a/c")
        s.delete("a/c")
        return [*seen, s.exists("a/c"), s.stat("a/c")]

    assert behaviour(store) == behaviour(BucketStore())


def test_flipped_byte_longer_file_old_timestamp_and_a_dead_store_change_nothing(
    site: Site, free_endpoint: str
) -> None:
    old = site.store.get(TIMESTAMP)
    site.publisher.publish(site.new, stable(site.new))
    good = site.store.get(site.blob())
    for bad, why in (
        (good[:-1] + bytes([good[-1] ^ 1]), "LengthOrHashMismatch"),
        (good + b"\0" * 5_000_000, "LengthMismatch"),
        (good[:-1], "LengthOrHashMismatch"),
    ):
        site.store.put(site.blob(), bad)
        site.refused(why)
    site.store.put(site.blob(), good)
    dead = Store("s3://flywheel", free_endpoint, access_key="a", secret_key="b", timeout_s=1, attempts=1)
    with robot(site.root, dead, site.publisher, "r1") as r:
        active = r.active()
        assert active is not None
        assert active.digest == bundle_digest(site.base)
        assert r.poll(warm_up).action is Action.OFFLINE
    assert site.poll("r1") == bundle_digest(site.new)
    site.store.put(TIMESTAMP, old)
    with robot(site.root, site.store, site.publisher, "r1") as r:
        result = r.poll(warm_up)
        assert result.action is Action.REFUSED
        assert "BadVersionNumber" in result.reason
    site.publisher.reissue(stable(site.base, revokes=(bundle_digest(site.new),)))  # an intended return
    assert site.poll("r1") == bundle_digest(site.base)


def test_three_racing_publishers_lose_nothing(site: Site) -> None:
    """Each publishes to both groups again and again; the log orders them all, and the last of each holds."""
    errors: list[BaseException] = []
    rounds = 2
    site.publisher.publish(site.new, stable(site.new))
    before = site.store.latest("releases/log")
    ready = threading.Barrier(3)

    def work(who: int) -> None:
        try:
            mine = Publisher(site.store, site.publisher.keys.directory)
            ready.wait()
            for i in range(rounds):
                release = stable(site.new, git_rev=f"{who}-{i}")
                mine.reissue(release.model_copy(update={"group": Group.CANARY}) if i % 2 else release)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    head = site.store.latest("releases/log")
    assert before is not None
    assert head is not None
    assert head[0] == before[0] + 3 * rounds, "a publication was swallowed by another"
    assert site.store.get(TIMESTAMP) == head[1]
    for group, last in ((Group.STABLE, rounds - 2), (Group.CANARY, rounds - 1)):
        current = site.publisher.current(group)
        assert current is not None
        assert current.git_rev.endswith(f"-{last}")
    assert site.poll("r1") == bundle_digest(site.new)


PUBLISH = """
import sys
from pathlib import Path
from flywheel.release import Publisher
from flywheel.store import Store
from tests.deliveries import stable
store, keys, bundle = Store.from_env(), Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
for i in range(1000):
    Publisher(store, keys).publish(bundle, stable(bundle, git_rev=f"child-{i}"))
    print(i, flush=True)
"""


UPDATE = """
import sys, threading
from pathlib import Path
from flywheel.edge.updater import Updater
from flywheel.schema import bundle_digest
from flywheel.store import Store
root, bootstrap = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
store = Store.from_env()
fetch = store.stream
def slowly(key):
    pieces = fetch(key)
    return dawdle(pieces) if "policy.onnx" in key else pieces
def dawdle(pieces):
    yield next(pieces)
    print("in the middle", flush=True)
    threading.Event().wait()
store.stream = slowly
with Updater(root, store, site="lab", robot="r2", bootstrap=bootstrap) as u:
    u.boot(bundle_digest)
    u.poll(bundle_digest)
"""


def test_processes_killed_by_the_kernel_leave_a_repository_and_a_robot_that_work(
    site: Site, store_env: dict[str, str], children: list[subprocess.Popen[str]]
) -> None:
    for done in (0, 1):
        p = child(PUBLISH, store_env, str(site.publisher.keys.directory), str(site.new))
        children.append(p)
        assert p.stdout is not None
        for _ in range(done + 1):  # "ready", then so many publications; it is in the middle of the next
            p.stdout.readline()
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert site.poll("r1") in (bundle_digest(site.base), bundle_digest(site.new))
        site.publisher.publish(site.new, stable(site.new, git_rev=f"after-{done}"))
        current = site.publisher.current(Group.STABLE)
        assert current is not None
        assert current.git_rev == f"after-{done}"
    site.publisher.reissue(stable(site.base))
    assert site.poll("r2") == bundle_digest(site.base)
    site.publisher.reissue(stable(site.new))
    p = child(UPDATE, store_env, str(site.root / "r2"), str(site.publisher.keys.directory / "root.json"))
    children.append(p)
    assert p.stdout is not None
    assert p.stdout.readline() == "in the middle\n"
    p.send_signal(signal.SIGKILL)
    p.wait()
    with robot(site.root, site.store, site.publisher, "r2") as r:
        active = r.active()
        assert active is not None
        assert active.digest == bundle_digest(site.base)
        assert r.poll(warm_up).digest == bundle_digest(site.new)


def test_whole_rollout_on_the_real_store(site: Site) -> None:
    names = ("r1", "r2", "r3")
    store, candidate = site.store, upload(site.store, site.new)
    for name in names:
        site.poll(name)
    report = GateReport(
        candidate_digest=candidate,
        current_digest=bundle_digest(site.base),
        checks=(Check(name="lift", verdict=Verdict.PROMOTE, value=0.4, bar="> 0"),),
        verdict=Verdict.PROMOTE,
        reasons=(),
    )
    gate = sha256_bytes(report.to_bytes())
    store.put(f"gates/{gate}.json", report.to_bytes())
    first = rollout.start(store, site.publisher, candidate, gate, RolloutSettings(wide_episodes=8))
    rid = first.rollout_id
    cohort = [n for n in names if cohort_draw(rid, n) < first.cohort_below]
    assert len(cohort) == 1
    shadow = ShadowReport(
        rollout_id=rid,
        robot=cohort[0],
        digest=candidate,
        current_digest=bundle_digest(site.base),
        episodes=4,
        chunks=40,
        invalid=0,
        rms_difference=0.02,
        infer_p99_ns=5_000_000,
        current_infer_p99_ns=5_000_000,
    )
    n = 0

    def work() -> set[str]:
        nonlocal n
        running = {name: site.poll(name) for name in names}
        for name, digest in running.items():
            for _ in range(2):
                n += 1
                good = 8 if digest == candidate else 2
                batch = CanaryEvidence(
                    rollout_id=rid,
                    robot=name,
                    n=n,
                    digest=digest,
                    t_unix_ns=1,
                    episodes=8,
                    successes=good,
                    ticks=8000,
                    tracking_rms_rad=0.01,
                    tracking_p99_rad=0.02,
                )
                store.create(batch.key, batch.to_bytes())
        return set(running.values())

    assert work() == {bundle_digest(site.base)}
    store.put_json(shadow.key, shadow)
    assert rollout.look(store, site.publisher, rid).state.stage is RolloutStage.CANARY
    assert work() == {bundle_digest(site.base), candidate}
    assert rollout.look(store, site.publisher, rid).state.stage is RolloutStage.APPROVAL
    rollout.approve(store, site.publisher, rid, Verdict.PROMOTE, "op")
    assert rollout.look(store, site.publisher, rid).state.stage is RolloutStage.WIDE
    assert work() == {candidate}
    done = rollout.look(store, site.publisher, rid)
    assert done.state.stage is RolloutStage.DONE, done.line()
    assert site.publisher.current(Group.STABLE) == Release(
        group=Group.STABLE,
        digest=candidate,
        gate_digest=gate,
        rollout_id=rid,
        approval_digest=rollout.status(store, rid).approvals[0].digest,
    )
