"""How votes become one word: a label model with learned accuracies, and functions that may abstain.

The one-coin model of Dawid and Skene 1979 ("Maximum Likelihood Estimation of Observer Error-Rates Using the
EM Algorithm"; one coin a function as in Zhang et al. 2014, "Spectral Methods Meet EM"): function f is right
with probability a_f and otherwise names any other word alike,

    p(y | votes) ∝ π_y Π_f  a_f if v_f = y else (1 - a_f) / (K - 1),      over those that do not abstain.

Expectation-maximisation with a prior: a_f starts from the function's stated accuracy, worth ``PRIOR_VOTES``
votes. What nobody has answered counts for at most as much again, however many episodes there are, so that
functions that err alike cannot vote the sound one down; an answer counts in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PRIOR_VOTES = 20.0
PRIOR_EPISODES = 1.0  # of each word, in π
ITERATIONS = 25
SURE = 0.99  # no function is trusted more, whatever it got right

Floats = NDArray[np.float64]
Votes = Mapping[str, str]  # function -> word


@dataclass(frozen=True)
class LabelModel:
    """Of one aspect. ``accuracy``: by function; ``prior``: π, in the order of ``words``."""

    words: tuple[str, ...]
    accuracy: Mapping[str, float]
    prior: tuple[float, ...]

    @classmethod
    def stated(cls, words: tuple[str, ...], accuracy: Mapping[str, float]) -> LabelModel:
        """By what the functions state of themselves, every word alike."""
        return cls(words, dict(accuracy), tuple(1.0 / len(words) for _ in words))

    def posterior(self, votes: Votes) -> Floats:
        """Probability of each word, ``[K]``. Votes of functions that it does not know count for nothing."""
        log = np.log(np.asarray(self.prior))
        for name, word in sorted(votes.items()):
            if name in self.accuracy and word in self.words:
                a = self.accuracy[name]
                wrong = np.log((1.0 - a) / (len(self.words) - 1))
                log = log + np.where(np.arange(len(self.words)) == self.words.index(word), np.log(a), wrong)
        p = np.exp(log - log.max())
        normalised: Floats = p / p.sum()
        return normalised


def fit(start: LabelModel, votes: Sequence[Votes], answers: Sequence[str | None]) -> LabelModel:
    """Learn accuracies from episodes; ``answers``: the true word where a person has said it, else None.

    Deterministic; the order of the episodes does not matter but for rounding, which is at 9 digits.
    """
    words, names = start.words, sorted(start.accuracy)
    k = len(words)
    at = {w: i for i, w in enumerate(words)}
    cast = np.array([[at.get(v.get(f, ""), -1) for f in names] for v in votes], int).reshape(-1, len(names))
    known = np.array([at.get(a, -1) if a is not None else -1 for a in answers], int)
    voted = cast >= 0
    said = known >= 0
    stated = np.array([start.accuracy[f] for f in names])
    silent = voted[~said].sum(axis=0)
    share = np.minimum(1.0, PRIOR_VOTES / np.maximum(silent, 1))  # what an unanswered episode counts for
    weight = np.where(said[:, None], 1.0, share[None, :]) * voted
    accuracy, prior = stated.copy(), np.asarray(start.prior)
    for _ in range(ITERATIONS):
        model = LabelModel(words, dict(zip(names, accuracy.tolist(), strict=True)), tuple(prior.tolist()))
        p = np.stack([model.posterior(v) for v in votes]) if votes else np.zeros((0, k))
        p[said] = np.eye(k)[known[said]]
        right = np.take_along_axis(p, np.maximum(cast, 0), axis=1) if len(p) else np.zeros(cast.shape)
        counted = PRIOR_VOTES + weight.sum(axis=0)
        accuracy = (PRIOR_VOTES * stated + (weight * right).sum(axis=0)) / counted
        accuracy = np.clip(accuracy, 1.0 / k, SURE)
        prior = PRIOR_EPISODES + p.sum(axis=0)
        prior = prior / prior.sum()
    return LabelModel(
        words,
        {f: round(float(a), 9) for f, a in zip(names, accuracy, strict=True)},
        tuple(round(float(x), 9) for x in prior),
    )
