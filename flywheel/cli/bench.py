"""Benchmarks: each measures against a peer or a limit in the same run."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from flywheel.cli.output import Json, rows, show
from flywheel.errors import ConfigError

# name -> function that measures and returns a document; imported when asked for
BENCHES = {
    "tracking": "flywheel.edge.bench:tracking",
    "policy": "flywheel.export.bench:policy",
    "export": "flywheel.export.cost:export",
    "faults": "flywheel.edge.faults:faults",
    "recorder": "flywheel.bench.recorder:recorder",
    "crash": "flywheel.bench.crash:crash",
    "hostile": "flywheel.bench.hostile:hostile",
    "restarts": "flywheel.bench.restarts:restarts",
    "operations": "flywheel.bench.operations:operations",
    "curate": "flywheel.bench.curate:curate",
    "dataset": "flywheel.dataset.bench:dataset",
    "labels": "flywheel.bench.labels:labels",
    "catalogue": "flywheel.catalogue.bench:catalogue",
    "stats": "flywheel.gate.bench:bench",
    "delivery": "flywheel.rehearsal.bench:delivery",
    "fleet": "flywheel.rehearsal.bench:fleet",
    "twin": "flywheel.rehearsal.sysid:twin",
    "turns": "flywheel.bench.turns:turns",
}


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(bench)


def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark.")] = "tracking",
    full: Annotated[bool, typer.Option(help="Longer.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where a study keeps its state and its plot.")] = None,
    json: Json = False,
) -> None:
    """Measure, against a peer or a limit in the same run."""
    if name not in BENCHES:
        raise ConfigError(f"bench = {name!r}: not known; choose one of {', '.join(BENCHES)}")
    module_name, _, function = BENCHES[name].partition(":")
    module = import_module(module_name)
    measure = getattr(module, function)
    options = {} if out is None else {"out": out}
    if options and "out" not in inspect.signature(measure).parameters:
        raise ConfigError(f"--out {out}: bench {name} keeps nothing; leave it out")
    # Ended from outside, a benchmark takes down what it had put up.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _stdout_for_the_document():
            doc = measure(full, **options)
    finally:
        signal.signal(signal.SIGTERM, handler)
    if hasattr(module, "table") and not json:  # a benchmark with more to say than its figures
        columns, lines = module.table(doc)
        rows(columns, lines, False)
        bars = {k: f"{b['value']:.4g} {b['op']} {b['bar']:g}" for k, b in doc["bars"].items()}
        missed = [k for k, b in doc["bars"].items() if not b["ok"]]
        doc = {"load": doc["load"], "bars": bars, "missed": ", ".join(missed) or "none"}
    show(doc, json)


@contextmanager
def _stdout_for_the_document() -> Iterator[None]:
    """Libraries print, and so do the processes that a benchmark starts: all of it goes to standard error."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
