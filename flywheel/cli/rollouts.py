"""Rollouts from the terminal."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from flywheel.cli.output import Json, console, rows, show
from flywheel.errors import ConfigError

if TYPE_CHECKING:
    from flywheel.schema import HoldBack, Pin, Who

app = typer.Typer(help="Shadow, canary, approval, wide; and back.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(help="Rollout id.")]


@app.command()
def start(
    candidate: Annotated[str, typer.Argument(help="Digest of a bundle in the store.")],
    gate: Annotated[str, typer.Argument(help="Digest of its gate report in the store.")],
    supersede: Annotated[bool, typer.Option(help="End a rollout that nobody approved yet.")] = False,
    json: Json = False,
) -> None:
    """Begin with the shadow. The gate report must promote this bundle over the one in use."""
    from flywheel import rollout
    from flywheel.config import Settings
    from flywheel.services.environment import publisher, store

    settings = Settings.load().rollout
    show(rollout.start(store(), publisher(), candidate, gate, settings, supersede=supersede), json)


@app.command()
def look(rollout_id: Id, json: Json = False) -> None:
    """Look at the fleet once and act on what is seen."""
    from flywheel import rollout
    from flywheel.services.environment import publisher, store

    seen = rollout.look(store(), publisher(), rollout_id)
    show(seen.state, True) if json else console.print(seen.line())


@app.command()
def status(rollout_id: Id, json: Json = False) -> None:
    """Every decision so far."""
    from flywheel import rollout
    from flywheel.services.environment import store

    found = rollout.status(store(), rollout_id)
    rows(["n", "stage", "t_unix_ns", "reason"], [list(r) for r in found.rows()], json)


@app.command()
def decide(
    rollout_id: Id,
    decision: Annotated[
        str, typer.Argument(help="promote, hold, roll-back, pause, resume, skip, or abort (a roll-back).")
    ],
    reason: Annotated[str, typer.Option(help="Why; kept with the decision.")] = "",
    by: Annotated[str, typer.Option(help="Who decides.")] = "",
) -> None:
    """Give a person's signed word; the next look acts on it."""
    from flywheel import rollout
    from flywheel.config import Deployment
    from flywheel.services.environment import publisher, store

    words = {d.value.replace(" ", "-"): d for d in rollout.Decision}
    words["abort"] = rollout.Decision.ROLL_BACK
    if decision not in words:
        raise ConfigError(f"decision = {decision!r}: choose {', '.join(words)}")
    if decision == "abort" and not reason:
        raise ConfigError("abort: say why with --reason; it is kept with the decision")
    who = by or getpass.getuser()
    if words[decision] is rollout.Decision.PROMOTE and who not in Deployment.from_env().approvers:
        raise ConfigError(f"{who} may not approve releases; FLYWHEEL_APPROVERS names who may")
    given = rollout.approve(store(), publisher(), rollout_id, words[decision], who, reason)
    console.print(f"{rollout_id}: {decision} by {given.by}; takes effect at the next look")


@app.command("twin")
def twin_trust(
    parameters: Annotated[Path | None, typer.Option(help="The twin's identified parameters.")] = None,
    json: Json = False,
) -> None:
    """How far the twin may be trusted: what it said of past releases against what the robots did, and how far
    it is from the episodes that `flywheel twin replay --keep` replayed."""
    from flywheel.config import Settings
    from flywheel.rollout import twin
    from flywheel.services.environment import store
    from flywheel.twin.cell import twin_digest
    from flywheel.twin.parameters import TwinParameters

    outcomes = twin.past(store())
    digest = twin_digest(None if parameters is None else TwinParameters.load(parameters))
    found = twin.trust(outcomes, Settings.load().rollout, twin.replayed(store(), digest), digest)
    if json:
        show(found, True)
        return
    lines: list[list[Any]] = [
        [o.rollout_id, o.check, f"{o.twin:.2f} of {o.twin_n}", f"{o.robots:.2f} of {o.robots_n}"]
        for o in outcomes
    ]
    rows(["rollout", "check", "in the twin", "on the robots"], lines, False)
    console.print(found.sentence())


@app.command()
def reseal(rollout_id: Id) -> None:
    """Go on after a change of the operator's key, where the old one was put away."""
    from flywheel import rollout
    from flywheel.services.environment import publisher, store

    console.print(rollout.reseal(store(), publisher(), rollout_id).reason)


Robot = Annotated[str | None, typer.Option(help="One robot.")]
Site = Annotated[str | None, typer.Option(help="Every robot of a site.")]
Why = Annotated[str, typer.Option(help="Why; signed with it.")]


@app.command()
def pin(
    digest: Annotated[str, typer.Argument(help="Of a policy that is or was stable.")],
    reason: Why,
    robot: Robot = None,
    site: Site = None,
) -> None:
    """Let a robot or a site run one policy and no other, until that is lifted or the policy revoked."""
    from flywheel.schema import Pin

    _except(lambda: Pin(robot=robot, site=site, digest=digest, by=getpass.getuser(), reason=reason))


@app.command("hold-back")
def hold_back(
    until: Annotated[datetime, typer.Argument(help="UTC; no other policy before then.")],
    reason: Why,
    robot: Robot = None,
    site: Site = None,
) -> None:
    """Keep a robot or a site on what it runs until a date."""
    from flywheel.schema import HoldBack

    ns = round(until.replace(tzinfo=until.tzinfo or UTC).timestamp() * 1e9)
    _except(lambda: HoldBack(robot=robot, site=site, until_unix_ns=ns, by=getpass.getuser(), reason=reason))


@app.command()
def lift(robot: Robot = None, site: Site = None) -> None:
    """Let a robot or a site follow the releases again."""
    from flywheel.services.environment import publisher

    p = publisher()
    plan = p.plan()

    def others[W: Who](given: tuple[W, ...]) -> tuple[W, ...]:
        return tuple(w for w in given if (w.robot, w.site) != (robot, site))

    p.set_plan(plan.model_copy(update={"pins": others(plan.pins), "holds": others(plan.holds)}))
    console.print(f"{robot or site}: follows the releases")


@app.command()
def plan(json: Json = False) -> None:
    """Pins and hold-backs, as robots obey them."""
    from flywheel.services.environment import publisher

    found = publisher().plan()
    lines: list[list[Any]] = [
        [p.robot or p.site, f"pinned to {p.digest}", p.by, p.reason] for p in found.pins
    ]
    for h in found.holds:
        until = datetime.fromtimestamp(h.until_unix_ns / 1e9, UTC)
        lines.append([h.robot or h.site, f"held back until {until:%Y-%m-%d %H:%M} UTC", h.by, h.reason])
    rows(["who", "what", "by", "reason"], lines, json)


def _except(make: Callable[[], Pin | HoldBack]) -> None:
    """Sign one more pin or hold-back, in the place of an earlier one of the same robot or site."""
    from flywheel.schema import Pin
    from flywheel.services.environment import publisher

    try:
        new = make()
    except ValidationError as e:
        first = e.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc'])) or 'robot, site'}: {first['msg']}") from None
    p = publisher()
    plan = p.plan()
    field = "pins" if isinstance(new, Pin) else "holds"
    rest = (w for w in getattr(plan, field) if (w.robot, w.site) != (new.robot, new.site))
    p.set_plan(plan.model_copy(update={field: (*rest, new)}))
    console.print(f"{new.robot or new.site}: signed; robots obey it when they look next")
