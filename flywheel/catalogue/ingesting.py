"""Bring the catalogue up to date with the store: each manifest is read once, in parallel, and never again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import md5
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flywheel.catalogue.engine import download
from flywheel.catalogue.ledger import Ledger, Part, unknown, write_part
from flywheel.catalogue.rows import (
    COLUMNS,
    EPISODES,
    MANIFEST_BYTES_MAX,
    Refused,
    Sighting,
    is_manifest,
    refusal,
    row,
    table,
)
from flywheel.errors import IntegrityError, NotFound, StoreError, StoreRefused, StoreUnavailable
from flywheel.schema import EPISODE_SCHEMA_VERSION, MANIFEST_FILE, Strict
from flywheel.store import ObjectInfo, Store

BATCH_ROWS = 20_000  # read between two publications: what a crash costs
READERS = 16  # as many as the store's client holds connections
CHUNK = 2_000  # manifests that are asked for together …
CHUNK_BYTES = 64 << 20  # … and held together
FEW = 64  # so many are not worth Daft's start

OnProgress = Callable[[int, int], None]  # manifests seen, manifests read

_SEEN = pa.schema([("prefix", pa.string()), ("etag", pa.string())])
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Ingested(Strict):
    """What an ingest found and did."""

    schema_version: int = 1
    seen: int  # manifests in the store
    read: int
    refused: int  # of those that were read
    vanished: int  # rows taken out: their manifest is no longer in the store


def ingest(
    store: Store,
    *,
    rebuild: bool = False,
    batch_rows: int = BATCH_ROWS,
    ray: str = "",
    on_progress: OnProgress | None = None,
) -> Ingested:
    """List the store, read the manifests that are not catalogued as they are now, publish their rows.

    Any number of times, in any order, by any number of processes at once; killed at any point, the next one
    goes on from the last published batch. When nothing arrives any more the catalogue is a function of the
    store. A manifest that cannot be used is a row with its reason. ``rebuild`` reads everything anew and
    replaces the catalogue at the end, whatever state it was in. ``ray``: a cluster that does the reading.

    Raises ``StoreUnavailable``; ``StoreRefused`` after everything else was read, if single manifests were
    denied.
    """
    ledger = Ledger(store)
    known = (
        COLUMNS.empty_table().select(["prefix", "etag", "refused", "reader"]) if rebuild else ledger.known()
    )
    run = _Run(store, ledger, batch_rows, rebuild, ray)
    listed: list[pa.Table] = []
    seen = 0
    for page in _sightings(store):
        identities = pa.Table.from_pylist([{"prefix": s.prefix, "etag": s.etag} for s in page], schema=_SEEN)
        listed.append(identities)
        seen += len(page)
        fresh = unknown(identities, known, EPISODE_SCHEMA_VERSION).to_pylist()
        run.read([s for s, new in zip(page, fresh, strict=True) if new])
        if on_progress is not None:
            on_progress(seen, run.count)
    present = pa.concat_tables([*listed, _SEEN.empty_table()])["prefix"].combine_chunks()
    # Known before the listing began and not in it: deleted. Nothing that came meanwhile is meant.
    gone = known.filter(pc.invert(pc.is_in(known["prefix"], value_set=present)))
    run.finish(gone)
    if run.denied is not None:
        raise run.denied
    return Ingested(seen=seen, read=run.count, refused=run.refused, vanished=gone.num_rows)


class _Run:
    """Rows on their way into the ledger."""

    def __init__(self, store: Store, ledger: Ledger, batch_rows: int, rebuild: bool, ray: str) -> None:
        self._store, self._ledger, self._batch, self._rebuild = store, ledger, batch_rows, rebuild
        self._ray, self._bulk = ray, True
        self._waiting: list[dict[str, Any]] = []
        self._parts: list[Part] = []  # of a rebuild: nobody sees them before it ends
        self.count = self.refused = 0
        self.denied: StoreRefused | None = None

    def read(self, sightings: list[Sighting]) -> None:
        with ThreadPoolExecutor(READERS, "manifests") as pool:
            for chunk in _chunks(sightings, min(self._batch, CHUNK)):
                for found in pool.map(self._row, chunk, self._many(chunk)):
                    if found is not None:
                        self._waiting.append(found)
                        self.count += 1
                        self.refused += found["refused"] is not None
                if len(self._waiting) >= self._batch:
                    self._flush()

    def finish(self, gone: pa.Table) -> None:
        if self._rebuild:
            self._flush()
            self._ledger.replace(self._parts)
        elif self._waiting or gone.num_rows:
            self._ledger.publish(table(self._waiting), gone)
        self._ledger.sweep()

    def _flush(self) -> None:
        rows, self._waiting = table(self._waiting), []
        if not self._rebuild:
            self._ledger.publish(rows)
        elif rows.num_rows:
            self._parts.append(write_part(self._store, rows))

    def _many(self, chunk: list[Sighting]) -> list[bytes | None]:
        """Bytes of those that came and are what was listed; the store itself is asked for the others."""
        if len(chunk) < FEW or not self._bulk:
            return [None] * len(chunk)
        sound = [s.prefix + MANIFEST_FILE for s in chunk if s.size <= MANIFEST_BYTES_MAX]
        got = download(self._store, sound, self._ray)
        out = [_as_listed(got.get(s.prefix + MANIFEST_FILE), s.etag) for s in chunk]
        self._bulk = any(out)  # a store that encrypts has other etags than the MD5 of what it gives
        return out

    def _row(self, seen: Sighting, data: bytes | None) -> dict[str, Any] | None:
        if data is not None:
            return row(seen, data)
        key = seen.prefix + MANIFEST_FILE
        if seen.size > MANIFEST_BYTES_MAX:
            return refusal(
                seen, Refused.TOO_LARGE, f"{key}: {seen.size} bytes, more than {MANIFEST_BYTES_MAX}"
            )
        try:
            return row(seen, self._store.get(key))
        except NotFound:
            return None  # deleted since it was listed
        except IntegrityError as e:
            # What the store lists counts here, as in `_many`; whoever pulls the episode is told of the rest.
            listed = _as_listed(b"".join(self._store.stream(key)), seen.etag)
            return row(seen, listed) if listed is not None else refusal(seen, Refused.CORRUPT, str(e))
        except StoreUnavailable:
            raise
        except StoreRefused as e:  # the others are read all the same; this one again, once a person has acted
            self.denied = e
            return None
        except StoreError as e:
            return refusal(seen, Refused.UNREADABLE, str(e))


def _as_listed(data: bytes | None, etag: str) -> bytes | None:
    if data is None or md5(data, usedforsecurity=False).hexdigest() != etag:
        return None
    return data


def _chunks(sightings: list[Sighting], length: int) -> Iterator[list[Sighting]]:
    chunk: list[Sighting] = []
    size = 0
    for s in sightings:
        if chunk and (len(chunk) == length or size + s.size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(s)
        size += s.size
    if chunk:
        yield chunk


def _sightings(store: Store, length: int = BATCH_ROWS) -> Iterator[list[Sighting]]:
    """Every manifest that the store lists, some thousand at a time."""
    page: list[Sighting] = []
    for info in store.list(EPISODES):
        if is_manifest(info.key):
            page.append(_sighting(info))
            if len(page) == length:
                yield page
                page = []
    if page:
        yield page


def _sighting(info: ObjectInfo) -> Sighting:
    arrived_ns = (info.modified - _EPOCH) // timedelta(microseconds=1) * 1000
    return Sighting(info.key.removesuffix(MANIFEST_FILE), info.size, info.etag, arrived_ns)
