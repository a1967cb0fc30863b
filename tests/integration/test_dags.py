"""The DAGs: how they parse, what they promise, and runs of them on the real store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from flywheel.store import Store
from flywheel.turn import STAGES, TurnResult
from tests.checkouts import fail_on_a_robot, make_checkout
from tests.fleets import ROBOTS, ReportingFleet

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "lerobot", "transformers", "dvc", "boto3", "tuf", "mujoco", "onnxruntime", "onnx")


def in_airflow(code: str, **environ: str) -> Any:
    """Run code in a process of its own (Airflow reads its settings once); the JSON in its last line."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        cwd=Path(sys.executable).parent,  # no task may rely on where it runs
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def parsed() -> Any:
    """What a DAG processor finds in the folder, and what that imports."""
    return in_airflow(
        f"""
        import json, sys
        from airflow.dag_processing.dagbag import DagBag
        bag = DagBag({str(ROOT / "dags")!r}, collect_dags=False)
        bag.collect_dags()
        dag = bag.dags["wheel"]
        print(json.dumps({{
            "errors": bag.import_errors,
            "heavy": [m for m in {HEAVY!r} if m in sys.modules],
            "dags": sorted(bag.dags),
            "watch": {{t.task_id: [t.owner, t.retries] for t in bag.dags["watch"].tasks}},
            "watch_doc": bag.dags["watch"].doc_md,
            "max_active_runs": dag.max_active_runs,
            "doc": dag.doc_md,
            "tags": sorted(dag.tags),
            "params": sorted(dag.params),
            "tasks": {{t.task_id: {{
                "down": sorted(t.downstream_task_ids), "owner": t.owner, "retries": t.retries,
                "rule": t.trigger_rule.value, "pool": t.pool, "command": getattr(t, "bash_command", ""),
            }} for t in dag.tasks}},
            "approve": {{k: getattr(dag.get_task("release.approve"), k)
                for k in ("options", "defaults", "assigned_users", "options_mapping")}},
        }}))
        """,
        FLYWHEEL_APPROVERS="ada, grace",
    )


def test_the_folder_parses_and_imports_nothing_heavy(parsed: Any) -> None:
    assert parsed["errors"] == {}
    assert parsed["dags"] == ["questions", "watch", "wheel"]
    assert parsed["heavy"] == []


def test_the_stages_run_in_order_and_none_is_missing(parsed: Any) -> None:
    tasks = parsed["tasks"]
    commands = {name: t["command"] for name, t in tasks.items() if t["command"]}
    assert [c.split()[-1] for c in commands.values()] == list(STAGES)
    assert all(c.startswith("exec flywheel turn stage") for c in commands.values())
    names = [*commands, "improve.register", "release.start", "release.shadow", "release.canary"]
    for before, after in zip(names, [*names[1:], "release.approve"], strict=True):
        assert after in tasks[before]["down"]
    assert set(parsed["approve"]["options_mapping"].values()) <= set(tasks["release.approve"]["down"])
    assert "release.wide" in tasks["release.promote"]["down"]


def test_the_run_is_one_at_a_time_documented_owned_and_repeats_what_fails(parsed: Any) -> None:
    assert parsed["max_active_runs"] == 1
    assert parsed["tags"]
    assert "dvc exp show" in parsed["doc"]
    assert parsed["params"] == ["adjust", "force"]
    assert all(t["owner"] == "flywheel" and t["retries"] >= 1 for t in parsed["tasks"].values())
    assert parsed["tasks"]["improve.train"]["pool"] == "trainer"
    # No other task may run after something failed.
    rules = {name: t["rule"] for name, t in parsed["tasks"].items() if t["rule"] != "all_success"}
    assert rules == {"improve.give_up": "one_failed", "outcome": "none_failed"}


def test_what_is_looked_after_between_turns_is_documented_owned_and_repeated(parsed: Any) -> None:
    assert set(parsed["watch"]) == {"renew", "clear", "attention", "catalogue"}
    assert all(owner == "flywheel" and retries >= 1 for owner, retries in parsed["watch"].values())
    assert "silent robots" in parsed["watch_doc"]


def test_only_named_people_may_approve_and_silence_rolls_back(parsed: Any) -> None:
    assert [u["name"] for u in parsed["approve"]["assigned_users"]] == ["ada", "grace"]
    assert parsed["approve"]["defaults"] == ["Roll back"]
    assert parsed["approve"]["options"] == ["Promote", "Hold", "Roll back"]


def test_an_empty_list_of_approvers_is_refused_rather_than_meaning_everybody() -> None:
    errors = in_airflow(
        f"""
        import json
        from airflow.dag_processing.dagbag import DagBag
        print(json.dumps(list(DagBag({str(ROOT / "dags" / "wheel.py")!r}).import_errors.values())))
        """,
        FLYWHEEL_APPROVERS=" , ",
    )
    assert "FLYWHEEL_APPROVERS is empty" in errors[0]


def test_a_run_from_failures_to_every_robot(store: Store, store_env: dict[str, str], tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    home = tmp_path / "home"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    fail_on_a_robot(store, tmp_path, 1)
    with ReportingFleet(store, home / "keys", checkout / "models/base/bundle", approver="ops") as fleet:
        run = in_airflow(
            f"""
            import json, subprocess, sys
            migrate = [sys.executable, "-m", "airflow", "db", "migrate"]
            subprocess.run(migrate, check=True, capture_output=True)
            from airflow.dag_processing.dagbag import DagBag
            dag = DagBag({str(ROOT / "dags" / "wheel.py")!r}).dags["wheel"]
            # The person's task cannot run here; the fleet's thread approves in its stead.
            run = dag.test(
                run_conf={{"force": True, "adjust": {{"train.steps": 5}}}},
                mark_success_pattern=r"release\\.(approve|promote|hold|roll_back)",
            )
            states = {{t.task_id: str(t.state) for t in run.get_task_instances()}}
            after = DagBag({str(ROOT / "dags" / "watch.py")!r}).dags["watch"].test()
            watched = {{t.task_id: str(t.state) for t in after.get_task_instances()}}
            print()
            print(json.dumps({{"state": str(run.state), "tasks": states, "watched": watched}}))
            """,
            FLYWHEEL_CHECKOUT=str(checkout),
            FLYWHEEL_HOME=str(home),
            TEST_LOG=str(tmp_path / "stages.log"),
            AIRFLOW_HOME=str(tmp_path / "airflow"),
            AIRFLOW__CORE__DAGS_FOLDER=str(ROOT / "dags"),
            PATH=path,
        )
    assert run["state"] == "success", run
    assert run["tasks"].pop("improve.give_up") == "skipped"
    assert set(run["tasks"].values()) == {"success"}
    assert run["watched"] == dict.fromkeys(("renew", "clear", "attention"), "success")
    (result,) = [
        store.get_json(i.key, TurnResult) for i in store.list("runs/") if i.key.endswith("result.json")
    ]
    assert fleet.loaded == dict.fromkeys(ROBOTS, result.candidate_digest)
    assert result.experiment
