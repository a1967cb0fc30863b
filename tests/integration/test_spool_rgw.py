"""The spool against the real object store: killed uploaders, refusals, a store that is down and comes up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flywheel.edge.spool import Spool
from flywheel.episode import ls, pull, read_manifest, verify
from flywheel.schema import Manifest
from flywheel.store import EmbeddedStore, Store
from tests.samples import sealed

pytestmark = pytest.mark.integration

MB = 1 << 20
ROOT = Path(__file__).parents[2]

# One process per life: fork, upload, be killed. The parent only counts lives.
UPLOADER = """
import os, random, signal, sys
from pathlib import Path
from flywheel.edge.spool import Spool
from flywheel.store import Store

root, lives = Path(sys.argv[1]), []
store = Store.from_env()  # not used here, so that no connection is shared; making one takes a while
plan = [("step", n) for n in range(14)] + [("time", 0.004 * 1.35 ** n) for n in range(14)]
for how, when in plan:
    pid = os.fork()
    if pid == 0:
        taken = 0
        def step(name):
            global taken
            if how == "step" and taken == when:
                os.kill(os.getpid(), signal.SIGKILL)
            taken += 1
        spool = Spool(root, store, 1 << 30, step=step)
        if how == "time":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process wherever it is
            signal.setitimer(signal.ITIMER_REAL, when)
        spool.upload_once(0)
        os._exit(0)
    lives.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(lives)
"""


def put_episodes(root: Path, n: int) -> list[Manifest]:
    return [read_manifest(sealed(root / "episodes", 0.2, seed)) for seed in range(n)]


def test_killed_uploaders_lose_nothing_and_double_nothing(
    tmp_path: Path, store: Store, store_env: dict[str, str]
) -> None:
    ms = put_episodes(tmp_path / "spool", 12)
    done = subprocess.run(
        [sys.executable, "-c", UPLOADER, str(tmp_path / "spool")],
        env=os.environ | store_env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lives = json.loads(done.stdout)
    assert lives.count(-9) >= 5  # it really was killed, between steps …
    assert lives.count(-14) >= 1  # … and in the middle of one
    s = Spool(tmp_path / "spool", store, 1 << 30)
    assert s.upload_once(0).waiting == 0
    listed = list(ls(store))
    assert sorted(x.manifest.episode_id for x in listed if x.manifest) == sorted(m.episode_id for m in ms)
    assert len(list(store.list("episodes/"))) == 4 * len(ms)
    markers = [i.key for i in store.list("inbox/")]
    assert sorted(k[-41:-5] for k in markers) == sorted(m.episode_id for m in ms)
    for m in ms:
        d = pull(store, m.prefix, tmp_path / "cloud")
        assert read_manifest(d) == m
        assert verify(d) == []
    assert list((tmp_path / "spool").glob("*/*")) == []


def test_a_store_that_is_down_and_then_up(tmp_path: Path, store: Store, free_endpoint: str) -> None:
    (m,) = put_episodes(tmp_path, 1)
    down = Store(
        "s3://flywheel", free_endpoint, access_key="k", secret_key="s", region="x", timeout_s=1.0, attempts=1
    )
    result = Spool(tmp_path, down, 100 * MB, np.random.default_rng(0)).upload_once(0)
    assert (result.uploaded, result.waiting) == ((), 1)
    assert free_endpoint in result.problems["store"]
    assert Spool(tmp_path, store, 100 * MB).upload_once(0).uploaded == (m.episode_id,)


def test_wrong_keys_are_told_without_telling_them_and_keep_the_data(
    tmp_path: Path, rgw: EmbeddedStore, store: Store
) -> None:
    (m,) = put_episodes(tmp_path, 1)
    stranger = Store(
        f"s3://{rgw.bucket}",
        rgw.endpoint,
        access_key=rgw.access_key,
        secret_key="not-the-key",
        region=rgw.region,
    )
    result = Spool(tmp_path, stranger, 100 * MB).upload_once(0)
    assert (result.uploaded, result.waiting) == ((), 1)
    said = result.problems[m.episode_id]
    assert "403" in said
    assert "not-the-key" not in said
    assert rgw.access_key not in said
    assert verify(tmp_path / "episodes" / m.episode_id) == []
    assert Spool(tmp_path, store, 100 * MB).upload_once(0).uploaded == (m.episode_id,)
