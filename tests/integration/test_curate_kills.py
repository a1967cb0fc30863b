"""Curation that is killed, and two at once: the dataset is that of a run in peace."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flywheel.config import CurateSettings
from flywheel.curate import curate
from flywheel.dataset import dataset_digest
from tests.attempts import CORRECTED, attempt

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("lerobot_cache")]

SETTINGS = CurateSettings()
RESULTS = {"dataset", "selection.parquet", "curate.json"}
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}  # that may touch what is written
EVENLY = 3  # kills between the first and the last step, beside one before each rename


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inbox")
    for i in range(3):
        attempt(root, CORRECTED[i], seed=i)
    return root


@pytest.fixture(scope="module")
def peace(inbox: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return curate(inbox, tmp_path_factory.mktemp("peace"), SETTINGS).dataset_sha256


def start(inbox: Path, out: Path, at_step: Callable[[int, str], None] = lambda n, step: None) -> int:
    """Curate in a process of its own, which tells each step on the files of ``out`` before it is taken."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in STEPS and str(args[0]).startswith(str(out)):
                count += 1
                at_step(count, event)

        code = 1
        try:
            sys.addaudithook(hook)
            curate(inbox, out, SETTINGS)
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_curation_killed_at_any_step_gives_the_same_dataset_the_next_time(
    inbox: Path, peace: str, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "steps"

    def note(n: int, step: str) -> None:
        with log.open("a") as f:
            f.write(f"{step}\n")

    assert curate(inbox, out, SETTINGS).dataset_sha256 == peace
    assert ended(start(inbox, out, note)) == 0  # over an earlier result: the most steps
    steps = log.read_text().split()
    renames = [n for n, step in enumerate(steps, 1) if step == "os.rename"]
    assert len(renames) >= 4, "selection, metrics, and the dataset's change"
    spread = [1 + k * (len(steps) - 1) // (EVENLY - 1) for k in range(EVENLY)]
    for point in sorted({*spread, *renames}):

        def die(n: int, step: str, at: int = point) -> None:
            if n == at:
                os.kill(os.getpid(), signal.SIGKILL)

        assert ended(start(inbox, out, die)) == -signal.SIGKILL, point
        if (out / "dataset").is_dir():  # what a reader finds meanwhile is whole
            assert dataset_digest(out / "dataset") == peace, steps[point - 1]
        assert curate(inbox, out, SETTINGS).dataset_sha256 == peace, steps[point - 1]
        assert dataset_digest(out / "dataset") == peace
        assert {p.name for p in out.iterdir()} == RESULTS, steps[point - 1]


def test_two_curations_at_once_leave_one_whole_dataset(inbox: Path, peace: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [start(inbox, out) for _ in range(2)]
    assert [ended(p) for p in both] == [0, 0]
    assert dataset_digest(out / "dataset") == peace
    assert {p.name for p in out.iterdir()} == RESULTS
