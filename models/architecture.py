"""The base policy's architecture: SmolVLA at about one million parameters, made without a hub.

Writes a directory that transformers takes for a SmolVLM2 checkpoint without weights: configuration,
byte-level BPE tokenizer trained on the task's own words, image processor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

IMAGE_PX = 64
PATCH_PX = 8
SCALE = 2  # pixel shuffle: 2 x 2 patches make one token
CHUNK = 10
EXECUTE = 5
STEP_NS = 100_000_000
TOKENS = 12
DENOISE_STEPS = 4
STATE_DIM = 4
ACTION_DIM = 4
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
VOCABULARY = 512
WORDS = (
    "pick the red box and place it in the bin",
    "pick the green box and place it in the bin",
    "pick the blue box and place it in the bin",
    "pick the yellow box and place it in the bin",
    "pick the purple box and place it in the bin",
)


def write_vlm(out: Path) -> Path:
    """Write the vision-language backbone's configuration, tokenizer and processor to ``out``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    out.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>"]
    special += ["<global-img>", "<video>", "<end_of_utterance>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([w + "\n" for w in WORDS], trainer)
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
    edge = {"longest_edge": IMAGE_PX}
    images = SmolVLMImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    videos = SmolVLMVideoProcessor(size=edge, max_image_size=edge, num_frames=1, fps=1)
    tokens = (IMAGE_PX // PATCH_PX // SCALE) ** 2
    SmolVLMProcessor(images, tokenizer, videos, image_seq_len=tokens).save_pretrained(out)
    initial = 0.1  # measured: the default 0.02 does not train at these widths
    SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=SCALE,
        tie_word_embeddings=False,
        vision_config={
            **VISION,
            "image_size": IMAGE_PX,
            "patch_size": PATCH_PX,
            "initializer_range": initial,
        },
        text_config={
            "model_type": "llama",
            **TEXT,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
            "initializer_range": initial,
        },
    ).save_pretrained(out)
    return out


def smolvla_config(vlm: Path) -> Any:
    """lerobot's SmolVLAConfig for this size, with the backbone in ``vlm``."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    return SmolVLAConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
            "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, IMAGE_PX, IMAGE_PX)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        vlm_model_name=str(vlm),
        load_vlm_weights=False,
        resize_imgs_with_padding=(IMAGE_PX, IMAGE_PX),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        pad_language_to="max_length",
        tokenizer_max_length=TOKENS,
        freeze_vision_encoder=False,
        train_expert_only=False,
        device="cpu",
        push_to_hub=False,
        num_steps=DENOISE_STEPS,
        num_vlm_layers=TEXT["num_hidden_layers"],
        expert_width_multiplier=1.0,
        max_state_dim=8,
        max_action_dim=8,
        optimizer_lr=3e-4,
        optimizer_grad_clip_norm=1.0,
        scheduler_warmup_steps=50,
        scheduler_decay_steps=2000,
        scheduler_decay_lr=1e-5,
    )
