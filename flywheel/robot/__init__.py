"""What a robot is to the runtime: joints for System 1, eyes for System 2.

A robot of one's own implements ``Robot`` (one process at 1 kHz) and ``Perception`` (another at 10 Hz); both
may be one object when it is only run in lockstep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from flywheel.edge.safety import SafetyLimits

FloatArray = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]


class JointState:
    """One reading of the joints; allocated once and filled in place by ``Robot.read``.

    ``q`` rad ``[n]``, ``dq`` rad/s ``[n]``, ``bias`` gravity and Coriolis torque in N·m ``[n]`` (zeros if
    unknown), ``mass`` joint-space inertia in kg·m² ``[n, n]`` (zeros if unknown), ``held`` vacuum or grip
    sensor 0..1, ``stop_input`` true while the protective-stop input is open. ``tool`` is the tool's x, y, z
    in m and its speed in m/s ``[4]``, NaN if the robot does not report it. ``human_m`` is the distance to the
    nearest person in m, inf if nobody is in view, NaN if nothing measures it.

    System 1 knows the arrays by their addresses, so they are never replaced: assigning to one copies into it.
    """

    __slots__ = ("_bias", "_dq", "_mass", "_q", "_tool", "held", "human_m", "stop_input", "t_ns")

    def __init__(self, joints: int) -> None:
        self.t_ns = 0
        self._q: FloatArray = np.zeros(joints)
        self._dq: FloatArray = np.zeros(joints)
        self._bias: FloatArray = np.zeros(joints)
        self._mass: FloatArray = np.zeros((joints, joints))
        self._tool: FloatArray = np.full(4, np.nan)
        self.held = 0.0
        self.stop_input = False
        self.human_m = np.nan

    @property
    def q(self) -> FloatArray:
        """Joint positions, rad ``[n]``."""
        return self._q

    @q.setter
    def q(self, value: FloatArray) -> None:
        self._q[:] = value

    @property
    def dq(self) -> FloatArray:
        """Joint velocities, rad/s ``[n]``."""
        return self._dq

    @dq.setter
    def dq(self, value: FloatArray) -> None:
        self._dq[:] = value

    @property
    def bias(self) -> FloatArray:
        """Gravity and Coriolis torque, N·m ``[n]``."""
        return self._bias

    @bias.setter
    def bias(self, value: FloatArray) -> None:
        self._bias[:] = value

    @property
    def mass(self) -> FloatArray:
        """Joint-space inertia, kg·m² ``[n, n]``."""
        return self._mass

    @mass.setter
    def mass(self, value: FloatArray) -> None:
        self._mass[:] = value

    @property
    def tool(self) -> FloatArray:
        """Tool x, y, z, m, and speed, m/s ``[4]``."""
        return self._tool

    @tool.setter
    def tool(self, value: FloatArray) -> None:
        self._tool[:] = value


class Robot(Protocol):
    """What System 1 needs. No method may block, allocate without bound or raise: they run in its loop.

    ``rate_hz`` is the rate at which it takes commands, and so System 1's. ``takes`` says what a command is:
    joint torques, N·m, or joint positions, rad, for a robot with position loops of its own, to which System 1
    streams the reference that it has limited.
    """

    name: str
    joints: int
    rate_hz: float
    takes: Literal["torque", "position"]
    limits: SafetyLimits

    def read(self, out: JointState) -> None:
        """Fill ``out`` with the newest joint state, in place."""

    def write(self, command: FloatArray, tool: float) -> None:
        """Command the joints (``[n]``, see ``takes``) and the tool (0..1) for one tick; a twin steps here."""

    def stop(self) -> None:
        """Remove power and engage brakes (IEC 60204-1 stop category 0). May be called more than once."""

    def power_on(self) -> None:
        """Give power back after a stop that a person acknowledged. Must not move the joints."""


@dataclass(frozen=True)
class Observation:
    """What System 2 saw at ``t_ns``: images (uint8 ``[H, W, 3]``) by camera, the policy's raw state
    (float32 ``[S]``), joint positions (rad, ``[n]``)."""

    t_ns: int
    images: dict[str, Image]
    state: npt.NDArray[np.float32]
    q: FloatArray


class Perception(Protocol):
    """What System 2 needs."""

    cameras: tuple[str, ...]

    def observe(self) -> Observation:
        """Capture now; ``t_ns`` is the time of capture, on the clock of System 1."""

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Turn the policy's absolute targets ``[T, A]`` into joint waypoints ``[T, n]`` and tool ``[T]``.

        ``q`` is where the joints were at the observation.
        """
