"""The supervisor with real processes: what it replaces, gives back, takes over, and tells.

Only facts are asserted, never how long something took.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flywheel.edge.children import ProcessRecord, started_at
from flywheel.edge.delivery import Delivery, boot
from flywheel.edge.faults import rig
from flywheel.edge.faults.scene import rig_plan
from flywheel.edge.handover import acknowledge, read_record
from flywheel.edge.processes import Plan
from flywheel.edge.runtime import Wall, bundle_ref
from flywheel.edge.safety import ACCELERATION, CATEGORY_0, JERK, VELOCITY, SafetyLimits
from flywheel.edge.service import serve
from flywheel.edge.supervision import SupervisionSettings
from flywheel.edge.tick import COMMAND
from flywheel.edge.updater import Poll, Updater
from flywheel.episode import read_manifest
from flywheel.errors import BundleError, ConfigError
from flywheel.release import Publisher
from flywheel.schema import Mode, RobotReport
from tests.bucket import BucketStore
from tests.deliveries import stable
from tests.integration.test_runtime_wall import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
MARK = uuid.uuid4().hex
QUICK = SupervisionSettings(
    trial_s=3.0, backoff_first_s=0.1, settled_s=1.0, latency_budget_ms=60_000.0, aside_beat_s=60.0
)


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process of ours outlives a test."""
    monkeypatch.setenv("TEST_SUPERVISOR_WALL", MARK)
    yield
    wait_until(lambda: not ours(), 10.0)


def ours() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"TEST_SUPERVISOR_WALL={MARK}".encode() in environment and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    rig.write_circle(root / "circle")
    rig.write_circle(root / "other", "other")
    rig.write_nan(root / "nan")
    rig.write_crash(root / "crash")
    return root


@pytest.fixture
def plan(tmp_path: Path, bundles: Path) -> Plan:
    """The rig in motion, without a recorder."""
    p = rig_plan(tmp_path, bundles / "circle")
    return p.model_copy(update={"recording": None, "supervision": QUICK, "orphan_s": 0.0})


def events(wall: Wall) -> dict[str, dict[str, Any]]:
    """The last event of each name."""
    rows = wall.rings.events.reader().poll().rows
    return {row["name"].decode(): json.loads(row["detail"]) for row in rows}


def ended(wall: Wall) -> int:
    """How many swaps have come to an end that was not their success."""
    names = wall.rings.events.reader().poll().rows["name"]
    return int(np.isin(names, [b"fell_back", b"refused"]).sum())


def follow(wall: Wall, ticks: int = 300) -> None:
    before = wall.result().modes.get("follow", 0)
    wall.run(60.0, until=lambda: wall.result().modes.get("follow", 0) > before + ticks)
    assert wall.result().modes.get("follow", 0) > before + ticks


def check_reference(wall: Wall) -> None:
    """Every tick's reference kept every limit, in full precision, and no stop was needed."""
    assert wall.shared.trace is not None
    ref = wall.shared.trace.reader().poll().rows["ref"]
    table = SafetyLimits.load(wall.plan.limits).table()
    assert (np.abs(ref[:, 1]) <= table[VELOCITY]).all()
    assert (np.abs(ref[:, 2]) <= table[ACCELERATION]).all()
    assert (np.abs(np.diff(ref[:, 2], axis=0)) <= table[JERK] * 1e-3 * (1 + 1e-9)).all()
    assert max(Mode[m.upper()] for m in wall.result().modes) < Mode.STOP_1


def test_a_swap_in_mid_motion_takes_over_and_is_confirmed(plan: Plan, bundles: Path) -> None:
    heard: list[tuple[str, str, str]] = []
    with Wall(plan, told=lambda *said: heard.append(said)) as wall:
        follow(wall)
        first, before = wall.system2_pid, wall.result().digest
        other = bundle_ref(bundles / "other")
        done = wall.policies.swap(other)
        wall.run(60.0, until=lambda: "confirmed" in events(wall))
        assert done.result(0) == other.digest == wall.result().digest != before
        assert wall.system2_pid != first
        assert wall.status()["previous"] == before
        assert not wall.status()["trial"]
        assert [what for what, *_ in heard] == ["acting", "confirmed"]
        rows = wall.shared.control.reader().poll().rows
        assert (np.diff(rows["chunk_id"]) >= 0).all()  # one writer at a time, and it goes on counting
        frames = wall.shared.frames.reader().poll().rows
        digests = [d.decode() for d in frames["policy_digest"]]
        assert digests == sorted(digests, key=[before, other.digest].index)  # never the old one after the new
        assert not Path(f"/proc/{first}").exists()
        check_reference(wall)


@pytest.mark.parametrize("how", ["nan", "crash"])
def test_a_policy_that_fails_in_use_is_given_back_for_the_previous_one(
    plan: Plan, bundles: Path, how: str
) -> None:
    bad = bundle_ref(bundles / how)
    with Wall(plan) as wall:
        follow(wall)
        good, pid = wall.result().digest, wall.system2_pid
        for _ in range(5):  # refused at its self-test, should the arm be where it fails: it never acted then
            before = ended(wall)
            wall.policies.swap(bad)
            wall.run(60.0, until=lambda: ended(wall) > before)  # noqa: B023  used before the next turn
            if "fell_back" in events(wall):
                break
        fell = events(wall)["fell_back"]
        assert (fell["from"], fell["to"]) == (bad.digest, good)
        assert wall.system2_pid == pid  # the previous one stood by, loaded
        assert wall.status()["refused"] == bad.digest
        assert wall.status()["refused_reason"] == fell["why"] != ""
        follow(wall)
        assert wall.result().digest == good
        check_reference(wall)


def test_bytes_that_were_not_verified_never_act(plan: Plan, bundles: Path) -> None:
    forged = bundle_ref(bundles / "other").model_copy(update={"digest": "0" * 64})
    with Wall(plan) as wall:
        follow(wall)
        before = wall.result().digest
        done = wall.policies.swap(forged)
        wall.run(60.0, until=done.done)
        with pytest.raises(BundleError, match="wanted 000"):
            done.result(0)
        wall.run(0.3)
        assert wall.result().digest == before
        assert {d.decode() for d in wall.shared.frames.reader().poll().rows["policy_digest"]} == {before}


def test_a_bundle_of_another_shape_is_refused_while_the_robot_runs(
    plan: Plan, bundles: Path, tmp_path: Path
) -> None:
    ref = bundle_ref(bundles / "other")
    longer = ref.model_copy(update={"bundle": ref.bundle.model_copy(update={"chunk": 32})})
    with Wall(plan) as wall:
        done = wall.policies.swap(longer)
        wall.run(10.0, until=done.done)
        with pytest.raises(BundleError, match=r"chunk of 32.*laid out for 16.*stop it and start it"):
            done.result(0)


def test_a_stopped_system_2_is_killed_and_replaced(plan: Plan) -> None:
    with Wall(plan) as wall:
        follow(wall)
        first = wall.system2_pid
        os.kill(first, signal.SIGSTOP)
        wall.run(60.0, until=lambda: wall.restarts > 0)
        assert "stood still" in events(wall)["system2_ended"]["why"]
        follow(wall)
        assert wall.system2_pid != first
        check_reference(wall)


def test_a_recorder_killed_in_mid_episode_loses_nothing_and_repeats_nothing(
    plan: Plan, bundles: Path, tmp_path: Path
) -> None:
    recording = rig_plan(tmp_path, bundles / "circle").recording
    assert recording is not None
    recording = recording.model_copy(update={"upload": False})
    with Wall(plan.model_copy(update={"recording": recording})) as wall:
        follow(wall)
        for kill in (False, True):
            before = len(sealed(tmp_path))
            (tmp_path / rig.INTERVENE).touch()
            wall.run(60.0, until=lambda: bool(intervening(wall)[-1]))
            (tmp_path / rig.INTERVENE).unlink()
            wall.run(60.0, until=lambda: not intervening(wall)[-1])
            if kill:
                os.kill(wall.pid("recorder"), signal.SIGKILL)
            run_until_sealed(wall, tmp_path, before + 1)
        assert wall.status()["restarts"]["recorder"] == 1
        wall.run(1.5)
    windows = sorted(read_manifest(p).window_ns for p in sealed(tmp_path))
    assert len(windows) == 2
    assert windows[0][1] <= windows[1][0]


def run_until_sealed(wall: Wall, root: Path, episodes: int) -> None:
    wall.run(120.0, until=lambda: len(sealed(root)) >= episodes)
    assert len(sealed(root)) == episodes


def sealed(root: Path) -> list[Path]:
    return [m.parent for m in (root / "spool" / "episodes").glob("[!.]*/manifest.json")]


def intervening(wall: Wall) -> list[bool]:
    return [bool(b) for b in wall.shared.frames.reader().poll().rows["intervention"]]


# ── signed releases ───────────────────────────────────────────────────────────────────────────────────


def test_a_signed_release_reaches_a_moving_robot_and_a_bad_one_is_given_back(
    plan: Plan, bundles: Path, tmp_path: Path
) -> None:
    store = BucketStore()
    publisher = Publisher(store, tmp_path / "keys")
    publisher.init()
    circle, other, crash = (bundles / n for n in ("circle", "other", "crash"))
    publisher.publish_first(circle)
    polls: list[Poll] = []
    with Updater(
        tmp_path / "policies", store, site="lab", robot="r1", bootstrap=publisher.keys.root
    ) as updater:
        ref = boot(updater)
        updater.confirm()
        assert ref.digest == bundle_ref(circle).digest
        delivery = Delivery(updater, poll_s=0.2, on_poll=polls.append)
        with delivery, Wall(plan.running(ref), told=delivery.heard, previous=delivery.previous) as wall:
            delivery.start(wall)
            follow(wall)
            publisher.publish(other, stable(other))
            wall.run(60.0, until=lambda: "confirmed" in events(wall))
            good = bundle_ref(other).digest
            assert wall.result().digest == good
            publisher.publish(crash, stable(crash))
            bad = bundle_ref(crash).digest
            wall.run(60.0, until=lambda: updater.slots.refusal(stable(crash)) is not None)
            follow(wall)
            assert wall.result().digest == good
            wall.run(5.0, until=lambda: polls[-1].digest == good)
            check_reference(wall)
        assert updater.slots.active is not None
        assert updater.slots.active.release.digest == good
        assert not updater.slots.state.trial
        assert bad != good
        report = RobotReport.model_validate_json(store.get("fleet/robots/r1.json"))
        assert report.loaded_digest == good
        assert report.refused_digest == bad
        assert report.refused_reason


# ── taking over ───────────────────────────────────────────────────────────────────────────────────────

SUPERVISOR = """
import sys
from pathlib import Path
from flywheel.edge.processes import Plan
from flywheel.edge.runtime import Wall
with Wall(Plan.model_validate_json(sys.stdin.read()), state=Path(sys.argv[1])) as wall:
    wall.run(60.0, until=lambda: wall.result().modes.get("follow", 0) > 300)
    print("moves", flush=True)
    wall.run(600.0)
"""


def killed_supervisor(plan: Plan, state: Path) -> None:
    """Leave a robot in motion whose supervisor was killed."""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(state)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    supervisor.stdin.write(plan.to_bytes())
    supervisor.stdin.close()
    assert supervisor.stdout.readline() == b"moves\n"
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()


def test_the_next_supervisor_takes_the_moving_robot_over(plan: Plan, tmp_path: Path) -> None:
    state = tmp_path / "state"
    plan = plan.model_copy(update={"orphan_s": 60.0})
    killed_supervisor(plan, state)
    left = read_record(state)
    assert left is not None
    with Wall(plan, state=state) as wall:
        assert wall.taken_over
        assert wall.system1_pid == left.system1.pid
        assert wall.system2_pid == left.system2[0].pid
        follow(wall)
        rows = wall.shared.control.reader().poll().rows
        assert (np.diff(rows["t_ns"]) > 0).all()  # one System 1, the same all along
        assert wall.result().digest == plan.bundle_digest
        assert wall.result().privileges  # told before the first supervisor died
        check_reference(wall)
        with pytest.raises(ConfigError, match="another supervisor works here"):
            Wall(plan, state=state)
    assert started_at(left.system1.pid) is None  # ended, if not yet reaped: it was not our child
    assert read_record(state) is None


def test_a_stop_that_a_person_acknowledged_ends_and_another_process_may_say_so(
    plan: Plan, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with pytest.raises(ConfigError, match="no supervisor works here"):
        acknowledge(state)
    with Wall(plan, state=state) as wall:
        follow(wall)
        wall.shared.commands[COMMAND] = CATEGORY_0
        wall.run(30.0, until=lambda: wall.figures.mode is Mode.STOP_0)
        wall.shared.commands[COMMAND] = 0
        wall.run(0.3)
        assert wall.figures.mode is Mode.STOP_0, "it started again by itself"
        flywheel = Path(sys.executable).parent / "flywheel"
        subprocess.run([flywheel, "edge", "reset", "--state", state], check=True)
        follow(wall)
        assert "reset" in events(wall)


def test_a_robot_under_another_plan_is_not_taken_over_and_no_second_one_started(
    plan: Plan, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    plan = plan.model_copy(update={"orphan_s": 60.0})
    killed_supervisor(plan, state)
    left = read_record(state)
    assert left is not None
    with pytest.raises(ConfigError, match=f"process {left.system1.pid} under another plan"):
        Wall(plan.model_copy(update={"policy_hz": 5.0}), state=state)
    wrong = left.model_copy(update={"nonce": left.nonce + 1})
    (state / "runtime.json").write_bytes(wrong.to_bytes())
    with pytest.raises(ConfigError, match="not this robot's memory"):
        Wall(plan, state=state)
    assert started_at(left.system1.pid) == left.system1.started  # neither touched nor ended
    (state / "runtime.json").write_bytes(left.to_bytes())
    with Wall(plan, state=state) as wall:
        assert wall.taken_over


def test_a_record_that_speaks_of_another_process_is_not_believed(plan: Plan, tmp_path: Path) -> None:
    state = tmp_path / "state"
    plan = plan.model_copy(update={"orphan_s": 60.0})
    killed_supervisor(plan, state)
    left = read_record(state)
    assert left is not None
    for p in (left.system1, *left.system2):
        os.kill(p.pid, signal.SIGKILL)
    wait_until(lambda: started_at(left.system1.pid) is None, 5.0)
    me = ProcessRecord(role="system1", place="system1", generation=0, pid=os.getpid(), started=1)
    (state / "runtime.json").write_bytes(left.model_copy(update={"system1": me}).to_bytes())
    with Wall(plan, state=state) as wall:
        assert not wall.taken_over
        assert wall.system1_pid not in (os.getpid(), left.system1.pid)


def test_a_robot_that_nobody_takes_over_ends_by_itself(plan: Plan, tmp_path: Path) -> None:
    killed_supervisor(plan.model_copy(update={"orphan_s": 0.5}), tmp_path / "state")
    wait_until(lambda: not ours(), 30.0)


# ── log, metrics, systemd ─────────────────────────────────────────────────────────────────────────────


def test_what_it_tells_the_log_prometheus_and_systemd(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket_path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(socket_path))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(socket_path))
        log = tmp_path / "log"

        def kill_system2(wall: Wall) -> None:
            follow(wall, 1000)
            os.kill(wall.system2_pid, signal.SIGKILL)
            wall.run(60.0, until=lambda: wall.restarts > 0)

        with log.open("w") as to:
            serve(plan, 2.0, metrics_port=0, log=to, on_start=kill_system2)
            lines = [json.loads(line) for line in log.read_text().splitlines()]
        messages = set()
        with suppress(BlockingIOError):
            while True:
                messages.add(systemd.recv(100))
    assert messages == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}
    said = {line["event"] for line in lines}
    assert {"started", "follow", "system2_ended"} <= said
    assert all({"timestamp", "level", "robot"} <= line.keys() for line in lines)


def test_metrics_are_served_on_loopback(plan: Plan) -> None:
    from flywheel.edge.metrics import Metrics

    with Metrics(0) as metrics, Wall(plan) as wall:
        follow(wall)
        metrics.update(wall)
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        values = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if not line.startswith("#")
        }
        counts = wall.figures.counts
        assert values["flywheel_ticks_total"] == counts["ticks"]
        assert values["flywheel_tick_lateness_seconds_count"] == counts["ticks"]
        assert values['flywheel_tick_compute_seconds_bucket{le="+Inf"}'] == counts["ticks"]
        assert values["flywheel_inference_seconds_count"] == wall.result().infer.n
        assert values['flywheel_restarts_total{process="system2"}'] == 0
        assert sum(v for k, v in values.items() if k.startswith("flywheel_mode{")) == 1
        assert f'digest="{plan.bundle_digest}"' in text
        with pytest.raises(ConfigError, match="metrics port"):
            Metrics(metrics.port)
