"""What the catalogue says of an episode: one row, of its manifest or of why that was refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa

from flywheel.episode import UnknownVersion, parse_manifest
from flywheel.errors import EpisodeError
from flywheel.schema import CONTROL_FILE, EPISODE_SCHEMA_VERSION, EVENTS_FILE, FRAMES_FILE, MANIFEST_FILE

EPISODES = "episodes/"
MANIFEST_BYTES_MAX = 1 << 20
PROBLEM_CHARACTERS = 500

_KEY = re.compile(r"episodes/site=([^/]*)/robot=([^/]*)/date=([^/]*)/([^/]*)/")
_DEPTH = 6  # episodes / site= / robot= / date= / id / manifest.json
_INT64 = range(-(1 << 63), 1 << 63)


class Refused(StrEnum):
    """Why a manifest is in the catalogue as a problem instead of as an episode."""

    MALFORMED = "malformed"
    UNKNOWN_VERSION = "unknown_version"  # read again by a build that knows more
    MISPLACED = "misplaced"  # it describes another place than the one that it lies in
    CORRUPT = "corrupt"  # its bytes differ from every hash that there is of them
    TOO_LARGE = "too_large"
    OUT_OF_RANGE = "out_of_range"  # a number or a text that no column can hold
    UNREADABLE = "unreadable"  # the store has it and does not give it


# Times are UTC nanoseconds. Of a refused manifest there is what its key says, and why; the rest is null.
COLUMNS = pa.schema(
    [
        pa.field("episode_id", pa.string()),
        pa.field("prefix", pa.string(), False),  # where it lies in the store
        pa.field("site", pa.string()),
        pa.field("robot", pa.string()),
        pa.field("date", pa.string()),  # UTC, YYYY-MM-DD
        pa.field("task", pa.string()),
        pa.field("shift", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("outcome", pa.string()),
        pa.field("operator_outcome", pa.string()),
        pa.field("triggers", pa.list_(pa.string())),
        pa.field("trigger_ns", pa.int64()),  # the first one
        pa.field("start_ns", pa.int64()),
        pa.field("end_ns", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("policy_digest", pa.string()),
        pa.field("runtime_version", pa.string()),
        pa.field("clock", pa.string()),
        pa.field("joints", pa.int32()),
        pa.field("cameras", pa.list_(pa.string())),
        pa.field("state_dim", pa.int32()),
        pa.field("action_dim", pa.int32()),
        pa.field("chunk", pa.int32()),
        pa.field("control_hz", pa.float64()),
        pa.field("policy_hz", pa.float64()),
        pa.field("gaps", pa.int64()),
        pa.field("drops", pa.int64()),
        pa.field("control_rows", pa.int64()),
        pa.field("frames_rows", pa.int64()),
        pa.field("events_rows", pa.int64()),
        pa.field("bytes", pa.int64()),  # of the three tables
        pa.field("refused", pa.string()),  # null for an episode that can be used
        pa.field("problem", pa.string()),
        pa.field("etag", pa.string(), False),  # with `prefix`, the identity of what was read
        pa.field("arrived_ns", pa.int64(), False),  # by the store's clock
        pa.field("reader", pa.int32(), False),  # newest episode schema that the reader knew
    ]
)


@dataclass(frozen=True, slots=True)
class Sighting:
    """A manifest as the store lists it."""

    prefix: str  # of its episode, with a trailing slash
    size: int
    etag: str
    arrived_ns: int


def is_manifest(key: str) -> bool:
    """Whether a key of the store is where an episode's manifest lies."""
    return key.endswith(f"/{MANIFEST_FILE}") and key.startswith(EPISODES) and key.count("/") == _DEPTH - 1


def row(seen: Sighting, data: bytes) -> dict[str, Any]:
    """The row of a manifest's bytes; whatever is wrong with them is in the row."""
    key = seen.prefix + MANIFEST_FILE
    try:
        m = parse_manifest(data, key)
    except UnknownVersion as e:
        return refusal(seen, Refused.UNKNOWN_VERSION, str(e))
    except EpisodeError as e:
        return refusal(seen, Refused.MALFORMED, str(e))
    if m.prefix != seen.prefix:
        return refusal(seen, Refused.MISPLACED, f"{key}: describes {m.prefix}, so it is not where it belongs")
    rows = {f.name: f.rows for f in m.files}
    start, end = (m.clock_epoch_ns + t for t in m.window_ns)
    values = {
        "episode_id": m.episode_id,
        "site": m.site,
        "robot": m.robot,
        "date": m.date,
        "task": m.task,
        "shift": m.shift,
        "seed": m.seed,
        "outcome": m.outcome.value,
        "operator_outcome": m.operator_outcome.value if m.operator_outcome else None,
        "triggers": [t.kind.value for t in m.triggers],
        "trigger_ns": min((m.clock_epoch_ns + t.t_ns for t in m.triggers), default=None),
        "start_ns": start,
        "end_ns": end,
        "seconds": (end - start) / 1e9,
        "policy_digest": m.policy_digest,
        "runtime_version": m.runtime_version,
        "clock": m.clock,
        "joints": m.joints,
        "cameras": list(m.cameras),
        "state_dim": m.state_dim,
        "action_dim": m.action_dim,
        "chunk": m.chunk,
        "control_hz": m.control_hz,
        "policy_hz": m.policy_hz,
        "gaps": m.gaps,
        "drops": m.drops,
        "control_rows": rows[CONTROL_FILE],
        "frames_rows": rows[FRAMES_FILE],
        "events_rows": rows[EVENTS_FILE],
        "bytes": sum(f.bytes for f in m.files),
        "refused": None,
        "problem": None,
    }
    for name, value in values.items():
        if isinstance(value, int) and value not in _INT64:
            return refusal(
                seen, Refused.OUT_OF_RANGE, f"{key}: {name} = {value!r:.40}: more than 64 bits can hold"
            )
    return values | _identity(seen)


def refusal(seen: Sighting, reason: Refused, problem: str) -> dict[str, Any]:
    """The row of a manifest that was refused."""
    found = _KEY.fullmatch(seen.prefix)
    place = dict(zip(("site", "robot", "date", "episode_id"), found.groups(), strict=True)) if found else {}
    # The text may quote what a stranger wrote.
    said = problem[:PROBLEM_CHARACTERS].encode(errors="replace").decode()
    return dict.fromkeys(COLUMNS.names) | place | _identity(seen) | {"refused": str(reason), "problem": said}


def table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Rows as a table of ``COLUMNS``."""
    return pa.Table.from_pylist(list(rows), schema=COLUMNS)


def _identity(seen: Sighting) -> dict[str, Any]:
    return {
        "prefix": seen.prefix,
        "etag": seen.etag,
        "arrived_ns": seen.arrived_ns,
        "reader": EPISODE_SCHEMA_VERSION,
    }
