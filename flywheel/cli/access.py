"""Access policies for the store, to be given to the users of its clients."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="What each client may do in the store, as S3 policies.", no_args_is_help=True)


@app.command()
def robot(
    site: Annotated[str, typer.Option(help="The robot's site.")],
    robot: Annotated[str, typer.Option(help="The robot's name.")],
) -> None:
    """For one robot: leave its own episodes and reports, read what is released to it."""
    from flywheel import access
    from flywheel.config import Deployment

    _print(access.robot(Deployment.from_env().store_url, site, robot))


@app.command()
def stages() -> None:
    """For workers that curate, train, export and judge: everything but releasing."""
    from flywheel import access
    from flywheel.config import Deployment

    _print(access.stages(Deployment.from_env().store_url))


@app.command()
def publisher() -> None:
    """For workers that roll out, and for approvers."""
    from flywheel import access
    from flywheel.config import Deployment

    _print(access.publisher(Deployment.from_env().store_url))


def _print(policy: dict[str, object]) -> None:
    import json

    print(json.dumps(policy, indent=2))
