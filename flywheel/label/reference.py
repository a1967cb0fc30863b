"""What a policy was trained on, shown again: views of the demonstrations that every turn replays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from flywheel.label.pictures import VIEWS
from flywheel.twin.demonstrate import demonstrate
from flywheel.twin.shift import shift

Run = tuple[Mapping[str, NDArray[np.uint8]], NDArray[np.float32], str]


def demonstrated(name: str, runs: int, seed: int) -> list[Run]:
    """Views, states and the instruction of ``runs`` demonstrations in the shift ``name``."""
    found: list[Run] = []
    for run in demonstrate(shift(name), runs, seed):
        at = np.unique(np.linspace(0, len(run.states) - 1, 2 * VIEWS).round().astype(int))
        found.append(({"wrist": run.images[at]}, run.states[at], run.instruction))
    return found
