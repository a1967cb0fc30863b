"""From curation to training: what is kept for evaluation cannot be trained on, whatever a dataset says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flywheel.config import CurateSettings, TrainSettings
from flywheel.curate import SELECTION, SELECTION_SCHEMA, CurateResult, curate
from flywheel.dataset import dataset_digest, load_frames
from flywheel.dataset.yardstick import SOURCES, Sources, Yardstick, read_sources, refuse_kept
from flywheel.errors import StageError
from flywheel.schema import bundle_digest
from tests.attempts import CORRECTED, attempt
from tests.encoders import bundle

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("lerobot_cache")]
SETTINGS = CurateSettings()


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inbox")
    for i in range(12):
        attempt(root, CORRECTED[i % 5], seed=i)
    return root


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("policy") / "bundle").parent


@pytest.fixture(scope="module")
def yardstick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("yardstick") / "yardstick.json"
    path.write_bytes(Yardstick(held_out_fraction=0.3).to_bytes())
    return path


@pytest.fixture(scope="module")
def curated(
    inbox: Path, policy: Path, yardstick: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CurateResult]:
    out = tmp_path_factory.mktemp("curated")
    return out, curate(inbox, out, SETTINGS, policy=policy, yardstick=yardstick)


def test_the_selection_says_for_each_why_and_its_figures_add_up(
    curated: tuple[Path, CurateResult], policy: Path
) -> None:
    out, result = curated
    table = pq.read_table(out / SELECTION)
    assert table.schema.equals(SELECTION_SCHEMA)
    rows = table.to_pylist()
    assert all(r["reason"] and r["why"] and r["cluster"] and r["phase"] for r in rows)
    assert result.encoder == bundle_digest(policy / "bundle")
    assert result.no_encoder == ""
    assert 0 < result.held_out == sum(r["held_out"] for r in rows) < 12
    assert not any(r["held_out"] and (r["taken"] or r["dataset_episodes"]) for r in rows)
    assert sum(k.episodes for k in result.clusters) == len(rows) == 12
    assert sum(k.taken for k in result.clusters) == result.taken
    assert sum(k.held_out for k in result.clusters) == result.held_out
    assert {k.name for k in result.clusters} == {r["cluster"] for r in rows}
    assert all(r["nearest_taken"] == 0.0 for r in rows if r["taken"])
    assert CurateResult.model_validate_json((out / "curate.json").read_bytes()) == result


def test_what_lies_beside_the_data_disturbs_no_reader(curated: tuple[Path, CurateResult]) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    out, result = curated
    root = out / "dataset"
    assert (root / SOURCES).exists()
    assert (root / "clusters.json").exists()
    d = LeRobotDataset("local/test", root=root)
    assert (d.num_frames, d.num_episodes) == (result.frames, result.dataset_episodes)
    assert d[0]["observation.images.wrist"].shape == (3, 64, 64)
    assert len(load_frames(root)) == result.frames
    assert dataset_digest(root) == result.dataset_sha256


def test_curating_again_gives_the_same_bytes(
    inbox: Path, policy: Path, yardstick: Path, curated: tuple[Path, CurateResult], tmp_path: Path
) -> None:
    again = curate(inbox, tmp_path, SETTINGS, policy=policy, yardstick=yardstick)
    assert again == curated[1]


def test_an_older_bundle_is_enough_and_the_figures_say_by_what_was_compared(
    inbox: Path, tmp_path: Path
) -> None:
    bundle(tmp_path / "old" / "bundle", prefix=False)
    result = curate(inbox, tmp_path / "out", SETTINGS, policy=tmp_path / "old")
    assert (result.encoder, result.held_out, result.taken) == ("", 0, 12)
    assert "no kv_cache" in result.no_encoder


def test_clusters_of_the_last_turn_keep_their_names_by_way_of_the_checkpoint(
    inbox: Path, curated: tuple[Path, CurateResult], tmp_path: Path
) -> None:
    out, before = curated
    bundle(tmp_path / "next" / "bundle", weights=1)
    shutil.copy(out / "dataset" / "clusters.json", tmp_path / "next")
    after = curate(inbox, tmp_path / "out", SETTINGS, policy=tmp_path / "next")
    assert after.encoder != before.encoder
    old = {(k.task, k.failure_mode, k.phase): k.name for k in before.clusters if k.episodes == 1}
    new = {(k.task, k.failure_mode, k.phase): k.name for k in after.clusters if k.episodes == 1}
    assert {k: old[k] for k in old.keys() & new.keys()} == {k: new[k] for k in old.keys() & new.keys()}
    assert old.keys() & new.keys()


def test_what_was_held_out_stays_so_by_way_of_the_checkpoint(
    inbox: Path, curated: tuple[Path, CurateResult], tmp_path: Path
) -> None:
    """Although the next turn holds out nothing by itself."""
    bundle(tmp_path / "next" / "bundle", weights=1)
    shutil.copy(curated[0] / "dataset" / SOURCES, tmp_path / "next")
    before = {k.episode_id for k in kept(curated[0] / "dataset").kept}
    some = tmp_path / "some"
    shutil.copytree(inbox, some)
    for absent in sorted(before)[:1]:
        shutil.rmtree(some / absent)
    after = curate(some, tmp_path / "out", CurateSettings(choice="all"), policy=tmp_path / "next")
    assert after.held_out == len(before) - 1
    assert after.taken == 12 - len(before)
    assert {k.episode_id for k in kept(tmp_path / "out" / "dataset").kept} == before, "one was forgotten"


# ── training refuses ─────────────────────────────────────────────────────────────────────────────────


def training(dataset: Path, tmp_path: Path, replay: Path | None = None, **options: Any) -> Any:
    """It must be refused before anything is loaded: the policy is none."""
    from flywheel.train import train

    return train(tmp_path / "no-policy", dataset, tmp_path / "out", TrainSettings(), replay=replay, **options)


def kept(root: Path) -> Sources:
    found = read_sources(root)
    assert found is not None
    assert found.kept
    return found


def test_a_dataset_that_lists_a_held_out_episode_is_refused(
    curated: tuple[Path, CurateResult], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(curated[0] / "dataset", tmp_path / "d"))
    assert refuse_kept([root]) == curated[1].held_out
    sources = kept(root)
    for listed in (
        sources.kept[0],
        sources.kept[0].model_copy(update={"episode_id": "f" * 36}),  # the same recording, renamed
    ):
        sneaked = sources.model_copy(update={"used": (*sources.used, listed)})
        (root / SOURCES).write_bytes(sneaked.to_bytes())
        with pytest.raises(StageError, match=rf"{sources.kept[0].episode_id}.*kept for evaluation"):
            training(root, tmp_path)


def test_frames_of_a_held_out_episode_are_refused_whatever_the_dataset_lists(
    inbox: Path, curated: tuple[Path, CurateResult], tmp_path: Path
) -> None:
    """All of the data, under the list of the honest dataset; and again as the replay beside it."""
    honest = curated[0] / "dataset"
    curate(inbox, tmp_path / "all", CurateSettings(choice="all"))
    everything = tmp_path / "all" / "dataset"
    assert refuse_kept([everything]) == 0, "without a yardstick nothing is kept"
    (everything / SOURCES).unlink()
    with pytest.raises(StageError, match=r"episode \d+ has the frames of .*kept for evaluation"):
        training(honest, tmp_path, replay=everything)
    shutil.copy(honest / SOURCES, everything)
    with pytest.raises(StageError, match=r"episode \d+ has the frames of .*kept for evaluation"):
        training(everything, tmp_path)


@pytest.fixture(scope="module")
def second(
    inbox: Path, curated: tuple[Path, CurateResult], yardstick: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The dataset of a second turn, whose policy the first one made."""
    root = tmp_path_factory.mktemp("second")
    bundle(root / "policy" / "bundle", weights=1)
    for name in (SOURCES, "clusters.json"):
        shutil.copy(curated[0] / "dataset" / name, root / "policy")
    for i in range(12, 20):
        attempt(root / "inbox", CORRECTED[i % 5], seed=i)
    curate(root / "inbox", root, SETTINGS, policy=root / "policy", yardstick=yardstick)
    return root / "dataset"


def test_an_earlier_turns_dataset_is_let_in_and_what_it_kept_still_counts(
    curated: tuple[Path, CurateResult], second: Path, yardstick: Path
) -> None:
    first = curated[0] / "dataset"
    rule = Yardstick.load(yardstick)
    before, now = ({k.episode_id for k in kept(d).kept} for d in (first, second))
    assert before < now, "the second turn forgot, or held out nothing itself"
    assert refuse_kept([second, first], rule) == len(now)


def test_a_held_out_episode_of_the_first_turn_never_comes_in_as_earlier_data(
    inbox: Path, curated: tuple[Path, CurateResult], second: Path, tmp_path: Path
) -> None:
    """As an older or forged dataset of the first turn would have it: listed or not."""
    held = kept(curated[0] / "dataset").kept[0].episode_id
    shutil.copytree(inbox / held, tmp_path / "inbox" / held)
    curate(tmp_path / "inbox", tmp_path, CurateSettings(choice="all"))
    sneaked = tmp_path / "dataset"
    assert [u.episode_id for u in (read_sources(sneaked) or kept(second)).used] == [held]
    with pytest.raises(StageError, match=rf"lists {held} {held}, which is kept for evaluation"):
        training(second, tmp_path, earlier=[curated[0] / "dataset", sneaked])
    (sneaked / SOURCES).unlink()
    with pytest.raises(StageError, match=rf"has the frames of {held}, which is kept for evaluation"):
        training(second, tmp_path, earlier=[sneaked])


def test_what_the_second_turn_holds_out_was_not_trained_on_by_the_first(
    curated: tuple[Path, CurateResult], second: Path, tmp_path: Path
) -> None:
    """The other way round: an episode of the first dataset is put on the list of what is kept."""
    first = curated[0] / "dataset"
    root = Path(shutil.copytree(second, tmp_path / "d"))
    sources = kept(root)
    used = kept(first).used[0]
    (root / SOURCES).write_bytes(sources.model_copy(update={"kept": (*sources.kept, used)}).to_bytes())
    with pytest.raises(StageError, match=rf"{used.episode_id}, which is kept for evaluation"):
        training(root, tmp_path, earlier=[first])


def test_a_yardstick_that_has_grown_since_covers_earlier_data(
    curated: tuple[Path, CurateResult], second: Path, tmp_path: Path
) -> None:
    first = curated[0] / "dataset"
    used = kept(first).used[0]
    for names in (used.episode_id, used.content_sha256):
        grown = tmp_path / "grown.json"
        grown.write_bytes(Yardstick(held_out_fraction=0.3, episodes=(names,)).to_bytes())
        with pytest.raises(StageError, match=rf"{used.episode_id}, which is kept for evaluation"):
            training(second, tmp_path, earlier=[first], yardstick=grown)
    grown.write_bytes(Yardstick(held_out_fraction=0.99).to_bytes())
    with pytest.raises(StageError, match=r"earlier_turns"):
        training(second, tmp_path, earlier=[first], yardstick=grown)


def test_a_damaged_list_is_an_error_and_no_permission(
    curated: tuple[Path, CurateResult], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(curated[0] / "dataset", tmp_path / "d"))
    doc = json.loads((root / SOURCES).read_text())
    doc["kept"] = [{"episode_id": 3}]
    (root / SOURCES).write_text(json.dumps(doc))
    with pytest.raises(StageError, match=r"sources\.json: cannot be read; curate again"):
        training(root, tmp_path)


def test_hashes_are_of_the_frames_that_lie_in_the_dataset(curated: tuple[Path, CurateResult]) -> None:
    root = curated[0] / "dataset"
    used = [h for s in kept(root).used for h in s.stretches]
    frames = load_frames(root)
    from flywheel.dataset.yardstick import stretch_sha256

    found = [
        stretch_sha256(frames.state[a:b], frames.action[a:b])
        for a, b in zip(frames.starts, frames.ends, strict=True)
    ]
    assert sorted(found) == sorted(used)
    assert len(set(found)) == len(found)
    assert found[0] != stretch_sha256(frames.state[:1], np.zeros_like(frames.action[:1]))
