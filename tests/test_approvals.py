"""Answers from the terminal: to the right question, by somebody who may, with a reason where one is due."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from typer.testing import CliRunner

from flywheel import approvals
from flywheel.cli import app
from flywheel.errors import ConfigError
from flywheel.turn import TURN

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


class Runs:
    """The public API's runs and tasks, as they come to be."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], tuple[str, dict[str, str]]] = {}

    def call(self, method: str, path: str, body: Any = None, *, user: str = "admin") -> Any:
        _, _, dag, _, *rest = path.partition("?")[0].split("/")
        if not rest:
            return {"dag_runs": [self.doc(*key) for key in self.runs if key[0] == dag]}
        if len(rest) == 1:
            return self.doc(dag, rest[0])
        states = self.runs[dag, rest[0]][1]
        return {
            "task_instances": [
                {"task_id": t, "state": s, "start_date": None, "duration": 1.0, "try_number": 1}
                for t, s in states.items()
            ]
        }

    def doc(self, dag: str, run_id: str) -> dict[str, Any]:
        after = "2026-01-02T03:04:05+00:00"
        ends = dict.fromkeys(("start_date", "end_date"))
        found = {"dag_id": dag, "dag_run_id": run_id, "run_type": "manual", "run_after": after}
        return found | ends | {"state": self.runs[dag, run_id][0]}


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


@pytest.mark.parametrize("handed", ["success", "skipped"])  # skipped: a repeat that found it done
def test_a_turn_is_followed_through_its_three_runs(handed: str) -> None:
    api = Runs()
    api.runs["collect", "first"] = "running", {"open": "running"}
    turn = approvals.Turn(api, "first")
    turn.look()
    assert TURN.fullmatch(turn.name)
    for dag, following in pairwise(approvals.DAGS):
        api.runs[following, "another"] = "running", {}
        api.runs[following, turn.name] = "queued", {}
        api.runs[dag, "first" if dag == "collect" else turn.name] = "success", {"hand_over": handed}
        turn.look()
        assert not turn.over
    api.runs["release", turn.name] = "success", {"wide": "success"}
    turn.look()
    assert turn.over
    assert {t.name for t in turn.tasks} == {"collect.hand_over", "improve.hand_over", "release.wide"}


@pytest.mark.parametrize(
    ("state", "tasks"),
    [("success", {"open": "skipped", "hand_over": "skipped"}), ("failed", {"hand_over": "upstream_failed"})],
)
def test_a_turn_that_ends_early_is_not_waited_for(state: str, tasks: dict[str, str]) -> None:
    api = Runs()
    api.runs["collect", "first"] = state, tasks
    api.runs["improve", "of-another-turn"] = "running", {}
    turn = approvals.Turn(api, "first")
    turn.look()
    assert turn.over
