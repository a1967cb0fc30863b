"""``flywheel bench faults``: what the runtime does to a moving robot while its other parts fail.

Real processes and real signals: a supervisor with both systems, a recorder and an uploader moves the rig
(see ``rig``) on the wall clock, and one fault after another happens in mid-motion. Of each it is measured,
over every tick until the robot moves again: how late System 1 was, what the executed reference demanded of
the joints against their limits, how long until rest if the ladder was taken, and what the runtime reported.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.edge.faults import rig
from flywheel.edge.faults.scene import ROUNDING, TRIAL_S, Scene, Seen, SmallDisk, rig_plan, twin_scene
from flywheel.edge.policy import Policy
from flywheel.edge.runtime import read_bundle
from flywheel.edge.tick import HEARTBEAT_LIMIT_NS
from flywheel.robot import FloatArray, Image

STALL_MS = 500.0
SLOW_MS = 250.0
WRITES, WRITE_S = 150, 0.01  # bad chunks, and the time between two
Reports = list[tuple[str, dict[str, Any]]]


def faults(full: bool = False) -> dict[str, Any]:
    """Every fault once; with ``full`` also on the twin with the base policy. Returns the bench's document."""
    from flywheel.edge.bench import machine

    load_before = os.getloadavg()
    root = Path(tempfile.mkdtemp(prefix="flywheel-faults-"))
    disk = SmallDisk(root / "spool")
    saved = {k: os.environ.get(k) for k in _NOWHERE}
    try:
        os.environ.update(_NOWHERE | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{_closed_port()}"})
        with disk:
            seen = _on_the_rig(root, disk)
        if full:
            seen += _on_the_twin(root)
    finally:
        for k, v in saved.items():
            os.environ.pop(k, None)
            if v is not None:
                os.environ[k] = v
        shutil.rmtree(root, ignore_errors=True)
    figures = {f"{_key(s.name)}_{k}": v for s in seen for k, v in _numbers(s).items()}
    bars = _bars(seen)
    return {
        "bench": "faults",
        "machine": machine(),
        "load": {
            "before": load_before,
            "after": os.getloadavg(),
            "named": "the runtime itself; the machine's own load besides",
            "disk": "tmpfs of 64 MiB" if disk.mounted else "RLIMIT_FSIZE: no file system can be mounted here",
        },
        "figures": figures,
        "bars": {
            k: {"value": v, "op": "<=", "bar": bar, "ok": v <= bar * (1 + ROUNDING)}
            for k, (v, bar) in bars.items()
        },
        "faults": [dataclasses.asdict(s) | {"within_limits": s.within_limits} for s in seen],
    }


def _closed_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


_NOWHERE = {
    "AWS_ENDPOINT_URL": "",
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "FLYWHEEL_STORE": "s3://nowhere",
}


def _key(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).replace("__", "_").strip("_")


def _numbers(s: Seen) -> dict[str, float]:
    rest = {} if s.rest_s is None else {"rest_s": s.rest_s}
    return {
        "late_max_us": s.late_max_us,
        "misses": float(s.misses),
        "jerk": s.jerk,
        "acceleration": s.acceleration,
        "velocity": s.velocity,
        "ladder_s": s.ladder_s,
        **rest,
    }


def _bars(seen: list[Seen]) -> dict[str, tuple[float, float]]:
    """Of all faults together: the worst of each."""
    rest = max(
        (s.rest_s / (s.bound_s or 1e-9) for s in seen if s.rest_s is not None and s.bound_s is not None),
        default=0.0,
    )
    return {
        "jerk_of_limit": (max(s.jerk for s in seen), 1.0),
        "acceleration_of_limit": (max(s.acceleration for s in seen), 1.0),
        "velocity_of_limit": (max(s.velocity for s in seen), 1.0),
        "beyond_range_rad": (max(s.range_rad for s in seen), 0.0),
        "rest_after_fault_of_bound": (float(rest), 1.0),
        "rest_by_ladder_of_bound": (max(s.ladder_s / s.ladder_bound_s for s in seen), 1.0),
        "faults_with_a_limit_exceeded": (float(sum(not s.within_limits for s in seen)), 0.0),
        "faults_not_as_expected": (float(sum(not s.as_expected for s in seen)), 0.0),
    }


def _said(*names: str) -> Callable[[Reports], bool]:
    """Whether all of these were reported."""
    return lambda reports: set(names) <= {n for n, _ in reports}


def _after(seconds: float) -> Callable[[Reports], bool]:
    """Whether some time has passed since the first look."""
    end: list[float] = []

    def over(_: Reports) -> bool:
        end.append(time.monotonic() + seconds)
        return time.monotonic() >= end[0]

    return over


def _pause(scene: Scene, role: str, seconds: float) -> None:
    scene.kill(role, signal.SIGSTOP)
    time.sleep(seconds)
    scene.kill(role, signal.SIGCONT)


def _on_the_rig(root: Path, disk: SmallDisk) -> list[Seen]:
    bundles = root / "bundles"
    circle = rig.write_circle(bundles / "circle")
    with Scene(root, rig_plan(root, circle)) as scene:
        return [
            *_system2(scene),
            *_recorder(scene, root),
            *_supervisor(scene),
            *_policies(scene, bundles),
            *_chunks(scene),
            *_disk_and_store(scene, root, disk),
        ]


def _ladder_s(scene: Scene) -> float:
    """From the last chunk's observation to rest, at most: its validity, then the ladder's own bounds."""
    ladder, b = scene.ladder, scene.plan.bundle
    valid_s = min(b.execute * b.step_ns * 1e-9, ladder.max_age_s)
    return valid_s + ladder.carry_on_s + ladder.ramp_s


def _system2(scene: Scene) -> Iterator[Seen]:
    bound = _ladder_s(scene)
    ended = _said("system2_ended", "follow")
    yield scene.watch("System 2: kill -9", lambda: scene.kill("system2", signal.SIGKILL), ended, bound)
    yield scene.watch(
        "System 2: SIGSTOP 0.5 s, SIGCONT", lambda: _pause(scene, "system2", 0.5), _after(0.5), bound
    )
    yield scene.watch("System 2: SIGSTOP", lambda: scene.kill("system2", signal.SIGSTOP), ended, bound)
    yield scene.watch("System 2: restart", lambda: scene.kill("system2", signal.SIGTERM), ended, bound)


def _recorder(scene: Scene, root: Path) -> Iterator[Seen]:
    """In the middle of an episode, which the next recorder must seal."""

    def sealed(before: int) -> Callable[[Reports], bool]:
        return lambda said: "recorder_ended" in {n for n, _ in said} and _episodes(scene) > before

    for name, how in (("kill -9", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP), ("restart", signal.SIGTERM)):

        def fault(how: signal.Signals = how) -> None:
            _intervene(root)
            scene.kill("recorder", how)

        yield scene.watch(f"recorder: {name}", fault, sealed(_episodes(scene)))


def _supervisor(scene: Scene) -> Iterator[Seen]:
    bound = HEARTBEAT_LIMIT_NS * 1e-9 + scene.ladder.ramp_s

    taken = _said("taken_over")
    yield scene.watch(
        "supervisor: kill -9, the next one at once", partial(_next_supervisor, scene), taken, bound
    )
    yield scene.watch(
        "supervisor: kill -9, the next one after 4 s", partial(_next_supervisor, scene, 4.0), taken, bound
    )
    yield scene.watch(
        "supervisor: SIGSTOP 3 s, SIGCONT",
        lambda: _pause(scene, "supervisor", 3.0),
        _said("hold", "follow"),
        bound,
    )


ANY = None  # the fault has no single moment: the ladder's own bound is what counts


def _policies(scene: Scene, bundles: Path) -> Iterator[Seen]:
    ms = _trip_ms(bundles)
    other = rig.write_circle(bundles / "other", "other")
    yield scene.watch("bundle: swap", partial(scene.swap, other), _said("swapped", "confirmed"))
    bad = {
        "crashes": rig.write_crash(bundles / "crash"),
        "NaN": rig.write_nan(bundles / "nan"),
        "too slow": rig.write_slow(bundles / "slow", "slow", round(SLOW_MS / ms), always=True),
    }
    for name, directory in bad.items():
        for _ in range(3):  # one that already fails at its self-test never acts: not what is asked here
            seen = scene.watch(
                f"bundle: {name}",
                partial(scene.swap, directory),
                lambda said: bool({"fell_back", "refused"} & {n for n, _ in said}),
                ANY,
            )
            if any(s.startswith("fell_back") for s in seen.said):
                break
        yield seen
    damaged = rig.write_circle(bundles / "damaged", "damaged")
    yield scene.watch(
        "bundle: not the verified bytes", partial(scene.swap, damaged, "0" * 64), _said("refused")
    )
    stall = rig.write_slow(bundles / "stall", "stall", round(STALL_MS / ms), always=False)
    frames = scene.shared.frames.reader(from_start=False)
    seen = scene.watch(
        "bundle: inference stalls for 500 ms",
        partial(scene.swap, stall),
        _said("swapped", "confirmed"),
        ANY,
    )
    longest = frames.poll().rows["infer_ns"].max() * 1e-6
    yield dataclasses.replace(seen, said=(*seen.said, f"longest inference {longest:.0f} ms"))
    scene.reports()
    scene.swap(other)  # what follows is not to be blamed on the stalls
    scene.wait(lambda: any(name == "confirmed" for name, _ in scene.reports()), 60.0)


def _trip_ms(bundles: Path) -> float:
    """What one product of the slow policies costs here, ms."""
    trips = 20
    policy = Policy.load(rig.write_slow(bundles / "probe", "probe", trips, always=True))
    image: dict[str, Image] = {"eye": np.zeros((rig.SIDE, rig.SIDE, 3), np.uint8)}
    state = np.zeros(rig.JOINTS, np.float32)
    return min(policy.infer(image, state, "move").infer_ns for _ in range(5)) * 1e-6 / trips


def _chunks(scene: Scene) -> Iterator[Seen]:
    """What a broken or hostile writer could put into the slot, beside the chunks of System 2."""
    rng = np.random.default_rng(0)
    slot = scene.shared.slot

    def write(q: FloatArray | None) -> None:
        record = slot.record()
        for _ in range(WRITES):
            if q is None:
                record.view(np.uint8)[:] = rng.integers(0, 256, record.nbytes, np.uint8)
            else:
                record["chunk_id"], record["t0_ns"] = 1 << 40, time.monotonic_ns()
                record["step_ns"], record["steps"], record["valid_ns"] = 100_000_000, 16, 800_000_000
                record["q"] = q
            slot.write(record)
            time.sleep(WRITE_S)

    far = np.where(np.arange(rig.JOINTS) % 2, 1e3, -1e3)
    yield scene.watch("slot: garbage bytes", lambda: write(None), _after(0.5), ANY)
    yield scene.watch("slot: NaN", lambda: write(np.full(rig.JOINTS, np.nan)), _after(0.5), ANY)
    yield scene.watch("slot: out of range", lambda: write(far), _after(0.5), ANY)


def _disk_and_store(scene: Scene, root: Path, disk: SmallDisk) -> Iterator[Seen]:
    def full() -> None:
        if disk.mounted:
            disk.fill()
        else:
            scene.limit_files("recorder", 4096)
        _intervene(root)

    def count(what: str) -> int:
        return int(scene.told("recorder").get(what, 0))

    def free() -> None:
        if disk.mounted:
            disk.free()
        else:
            scene.limit_files("recorder", -1)
        _intervene(root)

    def said(role: str, key: str, seen: Seen) -> Seen:
        return dataclasses.replace(seen, said=(*seen.said, f"{role}: {scene.told(role).get(key)}"))

    # Older episodes make room for a newer one, as far as there are any that matter no more than it does.
    sealed = count("sealed")
    seen = scene.watch("disk full", full, lambda _: count("refused") > 0 or count("sealed") > sealed)
    dropped = f"spool: {len(list((scene.spool / 'dropped').glob('*')))} older episodes dropped"
    seen = said("recorder", "why", seen)
    yield dataclasses.replace(seen, said=(*seen.said, dropped))
    sealed = count("sealed")
    yield scene.watch(
        "disk has room again", free, lambda _: count("refused") == 0 and count("sealed") > sealed
    )
    seen = scene.watch(
        "store unreachable", lambda: None, lambda _: scene.told("uploader").get("waiting", 0) > 0
    )
    yield said("uploader", "problem", seen)


def _intervene(root: Path) -> None:
    """The operator steps in for a moment: an episode."""
    (root / rig.INTERVENE).touch()
    time.sleep(0.4)
    (root / rig.INTERVENE).unlink()


def _episodes(scene: Scene) -> int:
    """Sealed episodes on the robot's disk."""
    return sum(
        1 for d in (scene.spool / "episodes").glob("*/manifest.json") if not d.parent.name.startswith(".")
    )


def _on_the_twin(root: Path) -> Iterator[Seen]:
    """The same for the trained policy and the simulated arm, each time in the middle of a fresh attempt."""
    base = Path("models/base/bundle")
    renamed = root / "bundles" / "renamed"  # the same weights: another digest, the same motion
    shutil.copytree(base, renamed)
    bundle = read_bundle(base)
    (renamed / "policy.json").write_bytes(bundle.model_copy(update={"name": "renamed"}).to_bytes())
    acts: dict[str, tuple[Callable[[Scene], object], tuple[str, ...], bool]] = {
        "System 2: kill -9": (lambda s: s.kill("system2", signal.SIGKILL), ("system2_ended", "follow"), True),
        "recorder: kill -9": (lambda s: s.kill("recorder", signal.SIGKILL), ("recorder_ended",), False),
        "supervisor: kill -9": (_next_supervisor, ("taken_over",), True),
        "bundle: swap": (lambda s: s.swap(renamed), ("swapped",), False),
    }
    for k, (name, (act, reports, may_rest)) in enumerate(acts.items()):
        with Scene(root / f"twin{k}", twin_scene(root / f"twin{k}", base, seed=k), moving=0.05) as scene:
            bound = max(_ladder_s(scene), HEARTBEAT_LIMIT_NS * 1e-9 + scene.ladder.ramp_s)
            yield scene.watch(
                f"twin, {name}", partial(act, scene), _said(*reports), bound if may_rest else 0.0
            )


def _next_supervisor(scene: Scene, pause_s: float = 0.0) -> None:
    scene.kill("supervisor", signal.SIGKILL)
    time.sleep(pause_s)
    scene.start()


def table(doc: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for people."""
    columns = [
        "fault",
        "late max",
        "misses",
        "jerk",
        "accel.",
        "velocity",
        "at rest",
        "worst",
        "reported",
        "",
    ]
    lines = []
    for f in doc["faults"]:
        rest = "kept moving"
        if f["rest_s"] is not None:
            rest = f"{f['rest_s']:.2f} s, {f['ladder_s']:.2f} of {f['ladder_bound_s']:.2f}"
        lines.append(
            [
                f["name"],
                f"{f['late_max_us'] * 1e-3:.2f} ms",
                f["misses"],
                f"{f['jerk']:.2f}",
                f"{f['acceleration']:.2f}",
                f"{f['velocity']:.2f}",
                rest,
                f["worst_mode"],
                "; ".join(f["said"]),
                "ok" if f["as_expected"] and f["within_limits"] else "NOT OK",
            ]
        )
    return columns, lines


assert 2 * np.pi / rig.SPEED < TRIAL_S  # each variant comes to where it fails
