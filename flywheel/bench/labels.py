"""``flywheel bench labels``: labels against what the twin knows.

Attempts of the base policy in the twin, recorded by the product's recorder, with one thing wrong in each:
another setting than the policy was trained in, a policy that answers late or with numbers that are none, an
encoder, a vacuum or a camera that fails, a person who comes near. An injected fault is the cause only where
the same scene without it succeeds; what fails in the lab with nothing wrong has no barrier to blame
(``unknown``). How an attempt failed, and in which phase, is read from the simulated world itself.

Labels are made before anybody has answered, and after: then each half of the episodes is labelled by what
the truth about the other half, given as a person's answers, has taught. ``ece`` is the expected calibration
error; ``noise`` what perfect confidences would show.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel import __version__, episode
from flywheel.attempt import Attempt, AttemptResult
from flywheel.bench.reliability import Reliability, calibration_error
from flywheel.config import LabelSettings, RecorderSettings, Settings
from flywheel.edge.bench import machine
from flywheel.edge.lockstep import LockstepResult
from flywheel.edge.policy import ActionSource, Inference
from flywheel.edge.recorder import Identity, Recorder
from flywheel.label import Answer, Answers, Aspect, Cause, FailureMode, Phase
from flywheel.label.answers import Evidence
from flywheel.label.labelling import UNTAUGHT, Labellers, Word, evidence, learn, words_of
from flywheel.label.pictures import Familiar
from flywheel.label.signals import TRACKING_ERROR_RAD, signals
from flywheel.robot import FloatArray, Image, JointState, Observation
from flywheel.robot.twin import TwinRobot
from flywheel.schema import Outcome
from flywheel.twin.cell import REACH_M
from flywheel.workspace import source_checkout

ASPECTS = (Aspect.OUTCOME, Aspect.FAILURE_MODE, Aspect.PHASE, Aspect.CAUSE)
# Bars: a label that is shown as sure must be right nine times in ten, or a technician stops reading them;
# most episodes must get one, or people label everything themselves; and confidences may not be further off
# than a tenth, the step in which people think of probabilities.
BARS = (("right_when_sure", ">=", 0.9), ("sure_share", ">=", 0.5), ("ece", "<=", 0.1))
COLUMNS = ("accuracy", "sure_share", "right_when_sure", "ece", "ece_low", "ece_high", "ece_noise")
EPOCH_NS = 1_700_000_000_000_000_000
FIRST_SEED = 1 << 20  # of scenes that nothing was trained on
FAULT_S = 0.8  # into the attempt


@dataclass(frozen=True)
class Case:
    """One thing that is wrong, and the barrier that it stands for."""

    name: str
    cause: Cause
    shift: str = "lab"
    latency_ms: float | None = None


CASES = (
    Case("lab", Cause.UNKNOWN),
    Case("factory", Cause.DISTRIBUTION_SHIFT, "factory"),
    Case("table", Cause.DISTRIBUTION_SHIFT, "table"),
    Case("late", Cause.LATENCY, latency_ms=700.0),
    Case("nan", Cause.INTEGRATION),
    Case("encoder", Cause.HARDWARE),
    Case("vacuum", Cause.HARDWARE),
    Case("camera", Cause.HARDWARE),
    Case("person", Cause.SAFETY),
)


class FaultyRobot:
    """The twin's robot with a sensor that fails, or a person who comes near, ``FAULT_S`` into an attempt."""

    def __init__(self, inner: TwinRobot, fault: str) -> None:
        self._inner = inner
        self._fault = fault
        self.joints, self.takes, self.name = inner.joints, inner.takes, inner.name
        self.rate_hz, self.limits, self.cameras = inner.rate_hz, inner.limits, inner.cameras
        self._stuck: FloatArray | None = None
        self._frame: Observation | None = None

    @property
    def _now(self) -> bool:
        return self._inner.cell.ticks * 1e-3 > FAULT_S

    def read(self, out: JointState) -> None:
        """As the inner robot, with the fault."""
        self._inner.read(out)
        out.stop_input = self._fault == "person" and self._now
        if not self._now:
            self._stuck = None
        elif self._fault == "encoder":
            if self._stuck is None:
                self._stuck = out.q.copy()
            out.q[0] = self._stuck[0]

    def write(self, command: FloatArray, tool: float) -> None:
        """As the inner robot; a vacuum that fails lets go of what has been lifted."""
        lifted = self._fault == "vacuum" and self._inner.cell.held >= 0 and self._inner.cell.tip[2] > 0.15
        self._inner.write(command, 0.0 if lifted else tool)

    def power_on(self) -> None:
        """As the inner robot."""
        self._inner.power_on()

    def stop(self) -> None:
        """As the inner robot."""
        self._inner.stop()

    def observe(self) -> Observation:
        """As the inner robot, or for ever the same picture."""
        seen = self._inner.observe()
        if self._fault != "camera" or not self._now:
            self._frame = seen
            return seen
        frozen = seen.images if self._frame is None else self._frame.images
        return Observation(seen.t_ns, frozen, seen.state, seen.q)

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        """As the inner robot."""
        return self._inner.to_joint_chunk(actions, q)


class NotNumbers:
    """A policy whose graph breaks: NaN in one chunk of three after ``FAULT_S``."""

    def __init__(self, inner: ActionSource) -> None:
        self.bundle, self.digest, self._inner, self._n = inner.bundle, inner.digest, inner, 0

    def infer(self, images: dict[str, Image], state: npt.NDArray[np.float32], instruction: str) -> Inference:
        """The inner policy's actions, or none that can be followed."""
        made = self._inner.infer(images, state, instruction)
        self._n += 1
        if self._n % 12 < 3:
            return made
        return Inference(np.full_like(made.actions, np.nan), made.actions_norm, made.infer_ns)


class Watched(Attempt):
    """An attempt of which the world itself is watched, until the policy's part ends."""

    nearest_m = np.inf
    took_target = False
    strayed = False  # the arm, as it really stands, went elsewhere than its reference
    ended: tuple[int, float, Outcome] = (-1, np.inf, Outcome.TIMEOUT)  # held, distance, outcome

    def run(self, seed: int, target: str | None = None, *, latency_ms: float | None = None) -> AttemptResult:
        """As an attempt."""
        self.nearest_m, self.took_target, self.strayed = np.inf, False, False
        return super().run(seed, target, latency_ms=latency_ms)

    def _ended(self) -> bool:
        cell, s1 = self.cell, self.lockstep.system1
        self.nearest_m = min(self.nearest_m, float(np.linalg.norm(cell.tip - cell.target_top)))
        self.took_target |= cell.held == cell.target
        self.strayed |= float(np.abs(cell.q - s1.reference[0]).max()) > TRACKING_ERROR_RAD
        return super()._ended()

    def _outcome(self, ran: LockstepResult) -> Outcome:
        found = super()._outcome(ran)
        cell = self.cell
        self.ended = cell.held, float(np.linalg.norm(cell.tip - cell.target_top)), found
        return found

    def truth(self, case: Case) -> tuple[FailureMode, Phase]:
        """How it failed, and where, from the world as it was when the policy's part ended."""
        held, distance, outcome = self.ended
        near = distance if outcome is Outcome.STOPPED else self.nearest_m
        phase = Phase.GRASP if near < REACH_M else Phase.APPROACH
        phase = Phase.PLACE if self.took_target else phase
        broke = case.name == "vacuum" and self.took_target  # it was lost, not put down
        phase = Phase.CARRY if held >= 0 or broke else phase
        if outcome is Outcome.SUCCESS:
            return FailureMode.NONE, Phase.NONE
        if outcome is Outcome.WRONG_OBJECT:
            return FailureMode.WRONG_OBJECT, Phase.CARRY
        if self.strayed:
            return FailureMode.TRACKING, phase
        if outcome is Outcome.STOPPED:
            return FailureMode.SAFETY_STOP, phase
        if outcome is Outcome.DROPPED or (self.took_target and held < 0):
            return FailureMode.DROPPED, phase
        if held == self.cell.target:
            return FailureMode.TIMED_OUT_CARRYING, phase
        if held >= 0:
            return FailureMode.WRONG_OBJECT, phase
        return (FailureMode.MISSED_GRASP if phase is Phase.GRASP else FailureMode.NEVER_REACHED), phase


@dataclass(frozen=True)
class Known:
    """An episode's evidence and the truth about it."""

    episode_id: str
    case: str
    evidence: Evidence
    truth: dict[Aspect, str]


def labels(full: bool = False) -> dict[str, Any]:
    """About a minute, or with ``full`` some ten; returns the document of ``flywheel bench --json``."""
    before = os.getloadavg()
    bundle = source_checkout() / "models" / "base" / "bundle"
    root = Path(tempfile.mkdtemp(prefix="flywheel-labels-"))
    begun = time.monotonic()
    try:
        known, dropped = _known(bundle, root, 40 if full else 5)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    made_s = time.monotonic() - begun
    halves = known[::2], known[1::2]
    judged = [*halves[0], *halves[1]]
    after: dict[str, Labellers] = {}  # by episode: each half is taught by the answers of the other
    for mine, others in (halves, halves[::-1]):
        labellers = learn({k.episode_id: k.evidence for k in mine}, _answers(others))
        after |= {k.episode_id: labellers for k in mine}
    figures: dict[str, float] = {
        "episodes": len(known),
        "answered": len(halves[1]),
        "not_counted": dropped,  # an injected fault in a scene that fails without it, or that did no harm
        "seconds": made_s,
    }
    bars: dict[str, Any] = {}
    sure = LabelSettings().min_confidence
    before_all: dict[str, Labellers] = dict.fromkeys(after, UNTAUGHT)
    for when, by in (("before", before_all), ("after", after)):
        for aspect in ASPECTS:
            said = [words_of(k.evidence, by[k.episode_id])[aspect] for k in judged]
            scored = _score(said, [k.truth[aspect] for k in judged], sure)
            figures |= {f"{aspect}_{when}_{name}": v for name, v in scored.items()}
            for name, op, bar in BARS if when == "after" else ():
                value = scored[name]
                ok = value >= bar if op == ">=" else value <= bar
                bars[f"{aspect}_{name}"] = {"value": value, "op": op, "bar": bar, "ok": ok}
    figures |= _by_case(judged, after)
    return {
        "bench": "labels",
        "machine": machine(),
        "load": {"before": list(before), "after": list(os.getloadavg())},
        "figures": {k: round(float(v), 6) for k, v in figures.items()},
        "bars": bars,
    }


def table(doc: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """A line for each label, before and after the answers."""
    f = doc["figures"]
    lines = []
    for aspect in ASPECTS:
        for when in ("before", "after"):
            at = f"{aspect}_{when}_"
            lines.append([aspect, when, *(f"{f[at + k]:.3f}" for k in COLUMNS)])
    return ["label", "answers", "right", "sure", "right when sure", "ece", "low", "high", "noise"], lines


def _score(said: Sequence[Word], truth: Sequence[str], sure: float) -> dict[str, float]:
    right = [w.word == t for w, t in zip(said, truth, strict=True)]
    certain = [r for w, r in zip(said, right, strict=True) if w.confidence >= sure]
    r: Reliability = calibration_error([w.confidence for w in said], right)
    return {
        "accuracy": float(np.mean(right)),
        "sure_share": len(certain) / len(said),
        "right_when_sure": float(np.mean(certain)) if certain else 0.0,
        "ece": r.error,
        "ece_low": r.low,
        "ece_high": r.high,
        "ece_noise": r.noise,
    }


def _answers(known: Sequence[Known]) -> Answers:
    return Answers(
        answers=tuple(
            Answer(episode_id=k.episode_id, words=k.truth, by="twin", t_unix_ns=i, evidence=k.evidence)
            for i, k in enumerate(known)
        )
    )


def _by_case(judged: Sequence[Known], by: Mapping[str, Labellers]) -> dict[str, float]:
    counted = Counter(k.case for k in judged)
    said = {k.episode_id: words_of(k.evidence, by[k.episode_id])[Aspect.CAUSE].word for k in judged}
    hit = Counter(k.case for k in judged if said[k.episode_id] == k.truth[Aspect.CAUSE])
    return {f"cause_right_{case}": hit[case] / n for case, n in sorted(counted.items())} | {
        f"episodes_{case}": n for case, n in sorted(counted.items())
    }


def _whole(directory: Path) -> Path | None:
    """Of what was recorded of an attempt, the episode that reaches furthest."""
    found = [p.parent for p in sorted(directory.glob("*/manifest.json"))]
    return max(found, key=lambda d: episode.read_manifest(d).window_ns[1], default=None)


def known_familiar(bundle: Path) -> Familiar:
    """What the base policy was trained on."""
    from flywheel.curate.embed import Encoder
    from flywheel.label.reference import demonstrated

    s = Settings()
    runs = demonstrated(s.replay.shift, s.label.reference_runs, s.replay.seed)
    return Familiar.of(Encoder.load(bundle), runs)


def _known(bundle: Path, root: Path, seeds: int) -> tuple[list[Known], int]:
    """Attempts of every case, shuffled alike every time, and how many were not to be counted."""
    familiar = known_familiar(bundle)
    found: list[Known] = []
    dropped = 0
    sound: dict[int, bool] = {}
    for case in CASES:
        attempt = Watched(bundle, case.shift, record=True, operator_takes_over=True)
        loop = attempt.lockstep
        if case.cause in (Cause.HARDWARE, Cause.SAFETY):
            robot = FaultyRobot(attempt.robot, case.name)
            loop.system1.robot, loop.system2.perception = robot, robot
        if case.cause is Cause.INTEGRATION:
            attempt.use(NotNumbers(attempt.policy))
        me = Identity("bench", case.name, "lockstep", EPOCH_NS, __version__, shift=case.shift)
        settings = RecorderSettings(baseline_fraction=1.0)
        for i in range(seeds):
            seed = FIRST_SEED + i
            directory = root / f"{case.name}-{i}"
            loop.recorder = recorder = Recorder(loop.rings, settings, directory, me, seed=i)
            result = attempt.run(seed, latency_ms=case.latency_ms)
            mode, phase = attempt.truth(case)
            recorder.finish(loop.now_ns)
            won = result.outcome is Outcome.SUCCESS
            if case.name == "lab":
                sound[seed] = won
            elif case.shift == "lab" and (won or not sound[seed]):
                dropped += 1
                continue
            whole = _whole(directory)
            if whole is not None:
                e = episode.read(whole)
                truth = {
                    Aspect.OUTCOME: result.outcome.value,
                    Aspect.FAILURE_MODE: mode.value,
                    Aspect.PHASE: phase.value,
                    Aspect.CAUSE: (Cause.NONE if won else case.cause).value,
                }
                found.append(
                    Known(e.manifest.episode_id, case.name, evidence(signals(e, familiar))[0], truth)
                )
        attempt.close()
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order], dropped
