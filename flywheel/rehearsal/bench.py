"""``flywheel bench delivery``: every attack, every death, every race, and what came of it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flywheel.edge.bench import machine
from flywheel.errors import FlywheelError
from flywheel.rehearsal import killed
from flywheel.rehearsal.attacks import ATTACKS, Attack
from flywheel.rehearsal.bucket import DirectoryBucket
from flywheel.rehearsal.deliveries import stable
from flywheel.rehearsal.site import Breach, Site, quick_disk

ROLES = ("timestamp", "snapshot", "targets", "root", "canary", "stable", "operator")


def delivery(full: bool = False) -> dict[str, Any]:
    """Attack the delivery of releases for half a minute, or at every single step with ``full``; returns the
    document of ``flywheel bench --json``. ``outcomes`` lists what came of each."""
    load, started = os.getloadavg(), time.monotonic()
    outcomes: list[dict[str, Any]] = []
    died = 0
    with tempfile.TemporaryDirectory(prefix="flywheel-delivery-") as d, quick_disk():
        root = Path(d)
        template = Site.make(root / "template")
        for i, (name, attack) in enumerate(ATTACKS.items()):
            outcomes.append(_outcome(name, partial(_one, attack, template, root / f"attack-{i}")))
        killed_template = root / "killed"
        killed.make_template(killed_template)
        released = root / "released"
        site = killed.make_template(released)
        site.publisher.publish(site.new, stable(site.new))
        killed.bare(root / "bare")
        approved = killed.approved_site(root / "approved")
        works: list[tuple[str, Path, Any, Any]] = [
            ("publisher", killed_template, killed.publish, killed.recovers),
            ("first set-up", root / "bare", killed.first_set_up, killed.sets_up),
            ("robot's update", released, killed.update, killed.updates),
            ("look that goes wide", root / "approved", killed.look_of(approved), killed.completes(approved)),
            ("new approver", killed_template, killed.enrolment, killed.recovers),
            *(
                (f"change of the {role} keys", killed_template, killed.ceremony_of(role), killed.recovers)
                for role in ROLES
            ),
        ]
        for i, (name, start, work, check) in enumerate(works):
            # In part, every publication step, and an offset that differs so that all kinds of steps are met.
            stride = 1 if full or i == 0 else 11
            deaths = _Deaths(start, root / f"scratch-{i}", work, check, stride, 1 + i % stride)
            outcomes.append(_outcome(f"{name} killed at every step", deaths.kill))
            died += deaths.count
        outcomes.append(_outcome("three publishers at once", lambda: killed.race(root / "race")))
    held = sum(o["ok"] for o in outcomes)
    figures = {
        "attacks": float(len(ATTACKS)),
        "processes_killed": float(died),
        "scenarios": float(len(outcomes)),
        "breaches": float(len(outcomes) - held),
        "seconds": time.monotonic() - started,
    }
    return {
        "bench": "delivery",
        "machine": machine(),
        "load": {"before": load, "after": os.getloadavg(), "full": full},
        "figures": figures,
        "outcomes": outcomes,
        "bars": {
            "breaches": {
                "value": figures["breaches"], "op": "<=", "bar": 0.0, "ok": figures["breaches"] == 0.0
            },
        },
    }  # fmt: skip


@dataclass
class _Deaths:
    """One piece of work, killed again and again."""

    start: Path
    scratch: Path
    work: Callable[[Path, DirectoryBucket], None]
    check: Callable[[Path], None]
    stride: int
    first: int
    count: int = 0

    def kill(self) -> str:
        self.scratch.mkdir()
        self.count = killed.every_step(
            self.start, self.scratch, self.work, self.check, self.stride, self.first
        )
        part = "" if self.stride == 1 else f" (at every {self.stride}th step; --full: at each)"
        return f"recovered from {self.count} deaths by SIGKILL{part}"


def fleet(full: bool = False) -> dict[str, Any]:
    """See ``fleet.bench``."""
    from flywheel.rehearsal.fleet import bench

    return bench(full)


def _one(attack: Attack, template: Site, root: Path) -> str:
    return attack(template.copy(root))


def _outcome(name: str, act: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "outcome": act()}
    except (Breach, FlywheelError) as e:
        return {"name": name, "ok": False, "outcome": f"NOT HELD: {e}"}
