"""Two places for a policy on a robot's disk, and which one is in use: survives power loss at any point.

    <root>/slots/a/  slots/b/   one bundle directory each, replaced whole
    <root>/slots.json           which is active, on trial or confirmed, and what was given back

``slots.json`` is the commit mark: a directory that it does not name by digest holds nothing. It changes by
temp → fsync → rename → fsync directory, after the directory that it names is durable.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from flywheel.errors import BundleError, ConfigError
from flywheel.schema import BUNDLE_FILES, Group, Release, Strict, bundle_digest

SlotName = Literal["a", "b"]
TRIAL_BOOTS = 2  # starts that a policy on trial gets before it counts as crashing
REFUSALS_KEPT = 16


class Slot(Strict):
    """What a slot holds."""

    release: Release
    proven: bool = False  # confirmed here, and not taken back since: fit to fall back to


class Refused(Strict):
    """A release that was tried and given back; it is not tried again until it is signed anew."""

    release: Release
    reason: str


class SlotsState(Strict):
    """``slots.json``."""

    schema_version: Literal[1] = 1
    active: SlotName | None = None
    a: Slot | None = None
    b: Slot | None = None
    trial: bool = False
    trial_boots: int = 0
    trial_since_ns: int = 0
    refused: tuple[Refused, ...] = ()


class Slots:
    """The A/B slots under a directory. One process at a time (the updater holds the lock)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file = root / "slots.json"
        (root / "slots").mkdir(parents=True, exist_ok=True)
        try:
            self.state = SlotsState.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            self.state = SlotsState()
        except ValidationError as e:
            why = e.errors()[0]["msg"]
            raise ConfigError(f"{self._file}: {why}; remove {root} to install the policy anew") from None

    @property
    def active(self) -> Slot | None:
        """The policy in use."""
        return self._slot(self.state.active)

    @property
    def other(self) -> Slot | None:
        """What lies in the slot that is not in use: the previous policy, or one that was staged."""
        return self._slot(self._spare) if self.state.active else None

    def directory(self, which: Literal["active", "other"]) -> Path:
        """Where the active or the other slot's bundle lies."""
        name = self.state.active if which == "active" else self._spare
        return self.root / "slots" / (name or "a")

    def sound(self, which: Literal["active", "other"]) -> bool:
        """Whether a slot's bytes still have the digest that it is recorded with."""
        slot = self.active if which == "active" else self.other
        return slot is not None and holds(self.directory(which), slot.release.digest)

    def install(self, staged: Path, release: Release) -> None:
        """Move a complete, durable bundle directory into the slot that is not in use."""
        name = self._spare
        self._save(**{name: None})  # until the move is durable, the slot holds nothing
        place = self.root / "slots" / name
        shutil.rmtree(place, ignore_errors=True)
        staged.rename(place)
        fsync_directory(place.parent)
        self._save(**{name: Slot(release=release)})

    def relabel(self, release: Release) -> None:
        """The active bytes are now offered by another release (canary became stable)."""
        if self.state.active is not None and (slot := self.active) is not None:
            changes: dict[str, object] = {self.state.active: slot.model_copy(update={"release": release})}
            if (old := self.other) is not None and old.release.digest in release.revokes:
                changes[self._spare] = old.model_copy(update={"proven": False})
            self._save(**changes)

    def swap(self, release: Release, now_ns: int) -> None:
        """Put the other slot in use, on trial. What it replaces stays fit to fall back to, unless it was a
        candidate that a stable policy takes the place of, or the new release revokes it."""
        name, changes = self._spare, dict[str, object]()
        if self.state.active is not None and (old := self.active) is not None:
            candidate = old.release.group is Group.CANARY and release.group is Group.STABLE
            fit = not candidate and old.release.digest not in release.revokes
            changes[self.state.active] = old.model_copy(update={"proven": old.proven and fit})
        changes[name] = Slot(release=release)
        self._save(active=name, trial=True, trial_boots=0, trial_since_ns=now_ns, **changes)

    def confirm(self) -> None:
        """The policy on trial proved itself."""
        if self.state.trial and self.state.active is not None and (slot := self.active) is not None:
            proven = slot.model_copy(update={"proven": True})
            self._save(trial=False, **{self.state.active: proven})

    def count_boot(self) -> int:
        """One more start of a policy on trial."""
        self._save(trial_boots=self.state.trial_boots + 1)
        return self.state.trial_boots

    def fall_back(self) -> bool:
        """Put the previous policy in use again, confirmed; False if there is none (then none is in use)."""
        failed, previous = self.state.active, self._spare
        old = self.other
        there = old is not None and old.proven and self.sound("other")
        dropped = {failed: None} if failed is not None else {}
        self._save(active=previous if there else None, trial=False, **dropped)
        return there

    def refuse(self, release: Release, reason: str) -> None:
        """Remember a release that was given back."""
        kept = tuple(r for r in self.state.refused if r.release != release)[-(REFUSALS_KEPT - 1) :]
        self._save(refused=(*kept, Refused(release=release, reason=reason)))

    def refusal(self, release: Release) -> str | None:
        """Why a release was given back before; None if it was not."""
        return next((r.reason for r in self.state.refused if r.release == release), None)

    @property
    def _spare(self) -> SlotName:
        return "b" if self.state.active == "a" else "a"

    def _slot(self, name: SlotName | None) -> Slot | None:
        return None if name is None else self.state.a if name == "a" else self.state.b

    def _save(self, **changes: object) -> None:
        state = self.state.model_copy(update=changes)
        part = self._file.with_suffix(".part")
        with part.open("wb") as f:
            f.write(state.to_bytes())
            f.flush()
            os.fsync(f.fileno())
        part.replace(self._file)
        fsync_directory(self.root)
        self.state = state


def holds(directory: Path, digest: str) -> bool:
    """Whether a bundle directory is complete and its bytes have a digest."""
    try:
        return bundle_digest(directory) == digest
    except OSError:
        return False


def require(directory: Path, digest: str) -> None:
    """``holds`` that raises ``BundleError`` saying what is wrong."""
    missing = [n for n in BUNDLE_FILES if not (directory / n).is_file()]
    if missing:
        raise BundleError(f"{directory}: no {missing[0]}")
    if (found := bundle_digest(directory)) != digest:
        raise BundleError(f"{directory}: has digest {found}, expected {digest}")


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
