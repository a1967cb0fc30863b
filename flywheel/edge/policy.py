"""System 2's policy: a bundle run by ONNX Runtime, with numpy and tokenizers and nothing else.

What is loaded is what is hashed: the three files are read once, the digest is of those bytes, and the
session is built from them. The same observation gives the same actions, bit for bit: the noise comes from a
fixed seed and inference runs on a fixed number of threads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from pydantic import ValidationError
from tokenizers import Tokenizer

from flywheel.edge.safety import SafetyLimits
from flywheel.errors import BundleError
from flywheel.robot import FloatArray, Image, Observation
from flywheel.schema import BUNDLE_FILES, Bundle, sha256_bytes

INPUTS = ("images", "tokens", "token_mask", "state", "noise", "num_steps", "prev", "weights")
OUTPUTS = ("actions", "actions_norm")
# Targets this far outside of the workspace are pulled in; further out the whole chunk is refused.
WORKSPACE_SLACK_M = 0.10
# ONNX Runtime's exceptions share no base class below Exception.
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(e for e in vars(ort_errors).values() if isinstance(e, type) and issubclass(e, Exception)),
)


@dataclass(frozen=True)
class Inference:
    """Absolute targets ``actions [chunk, A]``, normalised ones ``[1, chunk, max_action_dim]``, and time."""

    actions: FloatArray
    actions_norm: npt.NDArray[np.float32]
    infer_ns: int


class ActionSource(Protocol):
    """What System 2 asks for actions."""

    bundle: Bundle
    digest: str

    def infer(self, images: dict[str, Image], state: npt.NDArray[np.float32], instruction: str) -> Inference:
        """Actions for one observation; raises ``BundleError`` if the policy gives none."""


def read_bundle(directory: Path) -> tuple[dict[str, bytes], str, Bundle, Tokenizer]:
    """A bundle's files by name, the digest of these bytes, what policy.json says, and the tokenizer.

    Raises ``BundleError``, which says which file is missing or wrong, and how.
    """
    data = {}
    for name in BUNDLE_FILES:
        try:
            data[name] = (directory / name).read_bytes()
        except OSError as e:
            raise BundleError(
                f"{directory / name}: {e.strerror or e}; a bundle holds {', '.join(BUNDLE_FILES)}"
            ) from None
    digest = sha256_bytes("".join(f"{n} {sha256_bytes(data[n])}\n" for n in BUNDLE_FILES).encode())
    try:
        bundle = Bundle.model_validate_json(data["policy.json"])
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        raise BundleError(f"{directory / 'policy.json'}: {key}: {first['msg']}") from None
    try:
        tokenizer = Tokenizer.from_buffer(data["tokenizer.json"])
    except Exception as e:  # the library raises plain Exception
        raise BundleError(f"{directory / 'tokenizer.json'}: {e}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return data, digest, bundle, tokenizer


def encode_instruction(
    tokenizer: Tokenizer, bundle: Bundle, instruction: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Token ids ``[1, L]``, padded on the right, and the mask of the real ones."""
    length = bundle.tokens
    pad = int(bundle.provenance.get("pad_token_id", 0))
    ids = tokenizer.encode(instruction + "\n").ids[:length]
    tokens = np.full((1, length), pad, np.int64)
    tokens[0, : len(ids)] = ids
    return tokens, np.arange(length)[None] < len(ids)


class Policy:
    """A loaded bundle."""

    def __init__(self, session: Any, tokenizer: Tokenizer, bundle: Bundle, digest: str, seed: int) -> None:
        self.bundle = bundle
        self.digest = digest
        self._session = session
        self._tokenizer = tokenizer
        b = bundle
        shape = (1, b.chunk, b.max_action_dim)
        self._noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        self._no_prev = np.zeros(shape, np.float32)
        self._no_weights = np.zeros(b.chunk, np.float32)
        self._steps = np.array(b.num_steps, np.int64)
        self._images = np.zeros((1, len(b.cameras), *b.image_hw, 3), np.uint8)
        self._instruction = ""
        self._tokens = encode_instruction(tokenizer, bundle, "")

    @classmethod
    def load(cls, directory: Path | str, threads: int = 1, seed: int = 0) -> Self:
        """Load and warm up a bundle; ``BundleError`` says which file is missing or wrong, and how.

        ``threads`` is for ONNX Runtime; one is fastest for small models and keeps off System 1's core.
        """
        directory = Path(directory)
        data, digest, bundle, tokenizer = read_bundle(directory)
        if not runs_on(bundle.onnxruntime, onnxruntime.__version__):
            raise BundleError(
                f"{directory / 'policy.json'}: onnxruntime = {bundle.onnxruntime!r}, here is "
                f"{onnxruntime.__version__}: install one in that range, or export the policy for this one"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Waiting threads that spin would take the core that System 1 needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(
                data["policy.onnx"], options, providers=["CPUExecutionProvider"]
            )
        except ORT_ERRORS as e:
            raise BundleError(f"{directory / 'policy.onnx'}: ONNX Runtime cannot load it: {e}") from None
        have = {i.name for i in session.get_inputs()}
        if have != set(INPUTS) or not set(OUTPUTS) <= {o.name for o in session.get_outputs()}:
            raise BundleError(
                f"{directory / 'policy.onnx'}: inputs are {sorted(have)}; need {sorted(INPUTS)} "
                f"and outputs {list(OUTPUTS)}"
            )
        policy = cls(session, tokenizer, bundle, digest, seed)
        policy._warm_up()
        return policy

    def infer(
        self,
        images: dict[str, Image],
        state: npt.NDArray[np.float32],
        instruction: str,
        prev: npt.NDArray[np.float32] | None = None,
        weights: npt.NDArray[np.float32] | None = None,
    ) -> Inference:
        """Actions for one observation: images uint8 ``[H, W, 3]`` by camera, raw state ``[S]``.

        ``prev`` (``actions_norm`` of an earlier chunk, shifted) and ``weights`` ``[chunk]`` guide the chunk
        to continue it (real-time chunking); without them it is free. Raises ``BundleError`` if images or
        state do not fit the bundle, if the graph fails, or if its output has another shape than it should.
        """
        b = self.bundle
        for k, camera in enumerate(b.cameras):
            image = images.get(camera)
            have, need = None if image is None else image.shape, (*b.image_hw, 3)
            if image is None or have != need:
                raise BundleError(f"camera {camera!r}: got {have}, policy {b.name!r} needs {need}")
            self._images[0, k] = image
        if state.shape != (len(b.state_names),):
            raise BundleError(f"state of shape {state.shape}: policy {b.name!r} needs {b.state_names}")
        if instruction != self._instruction:
            self._tokens = encode_instruction(self._tokenizer, b, instruction)
            self._instruction = instruction
        start = time.perf_counter_ns()
        try:
            actions, actions_norm = self._session.run(
                OUTPUTS,
                {
                    "images": self._images,
                    "tokens": self._tokens[0],
                    "token_mask": self._tokens[1],
                    "state": np.asarray(state, np.float32)[None],
                    "noise": self._noise,
                    "num_steps": self._steps,
                    "prev": self._no_prev if prev is None else prev,
                    "weights": self._no_weights if weights is None else weights,
                },
            )
        except ORT_ERRORS as e:
            raise BundleError(f"policy {b.name!r}: inference failed: {e}") from None
        infer_ns = time.perf_counter_ns() - start
        if actions.shape != (1, b.chunk, len(b.action_names)):
            raise BundleError(
                f"policy {b.name!r} gave actions of shape {actions.shape}, its policy.json says "
                f"{(1, b.chunk, len(b.action_names))}"
            )
        return Inference(actions[0].astype(np.float64), actions_norm, infer_ns)

    def _warm_up(self) -> None:
        """The first runs allocate and are slow; they must not count as latency."""
        b = self.bundle
        images: dict[str, Image] = {c: np.zeros((*b.image_hw, 3), np.uint8) for c in b.cameras}
        for _ in range(2):
            self.infer(images, np.zeros(len(b.state_names), np.float32), "warm up")


def runs_on(range_: str, version: str) -> bool:
    """Whether a version of ONNX Runtime lies in a bundle's ``onnxruntime`` ("" holds all)."""
    if not range_:
        return True

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split(".")[:2])

    low, high = (numbers(part.lstrip("<>=")) for part in range_.split(","))
    return low <= numbers(version) < high


def check_actions(actions: FloatArray, bundle: Bundle, limits: SafetyLimits) -> str | None:
    """Look over actions ``[T, A]`` before they are used, in place: None if good, else what is wrong.

    Suction is clipped to 0..1; tool targets a little outside of the workspace are pulled in.
    """
    if actions.ndim != 2 or actions.shape[1] != len(bundle.action_names) or len(actions) < 1:
        return f"shape {actions.shape}: need [steps, {len(bundle.action_names)}]"
    bad = np.argwhere(~np.isfinite(actions))
    if len(bad):
        k, i = bad[0]
        return f"step {k}, {bundle.action_names[i]}: {actions[k, i]} is not finite"
    if bundle.action_space != "tool_position_suction":
        return None
    if limits.workspace is not None:
        lower, upper = np.array(limits.workspace.lower), np.array(limits.workspace.upper)
        xyz = actions[:, :3]
        out = np.maximum(lower - xyz, xyz - upper).max()
        if out > WORKSPACE_SLACK_M:
            return f"tool target {out:.3f} m outside of the workspace"
        np.clip(xyz, lower, upper, out=xyz)
    np.clip(actions[:, 3:], 0.0, 1.0, out=actions[:, 3:])
    return None


def check_waypoints(
    q_chunk: FloatArray, tool: FloatArray, observation: Observation, step_ns: int, limits: SafetyLimits
) -> str | None:
    """Look over joint waypoints ``[T, n]`` from the robot's kinematics: None if good, else what is wrong.

    System 1 limits whatever it gets; a leap that no arm could make means that the kinematics flipped.
    """
    n = len(limits.joints)
    if q_chunk.ndim != 2 or q_chunk.shape[1] != n or tool.shape != (len(q_chunk),):
        return f"waypoints of shape {q_chunk.shape} and tool {tool.shape}: need [steps, {n}] and [steps]"
    if not (np.isfinite(q_chunk).all() and np.isfinite(tool).all()):
        return "waypoints are not finite: a target is out of reach"
    leaps = np.abs(np.diff(np.vstack([observation.q[None], q_chunk]), axis=0))
    most = LEAP_FACTOR * np.array(limits.velocity.max) * step_ns * 1e-9
    if (leaps > most).any():
        k, i = np.argwhere(leaps > most)[0]
        return f"step {k}: {limits.joints[i]} leaps by {leaps[k, i]:.2f} rad"
    return None


LEAP_FACTOR = 3.0  # of the way that the joint's velocity limit allows in a step
