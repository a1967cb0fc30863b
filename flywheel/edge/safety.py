"""The envelope: what a robot may never do, from a file of its own, and the checks against it.

The limits are not settings: an experiment must not be able to loosen them. They lie in one file per robot,
whose sha256 is reported with everything that ran under them. Every limit names the clause that it serves.
The checks are pure, compiled and total: any input, NaN and infinity included, gives an answer.

This envelope is ordinary software. It is not safety-rated (ISO 13849-1); rated functions belong to the robot.
"""

from __future__ import annotations

import hashlib
import json
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from flywheel.config import StrictLoader
from flywheel.edge.compiled import compiled
from flywheel.errors import ConfigError
from flywheel.schema import Limit, Strict

FloatArray = npt.NDArray[np.float64]

# Rows of ``SafetyLimits.table()`` [6, joints].
LOWER, UPPER, VELOCITY, ACCELERATION, JERK, TORQUE = range(6)
# Entries of ``SafetyLimits.scalars()``.
TRACKING, MARGIN, OVERSPEED, TOOL_SPEED, WORKSPACE_LOWER, WORKSPACE_UPPER = 0, 1, 2, 3, 4, 7
KEEP_AWAY, TO_REST, CONTACT_SPEED, SCALARS = 10, 11, 12, 13
# Entries of ``SafetyLimits.times()``.
CARRY_NS, RAMP_NS, HOLD_NS, STOP_NS, MAX_AGE_NS, RECOVER, RECOVER_FALLBACK, PROTECTIVE = range(8)
# Severity of a stop: IEC 60204-1, 9.2.2, categories 2, 1 and 0.
NO_STOP, CATEGORY_2, CATEGORY_1, CATEGORY_0 = range(4)

# numba freezes plain integers, not enum members.
_POSITION, _VELOCITY, _TORQUE = int(Limit.POSITION), int(Limit.VELOCITY), int(Limit.TORQUE)
_TOOL, _WORKSPACE = int(Limit.TOOL_SPEED), int(Limit.WORKSPACE)
_NOT_FINITE, _TRACKING, _PROTECTIVE = (
    int(Limit.NOT_FINITE),
    int(Limit.TRACKING_ERROR),
    int(Limit.PROTECTIVE_STOP),
)
_SEPARATION, _CONTACT = int(Limit.SEPARATION), int(Limit.CONTACT)
CHUNK_SLACK = 0.2  # rad out of range: up to it a waypoint is pulled in, beyond it the chunk is refused

SLOWER = 0.9  # of the tool speed that a person's nearness allows, the reference aims for

Positive = Annotated[float, Field(gt=0)]
Metres = Annotated[float, Field(ge=0, le=10)]
Seconds = Annotated[float, Field(gt=0, le=60)]
Point = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


class _Clause(Strict):
    clause: Annotated[str, Field(min_length=8)]  # of the standard that the limit serves


class Range(_Clause):
    """Lowest and highest value, one a joint; a measured value may lie ``margin`` beyond before it stops."""

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    margin: Annotated[float, Field(ge=0, le=0.2)]


class Greatest(_Clause):
    """Greatest magnitude, one a joint."""

    max: tuple[Positive, ...]


class Velocity(Greatest):
    """References stay below ``max``; a measured velocity above ``overspeed`` times it stops the robot."""

    overspeed: Annotated[float, Field(ge=1, le=2)]


class Single(_Clause):
    """Greatest magnitude of one quantity."""

    max: Positive


class Box(_Clause):
    """Where the tool may be: x, y, z in m, robot base frame."""

    lower: Point
    upper: Point


class Stops(_Clause):
    """How the robot is stopped."""

    protective: Literal[1, 2]  # category that the protective-stop input asks for
    bound_s: Seconds  # a controlled stop that takes longer becomes category 0


class Ladder(_Clause):
    """Time bounds of the stale ladder."""

    max_age_s: Seconds  # oldest observation that a chunk may rest on
    carry_on_s: Seconds
    ramp_s: Seconds
    hold_s: Seconds
    recover_chunks: Annotated[int, Field(ge=1, le=100)]  # good chunks in a row that end a ramp or a hold
    recover_fallback_chunks: Annotated[int, Field(ge=1, le=100)]


class Separation(_Clause):
    """Speed and separation monitoring: how far a person must be for the speed that the tool has.

    ISO/TS 15066:2016, 5.5.4.2.3, formula (1): S_p = S_h + S_r + S_s + C + Z_d + Z_r, with what the person
    walks until the robot stands, S_h = v_h (T_r + T_s), what the robot travels before it brakes,
    S_r = v_r T_r, and while it brakes, S_s ≤ v_r T_s (an upper bound: braking only slows it down). For an
    account of the terms in public see Marvel and Norcross, Robotics and Computer-Integrated Manufacturing
    44 (2017). v_r is the tool's speed whatever its direction. ISO 13855 gives v_h = 1.6 m/s for a person
    whose speed is not measured. A distance that nobody reports (NaN) is a protective stop, inf a free cell.
    """

    human_speed_m_s: Positive  # v_h
    reaction_s: Seconds  # T_r, from the person's movement to the start of braking: sensor, network, control
    stopping_s: Seconds  # T_s, from the start of braking at full speed to rest
    intrusion_m: Metres  # C, how far a part of the body can reach before it is detected
    sensor_m: Metres  # Z_d, uncertainty of the person's position
    robot_m: Metres  # Z_r, uncertainty of the robot's position


class Region(Strict):
    """A region of the body that the tool may touch, with the values of the standard's tables for it."""

    name: Annotated[str, Field(min_length=1)]
    force_n: Positive  # greatest permissible force of a transient contact
    pressure_n_cm2: Positive  # greatest permissible pressure of a transient contact
    stiffness_n_m: Positive  # effective spring constant k
    mass_kg: Positive  # effective mass m_H


class Contact(_Clause):
    """Power and force limiting: how fast a contact may be that hurts nobody.

    ISO/TS 15066:2016, Annex A.3: a contact at v_rel transfers at most the energy that the body's spring takes
    up at the permissible force, F² / 2k = μ v_rel² / 2, so v_rel = F / √(μ k) with 1/μ = 1/m_H + 1/m_R and
    m_R = M/2 + m_L. F is the lesser of the permissible force and the permissible pressure times the area.
    """

    moving_mass_kg: Positive  # M, of the robot's moving parts
    payload_kg: Annotated[float, Field(ge=0)]  # m_L, tool and workpiece
    area_cm2: Positive  # smallest contact area of tool and workpiece
    regions: Annotated[tuple[Region, ...], Field(min_length=1)]

    @property
    def speed(self) -> float:
        """Greatest tool speed, m/s: that of the most sensitive region."""
        robot = 0.5 * self.moving_mass_kg + self.payload_kg
        return min(
            min(r.force_n, r.pressure_n_cm2 * self.area_cm2)
            / sqrt(r.stiffness_n_m / (1.0 / r.mass_kg + 1.0 / robot))
            for r in self.regions
        )


class SafetyLimits(Strict):
    """One robot's limits: rad, rad/s, rad/s², rad/s³, N·m, m, m/s.

    ``separation`` and ``contact`` are for robots that people come near to; without them they are off. Each
    holds on its own: with both, the lower speed.
    """

    schema_version: Literal[1]
    robot: str
    joints: Annotated[tuple[str, ...], Field(min_length=1, max_length=32)]
    position: Range
    velocity: Velocity
    acceleration: Greatest
    jerk: Greatest
    torque: Greatest
    tracking_error: Single  # rad, any joint
    tool_speed: Single | None  # null: this robot's tool speed is not checked
    workspace: Box | None
    separation: Separation | None = None
    contact: Contact | None = None
    stops: Stops
    ladder: Ladder
    _sha256: str = PrivateAttr("")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        n = len(self.joints)
        for name in ("position.lower", "position.upper", *(f"{f}.max" for f in _PER_JOINT)):
            field, part = name.split(".")
            values = getattr(getattr(self, field), part)
            if len(values) != n:
                raise ValueError(f"{name} has {len(values)} values, but there are {n} joints")
        pairs: list[tuple[str, tuple[float, ...], tuple[float, ...]]] = [
            ("position", self.position.lower, self.position.upper)
        ]
        if self.workspace is not None:
            pairs.append(("workspace", self.workspace.lower, self.workspace.upper))
        for name, lower, upper in pairs:
            for i, (a, b) in enumerate(zip(lower, upper, strict=True)):
                if a >= b:
                    raise ValueError(f"{name}.lower[{i}]={a} must lie below {name}.upper[{i}]={b}")
        for name in ("separation", "contact"):
            if getattr(self, name) is not None and self.tool_speed is None:
                raise ValueError(f"{name} limits the tool's speed: it needs tool_speed, which is null")
        return self

    @classmethod
    def load(cls, path: Path | str) -> SafetyLimits:
        """Read a limits file; ``ConfigError`` names the field, the value and the file."""
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            raise ConfigError(f"{path}: limits cannot be read: {e.strerror}") from None
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, source: str) -> SafetyLimits:
        """``load`` for bytes that came from ``source`` (a name for messages)."""
        try:
            doc = yaml.load(data, Loader=StrictLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ConfigError(f"{source}: not valid YAML: {e}".replace("\n", " ")) from None
        if not isinstance(doc, dict):
            raise ConfigError(f"{source}: limits must be a mapping, found a {type(doc).__name__}")
        try:
            limits = cls.model_validate_json(json.dumps(doc, default=str), strict=True)
        except ValidationError as e:
            raise ConfigError(_explain(e, source)) from None
        limits._sha256 = hashlib.sha256(data).hexdigest()
        return limits

    @property
    def sha256(self) -> str:
        """Hex sha256 of the file (as ``sha256sum`` prints it); of the content if made in code."""
        return self._sha256 or hashlib.sha256(self.to_bytes()).hexdigest()

    def table(self) -> FloatArray:
        """Per joint, rows LOWER … TORQUE: ``[6, joints]``."""
        return np.array(
            [
                self.position.lower,
                self.position.upper,
                self.velocity.max,
                self.acceleration.max,
                self.jerk.max,
                self.torque.max,
            ],
            dtype=np.float64,
        )

    def scalars(self) -> FloatArray:
        """Entries TRACKING … CONTACT_SPEED; infinite, or TO_REST zero, where the robot has no such limit."""
        out = np.full(SCALARS, np.inf)
        out[WORKSPACE_LOWER:WORKSPACE_UPPER] = -np.inf
        out[TRACKING] = self.tracking_error.max
        out[MARGIN] = self.position.margin
        out[OVERSPEED] = self.velocity.overspeed
        if self.tool_speed is not None:
            out[TOOL_SPEED] = self.tool_speed.max
        if self.workspace is not None:
            out[WORKSPACE_LOWER:WORKSPACE_UPPER] = self.workspace.lower
            out[WORKSPACE_UPPER:KEEP_AWAY] = self.workspace.upper
        out[TO_REST] = 0.0
        if (s := self.separation) is not None:
            out[TO_REST] = s.reaction_s + s.stopping_s
            out[KEEP_AWAY] = s.human_speed_m_s * out[TO_REST] + s.intrusion_m + s.sensor_m + s.robot_m
        if self.contact is not None:
            out[CONTACT_SPEED] = self.contact.speed
        return out

    def times(self) -> npt.NDArray[np.int64]:
        """Entries CARRY_NS … PROTECTIVE of the ladder and the stops."""
        lad = self.ladder
        seconds = (lad.carry_on_s, lad.ramp_s, lad.hold_s, self.stops.bound_s, lad.max_age_s)
        protective = CATEGORY_1 if self.stops.protective == 1 else CATEGORY_2
        return np.array(
            [
                *(round(s * 1e9) for s in seconds),
                lad.recover_chunks,
                lad.recover_fallback_chunks,
                protective,
            ],
            dtype=np.int64,
        )


_PER_JOINT = ("velocity", "acceleration", "jerk", "torque")


def _explain(e: ValidationError, source: str) -> str:
    first = e.errors()[0]
    key = ".".join(str(p) for p in first["loc"]) or "limits"
    given: Any = first["input"]
    shown = "" if isinstance(given, dict) else f" = {given!r}"
    return f"{source}: {key}{shown}: {first['msg'][0].lower()}{first['msg'][1:]}"


# ── compiled checks ───────────────────────────────────────────────────────────────────────────────────


@compiled
def check_state(
    q: FloatArray, dq: FloatArray, bias: FloatArray, mass: FloatArray, table: FloatArray, scalars: FloatArray
) -> int:
    """Limits that the measured joints break; 0 if none, NOT_FINITE alone if any value is not finite."""
    n = q.size
    for i in range(n):
        if not (np.isfinite(q[i]) and np.isfinite(dq[i]) and np.isfinite(bias[i])):
            return _NOT_FINITE
        for k in range(n):
            if not np.isfinite(mass[i, k]):
                return _NOT_FINITE
    flags = 0
    for i in range(n):
        if q[i] < table[LOWER, i] - scalars[MARGIN] or q[i] > table[UPPER, i] + scalars[MARGIN]:
            flags |= _POSITION
        if abs(dq[i]) > table[VELOCITY, i] * scalars[OVERSPEED]:
            flags |= _VELOCITY
    return flags


@compiled
def check_tool(tool: FloatArray, scalars: FloatArray) -> int:
    """Limits that the tool breaks: ``tool`` is x, y, z (m) and speed (m/s); NaN where not reported."""
    flags = 0
    if tool[3] > scalars[TOOL_SPEED]:
        flags |= _TOOL
    for i in range(3):
        if tool[i] < scalars[WORKSPACE_LOWER + i] or tool[i] > scalars[WORKSPACE_UPPER + i]:
            flags |= _WORKSPACE
    return flags


@compiled
def speed_allowed(human_m: float, scalars: FloatArray) -> float:
    """Greatest tool speed that a person at ``human_m`` allows, m/s; inf without such a limit.

    The distance that separation needs is KEEP_AWAY + v TO_REST, so v = (human_m - KEEP_AWAY) / TO_REST; zero
    for a person too near, or a distance that is not known (NaN).
    """
    allowed = scalars[CONTACT_SPEED]
    if scalars[TO_REST] > 0.0:
        apart = (human_m - scalars[KEEP_AWAY]) / scalars[TO_REST]
        if not apart > 0.0:
            return 0.0
        allowed = min(allowed, apart)
    return float(allowed)


@compiled
def speed_scale(allowed: float, scalars: FloatArray) -> float:
    """What part of their speed the joints keep so that the tool stays below ``allowed``: 0 … 1.

    Joints at full speed move the tool at TOOL_SPEED at most, and in proportion.
    """
    if allowed < scalars[TOOL_SPEED]:
        return float(SLOWER * max(allowed, 0.0) / scalars[TOOL_SPEED])
    return 1.0


@compiled
def check_speed(tool: FloatArray, human_m: float, scalars: FloatArray) -> int:
    """Limits for the sake of people that the tool's speed breaks.

    A speed that is not reported (NaN) counts as TOOL_SPEED, a distance that is not known as too near.
    """
    speed = tool[3]
    if np.isnan(speed):
        speed = scalars[TOOL_SPEED]
    flags = 0
    if speed > scalars[CONTACT_SPEED]:
        flags |= _CONTACT
    if scalars[TO_REST] > 0.0 and not human_m >= scalars[KEEP_AWAY] + speed * scalars[TO_REST]:
        flags |= _SEPARATION
    return flags


@compiled
def check_tracking(q: FloatArray, q_ref: FloatArray, scalars: FloatArray) -> int:
    """Tracking error beyond its limit on any joint."""
    for i in range(q.size):
        if not abs(q_ref[i] - q[i]) <= scalars[TRACKING]:
            return _TRACKING
    return 0


@compiled
def stop_category(flags: int, protective: int) -> int:
    """How severely broken limits stop the robot: the most severe of them decides.

    Without finite measurements no motion can be controlled, so power goes at once (category 0); a broken
    limit is a controlled stop and then power goes (1); ``protective`` is what the stop input asks for.
    """
    if flags & _NOT_FINITE:
        return CATEGORY_0
    if flags & (_POSITION | _VELOCITY | _TOOL | _WORKSPACE | _TRACKING):
        return CATEGORY_1
    if flags & (_PROTECTIVE | _SEPARATION | _CONTACT):
        return protective
    return NO_STOP


@compiled
def clamp_torque(tau: FloatArray, table: FloatArray) -> int:
    """Bring torques within their limits in place; a torque that is not finite becomes zero."""
    flags = 0
    for i in range(tau.size):
        most = table[TORQUE, i]
        if not np.isfinite(tau[i]):
            tau[i] = 0.0
            flags |= _NOT_FINITE
        elif tau[i] > most:
            tau[i] = most
            flags |= _TORQUE
        elif tau[i] < -most:
            tau[i] = -most
            flags |= _TORQUE
    return flags


@compiled
def admit_waypoints(q: FloatArray, tool: FloatArray, steps: int, table: FloatArray) -> int:
    """Look over the waypoints ``q [≥ steps, n]`` and ``tool [≥ steps]`` of a chunk, in place.

    Returns the limits that acted: 0, or POSITION if waypoints were pulled into range; negative if the chunk
    is refused: ``-NOT_FINITE``, or ``-POSITION`` for a waypoint more than ``CHUNK_SLACK`` out of range.
    """
    flags = 0
    for k in range(steps):
        if not np.isfinite(tool[k]):
            return -_NOT_FINITE
        tool[k] = min(max(tool[k], 0.0), 1.0)
        for i in range(q.shape[1]):
            if not np.isfinite(q[k, i]):
                return -_NOT_FINITE
            low = table[LOWER, i]
            high = table[UPPER, i]
            if q[k, i] < low - CHUNK_SLACK or q[k, i] > high + CHUNK_SLACK:
                return -_POSITION
            if q[k, i] < low:
                q[k, i] = low
                flags |= _POSITION
            elif q[k, i] > high:
                q[k, i] = high
                flags |= _POSITION
    return flags
