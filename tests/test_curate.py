"""Curation's decisions: what is quarantined, what is a copy, what the budget goes to."""

from __future__ import annotations

import copy as copying
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.config import CurateSettings
from flywheel.curate import SELECTION, SELECTION_SCHEMA, curate
from flywheel.curate.examine import Candidate, examine, stretches
from flywheel.curate.pictures import grey, thumbnails
from flywheel.curate.select import distance, select
from flywheel.episode import read
from flywheel.errors import StageError
from flywheel.schema import CONTROL_FILE, MANIFEST_FILE, Outcome, sha256_file
from tests.attempts import CORRECTED, POLICY_NS, attempt, copy, flip, reissue, truncate

SETTINGS = CurateSettings()


def decided(*directories: Path, settings: CurateSettings = SETTINGS) -> list[Candidate]:
    found = [examine(d, settings) for d in directories]
    select(found, settings)
    return found


def reasons(*directories: Path, settings: CurateSettings = SETTINGS) -> list[str]:
    return [c.reason for c in decided(*directories, settings=settings)]


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────


def test_truncated_parquet_is_quarantined_by_name(tmp_path: Path) -> None:
    d = attempt(tmp_path, "dropped")
    truncate(d)
    (c,) = decided(d)
    assert (c.episode_id, c.reason, c.taken) == (d.name, "quarantine:sha256", False)
    assert "frames.parquet" in c.why


def test_flipped_bit_in_any_table_is_quarantined(tmp_path: Path) -> None:
    for name in ("control.parquet", "frames.parquet", "events.parquet"):
        d = attempt(tmp_path / name, "dropped")
        flip(d, name)
        (c,) = decided(d)
        assert c.reason == "quarantine:sha256"
        assert name in c.why


def test_nan_in_the_state_is_quarantined_with_its_column(tmp_path: Path) -> None:
    d = attempt(tmp_path, "dropped", edit=lambda c: c["state"].__setitem__((3, 1), np.nan))
    (c,) = decided(d)
    assert c.reason == "quarantine:not_finite"
    assert "state" in c.why


def test_directory_without_a_manifest_is_quarantined(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    assert reasons(tmp_path / "half") == ["quarantine:no_manifest"]


def test_manifest_that_is_no_json_is_quarantined_under_the_directorys_name(tmp_path: Path) -> None:
    d = attempt(tmp_path, "dropped")
    (d / MANIFEST_FILE).write_text('{"schema_version": 1, ')
    (c,) = decided(d)
    assert (c.episode_id, c.reason) == (d.name, "quarantine:bad_manifest")


def test_picture_that_only_looks_like_a_jpeg_is_quarantined(tmp_path: Path) -> None:
    def spoil(columns: dict[str, Any]) -> None:
        columns["image.wrist"][-3] = b"\xff\xd8" + b"\x00" * 500 + b"\xff\xd9"

    (c,) = decided(attempt(tmp_path, "dropped", edit=spoil))
    assert c.reason == "quarantine:image"
    assert "image.wrist" in c.why


def test_picture_that_claims_to_be_huge_is_not_decoded(tmp_path: Path) -> None:
    def inflate(columns: dict[str, Any]) -> None:
        data = bytearray(columns["image.wrist"][-3])
        at = data.index(b"\xff\xc0") + 5  # height and width in the frame header
        data[at : at + 4] = b"\xea\x60\xea\x60"
        columns["image.wrist"][-3] = bytes(data)

    (c,) = decided(attempt(tmp_path, "dropped", edit=inflate))
    assert c.reason == "quarantine:image"
    assert "60000×60000" in c.why


def test_one_bad_episode_changes_nothing_for_the_others(tmp_path: Path) -> None:
    good = [attempt(tmp_path, k, seed=i) for i, k in enumerate(CORRECTED)]
    bad = attempt(tmp_path, "dropped", seed=90)
    truncate(bad, CONTROL_FILE)
    alone, together = decided(*good), decided(*good, bad)
    assert [(c.reason, c.stretches) for c in alone] == [(c.reason, c.stretches) for c in together[:-1]]
    assert all(c.taken for c in alone)


# ── what of an episode is used ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", CORRECTED)
def test_only_the_operators_frames_are_used(tmp_path: Path, kind: str) -> None:
    d = attempt(tmp_path, kind)
    (c,) = decided(d)
    mine = read(d).frames.column("intervention").to_numpy()
    assert c.taken
    assert c.reason == "correction"
    used = np.concatenate([np.arange(a, b) for a, b in c.stretches])
    assert used.tolist() == np.flatnonzero(mine).tolist()


def test_failure_that_nobody_corrected_is_left_out_with_its_reason(tmp_path: Path) -> None:
    (c,) = decided(attempt(tmp_path, "missed_grasp", corrected=False))
    assert (c.taken, c.reason) == (False, "no_correction")
    assert "timeout" in c.why


def test_correction_that_failed_itself_is_left_out(tmp_path: Path) -> None:
    assert reasons(attempt(tmp_path, "dropped", operator_outcome=Outcome.DROPPED)) == ["correction_failed"]


def test_success_is_kept_only_when_asked_for_and_after_the_corrections(tmp_path: Path) -> None:
    success, failure = attempt(tmp_path, "success", seed=1), attempt(tmp_path, "dropped", seed=2)
    assert reasons(success, failure) == ["success", "correction"]
    keep = CurateSettings(keep_success=True)
    assert [c.taken for c in decided(success, failure, settings=keep)] == [True, True]
    tight = CurateSettings(keep_success=True, max_episodes=1)
    assert reasons(success, failure, settings=tight) == ["over_budget", "correction"]


def test_correction_too_short_to_learn_from_is_left_out(tmp_path: Path) -> None:
    assert reasons(attempt(tmp_path, "dropped"), settings=CurateSettings(min_frames=1000)) == ["too_short"]


def frames(t: list[int], words: list[str]) -> pa.Table:
    return pa.table({"t_ns": np.array(t, np.int64) * POLICY_NS, "instruction": words})


def test_missing_frame_cuts_the_stretch_so_that_time_is_never_invented() -> None:
    mine = np.ones(6, bool)
    assert stretches(frames([0, 1, 2, 4, 5, 6], ["a"] * 6), mine, 10.0) == [(0, 3), (3, 6)]


def test_other_instruction_cuts_the_stretch() -> None:
    mine = np.array([False, True, True, True, True, False])
    assert stretches(frames([*range(6)], ["a", "a", "a", "b", "b", "b"]), mine, 10.0) == [(1, 3), (3, 5)]


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_stretches_cover_exactly_the_frames_that_are_mine(flags: list[bool]) -> None:
    mine = np.array(flags)
    found = stretches(frames([*range(len(flags))], ["a"] * len(flags)), mine, 10.0)
    assert [i for a, b in found for i in range(a, b)] == np.flatnonzero(mine).tolist()
    assert all(b1 < a2 for (_, b1), (a2, _) in pairwise(found))


def test_camera_that_the_policy_needs_is_missing(tmp_path: Path) -> None:
    s = CurateSettings(cameras=("wrist", "left"))
    assert reasons(attempt(tmp_path, "dropped"), settings=s) == ["no_camera"]


# ── copies ───────────────────────────────────────────────────────────────────────────────────────────


def test_copied_directory_counts_once(tmp_path: Path) -> None:
    d = attempt(tmp_path, "dropped")
    assert reasons(copy(d, "0-copy"), d) == ["duplicate_id", "correction"]


def test_same_recording_under_another_id_counts_once(tmp_path: Path) -> None:
    d = attempt(tmp_path, "dropped")
    again = reissue(d, tmp_path, episode_id="ffffffff" + d.name[8:], robot="r2")
    found = decided(d, again)
    assert [c.reason for c in found] == ["correction", "duplicate_content"]
    assert d.name in found[1].why


def nudge(columns: dict[str, Any]) -> None:
    columns["state"][:, :3] += 0.002  # another robot's calibration


def test_same_scene_replayed_counts_once(tmp_path: Path) -> None:
    first = attempt(tmp_path / "a", "dropped", seed=4)
    again = attempt(tmp_path / "b", "dropped", seed=4, edit=nudge)
    assert sorted(reasons(first, again)) == ["correction", "duplicate_id"]
    moved = reissue(again, tmp_path / "c", episode_id="ffffffff" + first.name[8:])
    found = decided(first, moved)
    assert [c.reason for c in found] == ["near_duplicate", "correction"]
    assert moved.name in found[0].why


def test_alike_to_the_eye_but_not_in_the_same_scene_is_still_a_near_duplicate(tmp_path: Path) -> None:
    first = attempt(tmp_path / "a", "dropped", seed=4)
    again = attempt(tmp_path / "b", "dropped", seed=4, edit=nudge)
    real = [
        reissue(d, tmp_path / "c", seed=None, episode_id=f"{i}" * 8 + d.name[8:])
        for i, d in enumerate((first, again))
    ]
    assert sorted(reasons(*real)) == ["correction", "near_duplicate"]


def test_other_light_is_no_duplicate_on_a_real_robot(tmp_path: Path) -> None:
    first = attempt(tmp_path / "a", "dropped", seed=4)
    a = examine(reissue(first, tmp_path / "b", seed=None), SETTINGS)
    b = copying.copy(a)
    b.look = a.look * 0.6
    assert distance(a, a) == 0.0
    assert distance(a, b) > SETTINGS.duplicate_distance


def test_other_scenes_are_no_duplicates(tmp_path: Path) -> None:
    assert reasons(*(attempt(tmp_path, "dropped", seed=3 * i) for i in range(6))) == ["correction"] * 6


# ── budget ───────────────────────────────────────────────────────────────────────────────────────────


def test_budget_is_spread_over_failure_modes_not_spent_on_the_frequent_one(tmp_path: Path) -> None:
    many = [attempt(tmp_path, "never_reached", seed=3 * i) for i in range(8)]
    few = [attempt(tmp_path, "dropped", seed=3 * i + 30) for i in range(2)]
    found = decided(*many, *few, settings=CurateSettings(max_episodes=4))
    assert [c.taken for c in found[8:]] == [True, True]
    assert sum(c.taken for c in found) == 4
    assert [c.reason for c in found[:8]].count("over_budget") == 6


def test_budget_is_spread_over_tasks(tmp_path: Path) -> None:
    found = decided(
        *(attempt(tmp_path, "dropped", seed=s) for s in (0, 3, 6, 9, 12, 1, 2)),
        settings=CurateSettings(max_episodes=3),
    )
    assert {c.manifest.task.split()[2] for c in found if c.taken and c.manifest} == {"red", "green", "blue"}


def test_robot_of_another_shape_does_not_break_the_dataset(tmp_path: Path) -> None:
    found = decided(*(attempt(tmp_path, "dropped", seed=i) for i in range(3)))
    odd = copying.copy(found[0])
    odd.shape, odd.reason, odd.directory = ("other",), "", Path("odd")
    odd.manifest = found[0].manifest and found[0].manifest.model_copy(update={"episode_id": "0" * 36})
    odd.content_sha256 = "other"
    for c in found:
        c.reason = ""
    select([*found, odd], SETTINGS)
    assert odd.reason == "other_shape"
    assert all(c.taken for c in found)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    root = tmp_path_factory.mktemp("pool")
    dirs = [attempt(root, CORRECTED[i % 5], seed=i) for i in range(12)]
    dirs += [attempt(root, "success", seed=20), attempt(root, "dropped", seed=21, corrected=False)]
    dirs += [copy(dirs[0], "copy"), reissue(dirs[1], root, episode_id="ffffffff" + dirs[1].name[8:])]
    return [examine(d, SETTINGS) for d in dirs]


@given(st.permutations(range(16)), st.integers(1, 14))
def test_order_of_the_input_does_not_matter(pool: list[Candidate], order: list[int], budget: int) -> None:
    def run(indices: list[int]) -> dict[str, tuple[bool, str, str]]:
        found = [copying.copy(pool[i]) for i in indices]
        select(found, CurateSettings(max_episodes=budget))
        assert sum(c.taken for c in found) <= budget
        return {c.directory.name: (c.taken, c.reason, c.why) for c in found}

    assert run(list(range(16))) == run(order)


@given(st.integers(8, 40), st.integers(8, 40))
def test_thumbnail_is_the_mean_brightness_of_any_image(height: int, width: int) -> None:
    small = thumbnails(grey(np.full((2, height, width, 3), 51, np.uint8)))
    assert small.shape == (2, 8, 8)
    assert np.allclose(small, 0.2)


# ── the stage, where it ends before a dataset ────────────────────────────────────────────────────────


def test_nothing_usable_is_one_clear_error_and_the_reasons_are_written(tmp_path: Path) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    truncate(attempt(inbox, "dropped", seed=1))
    attempt(inbox, "dropped", seed=2, corrected=False)
    (out / "dataset").mkdir(parents=True)  # of an earlier run
    before = {p: sha256_file(p) for p in inbox.rglob("*") if p.is_file()}
    with pytest.raises(StageError, match=r"none of 2 episodes .*no_correction.*selection\.parquet"):
        curate(inbox, out, SETTINGS)
    table = pq.read_table(out / SELECTION)
    assert table.schema.equals(SELECTION_SCHEMA)
    assert sorted(table.column("reason").to_pylist()) == ["no_correction", "quarantine:sha256"]
    assert not (out / "dataset").exists(), "a stale dataset would pass for this run's"
    assert before == {p: sha256_file(p) for p in inbox.rglob("*") if p.is_file()}


def test_missing_input_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no such directory"):
        curate(tmp_path / "absent", tmp_path / "out", SETTINGS)
