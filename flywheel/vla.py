"""A policy checkpoint on disk: lerobot's files, with the backbone's description beside them.

    config.json  model.safetensors  policy_preprocessor*.{json,safetensors}  policy_postprocessor*…
    vlm/         configuration, tokenizer and image processor of the vision-language backbone
    bundle/      the exported policy bundle (models/base and released checkpoints)

lerobot stores where the backbone was when it was trained. Here the stored name is always ``vlm``, and it is
resolved against the checkpoint's own directory on loading, so that a checkpoint can be moved.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flywheel.errors import BundleError

BACKBONE = "vlm"
NEEDED = ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json")


def offline() -> None:
    """Keep transformers and the hub client from looking anything up; call before they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def check(directory: Path) -> None:
    """Raise ``BundleError`` if something of a checkpoint is missing."""
    for name in (*NEEDED, f"{BACKBONE}/config.json"):
        if not (directory / name).is_file():
            raise BundleError(
                f"{directory / name}: no such file; a checkpoint holds {', '.join(NEEDED)} and {BACKBONE}/"
            )


@dataclass(frozen=True)
class Checkpoint:
    """A loaded policy: lerobot's policy, its processors, and the statistics they normalise with."""

    policy: Any
    pre: Any
    post: Any
    stats: dict[str, dict[str, Any]]


def load(directory: Path) -> Checkpoint:
    """Load a SmolVLA checkpoint for inference on the CPU.

    Raises:
        BundleError: files are missing, or it is another kind of policy.
    """
    offline()
    check(directory)
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config: Any = PreTrainedConfig.from_pretrained(directory)
    if config.type != "smolvla":
        raise BundleError(f"{directory / 'config.json'}: type = {config.type!r}; this exports 'smolvla'")
    backbone = str((directory / BACKBONE).absolute())
    config.vlm_model_name = backbone
    config.device = "cpu"
    policy = SmolVLAPolicy.from_pretrained(directory, config=config)
    policy.eval()
    pre, post = make_pre_post_processors(
        config,
        pretrained_path=str(directory),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer_name": backbone}},
    )
    normaliser: Any = next(s for s in pre.steps if hasattr(s, "_tensor_stats"))
    stats = {key: dict(values) for key, values in normaliser._tensor_stats.items()}
    return Checkpoint(policy, pre, post, stats)


def localise(directory: Path) -> None:
    """Make every stored path of a checkpoint relative to it."""
    _rename_backbone(directory, BACKBONE)


def working_copy(source: Path, target: Path) -> Path:
    """Copy a checkpoint to where a training run can load it without overrides: with absolute paths."""
    check(source)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("bundle"), dirs_exist_ok=True)
    _rename_backbone(target, str((target / BACKBONE).absolute()))
    return target


def _rename_backbone(directory: Path, name: str) -> None:
    config = directory / "config.json"
    doc = json.loads(config.read_text())
    doc["vlm_model_name"] = name
    doc["pretrained_path"] = None
    config.write_text(json.dumps(doc, indent=2) + "\n")
    processor = directory / "policy_preprocessor.json"
    doc = json.loads(processor.read_text())
    for step in doc["steps"]:
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = name
    processor.write_text(json.dumps(doc, indent=2) + "\n")
