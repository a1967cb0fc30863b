"""The keys that sign releases, from the terminal: ceremonies that may be interrupted at any point."""

from __future__ import annotations

from typing import Annotated

import typer

from flywheel.cli.output import Json, console, rows

app = typer.Typer(help="The keys that sign releases.", no_args_is_help=True)


@app.command()
def init(
    approver: Annotated[list[str] | None, typer.Option(help="Who may approve; may be repeated.")] = None,
) -> None:
    """Make keys and release repository where they are absent; complete a change that was interrupted."""
    from flywheel.config import Deployment
    from flywheel.services.environment import publisher

    p = publisher()
    p.init(approver or Deployment.from_env().approvers)
    console.print(
        f"keys in {p.keys.directory}; robots are given {p.keys.directory / 'root.json'}\n"
        "One machine that holds them all can release anything: take root-* and targets-* offline, leave the "
        "stable-* apart from each other, give approval-* to the people of that name."
    )


@app.command()
def show(json: Json = False) -> None:
    """Every role: whose signatures it needs, which keys are here, until when its metadata hold."""
    from flywheel.release import ceremony
    from flywheel.services.environment import publisher

    lines = [
        [
            r.role,
            f"{r.threshold} of {len(r.keyids)}",
            " ".join(f"{r.names.get(k) or r.held.get(k, 'elsewhere')}:{k[:8]}" for k in r.keyids),
            len(r.held),
            r.version if r.version is not None else "",
            r.expires,
        ]
        for r in ceremony.show(publisher())
    ]
    rows(["role", "needs", "keys", "here", "version", "expires"], lines, json)


@app.command()
def rotate(
    role: Annotated[
        str, typer.Argument(help="root, targets, snapshot, timestamp, canary, stable, operator.")
    ],
    threshold: Annotated[int | None, typer.Option(min=1, help="Signatures needed; as now.")] = None,
) -> None:
    """Replace a role's keys by new ones, and sign anew what the old ones signed."""
    from flywheel.release import ceremony
    from flywheel.services.environment import publisher

    p = publisher()
    ceremony.rotate(p, role, threshold)
    _after(role)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="File name without .pem, approver, or the key id's beginning.")],
) -> None:
    """Take a key that was lost or stolen out of trust; a new one takes its place."""
    from flywheel.release import ceremony
    from flywheel.services.environment import publisher

    ceremony.revoke(publisher(), key)
    _after("operator")


@app.command()
def approver(name: Annotated[str, typer.Argument(help="As FLYWHEEL_APPROVERS names the person.")]) -> None:
    """Let a person approve releases, with a key made here."""
    from flywheel.release import ceremony
    from flywheel.services.environment import publisher

    p = publisher()
    ceremony.enrol(p, name)
    console.print(f"{name} may approve; the key lies in {p.keys.directory}")


@app.command()
def require(role: Annotated[str, typer.Argument()], threshold: Annotated[int, typer.Argument(min=1)]) -> None:
    """Let a role need so many signatures; for ``approval``: so many different people."""
    from flywheel.release import ceremony
    from flywheel.services.environment import publisher

    ceremony.require(publisher(), role, threshold)
    console.print(f"{role} needs {threshold}")


def _after(role: str) -> None:
    """A rollout under way goes on under the operator's new key."""
    from flywheel import rollout
    from flywheel.services.environment import publisher, store

    p = publisher()
    for release in p.refresh().values():
        if role == "operator" and release is not None and release.rollout_id:
            rollout.reseal(store(), p, release.rollout_id)
    console.print("done; the old keys lie in " + str(p.keys.directory / "retired"))
