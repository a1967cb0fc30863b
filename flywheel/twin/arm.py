"""The twin's arm alone, for replay: its model, without boxes and contacts, and many runs of it at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import mujoco
import numpy as np
from mujoco import rollout
from numpy.typing import NDArray

from flywheel.twin.cell import JOINTS, MJCF, STEP_NS
from flywheel.twin.kinematics import TOOL_M
from flywheel.twin.parameters import DELAY_MAX_S, Values, apply, nominal
from flywheel.twin.shift import LAB

FloatArray = NDArray[np.float64]
STATE = 2 * JOINTS  # q, then dq
HISTORY = round(DELAY_MAX_S * 1e9 / STEP_NS) + 1  # torques before a window that a delay may need
PAYLOAD_HALF_M = 0.02  # centre of a box under the cup; assumed where the box is not known


def arm() -> mujoco.MjModel:
    """The cell's arm with a payload of no mass on its cup; nothing else, and nothing touches. A copy."""
    return copy.copy(_arm())


class Dynamics:
    """Inertia and bias of the arm, as its model has them, at any state."""

    def __init__(self) -> None:
        self._model = arm()
        self._data = mujoco.MjData(self._model)

    def at(self, q: FloatArray, dq: FloatArray, mass: FloatArray) -> FloatArray:
        """Fills ``mass`` ``[5, 5]``, kg·m²; returns gravity, Coriolis and viscous torques ``[5]``, N·m."""
        m, d = self._model, self._data
        d.qpos[:], d.qvel[:] = q, dq
        mujoco.mj_fwdPosition(m, d)
        mujoco.mj_fwdVelocity(m, d)
        mujoco.mj_fullM(m, d, mass)
        return np.asarray(d.qfrc_bias + m.dof_damping.reshape(-1) * d.qvel)


@cache
def _arm() -> mujoco.MjModel:
    spec = mujoco.MjSpec.from_string(MJCF)
    for e in list(spec.equalities):
        spec.delete(e)
    for b in [b for b in spec.bodies if b.name.startswith("box")]:
        spec.delete(b)
    payload = spec.body("tool").add_body(name="payload", pos=[TOOL_M + PAYLOAD_HALF_M, 0.0, 0.0])
    payload.explicitinertial = True
    payload.mass = 0.0
    payload.inertia = [0.0, 0.0, 0.0]
    spec.option.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_CONTACT)
    return spec.compile()


def nominal_values() -> dict[str, float]:
    """The model's own parameters; a payload is taken for one of the lab's boxes."""
    return nominal(arm(), LAB.mass_kg)


class Arms:
    """The arm with some parameters, free and carrying."""

    def __init__(self, values: Values) -> None:
        self.values = dict(values)
        kg = self.values["payload"]
        self.free, self.carrying = arm(), arm()
        body = self.carrying.body("payload")
        body.mass[0] = kg
        body.inertia[:] = kg * (2.0 * PAYLOAD_HALF_M) ** 2 / 6.0
        for model in (self.free, self.carrying):
            apply(model, self.values)


def delayed(tau: FloatArray, delay_s: float) -> FloatArray:
    """Torques ``[..., HISTORY + T, n]`` as they take effect, ``[..., T, n]``: linear between two steps."""
    whole, part = divmod(delay_s * 1e9 / STEP_NS, 1.0)
    first = HISTORY - int(whole)
    steps = tau.shape[-2] - HISTORY
    now, before = tau[..., first : first + steps, :], tau[..., first - 1 : first - 1 + steps, :]
    return (1.0 - part) * now + part * before


def run(models: Sequence[mujoco.MjModel], starts: FloatArray, tau: FloatArray) -> FloatArray:
    """States ``[B, T, 10]`` after each step, of arms that start at ``[B, 10]`` under torques ``[B, T, 5]``.

    One thread: who asks for replays has work beside them.
    """
    initial = np.zeros((len(starts), 1 + STATE))
    initial[:, 1:] = starts
    state, _ = rollout.rollout(list(models), mujoco.MjData(models[0]), initial, np.ascontiguousarray(tau))
    return np.asarray(state[:, :, 1:])
