"""Turns are listed once each, the newest first, also those that ended early."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flywheel.errors import StageError
from flywheel.experiments import experiments


def shown(name: str, rev: str, made: str, **metrics: dict[str, Any]) -> dict[str, Any]:
    files = {f"data/{file.replace('__', '/')}.json": {"data": data} for file, data in metrics.items()}
    return {"name": name, "rev": rev, "data": {"rev": rev, "timestamp": made, "metrics": files}}


def answer(monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str = "") -> None:
    done = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr("flywheel.experiments.subprocess.run", lambda *_, **__: done)


def test_each_turn_is_listed_once_with_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shown(
        "turn-2", "b", "2026-01-02T00:00:00",
        curated__curate={"candidates": 112, "taken": 97, "quarantined": 3},
        metrics__train={"steps": 600, "loss": 0.02},
        metrics__export={"digest": "d" * 64},
        gate__gate={"current_digest": "c" * 64, "verdict": "promote"},
    )  # fmt: skip
    early = shown("turn-1", "a", "2026-01-01T00:00:00", curated__curate={"candidates": 5})
    nameless = {"rev": "x", "name": None, "data": None}
    commits = [
        {"rev": "workspace", "experiments": None},
        {"rev": "1", "experiments": [{"revs": [early]}, {"revs": [nameless]}]},
        {"rev": "2", "experiments": [{"revs": [whole]}, {"revs": [early]}]},
    ]
    answer(monkeypatch, 0, json.dumps(commits))
    two, one = experiments(tmp_path)
    assert two == (
        "turn-2", "b", "2026-01-02T00:00:00", 112, 97, 3, 600, 0.02, "d" * 64, "c" * 64, "promote"
    )  # fmt: skip
    assert (one.turn, one.candidates, one.policy, one.verdict) == ("turn-1", 5, None, None)


def test_what_dvc_complains_of_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 255, "", "ERROR: first\nERROR: you are not inside of a DVC repository\n")
    with pytest.raises(StageError, match="you are not inside of a DVC repository"):
        experiments(tmp_path)
