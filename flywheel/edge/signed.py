"""What is signed for robots: metadata and files, verified by python-tuf from the robot's own root.

Nothing here decides what a robot runs, and nothing that fails to verify leaves a trace but an error.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, RepositoryError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface
from tuf.ngclient import Updater as TufClient

from flywheel.edge.campaigns import CAMPAIGNS_BYTES_MAX, CAMPAIGNS_TARGET, Campaign, Campaigns
from flywheel.edge.slots import fsync_directory
from flywheel.errors import NotFound, ReleaseError, StoreError, StoreUnavailable
from flywheel.schema import (
    BUNDLE_FILES,
    PLAN_TARGET,
    RELEASES,
    FleetPlan,
    Group,
    Release,
    digest_of_hashes,
)
from flywheel.store import Store


@dataclass(frozen=True)
class Offer:
    """A verified release, and the signed length and hash of each of its files."""

    release: Release
    files: Mapping[str, TargetFile]


class SignedReleases:
    """The release repository as a robot sees it. ``<root>/metadata`` keeps what was seen, so that older
    metadata are never accepted again."""

    def __init__(self, root: Path, store: Store, bootstrap: bytes) -> None:
        self._metadata, self._bootstrap = root / "metadata", bootstrap
        self._fetcher = StoreFetcher(store)
        self._client: TufClient | None = None

    def refresh(self) -> None:
        """Fetch and verify the newest metadata.

        Raises ``ReleaseError`` for metadata that are unsigned, altered, older than those seen before or
        expired, ``StoreUnavailable`` where there is no answer.
        """
        self._client = None
        self._metadata.mkdir(parents=True, exist_ok=True)
        with self._fetcher, _verifying("release metadata"):
            client = TufClient(
                str(self._metadata),
                f"{RELEASES}/metadata/",
                target_base_url=f"{RELEASES}/targets/",
                fetcher=self._fetcher,
                bootstrap=self._bootstrap,
            )
            client.refresh()
        self._client = client

    def offer(self, group: Group) -> Offer | None:
        """What a group offers (after ``refresh``): three files, and one release that they agree on."""
        return self._offer(group.value, group)

    def pinned(self, digest: str) -> Offer:
        """The bundle that robots are pinned to. Raises ``ReleaseError`` if it is not on offer."""
        offer = self._offer(f"pin/{digest}", Group.STABLE)
        if offer is None or offer.release.digest != digest:
            raise ReleaseError(f"pinned to {digest}: it is not on offer; tell whoever signs the releases")
        return offer

    def plan(self) -> FleetPlan:
        """The pins and hold-backs of the fleet (after ``refresh``)."""
        with self._fetcher, _verifying("fleet plan"):
            target = self._require_client().get_targetinfo(PLAN_TARGET)
        if target is None:
            return FleetPlan()
        try:
            return FleetPlan.model_validate(target.custom)
        except ValidationError as e:
            raise ReleaseError(f"fleet plan: not understood, is this robot's software old? {e}") from None

    def _offer(self, prefix: str, group: Group) -> Offer | None:
        client, what = self._require_client(), f"{prefix} release"
        with self._fetcher, _verifying(what):
            found = {n: client.get_targetinfo(f"{prefix}/{n}") for n in BUNDLE_FILES}
        files = {n: t for n, t in found.items() if t is not None}
        if not files:
            return None
        customs = [t.custom for t in files.values()]
        if len(files) < len(BUNDLE_FILES) or any(c != customs[0] for c in customs):
            raise ReleaseError(f"{what}: its files are not one release")
        try:
            release = Release.model_validate(customs[0])
            digest = digest_of_hashes({n: t.hashes["sha256"] for n, t in files.items()})
        except (ValidationError, KeyError) as e:
            raise ReleaseError(f"{what}: not understood, is this robot's software old? {e}") from None
        if release.group is not group or release.digest != digest:
            raise ReleaseError(f"{what}: signed as {release.group} {release.digest}, its files are {digest}")
        return Offer(release, files)

    def campaigns(self, directory: Path) -> tuple[Campaign, ...]:
        """What else to record (after ``refresh``), verified; none if nothing is signed."""
        client = self._require_client()
        name = CAMPAIGNS_TARGET
        with self._fetcher, _verifying(name):
            target = client.get_targetinfo(name)
            if target is None:
                return ()
            if target.length > CAMPAIGNS_BYTES_MAX:
                raise ReleaseError(f"{name}: {target.length} bytes, at most {CAMPAIGNS_BYTES_MAX}")
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / Path(CAMPAIGNS_TARGET).name
            if client.find_cached_target(target, str(path)) is None:
                client.download_target(target, str(path))
        try:
            return Campaigns.model_validate_json(path.read_bytes()).campaigns
        except (OSError, ValidationError) as e:
            raise ReleaseError(f"{name}: not understood, is this robot's software old? {e}") from None

    def download(self, offer: Offer, directory: Path) -> None:
        """Fetch an offer's files into a directory: each appears there verified and durable, or not at all.

        Files that an attempt before this one completed are kept.
        """
        client = self._require_client()
        directory.mkdir(parents=True, exist_ok=True)
        for name, target in offer.files.items():
            path = directory / name
            if client.find_cached_target(target, str(path)) is not None:
                continue
            part = path.with_name(f"{name}.part")
            with self._fetcher, _verifying(f"{offer.release.group}/{name}"):
                client.download_target(target, str(part))
            with part.open("rb") as f:
                os.fsync(f.fileno())
            part.rename(path)
        fsync_directory(directory)

    def _require_client(self) -> TufClient:
        if self._client is None:
            raise ReleaseError("release metadata: not verified yet")
        return self._client


class StoreFetcher(FetcherInterface):
    """python-tuf's transport over the store: urls are keys. python-tuf stops it at the signed length, and
    leaves it to ``with`` to hang up then."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: Generator[bytes] | None = None

    def __enter__(self) -> StoreFetcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.__exit__()
        try:
            self._open = self._store.stream(url)
        except NotFound as e:
            raise DownloadHTTPError(str(e), 404) from None
        except StoreError as e:
            raise DownloadError(str(e)) from e
        return self._open


@contextmanager
def _verifying(what: str) -> Iterator[None]:
    """python-tuf's errors as ours: what could not be fetched is not the same as what did not verify."""
    try:
        yield
    except (RepositoryError, DownloadLengthMismatchError) as e:
        raise ReleaseError(
            f"{what}: does not verify: {type(e).__name__}: {e}; the policy in use stays, "
            "tell whoever signs the releases"
        ) from e
    except DownloadError as e:
        if isinstance(e.__cause__, StoreError):
            raise e.__cause__ from None
        raise StoreUnavailable(f"{what}: {e}") from e
