"""A small fleet in simulated time: what the bench of 10,000 robots measures, at a size for every day."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel.rehearsal.fleet import DAY, HOUR, Robot, Simulation
from flywheel.rehearsal.site import Breach
from flywheel.schema import RolloutStage

pytestmark = pytest.mark.usefixtures("quick_disk")


def test_bad_release_never_leaves_its_cohort_and_is_gone_after_a_poll(tmp_path: Path) -> None:
    sim = Simulation(tmp_path, 300, HOUR, HOUR)
    try:
        sim.run(3 * HOUR)
        bad = sim.begin("bad", 0.3)
        assert sim.run(sim.now + 2 * DAY, lambda: sim.stage() is RolloutStage.ROLLED_BACK), sim.reason()
        assert 1 <= len(sim.exposed[bad]) <= 4
        sim.rid = ""
        sim.run(sim.now + 1.2 * HOUR)
        assert not [r for r in sim.fleet if r.loaded == bad and sim.reaches(r)]
        assert sim.allowed.checks > 300
    finally:
        sim.close()


def test_robot_that_runs_what_nobody_approved_for_it_is_noticed(tmp_path: Path) -> None:
    sim = Simulation(tmp_path, 20, HOUR, HOUR)
    try:
        with pytest.raises(Breach, match="which nobody approved"):
            sim.allowed.require(Robot("r1", "s0", 0, loaded="9" * 64))
    finally:
        sim.close()
