"""The stage: current policy and data in, a portable checkpoint out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from flywheel.config import TrainSettings
from flywheel.dataset import dataset_digest
from flywheel.dataset.yardstick import SOURCES, refuse_kept
from flywheel.errors import StageError
from flywheel.train import ranks
from flywheel.train.loop import Job
from flywheel.vla import localise, working_copy

# What the next turn's curation takes up: names of clusters, and what has been held out.
HANDED_ON = ("clusters.json", SOURCES)
OnProgress = Callable[[int, int, float], None]  # step, of, loss


@dataclass(frozen=True)
class TrainResult:
    """``loss``: mean over the last log window. ``shares``: frames of (new data, replay)."""

    steps: int
    loss: float
    first_loss: float
    new_frames: int
    replay_frames: int
    shares: tuple[float, ...]
    dataset_digest: str
    replay_digest: str
    held_out: int  # episodes kept from the data, none of which was trained on: checked by hash
    seconds: float


def train(
    policy: Path,
    dataset: Path,
    out: Path,
    settings: TrainSettings | None = None,
    *,
    replay: Path | None = None,
    curve: Path | None = None,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Fine-tune the checkpoint ``policy`` on ``dataset`` mixed with ``replay``; the result goes to ``out``.

    ``curve`` is a TSV (step, loss, lr) that DVC plots. Normalisation stays the checkpoint's: it is part of
    what its weights mean.

    Raises:
        BundleError: ``policy`` is no checkpoint.
        StageError: no data, data that is kept for evaluation, or the loss is not finite.
    """
    settings = TrainSettings() if settings is None else settings
    started = time.monotonic()
    datasets = [dataset, *([replay] if replay is not None and settings.replay_fraction > 0 else [])]
    held_out = refuse_kept(datasets)
    work = out.with_name(out.name + ".work")
    shutil.rmtree(work, ignore_errors=True)
    start = working_copy(policy, work / "start")
    log: list[tuple[int, float, float]] = []

    def note(step: int, loss: float, rate: float) -> None:
        log.append((step, loss, rate))
        if on_progress is not None:
            on_progress(step, settings.steps, loss)

    mixed = ranks.run(Job(start, tuple(datasets), work / "run", settings), note)
    if not log or not all(loss == loss for _, loss, _ in log):
        raise StageError(f"{dataset}: training gave no finite loss; see the log above")
    last = work / "run" / "checkpoints" / "last" / "pretrained_model"
    staging = work / "done"
    shutil.copytree(last, staging)
    shutil.copytree(policy / "vlm", staging / "vlm", dirs_exist_ok=True)
    for name in HANDED_ON:
        if (dataset / name).exists():
            shutil.copyfile(dataset / name, staging / name)
    (staging / "train_config.json").unlink(missing_ok=True)  # holds paths of this run
    localise(staging)
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    shutil.rmtree(work)
    if curve is not None:
        curve.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"{s}\t{loss:.6g}\t{lr:.6g}\n" for s, loss, lr in log)
        curve.write_text("step\tloss\tlr\n" + rows)
    return TrainResult(
        steps=settings.steps,
        loss=log[-1][1],
        first_loss=log[0][1],
        new_frames=mixed.frames[0],
        replay_frames=sum(mixed.frames[1:]),
        shares=mixed.shares,
        dataset_digest=dataset_digest(dataset),
        replay_digest=dataset_digest(replay) if replay is not None else "",
        held_out=held_out,
        seconds=time.monotonic() - started,
    )


def write_metrics(result: TrainResult, path: Path) -> None:
    """``train.json``: the figures that DVC tracks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1, sort_keys=True) + "\n")
