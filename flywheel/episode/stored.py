"""Episodes in the object store: list them, pull one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flywheel import schema
from flywheel.episode.bounds import too_large
from flywheel.episode.sealing import fsync_directory, parse_manifest, read_manifest, write_durably
from flywheel.errors import EpisodeError, IntegrityError, NotFound
from flywheel.schema import Manifest

if TYPE_CHECKING:
    from flywheel.store import Store

_DEPTH = 5  # episodes / site= / robot= / date= / id


@dataclass(frozen=True)
class Listed:
    """One episode of the store: its manifest, or the reason why that cannot be read."""

    prefix: str
    manifest: Manifest | None
    problem: str = ""


def ls(store: Store, site: str = "", robot: str = "", date: str = "") -> Iterator[Listed]:
    """Episodes in the store in key order; each filter is an exact name, empty for all.

    A manifest that is damaged, forged or in the wrong place is listed with its problem. A store that is
    down raises.
    """
    prefix = "episodes/"
    if site:
        prefix += f"site={site}/" + (f"robot={robot}/" if robot else "")
    for item in store.list(prefix):
        directory, _, name = item.key.rpartition("/")
        parts = directory.split("/")
        if name != schema.MANIFEST_FILE or len(parts) != _DEPTH:
            continue
        if (robot and parts[2] != f"robot={robot}") or (date and parts[3] != f"date={date}"):
            continue
        try:
            yield Listed(f"{directory}/", _manifest(store, f"{directory}/"))
        except (EpisodeError, IntegrityError, NotFound) as e:
            yield Listed(f"{directory}/", None, str(e))


def pull(store: Store, prefix: str, directory: Path) -> Path:
    """Download one episode to ``directory/<episode_id>`` and return that path.

    Every file's sha256 is checked on the way (``IntegrityError``), and the directory appears only when it
    is whole. An episode that is there already, with the same manifest, is not fetched again.
    """
    prefix = prefix.rstrip("/") + "/"
    manifest = _manifest(store, prefix)
    final = directory / manifest.episode_id
    if final.exists():
        if read_manifest(final) != manifest:
            raise EpisodeError(f"{final}: holds another episode than {prefix}; move it away first")
        return final
    partial = directory / f".{manifest.episode_id}.pull"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for entry in manifest.files:
            # Before the first byte: what is larger than the manifest says could fill the disk.
            info = store.stat(prefix + entry.name)
            if info is not None and info.size != entry.bytes:
                raise IntegrityError(
                    f"{prefix}{entry.name}: {info.size} bytes, but the manifest says {entry.bytes}"
                )
            if (why := too_large(entry, manifest)) is not None:
                raise EpisodeError(f"{prefix}{entry.name}: {why}")
            store.get_file(prefix + entry.name, partial / entry.name, sha256=entry.sha256)
        write_durably(partial / schema.MANIFEST_FILE, manifest.to_bytes())
        partial.rename(final)
        fsync_directory(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _manifest(store: Store, prefix: str) -> Manifest:
    key = prefix + schema.MANIFEST_FILE
    manifest = parse_manifest(store.get(key), key)
    if manifest.prefix != prefix:
        raise EpisodeError(f"{key}: describes {manifest.prefix}, so it is not where it belongs")
    return manifest
