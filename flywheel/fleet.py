"""The simulated fleet: robots that work in the twin with the product's own edge software.

Each robot is what runs on a real one (updater, both systems, recorder, spool) around a simulated cell, in
lockstep. Several share a worker process; a worker dies with the process that started it.

What a fleet does is set from outside: ``WORK`` (attempts all the time, failures recorded) or ``IDLE`` (only
looks for releases and reports).
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flywheel import __version__
from flywheel.attempt import Attempt, AttemptResult
from flywheel.config import Settings
from flywheel.edge.policy import ActionSource, Inference, Policy
from flywheel.edge.recorder import Identity, Recorder
from flywheel.edge.shadow import Comparison
from flywheel.edge.spool import Spool
from flywheel.edge.updater import Action, Updater
from flywheel.errors import FlywheelError, ServiceError, StoreError
from flywheel.parent import die_with_parent
from flywheel.robot import Image
from flywheel.schema import CanaryEvidence, Mode, Outcome, RobotReport, bundle_digest
from flywheel.store import EmbeddedStore, Store
from flywheel.twin.cell import CAMERAS
from flywheel.twin.shift import shift as known

IDLE, WORK, QUIT = 0, 1, 2
SITE = "local"
IDLE_S = 10.0  # between two looks of a fleet that does not work
BATCH = 3  # attempts to one piece of evidence
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class Shadowed:
    """The policy in use, with a candidate beside it that sees the same and is only compared."""

    def __init__(self, policy: ActionSource, candidate: ActionSource, comparison: Comparison) -> None:
        self.bundle, self.digest = policy.bundle, policy.digest
        self.candidate, self.comparison = candidate, comparison
        self._policy = policy

    def infer(self, images: dict[str, Image], state: Any, instruction: str) -> Inference:
        """The policy's actions."""
        acted = self._policy.infer(images, state, instruction)
        try:
            other = self.candidate.infer(images, state, instruction)
        except FlywheelError:
            bad = np.full_like(acted.actions, np.nan)
            self.comparison.add(bad, 0, acted.actions, acted.infer_ns)
        else:
            self.comparison.add(other.actions, other.infer_ns, acted.actions, acted.infer_ns)
        return acted


class SimulatedRobot:
    """One robot of the fleet; its files lie in ``root``. ``number`` makes its scenes differ from others'."""

    def __init__(
        self,
        root: Path,
        store: Store,
        site: str,
        robot: str,
        number: int,
        bootstrap: bytes,
        settings: Settings,
    ) -> None:
        self.robot, self._store, self._settings = robot, store, settings
        self._policies: dict[str, Policy] = {}
        self._updater = Updater(root / "policies", store, site=site, robot=robot, bootstrap=bootstrap)
        if self._updater.boot(self._warm_up) is None:
            polled = self._updater.poll(self._warm_up)
            if self._updater.active() is None:
                self._updater.close()
                raise ServiceError(
                    f"{robot}: no verified policy to start with: {polled.action}: {polled.reason}"
                )
        self._attempt = Attempt(
            Path(),
            settings.twin.shift,
            record=True,
            operator_takes_over=True,
            episode_s=settings.twin.episode_s,
            settings=settings.edge,
            policy=self._active(),
            jpeg_quality=settings.recorder.quality(CAMERAS),
        )
        self._seeds = np.random.default_rng([settings.twin.seed, number, time.time_ns()])
        quota = round(settings.recorder.spool_quota_mb * 1e6)
        self._spool = Spool(
            root / "spool", store, quota, robot=robot, metered=lambda: settings.recorder.link_priority
        )
        loop = self._attempt.lockstep
        self._recorder = Recorder(
            loop.rings,
            settings.recorder,
            root / "spool" / "episodes",
            Identity(
                site,
                robot,
                "lockstep",
                time.time_ns() - loop.now_ns,
                __version__,
                settings.edge.control_hz,
                settings.edge.policy_hz,
                settings.twin.shift,
            ),
            make_room=self._spool.queue.make_room,
        )
        loop.recorder = self._recorder
        self._shadow: Shadowed | None = None
        self.counts: Counter[str] = Counter()
        self._batch: list[AttemptResult] = []
        self._batches = int(time.time())  # so that a robot that starts again does not repeat a number
        self._mode = Mode.HOLD
        self.report()

    def _warm_up(self, directory: Path) -> str:
        policy = Policy.load(directory, self._settings.edge.onnx_threads)
        self._policies[policy.digest] = policy
        return policy.digest

    def _active(self) -> Policy:
        active = self._updater.active()
        assert active is not None
        return self._policies[active.digest]

    def look(self) -> None:
        """Look for a release and do what it says."""
        polled = self._updater.poll(self._warm_up)
        if polled.action in (Action.SWAPPED, Action.FELL_BACK):
            self._flush()
        if polled.action is not Action.OFFLINE:
            self._recorder.set_campaigns(self._updater.campaigns(), time.time_ns())
        self._compare(self._updater.shadow())
        policy: ActionSource = self._shadow or self._active()
        if policy is not self._attempt.policy:
            self._attempt.use(policy)
        keep = {self._active().digest, self._shadow.candidate.digest if self._shadow else ""}
        self._policies = {d: p for d, p in self._policies.items() if d in keep}
        if polled.action in (Action.SWAPPED, Action.FELL_BACK):
            self.report()

    def _compare(self, bundle: Path | None) -> None:
        """Begin or end comparing a candidate."""
        current = self._active()
        if bundle is None:
            self._shadow = None
            return
        running = self._shadow
        if running is not None and (running.candidate.digest, running.digest) == (
            bundle_digest(bundle),
            current.digest,
        ):
            return
        rollout = self._rollout()
        if rollout is None:
            self._shadow = None
            return
        box = self._attempt.robot.limits.workspace
        low, high = (
            (np.array([*edge, bound]) for edge, bound in ((box.lower, -0.5), (box.upper, 1.5)))
            if box
            else (
                np.full(4, -np.inf),
                np.full(4, np.inf),
            )
        )
        candidate = Policy.load(bundle, self._settings.edge.onnx_threads)
        comparison = Comparison(
            rollout,
            self.robot,
            candidate.digest,
            current.digest,
            execute=current.bundle.execute,
            low=low,
            high=high,
        )
        self._shadow = Shadowed(current, candidate, comparison)

    def work(self) -> AttemptResult:
        """One attempt; what it gave goes to the store."""
        seed = int(self._seeds.integers(2**31))
        result = self._attempt.run(seed)
        self.counts["attempts"] += 1
        self.counts[result.outcome.value] += 1
        self.counts["operator"] += result.operator_outcome is Outcome.SUCCESS
        self._batch.append(result)
        if self._updater.slots.state.trial and result.invalid_chunks == 0:
            self._updater.confirm()  # it ran a whole attempt without one chunk refused
        if self._shadow is not None:
            self._shadow.comparison.end_episode()
            report = self._shadow.comparison.report()
            self._store.put_json(report.key, report)
        if len(self._batch) >= BATCH:
            self._flush()
        self.upload()
        return result

    def _flush(self) -> None:
        """Tell the rollout under way, if there is one, how the last attempts went."""
        batch, self._batch = self._batch, []
        rollout = self._rollout()
        if not batch or rollout is None:
            return
        ticks = sum(r.steps for r in batch)
        square = sum(r.tracking_rms_rad**2 * r.steps for r in batch)
        evidence = CanaryEvidence(
            rollout_id=rollout,
            robot=self.robot,
            n=self._batches,
            digest=self._attempt.policy.digest,
            t_unix_ns=time.time_ns(),
            episodes=len(batch),
            successes=sum(r.outcome is Outcome.SUCCESS for r in batch),
            invalid=sum(r.invalid_chunks for r in batch),
            ticks=ticks,
            tracking_rms_rad=(square / ticks) ** 0.5 if ticks else 0.0,
            tracking_p99_rad=max(r.tracking_p99_rad for r in batch),
        )
        self._batches += 1
        self._store.put_json(evidence.key, evidence)

    def _rollout(self) -> str | None:
        """The rollout under way, from the signed candidate."""
        return self._updater.rollout_id()

    def upload(self) -> int:
        """Send what the spool holds; how many episodes still wait."""
        done = self._spool.upload_once(time.monotonic_ns())
        if self._spool.requests is not None:
            self._spool.requests.serve(self._recorder)
        self.counts["uploaded"] += len(done.uploaded)
        return done.waiting

    def report(self) -> RobotReport:
        """Tell the fleet's page."""
        return self._updater.report(
            mode=Mode(self._attempt.lockstep.system1.mode),
            episodes=self.counts["attempts"],
            successes=self.counts[Outcome.SUCCESS.value],
            spool_pending=len(self._spool.pending()),
            campaigns=self._recorder.campaigns(),
        )

    def finish(self) -> None:
        """Seal and send what is open."""
        self._recorder.finish(self._attempt.lockstep.now_ns)
        self._flush()
        self.upload()
        self.report()
        self._updater.close()
        self._attempt.close()


@dataclass
class Progress:
    """What the fleet has done so far, by robot."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def total(self, what: str) -> int:
        """Sum over the robots."""
        return sum(c[what] for c in self.counts.values())


def robot_names(settings: Settings) -> list[str]:
    """What the robots of the simulated fleet are called."""
    return [f"{settings.twin.shift}-{i + 1:02d}" for i in range(settings.twin.robots)]


class Fleet:
    """Worker processes with robots in them; a context manager that leaves nothing running."""

    def __init__(
        self,
        home: Path,
        environ: dict[str, str],
        settings: Settings,
        bootstrap: bytes,
        keys: Mapping[str, EmbeddedStore] | None = None,
        workers: int = 2,
        shift: str = "",
    ) -> None:
        """``keys``: by robot, its own way to the store; what ``environ`` says for those that have none.

        ``shift``: where they begin, if not in ``twin.shift``, after which they are named.
        """
        self._spawn = multiprocessing.get_context("spawn")
        self._home, self._environ, self._settings = home, environ, settings
        self._bootstrap, self._keys = bootstrap, keys or {}
        self.robots = tuple(robot_names(settings))
        self._processes = min(workers, len(self.robots))
        self._workers: list[Any] = []
        self._prepare(shift or settings.twin.shift)

    def _prepare(self, shift: str) -> None:
        twin = self._settings.twin.model_copy(update={"shift": known(shift).name})
        settings = self._settings.model_copy(update={"twin": twin})
        self._goal = self._spawn.Value("i", IDLE)
        self._said: Any = self._spawn.Queue()
        self.progress = Progress()
        names, n = self.robots, self._processes
        self._workers = [
            self._spawn.Process(
                target=_work,
                args=(
                    self._home,
                    list(names[w::n]),
                    range(w, len(names), n),
                    self._environ,
                    settings,
                    self._bootstrap,
                ),
                kwargs={"keys": self._keys, "goal": self._goal, "said": self._said, "parent": os.getpid()},
                daemon=True,
            )
            for w in range(n)
        ]

    def __enter__(self) -> Fleet:
        for w in self._workers:
            w.start()
        return self

    def move(self, shift: str) -> None:
        """Take the robots to another shift: each seals and sends what is open, and starts again there, idle.

        They keep their names, their policies and what they had not sent; ``progress`` begins anew. Raises
        ``ConfigError`` for a shift that the twin does not know.
        """
        known(shift)
        self.close()
        self._prepare(shift)
        self.__enter__()

    def set(self, goal: int) -> None:
        """IDLE or WORK."""
        self._goal.value = goal

    def poll(self) -> Progress:
        """Take in what the workers said; ``ServiceError`` if one of them failed."""
        while True:
            try:
                robot, counts, digest, problem = self._said.get_nowait()
            except queue.Empty:
                break
            if problem:
                raise ServiceError(f"simulated robots: {problem}")
            self.progress.counts[robot], self.progress.digests[robot] = counts, digest
        for w in self._workers:
            if w.exitcode not in (None, 0):
                raise ServiceError(f"a worker of the simulated fleet ended with code {w.exitcode}")
        return self.progress

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let every robot seal and send what is open, and end the workers. May be called twice."""
        self._goal.value = QUIT
        for w in self._workers:
            w.join(30)
            if w.is_alive():
                w.kill()
                w.join()
        self._said.close()
        self._said.cancel_join_thread()


def _work(
    home: Path,
    names: list[str],
    numbers: range,
    environ: dict[str, str],
    settings: Settings,
    bootstrap: bytes,
    *,
    keys: Mapping[str, EmbeddedStore],
    goal: Any,
    said: Any,
    parent: int,
) -> None:
    """A worker: its robots take turns."""
    die_with_parent(signal.SIGKILL, parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environ | _ONE_THREAD)
    try:
        robots = []
        for name, k in zip(names, numbers, strict=True):
            store = keys[name].connect() if name in keys else Store.from_env()
            robots.append(SimulatedRobot(home / "robots" / name, store, SITE, name, k, bootstrap, settings))
        while goal.value != QUIT:
            for robot in robots:
                _turn(robot, goal.value == WORK)
                said.put((robot.robot, Counter(robot.counts), robot._active().digest, ""))
            if goal.value == IDLE:
                time.sleep(IDLE_S)
        for robot in robots:
            robot.finish()
    except Exception as e:  # whatever it was, the parent must hear of it
        traceback.print_exc()
        said.put(("", Counter(), "", f"{type(e).__name__}: {e}"))


def _turn(robot: SimulatedRobot, working: bool) -> None:
    try:
        robot.look()
        if working:
            robot.work()
        else:
            robot.upload()
        robot.report()
    except StoreError as e:  # the robot goes on with what it has; nothing is lost
        robot.counts["store_errors"] += 1
        print(f"{robot.robot}: {e}")
