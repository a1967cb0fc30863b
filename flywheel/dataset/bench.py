"""``flywheel bench dataset``: writing a LeRobotDataset v3 against lerobot's own writer, on the same frames.

Both write the same clips, in turns; then the tables are compared: every value of every row, the bytes of
every picture among them, and what the metadata say. lerobot sends each frame through a file of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flywheel.dataset import Clip, write_dataset
from flywheel.dataset.writing import features
from flywheel.edge.bench import machine

FRAMES, SIDE, JOINTS, FPS = 40, 64, 4, 10
TABLES = ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet")
DOCUMENTS = ("meta/info.json", "meta/stats.json")


def clips(count: int, seed: int = 0) -> list[Clip]:
    """``count`` made-up clips of one 64×64 camera whose pictures move and have a sensor's noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    made = []
    for k in range(count):
        way = np.cumsum(rng.normal(scale=0.05, size=(FRAMES + 1, JOINTS)), axis=0).astype(np.float32)
        waves = [np.sin((x + t) / 6.0) * np.cos((y - 2 * t + k) / 9.0) for t in range(FRAMES)]
        pictures = 120 + 80 * np.stack(waves)[..., None] + rng.normal(scale=4.0, size=(FRAMES, SIDE, SIDE, 3))
        made.append(
            Clip(
                task=f"pick the {('red', 'green', 'blue')[k % 3]} box",
                images={"wrist": np.clip(pictures, 0, 255).astype(np.uint8)},
                state=way[:-1],
                action=way[1:],
                capture_time_ns=np.arange(FRAMES, dtype=np.int64) * 100_000_000 + k * 10**10,
                intervention=np.arange(FRAMES) > FRAMES // 2,
            )
        )
    return made


def lerobots(root: Path, made: list[Clip]) -> None:
    """The same clips by ``add_frame`` and ``save_episode``."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset.create(
        f"local/{root.name}", FPS, features(made[0]), root=root, robot_type="flywheel", use_videos=False
    )
    for c in made:
        for i in range(len(c)):
            dataset.add_frame(
                {
                    "observation.images.wrist": c.images["wrist"][i],
                    "observation.state": c.state[i],
                    "action": c.action[i],
                    "capture_time_ns": c.capture_time_ns[i : i + 1],
                    "intervention": c.intervention[i : i + 1],
                    "task": c.task,
                }
            )
        dataset.save_episode()
    dataset.finalize()


def differing(ours: Path, theirs: Path) -> list[str]:
    """Which of the tables and documents differ in content."""
    import json

    found = [n for n in TABLES if not pq.read_table(ours / n).equals(pq.read_table(theirs / n))]
    return found + [
        n for n in DOCUMENTS if json.loads((ours / n).read_text()) != json.loads((theirs / n).read_text())
    ]


def dataset(full: bool = False) -> dict[str, Any]:
    """Measure; the document of ``flywheel bench --json``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load = os.getloadavg()
    root = Path(tempfile.mkdtemp(prefix="flywheel-dataset-"))
    ours_s: list[float] = []
    theirs_s: list[float] = []
    differ: list[str] = []
    try:
        write_dataset(root / "warm", clips(1), FPS)
        lerobots(root / "warm-theirs", clips(1))
        for k in range(6 if full else 3):
            made = clips(40 if full else 8, seed=k)
            begun = time.perf_counter()
            write_dataset(root / f"ours-{k}", made, FPS)
            ours_s.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            lerobots(root / f"theirs-{k}", made)
            theirs_s.append(time.perf_counter() - begun)
            differ += differing(root / f"ours-{k}", root / f"theirs-{k}")
            shutil.rmtree(root / f"ours-{k}")
            shutil.rmtree(root / f"theirs-{k}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    frames = len(made) * FRAMES
    ratio = float(np.median(np.array(theirs_s) / np.array(ours_s)))
    return {
        "bench": "dataset",
        "machine": machine(),
        "load": {
            "before": load,
            "after": os.getloadavg(),
            "named": f"{len(made)} episodes of {FRAMES} frames of {SIDE}x{SIDE}, {len(ours_s)} rounds",
            "differing": sorted(set(differ)),
        },
        "figures": {
            "frames_per_s": frames / float(np.median(ours_s)),
            "lerobot_frames_per_s": frames / float(np.median(theirs_s)),
            "speed_up": ratio,
            "tables_that_differ": float(len(differ)),
        },
        "bars": {
            "speed_up": {"value": ratio, "op": ">=", "bar": 5.0, "ok": ratio >= 5.0},
            "tables_that_differ": {"value": float(len(differ)), "op": "<=", "bar": 0.0, "ok": not differ},
        },
    }
