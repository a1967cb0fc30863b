"""How a budget of episodes is spent. Each rule gives an order; the stage takes as many as it may.

``coverage`` maximises a weighted facility location: the sum over failures of frequency × cost × how well the
nearest episode taken covers it,

    F(S) = Σ_i w_i · max_{j ∈ S} s(i, j),   s = 1 / (1 + (2 d(i, j) / cluster_distance)²) in a task, else 0,

greedily, which is within 1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978, "An analysis of
approximations for maximizing submodular set functions"; for choosing training data Wei, Iyer and Bilmes 2015,
"Submodularity in Data Subset Selection and Active Learning"; with w = 1 and the worst case in place of the
sum it is the k-centre of Sener and Savarese 2018). What is not covered yet weighs in full, so rare kinds come
before the tenth example of a frequent one. ``random``, ``newest`` and ``all`` are what it is compared with.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flywheel.config import CurateSettings
from flywheel.curate.distances import Matrix, Scale, between, draw
from flywheel.curate.examine import Candidate


def weigh(distinct: Sequence[Candidate], costs: Mapping[str, float]) -> None:
    """Set ``weight`` of each candidate: its part of how often its kind occurs times what that costs.

    Robot r, with N_r distinct failures, has a voice of log2(1 + N_r), shared out among its clusters by
    log2(1 + n_rc); what a cluster gets from all robots is how often it occurs. So many robots that fail alike
    weigh more than one that repeats itself, near-duplicates (which are not distinct) weigh nothing, and a
    flood from one robot buys little however it is spread. A cluster's weight is shared among its episodes.
    """
    failures: dict[tuple[str, str], Counter[str]] = {}
    for c in distinct:
        robot = (c.manifest.site, c.manifest.robot) if c.manifest else ("", "")
        failures.setdefault(robot, Counter())[c.cluster] += 1
    frequency: dict[str, float] = {}
    episodes: Counter[str] = Counter()
    for robot in sorted(failures):
        share = {name: math.log2(1 + n) for name, n in sorted(failures[robot].items())}
        voice = math.log2(1 + failures[robot].total())
        for name, part in share.items():
            frequency[name] = frequency.get(name, 0.0) + voice * part / sum(share.values())
            episodes[name] += failures[robot][name]
    for c in distinct:
        c.weight = costs.get(c.failure_mode, 1.0) * frequency[c.cluster] / episodes[c.cluster]


def order(
    distinct: Sequence[Candidate],
    taken: Sequence[Candidate],
    limit: int,
    settings: CurateSettings,
    scale: Scale,
) -> list[Candidate]:
    """Up to ``limit`` of ``distinct`` (sorted by identity), best first, after ``taken``.

    The same for every order in which the episodes came.
    """
    if settings.choice == "random":
        purpose = f"random {settings.seed}"
        return sorted(distinct, key=lambda c: draw(c.episode_id, purpose))[:limit]
    if settings.choice == "coverage":
        return _coverage(distinct, taken, limit, settings.cluster_distance, scale)
    return list(reversed(distinct))[:limit]  # ids are ordered by time


def _covers(apart: Matrix, radius: float) -> Matrix:
    """How well an episode stands for another, 0..1; never quite 0, so that far ones are still compared."""
    covers: Matrix = 1.0 / (1.0 + (2.0 * apart / radius) ** 2)
    return covers


def _coverage(
    distinct: Sequence[Candidate], taken: Sequence[Candidate], limit: int, radius: float, scale: Scale
) -> list[Candidate]:
    """Lazy greedy (Minoux 1978): gains only shrink, so one that is still the greatest is the greatest."""
    weights = np.array([c.weight for c in distinct])
    members: dict[str, list[int]] = {}
    for i, c in enumerate(distinct):
        members.setdefault(c.manifest.task if c.manifest else "", []).append(i)
    cover: dict[int, tuple[NDArray[np.int64], Matrix]] = {}  # of each, in its own task: whom, how well
    best = np.zeros(len(distinct))  # how well each is covered so far
    for task, mine in members.items():
        at = np.array(mine)
        group = [distinct[i] for i in mine]
        near = _covers(between(group, group, scale), radius)
        for k, i in enumerate(mine):
            cover[i] = at, near[k]
        before = [c for c in taken if c.manifest and c.manifest.task == task]
        if before:
            best[at] = _covers(between(group, before, scale), radius).max(axis=1)

    def gain(i: int) -> float:
        at, near = cover[i]
        return round(float(weights[at] @ np.maximum(0.0, near - best[at])), 9)

    # Of equal ones the newest: the last by identity.
    heap = [(-gain(i), -i, 0) for i in range(len(distinct))]
    heapq.heapify(heap)
    chosen: list[Candidate] = []
    while heap and len(chosen) < limit:
        _, minus, asked = heapq.heappop(heap)
        i = -minus
        if asked < len(chosen):  # its gain is of an earlier state
            heapq.heappush(heap, (-gain(i), minus, len(chosen)))
            continue
        at, near = cover[i]
        best[at] = np.maximum(best[at], near)
        chosen.append(distinct[i])
    return chosen
