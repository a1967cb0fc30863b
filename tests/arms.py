"""Eyes for a policy with three cameras and six joints, on the tiny robot: its arm follows two of them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from flywheel.edge.link import Seqlock
from flywheel.robot import FloatArray, Image, Observation
from tests.robots import WORLD

CAMERAS = {"top": (24, 40), "left": (24, 40), "wrist": (24, 40)}
REACH_RAD = 0.05


class Eyes:
    """Perception; the policy's random actions become small moves around the middle."""

    cameras: tuple[str, ...] = tuple(CAMERAS)

    def __init__(self, world: memoryview) -> None:
        self._world = Seqlock(WORLD, world)

    def observe(self) -> Observation:
        record = self._world.record()
        self._world.read(record)
        q = record["q"][0].astype(np.float64)
        images: dict[str, Image] = {
            name: np.full((*size, 3), 40 * k + 20, np.uint8) for k, (name, size) in enumerate(CAMERAS.items())
        }
        return Observation(time.monotonic_ns(), images, np.array([*q, 0, 0, 0, 0], np.float32), q.copy())

    def to_joint_chunk(self, actions: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
        del q
        return REACH_RAD * np.tanh(actions[:, :2]), np.clip(actions[:, 5], 0.0, 1.0)


def perception(args: dict[str, Any], world: memoryview) -> Eyes:
    """For ``Plan.perception``."""
    del args
    return Eyes(world)
