"""What each process of a robot does between its start and SIGTERM.

A process whose supervisor is gone goes on until another supervisor takes it over, and ends by itself if none
comes: System 1 has long come to rest by then (its ladder is taken when the heartbeat goes stale).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flywheel.edge import loop, realtime, rows
from flywheel.edge.link import load, store
from flywheel.edge.processes import (
    ACK,
    GRANT,
    SUPERVISOR_PID,
    Place,
    Plan,
    Recording,
    Shared,
    resolve,
)
from flywheel.edge.safety import SafetyLimits
from flywheel.edge.selftest import self_test
from flywheel.edge.system1 import System1
from flywheel.edge.tick import HEARTBEAT, HEARTBEAT_LIMIT_NS
from flywheel.edge.trace import tracer
from flywheel.errors import BundleError, ConfigError, FlywheelError
from flywheel.robot import Perception, Robot

RECORDER_S = 0.05  # between two looks of the recorder at its rings
TOLD_CAMPAIGNS = 16  # whose counts are told, the newest
UPLOADER_S = 1.0


class _Stop:
    """SIGTERM asks the process to end; Ctrl-C is the supervisor's to handle."""

    def __init__(self, plan: Plan, shared: Shared) -> None:
        self.asked = False
        self._commands, self._supervisor = shared.commands, shared.supervisor
        self._limit = HEARTBEAT_LIMIT_NS + round(plan.orphan_s * 1e9)
        self._parent = os.getppid()
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def orphaned(self, now_ns: int) -> bool:
        """Whether the supervisor is gone for good, and not only stalled. Asks the kernel only when silent."""
        if now_ns - self._commands[HEARTBEAT] <= self._limit:
            return False
        supervisor = int(self._supervisor[SUPERVISOR_PID])
        if supervisor == self._parent:
            return os.getppid() != supervisor
        try:
            os.kill(supervisor, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def _ask(self, *_: object) -> None:
        self.asked = True


# ── System 1 ──────────────────────────────────────────────────────────────────────────────────────────


def run_system1(plan: Plan, shared: Shared, place: Place, _generation: int) -> None:
    """Control until SIGTERM; then come to rest (category 2), remove power, and return."""
    stop = _Stop(plan, shared)
    robot: Robot = resolve(plan.robot)(plan.args, shared.world)
    system1 = System1(robot, plan.control_hz, shared.slot, shared.control, control=shared.commands, wall=True)
    period = round(1e9 / plan.control_hz)
    warm = np.zeros(realtime.STATUS_WORDS, np.int64)
    realtime.rise_at(warm.ctypes.data, period, 0)  # compiled before the clock matters
    realtime.await_deadline_at(warm.ctypes.data, period)
    trace = None if shared.trace is None else tracer(system1.reference_now, shared.trace)
    privileges = realtime.claim(plan.priority, plan.cpu)
    try:
        found = self_test(robot, plan.control_hz, shared.slot.words, shared.control.rows)
        place.tell(
            ready="system1",
            limits_sha256=robot.limits.sha256,
            privileges=privileges.as_dict(),
            self_test=found.as_dict(),
        )
        early_ns = min(round(plan.early_us * 1e3), period // 4) if plan.cpu is not None else 0
        loop.run(system1, shared.commands, place.status, period, stop, early_ns, trace)
    finally:
        robot.stop()


# ── System 2 ──────────────────────────────────────────────────────────────────────────────────────────


def run_system2(plan: Plan, shared: Shared, place: Place, generation: int) -> None:
    """See and decide at ``policy_hz`` until SIGTERM, while this generation is the one that is granted.

    Loading and warming up happen before anything is granted, beside the process that acts meanwhile.
    """
    from flywheel.edge.policy import Policy
    from flywheel.edge.system2 import System2

    stop = _Stop(plan, shared)
    if plan.others:
        os.sched_setaffinity(0, plan.others)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # loading yields to the one that acts
    policy = Policy.load(plan.bundle_dir, plan.threads)
    if plan.bundle_digest and policy.digest != plan.bundle_digest:
        raise BundleError(
            f"{plan.bundle_dir}: the loaded bytes have digest {policy.digest}, wanted {plan.bundle_digest}"
        )
    perception: Perception = resolve(plan.perception)(plan.args, shared.world)
    override = resolve(plan.operator)(plan.args, perception) if plan.operator else None
    last = shared.slot.record()
    limits = SafetyLimits.load(plan.limits)
    system2 = System2(
        perception,
        policy,
        limits,
        shared.slot.write,
        rows.EventLog(shared.events),
        shared.frames,
        95 if plan.recording is None else plan.recording.settings.quality(plan.cameras),
    )
    while load(shared.places["system1"].status, realtime.TICKS) == 0 and not stop.asked:
        time.sleep(0.01)  # a simulated robot has nothing to show before System 1 runs
    system2.self_test(plan.instruction)
    period = round(1e9 / plan.policy_hz)
    realtime.pace(np.zeros(realtime.STATUS_WORDS, np.int64), period)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    place.status[:] = 0
    store(place.words, ACK, -1)
    place.tell(ready="system2", digest=policy.digest, limits_sha256=limits.sha256)
    acting = False
    while not stop.asked:
        now, _ = realtime.pace(place.status, period)
        if stop.orphaned(now):
            return
        grant = load(shared.supervisor, GRANT)
        store(place.words, ACK, grant)  # from here on this tick, it publishes only if that is its own
        if grant != generation:
            acting = False
            continue
        if not acting:
            acting = True
            system2.chunk_id = int(last["chunk_id"][0]) if shared.slot.read(last) else -1
        system2.tick(now, plan.instruction, override)


# ── recorder and uploader ─────────────────────────────────────────────────────────────────────────────


def run_recorder(plan: Plan, shared: Shared, place: Place, _generation: int) -> None:
    """Record what fails, until SIGTERM; then seal what is open.

    One that follows a killed one goes on where that one was: rings and journal lie in the shared memory.
    """
    from flywheel import __version__
    from flywheel.edge.asked import Asked
    from flywheel.edge.recorder import Identity, Recorder
    from flywheel.edge.spool import Queue

    recording, stop = _aside(plan, shared)
    root = Path(recording.directory)
    quota = round(recording.settings.spool_quota_mb * 1e6)
    queue = Queue(root, quota)
    recorder = Recorder(
        rows.Rings(shared.control, shared.frames, shared.log),
        recording.settings,
        queue.episodes,
        Identity(
            recording.site,
            recording.robot,
            "wall",
            time.time_ns() - time.monotonic_ns(),
            __version__,
            plan.control_hz,
            plan.policy_hz,
            recording.shift,
        ),
        more_events=[shared.events],
        make_room=queue.make_room,
        background=True,
        journal=shared.journal,
    )
    told: dict[str, object] = {}
    wait = threading.Event().wait
    asked = Asked(root)
    while True:
        ending = stop.asked or stop.orphaned(time.monotonic_ns())
        now = time.monotonic_ns()
        asked.pass_on(recorder, now, time.time_ns())
        if ending:
            recorder.finish(now)
        else:
            recorder.poll(now)
        place.status[realtime.TICKS] += 1
        status = recorder.status
        news: dict[str, object] = {
            "sealed": status.sealed,
            "refused": status.refused,
            "abandoned": status.abandoned,
            "why": status.why[:500],
            "campaigns": dict(list(recorder.campaigns().items())[-TOLD_CAMPAIGNS:]),
        }
        if news != told:
            told = news
            place.tell(ready="recorder", **news)
        if ending:
            return
        wait(RECORDER_S)


def run_uploader(plan: Plan, shared: Shared, place: Place, _generation: int) -> None:
    """Bring sealed episodes into the store that the environment names, until SIGTERM."""
    from flywheel.config import Deployment
    from flywheel.edge.spool import Spool
    from flywheel.store import Store

    recording, stop = _aside(plan, shared)
    root, quota = Path(recording.directory), round(recording.settings.spool_quota_mb * 1e6)
    spool: Spool | None = None
    uploaded = 0
    while not stop.asked and not stop.orphaned(time.monotonic_ns()):
        try:
            if spool is None:
                spool = Spool(
                    root,
                    Store.from_env(Deployment.from_env()),
                    quota,
                    robot=recording.robot,
                    metered=lambda: recording.settings.link_priority,
                )
            result = spool.upload_once(time.monotonic_ns())
        except ConfigError:
            raise
        except (FlywheelError, OSError) as e:  # no store yet, no disk: the episodes wait
            place.tell(ready="uploader", uploaded=uploaded, waiting=-1, problem=str(e)[:500])
        else:
            uploaded += len(result.uploaded)
            problem = next(iter(result.problems.values()), "")
            place.tell(ready="uploader", uploaded=uploaded, waiting=result.waiting, problem=problem[:500])
        place.status[realtime.TICKS] += 1
        time.sleep(UPLOADER_S)


def _aside(plan: Plan, shared: Shared) -> tuple[Recording, _Stop]:
    """Out of the way of everything that moves the robot."""
    if plan.recording is None:
        raise ConfigError("plan.recording: missing; give it a directory")
    stop = _Stop(plan, shared)
    if plan.others:
        os.sched_setaffinity(0, plan.others)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # it never interrupts System 2
    return plan.recording, stop


ROLES: dict[str, Callable[[Plan, Shared, Place, int], None]] = {
    "system1": run_system1,
    "system2": run_system2,
    "recorder": run_recorder,
    "uploader": run_uploader,
}
