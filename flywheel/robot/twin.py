"""The twin as a robot: one object for lockstep, two halves in two processes on the wall clock.

On the wall clock System 1's process owns the physics (``TwinRobot``) and publishes the world in a seqlock
slot; System 2's process renders it (``TwinPerception``). A slow renderer never holds up a tick.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flywheel.edge.compiled import compiled
from flywheel.edge.link import Records, Seqlock, aligned
from flywheel.edge.safety import SafetyLimits
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray, JointState, Observation
from flywheel.twin.cell import JOINTS, STEP_NS, Cell
from flywheel.twin.kinematics import inverse
from flywheel.twin.parameters import TwinParameters
from flywheel.twin.sampling import state_of
from flywheel.twin.shift import shift as named_shift

LIMITS_FILE = Path(__file__).parent.parent / "twin" / "limits.yaml"
POLICY_CAMERAS = ("wrist",)
ALL_CAMERAS = ("wrist", "scene")
PHYSICS_HZ = 1e9 / STEP_NS
BRAKE_NMS = np.array([80.0, 80.0, 60.0, 20.0, 4.0])  # N·m·s/rad


def world_dtype(cell: Cell) -> np.dtype[np.void]:
    """What System 2's process must know to see the same world."""
    return aligned(
        [
            ("t_ns", np.int64),
            ("held", np.int64),
            ("done", np.int64),
            ("qpos", np.float64, (cell.qpos.size,)),
        ]
    )


@compiled
def _read(
    q: FloatArray, dq: FloatArray, bias: FloatArray, damping: FloatArray, cup: FloatArray, before: FloatArray,
    out_q: FloatArray, out_dq: FloatArray, out_bias: FloatArray, tool: FloatArray, rate_hz: float,
) -> None:  # fmt: skip
    """Copy the joints; viscous friction counts as bias; tool speed from the last period."""
    square = 0.0
    for i in range(3):
        square += (cup[i] - before[i]) ** 2
        tool[i] = cup[i]
        before[i] = cup[i]
    tool[3] = np.sqrt(square) * rate_hz
    for i in range(q.size):
        out_q[i] = q[i]
        out_dq[i] = dq[i]
        out_bias[i] = bias[i] + damping[i] * dq[i]


class TwinPerception:
    """System 2's view of a cell: images, state, and the arm's inverse kinematics.

    With ``world``, the cell's own physics does not run: what the slot says is rendered.
    """

    def __init__(
        self, cell: Cell, cameras: tuple[str, ...] = POLICY_CAMERAS, world: Seqlock | None = None
    ) -> None:
        self.cell = cell
        self.cameras = cameras
        self._world = world
        self._seen: Records | None = None if world is None else world.record()
        self._sequence = 0

    def observe(self) -> Observation:
        """Capture now."""
        cell = self.cell
        t_ns = cell.ticks * STEP_NS
        if self._world is not None and self._seen is not None:
            got = self._world.read(self._seen, self._sequence)
            self._sequence = got if got > 0 else self._sequence
            t_ns = int(self._seen["t_ns"][0])
            cell.mirror(self._seen["qpos"][0], int(self._seen["held"][0]))
        images = {c: cell.render(c) for c in self.cameras}
        return Observation(t_ns, images, state_of(cell), cell.q.copy())

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Tool targets ``[T, 4]`` to joint waypoints ``[T, 5]``, rad (NaN out of reach), suction ``[T]``."""
        del q  # the arm has one posture for a tool position
        return inverse(actions[:, :3]), np.clip(actions[:, 3], 0.0, 1.0)


class TwinRobot(TwinPerception):
    """A cell under torque control. ``write`` advances its physics by one period of control.

    Physics have steps of a millisecond, so the rate must divide 1 kHz; torques are held in between.
    """

    name = "flywheel-arm"
    joints = JOINTS
    takes: Literal["torque", "position"] = "torque"

    def __init__(
        self,
        cell: Cell,
        cameras: tuple[str, ...] = POLICY_CAMERAS,
        limits: SafetyLimits | None = None,
        publish: Seqlock | None = None,
        rate_hz: float = PHYSICS_HZ,
    ) -> None:
        super().__init__(cell, cameras)
        self._steps = round(PHYSICS_HZ / rate_hz)
        if self._steps < 1 or abs(self._steps * rate_hz - PHYSICS_HZ) > 1e-6 * PHYSICS_HZ:
            raise ConfigError(
                f"edge.control_hz={rate_hz:g}: the twin's physics run at {PHYSICS_HZ:g} Hz; choose a rate "
                "that divides it, such as 1000, 500 or 250"
            )
        self.rate_hz = rate_hz
        self.limits = SafetyLimits.load(LIMITS_FILE) if limits is None else limits
        self._publish = publish
        self._record: Records | None = None if publish is None else publish.record()
        self._powered = True
        self._cup: FloatArray = cell.data.site_xpos[cell.model.site("cup").id]
        self._before = self._cup.copy()
        self._braked = np.zeros(JOINTS)

    def reset(self, seed: int, target: str | None = None) -> None:
        """A new scene, with power on."""
        self.cell.reset(seed, target)
        self._before[:] = self._cup
        self._powered = True

    def read(self, out: JointState) -> None:
        """Fill ``out`` in place; inertia and bias are those of the last step."""
        cell = self.cell
        out.t_ns = cell.ticks * STEP_NS
        _read(
            cell.q,
            cell.dq,
            cell.bias,
            cell.damping,
            self._cup,
            self._before,
            out.q,
            out.dq,
            out.bias,
            out.tool,
            self.rate_hz,
        )
        cell.mass_matrix(out.mass)
        out.held = 1.0 if cell.held >= 0 else 0.0

    def write(self, command: FloatArray, tool: float) -> None:
        """Step the physics; without power the brakes hold the joints."""
        cell = self.cell
        for _ in range(self._steps):
            if not self._powered:
                np.multiply(cell.dq, -BRAKE_NMS, out=self._braked)
                self._braked += cell.bias
            cell.step(command if self._powered else self._braked, tool)
        self.tell()

    def tell(self) -> None:
        """On the wall clock: publish the world as it is now, on the clock that System 1 lives by."""
        if self._publish is not None and self._record is not None:
            cell, r = self.cell, self._record
            r["t_ns"] = time.monotonic_ns()
            r["held"] = cell.held
            r["done"] = cell.success
            r["qpos"][0] = cell.qpos
            self._publish.write(r)

    def power_on(self) -> None:
        """After a stop that a person has acknowledged."""
        self._powered = True

    def stop(self) -> None:
        """Category 0: power off, brakes on."""
        self._powered = False


def wall_robot(args: dict[str, Any], world: memoryview) -> TwinRobot:
    """System 1's half on the wall clock (``Plan.robot``); ``args``: shift, seed, control_hz, and parameters,
    the path of a file of identified ones."""
    path = args.get("parameters", "")
    cell = Cell(named_shift(args["shift"]), TwinParameters.load(path) if path else None)
    slot = Seqlock(world_dtype(cell), world)
    robot = TwinRobot(cell, publish=slot, rate_hz=float(args.get("control_hz", PHYSICS_HZ)))
    robot.reset(args["seed"])
    robot.tell()
    return robot


def wall_perception(args: dict[str, Any], world: memoryview) -> TwinPerception:
    """System 2's half on the wall clock (``Plan.perception``): the same scene, rendered from the slot."""
    cell = Cell(named_shift(args["shift"]))
    cell.reset(args["seed"])
    return TwinPerception(cell, ALL_CAMERAS, Seqlock(world_dtype(cell), world))
