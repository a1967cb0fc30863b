"""The rules of a rollout: ``decide`` is pure, and the only place where a stage or a wave changes.

Success is compared with Newcombe's interval of a difference. Looking again and again would find a
difference sooner or later by chance, so comparison number k is made at the level ``alpha / (k (k + 1))``,
which sums to alpha over any number of them, and only once the episodes have grown by half: a union bound,
valid whenever one stops, and wider than it would have to be. The tails are compared at the plain level,
and must lie within the bar as a whole to pass: there a chance finding can only delay, or take back.

Nothing passes on silence: every check that lacks evidence says hold, and a stage passes only when all of
its checks say promote.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from flywheel import stats
from flywheel.rollout.documents import Approval, Arm, Decision, Evidence, Heard, RolloutState, Tail
from flywheel.schema import Check, RolloutStage, Verdict

GROWTH = 1.5  # of the episodes, from one comparison to the next
FEW_INVALID = 3  # fewer invalid chunks than this may be chance: they hold, and do not roll back

NEXT = {
    RolloutStage.SHADOW: RolloutStage.CANARY,
    RolloutStage.CANARY: RolloutStage.APPROVAL,
    RolloutStage.APPROVAL: RolloutStage.WIDE,
    RolloutStage.WIDE: RolloutStage.DONE,
}
# What no word of a person can stand in for: that robots report, that they run it, that it does not fail.
NEVER_SKIPPED = ("cohort heard", "fleet heard", "candidate loaded", "candidate given back", "invalid chunks")
PASSED = {
    RolloutStage.SHADOW: "the candidate's actions beside today's are sound: it may act on the cohort",
    RolloutStage.CANARY: "the cohort does well by it: waiting for approval",
    RolloutStage.APPROVAL: "approved by {by}: it goes to the whole fleet",
    RolloutStage.WIDE: "every robot that is heard of runs it, and does well",
}


def decide(
    state: RolloutState, evidence: Evidence, approvals: Sequence[Approval], now_unix_ns: int
) -> RolloutState:
    """The state that follows; ``state`` itself where nothing that matters changed.

    One evidence moves a rollout by one stage at most. Approvals that are not bound to exactly this
    candidate and gate report do not exist for it.
    """
    stage = state.stage
    if stage is RolloutStage.ROLLED_BACK:
        return state
    bound = [a for a in approvals if binds(a, state) and a.digest not in state.heeded]
    if backers := [a for a in bound if a.decision is Decision.ROLL_BACK]:
        return _move(state, RolloutStage.ROLLED_BACK, _word("rolled back by", backers), evidence, now_unix_ns)
    if state.over:
        return state
    if stage is not RolloutStage.WIDE:
        if holders := [a for a in bound if a.decision is Decision.HOLD]:
            return _move(state, RolloutStage.HELD, _word("held by", holders), evidence, now_unix_ns)
        if (reason := _void(state, evidence)) is not None:
            return _move(state, RolloutStage.HELD, reason, evidence, now_unix_ns)

    tests, checks = assess(state, evidence)
    after = state.model_copy(update=tests)
    verdict = combine(checks)
    if evidence != state.evidence and verdict is Verdict.ROLL_BACK:
        bad = [c for c in checks if c.verdict is Verdict.ROLL_BACK]
        reason = "; ".join(f"{c.name}: {c.bar}" for c in bad)
        return _move(after, RolloutStage.ROLLED_BACK, reason, evidence, now_unix_ns, checks)
    if orders := [a for a in bound if a.decision in (Decision.PAUSE, Decision.RESUME)]:
        return _pause(after, orders, evidence, now_unix_ns, checks)
    if not state.paused:
        if (
            moved := _forward(after, bound, evidence, now_unix_ns, checks, evidence != state.evidence)
        ) is not None:
            return moved
        if (reason := _late(state, checks, now_unix_ns)) is not None:
            return _move(after, RolloutStage.HELD, reason, evidence, now_unix_ns, checks)
    if evidence != state.evidence and (tests or _verdicts(checks) != _verdicts(state.checks)):
        return _record(after, waiting(checks), evidence, now_unix_ns, checks)
    return state


def _forward(
    state: RolloutState,
    bound: Sequence[Approval],
    evidence: Evidence,
    now_unix_ns: int,
    checks: tuple[Check, ...],
    fresh: bool,
) -> RolloutState | None:
    """The stage or wave that follows, where all that it takes is there."""
    stage, verdict = state.stage, combine(checks)
    if stage is RolloutStage.APPROVAL:
        yes = {a.by: a for a in bound if a.decision is Decision.PROMOTE}
        if verdict is not Verdict.PROMOTE or len(yes) < state.settings.approvals:
            return None
        by = tuple(sorted(yes))
        granted = {"approved_by": by, "approval_digest": yes[by[0]].digest, "wave": 1}
        after = state.model_copy(update={**granted, "wide_from": evidence.candidate.episodes})
        reason = PASSED[stage].format(by=", ".join(by))
        if len(state.settings.waves) > 1:
            reason += f", {after.settings.waves[0]:.0%} of it first"
        return _move(after, RolloutStage.WIDE, reason, evidence, now_unix_ns, checks)
    reason = ""
    if verdict is not Verdict.PROMOTE:
        skips = [a for a in bound if a.decision is Decision.SKIP]
        waived = [c for c in checks if c.verdict is Verdict.HOLD]
        if not skips or any(c.name in NEVER_SKIPPED for c in waived):
            return None
        reason = f"{_word('skipped by', skips)}; without {', '.join(c.name for c in waived)}"
        heeded = (*state.heeded, *(a.digest for a in skips))
        state = state.model_copy(update={"heeded": heeded})
    elif not fresh:
        return None
    if stage is RolloutStage.WIDE and not state.last_wave:
        next_wave = {"wave": state.wave + 1, "wide_from": evidence.candidate.episodes}
        share = state.settings.waves[state.wave]
        reason = reason or f"wave {state.wave} does well by it: it goes to {share:.0%} of the fleet"
        return _move(state.model_copy(update=next_wave), stage, reason, evidence, now_unix_ns, checks)
    return _move(state, NEXT[stage], reason or PASSED[stage], evidence, now_unix_ns, checks)


def _pause(
    state: RolloutState,
    orders: Sequence[Approval],
    evidence: Evidence,
    now_unix_ns: int,
    checks: tuple[Check, ...],
) -> RolloutState:
    """Words to pause and to resume, the last of which holds. Time that it was paused counts for nothing."""
    last = max(orders, key=lambda a: (a.t_unix_ns, a.digest))
    changes: dict[str, Any] = {"heeded": (*state.heeded, *(a.digest for a in orders))}
    if last.decision is Decision.PAUSE and not state.paused:
        changes |= {"paused": True, "paused_unix_ns": now_unix_ns}
    elif last.decision is Decision.RESUME and state.paused:
        stood = max(now_unix_ns - state.paused_unix_ns, 0)
        changes |= {"paused": False, "paused_unix_ns": 0, "since_unix_ns": state.since_unix_ns + stood}
    verb = "paused by" if last.decision is Decision.PAUSE else "resumed by"
    return _record(state.model_copy(update=changes), _word(verb, [last]), evidence, now_unix_ns, checks)


def _verdicts(checks: Iterable[Check]) -> list[tuple[str, Verdict]]:
    return [(c.name, c.verdict) for c in checks]


def binds(approval: Approval, state: RolloutState) -> bool:
    """Whether a word is about this candidate, this gate report and, to promote or skip, this stage of it.

    Going back needs no more than the right name: it is never too early or too late for it.
    """
    if (approval.rollout_id, approval.bundle_digest, approval.gate_digest) != (
        state.rollout_id,
        state.bundle_digest,
        state.gate_digest,
    ):
        return False
    current = state.since_n <= approval.state_n <= state.n
    if approval.decision is Decision.SKIP:
        return current and state.stage is not RolloutStage.APPROVAL
    return approval.decision is not Decision.PROMOTE or (current and state.stage is RolloutStage.APPROVAL)


def combine(checks: Iterable[Check]) -> Verdict:
    """Roll back if any check says so, promote if all do, hold otherwise; no check is a hold."""
    verdicts = {c.verdict for c in checks}
    if Verdict.ROLL_BACK in verdicts:
        return Verdict.ROLL_BACK
    return Verdict.PROMOTE if verdicts == {Verdict.PROMOTE} else Verdict.HOLD


def waiting(checks: Iterable[Check]) -> str:
    """What a stage waits for."""
    missing = [f"{c.name}: {c.bar}" for c in checks if c.verdict is not Verdict.PROMOTE]
    return f"waiting for {'; '.join(missing)}" if missing else "waiting for approval"


def assess(state: RolloutState, evidence: Evidence) -> tuple[dict[str, Any], tuple[Check, ...]]:
    """The checks of the state's stage, and what changes in the state if success was compared anew."""
    settings, stage = state.settings, state.stage
    if stage is RolloutStage.SHADOW:
        return {}, (_heard("cohort heard", evidence.cohort, settings.quorum), *_shadow(state, evidence))
    wide = stage is RolloutStage.WIDE
    heard = evidence.fleet if wide else evidence.cohort
    tests, success = _success(state, evidence)
    checks: tuple[Check, ...] = (
        _heard("fleet heard" if wide else "cohort heard", heard, settings.quorum),
        _running(heard, settings.wide_share if wide else settings.quorum, settings.wide_share),
        _given_back(heard, settings.quorum),
        _invalid(evidence.candidate, evidence.current, settings.max_invalid_per_episode),
        success,
        _tail("tracking error p99", evidence.current.tracking, evidence.candidate.tracking, state),
        _tail("missed deadlines", evidence.current.misses, evidence.candidate.misses, state),
        _tail("lateness p99", evidence.current.late, evidence.candidate.late, state),
    )
    if wide:
        seen = evidence.candidate.episodes - state.wide_from
        need = settings.wide_episodes
        verdict = Verdict.PROMOTE if seen >= need else Verdict.HOLD
        done = Check(name="episodes since wide", verdict=verdict, value=seen, bar=f"≥ {need}", n=seen)
        checks = (*checks, done)
    return tests, checks


def _heard(name: str, heard: Heard, quorum: float) -> Check:
    """An empty or silent set of robots never passes."""
    need = max(1, math.ceil(quorum * heard.known - 1e-9))
    verdict = Verdict.PROMOTE if heard.fresh >= need else Verdict.HOLD
    bar = f"≥ {need} of {heard.known} robots report" if heard.known else "has no robot"
    return Check(name=name, verdict=verdict, value=heard.fresh, bar=bar, n=heard.known)


def _running(heard: Heard, share: float, known: float) -> Check:
    """``known`` is the share of robots that must run bytes which somebody offered them."""
    need = max(1, math.ceil(share * heard.fresh - 1e-9))
    foreign = heard.foreign > math.floor((1 - known) * heard.fresh + 1e-9)
    verdict = Verdict.PROMOTE if heard.loaded >= need and not foreign else Verdict.HOLD
    bar = f"≥ {need} run it, confirmed"
    if heard.foreign:
        bar += f"; {heard.foreign} run bytes that nobody offered them"
    return Check(name="candidate loaded", verdict=verdict, value=heard.loaded, bar=bar, n=heard.fresh)


def _given_back(heard: Heard, quorum: float) -> Check:
    most = math.floor((1 - quorum) * heard.known + 1e-9)
    verdict = Verdict.ROLL_BACK if heard.refused > most else Verdict.PROMOTE
    bar = f"≤ {most} robots give it back"
    return Check(name="candidate given back", verdict=verdict, value=heard.refused, bar=bar, n=heard.known)


def _rate(name: str, count: int, episodes: int, most: float) -> Check:
    """Invalid chunks in an episode. A few may be chance, and hold."""
    bar = f"≤ {most:g} in an episode"
    if not episodes:
        return Check(name=name, verdict=Verdict.HOLD, value=None, bar=bar)
    verdict = Verdict.PROMOTE
    if count / episodes > most:
        verdict = Verdict.ROLL_BACK if count >= FEW_INVALID else Verdict.HOLD
    return Check(name=name, verdict=verdict, value=count / episodes, bar=bar, n=episodes)


def _invalid(candidate: Arm, current: Arm, most: float) -> Check:
    """What today's policy does twice as often cannot be the candidate's fault."""
    today = 2 * current.invalid / current.episodes if current.episodes else 0.0
    return _rate("invalid chunks", candidate.invalid, candidate.episodes, max(most, today))


def _shadow(state: RolloutState, evidence: Evidence) -> tuple[Check, ...]:
    s, shadow = state.settings, evidence.shadow
    need = max(1, math.ceil(s.quorum * evidence.cohort.known - 1e-9))
    enough = shadow.episodes >= s.shadow_episodes and shadow.chunks > 0 and shadow.robots >= need
    latency = shadow.infer_p99_ns / 1e6
    seen = shadow.chunks > 0

    def within(name: str, value: float, most: float, unit: str) -> Check:
        verdict = Verdict.PROMOTE if seen and value <= most else Verdict.HOLD
        bar = f"≤ {most:g}{unit}"
        return Check(name=name, verdict=verdict, value=value if seen else None, bar=bar, n=shadow.chunks)

    return (
        Check(
            name="shadow episodes",
            verdict=Verdict.PROMOTE if enough else Verdict.HOLD,
            value=shadow.episodes,
            bar=f"≥ {s.shadow_episodes}, from ≥ {need} robots",
            n=shadow.chunks,
        ),
        _rate("invalid chunks", shadow.invalid, shadow.episodes, s.max_invalid_per_episode),
        within("inference p99", latency, s.max_infer_ms, " ms"),
        within("difference from today's actions", shadow.rms_difference, s.max_shadow_rms, " rms"),
    )


def _success(state: RolloutState, evidence: Evidence) -> tuple[dict[str, Any], Check]:
    """The candidate's success against today's: a new comparison when it is due, else the last one."""
    s, a, b = state.settings, evidence.current, evidence.candidate
    name, bar = "success against today's", f"> -{s.max_drop:g}"
    total, need = a.episodes + b.episodes, s.canary_episodes
    if min(a.episodes, b.episodes) < need:
        bar = f"≥ {need} episodes of each policy, {b.episodes} of it and {a.episodes} of today's"
        return {}, Check(name=name, verdict=Verdict.HOLD, value=None, bar=bar, n=total)
    if state.last_test is not None and total < math.ceil(GROWTH * state.tested_episodes):
        return {}, state.last_test
    k = state.tests + 1
    confidence = 1 - (1 - s.confidence) / (k * (k + 1))
    d = stats.unpaired_difference(a.successes, a.episodes, b.successes, b.episodes, confidence)
    verdict = Verdict.HOLD
    if d.low > -s.max_drop:
        verdict = Verdict.PROMOTE
    elif d.high < 0:
        verdict = Verdict.ROLL_BACK
    test = Check(
        name=name,
        verdict=verdict,
        value=d.mean,
        low=d.low,
        high=d.high,
        bar=bar,
        n=total,
        evidence={
            "comparison": k,
            "confidence": confidence,
            "candidate": f"{b.successes}/{b.episodes}",
            "current": f"{a.successes}/{a.episodes}",
        },
    )
    return {"tests": k, "tested_episodes": total, "last_test": test}, test


def _tail(name: str, current: Tail, candidate: Tail, state: RolloutState) -> Check:
    """Ratio of a tail figure to today's, over batches."""
    most = state.settings.max_tail_ratio
    bar = f"≤ {most:g} of today's"
    n = current.n + candidate.n
    if min(current.n, candidate.n) < 2:
        return Check(name=name, verdict=Verdict.HOLD, value=None, bar=f"≥ 2 batches of each, then {bar}", n=n)
    r = stats.unpaired_ratio(_moments(current), _moments(candidate), state.settings.confidence)
    verdict = Verdict.HOLD
    if r.high <= most:
        verdict = Verdict.PROMOTE
    elif r.low > most:
        verdict = Verdict.ROLL_BACK
    return Check(name=name, verdict=verdict, value=r.mean, low=r.low, high=r.high, bar=bar, n=n)


def _moments(tail: Tail) -> stats.Moments:
    return stats.Moments(tail.n, tail.mean, tail.var)


def _void(state: RolloutState, evidence: Evidence) -> str | None:
    """Why the grounds on which it started do not hold any more."""
    if evidence.superseded_by:
        return f"superseded by rollout {evidence.superseded_by}"
    if evidence.gate_digest != state.gate_digest:
        return f"the gate report {state.gate_digest[:12]} is gone or changed: gate and approval are void"
    if evidence.gate_objection:
        return f"the gate report does not speak for it any more: {evidence.gate_objection}"
    return None


def _late(state: RolloutState, checks: Sequence[Check], now_unix_ns: int) -> str | None:
    """Why a stage that has not passed is given up."""
    limits = {
        RolloutStage.SHADOW: state.settings.max_stage_s,
        RolloutStage.CANARY: state.settings.max_stage_s,
        RolloutStage.APPROVAL: state.settings.approval_timeout_s,
    }
    limit = limits.get(state.stage)
    if limit is None or now_unix_ns - state.since_unix_ns <= limit * 1e9:
        return None
    return f"{state.stage} did not pass within {limit:g} s: {waiting(checks)}"


def _word(verb: str, approvals: Sequence[Approval]) -> str:
    first = min(approvals, key=lambda a: (a.t_unix_ns, a.by))
    return f"{verb} {first.by}" + (f": {first.reason}" if first.reason else "")


def _move(
    state: RolloutState,
    stage: RolloutStage,
    reason: str,
    evidence: Evidence,
    now_unix_ns: int,
    checks: tuple[Check, ...] = (),
) -> RolloutState:
    begun = state.model_copy(
        update={
            "stage": stage,
            "since_n": state.n + 1,
            "since_unix_ns": now_unix_ns,
            "paused": False,
            "site_below": evidence.site_below if stage is not RolloutStage.HELD else state.site_below,
        }
    )
    return _record(begun, reason, evidence, now_unix_ns, checks)


def _record(
    state: RolloutState, reason: str, evidence: Evidence, now_unix_ns: int, checks: tuple[Check, ...]
) -> RolloutState:
    return state.model_copy(
        update={
            "n": state.n + 1,
            "t_unix_ns": now_unix_ns,
            "reason": reason,
            "checks": checks,
            "evidence": evidence,
        }
    )
