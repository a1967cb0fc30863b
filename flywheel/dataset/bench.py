"""``flywheel bench dataset``: writing a LeRobotDataset v3 against lerobot's own writer, on the same frames.

The frames are those of recorded episodes, so their pictures are there as JPEG. ``recorded`` is what curation
does: it writes the JPEGs as they are. ``arrays`` is given pixels, as lerobot's writer is, and makes PNGs; the
bar counts ``recorded``; decoding the JPEGs for lerobot is not held against it. All write the same clips, in
turns; then the tables are compared: every value of every row, every pixel that a reader decodes, the bytes of
every PNG, and what the metadata say. lerobot sends each frame through a file of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flywheel.dataset import Clip, Jpegs, load_frames, write_dataset
from flywheel.dataset.frames import IMAGE_PREFIX
from flywheel.dataset.writing import features
from flywheel.edge.bench import machine

FRAMES, SIDE, JOINTS, FPS, QUALITY = 40, 64, 4, 10, 90
TABLES = ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet")
DOCUMENTS = ("meta/info.json", "meta/stats.json")


def clips(count: int, seed: int = 0) -> list[Clip]:
    """``count`` made-up clips of one 64×64 camera whose pictures move and have a sensor's noise."""
    import simplejpeg

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    made = []
    for k in range(count):
        way = np.cumsum(rng.normal(scale=0.05, size=(FRAMES + 1, JOINTS)), axis=0).astype(np.float32)
        waves = [np.sin((x + t) / 6.0) * np.cos((y - 2 * t + k) / 9.0) for t in range(FRAMES)]
        pictures = 120 + 80 * np.stack(waves)[..., None] + rng.normal(scale=4.0, size=(FRAMES, SIDE, SIDE, 3))
        jpegs = [
            simplejpeg.encode_jpeg(p, QUALITY, "RGB", "420")
            for p in np.clip(pictures, 0, 255).astype(np.uint8)
        ]
        made.append(
            Clip(
                task=f"pick the {('red', 'green', 'blue')[k % 3]} box",
                images={"wrist": Jpegs(jpegs, pictures.shape)},
                state=way[:-1],
                action=way[1:],
                capture_time_ns=np.arange(FRAMES, dtype=np.int64) * 100_000_000 + k * 10**10,
                intervention=np.arange(FRAMES) > FRAMES // 2,
            )
        )
    return made


def as_arrays(clip: Clip) -> Clip:
    """The same clip with decoded pictures."""
    pixels = {k: v[range(len(v))] if isinstance(v, Jpegs) else v for k, v in clip.images.items()}
    return replace(clip, images=pixels)


def lerobots(root: Path, made: list[Clip]) -> None:
    """The same clips by ``add_frame`` and ``save_episode``."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset.create(
        f"local/{root.name}", FPS, features(made[0]), root=root, robot_type="flywheel", use_videos=False
    )
    for c in made:
        pixels = c.images["wrist"]
        assert isinstance(pixels, np.ndarray), "as_arrays comes first"
        for i in range(len(c)):
            dataset.add_frame(
                {
                    "observation.images.wrist": pixels[i],
                    "observation.state": c.state[i],
                    "action": c.action[i],
                    "capture_time_ns": c.capture_time_ns[i : i + 1],
                    "intervention": c.intervention[i : i + 1],
                    "task": c.task,
                }
            )
        dataset.save_episode()
    dataset.finalize()


def differing(ours: Path, theirs: Path, recorded: bool) -> list[str]:
    """Which of the tables and documents differ in content; pictures as they are decoded where they are not
    written alike."""
    import json

    found = []
    for n in TABLES:
        a, b = pq.read_table(ours / n), pq.read_table(theirs / n)
        if recorded and (pictures := [c for c in a.schema.names if c.startswith(IMAGE_PREFIX)]):
            a, b = a.drop_columns(pictures), b.drop_columns(pictures)
        if not a.equals(b):
            found.append(n)
    if recorded:
        mine, others = load_frames(ours), load_frames(theirs)
        if not np.array_equal(mine.image("wrist"), others.image("wrist")):
            found.append("pixels")
    return found + [
        n for n in DOCUMENTS if json.loads((ours / n).read_text()) != json.loads((theirs / n).read_text())
    ]


def dataset(full: bool = False) -> dict[str, Any]:
    """Measure; the document of ``flywheel bench --json``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load = os.getloadavg()
    root = Path(tempfile.mkdtemp(prefix="flywheel-dataset-"))
    took: dict[str, list[float]] = {"recorded": [], "arrays": [], "lerobot": []}
    differ: list[str] = []
    try:
        write_dataset(root / "warm", clips(1), FPS)
        lerobots(root / "warm-lerobot", [as_arrays(c) for c in clips(1)])
        for k in range(6 if full else 3):
            recorded = clips(40 if full else 8, seed=k)
            arrays = [as_arrays(c) for c in recorded]
            ways: dict[str, Callable[[Path], object]] = {
                "recorded": lambda to, made=recorded: write_dataset(to, made, FPS),  # type: ignore[misc]
                "arrays": lambda to, made=arrays: write_dataset(to, made, FPS),  # type: ignore[misc]
                "lerobot": lambda to, made=arrays: lerobots(to, made),  # type: ignore[misc]
            }
            for name, way in ways.items():
                begun = time.perf_counter()
                way(root / str(k) / name)
                took[name].append(time.perf_counter() - begun)
            for name in ("recorded", "arrays"):
                differ += differing(root / str(k) / name, root / str(k) / "lerobot", name == "recorded")
            shutil.rmtree(root / str(k))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    frames = len(arrays) * FRAMES
    s = {name: np.array(t) for name, t in took.items()}
    ratio = float(np.median(s["lerobot"] / s["recorded"]))
    return {
        "bench": "dataset",
        "machine": machine(),
        "load": {
            "before": load,
            "after": os.getloadavg(),
            "named": f"{len(arrays)} episodes of {FRAMES} frames of {SIDE}x{SIDE}, {len(s['arrays'])} rounds",
            "differing": sorted(set(differ)),
        },
        "figures": {
            **{f"{name}_frames_per_s": frames / float(np.median(t)) for name, t in s.items()},
            "speed_up": ratio,
            "speed_up_arrays": float(np.median(s["lerobot"] / s["arrays"])),
            "tables_that_differ": float(len(differ)),
        },
        "bars": {
            "speed_up": {"value": ratio, "op": ">=", "bar": 5.0, "ok": ratio >= 5.0},
            "tables_that_differ": {"value": float(len(differ)), "op": "<=", "bar": 0.0, "ok": not differ},
        },
    }
