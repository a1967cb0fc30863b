"""What one episode is and what of it could be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from flywheel import episode
from flywheel.config import CurateSettings
from flywheel.curate.checks import Found, check_signals
from flywheel.curate.pictures import (
    Film,
    Grey,
    changes,
    check_pictures,
    check_stuck,
    decoded,
    decoded_grey,
    evenly,
    thumbnails,
)
from flywheel.curate.repeats import Fingerprint
from flywheel.curate.signals import Signals
from flywheel.dataset.yardstick import stretch_sha256
from flywheel.episode import Episode
from flywheel.errors import EpisodeError
from flywheel.schema import FRAMES_FILE, NO_FAULT, Manifest, Outcome, TriggerKind, sha256_bytes

DESCRIPTOR_STEPS = 16
DESCRIPTOR_IMAGES = 3

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
    mark: Fingerprint | None = None  # what it is known by among all the others
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
    problems, found = episode.inspect(directory)
    fatal = [p for p in problems if p.fatal]
    try:
        c.manifest = found.manifest if found else episode.read_manifest(directory)
        listed = "".join(f"{f.name} {f.sha256}\n" for f in c.manifest.files)
        c.content_sha256 = "" if fatal else sha256_bytes(listed.encode())
    except EpisodeError:
        pass  # verify has said so
    if found is None or c.manifest is None:
        why = "; ".join(str(p) for p in fatal[:5])
        c.decide(False, f"quarantine:{fatal[0].reason.value if fatal else 'bad_manifest'}", why)
        return c
    try:
        _examine(c, found, settings)
    except (EpisodeError, pa.ArrowException, OSError, ValueError) as e:
        c.decide(False, "quarantine:image", f"{FRAMES_FILE}: {e}")
    return c


def _examine(c: Candidate, e: Episode, settings: CurateSettings) -> None:
    m, table = e.manifest, e.frames
    c.frames = table.num_rows
    s = Signals.of(e)
    faults = check_signals(e, s, settings.checks)
    if _quarantined(c, faults):
        return
    films = {x: Film.of(table, x) for x in settings.cameras if x in m.cameras}
    for film in films.values():
        if _quarantined(c, check_stuck(film, s.frame_q, settings.checks)):
            return
    if missing := [x for x in settings.cameras if x not in m.cameras]:
        c.decide(False, "no_camera", f"has cameras {m.cameras}, the policy needs {missing[0]!r}")
        return
    reason, why, tier = _usable(m, settings)
    if reason:
        c.decide(False, reason, why)
        return
    found = stretches(table, s.operator == (tier == 0), m.policy_hz)
    c.tier = tier
    c.stretches = tuple((a, b) for a, b in found if b - a >= settings.min_frames)
    if not c.stretches:
        longest = max((b - a for a, b in found), default=0)
        c.decide(
            False, "too_short", f"longest usable stretch {longest} frames, min_frames {settings.min_frames}"
        )
        return
    rows = np.concatenate([np.arange(a, b) for a, b in c.stretches])
    failed = _failed_ns(s)
    at_failure = max(0, int(np.searchsorted(s.frame_ns, failed, side="right")) - 1)
    seen: dict[str, Grey] = {}
    for x in settings.cameras:
        images, c.view_shapes[x] = decoded_grey(films[x], np.append(rows, at_failure))
        seen[x] = images[:-1]
    motion = np.linalg.norm(np.diff(s.frame_q[rows], axis=0), axis=1)
    small = {x: thumbnails(images) for x, images in seen.items()}
    change = {x: changes(thumbs) for x, thumbs in small.items()}
    for x, images in seen.items():
        faults += check_pictures(images, change[x], x, motion, settings.checks)
    if _quarantined(c, faults):
        return
    c.path = _resampled(s.state[rows], DESCRIPTOR_STEPS)
    first = settings.cameras[0]
    c.look = _resampled(small[first], DESCRIPTOR_IMAGES)
    c.shape = (m.state_dim, m.action_dim, round(m.policy_hz), *c.view_shapes.values())
    c.mark = Fingerprint.of(
        s, rows, partial(decoded, films[first]), small[first], change[first], motion, settings.checks
    )
    c.stretch_sha256 = tuple(stretch_sha256(s.state[a:b], s.action[a:b]) for a, b in c.stretches)
    c.phase = _phase(s, failed)
    at = np.append(at_failure, _resampled(rows, DESCRIPTOR_IMAGES))
    c.view_states = s.state[at].astype(np.float32)
    for x in settings.cameras:
        c.views[x] = tuple(films[x].jpegs[row] for row in at.tolist())


def _quarantined(c: Candidate, faults: Sequence[Found]) -> bool:
    if faults:
        c.decide(False, f"quarantine:{faults[0].fault.value}", "; ".join(str(f) for f in faults[:5]))
    return bool(faults)


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
    entry = next(f for f in m.files if f.name == FRAMES_FILE)
    data = (directory / FRAMES_FILE).read_bytes()
    if sha256_bytes(data) != entry.sha256:
        raise EpisodeError(f"{directory / FRAMES_FILE}: changed while it was read; pull the episode again")
    columns = ["t_ns", "state", "instruction", "action", "intervention", *(f"image.{c}" for c in cameras)]
    return pq.read_table(pa.BufferReader(data), columns=columns)


def _failed_ns(s: Signals) -> int:
    """The first fault, or where the operator took over, or the end: whichever came first."""
    m = s.manifest
    handover = int(s.frame_ns[np.argmax(s.operator)]) if s.operator.any() else m.window_ns[1]
    return min(
        [handover, *(x.t_ns for x in m.triggers if x.kind not in NO_FAULT | {TriggerKind.INTERVENTION})]
    )


def _phase(s: Signals, failed_ns: int) -> str:
    """Where in the task it failed, by what the cup held and sucked until then."""
    until = s.t_ns <= failed_ns
    held, suction = s.held[until], s.tool[until] > 0.5
    lost = held[:-1] & ~held[1:] & suction[1:]  # the vacuum broke although suction was commanded
    if held[-1:].any() or lost.any():
        return "carry"
    if held.any():
        return "place"
    return "grasp" if suction.any() else "approach"


def pictures(views: Mapping[str, Sequence[bytes]]) -> dict[str, NDArray[np.uint8]]:
    """Views that ``examine`` kept, uint8 ``[K, H, W, 3]`` by camera. Raises ``ValueError``."""
    import simplejpeg

    return {
        camera: np.stack([simplejpeg.decode_jpeg(data, colorspace="RGB") for data in found])
        for camera, found in views.items()
    }


def _resampled(values: NDArray[Any], steps: int) -> NDArray[Any]:
    """``steps`` rows of ``values``, evenly spread, the first and the last included."""
    return np.asarray(values[evenly(len(values), steps)])
