"""The demo: the whole wheel, on one machine, through Airflow; once, or in one shift after the other.

Its state lies in a home of its own (``<home>/demo``), made anew each time, so that a demo never touches what
``flywheel up`` runs, and the last one can still be looked at: ``FLYWHEEL_HOME=.flywheel/demo flywheel up``.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flywheel import approvals, services
from flywheel.config import PARAMS_FILE, Deployment, Settings, checkout
from flywheel.edge.runtime import run_wall
from flywheel.errors import ServiceError, StageError
from flywheel.evaluate import PairedResult, paired
from flywheel.fleet import IDLE, SITE, WORK, Fleet, robot_names
from flywheel.release import Publisher
from flywheel.report import write_report
from flywheel.schema import BUNDLE_FILES, Group, Release, RobotReport
from flywheel.services.airflow import AUTO_APPROVER, Airflow
from flywheel.store import Store
from flywheel.succession import Taught, success_of, succession
from flywheel.turn import result_of

BASE = Path("models/base/bundle")
PAIRS = 100  # fresh scenes in each shift, for the table at the end
TURN_SCENES = 50  # in each shift for each turn's policy, where there are several
FRESH_SEED = 20_000
WALL_S = 6.0
FLEET_LIMIT_S = 600.0
TURN_LIMIT_S = 3600.0
ARRIVE_S = 120.0
POLL_S = 2.0  # between two looks at Airflow
LINE_S = 10.0  # between two lines of progress where nothing else happens

console = Console(highlight=False)


class Clock:
    """Seconds since the start, and how long each part took."""

    def __init__(self) -> None:
        self._zero = time.monotonic()
        self.parts: dict[str, float] = {}

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._zero

    def say(self, text: str) -> None:
        """A line with the time in front."""
        console.print(f"[dim]{int(self.now) // 60:3d}:{int(self.now) % 60:02d}[/dim]  {text}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Take the time of a part."""
        begin = self.now
        yield
        self.parts[name] = self.parts.get(name, 0.0) + self.now - begin


def run(out: Path, *, manual: bool = False, turns: int = 1) -> dict[str, Any]:
    """Turn the wheel; write ``report.html`` and ``report.json`` to ``out`` and return the latter.

    One turn is in ``twin.shift``. Of several, the robots go from shift to shift (``succession``), and each
    turn starts from the policy that the last one brought to them.

    Raises ``StageError`` if the wheel turned and a new policy did not reach every robot, ``ServiceError``
    if something did not run, ``ConfigError`` for more turns than there are shifts.
    """
    root = checkout(Path.cwd())
    if root is None:
        raise StageError("the demo runs from a checkout: cd into it first")
    settings = Settings.load(root / PARAMS_FILE)
    shifts = succession(settings, turns)
    base = root / BASE
    missing = [n for n in BUNDLE_FILES if not (base / n).is_file()]
    if missing:
        raise StageError(f"{base / missing[0]}: no such file; the base policy belongs to the checkout")
    home = Deployment.from_env().home / "demo"
    if home.exists():
        services.down(home)
        shutil.rmtree(home)
    clock = Clock()
    os.environ["FLYWHEEL_HOME"] = str(home)
    if not manual:
        os.environ["FLYWHEEL_APPROVERS"] = f"ops,{AUTO_APPROVER}"
    with _running(home, base, settings, shifts[0], clock) as (up, publisher, fleet):
        clock.parts["services"] = clock.now
        os.environ.update(up.environ())
        console.print(
            f"\n  Airflow   {up.airflow_url}   user {up.airflow_user}   password {up.airflow_password}\n"
            + ("  Approve there when asked.\n" if manual else f"  {AUTO_APPROVER} will approve for you.\n")
        )
        store = up.store()
        taught: list[Taught] = []
        for shift in shifts:
            if taught:
                _move(fleet, shift, clock)
            before = _collect(fleet, settings, clock)
            turned = _turn(fleet, Airflow(home), clock, manual)
            _require_done(turned, store, home)
            stable = _stable(publisher)
            robots = _arrived(fleet, store, stable.digest, clock)
            taught.append(Taught(turned["turn"], shift, stable.digest))
        fleet_counts = {r: dict(c) for r, c in fleet.poll().counts.items()}
        fleet.close()  # what is measured now has both cores to itself
        candidate = _fetch(store, stable.digest, home / "candidate")
        results = _measure(base, candidate, clock)
        by_turn = None
        if turns > 1:
            policies = [base, *(_fetch(store, t.digest, home / "policies" / t.digest) for t in taught)]
            with clock.part("evaluation turn by turn"):
                by_turn = success_of(policies, taught, TURN_SCENES, FRESH_SEED + 1, clock.say)
        with clock.part("tracking on the wall clock"):
            clock.say("tracking on the wall clock, both policies")
            wall = {name: run_wall(b, settings.twin.shift, WALL_S, 1) for name, b in _both(base, candidate)}
        report = write_report(
            out,
            store=store,
            turn=turned["turn"],
            rollout_id=stable.rollout_id,
            before=before,
            fleet=fleet_counts,
            robots=robots,
            results=results,
            wall=wall,
            seconds={
                **clock.parts,
                **{f"task {k}": v for k, v in turned["tasks"].items()},
                "total": clock.now,
            },
            stable=stable,
            by_turn=by_turn,
        )
    _table(report)
    clock.say(f"done in {clock.now / 60:.1f} minutes; see {out / 'report.html'}")
    clock.say(
        "`dvc exp show` lists the turn; `FLYWHEEL_HOME=.flywheel/demo flywheel up` brings its Airflow back"
    )
    return report


@contextmanager
def _running(
    home: Path, base: Path, settings: Settings, shift: str, clock: Clock
) -> Iterator[tuple[services.Endpoints, Publisher, Fleet]]:
    """Store, Airflow and robots. The robots need no Airflow, so they work while it is still starting."""
    with ExitStack() as robots:
        begun: list[tuple[Publisher, Fleet]] = []

        def begin(store: services.Endpoints) -> None:
            os.environ.update(store.environ())
            publisher = Publisher(store.store(), home / "keys")
            bootstrap = publisher.init(Deployment.from_env().approvers)
            publisher.publish_first(base)
            keys = services.robot_keys(home, SITE, robot_names(settings))
            fleet = robots.enter_context(Fleet(home, store.environ(), settings, bootstrap, keys, shift=shift))
            begun.append((publisher, fleet))
            fleet.set(WORK)
            clock.say(
                f"{settings.twin.robots} robots work in [b]{shift}[/b] with the base policy, "
                f"until {settings.trigger.min_episodes} failures are in the store"
            )

        clock.say("starting the object store and Airflow")
        with (
            services.session(
                home,
                on_progress=lambda what, step: clock.say(f"  [dim]{what}[/dim] {step}"),
                on_store=begin,
            ) as up,
            robots.pop_all(),
        ):
            yield up, *begun[0]


def _move(fleet: Fleet, shift: str, clock: Clock) -> None:
    """Bring the robots to the next shift, where they work with the policy that they have by now."""
    clock.say(f"the robots go to [b]{shift}[/b] and work there with the new policy")
    fleet.move(shift)
    fleet.set(WORK)


def _both(base: Path, candidate: Path) -> tuple[tuple[str, Path], ...]:
    return ("base", base), ("candidate", candidate)


def _collect(fleet: Fleet, settings: Settings, clock: Clock) -> dict[str, int]:
    """Wait until enough failures are in the store to start a turn."""
    wanted = settings.trigger.min_episodes
    with clock.part("failures, after the start"):
        shown, begin = 0.0, clock.now
        while (p := fleet.poll()).total("uploaded") < wanted:
            if clock.now - begin > FLEET_LIMIT_S:
                raise StageError(
                    f"only {p.total('uploaded')} failures in {FLEET_LIMIT_S:.0f} s ({p.total('success')} of "
                    f"{p.total('attempts')} attempts succeeded): the policy is too good for this shift"
                )
            if clock.now - shown > LINE_S:
                shown = clock.now
                clock.say(f"  {_counts(p.total)}")
            time.sleep(0.5)
        fleet.set(IDLE)
    p = fleet.poll()
    clock.say(f"  {_counts(p.total)}")
    return {
        k: p.total(k)
        for k in ("attempts", "success", "timeout", "wrong_object", "dropped", "stopped", "uploaded")
    }


def _counts(total: Callable[[str], int]) -> str:
    failures = {k: total(k) for k in ("timeout", "wrong_object", "dropped", "stopped")}
    reasons = ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in failures.items() if n)
    done = f"{total('attempts')} attempts, {total('success')} succeeded"
    return f"{done}; {reasons or 'no failure'}; {total('uploaded')} in the store"


def _turn(fleet: Fleet, airflow: Airflow, clock: Clock, manual: bool) -> dict[str, Any]:
    """Follow the turn that the failures start, and answer its question unless a person is to."""
    approver = approvals.AutoApprover(airflow)
    begin, shown = clock.now, clock.now
    said: dict[str, str] = {}
    turn: approvals.Turn | None = None
    asked = alone = False
    approvals.pause(airflow, approvals.COLLECT, False)
    while True:
        if clock.now - begin > TURN_LIMIT_S:
            raise StageError(f"the turn did not end within {TURN_LIMIT_S / 60:.0f} minutes; see Airflow")
        fleet.poll()
        if turn is None:
            # A run that finds too little to do ends at once; the turn is the one that goes on.
            found = (r for r in reversed(approvals.runs(airflow, approvals.COLLECT, 5)) if not r.over)
            if (run := next(found, None)) is not None:
                clock.say(f"the failures started a turn in Airflow: [b]{run.run_id}[/b]")
                turn = approvals.Turn(airflow, run.run_id)
            time.sleep(1)
            continue
        turn.look()
        for task in turn.tasks:
            state = task.state or ""
            if said.get(task.name) != state and state in ("running", "success", "failed", "up_for_retry"):
                took = f"  {task.seconds:.0f} s" if task.seconds and state == "success" else ""
                clock.say(f"  [b]{task.name}[/b] {state}{took}")
                shown = clock.now
            said[task.name] = state
        if "improve.begin" in said and not alone:
            # One turn is shown: the failures of its shadow and canary are left for a later one.
            approvals.pause(airflow, approvals.COLLECT, True)
            alone = True
        if said.get("release.start") == "success":
            fleet.set(WORK)
        if not manual:
            for question in approver.poll():
                clock.say(f"  {AUTO_APPROVER} answered: {question.subject}")
        elif not asked and (waiting := approvals.pending(airflow)):
            asked = True
            clock.say(f"  [b]your approval is asked for[/b]: {waiting[0].page(airflow.url)}")
        if turn.over:
            fleet.set(IDLE)
            tasks = {t.name: t.seconds for t in turn.tasks if t.seconds is not None and t.state == "success"}
            clock.parts["turn"] = clock.now - begin
            return {"states": {t.name: t.state for t in turn.tasks}, "tasks": tasks, "turn": turn.name}
        if clock.now - shown > LINE_S * 2:
            shown = clock.now
            running = [
                t.name for t in turn.tasks if t.state in ("running", "awaiting_input", "up_for_reschedule")
            ]
            clock.say(f"  [dim]{', '.join(running) or 'between tasks'} …[/dim]")
        time.sleep(POLL_S)


def _require_done(turned: dict[str, Any], store: Store, home: Path) -> None:
    states = turned["states"]
    if states.get("release.wide") == "success":
        return
    failed = [n for n, s in states.items() if s in ("failed", "upstream_failed")]
    if failed:
        what = f"failed in {', '.join(failed)}"
    else:
        result = result_of(turned["turn"], store)
        what = f"was not released: {result.verdict}: {'; '.join(result.reasons) or 'see the rollout'}"
    raise StageError(f"{turned['turn']} {what}; logs are in {home / 'logs'}")


def _stable(publisher: Publisher) -> Release:
    found = publisher.current(Group.STABLE)
    assert found is not None
    return found


def _arrived(fleet: Fleet, store: Store, digest: str, clock: Clock) -> list[RobotReport]:
    """Wait until every robot reports the digest; their reports."""
    with clock.part("robots updated"):
        end = clock.now + ARRIVE_S
        while True:
            fleet.poll()
            robots = [store.get_json(f"fleet/robots/{r}.json", RobotReport) for r in fleet.robots]
            late = [r.robot for r in robots if r.loaded_digest != digest]
            if not late:
                break
            if clock.now > end:
                raise ServiceError(f"{', '.join(late)}: still without policy {digest[:12]}")
            time.sleep(1)
    clock.say(f"every robot runs [b]{digest[:12]}[/b]")
    return robots


def _fetch(store: Store, digest: str, into: Path) -> Path:
    into.mkdir(parents=True, exist_ok=True)
    for name in BUNDLE_FILES:
        store.get_file(f"bundles/{digest}/{name}", into / name)
    return into


def _measure(base: Path, candidate: Path, clock: Clock) -> dict[str, PairedResult]:
    """Both policies on the same fresh scenes."""
    results = {}
    for shift in ("factory", "lab"):
        with clock.part(f"evaluation in {shift}"):
            clock.say(f"{PAIRS} fresh scenes in [b]{shift}[/b], both policies")
            results[shift] = paired(base, candidate, shift, PAIRS, FRESH_SEED)
    return results


def _table(report: dict[str, Any]) -> None:
    table = Table(title="Before and after", title_justify="left")
    for column in ("", "base", "candidate", "difference"):
        table.add_column(column)
    for shift, r in report["success"].items():
        table.add_row(
            f"success in {shift}",
            *(_rate(r[k]["success"]) for k in ("base", "candidate")),
            f"{100 * r['difference']:+.0f} points [{100 * r['low']:+.0f}, {100 * r['high']:+.0f}]",
        )
    for shift, r in report["success"].items():
        table.add_row(
            f"tracking error in {shift}, rms",
            *(f"{1e3 * r[k]['tracking_rms_rad']:.2f} mrad" for k in ("base", "candidate")),
            "",
        )
    wall = report["wall_clock"]
    table.add_row(
        "deadlines missed", *(f"{wall[k]['misses_ppm']:.0f} ppm" for k in ("base", "candidate")), ""
    )
    table.add_row(
        "wake-up late, p99", *(f"{wall[k]['late']['p99'] / 1e3:.0f} µs" for k in ("base", "candidate")), ""
    )
    console.print(table)
    robots = Table("robot", "digest of the loaded bytes", "attempts", "successes", box=None)
    for r in report["robots"]:
        robots.add_row(r["robot"], r["loaded_digest"], str(r["episodes"]), str(r["successes"]))
    console.print(robots)


def _rate(p: dict[str, float]) -> str:
    return f"{100 * p['mean']:.0f} % [{100 * p['low']:.0f}, {100 * p['high']:.0f}]"
