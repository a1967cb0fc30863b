"""The command line: the composition root.

Every command takes ``--json`` where it has something to report, exits 0 when it did what was asked, and
otherwise exits 1 with one line that says what was wrong and what to do.
"""

from __future__ import annotations

import sys

import typer

from flywheel.cli import (
    access,
    approvals,
    backups,
    bench,
    campaigns,
    episodes,
    explain,
    keys,
    labels,
    operate,
    page,
    production,
    rollouts,
    stages,
    turns,
    twin,
)
from flywheel.errors import FlywheelError

app = typer.Typer(
    name="flywheel",
    help="A data flywheel for robots: failures become episodes, and episodes a better policy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
operate.add_to(app)
backups.add_to(app)
production.add_to(app)
bench.add_to(app)
page.add_to(app)
stages.add_to(app)
explain.add_to(app)
app.add_typer(access.app, name="access")
app.add_typer(approvals.app, name="approvals")
app.add_typer(episodes.app, name="episodes")
app.add_typer(keys.app, name="keys")
app.add_typer(labels.app, name="label")
app.add_typer(campaigns.app, name="campaigns")
app.add_typer(rollouts.app, name="rollout")
app.add_typer(turns.app, name="turn", hidden=True)
app.add_typer(twin.app, name="twin")


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except FlywheelError as e:
        print(f"flywheel: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("flywheel: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
