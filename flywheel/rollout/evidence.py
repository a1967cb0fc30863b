"""What the robots reported, read from the store and summed up.

A document that is not understood, that lies under another name than its own, or that speaks of another
policy counts for nothing, and is listed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

from pydantic import BaseModel, ValidationError

from flywheel import stats
from flywheel.errors import IntegrityError, NotFound, StageError
from flywheel.rollout.documents import (
    Arm,
    Compared,
    Evidence,
    Heard,
    Inputs,
    RolloutState,
    Tail,
)
from flywheel.schema import (
    EVERYONE,
    CanaryEvidence,
    FleetPlan,
    GateReport,
    RobotReport,
    RolloutStage,
    ShadowReport,
    cohort_draw,
    sha256_bytes,
)
from flywheel.store import ObjectInfo, Store

READERS = 8
# Below these, differences do not matter, so they neither speak for nor against a policy (assumptions, but
# for the misses: a stock kernel under load was measured at 200 to 1450 ppm).
TRACKING_FLOOR_RAD = 0.005
MISSES_FLOOR_PPM = 2000.0
LATE_FLOOR_NS = 1e6


class Evidences:
    """Documents kept from one look of a process to the next: a look at 10,000 robots reads what is new.

    A document is known by when the store received it. A store's times may be whole seconds, in which a key
    may be written twice: what was received less than ``SETTLED_S`` before it was read is read again.
    """

    SETTLED_S = 5.0

    def __init__(self) -> None:
        self._known: dict[str, tuple[datetime, datetime, BaseModel]] = {}

    def get[M: BaseModel](self, info: ObjectInfo, kind: type[M]) -> M | None:
        """What is kept of an object, if it is still that."""
        received, newest, found = self._known.get(info.key, (None, None, None))
        if received != info.modified or newest is None or not isinstance(found, kind):
            return None
        return found if newest - info.modified > timedelta(seconds=self.SETTLED_S) else None

    def keep(self, info: ObjectInfo, newest: datetime, found: BaseModel) -> None:
        """Keep what was read; ``newest`` is the store's time then, as far as its listing tells."""
        self._known[info.key] = (info.modified, newest, found)


def read_documents[M: BaseModel](
    store: Store,
    prefix: str,
    kind: type[M],
    key_of: Callable[[M], str],
    kept: Evidences | None = None,
) -> tuple[list[M], dict[str, int], list[str]]:
    """Every document under a prefix, in key order; by key when it reached the store (UTC ns, by the store's
    clock); and what was ignored and why. ``kept`` spares reading what was read before."""

    def read(info: ObjectInfo) -> M | str | None:
        if kept is not None and (known := kept.get(info, kind)) is not None:
            return known
        key = info.key
        try:
            found = kind.model_validate_json(store.get(key))
        except NotFound:
            return None  # removed since it was listed
        except (ValidationError, IntegrityError) as e:
            why = e.errors()[0]["msg"] if isinstance(e, ValidationError) else "damaged"
            return f"{key}: {why}"
        if key_of(found) != key:
            return f"{key}: says that it is {key_of(found)}"
        if kept is not None:
            kept.keep(info, newest, found)
        return found

    listed = list(store.list(prefix))
    newest = max((i.modified for i in listed), default=datetime.min)
    arrived = {i.key: round(i.modified.timestamp() * 1e9) for i in listed}
    new = [i for i in listed if kept is None or kept.get(i, kind) is None]
    with ThreadPoolExecutor(READERS) as pool:
        fresh = dict(zip((i.key for i in new), pool.map(read, new), strict=True))
    results = [fresh[i.key] if i.key in fresh else read(i) for i in listed]
    ignored = [r for r in results if isinstance(r, str)]
    return [r for r in results if isinstance(r, kind)], arrived, ignored


def read_robots(store: Store) -> tuple[list[RobotReport], list[str]]:
    """What every robot last said of itself. A retired one counts as silent until its report is deleted."""
    robots, _, ignored = read_documents(store, "fleet/robots/", RobotReport, _report_key)
    return robots, ignored


def fresh_robots(store: Store, silence_s: float, now_unix_ns: int) -> list[RobotReport]:
    """The robots that were heard of lately, by the store's clock: a robot's own may be wrong."""
    robots, arrived, _ = read_documents(store, "fleet/robots/", RobotReport, _report_key)
    return [r for r in robots if arrived[_report_key(r)] >= now_unix_ns - silence_s * 1e9]


def read_inputs(
    store: Store, state: RolloutState, plan: FleetPlan | None = None, kept: Evidences | None = None
) -> Inputs:
    """Every document that bears on a rollout."""
    robots, arrived, bad_robots = read_documents(store, "fleet/robots/", RobotReport, _report_key, kept)
    shadow, _, bad_shadow = read_documents(store, f"{state.prefix}/shadow/", ShadowReport, lambda d: d.key)
    batches, _, bad_batches = read_documents(
        store,
        f"{state.prefix}/evidence/",
        CanaryEvidence,
        lambda d: d.key,
        kept,
    )
    return Inputs(
        robots=tuple(robots),
        heard={r.robot: arrived[_report_key(r)] for r in robots},
        plan=plan or FleetPlan(),
        shadow=tuple(shadow),
        batches=tuple(batches),
        ignored=tuple(sorted((*bad_robots, *bad_shadow, *bad_batches))),
    )


def _report_key(report: RobotReport) -> str:
    return f"fleet/robots/{report.robot}.json"


def read_gate(store: Store, gate_digest: str) -> GateReport | None:
    """The gate report of a digest; None if it is gone, damaged or another one."""
    try:
        return GateReport.model_validate_json(store.get(f"gates/{gate_digest}.json", gate_digest))
    except (NotFound, IntegrityError, ValidationError):
        return None


def sum_up(
    state: RolloutState,
    inputs: Inputs,
    gate: GateReport | None,
    stable_digest: str,
    superseded_by: str,
    now_unix_ns: int,
) -> Evidence:
    """The evidence that a decision is made of. Pure."""
    following = [
        r for r in inputs.robots if not inputs.plan.excepts(r.robot, r.site, now_unix_ns)
    ]  # pins and hold-backs: they say nothing about this candidate
    cohort = {r.robot for r in following if admits(state, state.cohort_below, r)}
    offered = following if wide_to_all(state) else [r for r in following if admits(state, state.below, r)]
    candidate, current = state.bundle_digest, state.previous.digest
    wide = state.stage is RolloutStage.WIDE
    objection = "it is gone" if gate is None else gate.objection(candidate, stable_digest) or ""
    return Evidence(
        gate_digest=sha256_bytes(gate.to_bytes()) if gate is not None else "",
        gate_objection=objection,
        superseded_by=superseded_by,
        cohort=_heard(state, (r for r in following if r.robot in cohort), inputs.heard, now_unix_ns),
        fleet=_heard(state, offered, inputs.heard, now_unix_ns),
        shadow=_compared([s for s in inputs.shadow if s.robot in cohort and s.digest == candidate]),
        candidate=_arm([b for b in inputs.batches if b.digest == candidate and (wide or b.robot in cohort)]),
        current=_arm([b for b in inputs.batches if b.digest == current]),
        site_below=site_limits(state.rollout_id, following, state.settings.site_cap),
        inputs_sha256=sha256_bytes(inputs.to_bytes()),
    )


def cohort_limit(rollout_id: str, robots: Iterable[str], fraction: float) -> int:
    """The bound on draws that lets the given share of robots in, rounded up, and leaves at least one out.

    Raises ``StageError`` if there is no robot.
    """
    draws = sorted(cohort_draw(rollout_id, r) for r in set(robots))
    if not draws:
        raise StageError(
            "no robot has reported (fleet/robots/): a rollout needs a cohort; start robots first"
        )
    size = max(1, min(math.ceil(fraction * len(draws) - 1e-9), max(1, len(draws) - 1)))
    return draws[size - 1] + 1


def site_limits(rollout_id: str, robots: Iterable[RobotReport], cap: int) -> dict[str, int]:
    """By site, the bound on draws that lets ``cap`` of its robots in, where it has more than that."""
    draws = defaultdict[str, list[int]](list)
    for r in robots:
        draws[r.site].append(cohort_draw(rollout_id, r.robot))
    return {s: sorted(d)[cap] for s, d in sorted(draws.items()) if cap and len(d) > cap}


def admits(state: RolloutState, below: int, report: RobotReport) -> bool:
    """Whether a robot is of those below a bound, its site's cap considered."""
    bound = min(below, state.site_below.get(report.site, EVERYONE))
    return cohort_draw(state.rollout_id, report.robot) < bound


def wide_to_all(state: RolloutState) -> bool:
    """Whether it is on offer to robots whatever their draw."""
    return state.below == EVERYONE and (state.last_wave or state.stage is RolloutStage.DONE)


def _heard(
    state: RolloutState, robots: Iterable[RobotReport], arrived: Mapping[str, int], now_unix_ns: int
) -> Heard:
    every = list(robots)
    oldest = now_unix_ns - round(state.settings.silence_s * 1e9)
    fresh = [r for r in every if arrived.get(r.robot, r.t_unix_ns) >= oldest]
    candidate, current = state.bundle_digest, state.previous.digest
    return Heard(
        known=len(every),
        fresh=len(fresh),
        loaded=sum(r.loaded_digest == candidate and r.confirmed for r in fresh),
        foreign=sum(bool(r.loaded_digest) and r.loaded_digest not in (candidate, current) for r in fresh),
        refused=sum(r.refused_digest == candidate and r.loaded_digest != candidate for r in every),
    )


def _compared(reports: Sequence[ShadowReport]) -> Compared:
    chunks = sum(r.chunks for r in reports)
    square = sum(r.chunks * r.rms_difference**2 for r in reports)
    return Compared(
        robots=sum(r.chunks > 0 for r in reports),
        episodes=sum(r.episodes for r in reports),
        chunks=chunks,
        invalid=sum(r.invalid for r in reports),
        rms_difference=math.sqrt(square / chunks) if chunks else 0.0,
        infer_p99_ns=max((r.infer_p99_ns for r in reports), default=0),
    )


def _arm(batches: Sequence[CanaryEvidence]) -> Arm:
    ran = [b for b in batches if b.ticks]
    return Arm(
        robots=len({b.robot for b in batches}),
        episodes=sum(b.episodes for b in batches),
        successes=sum(b.successes for b in batches),
        invalid=sum(b.invalid for b in batches),
        tracking=_tail((b.tracking_p99_rad for b in ran), TRACKING_FLOOR_RAD),
        misses=_tail((1e6 * b.misses / b.ticks for b in ran), MISSES_FLOOR_PPM),
        late=_tail((b.late_p99_ns for b in ran), LATE_FLOOR_NS),
    )


def _tail(values: Iterator[float], floor: float) -> Tail:
    m = stats.log_moments(list(values), floor)
    return Tail(n=m.n, mean=m.mean, var=m.var)
