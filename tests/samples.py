"""Made-up episodes for tests: the right shapes, a plausible content, any length."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flywheel import schema
from flywheel.episode import new_episode_id, seal
from flywheel.schema import Manifest, Outcome, Trigger, TriggerKind

JOINTS, STATE, ACTION, CHUNK = 5, 5, 4, 16
CAMERAS = ("wrist", "scene")
EPOCH_NS = 1_760_000_000_000_000_000
DIGEST = "ab" * 32


def jpeg(brightness: int = 90, size: int = 64) -> bytes:
    """A real JPEG."""
    import simplejpeg

    image = np.full((size, size, 3), brightness % 256, np.uint8)
    image[::4] //= 2
    return bytes(simplejpeg.encode_jpeg(image, quality=90))


def vectors(rows: npt.NDArray[Any]) -> pa.Array:
    """``[rows, n]`` as a fixed-size list."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float32).reshape(-1)), rows.shape[1])


def control_table(rows: int, t0_ns: int = 0, seed: int = 0) -> pa.Table:
    """A 1 kHz control table of ``rows`` ticks."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.normal(scale=1e-3, size=(rows, JOINTS)), axis=0)
    ticks = np.arange(rows)
    columns = {
        "t_ns": t0_ns + ticks * 1_000_000,
        "late_ns": np.zeros(rows, np.int64),
        "compute_ns": np.zeros(rows, np.int64),
        "mode": np.zeros(rows, np.uint8),
        "q": vectors(path),
        "dq": vectors(np.gradient(path, 1e-3, axis=0) if rows > 1 else path),
        "q_ref": vectors(path + 1e-3),
        "tau": vectors(rng.normal(size=(rows, JOINTS))),
        "tool_cmd": np.zeros(rows, np.float32),
        "held": np.zeros(rows, np.uint8),
        "chunk_id": ticks // 100,
        "chunk_age_ns": (ticks % 100) * 1_000_000,
        "limits": np.zeros(rows, np.uint32),
    }
    return pa.table(columns, schema=schema.control_schema(JOINTS))


def frames_table(rows: int, t0_ns: int = 0, operator_from: int | None = None, seed: int = 0) -> pa.Table:
    """A 10 Hz frame table; the operator is in control from row ``operator_from``."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "t_ns": t0_ns + np.arange(rows) * 100_000_000,
        **{f"image.{c}": [jpeg(i * 7 + len(c)) for i in range(rows)] for c in CAMERAS},
        "state": vectors(rng.normal(size=(rows, STATE))),
        "instruction": ["pick the red box"] * rows,
        "action": vectors(rng.normal(size=(rows, ACTION))),
        "chunk": vectors(rng.normal(size=(rows, CHUNK * ACTION))),
        "infer_ns": np.zeros(rows, np.int64),
        "intervention": [operator_from is not None and i >= operator_from for i in range(rows)],
        "policy_digest": [DIGEST] * rows,
    }
    return pa.table(columns, schema=schema.frames_schema(CAMERAS, STATE, CHUNK, ACTION))


def events_table(*events: tuple[int, str, str]) -> pa.Table:
    """``(t_ns, kind, name)`` each."""
    rows = [{"t_ns": t, "kind": k, "name": n, "detail": "{}"} for t, k, n in events]
    return pa.Table.from_pylist(rows, schema=schema.EVENTS_SCHEMA)


def draft(t0_ns: int = 0, seconds: float = 1.0, seed: int = 0, **fields: Any) -> Manifest:
    """A manifest that fits the tables above, without files."""
    rng = np.random.default_rng(seed)
    end = t0_ns + round(seconds * 1e9)
    trigger = Trigger(kind=TriggerKind.TASK_TIMEOUT, t_ns=(t0_ns + end) // 2)
    values: dict[str, Any] = {
        "episode_id": new_episode_id(EPOCH_NS + trigger.t_ns, rng),
        "site": "lab",
        "robot": "r1",
        "joints": JOINTS,
        "cameras": CAMERAS,
        "state_dim": STATE,
        "action_dim": ACTION,
        "chunk": CHUNK,
        "control_hz": 1000.0,
        "policy_hz": 10.0,
        "task": "pick the red box",
        "shift": "factory",
        "seed": seed,
        "outcome": Outcome.TIMEOUT,
        "triggers": (trigger,),
        "window_ns": (t0_ns, end),
        "policy_digest": DIGEST,
        "runtime_version": "test",
        "clock": "lockstep",
        "clock_epoch_ns": EPOCH_NS,
        "files": (),
    }
    return Manifest(**{**values, **fields})


def sealed(parent: Path, seconds: float = 1.0, seed: int = 0, **fields: Any) -> Path:
    """A sound episode on disk; ``fields`` override the manifest's."""
    control = control_table(round(seconds * 1000), seed=seed)
    frames = frames_table(max(round(seconds * 10), 1), operator_from=None, seed=seed)
    m = draft(seconds=seconds, seed=seed, **fields)
    manifest = seal(parent, m, control, frames, events_table((m.triggers[0].t_ns, "trigger", "task_timeout")))
    return parent / manifest.episode_id


def png_size(png: Path) -> tuple[int, int]:
    """Width and height of a PNG, decoded."""
    from PIL import Image

    with Image.open(io.BytesIO(png.read_bytes())) as image:
        image.load()
        return image.size
