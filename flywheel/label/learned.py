"""What is learned from people's answers: a small classifier over the signals, and what a confidence is worth.

The classifier is multinomial logistic regression on standardised numbers, with an L2 penalty, fitted by
L-BFGS (scipy); it speaks only of words that people have used. Confidence is calibrated by Platt's scaling
(Platt 1999), fitted as a posterior: a prior says what confidences are worth where nobody has answered, and
answers move it, a few by little (in the spirit of Platt's own regularised targets).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST = 12  # answers of an aspect from which the classifier speaks, at least FEWEST_WORDS of them different
FEWEST_WORDS = 2
RIDGE = 1.0
HALF_HEARD = 60  # answers at which the classifier counts as much as the labelling functions together

# What a posterior is worth before anybody has answered. Functions that look at the same sensor are not the
# independent witnesses that the model takes them for, so its odds are too far from even.
PRIOR_SLOPE, PRIOR_OFFSET = 0.6, 0.0
SLOPE_SIGMA, OFFSET_SIGMA = 0.3, 0.7
CERTAIN = 1e-6

Floats = NDArray[np.float64]
Features = Mapping[str, float]


@dataclass(frozen=True)
class Classifier:
    """Softmax regression. ``names``: its inputs; ``words``: what it may say; weights ``[F + 1, K]``."""

    names: tuple[str, ...]
    words: tuple[str, ...]
    centre: Floats
    scale: Floats
    weights: Floats
    answers: int

    def probabilities(self, features: Features, words: tuple[str, ...]) -> Floats:
        """``[len(words)]``; zero for words that nobody has used. A missing number is an average one."""
        x = np.array([features.get(n, c) for n, c in zip(self.names, self.centre, strict=True)])
        z = np.append((x - self.centre) / self.scale, 1.0) @ self.weights
        p = np.exp(z - z.max())
        by_word = dict(zip(self.words, (p / p.sum()).tolist(), strict=True))
        return np.array([by_word.get(w, 0.0) for w in words])

    @property
    def share(self) -> float:
        """How much it counts beside the labelling functions, 0..1: a linear opinion pool."""
        return self.answers / (self.answers + HALF_HEARD)


def train(features: Sequence[Features], answers: Sequence[str]) -> Classifier | None:
    """None where too few have answered."""
    from scipy.optimize import minimize

    words = tuple(sorted(set(answers)))
    if len(answers) < FEWEST or len(words) < FEWEST_WORDS:
        return None
    names = tuple(sorted({n for f in features for n in f}))
    table = np.array([[f.get(n, np.nan) for n in names] for f in features])
    centre = np.nanmean(table, axis=0)
    table = np.where(np.isnan(table), centre, table)
    scale = table.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x = np.column_stack([(table - centre) / scale, np.ones(len(table))])
    y = np.eye(len(words))[[words.index(a) for a in answers]]
    shape = (x.shape[1], len(words))
    penalty = np.full(shape, RIDGE)
    penalty[-1] = 0.01  # the offset hardly

    def loss(flat: Floats) -> tuple[float, Floats]:
        w = flat.reshape(shape)
        z = x @ w
        z = z - z.max(axis=1, keepdims=True)
        log = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        value = -float((y * log).sum()) + 0.5 * float((penalty * w * w).sum())
        return value, (x.T @ (np.exp(log) - y) + penalty * w).ravel()

    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B")
    return Classifier(names, words, centre, scale, found.x.reshape(shape).round(9), len(answers))


@dataclass(frozen=True)
class Calibration:
    """``confidence = σ(slope · logit(p) + offset)`` for a label of posterior p; ``answers`` it rests on."""

    slope: float = PRIOR_SLOPE
    offset: float = PRIOR_OFFSET
    answers: int = 0

    def confidence(self, p: float) -> float:
        """How probable it is that a label of posterior ``p`` is right."""
        z = self.slope * _logit(p) + self.offset
        return float(1.0 / (1.0 + np.exp(-z)))


def calibrate(posteriors: Sequence[float], right: Sequence[bool]) -> Calibration:
    """From labels that were made without the answer and whether the answer agreed.

    The maximum of the posterior under normal priors; with no answers, the prior. The slope is kept
    non-negative: a surer label is never worth less.
    """
    from scipy.optimize import minimize

    if not len(posteriors):
        return Calibration()
    z = np.array([_logit(p) for p in posteriors])
    sign = np.where(np.asarray(right, bool), 1.0, -1.0)

    def loss(x: Floats) -> float:
        fitted = float(np.logaddexp(0.0, -sign * (x[0] * z + x[1])).sum())
        far = ((x[0] - PRIOR_SLOPE) / SLOPE_SIGMA) ** 2 + ((x[1] - PRIOR_OFFSET) / OFFSET_SIGMA) ** 2
        return fitted + 0.5 * float(far)

    start = np.array([PRIOR_SLOPE, PRIOR_OFFSET])
    found = minimize(loss, start, method="L-BFGS-B", bounds=[(0.0, None), (None, None)])
    return Calibration(round(float(found.x[0]), 6), round(float(found.x[1]), 6), len(posteriors))


def _logit(p: float) -> float:
    p = min(max(p, CERTAIN), 1.0 - CERTAIN)
    return float(np.log(p / (1.0 - p)))
