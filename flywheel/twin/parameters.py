"""The twin's physical parameters: what there is to identify, and the file that an identification leaves.

    mass.<link>        kg           of a link; its inertia goes with it, its centre of mass stays
    armature.<joint>   kg·m²        inertia of rotor and gears, at the joint
    damping.<joint>    N·m·s/rad    viscous friction
    friction.<joint>   N·m          dry friction
    delay              s            from a commanded torque to its effect
    payload            kg           what hangs on the cup while something does

Not among them is a gain of the drives: torques, masses and frictions that are all larger by one factor move
alike, so it takes a known payload to tell them apart (Gautier and Briot, J. Dyn. Sys. Meas. Control 136
(2014) 051025). All masses and frictions are in units of the torque that the robot says it gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import mujoco
import numpy as np
from pydantic import Field, ValidationError, model_validator

from flywheel.errors import ConfigError
from flywheel.schema import DIGEST, Strict, sha256_bytes

LINKS = ("yaw", "shoulder", "elbow", "wrist", "tool")
JOINT_NAMES = ("yaw", "shoulder", "elbow", "wrist", "roll")
DELAY_MAX_S = 0.02
FILE_BYTES_MAX = 1 << 20
Values = Mapping[str, float]  # by name, as above; what is not named is as the model has it


class Kind(NamedTuple):
    """How far a kind of parameter may lie from the model's, before anything was measured.

    ``logarithmic``: ``spread`` is the standard deviation of ln(value / nominal); else of the value, in its
    unit, per unit of ``_scale``. Assumptions: datasheets and CAD are right to so much.
    """

    unit: str
    logarithmic: bool
    spread: float


KINDS: Mapping[str, Kind] = {
    "mass": Kind("kg", True, 0.3),
    "armature": Kind("kg·m²", True, 0.5),
    "damping": Kind("N·m·s/rad", True, 0.5),
    "friction": Kind("N·m", False, 0.5),  # of the torque of viscous friction at 1 rad/s
    "delay": Kind("s", False, 0.003),
    "payload": Kind("kg", True, 0.7),
}
NAMES: tuple[str, ...] = (
    *(f"mass.{n}" for n in LINKS),
    *(f"{kind}.{n}" for kind in ("armature", "damping", "friction") for n in JOINT_NAMES),
    "delay",
    "payload",
)


class Estimate(Strict):
    """One parameter: the model's value, the identified one and its 95 % interval.

    ``identified`` is false where the episodes say little of it (see ``identify``): ``value`` is then no more
    than what fits best beside the others, close to the model's.
    """

    nominal: float = Field(ge=0)
    value: float = Field(ge=0)
    low: float = Field(ge=0)
    high: float = Field(ge=0)
    identified: bool
    unit: str


class SignalError(Strict):
    """How far the twin's signal is from the recorded one, open loop over windows of ``window_s``.

    ``normalised`` is rms over the range that the recorded signal covers; None where it does not move.
    """

    signal: str  # such as q.elbow, or tool.x; "q", "dq" and "tool" alone: all of them
    unit: str
    window_s: float
    windows: int = Field(ge=1)
    rms: float = Field(ge=0)
    max: float = Field(ge=0)
    normalised: float | None = Field(default=None, ge=0)


class TwinParameters(Strict):
    """The file: parameters, what they were identified from, and what that did to the replay error.

    ``model_sha256`` is of the MJCF that they belong to; ``episodes`` and ``held_out`` name each episode with
    the sha256 of its manifest, ``refused`` those that say too little, with the reason.
    """

    schema_version: Literal[1] = 1
    model_sha256: str = Field(pattern=DIGEST)
    parameters: dict[str, Estimate]
    episodes: dict[str, Annotated[str, Field(pattern=DIGEST)]] = Field(default_factory=dict)
    held_out: dict[str, Annotated[str, Field(pattern=DIGEST)]] = Field(default_factory=dict)
    refused: dict[str, str] = Field(default_factory=dict)
    robots: tuple[str, ...] = ()
    window_s: float = 0.0
    windows: int = 0
    condition: float | None = None  # of the scaled information, over the identified parameters
    noise: dict[str, float] = Field(default_factory=dict)  # standard deviation that the fit leaves, by signal
    before: tuple[SignalError, ...] = ()  # of the held-out episodes, with the model's own parameters
    after: tuple[SignalError, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> TwinParameters:
        if unknown := sorted(set(self.parameters) - set(NAMES)):
            raise ValueError(f"parameters: {unknown[0]!r} is not known; choose of {', '.join(NAMES)}")
        for name, e in self.parameters.items():
            if not e.low <= e.value <= e.high:
                raise ValueError(f"parameters.{name}: {e.value} is outside of [{e.low}, {e.high}]")
            if name.startswith(("mass.", "armature.")) and e.value <= 0:
                raise ValueError(f"parameters.{name}: must be greater than 0")
        delay = self.parameters.get("delay")
        if delay is not None and delay.value > DELAY_MAX_S:
            raise ValueError(f"parameters.delay: {delay.value} s, at most {DELAY_MAX_S} s")
        return self

    @property
    def digest(self) -> str:
        """Hex sha256 of the file's canonical bytes."""
        return sha256_bytes(self.to_bytes())

    @property
    def values(self) -> dict[str, float]:
        """By name."""
        return {name: e.value for name, e in self.parameters.items()}

    @classmethod
    def load(cls, path: Path | str) -> TwinParameters:
        """Read a file; ``ConfigError`` names the field that is wrong."""
        path = Path(path)
        try:
            if path.stat().st_size > FILE_BYTES_MAX:
                raise ConfigError(f"{path}: longer than {FILE_BYTES_MAX} bytes, no parameters of a twin")
            return cls.model_validate_json(path.read_bytes())
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ConfigError(f"{path}: {where}: {first['msg']}") from None


def nominal(model: mujoco.MjModel, payload_kg: float) -> dict[str, float]:
    """What a model of the arm says of itself, in the order of ``NAMES``."""
    dof = [int(model.joint(n).dofadr[0]) for n in JOINT_NAMES]
    found = {f"mass.{n}": float(model.body(n).mass[0]) for n in LINKS}
    columns = {
        "armature": model.dof_armature,
        "damping": model.dof_damping,
        "friction": model.dof_frictionloss,
    }
    for kind, column in columns.items():
        found |= {f"{kind}.{n}": float(column[d]) for n, d in zip(JOINT_NAMES, dof, strict=True)}
    return found | {"delay": 0.0, "payload": payload_kg}


def apply(model: mujoco.MjModel, values: Values) -> None:
    """Write masses, armature and frictions into a model of the arm. Delay and payload are its user's."""
    for name, value in values.items():
        kind, _, of = name.partition(".")
        if kind == "mass":
            body = model.body(of)
            body.inertia[:] *= value / body.mass[0]
            body.mass[0] = value
        elif of:
            dof = int(model.joint(of).dofadr[0])
            {
                "armature": model.dof_armature,
                "damping": model.dof_damping,
                "friction": model.dof_frictionloss,
            }[kind][dof] = value
    # Dry friction is a constraint. Few iterations are enough for boxes, but leave errors in the joints'
    # speeds that are larger than what a small change of a parameter does.
    model.opt.iterations, model.opt.ls_iterations, model.opt.tolerance = 50, 50, 1e-12
    mujoco.mj_setConst(model, mujoco.MjData(model))


class Scale:
    """Between values and a vector ``z`` in which the model's own values are 0 and one is one spread."""

    def __init__(self, around: Values) -> None:
        self.around = dict(around)
        self.low = np.array([self._bound(n, -1.0) for n in around])
        self.high = np.array([self._bound(n, 1.0) for n in around])

    def value(self, name: str, z: float) -> float:
        """Of one parameter at ``z``."""
        kind = KINDS[name.partition(".")[0]]
        if kind.logarithmic:
            return self.around[name] * math.exp(kind.spread * z)
        return max(self.around[name] + self._spread(name) * z, 0.0)

    def values(self, z: np.typing.NDArray[np.float64]) -> dict[str, float]:
        """Of all of them, ``z`` ``[P]`` in the order of ``around``."""
        return {n: self.value(n, float(x)) for n, x in zip(self.around, z, strict=True)}

    def _spread(self, name: str) -> float:
        kind, _, of = name.partition(".")
        return KINDS[kind].spread * (self.around[f"damping.{of}"] if kind == "friction" else 1.0)

    def _bound(self, name: str, side: float) -> float:
        if KINDS[name.partition(".")[0]].logarithmic:
            return 4.0 * side
        low = -self.around[name] / self._spread(name)
        most = (DELAY_MAX_S - self.around[name]) / self._spread(name) if name == "delay" else 8.0
        return low if side < 0 else most
