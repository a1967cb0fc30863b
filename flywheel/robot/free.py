"""A robot that costs nothing: free double integrators that follow a sine, at any rate. For benchmarks.

Physics and rendering take longer than System 1 itself; without them, what is measured is System 1. System 2
runs a real policy on noise, so that it costs what it costs; the sine takes the place of what it decided.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import flywheel.twin
from flywheel.edge.safety import SafetyLimits
from flywheel.robot import FloatArray, Image, JointState, Observation

LIMITS_FILE = Path(flywheel.twin.__file__).parent / "limits.yaml"
JOINTS = 5
INERTIA = 0.2  # kg·m², every joint: within its torque limit at any acceleration that the limits allow
AMPLITUDE_RAD, OMEGA = 0.5, 2.0
STEP_NS = 100_000_000


def sine(t_ns: npt.NDArray[np.int64]) -> FloatArray:
    """Where every joint ought to be at CLOCK_MONOTONIC ``t_ns [T]``, rad ``[T, JOINTS]``."""
    turns = (t_ns % round(2e9 * np.pi / OMEGA)) * 1e-9 * OMEGA
    return np.repeat(AMPLITUDE_RAD * (1.0 - np.cos(turns))[:, None], JOINTS, axis=1)


def chunk(t0_ns: int, steps: int) -> FloatArray:
    """Waypoints ``[steps, JOINTS]`` of the sine, from an observation at ``t0_ns``."""
    return sine(t0_ns + STEP_NS * np.arange(1, steps + 1))


class FreeRobot:
    """Exact integration of torque over a period; nothing else."""

    name = "free"
    joints = JOINTS
    takes: Literal["torque", "position"] = "torque"

    def __init__(self, rate_hz: float = 1000.0) -> None:
        self.rate_hz = rate_hz
        self.limits = SafetyLimits.load(LIMITS_FILE)
        self._q: FloatArray = np.zeros(JOINTS)
        self._dq: FloatArray = np.zeros(JOINTS)
        self._add: FloatArray = np.zeros(JOINTS)
        self._dt = 1.0 / rate_hz
        self._half = 0.5 * self._dt * self._dt / INERTIA
        self._gain = self._dt / INERTIA
        self._mass = np.eye(JOINTS) * INERTIA

    def read(self, out: JointState) -> None:
        """Joint state, exactly."""
        out.q[:] = self._q
        out.dq[:] = self._dq
        out.mass[:] = self._mass

    def write(self, command: FloatArray, tool: float) -> None:
        """One period of free motion under torques ``[JOINTS]``, N·m."""
        add = self._add
        np.multiply(self._dq, self._dt, out=add)
        self._q += add
        np.multiply(command, self._half, out=add)
        self._q += add
        np.multiply(command, self._gain, out=add)
        self._dq += add

    def stop(self) -> None:
        """Brakes."""
        self._dq[:] = 0.0

    def power_on(self) -> None:
        """Nothing holds it."""


class FreePerception:
    """Sees noise, and turns whatever the policy decided into the sine."""

    cameras = ("wrist",)

    def __init__(self, side_px: int) -> None:
        self._rng = np.random.default_rng(0)
        self._side = side_px
        self._t0 = 0

    def observe(self) -> Observation:
        """Noise, now; the tool in the middle of its workspace."""
        self._t0 = time.monotonic_ns()
        image: Image = self._rng.integers(0, 256, (self._side, self._side, 3), np.uint8)
        state = np.array([0.4, 0.0, 0.3, 0.0], np.float32)
        return Observation(self._t0, {"wrist": image}, state, sine(np.array([self._t0]))[0])

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The sine from the last observation on ``[T, JOINTS]``, the tool off ``[T]``."""
        return chunk(self._t0, len(actions)), np.zeros(len(actions))


def wall_robot(args: dict[str, Any], world: memoryview) -> FreeRobot:
    """For ``Plan.robot``; ``args``: rate_hz."""
    return FreeRobot(float(args["rate_hz"]))


def wall_perception(args: dict[str, Any], world: memoryview) -> FreePerception:
    """For ``Plan.perception``; ``args``: side_px."""
    return FreePerception(int(args["side_px"]))
