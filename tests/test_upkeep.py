"""What would go wrong unseen between turns: expiry, silence, stuck uploads and turns, leftovers."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from flywheel.claims import claim
from flywheel.config import Deployment, Settings
from flywheel.release import Publisher
from flywheel.schema import RobotReport
from flywheel.turn import TurnRecord, TurnResult
from flywheel.upkeep import Alarm, attention, clear, renew
from tests.bucket import BucketStore
from tests.deliveries import make_bundle
from tests.fleets import ReportingFleet

SETTINGS = Settings()


@pytest.fixture
def store() -> BucketStore:
    return BucketStore()


@pytest.fixture
def fleet(store: BucketStore, tmp_path: Path) -> ReportingFleet:
    return ReportingFleet(store, tmp_path / "keys", make_bundle(tmp_path, "base"))


def alarms(
    store: BucketStore, publisher: Publisher, later: timedelta = timedelta()
) -> dict[str, tuple[str, ...]]:
    found = attention(store, publisher, SETTINGS, store.server.clock() + later)
    assert all(a.remedy and a.line() for a in found)
    return {a.what: a.who for a in found}


def report(fleet: ReportingFleet, **changed: object) -> None:
    said = RobotReport(site="lab", robot="r1", t_unix_ns=0, loaded_digest=fleet.base)
    fleet.store.put_json("fleet/robots/r1.json", said.model_copy(update=changed))


def test_a_sound_fleet_raises_no_alarm(store: BucketStore, fleet: ReportingFleet) -> None:
    assert alarms(store, fleet.publisher) == {}


def test_metadata_about_to_expire_are_signed_anew_and_fresh_ones_are_left(
    store: BucketStore, fleet: ReportingFleet
) -> None:
    version = fleet.publisher.load().n
    fresh = renew(fleet.publisher)
    assert fleet.publisher.load().n == version
    now = fleet.publisher.clock()
    fleet.publisher.clock = lambda: now + timedelta(hours=fresh) - timedelta(minutes=5)
    assert renew(fleet.publisher) > 1.0
    assert fleet.publisher.load().n > version


def test_metadata_that_have_expired_are_signed_anew(store: BucketStore, fleet: ReportingFleet) -> None:
    now = fleet.publisher.clock()
    fleet.publisher.clock = lambda: now + timedelta(days=300)
    assert renew(fleet.publisher) > 1.0


def test_a_silent_robot_is_named(store: BucketStore, fleet: ReportingFleet) -> None:
    silence = timedelta(seconds=SETTINGS.rollout.silence_s + 1)
    assert alarms(store, fleet.publisher, silence)["silent"] == ("r1", "r2", "r3", "r4")


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"loaded_digest": "e" * 64}, "nobody offers"),
        ({"misses_ppm": 20_001.0}, "deadlines"),
        ({"spool_pending": 201}, "not in the store"),
    ],
)
def test_a_robot_that_is_unwell_is_named(
    changed: dict[str, object], what: str, store: BucketStore, fleet: ReportingFleet
) -> None:
    report(fleet, **changed)
    ((found, who),) = alarms(store, fleet.publisher).items()
    assert what in found
    assert who == ("r1",)


@pytest.mark.parametrize("changed", [{"misses_ppm": 20_000.0}, {"misses_ppm": None}, {"spool_pending": 200}])
def test_a_robot_at_its_bounds_is_well(
    changed: dict[str, object], store: BucketStore, fleet: ReportingFleet
) -> None:
    report(fleet, **changed)
    assert alarms(store, fleet.publisher) == {}


def test_a_release_that_a_robot_gave_back_is_not_forgotten(store: BucketStore, fleet: ReportingFleet) -> None:
    report(fleet, refused_digest="d" * 64)
    assert alarms(store, fleet.publisher) == {}, "nobody offers that one any more"
    report(fleet, refused_digest=fleet.base)
    assert alarms(store, fleet.publisher) == {"gave a release back that is still offered": ("r1",)}


def test_a_report_that_is_not_understood_is_an_alarm_and_hides_no_other(
    store: BucketStore, fleet: ReportingFleet
) -> None:
    store.put("fleet/robots/r9.json", b'{"schema_version": 9}')
    report(fleet, spool_pending=201)
    assert len(alarms(store, fleet.publisher)) == 2


def opened(store: BucketStore, name: str, ago: timedelta) -> None:
    at = round((store.server.clock() - ago).timestamp() * 1e9)
    record = TurnRecord(turn=name, opened_unix_ns=at, commit="c" * 40, current_digest="d" * 64, episodes=1)
    store.put_json(f"runs/{name}/turn.json", record)


def test_a_turn_without_an_end_is_named_and_a_finished_one_is_not(
    store: BucketStore, fleet: ReportingFleet
) -> None:
    opened(store, "turn-stuck", timedelta(days=2))
    opened(store, "turn-young", timedelta(hours=1))
    opened(store, "turn-done", timedelta(days=2))
    store.put("runs/turn-done/workspace/dvc.lock", b"")
    result = TurnResult(turn="turn-done", ok=False, stages=(), commit="c" * 40)
    store.put_json("runs/turn-done/result.json", result)
    assert alarms(store, fleet.publisher) == {"turn without an end for 24 h": ("turn-stuck",)}


def test_failures_that_no_turn_takes_are_an_alarm(store: BucketStore, fleet: ReportingFleet) -> None:
    store.put(f"inbox/{1:019d}-00000000-0000-7000-8000-000000000001.json", b"{}")
    assert alarms(store, fleet.publisher) == {}
    later = timedelta(seconds=3 * SETTINGS.trigger.max_wait_s + 5)
    assert "failures that no turn takes" in alarms(store, fleet.publisher, later)


def test_a_turn_that_died_between_its_claim_and_its_record_is_an_alarm(
    store: BucketStore, fleet: ReportingFleet
) -> None:
    """Nothing waits in the inbox any more, and no turn is open: nobody else would miss these failures."""
    store.put(f"inbox/{1:019d}-00000000-0000-7000-8000-000000000001.json", b"{}")
    claim(store, "turn-dead", 10)
    claim(store, "turn-open", 10)
    opened(store, "turn-open", timedelta(minutes=1))
    assert alarms(store, fleet.publisher) == {}
    later = timedelta(seconds=3 * SETTINGS.trigger.max_wait_s + 5)
    assert alarms(store, fleet.publisher, later)["claimed failures and was never opened"] == ("turn-dead",)


def test_leftovers_go_and_what_somebody_needs_stays(store: BucketStore, tmp_path: Path) -> None:
    now = store.server.clock()
    store.put("probe/abc", b"1")
    store.put("episodes/x", b"1")
    opened(store, "turn-open", timedelta(days=30))
    runs = tmp_path / "runs"
    for name, age in (("turn-old", 8), ("turn-new", 6), ("turn-open", 30), ("turn-used", 30)):
        (runs / name / "data").mkdir(parents=True)
        then = (now - timedelta(days=age)).timestamp()
        os.utime(runs / name, (then, then))
    deployment = Deployment.from_env({"FLYWHEEL_HOME": str(tmp_path)})
    from flywheel.workspace import Workspace

    with Workspace("turn-used", deployment).lock():
        clear(store, deployment, SETTINGS, now)
    assert store.exists("probe/abc"), "another doctor may be at work"
    assert sorted(p.name for p in runs.glob("turn-*")) == ["turn-new", "turn-open", "turn-used"]
    done = clear(store, deployment, SETTINGS, now + timedelta(hours=2))
    assert not store.exists("probe/abc")
    assert store.exists("episodes/x")
    assert "probe/abc" in done[0]


def test_a_line_names_a_few_and_counts_the_rest() -> None:
    line = Alarm("silent", tuple(f"r{i}" for i in range(12)), "look").line()
    assert "r4 and 7 more; look" in line
    assert "r5" not in line
