"""Episodes as the policy sees them: a few views of each, through the deployed bundle's own prefix graph.

A bundle's graph holds the prefix (pictures, instruction and state, attended to together) under fixed names:
``export.join`` reads the key/value cache of every layer from there, and so does this. What lies before it is
cut out and run by ONNX Runtime; no torch. The features of a view are the values that the last layer of the
prefix offers to the action expert, averaged over the tokens that are there: what the policy decides by.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from flywheel.edge.policy import ORT_ERRORS, encode_instruction, read_bundle
from flywheel.errors import BundleError
from flywheel.schema import Bundle

CACHE, MASK = "kv_cache", "prefix_mask"  # inner tensors, see export/join.py
_SEEN = ("images", "tokens", "token_mask", "state")

Views = Mapping[str, NDArray[np.uint8]]  # by camera, [K, H, W, 3]
Features = NDArray[np.float32]  # [K, D]


class NoEncoder(BundleError):
    """The bundle is sound, but its graph does not show what the policy sees."""


class Encoder:
    """The prefix of one bundle."""

    def __init__(self, session: Any, tokenizer: Any, bundle: Bundle, digest: str) -> None:
        self.bundle = bundle
        self.digest = digest  # of the bundle
        self._session = session
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, directory: Path) -> Self:
        """From a bundle directory. Raises ``NoEncoder`` where its graph has no prefix of the known form,
        ``BundleError`` where the bundle itself is missing or wrong.
        """
        data, digest, bundle, tokenizer = read_bundle(directory)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a sum in another order is another sum
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        graph = _prefix_of(data["policy.onnx"], directory / "policy.onnx")
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except ORT_ERRORS as e:
            raise NoEncoder(f"{directory / 'policy.onnx'}: its prefix cannot be run alone: {e}") from None
        return cls(session, tokenizer, bundle, digest)

    def misfit(self, cameras: Mapping[str, tuple[int, ...]], state_dim: int) -> str:
        """Why views of these cameras (shape by name) with such a state cannot be encoded; "" if they can."""
        b = self.bundle
        for c in b.cameras:
            if cameras.get(c) != (*b.image_hw, 3):
                return f"camera {c!r} is {cameras.get(c)}, the policy sees {(*b.image_hw, 3)}"
        if state_dim != len(b.state_names):
            return f"the state has {state_dim} dimensions, the policy's {len(b.state_names)}"
        return ""

    def features(self, views: Views, states: NDArray[np.float32], instruction: str) -> Features:
        """``[K, D]`` of views ``[K, H, W, 3]`` by camera with their raw states ``[K, S]``.

        ``misfit`` must have been asked. Raises ``BundleError`` if the graph fails. Not all need be finite.
        """
        tokens, mask = encode_instruction(self._tokenizer, self.bundle, instruction)
        out = []
        for k, state in enumerate(np.asarray(states, np.float32)):
            images = np.stack([views[c][k] for c in self.bundle.cameras])[None]
            feed = {"images": images, "tokens": tokens, "token_mask": mask, "state": state[None]}
            try:
                cache, present = self._session.run((CACHE, MASK), feed)
            except ORT_ERRORS as e:
                raise BundleError(f"policy {self.bundle.name!r}: its prefix failed: {e}") from None
            values = cache[-1, 1, 0][:, present[0]]  # [heads, tokens, head_dim]
            out.append(values.mean(axis=1).reshape(-1))
        return np.stack(out)

    def resolution(self, views: Views, states: NDArray[np.float32], instruction: str) -> float:
        """Rms change of the features when every picture moves by one pixel: what is too little to matter.

        It makes distances comparable between policies, whose features have no scale of their own.
        """
        moved = {c: np.concatenate([v[:, :, 1:], v[:, :, -1:]], axis=2) for c, v in views.items()}
        a, b = (self.features(v, states, instruction) for v in (views, moved))
        return float(np.sqrt(np.mean((a - b) ** 2, dtype=np.float64)))


def _prefix_of(data: bytes, path: Path) -> bytes:
    """The part of a policy's graph that the prefix is computed by, as a model of its own."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as e:
        raise BundleError(f"{path}: is no ONNX model: {e}") from None
    made = {name for node in model.graph.node for name in node.output}
    if missing := sorted({CACHE, MASK} - made):
        raise NoEncoder(f"{path}: its graph has no {' and no '.join(missing)}")
    # The outputs' types must be declared; their shapes follow from the graph.
    declare = onnx.helper.make_tensor_value_info
    model.graph.value_info.append(declare(CACHE, onnx.TensorProto.FLOAT, None))
    model.graph.value_info.append(declare(MASK, onnx.TensorProto.BOOL, None))
    try:
        cut = onnx.utils.Extractor(model).extract_model(list(_SEEN), [CACHE, MASK])
    except (ValueError, KeyError, AssertionError) as e:
        raise NoEncoder(f"{path}: its prefix cannot be cut out: {e}") from None
    return bytes(cut.SerializeToString())
