"""Checks of the gate over paired attempts in lockstep: pure functions from pairs to a ``Check``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from flywheel.evaluate import Attempted
from flywheel.schema import Check, Verdict
from flywheel.stats import mcnemar, paired_difference, paired_interval, paired_ratio, percentiles, wilson

LAB = "lab"
PAST_FAILURES = "past failures"
TRACKING_RATIO = 1.2  # tail of the tracking error against the current policy's
# Measured in the twin under the scripted operator: p99 of 0.4 to 4 mrad an attempt, the most at contact.
TRACKING_FLOOR_RAD = 0.001  # 0.7 mm at full reach: less does not matter to the task
WORSE_HOLD_P, WORSE_ROLL_BACK_P = 0.10, 0.01


class Pair(NamedTuple):
    """The same scene under both policies."""

    current: Attempted
    candidate: Attempted


def hold(name: str, reason: str, bar: str = "") -> Check:
    """A check without evidence: it can only hold."""
    return Check(name=name, verdict=Verdict.HOLD, value=None, bar=bar, n=0, evidence={"reason": reason})


def success(name: str, pairs: Sequence[Pair], bar: float, confidence: float, looks: int) -> Check:
    """Difference of success, candidate minus current, against ``bar`` (a fraction).

    Promotes when the lower limit of Tango's interval lies above ``bar``: superiority for a bar of 0,
    non-inferiority for a negative one. Rolls back when a loss is proven; too small a lift only holds.
    ``confidence`` is one-sided and split over ``looks``.
    """
    text = f"lower limit above {100 * bar:+g} points (one-sided {100 * confidence:g} % over {looks} looks)"
    if not pairs:
        return hold(name, "no episode was run", text)
    level = 1 - 2 * (1 - confidence) / looks
    d = paired_difference([p.current.success for p in pairs], [p.candidate.success for p in pairs], level)
    if d.low > bar:
        verdict = Verdict.PROMOTE
    elif d.high < min(bar, 0.0):
        verdict = Verdict.ROLL_BACK
    else:
        verdict = Verdict.HOLD
    evidence = {
        "candidate": _outcomes([p.candidate for p in pairs]),
        "current": _outcomes([p.current for p in pairs]),
        "gained_seeds": [p.candidate.seed for p in pairs if p.candidate.success and not p.current.success],
        "lost_seeds": [p.candidate.seed for p in pairs if p.current.success and not p.candidate.success],
        "mcnemar_p": d.p,
        "interval": f"Tango score, two-sided {100 * level:.4g} %",
        "threshold": bar,
        "scale": "difference",
    }
    return Check(
        name=name, verdict=verdict, value=d.diff, low=d.low, high=d.high, bar=text, n=d.n, evidence=evidence
    )


def past_failures(pairs: Sequence[Pair]) -> Check:
    """Scenes of recorded failures, replayed: may veto, where more fails anew than chance explains.

    That the failures are mended at all is for the check of success in their shift to show, on scenes that
    nobody selected: recorded failures regress to the mean even under an unchanged policy.
    """
    text = f"not more newly failing than fixed, beyond chance (exact McNemar, one-sided p > {WORSE_HOLD_P:g})"
    if not pairs:
        return hold(PAST_FAILURES, "no recorded failure was replayed", text)
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
    evidence |= {"p_worse": p_worse, "scenarios": classes, "threshold": 0.0, "scale": "difference"}
    return Check(
        name=PAST_FAILURES,
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


def tracking(pairs: Sequence[Pair], confidence: float) -> Check:
    """Each attempt's p99 of the tracking error against the current policy's, in the lab's scenes.

    Lockstep has no scheduling noise, so what differs is the policy: jerky or far chunks track worse.
    """
    name, text = "tracking in lockstep", f"upper limit of the ratio of p99 at most {TRACKING_RATIO:g}"
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


def against(low: float, high: float, most: float) -> Verdict:
    """Where an interval lies against the most that is allowed."""
    if high <= most:
        return Verdict.PROMOTE
    return Verdict.ROLL_BACK if low > most else Verdict.HOLD


def _outcomes(attempts: Sequence[Attempted]) -> dict[str, Any]:
    failures = Counter(a.outcome.value for a in attempts if not a.success)
    rate = wilson(sum(a.success for a in attempts), len(attempts))
    return {"success": rate.model_dump(), "failures": dict(failures.most_common())}
