"""Joins the prefix and the denoising step into one model, with the steps in an ONNX Loop.

Every weight is stored once, and the number of steps, the noise and the guidance are run-time inputs. After
the loop the actions are unnormalised, and their position part becomes absolute by adding the state's.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_SHARED = {"prefix_mask", "kv_cache", "prev", "weights"}  # what the step reads from outside of the loop
_STEP = "step_"  # prefix of every name inside of it, so that none collides


def join(
    prefix: onnx.ModelProto,
    step: onnx.ModelProto,
    chunk: int,
    width: int,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    relative: int,
) -> onnx.ModelProto:
    """One model from two.

    Args:
        prefix: outputs ``prefix_mask``, ``kv_cache``.
        step: inputs those, and ``x``, ``t``, ``dt``, ``prev``, ``weights``; output ``x_next``.
        chunk: steps of an action chunk.
        width: of the noise, ``max_action_dim``.
        mean: of the actions, ``[A]``.
        std: of the actions, ``[A]``.
        relative: the first so many action dimensions are relative to the same dimensions of the state.
    """
    initializers = list(prefix.graph.initializer)
    for tensor in step.graph.initializer:
        tensor.name = _inside(tensor.name)
        initializers.append(tensor)
    for node in step.graph.node:
        if any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
            raise ValueError(
                f"{node.op_type} in the denoising step has a graph of its own; names would collide"
            )
        node.name = _STEP + node.name
        node.input[:] = [_inside(n) for n in node.input]
        node.output[:] = [_inside(n) for n in node.output]
    dims = [1, chunk, width]
    body = helper.make_graph(
        [
            helper.make_node("Cast", ["loop_i"], ["loop_f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["loop_f", "loop_dt"], ["loop_gone"]),
            helper.make_node("Add", ["loop_gone", "loop_one"], ["loop_time"]),
            helper.make_node("Reshape", ["loop_time", "loop_shape"], [_STEP + "t"]),
            helper.make_node("Identity", ["loop_dt"], [_STEP + "dt"]),
            *step.graph.node,
            helper.make_node("Identity", ["loop_go"], ["loop_go_on"]),
        ],
        "denoise",
        [
            helper.make_tensor_value_info("loop_i", TensorProto.INT64, []),
            helper.make_tensor_value_info("loop_go", TensorProto.BOOL, []),
            helper.make_tensor_value_info(_STEP + "x", TensorProto.FLOAT, dims),
        ],
        [
            helper.make_tensor_value_info("loop_go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info(_STEP + "x_next", TensorProto.FLOAT, dims),
        ],
    )
    actions = len(mean)
    constants = {
        "loop_one": np.float32(1),
        "loop_minus_one": np.float32(-1),
        "loop_shape": np.array([1], np.int64),
        "loop_true": np.bool_(True),
        "cut_from": np.array([0], np.int64),
        "cut_to": np.array([actions], np.int64),
        "cut_axis": np.array([2], np.int64),
        "action_mean": mean.astype(np.float32),
        "action_std": std.astype(np.float32),
        "base_from": np.array([0], np.int64),
        "base_to": np.array([relative], np.int64),
        "base_axis": np.array([1], np.int64),
        "base_pad": np.array([0, 0, 0, actions - relative], np.int64),
        "base_shape": np.array([1, 1, actions], np.int64),
        "base_zero": np.float32(0),
    }
    initializers += [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    nodes = [
        *prefix.graph.node,
        helper.make_node("Cast", ["num_steps"], ["loop_steps"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["loop_minus_one", "loop_steps"], ["loop_dt"]),
        helper.make_node("Loop", ["num_steps", "loop_true", "noise"], ["actions_norm"], body=body),
        helper.make_node("Slice", ["actions_norm", "cut_from", "cut_to", "cut_axis"], ["cut"]),
        helper.make_node("Mul", ["cut", "action_std"], ["scaled"]),
        helper.make_node("Add", ["scaled", "action_mean"], ["unnormalised"]),
        helper.make_node("Slice", ["state", "base_from", "base_to", "base_axis"], ["base_part"]),
        helper.make_node("Pad", ["base_part", "base_pad", "base_zero"], ["base_padded"]),
        helper.make_node("Reshape", ["base_padded", "base_shape"], ["base"]),
        helper.make_node("Add", ["unnormalised", "base"], ["actions"]),
    ]
    inputs = [
        *prefix.graph.input,
        helper.make_tensor_value_info("noise", TensorProto.FLOAT, dims),
        helper.make_tensor_value_info("num_steps", TensorProto.INT64, []),
        helper.make_tensor_value_info("prev", TensorProto.FLOAT, dims),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, [chunk]),
    ]
    outputs = [
        helper.make_tensor_value_info("actions", TensorProto.FLOAT, [1, chunk, actions]),
        helper.make_tensor_value_info("actions_norm", TensorProto.FLOAT, dims),
    ]
    return helper.make_model(
        helper.make_graph(nodes, "policy", inputs, outputs, initializers),
        opset_imports=list(prefix.opset_import),
        ir_version=prefix.ir_version,
        producer_name="flywheel",
    )


def _inside(name: str) -> str:
    return name if name == "" or name in _SHARED else _STEP + name
