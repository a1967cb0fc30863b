"""A robot whose I/O blocks, allocates or raises, for System 1, which may do none of these.

A bus driver waits for bytes; a vendor's library logs, locks and throws. So the driver (a ``Device``) gets a
process of its own, at the robot's rate, and System 1 sees two seqlock slots: the newest state, the newest
command. Silence is what a failure looks like, whatever its cause: a state older than ``SILENT`` periods opens
the protective-stop input, one older than ``LOST`` periods counts as no state at all (category 0). A device
whose System 1 is silent holds its last command, and stops and ends when System 1's process is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any, Literal, Protocol

import numpy as np

from flywheel.edge.link import Arena, Seqlock, aligned
from flywheel.edge.safety import SafetyLimits
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray, JointState

SILENT, LOST = 5, 20  # periods
CONNECT_S = 60.0
PRIORITY = 40  # SCHED_FIFO, of the device's process


class Device(Protocol):
    """A driver of position-controlled joints. It may block for most of a period, allocate and raise."""

    def connect(self) -> None:
        """Open the bus and hold the joints where they are; must not move them."""

    def exchange(self, q_ref: FloatArray | None, tool: float, out: JointState) -> None:
        """Send positions, rad ``[n]`` (None: hold), and the tool, 0..1; then fill ``out`` in place."""

    def stop(self) -> None:
        """Remove power and engage brakes (IEC 60204-1 stop category 0). May be called more than once."""

    def power_on(self) -> None:
        """Give power back after a stop, and hold the joints where they are; must not move them."""

    def close(self) -> None:
        """Give the bus back."""


def _slots(joints: int, arena: Arena) -> tuple[Seqlock, Seqlock]:
    """Command and state."""
    command = aligned([("q", np.float64, (joints,)), ("tool", np.float64), ("stop", np.int64)])
    state = aligned(
        [
            ("t_ns", np.int64),
            ("q", np.float64, (joints,)),
            ("dq", np.float64, (joints,)),
            ("tool", np.float64, (4,)),
            ("held", np.float64),
            ("human_m", np.float64),
            ("stop_input", np.int64),
        ]
    )
    return (
        Seqlock(command, arena.carve(Seqlock.nbytes(command))),
        Seqlock(state, arena.carve(Seqlock.nbytes(state))),
    )


ARENA_BYTES = 1 << 14  # enough for 32 joints


class RemoteRobot:
    """The two slots as a ``Robot``. ``device`` is ``module:function``, called with ``args`` in the other
    process; it gives a ``Device``.

    Raises:
        ConfigError: the device could not be made or connected, with its own words; or it said nothing.
    """

    takes: Literal["torque", "position"] = "position"

    def __init__(
        self, name: str, device: str, args: dict[str, Any], limits: SafetyLimits, rate_hz: float
    ) -> None:
        self.name = name
        self.joints = len(limits.joints)
        self.rate_hz = rate_hz
        self.limits = limits
        self._arena = Arena.create("flywheel-device", ARENA_BYTES)
        self._command, self._state = _slots(self.joints, self._arena)
        self._out, self._seen = self._state.record(), 0
        self._give = self._command.record()
        self._silent_ns, self._lost_ns = (round(k * 1e9 / rate_hz) for k in (SILENT, LOST))
        plan = {"device": device, "args": args, "joints": self.joints, "rate_hz": rate_hz}
        path = os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flywheel.robot.remote", str(self._arena.fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._arena.fd,),
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(plan).encode())
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it is gone; the next line tells
        said = self._first_words()
        if "error" in said:
            self.close()
            raise ConfigError(f"{name}: {said['error']}")
        self._seen = self._state.read(self._out)

    def read(self, out: JointState) -> None:
        """The newest state of the device; what is missing is a stop (see the module)."""
        s = self._out
        self._seen = self._state.read(s, self._seen)
        row = s[0]
        out.t_ns = int(row["t_ns"])
        out.q[:] = row["q"]
        out.dq[:] = row["dq"]
        out.tool[:] = row["tool"]
        out.held = float(row["held"])
        out.human_m = float(row["human_m"])
        age = time.monotonic_ns() - out.t_ns
        out.stop_input = bool(row["stop_input"]) or age > self._silent_ns
        if age > self._lost_ns:
            out.q[:] = np.nan

    def write(self, command: FloatArray, tool: float) -> None:
        """Leave positions, rad ``[n]``, for the device's next exchange."""
        give = self._give
        give["q"][0] = command
        give["tool"] = tool
        self._command.write(give)

    def stop(self) -> None:
        """The device removes power at its next exchange, and takes no command until it has power again."""
        self._give["stop"] = 1
        self._command.write(self._give)

    def power_on(self) -> None:
        """The device has power again at its next exchange; the command that follows holds the joints."""
        self._give["stop"] = 0

    def close(self) -> None:
        """End the device's process; it stops the robot first."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._arena.close()

    def _first_words(self) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], CONNECT_S)[0]:
            return {"error": f"its device was not ready within {CONNECT_S:.0f} s"}
        line = out.readline()
        if not line:
            return {"error": f"its device ended with code {self._process.wait()}; see its messages"}
        said: dict[str, Any] = json.loads(line)
        return said


# ── the device's process ──────────────────────────────────────────────────────────────────────────────


def serve(device: Device, joints: int, rate_hz: float, arena: Arena) -> None:
    """Exchange at ``rate_hz`` until SIGTERM, or until the process that started this one is gone."""
    leave: list[int] = []
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: leave.append(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    command, state = _slots(joints, arena)
    given, record, out = command.record(), state.record(), JointState(joints)
    seen, stopped, ready = 0, False, False
    period = 1.0 / rate_hz
    due = time.monotonic()
    device.connect()
    _hurry()
    try:
        while not leave and os.getppid() == parent:
            seen = command.read(given, seen)
            if given["stop"][0] and not stopped:
                device.stop()
            elif stopped and not given["stop"][0]:
                device.power_on()
            stopped = bool(given["stop"][0])
            follow = seen > 0 and not stopped
            device.exchange(given["q"][0] if follow else None, float(given["tool"][0]), out)
            record["t_ns"] = time.monotonic_ns()
            record["q"][0], record["dq"][0], record["tool"][0] = out.q, out.dq, out.tool
            record["held"], record["human_m"], record["stop_input"] = out.held, out.human_m, out.stop_input
            state.write(record)
            if not ready:
                ready = True
                print(json.dumps({"ready": True}), flush=True)
            due = max(due + period, time.monotonic())  # what was late is not caught up with
            time.sleep(max(due - time.monotonic(), 0.0))
    finally:
        try:
            device.stop()
        finally:
            device.close()


def _hurry() -> None:
    """The bus has a deadline, too: real-time scheduling, below System 1's, where that is permitted.

    For this thread alone: threads of the driver, such as a camera's, keep ordinary scheduling.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))


def main() -> int:
    """Entry of the device's process."""
    plan = json.loads(sys.stdin.read())
    module, _, function = plan["device"].partition(":")
    try:
        device: Device = getattr(importlib.import_module(module), function)(plan["args"])
        serve(device, plan["joints"], plan["rate_hz"], Arena(int(sys.argv[1]), ARENA_BYTES))
    except Exception as e:  # of a third party's driver: whatever it is, the robot has been stopped
        print(json.dumps({"error": f"{plan['device']}: {type(e).__name__}: {e}"}), flush=True)
        print(f"device {plan['device']}: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # views of the shared memory still live; the kernel frees it
