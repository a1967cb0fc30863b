"""What waits for a person in Airflow, answered from the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flywheel.cli.output import Json, console, rows
from flywheel.errors import ConfigError

if TYPE_CHECKING:
    from flywheel.approvals import Pending
    from flywheel.services.airflow import Airflow

app = typer.Typer(help="What waits for a person in Airflow.", no_args_is_help=True)
Run = Annotated[str, typer.Argument(help="The run, or a part of its id; not needed where only one waits.")]
By = Annotated[str, typer.Option(help="The Airflow user who answers.")]
Why = Annotated[str, typer.Option("--reason", help="Why; kept with the decision.")]


@app.command()
def ls(json: Json = False) -> None:
    """Every question that waits, who may answer it, and where."""
    airflow, waiting = _waiting()
    lines = [
        [q.run_id, q.subject, " ".join(q.approvers), f"{q.since:%Y-%m-%d %H:%M}", q.page(airflow.url)]
        for q in waiting
    ]
    rows(["run", "question", "approvers", "since, UTC", "page"], lines, json)


@app.command()
def show(run: Run = "") -> None:
    """The evidence, as the approver is shown it."""
    from rich.markdown import Markdown

    question = _one(_waiting()[1], run)
    console.print(question.subject)
    console.print(Markdown(question.body))


@app.command()
def approve(run: Run = "", by: By = "", reason: Why = "") -> None:
    """Release the policy to every robot."""
    from flywheel.approvals import PROMOTE

    _answer(run, PROMOTE, by, reason)


@app.command()
def hold(reason: Why, run: Run = "", by: By = "") -> None:
    """Withdraw the candidate without blame."""
    from flywheel.approvals import HOLD

    _answer(run, HOLD, by, reason)


@app.command()
def reject(reason: Why, run: Run = "", by: By = "") -> None:
    """Withdraw the candidate and mark it as bad."""
    from flywheel.approvals import ROLL_BACK

    _answer(run, ROLL_BACK, by, reason)


def _answer(run: str, option: str, by: str, reason: str) -> None:
    from flywheel import approvals
    from flywheel.services.airflow import APPROVER

    airflow, waiting = _waiting()
    question = _one(waiting, run)
    who = by or APPROVER
    if question.approvers and who not in question.approvers:
        raise ConfigError(f"{who} may not answer {question.run_id}; it asks {', '.join(question.approvers)}")
    approvals.answer(airflow, question, option, reason, who)
    console.print(f"{question.run_id}: {option}, by {who}; the wheel checks it again before it acts on it")


def _waiting() -> tuple[Airflow, list[Pending]]:
    from flywheel.approvals import pending
    from flywheel.config import Deployment
    from flywheel.services.airflow import Airflow

    airflow = Airflow(Deployment.from_env().home)
    return airflow, pending(airflow)


def _one(waiting: list[Pending], run: str) -> Pending:
    found = [q for q in waiting if run in q.run_id]
    if len(found) == 1:
        return found[0]
    which = f"{len(found)} questions of runs like {run!r}" if run else f"{len(found)} questions"
    raise ConfigError(f"{which} wait; `flywheel approvals ls` lists them" + (", name one" if found else ""))
