"""The runtime and the MuJoCo twin together: repeatable to the bit in lockstep, alive in real time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flywheel.attempt import Attempt
from flywheel.edge.lockstep import Lockstep
from flywheel.edge.policy import Policy
from flywheel.edge.runtime import run_wall
from flywheel.errors import FlywheelError
from flywheel.robot import FloatArray, Observation
from flywheel.robot.twin import ALL_CAMERAS, TwinRobot
from flywheel.schema import Limit, bundle_digest
from flywheel.twin.cell import Cell
from flywheel.twin.operator import plan
from flywheel.twin.shift import shift
from tests.robots import write_hover_bundle

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hover_bundle(tmp_path_factory.mktemp("hover") / "bundle")


@pytest.fixture(scope="module")
def rig(bundle: Path) -> Iterator[tuple[TwinRobot, Lockstep]]:
    cell = Cell(shift("factory"))
    robot = TwinRobot(cell, ALL_CAMERAS)
    yield robot, Lockstep(robot, robot, Policy.load(bundle), record=True)
    cell.close()


def attempt(rig: tuple[TwinRobot, Lockstep], seed: int) -> tuple[str, str, bool, int]:
    """Two seconds of a policy that only hovers, then the operator; hashes of rows and frames, success."""
    robot, lock = rig
    cell = robot.cell
    robot.reset(seed)
    lock.reset(start_ns=0)
    frames = lock.rings.frames
    readers = [r.reader(from_start=False) for r in (lock.rings.control, frames)]
    hashes = [hashlib.sha256(), hashlib.sha256()]
    limits = 0

    def drain() -> bool:
        for reader, digest in zip(readers, hashes, strict=True):
            rows = reader.poll().rows
            for name in rows.dtype.names or ():
                if name != "chunk_id" and not name.startswith("at."):  # these go on counting over attempts
                    digest.update(rows[name].tobytes())
            if reader.ring is frames:
                for row in rows:
                    for camera in frames.cameras:
                        digest.update(frames.image(row, camera) or b"gone")
        return cell.success

    def operate(_: Observation) -> FloatArray:
        held = cell.held >= 0
        return plan(cell.tip, held, cell.held == cell.target, cell.target_top, 10, 0.1)

    limits |= lock.run(2.0, cell.instruction, until=drain).limits
    limits |= lock.run(10.0, cell.instruction, until=drain, override=operate).limits
    drain()
    assert all(r.missed == 0 for r in readers)
    return hashes[0].hexdigest(), hashes[1].hexdigest(), cell.success, limits


def test_an_attempt_in_the_twin_is_the_same_twice_and_the_operator_succeeds(
    rig: tuple[TwinRobot, Lockstep],
) -> None:
    one, other, again = (attempt(rig, seed) for seed in (5, 6, 5))
    assert one == again
    assert one[:2] != other[:2]
    assert one[2]
    assert other[2]
    broken = Limit.TRACKING_ERROR | Limit.NOT_FINITE | Limit.TOOL_SPEED | Limit.WORKSPACE | Limit.POSITION
    assert not (one[3] | other[3]) & broken


@pytest.mark.slow
def test_injected_latency_lasts_for_one_attempt(bundle: Path) -> None:
    attempt = Attempt(bundle, "lab", episode_s=1.0)
    usual = attempt.run(5)
    slow = attempt.run(5, latency_ms=300.0)
    again = attempt.run(5)
    attempt.close()
    assert slow.mode_ticks != usual.mode_ticks, "chunks that come 0.3 s late make no difference"
    assert (again.mode_ticks, again.tracking_rms_rad) == (usual.mode_ticks, usual.tracking_rms_rad)


def test_the_twin_runs_in_real_time(bundle: Path) -> None:
    result = run_wall(bundle, "lab", seconds=2.0, seed=3)
    assert result.digest == bundle_digest(bundle)
    assert result.modes.get("follow", 0) > 500
    assert result.rejected == 0
    assert result.infer.n >= 5
    assert 0 < result.tracking_max_rad < 0.25
    assert np.isfinite(result.misses_ppm)


def test_a_shift_that_does_not_exist_is_named(bundle: Path) -> None:
    with pytest.raises(FlywheelError, match="moon"):
        run_wall(bundle, "moon", 1.0)
