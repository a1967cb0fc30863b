"""Policy bundles: what is loaded is what is hashed, and what is wrong is named before a robot moves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flywheel.edge.policy import LEAP_FACTOR, WORKSPACE_SLACK_M, Policy, check_actions, check_waypoints
from flywheel.errors import BundleError
from flywheel.robot import FloatArray, Image, Observation
from flywheel.schema import BUNDLE_FILES, bundle_digest
from tests.robots import BUNDLE, CHUNK, SIDE, STEP_NS, limits, look, write_bundle

GREY: dict[str, Image] = {"eye": np.full((SIDE, SIDE, 3), 128, np.uint8)}
STATE = np.array([0.2, 0.1, 0.0], np.float32)
BOX = {"clause": "test clause", "lower": [-1.0, -1.0, 0.0], "upper": [1.0, 1.0, 2.0]}
BOXED = limits(workspace=BOX)
TOOL = BUNDLE.model_copy(
    update={"action_space": "tool_position_suction", "action_names": ("x", "y", "z", "suction")}
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("policy") / "bundle")


def test_actions_are_those_of_the_graph_and_the_same_every_time(bundle: Path) -> None:
    a, b = Policy.load(bundle), Policy.load(bundle)
    one, two = a.infer(GREY, STATE, "move left"), b.infer(GREY, STATE, "move left")
    again = a.infer(GREY, STATE, "move left")
    assert one.actions.tobytes() == two.actions.tobytes() == again.actions.tobytes()
    goal = np.array([1.0, -0.8, 1.0]) * 128 / 255
    decay = np.exp(-0.2 * np.arange(1, CHUNK + 1))[:, None]
    np.testing.assert_allclose(one.actions, goal + (STATE - goal) * decay, atol=1e-6)
    assert one.infer_ns > 0
    assert one.actions_norm.shape == (1, CHUNK, BUNDLE.max_action_dim)


def test_the_digest_is_of_the_bytes_that_were_loaded(bundle: Path, tmp_path: Path) -> None:
    assert Policy.load(bundle).digest == bundle_digest(bundle)
    other = write_bundle(tmp_path / "other", goal=(0.5, 0.5))
    assert Policy.load(other).digest != bundle_digest(bundle)


class Spy:
    """Stands for the session; keeps what it is fed."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.fed: dict[str, Any] = {}

    def run(self, names: Any, feeds: dict[str, Any]) -> Any:
        self.fed = {k: np.copy(v) for k, v in feeds.items()}
        return self.inner.run(names, feeds)


def test_instructions_become_tokens_padded_on_the_right(bundle: Path) -> None:
    policy = Policy.load(bundle)
    spy = Spy(policy._session)
    policy._session = spy
    policy.infer(GREY, STATE, "move left")
    assert spy.fed["tokens"].tolist() == [[2, 3, 0, 0, 0, 0]]
    assert spy.fed["token_mask"].tolist() == [[True, True, False, False, False, False]]
    policy.infer(GREY, STATE, "move up up up up up up up")
    assert spy.fed["tokens"].tolist() == [[2, 1, 1, 1, 1, 1]]
    assert spy.fed["token_mask"].all()


def test_padding_and_truncation_that_the_tokenizer_file_asks_for_are_left_to_the_bundle(
    tmp_path: Path,
) -> None:
    directory = write_bundle(tmp_path / "b")
    doc = json.loads((directory / "tokenizer.json").read_text())
    doc["padding"] = {
        "strategy": {"Fixed": 4}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "[unk]",
    }  # fmt: skip
    doc["truncation"] = {"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(doc))
    policy = Policy.load(directory)
    spy = Spy(policy._session)
    policy._session = spy
    policy.infer(GREY, STATE, "move left")
    assert spy.fed["tokens"].tolist() == [[2, 3, 0, 0, 0, 0]]


def test_noise_is_fixed_and_guidance_is_off_unless_asked_for(bundle: Path) -> None:
    policy = Policy.load(bundle, seed=3)
    spy = Spy(policy._session)
    policy._session = spy
    first = policy.infer(GREY, STATE, "")
    noise = spy.fed["noise"]
    assert not spy.fed["prev"].any()
    assert not spy.fed["weights"].any()
    assert spy.fed["num_steps"] == BUNDLE.num_steps
    policy.infer(GREY, STATE, "", prev=first.actions_norm, weights=np.ones(CHUNK, np.float32))
    np.testing.assert_array_equal(spy.fed["noise"], noise)
    np.testing.assert_array_equal(spy.fed["prev"], first.actions_norm)
    assert spy.fed["weights"].all()


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    directory = write_bundle(tmp_path / "b")
    (directory / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}.*No such file"):
        Policy.load(directory)


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    directory = write_bundle(tmp_path / "b")
    data = (directory / name).read_bytes()
    (directory / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=name):
        Policy.load(directory)


def test_a_bundle_of_another_version_or_with_unknown_keys_is_refused(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "b")
    doc = json.loads((directory / "policy.json").read_text())
    for change in ({"schema_version": 2}, {"colour": "red"}):
        (directory / "policy.json").write_text(json.dumps(doc | change))
        with pytest.raises(BundleError, match=next(iter(change))):
            Policy.load(directory)


def test_a_graph_with_other_inputs_is_refused(tmp_path: Path) -> None:
    import onnx

    directory = write_bundle(tmp_path / "b")
    model = onnx.load(directory / "policy.onnx")
    model.graph.input[0].name = "pictures"
    model.graph.node[0].input[0] = "pictures"
    (directory / "policy.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"inputs are .*pictures"):
        Policy.load(directory)


def test_a_policy_json_that_promises_another_chunk_than_the_graph_gives_is_refused(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "b")
    doc = json.loads((directory / "policy.json").read_text())
    doc["chunk"] = 8
    (directory / "policy.json").write_text(json.dumps(doc))
    with pytest.raises(BundleError, match=r"inference failed|gave actions of shape"):
        Policy.load(directory)


def test_observations_that_do_not_fit_are_refused_by_name(bundle: Path) -> None:
    policy = Policy.load(bundle)
    with pytest.raises(BundleError, match=r"camera 'eye': got None, policy 'tiny' needs \(16, 16, 3\)"):
        policy.infer({}, STATE, "")
    with pytest.raises(BundleError, match=r"got \(8, 16, 3\)"):
        policy.infer({"eye": np.zeros((8, 16, 3), np.uint8)}, STATE, "")
    with pytest.raises(BundleError, match=r"state of shape \(4,\)"):
        policy.infer(GREY, np.zeros(4, np.float32), "")


# ── what is looked over before it is published ────────────────────────────────────────────────────────


@given(
    st.lists(
        st.sampled_from([math.nan, math.inf, -math.inf, -1.1, -1.1001, 1.1, 2.1, 2.11, 0.0, 1.0, -1.0, 5.0]),
        min_size=8,
        max_size=8,
    )
)
@example([0.0, 0.0, 1.0, -0.5, 1.0, 1.0, 0.0, 1.5])
@settings(max_examples=200, deadline=None)
def test_actions_are_finite_and_in_the_workspace_or_refused(values: list[float]) -> None:
    actions = np.array(values).reshape(2, 4)
    before = actions.copy()
    problem = check_actions(actions, TOOL, BOXED)
    low, high = np.array(BOX["lower"]), np.array(BOX["upper"])
    if problem is None:
        np.testing.assert_array_equal(actions[:, :3], np.clip(before[:, :3], low, high))
        np.testing.assert_array_equal(actions[:, 3], np.clip(before[:, 3], 0, 1))
        assert (np.abs(before[:, :3] - actions[:, :3]) <= WORKSPACE_SLACK_M).all()
    elif "not finite" in problem:
        assert not np.isfinite(before).all()
    else:
        out = np.maximum(low - before[:, :3], before[:, :3] - high).max()
        assert "outside of the workspace" in problem
        assert out > WORKSPACE_SLACK_M


@pytest.mark.parametrize("shape", [(0, 4), (3, 3), (4,), (1, 2, 4)])
def test_actions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    assert "need [steps, 4]" in str(check_actions(np.zeros(shape), TOOL, BOXED))


def test_joint_actions_know_no_workspace() -> None:
    actions = np.full((4, 3), 9.0)
    assert check_actions(actions, BUNDLE, BOXED) is None
    assert (actions == 9.0).all()


def waypoints(q: FloatArray, tool: FloatArray | None = None) -> str | None:
    seen: Observation = look(0, np.zeros(2), 0.0, 0)
    return check_waypoints(q, np.zeros(len(q)) if tool is None else tool, seen, STEP_NS, limits())


def test_kinematics_that_flip_or_fail_are_caught() -> None:
    most = LEAP_FACTOR * 3.0 * 0.1
    calm = np.zeros((4, 2))
    assert waypoints(calm) is None
    calm[2:, 0] = most * 0.999
    assert waypoints(calm) is None
    calm[2:, 0] = most * 1.001
    assert "step 2: a leaps by 0.90 rad" in str(waypoints(calm))
    assert "out of reach" in str(waypoints(np.full((4, 2), math.nan)))
    assert "out of reach" in str(waypoints(np.zeros((4, 2)), np.full(4, math.inf)))
    assert "need [steps, 2]" in str(waypoints(np.zeros((4, 3))))
    assert "need [steps, 2]" in str(waypoints(np.zeros((4, 2)), np.zeros(3)))


# ── real-time chunking ────────────────────────────────────────────────────────────────────────────────


def test_what_pads_a_previous_chunk_is_no_guidance(base: Policy) -> None:
    """Where a weight is zero, nothing of the previous chunk reaches the actions, whatever stands there.

    Elsewhere the padding was guided towards, and zeros decode to the mean action of the data set.
    """
    b = base.bundle
    images: dict[str, Image] = {c: np.full((*b.image_hw, 3), 90, np.uint8) for c in b.cameras}
    state = np.array([0.4, 0.0, 0.3, 0.0], np.float32)
    free = base.infer(images, state, "pick the red box and place it in the bin")
    prev = np.zeros((1, b.chunk, b.max_action_dim), np.float32)
    weights = np.zeros(b.chunk, np.float32)
    again = base.infer(images, state, "pick the red box and place it in the bin", prev, weights)
    np.testing.assert_array_equal(again.actions, free.actions)
    weights[:3] = 1.0
    prev[0, :3] = free.actions_norm[0, :3]
    guided = [
        base.infer(images, state, "pick the red box and place it in the bin", p, weights).actions
        for p in (prev, np.where(np.arange(b.chunk)[None, :, None] < 3, prev, 7.0).astype(np.float32))
    ]
    np.testing.assert_array_equal(guided[0], guided[1])


@pytest.fixture(scope="module")
def base() -> Policy:
    return Policy.load(Path(__file__).parents[1] / "models" / "base" / "bundle")
