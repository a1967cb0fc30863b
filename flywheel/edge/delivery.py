"""Signed releases into a moving robot: the updater in a thread beside the supervisor.

The updater decides what should be in use and keeps the A/B slots on the disk; the supervisor decides what is
in use this instant, and the disk follows. A release is warmed up by the very process that will act by it. If
the power goes between the two, the updater's own trial (its count of starts) catches it at the next boot.

The network, the disk and a slow download only ever hold up this thread.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from flywheel.edge.asked import leave_campaigns
from flywheel.edge.processes import BundleRef
from flywheel.edge.runtime import Wall, bundle_ref
from flywheel.edge.slots import Slots
from flywheel.edge.updater import Action, Poll, Updater
from flywheel.errors import BundleError, FlywheelError, ReleaseError, StoreError

POLL_S = 10.0
_LOAD = "import sys; from flywheel.edge.policy import Policy; print(Policy.load(sys.argv[1]).digest)"


class Delivery:
    """One robot's releases, as a context manager around its run.

    ``heard`` goes to the supervisor as ``told``; ``start`` gives this the running supervisor.
    """

    def __init__(
        self, updater: Updater, poll_s: float = POLL_S, on_poll: Callable[[Poll], None] = lambda _: None
    ) -> None:
        self._updater = updater
        self._poll_s = poll_s
        self._on_poll = on_poll
        self._news: queue.SimpleQueue[tuple[str, str, str] | None] = queue.SimpleQueue()
        self._wall: Wall | None = None
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    @property
    def previous(self) -> BundleRef | None:
        """What the robot can fall back to when it starts."""
        return previous(self._updater.slots)

    @property
    def trial(self) -> bool:
        """Whether the policy in use is on trial when the robot starts."""
        return self._updater.slots.state.trial

    def heard(self, what: str, digest: str, reason: str) -> None:
        """A change of policy that the disk is to follow."""
        self._news.put((what, digest, reason))

    def start(self, wall: Wall) -> None:
        """Begin to look for releases."""
        self._wall = wall
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._news.put(None)
        if self._thread.ident is not None:
            self._thread.join(5.0)  # a download under way ends with the process; what it staged is unnamed

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            try:
                news = self._news.get(timeout=max(due - time.monotonic(), 0.0))
            except queue.Empty:
                self._poll()
                due = time.monotonic() + self._poll_s
                continue
            if news is None:
                return
            try:
                self._follow(*news)
            except (FlywheelError, OSError) as e:
                self._on_poll(Poll(Action.REFUSED, news[1], f"slots do not follow: {e}"))

    def _follow(self, what: str, digest: str, reason: str) -> None:
        active = self._updater.slots.active
        if active is None or active.release.digest != digest:
            return  # not of the slots: nothing on the disk to change
        if what == "confirmed":
            self._updater.confirm()
        elif what == "fell back":
            self._on_poll(self._updater.give_back(reason, self._as_loaded))

    def _poll(self) -> None:
        assert self._wall is not None
        policies = self._wall.policies
        if policies.trial or policies.busy:
            return  # one change at a time
        polled = self._updater.poll(self._warm_up)
        if polled.action is Action.SWAPPED:
            policies.switch(polled.digest)
        elif polled.action is Action.FELL_BACK:
            policies.give_back(polled.reason)
        else:
            policies.discard()
        self._on_poll(polled)
        try:
            if polled.action is not Action.OFFLINE:
                self._ask()
            self._updater.report(**_facts(self._wall))
        except (ReleaseError, StoreError, OSError) as e:
            self._on_poll(Poll(Action.OFFLINE, polled.digest, str(e)))

    def _ask(self) -> None:
        """Leave what is signed to be recorded for the recorder's process."""
        assert self._wall is not None
        if (recording := self._wall.plan.recording) is not None:
            leave_campaigns(Path(recording.directory), self._updater.campaigns())

    def _warm_up(self, directory: Path) -> str:
        """Have System 2 load it beside the acting one; it stays ready for the switch."""
        assert self._wall is not None
        acting = self._wall.policies.current
        if acting.directory == str(directory.absolute()):
            return self._as_loaded(directory)
        return self._wall.policies.prepare(bundle_ref(directory)).result()

    def _as_loaded(self, _: Path) -> str:
        """What already acts needs no loading."""
        assert self._wall is not None
        return self._wall.policies.current.digest


def previous(slots: Slots) -> BundleRef | None:
    """The policy that is fit to fall back to, if there is one."""
    other = slots.other
    if other is None or not other.proven or not slots.sound("other"):
        return None
    return bundle_ref(slots.directory("other"), other.release.digest)


def boot(updater: Updater) -> BundleRef:
    """The policy that a robot starts with: the one in use, else the first that is offered to it.

    Raises ``BundleError`` if there is none.
    """
    if updater.boot(load_apart) is None:
        polled = updater.poll(load_apart)
        if updater.active() is None:
            raise BundleError(
                f"{updater.robot}: no verified policy to start with: {polled.reason or polled.action}"
            )
    active = updater.active()
    assert active is not None
    return bundle_ref(active.directory, active.digest)


def load_apart(directory: Path) -> str:
    """Load a bundle in a process of its own, which its graph may crash; returns the loaded digest.

    For ``Updater.boot``, before anything moves. Raises ``BundleError`` if it does not load.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(directory)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        why = done.stderr.strip().splitlines()
        raise BundleError(why[-1] if why else f"{directory}: its process ended with {done.returncode}")
    return done.stdout.strip()


def _facts(wall: Wall) -> dict[str, Any]:
    """What the fleet is told besides the policy."""
    return {
        "mode": wall.figures.mode,
        "misses_ppm": wall.figures.misses_ppm,
        "spool_pending": max(int(wall.status()["uploader"].get("waiting", 0)), 0),
        "campaigns": wall.status()["recorder"].get("campaigns", {}),
    }
