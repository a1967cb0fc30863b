"""
### Questions about failures

What the labels of a turn were unsure of is asked here, at most `label.budget` episodes at once, as one form
under *Required actions*: what was recorded, a picture, a plot, what the labels say. Answers go into the
store with who and when, and teach the next turn's labels. No turn waits for them, and nobody has to answer:
after `label.form_s` the form closes, and `flywheel label queue` still has its questions.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLEntryOperator
from airflow.sdk import Param, dag, task

from dags.flow import SETTINGS, questions
from flywheel.aspects import fields


class Form(HITLEntryOperator):
    """Hands on who filled it in, and nothing of a form that nobody did."""

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        """``by`` is "" where the time was over."""
        super().execute_complete(context, event)
        user = event.get("responded_by_user") or {}
        return {
            "by": str(user.get("name") or ""),
            "unix_ns": int(event["responded_at"].timestamp() * 1e9),
            "given": dict(event.get("params_input") or {}),
        }


@dag(
    dag_id="questions",
    dag_display_name="Questions about failures",
    schedule=[questions],
    catchup=False,
    max_active_runs=16,
    default_args={"owner": "flywheel", "retries": 3, "retry_delay": timedelta(seconds=30)},
    tags=["flywheel", "labels"],
    doc_md=__doc__,
)
def ask() -> None:
    @task(inlets=[questions])
    def gather(dag_run: Any = None) -> dict[str, Any]:
        from dags import steps

        return steps.gather(dag_run.run_id)

    @task
    def keep(answered: dict[str, Any], dag_run: Any = None) -> int:
        from dags import steps

        return steps.keep(dag_run.run_id, answered)

    gathered = gather()
    form = Form(
        task_id="form",
        subject="{{ ti.xcom_pull(task_ids='gather')['count'] }} failures need a person's word",
        body="{{ ti.xcom_pull(task_ids='gather')['body'] }}",
        params={n: Param(f.pop("default"), **f) for n, f in fields(SETTINGS.label.budget).items()},
        response_timeout=timedelta(seconds=SETTINGS.label.form_s),
    )
    gathered >> form
    keep(form.output)


ask()
