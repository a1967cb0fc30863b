"""Evaluation and gate over the real twin, the real edge processes and real ONNX graphs.

The policies are a line of arithmetic, a step down from where the tool is: enough to run everything, and to
know what must come out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flywheel.config import GateSettings
from flywheel.edge.safety import SafetyLimits
from flywheel.errors import BundleError, ConfigError
from flywheel.evaluate import Evaluator, Job, Scenario, evaluate, paired
from flywheel.gate import gate, required_checks
from flywheel.gate.task import TRACKING_SPREAD
from flywheel.robot.twin import LIMITS_FILE
from flywheel.schema import Bundle, GateReport, Verdict, bundle_digest
from flywheel.twin.sampling import ACTION_NAMES, STATE_NAMES

pytestmark = pytest.mark.integration

CHUNK, WIDTH = 16, 8


def write_policy(directory: Path, step_m: float, suction: float = 0.0) -> Path:
    """A bundle whose chunk lowers the tool by ``step_m`` per step from where it is; NaN gives NaN."""
    import onnx
    from onnx import TensorProto as T
    from onnx import helper, numpy_helper

    directory.mkdir(parents=True)
    ramp = np.zeros((1, CHUNK, 4), np.float32)
    ramp[0, :, 2] = -step_m * np.arange(1, CHUNK + 1)
    ramp[0, :, 3] = suction
    constants = {
        "starts": np.array([0], np.int64),
        "ends": np.array([3], np.int64),
        "along": np.array([1], np.int64),
        "one_more": np.array([0, 0, 0, 0, 0, 1], np.int64),
        "pads": np.array([0, 0, 0, 0, 0, WIDTH - 4], np.int64),
        "ramp": ramp,
    }
    nodes = [
        helper.make_node("Slice", ["state", "starts", "ends", "along"], ["xyz"]),
        helper.make_node("Unsqueeze", ["xyz", "along"], ["here"]),
        helper.make_node("Pad", ["here", "one_more"], ["start"]),
        helper.make_node("Add", ["start", "ramp"], ["actions"]),
        helper.make_node("Pad", ["actions", "pads"], ["actions_norm"]),
    ]
    inputs = {
        "images": (T.UINT8, [1, 1, 64, 64, 3]),
        "tokens": (T.INT64, [1, 12]),
        "token_mask": (T.BOOL, [1, 12]),
        "state": (T.FLOAT, [1, len(STATE_NAMES)]),
        "noise": (T.FLOAT, [1, CHUNK, WIDTH]),
        "num_steps": (T.INT64, []),
        "prev": (T.FLOAT, [1, CHUNK, WIDTH]),
        "weights": (T.FLOAT, [CHUNK]),
    }
    graph = helper.make_graph(
        nodes,
        "step_down",
        [helper.make_tensor_value_info(n, *spec) for n, spec in inputs.items()],
        [
            helper.make_tensor_value_info("actions", T.FLOAT, [1, CHUNK, 4]),
            helper.make_tensor_value_info("actions_norm", T.FLOAT, [1, CHUNK, WIDTH]),
        ],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(directory / "policy.onnx"))
    (directory / "tokenizer.json").write_text(
        '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,'
        ' "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,'
        ' "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}'
    )
    bundle = Bundle(
        name="step-down", cameras=("wrist",), image_hw=(64, 64), state_names=STATE_NAMES,
        action_names=ACTION_NAMES, action_space="tool_position_suction", chunk=CHUNK, execute=8,
        step_ns=100_000_000, max_action_dim=WIDTH, tokens=12, num_steps=4,
        limits_sha256=SafetyLimits.load(LIMITS_FILE).sha256,
    )  # fmt: skip
    (directory / "policy.json").write_bytes(bundle.to_bytes())
    return directory


@pytest.fixture(scope="module")
def hover(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policies") / "hover", 0.0)


@pytest.fixture(scope="module")
def creep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policies") / "creep", 0.0001)


def test_attempts_in_the_twin_do_not_depend_on_the_worker_that_ran_them(hover: Path, creep: Path) -> None:
    jobs = [Job(b, s, seed) for seed in (1, 2) for s in ("lab", "factory") for b in (hover, creep)]
    with Evaluator(1) as one, Evaluator(2) as two:
        a, b = one.run(jobs), two.run(list(reversed(jobs)))
    assert a == list(reversed(b)), "an attempt must not depend on what its worker ran before"
    assert {x.digest for x in a} == {bundle_digest(hover), bundle_digest(creep)}
    assert all(x.outcome == "timeout" and x.duration_s and x.duration_s > 5 for x in a)
    assert all(x.tracking_p99_rad is not None and x.tracking_p99_rad < 0.02 for x in a)
    assert all(x.mode_ticks["follow"] > 5000 for x in a)
    assert sum(x.invalid_chunks for x in a) == 0


def test_evaluation_reports_what_happened(hover: Path, creep: Path) -> None:
    result = evaluate(hover, "lab", 3, seed=7, workers=1)
    assert (result.success.mean, result.success.n) == (0.0, 3)
    assert result.failures == {"timeout": 3}
    assert result.steps["mean"] == 6000
    both = paired(hover, creep, "lab", 2, seed=7, workers=1)
    assert both.a.attempts == result.attempts[:2], "the same seed draws the same scenes, however many"
    assert (both.difference, both.n, both.mcnemar_p) == (0.0, 2, 1.0)


def test_an_unknown_shift_and_a_broken_graph_are_named(hover: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="moon"):
        evaluate(hover, "moon", 1, seed=1, workers=1)
    broken = write_policy(tmp_path / "broken", 0.0)
    (broken / "policy.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"policy\.onnx"):
        evaluate(broken, "lab", 1, seed=1, workers=1)


def test_the_gate_runs_everything_and_does_not_promote_what_lifts_nothing(
    hover: Path, creep: Path, tmp_path: Path
) -> None:
    settings = GateSettings(episodes=3, lab_episodes=3, wall_s=1.0, wall_pairs=2, wall_looks=1)
    stages: set[str] = set()
    report = gate(
        creep, hover, tmp_path, settings,
        scenarios=[Scenario("factory", 5)], workers=1, on_progress=lambda name, *_: stages.add(name),
    )  # fmt: skip
    assert GateReport.model_validate_json((tmp_path / "gate.json").read_bytes()) == report
    assert report.verdict is not Verdict.PROMOTE
    checks = {c.name: c for c in report.checks}
    assert set(checks) == set(required_checks("factory"))
    without = {name for name, c in checks.items() if c.n == 0 or c.value is None}
    assert without == {TRACKING_SPREAD}, "every check must have its evidence, and six pairs show no spread"
    assert checks["success in factory"].verdict is Verdict.HOLD
    assert checks["invalid output"].verdict is Verdict.PROMOTE
    assert checks["bundle"].verdict is Verdict.PROMOTE
    assert stages == {
        "past failures",
        "success in factory",
        "success in lab",
        "robustness sweep",
        "latency injected",
        "wall clock",
    }


def test_a_policy_that_gives_nan_is_rolled_back_before_it_moves_a_robot(hover: Path, tmp_path: Path) -> None:
    bad = write_policy(tmp_path / "bad", float("nan"))
    report = gate(
        bad, hover, tmp_path / "out", GateSettings(episodes=1, lab_episodes=1), scenarios=[Scenario("lab", 1)]
    )
    assert report.verdict is Verdict.ROLL_BACK
    assert "not finite" in report.reasons[0]


def test_a_policy_that_asks_for_what_is_out_of_reach_is_rolled_back(hover: Path, tmp_path: Path) -> None:
    bad = write_policy(tmp_path / "bad", -0.2)  # 3.2 m up within a chunk
    settings = GateSettings(episodes=1, lab_episodes=1)
    report = gate(bad, hover, tmp_path / "out", settings, scenarios=[Scenario("lab", 1)], workers=1)
    assert report.verdict is Verdict.ROLL_BACK
    assert any(r.startswith("invalid output") for r in report.reasons)
