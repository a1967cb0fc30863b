"""Running things: the demo, the services, the fleet, one robot."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from flywheel.cli.output import Json, console, messages, rows, show
from flywheel.errors import ConfigError, StageError


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (demo, up, down, status, doctor, fleet, experiments, trace):
        app.command()(command)
    edge = typer.Typer(help="One robot.", no_args_is_help=True)
    edge.command("run")(run_edge)
    edge.command("reset")(reset_edge)
    edge.command("unit")(unit)
    app.add_typer(edge, name="edge")


def _say(service: str, step: str) -> None:
    messages.print(f"  [dim]{service}[/dim] {step}")


def demo(
    manual: Annotated[bool, typer.Option(help="Wait for a person to approve in Airflow.")] = False,
    out: Annotated[Path, typer.Option(help="Where report.html and report.json go.")] = Path(),
    turns: Annotated[int, typer.Option(min=1, help="Turns, in one shift after the other.")] = 1,
    json: Json = False,
) -> None:
    """Turn the wheel: robots fail, the failures become a better policy, the robots get it."""
    from flywheel.demo import run

    report = run(out, manual=manual, turns=turns)
    if json:
        show(report, True)


def up(json: Json = False) -> None:
    """Start the embedded store and Airflow, and leave them running; make signing keys if there are none."""
    from flywheel import services
    from flywheel.config import Deployment
    from flywheel.release import Publisher

    e = services.up(Deployment.from_env().home, on_progress=_say)
    Publisher(e.store(), e.home / "keys").init(Deployment.from_env().approvers)
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


def doctor(json: Json = False) -> None:
    """Whether this machine and what it is connected to are fit to run the wheel. Exit 1 for a problem."""
    from flywheel.config import Deployment
    from flywheel.doctor import Health, examine

    found = examine(Deployment.from_env())
    rows(["", "health", "what"], [[f.name, f.health.value, f.what] for f in found], json)
    if problems := [f for f in found if f.health is Health.PROBLEM]:
        raise ConfigError(f"{problems[0].name}: {problems[0].what}")


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


def experiments(json: Json = False) -> None:
    """Every turn with its figures, from `dvc exp show`."""
    from flywheel.experiments import Experiment
    from flywheel.experiments import experiments as listed
    from flywheel.workspace import source_checkout

    found = listed(source_checkout())
    short = [
        e._replace(
            rev=e.rev[:8],
            policy=(e.policy or "")[:12],
            replaces=(e.replaces or "")[:12],
            loss=None if e.loss is None else round(e.loss, 4),
        )
        for e in found
    ]
    rows(list(Experiment._fields), [list(e) for e in (found if json else short)], json)


def run_edge(
    policy: Annotated[
        Path | None, typer.Option(help="A bundle, or a checkpoint with bundle/ inside.")
    ] = None,
    policies: Annotated[
        Path | None, typer.Option(help="A directory for signed releases, instead of --policy; needs --trust.")
    ] = None,
    trust: Annotated[Path | None, typer.Option(help="The root metadata that checks releases.")] = None,
    shift: Annotated[str, typer.Option(help="Named shift of the twin.")] = "lab",
    seconds: Annotated[float, typer.Option(min=0.5, help="How long.")] = 10.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    forever: Annotated[bool, typer.Option("--forever", help="Until it is stopped.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="This robot's own directory: a later start takes over what runs.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Record failures into this spool.")] = None,
    upload: Annotated[bool, typer.Option("--upload", help="Bring what was recorded into the store.")] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Prometheus on loopback; 0 takes a free port.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Log JSON lines to standard error.")] = False,
    latency_budget_ms: Annotated[
        float, typer.Option(min=1.0, help="Slower policies are given back.")
    ] = 100.0,
    json: Json = False,
) -> None:
    """Run every process of a robot on the wall clock, on the twin, and say how the loop kept time."""
    from flywheel.config import Deployment
    from flywheel.edge.delivery import Delivery, boot
    from flywheel.edge.processes import Recording
    from flywheel.edge.runtime import twin_plan
    from flywheel.edge.service import serve
    from flywheel.edge.supervision import SupervisionSettings
    from flywheel.edge.updater import Updater
    from flywheel.store import Store
    from flywheel.twin.shift import shift as known

    known(shift)
    if upload and record is None:
        raise ConfigError("--upload: needs --record, the spool that is uploaded")
    me = Deployment.from_env()
    with ExitStack() as stack:
        delivery = None
        if policies is not None and trust is not None and policy is None:
            try:
                root = trust.read_bytes()
            except OSError as e:
                raise ConfigError(f"--trust {trust}: {e.strerror}") from None
            updater = Updater(policies, Store.from_env(me), site=me.site, robot=me.robot, bootstrap=root)
            stack.enter_context(updater)
            bundle = Path(boot(updater).directory)
            delivery = Delivery(updater)
        elif policy is not None and policies is None:
            bundle = policy / "bundle" if (policy / "bundle").is_dir() else policy
        else:
            raise ConfigError("give --policy, or --policies and --trust")
        rules = SupervisionSettings(latency_budget_ms=latency_budget_ms)
        plan = twin_plan(bundle, shift, seed, supervision=rules)
        if record is not None:
            recording = Recording(
                directory=str(record.absolute()), site=me.site, robot=me.robot, shift=shift, upload=upload
            )
            plan = plan.model_copy(update={"recording": recording})
        result = serve(
            plan,
            float("inf") if forever else seconds,
            state=state,
            metrics_port=metrics_port,
            log=sys.stderr if log or forever else None,
            delivery=delivery,
        )
    show(result, json)


def reset_edge(
    state: Annotated[Path, typer.Option(help="The robot's own directory, as in `edge run --state`.")],
) -> None:
    """Acknowledge a stop: the robot gets power and holds, and follows its policy when that does well again.

    As the user that the robot runs as. What still asks to stop goes on doing so.
    """
    from flywheel.edge.handover import acknowledge

    acknowledge(state)
    console.print("acknowledged")


def unit(
    policy: Annotated[Path, typer.Option(help="The bundle that the robot runs.")],
    user: Annotated[str, typer.Option(help="The account that it runs as.")] = "flywheel",
    metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 9464,
) -> None:
    """Print the systemd unit of a robot on this machine: redirect it to /etc/systemd/system."""
    from flywheel.edge.service import unit as filled

    typer.echo(filled(policy, user, metrics_port=metrics_port), nl=False)


def trace(
    name: Annotated[str, typer.Argument(help="A bundle's digest, or an episode's id.")],
    json: Json = False,
) -> None:
    """The evidence chain of a policy or an episode, every hash verified. Exit 1 if a link is broken."""
    from flywheel.services.environment import publisher, store
    from flywheel.trace import trace as follow

    found = follow(store(), publisher(), name)
    lines: list[list[Any]] = [[x.what, x.name, x.key, x.how, "" if x.ok else "BROKEN"] for x in found.links]
    if json:
        show(found, True)
    else:
        rows(["link", "name", "object", "verified by", ""], lines, False)
    if not found.ok:
        broken = next(x for x in found.links if not x.ok)
        raise StageError(f"{name}: the chain is broken at {broken.what} {broken.name}: {broken.how}")
