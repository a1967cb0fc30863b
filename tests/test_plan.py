"""A robot's plan, as one supervisor leaves it for the next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flywheel.edge.processes import Plan, dtypes
from tests.robots import BUNDLE, JOINTS


@given(names=st.lists(st.sampled_from("zyxwabc"), min_size=1, unique=True))
def test_a_plan_that_was_written_down_is_still_the_plan_of_the_running_robot(names: list[str]) -> None:
    """Else the next supervisor finds System 1 "under another plan" and cannot take the robot over."""
    plan = Plan(
        robot="", perception="", joints=JOINTS, cameras=dict.fromkeys(names, (48, 64)), limits="",
        bundle_dir="", bundle=BUNDLE, instruction="",
    )  # fmt: skip
    read = Plan.model_validate_json(plan.to_bytes())
    assert read.sha256 == plan.sha256
    assert dtypes(read) == dtypes(plan)
