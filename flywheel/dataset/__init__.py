"""Dataset versions, LeRobotDataset v3 in image mode: write one, hash it, read it into memory, mix several.

lerobot's own reader decodes each item again and costs milliseconds an item, more than the update of a small
policy; its writer costs 0.2 s an episode. What is written here is what lerobot's writer would write, and
what is read is what its reader would give: the tests compare both. torch and lerobot are imported inside
functions only.
"""

from flywheel.dataset.cached import CachedDataset, Stats, mixture
from flywheel.dataset.frames import Frames, dataset_digest, frames_in, load_frames
from flywheel.dataset.writing import Clip, Jpegs, write_dataset

__all__ = [
    "CachedDataset",
    "Clip",
    "Frames",
    "Jpegs",
    "Stats",
    "dataset_digest",
    "frames_in",
    "load_frames",
    "mixture",
    "write_dataset",
]
