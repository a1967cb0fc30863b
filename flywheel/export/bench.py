"""``flywheel bench policy``: the exported bundle in ONNX Runtime against its checkpoint in lerobot.

Both see the same images, states, instruction and noise, take the same number of denoising steps and run on
one thread; they take turns, inference by inference, so that a slower machine is slower for both. Two spans
are timed: from a camera's image to actions (what a robot waits for: lerobot's processors, ``select_action``,
post-processor; here ``Policy.infer``), and the network alone (``select_action`` on a prepared batch; the
session). Every ``select_action`` finds an empty queue, so every one infers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel.config import checkout
from flywheel.edge.bench import machine
from flywheel.edge.figures import Quantiles
from flywheel.edge.policy import Policy
from flywheel.errors import BundleError
from flywheel.schema import sha256_file
from flywheel.vla import WEIGHTS_FILE, Checkpoint, load, offline

INSTRUCTION = "pick the red box and place it in the bin"
SEED = 0
Observation = dict[str, npt.NDArray[Any]]  # by lerobot's names


def policy(full: bool = False, checkpoint: Path | None = None) -> dict[str, Any]:
    """Measure for seconds, or a minute with ``full``; returns the document of ``flywheel bench --json``.

    ``checkpoint`` holds lerobot's files and ``bundle/``; default: ``models/base``. Raises ``BundleError`` if
    it is missing, or if the bundle was not made of it.
    """
    where = checkpoint or _base()
    turns, warm_up = (300, 10) if full else (40, 3)
    offline()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peers = Peers(where)
        before = os.getloadavg()
        worst = max(peers.difference(k) for k in range(8))
        spans: dict[str, list[int]] = {"onnx": [], "lerobot": [], "onnx_network": [], "lerobot_network": []}
        for k in range(warm_up + turns):
            for name, ns in peers.turn(k).items():
                if k >= warm_up:
                    spans[name].append(ns)
    finally:
        torch.set_num_threads(threads)
    figures: dict[str, float] = {"parity_max": worst}
    for name, taken in spans.items():
        q = Quantiles.of(np.array(taken) / 1e6)
        tails = {"p50": q.p50, "p99": q.p99, "p999": q.p999, "max": q.max}
        figures |= {f"{name}_{k}_ms": v for k, v in tails.items()} | {f"{name}_n": float(q.n)}
    # The median of ratios of neighbours: what disturbs a turn disturbs both of it.
    for name in ("", "_network"):
        ratios = np.array(spans[f"lerobot{name}"]) / np.array(spans[f"onnx{name}"])
        figures[f"ratio{name}"] = float(np.median(ratios))
        figures[f"ratio{name}_p10"] = float(np.percentile(ratios, 10))
    bars = {"ratio": (figures["ratio"], ">=", 3.0), "parity_max": (worst, "<=", 1e-4)}
    return {
        "bench": "policy",
        "machine": machine(),
        "load": {
            "before": before,
            "after": os.getloadavg(),
            "named": "one thread each, in turns; the machine's own load besides",
            "digest": peers.policy.digest,
            "denoising_steps": peers.policy.bundle.num_steps,
            "torch": torch.__version__,
        },
        "figures": figures,
        "bars": {
            k: {"value": v, "op": op, "bar": bar, "ok": v >= bar if op == ">=" else v <= bar}
            for k, (v, op, bar) in bars.items()
        },
    }


class Peers:
    """The same policy twice."""

    def __init__(self, where: Path, bundle: Path | None = None) -> None:
        import torch

        bundle = bundle or where / "bundle"
        self.policy = Policy.load(bundle, threads=1, seed=SEED)
        b = self.policy.bundle
        made_of = b.provenance.get("checkpoint_sha256")
        if made_of != sha256_file(where / WEIGHTS_FILE):
            raise BundleError(
                f"{bundle}: made of another checkpoint ({made_of}) than "
                f"{where / WEIGHTS_FILE}; export it again"
            )
        self._lerobot: Checkpoint = load(where)
        self._lerobot.policy.config.num_steps = b.num_steps
        self._noise = torch.from_numpy(
            np.random.default_rng(SEED).standard_normal((1, b.chunk, b.max_action_dim), np.float32)
        )
        self._rng = np.random.default_rng(SEED)
        state = self._lerobot.stats["observation.state"]
        self._mean, self._std = (np.asarray(state[k], np.float32) for k in ("mean", "std"))

    def turn(self, k: int) -> dict[str, int]:
        """Time both on one observation, now one first, now the other; ns."""
        seen = self._look()
        batch = self._batch(seen)
        network = {"onnx_network": lambda: self._infer(seen), "lerobot_network": lambda: self._select(batch)}
        return self._timed(self._spans(seen, "onnx", "lerobot"), k) | self._timed(network, k)

    def whole(self, k: int) -> dict[str, int]:
        """Time ``onnx`` and ``pytorch`` from a camera's image to actions; ns."""
        return self._timed(self._spans(self._look(), "onnx", "pytorch"), k)

    def _spans(self, seen: Observation, mine: str, theirs: str) -> dict[str, Callable[[], object]]:
        return {mine: lambda: self._infer(seen), theirs: lambda: self._predict(seen)}

    @staticmethod
    def _timed(pair: dict[str, Callable[[], object]], k: int) -> dict[str, int]:
        took: dict[str, int] = {}
        for name, act in pair.items() if k % 2 else reversed(pair.items()):
            start = time.perf_counter_ns()
            done = act()
            took[name] = time.perf_counter_ns() - start
            if name == "onnx_network":
                took[name] = int(getattr(done, "infer_ns", took[name]))  # the session alone
        return took

    def difference(self, k: int) -> float:
        """Largest difference of a chunk's normalised actions; NaN on either side comes back as inf."""
        seen = self._look()
        width = len(self.policy.bundle.action_names)
        mine = self._infer(seen).actions_norm[0, :, :width]
        batch, torchs = self._batch(seen), self._lerobot.policy
        theirs = [self._select(batch)]
        theirs += [torchs.select_action(batch) for _ in range(torchs.config.n_action_steps - 1)]
        error = np.abs(mine[: len(theirs)] - np.concatenate([a.numpy() for a in theirs]))
        return float(error.max()) if np.isfinite(error).all() else float("inf")

    def _look(self) -> Observation:
        b = self.policy.bundle
        seen: Observation = {
            f"observation.images.{c}": self._rng.integers(0, 256, (*b.image_hw, 3), np.uint8)
            for c in b.cameras
        }
        drawn = self._rng.standard_normal(len(b.state_names), np.float32)
        seen["observation.state"] = (self._mean + self._std * drawn).astype(np.float32)
        return seen

    def _infer(self, seen: Observation) -> Any:
        images = {c: seen[f"observation.images.{c}"] for c in self.policy.bundle.cameras}
        return self.policy.infer(images, seen["observation.state"], INSTRUCTION)

    def _batch(self, seen: Observation) -> Any:
        import torch
        from lerobot.policies.utils import prepare_observation_for_inference

        with torch.inference_mode():
            return self._lerobot.pre(
                prepare_observation_for_inference(copy(seen), torch.device("cpu"), INSTRUCTION)
            )

    def _select(self, batch: Any) -> Any:
        import torch

        self._lerobot.policy.reset()
        with torch.inference_mode():
            return self._lerobot.policy.select_action(batch, noise=self._noise)

    def _predict(self, seen: Observation) -> Any:
        """As lerobot's ``predict_action`` does, with the noise given."""
        import torch

        with torch.inference_mode():
            return self._lerobot.post(self._select(self._batch(seen)))


def _base() -> Path:
    root = checkout(Path.cwd())
    if root is None or not (root / "models" / "base" / "bundle").is_dir():
        raise BundleError("bench policy compares models/base with its bundle: start it in a checkout of both")
    return root / "models" / "base"
