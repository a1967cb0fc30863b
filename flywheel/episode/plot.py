"""An episode at a glance: a timeline over a contact sheet, as a PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flywheel.episode.sealing import Episode, as_array, read
from flywheel.schema import Mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THUMBNAILS = 12
_COLOURS = {"trigger": "crimson", "intervention": "darkorange", "task": "steelblue", "plant": "purple"}


def show(directory: Path, png: Path, thumbnails: int = THUMBNAILS) -> Path:
    """Draw joint tracking, modes, events and ``thumbnails`` pictures per camera of an episode to ``png``.

    The time axis is in seconds from the first trigger. Raises ``EpisodeError`` for an unreadable episode.
    """
    from matplotlib.figure import Figure

    e = read(directory)
    m = e.manifest
    zero = m.triggers[0].t_ns if m.triggers else m.window_ns[0]
    figure = Figure(figsize=(14, 6.5 + 1.3 * len(m.cameras)), layout="constrained")
    heights = [6.5, 1.3 * max(len(m.cameras), 1)]
    (timeline,), (sheet,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    tracking, error, modes = timeline.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])
    _tracking(e, zero, tracking, error)
    _modes(e, zero, modes)
    for axes in (tracking, error, modes):
        _spans(e, zero, axes)
    _labels(e, zero, tracking)
    modes.set_xlim((m.window_ns[0] - zero) / 1e9, (m.window_ns[1] - zero) / 1e9)
    modes.set_xlabel("s from the trigger")
    ended = m.outcome + (f", then {m.operator_outcome} by the operator" if m.operator_outcome else "")
    figure.suptitle(
        f"{m.episode_id}  {m.site}/{m.robot}  {m.shift}\n“{m.task}”: {ended}; policy {m.policy_digest[:12]}; "
        f"{m.gaps} gaps, {m.drops} drops",
        fontsize=10,
    )
    _contact_sheet(e, zero, sheet, thumbnails)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=90)
    return png


def _tracking(e: Episode, zero: int, tracking: Axes, error: Axes) -> None:
    t = (as_array(e.control, "t_ns") - zero) / 1e9
    q, reference = as_array(e.control, "q"), as_array(e.control, "q_ref")
    for j in range(e.manifest.joints):
        (line,) = tracking.plot(t, q[:, j], linewidth=1, label=f"joint {j}")
        tracking.plot(t, reference[:, j], linewidth=0.8, linestyle=":", color=line.get_color())
        error.plot(t, np.abs(q[:, j] - reference[:, j]) * 1e3, linewidth=0.8, color=line.get_color())
    tracking.set_ylabel("joint angle, rad\n(dotted: reference)")
    error.set_ylabel("tracking error, mrad")
    error.ticklabel_format(axis="y", useOffset=False)
    if e.manifest.joints:
        tracking.legend(loc="lower left", ncols=e.manifest.joints, fontsize=7)


def _modes(e: Episode, zero: int, axes: Axes) -> None:
    t = (as_array(e.control, "t_ns") - zero) / 1e9
    mode = as_array(e.control, "mode")
    seen = sorted(set(mode.tolist()))
    names = {int(v): v.name.lower() for v in Mode}
    axes.step(t, np.searchsorted(seen, mode), where="post", color="black", linewidth=1)
    axes.set_yticks(range(len(seen)), [names.get(v, str(v)) for v in seen], fontsize=7)
    axes.set_ylim(-0.5, max(len(seen), 1) - 0.5)
    axes.set_ylabel("mode")


def _spans(e: Episode, zero: int, axes: Axes) -> None:
    """Shade the operator's part; a line per event."""
    t = (as_array(e.frames, "t_ns") - zero) / 1e9
    period = 1 / e.manifest.policy_hz
    operator = np.asarray(e.frames.column("intervention").to_pylist(), dtype=bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], operator, [False]]).astype(np.int8)))
    for first, after in zip(edges[::2], edges[1::2], strict=True):
        axes.axvspan(t[first], t[after - 1] + period, color="orange", alpha=0.15, linewidth=0)
    for t_ns, kind in zip(as_array(e.events, "t_ns"), e.events.column("kind").to_pylist(), strict=True):
        axes.axvline((t_ns - zero) / 1e9, color=_COLOURS.get(kind, "grey"), linewidth=0.8, alpha=0.7)


def _labels(e: Episode, zero: int, axes: Axes) -> None:
    for i, event in enumerate(e.events.to_pylist()):
        axes.text(
            (event["t_ns"] - zero) / 1e9,
            1.0 - 0.07 * (i % 4),
            f" {event['kind']}: {event['name']}",
            transform=axes.get_xaxis_transform(),
            color=_COLOURS.get(event["kind"], "grey"),
            fontsize=7,
            verticalalignment="top",
            clip_on=True,
        )


def _contact_sheet(e: Episode, zero: int, part: Any, thumbnails: int) -> None:
    """One strip of pictures a camera: one image each, since an axes each would take seconds to lay out."""
    rows, cameras = e.frames.num_rows, e.manifest.cameras
    if not rows or not cameras:
        part.text(0.5, 0.5, "no frames", ha="center")
        return
    picks = np.unique(np.linspace(0, rows - 1, min(thumbnails, rows)).round().astype(int))
    t = as_array(e.frames, "t_ns")
    for camera, (axes,) in zip(cameras, part.subplots(len(cameras), 1, squeeze=False), strict=True):
        pictures = [_decode(e.frames.column(f"image.{camera}")[int(i)].as_py()) for i in picks]
        high = max(p.shape[0] for p in pictures)
        wide = max(p.shape[1] for p in pictures)
        strip = np.full((high, (wide + 4) * len(picks), 3), 255, np.uint8)
        for k, p in enumerate(pictures):
            strip[: p.shape[0], k * (wide + 4) : k * (wide + 4) + p.shape[1]] = p
        axes.imshow(strip, aspect="equal")
        labels = [f"{(t[i] - zero) / 1e9:+.1f} s" for i in picks]
        axes.set_xticks(np.arange(len(picks)) * (wide + 4) + wide / 2, labels, fontsize=7)
        axes.set_yticks([])
        axes.set_ylabel(camera, fontsize=8)


def _decode(jpeg: bytes) -> NDArray[np.uint8]:
    """A picture ``[H, W, 3]``; grey where there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return np.full((64, 64, 3), 128, np.uint8)
