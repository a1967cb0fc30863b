"""Which candidates are taken, and why the others are not.

In this order: copies go; failures are put into clusters; what the yardstick names and the held-out share are
kept for evaluation, and what is as good as the same is left out; near-duplicates go; the rest is weighed; at
last the budget is spent (``choice``), corrections before successes. The order of the input does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from flywheel.config import CurateSettings
from flywheel.curate.choice import order, weigh
from flywheel.curate.clusters import Examples, cluster
from flywheel.curate.distances import Scale, between, draw, measure
from flywheel.curate.embed import Encoder
from flywheel.curate.examine import Candidate
from flywheel.dataset.yardstick import Yardstick, drawn

MAX_OF_TASK = 4000  # candidates that are compared with each other


@dataclass(frozen=True)
class Selected:
    """By what it was chosen, and an example of each cluster for the next turn."""

    scale: Scale
    examples: Examples


def select(
    candidates: Sequence[Candidate],
    settings: CurateSettings,
    encoder: Encoder | None = None,
    yardstick: Yardstick | None = None,
    earlier: Examples | None = None,
    no_encoder: str = "no policy was given",
    kept: Collection[str] = (),
) -> Selected:
    """Decide every candidate that is not decided yet.

    ``encoder``: the policy's; without one (``no_encoder`` says why) thumbnails are compared. ``earlier``:
    clusters whose names go on. ``kept``: ids and contents of what earlier turns held out.
    """
    pool = [c for c in sorted(candidates, key=identity) if not c.reason]
    pool = _without_copies(pool)
    pool = _of_one_robot(pool)
    pool = _comparable(pool)
    scale = Scale(why=no_encoder) if encoder is None else measure(pool, encoder)
    pool = [c for c in pool if not c.reason]
    examples = cluster(pool, scale, settings.cluster_distance, earlier, encoder)
    pool = _kept_for_evaluation(pool, yardstick or Yardstick(), kept, settings, scale)
    if settings.choice == "coverage":
        pool = _without_near_duplicates(pool, settings, scale)
    weigh(pool, settings.costs)
    _spend(pool, settings, scale)
    _measure_nearest([c for c in candidates if c.cluster], scale)
    return Selected(scale, examples)


def distance(a: Candidate, b: Candidate, scale: Scale | None = None) -> float:
    """How different two candidates are (``distances``); infinite for different tasks."""
    if _task(a) != _task(b) or a.path.shape != b.path.shape:
        return float("inf")
    return float(between([a], [b], scale or Scale())[0, 0])


def _without_copies(pool: Sequence[Candidate]) -> list[Candidate]:
    kept: dict[str, Candidate] = {}
    by_content: dict[str, Candidate] = {}
    for c in pool:
        if (first := kept.get(c.episode_id)) is not None:
            c.decide(False, "duplicate_id", f"{first.directory.name} holds the same episode_id")
        elif (first := by_content.get(c.content_sha256)) is not None:
            c.decide(False, "duplicate_content", f"byte for byte the tables of {first.episode_id}")
        else:
            kept[c.episode_id] = by_content[c.content_sha256] = c
    return list(kept.values())


def _of_one_robot(pool: Sequence[Candidate]) -> list[Candidate]:
    """Those of the most frequent shape: a dataset has one state, action, rate and image size."""
    if not pool:
        return []
    common = min(Counter(c.shape for c in pool).items(), key=lambda i: (-i[1], str(i[0])))[0]
    for c in pool:
        if c.shape != common:
            c.decide(False, "other_shape", f"state, action, Hz and images {c.shape}, most have {common}")
    return [c for c in pool if not c.reason]


def _comparable(pool: Sequence[Candidate]) -> list[Candidate]:
    """Of each task as many as can be compared with one another, drawn by their ids."""
    for task, n in Counter(map(_task, pool)).items():
        if n > MAX_OF_TASK:
            mine = [c for c in pool if _task(c) == task]
            for c in sorted(mine, key=lambda c: draw(c.episode_id, "compared"))[MAX_OF_TASK:]:
                c.decide(False, "not_drawn", f"{MAX_OF_TASK} of {n} of this task were drawn to choose from")
    return [c for c in pool if not c.reason]


def _kept_for_evaluation(
    pool: Sequence[Candidate],
    yardstick: Yardstick,
    kept: Collection[str],
    settings: CurateSettings,
    scale: Scale,
) -> list[Candidate]:
    """Those that may be trained on. Every cluster that is large enough for it has one episode held out."""
    clusters: dict[str, list[Candidate]] = {}
    for c in pool:
        assert c.manifest is not None
        clusters.setdefault(c.cluster, []).append(c)
        if yardstick.names(c.manifest, c.content_sha256):
            c.held_out = True
            c.decide(False, "yardstick", "the yardstick names it or its scene: never trained on")
        elif yardstick.holds_out(c.episode_id) or not {c.episode_id, c.content_sha256}.isdisjoint(kept):
            _hold_out(c)
    for _, group in sorted(clusters.items()):
        if len(group) * yardstick.held_out_fraction >= 1 and not any(c.held_out for c in group):
            _hold_out(min(group, key=lambda c: drawn(c.episode_id)))
    held = [c for c in pool if c.held_out]
    for c, twin in _twins([c for c in pool if not c.held_out], held, settings, scale):
        c.decide(False, "near_held_out", f"as good as the same as {twin.episode_id}, which is held out")
    return [c for c in pool if not c.reason]


def _hold_out(c: Candidate) -> None:
    c.held_out = True
    c.decide(False, "held_out", f"kept for evaluation, in this turn and in later ones; {c.failure_mode}")


def _without_near_duplicates(
    pool: Sequence[Candidate], settings: CurateSettings, scale: Scale
) -> list[Candidate]:
    """Of episodes closer than ``duplicate_distance`` to one another the newest stays, corrections first."""
    for task in sorted({_task(c) for c in pool}):
        mine = sorted((c for c in pool if _task(c) == task), key=identity, reverse=True)
        mine.sort(key=lambda c: c.tier)
        near = between(mine, mine, scale) < settings.duplicate_distance
        distinct: list[int] = []
        for i, c in enumerate(mine):
            if (twins := near[i, distinct]).any():
                twin = mine[distinct[int(np.argmax(twins))]]
                c.decide(False, "near_duplicate", f"as good as the same as {twin.episode_id}")
            else:
                distinct.append(i)
    return [c for c in pool if not c.reason]


def _twins(
    some: Sequence[Candidate], others: Sequence[Candidate], settings: CurateSettings, scale: Scale
) -> list[tuple[Candidate, Candidate]]:
    """Those of ``some`` that are near-duplicates of one of ``others``, each with the first such."""
    found = []
    for task in sorted({_task(c) for c in some}):
        mine, theirs = ([c for c in cs if _task(c) == task] for cs in (some, others))
        if not theirs:
            continue
        near = between(mine, theirs, scale) < settings.duplicate_distance
        found += [(c, theirs[int(np.argmax(row))]) for c, row in zip(mine, near, strict=True) if row.any()]
    return found


def _spend(pool: Sequence[Candidate], settings: CurateSettings, scale: Scale) -> None:
    most = min(settings.budget or settings.max_episodes, settings.max_episodes)
    left = len(pool) if settings.choice == "all" else most
    taken: list[Candidate] = []
    for tier in sorted({c.tier for c in pool}):
        reason, what = ("correction", "the operator's correction") if tier == 0 else ("success", "success")
        for c in order([c for c in pool if c.tier == tier], taken, left, settings, scale):
            c.decide(True, reason, f"{what}; {c.failure_mode}")
            taken.append(c)
            left -= 1
    for c in pool:
        if not c.taken:
            c.decide(False, "over_budget", f"{most} were taken before it, by {settings.choice}")


def _measure_nearest(compared: Sequence[Candidate], scale: Scale) -> None:
    for task in sorted({_task(c) for c in compared}):
        mine = [c for c in compared if _task(c) == task]
        taken = [c for c in mine if c.taken]
        if taken:
            for c, d in zip(mine, between(mine, taken, scale).min(axis=1).tolist(), strict=True):
                c.nearest = d


def _task(c: Candidate) -> str:
    return c.manifest.task if c.manifest else ""


def identity(c: Candidate) -> tuple[str, bool, str]:
    # A directory that bears the episode's name goes before a renamed copy of it.
    return c.episode_id, c.directory.name != c.episode_id, c.directory.name
