"""A twin that orders policies wrongly is found out, and makes rollouts ask their canary for more."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from flywheel import rollout
from flywheel.config import RolloutSettings
from flywheel.rehearsal.rollouts import RolloutSite
from flywheel.rollout import twin
from flywheel.rollout.documents import TwinOutcome
from flywheel.schema import Check, GateReport, Verdict, bundle_digest, sha256_bytes
from flywheel.stats import mean_maximum_rank_violation, rank_correlation

SETTINGS = RolloutSettings()
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


def test_rank_violation_of_a_worked_example() -> None:
    # Policies 1 and 2 swapped: each loses 0.3 by it; policy 0 is in order.
    assert mean_maximum_rank_violation([0.1, 0.9, 0.5], [0.2, 0.5, 0.8]) == pytest.approx((0 + 0.3 + 0.3) / 3)


@given(values)
def test_rank_violation_is_zero_for_the_same_order_and_bounded_by_the_range(
    pairs: list[tuple[float, float]],
) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    assert mean_maximum_rank_violation(b, b) == 0.0
    assert 0.0 <= mean_maximum_rank_violation(a, b) <= max(b) - min(b)
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
    found = twin.trust(told((0.90, 0.91), (0.91, 0.90), (0.3, 0.2), (0.92, 0.89)), SETTINGS)
    assert found.poor is False


def test_a_bias_that_keeps_the_order_is_told_and_demands_no_more() -> None:
    found = twin.trust(told((0.95, 0.75), (0.85, 0.65), (0.75, 0.55), (0.65, 0.45)), SETTINGS)
    assert found.poor is False
    assert found.bias == pytest.approx(0.2)


class Site(RolloutSite):
    """Its gate report says how the candidate did in the twin."""

    def report(self, verdict: Verdict = Verdict.PROMOTE, candidate: str = "", note: str = "") -> str:
        evidence = {"candidate": {"success": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 40, "k": 36}}}
        check = Check(name="success in factory", verdict=verdict, value=0.3, bar="> 0", evidence=evidence)
        report = GateReport(
            candidate_digest=candidate or self.candidate,
            current_digest=bundle_digest(self.base),
            checks=(check,),
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
