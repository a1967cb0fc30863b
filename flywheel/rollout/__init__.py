"""How a candidate reaches the fleet: shadow → canary → approval → wide → done, or back.

documents   what a rollout's log holds: state, evidence, approval
rules       decide(state, evidence, approvals, now) -> next state; pure
words       people's words and the decisions, signed
evidence    what the robots reported, read from the store and summed up
stage       start, look, approve, status: the store and the publisher around the rules
"""

from flywheel.rollout.documents import Approval, Decision, Evidence, RolloutState
from flywheel.rollout.evidence import Evidences
from flywheel.rollout.rules import decide
from flywheel.rollout.stage import (
    Look,
    RolloutStatus,
    active_rollout,
    approve,
    history,
    look,
    require_approval,
    reseal,
    start,
    status,
)

__all__ = [
    "Approval",
    "Decision",
    "Evidence",
    "Evidences",
    "Look",
    "RolloutState",
    "RolloutStatus",
    "active_rollout",
    "approve",
    "decide",
    "history",
    "look",
    "require_approval",
    "reseal",
    "start",
    "status",
]
