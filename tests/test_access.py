"""Policies for the store that would let one client act as another."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel import access
from flywheel.errors import ConfigError

NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,12}\Z")


def may(policy: dict[str, Any], action: str, key: str) -> bool:
    """What a server answers: * stands for anything, ? for one character."""
    resource = f"arn:aws:s3:::fleet/plant/{key}"
    return any(
        action in s["Action"] and any(fnmatchcase(resource, r) for r in s["Resource"])
        for s in policy["Statement"]
    )


@pytest.mark.parametrize("name", ["*", "r?", "", "a/b", "..", "r1/*", "-r1", "r" * 64, "r1\n"])
def test_a_name_that_could_mean_other_robots_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="robot"):
        access.robot("s3://fleet/plant", "a", name)
    with pytest.raises(ConfigError, match="site"):
        access.robot("s3://fleet/plant", name, "r1")


@pytest.mark.parametrize("url", ["", "fleet", "http://fleet/x", "s3:///x"])
def test_a_store_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket"):
        access.stages(url)


@given(NAMES, NAMES, st.integers(0, 999_999))
def test_no_robot_may_write_as_another(one: str, other: str, n: int) -> None:
    policy = access.robot("s3://fleet/plant", "a", one)
    own = one == other
    for key in (
        f"episodes/site=a/robot={other}/date=2026-01-01/x/manifest.json",
        f"fleet/robots/{other}.json",
        f"fleet/answers/{other}/q.json",
        f"fleet/pending/{other}/e.json",
        f"rollouts/x/shadow/{other}.json",
        f"rollouts/x/evidence/{other}-{n:06d}.json",
    ):
        assert may(policy, "s3:PutObject", key) is own, key
    assert may(policy, "s3:GetObject", f"fleet/requests/{other}/q.json") is own


def test_only_the_publisher_may_release() -> None:
    url = "s3://fleet/plant"
    policies = {
        "robot": access.robot(url, "a", "r1"),
        "stages": access.stages(url),
        "publisher": access.publisher(url),
    }
    for key in (
        "releases/metadata/timestamp.json",
        "rollouts/x/00000001.json",
        "rollouts/x/approvals/y.json",
    ):
        assert [n for n, p in policies.items() if may(p, "s3:PutObject", key)] == ["publisher"]
    for key in ("episodes/site=a/robot=r1/x/manifest.json", "releases/x", "bundles/x", "runs/x", "gates/x"):
        assert not any(may(p, "s3:DeleteObject", key) for p in policies.values()), key


def test_stages_may_ask_what_they_are_unsure_of_and_every_task_may_keep_its_log() -> None:
    """All are written by tasks: without them a turn in production ends in a 403."""
    url = "s3://fleet/plant"
    for key in ("questions/turn-a.json", "forms/f.json", "answers/e/ada.json"):  # what a form brings
        assert may(access.stages(url), "s3:PutObject", f"labels/{key}")
        assert not may(access.stages(url), "s3:DeleteObject", f"labels/{key}")
        assert not may(access.robot(url, "a", "r1"), "s3:PutObject", f"labels/{key}")
    for policy in (access.stages(url), access.publisher(url)):
        assert may(policy, "s3:PutObject", "logs/airflow/dag_id=wheel/attempt=1.log")
    assert not may(access.robot(url, "a", "r1"), "s3:GetObject", "logs/airflow/dag_id=wheel/attempt=1.log")
