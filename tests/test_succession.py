"""Turn after turn: where the robots go, what the study compares, and what is drawn."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flywheel.bench import turn_steps
from flywheel.bench import turns as study
from flywheel.bench.turn_steps import Demonstrate, Learn, Record
from flywheel.config import GateSettings, Settings
from flywheel.errors import ConfigError, StageError
from flywheel.evaluate import Scenario
from flywheel.gate import in_shift_of
from flywheel.report import _by_turn
from flywheel.schema import Proportion
from flywheel.stats import paired_difference, wilson
from flywheel.succession import succession
from flywheel.turn_plot import success_by_turn
from flywheel.twin.shift import SHIFTS

ROOT = Path(__file__).resolve().parents[1]


def test_one_turn_is_where_the_fleet_works_and_several_go_on_from_there() -> None:
    settings = Settings.load(ROOT / "params.yaml")
    assert succession(settings, 1) == (settings.twin.shift,) == ("factory",)
    assert succession(settings, 2) == ("factory", "warehouse")
    assert succession(settings, 3) == ("dim", "factory", "warehouse")
    with pytest.raises(ConfigError, match="--turns 4: must be 1 to 3"):
        succession(settings, 4)
    elsewhere = settings.model_copy(update={"twin": settings.twin.model_copy(update={"shift": "table"})})
    assert succession(elsewhere, 3) == ("table", "dim", "factory")


# ── the gate follows the robots ──────────────────────────────────────────────────────────────────────


def test_the_gate_looks_where_most_of_the_failures_were() -> None:
    def of(**counts: int) -> str:
        scenes = [Scenario(s, i) for s, n in counts.items() for i in range(n)]
        return in_shift_of(GateSettings(shift=""), scenes).shift

    assert of(table=3, factory=110, nowhere=500) == "factory"
    assert of(table=110, factory=30) == "table"
    assert in_shift_of(GateSettings(shift="dim"), [Scenario("table", 1)]).shift == "dim"
    assert Settings.load(ROOT / "params.yaml").gate.shift == "", "a turn in another shift is judged there"
    with pytest.raises(ConfigError, match=r'gate\.shift = "": none of 2 failures .*factory'):
        of(somewhere=2)
    with pytest.raises(ConfigError, match=r'gate\.shift = "": none of 0 failures'):
        of()


# ── the study ────────────────────────────────────────────────────────────────────────────────────────


def test_no_step_of_the_study_waits_for_one_that_does_not_come_before_it(tmp_path: Path) -> None:
    steps = study.plan(tmp_path, ROOT)
    seen: set[str] = set()
    for s in steps:
        assert seen.issuperset(s.needs), s.name
        seen.add(s.name)
    assert len(seen) == len(steps)


def test_each_way_collects_with_its_own_policy_and_replays_its_own_earlier_turns(tmp_path: Path) -> None:
    tasks = {s.name: s.task for s in study.plan(tmp_path, ROOT)}
    for choice in study.CHOICES:
        for k, shift in enumerate(study.SHIFTS, 1):
            learn = tasks[f"{choice}/turn-{k}/learn"]
            assert isinstance(learn, Learn)
            assert (learn.choice, learn.share) == (choice, 0.4)
            assert list(learn.before) == [str(tmp_path / choice / f"turn-{j}") for j in range(k - 1, 0, -1)]
            assert set(learn.episodes).isdisjoint(
                e
                for other, t in tasks.items()
                if isinstance(t, Learn) and other.startswith(f"{choice}/") and t is not learn
                for e in t.episodes
            )
            if k > 1:
                record = tasks[f"{choice}/turn-{k}/record"]
                assert isinstance(record, Record)
                assert learn.policy == str(tmp_path / choice / f"turn-{k - 1}" / "checkpoint")
                assert (record.bundle, record.shift) == (f"{learn.policy}/bundle", shift)


def outcomes(successes: int, of: int) -> list[bool]:
    return [i < successes for i in range(of)]


RATES: dict[str, list[list[int]]] = {  # of 100, by way and turn: in each shift up to the next one
    "coverage": [[80, 30], [78, 90, 20], [79, 86, 70]],
    "random": [[70, 30], [70, 70, 20], [70, 70, 60]],
    "all": [[90, 30], [60, 90, 20], [50, 80, 75]],
}


def write_study(out: Path, turns: int = 3) -> None:
    """A study whose figures are known: ``all`` forgets, ``random`` learns less, ours keeps what it has."""

    def put(path: Path, doc: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(doc))

    base = {s: outcomes(0, 100) for s in study.SHIFTS} | {study.LAB: outcomes(100, 100)}
    put(out / "base" / "success.json", {"policy": "p", "solved": base})
    for choice, rates in RATES.items():
        for k, of in enumerate(rates[:turns], 1):
            solved = {s: outcomes(n, 100) for s, n in zip(study.SHIFTS, of, strict=False)}
            solved[study.LAB] = outcomes(98, 50 if k < 3 else 100)
            put(out / choice / f"turn-{k}" / "success.json", {"policy": "p", "solved": solved})
            pools = {"new": {"frames": 10, "share": 1.0, "datasets": ["d"]}}
            learned = {"candidates": 110, "usable": 100, "taken": 100 if choice == "all" else 40}
            trained = {"held_out": 10, "frames": 900, "train": {"pools": pools, "loss": 0.1}}
            put(out / choice / f"turn-{k}" / "learn.json", learned | trained)


def test_the_bars_are_the_differences_that_were_asked_for(tmp_path: Path) -> None:
    write_study(tmp_path)
    doc = study.document(tmp_path)
    a, b, _ = study.SHIFTS
    expected = {
        "coverage_rise_1": (0.8, ">", 0.0),
        "coverage_rise_2": (0.6, ">", 0.0),
        "coverage_rise_3": (0.5, ">", 0.0),
        f"coverage_kept_{a}": (-0.01, ">=", -0.05),
        f"coverage_kept_{b}": (-0.04, ">=", -0.05),
        "coverage_kept_lab": (-0.02, ">=", -0.05),
        "coverage_less_all": ((79 + 86 + 70 - 50 - 80 - 75) / 300, ">=", 0.0),
        "coverage_less_random": ((79 + 86 + 70 - 70 - 70 - 60) / 300, ">", 0.0),
        "share": (0.4, "<=", 0.4),
    }
    assert {k: (v["op"], v["bar"], v["ok"]) for k, v in doc["bars"].items()} == {
        k: (op, bar, True) for k, (_, op, bar) in expected.items()
    }
    for name, (value, _, _) in expected.items():
        assert doc["bars"][name]["value"] == pytest.approx(value), name
    d = paired_difference(outcomes(80, 100), outcomes(79, 100))
    found = doc["differences"][f"coverage_kept_{a}"]
    assert (found["low"], found["high"], found["n"]) == (d.low, d.high, 100.0)
    assert doc["figures"][f"all_kept_{a}"] == pytest.approx(-0.4)
    columns, lines = study.table(doc)
    assert columns == ["", "shift", *study.CHOICES]
    assert ["after turn 3", a, "79 % [70, 86]", "70 % [60, 78]", "50 % [40, 60]"] in lines
    (kept,) = [line for line in lines if line[0] == f"points kept_{a}"]
    assert [cell.split()[0] for cell in kept[2:]] == ["-1", "+0", "-40"]


def test_a_missed_bar_is_printed_as_missed(tmp_path: Path) -> None:
    write_study(tmp_path)
    path = tmp_path / "coverage" / "turn-3" / "success.json"
    doc = json.loads(path.read_text())
    doc["solved"][study.SHIFTS[0]] = outcomes(74, 100)
    doc["solved"][study.SHIFTS[2]] = outcomes(20, 100)
    path.write_text(json.dumps(doc))
    bars = study.document(tmp_path)["bars"]
    missed = {k for k, v in bars.items() if not v["ok"]}
    assert missed == {
        f"coverage_kept_{study.SHIFTS[0]}",
        "coverage_rise_3",
        "coverage_less_all",
        "coverage_less_random",
    }


def test_a_study_that_was_ended_shows_what_it_knows_and_no_bar_that_it_does_not(tmp_path: Path) -> None:
    write_study(tmp_path, turns=2)
    doc = study.document(tmp_path)
    assert set(doc["bars"]) == {"coverage_rise_1", "coverage_rise_2", "share"}
    assert doc["success"]["coverage"][study.SHIFTS[0]][3] is None
    lines = study.table(doc)[1]
    assert ["after turn 3", study.SHIFTS[0], "–", "–", "–"] in lines
    assert study.turns(out=tmp_path)["bars"] == doc["bars"]
    with pytest.raises(ConfigError, match=r"holds no study.*add --full"):
        study.turns(out=tmp_path / "none")


STEP = """
import os, pathlib, sys, time
name, out = sys.argv[1:]
with open(out + ".ran", "a") as f:
    f.write(f"{os.getpid()}\\n")
if name == "hangs" and not pathlib.Path(out + ".let-go").exists():
    time.sleep(600)
if name == "fails":
    sys.exit(3)
pathlib.Path(out).write_text("{}")
"""


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[study.Step]:
    """Steps whose processes are tiny: one that is done at once, one that hangs, one that comes after it."""
    nothing = Demonstrate("", "")

    def command(task: Demonstrate, result: Path) -> list[str]:
        return [sys.executable, "-c", STEP, result.stem, str(result)]

    monkeypatch.setattr(turn_steps, "command", command)
    monkeypatch.setattr(study, "LOOK_S", 0.01)
    monkeypatch.setattr(study, "_publish", lambda out: {})
    names = {"quick": (), "hangs": (), "after": ("quick", "hangs")}
    return [study.Step(name, needs, nothing) for name, needs in names.items()]


def ran(out: Path, name: str) -> list[int]:
    path = out / f"{name}.json.ran"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_a_study_that_is_ended_leaves_no_process_and_goes_on_without_repeating_what_was_done(
    steps: list[study.Step], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(seconds: float) -> None:
        if (tmp_path / "quick.json").exists() and ran(tmp_path, "hangs"):
            raise KeyboardInterrupt  # what SIGTERM is to a benchmark

    with monkeypatch.context() as m:
        m.setattr(time, "sleep", look)
        with pytest.raises(KeyboardInterrupt):
            study._work(steps, tmp_path, ROOT)
    (hanging,) = ran(tmp_path, "hangs")
    assert not Path(f"/proc/{hanging}").exists()
    assert not ran(tmp_path, "after"), "it began before what it needs was there"
    (tmp_path / "hangs.json.let-go").touch()
    study._work(steps, tmp_path, ROOT)
    assert [len(ran(tmp_path, s.name)) for s in steps] == [1, 2, 1]
    assert all(s.result(tmp_path).exists() for s in steps)


def test_a_step_that_fails_time_and_again_is_named_and_the_others_are_done(
    steps: list[study.Step], tmp_path: Path
) -> None:
    (tmp_path / "hangs.json.let-go").touch()
    bad = study.Step("fails", (), steps[0].task)
    waits = study.Step("waits", ("fails",), steps[0].task)
    with pytest.raises(StageError, match=r"fails failed 3 times: see .*fails\.log; the study goes on"):
        study._work([bad, waits, *steps], tmp_path, ROOT)
    assert len(ran(tmp_path, "fails")) == 3
    assert not ran(tmp_path, "waits")
    assert all(s.result(tmp_path).exists() for s in steps)


# ── what is drawn ────────────────────────────────────────────────────────────────────────────────────


def test_the_plot_shows_each_rate_with_its_interval_in_its_shifts_panel() -> None:
    rates: dict[str, list[Proportion | None]] = {
        "dim": [wilson(0, 50), wilson(40, 50)],
        "lab": [wilson(50, 50), None],
    }
    figure = success_by_turn({"policy": rates}, ["dim", "lab"], {"dim": 1})
    dim, lab = figure.axes
    drawn: list[Any] = [dim.containers[0], lab.containers[0]]
    assert (dim.get_title(), lab.get_title()) == ("dim (turn 1)", "lab")
    points = drawn[0].lines
    assert list(points[0].get_ydata()) == pytest.approx([0.0, 80.0])
    ends = [y for segment in points[2][0].get_segments() for y in segment[:, 1]]
    p = wilson(40, 50)
    assert ends[2:] == pytest.approx([100 * p.low, 100 * p.high])
    assert list(drawn[1].lines[0].get_ydata()) == [100.0]


def test_a_report_of_one_turn_has_no_such_plot() -> None:
    assert _by_turn({}) == ""
    p = wilson(40, 50).model_dump()
    turn = {"turn": "turn-a", "shift": next(iter(SHIFTS)), "digest": "d" * 64}
    assert _by_turn({"by_turn": {"turns": [turn], "success": {"lab": [p, p]}}})
