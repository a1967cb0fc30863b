"""``flywheel bench restarts``: bursts of failures while everything on the cloud side is killed.

Real Airflow, real store, the real DAGs over a checkout whose stages take seconds; robots that upload through
the product's own spool. SIGKILL meets the scheduler, the triggerer, the DAG processor, the API server, tasks
(with all that they run) and the store's daemons, at random times; the store also stands still for a while.
What brings them back is what does so on a robot maker's machine: the keeper, Airflow's retries, the claims.
Then, within a bound, the inbox has to be empty and every turn at its end, and each failure is looked up in
the curated datasets as the store keeps them, by the experiments that the checkout lists.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flywheel import approvals, services
from flywheel.bench.hostile import sound_episode
from flywheel.claims import Claims, backlog
from flywheel.config import Deployment
from flywheel.edge.bench import machine
from flywheel.edge.spool import Spool
from flywheel.errors import FlywheelError, NotFound, ServiceError
from flywheel.experiments import experiments
from flywheel.rehearsal.checkouts import git, make_checkout
from flywheel.rehearsal.reporting import ReportingFleet
from flywheel.services import process
from flywheel.services.airflow import AUTO_APPROVER, WORKER, Airflow
from flywheel.services.ceph import Ceph
from flywheel.store import Store
from flywheel.turn import DATASET, TurnRecord, TurnResult
from flywheel.workspace import TURN_VARIABLE

PARTS = ("scheduler", "triggerer", "dag-processor", "api-server")
STORE_PARTS = ("radosgw", "ceph-osd", "ceph-mon")
KINDS = (*PARTS, "stage", "task", "store", "store stands still")
ENDED = ("success", "skipped", "failed", "upstream_failed", "removed")
BACK_S = 180.0  # by then what was killed has to be back
STILL_S = (3.0, 10.0)
PARAMS = """\
trigger:
  min_episodes: {least}
  max_wait_s: 20.0
  cooldown_s: 5.0
  poll_s: 1.0
curate:
  max_episodes: {most}
rollout:
  look_s: 2.0
turn:
  policy: models/base
"""


@dataclass(frozen=True)
class Size:
    """How much of it."""

    failures: int
    bursts: int
    most: int  # episodes of one turn
    kills: int  # of each kind
    pause_s: tuple[float, float]  # between two kills
    settle_s: float  # from the last kill to the end of everything, at most


STUCK_S = 180.0  # what does not move for so long is stuck; before, it is only slow
QUICK = Size(failures=60, bursts=3, most=40, kills=1, pause_s=(4.0, 10.0), settle_s=1200.0)
FULL = Size(failures=500, bursts=10, most=100, kills=4, pause_s=(5.0, 25.0), settle_s=3600.0)


@dataclass
class Run:
    """One run: what was put in, what was done to it."""

    home: Path
    checkout: Path
    size: Size
    rng: np.random.Generator
    ids: list[str] = field(default_factory=list)
    uploaded: set[str] = field(default_factory=set)
    kills: Counter[str] = field(default_factory=Counter)
    back_s: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cleared: Counter[tuple[str, str]] = field(default_factory=Counter)  # runs whose failed tasks were cleared
    stop: threading.Event = field(default_factory=threading.Event)
    harmed: float = 0.0  # share of the planned kills that were tried
    _seen: tuple[str, float] = ("", float("inf"))  # how things stood, and since when

    def __post_init__(self) -> None:
        self.airflow, self.ceph = Airflow(self.home), Ceph(self.home)

    def store(self) -> Store:
        """The store, where it is now."""
        return Store.from_env(Deployment.from_env())

    def runs(self, limit: int) -> list[approvals.Run]:
        """The newest runs of every DAG that turns go through."""
        return [r for dag in approvals.DAGS for r in approvals.runs(self.airflow, dag, limit)]

    # ── failures ─────────────────────────────────────────────────────────────────────────────────────

    def bursts(self) -> None:
        """Robots fail in bursts, from the first kill to the last, and upload what they recorded, however
        often the store has to be asked."""
        root = self.home / "spool"
        spool = Spool(root, self.store(), 1 << 34)
        each = -(-self.size.failures // self.size.bursts)
        for burst in range(self.size.bursts):
            while self.harmed < burst / self.size.bursts:
                time.sleep(0.5)
            seeds = range(burst * each, min((burst + 1) * each, self.size.failures))
            self.ids += [sound_episode(root / "episodes", 1 + s).name for s in seeds]
            while len(self.uploaded) < len(self.ids):
                self.uploaded.update(spool.upload_once(time.monotonic_ns()).uploaded)
                time.sleep(0.5)
            time.sleep(float(self.rng.uniform(1.0, 6.0)))

    # ── harm ─────────────────────────────────────────────────────────────────────────────────────────

    def harm(self) -> None:
        """Every kind as often as planned, in random order; one that found no victim comes once more."""
        kinds = [k for k in KINDS for _ in range(self.size.kills)]
        self.rng.shuffle(kinds)
        again = []
        for i, kind in enumerate(kinds, 1):
            time.sleep(float(self.rng.uniform(*self.size.pause_s)))
            if self._harm(kind) is None:
                again.append(kind)
            self.harmed = i / len(kinds)
        for kind in again:
            self._harm(kind)

    def _harm(self, kind: str) -> bool | None:
        """Whether the victim came back; None if there was none."""
        began = time.monotonic()
        if kind in PARTS:
            killed = process.running(self.airflow.run, kind)
            if killed is None:
                self.notes.append(f"{kind} was not running when it was to be killed")
                return None
            os.kill(killed.pid, signal.SIGKILL)
            back = self.wait(lambda: self._runs_anew(kind, killed), BACK_S)
        elif kind == "store":
            which = [n for n in STORE_PARTS if self.rng.random() < 0.5] or [str(self.rng.choice(STORE_PARTS))]
            for name in which:
                if (daemon := process.running(self.ceph.run, name)) is not None:
                    os.kill(daemon.pid, signal.SIGKILL)
            back = self.wait(self._store_answers, BACK_S)
        elif kind == "store stands still":
            gateway = process.running(self.ceph.run, "radosgw")
            if gateway is None:
                return None
            os.kill(gateway.pid, signal.SIGSTOP)
            time.sleep(float(self.rng.uniform(*STILL_S)))
            with suppress(ProcessLookupError):
                os.kill(gateway.pid, signal.SIGCONT)
            back = self.wait(self._store_answers, BACK_S)
        else:
            victims = self.wait(lambda: self._stages() if kind == "stage" else self._task(), 60.0)
            if not victims:
                self.notes.append(f"{kind}: none ran for {time.monotonic() - began:.0f} s")
                return None
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            back = True
        if not back:
            self.notes.append(f"{kind}: not back for {time.monotonic() - began:.0f} s")
            return False
        self.kills[kind] += 1
        if kind not in ("stage", "task"):
            self.back_s.setdefault(kind, []).append(time.monotonic() - began)
        return True

    def _runs_anew(self, name: str, killed: process.Process) -> bool:
        now = process.running(self.airflow.run, name)
        return now is not None and now != killed

    def _store_answers(self) -> bool:
        if not all(self.ceph.status().values()):
            return False
        try:
            Store.from_env(Deployment.from_env(), timeout_s=2.0, attempts=1).exists("probe/none")
        except FlywheelError:
            return False
        return True

    def _stages(self) -> list[int]:
        """Everything that one turn runs now: the group of its task's command, DVC, the stage."""
        return [p.pid for p in _having(TURN_VARIABLE)]

    def _task(self) -> list[int]:
        """A busy worker of Airflow and all below it."""
        workers = [
            p.pid
            for p in process.marked(self.airflow.mark)
            if (t := process.title_of(p)).startswith(WORKER) and not t.endswith("<idle>")
        ]
        return [] if not workers else _tree(int(self.rng.choice(workers)))

    def wait[T](self, look: Callable[[], T], most_s: float, every_s: float = 0.1) -> T | None:
        """Look again and again until there is something; None if there is nothing for so long."""
        end = time.monotonic() + most_s
        while time.monotonic() < end:
            if found := look():
                return found
            time.sleep(every_s)
        return None

    # ── the person ───────────────────────────────────────────────────────────────────────────────────

    def person(self) -> None:
        """Approves what waits, and clears what failed for good, once a run: what the alarm tells to do."""
        approver = approvals.AutoApprover(self.airflow)
        while not self.stop.wait(2.0):
            with suppress(ServiceError):
                approver.poll()
            with suppress(ServiceError):
                for run in self.runs(50):
                    if run.state == "failed" and not self.cleared[run.dag, run.run_id]:
                        approvals.clear(self.airflow, run)
                        self.cleared[run.dag, run.run_id] += 1

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────

    def settled(self) -> bool:
        """Whether nothing waits and nothing runs, or nothing has moved for ``STUCK_S``."""
        now = time.monotonic()
        try:
            store = self.store()
            turns, runs = _turns(store), self.runs(50)
            waiting = backlog(store).count
            busy = [approvals.run(self.airflow, r.dag, r.run_id).tasks for r in runs if not r.over]
            seen = waiting, turns, busy
        except FlywheelError:
            return False
        if not waiting and all(closed for _, closed in turns) and all(r.over for r in runs):
            return True
        states = repr([seen[:2], [[(t.name, t.state, t.attempt) for t in tasks] for tasks in seen[2]]])
        if states != self._seen[0]:
            self._seen = states, now
        return now - self._seen[1] > STUCK_S


def restarts(full: bool = False) -> dict[str, Any]:
    """A few minutes with every kind of death, or 500 failures with ``full``; the document of ``--json``."""
    load, began = os.getloadavg(), time.monotonic()
    size = FULL if full else QUICK
    home = Path(tempfile.mkdtemp(prefix="flywheel-restarts-"))
    seed = time.time_ns() % (1 << 32)
    with environment(home):
        checkout = make_checkout(home / "checkout", PARAMS.format(least=size.most // 2, most=size.most))
        run = Run(home, checkout, size, np.random.default_rng(seed))
        try:
            with services.session(home):
                settle_s = _turn_the_wheel(run)
                found = _count(run)
        finally:
            keep = os.environ.get("FLYWHEEL_BENCH_KEEP")
            if not keep:
                shutil.rmtree(home, ignore_errors=True)
        found["processes_left"] = sum(
            1 for m in (run.airflow.mark, run.ceph.mark, f"keeper:{home}") for _ in process.marked(m)
        )
    back = {k: max(v) for k, v in run.back_s.items()}
    figures: dict[str, float] = {
        **{k: float(v) for k, v in found.items()},
        **{f"kills_{k.replace(' ', '_').replace('-', '_')}": float(run.kills[k]) for k in KINDS},
        **{f"back_max_{k.replace(' ', '_').replace('-', '_')}_s": v for k, v in back.items()},
        "kills": float(sum(run.kills.values())),
        "settle_s": settle_s,
        "seconds": time.monotonic() - began,
    }
    bars: dict[str, tuple[float, str, float]] = {
        "failures": (figures["failures"], ">=", float(size.failures)),
        "kills": (figures["kills"], ">=", float(size.kills * len(KINDS))),
        "lost": (figures["lost"], "<=", 0.0),
        "in_two_datasets": (figures["in_two_datasets"], "<=", 0.0),
        "turns_without_an_end": (figures["turns_without_an_end"], "<=", 0.0),
        "claims_without_a_turn": (figures["claims_without_a_turn"], "<=", 0.0),
        "tasks_stuck": (figures["tasks_stuck"], "<=", 0.0),
        "waiting": (figures["waiting"], "<=", 0.0),
        "not_in_dvc_exp_show": (figures["not_in_dvc_exp_show"], "<=", 0.0),
        "processes_left": (figures["processes_left"], "<=", 0.0),
    }
    return {
        "bench": "restarts",
        "machine": machine(),
        "load": {"before": load, "after": os.getloadavg(), "full": full, "seed": seed, "notes": run.notes},
        "figures": figures,
        "bars": {
            k: {"value": v, "op": op, "bar": bar, "ok": v <= bar if op == "<=" else v >= bar}
            for k, (v, op, bar) in bars.items()
        },
    }


def _turn_the_wheel(run: Run) -> float:
    """Bursts and harm at once, then peace until everything has come to its end; how long that took."""
    store = run.store()
    base = run.checkout / "models" / "base" / "bundle"
    # With the demo's approver for a person: it uses the same public interface.
    fleet = _PatientFleet(store, run.home / "keys", base, approver=AUTO_APPROVER)
    threads = [threading.Thread(target=f, daemon=True) for f in (run.bursts, run.person)]
    with fleet:
        for t in threads:
            t.start()
        run.harm()
        quiet = time.monotonic()
        threads[0].join(run.size.settle_s)
        if threads[0].is_alive():
            run.notes.append(f"{len(run.ids) - len(run.uploaded)} failures were not uploaded in time")
        run.wait(run.settled, run.size.settle_s - (time.monotonic() - quiet), every_s=2.0)
        took = time.monotonic() - quiet
        run.stop.set()
        threads[1].join()
    return took


class _PatientFleet(ReportingFleet):
    """Robots report again when the store is back."""

    def report(self) -> None:
        with suppress(FlywheelError):
            super().report()


def _count(run: Run) -> dict[str, int]:
    """What became of every failure, turn and task."""
    store, airflow = run.store(), run.airflow
    claims = {
        i.key.split("/")[1]: store.get_json(i.key, Claims)
        for i in store.list("claimed/")
        if i.key.endswith("/claims.json")
    }
    results = {name: _result(store, name) for name, _ in _turns(store)}
    claimed = Counter(c.episode_id for held in claims.values() for c in held.episodes)
    curated: Counter[str] = Counter()
    for name, result in results.items():
        try:
            curated.update(set(_dataset(store, run.checkout, result)) if result else ())
        except FlywheelError as e:
            run.notes.append(f"{name}: {e}")
    shown = {e.turn for e in experiments(run.checkout)}
    runs = run.runs(100)
    tasks = [(r, t) for r in runs for t in approvals.run(airflow, r.dag, r.run_id).tasks]
    stuck = [(r, t) for r, t in tasks if t.state not in ENDED]
    run.notes += [f"{r.run_id}: {t.name} is {t.state}" for r, t in stuck[:10]]
    lost = [i for i in run.ids if not curated[i]]
    run.notes += [f"failure {i} is in no dataset; claims: {claimed[i]}" for i in lost[:5]]
    ended = [r for r in results.values() if r is not None]
    return {
        "failures": len(run.ids),
        "in_one_dataset": sum(curated[i] == 1 for i in run.ids),
        "in_two_datasets": sum(n > 1 for n in curated.values()),
        "claimed_twice": sum(n > 1 for n in claimed.values()),
        "lost": len(lost),
        "waiting": backlog(store).count,
        "turns": len(results),
        "turns_closed": sum(r.ok for r in ended),
        "turns_failed_with_a_reason": sum(not r.ok for r in ended),
        "turns_without_an_end": sum(r is None for r in results.values()),
        "claims_without_a_turn": len(set(claims) - set(results)),
        "not_in_dvc_exp_show": len({r.turn for r in ended if r.stages} - shown),
        "runs": len(runs),
        "runs_failed": sum(r.state == "failed" for r in runs),
        "runs_cleared_by_a_person": len(run.cleared),
        "tasks": len(tasks),
        "tasks_tried_again": sum(t.attempt > 1 for _, t in tasks),
        "tasks_stuck": len(stuck),
    }


def _turns(store: Store) -> list[tuple[str, bool]]:
    """Every turn that was opened, and whether it was closed."""
    keys = {i.key for i in store.list("runs/")}
    names = sorted(k.split("/")[1] for k in keys if k.endswith("/turn.json") and k.count("/") == 2)
    return [(n, f"runs/{n}/result.json" in keys) for n in names]


def _result(store: Store, turn: str) -> TurnResult | None:
    store.get_json(f"runs/{turn}/turn.json", TurnRecord)
    try:
        return store.get_json(f"runs/{turn}/result.json", TurnResult)
    except NotFound:
        return None


def _dataset(store: Store, checkout: Path, result: TurnResult) -> list[str]:
    """The episodes of a turn's curated dataset, from the store, as the experiment's dvc.lock names it."""
    import yaml

    if not result.experiment:
        return []
    lock = yaml.safe_load(git(checkout, "show", f"{result.experiment}:dvc.lock"))
    outs = lock["stages"]["curate"]["outs"]
    md5 = next(o["md5"] for o in outs if o["path"] == DATASET)
    listed = json.loads(store.get(f"dvc/files/md5/{md5[:2]}/{md5[2:]}"))
    inner = next(e["md5"] for e in listed if e["relpath"] == "episodes.json")
    return list(json.loads(store.get(f"dvc/files/md5/{inner[:2]}/{inner[2:]}")))


def _having(variable: str) -> Iterator[process.Process]:
    """Processes of ours with the variable in their environment, whatever it says."""
    home = os.environ["FLYWHEEL_HOME"].encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                pairs = (entry / "environ").read_bytes().split(b"\0")
                if b"FLYWHEEL_HOME=" + home in pairs:
                    values = [p.partition(b"=")[2] for p in pairs if p.startswith(f"{variable}=".encode())]
                    if values:
                        yield process.Process(values[0].decode(), int(entry.name), 0, "")


def _tree(pid: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError):
                stat = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found = [pid]
    for p in found:
        found += parents.get(p, [])
    return found


@contextmanager
def environment(home: Path) -> Iterator[None]:
    """This process's environment for the run: the embedded store and a checkout of its own, no others."""
    set_: Mapping[str, str] = {
        "FLYWHEEL_HOME": str(home),
        "FLYWHEEL_CHECKOUT": str(home / "checkout"),
        "FLYWHEEL_APPROVERS": f"ops,{AUTO_APPROVER}",
        "TEST_LOG": str(home / "stages.log"),
        "DVC_SITE_CACHE_DIR": str(home / "dvc" / "site"),
    }
    before = dict(os.environ)
    for name in ("FLYWHEEL_STORE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        os.environ.pop(name, None)
    os.environ.update(set_)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
