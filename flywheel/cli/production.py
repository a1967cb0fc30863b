"""Where Airflow and Prometheus run on machines of their own."""

from __future__ import annotations

import json as json_
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from flywheel.cli.output import Json, messages
from flywheel.services.production import Executor, Metrics


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("airflow-settings")(airflow_settings)
    app.command()(metrics)


def airflow_settings(
    url: Annotated[str, typer.Option(help="Address of Airflow's API server, as workers reach it.")],
    executor: Annotated[Executor, typer.Option(help="Where tasks run.")] = Executor.LOCAL,
    metrics: Annotated[Metrics, typer.Option(help="How Airflow's own figures leave it.")] = Metrics.NONE,
    collector: Annotated[str, typer.Option(help="Where they go: host:9125, or http://host:4318.")] = "",
    checkout: Annotated[str, typer.Option(help="Where each machine has its clone.")] = "/opt/flywheel",
    secrets: Annotated[str, typer.Option(help="Where each machine has its secrets.")] = "/run/secrets",
    repository: Annotated[str, typer.Option(help="Take the DAGs from this git repository instead.")] = "",
    json: Json = False,
) -> None:
    """Print the environment of a production Airflow: PostgreSQL, its executor, logs in the store, metrics.

    It holds no secret: these are read from files below --secrets. Redirect it to an environment file.
    """
    from flywheel.config import Deployment
    from flywheel.services.production import commands, settings

    found = settings(
        Deployment.from_env(),
        executor,
        metrics,
        url=url,
        checkout=checkout,
        secrets=secrets,
        repository=repository,
        collector=collector,
    )
    if json:
        json_.dump({s.name: s.value for s in found}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    for s in found:
        why = "; ".join(filter(None, (s.why, f"install {s.install}" if s.install else "")))
        typer.echo((f"# {why}\n" if why else "") + f"{s.name}={shlex.quote(s.value)}")
    typer.echo("# once, when the database is there:")
    for command in commands():
        typer.echo(f"#   {command}")


def metrics(
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve them on loopback; 0 takes a free port.")
    ] = None,
) -> None:
    """Print what Prometheus is to know: the backlog, turns, robots, the rollout, signed metadata's expiry.

    Once, for node_exporter's textfile collector, or until it is stopped with --port.
    """
    from flywheel.config import PARAMS_FILE, Deployment, RolloutSettings, Settings
    from flywheel.errors import ConfigError
    from flywheel.monitoring import Figures, served, text
    from flywheel.store import Store
    from flywheel.workspace import source_checkout

    deployment = Deployment.from_env()
    try:
        rollout = Settings.load(Path(source_checkout()) / PARAMS_FILE).rollout
    except ConfigError:  # a monitoring machine needs no checkout
        rollout = RolloutSettings()
    figures = Figures(lambda: Store.from_env(deployment), deployment.home / "keys", rollout.silence_s)
    if port is None:
        sys.stdout.write(text(figures).decode())
        return
    with served(figures, port) as taken:
        messages.print(f"http://127.0.0.1:{taken}/metrics")
        while True:
            time.sleep(3600.0)
