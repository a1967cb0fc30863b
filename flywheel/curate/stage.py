"""The stage: examine, select, write."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flywheel import episode
from flywheel.config import CurateSettings
from flywheel.curate.examine import Candidate, examine, read_frames
from flywheel.curate.pictures import decoded
from flywheel.curate.repeats import check_together
from flywheel.curate.select import identity, select
from flywheel.dataset import Clip, dataset_digest, write_dataset
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
    ]
)


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


def curate(
    episodes_dir: Path, out: Path, settings: CurateSettings, on_progress: OnProgress | None = None
) -> CurateResult:
    """Examine every episode directory in ``episodes_dir``; write the dataset, its selection and metrics.

    Writes ``out/dataset`` (LeRobotDataset v3), ``out/selection.parquet`` (a row per candidate, by
    ``SELECTION_SCHEMA``) and ``out/curate.json``; each is replaced as a whole, and two curations of the same
    ``out`` wait for one another. Raises ``StageError`` when nothing is usable; the selection is written all
    the same.
    """
    tell = on_progress or (lambda what, done, of: None)
    if not episodes_dir.is_dir():
        raise StageError(f"{episodes_dir}: no such directory; pull episodes into it first")
    directories = sorted(d for d in episodes_dir.iterdir() if d.is_dir() and not d.name.startswith("."))
    candidates = []
    for i, directory in enumerate(directories):
        candidates.append(examine(directory, settings))
        tell("examine", i + 1, len(directories))
    check_together(candidates, settings.checks)
    select(candidates, settings)
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
        digest = _write_dataset(out, taken, settings, lambda done: tell("write", done, index))
        result = _result(candidates, taken, digest, sha256_file(out / SELECTION))
        _replace(out / METRICS, result.to_bytes())
    return result


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
                images={x: decoded(part, x, np.arange(b - a)) for x in settings.cameras},
                state=episode.as_array(part, "state"),
                action=episode.as_array(part, "action"),
                capture_time_ns=episode.as_array(part, "t_ns") + c.manifest.clock_epoch_ns,
                intervention=episode.as_array(part, "intervention").astype(bool),
            )
            count += 1
            done(count)


def _write_dataset(
    out: Path, taken: Sequence[Candidate], settings: CurateSettings, done: Callable[[int], None]
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
            }
        )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA), sink)
    _replace(path, sink.getvalue().to_pybytes())


def _result(
    candidates: Sequence[Candidate], taken: Sequence[Candidate], digest: str, selection: str
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
