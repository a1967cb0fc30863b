"""Puts a back-up into a store and a state directory: everything is verified before anything is written.

Objects are created, never replaced (create-only PUT), in the reverse of the order in which they were copied,
so that nobody who looks meanwhile sees a name without its object. A restore that broke off is run again with
``into_existing``, which adds what is missing and leaves, and names, what differs.

What a restore cannot bring back: the times at which objects reached the store. Robots count as heard of, and
failures as arrived, when they were restored. And robots that have seen newer signed metadata than the
back-up's refuse these, as they refuse every roll-back, until the keys of ``timestamp`` and ``snapshot`` are
rotated (The Update Framework 1.0, 5.3.11).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flywheel.backup import local
from flywheel.backup.directory import EXPERIMENTS, ROOT, Directory, Entry
from flywheel.backup.local import Outcome
from flywheel.backup.order import IGNORED, TIERS, tier_of
from flywheel.errors import ConfigError, Conflict, FlywheelError
from flywheel.release.repository import Reader
from flywheel.schema import sha256_file
from flywheel.store import MAX_PUT_BYTES, Store

WRITERS = 8

Progress = Callable[[str, int, int], None]  # what is done, so far, of how many


@dataclass
class Restored:
    """What a restore did, or with ``written`` false would have done: counts, and what was left as it was."""

    name: str
    written: bool
    store: str = ""  # where the back-up was taken
    verified: int = 0
    objects: int = 0
    bytes: int = 0
    present: int = 0  # were there already, with the same content
    files: list[str] = field(default_factory=list)
    secrets: int = 0
    experiments: int = 0
    anchor_sha256: str = ""  # of root.json: compare it with what robots were given
    releases: str = ""
    different: list[str] = field(default_factory=list)  # left as they were found
    notes: list[str] = field(default_factory=list)


def check(directory: Path, of: str = "") -> Restored:
    """Verify a back-up, the newest unless named, and write nothing. Raises ``ConfigError``,
    ``IntegrityError`` (it names what is damaged)."""
    return _verified(Directory(directory), of, lambda _what, _n, _of: None)[0]


def restore(
    directory: Path,
    store: Store,
    home: Path,
    checkout: Path | None,
    *,
    of: str = "",
    keys: bool = False,
    into_existing: bool = False,
    on_progress: Progress = lambda _what, _n, _of: None,
) -> Restored:
    """Restore a back-up, the newest unless ``of`` names one; ``keys`` puts its secrets back too.

    Raises ``IntegrityError`` for a back-up that is not as it was made, ``ConfigError`` for a target that is
    not empty or that trusts another root; nothing was written then.
    """
    source = Directory(directory)
    done, entries = _verified(source, of, on_progress)
    beside = {e.name: e for e in entries if e.kind == "file"}
    secrets = [e for e in entries if e.kind == "secret"] if keys else []
    if keys and not secrets:
        raise ConfigError(f"{directory}: {done.name} was made without --keys, so it holds none")
    if (root := beside.get(ROOT)) is not None:
        done.anchor_sha256 = root.sha256
        if (home / ROOT).is_file() and sha256_file(home / ROOT) != root.sha256:
            raise ConfigError(
                f"{home / ROOT}: another fleet's trust than the back-up's; restore to another FLYWHEEL_HOME"
            )
    there = {i.key for i in store.list() if not i.key.startswith(IGNORED)}
    if there and not into_existing:
        raise ConfigError(
            f"{store}: holds {len(there)} objects, {min(there)} the first; restore into an empty one, or add "
            "what is missing with --into-existing"
        )
    done.written = True
    try:
        _files(source, home, [*beside.values(), *secrets], done)
        _experiments(source, checkout, beside.get(EXPERIMENTS), done)
        _objects(source, store, [e for e in entries if e.kind == "object"], there, done, on_progress)
    except OSError as e:
        raise ConfigError(f"{e.filename or directory}: {e.strerror}") from None
    _releases(store, home, done)
    return done


def _verified(source: Directory, of: str, on_progress: Progress) -> tuple[Restored, list[Entry]]:
    name, entries, end = source.read(of)
    content = {(e.kind == "secret", e.sha256, e.size): e for e in entries}
    with ThreadPoolExecutor(WRITERS) as pool:
        for n, _ in enumerate(pool.map(source.verify, content.values()), 1):
            on_progress("verified", n, len(content))
    done = Restored(name, written=False, store=end.store, verified=len(entries))
    done.notes += [f"was damaged in the store already: {what}" for what in end.damaged]
    if source.journal.exists():
        done.notes.append("a later back-up broke off, and is not in this one")
    return done, entries


def _files(source: Directory, home: Path, entries: Iterable[Entry], done: Restored) -> None:
    for entry in entries:
        if entry.name == EXPERIMENTS:
            continue
        outcome = local.put_file(source, entry, home)
        if outcome is Outcome.DIFFERENT:
            done.different.append(str(home / entry.name))
        elif outcome is Outcome.PRESENT:
            done.present += 1
        elif entry.kind == "secret":
            done.secrets += 1
        else:
            done.files.append(entry.name)


def _experiments(source: Directory, checkout: Path | None, entry: Entry | None, done: Restored) -> None:
    if entry is None:
        return
    if checkout is None:
        done.notes.append(f"no checkout here: `git clone {source.path(entry)}` gives experiments and branch")
        return
    done.experiments, present, other = local.put_experiments(source, entry, checkout)
    done.present += present
    done.different += other


def _objects(
    source: Directory,
    store: Store,
    entries: list[Entry],
    there: set[str],
    done: Restored,
    on_progress: Progress,
) -> None:
    def put(entry: Entry) -> tuple[Entry, Outcome]:
        return entry, _put(source, store, entry, entry.name in there)

    count = 0
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(len(TIERS), -1, -1):
            for entry, outcome in pool.map(put, [e for e in entries if tier_of(e.name) == number]):
                count += 1
                if outcome is Outcome.WRITTEN:
                    done.objects += 1
                    done.bytes += entry.size
                elif outcome is Outcome.PRESENT:
                    done.present += 1
                else:
                    done.different.append(entry.name)
                on_progress("restored", count, len(entries))


def _put(source: Directory, store: Store, entry: Entry, there: bool) -> Outcome:
    if not there:
        try:
            if entry.size <= MAX_PUT_BYTES:
                store.create(entry.name, source.path(entry), entry.sha256)
            else:  # S3 has no create-only write of so much
                store.put_file(entry.name, source.path(entry), entry.sha256)
        except Conflict:
            pass  # somebody was first; what was written is looked at
        else:
            return Outcome.WRITTEN
    sha, size = hashlib.sha256(), 0
    for piece in store.stream(entry.name):
        sha.update(piece)
        size += len(piece)
    same = (size, sha.hexdigest()) == (entry.size, entry.sha256)
    return Outcome.PRESENT if same else Outcome.DIFFERENT


def _releases(store: Store, home: Path, done: Restored) -> None:
    if not (home / ROOT).is_file():
        return
    try:
        state = Reader(store, home / "keys").load()
    except FlywheelError as e:
        done.releases = str(e)
        done.notes.append(f"the releases do not verify: {e}")
        return
    done.releases = f"version {state.n}, verified from the trusted root"
    done.notes.append(
        "robots that saw newer metadata refuse these until `flywheel keys rotate timestamp` and "
        "`flywheel keys rotate snapshot`"
    )
