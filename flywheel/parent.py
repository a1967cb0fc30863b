"""Children that do not outlive their parent, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(signum: signal.Signals = signal.SIGTERM, parent: int | None = None) -> None:
    """Have the kernel send ``signum`` to this process when its parent ends (Linux; elsewhere no effect).

    ``parent`` is the process id that the parent gave: if it has ended before this call, so does this process.
    The kernel counts the end of the *thread* that started the process as the parent's end.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
