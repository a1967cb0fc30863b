"""Daft, in this process or on a Ray cluster: columnar scans of the catalogue, and many objects at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flywheel.catalogue import where as condition
from flywheel.catalogue.ledger import LOG, REMEDY, Version, newest
from flywheel.catalogue.rows import COLUMNS
from flywheel.errors import ConfigError, NotFound, ServiceError, StoreError, StoreUnavailable
from flywheel.store import Store

if TYPE_CHECKING:
    from daft import DataFrame
    from daft.io import IOConfig

CONNECT_MS = 5_000
READ_MS = 20_000
ATTEMPTS = 3
BACKOFF_MS = 100
CONNECTIONS = 32
RAY_PARTITIONS = 8  # that a chunk of downloads is spread over


def select(
    store: Store,
    where: str = "",
    columns: Sequence[str] = (),
    limit: int | None = None,
    *,
    ray: str = "",
    **equal: str,
) -> pa.Table:
    """The catalogue's rows that satisfy ``where``, ordered by prefix; only the parts are read.

    ``where`` is an SQL condition on ``COLUMNS`` (see ``flywheel.catalogue.where``), ``equal`` are further
    ones (``site="lab"``; empty means any), ``columns`` what to return (default: all), ``ray`` the address of
    a Ray cluster (see ``flywheel.config.Deployment``).

    Raises ``ConfigError`` for a condition that cannot be asked, ``NotFound`` where there is no catalogue,
    ``StoreError``.
    """
    names = _known(columns or COLUMNS.names)
    daft = load(ray)
    text = condition.check(where) if where else ""
    for attempt in (1, 2):
        number, version = newest(store)
        if number == 0:
            raise NotFound(f"{LOG}: {store} has no catalogue yet; make it with `flywheel episodes ingest`")
        try:
            frame = scan(store, version)
            for name, value in equal.items():
                if value:
                    frame = frame.where(daft.col(_known([name])[0]) == value)
            if text:
                frame = _filtered(daft, frame, text, where)
            frame = frame.select(*dict.fromkeys([*names, "prefix"])).sort("prefix")
            if limit is not None:
                frame = frame.limit(limit)
            found = frame.to_arrow()
        except daft.exceptions.DaftTransientError as e:
            raise StoreUnavailable(f"{store}: {_first_line(e)}; is the store up?") from None
        except FileNotFoundError as e:
            if attempt == 1:
                continue  # swept while we were about to read it: a newer version is there
            raise StoreError(
                f"{store}: a part of the catalogue is missing: {_first_line(e)}; {REMEDY}"
            ) from None
        except (daft.exceptions.DaftCoreException, OSError) as e:
            raise StoreError(f"{store}: the catalogue cannot be read: {_first_line(e)}; {REMEDY}") from None
        return found.cast(pa.schema([COLUMNS.field(n) for n in found.column_names])).select(list(names))
    raise AssertionError


def scan(store: Store, version: Version) -> DataFrame:
    """A version's rows as a lazy Daft frame, read from the store where it is needed."""
    import daft

    if not version.parts:
        return daft.from_arrow(COLUMNS.empty_table())
    urls = [_url(store, p.key) for p in version.parts]
    types = {f.name: daft.DataType.from_arrow_type(f.type) for f in COLUMNS}
    return daft.read_parquet(urls, infer_schema=False, schema=types, io_config=_io(store))


def download(store: Store, keys: Sequence[str], ray: str = "") -> dict[str, bytes]:
    """Objects by key, **unverified**, read as fast as the store gives them; those that failed are not there.

    A fifth of the CPU that ``Store.get`` takes for each.
    """
    daft = load(ray)
    from daft.functions import download as fetch

    frame = daft.from_pydict({"key": list(keys), "url": [_url(store, k) for k in keys]})
    if ray:
        frame = frame.into_partitions(RAY_PARTITIONS)
    body = fetch(daft.col("url"), max_connections=CONNECTIONS, on_error="null", io_config=_io(store))
    try:
        found = frame.select("key", body.alias("data")).where(daft.col("data").not_null()).to_pydict()
    except (daft.exceptions.DaftCoreException, OSError):
        return {}
    return dict(zip(found["key"], found["data"], strict=True))


def _url(store: Store, key: str) -> str:
    return f"s3://{store.bucket}/{store.prefix}{key}"


def _io(store: Store) -> IOConfig:
    from daft.io import IOConfig, S3Config

    access = store.access()
    s3 = S3Config(
        region_name=access.region,
        endpoint_url=store.endpoint,
        key_id=access.access_key,
        access_key=access.secret_key,
        session_token=access.token,
        use_ssl=not (store.endpoint or "").startswith("http://"),
        num_tries=ATTEMPTS,
        retry_initial_backoff_ms=BACKOFF_MS,
        connect_timeout_ms=CONNECT_MS,
        read_timeout_ms=READ_MS,
    )
    return IOConfig(s3=s3)


def load(ray: str = "") -> Any:
    """Daft, running here or on the Ray cluster at ``ray`` (one or the other for the life of a process)."""
    # Before the import: they report themselves to their makers otherwise, and draw bars over our output.
    for name in ("DAFT_ANALYTICS_ENABLED", "DAFT_PROGRESS_BAR", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")
    try:
        import daft
        import daft.exceptions
    except ImportError:
        raise ConfigError("daft is not installed: install flywheel[cloud]") from None
    if ray and importlib.util.find_spec("ray") is None:
        raise ConfigError(f"FLYWHEEL_RAY={ray!r}: Ray is not installed; install flywheel[ray]")
    wanted = "ray" if ray else "native"
    try:
        if ray:
            daft.set_runner_ray(None if ray == "local" else ray, noop_if_initialized=True)
        else:
            daft.set_runner_native()
    except daft.exceptions.DaftCoreException as e:
        if "more than once" not in str(e):
            raise ServiceError(f"FLYWHEEL_RAY={ray!r}: {_first_line(e)}; is the cluster up?") from None
        if daft.get_or_infer_runner_type() != wanted:
            raise ConfigError(
                f"FLYWHEEL_RAY={ray!r}: Daft runs otherwise in this process already; set it before the start"
            ) from None
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise ServiceError(f"FLYWHEEL_RAY={ray!r}: {_first_line(e)}; is the cluster up?") from None
    return daft


def _filtered(daft: Any, frame: DataFrame, text: str, where: str) -> DataFrame:
    """``frame`` where ``text`` holds. Daft reports mistakes of type here, before anything is read."""
    try:
        return frame.where(daft.sql_expr(text))
    except Exception as e:  # its SQL errors share no ancestor with the others
        if not type(e).__module__.startswith("daft"):
            raise
        types = ", ".join(f"{f.name} {f.type}" for f in COLUMNS if f.name in text)
        raise ConfigError(f"--where {where[:200]!r}: {_reason(e)}; types: {types}") from None


def _known(columns: Sequence[str]) -> list[str]:
    for name in columns:
        if name not in COLUMNS.names:
            raise ConfigError(f"unknown column {name!r}; columns: {', '.join(COLUMNS.names)}")
    return list(columns)


def _reason(e: Exception) -> str:
    """The innermost of the causes that Daft strings together."""
    lines = [x.strip() for x in str(e).splitlines() if x.strip()]
    told = [x for x in lines if "Error" in x or x.startswith(("REASON", "Expected"))]
    return (told[-1] if told else lines[0] if lines else type(e).__name__)[:300]


def _first_line(e: BaseException) -> str:
    return next((x.strip() for x in str(e).splitlines() if x.strip()), type(e).__name__)[:300]
