"""What is wrong with a machine or its store is found, named, and comes with its remedy."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flywheel import doctor
from flywheel.config import Deployment
from flywheel.doctor import Finding, Health, examine
from flywheel.errors import StoreRefused, StoreUnavailable
from flywheel.release import Publisher
from tests.bucket import BucketStore


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment.from_env({"FLYWHEEL_HOME": str(tmp_path), "FLYWHEEL_APPROVERS": "ada"})


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, deployment: Deployment) -> BucketStore:
    store = BucketStore()
    monkeypatch.setattr("flywheel.doctor.Store.from_env", lambda _: store)
    monkeypatch.setattr(BucketStore, "probe", lambda self: None)
    monkeypatch.setattr(BucketStore, "clears_unfinished", lambda self: True)
    Publisher(store, deployment.home / "keys").init(("ada",))
    return store


def found(deployment: Deployment) -> dict[str, Finding]:
    return {f.name: f for f in examine(deployment)}


def test_a_sound_deployment_has_no_problem(deployment: Deployment, store: BucketStore) -> None:
    for name in ("python", "settings", "store", "clock", "keys", "releases", "approvers"):
        assert found(deployment)[name].health is Health.OK, found(deployment)[name]
    assert not any(k.startswith("probe/") for k in store.server.objects), "the probe stayed"


def test_a_store_that_is_down_is_a_problem_and_the_rest_is_looked_at(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(_: Any) -> Any:
        raise StoreUnavailable("s3://x at http://127.0.0.1:1: no answer; `flywheel up` starts it")

    monkeypatch.setattr("flywheel.doctor.Store.from_env", down)
    seen = found(deployment)
    assert seen["store"].health is Health.PROBLEM
    assert "flywheel up" in seen["store"].what
    assert seen["disk"].health is not Health.PROBLEM or "GiB free" in seen["disk"].what
    assert "real time" in seen


def test_a_store_where_two_writers_win_is_a_problem(
    deployment: Deployment, store: BucketStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(_: Any) -> None:
        raise StoreRefused("the server ignores If-None-Match, so two writers could both win")

    monkeypatch.setattr(BucketStore, "probe", probe)
    assert found(deployment)["store"].health is Health.PROBLEM


def test_a_bucket_that_keeps_unfinished_uploads_for_ever_is_warned_of(
    deployment: Deployment, store: BucketStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BucketStore, "clears_unfinished", lambda self: False)
    seen = found(deployment)["store"]
    assert seen.health is Health.WARNING
    assert "AbortIncompleteMultipartUpload" in seen.what


@pytest.mark.parametrize("off_s", [-60.0, 60.0])
def test_a_clock_that_is_wrong_is_found(deployment: Deployment, store: BucketStore, off_s: float) -> None:
    right = store.server.clock
    store.server.clock = lambda: right() + timedelta(seconds=off_s)
    assert found(deployment)["clock"].health is Health.PROBLEM
    assert "NTP" in found(deployment)["clock"].what


def test_a_key_that_others_may_read_is_found_and_not_printed(
    deployment: Deployment, store: BucketStore
) -> None:
    key = next((deployment.home / "keys").glob("stable-*.pem"))
    key.chmod(0o640)
    seen = found(deployment)["keys"]
    assert seen.health is Health.PROBLEM
    assert f"chmod go= {key}" in seen.what
    assert key.read_text().splitlines()[1] not in str(found(deployment))


def test_metadata_that_expired_are_found(
    deployment: Deployment, store: BucketStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2100, 1, 1, tzinfo=tz)

    monkeypatch.setattr(doctor, "datetime", Later)
    seen = found(deployment)["releases"]
    assert seen.health is Health.PROBLEM
    assert "expired" in seen.what


def test_an_approver_without_a_key_is_named(tmp_path: Path, store: BucketStore) -> None:
    deployment = Deployment.from_env({"FLYWHEEL_HOME": str(tmp_path), "FLYWHEEL_APPROVERS": "ada,grace"})
    seen = found(deployment)["approvers"]
    assert seen.health is Health.PROBLEM
    assert "flywheel keys approver grace" in seen.what


def test_a_full_disk_is_a_problem(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("flywheel.doctor.shutil.disk_usage", lambda _: usage)
    assert found(deployment)["disk"].health is Health.PROBLEM


def test_looking_does_not_make_this_process_real_time(deployment: Deployment) -> None:
    examine(deployment)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
