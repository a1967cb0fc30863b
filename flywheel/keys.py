"""The keys that sign releases: which there are, where they lie, and how many of them must agree.

One PEM file each, mode 0600, in a directory of mode 0700 beside the trusted ``root.json``. A threshold
protects only once keys lie apart: move the files of a role to other machines or media, and publishers sign
with what is left, or say what is missing. No key appears in an argument, log or message.

Where the files belong in production, and what whoever takes them could do:

    root-*       offline media in different safes, one per custodian; brought together for ceremonies only.
                 A threshold of them is the fleet's trust itself.
    targets-*    offline with the release owners; needed to change keys and approvers, not to release.
    stable-*     apart from each other: a signing service, a hardware module, a release owner's machine.
                 A threshold of them puts a policy on every robot.
    approval-*   one per approver, on that person's machine or token: ``approval-<name>.pem``. Where Airflow
                 signs for its users it holds these, and an approval is worth Airflow's login.
    canary-1     the machine that runs the wheel. Puts a candidate on the cohort, no more.
    operator-1   the same machine: signs the rollouts' decisions, and holds and roll-backs that no person
                 gave. Cannot promote.
    snapshot-1, timestamp-1   the same machine: they only say what is newest.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from securesystemslib.signer import CryptoSigner

from flywheel.errors import ConfigError
from flywheel.schema import Group

ROOT_FILE = "root.json"
RETIRED = "retired"  # directory of keys that a ceremony put out of use
APPROVAL, OPERATOR = (
    "approval",
    "operator",
)  # they sign words and decisions, not metadata
PERSON = r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}$"


class RolePolicy(NamedTuple):
    """Keys made, signatures needed, days until the metadata expire."""

    keys: int
    threshold: int
    days: int


ROLES: Mapping[str, RolePolicy] = {
    "root": RolePolicy(3, 2, 365),
    "targets": RolePolicy(2, 2, 365),
    "snapshot": RolePolicy(1, 1, 14),
    "timestamp": RolePolicy(1, 1, 3),
    Group.CANARY.value: RolePolicy(1, 1, 90),
    Group.STABLE.value: RolePolicy(3, 2, 180),
    OPERATOR: RolePolicy(1, 1, 0),
    APPROVAL: RolePolicy(0, 1, 0),  # one for each approver, made when the approver is enrolled
}


def role_of(stem: str) -> str:
    """The role of a key file: ``stable-2`` is of ``stable``, ``approval-ada`` of ``approval``."""
    return stem.split("-", 1)[0]


def approver_stem(name: str) -> str:
    """The key file of an approver. Raises ``ConfigError`` for a name that is unfit for a file."""
    if not re.fullmatch(PERSON, name):
        raise ConfigError(
            f"approver {name!r}: use letters, digits and . _ @ -, at most 63, no other characters"
        )
    return f"{APPROVAL}-{name}"


class Keys:
    """The signing keys that this machine holds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def ensure(self) -> None:
        """Make a full set unless the directory exists. Of several processes one makes it."""
        if self.directory.exists():
            return
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".keys-", dir=self.directory.parent))  # mode 0700
        try:
            for role, policy in ROLES.items():
                for i in range(policy.keys):
                    _write_private(part / f"{role}-{i + 1}.pem", _fresh())
            _fsync_directory(part)
            try:
                part.rename(self.directory)
            except OSError:  # another process was first
                if not self.directory.is_dir():
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _fsync_directory(self.directory.parent)

    def make(self, stem: str) -> CryptoSigner:
        """A new key, durable before this returns; the one that is there if there is one."""
        _write_once(self.directory / f"{stem}.pem", _fresh())
        return self.load()[stem]

    def next_stem(self, role: str, name: str = "") -> str:
        """A file name that no key here has or had: the role's next number, or the approver's."""
        first = f"{approver_stem(name)}+" if name else f"{role}-"
        paths = (*self.directory.glob("*.pem"), *(self.directory / RETIRED).glob("*.pem"))
        found = (re.match(rf"{re.escape(first)}(\d+)\b", p.name) for p in paths)
        return f"{first}{max((int(m[1]) for m in found if m), default=1 if name else 0) + 1}"

    def retire(self, keyids: Iterable[str]) -> None:
        """Put keys out of use: they sign nothing any more, and are kept for the record. May be repeated."""
        aside = self.directory / RETIRED
        aside.mkdir(mode=0o700, exist_ok=True)
        for stem, signer in self.load().items():
            if signer.public_key.keyid in keyids:
                (self.directory / f"{stem}.pem").rename(aside / f"{stem}.{signer.public_key.keyid[:8]}.pem")
        _fsync_directory(aside)
        _fsync_directory(self.directory)

    def retired(self) -> dict[str, CryptoSigner]:
        """What ``retire`` put aside, by keyid."""
        return {s.public_key.keyid: s for s in _load(self.directory / RETIRED).values()}

    def note(self, name: str, data: bytes) -> None:
        """Write a small file beside the keys, whole and durable."""
        part = self.directory / f".{name}.part"
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(self.directory / name)
        _fsync_directory(self.directory)

    def drop(self, name: str) -> None:
        """Remove a file that ``note`` wrote."""
        (self.directory / name).unlink(missing_ok=True)
        _fsync_directory(self.directory)

    @property
    def root(self) -> bytes:
        """The trusted root metadata: public, and what robots are given as their anchor of trust."""
        try:
            return (self.directory / ROOT_FILE).read_bytes()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.directory / ROOT_FILE}: no trusted root; run `flywheel keys init` first"
            ) from None

    def keep_root(self, data: bytes) -> bytes:
        """Keep the first root metadata, unless there are some; return those that are kept."""
        _write_once(self.directory / ROOT_FILE, data)
        return self.root

    def load(self) -> dict[str, CryptoSigner]:
        """Signers by file stem (``stable-2``). Raises ``ConfigError`` for a file that others may read."""
        if not self.directory.is_dir():
            raise ConfigError(f"{self.directory}: no signing keys; make them with `flywheel keys init`")
        return _load(self.directory)


def _load(directory: Path) -> dict[str, CryptoSigner]:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    signers = {}
    for path in sorted(directory.glob("*.pem")):
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"{path}: mode {stat.S_IMODE(mode):04o} lets others read a key; run chmod 600 on it"
            )
        try:
            key: Any = load_pem_private_key(path.read_bytes(), None)
            signers[path.stem] = CryptoSigner(key)
        except (ValueError, TypeError):  # never the content in a message
            raise ConfigError(f"{path}: not an unencrypted PEM private key") from None
    return signers


def _fresh() -> bytes:
    return CryptoSigner.generate_ed25519().private_bytes


def _write_private(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _write_once(path: Path, data: bytes) -> None:
    """A whole file that, once there, is never replaced."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        try:
            os.link(name, path)
        except FileExistsError:
            return
    finally:
        Path(name).unlink()
    _fsync_directory(path.parent)


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
