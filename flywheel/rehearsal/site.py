"""A release repository with a robot on it, and what somebody who may write to the store can do to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from flywheel.edge.updater import Action, Updater
from flywheel.keys import role_of
from flywheel.rehearsal.bucket import Bucket, BucketStore
from flywheel.rehearsal.deliveries import make_bundle, robot, warm_up
from flywheel.release import Publisher
from flywheel.release.repository import TIMESTAMP
from flywheel.schema import BUNDLE_FILES, Release, bundle_digest


class Breach(Exception):
    """An attack succeeded, or a fault was not recovered from."""


@contextmanager
def quick_disk() -> Iterator[None]:
    """Processes die here, machines do not: no need to wait for the disk."""
    with patch.object(os, "fsync", lambda fd: None):
        yield


def expect(holds: bool, what: object) -> None:
    """``Breach`` unless it holds."""
    if not holds:
        raise Breach(str(what))


@dataclass
class Site:
    """A repository with a base policy that a robot runs, and a new policy to come."""

    root: Path
    store: BucketStore
    publisher: Publisher
    base: Path
    new: Path

    @property
    def server(self) -> Bucket:
        return self.store.server

    def blob(self, group: str = "stable", name: str = "policy.onnx") -> str:
        """Key of the newest blob of a file (the one that the base policy does not have)."""
        suffix = f".{name}"
        old = {k for k in self.before if k.endswith(suffix)}
        new = [
            k
            for k in self.server.objects
            if k.startswith(f"releases/targets/{group}/") and k.endswith(suffix)
        ]
        return next(k for k in new if k not in old)

    def __post_init__(self) -> None:
        self.before = set(self.server.objects)

    @classmethod
    def make(cls, root: Path, bucket: Bucket | None = None) -> Site:
        """A new one in an empty directory."""
        store = BucketStore(bucket)
        publisher = Publisher(store, root / "keys")
        publisher.init(("ada",))
        base, new = make_bundle(root, "base"), make_bundle(root, "new")
        publisher.publish_first(base)
        with robot(root, store, publisher) as r:
            expect(r.poll(warm_up).action is Action.SWAPPED, "the first policy was not taken")
            r.confirm()
        return cls(root, store, publisher, base, new)

    def copy(self, root: Path) -> Site:
        """Another one of the same state, that may be spoiled."""
        shutil.copytree(self.root, root, symlinks=True)
        store = BucketStore(copy_of(self.server))
        return Site(root, store, Publisher(store, root / "keys"), root / "bundle-base", root / "bundle-new")


def copy_of(server: Bucket) -> Bucket:
    """Another bucket with the same objects."""
    copy = Bucket()
    copy.objects = dict(server.objects)
    return copy


def forge(
    site: Site,
    role: str,
    change: Callable[[Targets], None],
    signers: list[str],
    online: bool = True,
    extra: Mapping[str, CryptoSigner] | None = None,
) -> None:
    """What somebody can do who may write to the store and holds some of the keys: a consistent new state
    in which ``role`` was changed and signed by ``signers`` (and snapshot and timestamp by their keys, or
    those of that name among the stolen ones in ``extra``)."""
    keys = site.publisher.keys.load() | dict(extra or {})
    timestamp: Metadata[Timestamp] = Metadata.from_bytes(site.server.data(TIMESTAMP))
    v = timestamp.signed.snapshot_meta.version
    snapshot: Metadata[Snapshot] = Metadata.from_bytes(
        site.server.data(f"releases/metadata/{v}.snapshot.json")
    )
    v = snapshot.signed.meta[f"{role}.json"].version
    md: Metadata[Targets] = Metadata.from_bytes(site.server.data(f"releases/metadata/{v}.{role}.json"))
    change(md.signed)

    def write(name: str, m: Metadata[Any], by: list[str], key: str | None = None) -> MetaFile:
        m.signed.version += 1
        m.signatures.clear()
        for k in by:
            m.sign(keys[k], append=True)
        data = m.to_bytes()
        site.server.overwrite(key or f"releases/metadata/{m.signed.version}.{name}.json", data)
        return MetaFile.from_data(m.signed.version, data, ["sha256"])

    snapshot.signed.meta[f"{role}.json"] = write(role, md, signers)
    snapshot_by, timestamp_by = (
        [next(k for k in (*(extra or {}), *keys) if role_of(k) == r)] if online else []
        for r in ("snapshot", "timestamp")
    )
    timestamp.signed.snapshot_meta = write("snapshot", snapshot, snapshot_by)
    write("timestamp", timestamp, timestamp_by, TIMESTAMP)


def offer(bundle: Path, release: Release, prefix: str | None = None) -> Callable[[Targets], None]:
    """A change of targets metadata that offers a bundle."""

    def change(targets: Targets) -> None:
        for name in BUNDLE_FILES:
            path = f"{prefix or release.group.value}/{name}"
            target = TargetFile.from_data(path, (bundle / name).read_bytes(), ["sha256"])
            target.unrecognized_fields["custom"] = release.model_dump(mode="json")
            targets.targets[path] = target

    return change


def upload_blobs(site: Site, bundle: Path, group: str) -> None:
    for name in BUNDLE_FILES:
        data = (bundle / name).read_bytes()
        sha = TargetFile.from_data("x", data, ["sha256"]).hashes["sha256"]
        site.server.overwrite(f"releases/targets/{group}/{sha}.{name}", data)


def refused(site: Site, why: str, **options: Any) -> str:
    """The robot refuses what it finds, says why, and goes on with the base policy, also after a restart."""
    with robot(site.root, site.store, site.publisher, **options) as r:
        poll = r.poll(warm_up)
        expect(poll.action is Action.REFUSED and why in poll.reason, poll)
        expect(_runs(r, site.base), "the robot does not run what it ran")
    with robot(site.root, site.store, site.publisher) as r:
        expect(_runs(r, site.base), "the robot does not run what it ran, after a restart")
    return f"refused: {why}"


def taken(site: Site, bundle: Path) -> None:
    """The robot takes a bundle."""
    with robot(site.root, site.store, site.publisher) as r:
        poll = r.poll(warm_up)
        expect((poll.action, poll.digest) == (Action.SWAPPED, bundle_digest(bundle)), poll)
        r.confirm()


def _runs(updater: Updater, bundle: Path) -> bool:
    active = updater.active()
    return active is not None and active.digest == bundle_digest(bundle) == bundle_digest(active.directory)
