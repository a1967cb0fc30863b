"""The clock, absolute sleeping, and what an ordinary Linux kernel lets a process have of real time."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from flywheel.edge.compiled import compiled, words_at

Words = npt.NDArray[np.int64]

_MONOTONIC, _ABSOLUTE = 1, 1  # CLOCK_MONOTONIC, TIMER_ABSTIME (linux/time.h)
# By name, so that the compiled code can be cached (an address could not).
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))
_clock_nanosleep: Any = types.ExternalFunction(
    "clock_nanosleep", types.int32(types.int32, types.int32, types.uintp, types.uintp)
)


def timespec() -> Words:
    """Scratch memory for the two functions below (a struct timespec, 64 bit)."""
    if sys.maxsize < 1 << 32:
        raise OSError("System 1 needs a 64-bit system: its timespec is two 64-bit words")
    return np.zeros(2, np.int64)


@compiled
def clock_ns(ts: Words) -> int:
    """CLOCK_MONOTONIC in ns: the same clock as ``time.monotonic_ns``."""
    _clock_gettime(_MONOTONIC, ts.ctypes.data)
    return int(ts[0] * 1_000_000_000 + ts[1])


@compiled
def sleep_until(deadline_ns: int, ts: Words) -> int:
    """Sleep until ``deadline_ns`` on CLOCK_MONOTONIC; returns the time of waking. A signal may wake early."""
    ts[0] = deadline_ns // 1_000_000_000
    ts[1] = deadline_ns % 1_000_000_000
    _clock_nanosleep(_MONOTONIC, _ABSOLUTE, ts.ctypes.data, 0)
    return clock_ns(ts)


@dataclass(frozen=True)
class Privileges:
    """What the process asked for and got; the reasons say why not."""

    fifo: bool
    locked: bool
    awake: bool
    pinned: bool
    frozen: bool
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


def claim(priority: int, cpu: int | None) -> Privileges:
    """Make this process as real-time as it may be: SCHED_FIFO, mlockall, one core, collector off.

    Whatever is refused is reported and does without; the loop runs the same, only later. Where the kernel
    lets it, the cores stay out of idle states that take long to wake from (as cyclictest asks for, too).
    """
    reasons = []
    fifo = locked = awake = pinned = False
    if priority > 0:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
            fifo = True
        except OSError as e:
            reasons.append(f"SCHED_FIFO {priority}: {e.strerror}; allow it with LimitRTPRIO= or CAP_SYS_NICE")
    try:
        lock_memory()
        locked = True
    except OSError as e:
        reasons.append(f"mlockall: {e.strerror}; allow it with LimitMEMLOCK=infinity or CAP_IPC_LOCK")
    try:
        stay_awake()
        awake = True
    except OSError as e:
        reasons.append(f"/dev/cpu_dma_latency: {e.strerror}; cores may wake up late from deep idle states")
    if cpu is not None:
        try:
            os.sched_setaffinity(0, {cpu})
            pinned = True
        except OSError as e:
            reasons.append(f"core {cpu}: {e.strerror}")
    gc.collect()
    gc.freeze()
    gc.disable()
    return Privileges(fifo, locked, awake, pinned, True, tuple(reasons))


def stay_awake() -> None:
    """Keep the cores out of idle states that take time to leave; raises OSError where that is not permitted.

    In force as long as the file is open, which is never closed (Documentation/power/pm_qos_interface.rst).
    """
    os.write(os.open("/dev/cpu_dma_latency", os.O_WRONLY | os.O_CLOEXEC), bytes(4))


def lock_memory() -> None:
    """mlockall(MCL_CURRENT | MCL_FUTURE); raises OSError where it is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(1 | 2) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def cores() -> tuple[int | None, set[int]]:
    """The core for System 1 and those for everything else; (None, all) if there is only one."""
    have = sorted(os.sched_getaffinity(0))
    if len(have) < 2:
        return None, set(have)
    return have[-1], set(have[:-1])


# Words of a loop's status: written by the loop alone, read by anybody.
DEADLINE, TICKS, SKIPPED, LATE, RUN, LONGEST, _TS, STATUS_WORDS = 0, 1, 2, 3, 4, 5, 6, 8


@compiled
def rise(status: Words, period_ns: int, early_ns: int) -> int:
    """Sleep until ``early_ns`` before the next deadline; returns how long it still is until then (< 0: over).

    Deadlines lie on a fixed grid. Those that passed while the last tick ran are skipped and counted, never
    caught up with in a burst.
    """
    ts = status[_TS : _TS + 2]
    deadline = status[DEADLINE] + period_ns
    now = clock_ns(ts)
    if status[DEADLINE] == 0:
        deadline = now + period_ns
    while deadline <= now:
        deadline += period_ns
        status[SKIPPED] += 1
        status[RUN] += 1
    status[LONGEST] = max(status[LONGEST], status[RUN])
    status[DEADLINE] = deadline
    while now < deadline - early_ns:
        now = sleep_until(deadline - early_ns, ts)
    return int(deadline - now)


@compiled
def await_deadline(status: Words, period_ns: int) -> tuple[int, int]:
    """Look at the clock until the deadline that ``rise`` chose; returns the time and how late that is.

    A deadline is missed if it was skipped or its tick began a period late or more; ``LONGEST`` is the longest
    run of missed deadlines.
    """
    ts = status[_TS : _TS + 2]
    now = clock_ns(ts)
    while now < status[DEADLINE]:
        now = clock_ns(ts)
    late = now - status[DEADLINE]
    if late >= period_ns:
        status[LATE] += 1
        status[RUN] += 1
        status[LONGEST] = max(status[LONGEST], status[RUN])
    else:
        status[RUN] = 0
    status[TICKS] += 1
    return now, late


@compiled
def pace(status: Words, period_ns: int) -> tuple[int, int]:
    """Sleep until the next deadline; returns the time of waking and how late that is."""
    rise(status, period_ns, 0)
    return await_deadline(status, period_ns)


# For a loop that must not allocate: ``address`` is that of the status words.


@compiled
def rise_at(address: int, period_ns: int, early_ns: int) -> int:
    """``rise``."""
    return rise(words_at(address, 1, STATUS_WORDS)[0], period_ns, early_ns)


@compiled
def await_deadline_at(address: int, period_ns: int) -> tuple[int, int]:
    """``await_deadline``."""
    return await_deadline(words_at(address, 1, STATUS_WORDS)[0], period_ns)
