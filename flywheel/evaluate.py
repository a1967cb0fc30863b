"""Evaluation: attempts at the task in the twin, in lockstep, side by side in worker processes.

An attempt depends on (bundle, shift, seed) alone and results come back in the order of the jobs, so the
figures are the same for one worker or twenty. Two policies are compared on the same seeds.

Workers are spawned, single-threaded, keep each policy and cell they have loaded, and die with the process
that started them. Ctrl-C reaches the parent only; leaving the ``Evaluator`` ends them whatever happened.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol, Self

import numpy as np
from pydantic import Field

from flywheel.errors import BundleError, FlywheelError, StageError
from flywheel.parent import die_with_parent
from flywheel.schema import BUNDLE_FILES, Outcome, Proportion, Strict, bundle_digest
from flywheel.stats import paired_difference, percentiles, proven_reliability, trials_left, wilson

if TYPE_CHECKING:
    from flywheel.attempt import AttemptResult
    from flywheel.twin.parameters import TwinParameters

OnProgress = Callable[[int, int], None]  # attempts done, attempts planned
KEPT = 6  # loaded (policy, cell) pairs that a worker keeps: two bundles in three shifts
STALL_S = 600.0  # no attempt takes this long, compiling included; a worker that does is stuck
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class Scenario(NamedTuple):
    """A scene that can be set up again exactly."""

    shift: str
    seed: int


class Job(NamedTuple):
    """One attempt to run."""

    bundle: Path
    shift: str
    seed: int
    latency_ms: float | None = None  # of System 2, injected; None for the usual


class Attempted(Strict):
    """One attempt as it went. A figure that was not finite is None: missing, never zero."""

    digest: str  # of the bytes that the worker loaded
    shift: str
    seed: int
    latency_ms: float | None = None  # of System 2, where it was injected
    outcome: Outcome
    duration_s: float | None
    steps: int  # ticks of System 1
    tracking_rms_rad: float | None
    tracking_p99_rad: float | None
    invalid_chunks: int
    progress: Annotated[float, Field(ge=0, le=1)] | None = None  # furthest that the task stood; 1 is success
    mode_ticks: dict[str, int] = Field(default_factory=dict)

    @property
    def success(self) -> bool:
        return self.outcome is Outcome.SUCCESS


class EvalResult(Strict):
    """What ``flywheel eval`` prints: one policy in one shift."""

    schema_version: Literal[1] = 1
    bundle: str
    digest: str
    shift: str
    seed: int
    success: Proportion  # 95 % Wilson interval
    proven: float  # one-sided 95 % lower limit of the success rate, exact
    trials_left: int  # further successes that would prove 99.9 % at 95 %
    progress: float | None  # mean over all attempts of the furthest that the task stood, 0 to 1
    failures: dict[str, int]  # reason -> attempts, most frequent first
    steps: dict[str, float]  # mean, p50, max per attempt
    duration_s: float | None  # mean over successful attempts; None without one
    tracking_rms_rad: float | None  # over all steps of all attempts
    tracking_p99_rad: float | None  # median over attempts of each attempt's p99
    tracking_p99_worst_rad: float | None  # the worst attempt's p99
    invalid_chunks: int
    mode_ticks: dict[str, int]
    attempts: tuple[Attempted, ...]


class PairedResult(Strict):
    """Two policies on the same seeds; differences are ``b - a``, the interval Tango's at 95 %."""

    schema_version: Literal[1] = 1
    a: EvalResult
    b: EvalResult
    difference: float
    low: float
    high: float
    n: int
    gained: tuple[int, ...]  # seeds that only b solved
    lost: tuple[int, ...]  # seeds that only a solved
    mcnemar_p: float


class Runner(Protocol):
    """What a worker drives: ``flywheel.attempt.Attempt``, or a stand-in with its signature."""

    @property
    def digest(self) -> str: ...

    def run(self, seed: int, *, latency_ms: float | None = None) -> AttemptResult: ...

    def close(self) -> None: ...


def scene_seeds(entropy: int | Sequence[int], n: int) -> list[int]:
    """``n`` distinct scene seeds; the first ones stay the same when ``n`` grows.

    All lie in [2**31, 2**32), where neither training nor the simulated fleet draws its scenes.
    """
    words = [entropy] if isinstance(entropy, int) else list(entropy)
    seeds: dict[int, None] = {}
    i = 0
    while len(seeds) < n:
        state = np.random.SeedSequence([*words, i]).generate_state(1)
        seeds[2**31 | int(state[0]) >> 1] = None
        i += 1
    return list(seeds)


def evaluate(
    bundle: Path,
    shift: str,
    episodes: int,
    seed: int,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> EvalResult:
    """Success of one policy over ``episodes`` scenes drawn from ``seed``.

    Raises ``BundleError`` for a bundle that is missing or changes meanwhile, ``StageError`` for bad
    arguments and for workers that fail.
    """
    digest = _digest(bundle)
    with Evaluator(workers) as pool:
        attempts = pool.run([Job(bundle, shift, s) for s in _plan(episodes, seed)], on_progress)
    return summarise(bundle, digest, shift, seed, attempts)


def paired(
    bundle_a: Path,
    bundle_b: Path,
    shift: str,
    episodes: int,
    seed: int,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> PairedResult:
    """``evaluate`` for two policies on the same scenes; raises as it does."""
    seeds = _plan(episodes, seed)
    digests = _digest(bundle_a), _digest(bundle_b)
    jobs = [Job(b, shift, s) for s in seeds for b in (bundle_a, bundle_b)]
    with Evaluator(workers) as pool:
        attempts = pool.run(jobs, on_progress)
    a = summarise(bundle_a, digests[0], shift, seed, attempts[0::2])
    b = summarise(bundle_b, digests[1], shift, seed, attempts[1::2])
    won_a, won_b = [x.success for x in a.attempts], [x.success for x in b.attempts]
    d = paired_difference(won_a, won_b)
    return PairedResult(
        a=a,
        b=b,
        difference=d.diff,
        low=d.low,
        high=d.high,
        n=d.n,
        gained=tuple(s for s, x, y in zip(seeds, won_a, won_b, strict=True) if y and not x),
        lost=tuple(s for s, x, y in zip(seeds, won_a, won_b, strict=True) if x and not y),
        mcnemar_p=d.p,
    )


def summarise(bundle: Path, digest: str, shift: str, seed: int, attempts: Sequence[Attempted]) -> EvalResult:
    """Figures of attempts by one policy in one shift; ``BundleError`` if another policy ran."""
    if not attempts:
        raise StageError(f"no attempt of {bundle.name} in {shift}: nothing to summarise")
    other = next((a.digest for a in attempts if a.digest != digest), None)
    if other is not None:
        raise BundleError(
            f"{bundle}: changed during the evaluation ({digest[:12]} before, {other[:12]} in a worker);"
            " evaluate a bundle that nobody writes to"
        )
    failed = [a.outcome.value for a in attempts if not a.success]
    steps = np.array([a.steps for a in attempts], dtype=np.float64)
    squares = [(a.tracking_rms_rad**2, a.steps) for a in attempts if a.tracking_rms_rad is not None]
    weight = sum(n for _, n in squares)
    p99 = [a.tracking_p99_rad for a in attempts if a.tracking_p99_rad is not None]
    progress = [a.progress for a in attempts if a.progress is not None]
    times = [a.duration_s for a in attempts if a.success and a.duration_s is not None]
    modes: dict[str, int] = {}
    for a in attempts:
        for name, ticks in a.mode_ticks.items():
            modes[name] = modes.get(name, 0) + ticks
    return EvalResult(
        bundle=bundle.name,
        digest=digest,
        shift=shift,
        seed=seed,
        success=wilson(len(attempts) - len(failed), len(attempts)),
        proven=proven_reliability(len(failed), len(attempts)),
        trials_left=trials_left(len(failed), len(attempts)),
        progress=sum(progress) / len(progress) if len(progress) == len(attempts) else None,
        failures={r: failed.count(r) for r in sorted(set(failed), key=lambda r: (-failed.count(r), r))},
        steps={"mean": float(steps.mean()), "p50": percentiles(steps).p50, "max": float(steps.max())},
        duration_s=sum(times) / len(times) if times else None,
        tracking_rms_rad=math.sqrt(sum(s * n for s, n in squares) / weight) if weight else None,
        tracking_p99_rad=percentiles(p99).p50 if p99 else None,
        tracking_p99_worst_rad=max(p99) if p99 else None,
        invalid_chunks=sum(a.invalid_chunks for a in attempts),
        mode_ticks=dict(sorted(modes.items())),
        attempts=tuple(attempts),
    )


class Evaluator:
    """Worker processes that run attempts; a context manager, so that they never outlive their use.

    ``make(bundle, shift)`` builds what runs an attempt; it must be importable by the workers. The workers
    die with the *thread* that first calls ``run`` as well as with the process.
    """

    def __init__(self, workers: int | None = None, make: Callable[[Path, str], Runner] | None = None) -> None:
        if workers is not None and workers < 1:
            raise StageError(f"workers={workers}: must be at least 1")
        self.workers = workers or len(os.sched_getaffinity(0))
        self._make = make or _real_attempt
        self._pool: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, jobs: Sequence[Job], on_progress: OnProgress | None = None) -> list[Attempted]:
        """Attempts in the order of ``jobs``. The first that fails ends the run with its error."""
        jobs = [j._replace(bundle=j.bundle.absolute()) for j in jobs]
        self._start(min(self.workers, len(jobs)))
        results: dict[int, Attempted] = {}
        waiting: Iterator[int] = iter(range(len(jobs)))
        busy: dict[Connection, int] = {}
        try:
            for conn in self._pool:
                self._feed(conn, waiting, jobs, busy)
            while busy:
                ready = [c for c in wait(list(busy), timeout=STALL_S) if isinstance(c, Connection)]
                if not ready:
                    job = jobs[min(busy.values())]
                    raise StageError(
                        f"attempt {_name(job)} did not end within {STALL_S:.0f} s; see the workers"
                    )
                for conn in ready:
                    i = busy.pop(conn)
                    results[i] = self._receive(conn, jobs[i])
                    self._feed(conn, waiting, jobs, busy)
                    if on_progress is not None:
                        on_progress(len(results), len(jobs))
        except BaseException:
            self.close()  # workers may be in the middle of an attempt that nobody waits for
            raise
        return [results[i] for i in range(len(jobs))]

    def close(self) -> None:
        """End the workers; may be called again."""
        pool, self._pool = self._pool, {}
        for conn, process in pool.items():
            conn.close()
            process.terminate()
        for process in pool.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._pool) < count:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, self._make, os.getpid()), name="flywheel-attempts", daemon=True
            )
            with _environment(_ONE_THREAD):
                process.start()
            theirs.close()  # else the end of the worker would not end the pipe
            self._pool[ours] = process

    def _feed(
        self, conn: Connection, waiting: Iterator[int], jobs: Sequence[Job], busy: dict[Connection, int]
    ) -> None:
        i = next(waiting, None)
        if i is None:
            return
        busy[conn] = i
        try:
            conn.send(jobs[i])
        except OSError:
            raise self._death(conn, jobs[i]) from None

    def _receive(self, conn: Connection, job: Job) -> Attempted:
        try:
            answer = conn.recv()
        except (EOFError, OSError):
            raise self._death(conn, job) from None
        if isinstance(answer, FlywheelError):
            raise answer
        assert isinstance(answer, Attempted)
        return answer

    def _death(self, conn: Connection, job: Job) -> StageError:
        process = self._pool[conn]
        process.join(5)
        return StageError(
            f"a worker died (exit code {process.exitcode}) in attempt {_name(job)};"
            " -9 usually means that memory ran out: use fewer workers"
        )


def _work(conn: Connection, make: Callable[[Path, str], Runner], parent: int) -> None:
    """A worker's life: jobs in, ``Attempted`` or an error out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; it ends us
    die_with_parent(signal.SIGKILL, parent)
    loaded: dict[tuple[Path, str], Runner] = {}
    while True:
        try:
            job: Job = conn.recv()
        except (EOFError, OSError):
            return
        try:
            key = (job.bundle, job.shift)
            if key not in loaded:
                while len(loaded) >= KEPT:
                    loaded.pop(next(iter(loaded))).close()
                loaded[key] = make(*key)
            answer: Attempted | FlywheelError = _attempted(loaded[key], job)
        except FlywheelError as e:
            answer = type(e)(str(e))
        except Exception as e:  # the border of a process: told to the parent, which raises it
            traceback.print_exc(file=sys.stderr)
            answer = StageError(f"attempt {_name(job)} crashed: {type(e).__name__}: {e}")
        conn.send(answer)


def _attempted(runner: Runner, job: Job) -> Attempted:
    r = runner.run(job.seed, latency_ms=job.latency_ms)
    return Attempted(
        digest=runner.digest,
        shift=job.shift,
        seed=job.seed,
        latency_ms=job.latency_ms,
        outcome=Outcome(r.outcome),
        duration_s=_finite(r.duration_s),
        steps=int(r.steps),
        tracking_rms_rad=_finite(r.tracking_rms_rad),
        tracking_p99_rad=_finite(r.tracking_p99_rad),
        invalid_chunks=int(r.invalid_chunks),
        progress=_finite(r.progress),
        mode_ticks=dict(r.mode_ticks),
    )


def _real_attempt(bundle: Path, shift: str, parameters: TwinParameters | None = None) -> Runner:
    from flywheel.attempt import Attempt

    return Attempt(bundle, shift, parameters=parameters)


def attempts_in(parameters: TwinParameters | None) -> Callable[[Path, str], Runner]:
    """``Evaluator``'s ``make`` for a twin with identified parameters."""
    return partial(_real_attempt, parameters=parameters)


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _name(job: Job) -> str:
    return f"{job.bundle.name} in {job.shift}, seed {job.seed}"


def _plan(episodes: int, seed: int) -> list[int]:
    if episodes < 1:
        raise StageError(f"episodes={episodes}: must be at least 1")
    if seed < 0:
        raise StageError(f"seed={seed}: must not be negative")
    return scene_seeds(seed, episodes)


def _digest(bundle: Path) -> str:
    missing = [n for n in BUNDLE_FILES if not (bundle / n).is_file()]
    if missing:
        raise BundleError(
            f"{bundle}: no policy bundle: {', '.join(missing)} missing; `flywheel export` writes one"
        )
    return bundle_digest(bundle)


@contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    """Set variables for processes started inside; libraries read them as they load, so no later call can."""
    before = {k: os.environ[k] for k in extra if k in os.environ}
    os.environ.update(extra)
    try:
        yield
    finally:
        for k in extra:
            del os.environ[k]
        os.environ.update(before)
