"""The robot's side of delivery: nothing unverified or unwanted runs, and a robot always has a policy."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.edge.shadow import Comparison
from flywheel.edge.slots import TRIAL_BOOTS
from flywheel.edge.updater import Action, Updater, choose
from flywheel.errors import BundleError, ConfigError
from flywheel.release import Publisher
from flywheel.schema import (
    EVERYONE,
    Assignment,
    Group,
    Release,
    RobotReport,
    RolloutStage,
    bundle_digest,
    cohort_draw,
)
from tests.bucket import BucketStore, Killed
from tests.deliveries import Clock, failing, make_bundle, robot, stable, warm_up

RID = "a" * 12 + "-" + "b" * 12


pytestmark = pytest.mark.usefixtures("quick_disk")


class Fleet:
    """A repository, three bundles, and the robot ``r1`` that runs the first of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = BucketStore()
        self.publisher = Publisher(self.store, root / "keys")
        self.publisher.init()
        self.a, self.b, self.c = (make_bundle(root, name) for name in "abc")
        self.publisher.publish_first(self.a)
        self.clock = Clock()
        with self.robot() as r:
            assert r.poll(warm_up).action is Action.SWAPPED
            r.confirm()

    def robot(self, **options: Any) -> AbstractContextManager[Updater]:
        return robot(self.root, self.store, self.publisher, clock_ns=self.clock, **options)

    def publish(self, bundle: Path, **fields: Any) -> None:
        self.publisher.publish(bundle, stable(bundle, **fields))

    def canary(self, bundle: Path, stage: RolloutStage, **fields: Any) -> None:
        """A rollout of a bundle, at a stage, with every robot in its cohort."""
        release = Release(group=Group.CANARY, digest=bundle_digest(bundle), rollout_id=RID)
        acting = stage is not RolloutStage.SHADOW
        self.publisher.publish(bundle, release.model_copy(update={"acting": acting, **fields}))
        self.stage(bundle, stage)

    def stage(self, bundle: Path, stage: RolloutStage) -> None:
        head = self.store.latest(f"rollouts/{RID}")
        state = {
            "schema_version": 1,
            "rollout_id": RID,
            "bundle_digest": bundle_digest(bundle),
            "stage": stage.value,
            "cohort_below": EVERYONE,
            "from_a_newer_cloud": True,
        }
        self.store.append_version(f"rollouts/{RID}", (head[0] if head else 0) + 1, json.dumps(state).encode())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def fleet(template: Fleet, tmp_path: Path) -> Fleet:
    """A copy of the template that a test may spoil."""
    copy = object.__new__(Fleet)
    copy.root = tmp_path / "fleet"
    shutil.copytree(template.root, copy.root, symlinks=True)
    copy.store = BucketStore()
    copy.store.server.objects = dict(template.store.server.objects)
    copy.publisher = Publisher(copy.store, copy.root / "keys")
    copy.a, copy.b, copy.c = (copy.root / f"bundle-{name}" for name in "abc")
    copy.clock = Clock()
    return copy


def runs(updater: Updater, bundle: Path) -> bool:
    """Whether the policy in use is a bundle, by its bytes on the disk."""
    active = updater.active()
    return active is not None and active.digest == bundle_digest(bundle) == bundle_digest(active.directory)


# ── trial and fallback ──────────────────────────────────────────────────────────────────────────────


def test_policy_that_does_not_warm_up_is_refused_once_and_not_tried_again_until_signed_anew(
    fleet: Fleet,
) -> None:
    fleet.publish(fleet.b)
    with fleet.robot() as r:
        poll = r.poll(failing("no such operator"))
        assert poll.action is Action.REFUSED
        assert "RuntimeError: no such operator" in poll.reason
        assert runs(r, fleet.a)
        again = r.poll(failing("must not be called"))
        assert (again.action, "given back before" in again.reason) == (Action.NONE, True)
        assert r.report().refused_digest == bundle_digest(fleet.b)
        fleet.publish(fleet.b, git_rev="signed anew")
        assert r.poll(warm_up).action is Action.SWAPPED
        assert runs(r, fleet.b)


def test_runtime_that_loaded_other_bytes_than_those_verified_is_refused(fleet: Fleet) -> None:
    fleet.publish(fleet.b)
    with fleet.robot() as r:
        poll = r.poll(lambda d: "0" * 64)
        assert poll.action is Action.REFUSED
        assert "loaded bytes of digest 000" in poll.reason
        assert runs(r, fleet.a)


def test_policy_that_crashes_the_robot_is_given_back_after_a_few_starts(fleet: Fleet) -> None:
    fleet.publish(fleet.b)
    with fleet.robot() as r:
        r.poll(warm_up)
    for _ in range(TRIAL_BOOTS):
        with fleet.robot() as r:
            assert runs(r, fleet.b)
    with fleet.robot() as r:
        assert runs(r, fleet.a)
        assert r.poll(warm_up).action is Action.NONE
        assert "not confirmed" in r.report().refused_reason


def test_policy_that_is_not_confirmed_in_time_is_given_back(fleet: Fleet) -> None:
    fleet.publish(fleet.b)
    with fleet.robot(confirm_within_s=60) as r:
        assert r.poll(warm_up).action is Action.SWAPPED
        fleet.clock.advance(59)
        assert r.poll(warm_up).action is Action.NONE
        fleet.clock.advance(2)
        assert r.poll(warm_up).action is Action.FELL_BACK
        assert runs(r, fleet.a)


def test_confirmed_policy_survives_any_number_of_starts(fleet: Fleet) -> None:
    fleet.publish(fleet.b)
    with fleet.robot() as r:
        r.poll(warm_up)
        r.confirm()
    for _ in range(TRIAL_BOOTS + 2):
        with fleet.robot() as r:
            fleet.clock.advance(3600)
            assert runs(r, fleet.b)
            assert r.poll(warm_up).action is Action.NONE


def test_fall_back_on_request_and_never_of_a_confirmed_policy(fleet: Fleet) -> None:
    fleet.publish(fleet.b)
    with fleet.robot() as r:
        r.poll(warm_up)
        assert r.fall_back("it shakes", warm_up).action is Action.FELL_BACK
        assert runs(r, fleet.a)
        assert r.fall_back("again", warm_up).action is Action.NONE
        assert runs(r, fleet.a)


def test_damaged_policy_is_replaced_by_the_previous_one_and_fetched_again(fleet: Fleet) -> None:
    fleet.publish(fleet.b)
    with fleet.robot() as r:
        r.poll(warm_up)
        r.confirm()
        active = r.active()
        assert active is not None
        directory = active.directory
    (directory / "policy.onnx").write_bytes(b"bit rot")
    with fleet.robot() as r:
        assert runs(r, fleet.a)
        assert r.poll(warm_up).action is Action.SWAPPED
        assert runs(r, fleet.b)


def test_first_policy_that_does_not_run_leaves_none(fleet: Fleet) -> None:
    with robot(fleet.root, fleet.store, fleet.publisher, "r2") as r:
        assert r.poll(failing("no")).action is Action.REFUSED
        assert r.active() is None
        assert r.report().loaded_digest == ""


def test_only_policy_damaged_is_an_error_and_mended_by_the_next_poll(fleet: Fleet) -> None:
    with fleet.robot() as r:
        active = r.active()
        assert active is not None
    (active.directory / "policy.json").unlink()
    updater = Updater(
        fleet.root / "r1", fleet.store, site="lab", robot="r1", bootstrap=fleet.publisher.keys.root
    )
    with updater as r:
        with pytest.raises(BundleError, match="no policy left to run"):
            r.boot(warm_up)
        assert r.poll(warm_up).action is Action.SWAPPED
        assert runs(r, fleet.a)


def test_policy_that_needs_a_newer_runtime_is_refused(fleet: Fleet) -> None:
    fleet.publish(fleet.b, minimum_runtime="9.0.0")
    with fleet.robot() as r:
        poll = r.poll(warm_up)
        assert poll.action is Action.REFUSED
        assert "needs runtime 9.0.0" in poll.reason
    with fleet.robot(runtime_version="10.0.0") as r:
        assert r.poll(warm_up).action is Action.SWAPPED


def test_two_updaters_never_share_a_directory(fleet: Fleet) -> None:
    with fleet.robot(), pytest.raises(ConfigError, match="another updater"), fleet.robot():
        pass


# ── the way there ───────────────────────────────────────────────────────────────────────────────────


def test_store_that_is_down_changes_nothing(fleet: Fleet) -> None:
    with fleet.store.server.down(), fleet.robot() as r:
        assert runs(r, fleet.a)
        poll = r.poll(warm_up)
        assert poll.action is Action.OFFLINE
        assert runs(r, fleet.a)


def test_interrupted_download_is_taken_up_where_it_broke_off(fleet: Fleet) -> None:
    """Killed at every request; files that were complete are not fetched again."""
    fleet.publish(fleet.b)
    server, k = fleet.store.server, 0
    while True:
        k += 1
        left = [k]
        fetched: list[str] = []

        def kill(verb: str, key: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        def note(verb: str, key: str, fetched: list[str] = fetched) -> None:
            fetched.append(key)

        server.before = kill
        root = fleet.root / f"copy-{k}"
        shutil.copytree(fleet.root / "r1", root / "r1", symlinks=True)
        try:
            with robot(root, fleet.store, fleet.publisher) as r:
                assert r.poll(warm_up).action is Action.SWAPPED
            server.before = lambda verb, key: None
            break
        except Killed:
            pass
        server.before = note
        done = {p.name for p in root.glob("r1/staging/*/*") if p.suffix != ".part"}
        with robot(root, fleet.store, fleet.publisher) as r:
            assert runs(r, fleet.a), k
            assert r.poll(warm_up).action is Action.SWAPPED, k
            assert runs(r, fleet.b), k
        again = {key.rsplit("/", 1)[1].split(".", 1)[1] for key in fetched if "/targets/" in key}
        assert not done & again, k
    assert k > 5


def test_power_lost_at_any_write_leaves_a_policy_that_runs(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every rename on the robot's disk, during update, confirmation and return."""
    fleet.publish(fleet.b)
    real = Path.rename
    k = 0
    while True:
        k += 1
        left = [k]

        def lost(self: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(self, target)

        root = fleet.root / f"copy-{k}"
        shutil.copytree(fleet.root / "r1", root / "r1", symlinks=True)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lost)
            patch.setattr(Path, "replace", lost)
            try:
                with robot(root, fleet.store, fleet.publisher) as r:
                    r.poll(warm_up)
                    r.confirm()
                break
            except Killed:
                pass
        with robot(root, fleet.store, fleet.publisher) as r:
            assert runs(r, fleet.a) or runs(r, fleet.b), k
            r.poll(warm_up)
            assert runs(r, fleet.b), k
    assert k > 6


# ── which release ───────────────────────────────────────────────────────────────────────────────────


@given(
    robot_name=st.sampled_from([f"r{i}" for i in range(20)]),
    acting=st.booleans(),
    signed_below=st.sampled_from([0, EVERYONE // 4, EVERYONE]),
    state_below=st.sampled_from([0, EVERYONE // 2, EVERYONE]),
    stage=st.sampled_from(list(RolloutStage)),
    other_rollout=st.booleans(),
    other_digest=st.booleans(),
)
def test_candidate_acts_only_where_signature_state_and_draw_all_say_so(
    robot_name: str,
    acting: bool,
    signed_below: int,
    state_below: int,
    stage: RolloutStage,
    other_rollout: bool,
    other_digest: bool,
) -> None:
    canary = Release(
        group=Group.CANARY, digest="1" * 64, rollout_id=RID, acting=acting, cohort_below=signed_below
    )
    assignment = Assignment(
        schema_version=1,
        rollout_id="c" * 12 + "-" + "d" * 12 if other_rollout else RID,
        bundle_digest="2" * 64 if other_digest else "1" * 64,
        stage=stage,
        cohort_below=state_below,
    )
    group, shadow = choose(robot_name, canary, assignment)
    meant = (
        not other_rollout
        and not other_digest
        and cohort_draw(RID, robot_name) < min(signed_below, state_below)
    )
    acts = stage in (RolloutStage.CANARY, RolloutStage.APPROVAL, RolloutStage.WIDE) and acting and meant
    assert group is (Group.CANARY if acts else Group.STABLE)
    assert shadow is (stage is RolloutStage.SHADOW and meant)
    assert choose(robot_name, None, assignment) == (Group.STABLE, False)
    assert choose(robot_name, canary, None) == (Group.STABLE, False)


def test_draws_are_even_and_new_for_each_rollout() -> None:
    names = [f"robot-{i}" for i in range(4000)]
    share = np.mean([cohort_draw(RID, n) < EVERYONE // 10 for n in names])
    assert 0.08 < share < 0.12
    other = "c" * 12 + "-" + "d" * 12
    both = np.mean([max(cohort_draw(RID, n), cohort_draw(other, n)) < EVERYONE // 10 for n in names])
    assert both < 0.03


def test_shadowed_candidate_lies_verified_beside_and_never_acts(fleet: Fleet) -> None:
    fleet.canary(fleet.b, RolloutStage.SHADOW)
    with fleet.robot() as r:
        assert r.poll(warm_up).action is Action.STAGED
        beside = r.shadow()
        assert beside is not None
        assert bundle_digest(beside) == bundle_digest(fleet.b)
        assert runs(r, fleet.a)
        # somebody who may write the state, but not sign, cannot make it act
        fleet.stage(fleet.b, RolloutStage.CANARY)
        assert r.poll(warm_up).action is Action.NONE
        assert runs(r, fleet.a)
        fleet.canary(fleet.b, RolloutStage.CANARY)
        requests = fleet.store.server.requests
        assert r.poll(warm_up).action is Action.SWAPPED
        assert runs(r, fleet.b)
        assert r.shadow() is None
        assert fleet.store.server.requests - requests < 8  # its bytes were there already


def test_candidate_that_was_only_compared_is_never_fallen_back_to(fleet: Fleet) -> None:
    fleet.canary(fleet.b, RolloutStage.SHADOW)
    with fleet.robot() as r:
        r.poll(warm_up)
        active = r.active()
        assert active is not None
    (active.directory / "policy.onnx").write_bytes(b"bit rot")
    updater = Updater(
        fleet.root / "r1", fleet.store, site="lab", robot="r1", bootstrap=fleet.publisher.keys.root
    )
    with updater as r, pytest.raises(BundleError):
        r.boot(warm_up)


def test_rolled_back_candidate_is_left_and_never_fallen_back_to(fleet: Fleet) -> None:
    fleet.canary(fleet.b, RolloutStage.CANARY)
    with fleet.robot() as r:
        assert r.poll(warm_up).action is Action.SWAPPED
        r.confirm()
        assert runs(r, fleet.b)
        fleet.stage(fleet.b, RolloutStage.ROLLED_BACK)
        assert r.poll(warm_up).action is Action.SWAPPED
        assert runs(r, fleet.a)
        assert r.fall_back("the old one shakes too", warm_up).action is Action.FELL_BACK
        assert r.active() is None  # at rest is safer than by a policy that was taken back


def test_policy_that_was_stable_and_is_revoked_is_never_fallen_back_to(fleet: Fleet) -> None:
    fleet.publish(fleet.b)
    with fleet.robot() as r:
        r.poll(warm_up)
        r.confirm()
        fleet.publisher.reissue(stable(fleet.a, revokes=(bundle_digest(fleet.b),)))
        assert r.poll(warm_up).action is Action.SWAPPED
        assert runs(r, fleet.a)
        assert r.fall_back("it shakes", warm_up).action is Action.FELL_BACK
        assert r.active() is None


def test_candidate_withdrawn_while_on_trial_is_left_at_once(fleet: Fleet) -> None:
    fleet.canary(fleet.b, RolloutStage.CANARY)
    with fleet.robot() as r:
        r.poll(warm_up)
        fleet.publish(fleet.c)
        fleet.stage(fleet.b, RolloutStage.HELD)
        assert r.poll(warm_up).action is Action.FELL_BACK
        assert runs(r, fleet.a)
        assert r.poll(warm_up).action is Action.SWAPPED
        assert runs(r, fleet.c)


@pytest.mark.parametrize("state", [b"not json", b"{}", b'{"schema_version": 2}'])
def test_state_that_is_not_understood_gives_no_leave_to_act(fleet: Fleet, state: bytes) -> None:
    fleet.canary(fleet.b, RolloutStage.CANARY)
    fleet.store.server.overwrite(f"rollouts/{RID}/00000001.json", state)
    with fleet.robot() as r:
        assert r.poll(warm_up).action is Action.NONE
        assert runs(r, fleet.a)


def test_canary_that_became_stable_is_not_loaded_again(fleet: Fleet) -> None:
    fleet.canary(fleet.b, RolloutStage.CANARY)
    with fleet.robot() as r:
        r.poll(warm_up)
        r.confirm()
        fleet.publisher.reissue(stable(fleet.b))
        fleet.publisher.withdraw(Group.CANARY)
        assert r.poll(failing("must not be called")).action is Action.NONE
        active = r.active()
        assert active is not None
        assert active.release.group is Group.STABLE


# ── what the fleet is told ──────────────────────────────────────────────────────────────────────────


def test_report_tells_the_digest_of_what_was_loaded_not_of_what_was_asked_for(fleet: Fleet) -> None:
    fleet.publish(fleet.b)
    with fleet.robot() as r:
        r.poll(failing("no"))
        r.report(episodes=3, successes=2)
    report = fleet.store.get_json("fleet/robots/r1.json", RobotReport)
    assert report.loaded_digest == bundle_digest(fleet.a)
    assert (report.episodes, report.successes, report.t_unix_ns) == (3, 2, fleet.clock())


def test_comparison_counts_what_is_executed_and_refuses_what_is_not_sound() -> None:
    c = Comparison(RID, "r1", "1" * 64, "2" * 64, execute=2, low=np.full(3, -1.0), high=np.full(3, 1.0))
    zeros = np.zeros((4, 3))
    late = zeros.copy()
    late[2:] = 9.0  # never executed
    c.add(zeros + 0.3, 5_000_000, zeros, 4_000_000)
    c.add(late, 7_000_000, zeros, 4_000_000)
    c.add(np.full((4, 3), np.nan), 1, zeros, 4_000_000)
    c.add(np.full((4, 3), 1.5), 1, zeros, 4_000_000)
    c.end_episode()
    report = c.report()
    assert (report.episodes, report.chunks, report.invalid) == (1, 4, 2)
    assert report.rms_difference == pytest.approx(0.3 / np.sqrt(2))
    assert (report.infer_p99_ns, report.current_infer_p99_ns) == (7_000_000, 4_000_000)
