"""The page of one episode: it says what the tables hold, whose eyes it looked with, what it does not know."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flywheel.edge.policy import Inference
from flywheel.episode import read
from flywheel.errors import EpisodeError
from flywheel.explain import attend, controlled, explain, nearest, write_html
from flywheel.label import Answer, Answers, Aspect
from flywheel.schema import Bundle, Outcome
from tests.attempts import CONTROL_HZ, POLICY_NS, attempt, truncate
from tests.samples import ACTION, DIGEST, STATE

SIDE = 64


def bundle(**fields: object) -> Bundle:
    values = {
        "name": "test",
        "cameras": ("wrist",),
        "image_hw": (SIDE, SIDE),
        "state_names": tuple(f"s{i}" for i in range(STATE)),
        "action_names": tuple(f"a{i}" for i in range(ACTION)),
        "action_space": "tool_position_suction",
        "chunk": 4,
        "execute": 2,
        "step_ns": POLICY_NS,
        "max_action_dim": 8,
        "tokens": 8,
        "num_steps": 1,
        "limits_sha256": "",
    }
    return Bundle.model_validate(values | fields)


class Corner:
    """A policy that looks at one patch of the picture alone: the second from the left in the third row."""

    digest = DIGEST
    bundle = bundle()

    def infer(self, images: dict[str, NDArray[np.uint8]], state: object, words: str) -> Inference:
        patch = images["wrist"][16:24, 8:16].astype(np.float64)
        actions = np.zeros((4, ACTION))
        actions[:, 0] = patch.sum() / 1e6
        actions[2:, 1] = images["wrist"].sum()  # beyond what is executed: never done
        actions[:, 3] = images["wrist"].sum()  # the suction: no place
        return Inference(actions, np.zeros((1, 4, 8), np.float32), 0)


class Eye:
    """An encoder whose features are the tool's place."""

    digest = "ab" * 32
    bundle = bundle()

    def misfit(self, cameras: object, state_dim: int) -> str:
        return "" if state_dim == STATE else "another robot"

    def features(self, views: object, states: NDArray[np.float32], words: str) -> NDArray[np.float32]:
        return states[:, :3]


def test_covering_what_the_policy_looks_at_shows_and_nothing_else(tmp_path: Path) -> None:
    def noisy(columns: dict[str, object]) -> None:
        import simplejpeg

        rng = np.random.default_rng(0)
        image = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        columns["image.wrist"] = [simplejpeg.encode_jpeg(image)] * len(columns["t_ns"])  # type: ignore[arg-type]

    e = read(attempt(tmp_path, "missed_grasp", edit=noisy))
    a = attend(e, Corner(), 10 * POLICY_NS)
    assert np.argwhere(a.effects > 0).tolist() == [[2, 1]]
    assert a.effects[2, 1] == pytest.approx(a.whole_m, rel=0.2)
    assert (a.state_m, a.instruction_m) == (0.0, 0.0)
    assert a.focus == pytest.approx((1.5 / 8, 2.5 / 8))
    assert a.row == 10
    assert a.same_policy
    assert a.png().startswith(b"\x89PNG")


def test_attention_is_of_the_policys_frame_and_never_of_the_operators(tmp_path: Path) -> None:
    e = read(attempt(tmp_path, "missed_grasp"))
    mine = np.flatnonzero(~e.frames.column("intervention").to_numpy())
    assert attend(e, Corner(), 10**12).row == mine[-1]


def test_a_success_is_named_even_where_every_failure_is_nearer(tmp_path: Path) -> None:
    one = attempt(tmp_path, "missed_grasp", seed=0)
    near = attempt(tmp_path, "missed_grasp", seed=0, control_hz=CONTROL_HZ)
    others = [attempt(tmp_path, kind, seed=3 * i) for i, kind in enumerate(("success", "never_reached"))]
    other_task = attempt(tmp_path, "success", seed=1)
    cut = attempt(tmp_path, "success", seed=3)
    truncate(cut)
    found = nearest(read(one), [one, near, *others, other_task, cut], Eye())  # type: ignore[arg-type]
    assert {n.episode_id for n in found.successes} == {others[0].name}
    assert one.name not in {n.episode_id for n in found.failures}
    assert found.compared == len({near.name, *(o.name for o in others)} - {one.name})
    distances = [n.distance for n in found.failures]
    assert distances == sorted(distances)


def test_without_anything_to_compare_with_it_says_so(tmp_path: Path) -> None:
    one = attempt(tmp_path, "dropped")
    assert "no other episode" in nearest(read(one), [one], Eye()).why  # type: ignore[arg-type]
    x = explain(one)
    assert x.attention is None
    assert set(x.without) == {"attention", "neighbours"}


def test_what_the_loop_saw_is_what_the_rows_hold(tmp_path: Path) -> None:
    c = controlled(read(attempt(tmp_path, "safety_stop")))
    assert c.modes["stop_1"] == pytest.approx(1 - c.modes["follow"])
    assert c.limits["workspace"] == c.limits["protective_stop"] == round(c.modes["stop_1"] * c.ticks)
    assert c.error_rad.worst == pytest.approx(1e-3, rel=0.01)
    tracking = controlled(read(attempt(tmp_path, "tracking")))
    assert tracking.error_rad.worst == pytest.approx(0.301, rel=0.01)


def test_the_page_loads_nothing_from_elsewhere_and_no_instruction_becomes_markup(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> & <img src=http://elsewhere.example/x>"
    directory = attempt(
        tmp_path, "wrong_object", task=nasty, edit=lambda c: c.update(instruction=[nasty] * len(c["t_ns"]))
    )
    x = explain(directory)
    html = write_html(x, tmp_path / "out" / "page.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert all(s.startswith("data:image/") for s in re.findall(r'<[^>]*\b(?:src|href)="([^"]*)"', html))
    assert "Wrong object during carry" in html


def test_what_people_said_is_on_the_page_and_is_the_label(tmp_path: Path) -> None:
    directory = attempt(tmp_path, "dropped")
    told = Answers(
        answers=(
            Answer(
                episode_id=directory.name,
                words={Aspect.CAUSE: "hardware"},
                by="ann",
                t_unix_ns=1,
                note="worn cup",
            ),
        )
    )
    x = explain(directory, answers=told)
    assert x.label.words[Aspect.CAUSE].by_person
    assert "hardware (100% sure)" in x.summary
    html = write_html(x, tmp_path / "page.html").read_text()
    assert "worn cup" in html


def test_moments_are_in_the_order_of_time_from_the_first_trigger(tmp_path: Path) -> None:
    directory = attempt(tmp_path, "dropped")
    x = explain(directory)
    times = [h.t_s for h in x.happened]
    assert times == sorted(times)
    assert next(h.t_s for h in x.happened if h.what.startswith("trigger")) == 0.0
    assert any("recover begins" in h.what for h in x.happened)
    assert x.manifest.outcome is Outcome.DROPPED


def test_a_damaged_episode_is_not_explained(tmp_path: Path) -> None:
    directory = attempt(tmp_path, "dropped")
    truncate(directory)
    with pytest.raises(EpisodeError):
        explain(directory)
