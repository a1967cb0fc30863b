"""What the wheel's tasks do with answers and gates: who may release what, and what becomes of the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flywheel import policies, rollout
from flywheel.config import RolloutSettings
from flywheel.errors import StageError
from flywheel.rollout import RolloutState
from flywheel.schema import Check, GateReport, RolloutStage, Verdict, bundle_digest, sha256_bytes
from flywheel.store import Store
from flywheel.turn import STAGES, TurnRecord, TurnResult
from tests.bucket import BucketStore
from tests.deliveries import make_bundle
from tests.fleets import ReportingFleet


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketStore:
    """The store that every step finds."""
    found = BucketStore()
    monkeypatch.setattr(Store, "from_env", lambda *_: found)
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path / "home"))
    return found


@pytest.fixture
def waiting(store: BucketStore, tmp_path: Path) -> tuple[str, str, ReportingFleet]:
    """A turn whose rollout waits for approval: its name, the rollout's id, the fleet."""
    from dags import steps

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
    return "turn-a", state.rollout_id, fleet


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


def untouched(store: Store) -> dict[str, bytes]:
    """Every object that a rollout or a release is made of."""
    return {i.key: store.get(i.key) for p in ("rollouts/", "releases/") for i in store.list(p)}


def other_bundle_shown(store: Store, rollout_id: str) -> None:
    forged_bundle(store, rollout.status(store, rollout_id).state)


def other_report_shown(store: Store, rollout_id: str) -> None:
    other_gate_report(store, rollout.status(store, rollout_id).state)


def already_approved(store: Store, rollout_id: str) -> None:
    from dags import steps

    steps.decide("Promote", "turn-a", rollout_id, answered())


def nobody_answered_in_time(store: Store, rollout_id: str) -> None:
    from dags import steps

    steps.decide("Roll back", "turn-a", rollout_id, answered(None))


def nothing(store: Store, rollout_id: str) -> None:
    pass


@pytest.mark.parametrize(
    ("before", "option", "answer", "refusal"),
    [
        pytest.param(
            other_bundle_shown, "Promote", answered(), "void: the bundle", id="changed bundle digest"
        ),
        pytest.param(other_report_shown, "Promote", answered(), "void: the gate", id="changed gate digest"),
        pytest.param(nothing, "Promote", answered("mallory"), "may not approve", id="wrong user"),
        pytest.param(nothing, "Promote", answered("OPS"), "may not approve", id="user in other letters"),
        pytest.param(nothing, "Promote", answered(None), "may not approve", id="nobody"),
        pytest.param(already_approved, "Promote", answered(), "", id="twice by the same person"),
        pytest.param(
            already_approved, "Promote", answered("ada"), "nothing to approve", id="twice by another"
        ),
        pytest.param(nobody_answered_in_time, "Promote", answered(), "nothing to approve", id="late"),
        pytest.param(nothing, "Promote", answered(reason="x" * 2001), "reason", id="reason too long"),
        pytest.param(nothing, "Promote", answered(reason=["x"]), "reason", id="reason of another type"),
        pytest.param(nothing, "promote", answered(), "must be one of", id="unknown option"),
    ],
)
def test_an_approval_that_may_not_count_leaves_rollout_and_releases_byte_for_byte(
    before: Callable[[Store, str], None],
    option: str,
    answer: dict[str, Any],
    refusal: str,
    waiting: tuple[str, str, ReportingFleet],
    store: BucketStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags import steps

    monkeypatch.setenv("FLYWHEEL_APPROVERS", "ops,ada")
    name, rollout_id, fleet = waiting
    fleet.publisher.init(("ops", "ada"))
    before(store, rollout_id)
    were = untouched(store)
    assert {k.split("/")[0] for k in were} == {"rollouts", "releases"}
    if refusal:
        with pytest.raises(AirflowFailException, match=refusal):
            steps.decide(option, name, rollout_id, answer)
    else:
        steps.decide(option, name, rollout_id, answer)  # a task that is tried again
    assert untouched(store) == were


def test_a_gate_that_does_not_promote_ends_the_turn_without_a_rollout(
    store: BucketStore,
) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    from dags import steps

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


@pytest.mark.parametrize("step", ["begin", "require_trained"])
def test_a_run_by_hand_of_a_turn_that_is_not_there_or_not_that_far_names_the_field_and_is_not_tried_again(
    step: str, store: BucketStore
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags import steps

    for name in ("turn-b", "turn-B/..", ""):
        with pytest.raises(AirflowFailException, match=rf"params\.turn = '{re.escape(name)}': "):
            getattr(steps, step)(name)
    steps.give_up("turn-b", "improve")
    record = TurnRecord(turn="turn-b", opened_unix_ns=1, commit="c", current_digest="d", episodes=1)
    store.put_json("runs/turn-b/turn.json", record)
    store.put("runs/turn-b/workspace/dvc.lock", b"stages: {curate: {}, label: {}}")
    steps.give_up("turn-b", "improve")
    assert not store.exists("runs/turn-b/result.json"), "a run that was refused ended another one's turn"
    with pytest.raises(AirflowFailException, match="turn-b: replay has not finished; clear its task"):
        getattr(steps, step)("turn-b")


def test_no_turn_begins_to_train_while_a_rollout_may_still_change_what_it_would_start_from(
    waiting: tuple[str, str, ReportingFleet], store: BucketStore, capsys: pytest.CaptureFixture[str]
) -> None:
    from dags import steps

    record = TurnRecord(turn="turn-b", opened_unix_ns=1, commit="c", current_digest="d", episodes=1)
    store.put_json("runs/turn-b/turn.json", record)
    store.put("runs/turn-b/workspace/dvc.lock", b"stages: {curate: {}, label: {}, replay: {}}")
    before = store.get("runs/turn-b/turn.json")
    assert steps.begin("turn-b") is False
    assert f"rollout {waiting[1]} is under way (approval)" in capsys.readouterr().out
    assert store.get("runs/turn-b/turn.json") == before


def test_a_store_that_is_down_does_not_end_the_watching(
    waiting: tuple[str, str, ReportingFleet], store: BucketStore
) -> None:
    from dags import steps

    with store.server.down():
        assert steps.watch(waiting[1], "canary") == (False, "")
    assert steps.watch(waiting[1], "canary")[0]


def test_between_turns_nothing_fails_where_nothing_was_released_yet(store: BucketStore) -> None:
    from airflow.sdk.exceptions import AirflowSkipException

    from dags import steps

    for step in (steps.renew, steps.attention):
        with pytest.raises(AirflowSkipException, match="keys init"):
            step()
    assert steps.clear() == []


def test_what_a_person_should_look_at_fails_its_task_and_says_what_to_do(
    waiting: tuple[str, str, ReportingFleet], store: BucketStore
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags import steps

    steps.attention()
    store.put("fleet/robots/r9.json", b"{}")
    with pytest.raises(AirflowFailException, match=r"not understood: fleet/robots/r9\.json.*; update"):
        steps.attention()
    assert steps.renew() > 1.0
