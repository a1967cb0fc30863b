"""``flywheel bench operations``: what running the cloud side costs, measured on the real thing.

Each DAG file is parsed in a process of its own. The commands ``flywheel up`` and ``flywheel down`` are run on
a state directory of their own, twice, and what the first life knew has to be there in the second; then
``dag.test`` runs each DAG to its end on the embedded store, over a checkout whose stages take seconds. Memory
is the proportional set size (PSS) of every process that belongs to the services, summed: what they share is
counted once. One MB is 10^6 bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flywheel.bench.hostile import sound_episode
from flywheel.bench.restarts import environment
from flywheel.edge.bench import machine
from flywheel.edge.spool import Spool
from flywheel.errors import ServiceError
from flywheel.rehearsal.checkouts import make_checkout
from flywheel.rehearsal.reporting import ReportingFleet
from flywheel.services.airflow import Airflow, dags_folder
from flywheel.store import Store

DAGS = ("collect", "questions", "improve", "release", "watch")
OBJECTS = 100
SETTLE_S = 15.0  # from healthy to the measurement: the DAGs have been parsed by then
RUN_S = 120.0
PARSE_S, PARSE_MB, UP_S, UP_MB = 1.0, 200.0, 45.0, 1500.0

# The clock starts where the DAG processor's does: it forks for each file, with Airflow imported already.
_PARSE = """
import json, sys, time
cold = time.perf_counter()
import airflow.sdk
from airflow.dag_processing.dagbag import DagBag
from airflow.providers.standard.operators.bash import BashOperator
warm, cpu = time.perf_counter(), time.process_time()
bag = DagBag(sys.argv[1], collect_dags=False)
bag.process_file(sys.argv[1])
done, cpu = time.perf_counter(), time.process_time() - cpu
fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print(json.dumps({"dags": sorted(bag.dags), "errors": bag.import_errors, "s": done - warm, "cpu_s": cpu,
                  "cold_s": done - cold, "mb": int(fields["Pss"].split()[0]) * 1024 / 1e6}))
"""

_TEST = """
import json, subprocess, sys
subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, capture_output=True)
from airflow.dag_processing.dagbag import DagBag
from flywheel.turn import turn_name
def tested(name, **options):
    run = DagBag(f"{sys.argv[1]}/{name}.py").dags[name].test(**options)
    tasks = {t.task_id: str(t.state) for t in run.get_task_instances()}
    return {"state": str(run.state), "tasks": tasks, "turn": turn_name(run.run_id, run.run_after)}
found = {"collect": tested("collect", run_conf={"force": True})}
turn = {"turn": found["collect"]["turn"]}
found["improve"] = tested("improve", run_conf=turn)
# A person's task cannot run here; the fleet approves in its stead.
found["release"] = tested("release", run_conf=turn, mark_success_pattern="approve|promote|hold|roll_back")
found["watch"] = tested("watch")
print()
print(json.dumps(found))
"""


def operations(full: bool = False) -> dict[str, Any]:
    """Two or three minutes, with ``full`` three more starts; returns the document of ``--json``."""
    load, notes = os.getloadavg(), list[str]()
    figures: dict[str, float] = {}
    for name in DAGS:
        found = _python(_PARSE, str(dags_folder() / f"{name}.py"))
        notes += [str(e) for e in found["errors"].values()]
        figures |= {
            f"parse_{name}_s": found["s"],
            f"parse_{name}_cpu_s": found["cpu_s"],
            f"parse_{name}_cold_s": found["cold_s"],
            f"parse_{name}_mb": found["mb"],
            f"parse_{name}_errors": float(len(found["errors"]) + (found["dags"] != [name])),
        }
    home = Path(tempfile.mkdtemp(prefix="flywheel-operations-"))
    try:
        with environment(home):
            make_checkout(home / "checkout")
            figures |= _lives(home, notes, 5 if full else 2)
            figures |= _dag_tests(home, notes)
            _flywheel("down")
            figures["processes_left"] += len(_left(home))
    finally:
        with environment(home):
            _flywheel("down")
        shutil.rmtree(home, ignore_errors=True)
    parse_s, parse_mb = (max(figures[f"parse_{n}_{u}"] for n in DAGS) for u in ("s", "mb"))
    errors = sum(figures[f"parse_{n}_errors"] for n in DAGS)
    bars: dict[str, tuple[float, str, float]] = {
        "parse_errors": (errors, "<=", 0.0),
        "parse_max_s": (parse_s, "<", PARSE_S),
        "parse_max_mb": (parse_mb, "<", PARSE_MB),
        "dag_tests_failed": (figures["dag_tests_failed"], "<=", 0.0),
        "up_max_s": (figures["up_max_s"], "<", UP_S),
        "up_mb": (figures["up_mb"], "<", UP_MB),
        "processes_left": (figures["processes_left"], "<=", 0.0),
        "objects_lost": (figures["objects_lost"], "<=", 0.0),
        "runs_lost": (figures["runs_lost"], "<=", 0.0),
    }
    return {
        "bench": "operations",
        "machine": machine(),
        "load": {"before": load, "after": os.getloadavg(), "full": full, "notes": notes},
        "figures": figures,
        "bars": {
            k: {"value": v, "op": op, "bar": bar, "ok": v < bar if op == "<" else v <= bar}
            for k, (v, op, bar) in bars.items()
        },
    }


def _lives(home: Path, notes: list[str], times: int) -> dict[str, float]:
    """Up, work, down, and up again; the services are up in the end."""
    ups, downs, memory, left, lost, runs_lost = [], [], 0.0, 0, 0, 0
    objects: dict[str, bytes] = {}
    ran: set[str] = set()
    for life in range(times):
        began = time.perf_counter()
        _flywheel("up")
        ups.append(time.perf_counter() - began)
        airflow, store = Airflow(home), Store.from_env()
        if sick := [part for part, well in airflow.health().items() if not well]:
            notes.append(f"`up` came back before these were healthy: {', '.join(sick)}")
            ups[-1] = float("inf")
        lost += sum(1 for k, v in objects.items() if not store.exists(k) or store.get(k) != v)
        path = "/dags/watch/dagRuns"
        known = {r["dag_run_id"]: r["state"] for r in airflow.call("GET", path)["dag_runs"]}
        runs_lost += sum(1 for r in ran if known.get(r) != "success")
        if life == times - 1:
            break
        time.sleep(SETTLE_S)
        memory = max(memory, sum(_pss_mb(pid) for pid in _left(home)))
        for n in range(OBJECTS):
            key, data = f"kept/{life}/{n}", os.urandom(1000)
            store.put(key, data)
            objects[key] = data
        run = airflow.call("POST", path, {"dag_run_id": f"life-{life}", "logical_date": None})["dag_run_id"]
        state = ""
        while state not in ("success", "failed") and time.perf_counter() - began < UP_S + SETTLE_S + RUN_S:
            time.sleep(1.0)
            state = airflow.call("GET", f"{path}/{run}")["state"]
        if state == "success":
            ran.add(run)
        else:
            notes.append(f"the run {run} of the DAG watch was {state or 'nowhere'} after {RUN_S:.0f} s")
            runs_lost += 1
        began = time.perf_counter()
        _flywheel("down")
        downs.append(time.perf_counter() - began)
        still = _left(home)
        notes += [f"left: {Path(f'/proc/{p}/cmdline').read_text()[:200]}" for p in still[:3]]
        left += len(still)
    return {
        "up_first_s": ups[0],
        "up_again_s": max(ups[1:]),
        "up_max_s": max(ups),
        "up_mb": memory,
        "down_max_s": max(downs),
        "objects": float(len(objects)),
        "objects_lost": float(lost),
        "runs": float(len(ran)),
        "runs_lost": float(runs_lost),
        "processes_left": float(left),
    }


def _dag_tests(home: Path, notes: list[str]) -> dict[str, float]:
    """Each DAG to its end, on the embedded store, with robots that report."""
    store = Store.from_env()
    spool = Spool(home / "spool", store, 1 << 30)
    sound_episode(home / "spool" / "episodes", 1)
    if not spool.upload_once(0).uploaded:
        raise ServiceError("the failure for dag.test was not uploaded")
    began = time.perf_counter()
    base = home / "checkout" / "models" / "base" / "bundle"
    with ReportingFleet(store, home / "keys", base, approver="ops"):
        folder = str(dags_folder())
        airflow = {"AIRFLOW_HOME": str(home / "airflow-test"), "AIRFLOW__CORE__DAGS_FOLDER": folder}
        found = _python(_TEST, folder, **airflow)
    failed = 0
    for name, run in found.items():
        wrong = {t: s for t, s in run["tasks"].items() if s not in ("success", "skipped")}
        skipped = {t for t, s in run["tasks"].items() if s == "skipped"} - {"give_up"}
        if run["state"] != "success" or wrong or skipped:
            failed += 1
            notes.append(f"dag.test of {name}: {run['state']}; {wrong}; skipped: {sorted(skipped)}")
    return {
        "dag_tests": float(len(found)),
        "dag_tests_failed": float(failed),
        "dag_tests_s": time.perf_counter() - began,
    }


def _flywheel(command: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("flywheel")), command],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise ServiceError(f"flywheel {command}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def _python(code: str, *args: str, **environ: str) -> Any:
    """Run code in a process of its own; the JSON in its last line."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(dags_folder().parent), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServiceError(f"python: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _left(home: Path) -> list[int]:
    """Every process that names the state directory in its environment or command line, but ours."""
    found, ours = [], {os.getpid(), os.getppid()}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in ours:
            continue
        try:
            text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:  # gone, or another user's
            continue
        if str(home).encode() in text:
            found.append(int(entry.name))
    return found


def _pss_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # gone meanwhile
        return 0.0
    return next(int(x.split()[1]) * 1024 / 1e6 for x in lines if x.startswith("Pss:"))
