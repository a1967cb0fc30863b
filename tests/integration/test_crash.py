"""kill -9 of recorder, spool and uploader for a while, on the real store behind a faulty network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from flywheel.store import EmbeddedStore

pytestmark = [pytest.mark.integration, pytest.mark.soak]
ROOT = Path(__file__).parents[2]

# A process of its own: it forks, and must have no threads.
RUN = """
import json, sys
from pathlib import Path
from flywheel.bench.crash import run
from flywheel.store import EmbeddedStore
store = EmbeddedStore.model_validate_json(sys.stdin.read())
print(json.dumps(run(Path(sys.argv[1]), store, sys.argv[2], kills=40, seed=3, most_s=60.0)))
"""


def test_forty_kills_and_every_fault_of_the_store_lose_and_double_nothing(
    tmp_path: Path, rgw: EmbeddedStore
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run"), f"crash-{uuid.uuid4().hex}"],
        input=rgw.model_dump_json(),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 20
    assert found["triggers"] > 0
    assert (found["lost"], found["recorded_twice"], found["damaged"]) == (0, 0, 0), found
    assert (found["recorder_finished"], found["ended_badly"]) == (1, 0), done.stderr[-2000:]
    assert found["in_store"] + found["in_spool"] == found["episodes"]
    assert (found["without_marker"], found["marked_twice"]) == (0, 0)
