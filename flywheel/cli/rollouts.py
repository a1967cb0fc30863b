"""Rollouts from the terminal."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from flywheel.cli.output import Json, console, rows, show
from flywheel.errors import ConfigError
from flywheel.schema import Verdict

app = typer.Typer(help="Shadow, canary, approval, wide; and back.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(help="Rollout id.")]


@app.command()
def start(
    candidate: Annotated[str, typer.Argument(help="Digest of a bundle in the store.")],
    gate: Annotated[str, typer.Argument(help="Digest of its gate report in the store.")],
    json: Json = False,
) -> None:
    """Begin with the shadow. The gate report must promote this bundle over the one in use."""
    from flywheel import rollout
    from flywheel.config import Settings
    from flywheel.services.environment import publisher, store

    show(rollout.start(store(), publisher(), candidate, gate, Settings.load().rollout), json)


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
    decision: Annotated[str, typer.Argument(help="promote, hold or roll-back.")],
    reason: Annotated[str, typer.Option(help="Why; kept with the decision.")] = "",
    by: Annotated[str, typer.Option(help="Who decides.")] = "",
) -> None:
    """Give a person's word; the next look acts on it."""
    from flywheel import rollout
    from flywheel.config import Deployment
    from flywheel.services.environment import store

    words = {"promote": Verdict.PROMOTE, "hold": Verdict.HOLD, "roll-back": Verdict.ROLL_BACK}
    if decision not in words:
        raise ConfigError(f"decision = {decision!r}: choose promote, hold or roll-back")
    who = by or getpass.getuser()
    if words[decision] is Verdict.PROMOTE and who not in Deployment.from_env().approvers:
        raise ConfigError(f"{who} may not approve releases; FLYWHEEL_APPROVERS names who may")
    given = rollout.approve(store(), rollout_id, words[decision], who, reason)
    console.print(f"{rollout_id}: {decision} by {given.by}; takes effect at the next look")
