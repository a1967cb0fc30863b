"""
### One turn of the wheel

Failures that robots recorded become a better policy, and the better policy runs on the robots.

1. **collect** claims the failures that wait in the store's inbox, selects training data, names failure modes
2. **improve** fine-tunes the policy that the fleet runs now, exports it, and compares both on the same scenes
3. **release** tries it in shadow, then on a few robots, asks a person, and goes to all

A turn starts by itself when enough failures wait (`trigger` in params.yaml), or by hand. It is a DVC
experiment of its name: `dvc exp show`. A stage that failed is repeated by clearing its task; what had
finished is not done again. Whatever the gate or the canary finds against the candidate ends the turn with
skipped tasks, and the task `outcome` says why.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.hitl import HITLBranchOperator
from airflow.sdk import Asset, AssetWatcher, Metadata, Param, PokeReturnValue, TaskGroup, chain, dag, task

from dags.backlog import BacklogTrigger
from flywheel.approvals import DAG, HOLD, PROMOTE, ROLL_BACK
from flywheel.config import PARAMS_FILE, Deployment, Settings
from flywheel.workspace import source_checkout

SETTINGS = Settings.load(source_checkout() / PARAMS_FILE)
APPROVERS = Deployment.from_env().approvers
LOOK_S = SETTINGS.rollout.look_s

failures = Asset(
    "failures",
    uri="x-flywheel://inbox",
    watchers=[AssetWatcher(name="backlog", trigger=BacklogTrigger(**SETTINGS.trigger.model_dump()))],
)
dataset = Asset("dataset", uri="x-flywheel://datasets")
policy = Asset("policy", uri="x-flywheel://policies")
release = Asset("release", uri="x-flywheel://releases")

WATCH: dict[str, Any] = {
    "poke_interval": LOOK_S,
    # A process that sleeps costs less than one that is started anew for each look, unless it sleeps long.
    "mode": "poke" if LOOK_S <= 60 else "reschedule",
    # The rollout's own rules end a stage that does not get anywhere; this only catches what they cannot.
    "timeout": 2 * SETTINGS.rollout.max_stage_s + SETTINGS.rollout.approval_timeout_s,
}


BRANCHES = {PROMOTE: "promote", HOLD: "hold", ROLL_BACK: "roll_back"}


class Approval(HITLBranchOperator):
    """Keeps who answered what: the branch that was taken does not say."""

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        context["ti"].xcom_push("answer", {k: event.get(k) for k in ("responded_by_user", "params_input")})
        return super().execute_complete(context, event)


def stage(name: str, **options: Any) -> BashOperator:
    """A stage in the turn's workspace. SIGTERM (a task marked as failed) reaches it through the command."""
    return BashOperator(
        task_id=name,
        bash_command=f'exec flywheel turn stage "$TURN" {name}',
        env={"TURN": "{{ ti.xcom_pull(task_ids='collect.open') }}"},
        append_env=True,
        skip_on_exit_code=None,
        **options,
    )


@dag(
    dag_id=DAG,
    dag_display_name="The wheel",
    schedule=[failures],
    catchup=False,
    max_active_runs=1,
    default_args={
        "owner": "flywheel",
        "retries": 4,  # a store or a server that was killed is back by then
        "retry_delay": timedelta(seconds=5),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=1),
    },
    tags=["flywheel", "training", "rollout"],
    doc_md=__doc__,
    params={
        "force": Param(
            False,
            type="boolean",
            title="Start at once",
            description_md="Take what waits, however little. Otherwise `trigger` in params.yaml decides.",
        ),
        "adjust": Param(
            {},
            type="object",
            title="Settings of this turn",
            description_md='Of curate, label, train and export, such as `{"train.steps": 1200}`.',
        ),
    },
)
def wheel() -> None:
    with TaskGroup("collect", tooltip="Failures become data"):

        @task(task_id="open")
        def open_(params: dict[str, Any] | None = None, dag_run: Any = None) -> str:
            from dags import steps

            return steps.open_turn(dag_run.run_id, dag_run.run_after, **(params or {}))

        turn = open_()
        curate, label, replay = stage("curate"), stage("label"), stage("replay")

    with TaskGroup("improve", tooltip="Data become a policy"):

        @task(outlets=[dataset, policy])
        def register(turn: str) -> Any:
            from dags import steps

            result = steps.register(turn)
            yield Metadata(dataset, {"turn": turn, "dvc": result["dataset"]})
            yield Metadata(policy, {"turn": turn, "digest": result["candidate_digest"]})

        @task(trigger_rule="one_failed")
        def give_up(turn: str) -> None:
            from dags import steps

            steps.give_up(turn)

        train, export, gate = stage("train", pool="trainer"), stage("export"), stage("gate", pool="trainer")
        registered, given_up = register(turn), give_up(turn)

    with TaskGroup("release", tooltip="A policy reaches the robots"):

        @task
        def start(turn: str) -> str:
            from dags import steps

            return steps.start_rollout(turn)

        @task.sensor(**WATCH)
        def shadow(rollout_id: str) -> PokeReturnValue:
            from dags import steps

            return PokeReturnValue(*steps.watch(rollout_id, until="canary"))

        @task.sensor(**WATCH)
        def canary(rollout_id: str, turn: str) -> PokeReturnValue:
            from dags import steps

            return PokeReturnValue(*steps.watch(rollout_id, until="approval", name=turn))

        @task.sensor(**WATCH)
        def meanwhile(rollout_id: str) -> PokeReturnValue:
            """Keeps watching the canary while people think: it may still be rolled back by itself."""
            from dags import steps

            return PokeReturnValue(*steps.watch(rollout_id, until="wide", skip=False))

        @task
        def decide(option: str, turn: str, rollout_id: str, ti: Any = None) -> None:
            from dags import steps

            steps.decide(option, turn, rollout_id, ti.xcom_pull(task_ids="release.approve", key="answer"))

        @task.sensor(outlets=[release], **WATCH)
        def wide(rollout_id: str, outlet_events: Any = None) -> PokeReturnValue:
            from dags import steps

            outlet_events[release].extra = {"rollout": rollout_id}
            return PokeReturnValue(*steps.watch(rollout_id, until="done"))

        rollout = start(turn)
        shadowed, tried, watched = shadow(rollout), canary(rollout, turn), meanwhile(rollout)
        approve = Approval(
            task_id="approve",
            subject="Release the policy of {{ ti.xcom_pull(task_ids='collect.open') }} to every robot?",
            body="{{ ti.xcom_pull(task_ids='release.canary') }}",
            options=list(BRANCHES),
            options_mapping={option: f"release.{name}" for option, name in BRANCHES.items()},
            defaults=ROLL_BACK,
            response_timeout=timedelta(seconds=SETTINGS.rollout.approval_timeout_s),
            assigned_users=[{"id": name, "name": name} for name in APPROVERS],
            params={"reason": Param("", type="string", maxLength=2000, title="Why (kept with the decision)")},
        )
        branches = {o: decide.override(task_id=name)(o, turn, rollout) for o, name in BRANCHES.items()}
        everywhere = wide(rollout)

    @task(trigger_rule="none_failed")
    def outcome(turn: str | None, rollout_id: str | None) -> str:
        from dags import steps

        return steps.outcome(turn, rollout_id)

    stages = [curate, label, replay, train, export, gate]
    chain(turn, *stages, registered, rollout, shadowed, tried, [approve, watched])
    stages >> given_up
    approve >> list(branches.values())
    branches[PROMOTE] >> everywhere
    ends = [everywhere, branches[HOLD], branches[ROLL_BACK], watched]
    ends >> outcome(turn, rollout)


wheel()
