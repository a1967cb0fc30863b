"""Any lerobot ``Robot`` as a device: those that lerobot ships, and ``lerobot_robot_*`` plugins.

lerobot is imported by name, in the device's own process, once a robot of it is asked for: this package and
System 1's process never load it, and a robot without lerobot installed runs everything else. (The contract on
imports looks at import statements; that the process stays free of it is tested.)

A plugin is a distribution named ``lerobot_robot_<name>``, as lerobot's own discovery has it; importing it
registers its configuration class. lerobot imports every such distribution that it finds, which runs whatever
happens to be installed. Here only the one that is named is imported.

lerobot's robots speak in units of their own (degrees, or -100 … 100) about keys such as ``elbow.pos``; each
joint says how they become rad. Velocities are differences: lerobot reports none. There is no protective stop
in lerobot: ``stop`` disconnects, which removes torque where the robot's configuration says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import time
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from flywheel.edge.safety import SafetyLimits
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray, JointState
from flywheel.robot.remote import RemoteRobot
from flywheel.schema import Strict

PLUGIN = "lerobot_robot_"


class JointMap(Strict):
    """q = rad_per_unit · value + offset_rad, for the value under ``key`` of observations and actions."""

    key: str
    rad_per_unit: float
    offset_rad: float = 0.0


class ToolMap(Strict):
    """The tool's 0..1 between two values of a key."""

    key: str
    zero: float
    one: float


class LeRobotArgs(Strict):
    """``args`` of ``Plan`` for a lerobot robot.

    ``type`` is its name in lerobot (``so101_follower``, or what a plugin registers), ``config`` the fields of
    its configuration class, ``plugin`` the distribution to import first ("" for one that lerobot ships),
    ``joints`` in the order of the limits file, whose path is ``limits``.
    """

    type: str
    config: dict[str, Any] = Field(default_factory=dict)
    plugin: str = ""
    joints: Annotated[tuple[JointMap, ...], Field(min_length=1)]
    tool: ToolMap | None = None
    limits: str
    rate_hz: Annotated[float, Field(ge=10, le=1000)] = 100.0


class LeRobotDevice:
    """A connected lerobot robot. Raises ``ConfigError`` if its keys are not those of ``args``."""

    def __init__(self, robot: Any, args: LeRobotArgs) -> None:
        self._robot, self._args = robot, args
        keys = {j.key for j in args.joints} | ({args.tool.key} if args.tool else set())
        for what in ("observation_features", "action_features"):
            if missing := sorted(keys - set(getattr(robot, what))):
                raise ConfigError(
                    f"joints: {args.type} has no {missing[0]!r} in its {what}; it has "
                    f"{', '.join(sorted(getattr(robot, what)))}"
                )
        self._scale = np.array([j.rad_per_unit for j in args.joints])
        self._offset = np.array([j.offset_rad for j in args.joints])
        self._q: FloatArray | None = None
        self._seen_at = 0.0
        self._tool = 0.0

    def connect(self) -> None:
        """Connect; a robot that would have to be calibrated by hand first is refused."""
        self._robot.connect(calibrate=False)
        if not self._robot.is_calibrated:
            self._robot.disconnect()
            raise ConfigError(f"{self._args.type} is not calibrated: run lerobot-calibrate once, then start")

    def exchange(self, q_ref: FloatArray | None, tool: float, out: JointState) -> None:
        """``send_action``, then ``get_observation``; after a stop the last state stays."""
        if not self._robot.is_connected:
            return
        a = self._args
        if q_ref is not None:
            values = (q_ref - self._offset) / self._scale
            action = {j.key: float(v) for j, v in zip(a.joints, values, strict=True)}
            if a.tool is not None:
                action[a.tool.key] = a.tool.zero + tool * (a.tool.one - a.tool.zero)
            self._robot.send_action(action)
        seen = self._robot.get_observation()
        now = time.monotonic()
        q = self._scale * np.array([float(seen[j.key]) for j in a.joints]) + self._offset
        if self._q is not None:
            out.dq[:] = (q - self._q) / max(now - self._seen_at, 1e-6)
        out.q[:] = q
        if a.tool is not None:
            out.held = (float(seen[a.tool.key]) - a.tool.zero) / (a.tool.one - a.tool.zero)
        self._q, self._seen_at = q, now

    def stop(self) -> None:
        """Disconnect."""
        if self._robot.is_connected:
            self._robot.disconnect()

    def power_on(self) -> None:
        """Connect again: lerobot has no other way to give a robot its torque back."""
        if not self._robot.is_connected:
            self._q = None  # the speed since the last look is no speed
            self.connect()

    def close(self) -> None:
        """Disconnect, if that has not been done."""
        self.stop()


def device(args: dict[str, Any]) -> LeRobotDevice:
    """For ``RemoteRobot``: imports lerobot, and the plugin if one is named."""
    parsed = _parse(args)
    try:
        robots = importlib.import_module("lerobot.robots")
    except ImportError as e:
        raise ConfigError(f"type = {parsed.type!r} needs lerobot, which cannot be imported: {e}") from None
    if parsed.plugin:
        _import_plugin(parsed.plugin)
    config = _configure(robots, parsed)
    return LeRobotDevice(robots.make_robot_from_config(config), parsed)


def wall_robot(args: dict[str, Any], world: memoryview) -> RemoteRobot:
    """For ``Plan.robot``; ``args`` are those of ``LeRobotArgs``."""
    parsed = _parse(args)
    limits = SafetyLimits.load(parsed.limits)
    if len(parsed.joints) != len(limits.joints):
        raise ConfigError(
            f"joints: {len(parsed.joints)} are mapped, {parsed.limits} has limits for {len(limits.joints)}"
        )
    return RemoteRobot(parsed.type, "flywheel.robot.lerobot:device", args, limits, parsed.rate_hz)


def plugins() -> tuple[str, ...]:
    """Names of the installed plugins; nothing of them is imported."""
    names = (d.metadata["Name"] or "" for d in importlib.metadata.distributions())
    return tuple(sorted({n for n in names if n.startswith(PLUGIN)}))


def _parse(args: dict[str, Any]) -> LeRobotArgs:
    import json

    try:
        return LeRobotArgs.model_validate_json(json.dumps(args))
    except ValidationError as e:
        first = e.errors()[0]
        raise ConfigError(f"lerobot: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _import_plugin(name: str) -> None:
    if name not in plugins():
        raise ConfigError(
            f"plugin = {name!r}: no such distribution; installed: {', '.join(plugins()) or 'none'} (its name "
            f"must begin with {PLUGIN!r}, with underscores)"
        )
    importlib.import_module(name)


def _configure(robots: Any, args: LeRobotArgs) -> Any:
    """The configuration object; imports lerobot's own robots one by one until one of them knows the type."""
    base = robots.RobotConfig
    for found in pkgutil.iter_modules(robots.__path__):
        if args.type in base.get_known_choices():
            break
        if found.ispkg:
            try:
                importlib.import_module(f"{robots.__name__}.{found.name}")
            except ImportError:
                continue  # needs a vendor's library that is not installed: then it is not this one
    known = base.get_known_choices()
    if args.type not in known:
        raise ConfigError(f"type = {args.type!r}: lerobot knows {', '.join(sorted(known))}")
    draccus: Any = importlib.import_module("draccus")
    try:
        return draccus.decode(base, {"type": args.type, **args.config})
    except (TypeError, ValueError, draccus.utils.DecodingError) as e:
        raise ConfigError(f"config of {args.type}: {e}") from None
