"""The store against the real embedded server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flywheel.errors import Conflict, IntegrityError, NotFound, StoreRefused, StoreUnavailable
from flywheel.multipart import put_parts
from flywheel.schema import RobotReport, sha256_bytes
from flywheel.store import EmbeddedStore, Store

pytestmark = pytest.mark.integration


def test_what_is_put_is_what_is_got(store: Store, tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    file = tmp_path / "a.bin"
    file.write_bytes(data)
    assert store.put("x/bytes", data) == store.put("x/file", file) == sha256_bytes(data)
    assert store.get("x/bytes") == store.get("x/file", sha256_bytes(data)) == data
    store.get_file("x/file", tmp_path / "b.bin", sha256_bytes(data))
    assert (tmp_path / "b.bin").read_bytes() == data
    assert [(i.key, i.size) for i in store.list("x/")] == [("x/bytes", len(data)), ("x/file", len(data))]
    store.delete("x/bytes")
    store.delete("x/bytes")
    assert not store.exists("x/bytes")
    with pytest.raises(NotFound, match="x/bytes"):
        store.get("x/bytes")


def test_empty_object_survives(store: Store) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""


def test_parts_that_a_lost_robot_left_behind_do_not_stay_for_ever(store: Store) -> None:
    assert store.clears_unfinished()


def test_listing_is_complete_past_one_page_and_in_order(store: Store) -> None:
    keys = [f"many/{n:04d}" for n in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: store.put(k, b"."), keys))
    assert [i.key for i in store.list("many/")] == keys


def test_overwritten_object_is_found_out_by_the_reader_who_knows_its_hash(
    store: Store, tmp_path: Path
) -> None:
    first = store.put("k", b"sealed")
    store.put("k", b"forged")
    with pytest.raises(IntegrityError, match="expected " + first):
        store.get("k", first)
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(IntegrityError):
        store.get_file("k", target, first)
    assert target.read_bytes() == b"old", "a failed download replaced the file that was there"
    assert list(tmp_path.iterdir()) == [target], "a failed download left its temporary file"


def test_tampered_object_with_the_old_metadata_is_refused(store: Store) -> None:
    store._client.put_object(
        Bucket=store.bucket, Key=store.prefix + "t", Body=b"evil", Metadata={"sha256": sha256_bytes(b"good")}
    )
    with pytest.raises(IntegrityError):
        store.get("t")


def test_data_that_differ_from_their_hash_are_not_uploaded(store: Store) -> None:
    with pytest.raises(IntegrityError, match="not uploaded"):
        store.put("k", b"data", sha256_bytes(b"other"))
    assert not store.exists("k")


def test_racing_creators_have_exactly_one_winner(store: Store) -> None:
    for n in range(5):
        barrier = threading.Barrier(8)

        def create(who: int, n: int = n, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(10)
            try:
                store.create(f"race/{n}", b"%d" % who)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert store.get(f"race/{n}") == b"%d" % won.index(True)


def test_racing_writers_of_state_never_lose_an_update(store: Store) -> None:
    """Eight writers add one each, four times over: a counter built on versions ends exact."""

    def add(_: int) -> None:
        for _ in range(4):
            while True:
                n, data = store.latest("state/counter") or (0, b"0")
                try:
                    store.append_version("state/counter", n + 1, b"%d" % (int(data) + 1))
                    break
                except Conflict:
                    continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert store.latest("state/counter") == (32, b"32")


def test_probe_accepts_a_server_with_conditional_writes(store: Store) -> None:
    store.probe()
    assert list(store.list("probe/")) == []


def test_models_pass_through_the_store(store: Store) -> None:
    report = RobotReport(site="s", robot="r", t_unix_ns=1, loaded_digest="ab")
    store.put_json("fleet/robots/r.json", report)
    assert store.get_json("fleet/robots/r.json", RobotReport) == report


def test_wrong_keys_are_refused_without_being_shown(rgw: EmbeddedStore) -> None:
    for access, secret in ((rgw.access_key, "wrong-secret"), ("WRONGKEY", rgw.secret_key)):
        intruder = Store(f"s3://{rgw.bucket}", rgw.endpoint, access_key=access, secret_key=secret)
        with pytest.raises(StoreRefused, match="AWS_ACCESS_KEY_ID") as e:
            intruder.get("any")
        assert access not in str(e.value)
        assert secret not in str(e.value)
        assert rgw.endpoint in str(e.value)


def test_nobody_reads_or_writes_without_keys(rgw: EmbeddedStore) -> None:
    request = urllib.request.Request(f"{rgw.endpoint}/{rgw.bucket}/x", data=b"y", method="PUT")
    for attempt in (request, f"{rgw.endpoint}/{rgw.bucket}"):
        with pytest.raises(urllib.error.HTTPError) as e:
            urllib.request.urlopen(attempt)
        e.value.close()
        assert e.value.code == 403


def test_absent_bucket_says_so(rgw: EmbeddedStore) -> None:
    absent = Store("s3://no-such-bucket", rgw.endpoint, access_key=rgw.access_key, secret_key=rgw.secret_key)
    with pytest.raises(StoreRefused, match="FLYWHEEL_STORE"):
        absent.put("k", b"")
    with pytest.raises(StoreRefused, match="FLYWHEEL_STORE"):
        absent.get("k")


def test_store_from_environment(store_env: dict[str, str], store: Store) -> None:
    mine = Store.from_env()
    mine.put("k", b"v")
    assert store.get("k") == b"v"


def test_store_that_is_down_is_unavailable_and_names_its_endpoint(free_endpoint: str) -> None:
    down = Store("s3://flywheel", free_endpoint, access_key="a", secret_key="b", attempts=1)
    with pytest.raises(StoreUnavailable, match=free_endpoint):
        down.put("k", b"v")


_DIES_AFTER_TWO_PARTS = """
import os, signal, sys
from pathlib import Path
from flywheel import multipart
from flywheel.schema import sha256_file
from flywheel.store import Store

store = Store.from_env()
sent = 0

def count(**_):
    global sent
    sent += 1
    if sent == 2:
        os.kill(os.getpid(), signal.SIGKILL)

store._client.meta.events.register("after-call.s3.UploadPart", count)
path = Path(sys.argv[1])
multipart.put_parts(store._client, store.bucket, store._key("big"), path, sha256_file(path), 5 << 20)
"""


def test_a_large_upload_that_was_killed_goes_on_with_the_parts_that_the_store_has(
    store: Store, store_env: dict[str, str], tmp_path: Path
) -> None:
    data = np.random.default_rng(0).bytes(17 << 20)
    path = tmp_path / "big"
    path.write_bytes(data)
    died = subprocess.run([sys.executable, "-c", _DIES_AFTER_TWO_PARTS, path], env=os.environ, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not store.exists("big"), "half of an upload is visible"
    full, sha256 = store._key("big"), sha256_bytes(data)
    assert put_parts(store._client, store.bucket, full, path, sha256, 5 << 20) == 2  # of four
    assert store.get("big", sha256) == data


def test_parts_of_other_bytes_are_not_taken_for_ours(
    store: Store, store_env: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(17 << 20))
    subprocess.run([sys.executable, "-c", _DIES_AFTER_TWO_PARTS, path], env=os.environ, check=False)
    data = bytes(5 << 20) + np.random.default_rng(0).bytes(6 << 20)
    path.write_bytes(data)  # shorter, and its second part is another one
    full, sha256 = store._key("big"), sha256_bytes(data)
    assert put_parts(store._client, store.bucket, full, path, sha256, 5 << 20) == 2  # of three
    assert store.get("big", sha256) == data
