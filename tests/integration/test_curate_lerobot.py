"""Curated datasets against lerobot itself: its loader, its writer, its training loop."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg

from flywheel.config import CurateSettings
from flywheel.curate import CurateResult, curate
from flywheel.dataset import CachedDataset, Clip, Frames, dataset_digest, load_frames, write_dataset
from flywheel.dataset.bench import differing
from flywheel.episode import as_array, read
from flywheel.errors import StageError
from tests.attempts import CORRECTED, attempt, copy, flip, truncate

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("lerobot_cache")]

SETTINGS = CurateSettings(keep_success=True)
CHUNK = {"action": [i / 10 for i in range(16)]}
POLICY = {**CHUNK, "observation.state": [0.0], "observation.images.wrist": [-0.1, 0.0]}


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine sound episodes and three damaged ones."""
    root = tmp_path_factory.mktemp("inbox")
    for i in range(7):
        attempt(root, CORRECTED[i % 5], seed=i)
    attempt(root, "success", seed=30)
    attempt(root, "missed_grasp", seed=31, corrected=False)
    truncate(attempt(root, "dropped", seed=40))
    flip(attempt(root, "dropped", seed=41), "control.parquet")
    attempt(root, "dropped", seed=42, edit=lambda c: c["state"].__setitem__((2, 0), np.nan))
    return root


@pytest.fixture(scope="module")
def curated(inbox: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CurateResult]:
    out = tmp_path_factory.mktemp("curated")
    return out, curate(inbox, out, SETTINGS)


@pytest.fixture(scope="module")
def root(curated: tuple[Path, CurateResult]) -> Path:
    return curated[0] / "dataset"


@pytest.fixture(scope="module")
def frames(root: Path) -> Frames:
    return load_frames(root)


def lerobot_dataset(root: Path, **kwargs: Any) -> Any:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/test", root=root, **kwargs)


def same_items(a: dict[str, Any], b: dict[str, Any]) -> None:
    import torch

    assert list(a) == list(b)
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (b[key].dtype, b[key].shape), key
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def test_metrics_count_every_candidate_once(curated: tuple[Path, CurateResult], inbox: Path) -> None:
    out, result = curated
    rows = pq.read_table(out / "selection.parquet").to_pylist()
    assert len(rows) == result.candidates == len(list(inbox.iterdir())) == 12
    assert (result.taken, result.left_out, result.quarantined) == (8, 1, 3)
    assert result.reasons == {
        "correction": 7,
        "no_correction": 1,
        "quarantine:not_finite": 1,
        "quarantine:sha256": 2,
        "success": 1,
    }
    assert sum(r["frames_used"] for r in rows) == result.frames
    assert sorted(i for r in rows for i in r["dataset_episodes"]) == list(range(result.dataset_episodes))
    assert CurateResult.model_validate_json((out / "curate.json").read_bytes()) == result
    assert dataset_digest(out / "dataset") == result.dataset_sha256


def test_lerobot_reads_back_what_the_robot_recorded(curated: tuple[Path, CurateResult], inbox: Path) -> None:
    out, result = curated
    d = lerobot_dataset(out / "dataset")
    assert (d.num_frames, d.num_episodes, d.fps) == (result.frames, result.dataset_episodes, 10)
    rows = pq.read_table(out / "selection.parquet", filters=[("taken", "=", True)]).to_pylist()
    assert d.hf_dataset.unique("episode_index") == list(range(result.dataset_episodes))
    for r in rows:
        e = read(inbox / r["directory"])
        mine = as_array(e.frames, "intervention").astype(bool) == (r["reason"] == "correction")
        (index,) = r["dataset_episodes"]
        start = d.meta.episodes[index]["dataset_from_index"]
        for offset, row in enumerate(np.flatnonzero(mine)):
            item = d[start + offset]
            assert item["episode_index"] == index
            assert item["frame_index"] == offset
            assert item["task"] == e.manifest.task
            assert item["capture_time_ns"] == e.manifest.clock_epoch_ns + e.frames["t_ns"][row].as_py()
            assert bool(item["intervention"]) == (r["reason"] == "correction")
            assert np.array_equal(item["observation.state"].numpy(), as_array(e.frames, "state")[row])
            assert np.array_equal(item["action"].numpy(), as_array(e.frames, "action")[row])
            seen = simplejpeg.decode_jpeg(e.frames["image.wrist"][row].as_py())
            image = item["observation.images.wrist"].numpy()
            assert np.array_equal(image, (seen.transpose(2, 0, 1) / np.float32(255)).astype(np.float32))
        assert offset + 1 == r["frames_used"]


def test_running_again_in_any_order_gives_the_same_bytes(
    curated: tuple[Path, CurateResult], inbox: Path, tmp_path: Path
) -> None:
    out, result = curated
    before = sorted(p.relative_to(inbox).as_posix() for p in inbox.rglob("*"))
    assert curate(inbox, out, SETTINGS) == result
    assert sorted(p.relative_to(inbox).as_posix() for p in inbox.rglob("*")) == before
    assert {p.name for p in out.iterdir()} == {"dataset", "selection.parquet", "curate.json"}
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for i, d in enumerate(sorted(inbox.iterdir(), reverse=True)):
        shutil.copytree(d, shuffled / f"{i:02d}")
    taken = pq.read_table(out / "selection.parquet", filters=[("taken", "=", True)])["episode_id"][0].as_py()
    copy(next(d for d in shuffled.iterdir() if taken in (d / "manifest.json").read_text()), "zz-copy")
    again = curate(shuffled, tmp_path / "out", SETTINGS)
    assert again.dataset_sha256 == result.dataset_sha256
    assert again.reasons == {**result.reasons, "duplicate_id": 1}


def test_curation_that_is_cut_off_leaves_the_last_dataset_and_can_be_repeated(
    curated: tuple[Path, CurateResult], inbox: Path, tmp_path: Path
) -> None:
    out, result = Path(shutil.copytree(curated[0], tmp_path / "out")), curated[1]

    def cut(what: str, done: int, of: int) -> None:
        if what == "write" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate(inbox, out, CurateSettings(), cut)
    assert dataset_digest(out / "dataset") == result.dataset_sha256
    (out / "..dataset.new.partial" / "meta").mkdir(parents=True)  # what a killed one would have left
    (out / ".dataset.old").mkdir()
    assert curate(inbox, out, SETTINGS) == result
    assert {p.name for p in out.iterdir()} == {"dataset", "selection.parquet", "curate.json"}


def test_second_curation_of_the_same_directory_has_to_wait(inbox: Path, tmp_path: Path) -> None:
    refused: list[bool] = []

    def intrude(what: str, done: int, of: int) -> None:
        if what == "write":
            fd = os.open(tmp_path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(True)
            finally:
                os.close(fd)

    result = curate(inbox, tmp_path, SETTINGS, intrude)
    assert len(refused) == result.dataset_episodes


def clips(f: Frames) -> Iterator[Clip]:
    for a, b in zip(f.starts, f.ends, strict=True):
        yield Clip(
            task=f.task(a),
            images={"wrist": f.image("wrist")[a:b]},
            state=f.state[a:b],
            action=f.action[a:b],
            capture_time_ns=f.columns["capture_time_ns"][a:b],
            intervention=f.columns["intervention"][a:b],
        )


def test_what_is_written_is_what_lerobots_own_writer_writes(
    root: Path, frames: Frames, tmp_path: Path
) -> None:
    from lerobot.datasets.io_utils import load_info, load_stats
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    own = {
        k: v
        for k, v in frames.info["features"].items()
        if k not in ("timestamp", "frame_index", "episode_index", "index", "task_index")
    }
    theirs = LeRobotDataset.create(
        "local/theirs",
        fps=10,
        features=own,
        root=tmp_path / "theirs",
        robot_type="flywheel",
        use_videos=False,
    )
    for c in clips(frames):
        for i in range(len(c)):
            theirs.add_frame(
                {
                    "observation.images.wrist": c.images["wrist"][i],
                    "observation.state": c.state[i],
                    "action": c.action[i],
                    "capture_time_ns": c.capture_time_ns[i : i + 1],
                    "intervention": c.intervention[i : i + 1],
                    "task": c.task,
                }
            )
        theirs.save_episode()
    theirs.finalize()
    write_dataset(tmp_path / "arrays", clips(frames), 10)
    assert differing(tmp_path / "arrays", tmp_path / "theirs", recorded=False) == []
    assert differing(root, tmp_path / "theirs", recorded=True) == []  # its pictures are the robot's JPEGs
    for name in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        assert (
            pq.read_metadata(root / name).num_row_groups
            == pq.read_metadata(tmp_path / "theirs" / name).num_row_groups
        )
    assert load_info(root) == load_info(tmp_path / "theirs")
    a, b = load_stats(root), load_stats(tmp_path / "theirs")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k][s], b[k][s]) for k in a for s in b[k])


def test_writing_leaves_nothing_when_it_fails(frames: Frames, tmp_path: Path) -> None:
    def breaking() -> Iterator[Clip]:
        yield from list(clips(frames))[:2]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_dataset(tmp_path / "new", breaking(), 10)
    with pytest.raises(StageError, match="no episode to write"):
        write_dataset(tmp_path / "new", iter(()), 10)
    odd = next(clips(frames))
    odd = Clip(odd.task, odd.images, odd.state[:, :4], odd.action, odd.capture_time_ns, odd.intervention)
    with pytest.raises(StageError, match="episode 1: shapes"):
        write_dataset(tmp_path / "new", [next(clips(frames)), odd], 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("deltas", [None, CHUNK, POLICY], ids=["single", "chunk", "chunk-and-history"])
def test_cached_items_are_lerobots_items(
    root: Path, frames: Frames, deltas: dict[str, list[float]] | None
) -> None:
    theirs = lerobot_dataset(root, delta_timestamps=deltas)
    ours = CachedDataset([frames], delta_timestamps=deltas)
    assert len(ours) == len(theirs)
    edges = {i for a, b in zip(frames.starts, frames.ends, strict=True) for i in (a, a + 1, b - 2, b - 1)}
    for i in sorted(edges | set(range(0, len(ours), 7))):
        same_items(theirs[int(i)], ours[int(i)])
    assert ours.features == theirs.features
    assert (ours.num_frames, ours.num_episodes) == (theirs.num_frames, theirs.num_episodes)
    assert ours.meta.camera_keys == theirs.meta.camera_keys
    assert ours.meta.tasks.equals(theirs.meta.tasks)
    for key in ("dataset_from_index", "dataset_to_index"):
        assert list(ours.meta.episodes[key]) == list(theirs.meta.episodes[key])
    for key, stat in theirs.meta.stats.items():
        assert all(np.array_equal(v, ours.meta.stats[key][s]) for s, v in stat.items()), key
    with pytest.raises(IndexError):
        ours[len(ours)]
    first = ours[0]["observation.state"]
    first += 1
    assert not np.array_equal(first.numpy(), ours[0]["observation.state"].numpy()), "an item shares the cache"


def test_chosen_episodes_are_renumbered_with_their_frames(frames: Frames, root: Path) -> None:
    some = load_frames(root, keep=lambda e: e in (1, 4))
    assert some.episode_index.tolist() == [0] * int(np.diff([frames.starts[1], frames.ends[1]])[0]) + [
        1
    ] * int(frames.ends[4] - frames.starts[4])
    assert some.task(0) == frames.task(frames.starts[1])
    assert np.array_equal(some.state[some.starts[1] :], frames.state[frames.starts[4] : frames.ends[4]])
    assert np.array_equal(some.image("wrist")[0], frames.image("wrist")[frames.starts[1]])


def test_mixture_draws_whole_items_of_every_part(root: Path, frames: Frames) -> None:
    new, old = load_frames(root, keep=lambda e: e < 2), load_frames(root, keep=lambda e: e >= 2)
    mixed = CachedDataset([new, old], [0.5, 0.5], CHUNK)
    assert mixed.shares == pytest.approx([0.5, 0.5], abs=0.06)
    plain = [CachedDataset([p], delta_timestamps=CHUNK) for p in (new, old)]
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for e, (start, end) in enumerate(zip(mixed.from_index, mixed.to_index, strict=True)):
        item = mixed[int(start)]
        same = [
            (p, i)
            for p, d in enumerate(plain)
            for i in d.from_index.tolist()
            if d[i]["action"].equal(item["action"])
        ]
        ((p, i),) = same
        seen[p].add(i)
        for offset in (0, int(end - start) - 1):
            a, b = plain[p][i + offset], mixed[int(start) + offset]
            assert int(b["episode_index"]) == e
            assert int(b["index"]) == start + offset
            assert mixed.meta.tasks.iloc[int(b["task_index"])].name == b["task"]
            for key in ("index", "episode_index", "task_index"):
                a.pop(key), b.pop(key)
            same_items(a, b)
    assert [len(s) for s in seen.values()] == [2, len(old.starts)]


def test_statistics_of_the_current_policy_can_be_kept(frames: Frames) -> None:
    kept = {"action": {"mean": np.zeros(4), "std": np.ones(4)}}
    assert CachedDataset([frames], stats=kept).meta.stats == kept
    pooled = CachedDataset([frames, frames]).meta.stats
    assert np.allclose(pooled["action"]["mean"], frames.stats["action"]["mean"])
    assert pooled["action"]["count"] == 2 * frames.stats["action"]["count"]


def test_datasets_of_other_robots_cannot_be_mixed(frames: Frames, tmp_path: Path) -> None:
    c = next(clips(frames))
    other = Clip(c.task, c.images, c.state[:, :4], c.action, c.capture_time_ns, c.intervention)
    write_dataset(tmp_path / "other", [other], 10)
    with pytest.raises(StageError, match=r"observation\.state: \(5,\) in .* but \(4,\)"):
        CachedDataset([frames, load_frames(tmp_path / "other")])
    with pytest.raises(StageError, match="one positive number"):
        CachedDataset([frames, frames], [1.0, 0.0])
    with pytest.raises(StageError, match=r"no multiple of 1/10 s"):
        CachedDataset([frames], delta_timestamps={"action": [0.05]})


def test_tables_that_contradict_each_other_are_refused(root: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(root, tmp_path / "broken"))
    path = broken / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 3), path)
    with pytest.raises(StageError, match="not contiguous"):
        load_frames(broken)


def test_lerobots_training_loop_runs_on_the_mixture(
    root: Path, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.scripts import lerobot_train

    policy = ACTConfig(
        chunk_size=16,
        n_action_steps=8,
        pretrained_backbone_weights=None,
        dim_model=32,
        n_heads=2,
        dim_feedforward=32,
        n_encoder_layers=1,
        use_vae=False,
        device="cpu",
        push_to_hub=False,
    )
    asked: list[int] = []

    def mixture(cfg: TrainPipelineConfig) -> tuple[CachedDataset, None]:
        plain = CachedDataset([frames])
        deltas = resolve_delta_timestamps(cfg.trainable_config, plain.meta)
        new = load_frames(root, keep=lambda e: e < 2)
        made = CachedDataset([new, frames], [0.5, 0.5], deltas)
        asked.append(len(made))
        return made, None

    monkeypatch.setattr(lerobot_train, "make_train_eval_datasets", mixture)
    lerobot_train.train(
        TrainPipelineConfig(
            dataset=DatasetConfig(repo_id="local/test", root=str(root)),
            policy=policy,
            output_dir=tmp_path / "run",
            batch_size=4,
            steps=2,
            num_workers=0,
            log_freq=1,
            save_freq=2,
            env_eval_freq=0,
            seed=1,
        )
    )
    assert asked
    assert list((tmp_path / "run").rglob("model.safetensors"))
