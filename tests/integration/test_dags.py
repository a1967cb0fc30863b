"""The wheel's DAG: how it parses, what it promises, a run of it on the real store, and what decisions may do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flywheel import policies, rollout
from flywheel.config import Deployment, RolloutSettings
from flywheel.errors import StageError
from flywheel.rollout import RolloutState
from flywheel.schema import Check, GateReport, RolloutStage, Verdict, bundle_digest, sha256_bytes
from flywheel.store import Store
from flywheel.turn import STAGES, TurnResult
from tests.checkouts import fail_on_a_robot, make_checkout
from tests.deliveries import make_bundle
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
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def parsed() -> Any:
    """What a DAG processor finds in the folder, and what that costs."""
    return in_airflow(
        f"""
        import json, resource, sys, time
        from airflow.dag_processing.dagbag import DagBag
        began = time.process_time()
        bag = DagBag({str(ROOT / "dags")!r}, collect_dags=False)
        bag.collect_dags()
        seconds = time.process_time() - began
        dag = bag.dags["wheel"]
        print(json.dumps({{
            "errors": bag.import_errors,
            "cpu_s": seconds,
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "heavy": [m for m in {HEAVY!r} if m in sys.modules],
            "dags": sorted(bag.dags),
            "max_active_runs": dag.max_active_runs,
            "doc": dag.doc_md,
            "tags": sorted(dag.tags),
            "params": sorted(dag.params),
            "tasks": {{t.task_id: {{
                "down": sorted(t.downstream_task_ids), "owner": t.owner, "retries": t.retries,
                "rule": str(t.trigger_rule), "pool": t.pool, "command": getattr(t, "bash_command", ""),
            }} for t in dag.tasks}},
            "approve": {{k: getattr(dag.get_task("release.approve"), k)
                for k in ("options", "defaults", "assigned_users", "options_mapping")}},
        }}))
        """,
        FLYWHEEL_APPROVERS="ada, grace",
    )


def test_the_folder_parses_quickly_and_imports_nothing_heavy(parsed: Any) -> None:
    assert parsed["errors"] == {}
    assert parsed["dags"] == ["wheel"]
    assert parsed["heavy"] == []
    assert parsed["cpu_s"] < 1.0
    assert parsed["rss_mb"] < 200


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


def test_a_run_from_failures_to_every_robot(
    store: Store, store_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    home = tmp_path / "home"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    fail_on_a_robot(store, tmp_path, 1)
    with ReportingFleet(store, home / "keys", checkout / "models/base/bundle", approver="ops") as fleet:
        run = in_airflow(
            f"""
            import json, subprocess, sys
            subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, capture_output=True)
            from airflow.dag_processing.dagbag import DagBag
            dag = DagBag({str(ROOT / "dags" / "wheel.py")!r}).dags["wheel"]
            # The person's task cannot run here; the fleet's thread approves in its stead.
            run = dag.test(
                run_conf={{"force": True, "adjust": {{"train.steps": 5}}}},
                mark_success_pattern=r"release\\.(approve|promote|hold|roll_back)",
            )
            states = {{t.task_id: str(t.state) for t in run.get_task_instances()}}
            print()
            print(json.dumps({{"state": str(run.state), "tasks": states}}))
            """,
            FLYWHEEL_CHECKOUT=str(checkout),
            FLYWHEEL_HOME=str(home),
            TEST_LOG=str(tmp_path / "stages.log"),
            AIRFLOW_HOME=str(tmp_path / "airflow"),
            PATH=path,
        )
    assert run["state"] == "success", run
    assert run["tasks"].pop("improve.give_up") == "skipped"
    assert set(run["tasks"].values()) == {"success"}
    (result,) = [
        store.get_json(i.key, TurnResult) for i in store.list("runs/") if i.key.endswith("result.json")
    ]
    assert fleet.loaded == dict.fromkeys(ROBOTS, result.candidate_digest)
    assert result.experiment


# ── what a decision may do ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def waiting(
    store: Store, store_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str, ReportingFleet]]:
    """A turn whose rollout waits for approval: its name, the rollout's id, the fleet."""
    from dags import steps

    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path / "home"))
    base, candidate = make_bundle(tmp_path, "base"), make_bundle(tmp_path, "candidate")
    fleet = ReportingFleet(store, tmp_path / "home" / "keys", base)
    policies.publish(store, "turn-a", candidate, make_bundle(tmp_path, "checkpoint"))
    gate = gate_report(bundle_digest(candidate), bundle_digest(base))
    gate_digest = store.put_json("gates/x.json", gate)
    store.put(f"gates/{gate_digest}.json", gate.to_bytes())
    result = TurnResult(
        turn="turn-a",
        ok=True,
        stages=STAGES,
        commit="c" * 40,
        experiment="e" * 40,
        current_digest=bundle_digest(base),
        candidate_digest=bundle_digest(candidate),
        gate_digest=gate_digest,
        verdict=Verdict.PROMOTE,
    )
    store.put_json("runs/turn-a/result.json", result)
    settings = RolloutSettings(canary_fraction=0.25)
    state = rollout.start(store, fleet.publisher, result.candidate_digest, gate_digest, settings)
    for until in ("canary", "approval"):
        for _ in range(5):
            fleet.report()
            if steps.watch(state.rollout_id, until, name="turn-a")[0]:
                break
    assert stage_of(store, state.rollout_id) is RolloutStage.APPROVAL
    yield "turn-a", state.rollout_id, fleet


def gate_report(candidate: str, current: str) -> GateReport:
    check = Check(name="lift", verdict=Verdict.PROMOTE, value=0.4, low=0.2, high=0.6, bar="> 0", n=60)
    return GateReport(
        candidate_digest=candidate,
        current_digest=current,
        checks=(check,),
        verdict=Verdict.PROMOTE,
        reasons=(),
    )


def stage_of(store: Store, rollout_id: str) -> RolloutStage:
    return rollout.status(store, rollout_id).state.stage


def answered(name: str | None = "ops", reason: Any = "looks good") -> dict[str, Any]:
    user = {"id": name, "name": name} if name else None
    return {"responded_by_user": user, "params_input": {"reason": reason}}


def test_the_approver_is_shown_both_digests_the_gate_and_the_canary(
    waiting: tuple[str, str, ReportingFleet], store: Store
) -> None:
    from dags import steps

    name, rollout_id, _ = waiting
    reached, body = steps.watch(rollout_id, "approval", name=name)
    state = rollout.status(store, rollout_id).state
    assert reached
    for text in (
        state.bundle_digest,
        state.gate_digest,
        name,
        "| lift | 0.4 | 0.2 … 0.6 |",
        "tracking error",
    ):
        assert text in body


def test_promote_releases_to_every_robot_and_a_repeat_changes_nothing(
    waiting: tuple[str, str, ReportingFleet], store: Store
) -> None:
    from dags import steps

    name, rollout_id, fleet = waiting
    steps.decide("Promote", name, rollout_id, answered())
    steps.decide("Promote", name, rollout_id, answered())
    assert stage_of(store, rollout_id) is RolloutStage.WIDE
    for _ in range(10):
        fleet.report()
        if steps.watch(rollout_id, "done")[0]:
            break
    assert "approved by ops" not in steps.outcome(name, rollout_id)
    assert "done" in steps.outcome(name, rollout_id)
    approvals = rollout.status(store, rollout_id).approvals
    assert {(a.by, a.reason) for a in approvals} == {("ops", "looks good")}


@pytest.mark.parametrize("option", ["Hold", "Roll back"])
def test_hold_and_roll_back_withdraw_the_candidate_from_the_canary(
    option: str, waiting: tuple[str, str, ReportingFleet], store: Store
) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    from dags import steps

    name, rollout_id, fleet = waiting
    steps.decide(option, name, rollout_id, answered(None if option == "Roll back" else "ops"))
    assert stage_of(store, rollout_id) in (RolloutStage.HELD, RolloutStage.ROLLED_BACK)
    fleet.report()
    assert set(fleet.loaded.values()) == {fleet.base}
    with pytest.raises(AirflowSkipException):
        steps.watch(rollout_id, "done")
    assert steps.watch(rollout_id, "wide", skip=False)[0]


def forged_bundle(store: Store, state: RolloutState) -> None:
    result = store.get_json("runs/turn-a/result.json", TurnResult)
    store.put_json("runs/turn-a/result.json", result.model_copy(update={"candidate_digest": "0" * 64}))


def other_gate_report(store: Store, state: RolloutState) -> None:
    result = store.get_json("runs/turn-a/result.json", TurnResult)
    store.put_json("runs/turn-a/result.json", result.model_copy(update={"gate_digest": "0" * 64}))


@pytest.mark.parametrize("change", [forged_bundle, other_gate_report])
def test_a_promotion_of_other_digests_than_the_rollouts_is_void(
    change: Callable[[Store, RolloutState], None], waiting: tuple[str, str, ReportingFleet], store: Store
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags import steps

    name, rollout_id, _ = waiting
    change(store, rollout.status(store, rollout_id).state)
    with pytest.raises(AirflowFailException, match="void"):
        steps.decide("Promote", name, rollout_id, answered())
    assert stage_of(store, rollout_id) is RolloutStage.APPROVAL
    assert rollout.status(store, rollout_id).approvals == ()


def test_a_gate_report_changed_in_the_store_voids_an_approval_already_given(
    waiting: tuple[str, str, ReportingFleet], store: Store
) -> None:
    from dags import steps

    name, rollout_id, _ = waiting
    state = rollout.status(store, rollout_id).state
    report = gate_report(state.bundle_digest, "1" * 64)
    store.put(f"gates/{state.gate_digest}.json", report.to_bytes())
    steps.decide("Promote", name, rollout_id, answered())
    assert stage_of(store, rollout_id) is RolloutStage.HELD
    assert sha256_bytes(report.to_bytes()) != state.gate_digest


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (answered("mallory"), "mallory may not approve"),
        (answered(None), "may not approve"),
        ({}, "may not approve"),
        (answered(reason="x" * 2001), "reason"),
        (answered(reason=7), "reason"),
    ],
)
def test_a_promotion_by_the_wrong_user_or_with_bad_input_is_refused(
    answer: dict[str, Any], match: str, waiting: tuple[str, str, ReportingFleet], store: Store
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags import steps

    name, rollout_id, _ = waiting
    with pytest.raises(AirflowFailException, match=match):
        steps.decide("Promote", name, rollout_id, answer)
    assert stage_of(store, rollout_id) is RolloutStage.APPROVAL


def test_a_promotion_that_comes_after_a_roll_back_is_refused(
    waiting: tuple[str, str, ReportingFleet], store: Store
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags import steps

    name, rollout_id, _ = waiting
    steps.decide("Roll back", name, rollout_id, answered())
    with pytest.raises(AirflowFailException, match="rolled back"):
        steps.decide("Promote", name, rollout_id, answered())
    assert stage_of(store, rollout_id) is RolloutStage.ROLLED_BACK


def test_a_gate_that_does_not_promote_ends_the_turn_without_a_rollout(
    store: Store, store_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    from dags import steps

    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))
    result = TurnResult(
        turn="turn-a", ok=True, stages=STAGES, commit="c", verdict=Verdict.HOLD, reasons=("lift: 0",)
    )
    store.put_json("runs/turn-a/result.json", result)
    with pytest.raises(AirflowSkipException, match="lift: 0"):
        steps.start_rollout("turn-a")
    assert "no rollout" in steps.outcome("turn-a", None)
    assert list(store.list("rollouts/")) == []
    with pytest.raises(StageError, match="close it first"):
        steps.start_rollout("turn-b")


def test_a_store_that_is_down_does_not_end_the_watching(
    free_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dags import steps

    for name, value in {
        "FLYWHEEL_HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": free_endpoint,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
    }.items():
        monkeypatch.setenv(name, value)
    assert Deployment.from_env().endpoint == free_endpoint
    assert steps.watch("0" * 12 + "-" + "0" * 12, "canary") == (False, "")
