"""A policy bundle small enough to be made in a test, whose graph has the prefix that real ones have."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flywheel.schema import Bundle
from tests.samples import CHUNK, STATE

BASE = Path(__file__).parents[1] / "models" / "base" / "bundle"
PATCHES = 16


def bundle(directory: Path, prefix: bool = True, weights: int = 0, constant: bool = False) -> Path:
    """Write a bundle that sees the wrist camera of ``tests.attempts``; its directory.

    ``prefix``: whether the inner tensors have the names that export gives them. ``weights``: another number,
    another policy. ``constant``: features that do not depend on what is seen.
    """
    cache, mask = ("kv_cache", "prefix_mask") if prefix else ("hidden", "seen")
    rng = np.random.default_rng(weights)
    constants = {
        "flat": np.array([1, 64, 64, 3], np.int64),
        "tokens_of": np.array([1, 1, 1, 1, 3, PATCHES], np.int64),
        "grey": np.float32(0.0 if constant else 1 / 255.0),
        "mix": rng.normal(size=(3, 5)).astype(np.float32),
        "place": rng.normal(size=(PATCHES, 1)).astype(np.float32),
        "present": np.ones((1, PATCHES), bool),
        "shape": np.array([1, CHUNK, 4], np.int64),
        "zeros": np.zeros((1, CHUNK, 4), np.float32),
        "norm": np.zeros((1, CHUNK, 8), np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "grey"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "flat"], ["one"]),
        helper.make_node("Transpose", ["one"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["patches"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Reshape", ["patches", "tokens_of"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["rows"], perm=[0, 1, 2, 3, 5, 4]),
        helper.make_node("MatMul", ["rows", "mix"], ["mixed"]),
        helper.make_node("Tanh", ["mixed"], ["bent"]),
        helper.make_node("Mul", ["bent", "place"], ["values"]),
        helper.make_node("Concat", ["values", "values"], [cache], axis=1),
        helper.make_node("Identity", ["present"], [mask]),
        helper.make_node("Identity", ["zeros"], ["actions"]),
        helper.make_node("Identity", ["norm"], ["actions_norm"]),
    ]
    declare = helper.make_tensor_value_info
    f, i, b, u = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.UINT8
    inputs = [
        declare("images", u, [1, 1, 64, 64, 3]),
        declare("tokens", i, [1, 12]),
        declare("token_mask", b, [1, 12]),
        declare("state", f, [1, STATE]),
        declare("noise", f, [1, CHUNK, 8]),
        declare("num_steps", i, []),
        declare("prev", f, [1, CHUNK, 8]),
        declare("weights", f, [CHUNK]),
    ]
    outputs = [declare("actions", f, [1, CHUNK, 4]), declare("actions_norm", f, [1, CHUNK, 8])]
    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "policy", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    directory.mkdir(parents=True)
    onnx.save(model, str(directory / "policy.onnx"))
    shutil.copy(BASE / "tokenizer.json", directory)
    about = Bundle.model_validate_json((BASE / "policy.json").read_bytes()).model_copy(
        update={"state_names": ("x", "y", "z", "held", "suction"), "chunk": CHUNK}
    )
    (directory / "policy.json").write_bytes(about.to_bytes())
    return directory
