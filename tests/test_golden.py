"""Episodes that an older build sealed still read: ``tests/golden`` keeps the bytes of one for each schema."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flywheel.episode import as_array, read, verify
from flywheel.schema import EPISODE_SCHEMA_VERSION, Outcome, TriggerKind

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", range(1, EPISODE_SCHEMA_VERSION + 1))
def test_an_episode_of_every_schema_version_still_reads_and_verifies(version: int, tmp_path: Path) -> None:
    directory = tmp_path / "episode"
    shutil.copytree(GOLDEN / f"episode-v{version}", directory)
    assert verify(directory) == []
    e = read(directory)
    m = e.manifest
    assert (m.schema_version, m.site, m.robot, m.task) == (version, "lab", "r1", "pick the red box")
    assert (m.outcome, [t.kind for t in m.triggers]) == (Outcome.TIMEOUT, [TriggerKind.TASK_TIMEOUT])
    assert m.window_ns == (0, 50_000_000)
    assert (as_array(e.control, "t_ns") // 1_000_000).tolist() == list(range(50))
    assert as_array(e.control, "q").shape == (50, m.joints)
    assert e.frames.column("image.wrist")[0].as_py()[:2] == b"\xff\xd8"
    assert e.events.to_pylist()[0]["name"] == "task_timeout"
