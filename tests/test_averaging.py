"""The policy after a turn lies between the one before and the one trained (flywheel.train.averaging)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flywheel.errors import StageError
from flywheel.train.averaging import average
from flywheel.vla import WEIGHTS_FILE


def checkpoint(path: Path, **tensors: torch.Tensor) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / WEIGHTS_FILE)
    return path


@given(kept=st.floats(0, 1), before=st.floats(-1e3, 1e3), after=st.floats(-1e3, 1e3))
def test_each_weight_lies_between_before_and_after(
    tmp_path_factory: pytest.TempPathFactory, kept: float, before: float, after: float
) -> None:
    root = tmp_path_factory.mktemp("average")
    start = checkpoint(root / "start", w=torch.tensor([before]), n=torch.tensor([1]))
    trained = checkpoint(root / "trained", w=torch.tensor([after]), n=torch.tensor([2]))
    average(start, trained, kept)
    found = load_file(trained / WEIGHTS_FILE)
    assert found["w"].item() == pytest.approx(kept * before + (1 - kept) * after, rel=1e-5, abs=1e-3)
    assert found["n"].item() == 2  # counters are no weights
    assert load_file(start / WEIGHTS_FILE)["w"].item() == torch.tensor(before).item()
    assert sorted(p.name for p in trained.iterdir()) == [WEIGHTS_FILE]


def test_a_policy_of_another_shape_is_not_averaged_and_stays_as_it_is(tmp_path: Path) -> None:
    trained = checkpoint(tmp_path / "trained", w=torch.ones(2))
    for other, words in (
        (checkpoint(tmp_path / "a", w=torch.ones(3)), r"w is \(2,\), was \(3,\)"),
        (checkpoint(tmp_path / "b", v=torch.ones(2)), r"only one of them has \['v', 'w'\]"),
    ):
        with pytest.raises(StageError, match=words):
            average(other, trained, 0.5)
        assert torch.equal(load_file(trained / WEIGHTS_FILE)["w"], torch.ones(2))


def test_low_precision_weights_keep_their_type(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "start", w=torch.zeros(4, dtype=torch.float32))
    trained = checkpoint(tmp_path / "trained", w=torch.ones(4, dtype=torch.bfloat16))
    average(start, trained, 0.25)
    found = load_file(trained / WEIGHTS_FILE)["w"]
    assert found.dtype is torch.bfloat16
    assert torch.allclose(found.float(), torch.full((4,), 0.75))
