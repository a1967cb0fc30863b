"""The release repository as the cloud reads it: nothing is believed before its signatures are checked.

    releases/metadata/<n>.<role>.json   signed metadata, each number written once
    releases/metadata/timestamp.json    the one key that is overwritten: what robots read first
    releases/targets/<group>/<sha256>.<file>    a bundle's three files, for each group
    releases/log/<n>.json               every timestamp, written once: the order of all publications
    releases/bundles/<digest>.json      sizes and hashes of every bundle ever published

What each group offers is signed by a role: ``canary`` by its own, the candidate's *wave*, what is *pinned*,
the fleet's plan, its campaigns and the *stable* release by ``stable``. The roles ``approval`` and
``operator`` are lists of keys without metadata of their own: they sign people's words and the decisions of
rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from securesystemslib.exceptions import StorageError
from securesystemslib.signer import Key, Signature
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from flywheel.errors import NotFound, ReleaseError
from flywheel.keys import APPROVAL, OPERATOR, Keys
from flywheel.schema import (
    BUNDLE_FILES,
    DIGEST,
    PLAN_TARGET,
    RELEASES,
    FleetPlan,
    Group,
    Release,
    Strict,
    digest_of_hashes,
    sha256_bytes,
)
from flywheel.store import Store

LOG = f"{RELEASES}/log"
TIMESTAMP = f"{RELEASES}/metadata/timestamp.json"
NAMES = "x-flywheel-names"  # in the delegation ``approval``: whose key is whose
REVOKED = "x-flywheel-revoked"  # there too: keyids that must not come back
SIGNED_BY = {Group.CANARY: "canary", Group.WAVE: "stable", Group.STABLE: "stable"}
PATHS = {
    "canary": ["canary/*"],
    "stable": ["stable/*", "wave/*", "pin/*/*", "plan/*", "campaigns/*"],
    APPROVAL: ["approval/*"],
    OPERATOR: ["operator/*"],
}
TARGETS_ROLES = ("targets", "canary", "stable")  # with metadata of their own
type Role = Root | Timestamp | Snapshot | Targets


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
class State:
    """One consistent, verified state of the metadata. A publisher edits it and writes it as the next one."""

    n: int  # of the log entry, and so of the timestamp
    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    roles: dict[str, Targets]

    def release(self, group: Group) -> tuple[Release | None, dict[str, BlobInfo]]:
        """What a group offers, and its files."""
        targets = self.roles[SIGNED_BY[group]].targets
        found = {n: t for n in BUNDLE_FILES if (t := targets.get(f"{group.value}/{n}")) is not None}
        if not found:
            return None, {}
        release = Release.model_validate(found[BUNDLE_FILES[-1]].custom)
        return release, {n: BlobInfo(length=t.length, sha256=t.hashes["sha256"]) for n, t in found.items()}

    def plan(self) -> FleetPlan:
        """The pins and hold-backs that robots obey."""
        target = self.roles["stable"].targets.get(PLAN_TARGET)
        return FleetPlan() if target is None else FleetPlan.model_validate(target.custom)

    def trust(self) -> Trust:
        """Whose words count."""
        top = self.roles["targets"]
        roles = (top.delegations.roles if top.delegations else None) or {}
        keys = top.delegations.keys if top.delegations else {}
        approval, operator = roles.get(APPROVAL), roles.get(OPERATOR)
        return Trust(
            {k: keys[k] for r in (approval, operator) if r is not None for k in r.keyids},
            dict(approval.unrecognized_fields.get(NAMES, {})) if approval else {},
            tuple(approval.unrecognized_fields.get(REVOKED, ())) if approval else (),
            approval.threshold if approval else 1,
            frozenset(operator.keyids) if operator else frozenset(),
        )


@dataclass(frozen=True)
class Trust:
    """The keys that sign words and decisions, from the signed metadata."""

    keys: Mapping[str, Key]
    names: dict[str, str]  # of approvers, by keyid
    revoked: tuple[str, ...]  # keyids of approvers' keys
    approvals: int  # different people that must agree before a release goes to every robot
    operators: frozenset[str]  # keyids

    def signer(self, data: bytes, keyid: str, signature: str) -> str | None:
        """Who signed ``data``: an approver's name, "" for the operator's key, None if nobody known did."""
        if (key := self.keys.get(keyid)) is None:
            return None
        try:
            key.verify_signature(Signature(keyid, signature), data)
        except Exception:  # securesystemslib raises several kinds; none of them is a good signature
            return None
        return self.names.get(keyid, "" if keyid in self.operators else None)

    def operates(self, data: bytes, keyid: str, signature: str) -> bool:
        """Whether the operator's key signed ``data``."""
        return keyid in self.operators and self.signer(data, keyid, signature) == ""


class Reader:
    """Reads and verifies; holds no state of the repository but a cache of bytes that are written once."""

    def __init__(self, store: Store, keys: Path) -> None:
        """``keys`` is the directory with the trusted ``root.json``."""
        self.store = store
        self.keys = Keys(keys)
        self._seen: dict[str, bytes] = {}

    def load(self, root: Root | None = None) -> State:
        """The newest state, every signature checked, from ``root`` or else from the newest root.

        Expiry is not checked: renewing is the publisher's work.
        """
        root = root or self.trusted_root()
        head = self.store.latest(LOG)
        if head is None:
            raise ReleaseError(f"{self.store}: no release repository; make one with `flywheel keys init`")
        n, data = head
        try:
            timestamp = verified(Timestamp, data, root, "timestamp")
            if timestamp.version != n:
                raise ReleaseError(f"{LOG}/{n}: holds timestamp version {timestamp.version}")
            snapshot = self._numbered(Snapshot, "snapshot", timestamp.snapshot_meta, root)
            top = self._numbered(Targets, "targets", snapshot.meta["targets.json"], root)
            roles = {
                r: self._numbered(Targets, r, snapshot.meta[f"{r}.json"], top) for r in TARGETS_ROLES[1:]
            }
        except (RepositoryError, KeyError, StorageError) as e:
            raise ReleaseError(
                f"{self.store}: the release metadata do not verify ({type(e).__name__}: {e}); "
                "somebody changed them, or a change of keys is unfinished (`flywheel keys init` where it was "
                "begun completes it): nothing was signed"
            ) from None
        return State(n, root, timestamp, snapshot, {"targets": top, **roles})

    def _numbered[S: (Snapshot, Targets)](
        self, kind: type[S], role: str, meta: MetaFile, delegator: Root | Targets
    ) -> S:
        key = metadata_key(role, meta.version)
        data = self._seen.get(key, b"")
        if sha256_bytes(data) != (meta.hashes or {}).get("sha256"):
            data = self.store.get(key)
        meta.verify_length_and_hashes(data)
        signed = verified(kind, data, delegator, role)
        self._seen[key] = data  # a number is written once, unless a store is set back
        return signed

    def trusted_root(self, version: int | None = None) -> Root:
        """The newest root, or that of a version, reached from the trusted one by versions that each sign
        the next."""
        data = self.keys.root
        root = verified(Root, data, None, "root")
        while version is None or root.version < version:
            try:
                data = self.store.get(metadata_key("root", root.version + 1))
            except NotFound:
                return root
            try:
                following = verified(Root, data, root, "root")
                verified(Root, data, None, "root")
            except RepositoryError as e:
                raise ReleaseError(f"root version {root.version + 1} does not verify: {e}") from None
            if following.version != root.version + 1:
                raise ReleaseError(f"root version {root.version + 1} says that it is {following.version}")
            root = following
        return root


def keys_of(delegator: Root | Targets, role: str) -> tuple[list[str], int]:
    """Key ids that a role is trusted with, and how many must sign."""
    trusted = delegator.get_delegated_role(role)
    return trusted.keyids, trusted.threshold


def verified[S: (Root, Timestamp, Snapshot, Targets)](
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


def metadata_key(role: str, version: int) -> str:
    """Where numbered metadata lie."""
    return f"{RELEASES}/metadata/{version}.{role}.json"


def blob_key(group: str, name: str, sha256: str) -> str:
    """Where a group's file lies."""
    return f"{RELEASES}/targets/{group}/{sha256}.{name}"


def index_key(digest: str) -> str:
    """Where a bundle's sizes and hashes lie."""
    return f"{RELEASES}/bundles/{digest}.json"
