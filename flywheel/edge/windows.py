"""Which stretches of time are recorded: windows, opened by triggers, that touch but never overlap. No I/O.

One episode holds one attempt and its correction: its window begins ``pre`` before the trigger, but not before
the attempt; it ends ``post`` after it, while an operator is at work ``tail`` after he lets go, but not after
the next attempt began nor longer than ``longest``. A trigger within a window joins it. What comes after gets
a window that begins where the last one ended, so that nothing is recorded twice and nothing falls between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flywheel.config import RecorderSettings
from flywheel.edge.rules import RULES
from flywheel.edge.triggers import Happening
from flywheel.schema import Trigger, TriggerKind

PATIENCE_NS = 2_000_000_000
MAX_TRIGGERS = 64  # told of one window; more are only counted


@dataclass
class Window:
    """A recording: [start, end), which may still move up to ``ceiling``. ``about`` is the attempt."""

    start: int
    end: int
    ceiling: int
    triggers: list[Trigger]
    about: dict[str, Any] = field(default_factory=dict)

    def lower(self, ceiling: int) -> None:
        """End at ``ceiling`` at the latest."""
        self.ceiling = min(self.ceiling, ceiling)
        self.end = min(self.end, self.ceiling)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        triggers = [t.model_dump(mode="json") for t in self.triggers]
        return {**vars(self), "triggers": triggers}

    @classmethod
    def of(cls, doc: Mapping[str, Any]) -> Window:
        """From ``as_dict``."""
        return cls(**{**doc, "triggers": [Trigger.model_validate(t) for t in doc["triggers"]]})


@dataclass(frozen=True)
class _Attempt:
    start: int
    about: dict[str, Any]


class Windows:
    """The open windows of one robot. Times come in any order within ``settle``, mostly forward.

    ``first_ns`` is the time before which there are no rows; ``suppressed`` counts triggers that opened and
    joined nothing.
    """

    def __init__(self, settings: RecorderSettings) -> None:
        self.first_ns: int | None = None
        self.recorded_to: int | None = None
        self.suppressed = 0
        self.open: list[Window] = []
        self._pre, self._post, self._tail = map(ns, (settings.pre_s, settings.post_s, settings.tail_s))
        self._longest, self._settle = ns(settings.max_episode_s), ns(settings.settle_s)
        self._interval = ns(settings.min_interval_s)
        self._attempts: deque[_Attempt] = deque()
        self._fired: dict[TriggerKind, int] = {}
        self._operator_ns: int | None = None  # the last frame in which the operator was in control

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────

    def begin_attempt(self, t_ns: int, about: dict[str, Any]) -> None:
        """An attempt begins; what is open ends here."""
        self._attempts.append(_Attempt(t_ns, about))
        self._fired.clear()  # what chattered in the last attempt may be the failure of this one
        for window in self.open:
            if window.triggers[0].t_ns <= t_ns:
                window.lower(t_ns)

    def operator(self, t_ns: int) -> None:
        """A frame with the operator in control: it begins an intervention, or holds the window open."""
        last, self._operator_ns = self._operator_ns, t_ns
        going_on = last is not None and t_ns - last <= self._tail
        window = self._around(t_ns)
        if window is None or not going_on:
            # One that outlasts its window goes on in a window of its own.
            detail = {"continued": True} if going_on else {}
            self._fire(t_ns, TriggerKind.INTERVENTION, detail, always=window is None)
            window = self._around(t_ns)
        if window is not None:
            window.end = max(window.end, min(t_ns + self._tail, window.ceiling))

    def fire(self, h: Happening) -> None:
        """A trigger."""
        assert h.kind is not None
        self._fire(h.t_ns, h.kind, h.detail, pre=h.pre_ns, post=h.post_ns)

    def ask(self, start_ns: int, end_ns: int, detail: dict[str, Any]) -> bool:
        """Record [start, end) as far as it is not recorded; False if nothing of it can be."""
        trigger = Trigger(kind=TriggerKind.REQUEST, t_ns=start_ns, detail=detail)
        if (window := self._around(start_ns)) is not None:
            self._join(window, trigger, end_ns)
            return True
        start = max([start_ns, *self._known()])
        over = [w for w in self.open if w.start < end_ns and start < w.end]
        if over:  # what lies before a window is not taken a second time around it
            self._join(over[0], trigger, end_ns)
            end_ns = over[0].start
        end = min(end_ns, start + self._longest)
        if end > start:
            self._add(Window(start, end, end, [trigger], self._attempt_around(start)[0]))
        return bool(over) or end > start

    def due(self, now_ns: int, rows_to: int | None) -> list[Window]:
        """Windows that have passed, and whose rows have come (``rows_to``: up to which time there are any):
        they are no longer open. Rows that do not come are waited for no longer than ``PATIENCE_NS``."""
        found = []
        while self.open:
            over = now_ns - self.open[0].end - self._settle
            if over < 0 or (rows_to is not None and rows_to < self.open[0].end and over < PATIENCE_NS):
                break
            found.append(self.open.pop(0))
            self.recorded_to = max(found[-1].end, self.recorded_to or found[-1].end)
        while len(self._attempts) > 1 and self._attempts[1].start < now_ns - self._pre - self._longest:
            self._attempts.popleft()
        return found

    def done(self, window: Window, end_ns: int) -> None:
        """An open window was recorded up to ``end_ns``, by somebody else."""
        self.open.remove(window)
        self.recorded_to = max(end_ns, self.recorded_to or end_ns)

    def end_all(self, now_ns: int, rows_to: int | None) -> list[Window]:
        """Every open window, cut at ``now_ns`` and after the last row, but not before what triggered it."""
        found, self.open = self.open, []
        for window in found:
            told = max(t.t_ns for t in window.triggers) + 1
            last = now_ns if rows_to is None else min(now_ns, max(rows_to, told))
            window.end = max(min(window.end, last), window.start)
            self.recorded_to = max(window.end, self.recorded_to or window.end)
        return found

    def needed_from(self, now_ns: int) -> int:
        """Rows that are older are of no use any more."""
        return min([now_ns - self._pre - self._settle, *(w.start for w in self.open)])

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _around(self, t_ns: int) -> Window | None:
        return next((w for w in self.open if w.start <= t_ns < w.end), None)

    def _known(self) -> list[int]:
        return [t for t in (self.recorded_to, self.first_ns) if t is not None]

    def _fire(
        self,
        t_ns: int,
        kind: TriggerKind,
        detail: dict[str, Any],
        always: bool = False,
        pre: int | None = None,
        post: int | None = None,
    ) -> None:
        last = self._fired.get(kind)
        if last == t_ns:
            return  # the same, told by two sources
        own = RULES[kind].interval_s
        interval = self._interval if own is None else ns(own)
        if not always and last is not None and t_ns - last < interval:
            self.suppressed += 1
            return
        self._fired[kind] = t_ns
        pre, post = self._pre if pre is None else pre, self._post if post is None else post
        trigger = Trigger(kind=kind, t_ns=t_ns, detail=detail)
        if (window := self._around(t_ns)) is not None:
            if kind != TriggerKind.BASELINE:
                self._join(window, trigger, t_ns + post)
            return
        about, since, following = self._attempt_around(t_ns)
        earlier = [w.end for w in self.open if w.end <= t_ns] + self._known()
        start = max([t_ns - pre, *earlier, *([] if since is None else [since])])
        later = [w.start for w in self.open if w.start > t_ns]
        later += [following] if following is not None else []
        ceiling = min([start + self._longest, *later])
        end = min(t_ns + post, ceiling)
        if end > start:
            self._add(Window(start, end, ceiling, [trigger], about))
        else:
            self.suppressed += 1  # came so late that its whole window is in an episode already

    def _join(self, window: Window, trigger: Trigger, until: int) -> None:
        if len(window.triggers) < MAX_TRIGGERS:
            window.triggers.append(trigger)
        else:
            self.suppressed += 1
        window.end = max(window.end, min(until, window.ceiling))

    def _add(self, window: Window) -> None:
        for w in self.open:
            if w.start < window.start:
                w.lower(window.start)
            else:
                window.lower(w.start)
        self.open.append(window)
        self.open.sort(key=lambda w: w.start)

    def _attempt_around(self, t_ns: int) -> tuple[dict[str, Any], int | None, int | None]:
        """The attempt under way at a time, when it began, and when the next one began."""
        current, following = None, None
        for a in self._attempts:
            if a.start <= t_ns:
                current = a
            elif following is None:
                following = a.start
        return (current.about, current.start, following) if current is not None else ({}, None, following)

    # ── what outlives it ─────────────────────────────────────────────────────────────────────────────

    def state(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "first_ns": self.first_ns,
            "recorded_to": self.recorded_to,
            "suppressed": self.suppressed,
            "open": [w.as_dict() for w in self.open],
            "attempts": [[a.start, a.about] for a in self._attempts],
            "fired": {k.value: t for k, t in self._fired.items()},
            "operator_ns": self._operator_ns,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self.first_ns, self.recorded_to = state["first_ns"], state["recorded_to"]
        self.suppressed, self._operator_ns = state["suppressed"], state["operator_ns"]
        self.open = [Window.of(w) for w in state["open"]]
        self._attempts = deque(_Attempt(t, about) for t, about in state["attempts"])
        self._fired = {TriggerKind(k): t for k, t in state["fired"].items()}


def ns(seconds: float) -> int:
    """Seconds as integer nanoseconds."""
    return round(seconds * 1e9)
