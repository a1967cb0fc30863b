"""The page itself: everything about an episode put together, for the terminal and as one HTML file."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flywheel import episode
from flywheel.config import LabelSettings
from flywheel.curate.embed import Encoder, NoEncoder
from flywheel.edge.policy import Policy
from flywheel.episode import Episode
from flywheel.errors import BundleError, EpisodeError
from flywheel.explain.attention import Attention, attend
from flywheel.explain.control import Control, controlled
from flywheel.explain.neighbours import Neighbours, nearest
from flywheel.label import Answer, Answers, Aspect, Familiar, Label, label_episode
from flywheel.label.labelling import UNTAUGHT, learn
from flywheel.schema import Manifest

PAGE = Path(__file__).with_name("page.html.jinja")
EVENTS_MOST = 40


@dataclass(frozen=True)
class Moment:
    """Something that happened. ``t_s`` counts from the first trigger."""

    t_s: float
    what: str


@dataclass(frozen=True)
class Explanation:
    """All of the page. What is missing says why in ``without``."""

    directory: Path
    manifest: Manifest
    label: Label
    label_from: str
    said: tuple[Answer, ...]
    happened: tuple[Moment, ...]
    control: Control
    neighbours: Neighbours | None
    attention: Attention | None
    without: Mapping[str, str]

    @property
    def summary(self) -> str:
        """One sentence: what happened, where in the task, and why it probably did."""
        x, m = self.label, self.manifest
        word = x.failure_mode.value.replace("_", " ")
        where = f" during {x.phase}" if x.phase else ""
        by = f"; the operator took over and ended with {m.operator_outcome}" if m.operator_outcome else ""
        if word == "none":
            return f"The attempt succeeded ({x.confidence:.0%} sure){by}."
        cause = x.words[Aspect.CAUSE]
        return (
            f"{word.capitalize()}{where} ({x.confidence:.0%} sure){by}. Probable cause: "
            f"{cause.word.replace('_', ' ')} ({cause.confidence:.0%} sure): {x.cause_why}."
        )

    def seconds(self, t_ns: int) -> float:
        """From the first trigger."""
        m = self.manifest
        return (t_ns - (m.triggers[0].t_ns if m.triggers else m.window_ns[0])) / 1e9


def explain(
    directory: Path,
    *,
    bundle: Path | None = None,
    others: Iterable[Path] = (),
    answers: Answers | None = None,
    familiar: Familiar | None = None,
    settings: LabelSettings | None = None,
) -> Explanation:
    """Explain the episode in ``directory``.

    ``bundle``: the policy that acted, or one to ask in its place, by which it is compared with ``others``
    (episode directories) and occluded; ``answers``: what people have said, of this episode and of others;
    ``familiar``: what the policy was trained on. Raises ``EpisodeError`` for an episode that is not sound.
    """
    problems = [p for p in episode.verify(directory) if p.fatal]
    if problems:
        raise EpisodeError(f"{directory}: {problems[0]}")
    e = episode.read(directory)
    known = answers or Answers()
    name = e.manifest.episode_id
    agreed = known.agreed().get(name)
    labellers = learn({}, known) if known.answers else UNTAUGHT
    label = label_episode(e, settings or LabelSettings(), labellers, said=agreed, familiar=familiar)
    without: dict[str, str] = {}
    attention, neighbours = None, None
    if bundle is None:
        without |= dict.fromkeys(("attention", "neighbours"), "no policy is at hand to look with")
    else:
        try:
            attention = attend(e, Policy.load(bundle), label.signals.failed_ns)
        except (BundleError, EpisodeError) as error:
            without["attention"] = str(error)
        try:
            neighbours = nearest(e, others, Encoder.load(bundle))
            if neighbours.why:
                without["neighbours"] = neighbours.why
        except (NoEncoder, BundleError) as error:
            without["neighbours"] = str(error)
    return Explanation(
        directory=directory,
        manifest=e.manifest,
        label=label,
        label_from=_from(known, agreed),
        said=known.of(name),
        happened=_happened(e, label),
        control=controlled(e),
        neighbours=neighbours,
        attention=attention,
        without=without,
    )


def _from(known: Answers, agreed: Mapping[Aspect, str] | None) -> str:
    if agreed:
        return "what people say of this episode; the rest, from labelling functions"
    if known.answers:
        return f"labelling functions, taught by {len(known.answers)} answers"
    return "labelling functions alone: nobody has answered anything yet"


def _happened(e: Episode, label: Label) -> tuple[Moment, ...]:
    """Phases, triggers and events, in the order of time; a mode that lasts a moment is one line as well."""
    m = e.manifest
    zero = m.triggers[0].t_ns if m.triggers else m.window_ns[0]
    found = [
        (start, f"{phase.value} begins, {(end - start) / 1e9:.1f} s")
        for phase, start, end in label.signals.segments
    ]
    found += [(x.t_ns, f"trigger: {x.kind.value.replace('_', ' ')}") for x in m.triggers]
    found += [
        (row["t_ns"], f"{row['kind']}: {row['name'].replace('_', ' ')}")
        for row in e.events.to_pylist()
        if row["kind"] != "trigger"
    ]
    if label.phase:
        found.append((label.signals.failed_ns, "here it counts as failed"))
    ordered = sorted(found, key=lambda x: x[0])
    shown = (
        ordered
        if len(ordered) <= EVENTS_MOST
        else [*ordered[: EVENTS_MOST // 2], *ordered[-EVENTS_MOST // 2 :]]
    )
    return tuple(Moment((t - zero) / 1e9, what) for t, what in shown)


def write_html(x: Explanation, path: Path) -> Path:
    """One self-contained file: pictures are in it, nothing is loaded from elsewhere."""
    from jinja2 import Environment

    with tempfile.TemporaryDirectory(prefix="flywheel-explain-") as d:
        plot = episode.show(x.directory, Path(d) / "plot.png").read_bytes()
        alike = []
        for sort, group in (
            (("success", x.neighbours.successes), ("failure", x.neighbours.failures)) if x.neighbours else ()
        ):
            alike += [(sort, n, _encoded(_last_picture(n.directory))) for n in group]
    environment = Environment(autoescape=True)
    environment.filters["spaced"] = lambda s: str(s).replace("_", " ")
    html = environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        x=x,
        m=x.manifest,
        aspects=[(a, x.label.words[a], _against(x, a)) for a in Aspect],
        plot=_encoded(plot),
        alike=alike,
        attention=_encoded(x.attention.png()) if x.attention else "",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _against(x: Explanation, aspect: Aspect) -> str:
    word = x.label.words[aspect].word
    votes = x.label.evidence.votes.get(aspect, {})
    return ", ".join(f"{f}: {w}" for f, w in sorted(votes.items()) if w != word)


def _last_picture(directory: Path) -> bytes:
    """The last camera's JPEG of the last frame."""
    e = episode.read(directory)
    if not e.manifest.cameras or not e.frames.num_rows:
        return b""
    data: Any = e.frames.column(f"image.{e.manifest.cameras[-1]}")[-1].as_py()
    return bytes(data)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
