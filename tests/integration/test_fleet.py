"""A simulated robot is a real one but for its cell: what it does arrives in the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel import episode
from flywheel.config import Settings
from flywheel.errors import ServiceError
from flywheel.fleet import SimulatedRobot
from flywheel.release import Publisher
from flywheel.schema import Group, RobotReport, bundle_digest
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


def test_a_robot_without_any_release_does_not_start(store: Store, tmp_path: Path) -> None:
    publisher = Publisher(store, tmp_path / "keys")
    bootstrap = publisher.init()
    assert publisher.current(Group.STABLE) is None
    with pytest.raises(ServiceError, match="no verified policy to start with"):
        SimulatedRobot(tmp_path / "r1", store, "site", "r1", 0, bootstrap, settings())
