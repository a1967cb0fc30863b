"""lerobot's own dataset writer under the recorder's load: the peer in ``flywheel bench recorder``.

Run as a process of its own (``python -m flywheel.dataset.peer FRAMES``): what it costs is measured from
outside of anything else. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CAMERAS, HEIGHT, WIDTH, JOINTS, FPS = 3, 480, 640, 7, 30


def main(frames: int) -> dict[str, float]:
    """Record ``frames`` frames of three cameras as its users do; seconds that each call blocks its caller."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {"dtype": "video", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channel"]}
    vector = {"dtype": "float32", "shape": (JOINTS,), "names": [f"j{i}" for i in range(JOINTS)]}
    features = {f"observation.images.c{i}": image for i in range(CAMERAS)}
    features |= {"observation.state": vector, "action": vector}
    pictures = scene(4)
    with tempfile.TemporaryDirectory(prefix="flywheel-peer-") as d:
        dataset = LeRobotDataset.create("local/peer", FPS, features, root=Path(d) / "set", use_videos=True)
        before = time.process_time()
        added = []
        for k in range(frames):
            row = {f"observation.images.c{i}": pictures[(k + i) % 4] for i in range(CAMERAS)}
            row |= {"observation.state": np.zeros(JOINTS, np.float32), "action": np.zeros(JOINTS, np.float32)}
            begun = time.perf_counter()
            dataset.add_frame({**row, "task": "pick"})
            added.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        dataset.save_episode()
        saved = time.perf_counter() - begun
        dataset.finalize()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = time.process_time() - before + children.ru_utime + children.ru_stime
    return {
        "frames": float(frames),
        "add_frame_p50_s": float(np.percentile(added, 50)),
        "add_frame_p99_s": float(np.percentile(added, 99)),
        "save_episode_s": saved,
        "cpu_share": used / (frames / FPS),
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def scene(n: int, seed: int = 0) -> list[np.ndarray]:  # type: ignore[type-arg]
    """Pictures ``[480, 640, 3]`` with edges, gradients and a sensor's noise, to compress as real ones do."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    found = []
    for _ in range(n):
        image = np.stack([(x + y * k) / (2 + k) % 256 for k in range(3)], axis=-1)
        for _ in range(12):
            top, left = rng.integers(0, HEIGHT - 80), rng.integers(0, WIDTH - 80)
            image[top : top + 80, left : left + 60] = rng.integers(0, 256, 3)
        found.append(np.clip(image + rng.normal(scale=4.0, size=image.shape), 0, 255).astype(np.uint8))
    return found


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = main(int(sys.argv[1]))
    print(json.dumps(out))
