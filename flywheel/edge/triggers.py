"""What calls for an episode, seen in the rows of System 1, the frames of System 2 and the events.

Detection only: what is recorded then, and for how long, is the recorder's business.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel.config import RecorderSettings
from flywheel.edge.history import Event
from flywheel.edge.link import Records
from flywheel.schema import Limit, Mode, Outcome, TriggerKind

CONFIRM_TICKS = 5  # a tracking error must last; a single sample may be noise (assumption)
HEAL_TICKS = 200  # and be gone for this long before it can trigger again

_TRIGGER_OF = {
    Outcome.TIMEOUT: TriggerKind.TASK_TIMEOUT,
    Outcome.WRONG_OBJECT: TriggerKind.WRONG_OBJECT,
    Outcome.DROPPED: TriggerKind.DROPPED_OBJECT,
    Outcome.STOPPED: TriggerKind.SAFETY_STOP,
}
_OUTCOME_OF = {trigger: outcome for outcome, trigger in _TRIGGER_OF.items()} | {
    TriggerKind.BASELINE: Outcome.SUCCESS
}


class What(Enum):
    """Kinds of happening: an attempt begins, a trigger, a frame with the operator in control."""

    ATTEMPT = "attempt"
    TRIGGER = "trigger"
    OPERATOR = "operator"


@dataclass(frozen=True)
class Happening:
    """Something in time; ``kind`` is a trigger's, ``detail`` what is known of a trigger or an attempt."""

    t_ns: int
    what: What
    kind: TriggerKind | None = None
    detail: dict[str, Any] = field(default_factory=dict)


class Debounce:
    """Rising edges of a noisy flag: true ``confirm`` times in a row raises, false ``heal`` times clears."""

    def __init__(self, confirm: int, heal: int) -> None:
        self._need = (confirm, heal)
        self._raised = False
        self._run = 0  # rows in a row that speak against the present state

    def edges(self, flags: npt.NDArray[np.bool_]) -> list[int]:
        """Indices of the rows at which the flag was confirmed; ``flags`` go on from the last call's."""
        if not self._raised and not self._run and not flags.any():
            return []
        found = []
        starts = np.flatnonzero(np.diff(flags, prepend=~flags[:1]))
        for start, stop in zip(starts, [*starts[1:], len(flags)], strict=True):
            if bool(flags[start]) == self._raised:
                self._run = 0
                continue
            missing = self._need[self._raised] - self._run
            self._run += int(stop - start)
            if self._run >= self._need[self._raised]:
                self._raised = not self._raised
                self._run = 0
                if self._raised:
                    found.append(int(start) + missing - 1)
        return found


class Detector:
    """Looks at everything that is recorded, once, in order. ``malformed`` counts events of no meaning."""

    def __init__(self, settings: RecorderSettings, rng: np.random.Generator) -> None:
        self.malformed = 0
        self._limit = settings.tracking_error_rad
        self._baseline = settings.baseline_fraction
        self._rng = rng
        self._tracking = Debounce(CONFIRM_TICKS, HEAL_TICKS)
        self._stopped = False

    def control(self, rows: Records) -> list[Happening]:
        """Stops and tracking errors, from control rows (``[n]``, n ≥ 1)."""
        found = []
        stopped = rows["mode"] >= Mode.STOP_1
        for i in np.flatnonzero(np.diff(stopped, prepend=self._stopped) & stopped):
            why = {"mode": Mode(int(rows["mode"][i])).name.lower(), "limits": int(rows["limits"][i])}
            found.append(Happening(int(rows["t_ns"][i]), What.TRIGGER, TriggerKind.SAFETY_STOP, why))
        self._stopped = bool(stopped[-1])
        error = np.abs(rows["q"] - rows["q_ref"])
        worst = error.max(axis=1)
        off = (worst > self._limit) & ~stopped
        off |= (rows["limits"] & int(Limit.TRACKING_ERROR)) != 0
        for i in self._tracking.edges(off):
            size = float(worst[i]) if np.isfinite(worst[i]) else None  # JSON has no NaN
            where = {"joint": int(error[i].argmax()), "error_rad": size}
            found.append(Happening(int(rows["t_ns"][i]), What.TRIGGER, TriggerKind.TRACKING_ERROR, where))
        return found

    def frames(self, rows: Records) -> list[Happening]:
        """Each frame in which the operator was in control."""
        return [Happening(int(t), What.OPERATOR) for t in rows["t_ns"][rows["intervention"]]]

    def event(self, event: Event) -> Happening | None:
        """What an event means, if anything: see ``flywheel.edge.recorder``."""
        t_ns, kind, name = event["t_ns"], event["kind"], event["name"]
        if kind == "trigger":
            if name in TriggerKind:
                return Happening(t_ns, What.TRIGGER, TriggerKind(name), detail_of(event))
            self.malformed += 1
        elif kind == "intervention" and name == "on":
            return Happening(t_ns, What.TRIGGER, TriggerKind.INTERVENTION, detail_of(event))
        elif kind == "task" and name == "start":
            return Happening(t_ns, What.ATTEMPT, detail=detail_of(event))
        elif kind == "task" and name == "end" and (outcome := _end_of(event, "policy")) is not None:
            if outcome != Outcome.SUCCESS:
                return Happening(t_ns, What.TRIGGER, _TRIGGER_OF[outcome])
            if self._rng.random() < self._baseline:
                return Happening(t_ns, What.TRIGGER, TriggerKind.BASELINE)
        elif kind == "task" and name == "end" and _end_of(event, "operator") is None:
            self.malformed += 1
        return None


def outcome_by(events: Sequence[Event], by: str) -> Outcome | None:
    """How the last attempt that ``by`` ("policy" or "operator") ended came out; None if none did."""
    ends = (_end_of(e, by) for e in reversed(events) if e["kind"] == "task" and e["name"] == "end")
    return next((o for o in ends if o is not None), None)


def outcome_of(kind: TriggerKind) -> Outcome:
    """The outcome that a trigger amounts to where no event says it: what is not finished was stopped."""
    return _OUTCOME_OF.get(kind, Outcome.STOPPED)


def detail_of(event: Event) -> dict[str, Any]:
    """An event's detail; empty if it is no JSON object."""
    try:
        detail = json.loads(event["detail"] or "{}")
    except ValueError:
        return {}
    return detail if isinstance(detail, dict) else {}


def _end_of(event: Event, by: str) -> Outcome | None:
    detail = detail_of(event)
    outcome = detail.get("outcome")
    if detail.get("by", "policy") == by and isinstance(outcome, str) and outcome in Outcome:
        return Outcome(outcome)
    return None
