"""ACT (Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware") as one graph.

The latent of its style variable is zero, as in section IV-C of the paper and in lerobot. There is nothing to
denoise and no language: ``tokens``, ``token_mask``, ``noise`` and ``num_steps`` are inputs because every
bundle has the same ones, and change nothing. ``prev`` and ``weights`` mix the chunk with the one before
(temporal ensembling, section IV-B, over chunks).
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from torch import Tensor, nn

from flywheel.export.graphs import exported

INPUTS = ("images", "tokens", "token_mask", "state", "noise", "num_steps", "prev", "weights")


class Chunk(nn.Module):
    """Raw observation to ``actions [1, T, A]`` in the robot's units and ``actions_norm [1, T, A]``.

    Inputs as every bundle's: images uint8 ``[1, cameras, H, W, 3]``, state float32 ``[1, S]`` (raw), prev
    ``[1, T, A]``, weights ``[T]`` in 0..1. The first ``relative`` actions have the same states added.
    """

    def __init__(self, policy: Any, stats: dict[str, dict[str, Any]], relative: int) -> None:
        super().__init__()
        self.model = policy.model
        self.relative = relative
        keys = ["observation.state", "action"]
        self.cameras = list(policy.config.image_features)
        self.pictures = str(policy.config.normalization_mapping["VISUAL"].value) == "MEAN_STD"
        for key in keys + (self.cameras if self.pictures else []):
            for figure in ("mean", "std"):
                value = torch.as_tensor(stats[key][figure], dtype=torch.float32)
                self.register_buffer(_name(key, figure), value.clone())

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor,
        noise: Tensor,
        num_steps: Tensor,
        prev: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        del tokens, token_mask, noise, num_steps
        views = []
        for i, camera in enumerate(self.cameras):
            view = images[:, i].permute(0, 3, 1, 2).to(torch.float32) / 255.0
            views.append(self._normal(view, camera) if self.pictures else view)
        batch = {"observation.state": self._normal(state, "observation.state"), "observation.images": views}
        free = self.model(batch)[0]
        normal = free + weights[None, :, None] * (prev - free)
        units = normal * self.get_buffer("action_std") + self.get_buffer("action_mean")
        base = torch.nn.functional.pad(state[:, : self.relative], (0, units.shape[-1] - self.relative))
        return units + base[:, None], normal

    def _normal(self, value: Tensor, key: str) -> Tensor:
        mean, std = (self.get_buffer(_name(key, figure)) for figure in ("mean", "std"))
        normal: Tensor = (value - mean) / (std + 1e-8)
        return normal


def graph(
    policy: Any, stats: dict[str, dict[str, Any]], example: dict[str, Tensor], relative: int
) -> onnx.ModelProto:
    """The whole policy, traced with ``example`` (the bundle's inputs)."""
    noise = example["noise"]
    given = {
        **example,
        "num_steps": torch.tensor(1),
        "prev": torch.zeros_like(noise),
        "weights": torch.zeros(noise.shape[1]),
    }
    module = Chunk(policy, stats, relative)
    return exported(module, tuple(given[n] for n in INPUTS), list(INPUTS), ["actions", "actions_norm"])


def _name(key: str, figure: str) -> str:
    return f"{key.replace('.', '_')}_{figure}"
