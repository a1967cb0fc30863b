"""The train stage: lerobot's own training loop, from the current policy, on corrections and replay.

What lerobot's loop does not offer is put in from outside, by replacing two names in its module for the run:
the dataset (from memory, in stated shares, with actions relative to the tool) and the logger (DVC's plots).
Everything else is lerobot's: optimiser, schedule, accelerate, checkpoints, LoRA.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flywheel.config import TrainSettings
from flywheel.dataset import CachedDataset, Frames, dataset_digest, load_frames
from flywheel.dataset.frames import ACTION, STATE
from flywheel.errors import StageError
from flywheel.vla import load, localise, offline, working_copy

RELATIVE = 3  # x, y, z of an action are learned relative to the state's
OnProgress = Callable[[int, int, float], None]  # step, of, loss


class RelativeActions(CachedDataset):
    """Items whose action chunk is relative to the tool's position in the same item."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As ``CachedDataset``; ``action[..., :3]`` minus ``observation.state[:3]``."""
        item = super().__getitem__(index)
        now = item[STATE].reshape(-1, item[STATE].shape[-1])[-1]  # lerobot may ask for a history
        item[ACTION][..., :RELATIVE] -= now[:RELATIVE]
        return item


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
        StageError: no data, or the loss is not finite.
    """
    settings = TrainSettings() if settings is None else settings
    started = time.monotonic()
    offline()
    parts = [load_frames(dataset)]
    if replay is not None and settings.replay_fraction > 0:
        parts.append(load_frames(replay))
    work = out.with_name(out.name + ".work")
    shutil.rmtree(work, ignore_errors=True)
    start = working_copy(policy, work / "start")
    stats = load(policy).stats
    log: list[tuple[int, float, float]] = []

    def note(step: int, loss: float, rate: float) -> None:
        log.append((step, loss, rate))
        if on_progress is not None:
            on_progress(step, settings.steps, loss)

    shares = _run(start, parts, stats, work / "run", settings, note)
    if not log or not all(loss == loss for _, loss, _ in log):
        raise StageError(f"{dataset}: training gave no finite loss; see the log above")
    last = work / "run" / "checkpoints" / "last" / "pretrained_model"
    staging = work / "done"
    shutil.copytree(last, staging)
    shutil.copytree(policy / "vlm", staging / "vlm", dirs_exist_ok=True)
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
        new_frames=len(parts[0]),
        replay_frames=len(parts[1]) if len(parts) > 1 else 0,
        shares=shares,
        dataset_digest=dataset_digest(dataset),
        replay_digest=dataset_digest(replay) if replay is not None else "",
        seconds=time.monotonic() - started,
    )


def _run(
    start: Path,
    parts: list[Frames],
    stats: dict[str, dict[str, Any]],
    out: Path,
    settings: TrainSettings,
    note: Callable[[int, float, float], None],
) -> tuple[float, ...]:
    """lerobot's loop; returns the shares of the parts."""
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.default import DatasetConfig, PeftConfig, WandBConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.scripts import lerobot_train

    torch.set_num_threads(settings.threads)
    policy: Any = PreTrainedConfig.from_pretrained(start)
    policy.pretrained_path = start
    policy.device = "cpu"
    policy.push_to_hub = False
    policy.optimizer_lr = settings.learning_rate
    policy.scheduler_warmup_steps = max(1, settings.steps // 20)
    policy.scheduler_decay_steps = settings.steps
    policy.scheduler_decay_lr = settings.learning_rate / 30
    config = TrainPipelineConfig(
        dataset=DatasetConfig(repo_id="local/turn", root=str(start)),
        policy=policy,
        output_dir=out,
        job_name="turn",
        seed=settings.seed,
        num_workers=0,
        batch_size=settings.batch_size,
        steps=settings.steps,
        log_freq=min(20, settings.steps),
        env_eval_freq=0,
        save_freq=0,
        wandb=WandBConfig(enable=True, project="flywheel", disable_artifact=True),
        peft=PeftConfig(r=settings.lora_rank) if settings.lora_rank else None,
    )
    weights = [1.0] if len(parts) == 1 else [1.0 - settings.replay_fraction, settings.replay_fraction]
    meta = CachedDataset(parts[:1]).meta
    data = RelativeActions(parts, weights, resolve_delta_timestamps(policy, meta), stats=_arrays(stats))

    class Logger:
        """What lerobot's loop asks of its logger."""

        def __init__(self, cfg: Any) -> None:
            del cfg

        def log_dict(self, d: dict[str, Any], step: int | None = None, mode: str = "train") -> None:
            if mode == "train" and step is not None:
                note(step, float(d["loss"]), float(d["lr"]))

        def log_policy(self, checkpoint_dir: Path) -> None:
            del checkpoint_dir

    module: Any = lerobot_train
    saved = module.make_train_eval_datasets, module.WandBLogger
    module.make_train_eval_datasets = lambda cfg: (data, None)
    module.WandBLogger = Logger
    try:
        module.train(config)
    finally:
        module.make_train_eval_datasets, module.WandBLogger = saved
    return tuple(data.shares)


def _arrays(stats: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    import numpy as np

    return {
        key: {name: np.asarray(v, np.float32) for name, v in values.items()} for key, values in stats.items()
    }


def write_metrics(result: TrainResult, path: Path) -> None:
    """``train.json``: the figures that DVC tracks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1, sort_keys=True) + "\n")
