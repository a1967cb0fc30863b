"""Processes found and ended by identity: stubborn ones, orphans, and strangers with a pid of ours."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flywheel.errors import ServiceError
from flywheel.services import process
from flywheel.services.process import Process

# Says so once its handlers are in place.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ready", child.pid, flush=True)
time.sleep(60)
"""

Start = Callable[[str], Process]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a Python program under the mark ``test:<tmp_path>``; its log is ``tmp_path/log``."""

    def start(program: str) -> Process:
        return process.start(
            "it",
            [sys.executable, "-c", program],
            mark=f"test:{tmp_path}",
            run_dir=tmp_path / "run",
            log=tmp_path / "log",
            env=os.environ,
            cwd=tmp_path,
        )

    return start


def wait_for_log(tmp_path: Path, p: Process) -> list[str]:
    while not (words := (tmp_path / "log").read_text().split()):
        assert process.alive(p)
    return words


def test_process_that_ignores_sigterm_is_killed_with_its_group(tmp_path: Path, start: Start) -> None:
    stubborn = start(STUBBORN)
    child = int(wait_for_log(tmp_path, stubborn)[1])
    family = {p.pid: p for p in process.marked(f"test:{tmp_path}")}
    assert set(family) == {stubborn.pid, child}
    process.stop([stubborn], timeout_s=0.2)
    process.end_marked(f"test:{tmp_path}", timeout_s=5)
    assert not any(process.alive(p) for p in family.values())
    assert process.running(tmp_path / "run", "it") is None


def test_polite_process_gets_the_chance_to_finish(tmp_path: Path, start: Start) -> None:
    polite = start(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit()))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    wait_for_log(tmp_path, polite)
    assert process.running(tmp_path / "run", "it") == polite
    process.stop([polite], timeout_s=20)
    assert "saved" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("change", [{"start": 1}, {"boot": "another"}])
def test_stranger_with_the_pid_of_a_dead_process_is_never_signalled(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        real = process.this_process("x")
        ticks = int(Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()[19])
        fields: dict[str, Any] = {"name": "it", "pid": stranger.pid, "start": ticks, "boot": real.boot}
        assert process.alive(Process(**fields))
        recorded = Process(**{**fields, **change})
        assert not process.alive(recorded)
        process.stop([recorded], timeout_s=0)
        stranger.communicate(b"\n", timeout=10)
    assert stranger.returncode == 0


def test_zombie_counts_as_dead(start: Start) -> None:
    gone = start("pass")
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # ended, not yet reaped
    assert not process.alive(gone)


def test_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="cannot start no-such-program: No such file"):
        process.start(
            "it", ["no-such-program"], mark="m", run_dir=tmp_path, log=tmp_path / "log", env={}, cwd=tmp_path
        )


@pytest.mark.parametrize("text", ["", "{", "{}", '{"pid": 1}', "[]"])
def test_damaged_pid_file_means_not_running(tmp_path: Path, text: str) -> None:
    (tmp_path / "it.json").write_text(text)
    assert process.running(tmp_path, "it") is None


def test_private_file_is_never_readable_by_others(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        process.write_private(tmp_path / "secret", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_free_port_is_free_and_not_taken() -> None:
    first = process.free_port(set())
    assert process.is_free(first)
    assert process.free_port({first}) != first
