"""One episode: its timeline as paths to draw, and its pictures. Verified before a byte of it is parsed."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel import episode
from flywheel.episode import Episode, as_array
from flywheel.episode.bounds import inflates, open_parquet, too_large
from flywheel.errors import EpisodeError, NotFound
from flywheel.page.shown import MODES, Mark
from flywheel.schema import FRAMES_FILE, MANIFEST_FILE, FileEntry, Manifest
from flywheel.store import Store

EPISODE_BYTES_MAX = 256 << 20
PICTURE_BYTES_MAX = 4 << 20
COLUMNS = 600  # of a drawing: what lies in one is drawn by its extremes
STRIP = 10  # pictures of a camera
EVENTS_MOST = 200
TEXT_MAX = 300
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True, slots=True)
class Span:
    """A part of the time axis, in its thousandths, and what it is."""

    x: float
    width: float
    kind: str
    word: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A signal over time: an SVG path in a box of 1000 by 100, its highest value and its unit."""

    name: str
    path: str
    most: float
    unit: str


@dataclass(frozen=True, slots=True)
class Happening:
    """One event. ``t_s`` counts from the trigger."""

    x: float
    t_s: float
    kind: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class Still:
    """One picture of a strip."""

    row: int
    t_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """An episode, ready to draw. Times are seconds from the first trigger; x runs from 0 to 1000."""

    manifest: Manifest
    start_s: float
    end_s: float
    trigger_x: float
    modes: tuple[Span, ...]
    operator: tuple[Span, ...]
    curves: tuple[Curve, ...]
    happenings: tuple[Happening, ...]
    unlisted: int  # events beyond EVENTS_MOST
    strips: dict[str, tuple[Still, ...]]
    problems: tuple[str, ...]  # what verification found that is not fatal


@dataclass(frozen=True, slots=True)
class Opened:
    """An episode's timeline, and its pictures by camera."""

    timeline: Timeline
    pictures: dict[str, dict[int, bytes]]


def manifest_of(store: Store, prefix: str) -> Manifest:
    """The manifest that lies at a prefix. Raises ``NotFound``, ``EpisodeError``."""
    key = prefix + MANIFEST_FILE
    manifest = episode.parse_manifest(store.get(key), key)
    if manifest.prefix != prefix:
        raise EpisodeError(f"{key}: describes {manifest.prefix}, so it is not where it belongs")
    return manifest


def open_episode(store: Store, prefix: str) -> Opened:
    """Download, verify and draw one episode. Raises ``NotFound``, ``EpisodeError``."""
    manifest = manifest_of(store, prefix)
    _bounded(manifest, sum(f.bytes for f in manifest.files), "the episode")
    with tempfile.TemporaryDirectory(prefix="flywheel-page-") as d:
        directory = episode.pull(store, prefix, Path(d))
        problems = episode.verify(directory)
        if fatal := [p for p in problems if p.fatal]:
            raise EpisodeError(f"{prefix}: {fatal[0]}"[:TEXT_MAX])
        e = episode.read(directory)
    said = tuple(str(p)[:TEXT_MAX] for p in problems)
    pictures = {c: _stills(e, c, {x.row for x in strip}) for c, strip in _strips(e).items()}
    return Opened(draw(e, said), pictures)


def thumbnail(store: Store, prefix: str) -> bytes:
    """The last camera's JPEG at the moment of failure. Raises ``NotFound`` where there is none.

    The last one, because a wrist camera comes first and shows little of the scene.
    """
    import pyarrow.parquet as pq

    manifest = manifest_of(store, prefix)
    entry = next((f for f in manifest.files if f.name == FRAMES_FILE), None)
    if entry is None or not manifest.cameras or not entry.rows:
        raise NotFound(f"{prefix}: has no pictures")
    _bounded(manifest, entry.bytes, FRAMES_FILE)
    camera = "scene" if "scene" in manifest.cameras else manifest.cameras[-1]
    data = store.get(prefix + FRAMES_FILE, entry.sha256)
    _refuse(prefix, entry, too_large(entry, manifest))
    try:
        file = open_parquet(io.BytesIO(data))
        _refuse(prefix, entry, inflates(file, file.schema.to_arrow_schema(), entry))
        frames = pq.read_table(io.BytesIO(data), columns=["t_ns", f"image.{camera}"])
        t = as_array(frames, "t_ns")
        failed = manifest.triggers[0].t_ns if manifest.triggers else manifest.window_ns[1]
        row = max(int(np.searchsorted(t, failed, side="right")) - 1, 0)
        jpeg = frames.column(f"image.{camera}")[row].as_py()
    except EpisodeError:
        raise
    except Exception as e:  # pyarrow raises many kinds for a file that somebody made up
        raise EpisodeError(f"{prefix}{FRAMES_FILE}: cannot be read: {type(e).__name__}") from None
    return jpeg_only(jpeg, prefix)


def jpeg_only(data: object, prefix: str) -> bytes:
    """What a browser may be given as a JPEG. Raises ``NotFound`` for anything else."""
    if not isinstance(data, bytes) or not data.startswith(_JPEG) or len(data) > PICTURE_BYTES_MAX:
        raise NotFound(f"{prefix}: no picture there")
    return data


def draw(e: Episode, problems: tuple[str, ...] = ()) -> Timeline:
    """The timeline of an episode. Pure."""
    m = e.manifest
    zero = m.triggers[0].t_ns if m.triggers else m.window_ns[0]
    low, high = m.window_ns
    span = max(high - low, 1)

    def x(t_ns: Any) -> Any:
        return np.clip((np.asarray(t_ns, np.float64) - low) * (1000 / span), 0, 1000)

    events = e.events.to_pylist()
    happenings = tuple(
        Happening(float(x(row["t_ns"])), (row["t_ns"] - zero) / 1e9, row["kind"][:TEXT_MAX],
                  row["name"][:TEXT_MAX], "" if row["detail"] == "{}" else row["detail"][:TEXT_MAX])
        for row in sorted(events, key=lambda r: r["t_ns"])[:EVENTS_MOST]
    )  # fmt: skip
    return Timeline(
        manifest=m,
        start_s=(low - zero) / 1e9,
        end_s=(high - zero) / 1e9,
        trigger_x=float(x(zero)),
        modes=_modes(e, x),
        operator=_operator(e, x),
        curves=_curves(e, x),
        happenings=happenings,
        unlisted=max(len(events) - EVENTS_MOST, 0),
        strips=_strips(e),
        problems=problems,
    )


def _modes(e: Episode, x: Any) -> tuple[Span, ...]:
    mode = as_array(e.control, "mode")
    if not len(mode):
        return ()
    at = x(as_array(e.control, "t_ns"))
    starts = np.flatnonzero(np.diff(mode, prepend=mode[0])).tolist()
    edges = [0, *starts, len(mode)]
    found = []
    for a, b in pairwise(edges):
        if b <= a:
            continue
        known = {int(k): v for k, v in MODES.items()}
        mark = known.get(int(mode[a]), Mark("bad", f"mode {int(mode[a])}"))
        end = float(at[b]) if b < len(at) else 1000.0
        found.append(Span(float(at[a]), max(end - float(at[a]), 0.5), mark.kind, mark.word))
    return tuple(found[:COLUMNS])


def _operator(e: Episode, x: Any) -> tuple[Span, ...]:
    mine = np.asarray(e.frames.column("intervention").to_pylist(), dtype=bool)
    at = x(as_array(e.frames, "t_ns"))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8)))
    found = []
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        end = float(at[b]) if b < len(at) else 1000.0
        found.append(Span(float(at[a]), max(end - float(at[a]), 0.5), "warn", "operator"))
    return tuple(found[:COLUMNS])


def _curves(e: Episode, x: Any) -> tuple[Curve, ...]:
    t = x(as_array(e.control, "t_ns"))
    error = np.abs(as_array(e.control, "q") - as_array(e.control, "q_ref"))
    worst = error.max(axis=1) * 1e3 if error.size else np.zeros(0)
    found = [_curve("tracking error, worst joint", t, worst, "mrad")]
    late = as_array(e.control, "late_ns") / 1e3
    if late.size and late.max() > 0:  # a simulated clock is never late
        found.append(_curve("lateness of ticks", t, late, "µs"))
    age = as_array(e.control, "chunk_age_ns") / 1e6
    found.append(_curve("age of the action chunk", t, age, "ms"))
    return tuple(found)


def _curve(name: str, x: NDArray[Any], y: NDArray[Any], unit: str) -> Curve:
    """An area under the highest value in each of ``COLUMNS``, so that no peak is lost."""
    y = np.where(np.isfinite(y), y, 0.0)
    if not len(y):
        return Curve(name, "", 0.0, unit)
    column = np.minimum((x * (COLUMNS / 1000)).astype(int), COLUMNS - 1)
    tops = np.full(COLUMNS, -1.0)
    np.maximum.at(tops, column, y)
    used = np.flatnonzero(tops >= 0)
    most = float(tops.max()) if len(used) else 0.0
    high = 100 - 96 * tops[used] / (most or 1.0)
    at = (used + 0.5) * 1000 / COLUMNS
    line = "".join(f"L{a:.1f} {b:.1f}" for a, b in zip(at, high, strict=True))
    return Curve(name, f"M{at[0]:.1f} 100{line}L{at[-1]:.1f} 100Z" if len(used) else "", most, unit)


def _strips(e: Episode) -> dict[str, tuple[Still, ...]]:
    rows = e.frames.num_rows
    if not rows:
        return {}
    m = e.manifest
    zero = m.triggers[0].t_ns if m.triggers else m.window_ns[0]
    t = as_array(e.frames, "t_ns")
    picks = {int(i) for i in np.linspace(0, rows - 1, min(STRIP, rows)).round()}
    picks.add(max(int(np.searchsorted(t, zero, side="right")) - 1, 0))  # the moment itself
    stills = tuple(Still(i, (int(t[i]) - zero) / 1e9) for i in sorted(picks))
    return dict.fromkeys(m.cameras, stills)


def _stills(e: Episode, camera: str, rows: set[int]) -> dict[int, bytes]:
    column = e.frames.column(f"image.{camera}")
    return {i: column[i].as_py() for i in rows}


def _bounded(manifest: Manifest, size: int, what: str) -> None:
    if size > EPISODE_BYTES_MAX:
        raise EpisodeError(
            f"{manifest.prefix}: {what} has {size >> 20} MiB, more than the {EPISODE_BYTES_MAX >> 20} that "
            f"are drawn here; pull it with `flywheel episodes pull {manifest.prefix}`"
        )


def _refuse(prefix: str, entry: FileEntry, why: str | None) -> None:
    if why is not None:
        raise EpisodeError(f"{prefix}{entry.name}: {why}")
