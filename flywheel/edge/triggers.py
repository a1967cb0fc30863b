"""What calls for an episode, seen in the rows of System 1, the frames of System 2 and the events.

Detection only: what is recorded then, and for how long, is the recorder's business. What a detector knows
goes into ``state`` and comes back by ``restore``, so that one that is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flywheel.config import RecorderSettings
from flywheel.edge.history import Event
from flywheel.edge.link import Records
from flywheel.edge.rules import RULES
from flywheel.schema import Limit, Mode, Outcome, TriggerKind

_TRIGGER_OF = {
    Outcome.TIMEOUT: TriggerKind.TASK_TIMEOUT,
    Outcome.WRONG_OBJECT: TriggerKind.WRONG_OBJECT,
    Outcome.DROPPED: TriggerKind.DROPPED_OBJECT,
    Outcome.STOPPED: TriggerKind.SAFETY_STOP,
}
_OUTCOME_OF = {trigger: outcome for outcome, trigger in _TRIGGER_OF.items()} | {
    TriggerKind.BASELINE: Outcome.SUCCESS,
    TriggerKind.OPERATOR_SUCCESS: Outcome.SUCCESS,
    TriggerKind.GRASP_LOST: Outcome.DROPPED,
}
_KEYS = {"success": TriggerKind.OPERATOR_SUCCESS, "failure": TriggerKind.OPERATOR_FAILURE}
_ATTEMPTS_KEPT = 64


class What(Enum):
    """Kinds of happening: an attempt begins, a trigger, a frame with the operator in control."""

    ATTEMPT = "attempt"
    TRIGGER = "trigger"
    OPERATOR = "operator"


@dataclass(frozen=True)
class Happening:
    """Something in time; ``kind`` is a trigger's, ``detail`` what is known of a trigger or an attempt.
    ``pre_ns`` and ``post_ns`` are a trigger's own window where it has one."""

    t_ns: int
    what: What
    kind: TriggerKind | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    pre_ns: int | None = None
    post_ns: int | None = None


class Watch(Protocol):
    """A further condition that is looked for in the same rows (a campaign's)."""

    def control(self, rows: Records) -> list[Happening]:
        """From control rows ``[n]``, n ≥ 1."""

    def event(self, event: Event) -> list[Happening]:
        """From an event."""


class Debounce:
    """Rising edges of a noisy flag: true ``confirm`` times in a row raises, false ``heal`` times clears."""

    def __init__(self, confirm: int, heal: int) -> None:
        self._need = (confirm, heal)
        self.raised = False
        self.run = 0  # rows in a row that speak against the present state

    @classmethod
    def of(cls, kind: TriggerKind) -> Debounce:
        """With the counts of a kind of trigger."""
        return cls(RULES[kind].confirm, RULES[kind].heal)

    def edges(self, flags: npt.NDArray[np.bool_]) -> list[int]:
        """Indices of the rows at which the flag was confirmed; ``flags`` go on from the last call's."""
        return [i for i, raised in self.changes(flags) if raised]

    def changes(self, flags: npt.NDArray[np.bool_]) -> list[tuple[int, bool]]:
        """Indices of the rows at which the flag was confirmed (True) or cleared (False)."""
        if not self.raised and not self.run and not flags.any():
            return []
        found = []
        starts = np.flatnonzero(np.diff(flags, prepend=~flags[:1]))
        for start, stop in zip(starts, [*starts[1:], len(flags)], strict=True):
            if bool(flags[start]) == self.raised:
                self.run = 0
                continue
            missing = self._need[self.raised] - self.run
            self.run += int(stop - start)
            if self.run >= self._need[self.raised]:
                self.raised = not self.raised
                self.run = 0
                found.append((int(start) + missing - 1, self.raised))
        return found

    def reset(self) -> None:
        """Cleared, without an edge."""
        self.raised, self.run = False, 0


class Detector:
    """Looks at everything that is recorded, once, in order. ``malformed`` counts events of no meaning.

    ``lot`` makes the draw of the baseline sample: the same attempt of the same recorder draws the same.
    """

    def __init__(self, settings: RecorderSettings, lot: str = "") -> None:
        self.malformed = 0
        self.watches: list[Watch] = []
        self._limit, self._score = settings.tracking_error_rad, settings.ood_score
        self._baseline, self._lot = settings.baseline_fraction, lot
        self._kinds = frozenset(settings.triggers)
        self._tracking = Debounce.of(TriggerKind.TRACKING_ERROR)
        self._late = Debounce.of(TriggerKind.POLICY_LATE)
        self._invalid = Debounce.of(TriggerKind.POLICY_INVALID)
        self._strange = Debounce.of(TriggerKind.OUT_OF_DISTRIBUTION)
        lost = RULES[TriggerKind.GRASP_LOST]
        self._grasp = Debounce(lost.heal, lost.confirm)  # of the grasp: what is confirmed is that it ended
        self._stopped = False
        self._carried_ns = self._cleared_ns = -1  # last tick that carried on; last that followed or stopped
        self._attempts: list[tuple[int, bool]] = []  # when one began (True) or was ended by the policy
        self._judged: list[tuple[int, str]] = []  # chunks that System 2 refused in this poll, and why

    def control(self, rows: Records) -> list[Happening]:
        """Stops, tracking errors, lost grasps and missing chunks, from control rows (``[n]``, n ≥ 1)."""
        found = []
        t = rows["t_ns"]
        stopped = rows["mode"] >= Mode.STOP_1
        for i in np.flatnonzero(np.diff(stopped, prepend=self._stopped) & stopped):
            why = {"mode": Mode(int(rows["mode"][i])).name.lower(), "limits": int(rows["limits"][i])}
            found.append(self._happening(t[i], TriggerKind.SAFETY_STOP, why))
        self._stopped = bool(stopped[-1])
        error = np.abs(rows["q"] - rows["q_ref"])
        worst = error.max(axis=1)
        off = (worst > self._limit) & ~stopped
        off |= (rows["limits"] & int(Limit.TRACKING_ERROR)) != 0
        for i in self._tracking.edges(off):
            size = float(worst[i]) if np.isfinite(worst[i]) else None  # JSON has no NaN
            where = {"joint": int(error[i].argmax()), "error_rad": size}
            found.append(self._happening(t[i], TriggerKind.TRACKING_ERROR, where))
        without = self._out_of_chunks(rows) & self._working(t)
        for i in self._late.edges(without):
            why = {
                "mode": Mode(int(rows["mode"][i])).name.lower(),
                "chunk_age_ns": int(rows["chunk_age_ns"][i]),
            }
            found.append(self._happening(t[i], TriggerKind.POLICY_LATE, why))
        found += self._grasps(rows)
        for watch in self.watches:
            found += watch.control(rows)
        return [h for h in found if h.kind in self._kinds]

    def frames(self, rows: Records) -> list[Happening]:
        """Each frame in which the operator was in control."""
        self._judged += [(int(t), "") for t in rows["t_ns"]]
        return [Happening(int(t), What.OPERATOR) for t in rows["t_ns"][rows["intervention"]]]

    def verdicts(self) -> list[Happening]:
        """Refused chunks among those made since the last call; frames count against them."""
        judged, self._judged = sorted(self._judged, key=lambda j: j[0]), []
        flags = np.array([bool(why) for _, why in judged], bool)
        found = [
            self._happening(judged[i][0], TriggerKind.POLICY_INVALID, {"reason": judged[i][1]})
            for i in (self._invalid.edges(flags) if len(flags) else [])
        ]
        return [h for h in found if h.kind in self._kinds]

    def event(self, event: Event) -> list[Happening]:
        """What an event means, if anything: see ``flywheel.edge.recorder``."""
        found = [h for w in self.watches for h in w.event(event)]
        if (one := self._event(event)) is not None:
            found.append(one)
        return [h for h in found if h.kind is None or h.kind in self._kinds]

    def _event(self, event: Event) -> Happening | None:
        t_ns, kind, name = event["t_ns"], event["kind"], event["name"]
        match kind, name:
            case "trigger", _:
                if name in TriggerKind:
                    return self._happening(t_ns, TriggerKind(name), detail_of(event))
                self.malformed += 1
            case "intervention", "on":
                return self._happening(t_ns, TriggerKind.INTERVENTION, detail_of(event))
            case "operator", ("success" | "failure"):
                return self._happening(t_ns, _KEYS[name], detail_of(event))
            case "plant", _:
                return self._happening(t_ns, TriggerKind.PLANT_SIGNAL, {**detail_of(event), "name": name})
            case "policy", "rejected":
                self._judged.append((t_ns, str(detail_of(event).get("reason", "")) or "no reason given"))
            case "policy", "ood_score":
                score = detail_of(event).get("score")
                if not isinstance(score, int | float) or isinstance(score, bool):
                    self.malformed += 1
                elif self._strange.edges(np.array([not score <= self._score])):
                    return self._happening(t_ns, TriggerKind.OUT_OF_DISTRIBUTION, {"score": score})
            case "task", "start":
                self._note_attempt(t_ns, True)
                return Happening(t_ns, What.ATTEMPT, detail=detail_of(event))
            case "task", "end":
                return self._end(event)
            case _:
                pass
        return None

    def _end(self, event: Event) -> Happening | None:
        outcome = _end_of(event, "policy")
        if outcome is None:
            self.malformed += _end_of(event, "operator") is None
            return None
        self._note_attempt(event["t_ns"], False)
        if outcome != Outcome.SUCCESS:
            return self._happening(event["t_ns"], _TRIGGER_OF[outcome], {})
        if draw(f"{self._lot}/{event['t_ns']}") < self._baseline:
            return self._happening(event["t_ns"], TriggerKind.BASELINE, {})
        return None

    def _grasps(self, rows: Records) -> list[Happening]:
        """Grasps that ended while the tool was told to hold on."""
        found, told = [], rows["tool_cmd"] > 0.5
        if not told.any():
            self._grasp.reset()
            return []
        held = rows["held"] != 0
        starts = np.flatnonzero(np.diff(told, prepend=~told[:1]))
        for start, stop in zip(starts, [*starts[1:], len(told)], strict=True):
            if not told[start]:
                self._grasp.reset()  # let go on purpose
                continue
            for i, raised in self._grasp.changes(held[start:stop]):
                if not raised:
                    found.append(self._happening(rows["t_ns"][start + i], TriggerKind.GRASP_LOST, {}))
        return found

    def _note_attempt(self, t_ns: int, begins: bool) -> None:
        self._attempts = sorted([*self._attempts, (t_ns, begins)])[-_ATTEMPTS_KEPT:]

    def _out_of_chunks(self, rows: Records) -> npt.NDArray[np.bool_]:
        """Where System 1 ran out of chunks in mid-motion: it had to carry on, and has not followed since.

        A robot that waits for its first chunks, or was told to come to rest, is not let down by its policy.
        """
        t, mode = rows["t_ns"], rows["mode"]
        carried = np.where(mode == Mode.CARRY_ON, t, -1)
        cleared = np.where((mode == Mode.FOLLOW) | (mode >= Mode.STOP_1), t, -1)
        carried = np.maximum.accumulate(np.maximum(carried, self._carried_ns))
        cleared = np.maximum.accumulate(np.maximum(cleared, self._cleared_ns))
        self._carried_ns, self._cleared_ns = int(carried[-1]), int(cleared[-1])
        times = np.array([a[0] for a in self._attempts], np.int64)
        began = np.append(-1, times)[np.searchsorted(times, t, side="right")]
        return np.asarray(carried > np.maximum(cleared, began))

    def _working(self, t: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether an attempt was under way at these times; always, on a robot that does not tell of any."""
        if not self._attempts:
            return np.ones(len(t), bool)
        times = [a[0] for a in self._attempts]
        first, last = bisect_right(times, int(t[0])), bisect_right(times, int(t[-1]))
        if first == last:
            return np.full(len(t), first > 0 and self._attempts[first - 1][1])
        states = np.array([False, *(a[1] for a in self._attempts)])
        return np.asarray(states[np.searchsorted(np.array(times), t, side="right")])

    @staticmethod
    def _happening(t_ns: Any, kind: TriggerKind, detail: dict[str, Any]) -> Happening:
        return Happening(int(t_ns), What.TRIGGER, kind, detail)

    # ── what outlives it ─────────────────────────────────────────────────────────────────────────────

    @property
    def _debounces(self) -> dict[str, Debounce]:
        return {
            "tracking": self._tracking,
            "late": self._late,
            "invalid": self._invalid,
            "strange": self._strange,
            "grasp": self._grasp,
        }

    def state(self) -> dict[str, Any]:
        """Everything that it has to know of what it has seen, for JSON."""
        return {
            "debounce": {n: [d.raised, d.run] for n, d in self._debounces.items()},
            "stopped": self._stopped,
            "carried": [self._carried_ns, self._cleared_ns],
            "attempts": self._attempts,
            "malformed": self.malformed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        for name, d in self._debounces.items():
            d.raised, d.run = state["debounce"][name]
        self._stopped, self.malformed = state["stopped"], state["malformed"]
        self._carried_ns, self._cleared_ns = state["carried"]
        self._attempts = [(t, begins) for t, begins in state["attempts"]]


def draw(lot: str) -> float:
    """A number in [0, 1) that follows from a text: evenly spread, and the same each time."""
    return int.from_bytes(hashlib.sha256(lot.encode()).digest()[:7]) / (1 << 56)


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
