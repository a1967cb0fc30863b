"""Rollouts as their logs tell them: decisions, what they were made of, and whether signatures hold."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flywheel import rollout
from flywheel.errors import FlywheelError, StoreUnavailable
from flywheel.page.shown import NOTHING, number, share
from flywheel.release import Publisher, Trust
from flywheel.rollout import Approval, Evidence, Evidences, RolloutState
from flywheel.rollout.documents import Arm, Tail
from flywheel.rollout.evidence import (
    LATE_FLOOR_NS,
    MISSES_FLOOR_PPM,
    TRACKING_FLOOR_RAD,
    read_gate,
    read_inputs,
    sum_up,
)
from flywheel.rollout.rules import assess
from flywheel.rollout.words import read_words, sealed
from flywheel.schema import ROLLOUT_ID, Check, FleetPlan, GateReport, Group, Release
from flywheel.store import Store

MOST = 200  # rollouts that are listed
_VERSION = re.compile(r"\d{8}\.json")
ORDER = ("shadow", "canary", "approval", "wide", "done")


@dataclass(frozen=True, slots=True)
class Standing:
    """One rollout: its decisions so far, first to last. ``signed`` is None where nothing can check it."""

    history: tuple[RolloutState, ...]
    signed: bool | None
    problem: str = ""  # its log does not verify
    name: str = ""

    @property
    def state(self) -> RolloutState:
        """What holds."""
        return self.history[-1]


@dataclass(frozen=True, slots=True)
class Offered:
    """What the signed releases offer, the exceptions, and who is trusted; None where no root is here."""

    releases: dict[Group, Release | None]
    plan: FleetPlan
    trust: Trust | None
    problem: str = ""

    def role(self, digest: str) -> str:
        """What a policy is to the fleet: ``stable``, ``wave``, ``canary``, or nothing."""
        for group in (Group.STABLE, Group.WAVE, Group.CANARY):
            release = self.releases.get(group)
            if release is not None and release.digest == digest:
                return group.value
        return ""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Every rollout that is listed, the newest first."""

    all: tuple[Standing, ...]
    offered: Offered

    @property
    def under_way(self) -> Standing | None:
        """The one that decisions are still made about."""
        return next((s for s in self.all if s.history and not s.state.over), None)

    def find(self, rollout_id: str) -> Standing | None:
        """The one of an id."""
        return next((s for s in self.all if s.name == rollout_id), None)


class Logs:
    """Reads rollouts; a log that did not grow is not read again."""

    def __init__(self, keys: Path | None) -> None:
        self._keys = keys
        self._publisher: Publisher | None = None
        self._known: dict[str, Standing] = {}

    def offered(self, store: Store) -> Offered:
        """What is released. Without the trusted root nothing of it is believed, and so nothing is shown."""
        if self._keys is None or not (self._keys / "root.json").is_file():
            return Offered({}, FleetPlan(), None, "no trusted root.json here, so signatures are not checked")
        if self._publisher is None or self._publisher.store is not store:
            self._publisher = Publisher(store, self._keys)
        try:
            state = self._publisher.load()
            return Offered({g: state.release(g)[0] for g in Group}, state.plan(), state.trust())
        except StoreUnavailable:
            raise
        except FlywheelError as e:
            return Offered({}, FleetPlan(), None, str(e))

    def read(self, store: Store) -> Rollouts:
        """Every rollout as it is in the store."""
        offered = self.offered(store)
        found = []
        for rid in store.folders("rollouts/"):
            if re.fullmatch(ROLLOUT_ID, rid):
                found.append(self._one(store, rid, offered.trust))
        found.sort(key=lambda s: s.history[0].t_unix_ns if s.history else 0, reverse=True)
        return Rollouts(tuple(found[:MOST]), offered)

    def _one(self, store: Store, rid: str, trust: Trust | None) -> Standing:
        listed = (i.key.rsplit("/", 1)[-1] for i in store.list(f"rollouts/{rid}/", nested=False))
        newest = max((int(name[:8]) for name in listed if _VERSION.fullmatch(name)), default=0)
        known = self._known.get(rid)
        if known is None or not known.history or known.state.n != newest:
            try:
                known = Standing(tuple(rollout.history(store, rid)), None, name=rid)
            except StoreUnavailable:
                raise
            except FlywheelError as e:
                known = Standing((), None, str(e), rid)
            self._known[rid] = known
        if not known.history or trust is None:
            return known
        return Standing(known.history, sealed(known.state, trust), name=rid)


class Column(NamedTuple):
    """One figure of both policies, for a table."""

    name: str
    candidate: str
    current: str


@dataclass(frozen=True, slots=True)
class Detail:
    """All that there is of one rollout. ``now`` is by the evidence in the store, decided by nobody yet."""

    standing: Standing
    gate: GateReport | None
    words: tuple[Approval, ...]
    ignored: tuple[str, ...]  # words that do not count, and why
    checks: tuple[Check, ...]  # of the last decision
    evidence: Evidence | None
    now: tuple[Check, ...] = ()
    seen: Evidence | None = None
    columns: list[Column] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Which of ``ORDER`` it stands at, or came as far as."""
        reached = [ORDER.index(s.stage.value) for s in self.standing.history if s.stage.value in ORDER]
        return max(reached, default=0)


def read_detail(
    store: Store, rollouts: Rollouts, rollout_id: str, kept: Evidences, now_unix_ns: int
) -> Detail | None:
    """One rollout with its evidence; None if there is none of that id."""
    standing = rollouts.find(rollout_id)
    if standing is None or not standing.history:
        return None if standing is None else Detail(standing, None, (), (), (), None)
    state, offered = standing.state, rollouts.offered
    gate = read_gate(store, state.gate_digest)
    words: list[Approval] = []
    ignored: list[str] = []
    if offered.trust is not None:
        words, ignored = read_words(store, state, offered.trust)
    decided = next((s for s in reversed(standing.history) if s.checks), state)
    now: tuple[Check, ...] = ()
    seen = None
    stable = offered.releases.get(Group.STABLE)
    if not state.over and offered.trust is not None:
        canary = offered.releases.get(Group.CANARY)
        other = canary.rollout_id if canary is not None and canary.rollout_id != rollout_id else ""
        inputs = read_inputs(store, state, offered.plan, kept)
        seen = sum_up(state, inputs, gate, stable.digest if stable else "", other, now_unix_ns)
        now = assess(state, seen)[1]
        ignored += inputs.ignored
    evidence = seen or state.evidence
    columns = [] if evidence is None else _columns(evidence.candidate, evidence.current)
    return Detail(
        standing, gate, tuple(words), tuple(ignored), decided.checks, state.evidence, now, seen, columns
    )


def _columns(candidate: Arm, current: Arm) -> list[Column]:
    arms = (candidate, current)

    def both(name: str, one: str, other: str) -> Column:
        return Column(name, one, other)

    return [
        both("robots", str(candidate.robots), str(current.robots)),
        both("episodes", str(candidate.episodes), str(current.episodes)),
        both(
            "success",
            share(candidate.successes, candidate.episodes),
            share(current.successes, current.episodes),
        ),
        both("invalid chunks", str(candidate.invalid), str(current.invalid)),
        both("tracking error p99, mrad", *(_tail(a.tracking, TRACKING_FLOOR_RAD, 1e3) for a in arms)),
        both("missed deadlines, ppm", *(_tail(a.misses, MISSES_FLOOR_PPM) for a in arms)),
        both("lateness p99, µs", *(_tail(a.late, LATE_FLOOR_NS, 1e-3) for a in arms)),
    ]


def _tail(tail: Tail, floor: float, scale: float = 1.0) -> str:
    """The geometric mean over batches. A batch below the floor counts as the floor, where differences end to
    matter: what lies there is only known to be no more."""
    if not tail.n:
        return NOTHING
    try:
        mean = math.exp(tail.mean)
    except OverflowError:
        return NOTHING
    return f"≤ {number(floor * scale)}" if mean <= floor * (1 + 1e-9) else number(mean * scale)
