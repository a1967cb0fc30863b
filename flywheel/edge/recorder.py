"""From rings to sealed episodes: what went wrong, and what was before and after it.

The recorder only reads the rings, so that nothing it does, or fails to do, reaches the control loop. It is
polled, by the lockstep loop or by a process of its own (``run``): the same code with the same clock values
seals the same bytes.

Events that it understands (``events.add(t_ns, kind, name, detail)``)

=============  ==================  ===================================================================
kind           name                detail
=============  ==================  ===================================================================
task           start               instruction, seed, shift (all optional): an attempt begins
task           end                 outcome (``schema.Outcome``), by ("policy" | "operator")
trigger        ``TriggerKind``     anything; becomes the detail of the trigger in the manifest
intervention   on                  the operator takes over
=============  ==================  ===================================================================

It triggers by itself on a policy's attempt that ends badly, a stop (control rows), a tracking error (control
rows), an intervention (frames or event) and on a sample of attempts that end well.

Windows. One episode holds one attempt and its correction: it begins ``pre_s`` before the trigger, but not
before the attempt; it ends ``post_s`` after it, while an operator is at work ``tail_s`` after he lets go, but
not after the next attempt began nor longer than ``max_episode_s``. A trigger within a window joins it. What
comes after gets a window that begins where the last one ended, so that nothing is recorded twice and
nothing falls between.

What a ring says of one instant counts in the order in which it says it: "task end", then "task start" at the
same ``t_ns`` is how one attempt follows another at once.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from flywheel.config import RecorderSettings
from flywheel.edge.history import History, Shape, Source, text
from flywheel.edge.link import Ring
from flywheel.edge.rows import Rings
from flywheel.edge.spool import Stop, priority
from flywheel.edge.triggers import Detector, Happening, What, outcome_by, outcome_of
from flywheel.episode import as_array, new_episode_id, seal, sweep
from flywheel.schema import EVENTS_SCHEMA, Manifest, Trigger, TriggerKind

UNSEALED_MAX = 8  # episodes kept in memory while the disk refuses them
RETRY_NS = 1_000_000_000


@dataclass(frozen=True)
class Identity:
    """Who records. ``clock_epoch_ns`` is UTC at ``t_ns = 0``; ``shift`` names the twin's, "" on a robot."""

    site: str
    robot: str
    clock: Literal["wall", "lockstep"]
    clock_epoch_ns: int
    runtime_version: str
    control_hz: float = 1000.0
    policy_hz: float = 10.0
    shift: str = ""


@dataclass
class RecorderStatus:
    """Counts since the start. ``suppressed``: triggers too soon after their like; ``refused``: episodes that
    are in memory because the disk does not take them; ``abandoned``: those lost because there were too many;
    ``why``: the disk's last answer."""

    sealed: int = 0
    suppressed: int = 0
    refused: int = 0
    abandoned: int = 0
    why: str = ""


@dataclass
class _Window:
    """A recording under way: [start, end), which may still move up to ``ceiling``."""

    start: int
    end: int
    ceiling: int
    triggers: list[Trigger]
    about: dict[str, Any]  # the attempt


@dataclass(frozen=True)
class _Attempt:
    start: int
    about: dict[str, Any]


@dataclass(eq=False)
class _Ready:
    """Complete, but not on disk yet."""

    draft: Manifest
    tables: tuple[pa.Table, pa.Table, pa.Table]


@dataclass
class _Sealed:
    """What became of a batch: on disk, or refused by the disk and why."""

    sealed: list[Manifest]
    left: list[_Ready]
    why: str = ""


class Recorder:
    """Reads the rings of one robot and seals episodes into ``directory``.

    ``seed`` makes episode ids repeatable (lockstep); None draws them at random. ``more_events`` are rings of
    further processes that log events. ``make_room(nbytes, priority)`` is asked when the disk is full.
    ``background`` seals in a thread, for a caller that must not wait for the disk: the same bytes, but
    ``poll`` tells of an episode later. There must be one recorder to a directory: it removes what a crashed
    one left half-written. ``recorded_to_ns``: what is older was sealed by the recorder before this one.
    """

    def __init__(
        self,
        rings: Rings,
        settings: RecorderSettings,
        directory: Path,
        identity: Identity,
        *,
        seed: int | None = None,
        more_events: Sequence[Ring] = (),
        make_room: Callable[[int, int], object] = lambda nbytes, priority: None,
        background: bool = False,
        step: Callable[[str], None] = lambda _: None,
        recorded_to_ns: int | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        sweep(directory)
        self.status = RecorderStatus()
        self._directory, self._identity, self._seed = directory, identity, seed
        self._make_room, self._step = make_room, step
        self._pre, self._post, self._tail = map(_ns, (settings.pre_s, settings.post_s, settings.tail_s))
        self._max, self._settle = _ns(settings.max_episode_s), _ns(settings.settle_s)
        self._min_interval = _ns(settings.min_interval_s)
        self._rng = np.random.default_rng(seed)
        self._control, self._frames = Source(rings.control), Source(rings.frames)
        self._events = [Source(r) for r in (rings.events, *more_events)]
        self._shape = Shape(rings)
        self._history = History(self._shape)
        self._attempts: deque[_Attempt] = deque()
        self._windows: list[_Window] = []
        self._ready: list[_Ready] = []
        self._thread = ThreadPoolExecutor(1, "seal") if background else None
        self._sealing: Future[_Sealed] | None = None
        self._retry_ns = 0
        self._recorded_to = recorded_to_ns
        self._fired: dict[TriggerKind, int] = {}
        self._detector = Detector(settings, self._rng)
        self._operator_ns: int | None = None  # the last frame in which the operator was in control

    def poll(self, now_ns: int) -> list[Manifest]:
        """Take what is new from the rings; seal what is complete. Returns what was sealed.

        To be called more often than the rings wrap. A full disk is no error here: the episode stays in
        memory and is tried again (see ``status``).
        """
        for h in self._take():
            if h.what == What.ATTEMPT:
                self._begin_attempt(h.t_ns, h.detail)
            elif h.what == What.OPERATOR:
                self._operator(h.t_ns)
            elif h.kind is not None:
                self._fire(h.t_ns, h.kind, h.detail)
        while self._windows and now_ns >= self._windows[0].end + self._settle:
            self._complete(self._windows.pop(0))
        oldest = min((w.start for w in self._windows), default=now_ns)
        self._history.forget(min(oldest, now_ns - self._pre - self._settle))
        while len(self._attempts) > 1 and self._attempts[1].start < now_ns - self._pre - self._max:
            self._attempts.popleft()
        return self._seal(now_ns) if now_ns >= self._retry_ns else []

    def finish(self, now_ns: int) -> list[Manifest]:
        """The end: take what is left and seal what is open, shorter than asked for if need be."""
        sealed = self.poll(now_ns)
        self._history.close(now_ns)
        for window in self._windows:
            window.end = max(min(window.end, now_ns), window.start)
            self._complete(window)
        self._windows.clear()
        for _ in range(2):  # what was under way, then the rest
            sealed += self._seal(now_ns, wait=True)
        return sealed

    def _take(self) -> list[Happening]:
        """Everything new, remembered and looked at, in order of time; of one instant, events first."""
        found: list[Happening] = []
        for source in self._events:
            rows, missed = source.poll()
            if missed:
                self._history.lose(int(rows["t_ns"][0]), missed)
            for row in rows:
                event = {"t_ns": int(row["t_ns"])} | {n: text(row[n]) for n in ("kind", "name", "detail")}
                self._history.add_event(event)
                if (happening := self._detector.event(event)) is not None:
                    found.append(happening)
        rows, missed = self._control.poll()
        if len(rows):
            self._history.add_control(rows, missed)
            found += self._detector.control(rows)
        rows, missed = self._frames.poll()
        if len(rows):
            self._history.add_frames(rows, missed)
            found += self._detector.frames(rows)
        return sorted(found, key=lambda h: h.t_ns)

    # ── windows ──────────────────────────────────────────────────────────────────────────────────────

    def _begin_attempt(self, t_ns: int, about: dict[str, Any]) -> None:
        self._attempts.append(_Attempt(t_ns, about))
        self._fired.clear()  # what chattered in the last attempt may be the failure of this one
        for window in self._windows:
            if window.triggers[0].t_ns <= t_ns:
                _lower(window, t_ns)

    def _operator(self, t_ns: int) -> None:
        """A frame with the operator in control: it begins an intervention, or holds the window open."""
        last, self._operator_ns = self._operator_ns, t_ns
        going_on = last is not None and t_ns - last <= self._tail
        window = self._around(t_ns)
        if window is None or not going_on:
            # One that outlasts its window goes on in a window of its own.
            detail = {"continued": True} if going_on else {}
            self._fire(t_ns, TriggerKind.INTERVENTION, detail, always=window is None)
            window = self._around(t_ns)
        if window is not None:
            window.end = max(window.end, min(t_ns + self._tail, window.ceiling))

    def _around(self, t_ns: int) -> _Window | None:
        return next((w for w in self._windows if w.start <= t_ns < w.end), None)

    def _fire(self, t_ns: int, kind: TriggerKind, detail: dict[str, Any], always: bool = False) -> None:
        last = self._fired.get(kind)
        if last == t_ns:
            return  # the same, told by two sources
        if not always and last is not None and t_ns - last < self._min_interval:
            self.status.suppressed += 1
            return
        self._fired[kind] = t_ns
        trigger = Trigger(kind=kind, t_ns=t_ns, detail=detail)
        if (window := self._around(t_ns)) is not None:
            if kind != TriggerKind.BASELINE:
                window.triggers.append(trigger)
                window.end = max(window.end, min(t_ns + self._post, window.ceiling))
            return
        attempt, following = self._attempt(t_ns)
        since = attempt.start if attempt is not None else None
        known = (since, self._recorded_to, self._history.first_ns)
        earlier = [w.end for w in self._windows if w.end <= t_ns] + [t for t in known if t is not None]
        start = max([t_ns - self._pre, *earlier])
        later = [w.start for w in self._windows if w.start > t_ns]
        later += [following] if following is not None else []
        ceiling = min([start + self._max, *later])
        end = min(t_ns + self._post, ceiling)
        if end > start:
            for w in self._windows:
                if w.start < start:
                    _lower(w, start)
            about = attempt.about if attempt is not None else {}
            self._windows.append(_Window(start, end, ceiling, [trigger], about))
            self._windows.sort(key=lambda w: w.start)
        else:
            self.status.suppressed += 1  # came so late that its whole window is in an episode already

    def _attempt(self, t_ns: int) -> tuple[_Attempt | None, int | None]:
        """The attempt under way at a time, and when the next one began."""
        current, following = None, None
        for a in self._attempts:
            if a.start <= t_ns:
                current = a
            elif following is None:
                following = a.start
        return current, following

    # ── sealing ──────────────────────────────────────────────────────────────────────────────────────

    def _complete(self, window: _Window) -> None:
        """Take a window out of the history."""
        self._recorded_to = max(window.end, self._recorded_to or window.end)
        history = self._history
        control, frames = history.control(window.start, window.end), history.frames(window.start, window.end)
        if not control.num_rows and not frames.num_rows:
            self.status.suppressed += 1
            return
        events = history.events(window.start, window.end)
        first = window.triggers[0]
        about = window.about
        instructions = frames.column("instruction").unique().to_pylist()
        digests = frames.column("policy_digest").unique().to_pylist()
        me, shape = self._identity, self._shape
        seed = about.get("seed")
        draft = Manifest(
            episode_id=new_episode_id(me.clock_epoch_ns + first.t_ns, self._id_rng(window, control, frames)),
            site=me.site,
            robot=me.robot,
            joints=shape.joints,
            cameras=shape.cameras,
            state_dim=shape.state_dim,
            action_dim=shape.action_dim,
            chunk=shape.chunk,
            control_hz=me.control_hz,
            policy_hz=me.policy_hz,
            task=str(about.get("instruction") or next(iter(instructions), "")),
            shift=str(about.get("shift", me.shift)),
            seed=seed if isinstance(seed, int) else None,
            outcome=outcome_by(events, "policy") or outcome_of(first.kind),
            operator_outcome=outcome_by(events, "operator"),
            triggers=tuple(sorted(window.triggers, key=lambda t: t.t_ns)),
            window_ns=(window.start, window.end),
            policy_digest=next((d for d in digests if d), ""),
            runtime_version=me.runtime_version,
            clock=me.clock,
            clock_epoch_ns=me.clock_epoch_ns,
            drops=history.lost(window.start, window.end),
            files=(),
        )
        self._ready.append(_Ready(draft, (control, frames, pa.Table.from_pylist(events, EVENTS_SCHEMA))))

    def _id_rng(self, window: _Window, control: pa.Table, frames: pa.Table) -> np.random.Generator:
        """In a repeatable run the id follows from the content: the same for the same, else another."""
        if self._seed is None:
            return self._rng
        me = self._identity
        h = hashlib.sha256(f"{me.site}/{me.robot}/{me.clock_epoch_ns}/{self._seed}/{window}".encode())
        for table, name in ((control, "t_ns"), (control, "q"), (control, "tau"), (frames, "action")):
            h.update(np.ascontiguousarray(as_array(table, name)))
        h.update("".join(frames.column("policy_digest").unique().to_pylist()).encode())
        return np.random.default_rng(int.from_bytes(h.digest()))

    def _seal(self, now_ns: int, wait: bool = False) -> list[Manifest]:
        """Bring to disk what is ready, here or in the thread; keep what the disk does not take."""
        if self._sealing is None and self._ready:
            batch, self._ready = self._ready, []
            if self._thread is not None:
                self._sealing = self._thread.submit(self._write, batch)
            else:
                return self._settle_up(self._write(batch), now_ns)
        if self._sealing is not None and (wait or self._sealing.done()):
            done, self._sealing = self._sealing.result(), None
            return self._settle_up(done, now_ns)
        return []

    def _write(self, batch: list[_Ready]) -> _Sealed:
        done = _Sealed([], [])
        for r in batch:
            try:
                try:
                    manifest = seal(self._directory, r.draft, *r.tables, step=self._step)
                except OSError:
                    self._make_room(sum(t.nbytes for t in r.tables), priority(r.draft))
                    manifest = seal(self._directory, r.draft, *r.tables, step=self._step)
            except OSError as e:
                done.left.append(r)
                done.why = e.strerror or str(e)
            else:
                done.sealed.append(manifest)
        return done

    def _settle_up(self, done: _Sealed, now_ns: int) -> list[Manifest]:
        status = self.status
        self._ready = done.left + self._ready
        if done.left:
            status.why = done.why
            self._retry_ns = now_ns + RETRY_NS
        while len(self._ready) > UNSEALED_MAX:
            self._ready.remove(min(self._ready, key=lambda r: (priority(r.draft), r.draft.episode_id)))
            status.abandoned += 1
        status.refused = min(len(done.left), len(self._ready))
        status.sealed += len(done.sealed)
        return done.sealed


def run(
    recorder: Recorder,
    stop: Stop,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    period_s: float = 0.05,
) -> RecorderStatus:
    """The recorder as a process of its own, on the clock of the rows, until ``stop`` is set."""
    while not stop.wait(period_s):
        recorder.poll(clock_ns())
    recorder.finish(clock_ns())
    return recorder.status


def _lower(window: _Window, ceiling: int) -> None:
    window.ceiling = min(window.ceiling, ceiling)
    window.end = min(window.end, window.ceiling)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
