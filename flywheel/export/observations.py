"""What a bundle is compared on: observations of a dataset, or drawn ones where there is none yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel.errors import StageError
from flywheel.schema import Bundle

# Of different lengths, so that padding is looked at too.
_INSTRUCTIONS = ("pick", "pick the red box", "pick the blue box and place it in the bin")


@dataclass(frozen=True)
class Seen:
    """One observation: images uint8 ``[H, W, 3]`` by camera, raw state float32 ``[S]``, instruction."""

    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    instruction: str


def recorded(dataset: Path, bundle: Bundle, n: int, seed: int = 0) -> list[Seen]:
    """``n`` frames of a LeRobotDataset, drawn without replacement (all of them, if it has fewer).

    Raises ``StageError`` where its cameras or states are not the policy's.
    """
    from flywheel.dataset import load_frames
    from flywheel.dataset.frames import IMAGE_PREFIX

    frames = load_frames(dataset)
    have = {k.removeprefix(IMAGE_PREFIX): v.shape[1:3] for k, v in frames.images.items()}
    for camera in bundle.cameras:
        if have.get(camera) != bundle.image_hw:
            raise StageError(
                f"{dataset}: camera {camera!r} is {have.get(camera, 'missing')}, the policy needs "
                f"{bundle.image_hw}; give observations of the robot that it is for"
            )
    if frames.state.shape[1] != len(bundle.state_names):
        raise StageError(
            f"{dataset}: state has {frames.state.shape[1]} dimensions, the policy needs "
            f"{len(bundle.state_names)}: {', '.join(bundle.state_names)}"
        )
    drawn = np.random.default_rng(seed).permutation(len(frames))[:n]
    return [
        Seen(
            {c: frames.image(c)[row] for c in bundle.cameras},
            np.asarray(frames.state[row], np.float32),
            frames.task(int(row)),
        )
        for row in drawn
    ]


def generated(stats: dict[str, dict[str, Any]], bundle: Bundle, n: int, seed: int = 0) -> list[Seen]:
    """``n`` observations of noise: every pixel at random, states as they are spread in ``stats``."""
    rng = np.random.default_rng(seed)
    mean, std = (np.asarray(stats["observation.state"][k], np.float32) for k in ("mean", "std"))
    return [
        Seen(
            {c: rng.integers(0, 256, (*bundle.image_hw, 3), np.uint8) for c in bundle.cameras},
            (mean + std * rng.standard_normal(len(mean), np.float32)).astype(np.float32),
            _INSTRUCTIONS[k % len(_INSTRUCTIONS)],
        )
        for k in range(n)
    ]
