"""Demonstrations of the task for replay: whole runs of the operator, from states all over the task.

Kinematic: the tool is where it was told to be a step ago. In the lab that is true to within a millimetre
(the tracking error that `flywheel eval` reports), and a run costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flywheel.twin.cell import Cell
from flywheel.twin.operator import plan
from flywheel.twin.sampling import ACTION_NAMES, STATE_NAMES, scatter, state_of
from flywheel.twin.shift import Shift

STEP_S = 0.1
_LONGEST = 60  # steps; a run from anywhere takes at most about 45


@dataclass(frozen=True)
class Demonstration:
    """One run, ``N`` frames: wrist images, STATE_NAMES, ACTION_NAMES (the target for the next step)."""

    instruction: str
    images: NDArray[np.uint8]  # [N, 64, 64, 3]
    states: NDArray[np.float32]  # [N, 4]
    actions: NDArray[np.float32]  # [N, 4]


def demonstrate(shift: Shift, runs: int, seed: int, scattered: float = 0.5) -> Iterator[Demonstration]:
    """``runs`` demonstrations in ``shift``; a share ``scattered`` starts from anywhere in the task."""
    rng = np.random.default_rng(seed)
    cell = Cell(shift)
    try:
        for _ in range(runs):
            cell.reset(int(rng.integers(2**62)))
            if rng.random() < scattered:
                scatter(cell, rng)
            yield _run(cell)
    finally:
        cell.close()


def _run(cell: Cell) -> Demonstration:
    images: list[NDArray[np.uint8]] = []
    states: list[NDArray[np.float32]] = []
    actions: list[NDArray[np.float32]] = []
    hang = cell.top(cell.target) - cell.tip if cell.held >= 0 else np.zeros(3)
    half = cell.top(cell.target)[2] - cell.centre(cell.target)[2]
    for _ in range(_LONGEST):
        held = cell.held >= 0
        images.append(cell.render("wrist"))
        states.append(state_of(cell))
        target = plan(cell.tip, held, held, cell.target_top, 1, STEP_S)[0]
        actions.append(target.astype(np.float32))
        if held and target[3] < 0.5:  # let go over the bin: done
            break
        cell.place_arm(target[:3])
        if not held and target[3] > 0.5 and np.abs(target[:3] - cell.target_top).max() < 0.008:
            cell.held = cell.target
            hang = cell.top(cell.target) - target[:3]
        if cell.held >= 0:
            cell.set_box(cell.target, target[:3] + hang - np.array([0.0, 0.0, half]))
        cell.settle()
    shape = (len(images), len(STATE_NAMES)), (len(images), len(ACTION_NAMES))
    return Demonstration(
        cell.instruction,
        np.stack(images),
        np.stack(states).reshape(shape[0]),
        np.stack(actions).reshape(shape[1]),
    )
