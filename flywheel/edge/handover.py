"""How a supervisor that was killed is followed by one that takes over the robot while it moves.

A supervisor with a state directory leaves there, in ``runtime.json``, what identifies its processes and their
memory. The next one locks the directory, and takes over only what it can prove to be the same: this boot,
System 1 by process number and start time, of the same user, and behind its descriptor the very memory that
was recorded (inode and size), holding this robot's nonce and laid out by the same plan. Nothing has a name in
a shared directory, so there is nothing to squat on and nothing to clean up.

What does not match is never written to: System 1 of another plan, still alive, makes this supervisor refuse
to start rather than start a second one beside it.
"""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from flywheel.edge.children import Child, ProcessRecord
from flywheel.edge.link import Arena
from flywheel.edge.policies import Refusal
from flywheel.edge.processes import BundleRef, Plan, Shared
from flywheel.errors import ConfigError
from flywheel.schema import Strict

RECORD_FILE = "runtime.json"


class RuntimeRecord(Strict):
    """``runtime.json``."""

    schema_version: int = 1
    boot_id: str
    plan_sha256: str
    arena_fd: int
    arena_inode: int
    arena_bytes: int
    nonce: int
    system1: ProcessRecord
    system2: tuple[ProcessRecord, ...] = ()  # the acting one first
    others: tuple[ProcessRecord, ...] = ()  # recorder, uploader
    current: BundleRef
    previous: BundleRef | None = None
    refusal: Refusal | None = None
    trial: bool = False
    supervisor: ProcessRecord | None = None  # who watches; None: nobody has told


class StateDirectory:
    """One robot's state directory, held by one supervisor at a time."""

    def __init__(self, root: Path) -> None:
        """Raises ``ConfigError`` if another supervisor holds it."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if root.stat().st_uid != os.geteuid():
            raise ConfigError(f"{root}: belongs to another user; choose a directory of this robot's own")
        self.root = root
        self._file = root / RECORD_FILE
        self._lock = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"{root}: another supervisor works here; stop it first") from None
        self._written = b""

    def close(self) -> None:
        """Let another supervisor work here."""
        self._lock.close()

    def read(self) -> RuntimeRecord | None:
        """What the last supervisor of this boot left; None if there is nothing to take over."""
        return read_record(self.root)

    def write(self, record: RuntimeRecord) -> None:
        """Replace the record, if it changed. It is worth nothing after the next boot, so it is not synced."""
        data = record.to_bytes()
        if data == self._written:
            return
        part = self._file.with_suffix(".part")
        part.write_bytes(data)
        part.replace(self._file)
        self._written = data

    def clear(self) -> None:
        """The robot was stopped in order: there is nothing to take over."""
        self._file.unlink(missing_ok=True)


class Found:
    """A running System 1 and its memory, proven to be this robot's."""

    def __init__(self, record: RuntimeRecord, system1: Child, arena: Arena) -> None:
        self.record, self.system1, self.arena = record, system1, arena

    @classmethod
    def look(cls, record: RuntimeRecord, plan: Plan) -> Self | None:
        """What a record speaks of, if System 1 still runs.

        Raises ``ConfigError`` if it runs and is not what this plan asks for.
        """
        system1 = Child.adopt(record.system1)
        if system1 is None:
            return None
        fd = -1
        try:
            plan = plan.running(record.current)
            if record.plan_sha256 != plan.sha256:
                raise ConfigError(
                    f"System 1 runs as process {system1.pid} under another plan; stop that robot first "
                    f"(kill -TERM {system1.pid} brings it to rest), then start this one"
                )
            fd = os.open(f"/proc/{system1.pid}/fd/{record.arena_fd}", os.O_RDWR | os.O_CLOEXEC)
            if not system1.alive:  # what was opened may have been another process's
                os.close(fd)
                system1.close()
                return None
            have = os.fstat(fd)
            arena = Arena(fd, record.arena_bytes) if have.st_size == record.arena_bytes else None
            if (
                arena is None
                or have.st_ino != record.arena_inode
                or record.arena_bytes != Shared.nbytes(plan)
                or Shared(plan, Arena(fd, record.arena_bytes)).nonce != record.nonce
            ):
                raise ConfigError(
                    f"descriptor {record.arena_fd} of process {system1.pid} is not this robot's memory; "
                    "stop that process first"
                )
        except (ConfigError, OSError) as e:
            if fd >= 0:
                os.close(fd)
            system1.close()
            if isinstance(e, OSError):
                raise ConfigError(f"System 1 (process {system1.pid}) cannot be taken over: {e}") from None
            raise
        return cls(record, system1, arena)


def read_record(root: Path) -> RuntimeRecord | None:
    """What a supervisor of this boot wrote last in its state directory; None if nothing that makes sense."""
    try:
        record = RuntimeRecord.model_validate_json((root / RECORD_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.boot_id == boot_id() else None


def acknowledge(root: Path) -> None:
    """A person acknowledges the stop of the robot whose supervisor works in a state directory.

    Raises ``ConfigError`` if none does.
    """
    record = read_record(root)
    supervisor = None if record is None or record.supervisor is None else Child.adopt(record.supervisor)
    if supervisor is None:
        raise ConfigError(f"{root}: no supervisor works here; start the robot with this --state")
    try:
        supervisor.signal(signal.SIGUSR1)
    finally:
        supervisor.close()


def boot_id() -> str:
    """Changes with every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
