"""Ends the services when whoever started them is gone, however it went.

It runs as ``python -m flywheel.services PARENT HOME SERVICE...`` with a pipe as standard input. The kernel
closes the pipe when the starter dies, kill -9 included; then the named services are stopped. The word
``keep`` on the pipe lets them run on.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

POLL_S = 1.0


class Watchdog:
    """The starter's end of the pipe."""

    def __init__(self, home: Path, services: Sequence[str]) -> None:
        log = home / "logs" / "watchdog.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flywheel.services", str(os.getpid()), str(home), *services],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must not reach it
            )

    def release(self) -> None:
        """Let it go without stopping anything."""
        pipe = self._process.stdin
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(BrokenPipeError):
                pipe.write(b"keep")
                pipe.close()
        self._process.wait()


def watch(parent: int, stop: Callable[[], None]) -> None:
    """Wait for the word on standard input, its end, or the parent's, and act on it.

    The parent is looked at too, since a child that it forked may hold the pipe open after its death.
    """
    said = b""
    fd = sys.stdin.fileno()
    while said != b"keep" and os.getppid() == parent:
        if select.select([fd], [], [], POLL_S)[0]:
            piece = os.read(fd, 16)
            if not piece:
                break
            said += piece
    if said != b"keep":
        stop()
