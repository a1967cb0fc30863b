"""The durable queue between the recorder and the store, as it lies on the robot's disk.

On disk, below one root::

    episodes/<id>/   sealed, not yet in the store (the recorder seals here; ``.<id>.partial`` is its own)
    damaged/<id>.n/  no longer what its manifest says: kept for a person, never uploaded
    dropped/<id>/    only the manifest is left: the quota took the rest
    requests/        what the cloud asked for (``requests``)
    .trash/          being removed

Every step from one place to another is one rename, so a crash leaves an episode in exactly one of them.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flywheel.edge.rules import priority
from flywheel.episode import fsync_directory, read_manifest
from flywheel.errors import EpisodeError
from flywheel.schema import EPISODE_FILES, MANIFEST_FILE, Manifest


@dataclass(frozen=True)
class Queued:
    """An episode that waits."""

    path: Path
    manifest: Manifest
    nbytes: int


class Queue:
    """The spool on disk. Any number of processes may hold one on the same root."""

    def __init__(self, root: Path, quota_bytes: int, step: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self.episodes, self.damaged, self.dropped = (root / n for n in ("episodes", "damaged", "dropped"))
        self._trash = root / ".trash"
        for d in (self.episodes, self.damaged, self.dropped, self._trash):
            d.mkdir(parents=True, exist_ok=True)
        self.quota_bytes = quota_bytes
        self._step = step
        self._known: dict[str, Queued] = {}

    def pending(self) -> list[Queued]:
        """Episodes that wait, the first to be uploaded first: by priority, then the oldest."""
        names = {e.name for e in os.scandir(self.episodes) if e.is_dir() and not e.name.startswith(".")}
        for name in self._known.keys() - names:
            del self._known[name]
        for name in names - self._known.keys():
            path = self.episodes / name
            try:
                m = read_manifest(path)
            except EpisodeError as e:
                self.set_aside(path, str(e))
                continue
            self._known[name] = Queued(path, m, sum(f.bytes for f in m.files))
        return sorted(self._known.values(), key=lambda q: (-priority(q.manifest), q.manifest.episode_id))

    @contextmanager
    def hold(self, path: Path) -> Iterator[bool]:
        """Have an episode for oneself; yields False if another process has it, or has dealt with it."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield False
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield (path / MANIFEST_FILE).exists()
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Let go of an episode that is in the store."""
        self._move(path, self._trash)
        shutil.rmtree(self._trash / path.name, ignore_errors=True)

    def set_aside(self, path: Path, why: str) -> None:
        """Keep an episode that is not what its manifest says, out of the way and with the reason."""
        with suppress(FileNotFoundError):  # another process dealt with it
            kept = self._move(path, self.damaged)
            with suppress(OSError):  # a full disk: the reason is told all the same, only not kept
                (kept / "why.txt").write_text(why + "\n", encoding="utf-8")

    def drop(self, q: Queued) -> bool:
        """Give up an episode's data, not its manifest. Needs no free space. False if it is in use."""
        with self.hold(q.path) as mine:
            if mine:
                self._step("drop")
                self._move(q.path, self.dropped)
        if mine:
            self._strip(self.dropped / q.path.name)
        return mine

    def enforce(self) -> list[str]:
        """Drop until the quota is kept: the least important first, then the oldest. Returns their ids.

        Nothing is ever refused: the quota is kept after the fact.
        """
        return self._drop_until(lambda used, freed: used <= self.quota_bytes)

    def make_room(self, nbytes: int, most: int) -> list[str]:
        """Free ``nbytes`` for an episode of priority ``most``, at the cost of none that matters more."""
        return self._drop_until(lambda used, freed: freed >= nbytes, most)

    def summaries(self) -> list[Path]:
        """Dropped episodes of which only the manifest is left."""
        found = sorted(d for d in self.dropped.iterdir() if d.is_dir())
        for d in found:
            self._strip(d)  # a crash may have come between
        return found

    def tidy(self) -> None:
        """Finish removals that a crash cut short."""
        for d in self._trash.iterdir():
            shutil.rmtree(d, ignore_errors=True)

    def _drop_until(self, enough: Callable[[int, int], bool], most: int | None = None) -> list[str]:
        queued = self.pending()
        used, freed, dropped = sum(q.nbytes for q in queued), 0, []
        for q in sorted(queued, key=lambda q: (priority(q.manifest), q.manifest.episode_id)):
            if enough(used, freed) or (most is not None and priority(q.manifest) > most):
                break
            if self.drop(q):
                used, freed = used - q.nbytes, freed + q.nbytes
                dropped.append(q.manifest.episode_id)
        return dropped

    def _move(self, path: Path, to: Path) -> Path:
        target = to / path.name
        if to == self.damaged:  # nothing that was kept is overwritten
            target = next(t for n in itertools.count() if not (t := to / f"{path.name}.{n}").exists())
        elif target.exists():
            shutil.rmtree(target)
        path.rename(target)
        fsync_directory(to)
        fsync_directory(path.parent)
        self._known.pop(path.name, None)
        return target

    @staticmethod
    def _strip(path: Path) -> None:
        for name in EPISODE_FILES:
            (path / name).unlink(missing_ok=True)
