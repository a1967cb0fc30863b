"""System 1's loop in real time: wake, tick, and whether it is time to leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flywheel.edge import realtime
from flywheel.edge.link import Words
from flywheel.edge.safety import CATEGORY_2
from flywheel.edge.system1 import System1
from flywheel.edge.tick import COMMAND

REHEARSAL_NS = 40_000  # a rehearsal takes 10 to 30 µs; begun later, it might delay the tick
LEAVE_NS = 2_000_000_000  # longest that coming to rest at the end may take


class Leave(Protocol):
    """Why a loop may have to end. Both are asked in every tick: neither may call the system."""

    @property
    def asked(self) -> bool:
        """Whether the process was told to end."""

    def orphaned(self, now_ns: int) -> bool:
        """Whether the supervisor is gone for good; may ask the kernel once its heartbeat is stale."""


def run(
    system1: System1,
    commands: Words,
    status: Words,
    period_ns: int,
    leave: Leave,
    early_ns: int = 0,
    each: Callable[[int], None] | None = None,
) -> None:
    """Tick at absolute deadlines until ``leave`` says so and the arm rests.

    Its only system calls are the sleep, the clock and the robot's own; it allocates nothing that stays.
    ``commands`` are the words that System 1 obeys, ``status`` those of ``realtime.rise``, which must outlive
    the call; ``each`` is called with the time after every tick (benchmarks).

    ``early_ns`` before each deadline it wakes, rehearses the tick, and looks at the clock until the deadline.
    That takes so much of the core, and the time that a kernel needs to wake a process is over by then.
    """
    rise, meet, address = realtime.rise_at, realtime.await_deadline_at, status.ctypes.data
    tick, rehearse = system1.tick, system1.rehearse
    now = leave_at = 0
    while True:
        left = rise(address, period_ns, early_ns)
        if left > REHEARSAL_NS:
            rehearse(now + period_ns)
        now, late = meet(address, period_ns)
        tick(now, late)
        if each is not None:
            each(now)
        if leave_at == 0:
            if leave.asked:
                commands[COMMAND] = CATEGORY_2
                leave_at = now + LEAVE_NS
            elif leave.orphaned(now):
                leave_at = now + LEAVE_NS  # the ladder was taken when the heartbeat went stale
        elif system1.resting or now > leave_at:
            return
