"""Smaller bundles: weights of 8 or 16 bits.

Nothing here says that a smaller bundle is good: ``stage`` measures it and refuses it where it is not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_SMALL = 1024  # elements; constants below it stay as they are


def to_int8(source: Path, target: Path) -> None:
    """Weights of matrix products and embeddings as int8, activations quantised as they come.

    Weights use 7 of the 8 bits: processors without VNNI add two products in 16 bits and would saturate, so
    that a bundle that passed on one machine could fail on another. Convolutions stay as they are: there is
    one, over the image's patches.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        extra_options={"EnableSubgraph": True},
    )


def to_float16(source: Path, target: Path) -> None:
    """Weights stored as float16 and widened when the bundle is loaded; computed with as before.

    Half the bytes to sign, send and store, at the same speed: processors compute in float32 anyway.
    """
    model = onnx.load(str(source))
    graph = model.graph
    widen = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _SMALL:
            continue
        name = tensor.name
        with np.errstate(over="ignore"):  # what overflows becomes infinite, and parity refuses that
            half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        widen.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*widen, *rest])
    onnx.save(model, str(target))
