"""What Airflow answers while it starts, and what must not stop a start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flywheel.errors import ServiceError
from flywheel.services.airflow import Airflow


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Airflow, list[str]]]:
    """An Airflow that answers so, one after another, and what it was asked."""
    now = [0.0]
    monkeypatch.setattr("flywheel.services.airflow.time.monotonic", lambda: now[0])
    monkeypatch.setattr("flywheel.services.airflow.time.sleep", lambda s: now.__setitem__(0, now[0] + s))

    def make(*statuses: int) -> tuple[Airflow, list[str]]:
        found, asked, left = Airflow(tmp_path), [], list(statuses)

        def call(method: str, path: str, body: Any = None, *, user: str = "admin") -> Any:
            asked.append(path)
            status = left.pop(0) if len(left) > 1 else left[0]
            if status >= 400:
                raise ServiceError(f"Airflow: {method} /api/v2{path}: {status} no")

        monkeypatch.setattr(found, "call", call)
        return found, asked

    return make


@pytest.mark.parametrize("statuses", [(201,), (500, 500, 201), (500, 409), (409,)])
def test_a_database_that_is_busy_at_the_start_is_asked_again(
    statuses: tuple[int, ...], answering: Callable[..., tuple[Airflow, list[str]]]
) -> None:
    found, asked = answering(*statuses)
    found._make("pool trainer", "/pools", {}, give_up=60.0)
    assert asked == ["/pools"] * len(statuses)


@pytest.mark.parametrize(("statuses", "times"), [((403,), 1), ((500,), 62)])
def test_a_refusal_and_a_database_that_stays_broken_are_told(
    statuses: tuple[int, ...], times: int, answering: Callable[..., tuple[Airflow, list[str]]]
) -> None:
    found, asked = answering(*statuses)
    with pytest.raises(ServiceError, match=f"pool trainer: .*{statuses[0]}"):
        found._make("pool trainer", "/pools", {}, give_up=60.0)
    assert len(asked) == times
