"""Processes that are killed with SIGKILL at every step of their work, and publishers that race.

The work is done by a process of its own on a store that outlives it (a directory). It is killed before its
k-th step, for every k: a step is a request to the store, before it is made and after it took effect, or a
write that is made durable on its own disk. Then what it left must be whole: a robot runs the old or the new
policy, and the next process completes the work.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from flywheel import rollout
from flywheel.edge.updater import Action
from flywheel.rehearsal.bucket import BucketStore, DirectoryBucket
from flywheel.rehearsal.deliveries import make_bundle, robot, stable, warm_up
from flywheel.rehearsal.rollouts import RolloutSite
from flywheel.rehearsal.site import Site, expect
from flywheel.release import Publisher, ceremony
from flywheel.rollout.documents import Decision
from flywheel.schema import Group, bundle_digest

FAILED = 70  # exit status of work that raised


def every_step(
    template: Path,
    scratch: Path,
    work: Callable[[Path, DirectoryBucket], None],
    check: Callable[[Path], None],
    stride: int = 1,
    first: int = 1,
) -> int:
    """Kill ``work`` on copies of ``template`` before step ``first``, ``first + stride`` and so on to its end,
    and ``check`` each copy. Returns how many deaths there were; raises ``Breach`` by ``check``."""
    deaths, k = 0, first
    while True:
        root = scratch / f"{k}"
        shutil.copytree(template, root, symlinks=True)
        pid = os.fork()
        if pid == 0:
            _die_at(k, root, work)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            expect(os.WEXITSTATUS(status) == 0, f"the work failed by itself, at step {k}")
            check(root)
            shutil.rmtree(root)
            return deaths
        expect(os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}")
        deaths += 1
        check(root)
        shutil.rmtree(root)
        k += stride


def _die_at(k: int, root: Path, work: Callable[[Path, DirectoryBucket], None]) -> None:
    """In the child: count down to death."""
    left = k

    def step(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        bucket = DirectoryBucket(root / "store")
        bucket.before = bucket.after = step
        with patch.object(os, "fsync", step):  # machines do not die here, so what is written is there
            work(root, bucket)
    except BaseException:
        os._exit(FAILED)
    os._exit(0)


# ── what is killed ──────────────────────────────────────────────────────────────────────────────────


def make_template(root: Path) -> Site:
    """A repository and a robot on it, in a directory."""
    return Site.make(root, DirectoryBucket(root / "store"))


def _publisher(root: Path, bucket: DirectoryBucket | None = None) -> Publisher:
    return Publisher(BucketStore(bucket or DirectoryBucket(root / "store")), root / "keys")


def publish(root: Path, bucket: DirectoryBucket) -> None:
    """A new stable release."""
    _publisher(root, bucket).publish(root / "bundle-new", stable(root / "bundle-new"))


def first_set_up(root: Path, bucket: DirectoryBucket) -> None:
    """Keys and repository, from nothing."""
    Publisher(BucketStore(bucket), root / "keys").init(("ada",))


def update(root: Path, bucket: DirectoryBucket) -> None:
    """A robot takes a release."""
    with robot(root, BucketStore(bucket), _publisher(root)) as r:
        r.poll(warm_up)
        r.confirm()


def ceremony_of(role: str) -> Callable[[Path, DirectoryBucket], None]:
    """All keys of a role are replaced."""

    def work(root: Path, bucket: DirectoryBucket) -> None:
        ceremony.rotate(_publisher(root, bucket), role)

    return work


def enrolment(root: Path, bucket: DirectoryBucket) -> None:
    """A second approver is given a key."""
    ceremony.enrol(_publisher(root, bucket), "grace")


def recovers(root: Path) -> None:
    """A robot goes on, and the next publication reaches it."""
    publisher = _publisher(root)
    old, new = bundle_digest(root / "bundle-base"), bundle_digest(root / "bundle-new")
    with robot(root, publisher.store, publisher) as r:
        poll = r.poll(warm_up)
        active = r.active()
        expect(active is not None and active.digest in (old, new), "the robot runs nothing that was released")
        # In the midst of a change of keys it refuses, and runs on.
        expect(poll.action is not Action.REFUSED or (root / "keys" / ceremony.PLAN).exists(), poll)
        r.confirm()
    publisher.init(("ada",))
    expect(not (root / "keys" / ceremony.PLAN).exists(), "a change of keys was left undone")
    after = stable(root / "bundle-new", git_rev="after")
    publisher.publish(root / "bundle-new", after)
    expect(publisher.current(Group.STABLE) == after, "the next publication did not hold")
    with robot(root, publisher.store, publisher) as r:
        r.poll(warm_up)
        active = r.active()
        expect(active is not None and active.release == after, "the next release did not reach the robot")


def sets_up(root: Path) -> None:
    """The next process completes the first set-up, and a release reaches a robot."""
    publisher = _publisher(root)
    publisher.init(("ada",))
    expect(publisher.load().trust().names != {}, "the approver was lost")
    publisher.publish_first(root / "bundle-base")
    with robot(root, publisher.store, publisher) as r:
        expect(r.poll(warm_up).action is Action.SWAPPED, "the first policy was not taken")


def updates(root: Path) -> None:
    """The robot has a policy when it starts again, and takes the release."""
    publisher = _publisher(root)
    with robot(root, publisher.store, publisher) as r:
        expect(r.active() is not None, "the robot has no policy")
        r.poll(warm_up)
        active = r.active()
        expect(active is not None and active.digest == bundle_digest(root / "bundle-new"), active)


def approved_site(root: Path) -> RolloutSite:
    """A rollout whose approval waits for the look that acts on it."""
    site = RolloutSite(root, DirectoryBucket(root / "store"))
    site.to_approval()
    rollout.approve(site.store, site.publisher, site.id, Decision.PROMOTE, "op", clock_ns=site.clock)
    return site


def look_of(site: RolloutSite) -> Callable[[Path, DirectoryBucket], None]:
    """The look that puts a candidate on every robot."""
    rid, now, utc = site.id, site.clock(), site.clock.utc()

    def work(root: Path, bucket: DirectoryBucket) -> None:
        bucket.clock = lambda: utc
        rollout.look(BucketStore(bucket), _publisher(root, bucket), rid, clock_ns=lambda: now)

    return work


def completes(site: RolloutSite) -> Callable[[Path], None]:
    """What is on offer follows from what was decided, and the next look completes it."""
    rid, now, utc = site.id, site.clock(), site.clock.utc()
    allowed = {bundle_digest(site.base), site.candidate}

    def check(root: Path) -> None:
        bucket = DirectoryBucket(root / "store")
        bucket.clock = lambda: utc
        publisher = _publisher(root, bucket)
        store = publisher.store
        offered = publisher.current(Group.STABLE)
        expect(offered is not None and offered.digest in allowed, offered)
        if offered is not None and offered.digest == site.candidate:
            expect(rollout.status(store, rid).state.wave == 1, "released before it was decided")
        rollout.look(store, publisher, rid, clock_ns=lambda: now)
        offered = publisher.current(Group.STABLE)
        expect(offered is not None and offered.digest == site.candidate, offered)
        rollout.history(store, rid)

    return check


# ── at once ─────────────────────────────────────────────────────────────────────────────────────────


def race(root: Path, publishers: int = 3, rounds: int = 3) -> str:
    """Processes publish to both groups at once; the log holds every publication, and the last ones hold."""
    site = make_template(root)
    site.publisher.publish(site.new, stable(site.new))
    before = site.store.latest("releases/log")
    expect(before is not None, "no log")
    ready, go = os.pipe()
    pids = []
    for who in range(publishers):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            try:
                mine = _publisher(root)
                os.read(ready, 1)  # until the parent closes its end
                for i in range(rounds):
                    release = stable(site.new, git_rev=f"{who}-{i}")
                    mine.reissue(release.model_copy(update={"group": Group.CANARY}) if i % 2 else release)
            except BaseException:
                os._exit(FAILED)
            os._exit(0)
        pids.append(pid)
    os.close(ready)
    os.close(go)
    for pid in pids:
        _, status = os.waitpid(pid, 0)
        expect(os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, "a publisher failed")
    head = site.store.latest("releases/log")
    assert before is not None
    expect(head is not None and head[0] == before[0] + publishers * rounds, "a publication was swallowed")
    last = site.publisher.current(Group.STABLE)
    expect(last is not None and last.git_rev.endswith(f"-{(rounds - 1) // 2 * 2}"), last)
    with robot(root, site.store, site.publisher) as r:
        expect(r.poll(warm_up).digest == bundle_digest(site.new), "the robot did not follow")
    return f"{publishers * rounds} publications of {publishers} processes, none lost"


def bare(root: Path) -> None:
    """A directory with bundles alone."""
    root.mkdir(parents=True)
    make_bundle(root, "base")
    make_bundle(root, "new")
