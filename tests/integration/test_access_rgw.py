"""The access policies on the real server: what each client does goes through, and nothing else does."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from flywheel import access, claims, episode, policies
from flywheel.config import Settings
from flywheel.errors import StoreRefused
from flywheel.fleet import SimulatedRobot
from flywheel.release import Publisher
from flywheel.schema import RobotReport
from flywheel.services.ceph import Ceph
from flywheel.store import Store
from tests.deliveries import make_bundle

pytestmark = pytest.mark.integration
BASE = Path(__file__).parents[2] / "models" / "base" / "bundle"


@pytest.fixture
def url(store: Store) -> str:
    return f"s3://{store.bucket}/{store.prefix}".rstrip("/")


@pytest.fixture
def client(rgw_home: Path, url: str) -> Callable[[access.Policy], Store]:
    """A client of the test's part of the store with keys of its own."""

    def make(policy: access.Policy) -> Store:
        keys = Ceph(rgw_home).grant(f"test.{uuid.uuid4().hex}", policy)
        return Store(
            url, keys.endpoint, access_key=keys.access_key, secret_key=keys.secret_key, region=keys.region
        )

    return make


def refused(act: Callable[[], object]) -> None:
    with pytest.raises(StoreRefused):
        act()


def test_a_robot_works_with_its_own_keys_and_may_do_nothing_else(
    store: Store, url: str, client: Callable[[access.Policy], Store], tmp_path: Path
) -> None:
    publisher = Publisher(store, tmp_path / "keys")
    bootstrap = publisher.init()
    publisher.publish_first(BASE)
    mine = client(access.robot(url, "site", "r1"))
    defaults = Settings()
    settings = defaults.model_copy(
        update={"twin": defaults.twin.model_copy(update={"shift": "factory", "episode_s": 1.0})}
    )
    robot = SimulatedRobot(tmp_path / "r1", mine, "site", "r1", 0, bootstrap, settings)
    robot.look()
    robot.work()
    robot.work()
    robot.finish()
    prefix = next(episode.ls(store)).prefix
    assert episode.verify(episode.pull(mine, prefix, tmp_path / "pulled")) == []
    assert len(list(store.list("inbox/"))) == 2
    assert store.get_json("fleet/robots/r1.json", RobotReport).spool_pending == 0
    assert robot.counts["store_errors"] == 0

    other = prefix.replace("robot=r1", "robot=r2")
    store.put(f"{other}manifest.json", b"{}")
    store.put("runs/turn-a/turn.json", b"{}")
    for act in (
        lambda: mine.get(f"{other}manifest.json"),
        lambda: mine.get("runs/turn-a/turn.json"),
        lambda: mine.put(f"{other}control.parquet", b"1"),
        lambda: mine.put("fleet/robots/r2.json", b"{}"),
        lambda: mine.put("releases/metadata/timestamp.json", b"{}"),
        lambda: mine.put("rollouts/x/00000001.json", b"{}"),
        lambda: mine.delete(f"{prefix}manifest.json"),
        lambda: mine.delete("fleet/robots/r1.json"),
    ):
        refused(act)
    assert mine.stat(f"{prefix}nothing") is None, "forbidden is told from absent"


def test_stages_take_failures_and_leave_policies_and_cannot_release(
    store: Store, url: str, client: Callable[[access.Policy], Store], tmp_path: Path
) -> None:
    marker = f"inbox/{1:019d}-00000000-0000-7000-8000-000000000001.json"
    store.put(marker, b'{"episode_id": "00000000-0000-7000-8000-000000000001", "prefix": "episodes/x/"}')
    stages = client(access.stages(url))
    assert len(claims.claim(stages, "turn-a", 10).episodes) == 1
    assert not store.exists(marker)
    policies.publish(stages, "turn-a", make_bundle(tmp_path, "bundle"), make_bundle(tmp_path, "checkpoint"))
    stages.probe()
    store.put("episodes/x/manifest.json", b"{}")
    refused(lambda: Publisher(stages, tmp_path / "keys").init())
    refused(lambda: stages.put("rollouts/x/00000001.json", b"{}"))
    refused(lambda: stages.put("episodes/x/manifest.json", b"forged"))
    refused(lambda: stages.delete("episodes/x/manifest.json"))


def test_the_publisher_releases_and_cannot_touch_what_the_failures_were(
    store: Store, url: str, client: Callable[[access.Policy], Store], tmp_path: Path
) -> None:
    store.put("episodes/x/manifest.json", b"{}")
    store.put("gates/x.json", b"{}")
    mine = client(access.publisher(url))
    publisher = Publisher(mine, tmp_path / "keys")
    publisher.init(("ada",))
    publisher.publish_first(BASE)
    mine.append_version("rollouts/x", 1, b"{}")
    refused(lambda: mine.put("episodes/x/manifest.json", b"forged"))
    refused(lambda: mine.put("gates/x.json", b"forged"))
    refused(lambda: mine.delete("gates/x.json"))
    refused(lambda: mine.put("fleet/robots/r1.json", b"{}"))
