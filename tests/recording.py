"""Rings filled by hand, in simulated time: a stand-in for the two systems, for what reads their rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.config import RecorderSettings
from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.images import FrameRing
from flywheel.edge.link import Ring
from flywheel.edge.recorder import Identity, Recorder
from flywheel.edge.rows import EventLog, Rings, event_dtype, frame_dtype
from flywheel.schema import Manifest, Mode
from tests.samples import ACTION, CAMERAS, CHUNK, DIGEST, EPOCH_NS, JOINTS, STATE, jpeg

MS = 1_000_000
S = 1000 * MS
PICTURES = {c: jpeg(50 + i) for i, c in enumerate(CAMERAS)}
WINDOWS = RecorderSettings(
    pre_s=1.0,
    post_s=0.5,
    tail_s=0.3,
    min_interval_s=0.2,
    settle_s=0.1,
    max_episode_s=4.0,
    baseline_fraction=0.0,
)
IDENTITY = Identity("lab", "r1", "lockstep", EPOCH_NS, "test", shift="factory")


class Stage:
    """A robot on stage: ``play`` lets time pass (rows at 1 kHz, frames at 10 Hz, polls every 20 ms)."""

    def __init__(
        self,
        directory: Path,
        settings: RecorderSettings = WINDOWS,
        identity: Identity = IDENTITY,
        control_rows: int = 4096,
        **options: Any,
    ) -> None:
        frame = frame_dtype(dict.fromkeys(CAMERAS, (64, 64)), STATE, CHUNK, ACTION)
        self.rings = Rings(
            ControlRing(control_dtype(JOINTS), control_rows),
            FrameRing(frame, 64, 1 << 20),
            Ring(event_dtype(), 64),
        )
        self.recorder = Recorder(self.rings, settings, directory, identity, **{"seed": 0, **options})
        self.events = EventLog(self.rings.events)
        self.now = 0
        self.mode = Mode.FOLLOW
        self.error = 0.0
        self.operator = False
        self.blind = False
        self.sealed: list[Manifest] = []
        self._control = self.rings.control.record()
        self._frame = self.rings.frames.record()
        self._frame["instruction"] = b"pick the red box"
        self._frame["policy_digest"] = DIGEST.encode()

    def say(self, kind: str, name: str, **detail: Any) -> None:
        """An event now."""
        self.events.add(self.now, kind, name, detail)

    def play(
        self, seconds: float, poll: bool = True, each_ms: Callable[[int], None] = lambda _: None
    ) -> list[Manifest]:
        """Let time pass; returns what was sealed meanwhile."""
        sealed: list[Manifest] = []
        for _ in range(round(seconds * 1000)):
            t = self.now
            each_ms(t)
            if t % (100 * MS) == 0:
                self._push_frame(t)
            self._push_control(t)
            self.now = t + MS
            if poll and self.now % (20 * MS) == 0:
                sealed += self.recorder.poll(self.now)
        self.sealed += sealed
        return sealed

    def finish(self) -> list[Manifest]:
        """The end of it all."""
        sealed = self.recorder.finish(self.now)
        self.sealed += sealed
        return sealed

    def _push_control(self, t: int) -> None:
        row = self._control
        row["t_ns"] = t
        row["mode"] = self.mode
        row["q"] = np.sin(t / S)
        row["q_ref"] = row["q"] + self.error
        self.rings.control.push(row)

    def _push_frame(self, t: int) -> None:
        row = self._frame
        row["t_ns"] = t
        row["intervention"] = self.operator
        self.rings.frames.push_frame(row, dict.fromkeys(PICTURES, b"") if self.blind else PICTURES)
