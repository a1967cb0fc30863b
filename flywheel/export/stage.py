"""Checkpoint in, verified bundle out."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flywheel import __version__
from flywheel.config import ExportSettings
from flywheel.errors import StageError
from flywheel.schema import Bundle, bundle_digest, sha256_file
from flywheel.vla import BACKBONE, check, load, offline

if TYPE_CHECKING:
    from collections.abc import Mapping

PARITY_SAMPLES = 8
STATE_NAMES = ("tool_x", "tool_y", "tool_z", "held")
ACTION_NAMES = ("tool_x", "tool_y", "tool_z", "suction")
RELATIVE = 3  # x, y, z of an action are relative to the state's
STEP_NS = 100_000_000
IMAGES = "observation.images."


@dataclass(frozen=True)
class ExportResult:
    """``parity_*``: largest difference of normalised actions from PyTorch's, over PARITY_SAMPLES."""

    digest: str
    onnx_bytes: int
    parity_max: float
    seconds: float


def export(
    checkpoint: Path,
    out: Path,
    settings: ExportSettings | None = None,
    *,
    name: str = "policy",
    limits_sha256: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Export ``checkpoint`` to the bundle ``out``; nothing appears there unless parity holds.

    Raises:
        BundleError: the checkpoint is incomplete or not a SmolVLA policy.
        StageError: ONNX Runtime's actions differ from PyTorch's by more than ``settings.parity_atol``.
    """
    settings = ExportSettings() if settings is None else settings
    started = time.monotonic()
    offline()
    check(checkpoint)
    import onnx
    import torch

    from flywheel.export.graphs import both
    from flywheel.export.join import join

    loaded = load(checkpoint)
    config = loaded.policy.config
    cameras = tuple(k.removeprefix(IMAGES) for k in config.image_features)
    first = next(iter(config.image_features.values()))
    hw = (int(first.shape[1]), int(first.shape[2]))
    state_dim = int(config.robot_state_feature.shape[0])
    action_dim = int(config.action_feature.shape[0])
    if (state_dim, action_dim) != (len(STATE_NAMES), len(ACTION_NAMES)):
        raise StageError(
            f"{checkpoint}: state has {state_dim} and action {action_dim} dimensions; "
            f"expected {len(STATE_NAMES)} and {len(ACTION_NAMES)}"
        )
    tokens = int(config.tokenizer_max_length)
    pad = _pad_id(checkpoint)
    about = {
        "runtime": __version__,
        "checkpoint_sha256": sha256_file(checkpoint / "model.safetensors"),
        "pad_token_id": pad,
        "parameters": sum(p.numel() for p in loaded.policy.parameters()),
        **(provenance or {}),
    }
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "images": torch.randint(
                0, 256, (1, len(cameras), *hw, 3), dtype=torch.uint8, generator=generator
            ),
            "tokens": torch.randint(8, 300, (1, tokens), generator=generator),
            "token_mask": (torch.arange(tokens) < 4 + i)[None],
            "state": _like(loaded.stats["observation.state"], generator)[None],
            "noise": torch.randn(1, config.chunk_size, config.max_action_dim, generator=generator),
        }
        for i in range(PARITY_SAMPLES)
    ]
    prefix, step = both(loaded.policy, loaded.stats, samples[0])
    action = loaded.stats["action"]
    model = join(
        prefix,
        step,
        int(config.chunk_size),
        int(config.max_action_dim),
        np.asarray(action["mean"], np.float32),
        np.asarray(action["std"], np.float32),
        RELATIVE,
        {k: str(v) for k, v in about.items()},
    )
    onnx.checker.check_model(model)
    staging = out.with_name(out.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    onnx.save(model, str(staging / "policy.onnx"))
    shutil.copyfile(checkpoint / BACKBONE / "tokenizer.json", staging / "tokenizer.json")
    bundle = Bundle(
        name=name,
        cameras=cameras,
        image_hw=hw,
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        action_space="tool_position_suction",
        chunk=int(config.chunk_size),
        execute=max(1, int(config.chunk_size) // 2),
        step_ns=STEP_NS,
        max_action_dim=int(config.max_action_dim),
        tokens=tokens,
        num_steps=settings.num_steps,
        limits_sha256=limits_sha256,
        provenance=about,
    )
    (staging / "policy.json").write_bytes(bundle.to_bytes())
    worst = parity(loaded, staging / "policy.onnx", samples, settings.num_steps)
    if not worst <= settings.parity_atol:
        shutil.rmtree(staging)
        raise StageError(
            f"{checkpoint}: ONNX Runtime differs from PyTorch by {worst:.2e} in normalised actions, more "
            f"than export.parity_atol = {settings.parity_atol:.0e}; no bundle was written"
        )
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return ExportResult(
        digest=bundle_digest(out),
        onnx_bytes=(out / "policy.onnx").stat().st_size,
        parity_max=worst,
        seconds=time.monotonic() - started,
    )


def parity(loaded: Any, path: Path, samples: list[dict[str, Any]], steps: int) -> float:
    """Largest difference between ONNX Runtime and PyTorch over ``samples``, in normalised actions.

    PyTorch goes through lerobot's own ``sample_actions``; NaN on either side comes back as NaN.
    """
    import onnxruntime
    import torch

    from flywheel.export.graphs import Prefix

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    policy, worst = loaded.policy, 0.0
    actions = int(policy.config.action_feature.shape[0])
    normal = Prefix(policy, loaded.stats)
    policy.config.num_steps = steps
    for s in samples:
        views = [s["images"][:, i].permute(0, 3, 1, 2).float() / 255.0 for i in range(s["images"].shape[1])]
        batch = dict(zip(policy.config.image_features, views, strict=True))
        batch["observation.state"] = (s["state"] - normal.mean) / (normal.std + 1e-8)
        images, masks = policy.prepare_images(batch)
        with torch.no_grad():
            expected = policy.model.sample_actions(
                images, masks, s["tokens"], s["token_mask"], policy.prepare_state(batch), noise=s["noise"]
            )
        feed = {k: v.numpy() for k, v in s.items()}
        feed["num_steps"] = np.array(steps, np.int64)
        feed["prev"] = np.zeros(s["noise"].shape, np.float32)
        feed["weights"] = np.zeros(s["noise"].shape[1], np.float32)
        absolute, got = session.run(["actions", "actions_norm"], feed)
        error = np.abs(got - expected.numpy())[..., :actions].max()
        mean, std = (np.asarray(loaded.stats["action"][k], np.float32) for k in ("mean", "std"))
        by_hand = got[..., :actions] * std + mean
        by_hand[..., :RELATIVE] += feed["state"][:, None, :RELATIVE]
        error = max(float(error), float(np.abs(absolute - by_hand).max()))
        worst = error if not error <= worst else worst
    return worst


def write_metrics(result: ExportResult, path: Path) -> None:
    """``export.json``: the figures that DVC tracks."""
    path.write_text(json.dumps(asdict(result), indent=1, sort_keys=True) + "\n")


def _pad_id(checkpoint: Path) -> int:
    doc = json.loads((checkpoint / BACKBONE / "config.json").read_text())
    return int(doc["pad_token_id"])


def _like(stats: dict[str, Any], generator: Any) -> Any:
    import torch

    mean = torch.as_tensor(stats["mean"], dtype=torch.float32)
    std = torch.as_tensor(stats["std"], dtype=torch.float32)
    return mean + std * torch.randn(mean.shape, generator=generator)
