"""A robot of one's own: everything System 1 needs to know of an arm with position loops, in forty lines."""

from __future__ import annotations

from typing import Any, Literal

from flywheel.edge.safety import SafetyLimits
from flywheel.robot import FloatArray, JointState


class MyArm:
    name = "my-arm"
    takes: Literal["torque", "position"] = "position"  # System 1 streams positions that it has limited
    rate_hz = 250.0  # how often the arm wants one

    def __init__(self, sdk: Any, limits: str) -> None:
        self.limits = SafetyLimits.load(limits)  # your arm's own file, with the clause that each limit serves
        self.joints = len(self.limits.joints)
        self._sdk = sdk  # must not block: if it does, make it a flywheel.robot.remote.Device instead

    def read(self, out: JointState) -> None:
        out.q[:] = self._sdk.positions()  # rad
        out.dq[:] = self._sdk.velocities()  # rad/s
        out.stop_input = self._sdk.protective_stop_open()

    def write(self, command: FloatArray, tool: float) -> None:
        self._sdk.move_to(command)
        self._sdk.gripper(tool > 0.5)

    def stop(self) -> None:
        self._sdk.brake()

    def power_on(self) -> None:
        self._sdk.release()
