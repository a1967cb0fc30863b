"""What a deployment needs between turns: releases that do not expire, and robots, turns and failures that
nobody forgets.

Each part may run at any time, as often as anybody likes, and beside everything else. ``renew`` and ``clear``
mend by themselves what needs no decision; ``attention`` finds what a person should look at.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from flywheel.claims import backlog, settle
from flywheel.config import Deployment, Settings
from flywheel.errors import StageError
from flywheel.release import Publisher
from flywheel.rollout import active_rollout
from flywheel.rollout.evidence import read_documents
from flywheel.schema import Group, RobotReport
from flywheel.store import Store
from flywheel.turn import open_turns, unopened_turns
from flywheel.workspace import Workspace

NAMED = 5  # in one sentence; a person looks at the fleet page for the others
PROBE_S = 3600.0  # what a probe left behind for so long, nobody will remove
LATE_FACTOR = 3.0  # times trigger.max_wait_s: failures that wait for longer are not being looked at


@dataclass(frozen=True)
class Alarm:
    """One thing that a person should look at: what it is, whom it concerns, what to do."""

    what: str
    who: tuple[str, ...]
    remedy: str

    def line(self) -> str:
        """One line."""
        more = f" and {len(self.who) - NAMED} more" if len(self.who) > NAMED else ""
        return f"{self.what}: {', '.join(self.who[:NAMED])}{more}; {self.remedy}"


def renew(publisher: Publisher) -> float:
    """Sign anew what has passed half of its life; the hours for which robots take what is signed now.

    Robots whose metadata expire keep what they run and take nothing new, not even a way back. Raises
    ``ReleaseError`` where the keys are not here.
    """
    publisher.refresh()
    left = publisher.load().timestamp.expires - publisher.clock()
    return left.total_seconds() / 3600.0


def attention(store: Store, publisher: Publisher, settings: Settings, now: datetime) -> list[Alarm]:
    """Everything that a person should look at, worst first. ``now`` is compared with the store's times."""
    watch, now_ns = settings.watch, round(now.timestamp() * 1e9)
    reports, arrived, ignored = read_documents(
        store, "fleet/robots/", RobotReport, lambda r: f"fleet/robots/{r.robot}.json"
    )
    since = now_ns - settings.rollout.silence_s * 1e9
    heard = [r for r in reports if arrived[f"fleet/robots/{r.robot}.json"] >= since]
    silent = sorted({r.robot for r in reports} - {r.robot for r in heard})
    signed = publisher.load()
    digests = {r.digest for g in Group if (r := signed.release(g)[0]) is not None}
    plan = signed.plan()
    strays = [
        r.robot for r in heard if not (r.loaded_digest in digests or plan.excepts(r.robot, r.site, now_ns))
    ]
    if active_rollout(store, publisher) is not None:
        strays = []  # robots are on their way
    alarms = [
        _alarm("silent", silent, "look at its network and its power; delete the report of a retired robot"),
        _alarm(
            "gave a release back that is still offered",
            (r.robot for r in heard if r.refused_digest in digests),
            "its report says why (refused_reason)",
        ),
        _alarm("runs a policy that nobody offers it", strays, "its updater's log says what is in the way"),
        _alarm(
            f"misses more than {watch.max_misses_ppm:g} of a million deadlines",
            (r.robot for r in heard if (r.misses_ppm or 0.0) > watch.max_misses_ppm),
            "look for what else runs on its computer; `flywheel bench tracking` there",
        ),
        _alarm(
            f"holds more than {watch.max_pending} episodes that are not in the store",
            (r.robot for r in heard if r.spool_pending > watch.max_pending),
            "look at its link, its keys and the store",
        ),
        _alarm("report not understood", ignored, "update this side, or that robot"),
        _alarm(
            f"turn without an end for {watch.turn_s / 3600:g} h",
            (t.turn for t in open_turns(store) if now_ns - t.opened_unix_ns > watch.turn_s * 1e9),
            "clear its failed task in Airflow, and it goes on from there",
        ),
    ]
    late_s = LATE_FACTOR * settings.trigger.max_wait_s
    lost = [n for n, at in unopened_turns(store).items() if (now - at).total_seconds() > late_s]
    remedy = "clear `open` of its run of `collect` in Airflow, and it goes on from there"
    alarms.append(_alarm("claimed failures and was never opened", lost, remedy))
    waiting = backlog(store, now)
    if waiting.count and waiting.oldest_s > late_s:
        waits = f"{waiting.count}, the oldest for {waiting.oldest_s / 3600:.1f} h"
        remedy = "is Airflow's triggerer up, and a turn in `improve` that waits or trains? `flywheel doctor`"
        alarms.append(Alarm("failures that no turn takes", (waits,), remedy))
    return [a for a in alarms if a.who]


def _alarm(what: str, who: Iterable[str], remedy: str) -> Alarm:
    return Alarm(what, tuple(sorted(who)), remedy)


def clear(store: Store, deployment: Deployment, settings: Settings, now: datetime) -> list[str]:
    """Finish claims that a dead turn left half done, and remove what nobody needs; a line for each.

    Episodes, datasets, bundles, reports and approvals are evidence, and stay. A workspace can be made again
    from the store at any time.
    """
    done = []
    settle(store)
    for info in store.list("probe/"):
        if (now - info.modified).total_seconds() > PROBE_S:
            store.delete(info.key)
            done.append(f"removed {info.key}, which a probe had left")
    unfinished = {t.turn for t in open_turns(store)}
    for path in sorted((deployment.home / "runs").glob("turn-*")):
        age_s = now.timestamp() - path.stat().st_mtime
        if path.name in unfinished or age_s < settings.watch.keep_runs_s:
            continue
        try:
            with Workspace(path.name, deployment).lock():
                shutil.rmtree(path)
        except StageError:
            continue  # somebody works in it
        done.append(f"removed the workspace of {path.name}, {age_s / 86400:.1f} days old")
    return done
