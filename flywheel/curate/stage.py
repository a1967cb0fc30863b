"""The stage: examine, select, write."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel import episode
from flywheel.config import CurateSettings
from flywheel.curate.clusters import CLUSTERS, Examples
from flywheel.curate.embed import Encoder, NoEncoder
from flywheel.curate.examine import Candidate, read_frames
from flywheel.curate.repeats import check_together
from flywheel.curate.select import Selected, identity, select
from flywheel.curate.spread import examine_all
from flywheel.dataset import Clip, Jpegs, dataset_digest, write_dataset
from flywheel.dataset.yardstick import SOURCES, Source, Sources, Yardstick, read_sources
from flywheel.errors import EpisodeError, StageError
from flywheel.schema import Strict, sha256_file

DATASET = "dataset"
SELECTION = "selection.parquet"
METRICS = "curate.json"

OnProgress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many

SELECTION_SCHEMA = pa.schema(
    [
        pa.field("episode_id", pa.string(), False),  # the directory's name where the manifest is unreadable
        pa.field("directory", pa.string(), False),
        pa.field("taken", pa.bool_(), False),
        pa.field("reason", pa.string(), False),  # code; quarantine:<code> for damaged ones
        pa.field("why", pa.string(), False),
        pa.field("site", pa.string(), False),
        pa.field("robot", pa.string(), False),
        pa.field("task", pa.string(), False),
        pa.field("shift", pa.string(), False),
        pa.field("outcome", pa.string(), False),
        pa.field("failure_mode", pa.string(), False),
        pa.field("frames", pa.int64(), False),
        pa.field("frames_used", pa.int64(), False),
        pa.field("dataset_episodes", pa.list_(pa.int64()), False),  # episode_index of each stretch used
        pa.field("policy_digest", pa.string(), False),
        pa.field("content_sha256", pa.string(), False),  # over the three tables; "" where unreadable
        pa.field("phase", pa.string(), False),  # where in the task it failed; "" where nothing was usable
        pa.field("cluster", pa.string(), False),  # failures of one kind; "" for what was not compared
        pa.field("held_out", pa.bool_(), False),  # kept for evaluation, in this turn and in all others
        pa.field("weight", pa.float64(), False),  # frequency × cost; 0 for what was not to be chosen from
        pa.field("nearest_taken", pa.float64()),  # distance, m; null where nothing of its task was taken
    ]
)


class ClusterCounts(Strict):
    """Of one kind of failure: what came in and what became of it. ``held_out`` includes the yardstick's."""

    name: str
    task: str
    failure_mode: str
    phase: str
    episodes: int
    distinct: int
    held_out: int
    taken: int
    weight: float


class CurateResult(Strict):
    """``curate.json``: what came in, what was taken, and what the dataset is called."""

    schema_version: Literal[1] = 1
    candidates: int
    taken: int
    left_out: int
    quarantined: int
    frames: int
    dataset_episodes: int
    reasons: dict[str, int]
    tasks: dict[str, int]  # taken episodes by instruction
    failure_modes: dict[str, int]  # taken episodes by failure mode
    dataset_sha256: str  # names the dataset version
    selection_sha256: str
    choice: str = ""  # the rule that spent the budget
    held_out: int = 0
    yardstick_sha256: str = ""  # of the file; "" without one
    encoder: str = ""  # digest of the bundle whose encoder compared the episodes; "" for thumbnails
    no_encoder: str = ""  # and why
    clusters: tuple[ClusterCounts, ...] = ()


def curate(
    episodes_dir: Path,
    out: Path,
    settings: CurateSettings,
    on_progress: OnProgress | None = None,
    *,
    policy: Path | None = None,
    yardstick: Path | None = None,
    ray: str = "",
) -> CurateResult:
    """Examine every episode directory in ``episodes_dir``; write the dataset, its selection and metrics.

    Writes ``out/dataset`` (LeRobotDataset v3), ``out/selection.parquet`` (a row per candidate, by
    ``SELECTION_SCHEMA``) and ``out/curate.json``; each is replaced as a whole, and two curations of the same
    ``out`` wait for one another. ``policy``: a checkpoint with its bundle inside, by whose encoder episodes
    are compared, whose clusters keep their names and whose held-out episodes stay so. ``yardstick``: what is
    never trained on. ``ray``: a cluster that looks at the episodes (``Deployment.ray``).

    Raises:
        StageError: nothing is usable; the selection is written all the same.
        BundleError: the policy's bundle is missing or damaged.
        ConfigError: the yardstick cannot be read.
        ServiceError: the cluster does not answer.
    """
    tell = on_progress or (lambda what, done, of: None)
    if not episodes_dir.is_dir():
        raise StageError(f"{episodes_dir}: no such directory; pull episodes into it first")
    rule = Yardstick() if yardstick is None else Yardstick.load(yardstick)
    encoder, why = _encoder(policy)
    earlier = Examples() if policy is None else Examples.load(policy / CLUSTERS)
    before = None if policy is None else read_sources(policy)
    kept = () if before is None else before.kept
    directories = sorted(d for d in episodes_dir.iterdir() if d.is_dir() and not d.name.startswith("."))
    candidates = examine_all(directories, settings, lambda n, of: tell("examine", n, of), ray)
    check_together(candidates, settings.checks)
    names = {name for k in kept for name in (k.episode_id, k.content_sha256)}
    selected = select(candidates, settings, encoder, rule, earlier, why, names)
    taken = sorted((c for c in candidates if c.taken), key=lambda c: c.episode_id)
    index = 0
    for c in taken:
        c.dataset_episodes = tuple(range(index, index + len(c.stretches)))
        index += len(c.stretches)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _write_selection(out / SELECTION, candidates)
        if not taken:
            # What an earlier run left would pass for the result of this one.
            shutil.rmtree(out / DATASET, ignore_errors=True)
            (out / METRICS).unlink(missing_ok=True)
            reasons = ", ".join(f"{n} {r}" for r, n in Counter(c.reason for c in candidates).most_common())
            raise StageError(
                f"{episodes_dir}: none of {len(candidates)} episodes can be used"
                f" ({reasons or 'it is empty'}); {out / SELECTION} says why for each"
            )
        beside = {CLUSTERS: selected.examples.to_bytes(), SOURCES: _sources(candidates, kept).to_bytes()}
        digest = _write_dataset(out, taken, settings, beside, lambda done: tell("write", done, index))
        result = _result(candidates, taken, selected, digest, sha256_file(out / SELECTION)).model_copy(
            update={
                "choice": settings.choice,
                "yardstick_sha256": "" if yardstick is None else sha256_file(yardstick),
            }
        )
        _replace(out / METRICS, result.to_bytes())
    return result


def _encoder(policy: Path | None) -> tuple[Encoder | None, str]:
    """The policy's encoder, or why there is none. A bundle that is no bundle is an error, not a reason."""
    if policy is None:
        return None, "no policy was given"
    try:
        return Encoder.load(policy / "bundle" if (policy / "bundle").is_dir() else policy), ""
    except NoEncoder as e:
        return None, str(e)


def _sources(candidates: Sequence[Candidate], before: Sequence[Source]) -> Sources:
    """What the dataset is made of, and what must never meet it in training: now kept, or ``before``."""

    def listed(chosen: Sequence[Candidate]) -> tuple[Source, ...]:
        return tuple(
            Source(episode_id=c.episode_id, content_sha256=c.content_sha256, stretches=c.stretch_sha256)
            for c in sorted(chosen, key=identity)
        )

    now = listed([c for c in candidates if c.held_out])
    again = {k.episode_id for k in now}
    return Sources(
        used=listed([c for c in candidates if c.taken]),
        kept=(*(k for k in before if k.episode_id not in again), *now),
    )


def _clips(
    taken: Sequence[Candidate], settings: CurateSettings, done: Callable[[int], None]
) -> Iterator[Clip]:
    count = 0
    for c in taken:
        assert c.manifest is not None
        table = read_frames(c.directory, c.manifest, settings.cameras)
        for a, b in c.stretches:
            part = table.slice(a, b - a)
            yield Clip(
                task=part.column("instruction")[0].as_py(),
                images={
                    x: Jpegs(part.column(f"image.{x}").to_pylist(), (b - a, *c.view_shapes[x]))
                    for x in settings.cameras
                },
                state=episode.as_array(part, "state"),
                action=episode.as_array(part, "action"),
                capture_time_ns=episode.as_array(part, "t_ns") + c.manifest.clock_epoch_ns,
                intervention=episode.as_array(part, "intervention").astype(bool),
            )
            count += 1
            done(count)


def _write_dataset(
    out: Path,
    taken: Sequence[Candidate],
    settings: CurateSettings,
    beside: Mapping[str, bytes],
    done: Callable[[int], None],
) -> str:
    manifest = taken[0].manifest
    assert manifest is not None
    fresh, old = out / f".{DATASET}.new", out / f".{DATASET}.old"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write_dataset(fresh, _clips(taken, settings, done), fps=round(manifest.policy_hz))
    except EpisodeError as e:
        raise StageError(f"an episode changed while it was curated; start again: {e}") from None
    for name, data in beside.items():
        (fresh / name).write_bytes(data)
    digest = dataset_digest(fresh)
    if (out / DATASET).exists():
        (out / DATASET).rename(old)
    fresh.rename(out / DATASET)
    shutil.rmtree(old, ignore_errors=True)
    return digest


def _write_selection(path: Path, candidates: Sequence[Candidate]) -> None:
    rows = []
    for c in sorted(candidates, key=identity):
        m = c.manifest
        rows.append(
            {
                "episode_id": c.episode_id,
                "directory": c.directory.name,
                "taken": c.taken,
                "reason": c.reason,
                "why": c.why,
                "site": m.site if m else "",
                "robot": m.robot if m else "",
                "task": m.task if m else "",
                "shift": m.shift if m else "",
                "outcome": m.outcome.value if m else "",
                "failure_mode": c.failure_mode,
                "frames": c.frames,
                "frames_used": c.frames_used,
                "dataset_episodes": list(c.dataset_episodes),
                "policy_digest": m.policy_digest if m else "",
                "content_sha256": c.content_sha256,
                "phase": c.phase,
                "cluster": c.cluster,
                "held_out": c.held_out,
                "weight": c.weight,
                "nearest_taken": c.nearest,
            }
        )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA), sink)
    _replace(path, sink.getvalue().to_pybytes())


def _result(
    candidates: Sequence[Candidate],
    taken: Sequence[Candidate],
    selected: Selected,
    digest: str,
    selection: str,
) -> CurateResult:
    quarantined = sum(c.reason.startswith("quarantine:") for c in candidates)
    return CurateResult(
        candidates=len(candidates),
        taken=len(taken),
        left_out=len(candidates) - len(taken) - quarantined,
        quarantined=quarantined,
        frames=sum(c.frames_used for c in taken),
        dataset_episodes=sum(len(c.stretches) for c in taken),
        reasons=dict(sorted(Counter(c.reason for c in candidates).items())),
        tasks=dict(sorted(Counter(c.manifest.task for c in taken if c.manifest).items())),
        failure_modes=dict(sorted(Counter(c.failure_mode for c in taken).items())),
        dataset_sha256=digest,
        selection_sha256=selection,
        held_out=sum(c.held_out for c in candidates),
        encoder=selected.scale.encoder,
        no_encoder=selected.scale.why,
        clusters=_clusters(candidates),
    )


def _clusters(candidates: Sequence[Candidate]) -> tuple[ClusterCounts, ...]:
    members: dict[str, list[Candidate]] = {}
    for c in sorted((c for c in candidates if c.cluster), key=identity):
        members.setdefault(c.cluster, []).append(c)
    return tuple(
        ClusterCounts(
            name=name,
            task=group[0].manifest.task if group[0].manifest else "",
            failure_mode=group[0].failure_mode,
            phase=group[0].phase,
            episodes=len(group),
            distinct=sum(not c.reason.startswith("near_") for c in group),
            held_out=sum(c.held_out for c in group),
            taken=sum(c.taken for c in group),
            weight=round(sum(c.weight for c in group), 6),
        )
        for name, group in sorted(members.items())
    )


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    episode.write_durably(partial, data)
    partial.replace(path)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold ``directory`` against another curation; the lock goes with the process, whatever ends it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
