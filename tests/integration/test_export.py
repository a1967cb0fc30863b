"""Export of policies unlike the default one, and what must never leave it.

The checkpoints have random weights and the published SmolVLA's shape in small: several cameras that are not
square, joints instead of a tool, another chunk, another image size, cameras that are not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from flywheel.config import ExportSettings
from flywheel.edge.link import Records, Ring
from flywheel.edge.policy import Policy, runs_on
from flywheel.edge.rows import EventLog, event_dtype
from flywheel.edge.safety import SafetyLimits
from flywheel.edge.system2 import System2
from flywheel.errors import BundleError, StageError
from flywheel.export import blank, describing, export, stage
from flywheel.robot import FloatArray, Image, Observation
from flywheel.schema import Bundle, bundle_digest

pytestmark = pytest.mark.integration
BASE = Path(__file__).parents[2] / "models" / "base"
SMALL = blank.Size(
    backbone=blank.Backbone(
        image_px=32,
        patch_px=8,
        scale=2,
        vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        text={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
        },
        vocabulary=400,
        initial=0.1,
    ),
    cameras=(("top", 24, 40), ("left", 24, 40), ("wrist", 24, 40)),
    signature=blank.ARM,
    chunk=7,
    tokens=16,
    layers=2,
    expert_width=0.75,
    max_dim=9,
    denoising_steps=3,
    empty_cameras=1,
)
SETTINGS = ExportSettings(num_steps=3, parity_observations=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blank.write_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", SMALL)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, stage.ExportResult]:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return out, export(checkpoint, out, SETTINGS, name="arm")


def look(seed: int) -> tuple[dict[str, Image], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    images: dict[str, Image] = {
        name: rng.integers(0, 256, (height, width, 3), np.uint8) for name, height, width in SMALL.cameras
    }
    return images, rng.standard_normal(6).astype(np.float32)


# ── what a robot gets ─────────────────────────────────────────────────────────────────────────────────


def test_a_policy_of_another_shape_is_exported_as_lerobot_runs_it(
    exported: tuple[Path, stage.ExportResult],
) -> None:
    out, result = exported
    assert result.parity_max < 1e-4
    assert result.parity_relative < 1e-4
    assert (result.observations, result.recorded, result.precision) == (3, False, "float32")
    b = Bundle.model_validate_json((out / "policy.json").read_bytes())
    assert (b.cameras, b.image_hw) == (("top", "left", "wrist"), (24, 40))
    assert (b.chunk, b.execute, b.step_ns, b.tokens) == (7, 7, 33_333_333, 16)
    assert (b.state_names, b.action_names) == (blank.ARM.state_names, blank.ARM.action_names)
    assert (b.action_space, b.max_action_dim, b.num_steps) == ("joint_position", 9, 3)
    model = onnx.load(out / "policy.onnx")
    assert b.opset == next(o.version for o in model.opset_import if o.domain == "")
    about = {p.key: p.value for p in model.metadata_props}
    assert about["checkpoint_sha256"] == b.provenance["checkpoint_sha256"]
    assert about["onnxruntime"] == b.onnxruntime
    assert about["precision"] == "float32"
    assert result.digest == bundle_digest(out) == Policy.load(out).digest


class Eyes:
    """Perception of an arm with three cameras."""

    cameras: tuple[str, ...] = ("top", "left", "wrist", "unused")

    def observe(self) -> Observation:
        images, state = look(5)
        return Observation(0, {**images, "unused": images["top"]}, state, np.zeros(5))

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        return q + 1e-3 * np.tanh(actions[:, :5]), np.clip(actions[:, 5], 0.0, 1.0)


def test_system_2_runs_it_and_publishes_its_chunk(exported: tuple[Path, stage.ExportResult]) -> None:
    from flywheel.robot.twin import LIMITS_FILE

    policy = Policy.load(exported[0])
    published: list[Records] = []
    events = EventLog(Ring(event_dtype(), 16))
    limits = SafetyLimits.load(LIMITS_FILE)
    assert len(limits.joints) == 5
    system2 = System2(Eyes(), policy, limits, lambda c: published.append(c.copy()), events)
    system2.self_test("pick the red box")
    assert system2.tick(0, "pick the red box")
    (chunk,) = published
    assert (int(chunk["steps"][0]), int(chunk["step_ns"][0])) == (7, 33_333_333)
    images, state = look(5)
    expected = policy.infer(images, state, "pick the red box").actions
    np.testing.assert_allclose(chunk["q"][0, :7], 1e-3 * np.tanh(expected[:, :5]), atol=1e-12)


@pytest.mark.parametrize(
    ("range_", "version", "runs"),
    [
        ("", "0.1.0", True),
        (">=1.18,<2.0", "1.18.0", True),
        (">=1.18,<2.0", "1.32.1", True),
        (">=1.18,<2.0", "1.9.2", False),
        (">=1.18,<2.0", "2.0.0", False),
    ],
)
def test_ranges_are_compared_as_numbers(range_: str, version: str, runs: bool) -> None:
    assert runs_on(range_, version) is runs


def test_a_bundle_for_another_runtime_is_refused_before_it_is_loaded(
    exported: tuple[Path, stage.ExportResult], tmp_path: Path
) -> None:
    shutil.copytree(exported[0], tmp_path / "b")
    doc = json.loads((tmp_path / "b" / "policy.json").read_text())
    doc["onnxruntime"] = ">=97.0,<98.0"
    (tmp_path / "b" / "policy.json").write_text(json.dumps(doc))
    with pytest.raises(BundleError, match=r"onnxruntime = '>=97\.0,<98\.0', here is"):
        Policy.load(tmp_path / "b")


# ── what never leaves ─────────────────────────────────────────────────────────────────────────────────

Sabotage = Callable[[onnx.ModelProto], None]


def weight(model: onnx.ModelProto, start: str) -> onnx.TensorProto:
    """The largest weight whose name starts so."""
    found = [t for t in model.graph.initializer if t.name.startswith(start) and t.data_type == 1]
    largest: onnx.TensorProto = max(found, key=lambda t: np.prod(t.dims))
    return largest


def scaled(start: str, factor: float) -> Sabotage:
    def spoil(model: onnx.ModelProto) -> None:
        tensor = weight(model, start)
        value = (numpy_helper.to_array(tensor) * np.float32(factor)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    return spoil


def one_nan(model: onnx.ModelProto) -> None:
    tensor = weight(model, "step_")
    value = numpy_helper.to_array(tensor).copy()
    value.flat[value.size // 2] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def mask_ignored(model: onnx.ModelProto) -> None:
    """Padding is attended to."""
    for node in model.graph.node:
        if "token_mask" in node.input:
            node.input[:] = ["all_true" if n == "token_mask" else n for n in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, SMALL.tokens), np.bool_), "all_true"))


@pytest.fixture(scope="module")
def sound(checkpoint: Path) -> onnx.ModelProto:
    """The graph as it should be."""
    from flywheel.vla import load

    loaded = load(checkpoint)
    about = {"pad_token_id": 2}
    bundle = describing.bundle_of(checkpoint, loaded, SETTINGS, "arm", "", about)
    return stage._graph(checkpoint, loaded, bundle)


@pytest.mark.parametrize(
    "spoil",
    [scaled("step_", 1.01), scaled("", 1.02), scaled("action_std", 1.01), scaled("action_mean", 1.1), one_nan,
     mask_ignored],
    ids=["a step's weight", "a prefix weight", "spread of actions", "mean of actions", "nan", "mask"],
)  # fmt: skip
def test_a_sabotaged_graph_never_leaves_and_the_old_bundle_stays(
    checkpoint: Path,
    exported: tuple[Path, stage.ExportResult],
    sound: onnx.ModelProto,
    spoil: Sabotage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(exported[0], tmp_path / "bundle")
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(sound)
    spoil(spoiled)
    monkeypatch.setattr(stage, "_graph", lambda *_: spoiled)
    with pytest.raises(StageError, match=r"differs from PyTorch.*no bundle was written"):
        export(checkpoint, tmp_path / "bundle", SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert bundle_digest(tmp_path / "bundle") == exported[1].digest


def test_the_same_checkpoint_gives_the_same_bundle_traced_anew(
    checkpoint: Path,
    exported: tuple[Path, stage.ExportResult],
    sound: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is sabotaged above would have passed."""
    monkeypatch.setattr(stage, "_graph", lambda *_: sound)
    assert export(checkpoint, tmp_path / "bundle", SETTINGS, name="arm").digest == exported[1].digest


def test_a_graph_beyond_one_file_is_refused_with_its_size(
    sound: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage._require_one_file(Path("c"), [sound])
    monkeypatch.setattr(stage, "MODEL_BYTES", 100_000)
    with pytest.raises(StageError, match=r"weights are \d{6,} bytes; one ONNX file holds 100000"):
        stage._require_one_file(Path("c"), [sound])


# ── checkpoints that cannot be exported ───────────────────────────────────────────────────────────────


def changed(checkpoint: Path, copy: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(checkpoint, copy)
    doc = json.loads((copy / "config.json").read_text())
    change(doc)
    (copy / "config.json").write_text(json.dumps(doc))
    return copy


def other_size(doc: dict[str, Any]) -> None:
    doc["input_features"]["observation.images.left"]["shape"] = [3, 48, 48]


def min_max(doc: dict[str, Any]) -> None:
    doc["normalization_mapping"]["ACTION"] = "MIN_MAX"


def aloha(doc: dict[str, Any]) -> None:
    doc["adapt_to_pi_aloha"] = True


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_size, r"cameras are of .*48.*one size for all"),
        (min_max, r"normalization_mapping = .*MIN_MAX.*MEAN_STD"),
        (aloha, r"adapt_to_pi_aloha is not exported"),
    ],
)
def test_what_the_graph_would_not_do_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    with pytest.raises(StageError, match=says):
        export(changed(checkpoint, tmp_path / "c", change), tmp_path / "bundle", SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_that_does_not_say_what_its_states_are_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / "signature.json").unlink()
    with pytest.raises(StageError, match=r"state has 6 and action 6 dimensions, but signature\.json"):
        export(tmp_path / "c", tmp_path / "bundle", SETTINGS)
    (tmp_path / "c" / "signature.json").write_text('{"state_names": []}')
    with pytest.raises(BundleError, match=r"signature\.json: state_names"):
        export(tmp_path / "c", tmp_path / "bundle", SETTINGS)


def test_a_checkpoint_whose_config_names_a_hub_model_is_loaded_from_its_own_files(
    checkpoint: Path, tmp_path: Path
) -> None:
    """As the published one: it says to fetch the backbone's weights, which are in its own file already."""
    from flywheel.vla import load

    def hub(doc: dict[str, Any]) -> None:
        doc["vlm_model_name"] = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
        doc["load_vlm_weights"] = True

    a, b = load(checkpoint), load(changed(checkpoint, tmp_path / "c", hub))
    mine = dict(a.policy.named_parameters())
    assert all((p == mine[name]).all() for name, p in b.policy.named_parameters())


def test_full_size_is_the_published_one() -> None:
    """Counted from the dimensions: 450 million parameters, 64 tokens an image."""
    b = blank.FULL.backbone
    assert (b.image_px // b.patch_px // b.scale) ** 2 == 64
    assert (blank.FULL.chunk, blank.FULL.layers, blank.FULL.backbone.text["hidden_size"]) == (50, 16, 960)


# ── recorded observations, smaller precisions ─────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations in the twin."""
    from flywheel.dataset import Clip, write_dataset
    from flywheel.twin.demonstrate import demonstrate
    from flywheel.twin.shift import shift

    out = tmp_path_factory.mktemp("recordings") / "dataset"
    clips = [
        Clip(
            d.instruction,
            {"wrist": d.images},
            d.states,
            d.actions,
            np.arange(len(d.states)) * 100_000_000,
            np.ones(len(d.states), bool),
        )
        for d in demonstrate(shift("lab"), 2, seed=3)
    ]
    write_dataset(out, clips, 10)
    return out


@pytest.fixture(scope="module")
def base_graph() -> onnx.ModelProto:
    """The default policy's, traced once."""
    from flywheel.vla import load

    loaded = load(BASE)
    about = {"pad_token_id": 2}
    bundle = describing.bundle_of(BASE, loaded, ExportSettings(), "base", "", about)
    return stage._graph(BASE, loaded, bundle)


@pytest.fixture
def traced(base_graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export need not trace the default policy again."""

    def copy(*_: object) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(base_graph)
        return model

    monkeypatch.setattr(stage, "_graph", copy)


def test_the_shipped_bundle_has_the_weights_of_the_shipped_checkpoint(base_graph: onnx.ModelProto) -> None:
    shipped = onnx.load(BASE / "bundle" / "policy.onnx")
    mine, theirs = (
        sorted((tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in m.graph.initializer)
        for m in (base_graph, shipped)
    )
    assert mine == theirs


@pytest.mark.usefixtures("traced")
def test_parity_is_looked_at_on_recorded_observations(recordings: Path, tmp_path: Path) -> None:
    result = export(BASE, tmp_path / "bundle", observations=recordings)
    assert (result.recorded, result.observations) == (True, 8)
    assert result.parity_max < 1e-4


def test_observations_of_another_robot_are_refused(
    checkpoint: Path, recordings: Path, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=r"camera 'top' is missing, the policy needs \(24, 40\)"):
        export(checkpoint, tmp_path / "bundle", SETTINGS, observations=recordings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced")
def test_float16_weights_halve_the_bundle_and_int8_quarters_it(recordings: Path, tmp_path: Path) -> None:
    unmeasured = ExportSettings(closed_loop_pairs=0)
    sizes = {}
    for precision in ("float16", "int8"):
        settings = unmeasured.model_copy(update={"precision": precision})
        result = export(BASE, tmp_path / precision, settings, observations=recordings)
        assert result.float_bytes is not None
        sizes[precision] = result.onnx_bytes / result.float_bytes
        assert result.parity_relative < settings.reduced_rtol
        assert result.success_pairs is None
        assert Policy.load(tmp_path / precision).bundle.provenance["precision"] == precision
    assert sizes["float16"] < 0.6
    assert sizes["int8"] < 0.45
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("traced")
def test_a_smaller_precision_that_is_too_coarse_is_refused(recordings: Path, tmp_path: Path) -> None:
    settings = ExportSettings(precision="int8", reduced_rtol=1e-5, closed_loop_pairs=0)
    with pytest.raises(StageError, match=r"export\.reduced_rtol = 1e-05; no bundle was written"):
        export(BASE, tmp_path / "bundle", settings, observations=recordings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced")
def test_a_smaller_precision_whose_success_is_not_shown_is_refused(recordings: Path, tmp_path: Path) -> None:
    """Two pairs of real attempts exclude no drop, however they end."""
    settings = ExportSettings(precision="int8", closed_loop_pairs=2)
    with pytest.raises(StageError, match=r"in 2 pairs; a drop of .* cannot be excluded"):
        export(BASE, tmp_path / "bundle", settings, observations=recordings)
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_precision_of_a_policy_that_the_twin_cannot_run_is_refused(
    checkpoint: Path, sound: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_graph", lambda *_: sound)
    settings = SETTINGS.model_copy(update={"precision": "float16", "closed_loop_pairs": 2})
    with pytest.raises(StageError, match=r"success cannot be measured in the twin"):
        export(checkpoint, tmp_path / "bundle", settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_a_chunk_as_long_as_a_slot_holds(tmp_path: Path) -> None:
    size = replace(SMALL, chunk=64, cameras=(("eye", 32, 32),), empty_cameras=0)
    result = export(blank.write_checkpoint(tmp_path / "c", size), tmp_path / "bundle", SETTINGS)
    assert result.parity_max < 1e-4
    images: dict[str, Image] = {"eye": np.zeros((32, 32, 3), np.uint8)}
    assert Policy.load(tmp_path / "bundle").infer(images, np.zeros(6, np.float32), "").actions.shape[0] == 64
