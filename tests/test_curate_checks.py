"""Curation's checks: each fires on its fault and is silent on what lies beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel import episode
from flywheel.bench.poison import KINDS, Draft, _open, _seal, poison
from flywheel.config import CheckSettings, CurateSettings
from flywheel.curate.checks import Fault, check_signals, correlation, runs
from flywheel.curate.examine import Candidate, examine
from flywheel.curate.pictures import Film, changes, check_pictures, check_stuck, thumbnails
from flywheel.curate.pictures import sharpness as sharpness_of
from flywheel.curate.repeats import check_together
from flywheel.curate.signals import Signals
from flywheel.errors import ConfigError
from flywheel.schema import Limit, Mode, Outcome
from tests.attempts import TICKS, attempt

BARS = CheckSettings()
SETTINGS = CurateSettings()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sound")
    return [attempt(root, "never_reached", seed=s) for s in range(18)]


def draft(directory: Path) -> Draft:
    """An episode taken apart, to put a fault into."""
    e = episode.read(directory)
    return _open(e, np.random.default_rng(0), e)


def faults(d: Draft, tmp_path: Path, bars: CheckSettings = BARS) -> list[Fault]:
    """What the checks say of it, sealed and read again."""
    e = episode.read(_seal(tmp_path, d))
    s = Signals.of(e)
    return [
        f.fault for f in check_signals(e, s, bars) or check_stuck(Film.of(e.frames, "wrist"), s.frame_q, bars)
    ]


# ── every kind of poison ─────────────────────────────────────────────────────────────────────────────

SINGLE = [k for k, (group, _) in KINDS.items() if group != "repeated"]
# Made-up attempts have neither torques nor these events, and no detail that a blur would take away; there are
# tests of their own for these.
NOT_RECORDED = {"blurred_pictures", "policy_called_operator", "outcome_against_events", "saturated_torque"}
TOGETHER = {"let_go_elsewhere", "other_instruction", "other_pictures"}  # show only beside others


@pytest.mark.parametrize("kind", sorted(set(SINGLE) - TOGETHER - NOT_RECORDED))
def test_poison_is_quarantined_for_a_reason(kind: str, sound: list[Path], tmp_path: Path) -> None:
    donor = attempt(tmp_path / "donor", "wrong_object", seed=9)
    made = poison(sound[0], tmp_path, kind, 3, donor)
    found = examine(made.directory, SETTINGS)
    assert found.reason.startswith("quarantine:"), (kind, found.reason, found.why)
    assert found.why


def test_sound_episodes_pass(sound: list[Path]) -> None:
    candidates = [examine(d, SETTINGS) for d in sound]
    check_together(candidates, BARS)
    assert [c.reason for c in candidates] == [""] * len(sound)


def test_poison_is_the_same_for_a_seed_and_another_for_another(sound: list[Path], tmp_path: Path) -> None:
    def made(seed: int, where: str) -> list[str]:
        p = poison(sound[0], tmp_path / where, "with_noise", seed, sound[1])
        return [f.sha256 for f in episode.read_manifest(p.directory).files]

    assert made(1, "a") == made(1, "b") != made(2, "c")


@pytest.mark.parametrize(
    "kind", [k for k, (group, _) in KINDS.items() if group == "repeated" and k != "renamed"]
)
def test_repeat_under_another_name_is_found_among_others(
    kind: str, sound: list[Path], tmp_path: Path
) -> None:
    again = examine(poison(sound[3], tmp_path, kind, 5, sound[1]).directory, SETTINGS)
    candidates = [*(examine(d, SETTINGS) for d in sound[:6]), again]
    check_together(candidates, BARS)
    assert again.reason.startswith("quarantine:"), again
    assert [c.reason for c in candidates[:-1]] == [""] * 6


def test_the_first_of_two_repeats_stays_whatever_their_order(sound: list[Path], tmp_path: Path) -> None:
    again = poison(sound[3], tmp_path, "with_noise", 5, sound[1]).directory
    for order in ([sound[3], again], [again, sound[3]]):
        candidates = {d: examine(d, SETTINGS) for d in order}
        check_together(list(candidates.values()), BARS)
        assert [candidates[d].reason for d in (sound[3], again)] == ["", "quarantine:repeated"]


def test_success_that_let_go_elsewhere_is_told_by_where_the_others_did(
    sound: list[Path], tmp_path: Path
) -> None:
    odd = examine(poison(sound[0], tmp_path, "let_go_elsewhere", 1, sound[1]).directory, SETTINGS)
    candidates = [*(examine(d, SETTINGS) for d in sound), odd]
    check_together(candidates, BARS)
    assert odd.reason == "quarantine:misplaced"
    few = [*(examine(d, SETTINGS) for d in sound[1:5]), examine(odd.directory, SETTINGS)]
    check_together(few, BARS)
    assert {c.reason for c in few} == {""}, "a handful is no majority"


def marked(candidates: list[Candidate], colours: list[float], tasks: list[str]) -> None:
    from dataclasses import replace

    rng = np.random.default_rng(0)
    for c, colour, task in zip(candidates, colours, tasks, strict=True):
        assert c.mark is not None
        assert c.manifest is not None
        c.mark = replace(c.mark, colours=np.full(32, colour) + rng.normal(scale=0.01, size=32))
        c.manifest = c.manifest.model_copy(update={"task": task})


def test_other_object_than_asked_for_is_told_by_its_neighbours(sound: list[Path]) -> None:
    candidates = [examine(d, SETTINGS) for d in sound]
    tasks = ["pick red"] * 9 + ["pick blue"] * 9
    marked(candidates, [0.6] * 10 + [0.2] * 8, tasks)  # the tenth grasped a red one and was asked for blue
    check_together(candidates, BARS)
    assert [i for i, c in enumerate(candidates) if c.reason == "quarantine:other_object"] == [9]


def test_pictures_that_do_not_follow_the_arm_are_told_by_those_that_do(sound: list[Path]) -> None:
    from dataclasses import replace

    for others, found in (([0.85, 0.8, 0.9] * 6, [17]), ([0.1, 0.5, 0.8] * 6, [])):
        candidates = [examine(d, SETTINGS) for d in sound]
        for c, fit in zip(candidates, [*others[:17], 0.2], strict=True):
            assert c.mark is not None
            c.mark = replace(c.mark, seen_motion=fit)
        check_together(candidates, BARS)
        assert [i for i, c in enumerate(candidates) if c.reason == "quarantine:image_motion"] == found


def test_tasks_that_look_alike_are_left_alone(sound: list[Path]) -> None:
    candidates = [examine(d, SETTINGS) for d in sound]
    marked(candidates, [0.5] * 18, ["pick it", "push it"] * 9)
    check_together(candidates, BARS)
    assert not any(c.reason == "quarantine:other_object" for c in candidates)


# ── on both sides of the bar ─────────────────────────────────────────────────────────────────────────


def shift_clock(d: Draft, by_ns: int) -> None:
    """Set the clock forward in the middle of a chunk, where the arm moves."""
    at = int(d.frames["t_ns"][14]) + 50_000_000
    for columns in (d.control, d.frames):
        columns["t_ns"] = np.where(columns["t_ns"] >= at, columns["t_ns"] + by_ns, columns["t_ns"])
    low, high = d.manifest.window_ns
    d.manifest = d.manifest.model_copy(update={"window_ns": (low, high + by_ns)})


@pytest.mark.parametrize(("by_ms", "found"), [(500, [Fault.CLOCK_JUMP]), (2, [])])
def test_clock_that_is_set_while_the_arm_moves(
    by_ms: int, found: list[Fault], sound: list[Path], tmp_path: Path
) -> None:
    d = draft(sound[0])
    shift_clock(d, by_ms * 1_000_000)
    assert faults(d, tmp_path) == found


def test_declared_gap_is_no_fault_and_an_undeclared_one_is(sound: list[Path], tmp_path: Path) -> None:
    for undeclared, found in ((False, []), (True, [Fault.GAP])):
        d = draft(sound[0])
        d.control = {k: np.delete(v, slice(405, 412), axis=0) for k, v in d.control.items()}
        d.undeclared = undeclared
        assert faults(d, tmp_path / str(undeclared)) == found


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_control_that_was_cut_off_leaves_frames_that_nothing_was_checked_against(
    rows: int, sound: list[Path], tmp_path: Path
) -> None:
    d = draft(sound[0])
    d.control = {k: v[:rows] for k, v in d.control.items()}
    assert faults(d, tmp_path)[0] == Fault.GAP


def test_chunk_with_forged_anchors_is_told_without_an_overflow(sound: list[Path], tmp_path: Path) -> None:
    d = draft(sound[0])
    t = d.control["t_ns"]
    k = int(np.flatnonzero(d.control["chunk_id"] >= 0)[5])
    d.control["chunk_id"][k : k + 2] = d.control["chunk_id"][k]
    d.control["chunk_age_ns"][k : k + 2] = int(t[k]) - (2**63 - 1), 2**63 - 1
    assert Fault.CLOCK_JUMP in faults(d, tmp_path)


Change = Callable[[Draft, float], None]


def scaled(*names: str) -> Change:
    def change(d: Draft, by: float) -> None:
        for name in names:
            d.control[name] = d.control[name] * by

    return change


def offset(d: Draft, by: float) -> None:
    for name in ("q", "q_ref"):
        d.control[name][:, 1] += by


def step(d: Draft, by: float) -> None:
    for name in ("q", "q_ref"):
        d.control[name][len(d.control[name]) // 2 :, 0] += by


def push(d: Draft, by: float) -> None:
    mine = d.mine
    d.frames["action"][mine[9], 0] += by


def scaled_pose(d: Draft, by: float) -> None:
    for name in ("state", "action"):
        d.frames[name][:, :3] *= by


@pytest.mark.parametrize(
    ("change", "harmless", "harmful", "fault"),
    [
        (scaled("q", "q_ref"), 1.1, 180 / np.pi, Fault.UNITS),
        (scaled("dq"), 0.9, 1e-3, Fault.UNITS),
        (scaled("dq"), 1.1, 180 / np.pi, Fault.JOINT_LIMITS),
        (offset, 0.5, 3.0, Fault.JOINT_LIMITS),
        (offset, -0.5, -3.0, Fault.JOINT_LIMITS),
        (step, 0.02, 0.15, Fault.DISCONTINUITY),
        (scaled_pose, 1.5, 1000.0, Fault.UNITS),
        (push, 0.02, 0.4, Fault.ACTION_STATE),
    ],
)
def test_size_of_a_fault_decides(
    change: Change, harmless: float, harmful: float, fault: Fault, sound: list[Path], tmp_path: Path
) -> None:
    small, large = draft(sound[0]), draft(sound[0])
    change(small, harmless)
    change(large, harmful)
    assert faults(small, tmp_path / "small") == []
    assert fault in faults(large, tmp_path / "large")


def test_robot_of_other_joints_is_not_measured_by_these_limits(sound: list[Path], tmp_path: Path) -> None:
    d = draft(sound[0])
    offset(d, 3.0)
    assert faults(d, tmp_path, BARS.model_copy(update={"robots": ()})) == []


def test_speeds_so_large_that_their_sum_overflows_do_not_pass_for_sound(
    sound: list[Path], tmp_path: Path
) -> None:
    d = draft(sound[0])
    d.control["dq"][::2, 0], d.control["dq"][1::2, 0] = 3e38, -3e38
    d.control["dq"][10:20, 0] = 3e38
    assert faults(d, tmp_path, BARS.model_copy(update={"robots": ()})) == [Fault.UNITS]


@pytest.mark.parametrize("rate", ["policy_hz", "control_hz"])
def test_rate_whose_period_no_clock_holds_is_quarantined_like_any_other(
    rate: str, sound: list[Path], tmp_path: Path
) -> None:
    odd = tmp_path / sound[0].name
    shutil.copytree(sound[0], odd)
    doc = json.loads((odd / "manifest.json").read_bytes())
    doc[rate] = 1e-300
    (odd / "manifest.json").write_text(json.dumps(doc))
    assert examine(odd, SETTINGS).reason.startswith("quarantine:")


def test_limits_file_that_is_missing_is_named(sound: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"curate\.checks\.robots: 'none\.yaml'"):
        faults(draft(sound[0]), tmp_path, BARS.model_copy(update={"robots": ("none.yaml",)}))


@pytest.mark.parametrize(("frames", "found"), [(1, []), (6, [Fault.FROZEN])])
def test_encoder_that_stops_counting(
    frames: int, found: list[Fault], sound: list[Path], tmp_path: Path
) -> None:
    d = draft(sound[0])
    rows = d.ticks(d.moving(frames))
    rows = slice(rows.start, rows.start + (8 if frames == 1 else frames * TICKS))
    d.control["q"][rows, 0] = d.control["q"][rows.start, 0]
    assert faults(d, tmp_path) == found


def test_joint_at_rest_is_not_frozen(sound: list[Path], tmp_path: Path) -> None:
    d = draft(sound[0])
    for name in ("q", "q_ref", "dq"):
        d.control[name][:, 4] = 0.25 if name != "dq" else 0.0
    assert faults(d, tmp_path) == []


@pytest.mark.parametrize("why", ["limit", "no power"])
def test_torque_that_stands_for_a_reason_is_not_frozen(why: str, sound: list[Path], tmp_path: Path) -> None:
    d = draft(sound[0])
    rng = np.random.default_rng(0)
    d.control["tau"] = rng.normal(size=d.control["tau"].shape).astype(np.float32)
    rows = d.ticks(d.moving(5))
    d.control["tau"][rows] = 30.0 if why == "limit" else 0.0
    bars = BARS.model_copy(update={"robots": ()})
    assert faults(d, tmp_path / "bare", bars) == [Fault.FROZEN]
    if why == "limit":
        d.control["limits"][rows] |= np.uint32(Limit.TORQUE)
    else:
        d.control["mode"][rows] = Mode.STOP_1
    assert faults(d, tmp_path / "told", bars) == []


def test_actions_while_the_robot_was_stopped_explain_nothing_and_need_not(
    sound: list[Path], tmp_path: Path
) -> None:
    d = draft(sound[0])
    rows = d.ticks(d.mine)
    d.control["mode"][rows] = Mode.STOP_1
    d.frames["action"][d.mine, :3] = 0.0
    assert faults(d, tmp_path) == []


def digest_from(d: Draft, row: int) -> None:
    names = d.frames["policy_digest"]
    d.frames["policy_digest"] = names[:row] + ["ef" * 32] * (len(names) - row)


@pytest.mark.parametrize("row", [0, 1, 20])
def test_frames_of_another_policy(row: int, sound: list[Path], tmp_path: Path) -> None:
    d = draft(sound[0])
    digest_from(d, row)
    assert faults(d, tmp_path) == [Fault.MIXED_POLICIES]


def test_operator_is_who_the_events_say(sound: list[Path], tmp_path: Path) -> None:
    on = {"kind": "intervention", "name": "on", "detail": "{}"}
    for wrong, found in ((1, []), (5, [Fault.INTERVENTION])):
        d = draft(sound[0])
        began = int(d.mine[0])
        d.events = sorted(
            [*d.events, {**on, "t_ns": int(d.frames["t_ns"][began - wrong])}], key=lambda r: r["t_ns"]
        )
        assert faults(d, tmp_path / str(wrong)) == found


def test_policys_chunk_in_a_frame_of_the_operator(sound: list[Path], tmp_path: Path) -> None:
    d = draft(sound[0])
    d.frames["intervention"][d.mine[0] - 3 :] = True
    assert faults(d, tmp_path) == [Fault.INTERVENTION]


def test_outcome_that_the_events_deny(sound: list[Path], tmp_path: Path) -> None:
    for told, found in (("success", []), ("timeout", [Fault.OUTCOME])):
        d = draft(sound[0])
        detail = f'{{"by": "operator", "outcome": "{told}"}}'
        end = d.manifest.window_ns[1]
        d.events = [*d.events, {"t_ns": end, "kind": "task", "name": "end", "detail": detail}]
        assert faults(d, tmp_path / told) == found


@pytest.mark.parametrize(("share", "found"), [(0.1, [Fault.SATURATED]), (1.2, [])])
def test_torque_sensor_that_ends_too_early(
    share: float, found: list[Fault], sound: list[Path], tmp_path: Path
) -> None:
    d = draft(sound[0])
    rng = np.random.default_rng(0)
    t = np.arange(len(d.control["tau"])) / 200.0
    wave = 5 * np.sin(4 * t) + rng.normal(scale=0.05, size=len(t))
    for j in range(d.manifest.joints):
        d.control["tau"][:, j] = np.clip(wave, -5 * share, 5 * share)
    bars = BARS.model_copy(update={"frozen_s": 2.0})
    assert faults(d, tmp_path, bars) == found


def never_held(d: Draft) -> None:
    d.control["held"][:] = 0


def never_released(d: Draft) -> None:
    d.control["held"][np.flatnonzero(d.control["held"])[0] :] = 1


@pytest.mark.parametrize("change", [never_held, never_released])
def test_success_that_the_tool_denies(
    change: Callable[[Draft], None], sound: list[Path], tmp_path: Path
) -> None:
    for told, found in ((Outcome.SUCCESS, [Fault.OUTCOME]), (Outcome.TIMEOUT, [])):
        d = draft(sound[0])
        change(d)
        d.manifest = d.manifest.model_copy(update={"operator_outcome": told})
        assert faults(d, tmp_path / told.value) == found
    free = BARS.model_copy(update={"success_lets_go": False})
    d.manifest = d.manifest.model_copy(update={"operator_outcome": Outcome.SUCCESS})
    assert faults(d, tmp_path / "free", free) == []


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────


def pictures(change: Callable[[Any], Any] = lambda x: x, n: int = 20) -> Any:
    """A pattern that passes by, grey ``[n, 64, 64]``, and how far the joints went meanwhile."""
    rng = np.random.default_rng(0)
    motion = rng.uniform(0.0, 0.2, n - 1)
    at = np.concatenate([[0.0], np.cumsum(motion)])
    y, x = np.mgrid[:64, :64]
    image = (
        120
        + 60 * np.sin(x / 3 + 8 * at[:, None, None]) * np.cos(y / 4)
        + rng.normal(scale=3, size=(n, 64, 64))
    )
    return np.clip(change(image), 0, 255).astype(np.float32), motion


def seen(change: Callable[[Any], Any]) -> list[Fault]:
    images, motion = pictures(change)
    return [f.fault for f in check_pictures(images, changes(thumbnails(images)), "wrist", motion, BARS)]


def only(rows: int, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def some(images: Any) -> Any:
        out = images.copy()
        out[3 : 3 + rows] = change(images)[3 : 3 + rows]
        return out

    return some


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: x, []),
        (lambda x: x * 0.2, []),  # dim, and there is something to see
        (only(2, lambda x: 0 * x), [Fault.BLACK_IMAGE]),
        (only(2, lambda x: 0 * x + 255), [Fault.WHITE_IMAGE]),
        (only(1, lambda x: 0 * x), []),  # one alone may be
        (lambda x: x[:1] + np.random.default_rng(1).normal(scale=3, size=x.shape), [Fault.STUCK_IMAGE]),
    ],
)
def test_camera_that_does_not_see(change: Callable[[Any], Any], found: list[Fault]) -> None:
    assert seen(change) == found


def smooth(x: Any, times: int) -> Any:
    for _ in range(times):
        for axis in (1, 2):
            x = (np.roll(x, 1, axis) + x + np.roll(x, -1, axis)) / 3
    return x


def sharpness(images: Any) -> Any:
    return sharpness_of(images.astype(np.float32), np.arange(len(images)))


def test_blur_is_told_from_dim_light_and_from_a_coarse_camera() -> None:
    images, _ = pictures()
    assert sharpness(smooth(images, 12)).max() < BARS.min_sharpness < sharpness(images).min()
    assert np.allclose(sharpness(images * 0.3), sharpness(images), rtol=0.05)
    large = np.repeat(np.repeat(images, 4, axis=1), 4, axis=2)
    assert np.allclose(sharpness(large), sharpness(images), rtol=0.05)


def test_picture_that_comes_again_where_the_arm_rests_is_not_stuck(sound: list[Path], tmp_path: Path) -> None:
    d = draft(sound[0])
    rows = d.moving(BARS.stuck_images - 1)
    for k in rows.tolist():
        d.frames["image.wrist"][k] = d.frames["image.wrist"][int(rows[0])]
    assert faults(d, tmp_path / "two") == []
    rows = d.moving(BARS.stuck_images + 2)
    for k in rows.tolist():
        d.frames["image.wrist"][k] = d.frames["image.wrist"][int(rows[0])]
    assert faults(d, tmp_path / "five") == [Fault.STUCK_IMAGE]


# ── the arithmetic ───────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(1, 5))
def test_runs_are_the_runs(flags: list[tuple[bool, bool]], shortest: int) -> None:
    array = np.array(flags)
    expected = []
    for channel in range(2):
        a = 0
        while a < len(array):
            b = a
            while b < len(array) and array[b, channel]:
                b += 1
            if b - a >= shortest:
                expected.append([channel, a, b])
            a = max(b, a + 1)
    assert runs(array, shortest).tolist() == expected


@settings(max_examples=60)
@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=20), st.floats(0.1, 10), st.floats(-5, 5))
def test_correlation_is_that_of_a_line(values: list[float], slope: float, level: float) -> None:
    a = np.array(values)
    told = correlation(a, slope * a + level)
    assert told == pytest.approx(1.0, abs=1e-6) or np.ptp(a) < 1e-6
    assert -1 - 1e-9 <= correlation(a, a[::-1]) <= 1 + 1e-9
    assert correlation(a, np.full_like(a, level)) == 0.0
