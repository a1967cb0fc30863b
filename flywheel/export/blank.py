"""A SmolVLA checkpoint with random weights, of any size, made without a hub.

What it is for: to show that a checkpoint of the published size trains, exports and runs here, without its
weights. ``FULL`` has the dimensions of SmolVLA 450M (Shukor et al. 2025, "SmolVLA", section 3) on
SmolVLM2-500M-Video-Instruct: 512 px, 64 tokens an image, the first 16 language layers, an action expert of
0.75 times their width, chunks of 50. ``python -m flywheel.export.blank DIRECTORY`` writes one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flywheel.schema import sha256_file
from flywheel.vla import BACKBONE, SIGNATURE_FILE, WEIGHTS_FILE, Signature, localise, offline

WORDS = tuple(
    f"pick the {c} box and place it in the bin" for c in ("red", "green", "blue", "yellow", "purple")
)
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>"),
    *("<global-img>", "<video>", "<end_of_utterance>"),
)


@dataclass(frozen=True)
class Backbone:
    """A vision-language model of SmolVLM2's architecture. ``vision``, ``text``: of transformers' configs."""

    image_px: int
    patch_px: int
    scale: int  # pixel shuffle: scale x scale patches make one token
    vision: dict[str, int]
    text: dict[str, int]
    vocabulary: int
    initial: float = 0.02  # standard deviation of random weights


@dataclass(frozen=True)
class Size:
    """A policy: its backbone, and what lerobot's SmolVLAConfig is told. ``cameras``: name, height, width."""

    backbone: Backbone
    cameras: tuple[tuple[str, int, int], ...]
    signature: Signature
    chunk: int
    tokens: int
    layers: int  # language layers that are used
    expert_width: float
    max_dim: int  # states and actions are padded to
    denoising_steps: int
    empty_cameras: int = 0


_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
ARM = Signature(  # six joints at 30 Hz, as the published SmolVLA was pre-trained on
    state_names=_JOINTS, action_names=_JOINTS, action_space="joint_position", step_ns=33_333_333, execute=25
)
FULL = Size(
    backbone=Backbone(
        image_px=512,
        patch_px=16,
        scale=4,
        vision={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        text={
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
        },
        vocabulary=49280,
    ),
    cameras=(("top", 480, 640), ("wrist", 480, 640)),
    signature=ARM,
    chunk=50,
    tokens=48,
    layers=16,
    expert_width=0.75,
    max_dim=32,
    denoising_steps=10,
)


def write_backbone(out: Path, size: Backbone, words: Sequence[str] = WORDS) -> Path:
    """Write configuration, byte-level BPE tokenizer (trained on ``words``) and image processor to ``out``."""
    offline()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    out.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([w + "\n" for w in words], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "video_token": "<video>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        padding_side="right",
        model_max_length=2048,
    )
    edge = {"longest_edge": size.image_px}
    images = SmolVLMImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    videos = SmolVLMVideoProcessor(size=edge, max_image_size=edge, num_frames=1, fps=1)
    tokens = (size.image_px // size.patch_px // size.scale) ** 2
    SmolVLMProcessor(images, tokenizer, videos, image_seq_len=tokens).save_pretrained(out)
    SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=size.scale,
        tie_word_embeddings=False,
        vision_config={
            **size.vision,
            "image_size": size.image_px,
            "patch_size": size.patch_px,
            "initializer_range": size.initial,
        },
        text_config={
            "model_type": "llama",
            **size.text,
            "vocab_size": size.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
            "initializer_range": size.initial,
        },
    ).save_pretrained(out)
    return out


def smolvla_config(size: Size, backbone: Path) -> Any:
    """lerobot's SmolVLAConfig of a policy whose backbone is described in the directory ``backbone``."""
    offline()
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (len(size.signature.state_names),))}
    for name, height, width in size.cameras:
        inputs[f"observation.images.{name}"] = PolicyFeature(FeatureType.VISUAL, (3, height, width))
    return SmolVLAConfig(
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (len(size.signature.action_names),))},
        vlm_model_name=str(backbone),
        load_vlm_weights=False,
        resize_imgs_with_padding=(size.backbone.image_px, size.backbone.image_px),
        empty_cameras=size.empty_cameras,
        chunk_size=size.chunk,
        n_action_steps=size.chunk,
        pad_language_to="max_length",
        tokenizer_max_length=size.tokens,
        freeze_vision_encoder=False,
        train_expert_only=False,
        device="cpu",
        push_to_hub=False,
        num_steps=size.denoising_steps,
        num_vlm_layers=size.layers,
        expert_width_multiplier=size.expert_width,
        max_state_dim=size.max_dim,
        max_action_dim=size.max_dim,
    )


def write_checkpoint(out: Path, size: Size = FULL, seed: int = 0) -> Path:
    """Write a checkpoint with random weights and statistics to ``out``; the same for the same ``seed``."""
    offline()
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    backbone = write_backbone(out / BACKBONE, size.backbone)
    (out / SIGNATURE_FILE).write_bytes(size.signature.to_bytes())
    torch.manual_seed(seed)
    config = smolvla_config(size, backbone)
    policy = SmolVLAPolicy(config)
    policy.save_pretrained(out)
    generator = torch.Generator().manual_seed(seed)

    def drawn(n: int) -> dict[str, Any]:
        mean, spread = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
        return {"mean": mean, "std": 0.5 + spread}

    states, actions = len(size.signature.state_names), len(size.signature.action_names)
    processors = make_smolvla_pre_post_processors(
        config, {"observation.state": drawn(states), "action": drawn(actions)}
    )
    for processor in processors:
        processor.save_pretrained(out)
    localise(out)
    return out


def main(argv: Sequence[str]) -> int:
    """Write a full-size checkpoint to the directory named."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m flywheel.export.blank DIRECTORY", file=sys.stderr)
        return 2
    out = write_checkpoint(Path(argv[0]))
    print(f"{out}: random weights, sha256 {sha256_file(out / WEIGHTS_FILE)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
