"""Checks of the gate over paired attempts in lockstep: pure functions from pairs to a ``Check``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flywheel.evaluate import Attempted
from flywheel.schema import Check, Verdict
from flywheel.stats import (
    confidence_sequence,
    mcnemar,
    paired_difference,
    paired_interval,
    paired_ratio,
    paired_spread_ratio,
    percentiles,
    quantile_range,
    wilson,
)

FloatArray = NDArray[np.float64]

LAB = "lab"
PAST_FAILURES = "past failures"
SWEEP = "robustness sweep"
LATENCY = "latency injected"
TRACKING = "tracking in lockstep"
TRACKING_SPREAD = "tracking spread in lockstep"
TRACKING_LOOKS = 2
TRACKING_RATIO = 1.2  # tail of the tracking error against the current policy's
# Measured in the twin under the scripted operator: p99 of 0.4 to 4 mrad an attempt, the most at contact.
TRACKING_FLOOR_RAD = 0.001  # 0.7 mm at full reach: less does not matter to the task
# Of the logarithms of the attempts' p99: 1.5 is seen with 70 pairs where spreads are equal (`bench stats`).
SPREAD_RATIO = 1.5
SPREAD_FLOOR = 1.5  # p90 over p10 of the attempts: scenes that differ by less are all the same to the task
LEAST_SPREAD_PAIRS = 10
WORSE_HOLD_P, WORSE_ROLL_BACK_P = 0.10, 0.01


class Pair(NamedTuple):
    """The same scene under both policies."""

    current: Attempted
    candidate: Attempted


def hold(name: str, reason: str, bar: str = "") -> Check:
    """A check without evidence: it can only hold."""
    return Check(name=name, verdict=Verdict.HOLD, value=None, bar=bar, n=0, evidence={"reason": reason})


def success(name: str, pairs: Sequence[Pair], bar: float, confidence: float) -> Check:
    """Difference of success, candidate minus current, against ``bar`` (a fraction), at any time.

    Promotes where the confidence sequence lies above ``bar``: superiority for a bar of 0, non-inferiority for
    a negative one. Rolls back where a loss is proven; too small a lift only holds. Both hold at the one-sided
    ``confidence`` however often one looked on the way.
    """
    text = f"lower limit above {100 * bar:+g} points ({_level(confidence)})"
    if not pairs:
        return hold(name, "no episode was run", text)
    a, b = [p.current.success for p in pairs], [p.candidate.success for p in pairs]
    fixed = paired_difference(a, b, 2 * confidence - 1)
    evidence = {
        "candidate": _outcomes([p.candidate for p in pairs]),
        "current": _outcomes([p.current for p in pairs]),
        "gained_seeds": [p.candidate.seed for p in pairs if p.candidate.success and not p.current.success],
        "lost_seeds": [p.candidate.seed for p in pairs if p.current.success and not p.candidate.success],
        # What a test of fixed size would say of these pairs: it does not know why they are so many.
        "fixed_size": {"low": fixed.low, "high": fixed.high, "mcnemar_p": fixed.p},
    }
    return _difference(name, np.subtract(b, a, dtype=np.float64), bar, confidence, text, evidence)


def progress(name: str, pairs: Sequence[Pair], max_drop: float, confidence: float) -> Check:
    """Difference of task progress: what success does not show, where both fail or both come through.

    Promotes where the confidence sequence lies above ``-max_drop``, rolls back where it lies below.
    """
    text = f"lower limit above {-100 * max_drop:+g} points of progress ({_level(confidence)})"
    if not pairs:
        return hold(name, "no episode was run", text)
    found = [(p.current.progress, p.candidate.progress) for p in pairs]
    known = [(a, b) for a, b in found if a is not None and b is not None]
    if missing := len(pairs) - len(known):
        return hold(name, f"the progress of {missing} of {len(pairs)} pairs is missing", text)
    evidence = {
        "candidate_mean": float(np.mean([b for _, b in known])),
        "current_mean": float(np.mean([a for a, _ in known])),
    }
    drop = np.array([b - a for a, b in known])
    return _difference(name, drop, -max_drop, confidence, text, evidence)


def _level(confidence: float) -> str:
    return f"one-sided {100 * confidence:g} %, at every look"


def _difference(
    name: str, differences: FloatArray, bar: float, confidence: float, text: str, evidence: dict[str, Any]
) -> Check:
    s = confidence_sequence(differences, 2 * confidence - 1)
    if s.high < min(bar, 0.0):
        verdict = Verdict.ROLL_BACK
    else:
        verdict = Verdict.PROMOTE if s.low > bar else Verdict.HOLD
    evidence |= {
        "interval": f"confidence sequence by betting, two-sided {200 * confidence - 100:.4g} % at all looks",
        "threshold": bar,
        "scale": "difference",
    }
    return Check(
        name=name, verdict=verdict, value=s.mean, low=s.low, high=s.high, bar=text, n=s.n, evidence=evidence
    )


def not_worse(name: str, pairs: Sequence[Pair]) -> Check:
    """May veto, where more fails anew than chance explains; few pairs, so it shows no more than that.

    Of recorded failures, replayed: that they are mended at all is for the check of success in their shift to
    show, on scenes that nobody selected, since failures regress to the mean even under an unchanged policy.
    Of other shifts and of injected latency: nobody asked the candidate to be better there, and a chunk that
    is refused there is the envelope at work, which costs no more than the attempt.
    """
    text = f"not more newly failing than fixed, beyond chance (exact McNemar, one-sided p > {WORSE_HOLD_P:g})"
    if not pairs:
        return hold(name, "nothing was run", text)
    classes: dict[str, list[str]] = {"fixed": [], "still_failing": [], "newly_failing": [], "passing": []}
    for p in pairs:
        if p.candidate.success:
            kind = "passing" if p.current.success else "fixed"
        else:
            kind = "newly_failing" if p.current.success else "still_failing"
        classes[kind].append(f"{p.candidate.shift}:{p.candidate.seed}")
    fixed, broken, n = len(classes["fixed"]), len(classes["newly_failing"]), len(pairs)
    p_worse = mcnemar(fixed, broken, "worse")
    if p_worse <= WORSE_ROLL_BACK_P:
        verdict = Verdict.ROLL_BACK
    elif p_worse <= WORSE_HOLD_P:
        verdict = Verdict.HOLD
    else:
        verdict = Verdict.PROMOTE
    low, high = paired_interval(fixed, broken, n)
    evidence: dict[str, Any] = {kind: len(scenes) for kind, scenes in classes.items()}
    by_shift = {
        s: {
            "candidate": sum(p.candidate.success for p in mine),
            "current": sum(p.current.success for p in mine),
            "of": len(mine),
        }
        for s in dict.fromkeys(p.candidate.shift for p in pairs)
        for mine in [[p for p in pairs if p.candidate.shift == s]]
    }
    evidence |= {
        "p_worse": p_worse,
        "successes": by_shift,
        "refused_chunks": {
            "candidate": sum(p.candidate.invalid_chunks for p in pairs),
            "current": sum(p.current.invalid_chunks for p in pairs),
        },
        "scenarios": classes,
        "threshold": 0.0,
        "scale": "difference",
    }
    return Check(
        name=name,
        verdict=verdict,
        value=(fixed - broken) / n,
        low=low,
        high=high,
        bar=text,
        n=n,
        evidence=evidence,
    )


def invalid_output(pairs: Sequence[Pair]) -> Check:
    """Chunks of the candidate that were refused as invalid, over all attempts: one is too many."""
    name, text = "invalid output", "no chunk refused as not finite or out of range"
    if not pairs:
        return hold(name, "no attempt was evaluated", text)
    bad = sum(p.candidate.invalid_chunks for p in pairs)
    where = [f"{p.candidate.shift}:{p.candidate.seed}" for p in pairs if p.candidate.invalid_chunks]
    return Check(
        name=name,
        verdict=Verdict.ROLL_BACK if bad else Verdict.PROMOTE,
        value=float(bad),
        bar=text,
        n=len(pairs),
        evidence={"scenarios": where[:50], "current": sum(p.current.invalid_chunks for p in pairs)},
    )


def settled(before: Sequence[Check], now: Sequence[Check]) -> list[Check]:
    """The checks as of the newest look, where one that has passed at an earlier look stays passed.

    For looks that each have their own share of the level, so that a figure may be decided at any of them.
    Evidence that is missing now, and a figure that is proven worse now, count whatever was found before.
    """
    passed = {c.name: c for c in before if c.verdict is Verdict.PROMOTE and c.low is not None}
    return [
        passed[c.name] if c.verdict is Verdict.HOLD and c.value is not None and c.name in passed else c
        for c in now
    ]


def tracking_checks(pairs: Sequence[Pair], confidence: float) -> list[Check]:
    """Both checks of tracking in lockstep, at one of ``TRACKING_LOOKS`` looks; ``confidence`` is for all."""
    level = 1 - (1 - confidence) / TRACKING_LOOKS
    return [tracking(pairs, level), tracking_spread(pairs, level)]


def tracking(pairs: Sequence[Pair], confidence: float) -> Check:
    """Each attempt's p99 of the tracking error against the current policy's, in the lab's scenes.

    Lockstep has no scheduling noise, so what differs is the policy: jerky or far chunks track worse.
    """
    name, text = TRACKING, f"upper limit of the ratio of p99 at most {TRACKING_RATIO:g}"
    pairs = [p for p in pairs if p.candidate.shift == LAB]
    a = [p.current.tracking_p99_rad for p in pairs if p.current.tracking_p99_rad is not None]
    b = [p.candidate.tracking_p99_rad for p in pairs if p.candidate.tracking_p99_rad is not None]
    if missing := 2 * len(pairs) - len(a) - len(b):
        return hold(name, f"{missing} tracking errors are missing or not finite", text)
    if len(pairs) < 2:
        return hold(name, f"{len(pairs)} paired attempts in the lab", text)
    r = paired_ratio(a, b, TRACKING_FLOOR_RAD, 2 * confidence - 1)
    evidence = {
        "candidate_p99_rad": percentiles(b)._asdict(),
        "current_p99_rad": percentiles(a)._asdict(),
        "floor_rad": TRACKING_FLOOR_RAD,
        "threshold": TRACKING_RATIO,
        "scale": "ratio",
    }
    verdict = against(r.low, r.high, TRACKING_RATIO)
    return Check(
        name=name, verdict=verdict, value=r.mean, low=r.low, high=r.high, bar=text, n=r.n, evidence=evidence
    )


def tracking_spread(pairs: Sequence[Pair], confidence: float) -> Check:
    """How much the attempts' tracking differs from scene to scene, against the current policy's.

    A candidate that tracks well in most scenes and badly in some has the same middle and a wider spread.
    A collapse of the spread does no harm; it is in the figures.
    """
    name, text = TRACKING_SPREAD, f"upper limit of the ratio at most {SPREAD_RATIO:g}"
    text += f", or p90 / p10 at most {SPREAD_FLOOR:g}"
    pairs = [p for p in pairs if p.candidate.shift == LAB]
    a = [p.current.tracking_p99_rad for p in pairs if p.current.tracking_p99_rad is not None]
    b = [p.candidate.tracking_p99_rad for p in pairs if p.candidate.tracking_p99_rad is not None]
    if missing := 2 * len(pairs) - len(a) - len(b):
        return hold(name, f"{missing} tracking errors are missing or not finite", text)
    if len(pairs) < LEAST_SPREAD_PAIRS:
        return hold(name, f"{len(pairs)} paired attempts in the lab, fewer than {LEAST_SPREAD_PAIRS}", text)
    was, now = (np.log(np.maximum(x, TRACKING_FLOOR_RAD)) for x in (a, b))
    width = math.exp(quantile_range(was)), math.exp(quantile_range(now))
    evidence: dict[str, Any] = {
        "current_p90_over_p10": width[0],
        "candidate_p90_over_p10": width[1],
        "threshold": SPREAD_RATIO,
        "scale": "ratio",
    }
    if width[1] <= SPREAD_FLOOR or not np.any(was != np.median(was)):
        verdict = Verdict.PROMOTE if width[1] <= SPREAD_FLOOR else Verdict.HOLD
        value = math.log(max(width[1], SPREAD_FLOOR)) / math.log(max(width[0], SPREAD_FLOOR))
        return Check(name=name, verdict=verdict, value=value, bar=text, n=len(pairs), evidence=evidence)
    r = paired_spread_ratio(was, now, 2 * confidence - 1)
    verdict = against(r.low, r.high, SPREAD_RATIO)
    return Check(
        name=name, verdict=verdict, value=r.mean, low=r.low, high=r.high, bar=text, n=r.n, evidence=evidence
    )


def against(low: float, high: float, most: float) -> Verdict:
    """Where an interval lies against the most that is allowed."""
    if high <= most:
        return Verdict.PROMOTE
    return Verdict.ROLL_BACK if low > most else Verdict.HOLD


def _outcomes(attempts: Sequence[Attempted]) -> dict[str, Any]:
    failures = Counter(a.outcome.value for a in attempts if not a.success)
    rate = wilson(sum(a.success for a in attempts), len(attempts))
    return {"success": rate.model_dump(), "failures": dict(failures.most_common())}
