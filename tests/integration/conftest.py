"""Real parts for the integration tests: one object store for the whole run, a fresh prefix for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from flywheel import services
from flywheel.services.process import free_port
from flywheel.store import EmbeddedStore, Store, embedded_store


@pytest.fixture(scope="session")
def rgw_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state directory of a running Ceph RGW. Started by the first test that asks, stopped at the end.

    Its watchdog stops it even if the test run is killed.
    """
    home = tmp_path_factory.mktemp("rgw")
    with services.session(home, with_airflow=False):
        yield home


@pytest.fixture(scope="session")
def rgw(rgw_home: Path) -> EmbeddedStore:
    """Its endpoint and its owner's keys."""
    running = embedded_store(rgw_home)
    assert running is not None
    return running


@pytest.fixture
def store(rgw: EmbeddedStore) -> Store:
    """The real store, under a prefix that nothing else uses."""
    return rgw.connect(f"test-{uuid.uuid4().hex}")


@pytest.fixture
def store_env(rgw: EmbeddedStore, store: Store, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """``store`` as environment variables, set for this process and returned for children."""
    env = {
        "FLYWHEEL_STORE": f"s3://{store.bucket}/{store.prefix}".rstrip("/"),
        "AWS_ENDPOINT_URL": rgw.endpoint,
        "AWS_ACCESS_KEY_ID": rgw.access_key,
        "AWS_SECRET_ACCESS_KEY": rgw.secret_key,
        "AWS_DEFAULT_REGION": rgw.region,
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env


@pytest.fixture
def free_endpoint() -> str:
    """An address on this machine where nothing listens: a store that is down."""
    return f"http://127.0.0.1:{free_port(set())}"


@pytest.fixture(scope="module")
def lerobot_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lerobot's reader copies what it reads into a cache: not into the user's."""
    import datasets  # type: ignore[import-untyped]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
