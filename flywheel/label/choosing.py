"""Which episodes a person is asked about, when there is time for a few.

Most of the budget goes where an answer is worth most: uncertainty of the label times how many episodes of
its kind nobody was asked about. The rest is drawn blindly from all episodes, since people who only ever see
what is unsure could not tell what a high confidence is worth.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One episode to ask about."""

    episode_id: str
    why: str  # unsure | audit
    worth: float


def choose(
    unsure: Mapping[str, float],
    cluster: Mapping[str, str],
    answered: Sequence[str],
    budget: int,
    audit: float,
) -> list[Choice]:
    """At most ``budget`` of the episodes, greedily.

    ``unsure``: of the unsure ones, how probable it is that the label is wrong; ``cluster``: the kind of every
    episode; ``audit``: the share of the budget that is drawn blindly.
    """
    size = Counter(cluster.values())
    left = set(cluster) - set(answered)
    blind = min(math.floor(audit * budget + 0.5), budget)
    drawn = sorted(left, key=lambda k: hashlib.sha256(f"audit\n{k}".encode()).digest())[:blind]
    found = [Choice(k, "audit", 0.0) for k in drawn]
    asked = Counter(cluster[k] for k in drawn)
    candidates = {k for k in unsure if k in left} - set(drawn)
    worthy: list[Choice] = []
    while candidates and len(found) + len(worthy) < budget:

        def worth(k: str) -> float:
            return round(unsure[k] * size[cluster[k]] / (1 + asked[cluster[k]]), 6)

        best = min(candidates, key=lambda k: (-worth(k), k))
        worthy.append(Choice(best, "unsure", worth(best)))
        asked[cluster[best]] += 1
        candidates.remove(best)
    return [*worthy, *found]
