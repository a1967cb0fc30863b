"""Brings complete windows to disk, in two steps between which the recorder writes down that it let go.

First the episode is written, whole and durable, under a name that no reader looks at. Then the journal
forgets the window. Then the episode gets its name. Killed before the journal, the window is sealed again from
the rings, over what was written; killed after it, the next start only has to give the name. So an episode is
never sealed twice, not even if the first one has been uploaded and removed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from flywheel.edge.rules import priority
from flywheel.edge.windows import Window
from flywheel.episode import commit, prepare
from flywheel.errors import EpisodeError
from flywheel.schema import Manifest

UNSEALED_MAX = 8  # episodes kept in memory while the disk refuses them
RETRY_NS = 1_000_000_000
PATIENCE_NS = 5_000_000_000  # a disk that is full for a moment must not cost what waits on it for the store


@dataclass
class RecorderStatus:
    """Counts since the start. ``suppressed``: triggers too soon after their like; ``refused``: episodes that
    are in memory because the disk does not take them; ``abandoned``: those lost because there were too many;
    ``unfit``: windows whose rows made no episode; ``why``: the last answer of the disk, or of the check;
    ``resumed``: whether it goes on for one that ended without warning; ``overflow``: frames let go because
    pictures took more memory than they may."""

    sealed: int = 0
    suppressed: int = 0
    refused: int = 0
    abandoned: int = 0
    unfit: int = 0
    overflow: int = 0
    resumed: bool = False
    why: str = ""


@dataclass(eq=False)
class Ready:
    """Complete, but not on disk yet."""

    draft: Manifest
    tables: tuple[pa.Table, pa.Table, pa.Table]
    window: Window
    refused_ns: int | None = None  # when the disk first did not take it

    @property
    def nbytes(self) -> int:
        """Of its tables."""
        return sum(t.nbytes for t in self.tables)


@dataclass
class _Written:
    """What became of a batch: durable, refused by the disk, or no episode at all."""

    written: list[tuple[Ready, Manifest]]
    left: list[Ready]
    unfit: list[Ready]
    why: str = ""


class Sealer:
    """Seals into ``directory``. ``save`` writes the journal; ``memory_bytes`` bounds what waits for the disk.

    ``background`` writes in a thread, for a caller that must not wait for the disk.
    """

    def __init__(
        self,
        directory: Path,
        status: RecorderStatus,
        make_room: Callable[[int, int], object],
        save: Callable[[], None],
        memory_bytes: int,
        background: bool,
        step: Callable[[str], None],
    ) -> None:
        self.ready: list[Ready] = []
        self._directory, self._status, self._make_room = directory, status, make_room
        self._save, self._memory_bytes, self._step = save, memory_bytes, step
        self._thread = ThreadPoolExecutor(1, "seal") if background else None
        self._under_way: tuple[list[Ready], Future[_Written]] | None = None
        self._named: list[Manifest] = []  # let go of, but the disk refused the name
        self._retry_ns = 0

    def waiting(self) -> list[Window]:
        """Windows that are complete and not let go of."""
        under_way = self._under_way[0] if self._under_way is not None else []
        return [r.window for r in (*under_way, *self.ready)]

    def seal(self, now_ns: int, wait: bool = False) -> list[Manifest]:
        """Bring to disk what is ready, here or in the thread; keep what the disk does not take."""
        if now_ns < self._retry_ns and not wait:
            return []
        if self._under_way is None and self.ready:
            hurry = wait or 2 * len(self.ready) > UNSEALED_MAX or 2 * self._held() > self._memory_bytes
            batch, self.ready = self.ready, []
            if self._thread is None:
                # Under way while it is written, so that a journal saved meanwhile still knows it.
                self._under_way = (batch, Future())
                self._under_way[1].set_result(self._write(batch, now_ns, hurry))
            else:
                self._under_way = (batch, self._thread.submit(self._write, batch, now_ns, hurry))
        if self._under_way is None or not (wait or self._under_way[1].done()):
            return self._commit(now_ns) if self._named else []
        done, self._under_way = self._under_way[1].result(), None
        return self._settle_up(done, now_ns)

    def _held(self) -> int:
        return sum(r.nbytes for r in self.ready)

    def _write(self, batch: list[Ready], now_ns: int, hurry: bool) -> _Written:
        """Room is made, at the cost of older episodes, only if the disk stays full or memory runs out."""
        done = _Written([], [], [])
        for r in batch:
            try:
                try:
                    manifest = prepare(self._directory, r.draft, *r.tables, step=self._step)
                except OSError:
                    r.refused_ns = now_ns if r.refused_ns is None else r.refused_ns
                    if not hurry and now_ns - r.refused_ns < PATIENCE_NS:
                        raise
                    self._make_room(r.nbytes, priority(r.draft))
                    manifest = prepare(self._directory, r.draft, *r.tables, step=self._step)
            except OSError as e:
                done.left.append(r)
                done.why = e.strerror or str(e)
            except (EpisodeError, pa.ArrowException) as e:
                done.unfit.append(r)  # trying again would end the same way, for ever
                done.why = str(e)
            else:
                done.written.append((r, manifest))
        return done

    def _settle_up(self, done: _Written, now_ns: int) -> list[Manifest]:
        status = self._status
        self.ready = done.left + self.ready
        status.why = done.why or status.why
        status.unfit += len(done.unfit)
        if done.left:
            self._retry_ns = now_ns + RETRY_NS
        while len(self.ready) > UNSEALED_MAX or (len(self.ready) > 1 and self._held() > self._memory_bytes):
            self.ready.remove(min(self.ready, key=lambda r: (priority(r.draft), r.draft.episode_id)))
            status.abandoned += 1
        status.refused = min(len(done.left), len(self.ready))
        self._named += [m for _, m in done.written]
        return self._commit(now_ns)

    def _commit(self, now_ns: int) -> list[Manifest]:
        if not self._named:
            return []
        self._save()
        sealed = []
        while self._named:
            try:
                commit(self._directory, self._named[0], self._step)
            except OSError as e:
                self._status.why = e.strerror or str(e)
                self._retry_ns = now_ns + RETRY_NS
                break
            sealed.append(self._named.pop(0))
        self._status.sealed += len(sealed)
        return sealed
