"""The fleet page: robots, rollouts, failures and turns, as the store has them now.

app         routes, headers, errors: one application, for Airflow's UI (``dags/fleet_page.py``) or on its own
pages       what each route answers; rendering: templates, notices, links
standalone  the same on loopback, behind an address that works once
source      the store and what is kept of it; kept: how it is kept
robots      what every robot last said; its tails in the rollout under way
rollouts    decisions with their evidence, signatures checked
failures    what waits and what turns took; episodes: one of them, drawn
turns       what went in, what came out, success by shift
shown       numbers, times and marks in words; paging: the bounds of a request

It reads, and changes nothing. It holds no truth of its own: whatever it shows was read by the product's own
readers and can be read again without it.
"""

from flywheel.page.app import build
from flywheel.page.source import Source

__all__ = ["Source", "build"]
