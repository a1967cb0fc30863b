"""lerobot's training loop on data in memory.

What the loop does not offer is put in from outside, by replacing names in its module for the run: the
dataset (from memory, in stated shares, with actions relative to the tool), how much each of its frames
weighs, and the logger. Everything else is lerobot's: optimiser, schedule, accelerate, checkpoints, resuming,
LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel.config import TrainSettings
from flywheel.dataset import CachedDataset, load_frames
from flywheel.dataset.frames import ACTION, STATE
from flywheel.dataset.writing import INTERVENTION
from flywheel.train.pools import Part
from flywheel.vla import offline, signature, statistics

# Every linear layer but the unused head (which peft's "all-linear" adapts, and then stores the vocabulary).
# Measured: lerobot's own targets leave the eyes as they are, and do not mend a shift that is seen.
LORA_TARGETS = r"model\.(?!.*_head).*(_proj|\.proj|\.fc[12]|_mlp_in|_mlp_out)"
Note = Callable[[int, float, float], None]  # step, loss, learning rate


class RelativeActions(CachedDataset):
    """Items whose actions are relative to the same item's state, in their first ``relative`` numbers."""

    relative: int = 0
    before_first: Callable[[], None] | None = None  # called once, before the first item is made

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As ``CachedDataset``; ``action[..., :relative]`` minus ``observation.state[:relative]``."""
        if self.before_first is not None:
            call, self.before_first = self.before_first, None
            call()
        item = super().__getitem__(index)
        now = item[STATE].reshape(-1, item[STATE].shape[-1])[-1]  # lerobot may ask for a history
        item[ACTION][..., : self.relative] -= now[: self.relative]
        return item

    def interventions(self) -> NDArray[np.bool_]:
        """By index, ``[N]``: whether a person acted in that frame, and it is of the first (new) dataset."""
        out = np.zeros(len(self), bool)
        flags = self._parts[0].columns.get(INTERVENTION)
        if flags is not None:
            for (part, episode), start, end in zip(
                self._episode_of.T, self.from_index, self.to_index, strict=True
            ):
                if part == 0:
                    first = self._parts[0].starts[episode]
                    out[start:end] = flags[first : first + end - start].reshape(-1)
        return out


class InterventionWeights:
    """What lerobot asks of a sample weighter: frames of an intervention count ``weight`` times."""

    def __init__(self, interventions: NDArray[np.bool_], weight: float) -> None:
        self._weights = np.where(interventions, weight, 1.0).astype(np.float32)

    def compute_batch_weights(self, batch: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        """Weights of a batch ``[B]``, of mean 1, by its items' ``index``."""
        import torch

        weights = torch.from_numpy(self._weights[batch["index"].reshape(-1).cpu().numpy()])
        return weights * (len(weights) / weights.sum()), {}

    def get_stats(self) -> dict[str, float]:
        """Nothing that is logged."""
        return {}


@dataclass(frozen=True)
class Job:
    """One training run. ``start``: a working copy of the checkpoint; ``parts``: new data, then old.

    ``resume``: go on from ``out``'s last checkpoint.
    """

    start: Path
    parts: tuple[Part, ...]
    out: Path
    settings: TrainSettings
    resume: bool = False

    @property
    def last(self) -> Path:
        """Where the newest checkpoint lies, once there is one."""
        return self.out / "checkpoints" / "last"


@dataclass(frozen=True)
class Mixed:
    """What was trained on: frames of each dataset, the share that each had, and interventions' share."""

    frames: tuple[int, ...]
    shares: tuple[float, ...]
    interventions: float


def run(job: Job, note: Note, rank: int = 0, ranks: int = 1) -> Mixed:
    """Train; checkpoints go to ``job.out``. As one of several ranks, torch's process group is up already."""
    import torch

    offline()
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.default import DatasetConfig, PeftConfig, WandBConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.sampler import EpisodeAwareSampler
    from lerobot.scripts import lerobot_train
    from lerobot.utils import sample_weighting
    from lerobot.utils.sample_weighting import SampleWeightingConfig

    settings = job.settings
    torch.set_num_threads(max(1, settings.threads // ranks))
    parts = [load_frames(p.root) for p in job.parts]
    start = job.last / "pretrained_model" if job.resume else job.start
    policy: Any = PreTrainedConfig.from_pretrained(start)
    policy.pretrained_path = start
    policy.device = "cpu"
    policy.push_to_hub = False
    policy.optimizer_lr = settings.learning_rate
    # ACT has no schedule and does not look at these.
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
        save_freq=settings.checkpoint_steps,
        resume=job.resume,
        wandb=WandBConfig(enable=True, project="flywheel", disable_artifact=True),
        peft=PeftConfig(target_modules=LORA_TARGETS, r=settings.lora_rank) if settings.lora_rank else None,
    )
    if job.resume:
        config.checkpoint_path = job.last.resolve()
        config.optimizer = policy.get_optimizer_preset()
        config.scheduler = policy.get_scheduler_preset()
    meta = CachedDataset(parts[:1]).meta
    data = RelativeActions(
        parts,
        [p.weight for p in job.parts],
        resolve_delta_timestamps(policy, meta),
        stats=_arrays(statistics(job.start)),
    )
    data.relative = signature(job.start).relative
    interventions = data.interventions()
    if settings.intervention_weight != 1.0:
        config.sample_weighting = SampleWeightingConfig()

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

    class Order(EpisodeAwareSampler):
        """lerobot's order of frames. Accelerate counts epochs from 0 again in a run that is resumed."""

        first = 0

        def load_state_dict(self, state: dict[str, int]) -> None:
            super().load_state_dict(state)
            self.first = state["epoch"]

        def set_epoch(self, epoch: int) -> None:
            super().set_epoch(self.first + epoch)

    def resumed(*args: Any, **options: Any) -> Any:
        found = load_training_state(*args, **options)
        if rank > 0:  # the state is the first rank's
            torch.manual_seed(settings.seed + rank + ranks * found[0])
        # The loader draws a number as it starts, which the run that was ended did long before.
        state = torch.get_rng_state()
        data.before_first = lambda: torch.set_rng_state(state)
        return found

    module: Any = lerobot_train
    load_training_state = module.load_training_state
    weighting: Any = sample_weighting
    instead: dict[tuple[Any, str], Any] = {
        (module, "make_train_eval_datasets"): datasets,
        (module, "WandBLogger"): Logger,
        (module, "load_training_state"): resumed,
        (module, "EpisodeAwareSampler"): Order,
        (module, "update_last_checkpoint"): mark_last,
        # It would look for what to resume in the command line, which is not its own here.
        (TrainPipelineConfig, "_resolve_pretrained_from_cli"): lambda _: None,
        (weighting, "make_sample_weighter"): lambda *_, **__: InterventionWeights(
            interventions, settings.intervention_weight
        ),
    }
    saved = {(owner, name): getattr(owner, name) for owner, name in instead}
    try:
        for (owner, name), what in instead.items():
            setattr(owner, name, what)
        module.train(config)
    finally:
        for (owner, name), what in saved.items():
            setattr(owner, name, what)
    return Mixed(
        tuple(len(p) for p in parts), tuple(data.shares), float(interventions.mean()) if len(data) else 0.0
    )


def mark_last(checkpoint: Path) -> None:
    """As lerobot's, in one step: a run that is ended between its two would be left without a last one."""
    fresh = checkpoint.with_name("last.part")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(checkpoint.name)
    fresh.replace(checkpoint.with_name("last"))


def _arrays(stats: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        key: {name: np.asarray(v, np.float32) for name, v in values.items()} for key, values in stats.items()
    }
