"""Changes of keys as ceremonies: each may be killed at any point, and is completed by ``resume``.

A plan is written beside the keys once the new keys are durable, and removed when nothing is left to do. Keys
of ``root``, ``targets``, ``snapshot`` and ``timestamp`` change with a new root version, which a threshold of
the old root keys and one of the new sign (TUF 1.0, 6.1); then what the old keys have signed is signed
anew. The delegated roles' keys change with the targets metadata and with what they sign in one publication.

Between the new root and the new signatures robots refuse what they see and go on with what they run. Only
the machine that holds the plan then still reads the old signatures, under the root that made them valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from tuf.api.metadata import DelegatedRole, Metadata, Root, Targets

from flywheel.errors import ConfigError, Conflict, ReleaseError
from flywheel.keys import APPROVAL, OPERATOR, RETIRED, ROLES, approver_stem
from flywheel.release.publisher import Publisher
from flywheel.release.repository import NAMES, PATHS, REVOKED, TARGETS_ROLES, State, keys_of, metadata_key
from flywheel.schema import Strict

PLAN = "ceremony.json"
TOP = ("root", "targets", "snapshot", "timestamp")
Step = Callable[[str], None]  # told what comes next: where a test kills


class Plan(Strict):
    """``ceremony.json``: one change of one role's keys."""

    schema_version: Literal[1] = 1
    role: str
    retire: tuple[str, ...]  # keyids
    enrol: dict[str, str]  # file stem to keyid
    name: str = ""  # of the approver
    threshold: int
    root_version: int  # that the change starts from


@dataclass(frozen=True)
class RoleKeys:
    """A role as the signed metadata have it, and which of its keys lie here."""

    role: str
    threshold: int
    keyids: tuple[str, ...]
    held: dict[str, str]  # keyid to file stem
    names: dict[str, str]  # keyid to approver
    version: int | None  # of the role's own metadata
    expires: str


def show(publisher: Publisher) -> list[RoleKeys]:
    """Every role, verified."""
    state = publisher.load()
    stems = {s.public_key.keyid: stem for stem, s in publisher.keys.load().items()}
    names = state.trust().names
    own: dict[str, Any] = {
        "root": state.root, "snapshot": state.snapshot, "timestamp": state.timestamp, **state.roles
    }  # fmt: skip
    found = []
    for role in ROLES:
        keyids, threshold = keys_of(state.root if role in TOP else state.roles["targets"], role)
        signed = own.get(role)
        found.append(
            RoleKeys(
                role,
                threshold,
                tuple(keyids),
                {k: stems[k] for k in keyids if k in stems},
                {k: names[k] for k in keyids if k in names},
                signed.version if signed is not None else None,
                f"{signed.expires:%Y-%m-%d}" if signed is not None else "",
            )
        )
    return found


def rotate(
    publisher: Publisher, role: str, threshold: int | None = None, step: Step = lambda _: None
) -> None:
    """Replace every key of a role by as many new ones. Raises ``ReleaseError`` if those who must agree are
    not here: a threshold of root keys for the top roles, of targets keys for the others."""
    if role not in ROLES or role == APPROVAL:
        known = ", ".join(r for r in ROLES if r != APPROVAL)
        raise ConfigError(f"role = {role!r}: choose one of {known}; an approver's key is changed by `revoke`")
    resume(publisher, step)
    keyids, now = _role(publisher, role)
    _change(publisher, role, keyids, len(keyids), threshold or now, step)


def revoke(publisher: Publisher, key: str, step: Step = lambda _: None) -> None:
    """Take one key out of trust, by its file stem or keyid, and put a new one in its place; an approver gets
    none. What it signed alone stops being valid with the publication that this ends in.

    Its file need not be here. Raises ``ReleaseError`` as ``rotate`` does, ``ConfigError`` for a key that no
    role trusts.
    """
    resume(publisher, step)
    stems = {stem: s.public_key.keyid for stem, s in publisher.keys.load().items()}
    trusted = {k: r for r in show(publisher) for k in r.keyids}
    whose = {name: k for r in trusted.values() for k, name in r.names.items()}
    meant = stems.get(key) or whose.get(key)
    matching = [k for k in trusted if k == meant or (meant is None and len(key) >= 8 and k.startswith(key))]
    if len(matching) != 1:
        raise ConfigError(f"key {key!r}: no role trusts such a key; `flywheel keys show` lists those trusted")
    role = trusted[matching[0]].role
    _change(publisher, role, matching, 0 if role == APPROVAL else 1, trusted[matching[0]].threshold, step)


def require(publisher: Publisher, role: str, threshold: int, step: Step = lambda _: None) -> None:
    """Let a role need so many signatures from now on; for ``approval``: so many different people."""
    if role not in ROLES:
        raise ConfigError(f"role = {role!r}: choose one of {', '.join(ROLES)}")
    resume(publisher, step)
    if _role(publisher, role)[1] != threshold:
        _change(publisher, role, (), 0, threshold, step)


def enrol(publisher: Publisher, name: str, step: Step = lambda _: None) -> None:
    """Let a person approve releases, with a key of that person's own; nothing changes for one who may."""
    stem = approver_stem(name)
    resume(publisher, step)
    trust = publisher.load().trust()
    if name in trust.names.values():
        return
    held = publisher.keys.load()
    revoked = [k for k in trust.revoked if any(k == s.public_key.keyid for s in held.values())]
    if revoked:  # elsewhere
        publisher.keys.retire(revoked)
    if stem not in publisher.keys.load():
        if any((publisher.keys.directory / RETIRED).glob(f"{stem}.*")):
            stem = publisher.keys.next_stem(APPROVAL, name)
        step(f"key {stem} is made")
    key = publisher.keys.make(stem).public_key.keyid
    _run(publisher, _plan(publisher, APPROVAL, (), {stem: key}, trust.approvals, name), step)


def complete(publisher: Publisher) -> None:
    """Add what a repository of an earlier version lacks: roles, keys of the operator, paths."""
    top = publisher.load().roles["targets"]
    roles = (top.delegations.roles if top.delegations else None) or {}
    if all(r in roles and roles[r].paths == p for r, p in PATHS.items()) and roles[OPERATOR].keyids:
        return
    signer = publisher.keys.make(f"{OPERATOR}-1")

    def add(state: State) -> set[str]:
        delegations = state.roles["targets"].delegations
        assert delegations is not None
        assert delegations.roles is not None
        for role, paths in PATHS.items():
            delegations.roles.setdefault(role, DelegatedRole(role, [], ROLES[role].threshold, True, paths=[]))
            delegations.roles[role].paths = list(paths)
        if not delegations.roles[OPERATOR].keyids:
            state.roles["targets"].add_key(signer.public_key, OPERATOR)
        return {"targets"}

    publisher.commit(add, None)


def resume(publisher: Publisher, step: Step = lambda _: None) -> None:
    """Complete the change that a process which died had begun, if there is one."""
    path = publisher.keys.directory / PLAN
    if not path.exists():
        return
    try:
        plan = Plan.model_validate_json(path.read_bytes())
    except ValidationError as e:
        raise ConfigError(f"{path}: {e.errors()[0]['msg']}; it is written whole, so it was edited") from None
    _carry_out(publisher, plan, step)


# ── inside ──────────────────────────────────────────────────────────────────────────────────────────


def _role(publisher: Publisher, role: str) -> tuple[list[str], int]:
    state = publisher.load()
    return keys_of(state.root if role in TOP else state.roles["targets"], role)


def _change(
    publisher: Publisher, role: str, retire: Iterable[str], fresh: int, threshold: int, step: Step
) -> None:
    retire = tuple(retire)
    keyids, _ = _role(publisher, role)
    left = len(keyids) - len(retire) + fresh
    if threshold < 1 or threshold > max(left, 1):
        raise ConfigError(f"threshold = {threshold}: role {role} would have {left} keys; choose 1 to {left}")
    _able(publisher, role, retire, threshold)
    enrolled = {}
    for _ in range(fresh):
        stem = publisher.keys.next_stem(role)
        enrolled[stem] = publisher.keys.make(stem).public_key.keyid
        step(f"key {stem} is made")
    _run(publisher, _plan(publisher, role, retire, enrolled, threshold), step)


def _able(publisher: Publisher, role: str, retire: tuple[str, ...], threshold: int) -> None:
    """Refuse now, rather than half-way, what the keys that are here cannot sign."""
    held = {s.public_key.keyid for s in publisher.keys.load().values()}
    state = publisher.load()
    keyids, _ = keys_of(state.root if role in TOP else state.roles["targets"], role)
    fresh = len(retire) if role != APPROVAL else 0
    need = [(*keys_of(state.root, r), r) for r in (("root",) if role in TOP else ("targets",))]
    need += [(*keys_of(state.root, r), r) for r in ("snapshot", "timestamp") if r != role]
    for ids, least, name in need:
        if (here := len(held & set(ids))) < least:
            raise ReleaseError(
                f"changing the keys of {role} takes {least} signatures of role {name}, and {here} of its "
                f"keys lie in {publisher.keys.directory}: bring the others ({name}-*.pem) for the ceremony"
            )
    stays = len(held & (set(keyids) - set(retire))) + fresh
    if role in ("root", *TARGETS_ROLES) and stays < threshold:
        raise ReleaseError(
            f"after the change role {role} needs {threshold} signatures and {stays} of its keys would lie in "
            f"{publisher.keys.directory}: bring the others ({role}-*.pem) there, or rotate the whole role"
        )


def _plan(
    publisher: Publisher,
    role: str,
    retire: tuple[str, ...],
    enrolled: dict[str, str],
    threshold: int,
    name: str = "",
) -> Plan:
    return Plan(
        role=role,
        retire=retire,
        enrol=enrolled,
        name=name,
        threshold=threshold,
        root_version=publisher.trusted_root().version,
    )


def _run(publisher: Publisher, plan: Plan, step: Step) -> None:
    step("the plan is written")
    publisher.keys.note(PLAN, plan.to_bytes())
    _carry_out(publisher, plan, step)


def _carry_out(publisher: Publisher, plan: Plan, step: Step) -> None:
    """Every step may have been done before: each looks first."""
    if plan.role in TOP:
        _new_root(publisher, plan, step)
        step("what the old keys signed is signed anew")
        _sign_anew(publisher, plan)
    else:
        step("keys and signatures are published")
        publisher.commit(lambda state: _delegate(publisher, state, plan), None)
    step("the old keys are put away")
    publisher.keys.retire(plan.retire)
    step("the plan is removed")
    publisher.keys.drop(PLAN)


def _new_root(publisher: Publisher, plan: Plan, step: Step) -> None:
    base = publisher.trusted_root(plan.root_version)
    newest = publisher.trusted_root()
    if newest.version > base.version:
        if _changed(newest, plan):
            return
        raise ReleaseError(
            f"root version {newest.version} was made elsewhere while this change of {plan.role} keys began; "
            f"remove {publisher.keys.directory / PLAN} and begin again"
        )
    old_ids, old_threshold = keys_of(base, "root")
    root = copy.deepcopy(base)
    for keyid in plan.retire:
        if keyid in root.roles[plan.role].keyids:
            root.revoke_key(keyid, plan.role)
    signers = publisher.keys.load()
    for stem in plan.enrol:
        root.add_key(signers[stem].public_key, plan.role)
    root.roles[plan.role].threshold = plan.threshold
    root.version = base.version + 1
    root.expires = publisher.expiry("root")
    metadata: Metadata[Root] = Metadata(root)
    new_ids, new_threshold = keys_of(root, "root")
    publisher.sign("root", metadata, old_ids, old_threshold)  # raises if too few of the old are here
    publisher.sign("root", metadata, new_ids, new_threshold)
    data = publisher.sign("root", metadata, [*old_ids, *new_ids], max(old_threshold, new_threshold))
    step("the new root is written")
    try:
        publisher.store.create(metadata_key("root", root.version), data)
    except Conflict:
        _new_root(publisher, plan, step)


def _changed(root: Root, plan: Plan) -> bool:
    keyids, threshold = keys_of(root, plan.role)
    return (
        set(plan.enrol.values()) <= set(keyids)
        and not set(plan.retire) & set(keyids)
        and threshold == plan.threshold
    )


def _sign_anew(publisher: Publisher, plan: Plan) -> None:
    """Publish the same once more, by keys that the new root trusts."""
    before = publisher.trusted_root(plan.root_version)
    after = publisher.trusted_root()

    def load() -> State:
        try:
            return publisher.load()
        except ReleaseError:
            old = publisher.load(before)
            old.root = after
            return old

    def again(state: State) -> set[str]:
        try:
            publisher.load()
        except ReleaseError:
            return {"targets"}
        return set()

    publisher.commit(again, None, load)


def _delegate(publisher: Publisher, state: State, plan: Plan) -> set[str]:
    top: Targets = state.roles["targets"]
    role = top.get_delegated_role(plan.role)
    signers = publisher.keys.load()
    names: dict[str, str] = dict(role.unrecognized_fields.get(NAMES, {}))
    before = (list(role.keyids), role.threshold, dict(names))
    for keyid in plan.retire:
        if keyid in role.keyids:
            top.revoke_key(keyid, plan.role)
            names.pop(keyid, None)
    for stem, keyid in plan.enrol.items():
        top.add_key(signers[stem].public_key, plan.role)
        if plan.name:
            names[keyid] = plan.name
    role.threshold = plan.threshold
    if plan.role == APPROVAL:
        role.unrecognized_fields[NAMES] = names
        revoked = {*role.unrecognized_fields.get(REVOKED, ()), *plan.retire}
        role.unrecognized_fields[REVOKED] = sorted(revoked)
    if before == (list(role.keyids), role.threshold, names):
        return set()
    return {"targets", plan.role} & {"targets", *TARGETS_ROLES}
