"""Labels: each way to fail is recognised, contradictions ask for a person, damaged episodes stop nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flywheel.aspects import WORDS, Aspect
from flywheel.config import LabelSettings
from flywheel.episode import read
from flywheel.errors import StageError
from flywheel.label import Cause, FailureMode, Label, label, label_episode
from flywheel.label.signals import intervals
from flywheel.schema import FRAMES_FILE, Outcome, Trigger, TriggerKind
from tests.attempts import CORRECTED, KINDS, POLICY_NS, attempt, flip, truncate
from tests.samples import vectors

SETTINGS = LabelSettings()


def labelled(directory: Path) -> Label:
    return label_episode(read(directory), SETTINGS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [*KINDS, "success"])
def test_each_way_to_fail_is_recognised(tmp_path: Path, kind: str, seed: int) -> None:
    x = labelled(attempt(tmp_path, kind, seed))
    assert x.failure_mode.value == ("none" if kind == "success" else kind), x.votes
    assert not x.needs_review


@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        ("never_reached", "approach"),
        ("missed_grasp", "grasp"),
        ("wrong_object", "carry"),
        ("dropped", "place"),
        ("timed_out_carrying", "carry"),
        ("success", ""),
    ],
)
def test_the_phase_is_where_the_attempt_broke(tmp_path: Path, kind: str, phase: str) -> None:
    assert labelled(attempt(tmp_path, kind)).phase == phase


@pytest.mark.parametrize("kind", ["never_reached", "missed_grasp", "timed_out_carrying", "dropped"])
def test_failure_is_recognised_without_an_operator(tmp_path: Path, kind: str) -> None:
    x = labelled(attempt(tmp_path, kind, corrected=False))
    assert x.failure_mode.value == kind
    assert x.signals.interventions == ()


@pytest.mark.parametrize("kind", CORRECTED)
def test_intervention_is_the_operators_stretch_to_its_last_frame(tmp_path: Path, kind: str) -> None:
    directory = attempt(tmp_path, kind)
    frames = read(directory).frames
    mine = np.flatnonzero(frames.column("intervention").to_numpy())
    ((start, end),) = labelled(directory).signals.interventions
    assert start == mine[0] * POLICY_NS
    assert end == (mine[-1] + 1) * POLICY_NS


def test_phases_cover_the_episode_and_end_in_the_operators(tmp_path: Path) -> None:
    x = labelled(attempt(tmp_path, "dropped"))
    spans = x.signals.segments
    assert [p.value for p, *_ in spans] == ["approach", "grasp", "carry", "place", "recover"]
    assert all(a[2] == b[1] for a, b in pairwise(spans))
    t = read(next(tmp_path.iterdir())).control.column("t_ns").to_pylist()
    assert (spans[0][1], spans[-1][2]) == (t[0], t[-1] + t[1] - t[0])


def test_two_interventions_are_two_segments() -> None:
    t = np.arange(6, dtype=np.int64) * 10
    flags = np.array([False, True, True, False, True, False])
    assert intervals(flags, t, 10) == [(10, 30), (40, 50)]
    assert intervals(np.array([True] * 6), t, 10) == [(0, 60)]
    assert intervals(np.zeros(6, bool), t, 10) == []


def test_a_joint_that_stands_still_while_it_is_sent_elsewhere_is_hardware(tmp_path: Path) -> None:
    def edit(control: dict[str, Any]) -> None:
        q = 3.0 * np.array(control["q"].to_pylist())  # as fast as an arm moves
        control["q_ref"] = vectors(q)
        q[:, 2] = q[0, 2]  # an encoder that always reads the same
        control["q"] = vectors(q)

    x = labelled(attempt(tmp_path, "missed_grasp", edit_control=edit))
    assert x.signals.stuck_joint == 2
    assert x.cause is Cause.HARDWARE


def test_chunks_that_were_refused_are_no_latency_although_the_loop_starves(tmp_path: Path) -> None:
    rejected = tuple((i * POLICY_NS, "policy", "rejected") for i in range(1, 6))
    triggers = _triggers(TriggerKind.POLICY_LATE, TriggerKind.TASK_TIMEOUT)
    late = labelled(attempt(tmp_path, "missed_grasp", triggers=triggers))
    refused = labelled(attempt(tmp_path, "missed_grasp", seed=1, triggers=triggers, events=rejected))
    assert (late.cause, refused.cause) == (Cause.LATENCY, Cause.INTEGRATION)


@pytest.mark.parametrize("kind", ["missed_grasp", "success"])
def test_a_camera_that_shows_the_same_picture_while_the_tool_moves_is_hardware(
    tmp_path: Path, kind: str
) -> None:
    def freeze(columns: dict[str, Any]) -> None:
        columns["image.wrist"] = columns["image.wrist"][:1] * len(columns["t_ns"])

    x = labelled(attempt(tmp_path, kind, edit=freeze))
    assert x.signals.pictures is not None
    assert x.signals.pictures.frozen == "wrist"
    assert any(v.function == "frozen_camera" and v.word == Cause.HARDWARE for v in x.votes)


def test_contradicting_evidence_asks_for_a_person(tmp_path: Path) -> None:
    # The cell says that the wrong box was taken, the recorder that the right one was dropped.
    trigger = Trigger(kind=TriggerKind.DROPPED_OBJECT, t_ns=12 * POLICY_NS)
    sure = labelled(attempt(tmp_path / "a", "never_reached", outcome=Outcome.WRONG_OBJECT))
    torn = labelled(
        attempt(tmp_path / "b", "never_reached", outcome=Outcome.WRONG_OBJECT, triggers=(trigger,))
    )
    assert torn.confidence < sure.confidence
    assert torn.needs_review
    assert len({v.word for v in torn.votes if v.aspect is Aspect.FAILURE_MODE}) > 1


def test_a_bar_that_is_higher_sends_more_to_review(tmp_path: Path) -> None:
    e = read(attempt(tmp_path, "never_reached"))
    assert not label_episode(e, LabelSettings(min_confidence=0.5)).needs_review
    assert label_episode(e, LabelSettings(min_confidence=0.99)).needs_review


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("missed_grasp", Cause.DISTRIBUTION_SHIFT),
        ("safety_stop", Cause.SAFETY),
        ("tracking", Cause.HARDWARE),
        ("success", Cause.NONE),
    ],
)
def test_cause_follows_the_evidence(tmp_path: Path, kind: str, cause: Cause) -> None:
    x = labelled(attempt(tmp_path, kind))
    assert x.cause is cause
    assert x.cause_why


def _triggers(*kinds: TriggerKind) -> tuple[Trigger, ...]:
    return tuple(Trigger(kind=k, t_ns=12 * POLICY_NS) for k in kinds)


@pytest.mark.parametrize("kind", [TriggerKind.CAMPAIGN, TriggerKind.REQUEST, TriggerKind.OPERATOR_SUCCESS])
def test_what_was_recorded_on_request_is_no_failure(tmp_path: Path, kind: TriggerKind) -> None:
    x = labelled(attempt(tmp_path, "success", triggers=_triggers(kind)))
    assert x.failure_mode is FailureMode.NONE
    assert not x.needs_review
    assert x.signals.failed_ns == x.signals.manifest.window_ns[1]


def test_an_operator_who_calls_a_success_a_failure_is_heard_by_a_person(tmp_path: Path) -> None:
    x = labelled(attempt(tmp_path, "success", triggers=_triggers(TriggerKind.OPERATOR_FAILURE)))
    assert x.needs_review


@pytest.mark.parametrize(
    ("trigger", "cause"),
    [
        (TriggerKind.POLICY_INVALID, Cause.INTEGRATION),
        (TriggerKind.POLICY_LATE, Cause.LATENCY),
        (TriggerKind.OUT_OF_DISTRIBUTION, Cause.DISTRIBUTION_SHIFT),
    ],
)
def test_what_the_robot_noticed_itself_names_the_cause(
    tmp_path: Path, trigger: TriggerKind, cause: Cause
) -> None:
    triggers = _triggers(trigger, TriggerKind.TASK_TIMEOUT)
    assert labelled(attempt(tmp_path, "missed_grasp", triggers=triggers)).cause is cause


def test_stage_labels_the_sound_and_names_the_damaged(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    for i, kind in enumerate(KINDS):
        attempt(inbox, kind, seed=i)
    cut, flipped = attempt(inbox, "dropped", seed=50), attempt(inbox, "dropped", seed=51)
    truncate(cut)
    flip(flipped)
    nan = attempt(inbox, "dropped", seed=52, edit=lambda c: c["state"].__setitem__((3, 1), np.nan))
    (inbox / "empty").mkdir()
    seen: list[tuple[int, int]] = []
    result = label(inbox, tmp_path / "out", SETTINGS, lambda what, done, of: seen.append((done, of)))
    assert result.episodes == len(KINDS)
    assert set(result.unreadable) == {cut.name, flipped.name, nan.name, "empty"}
    assert result.failure_modes == dict.fromkeys(sorted(KINDS), 1)
    assert seen[-1] == (len(KINDS) + 4, len(KINDS) + 4)
    rows = pq.read_table(tmp_path / "out" / "labels.parquet").to_pylist()
    assert [r["episode_id"] for r in rows] == sorted(r["episode_id"] for r in rows)
    assert all(set(json.loads(r["votes"])) == set(Aspect) for r in rows)
    for aspect in (Aspect.OUTCOME, Aspect.FAILURE_MODE, Aspect.CAUSE):
        assert {r[aspect.value] for r in rows} <= set(WORDS[aspect])
    again = label(inbox, tmp_path / "again", SETTINGS)
    assert again == result
    assert (inbox / cut.name / FRAMES_FILE).exists()


def test_nothing_to_label_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no such directory"):
        label(tmp_path / "absent", tmp_path / "out", SETTINGS)
    (tmp_path / "in" / "broken").mkdir(parents=True)
    with pytest.raises(StageError, match="none of 1 episodes"):
        label(tmp_path / "in", tmp_path / "out", SETTINGS)
