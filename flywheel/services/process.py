"""Processes that outlive the command which started them, found again and ended by identity.

A process is known by pid, start time and boot, so that a pid used again by somebody else is never taken for
ours. Everything that a service starts inherits a mark in its environment; that is how children of children
are found whose parents died. Linux only: the facts are read from ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from json import JSONDecodeError, dumps, loads
from pathlib import Path

from flywheel.errors import ServiceError

MARK = "FLYWHEEL_SERVICE"
POLL_S = 0.05

Progress = Callable[[str], None]  # told what a service is doing

_children: dict[int, subprocess.Popen[bytes]] = {}  # ours to reap, when this process is the parent


@dataclass(frozen=True, slots=True)
class Process:
    """One process of one boot. ``start`` is in clock ticks since boot, exact."""

    name: str
    pid: int
    start: int
    boot: str


def start(
    name: str, argv: Sequence[str], *, mark: str, run_dir: Path, log: Path, env: Mapping[str, str], cwd: Path
) -> Process:
    """Start a process in a session of its own, its output appended to ``log``; remember it in ``run_dir``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**env, MARK: mark, "SPT_NOENV": "1"},  # setproctitle would overwrite the mark
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as e:
            raise ServiceError(f"{name}: cannot start {argv[0]}: {e.strerror}") from None
    _children[child.pid] = child
    process = Process(name, child.pid, _start_ticks(child.pid) or 0, _boot())
    temp = run_dir / f".{name}.tmp"
    temp.write_text(dumps(asdict(process)))
    temp.replace(run_dir / f"{name}.json")
    return process


def remembered(run_dir: Path, name: str) -> Process | None:
    """The process that was started last under this name, dead or alive."""
    try:
        return Process(**loads((run_dir / f"{name}.json").read_text()))
    except (FileNotFoundError, JSONDecodeError, TypeError):
        return None


def running(run_dir: Path, name: str) -> Process | None:
    """The remembered process, if it is alive."""
    process = remembered(run_dir, name)
    return process if process is not None and alive(process) else None


def alive(process: Process) -> bool:
    """Whether exactly this process still runs (a zombie does not)."""
    child = _children.get(process.pid)
    if child is not None and child.poll() is not None:
        del _children[process.pid]
        return False
    return process.boot == _boot() and process.start == _start_ticks(process.pid)


def this_process(name: str) -> Process:
    """The calling process."""
    return Process(name, os.getpid(), _start_ticks(os.getpid()) or 0, _boot())


def stop(processes: Iterable[Process], timeout_s: float) -> None:
    """SIGTERM in the order given, again at half time, then SIGKILL to the group; wait until all are gone."""
    ours = [p for p in processes if alive(p)]
    began = time.monotonic()
    for p in ours:
        _signal(p, signal.SIGTERM)
    resent = False
    while any(alive(p) for p in ours):
        waited = time.monotonic() - began
        if waited > timeout_s:
            for p in ours:
                if alive(p):
                    # Each was started as the leader of its own group, so the group is ours.
                    _signal(p, signal.SIGKILL, group=os.getpgid(p.pid) == p.pid)
            began = time.monotonic()
        elif waited > timeout_s / 2 and not resent:
            resent = True
            for p in ours:
                _signal(p, signal.SIGTERM)
        time.sleep(POLL_S)


def marked(mark: str, variable: str = MARK) -> Iterator[Process]:
    """Every living process that carries the mark in its environment, but this one."""
    wanted = f"{variable}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
        except OSError:  # gone, or another user's
            continue
        ticks = _start_ticks(int(entry.name))
        if ticks is not None:
            yield Process(mark, int(entry.name), ticks, _boot())


def session_of(process: Process) -> int | None:
    """The pid of its session's leader, who may be dead: each process started here leads one of its own."""
    try:
        return int(Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[3])
    except OSError:
        return None


def parent_of(process: Process) -> int | None:
    """The pid of its parent; that of whoever adopted it if its own is dead."""
    try:
        return int(Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def title_of(process: Process) -> str:
    """Its command line as it shows it now."""
    try:
        text = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return text.replace(b"\0", b" ").decode(errors="replace").strip()


def end_marked(mark: str, timeout_s: float, variable: str = MARK) -> None:
    """Stop every process that carries the mark, until none is left."""
    while left := list(marked(mark, variable)):
        stop(left, timeout_s)


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log, for a message."""
    try:
        text = log.read_bytes()[-4000:].decode(errors="replace")
    except OSError:
        return "no log"
    return " | ".join(text.strip().splitlines()[-lines:]) or "empty log"


def _signal(process: Process, number: int, *, group: bool = False) -> None:
    if alive(process):
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(process.pid, number)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """Field 22 of ``/proc/PID/stat``; None if there is no such process or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def free_port(taken: set[int]) -> int:
    """A port on 127.0.0.1 that nobody listens on, below the range that connections draw theirs from."""
    base = 20000 + (os.getpid() * 37 + time.monotonic_ns() // 1000) % 9000
    for port in range(base, base + 3000):
        if port not in taken and is_free(port):
            return port
    raise ServiceError("no free port between 20000 and 32000 on 127.0.0.1")


def is_free(port: int) -> bool:
    """Whether nobody listens on the port on 127.0.0.1."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def write_private(path: Path, text: str) -> None:
    """A file that only its owner can read, whole or not at all."""
    temp = path.with_name(f".{path.name}.tmp")
    with os.fdopen(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        f.write(text + "\n")
        f.flush()
        os.fsync(f.fileno())
    temp.replace(path)
