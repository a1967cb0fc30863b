"""The demo's report: what a robot recorded must not keep it from being written."""

from __future__ import annotations

from pathlib import Path

from flywheel.episode import seal
from flywheel.report import _thumbnails
from flywheel.schema import EPISODE_FILES, MANIFEST_FILE
from tests.bucket import BucketStore
from tests.samples import control_table, draft, events_table, frames_table


def uploaded(store: BucketStore, parent: Path, frames: int, seed: int, **fields: object) -> str:
    manifest = seal(
        parent,
        draft(seed=seed).model_copy(update=fields),
        control_table(1000, seed=seed),
        frames_table(frames, operator_from=None, seed=seed),
        events_table(),
    )
    prefix = f"episodes/{manifest.episode_id}/"
    for name in (*EPISODE_FILES, MANIFEST_FILE):
        store.put(prefix + name, (parent / manifest.episode_id / name).read_bytes())
    return prefix


def test_episodes_without_frames_or_triggers_have_no_picture_or_their_last_one(tmp_path: Path) -> None:
    store = BucketStore()
    empty = uploaded(store, tmp_path, 0, seed=1)
    plain = uploaded(store, tmp_path, 10, seed=2)
    untriggered = uploaded(store, tmp_path, 10, seed=3, triggers=())
    found = _thumbnails(store, [empty, plain, untriggered])
    assert len(found) == 2
    assert all(f["jpeg"] and ":" in f["caption"] for f in found)
