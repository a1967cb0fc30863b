"""Made-up attempts at the pick-and-place task that fail in a named way, sealed as sound episodes.

A kinematic stand-in for the twin: the tool goes from waypoint to waypoint, the cup takes what it sucks on,
and the wrist camera sees a box where the box is. Good enough for labels and selection, made in milliseconds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from flywheel import schema
from flywheel.episode import read_manifest, seal
from flywheel.schema import Limit, Mode, Outcome, Trigger, TriggerKind
from tests.samples import ACTION, CAMERAS, CHUNK, DIGEST, JOINTS, STATE, draft, events_table, vectors

CONTROL_HZ = 200.0  # enough ticks to tell a story
POLICY_NS = 100_000_000
TICKS = round(CONTROL_HZ * POLICY_NS / 1e9)
HOME = np.array([0.42, -0.02, 0.30])
BIN = np.array([0.15, 0.42, 0.16])
UP = np.array([0.0, 0.0, 0.12])
TURNS = np.array(
    [[1.5, 0.5, 0.8, -1.0, 0.2], [0.4, 1.6, -0.9, 0.3, 1.0], [-0.6, 0.7, 1.4, 1.1, -0.5]]
)  # rad/m

Array = NDArray[Any]
Leg = tuple[Array, float, int]  # where to, suction, frames


@dataclass(frozen=True)
class Scene:
    """Where the boxes lie (centre of the upper face) and which one is asked for."""

    target: Array
    other: Array
    task: str
    shade: float


def scene(seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    angle, radius = rng.uniform(-0.7, 0.4), rng.uniform(0.35, 0.55)
    target = np.array([radius * np.cos(angle), radius * np.sin(angle), 0.042])
    other = target + np.array([-0.06, 0.12, 0.0])
    colour = ("red", "green", "blue")[seed % 3]
    return Scene(
        target, other, f"pick the {colour} box and place it in the bin", float(rng.uniform(0.4, 1.0))
    )


def pick(at: Array, hold: int = 4) -> list[Leg]:
    """Over it, down, suck, up again."""
    return [(at + UP, 0.0, 6), (at, 1.0, 5), (at, 1.0, hold), (at + UP, 1.0, 4)]


def place() -> list[Leg]:
    return [(BIN, 1.0, 8), (BIN, 0.0, 3)]


def _story(kind: str, s: Scene) -> tuple[list[Leg], list[Leg], Outcome, TriggerKind]:
    """The policy's legs, the operator's, how the attempt ended and what fired."""
    whole = [*pick(s.target), *place()]
    timeout, late = Outcome.TIMEOUT, TriggerKind.TASK_TIMEOUT
    aside = s.target + np.array([0.025, 0.015, 0.0])
    stories: dict[str, tuple[list[Leg], list[Leg], Outcome, TriggerKind]] = {
        "success": (whole, [], Outcome.SUCCESS, TriggerKind.BASELINE),
        "never_reached": ([(HOME + np.array([-0.1, 0.2, -0.05]), 0.0, 12)], whole, timeout, late),
        "missed_grasp": ([(aside + UP, 0.0, 6), (aside, 1.0, 5), (aside, 1.0, 6)], whole, timeout, late),
        "wrong_object": (
            pick(s.other),
            [(s.other, 1.0, 4), (s.other, 0.0, 2), *whole],
            Outcome.WRONG_OBJECT,
            TriggerKind.WRONG_OBJECT,
        ),
        "dropped": (
            [*pick(s.target), (s.target + UP, 0.0, 2)],
            whole,
            Outcome.DROPPED,
            TriggerKind.DROPPED_OBJECT,
        ),
        "timed_out_carrying": ([*pick(s.target), (s.target + UP, 1.0, 8)], place(), timeout, late),
        "safety_stop": ([(s.target + UP, 0.0, 8)], [], Outcome.STOPPED, TriggerKind.SAFETY_STOP),
        "tracking": ([(s.target + UP, 0.0, 12)], [], timeout, TriggerKind.TRACKING_ERROR),
    }
    return stories[kind]


KINDS = (
    "never_reached",
    "missed_grasp",
    "wrong_object",
    "dropped",
    "timed_out_carrying",
    "safety_stop",
    "tracking",
)
CORRECTED = KINDS[:5]  # those in which an operator can take over


def attempt(parent: Path, kind: str, seed: int = 0, corrected: bool = True, **fields: Any) -> Path:
    """Seal an attempt that fails by ``kind`` (or ``success``) in the scene of ``seed``; its directory.

    ``fields`` override the manifest's; ``edit`` is called with the columns of the frames table first,
    ``edit_control`` with those of the control table; ``events`` (t_ns, kind, name) happened besides.
    """
    edit: Callable[[dict[str, Any]], None] = fields.pop("edit", lambda columns: None)
    edit_control: Callable[[dict[str, Any]], None] = fields.pop("edit_control", lambda columns: None)
    events: tuple[tuple[int, str, str], ...] = fields.pop("events", ())
    s = scene(seed)
    policy, operator, ended, trigger = _story(kind, s)
    operator = operator if corrected else []
    rng = np.random.default_rng([seed, 1])
    tips, suction = _path(
        HOME + rng.normal(0, 0.01, 3), [*policy, *operator, (BIN if operator else HOME, 0.0, 1)]
    )
    n = len(tips) - 1
    switch = sum(leg[2] for leg in policy)
    held_by_tick, held = _held(tips, suction, s)
    mine = np.arange(n) >= switch if operator else np.zeros(n, bool)
    state = np.column_stack([tips[:n], held[:n], suction[:n]])
    action = np.column_stack([tips[1 : n + 1], suction[1 : n + 1]])
    t = np.arange(n) * POLICY_NS
    columns: dict[str, Any] = {
        "t_ns": t,
        "image.wrist": [_wrist(tips[i], s, 64) for i in range(n)],
        "image.scene": [_wrist(HOME, s, 16)] * n,
        "state": state,
        "instruction": [s.task] * n,
        "action": action,
        "chunk": np.where(mine[:, None], 0.0, np.tile(action, CHUNK)),
        "infer_ns": np.zeros(n, np.int64),
        "intervention": mine,
        "policy_digest": [DIGEST] * n,
    }
    edit(columns)
    for name in ("state", "action", "chunk"):
        columns[name] = vectors(np.asarray(columns[name]))
    frames = pa.table(columns, schema=schema.frames_schema(CAMERAS, STATE, CHUNK, ACTION))
    control = _control(kind, n, switch if operator else n, held_by_tick, suction, tips, edit_control)
    failed = min(switch, n - 1) * POLICY_NS
    triggers = [Trigger(kind=trigger, t_ns=failed)]
    if operator:
        triggers.append(Trigger(kind=TriggerKind.INTERVENTION, t_ns=failed))
    values: dict[str, Any] = {
        "task": s.task,
        "control_hz": CONTROL_HZ,
        "outcome": ended,
        "operator_outcome": Outcome.SUCCESS if operator else None,
        "triggers": tuple(triggers),
    }
    m = draft(seconds=n / 10, seed=seed, **{**values, **fields})
    happened = sorted([*events, (failed, "trigger", trigger.value)])
    sealed = seal(parent, m, control, frames, events_table(*happened))
    return parent / sealed.episode_id


def reissue(directory: Path, parent: Path, **fields: Any) -> Path:
    """The same files under a manifest with other ``fields``."""
    m = read_manifest(directory).model_copy(update=fields)
    other = Path(shutil.copytree(directory, parent / m.episode_id))
    (other / schema.MANIFEST_FILE).write_bytes(m.to_bytes())
    return other


def truncate(directory: Path, name: str = schema.FRAMES_FILE) -> None:
    """Cut a file short, as a broken copy would."""
    path = directory / name
    path.write_bytes(path.read_bytes()[:-100])


def flip(directory: Path, name: str = schema.FRAMES_FILE) -> None:
    """Change one bit of a file; its length stays."""
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / name).write_bytes(data)


def copy(directory: Path, name: str) -> Path:
    """The same episode under another directory's name."""
    return Path(shutil.copytree(directory, directory.parent / name))


def _path(start: Array, legs: list[Leg]) -> tuple[Array, Array]:
    tips, suction = [start], [legs[0][1]]
    for goal, suck, frames in legs:
        a = tips[-1]
        tips += [a + (goal - a) * (i + 1) / frames for i in range(frames)]
        suction += [suck] * frames
    return np.array(tips), np.array(suction)


def _held(tips: Array, suction: Array, s: Scene) -> tuple[Array, Array]:
    held = np.zeros(len(tips))
    for i in range(1, len(tips)):
        at_box = min(np.linalg.norm(tips[i] - s.target), np.linalg.norm(tips[i] - s.other)) < 0.01
        held[i] = suction[i] > 0.5 and (held[i - 1] > 0 or at_box)
    return np.repeat(held, TICKS), held


def _control(
    kind: str,
    n: int,
    switch: int,
    held: Array,
    suction: Array,
    tips: Array,
    edit: Callable[[dict[str, Any]], None],
) -> pa.Table:
    rows = n * TICKS
    ticks = np.arange(rows)
    # Joints that move when the tool does, at speeds that are the derivative of where they are.
    cartesian = np.column_stack([np.interp(ticks / TICKS, np.arange(n), x[:n]) for x in tips.T])
    q = cartesian @ TURNS
    noise = np.random.default_rng(rows).normal(0, 1e-3, q.shape)
    dq = np.gradient(q, 1 / CONTROL_HZ, axis=0) + noise
    q_ref, mode, limits = q + 1e-3, np.zeros(rows, np.uint8), np.zeros(rows, np.uint32)
    late = slice(round(0.7 * switch * TICKS), switch * TICKS)
    if kind == "tracking":
        q_ref[late] += 0.3
    if kind == "safety_stop":
        mode[late] = Mode.STOP_1
        limits[late] = Limit.PROTECTIVE_STOP | Limit.WORKSPACE
    columns = {
        "t_ns": ticks * (POLICY_NS // TICKS),
        "late_ns": np.zeros(rows, np.int64),
        "compute_ns": np.zeros(rows, np.int64),
        "mode": mode,
        "q": vectors(q),
        "dq": vectors(dq),
        "q_ref": vectors(q_ref),
        "tau": vectors(np.zeros_like(q)),
        "tool_cmd": np.repeat(suction, TICKS)[:rows].astype(np.float32),
        "held": held[:rows].astype(np.uint8),
        "chunk_id": ticks // TICKS,
        "chunk_age_ns": (ticks % TICKS) * (POLICY_NS // TICKS),
        "limits": limits,
    }
    edit(columns)
    return pa.table(columns, schema=schema.control_schema(JOINTS))


def _wrist(tip: Array, s: Scene, side: int) -> bytes:
    """A table with two boxes, as seen from above the tool."""
    scale = 0.35 * side / (tip[2] + 0.06)
    place = tip[:2, None] + (np.arange(side) - side / 2) / scale  # of columns and rows on the table, m
    stripes = np.sin(30 * place[0])[None, :] * np.sin(30 * place[1])[:, None]
    image = np.repeat(((140 + 25 * stripes) * s.shade)[:, :, None], 3, axis=2)
    for box, colour in ((s.other, (40, 90, 200)), (s.target, (200, 40, 40))):
        u, v = (side / 2 + (box[:2] - tip[:2]) * scale).round().astype(int)
        r = max(2, round(0.02 * scale))
        image[max(0, v - r) : max(0, v + r), max(0, u - r) : max(0, u + r)] = np.array(colour) * s.shade
    grain = np.random.default_rng(np.abs(tip * 1e9).astype(np.int64)).normal(0, 4, image.shape)
    return bytes(simplejpeg.encode_jpeg(np.clip(image + grain, 0, 255).astype(np.uint8), quality=90))
