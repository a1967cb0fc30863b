"""One episode explained to a technician: what happened, when, what it is like, what the policy's actions
depended on, and what the control loop saw.
"""

from flywheel.explain.attention import Attention, attend
from flywheel.explain.control import Control, controlled
from flywheel.explain.neighbours import Neighbour, Neighbours, nearest
from flywheel.explain.page import Explanation, Moment, explain, write_html

__all__ = [
    "Attention",
    "Control",
    "Explanation",
    "Moment",
    "Neighbour",
    "Neighbours",
    "attend",
    "controlled",
    "explain",
    "nearest",
    "write_html",
]
