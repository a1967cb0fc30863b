"""Episodes in the store and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flywheel.cli import output
from flywheel.cli.output import Bar, Json, console, rows
from flywheel.errors import EpisodeError

app = typer.Typer(help="Episodes in the store and on disk.", no_args_is_help=True)


@app.command("ls")
def list_(
    site: Annotated[str, typer.Option(help="Only this site.")] = "",
    robot: Annotated[str, typer.Option(help="Only this robot.")] = "",
    date: Annotated[str, typer.Option(help="Only this UTC date, YYYY-MM-DD.")] = "",
    where: Annotated[
        str | None,
        typer.Option(
            help="Ask the catalogue: an SQL condition, such as \"outcome = 'timeout' and gaps = 0\"."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1)] = 1000,
    json: Json = False,
) -> None:
    """List what the store holds: its manifests, or with --where the catalogue, as of the last ingest."""
    from itertools import islice

    from flywheel import episode
    from flywheel.services.environment import store

    columns = ["prefix", "outcome", "triggers", "task", "shift"]
    if where is not None:
        rows(columns, _asked(where, columns, limit, site=site, robot=robot, date=date), json)
        return
    found = []
    for e in islice(episode.ls(store(), site, robot, date), limit):
        m = e.manifest
        kinds = ",".join(t.kind.value for t in m.triggers) if m else e.problem
        found.append(
            [e.prefix, m.outcome.value if m else "", kinds, m.task if m else "", m.shift if m else ""]
        )
    rows(columns, found, json)


def _asked(where: str, columns: list[str], limit: int, **equal: str) -> list[list[str]]:
    from flywheel import catalogue
    from flywheel.catalogue.where import check
    from flywheel.config import Deployment
    from flywheel.services.environment import store

    check(where)  # before anything is asked of anybody
    ray = Deployment.from_env().ray
    found = catalogue.select(store(), where, [*columns, "problem"], limit, ray=ray, **equal)
    return [
        [
            r["prefix"],
            r["outcome"] or "",
            r["problem"] or ",".join(r["triggers"]),
            r["task"] or "",
            r["shift"] or "",
        ]
        for r in found.to_pylist()
    ]


@app.command()
def ingest(
    rebuild: Annotated[
        bool, typer.Option(help="Read every manifest anew and replace the catalogue.")
    ] = False,
    json: Json = False,
) -> None:
    """Bring the catalogue up to date with the store; reads only manifests that are not in it.

    Any number of times, and several at once: nothing is lost or there twice.
    """
    from flywheel import catalogue
    from flywheel.config import Deployment
    from flywheel.services.environment import store

    ray = Deployment.from_env().ray
    with Bar("manifests") as bar:
        done = catalogue.ingest(
            store(), rebuild=rebuild, ray=ray, on_progress=lambda seen, read: bar.to(read, seen)
        )
    output.show(done, json)


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
def repair(
    directory: Annotated[Path, typer.Argument(help="A robot's spool, or its `episodes`.")],
    json: Json = False,
) -> None:
    """Finish what a crash cut short, remove what it left half-written, and set damaged episodes aside.

    For a robot whose recorder does not run. Nothing of what is kept is edited.
    """
    from flywheel import episode

    done = episode.repair(inside if (inside := directory / "episodes").is_dir() else directory)
    rows(["episode", "what", "why"], [[r.name, r.what, r.why] for r in done], json)


@app.command()
def ask(
    robot: Annotated[str, typer.Argument(help="Which robot.")],
    episode_id: Annotated[str, typer.Option(help="An episode that waits there.")] = "",
    start: Annotated[str, typer.Option(help="Or a time, ISO 8601 with its zone …")] = "",
    seconds: Annotated[float, typer.Option(min=0.1, max=600.0, help="… and how much of it.")] = 10.0,
    why: Annotated[str, typer.Option(help="For whoever looks at the episode.")] = "",
) -> None:
    """Ask a robot for a window, or an episode, that is still there."""
    import uuid
    from datetime import datetime

    from flywheel.edge.requests import WindowRequest
    from flywheel.services.environment import store

    low = high = 0
    if not episode_id:
        try:
            at = datetime.fromisoformat(start)
        except ValueError:
            raise EpisodeError(f"--start={start!r}: give an ISO 8601 time, or --episode-id") from None
        if at.tzinfo is None:
            raise EpisodeError(f"--start={start!r}: has no zone; end it with Z or +00:00")
        low = round(at.timestamp() * 1e9)
        high = low + round(seconds * 1e9)
    request = WindowRequest(
        request_id=uuid.uuid4().hex,
        robot=robot,
        start_unix_ns=low,
        end_unix_ns=high,
        episode_id=episode_id,
        why=why,
    )
    store().create(request.key, request.to_bytes())
    console.print(request.key.replace("requests", "answers"))


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="An episode's directory.")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; default beside the directory.")] = None,
    rrd: Annotated[Path | None, typer.Option(help="Also write this .rrd, for the Rerun viewer.")] = None,
) -> None:
    """Draw an episode: joints, modes, events, pictures."""
    from flywheel import episode
    from flywheel.episode.timeline import write_rrd

    if rrd is not None:
        console.print(str(write_rrd(directory, rrd)))
    console.print(str(episode.show(directory, out or directory.with_suffix(".png"))))
