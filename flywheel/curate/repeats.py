"""What only shows when episodes are held against each other.

* ``repeated``: the same movement with the same pictures under another name. A copy may carry noise, another
  exposure or JPEG quality, other times, seeds and names, and may be a part of what it was made from. So short
  windows of the joints' way are sought among those of all the others (subsequence matching: Faloutsos,
  Ranganathan and Manolopoulos 1994, SIGMOD 23:419–429) in a k-d tree (Bentley 1975, CACM 18:509–517); what is
  found fixes by how many frames one is shifted against the other, and then all frames that both have are
  compared. The cost is O(n log n) in the frames.
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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flywheel.config import CheckSettings
from flywheel.curate import columns
from flywheel.curate.checks import Fault, Found, correlation
from flywheel.curate.signals import Floats, Signals

if TYPE_CHECKING:
    from flywheel.curate.examine import Candidate

WINDOW = 3  # frames of joints that are sought among the others
WINDOW_MOVES_RAD = 0.05  # less of a way says nothing: all start from one pose
QUERIES = 6  # windows of an episode that are sought, evenly spread over it
NEAREST = 24  # windows that are looked at for each
OVERLAP_FRAMES = 8  # that two must have in common, and half of the shorter one
GLARE = 0.9  # of white: what a longer exposure may have cut off
NEIGHBOURS = 7
COLOUR_BLOCKS = 4  # of each side
CHANGE_MIN, MOTION_MIN_RAD = 1e-3, 1e-2  # less is noise: of thumbnails, of the joints between two frames
MAD_MIN = 0.06
AGREE_MIN = 12  # episodes that must agree before one is told that it does not


@dataclass(frozen=True)
class Fingerprint:
    """What an episode is known by: its usable frames, and the moment of the first grasp in them (else their
    middle)."""

    joints: NDArray[np.float32]  # [N, J] rad
    looks: NDArray[np.uint8]  # [N, 8, 8] grey thumbnails
    colours: Floats  # [C] what was before the tool at the grasp, as shares of colour
    seen_motion: float  # correlation of the logarithms of the pictures' changes and the joints' motion
    let_go: Floats | None  # [pose_dims] where the last object was let go of

    @classmethod
    def of(
        cls,
        s: Signals,
        rows: NDArray[np.int64],
        before_tool: Callable[[NDArray[np.int64]], NDArray[np.uint8]],
        small: Floats,
        changes: Floats,
        motion: Floats,
        settings: CheckSettings,
    ) -> Fingerprint:
        """From the usable ``rows`` of the frames, thumbnails of one camera there ``small [len(rows), 8, 8]``,
        how much these and the joints (rad) change from row to row ``[len(rows) - 1]``, and ``before_tool``:
        the images of some rows ``[K, H, W, 3]``."""
        first, last = int(s.tick[rows[0]]), int(s.tick[rows[-1]])
        taken = np.flatnonzero(~s.held[first:last] & s.held[first + 1 : last + 1]) + 1 + first
        moment = int(taken[0]) if len(taken) else (first + last) // 2
        frame = int(np.clip(np.searchsorted(s.tick[rows], moment) - 1, 0, len(rows) - 1))
        release = s.last_release
        joints = s.frame_q[rows]
        return cls(
            joints=joints.astype(np.float32),
            looks=np.rint(small * 255.0).astype(np.uint8),
            colours=colours(before_tool(rows[max(frame - 3, 0) : frame + 1])),
            seen_motion=correlation(np.log(changes + CHANGE_MIN), np.log(motion + MOTION_MIN_RAD)),
            let_go=None
            if release is None
            else s.state[np.clip(np.searchsorted(s.tick, release), 0, len(s.tick) - 1), : settings.pose_dims],
        )


def colours(images: NDArray[np.uint8]) -> Floats:
    """Shares of red and green in the inner half of images ``[N, H, W, 3]``, on a grid of 4 × 4: ``[32]``."""
    return columns.colour_shares(images, COLOUR_BLOCKS).reshape(-1)


def check_together(candidates: Sequence[Candidate], settings: CheckSettings) -> None:
    """Quarantine what contradicts the other candidates; those that are decided already have no say."""
    pool = sorted((c for c in candidates if not c.reason and c.mark is not None), key=_name)
    shapes: dict[Any, list[Candidate]] = {}
    for c in pool:
        shapes.setdefault((c.shape, c.mark and c.mark.joints.shape[1]), []).append(c)
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
    """Of each set of repeats the first stays. Sought again among those that stay: of very many repeats of one
    not all are near each other's neighbours."""
    while True:
        group = [c for c in group if not c.reason]
        found = sorted(_pairs(group, settings))
        if not found:
            return
        for a, b, rms in found:
            first, again = group[a], group[b]
            if again.reason or first.reason:
                continue
            text = (
                f"the movement (to {rms:.4f} rad) and the pictures of {first.episode_id}, under another name"
            )
            _quarantine(again, Found(Fault.REPEATED, text))


def _pairs(group: Sequence[Candidate], settings: CheckSettings) -> Iterator[tuple[int, int, float]]:
    """Pairs of repeats by their places in the group, the earlier first, and how far their joints differ."""
    from scipy.spatial import cKDTree

    marks = _marks(group)
    moving = [_moving_windows(m.joints) for m in marks]
    if sum(map(len, moving)) < 2:
        return
    owner = np.repeat(np.arange(len(marks)), [len(x) for x in moving])
    start = np.concatenate(moving)
    windows = np.concatenate([_windows(m.joints)[x] for m, x in zip(marks, moving, strict=True)])
    ends = np.cumsum([len(x) for x in moving])
    spread = [
        np.unique(np.linspace(end - len(x), end - 1, QUERIES).round().astype(int))
        for x, end in zip(moving, ends.tolist(), strict=True)
        if len(x)
    ]
    asked = np.concatenate(spread)
    radius = settings.repeat_rad * np.sqrt(windows.shape[1])
    _, near = cKDTree(windows).query(
        windows[asked], k=min(NEAREST, len(windows)), distance_upper_bound=radius
    )
    found = near < len(windows)
    one, other = np.repeat(asked, found.sum(axis=1)), near[found]
    shifts = np.column_stack([owner[one], owner[other], start[other] - start[one]])
    swap = shifts[:, 0] > shifts[:, 1]
    shifts[swap] = shifts[swap][:, [1, 0, 2]] * [1, 1, -1]
    for a, b, by in np.unique(shifts[shifts[:, 0] != shifts[:, 1]], axis=0).tolist():
        if group[a].episode_id == group[b].episode_id or group[a].content_sha256 == group[b].content_sha256:
            continue  # a plain copy, and told as one
        rms = _same(marks[a], marks[b], by, settings)
        if rms is not None:
            yield a, b, rms


def _windows(joints: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[N - WINDOW + 1, WINDOW · J]``: the joints of each frame and of those that follow it."""
    if len(joints) < WINDOW:
        return np.empty((0, WINDOW * joints.shape[1]), np.float32)
    wide = np.lib.stride_tricks.sliding_window_view(joints, WINDOW, axis=0)
    return wide.reshape(len(wide), -1)


def _moving_windows(joints: NDArray[np.float32]) -> NDArray[np.int64]:
    if len(joints) < WINDOW:
        return np.empty(0, np.int64)
    return np.flatnonzero(
        np.linalg.norm(joints[WINDOW - 1 :] - joints[: len(joints) - WINDOW + 1], axis=1) > WINDOW_MOVES_RAD
    )


def _same(a: Fingerprint, b: Fingerprint, by: int, settings: CheckSettings) -> float | None:
    """Rms of the joints where frame ``i`` of ``a`` is frame ``i + by`` of ``b``; None if no repeats."""
    low, high = max(0, -by), min(len(a.joints), len(b.joints) - by)
    if high - low < max(OVERLAP_FRAMES, min(len(a.joints), len(b.joints)) / 2):
        return None
    rms = float(np.sqrt(((a.joints[low:high] - b.joints[low + by : high + by]) ** 2).mean()))
    if rms > settings.repeat_rad:
        return None
    off = unlike(a.looks[low:high], b.looks[low + by : high + by])
    return rms if off < settings.repeat_look else None


def unlike(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """How little two series of thumbnails ``[N, 8, 8]`` look alike: rms of their differences once each has
    mean 0 and deviation 1, the median over the pictures. Blocks of glare in either do not count: another
    exposure would cut them off elsewhere."""
    x, y = (v.reshape(len(v), -1) / 255.0 for v in (a, b))
    seen = np.maximum(x, y) < GLARE
    seen[seen.sum(axis=1) < x.shape[1] // 4] = True
    n = seen.sum(axis=1, keepdims=True)

    def even(v: Floats) -> Floats:
        v = (v - (v * seen).sum(axis=1, keepdims=True) / n) * seen
        return np.asarray(v / np.maximum(np.sqrt((v**2).sum(axis=1, keepdims=True) / n), 1e-3))

    return float(np.median(np.sqrt(((even(x) - even(y)) ** 2).sum(axis=1) / n[:, 0])))


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
            words = str(names[most])
            text = f"{counts[most]} of {len(others)} that grasped what looks alike did so for {words!r}"
            _quarantine(c, Found(Fault.OTHER_OBJECT, text))
