"""Both systems in step: the same run twice is the same to the bit, and what goes wrong is seen."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from flywheel.config import EdgeSettings
from flywheel.edge.lockstep import Lockstep
from flywheel.edge.policy import Policy
from flywheel.edge.system2 import OVERRIDE_STEPS, encode_image
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray, JointState, Observation
from flywheel.schema import Mode
from tests.robots import Tiny, write_bundle

MS = 1_000_000
TASK = "move left"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy.load(write_bundle(tmp_path_factory.mktemp("policy") / "bundle"))


def make(policy: Policy, robot: Tiny | None = None, record: bool = True, **edge: float) -> Lockstep:
    robot = Tiny(255) if robot is None else robot
    return Lockstep(robot, robot, policy, EdgeSettings.model_validate(edge), record=record)


class Noisy(Tiny):
    """Sensor noise, an image that moves, all from one seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(255)
        self.rng = np.random.default_rng(seed)
        self.disturb = self._noise

    def _noise(self, s: JointState) -> None:
        s.q += self.rng.normal(scale=1e-4, size=2)
        s.dq += self.rng.normal(scale=1e-3, size=2)

    def observe(self) -> Observation:
        seen = super().observe()
        noise = self.rng.integers(0, 100, seen.images["eye"].shape, dtype=np.uint8)
        return Observation(seen.t_ns, {"eye": seen.images["eye"] - noise}, seen.state, seen.q)


def fingerprint(policy: Policy, seed: int) -> tuple[str, ...]:
    lock = make(policy, Noisy(seed))
    lock.run(3.0, TASK, override=lambda o: np.array([0.5, 0.5, 1.0]) if 1e9 < lock.now_ns < 2e9 else None)
    rings = (lock.rings.control, lock.rings.frames, lock.rings.events)
    return tuple(hashlib.sha256(r.reader().poll().rows.tobytes()).hexdigest() for r in rings)


def test_the_same_seed_gives_the_same_rows_bit_for_bit(policy: Policy) -> None:
    a, b, c = fingerprint(policy, 1), fingerprint(policy, 1), fingerprint(policy, 2)
    assert a == b
    assert a[0] != c[0]
    assert a[1] != c[1]


def test_the_goal_is_reached_and_summed_up(policy: Policy) -> None:
    lock = make(policy)
    result = lock.run(4.0, TASK)
    assert isinstance(lock.robot, Tiny)
    np.testing.assert_allclose(lock.robot.q, [1.0, -0.8], atol=2e-3)
    assert result.ticks == 4000
    assert result.sim_s == pytest.approx(4.0)
    assert result.chunks == 40
    assert result.rejected == 0
    assert result.modes == {"hold": 120, "follow": 3880}
    assert not result.stopped
    rows = lock.rings.control.reader().poll().rows
    errors = rows["q_ref"] - rows["q"]
    assert result.tracking.rms == pytest.approx(np.sqrt(np.mean(errors.astype(float) ** 2)))
    assert result.tracking.max == pytest.approx(np.abs(errors).max())
    assert (rows["late_ns"] == 0).all()
    assert (rows["compute_ns"] == 0).all()


@pytest.mark.parametrize("latency_ms", [0.0, 1.0, 20.0, 99.0])
def test_a_chunk_is_seen_exactly_its_latency_after_its_observation(policy: Policy, latency_ms: float) -> None:
    lock = make(policy, latency_ms=latency_ms)
    lock.run(1.0, TASK)
    rows = lock.rings.control.reader().poll().rows
    new = rows[np.flatnonzero(np.diff(rows["chunk_id"], prepend=-1))]
    assert new["chunk_id"].tolist() == list(range(10))
    assert (new["chunk_age_ns"] == latency_ms * MS).all()
    frames = lock.rings.frames.reader().poll().rows
    assert (frames["infer_ns"] == latency_ms * MS).all()


def test_inference_that_takes_longer_than_a_period_skips_periods_and_never_overlaps(policy: Policy) -> None:
    lock = make(policy, latency_ms=250.0)
    lock.run(3.0, TASK)
    t = lock.rings.frames.reader().poll().rows["t_ns"]
    assert (np.diff(t) == 300 * MS).all()


def test_rates_that_do_not_fit_are_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError, match=r"edge\.policy_hz=7"):
        make(policy, policy_hz=7.0)


@pytest.mark.parametrize("control_hz", [250.0, 4000.0])
def test_other_rates_work(policy: Policy, control_hz: float) -> None:
    robot = Tiny(255, dt=1 / control_hz)
    result = make(policy, robot, control_hz=control_hz).run(3.0, TASK)
    np.testing.assert_allclose(robot.q, [1.0, -0.8], atol=0.01)
    assert result.ticks == 3 * control_hz


def test_the_operator_takes_over_by_the_same_path_and_is_flagged(policy: Policy) -> None:
    lock = make(policy)
    target = np.array([0.3, -0.3, 1.0])
    asked: list[Observation] = []

    def operator(seen: Observation) -> FloatArray | None:
        asked.append(seen)
        return target if 1_000 * MS <= lock.now_ns < 2_500 * MS else None

    lock.run(4.0, TASK, override=operator)
    frames = lock.rings.frames.reader().poll().rows
    taken = (frames["t_ns"] >= 1_000 * MS) & (frames["t_ns"] < 2_500 * MS)
    assert (frames["intervention"] == taken).all()
    np.testing.assert_allclose(frames["action"][taken], np.tile(target, (15, 1)))
    assert not frames["chunk"][taken].any()
    np.testing.assert_array_equal(frames["action"][~taken], frames["chunk"][~taken][:, :3])
    assert (frames["infer_ns"][taken] == 0).all()
    events = lock.rings.events.reader().poll().rows
    said = [(int(e["t_ns"]), e["name"]) for e in events if e["kind"] == b"intervention"]
    assert said == [(1_000 * MS, b"on"), (2_500 * MS, b"off")]
    rows = lock.rings.control.reader().poll().rows
    at = rows[rows["t_ns"] == 2_500 * MS][0]
    np.testing.assert_allclose(at["q"], target[:2], atol=0.02)
    assert at["tool_cmd"] == 1.0
    assert len(asked) == 40


def test_an_operator_may_give_a_chunk_of_any_length(policy: Policy) -> None:
    for steps in (1, 5, 200):
        lock = make(policy)
        chunk = np.tile([0.1, 0.1, 0.0], (steps, 1))
        lock.run(1.0, TASK, override=lambda _, c=chunk: c)  # type: ignore[misc]
        used = 64 if steps == 200 else max(steps, OVERRIDE_STEPS if steps == 1 else 0)
        record = lock._slot.record()
        lock._slot.read(record)
        assert record["steps"][0] == used


def test_an_operators_nonsense_is_refused_too(policy: Policy) -> None:
    lock = make(policy)
    result = lock.run(1.0, TASK, override=lambda _: np.array([math.nan, 0.0, 0.0]))
    assert result.rejected == 10
    assert result.chunks == 0
    assert result.modes == {"hold": 1000}


def test_a_policy_that_gives_no_numbers_leaves_the_arm_at_rest_and_is_reported(tmp_path: Path) -> None:
    lock = make(Policy.load(write_bundle(tmp_path / "nan", goal=(math.nan, 0.0))))
    result = lock.run(1.5, TASK)
    assert result.rejected == 15
    assert result.chunks == 0
    assert lock.system1.mode == Mode.FALLBACK
    events = lock.rings.events.reader().poll().rows
    rejected = [e for e in events if e["kind"] == b"policy"]
    assert len(rejected) == 15
    assert b"not finite" in rejected[0]["detail"]
    assert len(lock.rings.frames.reader().poll().rows) == 0


def test_a_policy_that_fails_in_mid_motion_ends_in_a_smooth_hold(policy: Policy) -> None:
    robot = Tiny(255)
    lock = make(policy, robot)
    lock.run(0.5, TASK)
    broken = robot.observe
    robot.observe = lambda: Observation(robot.t_ns, {}, broken().state, robot.q.copy())  # type: ignore[method-assign]
    lock.system2._frames = None
    result = lock.run(1.5, TASK)
    assert result.rejected == 15
    names = [e["name"] for e in lock.rings.events.reader().poll().rows if e["kind"] == b"mode"]
    assert names == [b"follow", b"carry_on", b"ramp", b"hold"]


def test_a_run_ends_when_told_and_goes_on_where_it_was(policy: Policy) -> None:
    lock = make(policy)
    result = lock.run(10.0, TASK, until=lambda: lock.now_ns >= 700 * MS, check_s=0.05)
    assert result.ticks == 700
    assert lock.run(0.3, TASK).ticks == 300
    rows = lock.rings.control.reader().poll().rows
    assert (np.diff(rows["t_ns"]) == MS).all()
    assert len(rows) == 1000


def test_a_new_episode_starts_without_the_last_ones_chunks(policy: Policy) -> None:
    robot = Tiny(255)
    lock = make(policy, robot)
    lock.run(1.01, TASK)  # a chunk is on its way: seen at 1.00, to be visible at 1.02
    robot.q[:] = robot.dq[:] = 0.0
    lock.reset()
    result = lock.run(0.1, TASK)
    assert result.modes == {"hold": 100}
    assert lock.now_ns == 1110 * MS
    rows = lock.rings.control.reader().poll().rows[-100:]
    assert (rows["chunk_id"][:20] == -1).all()
    assert (rows["chunk_id"][20:] == 11).all()


def test_the_recorder_is_polled_every_period_and_at_the_end(policy: Policy) -> None:
    polled: list[int] = []

    class Recorder:
        def poll(self, now_ns: int) -> None:
            polled.append(now_ns)

    lock = make(policy)
    lock.recorder = Recorder()
    lock.run(0.35, TASK)
    assert polled == [0, 100 * MS, 200 * MS, 300 * MS, 350 * MS]


def test_images_are_encoded_alike_every_time_and_fit_even_as_noise(policy: Policy) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert encode_image(noise, 95) == encode_image(noise.copy(), 95)
    robot = Noisy(0)
    robot.observe = lambda: Observation(0, {"eye": noise}, np.zeros(3, np.float32), robot.q.copy())  # type: ignore[method-assign]
    lock = Lockstep(robot, robot, policy, record=True, jpeg_quality=100)
    lock.run(0.1, TASK)
    row = lock.rings.frames.reader().poll().rows[0]
    assert lock.rings.frames.image(row, "eye") == encode_image(noise, 100)


def test_without_recording_no_images_are_encoded(policy: Policy) -> None:
    lock = make(policy, record=False)
    lock.run(0.5, TASK)
    assert lock.rings.frames.written == 0


def test_a_policy_that_needs_another_camera_is_refused(policy: Policy) -> None:
    robot = Tiny()
    robot.cameras = ("nose",)
    with pytest.raises(ConfigError, match="needs camera 'eye'; the robot has nose"):
        make(policy, robot, record=False)
