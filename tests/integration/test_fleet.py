"""A simulated robot is a real one but for its cell: what it does arrives in the store."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flywheel import episode
from flywheel.config import Settings
from flywheel.errors import ConfigError, ServiceError
from flywheel.fleet import WORK, Fleet, SimulatedRobot
from flywheel.release import Publisher
from flywheel.schema import MANIFEST_FILE, Group, Manifest, RobotReport, bundle_digest
from flywheel.store import Store

pytestmark = pytest.mark.integration
BASE = Path(__file__).parents[2] / "models" / "base" / "bundle"


def settings(**twin: object) -> Settings:
    found = Settings()
    return found.model_copy(update={"twin": found.twin.model_copy(update=twin)})


def test_a_failure_on_a_robot_becomes_one_verified_episode_and_one_marker(
    store: Store, tmp_path: Path
) -> None:
    publisher = Publisher(store, tmp_path / "keys")
    bootstrap = publisher.init()
    publisher.publish_first(BASE)
    robot = SimulatedRobot(
        tmp_path / "r1", store, "site", "r1", 0, bootstrap, settings(shift="factory", episode_s=1.0)
    )
    robot.look()
    robot.work()  # nobody places a box in a second, so this fails
    robot.work()  # the next attempt ends the first one's window
    robot.finish()
    listed = list(episode.ls(store))
    assert len(listed) == 2
    assert len(list(store.list("inbox/"))) == 2
    here = episode.pull(store, listed[0].prefix, tmp_path / "pulled")
    assert episode.verify(here) == []
    report = store.get_json("fleet/robots/r1.json", RobotReport)
    assert report.loaded_digest == bundle_digest(BASE)
    assert (report.episodes, report.successes, report.spool_pending) == (2, 0, 0)


def test_robots_that_are_moved_keep_name_policy_and_what_they_had_not_sent(
    store: Store, store_env: dict[str, str], tmp_path: Path
) -> None:
    publisher = Publisher(store, tmp_path / "keys")
    bootstrap = publisher.init()
    publisher.publish_first(BASE)
    one = settings(shift="factory", robots=1, episode_s=1.0)
    with Fleet(tmp_path, store_env, one, bootstrap, workers=1, shift="dim") as fleet:
        for shift, failures in (("dim", 1), ("table", 2)):
            if shift != "dim":
                fleet.move(shift)
            fleet.set(WORK)
            deadline = time.monotonic() + 120
            while fleet.poll().total("attempts") < failures:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with pytest.raises(ConfigError, match="nowhere"):
            fleet.move("nowhere")
        assert fleet.poll().total("attempts"), "a shift that there is not stopped the robots"
    assert fleet.robots == ("factory-01",)
    found = [store.get_json(r.prefix + MANIFEST_FILE, Manifest) for r in episode.ls(store)]
    assert {m.robot for m in found} == {"factory-01"}
    assert min(found, key=lambda m: m.episode_id).shift == "dim"
    assert {m.shift for m in found} == {"dim", "table"}
    report = store.get_json("fleet/robots/factory-01.json", RobotReport)
    assert (report.loaded_digest, report.spool_pending) == (bundle_digest(BASE), 0)


def test_a_robot_without_any_release_does_not_start(store: Store, tmp_path: Path) -> None:
    publisher = Publisher(store, tmp_path / "keys")
    bootstrap = publisher.init()
    assert publisher.current(Group.STABLE) is None
    with pytest.raises(ServiceError, match="no verified policy to start with"):
        SimulatedRobot(tmp_path / "r1", store, "site", "r1", 0, bootstrap, settings())
