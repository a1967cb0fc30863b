"""The robot's side of delivery: verified pull, A/B slots, trial, automatic fallback.

What a robot acts by must be signed twice over: the bundle by its group's keys, and, for a candidate, the
share of robots that may try it and the word that it may act. The rollout's state object in the store, which
is not signed, can only narrow that. Every byte that is loaded was hashed against signed metadata, and the
runtime's own digest of what it loaded must agree.

Where anything does not verify, is expired or cannot be reached, the robot goes on with the policy that it
has verified before: ``poll`` says why and changes nothing.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flywheel import __version__
from flywheel.edge.campaigns import Campaign
from flywheel.edge.signed import Offer, SignedReleases
from flywheel.edge.slots import TRIAL_BOOTS, Slot, Slots, require
from flywheel.errors import (
    BundleError,
    ConfigError,
    FlywheelError,
    IntegrityError,
    ReleaseError,
    StoreUnavailable,
)
from flywheel.schema import Assignment, Group, Release, RobotReport, RolloutStage
from flywheel.store import Store

WarmUp = Callable[[Path], str]  # loads a bundle, runs it once, returns the digest of the loaded bytes
CONFIRM_WITHIN_S = 600.0


class Action(StrEnum):
    """What a poll did."""

    NONE = "none"  # nothing to do
    STAGED = "staged"  # a candidate to compare beside the current policy lies verified in the other slot
    SWAPPED = "swapped"  # a new policy is in use, on trial
    FELL_BACK = "fell back"  # the previous policy is in use again
    REFUSED = "refused"  # something did not verify or did not run; nothing changed
    OFFLINE = "offline"  # the store could not be reached; nothing changed


@dataclass(frozen=True)
class Poll:
    """What a poll did, with which policy, and why."""

    action: Action
    digest: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Active:
    """The policy in use: ``digest`` is that of the bytes that were loaded."""

    directory: Path
    digest: str
    release: Release
    trial: bool


def choose(
    robot: str,
    canary: Release | None,
    assignment: Assignment | None,
    *,
    site: str = "",
    wave: Release | None = None,
) -> tuple[Group, bool]:
    """The group that a robot acts by, and whether it compares the canary release beside it. Pure.

    A candidate acts only where its signed release, the rollout's state and the robot's draw all say so; once
    it is approved, the signed release of a wave and the draw are enough.
    """
    if wave is not None and wave.acting and wave.admits(robot, site):
        return Group.WAVE, False
    if (
        canary is None
        or assignment is None
        or (canary.rollout_id, canary.digest) != (assignment.rollout_id, assignment.bundle_digest)
        or not canary.admits(robot, site)
    ):
        return Group.STABLE, False
    shadow = assignment.stage is RolloutStage.SHADOW and assignment.in_cohort(robot)
    return (assignment.group(robot) if canary.acting else Group.STABLE), shadow


class Updater:
    """One robot's policy: which one is in use, and whether another one should be."""

    def __init__(
        self,
        root: Path,
        store: Store,
        *,
        site: str,
        robot: str,
        bootstrap: bytes,
        runtime_version: str = __version__,
        confirm_within_s: float = CONFIRM_WITHIN_S,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """``root`` is the robot's directory for policies, ``bootstrap`` the root metadata that it trusts from
        the factory. Raises ``ConfigError`` if another process works in ``root``."""
        root.mkdir(parents=True, exist_ok=True)
        self._lock = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"{root}: another updater works here; stop it first") from None
        self.root, self.store, self.site, self.robot = root, store, site, robot
        self.slots = Slots(root)
        self._signed = SignedReleases(root, store, bootstrap)
        self._runtime_version = runtime_version
        self._confirm_within_ns = round(confirm_within_s * 1e9)
        self._clock_ns = clock_ns
        self._loaded = ""
        self._compared = ""
        self._candidate: Release | None = None

    def close(self) -> None:
        """Let another process work in ``root``."""
        self._lock.close()

    def __enter__(self) -> Updater:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what is in use

    def boot(self, warm_up: WarmUp) -> Active | None:
        """Load the policy in use, without the network; None if there is none.

        A policy on trial that was started before and never confirmed, one whose bytes changed on the disk
        and one that does not warm up are given back for the previous one. Raises ``BundleError`` if that
        does not load either.
        """
        self._loaded = ""
        while (slot := self.slots.active) is not None:
            if self.slots.state.trial and self.slots.count_boot() > TRIAL_BOOTS:
                self._give_back(slot, f"not confirmed after {TRIAL_BOOTS} starts")
                continue
            try:
                require(self.slots.directory("active"), slot.release.digest)
                self._warm(self.slots.directory("active"), slot.release.digest, warm_up)
                self._loaded = slot.release.digest
            except FlywheelError as e:
                if not self._give_back(slot, str(e)):
                    raise BundleError(f"{self.robot}: no policy left to run: {e}") from None
                continue
            return self.active()
        return None

    def active(self) -> Active | None:
        """The policy in use; None before ``boot`` or where nothing is installed."""
        slot = self.slots.active
        if slot is None or not self._loaded:
            return None
        return Active(self.slots.directory("active"), self._loaded, slot.release, self.slots.state.trial)

    def shadow(self) -> Path | None:
        """The candidate's verified bundle, while this robot is to compare it beside the policy in use."""
        slot = self.slots.other
        asked = slot is not None and slot.release.digest == self._compared
        return self.slots.directory("other") if asked and not self.slots.state.trial else None

    def rollout_id(self) -> str | None:
        """The rollout whose candidate was signed when last looked, whether or not this robot tries it."""
        return (self._candidate.rollout_id or None) if self._candidate is not None else None

    def confirm(self) -> None:
        """The policy on trial works: it stays."""
        self.slots.confirm()

    def fall_back(self, reason: str, warm_up: WarmUp) -> Poll:
        """Give back the policy on trial for the previous one."""
        slot = self.slots.active
        if slot is None or not self.slots.state.trial:
            return Poll(Action.NONE, self._loaded, "no policy is on trial")
        return self.give_back(reason, warm_up)

    def give_back(self, reason: str, warm_up: WarmUp) -> Poll:
        """Give back the policy in use, on trial or confirmed, for the previous one."""
        slot = self.slots.active
        if slot is None:
            return Poll(Action.NONE, self._loaded, "no policy is in use")
        self.slots.refuse(slot.release, reason)
        self.slots.fall_back()
        self.boot(warm_up)
        return Poll(Action.FELL_BACK, self._loaded, reason)

    # -- what should be in use

    def poll(self, warm_up: WarmUp) -> Poll:
        """Look for another policy once; download, verify, warm up and swap to it. Changes nothing on failure.

        Also ends a trial that was not confirmed in time.
        """
        state = self.slots.state
        if state.trial and self._clock_ns() - state.trial_since_ns > self._confirm_within_ns:
            return self.fall_back(f"not confirmed within {self._confirm_within_ns / 1e9:.0f} s", warm_up)
        try:
            return self._poll(warm_up)
        except StoreUnavailable as e:
            return Poll(Action.OFFLINE, self._loaded, str(e))
        except (FlywheelError, OSError) as e:
            return Poll(Action.REFUSED, self._loaded, str(e))

    def _poll(self, warm_up: WarmUp) -> Poll:
        self._signed.refresh()
        canary, wave = self._signed.offer(Group.CANARY), self._signed.offer(Group.WAVE)
        candidate = canary or wave
        self._candidate = None if candidate is None else candidate.release
        self._compared = ""
        if (exception := self._exception(warm_up)) is not None:
            return exception
        assignment = self._assignment(canary.release) if canary is not None else None
        group, shadow = choose(
            self.robot,
            canary.release if canary else None,
            assignment,
            site=self.site,
            wave=wave.release if wave else None,
        )
        by_group = {Group.CANARY: canary, Group.WAVE: wave}
        offer = by_group[group] if group in by_group else self._signed.offer(Group.STABLE)
        current = self.slots.active
        if offer is not None:
            if current is None or current.release.digest != offer.release.digest:
                return self._take(offer, warm_up)
            if current.release != offer.release:
                self.slots.relabel(offer.release)
        if not shadow or canary is None or self.slots.state.trial:
            return Poll(Action.NONE, self._loaded)
        if current is not None and current.release.digest == canary.release.digest:
            return Poll(Action.NONE, self._loaded, "the candidate is what is in use")
        fresh = self._stage(canary)
        self._compared = canary.release.digest
        return Poll(Action.STAGED if fresh else Action.NONE, canary.release.digest)

    def _exception(self, warm_up: WarmUp) -> Poll | None:
        """What the fleet's signed plan makes of this robot, if it is pinned or held back.

        A revoked bundle is never kept on: then the plan does not hold.
        """
        plan, stable, current = self._signed.plan(), self._signed.offer(Group.STABLE), self.slots.active
        revoked = stable.release.revokes if stable is not None else ()
        if (pin := plan.pin(self.robot, self.site)) is not None and pin.digest not in revoked:
            why = f"pinned to {pin.digest[:12]} by {pin.by}: {pin.reason}"
            if current is not None and current.release.digest == pin.digest:
                return Poll(Action.NONE, self._loaded, why)
            return self._take(self._signed.pinned(pin.digest), warm_up)
        held = plan.held(self.robot, self.site, self._clock_ns())
        if held is None or current is None or current.release.digest in revoked:
            return None
        if current.release.group is Group.CANARY:
            return None  # nobody is held back on a candidate, which may be withdrawn any time
        return Poll(Action.NONE, self._loaded, f"held back by {held.by}: {held.reason}")

    def _take(self, offer: Offer, warm_up: WarmUp) -> Poll:
        release, other = offer.release, self.slots.other
        if (
            self.slots.state.trial
            and other is not None
            and other.proven
            and other.release.digest != release.digest
        ):
            # Staging would overwrite the only policy to fall back to: go there first.
            return self.fall_back(f"withdrawn while on trial, for {release.digest}", warm_up)
        if (reason := self.slots.refusal(release)) is not None:
            return Poll(Action.NONE, self._loaded, f"{release.digest} was given back before: {reason}")
        if _version(release.minimum_runtime) > _version(self._runtime_version):
            raise ReleaseError(
                f"{release.digest}: needs runtime {release.minimum_runtime}, this robot has "
                f"{self._runtime_version}; update the robot's software"
            )
        self._stage(offer)
        try:
            self._warm(self.slots.directory("other"), release.digest, warm_up)
        except FlywheelError as e:
            self.slots.refuse(release, str(e))
            raise
        self.slots.swap(release, self._clock_ns())
        self._loaded = release.digest
        return Poll(Action.SWAPPED, release.digest)

    def _stage(self, offer: Offer) -> bool:
        """Get an offer's bytes into the other slot; False if they lie there already."""
        digest, other = offer.release.digest, self.slots.other
        if other is not None and other.release.digest == digest and self.slots.sound("other"):
            return False
        staging = self.root / "staging" / digest
        for stale in staging.parent.glob("*"):
            if stale != staging:
                shutil.rmtree(stale)
        self._signed.download(offer, staging)
        require(staging, digest)
        self.slots.install(staging, offer.release)
        return True

    def _warm(self, directory: Path, digest: str, warm_up: WarmUp) -> None:
        try:
            loaded = warm_up(directory)
        except Exception as e:  # whatever a policy does when it is first run must not end the robot's process
            raise BundleError(f"{digest}: did not warm up: {type(e).__name__}: {e}") from e
        if loaded != digest:
            raise BundleError(f"{digest}: the runtime loaded bytes of digest {loaded}")

    def _give_back(self, slot: Slot, reason: str) -> bool:
        if self.slots.state.trial:  # otherwise it worked before: damage, and a fresh copy may be taken
            self.slots.refuse(slot.release, reason)
        return self.slots.fall_back()

    def _assignment(self, canary: Release) -> Assignment | None:
        """The state of the rollout that the canary release belongs to; None if it has none."""
        if not canary.rollout_id:
            return None
        try:
            head = self.store.latest(f"rollouts/{canary.rollout_id}")
        except IntegrityError:
            return None
        if head is None:
            return None
        try:
            return Assignment.model_validate_json(head[1])
        except ValidationError:
            return None  # a state that is not understood gives no leave to act by a candidate

    def campaigns(self) -> tuple[Campaign, ...]:
        """What this robot is asked to record, verified. After a ``poll`` that reached the store; raises as
        ``SignedReleases.campaigns`` does."""
        return self._signed.campaigns(self.root)

    # -- what the fleet is told

    def report(self, **facts: Any) -> RobotReport:
        """Write ``fleet/robots/<robot>.json``; ``facts`` are further fields of ``RobotReport``."""
        slot, previous = self.slots.active, self.slots.other
        refused = self.slots.state.refused[-1] if self.slots.state.refused else None
        report = RobotReport(
            site=self.site,
            robot=self.robot,
            t_unix_ns=self._clock_ns(),
            loaded_digest=self._loaded,
            previous_digest=previous.release.digest if previous is not None else "",
            rollout_id=slot.release.rollout_id if slot is not None else "",
            confirmed=not self.slots.state.trial,
            refused_digest=refused.release.digest if refused is not None else "",
            refused_reason=refused.reason[:500] if refused is not None else "",
            **facts,
        )
        self.store.put_json(f"fleet/robots/{self.robot}.json", report)
        return report


def _version(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(".")[:3])
    except ValueError:
        raise ConfigError(f"runtime version {text!r}: must look like 1.2.3") from None
