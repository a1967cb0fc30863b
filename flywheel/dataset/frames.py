"""A dataset version in memory, read straight from its Parquet: every frame decoded once."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel.errors import StageError
from flywheel.schema import sha256_bytes, sha256_file

FORMAT_VERSION = "v3.0"
IMAGE_PREFIX = "observation.images."
STATE = "observation.state"
ACTION = "action"

Array = NDArray[Any]


@dataclass(frozen=True)
class Frames:
    """Every frame of one dataset, in order.

    ``columns`` holds each feature but the images by its name: ``[N]`` for features of shape (1,), else
    ``[N, n]``. ``info`` is ``meta/info.json`` as read, ``stats`` ``meta/stats.json`` as arrays.
    """

    root: Path
    info: dict[str, Any]
    images: dict[str, NDArray[np.uint8]]  # by feature name, [N, H, W, 3]
    columns: dict[str, Array]
    tasks: tuple[str, ...]  # by task_index
    stats: dict[str, dict[str, Array]]
    starts: NDArray[np.int64] = field(repr=False)  # [E] first row of each episode
    ends: NDArray[np.int64] = field(repr=False)  # [E] one past its last row

    @property
    def fps(self) -> int:
        """Frames per second, as declared."""
        return int(self.info["fps"])

    @property
    def state(self) -> Array:
        """``observation.state`` [N, S]."""
        return self.columns[STATE]

    @property
    def action(self) -> Array:
        """``action`` [N, A], absolute targets."""
        return self.columns[ACTION]

    @property
    def episode_index(self) -> Array:
        """Which episode a frame belongs to [N]."""
        return self.columns["episode_index"]

    def image(self, camera: str) -> NDArray[np.uint8]:
        """The frames of one camera, uint8 [N, H, W, 3]."""
        return self.images[IMAGE_PREFIX + camera]

    def task(self, row: int) -> str:
        """The instruction of one frame."""
        return self.tasks[int(self.columns["task_index"][row])]

    def __len__(self) -> int:
        return len(self.columns["index"])


def dataset_digest(root: Path) -> str:
    """What names a dataset version: sha256 over the sorted ``path sha256`` lines of its files."""
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    if not files:
        raise StageError(f"{root}: holds no file, so it is no dataset; run curate first")
    return sha256_bytes("".join(f"{n} {sha256_file(root / n)}\n" for n in files).encode())


def load_frames(root: Path | str, keep: Callable[[int], bool] | None = None) -> Frames:
    """Decode a whole dataset into memory (a 64×64 camera costs 12 KiB a frame).

    ``keep`` chooses episodes by their index; rows, episodes and ``index`` are renumbered so that the
    result is contiguous again. Raises ``StageError`` where the directory is not such a dataset or where
    its tables contradict each other (positional look-ups would silently return another episode's frames).
    """
    root = Path(root)
    info = _info(root)
    features: dict[str, dict[str, Any]] = info["features"]
    if videos := [k for k, f in features.items() if f["dtype"] == "video"]:
        raise StageError(f"{root}: {videos[0]} is stored as video; only datasets in image mode can be cached")
    table = _concatenated(root, "data", None)
    if missing := sorted(set(features) - set(table.column_names)):
        raise StageError(f"{root}: data lacks the declared features {missing}; the dataset is incomplete")
    episodes = _concatenated(
        root, "meta/episodes", ["episode_index", "dataset_from_index", "dataset_to_index"]
    )
    episodes = episodes.sort_by("episode_index")
    starts = episodes["dataset_from_index"].to_numpy().astype(np.int64)
    ends = episodes["dataset_to_index"].to_numpy().astype(np.int64)
    _check_positions(root, info, table, starts, ends)
    if keep is not None:
        chosen = [e for e in range(len(starts)) if keep(e)]
        if not chosen:
            raise StageError(f"{root}: no episode is left of {len(starts)}; loosen the choice")
        rows = np.concatenate([np.arange(starts[e], ends[e]) for e in chosen])
        lengths = (ends - starts)[chosen]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        table = table.take(pa.array(rows))
    columns = {
        k: _column(table, k, f["shape"]) for k, f in features.items() if f["dtype"] not in ("image", "string")
    }
    columns["index"] = np.arange(len(table), dtype=np.int64)
    columns["episode_index"] = np.repeat(np.arange(len(starts), dtype=np.int64), ends - starts)
    return Frames(
        root=root,
        info=info,
        images={k: _images(table, k, f["shape"]) for k, f in features.items() if f["dtype"] == "image"},
        columns=columns,
        tasks=_tasks(root),
        stats=_stats(root),
        starts=starts,
        ends=ends,
    )


def frames_in(root: Path) -> int:
    """How many frames a dataset says that it has. Raises ``StageError`` if it is none."""
    return int(_info(root)["total_frames"])


def _info(root: Path) -> dict[str, Any]:
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such file, so {root} is no LeRobotDataset; run curate first") from None
    except (OSError, ValueError) as e:
        raise StageError(f"{path}: cannot be read: {e}") from None
    if not isinstance(info, dict) or info.get("codebase_version") != FORMAT_VERSION:
        found = info.get("codebase_version") if isinstance(info, dict) else None
        raise StageError(f"{path}: codebase_version is {found!r}, this reads {FORMAT_VERSION!r}; convert it")
    for f in info["features"].values():
        f["shape"] = tuple(f["shape"])
    return info


def _concatenated(root: Path, folder: str, columns: list[str] | None) -> pa.Table:
    paths = sorted((root / folder).glob("chunk-*/file-*.parquet"))
    if not paths:
        raise StageError(f"{root / folder}: holds no Parquet file; the dataset was not finalised")
    try:
        return pa.concat_tables([pq.read_table(p, columns=columns) for p in paths])
    except (OSError, pa.ArrowException) as e:
        raise StageError(f"{root / folder}: cannot be read: {e}") from None


def _check_positions(
    root: Path, info: dict[str, Any], table: pa.Table, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> None:
    index = table["index"].to_numpy()
    episode = table["episode_index"].to_numpy()
    expected = np.repeat(np.arange(len(starts)), np.maximum(ends - starts, 0))
    sound = (
        len(starts) == info["total_episodes"] > 0
        and len(table) == info["total_frames"]
        and starts[0] == 0
        and np.array_equal(starts[1:], ends[:-1])
        and bool(np.all(ends > starts))
        and np.array_equal(index, np.arange(len(table)))
        and np.array_equal(episode, expected)
    )
    if not sound:
        raise StageError(
            f"{root}: {len(table)} rows in {len(starts)} episodes do not agree with meta/info.json "
            f"({info['total_frames']} in {info['total_episodes']}) or are not contiguous; build it again"
        )


def _column(table: pa.Table, key: str, shape: tuple[int, ...]) -> Array:
    column = table[key].combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        return np.array(column.flatten()).reshape(len(table), *shape)
    return np.array(column.to_numpy(zero_copy_only=False))


def _images(table: pa.Table, key: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    from PIL import Image

    out = np.empty((len(table), *shape), dtype=np.uint8)
    row = 0
    for chunk in table[key].chunks:  # a binary column over 2 GiB cannot be combined
        for data in chunk.field("bytes"):
            with Image.open(io.BytesIO(data.as_py())) as image:
                out[row] = np.asarray(image.convert("RGB"))
            row += 1
    return out


def _tasks(root: Path) -> tuple[str, ...]:
    table = pq.read_table(root / "meta" / "tasks.parquet")
    names = table["task" if "task" in table.column_names else "__index_level_0__"].to_pylist()
    by_index = dict(zip(table["task_index"].to_pylist(), names, strict=True))
    return tuple(by_index[i] for i in range(len(by_index)))


def _stats(root: Path) -> dict[str, dict[str, Array]]:
    path = root / "meta" / "stats.json"
    doc = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {k: {s: np.atleast_1d(np.array(v)) for s, v in stat.items()} for k, stat in doc.items()}
