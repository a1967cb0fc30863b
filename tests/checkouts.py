"""The checkout that rehearsals turn the wheel in, for the tests; and failures to turn it with."""

from __future__ import annotations

from pathlib import Path

from flywheel.edge.spool import Spool
from flywheel.rehearsal.checkouts import git, make_checkout
from flywheel.store import Store
from tests.samples import sealed

__all__ = ["fail_on_a_robot", "git", "make_checkout"]


def fail_on_a_robot(store: Store, tmp_path: Path, *seeds: int) -> list[str]:
    """An episode for each seed, uploaded as a robot does; their ids."""
    root = tmp_path / "spool"
    ids = [sealed(root / "episodes", seconds=0.1, seed=seed).name for seed in seeds]
    spool = Spool(root, store, 1 << 30)
    assert sorted(spool.upload_once(0).uploaded) == sorted(ids)
    return ids
