"""Two policies on the same seeds, a fixed number of pairs: exact and score tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from scipy import special

from flywheel.stats.estimates import Difference, z_of

_NEGLIGIBLE = 1e-9  # weight of a table that is left out of a sum


def _tango_score(delta: float, gained: int, lost: int, n: int) -> float:
    """Score statistic of the hypothesis that the paired difference is ``delta`` (Tango 1998).

    Falls monotonically with ``delta``. The nuisance parameter, the probability of a lost pair, is put
    at its maximum-likelihood value under the hypothesis, the larger root of ``2n x² + u x + v = 0``.
    """
    u = (2 * n - gained + lost) * delta - (gained + lost)
    v = -lost * delta * (1 - delta)
    p_lost = (math.sqrt(max(0.0, u * u - 8 * n * v)) - u) / (4 * n)
    variance = n * (2 * p_lost + delta * (1 - delta))
    distance = gained - lost - n * delta
    if variance <= 0.0:  # only where no pair can be discordant, or all must be
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def paired_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval for ``(gained - lost) / n``.

    Holds its level for few pairs and for none discordant, and its lower limit exceeds ``-margin``
    exactly where Tango's non-inferiority test at that margin rejects.
    """
    if n < 1 or gained < 0 or lost < 0 or gained + lost > n:
        raise ValueError(f"need gained, lost >= 0 and gained + lost <= n, got {gained}, {lost}, {n}")
    z = z_of(confidence)

    def solve(target: float, lo: float, hi: float) -> float:
        for _ in range(60):  # 2 / 2**60: below the spacing of doubles
            mid = (lo + hi) / 2
            if _tango_score(mid, gained, lost, n) > target:
                lo = mid
            else:
                hi = mid
        return (lo + hi) / 2

    diff = (gained - lost) / n
    low = -1.0 if lost == n else solve(z, -1.0, diff)
    high = 1.0 if gained == n else solve(-z, diff, 1.0)
    return low, high


def paired_difference(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> Difference:
    """Success of ``b`` minus success of ``a`` over the same seeds, in the same order."""
    if len(a) != len(b) or not a:
        raise ValueError(f"need two samples of the same seeds, got {len(a)} and {len(b)}")
    gained = sum(1 for x, y in zip(a, b, strict=True) if y and not x)
    lost = sum(1 for x, y in zip(a, b, strict=True) if x and not y)
    n = len(a)
    low, high = paired_interval(gained, lost, n, confidence)
    return Difference((gained - lost) / n, low, high, n, gained, lost, mcnemar(gained, lost))


def mcnemar(
    gained: int, lost: int, alternative: Literal["two-sided", "worse", "better"] = "two-sided"
) -> float:
    """Exact conditional p-value: given the discordant pairs, ``lost ~ Binomial(gained + lost, 1/2)``.

    ``worse`` asks whether more was lost than chance explains, ``better`` whether more was gained.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"counts must not be negative, got {gained}, {lost}")
    m = gained + lost
    if m == 0:
        return 1.0
    if alternative == "two-sided":
        return min(1.0, 2 * float(special.bdtr(min(gained, lost), m, 0.5)))
    # P(X >= k) = P(X <= m - k) at one half
    return float(special.bdtr(gained if alternative == "worse" else lost, m, 0.5))


def pairs_for_margin(
    p_gained: float, p_lost: float, margin: float, power: float = 0.9, confidence: float = 0.9
) -> int:
    """Pairs that a plan of fixed size needs: Tango's test passes ``-margin`` with at least this ``power``.

    ``p_gained`` and ``p_lost`` are the shares of pairs that only the candidate, or only the current policy,
    solves. Exact, by enumeration of all tables; power moves in steps with the number of pairs, so from the
    result up it is not below by more than a step. The difference must lie above the margin.
    """
    if not (p_gained >= 0 and p_lost >= 0 and p_gained + p_lost <= 1):
        raise ValueError(f"need shares of pairs, got {p_gained}, {p_lost}")
    if not 0.0 <= margin < 1.0 or p_gained - p_lost <= -margin:
        raise ValueError(f"the difference must lie above -margin, got {p_gained - p_lost}, {margin}")
    if not 0.0 < power < 1.0:
        raise ValueError(f"power must lie in (0, 1), got {power}")
    z = z_of(confidence)
    low, high = 0, 1
    while _power(high, p_gained, p_lost, margin, z) < power:
        low, high = high, high * 2
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (low, mid) if _power(mid, p_gained, p_lost, margin, z) >= power else (mid, high)
    return high


def _power(n: int, p_gained: float, p_lost: float, margin: float, z: float) -> float:
    """Probability that the lower limit lies above ``-margin``: by discordant pairs, then by those gained."""
    p = p_gained + p_lost
    total = 0.0
    for m in range(n + 1):
        weight = _binomial(m, n, p)
        if weight < _NEGLIGIBLE:
            continue
        # The score rises with the pairs gained: the least number that passes decides.
        lo, hi = 0, m + 1
        while lo < hi:
            mid = (lo + hi) // 2
            if _tango_score(-margin, mid, m - mid, n) > z:
                hi = mid
            else:
                lo = mid + 1
        if lo <= m:
            total += weight * float(special.bdtrc(lo - 1, m, p_gained / p)) if lo > 0 else weight
    return total


def _binomial(k: int, n: int, p: float) -> float:
    if p in (0.0, 1.0):
        return float(k == round(n * p))
    log = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return math.exp(float(log) + k * math.log(p) + (n - k) * math.log1p(-p))
