"""What the DAGs of a turn share: assets, stages, how a turn goes from one DAG to the next.

A turn goes through three runs, of `collect`, `improve` and `release`. The next DAG is started by a task, with
the turn's name for the run's id, and not by an asset schedule. In Airflow 3.3.2 what waits for such a
schedule is one row for each pair of asset and DAG (``AssetDagRunQueue``, into which
``airflow/assets/manager.py`` merges a second event); the run that comes of it takes all events since the last
one, and is named by the clock (``SchedulerJobRunner._create_dag_runs_asset_triggered``). Two turns would
become one run, and a repeat could not be told from a new turn. The assets say what came of what, with the
turn in every event.

Each of the three has one turn at a time (``max_active_runs``), and a turn enters the next when that is free:
`collect` claims nothing while a turn is trained, and `improve` begins nothing before the release ahead is
decided, because it trains from the policy that the fleet runs then, and two canaries at once would be no
evidence for either. Failures wait in the store's inbox, where the next turn takes all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import Asset, Metadata, Param, task

from flywheel.config import PARAMS_FILE, Settings
from flywheel.workspace import source_checkout

SETTINGS = Settings.load(source_checkout() / PARAMS_FILE)
LOOK_S = SETTINGS.rollout.look_s

dataset = Asset("dataset", uri="x-flywheel://datasets")
policy = Asset("policy", uri="x-flywheel://policies")
release = Asset("release", uri="x-flywheel://releases")
questions = Asset("questions", uri="x-flywheel://labels/questions")  # what labels were unsure of


def say_why(context: Any) -> None:
    """Keep why a task failed for good where its run shows it, as its XCom `why` (a skip keeps its own)."""
    context["ti"].xcom_push("why", str(context.get("exception") or "see its log"))


DEFAULTS: dict[str, Any] = {
    "owner": "flywheel",
    "retries": 4,  # a store or a server that was killed is back by then
    "retry_delay": timedelta(seconds=5),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=1),
    "on_failure_callback": say_why,
}
WAIT: dict[str, Any] = {
    "poke_interval": LOOK_S,
    # A process that sleeps costs less than one that is started anew for each look, unless it sleeps long.
    "mode": "poke" if LOOK_S <= 60 else "reschedule",
    # The rollout's own rules end a stage that does not get anywhere; this only catches what they cannot.
    "timeout": 2 * SETTINGS.rollout.max_stage_s + SETTINGS.rollout.approval_timeout_s,
}
TURN = Param(
    type="string",
    pattern="^turn-[a-z0-9-]{1,80}$",
    title="Turn",
    description_md="Its name, as in `flywheel experiments` and on the fleet page. The run that a turn comes "
    "to by itself has its name; start one by hand only for a turn that has none.",
)
GIVEN = "{{ params.turn }}"


def is_free(ti: Any, dag_id: str) -> bool:
    """Whether no turn is in that DAG, nor about to be."""
    return ti.get_dr_count(dag_id, states=["queued", "running"]) == 0


def stage(name: str, turn: str = GIVEN, makes: Asset | None = None, **options: Any) -> BashOperator:
    """A stage in the turn's workspace. SIGTERM (a task marked as failed) reaches it through the command."""

    def tell(context: Any, result: Any = None) -> Iterator[Metadata]:
        from flywheel.turn import made

        done = context["task"].env["TURN"]
        yield Metadata(makes, {"turn": done, **made(done)})

    if makes is not None:
        options |= {"outlets": [makes], "post_execute": tell}
    return BashOperator(
        task_id=name,
        bash_command=f'exec flywheel turn stage "$TURN" {name}',
        env={"TURN": turn},
        append_env=True,
        skip_on_exit_code=None,
        **options,
    )


class HandOver(TriggerDagRunOperator):
    """Starts the turn's run of the next DAG, once: one that is there is neither an error nor run again."""

    def execute(self, context: Any) -> None:
        """Done where an earlier attempt came this far, whether or not Airflow heard of it."""
        if context["ti"].get_dr_count(self.trigger_dag_id, run_ids=[self.trigger_run_id]):
            self.log.info(
                "%s has run %s already; clear a task there to go on from it",
                self.trigger_dag_id,
                self.trigger_run_id,
            )
            return
        super().execute(context)


def hand_over(to: str, turn: str = GIVEN) -> HandOver:
    """The last task of a turn in one DAG. What ``to`` finds of the turn lies in the store."""
    return HandOver(
        task_id="hand_over",
        trigger_dag_id=to,
        trigger_run_id=turn,
        conf={"turn": turn},
        logical_date=None,
        skip_when_already_exists=True,  # where it appeared between the look and the request
    )


@task(trigger_rule="one_failed")
def give_up(turn: str | None, dag: Any = None) -> None:
    """After a stage that failed for good."""
    from dags import steps

    steps.give_up(turn, dag.dag_id)
