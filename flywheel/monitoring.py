"""What Prometheus is told of the cloud side: failures that wait, turns, robots, the rollout, signed metadata.

Everything is read from the store when it is asked for, at most once in ``KEPT_S``. What cannot be read is not
reported as what it was before: ``flywheel_store_up`` is 0 then, and the other figures are absent.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flywheel.claims import backlog
from flywheel.errors import ConfigError, FlywheelError
from flywheel.keys import ROOT_FILE
from flywheel.release import Reader, State
from flywheel.rollout import RolloutState, status
from flywheel.rollout.evidence import read_documents
from flywheel.schema import Group, RobotReport, RolloutStage
from flywheel.store import Store
from flywheel.turn import open_turns, unopened_turns

LOOPBACK = "127.0.0.1"
KEPT_S = 10.0  # a look reads every robot's report: scrapers may not make it happen more often
P = "flywheel_"


class Figures(Collector):
    """One look at the store for each scrape. Thread-safe."""

    def __init__(
        self,
        store: Callable[[], Store],
        keys: Path,
        silence_s: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``keys`` is the directory of the trusted ``root.json``; signing keys are not needed. A robot that
        was not heard of for ``silence_s`` is silent."""
        self._store, self._keys, self._silence_s = store, keys, silence_s
        self._clock, self._monotonic = clock, monotonic
        self._lock = threading.Lock()
        self._kept: list[Metric] = []
        self._kept_at = -float("inf")

    def collect(self) -> Iterator[Metric]:
        """The figures of now, or of the last ``KEPT_S``."""
        with self._lock:
            if (began := self._monotonic()) - self._kept_at >= KEPT_S:
                self._kept = self._look(began)
                self._kept_at = self._monotonic()
            yield from self._kept

    def _look(self, began: float) -> list[Metric]:
        try:
            found = list(self._figures())
            up = 1
        except FlywheelError:
            found, up = [], 0
        return [
            GaugeMetricFamily(P + "store_up", "1 if the store could be read and its releases verify.", up),
            GaugeMetricFamily(P + "look_seconds", "What reading all this took.", self._monotonic() - began),
            *found,
        ]

    def _figures(self) -> Iterator[Metric]:
        store, now = self._store(), self._clock()
        waiting = backlog(store, now)
        yield GaugeMetricFamily(P + "backlog_failures", "Failures that no turn has taken.", waiting.count)
        yield GaugeMetricFamily(P + "backlog_oldest_seconds", "Since the oldest came.", waiting.oldest_s)
        turns = open_turns(store)
        since = min((t.opened_unix_ns * 1e-9 for t in turns), default=now.timestamp())
        yield GaugeMetricFamily(P + "turns_open", "Opened, without a result.", len(turns))
        yield GaugeMetricFamily(
            P + "turn_oldest_seconds", "Since the oldest opened.", now.timestamp() - since
        )
        yield GaugeMetricFamily(
            P + "turns_unopened", "Claimed failures, and died before they opened.", len(unopened_turns(store))
        )
        yield from self._robots(store, now)
        if (self._keys / ROOT_FILE).is_file():
            yield from self._releases(store, Reader(store, self._keys).load(), now)

    def _robots(self, store: Store, now: datetime) -> Iterator[Metric]:
        reports, arrived, ignored = read_documents(
            store, "fleet/robots/", RobotReport, lambda r: f"fleet/robots/{r.robot}.json"
        )
        since = (now.timestamp() - self._silence_s) * 1e9
        heard = [r for r in reports if arrived[f"fleet/robots/{r.robot}.json"] >= since]
        robots = GaugeMetricFamily(P + "robots", "By whether they were heard of lately.", labels=["state"])
        robots.add_metric(["heard"], len(heard))
        robots.add_metric(["silent"], len(reports) - len(heard))
        robots.add_metric(["not_understood"], len(ignored))
        yield robots
        policies = GaugeMetricFamily(P + "robots_on_policy", "Robots heard of.", labels=["digest"])
        for digest, n in sorted(Counter(r.loaded_digest for r in heard).items()):
            policies.add_metric([digest], n)
        yield policies
        pending = sum(r.spool_pending for r in heard)
        yield GaugeMetricFamily(P + "spool_episodes", "On robots, not in the store yet.", pending)

    def _releases(self, store: Store, state: State, now: datetime) -> Iterator[Metric]:
        left = GaugeMetricFamily(
            P + "metadata_expires_seconds", "Until robots refuse what is signed.", labels=["role"]
        )
        signed = {"root": state.root, "snapshot": state.snapshot, "timestamp": state.timestamp, **state.roles}
        for role, metadata in sorted(signed.items()):
            left.add_metric([role], (metadata.expires - now).total_seconds())
        yield left
        rollout = _under_way(store, state)
        stage = GaugeMetricFamily(P + "rollout_stage", "1 for the stage under way.", labels=["stage"])
        for s in RolloutStage:
            stage.add_metric([s.value], float(rollout is not None and rollout.stage is s))
        yield stage
        age = now.timestamp() - rollout.since_unix_ns * 1e-9 if rollout is not None else 0.0
        yield GaugeMetricFamily(P + "rollout_stage_seconds", "Since that stage began; 0 without one.", age)


def _under_way(store: Store, state: State) -> RolloutState | None:
    """The rollout that the signed releases name, unless it is over. Signs nothing, unlike who acts on it."""
    for release in (state.release(g)[0] for g in Group):
        if release is not None and release.rollout_id:
            found = status(store, release.rollout_id).state
            if not found.over:
                return found
    return None


def text(figures: Figures) -> bytes:
    """The figures in Prometheus' text format: for node_exporter's textfile collector."""
    return generate_latest(_registry(figures))


@contextmanager
def served(figures: Figures, port: int) -> Iterator[int]:
    """Serve the figures on loopback while the block lasts; the port, a free one for 0.

    Raises ``ConfigError`` if it is taken.
    """
    try:
        server, thread = start_http_server(port, LOOPBACK, _registry(figures))
    except OSError as e:
        raise ConfigError(f"port {port}: {e.strerror}; choose another one") from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _registry(figures: Figures) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(figures)
    return registry
