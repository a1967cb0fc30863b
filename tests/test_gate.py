"""The gate over made-up evidence: nothing missing, stale, broken or worse gets through; better ones do."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree as ET

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel.config import GateSettings
from flywheel.edge.runtime import Quantiles
from flywheel.errors import BundleError, ConfigError, StageError
from flywheel.evaluate import Attempted, Job
from flywheel.gate import Scenario, decide, failure_scenarios, gate, page, required_checks, task
from flywheel.gate import bundle as gate_bundle
from flywheel.gate.wall import BARS
from flywheel.schema import Bundle, Check, GateReport, Outcome, Verdict, bundle_digest, sha256_bytes

SETTINGS = GateSettings()
SCENARIOS = [Scenario("factory", s) for s in range(12)]
LIMITS = "ab" * 32
REAL_BARS = BARS


def write_bundle(directory: Path, weights: str, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "name": "arm", "cameras": ("wrist",), "image_hw": (64, 64),
        "state_names": ("x", "y", "z", "held", "suction"),
        "action_names": ("x", "y", "z", "suction"), "action_space": "tool_position_suction", "chunk": 16,
        "execute": 8, "step_ns": 100_000_000, "max_action_dim": 8, "tokens": 12, "num_steps": 4,
        "limits_sha256": LIMITS,
    }  # fmt: skip
    (directory / "policy.onnx").write_text(weights)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "policy.json").write_bytes(Bundle(**(facts | changes)).to_bytes())
    return directory


@dataclass(frozen=True)
class WallFigures:
    """Stands in for a run on the wall clock."""

    digest: str
    figures: dict[str, float | None]
    ticks: int = 4000
    rejected: int = 0
    restarts: int = 0
    rows_missed: int = 0
    chunks: int = 40
    privileges: dict[str, bool] = field(default_factory=dict)
    load: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass
class World:
    """Two policies with a known skill; every draw depends on seeds alone, and a fault can be put anywhere."""

    candidate: Path
    current: Path
    skill: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"factory": (0.45, 0.90), "lab": (0.97, 0.985)}
    )
    agreement: float = 0.9  # share of scenes whose difficulty decides for both policies alike
    tracking: float = 1.0  # the candidate's tracking error as a multiple of the current one's
    slower: dict[str, float] = field(default_factory=dict)  # figure on the wall clock -> factor
    noise: float = 0.05  # of a figure on the wall clock, log scale
    jitter: float = 0.05  # of a time on the wall clock
    luck: int = 0
    attempts_fault: Callable[[int, list[Attempted]], Any] = lambda call, attempts: attempts
    wall_fault: Callable[[int, WallFigures], Any] = lambda call, run: run
    calls: int = 0
    walls: int = 0

    def skill_in(self, job: Job) -> tuple[float, float]:
        slow = self.skill.get("latency", (1.0, 1.0)) if job.latency_ms else (1.0, 1.0)
        a, b = self.skill.get(job.shift, self.skill["lab"])
        return a * slow[0], b * slow[1]

    def evaluate(self, jobs: Sequence[Job]) -> Any:
        digests = {p: bundle_digest(p) for p in (self.candidate, self.current)}
        out = []
        for job in jobs:
            new = job.bundle == self.candidate
            shared, own, mixed, motion = np.random.default_rng([job.seed, self.luck]).random(4)
            if mixed > self.agreement and new:
                shared = own
            won = shared < self.skill_in(job)[new]
            error = 0.02 * math.exp(0.3 * (motion - 0.5)) * (self.tracking if new else 1.0)
            out.append(
                Attempted(
                    digest=digests[job.bundle],
                    shift=job.shift,
                    seed=job.seed,
                    latency_ms=job.latency_ms,
                    outcome=Outcome.SUCCESS if won else Outcome.TIMEOUT,
                    duration_s=3.0,
                    steps=30,
                    tracking_rms_rad=error / 3,
                    tracking_p99_rad=error,
                    invalid_chunks=0,
                    progress=1.0 if won else 0.5,
                )
            )
        self.calls += 1
        return self.attempts_fault(self.calls - 1, out)

    def run_wall(self, bundle: Path, shift: str, seconds: float, seed: int) -> Any:
        new = bundle == self.candidate
        rng = np.random.default_rng([seed, self.luck, new])
        figures: dict[str, float | None] = {
            b.name: (0.01 if b.unit == "rad" else b.floor)
            * math.exp((self.noise if b.unit == "rad" else self.jitter) * rng.standard_normal())
            * (self.slower.get(b.name, 1.0) if new else 1.0)
            for b in BARS
        }
        self.walls += 1
        return self.wall_fault(
            self.walls - 1, WallFigures(bundle_digest(bundle), figures, int(seconds * 1000))
        )

    def judge(
        self,
        out: Path,
        limits: GateSettings = SETTINGS,
        scenarios: Sequence[Scenario] = SCENARIOS,
        of_current: Sequence[Scenario] = (),
    ) -> GateReport:
        return gate(
            self.candidate, self.current, out, limits, scenarios=scenarios, of_current=of_current,
            evaluate=self.evaluate, run_wall=self.run_wall,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up bundles do not run, and made-up runs hold their figures by name."""
    monkeypatch.setattr(gate_bundle, "_does_not_run", lambda directory: "")
    monkeypatch.setattr("flywheel.gate.wall.BARS", tuple(b._replace(read=reader(b.name)) for b in BARS))


def reader(name: str) -> Callable[[Any], float | None]:
    return lambda run: run.figures[name]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(write_bundle(tmp_path / "candidate", "new"), write_bundle(tmp_path / "current", "old"))


def verdicts(report: GateReport) -> dict[str, Verdict]:
    return {c.name: c.verdict for c in report.checks}


def test_a_better_candidate_is_promoted_with_evidence_and_intervals(world: World, tmp_path: Path) -> None:
    report = world.judge(tmp_path / "out")
    assert report.verdict is Verdict.PROMOTE, report.reasons
    assert report.reasons == ()
    assert set(verdicts(report)) == set(required_checks("factory"))
    lift = next(c for c in report.checks if c.name == "success in factory")
    assert lift.low is not None
    assert lift.value is not None
    assert 0 < lift.low < lift.value
    assert lift.n <= SETTINGS.episodes // 2, "so clear a lift is seen early"
    assert report.objection(bundle_digest(world.candidate), bundle_digest(world.current)) is None


# ── evidence that is missing, empty, stale or not finite ───────────────────────────────────────────

ATTEMPT_FAULTS: dict[str, Callable[[list[Attempted], int], Any]] = {
    "nothing": lambda a, i: None,
    "empty": lambda a, i: [],
    "one missing": lambda a, i: a[:i] + a[i + 1 :],
    "one too many": lambda a, i: [*a, a[i]],
    "another seed": lambda a, i: [*a[:i], a[i].model_copy(update={"seed": a[i].seed + 1}), *a[i + 1 :]],
    "another shift": lambda a, i: [*a[:i], a[i].model_copy(update={"shift": "dim"}), *a[i + 1 :]],
    "another bundle": lambda a, i: [*a[:i], a[i].model_copy(update={"digest": "0" * 64}), *a[i + 1 :]],
    "policies swapped": lambda a, i: [a[j ^ 1] for j in range(len(a))],
    "invalid output": lambda a, i: [x.model_copy(update={"invalid_chunks": 1}) for x in a],
}
WALL_FAULTS: dict[str, Callable[[WallFigures, str], Any]] = {
    "nothing": lambda r, f: None,
    "figure missing": lambda r, f: WallFigures(r.digest, r.figures | {f: None}, r.ticks),
    "not a number": lambda r, f: WallFigures(r.digest, r.figures | {f: math.nan}, r.ticks),
    "infinite": lambda r, f: WallFigures(r.digest, r.figures | {f: math.inf}, r.ticks),
    "negative": lambda r, f: WallFigures(r.digest, r.figures | {f: -1.0}, r.ticks),
    "no tick": lambda r, f: WallFigures(r.digest, r.figures, 0),
    "too short": lambda r, f: WallFigures(r.digest, r.figures, 500),
    "another bundle": lambda r, f: WallFigures("0" * 64, r.figures, r.ticks),
    "rows unread": lambda r, f: WallFigures(r.digest, r.figures, r.ticks, rows_missed=100),
}


def _raise(*_: object) -> Any:
    raise StageError("a worker died")


ATTEMPT_FAULTS["error"] = _raise
WALL_FAULTS["error"] = _raise


@pytest.fixture(scope="module")
def bundles() -> Iterator[tuple[Path, Path]]:
    root = Path(tempfile.mkdtemp())
    yield write_bundle(root / "candidate", "new"), write_bundle(root / "current", "old")
    shutil.rmtree(root)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    attempt_faults=st.dictionaries(st.integers(0, 2), st.sampled_from(sorted(ATTEMPT_FAULTS)), max_size=2),
    wall_faults=st.dictionaries(st.integers(0, 7), st.sampled_from(sorted(WALL_FAULTS)), max_size=3),
    bar=st.sampled_from([b.name for b in BARS]),
    index=st.integers(0, 19),
    lift=st.sampled_from([0.90, 1.0]),
)
def test_no_combination_of_missing_or_broken_evidence_promotes(
    bundles: tuple[Path, Path],
    attempt_faults: dict[int, str],
    wall_faults: dict[int, str],
    bar: str,
    index: int,
    lift: float,
) -> None:
    world = World(*bundles, skill={"factory": (0.45, lift), "lab": (0.97, 0.985)})
    world.attempts_fault = lambda call, a: (
        ATTEMPT_FAULTS[attempt_faults[call]](a, index) if call in attempt_faults else a
    )
    world.wall_fault = lambda call, r: WALL_FAULTS[wall_faults[call]](r, bar) if call in wall_faults else r
    with tempfile.TemporaryDirectory() as out:
        report = world.judge(Path(out))
    if attempt_faults or wall_faults:
        assert report.verdict is not Verdict.PROMOTE
        assert report.reasons
    else:
        assert report.verdict is Verdict.PROMOTE  # so the property does not hold emptily


@pytest.mark.parametrize("field_name", ["tracking_p99_rad", "progress"])
def test_a_figure_that_is_missing_in_one_lab_attempt_holds(
    world: World, tmp_path: Path, field_name: str
) -> None:
    def drop(call: int, attempts: list[Attempted]) -> list[Attempted]:
        if attempts[0].shift == "lab":
            attempts[5] = attempts[5].model_copy(update={field_name: None})
        return attempts

    world.attempts_fault = drop
    report = world.judge(tmp_path / "out")
    held = {"progress": ["progress in lab"]}.get(field_name, [task.TRACKING, task.TRACKING_SPREAD])
    assert {verdicts(report)[name] for name in held} == {Verdict.HOLD}
    assert report.verdict is Verdict.HOLD


def test_without_recorded_failures_the_gate_holds_and_says_what_to_name(world: World, tmp_path: Path) -> None:
    report = world.judge(tmp_path / "out", scenarios=[])
    assert report.verdict is Verdict.HOLD
    assert any("name the episodes" in r for r in report.reasons)


checks = st.builds(
    Check,
    name=st.sampled_from(["a", "b", "c"]),
    verdict=st.sampled_from(list(Verdict)),
    value=st.none() | st.floats(-1, 1),
    bar=st.just(""),
    n=st.integers(0, 3),
)


@given(st.lists(checks, max_size=5), st.lists(st.sampled_from(["a", "b", "c"]), max_size=3))
def test_decide_promotes_only_if_every_required_check_is_there_once_and_all_promote_with_evidence(
    found: list[Check], required: list[str]
) -> None:
    verdict, reasons = decide(found, required)
    whole = (
        bool(required)
        and all(sum(c.name == r for c in found) == 1 for r in required)
        and all(c.verdict is Verdict.PROMOTE and c.value is not None and c.n > 0 for c in found)
    )
    assert (verdict is Verdict.PROMOTE) == whole
    assert bool(reasons) != (verdict is Verdict.PROMOTE)
    assert (verdict is Verdict.ROLL_BACK) == any(c.verdict is Verdict.ROLL_BACK for c in found)


# ── candidates that are worse ──────────────────────────────────────────────────────────────────────


@settings(max_examples=40)
@given(st.lists(st.sampled_from([(True, True), (True, False), (False, False)]), min_size=1, max_size=120))
def test_a_candidate_that_gains_nothing_never_passes_a_bar_of_superiority(
    outcomes: list[tuple[bool, bool]],
) -> None:
    pairs = [task.Pair(_attempt(a), _attempt(b)) for a, b in outcomes]
    assert task.success("success", pairs, 0.0, 0.95).verdict is not Verdict.PROMOTE


def _attempt(won: bool, shift: str = "lab", seed: int = 1) -> Attempted:
    return Attempted(
        digest="d", shift=shift, seed=seed, outcome=Outcome.SUCCESS if won else Outcome.DROPPED,
        duration_s=1.0, steps=1, tracking_rms_rad=0.01, tracking_p99_rad=0.02, invalid_chunks=0,
    )  # fmt: skip


def test_evidence_that_was_enough_at_one_look_is_not_undone_by_the_next() -> None:
    """The limits are those of every look so far: whoever stopped earlier would have been right to."""
    won, lost = task.Pair(_attempt(False), _attempt(True)), task.Pair(_attempt(True), _attempt(False))
    first = task.success("success", [won] * 8, 0.0, 0.95)
    then = task.success("success", [won] * 8 + [lost] * 4, 0.0, 0.95)
    assert first.verdict is then.verdict is Verdict.PROMOTE
    assert first.low == then.low
    assert then.evidence["fixed_size"]["low"] < 0 < (then.low or 0)


def test_progress_sees_a_loss_where_neither_policy_succeeds() -> None:
    def pair(a: float | None, b: float | None) -> task.Pair:
        was, now = (_attempt(False).model_copy(update={"progress": x}) for x in (a, b))
        return task.Pair(was, now)

    lost = [pair(0.75, 0.25)] * 20
    assert task.success("success", lost, -0.05, 0.95).verdict is Verdict.HOLD
    assert task.progress("progress", lost, 0.05, 0.95).verdict is Verdict.ROLL_BACK
    assert task.progress("progress", [pair(0.25, 0.75)] * 20, 0.05, 0.95).verdict is Verdict.PROMOTE
    assert task.progress("progress", [pair(0.5, 0.5)] * 20, 0.05, 0.95).verdict is Verdict.HOLD
    for missing in ([pair(0.5, None)], [pair(None, 0.5)], []):
        held = task.progress("progress", [*missing, *[pair(0.0, 1.0)] * 20 * len(missing)], 0.05, 0.95)
        assert (held.verdict, held.value) == (Verdict.HOLD, None)


def _tracked(current: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> list[task.Pair]:
    return [
        task.Pair(*(_attempt(True).model_copy(update={"tracking_p99_rad": float(x)}) for x in both))
        for both in zip(current, candidate, strict=True)
    ]


def test_tracking_that_is_uneven_over_the_scenes_is_seen_at_the_same_median() -> None:
    rng = np.random.default_rng(0)
    a, b = (0.004 * np.exp(0.3 * rng.standard_normal(70)) for _ in range(2))
    b *= np.median(a) / np.median(b)
    wide = np.median(a) * (b / np.median(b)) ** 2
    assert task.tracking_spread(_tracked(a, b), 0.95).verdict is Verdict.PROMOTE
    seen = task.tracking_spread(_tracked(a, wide), 0.95)
    assert seen.verdict is not Verdict.PROMOTE
    assert seen.value == pytest.approx(2.0, rel=0.4)
    assert task.tracking(_tracked(a, wide), 0.95).verdict is Verdict.PROMOTE, "its middle is the same"
    narrow = np.median(a) * (b / np.median(b)) ** 0.2
    assert task.tracking_spread(_tracked(a, narrow), 0.95).verdict is Verdict.PROMOTE


def test_a_spread_without_anything_to_compare_it_with_holds_unless_it_does_not_matter() -> None:
    same, uneven = np.full(20, 0.004), 0.004 * np.geomspace(0.4, 2.5, 20)
    assert task.tracking_spread(_tracked(same, uneven), 0.95).verdict is Verdict.HOLD
    assert task.tracking_spread(_tracked(same, same), 0.95).verdict is Verdict.PROMOTE
    assert task.tracking_spread(_tracked(uneven, same), 0.95).verdict is Verdict.PROMOTE
    below = np.full(20, 0.0001)
    assert task.tracking_spread(_tracked(below, below), 0.95).verdict is Verdict.PROMOTE
    assert task.tracking_spread(_tracked(same[:9], same[:9]), 0.95).verdict is Verdict.HOLD


def test_open_tracking_takes_the_rest_of_the_labs_budget_and_no_more(world: World, tmp_path: Path) -> None:
    def unlike(call: int, attempts: list[Attempted]) -> list[Attempted]:
        """As bad on the whole, but never in the same scenes."""
        noise = [
            1.2 * np.random.default_rng([a.seed, i % 2]).standard_normal() for i, a in enumerate(attempts)
        ]
        return [
            a.model_copy(update={"tracking_p99_rad": 0.02 * math.exp(0.1 * (i % 2) + noise[i])})
            for i, a in enumerate(attempts)
        ]

    world.attempts_fault = unlike
    report = world.judge(tmp_path / "out")
    by_name = {c.name: c for c in report.checks}
    assert by_name[task.TRACKING].n == SETTINGS.lab_episodes
    assert by_name["success in lab"].n < SETTINGS.lab_episodes


@given(
    st.lists(st.tuples(st.sampled_from(list(Verdict)), st.booleans()), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(list(Verdict)), st.booleans()), min_size=1, max_size=4),
)
def test_what_passed_at_an_earlier_look_stays_passed_unless_it_is_missing_or_proven_worse_now(
    before: list[tuple[Verdict, bool]], now: list[tuple[Verdict, bool]]
) -> None:
    def look(found: list[tuple[Verdict, bool]]) -> list[Check]:
        return [
            Check(name=str(i), verdict=v, value=1.0 if seen else None, low=1.0 if seen else None, bar="", n=1)
            for i, (v, seen) in enumerate(found)
        ]

    merged = task.settled(look(before), look(now))
    assert len(merged) == len(now)
    for i, check in enumerate(merged):
        verdict, seen = now[i]
        if verdict is Verdict.HOLD and seen and i < len(before) and before[i] == (Verdict.PROMOTE, True):
            assert check.verdict is Verdict.PROMOTE
        else:
            assert check.verdict is verdict


def test_one_figure_that_is_worse_by_chance_holds_where_all_of_them_are_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rolling back on any of many figures shares the level among them; passing each of them does not."""
    monkeypatch.setattr("flywheel.gate.wall.holm", lambda p: [0.02] * len(p))
    world.slower = {"inference p50": 3.0}
    held = verdicts(world.judge(tmp_path / "out"))
    assert held["wall: inference p50"] is Verdict.HOLD
    assert held["wall: misses"] is Verdict.PROMOTE


def share_promoted(world: World, out: Path, runs: int, limits: GateSettings = SETTINGS) -> float:
    promoted = 0
    for luck in range(runs):
        world.luck = luck
        promoted += world.judge(out, limits).verdict is Verdict.PROMOTE
    return promoted / runs


@pytest.mark.parametrize(
    "worse",
    [
        {"skill": {"factory": (0.45, 0.90), "lab": (0.97, 0.87)}},
        {"skill": {"factory": (0.55, 0.45), "lab": (0.97, 0.97)}},
        {"tracking": 1.3},
        {"slower": {"tracking p99": 1.4}},
        {"slower": {"inference p50": 2.0}},
        {"slower": {"inference spread": 2.0}},
        {"slower": {"chunk age p99": 2.0}},
        {"slower": {"misses": 3.0}},
    ],
    ids=["lab", "factory", "tracking", "wall tracking", "slow", "unsteady", "old chunks", "misses"],
)
def test_a_candidate_worse_in_one_respect_is_stopped(
    world: World, tmp_path: Path, worse: dict[str, Any]
) -> None:
    for name, value in worse.items():
        setattr(world, name, value)
    assert share_promoted(world, tmp_path / "out", 12) == 0


def test_a_better_candidate_passes_nearly_always_on_a_noisy_machine(world: World, tmp_path: Path) -> None:
    world.noise, world.jitter = 0.05, 0.3
    assert share_promoted(world, tmp_path / "out", 20) >= 0.9


def test_an_equal_candidate_passes_a_bar_of_non_inferiority(world: World, tmp_path: Path) -> None:
    world.skill = {"factory": (0.97, 0.97), "lab": (0.97, 0.97)}
    world.agreement = 0.97
    limits = GateSettings(episodes=200, min_lift=-0.05)
    assert share_promoted(world, tmp_path / "out", 20, limits) >= 0.9


def test_one_invalid_chunk_rolls_back(world: World, tmp_path: Path) -> None:
    def poison(call: int, attempts: list[Attempted]) -> list[Attempted]:
        return [
            a.model_copy(update={"invalid_chunks": int(call == 1 and i == 7)}) for i, a in enumerate(attempts)
        ]

    world.attempts_fault = poison
    report = world.judge(tmp_path / "out")
    assert report.verdict is Verdict.ROLL_BACK
    assert world.walls == 0, "a policy that is proven unfit is not run on the wall clock"
    assert verdicts(report)["wall: misses"] is Verdict.HOLD


@pytest.mark.parametrize(("fault", "verdict"), [("rejected", Verdict.ROLL_BACK), ("restarts", Verdict.HOLD)])
def test_a_candidate_that_is_refused_or_crashes_on_the_wall_clock_is_stopped(
    world: World, tmp_path: Path, fault: str, verdict: Verdict
) -> None:
    def strike(at: int) -> Callable[[int, WallFigures], WallFigures]:
        rejected, restarts = int(fault == "rejected"), int(fault == "restarts")
        return lambda call, run: replace(run, rejected=rejected, restarts=restarts) if call == at else run

    world.wall_fault = strike(2)  # a run of the candidate
    report = world.judge(tmp_path / "out")
    assert verdicts(report)["wall: faults"] is verdict
    assert report.verdict is verdict
    world.walls, world.wall_fault = 0, strike(3)  # a run of the current policy
    assert world.judge(tmp_path / "out").verdict is Verdict.PROMOTE


def test_a_run_without_a_single_sample_is_missing_not_zero() -> None:
    none = Quantiles(0.0, 0.0, 0.0, 0.0, 0)
    run = SimpleNamespace(infer=none, chunk_age=none, late=none, compute=none)
    for bar in REAL_BARS:
        if bar.unit in ("ms", "us"):
            assert bar.read(cast(Any, run)) is None


def test_a_policy_that_paid_for_its_lift_with_robustness_is_stopped(world: World, tmp_path: Path) -> None:
    world.skill |= dict.fromkeys(SETTINGS.sweep_shifts, (0.9, 0.1))
    report = world.judge(tmp_path / "out")
    assert report.verdict is not Verdict.PROMOTE
    (check,) = (c for c in report.checks if c.name == task.SWEEP)
    assert check.verdict is Verdict.ROLL_BACK
    assert set(check.evidence["successes"]) == set(SETTINGS.sweep_shifts)
    assert world.walls == 0, "what is proven worse is not run any further"


def test_a_policy_that_only_works_when_it_is_fast_is_stopped(world: World, tmp_path: Path) -> None:
    world.skill["latency"] = (1.0, 0.1)
    report = world.judge(tmp_path / "out")
    assert report.verdict is not Verdict.PROMOTE
    (check,) = (c for c in report.checks if c.name == task.LATENCY)
    assert check.verdict is Verdict.ROLL_BACK


def test_chunks_refused_under_stress_are_told_and_cost_no_more_than_the_attempt(
    world: World, tmp_path: Path
) -> None:
    world.attempts_fault = lambda call, attempts: [
        a.model_copy(update={"invalid_chunks": 3}) if a.shift == "dim" or a.latency_ms else a
        for a in attempts
    ]
    report = world.judge(tmp_path / "out")
    assert report.verdict is Verdict.PROMOTE, report.reasons
    (check,) = (c for c in report.checks if c.name == task.SWEEP)
    each = 3 * SETTINGS.sweep_pairs
    assert check.evidence["refused_chunks"] == {"candidate": each, "current": each}


def test_attempts_without_the_latency_that_was_asked_for_are_no_evidence(
    world: World, tmp_path: Path
) -> None:
    world.attempts_fault = lambda call, attempts: [
        a.model_copy(update={"latency_ms": None}) for a in attempts
    ]
    report = world.judge(tmp_path / "out")
    assert report.verdict is Verdict.HOLD
    (check,) = (c for c in report.checks if c.name == task.LATENCY)
    assert check.value is None
    assert "had a latency of None ms, not 80.0" in check.evidence["reason"]


def test_past_failures_are_counted_by_what_became_of_them() -> None:
    outcomes = [(False, True)] * 5 + [(False, False)] * 3 + [(True, False)] * 2 + [(True, True)]
    pairs = [
        task.Pair(_attempt(a, "factory", i), _attempt(b, "factory", i)) for i, (a, b) in enumerate(outcomes)
    ]
    check = task.not_worse(task.PAST_FAILURES, pairs)
    assert {k: check.evidence[k] for k in ("fixed", "still_failing", "newly_failing", "passing")} == {
        "fixed": 5, "still_failing": 3, "newly_failing": 2, "passing": 1,
    }  # fmt: skip
    assert check.evidence["scenarios"]["newly_failing"] == ["factory:8", "factory:9"]
    assert check.verdict is Verdict.PROMOTE
    assert (
        task.not_worse(task.PAST_FAILURES, [p for p in pairs if p.current.success][:2] * 2).verdict
        is Verdict.HOLD
    )
    assert (
        task.not_worse(task.PAST_FAILURES, [p for p in pairs if p.current.success][:2] * 4).verdict
        is Verdict.ROLL_BACK
    )


def test_seconds_between_the_sides_of_a_pair_are_shared(world: World, tmp_path: Path) -> None:
    order: list[str] = []

    def note(call: int, run: WallFigures) -> WallFigures:
        order.append(run.digest)
        return run

    world.wall_fault = note
    world.judge(tmp_path / "out")
    a, b = bundle_digest(world.current), bundle_digest(world.candidate)
    assert order == [a, b, b, a, a, b, b, a]


# ── the bundle itself ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "words", "verdict"),
    [
        ({"cameras": ("scene",)}, "cameras is scene, the robots expect wrist", Verdict.ROLL_BACK),
        ({"image_hw": (96, 96)}, "image_hw", Verdict.ROLL_BACK),
        ({"action_names": ("x", "y", "suction", "z")}, "action_names", Verdict.ROLL_BACK),
        ({"action_space": "joint_position"}, "action_space", Verdict.ROLL_BACK),
        ({"state_names": ("x",)}, "state_names", Verdict.ROLL_BACK),
        ({"step_ns": 50_000_000}, "step_ns", Verdict.ROLL_BACK),
        ({"execute": 17}, "execute is 17, of a chunk of 16", Verdict.ROLL_BACK),
        ({"limits_sha256": "cd" * 32}, "limits_sha256 is cdcdcdcdcdcd", Verdict.ROLL_BACK),
        ({"limits_sha256": ""}, "unknown under which safety limits", Verdict.HOLD),
    ],
)
def test_a_bundle_that_does_not_fit_the_robots_is_not_run(
    world: World, tmp_path: Path, change: dict[str, Any], words: str, verdict: Verdict
) -> None:
    write_bundle(world.candidate, "new", **change)
    report = world.judge(tmp_path / "out")
    assert report.verdict is verdict
    assert words in report.reasons[0]
    assert world.calls == world.walls == 0


def test_the_current_policy_itself_is_no_candidate(world: World, tmp_path: Path) -> None:
    write_bundle(world.candidate, "old")
    report = world.judge(tmp_path / "out")
    assert report.verdict is Verdict.HOLD
    assert "nothing to promote" in report.reasons[0]


@pytest.mark.parametrize("name", ["policy.onnx", "tokenizer.json", "policy.json"])
def test_an_incomplete_candidate_is_a_verdict_and_an_incomplete_current_policy_an_error(
    world: World, tmp_path: Path, name: str
) -> None:
    (world.candidate / name).unlink()
    report = world.judge(tmp_path / "out")
    assert report.verdict is Verdict.ROLL_BACK
    assert f"{name} missing" in report.reasons[0]
    world.candidate, world.current = world.current, world.candidate
    with pytest.raises(BundleError, match=name):
        world.judge(tmp_path / "out")


def test_a_candidate_whose_description_is_broken_is_unfit(world: World, tmp_path: Path) -> None:
    (world.candidate / "policy.json").write_text('{"schema_version": 1, "surprise": true}')
    report = world.judge(tmp_path / "out")
    assert report.verdict is Verdict.ROLL_BACK
    assert "policy.json" in report.reasons[0]


# ── digests ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", ["candidate", "current"])
def test_a_bundle_that_changes_during_the_gate_voids_it(world: World, tmp_path: Path, which: str) -> None:
    def tamper(call: int, run: WallFigures) -> WallFigures:
        if call == 7:  # the last one: every check has its evidence by now
            (getattr(world, which) / "policy.onnx").write_text("swapped")
        return run

    world.wall_fault = tamper
    report = world.judge(tmp_path / "out")
    assert report.verdict is Verdict.HOLD
    assert any(r.startswith(f"{which} unchanged: stale") for r in report.reasons)


def test_a_report_is_void_for_any_other_pair_of_bundles(world: World, tmp_path: Path) -> None:
    report = world.judge(tmp_path / "out")
    new, old, other = report.candidate_digest, report.current_digest, "0" * 64
    assert report.objection(new, old) is None
    for pair in ((other, old), (new, other), (old, new), ("", old), (new, "")):
        assert "void" in str(report.objection(*pair))
    held = report.model_copy(update={"verdict": Verdict.HOLD, "reasons": ("tired",)})
    assert "tired" in str(held.objection(new, old))
    forged = report.model_copy(update={"checks": (task.hold("a", "nothing"),)})
    assert "contradicts" in str(forged.objection(new, old))
    assert "contradicts" in str(report.model_copy(update={"checks": ()}).objection(new, old))


def test_scenes_are_fresh_for_each_pair_of_policies_and_the_same_for_the_same_pair(
    world: World, tmp_path: Path
) -> None:
    def seeds() -> set[int]:
        seen: set[int] = set()

        def note(call: int, attempts: list[Attempted]) -> list[Attempted]:
            seen.update(a.seed for a in attempts if call)
            return attempts

        world.attempts_fault = note
        world.calls = 0
        world.judge(tmp_path / "out")
        return seen

    first, again = seeds(), seeds()
    write_bundle(world.candidate, "newer")
    assert first == again
    assert first
    assert not first & seeds()


# ── what it leaves behind ──────────────────────────────────────────────────────────────────────────


def test_a_report_names_the_twin_that_it_was_made_in(world: World, tmp_path: Path) -> None:
    from flywheel.rollout import twin
    from flywheel.twin.cell import MODEL_SHA256, twin_digest
    from flywheel.twin.parameters import Estimate, TwinParameters

    heavy = Estimate(nominal=2, value=2.5, low=2.4, high=2.6, identified=True, unit="kg")
    parameters = TwinParameters(model_sha256=MODEL_SHA256, parameters={"mass.shoulder": heavy})
    path = tmp_path / "twin.json"
    path.write_bytes(parameters.to_bytes())
    identified = SETTINGS.model_copy(update={"twin": str(path)})
    assert twin.used_by(world.judge(tmp_path / "a")) == twin_digest(None)
    assert twin.used_by(world.judge(tmp_path / "b", identified)) == twin_digest(parameters)
    with pytest.raises(ConfigError, match="cannot be read"):
        world.judge(tmp_path / "c", SETTINGS.model_copy(update={"twin": str(tmp_path / "none")}))


def test_reports_say_the_same_in_three_forms(world: World, tmp_path: Path) -> None:
    report = world.judge(tmp_path)
    data = (tmp_path / "gate.json").read_bytes()
    assert data == report.to_bytes()
    assert GateReport.model_validate_json(data) == report
    assert not any(isinstance(x, float) and not math.isfinite(x) for x in _leaves(json.loads(data)))
    suite = ET.fromstring((tmp_path / "gate.xml").read_bytes())[0]
    assert suite.get("failures") == "0"
    assert [c.get("name") for c in suite.iter("testcase")] == [c.name for c in report.checks]
    html = (tmp_path / "gate.html").read_text()
    assert all(c.name in html for c in report.checks)
    assert sha256_bytes(data) in html
    assert "http" not in html, "the page must not need anything from outside"
    assert html.count("<svg") > len(BARS)


def _leaves(doc: object) -> Iterator[object]:
    if isinstance(doc, dict | list):
        for x in doc.values() if isinstance(doc, dict) else doc:
            yield from _leaves(x)
    else:
        yield doc


def test_text_from_a_bundle_cannot_inject_markup(world: World, tmp_path: Path) -> None:
    write_bundle(world.candidate, "new", cameras=("<script>alert(1)</script>\x00",))
    world.judge(tmp_path)
    assert "<script>" not in (tmp_path / "gate.html").read_text()
    assert "\x00" not in (tmp_path / "gate.xml").read_text()
    ET.fromstring((tmp_path / "gate.xml").read_bytes())


def test_junit_names_each_check_that_does_not_promote(world: World, tmp_path: Path) -> None:
    world.slower = {"inference p50": 3.0}
    report = world.judge(tmp_path)
    assert report.verdict is Verdict.ROLL_BACK
    suite = ET.fromstring((tmp_path / "gate.xml").read_bytes())[0]
    failed = {c.get("name"): c[0].get("type") for c in suite.iter("testcase") if c[0].tag == "failure"}
    assert failed == {c.name: c.verdict.value for c in report.checks if c.verdict is not Verdict.PROMOTE}
    assert failed["wall: inference p50"] == "roll back"


def test_a_gate_that_dies_leaves_no_earlier_verdict_behind(world: World, tmp_path: Path) -> None:
    world.judge(tmp_path)

    def die(call: int, run: WallFigures) -> WallFigures:
        raise KeyboardInterrupt

    world.wall_fault = die
    with pytest.raises(KeyboardInterrupt):
        world.judge(tmp_path)
    assert not any((tmp_path / n).exists() for n in page.FILES)


def test_failures_become_scenarios_once_and_only_if_the_twin_can_replay_them() -> None:
    from flywheel.schema import Manifest, Trigger, TriggerKind

    def manifest(
        i: int, seed: int | None, kind: TriggerKind, outcome: Outcome, shift: str = "factory"
    ) -> Manifest:
        return Manifest(
            episode_id=f"0190a000-0000-7000-8000-{i:012d}", site="s", robot="r", joints=5, cameras=(),
            state_dim=5, action_dim=4, chunk=16, control_hz=1000, policy_hz=10, task="t", shift=shift,
            seed=seed, outcome=outcome, triggers=(Trigger(kind=kind, t_ns=0),), window_ns=(0, 1),
            policy_digest="d", runtime_version="0", clock="lockstep", clock_epoch_ns=0, gaps=0, drops=0,
            files=(),
        )  # fmt: skip

    timeout, success = Outcome.TIMEOUT, Outcome.SUCCESS
    found = failure_scenarios(
        [
            manifest(3, 30, TriggerKind.TASK_TIMEOUT, timeout),
            manifest(1, 10, TriggerKind.TASK_TIMEOUT, timeout),
            manifest(2, 10, TriggerKind.WRONG_OBJECT, timeout),
            manifest(4, None, TriggerKind.TASK_TIMEOUT, timeout),
            manifest(5, 50, TriggerKind.BASELINE, success),
            manifest(6, 60, TriggerKind.INTERVENTION, success),
            manifest(7, 70, TriggerKind.TASK_TIMEOUT, timeout, shift=""),
        ]
    )
    assert found == [("factory", 10), ("factory", 30), ("factory", 60)]


def test_failures_that_wait_from_before_the_current_policy_do_not_say_where_it_is_judged(
    world: World, tmp_path: Path
) -> None:
    """Else a candidate that does nothing for where the fleet works now is promoted for what is solved."""
    old = [Scenario("factory", i) for i in range(9)]
    new = [Scenario("table", i) for i in range(5)]
    limits = SETTINGS.model_copy(update={"shift": ""})

    def shifts(report: GateReport) -> set[str]:
        return {c.name for c in report.checks if c.name.startswith("success in ")}

    assert shifts(world.judge(tmp_path / "all", limits, [*old, *new])) == {
        "success in factory",
        "success in lab",
    }
    found = world.judge(tmp_path / "mine", limits, [*old, *new], of_current=new)
    assert shifts(found) == {"success in table", "success in lab"}
