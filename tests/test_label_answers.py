"""Questions and answers: the budget holds, nothing said is lost, what people say teaches the next turn."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flywheel.cli import app
from flywheel.config import LabelSettings
from flywheel.errors import StageError
from flywheel.label import Answer, Answers, Aspect, Question, Questions, label
from flywheel.label import answers as saying
from flywheel.label.answers import Evidence, Said
from flywheel.label.choosing import choose
from flywheel.schema import Outcome, Trigger, TriggerKind
from tests.attempts import POLICY_NS, attempt
from tests.bucket import BucketStore

ID = "0190b0b0-0000-7000-8000-00000000000{}"
MODE, CAUSE = Aspect.FAILURE_MODE, Aspect.CAUSE
EVIDENCE = Evidence(votes={MODE: {"outcome": "dropped"}}, features={"brightness": 0.4})


def said(episode: str, word: str, by: str, t: int, aspect: Aspect = MODE) -> Answer:
    return Answer(episode_id=episode, words={aspect: word}, by=by, t_unix_ns=t, evidence=EVIDENCE)


def test_people_who_disagree_teach_nothing_and_are_shown() -> None:
    a = Answers(answers=(said(ID.format(1), "dropped", "ann", 1), said(ID.format(1), "tracking", "bob", 2)))
    assert a.agreed() == {}
    assert a.conflicts() == {ID.format(1): {MODE: {"ann": "dropped", "bob": "tracking"}}}
    third = Answers(answers=(*a.answers, said(ID.format(1), "tracking", "cid", 3)))
    assert third.agreed() == {ID.format(1): {MODE: "tracking"}}
    assert third.conflicts(), "who was outvoted is still shown"


def test_whoever_answers_twice_has_changed_their_mind_and_both_are_kept() -> None:
    a = Answers(answers=(said(ID.format(1), "tracking", "ann", 2), said(ID.format(1), "dropped", "ann", 1)))
    assert a.agreed() == {ID.format(1): {MODE: "tracking"}}
    assert len(a.of(ID.format(1))) == 2
    assert a.conflicts() == {}


def test_an_answer_outside_of_the_words_is_refused_by_name() -> None:
    store = BucketStore()
    with pytest.raises(StageError, match=r"cause = 'gremlins'.*distribution_shift"):
        saying.answer(store, ID.format(1), {CAUSE: "gremlins"}, "ann", 1, evidence=EVIDENCE)
    with pytest.raises(StageError, match="nothing was asked"):
        saying.answer(store, ID.format(1), {CAUSE: "latency"}, "ann", 1)
    with pytest.raises(StageError, match="by"):
        saying.answer(store, ID.format(1), {CAUSE: "latency"}, "", 1, evidence=EVIDENCE)
    assert saying.collect(store).answers == ()


def test_two_people_who_answer_at_the_same_instant_are_both_kept() -> None:
    store = BucketStore()
    for by, word in (("ann", "latency"), ("bob", "hardware"), ("ann", "latency")):
        saying.answer(store, ID.format(1), {CAUSE: word}, by, 7, evidence=EVIDENCE)
    assert sorted(a.by for a in saying.collect(store).answers) == ["ann", "bob"]


def test_the_terminal_asks_takes_answers_and_shows_who_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    store = BucketStore()
    monkeypatch.setattr("flywheel.services.environment.store", lambda: store)
    labels = {MODE: Said(word="dropped", confidence=0.4), CAUSE: Said(word="hardware", confidence=0.3)}
    question = Question(
        episode_id=ID.format(1),
        site="local",
        robot="r1",
        prefix="episodes/x/",
        task="pick",
        why="unsure",
        worth=1.5,
        cluster="dropped-place-01",
        cluster_size=3,
        labels=labels,
        cause_why="the vacuum broke",
        evidence=EVIDENCE,
    )
    saying.ask(store, "turn-a", Questions(budget=1, unsure=1, questions=(question,)))

    def run(*args: str) -> Any:
        return CliRunner().invoke(app, ["label", *args])

    assert [q["episode"] for q in json.loads(run("queue", "--json").output)] == [ID.format(1)]
    first = run("answer", ID.format(1), "--mode", "dropped", "--cause", "hardware", "--by", "ann")
    assert first.exit_code == 0, first.output
    assert json.loads(run("queue", "--json").output) == []
    second = run("answer", ID.format(1), "--cause", "safety", "--by", "bob", "--json")
    assert json.loads(second.output)["conflicts"] == {"cause": {"ann": "hardware", "bob": "safety"}}
    listed = json.loads(run("answers", "--json").output)
    assert [(a["by"], a["disputed"]) for a in listed] == [("ann", "cause"), ("bob", "cause")]
    assert isinstance(run("answer", ID.format(1), "--by", "ann").exception, StageError)
    assert isinstance(run().exception, StageError), "the stage without its options"
    assert "dropped-place" not in saying.shown(question, "turn-a")
    assert "flywheel explain" in saying.shown(question, "turn-a")


def unsure_inbox(root: Path, n: int) -> Path:
    """The cell says that the wrong box was taken, the recorder that the right one was dropped."""
    trigger = Trigger(kind=TriggerKind.DROPPED_OBJECT, t_ns=12 * POLICY_NS)
    for i in range(n):
        attempt(root, "never_reached", seed=i, outcome=Outcome.WRONG_OBJECT, triggers=(trigger,))
    return root


def test_what_was_answered_is_not_asked_again_and_is_the_label(tmp_path: Path) -> None:
    store = BucketStore()
    inbox = unsure_inbox(tmp_path / "in", 4)
    budget = LabelSettings(budget=2, audit_fraction=0.0)
    label(inbox, tmp_path / "one", budget)
    asked = Questions.model_validate_json((tmp_path / "one" / "queue.json").read_bytes())
    assert len(asked.questions) == 2
    assert asked.unsure == 4
    saying.ask(store, "turn-a", asked)
    assert [q.episode_id for _, q in saying.waiting(store)] == [q.episode_id for q in asked.questions]
    first = asked.questions[0].episode_id
    saying.answer(store, first, {MODE: "missed_grasp", CAUSE: "hardware"}, "ann", 1)
    assert first not in {q.episode_id for _, q in saying.waiting(store, "turn-a")}

    told = saying.collect(store)
    result = label(inbox, tmp_path / "two", budget, answers=told)
    again = Questions.model_validate_json((tmp_path / "two" / "queue.json").read_bytes())
    assert first not in {q.episode_id for q in again.questions}
    assert result.failure_modes["missed_grasp"] == 1
    assert result.needs_review == 3


def test_answers_about_other_episodes_change_the_next_turns_labels(tmp_path: Path) -> None:
    # People keep saying that what the functions call never_reached / shift is a faulty drive.
    inbox = tmp_path / "in"
    for i in range(3):
        attempt(inbox, "never_reached", seed=100 + i)
    settings_ = LabelSettings()
    before = label(inbox, tmp_path / "before", settings_)
    assert before.causes == {"distribution_shift": 3}
    earlier = tmp_path / "earlier"
    for i in range(30):
        attempt(earlier, "never_reached", seed=i)
        attempt(earlier, "dropped", seed=i)
    asked = tmp_path / "asked"
    label(earlier, asked, LabelSettings(budget=60, audit_fraction=1.0))
    questions = Questions.model_validate_json((asked / "queue.json").read_bytes()).questions
    told = Answers(
        answers=tuple(
            Answer(
                episode_id=q.episode_id,
                words={CAUSE: "hardware" if q.labels[MODE].word == "never_reached" else "distribution_shift"},
                by="ann",
                t_unix_ns=i,
                evidence=q.evidence,
            )
            for i, q in enumerate(questions)
        )
    )
    after = label(inbox, tmp_path / "after", settings_, answers=told)
    assert after.causes == {"hardware": 3}
    assert after.accuracies["cause.did_as_asked"] < before.accuracies["cause.did_as_asked"] + 0.1


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    inbox = unsure_inbox(tmp_path / "in", 3)
    told = Answers(answers=(said(ID.format(1), "dropped", "ann", 1),))
    outs = []
    for name in ("a", "b"):
        label(inbox, tmp_path / name, LabelSettings(), answers=told)
        outs.append(
            [(tmp_path / name / f).read_bytes() for f in ("labels.parquet", "queue.json", "labels.json")]
        )
    assert outs[0] == outs[1]


ids = st.integers(0, 30).map(str)


@settings(max_examples=100)
@given(
    st.dictionaries(ids, st.floats(0.01, 1.0)),
    st.dictionaries(ids, st.sampled_from("xyz")),
    st.lists(ids),
    st.integers(0, 12),
    st.floats(0, 1),
)
def test_the_budget_holds_and_nobody_is_asked_twice(
    unsure: dict[str, float], rest: dict[str, str], answered: list[str], budget: int, audit: float
) -> None:
    cluster = dict.fromkeys(unsure, "x") | rest
    chosen = choose(unsure, cluster, answered, budget, audit)
    asked = [c.episode_id for c in chosen]
    assert len(asked) == len(set(asked)) <= budget
    assert not set(asked) & set(answered)
    unsure_ones = [c for c in chosen if c.why == "unsure"]
    assert all(a.worth >= b.worth for a, b in pairwise(unsure_ones))


def test_one_frequent_kind_does_not_take_the_whole_budget() -> None:
    cluster = {f"big{i}": "big" for i in range(8)} | {f"mid{i}": "mid" for i in range(5)}
    chosen = choose(dict.fromkeys(cluster, 0.5), cluster, [], 4, 0.0)
    assert [cluster[c.episode_id] for c in chosen].count("mid") >= 1
