"""The evidence of the gate: attempts and runs of both policies, in order, until every check has decided.

Cheap and telling checks come first, and what is proven worse is not run any further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flywheel.config import GateSettings
from flywheel.errors import FlywheelError
from flywheel.evaluate import Attempted, Job, Scenario, scene_seeds
from flywheel.gate import task, wall
from flywheel.gate.task import LAB, TRACKING, Pair
from flywheel.schema import Check, Verdict, sha256_bytes

Evaluate = Callable[[Sequence[Job]], Sequence[Attempted]]
OnProgress = Callable[[str, int, int], None]  # check, steps done, steps planned


class Judge:
    """One comparison of two bundles, current and candidate, that are complete and run."""

    def __init__(
        self,
        paths: tuple[Path, Path],
        digests: tuple[str, str],
        settings: GateSettings,
        evaluate: Evaluate,
        run_wall: wall.RunWall,
        progress: OnProgress,
    ) -> None:
        self.paths, self.digests = paths, digests
        self.settings = settings
        self.evaluate, self.run_wall, self.progress = evaluate, run_wall, progress
        # Fresh scenes for each pair of policies: scenes used turn after turn would select for luck on them.
        self.entropy = [settings.seed, *(int(sha256_bytes(d.encode())[:8], 16) for d in digests)]
        self.pairs: list[Pair] = []
        self._found: list[Check] = []
        self._spare: list[Scenario] = []  # the lab's scenes that success did not take

    def checks(self, scenarios: Sequence[Scenario]) -> list[Check]:
        """Every check up to the one that proves the candidate worse; all of them if none does."""
        self._found = [self._past_failures(scenarios)]
        for s in dict.fromkeys((self.settings.shift, LAB)):
            if not self._proven_worse():
                self._found += self._success(s)
        tracking = self._tracking()
        self._found += [task.invalid_output(self.pairs), *tracking]
        if not self._proven_worse():
            self._found += [self._sweep(), self._latency()]
        if not self._proven_worse():
            self._found += self._wall()
        return self._found

    def _proven_worse(self) -> bool:
        return any(c.verdict is Verdict.ROLL_BACK for c in self._found)

    def _run(self, scenes: Sequence[Scenario]) -> tuple[list[Pair], str]:
        """``_pairs``, which count for every check of what the policies do in their usual surroundings."""
        pairs, problem = self._pairs(scenes)
        self.pairs.extend(pairs)
        return pairs, problem

    def _pairs(self, scenes: Sequence[Scenario], latency_ms: float | None = None) -> tuple[list[Pair], str]:
        """Both policies on each scene, and why the answer is no evidence ("" if it is)."""
        jobs = [Job(path, s.shift, s.seed, latency_ms) for s in scenes for path in self.paths]
        try:
            attempts = list(self.evaluate(jobs) or ())
        except FlywheelError as e:
            return [], str(e)
        if len(attempts) != len(jobs):
            return [], f"{len(jobs)} attempts were asked for, {len(attempts)} came back"
        for i, (job, a) in enumerate(zip(jobs, attempts, strict=True)):
            if (a.shift, a.seed) != (job.shift, job.seed):
                return [], f"an attempt is of {a.shift} seed {a.seed}, not of {job.shift} seed {job.seed}"
            if a.latency_ms != job.latency_ms:
                return [], f"an attempt had a latency of {a.latency_ms} ms, not {job.latency_ms}"
            if a.digest != self.digests[i % 2]:
                return [], f"stale: an attempt ran bundle {a.digest[:12]}, not {self.digests[i % 2][:12]}"
        return [Pair(*attempts[i : i + 2]) for i in range(0, len(attempts), 2)], ""

    def _past_failures(self, scenarios: Sequence[Scenario]) -> Check:
        scenes = list(dict.fromkeys(Scenario(*x) for x in scenarios))[-self.settings.max_scenarios :]
        if not scenes:
            return task.hold(
                task.PAST_FAILURES, "no recorded failure to replay: name the episodes that led here"
            )
        self.progress(task.PAST_FAILURES, 0, len(scenes))
        pairs, problem = self._run(scenes)
        self.progress(task.PAST_FAILURES, len(scenes), len(scenes))
        name = task.PAST_FAILURES
        return task.hold(name, problem) if problem else task.not_worse(name, pairs)

    def _sweep(self) -> Check:
        """Shifts that nobody trained for: what was robust must stay so."""
        s = self.settings
        return self._stress(task.SWEEP, [x for x in s.sweep_shifts if x not in (s.shift, LAB)], s.sweep_pairs)

    def _latency(self) -> Check:
        """System 2 as slow as a busy machine makes it."""
        s = self.settings
        return self._stress(task.LATENCY, dict.fromkeys((s.shift, LAB)), s.latency_pairs, s.latency_ms)

    def _stress(self, name: str, shifts: Iterable[str], each: int, latency_ms: float | None = None) -> Check:
        scenes = [
            Scenario(shift, x)
            for shift in shifts
            for x in scene_seeds([*self.entropy, *f"{name} {shift}".encode()], each)
        ]
        self.progress(name, 0, len(scenes))
        pairs, problem = self._pairs(scenes, latency_ms)
        self.progress(name, len(scenes), len(scenes))
        return task.hold(name, problem) if problem else task.not_worse(name, pairs)

    def _success(self, shift: str) -> list[Check]:
        """Success and progress in one shift, by as many pairs as they take to decide, up to the budget."""
        s = self.settings
        bars = [s.min_lift] * (shift == s.shift) + [-s.max_lab_drop] * (shift == LAB)
        budget = s.episodes if shift == s.shift else s.lab_episodes
        name, bar = f"success in {shift}", max(bars)
        scenes = [Scenario(shift, x) for x in scene_seeds([*self.entropy, *shift.encode()], budget)]
        pairs: list[Pair] = []
        while True:
            self.progress(name, len(pairs), budget)
            more, problem = self._run(scenes[len(pairs) : len(pairs) + s.look_pairs])
            if problem:
                return [task.hold(n, problem) for n in (name, f"progress in {shift}")]
            pairs.extend(more)
            checks = [
                task.success(name, pairs, bar, s.confidence),
                task.progress(f"progress in {shift}", pairs, s.max_progress_drop, s.confidence),
            ]
            verdicts = {c.verdict for c in checks}
            if Verdict.ROLL_BACK in verdicts or Verdict.HOLD not in verdicts or len(pairs) >= budget:
                self.progress(name, budget, budget)
                self._spare = scenes[len(pairs) :]
                planned = {"planned_pairs": budget}
                return [c.model_copy(update={"evidence": c.evidence | planned}) for c in checks]

    def _tracking(self) -> list[Check]:
        """Tracking over the lab's pairs: once when success has decided and, if open, over all of them."""
        checks = task.tracking_checks(self.pairs, self.settings.confidence)
        undecided = any(c.verdict is Verdict.HOLD and c.value is not None for c in checks)
        if not undecided or not self._spare or self._proven_worse():
            return checks
        self.progress(TRACKING, 0, len(self._spare))
        _, problem = self._run(self._spare)
        self.progress(TRACKING, len(self._spare), len(self._spare))
        if problem:
            return [task.hold(c.name, problem) for c in checks]
        return task.settled(checks, task.tracking_checks(self.pairs, self.settings.confidence))

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
            checks = task.settled(checks, wall.checks(runs, self.digests, s))
            verdicts = {c.verdict for c in checks}
            if Verdict.ROLL_BACK in verdicts or Verdict.HOLD not in verdicts:
                break
        self.progress("wall clock", s.wall_pairs, s.wall_pairs)
        return checks
