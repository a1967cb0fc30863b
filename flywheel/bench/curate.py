"""``flywheel bench curate``: what curation costs, what poison it finds, and what a kill does to it.

Episodes are recorded in the twin by the product's own runtime and recorder: the base policy tries for a
moment, the operator corrects. The scan is taken in turns with a bare pyarrow read of the same files, like for
like: pyarrow decodes no picture, so ``tables`` is all that curation does but decode them (hashes, bounds,
every check of the signals), ``pictures`` is held against a bare decode, and ``examine`` is the whole, against
pyarrow alone. Poison is 10 % of each input (``flywheel.bench.poison``); what is mislabelled or corrupted was
made from episodes that are not in the input, so that nothing is found for being a repeat only. Where poison
changes the dataset, ``--full`` trains with and without it, and tries both policies on the same scenes
(``flywheel.bench.poison_effect``). Kills are SIGKILLs of a process that curates. With ``FLYWHEEL_RAY`` set,
that cluster curates the same input once more.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flywheel import __version__, episode
from flywheel.bench import poison_effect
from flywheel.bench.poison import KINDS, Poisoned, poisoned
from flywheel.config import CurateSettings, Deployment, EdgeSettings, RecorderSettings
from flywheel.curate import curate as run_stage
from flywheel.curate.checks import check_signals
from flywheel.curate.examine import Candidate, examine
from flywheel.curate.pictures import Film, decoded
from flywheel.curate.repeats import check_together
from flywheel.curate.select import select
from flywheel.curate.signals import Signals
from flywheel.dataset import dataset_digest
from flywheel.edge.bench import machine
from flywheel.edge.recorder import Identity, Recorder
from flywheel.errors import BundleError
from flywheel.schema import EPISODE_FILES

SETTINGS = CurateSettings()
SHIFT = "factory"  # where the base policy fails
SHARE = 0.1  # of an input that is poison
TRY_S = 6.0  # the policy's, before the operator takes over: as in the demo
EPOCH_NS = 1_767_225_600_000_000_000  # 2026-01-01: episodes are named alike in every run
REFUSED = ("quarantine:", "duplicate")


def record(parent: Path, count: int, seed: int, seconds: float) -> list[Path]:
    """Record ``count`` corrected episodes in the twin, or as many as ``seconds`` allow."""
    from flywheel.attempt import Attempt
    from flywheel.twin.cell import CAMERAS

    bundle = Path("models/base/bundle")
    if not bundle.is_dir():
        raise BundleError("bench curate records the base policy: start it in a checkout that has models/base")
    settings = RecorderSettings()
    edge = EdgeSettings()
    attempt = Attempt(
        bundle,
        SHIFT,
        record=True,
        operator_takes_over=True,
        episode_s=TRY_S,
        settings=edge,
        jpeg_quality=settings.quality(CAMERAS),
    )
    me = Identity("bench", "twin", "lockstep", EPOCH_NS, __version__, edge.control_hz, edge.policy_hz, SHIFT)
    recorder = Recorder(attempt.lockstep.rings, settings, parent, me, seed=seed)
    attempt.lockstep.recorder = recorder
    until = time.monotonic() + seconds
    try:
        for k in range(count):
            attempt.run(seed + k, ("red", "green")[k % 2])
            if time.monotonic() > until:
                break
        recorder.finish(attempt.lockstep.now_ns)
    finally:
        attempt.close()
    return sorted(d for d in parent.iterdir() if d.is_dir() and not d.name.startswith("."))


# ── cost ─────────────────────────────────────────────────────────────────────────────────────────────


def _bare(directory: Path) -> None:
    for name in EPISODE_FILES:
        pq.read_table(directory / name)


def _tables(directory: Path) -> None:
    """All that curation does with an episode but decode its pictures."""
    _, e = episode.inspect(directory)
    if e is not None:
        check_signals(e, Signals.of(e), SETTINGS.checks)


def _pictures(directory: Path) -> None:
    import simplejpeg

    column = pq.read_table(directory / EPISODE_FILES[1], columns=["image.wrist"]).column(0)
    for data in column.to_pylist():
        simplejpeg.decode_jpeg(data)


def _decoded(directory: Path) -> None:
    table = pq.read_table(directory / EPISODE_FILES[1], columns=["image.wrist"])
    decoded(Film.of(table, "wrist"), np.arange(table.num_rows))


def scan(directories: Sequence[Path], rounds: int) -> dict[str, float]:
    """Each part in turns with its bare peer, over the same files; medians of ratios of CPU time."""
    ways = {
        "bare": _bare,
        "verify": episode.verify,
        "tables": _tables,
        "examine": lambda d: examine(d, SETTINGS),
        "bare_pictures": _pictures,
        "pictures": _decoded,
    }
    took: dict[str, list[float]] = {k: [] for k in ways}
    wall: dict[str, list[float]] = {k: [] for k in ways}
    for k in range(rounds + 1):
        for name, way in ways.items():
            cpu, begun = time.process_time(), time.perf_counter()
            for d in directories:
                way(d)
            if k:  # the first round warms up
                took[name].append(time.process_time() - cpu)
                wall[name].append(time.perf_counter() - begun)
    cpu_s = {k: np.array(v) for k, v in took.items()}
    n = len(directories)
    figures = {f"{k}_ms": float(np.median(v)) / n * 1e3 for k, v in cpu_s.items()}
    figures |= {f"{k}_per_s": n / float(np.median(v)) for k, v in wall.items() if k in ("bare", "examine")}
    for name in ("verify", "tables", "examine"):
        figures[f"{name}_ratio_bare"] = float(np.median(cpu_s["bare"] / cpu_s[name]))
    figures["pictures_ratio_bare"] = float(np.median(cpu_s["bare_pictures"] / cpu_s["pictures"]))
    figures["examine_ratio_bare_wall"] = float(np.median(np.array(wall["bare"]) / np.array(wall["examine"])))
    return figures


# ── poison ───────────────────────────────────────────────────────────────────────────────────────────


def judge(
    sound: Sequence[Candidate], bad: Sequence[tuple[Poisoned, Candidate]], share: float = SHARE, seed: int = 0
) -> dict[str, Any]:
    """Curate inputs of the sound episodes and ``share`` of poison until every poisoned one had its turn.

    Counts of reasons by kind of poison, and of the sound episodes over all inputs.
    """
    each = max(1, round(len(sound) * share / (1 - share)))
    order = np.random.default_rng(seed).permutation(len(bad))
    kinds: dict[str, Counter[str]] = {k: Counter() for k in KINDS}
    healthy: Counter[str] = Counter()
    for start in range(0, len(bad), each):
        part = [bad[i] for i in order[start : start + each]]
        mine, theirs = [copy.copy(c) for c in sound], [copy.copy(c) for _, c in part]
        check_together([*mine, *theirs], SETTINGS.checks)
        select([*mine, *theirs], SETTINGS)
        healthy.update(c.reason for c in mine)
        for (p, _), c in zip(part, theirs, strict=True):
            kinds[p.kind][c.reason] += 1
    return {"kinds": {k: dict(v) for k, v in kinds.items() if v}, "healthy": dict(healthy)}


def _refused(reasons: dict[str, int]) -> int:
    return sum(n for r, n in reasons.items() if r.startswith(REFUSED))


def poison_figures(found: dict[str, Any]) -> dict[str, float]:
    """Shares that were quarantined or told as copies, of all, by group and by kind; of the healthy too."""
    figures: dict[str, float] = {}
    groups: dict[str, list[int]] = {"all": [0, 0]}
    for kind, reasons in found["kinds"].items():
        hit, n = _refused(reasons), sum(reasons.values())
        figures[f"found_{kind}"] = hit / n
        for g in ("all", KINDS[kind][0]):
            counts = groups.setdefault(g, [0, 0])
            counts[0] += hit
            counts[1] += n
    figures |= {f"poison_found_{g}": hit / n for g, (hit, n) in groups.items()}
    figures["poisoned"] = float(groups["all"][1])
    healthy = found["healthy"]
    figures["healthy_refused"] = _refused(healthy) / sum(healthy.values())
    return figures


# ── kills ────────────────────────────────────────────────────────────────────────────────────────────


def _start(inbox: Path, out: Path) -> int:
    """Curate in a process of its own; its id. It ends with 0, or 1 if curation failed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run_stage(inbox, out, SETTINGS)
            code = 0
        finally:
            os._exit(code)
    return pid


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kills(inbox: Path, root: Path, count: int, seed: int) -> dict[str, float]:
    """Kill it at random times, then let it finish: the dataset must be that of a run in peace."""
    begun = time.monotonic()
    expected = run_stage(inbox, root / "peace", SETTINGS)
    first_s = time.monotonic() - begun
    begun = time.monotonic()
    if (code := _ended(_start(inbox, root / "warm"))) != 0:
        raise RuntimeError(f"curation in a process of its own ended with {code}")
    length = time.monotonic() - begun
    rng = np.random.default_rng(seed)
    out = root / "killed"
    killed, differences = 0, 0
    for k in range(count):
        if k % 4 == 0:
            shutil.rmtree(out, ignore_errors=True)  # else what is there already is replaced
        pid = _start(inbox, out)
        time.sleep(float(rng.uniform(0.0, length)))
        os.kill(pid, signal.SIGKILL)
        killed += _ended(pid) == -signal.SIGKILL
        if k % 2:  # two kills in a row now and then
            differences += _ended(_start(inbox, out)) != 0 or not _same(out, expected.dataset_sha256)
    together = [_start(inbox, root / "both") for _ in range(2)]
    failed = sum(_ended(p) != 0 for p in together)
    both = failed + (not _same(root / "both", expected.dataset_sha256))
    leftovers = {p.name for p in (root / "both").iterdir()} | {p.name for p in out.iterdir()}
    return {
        "curation_s": first_s,
        "curation_again_s": length,
        "killed": float(killed),
        "differences_after_kills": float(differences),
        "differences_of_two_at_once": float(both),
        "leftovers": float(len(leftovers - {"dataset", "selection.parquet", "curate.json"})),
    }


def on_ray(inbox: Path, root: Path, ray: str) -> dict[str, float]:
    """The same curation here and on a cluster: 0 if they come to the same, byte for byte."""
    here, there = run_stage(inbox, root / "here", SETTINGS), run_stage(inbox, root / "ray", SETTINGS, ray=ray)
    selections = [(root / x / "selection.parquet").read_bytes() for x in ("here", "ray")]
    same = here == there and selections[0] == selections[1] and _same(root / "ray", here.dataset_sha256)
    return {"differences_on_ray": float(not same)}


def _same(out: Path, expected: str) -> bool:
    return (out / "dataset").is_dir() and dataset_digest(out / "dataset") == expected


# ── the benchmark ────────────────────────────────────────────────────────────────────────────────────


def curate(full: bool = False) -> dict[str, Any]:
    """Measure for about a minute, or several with ``full``; the document of ``flywheel bench --json``."""
    load = os.getloadavg()
    root = Path(tempfile.mkdtemp(prefix="flywheel-curate-"))
    begun = time.monotonic()
    try:
        found = record(root / "sound", 120 if full else 24, seed=1, seconds=400.0 if full else 120.0)
        apart = max(2, len(found) // 6)
        return _document(found[apart:], found[:apart], root, full, load, begun)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _document(
    sound: Sequence[Path],
    apart: Sequence[Path],
    root: Path,
    full: bool,
    load: tuple[float, float, float],
    begun: float,
) -> dict[str, Any]:
    recorded_s = time.monotonic() - begun
    figures = scan(sound[:12], 30 if full else 15)
    per_kind = 8 if full else 1
    fresh = [k for k, (group, _) in KINDS.items() if group != "repeated"]
    again = [k for k, (group, _) in KINDS.items() if group == "repeated"]
    made = poisoned(apart, root / "poison", per_kind * len(fresh), 7, fresh)
    made += poisoned(sound, root / "again", max(2, per_kind) * len(again), 8, again)
    candidates = [examine(d, SETTINGS) for d in sound]
    found = judge(candidates, [(p, examine(p.directory, SETTINGS)) for p in made])
    figures |= poison_figures(found)
    mixed = poison_effect.inputs(sound, made, root / "mixed", SETTINGS, SHARE, 1000 if full else 3, seed=4)
    figures |= mixed.figures
    inbox = root / "inbox"
    inbox.mkdir()
    for d in [*sound[:10], *(p.directory for p in made[:2])]:
        shutil.copytree(d, inbox / d.name)
    figures |= kills(inbox, root / "kills", 40 if full else 4, seed=3)
    if ray := Deployment.from_env().ray:
        figures |= on_ray(root / "sound", root / "on_ray", ray)
    if full:  # in processes of its own: what forks above has no threads
        figures |= poison_effect.success(mixed, SHIFT, root / "effect", Path.cwd())
    figures |= {"episodes": float(len(sound)), "recorded_s": recorded_s, "seconds": time.monotonic() - begun}
    bars = {
        "tables_ratio_bare": (figures["tables_ratio_bare"], ">=", 0.5),
        "pictures_ratio_bare": (figures["pictures_ratio_bare"], ">=", 0.5),
        "examine_ratio_bare": (figures["examine_ratio_bare"], ">=", 0.5),
        "poison_found_all": (figures["poison_found_all"], ">=", 0.95),
        "differences_after_kills": (figures["differences_after_kills"], "<=", 0.0),
        "differences_of_two_at_once": (figures["differences_of_two_at_once"], "<=", 0.0),
    }
    if full:
        bars["success_change_by_poison_high"] = (figures["success_change_by_poison_high"], ">=", 0.0)
        untried = figures["datasets_changed_by_poison"] - figures["datasets_tried"]
        bars["datasets_changed_but_not_tried"] = (untried, "<=", 0.0)
    else:
        bars["datasets_changed_by_poison"] = (figures["datasets_changed_by_poison"], "<=", 0.0)
    if ray:
        bars["differences_on_ray"] = (figures["differences_on_ray"], "<=", 0.0)
    return {
        "bench": "curate",
        "machine": machine(),
        "load": {
            "before": load,
            "after": os.getloadavg(),
            "named": f"curation alone; ray: {ray or 'none'}",
            **found,
        },
        "figures": figures,
        "bars": {
            k: {"value": v, "op": op, "bar": bar, "ok": v <= bar if op == "<=" else v >= bar}
            for k, (v, op, bar) in bars.items()
        },
    }
