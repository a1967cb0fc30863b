"""``flywheel bench fleet``: 10,000 robots in simulated time, and what no robot may ever run.

What is real: the publisher and its signatures, ``rollout.start``, ``look`` and ``decide``, people's signed
words, the store's interface with every document as robots write it, ``choose`` with signed releases and the
fleet's plan for every robot, and, on a sample of the robots, the whole updater: verification from the root,
download, slots on disk, trial, fall-back. The other robots read what the sample's verifier verified for the
newest signed timestamp, once for all of them, and keep their slots in memory. What is simulated: the server,
the passing of time, the work itself (attempts that succeed at a set rate), and the network.

Every robot has a clock of its own that is wrong by up to two hours, joins and leaves, is cut off with its
site or alone, and writes reports that arrive late, twice or in the wrong order.
"""

from __future__ import annotations

import heapq
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flywheel import rollout
from flywheel.config import RolloutSettings
from flywheel.edge.bench import machine
from flywheel.edge.signed import SignedReleases
from flywheel.edge.updater import Updater, choose
from flywheel.rehearsal.bucket import BucketStore, LargeBucket
from flywheel.rehearsal.deliveries import Clock, make_bundle, upload, warm_up
from flywheel.rehearsal.site import Breach, expect, quick_disk
from flywheel.release import Publisher
from flywheel.release.repository import TIMESTAMP
from flywheel.schema import (
    Assignment,
    CanaryEvidence,
    Check,
    FleetPlan,
    GateReport,
    Group,
    Release,
    RobotReport,
    RolloutStage,
    ShadowReport,
    Strict,
    Verdict,
    bundle_digest,
    cohort_draw,
    sha256_bytes,
)

SITES = 40
SAMPLE = 4  # robots with the real updater
BATCH_S = 3600.0
REPORT_EVERY = 3  # polls, unless the policy changed
SKEW_S = 7200.0
CANARY = 0.01
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


@dataclass(frozen=True)
class Seen:
    """What a robot that can reach the store verifies at one signed timestamp."""

    releases: dict[Group, Release]
    plan: FleetPlan


@dataclass
class Robot:
    """A robot as the protocol knows it."""

    name: str
    site: str
    skew_ns: int
    loaded: str = ""
    release: Release | None = None
    offline_until: float = 0.0
    gone: bool = False
    batches: int = 0
    polls: int = 0
    shadowed: int = 0  # episodes, of the rollout under way
    updater: Updater | None = None


@dataclass
class Simulation:
    """The fleet, its server and the wheel's looks, on one simulated clock."""

    root: Path
    robots: int
    look_every: float
    poll_every: float
    seed: int = 0
    clock: Clock = field(default_factory=Clock)
    events: int = 0
    look_s: list[float] = field(default_factory=list)
    decide_s: list[float] = field(default_factory=list)
    exposed: dict[str, set[str]] = field(default_factory=dict)  # by bundle: robots that ever ran it
    first_bad: float | None = None  # when the candidate's first bad batch reached the store
    faults: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.start_ns = self.clock()
        self.store = BucketStore(LargeBucket())
        self.store.server.clock = self.clock.utc
        self.publisher = Publisher(self.store, self.root / "keys", clock=self.clock.utc)
        self.publisher.init(("ada",))
        base = make_bundle(self.root, "base")
        self.publisher.publish_first(base)
        self.base = bundle_digest(base)
        self.rate = {self.base: 0.90}  # success of each policy
        self.fleet = [
            Robot(f"r{i:05d}", f"s{i % SITES:02d}", round(self.rng.uniform(-SKEW_S, SKEW_S) * 1e9))
            for i in range(self.robots)
        ]
        self._bootstrap = self.publisher.keys.root
        self._verifier = SignedReleases(self.root / "verifier", self.store, self._bootstrap)
        self._verified: tuple[bytes, Seen] | None = None
        self._assigned: tuple[int, Assignment | None] = (-1, None)
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._order = 0
        self.kept = rollout.Evidences()
        self.rid = ""
        self.allowed = _Authority(self)
        self.partitioned: dict[str, float] = {}  # by site: until when
        self.rollouts: list[str] = []
        self._following = self.look_every
        for robot in self.fleet[:: max(1, self.robots // SAMPLE)][:SAMPLE]:
            self._attach(robot)
        for robot in self.fleet:
            self.at(self.rng.uniform(0, self.poll_every), partial(self._poll, robot, True))

    def _attach(self, robot: Robot) -> None:
        """Let a robot have the real updater, on a disk of its own."""
        robot.updater = Updater(
            self.root / robot.name,
            self.store,
            site=robot.site,
            robot=robot.name,
            bootstrap=self._bootstrap,
            clock_ns=lambda: self.clock() + robot.skew_ns,
        )

    def close(self) -> None:
        """Let go of the disks."""
        for robot in self.fleet:
            if robot.updater is not None:
                robot.updater.close()

    def verified_robots(self) -> int:
        """Robots with the real updater that run what was released last."""
        stable = self.publisher.current(Group.STABLE)
        return sum(
            r.updater is not None and stable is not None and r.loaded == stable.digest for r in self.fleet
        )

    # -- time

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return (self.clock() - self.start_ns) * 1e-9

    def at(self, t: float, act: Callable[[], object]) -> None:
        """Let something happen."""
        self._order += 1
        heapq.heappush(self._queue, (t, self._order, act))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass; returns whether ``stop`` came true, looked at after each look of the wheel."""
        while self.now < until:
            horizon = min(self._following, until)
            while self._queue and self._queue[0][0] <= horizon:
                t, _, act = heapq.heappop(self._queue)
                self.clock.t_ns = max(self.start_ns + round(t * 1e9), self.clock.t_ns)
                self.events += 1
                act()
            self.clock.t_ns = max(self.clock.t_ns, self.start_ns + round(horizon * 1e9))
            if horizon == self._following:
                self._following += self.look_every
                self._look()
                if stop():
                    return True
        return False

    # -- the wheel

    def begin(self, name: str, rate: float) -> str:
        """A candidate that the gate promoted, right or wrong; its rollout begins."""
        bundle = make_bundle(self.root, name)
        digest = upload(self.store, bundle)
        stable = self.publisher.current(Group.STABLE)
        assert stable is not None
        report = GateReport(
            candidate_digest=digest,
            current_digest=stable.digest,
            checks=(Check(name="lift", verdict=Verdict.PROMOTE, value=0.1, bar="> 0"),),
            verdict=Verdict.PROMOTE,
            reasons=(),
        )
        gate = sha256_bytes(report.to_bytes())
        self.store.put(f"gates/{gate}.json", report.to_bytes())
        self.rate[digest] = rate
        settings = RolloutSettings(
            canary_fraction=CANARY,
            canary_episodes=200,
            shadow_episodes=100,
            wide_episodes=200,
            waves=(0.1, 0.5, 1.0),
            max_drop=0.05,
            silence_s=8 * HOUR,
            quorum=0.7,
            wide_share=0.97,  # some robots' last word is an old one that came late
        )
        state = rollout.start(self.store, self.publisher, digest, gate, settings, clock_ns=self.clock)
        self.rid = state.rollout_id
        self.rollouts.append(self.rid)
        for robot in self.fleet:
            robot.shadowed = 0
        cohort = [r for r in self.fleet if cohort_draw(self.rid, r.name) < state.cohort_below]
        for robot in [r for r in cohort if not r.gone and r.updater is None][: SAMPLE // 2]:
            self._attach(robot)
            robot.loaded = ""  # it starts from an empty disk
        self.first_bad = None
        self.allowed.note()
        return digest

    def _look(self) -> None:
        if not self.rid:
            self.publisher.refresh()
            self.allowed.note()
            return
        t = time.perf_counter()
        seen = rollout.look(self.store, self.publisher, self.rid, clock_ns=self.clock, kept=self.kept)
        self.look_s.append(time.perf_counter() - t)
        self.decide_s.append(seen.decide_s)
        self.allowed.note()
        if seen.state.stage is RolloutStage.APPROVAL and not seen.changed:
            rollout.approve(
                self.store, self.publisher, self.rid, rollout.Decision.PROMOTE, "ada", clock_ns=self.clock
            )

    def stage(self) -> RolloutStage:
        """Of the rollout under way."""
        head = self.store.latest(f"rollouts/{self.rid}")
        assert head is not None
        return Assignment.model_validate_json(head[1]).stage

    def reason(self) -> str:
        """Where the rollout under way stands, and why."""
        state = rollout.status(self.store, self.rid).state
        return f"{state.stage}: {state.reason}"

    # -- the robots

    def reaches(self, robot: Robot) -> bool:
        """Whether a robot reaches the store."""
        return self.now >= max(robot.offline_until, self.partitioned.get(robot.site, 0.0))

    def _poll(self, robot: Robot, first: bool = False) -> None:
        """One look for another policy, then a report; and the next one later."""
        if robot.gone:
            return
        self.at(self.now + self.rng.uniform(0.9, 1.1) * self.poll_every, partial(self._poll, robot))
        if self.reaches(robot):
            before = robot.loaded
            self._update(robot)
            robot.polls += 1
            if robot.loaded != before or robot.polls % REPORT_EVERY == 0:
                self._report(robot)
        self.allowed.require(robot)
        if first:
            self.at(self.now + self.rng.uniform(0, BATCH_S), partial(self._work, robot))
        if self.rng.random() < 2e-4:  # alone in a dead spot, or switched off for a while
            robot.offline_until = self.now + self.rng.exponential(4 * HOUR)
            self.faults["robots cut off"] += 1

    def _update(self, robot: Robot) -> None:
        if robot.updater is not None:
            if not robot.loaded:
                robot.updater.boot(warm_up)
            robot.updater.poll(warm_up)
            robot.updater.confirm()
            active = robot.updater.active()
            if active is not None:
                # not what it says: the bytes that lie there
                robot.loaded, robot.release = bundle_digest(active.directory), active.release
            return
        seen = self._see()
        canary, wave = seen.releases.get(Group.CANARY), seen.releases.get(Group.WAVE)
        group, _ = choose(robot.name, canary, self._assignment(canary), site=robot.site, wave=wave)
        release = seen.releases.get(group)
        if release is not None:
            robot.loaded, robot.release = release.digest, release

    def _see(self) -> Seen:
        """What verifies now; verified once for each signed timestamp."""
        head = self.store.server.data(TIMESTAMP)
        if self._verified is None or self._verified[0] != head:
            self._verifier.refresh()
            offers = {g: self._verifier.offer(g) for g in Group}
            releases = {g: o.release for g, o in offers.items() if o is not None}
            self._verified = (head, Seen(releases, self._verifier.plan()))
        return self._verified[1]

    def _assignment(self, canary: Release | None) -> Assignment | None:
        if canary is None:
            return None
        version = self.allowed.version
        if self._assigned[0] != version:
            head = self.store.latest(f"rollouts/{canary.rollout_id}")
            self._assigned = (version, Assignment.model_validate_json(head[1]) if head else None)
        return self._assigned[1]

    def _report(self, robot: Robot) -> None:
        report = RobotReport(
            site=robot.site,
            robot=robot.name,
            t_unix_ns=self.clock() + robot.skew_ns,
            loaded_digest=robot.loaded,
        )
        self._send(f"fleet/robots/{robot.name}.json", report)

    def _send(self, key: str, document: Strict) -> None:
        """A document to the store: sometimes later than others, sometimes twice."""
        data = document.to_bytes()
        luck = self.rng.random()
        if luck > 0.01:
            self.store.put(key, data)
        if luck < 0.02:
            kind = "late" if luck <= 0.01 else "twice"
            self.faults[f"documents {kind}"] += 1
            self.at(self.now + self.rng.exponential(2 * HOUR), partial(self.store.put, key, data))

    def _work(self, robot: Robot) -> None:
        """An hour's attempts; what they gave goes to the rollout under way, if the robot is asked."""
        if robot.gone:
            return
        self.at(self.now + self.rng.uniform(0.9, 1.1) * BATCH_S, partial(self._work, robot))
        seen = self._verified[1] if self._verified else None
        release = (seen.releases.get(Group.CANARY) or seen.releases.get(Group.WAVE)) if seen else None
        if release is None or not robot.loaded or not self.reaches(robot) or not self._asked(robot, release):
            return
        if not release.acting:
            self._shadow(robot, release)
        episodes = 10
        good = int(self.rng.binomial(episodes, self.rate[robot.loaded]))
        robot.batches += 1
        batch = CanaryEvidence(
            rollout_id=release.rollout_id,
            robot=robot.name,
            n=robot.batches,
            digest=robot.loaded,
            t_unix_ns=self.clock() + robot.skew_ns,
            episodes=episodes,
            successes=good,
            ticks=60_000,
            tracking_rms_rad=0.01,
            tracking_p99_rad=0.02 * float(np.exp(self.rng.normal(0, 0.1))),
        )
        if robot.loaded == release.digest and self.first_bad is None:
            self.first_bad = self.now
        self._send(batch.key, batch)

    @staticmethod
    def _asked(robot: Robot, release: Release) -> bool:
        """The cohort, and as many others to compare with: evidence of the rest would tell nothing more."""
        return cohort_draw(release.rollout_id, robot.name) < 2 * min(release.cohort_below, 1 << 26)

    def _shadow(self, robot: Robot, release: Release) -> None:
        if not release.admits(robot.name, robot.site):
            return
        robot.shadowed += 10
        report = ShadowReport(
            rollout_id=release.rollout_id,
            robot=robot.name,
            digest=release.digest,
            current_digest=robot.loaded,
            episodes=robot.shadowed,
            chunks=60 * robot.shadowed,
            invalid=0,
            rms_difference=0.02,
            infer_p99_ns=5_000_000,
            current_infer_p99_ns=5_000_000,
        )
        self._send(report.key, report)

    # -- what happens to them

    def churn(self, count: int) -> None:
        """So many leave for good, and as many new ones arrive without a policy."""
        for robot in self.rng.choice(np.array(self.fleet, dtype=object), count, replace=False):
            if robot.updater is not None:
                continue
            robot.gone = True
            self.store.delete(f"fleet/robots/{robot.name}.json")
            new = Robot(f"n{len(self.fleet):05d}", robot.site, robot.skew_ns)
            self.fleet.append(new)
            self.at(self.now + self.rng.uniform(0, self.poll_every), partial(self._poll, new, True))
            self.faults["robots replaced"] += 1

    def partition(self, sites: int, seconds: float) -> set[str]:
        """Cut whole sites off; returns them."""
        cut = {f"s{i:02d}" for i in range(sites)}
        self.partitioned = dict.fromkeys(cut, self.now + seconds)
        self.faults["sites cut off"] += sites
        return cut


class _Authority:
    """What each robot may run, by signed releases and verified approvals; apart from what decides it."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self.version = 0  # of what is on offer
        self.checks = 0
        self._everyone = {sim.base}  # approved for every robot, at some time
        self._trials: list[Release] = []  # signed for a cohort or a wave, at some time
        self._head = b""

    def note(self) -> None:
        """Take in what is signed now."""
        sim = self._sim
        self.version += 1
        head = sim.store.server.data(TIMESTAMP)
        if head == self._head:
            return
        self._head = head
        state = sim.publisher.load()
        for group in Group:
            release, _ = state.release(group)
            if release is None:
                continue
            if group is Group.CANARY:
                if release.acting and release not in self._trials:
                    expect(release.cohort_below < 0.05 * 2**32, "a cohort is larger than it may be")
                    self._trials.append(release)
                continue
            if release.digest not in self._everyone:
                found = rollout.history(sim.store, release.rollout_id)[-1]
                rollout.require_approval(sim.store, found, state.trust())  # raises
                expect(found.bundle_digest == release.digest, "a release is not what was approved")
                if group is Group.WAVE:
                    self._trials.append(release)
                else:
                    self._everyone.add(release.digest)

    def require(self, robot: Robot) -> None:
        """The invariant: a robot runs what is approved for it, and nothing else."""
        self.checks += 1
        if robot.loaded in self._everyone or not robot.loaded:
            pass
        elif not any(t.digest == robot.loaded and t.admits(robot.name, robot.site) for t in self._trials):
            raise Breach(f"{robot.name} runs {robot.loaded[:12]}, which nobody approved for it")
        if robot.loaded:
            self._sim.exposed.setdefault(robot.loaded, set()).add(robot.name)


def bench(full: bool = False, robots: int = 10_000) -> dict[str, Any]:
    """A bad release, then a good one with a partition of three days in its midst; returns the document of
    ``flywheel bench --json``. ``full`` looks and polls four times as often."""
    load, started = os.getloadavg(), time.monotonic()
    pace = 4.0 if full else 1.0
    with quick_disk(), tempfile.TemporaryDirectory(prefix="flywheel-fleet-") as d:
        figures = _run(Simulation(Path(d), robots, HOUR / pace, 2 * HOUR / pace))
    figures["seconds"] = time.monotonic() - started
    look, poll = HOUR / pace, 2.2 * HOUR / pace
    bars = {
        "bad_release_exposed_share": ("<=", CANARY),
        "bad_release_rollback_s": ("<=", look),
        "bad_release_gone_s": ("<=", look + poll),
        "decide_and_write_max_s": ("<", 1.0),
        "converged_share_after_partition": (">=", 1.0),
        "convergence_after_partition_s": ("<=", 2 * poll),
        "breaches": ("<=", 0.0),
    }
    compare = {"<=": float.__le__, "<": float.__lt__, ">=": float.__ge__}
    return {
        "bench": "fleet",
        "machine": machine(),
        "load": {"before": load, "after": os.getloadavg(), "robots": robots, "full": full},
        "figures": figures,
        "bars": {
            name: {"value": v, "op": op, "bar": bar, "ok": compare[op](v, bar)}
            for name, (op, bar) in bars.items()
            for v in [float(figures[name])]
        },
    }


def _run(sim: Simulation) -> dict[str, float]:
    """Both releases; the figures. A breach of the invariant ends the run and is counted."""
    figures: dict[str, float] = {}
    breaches = 0
    try:
        sim.run(5 * HOUR)
        bad = sim.begin("bad", 0.70)
        sim.churn(len(sim.fleet) // 100)
        rolled_back = sim.run(sim.now + DAY, lambda: sim.stage() is RolloutStage.ROLLED_BACK)
        expect(rolled_back, f"the bad release was not rolled back: {sim.reason()}")
        at, ever = sim.now, len(sim.fleet)
        figures["bad_release_exposed_share"] = len(sim.exposed.get(bad, ())) / ever
        figures["bad_release_rollback_s"] = at - (sim.first_bad or at)
        sim.rid = ""
        while (
            any(r.loaded == bad and sim.reaches(r) and not r.gone for r in sim.fleet) and sim.now < at + DAY
        ):
            sim.run(sim.now + 300)
        figures["bad_release_gone_s"] = sim.now - at

        good = sim.begin("good", 0.93)
        sim.run(sim.now + 2 * DAY, lambda: sim.stage() is RolloutStage.WIDE)
        expect(sim.stage() is RolloutStage.WIDE, f"the good release waits: {sim.reason()}")
        cut = sim.partition(SITES // 5, 3 * DAY)
        end = sim.now + 3 * DAY
        sim.churn(len(sim.fleet) // 200)
        sim.run(end, lambda: sim.stage() is RolloutStage.DONE)
        figures["done_during_partition"] = float(sim.stage() is RolloutStage.DONE)
        sim.rid = "" if sim.stage() is RolloutStage.DONE else sim.rid
        sim.run(end)
        behind = [r for r in sim.fleet if r.site in cut and not r.gone and r.loaded != good]
        figures["behind_when_partition_ends"] = float(len(behind))
        while sim.now < end + 6 * HOUR and any(r.loaded != good and sim.reaches(r) for r in behind):
            sim.run(sim.now + 300)
        figures["convergence_after_partition_s"] = sim.now - end
        there = [r for r in sim.fleet if not r.gone and sim.reaches(r)]
        figures["converged_share_after_partition"] = sum(r.loaded == good for r in there) / len(there)
        rollout.history(sim.store, sim.rollouts[-1])
        expect(sim.verified_robots() >= 1, "no sampled robot ran the candidate")
    except Breach as e:
        breaches += 1
        print(f"fleet: {e}")
    finally:
        sim.close()
    figures["breaches"] = float(breaches)
    for name in (
        "bad_release_exposed_share",
        "bad_release_rollback_s",
        "bad_release_gone_s",
        "convergence_after_partition_s",
    ):
        figures.setdefault(name, float("inf"))
    figures.setdefault("converged_share_after_partition", 0.0)
    for name, values in (("decide_and_write", sim.decide_s), ("look", sim.look_s)):
        q = np.array(values or [0.0])
        figures |= {
            f"{name}_p50_s": float(np.quantile(q, 0.5)),
            f"{name}_p99_s": float(np.quantile(q, 0.99)),
            f"{name}_max_s": float(q.max()),
        }
    figures |= {
        "looks": float(len(sim.look_s)),
        "robots": float(len(sim.fleet)),
        "events": float(sim.events),
        "invariant_checks": float(sim.allowed.checks),
        "robots_with_real_updater": float(sum(r.updater is not None for r in sim.fleet)),
        "simulated_days": sim.now / DAY,
        **{k.replace(" ", "_"): float(v) for k, v in sim.faults.items()},
    }
    return figures
