"""
### A policy reaches the robots

1. **gate** compares the candidate with the policy that the fleet runs, on the same scenes; **register** saves
   the turn as a DVC experiment of its name and publishes bundle and report
2. **start**, **shadow** and **canary** try it beside the current policy, then on a few robots
3. **approve** asks a person, with the evidence; **meanwhile** the canary is watched on
4. **wide** takes it to every robot

`improve` starts it. By hand it takes the name of a turn that has been trained. A stage that failed is
repeated by clearing its task. Whatever gate, canary or people find against the candidate ends the turn with
skipped tasks: the task that ended it says why in its XCom `why`, and **outcome** in a line. There is one
release at a time.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLBranchOperator
from airflow.sdk import Param, PokeReturnValue, TaskGroup, chain, dag, task

from dags.flow import DEFAULTS, GIVEN, SETTINGS, TURN, WAIT, give_up, policy, release, stage
from flywheel.approvals import HOLD, PROMOTE, RELEASE, ROLL_BACK
from flywheel.config import Deployment

APPROVERS = Deployment.from_env().approvers
BRANCHES = {PROMOTE: "promote", HOLD: "hold", ROLL_BACK: "roll_back"}


class Approval(HITLBranchOperator):
    """Keeps who answered what: the branch that was taken does not say."""

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        context["ti"].xcom_push("answer", {k: event.get(k) for k in ("responded_by_user", "params_input")})
        return super().execute_complete(context, event)


def trained(context: Any) -> None:
    """Ends a run of a turn that is not there, or not that far, before anything is tried."""
    from dags import steps

    steps.require_trained(context["params"]["turn"])


@dag(
    dag_id=RELEASE,
    dag_display_name="Release: a policy reaches the robots",
    schedule=None,
    max_active_runs=1,
    default_args=DEFAULTS,
    tags=["flywheel", "turn", "rollout"],
    doc_md=__doc__,
    params={"turn": TURN},
)
def release_() -> None:
    @task
    def register(turn: str) -> dict[str, Any]:
        from dags import steps

        return steps.register(turn)

    @task(inlets=[policy])
    def start(turn: str) -> str:
        from dags import steps

        return steps.start_rollout(turn)

    @task.sensor(**WAIT)
    def shadow(rollout_id: str) -> PokeReturnValue:
        from dags import steps

        return PokeReturnValue(*steps.watch(rollout_id, until="canary"))

    @task.sensor(**WAIT)
    def canary(rollout_id: str, turn: str) -> PokeReturnValue:
        from dags import steps

        return PokeReturnValue(*steps.watch(rollout_id, until="approval", name=turn))

    @task.sensor(**WAIT)
    def meanwhile(rollout_id: str) -> PokeReturnValue:
        """Keeps watching the canary while people think: it may still be rolled back by itself."""
        from dags import steps

        return PokeReturnValue(*steps.watch(rollout_id, until="wide", skip=False))

    @task
    def decide(option: str, turn: str, rollout_id: str, ti: Any = None) -> None:
        from dags import steps

        steps.decide(option, turn, rollout_id, ti.xcom_pull(task_ids="approve", key="answer"))

    @task.sensor(inlets=[policy], outlets=[release], **WAIT)
    def wide(rollout_id: str, turn: str, outlet_events: Any = None) -> PokeReturnValue:
        from dags import steps

        outlet_events[release].extra = {"turn": turn, "rollout": rollout_id}
        return PokeReturnValue(*steps.watch(rollout_id, until="done"))

    @task(trigger_rule="none_failed")
    def outcome(turn: str, rollout_id: str | None) -> str:
        from dags import steps

        return steps.outcome(turn, rollout_id)

    with TaskGroup("judge", prefix_group_id=False, tooltip="Candidate against current, same scenes"):
        gate = stage("gate", pool="trainer", pre_execute=trained)
        registered = register(GIVEN)

    with TaskGroup("try_out", prefix_group_id=False, tooltip="In shadow, then on a few robots"):
        rollout = start(GIVEN)
        shadowed, tried = shadow(rollout), canary(rollout, GIVEN)

    with TaskGroup("agree", prefix_group_id=False, tooltip="A person decides, and the canary may object"):
        watched = meanwhile(rollout)
        approve = Approval(
            task_id="approve",
            subject=f"Release the policy of {GIVEN} to every robot?",
            body="{{ ti.xcom_pull(task_ids='canary') }}",
            options=list(BRANCHES),
            options_mapping=BRANCHES,
            defaults=ROLL_BACK,
            response_timeout=timedelta(seconds=SETTINGS.rollout.approval_timeout_s),
            assigned_users=[{"id": name, "name": name} for name in APPROVERS],
            params={"reason": Param("", type="string", maxLength=2000, title="Why (kept with the decision)")},
        )
        branches = {o: decide.override(task_id=name)(o, GIVEN, rollout) for o, name in BRANCHES.items()}

    everywhere = wide(rollout, GIVEN)
    chain(gate, registered, rollout, shadowed, tried, [approve, watched])
    gate >> give_up(GIVEN)
    approve >> list(branches.values())
    branches[PROMOTE] >> everywhere
    [everywhere, branches[HOLD], branches[ROLL_BACK], watched] >> outcome(GIVEN, rollout)


release_()
