"""A policy checkpoint on disk: lerobot's files, with the backbone's description beside them.

    config.json  model.safetensors  policy_preprocessor*.{json,safetensors}  policy_postprocessor*…
    vlm/            configuration, tokenizer and image processor of SmolVLA's vision-language backbone
    signature.json  what states and actions mean (``Signature``); absent for the twin's cell
    bundle/         the exported policy bundle (models/base and released checkpoints)

lerobot stores where the backbone was when it was trained. Here the stored name is always ``vlm``, and it is
resolved against the checkpoint's own directory on loading, so that a checkpoint can be moved. A checkpoint
from elsewhere needs ``vlm/`` put beside its files (of SmolVLM2-500M-Video-Instruct, for the published
SmolVLA; no weights: they are in model.safetensors) and, for another robot than the twin's, its
``signature.json``.

ACT (Zhao et al. 2023) has no language and no ``vlm/``.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from flywheel.errors import BundleError
from flywheel.schema import Strict

BACKBONE = "vlm"
SIGNATURE_FILE = "signature.json"
BACKBONE_FILES = (f"{BACKBONE}/config.json", f"{BACKBONE}/tokenizer.json")
SMOLVLA, ACT = "smolvla", "act"  # lerobot's names of the policies that are trained and exported here
WEIGHTS_FILE = "model.safetensors"
NEEDED = ("config.json", WEIGHTS_FILE, "policy_preprocessor.json", "policy_postprocessor.json")


class Signature(Strict):
    """``signature.json``: what lerobot's files leave unsaid about a policy's states, actions and times."""

    schema_version: Literal[1] = 1
    state_names: Annotated[tuple[str, ...], Field(min_length=1)]
    action_names: Annotated[tuple[str, ...], Field(min_length=1)]
    action_space: Literal["tool_position_suction", "joint_position"]
    step_ns: Annotated[int, Field(gt=0)]  # between two steps of a chunk
    execute: Annotated[int, Field(ge=0)] = 0  # steps executed before the next chunk; 0: half of it
    relative: Annotated[int, Field(ge=0)] = 0  # the first so many actions are relative to the same states

    @model_validator(mode="after")
    def _relative_fits(self) -> Self:
        if self.relative > min(len(self.state_names), len(self.action_names)):
            raise ValueError(f"relative = {self.relative}: more than there are states or actions")
        return self


TWIN = Signature(
    state_names=("tool_x", "tool_y", "tool_z", "held"),
    action_names=("tool_x", "tool_y", "tool_z", "suction"),
    action_space="tool_position_suction",
    step_ns=100_000_000,
    relative=3,
)


def signature(directory: Path) -> Signature:
    """A checkpoint's ``signature.json``, the twin's without one; ``BundleError`` names what is wrong."""
    path = directory / SIGNATURE_FILE
    if not path.exists():
        return TWIN
    try:
        return Signature.model_validate_json(path.read_bytes())
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise BundleError(f"{path}: {where}: {first['msg']}") from None
    except OSError as e:
        raise BundleError(f"{path}: cannot be read: {e.strerror}") from None


def offline() -> None:
    """Keep transformers and the hub client from looking anything up; call before they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def kind(directory: Path) -> str:
    """lerobot's name of a checkpoint's policy: ``SMOLVLA`` or ``ACT``; ``BundleError`` for others."""
    path = directory / "config.json"
    if not path.is_file():
        raise BundleError(f"{path}: no such file; a checkpoint holds {', '.join(NEEDED)}")
    try:
        found = json.loads(path.read_bytes())["type"]
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{path}: is no configuration of a lerobot policy") from None
    if found not in (SMOLVLA, ACT):
        raise BundleError(
            f"{path}: type = {found!r}; what is trained and exported is {SMOLVLA!r} and {ACT!r}"
        )
    return str(found)


def check(directory: Path) -> str:
    """A checkpoint's ``kind``; ``BundleError`` if something of it is missing."""
    found = kind(directory)
    for name in NEEDED if found == ACT else (*NEEDED, *BACKBONE_FILES):
        if not (directory / name).is_file():
            raise BundleError(
                f"{directory / name}: no such file; a checkpoint holds {', '.join(NEEDED)} and SmolVLA's, in "
                f"{BACKBONE}/, the configuration, tokenizer and processor of its backbone"
            )
    return found


@dataclass(frozen=True)
class Checkpoint:
    """A loaded policy: lerobot's policy, its processors, and the statistics they normalise with."""

    kind: str
    policy: Any
    pre: Any
    post: Any
    stats: dict[str, dict[str, Any]]

    def predict(self, batch: dict[str, Any], noise: Any, num_steps: int) -> Any:
        """The normalised chunk ``[1, T, A]`` for what ``pre`` gave; ACT takes neither noise nor steps."""
        self.policy.reset()
        if self.kind == ACT:
            return self.policy.predict_action_chunk(batch)
        self.policy.config.num_steps = num_steps
        return self.policy.predict_action_chunk(batch, noise=noise)


def load(directory: Path) -> Checkpoint:
    """Load a checkpoint for inference on the CPU.

    Raises:
        BundleError: files or weights are missing, or it is another kind of policy.
    """
    offline()
    found = check(directory)
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from safetensors import safe_open

    config: Any = PreTrainedConfig.from_pretrained(directory)
    config.device = "cpu"
    overrides: dict[str, Any] = {}
    if found == SMOLVLA:
        config.vlm_model_name = str((directory / BACKBONE).absolute())
        config.load_vlm_weights = False  # the checkpoint's own follow; vlm/ has none
        overrides = {"tokenizer_processor": {"tokenizer_name": config.vlm_model_name}}
    else:
        config.pretrained_backbone_weights = None  # the checkpoint's own follow
    policy: Any = get_policy_class(found).from_pretrained(directory, config=config)
    policy.eval()
    # lerobot would run on with random numbers in their place, and so would what is exported from it.
    with safe_open(directory / WEIGHTS_FILE, "pt") as weights:
        stored = set(weights.keys())
    if missing := sorted(name for name, _ in policy.named_parameters() if name not in stored):
        raise BundleError(
            f"{directory / WEIGHTS_FILE}: {len(missing)} of the policy's weights are missing, such as "
            f"{missing[0]}: config.json is of another policy"
        )
    pre, post = make_pre_post_processors(
        config, pretrained_path=str(directory), preprocessor_overrides=overrides
    )
    normaliser: Any = next((s for s in pre.steps if hasattr(s, "_tensor_stats")), None)
    if normaliser is None:
        raise BundleError(f"{directory / 'policy_preprocessor.json'}: has no normalizer_processor")
    stats = {key: dict(values) for key, values in normaliser._tensor_stats.items()}
    return Checkpoint(found, policy, pre, post, stats)


def statistics(directory: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint normalises with, by feature and figure (mean, std, …); loads no weights."""
    from safetensors.numpy import load_file

    steps = json.loads((directory / "policy_preprocessor.json").read_text())["steps"]
    names = [s.get("state_file") for s in steps if s.get("registry_name") == "normalizer_processor"]
    if len(names) != 1 or not names[0] or not (directory / names[0]).is_file():
        raise BundleError(
            f"{directory / 'policy_preprocessor.json'}: names no file of statistics that is there"
        )
    out: dict[str, dict[str, Any]] = {}
    for name, value in load_file(directory / names[0]).items():
        feature, _, figure = name.rpartition(".")
        out.setdefault(feature, {})[figure] = value
    return out


def localise(directory: Path) -> None:
    """Make every stored path of a checkpoint relative to it."""
    _stand_alone(directory, BACKBONE)


def working_copy(source: Path, target: Path) -> Path:
    """Copy a checkpoint to where a training run can load it without overrides: with absolute paths."""
    check(source)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("bundle"), dirs_exist_ok=True)
    _stand_alone(target, str((target / BACKBONE).absolute()))
    return target


def _stand_alone(directory: Path, backbone: str) -> None:
    """Let nothing in a checkpoint name a hub or another place; SmolVLA's backbone is at ``backbone``."""
    config = directory / "config.json"
    doc = json.loads(config.read_text())
    doc["pretrained_path"] = None
    if doc["type"] == ACT:
        doc["pretrained_backbone_weights"] = None
    else:
        doc["vlm_model_name"] = backbone
        doc["load_vlm_weights"] = False
    config.write_text(json.dumps(doc, indent=2) + "\n")
    processor = directory / "policy_preprocessor.json"
    doc = json.loads(processor.read_text())
    for step in doc["steps"]:
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = backbone
    processor.write_text(json.dumps(doc, indent=2) + "\n")
