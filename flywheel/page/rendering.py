"""Templates and what fills them: the frame that every page has, notices, links, static files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from fastapi.responses import HTMLResponse, Response

from flywheel import __version__
from flywheel.gate.page import figures
from flywheel.page import robots, rollouts, shown
from flywheel.page.kept import Seen

if TYPE_CHECKING:
    from jinja2 import Environment

    from flywheel.page.episodes import Timeline

HERE = Path(__file__).parent
STATIC = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
NAVIGATION = (
    ("./", "Overview"),
    ("robots", "Robots"),
    ("rollouts", "Rollouts"),
    ("failures", "Failures"),
    ("turns", "Turns"),
)


@dataclass(frozen=True)
class Notice:
    """What a page says above everything else."""

    kind: str  # bad | warn
    text: str
    detail: str = ""


def page(template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """A page from a template."""
    text = _environment().get_template(f"{template}.html.jinja").render(context)
    return HTMLResponse(text, status)


def plot(timeline: Timeline) -> Response:
    """An episode's timeline as a picture (SVG)."""
    text = _environment().get_template("plot.svg.jinja").render(t=timeline)
    return Response(text, media_type="image/svg+xml")


def problem(status: int, why: str) -> HTMLResponse:
    """A page that says what is wrong, and nothing else."""
    titles = {400: "Not a request", 404: "Not there", 503: "The store does not answer"}
    return page(
        "problem",
        status,
        title=titles.get(status, "Cannot be shown"),
        why=why,
        path="",
        query={},
        now=0.0,
        notices=[],
        live=0,
        airflow_url="",
    )


def notices(looks: Iterable[Seen[Any]], now: float) -> list[Notice]:
    """What went wrong with what a page shows; a store that is down is one notice, not one a part."""
    found: dict[str, Notice] = {}
    for x in looks:
        if not x.problem:
            continue
        old = "Nothing was read yet."
        if x.at_unix_s:
            old = f"Shown is what was read {shown.ago(x.at_unix_s, now)}."
        if x.down:
            found["down"] = Notice("bad", f"The store does not answer. {old}", x.problem)
        else:
            found[x.problem] = Notice("warn", f"A part could not be read. {old}", x.problem)
    return list(found.values())


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    e = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    e.globals.update(
        navigation=NAVIGATION,
        version=__version__,
        assets=_assets(),
        stages=shown.STAGES,
        verdicts=shown.VERDICTS,
        modes_shown=shown.MODES,
        steps=rollouts.ORDER,
        mark=shown.Mark,
        link=link,
        figures=figures,
        interval=shown.interval,
        figure=shown.figure,
    )
    e.filters.update(
        count=shown.count,
        num=shown.number,
        percent=shown.percent,
        spread=shown.spread,
        exact=shown.exact,
        iso=shown.iso,
        unix=shown.unix,
        ago=shown.ago,
        share=shown.share,
        spaced=lambda s: str(s).replace("_", " "),
        clip=lambda s, n=robots.TEXT_MAX: s if len(s) <= n else f"{s[:n]}…",
    )
    return e


def link(path: str, query: Mapping[str, Any] | None = None, /, **changes: Any) -> str:
    """A relative link with a query; what is empty is left out. A path of "" stays where it is."""
    merged = {**(query or {}), **changes}
    text = urlencode({k: _plain(v) for k, v in merged.items() if v not in ("", None, False)})
    return f"{path}?{text}" if text else path or "?"


def _plain(value: object) -> str:
    return "true" if value is True else str(value)


def _assets() -> str:
    """A name for this state of the static files: browsers keep them until it changes."""
    return hashlib.sha256(b"".join((HERE / n).read_bytes() for n in sorted(STATIC))).hexdigest()[:12]
