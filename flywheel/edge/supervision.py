"""What a supervisor decides: who is stalled, when to start again, whether a policy may stay. Pure.

Every time is given by the caller, in seconds on one clock. A policy is judged over a window of its latest
outputs, so that one slow inference is no reason to give it back, and many are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from flywheel.config import Section

Seconds = Annotated[float, Field(gt=0.0)]


class SupervisionSettings(Section):
    """How the supervisor treats the processes beside System 1. No safety limit: those are System 1's own."""

    start_s: Seconds = 180.0  # the first start compiles the control law
    beat_s: Seconds = 2.0  # a System whose heartbeat stands still for this long is killed
    # The same for the recorder: the rings must still hold what it has not taken when the next one starts.
    aside_beat_s: Seconds = 5.0
    backoff_first_s: Seconds = 0.5  # pause before a process is started again; doubled each time …
    backoff_max_s: Seconds = 8.0  # … up to this
    settled_s: Seconds = 30.0  # a process that ran for this long begins with the first pause again
    trial_s: Seconds = 30.0  # a new policy is confirmed after this time without a fault
    window: Annotated[int, Field(ge=1, le=10_000)] = 20  # outputs of a policy that count
    latency_budget_ms: Seconds = 100.0  # of one inference …
    late_max: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25  # … and the share of a window that may exceed it
    invalid_max: Annotated[int, Field(ge=0)] = 2  # outputs in a window that may be refused
    crashes_max: Annotated[int, Field(ge=0)] = 2  # crashes within crash_s that a confirmed policy may have
    crash_s: Seconds = 60.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.backoff_max_s < self.backoff_first_s:
            raise ValueError("backoff_max_s must be at least backoff_first_s")
        if self.invalid_max >= self.window:
            raise ValueError("invalid_max must be less than window, or no output is ever too bad")
        return self


@dataclass(frozen=True)
class Backoff:
    """How often a process ended soon after its start, in a row."""

    failures: int = 0

    def ended(self, ran_s: float, settings: SupervisionSettings) -> tuple[Backoff, float]:
        """After one more end: the new state, and how long to wait before the next start."""
        failures = 1 if ran_s >= settings.settled_s else min(self.failures + 1, 64)
        pause = settings.backoff_first_s * 2.0 ** (failures - 1)
        return Backoff(failures), min(pause, settings.backoff_max_s)


class Heartbeat:
    """Notices that a process stands still while its supervisor looks on.

    Time counts only while the supervisor looks: when it was itself stopped, or its machine suspended, the
    gap between two looks says nothing about anybody else.
    """

    LOOK_S = 0.5  # most that one look may count

    def __init__(self, limit_s: float) -> None:
        self._limit = limit_s
        self._beats = -1
        self._still = 0.0
        self._looked: float | None = None

    def stalled(self, beats: int, now_s: float) -> bool:
        """Whether ``beats`` has stood still for the limit."""
        if beats != self._beats:
            self._beats, self._still = beats, 0.0
        elif self._looked is not None:
            self._still += min(max(now_s - self._looked, 0.0), self.LOOK_S)
        self._looked = now_s
        return self._still >= self._limit


class Verdict(StrEnum):
    """What to do with a policy."""

    KEEP = "keep"
    CONFIRM = "confirm"  # its trial is over
    GIVE_BACK = "give back"  # for the previous one


class Conduct:
    """How one policy behaves since it was put in use, on trial or confirmed."""

    def __init__(self, settings: SupervisionSettings, now_s: float, trial: bool) -> None:
        self.trial = trial
        self._settings = settings
        self._since = now_s
        self._recent: deque[tuple[bool, float]] = deque(maxlen=settings.window)  # valid, latency in ms
        self._crashes: deque[float] = deque(maxlen=settings.crashes_max + 1)
        self._outputs = 0

    def output(self, latency_ms: float) -> None:
        """It gave a chunk that was published."""
        self._recent.append((True, latency_ms))
        self._outputs += 1

    def invalid(self) -> None:
        """It gave something that was refused."""
        self._recent.append((False, 0.0))

    def crashed(self, now_s: float) -> None:
        """Its process ended by itself, or had to be killed because it stood still."""
        self._crashes.append(now_s)

    def verdict(self, now_s: float) -> tuple[Verdict, str]:
        """What to do now, and why. A fault on trial counts at once; a confirmed policy gets more patience."""
        s = self._settings
        crashes = sum(now_s - t <= s.crash_s for t in self._crashes)
        allowed = 0 if self.trial else s.crashes_max
        if crashes > allowed:
            times = "on trial" if self.trial else f"{crashes} times within {s.crash_s:g} s"
            return Verdict.GIVE_BACK, f"crashed {times}"
        invalid = sum(not valid for valid, _ in self._recent)
        if invalid > s.invalid_max:
            return Verdict.GIVE_BACK, f"{invalid} of its last {len(self._recent)} outputs were refused"
        late = sum(latency > s.latency_budget_ms for _, latency in self._recent)
        if late > s.late_max * s.window:
            worst = max(latency for _, latency in self._recent)
            return Verdict.GIVE_BACK, (
                f"{late} of its last {len(self._recent)} inferences took longer than "
                f"{s.latency_budget_ms:g} ms (up to {worst:.0f} ms)"
            )
        if self.trial and now_s - self._since >= s.trial_s and self._outputs >= s.window:
            self.trial = False
            return Verdict.CONFIRM, f"{self._outputs} outputs in {now_s - self._since:.0f} s without a fault"
        return Verdict.KEEP, ""
