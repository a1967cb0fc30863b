"""A small fleet and a candidate that the gate promoted, to take through a rollout."""

from __future__ import annotations

from pathlib import Path

from flywheel import rollout
from flywheel.config import RolloutSettings
from flywheel.edge.updater import Action
from flywheel.rehearsal.bucket import Bucket, BucketStore
from flywheel.rehearsal.deliveries import Clock, make_bundle, robot, upload, warm_up
from flywheel.rehearsal.site import expect
from flywheel.release import Publisher
from flywheel.rollout import RolloutState
from flywheel.schema import (
    CanaryEvidence,
    Check,
    GateReport,
    RolloutStage,
    ShadowReport,
    Verdict,
    bundle_digest,
    cohort_draw,
    sha256_bytes,
)


class RolloutSite:
    """Four robots by the base policy, a candidate that the gate promoted, and the clock."""

    names = ("r1", "r2", "r3", "r4")

    def __init__(self, root: Path, bucket: Bucket | None = None) -> None:
        self.root = root
        self.clock = Clock()
        self.store = BucketStore(bucket)
        self.store.server.clock = self.clock.utc
        self.publisher = Publisher(self.store, root / "keys")
        self.publisher.init(("op",))
        self.base, self.new = make_bundle(root, "base"), make_bundle(root, "new")
        self.publisher.publish_first(self.base)
        self.candidate = upload(self.store, self.new)
        self.gate = self.report()
        self.settings = RolloutSettings(canary_episodes=12, wide_episodes=8)
        self.n = 0
        self.poll()

    def report(self, verdict: Verdict = Verdict.PROMOTE, candidate: str = "", note: str = "lift") -> str:
        """Put a gate report into the store; return its digest."""
        report = GateReport(
            candidate_digest=candidate or self.candidate,
            current_digest=bundle_digest(self.base),
            checks=(Check(name=note, verdict=verdict, value=0.3, bar="> 0"),),
            verdict=verdict,
            reasons=("made up",),
        )
        digest = sha256_bytes(report.to_bytes())
        self.store.put(f"gates/{digest}.json", report.to_bytes())
        return digest

    def start(self, gate: str | None = None) -> RolloutState:
        return rollout.start(
            self.store,
            self.publisher,
            self.candidate,
            gate or self.gate,
            self.settings,
            git_rev="abc",
            experiment="turn-1",
            clock_ns=self.clock,
        )

    def look(self) -> rollout.Look:
        self.clock.advance(5)
        return rollout.look(self.store, self.publisher, self.id, clock_ns=self.clock)

    @property
    def id(self) -> str:
        return f"{self.candidate[:12]}-{self.gate[:12]}"

    def poll(self, names: tuple[str, ...] = names) -> dict[str, str]:
        """Every robot updates itself, confirms, reports; returns the digests that they run."""
        running = {}
        for name in names:
            with robot(self.root, self.store, self.publisher, name, clock_ns=self.clock) as r:
                result = r.poll(warm_up)
                expect(result.action not in (Action.REFUSED, Action.OFFLINE), result)
                r.confirm()
                running[name] = r.report().loaded_digest
        return running

    def shadow(self, invalid: int = 0) -> None:
        for name in self.cohort():
            report = ShadowReport(
                rollout_id=self.id,
                robot=name,
                digest=self.candidate,
                current_digest=bundle_digest(self.base),
                episodes=4,
                chunks=40,
                invalid=invalid,
                rms_difference=0.02,
                infer_p99_ns=5_000_000,
                current_infer_p99_ns=5_000_000,
            )
            self.store.put_json(report.key, report)

    def work(self, episodes: int, good: float, today: float) -> None:
        """Every robot attempts its task by what it runs, and says how it went."""
        for name, digest in self.poll().items():
            rate = good if digest == self.candidate else today
            for i in range(0, episodes, 5):
                self.n += 1
                end = min(i + 5, episodes)
                batch = CanaryEvidence(
                    rollout_id=self.id,
                    robot=name,
                    n=self.n,
                    digest=digest,
                    t_unix_ns=self.clock(),
                    episodes=end - i,
                    successes=int(end * rate) - int(i * rate),
                    ticks=8000,
                    tracking_rms_rad=0.01,
                    tracking_p99_rad=0.02,
                )
                self.store.create(batch.key, batch.to_bytes())

    def cohort(self) -> tuple[str, ...]:
        below = rollout.history(self.store, self.id)[0].cohort_below
        return tuple(n for n in self.names if cohort_draw(self.id, n) < below)

    def to_canary(self) -> None:
        self.start()
        self.poll()
        self.shadow()
        seen = self.look()
        expect(seen.state.stage is RolloutStage.CANARY, seen.line())

    def to_approval(self) -> None:
        self.to_canary()
        self.work(20, 0.9, 0.4)
        seen = self.look()
        expect(seen.state.stage is RolloutStage.APPROVAL, seen.line())

    def to_wide(self) -> None:
        self.to_approval()
        rollout.approve(self.store, self.publisher, self.id, Verdict.PROMOTE, "op", clock_ns=self.clock)
        seen = self.look()
        expect(seen.state.stage is RolloutStage.WIDE, seen.line())
