"""lerobot's training loop on data in memory.

What the loop does not offer is put in from outside, by replacing two names in its module for the run: the
dataset (from memory, in stated shares, with actions relative to the tool) and the logger. Everything else is
lerobot's: optimiser, schedule, accelerate, checkpoints, LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.config import TrainSettings
from flywheel.dataset import CachedDataset, load_frames
from flywheel.dataset.frames import ACTION, STATE
from flywheel.vla import load, offline

RELATIVE = 3  # x, y, z of an action are learned relative to the state's
Note = Callable[[int, float, float], None]  # step, loss, learning rate


class RelativeActions(CachedDataset):
    """Items whose action chunk is relative to the tool's position in the same item."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As ``CachedDataset``; ``action[..., :3]`` minus ``observation.state[:3]``."""
        item = super().__getitem__(index)
        now = item[STATE].reshape(-1, item[STATE].shape[-1])[-1]  # lerobot may ask for a history
        item[ACTION][..., :RELATIVE] -= now[:RELATIVE]
        return item


@dataclass(frozen=True)
class Job:
    """One training run. ``start``: a working copy of the checkpoint; ``datasets``: new data, then replay."""

    start: Path
    datasets: tuple[Path, ...]
    out: Path
    settings: TrainSettings

    @property
    def weights(self) -> list[float]:
        """Shares of the datasets."""
        r = self.settings.replay_fraction
        return [1.0] if len(self.datasets) == 1 else [1.0 - r, r]


@dataclass(frozen=True)
class Mixed:
    """What was trained on: frames of each dataset, and the share that each had."""

    frames: tuple[int, ...]
    shares: tuple[float, ...]


def run(job: Job, note: Note, rank: int = 0, ranks: int = 1) -> Mixed:
    """Train; checkpoints go to ``job.out``. As one of several ranks, torch's process group is up already."""
    import torch

    offline()
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.default import DatasetConfig, PeftConfig, WandBConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.scripts import lerobot_train

    settings = job.settings
    torch.set_num_threads(max(1, settings.threads // ranks))
    parts = [load_frames(d) for d in job.datasets]
    policy: Any = PreTrainedConfig.from_pretrained(job.start)
    policy.pretrained_path = job.start
    policy.device = "cpu"
    policy.push_to_hub = False
    policy.optimizer_lr = settings.learning_rate
    policy.scheduler_warmup_steps = max(1, settings.steps // 20)
    policy.scheduler_decay_steps = settings.steps
    policy.scheduler_decay_lr = settings.learning_rate / 30
    config = TrainPipelineConfig(
        dataset=DatasetConfig(repo_id="local/turn", root=str(job.start)),
        policy=policy,
        output_dir=job.out,
        job_name="turn",
        seed=settings.seed,
        num_workers=0,
        batch_size=settings.batch_size // ranks,
        steps=settings.steps,
        log_freq=min(20, settings.steps),
        env_eval_freq=0,
        save_freq=0,
        wandb=WandBConfig(enable=True, project="flywheel", disable_artifact=True),
        peft=PeftConfig(r=settings.lora_rank) if settings.lora_rank else None,
    )
    meta = CachedDataset(parts[:1]).meta
    data = RelativeActions(
        parts, job.weights, resolve_delta_timestamps(policy, meta), stats=_arrays(load(job.start).stats)
    )

    class Logger:
        """What lerobot's loop asks of its logger."""

        def __init__(self, cfg: Any) -> None:
            del cfg

        def log_dict(self, d: dict[str, Any], step: int | None = None, mode: str = "train") -> None:
            if mode == "train" and step is not None:
                note(step, float(d["loss"]), float(d["lr"]))

        def log_policy(self, checkpoint_dir: Path) -> None:
            del checkpoint_dir

    def datasets(cfg: Any) -> tuple[RelativeActions, None]:
        del cfg
        if rank > 0:
            torch.manual_seed(settings.seed + rank)  # or all ranks would draw the same noise
        return data, None

    module: Any = lerobot_train
    saved = module.make_train_eval_datasets, module.WandBLogger
    module.make_train_eval_datasets, module.WandBLogger = datasets, Logger
    try:
        module.train(config)
    finally:
        module.make_train_eval_datasets, module.WandBLogger = saved
    return Mixed(tuple(len(p) for p in parts), tuple(data.shares))


def _arrays(stats: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        key: {name: np.asarray(v, np.float32) for name, v in values.items()} for key, values in stats.items()
    }
