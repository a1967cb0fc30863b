"""What poison that got through does: to the dataset, and where that changes, to the policy trained on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flywheel.bench.poison import Poisoned
from flywheel.bench.turn_steps import stage
from flywheel.config import CurateSettings
from flywheel.curate import curate
from flywheel.evaluate import Evaluator, Job, scene_seeds
from flywheel.stats import paired_difference
from flywheel.turn import BASE_POLICY

SCENES = 100  # of the shift that was recorded; neither training nor a gate draws there
SEED = 50_000
CHANGES = ("success_change_by_poison", "success_change_by_poison_low", "success_change_by_poison_high")
TRIED = 4  # changed datasets that a policy is trained on, at most: each takes about five minutes


@dataclass
class Inputs:
    """Datasets made from the sound episodes alone and from each input with poison; those that differ stay."""

    alone: Path
    count: int = 0
    changed: list[Path] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, float]:
        return {
            "inputs_with_poison": float(self.count),
            "datasets_changed_by_poison": float(len(self.changed)),
        }


def inputs(
    sound: Sequence[Path],
    made: Sequence[Poisoned],
    root: Path,
    settings: CurateSettings,
    share: float,
    rounds: int,
    seed: int,
) -> Inputs:
    """Curate the sound episodes, then them and ``share`` of poison, until all of it or ``rounds`` were in:
    where the dataset is the same, byte for byte, the poison cannot change what is learned."""

    def made_of(name: str, parts: Sequence[Path]) -> tuple[Path, str]:
        inbox = root / name / "in"
        inbox.mkdir(parents=True)
        for i, d in enumerate(parts):
            beside = inbox / d.name
            shutil.copytree(
                d, beside if not beside.exists() else inbox / f"{d.name}-{i}", copy_function=os.link
            )
        result = curate(inbox, root / name / "out", settings)
        shutil.rmtree(inbox)
        return root / name / "out" / "dataset", result.dataset_sha256

    alone, digest = made_of("alone", sound)
    found = Inputs(alone)
    each = max(1, round(len(sound) * share / (1 - share)))
    order = np.random.default_rng(seed).permutation(len(made))
    for k in range(0, len(order), each)[:rounds]:
        dataset, other = made_of(f"poison{k}", [*sound, *(made[i].directory for i in order[k : k + each])])
        found.count += 1
        if other == digest:
            shutil.rmtree(root / f"poison{k}")
        else:
            found.changed.append(dataset)
    return found


def success(found: Inputs, shift: str, root: Path, checkout: Path) -> dict[str, float]:
    """Success in ``shift`` of policies trained with the poison that got through, less that of the one trained
    without any, on the same scenes; of the worst of them. Where no dataset differs no policy does.

    Stages are the product's commands with the settings of the checkout.
    """
    if not found.changed:
        return dict.fromkeys((*CHANGES, "datasets_tried"), 0.0)
    params, policy = str(checkout / "params.yaml"), str(checkout / BASE_POLICY)
    replay = root / "replay"
    stage("replay", "--out", str(replay), "--params", params)
    solved: list[list[bool]] = []
    for k, dataset in enumerate([found.alone, *found.changed[:TRIED]]):
        here = root / str(k)
        stage("train", "--policy", policy, "--dataset", str(dataset), "--replay", str(replay),
              "--out", str(here / "checkpoint"), "--params", params)  # fmt: skip
        stage("export", "--checkpoint", str(here / "checkpoint"), "--out", str(here / "bundle"),
              "--observations", str(dataset), "--params", params)  # fmt: skip
        with Evaluator() as pool:
            attempts = pool.run([Job(here / "bundle", shift, s) for s in scene_seeds(SEED, SCENES)])
        solved.append([a.success for a in attempts])
    worst = min((paired_difference(solved[0], s) for s in solved[1:]), key=lambda d: d.diff)
    return {
        "datasets_tried": float(len(solved) - 1),
        "success_without_poison": sum(solved[0]) / SCENES,
        **dict(zip(CHANGES, (worst.diff, worst.low, worst.high), strict=True)),
    }
