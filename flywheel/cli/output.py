"""What commands print: JSON on standard output when asked for, a table or lines for people otherwise."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
console = Console()
messages = Console(stderr=True)


def plain(value: Any) -> Any:
    """A result as JSON can hold it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def show(value: Any, as_json: bool, title: str = "") -> None:
    """Print a result: as JSON, or as a table of its fields."""
    doc = plain(value)
    if as_json:
        json.dump(doc, sys.stdout, indent=1, sort_keys=True, default=str)
        sys.stdout.write("\n")
        return
    table = Table(title=title or None, show_header=False, box=None, title_justify="left")
    for key, item in doc.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            continue  # too long for a table; --json has it
        nested = isinstance(item, dict)
        text = "  ".join(f"{k} {_short(v)}" for k, v in item.items()) if nested else _short(item)
        table.add_row(key.replace("_", " "), text)
    console.print(table)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows(columns: list[str], lines: list[list[Any]], as_json: bool) -> None:
    """Print a list of records."""
    if as_json:
        json.dump(
            [dict(zip(columns, line, strict=True)) for line in lines], sys.stdout, indent=1, default=str
        )
        sys.stdout.write("\n")
        return
    table = Table(*columns, box=None)
    for line in lines:
        table.add_row(*(_short(x) for x in line))
    console.print(table)


class Bar:
    """A progress bar on standard error; silent where nobody watches. A context manager."""

    def __init__(self, what: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=messages,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def to(self, done: int, total: int, what: str | None = None) -> None:
        """So far."""
        self._progress.update(self._task, completed=done, total=total, description=what)
