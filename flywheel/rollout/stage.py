"""The stage: the store and the publisher around the rules.

The log is written first, the signatures follow it: ``look`` appends the decision by a create-only write, of
which racing looks have one winner, and then brings the signed releases in line with the newest state. If it
dies in between, the next look does. Releases are only replaced while the state they follow is still the
newest, so a slow look cannot undo a later decision.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from flywheel.config import RolloutSettings
from flywheel.errors import BundleError, Conflict, NotFound, ReleaseError, StageError, StoreError
from flywheel.release import Publisher
from flywheel.rollout.documents import Approval, Evidence, RolloutState, rollout_id
from flywheel.rollout.evidence import (
    cohort_limit,
    read_approvals,
    read_gate,
    read_inputs,
    read_robots,
    sum_up,
)
from flywheel.rollout.rules import assess, decide
from flywheel.schema import (
    BUNDLE_FILES,
    Check,
    Group,
    Release,
    RolloutStage,
    Verdict,
    bundle_digest,
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
    approvals: tuple[Approval, ...]

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
    clock_ns: Clock = time.time_ns,
) -> RolloutState:
    """Begin a rollout of ``bundles/<candidate>/`` in shadow; a repeat returns the rollout that is there.

    The gate report ``gates/<gate_digest>.json`` must promote exactly this candidate over exactly the policy
    that is stable now. Raises ``StageError`` where it does not, where no robot has reported or where another
    rollout is under way, ``BundleError`` where the bundle is not what its name says.
    """
    rid = rollout_id(candidate, gate_digest)
    existing = _latest(store, rid)
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
    if (other := active_rollout(store, publisher)) is not None:
        raise StageError(
            f"rollout {other.rollout_id} is under way ({other.stage}): finish it, or end it with "
            f"`flywheel rollout decide {other.rollout_id} hold`"
        )
    robots, _ = read_robots(store)
    now = clock_ns()
    fresh = [r.robot for r in robots if r.t_unix_ns >= now - settings.silence_s * 1e9]
    below = cohort_limit(rid, fresh, settings.canary_fraction)
    first = RolloutState(
        rollout_id=rid,
        n=1,
        t_unix_ns=now,
        stage=RolloutStage.SHADOW,
        reason=f"the gate promotes it over {stable.digest[:12]}: it is compared, and does not act",
        since_n=1,
        since_unix_ns=now,
        bundle_digest=candidate,
        gate_digest=gate_digest,
        cohort_below=below,
        previous=stable,
        settings=settings,
        git_rev=git_rev,
        experiment=experiment,
        minimum_runtime=minimum_runtime,
    )
    _publish_candidate(store, publisher, _canary_release(first), None)
    try:
        store.append_version(first.prefix, 1, first.to_bytes())
    except Conflict:  # another process started it
        return _require(store, rid)
    follow(store, publisher, rid)
    return first


def look(store: Store, publisher: Publisher, rid: str, *, clock_ns: Clock = time.time_ns) -> Look:
    """Look at the fleet once: read the evidence, decide, write the decision, publish what follows from it."""
    for _ in range(ATTEMPTS):
        state = _require(store, rid)
        inputs = read_inputs(store, state)
        now = clock_ns()
        offered = publisher.refresh()
        stable, canary = offered[Group.STABLE], offered[Group.CANARY]
        other = canary.rollout_id if canary is not None and canary.rollout_id != rid else ""
        evidence = sum_up(
            state,
            inputs,
            read_gate(store, state.gate_digest),
            stable.digest if stable is not None else "",
            other,
            now,
        )
        after = decide(state, evidence, read_approvals(store, state), now)
        if after is not state:
            key = f"{state.prefix}/inputs/{evidence.inputs_sha256}.json"
            store.put(key, inputs.to_bytes(), evidence.inputs_sha256)
            try:
                store.append_version(state.prefix, after.n, after.to_bytes())
            except Conflict:
                continue
        follow(store, publisher, rid, offered)
        checks = () if after.over else assess(after, evidence)[1]
        return Look(after, after is not state, evidence, checks)
    raise StageError(f"rollout {rid}: other looks won {ATTEMPTS} times in a row; try again")


def approve(
    store: Store,
    rid: str,
    decision: Verdict,
    by: str,
    reason: str = "",
    *,
    bundle_digest: str | None = None,
    gate_digest: str | None = None,
    clock_ns: Clock = time.time_ns,
) -> Approval:
    """Write down a person's decision; the next look acts on it. ``ROLL_BACK`` is possible at any time.

    The digests are those that the person was shown: where they are not the rollout's, the decision is void.
    Who may decide is the caller's to check. Raises ``StageError`` for a decision that cannot take effect.
    """
    state = _require(store, rid)
    for what, shown, actual in (
        ("bundle", bundle_digest, state.bundle_digest),
        ("gate report", gate_digest, state.gate_digest),
    ):
        if shown is not None and shown != actual:
            raise StageError(f"rollout {rid}: void: the {what} is {actual}, not {shown}")
    if decision is Verdict.PROMOTE and state.stage is not RolloutStage.APPROVAL:
        raise StageError(
            f"rollout {rid}: is in stage {state.stage}, so there is nothing to approve yet or any more"
        )
    if decision is Verdict.HOLD and (state.over or state.stage is RolloutStage.WIDE):
        raise StageError(f"rollout {rid}: is in stage {state.stage} and cannot be held; roll it back instead")
    if state.stage is RolloutStage.ROLLED_BACK:
        raise StageError(f"rollout {rid}: is rolled back; start a new one")
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
    store.put(f"{state.prefix}/approvals/{approval.digest}.json", approval.to_bytes())
    return approval


def status(store: Store, rid: str) -> RolloutStatus:
    """Where a rollout stands, every decision so far, every approval."""
    states = history(store, rid)
    return RolloutStatus(states[-1], tuple(states), tuple(read_approvals(store, states[-1])))


def history(store: Store, rid: str) -> list[RolloutState]:
    """Every decision, first to last. Raises ``StageError`` for a log with a gap."""
    last = _require(store, rid)
    try:
        return [_parse(store.get(f"{last.prefix}/{n:08d}.json"), rid, n) for n in range(1, last.n + 1)]
    except NotFound as e:
        raise StageError(f"rollout {rid}: its log has a gap: {e}") from None


def active_rollout(store: Store, publisher: Publisher) -> RolloutState | None:
    """The rollout under way; None if there is none. Found by what the signed releases name."""
    for release in publisher.refresh().values():
        state = _latest(store, release.rollout_id) if release is not None and release.rollout_id else None
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
        state = _require(store, rid)

        def still(n: int = state.n) -> None:
            head = store.latest(f"rollouts/{rid}")
            if head is None or head[0] != n:
                raise Conflict(f"rollout {rid}: went on past version {n}")

        try:
            _follow(store, publisher, state, offered or publisher.refresh(), still)
        except Conflict:
            offered = None
            continue
        return
    raise StageError(f"rollout {rid}: changed {ATTEMPTS} times while its releases were signed; try again")


def _follow(
    store: Store,
    publisher: Publisher,
    state: RolloutState,
    offered: Mapping[Group, Release | None],
    still: Callable[[], None],
) -> None:
    canary, stable = offered[Group.CANARY], offered[Group.STABLE]
    stage = state.stage
    if stage in (RolloutStage.SHADOW, RolloutStage.CANARY, RolloutStage.APPROVAL):
        wanted = _canary_release(state)
        if canary != wanted and (canary is None or canary.rollout_id == state.rollout_id):
            _publish_candidate(store, publisher, wanted, still)
        return
    if stage in (RolloutStage.WIDE, RolloutStage.DONE):
        wanted = _stable_release(state)
        # Once it is over, a later rollout may have replaced it: that is not to be undone.
        if stable != wanted and (stage is RolloutStage.WIDE or stable == state.previous):
            publisher.reissue(wanted, still)
        if stage is RolloutStage.WIDE:
            return
    if stage is RolloutStage.ROLLED_BACK and stable is not None and stable.rollout_id == state.rollout_id:
        revoked = (*state.previous.revokes, state.bundle_digest)
        publisher.reissue(state.previous.model_copy(update={"revokes": revoked}), still)
    if canary is not None and canary.rollout_id == state.rollout_id:
        publisher.withdraw(Group.CANARY, still)


def _canary_release(state: RolloutState) -> Release:
    return Release(
        group=Group.CANARY,
        digest=state.bundle_digest,
        gate_digest=state.gate_digest,
        rollout_id=state.rollout_id,
        cohort_below=state.cohort_below,
        acting=state.stage is not RolloutStage.SHADOW,
        minimum_runtime=state.minimum_runtime,
        git_rev=state.git_rev,
        experiment=state.experiment,
    )


def _stable_release(state: RolloutState) -> Release:
    return Release(
        group=Group.STABLE,
        digest=state.bundle_digest,
        gate_digest=state.gate_digest,
        rollout_id=state.rollout_id,
        approval_digest=state.approval_digest,
        minimum_runtime=state.minimum_runtime,
        git_rev=state.git_rev,
        experiment=state.experiment,
    )


def _publish_candidate(
    store: Store, publisher: Publisher, release: Release, still: Callable[[], None] | None
) -> None:
    try:
        publisher.reissue(release, still)
    except ReleaseError:  # never published: bring the bytes
        with tempfile.TemporaryDirectory(prefix="flywheel-bundle-") as d:
            for name in BUNDLE_FILES:
                try:
                    store.get_file(f"bundles/{release.digest}/{name}", Path(d) / name)
                except NotFound:
                    raise BundleError(
                        f"bundles/{release.digest}/{name}: not in the store; upload the exported bundle first"
                    ) from None
            if (found := bundle_digest(Path(d))) != release.digest:
                raise BundleError(f"bundles/{release.digest}/: holds bytes of digest {found}") from None
            publisher.publish(Path(d), release, still)


def _latest(store: Store, rid: str) -> RolloutState | None:
    head = store.latest(f"rollouts/{rid}")
    return None if head is None else _parse(head[1], rid, head[0])


def _require(store: Store, rid: str) -> RolloutState:
    if (state := _latest(store, rid)) is None:
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
