"""The runtime on the wall clock: starts the processes of a robot, watches them, and sums up what they did.

The supervisor is ordinary Python at ordinary priority. It may stall or be killed: System 1 sees its
heartbeat go stale and ramps to rest; another supervisor with the same state directory takes it over, and
without one it ends. System 2 may stall, crash or be killed: System 1 walks down the stale ladder, and
the supervisor starts System 2 again with growing pauses, or falls back to the previous policy. The recorder
and the uploader only read. Leaving ``Wall``, by whatever way but SIGKILL, ends them all, System 1 at rest.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pydantic import ValidationError

from flywheel.edge import realtime
from flywheel.edge.children import Child, Kept, ProcessRecord, Watched, started_at
from flywheel.edge.figures import Figures, Quantiles, WallResult
from flywheel.edge.handover import Found, RuntimeRecord, StateDirectory, boot_id
from flywheel.edge.link import Arena, Ring, load
from flywheel.edge.link import store as store_word
from flywheel.edge.policies import Policies
from flywheel.edge.processes import SUPERVISOR_PID, BundleRef, Plan, Shared
from flywheel.edge.rows import EventLog, Rings, event_dtype
from flywheel.edge.safety import CATEGORY_2
from flywheel.edge.supervision import SupervisionSettings
from flywheel.edge.tick import COMMAND, HEARTBEAT, RESET
from flywheel.errors import BundleError, ConfigError, ServiceError
from flywheel.schema import Bundle, bundle_digest

__all__ = ["Quantiles", "Wall", "WallResult", "bundle_ref", "read_bundle", "run_wall", "twin_plan"]

STEP_S = 0.05  # between two looks of the supervisor
ORPHAN_S = 30.0  # how long a robot with a state directory waits for another supervisor
# A twin on the wall clock: its physics lie in System 1's process, its eyes in System 2's.
TWIN_ROBOT = "flywheel.robot.twin:wall_robot"
TWIN_PERCEPTION = "flywheel.robot.twin:wall_perception"


class Wall:
    """A running robot; use as a context manager.

    ``events`` are on ``rings.events``: mode changes, crashes, changes of policy; System 2's own are on
    ``shared.events``. The clock is CLOCK_MONOTONIC (``time.monotonic_ns``). With ``state``, a directory of
    this robot's own, a supervisor that follows a killed one takes over the running robot
    (``taken_over``). ``told`` hears what a robot's disk should follow (see ``Policies``); ``previous`` is
    what to fall back to from the first moment on, ``trial`` whether the plan's own bundle is on trial.
    """

    def __init__(
        self,
        plan: Plan,
        restart: bool = True,
        state: Path | None = None,
        told: Callable[[str, str, str], None] = lambda *_: None,
        previous: BundleRef | None = None,
        trial: bool = False,
    ) -> None:
        self._directory = None if state is None else StateDirectory(state)
        try:
            if state is not None and plan.orphan_s == 0.0:
                plan = plan.model_copy(update={"orphan_s": ORPHAN_S})
            record = None if self._directory is None else self._directory.read()
            self._found = None if record is None else Found.look(record, plan)
            if self._found is None and record is not None:
                _sweep(record)
        except BaseException:
            if self._directory is not None:
                self._directory.close()
            raise
        self.plan = plan
        self.taken_over = self._found is not None
        if self._found is not None:
            self._arena = self._found.arena
            self._arena_fd = self._found.record.arena_fd
        else:
            self._arena = Arena.create("flywheel-edge", Shared.nbytes(plan))
            self._arena_fd = self._arena.fd
        self.shared = Shared(plan, self._arena)
        if self._found is None:
            self.shared.sign(secrets.randbits(62) + 1)
        self.rings = Rings(self.shared.control, self.shared.frames, self.shared.log)
        self.events = EventLog(self.rings.events)
        self._stats = Figures(self.shared, round(1e9 / plan.control_hz), self.events)
        self._system1: Watched | None = None
        self.policies = Policies(plan, self.shared, self._arena, self._tell, restart, told, previous, trial)
        self._kept: list[Kept] = []
        if plan.recording is not None:
            roles = ("recorder", "uploader") if plan.recording.upload else ("recorder",)
            for role in roles:
                tell = lambda name, detail: self._tell("plant", name, detail)  # noqa: E731
                self._kept.append(Kept(role, plan.supervision, self._spawn, tell, beats=role == "recorder"))
        self._handlers: dict[signal.Signals, Any] = {}
        self._me = ProcessRecord(
            role="supervisor", place="", generation=0, pid=os.getpid(), started=started_at(os.getpid()) or 0
        )
        self._acknowledged = False
        _warm_up()

    # ── what it says of itself ───────────────────────────────────────────────────────────────────────

    @property
    def system1_pid(self) -> int:
        """Process id of System 1."""
        assert self._system1 is not None
        return self._system1.child.pid

    @property
    def system2_pid(self) -> int:
        """Process id of the acting System 2; 0 between two."""
        return self.policies.acting.child.pid if self.policies.acting is not None else 0

    def pid(self, role: str) -> int:
        """Process id of the recorder or the uploader; 0 while it is not running."""
        kept = next(k for k in self._kept if k.role == role)
        return kept.watched.child.pid if kept.watched is not None else 0

    @property
    def restarts(self) -> int:
        """How often System 2 was started again."""
        return self.policies.restarts

    @property
    def told(self) -> dict[str, dict[str, Any]]:
        """What each process last said of itself."""
        said = {} if self._system1 is None else {"system1": self._system1.said}
        if self.policies.acting is not None:
            said["system2"] = {"digest": self.policies.loaded, **self.policies.acting.said}
        elif self.policies.loaded:
            said["system2"] = {"digest": self.policies.loaded}
        return said | {k.role: k.watched.said for k in self._kept if k.watched is not None}

    def status(self) -> dict[str, Any]:
        """The robot now, for its report, its metrics and the log."""
        p = self.policies
        return {
            "mode": self._stats.mode.name.lower(),
            "digest": p.loaded,
            "previous": p.previous.digest if p.previous is not None else "",
            "trial": p.trial,
            "refused": p.refusal.digest if p.refusal is not None else "",
            "refused_reason": p.refusal.reason if p.refusal is not None else "",
            "swaps": p.swaps,
            "fall_backs": p.fall_backs,
            "restarts": {"system2": p.restarts} | {k.role: k.restarts for k in self._kept},
            "pids": {r.role if i else "system1": r.pid for i, r in enumerate(self._records())},
            "recorder": self.told.get("recorder", {}),
            "uploader": self.told.get("uploader", {}),
        }

    @property
    def figures(self) -> Figures:
        """What was summed up so far."""
        return self._stats

    # ── running ──────────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt),
                signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._acknowledge),
            }
        try:
            if self._found is not None:
                self._take_over(self._found)
            else:
                self._start()
            self._remember()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> WallResult:
        """Watch for ``seconds``, or until ``until`` (asked every 50 ms) says so; sums up since the start.

        Raises ``ServiceError`` if System 1 ends by itself.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.step()
            if until is not None and until():
                break
            time.sleep(min(STEP_S, left))
        self.step()
        return self.result()

    def step(self) -> None:
        """One look: heartbeat, rings, processes."""
        self._beat()
        if self._acknowledged:
            self._acknowledged = False
            self.reset()
        infer_ms, invalid = self._stats.take()
        now_s = time.monotonic()
        assert self._system1 is not None
        if (why := self._system1.look(now_s)) is not None:
            raise ServiceError(f"System 1 {why}; see its messages")
        if self.plan.perception:
            self.policies.step(now_s, infer_ms, invalid)
        for kept in self._kept:
            kept.step(now_s)
        self._remember()

    def reset(self) -> None:
        """A person acknowledged a stop: the arm gets power and holds, once nothing asks to stop any more.

        It moves again when the policy has made good chunks for a while, as after any hold.
        """
        self._tell("plant", "reset", {})
        commands = self.shared.commands
        store_word(commands, RESET, load(commands, RESET) + 1)

    def result(self) -> WallResult:
        """The figures so far."""
        return self._stats.result(self.told, self.restarts)

    def close(self) -> None:
        """End every process; System 1 comes to rest first, and the recorder last. May be called twice."""
        if self._system1 is not None:
            self.shared.commands[COMMAND] = CATEGORY_2  # before the chunks end, or that would be a fault
        self.policies.close(2.0, self._beat)
        if self._system1 is not None:
            self._system1.child.end(5.0, self._beat)
        for kept in self._kept:
            if kept.watched is not None:
                kept.watched.child.end(10.0)
                kept.watched = None
        self._arena.close()
        if self._directory is not None:
            if self._system1 is not None:
                self._directory.clear()
            self._directory.close()
            self._directory = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # ── how ──────────────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        self._beat()
        now_s = time.monotonic()
        child = Child.start("system1", self.plan, self._arena, "system1", 0)
        self._system1 = Watched(child, self.shared.places["system1"], self.plan.supervision, now_s)
        waiting = [("system1", self._system1)]
        if self.plan.perception:
            self.policies.start(now_s)
            assert self.policies.acting is not None
            waiting.append(("system2", self.policies.acting))
        for kept in self._kept:
            kept.step(now_s)
            assert kept.watched is not None
            waiting.append((kept.role, kept.watched))
        for role, watched in waiting:
            while not watched.ready:
                self._beat()
                why = watched.look(time.monotonic())
                if why is not None:
                    error = watched.place.told(watched.child.pid).get("error")
                    if error is not None:
                        raise ConfigError(f"{role}: {error}")
                    raise ServiceError(f"{role} {why} at its start; see its messages")
                time.sleep(0.01)
        used = {r: w.said["limits_sha256"] for r, w in waiting if "limits_sha256" in w.said}
        if len(set(used.values())) != 1:
            raise ConfigError(
                f"plan.limits={self.plan.limits!r} is not the file that the robot uses: sha256 {used}"
            )
        self._stats.skip()

    def _take_over(self, found: Found) -> None:
        record = found.record
        silent_ns = load(self.shared.commands, HEARTBEAT)
        self._beat()
        now_s = time.monotonic()
        self._system1 = Watched(found.system1, self.shared.places["system1"], self.plan.supervision, now_s)
        self._system1.look(now_s)
        self._stats.resume(silent_ns)
        self._tell("plant", "taken_over", {"silent_s": round((time.monotonic_ns() - silent_ns) * 1e-9, 3)})
        if self.plan.perception:
            self.policies.adopt(
                now_s,
                list(record.system2),
                record.current,
                record.previous,
                record.refusal,
                record.trial,
            )
            known = {record.current.digest, *(r.digest for r in (record.previous, record.refusal) if r)}
            if self.plan.bundle_digest and self.plan.bundle_digest not in known:
                self.policies.swap(self.plan.ref)
        for kept in self._kept:
            left = next((r for r in record.others if r.role == kept.role), None)
            child = None if left is None else Child.adopt(left)
            if child is not None:
                place = self.shared.places[child.record.place]
                kept.watched = Watched(child, place, self.plan.supervision, now_s)

    def _spawn(self, role: str) -> Watched:
        child = Child.start(role, self.plan, self._arena, role, 0)
        return Watched(child, self.shared.places[role], self.plan.supervision, time.monotonic())

    def _beat(self) -> None:
        store_word(self.shared.supervisor, SUPERVISOR_PID, os.getpid())
        self.shared.commands[HEARTBEAT] = time.monotonic_ns()

    def _acknowledge(self, _signal: int, _frame: FrameType | None) -> None:
        self._acknowledged = True

    def _tell(self, kind: str, name: str, detail: dict[str, Any]) -> None:
        self.events.add(time.monotonic_ns(), kind, name, detail)

    def _records(self) -> list[ProcessRecord]:
        assert self._system1 is not None
        others = [k.watched.child.record for k in self._kept if k.watched is not None]
        return [self._system1.child.record, *self.policies.records, *others]

    def _remember(self) -> None:
        """Leave behind what the next supervisor must know."""
        if self._directory is None or self._system1 is None:
            return
        p = self.policies
        have = os.fstat(self._arena.fd)
        self._directory.write(
            RuntimeRecord(
                boot_id=boot_id(),
                plan_sha256=self.plan.sha256,
                arena_fd=self._arena_fd,
                arena_inode=have.st_ino,
                arena_bytes=have.st_size,
                nonce=self.shared.nonce,
                system1=self._system1.child.record,
                system2=tuple(p.records),
                others=tuple(k.watched.child.record for k in self._kept if k.watched is not None),
                current=p.current,
                previous=p.previous,
                refusal=p.refusal,
                trial=p.trial,
                supervisor=self._me if self._handlers else None,
            )
        )


def _sweep(record: RuntimeRecord) -> None:
    """End what is left of a robot whose System 1 is gone."""
    for left in (*record.system2, *record.others):
        child = Child.adopt(left)
        if child is not None:
            child.end(2.0)


def _warm_up() -> None:
    """Compile what the supervisor calls before anything moves: System 1 would take a pause for its death."""
    ring = Ring(event_dtype(), 2)
    ring.push(ring.record())
    ring.reader().poll()
    store_word(ring.header, 1, load(ring.header, 1))


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the supervisor as Ctrl-C does: in order."""
    raise KeyboardInterrupt


def read_bundle(directory: Path | str) -> Bundle:
    """``policy.json`` of a bundle; ``BundleError`` if it is missing or malformed."""
    path = Path(directory) / "policy.json"
    try:
        return Bundle.model_validate_json(path.read_bytes())
    except OSError as e:
        raise BundleError(f"{path}: {e.strerror or e}") from None
    except ValidationError as e:
        first = e.errors()[0]
        raise BundleError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def bundle_ref(directory: Path | str, digest: str = "") -> BundleRef:
    """A bundle on disk as it is now; with ``digest``, ``BundleError`` if its bytes have another one."""
    path = Path(directory).absolute()
    bundle = read_bundle(path)
    try:
        found = bundle_digest(path)
    except OSError as e:
        raise BundleError(f"{e.filename}: {e.strerror}") from None
    if digest and found != digest:
        raise BundleError(f"{path}: has digest {found}, expected {digest}")
    return BundleRef(directory=str(path), digest=found, bundle=bundle)


def run_wall(
    bundle: Path | str,
    shift: str = "lab",
    seconds: float = 5.0,
    seed: int = 0,
    control_hz: float = 1000.0,
    policy_hz: float = 10.0,
    threads: int = 1,
    priority: int = 50,
    parameters: str = "",
) -> WallResult:
    """Run a bundle on the twin in real time for ``seconds`` and say how it went."""
    plan = twin_plan(bundle, shift, seed, control_hz, policy_hz, threads, priority, parameters=parameters)
    with Wall(plan) as wall:
        return wall.run(seconds)


def twin_plan(
    bundle: Path | str,
    shift: str,
    seed: int,
    control_hz: float = 1000.0,
    policy_hz: float = 10.0,
    threads: int = 1,
    priority: int = 50,
    supervision: SupervisionSettings | None = None,
    parameters: str = "",
) -> Plan:
    """The plan that runs a bundle on the twin; System 2 will run these very bytes and no others.

    ``parameters`` is the path of a file of the twin's identified ones.
    """
    import flywheel.twin
    from flywheel.twin.cell import CAMERAS, JOINTS, Cell
    from flywheel.twin.shift import shift as named

    ref = bundle_ref(bundle)
    cell = Cell(named(shift))
    cell.reset(seed)
    cpu, others = realtime.cores()
    return Plan(
        robot=TWIN_ROBOT,
        perception=TWIN_PERCEPTION,
        args={"shift": shift, "seed": seed, "control_hz": control_hz, "parameters": parameters},
        joints=JOINTS,
        cameras={name: (side, side) for name, side in CAMERAS.items()},
        limits=str(Path(flywheel.twin.__file__).parent / "limits.yaml"),
        bundle_dir=ref.directory,
        bundle=ref.bundle,
        bundle_digest=ref.digest,
        instruction=cell.instruction,
        control_hz=control_hz,
        policy_hz=policy_hz,
        threads=threads,
        priority=priority,
        cpu=cpu,
        others=tuple(sorted(others)),
        supervision=supervision or SupervisionSettings(),
    )
