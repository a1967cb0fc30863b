"""The base policy's architecture: SmolVLA at about one million parameters, made without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flywheel.export import blank
from flywheel.vla import TWIN

IMAGE_PX = 64
PATCH_PX = 8
SCALE = 2  # pixel shuffle: 2 x 2 patches make one token
CHUNK = 10
ACTION_DIM = len(TWIN.action_names)
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
SIZE = blank.Size(
    backbone=blank.Backbone(
        image_px=IMAGE_PX,
        patch_px=PATCH_PX,
        scale=SCALE,
        vision={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        },
        text=TEXT,
        vocabulary=512,
        initial=0.1,  # measured: the default 0.02 does not train at these widths
    ),
    cameras=(("wrist", IMAGE_PX, IMAGE_PX),),
    signature=TWIN,
    chunk=CHUNK,
    tokens=12,
    layers=TEXT["num_hidden_layers"],
    expert_width=1.0,
    max_dim=8,
    denoising_steps=4,
)


def write_vlm(out: Path) -> Path:
    """Write the vision-language backbone's configuration, tokenizer and processor to ``out``."""
    return blank.write_backbone(out, SIZE.backbone)


def smolvla_config(vlm: Path) -> Any:
    """lerobot's SmolVLAConfig for this size, with the backbone in ``vlm``, and how it is trained."""
    config = blank.smolvla_config(SIZE, vlm)
    config.optimizer_lr = 3e-4
    config.optimizer_grad_clip_norm = 1.0
    config.scheduler_warmup_steps = 50
    config.scheduler_decay_steps = 2000
    config.scheduler_decay_lr = 1e-5
    return config
