"""
### Failures become data

1. **open** claims the failures that wait in the store's inbox, for a turn that is named after this run
2. **curate** selects what is worth training on, **label** names how and why each attempt failed, **replay**
   makes the demonstrations of the lab that training holds against forgetting
3. **hand_over** gives the turn to `improve`, as the run of the turn's name

It starts by itself when enough failures wait (`trigger` in params.yaml), or by hand. A turn is a DVC
experiment of its name: `dvc exp show`. A stage that failed is repeated by clearing its task; what had
finished is not done again. While another turn is trained, the failures wait, and **open** with them. A task
that ends the turn says why in its XCom `why`.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import Asset, AssetWatcher, Param, PokeReturnValue, TaskGroup, chain, dag, task

from dags.backlog import BacklogTrigger
from dags.flow import DEFAULTS, SETTINGS, WAIT, dataset, give_up, hand_over, is_free, questions, stage
from flywheel.approvals import COLLECT, IMPROVE

OPENED = "{{ ti.xcom_pull(task_ids='open') }}"

failures = Asset(
    "failures",
    uri="x-flywheel://inbox",
    watchers=[AssetWatcher(name="backlog", trigger=BacklogTrigger(**SETTINGS.trigger.model_dump()))],
)


@dag(
    dag_id=COLLECT,
    dag_display_name="Collect: failures become data",
    schedule=[failures],
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULTS,
    tags=["flywheel", "turn", "data"],
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
def collect() -> None:
    @task.sensor(task_id="open", inlets=[failures], **WAIT)
    def open_(params: dict[str, Any], dag_run: Any, ti: Any) -> PokeReturnValue:
        from dags import steps

        if not is_free(ti, IMPROVE):
            return PokeReturnValue(False)
        return PokeReturnValue(True, steps.open_turn(dag_run.run_id, dag_run.run_after, **params))

    turn = open_()
    with TaskGroup("stages", prefix_group_id=False, tooltip="Each is a stage of dvc.yaml"):
        stages = [
            stage("curate", OPENED, makes=dataset, inlets=[failures]),
            stage("label", OPENED, outlets=[questions]),
            stage("replay", OPENED),
        ]
    chain(turn, *stages, hand_over(IMPROVE, OPENED))
    stages >> give_up(turn)


collect()
