"""``flywheel bench catalogue``: what a question costs, from a thousand episodes to a million.

The catalogues lie in an object store of the benchmark's own. Rows come from manifests through the code that
ingests them; by default some thousand of them are varied by column to make up the million, with ``full``
every one of the million is a manifest that was parsed. At each size the same questions are asked by the
product's query and by a bare pyarrow scan of the same parts in turns, so that both see the same machine.
The rate of ingest is measured with manifests that lie in the store, next to reading them one by one. With
``FLYWHEEL_RAY`` set, that cluster reads and scans.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flywheel import episode
from flywheel.catalogue.engine import load, select
from flywheel.catalogue.ingesting import ingest
from flywheel.catalogue.ledger import PART_ROWS, Ledger, newest, write_part
from flywheel.catalogue.rows import COLUMNS, Sighting, row
from flywheel.catalogue.rows import table as as_table
from flywheel.config import Deployment
from flywheel.edge.bench import machine
from flywheel.edge.figures import Quantiles
from flywheel.schema import EPISODE_FILES, MANIFEST_FILE, FileEntry, Manifest, Outcome, Trigger, TriggerKind
from flywheel.store import Store

SIZES = (1_000, 10_000, 100_000, 1_000_000)
BAR_S = 2.0  # a question of a million manifests, after the first load
SITES, ROBOTS, DAYS, POLICIES = 20, 200, 365, 40
DAY_NS = 86_400_000_000_000
EPOCH_NS = 1_767_225_600_000_000_000
LIMIT = 1000  # as `flywheel episodes ls`
ANSWER = ("prefix", "outcome", "triggers", "task", "shift", "problem")
QUESTIONS = {  # by name: as asked of the product
    "failures_of_a_site": "outcome = 'timeout' and site = 'site-03'",
    "interventions_of_a_policy": "list_contains(triggers, 'intervention') and policy_digest like '07%'",
    "long_with_gaps": "seconds > 25 and gaps > 2 and shift in ('dark', 'wet')",
    "one_episode": "episode_id = '{id}'",
}


def catalogue(full: bool = False) -> dict[str, Any]:
    """A minute, or with ``full`` some more; returns the document of ``flywheel bench --json``.

    Raises ``ServiceError`` where the embedded store cannot be started.
    """
    from flywheel.services.ceph import Ceph

    before = os.getloadavg()
    ray = Deployment.from_env().ray
    home = Path(tempfile.mkdtemp(prefix="flywheel-catalogue-"))
    ceph = Ceph(home / "store")
    try:
        (home / "store").mkdir()
        e = ceph.up(lambda _: None)
        store = Store(
            f"s3://{e.bucket}", e.endpoint, access_key=e.access_key, secret_key=e.secret_key, region=e.region
        )
        figures = _ingest(store.sub("ingest"), 4000 if full else 400, ray)
        catalogues, made = _catalogues(store, full)
        figures |= made | _ask(catalogues, 60.0 if full else 12.0, ray)
    finally:
        ceph.down()
        shutil.rmtree(home, ignore_errors=True)
    slowest = figures[f"query_{SIZES[-1]}_max_s"]
    return {
        "bench": "catalogue",
        "machine": machine(),
        "load": {
            "before": before,
            "after": os.getloadavg(),
            "named": "one embedded store, one process that asks; the machine's own load besides",
            "questions": QUESTIONS,
            "engine": f"ray at {ray}" if ray else "in process",
            "rows_by_manifest": "all" if full else "some thousand, varied by column",
        },
        "figures": figures,
        "bars": {"query_million_s": {"value": slowest, "op": "<", "bar": BAR_S, "ok": slowest < BAR_S}},
    }


def table(doc: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """What people look at: cost by size; draws it, too."""
    f = doc["figures"]
    lines = [
        [
            n,
            *(f[f"query_{n}_{k}_s"] for k in ("p50", "p99", "max")),
            f[f"query_{n}_n"],
            f[f"pyarrow_{n}_p50_s"],
        ]
        for n in SIZES
    ]
    path = Deployment.from_env().home / "bench" / "catalogue.png"
    _draw(f, path)
    lines.append([f"plot: {path}", *[""] * 5])
    return ["episodes", "p50 s", "p99 s", "max s", "n", "pyarrow p50 s"], lines


# ── ingest ───────────────────────────────────────────────────────────────────────────────────────────


def _ingest(store: Store, n: int, ray: str) -> dict[str, float]:
    documents = list(_manifests(n, 1))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda m: store.put(m[0] + MANIFEST_FILE, m[1]), documents))
    load(ray)
    begun = time.perf_counter()
    found = ingest(store, ray=ray)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    again = ingest(store, ray=ray)
    second = time.perf_counter() - begun
    begun = time.perf_counter()
    one_by_one = sum(1 for _ in episode.ls(store))
    slow = time.perf_counter() - begun
    if (found.read, again.read, one_by_one) != (n, 0, n):
        raise RuntimeError(f"{n} manifests: {found}, then {again}, {one_by_one} listed")
    return {
        "ingest_per_s": n / first,
        "ingest_n": float(n),
        "ingest_without_news_s": second,
        "ingest_ratio_one_by_one": slow / first,
    }


# ── a million rows ───────────────────────────────────────────────────────────────────────────────────


def _catalogues(store: Store, full: bool) -> tuple[dict[int, tuple[Store, str]], dict[str, float]]:
    """A catalogue of each size, with the id of one of its episodes; how fast rows come of manifests."""
    n = SIZES[-1] if full else 4000
    begun = time.perf_counter()
    parsed = [as_table(chunk) for chunk in _chunks(n)]
    parse = time.perf_counter() - begun
    rows = pa.concat_tables(parsed).combine_chunks()
    if not full:
        rows = _varied(rows, SIZES[-1])
    out: dict[int, tuple[Store, str]] = {}
    begun = time.perf_counter()
    for size in SIZES:
        at = store.sub(f"rows-{size}")
        some = rows.slice(0, size)
        parts = [write_part(at, some.slice(a, PART_ROWS)) for a in range(0, size, PART_ROWS)]
        Ledger(at).replace(parts)
        out[size] = (at, some["episode_id"][size // 2].as_py())
    written = time.perf_counter() - begun
    stored = sum(p.bytes for p in newest(out[SIZES[-1]][0])[1].parts)
    sizes = {"bytes_per_episode": stored / SIZES[-1]} if full else {}  # varied rows are more alike
    return out, sizes | {
        "rows_from_manifests_per_s": n / parse,
        "rows_from_manifests_n": float(n),
        "rows_written_per_s": sum(SIZES) / written,
    }


def _chunks(n: int, length: int = 50_000) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for k, (prefix, data) in enumerate(_manifests(n, 2)):
        chunk.append(row(Sighting(prefix, len(data), f"{k:032x}", EPOCH_NS + k), data))
        if len(chunk) == length:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _manifests(n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Prefix and bytes of ``n`` manifests, no two alike."""
    rng = np.random.default_rng(seed)
    outcomes, kinds = list(Outcome), list(TriggerKind)
    digests = [bytes([k] * 32).hex() for k in range(POLICIES)]
    files = tuple(FileEntry(name=f, rows=9000, bytes=400_000, sha256="5a" * 32) for f in EPISODE_FILES)
    for k in range(n):
        robot = int(rng.integers(ROBOTS))
        start = int(rng.integers(DAYS)) * DAY_NS + int(rng.integers(DAY_NS // 2))
        seconds = float(rng.uniform(2, 30))
        window = (start, start + int(seconds * 1e9))
        m = Manifest(
            episode_id=episode.new_episode_id(EPOCH_NS + start, rng),
            site=f"site-{robot % SITES:02d}",
            robot=f"robot-{robot:03d}",
            joints=6,
            cameras=("wrist", "scene"),
            state_dim=7,
            action_dim=4,
            chunk=16,
            control_hz=1000.0,
            policy_hz=10.0,
            task=("pick the red box", "pick the blue box", "clear the table")[int(rng.integers(3))],
            shift=("", "dark", "wet", "factory", "camera")[int(rng.integers(5))],
            seed=k,
            outcome=outcomes[int(rng.integers(len(outcomes)))],
            triggers=(Trigger(kind=kinds[int(rng.integers(len(kinds)))], t_ns=window[1]),),
            window_ns=window,
            policy_digest=digests[int(rng.integers(POLICIES))],
            runtime_version="0.1.0",
            clock="wall",
            clock_epoch_ns=EPOCH_NS,
            gaps=int(rng.poisson(0.5)),
            drops=int(rng.poisson(0.1)),
            files=files,
        )
        yield m.prefix, m.to_bytes()


def _varied(rows: pa.Table, n: int) -> pa.Table:
    """``n`` rows: the given ones again and again, each with an id, a place, a seed and an etag of its own."""
    rng = np.random.default_rng(3)
    out = rows.take(pa.array(rng.integers(rows.num_rows, size=n)))
    stamps = out["start_ns"].to_numpy() // 1_000_000
    tails = rng.bytes(10 * n).hex()
    ids, prefixes = [], []
    places = zip(out["site"].to_pylist(), out["robot"].to_pylist(), out["date"].to_pylist(), strict=True)
    for k, (ms, (site, robot, date)) in enumerate(zip(stamps.tolist(), places, strict=True)):
        h, tail = f"{ms:012x}", tails[k * 20 : k * 20 + 20]
        ids.append(f"{h[:8]}-{h[8:]}-7{tail[:3]}-8{tail[3:6]}-{tail[6:18]}")
        prefixes.append(f"episodes/site={site}/robot={robot}/date={date}/{ids[-1]}/")
    etags = rng.bytes(16 * n).hex()
    new = {
        "episode_id": pa.array(ids),
        "prefix": pa.array(prefixes),
        "seed": pa.array(np.arange(n)),
        "etag": pa.array([etags[k * 32 : k * 32 + 32] for k in range(n)]),
    }
    for name, column in new.items():
        out = out.set_column(COLUMNS.get_field_index(name), COLUMNS.field(name), column)
    return out


# ── questions ────────────────────────────────────────────────────────────────────────────────────────


def _ask(catalogues: dict[int, tuple[Store, str]], seconds: float, ray: str) -> dict[str, float]:
    million, some_id = catalogues[SIZES[-1]]
    begun = time.perf_counter()
    _ours(million, QUESTIONS["failures_of_a_site"], ray)
    figures = {"first_load_s": time.perf_counter() - begun}
    ours: dict[int, list[float]] = {n: [] for n in SIZES}
    bare: dict[int, list[float]] = {n: [] for n in SIZES}
    by_name: dict[str, list[float]] = {q: [] for q in QUESTIONS}
    until = time.monotonic() + seconds
    rounds = 0
    while rounds < 3 or time.monotonic() < until:
        for size, (store, some_id) in catalogues.items():
            for name, question in QUESTIONS.items():
                begun = time.perf_counter()
                found = _ours(store, question.format(id=some_id), ray)
                between = time.perf_counter()
                same = _pyarrow(store, name, some_id)
                ended = time.perf_counter()
                if rounds == 0 and not found.equals(same.cast(found.schema)):
                    raise RuntimeError(f"{name} of {size}: {found.num_rows} rows, pyarrow {same.num_rows}")
                ours[size].append(between - begun)
                bare[size].append(ended - between)
                if size == SIZES[-1]:
                    by_name[name].append(between - begun)
        rounds += 1
    for size in SIZES:
        q = Quantiles.of(np.array(ours[size]))
        figures |= {f"query_{size}_{k}_s": getattr(q, k) for k in ("p50", "p99", "p999", "max")}
        figures[f"query_{size}_n"] = float(q.n)
        figures[f"pyarrow_{size}_p50_s"] = float(np.median(bare[size]))
        figures[f"query_{size}_ratio_pyarrow"] = float(np.median(np.array(ours[size]) / np.array(bare[size])))
    figures |= {f"{name}_p50_s": float(np.median(taken)) for name, taken in by_name.items()}
    small, large = (figures[f"query_{n}_p50_s"] for n in (SIZES[0], SIZES[-1]))
    figures["growth_exponent"] = float(np.log(large / small) / np.log(SIZES[-1] / SIZES[0]))
    return figures


def _ours(store: Store, question: str, ray: str) -> pa.Table:
    return select(store, question, ANSWER, LIMIT, ray=ray)


def _pyarrow(store: Store, name: str, some_id: str) -> pa.Table:
    """The same question as a bare scan: pyarrow's own reader, pushdown and file system."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    from pyarrow.fs import S3FileSystem

    access = store.access()
    host = (store.endpoint or "").partition("://")[2]
    files = S3FileSystem(
        access_key=access.access_key,
        secret_key=access.secret_key,
        region=access.region,
        endpoint_override=host,
        scheme="http",
    )
    paths = [f"{store.bucket}/{store.prefix}{p.key}" for p in newest(store)[1].parts]
    f = ds.field
    asked = {
        "failures_of_a_site": (f("outcome") == "timeout") & (f("site") == "site-03"),
        "interventions_of_a_policy": pc.starts_with(f("policy_digest"), "07"),
        "long_with_gaps": (f("seconds") > 25) & (f("gaps") > 2) & f("shift").isin(["dark", "wet"]),
        "one_episode": f("episode_id") == some_id,
    }[name]
    data = ds.dataset(paths, schema=COLUMNS, filesystem=files, format="parquet")
    found = data.to_table(columns=list(ANSWER), filter=asked)
    if name == "interventions_of_a_policy":  # pyarrow has no kernel that looks into lists
        kinds = found["triggers"].to_pylist()
        found = found.filter(pa.array(["intervention" in k for k in kinds], pa.bool_()))
    return found.sort_by("prefix").slice(0, LIMIT)


def _draw(figures: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for label, key in (("flywheel, p50", "query_{}_p50_s"), ("flywheel, max", "query_{}_max_s")):
        axes.plot(SIZES, [figures[key.format(n)] for n in SIZES], "o-", label=label)
    axes.plot(SIZES, [figures[f"pyarrow_{n}_p50_s"] for n in SIZES], "s--", label="bare pyarrow scan, p50")
    axes.axhline(BAR_S, color="grey", linewidth=0.8, label="bar")
    axes.set(xscale="log", yscale="log", xlabel="episodes in the catalogue", ylabel="seconds for a question")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
