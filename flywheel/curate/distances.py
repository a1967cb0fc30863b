"""How different two episodes are: by the way that the tool took and by what the policy saw on it.

A distance is in metres of the way (rms over ``DESCRIPTOR_STEPS`` points of the state). What was seen is put
on the same scale: pictures that all moved by one pixel are ``PIXEL`` apart, whatever the encoder. Without an
encoder, the rms difference of thumbnails (0..1) is taken as it is. The larger of the two counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flywheel.curate.embed import Encoder
from flywheel.curate.examine import Candidate, pictures
from flywheel.errors import BundleError

PIXEL = 0.02
RESOLUTION_SAMPLES = 16  # episodes by which the encoder's resolution is measured

Matrix = NDArray[np.float64]


class Placed(Protocol):
    """What has a place among the episodes: a candidate, or an example of an earlier turn."""

    @property
    def path(self) -> NDArray[np.float64]: ...  # [steps, S]
    @property
    def look(self) -> NDArray[np.float64]: ...  # [3, 8, 8]
    @property
    def features(self) -> NDArray[np.float64] | None: ...  # [K, D]
    @property
    def scene(self) -> tuple[str, int] | None: ...  # where it is known to be the same


@dataclass(frozen=True)
class Scale:
    """By what episodes are compared. ``encoder``: digest of the bundle, "" for thumbnails and ``why``."""

    encoder: str = ""
    per_unit: float = 1.0  # of the features' rms difference
    why: str = "no policy was given"


def between(a: Sequence[Placed], b: Sequence[Placed], scale: Scale) -> Matrix:
    """Distances ``[len(a), len(b)]``. In the very same scene what was seen needs no comparing."""
    if not a or not b:
        return np.zeros((len(a), len(b)))
    far = _rms([x.path for x in a], [x.path for x in b])
    seen = scale.per_unit * _rms([_seen(x, scale) for x in a], [_seen(x, scale) for x in b])
    numbers: dict[tuple[str, int], int] = {}
    one, other = (
        np.array([unknown if x.scene is None else numbers.setdefault(x.scene, len(numbers)) for x in xs])
        for unknown, xs in ((-1, a), (-2, b))
    )
    larger: Matrix = np.where(one[:, None] == other[None, :], far, np.maximum(far, seen))
    return larger


def measure(pool: Sequence[Candidate], encoder: Encoder) -> Scale:
    """Give every candidate its features, all or none; where that cannot be, the scale says why.

    A candidate whose features are not finite is quarantined.
    """
    for c in pool:
        if why := encoder.misfit(c.view_shapes, c.view_states.shape[1]):
            return Scale(why=f"{c.episode_id}: {why}")
    try:
        for c in pool:
            found = encoder.features(pictures(c.views), c.view_states, _instruction(c))
            c.features = found.astype(np.float64)
            if not np.isfinite(c.features).all():
                c.decide(False, "quarantine:features", "the policy's encoder makes no finite features of it")
        sample = sorted((c for c in pool if not c.reason), key=lambda c: draw(c.episode_id, "resolution"))
        moves = [
            encoder.resolution(pictures(c.views), c.view_states, _instruction(c))
            for c in sample[:RESOLUTION_SAMPLES]
        ]
    except BundleError as e:
        return Scale(why=str(e))
    unit = float(np.median(moves)) if moves else 0.0
    if not unit > 0.0:
        return Scale(why="the encoder's features do not change when the pictures move")
    return Scale(encoder.digest, PIXEL / unit, "")


def draw(episode_id: str, purpose: str) -> bytes:
    """An order of episodes that nobody chose, the same for every order of the input."""
    return hashlib.sha256(f"{purpose}\n{episode_id}".encode()).digest()


def _instruction(c: Candidate) -> str:
    return c.manifest.task if c.manifest else ""


def _seen(x: Placed, scale: Scale) -> NDArray[np.float64]:
    if not scale.encoder:
        return x.look
    assert x.features is not None
    return x.features


def _rms(a: list[NDArray[np.float64]], b: list[NDArray[np.float64]]) -> Matrix:
    from scipy.spatial.distance import cdist

    one, other = (np.stack([x.reshape(-1) for x in xs]) for xs in (a, b))
    rms: Matrix = cdist(one, other) / np.sqrt(one.shape[1])
    return rms
