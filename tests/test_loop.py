"""What the loop must not do: allocate, lock, or call the system for more than the sleep and the clock."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import platform
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flywheel.edge import loop, realtime
from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.link import Arena, Seqlock
from flywheel.edge.processes import Plan, Shared
from flywheel.edge.rows import CHUNK_STEPS, chunk_dtype
from flywheel.edge.system1 import System1
from flywheel.edge.tick import HEARTBEAT
from flywheel.robot import JointState
from flywheel.schema import Mode
from tests.robots import BUNDLE, JOINTS, Tiny

MS = 1_000_000
ROOT = Path(__file__).parents[1]


class Still(Tiny):
    """The tiny robot without what Python allocates in its read and write: only the loop is looked at."""

    def read(self, out: JointState) -> None:
        out.stop_input = False

    def write(self, command: object, tool: float) -> None:
        pass


class Rig:
    """System 1 in every mode that it can be in: chunks come for a while, then they stop."""

    def __init__(self) -> None:
        self.slot = Seqlock(chunk_dtype(JOINTS))
        self.ring = ControlRing(control_dtype(JOINTS), 4096)
        self.system = System1(Still(), 1000.0, self.slot, self.ring, wall=True)
        self.now = 0

    def send(self) -> None:
        chunk = self.slot.record()
        chunk["t0_ns"], chunk["step_ns"], chunk["steps"] = self.now, 100 * MS, CHUNK_STEPS
        chunk["valid_ns"], chunk["q"] = 300 * MS, 0.1
        self.slot.write(chunk)

    def run(self, ticks: int) -> None:
        rehearse, tick = self.system.rehearse, self.system.tick
        for _ in range(ticks):
            rehearse(self.now)
            tick(self.now)
            self.now += MS

    def through(self, watched: Callable[[], None]) -> set[Mode]:
        """``watched`` (which ticks) in one mode after another; the modes met."""
        for k in range(30):
            if k < 5:
                self.send()
            watched()
        return {Mode(m) for m in self.ring.reader().poll().rows["mode"]}


def test_compiled_code_allocates_nothing_in_any_tick() -> None:
    """Numba counts its own allocations, the wrapper of each array that Python passes included."""
    runtime: Any = importlib.import_module("numba.core.runtime")
    runtime._nrt_python.memsys_enable_stats()
    stats = runtime.rtsys.get_allocation_stats
    rig = Rig()
    status = np.zeros(realtime.STATUS_WORDS, np.int64)
    address = status.ctypes.data

    def wait() -> None:
        realtime.rise_at(address, 1000, 500)
        realtime.await_deadline_at(address, 1000)

    wait()

    def watched() -> None:
        before = stats()
        rig.run(60)
        wait()
        assert stats() == before

    met = rig.through(watched)
    assert met >= {Mode.FOLLOW, Mode.CARRY_ON, Mode.RAMP, Mode.HOLD, Mode.FALLBACK}

    before = stats()
    realtime.pace(status, 1000)  # the counter counts: here an array is passed
    assert stats().alloc > before.alloc


def test_python_keeps_nothing_of_a_tick_and_needs_only_a_few_numbers_for_it() -> None:
    rig = Rig()
    rig.through(lambda: rig.run(60))  # warm
    rig = Rig()
    gc.collect()
    gc.disable()
    try:
        grown = []

        def watched() -> None:
            grown.append(growth(60))

        def growth(ticks: int) -> int:
            before = sys.getallocatedblocks()
            rig.run(ticks)
            return sys.getallocatedblocks() - before

        met = rig.through(watched)
        grown.append(growth(3000))
        tracemalloc.start()
        rig.run(100)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        rig.run(500)
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    finally:
        gc.enable()
    assert Mode.FALLBACK in met
    assert max(grown[1:]) <= 2  # of 60 ticks in any mode, or of 3000: the counts themselves are numbers
    assert after - before < 200
    assert peak - before < 1500  # one tick's arguments and results, given back at its end


# ── system calls ──────────────────────────────────────────────────────────────────────────────────────

# AUDIT_ARCH of <linux/audit.h>, clock_nanosleep, clock_gettime (where it is not in the vDSO), exit_group
SYSCALLS = {"x86_64": (0xC000003E, 230, 228, 231), "aarch64": (0xC00000B7, 115, 113, 94)}
TICKS = 400
EARLY_NS = 250_000  # so that there is time to rehearse


def forbid_everything_else() -> None:
    """From here on, any system call but those of ``SYSCALLS`` kills the process (seccomp filter)."""
    arch, *allowed = SYSCALLS[platform.machine()]
    load, jump_if_equal, leave = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    kill, allow = 0x80000000, 0x7FFF0000
    n = len(allowed)
    program = [(load, 0, 0, 4), (jump_if_equal, 1, 0, arch), (leave, 0, 0, kill), (load, 0, 0, 0)]
    program += [(jump_if_equal, n - k, 0, number) for k, number in enumerate(allowed)]
    program += [(leave, 0, 0, kill), (leave, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    listed = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(38, 1, 0, 0, 0) != 0 or prctl(22, 2, ctypes.addressof(listed), 0, 0) != 0:
        os._exit(77)  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP: not permitted here


class After:
    """Ends the loop after so many ticks; the filter is in force from the tenth on."""

    def __init__(self, also: Callable[[], object] | None) -> None:
        self._also = also
        self._looks = 0

    @property
    def asked(self) -> bool:
        self._looks += 1
        if self._looks == 10:
            forbid_everything_else()
        if self._looks == 20 and self._also is not None:
            self._also()
        return self._looks > TICKS

    def orphaned(self, now_ns: int) -> bool:
        return False


def enter(what: str) -> None:
    """In a child: the runtime's own loop, following chunks that were written before; never returns."""
    plan = Plan(
        robot="", perception="", joints=JOINTS, cameras={}, limits="", bundle_dir="", bundle=BUNDLE,
        instruction="",
    )  # fmt: skip
    arena = Arena.create("flywheel-test", Shared.nbytes(plan))
    shared = Shared(plan, arena)
    system = System1(
        Tiny(255), 1000.0, shared.slot, shared.control, control=shared.commands, wall=True
    )  # moves: its read and write are numpy alone
    address = np.zeros(realtime.STATUS_WORDS, np.int64).ctypes.data
    realtime.rise_at(address, MS, 0)
    realtime.await_deadline_at(address, MS)
    realtime.claim(0, None)
    now, _ = realtime.pace(shared.places["system1"].status, MS)
    shared.commands[HEARTBEAT] = now + 3600 * 10**9
    chunk = shared.slot.record()
    chunk["t0_ns"], chunk["step_ns"], chunk["steps"] = now, 100 * MS, 8
    chunk["valid_ns"], chunk["q"] = 150 * MS, 0.1
    shared.slot.write(chunk)
    forbidden: dict[str, Callable[[], object]] = {
        "getppid": os.getppid,
        "open": lambda: open("/dev/null", "rb"),  # noqa: SIM115
        "write": lambda: os.write(1, b"log"),
        "mmap": lambda: bytearray(1 << 22),
    }
    after = After(forbidden.get(what))
    loop.run(system, shared.commands, shared.places["system1"].status, MS, after, EARLY_NS)
    os._exit(0 if system.resting and system.counters["accepted"] == 1 else 1)


def child(what: str) -> int:
    code = f"from tests.test_loop import enter; enter({what!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("this machine does not let a process filter its system calls")
    return done.returncode


known = pytest.mark.skipif(platform.machine() not in SYSCALLS, reason="numbers of another architecture")


@known
def test_the_loop_makes_no_system_call_but_the_sleep_and_the_clock() -> None:
    """Four hundred ticks and the way to rest: for anything else the kernel would have killed it."""
    assert child("") == 0


@known
@pytest.mark.parametrize("what", ["getppid", "open", "write", "mmap"])
def test_the_filter_would_have_noticed(what: str) -> None:
    assert child(what) == -signal.SIGSYS
