"""Signed releases: a TUF repository under ``releases/`` in the store (The Update Framework 1.0, python-tuf).

    releases/metadata/<n>.<role>.json   signed metadata, each number written once
    releases/metadata/timestamp.json    the one key that is overwritten: what robots read first
    releases/targets/<group>/<sha256>.<file>    a bundle's three files, for each group
    releases/log/<n>.json               every timestamp, written once: the order of all publications
    releases/bundles/<digest>.json      sizes and hashes of every bundle ever published

A publication is decided by the create-only entry ``log/<n>``: its base is entry n - 1, so of several racing
publishers one wins and the others start again from what it wrote. What a publisher that died or lost has
left behind (blobs, numbered metadata) is referenced by nothing. If it died after its log entry, the next
``refresh`` or publication completes its switch of ``timestamp.json``.

Nothing read from the store is signed again before its own signatures have been checked from the root that
lies beside the keys. Private keys are read from files, and appear in no argument, log or message.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from securesystemslib.exceptions import StorageError
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from flywheel.edge.campaigns import CAMPAIGNS_FILE, Campaigns
from flywheel.errors import BundleError, Conflict, IntegrityError, NotFound, ReleaseError
from flywheel.keys import ROLES, ROOT_FILE, Keys
from flywheel.schema import (
    BUNDLE_FILES,
    DIGEST,
    RELEASES,
    Group,
    Release,
    Strict,
    bundle_digest,
    digest_of_hashes,
    sha256_bytes,
    sha256_file,
)
from flywheel.store import Store

ATTEMPTS = 50  # each lost attempt is another publisher's success
LOG = f"{RELEASES}/log"
type Role = Root | Timestamp | Snapshot | Targets


TARGETS_ROLES = ("targets", *(g.value for g in Group))


class BlobInfo(Strict):
    """One file of a published bundle."""

    length: int = Field(ge=0)
    sha256: str = Field(pattern=DIGEST)


class BundleIndex(Strict):
    """``releases/bundles/<digest>.json``: what a digest consists of. Self-verifying: the hashes give it."""

    schema_version: Literal[1] = 1
    files: dict[str, BlobInfo]

    def digest(self) -> str:
        """The bundle digest that these files have."""
        return digest_of_hashes({name: self.files[name].sha256 for name in BUNDLE_FILES})


@dataclass
class _Repository:
    """One consistent, verified state of the metadata, being edited."""

    n: int  # of the log entry, and so of the timestamp
    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    roles: dict[str, Targets]

    def release(self, group: Group) -> tuple[Release | None, dict[str, BlobInfo]]:
        """What a group's metadata say now."""
        return _read_group(self.roles[group.value], group)


def _read_group(targets: Targets, group: Group) -> tuple[Release | None, dict[str, BlobInfo]]:
    found = {n: t for n in BUNDLE_FILES if (t := targets.targets.get(f"{group.value}/{n}")) is not None}
    if not found:
        return None, {}
    release = Release.model_validate(found[BUNDLE_FILES[-1]].custom)
    return release, {n: BlobInfo(length=t.length, sha256=t.hashes["sha256"]) for n, t in found.items()}


def _bundle_of(targets: Mapping[str, TargetFile], group: Group) -> dict[str, TargetFile]:
    names = {f"{group.value}/{n}" for n in BUNDLE_FILES}
    return {p: t for p, t in targets.items() if p in names}


def _others(targets: Mapping[str, TargetFile], group: Group) -> dict[str, TargetFile]:
    return {p: t for p, t in targets.items() if p not in _bundle_of(targets, group)}


class Publisher:
    """Signs and publishes releases. Any number may run at once, on any number of machines."""

    def __init__(
        self,
        store: Store,
        keys: Path,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``keys`` is the directory of the signing keys and of the trusted ``root.json``."""
        self.store = store
        self.keys = Keys(keys)
        self._clock = clock
        self._seen: dict[str, bytes] = {}

    # -- set-up

    def init(self) -> bytes:
        """Make keys and repository where they are absent; complete what was interrupted; renew.

        Returns the root metadata that robots are given as their anchor of trust. Raises ``ReleaseError`` if
        the store holds a repository of other keys.
        """
        self.keys.ensure()
        if (self.keys.directory / ROOT_FILE).exists():
            root = self.keys.root
        else:
            root = self.keys.keep_root(self._first_root())
        try:
            self.store.create(_metadata_key("root", 1), root)
        except Conflict:
            if self.store.get(_metadata_key("root", 1)) != root:
                raise ReleaseError(
                    f"{self.store}: its releases are signed by other keys than {self.keys.directory} holds; "
                    "use those keys, or another store"
                ) from None
        if self.store.latest(LOG) is None:
            self._first_metadata()
        self.refresh()
        return root

    def _first_root(self) -> bytes:
        signers = self.keys.load()
        root = Root(consistent_snapshot=True, expires=self._expiry("root"))
        for role in ("root", "targets", "snapshot", "timestamp"):
            for stem, signer in signers.items():
                if stem.rsplit("-", 1)[0] == role:
                    root.add_key(signer.public_key, role)
            root.roles[role].threshold = ROLES[role].threshold
        return self._sign("root", Metadata(root), root.roles["root"].keyids, ROLES["root"].threshold)

    def _first_metadata(self) -> None:
        root = self._trusted_root()
        delegated = {
            g.value: DelegatedRole(g.value, [], ROLES[g.value].threshold, True, paths=[f"{g.value}/*"])
            for g in Group
        }
        top = Targets(delegations=Delegations({}, delegated))
        for stem, signer in self.keys.load().items():
            if (role := stem.rsplit("-", 1)[0]) in delegated:
                top.add_key(signer.public_key, role)
        roles = {"targets": top, **{g.value: Targets() for g in Group}}
        repo = _Repository(0, root, Timestamp(), Snapshot(), roles)
        for signed in (repo.snapshot, *roles.values()):
            signed.version = 0  # counted up when written
        try:
            self._write(repo, set(roles))
        except Conflict:  # another process was first, and did the same
            return

    # -- publishing

    def publish(self, bundle: Path, release: Release, guard: Callable[[], None] | None = None) -> None:
        """Upload a bundle directory and make it what ``release.group`` offers.

        ``guard`` is called after the state to build on has been read and before it is replaced; it raises
        to call the publication off. Raises ``BundleError`` if the bytes are not those of ``release.digest``,
        ``ReleaseError`` if keys are missing. Publishing the same again changes nothing.
        """
        try:
            files = {
                n: BlobInfo(length=(bundle / n).stat().st_size, sha256=sha256_file(bundle / n))
                for n in BUNDLE_FILES
            }
        except OSError as e:
            raise BundleError(f"{bundle}: {e.filename}: {e.strerror}; a bundle has {BUNDLE_FILES}") from None
        index = BundleIndex(files=files)
        if index.digest() != release.digest:
            raise BundleError(
                f"{bundle}: has digest {index.digest()}, not {release.digest}; publish what was gated"
            )
        for name, blob in files.items():
            self.store.put(_blob_key(release.group, name, blob.sha256), bundle / name, blob.sha256)
        self.store.put_json(_index_key(release.digest), index)
        self._offer(release, files, guard)

    def publish_first(self, bundle: Path, git_rev: str = "") -> Release:
        """Offer the policy that a fleet begins with, unless something is offered already; return what is."""
        try:
            digest = bundle_digest(bundle)
        except OSError as e:
            raise BundleError(f"{bundle}: {e.filename}: {e.strerror}; a bundle has {BUNDLE_FILES}") from None
        first = Release(group=Group.STABLE, digest=digest, git_rev=git_rev)

        def only_first() -> None:
            if self.current(Group.STABLE) is not None:
                raise Conflict("a stable release is there")

        try:
            only_first()
            self.publish(bundle, first, only_first)
        except Conflict:
            return self.current(Group.STABLE) or first
        return first

    def reissue(self, release: Release, guard: Callable[[], None] | None = None) -> None:
        """Make a bundle that was published before what ``release.group`` offers: the same bytes, signed anew.

        This is both the promotion from canary to stable and the intended return to an older policy.
        """
        try:
            index = self.store.get_json(_index_key(release.digest), BundleIndex)
        except NotFound:
            raise ReleaseError(
                f"bundle {release.digest}: was never published, so cannot be reissued"
            ) from None
        if set(index.files) != set(BUNDLE_FILES) or index.digest() != release.digest:
            raise ReleaseError(
                f"{_index_key(release.digest)}: does not describe the bundle that it is named after"
            )
        for name, blob in index.files.items():
            self._place(release.group, name, blob)
        self._offer(release, index.files, guard)

    def withdraw(self, group: Group, guard: Callable[[], None] | None = None) -> None:
        """Offer nothing in a group."""

        def clear(repo: _Repository) -> set[str]:
            offered = repo.roles[group.value].targets
            if not _bundle_of(offered, group):
                return set()
            repo.roles[group.value].targets = _others(offered, group)
            return {group.value}

        self._commit(clear, guard)

    def publish_campaigns(self, campaigns: Campaigns) -> None:
        """Sign what robots are to record besides their failures; it replaces what was signed before.

        Signed as a stable release is, so it takes as many keys. ``campaigns`` names who approved it
        (``flywheel.campaigns`` sees to that).
        """
        data = campaigns.to_bytes()
        blob = BlobInfo(length=len(data), sha256=sha256_bytes(data))
        self.store.put(_blob_key(Group.STABLE, CAMPAIGNS_FILE, blob.sha256), data, blob.sha256)
        path = f"{Group.STABLE.value}/{CAMPAIGNS_FILE}"

        def replace(repo: _Repository) -> set[str]:
            targets = repo.roles[Group.STABLE.value].targets
            if path in targets and targets[path].hashes["sha256"] == blob.sha256:
                return set()
            targets[path] = TargetFile(blob.length, {"sha256": blob.sha256}, path)
            return {Group.STABLE.value}

        self._commit(replace, None)

    def current(self, group: Group) -> Release | None:
        """What a group offers; None if nothing."""
        return self._load().release(group)[0]

    def refresh(self) -> dict[Group, Release | None]:
        """Renew metadata past half of their life, as far as their keys are here; complete a switch that
        another publisher left undone. Returns what each group offers."""
        repo = self._commit(lambda _: set(), None)
        return {g: repo.release(g)[0] for g in Group}

    def _offer(
        self, release: Release, files: Mapping[str, BlobInfo], guard: Callable[[], None] | None
    ) -> None:
        custom = release.model_dump(mode="json")

        def replace(repo: _Repository) -> set[str]:
            if repo.release(release.group) == (release, dict(files)):
                return set()
            kept = _others(repo.roles[release.group.value].targets, release.group)
            repo.roles[release.group.value].targets = kept | {
                (path := f"{release.group.value}/{name}"): TargetFile(
                    blob.length, {"sha256": blob.sha256}, path, {"custom": custom}
                )
                for name, blob in files.items()
            }
            return {release.group.value}

        self._commit(replace, guard)

    def _place(self, group: Group, name: str, blob: BlobInfo) -> None:
        """Make sure that a group has a blob, by copying another group's verified bytes."""
        with tempfile.TemporaryDirectory(prefix="flywheel-release-") as d:
            for source in (group, *(g for g in Group if g is not group)):
                try:
                    self.store.get_file(_blob_key(source, name, blob.sha256), Path(d) / name, blob.sha256)
                except (NotFound, IntegrityError):
                    continue
                if source is not group:
                    self.store.put(_blob_key(group, name, blob.sha256), Path(d) / name, blob.sha256)
                return
        raise ReleaseError(
            f"targets file {name} with sha256 {blob.sha256} is lost or damaged in every group; "
            "publish the bundle again from its directory"
        )

    # -- the metadata

    def _commit(
        self, change: Callable[[_Repository], set[str]], guard: Callable[[], None] | None
    ) -> _Repository:
        """Apply ``change`` (it edits, and names the roles it edited) to the newest state, until it wins;
        return what holds then."""
        for _ in range(ATTEMPTS):
            repo = self._load()
            if guard is not None:
                guard()
            edited = change(repo)
            held = self.keys.load()
            edited |= {
                r for r in TARGETS_ROLES if self._ageing(r, repo.roles[r]) and self._can_sign(repo, r, held)
            }
            stale = self._ageing("snapshot", repo.snapshot) or self._ageing("timestamp", repo.timestamp)
            if not edited and not stale:
                self._switch()
                return repo
            try:
                self._write(repo, edited)
            except Conflict:
                continue
            return repo
        raise ReleaseError(f"{self.store}: other publishers won {ATTEMPTS} times in a row; try again")

    def _load(self) -> _Repository:
        """The newest state, every signature checked. Expiry is not: renewing is the publisher's work."""
        root = self._trusted_root()
        head = self.store.latest(LOG)
        if head is None:
            raise ReleaseError(f"{self.store}: no release repository; make one with `flywheel up`")
        n, data = head
        try:
            timestamp = _verified(Timestamp, data, root, "timestamp")
            if timestamp.version != n:
                raise ReleaseError(f"{LOG}/{n}: holds timestamp version {timestamp.version}")
            snapshot = self._numbered(Snapshot, "snapshot", timestamp.snapshot_meta, root)
            top = self._numbered(Targets, "targets", snapshot.meta["targets.json"], root)
            roles = {
                g.value: self._numbered(Targets, g.value, snapshot.meta[f"{g.value}.json"], top)
                for g in Group
            }
        except (RepositoryError, KeyError, StorageError) as e:
            raise ReleaseError(
                f"{self.store}: the release metadata do not verify ({type(e).__name__}: {e}); "
                "somebody changed them: nothing was signed"
            ) from None
        return _Repository(n, root, timestamp, snapshot, {"targets": top, **roles})

    def _numbered[S: (Snapshot, Targets)](
        self, kind: type[S], role: str, meta: MetaFile, delegator: Root | Targets
    ) -> S:
        key = _metadata_key(role, meta.version)
        data = self._seen.get(key, b"")
        if sha256_bytes(data) != (meta.hashes or {}).get("sha256"):
            data = self.store.get(key)
        meta.verify_length_and_hashes(data)
        signed = _verified(kind, data, delegator, role)
        self._seen[key] = data  # a number is written once, unless a store is set back
        return signed

    def _trusted_root(self) -> Root:
        """The newest root, reached from the trusted one by versions that each sign the next."""
        data = self.keys.root
        root = _verified(Root, data, None, "root")
        while True:
            try:
                data = self.store.get(_metadata_key("root", root.version + 1))
            except NotFound:
                return root
            try:
                following = _verified(Root, data, root, "root")
                _verified(Root, data, None, "root")
            except RepositoryError as e:
                raise ReleaseError(f"root version {root.version + 1} does not verify: {e}") from None
            if following.version != root.version + 1:
                raise ReleaseError(f"root version {root.version + 1} says that it is {following.version}")
            root = following

    def _write(self, repo: _Repository, edited: set[str]) -> None:
        """Sign and write numbered metadata, then the log entry (``Conflict`` if another was first), then
        switch."""
        top = repo.roles["targets"]
        for role in sorted(edited):
            signed = repo.roles[role]
            keyids, threshold = _trust(repo.root if role == "targets" else top, role)
            repo.snapshot.meta[f"{role}.json"] = self._write_numbered(role, signed, keyids, threshold)
        repo.timestamp.snapshot_meta = self._write_numbered(
            "snapshot", repo.snapshot, *_trust(repo.root, "snapshot")
        )
        repo.timestamp.version = repo.n + 1
        repo.timestamp.expires = self._expiry("timestamp")
        data = self._sign("timestamp", Metadata(repo.timestamp), *_trust(repo.root, "timestamp"))
        self.store.append_version(LOG, repo.n + 1, data)
        self._switch()

    def _write_numbered(self, role: str, signed: Role, keyids: list[str], threshold: int) -> MetaFile:
        """Write under the next free number; one that is taken is another publisher's or an orphan."""
        signed.expires = self._expiry(role)
        while True:
            signed.version += 1
            data = self._sign(role, Metadata[Any](signed), keyids, threshold)
            try:
                self.store.create(_metadata_key(role, signed.version), data)
            except Conflict:
                continue
            return MetaFile.from_data(signed.version, data, ["sha256"])

    def _switch(self) -> None:
        """Make ``timestamp.json`` the newest log entry, also when a slower publisher overwrites it."""
        key = f"{RELEASES}/metadata/timestamp.json"
        while (head := self.store.latest(LOG)) is not None:
            try:
                if self.store.get(key) == head[1]:
                    return
            except (NotFound, IntegrityError):
                pass
            self.store.put(key, head[1])

    def _sign(self, role: str, metadata: Metadata[Any], keyids: list[str], threshold: int) -> bytes:
        signers = [s for s in self.keys.load().values() if s.public_key.keyid in keyids]
        if len(signers) < threshold:
            raise ReleaseError(
                f"role {role} needs {threshold} signatures and {len(signers)} of its keys lie in "
                f"{self.keys.directory}: bring the others ({role}-*.pem) there, or publish where they are"
            )
        metadata.signatures.clear()
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def _can_sign(self, repo: _Repository, role: str, held: Mapping[str, CryptoSigner]) -> bool:
        keyids, threshold = _trust(repo.root if role == "targets" else repo.roles["targets"], role)
        return sum(s.public_key.keyid in keyids for s in held.values()) >= threshold

    def _expiry(self, role: str) -> datetime:
        return self._clock().replace(microsecond=0) + timedelta(days=ROLES[role].days)

    def _ageing(self, role: str, signed: Role) -> bool:
        return signed.expires - self._clock() < timedelta(days=ROLES[role].days) / 2


def _trust(delegator: Root | Targets, role: str) -> tuple[list[str], int]:
    trusted = delegator.get_delegated_role(role)
    return trusted.keyids, trusted.threshold


def _verified[S: (Root, Timestamp, Snapshot, Targets)](
    kind: type[S], data: bytes, delegator: Root | Targets | None, role: str
) -> S:
    """Metadata of the expected type whose signatures the delegator (None: it itself) accepts."""
    metadata: Metadata[Any] = Metadata.from_bytes(data)
    signed = metadata.signed
    if not isinstance(signed, kind):
        raise RepositoryError(f"{role}: metadata of type {signed.type}")
    trust: Any = delegator if delegator is not None else signed
    trust.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    return signed


def _metadata_key(role: str, version: int) -> str:
    return f"{RELEASES}/metadata/{version}.{role}.json"


def _blob_key(group: Group, name: str, sha256: str) -> str:
    return f"{RELEASES}/targets/{group.value}/{sha256}.{name}"


def _index_key(digest: str) -> str:
    return f"{RELEASES}/bundles/{digest}.json"
