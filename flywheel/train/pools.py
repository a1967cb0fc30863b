"""What is trained on, in stated shares: new data, what earlier turns had, the lab's demonstrations.

    new      1 - replay
    earlier  replay · earlier_share, evenly among the earlier turns
    lab      replay · (1 - earlier_share)

``replay`` is ``replay_fraction`` in a first turn, ``later_replay_fraction`` in one with earlier ones. A pool
that is not there leaves its share to the other of the two old ones; without either, all is new.
Rehearsal of old data in every batch is what keeps old skills at the least cost (Robins 1995, "Catastrophic
forgetting, rehearsal and pseudorehearsal"; for policies Rolnick et al. 2019, "Experience replay for continual
learning").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flywheel.config import TrainSettings

NEW, EARLIER, LAB = "new", "earlier", "lab"


@dataclass(frozen=True)
class Part:
    """One dataset of a training run: its pool, and its share of the frames that are drawn, above 0."""

    pool: str
    root: Path
    weight: float


def parts(
    dataset: Path, earlier: Sequence[Path], replay: Path | None, settings: TrainSettings
) -> tuple[Part, ...]:
    """Datasets with a share, new data first, then the earlier turns' in the order given, then the lab's."""
    of_earlier = settings.earlier_share if replay is not None else 1.0
    if not earlier:
        of_earlier = 0.0
    first = settings.replay_fraction if replay is not None else 0.0
    old = settings.later_replay_fraction if earlier else first
    found = [
        Part(NEW, dataset, 1.0 - old),
        *(Part(EARLIER, e, old * of_earlier / len(earlier)) for e in earlier),
    ]
    if replay is not None:
        found.append(Part(LAB, replay, old * (1.0 - of_earlier)))
    return tuple(p for p in found if p.pool == NEW or p.weight > 0)


def steps(new: Part, frames: int, settings: TrainSettings) -> int:
    """Steps that draw each of ``new``'s ``frames`` ``min_epochs`` times on average; ``steps`` at least."""
    a_step = settings.batch_size * new.weight
    return max(settings.steps, math.ceil(settings.min_epochs * frames / a_step)) if a_step else settings.steps
