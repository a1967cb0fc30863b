"""Starts again what died of the services, until somebody stops them.

One process for each state directory, ``python -m flywheel.services keep HOME``: what systemd or Kubernetes is
elsewhere. ``HOME/keeper/kept.json`` names the services that are to be up; what it starts again is noted in
``HOME/keeper/restarts.jsonl``. It does nothing while somebody else starts or stops services, so what is
stopped on purpose stays so. If it dies itself, the services run on: ``flywheel status`` and ``flywheel
doctor`` say so, and ``flywheel up`` starts it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flywheel.errors import FlywheelError
from flywheel.services import process

NAME = "keeper"
POLL_S = 1.0
STOP_S = 5.0
PAUSE_MAX_S = 60.0
FORGET_S = 600.0  # a process that held out for so long is started at once again
NOTES_MAX_BYTES = 1 << 20


class Patience:
    """What dies again and again is started less and less often. ``clock`` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._starts: dict[str, list[float]] = {}

    def due(self, name: str) -> bool:
        """Whether a dead process may be started now; if so, that is what the caller does.

        At once the first time, then after 1, 2, 4, … up to 60 s from the last start.
        """
        now = self._clock()
        starts = [t for t in self._starts.get(name, ()) if now - t < FORGET_S]
        if starts and now - starts[-1] < min(2.0 ** (len(starts) - 1), PAUSE_MAX_S):
            return False
        self._starts[name] = [*starts, now]
        return True


@dataclass(frozen=True, slots=True)
class Restart:
    """A process that had died and was started again."""

    t_unix_s: float
    name: str


class Keeper:
    """The keeper of one state directory, from outside of it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.dir = home / "keeper"
        self.mark = f"keeper:{home}"

    def kept(self) -> frozenset[str]:
        """The services that are to be up."""
        try:
            return frozenset(json.loads((self.dir / "kept.json").read_text()))
        except (FileNotFoundError, ValueError):
            return frozenset()

    def keep(self, services: Iterable[str]) -> None:
        """From now on these are to be up, and no others. With the services' lock held."""
        self.dir.mkdir(parents=True, exist_ok=True)
        process.write_private(self.dir / "kept.json", json.dumps(sorted(services)))

    def runs(self) -> bool:
        """Whether somebody would start again what dies now."""
        return process.running(self.dir, NAME) is not None

    def start(self, environ: Mapping[str, str]) -> None:
        """Start it with this environment, which is what it starts services with."""
        process.start(
            NAME,
            [sys.executable, "-m", "flywheel.services", "keep", str(self.home)],
            mark=self.mark,
            run_dir=self.dir,
            log=self.home / "logs" / "keeper.log",
            env=environ,
            cwd=self.home,
        )

    def stop(self) -> None:
        """Stop it; the services are left as they are."""
        if (p := process.running(self.dir, NAME)) is not None:
            process.stop([p], STOP_S)

    def note(self, names: Iterable[str], now_unix_s: float) -> None:
        """Write down what was started again; the oldest notes make room."""
        path = self.dir / "restarts.jsonl"
        if path.exists() and path.stat().st_size > NOTES_MAX_BYTES:
            path.replace(path.with_suffix(".old"))
        with path.open("a") as f:
            f.writelines(json.dumps({"t_unix_s": now_unix_s, "name": n}) + "\n" for n in names)

    def restarts(self, since_unix_s: float) -> list[Restart]:
        """What was started again, the oldest first; a line that was cut short is left out."""
        found = []
        try:
            lines = (self.dir / "restarts.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                doc = json.loads(line)
                found.append(Restart(float(doc["t_unix_s"]), str(doc["name"])))
            except (ValueError, LookupError, TypeError):
                continue
        return [r for r in found if r.t_unix_s >= since_unix_s]


def run(keeper: Keeper, revive: Callable[[Patience], list[str]]) -> None:
    """The keeper's own process: look every second, until there is nothing to keep."""
    patience = Patience()
    while keeper.kept():
        try:
            started = revive(patience)
        except (FlywheelError, OSError) as e:
            _say(str(e))  # what could not be started is tried again when it is due
        else:
            if started:
                _say(f"started again: {', '.join(started)}")
                keeper.note(started, time.time())
        time.sleep(POLL_S)


def _say(what: str) -> None:
    print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), what, flush=True)
