"""What the policy's actions depended on, at the moment of failure: occlusion sensitivity.

A patch of the picture is replaced by the picture's mean colour, and the policy is asked again with the same
noise; what its targets move by is the patch's weight (Zeiler and Fergus 2014, "Visualizing and Understanding
Convolutional Networks", section 4.2). This is a measured effect on what the robot would have done, not a look
at the network's own attention: a patch that covers nothing new for the policy shows nothing, two patches of
which either is enough show nothing, and a grey patch is itself something that the policy never saw.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel.edge.policy import ActionSource
from flywheel.episode import Episode, as_array
from flywheel.errors import BundleError, EpisodeError

PATCHES = 8  # along each side of the picture
METRES = 3  # the first axes of an action are the tool's position


@dataclass(frozen=True)
class Attention:
    """Of one frame. Effects are the largest move of a target within the executed part of the chunk, m."""

    policy: str  # digest of the bundle that was asked
    same_policy: bool  # it is the one that acted
    camera: str
    row: int
    t_ns: int
    effects: NDArray[np.float64]  # [PATCHES, PATCHES], of each patch
    whole_m: float  # of the whole picture's being covered
    state_m: float  # of a state 1 cm and as much of everything else away
    instruction_m: float  # of no instruction at all
    picture: NDArray[np.uint8]  # [H, W, 3]

    @property
    def focus(self) -> tuple[float, float]:
        """Centre of the effects, ``(x, y)`` in 0..1 of the picture, from its upper left corner."""
        total = self.effects.sum()
        if total <= 0:
            return 0.5, 0.5
        at = (np.arange(PATCHES) + 0.5) / PATCHES
        return float(self.effects.sum(axis=0) @ at / total), float(self.effects.sum(axis=1) @ at / total)

    @property
    def concentration(self) -> float:
        """Share of all effects that the strongest tenth of the patches has; a tenth if all are alike."""
        ordered = np.sort(self.effects.ravel())[::-1]
        total = ordered.sum()
        return float(ordered[: max(1, len(ordered) // 10)].sum() / total) if total > 0 else 0.0

    def png(self, side: int = 320) -> bytes:
        """The picture with the effects over it: the redder, the stronger."""
        from PIL import Image

        base = Image.fromarray(self.picture).resize((side, side), Image.Resampling.NEAREST)
        most = float(self.effects.max())
        scaled = self.effects / most if most > 0 else self.effects
        alpha = Image.fromarray((scaled * 170).astype(np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        base.paste(Image.new("RGB", (side, side), (230, 20, 20)), mask=alpha)
        out = io.BytesIO()
        base.save(out, "PNG")
        return out.getvalue()


def attend(e: Episode, policy: ActionSource, at_ns: int) -> Attention:
    """Occlude the policy's first camera in the last frame of its own up to ``at_ns``.

    Raises ``EpisodeError`` where there is no such frame, ``BundleError`` where the policy cannot see it.
    """
    b = policy.bundle
    t = as_array(e.frames, "t_ns")
    mine = np.flatnonzero((t <= at_ns) & ~as_array(e.frames, "intervention").astype(bool))
    if not len(mine):
        raise EpisodeError(f"{e.manifest.episode_id}: the policy has no frame up to the failure")
    if missing := [c for c in b.cameras if c not in e.manifest.cameras]:
        raise BundleError(f"policy {b.name!r} needs camera {missing[0]!r}; the episode has none")
    row = int(mine[-1])
    images = {c: _decoded(e, c, row) for c in b.cameras}
    state = as_array(e.frames, "state")[row].astype(np.float32)
    words = str(e.frames.column("instruction")[row].as_py())
    axes = METRES if b.action_space == "tool_position_suction" else len(b.action_names)

    def asked(seen: dict[str, NDArray[np.uint8]], at: NDArray[np.float32], said: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = policy.infer(seen, at, said).actions[: b.execute, :axes]
        return found

    plain = asked(images, state, words)

    def moved(seen: dict[str, NDArray[np.uint8]], at: Any = state, said: str = words) -> float:
        return float(np.linalg.norm(asked(seen, at, said) - plain, axis=1).max())

    camera = b.cameras[0]
    picture = images[camera]
    grey = picture.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    ys, xs = (np.linspace(0, n, PATCHES + 1).round().astype(int) for n in picture.shape[:2])
    effects = np.zeros((PATCHES, PATCHES))
    for i in range(PATCHES):
        for j in range(PATCHES):
            covered = picture.copy()
            covered[ys[i] : ys[i + 1], xs[j] : xs[j + 1]] = grey
            effects[i, j] = moved({**images, camera: covered})
    return Attention(
        policy=policy.digest,
        same_policy=policy.digest == e.frames.column("policy_digest")[row].as_py(),
        camera=camera,
        row=row,
        t_ns=int(t[row]),
        effects=effects,
        whole_m=moved({**images, camera: np.broadcast_to(grey, picture.shape).copy()}),
        state_m=moved(images, state + np.float32(0.01)),
        instruction_m=moved(images, state, ""),
        picture=picture,
    )


def _decoded(e: Episode, camera: str, row: int) -> NDArray[np.uint8]:
    import simplejpeg

    try:
        found: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            e.frames.column(f"image.{camera}")[row].as_py(), colorspace="RGB"
        )
    except ValueError as err:
        raise EpisodeError(f"{e.manifest.episode_id}: image.{camera} in row {row}: {err}") from None
    return found
