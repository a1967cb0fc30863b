"""Shares of a mixture and the name of a dataset version; what needs lerobot lies in tests/integration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.dataset import dataset_digest, load_frames, mixture
from flywheel.errors import StageError

part = st.tuples(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.floats(0.05, 1.0))


@given(st.lists(part, min_size=1, max_size=4))
def test_each_part_has_its_share_to_within_an_episode_and_none_is_forgotten(
    parts: list[tuple[list[int], float]],
) -> None:
    lengths = [np.array(n) for n, _ in parts]
    weights = [w for _, w in parts]
    chosen = mixture(lengths, weights)
    target = max(n.sum() / (w / sum(weights)) for n, w in zip(lengths, weights, strict=True))
    for n, w, c in zip(lengths, weights, chosen, strict=True):
        assert set(c.tolist()) == set(range(len(n)))
        assert abs(n[c].sum() - target * w / sum(weights)) <= n.max() / 2 + 1e-6
        repeats = np.bincount(c)
        assert repeats.max() - repeats.min() <= 1


def test_few_new_episodes_weigh_as_much_as_much_old_data() -> None:
    new, old = np.full(30, 40), np.full(500, 40)
    a, b = mixture([new, old], [0.5, 0.5])
    assert new[a].sum() == old[b].sum() == 20_000


def test_mixture_is_the_same_every_time() -> None:
    lengths = [np.arange(1, 30), np.arange(1, 12)]
    assert [c.tolist() for c in mixture(lengths, [1, 3])] == [c.tolist() for c in mixture(lengths, [1, 3])]


def test_digest_changes_with_any_byte_and_any_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"2")
    first = dataset_digest(tmp_path)
    (tmp_path / "b" / "c").write_bytes(b"3")
    assert dataset_digest(tmp_path) != first
    (tmp_path / "b" / "c").write_bytes(b"2")
    assert dataset_digest(tmp_path) == first
    (tmp_path / "b" / "c").rename(tmp_path / "b" / "d")
    assert dataset_digest(tmp_path) != first


def test_empty_directory_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="run curate first"):
        dataset_digest(tmp_path)
    with pytest.raises(StageError, match=r"no LeRobotDataset"):
        load_frames(tmp_path)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("{", "cannot be read"),
        ({"codebase_version": "v2.1", "features": {}}, r"'v2\.1'.*'v3\.0'"),
        ([], "codebase_version is None"),
    ],
)
def test_foreign_or_damaged_info_is_one_clear_error(tmp_path: Path, info: object, message: str) -> None:
    (tmp_path / "meta").mkdir()
    text = info if isinstance(info, str) else json.dumps(info)
    (tmp_path / "meta" / "info.json").write_text(text)
    with pytest.raises(StageError, match=message):
        load_frames(tmp_path)


def test_video_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    features = {"observation.images.wrist": {"dtype": "video", "shape": [64, 64, 3]}}
    text = json.dumps({"codebase_version": "v3.0", "features": features})
    (tmp_path / "meta" / "info.json").write_text(text)
    with pytest.raises(StageError, match=r"observation\.images\.wrist is stored as video"):
        load_frames(tmp_path)
