"""Steps of the study of several turns (``flywheel.bench.turns``), each a process of its own.

    python -m flywheel.bench.turn_steps record | learn | evaluate | demonstrate '<JSON of its task>'

The stages are the product's commands, called as dvc.yaml calls them. What surrounds them stands in for the
fleet and the store: attempts in lockstep with the robots' own runtime and recorder, and a directory in place
of ``datasets/``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flywheel import __version__
from flywheel.attempt import Attempt
from flywheel.config import Settings
from flywheel.curate import DATASET, METRICS, CurateResult
from flywheel.dataset import dataset_digest
from flywheel.dataset.earlier import EARLIER, Earlier, EarlierTurn
from flywheel.edge.recorder import Identity, Recorder
from flywheel.evaluate import Evaluator, Job, scene_seeds
from flywheel.policies import digest_of
from flywheel.schema import Outcome
from flywheel.twin.cell import CAMERAS

EPOCH_NS = 1_767_225_600_000_000_000  # 2026-01-01
DAY_NS = 86_400_000_000_000
TRIES = 12  # attempts to one failure, at most; a policy that fails more rarely has little to learn there


@dataclass(frozen=True)
class Record:
    """Collect ``failures`` corrected failures of ``bundle`` in ``shift`` by each robot, into ``out``."""

    bundle: str
    shift: str
    turn: int
    robots: tuple[int, ...]
    failures: int
    params: str
    out: str


@dataclass(frozen=True)
class Learn:
    """Curate ``episodes`` by ``choice``, fine-tune ``policy`` and export; ``root`` holds what comes of it.

    ``share``: of the usable episodes that the choice may take. ``before``: the roots of earlier turns, the
    newest first.
    """

    episodes: tuple[str, ...]
    policy: str
    choice: str
    share: float
    before: tuple[str, ...]
    replay: str
    params: str
    yardstick: str
    root: str


@dataclass(frozen=True)
class Evaluate:
    """Attempts of ``bundle`` on the first scenes of ``seed`` in each shift: ``scenes`` by shift."""

    bundle: str
    scenes: dict[str, int]
    seed: int


@dataclass(frozen=True)
class Demonstrate:
    """The lab's demonstrations for replay."""

    params: str
    out: str


def record(task: Record) -> dict[str, Any]:
    """Counts of attempts and failures."""
    settings = Settings.load(task.params)
    shutil.rmtree(task.out, ignore_errors=True)
    attempts = failures = 0
    for robot in task.robots:
        n, failed = _one_robot(task, robot, settings)
        attempts, failures = attempts + n, failures + failed
    return {"attempts": attempts, "failures": failures}


def _one_robot(task: Record, number: int, settings: Settings) -> tuple[int, int]:
    attempt = Attempt(
        Path(task.bundle),
        task.shift,
        record=True,
        operator_takes_over=True,
        episode_s=settings.twin.episode_s,
        settings=settings.edge,
        jpeg_quality=settings.recorder.quality(CAMERAS),
    )
    me = Identity(
        "study",
        f"robot-{number:02d}",
        "lockstep",
        EPOCH_NS + task.turn * DAY_NS,
        __version__,
        settings.edge.control_hz,
        settings.edge.policy_hz,
        task.shift,
    )
    recorder = Recorder(
        attempt.lockstep.rings, settings.recorder, Path(task.out), me, seed=100 * task.turn + number
    )
    attempt.lockstep.recorder = recorder
    seeds = np.random.default_rng([settings.twin.seed, task.turn, number])
    attempts = failures = 0
    try:
        while failures < task.failures and attempts < TRIES * task.failures:
            result = attempt.run(int(seeds.integers(1 << 20, 1 << 31)))
            attempts += 1
            failures += result.outcome is not Outcome.SUCCESS and result.operator_outcome is Outcome.SUCCESS
        recorder.finish(attempt.lockstep.now_ns)
    finally:
        attempt.close()
    return attempts, failures


def learn(task: Learn) -> dict[str, Any]:
    """What was usable, what was taken, and what ``train.json`` says."""
    root = Path(task.root)
    inbox = _gathered(task.episodes, root / "episodes")
    episodes = ("--episodes", str(inbox), "--policy", task.policy, "--yardstick", task.yardstick)
    everything = _curate(root / "all", _params(task, root / "all.yaml", choice="all"), *episodes)
    curated, usable, result = root / "all", everything.taken, everything
    params = _params(task, root / "params.yaml", choice=task.choice)
    if task.choice != "all":
        curated = root / "curated"
        params = _params(task, root / "params.yaml", choice=task.choice, budget=int(task.share * usable))
        result = _curate(curated, params, *episodes)
    dataset = curated / DATASET
    _earlier(task, root / "earlier")
    stage("train", "--policy", task.policy, "--dataset", str(dataset), "--replay", task.replay,
              "--earlier", str(root / "earlier"), "--yardstick", task.yardstick,
              "--out", str(root / "checkpoint"), "--metrics", str(root / "train.json"),
              "--params", str(params))  # fmt: skip
    stage("export", "--checkpoint", str(root / "checkpoint"), "--out", str(root / "bundle"),
              "--observations", str(dataset), "--params", str(params))  # fmt: skip
    shutil.rmtree(root / "checkpoint" / "bundle", ignore_errors=True)
    shutil.copytree(root / "bundle", root / "checkpoint" / "bundle")  # laid out as models/base is
    shutil.rmtree(inbox)
    return {
        "candidates": result.candidates,
        "usable": usable,
        "taken": result.taken,
        "held_out": result.held_out,
        "frames": result.frames,
        "dataset": dataset_digest(dataset),
        "dataset_at": str(dataset),
        "policy": digest_of(root / "bundle"),
        "train": json.loads((root / "train.json").read_text()),
    }


def _gathered(directories: tuple[str, ...], into: Path) -> Path:
    """One directory of all episodes; their files are links, which nobody writes through."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for d in map(Path, directories):
        for e in sorted(d.iterdir()):
            if e.is_dir() and not e.name.startswith("."):
                shutil.copytree(e, into / e.name, copy_function=os.link)
    return into


def _curate(out: Path, params: Path, *arguments: str) -> CurateResult:
    stage("curate", *arguments, "--out", str(out), "--params", str(params))
    return CurateResult.model_validate_json((out / METRICS).read_bytes())


def _params(task: Learn, path: Path, **curate: Any) -> Path:
    """The study's settings with this curation's."""
    from flywheel.turn import BASE_POLICY, adjusted

    path.parent.mkdir(parents=True, exist_ok=True)
    changed = {f"curate.{k}": v for k, v in curate.items()}
    path.write_text(adjusted(Path(task.params).read_text(), changed, BASE_POLICY))
    return path


def _earlier(task: Learn, into: Path) -> None:
    """What a turn finds in ``data/earlier``."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    turns = []
    for root in map(Path, task.before):
        done = json.loads((root / "learn.json").read_text())
        shutil.copytree(done["dataset_at"], into / done["dataset"])
        turns.append(EarlierTurn(turn=root.name, policy=done["policy"], dataset=done["dataset"]))
    (into / EARLIER).write_bytes(Earlier(turns=tuple(turns)).to_bytes())


def evaluate(task: Evaluate) -> dict[str, Any]:
    """By shift, whether each scene was solved, in the order of the scenes: policies are paired by them."""
    bundle = Path(task.bundle)
    with Evaluator(1) as pool:
        found = {
            shift: pool.run([Job(bundle, shift, s) for s in scene_seeds(task.seed, n)])
            for shift, n in task.scenes.items()
        }
    return {
        "policy": digest_of(bundle),
        "solved": {shift: [a.success for a in attempts] for shift, attempts in found.items()},
    }


def demonstrate(task: Demonstrate) -> dict[str, Any]:
    """The digest of what was written."""
    stage("replay", "--out", task.out, "--params", task.params)
    return {"dataset": dataset_digest(Path(task.out))}


def stage(*arguments: str) -> None:
    """Run one of the product's commands; raises ``CalledProcessError``."""
    command = [sys.executable, "-c", "from flywheel.cli import main; main()", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


TASKS = {
    "record": (Record, record),
    "learn": (Learn, learn),
    "evaluate": (Evaluate, evaluate),
    "demonstrate": (Demonstrate, demonstrate),
}


def command(task: Record | Learn | Evaluate | Demonstrate, result: Path) -> list[str]:
    """What runs a task; its result is written to ``result``, whole or not at all."""
    name = type(task).__name__.lower()
    return [sys.executable, "-m", __name__, name, json.dumps(asdict(task)), str(result)]


def main() -> None:
    """A step's process."""
    name, given, result = sys.argv[1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the stage that is under way, too
    kind, run = TASKS[name]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(given).items()}
    found = run(kind(**fields))  # type: ignore[operator]
    fresh = Path(f"{result}.part")
    fresh.write_text(json.dumps(found, sort_keys=True) + "\n")
    fresh.replace(result)


if __name__ == "__main__":
    main()
