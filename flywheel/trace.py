"""The evidence chain: from an episode to the robots that act by what was learned from it, and back.

    episode → claims → turn → dataset → experiment → bundle → gate report → approval → release → robots

Each link is read from the store and verified by the strongest means there is: its own sha256 under the name
by which the link before it calls it, a signature, or the hash chain that it is part of. A link that was only
found, and that nothing vouches for, says so; one that does not verify is broken, and the chain with it.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flywheel import episode, policies, rollout
from flywheel.claims import TAKEN, Claim, claims_of
from flywheel.config import checkout
from flywheel.errors import EpisodeError, FlywheelError, NotFound, StageError
from flywheel.release import BundleIndex, Publisher
from flywheel.release.repository import blob_key, index_key
from flywheel.rollout.evidence import read_gate, read_robots
from flywheel.rollout.words import sealed
from flywheel.schema import BUNDLE_FILES, MANIFEST_FILE, Group, digest_of_hashes, sha256_bytes
from flywheel.store import Store
from flywheel.turn import TurnRecord, TurnResult

EPISODE_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
READERS = 8


@dataclass(frozen=True)
class Link:
    """One link: what it is, its name, where it lies, and by what it was verified."""

    what: str
    name: str
    key: str
    how: str
    ok: bool = True


@dataclass
class Chain:
    """What was found, from the episodes to the robots."""

    about: str
    links: list[Link] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every link that was found verifies."""
        return bool(self.links) and all(link.ok for link in self.links)

    def add(self, what: str, name: str, key: str, how: str, ok: bool = True) -> bool:
        """Put a link at the end; returns whether it holds."""
        self.links.append(Link(what, name, key, how if ok else f"does not verify: {how}", ok))
        return ok

    def require(self, what: str, name: str, key: str, found: str, expected: str, how: str) -> bool:
        """A link that holds if two hashes agree."""
        said = how if found == expected else f"{how}: found {found or 'nothing'}, expected {expected}"
        return self.add(what, name, key, said, found == expected)


def trace(store: Store, publisher: Publisher, name: str) -> Chain:
    """Follow the chain of a bundle digest (12 characters or more of it) or of an episode's id.

    Raises ``StageError`` for a name that nothing in the store has.
    """
    chain = Chain(name)
    if EPISODE_ID.fullmatch(name):
        turn = _turn_of_episode(store, chain, name)
        if turn is None:
            return chain
        result = _turn(store, chain, turn, only=name)
        if result is not None and result.candidate_digest:
            _policy(store, publisher, chain, result.candidate_digest, result)
        return chain
    digest = _whole(store, name)
    try:
        turn = policies.record(store, digest).turn
    except FlywheelError:
        chain.add("turn", "none", "", "no turn of this store made it: a fleet's first policy")
        result = None
    else:
        result = _turn(store, chain, turn)
        if result is not None:
            chain.require("bundle", digest[:12], f"policies/{digest}.json", result.candidate_digest, digest,
                          "named by the turn's result")  # fmt: skip
    _policy(store, publisher, chain, digest, result)
    return chain


def _whole(store: Store, name: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{12,64}", name):
        raise StageError(
            f"{name}: neither an episode's id nor 12 to 64 characters of a digest; `flywheel episodes ls` "
            "and `flywheel fleet` show them"
        )
    found = {
        m[1]
        for prefix in ("policies/", "releases/bundles/", "bundles/")
        for i in store.list(f"{prefix}{name}")
        if (m := re.search(rf"/({name}[0-9a-f]*)(?:\.json|/)", i.key)) is not None
    }
    if len(found) != 1:
        raise StageError(f"{name}: {len(found)} policies of this store have a digest that begins like this")
    return found.pop()


# ── episodes, claims, turn ──────────────────────────────────────────────────────────────────────────


def _turn_of_episode(store: Store, chain: Chain, episode_id: str) -> str | None:
    """The turn that an episode belongs to; None, with the episode alone verified, if none took it."""
    try:
        return store.get(f"{TAKEN}/{episode_id}").decode()
    except NotFound:
        pass
    prefix = next((e.prefix for e in episode.ls(store) if e.prefix.rstrip("/").endswith(episode_id)), None)
    if prefix is None:
        raise StageError(f"{episode_id}: no such episode in {store}")
    chain.links.append(_episode(store, episode_id, prefix))
    chain.add("claims", "none", f"{TAKEN}/{episode_id}", "no turn took it yet")
    return None


def _episode(store: Store, episode_id: str, prefix: str) -> Link:
    try:
        key = f"{prefix}{MANIFEST_FILE}"
        manifest = episode.parse_manifest(store.get(key), key)
        if manifest.episode_id != episode_id:
            raise EpisodeError(f"says that it is episode {manifest.episode_id}")
        for entry in manifest.files:
            store.get(prefix + entry.name, entry.sha256)
    except (EpisodeError, FlywheelError) as e:
        return Link("episode", episode_id, prefix, f"does not verify: {e}", False)
    by = manifest.policy_digest[:12]
    return Link("episode", episode_id, prefix, f"sha256 of {len(manifest.files)} files; acted by policy {by}")


def _turn(store: Store, chain: Chain, turn: str, only: str = "") -> TurnResult | None:
    """Episodes, claims, turn, dataset, experiment."""
    claims = claims_of(store, turn)
    taken: list[Claim] = [c for c in claims.episodes if not c.problem and only in ("", c.episode_id)]
    with ThreadPoolExecutor(READERS) as pool:
        chain.links += pool.map(lambda c: _episode(store, c.episode_id, c.prefix), taken)
    key = f"claimed/{turn}/claims.json"
    listed = not only or any(c.episode_id == only for c in claims.episodes)
    chain.add("claims", turn, key, f"{len(claims.episodes)} episodes, its own sha256", listed)
    record = store.get_json(f"runs/{turn}/turn.json", TurnRecord)
    try:
        if record.patch_sha256:
            store.get(f"runs/{turn}/source.patch", record.patch_sha256)
        ok, how = (
            True,
            f"commit {record.commit[:12]}" + (" and patch by sha256" if record.patch_sha256 else ""),
        )
    except FlywheelError as e:
        ok, how = False, str(e)
    chain.add("turn", turn, f"runs/{turn}/turn.json", f"{how}; from policy {record.current_digest[:12]}", ok)
    try:
        result = store.get_json(f"runs/{turn}/result.json", TurnResult)
    except NotFound:
        chain.add("experiment", "none", f"runs/{turn}/result.json", "the turn is not closed yet")
        return None
    _experiment(store, chain, result)
    return result


def _experiment(store: Store, chain: Chain, result: TurnResult) -> None:
    """dvc.lock ties data, training and bundle together by DVC's hashes (MD5: they name, no more)."""
    key = f"runs/{result.turn}/workspace/dvc.lock"
    try:
        stages = yaml.safe_load(store.get(key))["stages"]
    except (NotFound, KeyError, TypeError, yaml.YAMLError):
        chain.add("dataset", result.dataset, key, "no readable dvc.lock", False)
        return
    made = _hash(stages, "curate", "outs", "data/curated/dataset")
    chain.require("dataset", result.dataset[:12], key, result.dataset, made, "named by dvc.lock")
    curated = f"runs/{result.turn}/workspace/data/curated/curate.json"
    try:
        figures = store.get(curated)
        sha = json.loads(figures)["dataset_sha256"]
        found = hashlib.md5(figures, usedforsecurity=False).hexdigest()
        locked = _hash(stages, "curate", "outs", "data/curated/curate.json")
        chain.require("dataset", sha[:12], curated, found, locked, "its figures, by dvc.lock")
    except (NotFound, KeyError, ValueError):
        chain.add("dataset", result.dataset[:12], curated, "its figures are gone", False)
    if "train" in stages:
        read = _hash(stages, "train", "deps", "data/curated/dataset")
        chain.require("training", result.turn, key, read, made, "read that dataset")
    if "export" in stages:
        read = _hash(stages, "export", "deps", "data/checkpoint")
        wrote = _hash(stages, "train", "outs", "data/checkpoint")
        chain.require("export", result.turn, key, read, wrote, "read that checkpoint")
    if result.candidate_digest:
        found = _dvc_directory(store, result.candidate_digest)
        wrote = _hash(stages, "export", "outs", "data/bundle")
        chain.require("bundle", result.candidate_digest[:12], key, found, wrote, "made by that export")
    if result.experiment:
        chain.add("experiment", result.turn, result.experiment[:12], _git(result.experiment))


def _hash(stages: dict[str, Any], stage: str, kind: str, path: str) -> str:
    return next((str(o["md5"]) for o in stages.get(stage, {}).get(kind, ()) if o["path"] == path), "")


def _dvc_directory(store: Store, digest: str) -> str:
    """DVC's name for a bundle directory: MD5 of the canonical list of its files' MD5."""
    files = []
    for name in sorted(BUNDLE_FILES):
        data = store.get(f"bundles/{digest}/{name}")
        files.append({"md5": hashlib.md5(data, usedforsecurity=False).hexdigest(), "relpath": name})
    listing = json.dumps(files, sort_keys=True).encode()
    return f"{hashlib.md5(listing, usedforsecurity=False).hexdigest()}.dir"


def _git(commit: str) -> str:
    root = checkout(Path.cwd())
    if root is None:
        return "not looked for: no checkout here"
    done = subprocess.run(
        ["git", "-C", str(root), "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True, check=False
    )
    return "in this checkout, by its git hash" if done.returncode == 0 else "not in this checkout"


# ── bundle, gate, approval, release, robots ─────────────────────────────────────────────────────────


def _policy(store: Store, publisher: Publisher, chain: Chain, digest: str, result: TurnResult | None) -> None:
    _bundle(store, chain, digest)
    if result is not None and result.gate_digest:
        _gate(store, chain, result.gate_digest, digest)
    state = publisher.load()
    trust = state.trust()
    chain.add(
        "release log", f"{state.n}", f"releases/log/{state.n:08d}.json", "signatures from the trusted root"
    )
    for rid in sorted(_rollouts(store, digest)):
        try:
            states = rollout.history(store, rid)
        except FlywheelError as e:
            chain.add("rollout", rid, f"rollouts/{rid}/", str(e), False)
            continue
        last = states[-1]
        if last.bundle_digest != digest:
            continue
        signed = sealed(last, trust)
        how = f"hash chain of {last.n} decisions, the last signed by the operator" if signed else (
            "its last decision is not signed by today's operator key"
        )  # fmt: skip
        chain.add("rollout", rid, f"rollouts/{rid}/{last.n:08d}.json", f"{how}; {last.stage}", signed)
        if result is None or last.gate_digest != result.gate_digest:
            _gate(store, chain, last.gate_digest, digest)
        for sha in {s.evidence.inputs_sha256 for s in states if s.evidence and s.evidence.inputs_sha256}:
            key = f"rollouts/{rid}/inputs/{sha}.json"
            try:
                store.get(key, sha)
            except FlywheelError as e:
                chain.add("evidence", sha[:12], key, str(e), False)
        if last.approved_by:
            key = f"rollouts/{rid}/approvals/{last.approval_digest}.json"
            try:
                words = rollout.require_approval(store, last, trust)
                by = ", ".join(sorted(w.by for w in words))
                chain.add("approval", by, key, "their signatures, over this bundle and gate report")
            except FlywheelError as e:
                chain.add("approval", ", ".join(last.approved_by), key, str(e), False)
    _released(store, chain, state.release, digest)
    robots, _ = read_robots(store)
    for r in robots:
        if r.loaded_digest == digest:
            trial = "" if r.confirmed else ", on trial"
            key = f"fleet/robots/{r.robot}.json"
            chain.add("robot", r.robot, key, f"says that it loaded bytes of this digest{trial}")


def _bundle(store: Store, chain: Chain, digest: str) -> None:
    key = f"bundles/{digest}/"
    try:
        found = digest_of_hashes({n: sha256_bytes(store.get(key + n)) for n in BUNDLE_FILES})
    except NotFound:
        return  # a first policy lies among the releases alone
    except FlywheelError as e:
        chain.add("bundle", digest[:12], key, str(e), False)
        return
    chain.require("bundle", digest[:12], key, found, digest, "sha256 of its files")


def _gate(store: Store, chain: Chain, gate_digest: str, digest: str) -> None:
    key = f"gates/{gate_digest}.json"
    report = read_gate(store, gate_digest)
    if report is None:
        chain.add("gate report", gate_digest[:12], key, "gone, or not the one of that digest", False)
        return
    how = f"its own sha256; {report.verdict} over {report.current_digest[:12]}"
    chain.add("gate report", gate_digest[:12], key, how, report.candidate_digest == digest)


def _rollouts(store: Store, digest: str) -> set[str]:
    found = store.list(f"rollouts/{digest[:12]}-")
    return {i.key.split("/")[1] for i in found}


def _released(store: Store, chain: Chain, offered: Any, digest: str) -> None:
    for group in Group:
        release, files = offered(group)
        if release is None or release.digest != digest:
            continue
        approval = f"; approval {release.approval_digest[:12]}" if release.approval_digest else ""
        chain.add("release", group.value, index_key(digest), f"signed metadata{approval}")
        for name, blob in files.items():
            key = blob_key(group.value, name, blob.sha256)
            try:
                store.get(key, blob.sha256)
            except FlywheelError as e:
                chain.add("release", f"{group.value}/{name}", key, str(e), False)
    try:
        index = store.get_json(index_key(digest), BundleIndex)
    except NotFound:
        return
    if index.digest() != digest:
        chain.add("release", digest[:12], index_key(digest), "describes another bundle", False)
