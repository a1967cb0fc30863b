"""A fleet that only reports: each robot runs what it is assigned, and does as well as it is told to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from flywheel.errors import StageError
from flywheel.rehearsal.deliveries import stable
from flywheel.release import Publisher
from flywheel.rollout import RolloutState, active_rollout, approve
from flywheel.schema import (
    CanaryEvidence,
    Group,
    RobotReport,
    RolloutStage,
    ShadowReport,
    Verdict,
    bundle_digest,
    cohort_draw,
)
from flywheel.store import Store

ROBOTS = ("r1", "r2", "r3", "r4")
BATCHES = 4  # of evidence, from each robot in each stage


class ReportingFleet:
    """``report`` once, or in a thread of its own while the ``with`` block lasts."""

    def __init__(
        self, store: Store, keys: Path, base: Path, candidate_successes: int = 38, approver: str = ""
    ) -> None:
        self.store = store
        self.publisher = Publisher(store, keys)
        self.publisher.init(("ops", approver) if approver else ("ops",))
        self.publisher.publish(base, stable(base))
        self.base = bundle_digest(base)
        self.candidate_successes = candidate_successes  # of 40
        self.approver = approver  # who promotes as soon as that is possible; "" for nobody
        self._n = 0
        self._batches = Counter[tuple[str, RolloutStage]]()  # sent, by rollout and stage
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.loaded: dict[str, str] = {}
        self.report()

    def report(self) -> None:
        """What every robot would write now."""
        state = active_rollout(self.store, self.publisher)
        stable_release = self.publisher.current(Group.STABLE)
        assert stable_release is not None
        for robot in ROBOTS:
            trying = state is not None and self._tries(state, robot)
            wanted = state.bundle_digest if state and trying else stable_release.digest
            if self.loaded.get(robot) == wanted:
                continue
            self.loaded[robot] = wanted
            report = RobotReport(
                site="lab", robot=robot, t_unix_ns=time.time_ns(), loaded_digest=self.loaded[robot]
            )
            self.store.put_json(f"fleet/robots/{robot}.json", report)
        if state is not None:
            self._evidence(state)
            if self.approver and state.stage is RolloutStage.APPROVAL:
                with suppress(StageError):  # it went on since it was read
                    approve(self.store, self.publisher, state.rollout_id, Verdict.PROMOTE, self.approver)

    @staticmethod
    def _tries(state: RolloutState, robot: str) -> bool:
        if state.stage in (RolloutStage.CANARY, RolloutStage.APPROVAL):
            return _in_cohort(state, robot)
        return state.stage is RolloutStage.WIDE

    def _evidence(self, state: RolloutState) -> None:
        if self._batches[state.rollout_id, state.stage] == BATCHES:
            return  # each look reads them all
        self._batches[state.rollout_id, state.stage] += 1
        self._n += 1
        for robot in ROBOTS:
            if state.stage is RolloutStage.SHADOW and _in_cohort(state, robot):
                shadow = ShadowReport(
                    rollout_id=state.rollout_id,
                    robot=robot,
                    digest=state.bundle_digest,
                    current_digest=state.previous.digest,
                    episodes=20,
                    chunks=1000,
                    invalid=0,
                    rms_difference=0.01,
                    infer_p99_ns=5_000_000,
                    current_infer_p99_ns=5_000_000,
                )
                self.store.put_json(shadow.key, shadow)
            old = self.loaded[robot] != state.bundle_digest
            batch = CanaryEvidence(
                rollout_id=state.rollout_id,
                robot=robot,
                n=self._n,
                digest=self.loaded[robot],
                t_unix_ns=time.time_ns(),
                episodes=40,
                successes=20 if old else self.candidate_successes,
                ticks=100_000,
                tracking_rms_rad=0.01,
                tracking_p99_rad=0.02,
            )
            self.store.put_json(batch.key, batch)

    def __enter__(self) -> ReportingFleet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(1.0):
                self.report()
        except Exception as e:  # for the thread that waits for us
            self._error = e


def _in_cohort(state: RolloutState, robot: str) -> bool:
    return cohort_draw(state.rollout_id, robot) < state.cohort_below
