"""Wakes the wheel while failures wait in the store's inbox.

The trigger looks at the level of the inbox, not at arrivals: it holds no state and a lost, repeated or late
wake-up does no harm, because the next look sees the same backlog. What is claimed, and by whom, is decided
by the run that it starts (``flywheel.claims``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from flywheel.claims import Backlog, backlog
from flywheel.config import TriggerSettings
from flywheel.errors import FlywheelError
from flywheel.store import Store

BACK_OFF_MAX_S = 60.0


class BacklogTrigger(BaseEventTrigger):
    """Fires while enough failures wait, or the oldest has waited long enough; at most once a cooldown.

    Keywords are those of ``TriggerSettings``. While the store does not answer it tries less and less often,
    and never ends: Airflow would restart a failed trigger every second or two.
    """

    def __init__(self, **settings: float) -> None:
        super().__init__()
        self.settings = TriggerSettings.model_validate(settings)
        # Seams: what the tests replace.
        self.look: Callable[[], Backlog] = self._inbox
        self._store: Store | None = None  # kept: making a client costs more than a look
        self.clock: Callable[[], float] = time.monotonic
        self.sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Its class and keywords, by which Airflow makes it anew in the triggerer."""
        return "dags.backlog.BacklogTrigger", self.settings.model_dump()

    def _inbox(self) -> Backlog:
        if self._store is None:
            self._store = Store.from_env()
        return backlog(self._store)

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, fire if it is time, sleep; for ever."""
        fired_at, failures = -float("inf"), 0
        while True:
            try:
                waiting = await asyncio.to_thread(self.look)
            except FlywheelError as e:
                failures += 1
                pause = min(self.settings.poll_s * 2**failures, BACK_OFF_MAX_S)
                self.log.warning("inbox not readable, next look in %.0f s: %s", pause, e)
                await self.sleep(pause)
                continue
            if failures:
                self.log.info("inbox readable again after %d failed looks", failures)
                failures = 0
            if waiting.due(self.settings) and self.clock() - fired_at >= self.settings.cooldown_s:
                fired_at = self.clock()
                yield TriggerEvent({"waiting": waiting.count, "oldest_s": round(waiting.oldest_s, 1)})
            await self.sleep(self.settings.poll_s)
