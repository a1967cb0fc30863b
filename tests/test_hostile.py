"""Episodes from an attacker: each is refused with its reason, and none takes ingestion down or gets out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A process of its own: its worker is forked, and its memory bounded.
RUN = """
import json, sys
from pathlib import Path
from flywheel.bench.hostile import KINDS, run
print(json.dumps(run(Path(sys.argv[1]), 3 * len(KINDS), seed=7)))
"""


def test_every_kind_of_hostile_episode_is_refused_with_its_reason(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "q")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["accepted"], found["lost"], found["escaped"]) == ([], [], [])
    assert found["refused"] + found["harmless"] == found["examined"]
    assert found["memory_mb"] < 512
    assert all(sum(c.values()) == 3 for c in found["kinds"].values())
