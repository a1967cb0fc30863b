"""Bundles, robots and clocks for rehearsals of delivery, on any store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flywheel.edge.updater import Updater
from flywheel.release import Publisher
from flywheel.schema import BUNDLE_FILES, Group, Release, bundle_digest
from flywheel.store import Store


def make_bundle(root: Path, name: str, size: int = 2000) -> Path:
    """A directory with a bundle's three files; what is in them does not matter to delivery."""
    directory = root / f"bundle-{name}"
    directory.mkdir(parents=True)
    for file in BUNDLE_FILES:
        (directory / file).write_bytes(f"{name} {file} ".encode() * (size // 20))
    return directory


def upload(store: Store, bundle: Path) -> str:
    """Put a bundle where exports put it; return its digest."""
    digest = bundle_digest(bundle)
    for file in BUNDLE_FILES:
        store.put(f"bundles/{digest}/{file}", bundle / file)
    return digest


def stable(bundle: Path, **fields: Any) -> Release:
    """A release of a bundle to everyone."""
    return Release(group=Group.STABLE, digest=bundle_digest(bundle), **fields)


class Clock:
    """UTC ns that pass only when told to."""

    def __init__(self, t_ns: int = 1_800_000_000_000_000_000) -> None:
        self.t_ns = t_ns

    def __call__(self) -> int:
        return self.t_ns

    def utc(self) -> datetime:
        """The same time, for servers."""
        return datetime.fromtimestamp(self.t_ns / 1e9, UTC)

    def advance(self, seconds: float) -> None:
        self.t_ns += round(seconds * 1e9)


def warm_up(directory: Path) -> str:
    """What a runtime does, without the policy: load the bytes, tell their digest."""
    return bundle_digest(directory)


def failing(reason: str) -> Callable[[Path], str]:
    """A warm-up that raises."""

    def raises(directory: Path) -> str:
        raise RuntimeError(reason)

    return raises


@contextmanager
def robot(
    root: Path, store: Store, publisher: Publisher, name: str = "r1", site: str = "lab", **options: Any
) -> Iterator[Updater]:
    """A robot's updater, provisioned with the publisher's root."""
    with Updater(
        root / name, store, site=site, robot=name, bootstrap=publisher.keys.root, **options
    ) as updater:
        updater.boot(warm_up)
        yield updater
