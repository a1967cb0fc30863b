"""Pacing and the figures made of it; and that a cached control law is never an old one."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.edge import compiled, realtime
from flywheel.edge.figures import Figures, Quantiles
from flywheel.edge.link import Arena, Ring
from flywheel.edge.processes import Plan, Shared, resolve
from flywheel.edge.realtime import DEADLINE, LATE, LONGEST, RUN, SKIPPED, STATUS_WORDS, TICKS, pace
from flywheel.edge.rows import EventLog, event_dtype, fill_event
from flywheel.errors import ConfigError
from flywheel.schema import Mode
from tests.robots import BUNDLE

MS = 1_000_000
PERIOD = 2 * MS


def busy_until(t_ns: int) -> None:
    while time.monotonic_ns() < t_ns:
        pass


def test_an_overrun_is_skipped_and_counted_and_never_caught_up_in_a_burst() -> None:
    status = np.zeros(STATUS_WORDS, np.int64)
    pace(status, PERIOD)
    first = int(status[DEADLINE])
    before = status.copy()
    busy_until(first + 5 * PERIOD + PERIOD // 2)
    now, late = pace(status, PERIOD)
    skipped = int(status[SKIPPED] - before[SKIPPED])
    assert skipped >= 5
    assert status[DEADLINE] == first + (skipped + 1) * PERIOD  # still on the grid
    assert now - status[DEADLINE] == late >= 0
    assert status[TICKS] == 2
    assert status[LONGEST] >= 5
    on_time = late < PERIOD
    assert status[RUN] == 0 if on_time else status[LATE] > before[LATE]


def test_it_never_wakes_before_its_deadline_and_keeps_the_clock_of_the_rest() -> None:
    status = np.zeros(STATUS_WORDS, np.int64)
    for _ in range(20):
        before = time.monotonic_ns()
        now, late = pace(status, PERIOD)
        assert late >= 0
        assert before <= now <= time.monotonic_ns()


def plan() -> Plan:
    return Plan(
        robot="", perception="", joints=2, cameras={"eye": (16, 16)}, limits="", bundle_dir="", bundle=BUNDLE,
        instruction="",
    )  # fmt: skip


class Feed:
    """Figures over rings that the test fills."""

    def __init__(self) -> None:
        arena = Arena.create("flywheel-test", Shared.nbytes(plan()))
        self.shared = Shared(plan(), arena)
        arena.close()
        self.events = EventLog(Ring(event_dtype(), 64))
        self.figures = Figures(self.shared, MS, self.events)

    def push(self, deadline: int, late: int, mode: Mode = Mode.FOLLOW) -> None:
        row = self.shared.control.record()
        row["t_ns"], row["late_ns"], row["mode"] = deadline + late, late, mode
        row["q_ref"] = 0.01
        self.shared.control.push(row)


@given(
    st.lists(st.sampled_from(["on", "on", "on", "skip", "late"]), min_size=1, max_size=60),
    st.integers(1, 7),
)
def test_misses_and_their_longest_run_are_counted_whatever_the_looks(fates: list[str], every: int) -> None:
    feed = Feed()
    feed.push(0, 0)
    run = longest = missed = 0
    for k, fate in enumerate([*fates, "on"], start=1):
        if fate != "on":
            run += 1
            missed += 1
        longest = max(longest, run)
        run = 0 if fate == "on" else run
        if fate != "skip":
            feed.push(k * MS, MS + 1 if fate == "late" else 10)
        if k % every == 0:
            feed.figures.take()
    feed.figures.take()
    told = {"system1": {"limits_sha256": "", "privileges": {}}}
    result = feed.figures.result(told, 0)
    assert result.misses_ppm == pytest.approx(1e6 * missed / (len(fates) + 2))
    assert result.longest_miss_run == longest
    assert result.tracking_rms_rad == pytest.approx(0.01, rel=1e-6)


def test_changes_of_mode_become_events() -> None:
    feed = Feed()
    for k, mode in enumerate([Mode.HOLD, Mode.FOLLOW, Mode.FOLLOW, Mode.STOP_1]):
        feed.push(k * MS, 0, mode)
    feed.figures.take()
    said = feed.events.ring.reader().poll().rows
    assert [(int(e["t_ns"]), e["name"]) for e in said] == [(MS, b"follow"), (3 * MS, b"stop_1")]


def test_rows_that_the_supervisor_was_too_slow_for_are_counted_and_are_no_misses() -> None:
    feed = Feed()
    feed.push(0, 0)
    feed.figures.take()
    n = feed.shared.control.capacity + 10
    for k in range(1, n):
        feed.push(k * MS, 0)
    feed.figures.take()
    result = feed.figures.result({"system1": {"limits_sha256": "", "privileges": {}}}, 0)
    assert result.rows_missed == 10
    assert result.misses_ppm == 0.0


def test_quantiles_are_values_that_occurred() -> None:
    q = Quantiles.of(np.arange(1, 1001))
    assert (q.p50, q.p99, q.max, q.n) == (501.0, 991.0, 1000.0, 1000)
    assert Quantiles.of(np.zeros(0)) == Quantiles(0.0, 0.0, 0.0, 0.0, 0)


def test_every_module_with_compiled_code_is_part_of_the_caches_name() -> None:
    edge = Path(compiled.__file__).parent
    users = {p.stem for p in edge.glob("*.py") if "\n@compiled\n" in p.read_text()}
    assert users <= set(compiled.MODULES)
    assert {"tick", "tracking", "safety", "mode", "link"} <= users


@pytest.mark.parametrize("name", ["nonsense", "no.such:thing", "flywheel.schema:nothing", ":", "os:"])
def test_a_robot_that_cannot_be_imported_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="module:function"):
        resolve(name)


def test_what_is_refused_is_reported_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.sched_setscheduler", refuse)
    monkeypatch.setattr("os.sched_setaffinity", refuse)
    monkeypatch.setattr(realtime, "lock_memory", refuse)
    monkeypatch.setattr(realtime, "stay_awake", refuse)
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr("gc.disable", lambda: None)
    got = realtime.claim(50, 0)
    assert (got.fifo, got.locked, got.awake, got.pinned) == (False, False, False, False)
    assert "LimitRTPRIO" in got.reasons[0]
    assert "LimitMEMLOCK" in got.reasons[1]
    assert "/dev/cpu_dma_latency: Operation not permitted" in got.reasons[2]
    assert got.reasons[3] == "core 0: Operation not permitted"


def test_events_too_long_for_a_row_stay_valid() -> None:
    ring = Ring(event_dtype(), 4)
    log = EventLog(ring)
    log.add(1, "kind" * 9, "é" * 60, {"reason": "x" * 2000})
    row = ring.reader().poll().rows[0]
    assert row["detail"] == b'{"truncated": true}'
    assert row["name"].decode() == "é" * 32
    assert len(row["kind"]) == 16
    record = ring.record()
    fill_event(record, 2, "mode", "hold")
    assert record["detail"][0] == b"{}"
