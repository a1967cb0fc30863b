"""The installed Airflow, by the settings that are printed for production: its logs go to the real store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flywheel.config import Deployment
from flywheel.services.production import Executor, Metrics, settings
from flywheel.store import Store

pytestmark = pytest.mark.integration

CODE = """
import json, pathlib, sys
from airflow.configuration import conf
options = json.loads(sys.argv[1])
print(json.dumps({f"{s}.{k}": conf.get(s, k) for s, k in options}))
from airflow.providers.amazon.aws.log.s3_task_handler import S3RemoteLogIO
logs = S3RemoteLogIO.from_config()
log = pathlib.Path(conf.get("logging", "base_log_folder")) / "dag_id=wheel/attempt=1.log"
log.parent.mkdir(parents=True)
log.write_text("curated 130 episodes\\n")
logs.upload(log)
print(json.dumps([log.exists(), logs.s3_read(f"{logs.remote_base}/dag_id=wheel/attempt=1.log")]))
"""


def test_airflow_reads_its_secrets_from_files_and_keeps_its_logs_in_the_store(
    store_env: dict[str, str], store: Store, tmp_path: Path
) -> None:
    found = settings(
        Deployment.from_env(),
        Executor.LOCAL,
        Metrics.NONE,
        url="http://127.0.0.1:8080",
        secrets=str(tmp_path),
    )
    secrets = {}
    for s in found:
        if s.name.endswith("_CMD"):
            path = Path(s.value.split()[1])
            secrets[path.name] = (
                f"sqlite:///{tmp_path}/{path.name}" if "conn" in path.name else f"of {path.name}"
            )
            path.write_text(secrets[path.name])
    options = [s.option for s in found if s.option is not None]
    environ = {
        "PATH": os.environ["PATH"],
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        **store_env,
        **{s.name: s.value for s in found},
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, json.dumps(options)],
        env=environ,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *_, values, logged = (json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{")
    for s in found:
        if s.option is not None and s.name.endswith("_CMD"):
            assert values[".".join(s.option)] == secrets[Path(s.value.split()[1]).name]
        elif s.option is not None:
            assert values[".".join(s.option)] == s.value
    assert logged == [False, "curated 130 episodes\n"], "the local log is left, or the store's is another"
    assert [i.key for i in store.list("logs/")] == ["logs/airflow/dag_id=wheel/attempt=1.log"]
    known = {o for o in os.listdir(tmp_path) if o.startswith("airflow-")}
    assert known == set(secrets)
