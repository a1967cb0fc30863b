"""The processes that a supervisor looks after: its own children, or those of one that was killed.

A process is held by a pidfd, so that a signal can never reach another one that got the same number. Of a
child that was taken over the kernel tells its end, but not with what code.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from flywheel.edge.link import Arena, load
from flywheel.edge.processes import EXIT_BAD_PLAN, Place, Plan
from flywheel.edge.realtime import TICKS
from flywheel.edge.supervision import Backoff, Heartbeat, SupervisionSettings
from flywheel.schema import Strict

_LIBRARIES = ("OMP", "OPENBLAS", "MKL", "NUMBA")


class ProcessRecord(Strict):
    """What identifies a process until the next boot: no two share a number and a start time."""

    role: str
    place: str
    generation: int
    pid: int
    started: int  # clock ticks since boot, field 22 of /proc/PID/stat


class Child:
    """One process."""

    def __init__(
        self, record: ProcessRecord, pidfd: int, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.record = record
        self.pidfd = pidfd
        self._process = process

    @classmethod
    def start(cls, role: str, plan: Plan, arena: Arena, place: str, generation: int) -> Self:
        """Start a process of ours in a session of its own: Ctrl-C is for the supervisor."""
        path = os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)
        one = {f"{lib}_NUM_THREADS": "1" for lib in _LIBRARIES}
        args = [role, str(arena.fd), place, str(generation)]
        process = subprocess.Popen(
            [sys.executable, "-m", "flywheel.edge.processes", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(arena.fd,),
            env={**os.environ, **one, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path},
            start_new_session=True,
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone; the next look tells
            process.stdin.write(plan.to_bytes())
            process.stdin.close()
        started = started_at(process.pid) or 0
        record = ProcessRecord(
            role=role, place=place, generation=generation, pid=process.pid, started=started
        )
        return cls(record, os.pidfd_open(process.pid), process)

    @classmethod
    def adopt(cls, record: ProcessRecord) -> Self | None:
        """A process that another supervisor started; None if it is gone, or its number is another's now."""
        try:
            pidfd = os.pidfd_open(record.pid)
        except OSError:
            return None
        child = cls(record, pidfd)
        # Looked at after the pidfd was opened: the number cannot change hands any more while it is alive.
        if started_at(record.pid) != record.started or owner(record.pid) != os.geteuid() or not child.alive:
            child.close()
            return None
        return child

    @property
    def pid(self) -> int:
        """Its number."""
        return self.record.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        if self._process is not None:
            return self._process.poll() is None
        return not select.select([self.pidfd], [], [], 0.0)[0]

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None if it runs or was not ours."""
        return None if self._process is None else self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it has not ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within ``timeout_s``."""
        if not select.select([self.pidfd], [], [], timeout_s)[0]:
            return False
        if self._process is not None:
            self._process.wait()
        return True

    def end(self, timeout_s: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """SIGTERM (and SIGCONT, should it be stopped), then SIGKILL; ``meanwhile`` is called at 20 Hz."""
        if self.pidfd < 0:
            return
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        for _ in range(max(round(timeout_s / 0.05), 1)):
            if self.wait(0.05):
                break
            meanwhile()
        else:
            self.kill()
        self.close()

    def kill(self) -> None:
        """SIGKILL, and wait for the end of it."""
        self.signal(signal.SIGKILL)
        self.wait(5.0)

    def close(self) -> None:
        """Let go of it."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Watched:
    """A process and how it is: starting, ready, or ended and why."""

    def __init__(self, child: Child, place: Place, settings: SupervisionSettings, now_s: float) -> None:
        """``now_s``: when it was started, or taken over."""
        self.child = child
        self.place = place
        self.since_s = now_s
        self.said: dict[str, Any] = {}
        self._settings = settings
        systems = child.record.role in ("system1", "system2")
        self._limit_s = settings.beat_s if systems else settings.aside_beat_s
        self._beat = Heartbeat(self._limit_s)
        self._start = Heartbeat(settings.start_s)  # that it takes to be ready; looked at in the same way
        self._killed = ""

    @property
    def ready(self) -> bool:
        """Whether it has said that it is."""
        return "ready" in self.said

    def look(self, now_s: float, beats: bool = True) -> str | None:
        """Why it ended; None while it runs. One that stands still is killed first.

        ``beats``: whether its heartbeat counts (a process that waits for a network may take its time).
        """
        if said := self.place.told(self.child.pid):
            self.said = said
        if not self.child.alive:
            said = self.place.told(self.child.pid) or self.said
            code = self.child.code
            how = "ended" if code is None else f"ended with code {code}"
            return self._killed or (f"{how}: {said['error']}" if "error" in said else how)
        if self.ready:
            ticks = load(self.place.status, TICKS)
            if beats and self._beat.stalled(ticks, now_s):
                self._kill(f"stood still for {self._limit_s:g} s")
        elif self._start.stalled(0, now_s):
            self._kill(f"was not ready within {self._settings.start_s:g} s")
        return self._killed or None

    @property
    def hopeless(self) -> bool:
        """Whether starting it again will not mend what ended it."""
        return "error" in self.place.told(self.child.pid) or self.child.code == EXIT_BAD_PLAN

    def _kill(self, why: str) -> None:
        self._killed = f"{why}, killed"
        self.child.kill()


class Kept:
    """A process that is started again whenever it ends, after a pause that grows."""

    def __init__(
        self,
        role: str,
        settings: SupervisionSettings,
        start: Callable[[str], Watched],
        tell: Callable[[str, dict[str, Any]], None],
        beats: bool = True,
    ) -> None:
        self.role = role
        self.restarts = 0
        self.watched: Watched | None = None
        self._settings = settings
        self._start = start
        self._tell = tell
        self._beats = beats
        self._backoff = Backoff()
        self._again_s = float("-inf")

    def step(self, now_s: float) -> None:
        """One look; starts it when it is due."""
        w = self.watched
        if w is None:
            if now_s >= self._again_s:
                self.watched = self._start(self.role)
            return
        why = w.look(now_s, self._beats)
        if why is None:
            return
        self._backoff, pause = self._backoff.ended(now_s - w.since_s, self._settings)
        if w.hopeless:
            pause = float("inf")
        self._tell(f"{self.role}_ended", {"why": why, "code": w.child.code, "again_s": _finite(pause)})
        w.child.close()
        self.watched = None
        self._again_s = now_s + pause
        self.restarts += pause != float("inf")


def _finite(pause: float) -> float | None:
    return pause if pause != float("inf") else None


def started_at(pid: int) -> int | None:
    """Start time of a process (clock ticks since boot); None if there is none or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # its name may hold blanks and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def owner(pid: int) -> int | None:
    """User id that a process runs as."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None
