"""What every robot last said of itself, and how it did by the policy of the rollout under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flywheel.errors import IntegrityError, NotFound, StoreError, StoreRefused, StoreUnavailable
from flywheel.page.shown import MODES, Mark
from flywheel.rollout import Evidences
from flywheel.rollout.evidence import read_documents
from flywheel.schema import CanaryEvidence, Mode, RobotReport
from flywheel.store import Store

PREFIX = "fleet/robots/"
READERS = 16
TEXT_MAX = 300  # of a text that a robot wrote, as far as a table shows it


@dataclass(frozen=True, slots=True)
class Robot:
    """A report, and when the store received it (UTC seconds by its clock: a robot's own may be wrong)."""

    report: RobotReport
    heard_unix_s: float

    def silent(self, now_unix_s: float, silence_s: float) -> bool:
        """Whether it has not been heard of for so long."""
        return now_unix_s - self.heard_unix_s > silence_s

    @property
    def mode(self) -> Mark:
        """The ladder's rung that it was on."""
        return MODES[self.report.mode]

    @property
    def stopped(self) -> bool:
        """Whether it said that it stands by a stop."""
        return self.report.mode in (Mode.STOP_0, Mode.STOP_1)


@dataclass(frozen=True, slots=True)
class Fleet:
    """Every robot, by name; and the documents that were not understood, and why."""

    robots: tuple[Robot, ...]
    ignored: tuple[str, ...]

    def by_policy(self) -> list[tuple[str, int]]:
        """Bundle digests with how many robots loaded them, the most first."""
        return Counter(r.report.loaded_digest for r in self.robots).most_common()

    def by_mode(self) -> list[tuple[Mark, int]]:
        """Modes with how many robots are in them, in the ladder's order."""
        found = Counter(r.report.mode for r in self.robots)
        return [(MODES[m], found[m]) for m in Mode if found[m]]

    def sites(self) -> list[str]:
        """Their names."""
        return sorted({r.report.site for r in self.robots})

    def find(self, name: str) -> Robot | None:
        """The robot of a name."""
        return next((r for r in self.robots if r.report.robot == name), None)


def read_fleet(store: Store, kept: Evidences) -> Fleet:
    """The fleet as it is in the store; what ``kept`` holds is not read again."""

    def key(r: RobotReport) -> str:
        return f"{PREFIX}{r.robot}.json"

    reports, arrived, ignored = read_documents(store, PREFIX, RobotReport, key, kept)
    return Fleet(tuple(Robot(r, arrived[key(r)] / 1e9) for r in reports), tuple(ignored))


@dataclass(frozen=True, slots=True)
class Tails:
    """A robot's newest batch of attempts in a rollout."""

    batch: CanaryEvidence

    @property
    def tracking_p99_mrad(self) -> float:
        """The p99 of its joint errors, mrad."""
        return self.batch.tracking_p99_rad * 1e3

    @property
    def misses_ppm(self) -> float | None:
        """Its missed deadlines, ppm; None if it ran no tick."""
        b = self.batch
        return 1e6 * b.misses / b.ticks if b.ticks else None


def read_batches(store: Store, rollout_id: str, robot: str, most: int = 1) -> list[Tails]:
    """The newest ``most`` batches that a robot reported to a rollout, the newest first."""
    prefix = f"rollouts/{rollout_id}/evidence/{robot}-"
    keys = [i.key for i in store.list(prefix) if i.key.removeprefix(prefix).split(".")[0].isdigit()]
    found = []
    for key in reversed(keys[-most:]):
        try:
            batch = CanaryEvidence.model_validate_json(store.get(key))
        except (ValidationError, NotFound, IntegrityError):
            continue
        if batch.key == key:
            found.append(Tails(batch))
    return found


def read_tails(store: Store, rollout_id: str, robots: Sequence[str]) -> dict[str, Tails]:
    """The newest batch of each of a page's robots that has any."""

    def one(robot: str) -> list[Tails]:
        try:
            return read_batches(store, rollout_id, robot)
        except (StoreUnavailable, StoreRefused):
            raise
        except StoreError:  # a name that is no key
            return []

    with ThreadPoolExecutor(READERS) as pool:
        return {r: t[0] for r, t in zip(robots, pool.map(one, robots), strict=True) if t}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks of the list of robots; empty texts ask for all."""

    q: str = ""
    site: str = ""
    policy: str = ""
    mode: str = ""
    state: str = ""
    sort: str = "robot"
    down: bool = False


STATES: Mapping[str, str] = {
    "heard": "heard of lately",
    "silent": "silent",
    "stopped": "stopped",
    "trial": "policy on trial",
    "refused": "gave a policy back",
}
_UNKNOWN = float("-inf")
SORTS: Mapping[str, Callable[[Robot], Any]] = {
    "robot": lambda r: r.report.robot,
    "site": lambda r: (r.report.site, r.report.robot),
    "policy": lambda r: (r.report.loaded_digest, r.report.robot),
    "mode": lambda r: (r.report.mode, r.report.robot),
    "heard": lambda r: r.heard_unix_s,
    "success": lambda r: _ratio(r.report.successes, r.report.episodes),
    "late": lambda r: _UNKNOWN if r.report.late_p99_ns is None else r.report.late_p99_ns,
    "misses": lambda r: _UNKNOWN if r.report.misses_ppm is None else r.report.misses_ppm,
    "waiting": lambda r: r.report.spool_pending,
}


def select(robots: Iterable[Robot], wanted: Wanted, is_silent: Callable[[Robot], bool]) -> list[Robot]:
    """The robots that a request asks for, in its order. Pure."""
    needle = wanted.q.casefold()
    in_state: Mapping[str, Callable[[Robot], bool]] = {
        "heard": lambda r: not is_silent(r),
        "silent": is_silent,
        "stopped": lambda r: r.stopped,
        "trial": lambda r: not r.report.confirmed,
        "refused": lambda r: bool(r.report.refused_digest),
    }
    found = [
        r
        for r in robots
        if (not wanted.site or r.report.site == wanted.site)
        and (not wanted.policy or r.report.loaded_digest.startswith(wanted.policy))
        and (not wanted.mode or r.report.mode.name.lower() == wanted.mode)
        and (not wanted.state or in_state[wanted.state](r))
        and (
            not needle
            or needle in r.report.robot.casefold()
            or needle in r.report.site.casefold()
            or r.report.loaded_digest.startswith(needle)
        )
    ]
    return sorted(found, key=SORTS[wanted.sort], reverse=wanted.down)


def troubled(robots: Iterable[Robot], is_silent: Callable[[Robot], bool]) -> list[tuple[Robot, Mark]]:
    """The robots that a person should look at, and why; the worst first."""
    found = []
    for r in robots:
        if r.stopped:
            found.append((0, r, Mark("bad", f"{r.mode.word}: latched until somebody acknowledges it")))
        elif r.report.refused_digest:
            why = r.report.refused_reason[:TEXT_MAX] or "no reason given"
            found.append((1, r, Mark("warn", f"gave {r.report.refused_digest[:12]} back: {why}")))
        elif is_silent(r):
            found.append((2, r, Mark("idle", "silent")))
    return [(r, why) for _, r, why in sorted(found, key=lambda t: (t[0], t[1].report.robot))]


def _ratio(part: int, whole: int) -> float:
    try:
        return part / whole if whole > 0 else _UNKNOWN
    except OverflowError:
        return _UNKNOWN
