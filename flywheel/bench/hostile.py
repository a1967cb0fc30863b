"""``flywheel bench hostile``: episodes from an attacker by the thousand, and what ingestion makes of each.

Each is made by damaging or forging a sound episode in one of the ways named in ``KINDS``, by a seeded
generator, and goes where every episode goes: ``curate.examine``, in a worker that may not take more memory
than ``MEMORY_MB`` beyond what it starts with, nor longer than ``LIMIT_S``. Each has to be refused with a
reason code; the directory beside the quarantine is watched for anything that gets out.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from flywheel import schema
from flywheel.config import CurateSettings
from flywheel.episode import new_episode_id, read, seal
from flywheel.schema import Manifest, Outcome, Trigger, TriggerKind

MEMORY_MB = 512
LIMIT_S = 20.0
JOINTS, STATE, ACTION, CHUNK, ROWS, FRAMES = 5, 5, 4, 16, 400, 12
CAMERAS = ("wrist",)
SETTINGS = CurateSettings(cameras=CAMERAS, keep_success=True)
REFUSED = "quarantine:"

Rng = np.random.Generator
Doc = dict[str, Any]


class Quarantine:
    """Where hostile episodes are made: each in a directory of its own, from a sound one."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.sound = sound_episode(root / "template")
        self.manifest: Doc = json.loads((self.sound / schema.MANIFEST_FILE).read_bytes())
        self.tables = {n: pq.read_table(self.sound / n) for n in schema.EPISODE_FILES}
        self._made: dict[str, bytes] = {}  # bombs cost time to make: once

    def make(self, number: int, kind: str) -> Path:
        """Episode ``number``; the same for the same seed."""
        rng = np.random.default_rng([self.seed, number])
        d = self.root / "quarantine" / f"{number:06d}"
        shutil.copytree(self.sound, d)
        KINDS[kind](self, d, rng)
        return d

    # ── tools ────────────────────────────────────────────────────────────────────────────────────────

    def edit(self, d: Path, change: Callable[[Doc], object]) -> None:
        """Change the manifest."""
        doc = json.loads(json.dumps(self.manifest))
        change(doc)
        (d / schema.MANIFEST_FILE).write_text(json.dumps(doc))

    def put(self, d: Path, name: str, data: bytes, rows: int | None = None) -> None:
        """Replace a file, and make the manifest agree with it: the attacker knows how to hash."""
        (d / name).write_bytes(data)
        doc = json.loads((d / schema.MANIFEST_FILE).read_bytes())
        for entry in doc["files"]:
            if entry["name"] == name:
                entry.update(bytes=len(data), sha256=schema.sha256_bytes(data))
                if rows is not None:
                    entry["rows"] = rows
        (d / schema.MANIFEST_FILE).write_text(json.dumps(doc))

    def table(self, d: Path, name: str, table: pa.Table, **options: Any) -> None:
        """``put`` of a table."""
        self.put(d, name, _parquet(table, **options), table.num_rows)

    def once(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Made the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def frames_with(self, pictures: list[bytes]) -> pa.Table:
        """The frames with other pictures."""
        table = self.tables[schema.FRAMES_FILE]
        i = table.schema.get_field_index("image.wrist")
        return table.set_column(i, table.schema.field(i), pa.array(pictures, pa.binary()))


def sound_episode(parent: Path, seed: int = 0) -> Path:
    """A failure with 0.4 s of rows and a picture each 33 ms, sealed in ``parent``; another for each seed."""
    import simplejpeg

    rng = np.random.default_rng(seed)
    columns: Doc = {}
    for f in schema.control_schema(JOINTS):
        if pa.types.is_fixed_size_list(f.type):
            values = pa.array(rng.normal(size=ROWS * JOINTS).astype(np.float32))
            columns[f.name] = pa.FixedSizeListArray.from_arrays(values, JOINTS)
        else:
            columns[f.name] = pa.array(np.zeros(ROWS, f.type.to_pandas_dtype()))
    columns["t_ns"] = pa.array(np.arange(ROWS) * 1_000_000)
    path = _path(ROWS + ROWS // FRAMES)
    columns["q"] = _vectors(path[:ROWS])
    columns["dq"] = _vectors(np.gradient(path, 1e-3, axis=0)[:ROWS])
    columns["q_ref"] = columns["q"]
    period = ROWS * 1_000_000 // FRAMES
    chunk, age = np.divmod(np.arange(ROWS) * 1_000_000, period)
    columns["chunk_id"], columns["chunk_age_ns"] = pa.array(chunk), pa.array(age)
    carries = (np.arange(ROWS) > ROWS // 4) & (np.arange(ROWS) < ROWS // 2)
    columns["held"], columns["tool_cmd"] = (
        pa.array(carries.astype(np.uint8)),
        pa.array(carries.astype(np.float32)),
    )
    control = pa.table(columns, schema=schema.control_schema(JOINTS))
    layout = schema.frames_schema(CAMERAS, STATE, CHUNK, ACTION)
    columns = {"t_ns": pa.array(np.arange(FRAMES) * period)}
    for f in layout:
        if pa.types.is_fixed_size_list(f.type):
            values = pa.array(rng.normal(size=FRAMES * f.type.list_size).astype(np.float32))
            columns[f.name] = pa.FixedSizeListArray.from_arrays(values, f.type.list_size)
    # The state follows the joints, and an action is where the operator wants it a moment later.
    state = path[:: ROWS // FRAMES][:FRAMES, :STATE]
    columns["state"] = _vectors(state)
    columns["chunk"] = _vectors(np.zeros((FRAMES, CHUNK * ACTION)))  # the operator's frames have none
    columns["action"] = _vectors(path[ROWS // FRAMES :: ROWS // FRAMES][:FRAMES, :ACTION])
    scene = np.kron(rng.integers(30, 220, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    pictures = [simplejpeg.encode_jpeg(np.roll(scene, 4 * i, axis=1), 90) for i in range(FRAMES)]
    columns |= {
        "image.wrist": pa.array(pictures, pa.binary()),
        "instruction": pa.array(["pick the red box"] * FRAMES),
        "infer_ns": pa.array(np.zeros(FRAMES, np.int64)),
        "intervention": pa.array([True] * FRAMES),
        "policy_digest": pa.array(["ab" * 32] * FRAMES),
    }
    frames = pa.table({f.name: columns[f.name] for f in layout}, schema=layout)
    events = pa.Table.from_pylist(
        [{"t_ns": 5, "kind": "trigger", "name": "task_timeout", "detail": "{}"}], schema.EVENTS_SCHEMA
    )
    trigger = Trigger(kind=TriggerKind.TASK_TIMEOUT, t_ns=5)
    m = Manifest(
        episode_id=new_episode_id(1_760_000_000_000_000_000, rng),
        site="lab",
        robot="r1",
        joints=JOINTS,
        cameras=CAMERAS,
        state_dim=STATE,
        action_dim=ACTION,
        chunk=CHUNK,
        control_hz=1000.0,
        policy_hz=1e9 / period,
        task="pick the red box",
        shift="",
        outcome=Outcome.TIMEOUT,
        operator_outcome=Outcome.SUCCESS,
        triggers=(trigger,),
        window_ns=(0, ROWS * 1_000_000),
        policy_digest="ab" * 32,
        runtime_version="bench",
        clock="wall",
        clock_epoch_ns=1_760_000_000_000_000_000,
        files=(),
    )
    return parent / seal(parent, m, control, frames, events).episode_id


def _path(rows: int) -> npt.NDArray[np.float64]:
    """Joints that swing together: ``[rows, JOINTS]``, rad."""
    t = np.arange(rows)[:, None] * 1e-3
    return np.asarray(0.2 * np.sin(4.0 * t + np.arange(JOINTS)))


def _vectors(values: npt.NDArray[np.float64]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    options = {"compression": "none", "use_dictionary": False, **options}
    pq.write_table(table, sink, **options)
    return sink.getvalue()


# ── manifests ────────────────────────────────────────────────────────────────────────────────────────

_PATHS = ("../../../etc/cron.d/x", "/etc/passwd", "..", "a/b", "..\\..\\x", "x\x00y", "%2e%2e%2f", "")


def _traversal(q: Quarantine, d: Path, rng: Rng) -> None:
    path = str(rng.choice(_PATHS))
    field = str(rng.choice(["robot", "site", "episode_id", "cameras", "name"]))
    if field == "name":
        q.edit(d, lambda m: m["files"][int(rng.integers(3))].update(name=path))
    else:
        q.edit(d, lambda m: m.update({field: [path] if field == "cameras" else path}))


def _wrong_type(q: Quarantine, d: Path, rng: Rng) -> None:
    values: list[Any] = [None, [], {}, "x", [[]], {"a": 1}, "\ud800", ["x"], True, 1.5]
    keys = [
        "episode_id",
        "site",
        "joints",
        "triggers",
        "window_ns",
        "files",
        "outcome",
        "control_hz",
        "clock",
    ]
    key = str(rng.choice(keys))
    value = values[int(rng.integers(len(values)))]
    if (key, value) in (("triggers", []), ("control_hz", True), ("control_hz", 1.5), ("joints", True)):
        value = "x"  # these are not wrong
    if (key, value) == ("site", "x"):
        value = 1.5
    q.edit(d, lambda m: m.update({key: value}))


def _missing_field(q: Quarantine, d: Path, rng: Rng) -> None:
    required = ["episode_id", "site", "robot", "joints", "cameras", "triggers", "window_ns", "files", "clock"]
    q.edit(d, lambda m: m.pop(str(rng.choice(required))))


def _extra_field(q: Quarantine, d: Path, rng: Rng) -> None:
    q.edit(d, lambda m: m.update({f"x{rng.integers(1 << 30)}": "__import__('os')"}))


def _huge_number(q: Quarantine, d: Path, rng: Rng) -> None:
    keys = [
        "joints",
        "state_dim",
        "action_dim",
        "chunk",
        "clock_epoch_ns",
        "control_hz",
        "policy_hz",
        "drops",
    ]
    key, size = str(rng.choice(keys)), 10 ** int(rng.integers(30, 4000))
    q.edit(d, lambda m: m.update({key: -size if rng.random() < 0.3 else size}))


def _not_a_number(q: Quarantine, d: Path, rng: Rng) -> None:
    key = str(rng.choice(["control_hz", "policy_hz", "clock_epoch_ns", "joints"]))
    q.edit(d, lambda m: m.update({key: float(rng.choice([np.nan, np.inf, -np.inf]))}))


def _deep(q: Quarantine, d: Path, rng: Rng) -> None:
    n = int(rng.integers(2_000, 200_000))
    nested = "[" * n + "]" * n
    text = json.dumps(q.manifest).replace('"detail": {}', '"detail": {"a": ' + nested + "}", 1)
    (d / schema.MANIFEST_FILE).write_text(text)


def _cut_manifest(q: Quarantine, d: Path, rng: Rng) -> None:
    data = (d / schema.MANIFEST_FILE).read_bytes().rstrip()
    (d / schema.MANIFEST_FILE).write_bytes(data[: int(rng.integers(0, len(data) - 1))])


def _garbage_manifest(q: Quarantine, d: Path, rng: Rng) -> None:
    (d / schema.MANIFEST_FILE).write_bytes(rng.bytes(int(rng.integers(1, 4096))))


def _long_manifest(q: Quarantine, d: Path, rng: Rng) -> None:
    q.edit(d, lambda m: m.update(task="x" * int(rng.integers(1 << 20, 4 << 20))))


def _version(q: Quarantine, d: Path, rng: Rng) -> None:
    values: list[Any] = [0, 2, 99, "1", None, True, 1.5, [1], -1]
    q.edit(d, lambda m: m.update(schema_version=values[int(rng.integers(len(values)))]))


def _file_list(q: Quarantine, d: Path, rng: Rng) -> None:
    def change(m: Doc) -> None:
        match int(rng.integers(4)):
            case 0:
                m["files"] *= int(rng.integers(2, 500))
            case 1:
                m["files"].pop(int(rng.integers(3)))
            case 2:
                m["files"].reverse()
            case _:
                m["files"] = []

    q.edit(d, change)


def _lying_counts(q: Quarantine, d: Path, rng: Rng) -> None:
    key = str(rng.choice(["rows", "bytes", "sha256"]))
    value: Any = "0" * 64 if key == "sha256" else int(rng.integers(1 << 20, 1 << 62))
    q.edit(d, lambda m: m["files"][int(rng.integers(3))].update({key: value}))


def _window(q: Quarantine, d: Path, rng: Rng) -> None:
    low, high = int(rng.integers(1 << 50, 1 << 60)), int(rng.integers(0, 1 << 49))
    spans = [[low, high], [-(10**30), 10**30], [0, 10**40], [-low, low], [10, 11]]
    q.edit(d, lambda m: m.update(window_ns=spans[int(rng.integers(len(spans)))]))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


def _any(rng: Rng) -> str:
    return schema.EPISODE_FILES[int(rng.integers(3))]


def _cut_file(q: Quarantine, d: Path, rng: Rng) -> None:
    name = _any(rng)
    data = (d / name).read_bytes()
    q.put(d, name, data[: int(rng.integers(0, len(data) - 1))])


def _garbage_file(q: Quarantine, d: Path, rng: Rng) -> None:
    q.put(d, _any(rng), b"PAR1" + rng.bytes(int(rng.integers(8, 8192))) + b"PAR1")


def _flipped(q: Quarantine, d: Path, rng: Rng) -> None:
    name = _any(rng)
    data = bytearray((d / name).read_bytes())
    for at in rng.integers(0, len(data), int(rng.integers(1, 9))):
        data[at] ^= int(rng.integers(1, 256))
    (d / name).write_bytes(data)  # and the manifest says what it was


def _fuzzed(q: Quarantine, d: Path, rng: Rng) -> None:
    """Footer and page headers, with the hash put right: what a parser meets first."""
    name = _any(rng)
    data = bytearray((d / name).read_bytes())
    footer = int.from_bytes(data[-8:-4], "little")
    low = len(data) - 8 - footer if rng.random() < 0.8 else 4
    for at in rng.integers(low, len(data), int(rng.integers(1, 24))):
        data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    q.put(d, name, bytes(data))


def _absent(q: Quarantine, d: Path, rng: Rng) -> None:
    (d / str(rng.choice([*schema.EPISODE_FILES, schema.MANIFEST_FILE]))).unlink()


def _link(q: Quarantine, d: Path, rng: Rng) -> None:
    name = str(rng.choice([*schema.EPISODE_FILES, schema.MANIFEST_FILE]))
    targets = ["/etc/passwd", "/dev/zero", "/proc/self/environ", "../../canary", str(q.sound / name), name]
    (d / name).unlink()
    (d / name).symlink_to(targets[int(rng.integers(len(targets)))])


def _special(q: Quarantine, d: Path, rng: Rng) -> None:
    path = d / str(rng.choice([*schema.EPISODE_FILES, schema.MANIFEST_FILE]))
    path.unlink()
    os.mkfifo(path) if rng.random() < 0.6 else path.mkdir()


def _sparse(q: Quarantine, d: Path, rng: Rng) -> None:
    name, size = _any(rng), 1 << int(rng.integers(33, 43))
    os.truncate(d / name, size)
    if rng.random() < 0.5:
        i = schema.EPISODE_FILES.index(name)
        q.edit(d, lambda m: m["files"][i].update(bytes=size))


def _stranger(q: Quarantine, d: Path, rng: Rng) -> None:
    name = str(rng.choice(["run.sh", "model.pkl", ".bashrc", "control.parquet.exe", "sitecustomize.py"]))
    (d / name).write_bytes(rng.bytes(100))


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────


def _other_columns(q: Quarantine, d: Path, rng: Rng) -> None:
    name = _any(rng)
    table = q.tables[name]
    i = int(rng.integers(table.num_columns))
    match int(rng.integers(5)):
        case 0:
            table = table.drop_columns(table.schema.names[i])
        case 1:
            table = table.append_column(table.schema.field(i), table.column(i))  # the same name twice
        case 2:
            table = table.append_column(f"x{i}", table.column(i))
        case 3:
            text = pa.array(["x"] * table.num_rows)
            table = table.set_column(
                i, pa.field(table.schema.names[i], pa.large_string(), False), text.cast("large_string")
            )
        case _:
            table = table.select(table.schema.names[::-1])
    q.table(d, name, table)


def _nested_columns(q: Quarantine, d: Path, rng: Rng) -> None:
    kind: pa.DataType = pa.int8()
    for _ in range(int(rng.integers(5, 60))):
        kind = pa.list_(kind) if rng.random() < 0.5 else pa.struct([("a", kind)])
    name = _any(rng)
    table = q.tables[name]
    q.table(d, name, table.append_column(pa.field("deep", kind), pa.nulls(table.num_rows, kind)))


def _nulls(q: Quarantine, d: Path, rng: Rng) -> None:
    name = _any(rng)
    table = q.tables[name]
    i = int(rng.integers(table.num_columns))
    field = table.schema.field(i)
    q.table(d, name, table.set_column(i, field.with_nullable(True), pa.nulls(table.num_rows, field.type)))


def _bad_values(q: Quarantine, d: Path, rng: Rng) -> None:
    name = str(rng.choice([schema.CONTROL_FILE, schema.FRAMES_FILE]))
    table = q.tables[name]
    column = str(rng.choice(["q", "dq", "tau"] if name == schema.CONTROL_FILE else ["state", "action"]))
    i = table.schema.get_field_index(column)
    kind = table.schema.field(i).type
    values = np.zeros(table.num_rows * kind.list_size, np.float32)
    values[int(rng.integers(len(values)))] = rng.choice([np.nan, np.inf, -np.inf])
    q.table(
        d,
        name,
        table.set_column(
            i, table.schema.field(i), pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind)
        ),
    )


def _bad_times(q: Quarantine, d: Path, rng: Rng) -> None:
    name = str(rng.choice([schema.CONTROL_FILE, schema.FRAMES_FILE]))
    table = q.tables[name]
    t = table.column("t_ns").to_numpy().copy()
    k = int(rng.integers(1, len(t)))
    edge = np.iinfo(np.int64)
    t[k] = rng.choice([0, -1, edge.min, edge.max, 1 << 55])
    q.table(d, name, table.set_column(0, table.schema.field(0), pa.array(t)))


def _row_bomb(q: Quarantine, d: Path, rng: Rng) -> None:
    """Rows without end that take no space: 2 M of them in a few hundred bytes."""
    name, n = schema.EVENTS_FILE, 2_000_000

    def make() -> bytes:
        one = pa.array(["x"] * n)
        columns = [pa.array(np.zeros(n, np.int64)), one, one, one]
        return _parquet(
            pa.table(columns, schema=schema.EVENTS_SCHEMA), use_dictionary=True, compression="zstd"
        )

    q.put(d, name, q.once("rows", make), n)


def _dictionary_bomb(q: Quarantine, d: Path, rng: Rng) -> None:
    """One picture, or one text, of megabytes, that every row refers to."""
    size = (8 << 20) + int(rng.integers(1 << 16))
    if rng.random() < 0.5:
        table = q.frames_with([b"\xff\xd8" + bytes(size) + b"\xff\xd9"] * FRAMES)
        data = q.once(
            "picture",
            lambda: _parquet(table, use_dictionary=["image.wrist"], dictionary_pagesize_limit=1 << 26),
        )
        q.put(d, schema.FRAMES_FILE, data)
    else:
        table = q.tables[schema.FRAMES_FILE]
        i = table.schema.get_field_index("instruction")
        long = table.set_column(i, table.schema.field(i), pa.array(["x" * size] * FRAMES))
        data = q.once("text", lambda: _parquet(long, use_dictionary=True, dictionary_pagesize_limit=1 << 26))
        q.put(d, schema.FRAMES_FILE, data)


def _inflating(q: Quarantine, d: Path, rng: Rng) -> None:
    """A few kilobytes that inflate to hundreds of megabytes."""
    codec = str(rng.choice(["zstd", "gzip", "brotli", "lz4", "snappy"]))

    def make() -> bytes:
        table = q.frames_with([b"\xff\xd8" + bytes(8 << 20) + b"\xff\xd9"] * FRAMES)
        return _parquet(table, compression=codec)

    q.put(d, schema.FRAMES_FILE, q.once(codec, make))


def _prefixes(q: Quarantine, d: Path, rng: Rng) -> None:
    """Values that repeat the one before: each row costs two bytes."""

    def make() -> bytes:
        table = q.frames_with([b"\xff\xd8" + bytes(4 << 20) + b"\xff\xd9"] * FRAMES)
        return _parquet(table, column_encoding={"image.wrist": "DELTA_BYTE_ARRAY"})

    q.put(d, schema.FRAMES_FILE, q.once("prefixes", make))


def _metadata_bomb(q: Quarantine, d: Path, rng: Rng) -> None:
    name = _any(rng)

    def make() -> bytes:
        extra = {f"k{i}": "x" * 1000 for i in range(20_000)}
        return _parquet(q.tables[name].replace_schema_metadata(extra))

    q.put(d, name, q.once(f"meta{name}", make))


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────


def _jpeg_claiming(height: int, width: int) -> bytes:
    """A real picture whose header says that it is larger (SOF0: ITU-T T.81, B.2.2)."""
    import simplejpeg

    data = bytearray(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8), 90))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(data)


def _picture_bomb(q: Quarantine, d: Path, rng: Rng) -> None:
    sides = [(65500, 65500), (4097, 16), (16, 60000), (0, 0), (4096, 4096), (30000, 30000)]
    h, w = sides[int(rng.integers(len(sides)))]
    q.table(d, schema.FRAMES_FILE, q.frames_with([_jpeg_claiming(h, w)] * FRAMES))


def _no_picture(q: Quarantine, d: Path, rng: Rng) -> None:
    bodies = [
        b"",
        b"\xff\xd8\xff\xd9",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8" + rng.bytes(500) + b"\xff\xd9",
    ]
    pictures = [p.as_py() for p in q.tables[schema.FRAMES_FILE].column("image.wrist")]
    pictures[int(rng.integers(FRAMES))] = bodies[int(rng.integers(len(bodies)))]
    q.table(d, schema.FRAMES_FILE, q.frames_with(pictures))


def _other_pictures(q: Quarantine, d: Path, rng: Rng) -> None:
    import simplejpeg

    pictures = [p.as_py() for p in q.tables[schema.FRAMES_FILE].column("image.wrist")]
    side = int(rng.integers(65, 900))
    pictures[int(rng.integers(1, FRAMES))] = simplejpeg.encode_jpeg(np.zeros((side, 40, 3), np.uint8), 50)
    q.table(d, schema.FRAMES_FILE, q.frames_with(pictures))


def _many_scans(q: Quarantine, d: Path, rng: Rng) -> None:
    """A picture that is drawn over and over: each scan costs the whole area (a progressive bomb)."""
    data = _jpeg_claiming(2048, 2048)
    scan = data[data.index(b"\xff\xda") : -2]
    bomb = data[:-2].replace(b"\xff\xc0", b"\xff\xc2", 1) + scan * int(rng.integers(500, 3000)) + b"\xff\xd9"
    q.table(d, schema.FRAMES_FILE, q.frames_with([bomb] * FRAMES))


KINDS: dict[str, Callable[[Quarantine, Path, Rng], None]] = {
    "manifest: path traversal": _traversal,
    "manifest: wrong type": _wrong_type,
    "manifest: missing field": _missing_field,
    "manifest: extra field": _extra_field,
    "manifest: huge number": _huge_number,
    "manifest: NaN": _not_a_number,
    "manifest: deep nesting": _deep,
    "manifest: cut short": _cut_manifest,
    "manifest: garbage": _garbage_manifest,
    "manifest: too long": _long_manifest,
    "manifest: unknown version": _version,
    "manifest: list of files": _file_list,
    "manifest: lying counts": _lying_counts,
    "manifest: impossible window": _window,
    "file: cut short": _cut_file,
    "file: garbage": _garbage_file,
    "file: flipped bits": _flipped,
    "file: fuzzed with its hash put right": _fuzzed,
    "file: absent": _absent,
    "file: link": _link,
    "file: pipe or directory": _special,
    "file: sparse terabytes": _sparse,
    "file: stranger": _stranger,
    "parquet: other columns": _other_columns,
    "parquet: deep schema": _nested_columns,
    "parquet: nulls": _nulls,
    "parquet: NaN": _bad_values,
    "parquet: impossible times": _bad_times,
    "parquet: bomb of rows": _row_bomb,
    "parquet: bomb of a dictionary": _dictionary_bomb,
    "parquet: bomb of compression": _inflating,
    "parquet: bomb of prefixes": _prefixes,
    "parquet: bomb of metadata": _metadata_bomb,
    "picture: bomb of pixels": _picture_bomb,
    "picture: none": _no_picture,
    "picture: of another size": _other_pictures,
    "picture: bomb of scans": _many_scans,
}
# A fuzzed byte may be one that nobody reads: then the episode has to read as the sound one does.
HARMLESS = frozenset({"file: fuzzed with its hash put right"})


# ── the examination ──────────────────────────────────────────────────────────────────────────────────


class Examiner:
    """A worker that examines one directory at a time, in bounded memory, and may be lost."""

    def __init__(self) -> None:
        self.lost = 0
        self._start()

    def _start(self) -> None:
        ask, self._ask = os.pipe()
        self._answer, answer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._ask)
            os.close(self._answer)
            _examine_for_ever(ask, answer)
        os.close(ask)
        os.close(answer)

    def examine(self, directory: Path) -> tuple[str, int]:
        """The reason ("" for none, "lost: …" if it did not survive), and its highest memory so far, kB."""
        os.write(self._ask, f"{directory}\n".encode())
        data = b""
        while not data.endswith(b"\n"):
            piece = os.read(self._answer, 65536)
            if not piece:
                status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                self.lost += 1
                os.close(self._ask)
                os.close(self._answer)
                self._start()
                return f"lost: {status}", 0
            data += piece
        reason, rss = data.decode().rstrip("\n").rsplit(" ", 1)
        return reason, int(rss)

    def close(self) -> None:
        """End it."""
        os.close(self._ask)
        os.waitpid(self._pid, 0)


def _examine_for_ever(ask: int, answer: int) -> None:
    from flywheel.curate.examine import examine

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        pa.set_cpu_count(1)
        pa.set_io_thread_count(1)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (MEMORY_MB << 20),) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with os.fdopen(ask) as questions:
            for line in questions:
                signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
                found = examine(Path(line.rstrip("\n")), SETTINGS)
                signal.setitimer(signal.ITIMER_REAL, 0)
                rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                os.write(answer, f"{found.reason} {rss}\n".encode())
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def run(root: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Make and examine ``count`` episodes in ``root``; what came out, by kind and by reason."""
    (root / "canary").mkdir(parents=True)
    (root / "quarantine").mkdir()
    quarantine = Quarantine(root, seed)
    examiner = Examiner()
    reasons: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {k: Counter() for k in KINDS}
    accepted: list[str] = []
    lost: list[str] = []
    harmless = 0
    reason, first_rss = examiner.examine(quarantine.sound)
    if reason.startswith(REFUSED):
        raise RuntimeError(f"the sound episode is refused: {reason}")
    high, slowest = first_rss, 0.0
    names = list(KINDS)
    before = _listing(root)
    for number in range(count):
        kind = names[number % len(names)]
        d = quarantine.make(number, kind)
        begun = time.monotonic()
        reason, rss = examiner.examine(d)
        slowest, high = max(slowest, time.monotonic() - begun), max(high, rss)
        reasons[reason or "none"] += 1
        by_kind[kind][reason or "none"] += 1
        if reason.startswith("lost"):
            lost.append(f"{number} {kind}: {reason}")
        elif not reason.startswith(REFUSED):
            if kind in HARMLESS and _same(d, quarantine.sound):
                harmless += 1
            else:
                accepted.append(f"{number} {kind}: {reason or 'accepted'}")
        shutil.rmtree(d)
    examiner.close()
    return {
        "examined": count,
        "refused": count - len(accepted) - len(lost) - harmless,
        "harmless": harmless,
        "accepted": accepted,
        "lost": lost,
        "escaped": sorted(_listing(root) ^ before),
        "memory_mb": (high - first_rss) / 1024,
        "slowest_s": slowest,
        "reasons": dict(reasons.most_common()),
        "kinds": {k: dict(c.most_common()) for k, c in by_kind.items()},
    }


def _same(a: Path, b: Path) -> bool:
    x, y = read(a), read(b)
    return bool(x.control.equals(y.control) and x.frames.equals(y.frames) and x.events.equals(y.events))


def _listing(root: Path) -> set[str]:
    return {str(p) for p in root.rglob("*") if "quarantine" not in p.parts}


def hostile(full: bool = False) -> dict[str, Any]:
    """A thousand; ten thousand with ``full``."""
    from flywheel.edge.bench import machine

    load = os.getloadavg()
    root = Path(tempfile.mkdtemp(prefix="flywheel-hostile-"))
    begun = time.monotonic()
    try:
        found = run(root, 10_000 if full else 1_000)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    figures = {k: float(v) for k, v in found.items() if isinstance(v, int | float)}
    figures |= {k: float(len(found[k])) for k in ("accepted", "lost", "escaped")}
    figures |= {"kinds": float(len(KINDS)), "seconds": time.monotonic() - begun}
    figures |= {f"reason_{k.removeprefix(REFUSED)}": float(n) for k, n in found["reasons"].items()}
    bars = {
        **{k: (figures[k], "<=", 0.0) for k in ("accepted", "lost", "escaped")},
        "examined": (figures["examined"], ">=", 10_000.0 if full else 1_000.0),
        "memory_mb": (figures["memory_mb"], "<=", float(MEMORY_MB)),
    }
    return {
        "bench": "hostile",
        "machine": machine(),
        "load": {
            "before": load,
            "after": os.getloadavg(),
            "kinds": found["kinds"],
            **{k: found[k][:10] for k in ("accepted", "lost", "escaped")},
        },
        "figures": figures,
        "bars": {
            k: {"value": v, "op": op, "bar": bar, "ok": v <= bar if op == "<=" else v >= bar}
            for k, (v, op, bar) in bars.items()
        },
    }
