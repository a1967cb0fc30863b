"""Kinematic samples: a new scene for every frame, the operator's plan as the action chunk.

Rolling the operator out in the simulator gives long runs of frames that differ little; a policy learns
faster from states scattered over the task (DAgger's argument, Ross et al. 2011, turned round: draw the
states from where a learner may end up, and ask the expert there).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flywheel.twin.cell import BOXES, HOME_M, Cell
from flywheel.twin.kinematics import TOOL_M, FloatArray, inverse
from flywheel.twin.operator import BIN_M, DROP_M, HOVER_M, plan
from flywheel.twin.shift import COLOURS, Shift

STATE_NAMES = ("tool_x", "tool_y", "tool_z", "held")
ACTION_NAMES = ("tool_x", "tool_y", "tool_z", "suction")
_LOW_M = 0.038


@dataclass(frozen=True, slots=True)
class Samples:
    """``n`` independent frames.

    Attributes:
        images: uint8 ``[n, 64, 64, 3]``, wrist camera.
        states: float32 ``[n, 4]``, STATE_NAMES.
        chunks: float32 ``[n, steps, 4]``, ACTION_NAMES, absolute.
        targets: int64 ``[n]``, index into COLOURS.
        tops: float32 ``[n, 3, 3]``, centres of the boxes' upper faces relative to the cup, m.
        colours: int64 ``[n, 3]``, index into COLOURS for each box.
        boxes: int64 ``[n]``, which of the three boxes is the target.
    """

    images: NDArray[np.uint8]
    states: NDArray[np.float32]
    chunks: NDArray[np.float32]
    targets: NDArray[np.int64]
    tops: NDArray[np.float32]
    colours: NDArray[np.int64]
    boxes: NDArray[np.int64]


def state_of(cell: Cell) -> NDArray[np.float32]:
    """What the policy is told beside the image, float32 ``[4]``, STATE_NAMES."""
    return np.array([*cell.tip, float(cell.held >= 0)], np.float32)


def scatter(cell: Cell, rng: np.random.Generator) -> None:
    """Move the arm (and the target, if it is to hang on the cup) to a state drawn from all over the task."""
    top = cell.target_top
    u = rng.random()
    held = False
    if u < 0.15:
        tip = HOME_M + rng.normal(0, 0.04, 3)
    elif u < 0.38:  # on the way from home to the target, off the line
        w = rng.random()
        tip = (1 - w) * HOME_M + w * np.array([*top[:2], HOVER_M]) + rng.normal(0, 0.03, 3)
    elif u < 0.46:  # anywhere
        a, r = rng.uniform(-0.8, 1.2), rng.uniform(0.3, 0.6)
        tip = np.array([r * np.cos(a), r * np.sin(a), rng.uniform(0.08, 0.33)])
    elif u < 0.64:  # over the target
        tip = np.array([*(top[:2] + rng.normal(0, 0.025, 2)), top[2] + rng.uniform(0, 0.11)])
    elif u < 0.72:  # about to grasp
        tip = np.array([*(top[:2] + rng.normal(0, 0.007, 2)), top[2] + abs(rng.normal(0, 0.006))])
    else:
        held = True
        grip = np.array([*(top[:2] + rng.normal(0, 0.006, 2)), top[2]])
        w = rng.random()
        if w < 0.3:
            tip = np.array([*grip[:2], rng.uniform(grip[2], 0.16)])
        elif w < 0.75:
            v = rng.random()
            tip = (
                (1 - v) * np.array([*grip[:2], 0.15])
                + v * np.array([*BIN_M, DROP_M])
                + rng.normal(0, 0.015, 3)
            )
        else:
            tip = np.array([*BIN_M, DROP_M]) + rng.normal(0, (0.02, 0.02, 0.008), 3)
    tip[2] = min(max(tip[2], _LOW_M), 0.36)
    if not np.all(np.isfinite(inverse(tip))):
        tip = HOME_M.copy()
    offset = tip - (grip if held else tip)
    cell.place_arm(tip)
    if held:
        centre = cell.centre(cell.target) + offset
        centre[2] = max(centre[2], 0.01)
        cell.set_box(cell.target, centre, float(rng.uniform(-0.3, 0.3)))
        cell.held = cell.target
    cell.settle()


def draw(shift: Shift, n: int, seed: int, steps: int, step_s: float = 0.1) -> Samples:
    """``n`` samples of ``shift``; the same seed gives the same samples."""
    rng = np.random.default_rng(seed)
    cell = Cell(shift)
    names = list(COLOURS)
    out = Samples(
        np.empty((n, 64, 64, 3), np.uint8),
        np.empty((n, len(STATE_NAMES)), np.float32),
        np.empty((n, steps, len(ACTION_NAMES)), np.float32),
        np.empty(n, np.int64),
        np.empty((n, BOXES, 3), np.float32),
        np.empty((n, BOXES), np.int64),
        np.empty(n, np.int64),
    )
    for i in range(n):
        cell.reset(int(rng.integers(2**62)))
        scatter(cell, rng)
        out.images[i] = cell.render("wrist")
        out.states[i] = state_of(cell)
        held = cell.held >= 0
        out.chunks[i] = plan(cell.tip, held, held, cell.target_top, steps, step_s)
        out.targets[i] = names.index(cell.colours[cell.target])
        out.tops[i] = [cell.top(b) - cell.tip for b in range(BOXES)]
        out.colours[i] = [names.index(c) for c in cell.colours]
        out.boxes[i] = cell.target
    cell.close()
    return out


def project(tops: FloatArray, side_px: int = 64) -> FloatArray:
    """Where points relative to the cup (``[..., 3]`` m) fall in the lab's image, ``[..., 2]`` px u, v."""
    focal = side_px / 2.0  # fovy is 90 degrees
    depth = TOOL_M - tops[..., 2]
    u = side_px / 2 - focal * tops[..., 1] / depth
    v = side_px / 2 - focal * (tops[..., 0] - 0.06) / depth
    return np.stack([u, v], axis=-1)
