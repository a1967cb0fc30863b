"""A twin that orders policies wrongly, or moves otherwise than the robots, is found out, and makes rollouts
ask their canary for more."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from flywheel import rollout
from flywheel.config import RolloutSettings
from flywheel.errors import StageError
from flywheel.rehearsal.rollouts import RolloutSite
from flywheel.rollout import twin
from flywheel.rollout.documents import TwinOutcome, TwinReplay
from flywheel.schema import Check, GateReport, Verdict, bundle_digest, sha256_bytes
from flywheel.stats import mean_maximum_rank_violation, rank_correlation

SETTINGS = RolloutSettings()
TWIN = "77" * 32
GOOD_ORDER = ((0.9, 0.8), (0.7, 0.6), (0.5, 0.4), (0.3, 0.2))
values = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12)


def told(*pairs: tuple[float, float]) -> list[TwinOutcome]:
    return [
        TwinOutcome(
            rollout_id=f"{i:012x}-{i:012x}",
            bundle_digest=f"{i:064x}",
            check="success in factory",
            twin=a,
            twin_n=60,
            robots=b,
            robots_n=24,
        )
        for i, (a, b) in enumerate(pairs)
    ]


def replayed(worst: float | None = 0.01, episodes: int = 12, digest: str = TWIN) -> TwinReplay:
    return TwinReplay(
        twin_digest=digest,
        t_unix_ns=1,
        episodes=episodes,
        window_s=0.5,
        errors={"q": 0.001, "dq": worst, "tool": 0.002},
    )


def test_rank_violation_of_a_worked_example() -> None:
    # Policies 1 and 2 swapped: each loses 0.3 by it; policy 0 is in order.
    assert mean_maximum_rank_violation([0.1, 0.9, 0.5], [0.2, 0.5, 0.8]) == pytest.approx((0 + 0.3 + 0.3) / 3)


@given(values)
def test_rank_violation_is_zero_for_the_same_order_and_bounded_by_the_range(
    pairs: list[tuple[float, float]],
) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    assert mean_maximum_rank_violation(b, b) == 0.0
    # a mean of equal numbers may differ from them by its rounding
    assert 0.0 <= mean_maximum_rank_violation(a, b) <= (max(b) - min(b)) * (1 + 1e-12)
    assert mean_maximum_rank_violation([2 * x - 7 for x in b], b) == pytest.approx(0.0, abs=1e-9)


@given(values)
def test_rank_correlation_is_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)


def test_few_releases_judge_nothing_and_demand_no_more() -> None:
    found = twin.trust(told((0.9, 0.1), (0.1, 0.9)), SETTINGS)
    assert found.poor is None
    assert twin.demand(SETTINGS, found) == SETTINGS


def test_a_twin_that_orders_policies_wrongly_doubles_the_canary() -> None:
    found = twin.trust(told((0.9, 0.2), (0.7, 0.9), (0.8, 0.5), (0.6, 0.7)), SETTINGS)
    assert found.poor
    assert "poorly trusted" in found.sentence()
    assert twin.demand(SETTINGS, found).canary_episodes == 2 * SETTINGS.canary_episodes


def test_an_order_among_equals_costs_no_trust() -> None:
    pairs = told((0.90, 0.91), (0.91, 0.90), (0.3, 0.2), (0.92, 0.89))
    found = twin.trust(pairs, SETTINGS, replayed(), TWIN)
    assert found.poor is False


def test_a_bias_that_keeps_the_order_is_told_and_demands_no_more() -> None:
    pairs = told((0.95, 0.75), (0.85, 0.65), (0.75, 0.55), (0.65, 0.45))
    found = twin.trust(pairs, SETTINGS, replayed(), TWIN)
    assert found.poor is False
    assert found.bias == pytest.approx(0.2)


@pytest.mark.parametrize(
    "replay",
    [
        None,
        replayed(digest="88" * 32),
        replayed(worst=None),
        replayed(episodes=twin.LEAST_REPLAYS - 1),
    ],
    ids=["none", "of another twin", "of an arm that stood still", "of too few episodes"],
)
def test_missing_replay_evidence_is_no_trust_and_no_blame(replay: TwinReplay | None) -> None:
    found = twin.trust(told(*GOOD_ORDER), SETTINGS, replay, TWIN)
    assert found.poor is None
    assert "not judged yet" in found.sentence()
    assert twin.demand(SETTINGS, found) == SETTINGS


def test_a_twin_that_moves_otherwise_than_the_robots_doubles_the_canary_however_well_it_orders() -> None:
    astray = replayed(worst=SETTINGS.twin_replay_error + 0.01)
    for outcomes in (told(*GOOD_ORDER), []):
        found = twin.trust(outcomes, SETTINGS, astray, TWIN)
        assert found.poor
        assert found.replay_error == astray.worst
        assert twin.demand(SETTINGS, found).canary_episodes == 2 * SETTINGS.canary_episodes
    assert "poorly trusted" in found.sentence()


def test_a_good_replay_does_not_outweigh_a_wrong_order_nor_stand_for_releases() -> None:
    wrong = told((0.9, 0.2), (0.7, 0.9), (0.8, 0.5), (0.6, 0.7))
    assert twin.trust(wrong, SETTINGS, replayed(), TWIN).poor is True
    assert twin.trust([], SETTINGS, replayed(), TWIN).poor is None
    assert twin.trust(told(*GOOD_ORDER), SETTINGS, replayed(), TWIN).poor is False


@given(values, st.one_of(st.none(), st.floats(0, 1)), st.integers(1, 20))
def test_replay_evidence_never_lowers_what_the_canary_must_show(
    pairs: list[tuple[float, float]], worst: float | None, episodes: int
) -> None:
    without = twin.demand(SETTINGS, twin.trust(told(*pairs), SETTINGS))
    found = twin.trust(told(*pairs), SETTINGS, replayed(worst, episodes), TWIN)
    assert twin.demand(SETTINGS, found).canary_episodes >= without.canary_episodes >= SETTINGS.canary_episodes
    assert found.sentence()


class Site(RolloutSite):
    """Its gate report says how the candidate did in the twin."""

    def report(self, verdict: Verdict = Verdict.PROMOTE, candidate: str = "", note: str = "") -> str:
        evidence = {"candidate": {"success": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 40, "k": 36}}}
        check = Check(name="success in factory", verdict=verdict, value=0.3, bar="> 0", evidence=evidence)
        about = {"twin_digest": TWIN}
        bundle = Check(name="bundle", verdict=Verdict.PROMOTE, value=0, bar="", n=1, evidence=about)
        report = GateReport(
            candidate_digest=candidate or self.candidate,
            current_digest=bundle_digest(self.base),
            checks=(check, bundle),
            verdict=verdict,
            reasons=(note,) * bool(note),
        )
        self.store.put(f"gates/{(digest := sha256_bytes(report.to_bytes()))}.json", report.to_bytes())
        return digest


def test_a_rollout_leaves_what_the_twin_said_beside_what_the_robots_did(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.to_approval()
    rollout.approve(
        site.store, site.publisher, site.id, rollout.Decision.ROLL_BACK, "op", clock_ns=site.clock
    )
    assert twin.past(site.store) == [], "it is not over yet"
    site.look()
    (found,) = twin.past(site.store)
    assert (found.rollout_id, found.twin, found.twin_n) == (site.id, 0.9, 40)
    assert found.robots_n >= twin.LEAST_EPISODES
    site.look()
    assert twin.past(site.store) == [found]


def test_a_rollout_under_a_poor_twin_says_so_and_asks_for_more(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for t in told((0.9, 0.2), (0.7, 0.9), (0.8, 0.5), (0.6, 0.7)):
        site.store.put(t.key, t.to_bytes())
    site.store.put("fleet/twin/damaged.json", b"{")
    state = rollout.start(
        site.store, site.publisher, site.candidate, site.gate, site.settings, clock_ns=site.clock
    )
    assert state.twin_trust is not None
    assert state.twin_trust.poor
    assert state.settings.canary_episodes == 2 * site.settings.canary_episodes
    assert "the twin is poorly trusted" in state.reason


def test_a_rollout_asks_for_more_where_the_gates_twin_moved_otherwise_than_the_robots(tmp_path: Path) -> None:
    site = Site(tmp_path)
    twin.keep(site.store, replayed(worst=0.01, digest="88" * 32))
    twin.keep(site.store, replayed(worst=0.4))
    state = rollout.start(
        site.store, site.publisher, site.candidate, site.gate, site.settings, clock_ns=site.clock
    )
    assert state.twin_trust is not None
    assert (state.twin_trust.twin_digest, state.twin_trust.replay_error) == (TWIN, 0.4)
    assert state.settings.canary_episodes == 2 * site.settings.canary_episodes
    assert "replay error 40 % of range" in state.reason


def test_a_replay_document_that_is_damaged_or_misplaced_is_no_evidence(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert twin.replayed(site.store, TWIN) is None
    site.store.put(replayed().key, b"{")
    assert twin.replayed(site.store, TWIN) is None
    site.store.put(replayed().key, replayed(digest="88" * 32).to_bytes())
    assert twin.replayed(site.store, TWIN) is None
    twin.keep(site.store, replayed())
    assert twin.replayed(site.store, TWIN) == replayed()
    assert twin.replayed(site.store, "") is None


def test_a_replay_without_the_window_by_which_twins_are_judged_is_not_kept() -> None:
    from flywheel.twin.replay import Replay

    with pytest.raises(StageError, match=r"judged by q, dq and tool over 0\.5 s"):
        twin.evidence(Replay(twin_digest=TWIN, episodes={"e": TWIN}, robots=(), seconds={}, errors=()), 1)
