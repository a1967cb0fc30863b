"""Steps of a turn, as Airflow's tasks call them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(help="Steps of a turn of the wheel.", no_args_is_help=True)


@app.command()
def stage(turn: Annotated[str, typer.Argument()], name: Annotated[str, typer.Argument()]) -> None:
    """Run one stage in the turn's workspace."""
    from flywheel.parent import die_with_parent
    from flywheel.turn import run_stage

    die_with_parent()  # Airflow may be killed: then the stage must end as well
    sys.exit(run_stage(turn, name))
