"""What the pictures of an attempt are like: light, sharpness, life, and how new they are to the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from flywheel.episode import Episode, as_array
from flywheel.errors import BundleError
from flywheel.schema import Bundle

VIEWS = 4  # of the policy's part that the encoder looks at
STILL_FRAMES = 5  # identical pictures in a row, while the state changes, are a frozen camera
MOVED = 1e-3  # of the state between two frames, in its own units

Image = NDArray[np.uint8]
Features = NDArray[np.float64]


class Encoder(Protocol):
    """What a policy makes of what it sees (``curate.embed.Encoder``)."""

    bundle: Bundle

    def misfit(self, cameras: Mapping[str, tuple[int, ...]], state_dim: int) -> str:
        """Why such views cannot be encoded; "" if they can."""

    def features(
        self, views: Mapping[str, Image], states: NDArray[np.float32], instruction: str
    ) -> NDArray[np.float32]:
        """``[K, D]`` of views ``[K, H, W, 3]`` by camera with their raw states ``[K, S]``."""


@dataclass(frozen=True)
class Pictures:
    """Of the policy's part of an attempt."""

    brightness: float  # mean, 0..1
    sharpness: float  # variance of the Laplacian of the grey picture, 0..1 scale
    frozen: str  # the camera that stood still while the tool moved; "" for none
    novelty: float | None  # share of the training views that are nearer to their own kind; None: not measured


class Familiar:
    """What a policy was trained on, as its own encoder sees it.

    Novelty is a conformal rank (Vovk et al. 2005, *Algorithmic Learning in a Random World*, ch. 2, with the
    distance to the nearest neighbour as the measure of strangeness): the share of the training views that lie
    nearer to a view of another run than what was seen lies to any.
    """

    def __init__(self, encoder: Encoder, features: Features, runs: NDArray[np.int64]) -> None:
        if len(np.unique(runs)) < 2:
            raise ValueError(f"{len(np.unique(runs))} run: it takes two to say what is usual")
        self.encoder = encoder
        self._mean = features.mean(axis=0)
        self._scale = features.std(axis=0) + 1e-6
        self._features = self._normalised(features)
        other = runs[:, None] != runs[None, :]
        apart = np.where(other, _distances(self._features, self._features), np.inf)
        self._usual = np.sort(apart.min(axis=1))

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        runs: Sequence[tuple[Mapping[str, Image], NDArray[np.float32], str]],
    ) -> Self:
        """From views by camera, their states and the instruction, for each training run."""
        found = [encoder.features(*run).astype(np.float64) for run in runs]
        numbers = np.repeat(np.arange(len(found)), [len(f) for f in found])
        return cls(encoder, np.concatenate(found), numbers)

    def novelty(self, features: Features) -> float:
        """0..1 of views ``[K, D]``: the median over them."""
        nearest = _distances(self._normalised(features), self._features).min(axis=1)
        ranks = np.searchsorted(self._usual, nearest) / len(self._usual)
        return float(np.median(ranks))

    def _normalised(self, features: Features) -> Features:
        found: Features = (features - self._mean) / self._scale
        return found


def look(e: Episode, until_ns: int, familiar: Familiar | None = None) -> Pictures | None:
    """What the policy saw up to ``until_ns``; None where there is no picture that decodes."""
    t = as_array(e.frames, "t_ns")
    mine = np.flatnonzero((t <= until_ns) & ~as_array(e.frames, "intervention").astype(bool))
    if not len(mine) or not e.manifest.cameras:
        return None
    rows = mine[np.unique(np.linspace(0, len(mine) - 1, VIEWS).round().astype(int))]
    camera = e.manifest.cameras[0]
    images = _decoded(e, camera, rows)
    if images is None:
        return None
    grey = images.astype(np.float64).mean(axis=3) / 255.0
    return Pictures(
        brightness=round(float(grey.mean()), 6),
        sharpness=round(float(np.mean([_laplacian(g).var() for g in grey])), 9),
        frozen=_frozen(e, mine),
        novelty=None if familiar is None else _novelty(e, rows, familiar),
    )


def _novelty(e: Episode, rows: NDArray[np.int64], familiar: Familiar) -> float | None:
    encoder = familiar.encoder
    views = {c: _decoded(e, c, rows) for c in encoder.bundle.cameras if c in e.manifest.cameras}
    seen = {c: v for c, v in views.items() if v is not None}
    if encoder.misfit({c: v.shape[1:] for c, v in seen.items()}, e.manifest.state_dim):
        return None
    state = as_array(e.frames, "state")[rows].astype(np.float32)
    try:
        features = encoder.features(seen, state, e.manifest.task).astype(np.float64)
    except BundleError:
        return None
    return round(familiar.novelty(features), 6) if np.isfinite(features).all() else None


def _frozen(e: Episode, rows: NDArray[np.int64]) -> str:
    """A camera with the same bytes in ``STILL_FRAMES`` frames in a row while the tool went on."""
    moved = np.abs(np.diff(as_array(e.frames, "state")[rows], axis=0)).max(axis=1, initial=0.0) > MOVED
    for camera in e.manifest.cameras[:1]:  # a fixed camera may rightly see nothing new
        jpegs = e.frames.column(f"image.{camera}").take(rows).to_pylist()
        run = 0
        for (a, b), went in zip(pairwise(jpegs), moved, strict=True):
            run = run + 1 if a == b and went else 0
            if run >= STILL_FRAMES:
                return camera
    return ""


def _decoded(e: Episode, camera: str, rows: NDArray[np.int64]) -> Image | None:
    import simplejpeg

    column = e.frames.column(f"image.{camera}")
    try:
        found = [simplejpeg.decode_jpeg(column[int(r)].as_py(), colorspace="RGB") for r in rows]
        return np.stack(found)
    except ValueError:
        return None


def _laplacian(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Five-point Laplacian of ``[H, W]``, borders left out."""
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    inner: NDArray[np.float64] = around - 4.0 * grey[1:-1, 1:-1]
    return inner


def _distances(a: Features, b: Features) -> Features:
    from scipy.spatial.distance import cdist

    found: Features = cdist(a, b)
    return found
