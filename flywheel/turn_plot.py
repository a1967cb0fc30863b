"""Success per shift, turn after turn, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flywheel.schema import Proportion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By name of the line: success in each shift after turn 0 (the base policy), 1, 2, …; None: not measured.
Lines = Mapping[str, Mapping[str, Sequence[Proportion | None]]]
COLOURS = ("#2a7de1", "#d1495b", "#6b7280", "#2e8b57")


def success_by_turn(lines: Lines, shifts: Sequence[str], taught: Mapping[str, int]) -> Figure:
    """A panel for each shift, with 95 % Wilson intervals; ``taught``: the turn whose failures are from it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(shifts) + 1, 2.9), layout="constrained")
    panels = figure.subplots(1, len(shifts), sharey=True, squeeze=False)[0]
    for axes, shift in zip(panels, shifts, strict=True):
        for i, (name, by_shift) in enumerate(lines.items()):
            points = [(k, p) for k, p in enumerate(by_shift.get(shift, ())) if p is not None]
            if not points:
                continue
            x = [k + 0.05 * (i - (len(lines) - 1) / 2) for k, _ in points]
            y = [100 * p.mean for _, p in points]
            spread = [
                [100 * (p.mean - p.low) for _, p in points],
                [100 * (p.high - p.mean) for _, p in points],
            ]
            axes.errorbar(
                x, y, yerr=spread, color=COLOURS[i % len(COLOURS)], marker="o", capsize=3, label=name
            )
        if shift in taught:
            axes.axvspan(taught[shift] - 1, taught[shift], color="#8884", lw=0)
        axes.set_title(shift + (f" (turn {taught[shift]})" if shift in taught else ""))
        turns = max((len(b.get(shift, ())) for b in lines.values()), default=1)
        axes.set_xticks(range(turns), ["base", *map(str, range(1, turns))])
        axes.set_ylim(-3, 103)
    panels[0].set_ylabel("success, %")
    figure.supxlabel("after turn")
    if len(lines) > 1 and panels[-1].get_legend_handles_labels()[0]:
        panels[-1].legend(loc="lower right")
    return figure
