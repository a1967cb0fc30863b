"""The stage: current policy and data in, a portable checkpoint out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flywheel.config import TrainSettings
from flywheel.dataset import dataset_digest, frames_in
from flywheel.dataset.yardstick import SOURCES, Yardstick, refuse_kept
from flywheel.errors import StageError
from flywheel.schema import sha256_file
from flywheel.train import ranks
from flywheel.train.averaging import average
from flywheel.train.loop import Job, Mixed
from flywheel.train.merging import ADAPTER, merge
from flywheel.train.pools import Part, parts, steps
from flywheel.vla import BACKBONE, SIGNATURE_FILE, SMOLVLA, WEIGHTS_FILE, check, localise, working_copy

NOTES, MINE = "notes.jsonl", "job.json"  # in the working directory: the curve so far, and whose it is
# What the next turn's curation takes up: names of clusters, and what has been held out.
HANDED_ON = ("clusters.json", SOURCES)
OnProgress = Callable[[int, int, float], None]  # step, of, loss


@dataclass(frozen=True)
class Pool:
    """One of ``flywheel.train.pools``: its frames, their share of what was drawn, its datasets' digests."""

    frames: int
    share: float
    datasets: tuple[str, ...]


@dataclass(frozen=True)
class TrainResult:
    """``loss``: mean over the last log window. ``pools``: what was trained on, by ``train.pools``.

    ``interventions``: share of the frames in which a person acted; ``kept_weights``: share of the weights
    before in those after; ``resumed``: at which step, 0 if not.
    """

    steps: int
    loss: float
    first_loss: float
    pools: dict[str, Pool]
    held_out: int  # episodes kept from the data, none of which was trained on: checked by hash
    seconds: float
    interventions: float = 0.0
    kept_weights: float = 0.0
    resumed: int = 0


def train(
    policy: Path,
    dataset: Path,
    out: Path,
    settings: TrainSettings | None = None,
    *,
    replay: Path | None = None,
    earlier: Sequence[Path] = (),
    yardstick: Path | None = None,
    curve: Path | None = None,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Fine-tune the checkpoint ``policy`` on ``dataset`` mixed with old data; the result goes to ``out``.

    Old data are ``earlier``, the datasets of earlier turns, and ``replay``, demonstrations of the lab, in the
    shares of ``pools``. ``yardstick`` is what may never be trained on, in any of them.
    ``curve`` is a TSV (step, loss, lr) that DVC plots. Normalisation stays the checkpoint's: it is part of
    what its weights mean. With ``earlier`` ones the result lies between the policy before and the one trained
    (``flywheel.train.averaging``, ``settings.kept_weights``). A run that was ended is gone on with from its
    last checkpoint (``settings.checkpoint_steps``) by the same call with the same data, policy and settings;
    what it left of any other run is removed.

    Raises:
        BundleError: ``policy`` is no checkpoint.
        StageError: no data, data that is kept for evaluation, settings that are not for such a policy, or
            the loss is not finite.
        ConfigError: the yardstick cannot be read.
    """
    settings = TrainSettings() if settings is None else settings
    started = time.monotonic()
    mix = parts(dataset, earlier, replay, settings)
    held_out = refuse_kept([p.root for p in mix], None if yardstick is None else Yardstick.load(yardstick))
    _require_trainable(policy, check(policy), settings)
    settings = settings.model_copy(update={"steps": steps(mix[0], frames_in(dataset), settings)})
    digests = [dataset_digest(p.root) for p in mix]
    work = out.with_name(out.name + ".work")
    job, log, resumed = _prepare(work, policy, mix, digests, settings)

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
    kept = settings.kept_weights if earlier else 0.0
    if kept:
        average(job.start, staging, kept)
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
        pools=_pools(mix, digests, mixed),
        held_out=held_out,
        seconds=time.monotonic() - started,
        interventions=mixed.interventions,
        kept_weights=kept,
        resumed=resumed,
    )


def _pools(mix: Sequence[Part], digests: Sequence[str], mixed: Mixed) -> dict[str, Pool]:
    found: dict[str, Pool] = {}
    for part, digest, frames, share in zip(mix, digests, mixed.frames, mixed.shares, strict=True):
        p = found.get(part.pool, Pool(0, 0.0, ()))
        found[part.pool] = Pool(p.frames + frames, p.share + share, (*p.datasets, digest))
    return found


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
    work: Path, policy: Path, mix: tuple[Part, ...], digests: list[str], settings: TrainSettings
) -> tuple[Job, list[tuple[int, float, float]], int]:
    """The job, what it has noted, its step: an earlier run's, if that was the same and got so far."""
    mine = json.dumps(
        [
            sha256_file(policy / WEIGHTS_FILE),
            [(p.pool, d) for p, d in zip(mix, digests, strict=True)],
            settings.model_dump(mode="json"),
        ],
        sort_keys=True,
    )
    job = Job(work / "start", mix, work / "run", settings)
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
