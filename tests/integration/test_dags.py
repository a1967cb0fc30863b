"""The DAGs: how they parse, what they promise, and runs of them on the real store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flywheel.store import Store
from flywheel.turn import STAGES, TURN, TurnResult
from tests.checkouts import fail_on_a_robot, make_checkout
from tests.fleets import ROBOTS, ReportingFleet

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
DAGS = ("collect", "improve", "release")
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
        timeout=560,
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
        heavy = [m for m in {HEAVY!r} if m in sys.modules]
        asked = []
        class Busy:
            def get_dr_count(self, dag_id, states):
                asked.append([dag_id, states])
                return 1
        called = bag.dags["collect"].get_task("open").python_callable, \
            bag.dags["improve"].get_task("begin").python_callable
        print(json.dumps({{
            "errors": bag.import_errors,
            "goes_on": [bool(called[0]({{}}, None, Busy())), bool(called[1]("turn-b", Busy()))],
            "asked": asked,
            "heavy": heavy,
            "dags": {{dag.dag_id: {{
                "max_active_runs": dag.max_active_runs,
                "doc": dag.doc_md,
                "tags": sorted(dag.tags),
                "params": {{n: p.schema for n, p in dag.params.items()}},
                "groups": sorted(g for g in dag.task_group_dict if g),
                "tasks": {{t.task_id: {{
                    "down": sorted(t.downstream_task_ids), "owner": t.owner, "retries": t.retries,
                    "rule": t.trigger_rule.value, "pool": t.pool, "command": getattr(t, "bash_command", ""),
                    "inlets": [a.name for a in t.inlets], "outlets": [a.name for a in t.outlets],
                    "starts": getattr(t, "trigger_dag_id", ""), "backs_off": t.retry_exponential_backoff,
                    "callbacks": len(t.on_failure_callback or ()),
                }} for t in dag.tasks}},
            }} for dag in bag.dags.values()}},
            "approve": {{k: getattr(bag.dags["release"].get_task("approve"), k)
                for k in ("options", "defaults", "assigned_users", "options_mapping")}},
        }}))
        """,
        FLYWHEEL_APPROVERS="ada, grace",
    )


def tasks(parsed: Any, dag: str) -> dict[str, Any]:
    """By name."""
    found: dict[str, Any] = parsed["dags"][dag]["tasks"]
    return found


def test_the_folder_parses_and_imports_nothing_heavy(parsed: Any) -> None:
    assert parsed["errors"] == {}
    assert sorted(parsed["dags"]) == ["collect", "improve", "questions", "release", "watch"]
    assert parsed["heavy"] == []


def test_the_stages_run_in_order_and_none_is_missing(parsed: Any) -> None:
    commands = [t["command"] for d in DAGS for t in tasks(parsed, d).values() if t["command"]]
    assert [c.split()[-1] for c in commands] == list(STAGES)
    assert all(c.startswith("exec flywheel turn stage") for c in commands)
    for dag, names in (
        ("collect", ["open", "curate", "label", "replay", "hand_over"]),
        ("improve", ["begin", "train", "export", "hand_over"]),
        ("release", ["gate", "register", "start", "shadow", "canary", "approve"]),
    ):
        for before, after in pairwise(names):
            assert after in tasks(parsed, dag)[before]["down"]
    assert [tasks(parsed, d)["hand_over"]["starts"] for d in DAGS[:2]] == ["improve", "release"]
    release = tasks(parsed, "release")
    assert set(parsed["approve"]["options_mapping"].values()) <= set(release["approve"]["down"])
    assert "wide" in release["promote"]["down"]


def test_the_asset_graph_leads_from_the_failure_log_to_the_release(parsed: Any) -> None:
    """Airflow follows an asset through the tasks that take it in and give another out."""
    at = ["failures"]
    for name in at:
        for dag in DAGS:
            at += [o for t in tasks(parsed, dag).values() if name in t["inlets"] for o in t["outlets"]]
    assert at == ["failures", "dataset", "policy", "release"]


def test_each_run_is_one_at_a_time_documented_owned_and_repeats_what_fails(parsed: Any) -> None:
    rules: dict[str, str] = {}
    for name in DAGS:
        dag = parsed["dags"][name]
        assert dag["max_active_runs"] == 1
        assert "turn" in dag["tags"]
        assert "clearing its task" in " ".join(dag["doc"].split())
        assert dag["groups"]
        for task, t in dag["tasks"].items():
            assert t["owner"] == "flywheel"
            assert t["retries"] >= 1
            assert t["backs_off"]
            assert t["callbacks"] == 1
            if t["rule"] != "all_success":
                rules[f"{name}.{task}"] = t["rule"]
    assert tasks(parsed, "improve")["train"]["pool"] == tasks(parsed, "release")["gate"]["pool"] == "trainer"
    # No other task may run after something failed.
    assert rules == {f"{d}.give_up": "one_failed" for d in DAGS} | {"release.outcome": "none_failed"}


def test_a_turn_waits_while_the_next_dag_has_one_or_is_about_to(parsed: Any) -> None:
    assert parsed["goes_on"] == [False, False]
    assert parsed["asked"] == [[d, ["queued", "running"]] for d in ("improve", "release")]


def test_a_run_by_hand_is_asked_for_what_it_needs(parsed: Any) -> None:
    params = {d: parsed["dags"][d]["params"] for d in DAGS}
    assert sorted(params["collect"]) == ["adjust", "force"]
    for dag in DAGS[1:]:
        assert set(params[dag]) == {"turn"}
        assert params[dag]["turn"]["pattern"] == f"^{TURN.pattern}$"
        assert params[dag]["turn"]["title"]


def test_what_is_looked_after_between_turns_is_documented_owned_and_repeated(parsed: Any) -> None:
    watch = parsed["dags"]["watch"]
    assert set(watch["tasks"]) == {"renew", "clear", "attention", "catalogue"}
    assert all(t["owner"] == "flywheel" and t["retries"] >= 1 for t in watch["tasks"].values())
    assert "silent robots" in watch["doc"]


def test_only_named_people_may_approve_and_silence_rolls_back(parsed: Any) -> None:
    assert [u["name"] for u in parsed["approve"]["assigned_users"]] == ["ada", "grace"]
    assert parsed["approve"]["defaults"] == ["Roll back"]
    assert parsed["approve"]["options"] == ["Promote", "Hold", "Roll back"]


def test_an_empty_list_of_approvers_is_refused_rather_than_meaning_everybody() -> None:
    errors = in_airflow(
        f"""
        import json
        from airflow.dag_processing.dagbag import DagBag
        print(json.dumps(list(DagBag({str(ROOT / "dags" / "release.py")!r}).import_errors.values())))
        """,
        FLYWHEEL_APPROVERS=" , ",
    )
    assert "FLYWHEEL_APPROVERS is empty" in errors[0]


@pytest.mark.timeout(600)  # seven runs, each of which reads the DAGs anew
def test_a_turn_from_failures_to_every_robot(store: Store, store_env: dict[str, str], tmp_path: Path) -> None:
    """Each DAG to its end; a run of the next one is there, once, however often it is handed over."""
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
            from airflow.models.asset import AssetEvent, AssetModel
            from airflow.models.dagrun import DagRun
            from airflow.models.xcom import XComModel
            from airflow.utils.session import create_session
            from flywheel.turn import turn_name

            def tested(name, conf=None, **options):
                bag = DagBag({str(ROOT / "dags")!r} + f"/{{name}}.py")
                run = bag.dags[name].test(run_conf=conf, **options)
                states = {{t.task_id: str(t.state) for t in run.get_task_instances()}}
                return run, {{"state": str(run.state), "tasks": states}}

            found = {{"absent": tested("improve", {{"turn": "turn-nowhere"}})[1]}}
            found["few"] = tested("collect")[1]
            opened, found["collect"] = tested("collect", {{"force": True, "adjust": {{"train.steps": 5}}}})
            turn = {{"turn": turn_name(opened.run_id, opened.run_after)}}
            found["improve"] = tested("improve", turn)[1]
            found["handed over again"] = tested("improve", turn, mark_success_pattern="begin|train|export")[1]
            # The person's task cannot run here; the fleet's thread approves in its stead.
            judged = "approve|promote|hold|roll_back"
            found["release"] = tested("release", turn, mark_success_pattern=judged)[1]
            found["watch"] = tested("watch")[1]
            with create_session() as session:
                found["handed"] = sorted([r.dag_id, r.run_id, r.run_type, r.conf] for r in
                    session.query(DagRun).filter(DagRun.run_id == turn["turn"]))
                names = dict(session.query(AssetModel.id, AssetModel.name).all())
                found["events"] = [[names[e.asset_id], e.extra] for e in
                    session.query(AssetEvent).order_by(AssetEvent.id)]
                found["why"] = [[x.dag_id, x.task_id, x.value] for x in
                    session.query(XComModel).filter(XComModel.key == "why").order_by(XComModel.timestamp)]
            print()
            print(json.dumps({{"turn": turn["turn"], **found}}))
            """,
            FLYWHEEL_CHECKOUT=str(checkout),
            FLYWHEEL_HOME=str(home),
            TEST_LOG=str(tmp_path / "stages.log"),
            AIRFLOW_HOME=str(tmp_path / "airflow"),
            AIRFLOW__CORE__DAGS_FOLDER=str(ROOT / "dags"),
            PATH=path,
        )
    turn = run["turn"]
    for name in ("collect", "improve", "handed over again", "release"):
        assert run[name]["state"] == "success", run
        assert run[name]["tasks"].pop("give_up") == "skipped"
        assert set(run[name]["tasks"].values()) == {"success"}
    assert run["watch"]["tasks"] == dict.fromkeys(("renew", "clear", "attention", "catalogue"), "success")
    assert run["handed"] == [[d, turn, "operator_triggered", {"turn": turn}] for d in ("improve", "release")]
    (result,) = [
        store.get_json(i.key, TurnResult) for i in store.list("runs/") if i.key.endswith("result.json")
    ]
    assert result.turn == turn
    assert fleet.loaded == dict.fromkeys(ROBOTS, result.candidate_digest)
    assert result.experiment
    assert (tmp_path / "stages.log").read_text().split() == list(STAGES), "a stage ran twice or not at all"

    # Each asset says which turn made it, and of what.
    events = dict(run["events"])
    assert events["dataset"] == {"turn": turn, "dataset": result.dataset}
    assert events["policy"] == {"turn": turn, "dataset": result.dataset, "digest": result.candidate_digest}
    assert events["release"]["turn"] == turn

    # What ends a run, for good or by the rules, says why.
    assert run["absent"]["tasks"]["begin"] == "failed"
    assert run["few"]["tasks"]["open"] == "skipped"
    absent, few = run["why"]
    assert absent[:2] == ["improve", "begin"]
    assert "params.turn = 'turn-nowhere': turn-nowhere: no such turn" in absent[2]
    assert few[:2] == ["collect", "open"]
    assert "too few failures wait" in few[2]
