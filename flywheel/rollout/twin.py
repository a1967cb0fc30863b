"""How far the twin may be trusted: what it said of past releases against what the robots then did.

    fleet/twin/<rollout id>.json   one ``TwinOutcome`` of each rollout that came as far as a canary

A twin that orders policies wrongly makes the gate's word worth less, so a rollout then asks its canary for
more (``demand``). It never asks for less than the settings do: nothing here is signed.
"""

from __future__ import annotations

from contextlib import suppress

from flywheel import stats
from flywheel.config import RolloutSettings
from flywheel.errors import Conflict
from flywheel.rollout.documents import TWIN_PREFIX, RolloutState, TwinOutcome, TwinTrust
from flywheel.rollout.evidence import read_documents
from flywheel.schema import GateReport
from flywheel.store import Store

LEAST_EPISODES = 8  # of a policy on the robots; fewer say nothing of how good it is


def outcome(state: RolloutState, gate: GateReport) -> TwinOutcome | None:
    """What a rollout that is over has to tell; None if the robots tried too little, or the gate is silent."""
    if not state.over or state.evidence is None:
        return None
    robots = state.evidence.candidate
    compared = (c for c in gate.checks if c.name.startswith("success in ") and "candidate" in c.evidence)
    check = next(compared, None)
    if check is None or robots.episodes < LEAST_EPISODES:
        return None
    twin = check.evidence["candidate"].get("success", {})
    if not isinstance(twin.get("mean"), (int, float)) or not isinstance(twin.get("n"), int) or twin["n"] < 1:
        return None
    return TwinOutcome(
        rollout_id=state.rollout_id,
        bundle_digest=state.bundle_digest,
        check=check.name,
        twin=float(twin["mean"]),
        twin_n=twin["n"],
        robots=robots.successes / robots.episodes,
        robots_n=robots.episodes,
    )


def remember(store: Store, state: RolloutState, gate: GateReport | None) -> None:
    """Keep what a rollout that is over has to tell. May be called at every look."""
    if gate is None or (found := outcome(state, gate)) is None:
        return
    with suppress(Conflict):
        store.create(found.key, found.to_bytes())


def past(store: Store) -> list[TwinOutcome]:
    """Of every release that told something; one that is not understood counts for nothing."""
    return read_documents(store, TWIN_PREFIX, TwinOutcome, lambda d: d.key)[0]


def trust(outcomes: list[TwinOutcome], settings: RolloutSettings) -> TwinTrust:
    """Judge the twin. Pure."""
    n = len(outcomes)
    if n < settings.twin_releases:
        return TwinTrust(releases=n)
    twin, robots = [o.twin for o in outcomes], [o.robots for o in outcomes]
    correlation = stats.rank_correlation(twin, robots)
    violation = stats.mean_maximum_rank_violation(twin, robots)
    return TwinTrust(
        releases=n,
        rank_correlation=correlation,
        rank_violation=violation,
        bias=sum(a - b for a, b in zip(twin, robots, strict=True)) / n,
        # Policies that are all as good as each other cannot be ordered, and need not be.
        poor=violation > settings.twin_rank_violation,
    )


def demand(settings: RolloutSettings, found: TwinTrust) -> RolloutSettings:
    """The settings of a rollout, by how far the twin is trusted: more of the canary where that is poor."""
    if not found.poor:
        return settings
    more = round(settings.canary_episodes * settings.twin_poor_factor)
    return settings.model_copy(update={"canary_episodes": more})
