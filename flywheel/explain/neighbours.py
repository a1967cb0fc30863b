"""The episodes that are most like one: to the policy's own eye, up to the moment at which each failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flywheel import episode
from flywheel.curate.embed import Encoder
from flywheel.episode import Episode, as_array
from flywheel.errors import BundleError, EpisodeError
from flywheel.schema import NO_FAULT, Outcome, TriggerKind

VIEWS = 4  # of the policy's part, evenly spread, the first and the last included
SHOWN = 3  # of each sort

Features = NDArray[np.float64]


@dataclass(frozen=True)
class Neighbour:
    """One episode that is like the one explained. ``distance``: rms difference of the features, no unit."""

    episode_id: str
    distance: float
    outcome: Outcome
    corrected: bool  # by the operator, who succeeded
    task: str
    robot: str
    directory: Path


@dataclass(frozen=True)
class Neighbours:
    """``compared``: how many there were to choose from; ``why``: why there is nothing, "" where there is."""

    compared: int
    successes: tuple[Neighbour, ...]
    failures: tuple[Neighbour, ...]
    by: str  # "policy <digest>"
    why: str = ""


def nearest(e: Episode, others: Iterable[Path], encoder: Encoder, shown: int = SHOWN) -> Neighbours:
    """The nearest successful and failed episodes of the same task among ``others`` (episode directories).

    What cannot be read or seen by this policy is passed over.
    """
    by = f"policy {encoder.digest[:12]}"
    mine = views_of(e, encoder)
    if mine is None:
        return Neighbours(0, (), (), by, "the policy cannot see this episode's pictures")
    found = []
    for directory in sorted(others):
        try:
            manifest = episode.read_manifest(directory)
            if manifest.task != e.manifest.task or manifest.episode_id == e.manifest.episode_id:
                continue
            if any(p.fatal for p in episode.verify(directory)):
                continue
            features = views_of(episode.read(directory), encoder)
        except EpisodeError:
            continue
        if features is not None:
            found.append(
                Neighbour(
                    manifest.episode_id,
                    float(np.sqrt(np.mean((features - mine) ** 2))),
                    manifest.outcome,
                    manifest.operator_outcome is Outcome.SUCCESS,
                    manifest.task,
                    manifest.robot,
                    directory,
                )
            )
    found.sort(key=lambda n: (n.distance, n.episode_id))
    return Neighbours(
        len(found),
        tuple(n for n in found if n.outcome is Outcome.SUCCESS)[:shown],
        tuple(n for n in found if n.outcome is not Outcome.SUCCESS)[:shown],
        by,
        "" if found else "there is no other episode of this task to compare with",
    )


def failed_ns(e: Episode) -> int:
    """The first fault, or where the operator took over, or the end: whichever came first."""
    t, operator = as_array(e.frames, "t_ns"), as_array(e.frames, "intervention").astype(bool)
    handover = int(t[np.argmax(operator)]) if operator.any() else e.manifest.window_ns[1]
    none = NO_FAULT | {TriggerKind.INTERVENTION}
    return min([handover, *(x.t_ns for x in e.manifest.triggers if x.kind not in none)])


def views_of(e: Episode, encoder: Encoder) -> Features | None:
    """Features ``[VIEWS, D]`` of the policy's part; None where the policy cannot see it."""
    t = as_array(e.frames, "t_ns")
    mine = np.flatnonzero((t <= failed_ns(e)) & ~as_array(e.frames, "intervention").astype(bool))
    if not len(mine):
        return None
    rows = mine[np.linspace(0, len(mine) - 1, VIEWS).round().astype(int)]
    try:
        views = {c: _pictures(e, c, rows) for c in encoder.bundle.cameras if c in e.manifest.cameras}
        shapes: Mapping[str, tuple[int, ...]] = {c: v.shape[1:] for c, v in views.items()}
        if encoder.misfit(shapes, e.manifest.state_dim):
            return None
        states = as_array(e.frames, "state")[rows].astype(np.float32)
        features = encoder.features(views, states, e.manifest.task).astype(np.float64)
    except (BundleError, ValueError):
        return None
    return features if np.isfinite(features).all() else None


def _pictures(e: Episode, camera: str, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    import simplejpeg

    column = e.frames.column(f"image.{camera}")
    return np.stack([simplejpeg.decode_jpeg(column[int(r)].as_py(), colorspace="RGB") for r in rows])
