"""The catalogue in the real store: scans by Daft, real processes that are killed and that race."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest

from flywheel import catalogue, episode
from flywheel.catalogue import ingesting, ledger
from flywheel.catalogue.ledger import LOG, PARTS
from flywheel.errors import ConfigError, NotFound, StoreError, StoreUnavailable
from flywheel.schema import MANIFEST_FILE
from flywheel.store import Store
from tests.test_catalogue import manifest

pytestmark = pytest.mark.integration

INGEST = "import sys; from flywheel.catalogue import ingest; from flywheel.store import Store; "
INGEST += "print('up', flush=True); ingest(Store.from_env(), batch_rows=int(sys.argv[1]))"


def fill(store: Store, first: int, last: int) -> None:
    episodes = [manifest(n) for n in range(first, last)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda m: store.put(m.prefix + MANIFEST_FILE, m.to_bytes()), episodes))


def rows(store: Store) -> list[dict[str, Any]]:
    _, version = catalogue.newest(store)
    whole = pa.concat_tables([ledger.read_part(store, p) for p in version.parts]).sort_by("prefix")
    found: list[dict[str, Any]] = whole.to_pylist()
    assert len({r["prefix"] for r in found}) == len(found), "an episode is there twice"
    return found


def flywheel(*args: str) -> subprocess.CompletedProcess[str]:
    code = "from flywheel.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=280, check=False
    )


def start(batch: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", INGEST, str(batch)], stdout=subprocess.PIPE, text=True)


def test_the_catalogue_answers_as_the_manifests_do(store: Store) -> None:
    fill(store, 0, 30)
    store.put(manifest(7).prefix + MANIFEST_FILE, b"{")
    catalogue.ingest(store, batch_rows=11)
    listed = list(episode.ls(store))
    good = [e.manifest for e in listed if e.manifest is not None]

    def asked(where: str, **options: Any) -> list[str]:
        found: list[str] = catalogue.select(store, where, ["prefix"], **options)["prefix"].to_pylist()
        return found

    assert asked("outcome = 'timeout' and robot = 'r1'") == [
        m.prefix for m in good if m.outcome == "timeout" and m.robot == "r1"
    ]
    assert asked("list_contains(triggers, 'task_timeout') and seconds = 1 and seed >= 10") == [
        m.prefix for m in good if m.seed is not None and m.seed >= 10
    ]
    assert asked("refused is not null") == [e.prefix for e in listed if e.manifest is None]
    assert asked("refused is null", robot="r2", date="2025-10-09") == [
        m.prefix for m in good if m.robot == "r2" and m.date == "2025-10-09"
    ]
    assert asked("", limit=4) == [e.prefix for e in listed][:4]
    assert asked("outcome = 'none of them'") == []
    whole = catalogue.select(store)
    assert whole.schema == catalogue.COLUMNS
    assert whole.to_pylist() == rows(store)


def test_many_at_once_are_read_as_one_by_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Daft fetches what is many, the store's client what is few: the rows are the same, bad ones included."""
    fill(store, 0, 70)
    store.put(manifest(3).prefix + MANIFEST_FILE, b"{")
    store.put(manifest(4).prefix + MANIFEST_FILE, b"x" * (2 << 20))
    store._client.put_object(
        Bucket=store.bucket,
        Key=f"{store.prefix}{manifest(5).prefix}{MANIFEST_FILE}",
        Body=manifest(5).to_bytes(),
        Metadata={"sha256": "0" * 64},
    )
    assert catalogue.ingest(store).refused == 2
    together = rows(store)
    asked = []
    monkeypatch.setattr(ingesting, "FEW", 1000)
    monkeypatch.setattr(ingesting, "download", lambda *a: asked.append(a))
    catalogue.ingest(store, rebuild=True)
    assert rows(store) == together
    assert not asked
    assert len(together) == 70


def test_a_condition_that_makes_no_sense_says_why_and_names_the_types(store: Store) -> None:
    fill(store, 0, 2)
    catalogue.ingest(store)
    for where in (
        "gaps = 'none'",
        "outcome",
        "outcome = 'a' and",
        "gaps + 1",
        "length() = 1",
        "gaps -> 1 = 2",
    ):
        with pytest.raises(ConfigError, match="--where"):
            catalogue.select(store, where)
    with pytest.raises(ConfigError, match="gaps int64"):
        catalogue.select(store, "gaps = 'none'")


def test_an_ingest_killed_again_and_again_ends_with_every_episode_once(
    store: Store, store_env: dict[str, str]
) -> None:
    fill(store, 0, 60)
    for kills in range(2):
        child = start(batch=8)
        assert child.stdout is not None
        child.stdout.readline()
        versions = len(list(store.list(f"{LOG}/")))
        deadline = time.monotonic() + 60
        # Dies at a version of its own, or at a part that no version names yet.
        while child.poll() is None and time.monotonic() < deadline:
            if len(list(store.list(PARTS if kills % 2 else f"{LOG}/"))) > versions:
                break
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    catalogue.ingest(store)
    before = rows(store)
    assert len(before) == 60
    catalogue.ingest(store, rebuild=True)
    assert rows(store) == before


def test_processes_that_ingest_at_once_lose_and_double_nothing(
    store: Store, store_env: dict[str, str]
) -> None:
    fill(store, 0, 40)
    children = [start(batch) for batch in (5, 7, 9)]
    for child in children:
        assert child.wait(120) == 0
        assert child.stdout is not None
        child.stdout.close()
    assert len(rows(store)) == 40
    assert catalogue.ingest(store).read == 0


def test_the_command_line_ingests_and_asks(store: Store, store_env: dict[str, str]) -> None:
    fill(store, 0, 12)
    none = flywheel("episodes", "ls", "--where", "gaps = 0")
    assert none.returncode == 1
    assert "flywheel episodes ingest" in none.stderr
    done = flywheel("episodes", "ingest", "--json")
    assert json.loads(done.stdout)["read"] == 12, done.stderr
    asked = flywheel("episodes", "ls", "--where", "outcome = 'timeout'", "--robot", "r1", "--json")
    plain = flywheel("episodes", "ls", "--robot", "r1", "--site", "lab", "--json")
    assert json.loads(asked.stdout), asked.stderr
    assert json.loads(asked.stdout) == [e for e in json.loads(plain.stdout) if e["outcome"] == "timeout"]
    wrong = flywheel("episodes", "ls", "--where", "outcom = 'timeout'")
    assert wrong.returncode == 1
    assert "did you mean 'outcome'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_no_catalogue_and_no_store_are_said_to_be_so(store: Store, free_endpoint: str) -> None:
    with pytest.raises(NotFound, match="flywheel episodes ingest"):
        catalogue.select(store, "gaps = 0")
    down = Store("s3://flywheel", free_endpoint, access_key="a", secret_key="b", attempts=1)
    for ask in (lambda: catalogue.select(down, "gaps = 0"), lambda: catalogue.ingest(down)):
        with pytest.raises(StoreUnavailable, match=free_endpoint):
            ask()


@pytest.mark.parametrize("damage", ["missing", "flipped", "empty"])
def test_a_query_of_damaged_parts_names_the_remedy_and_an_ingest_mends_it(store: Store, damage: str) -> None:
    fill(store, 0, 9)
    catalogue.ingest(store)
    before = rows(store)
    part = catalogue.newest(store)[1].parts[0]
    if damage == "missing":
        store.delete(part.key)
    else:
        data = bytearray(store.get(part.key))
        data[-30:] = b"\xff" * 30
        store.put(part.key, bytes(data) if damage == "flipped" else b"")
    with pytest.raises(StoreError, match="flywheel episodes ingest"):
        catalogue.select(store, "gaps = 0")
    catalogue.ingest(store)
    assert rows(store) == before
    assert catalogue.select(store, "gaps = 0").num_rows == 9


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_ray_cluster_reads_the_same_catalogue_and_gives_the_same_answers(
    store: Store, store_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where flywheel[ray] is installed. In processes of their own: Daft runs here or there, never both."""
    pytest.importorskip("ray")
    fill(store, 0, 80)
    catalogue.ingest(store)
    before = rows(store)
    here = flywheel("episodes", "ls", "--where", "outcome = 'timeout'", "--json")
    monkeypatch.setenv("FLYWHEEL_RAY", "local")
    done = flywheel("episodes", "ingest", "--rebuild", "--json")
    assert json.loads(done.stdout)["read"] == 80, done.stderr
    assert rows(store) == before
    there = flywheel("episodes", "ls", "--where", "outcome = 'timeout'", "--json")
    assert json.loads(there.stdout) == json.loads(here.stdout), there.stderr
    assert json.loads(here.stdout)


def test_a_cluster_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, store_env: dict[str, str]
) -> None:
    monkeypatch.setenv("FLYWHEEL_RAY", "nonsense")
    done = flywheel("episodes", "ls", "--where", "gaps = 0")
    assert done.returncode == 1
    assert "FLYWHEEL_RAY='nonsense'" in done.stderr
