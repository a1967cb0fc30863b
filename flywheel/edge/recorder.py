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
operator       success | failure   a key that the operator pressed
policy         rejected            reason: System 2 made a chunk that may not be followed
policy         ood_score           score: how unlike the training data the scene is
plant          any                 a signal of the plant, or of the robot's own processes
=============  ==================  ===================================================================

It triggers by itself on a policy's attempt that ends badly, a stop, a tracking error, a lost grasp and a
missing chunk (control rows), an intervention (frames or event) and on a sample of attempts that end well:
see ``triggers``; ``rules`` says how each kind is debounced. Which time is recorded: see ``windows``.

What a ring says of one instant counts in the order in which it says it: "task end", then "task start" at the
same ``t_ns`` is how one attempt follows another at once.

Killed at any instruction it goes on where it was: the rings lie in memory that outlives it, and so does its
``Journal``, which is written at the end of each ``poll``. The next recorder looks at the rows since then as
this one would have, reads again what the rings still hold of open windows, and counts as lost what they do
not. A stop whose rows are lost is known by the changes of mode, which last for longer (``control_ring``).
Names of episodes follow from robot, boot and trigger, so that what is sealed again has the same one.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from flywheel.config import RecorderSettings
from flywheel.edge.campaigns import Campaign, CampaignWatch, only_cameras, watches
from flywheel.edge.history import ControlSource, History, Shape, Source, text
from flywheel.edge.journal import Journal
from flywheel.edge.link import Ring
from flywheel.edge.rows import Rings
from flywheel.edge.sealer import UNSEALED_MAX, Ready, RecorderStatus, Sealer
from flywheel.edge.spool import Stop
from flywheel.edge.triggers import Detector, Happening, What, outcome_by, outcome_of
from flywheel.edge.windows import Window, Windows
from flywheel.episode import as_array, commit, new_episode_id, prepared, sweep
from flywheel.schema import EVENTS_SCHEMA, Manifest

__all__ = ["UNSEALED_MAX", "Identity", "Recorder", "RecorderStatus", "run"]

_JOURNAL_VERSION = 1


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


class Recorder:
    """Reads the rings of one robot and seals episodes into ``directory``.

    ``seed`` makes episode ids follow from the content (lockstep); None from robot, boot and trigger.
    ``more_events`` are rings of further processes that log events. ``make_room(nbytes, priority)`` is asked
    when the disk is full. ``background`` seals in a thread, for a caller that must not wait for the disk: the
    same bytes, but ``poll`` tells of an episode later. ``journal`` lies beside the rings, for a recorder that
    may be killed. There must be one recorder to a directory.
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
        journal: Journal | None = None,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        if journal is not None and seed is not None:
            raise ValueError("seed is for lockstep, where no recorder is killed; leave out seed or journal")
        directory.mkdir(parents=True, exist_ok=True)
        self.status = RecorderStatus()
        self._directory, self._identity, self._seed = directory, identity, seed
        self._journal, self._step = journal, step
        self._rings, self._event_rings = rings, (rings.events, *more_events)
        self._boot = uuid.uuid4().hex if seed is None else str(seed)
        self._windows = Windows(settings)
        self._watches: list[CampaignWatch] = []
        self._shape = Shape(rings)
        memory = round(settings.memory_mb * 1e6)
        self._history = History(self._shape, memory)
        self._sealer = Sealer(directory, self.status, make_room, self._save, memory, background, step)
        state = self._last_words()
        self._closed = [Window.of(w) for w in state["closed"]] if state is not None else []
        if state is not None:
            self._boot = state["boot"]
            self._identity = replace(identity, clock_epoch_ns=state["epoch_ns"])
            self._windows.restore(state["windows"])
            self.status.resumed = True
        self.detector = Detector(settings, f"{identity.site}/{identity.robot}/{self._boot}")
        self._campaigns: dict[str, int] = {} if state is None else state["campaigns"]
        self._open_sources(state)
        self._finish_prepared()

    # ── going on after a kill ────────────────────────────────────────────────────────────────────────

    def _last_words(self) -> dict[str, Any] | None:
        """What the recorder before this one knew; None if there was none, or it read other rings."""
        state = self._journal.load() if self._journal is not None else None
        if state is None or state["version"] != _JOURNAL_VERSION:
            return None
        mine = state["seen"]["events"]
        if len(mine) != len(self._event_rings) or state["seen"]["control"] > self._rings.control.written:
            return None
        return state

    def _open_sources(self, state: dict[str, Any] | None) -> None:
        rings, history = self._rings, self._history
        if state is None:
            self._control, self._frames = ControlSource(rings.control), Source(rings.frames)
            self._events = [Source(r) for r in self._event_rings]
            return
        seen, began = state["seen"], state["began"]
        self._control = ControlSource(rings.control, seen["control"], began["control"])
        self._frames = Source(rings.frames, seen["frames"], began["frames"])
        self._events = [
            Source(r, n, min(n, r.written - r.capacity + 1))
            for r, n in zip(self._event_rings, seen["events"], strict=True)
        ]
        history.resume(self._windows.first_ns, state["first_frame_ns"])
        self.detector.restore(state["detector"])

    def _finish_prepared(self) -> None:
        """Complete what the one before had written, and remove what it had not."""
        done = prepared(self._directory)
        if self._journal is not None and done:
            spans = {m.episode_id: m.window_ns for m in done}
            self._closed = [w for w in self._closed if self._name(w) not in spans]
            for window in list(self._windows.open):
                if (span := spans.get(self._name(window))) is not None:
                    self._windows.done(window, span[1])
            self._save()
        for manifest in done:
            commit(self._directory, manifest, self._step)
        sweep(self._directory)

    def _save(self) -> None:
        """Write down everything that the next recorder must know."""
        if self._journal is None:
            return
        self._step("save")
        state: dict[str, Any] = {
            "version": _JOURNAL_VERSION,
            "boot": self._boot,
            "epoch_ns": self._identity.clock_epoch_ns,
            "seen": {
                "control": self._control.seen,
                "frames": self._frames.seen,
                "events": [s.seen for s in self._events],
            },
            "began": {"control": self._control.began, "frames": self._frames.began},
            "first_frame_ns": self._history.first_frame_ns,
            "windows": self._windows.state(),
            "closed": [w.as_dict() for w in (*self._closed, *self._sealer.waiting())],
            "detector": self.detector.state(),
            "campaigns": self.campaigns(),
        }
        if not self._journal.save(state):
            for window in (*state["windows"]["open"], *state["closed"]):
                for trigger in window["triggers"]:
                    trigger["detail"] = {}
            if not self._journal.save(state):
                self.status.why = "the journal is too small for what is being recorded"

    # ── recording ────────────────────────────────────────────────────────────────────────────────────

    def poll(self, now_ns: int) -> list[Manifest]:
        """Take what is new from the rings; seal what is complete. Returns what was sealed.

        To be called more often than the rings wrap. A full disk is no error here: the episode stays in
        memory and is tried again (see ``status``).
        """
        self._look()
        self._save()  # what was seen stays seen, whatever sealing comes to
        closed, self._closed = self._closed, []
        for window in (*closed, *self._windows.due(now_ns, self._rows_to())):
            self._complete(window)
        self._history.forget(self._windows.needed_from(now_ns))
        sealed = self._sealer.seal(now_ns)
        self._save()
        return sealed

    def finish(self, now_ns: int) -> list[Manifest]:
        """The end: take what is left and seal what is open, shorter than asked for if need be."""
        sealed = self.poll(now_ns)
        self._history.close(now_ns)
        for window in self._windows.end_all(now_ns, self._rows_to()):
            self._complete(window)
        for _ in range(2):  # what was under way, then the rest
            sealed += self._sealer.seal(now_ns, wait=True)
        self._save()
        return sealed

    @property
    def epoch_ns(self) -> int:
        """UTC at ``t_ns = 0``."""
        return self._identity.clock_epoch_ns

    def request(self, start_ns: int, end_ns: int, detail: dict[str, Any]) -> bool:
        """Record a window that somebody asked for, as far as its rows are here or still to come, and in no
        episode yet; False if nothing of it is."""
        oldest = self._history.oldest_ns
        start = start_ns if oldest is None else max(start_ns, oldest)
        return end_ns > start and self._windows.ask(start, end_ns, detail)

    def set_campaigns(self, campaigns: Iterable[Campaign], now_unix_ns: int) -> None:
        """What else to record, as verified; those that went on before go on counting."""
        self._campaigns = self.campaigns()
        running = {w.campaign.campaign_id: w for w in self._watches}
        wanted = watches(campaigns, self._identity.robot, now_unix_ns, self._campaigns)
        self._watches = [
            old if (old := running.get(w.campaign.campaign_id)) and old.campaign == w.campaign else w
            for w in wanted
        ]
        self.detector.watches = list(self._watches)

    def campaigns(self) -> dict[str, int]:
        """How often the condition of each campaign was met, by id: what the robot reports."""
        return self._campaigns | {w.campaign.campaign_id: w.count for w in self._watches}

    def _rows_to(self) -> int | None:
        """The next row will be of this time or later."""
        last = self._history.last_ns
        return None if last is None else last + round(1.5e9 / self._identity.control_hz)

    def _look(self) -> None:
        for h in self._take():
            if h.what == What.ATTEMPT:
                self._windows.begin_attempt(h.t_ns, h.detail)
            elif h.what == What.OPERATOR:
                self._windows.operator(h.t_ns)
            elif h.kind is not None:
                self._windows.fire(h)
        self.status.suppressed = self._windows.suppressed

    def _take(self) -> list[Happening]:
        """Everything new, remembered and looked at, in order of time; of one instant, events first."""
        found: list[Happening] = []
        for source in self._events:
            news = source.poll()
            if news.missed:
                self._history.lose(int(news.rows["t_ns"][0]), news.missed)
            for i, row in enumerate(news.rows):
                event = {"t_ns": int(row["t_ns"])} | {n: text(row[n]) for n in ("kind", "name", "detail")}
                self._history.add_event(event)
                if i >= news.fresh:
                    found += self.detector.event(event)
        news = self._control.poll()
        if len(news.rows):
            self._history.add_control(news.rows, news.missed)
            self._windows.first_ns = self._history.first_ns
            if len(self._control.unseen):
                found += self.detector.control(self._control.unseen)
            if news.fresh < len(news.rows):
                found += self.detector.control(news.rows[news.fresh :])
        news = self._frames.poll()
        if len(news.rows):
            self._history.add_frames(news.rows, news.missed, self._rings.frames)
            self.status.overflow = self._history.overflow
            if news.fresh < len(news.rows):
                found += self.detector.frames(news.rows[news.fresh :])
        found += self.detector.verdicts()
        return sorted(found, key=lambda h: h.t_ns)

    def _overdue(self, window: Window) -> int:
        """Control rows at a window's end that did not come in time: if they come later, nothing has them."""
        to, last = self._rows_to(), self._history.last_ns
        if to is None or last is None or to >= window.end:
            return 0
        return int((window.end - 1 - max(last, window.start)) * self._identity.control_hz / 1e9)

    def _complete(self, window: Window) -> None:
        """Take a window out of the history."""
        history = self._history
        control, frames = history.control(window.start, window.end), history.frames(window.start, window.end)
        drops = history.lost(window.start, window.end)
        if not control.num_rows and not frames.num_rows and not drops:
            self.status.suppressed += 1
            return
        events = history.events(window.start, window.end)
        first = window.triggers[0]
        about = window.about
        instructions = frames.column("instruction").unique().to_pylist()
        digests = frames.column("policy_digest").unique().to_pylist()
        me, shape = self._identity, self._shape
        cameras = only_cameras(window.triggers, shape.cameras)
        if cameras != shape.cameras:
            left_out = [f"image.{c}" for c in shape.cameras if c not in cameras]
            frames = frames.drop_columns(left_out)
        seed = about.get("seed")
        draft = Manifest(
            episode_id=self._name(window, control, frames),
            site=me.site,
            robot=me.robot,
            joints=shape.joints,
            cameras=cameras,
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
            drops=drops + self._overdue(window),
            files=(),
        )
        tables = (control, frames, pa.Table.from_pylist(events, EVENTS_SCHEMA))
        self._sealer.ready.append(Ready(draft, tables, window))

    def _name(self, window: Window, *tables: pa.Table) -> str:
        """The episode's id: of robot, boot and trigger, and so the same whenever this window is sealed.

        In a run that is repeated from a seed, of the content: the same for the same, else another.
        """
        me, first = self._identity, window.triggers[0]
        h = hashlib.sha256(f"{me.site}/{me.robot}/{self._boot}/{first.kind}/{first.t_ns}".encode())
        if self._seed is not None:
            control, frames = tables
            h.update(f"{me.clock_epoch_ns}/{window}".encode())
            for table, name in ((control, "t_ns"), (control, "q"), (control, "tau"), (frames, "action")):
                h.update(np.ascontiguousarray(as_array(table, name)))
            h.update("".join(frames.column("policy_digest").unique().to_pylist()).encode())
        rng = np.random.default_rng(int.from_bytes(h.digest()))
        return new_episode_id(me.clock_epoch_ns + first.t_ns, rng)


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
