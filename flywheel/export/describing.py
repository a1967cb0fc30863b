"""What a bundle says of itself (``policy.json``), from a checkpoint; what a graph would not do is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.config import ExportSettings
from flywheel.errors import BundleError, StageError
from flywheel.schema import Bundle
from flywheel.vla import ACT, BACKBONE, SIGNATURE_FILE, Checkpoint, Signature, signature

IMAGES = "observation.images."
EMPTY = "empty_camera_"  # lerobot's cameras that are not there
_PICTURES = {"smolvla": {"IDENTITY"}, "act": {"IDENTITY", "MEAN_STD"}}


def bundle_of(
    checkpoint: Path,
    loaded: Checkpoint,
    settings: ExportSettings,
    name: str,
    limits_sha256: str,
    about: dict[str, Any],
) -> Bundle:
    """``policy.json``, but for what is only known of the graph. Raises ``StageError``."""
    config = loaded.policy.config
    meaning = signature(checkpoint)
    views = {
        k.removeprefix(IMAGES): (int(f.shape[1]), int(f.shape[2]))
        for k, f in config.image_features.items()
        if not k.removeprefix(IMAGES).startswith(EMPTY)
    }
    if len(set(views.values())) != 1:
        raise StageError(
            f"{checkpoint / 'config.json'}: cameras are of {views or 'no size at all'}; a bundle has one "
            "size for all: resize them where the dataset is built"
        )
    _require_inputs(checkpoint, config)
    actions = _require_meaning(checkpoint, loaded, meaning)
    _require_normalisation(checkpoint, loaded)
    if getattr(config, "adapt_to_pi_aloha", False):
        raise StageError(f"{checkpoint / 'config.json'}: adapt_to_pi_aloha is not exported; set it to false")
    chunk = int(config.chunk_size)
    act = loaded.kind == ACT
    return Bundle(
        name=name,
        cameras=tuple(views),
        image_hw=next(iter(views.values())),
        state_names=meaning.state_names,
        action_names=meaning.action_names,
        action_space=meaning.action_space,
        chunk=chunk,
        execute=min(meaning.execute, chunk) or max(1, chunk // 2),
        step_ns=meaning.step_ns,
        max_action_dim=actions if act else int(config.max_action_dim),
        tokens=1 if act else int(config.tokenizer_max_length),
        num_steps=1 if act else settings.num_steps,
        limits_sha256=limits_sha256,
        provenance=about,
    )


def pad_id(checkpoint: Path, kind: str) -> int:
    """The token that fills an instruction up. Raises ``BundleError``."""
    if kind == ACT:
        return 0
    doc = json.loads((checkpoint / BACKBONE / "config.json").read_text())
    try:
        return int(doc["pad_token_id"])
    except (KeyError, TypeError, ValueError):
        raise BundleError(
            f"{checkpoint / BACKBONE / 'config.json'}: pad_token_id = {doc.get('pad_token_id')!r}: must be "
            "the token that fills an instruction up"
        ) from None


def write_tokenizer(checkpoint: Path, kind: str, out: Path) -> None:
    """SmolVLA's own; ACT is given no language, and gets one that makes a single token of any text."""
    if kind == ACT:
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({"": 0}, unk_token="")).save(str(out))
    else:
        shutil.copyfile(checkpoint / BACKBONE / "tokenizer.json", out)


def _require_inputs(checkpoint: Path, config: Any) -> None:
    """An observation of the edge is what cameras and joints say now, and nothing else."""
    for feature in (k for k in config.input_features if k != "observation.state" and IMAGES not in k):
        raise StageError(
            f"{checkpoint / 'config.json'}: the policy needs {feature}, and an observation of a robot has "
            f"observation.state and {IMAGES}*: train it without"
        )
    if config.robot_state_feature is None:
        raise StageError(
            f"{checkpoint / 'config.json'}: the policy takes no observation.state: train it with one"
        )
    if config.n_obs_steps != 1:
        raise StageError(
            f"{checkpoint / 'config.json'}: n_obs_steps = {config.n_obs_steps}; a bundle gets one observation"
        )


def _require_meaning(checkpoint: Path, loaded: Checkpoint, meaning: Signature) -> int:
    """How many actions there are."""
    config = loaded.policy.config
    states, actions = int(config.robot_state_feature.shape[0]), int(config.action_feature.shape[0])
    if (states, actions) != (len(meaning.state_names), len(meaning.action_names)):
        raise StageError(
            f"{checkpoint}: state has {states} and action {actions} dimensions, but "
            f"{SIGNATURE_FILE} (the twin's, if there is none) names {len(meaning.state_names)} and "
            f"{len(meaning.action_names)}: write one that says what they are"
        )
    return actions


def _require_normalisation(checkpoint: Path, loaded: Checkpoint) -> None:
    config = loaded.policy.config
    modes = {
        str(getattr(k, "value", k)): str(getattr(m, "value", m))
        for k, m in config.normalization_mapping.items()
    }
    pictures = _PICTURES[loaded.kind]
    if modes.pop("VISUAL", None) not in pictures or modes != {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}:
        raise StageError(
            f"{checkpoint / 'config.json'}: normalization_mapping = {config.normalization_mapping}; the "
            f"graph normalises states and actions by MEAN_STD, images by {' or '.join(sorted(pictures))}"
        )
    need = {"observation.state": config.robot_state_feature.shape, "action": config.action_feature.shape}
    if str(getattr(config.normalization_mapping["VISUAL"], "value", "")) == "MEAN_STD":
        need |= dict.fromkeys(config.image_features, (3, 1, 1))
    for key, shape in need.items():
        for figure in ("mean", "std"):
            have = np.shape(loaded.stats.get(key, {}).get(figure, 0.0))
            if have != tuple(shape):
                raise StageError(
                    f"{checkpoint / 'policy_preprocessor.json'}: {key} has no {figure} of {shape[0]} numbers "
                    f"(found shape {have}): train the policy on a dataset of its robot first"
                )
