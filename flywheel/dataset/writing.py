"""Write a dataset version: LeRobotDataset v3 with images inside the Parquet files.

The metadata is written by lerobot's own classes, with its own statistics (``statistics``). The rows are not:
its writer sends each frame through a file and each episode through ``datasets.map``, which costs 0.2 s an
episode and stamps a random fingerprint into the schema. Rows written here have the same values and the same
PNG bytes (a test compares the two), and the same clips always give the same bytes. Pictures that come as JPEG
are stored as they are: every reader decodes them to the pixels that a PNG made of them would hold.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel.dataset.frames import ACTION, IMAGE_PREFIX, STATE
from flywheel.errors import StageError

DATA_FILE_BYTES = 100 << 20  # lerobot's default: the next file begins beyond it
PNG_LEVEL = 6  # lerobot's for image mode
CAPTURE_TIME = "capture_time_ns"
INTERVENTION = "intervention"


@dataclass(frozen=True)
class Jpegs:
    """Pictures as the robot recorded them. ``shape`` ``(N, H, W, 3)``: the caller has made sure of it."""

    data: Sequence[bytes]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        import simplejpeg

        return np.stack([simplejpeg.decode_jpeg(self.data[i], colorspace="RGB") for i in rows])


@dataclass(frozen=True)
class Clip:
    """One episode of a dataset: ``N`` frames, 1/fps apart, under one instruction."""

    task: str
    images: Mapping[str, NDArray[np.uint8] | Jpegs]  # by camera, [N, H, W, 3]
    state: NDArray[np.float32]  # [N, S]
    action: NDArray[np.float32]  # [N, A]
    capture_time_ns: NDArray[np.int64]  # [N]
    intervention: NDArray[np.bool_]  # [N]

    def __len__(self) -> int:
        return len(self.state)


def write_dataset(
    root: Path,
    clips: Iterable[Clip],
    fps: int,
    state_names: tuple[str, ...] | None = None,
    action_names: tuple[str, ...] | None = None,
    robot_type: str = "flywheel",
) -> int:
    """Write ``clips`` as the episodes of a new dataset in ``root``, in order, and return their number.

    ``root`` must not exist; it appears whole or not at all. Raises ``StageError`` when there is no clip or
    when the clips differ in cameras or shapes.
    """
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    meta: Any = None
    writer: _Rows | None = None
    first: Clip | None = None
    count = 0
    try:
        for clip in clips:
            if first is None or meta is None or writer is None:
                first = clip
                meta = LeRobotDatasetMetadata.create(
                    repo_id=f"local/{root.name}",
                    fps=fps,
                    features=features(clip, state_names, action_names),
                    robot_type=robot_type,
                    root=partial,
                    use_videos=False,
                )
                writer = _Rows(meta, partial)
            _check(clip, first, count)
            writer.add(clip)
            count += 1
        if writer is None:
            raise StageError(f"{root}: no episode to write; a dataset needs at least one")
        writer.close()
    except BaseException:
        if meta is not None:
            meta._finalized = True  # else its destructor would write into the directory removed here
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(root)
    return count


def features(
    clip: Clip, state_names: tuple[str, ...] | None = None, action_names: tuple[str, ...] | None = None
) -> dict[str, dict[str, Any]]:
    """lerobot's declaration of what a clip holds."""
    images = {
        IMAGE_PREFIX + c: {"dtype": "image", "shape": a.shape[1:], "names": ["height", "width", "channels"]}
        for c, a in clip.images.items()
    }
    return {
        **images,
        STATE: {
            "dtype": "float32",
            "shape": clip.state.shape[1:],
            "names": state_names and list(state_names),
        },
        ACTION: {
            "dtype": "float32",
            "shape": clip.action.shape[1:],
            "names": action_names and list(action_names),
        },
        CAPTURE_TIME: {"dtype": "int64", "shape": (1,), "names": None},
        INTERVENTION: {"dtype": "bool", "shape": (1,), "names": None},
    }


def _check(clip: Clip, first: Clip, index: int) -> None:
    def shape(c: Clip) -> dict[str, tuple[int, ...]]:
        images = {IMAGE_PREFIX + k: v.shape[1:] for k, v in c.images.items()}
        return {**images, STATE: c.state.shape[1:], ACTION: c.action.shape[1:]}

    if shape(clip) != shape(first):
        raise StageError(
            f"episode {index}: shapes {shape(clip)} differ from those of episode 0, {shape(first)}"
        )
    arrays: tuple[NDArray[Any] | Jpegs, ...] = (
        *clip.images.values(),
        clip.action,
        clip.capture_time_ns,
        clip.intervention,
    )
    if not len(clip) or any(len(a) != len(clip) for a in arrays):
        raise StageError(
            f"episode {index}: {len(clip)} states but columns of {[len(a) for a in arrays]} rows"
        )


class _Rows:
    """The data files: one row group an episode, a new file beyond ``DATA_FILE_BYTES``."""

    def __init__(self, meta: Any, root: Path) -> None:
        from lerobot.datasets.feature_utils import get_hf_features_from_features

        self._meta, self._root = meta, root
        declared = get_hf_features_from_features(meta.features)
        # What ``datasets`` needs to know an image from a struct; without its random fingerprint.
        marks = {"huggingface": json.dumps({"info": {"features": declared.to_dict()}})}
        self._schema: pa.Schema = declared.arrow_schema.with_metadata(marks)
        self._file: pq.ParquetWriter | None = None
        self._chunk = self._index = 0

    def add(self, clip: Clip) -> None:
        from lerobot.datasets.utils import update_chunk_file_indices

        meta, n = self._meta, len(clip)
        episode, start = meta.info.total_episodes, meta.info.total_frames
        meta.save_episode_tasks([clip.task])
        columns: dict[str, Any] = {
            STATE: np.ascontiguousarray(clip.state, dtype=np.float32),
            ACTION: np.ascontiguousarray(clip.action, dtype=np.float32),
            CAPTURE_TIME: clip.capture_time_ns.astype(np.int64),
            INTERVENTION: clip.intervention.astype(np.bool_),
            "timestamp": np.arange(n) / meta.fps,  # statistics in double, stored in single, as lerobot does
            "frame_index": np.arange(n),
            "episode_index": np.full(n, episode),
            "index": np.arange(start, start + n),
            "task_index": np.full(n, meta.get_task_index(clip.task)),
        }
        arrays = [
            _pictures(clip.images[name.removeprefix(IMAGE_PREFIX)])
            if name.startswith(IMAGE_PREFIX)
            else _arrow(columns[name], self._schema.field(name).type)
            for name in self._schema.names
        ]
        if self._file is not None and self._path.stat().st_size >= DATA_FILE_BYTES:
            self._file.close()
            self._file = None
            self._chunk, self._index = update_chunk_file_indices(self._chunk, self._index, meta.chunks_size)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = pq.ParquetWriter(self._path, self._schema, compression="snappy")
        self._file.write_table(pa.table(arrays, schema=self._schema))
        place = {"data/chunk_index": self._chunk, "data/file_index": self._index}
        span = {"dataset_from_index": start, "dataset_to_index": start + n}
        self._remember(episode, n, clip.task, _stats(clip, columns), {**place, **span})

    def _remember(
        self, episode: int, length: int, task: str, stats: dict[str, dict[str, Any]], place: dict[str, int]
    ) -> None:
        """lerobot's ``save_episode`` of the metadata, but for the two documents that it writes anew for every
        episode: nobody sees this dataset before it is whole."""
        from lerobot.datasets.compute_stats import aggregate_stats
        from lerobot.utils.utils import flatten_dict

        meta = self._meta
        row = {"episode_index": episode, "tasks": [task], "length": length, **place}
        meta._save_episode_metadata({**row, **flatten_dict({"stats": stats})})
        meta.info.total_episodes += 1
        meta.info.total_frames += length
        meta.info.total_tasks = len(meta.tasks)
        meta.info.splits = {"train": f"0:{meta.info.total_episodes}"}
        meta.stats = stats if meta.stats is None else aggregate_stats([meta.stats, stats])

    def close(self) -> None:
        from lerobot.datasets.io_utils import write_info, write_stats

        if self._file is not None:
            self._file.close()
        write_info(self._meta.info, self._root)
        write_stats(self._meta.stats, self._root)
        self._meta.finalize()
        # lerobot orders the statistics by the hash of their names, which differs from run to run.
        path = self._root / "meta" / "stats.json"
        stats = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(stats, indent=4, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def _path(self) -> Path:
        relative: str = self._meta.data_path.format(chunk_index=self._chunk, file_index=self._index)
        return self._root / relative


def _arrow(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
    return pa.array(values.astype(kind.to_pandas_dtype()), type=kind)


def _pictures(images: NDArray[np.uint8] | Jpegs) -> pa.Array:
    """JPEGs as they are, else lossless PNGs, with the file names that lerobot's writer would record."""
    if isinstance(images, Jpegs):
        kind, encoded = "jpg", list(images.data)
    else:
        kind = "png"
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "png") as pool:  # zlib lets go of the lock
            encoded = list(pool.map(_png, images))
    names = [f"frame-{i:06d}.{kind}" for i in range(len(encoded))]
    return pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), pa.array(names)], ["bytes", "path"])


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(out, format="PNG", compress_level=PNG_LEVEL)
    return out.getvalue()


def _stats(clip: Clip, columns: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    """lerobot's statistics of one episode, from memory; images are sampled as lerobot samples them."""
    from lerobot.datasets.compute_stats import sample_indices

    from flywheel.dataset import statistics  # compiled: whoever only reads datasets does without

    stats = {
        IMAGE_PREFIX + camera: statistics.of_pictures(images[sample_indices(len(images))])
        for camera, images in clip.images.items()
    }
    return stats | {name: statistics.of_numbers(values) for name, values in columns.items()}
