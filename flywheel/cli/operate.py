"""Running things: the demo, the services, the fleet, one robot."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from flywheel.cli.output import Json, console, messages, rows, show
from flywheel.errors import ConfigError

# Imported only when asked for: each brings what it measures with it.
BENCHES = {
    "stats": "flywheel.gate.bench:bench",
    "tracking": "flywheel.edge.bench:tracking",
}


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (demo, up, down, status, fleet, bench):
        app.command()(command)
    edge = typer.Typer(help="One robot.", no_args_is_help=True)
    edge.command("run")(run_edge)
    app.add_typer(edge, name="edge")


def _say(service: str, step: str) -> None:
    messages.print(f"  [dim]{service}[/dim] {step}")


def demo(
    manual: Annotated[bool, typer.Option(help="Wait for a person to approve in Airflow.")] = False,
    out: Annotated[Path, typer.Option(help="Where report.html and report.json go.")] = Path(),
    json: Json = False,
) -> None:
    """Turn the wheel once: robots fail, the failures become a better policy, the robots get it."""
    from flywheel.demo import run

    report = run(out, manual=manual)
    if json:
        show(report, True)


def up(json: Json = False) -> None:
    """Start the embedded store and Airflow, and leave them running; make signing keys if there are none."""
    from flywheel import services
    from flywheel.config import Deployment
    from flywheel.release import Publisher

    e = services.up(Deployment.from_env().home, on_progress=_say)
    Publisher(e.store(), e.home / "keys").init()
    found = {
        "store": e.store_url,
        "endpoint": e.store_endpoint,
        "airflow": e.airflow_url,
        "user": e.airflow_user,
        "home": str(e.home),
    }
    show(found, json)
    if not json:
        console.print(
            f"Airflow's password of {e.airflow_user} is in {e.home / 'airflow'}; `flywheel down` stops both."
        )


def down() -> None:
    """Stop the embedded store and Airflow."""
    from flywheel import services
    from flywheel.config import Deployment

    services.down(Deployment.from_env().home, on_progress=_say)


def status(json: Json = False) -> None:
    """Which services run."""
    from flywheel import services
    from flywheel.config import Deployment

    show(services.status(Deployment.from_env().home), json)


def fleet(json: Json = False) -> None:
    """What every robot last said of itself."""
    from flywheel.rollout.evidence import read_robots
    from flywheel.services.environment import store

    robots, ignored = read_robots(store())
    columns = ["robot", "digest", "mode", "episodes", "successes", "spool", "rollout", "seen_unix_ns"]
    lines: list[list[Any]] = [
        [
            r.robot,
            r.loaded_digest if json else r.loaded_digest[:12],
            r.mode.name.lower(),
            r.episodes,
            r.successes,
            r.spool_pending,
            r.rollout_id,
            r.t_unix_ns,
        ]
        for r in robots
    ]
    rows(columns, lines, json)
    for line in ignored:
        messages.print(f"ignored: {line}")


def run_edge(
    policy: Annotated[Path, typer.Option(help="A bundle, or a checkpoint with bundle/ inside.")],
    shift: Annotated[str, typer.Option(help="Named shift of the twin.")] = "lab",
    seconds: Annotated[float, typer.Option(min=0.5, help="How long.")] = 10.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
) -> None:
    """Run both systems on the wall clock, on the twin, and say how the loop kept time."""
    from flywheel.edge.runtime import run_wall
    from flywheel.twin.shift import shift as known

    known(shift)
    bundle = policy / "bundle" if (policy / "bundle").is_dir() else policy
    show(run_wall(bundle, shift, seconds, seed), json)


def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark.")] = "tracking",
    full: Annotated[bool, typer.Option(help="Longer.")] = False,
    json: Json = False,
) -> None:
    """Measure, against a peer or a limit in the same run."""
    if name not in BENCHES:
        raise ConfigError(f"bench = {name!r}: not known; choose {', '.join(sorted(BENCHES))}")
    module, function = BENCHES[name].split(":")
    show(getattr(import_module(module), function)(full), json)
