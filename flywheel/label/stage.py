"""The stage: a label of every aspect for every sound episode, with its evidence, and what to ask people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from flywheel import episode
from flywheel.aspects import Aspect, Cause, FailureMode
from flywheel.config import LabelSettings
from flywheel.episode import Episode
from flywheel.errors import StageError
from flywheel.label.answers import Answers, Evidence, Question, Questions, Said
from flywheel.label.choosing import choose
from flywheel.label.functions import Vote
from flywheel.label.labelling import UNTAUGHT, Labellers, Word, evidence, learn, reason, words_of
from flywheel.label.pictures import Familiar
from flywheel.label.signals import Signals, signals
from flywheel.schema import Strict, sha256_bytes

LABELS = "labels.parquet"
METRICS = "labels.json"
QUEUE = "queue.json"
SELECTION = "selection.parquet"
TRUSTED = 0.9  # a function that is right so often and is overruled is a reason to ask

OnProgress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many

_SPAN = [pa.field("start_ns", pa.int64()), pa.field("end_ns", pa.int64())]
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
        pa.field("interventions", pa.list_(pa.struct(_SPAN)), False),
        pa.field("cause", pa.string(), False),
        pa.field("cause_why", pa.string(), False),
        pa.field("confidence", pa.float64(), False),  # of the failure mode
        pa.field("needs_review", pa.bool_(), False),
        pa.field("votes", pa.string(), False),  # JSON: aspect -> labelling function -> word
        pa.field("outcome_confidence", pa.float64(), False),
        pa.field("phase_confidence", pa.float64(), False),
        pa.field("cause_confidence", pa.float64(), False),
        pa.field("intervention_confidence", pa.float64(), False),  # that there was one, or none
        pa.field("phases", pa.list_(pa.struct([pa.field("phase", pa.string()), *_SPAN])), False),
        pa.field("said_by", pa.list_(pa.string()), False),  # aspects that people decided
        pa.field("features", pa.string(), False),  # JSON: the classifier's numbers
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
    answers: int = 0  # episodes that people have answered for, of all turns
    conflicts: tuple[str, ...] = ()  # episodes of which people say different things
    asked: int = 0  # questions to people
    novelty_why: str = ""  # why novelty was not measured; "" where it was
    accuracies: Mapping[str, float] = {}  # "aspect.function": learned probability of being right
    calibration: Mapping[str, tuple[float, float]] = {}  # by aspect: slope and offset of the log-odds


@dataclass(frozen=True)
class Label:
    """What is said of one episode, and by which functions."""

    signals: Signals
    evidence: Evidence
    words: Mapping[Aspect, Word]
    votes: tuple[Vote, ...]
    needs_review: bool

    @property
    def failure_mode(self) -> FailureMode:
        return FailureMode(self.words[Aspect.FAILURE_MODE].word)

    @property
    def confidence(self) -> float:
        """Of the failure mode."""
        return self.words[Aspect.FAILURE_MODE].confidence

    @property
    def cause(self) -> Cause:
        return Cause(self.words[Aspect.CAUSE].word)

    @property
    def cause_why(self) -> str:
        said = self.words[Aspect.CAUSE]
        return "a person said so" if said.by_person else reason(self.votes, said.word)

    @property
    def phase(self) -> str:
        """Where in the task it failed; "" if it did not."""
        if self.failure_mode is FailureMode.NONE:
            return ""
        word = self.words[Aspect.PHASE].word
        return "" if word == "none" else word


def label_episode(
    e: Episode,
    settings: LabelSettings,
    labellers: Labellers = UNTAUGHT,
    *,
    said: Mapping[Aspect, str] | None = None,
    familiar: Familiar | None = None,
) -> Label:
    """Label one sound episode; pure. ``said``: what people agree on of this episode."""
    return _label(signals(e, familiar), settings, labellers, said)


def _label(
    s: Signals, settings: LabelSettings, labellers: Labellers, said: Mapping[Aspect, str] | None
) -> Label:
    found, votes = evidence(s)
    words = words_of(found, labellers, said)
    decisive = (Aspect.FAILURE_MODE, Aspect.CAUSE)
    unsure = any(words[a].confidence < settings.min_confidence for a in decisive)
    unknown = words[Aspect.FAILURE_MODE].word == FailureMode.UNKNOWN
    contradicted = any(
        v.aspect in decisive
        and v.word != words[v.aspect].word
        and labellers[v.aspect].trust(v.aspect, v.function) >= TRUSTED
        for v in votes
    )
    review = (unsure or unknown or contradicted) and not all(words[a].by_person for a in decisive)
    return Label(s, found, words, votes, review)


def label(
    episodes_dir: Path,
    out: Path,
    settings: LabelSettings,
    on_progress: OnProgress | None = None,
    *,
    curated: Path | None = None,
    answers: Answers | None = None,
    familiar: Familiar | str = "no policy was given",
) -> LabelResult:
    """Label every episode in ``episodes_dir``.

    Writes ``out/labels.parquet`` (a row per episode, by ``LABELS_SCHEMA``), ``out/queue.json`` (whom to ask
    about what) and ``out/labels.json``. ``curated``: the output of curate, whose clusters say how many
    episodes an answer speaks for; ``answers``: what people have said so far; ``familiar``: what the policy
    was trained on, or why that is not known.

    Damaged episodes get no label and are named in the result. Raises ``StageError`` when no episode can be
    labelled.
    """
    tell = on_progress or (lambda what, done, of: None)
    answers = answers or Answers()
    if not episodes_dir.is_dir():
        raise StageError(f"{episodes_dir}: no such directory; pull episodes into it first")
    directories = sorted(d for d in episodes_dir.iterdir() if d.is_dir() and not d.name.startswith("."))
    seen: dict[str, Signals] = {}
    unreadable = []
    for i, directory in enumerate(directories):
        if any(p.fatal for p in episode.verify(directory)):
            unreadable.append(directory.name)
        else:
            e = episode.read(directory)
            known = None if isinstance(familiar, str) else familiar
            if e.manifest.episode_id not in seen:
                seen[e.manifest.episode_id] = signals(e, known)
        tell("label", i + 1, len(directories))
    if not seen:
        raise StageError(
            f"{episodes_dir}: none of {len(directories)} episodes can be labelled;"
            " `flywheel episodes verify` says why"
        )
    labellers = learn({k: evidence(s)[0] for k, s in seen.items()}, answers)
    said = answers.agreed()
    labels = {k: _label(seen[k], settings, labellers, said.get(k)) for k in sorted(seen)}
    questions = _questions(labels, settings, answers, _clusters(curated))
    rows = [_row(x) for x in labels.values()]
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
        answers=len({a.episode_id for a in answers.answers}),
        conflicts=tuple(sorted(answers.conflicts())),
        asked=len(questions.questions),
        novelty_why=familiar if isinstance(familiar, str) else "",
        accuracies={f"{a}.{f}": v for a, x in labellers.items() for f, v in x.model.accuracy.items()},
        calibration={a: (x.calibration.slope, x.calibration.offset) for a, x in labellers.items()},
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, content in ((LABELS, data), (QUEUE, questions.to_bytes()), (METRICS, result.to_bytes())):
        partial = out / f".{name}.partial"
        episode.write_durably(partial, content)
        partial.replace(out / name)
    return result


def read_answers(path: Path | None) -> Answers:
    """``answers.json`` of a turn; none without a path. Raises ``StageError`` for a file that is none."""
    if path is None:
        return Answers()
    try:
        return Answers.model_validate_json(path.read_bytes())
    except OSError as e:
        raise StageError(f"{path}: cannot be read: {e.strerror or e}") from None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "document"
        raise StageError(f"{path}: {where}: {first['msg']}") from None


def _clusters(curated: Path | None) -> dict[str, str]:
    """The kind of each episode that curate compared with others."""
    path = None if curated is None else curated / SELECTION
    if path is None or not path.is_file():
        return {}
    try:
        rows = pq.read_table(path, columns=["episode_id", "cluster"]).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as e:
        raise StageError(f"{path}: cannot be read; run curate again: {e}") from None
    return {str(r["episode_id"]): str(r["cluster"]) for r in rows if r["cluster"]}


def _questions(
    labels: Mapping[str, Label], settings: LabelSettings, answers: Answers, clusters: Mapping[str, str]
) -> Questions:
    kind = {
        k: clusters.get(k) or "/".join(filter(None, (x.failure_mode.value, x.phase, x.signals.manifest.task)))
        for k, x in labels.items()
    }
    size = Counter(kind.values())
    unsure = {
        k: 1.0 - min(x.words[Aspect.FAILURE_MODE].confidence, x.words[Aspect.CAUSE].confidence)
        for k, x in labels.items()
        if x.needs_review
    }
    answered = [a.episode_id for a in answers.answers]
    chosen = choose(unsure, kind, answered, settings.budget, settings.audit_fraction)
    return Questions(
        budget=settings.budget,
        unsure=len(unsure),
        questions=tuple(
            Question(
                episode_id=c.episode_id,
                site=labels[c.episode_id].signals.manifest.site,
                robot=labels[c.episode_id].signals.manifest.robot,
                prefix=labels[c.episode_id].signals.manifest.prefix,
                task=labels[c.episode_id].signals.manifest.task,
                why="audit" if c.why == "audit" else "unsure",
                worth=c.worth,
                cluster=kind[c.episode_id],
                cluster_size=size[kind[c.episode_id]],
                labels={
                    a: Said(word=w.word, confidence=w.confidence)
                    for a, w in labels[c.episode_id].words.items()
                },
                cause_why=labels[c.episode_id].cause_why,
                evidence=labels[c.episode_id].evidence,
            )
            for c in chosen
        ),
    )


def _row(x: Label) -> dict[str, object]:
    m = x.signals.manifest
    return {
        "episode_id": m.episode_id,
        "task": m.task,
        "shift": m.shift,
        "seed": m.seed,
        "policy_digest": m.policy_digest,
        "outcome": x.words[Aspect.OUTCOME].word,
        "operator_outcome": m.operator_outcome.value if m.operator_outcome else "",
        "failure_mode": x.failure_mode.value,
        "phase": x.phase,
        "failed_ns": x.signals.failed_ns,
        "interventions": [{"start_ns": a, "end_ns": b} for a, b in x.signals.interventions],
        "cause": x.cause.value,
        "cause_why": x.cause_why,
        "confidence": x.confidence,
        "needs_review": x.needs_review,
        "votes": json.dumps(x.evidence.votes, sort_keys=True),
        "outcome_confidence": x.words[Aspect.OUTCOME].confidence,
        "phase_confidence": x.words[Aspect.PHASE].confidence,
        "cause_confidence": x.words[Aspect.CAUSE].confidence,
        "intervention_confidence": x.words[Aspect.INTERVENTION].confidence,
        "phases": [{"phase": p.value, "start_ns": a, "end_ns": b} for p, a, b in x.signals.segments],
        "said_by": [a.value for a, w in x.words.items() if w.by_person],
        "features": json.dumps(x.evidence.features, sort_keys=True),
    }


def _count(rows: list[dict[str, object]], key: str) -> dict[str, int]:
    return dict(sorted(Counter(str(r[key]) for r in rows).items()))
