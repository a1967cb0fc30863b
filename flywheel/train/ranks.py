"""One training run in several processes of this machine, data-parallel.

Small policies leave a core idle: their operations are too short to be shared out between threads. Processes
each take a part of every batch; lerobot's loop finds itself one of several and lets accelerate average the
gradients (torch's gloo, over loopback).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from flywheel.errors import ConfigError, FlywheelError, StageError
from flywheel.parent import die_with_parent
from flywheel.train import loop
from flywheel.train.loop import Job, Mixed, Note


def run(job: Job, note: Note) -> Mixed:
    """``loop.run`` in ``job.settings.processes`` processes; they end with the caller, whatever happens.

    Raises ``ConfigError`` if the batch cannot be shared out evenly, ``StageError`` if a process fails.
    """
    ranks, batch = job.settings.processes, job.settings.batch_size
    if batch % ranks:
        raise ConfigError(f"train.batch_size={batch}: must be a multiple of train.processes={ranks}")
    if ranks == 1:
        return loop.run(job, note)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="flywheel-train-") as folder:
        children: dict[Connection, BaseProcess] = {}
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_rank, args=(job, rank, Path(folder) / "meeting", theirs, os.getpid()), daemon=True
                )
                process.start()
                theirs.close()
                children[ours] = process
            return _follow(children, note)
        finally:
            for process in children.values():
                process.kill()
            for conn, process in children.items():
                process.join()
                conn.close()


def _follow(children: dict[Connection, BaseProcess], note: Note) -> Mixed:
    """Take in what the ranks say until each is done; rank 0 tells what came out."""
    first = next(iter(children))
    left = set(children)
    result: Mixed | None = None
    while left:
        for conn in wait(list(left)):
            assert isinstance(conn, Connection)
            try:
                kind, said = conn.recv()
            except EOFError:
                process = children[conn]
                process.join()
                raise StageError(
                    f"a training process ended with code {process.exitcode}; -9 usually means that memory "
                    "ran out: lower train.processes"
                ) from None
            if kind == "error":
                raise said
            if kind == "note":
                note(*said)
                continue
            left.discard(conn)
            if conn is first:
                result = said
    assert result is not None
    return result


def _rank(job: Job, rank: int, meeting: Path, say: Connection, parent: int) -> None:
    """A process's life."""
    die_with_parent(signal.SIGKILL, parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it ends us
    ranks = job.settings.processes
    # What accelerate reads, and what keeps gloo on this machine.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
        ACCELERATE_USE_CPU="true",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, job.settings.threads // ranks)))

    def note(*said: Any) -> None:
        say.send(("note", said))

    try:
        import torch

        torch.distributed.init_process_group(
            "gloo", init_method=meeting.as_uri(), rank=rank, world_size=ranks
        )
        say.send(("done", loop.run(job, note, rank, ranks)))
    except FlywheelError as e:
        say.send(("error", type(e)(str(e))))
    except Exception as e:  # the border of a process: told to the parent, which raises it
        traceback.print_exc()
        say.send(("error", StageError(f"training process {rank}: {type(e).__name__}: {e}")))
