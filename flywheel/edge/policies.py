"""System 2's processes: which one acts, which stands by; swap, trial, fall-back, restart.

A new bundle is loaded, warmed up and tried on a real observation in a second process while the first one
acts, so that nothing about it, not even a crash of its graph, can hold up the running policy. The change is
one word: the supervisor takes the grant away, the acting process acknowledges at its next tick (or is killed
if it does not), the other one gets the grant. While the new policy is on trial the old one stands by, loaded
and warm: falling back is the same word again.

::

    swap(ref) ─▶ loading ──ready──▶ handing over ──acknowledged──▶ on trial ──trial_s──▶ confirmed
                   │ error, crash                                    │ crash, refused outputs, too slow
                   ▼                                                 ▼
                refused, nothing changed                          the previous one acts
"""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.edge.children import Child, ProcessRecord, Watched
from flywheel.edge.link import Arena, load, store
from flywheel.edge.processes import ACK, GRANT, BundleRef, Plan, Shared, require_fit
from flywheel.edge.realtime import TICKS
from flywheel.edge.supervision import Backoff, Conduct, Verdict
from flywheel.errors import BundleError, ConfigError
from flywheel.schema import Strict

ACK_S = 1.0  # the acting process is killed if it has not acknowledged by then
_PLACES = ("system2.a", "system2.b")

Tell = Callable[[str, str, dict[str, Any]], None]  # kind, name, detail of an event


class Refusal(Strict):
    """The last bundle that was not taken, or was given back, and why."""

    digest: str
    reason: str


@dataclass
class _Candidate:
    """A process beside the acting one. ``then``: what it is for."""

    ref: BundleRef
    watched: Watched
    then: str  # "trial", "fall back", "wait" (for ``switch``), "stand by" (the previous one, on trial)
    reason: str = ""
    done: Future[str] | None = None


@dataclass
class _Handover:
    """The grant was taken away when the acting process had begun ``ticks`` ticks."""

    new: _Candidate
    since_s: float
    ticks: int


class Policies:
    """System 2 of one robot.

    ``told`` hears of changes that a robot's disk should follow: ("acting" | "confirmed" | "fell back" |
    "refused", digest, reason).
    """

    def __init__(
        self,
        plan: Plan,
        shared: Shared,
        arena: Arena,
        tell: Tell,
        restart: bool = True,
        told: Callable[[str, str, str], None] = lambda *_: None,
        previous: BundleRef | None = None,
        trial: bool = False,
    ) -> None:
        self.current = plan.ref
        self.previous = previous
        self.refusal: Refusal | None = None
        self.restarts = 0
        self.swaps = 0
        self.fall_backs = 0
        self.acting: Watched | None = None
        self.loaded = ""  # digest that the acting process said it loaded
        self._plan, self._shared, self._arena = plan, shared, arena
        self._settings = plan.supervision
        self._tell, self._told, self._restart = tell, told, restart
        self._candidate: _Candidate | None = None
        self._handover: _Handover | None = None
        self._generation = 0
        self._backoff = Backoff()
        self._again_s = float("-inf")
        self._conduct = Conduct(self._settings, 0.0, trial)
        self._requests: queue.SimpleQueue[Callable[[float], None]] = queue.SimpleQueue()

    # ── from any thread ──────────────────────────────────────────────────────────────────────────────

    def swap(self, ref: BundleRef) -> Future[str]:
        """Load a bundle beside the acting one and put it in use, on trial; the result is the loaded digest.

        The future fails with ``BundleError`` if it cannot be taken; then nothing has changed.
        """
        done: Future[str] = Future()
        self._requests.put(lambda now: self._prepare(now, ref, "trial", "", done))
        return done

    def prepare(self, ref: BundleRef) -> Future[str]:
        """The same without putting it in use: that waits for ``switch``."""
        done: Future[str] = Future()
        self._requests.put(lambda now: self._prepare(now, ref, "wait", "", done))
        return done

    def switch(self, digest: str) -> None:
        """Put in use what ``prepare`` made ready, if it is still there."""
        self._requests.put(lambda now: self._switch(now, digest))

    def discard(self) -> None:
        """Let go of what ``prepare`` made ready."""
        self._requests.put(lambda _: self._discard())

    def give_back(self, reason: str) -> None:
        """Fall back to the previous policy, for a reason that is not the supervisor's own."""
        self._requests.put(lambda now: self._fall_back(now, reason))

    # ── the supervisor's ─────────────────────────────────────────────────────────────────────────────

    @property
    def trial(self) -> bool:
        """Whether the acting policy is on trial."""
        return self._conduct.trial

    @property
    def busy(self) -> bool:
        """Whether a change is under way."""
        return self._handover is not None or (
            self._candidate is not None and self._candidate.then != "stand by"
        )

    @property
    def records(self) -> list[ProcessRecord]:
        """Its processes, the acting one first."""
        mine = [self.acting, self._candidate.watched if self._candidate is not None else None]
        return [w.child.record for w in mine if w is not None]

    def start(self, now_s: float) -> None:
        """Start the first process."""
        self._conduct = Conduct(self._settings, now_s, self._conduct.trial)
        self._act(now_s, self.current)

    def adopt(
        self,
        now_s: float,
        records: list[ProcessRecord],
        current: BundleRef,
        previous: BundleRef | None,
        refusal: Refusal | None,
        trial: bool,
    ) -> None:
        """Take over what another supervisor left: the acting process if it lives, nothing that stood by."""
        self.current, self.previous, self.refusal = current, previous, refusal
        self._generation = max((r.generation for r in records), default=0)
        self._conduct = Conduct(self._settings, now_s, trial)
        found = [Child.adopt(r) for r in records]
        for other in found[1:]:
            if other is not None:
                other.kill()
                other.close()
        if not found or found[0] is None:
            self._act(now_s, current)
            return
        child = found[0]
        self.acting = Watched(child, self._shared.places[child.record.place], self._settings, now_s)
        self._grant(child.record.generation)

    def step(self, now_s: float, infer_ms: np.ndarray[Any, Any], invalid: int) -> None:
        """One look. ``infer_ms`` and ``invalid``: what was published and refused since the last one."""
        while not self._requests.empty():
            self._requests.get()(now_s)
        if self._handover is None:
            for latency in infer_ms:
                self._conduct.output(float(latency))
            for _ in range(invalid):
                self._conduct.invalid()
        self._look_at_candidate(now_s)
        if self._handover is not None:
            self._hand_over(now_s)
            return
        self._look_at_acting(now_s)
        verdict, reason = self._conduct.verdict(now_s)
        if verdict is Verdict.CONFIRM:
            self._dismiss()
            self._tell("policy", "confirmed", {"digest": self.current.digest, "why": reason})
            self._told("confirmed", self.current.digest, reason)
        elif verdict is Verdict.GIVE_BACK:
            self._fall_back(now_s, reason)

    def close(self, timeout_s: float, meanwhile: Callable[[], None]) -> None:
        """End them all."""
        self._grant(0)
        self._dismiss()
        if self.acting is not None:
            self.acting.child.end(timeout_s, meanwhile)

    # ── how ──────────────────────────────────────────────────────────────────────────────────────────

    def _spawn(self, now_s: float, ref: BundleRef) -> Watched:
        taken = {r.place for r in self.records}
        place = next(p for p in _PLACES if p not in taken)
        self._generation += 1
        child = Child.start("system2", self._plan.running(ref), self._arena, place, self._generation)
        return Watched(child, self._shared.places[place], self._settings, now_s)

    def _act(self, now_s: float, ref: BundleRef) -> None:
        """Start the acting process where none is alive."""
        self.acting = self._spawn(now_s, ref)
        self._grant(self.acting.child.record.generation)

    def _grant(self, generation: int) -> None:
        store(self._shared.supervisor, GRANT, generation)

    def _prepare(
        self, now_s: float, ref: BundleRef, then: str, reason: str, done: Future[str] | None
    ) -> None:
        try:
            if self.busy:
                raise BundleError(f"{ref.directory}: another change of policy is under way; try again")
            if self.trial and then != "fall back":
                raise BundleError(
                    f"{ref.directory}: the acting policy is on trial; try again when it is over"
                )
            if not ref.digest:
                raise ConfigError(f"{ref.directory}: give the digest that was verified")
            require_fit(self._plan, ref)
        except (BundleError, ConfigError) as e:
            self._refuse(ref, str(e), done)
            return
        self._dismiss()
        self._candidate = _Candidate(ref, self._spawn(now_s, ref), then, reason, done)

    def _switch(self, now_s: float, digest: str) -> None:
        c = self._candidate
        if c is not None and c.ref.digest == digest and c.then == "wait" and c.watched.ready:
            c.then = "trial"
            self._begin(now_s, c)

    def _discard(self) -> None:
        if self._candidate is not None and self._candidate.then == "wait":
            self._dismiss()

    def _look_at_candidate(self, now_s: float) -> None:
        c = self._candidate
        if c is None:
            return
        was_ready = c.watched.ready
        why = c.watched.look(now_s)
        if why is not None:
            c.watched.child.close()
            self._candidate = None
            if self._handover is not None:  # it died on the way in
                self._handover = None
                self._regrant()
            if c.then == "stand by":
                self._tell("policy", "standby_lost", {"digest": c.ref.digest, "why": why})
            else:
                if c.then == "fall back":
                    self.previous = None  # it does not load either
                self._refuse(c.ref, why, c.done)
            return
        if not c.watched.ready or was_ready:
            return
        if c.done is not None:
            c.done.set_result(c.watched.said["digest"])
            c.done = None
        if c.then in ("trial", "fall back"):
            self._begin(now_s, c)

    def _regrant(self) -> None:
        if self.acting is not None and self.acting.child.alive:
            self._grant(self.acting.child.record.generation)

    def _begin(self, now_s: float, new: _Candidate) -> None:
        """Take the grant away, for ``new``."""
        self._grant(0)
        ticks = load(self.acting.place.status, TICKS) if self.acting is not None else 0
        self._handover = _Handover(new, now_s, ticks)

    def _hand_over(self, now_s: float) -> None:
        """Give the grant to the new one as soon as the old one cannot write any more."""
        h = self._handover
        assert h is not None
        old = self.acting
        if old is not None and old.child.alive:
            acknowledged = load(old.place.words, ACK) not in (old.child.record.generation, -1)
            if old.ready and acknowledged and load(old.place.status, TICKS) > h.ticks:
                pass  # what it had under way has ended, and it has seen that it has no grant
            elif now_s - h.since_s < ACK_S:
                return
            else:
                self._tell("plant", "system2_killed", {"why": "did not give up the grant"})
                old.child.kill()
        self._enter(now_s, h.new)

    def _enter(self, now_s: float, new: _Candidate) -> None:
        """``new`` acts from now on."""
        old, old_ref = self.acting, self.current
        self._handover = self._candidate = None
        self.acting, self.current = new.watched, new.ref
        self._grant(new.watched.child.record.generation)
        self._backoff = Backoff()
        back = new.then in ("fall back", "stand by")
        self._conduct = Conduct(self._settings, now_s, trial=not back)
        detail = {"from": old_ref.digest, "to": new.ref.digest}
        if back:
            self.previous = None
            self.fall_backs += 1
            self.refusal = Refusal(digest=old_ref.digest, reason=new.reason[:500])
            self._tell("policy", "fell_back", {**detail, "why": new.reason})
            self._told("fell back", old_ref.digest, new.reason)
            if old is not None:
                old.child.kill()
                old.child.close()
            return
        self.previous = old_ref
        self.swaps += 1
        self._tell("policy", "swapped", detail)
        self._told("acting", new.ref.digest, "")
        if old is not None and old.child.alive:
            self._candidate = _Candidate(old_ref, old, "stand by")
        elif old is not None:
            old.child.close()

    def _look_at_acting(self, now_s: float) -> None:
        w = self.acting
        if w is None:
            if self._restart and now_s >= self._again_s:
                self.restarts += 1
                self._act(now_s, self.current)
            return
        why = w.look(now_s)
        self.loaded = str(w.said.get("digest", self.loaded))
        if why is None:
            if w.ready and not self.current.digest:  # the first one: from now on only these bytes
                self.current = self.current.model_copy(update={"digest": self.loaded})
            return
        if w.child.code != 0:  # 0: somebody asked it to end
            self._conduct.crashed(now_s)
        self._backoff, pause = self._backoff.ended(now_s - w.since_s, self._settings)
        if w.hopeless:
            pause = float("inf")
            if self.previous is not None:
                self._tell("plant", "system2_ended", {"code": w.child.code, "why": why})
                w.child.close()
                self.acting = None
                self._fall_back(now_s, why)
                return
        self._tell("plant", "system2_ended", {"code": w.child.code, "why": why})
        w.child.close()
        self.acting = None
        self._again_s = now_s + pause

    def _fall_back(self, now_s: float, reason: str) -> None:
        """Give the current bundle back for the previous one; without one, say so and go on."""
        c, ref = self._candidate, self.previous
        if ref is None or not Path(ref.directory).is_dir():
            self._tell("policy", "kept", {"digest": self.current.digest, "why": f"{reason}; no other"})
            self._conduct = Conduct(self._settings, now_s, trial=False)
            return
        if c is not None and c.then == "stand by" and c.watched.ready:
            c.reason = reason
            self._begin(now_s, c)
            return
        if self.busy:
            return  # a change is under way already: its own verdict follows
        if self.acting is not None:
            self._prepare(now_s, ref, "fall back", reason, None)
        else:
            self._enter(now_s, _Candidate(ref, self._spawn(now_s, ref), "fall back", reason))
        # judged afresh while that is under way
        self._conduct = Conduct(self._settings, now_s, trial=False)

    def _refuse(self, ref: BundleRef, reason: str, done: Future[str] | None) -> None:
        self.refusal = Refusal(digest=ref.digest, reason=reason[:500])
        self._tell("policy", "refused", {"digest": ref.digest, "why": reason})
        self._told("refused", ref.digest, reason)
        if done is not None:
            done.set_exception(BundleError(f"{ref.directory}: {reason}"))

    def _dismiss(self) -> None:
        """End what stands by."""
        if self._candidate is not None:
            self._candidate.watched.child.signal(signal.SIGKILL)
            self._candidate.watched.child.end(0.0)
            self._candidate = None
