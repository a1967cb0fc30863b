"""The two real-time-minded processes of a robot, and the memory that they share.

Each is started by the supervisor as ``python -m flywheel.edge.processes system1|system2 FD`` with a ``Plan``
on its standard input; it answers with one JSON line when it is ready and ends on SIGTERM. What they share is
anonymous memory behind FD, so nothing can be left behind. A process whose supervisor is gone brings the arm
to rest and ends.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field

from flywheel.edge import realtime, rows
from flywheel.edge.images import FrameRing
from flywheel.edge.journal import JOURNAL_BYTES, Journal
from flywheel.edge.link import Arena, Ring, Seqlock, Words
from flywheel.edge.safety import CATEGORY_2, SafetyLimits
from flywheel.edge.system1 import COMMAND, CONTROL_WORDS, HEARTBEAT, HEARTBEAT_LIMIT_NS, System1
from flywheel.errors import ConfigError, FlywheelError
from flywheel.robot import Perception, Robot
from flywheel.schema import Bundle, Strict

WORLD_BYTES = 1 << 16  # for what a simulated robot tells its own perception
EXIT_BAD_PLAN = 3  # a fault that starting again will not mend


class Plan(Strict):
    """Everything a child process must know.

    ``robot`` and ``perception`` are ``module:function``, called with ``args`` and the world buffer;
    ``operator`` (or "") likewise, called with ``args`` and the perception, gives an override. Without a
    perception there is no System 2, and the supervisor writes the chunks. The functions are imported and
    run: a plan comes from the code that starts the robot, never from the network.
    """

    robot: str
    perception: str
    operator: str = ""
    args: dict[str, Any] = Field(default_factory=dict)
    joints: int
    cameras: dict[str, tuple[int, int]]  # name -> height, width
    limits: str  # path of the robot's limits file
    bundle_dir: str
    bundle: Bundle
    instruction: str
    control_hz: float = 1000.0
    policy_hz: float = 10.0
    threads: int = 1
    priority: int = 50  # SCHED_FIFO; 0 for ordinary scheduling
    cpu: int | None = None  # core of System 1
    others: tuple[int, ...] = ()  # cores of everything else
    jpeg_quality: int | dict[str, int] = 95  # of all cameras, or of each


class Shared:
    """Where everything lies in the shared memory; the same in every process that has the same plan."""

    def __init__(self, plan: Plan, arena: Arena) -> None:
        chunk, control, frame, event = _dtypes(plan)
        self.slot = Seqlock(chunk, arena.carve(Seqlock.nbytes(chunk)))
        self.control = Ring(control, _rows(plan), arena.carve(Ring.nbytes(control, _rows(plan))))
        pictures = rows.image_bytes(plan.cameras, FRAME_ROWS)
        room = arena.carve(FrameRing.room(frame, FRAME_ROWS, pictures))
        self.frames = FrameRing(frame, FRAME_ROWS, pictures, room)
        self.events = Ring(event, EVENT_ROWS, arena.carve(Ring.nbytes(event, EVENT_ROWS)))
        self.commands: Words = np.frombuffer(arena.carve(CONTROL_WORDS * 8), np.int64)
        self.status1: Words = np.frombuffer(arena.carve(realtime.STATUS_WORDS * 8), np.int64)
        self.status2: Words = np.frombuffer(arena.carve(realtime.STATUS_WORDS * 8), np.int64)
        self.world = arena.carve(WORLD_BYTES)
        self.journal = Journal(arena.carve(JOURNAL_BYTES))  # of whoever records

    @staticmethod
    def nbytes(plan: Plan) -> int:
        """Bytes of arena that a plan needs."""
        chunk, control, frame, event = _dtypes(plan)
        parts = (
            Seqlock.nbytes(chunk),
            Ring.nbytes(control, _rows(plan)),
            FrameRing.room(frame, FRAME_ROWS, rows.image_bytes(plan.cameras, FRAME_ROWS)),
            Ring.nbytes(event, EVENT_ROWS),
            *(8 * n for n in (CONTROL_WORDS, realtime.STATUS_WORDS, realtime.STATUS_WORDS)),
            WORLD_BYTES,
            JOURNAL_BYTES,
        )
        return sum(-(-p // 64) * 64 for p in parts)


CONTROL_S = 16.0  # how far the slowest reader may fall behind System 1
FRAME_ROWS, EVENT_ROWS = 128, 256


def _rows(plan: Plan) -> int:
    return round(plan.control_hz * CONTROL_S)


def _dtypes(plan: Plan) -> tuple[np.dtype[np.void], ...]:
    b = plan.bundle
    return (
        rows.chunk_dtype(plan.joints),
        rows.control_dtype(plan.joints),
        rows.frame_dtype(plan.cameras, len(b.state_names), b.chunk, len(b.action_names)),
        rows.event_dtype(),
    )


def resolve(name: str) -> Callable[..., Any]:
    """The function behind ``module:function``; ``ConfigError`` if there is none."""
    module, _, function = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"{name!r}: give module:function that can be imported: {e}") from None
    return found


class _Stop:
    """SIGTERM asks the process to end; Ctrl-C is the supervisor's to handle."""

    def __init__(self) -> None:
        self.asked = False
        self._parent = os.getppid()
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def orphaned(self) -> bool:
        """Whether the supervisor is gone for good, and not only stalled."""
        return os.getppid() != self._parent

    def _ask(self, *_: object) -> None:
        self.asked = True


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


# ── System 1 ──────────────────────────────────────────────────────────────────────────────────────────


def run_system1(plan: Plan, shared: Shared) -> None:
    """Control until SIGTERM; then come to rest (category 2), remove power, and return."""
    stop = _Stop()
    robot: Robot = resolve(plan.robot)(plan.args, shared.world)
    system1 = System1(robot, plan.control_hz, shared.slot, shared.control, control=shared.commands, wall=True)
    period = round(1e9 / plan.control_hz)
    realtime.pace(np.zeros(realtime.STATUS_WORDS, np.int64), period)  # compiled before the clock matters
    privileges = realtime.claim(plan.priority, plan.cpu)
    _say(ready="system1", limits_sha256=robot.limits.sha256, privileges=privileges.as_dict())
    try:
        _loop(system1, shared, period, stop)
    finally:
        robot.stop()


def _loop(system1: System1, shared: Shared, period: int, stop: _Stop) -> None:
    """The 1 kHz loop. Its only system calls are the sleep, the clock and the robot's own."""
    pace, tick, status = realtime.pace, system1.tick, shared.status1
    leave_at = 0
    while True:
        now, late = pace(status, period)
        tick(now, late)
        if leave_at == 0:
            if stop.asked:
                shared.commands[COMMAND] = CATEGORY_2
                leave_at = now + LEAVE_NS
            elif now - shared.commands[HEARTBEAT] > HEARTBEAT_LIMIT_NS and stop.orphaned():
                leave_at = now + LEAVE_NS  # the ladder was taken when the heartbeat went stale
        elif system1.resting or now > leave_at:
            return


LEAVE_NS = 2_000_000_000  # longest that coming to rest at the end may take


# ── System 2 ──────────────────────────────────────────────────────────────────────────────────────────


def run_system2(plan: Plan, shared: Shared) -> None:
    """See and decide at ``policy_hz`` until SIGTERM."""
    from flywheel.edge.policy import Policy
    from flywheel.edge.system2 import System2

    stop = _Stop()
    if plan.others:
        os.sched_setaffinity(0, plan.others)
    policy = Policy.load(plan.bundle_dir, plan.threads)
    perception: Perception = resolve(plan.perception)(plan.args, shared.world)
    override = resolve(plan.operator)(plan.args, perception) if plan.operator else None
    last = shared.slot.record()
    first_id = int(last["chunk_id"][0]) + 1 if shared.slot.read(last) else 0
    limits = SafetyLimits.load(plan.limits)
    system2 = System2(
        perception,
        policy,
        limits,
        shared.slot.write,
        rows.EventLog(shared.events),
        shared.frames,
        plan.jpeg_quality,
        first_id,
    )
    while shared.status1[realtime.TICKS] == 0 and not stop.asked:
        time.sleep(0.01)  # a simulated robot has nothing to show before System 1 runs
    system2.self_test(plan.instruction)
    _say(ready="system2", digest=policy.digest, limits_sha256=limits.sha256)
    period = round(1e9 / plan.policy_hz)
    while not stop.asked:
        now, _ = realtime.pace(shared.status2, period)
        if now - shared.commands[HEARTBEAT] > HEARTBEAT_LIMIT_NS and stop.orphaned():
            return
        system2.tick(now, plan.instruction, override)


def main(argv: list[str]) -> int:
    """Entry of a child process."""
    role, fd = argv[1], int(argv[2])
    plan = Plan.model_validate_json(sys.stdin.read())
    shared = Shared(plan, Arena(fd, Shared.nbytes(plan)))
    try:
        {"system1": run_system1, "system2": run_system2}[role](plan, shared)
    except FlywheelError as e:
        print(f"{role}: {e}", file=sys.stderr)
        _say(error=str(e))
        return EXIT_BAD_PLAN
    return 0


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stdout.flush()
    # Nothing is left to tear down that the kernel would not, and numpy views still hold the mapping.
    os._exit(code)
