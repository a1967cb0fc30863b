"""The fleet page on its own."""

from __future__ import annotations

from typing import Annotated

import typer

from flywheel.cli.output import console, messages
from flywheel.errors import ServiceError


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(page)


def page(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Show robots, rollouts, failures and turns in a browser of this machine, until Ctrl-C.

    Prints an address that works once and for one browser; a fresh one follows whenever it was used.
    """
    from flywheel.config import PARAMS_FILE, Deployment, RolloutSettings, Settings, checkout
    from flywheel.page import Source
    from flywheel.page.standalone import serve
    from flywheel.services.airflow import Airflow
    from flywheel.services.process import free_port, is_free
    from flywheel.store import Store

    if port and not is_free(port):
        raise ServiceError(f"--port {port}: somebody listens there already; leave it out to take a free one")
    deployment = Deployment.from_env()
    root = checkout(deployment.home)
    rollout = Settings.load(root / PARAMS_FILE).rollout if root is not None else RolloutSettings()
    try:
        airflow = Airflow(deployment.home).url
    except ServiceError:  # none was started here
        airflow = ""
    source = Source(
        lambda: Store.from_env(Deployment.from_env(), timeout_s=5.0, attempts=2), deployment.home / "keys"
    )
    messages.print("The fleet page, for one browser of this machine; Ctrl-C ends it.")
    serve(
        source,
        port or free_port(set()),
        lambda address: console.print(address, soft_wrap=True, highlight=False),
        silence_s=rollout.silence_s,
        airflow_url=airflow,
    )
