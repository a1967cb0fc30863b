"""What a policy's ancestors were trained on, kept in the store and found again by a turn that starts from it.

    datasets/<sha256>/…                 a dataset version by its content (``dataset_digest``)
    policies/<digest>.json              PolicyRecord: a policy's dataset, and what it started from

A turn replays what the turns before it on this chain were trained on (``train.earlier_share``), so that the
fleet does not unlearn last month's shift. A policy that was rolled back is on nobody's chain.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from flywheel import policies
from flywheel.dataset import dataset_digest
from flywheel.dataset.earlier import EARLIER, Earlier, EarlierTurn
from flywheel.errors import BundleError, IntegrityError, StageError
from flywheel.schema import sha256_file
from flywheel.store import Store


def publish(store: Store, root: Path) -> str:
    """Put a dataset into the store; its digest. A repeat writes the same."""
    digest = dataset_digest(root)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        store.put(f"{_prefix(digest)}{path.relative_to(root).as_posix()}", path, sha256_file(path))
    return digest


def ancestors(store: Store, digest: str, limit: int, base: str = "") -> Earlier:
    """The turns that led to the policy ``digest``, its own first, as many as ``limit``; ``base`` had none.

    The chain ends early where a record is gone or is of a version that kept no datasets, and says so.

    Raises:
        BundleError: a record contradicts itself, or leads back to where it came from.
        StageError: the store no longer holds a dataset that a record names.
    """
    turns: list[EarlierTurn] = []
    seen: set[str] = set()
    ended = ""
    while digest != base and not ended:
        if digest in seen:
            raise BundleError(
                f"policies/{digest}.json: its own ancestor; a policy cannot have started from itself"
            )
        seen.add(digest)
        if len(turns) >= limit:
            ended = f"train.earlier_turns = {limit}"
        elif (found := policies.find(store, digest)) is None:
            ended = f"policy {digest[:12]}: the store has no record of it"
        elif not found.dataset:
            ended = f"policy {digest[:12]}: {found.turn} kept no dataset, it ran an older version"
        else:
            if next(store.list(_prefix(found.dataset)), None) is None:
                raise StageError(
                    f"{_prefix(found.dataset)}: is not in the store any more, and {found.turn} made policy "
                    f"{digest[:12]} from it: put it back, or forget it on purpose with train.earlier_turns = "
                    f"{len(turns)}"
                )
            if all(t.dataset != found.dataset for t in turns):
                turns.append(EarlierTurn(turn=found.turn, policy=digest, dataset=found.dataset))
            digest = found.start
    return Earlier(turns=tuple(turns), ended=ended)


def fetch(store: Store, earlier: Earlier, into: Path) -> None:
    """Download the datasets and list them; those that are there already are kept, any others go.

    Raises ``IntegrityError`` for one that is not what its name says.
    """
    into.mkdir(parents=True, exist_ok=True)
    wanted = {t.dataset for t in earlier.turns}
    for found in into.iterdir():
        if found.is_dir() and not (found.name in wanted and dataset_digest(found) == found.name):
            shutil.rmtree(found)
    for t in earlier.turns:
        if not (into / t.dataset).exists():
            _download(store, t, into)
    (into / EARLIER).write_bytes(earlier.to_bytes())


def _download(store: Store, t: EarlierTurn, into: Path) -> None:
    fresh, prefix = into / f".{t.dataset}.part", _prefix(t.dataset)
    for info in store.list(prefix):
        name = PurePosixPath(info.key.removeprefix(prefix))
        if name.is_absolute() or ".." in name.parts:
            raise IntegrityError(f"{info.key}: a dataset may not have a file of that name")
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        store.get_file(info.key, fresh / name)
    if not fresh.exists() or (digest := dataset_digest(fresh)) != t.dataset:
        what = "nothing" if not fresh.exists() else digest[:12]
        shutil.rmtree(fresh, ignore_errors=True)
        raise IntegrityError(
            f"{prefix}: holds {what}, not the dataset that {t.turn} was trained on: restore it from a "
            f"backup, or from data/curated/dataset in the workspace of {t.turn}"
        )
    fresh.rename(into / t.dataset)


def _prefix(digest: str) -> str:
    return f"datasets/{digest}/"
