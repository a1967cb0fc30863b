"""The stage: current policy and data in, a portable checkpoint out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flywheel.config import TrainSettings
from flywheel.dataset import dataset_digest
from flywheel.dataset.yardstick import SOURCES, refuse_kept
from flywheel.errors import StageError
from flywheel.schema import sha256_file
from flywheel.train import ranks
from flywheel.train.loop import Job
from flywheel.train.merging import ADAPTER, merge
from flywheel.vla import BACKBONE, SIGNATURE_FILE, SMOLVLA, check, localise, working_copy

NOTES, MINE = "notes.jsonl", "job.json"  # in the working directory: the curve so far, and whose it is
# What the next turn's curation takes up: names of clusters, and what has been held out.
HANDED_ON = ("clusters.json", SOURCES)
OnProgress = Callable[[int, int, float], None]  # step, of, loss


@dataclass(frozen=True)
class TrainResult:
    """``loss``: mean over the last log window. ``shares``: frames of (new data, replay).

    ``interventions``: share of the frames in which a person acted; ``resumed``: at which step, 0 if not.
    """

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
    interventions: float = 0.0
    resumed: int = 0


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
    what its weights mean. A run that was ended is gone on with from its last checkpoint
    (``settings.checkpoint_steps``) by the same call with the same data, policy and settings; what it left of
    any other run is removed.

    Raises:
        BundleError: ``policy`` is no checkpoint.
        StageError: no data, data that is kept for evaluation, settings that are not for such a policy, or
            the loss is not finite.
    """
    settings = TrainSettings() if settings is None else settings
    started = time.monotonic()
    datasets = [dataset, *([replay] if replay is not None and settings.replay_fraction > 0 else [])]
    held_out = refuse_kept(datasets)
    _require_trainable(policy, check(policy), settings)
    digests = [dataset_digest(d) for d in datasets]
    work = out.with_name(out.name + ".work")
    job, log, resumed = _prepare(work, policy, datasets, digests, settings)

    def note(step: int, loss: float, rate: float) -> None:
        log.append((step, loss, rate))
        with (work / NOTES).open("a") as f:
            f.write(json.dumps(log[-1]) + "\n")
        if on_progress is not None:
            on_progress(step, settings.steps, loss)

    mixed = ranks.run(job, note)
    if not log or not all(loss == loss for _, loss, _ in log):
        raise StageError(f"{dataset}: training gave no finite loss; see the log above")
    last = job.last / "pretrained_model"
    staging = work / "done"
    shutil.rmtree(staging, ignore_errors=True)
    if (last / ADAPTER).exists():
        merge(last, job.start, staging)
    else:
        shutil.copytree(last, staging)
    if (policy / BACKBONE).exists():
        shutil.copytree(policy / BACKBONE, staging / BACKBONE, dirs_exist_ok=True)
    if (policy / SIGNATURE_FILE).exists():
        shutil.copyfile(policy / SIGNATURE_FILE, staging / SIGNATURE_FILE)
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
        dataset_digest=digests[0],
        replay_digest=dataset_digest(replay) if replay is not None else "",
        held_out=held_out,
        seconds=time.monotonic() - started,
        interventions=mixed.interventions,
        resumed=resumed,
    )


def _require_trainable(policy: Path, kind: str, settings: TrainSettings) -> None:
    """lerobot has neither adapters' targets nor a loss by sample for ACT."""
    if kind == SMOLVLA:
        return
    for name, value, plain in (
        ("lora_rank", settings.lora_rank, 0),
        ("intervention_weight", settings.intervention_weight, 1.0),
    ):
        if value != plain:
            raise StageError(
                f"{policy}: train.{name} = {value:g} is for {SMOLVLA!r} alone, and this is {kind!r}: "
                f"set it to {plain:g}"
            )


def _prepare(
    work: Path, policy: Path, datasets: list[Path], digests: list[str], settings: TrainSettings
) -> tuple[Job, list[tuple[int, float, float]], int]:
    """The job, what it has noted, its step: an earlier run's, if that was the same and got so far."""
    mine = json.dumps(
        [sha256_file(policy / "model.safetensors"), digests, settings.model_dump(mode="json")], sort_keys=True
    )
    job = Job(work / "start", tuple(datasets), work / "run", settings)
    step = _step(job)
    if step and (work / MINE).exists() and (work / MINE).read_text() == mine:
        log = [row for row in _noted(work / NOTES) if row[0] <= step]
        (work / NOTES).write_text("".join(json.dumps(row) + "\n" for row in log))
        return replace(job, resume=True), log, step
    shutil.rmtree(work, ignore_errors=True)
    working_copy(policy, job.start)
    (work / NOTES).touch()
    (work / MINE).write_text(mine)
    return job, [], 0


def _noted(path: Path) -> list[tuple[int, float, float]]:
    """The curve so far; a line that the end of its run cut off is left out."""
    log = []
    for line in path.read_text().splitlines():
        try:
            step, loss, rate = json.loads(line)
            log.append((int(step), float(loss), float(rate)))
        except (ValueError, TypeError):
            continue
    return log


def _step(job: Job) -> int:
    """Of the newest checkpoint that is complete; 0 without one."""
    try:
        doc = json.loads((job.last / "training_state" / "training_step.json").read_text())
        return int(doc["step"])
    except (OSError, ValueError, KeyError):
        return 0


def write_metrics(result: TrainResult, path: Path) -> None:
    """``train.json``: the figures that DVC tracks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1, sort_keys=True) + "\n")
