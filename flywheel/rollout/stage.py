"""The stage: the store and the publisher around the rules.

The log is written first, the signatures follow it: ``look`` appends the decision by a create-only write, of
which racing looks have one winner, and then brings the signed releases in line with the newest state. If it
dies in between, the next look does. Releases are only replaced while the state they follow is still the
newest, so a slow look cannot undo a later decision.

Every decision names the one before it by hash and is signed by the operator's key, and nothing is decided or
released on top of one that is not: whoever may write to the store cannot write a rollout's history. Before
anything is signed for robots outside of the cohort, the approvers' signatures are checked once more.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flywheel.config import RolloutSettings
from flywheel.errors import BundleError, Conflict, NotFound, StageError, StoreError
from flywheel.release import Publisher, Trust
from flywheel.rollout import twin
from flywheel.rollout.documents import (
    Approval,
    Decision,
    Evidence,
    Inputs,
    RolloutState,
    SignedWord,
    rollout_id,
)
from flywheel.rollout.evidence import (
    Evidences,
    cohort_limit,
    fresh_robots,
    read_gate,
    read_inputs,
    site_limits,
    sum_up,
)
from flywheel.rollout.rules import assess, decide
from flywheel.rollout.words import read_words, seal, sealed, sign
from flywheel.schema import (
    BUNDLE_FILES,
    Check,
    Group,
    Release,
    RolloutStage,
    Verdict,
    bundle_digest,
    sha256_bytes,
)
from flywheel.store import Store

ATTEMPTS = 20  # each lost attempt is another process's progress
Clock = Callable[[], int]  # UTC ns


@dataclass(frozen=True)
class Look:
    """One look at a rollout: what holds now, what was seen, and whether that changed anything."""

    state: RolloutState
    changed: bool
    evidence: Evidence
    checks: tuple[Check, ...]  # of the state's stage, by this evidence
    decide_s: float = 0.0  # what it took to decide and to write the decision

    def line(self) -> str:
        """One line for a terminal."""
        passed = sum(c.verdict is Verdict.PROMOTE for c in self.checks)
        checks = f" ({passed} of {len(self.checks)} checks pass)" if self.checks else ""
        return f"{self.state.rollout_id}  {self.state.stage}{checks}: {self.state.reason}"


@dataclass(frozen=True)
class RolloutStatus:
    """Where a rollout stands and how it came there."""

    state: RolloutState
    history: tuple[RolloutState, ...]
    approvals: tuple[Approval, ...]  # as they lie there; a look counts those that verify

    def rows(self) -> list[tuple[int, str, int, str]]:
        """Version, stage, UTC ns and reason of every decision, for a table."""
        return [(s.n, s.stage.value, s.t_unix_ns, s.reason) for s in self.history]


def start(
    store: Store,
    publisher: Publisher,
    candidate: str,
    gate_digest: str,
    settings: RolloutSettings,
    *,
    git_rev: str = "",
    experiment: str = "",
    minimum_runtime: str = "0.1.0",
    supersede: bool = False,
    clock_ns: Clock = time.time_ns,
) -> RolloutState:
    """Begin a rollout of ``bundles/<candidate>/`` in shadow; a repeat returns the rollout that is there.

    The gate report ``gates/<gate_digest>.json`` must promote exactly this candidate over exactly the policy
    that is stable now. Raises ``StageError`` where it does not, where no robot has reported or where another
    rollout is under way, ``BundleError`` where the bundle is not what its name says.
    """
    rid = rollout_id(candidate, gate_digest)
    existing = _latest(store, rid, publisher.load().trust())
    if existing is not None:
        follow(store, publisher, rid)
        return existing
    stable = publisher.current(Group.STABLE)
    if stable is None:
        raise StageError("no stable release: publish the fleet's first policy before a rollout")
    gate = read_gate(store, gate_digest)
    if gate is None:
        raise StageError(f"gates/{gate_digest}.json: no such gate report, or not the one of that digest")
    if (objection := gate.objection(candidate, stable.digest)) is not None:
        raise StageError(f"bundle {candidate[:12]} cannot be rolled out: {objection}")
    other = active_rollout(store, publisher)
    if other is not None and (not supersede or other.stage is RolloutStage.WIDE):
        ending = "roll it back or wait until it is done" if supersede else "finish it, or end it with"
        how = "" if supersede else f" `flywheel rollout decide {other.rollout_id} hold`"
        raise StageError(f"rollout {other.rollout_id} is under way ({other.stage}): {ending}{how}")
    now = clock_ns()
    fresh = fresh_robots(store, settings.silence_s, now)
    plan = publisher.plan()
    following = [r for r in fresh if not plan.excepts(r.robot, r.site, now)]
    below = cohort_limit(rid, [r.robot for r in following], settings.canary_fraction)
    trust = publisher.load().trust()
    _bring(store, publisher, candidate)
    used = twin.used_by(gate)
    trusted = twin.trust(twin.past(store), settings, twin.replayed(store, used), used)
    if other is not None:
        _supersede(store, publisher, other, rid, now)
    first = RolloutState(
        rollout_id=rid,
        n=1,
        t_unix_ns=now,
        stage=RolloutStage.SHADOW,
        reason=f"the gate promotes it over {stable.digest[:12]}: it is compared, and does not act"
        + (f"; {trusted.sentence()}" if trusted.poor else ""),
        since_n=1,
        since_unix_ns=now,
        bundle_digest=candidate,
        gate_digest=gate_digest,
        cohort_below=below,
        site_below=site_limits(rid, following, settings.site_cap),
        previous=stable,
        settings=twin.demand(settings, trusted),
        twin_trust=trusted,
        git_rev=git_rev,
        experiment=experiment,
        minimum_runtime=minimum_runtime,
    )
    first = seal(first, publisher.keys, trust)
    publisher.reissue(_canary_release(first))
    try:
        store.append_version(first.prefix, 1, first.to_bytes())
    except Conflict:  # another process started it
        return _require(store, rid, trust)
    follow(store, publisher, rid)
    return first


def look(
    store: Store,
    publisher: Publisher,
    rid: str,
    *,
    clock_ns: Clock = time.time_ns,
    kept: Evidences | None = None,
) -> Look:
    """Look at the fleet once: read the evidence, decide, write the decision, publish what follows from it.

    ``kept`` remembers documents from one look of a process to its next.
    """
    for _ in range(ATTEMPTS):
        offered = publisher.refresh()
        trusted = publisher.load()
        trust = trusted.trust()
        state = _require(store, rid, trust)
        inputs = read_inputs(store, state, trusted.plan(), kept)
        now = clock_ns()
        stable, canary = offered[Group.STABLE], offered[Group.CANARY]
        other = canary.rollout_id if canary is not None and canary.rollout_id != rid else ""
        gate = read_gate(store, state.gate_digest)
        evidence = sum_up(state, inputs, gate, stable.digest if stable is not None else "", other, now)
        words, _ = read_words(store, state, trust)
        began = time.perf_counter()
        after = decide(state, evidence, _enough(words, trust), now)
        if after is not state:
            try:
                after = _append(store, publisher, state, after, trust, inputs)
            except Conflict:
                continue
        decide_s = time.perf_counter() - began
        follow(store, publisher, rid, offered)
        twin.remember(store, after, gate)
        checks = () if after.over else assess(after, evidence)[1]
        return Look(after, after is not state, evidence, checks, decide_s)
    raise StageError(f"rollout {rid}: other looks won {ATTEMPTS} times in a row; try again")


def reseal(store: Store, publisher: Publisher, rid: str, *, clock_ns: Clock = time.time_ns) -> RolloutState:
    """Go on with a rollout after a change of the operator's key: its newest decision, signed by today's.

    Only on the machine that put the old key away, and so knows that it was the right one.
    """
    trust = publisher.load().trust()
    state = _require(store, rid)
    if sealed(state, trust):
        return state
    old = {k: s.public_key for k, s in publisher.keys.retired().items()}
    if not sealed(state, Trust(old, {}, (), 1, frozenset(old))):
        raise StageError(f"rollout {rid}: version {state.n} was signed by no key that this machine had")
    after = state.model_copy(
        update={"n": state.n + 1, "t_unix_ns": clock_ns(), "reason": "the operator's key was changed"}
    )
    return _append(store, publisher, state, after, trust)


def _append(
    store: Store,
    publisher: Publisher,
    state: RolloutState,
    after: RolloutState,
    trust: Trust,
    inputs: Inputs | None = None,
) -> RolloutState:
    """Write a decision: what it was made of first, then the decision, which names the one before it."""
    if inputs is not None and after.evidence is not None:
        sha = after.evidence.inputs_sha256
        store.put(f"{state.prefix}/inputs/{sha}.json", inputs.to_bytes(), sha)
    prior = sha256_bytes(state.to_bytes())
    after = seal(after.model_copy(update={"prior_sha256": prior}), publisher.keys, trust)
    store.append_version(state.prefix, after.n, after.to_bytes())
    return after


def _supersede(store: Store, publisher: Publisher, other: RolloutState, rid: str, now_unix_ns: int) -> None:
    """End a rollout for another one."""
    for _ in range(ATTEMPTS):
        trust = publisher.load().trust()
        state = _require(store, other.rollout_id, trust)
        if state.over:
            break
        if state.stage is RolloutStage.WIDE:
            raise StageError(f"rollout {state.rollout_id} went wide meanwhile; roll it back or wait for it")
        evidence = Evidence(gate_digest=state.gate_digest, superseded_by=rid)
        try:
            _append(store, publisher, state, decide(state, evidence, [], now_unix_ns), trust)
        except Conflict:
            continue
        break
    follow(store, publisher, other.rollout_id)


def approve(
    store: Store,
    publisher: Publisher,
    rid: str,
    decision: Decision | Verdict,
    by: str,
    reason: str = "",
    *,
    bundle_digest: str | None = None,
    gate_digest: str | None = None,
    clock_ns: Clock = time.time_ns,
) -> Approval:
    """Write down a person's decision; the next look acts on it. ``ROLL_BACK`` is possible at any time.

    The digests are those that the person was shown: where they are not the rollout's, the decision is void.
    It is signed here, by the key of ``by``, or by the operator's for what only narrows. Raises
    ``StageError`` for a decision that cannot take effect, ``ConfigError`` where no fitting key lies here.
    """
    decision = Decision(decision.value)
    trust = publisher.load().trust()
    state = _require(store, rid, trust)
    for what, shown, actual in (
        ("bundle", bundle_digest, state.bundle_digest),
        ("gate report", gate_digest, state.gate_digest),
    ):
        if shown is not None and shown != actual:
            raise StageError(f"rollout {rid}: void: the {what} is {actual}, not {shown}")
    if decision is Decision.PROMOTE and state.stage is not RolloutStage.APPROVAL:
        raise StageError(
            f"rollout {rid}: is in stage {state.stage}, so there is nothing to approve yet or any more"
        )
    if decision is Decision.HOLD and (state.over or state.stage is RolloutStage.WIDE):
        raise StageError(f"rollout {rid}: is in stage {state.stage} and cannot be held; roll it back instead")
    if state.stage is RolloutStage.ROLLED_BACK:
        raise StageError(f"rollout {rid}: is rolled back; start a new one")
    if decision in (Decision.SKIP, Decision.PAUSE, Decision.RESUME):
        if state.over or (decision is Decision.SKIP and state.stage is RolloutStage.APPROVAL):
            raise StageError(
                f"rollout {rid}: is in stage {state.stage}: there is nothing to {decision}, and an approval "
                "cannot be skipped"
            )
        if not reason:
            raise StageError(f"rollout {rid}: say why it is to {decision}: it is kept with the decision")
    try:
        approval = Approval(
            rollout_id=rid,
            bundle_digest=state.bundle_digest,
            gate_digest=state.gate_digest,
            state_n=state.n,
            decision=decision,
            by=by,
            reason=reason,
            t_unix_ns=clock_ns(),
        )
    except ValidationError as e:
        raise StageError(f"approval: {e.errors()[0]['loc'][0]}: {e.errors()[0]['msg']}") from None
    signed = sign(approval, publisher.keys, trust)
    store.put(signed.key, signed.to_bytes())
    return approval


def _enough(words: list[Approval], trust: Trust) -> list[Approval]:
    """The words without their promotions, where fewer people promote than the signed metadata ask for."""
    promoting = {w.by for w in words if w.decision is Decision.PROMOTE}
    if len(promoting) >= trust.approvals:
        return words
    return [w for w in words if w.decision is not Decision.PROMOTE]


def status(store: Store, rid: str) -> RolloutStatus:
    """Where a rollout stands, every decision so far, every approval."""
    states = history(store, rid)
    words = []
    for info in store.list(f"{states[-1].prefix}/approvals/"):
        with suppress(ValidationError, StoreError):
            words.append(SignedWord.model_validate_json(store.get(info.key)).word)
    return RolloutStatus(states[-1], tuple(states), tuple(words))


def history(store: Store, rid: str) -> list[RolloutState]:
    """Every decision, first to last. Raises ``StageError`` for a log with a gap, or one in which a decision
    does not follow from the one before it."""
    last = _require(store, rid)
    states: list[RolloutState] = []
    for n in range(1, last.n + 1):
        try:
            state = _parse(store.get(f"{last.prefix}/{n:08d}.json"), rid, n)
        except NotFound as e:
            raise StageError(f"rollout {rid}: its log has a gap: {e}") from None
        if states and state.prior_sha256 != sha256_bytes(states[-1].to_bytes()):
            raise StageError(f"rollout {rid}: version {n} does not follow from {n - 1}: one was changed")
        states.append(state)
    return states


def active_rollout(store: Store, publisher: Publisher) -> RolloutState | None:
    """The rollout under way; None if there is none. Found by what the signed releases name."""
    offered = publisher.refresh()
    trust = publisher.load().trust()
    for release in offered.values():
        if release is None or not release.rollout_id:
            continue
        state = _latest(store, release.rollout_id, trust)
        if state is not None and not state.over:
            return state
    return None


def follow(
    store: Store,
    publisher: Publisher,
    rid: str,
    offered: Mapping[Group, Release | None] | None = None,
) -> None:
    """Bring the signed releases in line with the newest state of a rollout; changes nothing if they are.

    ``offered`` spares a read where the caller has just made it.
    """
    for _ in range(ATTEMPTS):
        trust = publisher.load().trust()
        state = _require(store, rid, trust)

        def still(n: int = state.n) -> None:
            head = store.latest(f"rollouts/{rid}")
            if head is None or head[0] != n:
                raise Conflict(f"rollout {rid}: went on past version {n}")

        try:
            _follow(store, publisher, state, trust, offered or publisher.refresh(), still)
        except Conflict:
            offered = None
            continue
        return
    raise StageError(f"rollout {rid}: changed {ATTEMPTS} times while its releases were signed; try again")


def _follow(
    store: Store,
    publisher: Publisher,
    state: RolloutState,
    trust: Trust,
    offered: Mapping[Group, Release | None],
    still: Callable[[], None],
) -> None:
    canary, wave, stable = offered[Group.CANARY], offered[Group.WAVE], offered[Group.STABLE]
    stage, rid = state.stage, state.rollout_id
    if stage in (RolloutStage.SHADOW, RolloutStage.CANARY, RolloutStage.APPROVAL):
        wanted = _canary_release(state)
        if canary != wanted and (canary is None or canary.rollout_id == rid):
            publisher.reissue(wanted, still)
        return
    if stage is RolloutStage.WIDE and not state.last_wave:
        wanted = _wide_release(state, Group.WAVE)
        if wave != wanted:
            require_approval(store, state, trust)
            publisher.reissue(wanted, still)
        return
    if stage in (RolloutStage.WIDE, RolloutStage.DONE):
        wanted = _wide_release(state, Group.STABLE)
        # Once it is over, a later rollout may have replaced it: that is not to be undone.
        if stable != wanted and (stage is RolloutStage.WIDE or stable == state.previous):
            require_approval(store, state, trust)
            publisher.reissue(wanted, still)
    if stage is RolloutStage.ROLLED_BACK:
        revoked = (*state.previous.revokes, state.bundle_digest)
        wide = any(r is not None and r.rollout_id == rid for r in (stable, wave))
        if wide and stable is not None and (stable.rollout_id == rid or stable == state.previous):
            publisher.reissue(state.previous.model_copy(update={"revokes": revoked}), still)
    if wave is not None and wave.rollout_id == rid:
        publisher.withdraw(Group.WAVE, still)
    if stage is not RolloutStage.WIDE and canary is not None and canary.rollout_id == rid:
        publisher.withdraw(Group.CANARY, still)


def require_approval(store: Store, state: RolloutState, trust: Trust) -> list[Approval]:
    """The signed words that let a candidate leave its cohort. Raises ``StageError`` if they do not verify."""
    words, ignored = read_words(store, state, trust)
    about = (state.rollout_id, state.bundle_digest, state.gate_digest)
    yes = {
        w.by: w
        for w in words
        if w.decision is Decision.PROMOTE
        and w.by in state.approved_by
        and (w.rollout_id, w.bundle_digest, w.gate_digest) == about
    }
    need = max(trust.approvals, state.settings.approvals)
    if len(yes) < need or state.approval_digest not in {w.digest for w in yes.values()}:
        raise StageError(
            f"rollout {state.rollout_id}: nothing was signed: {len(yes)} of {need} approvals verify"
            + "".join(f"; {line}" for line in ignored)
        )
    return list(yes.values())


def _canary_release(state: RolloutState) -> Release:
    return Release(
        group=Group.CANARY,
        digest=state.bundle_digest,
        gate_digest=state.gate_digest,
        rollout_id=state.rollout_id,
        cohort_below=state.cohort_below,
        site_below=dict(state.site_below),
        acting=state.stage is not RolloutStage.SHADOW,
        minimum_runtime=state.minimum_runtime,
        git_rev=state.git_rev,
        experiment=state.experiment,
    )


def _wide_release(state: RolloutState, group: Group) -> Release:
    bounds: dict[str, Any] = {}
    if group is Group.WAVE:
        bounds = {"cohort_below": state.below, "site_below": state.site_below}
    return Release(
        group=group,
        digest=state.bundle_digest,
        gate_digest=state.gate_digest,
        rollout_id=state.rollout_id,
        approval_digest=state.approval_digest,
        minimum_runtime=state.minimum_runtime,
        git_rev=state.git_rev,
        experiment=state.experiment,
        **bounds,
    )


def _bring(store: Store, publisher: Publisher, digest: str) -> None:
    """Bring a candidate's bytes from where exports lie to where releases do."""
    with tempfile.TemporaryDirectory(prefix="flywheel-bundle-") as d:
        for name in BUNDLE_FILES:
            try:
                store.get_file(f"bundles/{digest}/{name}", Path(d) / name)
            except NotFound:
                raise BundleError(
                    f"bundles/{digest}/{name}: not in the store; upload the exported bundle first"
                ) from None
        if (found := bundle_digest(Path(d))) != digest:
            raise BundleError(f"bundles/{digest}/: holds bytes of digest {found}") from None
        publisher.upload(Path(d), digest, Group.CANARY)


def _latest(store: Store, rid: str, trust: Trust | None = None) -> RolloutState | None:
    head = store.latest(f"rollouts/{rid}")
    if head is None:
        return None
    state = _parse(head[1], rid, head[0])
    if trust is not None and not sealed(state, trust):
        raise StageError(
            f"rollout {rid}: version {state.n} is not signed by the operator's key, so nothing is decided or "
            "released on top of it: somebody wrote it, or the key was changed (`flywheel rollout reseal`)"
        )
    return state


def _require(store: Store, rid: str, trust: Trust | None = None) -> RolloutState:
    if (state := _latest(store, rid, trust)) is None:
        raise StageError(f"rollout {rid}: there is none of that name")
    return state


def _parse(data: bytes, rid: str, n: int) -> RolloutState:
    try:
        state = RolloutState.model_validate_json(data)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise StoreError(f"rollouts/{rid}/{n:08d}.json: {field}: {first['msg']}") from None
    if (state.rollout_id, state.n) != (rid, n):
        raise StoreError(
            f"rollouts/{rid}/{n:08d}.json: says that it is version {state.n} of {state.rollout_id}"
        )
    return state
