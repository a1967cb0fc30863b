"""Whether a bundle does what its checkpoint does: the robot's code on one side, lerobot's on the other.

Both get the same observations from the camera's bytes on; tokeniser, resizing, normalisation, denoising and
the way back to the robot's units are compared with them. Both start from the noise that robots use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel.edge.policy import Policy
from flywheel.export.observations import Seen
from flywheel.schema import Bundle
from flywheel.vla import Checkpoint

Chunk = tuple[NDArray[np.float32], NDArray[np.float32]]  # normalised [T, A] and in the robot's units [T, A]


@dataclass(frozen=True)
class Parity:
    """How far a bundle's actions are from lerobot's, over all observations; inf if anything is not finite.

    ``absolute``: largest difference of a normalised action (one standard deviation of the training data is
    1) or of an action in the robot's units over its standard deviation. ``relative``: of an observation's
    chunk, root mean square of the difference over that of the chunk itself; the worst observation.
    ``infer_ms``: median time of an inference, one thread.
    """

    absolute: float
    relative: float
    infer_ms: float


def reference(loaded: Checkpoint, bundle: Bundle, seen: Sequence[Seen], relative: int) -> list[Chunk]:
    """lerobot's chunks, through its own processors; the first ``relative`` actions made absolute."""
    import torch
    from lerobot.policies.utils import prepare_observation_for_inference

    noise = torch.from_numpy(start_noise(bundle))
    out: list[Chunk] = []
    for s in seen:
        raw: dict[str, Any] = {f"observation.images.{c}": s.images[c].copy() for c in bundle.cameras}
        raw["observation.state"] = s.state.copy()
        with torch.inference_mode():
            batch = loaded.pre(prepare_observation_for_inference(raw, torch.device("cpu"), s.instruction))
            normal = loaded.predict(batch, noise, bundle.num_steps)
            units = loaded.post(normal.clone()).numpy()[0].copy()
        units[:, :relative] += s.state[:relative]
        out.append((normal.numpy()[0], units))
    return out


def start_noise(bundle: Bundle, seed: int = 0) -> NDArray[np.float32]:
    """The noise that ``Policy.load`` starts denoising from, ``[1, chunk, max_action_dim]``."""
    shape = (1, bundle.chunk, bundle.max_action_dim)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def compare(
    directory: Path, seen: Sequence[Seen], expected: Sequence[Chunk], std: NDArray[np.float32]
) -> Parity:
    """The bundle in ``directory``, loaded as a robot loads it, against ``expected``. ``std``: of actions."""
    policy = Policy.load(directory, threads=1)
    width = len(policy.bundle.action_names)
    absolute = relative = 0.0
    took: list[int] = []
    for s, (normal, units) in zip(seen, expected, strict=True):
        started = time.perf_counter_ns()
        got = policy.infer(s.images, s.state, s.instruction)
        took.append(time.perf_counter_ns() - started)
        error = got.actions_norm[0, :, :width] - normal
        outside = (got.actions - units) / np.maximum(std, 1e-6)
        if not (np.isfinite(error).all() and np.isfinite(outside).all()):
            return Parity(float("inf"), float("inf"), float(np.median(took)) / 1e6)
        absolute = max(absolute, float(np.abs(error).max()), float(np.abs(outside).max()))
        relative = max(relative, float(np.sqrt(np.mean(error**2) / max(float(np.mean(normal**2)), 1e-12))))
    return Parity(absolute, relative, float(np.median(took)) / 1e6)
