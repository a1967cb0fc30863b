"""An episode is whole or it is not there; and whatever is wrong with one is said, by name."""

from __future__ import annotations

import json
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flywheel import schema
from flywheel.cli import app
from flywheel.episode import (
    Reason,
    as_array,
    bounds,
    checks,
    new_episode_id,
    read,
    read_manifest,
    seal,
    show,
    sweep,
    verify,
)
from flywheel.episode.timeline import write_rrd
from flywheel.errors import ConfigError, EpisodeError
from flywheel.schema import Manifest, sha256_bytes
from tests.samples import (
    CAMERAS,
    EPOCH_NS,
    control_table,
    draft,
    events_table,
    frames_table,
    png_size,
    sealed,
    vectors,
)


def reasons(directory: Path) -> list[Reason]:
    return [p.reason for p in verify(directory) if p.fatal]


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / schema.MANIFEST_FILE
    doc = json.loads(path.read_bytes())
    change(doc)
    path.write_text(json.dumps(doc))


def rewrite(directory: Path, name: str, table: pa.Table, honest: bool = True) -> None:
    """Replace a file; an honest forger mends the manifest too, so that only the content can tell."""
    options: Any = {"compression": "none", "use_dictionary": False}  # as far as it matters, as sealed
    pq.write_table(table, directory / name, write_page_checksum=True, **options)
    if honest:
        data = (directory / name).read_bytes()

        def mend(doc: dict[str, Any]) -> None:
            (entry,) = (f for f in doc["files"] if f["name"] == name)
            entry |= {"bytes": len(data), "sha256": sha256_bytes(data), "rows": table.num_rows}

        edit_manifest(directory, mend)


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    i = table.schema.get_field_index(name)
    return table.set_column(i, table.schema.field(i), pa.chunked_array([values]))


@pytest.fixture
def episode(tmp_path: Path) -> Path:
    """A sound one of one second."""
    d = sealed(tmp_path)
    assert verify(d) == []
    return d


# ── sealing and reading ──────────────────────────────────────────────────────────────────────────────


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    control=st.integers(0, 300),
    frames=st.integers(0, 6),
    seed=st.integers(0, 2**32 - 1),
    texts=st.lists(st.text(max_size=20), max_size=4),
)
def test_what_is_sealed_is_what_is_read(
    tmp_path: Path, control: int, frames: int, seed: int, texts: list[str]
) -> None:
    c, f = control_table(control, seed=seed), frames_table(frames, operator_from=3, seed=seed)
    e = events_table(*((i, "plant", t) for i, t in enumerate(texts)))
    m = seal(tmp_path, draft(seed=seed), c, f, e)
    try:
        back = read(tmp_path / m.episode_id)
        assert back.manifest == m
        assert (back.control, back.frames, back.events) == (c, f, e)
        assert verify(tmp_path / m.episode_id) == []
    finally:
        shutil.rmtree(tmp_path / m.episode_id)


def test_the_same_tables_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = sealed(tmp_path / "a"), sealed(tmp_path / "b")
    for name in (*schema.EPISODE_FILES, schema.MANIFEST_FILE):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_files_carry_statistics_checksums_and_compression(episode: Path) -> None:
    row_group = pq.ParquetFile(episode / schema.CONTROL_FILE).metadata.row_group(0)
    t = row_group.column(0)
    assert (t.statistics.min, t.statistics.max, t.compression) == (0, 999_000_000, "ZSTD")
    assert all(row_group.column(i).is_stats_set for i in range(row_group.num_columns))


def test_sealing_twice_is_harmless_and_never_overwrites(tmp_path: Path) -> None:
    a = sealed(tmp_path)
    before = (a / schema.MANIFEST_FILE).stat()
    assert sealed(tmp_path) == a
    assert (a / schema.MANIFEST_FILE).stat().st_mtime_ns == before.st_mtime_ns
    m = read_manifest(a)
    other = control_table(1000, seed=9)
    with pytest.raises(EpisodeError, match="sealed already, with other content"):
        seal(tmp_path, m, other, frames_table(10), events_table())
    assert verify(a) == []
    assert [d.name for d in tmp_path.iterdir()] == [m.episode_id]


STEPS = ["write control.parquet", "write frames.parquet", "write events.parquet", "write manifest", "rename"]


class Crash(BaseException):
    """The process ends here: nothing of ours runs after it."""


@pytest.mark.parametrize("at", [*STEPS, "sync parent"])
def test_a_crash_leaves_a_whole_episode_or_none(tmp_path: Path, at: str) -> None:
    taken: list[str] = []

    def step(name: str) -> None:
        taken.append(name)
        if name == at:
            raise Crash

    m, tables = draft(), (control_table(1000), frames_table(10), events_table((1, "plant", "x")))
    with pytest.raises(Crash):
        seal(tmp_path, m, *tables, step)
    assert taken == [*STEPS, "sync parent"][: len(taken)]
    if at == "sync parent":
        assert verify(tmp_path / m.episode_id) == []
    else:
        assert not (tmp_path / m.episode_id).exists()
        assert sweep(tmp_path) == 1
        assert list(tmp_path.iterdir()) == []
    seal(tmp_path, m, *tables)
    assert verify(tmp_path / m.episode_id) == []


@pytest.mark.parametrize("at", STEPS)
def test_an_error_of_the_disk_leaves_nothing_behind(tmp_path: Path, at: str) -> None:
    def step(name: str) -> None:
        if name == at:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        seal(tmp_path, draft(), control_table(1000), frames_table(10), events_table(), step)
    assert list(tmp_path.iterdir()) == []


def test_gaps_are_counted_when_sealing(tmp_path: Path) -> None:
    c, f = control_table(1000), frames_table(10)
    t, late = as_array(c, "t_ns").copy(), np.zeros(1000, np.int64)
    late[500] = 900_000  # woken late: no gap
    c = replaced(replaced(c, "t_ns", pa.array(t + late)), "late_ns", pa.array(late))
    c = c.filter(np.arange(1000) // 5 != 120)
    m = seal(tmp_path, draft(), c, f.filter(np.arange(10) % 5 != 2), events_table())
    assert m.gaps == 3
    assert [(p.reason, p.file, p.row, p.fatal) for p in verify(tmp_path / m.episode_id)] == [
        (Reason.GAP, schema.CONTROL_FILE, 600, False),
        (Reason.GAP, schema.FRAMES_FILE, 2, False),
    ]


def test_a_frame_without_its_picture_cannot_be_sealed(tmp_path: Path) -> None:
    f = frames_table(10)
    pictures = f.column("image.scene").to_pylist()
    f = replaced(f, "image.scene", pa.array([*pictures[:4], pictures[4][:-30], *pictures[5:]], pa.binary()))
    with pytest.raises(EpisodeError, match=r"image\.scene of frame 4 is no JPEG"):
        seal(tmp_path, draft(), control_table(1000), f, events_table())
    assert list(tmp_path.iterdir()) == []


def test_tables_that_do_not_fit_the_manifest_cannot_be_sealed(tmp_path: Path) -> None:
    with pytest.raises(EpisodeError, match=r"column q is .*expected"):
        seal(tmp_path, draft(joints=6), control_table(10), frames_table(1), events_table())
    with pytest.raises(EpisodeError, match=r"column image\.wrist is missing"):
        seal(
            tmp_path, draft(), control_table(10), frames_table(1).drop_columns("image.wrist"), events_table()
        )


# ── what verify says ─────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_grows_while_it_is_verified(episode: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = episode / schema.FRAMES_FILE
    bound = bounds.too_large

    def grows(entry: schema.FileEntry, manifest: Manifest) -> str | None:
        if entry.name == path.name:
            with path.open("ab") as f:
                f.write(b"more")
        return bound(entry, manifest)

    monkeypatch.setattr(checks, "too_large", grows)
    assert Reason.SHA256 in reasons(episode)


@pytest.mark.parametrize("name", schema.EPISODE_FILES)
def test_a_truncated_file(episode: Path, name: str) -> None:
    path = episode / name
    path.write_bytes(path.read_bytes()[:-200])
    assert reasons(episode) == [Reason.SHA256]
    with pytest.raises(EpisodeError, match=rf"{name}: truncated or corrupt"):
        read(episode)


@pytest.mark.parametrize("name", schema.EPISODE_FILES)
def test_a_missing_file(episode: Path, name: str) -> None:
    (episode / name).unlink()
    assert reasons(episode) == [Reason.MISSING_FILE]
    with pytest.raises(EpisodeError, match=rf"{name}: missing, but in the manifest; pull"):
        read(episode)


def test_a_flipped_byte_anywhere(episode: Path) -> None:
    path = episode / schema.CONTROL_FILE
    good = path.read_bytes()
    for at in range(0, len(good), 997):
        bad = bytearray(good)
        bad[at] ^= 0x10
        path.write_bytes(bad)
        assert Reason.SHA256 in reasons(episode)


def test_a_flipped_byte_with_the_hash_mended_is_found_by_the_page_checksum(episode: Path) -> None:
    path = episode / schema.CONTROL_FILE
    bad = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(4)
    bad[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
    path.write_bytes(bad)
    edit_manifest(episode, lambda doc: doc["files"][0].update(sha256=sha256_bytes(bytes(bad))))
    assert reasons(episode) == [Reason.CORRUPT]
    with pytest.raises(EpisodeError, match=r"control\.parquet: truncated or corrupt"):
        read(episode)


def test_a_wrong_hash_in_the_manifest(episode: Path) -> None:
    edit_manifest(episode, lambda doc: doc["files"][1].update(sha256="0" * 64))
    (problem,) = verify(episode)
    assert (problem.reason, problem.file) == (Reason.SHA256, schema.FRAMES_FILE)
    assert "000000000000…" in str(problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "column"),
    [(schema.FRAMES_FILE, "state"), (schema.FRAMES_FILE, "action"), (schema.CONTROL_FILE, "tau")],
)
def test_a_number_that_is_none_is_found_by_column_and_row(
    episode: Path, name: str, column: str, value: float
) -> None:
    table = pq.read_table(episode / name)
    values = as_array(table, column).copy()
    values[7, 2] = value
    rewrite(episode, name, replaced(table, column, vectors(values).cast(table.schema.field(column).type)))
    (problem,) = verify(episode)
    assert (problem.reason, problem.column, problem.row) == (Reason.NOT_FINITE, column, 7)
    assert f"{column} is NaN or infinite" in problem.message


def test_rows_added_to_a_file(episode: Path) -> None:
    table = pq.read_table(episode / schema.CONTROL_FILE)
    rewrite(episode, schema.CONTROL_FILE, pa.concat_tables([table, table]), honest=False)
    assert reasons(episode) == [Reason.SHA256]
    with pytest.raises(EpisodeError, match="2000 rows, but the manifest says 1000"):
        read(episode)


def test_time_that_stands_still_goes_back_or_leaves_the_window(episode: Path) -> None:
    table = pq.read_table(episode / schema.CONTROL_FILE)
    t = as_array(table, "t_ns").copy()
    t[500] = t[499]
    rewrite(episode, schema.CONTROL_FILE, replaced(table, "t_ns", pa.array(t)))
    first, _ = verify(episode)
    assert (first.reason, first.row) == (Reason.TIME_ORDER, 500)
    t[500] = 2_000_000_000
    rewrite(episode, schema.CONTROL_FILE, replaced(table, "t_ns", pa.array(t)))
    assert set(reasons(episode)) == {Reason.TIME_ORDER, Reason.WINDOW, Reason.GAP}


@pytest.mark.parametrize("name", [schema.CONTROL_FILE, schema.EVENTS_FILE])
def test_forged_times_whose_differences_overflow_do_not_pass_for_ordered(episode: Path, name: str) -> None:
    table = pq.read_table(episode / name)
    if name == schema.EVENTS_FILE:
        table = table.take([0] * 5)
    t = as_array(table, "t_ns").copy()
    regular = t.copy()
    middle = len(t) // 2
    t[middle - 1 : middle + 2] = 2**63 - 1, -(2**63), -1
    table = replaced(table, "t_ns", pa.array(t))
    if name == schema.CONTROL_FILE:  # so that no row is due at another time than before
        table = replaced(table, "late_ns", pa.array(t - regular))
    rewrite(episode, name, table)
    assert {Reason.TIME_ORDER, Reason.WINDOW} <= set(reasons(episode))


def test_more_cameras_than_any_robot_has_are_refused_before_a_schema_is_made_of_them(episode: Path) -> None:
    edit_manifest(episode, lambda doc: doc.update(cameras=[f"c{i}" for i in range(65)]))
    assert reasons(episode) == [Reason.BAD_MANIFEST]


def test_a_gap_that_the_manifest_hides_is_fatal(episode: Path) -> None:
    table = pq.read_table(episode / schema.CONTROL_FILE)
    rewrite(episode, schema.CONTROL_FILE, table.filter(np.arange(1000) // 10 != 40))
    (problem,) = verify(episode)
    assert (problem.reason, problem.row, problem.fatal) == (Reason.GAP, 400, True)


def test_an_extra_file_and_a_directory_in_place_of_one(episode: Path) -> None:
    (episode / "notes.txt").write_text("x")
    assert reasons(episode) == [Reason.EXTRA_FILE]
    (episode / schema.CONTROL_FILE).unlink()
    (episode / schema.CONTROL_FILE).mkdir()
    assert Reason.NOT_A_FILE in reasons(episode)


def test_other_columns_and_nulls(episode: Path) -> None:
    table = pq.read_table(episode / schema.CONTROL_FILE)
    rewrite(episode, schema.CONTROL_FILE, table.drop_columns("tau"))
    assert reasons(episode) == [Reason.SCHEMA]
    nulls = pa.array([None] * 1000, pa.int64())
    rewrite(episode, schema.CONTROL_FILE, table.set_column(1, pa.field("late_ns", pa.int64()), nulls))
    assert reasons(episode) == [Reason.SCHEMA]


def test_a_picture_that_is_none(episode: Path) -> None:
    table = pq.read_table(episode / schema.FRAMES_FILE)
    pictures = table.column("image.wrist").to_pylist()
    pictures[3] = b"GIF89a"
    rewrite(episode, schema.FRAMES_FILE, replaced(table, "image.wrist", pa.array(pictures, pa.binary())))
    (problem,) = verify(episode)
    assert (problem.reason, problem.column, problem.row) == (Reason.IMAGE, "image.wrist", 3)


def test_drops_are_surfaced_and_bar_nothing(tmp_path: Path) -> None:
    (problem,) = verify(sealed(tmp_path, drops=3))
    assert (problem.reason, problem.fatal) == (Reason.DROPS, False)


def test_no_manifest_no_episode(episode: Path) -> None:
    (episode / schema.MANIFEST_FILE).unlink()
    assert reasons(episode) == [Reason.NO_MANIFEST]
    with pytest.raises(EpisodeError, match="so no episode"):
        read(episode)


@pytest.mark.parametrize("version", [2, 0, "1", True, None, 1.5])
def test_an_unknown_version_is_refused_and_said(episode: Path, version: object) -> None:
    edit_manifest(episode, lambda doc: doc.update(schema_version=version))
    assert reasons(episode) == [Reason.UNKNOWN_VERSION]
    with pytest.raises(EpisodeError, match="this build reads 1; upgrade flywheel"):
        read(episode)


def cut(doc: dict[str, Any]) -> None:
    doc["files"] = doc["files"][:2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("robot"), "robot"),
        (lambda d: d.update(robot="../../etc"), "robot"),
        (lambda d: d.update(site="a/b"), "site"),
        (lambda d: d.update(hacked=1), "hacked"),
        (lambda d: d.update(joints=-1), "joints"),
        (lambda d: d.update(joints=10**9), "joints"),
        (lambda d: d.update(chunk=10**9), "chunk"),
        (lambda d: d.update(control_hz=0), "control_hz"),
        (lambda d: d.update(control_hz=1e30), "control_hz"),
        (lambda d: d.update(drops=10**30), "drops"),
        (lambda d: d.update(drops=-1), "drops"),
        (lambda d: d.update(cameras=["wrist", "wrist"]), "cameras"),
        (lambda d: d.update(clock_epoch_ns=10**30), "clock_epoch_ns"),
        (lambda d: d.update(window_ns=[10, 0]), "window_ns"),
        (lambda d: d["files"][0].update(name="../control.parquet"), "files"),
        (lambda d: d["files"].append(d["files"][0]), "files"),
        (cut, "files"),
    ],
)
def test_a_forged_manifest_is_refused_by_field(
    episode: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    edit_manifest(episode, change)
    (problem,) = verify(episode)
    assert problem.reason == Reason.BAD_MANIFEST
    assert said in problem.message


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b" " * (2 << 20)])
def test_a_manifest_that_is_none(episode: Path, data: bytes) -> None:
    (episode / schema.MANIFEST_FILE).write_bytes(data)
    assert reasons(episode)[0] in (Reason.BAD_MANIFEST, Reason.UNKNOWN_VERSION)
    with pytest.raises(EpisodeError):
        read_manifest(episode)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_verify_never_raises_on_damage(episode: Path, data: st.DataObject) -> None:
    """Any file, any bytes overwritten, cut or inserted: a verdict, no exception; and the wound heals."""
    name = data.draw(st.sampled_from([*schema.EPISODE_FILES, schema.MANIFEST_FILE]))
    path = episode / name
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    wound = data.draw(st.binary(max_size=8))
    skip = data.draw(st.integers(0, 16))
    bad = good[:at] + wound + good[at + skip :]
    path.write_bytes(bad)
    try:
        found = verify(episode)
        assert bad == good or found or name == schema.MANIFEST_FILE
    finally:
        path.write_bytes(good)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────


def test_episode_ids_are_version_7_sort_by_time_and_repeat_for_a_seed() -> None:
    times = [EPOCH_NS + i * 3000 for i in range(1000)]
    ids = [new_episode_id(t, np.random.default_rng(0)) for t in times]
    assert ids == sorted(ids)
    assert len(set(ids)) == 1000
    parsed = uuid.UUID(ids[0])
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert parsed.int >> 80 == EPOCH_NS // 1_000_000
    assert new_episode_id(times[0], np.random.default_rng(0)) == ids[0]
    assert new_episode_id(times[0], np.random.default_rng(1)) != ids[0]


@pytest.mark.parametrize("t", [-1, 1 << 80])
def test_a_clock_that_is_not_set_is_said(t: int) -> None:
    with pytest.raises(EpisodeError, match="is the clock set"):
        new_episode_id(t, np.random.default_rng(0))


# ── the picture ──────────────────────────────────────────────────────────────────────────────────────


def test_show_draws_timeline_and_pictures(tmp_path: Path) -> None:
    m = draft(seconds=2.0)
    f = frames_table(20, operator_from=12)
    events = events_table((m.triggers[0].t_ns, "trigger", "task_timeout"), (1_200_000_000, "mode", "ramp"))
    seal(tmp_path, m, control_table(2000), f, events)
    width, height = png_size(show(tmp_path / m.episode_id, tmp_path / "out" / "e.png"))
    assert (width, height) > (800, 500)


def test_a_viewer_that_is_not_installed_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ConfigError, match=r"--rrd: needs rerun-sdk.*pip install 'flywheel\[rerun\]'"):
        write_rrd(tmp_path, tmp_path / "x.rrd")


def test_a_rerun_recording_has_every_signal_and_camera(tmp_path: Path) -> None:
    rr = pytest.importorskip("rerun", reason="rerun-sdk is optional")
    m = draft(seconds=2.0)
    seal(tmp_path, m, control_table(2000), frames_table(20), events_table((100, "mode", "ramp")))
    rrd = write_rrd(tmp_path / m.episode_id, tmp_path / "out" / "x.rrd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its successor is experimental
        recording = rr.recording.load_recording(rrd)
    paths = {c.entity_path for c in recording.schema().component_columns()}
    assert {"/events", *(f"/cameras/{c}" for c in CAMERAS)} <= paths
    assert sum(p.startswith("/control/q") for p in paths) == 2 * m.joints


def test_show_draws_what_there_is_of_an_empty_or_damaged_recording(tmp_path: Path) -> None:
    m = draft(seed=1)
    seal(tmp_path, m, control_table(0), frames_table(0), events_table())
    show(tmp_path / m.episode_id, tmp_path / "empty.png")
    n = draft(seed=2)
    f = frames_table(3)
    f = replaced(f, f"image.{CAMERAS[0]}", pa.array([b"\xff\xd8 no picture \xff\xd9"] * 3, pa.binary()))
    seal(tmp_path, n, control_table(10), f, events_table())
    show(tmp_path / n.episode_id, tmp_path / "damaged.png")
    with pytest.raises(EpisodeError, match="so no episode"):
        show(tmp_path / "nowhere", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_manifest_without_files_is_only_a_draft() -> None:
    assert isinstance(draft(), Manifest)
    assert draft().prefix.startswith("episodes/site=lab/robot=r1/date=2025-10-09/")


# ── repair ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given_path", ["spool", "spool/episodes"])
def test_repair_finishes_removes_and_sets_aside_whichever_of_the_two_directories_it_is_given(
    tmp_path: Path, given_path: str
) -> None:
    parent = tmp_path / "spool" / "episodes"
    parent.mkdir(parents=True)
    (tmp_path / "spool" / "requests").mkdir()
    sound, damaged, whole, half = (sealed(parent, seed=s) for s in range(4))
    (damaged / schema.FRAMES_FILE).write_bytes(b"")
    whole.rename(parent / f".{whole.name}.partial")
    half.rename(parent / f".{half.name}.partial")
    (parent / f".{half.name}.partial" / schema.MANIFEST_FILE).unlink()
    done = CliRunner().invoke(app, ["episodes", "repair", str(tmp_path / given_path), "--json"])
    assert done.exit_code == 0, done.output
    assert {(r["episode"], r["what"]) for r in json.loads(done.stdout)} == {
        (whole.name, "finished"),
        (f".{half.name}.partial", "removed"),
        (damaged.name, "set aside"),
    }
    assert {p.name for p in parent.iterdir()} == {sound.name, whole.name}
    assert {p.name for p in (tmp_path / "spool").iterdir()} == {"damaged", "episodes", "requests"}
    (aside,) = (tmp_path / "spool" / "damaged").iterdir()
    assert "sha256" in (aside / "why.txt").read_text()
