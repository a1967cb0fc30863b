"""What a turn may be called and set, and that the pipeline in dvc.yaml is the one that turns run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from flywheel import turn as turning
from flywheel.cli import app
from flywheel.config import Settings
from flywheel.dataset.earlier import EARLIER, Earlier, read_earlier
from flywheel.errors import ConfigError
from flywheel.turn import STAGES, TURN, adjusted, turn_name

ROOT = Path(__file__).resolve().parents[1]
PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
IGNORED = {f"data{line}" for line in (ROOT / "data" / ".gitignore").read_text().split()}


def paths(stage: str, kind: str, cached: bool = True) -> list[str]:
    entries = PIPELINE[stage].get(kind, [])
    named = [(e, {}) if isinstance(e, str) else next(iter(e.items())) for e in entries]
    return [p for p, flags in named if flags.get("cache", True) is cached]


def test_a_turns_name_is_the_same_for_every_attempt_and_differs_between_runs() -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    run = "asset_triggered__2026-01-02T03:04:05.123+00:00_Ab/c"
    assert turn_name(run, when) == turn_name(run, when)
    assert turn_name(run, when) != turn_name(run + "x", when)
    assert TURN.fullmatch(turn_name(run, when))
    assert turn_name(run, when).startswith("turn-20260102-030405-")


def test_settings_of_a_turn_change_only_what_they_name_and_keep_the_comments() -> None:
    text = (ROOT / "params.yaml").read_text()
    after = adjusted(text, {"train.steps": 7}, "data/current")
    before, now = Settings.parse(text, "before"), Settings.parse(after, "after")
    assert now.train.steps == 7
    assert now.turn.policy == "data/current"
    assert now.model_copy(update={"train": before.train, "turn": before.turn}) == before
    assert [x for x in after.splitlines() if x.startswith("#")] == [
        x for x in text.splitlines() if x.startswith("#")
    ]


@pytest.mark.parametrize(
    "name",
    ["gate.min_lift", "rollout.approvals", "trigger.min_episodes", "turn.policy", "train", "train.a.b", ""],
)
def test_no_form_can_lower_a_bar(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be set for one turn"):
        adjusted("train: {steps: 1}\n", {name: 0}, "models/base")


@pytest.mark.parametrize("value", [0, "many", None, {"x": 1}, float("nan")])
def test_a_setting_out_of_range_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps"):
        adjusted("train: {steps: 1}\n", {"train.steps": value}, "models/base")


def test_the_pipeline_has_the_stages_that_turns_run() -> None:
    assert tuple(PIPELINE) == STAGES


def test_every_stage_calls_a_command_that_exists() -> None:
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    known |= {g.name for g in app.registered_groups if g.name}
    for name, stage in PIPELINE.items():
        program, command, *_ = stage["cmd"].split()
        assert (program, command) == ("flywheel", name)
        assert command in known


def test_the_code_that_a_stage_depends_on_exists() -> None:
    for name in STAGES:
        code = [d for d in PIPELINE[name]["deps"] if not d.startswith(("data/", "${"))]
        missing = [d for d in code if not (ROOT / d).exists()]
        assert missing == [], f"{name}: dvc repro would stop at {missing}"


def test_every_input_is_made_by_an_earlier_stage_or_comes_with_the_turn() -> None:
    made = {"data/episodes", turning.ANSWERS, turning.EARLIER_DATA}
    for name in STAGES:
        needed = {d for d in PIPELINE[name]["deps"] if d.startswith("data/")}
        assert needed <= made, name
        made |= {*paths(name, "outs"), *paths(name, "metrics", cached=False)}
    assert {turning.DATASET, turning.BUNDLE, turning.CHECKPOINT, turning.GATE_REPORT} <= made


def test_git_ignores_what_dvc_keeps_and_nothing_that_git_keeps() -> None:
    for name in STAGES:
        assert set(paths(name, "outs")) <= IGNORED, name
        figures = {*paths(name, "metrics", cached=False), *paths(name, "plots", cached=False)}
        assert not figures & IGNORED, name
    with_turn = {turning.RECORD, turning.CLAIMS, turning.CURRENT_POLICY, f"{turning.EARLIER_DATA}/*"}
    assert {*with_turn, "data/episodes"} <= IGNORED


def test_in_a_checkout_nothing_came_earlier_and_the_stages_run_by_hand() -> None:
    assert read_earlier(ROOT / turning.EARLIER_DATA) == []
    assert Earlier.model_validate_json((ROOT / turning.EARLIER_DATA / EARLIER).read_bytes()) == Earlier()
    assert (ROOT / turning.ANSWERS).exists()


def test_a_stage_is_run_again_when_its_own_settings_change() -> None:
    for name in STAGES:
        if name in Settings.model_fields:
            assert name in PIPELINE[name]["params"], name


def test_dvc_settings_hold_nothing_of_a_machine() -> None:
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config
    assert "endpointurl" not in config
    assert "://127" not in config
