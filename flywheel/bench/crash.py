"""``flywheel bench crash``: kill -9 of recorder, spool and uploader, and a store and a disk that fail them.

Everything is real: rings in shared memory that one process fills at 1 kHz, a recorder, a spool keeper and an
uploader as processes of their own that are killed by SIGKILL, half of them at a random time and half at a
random durable step; Ceph's RGW behind a server that refuses, stalls, breaks off and lies; a file system that
is full. What was to be recorded is written down by the process that nobody kills. In the end each trigger has
to be in exactly one episode, which is whole and verified in the store or still in the spool.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from flywheel.bench.faulty import Fault, Faulty
from flywheel.config import RecorderSettings
from flywheel.edge.bench import machine
from flywheel.edge.control_ring import ControlRing, control_dtype
from flywheel.edge.images import FrameRing
from flywheel.edge.journal import JOURNAL_BYTES, Journal
from flywheel.edge.link import Arena, Ring, Words
from flywheel.edge.recorder import Identity, Recorder
from flywheel.edge.rows import EventLog, Rings, event_dtype, frame_dtype
from flywheel.edge.spool import Queue, Spool
from flywheel.episode import as_array, ls, pull, read, verify
from flywheel.errors import FlywheelError
from flywheel.schema import MANIFEST_FILE, Manifest, Mode
from flywheel.store import EmbeddedStore, Store

MS = 1_000_000
JOINTS, STATE, ACTION, CHUNK = 5, 5, 4, 16
CAMERAS = {"wrist": (64, 64), "scene": (64, 64)}
CONTROL_ROWS, FRAME_ROWS, EVENT_ROWS = 8192, 128, 256  # 8 s, 12 s, a minute or more
RING_S = CONTROL_ROWS / 1000
REFUSED_NS = 30_000_000_000
QUOTA = 1 << 34
DISK_MB = 256  # room for all that waits while the store fails: what the quota drops would count as lost
SETTINGS = RecorderSettings(
    pre_s=0.4,
    post_s=0.2,
    tail_s=0.1,
    min_interval_s=0.0,
    settle_s=0.15,
    max_episode_s=2.0,
    baseline_fraction=0.0,
)
KINDS = ("dropped_object", "wrong_object", "task_timeout", "operator_failure", "grasp_lost")
_PR_SET_PDEATHSIG = 1
ROLES = ("recorder", "spool", "uploader")

# Words of shared memory by which the processes are told what to do.
_QUIET, _END, _FAULT, _STEPS, _PORT, _WORDS = 0, 1, 2, 3, 8, 16
# _STEPS + role: die after so many steps, 0 for never; _PORT: where the store listens
_ALL, _SILENT, _EVENTS = 0, 1, 2  # what triggers: everything, nothing, only what an event tells of


@dataclass
class Rig:
    """The shared memory, the disk and the store of one run."""

    root: Path  # of the spool
    truth: Path
    store: EmbeddedStore
    prefix: str
    seed: int = 0
    arena: Arena = field(init=False)
    endpoint: str = ""

    def __post_init__(self) -> None:
        frame = frame_dtype(CAMERAS, STATE, CHUNK, ACTION)
        sizes = (
            ControlRing.room(control_dtype(JOINTS), CONTROL_ROWS),
            FrameRing.room(frame, FRAME_ROWS, 1 << 20),
            Ring.nbytes(event_dtype(), EVENT_ROWS),
            JOURNAL_BYTES,
            _WORDS * 8,
        )
        self.arena = Arena.create("flywheel-crash", sum(-(-s // 64) * 64 for s in sizes))
        room = [self.arena.carve(s) for s in sizes]
        self.rings = Rings(
            ControlRing(control_dtype(JOINTS), CONTROL_ROWS, room[0]),
            FrameRing(frame, FRAME_ROWS, 1 << 20, room[1]),
            Ring(event_dtype(), EVENT_ROWS, room[2]),
        )
        self.journal_room = room[3]
        self.words: Words = np.frombuffer(room[4], np.int64)
        self.found(self.store)

    def found(self, store: EmbeddedStore) -> None:
        """The store is (back) at ``store.endpoint``: while it was dead its port may have gone to another."""
        self.words[_PORT] = urlsplit(store.endpoint).port or 0

    def client(self, endpoint: str = "", timeout_s: float = 20.0, attempts: int = 4) -> Store:
        """The store, directly or by way of ``endpoint``."""
        at = self.store.model_copy(update={"endpoint": endpoint or f"http://127.0.0.1:{self.words[_PORT]}"})
        return at.connect(self.prefix, timeout_s=timeout_s, attempts=attempts)

    def step(self, role: int) -> Callable[[str], None]:
        """Dies at the step that was chosen for it."""
        words, word = self.words, _STEPS + role

        def take(_: str) -> None:
            if words[word] > 0:
                words[word] -= 1
                if words[word] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return take


# ── the processes ────────────────────────────────────────────────────────────────────────────────────


def write_rows(rig: Rig) -> None:
    """Both systems: rows on their grid, whatever the others do; and what should be recorded."""
    import simplejpeg

    rng = np.random.default_rng(rig.seed)
    pictures = [
        {c: simplejpeg.encode_jpeg(np.full((*hw, 3), 40 + 20 * i, np.uint8), 90) for c, hw in CAMERAS.items()}
        for i in range(8)
    ]
    row, frame = rig.rings.control.record(), rig.rings.frames.record()
    frame["instruction"], frame["policy_digest"] = b"pick the red box", b"ab" * 32
    log = EventLog(rig.rings.events)
    truth = os.open(rig.truth, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def fired(t_ns: int, kind: str) -> None:
        os.write(truth, json.dumps([t_ns, kind]).encode() + b"\n")

    n, t = 0, time.monotonic_ns() // MS * MS
    next_event, stop_until, last = t + 600 * MS, 0, t
    while not rig.words[_END]:
        now = time.monotonic_ns()
        while t <= now:
            quiet = int(rig.words[_QUIET])
            if t % (100 * MS) == 0:
                frame["t_ns"] = t
                rig.rings.frames.push_frame(frame, pictures[n // 100 % 8])
            if t >= next_event and quiet != _SILENT:
                kind = "safety_stop" if quiet == _ALL and rng.random() < 0.2 else str(rng.choice(KINDS))
                if kind == "safety_stop":
                    stop_until = t + 40 * MS  # seen in the control rows, and nowhere else
                else:
                    log.add(t, "trigger", kind, {"n": n})
                fired(t, kind)
                last, next_event = t, t + round(float(rng.uniform(100, 900))) * MS
            row["t_ns"], row["mode"] = t, Mode.STOP_1 if t < stop_until else Mode.FOLLOW
            row["q"] = row["q_ref"] = n % (1 << 20)
            rig.rings.control.push(row)
            n += 1
            t += MS
        time.sleep(0.002)
    os.write(truth, json.dumps([last, ""]).encode() + b"\n")


def record(rig: Rig) -> None:
    """The recorder."""
    epoch = time.time_ns() - time.monotonic_ns()
    queue = Queue(rig.root, QUOTA)
    life = os.getpid()
    recorder = Recorder(
        rig.rings,
        SETTINGS,
        rig.root / "episodes",
        Identity("lab", "r1", "wall", epoch, "bench"),
        make_room=queue.make_room,
        background=life % 2 == 0,
        journal=Journal(rig.journal_room),
        step=rig.step(0),
    )
    while not rig.words[_END]:
        recorder.poll(time.monotonic_ns())
        time.sleep(0.01)
    recorder.finish(time.monotonic_ns())
    while recorder.status.refused:
        time.sleep(0.05)
        recorder.finish(time.monotonic_ns())


def keep_spool(rig: Rig) -> None:
    """What looks after the spool: quota, and what crashes left over."""
    queue = Queue(rig.root, QUOTA, rig.step(1))
    while not rig.words[_END]:
        rig.step(1)("tidy")
        queue.tidy()
        queue.summaries()
        rig.step(1)("enforce")
        queue.enforce()
        time.sleep(0.01)


def upload(rig: Rig, store: Store) -> None:
    """The uploader: through whatever the network is now."""
    spool = Spool(rig.root, store, QUOTA, step=rig.step(2))
    while True:
        now = time.monotonic_ns()
        result = spool.upload_once(now)
        # What the store refuses (it keeps other bytes under that name) waits for a person.
        refused = result.retry_ns is not None and result.retry_ns - now > REFUSED_NS
        if rig.words[_END] > 1 and (not result.waiting or refused):
            return
        time.sleep(0.02)


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # none outlives the run
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Told:
    """What was done to them."""

    kills: Counter[str] = field(default_factory=Counter)
    at_steps: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    outages: int = 0  # of the recorder, for longer than the ring
    store_kills: int = 0
    full_disk: int = 0
    ended_badly: list[str] = field(default_factory=list)


class _Lives:
    """Starts the three, and kills them."""

    def __init__(self, rig: Rig, rng: np.random.Generator, told: Told) -> None:
        self.rig, self.rng, self.told = rig, rng, told
        self.store = rig.client(rig.endpoint, timeout_s=1.0, attempts=1)
        self._work: tuple[Callable[[], None], ...] = (
            lambda: record(rig),
            lambda: keep_spool(rig),
            lambda: upload(rig, self.store),
        )
        self._pids = [0, 0, 0]
        self._die_at = [0.0, 0.0, 0.0]
        self.held = [False, False, False]  # not to be started again for now

    def start(self, role: int, deadly: bool = True) -> None:
        at_step = deadly and self.rng.random() < 0.5
        # A recorder has to get so far that it seals, or it would be killed at its start for ever.
        steps, longest = (300, 3.0) if role == 0 else (40, 0.8)
        self.rig.words[_STEPS + role] = int(self.rng.integers(1, steps)) if at_step else 0
        self._pids[role] = _fork(self._work[role])
        longest = 2.0 * longest if at_step else longest
        self._die_at[role] = time.monotonic() + (self.rng.uniform(0.0, longest) if deadly else 1e9)

    def look(self) -> None:
        """Kill whose time has come; start again what is dead."""
        for role in range(3):
            if self._pids[role] and time.monotonic() >= self._die_at[role]:
                os.kill(self._pids[role], signal.SIGKILL)
                self._die_at[role] = 1e18
            if self._pids[role]:
                pid, status = os.waitpid(self._pids[role], os.WNOHANG)
                if pid:
                    self._note(role, status)
            if not self._pids[role] and not self.held[role]:
                self.start(role)

    def kill(self, role: int) -> None:
        if self._pids[role]:
            os.kill(self._pids[role], signal.SIGKILL)
            self._note(role, os.waitpid(self._pids[role], 0)[1])

    def last(self, role: int, timeout_s: float) -> bool:
        """A life that is not cut short; whether it ended well in time."""
        self.kill(role)
        self.start(role, deadly=False)
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            pid, status = os.waitpid(self._pids[role], os.WNOHANG)
            if pid:
                self._pids[role] = 0
                return status == 0
            time.sleep(0.02)
        self.kill(role)
        return False

    def _note(self, role: int, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            self.told.kills[ROLES[role]] += 1
            self.told.at_steps += self._die_at[role] < 1e17
        elif code or not self.rig.words[_END]:
            self.told.ended_badly.append(f"{ROLES[role]}: {code}")
        self._pids[role] = 0


def run(
    home: Path,
    store: EmbeddedStore,
    prefix: str,
    kills: int,
    seed: int = 0,
    kill_store: Callable[[], EmbeddedStore] | None = None,
    most_s: float = 3600.0,
) -> dict[str, Any]:
    """Kill until ``kills`` are counted, or ``most_s`` are over, then let them finish, and count.

    ``home`` is an empty directory. ``kill_store`` kills the real store, starts it again and says where it is.
    """
    disk = home / "disk"
    disk.mkdir(parents=True)
    with _mounted(disk) as mounted:
        return _run(home, disk, mounted, store, prefix, kills, seed, kill_store, most_s)


def _run(
    home: Path,
    disk: Path,
    mounted: bool,
    store: EmbeddedStore,
    prefix: str,
    kills: int,
    seed: int,
    kill_store: Callable[[], EmbeddedStore] | None,
    most_s: float,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rig = Rig(disk / "spool", home / "truth.jsonl", store, prefix, seed)
    told = Told()
    proxy = Faulty(store, rig.words, _FAULT, _PORT)
    rig.endpoint = proxy.endpoint
    _warm_up(rig, home / "warm")
    pids = [_fork(proxy.serve_forever), _fork(lambda: write_rows(rig))]
    proxy.socket.close()
    lives = _Lives(rig, rng, told)
    began = time.monotonic()
    try:
        _torment(rig, lives, told, rng, kills, began + most_s, disk if mounted else None, kill_store)
        rig.words[_FAULT] = Fault.NONE
        for role in range(3):
            lives.kill(role)
        lives.start(0, deadly=False)
        _wait(lives, 1.0)  # the last windows pass while rows still come
        rig.words[_END] = 1
        os.waitpid(pids.pop(), 0)
        finished = lives.last(0, 300.0)
        rig.words[_END] = 2
        lives.store = rig.client(rig.endpoint)  # nothing fails any more: what is slow now is only slow
        drained = lives.last(2, 300.0)
        at_last = rig.client()
    finally:
        for role in range(3):
            lives.kill(role)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        rig.arena.close()
    return {
        **_count(rig, at_last, home),
        "kills": sum(told.kills.values()),
        **{f"kills_{r}": told.kills[r] for r in ROLES},
        "kills_at_steps": told.at_steps,
        "ended_badly": len(told.ended_badly),
        "recorder_finished": int(finished),
        "spool_drained": int(drained),
        "recorder_outages_longer_than_ring": told.outages,
        "store_kills": told.store_kills,
        "full_disk": told.full_disk,
        **{f"fault_{k}": n for k, n in sorted(told.faults.items())},
        "seconds": time.monotonic() - began,
        "problems": told.ended_badly,
    }


def _warm_up(rig: Rig, root: Path) -> None:
    """Import and compile here, before the processes part: a recorder that needs seconds for it in each of its
    short lives would never come to look at its rings."""
    rings = (rig.rings.control, rig.rings.frames, rig.rings.events)
    rings[0].push(rings[0].record())
    rings[1].push_frame(rings[1].record(), dict.fromkeys(CAMERAS, b""))
    EventLog(rings[2]).add(0, "state", "warm")
    journal = Journal(memoryview(bytearray(JOURNAL_BYTES)))
    recorder = Recorder(rig.rings, SETTINGS, root, Identity("lab", "r1", "wall", 0, "bench"), journal=journal)
    recorder.poll(1)
    for ring in rings:
        ring.header[:] = 0


def _torment(
    rig: Rig,
    lives: _Lives,
    told: Told,
    rng: np.random.Generator,
    kills: int,
    until: float,
    disk: Path | None,
    kill_store: Callable[[], EmbeddedStore] | None,
) -> None:
    faults = [f for f in Fault if f is not Fault.NONE]
    round_ = 0
    while sum(told.kills.values()) < kills and time.monotonic() < until:
        round_ += 1
        rig.words[_FAULT] = Fault.NONE
        _wait(lives, float(rng.uniform(0.5, 1.5)))
        fault = faults[round_ % len(faults)]
        told.faults[fault.name.lower()] += 1
        rig.words[_FAULT] = fault
        _wait(lives, float(rng.uniform(0.5, 1.5)))
        if round_ % 12 == 3:  # the network is cut for longer than the ring
            rig.words[_FAULT] = Fault.CUT
            told.faults["cut_longer_than_ring"] += 1
            _wait(lives, RING_S + 1.0)
        if round_ % 12 == 5 and disk is not None:
            told.full_disk += 1
            _fill(disk)
            _wait(lives, 1.5)
            (disk / "ballast").unlink(missing_ok=True)
        if round_ % 12 == 7:  # the recorder is away for longer than the ring: what there is, and the gap
            rig.words[_QUIET] = _EVENTS  # a stop that only rows tell of would be gone unseen
            _wait(lives, 0.3)
            lives.held[0] = True
            lives.kill(0)
            _wait(lives, 0.8)
            rig.words[_QUIET] = _SILENT
            _wait(lives, RING_S)
            told.outages += 1
            lives.held[0] = False
            rig.words[_QUIET] = _ALL
        if round_ % 12 == 9 and kill_store is not None:
            told.store_kills += 1
            _revive(rig, lives, kill_store)


def _revive(rig: Rig, lives: _Lives, kill_store: Callable[[], EmbeddedStore]) -> None:
    """Kill the store and start it, in a process of its own: a recorder that dies meanwhile is started again
    as at any other time."""
    pid = _fork(lambda: rig.found(kill_store()))
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        _wait(lives, 0.05)


def _wait(lives: _Lives, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        lives.look()
        time.sleep(0.003)


def _fill(disk: Path) -> None:
    """Leave nothing free."""
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as f:
        while True:
            f.write(bytes(1 << 16))


@contextmanager
def _mounted(disk: Path) -> Iterator[bool]:
    """A small file system there; false where none may be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=False)


# ── the count ────────────────────────────────────────────────────────────────────────────────────────


def _count(rig: Rig, store: Store, home: Path) -> dict[str, Any]:
    """Each trigger against the episodes; each episode against its hashes, its rows and its neighbours."""
    fired = [tuple(json.loads(line)) for line in rig.truth.read_text().splitlines()]
    fired = [f for f in fired if f[1]]
    stored: dict[str, Manifest] = {}
    damaged: list[str] = []
    unreadable = 0
    for listed in ls(store):
        if listed.manifest is None:
            unreadable += 1
            continue
        m = listed.manifest
        if m.episode_id in stored:
            damaged.append(f"{m.episode_id} is in the store twice")
        stored[m.episode_id] = m
        try:
            directory = pull(store, listed.prefix, home / "pulled")
            damaged += _unsound(directory)
            shutil.rmtree(directory)
        except FlywheelError as e:
            damaged.append(f"{m.episode_id}: {e}")
    queue = Queue(rig.root, QUOTA)
    waiting = {q.manifest.episode_id: q.manifest for q in queue.pending()}
    for q in queue.pending():
        damaged += _unsound(q.path)
    for d in queue.damaged.iterdir():
        why = d / "why.txt"
        damaged.append(f"{d.name}: {why.read_text() if why.exists() else 'no reason was kept'}")
    dropped = {d.name for d in queue.summaries()} | {
        i.key.split("/")[-2] for i in store.list("episodes/") if i.key.endswith("/dropped.json")
    }
    everything = stored | waiting
    spans = sorted(m.window_ns for m in everything.values())
    overlaps = sum(a[1] > b[0] for a, b in pairwise(spans))
    told = Counter((t.t_ns, t.kind.value) for m in everything.values() for t in m.triggers)
    lost = [f for f in fired if not told[f]]
    markers = Counter(i.key[-41:-5] for i in store.list("inbox/"))
    return {
        "triggers": len(fired),
        "episodes": len(everything),
        "in_store": len(stored),
        "in_spool": len(waiting.keys() - stored.keys()),
        "in_both": len(waiting.keys() & stored.keys()),
        "lost": len(lost),
        "recorded_twice": sum(n > 1 for n in told.values()) + overlaps,
        "damaged": len(damaged),
        "dropped_by_quota": len(dropped),
        "manifests_that_the_store_spoiled": unreadable,
        "without_marker": sum(markers[e] == 0 for e in stored),
        "marked_twice": sum(n > 1 for n in markers.values()),
        "with_gaps": sum(m.drops > 0 for m in everything.values()),
        "rows_missing": sum(m.drops for m in everything.values()),
        "lost_which": lost[:5],
        "damaged_which": damaged[:5],
        "objects": sum(1 for i in store.list("episodes/") if not i.key.endswith(MANIFEST_FILE)),
    }


def _unsound(directory: Path) -> list[str]:
    """What is wrong with an episode: ``verify``, and that its rows are every tick of its window."""
    found = [str(p) for p in verify(directory) if p.fatal]
    if found:
        return found
    e = read(directory)
    n = as_array(e.control, "q_ref")[:, 0].astype(np.int64)
    skipped = int(((np.diff(n) - 1) % (1 << 20)).sum())
    first, last = e.manifest.window_ns
    missing = (last - first) // MS - len(n)
    if skipped > e.manifest.drops or missing > e.manifest.drops + 1:
        found.append(f"{directory.name}: {missing} ticks missing, {e.manifest.drops} counted")
    return found


def crash(full: bool = False) -> dict[str, Any]:
    """A minute of it with a few dozen kills, or 1,000 kills with ``full``."""
    from flywheel.services.ceph import Ceph
    from flywheel.services.process import alive, running

    load = os.getloadavg()
    home = Path(tempfile.mkdtemp(prefix="flywheel-crash-"))
    ceph = Ceph(home / "store")

    def kill_store() -> EmbeddedStore:
        if (process := running(ceph.run, "radosgw")) is not None:
            os.kill(process.pid, signal.SIGKILL)
            while alive(process):  # its port is not free before
                time.sleep(0.01)
        return ceph.up(lambda _: None)

    try:
        (home / "store").mkdir()
        embedded = ceph.up(lambda _: None)
        found = run(
            home / "run",
            embedded,
            "crash",
            kills=1000 if full else 10_000,
            kill_store=kill_store,
            most_s=3600.0 if full else 25.0,
        )
    finally:
        ceph.down()
        shutil.rmtree(home, ignore_errors=True)
    figures = {k: float(v) for k, v in found.items() if isinstance(v, int | float)}
    kept = figures["in_store"] + figures["in_spool"]
    bars: dict[str, tuple[float, str, float]] = {
        "lost": (figures["lost"], "<=", 0.0),
        "recorded_twice": (figures["recorded_twice"], "<=", 0.0),
        "damaged": (figures["damaged"], "<=", 0.0),
        "in_store_or_spool": (kept, ">=", figures["episodes"]),
        "kills": (figures["kills"], ">=", 1000.0 if full else 100.0),
    }
    return {
        "bench": "crash",
        "machine": machine(),
        "load": {
            "before": load,
            "after": os.getloadavg(),
            "notes": found["problems"],
            "lost": found["lost_which"],
            "damaged": found["damaged_which"],
        },
        "figures": figures,
        "bars": {
            k: {"value": v, "op": op, "bar": bar, "ok": v <= bar if op == "<=" else v >= bar}
            for k, (v, op, bar) in bars.items()
        },
    }
