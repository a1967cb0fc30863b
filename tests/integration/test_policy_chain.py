"""From checkpoint to bundle to an attempt: the base policy that lies in the checkout."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from flywheel.attempt import Attempt
from flywheel.config import ExportSettings, RecorderSettings, TrainSettings
from flywheel.edge.recorder import Identity, Recorder
from flywheel.errors import BundleError, ConfigError, StageError
from flywheel.schema import EPISODE_FILES, Outcome, bundle_digest, sha256_file

pytestmark = pytest.mark.integration
BASE = Path(__file__).parents[2] / "models" / "base"


def record(directory: Path) -> list[Path]:
    """One failing attempt in the factory, recorded; its episode directories."""
    attempt = Attempt(BASE / "bundle", "factory", record=True, operator_takes_over=True, episode_s=1.5)
    loop = attempt.lockstep
    me = Identity("site", "robot", "lockstep", 1_700_000_000_000_000_000, "0.1.0", shift="factory")
    loop.recorder = recorder = Recorder(loop.rings, RecorderSettings(), directory, me, seed=1)
    result = attempt.run(12)
    recorder.finish(loop.now_ns)
    attempt.close()
    assert result.outcome is Outcome.TIMEOUT  # nobody places a box in 1.5 s
    assert result.operator_outcome is Outcome.SUCCESS
    return sorted(p for p in directory.iterdir() if (p / "manifest.json").is_file())


def test_the_same_seed_in_lockstep_gives_bit_identical_episodes(tmp_path: Path) -> None:
    first, second = record(tmp_path / "a"), record(tmp_path / "b")
    assert [p.name for p in first] == [p.name for p in second]
    assert len(first) == 1
    for name in (*EPISODE_FILES, "manifest.json"):
        assert (first[0] / name).read_bytes() == (second[0] / name).read_bytes(), name


def test_a_recorded_failure_holds_the_attempt_and_the_whole_correction(tmp_path: Path) -> None:
    from flywheel import episode

    found = episode.read(record(tmp_path)[0])
    assert episode.verify(tmp_path / found.manifest.episode_id) == []
    by_operator = np.asarray(found.frames.column("intervention").to_pylist())
    assert not by_operator[0]
    assert by_operator[-1]
    assert found.manifest.operator_outcome is Outcome.SUCCESS
    held = np.asarray(found.control.column("held").to_pylist())
    assert held.max() == 1


def test_export_matches_pytorch_and_says_where_it_came_from(tmp_path: Path) -> None:
    from flywheel.export import export

    result = export(BASE, tmp_path / "bundle", ExportSettings(), limits_sha256="ab" * 32)
    assert result.parity_max < 1e-4
    assert result.digest == bundle_digest(tmp_path / "bundle")
    about = json.loads((tmp_path / "bundle" / "policy.json").read_text())["provenance"]
    assert about["checkpoint_sha256"] == sha256_file(BASE / "model.safetensors")


def test_export_without_parity_writes_nothing(tmp_path: Path) -> None:
    from flywheel.export import export

    with pytest.raises(StageError, match=r"differs from PyTorch.*no bundle was written"):
        export(BASE, tmp_path / "bundle", ExportSettings(parity_atol=1e-12))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_its_backbone_is_named(tmp_path: Path) -> None:
    from flywheel.export import export

    shutil.copytree(BASE, tmp_path / "half", ignore=shutil.ignore_patterns("vlm", "bundle"))
    with pytest.raises(BundleError, match=r"vlm/config\.json: no such file"):
        export(tmp_path / "half", tmp_path / "bundle")


def write_demonstrations(directory: Path, shift: str) -> None:
    """Four demonstrations as a dataset."""
    from flywheel.dataset import Clip, write_dataset
    from flywheel.twin.demonstrate import demonstrate
    from flywheel.twin.shift import shift as named

    clips = [
        Clip(
            d.instruction,
            {"wrist": d.images},
            d.states,
            d.actions,
            np.arange(len(d.states)) * 100_000_000,
            np.ones(len(d.states), bool),
        )
        for d in demonstrate(named(shift), 4, seed=1)
    ]
    write_dataset(directory, clips, 10)


@pytest.mark.parametrize("processes", [1, 2])
def test_training_changes_the_weights_keeps_the_statistics_and_can_be_moved(
    tmp_path: Path, processes: int
) -> None:
    from safetensors.numpy import load_file

    from flywheel.dataset import dataset_digest
    from flywheel.export import export
    from flywheel.train import train, write_metrics

    write_demonstrations(tmp_path / "new", "factory")
    write_demonstrations(tmp_path / "old", "lab")
    write_demonstrations(tmp_path / "earlier", "dim")
    (tmp_path / "new" / "clusters.json").write_text("{}")
    steps = TrainSettings(
        steps=3,
        batch_size=8,
        threads=1,
        processes=processes,
        later_replay_fraction=0.75,
        earlier_share=0.8,
    )
    lab, earlier = tmp_path / "old", [tmp_path / "earlier"]
    result = train(BASE, tmp_path / "new", tmp_path / "out", steps, replay=lab, earlier=earlier)
    assert np.isfinite(result.loss)
    assert (tmp_path / "out" / "clusters.json").exists(), "the next turn would name its clusters anew"
    shares = {pool: p.share for pool, p in result.pools.items()}
    assert shares == pytest.approx({"new": 0.25, "earlier": 0.6, "lab": 0.15}, abs=0.1)
    assert result.pools["earlier"].datasets == (dataset_digest(tmp_path / "earlier"),)
    figures = tmp_path / "metrics" / "train.json"
    write_metrics(result, figures)
    assert json.loads(figures.read_text())["pools"]["earlier"]["frames"] == result.pools["earlier"].frames > 0
    before, after = (load_file(d / "model.safetensors") for d in (BASE, tmp_path / "out"))
    assert any(not np.array_equal(before[k], after[k]) for k in before)
    stats = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    old, new = load_file(BASE / stats), load_file(tmp_path / "out" / stats)
    assert all(np.allclose(old[k], new[k]) for k in old if "action" in k or "state" in k)
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out").rename(tmp_path / "moved")
    assert export(tmp_path / "moved", tmp_path / "bundle").parity_max < 1e-4


def test_a_training_process_that_is_killed_ends_the_others_and_the_stage(tmp_path: Path) -> None:
    from multiprocessing import active_children

    from flywheel.train import ranks
    from flywheel.train.loop import Job
    from flywheel.train.pools import Part
    from flywheel.vla import working_copy

    start = working_copy(BASE, tmp_path / "start")
    write_demonstrations(tmp_path / "data", "lab")
    settings = TrainSettings(steps=10_000, batch_size=8, threads=1, processes=2)
    victims: list[int] = []

    def kill(step: int, loss: float, rate: float) -> None:
        del step, loss, rate
        if not victims:
            victims.extend(p.pid for p in active_children()[1:] if p.pid is not None)
            os.kill(victims[0], signal.SIGKILL)

    with pytest.raises(StageError, match="training process"):
        ranks.run(Job(start, (Part("new", tmp_path / "data", 1.0),), tmp_path / "run", settings), kill)
    assert victims
    assert not active_children()


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    from flywheel.train import ranks
    from flywheel.train.loop import Job
    from flywheel.train.pools import Part

    settings = TrainSettings(batch_size=9, processes=2)
    with pytest.raises(ConfigError, match=r"train\.batch_size=9: must be a multiple of train\.processes=2"):
        ranks.run(Job(tmp_path, (Part("new", tmp_path, 1.0),), tmp_path, settings), lambda *_: None)


def test_training_on_a_policy_that_is_not_there_says_so(tmp_path: Path) -> None:
    from flywheel.train import train

    with pytest.raises((BundleError, StageError), match="no such file"):
        train(tmp_path / "nothing", tmp_path / "data", tmp_path / "out")
