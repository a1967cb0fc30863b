"""``flywheel bench twin``: do identified parameters lie within their intervals, and is the twin better?

Robots with hidden parameters and noisy sensors (``standin``) leave episodes; each is identified from its own.
Counted are the intervals of identified parameters that hold the truth, and the replay error of episodes that
were held out, before against after.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from flywheel.edge.bench import machine
from flywheel.rehearsal.standin import drawn, episodes
from flywheel.twin.identify import identify
from flywheel.twin.parameters import TwinParameters
from flywheel.twin.replay import TRUST_WINDOW_S, load_all

ROBOTS, ROBOTS_FULL = 2, 20
SCENES = 4
SECONDS = 4.0
WINDOW_S, PER_EPISODE = 0.15, 4  # fewer and shorter than by default: half the time, wider intervals
# Of a coverage of 95 %, in some 40 intervals of two robots that are not independent, or 400 of twenty.
COVERAGE, COVERAGE_FULL = 0.8, 0.9
ERROR_RATIO = 0.2


def twin(full: bool) -> dict[str, Any]:
    """Measure; ``full`` takes ten times as many robots."""
    before = os.getloadavg()
    robots = ROBOTS_FULL if full else ROBOTS
    inside = known = 0
    ratios, took, widths = [], [], []
    for seed in range(robots):
        truth = drawn(seed)
        with tempfile.TemporaryDirectory(prefix="flywheel-twin-") as tmp:
            scenes = range(100 * seed, 100 * seed + SCENES)
            recorded, _ = load_all(episodes(Path(tmp), truth, scenes, seconds=SECONDS))
        began = time.process_time()
        found = identify(recorded, window_s=WINDOW_S, per_episode=PER_EPISODE)
        took.append(time.process_time() - began)
        named = [(n, e) for n, e in found.parameters.items() if e.identified]
        known += len(named)
        inside += sum(e.low <= truth.values[n] <= e.high for n, e in named)
        widths += [(e.high - e.low) / (2 * e.value) for _, e in named if e.value > 0]
        ratios.append(_ratio(found))
    bar = COVERAGE_FULL if full else COVERAGE
    figures = {
        "robots": float(robots),
        "identified_parameters": float(known),
        "coverage": inside / known if known else 0.0,
        "half_width_relative_p50": float(np.median(widths)) if widths else float("nan"),
        "error_ratio_median": float(np.median(ratios)),
        "error_ratio_worst": float(max(ratios)),
        "identify_cpu_s_p50": float(np.median(took)),
    }
    bars = {
        "coverage": {
            "value": figures["coverage"],
            "op": ">=",
            "bar": bar,
            "ok": figures["coverage"] >= bar,
        },
        "error_ratio_worst": {
            "value": figures["error_ratio_worst"],
            "op": "<=",
            "bar": ERROR_RATIO,
            "ok": figures["error_ratio_worst"] <= ERROR_RATIO,
        },
    }
    load = {"before": before, "after": os.getloadavg()}
    return {"bench": "twin", "machine": machine(), "load": load, "figures": figures, "bars": bars}


def _ratio(found: TwinParameters) -> float:
    """Worst of q, dq and tool: rms of the held-out episodes' replay, after over before."""
    after = {e.signal: e.rms for e in found.after if e.window_s == TRUST_WINDOW_S}
    groups = [e for e in found.before if e.window_s == TRUST_WINDOW_S and e.signal in ("q", "dq", "tool")]
    return max((after[e.signal] / e.rms for e in groups), default=float("inf"))
