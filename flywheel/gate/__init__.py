"""The gate: may this candidate replace the policy that the fleet runs now?

Every check compares candidate and current on the same scenes, or in interleaved runs, and reads a
confidence interval: *promote* when it lies on the good side of the bar, *roll back* when it lies on the
bad side, *hold* when it straddles the bar or when evidence is missing, empty, stale or not finite.

The candidate is promoted only if every check promotes. That is an intersection-union test (Berger,
Technometrics 24 (1982) 295-300): with each check at level alpha, a candidate that fails any bar is let
through with probability at most alpha, however many checks there are. Checks that look more than once
spend alpha over their looks (Bonferroni), so stopping early costs no level.

    bundle                complete, runs, fits the robots that run the current one
    past failures         scenes of recorded failures, replayed: fixed against newly failing
    success in SHIFT      where the failures came from: lifted
    success in lab        not lost (non-inferiority)
    invalid output        chunks that are not finite or out of range: none
    tracking in lockstep  System 1's error while it follows the policy, paired scene by scene
    wall: ...             the real edge processes on the wall clock, interleaved A/B
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from flywheel.config import GateSettings
from flywheel.errors import BundleError, FlywheelError
from flywheel.evaluate import Attempted, Evaluator, Job, Scenario, scene_seeds
from flywheel.gate import bundle, page, task, wall
from flywheel.gate.task import LAB, Pair
from flywheel.schema import (
    Check,
    GateReport,
    Manifest,
    Outcome,
    TriggerKind,
    Verdict,
    bundle_digest,
    sha256_bytes,
)

__all__ = ["Evaluate", "OnProgress", "Scenario", "decide", "failure_scenarios", "gate", "required_checks"]

Evaluate = Callable[[Sequence[Job]], Sequence[Attempted]]
OnProgress = Callable[[str, int, int], None]  # check, steps done, steps planned


def failure_scenarios(manifests: Iterable[Manifest]) -> list[Scenario]:
    """Scenes of recorded failures that the twin can set up again, oldest episode first.

    Left out: real robots' episodes (no seed) and recordings of successes kept as a baseline.
    """
    scenarios: dict[Scenario, None] = {}
    for m in sorted(manifests, key=lambda m: m.episode_id):  # time-ordered ids
        failed = m.outcome is not Outcome.SUCCESS or any(
            t.kind is not TriggerKind.BASELINE for t in m.triggers
        )
        if failed and m.shift and m.seed is not None:
            scenarios[Scenario(m.shift, m.seed)] = None
    return list(scenarios)


def gate(
    candidate: Path,
    current: Path,
    out: Path,
    settings: GateSettings,
    *,
    scenarios: Sequence[Scenario],
    evaluate: Evaluate | None = None,
    run_wall: wall.RunWall | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> GateReport:
    """Judge ``candidate`` against ``current``; write ``gate.json``, ``.html`` and ``.xml`` to ``out``.

    ``scenarios`` are the failures that led here. ``evaluate`` and ``run_wall`` default to the twin in
    lockstep and to the edge processes on the wall clock. Reports of an earlier run in ``out`` are removed
    first, so that a gate which does not end leaves no verdict. Raises ``BundleError`` only if ``current``
    is unusable; a bad candidate is a verdict, not an error.
    """
    page.clear(out)
    if problem := bundle.incomplete(current):
        raise BundleError(f"current policy {current}: {problem}")
    with ExitStack() as stack:
        if evaluate is None:
            evaluate = stack.enter_context(Evaluator(workers)).run
        if run_wall is None:
            run_wall = wall.real_run
        steps = _Gate(candidate, current, settings, evaluate, run_wall, on_progress or (lambda *_: None))
        report = steps.judge(scenarios)
    page.write(report, out)
    return report


def required_checks(shift: str) -> tuple[str, ...]:
    """Names of all checks of a gate for failures that came from ``shift``."""
    success = (f"success in {s}" for s in dict.fromkeys((shift, LAB)))
    return ("bundle", "past failures", *success, "invalid output", "tracking in lockstep", *wall.CHECKS)


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


class _Gate:
    """One run of the gate: its checks in order, cheap and telling ones first."""

    def __init__(
        self,
        candidate: Path,
        current: Path,
        settings: GateSettings,
        evaluate: Evaluate,
        run_wall: wall.RunWall,
        progress: OnProgress,
    ) -> None:
        self.paths = (current, candidate)
        self.digests = tuple("" if bundle.incomplete(p) else bundle_digest(p) for p in self.paths)
        self.settings = settings
        self.evaluate, self.run_wall, self.progress = evaluate, run_wall, progress
        # Fresh scenes for each pair of policies: scenes used turn after turn would select for luck on them.
        self.entropy = [settings.seed, *(int(sha256_bytes(d.encode())[:8], 16) for d in self.digests)]
        self.pairs: list[Pair] = []
        self.checks: list[Check] = []

    def judge(self, scenarios: Sequence[Scenario]) -> GateReport:
        shift = self.settings.shift
        self.checks.append(bundle.check(self.paths[1], self.paths[0]))
        if self.checks[0].verdict is Verdict.PROMOTE:
            self.checks.append(self._past_failures(scenarios))
            for s in dict.fromkeys((shift, LAB)):
                if not self._proven_worse():
                    self.checks.append(self._success(s))
            self.checks.append(task.invalid_output(self.pairs))
            self.checks.append(task.tracking(self.pairs, self.settings.confidence))
            if not self._proven_worse():
                self.checks.extend(self._wall())
        required = required_checks(shift)
        done = {c.name for c in self.checks}
        self.checks.extend(
            task.hold(name, "not run: an earlier check had decided") for name in required if name not in done
        )
        self.checks.extend(self._changed())
        verdict, reasons = decide(self.checks, required)
        return GateReport(
            candidate_digest=self.digests[1],
            current_digest=self.digests[0],
            checks=tuple(self.checks),
            verdict=verdict,
            reasons=reasons,
        )

    def _proven_worse(self) -> bool:
        return any(c.verdict is Verdict.ROLL_BACK for c in self.checks)

    def _run(self, scenes: Sequence[Scenario]) -> tuple[list[Pair], str]:
        """Both policies on each scene, and why the answer is no evidence ("" if it is)."""
        jobs = [Job(path, s.shift, s.seed) for s in scenes for path in self.paths]
        try:
            attempts = list(self.evaluate(jobs) or ())
        except FlywheelError as e:
            return [], str(e)
        if len(attempts) != len(jobs):
            return [], f"{len(jobs)} attempts were asked for, {len(attempts)} came back"
        for i, (job, a) in enumerate(zip(jobs, attempts, strict=True)):
            if (a.shift, a.seed) != (job.shift, job.seed):
                return [], f"an attempt is of {a.shift} seed {a.seed}, not of {job.shift} seed {job.seed}"
            if a.digest != self.digests[i % 2]:
                return [], f"stale: an attempt ran bundle {a.digest[:12]}, not {self.digests[i % 2][:12]}"
        pairs = [Pair(*attempts[i : i + 2]) for i in range(0, len(attempts), 2)]
        self.pairs.extend(pairs)
        return pairs, ""

    def _past_failures(self, scenarios: Sequence[Scenario]) -> Check:
        scenes = list(dict.fromkeys(Scenario(*x) for x in scenarios))[-self.settings.max_scenarios :]
        if not scenes:
            return task.hold(
                task.PAST_FAILURES, "no recorded failure to replay: name the episodes that led here"
            )
        self.progress(task.PAST_FAILURES, 0, len(scenes))
        pairs, problem = self._run(scenes)
        self.progress(task.PAST_FAILURES, len(scenes), len(scenes))
        return task.hold(task.PAST_FAILURES, problem) if problem else task.past_failures(pairs)

    def _success(self, shift: str) -> Check:
        s = self.settings
        bars = [s.min_lift] * (shift == s.shift) + [-s.max_lab_drop] * (shift == LAB)
        budget = s.episodes if shift == s.shift else s.lab_episodes
        name, bar = f"success in {shift}", max(bars)
        scenes = [Scenario(shift, x) for x in scene_seeds([*self.entropy, *shift.encode()], budget)]
        pairs: list[Pair] = []
        check = task.hold(name, "no episode was run")
        for look in range(1, s.looks + 1):
            self.progress(name, len(pairs), budget)
            more, problem = self._run(scenes[len(pairs) : math.ceil(budget * look / s.looks)])
            if problem:
                return task.hold(name, problem)
            pairs.extend(more)
            check = task.success(name, pairs, bar, s.confidence, s.looks)
            if check.verdict is not Verdict.HOLD:
                break
        self.progress(name, budget, budget)
        return check

    def _wall(self) -> list[Check]:
        s = self.settings
        seeds = scene_seeds([*self.entropy, *b"wall"], s.wall_pairs)
        runs = wall.Runs((), ())
        checks: list[Check] = []
        for look in range(1, s.wall_looks + 1):
            for i in range(len(runs.current), math.ceil(s.wall_pairs * look / s.wall_looks)):
                self.progress("wall clock", i, s.wall_pairs)
                order = (0, 1) if i % 2 == 0 else (1, 0)  # whatever drifts in a pair is shared by both sides
                try:
                    got = {j: self.run_wall(self.paths[j], LAB, s.wall_s, seeds[i]) for j in order}
                except FlywheelError as e:
                    return [task.hold(name, str(e)) for name in wall.CHECKS]
                if got[0] is None or got[1] is None:
                    return [task.hold(name, "a run gave no result") for name in wall.CHECKS]
                runs = wall.Runs((*runs.current, got[0]), (*runs.candidate, got[1]))
            checks = wall.checks(runs, (self.digests[0], self.digests[1]), s)
            if all(c.verdict is not Verdict.HOLD for c in checks):
                break
        self.progress("wall clock", s.wall_pairs, s.wall_pairs)
        return checks

    def _changed(self) -> Iterable[Check]:
        """A hold for each bundle that is no longer what was judged."""
        for what, path, digest in zip(("current", "candidate"), self.paths, self.digests, strict=True):
            if ("" if bundle.incomplete(path) else bundle_digest(path)) != digest:
                reason = f"stale: the bundle changed during the gate (digest {digest[:12]} before)"
                yield task.hold(f"{what} unchanged", reason)
