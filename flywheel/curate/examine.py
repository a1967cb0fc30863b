"""What one episode is and what of it could be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel import episode
from flywheel.config import CurateSettings
from flywheel.dataset.yardstick import stretch_sha256
from flywheel.errors import EpisodeError
from flywheel.schema import CONTROL_FILE, FRAMES_FILE, NO_FAULT, Manifest, Outcome, TriggerKind, sha256_bytes

MAX_SIDE_PX = 4096  # a JPEG that claims more is an attack on memory
MAX_PIXEL_BYTES = 1 << 30  # of one camera's pictures in one episode, decoded
MAX_SCANS = 64  # of one picture: each costs its whole area (a progressive one of libjpeg has 10)
DESCRIPTOR_STEPS = 16
DESCRIPTOR_IMAGES = 3
THUMBNAIL_PX = 8

SCAN = b"\xff\xda"  # start of scan; never inside of one, where ff is followed by 00 (ITU-T T.81, B.1.1)

Vector = NDArray[np.float64]


@dataclass
class Candidate:
    """One directory under ``episodes_dir`` and what was found out about it."""

    directory: Path
    manifest: Manifest | None = None
    frames: int = 0
    stretches: tuple[tuple[int, int], ...] = ()  # usable rows of frames.parquet, end exclusive
    tier: int = 0  # corrections before successes
    path: Vector = field(default_factory=lambda: np.empty(0))  # state along the usable rows
    look: Vector = field(default_factory=lambda: np.empty(0))  # thumbnails along the usable rows
    shape: tuple[Any, ...] = ()
    content_sha256: str = ""
    phase: str = ""  # where in the task it failed: approach, grasp, carry or place
    views: dict[str, tuple[bytes, ...]] = field(default_factory=dict)  # JPEGs: the failure, then the way
    view_states: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))  # [K, S]
    view_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of a picture, by camera
    stretch_sha256: tuple[str, ...] = ()
    features: Vector | None = None  # of the views, by the policy's encoder [K, D]
    cluster: str = ""
    weight: float = 0.0  # frequency × cost of the failure, this episode's part of it
    nearest: float | None = None  # distance to the nearest episode taken
    held_out: bool = False
    taken: bool = False
    reason: str = ""  # empty while undecided
    why: str = ""
    dataset_episodes: tuple[int, ...] = ()

    @property
    def episode_id(self) -> str:
        return self.manifest.episode_id if self.manifest else self.directory.name

    @property
    def scene(self) -> tuple[str, int] | None:
        """The scene of the twin that it happened in; None on a real robot."""
        m = self.manifest
        return None if m is None or m.seed is None else (m.shift, m.seed)

    @property
    def failure_mode(self) -> str:
        """How it failed as far as the robot itself knew; ``label`` looks closer."""
        m = self.manifest
        if m is None:
            return ""
        if m.outcome is Outcome.SUCCESS and m.triggers:
            return m.triggers[0].kind.value
        return m.outcome.value

    @property
    def frames_used(self) -> int:
        """Frames of the usable stretches if it was taken, else 0."""
        return sum(b - a for a, b in self.stretches) if self.taken else 0

    def decide(self, taken: bool, reason: str, why: str) -> None:
        self.taken, self.reason, self.why = taken, reason, why


def examine(directory: Path, settings: CurateSettings) -> Candidate:
    """Read one episode and say what of it could be used. Never raises for what the directory holds."""
    c = Candidate(directory)
    problems = episode.verify(directory)
    fatal = [p for p in problems if p.fatal]
    try:
        c.manifest = episode.read_manifest(directory)
        listed = "".join(f"{f.name} {f.sha256}\n" for f in c.manifest.files)
        c.content_sha256 = "" if fatal else sha256_bytes(listed.encode())
    except EpisodeError:
        pass  # verify has said so
    if fatal or c.manifest is None:
        why = "; ".join(str(p) for p in fatal[:5])
        c.decide(False, f"quarantine:{fatal[0].reason.value if fatal else 'bad_manifest'}", why)
        return c
    try:
        _examine_frames(c, c.manifest, settings)
    except (EpisodeError, pa.ArrowException, OSError, ValueError) as e:
        c.decide(False, "quarantine:image", f"{FRAMES_FILE}: {e}")
    return c


def _examine_frames(c: Candidate, m: Manifest, settings: CurateSettings) -> None:
    if missing := [x for x in settings.cameras if x not in m.cameras]:
        c.decide(False, "no_camera", f"has cameras {m.cameras}, the policy needs {missing[0]!r}")
        return
    table = read_frames(c.directory, m, settings.cameras)
    c.frames = table.num_rows
    reason, why, tier = _usable(m, settings)
    if reason:
        c.decide(False, reason, why)
        return
    mine = episode.as_array(table, "intervention").astype(bool) == (tier == 0)
    found = stretches(table, mine, m.policy_hz)
    c.tier = tier
    c.stretches = tuple((a, b) for a, b in found if b - a >= settings.min_frames)
    if not c.stretches:
        longest = max((b - a for a, b in found), default=0)
        c.decide(
            False, "too_short", f"longest usable stretch {longest} frames, min_frames {settings.min_frames}"
        )
        return
    rows = np.concatenate([np.arange(a, b) for a, b in c.stretches])
    images = {x: decoded(table, x, rows) for x in settings.cameras}
    state = episode.as_array(table, "state").astype(np.float64)
    c.path = _resampled(state[rows], DESCRIPTOR_STEPS)
    c.look = np.stack([thumbnail(i) for i in _resampled(images[settings.cameras[0]], DESCRIPTOR_IMAGES)])
    c.shape = (m.state_dim, m.action_dim, round(m.policy_hz), *(a.shape[1:] for a in images.values()))
    action = episode.as_array(table, "action")
    c.stretch_sha256 = tuple(stretch_sha256(state[a:b], action[a:b]) for a, b in c.stretches)
    failed = _failed_ns(table, m)
    c.phase = _phase(c.directory, m, failed)
    t = episode.as_array(table, "t_ns")
    first = np.array([max(0, int(np.searchsorted(t, failed, side="right")) - 1)])
    at = np.concatenate([first, _resampled(rows, DESCRIPTOR_IMAGES)])
    c.view_states = state[at].astype(np.float32)
    for x in settings.cameras:
        c.view_shapes[x] = decoded(table, x, first).shape[1:]
        if c.view_shapes[x] != images[x].shape[1:]:
            raise EpisodeError(f"image.{x} in row {first[0]}: is {c.view_shapes[x]}, unlike the others")
        c.views[x] = tuple(table.column(f"image.{x}")[int(row)].as_py() for row in at)


def _usable(m: Manifest, settings: CurateSettings) -> tuple[str, str, int]:
    """Why nothing of the episode can be used (code and text), or the tier of what can."""
    if m.operator_outcome is Outcome.SUCCESS:
        return "", "", 0
    if m.operator_outcome is not None:
        return "correction_failed", f"the operator took over and ended with {m.operator_outcome.value}", 0
    if m.outcome is not Outcome.SUCCESS:
        return "no_correction", f"ended with {m.outcome.value} and nobody corrected it", 0
    if not settings.keep_success:
        return "success", "nothing failed and keep_success is off", 1
    return "", "", 1


def stretches(frames: pa.Table, mine: NDArray[np.bool_], rate_hz: float) -> list[tuple[int, int]]:
    """Row ranges in which ``mine`` holds, under one instruction, with no frame missing in between.

    A dataset episode has one task and frames exactly 1/fps apart, so a stretch ends where either changes.
    """
    t = episode.as_array(frames, "t_ns")
    words = np.asarray(frames.column("instruction").to_pylist(), dtype=object)
    breaks = (np.diff(t) > 1.5e9 / rate_hz) | (words[1:] != words[:-1]) | (mine[1:] != mine[:-1])
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(t)]
    return [(a, b) for a, b in pairwise(edges) if b > a and mine[a]]


def read_frames(directory: Path, m: Manifest, cameras: Sequence[str]) -> pa.Table:
    """The needed columns of ``frames.parquet``, from bytes whose hash is the manifest's."""
    columns = ["t_ns", "state", "instruction", "action", "intervention", *(f"image.{c}" for c in cameras)]
    return _read(directory, m, FRAMES_FILE, columns)


def _read(directory: Path, m: Manifest, name: str, columns: list[str]) -> pa.Table:
    entry = next(f for f in m.files if f.name == name)
    data = (directory / name).read_bytes()
    if sha256_bytes(data) != entry.sha256:
        raise EpisodeError(f"{directory / name}: changed while it was read; pull the episode again")
    return pq.read_table(pa.BufferReader(data), columns=columns)


def _failed_ns(frames: pa.Table, m: Manifest) -> int:
    """The first fault, or where the operator took over, or the end: whichever came first."""
    t, operator = episode.as_array(frames, "t_ns"), episode.as_array(frames, "intervention").astype(bool)
    handover = int(t[np.argmax(operator)]) if operator.any() else m.window_ns[1]
    return min(
        [handover, *(x.t_ns for x in m.triggers if x.kind not in NO_FAULT | {TriggerKind.INTERVENTION})]
    )


def _phase(directory: Path, m: Manifest, failed_ns: int) -> str:
    """Where in the task it failed, by what the cup held and sucked until then."""
    control = _read(directory, m, CONTROL_FILE, ["t_ns", "held", "tool_cmd"])
    until = episode.as_array(control, "t_ns") <= failed_ns
    held = episode.as_array(control, "held").astype(bool)[until]
    suction = (episode.as_array(control, "tool_cmd") > 0.5)[until]
    lost = held[:-1] & ~held[1:] & suction[1:]  # the vacuum broke although suction was commanded
    if held[-1:].any() or lost.any():
        return "carry"
    if held.any():
        return "place"
    return "grasp" if suction.any() else "approach"


def decoded(frames: pa.Table, camera: str, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images of one camera, uint8 [len(rows), H, W, 3]; ``EpisodeError`` names a row that does not decode."""
    import simplejpeg

    column = frames.column(f"image.{camera}")
    images: list[NDArray[np.uint8]] = []
    for row in rows.tolist():
        data = column[row].as_py()
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            if not 0 < max(height, width) <= MAX_SIDE_PX:
                raise ValueError(f"claims {height}×{width} px")
            if len(rows) * height * width * 3 > MAX_PIXEL_BYTES:
                raise ValueError(f"{len(rows)} pictures of {height}×{width} px are too many to decode")
            if data.count(SCAN) > MAX_SCANS:
                raise ValueError(f"is drawn in {data.count(SCAN)} scans")
            if images and (height, width) != images[0].shape[:2]:
                raise ValueError(f"is {height}×{width} px, unlike the first one")
            images.append(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        except ValueError as e:
            raise EpisodeError(f"image.{camera} in row {row}: {e}") from None
    return np.stack(images)


def pictures(views: Mapping[str, Sequence[bytes]]) -> dict[str, NDArray[np.uint8]]:
    """Views that ``examine`` kept, uint8 ``[K, H, W, 3]`` by camera. Raises ``ValueError``."""
    import simplejpeg

    return {
        camera: np.stack([simplejpeg.decode_jpeg(data, colorspace="RGB") for data in found])
        for camera, found in views.items()
    }


def thumbnail(image: NDArray[Any]) -> Vector:
    """Grey ``[8, 8]`` in 0..1 of an image ``[H, W, 3]`` by averaging blocks."""
    grey = np.asarray(image, dtype=np.float64).mean(axis=2) / 255.0
    rows = np.array_split(grey, THUMBNAIL_PX, axis=0)
    return np.array([[b.mean() for b in np.array_split(r, THUMBNAIL_PX, axis=1)] for r in rows])


def _resampled(values: NDArray[Any], steps: int) -> NDArray[Any]:
    """``steps`` rows of ``values``, evenly spread, the first and the last included."""
    return np.asarray(values[np.linspace(0, len(values) - 1, steps).round().astype(int)])
