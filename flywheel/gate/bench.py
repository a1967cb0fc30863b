"""``flywheel bench stats``: what the gate's statistics do, by simulation with known truth.

Levels under peeking after every pair, pairs used against plans of fixed size, and the gate's own checks over
made-up policies that are better, equal, or worse in one respect. Everything is seeded. The figures are shares
of simulated gates: the checks are real, what policies are like is assumed (see ``Policies``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel import stats
from flywheel.config import GateSettings
from flywheel.edge.bench import machine
from flywheel.edge.runtime import Quantiles, WallResult
from flywheel.evaluate import Attempted, Job, Scenario
from flywheel.gate import decide, required_checks
from flywheel.gate.judge import Judge
from flywheel.gate.task import LAB
from flywheel.schema import Check, Outcome, Verdict

FloatArray = NDArray[np.float64]
ALPHA = 0.05
PAIRS = 200  # looked at one by one
BLOCK = 500  # series at a time, for memory
CURRENT, CANDIDATE = Path("current"), Path("candidate")
DIGESTS = ("a" * 64, "b" * 64)
SCENARIOS = [Scenario("factory", s) for s in range(20)]
NON_INFERIOR = GateSettings(episodes=200, min_lift=-0.05)  # for candidates that need not be better
PUBLISHED = (2995, 4742, 6294, 7752)  # trials for 99.9 % at 95 % with 0, 1, 2, 3 failures


@dataclass(frozen=True)
class Policies:
    """What is true of a pair of policies; the candidate against the current one."""

    factory: tuple[float, float] = (0.90, 0.90)  # success
    lab: tuple[float, float] = (0.97, 0.97)
    agreement: float = 0.97  # share of scenes whose difficulty decides for both alike
    tracking: float = 1.0  # factor on every attempt's p99
    tracking_spread: float = 1.0  # factor on the logarithms' spread over scenes, at the same median
    inference: float = 1.0  # factor on the median
    latency_spread: float = 1.0  # factor on a run's spread of inference times, at the same median


def bench(full: bool = False) -> dict[str, Any]:
    """The document of ``flywheel bench stats --json``; under a minute, or some minutes with ``full``."""
    before = os.getloadavg()
    figures: dict[str, float] = {}
    bars: dict[str, dict[str, Any]] = {}

    def bar(name: str, value: float, op: str, limit: float) -> None:
        figures[name] = value
        ok = {"<=": value <= limit, ">=": value >= limit, "==": value == limit}[op]
        bars[name] = {"value": value, "op": op, "bar": limit, "ok": ok}

    _levels(20_000 if full else 4_000, figures, bar)
    _sizes(20_000 if full else 4_000, figures, bar)
    _spread(2_000 if full else 300, bar)
    _gates(500 if full else 24, figures, bar)
    for failures, trials in enumerate(PUBLISHED):
        found = stats.trials_for_reliability(0.999, 0.95, failures)
        bar(f"trials_for_99.9_with_{failures}_failures", float(found), "==", float(trials))
    return {
        "bench": "stats",
        "machine": machine(),
        "load": {"before": before, "after": os.getloadavg(), "named": "simulation on one core"},
        "figures": figures,
        "bars": bars,
    }


Bar = Callable[[str, float, str, float], None]


# ── levels and sizes ───────────────────────────────────────────────────────────────────────────────


def _ternary(rng: np.random.Generator, n: int, pairs: int, p_gained: float, p_lost: float) -> FloatArray:
    u = rng.random((n, pairs))
    return np.where(u < p_gained, 1.0, np.where(u < p_gained + p_lost, -1.0, 0.0))


def _first(series: FloatArray, null: float) -> NDArray[np.int64]:
    """Number of the pair at which each series ``[n, pairs]`` first refuses ``null``; 0 if none does."""
    found = []
    for i in range(0, len(series), BLOCK):
        hit = stats.log_capital(series[i : i + BLOCK], null) >= math.log(1 / ALPHA)
        found.append(np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0))
    return np.concatenate(found)


def _levels(n: int, figures: dict[str, float], bar: Bar) -> None:
    """False promotions on the border of the null, looking after every pair up to ``PAIRS``."""
    rng = np.random.default_rng(1)
    worst = 0.0
    borders = {
        "lab_rare": (0.005, 0.055, -0.05),
        "lab_frequent": (0.10, 0.15, -0.05),
        "factory_rare": (0.05, 0.05, 0.0),
        "factory_frequent": (0.45, 0.45, 0.0),
    }
    for name, (gained, lost, null) in borders.items():
        series = _ternary(rng, n, PAIRS, gained, lost)
        error = float((_first(series, null) > 0).mean())
        figures[f"type_i_peeking_{name}"] = error
        figures[f"type_i_peeking_{name}_fixed_test"] = _peeked_fixed(series[: n // 4], null)
        worst = max(worst, error)
    # Task progress: many small steps, skewed, of mean exactly -5 points.
    steps = rng.beta(0.3, 0.7, (n, PAIRS)) - rng.beta(0.35, 0.65, (n, PAIRS))
    error = float((_first(steps, -0.05) > 0).mean())
    figures["type_i_peeking_progress"] = error
    # Pairs that depend on those before: after a gained one, one is lost more often, the mean stays 0.
    u = rng.random((n, PAIRS))
    series = np.zeros((n, PAIRS))
    for t in range(PAIRS):
        share = np.where(series[:, t - 1] > 0, 0.4, 0.1) if t else np.full(n, 0.1)
        series[:, t] = np.where(u[:, t] < share, 1.0, np.where(u[:, t] < 2 * share, -1.0, 0.0))
    figures["type_i_peeking_dependent"] = float((_first(series, 0.0) > 0).mean())
    worst = max(worst, error, figures["type_i_peeking_dependent"])
    bar("type_i_peeking_worst", worst, "<=", ALPHA)


@cache
def _fixed_refuses(gained: int, lost: int, n: int, null: float) -> bool:
    return stats.paired_interval(gained, lost, n, 1 - 2 * ALPHA)[0] > null


def _peeked_fixed(series: FloatArray, null: float) -> float:
    """What a test of fixed size errs if it is looked at every tenth pair as if it were the only look."""
    gained, lost = np.cumsum(series > 0, axis=1), np.cumsum(series < 0, axis=1)
    refused = [
        any(_fixed_refuses(int(g[t - 1]), int(k[t - 1]), t, null) for t in range(10, PAIRS + 1, 10))
        for g, k in zip(gained, lost, strict=True)
    ]
    return float(np.mean(refused))


def _sizes(n: int, figures: dict[str, float], bar: Bar) -> None:
    """Power within the gate's budgets, pairs on average, and those of the fixed plan with 90 % power."""
    rng = np.random.default_rng(2)
    settings = GateSettings()
    cases = {
        "lab_100_against_100": (0.0, 0.0, -settings.max_lab_drop, settings.lab_episodes),
        "lab_equal_1_in_100_each": (0.01, 0.01, -settings.max_lab_drop, settings.lab_episodes),
        "lab_equal_2_in_100_each": (0.02, 0.02, -settings.max_lab_drop, settings.lab_episodes),
        "factory_0_to_80": (0.80, 0.0, 0.0, settings.episodes),
        "factory_45_to_90": (0.48, 0.03, 0.0, settings.episodes),
        "factory_30_to_50": (0.25, 0.05, 0.0, settings.episodes),
    }
    for name, (gained, lost, null, budget) in cases.items():
        first = _first(_ternary(rng, n, budget, gained, lost), null)
        figures[f"power_{name}"] = float((first > 0).mean())
        figures[f"pairs_{name}"] = float(np.where(first > 0, first, budget).mean())
        figures[f"pairs_fixed_{name}"] = float(stats.pairs_for_margin(gained, lost, -null))
    bar("pairs_lab_100_against_100", figures["pairs_lab_100_against_100"], "<=", 100.0)
    bar("pairs_factory_0_to_80", figures["pairs_factory_0_to_80"], "<=", 10.0)
    # The fixed plan that must see 30 to 50 % wastes its pairs on a candidate that goes from 0 to 80 %.
    figures["pairs_ratio_clear_lift_to_fixed_plan"] = (
        figures["pairs_factory_0_to_80"] / figures["pairs_fixed_factory_30_to_50"]
    )


def _spread(n: int, bar: Bar) -> None:
    """Collapse and growth of variance at equal medians, over 70 paired scenes; and no finding where equal."""
    rng = np.random.default_rng(3)
    seen = {0.5: 0, 1.0: 0, 2.0: 0}
    for _ in range(n):
        scene = rng.standard_normal(70)
        a = 0.6 * scene + 0.8 * rng.standard_normal(70)
        b = 0.6 * scene + 0.8 * rng.standard_normal(70)
        b -= np.median(b) - np.median(a)
        for factor in seen:
            r = stats.paired_spread_ratio(a, np.median(a) + factor * (b - np.median(a)), 1 - 2 * ALPHA)
            seen[factor] += not r.low <= 1.0 <= r.high
    bar("spread_collapse_to_half_seen", seen[0.5] / n, ">=", 0.95)
    bar("spread_growth_to_double_seen", seen[2.0] / n, ">=", 0.95)
    noise = 3 * math.sqrt(2 * ALPHA * (1 - 2 * ALPHA) / n)  # two sides at 5 %, three standard errors
    bar("spread_seen_where_equal", seen[1.0] / n, "<=", 2 * ALPHA + noise)


# ── whole gates ────────────────────────────────────────────────────────────────────────────────────

STOPPED: dict[str, tuple[Policies, GateSettings]] = {
    "lab_10_points_worse": (Policies(factory=(0.45, 0.90), lab=(0.97, 0.87)), GateSettings()),
    "factory_10_points_worse": (Policies(factory=(0.55, 0.45)), GateSettings()),
    "factory_10_points_worse_non_inferior": (Policies(factory=(0.90, 0.80)), NON_INFERIOR),
    "tracking_tails_20_percent_worse": (Policies(tracking=1.2), NON_INFERIOR),
    "tracking_spread_doubled": (Policies(tracking_spread=2.0), NON_INFERIOR),
    "latency_spread_doubled": (Policies(latency_spread=2.0), NON_INFERIOR),
    "inference_twice_as_slow": (Policies(inference=2.0), NON_INFERIOR),
}
PROMOTED: dict[str, tuple[Policies, GateSettings]] = {
    "better_0_to_80": (Policies(factory=(0.0, 0.80), lab=(1.0, 1.0)), GateSettings()),
    "better_45_to_90": (Policies(factory=(0.45, 0.90), lab=(0.97, 0.985)), GateSettings()),
    "equal": (Policies(), NON_INFERIOR),
}


def _gates(n: int, figures: dict[str, float], bar: Bar) -> None:
    """Verdicts of ``n`` simulated gates a scenario; the share that is stopped, or promoted."""
    for name, (policies, settings) in STOPPED.items():
        found = [_Gate(policies, settings, luck).verdict for luck in range(n)]
        bar(f"stopped_{name}", float(np.mean([v is not Verdict.PROMOTE for v in found])), ">=", 0.95)
        figures[f"rolled_back_{name}"] = float(np.mean([v is Verdict.ROLL_BACK for v in found]))
    for name, (policies, settings) in PROMOTED.items():
        gates = [_Gate(policies, settings, luck) for luck in range(n)]
        bar(f"promoted_{name}", float(np.mean([g.verdict is Verdict.PROMOTE for g in gates])), ">=", 0.90)
        figures[f"pairs_in_gate_{name}"] = float(np.mean([g.pairs for g in gates]))
        figures[f"wall_pairs_in_gate_{name}"] = float(np.mean([g.wall_pairs for g in gates]))
        stress = settings.sweep_pairs * len(settings.sweep_shifts) + 2 * settings.latency_pairs
        planned = len(SCENARIOS) + settings.episodes + settings.lab_episodes + stress
        figures[f"pairs_planned_{name}"] = float(planned)


@dataclass
class _Gate:
    """One simulated gate: the real checks over attempts and runs drawn from ``policies``."""

    policies: Policies
    settings: GateSettings
    luck: int
    pairs: int = 0
    wall_pairs: int = 0
    verdict: Verdict = field(default=Verdict.HOLD, init=False)

    def __post_init__(self) -> None:
        settings = self.settings.model_copy(update={"seed": self.luck})
        judge = Judge((CURRENT, CANDIDATE), DIGESTS, settings, self._attempts, self._run, lambda *_: None)
        runs = Check(name="bundle", verdict=Verdict.PROMOTE, value=0.0, bar="", n=1)
        self.verdict, _ = decide([runs, *judge.checks(SCENARIOS)], required_checks(settings.shift))

    def _attempts(self, jobs: Sequence[Job]) -> list[Attempted]:
        out: list[Attempted] = []
        for job in jobs[::2]:
            rng = np.random.default_rng([self.luck, job.seed])
            out += self._pair(job, rng)
        self.pairs += len(jobs) // 2
        return out

    def _pair(self, job: Job, rng: np.random.Generator) -> list[Attempted]:
        """Both policies in one scene: its difficulty, and how it must be moved in, they mostly share."""
        p = self.policies
        skill = p.lab if job.shift == LAB else p.factory
        difficulty, own, mixed = rng.random(3)
        furthest = 0.25 * rng.integers(0, 4, 2)
        motion, alone = 0.4 * rng.standard_normal(), 0.3 * rng.standard_normal(2)
        out = []
        for new in (0, 1):
            won = (own if mixed > p.agreement and new else difficulty) < skill[new]
            log_p99 = math.log(0.003) + (motion + alone[new]) * (p.tracking_spread if new else 1.0)
            p99 = math.exp(log_p99) * (p.tracking if new else 1.0)
            out.append(
                Attempted.model_construct(
                    digest=DIGESTS[new],
                    shift=job.shift,
                    seed=job.seed,
                    latency_ms=job.latency_ms,
                    outcome=Outcome.SUCCESS if won else Outcome.TIMEOUT,
                    duration_s=3.0,
                    steps=3000,
                    tracking_rms_rad=p99 / 3,
                    tracking_p99_rad=p99,
                    invalid_chunks=0,
                    progress=1.0 if won else float(furthest[new]),
                    mode_ticks={},
                )
            )
        return out

    def _run(self, bundle: Path, shift: str, seconds: float, seed: int) -> WallResult:
        """A run on a shared machine: seconds that lie next to each other share its weather."""
        new = bundle == CANDIDATE
        p = self.policies if new else Policies()
        weather = np.random.default_rng([self.luck, seed])
        own = np.random.default_rng([self.luck, seed, int(new)])
        self.wall_pairs += new
        slow = math.exp(0.2 * weather.standard_normal() + 0.1 * own.standard_normal())
        ticks, chunks = int(seconds * 1000), int(seconds * 10)
        # 20 ms at the median, 15 ms from p10 to p90, in a row that remembers: one busy moment, many chunks.
        noise = own.standard_normal(chunks)
        for i in range(1, chunks):
            noise[i] = 0.4 * noise[i - 1] + math.sqrt(1 - 0.16) * noise[i]
        noise -= np.median(noise)
        infer = 1e6 * slow * np.maximum(20.0 * p.inference + 5.85 * p.latency_spread * noise, 1.0)
        late = 1e3 * slow * np.exp(math.log(40.0) + 0.6 * own.standard_normal(300))
        age = 100e6 + infer
        error = 0.002 * math.exp(0.3 * own.standard_normal())
        return WallResult(
            self_test={},
            seconds=seconds,
            ticks=ticks,
            late=Quantiles.of(late),
            compute=Quantiles.of(late),
            misses_ppm=3000.0 * slow * math.exp(0.5 * own.standard_normal()),
            longest_miss_run=1,
            tracking_rms_rad=error / 3,
            tracking_p99_rad=error,
            tracking_max_rad=2 * error,
            chunk_age=Quantiles.of(age),
            infer=Quantiles.of(infer),
            chunks=chunks,
            rejected=0,
            modes={},
            limits=0,
            restarts=0,
            rows_missed=0,
            digest=DIGESTS[int(new)],
            limits_sha256="",
            privileges={},
            load=(0.0, 0.0, 0.0),
        )
