"""The demo's report: what changed, how it is known, and the chain from failure to robot."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flywheel import __version__
from flywheel.claims import claims_of
from flywheel.edge.figures import WallResult
from flywheel.evaluate import PairedResult
from flywheel.schema import FRAMES_FILE, GateReport, Proportion, Release, RobotReport
from flywheel.store import Store
from flywheel.turn_plot import success_by_turn

THUMBNAILS = 12
PAGE = Path(__file__).with_name("report.html.jinja")


def write_report(
    out: Path,
    *,
    store: Store,
    turn: str,
    rollout_id: str,
    before: Mapping[str, int],
    fleet: Mapping[str, Mapping[str, int]],
    robots: Sequence[RobotReport],
    results: Mapping[str, PairedResult],
    wall: Mapping[str, WallResult],
    seconds: Mapping[str, float],
    stable: Release,
    by_turn: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` to ``out``; return what the former holds.

    ``by_turn``, of several turns: ``turns`` with turn, shift and digest each, and ``success``, by shift the
    proportions of the base policy and of every turn's.
    """
    gate = store.get_json(f"gates/{stable.gate_digest}.json", GateReport, stable.gate_digest)
    claims = claims_of(store, turn)
    doc: dict[str, Any] = {
        "schema_version": 1,
        "version": __version__,
        "turn": turn,
        "rollout": rollout_id,
        "fleet_before": dict(before),
        "fleet": {k: dict(v) for k, v in fleet.items()},
        "success": {shift: _paired(p) for shift, p in results.items()},
        "wall_clock": {k: asdict(w) for k, w in wall.items()},
        "gate": gate.model_dump(mode="json"),
        "robots": [r.model_dump(mode="json") for r in robots],
        "chain": [
            {
                "what": f"{len(claims.episodes)} failures claimed by {turn}, the first",
                "digest": claims.episodes[0].prefix,
            },
            {
                "what": "experiment (dvc exp show), at commit",
                "digest": f"{stable.experiment} {stable.git_rev}",
            },
            {"what": "policy before, bundle digest", "digest": gate.current_digest},
            {"what": "policy after, bundle digest", "digest": stable.digest},
            {"what": "gate report", "digest": stable.gate_digest},
            {"what": "approval", "digest": stable.approval_digest},
            {"what": "rollout", "digest": rollout_id},
            {
                "what": f"{sum(r.loaded_digest == stable.digest for r in robots)} robots loaded",
                "digest": stable.digest,
            },
        ],
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
    }
    if by_turn is not None:
        doc["by_turn"] = {
            "turns": list(by_turn["turns"]),
            "success": {s: [p.model_dump() for p in found] for s, found in by_turn["success"].items()},
        }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(doc, indent=1, sort_keys=True) + "\n")
    thumbnails = _thumbnails(store, [c.prefix for c in claims.episodes if not c.problem])
    (out / "report.html").write_text(_html(doc, thumbnails))
    return doc


def _paired(p: PairedResult) -> dict[str, Any]:
    def side(r: Any) -> dict[str, Any]:
        found: dict[str, Any] = r.model_dump(mode="json", exclude={"attempts"})
        return found

    return {
        "base": side(p.a),
        "candidate": side(p.b),
        "difference": p.difference,
        "low": p.low,
        "high": p.high,
        "n": p.n,
        "gained": len(p.gained),
        "lost": len(p.lost),
        "mcnemar_p": p.mcnemar_p,
    }


def _thumbnails(store: Store, prefixes: Sequence[str]) -> list[dict[str, str]]:
    """The scene at the moment of failure, of some episodes."""
    import pyarrow.parquet as pq

    from flywheel.schema import MANIFEST_FILE, Manifest

    found = []
    step = max(1, len(prefixes) // THUMBNAILS)
    for prefix in prefixes[::step][:THUMBNAILS]:
        manifest = store.get_json(prefix + MANIFEST_FILE, Manifest)
        entry = next(f for f in manifest.files if f.name == FRAMES_FILE)
        if "scene" not in manifest.cameras or not entry.rows:
            continue
        data = store.get(prefix + FRAMES_FILE, entry.sha256)
        frames = pq.read_table(io.BytesIO(data), columns=["t_ns", "image.scene"])
        failed = manifest.triggers[0].t_ns if manifest.triggers else manifest.window_ns[1]
        at = sum(t <= failed for t in frames["t_ns"].to_pylist()) - 1
        jpeg = frames["image.scene"][max(at, 0)].as_py()
        task = manifest.task.split(" box")[0].removeprefix("pick the ")
        caption = f"{task}: {manifest.outcome.value.replace('_', ' ')}"
        found.append({"jpeg": base64.b64encode(jpeg).decode(), "caption": caption})
    return found


def _html(doc: dict[str, Any], thumbnails: list[dict[str, str]]) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=True)
    environment.globals.update(
        pct=lambda x: f"{100 * x:.0f} %",
        pts=lambda x: f"{100 * x:+.0f}",
        num=lambda x: "–" if x is None else f"{x:.4g}",
    )
    page = environment.from_string(PAGE.read_text())
    return page.render(
        r=doc,
        thumbnails=thumbnails,
        plots={"success": _success(doc), "failures": _failures(doc), "by_turn": _by_turn(doc)},
    )


def _by_turn(doc: dict[str, Any]) -> str:
    if "by_turn" not in doc:
        return ""
    success = {
        s: [Proportion.model_validate(p) for p in found] for s, found in doc["by_turn"]["success"].items()
    }
    taught = {t["shift"]: k for k, t in enumerate(doc["by_turn"]["turns"], 1)}
    return _png(success_by_turn({"policy": success}, list(success), taught))


def _success(doc: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    for i, s in enumerate(doc["success"].values()):
        for j, (side, colour) in enumerate((("base", "#b0b0b0"), ("candidate", "#2a7de1"))):
            p = s[side]["success"]
            y = i + 0.18 * (1 - 2 * j)
            axes.barh(y, 100 * p["mean"], 0.32, color=colour, label=side if i == 0 else None)
            spread = [[100 * (p["mean"] - p["low"])], [100 * (p["high"] - p["mean"])]]
            axes.errorbar(100 * p["mean"], y, xerr=spread, color="black", capsize=3)
    axes.set_yticks(range(len(doc["success"])), list(doc["success"]))
    axes.set_xlim(0, 100)
    axes.set_xlabel("success, % (95 % Wilson interval)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _failures(doc: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    rows = [
        (f"{shift}, {side}", s[side]["failures"])
        for shift, s in doc["success"].items()
        for side in ("base", "candidate")
    ]
    reasons = sorted({reason for _, failures in rows for reason in failures})
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for reason in reasons:
        counts = [float(failures.get(reason, 0)) for _, failures in rows]
        axes.barh(range(len(rows)), counts, left=left, label=reason.replace("_", " "))
        left = [a + b for a, b in zip(left, counts, strict=True)]
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("failed attempts")
    if reasons:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
