"""Closed-form kinematics of the twin's arm: five revolute joints, the tool always pointing down.

Joint order: yaw, shoulder, elbow, wrist pitch, wrist roll. The planar part is the textbook two-link
solution (Craig, *Introduction to Robotics*, 3rd ed., section 4.4); wrist pitch keeps the tool vertical and
wrist roll cancels the yaw, so that the tool and its camera stay aligned with the robot's base frame.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

SHOULDER_M = 0.25  # height of the shoulder above the table
UPPER_M = 0.35
FORE_M = 0.33
TOOL_M = 0.12  # wrist to suction cup


def inverse(points: FloatArray) -> FloatArray:
    """Joint angles that put the suction cup at ``points``.

    Args:
        points: ``[..., 3]`` x, y, z of the cup, m, robot base frame.

    Returns:
        ``[..., 5]`` rad; NaN rows where the point is out of reach, so that a caller that validates its
        chunk refuses them instead of moving to a clamped place nobody asked for.
    """
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    yaw = np.arctan2(y, x)
    reach = np.hypot(x, y)
    height = z + TOOL_M - SHOULDER_M
    cosine = (reach**2 + height**2 - UPPER_M**2 - FORE_M**2) / (2 * UPPER_M * FORE_M)
    cosine = np.where(np.abs(cosine) <= 1.0, cosine, np.nan)
    elbow = np.arccos(cosine)
    shoulder = -np.arctan2(height, reach) - np.arctan2(
        FORE_M * np.sin(elbow), UPPER_M + FORE_M * np.cos(elbow)
    )
    pitch = np.pi / 2 - shoulder - elbow
    return np.stack([yaw, shoulder, elbow, pitch, yaw], axis=-1)


def forward(q: FloatArray) -> FloatArray:
    """Position of the suction cup, ``[..., 3]`` m, for joint angles ``[..., 5]`` rad."""
    a1 = q[..., 1]
    a2 = a1 + q[..., 2]
    a3 = a2 + q[..., 3]
    reach = UPPER_M * np.cos(a1) + FORE_M * np.cos(a2) + TOOL_M * np.cos(a3)
    height = SHOULDER_M - (UPPER_M * np.sin(a1) + FORE_M * np.sin(a2) + TOOL_M * np.sin(a3))
    return np.stack([reach * np.cos(q[..., 0]), reach * np.sin(q[..., 0]), height], axis=-1)
