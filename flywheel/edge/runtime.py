"""The runtime on the wall clock: starts System 1 and System 2, watches them, and sums up what they did.

The supervisor is ordinary Python at ordinary priority. It may stall or be killed: System 1 sees its
heartbeat go stale and ramps to rest; it ends if the supervisor is gone. System 2 may stall, crash or be
killed: System 1 walks down the stale ladder, and the supervisor starts it again with growing pauses. Leaving
``Wall``, by whatever way, ends both.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pydantic import ValidationError

from flywheel.edge import realtime
from flywheel.edge.figures import Figures, Quantiles, WallResult
from flywheel.edge.link import Arena, Ring
from flywheel.edge.lockstep import Recording
from flywheel.edge.processes import EXIT_BAD_PLAN, Plan, Shared
from flywheel.edge.rows import EventLog, Rings, event_dtype
from flywheel.edge.system1 import HEARTBEAT
from flywheel.errors import BundleError, ConfigError, ServiceError
from flywheel.schema import Bundle

__all__ = ["Quantiles", "Wall", "WallResult", "read_bundle", "run_wall", "twin_plan"]

READY_S = 180.0  # the first start compiles the control law
STEP_S = 0.05  # between two looks of the supervisor
BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # pauses before System 2 is started again
# A twin on the wall clock: its physics lie in System 1's process, its eyes in System 2's.
TWIN_ROBOT = "flywheel.robot.twin:wall_robot"
TWIN_PERCEPTION = "flywheel.robot.twin:wall_perception"

RecorderFactory = Callable[[Rings, Plan], Recording]


class _Child:
    """One child process and what it said."""

    def __init__(self, role: str, plan: Plan, arena: Arena) -> None:
        self.role = role
        path = os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)
        one = {f"{lib}_NUM_THREADS": "1" for lib in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flywheel.edge.processes", role, str(arena.fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(arena.fd,),
            env={**os.environ, **one, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the supervisor, which ends its children in order
        )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(plan.to_bytes())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it is gone; ready() tells

    def ready(self, timeout_s: float, beat: Callable[[], None]) -> dict[str, Any]:
        """Wait for its first line; ``ServiceError`` or, for a bad plan, ``ConfigError`` says what it said."""
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            beat()
            said = self.said(STEP_S)
            if said is not None:
                if "error" in said:
                    raise ConfigError(f"{self.role}: {said['error']}")
                if not said:
                    code = self.process.wait()
                    raise ServiceError(f"{self.role} ended at its start with code {code}; see its messages")
                return said
        raise ServiceError(f"{self.role} was not ready within {timeout_s:.0f} s")

    def said(self, wait_s: float = 0.0) -> dict[str, Any] | None:
        """A line that it said within ``wait_s``; None if there is none, empty if it will say no more."""
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], wait_s)[0]:
            return None
        line = out.readline()
        said: dict[str, Any] = json.loads(line) if line else {}
        return said

    def end(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Wall:
    """A running robot; use as a context manager.

    ``events`` are on ``rings.events``: mode changes, interventions, refused chunks, crashes. The clock is
    CLOCK_MONOTONIC (``time.monotonic_ns``).
    """

    def __init__(self, plan: Plan, recorder: RecorderFactory | None = None, restart: bool = True) -> None:
        self.plan = plan
        self.restart = restart
        self.restarts = 0
        self.told: dict[str, dict[str, Any]] = {}
        self._arena = Arena.create("flywheel-edge", Shared.nbytes(plan))
        self.shared = Shared(plan, self._arena)
        self.rings = Rings(self.shared.control, self.shared.frames, Ring(event_dtype(), 256))
        self.events = EventLog(self.rings.events)
        self.recorder = None if recorder is None else recorder(self.rings, plan)
        self._stats = Figures(self.shared, round(1e9 / plan.control_hz), self.events)
        self._system1: _Child | None = None
        self._system2: _Child | None = None
        self._start_again_at = 0.0
        self._handler: Any = None
        _warm_up()

    @property
    def system1_pid(self) -> int:
        """Process id of System 1."""
        assert self._system1 is not None
        return self._system1.process.pid

    @property
    def system2_pid(self) -> int:
        """Process id of System 2, or of the last one if it is not running."""
        assert self._system2 is not None
        return self._system2.process.pid

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, _interrupt)
        try:
            self._beat()
            self._system1 = _Child("system1", self.plan, self._arena)
            if self.plan.perception:
                self._system2 = _Child("system2", self.plan, self._arena)
            for child in filter(None, (self._system1, self._system2)):
                self.told[child.role] = child.ready(READY_S, self._beat)
            used = {r: said["limits_sha256"] for r, said in self.told.items()}
            if len(set(used.values())) != 1:
                raise ConfigError(
                    f"plan.limits={self.plan.limits!r} is not the file that the robot uses: sha256 {used}"
                )
        except BaseException:
            self.close()
            raise
        self._stats.skip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> WallResult:
        """Watch for ``seconds``, or until ``until`` (asked every 50 ms) says so; sums up since the start.

        Raises ``ServiceError`` if System 1 ends by itself.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.step()
            if until is not None and until():
                break
            time.sleep(min(STEP_S, left))
        self.step()
        return self.result()

    def step(self) -> None:
        """One look: heartbeat, rings, recorder, processes."""
        self._beat()
        self._stats.take()
        if self.recorder is not None:
            self.recorder.poll(time.monotonic_ns())
        assert self._system1 is not None
        code = self._system1.process.poll()
        if code is not None:
            raise ServiceError(f"System 1 ended with code {code}; see its messages")
        if self._system2 is None:
            return
        code = self._system2.process.poll()
        if said := self._system2.said():
            self.told["system2"] = {**self.told["system2"], **said}
        if code is None:
            return
        if self._start_again_at == 0.0:
            self.events.add(time.monotonic_ns(), "plant", "system2_ended", {"code": code})
            pause = BACKOFF_S[min(self.restarts, len(BACKOFF_S) - 1)]
            self._start_again_at = time.monotonic() + pause
        if self.restart and code != EXIT_BAD_PLAN and time.monotonic() >= self._start_again_at:
            self.restarts += 1
            self._system2.end(0.0)
            self._system2 = _Child("system2", self.plan, self._arena)
            self._start_again_at = 0.0

    def result(self) -> WallResult:
        """The figures so far."""
        return self._stats.result(self.told, self.restarts)

    def close(self) -> None:
        """End both processes; System 1 comes to rest first. May be called twice."""
        if self._system2 is not None:
            self._system2.end(2.0)
        if self._system1 is not None:
            self._beat()
            self._system1.end(5.0)
        self._arena.close()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _beat(self) -> None:
        self.shared.commands[HEARTBEAT] = time.monotonic_ns()


def _warm_up() -> None:
    """Compile what the supervisor calls before anything moves: System 1 would take a pause for its death."""
    ring = Ring(event_dtype(), 2)
    ring.push(ring.record())
    ring.reader().poll()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the supervisor as Ctrl-C does: in order."""
    raise KeyboardInterrupt


def read_bundle(directory: Path | str) -> Bundle:
    """``policy.json`` of a bundle; ``BundleError`` if it is missing or malformed."""
    path = Path(directory) / "policy.json"
    try:
        return Bundle.model_validate_json(path.read_bytes())
    except OSError as e:
        raise BundleError(f"{path}: {e.strerror or e}") from None
    except ValidationError as e:
        first = e.errors()[0]
        raise BundleError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def run_wall(
    bundle: Path | str,
    shift: str = "lab",
    seconds: float = 5.0,
    seed: int = 0,
    control_hz: float = 1000.0,
    policy_hz: float = 10.0,
    threads: int = 1,
    priority: int = 50,
    recorder: RecorderFactory | None = None,
) -> WallResult:
    """Run a bundle on the twin in real time for ``seconds`` and say how it went."""
    with Wall(twin_plan(bundle, shift, seed, control_hz, policy_hz, threads, priority), recorder) as wall:
        return wall.run(seconds)


def twin_plan(
    bundle: Path | str,
    shift: str,
    seed: int,
    control_hz: float = 1000.0,
    policy_hz: float = 10.0,
    threads: int = 1,
    priority: int = 50,
) -> Plan:
    """The plan that runs a bundle on the twin."""
    import flywheel.twin
    from flywheel.twin.cell import CAMERAS, JOINTS, Cell
    from flywheel.twin.shift import shift as named

    cell = Cell(named(shift))
    cell.reset(seed)
    cpu, others = realtime.cores()
    return Plan(
        robot=TWIN_ROBOT,
        perception=TWIN_PERCEPTION,
        args={"shift": shift, "seed": seed, "control_hz": control_hz},
        joints=JOINTS,
        cameras={name: (side, side) for name, side in CAMERAS.items()},
        limits=str(Path(flywheel.twin.__file__).parent / "limits.yaml"),
        bundle_dir=str(Path(bundle).absolute()),
        bundle=read_bundle(bundle),
        instruction=cell.instruction,
        control_hz=control_hz,
        policy_hz=policy_hz,
        threads=threads,
        priority=priority,
        cpu=cpu,
        others=tuple(sorted(others)),
    )
