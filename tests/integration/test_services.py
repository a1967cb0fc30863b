"""The embedded services: started, found healthy, killed, left alone, stopped; and nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from flywheel import services
from flywheel.approvals import SETTLE_S
from flywheel.config import Deployment
from flywheel.doctor import Health, examine
from flywheel.errors import ServiceError
from flywheel.label import Aspect, Question, Questions, answers
from flywheel.label.answers import Evidence, Said
from flywheel.services import process
from flywheel.services.airflow import WORKER, Airflow
from flywheel.services.ceph import Ceph
from flywheel.services.keeper import Keeper
from flywheel.store import EMBEDDED_FILE, Store, embedded_store

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def quiet(_: str) -> None:
    pass


def left_behind(home: Path) -> list[int]:
    """Every process that mentions the state directory in its environment or command line, but this one."""
    found = []
    for p in Path("/proc").iterdir():
        if not p.name.isdigit() or int(p.name) == os.getpid():
            continue
        try:
            text = (p / "environ").read_bytes() + (p / "cmdline").read_bytes()
        except OSError:
            continue
        if str(home).encode() in text:
            found.append(int(p.name))
    return found


def wait_until(true: Callable[[], object], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One state directory for the module; nothing may run on it afterwards."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FLYWHEEL_STORE"):
            patch.delenv(name, raising=False)
        yield home
    services.down(home)
    assert left_behind(home) == []


@pytest.fixture
def store_of(home: Path) -> Callable[[], Store]:
    """The store of ``home``, looked up anew at each call."""
    return lambda: Store.from_env(Deployment.from_env({"FLYWHEEL_HOME": str(home)}))


def test_first_start_that_was_interrupted_is_begun_again(home: Path, store_of: Callable[[], Store]) -> None:
    half = home / "ceph"
    half.mkdir()
    (half / "unfinished").touch()
    (half / "keyring").write_text("half a key")
    Ceph(home).up(quiet)
    store_of().put("kept", b"acknowledged")
    assert not (half / "unfinished").exists()


def test_keys_are_random_and_private(home: Path) -> None:
    saved = embedded_store(home)
    assert saved is not None
    assert len(saved.secret_key) >= 32
    for path in (home / EMBEDDED_FILE, home / "ceph" / "keys.json", home / "ceph" / "keyring"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for p in process.marked(Ceph(home).mark):
        command = Path(f"/proc/{p.pid}/cmdline").read_bytes().decode()
        assert saved.secret_key not in command
    for log in (home / "logs").rglob("*.log"):
        assert saved.secret_key not in log.read_text(errors="replace"), log


def test_second_start_changes_nothing(home: Path) -> None:
    before = {p.pid for p in process.marked(Ceph(home).mark)}
    again = services.up(home, with_airflow=False)
    assert again.started == ()
    assert {p.pid for p in process.marked(Ceph(home).mark)} == before
    saved = embedded_store(home)
    assert saved is not None
    assert saved.secret_key not in repr(again)


def test_store_killed_in_the_middle_comes_back_by_itself_with_all_that_was_acknowledged(
    home: Path, store_of: Callable[[], Store]
) -> None:
    store = store_of()
    for n in range(50):
        store.put(f"crash/{n}", b"%d" % n)
    killed = set(process.marked(Ceph(home).mark))
    for p in killed:
        os.kill(p.pid, signal.SIGKILL)
    assert wait_until(lambda: Ceph(home).is_up() and not killed & set(process.marked(Ceph(home).mark)), 120)
    services.up(home, with_airflow=False)  # waits for whoever starts something
    store = store_of()
    assert [store.get(f"crash/{n}") for n in range(50)] == [b"%d" % n for n in range(50)]
    assert store.get("kept") == b"acknowledged"


def test_ports_that_somebody_took_meanwhile_are_replaced(home: Path, store_of: Callable[[], Store]) -> None:
    services.down(home)
    old = json.loads((home / "ceph" / "ports.json").read_text())
    with socket.socket() as gateway, socket.socket() as monitor:
        for taken, use in ((gateway, "rgw"), (monitor, "mon_v2")):
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", old[use]))
            taken.listen()
        services.up(home, with_airflow=False)
    new = json.loads((home / "ceph" / "ports.json").read_text())
    assert new["rgw"] != old["rgw"]
    assert new["mon_v2"] != old["mon_v2"]
    assert store_of().get("kept") == b"acknowledged"


def test_pid_that_now_belongs_to_somebody_else_is_left_alone(home: Path, tmp_path: Path) -> None:
    real = (home / "ceph" / "run" / "radosgw.json").read_text()
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "radosgw.json").write_text(json.dumps({**json.loads(real), "pid": bystander.pid}))
    try:
        assert process.running(tmp_path, "radosgw") is None
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n", timeout=10)
    assert bystander.returncode == 0
    (tmp_path / "radosgw.json").write_text(real)
    assert process.running(tmp_path, "radosgw") is not None


def test_airflow_starts_beside_a_running_store_and_answers_those_who_may_ask(home: Path) -> None:
    steps: list[tuple[str, str]] = []
    found = services.up(home, on_progress=lambda s, m: steps.append((s, m)))
    assert found.started == (services.AIRFLOW,)
    assert ("airflow", "ready") in steps
    airflow = Airflow(home)
    assert airflow.health() == dict.fromkeys(
        ("metadatabase", "scheduler", "triggerer", "dag_processor"), True
    )
    assert airflow.call("GET", "/dags")["total_entries"] >= 0
    with pytest.raises(ServiceError, match="403"):
        airflow.call("POST", "/variables", {"key": "k", "value": "v"}, user="viewer")
    with pytest.raises(urllib.error.HTTPError, match="401") as e:
        urllib.request.urlopen(f"{found.airflow_url}/api/v2/dags")
    e.value.close()
    password = found.airflow_password
    assert password is not None
    assert password not in repr(found)
    for path in ("airflow.cfg", "passwords.json"):
        assert stat.S_IMODE((home / "airflow" / path).stat().st_mode) == 0o600


def test_services_listen_on_this_machine_only(home: Path) -> None:
    """Every TCP socket that our processes listen on is bound to 127.0.0.1."""
    inodes = set()
    for mark in (Ceph(home).mark, Airflow(home).mark):
        for p in process.marked(mark):
            for fd in Path(f"/proc/{p.pid}/fd").iterdir():
                try:
                    inodes.add(os.readlink(fd))
                except OSError:  # closed meanwhile
                    continue
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and f"socket:[{cells[9]}]" in inodes:
                listening.append(cells[1].split(":")[0])
    assert len(listening) >= 4
    assert set(listening) == {"0100007F"}


def test_store_credentials_reach_the_tasks_environment(home: Path) -> None:
    saved = embedded_store(home)
    assert saved is not None
    scheduler = process.running(home / "airflow" / "run", "scheduler")
    assert scheduler is not None
    environ = Path(f"/proc/{scheduler.pid}/environ").read_bytes().split(b"\0")
    assert f"AWS_SECRET_ACCESS_KEY={saved.secret_key}".encode() in environ
    assert f"FLYWHEEL_HOME={home}".encode() in environ


def test_what_a_person_fills_in_in_airflow_is_kept_with_who_and_when(
    home: Path, store_of: Callable[[], Store]
) -> None:
    episode = "0190b0b0-0000-7000-8000-000000000001"
    question = Question(
        episode_id=episode,
        site="lab",
        robot="r1",
        prefix=f"episodes/site=lab/robot=r1/date=2026-01-01/{episode}/",
        task="pick",
        why="unsure",
        worth=1.0,
        cluster="timeout",
        cluster_size=1,
        labels={Aspect.CAUSE: Said(word="latency", confidence=0.4)},
        cause_why="",
        evidence=Evidence(votes={}, features={}),
    )
    answers.ask(store_of(), "turn-asks", Questions(budget=10, unsure=1, questions=(question,)))
    airflow = Airflow(home)
    run = "/dags/questions/dagRuns/by-hand"

    def there() -> bool:
        with contextlib.suppress(ServiceError):
            airflow.call("GET", "/dags/questions")
            return True
        return False

    assert wait_until(there, 60)
    airflow.call("POST", "/dags/questions/dagRuns", {"dag_run_id": "by-hand", "logical_date": None})

    def state(task: str) -> str:
        return str(airflow.call("GET", f"{run}/taskInstances/{task}")["state"])

    assert wait_until(lambda: state("form") == "awaiting_input", 120), state("gather")
    form = f"{run}/taskInstances/form/-1/hitlDetails"
    shown = airflow.call("GET", form)
    assert f"/fleet/plot?at={quote(question.prefix, safe='')}" in shown["body"]
    given = {k: v["value"] if isinstance(v, dict) else v for k, v in shown["params"].items()}
    wait_until(lambda: False, SETTLE_S)  # as long as a person needs to read: see approvals.SETTLE_S
    given["cause_01"] = "hardware"
    airflow.call("PATCH", form, {"chosen_options": ["OK"], "params_input": given}, user="ops")
    assert wait_until(lambda: state("keep") == "success", 120), state("form")
    (said,) = answers.collect(store_of()).answers
    assert (said.episode_id, said.by, said.words) == (episode, "ops", {Aspect.CAUSE: "hardware"})


def test_a_killed_scheduler_is_started_again_and_its_workers_do_not_stay(home: Path) -> None:
    """Its idle workers would wait for ever: nobody tells them that it is dead."""
    airflow = Airflow(home)
    killed = process.running(airflow.run, "scheduler")
    assert killed is not None

    def workers() -> list[process.Process]:
        return [p for p in process.marked(airflow.mark) if process.title_of(p).startswith(WORKER)]

    orphans = workers()
    assert orphans
    os.kill(killed.pid, signal.SIGKILL)
    assert wait_until(lambda: process.running(airflow.run, "scheduler") not in (None, killed), 30)
    assert wait_until(lambda: not any(process.alive(p) for p in orphans), 30)
    new = process.running(airflow.run, "scheduler")
    assert new is not None
    assert wait_until(lambda: workers() and {process.parent_of(p) for p in workers()} == {new.pid}, 60)
    assert [r.name for r in Keeper(home).restarts(0.0)][-1] == "scheduler"


def test_a_killed_keeper_is_told_and_the_next_up_starts_it(home: Path) -> None:
    deployment = Deployment.from_env({"FLYWHEEL_HOME": str(home)})
    keeper = process.running(home / "keeper", "keeper")
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)
    assert wait_until(lambda: not services.status(home)[services.KEEPER][services.KEEPER], 10)
    (found,) = [f for f in examine(deployment) if f.name == "keeper"]
    assert found.health is Health.WARNING
    assert "nothing starts again what dies of airflow, store; `flywheel up`" in found.what
    assert services.up(home).started == ()
    assert services.status(home)[services.KEEPER][services.KEEPER]


def test_down_stops_all_of_it_orphans_too_and_twice_is_no_error(home: Path) -> None:
    """A task's grandchild whose parents are gone still carries the mark, and ends."""
    orphan = subprocess.run(
        ["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!"],
        env={**os.environ, process.MARK: Airflow(home).mark},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(orphan.stdout) in left_behind(home)
    services.down(home)
    services.down(home)
    assert not any(up for parts in services.status(home).values() for up in parts.values())
    assert left_behind(home) == []
    assert not (home / EMBEDDED_FILE).exists()


STARTER = """
import multiprocessing, sys, time
from pathlib import Path
from flywheel import services
home = Path(sys.argv[1])
with services.session(home, with_airflow=False) as found:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_services_end_with_their_starter_however_it_ends(home: Path, number: signal.Signals) -> None:
    """Even if a forked child of it still holds every pipe open."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(home)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        assert all(services.status(home)[services.STORE].values())
        os.kill(starter.pid, number)
        starter.wait(30)
        assert wait_until(lambda: not any(services.status(home)[services.STORE].values()), 30)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert wait_until(lambda: left_behind(home) == [], 10)


def test_interrupt_while_starting_leaves_nothing_running(home: Path) -> None:
    def interrupt(_service: str, step: str) -> None:
        if step == "starting the gateway":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        services.up(home, on_progress=interrupt)
    assert left_behind(home) == []


def test_missing_programs_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceError, match="apt-get install --no-install-recommends ceph-mon"):
        Ceph(tmp_path).up(quiet)


def test_daemon_that_dies_at_once_shows_the_end_of_its_log(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "radosgw"
    bad.write_text("#!/bin/sh\necho 'no luck today' >&2\nexit 3\n")
    bad.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ServiceError, match=r"radosgw ended: .*no luck today"):
        services.up(home, with_airflow=False)
    assert left_behind(home) == []
