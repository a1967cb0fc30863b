"""Turns: what went in, what came out, and success by shift, as each turn's own documents say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flywheel.errors import NotFound, StoreError, StoreRefused, StoreUnavailable
from flywheel.page.shown import figure
from flywheel.rollout.documents import rollout_id
from flywheel.rollout.evidence import read_gate
from flywheel.schema import GateReport
from flywheel.store import Store
from flywheel.turn import TURN, TurnRecord, TurnResult

MOST = 100  # turns that are listed, the newest
SUCCESS = "success in "


@dataclass(frozen=True, slots=True)
class Shift:
    """Success in one shift, of the policy before and after: free-form evidence of the gate's check."""

    name: str
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn. ``result`` is None while it is under way."""

    name: str
    record: TurnRecord | None
    result: TurnResult | None
    gate: GateReport | None = None
    steps: int | None = None
    loss: float | None = None
    problem: str = ""

    @property
    def shifts(self) -> list[Shift]:
        """Where the gate compared success."""
        found = []
        for c in self.gate.checks if self.gate else ():
            before, after = c.evidence.get("current"), c.evidence.get("candidate")
            if c.name.startswith(SUCCESS) and isinstance(before, dict) and isinstance(after, dict):
                found.append(Shift(c.name.removeprefix(SUCCESS), _success(before), _success(after)))
        return found

    def shift(self, name: str) -> Shift | None:
        """Success in one shift."""
        return next((s for s in self.shifts if s.name == name), None)

    @property
    def rollout(self) -> str:
        """The id that its rollout has, if it has one."""
        r = self.result
        return rollout_id(r.candidate_digest, r.gate_digest) if r is not None and r.gate_digest else ""


@dataclass(frozen=True, slots=True)
class Turns:
    """The newest turns, the newest first; ``total`` counts the others too."""

    all: tuple[Turn, ...]
    total: int

    def find(self, name: str) -> Turn | None:
        """The turn of a name."""
        return next((t for t in self.all if t.name == name), None)

    def shifts(self) -> list[str]:
        """The names of shifts in which success was compared."""
        return list(dict.fromkeys(s.name for t in self.all for s in t.shifts))


class TurnLog:
    """Reads turns; one that was closed is not read again."""

    def __init__(self) -> None:
        self._closed: dict[str, Turn] = {}

    def read(self, store: Store) -> Turns:
        """The newest turns as they are in the store."""
        names = sorted((n for n in store.folders("runs/") if TURN.fullmatch(n)), reverse=True)
        found = []
        for name in names[:MOST]:
            turn = self._closed.get(name) or _read(store, name)
            if turn.result is not None and turn.result.ok:
                self._closed[name] = turn
            found.append(turn)
        return Turns(tuple(found), len(names))


def _read(store: Store, name: str) -> Turn:
    def document[M: (TurnRecord, TurnResult)](file: str, kind: type[M]) -> M | None:
        try:
            return store.get_json(f"runs/{name}/{file}", kind)
        except NotFound:
            return None

    try:
        record, result = document("turn.json", TurnRecord), document("result.json", TurnResult)
    except (StoreUnavailable, StoreRefused):
        raise
    except StoreError as e:
        return Turn(name, None, None, problem=str(e))
    gate = read_gate(store, result.gate_digest) if result is not None and result.gate_digest else None
    train = _figures(store, f"runs/{name}/workspace/data/metrics/train.json")
    steps = figure(train, "steps")
    return Turn(name, record, result, gate, None if steps is None else int(steps), figure(train, "loss"))


def _figures(store: Store, key: str) -> dict[str, Any]:
    try:
        found = json.loads(store.get(key))
    except (NotFound, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _success(side: dict[str, Any]) -> dict[str, Any]:
    found = side.get("success")
    return found if isinstance(found, dict) else {}
