"""One episode on one page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flywheel.cli.output import Json, console, rows, show
from flywheel.config import PARAMS_FILE, Settings, checkout
from flywheel.errors import BundleError, EpisodeError, NotFound, StoreError

if TYPE_CHECKING:
    from flywheel.explain import Explanation
    from flywheel.label import Answers, Familiar
    from flywheel.store import Store


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(explain)


def explain(
    episode: Annotated[
        str, typer.Argument(help="An episode's directory, its id, or its prefix in the store.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write the page as one self-contained file.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Bundle or checkpoint to look with; default the one that acted.")
    ] = None,
    among: Annotated[
        Path | None, typer.Option(help="Directory of episodes to compare with; default those beside it.")
    ] = None,
    most: Annotated[int, typer.Option(min=0, help="At most so many to compare with.")] = 60,
    params: Annotated[Path, typer.Option(help="Settings file.")] = Path(PARAMS_FILE),
    json: Json = False,
) -> None:
    """What happened in an episode, when, what it is like, what the policy looked at, what the loop saw."""
    from flywheel.explain import explain as run
    from flywheel.explain import write_html

    local = Path(episode)
    settings = Settings.load(params) if params.is_file() else Settings()
    with tempfile.TemporaryDirectory(prefix="flywheel-explain-") as d:
        if local.is_dir():
            directory, there, said = local, None, None
        else:
            directory, there, said = _fetched(episode, Path(d))
        bundle = _bundle(policy, directory, there, Path(d))
        pool = among or (directory.parent if there is None else None)
        others = (
            _beside(pool, directory, most) if pool is not None else _alike(there, directory, Path(d), most)
        )
        x = run(
            directory,
            bundle=bundle,
            others=others,
            answers=said,
            familiar=_familiar(bundle, settings),
            settings=settings.label,
        )
        if html is not None:
            write_html(x, html)
    if json:
        show(_document(x), True)
        return
    _print(x)
    if html is not None:
        console.print(str(html))


def _fetched(name: str, into: Path) -> tuple[Path, Store, Answers]:
    from flywheel import episode
    from flywheel.label.answers import collect
    from flywheel.services.environment import store

    there = store()
    prefix = name if name.startswith("episodes/") else _prefix(there, name)
    return episode.pull(there, prefix, into / "episode"), there, collect(there)


def _prefix(there: Store, name: str) -> str:
    """Where an episode lies: the claims know most, the listing the rest."""
    from flywheel.claims import TAKEN, claims_of
    from flywheel.schema import MANIFEST_FILE
    from flywheel.trace import EPISODE_ID

    if not EPISODE_ID.fullmatch(name):
        raise EpisodeError(f"{name!r}: is neither a directory here nor an episode's id")
    try:
        turn = there.get(f"{TAKEN}/{name}").decode()
        found = next((c.prefix for c in claims_of(there, turn).episodes if c.episode_id == name), "")
        if found:
            return found
    except NotFound:
        pass
    ending = f"/{name}/{MANIFEST_FILE}"
    key = next((i.key for i in there.list("episodes/") if i.key.endswith(ending)), None)
    if key is None:
        raise EpisodeError(
            f"{name}: the store holds no such episode; `flywheel episodes ls` lists what it has"
        )
    return key.removesuffix(MANIFEST_FILE)


def _bundle(policy: Path | None, directory: Path, there: Store | None, into: Path) -> Path | None:
    """The policy to look with: the one that is named, else the one that acted, else this checkout's."""
    from flywheel import policies
    from flywheel.episode import read_manifest

    if policy is not None:
        return policy / "bundle" if (policy / "bundle").is_dir() else policy
    digest = read_manifest(directory).policy_digest
    root = checkout(Path.cwd())
    base = None if root is None else root / "models" / "base" / "bundle"
    if base is not None and base.is_dir() and (there is None or policies.digest_of(base) == digest):
        return base
    if there is not None:
        try:
            policies.fetch(there, digest, into / "policy", bundle_only=True)
            return into / "policy" / "bundle"
        except (BundleError, StoreError):
            pass  # the page says whose eyes it looked with, or that it had none
    return base


def _familiar(bundle: Path | None, settings: Settings) -> Familiar | None:
    from flywheel.cli.labels import familiar

    found = familiar(bundle, settings)
    return None if isinstance(found, str) else found


def _beside(parent: Path, directory: Path, most: int) -> Sequence[Path]:
    """The episodes of a directory, the newest first."""
    from flywheel.schema import MANIFEST_FILE

    found = [p.parent for p in parent.glob(f"*/{MANIFEST_FILE}") if p.parent.name != directory.name]
    return sorted(found, reverse=True)[:most]


def _alike(there: Store | None, directory: Path, into: Path, most: int) -> Sequence[Path]:
    """Episodes of the same task from the store, half of them successes if there are; every file verified."""
    from concurrent.futures import ThreadPoolExecutor
    from itertools import islice

    from flywheel import episode
    from flywheel.schema import Outcome

    if there is None or not most:
        return ()
    mine = episode.read_manifest(directory)
    listed = islice(episode.ls(there, mine.site), 20 * most)
    same = [e for e in listed if e.manifest and e.manifest.task == mine.task and e.manifest != mine]
    same.sort(key=lambda e: (e.manifest is None or e.manifest.outcome is not Outcome.SUCCESS, e.prefix))
    won = [e for e in same if e.manifest and e.manifest.outcome is Outcome.SUCCESS][: most // 2]
    lost = [e for e in same if e not in won][: most - len(won)]

    def one(prefix: str) -> Path | None:
        try:
            return episode.pull(there, prefix, into / "others")
        except (EpisodeError, StoreError):
            return None

    with ThreadPoolExecutor(8) as pool:
        return [p for p in pool.map(one, [e.prefix for e in (*won, *lost)]) if p is not None]


def _print(x: Explanation) -> None:
    from flywheel.label import Aspect

    m, c = x.manifest, x.control
    console.print(x.summary, style="bold")
    console.print(f"“{m.task}”  {m.site}/{m.robot}  {m.shift}  policy {m.policy_digest[:12]}")
    lines: list[list[Any]] = []
    for a in Aspect:
        word = x.label.words[a]
        votes = x.label.evidence.votes.get(a, {})
        against = ", ".join(f"{f}: {w}" for f, w in sorted(votes.items()) if w != word.word)
        lines.append([a, word.word, f"{word.confidence:.2f}", against])
    rows(["question", "label", "confidence", "functions that say otherwise"], lines, False)
    for said in x.said:
        words = ", ".join(f"{k} {w}" for k, w in said.words.items())
        console.print(f"{said.by} said: {words}" + (f" ({said.note})" if said.note else ""))
    rows(["s", "what happened"], [[f"{h.t_s:+.2f}", h.what] for h in x.happened], False)
    modes = ", ".join(f"{k} {100 * v:.1f} %" for k, v in c.modes.items())
    limits = ", ".join(f"{k} in {n} ticks" for k, n in c.limits.items()) or "none"
    loop = [
        [
            "ticks",
            f"{c.ticks} at {c.rate_hz:.0f} Hz, {c.misses} deadlines missed, {c.gaps} gaps, {c.drops} drops",
        ],
        ["modes", modes],
        [
            "tracking error",
            f"worst {1e3 * c.error_rad.worst:.1f} mrad (joint {c.worst_joint}, {c.worst_at_s:+.2f} s), "
            f"p50 {1e3 * c.error_rad.p50:.2f}, p99 {1e3 * c.error_rad.p99:.2f}",
        ],
        ["woken late", f"p50 {c.late_us.p50:.0f} µs, p99 {c.late_us.p99:.0f}, worst {c.late_us.worst:.0f}"],
        [
            "age of the chunk",
            f"p50 {c.chunk_age_ms.p50:.0f} ms, p99 {c.chunk_age_ms.p99:.0f}, "
            f"worst {c.chunk_age_ms.worst:.0f}",
        ],
        ["limits that acted", limits],
    ]
    rows(["the control loop", ""], loop, False)
    _print_policy(x)


def _print_policy(x: Explanation) -> None:
    if x.attention is None:
        console.print(f"What the actions depended on is not known: {x.without['attention']}")
    else:
        a = x.attention
        whose = "the policy that acted" if a.same_policy else f"policy {a.policy[:12]}, which did not act"
        at = f"{100 * a.focus[0]:.0f} % from the left and {100 * a.focus[1]:.0f} % from the top"
        console.print(
            f"What the actions depended on ({whose}, camera {a.camera}, {x.seconds(a.t_ns):+.2f} s): "
            f"covering a patch moves the targets by up to {1e3 * a.effects.max():.1f} mm, around {at}; "
            f"the whole picture {1e3 * a.whole_m:.1f} mm, a state 1 cm off {1e3 * a.state_m:.1f} mm, "
            f"no instruction {1e3 * a.instruction_m:.1f} mm. "
            "(Occlusion: what the actions depended on, not inner attention.)"
        )
    if x.neighbours is None or x.neighbours.why:
        console.print(f"What it is like is not known: {x.without['neighbours']}")
        return
    near: list[list[Any]] = [
        [sort, n.episode_id, f"{n.distance:.3g}", n.outcome, "yes" if n.corrected else "", n.robot]
        for sort, group in (("success", x.neighbours.successes), ("failure", x.neighbours.failures))
        for n in group
    ]
    rows(
        [f"nearest of {x.neighbours.compared}", "episode", "distance", "outcome", "corrected", "robot"],
        near,
        False,
    )
    if not x.neighbours.successes:
        console.print("None of them succeeded.")


def _document(x: Explanation) -> dict[str, Any]:
    from dataclasses import asdict

    from flywheel.label import Aspect

    a, n = x.attention, x.neighbours
    return {
        "episode": x.manifest.episode_id,
        "summary": x.summary,
        "labels": {k: asdict(x.label.words[k]) for k in Aspect},
        "votes": x.label.evidence.votes,
        "needs_review": x.label.needs_review,
        "answers": [s.model_dump(mode="json") for s in x.said],
        "happened": [asdict(h) for h in x.happened],
        "control": asdict(x.control),
        "attention": None
        if a is None
        else {
            "policy": a.policy,
            "same_policy": a.same_policy,
            "camera": a.camera,
            "t_s": x.seconds(a.t_ns),
            "effects_m": a.effects.round(6).tolist(),
            "whole_m": a.whole_m,
            "state_m": a.state_m,
            "instruction_m": a.instruction_m,
        },
        "neighbours": None if n is None else asdict(n),
        "without": dict(x.without),
    }
