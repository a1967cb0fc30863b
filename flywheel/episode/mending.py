"""After a crash: finish what was whole, remove what was not, set aside what is damaged."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from flywheel.episode.checks import verify
from flywheel.episode.sealing import commit, fsync_directory, prepared, sweep


@dataclass(frozen=True)
class Repaired:
    """One directory: ``finished``, ``removed`` or ``set aside``, and why."""

    name: str
    what: str
    why: str


def repair(parent: Path) -> list[Repaired]:
    """Put a directory of episodes in order; only while nobody seals there. Says what was done.

    A damaged episode goes to ``damaged/<id>.<n>`` beside ``parent``, where the spool keeps such too, with the
    reason. Nothing that is kept is changed.
    """
    done = []
    for manifest in prepared(parent):
        commit(parent, manifest)
        done.append(Repaired(manifest.episode_id, "finished", "was whole, but had no name yet"))
    halves = [d.name for d in parent.glob(".*.partial")]
    sweep(parent)
    done += [Repaired(n, "removed", "was not written to its end") for n in halves]
    aside = parent.parent / "damaged"
    for directory in sorted(d for d in parent.iterdir() if not d.name.startswith(".")):
        fatal = [p for p in verify(directory) if p.fatal]
        if not fatal:
            continue
        aside.mkdir(exist_ok=True)
        to = next(t for n in itertools.count() if not (t := aside / f"{directory.name}.{n}").exists())
        directory.rename(to)
        fsync_directory(aside)
        fsync_directory(parent)
        why = "; ".join(str(p) for p in fatal[:5])
        if to.is_dir() and not to.is_symlink():
            (to / "why.txt").write_text(why + "\n", encoding="utf-8")
        done.append(Repaired(directory.name, "set aside", why))
    return done
