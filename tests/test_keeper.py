"""What died is started again, not too often, and only what is to be up."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.errors import ServiceError
from flywheel.services.keeper import FORGET_S, PAUSE_MAX_S, Keeper, Patience, run


def test_what_dies_at_once_is_started_less_and_less_often() -> None:
    now = [0.0]
    patience = Patience(lambda: now[0])
    starts = []
    for _ in range(3000):  # five minutes, in tenths of a second
        if patience.due("scheduler"):
            starts.append(round(now[0], 1))
        now[0] += 0.1
    gaps = [round(b - a) for a, b in pairwise(starts)]
    assert gaps[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert set(gaps[7:]) <= {60}


def test_one_that_held_out_is_started_at_once_whatever_it_did_before() -> None:
    now = [0.0]
    patience = Patience(lambda: now[0])
    for _ in range(5):
        while not patience.due("scheduler"):
            now[0] += 1.0
    now[0] += FORGET_S
    assert patience.due("scheduler")
    assert patience.due("triggerer"), "another process waits for this one"


@given(st.lists(st.floats(0.01, 200.0), min_size=1, max_size=60))
def test_nothing_waits_for_longer_than_the_longest_pause(deaths_s: list[float]) -> None:
    now = [0.0]
    patience = Patience(lambda: now[0])
    for after in deaths_s:
        now[0] += after
        if not patience.due("x"):
            now[0] += PAUSE_MAX_S
            assert patience.due("x")


def test_a_list_or_a_note_that_was_cut_short_is_not_believed(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    assert keeper.kept() == frozenset()
    keeper.keep(["store", "airflow"])
    assert keeper.kept() == {"store", "airflow"}
    (keeper.dir / "kept.json").write_text('["stor')
    assert keeper.kept() == frozenset()
    keeper.note(["scheduler"], 10.0)
    with (keeper.dir / "restarts.jsonl").open("a") as f:
        f.write('{"t_unix_s": 11.0, "na\n')
    keeper.note(["radosgw", "ceph-osd"], 12.0)
    assert [r.name for r in keeper.restarts(0.0)] == ["scheduler", "radosgw", "ceph-osd"]
    assert [r.name for r in keeper.restarts(11.0)] == ["radosgw", "ceph-osd"]
    assert not keeper.runs()


def test_a_start_that_fails_does_not_end_the_keeper_and_an_empty_list_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper = Keeper(tmp_path)
    keeper.keep(["store"])
    looks = 0
    monkeypatch.setattr("flywheel.services.keeper.time.sleep", lambda _: None)

    def revive(_: Patience) -> list[str]:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ServiceError("embedded store: no answer")
        if looks == 3:
            keeper.keep([])
        return ["radosgw"] if looks == 2 else []

    run(keeper, revive)
    assert looks == 3
    said = capsys.readouterr().out
    assert "embedded store: no answer" in said
    assert "started again: radosgw" in said
    assert [r.name for r in keeper.restarts(0.0)] == ["radosgw"]
