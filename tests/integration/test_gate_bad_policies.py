"""Policies that went wrong the way policies do, caught by the gate in the real twin and on the real clock.

Each is the base policy of the checkout with its graph edited; each still loads, and gives finite actions of
the right shape. The bars are wide (30 points), so that a few pairs decide. One edit is harmless: it shows
that it is not the editing that is caught.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flywheel.config import GateSettings
from flywheel.gate import Scenario, bundle, gate
from flywheel.gate.judge import Judge
from flywheel.gate.task import LAB
from flywheel.schema import BUNDLE_FILES, Check, Verdict, bundle_digest

pytestmark = [pytest.mark.integration, pytest.mark.soak]

BASE = Path(__file__).parents[2] / "models" / "base" / "bundle"
SETTINGS = GateSettings(
    shift=LAB, episodes=15, lab_episodes=15, look_pairs=5, min_lift=-0.3, max_lab_drop=0.3,
    max_progress_drop=0.3, wall_s=1.0, wall_pairs=4, wall_looks=1,
)  # fmt: skip
SCENARIOS = [Scenario(LAB, seed) for seed in range(4)]
Edit = Callable[[Any, dict[str, Any]], None]  # the model, and its initializers by name


def edited(directory: Path, edit: Edit) -> Path:
    """The base bundle with its graph edited, in a new directory."""
    import onnx

    directory.mkdir()
    for name in BUNDLE_FILES:
        shutil.copyfile(BASE / name, directory / name)
    model = onnx.load(str(BASE / "policy.onnx"))
    edit(model, {t.name: t for t in model.graph.initializer})
    onnx.save(model, str(directory / "policy.onnx"))
    assert bundle_digest(directory) != bundle_digest(BASE)
    assert bundle.check(directory, BASE).verdict is Verdict.PROMOTE, "it must look like a sound bundle"
    return directory


def put(tensor: Any, values: Any) -> None:
    from onnx import numpy_helper

    tensor.CopyFrom(numpy_helper.from_array(np.asarray(values, np.float32), tensor.name))


def harmless(model: Any, tensors: dict[str, Any]) -> None:
    model.doc_string = "the same policy, exported again"


def trained_wrong(model: Any, tensors: dict[str, Any]) -> None:
    """Weights as a training run with far too large a step leaves them: half noise."""
    from onnx import numpy_helper

    rng = np.random.default_rng(0)
    changed = 0
    for tensor in tensors.values():
        w = numpy_helper.to_array(tensor)
        if w.dtype == np.float32 and w.ndim >= 2 and w.size > 2000:
            put(tensor, w + w.std() * rng.standard_normal(w.shape))
            changed += 1
    assert changed > 30


def exported_wrong(model: Any, tensors: dict[str, Any]) -> None:
    """The statistics of state and action swapped: what fine-tuning with the wrong processors exports."""
    from onnx import numpy_helper

    for state, action in (("mean", "action_mean"), ("add", "action_std")):
        a, b = (numpy_helper.to_array(tensors[n]) for n in (state, action))
        put(tensors[state], b)
        put(tensors[action], a)


def slow(model: Any, tensors: dict[str, Any]) -> None:
    """The same actions, tens of milliseconds later: a chain of products that adds nothing to them."""
    from onnx import helper, numpy_helper

    side, products = 448, 10
    constants = {
        "slow_ones": np.full((side, side), 1e-3, np.float32),
        "slow_zero": np.float32(0),
        "slow_axes": np.array([0, 1, 2], np.int64),
    }
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
    nodes = [
        # From the noise, so that it cannot be worked out when the graph is loaded.
        helper.make_node("ReduceMean", ["noise", "slow_axes"], ["slow_mean"], keepdims=0),
        helper.make_node("Add", ["slow_ones", "slow_mean"], ["slow_0"]),
    ]
    for i in range(products):
        nodes += [
            helper.make_node("MatMul", [f"slow_{i}", f"slow_{i}"], [f"slow_wide_{i}"]),
            helper.make_node("Tanh", [f"slow_wide_{i}"], [f"slow_{i + 1}"]),
        ]
    nodes += [
        helper.make_node("ReduceMean", [f"slow_{products}"], ["slow_end"], keepdims=0),
        helper.make_node("Mul", ["slow_end", "slow_zero"], ["slow_nothing"]),
    ]
    last = model.graph.node[-1]
    assert list(last.output) == ["actions"]
    last.output[0] = "actions_in_time"
    nodes.append(helper.make_node("Add", ["actions_in_time", "slow_nothing"], ["actions"]))
    model.graph.node.extend(nodes)


def by_name(checks: tuple[Check, ...] | list[Check]) -> dict[str, Check]:
    return {c.name: c for c in checks}


@pytest.mark.parametrize("edit", [trained_wrong, exported_wrong])
def test_a_policy_that_was_made_wrong_is_rolled_back_by_its_attempts(edit: Edit, tmp_path: Path) -> None:
    bad = edited(tmp_path / "bad", edit)
    report = gate(bad, BASE, tmp_path / "out", SETTINGS, scenarios=SCENARIOS)
    assert report.verdict is Verdict.ROLL_BACK, report.reasons
    success = by_name(list(report.checks))["success in lab"]
    assert success.verdict is Verdict.ROLL_BACK
    assert success.n < SETTINGS.episodes, "so bad a policy is not run to the end of the budget"
    assert "not run" in str(by_name(list(report.checks))["wall: misses"].evidence["reason"])


def test_a_slow_policy_is_caught_on_the_wall_clock_and_nowhere_else(tmp_path: Path) -> None:
    bad = edited(tmp_path / "bad", slow)
    report = gate(bad, BASE, tmp_path / "out", SETTINGS, scenarios=SCENARIOS)
    checks = by_name(list(report.checks))
    assert report.verdict is not Verdict.PROMOTE
    inference = checks["wall: inference p50"]
    assert inference.verdict is not Verdict.PROMOTE
    assert inference.value is not None
    assert inference.value > 1.5, "it must be the slowness that is seen"
    for name in ("success in lab", "progress in lab", "invalid output", "tracking in lockstep"):
        assert checks[name].verdict is Verdict.PROMOTE, "lockstep does not wait for a policy"


def test_the_same_policy_exported_again_passes_every_check_in_lockstep(tmp_path: Path) -> None:
    """Otherwise the bad ones might be caught for having been edited at all."""
    from flywheel.evaluate import Evaluator

    same = edited(tmp_path / "same", harmless)
    with Evaluator() as pool:
        judge = Judge(
            (BASE, same), (bundle_digest(BASE), bundle_digest(same)), SETTINGS, pool.run,
            lambda *_: None, lambda *_: None,
        )  # fmt: skip
        checks = by_name(judge.checks(SCENARIOS))
    lockstep = {n: c.verdict for n, c in checks.items() if not n.startswith("wall")}
    assert set(lockstep.values()) == {Verdict.PROMOTE}, lockstep
    assert checks["progress in lab"].value == 0.0
    assert all(c.verdict is Verdict.HOLD for n, c in checks.items() if n.startswith("wall"))
