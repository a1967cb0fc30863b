"""Which parts make up the catalogue: immutable Parquet files, and a numbered list of them.

``catalogue/parts/<uuid>.parquet``   rows; written once under a name that nobody else can choose
``catalogue/log/<n>.json``           the parts of version n; create-only, so of racing writers one wins

The newest version is the catalogue. A writer adds parts, then tries to create the next version; if somebody
was first it looks again and adds what is still missing, so no row is lost and none is there twice. A crash
leaves parts that no version names, which ``sweep`` removes once nobody can be about to name them.

Parts never hold two rows of one prefix, so that a query need not look for the newer one.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from flywheel.catalogue.rows import COLUMNS
from flywheel.errors import Conflict, IntegrityError, NotFound, StoreError
from flywheel.schema import DIGEST, Strict, sha256_bytes
from flywheel.store import Store

LOG = "catalogue/log"
PARTS = "catalogue/parts/"
PART_ROWS = 1 << 18  # a part this long is not merged any more
GROUP_ROWS = 1 << 15  # rows that a scan can skip by their minimum and maximum
FAN = 8  # parts of about one size that are merged into one
KEPT_VERSIONS = 32  # readers and writers that began this long ago still find theirs
ORPHAN_AGE = timedelta(days=1)  # no writer takes this long from a part to its version
REMEDY = "make it anew with `flywheel episodes ingest --rebuild`"

_IDENTITY = ["prefix", "etag", "arrived_ns", "refused", "reader"]
_UNIQUE = ("episode_id", "prefix", "etag", "problem")  # columns that no dictionary makes smaller


class Part(Strict):
    """One Parquet file of the catalogue."""

    name: str = Field(pattern=r"^[0-9a-f]{32}\.parquet$")
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=DIGEST)

    @property
    def key(self) -> str:
        """Where it lies in the store."""
        return PARTS + self.name


class Version(Strict):
    """``catalogue/log/<n>.json``."""

    schema_version: Literal[1] = 1  # of this document and of the parts' columns
    parts: tuple[Part, ...] = ()

    @property
    def rows(self) -> int:
        """Episodes and refused manifests."""
        return sum(p.rows for p in self.parts)


def newest(store: Store) -> tuple[int, Version]:
    """Number and list of the newest version; ``(0, Version())`` where there is no catalogue yet."""
    found = store.latest(LOG)
    if found is None:
        return 0, Version()
    try:
        return found[0], Version.model_validate_json(found[1])
    except ValidationError as e:
        first = e.errors()[0]
        at = ".".join(str(p) for p in first["loc"])
        raise StoreError(f"{LOG}/{found[0]:08d}.json: {at}: {first['msg']}; {REMEDY}") from None


def read_part(store: Store, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
    """A part, verified against its hash. Raises ``NotFound``, ``IntegrityError``."""
    data = store.get(part.key, part.sha256)
    return pq.read_table(io.BytesIO(data), columns=columns)


def write_part(store: Store, rows: pa.Table) -> Part:
    """Store rows as a part, which no version names yet."""
    ordered = rows.sort_by([("date", "ascending"), ("prefix", "ascending")])
    sink = io.BytesIO()
    repeating = [n for n in COLUMNS.names if n not in _UNIQUE and not pa.types.is_list(COLUMNS.field(n).type)]
    pq.write_table(
        ordered, sink, compression="zstd", row_group_size=GROUP_ROWS, use_dictionary=repeating, version="2.6"
    )
    data = sink.getvalue()
    part = Part(
        name=f"{uuid.uuid4().hex}.parquet", rows=rows.num_rows, bytes=len(data), sha256=sha256_bytes(data)
    )
    store.create(part.key, data, part.sha256)
    return part


class Ledger:
    """The catalogue for somebody who adds to it. What is known of a part is read once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._identities: dict[str, pa.Table | None] = {}

    def known(self) -> pa.Table:
        """Identity columns of every row of the newest version: prefix, etag, arrived_ns, refused, reader.

        A part that is missing or damaged counts as unknown, so what it held is read again.
        """
        _, version = newest(self._store)
        found = [t for p in version.parts if (t := self._identity(p)) is not None]
        return pa.concat_tables(found) if found else COLUMNS.empty_table().select(_IDENTITY)

    def publish(self, rows: pa.Table, gone: pa.Table | None = None) -> int:
        """Add rows and take out those of ``gone`` (by prefix and etag); returns how many came and went.

        A row replaces one of the same prefix and another etag, unless that one arrived later. Rows that
        somebody else added meanwhile are left alone. Nothing is published where nothing changes.
        """
        while True:
            number, version = newest(self._store)
            added, kept, written = self._change(version, rows, gone)
            changed = abs(sum(p.rows for p in kept) - version.rows) + (added.num_rows if added else 0)
            if added is not None:
                written.append(write_part(self._store, added))
                kept.append(written[-1])
            if tuple(kept) == version.parts:
                return 0
            merged, more = self._merged(kept)
            written += more
            if self._append(number, Version(parts=tuple(merged)), written):
                return changed

    def replace(self, parts: Sequence[Part]) -> None:
        """Make these parts the catalogue, whatever it was."""
        while True:
            last = self._store.latest(LOG)
            merged, written = self._merged(parts)
            if self._append(last[0] if last else 0, Version(parts=tuple(merged)), written):
                return

    def sweep(self) -> int:
        """Remove versions that nobody reads any more and parts that none of the others names; how many."""
        versions = [i for i in self._store.list(f"{LOG}/") if i.key.endswith(".json")]
        parts = list(self._store.list(PARTS))
        if not versions:
            return 0
        now = max(i.modified for i in (*versions, *parts))  # the store's own clock
        stale = versions[:-KEPT_VERSIONS]
        for info in stale:  # ascending: see `_append`
            self._store.delete(info.key)
        old = [i for i in parts if now - i.modified > ORPHAN_AGE]
        named: set[str] = set()
        if old:
            for info in versions[-KEPT_VERSIONS:]:
                with suppress(ValidationError):
                    version = Version.model_validate_json(self._store.get(info.key))
                    named |= {p.key for p in version.parts}
        orphans = [i for i in old if i.key not in named]
        for info in orphans:
            self._store.delete(info.key)
        return len(stale) + len(orphans)

    # -- inside

    def _identity(self, part: Part) -> pa.Table | None:
        if part.name not in self._identities:
            try:
                self._identities[part.name] = read_part(self._store, part, _IDENTITY)
            except (NotFound, IntegrityError, pa.ArrowInvalid):
                self._identities[part.name] = None
        return self._identities[part.name]

    def _change(
        self, version: Version, rows: pa.Table, gone: pa.Table | None
    ) -> tuple[pa.Table | None, list[Part], list[Part]]:
        """What of ``rows`` is new; the version's parts without what goes; which of these were written."""
        whole = [(p, t) for p in version.parts if (t := self._identity(p)) is not None]
        held: dict[str, tuple[str, int, int]] = {}
        for _, identity in whole:
            same = identity.filter(pc.is_in(identity["prefix"], value_set=rows["prefix"].combine_chunks()))
            for i in same.to_pylist():
                held[i["prefix"]] = (i["etag"], i["arrived_ns"], i["reader"])
        take = [
            held.get(r["prefix"]) is None or _replaces(r, *held[r["prefix"]])
            for r in rows.select(_IDENTITY).to_pylist()
        ]
        added = rows.filter(pa.array(take, pa.bool_()))
        drop = added["prefix"].combine_chunks()
        without = _versions(gone) if gone is not None else pa.array([], pa.string())
        kept: list[Part] = []
        written: list[Part] = []
        for part, identity in whole:
            hit = pc.or_(
                pc.is_in(identity["prefix"], value_set=drop), pc.is_in(_versions(identity), value_set=without)
            )
            if not pc.any(hit).as_py():
                kept.append(part)
                continue
            rest = read_part(self._store, part).filter(pc.invert(hit))
            if rest.num_rows:
                written.append(write_part(self._store, rest))
                kept.append(written[-1])
        return (added if added.num_rows else None), kept, written

    def _merged(self, parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
        """The parts with many small ones made into fewer; and those that were written for it.

        Parts are merged by size class, so a row is written again O(log rows) times in its life.
        """
        kept, written = list(parts), []
        while small := _mergeable(kept):
            rows = pa.concat_tables([read_part(self._store, p) for p in small])
            rows = rows.sort_by([("date", "ascending"), ("prefix", "ascending")])
            made = [
                write_part(self._store, rows.slice(a, PART_ROWS)) for a in range(0, rows.num_rows, PART_ROWS)
            ]
            written += made
            kept = [p for p in kept if p not in small] + made
        return kept, written

    def _append(self, number: int, version: Version, written: Sequence[Part]) -> bool:
        """Whether ``version`` now follows version ``number``."""
        try:
            self._store.append_version(LOG, number + 1, version.to_bytes())
        except Conflict:
            for part in written:
                self._store.delete(part.key)
            return False
        # Versions are swept in ascending order: while the one below is there, ours was not made in the place
        # of one that had come and gone. Otherwise look again; what was added then needs no adding.
        return number == 0 or self._store.exists(f"{LOG}/{number:08d}.json")


def unknown(seen: pa.Table, known: pa.Table, reader: int) -> pa.Array:
    """Mask of ``seen`` (prefix, etag): what has to be read. A version that was not understood is read again
    by a ``reader`` that knows more."""
    settled = known.filter(
        pc.or_(
            pc.invert(pc.fill_null(pc.equal(known["refused"], "unknown_version"), False)),
            pc.greater_equal(known["reader"], reader),
        )
    )
    return pc.invert(pc.is_in(_versions(seen), value_set=_versions(settled)))


def _versions(identity: pa.Table) -> pa.Array:
    joined = pc.binary_join_element_wise(identity["prefix"], identity["etag"], "\n")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def _replaces(row: dict[str, object], etag: str, arrived_ns: int, reader: int) -> bool:
    if row["etag"] == etag:
        return bool(row["reader"] > reader)  # type: ignore[operator]
    return bool(row["arrived_ns"] >= arrived_ns)  # type: ignore[operator]


def _mergeable(parts: Sequence[Part]) -> list[Part]:
    classes: dict[int, list[Part]] = {}
    for p in parts:
        if p.rows < PART_ROWS:
            size = 0
            while FAN ** (size + 1) <= p.rows:
                size += 1
            classes.setdefault(size, []).append(p)
    return next((found for _, found in sorted(classes.items()) if len(found) >= FAN), [])
