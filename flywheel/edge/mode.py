"""What System 1 does when chunks stop coming, and when it must stop: a pure mode machine.

::

    FOLLOW ──stale──▶ CARRY_ON ──carry_on_s──▶ RAMP ──at rest──▶ HOLD ──hold_s──▶ FALLBACK
      ▲                  │ 1 chunk              │ n chunks        │ n chunks       │ m chunks
      └──────────────────┴──────────────────────┴─────────────────┴────────────────┘
    any ──category 1──▶ STOP_1 ──not at rest within bound_s──▶ STOP_0 ◀──category 0── any
    any ──category 2──▶ RAMP (and no way back to FOLLOW while it is asked for)
    STOP_1 at rest, STOP_0 ──reset, and nothing asks to stop──▶ HOLD

Each step down is bounded in time; a ramp that overruns its bound is itself a fault and becomes STOP_1. The
way up needs several good chunks in a row, the more the further down (hysteresis). Stops are latched.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flywheel.edge.compiled import compiled
from flywheel.edge.safety import (
    CARRY_NS,
    CATEGORY_0,
    CATEGORY_1,
    CATEGORY_2,
    HOLD_NS,
    NO_STOP,
    RAMP_NS,
    RECOVER,
    RECOVER_FALLBACK,
    STOP_NS,
)
from flywheel.schema import Mode

FOLLOW, CARRY_ON, RAMP, HOLD = int(Mode.FOLLOW), int(Mode.CARRY_ON), int(Mode.RAMP), int(Mode.HOLD)
FALLBACK, STOP_1, STOP_0 = int(Mode.FALLBACK), int(Mode.STOP_1), int(Mode.STOP_0)


@compiled
def step(
    mode: int,
    elapsed_ns: int,
    fresh: bool,
    streak: int,
    at_rest: bool,
    stop: int,
    reset: bool,
    times: npt.NDArray[np.int64],
) -> int:
    """The mode of this tick.

    ``elapsed_ns`` time in ``mode``; ``fresh`` the newest chunk can be followed now; ``streak`` good chunks in
    a row; ``at_rest`` the reference stands still; ``stop`` what is asked for (safety.NO_STOP … CATEGORY_0);
    ``reset`` a person acknowledged the stop; ``times`` by ``SafetyLimits.times``.
    """
    if stop >= CATEGORY_0:
        return STOP_0
    if mode == STOP_0:
        return HOLD if reset and stop == NO_STOP else STOP_0
    if mode == STOP_1:
        if not at_rest:
            return STOP_0 if elapsed_ns >= times[STOP_NS] else STOP_1
        return HOLD if reset and stop == NO_STOP else STOP_1
    if stop == CATEGORY_1:
        return STOP_1

    held_back = stop == CATEGORY_2
    if mode == FOLLOW:
        if held_back:
            return RAMP
        return FOLLOW if fresh else CARRY_ON
    if mode == CARRY_ON:
        if held_back:
            return RAMP
        if fresh:
            return FOLLOW
        return RAMP if elapsed_ns >= times[CARRY_NS] else CARRY_ON

    needed = times[RECOVER_FALLBACK] if mode == FALLBACK else times[RECOVER]
    if fresh and streak >= needed and not held_back:
        return FOLLOW
    if mode == RAMP:
        if at_rest:
            return HOLD
        return STOP_1 if elapsed_ns >= times[RAMP_NS] else RAMP
    if mode == HOLD and elapsed_ns >= times[HOLD_NS]:
        return FALLBACK
    return mode
