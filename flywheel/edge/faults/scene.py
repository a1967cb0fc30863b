"""A robot in motion under a supervisor of its own, seen from outside through its shared memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.config import RecorderSettings
from flywheel.edge import realtime
from flywheel.edge.faults import rig
from flywheel.edge.handover import Found, RuntimeRecord, read_record
from flywheel.edge.link import Reader, Records, Words
from flywheel.edge.processes import Plan, Recording, Shared
from flywheel.edge.runtime import bundle_ref, twin_plan
from flywheel.edge.safety import ACCELERATION, JERK, LOWER, UPPER, VELOCITY, SafetyLimits
from flywheel.edge.supervision import SupervisionSettings
from flywheel.errors import ServiceError
from flywheel.schema import Mode

TRIAL_S = 2.5  # more than a revolution of the rig's circle
TRACE_S = 100.0  # longest that one fault may be watched
LOOK_S = 0.02
ROUNDING = 1e-9  # of a jerk that is told from the differences of accelerations


@dataclass(frozen=True)
class Seen:
    """What one fault did to System 1. Ratios are to the robot's limits; times in the unit that they name.

    ``rest_s`` is from the fault to the reference at rest (None: it kept moving), ``bound_s`` what it may be
    (0: it must keep moving; None: the fault has no single moment). ``ladder_s`` is from the tick that could
    not follow any more to rest, the longest of them, ``ladder_bound_s`` the ladder's own bound for that.
    ``worst_mode`` is the furthest step down; ``said`` what the runtime reported.
    """

    name: str
    late_max_us: float
    misses: int
    jerk: float
    acceleration: float
    velocity: float
    range_rad: float  # beyond the position range; 0 within
    rest_s: float | None
    bound_s: float | None
    ladder_s: float
    ladder_bound_s: float
    worst_mode: str
    moving_again: bool
    said: tuple[str, ...]
    as_expected: bool

    @property
    def within_limits(self) -> bool:
        """Whether no limit was exceeded, and System 1's own envelope never had to stop the robot."""
        return (
            max(self.jerk, self.acceleration, self.velocity) <= 1.0 + ROUNDING
            and self.range_rad <= 0.0
            and Mode[self.worst_mode.upper()] < Mode.STOP_1
        )


class Scene:
    """One robot, its supervisor, and what they leave in ``root``; a context manager that leaves nothing.

    ``plan`` may be another robot's; its spool lies in ``root/spool``, which may be a small disk.
    """

    def __init__(self, root: Path, plan: Plan, moving: float = 0.2) -> None:
        """``moving``: the speed of a joint, rad/s, from which on the robot is in motion."""
        self.root, self.plan = root, plan
        self._moving = moving
        self.state = root / "state"
        self.spool = root / "spool"
        self.state.mkdir(parents=True)
        limits = SafetyLimits.load(plan.limits)
        self._table = limits.table()
        self.ladder = limits.ladder
        self._dt = 1.0 / plan.control_hz
        self._process: subprocess.Popen[bytes] | None = None
        self._arena: Any = None
        self.shared: Shared

    def __enter__(self) -> Scene:
        (self.state / "plan.json").write_bytes(self.plan.to_bytes())
        self.start()
        try:
            found = Found.look(self.record, self.plan)
            if found is None:
                raise ServiceError("System 1 ended; see its messages")
            found.system1.close()
            self._arena = found.arena
            self.shared = Shared(self.plan, found.arena)
            self._log, self._events = self.shared.log.reader(), self.shared.events.reader()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(20.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        if self._arena is not None:
            self._arena.close()

    # ── the robot's processes ────────────────────────────────────────────────────────────────────────

    def start(self) -> bool:
        """Start a supervisor; whether it took the robot over from the last one."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        path = os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flywheel.edge.faults.supervisor", str(self.state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.root / "stderr").open("ab"),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            why = (self.root / "stderr").read_text(errors="replace").strip().splitlines()
            raise ServiceError(f"the supervisor did not start: {why[-1] if why else 'it said nothing'}")
        taken_over: bool = json.loads(line)["taken_over"]
        return taken_over

    @property
    def record(self) -> RuntimeRecord:
        """What the supervisor left for the next one."""
        record = read_record(self.state)
        if record is None:
            raise ServiceError(f"{self.state}: the supervisor wrote no record")
        return record

    def pid(self, role: str) -> int:
        """Process id of ``supervisor``, ``system2``, ``recorder`` or ``uploader``."""
        assert self._process is not None
        if role == "supervisor":
            return self._process.pid
        record = self.record
        all_of_them = (*record.system2, *record.others)
        return next((r.pid for r in all_of_them if r.role == role), 0)

    def kill(self, role: str, how: signal.Signals) -> None:
        """Send a signal; of a supervisor that was killed, wait for the end."""
        os.kill(self.pid(role), how)
        if role == "supervisor" and how == signal.SIGKILL:
            assert self._process is not None
            self._process.wait()

    def swap(self, directory: Path, digest: str | None = None) -> str:
        """Ask for another bundle; returns its digest."""
        digest = digest or bundle_ref(directory).digest
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"directory": str(directory), "digest": digest}).encode() + b"\n"
        )
        self._process.stdin.flush()
        return digest

    def told(self, role: str) -> dict[str, Any]:
        """What a process last said of itself."""
        return self.shared.places[role].told(self.pid(role))

    def limit_files(self, role: str, nbytes: int) -> None:
        """No file of a process may grow beyond ``nbytes``: a full disk where none can be mounted."""
        _, hard = resource.prlimit(self.pid(role), resource.RLIMIT_FSIZE)
        resource.prlimit(self.pid(role), resource.RLIMIT_FSIZE, (nbytes if nbytes >= 0 else hard, hard))

    # ── what is seen ─────────────────────────────────────────────────────────────────────────────────

    @property
    def last(self) -> Records:
        """The newest control row."""
        ring = self.shared.control
        row: Records = ring.rows[(ring.written - 1) % ring.capacity].view(ring.dtype)
        return row

    def following(self) -> bool:
        """Whether System 1 follows chunks and moves."""
        row = self.last
        return bool(row["mode"][0] == Mode.FOLLOW and np.abs(row["dq"]).max() > self._moving)

    def wait(self, until: Callable[[], bool], seconds: float, still: bool = False) -> bool:
        """Wait for something; False if it did not come. ``still``: it must hold for half a second."""
        end, since = time.monotonic() + seconds, None
        while (now := time.monotonic()) < end:
            if not until():
                since = None
            elif not still or (since is not None and now - since > 0.5):
                return True
            elif since is None:
                since = now
            time.sleep(LOOK_S)
        return False

    def reports(self) -> list[tuple[str, dict[str, Any]]]:
        """Events that the runtime logged since the last call, by name."""
        found = []
        for reader in (self._log, self._events):
            for row in reader.poll().rows:
                found.append((int(row["t_ns"]), row["name"].decode(), json.loads(row["detail"] or b"{}")))
        return [(name, detail) for _, name, detail in sorted(found, key=lambda e: e[0])]

    def watch(
        self,
        name: str,
        fault: Callable[[], object],
        until: Callable[[list[tuple[str, dict[str, Any]]]], bool],
        bound_s: float | None = 0.0,
        seconds: float = 60.0,
    ) -> Seen:
        """Do ``fault`` while the robot is in motion, wait for ``until`` (given the reports so far) and for
        motion again, and say what it did to System 1. ``bound_s``: if the ladder is taken, within what time
        after the fault the robot must be at rest; 0: it must keep moving; None: see ``Seen``."""
        if not self.wait(self.following, 60.0, still=True):
            raise ServiceError(
                f"{name}: the robot does not move; mode {Mode(int(self.last['mode'][0])).name}"
            )
        self.reports()
        assert self.shared.trace is not None
        trace, control = self.shared.trace.reader(from_start=False), self.shared.control.reader(False)
        start_ns = time.monotonic_ns()
        said: list[tuple[str, dict[str, Any]]] = []
        rows: list[Records] = []

        def seen() -> bool:
            rows.append(control.poll().rows)
            said.extend(self.reports())
            return until(said)

        fault()
        met = self.wait(seen, seconds)
        again = self.wait(lambda: bool(self.last["mode"][0] == Mode.FOLLOW), 30.0, still=True)
        seen()
        return self._judge(name, start_ns, trace, rows, said, met, again, bound_s)

    def _judge(
        self,
        name: str,
        start_ns: int,
        trace: Reader,
        parts: list[Records],
        said: list[tuple[str, dict[str, Any]]],
        met: bool,
        again: bool,
        bound_s: float | None,
    ) -> Seen:
        batch = trace.poll()
        rows = np.concatenate(parts)
        ref, t = batch.rows["ref"], batch.rows["t_ns"]
        table = self._table
        position, velocity, acceleration = ref[:, 0], ref[:, 1], ref[:, 2]
        jerk = np.diff(acceleration, axis=0) / self._dt
        outside = np.maximum(table[LOWER] - position, position - table[UPPER]).max()
        still = ~(np.any(velocity, axis=1) | np.any(acceleration, axis=1))
        rest_s = float(t[np.argmax(still)] - start_ns) * 1e-9 if still.any() else None
        ladder_s = _longest_descent(rows["t_ns"], rows["mode"], t[still])
        ladder_bound_s = self.ladder.carry_on_s + self.ladder.ramp_s
        deadlines = rows["t_ns"] - rows["late_ns"]
        period = round(1e9 * self._dt)
        misses = int((np.diff(deadlines) // period - 1).sum() + (rows["late_ns"] >= period).sum())
        in_time = (rest_s is None or bound_s is None or rest_s <= bound_s) and ladder_s <= ladder_bound_s
        return Seen(
            name=name,
            late_max_us=float(rows["late_ns"].max()) * 1e-3,
            misses=misses,
            jerk=float((np.abs(jerk) / table[JERK]).max()),
            acceleration=float((np.abs(acceleration) / table[ACCELERATION]).max()),
            velocity=float((np.abs(velocity) / table[VELOCITY]).max()),
            range_rad=max(float(outside), 0.0),
            rest_s=rest_s,
            bound_s=bound_s,
            ladder_s=ladder_s,
            ladder_bound_s=ladder_bound_s,
            worst_mode=Mode(int(rows["mode"].max())).name.lower(),
            moving_again=again,
            said=tuple(_short(n, d) for n, d in said),
            as_expected=met and again and in_time and not batch.missed,
        )


def _longest_descent(t: Words, mode: Words, at_rest: Words) -> float:
    """From a tick that left FOLLOW to the first one at rest, s; a descent that found its way back counts 0.
    One that ended in neither is infinite."""
    followed = mode == Mode.FOLLOW
    longest = 0.0
    for k in np.flatnonzero(followed[:-1] & ~followed[1:]) + 1:
        back = t[k:][followed[k:]]
        until = back[0] if len(back) else np.iinfo(np.int64).max
        rested = at_rest[at_rest >= t[k]]
        if len(rested) and rested[0] < until:
            longest = max(longest, float(rested[0] - t[k]) * 1e-9)
        elif not len(back):
            longest = float("inf")
    return longest


def _short(name: str, detail: dict[str, Any]) -> str:
    why = detail.get("why") or detail.get("reason")
    return f"{name} ({why})" if why else name


def rig_plan(root: Path, bundle: Path) -> Plan:
    """The rig, with a recorder and an uploader that reaches no store."""
    ref = bundle_ref(bundle)
    cpu, others = realtime.cores()
    plan = Plan(
        robot="flywheel.edge.faults.rig:robot",
        perception="flywheel.edge.faults.rig:perception",
        operator="flywheel.edge.faults.rig:operator",
        args={"directory": str(root)},
        joints=rig.JOINTS,
        cameras={"eye": (rig.SIDE, rig.SIDE)},
        limits=str(rig.limits_file()),
        bundle_dir=ref.directory,
        bundle=ref.bundle,
        bundle_digest=ref.digest,
        instruction="move",
        cpu=cpu,
        others=tuple(sorted(others)),
    )
    return _watched(plan, root, "rig")


def twin_scene(root: Path, bundle: Path, seed: int) -> Plan:
    """The twin with a trained policy."""
    return _watched(twin_plan(bundle, "lab", seed), root, "twin")


def _watched(plan: Plan, root: Path, robot: str) -> Plan:
    recording = Recording(
        directory=str(root / "spool"),
        site="bench",
        robot=robot,
        settings=RecorderSettings(pre_s=2.0, post_s=1.0, max_episode_s=4.0),
        upload=True,
    )
    return plan.model_copy(
        update={
            "recording": recording,
            "supervision": SupervisionSettings(trial_s=TRIAL_S),
            "orphan_s": 120.0,  # the next supervisor may start slowly on a busy machine
            "trace_rows": round(TRACE_S * plan.control_hz),
        }
    )


class SmallDisk:
    """A file system of 64 MiB at ``path``, where one may be mounted; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mounted = False

    def __enter__(self) -> SmallDisk:
        self.path.mkdir(parents=True, exist_ok=True)
        mount = shutil.which("mount")
        if mount is not None:
            args = [mount, "-t", "tmpfs", "-o", "size=64m,mode=700", "flywheel-bench", str(self.path)]
            self.mounted = subprocess.run(args, capture_output=True, check=False).returncode == 0
        return self

    def fill(self) -> None:
        """Leave no free space."""
        with suppress(OSError), (self.path / "ballast").open("wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))

    def free(self) -> None:
        """Give the space back."""
        (self.path / "ballast").unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], capture_output=True, check=False)
