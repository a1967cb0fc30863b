"""Items for lerobot's training loop from memory, over one dataset or several in stated shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel.dataset.frames import ACTION, FORMAT_VERSION, STATE, Array, Frames
from flywheel.errors import StageError

Stats = Mapping[str, Mapping[str, Array]]


class CachedDataset:
    """What lerobot's training loop needs of a dataset, from memory, over one or several ``Frames``.

    One part: items equal ``LeRobotDataset``'s with the same ``delta_timestamps``, key by key. Several
    parts: whole episodes are repeated until each part's share of the frames is its weight (to within one
    episode) and every episode of every part occurs; the loop's sampler draws every frame once an epoch,
    so the shares hold in each epoch. ``episode_index`` and ``index`` of an item then count repetitions.

    ``delta_timestamps``: as lerobot's, seconds relative to the frame, by feature. ``stats`` replaces the
    normalisation statistics; fine-tuning must normally keep the current policy's, since lerobot's loop
    takes the dataset's. By default those of the parts are pooled.
    """

    episodes: None = None  # lerobot: "all of them"
    absolute_to_relative_idx: None = None

    def __init__(
        self,
        parts: Sequence[Frames],
        weights: Sequence[float] | None = None,
        delta_timestamps: Mapping[str, Sequence[float]] | None = None,
        stats: Stats | None = None,
        repo_id: str = "local/cached",
    ) -> None:
        _check_parts(parts)
        weights = [1.0] * len(parts) if weights is None else list(weights)
        if len(weights) != len(parts) or not all(np.isfinite(w) and w > 0 for w in weights):
            raise StageError(f"weights {weights}: one positive number for each of {len(parts)} datasets")
        if len(parts) == 1:
            weights = [1.0]
        first = parts[0]
        self.fps = first.fps
        self.delta_timestamps = delta_timestamps
        self._parts = tuple(parts)
        self._keys = [k for k in first.info["features"] if all(k in p.info["features"] for p in parts)]
        self._deltas = _delta_rows(delta_timestamps or {}, self.fps, set(self._keys))
        self.tasks = tuple(dict.fromkeys(t for p in parts for t in p.tasks))
        self._episode_of = np.concatenate(
            [
                np.stack([np.full(len(chosen), p), chosen])
                for p, chosen in enumerate(mixture([f.ends - f.starts for f in parts], weights))
            ],
            axis=1,
        )  # [2, E'] part and episode within it
        starts = np.array([parts[p].starts[e] for p, e in self._episode_of.T], dtype=np.int64)
        ends = np.array([parts[p].ends[e] for p, e in self._episode_of.T], dtype=np.int64)
        self._starts, self._ends = starts, ends
        self.to_index = np.cumsum(ends - starts)
        self.from_index = self.to_index - (ends - starts)
        self.num_frames = int(self.to_index[-1])
        self.num_episodes = len(starts)
        self._tensors = [_tensors(p, self._keys) for p in parts]
        self.meta = _meta(self, repo_id, stats)

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """The features that all parts have, as lerobot declares them."""
        return {k: self._parts[0].info["features"][k] for k in self._keys}

    @property
    def shares(self) -> list[float]:
        """The share of frames that each part really has."""
        lengths = self._ends - self._starts
        return [
            float(lengths[self._episode_of[0] == p].sum() / lengths.sum()) for p in range(len(self._parts))
        ]

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One training item: tensors by feature, ``<feature>_is_pad`` for each with deltas, ``task``.

        Images are float32 [3, H, W] in 0..1 ([T, 3, H, W] with deltas), steps past an episode's end repeat
        its last frame and are marked as padding.
        """
        import torch

        if not -self.num_frames <= index < self.num_frames:
            raise IndexError(f"index {index} of {self.num_frames} frames")
        index = int(index) % self.num_frames
        episode = int(np.searchsorted(self.to_index, index, side="right"))
        part, _ = self._episode_of[:, episode]
        start, end = int(self._starts[episode]), int(self._ends[episode])
        row = start + index - int(self.from_index[episode])
        item: dict[str, Any] = {}
        for key, (values, is_image) in self._tensors[part].items():
            deltas = self._deltas.get(key)
            picked = values[row] if deltas is None else values[(deltas + row).clamp(start, end - 1)]
            item[key] = (
                picked.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
                if is_image
                else picked.clone()
            )
        for key, deltas in self._deltas.items():
            item[f"{key}_is_pad"] = (deltas + row < start) | (deltas + row >= end)
        task = self._parts[part].task(row)
        if len(self._parts) > 1:
            item["index"] = torch.tensor(index)
            item["episode_index"] = torch.tensor(episode)
            item["task_index"] = torch.tensor(self.tasks.index(task))
        item["task"] = task
        return item


def mixture(lengths: Sequence[Array], weights: Sequence[float]) -> list[NDArray[np.int64]]:
    """Which episodes to use, with repetition, so that part p has the share w_p/Σw of the frames.

    ``lengths[p]`` are the frames of part p's episodes. The part that is largest for its weight occurs
    once; the others are repeated whole, then filled up with episodes spread evenly over the part.
    """
    share = np.asarray(weights, dtype=float) / float(np.sum(weights))
    frames = np.array([float(np.sum(n)) for n in lengths])
    total = float(np.max(frames / share))
    out = []
    for n, w, size in zip(lengths, share, frames, strict=True):
        whole, rest = divmod(total * w, size)
        if size - rest < 1e-6 * size:  # rounding: a full repetition, not none
            whole, rest = whole + 1, 0.0
        order = np.arange(len(n), dtype=np.int64)
        # Golden-ratio order: any prefix of it is spread over the whole part.
        spread = np.argsort((order * 0.6180339887498949) % 1.0, kind="stable")
        extra = spread[np.cumsum(np.asarray(n)[spread]) - np.asarray(n)[spread] / 2 <= rest]
        out.append(np.concatenate([np.tile(order, int(whole)), np.sort(extra)]))
    return out


def _check_parts(parts: Sequence[Frames]) -> None:
    if not parts:
        raise StageError("no dataset given; name at least one root")
    first = parts[0]
    for p in parts:
        for key in (*first.images, STATE, ACTION):
            theirs, ours = p.info["features"].get(key), first.info["features"].get(key)
            if theirs is None or ours is None or theirs["shape"] != ours["shape"]:
                raise StageError(
                    f"{key}: {ours and ours['shape']} in {first.root} but {theirs and theirs['shape']} in "
                    f"{p.root}; datasets can only be mixed when cameras, state and action agree"
                )
        if p.fps != first.fps:
            raise StageError(
                f"fps: {first.fps} in {first.root} but {p.fps} in {p.root}; resample one of them"
            )


def _delta_rows(deltas: Mapping[str, Sequence[float]], fps: int, keys: set[str]) -> dict[str, Any]:
    import torch

    out = {}
    for key, seconds in deltas.items():
        if key not in keys:
            raise StageError(f"delta_timestamps: {key!r} is no feature of the dataset; it has {sorted(keys)}")
        rows = [round(s * fps) for s in seconds]
        if bad := [s for s, r in zip(seconds, rows, strict=True) if abs(s - r / fps) > 1e-4]:
            raise StageError(f"delta_timestamps: {key} at {bad[0]} s is no multiple of 1/{fps} s")
        out[key] = torch.tensor(rows)
    return out


def _tensors(part: Frames, keys: Sequence[str]) -> dict[str, tuple[Any, bool]]:
    import torch

    out: dict[str, tuple[Any, bool]] = {}
    for key in keys:
        if key in part.images:  # [N, H, W, 3] seen as [N, 3, H, W]; the copy per item makes it contiguous
            out[key] = (torch.from_numpy(part.images[key]).permute(0, 3, 1, 2), True)
        elif key in part.columns:
            out[key] = (torch.from_numpy(part.columns[key]), False)
    return out


def _meta(dataset: CachedDataset, repo_id: str, stats: Stats | None) -> Any:
    """lerobot's own metadata object, filled from memory (its constructor would fill the Hub's cache)."""
    import pandas as pd  # type: ignore[import-untyped]
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.utils import DatasetInfo

    parts = dataset._parts
    meta = LeRobotDatasetMetadata.__new__(LeRobotDatasetMetadata)
    meta.repo_id, meta.repo_type, meta.revision = repo_id, "dataset", FORMAT_VERSION
    meta.root = meta._requested_root = parts[0].root
    meta._pq_writer, meta.latest_episode, meta._metadata_buffer = None, None, []
    meta._finalized = True  # nothing to write, ever
    meta.info = DatasetInfo.from_dict({**parts[0].info, "features": dataset.features})
    meta.info.total_episodes, meta.info.total_frames = dataset.num_episodes, dataset.num_frames
    meta.info.total_tasks, meta.info.splits = len(dataset.tasks), {"train": f"0:{dataset.num_episodes}"}
    meta.tasks = pd.DataFrame(
        {"task_index": range(len(dataset.tasks))}, index=pd.Index(dataset.tasks, name="task")
    )
    meta.episodes = {
        "episode_index": np.arange(dataset.num_episodes),
        "dataset_from_index": dataset.from_index,
        "dataset_to_index": dataset.to_index,
        "tasks": [
            [parts[p].task(int(s))] for (p, _), s in zip(dataset._episode_of.T, dataset._starts, strict=True)
        ],
    }
    if stats is None:
        pooled = [{k: dict(v) for k, v in p.stats.items() if k in dataset.features} for p in parts]
        stats = aggregate_stats(pooled) if len(pooled) > 1 else pooled[0]
    meta.stats = {k: dict(v) for k, v in stats.items()}
    return meta
