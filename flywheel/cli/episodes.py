"""Episodes in the store and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flywheel.cli.output import Json, console, rows
from flywheel.errors import EpisodeError

app = typer.Typer(help="Episodes in the store and on disk.", no_args_is_help=True)


@app.command("ls")
def list_(
    site: Annotated[str, typer.Option(help="Only this site.")] = "",
    robot: Annotated[str, typer.Option(help="Only this robot.")] = "",
    date: Annotated[str, typer.Option(help="Only this UTC date, YYYY-MM-DD.")] = "",
    limit: Annotated[int, typer.Option(min=1)] = 1000,
    json: Json = False,
) -> None:
    """List what the store holds."""
    from itertools import islice

    from flywheel import episode
    from flywheel.services.environment import store

    found = []
    for e in islice(episode.ls(store(), site, robot, date), limit):
        m = e.manifest
        kinds = ",".join(t.kind.value for t in m.triggers) if m else e.problem
        found.append(
            [e.prefix, m.outcome.value if m else "", kinds, m.task if m else "", m.shift if m else ""]
        )
    rows(["prefix", "outcome", "triggers", "task", "shift"], found, json)


@app.command()
def pull(
    prefix: Annotated[str, typer.Argument(help="From `episodes ls`.")],
    out: Annotated[Path, typer.Option(help="Directory to put it in.")] = Path("data/episodes"),
) -> None:
    """Download one episode, verified."""
    from flywheel import episode
    from flywheel.services.environment import store

    console.print(str(episode.pull(store(), prefix, out)))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="An episode's directory.")], json: Json = False
) -> None:
    """Check an episode on disk: files, hashes, schemas, values. Exit 1 if something is wrong."""
    from flywheel import episode

    problems = episode.verify(directory)
    rows(["file", "reason", "message"], [[p.file, str(p.reason), p.message] for p in problems], json)
    if any(p.fatal for p in problems):
        raise EpisodeError(f"{directory}: {problems[0]}")


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="An episode's directory.")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; default beside the directory.")] = None,
) -> None:
    """Draw an episode: joints, modes, events, pictures."""
    from flywheel import episode

    console.print(str(episode.show(directory, out or directory.with_suffix(".png"))))
