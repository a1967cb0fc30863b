"""What an attacker, a fault or a careless person does to releases; each attack ends in what came of it.

An attack takes a site of its own, raises ``Breach`` if it succeeded, and otherwise says how it was refused or
recovered from. One of them is not to be refused, so that it is known that the forgeries would work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Targets

from flywheel import rollout
from flywheel.edge.updater import Action
from flywheel.errors import FlywheelError, ReleaseError, StageError
from flywheel.rehearsal.bucket import BucketStore
from flywheel.rehearsal.deliveries import make_bundle, robot, stable, warm_up
from flywheel.rehearsal.rollouts import RolloutSite
from flywheel.rehearsal.site import Breach, Site, expect, forge, offer, refused, taken, upload_blobs
from flywheel.release import Publisher, ceremony
from flywheel.release.repository import TIMESTAMP
from flywheel.rollout.documents import Approval, Decision, Seal, SignedWord
from flywheel.schema import Group, RolloutStage, bundle_digest

Attack = Callable[[Site], str]
ATTACKS: dict[str, Attack] = {}


def _attack(f: Attack) -> Attack:
    ATTACKS[f.__name__.replace("_", " ")] = f
    return f


# ── what is altered on the way ──────────────────────────────────────────────────────────────────────


@_attack
def flipped_byte_in_the_policy(site: Site) -> str:
    return _flipped(site, "policy.onnx")


@_attack
def flipped_byte_in_the_tokenizer(site: Site) -> str:
    return _flipped(site, "tokenizer.json")


@_attack
def flipped_byte_in_the_policy_description(site: Site) -> str:
    return _flipped(site, "policy.json")


def _flipped(site: Site, name: str) -> str:
    site.publisher.publish(site.new, stable(site.new))
    key = site.blob(name=name)
    good = site.server.data(key)
    site.server.overwrite(key, good[:100] + bytes([good[100] ^ 1]) + good[101:])
    outcome = refused(site, "LengthOrHashMismatch")
    site.server.overwrite(key, good)
    taken(site, site.new)
    return f"{outcome}; a good copy was taken later"


@_attack
def longer_file(site: Site) -> str:
    site.publisher.publish(site.new, stable(site.new))
    key = site.blob()
    site.server.overwrite(key, site.server.data(key) + b"\0" * 10_000_000)
    return refused(site, "LengthMismatch")


@_attack
def truncated_file(site: Site) -> str:
    site.publisher.publish(site.new, stable(site.new))
    key = site.blob()
    site.server.overwrite(key, site.server.data(key)[:-1])
    return refused(site, "LengthOrHashMismatch")


@_attack
def missing_file(site: Site) -> str:
    site.publisher.publish(site.new, stable(site.new))
    del site.server.objects[site.blob()]
    with robot(site.root, site.store, site.publisher) as r:
        expect(r.poll(warm_up).action is Action.OFFLINE, "did not say that it is not there")
        _still(site, site.base)
    return "nothing changed, tried again later"


def _still(site: Site, bundle: Path) -> None:
    """The robot's disk still holds what it ran."""
    found = [d for d in (site.root / "r1" / "slots").iterdir() if d.is_dir()]
    expect(any(bundle_digest(d) == bundle_digest(bundle) for d in found), "the policy in use is gone")


@_attack
def old_timestamp_rolls_the_fleet_back(site: Site) -> str:
    old = site.server.data(TIMESTAMP)
    site.publisher.publish(site.new, stable(site.new))
    taken(site, site.new)
    site.server.overwrite(TIMESTAMP, old)
    return _refused_on_new(site, "BadVersionNumber")


@_attack
def old_stable_metadata_mixed_into_a_new_snapshot(site: Site) -> str:
    """By somebody who holds the online keys."""
    site.publisher.publish(site.new, stable(site.new))
    taken(site, site.new)

    def older(targets: Targets) -> None:
        targets.version -= 2

    forge(site, "stable", older, ["stable-1", "stable-2"])
    return _refused_on_new(site, "BadVersionNumber")


def _refused_on_new(site: Site, why: str) -> str:
    with robot(site.root, site.store, site.publisher) as r:
        poll = r.poll(warm_up)
        expect(poll.action is Action.REFUSED and why in poll.reason, poll)
        active = r.active()
        expect(active is not None and active.digest == bundle_digest(site.new), active)
    return f"refused: {why}"


@_attack
def edited_metadata(site: Site) -> str:
    site.publisher.publish(site.new, stable(site.new))
    keys = [k for k in site.server.objects if k.endswith(".stable.json")]
    key = max(keys, key=lambda k: int(k.rsplit("/", 1)[1].split(".")[0]))
    site.server.overwrite(key, site.server.data(key).replace(b'"acting":true', b'"acting":null'))
    return refused(site, "does not verify")


@_attack
def frozen_repository_is_seen_when_its_metadata_expire(site: Site) -> str:
    """An attacker holds back what is new. The robot runs on, says so, and catches up once it is renewed."""
    now = [datetime.now(UTC) - timedelta(days=30)]
    root = Path(tempfile.mkdtemp(prefix="frozen-", dir=site.root))
    store = BucketStore()
    publisher = Publisher(store, root / "keys", clock=lambda: now[0])
    publisher.init()
    base, new = make_bundle(root, "base"), make_bundle(root, "new")
    publisher.publish_first(base)
    frozen = Site(root, store, publisher, base, new)
    now[0] += timedelta(days=30)
    publisher.refresh()
    taken(frozen, base)
    now[0] -= timedelta(days=29)
    publisher.publish(new, stable(new))  # signed a month ago; nobody has renewed it since
    outcome = refused(frozen, "Expired")
    now[0] += timedelta(days=29)
    publisher.refresh()
    taken(frozen, new)
    return f"{outcome}; runs the verified policy, and takes the new one when renewed"


# ── who signs ───────────────────────────────────────────────────────────────────────────────────────


@_attack
def threshold_not_met(site: Site) -> str:
    upload_blobs(site, site.new, "stable")
    forge(site, "stable", offer(site.new, stable(site.new)), ["stable-1"])
    return refused(site, "was signed by 1/2 keys")


@_attack
def same_key_signs_twice(site: Site) -> str:
    upload_blobs(site, site.new, "stable")
    forge(site, "stable", offer(site.new, stable(site.new)), ["stable-1", "stable-1"])
    return refused(site, "was signed by 1/2 keys")


@_attack
def forgery_with_enough_stolen_keys_works_so_these_attacks_are_real(site: Site) -> str:
    upload_blobs(site, site.new, "stable")
    forge(site, "stable", offer(site.new, stable(site.new)), ["stable-1", "stable-3"])
    taken(site, site.new)
    return "taken, as two stable keys and the online keys may"


@_attack
def keys_of_other_roles_sign_the_stable_release(site: Site) -> str:
    upload_blobs(site, site.new, "stable")
    wrong = ["canary-1", "snapshot-1", "timestamp-1", "operator-1", "approval-ada", "targets-1", "root-1"]
    forge(site, "stable", offer(site.new, stable(site.new)), wrong)
    return refused(site, "was signed by 0/2 keys")


@_attack
def canary_metadata_name_stable_files(site: Site) -> str:
    upload_blobs(site, site.new, "stable")
    forge(site, "canary", offer(site.new, stable(site.new)), ["canary-1"])
    return _unseen(site)


@_attack
def canary_key_offers_a_wave(site: Site) -> str:
    upload_blobs(site, site.new, "wave")
    wave = stable(site.new).model_copy(update={"group": Group.WAVE, "rollout_id": "a" * 12 + "-" + "b" * 12})
    forge(site, "canary", offer(site.new, wave), ["canary-1"])
    return _unseen(site)


def _unseen(site: Site) -> str:
    with robot(site.root, site.store, site.publisher) as r:
        poll = r.poll(warm_up)
        active = r.active()
        expect(poll.action is Action.NONE, poll)
        expect(active is not None and active.digest == bundle_digest(site.base), active)
    return "not looked at: the role may not speak of these files"


@_attack
def unsigned_timestamp(site: Site) -> str:
    upload_blobs(site, site.new, "stable")
    forge(site, "stable", offer(site.new, stable(site.new)), ["stable-1", "stable-2"], online=False)
    return refused(site, "does not verify")


@_attack
def release_signed_for_another_group(site: Site) -> str:
    upload_blobs(site, site.new, "stable")
    canary = stable(site.new).model_copy(update={"group": Group.CANARY})
    forge(site, "stable", offer(site.new, canary, "stable"), ["stable-1", "stable-2"])
    return refused(site, "signed as canary")


@_attack
def signed_digest_is_not_that_of_the_files(site: Site) -> str:
    upload_blobs(site, site.new, "stable")
    wrong = stable(site.new).model_copy(update={"digest": "0" * 64})
    forge(site, "stable", offer(site.new, wrong), ["stable-1", "stable-2"])
    return refused(site, "its files are")


@_attack
def files_of_two_releases(site: Site) -> str:
    upload_blobs(site, site.new, "stable")

    def mix(targets: Targets) -> None:
        kept = targets.targets["stable/policy.json"]
        offer(site.new, stable(site.new))(targets)
        targets.targets["stable/policy.json"] = kept

    forge(site, "stable", mix, ["stable-1", "stable-2"])
    return refused(site, "not one release")


@_attack
def repository_of_another_root(site: Site) -> str:
    stranger = Publisher(BucketStore(), site.root / "other-keys")
    stranger.init()
    with robot(site.root, site.store, stranger, "r2") as r:
        poll = r.poll(warm_up)
        expect(poll.action is Action.REFUSED and r.active() is None, poll)
    return "refused: signed by no key of the robot's root"


@_attack
def pin_to_a_bundle_that_was_never_stable(site: Site) -> str:
    from flywheel.schema import FleetPlan, Pin

    canary = stable(site.new).model_copy(update={"group": Group.CANARY})
    site.publisher.publish(site.new, canary)
    pin = Pin(robot="r1", digest=bundle_digest(site.new), by="mallory", reason="let me")
    try:
        site.publisher.set_plan(FleetPlan(pins=(pin,)))
    except ReleaseError as e:
        return f"refused: {str(e).split(';')[0]}"
    raise Breach("a candidate was pinned without approval")


# ── keys that were revoked ──────────────────────────────────────────────────────────────────────────


def _stolen(site: Site, *stems: str) -> dict[str, CryptoSigner]:
    held = site.publisher.keys.load()
    return {s: held[s] for s in stems}


@_attack
def revoked_stable_keys_sign_a_release(site: Site) -> str:
    stolen = _stolen(site, "stable-1", "stable-2")
    for stem in stolen:
        ceremony.revoke(site.publisher, stem)
    upload_blobs(site, site.new, "stable")
    forge(site, "stable", offer(site.new, stable(site.new)), list(stolen), extra=stolen)
    outcome = refused(site, "was signed by 0/2 keys")
    return f"{outcome} after revocation"


@_attack
def revoked_timestamp_key_signs_a_timestamp(site: Site) -> str:
    stolen = _stolen(site, "timestamp-1", "snapshot-1")
    ceremony.revoke(site.publisher, "timestamp-1")
    ceremony.revoke(site.publisher, "snapshot-1")
    site.publisher.publish(site.new, stable(site.new))
    taken(site, site.new)
    forge(site, "stable", lambda t: t.targets.clear(), ["stable-1", "stable-2"], extra=stolen)
    return _refused_on_new(site, "does not verify") + ", after revocation"


@_attack
def root_keys_below_the_threshold_make_a_new_root(site: Site) -> str:
    for stem in ("root-2", "root-3"):
        (site.publisher.keys.directory / f"{stem}.pem").unlink()
    try:
        ceremony.rotate(site.publisher, "timestamp")
    except ReleaseError as e:
        expect("takes 2 signatures of role root" in str(e), e)
        expect(not site.store.exists("releases/metadata/2.root.json"), "a root was written")
        return "refused: 1 of 2 root keys"
    raise Breach("one root key changed the fleet's trust")


# ── approvals ───────────────────────────────────────────────────────────────────────────────────────


def _waiting(site: Site) -> RolloutSite:
    """A rollout that waits for approval, beside the site."""
    fresh = RolloutSite(Path(tempfile.mkdtemp(prefix="rollout-", dir=site.root)))
    fresh.to_approval()
    return fresh


def _word(r: RolloutSite, **fields: object) -> Approval:
    state = rollout.status(r.store, r.id).state
    word = {
        "rollout_id": r.id,
        "bundle_digest": state.bundle_digest,
        "gate_digest": state.gate_digest,
        "state_n": state.n,
        "decision": Decision.PROMOTE,
        "by": "op",
        "t_unix_ns": r.clock(),
    }
    return Approval.model_validate(word | fields)


def _put(r: RolloutSite, word: Approval, signer: CryptoSigner, key: str = "") -> None:
    signature = signer.sign(word.to_bytes())
    signed = SignedWord(word=word, seal=Seal(keyid=signature.keyid, sig=signature.signature))
    r.store.put(key or signed.key, signed.to_bytes())


def _not_released(r: RolloutSite, how: str) -> str:
    seen = r.look()
    expect(seen.state.stage is RolloutStage.APPROVAL, seen.line())
    offered = r.publisher.current(Group.STABLE)
    expect(offered is not None and offered.digest == bundle_digest(r.base), offered)
    return f"counts for nothing: {how}"


@_attack
def approval_replayed_from_another_rollout(site: Site) -> str:
    r = _waiting(site)
    word = _word(r, rollout_id="a" * 12 + "-" + "b" * 12, bundle_digest="a" * 64, gate_digest="b" * 64)
    _put(r, word, r.publisher.keys.load()["approval-op"], f"rollouts/{r.id}/approvals/{word.digest}.json")
    return _not_released(r, "it is about another bundle and gate report")


@_attack
def approval_replayed_from_an_earlier_stage(site: Site) -> str:
    r = _waiting(site)
    _put(r, _word(r, state_n=1), r.publisher.keys.load()["approval-op"])
    return _not_released(r, "given before there was anything to approve")


@_attack
def approval_changed_after_it_was_signed(site: Site) -> str:
    r = _waiting(site)
    hold = _word(r, decision=Decision.HOLD)
    signature = r.publisher.keys.load()["approval-op"].sign(hold.to_bytes())
    seal = Seal(keyid=signature.keyid, sig=signature.signature)
    forged = SignedWord(word=hold.model_copy(update={"decision": Decision.PROMOTE}), seal=seal)
    r.store.put(forged.key, forged.to_bytes())
    return _not_released(r, "the signature is of another text")


@_attack
def approval_by_a_stranger(site: Site) -> str:
    r = _waiting(site)
    _put(r, _word(r), CryptoSigner.generate_ed25519())
    return _not_released(r, "no key that is trusted signed it")


@_attack
def approval_signed_by_the_operators_key(site: Site) -> str:
    r = _waiting(site)
    _put(r, _word(r), r.publisher.keys.load()["operator-1"])
    return _not_released(r, "the machine that runs the wheel cannot approve")


@_attack
def approval_in_another_approvers_name(site: Site) -> str:
    r = _waiting(site)
    ceremony.enrol(r.publisher, "grace")
    ceremony.require(r.publisher, "approval", 2)
    grace = r.publisher.keys.load()["approval-grace"]
    _put(r, _word(r, by="grace"), grace)
    _put(r, _word(r, by="op"), grace)
    return _not_released(r, "one person is not two")


@_attack
def approval_by_a_revoked_approver(site: Site) -> str:
    r = _waiting(site)
    rollout.approve(r.store, r.publisher, r.id, Decision.PROMOTE, "op", clock_ns=r.clock)
    ceremony.revoke(r.publisher, "op")
    return _not_released(r, "the key was revoked before it took effect")


@_attack
def unsigned_approval(site: Site) -> str:
    r = _waiting(site)
    word = _word(r)
    r.store.put(f"rollouts/{r.id}/approvals/{word.digest}.json", word.to_bytes())
    return _not_released(r, "it has no signature")


@_attack
def forged_decision_in_the_log_of_a_rollout(site: Site) -> str:
    """Somebody who may write to the store writes that it was approved."""
    r = _waiting(site)
    state = rollout.status(r.store, r.id).state
    said = {
        "n": state.n + 1,
        "stage": RolloutStage.WIDE,
        "approved_by": ("op",),
        "wave": 1,
        "since_n": state.n + 1,
    }
    r.store.append_version(state.prefix, state.n + 1, state.model_copy(update=said).to_bytes())
    try:
        r.look()
    except StageError as e:
        expect("not signed by the operator's key" in str(e), e)
    else:
        raise Breach("a look went on from a forged decision")
    offered = r.publisher.current(Group.STABLE)
    expect(offered is not None and offered.digest == bundle_digest(r.base), offered)
    return "refused: the decision is not signed"


@_attack
def stolen_operators_key_declares_an_approval(site: Site) -> str:
    """The machine that runs the wheel, in other hands: signs that it is wide without any approver."""
    from flywheel.rollout.words import seal

    r = _waiting(site)
    state = rollout.status(r.store, r.id).state
    said = {
        "n": state.n + 1,
        "stage": RolloutStage.WIDE,
        "approved_by": ("op",),
        "wave": 1,
        "since_n": state.n + 1,
    }
    forged = seal(state.model_copy(update=said), r.publisher.keys, r.publisher.load().trust())
    r.store.append_version(state.prefix, forged.n, forged.to_bytes())
    try:
        r.look()
    except FlywheelError as e:
        expect("0 of 1 approvals verify" in str(e), e)
    else:
        raise Breach("a release was signed for everyone without an approval")
    offered = r.publisher.current(Group.STABLE)
    expect(offered is not None and offered.digest == bundle_digest(r.base), offered)
    return "refused: 0 of 1 approvals verify"


@_attack
def altered_history_of_a_rollout(site: Site) -> str:
    r = _waiting(site)
    key = f"rollouts/{r.id}/00000001.json"
    changed = r.store.server.data(key).replace(b'"reason": "', b'"reason": "not ')
    r.store.server.overwrite(key, changed)
    try:
        rollout.history(r.store, r.id)
    except StageError as e:
        return f"seen: {e}"
    raise Breach("the log was changed and nobody saw it")
