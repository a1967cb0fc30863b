"""Answers from the terminal: to the right question, by somebody who may, with a reason where one is due."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from flywheel.cli import app
from flywheel.errors import ConfigError

RUNS = ("turn-20260102-030405-aaaaaa", "manual__2026-01-03")


def detail(run: str) -> dict[str, Any]:
    return {
        "task_instance": {"dag_run_id": run, "task_id": "approve", "map_index": -1},
        "subject": f"Release the policy of {run}?",
        "body": "| Check | Value |\n|---|---|\n| success in factory | 0.9 |",
        "options": ["Promote", "Hold", "Roll back"],
        "params": {"reason": {"value": ""}},
        "assigned_users": [{"id": "ops", "name": "ops"}],
        "created_at": "2026-01-03T04:05:06+00:00",
    }


class Airflow:
    """The public API, as far as it is asked."""

    url = "http://127.0.0.1:1"
    waiting: tuple[str, ...] = RUNS
    answers: list[tuple[str, dict[str, Any], str]] = []  # noqa: RUF012  cleared by the fixture

    def __init__(self, home: Any) -> None:
        pass

    def call(self, method: str, path: str, body: Any = None, *, user: str = "admin") -> Any:
        if method == "GET":
            return {"hitl_details": [detail(r) for r in self.waiting]}
        self.answers.append((path, body, user))
        return None


@pytest.fixture(autouse=True)
def airflow(monkeypatch: pytest.MonkeyPatch) -> type[Airflow]:
    monkeypatch.setattr("flywheel.services.airflow.Airflow", Airflow)
    monkeypatch.setattr(Airflow, "waiting", RUNS)
    Airflow.answers.clear()
    return Airflow


def run(*args: str) -> str:
    done = CliRunner().invoke(app, ["approvals", *args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_an_answer_goes_to_the_run_that_was_named_with_its_reason() -> None:
    run("hold", "manual", "--reason", "line 3 is down")
    ((path, body, user),) = Airflow.answers
    assert "manual__2026-01-03" in path
    assert path.startswith("/dags/release/")
    assert "aaaaaa" not in path
    assert body == {"chosen_options": ["Hold"], "params_input": {"reason": "line 3 is down"}}
    assert user == "ops"


def test_two_questions_are_not_answered_by_chance() -> None:
    with pytest.raises(ConfigError, match="2 questions wait"):
        run("approve")
    with pytest.raises(ConfigError, match="0 questions of runs like 'nothing'"):
        run("approve", "nothing")
    assert Airflow.answers == []


def test_somebody_who_was_not_asked_is_told_who_was() -> None:
    with pytest.raises(ConfigError, match="eve may not answer manual__2026-01-03; it asks ops"):
        run("approve", "manual", "--by", "eve")
    assert Airflow.answers == []


def test_holding_and_rejecting_take_a_reason(airflow: type[Airflow], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(airflow, "waiting", RUNS[:1])
    assert "Missing option" in run("reject")
    assert Airflow.answers == []
    run("approve")
    assert [b["chosen_options"] for _, b, _ in Airflow.answers] == [["Promote"]]


def test_the_evidence_is_shown_as_a_table() -> None:
    assert "success in factory" in run("show", "manual")
    assert "manual__2026-01-03" in run("ls", "--json")
