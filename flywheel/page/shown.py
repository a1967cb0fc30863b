"""Numbers, times and states as people read them. Whatever a document says, these do not raise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from flywheel.schema import Check, Mode, RolloutStage, Verdict

NOTHING = "–"


class Mark(NamedTuple):
    """A state: the kind of mark (its shape and colour) and the word beside it."""

    kind: str  # good | busy | warn | bad | idle
    word: str


MODES: Mapping[Mode, Mark] = {
    Mode.FOLLOW: Mark("good", "follow"),
    Mode.CARRY_ON: Mark("warn", "carry on"),
    Mode.RAMP: Mark("warn", "ramp"),
    Mode.HOLD: Mark("idle", "hold"),
    Mode.FALLBACK: Mark("warn", "fallback"),
    Mode.STOP_1: Mark("bad", "stop 1"),
    Mode.STOP_0: Mark("bad", "stop 0"),
}
STAGES: Mapping[RolloutStage, Mark] = {
    RolloutStage.SHADOW: Mark("busy", "shadow"),
    RolloutStage.CANARY: Mark("busy", "canary"),
    RolloutStage.APPROVAL: Mark("warn", "approval"),
    RolloutStage.WIDE: Mark("busy", "wide"),
    RolloutStage.DONE: Mark("good", "done"),
    RolloutStage.HELD: Mark("idle", "held"),
    RolloutStage.ROLLED_BACK: Mark("bad", "rolled back"),
}
VERDICTS: Mapping[Verdict, Mark] = {
    Verdict.PROMOTE: Mark("good", "promote"),
    Verdict.HOLD: Mark("idle", "hold"),
    Verdict.ROLL_BACK: Mark("bad", "roll back"),
}


def ago(then_unix_s: float, now_unix_s: float) -> str:
    """How long ago, to two digits or so."""
    s = now_unix_s - then_unix_s
    if not math.isfinite(s):
        return NOTHING
    ahead, s = s < -2, abs(s)
    for bound, unit, length in ((100, "s", 1), (6000, "min", 60), (172_800, "h", 3600)):
        if s < bound:
            text = f"{s / length:.0f} {unit}"
            break
    else:
        text = f"{s / 86_400:.0f} d" if s < 86_400 * 100_000 else "ages"
    return f"in {text}" if ahead else f"{text} ago"


def exact(unix_s: float) -> str:
    """UTC to the second."""
    try:
        return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, OSError, ValueError):
        return f"{unix_s:.6g} s since 1970, UTC"


def iso(unix_s: float) -> str:
    """For ``datetime`` attributes."""
    try:
        return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (OverflowError, OSError, ValueError):
        return ""


def count(n: float | None) -> str:
    """A count, thousands apart."""
    if n is None:
        return NOTHING
    return f"{n:,}".replace(",", "\N{NARROW NO-BREAK SPACE}") if abs(n) < 10**12 else "> 10^12"


def number(x: float | None, digits: int = 3, scale: float = 1.0) -> str:
    """A figure to some digits, in units of ``1 / scale``."""
    if x is None:
        return NOTHING
    try:
        x = x * scale
        if 1000 <= abs(x) < 1e12:
            return count(round(x))
        return f"{x:.{digits}g}" if 1e-4 <= abs(x) < 1000 or x == 0 else f"{x:.{digits - 1}e}"
    except OverflowError:
        return "> 10^308"


def unix(ns: int) -> float:
    """Seconds of a time in ns; not a number where that is beyond all times."""
    try:
        return ns / 1e9
    except OverflowError:
        return math.nan


def share(part: float, whole: float) -> str:
    """A percentage; nothing of nothing is nothing."""
    try:
        return f"{100 * part / whole:.0f} %" if whole > 0 else NOTHING
    except (OverflowError, ZeroDivisionError):
        return NOTHING


def percent(p: object) -> str:
    """A success rate of a gate report's evidence."""
    mean = figure(p, "mean")
    return NOTHING if mean is None else f"{100 * mean:.0f} %"


def spread(p: object) -> str:
    """Its 95 % interval, and of how many attempts."""
    low, high, n = (figure(p, k) for k in ("low", "high", "n"))
    text = "" if low is None or high is None else f"[{100 * low:.0f}, {100 * high:.0f}]"
    return text if n is None else f"{text} of {n:.0f}".strip()


def figure(doc: object, key: str) -> float | None:
    """A finite number that a document of free form may hold."""
    found = doc.get(key) if isinstance(doc, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        x = float(found)
    except OverflowError:
        return None
    return x if math.isfinite(x) else None


def interval(check: Check) -> dict[str, float] | None:
    """Where the parts of a check's interval lie on an axis of 0 to 100, with the bar where one is known."""
    if check.value is None or check.low is None or check.high is None:
        return None
    ratio = check.evidence.get("scale") == "ratio"
    same = 1.0 if ratio else 0.0
    bar = figure(check.evidence, "threshold")
    points = {"low": check.low, "value": check.value, "high": check.high, "same": same}
    if bar is not None:
        points["bar"] = bar
    if ratio:
        points = {k: math.log(max(v, 1e-6)) for k, v in points.items()}
    least, span = min(points.values()), max(points.values()) - min(points.values())
    if not math.isfinite(span):
        return None
    return {k: 4 + 92 * (v - least) / max(span, 1e-9) for k, v in points.items()}
