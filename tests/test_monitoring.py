"""What Prometheus is told: of now, never of what can no longer be read."""

from __future__ import annotations

import urllib.request
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flywheel.claims import claim
from flywheel.errors import ConfigError
from flywheel.monitoring import KEPT_S, Figures, served, text
from flywheel.rehearsal.rollouts import RolloutSite
from tests.bucket import BucketStore
from tests.deliveries import make_bundle
from tests.fleets import ReportingFleet


class Watched:
    """A fleet in a store in memory, and its figures by a clock of their own."""

    def __init__(self, root: Path) -> None:
        self.store = BucketStore()
        self.fleet = ReportingFleet(self.store, root / "keys", make_bundle(root, "base"))
        self.later, self.now = timedelta(), 0.0
        self.figures = Figures(
            lambda: self.store,
            root / "keys",
            900.0,
            clock=lambda: self.store.server.clock() + self.later,
            monotonic=lambda: self.now,
        )

    def read(self) -> dict[str, float]:
        """Every sample by name and labels."""
        self.now += KEPT_S
        found = text_string_to_metric_families(text(self.figures).decode())
        return {
            s.name.removeprefix("flywheel_") + "".join(f"/{v}" for v in s.labels.values()): s.value
            for family in found
            for s in family.samples
        }


pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_backlog_that_grows_old_and_a_fleet_that_falls_silent_are_seen(watched: Watched) -> None:
    read = watched.read()
    assert (read["store_up"], read["backlog_failures"], read["turns_open"]) == (1, 0, 0)
    assert (read["robots/heard"], read["robots/silent"]) == (4, 0)
    assert read[f"robots_on_policy/{watched.fleet.base}"] == 4
    assert 2 * 86400 < read["metadata_expires_seconds/timestamp"] <= 3 * 86400
    episode = "00000000-0000-0000-0000-000000000001"
    watched.store.put(f"inbox/{1:019d}-{episode}.json", b'{"episode_id": "%s"}' % episode.encode())
    watched.store.put("fleet/robots/r5.json", b"nonsense")
    watched.later = timedelta(hours=2)
    read = watched.read()
    assert read["backlog_failures"] == 1
    assert read["backlog_oldest_seconds"] == pytest.approx(7200, abs=60)
    assert (read["robots/heard"], read["robots/silent"], read["robots/not_understood"]) == (0, 4, 1)
    claim(watched.store, "turn-a", 10)
    read = watched.read()
    assert (read["backlog_failures"], read["turns_unopened"]) == (0, 1)
    watched.later = timedelta(days=4)
    assert watched.read()["metadata_expires_seconds/timestamp"] < 0


def test_a_store_that_is_down_is_said_and_old_figures_are_not_repeated(watched: Watched) -> None:
    assert watched.read()["robots/heard"] == 4
    with watched.store.server.down():
        read = watched.read()
    assert read["store_up"] == 0
    assert set(read) == {"store_up", "look_seconds"}
    newest = max(k for k in watched.store.server.objects if k.startswith("releases/log/"))
    watched.store.server.overwrite(newest, b'{"signed": {}, "signatures": []}')
    assert watched.read()["store_up"] == 0


def test_scrapers_do_not_make_the_store_be_read_more_often(watched: Watched) -> None:
    watched.read()
    requests = watched.store.server.requests
    for _ in range(5):
        text(watched.figures)
    assert watched.store.server.requests == requests
    watched.now += KEPT_S
    text(watched.figures)
    assert watched.store.server.requests > requests


def test_looking_signs_and_writes_nothing(watched: Watched, tmp_path: Path) -> None:
    """Metadata past half of their life are the DAG's to renew; a monitor has no keys."""
    for pem in (tmp_path / "keys").glob("*.pem"):
        pem.unlink()
    held = dict(watched.store.server.objects)
    watched.later = timedelta(days=2)
    assert watched.read()["store_up"] == 1
    assert watched.store.server.objects == held


def test_the_stage_of_the_rollout_under_way_is_told(tmp_path: Path) -> None:
    site = RolloutSite(tmp_path)
    figures = Figures(lambda: site.store, tmp_path / "keys", 900.0, clock=site.clock.utc)
    assert 'flywheel_rollout_stage{stage="shadow"} 0.0' in text(figures).decode()
    site.start()
    site.clock.advance(60)
    figures = Figures(lambda: site.store, tmp_path / "keys", 900.0, clock=site.clock.utc)
    said = text(figures).decode()
    assert 'flywheel_rollout_stage{stage="shadow"} 1.0' in said
    assert "flywheel_rollout_stage_seconds 60.0" in said


def test_it_is_served_on_loopback_alone_and_a_taken_port_is_one_line(watched: Watched) -> None:
    with served(watched.figures, 0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"flywheel_store_up 1.0" in answer.read()
        with pytest.raises(ConfigError, match="choose another"), served(watched.figures, port):
            pass
