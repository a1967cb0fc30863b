"""The evaluation harness over a stand-in for an attempt: order, isolation, death, interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.errors import BundleError, ConfigError, StageError
from flywheel.evaluate import Attempted, Evaluator, Job, Runner, _attempted, evaluate, scene_seeds, summarise
from flywheel.schema import Outcome, bundle_digest

FAKE = '''
import os, signal, time
from types import SimpleNamespace
from flywheel.errors import ConfigError
from flywheel.schema import Outcome, bundle_digest

class Fake:
    """Success depends on (bundle, shift, seed) alone; odd things happen in shifts named after them."""

    def __init__(self, bundle, shift):
        self.skill = int((bundle / "policy.onnx").read_text())
        self.digest = bundle_digest(bundle)
        self.shift = shift
        if shift == "unknown":
            raise ConfigError("shift='unknown': not one of lab, factory")

    def close(self):
        pass

    def run(self, seed, *, latency_ms=None):
        if self.shift == "crash":
            raise RuntimeError("the arm fell off")
        if self.shift == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.shift == "hang":
            time.sleep(600)
        if self.shift == "slow":
            time.sleep(seed % 3 / 100)
        won = (seed * 2654435761) % 100 < self.skill
        nan = float("nan")
        return SimpleNamespace(
            outcome=Outcome.SUCCESS if won else (Outcome.TIMEOUT if seed % 2 else Outcome.DROPPED),
            seed=seed, duration_s=2.0 if won else 8.0, steps=20 if won else 80,
            progress=1.0 if won else 0.25,
            tracking_rms_rad=nan if self.shift == "nan" else 0.01, tracking_p99_rad=0.03,
            mode_ticks={"follow": 100, "ramp": 2},
            invalid_chunks=int(os.environ["OMP_NUM_THREADS"]) - 1,
        )
'''


def write_bundle(root: Path, skill: int) -> Path:
    bundle = root / f"bundle-{skill}"
    bundle.mkdir()
    for name in ("policy.onnx", "tokenizer.json", "policy.json"):
        (bundle / name).write_text(str(skill))
    return bundle


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Runner]:
    """An attempt that spawned workers can import: they inherit sys.path."""
    (tmp_path / "stand_in_attempt.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    module = importlib.import_module("stand_in_attempt")
    monkeypatch.delitem(sys.modules, "stand_in_attempt")
    fake: Callable[[Path, str], Runner] = module.Fake
    fake.__module__ = "stand_in_attempt"
    monkeypatch.setitem(sys.modules, "stand_in_attempt", module)
    return fake


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_bundle(tmp_path, 80)


@pytest.fixture
def poor(tmp_path: Path) -> Path:
    return write_bundle(tmp_path, 20)


def test_results_do_not_depend_on_the_number_of_workers_and_keep_their_order(
    make: Callable[[Path, str], Runner], good: Path, poor: Path
) -> None:
    jobs = [Job(b, s, seed) for seed in range(12) for b in (good, poor) for s in ("slow", "lab")]
    seen: list[tuple[int, int]] = []
    with Evaluator(1, make) as one, Evaluator(2, make) as two:
        a = one.run(jobs)
        b = two.run(jobs, lambda done, total: seen.append((done, total)))
    assert a == b
    assert [(x.shift, x.seed) for x in a] == [(j.shift, j.seed) for j in jobs]
    assert {x.digest for x in a[0::4]} == {bundle_digest(good)}
    assert seen == [(i + 1, len(jobs)) for i in range(len(jobs))]
    assert all(x.invalid_chunks == 0 for x in a), "workers must be single-threaded"


def test_workers_are_reused_and_gone_after_use(make: Callable[[Path, str], Runner], good: Path) -> None:
    with Evaluator(1, make) as pool:
        pool.run([Job(good, "lab", s) for s in range(4)])
        (first,) = [p.pid for p in pool._pool.values()]
        pool.run([Job(good, "dim", s) for s in range(4)])
        assert [p.pid for p in pool._pool.values()] == [first]
    assert first is not None
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.parametrize(
    ("shift", "error", "words"),
    [
        ("unknown", ConfigError, "not one of lab, factory"),
        ("crash", StageError, "bundle-80 in crash, seed 3 crashed: RuntimeError: the arm fell off"),
        ("killed", StageError, r"worker died \(exit code -9\).*seed 3.*memory"),
    ],
)
def test_a_failing_attempt_ends_the_run_with_its_reason_and_no_worker_left(
    make: Callable[[Path, str], Runner], good: Path, shift: str, error: type[Exception], words: str
) -> None:
    with Evaluator(1, make) as pool:
        with pytest.raises(error, match=words):
            pool.run([Job(good, "lab", 1), Job(good, "lab", 2), Job(good, shift, 3)])
        assert not pool._pool


def test_a_stuck_worker_is_given_up(
    make: Callable[[Path, str], Runner], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flywheel.evaluate.STALL_S", 0.2)
    with Evaluator(1, make) as pool, pytest.raises(StageError, match="did not end within"):
        pool.run([Job(good, "hang", 1)])


def test_a_bundle_swapped_while_it_is_evaluated_gives_no_figure(
    make: Callable[[Path, str], Runner], good: Path
) -> None:
    digest = bundle_digest(good)
    (good / "tokenizer.json").write_text("swapped")
    job = Job(good, "nan", 1)
    attempts = [_attempted(make(good, "nan"), job)]
    with pytest.raises(BundleError, match="changed during the evaluation"):
        summarise(good, digest, "nan", 7, attempts)
    assert summarise(good, bundle_digest(good), "nan", 7, attempts).success.n == 1


def test_a_tracking_error_that_is_not_finite_is_missing_not_zero(
    make: Callable[[Path, str], Runner], good: Path
) -> None:
    attempt = _attempted(make(good, "nan"), Job(good, "nan", 3))
    assert attempt.tracking_rms_rad is None
    assert attempt.mode_ticks == {"follow": 100, "ramp": 2}
    result = summarise(good, attempt.digest, "nan", 7, [attempt])
    assert result.tracking_rms_rad is None
    assert result.tracking_p99_rad == 0.03


def test_summary_counts_reasons_and_spreads(good: Path) -> None:
    def attempt(outcome: Outcome, steps: int, rms: float | None) -> Attempted:
        return Attempted(
            digest="d", shift="lab", seed=0, outcome=outcome, duration_s=steps / 10, steps=steps,
            tracking_rms_rad=rms, tracking_p99_rad=rms, invalid_chunks=1, mode_ticks={"follow": 5},
        )  # fmt: skip

    result = summarise(
        good, "d", "lab", 7,
        [attempt(Outcome.SUCCESS, 10, 0.1), attempt(Outcome.TIMEOUT, 30, 0.3),
         attempt(Outcome.DROPPED, 20, None), attempt(Outcome.TIMEOUT, 30, 0.3)],
    )  # fmt: skip
    assert result.failures == {"timeout": 2, "dropped": 1}
    assert list(result.failures) == ["timeout", "dropped"]
    assert (result.success.mean, result.success.n) == (0.25, 4)
    assert result.steps == {"mean": 22.5, "p50": 20.0, "max": 30.0}
    assert result.tracking_rms_rad == pytest.approx(((0.01 * 10 + 0.09 * 60) / 70) ** 0.5)
    assert (result.tracking_p99_rad, result.tracking_p99_worst_rad) == (0.3, 0.3)
    assert (result.duration_s, result.invalid_chunks, result.mode_ticks) == (1.0, 4, {"follow": 20})


@pytest.mark.parametrize(
    ("arguments", "words"), [((0, 1, 1), "episodes=0"), ((1, -1, 1), "seed=-1"), ((1, 1, 0), "workers=0")]
)
def test_bad_arguments_are_named(good: Path, arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(StageError, match=words):
        evaluate(good, "lab", *arguments)


def test_a_missing_bundle_is_named_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere.*policy\.onnx, tokenizer\.json, policy\.json missing"):
        evaluate(tmp_path / "nowhere", "lab", 1, 1, 1)


@given(st.integers(0, 2**40), st.integers(0, 300), st.integers(0, 300))
def test_scene_seeds_are_distinct_grow_at_the_end_and_stay_clear_of_training(
    seed: int, n: int, more: int
) -> None:
    seeds = scene_seeds(seed, n + more)
    assert len(set(seeds)) == n + more
    assert scene_seeds(seed, n) == seeds[:n]
    assert all(2**31 <= s < 2**32 for s in seeds)


def test_scene_seeds_of_neighbours_do_not_overlap() -> None:
    assert not set(scene_seeds(7, 500)) & set(scene_seeds(8, 500))


PARENT = """
import sys, threading
from pathlib import Path
from flywheel.evaluate import Evaluator, Job
import stand_in_attempt
if __name__ == "__main__":
    pool = Evaluator(1, stand_in_attempt.Fake)
    pool._start(1)
    print(*[p.pid for p in pool._pool.values()], flush=True)
    with pool:
        pool.run([Job(Path(sys.argv[1]), "hang", s) for s in range(2)])
"""


def _gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_however_it_ends(
    tmp_path: Path, good: Path, how: signal.Signals
) -> None:
    (tmp_path / "stand_in_attempt.py").write_text(FAKE)
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).resolve().parents[1]
    parent = subprocess.Popen(
        [sys.executable, str(script), str(good)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])},
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        pids = [int(p) for p in parent.stdout.readline().split()]
        assert len(pids) == 1
        parent.send_signal(how)
        assert parent.wait(20) != 0
    deadline = time.monotonic() + 10
    while not all(_gone(p) for p in pids) and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel's reaping has no event to wait for
    assert all(_gone(p) for p in pids)
