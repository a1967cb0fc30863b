"""``flywheel bench recorder``: what recording costs, next to the disk, the store and lerobot's writer.

The load is 1 kHz × 7 joints and three cameras of 640×480 at 30 Hz. What compares is taken in turns within
one run: the way of an episode to the disk against a raw fsynced write of the same bytes, its upload against
a raw PUT of them. CPU shares are of one core, over wall time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flywheel.config import RecorderSettings
from flywheel.edge.bench import machine
from flywheel.edge.compiled import compiled
from flywheel.edge.control_ring import ROW_MODE, ROW_T, ControlRing, control_dtype, control_push
from flywheel.edge.figures import Quantiles
from flywheel.edge.images import FrameRing
from flywheel.edge.journal import JOURNAL_BYTES, Journal
from flywheel.edge.link import Arena, Ring, Words
from flywheel.edge.realtime import clock_ns, timespec
from flywheel.edge.recorder import Identity, Recorder
from flywheel.edge.rows import EventLog, Rings, event_dtype, frame_dtype, image_bytes
from flywheel.edge.spool import Spool
from flywheel.edge.system2 import encode_image
from flywheel.episode import read, seal
from flywheel.schema import MANIFEST_FILE
from flywheel.store import Store

MS = 1_000_000
JOINTS, FRAME_HZ, QUALITY = 7, 30.0, 90
CAMERAS = {f"c{i}": (480, 640) for i in range(3)}
KEEP_S = 15.0  # of the rings
PRE_S = 10.0


@compiled
def _ticks(
    header: Words, rows: Words, changes_header: Words, changes: Words, row: Words, took: Words, ts: Words
) -> None:
    """Append ``took.size`` rows, each with another mode than the last; how long each took, ns."""
    for k in range(took.size):
        begun = clock_ns(ts)
        row[ROW_T] = begun
        row[ROW_MODE] = k % 2
        control_push(header, rows, changes_header, changes, row)
        took[k] = clock_ns(ts) - begun


class _Robot:
    """The rings, and what fills them."""

    def __init__(self) -> None:
        frame = frame_dtype(CAMERAS, JOINTS, 16, JOINTS)
        counts = (round(KEEP_S * 1000), round(KEEP_S * FRAME_HZ), 256)
        pictures = image_bytes(CAMERAS, counts[1]) // 2  # half a byte a pixel: these take 0.2 to 0.4
        self.sizes = {
            "control": ControlRing.room(control_dtype(JOINTS), counts[0]),
            "frames": FrameRing.room(frame, counts[1], pictures),
            "events": Ring.nbytes(event_dtype(), counts[2]),
            "journal": JOURNAL_BYTES,
        }
        self.arena = Arena.create("flywheel-bench", sum(-(-s // 64) * 64 for s in self.sizes.values()))
        room = [self.arena.carve(s) for s in self.sizes.values()]
        self.rings = Rings(
            ControlRing(control_dtype(JOINTS), counts[0], room[0]),
            FrameRing(frame, counts[1], pictures, room[1]),
            Ring(event_dtype(), counts[2], room[2]),
        )
        self.journal = Journal(room[3])
        self.control, self.frame = self.rings.control.record(), self.rings.frames.record()
        self.frame["instruction"], self.frame["policy_digest"] = b"pick the red box", b"ab" * 32
        self.log = EventLog(self.rings.events)
        self.jpegs: list[dict[str, bytes]] = []
        self.encode_s = 0.0

    def draw(self) -> None:
        """Pictures to send, and how long one takes to encode."""
        from flywheel.dataset.peer import scene

        images = scene(6)
        begun = time.process_time()
        data = [encode_image(i, QUALITY) for i in images]
        self.encode_s = (time.process_time() - begun) / len(images)
        self.jpegs = [{c: data[(k + i) % 6] for i, c in enumerate(CAMERAS)} for k in range(6)]

    def play(self, seconds: float, trigger_s: float, beat: Callable[[], None] = lambda: None) -> None:
        """In real time."""
        t = time.monotonic_ns() // MS * MS
        end, next_frame, next_trigger, n = t + round(seconds * 1e9), t, t + round(trigger_s * 1e9), 0
        rng = np.random.default_rng(0)
        noise = rng.normal(scale=1e-3, size=(1000, JOINTS)).astype(np.float32)
        while t < end:
            now = time.monotonic_ns()
            while t <= min(now, end):
                self.control["t_ns"] = t
                self.control["q"] = self.control["q_ref"] = np.float32(np.sin(t * 1e-9)) + noise[n % 1000]
                self.rings.control.push(self.control)
                if t >= next_frame:
                    self.frame["t_ns"] = t
                    self.rings.frames.push_frame(self.frame, self.jpegs[n % 6])
                    next_frame += round(1e9 / FRAME_HZ)
                if t >= next_trigger:
                    self.log.add(t, "trigger", "dropped_object")
                    next_trigger += round(trigger_s * 1e9)
                t, n = t + MS, n + 1
            beat()
            time.sleep(0.002)


SETTINGS = RecorderSettings(pre_s=PRE_S, post_s=2.0, baseline_fraction=0.0, max_episode_s=14.0)


def recorder(full: bool = False) -> dict[str, Any]:
    """Measure for about a minute, or five with ``full``; returns what ``flywheel bench --json`` prints."""
    load = os.getloadavg()
    home = Path(tempfile.mkdtemp(prefix="flywheel-recorder-"))
    notes: dict[str, Any] = {}
    try:
        robot = _Robot()
        robot.draw()
        figures = _on_the_control_path(robot, 400_000 if full else 100_000)
        figures |= _beside_it(robot, home / "beside", 60.0 if full else 20.0)
        episode = max((home / "beside").glob("*/control.parquet"), key=lambda p: p.stat().st_size).parent
        figures |= _to_the_disk(episode, home, 60 if full else 21)
        figures |= _to_the_store(episode, home, 12 if full else 4, notes)
        figures |= _lerobot(300 if full else 60, notes)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if "lerobot_save_episode_s" in figures:
        figures["lerobot_cpu_share_ratio"] = figures["lerobot_cpu_share"] / figures["recorder_cpu_share"]
    bars = {
        "trigger_p99_us": (figures["trigger_p99_us"], "<", 50.0),
        "seal_ratio_raw_write": (figures["seal_ratio_raw_write"], ">=", 0.5),
    }
    return {
        "bench": "recorder",
        "machine": machine(),
        "load": {
            "before": load,
            "after": os.getloadavg(),
            "named": f"1 kHz x {JOINTS} joints, {len(CAMERAS)} cameras 640x480 at {FRAME_HZ:g} Hz",
            **notes,
        },
        "figures": figures,
        "bars": {
            k: {"value": v, "op": op, "bar": bar, "ok": v < bar if op == "<" else v >= bar}
            for k, (v, op, bar) in bars.items()
        },
    }


def _on_the_control_path(robot: _Robot, n: int) -> dict[str, float]:
    """One row of System 1, and one trigger told by System 2; the recorder itself is in another process."""
    ring = ControlRing(control_dtype(JOINTS), 4096)
    row: Words = ring.record().view(np.int64)
    took: Words = np.zeros(n, np.int64)
    ts = timespec()
    _ticks(*ring.memory, row, took[:10], ts)
    _ticks(*ring.memory, row, took, ts)
    log = EventLog(Ring(event_dtype(), 256))
    told: Words = np.zeros(n // 10, np.int64)
    for k in range(len(told)):
        begun = time.perf_counter_ns()
        log.add(begun, "trigger", "dropped_object", {"expected": "red", "got": "blue"})
        told[k] = time.perf_counter_ns() - begun
    return _tails("tick", took) | _tails("trigger", told)


def _beside_it(robot: _Robot, directory: Path, seconds: float) -> dict[str, float]:
    """CPU and memory of the recorder as a process of its own, under the load in real time."""
    report, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        _record(robot, directory, out)
    os.close(out)
    try:
        robot.play(seconds, 5.0)
        time.sleep(2.5)
    finally:
        os.kill(pid, signal.SIGTERM)
        with os.fdopen(report) as f:
            said = f.read()
        os.waitpid(pid, 0)
    found: dict[str, float] = json.loads(said)
    rings = {f"ring_{k}_mb": v / 1e6 for k, v in robot.sizes.items()}
    pictures = sum(map(len, robot.jpegs[0].values()))
    # What System 2 pays, in its own process, for pictures that it would have to encode anyway to be recorded.
    share = robot.encode_s * len(CAMERAS) * FRAME_HZ
    return {**found, **rings, "jpeg_kb": pictures / len(CAMERAS) / 1e3, "jpeg_encode_cpu_share": share}


def _record(robot: _Robot, directory: Path, out: int) -> None:
    code = 1
    try:
        asked: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        me = Identity("lab", "r1", "wall", time.time_ns() - time.monotonic_ns(), "bench", 1000.0, FRAME_HZ)
        r = Recorder(robot.rings, SETTINGS, directory, me, journal=robot.journal)
        base = _rss_mb()
        cpu, wall, polls, drops, held = time.process_time(), time.monotonic(), [], 0, 0
        while not asked:
            begun = time.perf_counter_ns()
            drops += sum(m.drops for m in r.poll(time.monotonic_ns()))
            polls.append(time.perf_counter_ns() - begun)
            held = max(held, r._history.nbytes)
            time.sleep(0.05)
        said = {
            "recorder_cpu_share": (time.process_time() - cpu) / (time.monotonic() - wall),
            "recorder_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - base,
            "recorder_history_mb": held / 1e6,
            "recorder_episodes": float(r.status.sealed),
            "recorder_drops": float(drops),
            **_tails("recorder_poll", np.array(polls)),
        }
        os.write(out, json.dumps(said).encode())
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / (1 << 20)


def _to_the_disk(episode: Path, home: Path, rounds: int) -> dict[str, float]:
    """Sealing against a raw fsynced write of the same bytes, in turns; the median of the ratios."""
    e = read(episode)
    data = b"".join((episode / f.name).read_bytes() for f in e.manifest.files)
    raw, sealed = [], []
    for k in range(rounds):
        begun = time.perf_counter()
        with (home / "raw").open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        raw.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        seal(home / f"seal{k}", e.manifest, e.control, e.frames, e.events)
        sealed.append(time.perf_counter() - begun)
        shutil.rmtree(home / f"seal{k}")
    (home / "raw").unlink()
    return {
        "episode_mb": len(data) / 1e6,
        "raw_write_mb_s": len(data) / 1e6 / float(np.median(raw)),
        "seal_mb_s": len(data) / 1e6 / float(np.median(sealed)),
        "seal_ratio_raw_write": float(np.median(np.array(raw) / np.array(sealed))),
    }


def _to_the_store(episode: Path, home: Path, rounds: int, notes: dict[str, Any]) -> dict[str, float]:
    """The spool's verified upload against a raw PUT, and a PUT with its GET, of the same bytes."""
    from flywheel.errors import ServiceError
    from flywheel.services.ceph import Ceph

    (home / "store").mkdir()
    ceph = Ceph(home / "store")
    try:
        embedded = ceph.up(lambda _: None)
    except ServiceError as e:
        notes["store"] = str(e)
        return {}
    try:
        return _uploads(embedded.connect(), episode, home, rounds)
    finally:
        ceph.down()


def _uploads(store: Store, episode: Path, home: Path, rounds: int) -> dict[str, float]:
    m = read(episode).manifest
    size = sum(f.bytes for f in m.files)
    raw, both, spooled = [], [], []
    for k in range(rounds):
        begun = time.perf_counter()
        for f in m.files:
            store.put(f"raw/{k}/{f.name}", episode / f.name)
        raw.append(time.perf_counter() - begun)
        for f in m.files:
            store.get(f"raw/{k}/{f.name}", f.sha256)
        both.append(time.perf_counter() - begun)
        spool = Spool(home / f"spool{k}", store.sub(f"r{k}"), 1 << 34)
        shutil.copytree(episode, spool.queue.episodes / episode.name)
        begun = time.perf_counter()
        done = spool.upload_once(0)
        spooled.append(time.perf_counter() - begun)
        if done.waiting or not store.exists(f"r{k}/{m.prefix}{MANIFEST_FILE}"):
            raise RuntimeError(f"the upload did not go through: {done.problems}")
        shutil.rmtree(home / f"spool{k}")
    return {
        "raw_put_mb_s": size / 1e6 / float(np.median(raw)),
        "upload_mb_s": size / 1e6 / float(np.median(spooled)),
        "upload_ratio_raw_put": float(np.median(np.array(raw) / np.array(spooled))),
        "upload_ratio_put_and_get": float(np.median(np.array(both) / np.array(spooled))),
    }


def _lerobot(frames: int, notes: dict[str, Any]) -> dict[str, float]:
    """The same three cameras through lerobot's dataset writer, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flywheel.dataset.peer", str(frames)],
            capture_output=True,
            text=True,
            timeout=280,
            check=True,
        )
    except (subprocess.SubprocessError, OSError) as e:
        said = getattr(e, "stderr", None) or str(e)
        notes["lerobot"] = f"not measured: {str(said).strip().splitlines()[-1][:200]}"
        return {}
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {f"lerobot_{k}": v for k, v in found.items()}


def _tails(name: str, nanoseconds: npt.NDArray[np.int64]) -> dict[str, float]:
    q = Quantiles.of(nanoseconds / 1e3)
    tails = {"p50": q.p50, "p99": q.p99, "p999": q.p999, "max": q.max}
    return {f"{name}_{k}_us": v for k, v in tails.items()} | {f"{name}_n": float(q.n)}
