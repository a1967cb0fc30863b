"""What only shows when episodes are held against each other.

* ``repeated``: the same movement with the same pictures under another name. Changes that a copy may carry
  (noise, another exposure or JPEG quality, a cut at either end, other times, seeds and names) leave its
  fingerprint where it was: the joints and the pictures around the moment of the grasp. Candidate pairs come
  from a k-d tree (Bentley 1975, CACM 18:509–517), so the cost is O(n log n) where repeats are few.
* ``image_motion``: pictures that change at other times than the arm moves, where those of the others change
  with it: of another episode, or of another camera. How closely they do depends on the scene, so the bar is
  the others' median less so many median deviations.
* ``misplaced``: a success that let go of its object far from where the others did, if these agree on a place
  (median and median distance, Rousseeuw and Croux 1993, JASA 88:1273–1283).
* ``other_object``: what was grasped looks like what is grasped under another instruction: its nearest
  neighbours all bear that one (edited nearest neighbours, Wilson 1972, IEEE SMC 2:408–421).

The outcome depends on the set of episodes alone, not on their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flywheel.config import CheckSettings
from flywheel.curate.checks import Fault, Floats, Found, Signals, correlation, last_release
from flywheel.curate.pictures import changes

if TYPE_CHECKING:
    from flywheel.curate.examine import Candidate

AROUND_S = np.linspace(-0.8, 0.8, 17)  # of the grasp, where the joints are compared
LOOKS = (-6, -3, 0)  # frames before the grasp, where pictures are
NEIGHBOURS = 7
MAD_MIN = 0.06
AGREE_MIN = 12  # episodes that must agree before one is told that it does not


@dataclass(frozen=True)
class Fingerprint:
    """What an episode is known by. Its moment is the first grasp of the usable rows, else their middle."""

    joints: Floats  # [17, J] rad at AROUND_S
    looks: Floats  # [3, 8, 8] grey thumbnails at LOOKS, mean 0 and deviation 1
    colours: Floats  # [C] what was before the tool at the grasp, as shares of colour
    seen_motion: float  # correlation of the change of pictures with the motion of the joints
    let_go: Floats | None  # [pose_dims] where the last object was let go of

    @classmethod
    def of(
        cls,
        s: Signals,
        rows: NDArray[np.int64],
        images: NDArray[np.uint8],
        small: Floats,
        settings: CheckSettings,
    ) -> Fingerprint:
        """From the usable ``rows`` of the frames, one camera's ``images [len(rows), H, W, 3]`` and their
        thumbnails ``small [len(rows), 8, 8]``."""
        first, last = int(s.tick[rows[0]]), int(s.tick[rows[-1]])
        taken = np.flatnonzero(~s.held[first:last] & s.held[first + 1 : last + 1]) + 1 + first
        moment = int(taken[0]) if len(taken) else (first + last) // 2
        t = (s.t_ns - s.t_ns[moment]) / 1e9
        at = np.clip(np.searchsorted(t, AROUND_S), 0, len(t) - 1)
        frame = int(np.clip(np.searchsorted(s.tick[rows], moment) - 1, 0, len(rows) - 1))
        looks = small[np.clip(frame + np.array(LOOKS), 0, len(rows) - 1)]
        looks = looks - looks.mean(axis=(1, 2), keepdims=True)
        looks /= np.maximum(looks.std(axis=(1, 2), keepdims=True), 1e-3)
        release = last_release(s)
        motion = np.linalg.norm(np.diff(s.frame_q[rows], axis=0), axis=1)
        return cls(
            joints=s.q[at],
            looks=looks,
            colours=colours(images[max(frame - 3, 0) : frame + 1]),
            seen_motion=correlation(changes(small), motion),
            let_go=None
            if release is None
            else s.state[np.clip(np.searchsorted(s.tick, release), 0, len(s.tick) - 1), : settings.pose_dims],
        )


def colours(images: NDArray[np.uint8]) -> Floats:
    """Shares of red and green in the inner half of images ``[N, H, W, 3]``, on a grid of 4 × 4: ``[32]``."""
    h, w = images.shape[1:3]
    inner = images[:, h // 4 : h - h // 4, w // 4 : w - w // 4].astype(np.float64).mean(axis=0)
    if min(inner.shape[:2]) < 4:
        inner = np.repeat(np.repeat(inner, 4, axis=0), 4, axis=1)
    rows = np.array_split(inner, 4)
    grid = np.array([[b.mean(axis=(0, 1)) for b in np.array_split(r, 4, axis=1)] for r in rows])
    return np.asarray((grid / np.maximum(grid.sum(axis=2, keepdims=True), 1.0))[:, :, :2].reshape(-1))


def check_together(candidates: Sequence[Candidate], settings: CheckSettings) -> None:
    """Quarantine what contradicts the other candidates; those that are decided already have no say."""
    pool = sorted((c for c in candidates if not c.reason and c.mark is not None), key=_name)
    shapes: dict[Any, list[Candidate]] = {}
    for c in pool:
        shapes.setdefault((c.shape, c.mark and c.mark.joints.shape), []).append(c)
    for group in shapes.values():
        _other_objects(group, settings)
        _image_motion(group, settings)
        _misplaced(group, settings)
        _repeated([c for c in group if not c.reason], settings)


def _name(c: Candidate) -> tuple[str, bool, str]:
    return c.episode_id, c.directory.name != c.episode_id, c.directory.name


def _quarantine(c: Candidate, found: Found) -> None:
    c.decide(False, f"quarantine:{found.fault.value}", str(found))


def _marks(group: Sequence[Candidate]) -> list[Fingerprint]:
    return [c.mark for c in group if c.mark is not None]


def _repeated(group: Sequence[Candidate], settings: CheckSettings) -> None:
    from scipy.spatial import cKDTree

    if len(group) < 2:
        return
    marks = _marks(group)
    joints = np.stack([m.joints.reshape(-1) for m in marks])
    looks = np.stack([m.looks.reshape(-1) for m in marks])
    radius = settings.repeat_rad * np.sqrt(joints.shape[1])
    pairs = cKDTree(joints).query_pairs(radius, output_type="ndarray")
    off = np.sqrt(((looks[pairs[:, 0]] - looks[pairs[:, 1]]) ** 2).mean(axis=1))
    for a, b in sorted(pairs[off < settings.repeat_look].tolist()):
        first, again = group[a], group[b]
        if first.reason or again.reason or first.episode_id == again.episode_id:
            continue
        if first.content_sha256 == again.content_sha256:
            continue  # a plain copy, and told as one
        rms = float(np.linalg.norm(joints[a] - joints[b]) / np.sqrt(joints.shape[1]))
        text = f"the movement (to {rms:.4f} rad) and the pictures of {first.episode_id}, under another name"
        _quarantine(again, Found(Fault.REPEATED, text))


def _image_motion(group: Sequence[Candidate], settings: CheckSettings) -> None:
    places: dict[tuple[str, str], list[tuple[Candidate, float]]] = {}
    for c in group:
        if not c.reason and c.mark and c.manifest:
            places.setdefault((c.manifest.site, c.manifest.shift), []).append((c, c.mark.seen_motion))
    for said in places.values():
        if len(said) < AGREE_MIN:
            continue
        fits = np.array([f for _, f in said])
        usual = float(np.median(fits))
        mad = max(float(np.median(np.abs(fits - usual))), MAD_MIN)
        for c, fit in said:
            if fit < usual - settings.image_motion_mads * mad:
                text = f"pictures change when the arm rests: correlation {fit:.2f}, usual {usual:.2f}"
                _quarantine(c, Found(Fault.IMAGE_MOTION, text))


def _misplaced(group: Sequence[Candidate], settings: CheckSettings) -> None:
    said = [(c, c.mark.let_go) for c in group if not c.reason and c.mark and c.mark.let_go is not None]
    if len(said) < AGREE_MIN or not settings.success_lets_go:
        return
    places = np.stack([p for _, p in said])
    distance = np.linalg.norm(places - np.median(places, axis=0), axis=1)
    usual = float(np.median(distance))
    far = distance > max(settings.misplaced_m, 6.0 * usual)
    for (c, _), d in zip([said[i] for i in np.flatnonzero(far)], distance[far], strict=True):
        text = f"a success that let go {d:.2f} m from where the others do (to within {usual:.3f} m)"
        _quarantine(c, Found(Fault.MISPLACED, text))


def _other_objects(group: Sequence[Candidate], settings: CheckSettings) -> None:
    from scipy.spatial import cKDTree

    if len(group) < AGREE_MIN or not settings.neighbours_agree:
        return
    tasks = np.array([c.manifest.task if c.manifest else "" for c in group])
    seen = np.stack([m.colours for m in _marks(group)])
    _, near = cKDTree(seen).query(seen.tolist(), k=min(NEIGHBOURS + 1, len(group)))
    for i, c in enumerate(group):
        others = tasks[[k for k in near[i] if k != i][:NEIGHBOURS]]
        names, counts = np.unique(others, return_counts=True)
        most = int(np.argmax(counts))
        if names[most] != tasks[i] and counts[most] >= settings.neighbours_agree:
            text = f"{counts[most]} of {len(others)} that grasped what looks alike did so for {names[most]!r}"
            _quarantine(c, Found(Fault.OTHER_OBJECT, text))
