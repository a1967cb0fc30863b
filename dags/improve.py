"""
### Data become a policy

1. **begin** waits until the release ahead of this turn is decided, and takes the policy that the fleet runs
   then
2. **train** fine-tunes that policy on the turn's dataset, **export** makes a bundle for the robots of it
3. **hand_over** gives the turn to `release`, as the run of the turn's name

`collect` starts it. By hand it takes the name of a turn that has been collected. A stage that failed is
repeated by clearing its task, and a training goes on from its last checkpoint; clear **begin** where the
fleet has another policy by now. A task that ends the turn says why in its XCom `why`.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import TaskGroup, chain, dag, task

from dags.flow import DEFAULTS, GIVEN, TURN, WAIT, dataset, give_up, hand_over, is_free, policy, stage
from flywheel.approvals import IMPROVE, RELEASE


@dag(
    dag_id=IMPROVE,
    dag_display_name="Improve: data become a policy",
    schedule=None,
    max_active_runs=1,
    default_args=DEFAULTS,
    tags=["flywheel", "turn", "training"],
    doc_md=__doc__,
    params={"turn": TURN},
)
def improve() -> None:
    @task.sensor(**WAIT)
    def begin(turn: str, ti: Any) -> bool:
        from dags import steps

        return is_free(ti, RELEASE) and steps.begin(turn)

    with TaskGroup("stages", prefix_group_id=False, tooltip="Each is a stage of dvc.yaml"):
        stages = [
            stage("train", pool="trainer", inlets=[dataset]),
            stage("export", makes=policy, inlets=[dataset]),
        ]
    chain(begin(GIVEN), *stages, hand_over(RELEASE))
    stages >> give_up(GIVEN)


improve()
