"""How a candidate reaches the fleet: shadow → canary → approval → wide → done, or back.

documents   what a rollout's log holds: state, evidence, approval
rules       decide(state, evidence, approvals, now) -> next state; pure
evidence    what the robots reported, read from the store and summed up
stage       start, look, approve, status: the store and the publisher around the rules
"""

from flywheel.rollout.documents import Approval, Evidence, RolloutState
from flywheel.rollout.rules import decide
from flywheel.rollout.stage import (
    Look,
    RolloutStatus,
    active_rollout,
    approve,
    history,
    look,
    start,
    status,
)

__all__ = [
    "Approval",
    "Evidence",
    "Look",
    "RolloutState",
    "RolloutStatus",
    "active_rollout",
    "approve",
    "decide",
    "history",
    "look",
    "start",
    "status",
]
