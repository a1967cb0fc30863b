"""Every turn with its figures: ``dvc exp show`` with the columns that matter here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flywheel.errors import StageError


class Experiment(NamedTuple):
    """One turn as DVC keeps it; what a turn that ended early did not make is None."""

    turn: str
    rev: str  # git revision: `dvc exp apply`, `git show`
    made: str  # ISO 8601
    candidates: int | None  # episodes
    taken: int | None
    quarantined: int | None
    steps: int | None  # of training
    loss: float | None
    policy: str | None  # digest of the bundle that came out
    replaces: str | None  # digest of the bundle that it is to replace
    verdict: str | None  # the gate's


def experiments(root: Path) -> list[Experiment]:
    """Of the checkout at ``root``, the newest first. Raises ``StageError`` with DVC's last words."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "exp", "show", "--all-commits", "--json"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise StageError(f"{root}: dvc exp show: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    found = {e.rev: e for e in _read(json.loads(done.stdout))}
    return sorted(found.values(), key=lambda e: e.made, reverse=True)


def _read(shown: list[dict[str, Any]]) -> Iterator[Experiment]:
    for commit in shown:
        for listed in commit.get("experiments") or ():
            for rev in listed.get("revs") or ():
                if (data := rev.get("data")) and rev.get("name"):
                    yield _experiment(rev["name"], data)


def _experiment(name: str, data: Mapping[str, Any]) -> Experiment:
    metrics = {file: found.get("data") or {} for file, found in (data.get("metrics") or {}).items()}
    curate, train, gate = (
        metrics.get(f"data/{file}.json", {}) for file in ("curated/curate", "metrics/train", "gate/gate")
    )
    return Experiment(
        turn=name,
        rev=data["rev"],
        made=data.get("timestamp") or "",
        candidates=curate.get("candidates"),
        taken=curate.get("taken"),
        quarantined=curate.get("quarantined"),
        steps=train.get("steps"),
        loss=train.get("loss"),
        policy=metrics.get("data/metrics/export.json", {}).get("digest"),
        replaces=gate.get("current_digest"),
        verdict=gate.get("verdict"),
    )
