"""The runtime as real processes in real time: whatever dies, the arm comes to rest and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flywheel.edge import realtime
from flywheel.edge.processes import Plan
from flywheel.edge.runtime import Wall, read_bundle
from flywheel.edge.safety import ACCELERATION, JERK, LOWER, UPPER, VELOCITY
from flywheel.edge.tick import HEARTBEAT_LIMIT_NS
from flywheel.errors import BundleError, ConfigError
from flywheel.schema import Mode
from tests.robots import BUNDLE, limits, write_bundle, write_limits

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
MARK = uuid.uuid4().hex


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    directory = tmp_path_factory.mktemp("wall")
    cpu, others = realtime.cores()
    return Plan(
        robot="tests.robots:wall_robot",
        perception="tests.robots:wall_perception",
        joints=2,
        cameras={"eye": (16, 16)},
        limits=str(write_limits(directory / "limits.yaml")),
        bundle_dir=str(write_bundle(directory / "bundle")),
        bundle=BUNDLE,
        instruction="move left",
        cpu=cpu,
        others=tuple(sorted(others)),
    )


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process of ours outlives a test."""
    monkeypatch.setenv("TEST_RUNTIME_WALL", MARK)
    yield
    wait_until(lambda: not ours(), 5.0)


def ours() -> list[int]:
    """Processes of the runtime that these tests started, orphans included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                if f"TEST_RUNTIME_WALL={MARK}".encode() in environment and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def modes(wall: Wall) -> list[bytes]:
    return [e["name"] for e in wall.rings.events.reader().poll().rows if e["kind"] == b"mode"]


def check_references(wall: Wall) -> None:
    """The references of every tick kept every limit (rows are float32, so differences are over 10 ms)."""
    t = limits().table()
    rows = wall.shared.control.reader().poll().rows
    q = rows["q_ref"].astype(np.float64)
    step = 10
    v = (q[step:] - q[:-step]) / (step * 1e-3)
    a = (v[step:] - v[:-step]) / (step * 1e-3)
    j = (a[step:] - a[:-step]) / (step * 1e-3)
    assert ((q >= t[LOWER]) & (q <= t[UPPER])).all()
    assert (np.abs(v) <= t[VELOCITY] * 1.001).all()
    assert (np.abs(a) <= t[ACCELERATION] * 1.01).all()
    assert (np.abs(j) <= t[JERK] * 1.05).all()
    assert np.isfinite(rows["tau"]).all()


def test_kill_9_of_system_2_walks_down_the_ladder_to_a_hold(plan: Plan) -> None:
    with Wall(plan, restart=False) as wall:
        result = wall.run(20.0, until=lambda: wall.result().modes.get("follow", 0) > 1000)
        assert result.digest == digest_of(plan)
        assert result.limits_sha256 == limits_sha(plan)
        assert result.infer.n > 0
        assert result.late.n == result.ticks
        assert result.tracking_max_rad < 0.05
        assert set(result.privileges) == {"fifo", "locked", "awake", "pinned", "frozen", "reasons"}
        assert bool(result.privileges["reasons"]) != all(
            result.privileges[k] for k in ("fifo", "locked") if plan.priority
        )
        for pid in (wall.system1_pid, wall.system2_pid):  # shared memory without a name cannot be left behind
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "/memfd:flywheel-edge (deleted)" in maps
            assert "/dev/shm/" not in maps
        os.kill(wall.system2_pid, signal.SIGKILL)
        wall.run(20.0, until=lambda: b"fallback" in modes(wall))
        assert modes(wall) == [b"follow", b"carry_on", b"ramp", b"hold", b"fallback"]
        last = wall.shared.control.reader().poll().rows[-1]
        assert last["mode"] == Mode.FALLBACK
        assert np.abs(last["dq"]).max() < 1e-3
        check_references(wall)
        ended = [e for e in wall.rings.events.reader().poll().rows if e["name"] == b"system2_ended"]
        assert len(ended) == 1
        assert wall.result().restarts == 0
        pids = (wall.system1_pid, wall.system2_pid)
    assert not any(Path(f"/proc/{p}").exists() for p in pids)


def digest_of(plan: Plan) -> str:
    from flywheel.schema import bundle_digest

    return bundle_digest(Path(plan.bundle_dir))


def limits_sha(plan: Plan) -> str:
    from flywheel.edge.safety import SafetyLimits

    return SafetyLimits.load(plan.limits).sha256


def test_system_2_is_started_again_and_goes_on_counting(plan: Plan) -> None:
    with Wall(plan) as wall:
        wall.run(20.0, until=lambda: wall.result().modes.get("follow", 0) > 300)
        before = wall.shared.control.reader().poll().rows["chunk_id"].max()
        first = wall.system2_pid
        os.kill(first, signal.SIGKILL)

        def again() -> bool:
            row = wall.shared.control.reader().poll().rows[-1]
            return bool(row["chunk_id"] > before and row["mode"] == Mode.FOLLOW)

        wall.run(40.0, until=again)
        assert wall.restarts == 1
        assert wall.system2_pid != first
        rows = wall.shared.control.reader().poll().rows
        assert (np.diff(rows["chunk_id"]) >= 0).all()
        check_references(wall)


SUPERVISOR = """
import sys
from flywheel.edge.processes import Plan
from flywheel.edge.runtime import Wall
with Wall(Plan.model_validate_json(sys.stdin.read())) as wall:
    print(wall.system1_pid, wall.system2_pid, flush=True)
    wall.run(60.0)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_supervisor_that_ends_takes_everything_with_it(plan: Plan, how: signal.Signals) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    supervisor.stdin.write(plan.to_bytes())
    supervisor.stdin.close()
    pids = [int(p) for p in supervisor.stdout.readline().split()]
    assert len(pids) == 2
    supervisor.send_signal(how)
    supervisor.wait(10.0)
    supervisor.stdout.close()
    patience = HEARTBEAT_LIMIT_NS * 1e-9 + 10.0 if how == signal.SIGKILL else 1.0
    wait_until(lambda: not any(Path(f"/proc/{p}").exists() for p in pids), patience)


def test_a_stalled_supervisor_brings_the_arm_to_rest_but_does_not_end_it(plan: Plan) -> None:
    with Wall(plan) as wall:
        wall.run(20.0, until=lambda: wall.result().modes.get("follow", 0) > 300)
        rows = wall.shared.control.reader(from_start=False)
        time.sleep(HEARTBEAT_LIMIT_NS * 1e-9 + 1.0)  # this is the stall
        stalled = rows.poll().rows
        assert stalled["mode"][-1] in (Mode.HOLD, Mode.FALLBACK)
        assert np.abs(stalled["dq"][-1]).max() < 1e-3
        wall.run(20.0, until=lambda: modes(wall)[-1] == b"follow")
        check_references(wall)


def test_a_policy_that_cannot_be_loaded_is_said_so_and_leaves_nothing(plan: Plan, tmp_path: Path) -> None:
    broken = write_bundle(tmp_path / "broken")
    (broken / "policy.onnx").write_bytes(b"no graph")
    with pytest.raises(ConfigError, match=r"system2: .*policy\.onnx: ONNX Runtime cannot load it"):
        Wall(plan.model_copy(update={"bundle_dir": str(broken)})).__enter__()
    with pytest.raises(BundleError, match=r"none/policy\.json: No such file"):
        read_bundle(tmp_path / "none")


def test_two_different_limits_files_are_noticed(plan: Plan, tmp_path: Path) -> None:
    other = write_limits(tmp_path / "other.yaml")
    other.write_text(other.read_text() + "# looser\n")
    with pytest.raises(ConfigError, match="limits"):
        Wall(plan.model_copy(update={"limits": str(other)})).__enter__()
