"""Training beyond the default: adapters, runs that are ended and gone on with, weights, other policies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flywheel.config import TrainSettings
from flywheel.dataset import Clip, load_frames, write_dataset
from flywheel.errors import BundleError
from flywheel.export import blank
from flywheel.train import train
from flywheel.train.loop import InterventionWeights, RelativeActions, mark_last
from flywheel.vla import NEEDED, load, signature, statistics
from tests.integration.test_export import SMALL

pytestmark = pytest.mark.integration
BASE = Path(__file__).parents[2] / "models" / "base"
QUICK = TrainSettings(steps=2, batch_size=4, threads=1)


def write_episodes(
    root: Path, size: blank.Size, flags: list[list[bool]], seed: int = 0, fps: int = 10
) -> Path:
    """A dataset of noise that a policy of ``size`` fits; ``flags``: by episode, who acted in each frame."""
    rng = np.random.default_rng(seed)
    states, actions = len(size.signature.state_names), len(size.signature.action_names)
    clips = [
        Clip(
            "pick the red box",
            {name: rng.integers(0, 256, (len(f), h, w, 3), np.uint8) for name, h, w in size.cameras},
            rng.standard_normal((len(f), states)).astype(np.float32),
            rng.standard_normal((len(f), actions)).astype(np.float32),
            np.arange(len(f)) * round(1e9 / fps),
            np.array(f, bool),
        )
        for f in flags
    ]
    write_dataset(root, clips, fps, size.signature.state_names, size.signature.action_names)
    return root


TWIN = replace(SMALL, cameras=(("wrist", 64, 64),), signature=signature(BASE), empty_cameras=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_episodes(tmp_path_factory.mktemp("data") / "new", TWIN, [[False] * 6 + [True] * 6] * 2)


def weights(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = load_file(directory / "model.safetensors")
    return found


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────────


def test_lora_adapts_every_linear_layer_by_its_rank_and_is_merged(data: Path, tmp_path: Path) -> None:
    train(BASE, data, tmp_path / "out", QUICK.model_copy(update={"lora_rank": 3}))
    before, after = weights(BASE), weights(tmp_path / "out")
    assert set(before) == set(after), "a checkpoint like any other"
    changed = {k: after[k] - before[k] for k in before if not np.array_equal(before[k], after[k])}
    for part in ("vision_model", "text_model", "lm_expert"):
        assert any(part in k for k in changed), f"{part} is not adapted"
    for name, difference in changed.items():  # the sum was rounded to float32
        sizes = np.linalg.svd(difference, compute_uv=False)
        assert sizes[3] < 1e-3 * sizes[0], name
    assert {p.name for p in (tmp_path / "out").iterdir()} >= set(NEEDED)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert not load(tmp_path / "out").policy.config.use_peft


# ── turns after others ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lora_rank", [0, 3])
def test_a_turn_after_others_keeps_its_share_of_the_weights_before_and_a_first_turn_none(
    data: Path, tmp_path: Path, lora_rank: int
) -> None:
    old = write_episodes(tmp_path / "old", TWIN, [[False] * 6] * 2, seed=1)
    settings = QUICK.model_copy(update={"lora_rank": lora_rank, "kept_weights": 0.0})
    assert train(BASE, data, tmp_path / "all", settings, earlier=[old]).kept_weights == 0.0
    settings = settings.model_copy(update={"kept_weights": 0.25})
    assert train(BASE, data, tmp_path / "kept", settings, earlier=[old]).kept_weights == 0.25
    before, trained, kept = weights(BASE), weights(tmp_path / "all"), weights(tmp_path / "kept")
    assert any(not np.array_equal(before[k], trained[k]) for k in before)
    for k in before:
        np.testing.assert_allclose(kept[k], 0.25 * before[k] + 0.75 * trained[k], atol=1e-6, err_msg=k)
    assert train(BASE, data, tmp_path / "first", settings).kept_weights == 0.0


# ── interventions ─────────────────────────────────────────────────────────────────────────────────────


def test_interventions_are_found_in_the_new_data_alone_however_often_it_is_repeated(tmp_path: Path) -> None:
    new = write_episodes(tmp_path / "new", TWIN, [[False, True, True], [True, False]])
    old = write_episodes(tmp_path / "old", TWIN, [[True] * 40, [True] * 31], seed=1)
    mixed = RelativeActions([load_frames(new), load_frames(old)], [0.5, 0.5])
    marked = mixed.interventions()
    first = load_frames(new).image("wrist").reshape(5, -1)
    for i in range(len(mixed)):
        item = mixed[i]
        pixels = (item["observation.images.wrist"] * 255).round().byte().permute(1, 2, 0).numpy().reshape(-1)
        is_new = bool((first == pixels).all(axis=1).any())
        assert marked[i] == (is_new and bool(item["intervention"])), i
    assert 0.2 < marked.mean() < 0.4


def test_an_intervention_counts_as_often_as_is_said() -> None:
    import torch

    weigher = InterventionWeights(np.array([False, True, False, True]), 3.0)
    found, _ = weigher.compute_batch_weights({"index": torch.tensor([[0], [1], [3]])})
    np.testing.assert_allclose(found, np.array([1, 3, 3]) * 3 / 7)
    assert float(found.mean()) == pytest.approx(1.0)


def test_weights_reach_lerobots_loss(data: Path, tmp_path: Path) -> None:
    plain = train(BASE, data, tmp_path / "plain", QUICK)
    heavy = train(BASE, data, tmp_path / "heavy", QUICK.model_copy(update={"intervention_weight": 50.0}))
    assert plain.interventions == heavy.interventions == 0.5
    assert plain.loss != heavy.loss
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "heavy")
    assert any(not np.array_equal(a[k], b[k]) for k in a)


# ── runs that are ended ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_run_ended_by_sigterm_goes_on_at_its_last_checkpoint_to_the_same_weights(
    data: Path, tmp_path: Path, processes: int
) -> None:
    settings = TrainSettings(
        steps=60, batch_size=4, threads=1, replay_fraction=0.0, checkpoint_steps=20, processes=processes
    )
    whole = train(BASE, data, tmp_path / "whole", settings)
    assert whole.resumed == 0
    out = tmp_path / "out"
    # It ends itself when it tells of step 40: a signal from here would come at a step that the load decides.
    script = """
import os, signal, sys
from pathlib import Path
from flywheel.config import TrainSettings
from flywheel.train import train

def end(step, of, loss):
    if step == 40:
        os.kill(os.getpid(), signal.SIGTERM)

train(*map(Path, sys.argv[1:4]), TrainSettings.model_validate_json(sys.argv[4]), on_progress=end)
"""
    job = [sys.executable, "-c", script, str(BASE), str(data), str(out), settings.model_dump_json()]
    ended = subprocess.run(job, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGTERM, ended.stderr[-2000:]
    assert not out.exists()
    at = int(os.readlink(tmp_path / "out.work" / "run" / "checkpoints" / "last"))
    assert at == 20 if processes == 1 else at in (20, 40)  # step 40's is written after it is told
    resumed = train(BASE, data, out, settings)
    assert resumed.resumed == at
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert (resumed.first_loss, resumed.loss) == (whole.first_loss, whole.loss)
    assert not (tmp_path / "out.work").exists()


def test_an_end_while_a_checkpoint_is_marked_as_the_last_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("000020", "000040"):
        (tmp_path / name).mkdir()
    mark_last(tmp_path / "000020")

    def end(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step in ("symlink_to", "replace", "unlink", "rename"):
        with monkeypatch.context() as m:
            m.setattr(Path, step, end)
            with contextlib.suppress(KeyboardInterrupt):
                mark_last(tmp_path / "000040")
        assert os.readlink(tmp_path / "last") in ("000020", "000040"), step
    mark_last(tmp_path / "000040")
    assert os.readlink(tmp_path / "last") == "000040"


def test_what_a_run_on_other_data_left_is_not_gone_on_with(data: Path, tmp_path: Path) -> None:
    """Its last checkpoint is there, and everything says that it was this run but its fingerprint."""
    work = tmp_path / "out.work"
    state = work / "run" / "checkpoints" / "last" / "training_state"
    state.mkdir(parents=True)
    (state / "training_step.json").write_text(json.dumps({"step": 1}))
    (work / "job.json").write_text("another")
    (work / "notes.jsonl").write_text("[1, 0.5, 0.1]\n")
    assert train(BASE, data, tmp_path / "out", QUICK).resumed == 0


# ── other policies ────────────────────────────────────────────────────────────────────────────────────


def test_a_policy_of_another_shape_is_trained_by_the_same_code(tmp_path: Path) -> None:
    policy = blank.write_checkpoint(tmp_path / "policy", SMALL)
    dataset = write_episodes(tmp_path / "data", SMALL, [[True] * 12] * 2, fps=30)
    result = train(policy, dataset, tmp_path / "out", QUICK)
    assert np.isfinite(result.loss)
    assert signature(tmp_path / "out") == SMALL.signature
    before, after = weights(policy), weights(tmp_path / "out")
    assert any(not np.array_equal(before[k], after[k]) for k in before)
    for key, figures in statistics(policy).items():
        for name, value in figures.items():
            np.testing.assert_array_equal(statistics(tmp_path / "out")[key][name], value)


def test_statistics_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "policy_preprocessor.json").write_text('{"steps": []}')
    with pytest.raises(BundleError, match="names no file of statistics"):
        statistics(tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_published_size_is_trained_by_the_same_code(tmp_path: Path) -> None:
    """450 million parameters, at a quarter of the image's side; about 12 GB and some minutes."""
    size = replace(
        blank.FULL,
        backbone=replace(blank.FULL.backbone, image_px=128),
        cameras=(("top", 96, 128),),
    )
    script = """
import sys, time
from pathlib import Path
from flywheel.config import TrainSettings
from flywheel.export.stage import peak_rss_mb
from flywheel.train import train
started = time.monotonic()
result = train(*map(Path, sys.argv[1:4]), TrainSettings(steps=2, batch_size=1, threads=2, checkpoint_steps=0))
print(f"{result.first_loss} {result.loss} {time.monotonic() - started:.0f} s {peak_rss_mb():.0f} MB")
"""
    policy = blank.write_checkpoint(tmp_path / "policy", size)
    dataset = write_episodes(tmp_path / "data", size, [[True] * 52], fps=30)
    done = subprocess.run(
        [sys.executable, "-c", script, str(policy), str(dataset), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
    import torch
    from safetensors import safe_open

    with (
        safe_open(policy / "model.safetensors", "pt") as a,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as b,
    ):
        assert sum(int(np.prod(a.get_slice(k).get_shape())) for k in a.keys()) > 440e6  # noqa: SIM118
        name = "model.action_out_proj.weight"
        assert not torch.equal(a.get_tensor(name), b.get_tensor(name))
