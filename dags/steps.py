"""What the DAGs' Python tasks do: turn and rollout put together. Imported when a task runs, not at parse.

A skip says that the turn ends here by the rules (too few failures, a gate that does not promote, a rollout
that was held or rolled back); a failure, that something is broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NoReturn

from airflow.sdk import get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from flywheel import approvals, catalogue, rollout, turn, upkeep
from flywheel.config import PARAMS_FILE, Deployment, Settings
from flywheel.errors import StageError, StoreUnavailable
from flywheel.keys import ROOT_FILE
from flywheel.label import form
from flywheel.release import Publisher
from flywheel.schema import GateReport, Group, RolloutStage, Verdict
from flywheel.store import Store
from flywheel.workspace import source_checkout

ORDER = (
    RolloutStage.SHADOW,
    RolloutStage.CANARY,
    RolloutStage.APPROVAL,
    RolloutStage.WIDE,
    RolloutStage.DONE,
)
BEFORE = {approvals.COLLECT: (), approvals.IMPROVE: turn.COLLECTED, approvals.RELEASE: turn.TRAINED}
DECISIONS = {
    approvals.PROMOTE: Verdict.PROMOTE,
    approvals.HOLD: Verdict.HOLD,
    approvals.ROLL_BACK: Verdict.ROLL_BACK,
}


def open_turn(run_id: str, run_after: datetime, force: bool, adjust: Mapping[str, Any]) -> str:
    """Claim what waits and make the turn's workspace; its name."""
    _, publisher = _fleet()
    stable = publisher.current(Group.STABLE)
    name = turn.turn_name(run_id, run_after)
    record = turn.open_turn(name, current_digest=stable.digest if stable else "", adjust=adjust, force=force)
    if record is None:
        _end("too few failures wait (trigger in params.yaml)")
    print(f"{name}: {record.episodes} episodes, starts from policy {record.current_digest[:12]}")
    return name


def begin(name: str) -> bool:
    """Let the turn train from what the fleet runs now; False while a rollout may still change that."""
    _require(name, BEFORE[approvals.IMPROVE])
    store, publisher = _fleet()
    try:
        other = rollout.active_rollout(store, publisher)
    except StoreUnavailable as e:
        print(f"not seen, looking again: {e}")
        return False
    if other is not None:
        print(f"{name}: waits: rollout {other.rollout_id} is under way ({other.stage})")
        return False
    stable = publisher.current(Group.STABLE)
    record = turn.start_from(name, stable.digest if stable else "")
    print(f"{name}: trains from policy {record.current_digest[:12]}")
    return True


def require_trained(name: str) -> None:
    """End a run, without trying again, whose turn is not there or not that far."""
    _require(name, BEFORE[approvals.RELEASE])


def register(name: str) -> dict[str, Any]:
    """Save the experiment, publish bundle and gate report."""
    result = turn.close_turn(name)
    print(f"{name}: {result.verdict}" + "".join(f"\n  {r}" for r in result.reasons))
    return result.model_dump(mode="json")


def give_up(name: str | None, dag: str) -> None:
    """Keep what a failed turn had finished as its experiment; clearing its tasks later goes on from there.

    There is nothing to keep where the run itself was refused: no such turn, or not that far.
    """
    if name is None:
        return
    try:
        turn.require(name, BEFORE[dag])
    except StageError as e:
        print(e)
        return
    result = turn.close_turn(name, ok=False)
    print(f"{name}: finished {', '.join(result.stages) or 'nothing'}")


def start_rollout(name: str) -> str:
    """Begin with the shadow; the rollout's id."""
    result = turn.result_of(name)
    if not result.promotes:
        _end(f"the gate's verdict is {result.verdict}: {'; '.join(result.reasons)}")
    settings = _settings().rollout
    state = rollout.start(
        *_fleet(),
        result.candidate_digest,
        result.gate_digest,
        settings,
        git_rev=result.commit,
        experiment=result.turn,
    )
    return state.rollout_id


def watch(rollout_id: str, until: str, *, name: str = "", skip: bool = True) -> tuple[bool, str]:
    """Look at the fleet once: whether the rollout has come as far as ``until``, and where it is.

    With ``name``, the second part is what the approver of that turn is shown. A rollout that has ended
    otherwise skips what follows, or with ``skip`` false is simply the end of watching.
    """
    store, publisher = _fleet()
    try:
        seen = rollout.look(store, publisher, rollout_id)
    except StoreUnavailable as e:
        print(f"not seen, looking again: {e}")
        return False, ""
    print(seen.line())
    state = seen.state
    if state.stage not in ORDER:
        if skip:
            _end(f"{state.stage}: {state.reason}")
        return True, state.stage.value
    reached = ORDER.index(state.stage) >= ORDER.index(RolloutStage(until))
    if not (reached and name):
        return reached, state.stage.value
    gate = store.get_json(f"gates/{state.gate_digest}.json", GateReport, state.gate_digest)
    canary = next(s.checks for s in reversed(rollout.history(store, rollout_id)) if s.checks)
    return True, approvals.evidence(name, rollout_id, gate, state.gate_digest, canary)


def decide(option: str, name: str, rollout_id: str, answer: Mapping[str, Any]) -> None:
    """Give a person's word to the rollout, checked again here: who, for which bundle, on which evidence."""
    user = answer.get("responded_by_user") or {}
    by = str(user.get("name") or "nobody answered in time")
    if option not in DECISIONS:
        raise AirflowFailException(f"option = {option!r}: must be one of {', '.join(DECISIONS)}")
    verdict = DECISIONS[option]
    if verdict is Verdict.PROMOTE and by not in Deployment.from_env().approvers:
        raise AirflowFailException(f"{by} may not approve releases (FLYWHEEL_APPROVERS)")
    store, publisher = _fleet()
    state = rollout.status(store, rollout_id).state
    if verdict is Verdict.PROMOTE and by in state.approved_by:
        return  # an earlier attempt of this task came this far
    shown = turn.result_of(name)
    try:
        rollout.approve(
            store,
            publisher,
            rollout_id,
            verdict,
            by,
            (answer.get("params_input") or {}).get("reason", ""),
            bundle_digest=shown.candidate_digest,
            gate_digest=shown.gate_digest,
        )
    except StageError as e:
        raise AirflowFailException(str(e)) from e
    print(rollout.look(store, publisher, rollout_id).line())


def outcome(name: str, rollout_id: str | None) -> str:
    """How the turn ended, in a line."""
    result = turn.result_of(name)
    if rollout_id is None:
        return f"{name}: no rollout: the gate says {result.verdict}: {'; '.join(result.reasons)}"
    state = rollout.status(_fleet()[0], rollout_id).state
    return f"{name}: policy {result.candidate_digest[:12]}: {state.stage}: {state.reason}"


def gather(run_id: str) -> dict[str, Any]:
    """The form's questions and its text; skips where nothing is to be asked."""
    found = form.make(Store.from_env(), run_id, _settings().label.budget)
    if not found:
        raise AirflowSkipException("every question is asked or answered")
    return {"count": len(found), "body": form.body(found)}


def keep(run_id: str, answered: Mapping[str, Any]) -> int:
    """Keep what somebody answered; how many episodes."""
    by = answered["by"]
    try:
        said = form.keep(Store.from_env(), run_id, answered["given"], by, answered["unix_ns"])
    except StageError as e:
        raise AirflowFailException(str(e)) from e
    print(f"{by or 'nobody'} answered about {len(said)} episodes")
    return len(said)


def renew() -> float:
    """Sign what is about to expire; the hours for which robots take what is signed."""
    hours = upkeep.renew(_signing()[1])
    print(f"robots take what is signed for {hours:.0f} h more")
    return hours


def clear() -> list[str]:
    """Finish what dead turns left, remove what can be made again; what was done."""
    deployment = Deployment.from_env()
    done = upkeep.clear(Store.from_env(deployment), deployment, _settings(), datetime.now(UTC))
    print("\n".join(done) or "nothing to clear")
    return done


def ingest() -> dict[str, int]:
    """Bring the catalogue up to date."""
    deployment = Deployment.from_env()
    done = catalogue.ingest(Store.from_env(deployment), ray=deployment.ray)
    return done.model_dump(include={"seen", "read", "refused", "vanished"})


def attention() -> None:
    """Fail where a person should look; never tried again, because looking twice mends nothing."""
    alarms = upkeep.attention(*_signing(), _settings(), datetime.now(UTC))
    if alarms:
        raise AirflowFailException("\n".join(a.line() for a in alarms))
    print("nothing needs a person")


def _end(why: str) -> NoReturn:
    """Skip what follows, and keep why where the run shows it."""
    with suppress(RuntimeError):  # not in a task
        get_current_context()["ti"].xcom_push("why", why)
    raise AirflowSkipException(why)


def _require(name: str, stages: tuple[str, ...]) -> None:
    try:
        turn.require(name, stages)
    except StageError as e:
        raise AirflowFailException(f"params.turn = {name!r}: {e}") from e


def _signing() -> tuple[Store, Publisher]:
    store, publisher = _fleet()
    if not (publisher.keys.directory / ROOT_FILE).is_file():
        raise AirflowSkipException("nothing is released from here yet: `flywheel keys init`")
    return store, publisher


def _settings() -> Settings:
    return Settings.load(source_checkout() / PARAMS_FILE)


def _fleet() -> tuple[Store, Publisher]:
    deployment = Deployment.from_env()
    store = Store.from_env(deployment)
    return store, Publisher(store, deployment.home / "keys")
