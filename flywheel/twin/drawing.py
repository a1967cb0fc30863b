"""Recorded and replayed signals over each other, and how their distance grows with time, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flywheel.errors import EpisodeError
from flywheel.twin.arm import Arms, nominal_values
from flywheel.twin.cell import JOINTS, STEP_NS
from flywheel.twin.kinematics import forward
from flywheel.twin.parameters import JOINT_NAMES, TwinParameters
from flywheel.twin.replay import Recorded, cut, predict, windows


def draw(
    recorded: Sequence[Recorded], parameters: TwinParameters | None, windows_s: Sequence[float], png: Path
) -> Path:
    """Draw the first episode's joints with their replay, in the second longest of the windows, and the growth
    of the tool's error within windows of each length over all episodes.

    Raises:
        EpisodeError: there is no window to draw.
    """
    from matplotlib.figure import Figure

    arms = Arms(nominal_values() | (parameters.values if parameters is not None else {}))
    shown = sorted(windows_s)[-2:][0]
    first = next((r for r in recorded if windows([r], shown)), None)
    if first is None:
        raise EpisodeError(f"no window of {shown:g} s to draw")
    figure = Figure(figsize=(13, 8), layout="constrained")
    ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=[2, 1])
    axes = left.subplots(JOINTS, 1, sharex=True)
    t = np.arange(len(first.state)) * STEP_NS * 1e-9
    w = cut([first], windows([first], shown), shown)
    twin = predict(arms, w)
    for j, a in enumerate(axes):
        a.plot(t, first.state[:, j], color="black", linewidth=1, label="recorded")
        for k, at in enumerate(w.where):
            span = t[at.start + 1] + np.arange(twin.shape[1]) * STEP_NS * 1e-9
            a.plot(span, twin[k, :, j], color="crimson", linewidth=1, label=None if k else "twin")
            a.axvline(t[at.start], color="grey", linewidth=0.4, alpha=0.5)
        a.set_ylabel(f"{JOINT_NAMES[j]}, rad", fontsize=8)
    axes[0].legend(fontsize=7, ncols=2)
    axes[-1].set_xlabel("s of the episode")
    left.suptitle(f"{first.episode_id}, open loop from every grey line ({shown:g} s)", fontsize=9)
    growth = right.subplots(1, 1)
    for s in windows_s:
        where = windows(recorded, s)
        if not where:
            continue
        w = cut(recorded, where, s)
        off = np.linalg.norm(
            forward(predict(arms, w)[..., :JOINTS]) - forward(w.states[..., :JOINTS]), axis=-1
        )
        span = (1 + np.arange(off.shape[1])) * STEP_NS * 1e-9
        (line,) = growth.plot(
            span, 1e3 * np.median(off, axis=0), label=f"{s:g} s, {len(where)} windows: median"
        )
        growth.plot(span, 1e3 * np.percentile(off, 95, axis=0), color=line.get_color(), linestyle=":")
    growth.set_xlabel("s since the recorded state")
    growth.set_ylabel("tool, twin against recorded, mm (dotted: 95 %)")
    growth.legend(fontsize=7)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png", dpi=90)
    return png
