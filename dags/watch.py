"""
### Between turns

Looks after what nobody starts a turn for, every `watch.period_s` (params.yaml).

1. **renew** signs the releases' metadata anew before robots stop taking them
2. **clear** finishes claims of turns that died, and removes workspaces that can be made again
3. **attention** fails where a person should look: silent robots, refused releases, missed deadlines, uploads
   that do not get through, turns without an end, failures that no turn takes. Its log says which, and what to
   do; give it an `on_failure_callback` to be told.
4. **catalogue** adds the episodes that came since to the catalogue that `flywheel episodes ls --where` asks
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task

from flywheel.config import PARAMS_FILE, Settings
from flywheel.workspace import source_checkout

SETTINGS = Settings.load(source_checkout() / PARAMS_FILE)


@dag(
    dag_id="watch",
    dag_display_name="Between turns",
    schedule=timedelta(seconds=SETTINGS.watch.period_s),
    catchup=False,
    max_active_runs=1,
    default_args={"owner": "flywheel", "retries": 3, "retry_delay": timedelta(seconds=30)},
    tags=["flywheel", "fleet"],
    doc_md=__doc__,
)
def watch() -> None:
    @task
    def renew() -> float:
        from dags import steps

        return steps.renew()

    @task
    def clear() -> list[str]:
        from dags import steps

        return steps.clear()

    @task
    def attention() -> None:
        from dags import steps

        steps.attention()

    @task
    def catalogue() -> dict[str, int]:
        from dags import steps

        return steps.ingest()

    renew()
    clear()
    attention()
    catalogue()


watch()
