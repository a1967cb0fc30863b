"""The stage: a label for every sound episode, with its evidence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel import episode
from flywheel.config import LabelSettings
from flywheel.episode import Episode
from flywheel.errors import StageError
from flywheel.label.functions import Cause, FailureMode, Vote, cause, tally, vote
from flywheel.label.signals import Signals, signals
from flywheel.schema import Strict, sha256_bytes

LABELS = "labels.parquet"
METRICS = "labels.json"

OnProgress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many

LABELS_SCHEMA = pa.schema(
    [
        pa.field("episode_id", pa.string(), False),
        pa.field("task", pa.string(), False),
        pa.field("shift", pa.string(), False),
        pa.field("seed", pa.int64()),  # null on a real robot
        pa.field("policy_digest", pa.string(), False),
        pa.field("outcome", pa.string(), False),  # of the policy's attempt
        pa.field("operator_outcome", pa.string(), False),  # "" if nobody intervened
        pa.field("failure_mode", pa.string(), False),
        pa.field("phase", pa.string(), False),  # approach | grasp | carry | place; "" if it succeeded
        pa.field("failed_ns", pa.int64(), False),  # on the episode's clock
        pa.field(
            "interventions",
            pa.list_(pa.struct([pa.field("start_ns", pa.int64()), pa.field("end_ns", pa.int64())])),
            False,
        ),
        pa.field("cause", pa.string(), False),
        pa.field("cause_why", pa.string(), False),
        pa.field("confidence", pa.float64(), False),
        pa.field("needs_review", pa.bool_(), False),
        pa.field("votes", pa.string(), False),  # JSON: labelling function -> failure mode
    ]
)


class LabelResult(Strict):
    """``labels.json``: what was found, and how sure the labels are."""

    schema_version: Literal[1] = 1
    episodes: int
    unreadable: tuple[str, ...]  # directories without a label, by name
    needs_review: int
    mean_confidence: float
    outcomes: dict[str, int]
    failure_modes: dict[str, int]
    phases: dict[str, int]
    causes: dict[str, int]
    labels_sha256: str


@dataclass(frozen=True)
class Label:
    """What is said of one episode, and by which functions."""

    signals: Signals
    failure_mode: FailureMode
    confidence: float
    needs_review: bool
    cause: Cause
    cause_why: str
    votes: tuple[Vote, ...]

    @property
    def phase(self) -> str:
        return "" if self.failure_mode is FailureMode.NONE else self.signals.phase


def label_episode(e: Episode, settings: LabelSettings) -> Label:
    """Label one sound episode; pure."""
    s = signals(e)
    votes = vote(s)
    mode, confidence = tally(votes)
    why = cause(s, mode)
    review = confidence < settings.min_confidence or mode is FailureMode.UNKNOWN
    return Label(s, mode, confidence, review, *why, tuple(votes))


def label(
    episodes_dir: Path, out: Path, settings: LabelSettings, on_progress: OnProgress | None = None
) -> LabelResult:
    """Label every episode in ``episodes_dir``; write ``out/labels.parquet`` and ``out/labels.json``.

    Damaged episodes get no label and are named in the result. Raises ``StageError`` when no episode can be
    labelled.
    """
    tell = on_progress or (lambda what, done, of: None)
    if not episodes_dir.is_dir():
        raise StageError(f"{episodes_dir}: no such directory; pull episodes into it first")
    directories = sorted(d for d in episodes_dir.iterdir() if d.is_dir() and not d.name.startswith("."))
    labels: dict[str, Label] = {}
    unreadable = []
    for i, directory in enumerate(directories):
        if any(p.fatal for p in episode.verify(directory)):
            unreadable.append(directory.name)
        else:
            e = episode.read(directory)
            labels.setdefault(e.manifest.episode_id, label_episode(e, settings))
        tell("label", i + 1, len(directories))
    if not labels:
        raise StageError(
            f"{episodes_dir}: none of {len(directories)} episodes can be labelled;"
            " `flywheel episodes verify` says why"
        )
    rows = [_row(labels[k]) for k in sorted(labels)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=LABELS_SCHEMA), sink)
    data = sink.getvalue().to_pybytes()
    result = LabelResult(
        episodes=len(rows),
        unreadable=tuple(unreadable),
        needs_review=sum(x.needs_review for x in labels.values()),
        mean_confidence=round(sum(x.confidence for x in labels.values()) / len(labels), 6),
        outcomes=_count(rows, "outcome"),
        failure_modes=_count(rows, "failure_mode"),
        phases=_count([r for r in rows if r["phase"]], "phase"),
        causes=_count(rows, "cause"),
        labels_sha256=sha256_bytes(data),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, content in ((LABELS, data), (METRICS, result.to_bytes())):
        partial = out / f".{name}.partial"
        episode.write_durably(partial, content)
        partial.replace(out / name)
    return result


def _row(x: Label) -> dict[str, object]:
    m = x.signals.manifest
    return {
        "episode_id": m.episode_id,
        "task": m.task,
        "shift": m.shift,
        "seed": m.seed,
        "policy_digest": m.policy_digest,
        "outcome": m.outcome.value,
        "operator_outcome": m.operator_outcome.value if m.operator_outcome else "",
        "failure_mode": x.failure_mode.value,
        "phase": x.phase,
        "failed_ns": x.signals.failed_ns,
        "interventions": [{"start_ns": a, "end_ns": b} for a, b in x.signals.interventions],
        "cause": x.cause.value,
        "cause_why": x.cause_why,
        "confidence": x.confidence,
        "needs_review": x.needs_review,
        "votes": json.dumps({v.function: v.mode.value for v in x.votes}),
    }


def _count(rows: list[dict[str, object]], key: str) -> dict[str, int]:
    return dict(sorted(Counter(str(r[key]) for r in rows).items()))
