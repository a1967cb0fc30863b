"""Which candidates are taken, in which order, and why the others are not."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from flywheel.config import CurateSettings
from flywheel.curate.examine import Candidate


def select(candidates: Sequence[Candidate], settings: CurateSettings) -> None:
    """Decide every candidate that is not decided yet.

    Copies go first. Then, tier by tier, tasks and failure modes take turns, newest episode first, until
    the budget is spent; an episode too similar to one already taken is passed over.
    """
    pool = [c for c in sorted(candidates, key=identity) if not c.reason]
    pool = _without_copies(pool)
    pool = _of_one_robot(pool)
    taken: list[Candidate] = []
    for tier in sorted({c.tier for c in pool}):
        queues: dict[tuple[str, str], deque[Candidate]] = {}
        for c in sorted((c for c in pool if c.tier == tier), key=identity, reverse=True):
            assert c.manifest is not None
            queues.setdefault((c.manifest.task, c.failure_mode), deque()).append(c)
        turns = deque(queues[k] for k in sorted(queues))
        while turns:
            queue = turns.popleft()
            while queue:
                c = queue.popleft()
                if len(taken) >= settings.max_episodes:
                    c.decide(
                        False, "over_budget", f"max_episodes {settings.max_episodes} were taken before it"
                    )
                    continue
                twin = next((t for t in taken if distance(c, t) < settings.duplicate_distance), None)
                if twin is not None:
                    c.decide(False, "near_duplicate", f"as good as the same as {twin.episode_id}")
                    continue
                taken.append(c)
                reason, what = (
                    ("correction", "the operator's correction") if tier == 0 else ("success", "success")
                )
                c.decide(True, reason, f"{what}; {c.failure_mode}")
                break  # the next task and failure mode has its turn
            if queue:
                turns.append(queue)


def distance(a: Candidate, b: Candidate) -> float:
    """How different two candidates are: rms difference of the state along the way (m; flags 0..1) or of
    the images (0..1), whichever is larger. In the very same scene the images need no comparing.
    """
    assert a.manifest is not None
    assert b.manifest is not None
    if a.manifest.task != b.manifest.task or a.path.shape != b.path.shape:
        return float("inf")
    state = float(np.sqrt(np.mean((a.path - b.path) ** 2)))
    scene = (a.manifest.shift, a.manifest.seed)
    if a.manifest.seed is not None and scene == (b.manifest.shift, b.manifest.seed):
        return state
    return max(state, float(np.sqrt(np.mean((a.look - b.look) ** 2))))


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


def identity(c: Candidate) -> tuple[str, bool, str]:
    # A directory that bears the episode's name goes before a renamed copy of it.
    return c.episode_id, c.directory.name != c.episode_id, c.directory.name
