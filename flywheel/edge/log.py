"""The supervisor's log: one JSON object a line, from the same events that are recorded.

It is a reader of the rings in a thread of its own. A log that cannot be written holds up nobody: what the
rings overwrite meanwhile is counted and said.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any, Self, TextIO

import structlog

from flywheel.edge.history import text
from flywheel.edge.link import Ring

LOOK_S = 0.1
_WARN = ("system2", "recorder", "uploader", "fell_back", "refused", "rejected", "standby_lost", "kept")


class Journal:
    """Logs what comes into event rings; a context manager. ``fields`` are on every line."""

    def __init__(self, *rings: Ring, from_start: bool, to: TextIO | None = None, **fields: Any) -> None:
        self._readers = [r.reader(from_start) for r in rings]
        self._to = to or sys.stderr
        self.log: Any = structlog.wrap_logger(
            structlog.WriteLogger(self._to),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(sort_keys=True),
            ],
        ).bind(**fields)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(2.0)  # a log that is not taken does not keep us from ending

    def take(self) -> None:
        """Log what is new."""
        found = []
        for reader in self._readers:
            batch = reader.poll()
            found += [(int(row["t_ns"]), row) for row in batch.rows]
            if batch.missed:
                self.log.warning("events_missed", count=batch.missed)
        for t_ns, row in sorted(found, key=lambda e: e[0]):
            kind, name = text(row["kind"]), text(row["name"])
            log = self.log.warning if name.startswith(_WARN) or kind == "trigger" else self.log.info
            log(name, kind=kind, t_ns=t_ns, detail=json.loads(text(row["detail"]) or "{}"))

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            self.take()
        self.take()
