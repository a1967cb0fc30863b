"""What no policy may be trained on, and the check that none was.

The *yardstick* is frozen: a file in the repository that names scenes and episodes for evaluation alone, and
the share of all episodes that is held out. Which episodes these are follows from their ids, so every turn
agrees on them and nothing need be remembered. What is kept beyond that, so that no kind of failure goes
without, is remembered: a dataset version carries what it was made of and what was ever kept (``SOURCES``),
both by hash, and the checkpoint hands it on to the next turn. Training compares both with its frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from flywheel.dataset.frames import ACTION, STATE
from flywheel.errors import ConfigError, StageError
from flywheel.schema import Manifest, Strict

SOURCES = "sources.json"  # in a dataset's directory; lerobot reads meta/, data/ and videos/ alone
_DRAW = b"flywheel held out 1\n"  # changing it would release what earlier turns held out

Seed = Annotated[int, Field(ge=0)]


class Scenes(Strict):
    """Scenes of the twin by their seeds, the last one included; ``shift`` "" means any."""

    shift: str = ""
    first: Seed
    last: Seed


class Yardstick(Strict):
    """``yardstick.json``: changing it starts a new yardstick, and figures before and after do not compare."""

    schema_version: Literal[1] = 1
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scenes: tuple[Scenes, ...] = ()
    episodes: tuple[str, ...] = ()  # by episode_id or by content_sha256

    @classmethod
    def load(cls, path: Path) -> Yardstick:
        """Read the file; ``ConfigError`` names the key and what is wrong."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read: {e.strerror or e}") from None
        except ValidationError as e:
            first = e.errors()[0]
            key = ".".join(str(p) for p in first["loc"]) or "document"
            raise ConfigError(f"{path}: {key} = {first['input']!r}: {first['msg']}") from None

    def holds_out(self, episode_id: str) -> bool:
        """Whether an episode is in the held-out share: the same answer in every turn, on every machine.

        A larger fraction holds out all that a smaller one does.
        """
        return drawn(episode_id) < self.held_out_fraction

    def keeps(self, episode_id: str, content_sha256: str) -> bool:
        """Whether an episode is kept as far as its id and content tell; ``names`` knows its scene too."""
        return self.holds_out(episode_id) or not {episode_id, content_sha256}.isdisjoint(self.episodes)

    def names(self, m: Manifest, content_sha256: str) -> bool:
        """Whether an episode is one of the yardstick's, by id, by content or by the scene it happened in."""
        if m.episode_id in self.episodes or content_sha256 in self.episodes:
            return True
        if m.seed is None:
            return False
        return any(s.shift in ("", m.shift) and s.first <= m.seed <= s.last for s in self.scenes)


def drawn(episode_id: str) -> float:
    """0..1, uniform over ids, the same for ever: the least are held out."""
    return int.from_bytes(hashlib.sha256(_DRAW + episode_id.encode()).digest()[:8]) / 2.0**64


class Source(Strict):
    """One recorded episode: the sha256 over its tables, and that of each stretch that could be used."""

    episode_id: str
    content_sha256: str
    stretches: tuple[str, ...]


class Sources(Strict):
    """``sources.json`` of a dataset or a checkpoint: what it was made of, and what was kept for evaluation,
    then and in the turns before.
    """

    schema_version: Literal[1] = 1
    used: tuple[Source, ...]
    kept: tuple[Source, ...]


def stretch_sha256(state: NDArray[Any], action: NDArray[Any]) -> str:
    """What names the frames of one stretch, in an episode and in a dataset alike.

    Over state ``[N, S]`` and action ``[N, A]``, float32, little-endian, in order; not over pictures (a
    dataset holds them as PNG) nor times (whoever replays a recording makes new ones).
    """
    digest = hashlib.sha256(f"{state.shape} {action.shape}\n".encode())
    for part in (state, action):
        digest.update(np.ascontiguousarray(part, dtype="<f4").tobytes())
    return digest.hexdigest()


def read_sources(root: Path) -> Sources | None:
    """What a dataset or a checkpoint says of its sources; None where it says nothing (an older one)."""
    path = root / SOURCES
    if not path.exists():
        return None
    try:
        return Sources.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as e:
        raise StageError(f"{path}: cannot be read; curate again: {e}") from None


def refuse_kept(datasets: Sequence[Path], yardstick: Yardstick | None = None) -> int:
    """Check datasets that are to be trained on together; returns the number of episodes kept from them.

    Raises ``StageError`` where one of them holds what any of them keeps for evaluation: an episode by its id
    or content, or the frames of one whatever they are listed as. So what a later turn holds out is not
    trained on by way of an earlier turn's dataset, nor the other way round. With ``yardstick``, also where
    one lists what that keeps today: an earlier dataset may be older than the yardstick.
    """
    sources = {d: s for d in datasets if (s := read_sources(d)) is not None}
    if yardstick is not None:
        for root, s in sources.items():
            for u in s.used:
                if yardstick.keeps(u.episode_id, u.content_sha256):
                    _refuse(root, "lists", u)
    kept = [k for s in sources.values() for k in s.kept]
    if not kept:
        return 0
    ids = {k.episode_id: k for k in kept}
    contents = {k.content_sha256: k for k in kept}
    stretches = {h: k for k in kept for h in k.stretches}
    for root, s in sources.items():
        for u in s.used:
            _refuse(root, f"lists {u.episode_id}", ids.get(u.episode_id) or contents.get(u.content_sha256))
    for root in datasets:
        for index, digest in enumerate(_stretches(root)):
            _refuse(root, f"episode {index} has the frames of", stretches.get(digest))
    return len(ids)


def _refuse(root: Path, what: str, kept: Source | None) -> None:
    if kept is not None:
        raise StageError(
            f"{root}: {what} {kept.episode_id}, which is kept for evaluation (content "
            f"{kept.content_sha256[:12]}); a policy trained on it could not be judged by it. Curate again "
            "with the yardstick of this repository; a dataset of an earlier turn is left out with fewer "
            "train.earlier_turns"
        )


def _stretches(root: Path) -> Iterable[str]:
    """``stretch_sha256`` of each episode of a dataset, in order of its rows."""
    for path in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(path, columns=["episode_index", STATE, ACTION])
        index = table["episode_index"].to_numpy()
        columns: Mapping[str, NDArray[Any]] = {
            k: np.stack(table[k].to_numpy()) if len(table) else np.empty((0, 0)) for k in (STATE, ACTION)
        }
        edges = [0, *(np.flatnonzero(np.diff(index)) + 1).tolist(), len(index)]
        for a, b in pairwise(edges):
            yield stretch_sha256(columns[STATE][a:b], columns[ACTION][a:b])
