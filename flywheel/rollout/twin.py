"""How far the twin may be trusted: what it said of past releases against what the robots then did, and how
far it is from recorded episodes that it replays.

    fleet/twin/<rollout id>.json            one ``TwinOutcome`` of each rollout that came as far as a canary
    fleet/twin-replay/<twin digest>.json    the newest ``TwinReplay`` of a twin

A twin that orders policies wrongly, or moves otherwise than the robots, makes the gate's word worth less, so
a rollout then asks its canary for more (``demand``). It never asks for less than the settings do: nothing
here is signed.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

from pydantic import ValidationError

from flywheel import stats
from flywheel.config import RolloutSettings
from flywheel.errors import Conflict, IntegrityError, NotFound, StageError
from flywheel.rollout.documents import (
    REPLAY_PREFIX,
    TWIN_PREFIX,
    RolloutState,
    TwinOutcome,
    TwinReplay,
    TwinTrust,
)
from flywheel.rollout.evidence import read_documents
from flywheel.schema import DIGEST, GateReport
from flywheel.store import Store

if TYPE_CHECKING:
    from flywheel.twin.replay import Replay

LEAST_REPLAYS = 3  # episodes; fewer may speak against a twin, not for it
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


def evidence(replay: Replay, t_unix_ns: int) -> TwinReplay:
    """What of a replay counts. ``StageError`` if it has no window of the length by which twins are judged."""
    from flywheel.twin.replay import TRUST_WINDOW_S

    judged = {e.signal: e.normalised for e in replay.errors if e.window_s == TRUST_WINDOW_S}
    found = TwinReplay(
        twin_digest=replay.twin_digest,
        t_unix_ns=t_unix_ns,
        episodes=len(replay.episodes),
        robots=replay.robots,
        window_s=TRUST_WINDOW_S,
        errors={s: judged.get(s) for s in ("q", "dq", "tool")},
    )
    if found.worst is None:
        raise StageError(
            f"errors = {found.errors}: a twin is judged by q, dq and tool over {TRUST_WINDOW_S:g} s; replay "
            "more episodes, in which the arm moves freely for so long"
        )
    return found


def keep(store: Store, found: TwinReplay) -> None:
    """Put it where rollouts look for it, in the place of an earlier one of the same twin."""
    store.put(found.key, found.to_bytes())


def used_by(gate: GateReport) -> str:
    """Digest of the twin that a gate used; "" if its report does not say."""
    said = next((c.evidence.get("twin_digest") for c in gate.checks if c.name == "bundle"), None)
    return said if isinstance(said, str) and re.match(DIGEST, said) else ""


def replayed(store: Store, twin_digest: str) -> TwinReplay | None:
    """The newest replay of a twin; None if there is none that is understood."""
    if not twin_digest:
        return None
    try:
        found = TwinReplay.model_validate_json(store.get(f"{REPLAY_PREFIX}{twin_digest}.json"))
    except (NotFound, IntegrityError, ValidationError):
        return None
    return found if found.twin_digest == twin_digest else None


def trust(
    outcomes: list[TwinOutcome],
    settings: RolloutSettings,
    replay: TwinReplay | None = None,
    twin_digest: str = "",
) -> TwinTrust:
    """Judge the twin of a digest. Pure. A replay of another twin counts for nothing, and none at all for no
    trust."""
    n = len(outcomes)
    found = TwinTrust(releases=n, twin_digest=twin_digest)
    disordered: bool | None = None
    if n >= settings.twin_releases:
        twin, robots = [o.twin for o in outcomes], [o.robots for o in outcomes]
        violation = stats.mean_maximum_rank_violation(twin, robots)
        # Policies that are all as good as each other cannot be ordered, and need not be.
        disordered = violation > settings.twin_rank_violation
        found = found.model_copy(
            update={
                "rank_correlation": stats.rank_correlation(twin, robots),
                "rank_violation": violation,
                "bias": sum(a - b for a, b in zip(twin, robots, strict=True)) / n,
            }
        )
    astray: bool | None = None
    if replay is not None and replay.twin_digest == twin_digest and replay.worst is not None:
        astray = replay.worst > settings.twin_replay_error
        found = found.model_copy(
            update={"replay_error": replay.worst, "replay_episodes": replay.episodes},
        )
        if not astray and replay.episodes < LEAST_REPLAYS:
            astray = None
    poor = True if disordered or astray else None if None in (disordered, astray) else False
    return found.model_copy(update={"poor": poor})


def demand(settings: RolloutSettings, found: TwinTrust) -> RolloutSettings:
    """The settings of a rollout, by how far the twin is trusted: more of the canary where that is poor."""
    if not found.poor:
        return settings
    more = round(settings.canary_episodes * settings.twin_poor_factor)
    return settings.model_copy(update={"canary_episodes": more})
