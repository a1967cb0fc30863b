"""A robot and policies that are in motion all the time, to be disturbed.

Five double integrators under the twin arm's limits: nothing of them costs time, so that what is measured is
the runtime. The policy moves the first two joints around a circle for ever, whatever state it finds them in.
Its variants fail where the first joint is far out, once a revolution, as a real graph fails: by a division
by zero that kills the process, by NaN, by taking its time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flywheel.edge.link import Seqlock, aligned
from flywheel.edge.safety import SafetyLimits
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray, JointState, Observation
from flywheel.schema import Bundle
from flywheel.twin.cell import STEP_NS as TICK_NS

JOINTS = 5
INERTIA = 0.5  # kg·m², every joint
SIDE = 16  # px
CENTRE, RADIUS, SPEED = 0.5, 0.5, 3.0  # rad, rad, rad/s along the circle's angle
STEP_NS, STEPS, EXECUTE = 100_000_000, 16, 8
FAR_OUT = 0.9  # rad: where the variants fail, a fifth of a revolution
WORLD = aligned([("q", np.float64, (JOINTS,))])
INTERVENE = "intervene"  # a file; while it exists, the operator steps in

BUNDLE = Bundle(
    name="circle",
    cameras=("eye",),
    image_hw=(SIDE, SIDE),
    state_names=tuple(f"q{i}" for i in range(JOINTS)),
    action_names=tuple(f"q{i}" for i in range(JOINTS)),
    action_space="joint_position",
    chunk=STEPS,
    execute=EXECUTE,
    step_ns=STEP_NS,
    max_action_dim=JOINTS,
    tokens=4,
    num_steps=1,
    limits_sha256="",
)


def limits_file() -> Path:
    """The twin arm's limits."""
    import flywheel.twin

    return Path(flywheel.twin.__file__).parent / "limits.yaml"


class Rig:
    """System 1's half."""

    name = "rig"
    joints = JOINTS
    rate_hz = 1e9 / TICK_NS
    takes: Literal["torque", "position"] = "torque"

    def __init__(self, world: memoryview) -> None:
        self.limits = SafetyLimits.load(limits_file())
        self._q: FloatArray = np.zeros(JOINTS)
        self._dq: FloatArray = np.zeros(JOINTS)
        self._dt = TICK_NS * 1e-9
        self._mass = np.eye(JOINTS) * INERTIA
        self._world = Seqlock(WORLD, world)
        self._record = self._world.record()
        self._seen = self._record["q"][0]

    def read(self, out: JointState) -> None:
        """Joint state, exactly."""
        out.q[:] = self._q
        out.dq[:] = self._dq
        out.mass[:] = self._mass
        out.tool[:] = 0.0
        out.tool[0] = 0.5  # somewhere in the workspace

    def write(self, tau: FloatArray, tool: float) -> None:
        """One tick of free motion."""
        self._q += self._dq * self._dt + tau * (0.5 * self._dt * self._dt / INERTIA)
        self._dq += tau * (self._dt / INERTIA)
        self._seen[:] = self._q
        self._world.write(self._record)

    def stop(self) -> None:
        """Brakes."""
        self._dq[:] = 0.0

    def power_on(self) -> None:
        """Nothing holds it."""


class RigEyes:
    """System 2's half."""

    cameras = ("eye",)

    def __init__(self, world: memoryview) -> None:
        self._world = Seqlock(WORLD, world)
        self._image = np.full((SIDE, SIDE, 3), 128, np.uint8)

    def observe(self) -> Observation:
        """Where the joints are now."""
        record = self._world.record()
        self._world.read(record)
        q = record["q"][0].copy()
        return Observation(time.monotonic_ns(), {"eye": self._image}, q.astype(np.float32), q)

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Actions are joint waypoints."""
        return actions, np.zeros(len(actions))


class Operator:
    """While the file ``intervene`` exists in the directory, goes on around the circle with the elbow bent."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / INTERVENE

    def __call__(self, seen: Observation) -> FloatArray | None:
        """The operator's chunk ``[T, n]``, if there is one."""
        if not self._file.exists():
            return None
        k = np.arange(1, EXECUTE + 1)
        angle = np.arctan2(seen.q[1], seen.q[0] - CENTRE) - SPEED * k * STEP_NS * 1e-9
        chunk = np.zeros((EXECUTE, JOINTS))
        chunk[:, 0] = CENTRE + RADIUS * np.cos(angle)
        chunk[:, 1] = RADIUS * np.sin(angle)
        chunk[:, 2] = seen.q[2] + 0.01 * k
        return chunk


def robot(args: dict[str, Any], world: memoryview) -> Rig:
    """For ``Plan.robot``."""
    return Rig(world)


def perception(args: dict[str, Any], world: memoryview) -> RigEyes:
    """For ``Plan.perception``."""
    return RigEyes(world)


def operator(args: dict[str, Any], eyes: RigEyes) -> Operator:
    """For ``Plan.operator``."""
    return Operator(Path(args["directory"]))


# ── policies ──────────────────────────────────────────────────────────────────────────────────────────

Node = tuple[str, list[str], list[str], dict[str, Any]]  # operator, inputs, outputs, attributes


def write_circle(directory: Path, name: str = "circle") -> Path:
    """The sound policy; another ``name`` gives another digest."""
    return _write(directory, name, [], {})


def write_nan(directory: Path) -> Path:
    """NaN where the joint is far out."""
    nodes: list[Node] = [("Where", ["far", "nan", "moved"], ["actions"], {})]
    return _write(directory, "nan", nodes, {"nan": np.array(np.nan, np.float32)})


def write_crash(directory: Path) -> Path:
    """Where the joint is far out, the one integer quotient that overflows (-2⁶³ / -1): SIGFPE."""
    nodes: list[Node] = [
        ("Where", ["far", "minus_one", "least"], ["divisor"], {}),
        ("Div", ["least", "divisor"], ["quotient"], {}),
        ("Cast", ["quotient"], ["one"], {"to": 1}),
        ("Mul", ["moved", "one"], ["actions"], {}),
    ]
    least, minus_one = np.array([[[-(2**63)]]], np.int64), np.array([[[-1]]], np.int64)
    return _write(directory, "crash", nodes, {"least": least, "minus_one": minus_one})


def write_slow(directory: Path, name: str, trips: int, always: bool) -> Path:
    """``trips`` products of 256 × 256 matrices before the actions, always or at the far end alone."""
    import onnx
    from onnx import TensorProto as T
    from onnx import helper

    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m_in", "matrix"], ["m_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "product",
        [
            helper.make_tensor_value_info("i", T.INT64, []),
            helper.make_tensor_value_info("go_in", T.BOOL, []),
            helper.make_tensor_value_info("m_in", T.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("go_out", T.BOOL, []),
            helper.make_tensor_value_info("m_out", T.FLOAT, [256, 256]),
        ],
    )
    assert isinstance(body, onnx.GraphProto)
    when = "trips_far" if not always else "trips"
    nodes: list[Node] = [
        ("Where", ["furthest", "trips", "none"], ["trips_3d"], {}),
        ("Reshape", ["trips_3d", "scalar"], ["trips_far"], {}),
        ("Loop", [when, "go", "matrix"], ["matrix_out"], {"body": body}),
        ("ReduceMean", ["matrix_out"], ["mean"], {"keepdims": 0}),
        ("Mul", ["mean", "nothing"], ["mean_0"], {}),
        ("Add", ["moved", "mean_0"], ["actions"], {}),
    ]
    constants = {
        "trips": np.array(trips, np.int64),
        "none": np.array(0, np.int64),
        "scalar": np.zeros(0, np.int64),
        "go": np.array(True),
        "matrix": np.eye(256, dtype=np.float32),
        "nothing": np.array(0.0, np.float32),
    }
    return _write(directory, name, nodes, constants)


def _write(directory: Path, name: str, extra: list[Node], constants: dict[str, Any]) -> Path:
    """A bundle with the inputs and outputs of a trained one. ``extra`` turn ``moved`` into ``actions``."""
    try:
        import onnx
    except ImportError:
        raise ConfigError(
            "the policies of this benchmark need the package onnx: install flywheel[train]"
        ) from None
    from onnx import TensorProto as T
    from onnx import helper, numpy_helper

    turns = []
    for k in range(1, STEPS + 1):
        angle = SPEED * k * STEP_NS * 1e-9
        turn = np.zeros((2, JOINTS), np.float32)
        turn[:, :2] = RADIUS * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        turns.append(turn)
    b = BUNDLE.model_copy(update={"name": name})
    centre = np.zeros(JOINTS, np.float32)
    centre[0] = CENTRE
    values = {
        "two": np.array([2], np.int64),
        "start": np.array([0], np.int64),
        "axis": np.array([1], np.int64),
        "centre_2": centre[:2],
        "centre": centre,
        "small": np.array(1e-6, np.float32),
        "turns": np.concatenate(turns, axis=1),
        "shape": np.array([1, STEPS, JOINTS], np.int64),
        "far_out": np.array(FAR_OUT, np.float32),
        "further_out": np.array(0.5 * (1.0 + FAR_OUT), np.float32),
        "first": np.array([1], np.int64),
        "flag": np.array([1, 1, 1], np.int64),
        "pad": np.array([0, 0, 0, 0, 0, b.max_action_dim - len(b.action_names)], np.int64),
        **constants,
    }
    nodes: list[Node] = [
        ("Slice", ["state", "start", "two", "axis"], ["here"], {}),
        ("Sub", ["here", "centre_2"], ["from_centre"], {}),
        ("ReduceL2", ["from_centre", "axis"], ["distance"], {"keepdims": 1}),
        ("Max", ["distance", "small"], ["radius"], {}),
        ("Div", ["from_centre", "radius"], ["unit"], {}),
        ("MatMul", ["unit", "turns"], ["flat"], {}),
        ("Reshape", ["flat", "shape"], ["around"], {}),
        ("Add", ["around", "centre"], ["moved"], {}),
        ("Slice", ["state", "start", "first", "axis"], ["q0"], {}),
        ("Reshape", ["q0", "flag"], ["q0_3d"], {}),
        ("Greater", ["q0_3d", "far_out"], ["far"], {}),
        ("Greater", ["q0_3d", "further_out"], ["furthest"], {}),
        *(extra or [("Identity", ["moved"], ["actions"], {})]),
        ("Pad", ["actions", "pad"], ["actions_norm"], {}),
    ]
    inputs = {
        "images": (T.UINT8, [1, 1, SIDE, SIDE, 3]),
        "tokens": (T.INT64, [1, b.tokens]),
        "token_mask": (T.BOOL, [1, b.tokens]),
        "state": (T.FLOAT, [1, JOINTS]),
        "noise": (T.FLOAT, [1, STEPS, JOINTS]),
        "num_steps": (T.INT64, []),
        "prev": (T.FLOAT, [1, STEPS, JOINTS]),
        "weights": (T.FLOAT, [STEPS]),
    }
    graph = helper.make_graph(
        [helper.make_node(op, takes, gives, **more) for op, takes, gives, more in nodes],
        name,
        [helper.make_tensor_value_info(n, *spec) for n, spec in inputs.items()],
        [helper.make_tensor_value_info(n, T.FLOAT, [1, STEPS, JOINTS]) for n in ("actions", "actions_norm")],
        [numpy_helper.from_array(v, k) for k, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "policy.onnx").write_bytes(model.SerializeToString())
    (directory / "tokenizer.json").write_text(_TOKENIZER)
    (directory / "policy.json").write_bytes(b.to_bytes())
    return directory


_TOKENIZER = """{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
"model": {"type": "WordLevel", "vocab": {"[unk]": 1, "move": 2}, "unk_token": "[unk]"}}
"""
