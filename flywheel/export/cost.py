"""``flywheel bench export``: what an export costs, and what comes of it.

The default policy, or with ``--full`` one of SmolVLA's published size with random weights. The export runs
in a process of its own, whose memory is what is reported; then the bundle and its checkpoint take turns on
the same observations, one thread each.
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.config import ExportSettings, checkout
from flywheel.edge.bench import machine
from flywheel.errors import BundleError
from flywheel.export import blank, stage
from flywheel.export.bench import Peers
from flywheel.vla import WEIGHTS_FILE, offline

# Within which an export is meant to stay: seconds, MB resident, MB on disk. Default policy, full size.
BUDGET = {False: (60.0, 2500.0, 5.0), True: (600.0, 12000.0, 2000.0)}


def export(full: bool = False) -> dict[str, Any]:
    """Measure for half a minute, or some minutes with ``full``; the document of ``flywheel bench --json``.

    Raises ``BundleError`` without a checkout of models/base, unless ``full``.
    """
    offline()
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-export-") as folder:
        root = Path(folder)
        settings = ExportSettings(num_steps=10, parity_observations=2) if full else ExportSettings()
        checkpoint = _alone(blank.write_checkpoint, root / "checkpoint") if full else _base()
        result: stage.ExportResult = _alone(stage.export, checkpoint, root / "bundle", settings)
        took = _turns(checkpoint, root / "bundle", 3 if full else 40)
    figures = {
        "seconds": result.seconds,
        "peak_rss_mb": result.peak_rss_mb,
        "bundle_mb": result.onnx_bytes / 1e6,
        "parity_max": result.parity_max,
        "parity_relative": result.parity_relative,
        "parity_observations": float(result.observations),
        "load_s": took["load_s"],
        "onnx_ms": float(np.median(took["onnx"])),
        "pytorch_ms": float(np.median(took["pytorch"])),
        "turns": float(len(took["onnx"])),
        # The median of ratios of neighbours: what disturbs a turn disturbs both of it.
        "ratio": float(np.median(np.array(took["pytorch"]) / np.array(took["onnx"]))),
    }
    seconds, memory, size = BUDGET[full]
    bars = {
        "parity_max": 1e-4,
        "parity_relative": 1e-4,
        "seconds": seconds,
        "peak_rss_mb": memory,
        "bundle_mb": size,
    }
    return {
        "bench": "export",
        "machine": machine(),
        "load": {
            "before": before,
            "after": os.getloadavg(),
            "named": "export in its own process; then bundle and checkpoint in turns, one thread each",
            "policy": "SmolVLA of the published size, random weights" if full else "models/base",
            "denoising_steps": settings.num_steps,
        },
        "figures": figures,
        "bars": {
            k: {"value": figures[k], "op": "<=", "bar": b, "ok": figures[k] <= b} for k, b in bars.items()
        },
    }


def _alone(function: Any, *args: Any) -> Any:
    """Call it in a fresh process that ends afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _turns(checkpoint: Path, bundle: Path, n: int) -> dict[str, Any]:
    """Times of an inference from camera to actions, ms, and of loading the bundle, s."""
    import torch

    from flywheel.edge.policy import Policy

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.perf_counter()
        Policy.load(bundle, threads=1)
        load_s = time.perf_counter() - started
        peers = Peers(checkpoint, bundle)
        taken: dict[str, list[float]] = {"onnx": [], "pytorch": []}
        for k in range(n + 1):
            spans = peers.whole(k)
            if k:  # the first warms up
                for name, ns in spans.items():
                    taken[name].append(ns / 1e6)
    finally:
        torch.set_num_threads(threads)
    return {**taken, "load_s": load_s}


def _base() -> Path:
    root = checkout(Path.cwd())
    if root is None or not (root / "models" / "base" / WEIGHTS_FILE).is_file():
        raise BundleError("bench export exports models/base: start it in a checkout, or ask for --full")
    return root / "models" / "base"
