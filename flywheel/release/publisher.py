"""Signs and publishes releases.

A publication is decided by the create-only entry ``log/<n>``: its base is entry n - 1, so of several racing
publishers one wins and the others start again from what it wrote. What a publisher that died or lost has
left behind (blobs, numbered metadata) is referenced by nothing. If it died after its log entry, the next
``refresh`` or publication completes its switch of ``timestamp.json``.

Nothing read from the store is signed again before its own signatures have been checked from the root that
lies beside the keys. Private keys are read from files, and appear in no argument, log or message.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

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

from flywheel.edge.campaigns import CAMPAIGNS_TARGET, Campaigns
from flywheel.errors import BundleError, Conflict, IntegrityError, NotFound, ReleaseError
from flywheel.keys import OPERATOR, ROLES, ROOT_FILE, role_of
from flywheel.release.repository import (
    LOG,
    PATHS,
    SIGNED_BY,
    TARGETS_ROLES,
    TIMESTAMP,
    BlobInfo,
    BundleIndex,
    Reader,
    Role,
    State,
    blob_key,
    index_key,
    keys_of,
    metadata_key,
    verified,
)
from flywheel.schema import (
    BUNDLE_FILES,
    PLAN_TARGET,
    FleetPlan,
    Group,
    Release,
    bundle_digest,
    sha256_bytes,
    sha256_file,
)
from flywheel.store import Store

ATTEMPTS = 50  # each lost attempt is another publisher's success


class Publisher(Reader):
    """Signs and publishes releases. Any number may run at once, on any number of machines."""

    def __init__(
        self,
        store: Store,
        keys: Path,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``keys`` is the directory of the signing keys and of the trusted ``root.json``."""
        super().__init__(store, keys)
        self.clock = clock

    # -- set-up

    def init(self, approvers: Iterable[str] = ()) -> bytes:
        """Make keys and repository where they are absent; complete what was interrupted; renew.

        ``approvers`` are people whose word puts a release on every robot; each is given a key if there is
        none. Returns the root metadata that robots are given as their anchor of trust. Raises
        ``ReleaseError`` if the store holds a repository of other keys.
        """
        from flywheel.release import ceremony

        self.keys.ensure()
        if (self.keys.directory / ROOT_FILE).exists():
            root = self.keys.root
        else:
            root = self.keys.keep_root(self._first_root())
        try:
            self.store.create(metadata_key("root", 1), root)
        except Conflict:
            if self.store.get(metadata_key("root", 1)) != root:
                raise ReleaseError(
                    f"{self.store}: its releases are signed by other keys than {self.keys.directory} holds; "
                    "use those keys, or another store"
                ) from None
        if self.store.latest(LOG) is None:
            self._first_metadata()
        ceremony.resume(self)
        ceremony.complete(self)
        for name in approvers:
            ceremony.enrol(self, name)
        self.refresh()
        return root

    def _first_root(self) -> bytes:
        signers = self.keys.load()
        root = Root(consistent_snapshot=True, expires=self.expiry("root"))
        for role in ("root", "targets", "snapshot", "timestamp"):
            for stem, signer in signers.items():
                if role_of(stem) == role:
                    root.add_key(signer.public_key, role)
            root.roles[role].threshold = ROLES[role].threshold
        return self.sign("root", Metadata(root), root.roles["root"].keyids, ROLES["root"].threshold)

    def _first_metadata(self) -> None:
        root = self.trusted_root()
        delegated = {
            role: DelegatedRole(role, [], ROLES[role].threshold, True, paths=list(paths))
            for role, paths in PATHS.items()
        }
        top = Targets(delegations=Delegations({}, delegated))
        for stem, signer in self.keys.load().items():
            if (role := role_of(stem)) in (*TARGETS_ROLES[1:], OPERATOR):
                top.add_key(signer.public_key, role)
        roles = {"targets": top, **{r: Targets() for r in TARGETS_ROLES[1:]}}
        state = State(0, root, Timestamp(), Snapshot(), roles)
        for signed in (state.snapshot, *roles.values()):
            signed.version = 0  # counted up when written
        try:
            self.write(state, set(roles))
        except Conflict:  # another process was first, and did the same
            return

    # -- publishing

    def publish(self, bundle: Path, release: Release, guard: Callable[[], None] | None = None) -> None:
        """Upload a bundle directory and make it what ``release.group`` offers.

        ``guard`` is called after the state to build on has been read and before it is replaced; it raises
        to call the publication off. Raises ``BundleError`` if the bytes are not those of ``release.digest``,
        ``ReleaseError`` if keys are missing. Publishing the same again changes nothing.
        """
        files = self.upload(bundle, release.digest, release.group)
        self._offer(release, files, guard)

    def upload(self, bundle: Path, digest: str, group: Group) -> dict[str, BlobInfo]:
        """Put a bundle's bytes where a group's releases lie, offering nothing yet. ``BundleError`` if they
        are not those of ``digest``."""
        try:
            files = {
                n: BlobInfo(length=(bundle / n).stat().st_size, sha256=sha256_file(bundle / n))
                for n in BUNDLE_FILES
            }
        except OSError as e:
            raise BundleError(f"{bundle}: {e.filename}: {e.strerror}; a bundle has {BUNDLE_FILES}") from None
        index = BundleIndex(files=files)
        if index.digest() != digest:
            raise BundleError(f"{bundle}: has digest {index.digest()}, not {digest}; publish what was gated")
        for name, blob in files.items():
            self.store.put(blob_key(group.value, name, blob.sha256), bundle / name, blob.sha256)
        self.store.put_json(index_key(digest), index)
        return files

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
        index = self._index(release.digest)
        for name, blob in index.files.items():
            self._place(release.group.value, name, blob)
        self._offer(release, index.files, guard)

    def withdraw(self, group: Group, guard: Callable[[], None] | None = None) -> None:
        """Offer nothing in a group."""

        def clear(state: State) -> set[str]:
            return _replace(state, SIGNED_BY[group], f"{group.value}/", {})

        self.commit(clear, guard)

    def set_plan(self, plan: FleetPlan) -> None:
        """Sign the fleet's pins and hold-backs, and offer the bundles that robots are pinned to.

        Raises ``ReleaseError`` for a pin to a bundle that was never on offer to every robot, as far as the
        store's metadata that today's keys signed can tell: nobody may be pinned to what nobody approved.
        """
        files: dict[str, dict[str, TargetFile]] = {}
        for digest in {p.digest for p in plan.pins}:
            release = self._was_stable(digest)
            if release is None:
                raise ReleaseError(
                    f"pin to {digest[:12]}: it was never a stable release; pin to one that was, such as "
                    f"{', '.join(r.digest[:12] for r in [self.current(Group.STABLE)] if r) or 'none yet'}"
                )
            index = self._index(digest)
            for name, blob in index.files.items():
                self._place(f"pin/{digest}", name, blob)
            offered = Release(group=Group.STABLE, digest=digest, gate_digest=release.gate_digest)
            files[digest] = _targets(f"pin/{digest}/", index.files, offered.model_dump(mode="json"))
        document = plan.to_bytes()
        target = TargetFile(
            len(document),
            {"sha256": sha256_bytes(document)},
            PLAN_TARGET,
            {"custom": plan.model_dump(mode="json")},
        )

        def replace(state: State) -> set[str]:
            pinned = {path: t for found in files.values() for path, t in found.items()}
            said = {PLAN_TARGET: target} if plan.pins or plan.holds else {}
            return _replace(state, "stable", "pin/", pinned) | _replace(state, "stable", "plan/", said)

        self.commit(replace, None)

    def publish_campaigns(self, campaigns: Campaigns) -> None:
        """Sign what robots are to record besides their failures; it replaces what was signed before.

        Signed as a stable release is, so it takes as many keys. ``campaigns`` names who approved it
        (``flywheel.campaigns`` sees to that).
        """
        data = campaigns.to_bytes()
        blob = BlobInfo(length=len(data), sha256=sha256_bytes(data))
        prefix, _, name = CAMPAIGNS_TARGET.rpartition("/")
        self.store.put(blob_key(prefix, name, blob.sha256), data, blob.sha256)
        said = {CAMPAIGNS_TARGET: TargetFile(blob.length, {"sha256": blob.sha256}, CAMPAIGNS_TARGET)}
        self.commit(lambda state: _replace(state, "stable", f"{prefix}/", said), None)

    def plan(self) -> FleetPlan:
        """The pins and hold-backs that robots obey now."""
        return self.load().plan()

    def _was_stable(self, digest: str) -> Release | None:
        """The release that once offered a bundle to every robot, by metadata that today's keys signed."""
        state = self.load()
        top = state.roles["targets"]
        pinned = state.roles["stable"].targets.get(f"pin/{digest}/{BUNDLE_FILES[0]}")
        if pinned is not None:  # it stays good when the metadata that said so have lost their keys
            return Release.model_validate(pinned.custom)
        for version in range(state.roles["stable"].version, 0, -1):
            try:
                old = verified(Targets, self.store.get(metadata_key("stable", version)), top, "stable")
            except (NotFound, RepositoryError):
                continue
            found, _ = State(0, state.root, state.timestamp, state.snapshot, {"stable": old}).release(
                Group.STABLE
            )
            if found is not None and found.digest == digest:
                return found
        return None

    def current(self, group: Group) -> Release | None:
        """What a group offers; None if nothing."""
        return self.load().release(group)[0]

    def refresh(self) -> dict[Group, Release | None]:
        """Renew metadata past half of their life, as far as their keys are here; complete a switch that
        another publisher left undone. Returns what each group offers."""
        state = self.commit(lambda _: set(), None)
        return {g: state.release(g)[0] for g in Group}

    def _index(self, digest: str) -> BundleIndex:
        try:
            index = self.store.get_json(index_key(digest), BundleIndex)
        except NotFound:
            raise ReleaseError(f"bundle {digest}: was never published, so cannot be reissued") from None
        if set(index.files) != set(BUNDLE_FILES) or index.digest() != digest:
            raise ReleaseError(f"{index_key(digest)}: does not describe the bundle that it is named after")
        return index

    def _offer(
        self, release: Release, files: Mapping[str, BlobInfo], guard: Callable[[], None] | None
    ) -> None:
        def replace(state: State) -> set[str]:
            prefix = f"{release.group.value}/"
            return _replace(
                state,
                SIGNED_BY[release.group],
                prefix,
                _targets(prefix, files, release.model_dump(mode="json")),
            )

        self.commit(replace, guard)

    def _place(self, group: str, name: str, blob: BlobInfo) -> None:
        """Make sure that a group has a blob, by copying another group's verified bytes."""
        with tempfile.TemporaryDirectory(prefix="flywheel-release-") as d:
            for source in (group, *(g.value for g in Group if g.value != group)):
                try:
                    self.store.get_file(blob_key(source, name, blob.sha256), Path(d) / name, blob.sha256)
                except (NotFound, IntegrityError):
                    continue
                if source != group:
                    self.store.put(blob_key(group, name, blob.sha256), Path(d) / name, blob.sha256)
                return
        raise ReleaseError(
            f"targets file {name} with sha256 {blob.sha256} is lost or damaged in every group; "
            "publish the bundle again from its directory"
        )

    # -- the metadata

    def commit(
        self,
        change: Callable[[State], set[str]],
        guard: Callable[[], None] | None,
        load: Callable[[], State] | None = None,
    ) -> State:
        """Apply ``change`` (it edits, and names the roles it edited) to the newest state, until it wins;
        return what holds then. ``load`` reads that state."""
        for _ in range(ATTEMPTS):
            state = (load or self.load)()
            if guard is not None:
                guard()
            edited = change(state)
            held = self.keys.load()
            edited |= {
                r for r in TARGETS_ROLES if self._ageing(r, state.roles[r]) and self._can_sign(state, r, held)
            }
            stale = self._ageing("snapshot", state.snapshot) or self._ageing("timestamp", state.timestamp)
            if not edited and not stale:
                self._switch()
                return state
            try:
                self.write(state, edited)
            except Conflict:
                continue
            return state
        raise ReleaseError(f"{self.store}: other publishers won {ATTEMPTS} times in a row; try again")

    def write(self, state: State, edited: set[str]) -> None:
        """Sign and write numbered metadata, then the log entry (``Conflict`` if another was first), then
        switch."""
        top = state.roles["targets"]
        for role in sorted(edited):
            signed = state.roles[role]
            keyids, threshold = keys_of(state.root if role == "targets" else top, role)
            state.snapshot.meta[f"{role}.json"] = self._write_numbered(role, signed, keyids, threshold)
        state.timestamp.snapshot_meta = self._write_numbered(
            "snapshot", state.snapshot, *keys_of(state.root, "snapshot")
        )
        state.timestamp.version = state.n + 1
        state.timestamp.expires = self.expiry("timestamp")
        data = self.sign("timestamp", Metadata(state.timestamp), *keys_of(state.root, "timestamp"))
        self.store.append_version(LOG, state.n + 1, data)
        self._switch()

    def _write_numbered(self, role: str, signed: Role, keyids: list[str], threshold: int) -> MetaFile:
        """Write under the next free number; one that is taken is another publisher's or an orphan."""
        signed.expires = self.expiry(role)
        while True:
            signed.version += 1
            data = self.sign(role, Metadata[Any](signed), keyids, threshold)
            try:
                self.store.create(metadata_key(role, signed.version), data)
            except Conflict:
                continue
            return MetaFile.from_data(signed.version, data, ["sha256"])

    def _switch(self) -> None:
        """Make ``timestamp.json`` the newest log entry, also when a slower publisher overwrites it."""
        key = TIMESTAMP
        while (head := self.store.latest(LOG)) is not None:
            try:
                if self.store.get(key) == head[1]:
                    return
            except (NotFound, IntegrityError):
                pass
            self.store.put(key, head[1])

    def sign(self, role: str, metadata: Metadata[Any], keyids: list[str], threshold: int) -> bytes:
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

    def _can_sign(self, state: State, role: str, held: Mapping[str, CryptoSigner]) -> bool:
        keyids, threshold = keys_of(state.root if role == "targets" else state.roles["targets"], role)
        return sum(s.public_key.keyid in keyids for s in held.values()) >= threshold

    def expiry(self, role: str) -> datetime:
        return self.clock().replace(microsecond=0) + timedelta(days=ROLES[role].days)

    def _ageing(self, role: str, signed: Role) -> bool:
        return signed.expires - self.clock() < timedelta(days=ROLES[role].days) / 2


def _targets(prefix: str, files: Mapping[str, BlobInfo], custom: dict[str, Any]) -> dict[str, TargetFile]:
    """The signed description of a bundle's files under a prefix."""
    return {
        (path := f"{prefix}{name}"): TargetFile(
            blob.length, {"sha256": blob.sha256}, path, {"custom": custom}
        )
        for name, blob in files.items()
    }


def _replace(state: State, role: str, prefix: str, targets: dict[str, TargetFile]) -> set[str]:
    """Make a role's targets under a prefix these; names the role if that changed anything."""
    old = state.roles[role].targets
    if {p: t for p, t in old.items() if p.startswith(prefix)} == targets:
        return set()
    state.roles[role].targets = {p: t for p, t in old.items() if not p.startswith(prefix)} | targets
    return {role}
