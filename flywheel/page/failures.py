"""The failure log: episodes that wait in the inbox, and those that a turn took, each with its failure mode.

What is listed comes from the inbox and from the claims, so no listing of every episode is needed. A manifest
is sealed once and never edited: each is read once, a batch at a look, the newest first.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from flywheel import episode
from flywheel.claims import INBOX, LOG, MARKER, Claims, Marker
from flywheel.errors import FlywheelError, NotFound, StoreError, StoreRefused, StoreUnavailable
from flywheel.page.shown import unix
from flywheel.schema import MANIFEST_FILE, Manifest
from flywheel.store import Store

MOST = 2000  # failures that are listed, the newest
BATCH = 300  # manifests that one look reads
LABELLED_TURNS = 20  # the newest turns whose labels are looked for
LABELS_BYTES_MAX = 16 << 20
READERS = 8
PREFIX = re.compile(
    r"episodes/site=(?P<site>[^/]+)/robot=(?P<robot>[^/]+)/date=\d{4}-\d\d-\d\d/(?P<id>[0-9a-f-]{36})/"
)


class Label(NamedTuple):
    """What a turn's labelling said of an episode."""

    mode: str
    cause: str
    confidence: float


class Facts(NamedTuple):
    """What a manifest says, as far as a list shows it."""

    kind: str
    outcome: str
    operator: str
    task: str
    shift: str
    policy: str
    failed_unix_s: float
    cameras: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """One episode of the failure log. ``turn`` is "" while it waits; ``facts`` None until it was read."""

    episode_id: str
    prefix: str
    site: str
    robot: str
    turn: str
    facts: Facts | None = None
    label: Label | None = None
    problem: str = ""

    @property
    def mode(self) -> str:
        """How it failed: as it was labelled, else as the trigger has it."""
        if self.label is not None:
            return self.label.mode
        return self.facts.kind if self.facts is not None else ""


@dataclass(frozen=True, slots=True)
class FailureLog:
    """The newest failures, the newest first."""

    all: tuple[Failure, ...]
    waiting: int  # in the inbox, listed here or not
    unread: int  # listed, and not read yet

    def find(self, prefix: str) -> Failure | None:
        """The one that lies at a prefix."""
        return next((f for f in self.all if f.prefix == prefix), None)


class Cluster(NamedTuple):
    """Failures of one mode: how many wait, how many a turn took, how sure the labels are on average."""

    mode: str
    waiting: int
    taken: int
    confidence: float | None
    causes: tuple[tuple[str, int], ...]
    newest: Failure

    @property
    def total(self) -> int:
        """All of them."""
        return self.waiting + self.taken


class Index:
    """Reads the failure log; nothing that cannot change is read twice."""

    def __init__(self) -> None:
        self._markers: dict[str, Failure] = {}
        self._claims: dict[int, Claims] = {}
        self._facts: dict[str, Facts | str] = {}  # by prefix; a text is why there are none
        self._labels: dict[str, dict[str, Label]] = {}  # by turn

    def read(self, store: Store) -> FailureLog:
        """The failure log as it is in the store."""
        waiting, known = self._inbox(store)
        taken = [
            Failure(c.episode_id, c.prefix, *_place(c.prefix), claims.turn, problem=c.problem)
            for claims in self._taken(store)
            for c in claims.episodes
        ]
        unique = {f.episode_id: f for f in (*taken, *known)}
        listed = sorted(unique.values(), key=lambda f: f.episode_id, reverse=True)[:MOST]
        self._read_facts(store, [f.prefix for f in listed if not f.problem])
        self._read_labels(store, dict.fromkeys(f.turn for f in listed if f.turn))
        done = tuple(self._with_facts(f) for f in listed)
        return FailureLog(done, waiting, sum(f.facts is None and not f.problem for f in done))

    def _inbox(self, store: Store) -> tuple[int, list[Failure]]:
        keys = [i.key for i in store.list(INBOX) if MARKER.fullmatch(i.key)]
        newest = keys[-MOST:]
        self._markers = {k: self._markers[k] for k in newest if k in self._markers}
        fresh = [k for k in reversed(newest) if k not in self._markers][:BATCH]

        def read(key: str) -> Failure | None:
            match = MARKER.fullmatch(key)
            name = match["episode_id"] if match else ""
            try:
                marker = store.get_json(key, Marker)
            except NotFound:
                return None
            except (StoreUnavailable, StoreRefused):
                raise
            except StoreError as e:
                return Failure(name, "", "", "", "", problem=str(e))
            site, robot = _place(marker.prefix)
            problem = "" if site else f"its marker names {marker.prefix[:200]!r}, where no episode can lie"
            return Failure(name, marker.prefix, site, robot, "", problem=problem)

        with ThreadPoolExecutor(READERS) as pool:
            self._markers |= {k: f for k, f in zip(fresh, pool.map(read, fresh), strict=True) if f}
        return len(keys), list(self._markers.values())

    def _taken(self, store: Store) -> list[Claims]:
        numbers = []
        for info in store.list(f"{LOG}/"):
            stem, _, ending = info.key.removeprefix(f"{LOG}/").partition(".")
            if ending == "json" and stem.isdigit():
                numbers.append(int(stem))
        found, episodes = [], 0
        for n in sorted(numbers, reverse=True):
            if episodes >= MOST:
                break
            if n not in self._claims:
                self._claims[n] = store.get_json(f"{LOG}/{n:08d}.json", Claims)
            found.append(self._claims[n])
            episodes += len(self._claims[n].episodes)
        return found

    def _read_facts(self, store: Store, prefixes: Sequence[str]) -> None:
        self._facts = {p: self._facts[p] for p in prefixes if p in self._facts}
        missing = [p for p in prefixes if p not in self._facts][:BATCH]

        def read(prefix: str) -> Facts | str:
            key = prefix + MANIFEST_FILE
            try:
                m = episode.parse_manifest(store.get(key), key)
            except (StoreUnavailable, StoreRefused):
                raise
            except FlywheelError as e:
                return str(e)
            return facts_of(m) if m.prefix == prefix else f"{key}: describes {m.prefix}"

        with ThreadPoolExecutor(READERS) as pool:
            self._facts |= dict(zip(missing, pool.map(read, missing), strict=True))

    def _read_labels(self, store: Store, turns: Iterable[str]) -> None:
        for turn in list(turns)[:LABELLED_TURNS]:
            if turn not in self._labels and (found := read_labels(store, turn)) is not None:
                self._labels[turn] = found

    def _with_facts(self, f: Failure) -> Failure:
        facts = self._facts.get(f.prefix)
        label = self._labels.get(f.turn, {}).get(f.episode_id)
        problem = f.problem or (facts if isinstance(facts, str) else "")
        found = facts if isinstance(facts, Facts) else None
        return Failure(f.episode_id, f.prefix, f.site, f.robot, f.turn, found, label, problem)


def facts_of(m: Manifest) -> Facts:
    """What a list shows of an episode."""
    failed = m.triggers[0] if m.triggers else None
    return Facts(
        failed.kind.value if failed else "",
        m.outcome.value,
        m.operator_outcome.value if m.operator_outcome else "",
        m.task,
        m.shift,
        m.policy_digest,
        unix(m.clock_epoch_ns + (failed.t_ns if failed else m.window_ns[0])),
        m.cameras,
    )


def read_labels(store: Store, turn: str) -> dict[str, Label] | None:
    """What a turn's labelling said, by episode, verified by the hash beside its figures; None if there is
    none that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        figures = json.loads(store.get(f"runs/{turn}/workspace/data/labels/labels.json"))
        lock = yaml.safe_load(store.get(f"runs/{turn}/workspace/dvc.lock"))
        outs = lock["stages"]["label"]["outs"]
        md5 = next(str(o["md5"]) for o in outs if o["path"] == "data/labels/labels.parquet")
        data = store.get(f"dvc/files/md5/{md5[:2]}/{md5[2:]}", str(figures["labels_sha256"]))
    except (NotFound, StopIteration, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
    except (StoreUnavailable, StoreRefused):
        raise
    except StoreError:
        return None
    if len(data) > LABELS_BYTES_MAX:
        return None
    try:
        table = pq.read_table(io.BytesIO(data), columns=["episode_id", "failure_mode", "cause", "confidence"])
    except (pa.ArrowException, ValueError, OSError):
        return None
    return {
        str(r["episode_id"]): Label(str(r["failure_mode"]), str(r["cause"]), float(r["confidence"]))
        for r in table.to_pylist()
    }


def clusters(failures: Iterable[Failure]) -> list[Cluster]:
    """Failures by mode, the most frequent first. Pure."""
    groups: dict[str, list[Failure]] = {}
    for f in failures:
        if f.mode:
            groups.setdefault(f.mode, []).append(f)
    found = []
    for mode, members in groups.items():
        labels = [f.label for f in members if f.label is not None]
        causes = Counter(x.cause for x in labels if x.cause not in ("", "none"))
        sure = sum(x.confidence for x in labels) / len(labels) if labels else None
        waiting = sum(not f.turn for f in members)
        newest = max(members, key=lambda f: f.episode_id)
        common = tuple(causes.most_common(3))
        found.append(Cluster(mode, waiting, len(members) - waiting, sure, common, newest))
    return sorted(found, key=lambda c: (-c.total, c.mode))


def select(failures: Iterable[Failure], **wanted: str) -> list[Failure]:
    """Those that a request asks for: by mode, site, robot, turn (``waiting`` for none) and ``q``. Pure."""
    needle = wanted.pop("q", "").casefold()
    tests: Mapping[str, Any] = {
        "mode": lambda f, x: f.mode == x,
        "site": lambda f, x: f.site == x,
        "robot": lambda f, x: f.robot == x,
        "turn": lambda f, x: not f.turn if x == "waiting" else f.turn == x,
    }
    asked = [(tests[k], v) for k, v in wanted.items() if v]
    return [f for f in failures if all(t(f, v) for t, v in asked) and (not needle or needle in _text(f))]


def _text(f: Failure) -> str:
    facts = (f.facts.task, f.facts.kind, f.facts.outcome, f.facts.shift, f.facts.policy) if f.facts else ()
    return " ".join((f.episode_id, f.robot, f.site, f.turn, f.mode, *facts)).casefold()


def _place(prefix: str) -> tuple[str, str]:
    m = PREFIX.fullmatch(prefix)
    return (m["site"], m["robot"]) if m else ("", "")
