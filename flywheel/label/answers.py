"""Questions to people and what they answered, in the store; nothing of it is ever changed or removed.

    labels/questions/<turn>.json             Questions: what a turn's labels were unsure of
    labels/answers/<episode>/<time>-<hash>   Answer: who said what, when, and on which evidence

An answer carries the votes and numbers that it was given on, so later turns learn from it although the
episode is not theirs. Whoever answers twice has changed their mind: the newer counts. People who disagree
are both kept; an aspect on which as many say one thing as another teaches nothing, and is shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import Field, field_validator

from flywheel.aspects import WORDS, Aspect
from flywheel.errors import Conflict, NotFound, StageError
from flywheel.schema import Strict, sha256_bytes
from flywheel.store import Store

QUESTIONS = "labels/questions"
ANSWERS = "labels/answers"
EPISODE = r"^[0-9a-f-]{36}$"

Name = Annotated[str, Field(min_length=1, max_length=200)]
Words = Mapping[Aspect, str]


class Evidence(Strict):
    """What a label rests on: votes by aspect and function, and the classifier's numbers."""

    votes: Mapping[Aspect, Mapping[str, str]]
    features: Mapping[str, float]


class Said(Strict):
    """A word and how sure it is."""

    word: str
    confidence: Annotated[float, Field(ge=0, le=1)]


class Question(Strict):
    """An episode of which people are asked. ``why``: its labels are unsure, or it was drawn to audit them."""

    episode_id: str = Field(pattern=EPISODE)
    site: str
    robot: str
    prefix: str
    task: str
    why: Literal["unsure", "audit"]
    worth: float  # uncertainty × episodes of its kind that nobody was asked about yet
    cluster: str
    cluster_size: int
    labels: Mapping[Aspect, Said]
    cause_why: str
    evidence: Evidence


class Questions(Strict):
    """``queue.json``: at most ``label.budget`` questions, the one that is worth most first."""

    schema_version: Literal[1] = 1
    budget: int
    unsure: int  # episodes with an unsure label, asked about or not
    questions: tuple[Question, ...]


class Answer(Strict):
    """One person's word. Aspects that were not answered are absent."""

    schema_version: Literal[1] = 1
    episode_id: str = Field(pattern=EPISODE)
    words: dict[Aspect, str] = Field(min_length=1)
    by: Name
    t_unix_ns: int = Field(ge=0)
    note: Annotated[str, Field(max_length=2000)] = ""
    evidence: Evidence | None = None
    audit: bool = False

    @field_validator("words")
    @classmethod
    def _known(cls, words: dict[Aspect, str]) -> dict[Aspect, str]:
        for aspect, word in words.items():
            if word not in WORDS[aspect]:
                raise ValueError(f"{aspect} = {word!r}: choose one of {', '.join(WORDS[aspect])}")
        return words

    @property
    def key(self) -> str:
        """Where it lies."""
        digest = sha256_bytes(self.to_bytes())[:12]
        return f"{ANSWERS}/{self.episode_id}/{self.t_unix_ns:020d}-{digest}.json"


class Answers(Strict):
    """``answers.json``: all that people have said so far, in the order of time."""

    schema_version: Literal[1] = 1
    answers: tuple[Answer, ...] = ()

    def of(self, episode_id: str) -> tuple[Answer, ...]:
        """Everything that was ever said of an episode."""
        return tuple(a for a in self.answers if a.episode_id == episode_id)

    def agreed(self) -> dict[str, dict[Aspect, str]]:
        """By episode, the word of each aspect that most people say; nothing where as many say another."""
        found: dict[str, dict[Aspect, str]] = {}
        for (episode_id, aspect), said in self._latest().items():
            counts = Counter(said.values()).most_common()
            if len(counts) == 1 or counts[0][1] > counts[1][1]:
                found.setdefault(episode_id, {})[aspect] = counts[0][0]
        return found

    def conflicts(self) -> dict[str, dict[Aspect, dict[str, str]]]:
        """By episode and aspect, who says what, where people disagree."""
        found: dict[str, dict[Aspect, dict[str, str]]] = {}
        for (episode_id, aspect), said in self._latest().items():
            if len(set(said.values())) > 1:
                found.setdefault(episode_id, {})[aspect] = said
        return found

    def evidence(self) -> dict[str, Evidence]:
        """By episode, the newest evidence that an answer was given on."""
        return {a.episode_id: a.evidence for a in self._ordered() if a.evidence is not None}

    def _latest(self) -> dict[tuple[str, Aspect], dict[str, str]]:
        found: dict[tuple[str, Aspect], dict[str, str]] = {}
        for a in self._ordered():
            for aspect, word in sorted(a.words.items()):
                found.setdefault((a.episode_id, aspect), {})[a.by] = word
        return found

    def _ordered(self) -> Sequence[Answer]:
        return sorted(self.answers, key=lambda a: (a.t_unix_ns, a.key))


def collect(store: Store) -> Answers:
    """Everything that people have answered."""
    keys = sorted(i.key for i in store.list(f"{ANSWERS}/"))
    return Answers(answers=tuple(store.get_json(k, Answer) for k in keys))


def ask(store: Store, turn: str, questions: Questions) -> None:
    """Publish a turn's questions; a repeat replaces them by the same."""
    store.put(f"{QUESTIONS}/{turn}.json", questions.to_bytes())


def asked(store: Store, turn: str) -> Questions:
    """What a turn asked; no questions where it has not come so far."""
    try:
        return store.get_json(f"{QUESTIONS}/{turn}.json", Questions)
    except NotFound:
        return Questions(budget=0, unsure=0, questions=())


def waiting(store: Store, turn: str = "") -> list[tuple[str, Question]]:
    """Questions that nobody has answered, with their turn, the one that is worth most first.

    With ``turn``, those of this turn alone. An episode that several turns ask about is listed once.
    """
    turns = [turn] if turn else _turns(store)
    answered = {i.key.split("/")[2] for i in store.list(f"{ANSWERS}/")}
    found: dict[str, tuple[str, Question]] = {}
    for name in sorted(turns):
        found |= {q.episode_id: (name, q) for q in asked(store, name).questions}
    open_ = [x for k, x in found.items() if k not in answered]
    return sorted(open_, key=lambda x: (-x[1].worth, x[1].episode_id))


def find(store: Store, episode_id: str) -> Question | None:
    """The newest question about an episode; None if nobody asked."""
    for turn in sorted(_turns(store), reverse=True):
        for q in asked(store, turn).questions:
            if q.episode_id == episode_id:
                return q
    return None


def answer(
    store: Store,
    episode_id: str,
    words: Words,
    by: str,
    t_unix_ns: int,
    *,
    note: str = "",
    evidence: Evidence | None = None,
) -> Answer:
    """Keep what a person says. ``evidence`` is the question's unless it is given.

    Raises ``StageError`` for words that no aspect has, for none at all, and for an episode of which there is
    neither a question nor evidence: such an answer could teach nothing.
    """
    question = find(store, episode_id)
    if evidence is None and question is None:
        raise StageError(f"{episode_id}: nothing was asked about it; `flywheel label queue` lists what was")
    try:
        said = Answer(
            episode_id=episode_id,
            words=dict(words),
            by=by,
            t_unix_ns=t_unix_ns,
            note=note,
            evidence=evidence or (question.evidence if question else None),
            audit=question is not None and question.why == "audit",
        )
    except ValueError as e:
        raise StageError(_why(e)) from None
    with suppress(Conflict):  # the same word at the same instant: it is there
        store.create(said.key, said.to_bytes())
    return said


def shown(question: Question, turn: str) -> str:
    """The question in Markdown, as the person who is asked sees it."""
    lines = [
        f"**{question.robot}** at {question.site}{turn and f', {turn}'}: “{question.task}”",
        "",
        f"{question.cluster_size} episodes of this kind"
        + ("." if question.why == "unsure" else "; drawn at random, to check how sure the labels may be."),
        "",
        "| Question | Label | Confidence | Functions that said otherwise |",
        "|---|---|---|---|",
    ]
    for aspect, said in question.labels.items():
        others = (f"{f}: {w}" for f, w in sorted(question.evidence.votes.get(aspect, {}).items()))
        against = ", ".join(o for o in others if not o.endswith(f": {said.word}"))
        lines.append(f"| {aspect.replace('_', ' ')} | {said.word} | {said.confidence:.2f} | {against} |")
    lines += [
        "",
        f"Why this cause: {question.cause_why}",
        "",
        f"`flywheel explain {question.episode_id}` shows all of it.",
    ]
    return "\n".join(lines)


def _turns(store: Store) -> Iterable[str]:
    names = (i.key.removeprefix(f"{QUESTIONS}/") for i in store.list(f"{QUESTIONS}/"))
    return [n.removesuffix(".json") for n in names]


def _why(e: ValueError) -> str:
    errors = getattr(e, "errors", None)
    if errors is None:
        return str(e)
    first = errors()[0]
    where = ".".join(str(x) for x in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return message if where == "words" and "=" in message else f"{where} = {first['input']!r}: {message}"
