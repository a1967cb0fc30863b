"""What a robot tells Prometheus, on loopback: the supervisor's figures, never System 1's business.

The supervisor puts a snapshot there at each look; the server's thread only reads the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy.typing as npt
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from flywheel.edge.figures import BUCKETS_US, INFER_BUCKETS_MS
from flywheel.edge.runtime import Wall
from flywheel.errors import ConfigError
from flywheel.schema import Limit, Mode

LOOPBACK = "127.0.0.1"


class Metrics(Collector):
    """Serves one robot's metrics; a context manager. ``port`` 0 takes a free one, see ``port``."""

    def __init__(self, port: int) -> None:
        """Raises ``ConfigError`` if the port is taken."""
        self._families: list[Metric] = []
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, LOOPBACK, registry)
        except OSError as e:
            raise ConfigError(f"metrics port {port}: {e.strerror}; choose another one") from None
        self.port: int = self._server.server_port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """The last snapshot."""
        yield from self._families

    def update(self, wall: Wall) -> None:
        """Take a snapshot."""
        status, f = wall.status(), wall.figures
        counts = f.counts
        p = "flywheel_"
        mode = GaugeMetricFamily(p + "mode", "What System 1 is doing: 1 for its mode.", labels=["mode"])
        for m in Mode:
            mode.add_metric([m.name.lower()], float(m is f.mode))
        limits = GaugeMetricFamily(p + "limit_acted", "1 if a limit acted since the start.", labels=["limit"])
        for limit in Limit:
            limits.add_metric([str(limit.name).lower()], float(bool(counts["limits"] & limit)))
        restarts = CounterMetricFamily(p + "restarts", "Starts after the first one.", labels=["process"])
        for role, n in status["restarts"].items():
            restarts.add_metric([role], n)
        policy = InfoMetricFamily(p + "policy", "The loaded policy, by the digest of the loaded bytes.")
        policy.add_metric([], {k: str(status[k]) for k in ("digest", "previous", "trial", "refused")})
        spool, recorder = status["uploader"], status["recorder"]
        self._families = [
            CounterMetricFamily(p + "ticks", "Ticks of System 1.", counts["ticks"]),
            CounterMetricFamily(p + "deadline_misses", "Deadlines that System 1 missed.", counts["missed"]),
            GaugeMetricFamily(p + "longest_miss_run", "Most missed deadlines in a row.", counts["longest"]),
            _histogram(p + "tick_lateness_seconds", "Of waking.", f.late_counts, f.late_sum_ns),
            _histogram(p + "tick_compute_seconds", "Of a tick.", f.compute_counts, f.compute_sum_ns),
            _histogram(p + "inference_seconds", "Of System 2.", f.infer_counts, f.infer_sum_ns, True),
            mode,
            limits,
            GaugeMetricFamily(p + "chunk_age_seconds", "Of the chunk in use.", f.chunk_age_ns * 1e-9),
            CounterMetricFamily(p + "chunks", "Published.", counts["chunks"]),
            CounterMetricFamily(p + "chunks_rejected", "Refused, not published.", counts["rejected"]),
            restarts,
            policy,
            CounterMetricFamily(p + "policy_swaps", "Policies put in use.", status["swaps"]),
            CounterMetricFamily(p + "policy_fall_backs", "Policies given back.", status["fall_backs"]),
            GaugeMetricFamily(p + "spool_episodes", "Waiting for the store.", spool.get("waiting", -1)),
            GaugeMetricFamily(p + "spool_problem", "1 while the store refuses.", bool(spool.get("problem"))),
            CounterMetricFamily(p + "episodes_sealed", "By this recorder.", recorder.get("sealed", 0)),
            GaugeMetricFamily(p + "episodes_refused", "In memory: no room.", recorder.get("refused", 0)),
            CounterMetricFamily(p + "episodes_abandoned", "Lost: no room.", recorder.get("abandoned", 0)),
        ]


def _histogram(
    name: str, text: str, counts: npt.NDArray[Any], sum_ns: int, inference: bool = False
) -> HistogramMetricFamily:
    bounds = [b * 1e-3 for b in INFER_BUCKETS_MS] if inference else [b * 1e-6 for b in BUCKETS_US]
    total = counts.cumsum()
    buckets = [(f"{b:g}", float(n)) for b, n in zip(bounds, total[:-1], strict=True)]
    return HistogramMetricFamily(name, text, [*buckets, ("+Inf", float(total[-1]))], sum_ns * 1e-9)
