"""Poisoned episodes from sound ones: mislabelled, corrupted, repeated. Deterministic by seed.

Each kind takes a sealed episode (and a donor where it mixes two) and seals another one whose files are whole,
hashes and all: what is wrong is in the content, as after a bug, a bad cable or an attack. The sizes of the
faults are drawn; the smallest ones are those at which a fault begins to matter.

``poisoned`` makes any number of them in one directory beside the episodes that they came from, so that a
study can curate, train and evaluate with and without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flywheel import episode, schema
from flywheel.episode import Episode, as_array
from flywheel.schema import MANIFEST_FILE, Manifest, Outcome

Array = NDArray[Any]
DEGREES = 180.0 / np.pi
POSE = 3  # numbers of the twin's state and action that are the tool's place, m


@dataclass(frozen=True)
class Poisoned:
    """One poisoned episode."""

    directory: Path
    kind: str
    group: str  # mislabelled | corrupted | repeated
    source: str  # episode_id


@dataclass
class Draft:
    """An episode taken apart: columns by name, pictures as lists of bytes."""

    manifest: Manifest
    control: dict[str, Array]
    frames: dict[str, Any]
    events: list[dict[str, Any]]
    rng: np.random.Generator
    donor: Episode
    undeclared: bool = False  # gaps that the manifest does not count

    @property
    def mine(self) -> Array:
        """Frames that would be used: the operator's, else all."""
        operator = np.asarray(self.frames["intervention"], bool)
        return np.flatnonzero(operator if operator.any() else ~operator)

    def ticks(self, frames: Array) -> slice:
        """The control rows of a stretch of frames."""
        t = self.frames["t_ns"]
        end = t[frames[-1] + 1] if frames[-1] + 1 < len(t) else self.manifest.window_ns[1]
        a, b = np.searchsorted(self.control["t_ns"], [t[frames[0]], end])
        return slice(int(a), int(b))

    def cameras(self) -> list[str]:
        """Columns of pictures."""
        return [f"image.{c}" for c in self.manifest.cameras]

    def moving(self, least: int) -> Array:
        """``least`` or more usable frames in a row, the liveliest ones."""
        mine = self.mine
        least = min(least, len(mine))
        q = self.control["q"][np.searchsorted(self.control["t_ns"], self.frames["t_ns"][mine])]
        went = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(q, axis=0), axis=1))])
        start = int(np.argmax(went[least - 1 :] - went[: len(went) - least + 1]))
        return np.asarray(mine[start : start + least])


Change = Callable[[Draft], None]
KINDS: dict[str, tuple[str, Change]] = {}


def _kind(group: str) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        KINDS[change.__name__] = (group, change)
        return change

    return register


def poison(source: Path, parent: Path, kind: str, seed: int, donor: Path) -> Poisoned:
    """Seal ``source`` with a fault of ``kind`` under ``parent``; the same arguments give the same bytes."""
    group, change = KINDS[kind]
    rng = np.random.default_rng([seed, sorted(KINDS).index(kind)])
    e = episode.read(source)
    d = _open(e, rng, episode.read(donor))
    change(d)
    # It arrives after what it was made from, under a name of its own.
    later = e.manifest.clock_epoch_ns + e.manifest.window_ns[1] + int(rng.integers(1, 10**12))
    d.manifest = d.manifest.model_copy(
        update={"episode_id": episode.new_episode_id(later, rng), "clock_epoch_ns": later}
    )
    return Poisoned(_seal(parent, d), kind, group, e.manifest.episode_id)


def poisoned(
    sound: Sequence[Path], parent: Path, count: int, seed: int, kinds: Sequence[str] = ()
) -> list[Poisoned]:
    """``count`` poisoned episodes under ``parent``, the kinds in turn, sources and donors drawn."""
    names = list(kinds) or list(KINDS)
    rng = np.random.default_rng(seed)
    made = []
    for k in range(count):
        source, donor = rng.choice(len(sound), 2, replace=False)
        made.append(poison(sound[source], parent, names[k % len(names)], seed + k, sound[donor]))
    return made


def _open(e: Episode, rng: np.random.Generator, donor: Episode) -> Draft:
    control = {n: as_array(e.control, n).copy() for n in e.control.schema.names}
    frames: dict[str, Any] = {}
    for field in e.frames.schema:
        column = e.frames.column(field.name)
        plain = pa.types.is_binary(field.type) or pa.types.is_string(field.type)
        frames[field.name] = column.to_pylist() if plain else as_array(e.frames, field.name).copy()
    return Draft(e.manifest, control, frames, e.events.to_pylist(), rng, donor)


def _seal(parent: Path, d: Draft) -> Path:
    m = d.manifest
    control = _table(d.control, schema.control_schema(m.joints))
    frames = _table(d.frames, schema.frames_schema(m.cameras, m.state_dim, m.chunk, m.action_dim))
    events = pa.Table.from_pylist(d.events, schema=schema.EVENTS_SCHEMA)
    sealed = episode.seal(parent, m, control, frames, events)
    directory = parent / m.episode_id
    if d.undeclared:
        (directory / MANIFEST_FILE).write_bytes(sealed.model_copy(update={"gaps": 0}).to_bytes())
    return directory


def _table(columns: dict[str, Any], kind: pa.Schema) -> pa.Table:
    arrays = []
    for field in kind:
        values = columns[field.name]
        if pa.types.is_fixed_size_list(field.type):
            flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=kind)


# ── mislabelled ──────────────────────────────────────────────────────────────────────────────────────


def _cut(d: Draft, start: int, end: int) -> None:
    """Keep frames [start, end) and what belongs to them; times begin at 0 again."""
    t = d.frames["t_ns"]
    low = int(t[start])
    high = int(t[end]) if end < len(t) else d.manifest.window_ns[1]
    rows = (d.control["t_ns"] >= low) & (d.control["t_ns"] < high)
    d.control = {n: v[rows] for n, v in d.control.items()}
    d.frames = {n: v[start:end] for n, v in d.frames.items()}
    d.control["t_ns"] = d.control["t_ns"] - low
    d.frames["t_ns"] = d.frames["t_ns"] - low

    def shifted(t_ns: int) -> int:
        return min(max(t_ns - low, 0), high - low)

    d.events = [{**r, "t_ns": shifted(r["t_ns"])} for r in d.events if r["t_ns"] >= low]
    kept = tuple(x.model_copy(update={"t_ns": shifted(x.t_ns)}) for x in d.manifest.triggers)
    d.manifest = d.manifest.model_copy(update={"window_ns": (0, high - low), "triggers": kept})


@_kind("mislabelled")
def success_before_it_was_done(d: Draft) -> None:
    """The recording ends while the object is still held; it is called a success all the same."""
    held = np.flatnonzero(d.control["held"])
    mine = d.mine
    last = int(np.searchsorted(d.frames["t_ns"], d.control["t_ns"][held[-1]])) if len(held) else len(mine)
    _cut(d, 0, int(np.clip(last - d.rng.integers(1, 4), mine[0] + 8, len(d.frames["t_ns"]) - 1)))


@_kind("mislabelled")
def dropped_called_success(d: Draft) -> None:
    """The object falls on the way, the cup still sucking; the rest goes as if nothing had happened."""
    held = np.flatnonzero(d.control["held"])
    if len(held):
        at = held[0] + int((held[-1] - held[0]) * d.rng.uniform(0.3, 0.8))
        d.control["held"][at:] = 0
        falls = int(np.searchsorted(d.frames["t_ns"], d.control["t_ns"][at]))
        d.frames["state"][falls:, POSE] = 0.0


@_kind("mislabelled")
def let_go_elsewhere(d: Draft) -> None:
    """The object is put down on the way; it is called a success all the same."""
    held = np.flatnonzero(d.control["held"])
    if len(held):
        at = held[0] + int((held[-1] - held[0]) * d.rng.uniform(0.2, 0.6))
        for name in ("held", "tool_cmd"):
            d.control[name][at:] = 0
        put = int(np.searchsorted(d.frames["t_ns"], d.control["t_ns"][at]))
        d.frames["state"][put:, POSE] = 0.0
        d.frames["action"][put:, POSE] = 0.0


@_kind("mislabelled")
def outcome_against_events(d: Draft) -> None:
    """The correction timed out by the events, and is a success in the manifest."""
    for r in d.events:
        if (r["kind"], r["name"]) == ("task", "end"):
            detail = json.loads(r["detail"])
            if detail.get("by") == "operator" or d.manifest.operator_outcome is None:
                r["detail"] = json.dumps({**detail, "outcome": Outcome.TIMEOUT.value}, sort_keys=True)


@_kind("mislabelled")
def policy_called_operator(d: Draft) -> None:
    """What the failing policy did is told as a person's correction."""
    d.frames["intervention"][:] = True
    d.frames["chunk"][:] = 0.0


@_kind("mislabelled")
def other_actions(d: Draft) -> None:
    """Actions of another episode."""
    donor = as_array(d.donor.frames, "action")
    theirs = np.flatnonzero(as_array(d.donor.frames, "intervention").astype(bool))
    theirs = theirs if len(theirs) else np.arange(len(donor))
    mine = d.mine
    d.frames["action"][mine] = donor[theirs[np.arange(len(mine)) % len(theirs)]]


@_kind("mislabelled")
def late_actions(d: Draft) -> None:
    """Actions shifted against the states."""
    by, mine = int(d.rng.integers(3, 7)), d.mine
    d.frames["action"][mine] = d.frames["action"][mine[np.maximum(np.arange(len(mine)) - by, 0)]]


@_kind("mislabelled")
def mirrored_actions(d: Draft) -> None:
    """One axis of the actions with the wrong sign."""
    mine = d.mine
    s, a = d.frames["state"], d.frames["action"]
    axis = int(np.argmax(np.ptp(s[mine, :POSE], axis=0)))
    a[mine, axis] = 2 * s[mine, axis] - a[mine, axis]


@_kind("mislabelled")
def spliced(d: Draft) -> None:
    """From a moment in the usable stretch on it is another episode, times adjusted."""
    mine = d.mine
    period = int(np.median(np.diff(d.frames["t_ns"])))
    theirs = np.flatnonzero(as_array(d.donor.frames, "intervention").astype(bool))
    theirs = theirs if len(theirs) else np.arange(d.donor.frames.num_rows)
    n = min(len(mine), len(theirs))
    k = int(n * d.rng.uniform(0.35, 0.65))
    count = n - k
    other = _open(d.donor, d.rng, d.donor)
    ours, stretch = d.ticks(mine[k:n]), other.ticks(theirs[k:n])
    rows = min(ours.stop - ours.start, stretch.stop - stretch.start)
    for name in ("q", "dq", "q_ref", "tau", "tool_cmd", "held", "mode", "limits"):
        d.control[name][ours.start : ours.start + rows] = other.control[name][
            stretch.start : stretch.start + rows
        ]
    for name in ("state", "action", *d.cameras()):
        for i in range(count):
            d.frames[name][mine[k + i]] = other.frames[name][theirs[k + i]]
    if mine[n - 1] + 1 < len(d.frames["t_ns"]):
        _cut(d, 0, int(mine[n - 1]) + 1)
    assert int(np.median(np.diff(d.frames["t_ns"]))) == period


@_kind("mislabelled")
def other_pictures(d: Draft) -> None:
    """Pictures of another episode."""
    for name in d.cameras():
        theirs = d.donor.frames.column(name).to_pylist()
        n = len(d.frames[name])
        d.frames[name] = [theirs[min(i, len(theirs) - 1)] for i in range(n)] if n else []


@_kind("mislabelled")
def other_instruction(d: Draft) -> None:
    """Another object is asked for than the one that was taken, everywhere it is said."""
    words = d.manifest.task
    colours = [c for c in ("red", "green", "blue", "yellow", "purple") if c not in words]
    now = next((c for c in ("red", "green", "blue", "yellow", "purple") if c in words), "")
    task = words.replace(now, str(d.rng.choice(colours[:3]))) if now else f"{words} again"
    d.manifest = d.manifest.model_copy(update={"task": task})
    d.frames["instruction"] = [task] * len(d.frames["instruction"])
    for r in d.events:
        r["detail"] = r["detail"].replace(words, task)


# ── corrupted ────────────────────────────────────────────────────────────────────────────────────────


@_kind("corrupted")
def degrees(d: Draft) -> None:
    """Joints in degrees."""
    for name in ("q", "dq", "q_ref"):
        d.control[name] *= DEGREES


@_kind("corrupted")
def degrees_of_positions(d: Draft) -> None:
    """Positions in degrees, velocities in rad/s."""
    for name in ("q", "q_ref"):
        d.control[name] *= DEGREES


@_kind("corrupted")
def millimetres(d: Draft) -> None:
    """State and action in millimetres."""
    d.frames["state"][:, :POSE] *= 1e3
    d.frames["action"][:, :POSE] *= 1e3


@_kind("corrupted")
def millimetres_of_actions(d: Draft) -> None:
    """Only the actions in millimetres."""
    d.frames["action"][:, :POSE] *= 1e3


@_kind("corrupted")
def milliseconds(d: Draft) -> None:
    """Velocities in rad/ms."""
    d.control["dq"] *= 1e-3


@_kind("corrupted")
def frozen_joint(d: Draft) -> None:
    """An encoder that stops counting for a while."""
    rows = d.ticks(d.moving(max(3, int(d.rng.integers(3, 10)))))
    joint = int(np.argmax(np.ptp(d.control["q_ref"][rows], axis=0)))
    d.control["q"][rows, joint] = d.control["q"][rows.start, joint]


@_kind("corrupted")
def frozen_state(d: Draft) -> None:
    """A state that is not refreshed."""
    rows = d.moving(int(d.rng.integers(6, 12)))
    d.frames["state"][rows] = d.frames["state"][rows[0]]


@_kind("corrupted")
def saturated_velocity(d: Draft) -> None:
    """A sensor that ends at a fraction of what happens."""
    joint = int(np.argmax(np.abs(d.control["dq"]).max(axis=0)))
    v = d.control["dq"][:, joint]
    end = np.abs(v).max() * d.rng.uniform(0.2, 0.5)
    d.control["dq"][:, joint] = np.clip(v, -end, end)


@_kind("corrupted")
def saturated_torque(d: Draft) -> None:
    """A current sensor that ends at a fraction of what happens."""
    joint = int(np.argmax(np.ptp(d.control["tau"], axis=0)))
    v = d.control["tau"][:, joint]
    middle = float(np.median(v))
    end = np.ptp(v) * d.rng.uniform(0.03, 0.1)
    d.control["tau"][:, joint] = np.clip(v, middle - end, middle + end)


@_kind("corrupted")
def beyond_the_limits(d: Draft) -> None:
    """An encoder that lost its zero."""
    joint = int(d.rng.integers(d.manifest.joints))
    by = float(d.rng.uniform(4.0, 6.0) * d.rng.choice([-1.0, 1.0]))
    for name in ("q", "q_ref"):
        d.control[name][:, joint] += by


@_kind("corrupted")
def lost_rows(d: Draft) -> None:
    """A stretch of the control table is missing, and the manifest does not say so."""
    n = len(d.control["t_ns"])
    at, count = int(n * d.rng.uniform(0.2, 0.7)), int(d.rng.integers(5, 300))
    d.control = {k: np.delete(v, slice(at, at + count), axis=0) for k, v in d.control.items()}
    d.undeclared = True


@_kind("corrupted")
def lost_frames_numbered_anew(d: Draft) -> None:
    """Frames are lost and the rest get times by their index, as if none were."""
    t = d.frames["t_ns"]
    n = len(t)
    gone = d.rng.choice(np.arange(2, n - 2), max(2, n // 15), replace=False)
    keep = np.setdiff1d(np.arange(n), gone)
    d.frames = {k: [v[i] for i in keep] if isinstance(v, list) else v[keep] for k, v in d.frames.items()}
    d.frames["t_ns"] = t[: len(keep)]


@_kind("corrupted")
def frames_by_another_clock(d: Draft) -> None:
    """The clock of the process that sees is off."""
    by = int(d.rng.integers(5_000_000, 80_000_000))
    keep = d.frames["t_ns"] + by < d.manifest.window_ns[1]
    d.frames = {
        k: [x for x, y in zip(v, keep, strict=True) if y] if isinstance(v, list) else v[keep]
        for k, v in d.frames.items()
    }
    d.frames["t_ns"] = d.frames["t_ns"] + by


@_kind("corrupted")
def clock_jump(d: Draft) -> None:
    """The clock is set forward in the middle; the recorder took it for a gap."""
    t = d.frames["t_ns"]
    at = int(t[d.moving(4)[1]]) + int(d.rng.integers(10_000_000, 60_000_000))
    by = int(d.rng.integers(200_000_000, 5_000_000_000))

    def jump(v: Any) -> Any:
        return np.where(v >= at, v + by, v)

    d.control["t_ns"], d.frames["t_ns"] = jump(d.control["t_ns"]), jump(t)
    d.events = [{**r, "t_ns": int(jump(r["t_ns"]))} for r in d.events]
    low, high = d.manifest.window_ns
    d.manifest = d.manifest.model_copy(update={"window_ns": (low, high + by)})


@_kind("corrupted")
def two_policies(d: Draft) -> None:
    """Another policy took over in the middle."""
    n = len(d.frames["policy_digest"])
    k = int(n * d.rng.uniform(0.1, 0.9))
    d.frames["policy_digest"] = d.frames["policy_digest"][:k] + ["ef" * 32] * (n - k)


@_kind("corrupted")
def not_a_number(d: Draft) -> None:
    """One number that is none."""
    d.frames["state"][int(d.rng.integers(len(d.frames["state"]))), 0] = np.nan


def _pictures(d: Draft, rows: Array, change: Callable[[NDArray[np.uint8]], Array], quality: int = 90) -> None:
    import simplejpeg

    for name in d.cameras():
        for k in rows.tolist():
            image = np.clip(change(simplejpeg.decode_jpeg(d.frames[name][k])), 0, 255).astype(np.uint8)
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444", False)
            d.frames[name][k] = bytes(data)


@_kind("corrupted")
def black_pictures(d: Draft) -> None:
    """A camera without light, or without a cable."""
    noise = d.rng
    _pictures(d, d.moving(int(d.rng.integers(3, 20))), lambda i: 2.0 + noise.normal(size=i.shape))


@_kind("corrupted")
def blurred_pictures(d: Draft) -> None:
    """A lens out of focus: a box of 7 to 11 pixels, twice."""
    side = int(d.rng.choice([7, 9, 11]))

    def blur(i: NDArray[np.uint8]) -> Array:
        x = i.astype(np.float64)
        for axis in (0, 1, 0, 1):
            wide = np.pad(x, [(side // 2, side // 2) if k == axis else (0, 0) for k in range(3)], "edge")
            sums = np.cumsum(np.insert(wide, 0, 0.0, axis=axis), axis=axis)
            x = (
                np.take(sums, range(side, sums.shape[axis]), axis)
                - np.take(sums, range(sums.shape[axis] - side), axis)
            ) / side
        return x

    _pictures(d, d.mine, blur)


@_kind("corrupted")
def stuck_camera(d: Draft) -> None:
    """A camera that gives its last picture again and again."""
    rows = d.moving(int(d.rng.integers(5, 15)))
    for name in d.cameras():
        for k in rows.tolist():
            d.frames[name][k] = d.frames[name][int(rows[0])]


@_kind("corrupted")
def stuck_noisy_camera(d: Draft) -> None:
    """The same with noise, so that no two pictures have the same bytes."""
    import simplejpeg

    rows, noise = d.mine, d.rng
    for name in d.cameras():
        still = simplejpeg.decode_jpeg(d.frames[name][int(rows[0])]).astype(np.float64)
        for k in rows.tolist():
            image = np.clip(still + noise.normal(scale=3.0, size=still.shape), 0, 255).astype(np.uint8)
            d.frames[name][k] = bytes(simplejpeg.encode_jpeg(image, 90, "RGB", "444", False))


# ── repeated ─────────────────────────────────────────────────────────────────────────────────────────


@_kind("repeated")
def renamed(d: Draft) -> None:
    """Byte for byte the same tables."""


def _disguised(d: Draft) -> None:
    d.manifest = d.manifest.model_copy(
        update={"robot": f"robot-{d.rng.integers(1000)}", "seed": int(d.rng.integers(2**31))}
    )


@_kind("repeated")
def with_noise(d: Draft) -> None:
    """Noise on every signal, pictures encoded again."""
    rng = d.rng
    for name, size in (("q", 5e-4), ("dq", 5e-3), ("tau", 5e-2)):
        d.control[name] += rng.normal(scale=size, size=d.control[name].shape).astype(np.float32)
    for name in ("state", "action"):
        part = d.frames[name][:, :POSE]
        part += rng.normal(scale=5e-4, size=part.shape).astype(np.float32)
    _pictures(d, np.arange(len(d.frames["t_ns"])), lambda i: i + rng.normal(scale=2.0, size=i.shape), 85)
    _disguised(d)


@_kind("repeated")
def with_other_exposure(d: Draft) -> None:
    """Brighter or darker, another quality."""
    gain, quality = float(d.rng.choice([0.7, 0.85, 1.15, 1.4])), int(d.rng.integers(60, 97))
    _pictures(d, np.arange(len(d.frames["t_ns"])), lambda i: i * gain, quality)
    _disguised(d)


@_kind("repeated")
def cut_at_the_ends(d: Draft) -> None:
    """A part of what came before the correction, and the last moment, are left out."""
    first = int(d.mine[0] * d.rng.uniform(0.2, 0.9))
    _cut(d, first, len(d.frames["t_ns"]) - int(d.rng.integers(0, 2)))
    _disguised(d)


@_kind("repeated")
def cut_with_noise(d: Draft) -> None:
    """Both."""
    cut_at_the_ends(d)
    with_noise(d)
