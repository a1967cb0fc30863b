"""The twin: its arithmetic, its physics and its operator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.errors import ConfigError
from flywheel.twin.cell import BOXES, JOINTS, Cell
from flywheel.twin.demonstrate import demonstrate
from flywheel.twin.kinematics import forward, inverse
from flywheel.twin.operator import BIN_M, TRAVEL_M_S, plan
from flywheel.twin.sampling import draw, project, scatter
from flywheel.twin.shift import FACTORY, LAB, SHIFTS, shift

STEP_S = 0.1


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    made = Cell(LAB)
    yield made
    made.close()


def work(cell: Cell, seconds: float = 12.0) -> bool:
    """Let the operator work with a stiff PD; whether the target came into the bin."""
    kp, kd = np.array([400, 600, 400, 100, 20.0]), np.array([40, 60, 40, 8, 2.0])
    q = cell.q.copy()
    for _ in range(round(seconds / STEP_S)):
        held = cell.held >= 0
        target = plan(cell.tip, held, cell.held == cell.target, cell.target_top, 1, STEP_S)[0]
        goal = inverse(target[:3])
        speed = (goal - q) / STEP_S
        for i in range(100):
            want = q + speed * ((i + 1) * 1e-3)
            tau = kp * (want - cell.q) + kd * (speed - cell.dq) + cell.bias + cell.damping * cell.dq
            cell.step(tau, float(target[3]))
        q = goal
        if cell.success:
            return True
    return False


@given(
    st.floats(0.3, 0.6), st.floats(-1.2, 1.4), st.floats(0.03, 0.36)
)  # what the boxes, the bin and the way between them need
def test_inverse_kinematics_puts_the_cup_where_it_was_asked(
    reach: float, angle: float, height: float
) -> None:
    point = np.array([reach * np.cos(angle), reach * np.sin(angle), height])
    q = inverse(point)
    assert np.allclose(forward(q), point, atol=1e-9)
    assert q[1] + q[2] + q[3] == pytest.approx(np.pi / 2)  # the tool points down


@given(st.floats(1.0, 5.0), st.floats(-3.0, 3.0))
def test_a_point_out_of_reach_is_not_a_number_rather_than_somewhere_else(reach: float, angle: float) -> None:
    q = inverse(np.array([reach * np.cos(angle), reach * np.sin(angle), 0.1]))
    assert np.isnan(q[2])


def test_the_model_agrees_with_the_closed_form(cell: Cell) -> None:
    for seed in range(5):
        cell.reset(seed)
        assert np.allclose(cell.data.site_xpos[cell.model.site("cup").id], cell.tip, atol=1e-9)


@pytest.mark.parametrize("name", ["lab", "factory"])
def test_the_operator_succeeds_from_states_all_over_the_task(name: str) -> None:
    made = Cell(SHIFTS[name])
    rng = np.random.default_rng(3)
    try:
        for seed in range(15):
            made.reset(seed)
            if seed % 3:
                scatter(made, rng)
                if made.held >= 0:
                    made.attach(made.held)
            assert work(made), f"{name}, scene {seed}: {made.instruction} from {made.tip}"
    finally:
        made.close()


def test_the_operator_lets_go_of_a_wrong_box_and_takes_the_right_one(cell: Cell) -> None:
    cell.reset(11)
    wrong = (cell.target + 1) % BOXES
    top = cell.top(wrong)
    cell.place_arm(top + np.array([0, 0, 0.001]))
    cell.settle()
    cell.step(cell.bias.copy(), 1.0)
    assert cell.held == wrong
    assert work(cell, 15.0)


@given(
    st.floats(0.33, 0.58),
    st.floats(-0.75, 0.5),
    st.floats(0.3, 0.6),
    st.floats(-0.8, 1.2),
    st.floats(0.04, 0.36),
)
def test_no_step_of_the_operator_is_faster_than_he_moves(
    box_r: float, box_a: float, tip_r: float, tip_a: float, tip_z: float
) -> None:
    top = np.array([box_r * np.cos(box_a), box_r * np.sin(box_a), 0.04])
    tip = np.array([tip_r * np.cos(tip_a), tip_r * np.sin(tip_a), tip_z])
    points = np.vstack([tip, plan(tip, False, False, top, 40, STEP_S)[:, :3]])
    stride = np.abs(np.diff(points, axis=0)).max()
    assert stride <= TRAVEL_M_S * STEP_S + 1e-9


def test_the_same_seed_gives_the_same_world_bit_for_bit(cell: Cell) -> None:
    def run() -> tuple[bytes, bytes]:
        cell.reset(5)
        for k in range(300):
            cell.step(cell.bias + np.sin(0.01 * k) * np.array([3, 2, 1, 0.5, 0.1]), 0.0)
        return cell.qpos.tobytes(), cell.render("wrist").tobytes()

    assert run() == run()


def test_two_seeds_give_two_worlds(cell: Cell) -> None:
    cell.reset(1)
    first = cell.qpos.copy()
    cell.reset(2)
    assert not np.allclose(first, cell.qpos)


def test_a_target_that_the_shift_does_not_have_is_refused(cell: Cell) -> None:
    with pytest.raises(ConfigError, match=r"purple.*lab.*red, green, blue"):
        cell.reset(0, "purple")
    with pytest.raises(ConfigError, match=r"moon.*choose one of lab, factory"):
        shift("moon")


def test_the_factory_shows_what_the_lab_never_did() -> None:
    assert set(FACTORY.colours) - set(LAB.colours)
    assert FACTORY.half_size_m[1] > LAB.half_size_m[1]
    dark, light = Cell(FACTORY), Cell(LAB)
    try:
        dark.reset(0)
        light.reset(0)
        assert dark.render("wrist").mean() < 0.6 * light.render("wrist").mean()
    finally:
        dark.close()
        light.close()


def test_a_box_let_go_of_in_mid_air_counts_as_dropped(cell: Cell) -> None:
    cell.reset(4)
    cell.place_arm(cell.target_top + np.array([0, 0, 0.001]))
    cell.settle()
    cell.step(cell.bias.copy(), 1.0)
    assert cell.held == cell.target
    q = cell.q.copy()
    high = inverse(np.array([*cell.tip[:2], 0.16]))
    for i in range(1000):
        want = q + (high - q) * min(1.0, i / 800)
        tau = 300 * (want - cell.q) - 30 * cell.dq + cell.bias
        cell.step(tau, 1.0)
    before = (cell.dropped, cell.success)
    cell.step(cell.bias.copy(), 0.0)
    assert (*before, cell.dropped, cell.success) == (False, False, True, False)


def test_progress_grows_stage_by_stage_as_the_operator_works_and_only_the_target_counts(cell: Cell) -> None:
    cell.reset(11)
    assert cell.progress == 0.0
    wrong = (cell.target + 1) % BOXES
    cell.place_arm(cell.top(wrong) + np.array([0, 0, 0.001]))
    cell.settle()
    cell.step(cell.bias.copy(), 1.0)
    assert cell.held == wrong
    assert cell.progress == 0.0
    cell.reset(11)
    cell.place_arm(cell.target_top + np.array([0, 0, 0.03]))
    cell.settle()
    assert cell.progress == 0.25
    cell.place_arm(cell.target_top + np.array([0, 0, 0.001]))
    cell.settle()
    cell.step(cell.bias.copy(), 1.0)
    assert cell.progress == 0.5
    cell.set_box(cell.target, np.array([*BIN_M, 0.15]))
    cell.settle()
    assert cell.progress == 0.75
    cell.reset(11)
    cell.set_box(cell.target, np.array([*BIN_M, 0.03]))
    cell.settle()
    assert cell.success
    assert cell.progress == 1.0


def test_projection_finds_the_boxes_in_the_picture(cell: Cell) -> None:
    found = 0
    for seed in range(8):
        cell.reset(seed)
        tops = np.array([cell.top(i) - cell.tip for i in range(BOXES)])
        picture = cell.render("wrist").astype(int)
        for i, (u, v) in enumerate(project(tops)):
            if not (2 < u < 61 and 2 < v < 61):
                continue
            r, g, b = picture[round(v - 0.5), round(u - 0.5)]
            strongest = ("red", "green", "blue")[int(np.argmax((r, g, b)))]
            found += 1
            assert strongest == cell.colours[i], f"scene {seed}, box {i} at {u:.0f}, {v:.0f}"
    assert found > 10


def test_samples_are_states_that_an_arm_can_be_in() -> None:
    s = draw(LAB, 40, seed=2, steps=10)
    assert np.all(np.isfinite(s.chunks))
    assert np.all(np.isfinite(inverse(s.states[:, :3].astype(float))))
    assert 0.1 < s.states[:, 3].mean() < 0.6
    again = draw(LAB, 40, seed=2, steps=10)
    assert np.array_equal(s.images, again.images)
    assert np.array_equal(s.chunks, again.chunks)


def test_demonstrations_end_over_the_bin() -> None:
    for run in demonstrate(LAB, 6, seed=1):
        assert len(run.images) == len(run.states) == len(run.actions) <= 60
        assert np.hypot(*(run.states[-1, :2] - BIN_M)) < 0.02
        assert run.states[-1, 3] == 1.0
        assert run.actions[-1, 3] == 0.0


def test_the_views_that_the_control_loop_reads_stay_the_simulators_own(cell: Cell) -> None:
    cell.reset(0)
    before = cell.q
    cell.step(np.full(JOINTS, 1.0), 0.0)
    assert before is cell.q
    assert np.array_equal(cell.q, cell.data.qpos[:JOINTS])


def test_an_arm_without_power_stays_where_it_is() -> None:
    from flywheel.robot import JointState
    from flywheel.robot.twin import TwinRobot

    robot = TwinRobot(Cell(LAB), cameras=())
    robot.reset(3)
    before = robot.cell.tip
    robot.stop()
    state = JointState(JOINTS)
    for _ in range(1000):
        robot.read(state)
        robot.write(np.full(JOINTS, 50.0), 0.0)
    assert np.abs(robot.cell.tip - before).max() < 0.01
    robot.cell.close()


@pytest.mark.parametrize("rate_hz", [100.0, 250.0, 500.0])
def test_the_twin_is_controlled_at_rates_that_divide_its_physics(rate_hz: float) -> None:
    from flywheel.edge.control_ring import ControlRing, control_dtype
    from flywheel.edge.link import Seqlock
    from flywheel.edge.rows import chunk_dtype
    from flywheel.edge.system1 import System1
    from flywheel.robot.twin import TwinRobot
    from flywheel.schema import Mode

    robot = TwinRobot(Cell(LAB), cameras=(), rate_hz=rate_hz)
    robot.reset(3)
    slot, ring = Seqlock(chunk_dtype(JOINTS)), ControlRing(control_dtype(JOINTS), 4096)
    system1 = System1(robot, rate_hz, slot, ring)
    start = robot.cell.q.copy()
    period = round(1e9 / rate_hz)
    record = slot.record()
    for k in range(round(2.0 * rate_hz)):
        if k * period % 100_000_000 < period:
            t = k * period * 1e-9 + 0.1 * np.arange(1, 17)
            record["t0_ns"], record["step_ns"], record["steps"] = k * period, 100_000_000, 16
            record["valid_ns"] = 800_000_000
            record["q"][0, :16] = start + 0.2 * (1 - np.cos(2 * t))[:, None] * [1, 1, -1, 1, 1]
            slot.write(record)
        system1.tick(k * period)
    assert robot.cell.ticks == 2000
    rows = ring.reader().poll().rows
    assert Mode(rows["mode"][-1]) == Mode.FOLLOW
    assert np.abs(rows["q"] - rows["q_ref"]).max() < 0.02
    assert np.ptp(rows["q"], axis=0).min() > 0.2
    robot.read(system1.state)
    speed = system1.state.tool[3]
    assert speed == pytest.approx(np.linalg.norm(robot.cell.tip - forward(rows["q"][-1])) * rate_hz, abs=0.01)
    robot.cell.close()


@pytest.mark.parametrize("rate_hz", [4000.0, 300.0])
def test_a_rate_that_the_twins_physics_cannot_make_is_refused(rate_hz: float) -> None:
    from flywheel.robot.twin import TwinRobot

    with pytest.raises(
        ConfigError, match=rf"edge\.control_hz={rate_hz:g}: the twin's physics run at 1000 Hz"
    ):
        TwinRobot(Cell(LAB), cameras=(), rate_hz=rate_hz)
