"""Policies by digest: which checkpoint is behind a bundle, so that a turn can start from any earlier one.

    bundles/<digest>/{policy.onnx,tokenizer.json,policy.json}
    policies/<digest>.json              PolicyRecord
    runs/<turn>/checkpoint/…            the checkpoint's files

On disk a policy is laid out as ``models/base`` is: a checkpoint directory with its bundle in ``bundle/``.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

from flywheel.errors import BundleError, NotFound
from flywheel.schema import BUNDLE_FILES, Strict, bundle_digest, digest_of_hashes, sha256_file
from flywheel.store import Store


class PolicyRecord(Strict):
    """``policies/<digest>.json``: the turn that made a policy, and the sha256 of its files by name.

    ``start`` is the policy that it was fine-tuned from, ``dataset`` the dataset version that taught it: by
    digest, "" in the records of an older version (``flywheel.lineage``).
    """

    schema_version: Literal[1] = 1
    digest: str
    turn: str
    bundle: dict[str, str]
    checkpoint: dict[str, str]
    start: str = ""
    dataset: str = ""


def digest_of(bundle: Path) -> str:
    """``schema.bundle_digest``; ``BundleError`` names the file that is missing."""
    for name in BUNDLE_FILES:
        if not (bundle / name).is_file():
            raise BundleError(f"{bundle / name}: no such file, so {bundle} is no policy bundle")
    return bundle_digest(bundle)


def publish(
    store: Store, turn: str, bundle: Path, checkpoint: Path, *, start: str = "", dataset: str = ""
) -> PolicyRecord:
    """Put a bundle and its checkpoint into the store, the record last; a repeat writes the same."""
    found = PolicyRecord(
        digest=digest_of(bundle),
        turn=turn,
        bundle={name: sha256_file(bundle / name) for name in BUNDLE_FILES},
        checkpoint={
            path.relative_to(checkpoint).as_posix(): sha256_file(path)
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file()
        },
        start=start,
        dataset=dataset,
    )
    for name, (key, sha) in _keys(found).items():
        path = bundle / name.removeprefix("bundle/") if name.startswith("bundle/") else checkpoint / name
        store.put(key, path, sha)
    store.put_json(f"policies/{found.digest}.json", found)
    return found


def record(store: Store, digest: str) -> PolicyRecord:
    """What is known of a policy; ``BundleError`` if no turn of this store made it."""
    found = find(store, digest)
    if found is None:
        raise BundleError(
            f"policy {digest[:12]}: its checkpoint is not in the store, no turn of this store made it, so "
            "no turn can start from it"
        )
    return found


def find(store: Store, digest: str) -> PolicyRecord | None:
    """``record``, or None if no turn of this store made the policy."""
    try:
        found = store.get_json(f"policies/{digest}.json", PolicyRecord)
    except NotFound:
        return None
    if set(found.bundle) != set(BUNDLE_FILES) or digest_of_hashes(found.bundle) != digest:
        raise BundleError(f"policies/{digest}.json: describes another bundle than its name")
    return found


def fetch(store: Store, digest: str, into: Path, *, bundle_only: bool = False) -> None:
    """Download a policy, every file verified; files that are there already are kept.

    ``bundle_only``: what looks and acts, without the checkpoint that training starts from.
    """
    found = record(store, digest)
    for name, (key, sha) in _keys(found).items():
        if bundle_only and not name.startswith("bundle/"):
            continue
        path = into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.is_file() and sha256_file(path) == sha):
            store.get_file(key, path, sha)


def _keys(found: PolicyRecord) -> dict[str, tuple[str, str]]:
    """By path on disk: key in the store and sha256."""
    keys = {f"bundle/{n}": (f"bundles/{found.digest}/{n}", sha) for n, sha in found.bundle.items()}
    for name, sha in found.checkpoint.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.parts[:1] == ("bundle",):
            raise BundleError(f"policy {found.digest[:12]}: a checkpoint may not have a file {name!r}")
        keys[name] = (f"runs/{found.turn}/checkpoint/{name}", sha)
    return keys
