"""Failures of one kind: same task, same mode, same phase, and alike in the way and to the policy's eye.

Average linkage within each task, mode and phase, cut at ``cluster_distance`` (Sokal and Michener 1958, by
scipy). The name of a cluster outlives the turn: a dataset version carries an example of each (its medoid, as
recorded), train hands the file on with the checkpoint, and the next turn looks at the old examples with its
own policy before it names its clusters. So names hold although every turn has another encoder.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from flywheel.curate.distances import Scale, between, draw
from flywheel.curate.embed import Encoder
from flywheel.curate.examine import DESCRIPTOR_IMAGES, Candidate, pictures
from flywheel.curate.pictures import grey, thumbnails
from flywheel.errors import BundleError, StageError
from flywheel.schema import Strict

CLUSTERS = "clusters.json"  # in a dataset's directory and in a checkpoint's
MAX_LINKED = 2000  # of a task, mode and phase; linkage takes the square of it in memory
MAX_EXAMPLES = 64

Key = tuple[str, str, str]  # task, failure mode, phase


class Example(Strict):
    """A cluster's medoid, as recorded: enough to be looked at with any later encoder."""

    name: str
    task: str
    failure_mode: str
    phase: str
    episode_id: str
    path: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)]
    states: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)]
    views: Mapping[str, tuple[str, ...]]  # JPEGs in base64, by camera

    @property
    def key(self) -> Key:
        """What it can be compared with."""
        return self.task, self.failure_mode, self.phase


class Examples(Strict):
    """``clusters.json``. ``last``: the greatest number that a name of this mode and phase has had."""

    schema_version: Literal[1] = 1
    last: Mapping[str, int] = {}
    clusters: tuple[Example, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Of an earlier turn; none where there is no such file. ``StageError`` where it is damaged."""
        try:
            return cls.model_validate_json(path.read_bytes()) if path.exists() else cls()
        except (OSError, ValidationError) as e:
            raise StageError(f"{path}: cannot be read; remove it to name clusters anew: {e}") from None


@dataclass(frozen=True)
class _Seen:
    """An example of an earlier turn, as the present policy sees it."""

    name: str
    path: NDArray[np.float64]
    look: NDArray[np.float64]
    features: NDArray[np.float64] | None
    scene: tuple[str, int] | None = None


def cluster(
    pool: Sequence[Candidate],
    scale: Scale,
    radius: float,
    earlier: Examples | None = None,
    encoder: Encoder | None = None,
) -> Examples:
    """Set ``cluster`` of every candidate of ``pool`` and return the examples for the next turn.

    The outcome does not depend on the order of ``pool``. Clusters that this turn did not meet keep their
    names: their examples are handed on, the ``MAX_EXAMPLES`` that were met last.
    """
    earlier = earlier or Examples()
    keys: dict[Key, list[Candidate]] = {}
    for c in sorted(pool, key=lambda c: (c.episode_id, c.directory.name)):
        keys.setdefault((c.manifest.task if c.manifest else "", c.failure_mode, c.phase), []).append(c)
    last = dict(earlier.last)
    met: list[Example] = []
    for key in sorted(keys):
        groups = _linked(keys[key], scale, radius)
        medoids = [_medoid(g, scale) for g in groups]
        same = [e for e in earlier.clusters if e.key == key]
        old = _look_again(same, medoids[0], scale, encoder)
        names = _matched(medoids, old, scale, radius)
        for i in sorted(range(len(groups)), key=lambda i: (-len(groups[i]), medoids[i].episode_id)):
            name = names.get(i)
            if name is None:
                stem = f"{key[1]}-{key[2]}"
                last[stem] = last.get(stem, 0) + 1
                name = f"{stem}-{last[stem]:02d}"
            for c in groups[i]:
                c.cluster = name
            met.append(_example(name, key, medoids[i]))
    met.sort(key=lambda e: e.name)
    names_met = {e.name for e in met}
    kept = [e for e in earlier.clusters if e.name not in names_met]
    return Examples(last=last, clusters=(*met, *kept)[:MAX_EXAMPLES])


def _linked(members: Sequence[Candidate], scale: Scale, radius: float) -> list[list[Candidate]]:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    drawn = sorted(members, key=lambda c: draw(c.episode_id, "linked"))[:MAX_LINKED]
    drawn.sort(key=lambda c: (c.episode_id, c.directory.name))
    numbers = np.ones(1, int)
    if len(drawn) > 1:
        apart = between(drawn, drawn, scale)
        tree = linkage(squareform(np.minimum(apart, apart.T), checks=False), "average")
        numbers = fcluster(tree, radius, "distance")
    groups: dict[int, list[Candidate]] = {}
    for c, n in zip(drawn, numbers.tolist(), strict=True):
        groups.setdefault(n, []).append(c)
    found = list(groups.values())
    if rest := sorted(set(map(id, members)) - set(map(id, drawn))):
        others = [c for c in members if id(c) in set(rest)]
        nearest = between(others, [_medoid(g, scale) for g in found], scale).argmin(axis=1)
        for c, n in zip(others, nearest.tolist(), strict=True):
            found[n].append(c)
    return found


def _medoid(group: Sequence[Candidate], scale: Scale) -> Candidate:
    total = between(group, group, scale).sum(axis=1).round(9)  # a tie goes to the first by identity
    return group[int(total.argmin())]


def _matched(
    medoids: Sequence[Candidate], old: Sequence[_Seen], scale: Scale, radius: float
) -> dict[int, str]:
    """Names for medoids from the nearest earlier example within ``radius``, each name given once."""
    apart = between(medoids, old, scale)
    pairs = sorted(
        (round(float(apart[i, j]), 9), old[j].name, medoids[i].episode_id, i)
        for i in range(len(medoids))
        for j in range(len(old))
        if apart[i, j] < radius
    )
    names: dict[int, str] = {}
    for _, name, _, i in pairs:
        if i not in names and name not in names.values():
            names[i] = name
    return names


def _look_again(
    examples: Sequence[Example], like: Candidate, scale: Scale, encoder: Encoder | None
) -> list[_Seen]:
    """Examples through the present encoder; one that cannot be compared with ``like`` is passed over."""
    found = []
    for e in examples:
        try:
            shown = pictures({c: tuple(base64.b64decode(v) for v in e.views[c]) for c in like.views})
            states, path = np.asarray(e.states, np.float32), np.asarray(e.path, np.float64)
            features = None
            if scale.encoder and encoder is not None:
                if encoder.misfit({c: v.shape[1:] for c, v in shown.items()}, states.shape[1]):
                    continue
                features = encoder.features(shown, states, e.task).astype(np.float64)
        except (KeyError, IndexError, ValueError, BundleError):
            continue
        look = thumbnails(grey(next(iter(shown.values()))[-DESCRIPTOR_IMAGES:]))
        if path.shape == like.path.shape and look.shape == like.look.shape:
            found.append(_Seen(e.name, path, look, features))
    return found


def _example(name: str, key: Key, c: Candidate) -> Example:
    task, mode, phase = key
    return Example(
        name=name,
        task=task,
        failure_mode=mode,
        phase=phase,
        episode_id=c.episode_id,
        path=tuple(map(tuple, c.path.tolist())),
        states=tuple(map(tuple, c.view_states.tolist())),
        views={k: tuple(base64.b64encode(v).decode() for v in vs) for k, vs in c.views.items()},
    )
