"""``flywheel bench turns --full``: three turns on three successive shifts, by three ways to choose the data.

From the base policy, each way (``CHOICES``) turns the wheel in every shift of ``SHIFTS`` after the other. Its
own policy collects the failures of its next turn; in the first turn all have the base policy's. ``coverage``
and ``random`` may take ``SHARE`` of the episodes that could be used, ``all`` takes all. Stages, settings and
the replay of earlier turns are the product's. Every policy is then tried on the same scenes in every shift,
so any two are compared pair by pair.

What this shows holds for one training run by way and turn: the intervals are of the scenes, and do not hold
what another seed of the training would change.

The study takes about an hour of two cores. Each step's result is kept in ``out`` (default
``FLYWHEEL_HOME/bench/turns``), so a study that is ended goes on where it was, and ``study.json`` and
``turns.png`` there always show what is known. Without ``--full`` nothing is run: what is there is shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flywheel.bench import turn_steps
from flywheel.bench.turn_steps import Demonstrate, Evaluate, Learn, Record
from flywheel.config import PARAMS_FILE, Deployment, Settings
from flywheel.edge.bench import machine
from flywheel.errors import ConfigError, StageError
from flywheel.schema import Proportion
from flywheel.stats import paired_difference, wilson
from flywheel.turn import BASE_POLICY
from flywheel.turn_plot import success_by_turn
from flywheel.twin.shift import SUCCESSION
from flywheel.workspace import source_checkout

SHIFTS = SUCCESSION
LAB = "lab"
CHOICES = ("coverage", "random", "all")
OURS, RANDOM, ALL = CHOICES
SHARE = 0.4
FAILURES = 110  # of a turn, as many as start one in params.yaml
ROBOTS = (1, 2, 3, 4)
SCENES = 100
SEED = 50_000  # of the scenes, on which no policy is trained, no gate falls and no setting is chosen
TRIES = 3
WORKERS = 2
LOOK_S = 0.5
BASE = "base"
# Each process has one core: two of them side by side do more than one with two threads.
_ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
Solved = dict[str, dict[int, dict[str, list[bool]]]]  # by choice, turn and shift; turn 0 is the base policy


@dataclass(frozen=True)
class Step:
    """One step; it may start when the results of ``needs`` are there."""

    name: str
    needs: tuple[str, ...]
    task: Record | Learn | Evaluate | Demonstrate

    def result(self, out: Path) -> Path:
        """Where it says what came of it."""
        return out / f"{self.name}.json"


# ── what is to be done ───────────────────────────────────────────────────────────────────────────────


def plan(out: Path, root: Path) -> list[Step]:
    """Every step, in the order in which they are to start."""
    params, base = str(out / PARAMS_FILE), str(root / BASE_POLICY)
    halves = {"record-a": ROBOTS[::2], "record-b": ROBOTS[1::2]}
    each = -(-FAILURES // len(ROBOTS))
    steps = [
        Step(f"{BASE}/{n}", (), Record(f"{base}/bundle", SHIFTS[0], 1, r, each, params, str(out / BASE / n)))
        for n, r in halves.items()
    ]
    steps.append(Step(f"{BASE}/replay", (), Demonstrate(params, str(out / BASE / "replay"))))
    later: list[Step] = []
    for k, shift in enumerate(SHIFTS, 1):
        for choice in CHOICES:
            here, before = f"{choice}/turn-{k}", [f"{choice}/turn-{j}" for j in range(k - 1, 0, -1)]
            policy = str(out / before[0] / "checkpoint") if before else base
            if before:
                episodes = [f"{here}/record"]
                task = Record(f"{policy}/bundle", shift, k, ROBOTS, each, params, str(out / here / "record"))
                steps.append(Step(f"{here}/record", (f"{before[0]}/learn",), task))
            else:
                episodes = [f"{BASE}/{n}" for n in halves]
            learn = Learn(
                episodes=tuple(str(out / e) for e in episodes),
                policy=policy,
                choice=choice,
                share=SHARE,
                before=tuple(str(out / b) for b in before),
                replay=str(out / BASE / "replay"),
                params=params,
                yardstick=str(root / "models" / "yardstick.json"),
                root=str(out / here),
            )
            steps.append(Step(f"{here}/learn", (*episodes, f"{BASE}/replay"), learn))
            done = Evaluate(str(out / here / "bundle"), _scenes(k), SEED)
            later.append(Step(f"{here}/success", (f"{here}/learn",), done))
    first = Evaluate(f"{base}/bundle", _scenes(0), SEED)
    return [*steps, *later, Step(f"{BASE}/success", (), first)]


def _scenes(k: int) -> dict[str, int]:
    """Where the policy of turn k (0: the base policy) is tried: more often where a bar asks for it."""
    if k == len(SHIFTS):
        return dict.fromkeys((*SHIFTS, LAB), SCENES)
    full = LAB if k == 0 else SHIFTS[k - 1]
    return {s: SCENES if s == full else SCENES // 2 for s in (*SHIFTS, LAB)}


def turns(full: bool = False, out: Path | None = None) -> dict[str, Any]:
    """Run what of the study is not there yet; its document, as far as it is known.

    Raises ``ConfigError`` without ``full`` where there is nothing to show, ``StageError`` where a step fails
    time and again.
    """
    root = source_checkout()
    out = (out or Deployment.from_env().home / "bench" / "turns").absolute()
    steps = plan(out, root)
    if not full:
        if not any(s.result(out).exists() for s in steps):
            raise ConfigError(
                f"bench turns: {out} holds no study, and one takes about an hour of two cores: add --full"
            )
        return document(out)
    out.mkdir(parents=True, exist_ok=True)
    _settle(out, root)
    _work(steps, out, root)
    return _publish(out)


def _settle(out: Path, root: Path) -> None:
    """The settings of the study are those of its first start: its parts must agree."""
    path = out / PARAMS_FILE
    if path.exists():
        return
    from ruamel.yaml import YAML

    yaml = YAML()
    doc = yaml.load((root / PARAMS_FILE).read_text(encoding="utf-8"))
    doc.setdefault("train", {}).update(processes=1, threads=1)
    fresh = path.with_suffix(".part")
    with fresh.open("w", encoding="utf-8") as f:
        yaml.dump(doc, f)
    Settings.load(fresh)
    fresh.replace(path)


def _work(steps: Sequence[Step], out: Path, root: Path) -> None:
    """Keep ``WORKERS`` steps under way until all are done. Its processes end with it."""
    env = (
        os.environ
        | _ONE_CORE
        | {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
    )
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: dict[str, int] = {}
    try:
        while True:
            for name, child in list(running.items()):
                if (code := child.poll()) is None:
                    continue
                del running[name]
                if code != 0:
                    failed[name] = failed.get(name, 0) + 1
                print(
                    f"{time.strftime('%H:%M:%S')} {name}: {'done' if code == 0 else f'ended with {code}'}",
                    flush=True,
                )
                _publish(out)
            done = {s.name for s in steps if s.result(out).exists()}
            ready = [
                s
                for s in steps
                if s.name not in done | running.keys()
                and failed.get(s.name, 0) < TRIES
                and done.issuperset(s.needs)
            ]
            for step in ready[: WORKERS - len(running)]:
                path = step.result(out)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.with_suffix(".log").open("ab") as log:
                    running[step.name] = subprocess.Popen(
                        turn_steps.command(step.task, path),
                        cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    )  # fmt: skip
            if not running:
                break
            time.sleep(LOOK_S)
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
    if gone := [n for n, times in failed.items() if times >= TRIES]:
        raise StageError(
            f"{gone[0]} failed {TRIES} times: see {out / gone[0]}.log; the study goes on from there"
        )


# ── what came of it ──────────────────────────────────────────────────────────────────────────────────


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return found


def read_solved(out: Path) -> Solved:
    """What is known of every policy; the base policy is every choice's turn 0."""
    base = _read(out / BASE / "success.json")
    found: Solved = {}
    for choice in CHOICES:
        turns_of = {k: _read(out / choice / f"turn-{k}" / "success.json") for k in range(1, len(SHIFTS) + 1)}
        found[choice] = {k: d["solved"] for k, d in ({0: base} | turns_of).items() if d is not None}
    return found


def differences(solved: Solved) -> dict[str, dict[str, float]]:
    """Every difference that the bars are about, and its like for the other choices, with its interval.

    ``<choice>_rise_<k>``: in turn k's shift, by turn k. ``<choice>_kept_<shift>``: in a shift, after the last
    turn against after its own (the lab: against the base policy). ``<choice>_less_<other>``: after the last
    turn, over all shifts; ``…_less_<other>_<k>``: in turn k's shift after turn k.
    """
    last = len(SHIFTS)
    pairs: dict[str, tuple[list[bool], list[bool]] | None] = {}

    def outcome(choice: str, turn: int, shift: str) -> list[bool]:
        return solved.get(choice, {}).get(turn, {}).get(shift, [])

    def everywhere(choice: str) -> list[bool]:
        parts = [outcome(choice, last, s) for s in SHIFTS]
        return [x for p in parts for x in p] if all(parts) else []

    for c in CHOICES:
        for k, shift in enumerate(SHIFTS, 1):
            pairs[f"{c}_rise_{k}"] = outcome(c, k - 1, shift), outcome(c, k, shift)
            if k < last:
                pairs[f"{c}_kept_{shift}"] = outcome(c, k, shift), outcome(c, last, shift)
        pairs[f"{c}_kept_{LAB}"] = outcome(c, 0, LAB), outcome(c, last, LAB)
    for other in (ALL, RANDOM):
        pairs[f"{OURS}_less_{other}"] = everywhere(other), everywhere(OURS)
        for k, shift in enumerate(SHIFTS, 1):
            pairs[f"{OURS}_less_{other}_{k}"] = outcome(other, k, shift), outcome(OURS, k, shift)
    found = {}
    for name, pair in pairs.items():
        if pair is not None and all(pair):
            n = min(map(len, pair))
            d = paired_difference(pair[0][:n], pair[1][:n])
            found[name] = {"value": d.diff, "low": d.low, "high": d.high, "n": float(d.n), "p": d.p}
    return found


def _rates(solved: Solved) -> dict[str, dict[str, list[Proportion | None]]]:
    def rate(by_shift: Mapping[str, list[bool]], shift: str) -> Proportion | None:
        tries = by_shift.get(shift)
        return wilson(sum(tries), len(tries)) if tries else None

    return {
        choice: {
            shift: [rate(by_turn.get(k, {}), shift) for k in range(len(SHIFTS) + 1)]
            for shift in (*SHIFTS, LAB)
        }
        for choice, by_turn in solved.items()
    }


def document(out: Path) -> dict[str, Any]:
    """As ``flywheel bench --json``; of a study that is not done, what is known."""
    solved, load = read_solved(out), os.getloadavg()
    rates, diffs = _rates(solved), differences(solved)
    learned = {
        choice: {
            str(k): {key: doc[key] for key in ("candidates", "usable", "taken", "held_out", "frames")}
            | {"pools": doc["train"]["pools"], "loss": doc["train"]["loss"]}
            for k in range(1, len(SHIFTS) + 1)
            if (doc := _read(out / choice / f"turn-{k}" / "learn.json")) is not None
        }
        for choice in CHOICES
    }
    figures = {
        f"{choice}_{shift}_after_{k}": p.mean
        for choice, by_shift in rates.items()
        for shift, found in by_shift.items()
        for k, p in enumerate(found)
        if p is not None
    }
    figures |= {name: d["value"] for name, d in diffs.items()}
    shares = [t["taken"] / t["usable"] for t in learned[OURS].values()]
    if shares:
        figures["share"] = max(shares)
    bars: dict[str, tuple[str, float]] = {f"{OURS}_rise_{k}": (">", 0.0) for k in range(1, len(SHIFTS) + 1)}
    bars |= {f"{OURS}_kept_{s}": (">=", -0.05) for s in (*SHIFTS[:-1], LAB)}
    bars |= {f"{OURS}_less_{ALL}": (">=", 0.0), f"{OURS}_less_{RANDOM}": (">", 0.0), "share": ("<=", SHARE)}
    return {
        "bench": "turns",
        "machine": machine(),
        "load": {"now": load, "named": "the study's own two processes, and whatever else ran"},
        "success": {
            choice: {s: [p and p.model_dump() for p in found] for s, found in by_shift.items()}
            for choice, by_shift in rates.items()
        },
        "differences": diffs,
        "learned": learned,
        "figures": figures,
        "bars": {
            name: {"value": figures[name], "op": op, "bar": bar, "ok": _holds(figures[name], op, bar)}
            for name, (op, bar) in bars.items()
            if name in figures
        },
    }


def _holds(value: float, op: str, bar: float) -> bool:
    return value > bar if op == ">" else value >= bar if op == ">=" else value <= bar


def _publish(out: Path) -> dict[str, Any]:
    """Write ``study.json`` and ``turns.png``; the former's content."""
    doc = document(out)
    fresh = out / "study.json.part"
    fresh.write_text(json.dumps(doc, indent=1, sort_keys=True) + "\n")
    fresh.replace(out / "study.json")
    taught = {shift: k for k, shift in enumerate(SHIFTS, 1)}
    figure = success_by_turn(_rates(read_solved(out)), (*SHIFTS, LAB), taught)
    figure.savefig(out / "turns.png", dpi=110)
    return doc


def table(doc: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Success by turn and shift, a column for each choice; then the differences."""

    def rate(p: Mapping[str, float] | None) -> str:
        return "–" if p is None else f"{100 * p['mean']:.0f} % [{100 * p['low']:.0f}, {100 * p['high']:.0f}]"

    lines = [
        [f"after turn {k}" if k else BASE, shift, *(rate(doc["success"][c][shift][k]) for c in CHOICES)]
        for k in range(len(SHIFTS) + 1)
        for shift in (*SHIFTS, LAB)
    ]
    points: dict[str, dict[str, str]] = {}
    for name, d in doc["differences"].items():
        choice, what = name.split("_", 1)
        text = f"{100 * d['value']:+.0f} [{100 * d['low']:+.0f}, {100 * d['high']:+.0f}]"
        points.setdefault(what, {})[choice] = text
    lines += [[f"points {w}", "", *(by.get(c, "") for c in CHOICES)] for w, by in points.items()]
    return ["", "shift", *CHOICES], lines
