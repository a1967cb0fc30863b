"""Approvals in Airflow, from outside of it: what a person is shown, what waits, who answers.

``AutoApprover`` stands in for the person in the demo. It is an Airflow user of its own, may only decide
where FLYWHEEL_APPROVERS names it, and uses the same public API as the UI.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from urllib.parse import quote

from flywheel.schema import Check, GateReport
from flywheel.services.airflow import AUTO_APPROVER

COLLECT, IMPROVE, RELEASE = DAGS = ("collect", "improve", "release")  # a turn's runs, in this order
PROMOTE, HOLD, ROLL_BACK = "Promote", "Hold", "Roll back"
SETTLE_S = 6.0  # an answer within about 5 s of parking can fail the waiting task (measured, Airflow 3.3.2)


class Api(Protocol):
    """Airflow's public API (``services.airflow.Airflow``); raises ``ServiceError``."""

    def call(self, method: str, path: str, body: Any = None, *, user: str = "admin") -> Any:
        """One request, path from ``/api/v2``; the decoded answer."""


# ── what the approver is shown ───────────────────────────────────────────────────────────────────────


def evidence(turn: str, rollout_id: str, gate: GateReport, gate_digest: str, canary: Sequence[Check]) -> str:
    """The request's body, in Markdown: what would be replaced by what, and all that speaks for it."""
    return "\n".join(
        [
            f"**{turn}** asks to replace policy `{gate.current_digest[:12]}` by "
            f"`{gate.candidate_digest[:12]}` on every robot.",
            "",
            "### Gate: candidate against current, same scenes",
            *_table(gate.checks),
            "",
            "### Canary: the cohort's robots",
            *_table(canary),
            "",
            f"- Candidate `{gate.candidate_digest}`",
            f"- Gate report `gates/{gate_digest}.json`",
            f"- Rollout `{rollout_id}`: `flywheel rollout status {rollout_id}`",
            f"- Experiment `{turn}`: `dvc exp show`, workspace and plots by `dvc exp apply {turn}`",
            "",
            f"*{PROMOTE}* releases to all. *{HOLD}* withdraws the candidate without blame. *{ROLL_BACK}*, "
            "also taken when nobody answers in time, withdraws it and marks it as bad.",
        ]
    )


def _table(checks: Iterable[Check]) -> list[str]:
    rows = ["| Check | Value | 95 % interval | Bar | n | Verdict |", "|---|---|---|---|---|---|"]
    for c in checks:
        interval = f"{_number(c.low)} … {_number(c.high)}" if c.low is not None or c.high is not None else ""
        cells = (c.name, _number(c.value), interval, c.bar, str(c.n), c.verdict.value)
        rows.append("| " + " | ".join(x.replace("|", "\\|").replace("\n", " ") for x in cells) + " |")
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


# ── runs, tasks and what waits for an answer ─────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a run: ``state`` is Airflow's, None before it is scheduled."""

    name: str  # with its DAG: "improve.train"
    state: str | None
    seconds: float | None
    attempt: int


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one of the DAGs that a turn goes through."""

    dag: str
    run_id: str  # of improve and release: the turn's name
    state: str
    kind: str  # asset_triggered | operator_triggered | manual | …
    after: datetime  # when it was to start
    started: datetime | None
    ended: datetime | None
    tasks: tuple[Task, ...] = ()

    @property
    def over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.state in ("success", "failed")


@dataclass(frozen=True, slots=True)
class Pending:
    """A question that waits for a person."""

    run_id: str
    task: str
    map_index: int
    subject: str
    body: str
    options: tuple[str, ...]
    params: dict[str, Any]  # name to default
    approvers: tuple[str, ...]
    since: datetime

    @property
    def path(self) -> str:
        """Where in the API it is answered."""
        task = f"taskInstances/{quote(self.task, safe='')}/{self.map_index}"
        return f"{_path(RELEASE, self.run_id)}/{task}/hitlDetails"

    def page(self, url: str) -> str:
        """Where in the UI it is answered; ``url`` is Airflow's."""
        run = f"{url}/dags/{RELEASE}/runs/{quote(self.run_id, safe='')}"
        return f"{run}/tasks/{quote(self.task, safe='')}/required_actions"


def runs(api: Api, dag: str, limit: int = 10) -> list[Run]:
    """A DAG's runs without their tasks, the newest first."""
    found = api.call("GET", f"/dags/{dag}/dagRuns?order_by=-run_after&limit={limit}")
    return [_run(doc) for doc in found["dag_runs"]]


def run(api: Api, dag: str, run_id: str) -> Run:
    """One run with its tasks in the order in which they started, those not started yet at the end."""
    path = _path(dag, run_id)
    found = api.call("GET", f"{path}/taskInstances?limit=100")["task_instances"]
    found.sort(key=lambda t: (t["start_date"] is None, t["start_date"] or ""))
    tasks = tuple(Task(f"{dag}.{t['task_id']}", t["state"], t["duration"], t["try_number"]) for t in found)
    return _run(api.call("GET", path), tasks)


def trigger(api: Api, dag: str, run_id: str, conf: dict[str, Any] | None = None, user: str = "admin") -> Run:
    """Start a run by hand, with the form's values in ``conf``; ``ServiceError`` 409 if it exists."""
    body = {"dag_run_id": run_id, "logical_date": None, "conf": conf or {}}
    return _run(api.call("POST", f"/dags/{dag}/dagRuns", body, user=user))


def clear(api: Api, failed: Run) -> None:
    """Let a run that failed go on from what failed in it."""
    body = {"dry_run": False, "dag_run_id": failed.run_id, "only_failed": True, "reset_dag_runs": True}
    api.call("POST", f"/dags/{failed.dag}/clearTaskInstances", body)


def pause(api: Api, dag: str, paused: bool) -> None:
    """Whether a DAG starts new runs and new tasks."""
    api.call("PATCH", f"/dags/{dag}", {"is_paused": paused})


class Turn:
    """A turn on its way through its runs, from the run of ``collect`` that opened it."""

    def __init__(self, api: Api, run_id: str) -> None:
        self._api = api
        self._runs: dict[str, Run] = {}  # by DAG, as last seen
        self._at, self._run_id = COLLECT, run_id
        self.name = ""  # once it has been seen
        self.over = False

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Of all its runs so far."""
        return tuple(t for r in self._runs.values() for t in r.tasks)

    def look(self) -> None:
        """See how far it has come. Call it again every second or so, until it is ``over``."""
        from flywheel.turn import turn_name  # the DAGs import this module, and are parsed often

        seen = self._runs[self._at] = run(self._api, self._at, self._run_id)
        self.name = self.name or turn_name(seen.run_id, seen.after)
        if not seen.over:
            return
        # What it was handed over to is there before its run is over.
        ahead = DAGS[DAGS.index(self._at) + 1 :] if seen.state == "success" else ()
        if ahead and any(r.run_id == self.name for r in runs(self._api, ahead[0])):
            self._at, self._run_id = ahead[0], self.name
        else:
            self.over = True


def pending(api: Api, user: str = "admin") -> list[Pending]:
    """What waits for an answer, in all releases."""
    path = f"/dags/{RELEASE}/dagRuns/~/hitlDetails?response_received=false&state=awaiting_input"
    return [
        Pending(
            run_id=d["task_instance"]["dag_run_id"],
            task=d["task_instance"]["task_id"],
            map_index=d["task_instance"]["map_index"],
            subject=d["subject"],
            body=d["body"] or "",
            options=tuple(d["options"]),
            params={k: v["value"] if isinstance(v, dict) else v for k, v in d["params"].items()},
            approvers=tuple(u["name"] for u in d["assigned_users"]),
            since=datetime.fromisoformat(d["created_at"]),
        )
        for d in api.call("GET", path, user=user)["hitl_details"]
    ]


def answer(api: Api, question: Pending, option: str, reason: str, user: str) -> None:
    """Answer as ``user``. ``ServiceError``: 403 for a user who is not assigned, 409 for a second answer."""
    params = {**question.params, "reason": reason} if "reason" in question.params else question.params
    api.call("PATCH", question.path, {"chosen_options": [option], "params_input": params}, user=user)


class AutoApprover:
    """Answers every question of the wheel with *Promote*, once it has waited long enough. Demo only."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._seen: dict[tuple[str, str, datetime], float] = {}

    def poll(self) -> list[Pending]:
        """Look once; returns what was answered. Call it again every second or so."""
        answered = []
        for question in pending(self._api):
            first = self._seen.setdefault((question.run_id, question.task, question.since), self._clock())
            if AUTO_APPROVER not in question.approvers or self._clock() - first < SETTLE_S:
                continue
            answer(self._api, question, PROMOTE, "automatic: nobody looked at this", AUTO_APPROVER)
            answered.append(question)
        return answered


def _path(dag: str, run_id: str) -> str:
    return f"/dags/{dag}/dagRuns/{quote(run_id, safe='')}"


def _run(doc: dict[str, Any], tasks: tuple[Task, ...] = ()) -> Run:
    started, ended = (
        datetime.fromisoformat(t) if (t := doc[k]) else None for k in ("start_date", "end_date")
    )
    after = datetime.fromisoformat(doc["run_after"])
    return Run(doc["dag_id"], doc["dag_run_id"], doc["state"], doc["run_type"], after, started, ended, tasks)
