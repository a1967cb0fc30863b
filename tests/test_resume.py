"""A recorder that is killed goes on where it was: nothing lost, nothing twice, wherever it died."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flywheel.edge.journal import Journal
from flywheel.edge.recorder import Recorder
from flywheel.episode import as_array, prepare, read, verify
from flywheel.schema import Manifest, Mode, TriggerKind
from tests.recording import IDENTITY, MS, WINDOWS, S, Stage


class Killed(BaseException):
    """The process died here."""


class Mortal(Stage):
    """A stage whose recorder dies at chosen steps and is started again."""

    def __init__(self, directory: Path, deaths: tuple[int, ...] = (), **options: Any) -> None:
        self.directory, self.memory = directory, bytearray(1 << 20)
        self.steps, self.lives = 0, 1
        self.taken: list[str] = []
        self.deaths = set(deaths)
        super().__init__(directory, seed=None, journal=Journal(self.memory), step=self.step, **options)

    def step(self, name: str) -> None:
        self.steps += 1
        self.taken.append(name)
        if self.steps in self.deaths:
            raise Killed(name)

    def restart(self) -> None:
        """Another process with the same rings."""
        self.lives += 1
        try:
            self.recorder = Recorder(
                self.rings, WINDOWS, self.directory, IDENTITY, journal=Journal(self.memory), step=self.step
            )
        except Killed:
            self.restart()

    def poll(self) -> None:
        try:
            self.sealed += self.recorder.poll(self.now)
        except Killed:
            self.restart()

    def run(self, seconds: float, each_ms: Callable[[int], None] = lambda _: None) -> None:
        for _ in range(round(seconds * 50)):
            self.play(0.02, poll=False, each_ms=each_ms)
            self.poll()


def story(stage: Mortal) -> None:
    """Attempts, faults that join and faults that follow, an intervention, a stop in the rows."""
    stage.run(0.4)
    stage.say("task", "start", seed=7, instruction="pick the blue box")
    stage.run(0.9)
    stage.say("trigger", "dropped_object")
    stage.run(0.3)
    stage.say("trigger", "wrong_object")
    stage.run(0.9)
    stage.say("plant", "door_open")
    stage.run(0.6)
    stage.operator = True
    stage.run(0.8)
    stage.operator = False
    stage.run(0.9)
    stage.error = WINDOWS.tracking_error_rad * 1.2
    stage.run(0.6)
    stage.error = 0.0
    stage.run(1.0)


def content(directory: Path) -> list[tuple[Any, ...]]:
    """Everything in the episodes of a directory but their names."""
    found = []
    for d in sorted(directory.iterdir()):
        assert not d.name.startswith("."), d
        assert [p for p in verify(d) if p.fatal] == []
        e = read(d)
        m = e.manifest
        files = tuple((d / f.name).read_bytes() for f in m.files)
        found.append((m.window_ns, m.triggers, m.task, m.seed, m.drops, m.gaps, m.outcome, files))
    return sorted(found, key=lambda x: x[0])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[Any, ...]], int]:
    directory = tmp_path_factory.mktemp("undisturbed")
    stage = Mortal(directory)
    story(stage)
    assert len(content(directory)) == 4
    return content(directory), stage.steps


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_killed_anywhere_any_number_of_times_it_seals_the_same_bytes(
    undisturbed: tuple[list[tuple[Any, ...]], int],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    expected, steps = undisturbed
    deaths = data.draw(st.lists(st.integers(1, steps + 40), max_size=12))
    directory = tmp_path_factory.mktemp("killed")
    stage = Mortal(directory, tuple(deaths))
    story(stage)
    assert content(directory) == expected
    assert stage.lives > len({d for d in deaths if d <= steps} and {1})
    shutil.rmtree(directory)


def upload_at_once(directory: Path, deaths: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """One failure; what is sealed is taken away before the recorder comes back. Names sealed, steps taken."""
    uploaded: list[str] = []
    stage = Mortal(directory, deaths)
    stage.run(0.3)
    stage.say("trigger", "dropped_object")
    for _ in range(36):
        stage.play(0.02, poll=False)
        stage.poll()
        for d in directory.iterdir():
            if not d.name.startswith("."):
                uploaded.append(d.name)
                shutil.rmtree(d)
    return uploaded, stage.taken


def test_killed_at_every_step_of_sealing_and_uploaded_at_once_nothing_is_sealed_twice(tmp_path: Path) -> None:
    names, steps = upload_at_once(tmp_path / "alive", ())
    assert len(names) == 1
    first = min(i for i, s in enumerate(steps) if s != "save")
    last = max(i for i, s in enumerate(steps) if s != "save")
    assert last - first >= 5
    for death in range(first - 1, last + 4):
        names, _ = upload_at_once(tmp_path / str(death), (death,))
        assert len(names) == 1, f"killed at {steps[death - 1]}: {names}"


def test_a_recorder_killed_between_trigger_and_sealing_seals_the_window(tmp_path: Path) -> None:
    stage = Mortal(tmp_path)
    stage.run(1.2)
    stage.say("trigger", "dropped_object", box=3)
    stage.run(0.1)  # seen, and its window not yet over
    stage.restart()
    stage.run(0.3)
    stage.restart()
    stage.run(0.6)
    (e,) = content(tmp_path)
    assert e[0] == (200 * MS, 1700 * MS)
    assert e[1][0].detail == {"box": 3}
    assert (e[4], e[5]) == (0, 0)


def test_a_trigger_that_came_while_there_was_no_recorder_is_seen_by_the_next(tmp_path: Path) -> None:
    stage = Mortal(tmp_path)
    stage.run(1.2)
    stage.say("trigger", "dropped_object")
    stage.play(1.5, poll=False)
    stage.restart()
    stage.poll()
    (e,) = content(tmp_path)
    assert (e[0], e[4]) == ((200 * MS, 1700 * MS), 0)


def test_what_the_ring_no_longer_holds_is_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    stage = Mortal(tmp_path, control_rows=1024)
    stage.run(1.2)
    stage.say("trigger", "dropped_object")
    stage.run(0.1)
    stage.play(1.0, poll=False)  # 1023 rows are left of it: from 1.277 s on
    stage.restart()
    stage.poll()
    (m,) = [read(d).manifest for d in tmp_path.iterdir()]
    t = as_array(read(tmp_path / m.episode_id).control, "t_ns")
    assert m.window_ns == (200 * MS, 1700 * MS)
    assert (t[0], t[-1]) == (1277 * MS, 1699 * MS)
    assert m.drops == 1500 - len(t)
    assert m.triggers[0].kind is TriggerKind.DROPPED_OBJECT


def test_a_window_of_which_no_row_is_left_is_still_a_failure_that_is_told(tmp_path: Path) -> None:
    stage = Mortal(tmp_path, control_rows=256)
    stage.run(1.2)
    stage.say("trigger", "safety_stop", why="light curtain")
    stage.run(0.02)
    stage.play(9.0, poll=False)
    stage.restart()
    stage.poll()
    (m,) = [read(d).manifest for d in tmp_path.iterdir()]
    assert m.triggers[0].detail == {"why": "light curtain"}
    assert m.drops >= 1500
    assert m.files[0].rows == 0


def test_names_follow_from_robot_boot_and_trigger(tmp_path: Path) -> None:
    names = set()
    for robot in ("a", "b"):
        stage = Mortal(tmp_path / robot)
        stage.run(1.2)
        stage.say("trigger", "dropped_object")
        stage.run(0.1)
        copy = bytearray(stage.memory)
        again: list[Manifest] = []
        for i in range(2):  # two recorders that know the same seal under the same name
            d = tmp_path / robot / str(i)
            stage.memory[:] = copy
            r = Recorder(stage.rings, WINDOWS, d, IDENTITY, journal=Journal(stage.memory))
            stage.play(0.5 if i == 0 else 0.0, poll=False)
            again += r.poll(2 * S)
        assert len(again) == 2
        assert again[0] == again[1]
        names.add(again[0].episode_id)
    assert len(names) == 2  # another boot, other names


def test_a_stop_while_the_recorder_was_dead_for_longer_than_the_rows_last_is_recorded_once(
    tmp_path: Path,
) -> None:
    stage = Mortal(tmp_path, control_rows=256)
    stage.mode = Mode.STOP_1
    stage.run(1.0)  # that one was seen
    stage.mode = Mode.FOLLOW
    stage.run(2.0)
    stage.mode = Mode.STOP_0
    stage.play(0.05, poll=False)
    stopped = stage.now - 50 * MS
    stage.mode = Mode.FOLLOW
    stage.play(1.0, poll=False)
    stage.restart()
    assert stage.recorder.status.resumed
    stage.run(1.0)
    stage.restart()
    stage.run(1.0)
    stops = [t.t_ns for m in stage.sealed for t in m.triggers if t.kind == TriggerKind.SAFETY_STOP]
    assert stops == [0, stopped]


def test_a_journal_of_other_rings_is_not_believed(tmp_path: Path) -> None:
    old = Mortal(tmp_path / "a")
    old.run(2.0)
    stage = Stage(tmp_path / "b", seed=None, journal=Journal(old.memory))
    assert not stage.recorder.status.resumed
    stage.play(1.2)
    stage.say("trigger", "dropped_object")
    assert len(stage.play(1.0)) == 1


def test_a_poisoned_window_does_not_stop_the_recorder_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flywheel.edge import sealer
    from flywheel.errors import EpisodeError

    real, calls = prepare, 0

    def refuse(*args: Any, **options: Any) -> Manifest:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise EpisodeError("rows that make no episode")
        return real(*args, **options)

    monkeypatch.setattr(sealer, "prepare", refuse)
    stage = Stage(tmp_path)
    stage.play(1.2)
    stage.say("trigger", "dropped_object")
    assert stage.play(1.0) == []
    assert (stage.recorder.status.unfit, stage.recorder.status.why) == (1, "rows that make no episode")
    stage.say("trigger", "dropped_object")
    assert len(stage.play(1.0)) == 1


# ── the journal itself ───────────────────────────────────────────────────────────────────────────────


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_write_cut_short_anywhere_leaves_the_old_document_or_the_new_one(data: st.DataObject) -> None:
    memory = bytearray(4096)
    journal = Journal(memory)
    journal.save({"n": 0, "pad": "x" * data.draw(st.integers(0, 900))})
    journal.save({"n": 1, "pad": "y" * data.draw(st.integers(0, 900))})
    before = bytes(memory)
    journal.save({"n": 2, "pad": "z" * data.draw(st.integers(0, 900))})
    after = bytes(memory)
    # Any mixture of words written and not yet written: stores may become visible in any order.
    words = np.frombuffer(before, np.int64).copy()
    new = np.frombuffer(after, np.int64)
    changed = np.flatnonzero(words != new)
    took = data.draw(st.lists(st.sampled_from(changed.tolist()), unique=True))
    words[took] = new[took]
    found = Journal(bytearray(words.tobytes())).load()
    assert found is not None
    assert found["n"] in (1, 2)
    assert (found["n"] == 2) <= (len(took) >= 1)


def test_a_document_that_is_too_long_leaves_the_last_one(tmp_path: Path) -> None:
    journal = Journal.at(tmp_path / "journal", 4096)
    assert journal.load() is None
    assert journal.save({"n": 1})
    assert not journal.save({"n": "x" * 5000})
    assert Journal.at(tmp_path / "journal", 4096).load() == {"n": 1}
