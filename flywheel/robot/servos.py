"""A mock of position servos on a serial bus: real time, real latency, a process of its own.

What makes such arms different from a torque-controlled one is all here: commands are positions, a
transaction takes milliseconds during which the caller waits, encoders have steps, the servos lag behind and
have a speed of their own. ``SerialServos`` stands for the driver; System 1 sees it as a ``RemoteRobot``.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from flywheel.edge.safety import SafetyLimits
from flywheel.robot import FloatArray, JointState
from flywheel.robot.remote import RemoteRobot

RATE_HZ = 100.0
BAUD = 115_200  # slow on purpose: two packets of five servos take 4 ms
BITS_A_BYTE = 10  # start, eight, stop
HEADER_BYTES, SERVO_BYTES = 8, 5
ANSWER_S = 250e-6  # until the servos answer
COUNTS = 4096  # encoder steps a turn
LAG_S = 0.02  # time constant of a servo's position loop
SPEED = 6.0  # rad/s, what a servo can do


class SerialServos:
    """Servos that follow their goal with a lag, behind a bus that takes its time."""

    def __init__(self, joints: int, baud: int = BAUD) -> None:
        self._packet_s = (HEADER_BYTES + SERVO_BYTES * joints) * BITS_A_BYTE / baud
        self._q: FloatArray = np.zeros(joints)
        self._goal: FloatArray = np.zeros(joints)
        self._read: FloatArray = np.zeros(joints)
        self._tool = 0.0
        self._powered = False
        self._moved_at = self._read_at = time.monotonic()

    def connect(self) -> None:
        """Torque on, where they are."""
        self.power_on()
        self._moved_at = self._read_at = time.monotonic()
        self._read[:] = self._counts()

    def exchange(self, q_ref: FloatArray | None, tool: float, out: JointState) -> None:
        """A packet of goals to all servos, a packet of positions from them."""
        time.sleep(self._packet_s)
        self._move()
        if q_ref is not None:
            self._goal[:] = q_ref
            self._tool = tool
        time.sleep(ANSWER_S + self._packet_s)
        self._move()
        now, seen = time.monotonic(), self._counts()
        out.dq[:] = (seen - self._read) / max(now - self._read_at, 1e-6)
        out.q[:] = seen
        out.held = self._tool
        self._read[:] = seen
        self._read_at = now

    def stop(self) -> None:
        """Torque off; gearboxes of this size hold by themselves."""
        self._powered = False

    def power_on(self) -> None:
        """Torque on, where they are."""
        self._goal[:] = self._q
        self._powered = True

    def close(self) -> None:
        """Nothing to give back."""

    def _move(self) -> None:
        now = time.monotonic()
        dt, self._moved_at = now - self._moved_at, now
        if self._powered:
            step = (self._goal - self._q) * -math.expm1(-dt / LAG_S)
            self._q += np.clip(step, -SPEED * dt, SPEED * dt)

    def _counts(self) -> FloatArray:
        turn = 2.0 * math.pi
        counted: FloatArray = np.round(self._q * (COUNTS / turn)) * (turn / COUNTS)
        return counted


def device(args: dict[str, Any]) -> SerialServos:
    """For ``RemoteRobot``; ``args``: joints, and baud or not."""
    return SerialServos(int(args["joints"]), int(args.get("baud", BAUD)))


def wall_robot(args: dict[str, Any], world: memoryview) -> RemoteRobot:
    """For ``Plan.robot``; ``args``: limits (path), and rate_hz and baud or not."""
    limits = SafetyLimits.load(args["limits"])
    inner = {"joints": len(limits.joints)} | {k: args[k] for k in ("baud",) if k in args}
    rate_hz = float(args.get("rate_hz", RATE_HZ))
    return RemoteRobot("servos", "flywheel.robot.servos:device", inner, limits, rate_hz)
