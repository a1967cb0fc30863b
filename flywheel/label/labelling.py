"""Many episodes together: models learned from them and from people's answers, and a label of every aspect."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flywheel.aspects import WORDS, Aspect
from flywheel.label.answers import Answers, Evidence
from flywheel.label.functions import FUNCTIONS, Vote, vote
from flywheel.label.learned import FEWEST, Calibration, Classifier, calibrate, train
from flywheel.label.model import LabelModel, fit
from flywheel.label.signals import Signals

FOLDS = 5  # answers by which a confidence is calibrated have not made the label that they judge
STATED = {
    aspect: LabelModel.stated(words, {f.name: f.accuracy for f in FUNCTIONS if f.aspect is aspect})
    for aspect, words in WORDS.items()
}


@dataclass(frozen=True)
class Word:
    """A word of one aspect and the calibrated probability that it is right; 1 where a person said it."""

    word: str
    confidence: float
    by_person: bool = False


@dataclass(frozen=True)
class Labeller:
    """What decides one aspect."""

    model: LabelModel
    classifier: Classifier | None = None
    calibration: Calibration = field(default_factory=Calibration)

    def posterior(self, e: Evidence, aspect: Aspect) -> NDArray[np.float64]:
        """Of the words, ``[K]``: the functions' and the classifier's, pooled."""
        p = self.model.posterior(e.votes.get(aspect, {}))
        if self.classifier is None:
            return p
        share = self.classifier.share
        pooled: NDArray[np.float64] = (1.0 - share) * p + share * self.classifier.probabilities(
            e.features, self.model.words
        )
        return pooled

    def trust(self, aspect: Aspect, function: str) -> float:
        """How often a function is right: as it states, until people have said enough to know better."""
        known = self.model if self.calibration.answers >= FEWEST else STATED[aspect]
        return known.accuracy[function]

    def say(self, e: Evidence, aspect: Aspect) -> Word:
        """The likeliest word; the earlier one in a tie."""
        p = self.posterior(e, aspect).round(9)
        best = int(p.argmax())
        return Word(self.model.words[best], round(self.calibration.confidence(float(p[best])), 6))


Labellers = Mapping[Aspect, Labeller]
UNTAUGHT: Labellers = {aspect: Labeller(model) for aspect, model in STATED.items()}


def evidence(s: Signals) -> tuple[Evidence, tuple[Vote, ...]]:
    """What the functions say of one episode, in the form that answers keep."""
    votes = vote(s)
    cast = {a: {v.function: v.word for v in votes if v.aspect is a} for a in Aspect}
    return Evidence(votes=cast, features=s.features()), votes


def learn(now: Mapping[str, Evidence], answers: Answers) -> Labellers:
    """From the episodes at hand (by id) and from every answer that carries its evidence."""
    agreed, carried = answers.agreed(), answers.evidence()
    known = {k: now.get(k) or carried.get(k) for k in agreed}
    taught = {k: e for k, e in known.items() if e is not None}
    return {
        aspect: _labeller(
            aspect, now, {k: (taught[k], agreed[k][aspect]) for k in sorted(taught) if aspect in agreed[k]}
        )
        for aspect in Aspect
    }


def _labeller(
    aspect: Aspect, now: Mapping[str, Evidence], answered: Mapping[str, tuple[Evidence, str]]
) -> Labeller:
    whole = _taught(aspect, now, answered)
    posteriors, right = [], []
    for fold in range(FOLDS):
        judged = {k: x for k, x in answered.items() if _fold(k) == fold}
        if not judged:
            continue
        others = {k: x for k, x in answered.items() if k not in judged}
        rest = {k: e for k, e in now.items() if k not in judged}
        made = _taught(aspect, rest, others)
        for e, word in judged.values():
            p = made.posterior(e, aspect).round(9)
            posteriors.append(float(p.max()))
            right.append(made.model.words[int(p.argmax())] == word)
    return Labeller(whole.model, whole.classifier, calibrate(posteriors, right))


def _taught(
    aspect: Aspect, now: Mapping[str, Evidence], answered: Mapping[str, tuple[Evidence, str]]
) -> Labeller:
    silent = [now[k] for k in sorted(now) if k not in answered]
    said = [answered[k] for k in sorted(answered)]
    votes = [e.votes.get(aspect, {}) for e in (*silent, *(e for e, _ in said))]
    words = [*([None] * len(silent)), *(w for _, w in said)]
    classifier = train([e.features for e, _ in said], [w for _, w in said])
    return Labeller(fit(STATED[aspect], votes, words), classifier)


def _fold(episode_id: str) -> int:
    return hashlib.sha256(f"fold\n{episode_id}".encode()).digest()[0] % FOLDS


def words_of(
    e: Evidence, labellers: Labellers, said: Mapping[Aspect, str] | None = None
) -> dict[Aspect, Word]:
    """The label of every aspect; what people agree on stands as they said it."""
    found = {a: labellers[a].say(e, a) for a in Aspect}
    return found | {a: Word(w, 1.0, by_person=True) for a, w in (said or {}).items()}


def reason(votes: Sequence[Vote], cause: str) -> str:
    """The evidence for a cause: of the functions that named it, the one that is right most often."""
    accuracy = STATED[Aspect.CAUSE].accuracy
    named = [v for v in votes if v.aspect is Aspect.CAUSE and v.word == cause]
    if not named:
        return "no labelling function could tell"
    return max(named, key=lambda v: accuracy[v.function]).why
