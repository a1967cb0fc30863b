"""The keys that sign releases: which there are, where they lie, and how many of them must agree.

One PEM file each, mode 0600, in a directory of mode 0700 beside the trusted ``root.json``. A threshold
protects only once keys lie apart: move the files of a role to other machines or media, and publishers sign
with what is left, or say what is missing. No key appears in an argument, log or message.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from securesystemslib.signer import CryptoSigner

from flywheel.errors import ConfigError
from flywheel.schema import Group

ROOT_FILE = "root.json"


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
}


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
                    _write_private(
                        part / f"{role}-{i + 1}.pem", CryptoSigner.generate_ed25519().private_bytes
                    )
            _fsync_directory(part)
            try:
                part.rename(self.directory)
            except OSError:  # another process was first
                if not self.directory.is_dir():
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _fsync_directory(self.directory.parent)

    @property
    def root(self) -> bytes:
        """The trusted root metadata: public, and what robots are given as their anchor of trust."""
        try:
            return (self.directory / ROOT_FILE).read_bytes()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.directory / ROOT_FILE}: no trusted root; run `flywheel up` first"
            ) from None

    def keep_root(self, data: bytes) -> bytes:
        """Keep the first root metadata, unless there are some; return those that are kept."""
        _write_once(self.directory / ROOT_FILE, data)
        return self.root

    def load(self) -> dict[str, CryptoSigner]:
        """Signers by file stem (``stable-2``). Raises ``ConfigError`` for a file that others may read."""
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        if not self.directory.is_dir():
            raise ConfigError(f"{self.directory}: no signing keys; make them with `flywheel up`")
        signers = {}
        for path in sorted(self.directory.glob("*.pem")):
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
