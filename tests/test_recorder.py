"""What a window holds, what joins it, and that nothing is recorded twice or falls between."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel.edge.lockstep import Lockstep
from flywheel.edge.policy import Policy
from flywheel.edge.recorder import UNSEALED_MAX, Identity, Recorder, run
from flywheel.edge.sealer import PATIENCE_NS
from flywheel.edge.triggers import Debounce
from flywheel.episode import Episode, as_array, read, verify
from flywheel.errors import EpisodeError
from flywheel.robot import JointState
from flywheel.schema import Manifest, Mode, Outcome, TriggerKind
from tests.recording import IDENTITY, MS, WINDOWS, S, Stage
from tests.robots import Tiny, write_bundle
from tests.samples import EPOCH_NS


def kinds(m: Manifest) -> list[TriggerKind]:
    return [t.kind for t in m.triggers]


def load(root: Path, m: Manifest) -> Episode:
    """An episode, which must be sound."""
    assert [p for p in verify(root / m.episode_id) if p.fatal] == []
    return read(root / m.episode_id)


def ticks(e: Episode) -> list[int]:
    """Control rows in ms."""
    return (as_array(e.control, "t_ns") // MS).tolist()  # type: ignore[no-any-return]


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_trigger_keeps_what_was_before_and_after_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(3.0)
    stage.say("trigger", "wrong_object", expected="red", got="blue")
    (m,) = stage.play(2.0)
    e = load(tmp_path, m)
    assert m.window_ns == (2 * S, 3 * S + S // 2)
    assert ticks(e) == list(range(2000, 3500))
    assert (as_array(e.frames, "t_ns") // MS).tolist() == list(range(2000, 3500, 100))
    assert (m.gaps, m.drops, m.outcome) == (0, 0, Outcome.WRONG_OBJECT)
    assert m.triggers[0].detail == {"expected": "red", "got": "blue"}
    assert m.control_hz == 1000.0
    assert e.events.to_pylist() == [
        {
            "t_ns": 3 * S,
            "kind": "trigger",
            "name": "wrong_object",
            "detail": '{"expected": "red", "got": "blue"}',
        }
    ]


def test_an_attempt_and_its_correction_are_one_episode(tmp_path: Path) -> None:
    s = WINDOWS.model_copy(update={"pre_s": 10.0, "max_episode_s": 30.0})
    stage = Stage(tmp_path, s)
    stage.play(2.0)  # idle: not part of the attempt
    stage.say("task", "start", instruction="pick the blue box", seed=41, shift="dim")
    stage.play(4.0)
    stage.say("task", "end", outcome="timeout", by="policy")
    stage.play(0.3)
    stage.operator = True
    stage.play(4.0)
    stage.say("task", "end", outcome="success", by="operator")
    stage.operator = False
    assert stage.sealed == []
    (m,) = stage.play(2.0)
    e = load(tmp_path, m)
    assert kinds(m) == [TriggerKind.TASK_TIMEOUT, TriggerKind.INTERVENTION]
    assert (m.outcome, m.operator_outcome) == (Outcome.TIMEOUT, Outcome.SUCCESS)
    assert (m.task, m.seed, m.shift) == ("pick the blue box", 41, "dim")
    mine = as_array(e.frames, "intervention").astype(bool)
    assert ticks(e)[0] == 2000
    assert int(mine.sum()) == 40  # all of the correction …
    assert 1 <= int((~mine[-5:]).sum()) <= 3  # … and the tail after it


def test_one_attempt_right_after_another_takes_no_row_and_no_event_of_it(tmp_path: Path) -> None:
    stage = Stage(
        tmp_path, WINDOWS.model_copy(update={"min_interval_s": 2.0})
    )  # holds within an attempt only
    for seed in range(3):
        stage.say("task", "start", seed=seed)
        stage.play(0.7)
        stage.say("task", "end", outcome="dropped", by="policy")
    stage.finish()
    assert [m.seed for m in stage.sealed] == [0, 1, 2]
    assert [m.window_ns for m in stage.sealed] == [(i * 700 * MS, (i + 1) * 700 * MS) for i in range(3)]
    for m in stage.sealed:
        e = load(tmp_path, m)
        assert e.events.column("name").to_pylist() == ["start", "end"]
        assert m.outcome == Outcome.DROPPED


def test_a_failure_an_instant_before_the_next_attempt_belongs_to_the_attempt_that_failed(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path)
    stage.say("task", "start", seed=1)
    stage.play(1.5)
    stage.say("trigger", "task_timeout")
    stage.say("task", "end", outcome="timeout")
    stage.say("task", "start", seed=2)
    stage.play(3.0)
    (m,) = stage.sealed
    assert (m.seed, m.window_ns, m.outcome) == (1, (500 * MS, 1500 * MS), Outcome.TIMEOUT)
    assert kinds(m) == [TriggerKind.TASK_TIMEOUT]  # told twice, fired once


def test_the_window_begins_no_earlier_than_the_rows(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(0.2)
    stage.say("trigger", "dropped_object")
    (m,) = stage.play(1.0)
    assert m.window_ns[0] == 0
    assert m.gaps == 0


def test_what_is_open_at_the_end_is_sealed_shorter(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.2)
    stage.say("trigger", "dropped_object")
    stage.play(0.1)
    stage.say("task", "end", outcome="dropped")
    (m,) = stage.finish()
    assert m.window_ns == (200 * MS, 1300 * MS)
    assert "end" in load(tmp_path, m).events.column("name").to_pylist()  # said in the last instant
    assert stage.finish() == []


# ── joining, bounding, debouncing ────────────────────────────────────────────────────────────────────


def test_a_fault_during_a_recording_joins_it_and_prolongs_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(2.0)
    stage.say("trigger", "wrong_object")
    stage.play(0.4)
    stage.say("trigger", "dropped_object")
    (m,) = stage.play(2.0)
    assert kinds(m) == [TriggerKind.WRONG_OBJECT, TriggerKind.DROPPED_OBJECT]
    assert m.window_ns == (1 * S, 2900 * MS)


@pytest.mark.parametrize("later_ms", [550, 900], ids=["before it is sealed", "after it is sealed"])
def test_a_fault_just_after_a_recording_gets_what_comes_after_it(tmp_path: Path, later_ms: int) -> None:
    stage = Stage(tmp_path)
    stage.play(2.0)
    stage.say("trigger", "wrong_object")
    stage.play(later_ms / 1000)
    assert len(stage.sealed) == (later_ms > 600)
    stage.say("trigger", "dropped_object")
    stage.play(2.0)
    first, second = stage.sealed
    assert first.window_ns[1] == second.window_ns[0] == 2500 * MS
    assert second.window_ns[1] == (2500 + later_ms) * MS
    rows = ticks(load(tmp_path, first)) + ticks(load(tmp_path, second))
    assert rows == list(range(1000, 2500 + later_ms))


def test_a_trigger_told_late_still_gets_its_window(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(2.0)
    stage.events.add(1900 * MS, "trigger", "wrong_object")
    (m,) = stage.play(1.0)
    assert m.window_ns == (900 * MS, 2400 * MS)


def test_a_chattering_trigger_fires_once_in_its_interval(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.5)
    stage.play(0.1, each_ms=lambda t: stage.events.add(t, "trigger", "wrong_object"))
    (m,) = stage.play(2.0)
    assert len(m.triggers) == 1
    assert stage.recorder.status.suppressed == 99


def test_faults_without_end_make_episodes_of_bounded_length_that_touch(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(0.5)
    for _ in range(40):
        stage.say("trigger", "dropped_object")
        stage.play(0.25)
    stage.play(1.0)
    spans = [m.window_ns for m in stage.sealed]
    assert [b - a for a, b in spans[:2]] == [4 * S, 4 * S]
    assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_an_intervention_longer_than_an_episode_goes_on_in_the_next(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.0)
    stage.operator = True
    stage.play(6.0)
    stage.operator = False
    stage.play(1.0)
    first, second = stage.sealed
    assert first.window_ns[1] == second.window_ns[0]
    assert [t.detail for m in stage.sealed for t in m.triggers] == [{}, {"continued": True}]
    operated = sum(int(as_array(load(tmp_path, m).frames, "intervention").sum()) for m in stage.sealed)
    assert operated == 60


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(20, 700), st.sampled_from(["trigger", "start"])), max_size=12))
def test_nothing_is_recorded_twice_and_no_fault_falls_between(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[int, str]]
) -> None:
    root = tmp_path_factory.mktemp("any")
    stage = Stage(root)
    fired = []
    for pause_ms, what in script:
        stage.play(pause_ms / 1000)
        if what == "start":
            stage.say("task", "start")
        else:
            fired.append(stage.now)
            stage.say("trigger", "dropped_object")
    stage.play(0.02)
    stage.finish()
    spans = sorted(m.window_ns for m in stage.sealed)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    rows = [t for m in stage.sealed for t in ticks(load(root, m))]
    assert len(rows) == len(set(rows))
    told = [t.t_ns for m in stage.sealed for t in m.triggers]
    assert len(told) + stage.recorder.status.suppressed == len(fired)
    assert all(any(a <= t <= b for a, b in spans) for t in fired)


# ── what triggers by itself ──────────────────────────────────────────────────────────────────────────


def test_a_stop_triggers_on_its_edge(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.5)
    stage.mode = Mode.STOP_1
    (m,) = stage.play(3.0)  # it stays stopped: one episode
    assert kinds(m) == [TriggerKind.SAFETY_STOP]
    assert m.triggers[0].t_ns == 1500 * MS
    assert m.triggers[0].detail == {"mode": "stop_1", "limits": 0}
    assert m.outcome == Outcome.STOPPED
    stage.mode = Mode.FOLLOW
    stage.play(1.0)
    stage.mode = Mode.STOP_0
    assert len(stage.play(1.0)) == 1


def test_a_tracking_error_triggers_once_it_lasts(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.5)
    stage.error = WINDOWS.tracking_error_rad * 1.1
    stage.play(0.004)
    stage.error = 0.0
    assert stage.play(1.0) == []  # four samples are noise
    stage.error = WINDOWS.tracking_error_rad * 1.1
    at = stage.now
    (m,) = stage.play(2.0)
    assert [(t.kind, t.t_ns - at) for t in m.triggers] == [(TriggerKind.TRACKING_ERROR, 4 * MS)]
    assert m.triggers[0].detail["error_rad"] == pytest.approx(WINDOWS.tracking_error_rad * 1.1, rel=1e-3)


def test_a_reading_that_is_not_a_number_is_recorded_as_it_was(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.5)
    stage.error = float("nan")
    stage.mode = Mode.STOP_0
    (m,) = stage.play(1.0)
    assert kinds(m) == [TriggerKind.SAFETY_STOP]
    assert {p.reason for p in verify(tmp_path / m.episode_id)} == {"not_finite"}


@pytest.mark.parametrize(("fraction", "recorded"), [(0.0, 0), (1.0, 3)])
def test_a_sample_of_attempts_that_went_well_is_recorded(
    tmp_path: Path, fraction: float, recorded: int
) -> None:
    stage = Stage(tmp_path, WINDOWS.model_copy(update={"baseline_fraction": fraction}))
    for _ in range(3):
        stage.say("task", "start")
        stage.play(1.2)
        stage.say("task", "end", outcome="success")
    stage.finish()
    assert len(stage.sealed) == recorded
    assert all(kinds(m) == [TriggerKind.BASELINE] and m.outcome == Outcome.SUCCESS for m in stage.sealed)


def test_events_that_mean_nothing_stop_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.0)
    stage.say("trigger", "sneeze")
    stage.say("task", "end", outcome="great")
    stage.say("task", "end", outcome=["timeout"])
    stage.say("task", "start", instruction="x" * 5000)  # too long for its row: the detail is cut
    stage.say("trigger", "dropped_object")
    (m,) = stage.play(1.0)
    assert kinds(m) == [TriggerKind.DROPPED_OBJECT]
    assert m.task == "pick the red box"


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
def test_debounce_does_not_depend_on_how_rows_come_in(
    flags: list[bool], confirm: int, heal: int, cuts: list[int]
) -> None:
    """Against the plain definition, one row at a time, for any cutting into batches."""
    raised, run_length, expected = False, 0, []
    for i, f in enumerate(flags):
        run_length = run_length + 1 if f != raised else 0
        if run_length == (heal if raised else confirm):
            raised, run_length = not raised, 0
            if raised:
                expected.append(i)
    d, found, at = Debounce(confirm, heal), [], 0
    while at < len(flags):
        n = cuts[at % len(cuts)]
        found += [at + i for i in d.edges(np.array(flags[at : at + n], dtype=bool))]
        at += n
    assert found == expected


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_recorder_that_was_away_too_long_counts_what_it_missed(tmp_path: Path) -> None:
    stage = Stage(tmp_path, control_rows=256)
    stage.play(1.0)
    stage.play(0.5, poll=False)  # 500 rows into a ring of 256: 245 are gone
    stage.say("trigger", "dropped_object")
    (m,) = stage.play(1.0)
    e = load(tmp_path, m)
    assert m.drops + e.control.num_rows == 1500
    assert m.drops >= 500 - 256
    assert m.gaps == 1
    assert [p.reason for p in verify(tmp_path / m.episode_id)] == ["gap", "drops"]


def test_a_stop_whose_rows_were_overwritten_before_anybody_saw_them_is_recorded(tmp_path: Path) -> None:
    stage = Stage(tmp_path, control_rows=256)
    stage.play(1.0)
    stage.play(0.3, poll=False)
    stopped = stage.now
    stage.mode = Mode.STOP_1
    stage.play(0.04, poll=False)
    stage.mode = Mode.FOLLOW
    stage.play(0.5, poll=False)  # the ring has forgotten the stop
    (m,) = stage.play(1.0)
    assert [(t.kind, t.t_ns) for t in m.triggers] == [(TriggerKind.SAFETY_STOP, stopped)]
    assert m.window_ns == (stopped - S, stopped + S // 2)
    assert m.drops + load(tmp_path, m).control.num_rows == 1500
    assert stage.play(1.0) == []


def test_a_stop_that_goes_on_when_the_rows_come_back_is_one_stop(tmp_path: Path) -> None:
    stage = Stage(tmp_path, control_rows=256)
    stage.play(1.0)
    stage.play(0.1, poll=False)
    stopped = stage.now
    stage.mode = Mode.STOP_1
    stage.play(0.6, poll=False)
    sealed = stage.play(1.0)
    assert [(t.kind, t.t_ns) for m in sealed for t in m.triggers] == [(TriggerKind.SAFETY_STOP, stopped)]


def test_what_was_missed_long_before_is_not_counted(tmp_path: Path) -> None:
    stage = Stage(tmp_path, control_rows=256)
    stage.play(0.5, poll=False)
    stage.play(3.0)
    stage.say("trigger", "dropped_object")
    (m,) = stage.play(1.0)
    assert (m.drops, m.gaps) == (0, 0)


def test_rows_that_come_after_their_window_was_let_go_are_counted(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.5)
    stage.say("trigger", "dropped_object")
    stage.play(0.4)
    (m,) = stage.recorder.poll(stage.now + 3 * S)  # System 1 writes nothing for longer than anyone waits
    stage.play(0.2)
    assert m.window_ns == (500 * MS, 2000 * MS)
    assert (load(tmp_path, m).control.num_rows, m.drops) == (1400, 100)


def test_what_is_open_at_the_end_goes_no_farther_than_the_rows(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.5)
    stage.say("trigger", "dropped_object")
    stage.play(0.1)
    stage.now += 50 * MS  # System 1 ended before the recorder
    (m,) = stage.finish()
    rows = load(tmp_path, m).control.num_rows
    assert 0 <= (m.window_ns[1] - m.window_ns[0]) // MS - rows <= 1
    assert m.drops == 0


def test_a_trigger_after_the_last_row_stays_in_its_window(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.5)
    stage.now += 50 * MS
    stage.say("trigger", "dropped_object")
    stage.now += 50 * MS
    (m,) = stage.finish()
    assert m.window_ns[1] == m.triggers[-1].t_ns + 1


def test_a_frame_without_a_picture_is_a_drop_not_a_row(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.0)
    stage.blind = True
    stage.play(0.3)
    stage.blind = False
    stage.play(0.2)
    stage.say("trigger", "dropped_object")
    (m,) = stage.play(1.0)
    e = load(tmp_path, m)
    assert (m.drops, e.frames.num_rows, m.gaps) == (3, 12, 1)


def test_a_clock_that_goes_back_is_refused(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(0.1)
    stage.now = 0
    with pytest.raises(EpisodeError, match="go back in time after t_ns=99000000"):
        stage.play(0.1)


def test_memory_is_bounded_by_the_window(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(10.0)
    history = stage.recorder._history
    assert sum(len(c) for c in history._control) <= 1150
    assert len(history._frames) <= 12


# ── sealing ──────────────────────────────────────────────────────────────────────────────────────────


def play_failure(root: Path, **options: Any) -> list[Manifest]:
    stage = Stage(root, **options)
    stage.play(1.2)
    stage.say("trigger", "dropped_object")
    stage.play(0.9)
    stage.finish()
    return stage.sealed


def test_the_same_run_seals_the_same_bytes(tmp_path: Path) -> None:
    (a,), (b,) = play_failure(tmp_path / "a"), play_failure(tmp_path / "b")
    assert a == b
    for name in ("manifest.json", "control.parquet", "frames.parquet", "events.parquet"):
        x, y = (tmp_path / d / a.episode_id / name for d in "ab")
        assert x.read_bytes() == y.read_bytes()


def test_a_repeated_run_into_the_same_place_is_no_second_episode(tmp_path: Path) -> None:
    first, second = play_failure(tmp_path), play_failure(tmp_path)
    assert first == second
    assert len(list(tmp_path.iterdir())) == 1


def test_another_content_has_another_name(tmp_path: Path) -> None:
    """Two robots, or two policies, in the same simulated seconds."""
    from dataclasses import replace

    runs = [
        play_failure(tmp_path),
        play_failure(tmp_path, identity=replace(IDENTITY, robot="r2")),
        play_failure(tmp_path, seed=1),
    ]
    assert len({m.episode_id for (m,) in runs}) == 3


def test_sealing_in_the_background_gives_the_same_episode(tmp_path: Path) -> None:
    assert play_failure(tmp_path / "a", background=True) == play_failure(tmp_path / "b")


def test_what_a_crashed_recorder_left_half_written_is_removed(tmp_path: Path) -> None:
    class Crash(BaseException):
        pass

    def crash(step: str) -> None:
        if step == "rename":
            raise Crash

    with pytest.raises(Crash):
        play_failure(tmp_path, step=crash)
    assert [d.name[0] for d in tmp_path.iterdir()] == ["."]
    (m,) = play_failure(tmp_path)
    assert [d.name for d in tmp_path.iterdir()] == [m.episode_id]


def test_a_disk_that_is_full_for_a_moment_costs_no_episode_that_waits_on_it(tmp_path: Path) -> None:
    full, asked = True, []

    def disk(step: str) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make_room(nbytes: int, priority: int) -> None:
        asked.append((nbytes, priority))

    stage = Stage(tmp_path, step=disk, make_room=make_room)
    stage.play(1.2)
    stage.say("trigger", "dropped_object")
    assert stage.play(1.5) == []
    status = stage.recorder.status
    assert (status.refused, status.sealed, status.why) == (1, 0, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    full = False
    (m,) = stage.play(1.1)
    assert ticks(load(tmp_path, m)) == list(range(200, 1700))
    assert (status.refused, status.abandoned) == (0, 0)
    assert asked == []


def test_a_disk_that_stays_full_is_made_room_on_and_that_is_used_at_once(tmp_path: Path) -> None:
    full, asked = True, []

    def disk(step: str) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make_room(nbytes: int, priority: int) -> None:
        nonlocal full
        full = False
        asked.append(nbytes)

    stage = Stage(tmp_path, step=disk, make_room=make_room)
    stage.play(1.2)
    stage.say("trigger", "dropped_object")
    assert stage.play(1.0) == []
    assert len(stage.play(PATIENCE_NS / 1e9 + 1.0)) == 1
    assert asked[0] > 100_000


def test_a_disk_that_stays_full_costs_the_least_important_episodes_first(tmp_path: Path) -> None:
    def disk(step: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stage = Stage(tmp_path, step=disk)
    for i in range(UNSEALED_MAX + 2):
        stage.say("task", "start", seed=i)
        stage.play(0.3)
        stage.say("trigger", "safety_stop" if i < 2 else "baseline")
    stage.finish()
    assert stage.recorder.status.abandoned == 2
    assert [r.draft.seed for r in stage.recorder._sealer.ready][:2] == [0, 1]


def run_lockstep(root: Path, bundle: Path, seed: int) -> list[Manifest]:
    """The real systems on a small robot: two attempts, the second one fails and is corrected."""
    rng = np.random.default_rng(seed)

    def noise(s: JointState) -> None:
        s.q += rng.normal(scale=1e-4, size=2)

    robot = Tiny(255)
    robot.disturb = noise
    lock = Lockstep(robot, robot, Policy.load(bundle), record=True)
    identity = Identity("lab", "r1", "lockstep", EPOCH_NS, "test")
    recorder = Recorder(lock.rings, WINDOWS, root, identity, seed=seed)
    lock.recorder = recorder
    for attempt in range(2):
        lock.events.add(lock.now_ns, "task", "start", {"seed": attempt})
        lock.run(0.8, "move left")
        outcome = "timeout" if attempt else "success"
        lock.events.add(lock.now_ns, "task", "end", {"outcome": outcome, "by": "policy"})
    lock.run(0.7, "move left", override=lambda seen: np.array([*(0.9 * seen.q), 0.0]))
    lock.events.add(lock.now_ns, "task", "end", {"outcome": "success", "by": "operator"})
    return recorder.finish(lock.now_ns)


def test_the_same_seed_in_lockstep_gives_the_same_episode_bit_for_bit(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    runs = [run_lockstep(tmp_path / n, bundle, seed) for n, seed in (("a", 1), ("b", 1), ("c", 2))]
    (a,), (b,), (c,) = runs
    assert a == b
    assert a.episode_id != c.episode_id
    for name in ("manifest.json", "control.parquet", "frames.parquet", "events.parquet"):
        x, y = (tmp_path / n / a.episode_id / name for n in "ab")
        assert x.read_bytes() == y.read_bytes()
    e = load(tmp_path / "a", a)
    assert (a.outcome, a.operator_outcome, a.seed) == (Outcome.TIMEOUT, Outcome.SUCCESS, 1)
    assert ticks(e) == list(range(800, 2300))
    assert as_array(e.frames, "intervention").astype(int).tolist() == [0] * 8 + [1] * 7
    assert (a.gaps, a.drops) == (0, 0)


def test_run_polls_until_it_is_told_to_stop_and_then_finishes(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.play(1.2, poll=False)
    stage.say("trigger", "dropped_object")

    class Stop:
        waits = 0

        def wait(self, timeout: float) -> bool:
            self.waits += 1
            return self.waits > 3

    assert run(stage.recorder, Stop(), clock_ns=lambda: stage.now).sealed == 1
    assert isinstance(stage.recorder, Recorder)
