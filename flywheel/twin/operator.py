"""The scripted operator: picks the target from any reachable state and places it in the bin.

Reactive, so it can take over at any moment: it looks only at where the tool is, what the tool holds and
where the target is, and plans the next chunk of waypoints kinematically.
"""

from __future__ import annotations

import numpy as np

from flywheel.twin.kinematics import FloatArray

BIN_M = np.array([0.15, 0.42])  # centre of the bin, robot base frame
HOVER_M = 0.14  # height at which the tool travels
DROP_M = 0.16  # height over the bin at which it lets go
TRAVEL_M_S = 0.5
DESCEND_M_S = 0.3
CLIMB_M_S = 0.3
SLOW_M_S = 0.08  # never slower, so that it arrives
BRAKE_HZ = 4.0  # speed per distance left


def _approach(tip: FloatArray, target_top: FloatArray, step_s: float) -> FloatArray:
    """Down a funnel over the target: the further aside, the higher; slower the closer.

    Below the funnel it rises, and goes on sideways the more slowly the lower it is, but always a little: an
    operator that stopped to rise would teach its imitator to stop.
    """
    grasp_z = float(target_top[2]) + 0.001
    way = target_top[:2] - tip[:2]
    aside = float(np.hypot(*way))
    free = min(1.0, max(0.3, 1.0 - (_funnel(aside, grasp_z) - float(tip[2])) / 0.06))
    speed = max(SLOW_M_S, free * min(TRAVEL_M_S, BRAKE_HZ * aside))
    stride = min(aside, speed * step_s)
    here = tip[:2] + way * (stride / aside) if aside > 0 else tip[:2]
    goal = _funnel(aside - stride, grasp_z)
    z = max(goal, tip[2] - DESCEND_M_S * step_s) if tip[2] > goal else min(goal, tip[2] + CLIMB_M_S * step_s)
    return np.array([here[0], here[1], z])


def _funnel(aside: float, grasp_z: float) -> float:
    return grasp_z + min(HOVER_M - grasp_z, 2.5 * max(0.0, aside - 0.006))


def _carry(tip: FloatArray, step_s: float) -> FloatArray:
    """Up, then over to the bin; sideways only as fast as the height allows, and slowly at the end."""
    way = BIN_M - tip[:2]
    left = float(np.hypot(*way))
    free = min(1.0, max(0.0, (float(tip[2]) - 0.05) / 0.06))
    stride = min(left, free * max(SLOW_M_S, min(TRAVEL_M_S, BRAKE_HZ * left)) * step_s)
    here = tip[:2] + way * (stride / left) if left > 0 else tip[:2]
    rise = min(max(DROP_M - tip[2], -DESCEND_M_S * step_s), CLIMB_M_S * step_s)
    return np.array([here[0], here[1], tip[2] + rise])


def next_waypoint(
    tip: FloatArray, held: bool, held_is_target: bool, target_top: FloatArray, step_s: float
) -> tuple[FloatArray, float]:
    """Where the tool should be one step from now, and whether it should suck.

    Smooth in the tool's position wherever it can be: a policy that imitates it then makes small errors of
    small errors of sight, and does not stall where the operator would have changed his mind.

    Args:
        tip: ``[3]`` m, the suction cup.
        held: whether anything hangs on the cup.
        held_is_target: whether that thing is the target.
        target_top: ``[3]`` m, centre of the target's upper face.
        step_s: time between waypoints, s.
    """
    if held and not held_is_target:  # put the wrong box back down where it was taken, then start again
        if tip[2] > 0.075:
            return np.array([tip[0], tip[1], max(0.07, tip[2] - DESCEND_M_S * step_s)]), 1.0
        return np.array([tip[0], tip[1], HOVER_M]), 0.0
    if not held:
        point = _approach(tip, target_top, step_s)
        return point, 1.0 if tip[2] < target_top[2] + 0.013 else 0.0
    if float(np.hypot(*(tip[:2] - BIN_M))) < 0.015 and tip[2] > 0.12:
        return np.array([BIN_M[0], BIN_M[1], DROP_M]), 0.0
    return _carry(tip, step_s), 1.0


def plan(
    tip: FloatArray, held: bool, held_is_target: bool, target_top: FloatArray, steps: int, step_s: float
) -> FloatArray:
    """The next ``steps`` waypoints, ``[steps, 4]``: x, y, z (m), suction (0 or 1).

    The rollout is kinematic: the tool is where it was asked to be, and a cup that sucks on the target's
    upper face holds it. After letting go over the bin the plan stays there.
    """
    out = np.empty((steps, 4))
    at = tip.copy()
    for k in range(steps):
        point, suck = next_waypoint(at, held, held_is_target, target_top, step_s)
        out[k, :3] = point
        out[k, 3] = suck
        if held and suck < 0.5:
            if held_is_target:
                out[k + 1 :] = out[k]
                break
            held = False
        elif not held and suck > 0.5 and float(np.abs(point - target_top).max()) < 0.008:
            held = held_is_target = True
        at = point
    return out
