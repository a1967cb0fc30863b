"""Every task of a turn on a machine of its own: nothing is shared but the store and git. Then that store is
backed up, and restored elsewhere."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flywheel import backup, episode
from flywheel.errors import ConfigError, NotFound
from flywheel.rehearsal.reporting import ReportingFleet
from flywheel.release import Publisher
from flywheel.rollout import look
from flywheel.schema import RolloutStage, sha256_file
from flywheel.store import EmbeddedStore, Store
from flywheel.trace import trace
from flywheel.turn import COLLECTED, STAGES, result_of
from tests.checkouts import fail_on_a_robot, git, make_checkout

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3000)]

STEPS = {
    "open": "from dags import steps; from datetime import datetime, UTC; "
    "print(steps.open_turn('manual__1', datetime(2026, 1, 1, tzinfo=UTC), True, {}))",
    "begin": "import sys; from dags import steps; print(steps.begin(sys.argv[1]))",
    # What `flywheel turn stage` runs; told to hand over, because this store's address is a loopback.
    "stage": "import sys; from flywheel.turn import run_stage; "
    "sys.exit(run_stage(*sys.argv[1:], hand_over=True))",
    "register": "import sys; from dags import steps; print(steps.register(sys.argv[1])['turn'])",
    "start": "import sys; from dags import steps; print(steps.start_rollout(sys.argv[1]))",
}
KEYS = {  # what a pod is given as a secret: of every key the one that its task signs with
    "open": ("root.json",),
    "begin": ("root.json",),
    "start": ("root.json", "canary-1.pem", "operator-1.pem", "snapshot-1.pem", "timestamp-1.pem"),
}


@dataclass
class Cluster:
    """Runs tasks as Kubernetes does: a fresh file system each, gone when the task ends."""

    root: Path
    origin: Path  # the bare repository that every pod clones
    keys: Path
    environ: Mapping[str, str]
    pods: list[Path] = field(default_factory=list)

    def run(self, step: str, *args: str) -> str:
        """One task in a pod of its own; the last line that it printed."""
        pod = self.root / f"pod-{uuid.uuid4().hex[:12]}"
        pod.mkdir()
        self.pods.append(pod)
        subprocess.run(["git", "clone", "--quiet", str(self.origin), str(pod / "checkout")], check=True)
        (pod / "state/keys").mkdir(parents=True, mode=0o700)
        for name in KEYS.get(step, ()):
            shutil.copy2(self.keys / name, pod / "state/keys")
        environ = {
            **self.environ,
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "HOME": str(pod / "home"),
            "TMPDIR": str(pod),
            "AIRFLOW_HOME": str(pod / "airflow"),
            "FLYWHEEL_HOME": str(pod / "state"),
            "FLYWHEEL_CHECKOUT": str(pod / "checkout"),
            "FLYWHEEL_GIT_REMOTE": "origin",
            "TEST_LOG": str(pod / "stages.log"),
        }
        command = [sys.executable, "-P", "-c", STEPS[step], *args]
        done = subprocess.run(
            command, cwd="/", env=environ, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{step} {args}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        shutil.rmtree(pod)
        return (done.stdout.strip().splitlines() or [""])[-1]


@dataclass
class Turned:
    """What a turn left: a store, git and keys."""

    store: Store
    environ: dict[str, str]
    origin: Path
    home: Path
    turn: str
    rollout: str
    pods: list[Path]


@pytest.fixture(scope="module")
def turned(rgw: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Turned]:
    """One turn, from the inbox to the last robot, each of its tasks in a pod."""
    root = tmp_path_factory.mktemp("cluster")
    store = rgw.connect(f"test-{uuid.uuid4().hex}")
    environ = {
        "FLYWHEEL_STORE": f"s3://{store.bucket}/{store.prefix}".rstrip("/"),
        "AWS_ENDPOINT_URL": rgw.endpoint,
        "AWS_ACCESS_KEY_ID": rgw.access_key,
        "AWS_SECRET_ACCESS_KEY": rgw.secret_key,
        "AWS_DEFAULT_REGION": rgw.region,
        **{n: v for n, v in os.environ.items() if n.startswith(("OMP_", "DVC_NO", "AWS_EC2_"))},
    }
    made = make_checkout(root / "made")
    script = made / "stage.py"  # a trace looks for what real curation says of its dataset
    said = '{"taken": len(found)}'
    script.write_text(script.read_text().replace(said, said[:-1] + ', "dataset_sha256": "d" * 64}'))
    git(made, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-am", "two")
    origin = root / "origin.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(made), str(origin)], check=True)
    home = root / "home"
    fail_on_a_robot(store, root, 1, 2)
    fleet = ReportingFleet(store, home / "keys", made / "models/base/bundle", approver="ops")
    shutil.rmtree(made)
    cluster = Cluster(root, origin, home / "keys", environ)
    turn = cluster.run("open")
    for stage in STAGES[: len(COLLECTED)]:
        cluster.run("stage", turn, stage)
    assert cluster.run("begin", turn) == "True"
    for stage in STAGES[len(COLLECTED) :]:
        cluster.run("stage", turn, stage)
    assert cluster.run("register", turn) == turn
    rollout = cluster.run("start", turn)
    publisher = Publisher(store, home / "keys")
    for _ in range(40):
        fleet.report()
        if look(store, publisher, rollout).state.stage is RolloutStage.DONE:
            break
    else:
        pytest.fail("the rollout did not end")
    yield Turned(store, environ, origin, home, turn, rollout, cluster.pods)
    for info in list(store.list()):
        store.delete(info.key)


@pytest.mark.soak
def test_a_turn_whose_every_task_had_a_machine_of_its_own_is_whole(turned: Turned) -> None:
    result = result_of(turned.turn, turned.store)
    assert result.promotes
    assert result.stages == STAGES
    assert len(turned.pods) == len(STAGES) + 4
    assert not any(pod.exists() for pod in turned.pods)
    listed = git(turned.origin, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines()
    assert [line.split()[0] for line in listed] == [result.experiment]
    assert listed[0].endswith(f"/{turned.turn}")
    # What later tasks and people read names no file of a machine that is gone.
    for info in turned.store.list("runs/"):
        data = turned.store.get(info.key)
        assert not [p.name for p in turned.pods if p.name.encode() in data], info.key
    chain = trace(turned.store, Publisher(turned.store, turned.home / "keys"), result.candidate_digest)
    assert chain.ok, [x for x in chain.links if not x.ok]


BACKUP = """
import sys
from pathlib import Path
from flywheel import backup
from flywheel.config import Deployment
from flywheel.store import Store
backup.make(Path(sys.argv[1]), Store.from_env(), Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.soak
def test_restored_elsewhere_after_a_back_up_that_was_killed_half_way_the_evidence_is_sound(
    turned: Turned, rgw: EmbeddedStore, tmp_path: Path
) -> None:
    directory = tmp_path / "backups"
    command = [sys.executable, "-c", BACKUP, str(directory), str(turned.home), str(turned.origin)]
    child = subprocess.Popen(command, env={**os.environ, **turned.environ})
    journal = directory / "unfinished.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 20):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(ConfigError, match="one broke off"):
        backup.check(directory)
    before = journal.read_bytes().count(b"\n")
    made = backup.make(directory, turned.store, turned.home, turned.origin)
    everything = sorted(i.key for i in turned.store.list())
    assert made.objects == len(everything)
    assert made.copied <= made.objects - before
    assert (made.damaged, made.left_out) == ((), ())

    other = rgw.connect(f"test-{uuid.uuid4().hex}")
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    subprocess.run(["git", "init", "--quiet", str(checkout)], check=True)
    done = backup.restore(directory, other, home, checkout)
    assert sorted(i.key for i in other.list()) == everything
    assert (done.objects, done.different) == (made.objects, [])
    assert done.experiments == 2  # the turn and the branch
    result = result_of(turned.turn, other)
    publisher = Publisher(other, home / "keys")
    chain = trace(other, publisher, result.candidate_digest)
    assert chain.ok, [x for x in chain.links if not x.ok]
    assert {x.what for x in chain.links} >= {
        "episode",
        "dataset",
        "bundle",
        "gate report",
        "rollout",
        "robot",
    }
    assert git(checkout, "cat-file", "-t", result.experiment) == "commit"
    for found in episode.ls(other):
        assert found.manifest is not None
        pulled = episode.pull(other, found.prefix, tmp_path / "episodes")
        assert episode.verify(pulled) == []
    again = backup.restore(directory, other, home, checkout, into_existing=True)
    assert (again.objects, again.experiments, again.different) == (0, 0, [])
    for info in list(other.list()):
        other.delete(info.key)
    with pytest.raises(NotFound):
        other.get(f"runs/{turned.turn}/result.json")


def test_an_object_of_several_parts_comes_back_as_it_was(
    rgw: EmbeddedStore, store: Store, tmp_path: Path
) -> None:
    """Its ETag is no hash of it, and it went up in parts: neither way needs it in memory."""
    large = tmp_path / "large"
    with large.open("wb") as f:
        for n in range(70):
            f.write(bytes([n]) * (1 << 20))
    sha = sha256_file(large)
    store.put_file("runs/t/checkpoint/weights", large, sha)
    backup.make(tmp_path / "b", store, tmp_path / "home", None)
    other = rgw.connect(f"test-{uuid.uuid4().hex}")
    backup.restore(tmp_path / "b", other, tmp_path / "home2", None)
    other.get_file("runs/t/checkpoint/weights", tmp_path / "back", sha)
    assert sha256_file(tmp_path / "back") == sha
    for s in (store, other):
        s.delete("runs/t/checkpoint/weights")
