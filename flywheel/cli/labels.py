"""Labels: the stage, the questions that it asks of people, and their answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flywheel.cli.output import Bar, Json, console, rows, show
from flywheel.config import PARAMS_FILE, Settings
from flywheel.errors import BundleError, StageError

if TYPE_CHECKING:
    from flywheel.label import Familiar

app = typer.Typer(help="Label episodes; ask people about what is unsure, and keep what they say.")


@app.callback(invoke_without_command=True)
def label(
    context: typer.Context,
    episodes: Annotated[Path | None, typer.Option(help="Directory of pulled episodes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where labels.parquet and queue.json go.")] = None,
    curated: Annotated[
        Path | None, typer.Option(help="Output of curate, whose clusters say what an answer is worth.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Checkpoint by whose encoder novelty is measured.")
    ] = None,
    answers: Annotated[Path | None, typer.Option(help="What people have said so far, JSON.")] = None,
    params: Annotated[Path, typer.Option(help="Settings file.")] = Path(PARAMS_FILE),
    json: Json = False,
) -> None:
    """Label each episode: outcome, failure mode, phase, cause, intervention, each with its confidence.

    Without a command this is the stage, which needs --episodes and --out.
    """
    if context.invoked_subcommand is not None:
        return
    if episodes is None or out is None:
        missing = "--episodes" if episodes is None else "--out"
        raise StageError(f"{missing}: is missing; the stage needs it (`flywheel label --help`)")
    from flywheel.label import label as run
    from flywheel.label import read_answers

    settings = Settings.load(params)
    said = read_answers(answers)
    with Bar("label") as bar:
        result = run(
            episodes,
            out,
            settings.label,
            lambda what, n, of: bar.to(n, of, what),
            curated=curated,
            answers=said,
            familiar=familiar(policy, settings),
        )
        show(result, json)


def familiar(policy: Path | None, settings: Settings) -> Familiar | str:
    """What a policy was trained on, as far as this can be shown again: the demonstrations that every turn
    replays. Why there is none, otherwise.
    """
    from flywheel.curate.embed import Encoder, NoEncoder
    from flywheel.label import Familiar
    from flywheel.label.reference import demonstrated

    if policy is None:
        return "no policy was given"
    if not settings.label.reference_runs:
        return "label.reference_runs is 0"
    try:
        encoder = Encoder.load(policy / "bundle" if (policy / "bundle").is_dir() else policy)
        runs = demonstrated(settings.replay.shift, settings.label.reference_runs, settings.replay.seed)
        shape = {"wrist": runs[0][0]["wrist"].shape[1:]}
        if why := encoder.misfit(shape, runs[0][1].shape[1]):
            return f"the demonstrations are of another robot: {why}"
        return Familiar.of(encoder, runs)
    except NoEncoder as e:
        return str(e)
    except BundleError as e:
        raise StageError(f"--policy={policy}: {e}") from None


@app.command()
def queue(
    turn: Annotated[str, typer.Option(help="Only what this turn asked.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    json: Json = False,
) -> None:
    """What waits for a person: the episodes whose answer is worth most, first."""
    from itertools import islice

    from flywheel.label import Aspect
    from flywheel.label.answers import waiting
    from flywheel.services.environment import store

    lines = []
    for name, q in islice(waiting(store(), turn), limit):
        mode, cause = q.labels[Aspect.FAILURE_MODE], q.labels[Aspect.CAUSE]
        lines.append(
            [
                q.episode_id,
                f"{mode.word} {mode.confidence:.2f}",
                f"{cause.word} {cause.confidence:.2f}",
                q.cluster_size,
                f"{q.worth:.2f}",
                q.why,
                q.robot,
                name,
            ]
        )
    rows(["episode", "failure mode", "cause", "of its kind", "worth", "why", "robot", "turn"], lines, json)


@app.command()
def answer(
    episode: Annotated[str, typer.Argument(help="Its id, from `label queue`.")],
    by: Annotated[str, typer.Option(help="Who says so.")],
    outcome: Annotated[str, typer.Option(help="How the policy's attempt ended.")] = "",
    mode: Annotated[str, typer.Option(help="How it failed.")] = "",
    phase: Annotated[str, typer.Option(help="Where in the task.")] = "",
    cause: Annotated[str, typer.Option(help="Which barrier was hit.")] = "",
    note: Annotated[str, typer.Option(help="For whoever reads it later.")] = "",
    json: Json = False,
) -> None:
    """Say what an episode shows. Kept with who and when; the next turn learns from it.

    A second answer by the same person replaces what they said before; both stay in the store.
    """
    from flywheel.label import Aspect
    from flywheel.label.answers import answer as keep
    from flywheel.label.answers import collect
    from flywheel.services.environment import store

    given = {
        Aspect.OUTCOME: outcome,
        Aspect.FAILURE_MODE: mode,
        Aspect.PHASE: phase,
        Aspect.CAUSE: cause,
    }
    words = {a: w for a, w in given.items() if w}
    if not words:
        raise StageError("give at least one of --outcome, --mode, --phase, --cause")
    there = store()
    said = keep(there, episode, words, by, time.time_ns(), note=note)
    conflicts = collect(there).conflicts().get(episode, {})
    if json:
        show({"answer": said.model_dump(mode="json"), "conflicts": conflicts}, True)
        return
    console.print(f"{episode}: " + ", ".join(f"{a} {w}" for a, w in words.items()) + f", by {by}")
    for aspect, who in conflicts.items():
        console.print(f"people disagree on {aspect}: " + ", ".join(f"{p} says {w}" for p, w in who.items()))


@app.command()
def answers(
    episode: Annotated[str, typer.Argument(help="Only of this one.")] = "", json: Json = False
) -> None:
    """Everything that people have said, in the order of time."""
    from datetime import UTC, datetime

    from flywheel.label.answers import collect
    from flywheel.services.environment import store

    said = collect(store())
    split = said.conflicts()
    lines = [
        [
            a.episode_id,
            ", ".join(f"{k}={w}" for k, w in a.words.items()),
            a.by,
            f"{datetime.fromtimestamp(a.t_unix_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S}",
            ", ".join(k for k in a.words if k in split.get(a.episode_id, {})),
            a.note,
        ]
        for a in (said.of(episode) if episode else said.answers)
    ]
    rows(["episode", "answer", "by", "when, UTC", "disputed", "note"], lines, json)
