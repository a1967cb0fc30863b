"""SmolVLA as two ONNX graphs: the prefix (seen once) and one denoising step (run several times).

What torch's exporter cannot trace is replaced while it runs, by code that computes the same numbers:
rotary embedding without slice stores, constant position ids and no mask in the vision tower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, pad_vector, resize_with_pad
from lerobot.policies.smolvla import smolvlm_with_expert
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.smolvlm import modeling_smolvlm

MAX_GUIDANCE = 10.0  # of real-time chunking; Black et al. 2025, section 4, and lerobot's default


class Prefix(nn.Module):
    """Raw observation to prefix mask ``[1, P]`` and key/value cache ``[layers, 2, 1, heads, P, head_dim]``.

    Inputs: images uint8 ``[1, cameras, H, W, 3]``, tokens int64 ``[1, L]``, token_mask bool ``[1, L]``, state
    float32 ``[1, S]`` (raw: normalisation is in the graph).
    """

    def __init__(self, policy: Any, stats: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.model = policy.model
        self.config = policy.config
        for name, key in (("mean", "mean"), ("std", "std")):
            value = torch.as_tensor(stats["observation.state"][key], dtype=torch.float32)
            self.register_buffer(name, value.clone())

    def forward(
        self, images: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        views, present = [], []
        for i in range(images.shape[1]):
            view = images[:, i].permute(0, 3, 1, 2).to(torch.float32) / 255.0
            if self.config.resize_imgs_with_padding is not None:
                width, height = self.config.resize_imgs_with_padding
                view = resize_with_pad(view, height, width, pad_value=0)
            views.append(view * 2.0 - 1.0)
            present.append(torch.ones(images.shape[0], dtype=torch.bool))
        for _ in range(self.config.empty_cameras):  # as lerobot fills in for cameras that are not there
            views.append(torch.full_like(views[0], -1.0))
            present.append(torch.zeros(images.shape[0], dtype=torch.bool))
        normal = pad_vector((state - self.mean) / (self.std + 1e-8), self.config.max_state_dim)
        embedded, padding, attention = self.model.embed_prefix(
            views, present, tokens, token_mask, state=normal
        )
        _, cache = self.model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(padding, attention),
            position_ids=torch.cumsum(padding, 1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        return padding, torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])


class Step(nn.Module):
    """One Euler step of the flow, with real-time-chunking guidance towards ``prev`` where ``weights`` > 0.

    The guidance is the closed form of Black et al. 2025 ("Real-Time Execution of Action Chunking Flow
    Policies", eq. 2-5) with the denoised estimate x - t·v; weights of zero turn it off.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.model = policy.model

    def forward(
        self,
        prefix_mask: Tensor,
        kv_cache: Tensor,
        x: Tensor,
        t: Tensor,
        dt: Tensor,
        prev: Tensor,
        weights: Tensor,
    ) -> Tensor:
        layers = tuple((kv_cache[i, 0], kv_cache[i, 1], None) for i in range(kv_cache.shape[0]))
        velocity = self.model.denoise_step(
            prefix_pad_masks=prefix_mask, past_key_values=DynamicCache(layers), x_t=x, timestep=t
        )
        gain = torch.minimum(
            (t / (1 - t)) * ((t * t + (1 - t) ** 2) / (t * t)),
            torch.tensor([MAX_GUIDANCE], dtype=torch.float32),
        )
        error = prev - (x - t[:, None, None] * velocity)
        velocity = velocity - gain[:, None, None] * error * weights[None, :, None]
        moved: Tensor = x + dt * velocity
        return moved


def _rotate(x: Tensor, positions: Tensor, max_wavelength: int = 10_000) -> Tensor:
    half = x.shape[-1] // 2
    period = max_wavelength ** ((2.0 / x.shape[-1]) * torch.arange(half, dtype=torch.float32))
    angle = (positions[..., None].to(torch.float32) / period)[..., None, :]
    sin, cos = torch.sin(angle), torch.cos(angle)
    first, second = x[..., :half].to(torch.float32), x[..., half:].to(torch.float32)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@contextlib.contextmanager
def exportable(policy: Any) -> Iterator[None]:
    """Replace what cannot be traced, for the duration of the block."""
    embeddings = policy.model.vlm_with_expert.get_vlm_model().vision_model.embeddings
    side = embeddings.num_patches_per_side
    caught: list[Tensor] = []
    hook = embeddings.position_embedding.register_forward_pre_hook(
        lambda _module, inputs: caught.append(inputs[0].detach().clone())
    )
    pixels = torch.zeros(1, 3, embeddings.image_size, embeddings.image_size)
    with torch.no_grad():
        embeddings(
            pixels.to(embeddings.position_embedding.weight.dtype), torch.ones(1, side, side, dtype=torch.bool)
        )
    hook.remove()
    positions = caught[0]

    def embed(self: Any, pixel_values: Tensor, patch_attention_mask: Tensor | None = None) -> Tensor:
        del patch_attention_mask
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        out: Tensor = patches + self.position_embedding(positions)
        return out

    vision: Any = modeling_smolvlm.SmolVLMVisionEmbeddings
    saved = (smolvlm_with_expert.apply_rope, vision.forward, modeling_smolvlm.create_bidirectional_mask)
    smolvlm_with_expert.apply_rope = _rotate
    vision.forward = embed
    modeling_smolvlm.create_bidirectional_mask = lambda *_, **__: None
    try:
        yield
    finally:
        smolvlm_with_expert.apply_rope, vision.forward, modeling_smolvlm.create_bidirectional_mask = saved


def exported(
    module: nn.Module, inputs: tuple[Any, ...], names: list[str], outputs: list[str]
) -> onnx.ModelProto:
    """One module as an ONNX model, without duplicate weights and without traces of the source tree."""
    from onnx_ir.passes import common as passes

    with torch.no_grad():
        program: Any = torch.onnx.export(
            module.eval(),
            inputs,
            None,
            dynamo=True,
            input_names=names,
            output_names=outputs,
            verbose=False,
            optimize=True,
        )
    passes.DeduplicateInitializersPass(size_limit=1 << 40)(program.model)
    passes.ClearMetadataAndDocStringPass()(program.model)
    proto: onnx.ModelProto = program.model_proto
    return proto


def both(
    policy: Any, stats: dict[str, dict[str, Any]], example: dict[str, Tensor]
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The prefix and the step graph, traced with ``example`` (the bundle's inputs)."""
    prefix, step = Prefix(policy, stats).eval(), Step(policy).eval()
    seen = (example["images"], example["tokens"], example["token_mask"], example["state"])
    with torch.no_grad(), exportable(policy):
        mask, cache = prefix(*seen)
        first = exported(
            prefix, seen, ["images", "tokens", "token_mask", "state"], ["prefix_mask", "kv_cache"]
        )
    noise = example["noise"]
    moving = (
        mask,
        cache,
        noise,
        torch.tensor([0.9]),
        torch.tensor(-0.1),
        torch.zeros_like(noise),
        torch.zeros(noise.shape[1]),
    )
    names = ["prefix_mask", "kv_cache", "x", "t", "dt", "prev", "weights"]
    with exportable(policy):
        return first, exported(step, moving, names, ["x_next"])
