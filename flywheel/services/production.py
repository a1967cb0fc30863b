"""What to set where Airflow is not the one of ``up``: on machines of its own, with PostgreSQL.

The settings are environment variables for every process of Airflow, its workers included. None holds a
secret: what is secret is read by ``cat`` from a file below ``secrets`` (Airflow's ``…_CMD``), as Kubernetes,
Docker and systemd mount them. Tests hold every name against the configuration of the installed Airflow.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath

from flywheel.access import LOGS
from flywheel.config import Deployment
from flywheel.errors import ConfigError
from flywheel.services.airflow import PATIENCE, POOLS

LONGEST_TASK_S = 7 * 24 * 3600  # a broker that hands a task out again before its end runs a training twice


class Executor(StrEnum):
    """Where tasks run."""

    LOCAL = "local"
    CELERY = "celery"
    KUBERNETES = "kubernetes"
    EDGE = "edge"


class Metrics(StrEnum):
    """How Airflow's own figures leave it."""

    NONE = "none"
    STATSD = "statsd"  # Prometheus by way of statsd_exporter
    OTEL = "otel"  # OpenTelemetry: metrics and traces


@dataclass(frozen=True)
class Setting:
    """One environment variable; ``install`` is what has to be installed beside Airflow for it."""

    name: str
    value: str
    why: str = ""
    install: str = ""

    @property
    def option(self) -> tuple[str, str] | None:
        """Section and key of Airflow's configuration; None for a variable of something else."""
        m = re.fullmatch(r"AIRFLOW__([A-Z0-9_]+?)__([A-Z0-9_]+?)(_CMD)?", self.name)
        return (m[1].lower(), m[2].lower()) if m else None


EXECUTORS = {
    Executor.LOCAL: ("LocalExecutor", ""),
    Executor.CELERY: ("CeleryExecutor", "apache-airflow-providers-celery[redis]"),
    Executor.KUBERNETES: ("KubernetesExecutor", "apache-airflow-providers-cncf-kubernetes"),
    # It asks for a packaging that lerobot refuses: give it an environment of its own.
    Executor.EDGE: ("airflow.providers.edge3.executors.EdgeExecutor", "apache-airflow-providers-edge3"),
}


def settings(
    deployment: Deployment,
    executor: Executor,
    metrics: Metrics,
    *,
    url: str,
    checkout: str = "/opt/flywheel",
    secrets: str = "/run/secrets",
    repository: str = "",
    collector: str = "",
) -> list[Setting]:
    """Every variable, in the order in which they are read.

    ``url`` is the API server's address, ``checkout`` where each machine has its own clone of this project,
    ``repository`` an address that Airflow takes the DAGs from instead, and ``collector`` where figures go
    (``host:port`` for StatsD, a URL for OpenTelemetry). Raises ``ConfigError`` for a bad one, and where the
    store is the embedded one, which no other machine reaches.
    """
    if deployment.embedded:
        raise ConfigError(
            "the store is this machine's own: set FLYWHEEL_STORE, and AWS_ENDPOINT_URL where it is not AWS"
        )
    for name, value, schemes in (("url", url, "https?"), ("repository", repository, "https?|ssh|git")):
        if value and not re.fullmatch(rf"({schemes})://[^\s@/:]+(@[^\s@/:]+)?(:\d+)?(/[^\s@?#]*)?", value):
            raise ConfigError(f"{name}: must look like https://host/path, and hold no password")
    for name, value in (("checkout", checkout), ("secrets", secrets)):
        if not re.fullmatch(r"/[A-Za-z0-9/_.-]+", value):
            raise ConfigError(f"{name}: {value!r}: must be an absolute path of letters, digits and / _ . -")
    return [
        *_flywheel(deployment, checkout),
        *_core(url, secrets),
        *_executor(executor, url, secrets),
        _dags(checkout, repository),
        *_logs(deployment),
        *_metrics(metrics, collector),
        *(_set(s, k, v) for s, options in PATIENCE.items() for k, v in options.items()),
    ]


def commands() -> list[str]:
    """What is said to Airflow once, when its database is there."""
    pools = (f"airflow pools set {name} {slots} '{why}'" for name, (slots, why) in POOLS.items())
    return ["airflow db migrate", *pools]


def _set(section: str, key: str, value: str, why: str = "", install: str = "") -> Setting:
    return Setting(f"AIRFLOW__{section.upper()}__{key.upper()}", value, why, install)


def _secret(section: str, key: str, directory: str, why: str, install: str = "") -> Setting:
    path = PurePosixPath(directory) / f"airflow-{key.replace('_', '-')}"
    return Setting(f"AIRFLOW__{section.upper()}__{key.upper()}_CMD", f"cat {path}", why, install)


def _flywheel(deployment: Deployment, checkout: str) -> list[Setting]:
    endpoint = [Setting("AWS_ENDPOINT_URL", deployment.endpoint)] if deployment.endpoint else []
    return [
        Setting(
            "FLYWHEEL_STORE",
            deployment.store_url,
            "keys by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role; "
            "`flywheel access stages` prints their policy",
        ),
        *endpoint,
        Setting("FLYWHEEL_HOME", "/var/lib/flywheel", "each machine's own; lost without harm, but for keys/"),
        Setting("FLYWHEEL_CHECKOUT", checkout, "a git clone, each machine's own"),
        Setting(
            "FLYWHEEL_GIT_REMOTE", "origin", "takes every turn's experiment, so that no clone is special"
        ),
        Setting("FLYWHEEL_APPROVERS", ",".join(deployment.approvers), "as Airflow's auth manager names them"),
    ]


def _core(url: str, secrets: str) -> list[Setting]:
    return [
        _secret(
            "database",
            "sql_alchemy_conn",
            secrets,
            "postgresql+psycopg2://user:password@host/airflow",
            "psycopg2-binary, asyncpg",
        ),
        _secret("core", "fernet_key", secrets, "the same everywhere"),
        _secret("api", "secret_key", secrets, "the same for all API servers"),
        _secret("api_auth", "jwt_secret", secrets, "64 random bytes or more, the same everywhere"),
        _set("api", "base_url", url),
        _set("core", "execution_api_server_url", f"{url.rstrip('/')}/execution/", "what workers call"),
        _set("core", "load_examples", "False"),
        _set("core", "dags_are_paused_at_creation", "False"),
    ]


def _executor(executor: Executor, url: str, secrets: str) -> list[Setting]:
    name, install = EXECUTORS[executor]
    chosen = _set("core", "executor", name, install=install)
    if executor is Executor.CELERY:
        return [
            chosen,
            _secret("celery", "broker_url", secrets, "redis://:password@host:6379/0"),
            _secret("celery", "result_backend", secrets, "db+postgresql://user:password@host/airflow"),
            _set("celery", "worker_concurrency", "4", "a training takes the machine: see the pool"),
            _set("celery", "worker_prefetch_multiplier", "1", "no task waits behind a training"),
            _set("celery_broker_transport_options", "visibility_timeout", str(LONGEST_TASK_S)),
        ]
    if executor is Executor.KUBERNETES:
        return [
            chosen,
            _set("kubernetes_executor", "namespace", "flywheel"),
            _set(
                "kubernetes_executor",
                "pod_template_file",
                "/etc/flywheel/pod.yaml",
                "with these variables, a clone at FLYWHEEL_CHECKOUT (an init container), and the online keys "
                "as a secret at FLYWHEEL_HOME/keys",
            ),
            _set("kubernetes_executor", "delete_worker_pods", "True", "logs are in the store"),
        ]
    if executor is Executor.EDGE:
        return [
            chosen,
            _set("edge", "api_enabled", "True"),
            _set("edge", "api_url", f"{url.rstrip('/')}/edge_worker/v1/rpcapi", "all that workers reach"),
        ]
    return [chosen]


def _dags(checkout: str, repository: str) -> Setting:
    local = {
        "name": "flywheel",
        "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
        "kwargs": {"path": f"{checkout}/dags"},
    }
    git = {
        "name": "flywheel",
        "classpath": "airflow.providers.git.bundles.git.GitDagBundle",
        "kwargs": {"repo_url": repository, "tracking_ref": "main", "subdir": "dags"},
    }
    install = "apache-airflow-providers-git" if repository else ""
    why = "what the DAGs call is the installed package: keep both at one commit" if repository else ""
    bundles = json.dumps([git if repository else local])
    return _set("dag_processor", "dag_bundle_config_list", bundles, why, install)


def _logs(deployment: Deployment) -> list[Setting]:
    return [
        _set("logging", "remote_logging", "True"),
        _set("logging", "remote_base_log_folder", f"{deployment.store_url.rstrip('/')}/{LOGS}"),
        _set("logging", "remote_log_conn_id", "aws_default"),
        _set("logging", "delete_local_logs", "True"),
        Setting(
            "AIRFLOW_CONN_AWS_DEFAULT", '{"conn_type": "aws"}', "address and keys are those of the store"
        ),
    ]


def _metrics(metrics: Metrics, collector: str) -> list[Setting]:
    if metrics is Metrics.STATSD:
        m = re.fullmatch(r"([A-Za-z0-9.-]+):(\d{1,5})", collector)
        if m is None:
            raise ConfigError(f"collector {collector!r}: must look like host:9125, where statsd_exporter is")
        return [
            _set("metrics", "statsd_on", "True", install="apache-airflow[statsd]"),
            _set("metrics", "statsd_host", m[1]),
            _set("metrics", "statsd_port", m[2]),
            _set("metrics", "legacy_names_on", "False", "names without the DAG's in them, for labels"),
        ]
    if metrics is Metrics.OTEL:
        if not re.fullmatch(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?(/[^\s@?#]*)?", collector):
            raise ConfigError(f"collector {collector!r}: must look like http://host:4318")
        return [
            _set("metrics", "otel_on", "True"),
            _set("traces", "otel_on", "True"),
            _set("metrics", "legacy_names_on", "False", "names without the DAG's in them, for labels"),
            Setting("OTEL_EXPORTER_OTLP_ENDPOINT", collector),
            Setting("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            Setting("OTEL_SERVICE_NAME", "flywheel-airflow"),
        ]
    return []
