"""Windows and triggers without rings: whatever comes in whatever order, nothing twice and nothing between."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.config import RecorderSettings
from flywheel.edge.control_ring import control_dtype
from flywheel.edge.images import FrameRing
from flywheel.edge.rows import frame_dtype
from flywheel.edge.rules import RULES
from flywheel.edge.triggers import Detector, Happening, What
from flywheel.edge.windows import PATIENCE_NS, Window, Windows
from flywheel.schema import Mode, TriggerKind
from tests.recording import MS, WINDOWS, S

KINDS = st.sampled_from(list(TriggerKind))
STEPS = st.lists(
    st.tuples(st.integers(1, 900), st.sampled_from(["fire", "start", "operator", "ask", "kill"]), KINDS),
    max_size=30,
)


@given(STEPS)
def test_windows_never_overlap_and_every_trigger_that_counts_is_in_one(
    steps: list[tuple[int, str, TriggerKind]],
) -> None:
    """Also through a state that is written down and read again (``kill``)."""
    w, now, done, fired = Windows(WINDOWS), 0, list[Window](), list[tuple[int, TriggerKind]]()
    w.first_ns = 0
    for pause, what, kind in steps:
        now += pause * MS
        match what:
            case "fire":
                before = w.suppressed
                w.fire(Happening(now, What.TRIGGER, kind))
                if w.suppressed == before and kind is not TriggerKind.BASELINE:
                    fired.append((now, kind))
            case "start":
                w.begin_attempt(now, {})
            case "operator":
                w.operator(now)
            case "ask":
                w.ask(max(now - 300 * MS, 0), now + 200 * MS, {})
            case "kill":
                state = json.loads(json.dumps(w.state()))
                w = Windows(WINDOWS)
                w.restore(state)
        done += w.due(now, now)
        assert w.needed_from(now) <= now
    done += w.due(now + 100 * S, now + 100 * S)
    assert w.open == []
    spans = sorted((d.start, d.end) for d in done)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert all(0 < b - a <= round(WINDOWS.max_episode_s * 1e9) for a, b in spans)
    told = {(t.t_ns, t.kind) for d in done for t in d.triggers}
    assert all(f in told for f in fired)


def test_a_window_waits_for_its_rows_but_not_for_ever() -> None:
    w = Windows(WINDOWS)
    w.first_ns = 0
    w.fire(Happening(2 * S, What.TRIGGER, TriggerKind.DROPPED_OBJECT))
    end = w.open[0].end
    assert w.due(end + S, end - MS) == []  # System 1 is late
    assert len(w.due(end + S, end)) == 1
    w.fire(Happening(5 * S, What.TRIGGER, TriggerKind.DROPPED_OBJECT))
    assert len(w.due(w.open[0].end + S + PATIENCE_NS, end)) == 1  # System 1 is dead


def test_every_kind_of_trigger_has_its_rule() -> None:
    assert set(RULES) == set(TriggerKind)
    assert RULES[TriggerKind.SAFETY_STOP].priority > RULES[TriggerKind.TASK_TIMEOUT].priority
    assert RULES[TriggerKind.BASELINE].priority == min(r.priority for r in RULES.values())


def rows(n: int, t0_ms: int = 0, **columns: object) -> np.ndarray:  # type: ignore[type-arg]
    out = np.zeros(n, control_dtype(2))
    out["t_ns"] = (t0_ms + np.arange(n)) * MS
    for name, value in columns.items():
        out[name] = value
    return out


def found(happenings: list[Happening]) -> list[tuple[TriggerKind | None, int]]:
    return [(h.kind, h.t_ns // MS) for h in happenings]


def event(t_ms: int, kind: str, name: str, **detail: object) -> dict[str, object]:
    return {"t_ns": t_ms * MS, "kind": kind, "name": name, "detail": json.dumps(detail)}


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_a_grasp_is_lost_only_while_the_tool_is_told_to_hold(cuts: list[int]) -> None:
    told = np.array([0] * 50 + [1] * 400 + [0] * 50 + [1] * 200)
    held = np.array([0] * 60 + [1] * 200 + [0] * 5 + [1] * 35 + [0] * 150 + [1] * 250)[: len(told)]
    held[450:] = np.arange(250) > 60  # let go on purpose, then a new grasp that is kept
    d, at, happened = Detector(RecorderSettings()), 0, []
    while at < len(told):
        n = cuts[at % len(cuts)]
        part = rows(len(told[at : at + n]), at, tool_cmd=told[at : at + n], held=held[at : at + n])
        happened += d.control(part)
        at += n
    lost = 300 + RULES[TriggerKind.GRASP_LOST].confirm - 1  # five ticks at 260 were noise
    assert found(happened) == [(TriggerKind.GRASP_LOST, lost)]


def test_a_late_policy_is_one_that_lets_an_attempt_run_dry() -> None:
    d = Detector(RecorderSettings())
    d.event(event(0, "task", "start"))
    assert d.control(rows(300, 0, mode=Mode.HOLD, chunk_id=-1)) == []  # none was promised yet
    late = RULES[TriggerKind.POLICY_LATE].confirm - 1
    assert found(d.control(rows(300, 300, mode=Mode.CARRY_ON, chunk_id=4))) == [
        (TriggerKind.POLICY_LATE, 300 + late)
    ]
    d = Detector(RecorderSettings())
    d.event(event(0, "task", "start"))
    d.event(event(100, "task", "end", outcome="success"))
    assert d.control(rows(300, 200, mode=Mode.RAMP, chunk_id=4)) == []  # nothing is asked of it


def test_a_robot_that_waits_for_its_first_chunks_or_is_told_to_rest_has_no_late_policy() -> None:
    d = Detector(RecorderSettings())
    d.event(event(0, "task", "start"))
    assert d.control(rows(300, 0, mode=Mode.HOLD, chunk_id=1)) == []  # the second in a row is still to come
    assert d.control(rows(300, 300, mode=Mode.FOLLOW, chunk_id=2)) == []
    assert d.control(rows(300, 600, mode=Mode.RAMP, chunk_id=2)) == []  # without having to carry on first
    d.event(event(900, "task", "start"))
    assert d.control(rows(300, 900, mode=Mode.HOLD, chunk_id=2)) == []


def test_refused_chunks_in_a_row_are_one_trigger() -> None:
    d = Detector(RecorderSettings())
    frame = np.zeros(1, frame_dtype({}, 1, 1, 1))
    kinds = []
    for i, good in enumerate([1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0]):
        frame["t_ns"] = i * 100 * MS
        if good:
            d.frames(frame)
        else:
            d.event(event(i * 100, "policy", "rejected", reason="step 3: NaN"))
        kinds += found(d.verdicts())
    assert kinds == [(TriggerKind.POLICY_INVALID, 100), (TriggerKind.POLICY_INVALID, 1000)]


@pytest.mark.parametrize(
    ("kind", "name", "detail", "fires"),
    [
        ("operator", "success", {}, TriggerKind.OPERATOR_SUCCESS),
        ("operator", "failure", {}, TriggerKind.OPERATOR_FAILURE),
        ("plant", "light_curtain", {}, TriggerKind.PLANT_SIGNAL),
        ("operator", "coffee", {}, None),
        ("policy", "ood_score", {"score": 99.0}, None),  # one is no evidence
        ("policy", "ood_score", {"score": "high"}, None),
    ],
)
def test_what_an_event_means(
    kind: str, name: str, detail: dict[str, object], fires: TriggerKind | None
) -> None:
    happened = Detector(RecorderSettings()).event(event(5, kind, name, **detail))
    assert [h.kind for h in happened] == ([fires] if fires else [])


def test_a_scene_unlike_the_training_data_fires_once_it_lasts_and_again_after_it_healed() -> None:
    d = Detector(RecorderSettings(ood_score=2.0))
    scores = [1, 9, 1, 9, 9, 9, 9, 1, 9, *[1] * 5, 9, 9, float("nan")]
    hits = [i for i, s in enumerate(scores) if d.event(event(i, "policy", "ood_score", score=s))]
    assert hits == [5, 16]


def test_kinds_that_are_switched_off_record_nothing() -> None:
    d = Detector(RecorderSettings(triggers=(TriggerKind.SAFETY_STOP,)))
    assert d.event(event(5, "plant", "door")) == []
    assert found(d.control(rows(5, mode=Mode.STOP_1))) == [(TriggerKind.SAFETY_STOP, 0)]


# ── the ring of pictures ─────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=40), st.integers(1, 9))
def test_a_picture_is_read_as_it_was_written_or_not_at_all(sizes: list[tuple[int, int]], every: int) -> None:
    ring = FrameRing(frame_dtype({"a": (1, 1), "b": (1, 1)}, 1, 1, 1), 16, 1024)
    reader, record, sent = ring.reader(), ring.record(), []
    for i, pair in enumerate(sizes):
        images = {c: bytes([i % 251 + 1]) * n for c, n in zip("ab", pair, strict=True)}
        record["t_ns"] = i
        ring.push_frame(record, images)
        sent.append(images)
        if i % every == 0:
            for row in reader.poll().rows:
                for c in "ab":
                    want, got = sent[int(row["t_ns"])][c], ring.image(row, c)
                    assert got is None or got == want
                    if int(row["t_ns"]) == i and c == "b" and 0 < len(want) <= 512:
                        assert got == want  # the newest is always there
