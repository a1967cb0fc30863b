"""The stages of the wheel as commands: what DVC, Airflow and people call alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flywheel.cli.output import Bar, Json, show
from flywheel.config import PARAMS_FILE, Deployment, Settings
from flywheel.errors import EpisodeError

Params = Annotated[Path, typer.Option(help="Settings file.")]
PARAMS = Path(PARAMS_FILE)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (replay, curate, train, export, gate, evaluate):
        app.command("eval" if command is evaluate else command.__name__)(command)


def replay(
    out: Annotated[Path, typer.Option(help="Dataset directory to write.")],
    params: Params = PARAMS,
    json: Json = False,
) -> None:
    """Write demonstrations of the task in the lab, for replay in training."""
    import shutil
    from collections.abc import Iterator

    import numpy as np

    from flywheel.dataset import Clip, dataset_digest, write_dataset
    from flywheel.twin.demonstrate import STEP_S, demonstrate
    from flywheel.twin.sampling import ACTION_NAMES, STATE_NAMES
    from flywheel.twin.shift import shift

    settings = Settings.load(params).replay
    count = 0
    with Bar("replay") as bar:

        def clips() -> Iterator[Clip]:
            nonlocal count
            for run in demonstrate(shift(settings.shift), settings.episodes, settings.seed):
                n = len(run.states)
                times = np.arange(n, dtype=np.int64) * round(STEP_S * 1e9)
                count += 1
                bar.to(count, settings.episodes)
                yield Clip(
                    run.instruction, {"wrist": run.images}, run.states, run.actions, times, np.ones(n, bool)
                )

        shutil.rmtree(out, ignore_errors=True)
        write_dataset(out, clips(), round(1 / STEP_S), STATE_NAMES, ACTION_NAMES)
    show({"episodes": count, "shift": settings.shift, "dataset_sha256": dataset_digest(out)}, json)


def curate(
    episodes: Annotated[Path, typer.Option(help="Directory of pulled episodes.")],
    out: Annotated[Path, typer.Option(help="Where dataset/, selection.parquet and curate.json go.")],
    policy: Annotated[
        Path | None, typer.Option(help="Checkpoint by whose encoder episodes are compared.")
    ] = None,
    yardstick: Annotated[Path | None, typer.Option(help="What is kept for evaluation, JSON.")] = None,
    params: Params = PARAMS,
    json: Json = False,
) -> None:
    """Validate, deduplicate and select episodes; build a LeRobotDataset v3."""
    from flywheel.curate import curate as run

    settings = Settings.load(params).curate
    with Bar("curate") as bar:

        def on_progress(what: str, n: int, of: int) -> None:
            bar.to(n, of, what)

        ray = Deployment.from_env().ray
        found = run(episodes, out, settings, on_progress, policy=policy, yardstick=yardstick, ray=ray)
    show(found, json)


def train(
    policy: Annotated[Path, typer.Option(help="Checkpoint to start from.")],
    dataset: Annotated[Path, typer.Option(help="LeRobotDataset v3 of corrections.")],
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")],
    replay: Annotated[Path | None, typer.Option(help="LeRobotDataset v3 of the lab, to mix in.")] = None,
    earlier: Annotated[
        Path | None, typer.Option(help="Directory of earlier turns' datasets and earlier.json, to mix in.")
    ] = None,
    yardstick: Annotated[Path | None, typer.Option(help="What is kept for evaluation, JSON.")] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="JSON of figures; the loss curve goes beside it.")
    ] = None,
    params: Params = PARAMS,
    json: Json = False,
) -> None:
    """Fine-tune a policy with lerobot's training loop."""
    from flywheel.dataset.earlier import read_earlier
    from flywheel.train import train as run
    from flywheel.train import write_metrics

    settings = Settings.load(params).train
    before = [d for _, d in read_earlier(earlier)][: settings.earlier_turns] if earlier else []
    curve = metrics.with_suffix(".tsv") if metrics else None
    result = run(
        policy, dataset, out, settings, replay=replay, earlier=before, yardstick=yardstick, curve=curve
    )
    if metrics:
        write_metrics(result, metrics)
    show(result, json)


def export(
    checkpoint: Annotated[Path, typer.Option(help="lerobot checkpoint.")],
    out: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    name: Annotated[str, typer.Option(help="Name of the policy.")] = "pick-and-place",
    limits: Annotated[Path | None, typer.Option(help="Limits file that it was trained under.")] = None,
    observations: Annotated[
        Path | None, typer.Option(help="LeRobotDataset v3 to compare on; default noise.")
    ] = None,
    metrics: Annotated[Path | None, typer.Option(help="JSON of figures.")] = None,
    params: Params = PARAMS,
    json: Json = False,
) -> None:
    """Export a checkpoint as one ONNX bundle, checked against PyTorch."""
    from flywheel.export import export as run
    from flywheel.export.stage import write_metrics
    from flywheel.robot.twin import LIMITS_FILE
    from flywheel.schema import sha256_file

    settings = Settings.load(params).export
    result = run(
        checkpoint,
        out,
        settings,
        name=name,
        limits_sha256=sha256_file(limits or LIMITS_FILE),
        observations=observations,
    )
    if metrics:
        metrics.parent.mkdir(parents=True, exist_ok=True)
        write_metrics(result, metrics)
    show(result, json)


def gate(
    candidate: Annotated[Path, typer.Option(help="Bundle to judge.")],
    current: Annotated[Path, typer.Option(help="Bundle that the fleet runs.")],
    out: Annotated[Path, typer.Option(help="Where gate.json, .html and .xml go.")],
    episodes: Annotated[
        Path | None, typer.Option(help="Failures that led here; their scenes are replayed.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default one a core.")] = None,
    params: Params = PARAMS,
    json: Json = False,
) -> None:
    """Judge a candidate against the current policy: promote, hold or roll back."""
    from flywheel.episode import read_manifest
    from flywheel.gate import failure_scenarios, whole_digest
    from flywheel.gate import gate as run

    settings = Settings.load(params).gate
    manifests = []
    for path in sorted(episodes.glob("*/manifest.json")) if episodes else ():
        try:
            manifests.append(read_manifest(path.parent))
        except EpisodeError:
            continue  # curation has quarantined it by name
    of = whole_digest(current)
    with Bar("gate") as bar:
        report = run(
            candidate,
            current,
            out,
            settings,
            scenarios=failure_scenarios(manifests),
            of_current=failure_scenarios(m for m in manifests if m.policy_digest == of),
            workers=workers,
            on_progress=lambda what, n, of: bar.to(n, of, what),
        )
    show(report, json, title=f"{report.verdict}: {'; '.join(report.reasons) or 'every check promotes'}")


def evaluate(
    policy: Annotated[Path, typer.Option(help="A bundle, or a checkpoint with bundle/ inside.")],
    shift: Annotated[str, typer.Option(help="Named shift of the twin.")] = "factory",
    episodes: Annotated[int, typer.Option(min=1, help="Attempts.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default one a core.")] = None,
    json: Json = False,
) -> None:
    """Measure a policy's success in the twin, in lockstep."""
    from flywheel.evaluate import evaluate as run
    from flywheel.twin.shift import shift as known

    known(shift)
    bundle = policy / "bundle" if (policy / "bundle").is_dir() else policy
    with Bar(f"eval {shift}") as bar:
        result = run(bundle, shift, episodes, seed, workers, bar.to)
    show(result, json)
