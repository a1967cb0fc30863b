"""``flywheel bench tracking``: how punctual System 1 is, next to cyclictest and to plain Python.

A shared machine steals more time than any loop loses by itself, so the three take turns within one run, on
the same core and under the same named load, and what is compared are ratios of pooled tails. cyclictest and
System 1 run at the same real-time priority, and System 1 is stopped (SIGSTOP) while the others have their
turn; the plain loop runs as people usually write it: ordinary scheduling, ``time.sleep``. cyclictest only
sleeps; System 1 wakes ``early_us`` before its deadline and waits for it, which is part of what is compared.

Loads, each on top of the one before: ``idle``; ``system2``, a policy that infers at 10 Hz; ``recorder``,
which also takes every row and frame and seals episodes to disk; ``hog``, a busy loop on every core.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel.config import RecorderSettings, checkout
from flywheel.edge import realtime
from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.figures import Quantiles
from flywheel.edge.link import Records, Ring
from flywheel.edge.lockstep import tracking_error
from flywheel.edge.processes import Plan
from flywheel.edge.recorder import Identity, Recorder
from flywheel.edge.rows import CHUNK_STEPS, EventLog, Rings, event_dtype
from flywheel.edge.runtime import Wall, read_bundle
from flywheel.edge.tick import HEARTBEAT
from flywheel.errors import BundleError
from flywheel.robot.free import JOINTS, LIMITS_FILE, STEP_NS, chunk, sine
from flywheel.schema import Bundle, Mode

PERIOD_NS = 1_000_000
PRIORITY = 50
HISTOGRAM_US = 20_000
SETTLE_S = 0.3  # after System 1 goes on: not counted
CATCH_UP_S = 1.0  # until it is back on the sine, which did not wait for it
FAST_HZ = 4000.0
LOADS = ("idle", "system2", "recorder", "hog")
JUDGED = "recorder"  # the load under which the bars hold: System 2 and the recorder run

_PYTHON_LOOP = """
import json, sys, time
seconds, n = float(sys.argv[1]), int(sys.argv[2])
q, dq, late = [0.0] * n, [0.0] * n, []
deadline = time.monotonic_ns() + 1_000_000
end = deadline + int(seconds * 1e9)
while deadline < end:
    time.sleep(max(deadline - time.monotonic_ns(), 0) / 1e9)
    now = time.monotonic_ns()
    late.append(now - deadline)
    for i in range(n):
        tau = 400.0 * (0.1 - q[i]) - 20.0 * dq[i]
        dq[i] += tau * 1e-3
        q[i] += dq[i] * 1e-3
    deadline += 1_000_000
    behind = time.monotonic_ns() - deadline
    if behind > 0:
        deadline += (behind // 1_000_000 + 1) * 1_000_000
print(json.dumps(late))
"""
LOOK_S = 0.1  # between two looks of the recorder
PEERS_PAUSE_NS = 1_000_000_000  # rows that are made up at once after a pause, at most
Poll = Callable[[], None]
_HOG = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


def tracking(full: bool = False, policy: Path | None = None) -> dict[str, Any]:
    """Measure for a minute, or six with ``full``; returns the document of ``flywheel bench --json``.

    ``policy`` is the bundle that System 2 runs; default: that of ``models/base``. Raises ``BundleError`` if
    there is none.
    """
    bundle_dir = policy or _base_bundle()
    # Short turns, so that what disturbs the machine disturbs all alike; one longer, to be on the sine in.
    seconds = [3.0] + [1.0] * 30 if full else [1.5] + [0.5] * 5
    cpu, others = realtime.cores()
    before = os.getloadavg()
    figures: dict[str, float] = {}
    privileges: dict[str, Any] = {}
    for group in (LOADS[:1], LOADS[1:2], LOADS[2:]):
        with ExitStack() as stack:
            plan = _plan(None if group == LOADS[:1] else bundle_dir, 1e9 / PERIOD_NS)
            turns = stack.enter_context(_running(plan))
            if group == LOADS[2:]:
                turns.recorders = stack.enter_context(_recorder(turns.wall))
            for name in group:
                if name == "hog":
                    stack.enter_context(_hogs(others if cpu is None else others | {cpu}))
                taken = Taken()
                for turn in seconds:
                    turns.ours(turn, taken)
                    turns.cyclictest(turn, cpu, taken)
                turns.python(1.0, taken)
                figures |= taken.figures(name)
            privileges = turns.wall.told["system1"]["privileges"]
    if full:
        with _running(_plan(bundle_dir, FAST_HZ)) as turns:
            taken = Taken(round(1e9 / FAST_HZ))
            for _ in range(6):
                turns.ours(10.0, taken)
        figures |= taken.figures("4khz")
    bars = {
        "compute_p99_us": (figures[f"{JUDGED}_compute_p99_us"], 50.0),
        "tracking_rms_rad": (figures[f"{JUDGED}_tracking_rms_rad"], 1e-3),
    }
    if (ratio := figures.get(f"{JUDGED}_late_p99_ratio_cyclictest")) is not None:
        bars["late_p99_ratio_cyclictest"] = (ratio, 1.2)
    return {
        "bench": "tracking",
        "machine": machine(),
        "load": {
            "before": before,
            "after": os.getloadavg(),
            "named": f"{', '.join(LOADS)}; bars under {JUDGED!r}; the machine's own load besides",
            "privileges": privileges,
            "cyclictest": shutil.which("cyclictest") is not None,
            "early_us": plan.early_us,
            "turns_s": seconds,
        },
        "figures": figures,
        "bars": {k: {"value": v, "op": "<=", "bar": bar, "ok": v <= bar} for k, (v, bar) in bars.items()},
    }


def machine() -> dict[str, Any]:
    """What was measured on."""
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


@dataclass
class Taken:
    """What was measured under one load, all turns together; times in ns."""

    period_ns: int = PERIOD_NS
    rows: list[Records] = field(default_factory=list)
    sent: dict[int, int] = field(default_factory=dict)  # chunk id -> when it was written
    python: list[int] = field(default_factory=list)
    cyclic: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(HISTOGRAM_US + 1, np.int64))

    def figures(self, load: str) -> dict[str, float]:
        """By name, ``load`` in front."""
        rows = np.concatenate(self.rows)
        misses = [_misses(r, self.period_ns) for r in self.rows]
        missed, longest = sum(m[0] for m in misses), max(m[1] for m in misses)
        deadlines = sum(m[2] for m in misses)
        error = tracking_error(rows["q_ref"] - rows["q"])
        on_path = np.concatenate([r[r["t_ns"] >= r["t_ns"][0] + round(CATCH_UP_S * 1e9)] for r in self.rows])
        on_path = on_path[on_path["mode"] == Mode.FOLLOW]
        path = tracking_error((on_path["q"] - sine(on_path["t_ns"])).astype(np.float32))
        first = np.concatenate([r[1:][np.diff(r["chunk_id"]) > 0] for r in self.rows])  # of each chunk
        sent = np.array([self.sent.get(int(c), -1) for c in first["chunk_id"]], np.int64)
        done = first["t_ns"] + first["compute_ns"]
        seen = first["chunk_age_ns"] + first["compute_ns"]
        f = _tails("late", rows["late_ns"] / 1e3) | _tails("compute", rows["compute_ns"] / 1e3)
        f |= {
            "ticks": float(len(rows)),
            "misses_ppm": 1e6 * missed / max(deadlines, 1),
            "longest_miss_run": float(longest),
            "tracking_rms_rad": error.rms,
            "tracking_p99_rad": error.p99,
            "path_rms_rad": path.rms,
            "path_p99_rad": path.p99,
        }
        if self.sent:
            f |= _tails("chunk_to_command", (done - sent)[sent >= 0] / 1e3)
        else:
            f |= _tails("observation_to_command", seen / 1e3)
        if self.python:
            python = np.array(self.python, np.int64)
            f |= _tails("python_late", python / 1e3)
            f["python_misses_ppm"] = 1e6 * float(np.mean(python >= self.period_ns))
        if self.cyclic.sum():
            f |= _tails("cyclictest_late", np.repeat(np.arange(len(self.cyclic)), self.cyclic))
            for q in ("p99", "p999"):
                ours, theirs = f[f"late_{q}_us"], f[f"cyclictest_late_{q}_us"]
                f[f"late_{q}_ratio_cyclictest"] = ours / max(theirs, 1.0)
        return {f"{load}_{k}": v for k, v in f.items()}


def _misses(rows: Records, period_ns: int) -> tuple[int, int, int]:
    """Missed deadlines, the longest run of them, and all deadlines, of rows without a break on purpose."""
    deadlines = rows["t_ns"] - rows["late_ns"]
    skipped = np.diff(deadlines, prepend=deadlines[0] - period_ns) // period_ns - 1
    late = rows["late_ns"] >= period_ns
    run = longest = 0
    for k in np.flatnonzero((skipped > 0) | late):
        run = (run if k and late[k - 1] else 0) + int(skipped[k])
        longest = max(longest, run + int(late[k]))
        run += int(late[k])
    return int(skipped.sum() + late.sum()), longest, int(len(rows) + skipped.sum())


def _tails(name: str, microseconds: npt.NDArray[Any]) -> dict[str, float]:
    q = Quantiles.of(microseconds)
    tails = {"p50": q.p50, "p99": q.p99, "p999": q.p999, "max": q.max}
    return {f"{name}_{k}_us": v for k, v in tails.items()} | {f"{name}_n": float(q.n)}


# ── turns ─────────────────────────────────────────────────────────────────────────────────────────────


class Turns:
    """One running robot; System 1 and its peers take turns on its core."""

    def __init__(self, wall: Wall) -> None:
        self.wall = wall
        self.recorders: tuple[Poll, Poll] | None = None  # beside System 1's turns, and beside its peers'
        self._reader = wall.shared.control.reader()
        self._chunk = wall.shared.slot.record()
        self._id = 0

    def ours(self, seconds: float, taken: Taken) -> None:
        """System 1's turn. Without a System 2, the sine comes from here, at 10 Hz."""
        wall = self.wall
        wall.shared.commands[HEARTBEAT] = time.monotonic_ns()  # it must not think that nobody was there
        os.kill(wall.system1_pid, signal.SIGCONT)
        start = time.monotonic()
        read: list[Records] = []
        while (now := time.monotonic()) < start + SETTLE_S + seconds:
            if not wall.plan.perception:
                self._send(taken)
            wall.run(min(LOOK_S, start + SETTLE_S + seconds - now))
            if self.recorders is not None:
                self.recorders[0]()
            rows = self._reader.poll().rows
            read.append(rows[rows["t_ns"] >= round((start + SETTLE_S) * 1e9)])
        os.kill(wall.system1_pid, signal.SIGSTOP)
        taken.rows.append(np.concatenate(read))

    def cyclictest(self, seconds: float, cpu: int | None, taken: Taken) -> None:
        """cyclictest's turn, with everything but System 1 at work."""
        if shutil.which("cyclictest") is None:
            return
        args = ["cyclictest", f"-p{PRIORITY}", "-m", "-q", f"-i{PERIOD_NS // 1000}", "-t1"]
        args += [f"-l{round(seconds * 1e9 / PERIOD_NS)}", f"-h{HISTOGRAM_US}"]
        if cpu is not None:
            args.append(f"-a{cpu}")
        taken.cyclic += _histogram(self._wait(args, seconds + 30))

    def python(self, seconds: float, taken: Taken) -> None:
        """The plain loop's turn."""
        args = [sys.executable, "-c", _PYTHON_LOOP, str(seconds), str(JOINTS)]
        taken.python += json.loads(self._wait(args, seconds + 60) or "[]")

    def _wait(self, args: list[str], timeout_s: float) -> str:
        """The output of a peer, the recorder at work meanwhile; "" if it failed (not permitted)."""
        peer = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        end = time.monotonic() + timeout_s
        try:
            while True:
                try:
                    out, _ = peer.communicate(timeout=LOOK_S)
                    return out if peer.returncode == 0 else ""
                except subprocess.TimeoutExpired:
                    if self.recorders is not None:
                        self.recorders[1]()
                    if time.monotonic() > end:
                        return ""
        finally:
            if peer.poll() is None:
                peer.kill()
                peer.communicate()

    def _send(self, taken: Taken) -> None:
        c = self._chunk
        now = time.monotonic_ns()
        self._id += 1
        c["chunk_id"], c["t0_ns"], c["step_ns"], c["steps"] = self._id, now, STEP_NS, CHUNK_STEPS
        c["valid_ns"] = 8 * STEP_NS
        c["q"][0] = chunk(now, CHUNK_STEPS)
        taken.sent[self._id] = time.monotonic_ns()
        self.wall.shared.slot.write(c)


@contextmanager
def _running(plan: Plan) -> Iterator[Turns]:
    with Wall(plan) as wall:
        try:
            yield Turns(wall)
        finally:
            os.kill(wall.system1_pid, signal.SIGCONT)


@contextmanager
def _recorder(wall: Wall) -> Iterator[tuple[Poll, Poll]]:
    """Two recorders that seal two seconds of everything, twice a second or as fast as the disk takes it: one
    for System 1's turns, and one for its peers', when no System 1 writes rows, on as many made-up ones. So
    the load beside them is the same."""
    made_up = ControlRing(control_dtype(JOINTS), wall.shared.control.capacity)
    row = made_up.record()
    noise = np.random.default_rng(0).standard_normal((64, 4, JOINTS))  # zeros would compress too well
    settings = RecorderSettings(pre_s=2.0, post_s=0.2, min_interval_s=0.5)
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as directory, ExitStack() as stack:

        def recorder(name: str, control: ControlRing) -> Poll:
            events = EventLog(Ring(event_dtype(), 256))
            recorder = Recorder(
                Rings(control, wall.shared.frames, events.ring), settings, Path(directory) / name,
                Identity("bench", "free", "wall", time.time_ns() - time.monotonic_ns(), "bench"),
                background=True,
            )  # fmt: skip
            stack.callback(lambda: recorder.finish(time.monotonic_ns()))
            last = 0.0

            def poll() -> None:
                nonlocal last
                if time.monotonic() >= last + 0.5:
                    last = time.monotonic()
                    events.add(time.monotonic_ns(), "trigger", "baseline")
                recorder.poll(time.monotonic_ns())

            return poll

        def peers() -> None:
            now = time.monotonic_ns()
            for t in range(max(int(row["t_ns"][0]) + PERIOD_NS, now - PEERS_PAUSE_NS), now, PERIOD_NS):
                row["t_ns"] = t
                row["q"], row["dq"], row["q_ref"], row["tau"] = noise[t // PERIOD_NS % 64]
                made_up.push(row)
            beside_peers()

        beside_peers = recorder("peers", made_up)
        yield recorder("ours", wall.shared.control), peers


@contextmanager
def _hogs(cpus: set[int]) -> Iterator[None]:
    hogs = [subprocess.Popen([sys.executable, "-c", _HOG, str(c)]) for c in sorted(cpus)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def _base_bundle() -> Path:
    root = checkout(Path.cwd())
    if root is None or not (root / "models" / "base" / "bundle").is_dir():
        raise BundleError("bench tracking runs the base policy: start it in a checkout that has models/base")
    return root / "models" / "base" / "bundle"


def _plan(bundle_dir: Path | None, rate_hz: float) -> Plan:
    """The free robot, with a System 2 if there is a bundle."""
    cpu, others = realtime.cores()
    bundle = _NOTHING if bundle_dir is None else read_bundle(bundle_dir)
    return Plan(
        robot="flywheel.robot.free:wall_robot",
        perception="" if bundle_dir is None else "flywheel.robot.free:wall_perception",
        args={"rate_hz": rate_hz, "side_px": bundle.image_hw[0]},
        joints=JOINTS,
        cameras=dict.fromkeys(bundle.cameras, bundle.image_hw),
        limits=str(LIMITS_FILE),
        bundle_dir="" if bundle_dir is None else str(bundle_dir),
        bundle=bundle,
        instruction="pick the red box and place it in the bin",
        control_hz=rate_hz,
        priority=PRIORITY,
        cpu=cpu,
        others=tuple(sorted(others)),
    )


_NOTHING = Bundle(
    name="none", cameras=(), image_hw=(1, 1), state_names=("none",), action_names=("none",),
    action_space="joint_position", chunk=16, execute=8, step_ns=STEP_NS, max_action_dim=1, tokens=1,
    num_steps=1, limits_sha256="",
)  # fmt: skip


def _histogram(text: str) -> npt.NDArray[np.int64]:
    """Counts by µs of lateness; what lies beyond the histogram counts as its last µs."""
    counts = np.zeros(HISTOGRAM_US + 1, np.int64)
    for line in text.splitlines():
        if line.startswith("# Histogram Overflows:"):
            counts[-1] += int(line.split(":")[1].split()[0])
        elif line and not line.startswith("#"):
            us, count = line.split()[:2]
            counts[min(int(us), HISTOGRAM_US)] += int(count)
    return counts
