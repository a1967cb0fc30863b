"""A robot so small that what it does can be checked by hand, and policies for it.

Two joints, each a double integrator of 0.5 kg·m²; the camera sees one brightness, which scales the goal.
``write_bundle`` makes a policy as a real ONNX graph with the inputs and outputs of a trained one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from flywheel.edge.link import Seqlock, aligned
from flywheel.edge.safety import SafetyLimits
from flywheel.robot import FloatArray, JointState, Observation
from flywheel.schema import Bundle

JOINTS = 2
SIDE = 16  # px
CHUNK, STEP_NS = 16, 100_000_000
INERTIA = 0.5
LIMITS: dict[str, Any] = {
    "schema_version": 1,
    "robot": "tiny",
    "joints": ["a", "b"],
    "position": {"clause": "test clause", "lower": [-2.0, -1.0], "upper": [2.0, 1.5], "margin": 0.02},
    "velocity": {"clause": "test clause", "max": [3.0, 2.0], "overspeed": 1.25},
    "acceleration": {"clause": "test clause", "max": [25.0, 15.0]},
    "jerk": {"clause": "test clause", "max": [1000.0, 600.0]},
    "torque": {"clause": "test clause", "max": [80.0, 40.0]},
    "tracking_error": {"clause": "test clause", "max": 0.25},
    "tool_speed": None,
    "workspace": None,
    "stops": {"clause": "test clause", "protective": 1, "bound_s": 0.5},
    "ladder": {
        "clause": "test clause",
        "max_age_s": 1.0,
        "carry_on_s": 0.1,
        "ramp_s": 0.4,
        "hold_s": 1.0,
        "recover_chunks": 2,
        "recover_fallback_chunks": 3,
    },
}


def limits(**changes: Any) -> SafetyLimits:
    """The tiny robot's limits, some of them changed."""
    return SafetyLimits.parse(yaml.safe_dump(LIMITS | changes).encode(), "tiny.yaml")


def write_limits(path: Path) -> Path:
    """The limits as a file."""
    path.write_text(yaml.safe_dump(LIMITS))
    return path


class Tiny:
    """Robot and perception at once; ``disturb`` may bend what the sensors say."""

    name = "tiny"
    joints = JOINTS
    takes: Literal["torque", "position"] = "torque"
    cameras: tuple[str, ...] = ("eye",)

    def __init__(self, brightness: int = 128, dt: float = 1e-3) -> None:
        self.limits = limits()
        self.q: FloatArray = np.zeros(JOINTS)
        self.dq: FloatArray = np.zeros(JOINTS)
        self.t_ns = 0
        self.dt = dt
        self.rate_hz = 1.0 / dt
        self.tool = 0.0
        self.tau: FloatArray = np.zeros(JOINTS)
        self.stops = self.starts = 0
        self.knows_mass = True
        self.brightness = brightness
        self.disturb: Callable[[JointState], None] | None = None
        self.blocked = False
        self.world: Seqlock | None = None

    def read(self, out: JointState) -> None:
        out.t_ns = self.t_ns
        out.q[:] = self.q
        out.dq[:] = self.dq
        out.held = self.tool
        if self.knows_mass:
            out.mass[0, 0] = out.mass[1, 1] = INERTIA
        if self.disturb is not None:
            self.disturb(out)

    def write(self, tau: FloatArray, tool: float) -> None:
        self.tau[:] = tau
        self.tool = tool
        if not self.blocked:
            self.q += self.dq * self.dt + tau * (0.5 * self.dt * self.dt / INERTIA)
            self.dq += tau * (self.dt / INERTIA)
        self.t_ns += round(self.dt * 1e9)
        if self.world is not None:
            record = self.world.record()
            record["q"] = self.q
            self.world.write(record)

    def stop(self) -> None:
        self.stops += 1
        self.dq[:] = 0.0  # brakes

    def power_on(self) -> None:
        self.starts += 1

    def observe(self) -> Observation:
        return look(self.t_ns, self.q, self.tool, self.brightness)

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        return actions[:, :JOINTS].copy(), actions[:, JOINTS].copy()


def look(t_ns: int, q: FloatArray, tool: float, brightness: int) -> Observation:
    """What the tiny robot sees."""
    image = np.full((SIDE, SIDE, 3), brightness, np.uint8)
    return Observation(t_ns, {"eye": image}, np.array([*q, tool], np.float32), q.copy())


BUNDLE = Bundle(
    name="tiny",
    cameras=("eye",),
    image_hw=(SIDE, SIDE),
    state_names=("a", "b", "tool"),
    action_names=("a", "b", "tool"),
    action_space="joint_position",
    chunk=CHUNK,
    execute=8,
    step_ns=STEP_NS,
    max_action_dim=4,
    tokens=6,
    num_steps=4,
    limits_sha256="",
    provenance={"pad_token_id": 0},
)


Nodes = list[tuple[str, list[str], str, dict[str, int]]]  # operator, inputs, output, attributes


def write_bundle(directory: Path, goal: tuple[float, float] = (1.0, -0.8), bundle: Bundle = BUNDLE) -> Path:
    """A policy that approaches ``goal`` times the image's brightness (0..1), as a real bundle.

    Targets: goal + (state - goal) · exp(-2 t) at each step; the tool is on while the image is bright.
    A goal of NaN gives NaN actions.
    """
    decay = np.exp(-2.0 * STEP_NS * 1e-9 * np.arange(1, bundle.chunk + 1)).astype(np.float32)
    constants = {
        "goal": np.array([[[*goal, 1.0]]], np.float32),
        "decay": decay[None, :, None],
        "full": np.array(255.0, np.float32),
        "axes": np.array([1], np.int64),
    }
    nodes: Nodes = [
        ("Cast", ["images"], "pixels", {"to": 1}),
        ("ReduceMean", ["pixels"], "mean", {"keepdims": 0}),
        ("Div", ["mean", "full"], "bright", {}),
        ("Mul", ["goal", "bright"], "there", {}),
        ("Unsqueeze", ["state", "axes"], "here", {}),
        ("Sub", ["here", "there"], "away", {}),
        ("Mul", ["away", "decay"], "left", {}),
        ("Add", ["there", "left"], "actions", {}),
    ]
    return _write(directory, bundle, nodes, constants)


HOVER = BUNDLE.model_copy(
    update={
        "name": "hover",
        "cameras": ("wrist",),
        "image_hw": (64, 64),
        "state_names": ("tool_x", "tool_y", "tool_z", "held"),
        "action_names": ("tool_x", "tool_y", "tool_z", "suction"),
        "action_space": "tool_position_suction",
        "max_action_dim": 8,
    }
)


def write_hover_bundle(directory: Path) -> Path:
    """A policy for the twin that slowly moves sideways and up from wherever the tool is, suction off."""
    drift = np.arange(1, CHUNK + 1, dtype=np.float32)[None, :, None] * np.array(
        [0, 0.004, 0.001, 0], np.float32
    )
    constants = {
        "drift": drift.astype(np.float32),
        "only": np.array([[[1.0, 1.0, 1.0, 0.0]]], np.float32),
        "axes": np.array([1], np.int64),
    }
    nodes: Nodes = [
        ("Unsqueeze", ["state", "axes"], "here", {}),
        ("Mul", ["here", "only"], "tool", {}),
        ("Add", ["tool", "drift"], "actions", {}),
    ]
    return _write(directory, HOVER, nodes, constants)


def _write(directory: Path, b: Bundle, nodes: Nodes, constants: dict[str, Any]) -> Path:
    """A bundle whose graph has the inputs and outputs of a trained one; ``nodes`` compute ``actions``."""
    import onnx
    from onnx import TensorProto as T
    from onnx import helper, numpy_helper

    pad = np.array([0, 0, 0, 0, 0, b.max_action_dim - len(b.action_names)], np.int64)
    inputs = {
        "images": (T.UINT8, [1, len(b.cameras), *b.image_hw, 3]),
        "tokens": (T.INT64, [1, b.tokens]),
        "token_mask": (T.BOOL, [1, b.tokens]),
        "state": (T.FLOAT, [1, len(b.state_names)]),
        "noise": (T.FLOAT, [1, b.chunk, b.max_action_dim]),
        "num_steps": (T.INT64, []),
        "prev": (T.FLOAT, [1, b.chunk, b.max_action_dim]),
        "weights": (T.FLOAT, [b.chunk]),
    }
    outputs = {"actions": len(b.action_names), "actions_norm": b.max_action_dim}
    graph = helper.make_graph(
        [
            *(helper.make_node(op, takes, [gives], **more) for op, takes, gives, more in nodes),
            helper.make_node("Pad", ["actions", "pad"], ["actions_norm"]),
        ],
        b.name,
        [helper.make_tensor_value_info(n, *spec) for n, spec in inputs.items()],
        [helper.make_tensor_value_info(n, T.FLOAT, [1, b.chunk, w]) for n, w in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in {**constants, "pad": pad}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "policy.onnx").write_bytes(model.SerializeToString())
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"[unk]": 1, "move": 2, "left": 3}, "unk_token": "[unk]"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "policy.json").write_bytes(b.to_bytes())
    return directory


# ── on the wall clock: one process owns the joints, the other looks at them ───────────────────────────

WORLD = aligned([("q", np.float64, (JOINTS,))])


def wall_robot(args: dict[str, Any], world: memoryview) -> Tiny:
    """For ``Plan.robot``."""
    robot = Tiny(dt=args.get("dt", 1e-3))
    robot.world = Seqlock(WORLD, world)
    return robot


class Eyes(Tiny):
    """What System 2's process has of the tiny robot."""

    def observe(self) -> Observation:
        import time

        assert self.world is not None
        record = self.world.record()
        self.world.read(record)
        return look(time.monotonic_ns(), record["q"][0], 0.0, self.brightness)


def wall_perception(args: dict[str, Any], world: memoryview) -> Eyes:
    """For ``Plan.perception``."""
    eyes = Eyes(args.get("brightness", 255))
    eyes.world = Seqlock(WORLD, world)
    return eyes
