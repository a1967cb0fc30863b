"""What matters beside the store: Airflow's database, the turns' experiments in git, the trust anchor, keys.

Copying gives entries of a back-up, whose content lies in the directory then; putting back never replaces
anything, and says what was there already.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import uuid
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Literal

from flywheel.backup.directory import DATABASE, EXPERIMENTS, ROOT, SECRETS, Directory, Entry
from flywheel.errors import ServiceError, StageError
from flywheel.schema import sha256_file

CONNECTION = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
ELSEWHERE = (
    f"Airflow's metadata lie in another database ({CONNECTION}), which its own tool backs up: "
    "for PostgreSQL `pg_dump --format=custom`, before this command"
)
BUSY_S = 30.0  # for which a writer may hold Airflow's database
RESTORED = "refs/flywheel/restored"  # where the branches of a back-up are put: nobody's own is moved
MIGRATED = "airflow/migrated"  # says which version of Airflow the database was made for
_EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/[A-Za-z0-9._-]+")


class Outcome(Enum):
    """What came of putting one thing back."""

    WRITTEN = auto()
    PRESENT = auto()  # it was there, the same
    DIFFERENT = auto()  # something else was there, and was left


def database(to: Directory, home: Path, environ: Mapping[str, str]) -> tuple[Entry | None, str]:
    """Copy the Airflow database of ``up`` while it runs (SQLite's online back-up, which is one moment's
    state); None, and what to do, where Airflow's metadata lie elsewhere or there are none.

    Raises ``ServiceError`` if it cannot be read or is damaged.
    """
    source = home / DATABASE
    given = next((v for n in ("", "_CMD", "_SECRET") if (v := environ.get(CONNECTION + n))), "")
    if given and not given.startswith("sqlite:"):
        return None, ELSEWHERE  # the address may hold a password: it is not repeated
    if not source.is_file():
        return None, f"no Airflow database at {source}"
    part = to.incoming / uuid.uuid4().hex
    try:
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True, timeout=BUSY_S)) as live,
            closing(sqlite3.connect(part)) as copy,
        ):
            live.backup(copy)
            (found,) = copy.execute("PRAGMA quick_check").fetchone()
    except sqlite3.Error as e:
        raise ServiceError(f"Airflow's database {source}: {e}") from None
    if found != "ok":
        raise ServiceError(f"Airflow's database {source} is damaged: {found}")
    return _keep(to, part, "file", DATABASE), ""


def experiments(to: Directory, checkout: Path) -> tuple[Entry | None, str]:
    """Copy the checkout's branch and every turn's experiment (``refs/exps``) as one git bundle.

    What is not committed is not in it; the patches that turns took along are in the store.
    """
    listed = _git(checkout, "for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    refs = [r for r in listed if _EXPERIMENT.fullmatch(r)]  # others are DVC's own, for a moment
    branch = _git(checkout, "symbolic-ref", "--quiet", "HEAD", ok=(0, 1))
    if _git(checkout, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", ok=(0, 1)) == "":
        return None, f"{checkout} has no commit, so no experiments"
    part = to.incoming / uuid.uuid4().hex
    names = ["HEAD", *([branch] if branch else []), *refs]  # HEAD, so that a bundle can be cloned
    # One thread packs the same objects to the same bytes, which are then not copied again.
    make = ("-c", "pack.threads=1", "bundle", "create", "--quiet", str(part), "--stdin")
    _git(checkout, *make, stdin="\n".join(names) + "\n")
    return _keep(to, part, "file", EXPERIMENTS), ""


def anchor(to: Directory, home: Path) -> Entry | None:
    """Copy the root metadata that robots trust; public. None where there are none."""
    return _copy(to, home / ROOT, "file", ROOT)


def secrets(to: Directory, home: Path) -> list[Entry]:
    """Copy signing keys and Airflow's own keys and passwords, readable by their owner alone."""
    to.secrets.mkdir(mode=0o700, exist_ok=True)
    paths = (p for d in ("keys", "keys/retired", "airflow") for p in sorted((home / d).glob("*")))
    names = (p.relative_to(home).as_posix() for p in paths if p.is_file() and not p.is_symlink())
    found = (_copy(to, home / n, "secret", n) for n in names if SECRETS.fullmatch(n))
    return [e for e in found if e is not None]


def put_file(source: Directory, entry: Entry, home: Path) -> Outcome:
    """Put a file or a secret back below the state directory, unless something is there."""
    path = home / entry.name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    with suppress(FileExistsError):
        try:
            _write(source.verify(entry), part)
            os.link(part, path)  # unlike a rename, it never replaces
        finally:
            part.unlink(missing_ok=True)
        if entry.name == DATABASE:  # it may be of an earlier version
            (home / MIGRATED).unlink(missing_ok=True)
        return Outcome.WRITTEN
    return Outcome.PRESENT if sha256_file(path) == entry.sha256 else Outcome.DIFFERENT


def put_experiments(source: Directory, entry: Entry, checkout: Path) -> tuple[int, int, list[str]]:
    """Put experiments and branches back into a checkout: how many were, how many were there, and which names
    stand for another commit there and were left. Branches go to ``refs/flywheel/restored/``."""
    bundle = str(source.path(entry).absolute())
    refspecs, present, other = [], 0, []
    heads = [line.split(" ", 1) for line in _git(checkout, "bundle", "list-heads", bundle).splitlines()]
    named = any(ref.startswith("refs/heads/") for _, ref in heads)
    for commit, ref in heads:
        if not (into := _destination(ref)) or (ref == "HEAD" and named):
            continue
        have = _git(checkout, "rev-parse", "--verify", "--quiet", into, ok=(0, 1))
        if have == commit:
            present += 1
        elif have:
            other.append(into)
        else:
            refspecs.append(f"{ref}:{into}")
    if refspecs:
        check = ("-c", "fetch.fsckObjects=true")
        _git(checkout, *check, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", bundle, *refspecs)
    return len(refspecs), present, other


def _destination(ref: str) -> str:
    if _EXPERIMENT.fullmatch(ref):
        return ref
    name = ref.removeprefix("refs/heads/")
    return f"{RESTORED}/{name}" if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", name) else ""


def _copy(to: Directory, path: Path, kind: Literal["file", "secret"], name: str) -> Entry | None:
    part = to.incoming / uuid.uuid4().hex
    if not path.is_file():
        return None
    _write(path, part)
    return _keep(to, part, kind, name)


def _write(source: Path, part: Path) -> None:
    """A durable copy that only its owner may read."""
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as t, source.open("rb") as f:
        shutil.copyfileobj(f, t, 1 << 20)
        t.flush()
        os.fsync(t.fileno())


def _keep(to: Directory, part: Path, kind: Literal["file", "secret"], name: str) -> Entry:
    with part.open("rb") as f:
        os.fsync(f.fileno())
    entry = Entry(kind=kind, name=name, size=part.stat().st_size, sha256=sha256_file(part))
    to.keep(part, entry)
    return entry


def _git(root: Path, *args: str, stdin: str = "", ok: Iterable[int] = (0,)) -> str:
    # A hook or an editor that runs us may have set GIT_DIR and its like for its own repository.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *args], cwd=root, env=clean, input=stdin, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise StageError("git is not installed (Debian: apt-get install git)") from None
    if done.returncode not in ok:
        raise StageError(f"git {args[0]} in {root}: {done.stderr.strip()[-400:]}")
    return done.stdout.strip()
