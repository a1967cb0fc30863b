"""The rules of a rollout under anything the fleet and people may do, and the stage around them."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flywheel import rollout
from flywheel.config import RolloutSettings
from flywheel.errors import BundleError, StageError
from flywheel.rehearsal.rollouts import RolloutSite as Site
from flywheel.rollout.documents import Approval, Arm, Compared, Evidence, Heard, Inputs, RolloutState, Tail
from flywheel.rollout.evidence import cohort_limit, site_limits, sum_up
from flywheel.rollout.rules import NEXT, assess, combine, decide
from flywheel.schema import (
    EVERYONE,
    CanaryEvidence,
    Check,
    FleetPlan,
    Group,
    HoldBack,
    Pin,
    Release,
    RobotReport,
    RolloutStage,
    Verdict,
    bundle_digest,
    cohort_draw,
    sha256_bytes,
)
from tests.bucket import Killed
from tests.deliveries import make_bundle

CANDIDATE, CURRENT, GATE = "1" * 64, "2" * 64, "3" * 64
RID = f"{CANDIDATE[:12]}-{GATE[:12]}"
T0 = 1_800_000_000_000_000_000
S = 1_000_000_000
SETTINGS = RolloutSettings()
SAME = Tail(n=20, mean=0.0, var=0.01)


pytestmark = pytest.mark.usefixtures("quick_disk")


def state(stage: RolloutStage = RolloutStage.SHADOW, **fields: Any) -> RolloutState:
    return RolloutState(
        **{
            "rollout_id": RID,
            "n": 3,
            "t_unix_ns": T0,
            "stage": stage,
            "reason": "",
            "since_n": 2,
            "since_unix_ns": T0,
            "bundle_digest": CANDIDATE,
            "gate_digest": GATE,
            "cohort_below": EVERYONE,
            "previous": Release(group=Group.STABLE, digest=CURRENT),
            "settings": SETTINGS,
            "wave": int(stage is RolloutStage.WIDE),
            **fields,
        }
    )


def arm(successes: int, episodes: int, **fields: Any) -> Arm:
    return Arm(
        **{
            "robots": 2,
            "episodes": episodes,
            "successes": successes,
            "tracking": SAME,
            "misses": SAME,
            "late": SAME,
            **fields,
        }
    )


GOOD = Evidence(
    gate_digest=GATE,
    cohort=Heard(known=2, fresh=2, loaded=2),
    fleet=Heard(known=8, fresh=8, loaded=8),
    shadow=Compared(robots=2, episodes=8, chunks=100, rms_difference=0.02, infer_p99_ns=5_000_000),
    candidate=arm(38, 40),
    current=arm(20, 40),
    inputs_sha256="good",
)


def changed(**fields: Any) -> Evidence:
    return GOOD.model_copy(update=fields)


def approval(s: RolloutState, **fields: Any) -> Approval:
    return Approval(
        **{
            "rollout_id": s.rollout_id,
            "bundle_digest": s.bundle_digest,
            "gate_digest": s.gate_digest,
            "state_n": s.n,
            "decision": Verdict.PROMOTE,
            "by": "op",
            "t_unix_ns": T0,
            **fields,
        }
    )


def check(s: RolloutState, e: Evidence, name: str) -> Check:
    return next(c for c in assess(s, e)[1] if c.name == name)


# ── the rules, one by one ───────────────────────────────────────────────────────────────────────────


def test_good_candidate_goes_all_the_way_one_stage_at_a_look() -> None:
    s, seen = state(), []
    for i in range(6):
        fresh = changed(inputs_sha256=str(i), candidate=arm(38 + 20 * i, 40 + 20 * i))
        s = decide(s, fresh, [approval(s)] if s.stage is RolloutStage.APPROVAL else [], T0 + i * S)
        seen.append(s.stage)
    assert seen[:4] == [RolloutStage.CANARY, RolloutStage.APPROVAL, RolloutStage.WIDE, RolloutStage.DONE]
    assert s.stage is RolloutStage.DONE
    assert s.approved_by == ("op",)
    assert RolloutState.model_validate_json(s.to_bytes()) == s


@pytest.mark.parametrize(
    "cohort",
    [
        pytest.param(Heard(), id="empty"),
        pytest.param(Heard(known=5), id="silent"),
        pytest.param(Heard(known=5, fresh=3, loaded=3), id="mostly silent"),
    ],
)
@pytest.mark.parametrize("stage", [RolloutStage.SHADOW, RolloutStage.CANARY, RolloutStage.APPROVAL])
def test_empty_or_silent_cohort_never_passes_and_is_held_in_the_end(
    cohort: Heard, stage: RolloutStage
) -> None:
    s = state(stage)
    e = changed(cohort=cohort)
    after = decide(s, e, [approval(s)], T0 + S)
    assert after.stage is stage
    late = decide(after, e, [approval(s)], T0 + 25 * 3600 * S)
    assert late.stage is RolloutStage.HELD
    assert "did not pass within" in late.reason


def test_silent_fleet_is_never_done() -> None:
    s = state(RolloutStage.WIDE, wide_from=0)
    assert decide(s, changed(fleet=Heard(known=8, fresh=2, loaded=2)), [], T0).stage is RolloutStage.WIDE
    assert decide(s, changed(fleet=Heard()), [], T0).stage is RolloutStage.WIDE
    assert decide(s, changed(fleet=Heard(known=8, fresh=8, loaded=7)), [], T0).stage is RolloutStage.WIDE
    assert decide(s, GOOD, [], T0).stage is RolloutStage.DONE


def test_cohort_that_does_not_run_the_candidate_never_passes() -> None:
    s = state(RolloutStage.CANARY)
    for heard in (Heard(known=2, fresh=2), Heard(known=2, fresh=2, loaded=2, foreign=1)):
        assert decide(s, changed(cohort=heard), [], T0).stage is RolloutStage.CANARY


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        pytest.param({"candidate": arm(20, 40), "current": arm(36, 40)}, "success", id="worse success"),
        pytest.param(
            {"candidate": arm(38, 40, tracking=Tail(n=20, mean=0.5, var=0.01))}, "tracking", id="tracking"
        ),
        pytest.param(
            {"candidate": arm(38, 40, misses=Tail(n=20, mean=0.5, var=0.01))}, "missed", id="misses"
        ),
        pytest.param({"candidate": arm(38, 40, late=Tail(n=20, mean=0.5, var=0.01))}, "lateness", id="late"),
        pytest.param({"candidate": arm(38, 40, invalid=20)}, "invalid", id="invalid chunks"),
        pytest.param(
            {
                "cohort": Heard(known=2, fresh=2, loaded=1, refused=1),
                "fleet": Heard(known=8, fresh=8, loaded=6, refused=2),
            },
            "given back",
            id="given back",
        ),
    ],
)
@pytest.mark.parametrize("stage", [RolloutStage.CANARY, RolloutStage.APPROVAL, RolloutStage.WIDE])
def test_bad_candidate_is_rolled_back_from_any_stage_in_which_it_acts(
    bad: dict[str, Any], why: str, stage: RolloutStage
) -> None:
    s = state(stage)
    after = decide(s, changed(**bad), [approval(s)], T0)
    assert after.stage is RolloutStage.ROLLED_BACK
    assert why in after.reason


def test_what_today_does_too_is_not_the_candidates_fault() -> None:
    s = state(RolloutStage.CANARY)
    e = changed(candidate=arm(38, 40, invalid=20), current=arm(20, 40, invalid=20))
    assert decide(s, e, [], T0).stage is RolloutStage.APPROVAL


def test_inconclusive_evidence_waits() -> None:
    s = state(RolloutStage.CANARY)
    for e in (
        changed(candidate=arm(5, 5)),  # too few
        changed(current=arm(0, 0)),  # nothing to compare with
        changed(candidate=arm(9, 12), current=arm(9, 12)),  # equal, but proven by nothing yet
        changed(candidate=arm(38, 40, tracking=Tail(n=1))),
        changed(candidate=arm(38, 40, tracking=Tail(n=3, mean=0.1, var=0.5))),
    ):
        after = decide(s, e, [], T0)
        assert after.stage is RolloutStage.CANARY
        assert after.reason.startswith("waiting for")


def test_invalid_chunks_in_shadow_end_it_before_it_acts() -> None:
    e = changed(shadow=GOOD.shadow.model_copy(update={"invalid": 5}))
    assert decide(state(), e, [], T0).stage is RolloutStage.ROLLED_BACK


@pytest.mark.parametrize(
    "shadow",
    [
        {"robots": 1},
        {"episodes": 3},
        {"chunks": 0},
        {"infer_p99_ns": 81_000_000},
        {"rms_difference": 0.31},
    ],
)
def test_thin_or_odd_shadow_evidence_waits(shadow: dict[str, Any]) -> None:
    e = changed(shadow=GOOD.shadow.model_copy(update=shadow))
    assert decide(state(), e, [], T0).stage is RolloutStage.SHADOW


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"bundle_digest": "4" * 64}, id="another bundle"),
        pytest.param({"gate_digest": "4" * 64}, id="another gate report"),
        pytest.param({"rollout_id": "4" * 12 + "-" + "4" * 12}, id="replayed from another rollout"),
        pytest.param({"state_n": 1}, id="from before the canary's evidence"),
        pytest.param({"state_n": 4}, id="from a state that does not exist"),
        pytest.param({"decision": Verdict.HOLD, "bundle_digest": "4" * 64}, id="hold of another bundle"),
    ],
)
def test_approval_that_is_not_of_exactly_this_is_void(fields: dict[str, Any]) -> None:
    s = state(RolloutStage.APPROVAL)
    assert decide(s, GOOD, [approval(s, **fields)], T0).stage is RolloutStage.APPROVAL
    assert decide(s, GOOD, [approval(s)], T0).stage is RolloutStage.WIDE


def test_one_person_twice_is_not_two_people() -> None:
    s = state(RolloutStage.APPROVAL, settings=RolloutSettings(approvals=2))
    twice = [approval(s), approval(s, reason="again", t_unix_ns=T0 + 1)]
    assert decide(s, GOOD, twice, T0).stage is RolloutStage.APPROVAL
    assert decide(s, GOOD, [*twice, approval(s, by="lead")], T0).approved_by == ("lead", "op")


@pytest.mark.parametrize(
    "void",
    [
        {"gate_digest": ""},
        {"gate_digest": "4" * 64},
        {"gate_objection": "the gate's verdict is hold"},
        {"superseded_by": "4" * 12 + "-" + "4" * 12},
    ],
)
@pytest.mark.parametrize("stage", [RolloutStage.SHADOW, RolloutStage.CANARY, RolloutStage.APPROVAL])
def test_gate_report_that_changed_or_is_gone_holds(void: dict[str, str], stage: RolloutStage) -> None:
    s = state(stage)
    assert decide(s, changed(**void), [approval(s)], T0).stage is RolloutStage.HELD


@pytest.mark.parametrize("stage", [s for s in RolloutStage if s is not RolloutStage.ROLLED_BACK])
def test_a_person_can_roll_back_from_every_stage(stage: RolloutStage) -> None:
    s = state(stage)
    order = approval(s, decision=Verdict.ROLL_BACK, reason="it drops boxes", state_n=1)
    after = decide(s, Evidence(), [order], T0)
    assert after.stage is RolloutStage.ROLLED_BACK
    assert after.reason == "rolled back by op: it drops boxes"


def test_looking_again_and_again_spends_the_level_and_keeps_it() -> None:
    """Equal policies, a look after every episode, margin 0: rolled back or promoted falsely ≤ 5 %."""
    rng = np.random.default_rng(0)
    false = 0
    runs = 120
    for _ in range(runs):
        s = state(RolloutStage.CANARY, settings=RolloutSettings(max_drop=0.0, canary_episodes=8))
        a, b = np.cumsum(rng.random((2, 200)) < 0.6, axis=1)
        for n in range(8, 200, 6):
            both = changed(candidate=arm(int(b[n]), n + 1), current=arm(int(a[n]), n + 1))
            s = s.model_copy(update=assess(s, both)[0])
            if s.last_test is not None and s.last_test.verdict is not Verdict.HOLD:
                false += 1
                break
        assert s.tests <= 9
    assert false / runs <= 0.05


def test_no_check_is_a_hold() -> None:
    assert combine([]) is Verdict.HOLD


# ── the rules, whatever happens ─────────────────────────────────────────────────────────────────────

counts = st.integers(0, 60)
tails = st.builds(Tail, n=st.integers(0, 30), mean=st.floats(-1, 1), var=st.floats(0, 1))
arms = st.builds(
    lambda e, f, **k: Arm(episodes=e, successes=round(e * f), **k),
    counts,
    st.floats(0, 1),
    robots=st.integers(0, 4),
    invalid=st.integers(0, 3),
    tracking=st.just(SAME) | tails,
    misses=st.just(SAME) | tails,
    late=st.just(SAME) | tails,
)
heards = st.builds(
    lambda known, fresh, loaded, refused: Heard(
        known=known, fresh=min(fresh, known), loaded=min(loaded, fresh, known), refused=min(refused, known)
    ),
    *[st.integers(0, 8)] * 3,
    st.sampled_from([0, 0, 0, 1]),
)
evidences = st.just(GOOD) | st.builds(
    Evidence,
    gate_digest=st.sampled_from([GATE, GATE, GATE, GATE, "", "4" * 64]),
    gate_objection=st.sampled_from(["", "", "", "the gate's verdict is hold"]),
    superseded_by=st.sampled_from(["", "", "", "4" * 12 + "-" + "4" * 12]),
    cohort=st.just(GOOD.cohort) | heards,
    fleet=st.just(GOOD.fleet) | heards,
    shadow=st.just(GOOD.shadow) | st.builds(Compared, chunks=counts, episodes=counts, robots=counts),
    candidate=st.just(GOOD.candidate) | arms,
    current=st.just(GOOD.current) | arms,
)


class AnyRollout(RuleBasedStateMachine):
    """Any evidence, any approvals, any passing of time: what must never happen, does not."""

    def __init__(self) -> None:
        super().__init__()
        self.state = state(n=1, since_n=1)
        self.log = [self.state]
        self.approvals: list[Approval] = []
        self.now = T0
        self.serial = 0
        self.evidence = GOOD

    @rule(evidence=evidences, seconds=st.sampled_from([0, 1, 60, 3600]))
    def look(self, evidence: Evidence, seconds: int) -> None:
        self.serial += 1
        self.now += seconds * S
        self.evidence = evidence.model_copy(update={"inputs_sha256": str(self.serial)})
        self.step()

    @rule(grow=st.integers(1, 40))
    def look_at_more_of_the_good(self, grow: int) -> None:
        self.serial += 1
        n = 40 + grow * self.serial
        self.evidence = changed(
            inputs_sha256=str(self.serial), candidate=arm(round(0.95 * n), n), current=arm(n // 2, n)
        )
        self.step()

    @rule()
    def look_at_the_same_again(self) -> None:
        self.step()

    @rule(days=st.integers(1, 3))
    def time_passes(self, days: int) -> None:
        self.now += days * 86_400 * S

    @rule(
        decision=st.sampled_from([Verdict.PROMOTE] * 4 + [Verdict.HOLD, Verdict.ROLL_BACK]),
        right=st.booleans(),
    )
    def decide_by_a_person(self, decision: Verdict, right: bool) -> None:
        wrong: dict[str, Any] = {} if right else {"gate_digest": "4" * 64}
        self.approvals.append(approval(self.state, decision=decision, **wrong))

    @precondition(lambda self: self.state.stage is RolloutStage.APPROVAL)
    @rule()
    def approve(self) -> None:
        self.approvals.append(approval(self.state))

    def step(self) -> None:
        before = self.state
        after = decide(before, self.evidence, self.approvals, self.now)
        again = decide(after, self.evidence, self.approvals, self.now)
        assert again is after, "the same evidence moved it twice"
        if after is before:
            return
        assert after.n == before.n + 1
        assert after.evidence == self.evidence
        assert RolloutState.model_validate_json(after.to_bytes()) == after
        if after.stage is not before.stage:
            self.moved(before, after)
        self.state = after
        self.log.append(after)

    def moved(self, before: RolloutState, after: RolloutState) -> None:
        e, to = self.evidence, after.stage
        assert to in {NEXT.get(before.stage), RolloutStage.HELD, RolloutStage.ROLLED_BACK}
        if to not in (RolloutStage.HELD, RolloutStage.ROLLED_BACK):
            heard = e.fleet if to is RolloutStage.DONE else e.cohort
            assert heard.fresh >= max(1, SETTINGS.quorum * heard.known), "passed on silence"
            assert all(c.verdict is Verdict.PROMOTE for c in after.checks)
        if to in (RolloutStage.CANARY, RolloutStage.APPROVAL, RolloutStage.WIDE):
            assert e.gate_digest == GATE, "went on without its gate report"
            assert not e.gate_objection, "went on without a promoting gate"
        if to is RolloutStage.WIDE:
            assert any(
                a.decision is rollout.Decision.PROMOTE
                and (a.rollout_id, a.bundle_digest, a.gate_digest) == (RID, CANDIDATE, GATE)
                and a.state_n >= before.since_n
                for a in self.approvals
            ), "went wide without approval"
            assert e.candidate.episodes >= SETTINGS.canary_episodes

    @invariant()
    def roll_back_is_reachable(self) -> None:
        order = approval(self.state, decision=Verdict.ROLL_BACK)
        assert decide(self.state, self.evidence, [*self.approvals, order], self.now).stage is (
            RolloutStage.ROLLED_BACK
        )

    @invariant()
    def the_log_explains_itself(self) -> None:
        assert [s.n for s in self.log] == list(range(1, len(self.log) + 1))
        assert all(s.evidence is not None and s.reason for s in self.log[1:])
        assert {
            (s.bundle_digest, s.gate_digest, s.previous.to_bytes(), s.cohort_below) for s in self.log
        } == {(CANDIDATE, GATE, self.log[0].previous.to_bytes(), EVERYONE)}


TestAnyRollout = AnyRollout.TestCase
TestAnyRollout.settings = hypothesis_settings(max_examples=60, stateful_step_count=15, deadline=None)


# ── the stage: store, publisher, robots ─────────────────────────────────────────────────────────────


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_rollout_from_start_to_every_robot(site: Site) -> None:
    base = bundle_digest(site.base)
    first = site.start()
    assert first.stage is RolloutStage.SHADOW
    assert len(site.cohort()) == 1
    assert set(site.poll().values()) == {base}
    site.look()
    site.shadow()
    assert site.look().state.stage is RolloutStage.CANARY
    running = site.poll()
    assert {n for n, d in running.items() if d == site.candidate} == set(site.cohort())
    assert not site.look().state.over
    site.work(20, 0.9, 0.4)
    waiting = site.look()
    assert waiting.state.stage is RolloutStage.APPROVAL
    assert not site.look().changed
    approval = rollout.approve(
        site.store, site.publisher, site.id, Verdict.PROMOTE, "op", "looks good", clock_ns=site.clock
    )
    assert site.look().state.stage is RolloutStage.WIDE
    assert set(site.poll().values()) == {site.candidate}
    assert not site.look().state.over  # too few episodes since
    site.work(6, 0.9, 0.4)
    done = site.look().state
    assert done.stage is RolloutStage.DONE
    stable = site.publisher.current(Group.STABLE)
    assert stable is not None
    assert (stable.digest, stable.gate_digest) == (site.candidate, site.gate)
    assert (stable.approval_digest, stable.git_rev, stable.experiment) == (approval.digest, "abc", "turn-1")
    assert site.publisher.current(Group.CANARY) is None
    assert set(site.poll().values()) == {site.candidate}
    status = rollout.status(site.store, site.id)
    assert [s.stage for s in status.history if s.since_n == s.n] == [
        RolloutStage.SHADOW,
        RolloutStage.CANARY,
        RolloutStage.APPROVAL,
        RolloutStage.WIDE,
        RolloutStage.DONE,
    ]
    for s in status.history[1:]:
        assert s.evidence is not None
        data = site.store.get(f"rollouts/{site.id}/inputs/{s.evidence.inputs_sha256}.json")
        assert sha256_bytes(data) == s.evidence.inputs_sha256


def test_bad_canary_is_rolled_back_and_its_robots_return(site: Site) -> None:
    site.to_canary()
    site.work(20, 0.0, 0.8)
    look = site.look()
    assert look.state.stage is RolloutStage.ROLLED_BACK
    assert "success" in look.line()
    assert set(site.poll().values()) == {bundle_digest(site.base)}
    assert site.publisher.current(Group.CANARY) is None
    with pytest.raises(StageError, match="is rolled back"):
        rollout.approve(site.store, site.publisher, site.id, Verdict.ROLL_BACK, "op")


def test_candidate_that_turns_bad_when_wide_is_taken_back_from_everyone_and_revoked(site: Site) -> None:
    site.to_wide()
    assert set(site.poll().values()) == {site.candidate}
    rollout.approve(
        site.store, site.publisher, site.id, Verdict.ROLL_BACK, "op", "it drops boxes", clock_ns=site.clock
    )
    assert site.look().state.stage is RolloutStage.ROLLED_BACK
    assert set(site.poll().values()) == {bundle_digest(site.base)}
    stable = site.publisher.current(Group.STABLE)
    assert stable is not None
    assert stable.revokes == (site.candidate,)


def test_done_rollout_can_be_taken_back_and_a_later_one_is_not_touched(site: Site) -> None:
    site.to_wide()
    site.work(6, 0.9, 0.4)
    assert site.look().state.stage is RolloutStage.DONE
    later = make_bundle(site.root, "later")
    site.publisher.publish(later, Release(group=Group.STABLE, digest=bundle_digest(later)))
    site.look()
    stable = site.publisher.current(Group.STABLE)
    assert stable is not None
    assert stable.digest == bundle_digest(later)
    rollout.approve(site.store, site.publisher, site.id, Verdict.ROLL_BACK, "op", clock_ns=site.clock)
    assert site.look().state.stage is RolloutStage.ROLLED_BACK
    assert site.publisher.current(Group.STABLE) == stable


def test_gate_report_replaced_under_a_rollout_holds_it(site: Site) -> None:
    site.to_approval()
    rollout.approve(site.store, site.publisher, site.id, Verdict.PROMOTE, "op", clock_ns=site.clock)
    other = site.store.get(f"gates/{site.report(note='another')}.json")
    site.store.server.overwrite(f"gates/{site.gate}.json", other)
    look = site.look()
    assert look.state.stage is RolloutStage.HELD
    assert "void" in look.state.reason
    assert set(site.poll().values()) == {bundle_digest(site.base)}


def test_stable_policy_replaced_under_a_rollout_voids_its_gate_report(site: Site) -> None:
    site.to_canary()
    later = make_bundle(site.root, "later")
    site.publisher.publish(later, Release(group=Group.STABLE, digest=bundle_digest(later)))
    assert site.look().state.stage is RolloutStage.HELD


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("hold", "the gate's verdict is hold"),
        ("other candidate", "void: the report is about"),
        ("missing", "no such gate report"),
        ("altered", "not the one of that digest"),
        ("no robots", "no robot has reported"),
        ("no bundle", "not in the store"),
        ("wrong bundle", "holds bytes of digest"),
    ],
)
def test_rollout_that_must_not_start_is_refused_and_publishes_nothing(
    site: Site, kind: str, says: str
) -> None:
    gate = site.gate
    if kind == "hold":
        gate = site.report(Verdict.HOLD)
    elif kind == "other candidate":
        gate = site.report(candidate="9" * 64)
    elif kind == "missing":
        gate = "9" * 64
    elif kind == "altered":
        site.store.server.overwrite(f"gates/{gate}.json", b"{}")
    elif kind == "no robots":
        for key in [k for k in site.store.server.objects if k.startswith("fleet/")]:
            del site.store.server.objects[key]
    elif kind == "no bundle":
        del site.store.server.objects[f"bundles/{site.candidate}/policy.json"]
    else:
        site.store.server.overwrite(f"bundles/{site.candidate}/policy.json", b"{}")
    with pytest.raises((StageError, BundleError), match=says):
        site.start(gate)
    assert site.publisher.current(Group.CANARY) is None
    assert not [k for k in site.store.server.objects if k.startswith("rollouts/")]


def test_second_rollout_waits_for_the_first(site: Site) -> None:
    site.to_canary()
    with pytest.raises(StageError, match="is under way"):
        site.start(site.report(note="another"))
    rollout.approve(site.store, site.publisher, site.id, Verdict.HOLD, "op", clock_ns=site.clock)
    assert site.look().state.stage is RolloutStage.HELD
    site.gate = site.report(note="another")
    assert site.start().stage is RolloutStage.SHADOW


def test_start_again_returns_the_rollout_that_is_there(site: Site) -> None:
    site.to_canary()
    before = dict(site.store.server.objects)
    assert site.start().stage is RolloutStage.CANARY
    assert site.store.server.objects == before


def test_decisions_that_cannot_take_effect_are_refused(site: Site) -> None:
    site.start()
    with pytest.raises(StageError, match="nothing to approve"):
        rollout.approve(site.store, site.publisher, site.id, Verdict.PROMOTE, "op")
    with pytest.raises(StageError, match="void: the bundle is"):
        rollout.approve(site.store, site.publisher, site.id, Verdict.ROLL_BACK, "op", bundle_digest="9" * 64)
    with pytest.raises(StageError, match="void: the gate report is"):
        rollout.approve(site.store, site.publisher, site.id, Verdict.ROLL_BACK, "op", gate_digest="9" * 64)
    with pytest.raises(StageError, match="approval: by"):
        rollout.approve(site.store, site.publisher, site.id, Verdict.HOLD, "")
    with pytest.raises(StageError, match="there is none"):
        rollout.approve(site.store, site.publisher, "9" * 12 + "-" + "9" * 12, Verdict.HOLD, "op")


def counts_as_a_step(key: str) -> bool:
    """Requests at which something may go wrong; the many documents that are read are all alike."""
    return "/evidence/" not in key


def steps_of(site: Site) -> int:
    """How many steps a look has."""
    keys: list[str] = []
    site.store.server.before = lambda verb, key: keys.append(key)
    site.look()
    site.store.server.before = lambda verb, key: None
    return sum(map(counts_as_a_step, keys))


def test_look_killed_at_any_request_is_completed_by_the_next(site: Site) -> None:
    """The decision to go wide: written or not, and then signed, with no robot seeing anything else."""
    site.to_approval()
    rollout.approve(site.store, site.publisher, site.id, Verdict.PROMOTE, "op", clock_ns=site.clock)
    objects = dict(site.store.server.objects)
    total = steps_of(site)
    allowed = {bundle_digest(site.base), site.candidate}
    for k in range(1, total + 1, 2):
        site.store.server.objects = dict(objects)
        left = [k]

        def kill(verb: str, key: str, left: list[int] = left) -> None:
            left[0] -= counts_as_a_step(key)
            if left[0] == 0:
                left[0] = -1
                raise Killed

        site.store.server.before = kill
        with pytest.raises(Killed):
            site.look()
        site.store.server.before = lambda verb, key: None
        current = site.publisher.current(Group.STABLE)
        assert current is not None
        assert current.digest in allowed
        if current.digest == site.candidate:
            assert rollout.status(site.store, site.id).state.stage is RolloutStage.WIDE, k
        site.look()
        current = site.publisher.current(Group.STABLE)
        assert current is not None
        assert current.digest == site.candidate, k


def test_slow_look_never_undoes_a_roll_back(site: Site) -> None:
    """At every request of a look that goes wide, somebody rolls back and that look completes first."""
    site.to_approval()
    rollout.approve(site.store, site.publisher, site.id, Verdict.PROMOTE, "op", clock_ns=site.clock)
    objects = dict(site.store.server.objects)
    total = steps_of(site)
    for k in range(1, total + 1, 2):
        site.store.server.objects = dict(objects)
        left = [k]

        def intrude(verb: str, key: str, left: list[int] = left) -> None:
            left[0] -= counts_as_a_step(key)
            if left[0] == 0:
                left[0] = -1
                rollout.approve(
                    site.store, site.publisher, site.id, Verdict.ROLL_BACK, "op", clock_ns=site.clock
                )
                site.look()

        site.store.server.before = intrude
        site.look()
        site.store.server.before = lambda verb, key: None
        assert rollout.status(site.store, site.id).state.stage is RolloutStage.ROLLED_BACK, k
        current = site.publisher.current(Group.STABLE)
        assert current is not None
        assert current.digest == bundle_digest(site.base), k
        assert site.publisher.current(Group.CANARY) is None, k


def test_documents_that_are_not_understood_count_for_nothing_and_are_listed(site: Site) -> None:
    site.to_canary()
    site.work(20, 0.9, 0.4)
    prefix = f"rollouts/{site.id}"
    good = next(k for k in site.store.server.objects if k.startswith(f"{prefix}/evidence/"))
    site.store.put(f"{prefix}/evidence/r9-000001.json", site.store.get(good))  # a copy under another name
    site.store.put(f"{prefix}/evidence/r9-000002.json", b"not json")
    more = site.store.get(good).replace(b'"successes": ', b'"successes": 9')
    site.store.put(f"{prefix}/evidence/r9-000003.json", more)
    site.store.put("fleet/robots/r9.json", b"{}")
    look = site.look()
    assert look.state.stage is RolloutStage.APPROVAL
    assert look.evidence.candidate.episodes + look.evidence.current.episodes == 80
    inputs = site.store.get(f"{prefix}/inputs/{look.evidence.inputs_sha256}.json").decode()
    for bad in ("r9-000001.json: says that it is", "r9-000002.json", "r9-000003.json", "robots/r9.json"):
        assert bad in inputs


def test_outcomes_of_robots_outside_the_cohort_do_not_count_for_the_candidate() -> None:
    report = RobotReport(site="s", robot="r1", t_unix_ns=T0, loaded_digest=CANDIDATE)
    batch = CanaryEvidence(
        rollout_id=RID,
        robot="r1",
        n=1,
        digest=CANDIDATE,
        t_unix_ns=T0,
        episodes=5,
        successes=5,
        tracking_rms_rad=0.0,
        tracking_p99_rad=0.0,
    )
    inputs = Inputs(robots=(report,), shadow=(), batches=(batch,), ignored=())
    for below, counted in ((EVERYONE, 5), (0, 0)):
        s = state(RolloutStage.CANARY, cohort_below=below)
        assert sum_up(s, inputs, None, CURRENT, "", T0).candidate.episodes == counted


@pytest.mark.parametrize(
    ("fraction", "robots", "size"), [(0.25, 4, 1), (0.25, 5, 2), (0.01, 9, 1), (1.0, 4, 3), (1.0, 1, 1)]
)
def test_cohort_is_the_share_asked_for_and_leaves_somebody_out(
    fraction: float, robots: int, size: int
) -> None:
    names = [f"r{i}" for i in range(robots)]
    below = cohort_limit(RID, names, fraction)
    assert sum(cohort_draw(RID, n) < below for n in names) == size
    with pytest.raises(StageError, match="no robot"):
        cohort_limit(RID, [], fraction)


# ── waves, exceptions, people's orders ──────────────────────────────────────────────────────────────


def say(site: Site, decision: rollout.Decision, reason: str = "because") -> None:
    site.clock.advance(1)
    rollout.approve(site.store, site.publisher, site.id, decision, "op", reason, clock_ns=site.clock)


def test_waves_reach_no_robot_beyond_their_share_and_the_last_one_all(site: Site) -> None:
    site.settings = site.settings.model_copy(update={"waves": (0.5, 1.0), "wide_share": 1.0})
    site.to_wide()
    base = bundle_digest(site.base)
    draws = {n: cohort_draw(site.id, n) for n in site.names}
    below = rollout.status(site.store, site.id).state.below
    assert below < EVERYONE
    expected = {n: site.candidate if d < below else base for n, d in draws.items()}
    assert site.poll() == expected
    stable = site.publisher.current(Group.STABLE)
    assert stable is not None
    assert stable.digest == base
    for _ in range(2):
        site.work(20, 0.9, 0.4)
        site.look()
    assert rollout.status(site.store, site.id).state.wave == 2
    assert set(site.poll().values()) == {site.candidate}


def test_roll_back_from_a_wave_takes_it_from_all_who_have_it(site: Site) -> None:
    site.settings = site.settings.model_copy(update={"waves": (0.9, 1.0)})
    site.to_wide()
    site.poll()
    say(site, rollout.Decision.ROLL_BACK)
    assert site.look().state.stage is RolloutStage.ROLLED_BACK
    assert set(site.poll().values()) == {bundle_digest(site.base)}
    assert site.publisher.current(Group.WAVE) is None


def test_paused_rollout_goes_no_further_but_back_until_it_is_resumed(site: Site) -> None:
    site.to_canary()
    say(site, rollout.Decision.PAUSE, "line 3 is being rebuilt")
    paused = site.look().state
    assert paused.paused
    assert "line 3" in paused.reason
    site.work(20, 0.9, 0.4)
    site.clock.advance(10 * 86400)
    site.poll()
    assert site.look().state.stage is RolloutStage.CANARY, "time that it stands counts"
    say(site, rollout.Decision.RESUME)
    assert not site.look().state.paused
    site.poll()
    assert site.look().state.stage is RolloutStage.APPROVAL


def test_paused_rollout_is_still_rolled_back(site: Site) -> None:
    site.to_canary()
    say(site, rollout.Decision.PAUSE)
    site.look()
    site.work(20, 0.0, 0.8)
    assert site.look().state.stage is RolloutStage.ROLLED_BACK


def test_skip_stands_in_for_evidence_but_never_for_silence_or_approval(site: Site) -> None:
    site.to_canary()
    say(site, rollout.Decision.SKIP, "seen enough")
    assert site.look().state.stage is RolloutStage.CANARY, "nobody was heard to run it"
    site.work(5, 0.9, 0.4)
    seen = site.look().state
    assert seen.stage is RolloutStage.APPROVAL
    assert "skipped by op: seen enough; without success" in seen.reason
    with pytest.raises(StageError, match="cannot be skipped"):
        say(site, rollout.Decision.SKIP)
    with pytest.raises(StageError, match="say why"):
        say(site, rollout.Decision.PAUSE, "")


def test_new_candidate_supersedes_one_that_nobody_approved(site: Site) -> None:
    site.to_approval()
    old = site.id
    site.gate = site.report(note="another")
    first = rollout.start(
        site.store,
        site.publisher,
        site.candidate,
        site.gate,
        site.settings,
        supersede=True,
        clock_ns=site.clock,
    )
    assert first.stage is RolloutStage.SHADOW
    ended = rollout.status(site.store, old).state
    assert ended.stage is RolloutStage.HELD
    assert ended.reason == f"superseded by rollout {first.rollout_id}"
    assert set(site.poll().values()) == {bundle_digest(site.base)}
    canary = site.publisher.current(Group.CANARY)
    assert canary is not None
    assert canary.rollout_id == first.rollout_id


def test_pinned_robot_and_held_back_site_keep_what_they_run_until_lifted_or_revoked(site: Site) -> None:
    base = bundle_digest(site.base)
    until = site.clock() + 3600 * S
    pin = Pin(robot="r1", digest=base, by="op", reason="under test")
    hold = HoldBack(robot="r2", until_unix_ns=until, by="op", reason="stock-taking")
    site.publisher.set_plan(FleetPlan(pins=(pin,), holds=(hold,)))
    new = make_bundle(site.root, "newer")
    site.publisher.publish(new, Release(group=Group.STABLE, digest=bundle_digest(new)))
    running = site.poll()
    assert (running["r1"], running["r2"], running["r3"]) == (base, base, bundle_digest(new))
    assert site.poll(("r9",))["r9"] == bundle_digest(new)
    site.clock.advance(3601)
    assert site.poll()["r2"] == bundle_digest(new)
    assert site.poll()["r1"] == base
    site.publisher.publish(new, Release(group=Group.STABLE, digest=bundle_digest(new), revokes=(base,)))
    assert site.poll()["r1"] == bundle_digest(new), "a revoked policy is kept by no pin"


def test_pin_brings_a_robot_with_an_empty_disk_to_an_older_policy(site: Site) -> None:
    base = bundle_digest(site.base)
    new = make_bundle(site.root, "newer")
    site.publisher.publish(new, Release(group=Group.STABLE, digest=bundle_digest(new)))
    site.publisher.set_plan(FleetPlan(pins=(Pin(robot="r7", digest=base, by="op", reason="as it was"),)))
    assert site.poll(("r7", "r8")) == {"r7": base, "r8": bundle_digest(new)}


def test_site_cap_bounds_the_cohort_at_each_site() -> None:
    reports = [
        RobotReport(site=f"s{i % 3}", robot=f"r{i}", t_unix_ns=T0, loaded_digest=CURRENT) for i in range(30)
    ]
    bounds = site_limits(RID, reports, 2)
    release = Release(group=Group.CANARY, digest=CANDIDATE, rollout_id=RID, site_below=bounds)
    for s in ("s0", "s1", "s2"):
        assert sum(release.admits(r.robot, r.site) for r in reports if r.site == s) == 2
    assert site_limits(RID, reports, 0) == {}


def test_robots_are_heard_by_the_stores_clock_not_their_own() -> None:
    wrong = RobotReport(site="s", robot="r1", t_unix_ns=T0 - 10**15, loaded_digest=CURRENT)
    inputs = Inputs(robots=(wrong,), heard={"r1": T0}, shadow=(), batches=(), ignored=())
    assert sum_up(state(cohort_below=EVERYONE), inputs, None, CURRENT, "", T0).fleet.fresh == 1
    late = inputs.model_copy(update={"heard": {"r1": T0 - 10**15}})
    assert sum_up(state(cohort_below=EVERYONE), late, None, CURRENT, "", T0).fleet.fresh == 0


class AnyFleet(RuleBasedStateMachine):
    """Robots, people and time in any order: no robot runs what was not released for it."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="any-fleet-"))
        self.site = Site(self.root)
        self.site.settings = self.site.settings.model_copy(update={"waves": (0.6, 1.0)})
        self.site.start()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(name=st.sampled_from(Site.names))
    def robot_looks(self, name: str) -> None:
        self.site.poll((name,))

    @rule(good=st.sampled_from([0.9, 0.9, 0.0]))
    def fleet_works(self, good: float) -> None:
        self.site.shadow()
        self.site.work(20, good, 0.4)

    @rule()
    def wheel_looks(self) -> None:
        self.site.look()

    @rule(decision=st.sampled_from(list(rollout.Decision)))
    def person_decides(self, decision: rollout.Decision) -> None:
        with suppress(StageError):
            say(self.site, decision)

    @rule()
    def stranger_writes_an_approval(self) -> None:
        s = rollout.status(self.site.store, self.site.id).state
        forged = approval(s)
        self.site.store.put(f"{s.prefix}/approvals/{forged.digest}.json", forged.to_bytes())

    @invariant()
    def nothing_runs_that_nobody_let_run(self) -> None:
        states = rollout.history(self.site.store, self.site.id)
        acted = any(s.stage is RolloutStage.CANARY for s in states)
        wide = max((s.below for s in states if s.stage is RolloutStage.WIDE), default=0)
        assert not wide or any(s.approved_by for s in states)
        for name in self.site.names:
            slots = json.loads((self.root / name / "slots.json").read_bytes())
            digest = bundle_digest(self.root / name / "slots" / slots["active"])
            assert digest in (bundle_digest(self.site.base), self.site.candidate)
            if digest == self.site.candidate:
                draw = cohort_draw(self.site.id, name)
                assert draw < max(states[0].cohort_below if acted else 0, wide), f"{name} runs it unasked"


TestAnyFleet = AnyFleet.TestCase
TestAnyFleet.settings = hypothesis_settings(max_examples=6, stateful_step_count=12, deadline=None)
