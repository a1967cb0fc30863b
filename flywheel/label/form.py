"""A turn's questions as one form that people fill in, and what comes back of it.

    labels/forms/<form>.json        Form: which episodes it asks about, in order; create-only

Fields are numbered, because a form's fields are fixed before its questions are known. A field that is left
empty answers nothing. What is not answered in a form can still be answered in the terminal; no episode is in
two forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import quote

from pydantic import Field

from flywheel.aspects import ASKED, NOTE, Aspect, field_name, fields
from flywheel.errors import Conflict, StageError
from flywheel.label.answers import Answer, Question, answer, asked, shown, waiting
from flywheel.schema import Strict, sha256_bytes
from flywheel.store import Store

FORMS = "labels/forms"


class Form(Strict):
    """Which questions a form holds: turn and episode, in the order of its fields."""

    schema_version: Literal[1] = 1
    questions: tuple[tuple[str, str], ...] = Field(max_length=100)


def make(store: Store, name: str, count: int) -> list[Question]:
    """The questions of the form ``name``: those of an earlier call, else at most ``count`` that are in no
    form yet and that nobody has answered, the ones that are worth most first."""
    key = _key(name)
    there = {i.key for i in store.list(f"{FORMS}/")}
    if key not in there:
        put = {e for k in there for _, e in store.get_json(k, Form).questions}
        chosen = [(t, q.episode_id) for t, q in waiting(store) if q.episode_id not in put][:count]
        if not chosen:
            return []
        with suppress(Conflict):  # another attempt was quicker: its choice counts
            store.create(key, Form(questions=tuple(chosen)).to_bytes())
    return _questions(store, name)


def body(questions: Sequence[Question], page: str = "/fleet") -> str:
    """The form's text, in Markdown: for each question what was recorded, a picture, a plot, the labels.

    ``page`` is where the fleet page is served, for the pictures.
    """
    parts = [
        "Say what you see, as far as you see it; leave the rest empty. What you say teaches the labels of "
        "the turns to come. Nothing waits for it.",
    ]
    for i, q in enumerate(questions, 1):
        at = quote(q.prefix, safe="")
        parts += [
            "",
            f"## {i}. {q.episode_id}",
            "",
            f"![The moment of failure]({page}/thumbnail?at={at})",
            "",
            f"![Modes, operator, tracking error over time]({page}/plot?at={at})",
            "",
            f"[Its whole timeline and every picture]({page}/failure?at={at})",
            "",
            shown(q, ""),
        ]
    return "\n".join(parts)


def keep(store: Store, name: str, given: Mapping[str, Any], by: str, t_unix_ns: int) -> list[Answer]:
    """Keep what came back of a form; repeated, it keeps the same once more.

    Raises ``StageError`` for answers of nobody, of which nothing is kept. It also raises for a word that is
    none of the field's and for a field that the form does not have, once all other answers are kept: a form
    that was sent cannot be sent again.
    """
    questions = _questions(store, name)
    known = fields(len(questions))
    note = str(given.get(NOTE) or "")
    answered = {k for k, v in given.items() if v not in ("", None)} - {NOTE}
    if answered and not by:
        raise StageError("answers of nobody: the form has to say who filled it in")
    refused = {}
    for field in sorted(answered):
        if field not in known:
            refused[field] = f"{field} = {given[field]!r}: the form asks {len(questions)} questions"
        elif given[field] not in known[field]["enum"]:
            choice = ", ".join(known[field]["enum"][1:])
            refused[field] = f"{field} = {given[field]!r}: choose one of {choice}, or nothing"
    said: list[tuple[str, dict[Aspect, str]]] = []
    for i, q in enumerate(questions, 1):
        names = {a: field_name(a, i) for a in ASKED}
        if words := {a: str(given[n]) for a, n in names.items() if n in answered - refused.keys()}:
            said.append((q.episode_id, words))
    kept = [answer(store, e, words, by, t_unix_ns, note=note[:2000]) for e, words in said]
    if refused:
        raise StageError(
            f"{'; '.join(refused.values())} (answers about {len(kept)} episodes are kept; give the rest with"
            " `flywheel label answer`)"
        )
    return kept


def _questions(store: Store, name: str) -> list[Question]:
    form = store.get_json(_key(name), Form)
    turns = {t: {q.episode_id: q for q in asked(store, t).questions} for t in {t for t, _ in form.questions}}
    gone = [e for t, e in form.questions if e not in turns[t]]
    if gone:  # numbers would shift, and words come to the wrong episode
        raise StageError(f"form {name}: the question about {gone[0]} is not in the store any more")
    return [turns[t][e] for t, e in form.questions]


def _key(name: str) -> str:
    return f"{FORMS}/{sha256_bytes(name.encode())[:24]}.json"
