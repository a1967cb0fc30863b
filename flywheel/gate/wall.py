"""Checks of the gate on the wall clock: the real edge processes, current and candidate in turns.

A shared machine's own noise is larger than most differences between policies, so nothing here is an
absolute promise: each figure is a ratio of runs that lay next to each other, above a floor below which a
difference does not matter, with Student's interval over the pairs. Spread is p90 - p10 of a run: a policy
that is now fast, now slow has the same middle as a steady one. A run is one observation, whatever its rows.

A candidate passes only if every figure does, so each is asked at the plain level. It is rolled back if any
figure is proven worse, so there the level is shared by all of them (Holm), and by the looks (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from flywheel.config import GateSettings
from flywheel.gate.task import hold
from flywheel.schema import Check, Verdict
from flywheel.stats import holm, paired_ratio, paired_ratio_p

if TYPE_CHECKING:
    from flywheel.edge.runtime import WallResult

RunWall = Callable[[Path, str, float, int], "WallResult | None"]  # bundle, shift, seconds, seed
LEAST_TICKS = 0.5  # of those that the time allowed: with fewer, a run says nothing
MOST_UNREAD = 0.01  # of the rows that the supervisor was too slow to read
FAULTS = "wall: faults"


class Bar(NamedTuple):
    """One figure of a run: where it comes from, what does not matter, how much worse it may be."""

    name: str
    unit: str
    read: Callable[[WallResult], float | None]
    floor: float
    ratio: float

    @property
    def check(self) -> str:
        return f"wall: {self.name}"


class Runs(NamedTuple):
    """Runs of both policies, in pairs: same seed, next to each other in time."""

    current: tuple[WallResult, ...]
    candidate: tuple[WallResult, ...]


# Floors and ratios are assumptions about what a robot of this kind notices; they lie here and not in
# params.yaml because an experiment must not be able to lower the bar that it is judged by.
BARS: tuple[Bar, ...] = (
    Bar("tracking rms", "rad", lambda r: r.tracking_rms_rad, 0.002, 1.2),
    Bar("tracking p99", "rad", lambda r: r.tracking_p99_rad, 0.005, 1.2),
    Bar("inference p50", "ms", lambda r: r.infer.p50 / 1e6 if r.infer.n else None, 5.0, 1.5),
    Bar("inference p99", "ms", lambda r: r.infer.p99 / 1e6 if r.infer.n else None, 25.0, 1.5),
    Bar("inference spread", "ms", lambda r: r.infer.spread / 1e6 if r.infer.n > 1 else None, 10.0, 1.5),
    Bar("chunk age p99", "ms", lambda r: r.chunk_age.p99 / 1e6 if r.chunk_age.n else None, 150.0, 1.5),
    Bar("lateness p99", "us", lambda r: r.late.p99 / 1e3 if r.late.n else None, 500.0, 2.0),
    Bar("lateness spread", "us", lambda r: r.late.spread / 1e3 if r.late.n > 1 else None, 200.0, 2.0),
    Bar("compute p99", "us", lambda r: r.compute.p99 / 1e3 if r.compute.n else None, 250.0, 2.0),
    Bar("misses", "ppm", lambda r: r.misses_ppm, 10_000.0, 2.0),
)
CHECKS = (FAULTS, *(b.check for b in BARS))


def real_run(bundle: Path, shift: str, seconds: float, seed: int, parameters: str = "") -> WallResult:
    """System 1, System 2 and the twin as processes, for ``seconds``; ``parameters``: a file of the twin's."""
    from flywheel.edge.runtime import run_wall

    return run_wall(bundle, shift, seconds, seed, parameters=parameters)


def checks(runs: Runs, digests: tuple[str, str], settings: GateSettings) -> list[Check]:
    """One check per figure; all hold where a run is missing, too short or of another bundle."""
    if problem := _unusable(runs, digests, settings):
        return [hold(name, problem) for name in CHECKS]
    alpha = (1 - settings.confidence) / settings.wall_looks
    compared = [_compare(bar, runs, alpha, settings) for bar in BARS]
    adjusted = iter(holm([p for _, p in compared if p is not None]))
    return [_faults(runs), *(c if p is None else _judged(c, next(adjusted), alpha) for c, p in compared)]


def _unusable(runs: Runs, digests: tuple[str, str], settings: GateSettings) -> str:
    """Why these runs are no evidence; "" if they are."""
    if len(runs.current) != len(runs.candidate) or len(runs.current) < 2:
        return f"{len(runs.current)} runs of the current policy, {len(runs.candidate)} of the candidate"
    for digest, side in zip(digests, runs, strict=True):
        for r in side:
            if r.digest != digest:
                return f"stale: a run used bundle {r.digest[:12]}, not {digest[:12]}"
            if r.ticks < LEAST_TICKS * settings.wall_s * 1000:
                return f"a run of {settings.wall_s:g} s has only {r.ticks} ticks"
            if r.rows_missed > MOST_UNREAD * r.ticks:
                return f"{r.rows_missed} rows of a run were not read, of {r.ticks}: the machine is too busy"
    return ""


def _faults(runs: Runs) -> Check:
    """Chunks that were refused, and ends of System 2, while the candidate ran.

    A refused chunk is the policy's doing; a process that ended may be the machine's.
    """
    refused, restarts = sum(r.rejected for r in runs.candidate), sum(r.restarts for r in runs.candidate)
    evidence: dict[str, Any] = {
        "refused_chunks": refused,
        "restarts": restarts,
        "current_refused_chunks": sum(r.rejected for r in runs.current),
        "current_restarts": sum(r.restarts for r in runs.current),
        "chunks": sum(r.chunks for r in runs.candidate),
        "privileges": runs.candidate[-1].privileges,
        "load": list(runs.candidate[-1].load),
    }
    return Check(
        name=FAULTS,
        verdict=Verdict.ROLL_BACK if refused else Verdict.HOLD if restarts else Verdict.PROMOTE,
        value=float(refused + restarts),
        bar="no chunk refused and no end of System 2 while the candidate ran",
        n=len(runs.candidate),
        evidence=evidence,
    )


def _judged(check: Check, adjusted_p: float, alpha: float) -> Check:
    """With what Holm makes of its p-value of "not worse than the bar"."""
    evidence = check.evidence | {"adjusted_p": adjusted_p}
    if check.verdict is not Verdict.PROMOTE and adjusted_p <= alpha:
        return check.model_copy(update={"verdict": Verdict.ROLL_BACK, "evidence": evidence})
    return check.model_copy(update={"evidence": evidence})


def _compare(bar: Bar, runs: Runs, alpha: float, settings: GateSettings) -> tuple[Check, float | None]:
    """Whether a figure passes, and the p-value of "not worse than the bar"; None without evidence."""
    text = f"upper limit of the ratio at most {bar.ratio:g}, from {bar.floor:g} {bar.unit}"
    most = settings.max_tracking_rms_rad if bar.name == "tracking rms" else math.inf
    if most < math.inf:
        text += f", and median at most {most:g} {bar.unit}"
    a, b = _values(bar, runs.current), _values(bar, runs.candidate)
    if missing := sum(x is None for x in (*a, *b)):
        return hold(bar.check, f"{missing} of {2 * len(a)} runs have no finite {bar.name}", text), None
    was, now = [x for x in a if x is not None], [x for x in b if x is not None]
    r = paired_ratio(was, now, bar.floor, 1 - 2 * alpha)
    passes = r.high <= bar.ratio and median(now) <= most
    verdict = Verdict.PROMOTE if passes else Verdict.HOLD
    check = Check(
        name=bar.check,
        verdict=verdict,
        value=r.mean,
        low=r.low,
        high=r.high,
        bar=text,
        n=r.n,
        evidence={
            "unit": bar.unit,
            "current_runs": was,
            "candidate_runs": now,
            "current_median": median(was),
            "candidate_median": median(now),
            "threshold": bar.ratio,
            "scale": "ratio",
        },
    )
    return check, paired_ratio_p(was, now, bar.floor, bar.ratio)


def _values(bar: Bar, side: tuple[WallResult, ...]) -> list[float | None]:
    """The figure of each run; None where it is missing, negative or not finite."""
    out: list[float | None] = []
    for r in side:
        x = bar.read(r)
        out.append(float(x) if x is not None and math.isfinite(x) and x >= 0 else None)
    return out
