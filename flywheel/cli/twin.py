"""The twin against the robot: replay recorded episodes in it, identify its parameters from them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flywheel.cli.output import Bar, Json, console, messages, rows, show
from flywheel.errors import ConfigError, EpisodeError

if TYPE_CHECKING:
    from flywheel.twin.parameters import SignalError, TwinParameters
    from flywheel.twin.replay import Recorded

app = typer.Typer(help="The twin against the robot: replay, identification.", no_args_is_help=True)
Parameters = Annotated[Path | None, typer.Option(help="Identified parameters; the model's own without.")]


@app.command()
def replay(
    episodes: Annotated[list[Path], typer.Argument(help="Episodes' directories, or directories of them.")],
    parameters: Parameters = None,
    windows: Annotated[str, typer.Option(help="Lengths of open-loop windows, s.")] = "0.1,0.5,1",
    plot: Annotated[Path | None, typer.Option(help="Draw recorded and replayed signals to a PNG.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep it in the store: rollouts trust the twin by it.")] = False,
    json: Json = False,
) -> None:
    """Replay episodes' torques in the twin, from recorded states on; how far each signal is off."""
    from flywheel.twin.replay import replay as run

    lengths = _lengths(windows)
    recorded = _recorded(episodes)
    given = _parameters(parameters)
    found = run(recorded, given, lengths)
    if keep:
        from flywheel.rollout import twin
        from flywheel.services.environment import store

        kept = twin.evidence(found, time.time_ns())
        twin.keep(store(), kept)
        messages.print(f"kept as {kept.key}")
    if plot is not None:
        from flywheel.twin.drawing import draw

        draw(recorded, given, lengths, plot)
    if json:
        show(found, True)
        return
    rows(_COLUMNS, [_line(e) for e in found.errors], False)
    console.print(
        f"{len(recorded)} episodes of {', '.join(found.robots)}: "
        + ", ".join(f"{s:.1f} s {what}" for what, s in found.seconds.items())
    )


@app.command()
def identify(
    episodes: Annotated[Path, typer.Option(help="Directory of recorded episodes.")],
    out: Annotated[Path, typer.Option(help="Parameters file to write.")],
    robot: Annotated[str, typer.Option(help="Only this robot's episodes.")] = "",
    holdout: Annotated[
        float, typer.Option(min=0.05, max=0.5, help="Share of the episodes that only measures the error.")
    ] = 0.25,
    json: Json = False,
) -> None:
    """Identify the twin's masses, inertias, frictions, delay and payload from recorded episodes."""
    from flywheel.episode import write_durably
    from flywheel.twin.identify import identify as run

    recorded = _recorded([episodes])
    if robot:
        recorded = [r for r in recorded if robot in (r.robot, r.robot.partition("/")[2])]
        if not recorded:
            raise EpisodeError(f"--robot = {robot!r}: no episode in {episodes} is of it")
    robots = sorted({r.robot for r in recorded})
    if len(robots) > 1:
        messages.print(
            f"{len(robots)} robots are taken for one: {', '.join(robots)} (--robot takes one of them)"
        )
    with Bar("identify") as bar:
        found = run(recorded, holdout=holdout, on_progress=lambda what: bar.to(0, 0, what))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    write_durably(partial, found.to_bytes())
    partial.replace(out)
    if json:
        show(found, True)
        return
    rows(
        ["parameter", "model", "identified", "95 %", "unit", ""],
        [
            [
                n,
                e.nominal,
                e.value,
                f"{e.low:.4g} … {e.high:.4g}",
                e.unit,
                "" if e.identified else "not identified",
            ]
            for n, e in found.parameters.items()
        ],
        False,
    )
    before = {(e.signal, e.window_s): e for e in found.before}
    rows(
        ["held out", "unit", "window s", "rms before", "rms after"],
        [
            [e.signal, e.unit, e.window_s, before[e.signal, e.window_s].rms, e.rms]
            for e in found.after
            if "." not in e.signal
        ],
        False,
    )
    for name, why in found.refused.items():
        console.print(f"refused: {name}: {why}")
    console.print(f"{out}: {found.digest}; {len(found.episodes)} episodes, {len(found.held_out)} held out")


_COLUMNS = ["signal", "unit", "window s", "windows", "rms", "max", "rms / range"]


def _line(e: SignalError) -> list[Any]:
    share = "still" if e.normalised is None else f"{100 * e.normalised:.2g} %"
    return [e.signal, e.unit, e.window_s, e.windows, e.rms, e.max, share]


def _lengths(text: str) -> list[float]:
    try:
        found = [float(t) for t in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0.01 <= s <= 30.0 for s in found):
        raise ConfigError(f"--windows = {text!r}: give lengths of 0.01 to 30 s, such as 0.1,0.5,1")
    return found


def _parameters(path: Path | None) -> TwinParameters | None:
    from flywheel.twin.parameters import TwinParameters

    return None if path is None else TwinParameters.load(path)


def _recorded(paths: list[Path]) -> list[Recorded]:
    """Every episode under some paths that can be replayed; the others are named on standard error."""
    from flywheel.schema import MANIFEST_FILE
    from flywheel.twin.replay import load_all

    found: list[Path] = []
    for p in paths:
        inside = sorted(m.parent for m in p.glob(f"*/{MANIFEST_FILE}"))
        found += inside or [p]
    recorded, refused = load_all(found)
    for name, why in refused.items():
        messages.print(f"left out: {name}: {why}")
    if not recorded:
        raise EpisodeError(f"{', '.join(map(str, paths))}: no episode there that the twin can replay")
    return recorded
