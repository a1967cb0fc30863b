"""Questions as a form: numbers stay with their episodes, and what is no answer is none."""

from __future__ import annotations

from typing import Any

import pytest

from flywheel.aspects import fields
from flywheel.errors import StageError
from flywheel.label import Aspect, Question, Questions, form
from flywheel.label import answers as saying
from flywheel.label.answers import Evidence, Said
from tests.bucket import BucketStore

ID = "0190b0b0-0000-7000-8000-00000000000{}"
EVIDENCE = Evidence(votes={Aspect.CAUSE: {"novelty": "latency"}}, features={"novelty": 1.0})


def question(n: int, worth: float) -> Question:
    return Question(
        episode_id=ID.format(n),
        site="lab",
        robot="r1",
        prefix=f"episodes/site=lab/robot=r1/date=2026-01-0{n}/{ID.format(n)}/",
        task="pick the <b>red</b> box",
        why="unsure",
        worth=worth,
        cluster="timeout",
        cluster_size=3,
        labels={Aspect.CAUSE: Said(word="latency", confidence=0.4)},
        cause_why="",
        evidence=EVIDENCE,
    )


def ask(store: BucketStore, turn: str, *numbers: int) -> None:
    questions = tuple(question(n, worth=10.0 - n) for n in numbers)
    saying.ask(store, turn, Questions(budget=5, unsure=len(numbers), questions=questions))


@pytest.fixture
def store() -> BucketStore:
    return BucketStore()


def ids(questions: list[Question]) -> list[int]:
    return [int(q.episode_id[-1]) for q in questions]


def test_no_episode_is_in_two_forms_and_a_repeat_asks_the_same(store: BucketStore) -> None:
    ask(store, "turn-a", 1, 2, 3)
    assert ids(form.make(store, "run-1", 2)) == [1, 2]
    ask(store, "turn-b", 4, 3)
    assert ids(form.make(store, "run-1", 2)) == [1, 2], "what a killed attempt had chosen"
    assert ids(form.make(store, "run-2", 5)) == [3, 4]
    assert form.make(store, "run-3", 5) == []


def test_what_was_answered_in_the_terminal_is_not_asked(store: BucketStore) -> None:
    ask(store, "turn-a", 1, 2)
    saying.answer(store, ID.format(1), {Aspect.CAUSE: "hardware"}, "ann", 1)
    assert ids(form.make(store, "run-1", 5)) == [2]


def test_words_come_to_the_episode_of_their_number(store: BucketStore) -> None:
    ask(store, "turn-a", 1, 2, 3)
    form.make(store, "run-1", 3)
    given = dict.fromkeys(fields(3), "") | {"cause_02": "hardware", "phase_02": "grasp", "note": "belt"}
    for _ in range(2):  # a repeat says nothing new
        form.keep(store, "run-1", given, "ann", 7)
    (said,) = saying.collect(store).answers
    assert said.episode_id == ID.format(2)
    assert said.words == {Aspect.CAUSE: "hardware", Aspect.PHASE: "grasp"}
    assert (said.by, said.t_unix_ns, said.note, said.evidence) == ("ann", 7, "belt", EVIDENCE)


@pytest.mark.parametrize(
    ("given", "by", "what"),
    [
        ({"cause_01": "gremlins"}, "ann", "cause_01 = 'gremlins': choose one of none, distribution_shift"),
        ({"cause_02": "latency"}, "ann", "the form asks 1 questions"),
        ({"cause_01": ["latency"]}, "ann", "choose one of"),
        ({"cause_01": "latency"}, "", "answers of nobody"),
        ({"owner": "root"}, "ann", "owner"),
    ],
)
def test_input_that_the_form_did_not_ask_for_keeps_nothing(
    store: BucketStore, given: dict[str, Any], by: str, what: str
) -> None:
    ask(store, "turn-a", 1)
    form.make(store, "run-1", 5)
    with pytest.raises(StageError, match=what):
        form.keep(store, "run-1", given, by, 7)
    assert saying.collect(store).answers == ()


def test_a_field_beyond_the_questions_costs_none_of_the_other_answers(store: BucketStore) -> None:
    ask(store, "turn-a", 1, 2)
    form.make(store, "run-1", 5)
    given = {"cause_01": "latency", "phase_02": "grasp", "cause_02": "gremlins", "cause_04": "hardware"}
    with pytest.raises(StageError, match=r"cause_02.*cause_04.*about 2 episodes are kept"):
        form.keep(store, "run-1", given, "ann", 7)
    kept = {a.episode_id: a.words for a in saying.collect(store).answers}
    assert kept == {ID.format(1): {Aspect.CAUSE: "latency"}, ID.format(2): {Aspect.PHASE: "grasp"}}


def test_a_form_that_nobody_filled_in_says_nothing(store: BucketStore) -> None:
    ask(store, "turn-a", 1)
    form.make(store, "run-1", 5)
    assert form.keep(store, "run-1", dict.fromkeys(fields(5), ""), "", 7) == []


def test_a_question_that_is_gone_shifts_no_numbers(store: BucketStore) -> None:
    ask(store, "turn-a", 1, 2)
    form.make(store, "run-1", 5)
    ask(store, "turn-a", 2)
    with pytest.raises(StageError, match="not in the store any more"):
        form.keep(store, "run-1", {"cause_01": "latency"}, "ann", 7)


def test_each_question_has_a_picture_a_plot_and_its_labels() -> None:
    text = form.body([question(1, 1.0), question(2, 1.0)])
    for n in (1, 2):
        at = f"episodes%2Fsite%3Dlab%2Frobot%3Dr1%2Fdate%3D2026-01-0{n}%2F{ID.format(n)}%2F"
        assert f"](/fleet/thumbnail?at={at})" in text
        assert f"](/fleet/plot?at={at})" in text
    assert text.count("| cause | latency | 0.40 |") == 2
