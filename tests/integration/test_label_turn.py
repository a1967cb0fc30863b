"""Answers on their way into a turn, and its questions on their way to people: real git, DVC and store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flywheel.config import Deployment
from flywheel.label import Answers, Aspect, Question, Questions
from flywheel.label import answers as saying
from flywheel.label.answers import Evidence
from flywheel.store import Store
from flywheel.turn import ANSWERS, open_turn, run_stage
from tests.checkouts import fail_on_a_robot, make_checkout

pytestmark = pytest.mark.integration
ASKS = """
if stage == "label":
    write("labels/queue.json", pathlib.Path("queue.json").read_text())
"""
EVIDENCE = Evidence(votes={Aspect.CAUSE: {"novelty": "distribution_shift"}}, features={"novelty": 1.0})


def test_a_turn_learns_from_what_was_said_when_it_opened_and_asks_once_it_has_labelled(
    tmp_path: Path, store_env: dict[str, str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    monkeypatch.setenv("FLYWHEEL_CHECKOUT", str(checkout))
    monkeypatch.setenv("TEST_LOG", str(tmp_path / "stages.log"))
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path / "home"))
    home = Deployment.from_env().home
    one, other = fail_on_a_robot(store, tmp_path, 1, 2)
    question = Question(
        episode_id=other,
        site="local",
        robot="r1",
        prefix="episodes/x/",
        task="pick",
        why="unsure",
        worth=2.0,
        cluster="timeout-approach-01",
        cluster_size=4,
        labels={},
        cause_why="",
        evidence=EVIDENCE,
    )
    queue = Questions(budget=1, unsure=1, questions=(question,))
    (checkout / "queue.json").write_bytes(queue.to_bytes())
    (checkout / "stage.py").write_text((checkout / "stage.py").read_text() + ASKS)
    saying.answer(store, one, {Aspect.CAUSE: "hardware"}, "ann", 1, evidence=EVIDENCE)

    assert open_turn("turn-said") is not None
    saying.answer(store, one, {Aspect.CAUSE: "latency"}, "ann", 2, evidence=EVIDENCE)  # too late for it
    told = home / "runs" / "turn-said" / ANSWERS
    for _ in range(2):  # also where the workspace has to be made anew
        found = Answers.model_validate_json(told.read_bytes())
        assert found.agreed() == {one: {Aspect.CAUSE: "hardware"}}
        shutil.rmtree(told.parents[1])
        assert open_turn("turn-said") is not None

    assert saying.waiting(store) == []
    for stage in ("curate", "label"):
        assert run_stage("turn-said", stage) == 0
    assert saying.waiting(store) == [("turn-said", question)]
    saying.answer(store, other, {Aspect.CAUSE: "hardware"}, "bob", 3)
    assert saying.waiting(store) == []
    assert saying.collect(store).evidence()[other] == EVIDENCE
