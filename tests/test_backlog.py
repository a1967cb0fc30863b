"""The backlog trigger on a simulated clock: when it fires, and that nothing makes it forget or die."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flywheel.claims import Backlog
from flywheel.errors import StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from dags.backlog import BacklogTrigger

POLL_S, COOLDOWN_S = 2.0, 30.0


class Simulation:
    """A clock that only sleeping moves, and an inbox that is a function of it."""

    def __init__(self, inbox: Callable[[float], Backlog]) -> None:
        from dags.backlog import BacklogTrigger

        self.now = 0.0
        self.looks: list[float] = []
        self.inbox = inbox
        self.trigger: BacklogTrigger = BacklogTrigger(
            min_episodes=3, max_wait_s=100, cooldown_s=COOLDOWN_S, poll_s=POLL_S
        )
        self.trigger.look = self.look
        self.trigger.clock = lambda: self.now
        self.trigger.sleep = self.sleep

    def look(self) -> Backlog:
        self.looks.append(self.now)
        return self.inbox(self.now)

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0, "would spin"
        self.now += seconds
        await asyncio.sleep(0)

    def fired(self, until: float) -> list[float]:
        """Times of the wake-ups up to a time."""

        async def collect() -> list[float]:
            times: list[float] = []
            events = self.trigger.run()
            pending: asyncio.Task[Any] | None = None
            while self.now <= until:
                pending = pending or asyncio.ensure_future(anext(events))
                await asyncio.wait([pending], timeout=0.001)
                if pending.done():
                    times.append(self.now)
                    assert set(pending.result().payload) == {"waiting", "oldest_s"}
                    pending = None
            if pending is not None:
                pending.cancel()
            return [t for t in times if t <= until]

        return asyncio.run(collect())


def test_it_fires_when_enough_wait_and_again_only_after_the_cooldown() -> None:
    fired = Simulation(lambda t: Backlog(3 if t >= 10 else 2, 0.0)).fired(until=75)
    assert fired == [10, 10 + COOLDOWN_S, 10 + 2 * COOLDOWN_S]


def test_one_old_failure_is_enough_and_an_empty_inbox_never_is() -> None:
    assert Simulation(lambda t: Backlog(1, t)).fired(until=110)[0] == 100
    assert Simulation(lambda t: Backlog(0, 1e9)).fired(until=300) == []


def test_a_wake_up_that_was_lost_is_repeated_while_the_backlog_is_there() -> None:
    """Airflow may drop an event: level, not edge, so the next cooldown brings another."""
    fired = Simulation(lambda t: Backlog(5, t)).fired(until=200)
    assert all(b - a <= COOLDOWN_S + POLL_S for a, b in pairwise(fired))
    assert len(fired) >= 6


@pytest.mark.parametrize("error", [StoreUnavailable("down"), StoreRefused("keys")])
def test_a_store_that_fails_is_asked_less_and_less_often_and_then_seen_again(error: Exception) -> None:
    def inbox(t: float) -> Backlog:
        if t < 200:
            raise error
        return Backlog(3, 0.0)

    simulation = Simulation(inbox)
    fired = simulation.fired(until=320)
    down = [t for t in simulation.looks if t < 200]
    assert len(down) <= 9
    assert max(b - a for a, b in pairwise(down)) <= 60
    assert fired
    assert fired[0] <= 260


def test_it_is_made_anew_in_the_triggerer_from_what_it_serializes() -> None:
    from importlib import import_module

    classpath, keywords = Simulation(lambda _: Backlog(0, 0)).trigger.serialize()
    module, _, name = classpath.rpartition(".")
    again = getattr(import_module(module), name)(**keywords)
    assert again.serialize() == (classpath, keywords)
    assert Path(import_module(module).__file__ or "").name == "backlog.py"


def test_an_unknown_threshold_is_refused() -> None:
    from dags.backlog import BacklogTrigger

    with pytest.raises(ValueError, match="min_episode"):
        BacklogTrigger(min_episode=3)
