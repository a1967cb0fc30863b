"""The label model and what is learned from answers: recovers what made the votes, honest where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.label.learned import Calibration, calibrate, train
from flywheel.label.model import LabelModel, fit

WORDS = ("a", "b", "c", "d")


def cast(rng: np.random.Generator, truth: list[str], right: float, speaks: float) -> list[str | None]:
    """Votes of a function that is right with this probability and errs alike to all sides."""
    said = []
    for y in truth:
        wrong = [w for w in WORDS if w != y]
        word = y if rng.random() < right else str(rng.choice(wrong))
        said.append(word if rng.random() < speaks else None)
    return said


def electorate(seed: int, n: int, accuracy: dict[str, float]) -> tuple[list[str], list[dict[str, str]]]:
    rng = np.random.default_rng(seed)
    truth = [str(w) for w in rng.choice(WORDS, n)]
    by = {f: cast(rng, truth, a, 0.8) for f, a in accuracy.items()}
    return truth, [{f: w for f, said in by.items() if (w := said[i]) is not None} for i in range(n)]


def share_right(model: LabelModel, votes: list[dict[str, str]], truth: list[str]) -> float:
    said = [WORDS[int(model.posterior(v).argmax())] for v in votes]
    return float(np.mean([a == b for a, b in zip(said, truth, strict=True)]))


def test_answers_teach_which_function_to_believe() -> None:
    # What they state of themselves is the wrong way round: the liar claims 0.9, the honest one 0.5.
    stated = {"liar": 0.9, "honest": 0.5, "other": 0.5}
    truth, votes = electorate(1, 400, {"liar": 0.25, "honest": 0.95, "other": 0.8})
    start = LabelModel.stated(WORDS, stated)
    answers: list[str | None] = [*truth[:150], *([None] * 250)]
    model = fit(start, votes, answers)
    assert model.accuracy["honest"] > 0.85 > model.accuracy["other"] > 0.6 > model.accuracy["liar"]
    before, after = (share_right(m, votes[150:], truth[150:]) for m in (start, model))
    assert after > before + 0.2


def test_functions_that_err_alike_cannot_vote_the_stated_one_down_by_numbers() -> None:
    votes = [{"sound": "a", "x": "b", "y": "b"} for _ in range(5000)]
    model = fit(LabelModel.stated(WORDS, {"sound": 0.95, "x": 0.55, "y": 0.55}), votes, [None] * 5000)
    assert model.accuracy["sound"] > 0.45, "unanswered episodes outweighed what was stated"


def test_a_single_answer_moves_little() -> None:
    start = LabelModel.stated(WORDS, {"f": 0.8})
    model = fit(start, [{"f": "a"}], ["b"])
    assert 0.7 < model.accuracy["f"] < 0.8


word = st.sampled_from(WORDS)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(["f", "g", "h"]), word), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_episodes_does_not_matter(votes: list[dict[str, str]], random: object) -> None:
    start = LabelModel.stated(WORDS, {"f": 0.9, "g": 0.7, "h": 0.5})
    answers: list[str | None] = [v.get("h") for v in votes]
    pairs = list(zip(votes, answers, strict=True))
    random.shuffle(pairs)  # type: ignore[attr-defined]
    one = fit(start, votes, answers)
    other = fit(start, [v for v, _ in pairs], [a for _, a in pairs])
    assert one.accuracy == pytest.approx(other.accuracy, abs=1e-6)
    assert one.prior == pytest.approx(other.prior, abs=1e-6)


@given(st.dictionaries(st.sampled_from(["f", "g", "stranger"]), st.sampled_from([*WORDS, "nonsense"])))
def test_a_posterior_is_a_distribution_and_nobody_unknown_is_heard(votes: dict[str, str]) -> None:
    model = LabelModel.stated(WORDS, {"f": 0.9, "g": 0.6})
    p = model.posterior(votes)
    assert p.sum() == pytest.approx(1.0)
    known = {f: w for f, w in votes.items() if f != "stranger" and w != "nonsense"}
    assert p == pytest.approx(model.posterior(known))


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_confidence_is_a_fraction_and_a_surer_label_is_worth_no_less(p: float, q: float) -> None:
    c = Calibration()
    low, high = sorted((p, q))
    assert 0.0 < c.confidence(low) <= c.confidence(high) < 1.0


def test_confidence_becomes_what_answers_show() -> None:
    rng = np.random.default_rng(3)
    said = rng.uniform(0.9, 0.999, 400)  # very sure of themselves, and right six times in ten
    right = rng.random(400) < 0.6
    c = calibrate(said.tolist(), right.tolist())
    mean = float(np.mean([c.confidence(p) for p in said]))
    assert mean == pytest.approx(right.mean(), abs=0.05)
    assert np.mean([Calibration().confidence(p) for p in said]) > 0.8, "no better than before"


def test_without_answers_confidence_is_the_prior_and_few_answers_move_it_little() -> None:
    assert calibrate([], []) == Calibration()
    one = calibrate([0.9], [False])
    assert abs(one.confidence(0.9) - Calibration().confidence(0.9)) < 0.15


def test_the_classifier_learns_a_word_from_numbers_and_is_silent_on_few_answers() -> None:
    rng = np.random.default_rng(0)
    dark = [{"brightness": float(rng.normal(0.1, 0.02)), "stale": float(rng.random())} for _ in range(20)]
    light = [{"brightness": float(rng.normal(0.5, 0.02)), "stale": float(rng.random())} for _ in range(20)]
    made = train([*dark, *light], ["b"] * 20 + ["a"] * 20)
    assert made is not None
    assert made.probabilities({"brightness": 0.1, "stale": 0.5}, WORDS).argmax() == WORDS.index("b")
    assert made.probabilities({}, WORDS).sum() == pytest.approx(1.0), "a missing number is an average one"
    assert train(dark[:5], ["a", "b", "a", "b", "a"]) is None
    assert train(dark, ["a"] * 20) is None
