"""A robot that is not what the twin's model says: stands in for a real one where identification is measured.

Its arm has parameters drawn by a hidden seed, its sensors have noise, and its controller knows neither: it
computes with the model's own parameters and what the sensors say, as a real robot's does. The real systems
drive it, the scripted operator gives the orders, and what it leaves are sealed episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from flywheel import schema
from flywheel.edge.lockstep import Lockstep
from flywheel.edge.policy import Inference
from flywheel.edge.rows import Rings
from flywheel.episode import new_episode_id, seal
from flywheel.errors import BundleError
from flywheel.robot import FloatArray, Image, JointState, Observation
from flywheel.robot.twin import TwinPerception, TwinRobot
from flywheel.schema import Bundle, Manifest, Outcome, Trigger, TriggerKind
from flywheel.twin.arm import Dynamics, nominal_values
from flywheel.twin.cell import JOINTS, MODEL_SHA256, Cell
from flywheel.twin.operator import plan
from flywheel.twin.parameters import JOINT_NAMES, KINDS, NAMES, Estimate, TwinParameters
from flywheel.twin.sampling import ACTION_NAMES, STATE_NAMES
from flywheel.twin.shift import LAB, Shift

NOISE_Q_RAD, NOISE_DQ_RAD_S = 1e-4, 2e-3
STEP_S = 0.1
EPOCH_NS = 1_760_000_000_000_000_000
NOBODY = "0" * 64  # digest of a policy that never acts


def drawn(seed: int) -> TwinParameters:
    """Parameters of a robot, by its hidden seed: all about as far from the model as the prior expects."""
    rng = np.random.default_rng(seed)
    found = {}
    model = nominal_values()
    for name in NAMES:
        kind, _, of = name.partition(".")
        if KINDS[kind].logarithmic:
            value = model[name] * float(np.exp(KINDS[kind].spread * rng.uniform(-1.3, 1.3)))
        elif kind == "friction":
            value = KINDS[kind].spread * model[f"damping.{of}"] * float(rng.uniform(0.1, 1.3))
        else:
            value = KINDS[kind].spread * float(rng.uniform(0.1, 1.3))
        found[name] = Estimate(
            nominal=model[name], value=value, low=value, high=value, identified=True, unit=KINDS[kind].unit
        )
    return TwinParameters(model_sha256=MODEL_SHA256, parameters=found)


class StandIn(TwinRobot):
    """A twin with other parameters, whose readings are noisy and whose controller believes in the model."""

    def __init__(self, cell: Cell, noise_seed: int, noise: float = 1.0) -> None:
        super().__init__(cell, cameras=())
        self._rng = np.random.default_rng(noise_seed)
        self._noise = noise * np.array([NOISE_Q_RAD, NOISE_DQ_RAD_S])
        self._believed = Dynamics()

    def read(self, out: JointState) -> None:
        """Noisy joints; inertia and bias of the model at what they say."""
        super().read(out)
        noise = self._noise[:, None] * self._rng.standard_normal((2, JOINTS))
        out.q = out.q + noise[0]
        out.dq = out.dq + noise[1]
        out.bias = self._believed.at(out.q, out.dq, out.mass)


class _Nobody:
    """The policy of a robot that its operator steers all the time."""

    digest = NOBODY
    bundle = Bundle(
        name="operator",
        cameras=(),
        image_hw=(64, 64),
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        action_space="tool_position_suction",
        chunk=16,
        execute=8,
        step_ns=round(STEP_S * 1e9),
        max_action_dim=8,
        tokens=12,
        num_steps=1,
        limits_sha256="",
    )

    def infer(
        self, images: dict[str, Image], state: np.typing.NDArray[np.float32], instruction: str
    ) -> Inference:
        raise BundleError("nobody decides here but the operator")


class _Rows:
    """Keeps every control row."""

    def __init__(self, rings: Rings) -> None:
        self._reader = rings.control.reader()
        self.kept: list[np.typing.NDArray[np.void]] = []

    def poll(self, now_ns: int) -> None:
        self.kept.append(self._reader.poll().rows.copy())


def episodes(
    out: Path,
    parameters: TwinParameters | None,
    scenes: Sequence[int],
    *,
    seconds: float = 6.0,
    noise: float = 1.0,
    still: bool = False,
    shift: Shift = LAB,
    robot: str = "stand-in",
) -> list[Path]:
    """Sealed episodes of the operator working in scenes on such a robot, of ``seconds`` each.

    ``still``: he holds the arm where it is; ``noise`` is a factor.
    """
    cell = Cell(shift, parameters)
    standin = StandIn(cell, noise_seed=scenes[0], noise=noise)
    loop = Lockstep(standin, TwinPerception(cell, ()), _Nobody())

    def operate(_: Observation) -> FloatArray:
        held = cell.held >= 0
        if still:
            return np.tile([*home, 0.0], (10, 1))
        return plan(cell.tip, held, cell.held == cell.target, cell.target_top, 10, STEP_S)

    found = []
    for scene in scenes:
        standin.reset(scene)
        loop.reset()
        home = cell.tip.copy()
        rows = _Rows(loop.rings)
        rows.poll(0)
        rows.kept.clear()
        loop.recorder = rows
        start = loop.now_ns
        loop.run(seconds, cell.instruction, override=operate)
        outcome = Outcome.SUCCESS if cell.success else Outcome.TIMEOUT
        found.append(_seal(out, np.concatenate(rows.kept), (start, loop.now_ns), scene, outcome, robot, cell))
    return found


def _seal(
    out: Path,
    rows: np.typing.NDArray[np.void],
    window_ns: tuple[int, int],
    scene: int,
    outcome: Outcome,
    robot: str,
    cell: Cell,
) -> Path:
    columns = []
    for field in schema.control_schema(JOINTS):
        values = np.ascontiguousarray(rows[field.name])
        if values.ndim > 1:
            flat = pa.array(values.reshape(-1), pa.float32())
            columns.append(pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
        else:
            columns.append(pa.array(values).cast(field.type))
    control = pa.table(columns, schema=schema.control_schema(JOINTS))
    b = _Nobody.bundle
    state, action = len(STATE_NAMES), len(ACTION_NAMES)
    draft = Manifest(
        episode_id=new_episode_id(EPOCH_NS + window_ns[0], np.random.default_rng(scene)),
        site="rehearsal",
        robot=robot,
        joints=len(JOINT_NAMES),
        cameras=(),
        state_dim=state,
        action_dim=action,
        chunk=b.chunk,
        control_hz=1000.0,
        policy_hz=10.0,
        task=cell.instruction,
        shift="",  # it stands in for a real robot, of which nobody knows more
        outcome=outcome,
        triggers=(Trigger(kind=TriggerKind.REQUEST, t_ns=window_ns[0]),),
        window_ns=window_ns,
        policy_digest=NOBODY,
        runtime_version="rehearsal",
        clock="lockstep",
        clock_epoch_ns=EPOCH_NS,
        files=(),
    )
    frames = schema.frames_schema((), state, b.chunk, action).empty_table()
    manifest = seal(out, draft, control, frames, schema.EVENTS_SCHEMA.empty_table())
    return out / manifest.episode_id
