"""ACT through the same stages: trained, exported, compared with lerobot, run by System 2."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from flywheel.config import ExportSettings, TrainSettings
from flywheel.edge.link import Records, Ring
from flywheel.edge.policy import INPUTS, OUTPUTS, Policy
from flywheel.edge.rows import EventLog, event_dtype
from flywheel.edge.safety import SafetyLimits
from flywheel.edge.system2 import System2
from flywheel.errors import BundleError, StageError
from flywheel.export import blank, describing, export, stage
from flywheel.robot import FloatArray, Image, Observation
from flywheel.schema import Bundle
from flywheel.train import train
from flywheel.vla import load, localise, offline
from tests.integration.test_training import write_episodes

pytestmark = pytest.mark.integration
CAMERAS = (("top", 32, 48), ("wrist", 32, 48))
CHUNK, RELATIVE = 9, 2
SIGNATURE = blank.ARM.model_copy(update={"relative": RELATIVE, "execute": 0})
SETTINGS = ExportSettings(parity_observations=3)


def write_act(out: Path) -> Path:
    """A small ACT with random weights, made by lerobot's own code."""
    offline()
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.act.processor_act import make_act_pre_post_processors

    out.mkdir(parents=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> dict[str, Any]:
        mean, spread = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        return {"mean": mean, "std": 0.5 + spread}

    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (6,))}
    stats = {"observation.state": drawn(6), "action": drawn(6)}
    for name, height, width in CAMERAS:
        inputs[f"observation.images.{name}"] = PolicyFeature(FeatureType.VISUAL, (3, height, width))
        stats[f"observation.images.{name}"] = drawn(3, 1, 1)
    config = ACTConfig(
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (6,))},
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        pretrained_backbone_weights=None,
        dim_model=32,
        n_heads=4,
        dim_feedforward=64,
        n_encoder_layers=2,
        n_vae_encoder_layers=1,
        device="cpu",
        push_to_hub=False,
    )
    ACTPolicy(config).save_pretrained(out)
    for processor in make_act_pre_post_processors(config, stats):
        processor.save_pretrained(out)
    (out / "signature.json").write_bytes(SIGNATURE.to_bytes())
    localise(out)
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_act(tmp_path_factory.mktemp("act") / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, stage.ExportResult]:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return out, export(checkpoint, out, SETTINGS, name="act")


def look() -> tuple[dict[str, Image], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(5)
    images: dict[str, Image] = {n: rng.integers(0, 256, (h, w, 3), np.uint8) for n, h, w in CAMERAS}
    return images, rng.standard_normal(6).astype(np.float32)


def test_act_is_exported_as_lerobot_runs_it(exported: tuple[Path, stage.ExportResult]) -> None:
    out, result = exported
    assert result.parity_max < 1e-4
    assert result.parity_relative < 1e-4
    b = Bundle.model_validate_json((out / "policy.json").read_bytes())
    assert (b.cameras, b.image_hw, b.chunk, b.execute) == (("top", "wrist"), (32, 48), CHUNK, CHUNK // 2)
    assert (b.tokens, b.num_steps, b.max_action_dim, b.provenance["policy"]) == (1, 1, 6, "act")
    assert Policy.load(out).digest == result.digest


def test_only_what_act_sees_moves_it_and_the_chunk_before_is_mixed_in_by_its_weights(
    exported: tuple[Path, stage.ExportResult],
) -> None:
    policy = Policy.load(exported[0])
    images, state = look()
    free = policy.infer(images, state, "pick the red box")
    same = policy.infer(images, state, "")
    np.testing.assert_array_equal(free.actions, same.actions)
    other = policy.infer({**images, "wrist": images["top"]}, state, "")
    assert np.abs(other.actions - free.actions).max() > 1e-4
    session = onnxruntime.InferenceSession(exported[0] / "policy.onnx", providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == set(INPUTS)
    assert [o.name for o in session.get_outputs()] == list(OUTPUTS)
    prev = np.random.default_rng(1).standard_normal((1, CHUNK, 6)).astype(np.float32)
    weights = np.linspace(1.0, 0.0, CHUNK, dtype=np.float32)
    mixed = policy.infer(images, state, "", prev, weights).actions_norm
    w = weights[None, :, None]
    np.testing.assert_allclose(mixed, w * prev + (1 - w) * free.actions_norm, atol=1e-5)


class Eyes:
    """Perception of an arm with two cameras."""

    cameras: tuple[str, ...] = ("top", "wrist")

    def observe(self) -> Observation:
        images, state = look()
        return Observation(0, images, state, np.zeros(5))

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        return q + 1e-3 * np.tanh(actions[:, :5]), np.clip(actions[:, 5], 0.0, 1.0)


def test_system_2_runs_it(exported: tuple[Path, stage.ExportResult]) -> None:
    from flywheel.robot.twin import LIMITS_FILE

    policy = Policy.load(exported[0])
    published: list[Records] = []
    limits = SafetyLimits.load(LIMITS_FILE)
    events = EventLog(Ring(event_dtype(), 16))
    system2 = System2(Eyes(), policy, limits, lambda c: published.append(c.copy()), events)
    system2.self_test("")
    assert system2.tick(0, "")
    images, state = look()
    expected = policy.infer(images, state, "").actions
    np.testing.assert_allclose(published[0]["q"][0, :CHUNK], 1e-3 * np.tanh(expected[:, :5]), atol=1e-12)


def test_a_spoiled_graph_of_act_never_leaves(
    checkpoint: Path,
    exported: tuple[Path, stage.ExportResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = onnx.load(exported[0] / "policy.onnx")
    largest = max((t for t in model.graph.initializer if t.data_type == 1), key=lambda t: np.prod(t.dims))
    value = numpy_helper.to_array(largest) * np.float32(1.01)
    largest.CopyFrom(numpy_helper.from_array(value.astype(np.float32), largest.name))
    monkeypatch.setattr(stage, "_graph", lambda *_: model)
    with pytest.raises(StageError, match=r"differs from PyTorch.*no bundle was written"):
        export(checkpoint, tmp_path / "bundle", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_act_is_trained_by_the_same_code(checkpoint: Path, tmp_path: Path) -> None:
    size = replace(blank.FULL, cameras=CAMERAS, signature=SIGNATURE)
    data = write_episodes(tmp_path / "data", size, [[True] * 14] * 2, fps=30)
    result = train(checkpoint, data, tmp_path / "out", TrainSettings(steps=2, batch_size=4, threads=1))
    assert np.isfinite(result.loss)
    before, after = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "out"))
    assert set(before) == set(after)
    assert any(not np.array_equal(before[k], after[k]) for k in before)
    loaded = load(tmp_path / "out")
    bundle = describing.bundle_of(tmp_path / "out", loaded, SETTINGS, "act", "", {})
    assert (bundle.cameras, bundle.action_names) == (("top", "wrist"), SIGNATURE.action_names)
    for name, value in (("lora_rank", 4), ("intervention_weight", 2.0)):
        settings = TrainSettings(steps=2, batch_size=4, threads=1).model_copy(update={name: value})
        with pytest.raises(StageError, match=rf"train\.{name} = {value:g} is for 'smolvla' alone"):
            train(checkpoint, data, tmp_path / "other", settings)


# ── what is refused by name ───────────────────────────────────────────────────────────────────────────


def test_other_policies_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    """Diffusion, for one, looks at two observations, and a bundle is given one."""
    shutil.copytree(checkpoint, tmp_path / "c")
    doc = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**doc, "type": "diffusion"}))
    with pytest.raises(BundleError, match=r"type = 'diffusion'; what is trained and exported is 'smolvla'"):
        export(tmp_path / "c", tmp_path / "bundle", SETTINGS)
    (tmp_path / "c" / "config.json").write_text("[]")
    with pytest.raises(BundleError, match=r"config\.json: is no configuration of a lerobot policy"):
        export(tmp_path / "c", tmp_path / "bundle", SETTINGS)


def test_weights_that_are_missing_are_not_made_up(checkpoint: Path, tmp_path: Path) -> None:
    """lerobot would go on with random ones, and parity with itself would hold."""
    shutil.copytree(checkpoint, tmp_path / "c")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    del weights["model.action_head.bias"]
    save_file(weights, tmp_path / "c" / "model.safetensors")
    with pytest.raises(BundleError, match=r"1 of the policy's weights are missing, such as model\.action_"):
        export(tmp_path / "c", tmp_path / "bundle", SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_pictures_without_statistics_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    for path in (tmp_path / "c").glob("policy_preprocessor*.safetensors"):
        kept = {k: v for k, v in load_file(path).items() if "images.wrist" not in k}
        save_file(kept, path)
    with pytest.raises(StageError, match=r"observation\.images\.wrist has no mean of 3 numbers"):
        export(tmp_path / "c", tmp_path / "bundle", SETTINGS)
