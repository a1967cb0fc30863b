"""The gate: may this candidate replace the policy that the fleet runs now?

Every check compares candidate and current on the same scenes, or in interleaved runs, and reads a
confidence interval: *promote* when it lies on the good side of the bar, *roll back* when it lies on the
bad side, *hold* when it straddles the bar or when evidence is missing, empty, stale or not finite.

The candidate is promoted only if every check promotes. That is an intersection-union test (Berger,
Technometrics 24 (1982) 295-300): with each check at level alpha, a candidate that fails any bar is let
through with probability at most alpha, however many checks there are. Success and progress are looked at by
confidence sequences, which hold at all looks together (``stats.sequential``); the wall clock's looks share
alpha (Bonferroni). So stopping early costs no level.

    bundle                complete, runs, fits the robots that run the current one
    past failures         scenes of recorded failures, replayed: fixed against newly failing
    success in SHIFT      where the failures came from: lifted
    success in lab        not lost (non-inferiority)
    progress in ...       how far the task came, in both: not lost
    invalid output        chunks that are not finite or out of range: none
    tracking in lockstep  System 1's error while it follows the policy, paired scene by scene: tails, spread
    wall: ...             the real edge processes on the wall clock, interleaved A/B
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from flywheel.config import GateSettings
from flywheel.errors import BundleError, ConfigError
from flywheel.evaluate import Evaluator, Scenario, attempts_in
from flywheel.gate import bundle, page, task, wall
from flywheel.gate.judge import Evaluate, Judge, OnProgress
from flywheel.gate.task import LAB
from flywheel.schema import (
    NO_FAULT,
    Check,
    GateReport,
    Manifest,
    Outcome,
    Verdict,
    bundle_digest,
)
from flywheel.twin.shift import SHIFTS

__all__ = [
    "Evaluate",
    "OnProgress",
    "Scenario",
    "decide",
    "failure_scenarios",
    "gate",
    "in_shift_of",
    "required_checks",
    "whole_digest",
]


def failure_scenarios(manifests: Iterable[Manifest]) -> list[Scenario]:
    """Scenes of recorded failures that the twin can set up again, oldest episode first.

    Left out: real robots' episodes (no seed) and recordings of successes that nothing was wrong with.
    """
    scenarios: dict[Scenario, None] = {}
    for m in sorted(manifests, key=lambda m: m.episode_id):  # time-ordered ids
        failed = m.outcome is not Outcome.SUCCESS or any(t.kind not in NO_FAULT for t in m.triggers)
        if failed and m.shift and m.seed is not None:
            scenarios[Scenario(m.shift, m.seed)] = None
    return list(scenarios)


def in_shift_of(settings: GateSettings, scenarios: Iterable[Scenario]) -> GateSettings:
    """``settings`` with the shift that most of the failures are from, where ``gate.shift`` is "".

    Raises ``ConfigError`` where none of them says a shift that the twin knows, as on real robots.
    """
    if settings.shift:
        return settings
    counts = Counter(s.shift for s in scenarios)
    known = [s for s in SHIFTS if counts[s]]
    if not known:
        raise ConfigError(
            f'gate.shift = "": none of {counts.total()} failures says in which shift of the twin it was; '
            f"name the one that is most like it: {', '.join(SHIFTS)}"
        )
    return settings.model_copy(update={"shift": max(known, key=lambda s: counts[s])})


def gate(
    candidate: Path,
    current: Path,
    out: Path,
    settings: GateSettings,
    *,
    scenarios: Sequence[Scenario],
    of_current: Sequence[Scenario] = (),
    evaluate: Evaluate | None = None,
    run_wall: wall.RunWall | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> GateReport:
    """Judge ``candidate`` against ``current``; write ``gate.json``, ``.html`` and ``.xml`` to ``out``.

    ``scenarios`` are the failures that led here, ``of_current`` those of them that the current policy ran
    into: where it fails is where ``settings.shift = ""`` judges, since others wait from before it.
    ``evaluate`` and ``run_wall`` default to the twin in lockstep and to the edge processes on the wall clock.
    Reports of an earlier run in ``out`` are removed first, so that a gate which does not end leaves no
    verdict. Raises ``BundleError`` only if ``current`` is unusable, ``ConfigError`` if ``settings`` are; a
    bad candidate is a verdict, not an error.
    """
    from flywheel.twin.cell import twin_digest
    from flywheel.twin.parameters import TwinParameters

    page.clear(out)
    settings = in_shift_of(settings, of_current or scenarios)
    if problem := bundle.incomplete(current):
        raise BundleError(f"current policy {current}: {problem}")
    with ExitStack() as stack:
        parameters = TwinParameters.load(settings.twin) if settings.twin else None
        if evaluate is None:
            evaluate = stack.enter_context(Evaluator(workers, attempts_in(parameters))).run
        if run_wall is None:
            run_wall = partial(wall.real_run, parameters=settings.twin)
        twin = twin_digest(parameters)
        report = _report(candidate, current, settings, scenarios, evaluate, run_wall, on_progress, twin)
    page.write(report, out)
    return report


def _report(
    candidate: Path,
    current: Path,
    settings: GateSettings,
    scenarios: Sequence[Scenario],
    evaluate: Evaluate,
    run_wall: wall.RunWall,
    on_progress: OnProgress | None,
    twin: str,
) -> GateReport:
    paths = (current, candidate)
    digests = whole_digest(current), whole_digest(candidate)
    checks = [bundle.check(candidate, current, twin)]
    if checks[0].verdict is Verdict.PROMOTE:
        judge = Judge(paths, digests, settings, evaluate, run_wall, on_progress or (lambda *_: None))
        checks += judge.checks(scenarios)
    required = required_checks(settings.shift)
    done = {c.name for c in checks}
    checks += [
        task.hold(name, "not run: an earlier check had decided") for name in required if name not in done
    ]
    for what, path, digest in zip(("current", "candidate"), paths, digests, strict=True):
        if whole_digest(path) != digest:
            reason = f"stale: the bundle changed during the gate (digest {digest[:12]} before)"
            checks.append(task.hold(f"{what} unchanged", reason))
    verdict, reasons = decide(checks, required)
    return GateReport(
        candidate_digest=digests[1],
        current_digest=digests[0],
        checks=tuple(checks),
        verdict=verdict,
        reasons=reasons,
    )


def whole_digest(path: Path) -> str:
    """``schema.bundle_digest``; "" where the bundle is not complete."""
    return "" if bundle.incomplete(path) else bundle_digest(path)


def required_checks(shift: str) -> tuple[str, ...]:
    """Names of all checks of a gate for failures that came from ``shift``."""
    paired = (f"{what} in {s}" for s in dict.fromkeys((shift, LAB)) for what in ("success", "progress"))
    tracking = (task.TRACKING, task.TRACKING_SPREAD)
    stress = (task.SWEEP, task.LATENCY)
    return ("bundle", task.PAST_FAILURES, *paired, "invalid output", *tracking, *stress, *wall.CHECKS)


def decide(checks: Sequence[Check], required: Sequence[str]) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict over all checks, with a reason for each that does not promote.

    A required check that is absent, given twice, or promotes without evidence counts as *hold*.
    """
    reasons: list[str] = []
    names = Counter(c.name for c in checks)
    for name in dict.fromkeys(required):
        if names[name] != 1:
            reasons.append(f"{name}: {'reported more than once' if names[name] else 'no evidence'}")
    if not required:
        reasons.append("nothing was required")
    for c in checks:
        if c.verdict is not Verdict.PROMOTE:
            reasons.append(f"{c.name}: {c.evidence.get('reason') or page.sentence(c)}")
        elif c.value is None or c.n < 1:
            reasons.append(f"{c.name}: promotes without evidence")
    if any(c.verdict is Verdict.ROLL_BACK for c in checks):
        return Verdict.ROLL_BACK, tuple(reasons)
    return (Verdict.HOLD if reasons else Verdict.PROMOTE), tuple(reasons)
