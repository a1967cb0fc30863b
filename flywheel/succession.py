"""Several turns, in one shift after the other: which shifts, and what every turn's policy can do in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flywheel.config import Settings
from flywheel.errors import ConfigError
from flywheel.evaluate import Evaluator, Job, scene_seeds
from flywheel.schema import Proportion
from flywheel.stats import wilson
from flywheel.twin.shift import LAB, SUCCESSION


@dataclass(frozen=True)
class Taught:
    """A turn that reached the robots: its name, where its failures were from, the policy's digest."""

    turn: str
    shift: str
    digest: str


def succession(settings: Settings, turns: int) -> tuple[str, ...]:
    """The shifts of so many turns: the last of ``SUCCESSION``, which end with where the fleet works."""
    found = (*(s for s in SUCCESSION if s != settings.twin.shift), settings.twin.shift)
    if not 1 <= turns <= len(found):
        raise ConfigError(f"--turns {turns}: must be 1 to {len(found)}, a shift for each: {', '.join(found)}")
    return found[-turns:]


def success_of(
    bundles: Sequence[Path], taught: Sequence[Taught], scenes: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every policy on the same scenes in every shift: what was learned, and what was kept.

    ``bundles``: the base policy's, then each turn's. ``turns`` of the result tells of ``taught``, ``success``
    gives by shift the proportion that each bundle solved.
    """
    shifts = list(dict.fromkeys([*(t.shift for t in taught), LAB.name]))
    found: dict[str, list[Proportion]] = {s: [] for s in shifts}
    seeds = scene_seeds(seed, scenes)
    with Evaluator() as pool:
        for shift in shifts:
            say(f"{scenes} fresh scenes in [b]{shift}[/b], the policy of every turn")
            attempts = pool.run([Job(b, shift, s) for b in bundles for s in seeds])
            for k in range(len(bundles)):
                mine = attempts[k * scenes : (k + 1) * scenes]
                found[shift].append(wilson(sum(a.success for a in mine), scenes))
    return {"turns": [asdict(t) for t in taught], "success": found}
