"""``flywheel bench tracking``: how punctual System 1 is, next to cyclictest and to plain Python.

A shared machine steals more time than any loop loses by itself, so the three take turns within one run, on
the same core, and what is compared are ratios of pooled tails. cyclictest and System 1 run at the same
real-time priority; the plain loop runs as people usually write it: ordinary scheduling, ``time.sleep``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import flywheel.twin
from flywheel.edge import realtime
from flywheel.edge.processes import Plan
from flywheel.edge.runtime import Quantiles, Wall, WallResult
from flywheel.edge.safety import SafetyLimits
from flywheel.robot import FloatArray, JointState
from flywheel.schema import Bundle

LIMITS_FILE = Path(flywheel.twin.__file__).parent / "limits.yaml"
JOINTS = 5
PERIOD_NS = 1_000_000
PRIORITY = 50
STEP_NS, STEPS = 100_000_000, 16
INERTIA = 0.5  # kg·m², every joint
HISTOGRAM_US = 20_000

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


class Bench:
    """A robot of five double integrators: nothing of it costs time, so that System 1 alone is measured."""

    name = "bench"
    joints = JOINTS
    rate_hz = 1e9 / PERIOD_NS

    def __init__(self) -> None:
        self.limits = SafetyLimits.load(LIMITS_FILE)
        self._q: FloatArray = np.zeros(JOINTS)
        self._dq: FloatArray = np.zeros(JOINTS)
        self._half = 0.5 * 1e-6 / INERTIA
        self._gain = 1e-3 / INERTIA
        self._mass = np.eye(JOINTS) * INERTIA

    def read(self, out: JointState) -> None:
        """Joint state, exactly."""
        out.q[:] = self._q
        out.dq[:] = self._dq
        out.mass[:] = self._mass

    def write(self, tau: FloatArray, tool: float) -> None:
        """One millisecond of free motion."""
        self._q += self._dq * 1e-3 + tau * self._half
        self._dq += tau * self._gain

    def stop(self) -> None:
        """Brakes."""
        self._dq[:] = 0.0


def bench_robot(args: dict[str, Any], world: memoryview) -> Bench:
    """For ``Plan.robot``."""
    return Bench()


def tracking(full: bool = False) -> dict[str, Any]:
    """Measure for a minute, or five with ``full``; returns the document of ``flywheel bench --json``."""
    rounds, seconds = (6, 12.0) if full else (3, 4.0)
    cpu, others = realtime.cores()
    load_before = os.getloadavg()
    ours: list[WallResult] = []
    late: list[npt.NDArray[np.int64]] = []
    compute: list[npt.NDArray[np.int64]] = []
    python: list[int] = []
    cyclic = np.zeros(HISTOGRAM_US + 1, np.int64)
    have_cyclictest = shutil.which("cyclictest") is not None
    for _ in range(rounds):
        result, rows = _system1(seconds, cpu, others)
        ours.append(result)
        late.append(rows["late_ns"])
        compute.append(rows["compute_ns"])
        if have_cyclictest:
            cyclic += _cyclictest(seconds, cpu)
        python += _python(seconds)
    figures = _figures(ours, np.concatenate(late), np.concatenate(compute), np.array(python, np.int64))
    bars = {
        "compute_p99_us": (figures["compute_p99_us"], "<=", 50.0),
        "tracking_rms_rad": (figures["tracking_rms_rad"], "<=", 1e-3),
    }
    if cyclic.sum():
        figures |= _tails("cyclictest_late", _from_histogram(cyclic))
        ratio = figures["late_p99_us"] / max(figures["cyclictest_late_p99_us"], 1.0)
        figures["late_p99_ratio_cyclictest"] = ratio
        bars["late_p99_ratio_cyclictest"] = (ratio, "<=", 1.2)
    return {
        "bench": "tracking",
        "machine": machine(),
        "load": {
            "before": load_before,
            "after": os.getloadavg(),
            "named": "System 1 alone; the machine's own load besides",
            "privileges": ours[-1].privileges,
            "cyclictest": have_cyclictest,
            "rounds": rounds,
            "seconds": seconds,
        },
        "figures": figures,
        "bars": {k: {"value": v, "op": op, "bar": bar, "ok": v <= bar} for k, (v, op, bar) in bars.items()},
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


def _figures(
    ours: list[WallResult],
    late: npt.NDArray[np.int64],
    compute: npt.NDArray[np.int64],
    python: npt.NDArray[np.int64],
) -> dict[str, float]:
    ticks = sum(r.ticks for r in ours)
    figures = (
        _tails("late", late / 1e3) | _tails("compute", compute / 1e3) | _tails("python_late", python / 1e3)
    )
    figures["ticks"] = float(ticks)
    figures["misses_ppm"] = sum(r.misses_ppm * r.ticks for r in ours) / max(ticks, 1)
    figures["longest_miss_run"] = float(max(r.longest_miss_run for r in ours))
    figures["python_misses_ppm"] = 1e6 * float(np.mean(python >= PERIOD_NS)) if len(python) else 0.0
    figures["tracking_rms_rad"] = float(np.sqrt(np.mean([r.tracking_rms_rad**2 for r in ours])))
    figures["tracking_p99_rad"] = max(r.tracking_p99_rad for r in ours)
    return figures


def _tails(name: str, microseconds: npt.NDArray[Any]) -> dict[str, float]:
    q = Quantiles.of(microseconds)
    tails = {"p50": q.p50, "p99": q.p99, "p999": q.p999, "max": q.max}
    return {f"{name}_{k}_us": v for k, v in tails.items()} | {f"{name}_n": float(q.n)}


def _from_histogram(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


def _plan(cpu: int | None, others: set[int]) -> Plan:
    nothing = Bundle(
        name="bench",
        cameras=(),
        image_hw=(1, 1),
        state_names=("none",),
        action_names=("none",),
        action_space="joint_position",
        chunk=STEPS,
        execute=8,
        step_ns=STEP_NS,
        max_action_dim=1,
        tokens=1,
        num_steps=1,
        limits_sha256="",
    )
    return Plan(
        robot="flywheel.edge.bench:bench_robot",
        perception="",
        joints=JOINTS,
        cameras={},
        limits=str(LIMITS_FILE),
        bundle_dir="",
        bundle=nothing,
        instruction="",
        priority=PRIORITY,
        cpu=cpu,
        others=tuple(sorted(others)),
    )


def _system1(seconds: float, cpu: int | None, others: set[int]) -> tuple[WallResult, Any]:
    """System 1 following a sine of half a radian that the supervisor sends in chunks, at 10 Hz."""
    with Wall(_plan(cpu, others)) as wall:
        reader = wall.shared.control.reader(from_start=False)
        start = time.monotonic()
        chunk = wall.shared.slot.record()
        while time.monotonic() < start + seconds:
            now = time.monotonic_ns()
            t = (now - start * 1e9 + STEP_NS * np.arange(1, STEPS + 1)) * 1e-9
            chunk["chunk_id"] += 1
            chunk["t0_ns"] = now
            chunk["step_ns"] = STEP_NS
            chunk["steps"] = STEPS
            chunk["valid_ns"] = 8 * STEP_NS
            chunk["q"][0, :STEPS] = 0.5 * (1.0 - np.cos(2.0 * t))[:, None]
            wall.shared.slot.write(chunk)
            wall.run(0.1)
        return wall.result(), reader.poll().rows


def _cyclictest(seconds: float, cpu: int | None) -> npt.NDArray[np.int64]:
    """Counts by µs of lateness; what lies beyond the histogram counts as its last µs. Empty if refused."""
    args = ["cyclictest", f"-p{PRIORITY}", "-m", "-q", f"-i{PERIOD_NS // 1000}", "-t1"]
    args += [f"-D{max(round(seconds), 1)}", f"-h{HISTOGRAM_US}"]
    if cpu is not None:
        args.append(f"-a{cpu}")
    done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=seconds + 30)
    counts = np.zeros(HISTOGRAM_US + 1, np.int64)
    if done.returncode != 0:
        return counts
    for line in done.stdout.splitlines():
        if line.startswith("# Histogram Overflows:"):
            counts[-1] += int(line.split(":")[1].split()[0])
        elif line and not line.startswith("#"):
            us, count = line.split()[:2]
            counts[min(int(us), HISTOGRAM_US)] += int(count)
    return counts


def _python(seconds: float) -> list[int]:
    """Lateness of the plain loop, ns."""
    args = [sys.executable, "-c", _PYTHON_LOOP, str(seconds), str(JOINTS)]
    done = subprocess.run(args, capture_output=True, text=True, check=True, timeout=seconds + 60)
    late: list[int] = json.loads(done.stdout)
    return late
