"""What earlier turns were trained on, as a turn finds it: ``data/earlier`` in its workspace.

    earlier.json    Earlier: which turns' datasets, the newest first, and where their chain ends
    <sha256>/       each dataset version, by its content (``dataset_digest``)

A turn that knew new data and the lab alone would unlearn what the turns before it had taught; so what these
learned from is replayed beside both (``train.earlier_share``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from flywheel.dataset.frames import dataset_digest
from flywheel.errors import StageError
from flywheel.schema import Strict

EARLIER = "earlier.json"


class EarlierTurn(Strict):
    """One turn before this one: the policy that came of it, and the dataset version that it learned from."""

    turn: str
    policy: str  # bundle digest
    dataset: str  # sha256


class Earlier(Strict):
    """``earlier.json``. ``ended``: why nothing older is listed."""

    schema_version: Literal[1] = 1
    turns: tuple[EarlierTurn, ...] = ()  # newest first
    ended: str = ""


def read_earlier(root: Path) -> list[tuple[EarlierTurn, Path]]:
    """Turns and the directories of their datasets, newest first, each with the content of its name.

    Nothing if ``root`` does not exist. Raises ``StageError`` where a dataset is missing or is another.
    """
    if not root.exists():
        return []
    path = root / EARLIER
    try:
        listed = Earlier.model_validate_json(path.read_bytes()).turns
    except (OSError, ValidationError) as e:
        raise StageError(f"{path}: cannot be read: {e}") from None
    found = []
    for t in listed:
        directory = root / t.dataset
        if not directory.is_dir():
            raise StageError(
                f"{directory}: no such directory, though {path} lists it: fetch it from the store's "
                f"datasets/{t.dataset}/, or take {t.turn} out of the list"
            )
        if (digest := dataset_digest(directory)) != t.dataset:
            raise StageError(f"{directory}: holds {digest[:12]}, not the dataset of {t.turn}: fetch it again")
        found.append((t, directory))
    return found
