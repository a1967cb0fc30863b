"""What the processes of a robot must know, and the memory that they share.

Each is started by the supervisor as ``python -m flywheel.edge.processes ROLE FD PLACE GENERATION`` with a
``Plan`` on its standard input; it tells what it has to tell in its ``Place`` of the shared memory and ends on
SIGTERM. That memory is anonymous and lies behind FD, so nothing can be left behind. What each role does is in
``roles``; who starts, watches and replaces them is in ``runtime``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from flywheel.config import RecorderSettings
from flywheel.edge import realtime, rows
from flywheel.edge.control_ring import CHANGES, ControlRing, change_dtype, control_dtype
from flywheel.edge.images import FrameRing
from flywheel.edge.journal import JOURNAL_BYTES, Journal
from flywheel.edge.link import Arena, Ring, Seqlock, Words, aligned
from flywheel.edge.supervision import SupervisionSettings
from flywheel.edge.tick import CONTROL_WORDS
from flywheel.edge.trace import trace_dtype
from flywheel.errors import BundleError, ConfigError, FlywheelError
from flywheel.schema import Bundle, Strict, sha256_bytes

WORLD_BYTES = 1 << 16  # for what a simulated robot tells its own perception
RING_S = 30.0  # how far a reader may fall behind: more than it takes to notice and replace a dead recorder
EVENT_ROWS = 512
TOLD_BYTES = 4096
EXIT_BAD_PLAN = 3  # a fault that starting again will not mend


class BundleRef(Strict):
    """A bundle on this robot's disk: where it lies, what it says of itself, the digest of its bytes."""

    directory: str
    digest: str
    bundle: Bundle


class Recording(Strict):
    """What the recorder's process must know. ``directory`` is the spool's root; ``upload`` runs the uploader
    beside it, against the store that the environment names. Episodes are named by ``site`` and ``robot``."""

    directory: str
    site: str
    robot: str
    shift: str = ""
    settings: RecorderSettings = RecorderSettings()
    upload: bool = False


class Plan(Strict):
    """Everything a child process must know.

    ``robot`` and ``perception`` are ``module:function``, called with ``args`` and the world buffer;
    ``operator`` (or "") likewise, called with ``args`` and the perception, gives an override. Without a
    perception there is no System 2, and the supervisor writes the chunks. The functions are imported and
    run: a plan comes from the code that starts the robot, never from the network. ``bundle_digest`` is what
    the bytes in ``bundle_dir`` must have ("": whatever lies there when System 2 is first started).
    """

    robot: str
    perception: str
    operator: str = ""
    args: dict[str, Any] = Field(default_factory=dict)
    joints: int
    cameras: dict[str, tuple[int, int]]  # name -> height, width
    limits: str  # path of the robot's limits file
    bundle_dir: str
    bundle: Bundle
    bundle_digest: str = ""
    instruction: str
    control_hz: float = 1000.0
    policy_hz: float = 10.0
    threads: int = 1
    priority: int = 50  # SCHED_FIFO; 0 for ordinary scheduling
    cpu: int | None = None  # core of System 1
    # How long before each deadline System 1 wakes, at most a quarter of its period. Not without a core of its
    # own: it would take this much from everything else.
    early_us: Annotated[float, Field(ge=0, le=1000)] = 100.0
    others: tuple[int, ...] = ()  # cores of everything else
    recording: Recording | None = None
    supervision: SupervisionSettings = SupervisionSettings()
    # How long a robot whose supervisor is gone holds still for another one to take it over, then it ends.
    orphan_s: float = 0.0
    trace_rows: int = 0  # keep so many rows of the executed reference in full precision (benchmarks)

    @field_validator("cameras")
    @classmethod
    def _in_order(cls, value: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """By name: the layout of the shared memory must not depend on who wrote the plan down."""
        return dict(sorted(value.items()))

    @property
    def ref(self) -> BundleRef:
        """The bundle to start with."""
        return BundleRef(directory=self.bundle_dir, digest=self.bundle_digest, bundle=self.bundle)

    def running(self, ref: BundleRef) -> Plan:
        """The same robot with another bundle."""
        return self.model_copy(
            update={"bundle_dir": ref.directory, "bundle_digest": ref.digest, "bundle": ref.bundle}
        )

    @property
    def sha256(self) -> str:
        """Hash of everything that System 1 and the layout of the shared memory depend on."""
        doc = self.model_dump(mode="json", exclude={"bundle_dir", "bundle_digest", "bundle", "supervision"})
        layout = [str(d) for d in dtypes(self)] + [str(change_dtype(control_dtype(self.joints))), CHANGES]
        return sha256_bytes(json.dumps([doc, layout], sort_keys=True).encode())


def dtypes(plan: Plan) -> tuple[np.dtype[np.void], ...]:
    """Of a chunk, a control row, a frame and an event."""
    b = plan.bundle
    return (
        rows.chunk_dtype(plan.joints),
        control_dtype(plan.joints),
        rows.frame_dtype(plan.cameras, len(b.state_names), b.chunk, len(b.action_names)),
        rows.event_dtype(),
    )


def require_fit(plan: Plan, ref: BundleRef) -> None:
    """``BundleError`` if a bundle cannot replace the running one without starting the robot anew."""
    if (new := dtypes(plan.running(ref))[2]) != dtypes(plan)[2]:
        b, now = ref.bundle, plan.bundle
        raise BundleError(
            f"{ref.directory}: chunk of {b.chunk}, {len(b.state_names)} states and {len(b.action_names)} "
            f"actions; the running robot is laid out for {now.chunk}, {len(now.state_names)} and "
            f"{len(now.action_names)} ({new.itemsize} bytes a frame): stop it and start it with this bundle"
        )


# ── shared memory ─────────────────────────────────────────────────────────────────────────────────────

# Words of ``Shared.supervisor``, written by the supervisor alone.
GRANT, SUPERVISOR_PID, _SUPERVISOR_WORDS = 0, 1, 8
# Words of ``Place.words``, written by the process that holds the place.
ACK, _PLACE_WORDS = 0, 8
_NONCE, _IDENTITY_WORDS = 0, 8

PLACES = ("system1", "system2.a", "system2.b", "recorder", "uploader")


class Place:
    """What one process tells the others: ``status`` as ``realtime.pace`` keeps it (its TICKS are the
    heartbeat), ``words`` (ACK), and ``told``, a JSON object that replaces the last one."""

    def __init__(self, arena: Arena) -> None:
        self.status: Words = np.frombuffer(arena.carve(realtime.STATUS_WORDS * 8), np.int64)
        self.words: Words = np.frombuffer(arena.carve(_PLACE_WORDS * 8), np.int64)
        self._told = Seqlock(_TOLD, arena.carve(Seqlock.nbytes(_TOLD)))
        self._record = self._told.record()
        self._seen = 0

    @staticmethod
    def sizes() -> tuple[int, ...]:
        """Bytes of its parts."""
        return (realtime.STATUS_WORDS * 8, _PLACE_WORDS * 8, Seqlock.nbytes(_TOLD))

    def tell(self, **fields: Any) -> None:
        """Say something to the supervisor; with the process id, so that it is known who said it."""
        text = json.dumps({"pid": os.getpid(), **fields}).encode()
        if len(text) > TOLD_BYTES:
            raise ValueError(f"{len(text)} bytes to tell, of {TOLD_BYTES}")
        record = self._told.record()
        record["text"] = text
        self._told.write(record)

    def told(self, pid: int) -> dict[str, Any]:
        """The last thing that process ``pid`` said here; empty if it has said nothing yet."""
        self._seen = self._told.read(self._record, self._seen)
        if self._seen == 0:
            return {}
        said: dict[str, Any] = json.loads(self._record["text"][0])
        return said if said["pid"] == pid else {}


_TOLD = aligned([("text", f"S{TOLD_BYTES}")])


class Shared:
    """Where everything lies in the shared memory; the same in every process that has the same plan.

    ``events`` are System 2's, ``log`` are the supervisor's: a ring has a single writer. Of two System 2
    processes only the one that is granted may write the slot, frames and events.
    """

    def __init__(self, plan: Plan, arena: Arena) -> None:
        chunk, control, frame, event = dtypes(plan)
        self.identity: Words = np.frombuffer(arena.carve(_IDENTITY_WORDS * 8), np.int64)
        self.slot = Seqlock(chunk, arena.carve(Seqlock.nbytes(chunk)))
        ticks, looks = _rows(plan)
        self.control = ControlRing(control, ticks, arena.carve(ControlRing.room(control, ticks)))
        pictures = rows.image_bytes(plan.cameras, looks)
        room = arena.carve(FrameRing.room(frame, looks, pictures))
        self.frames = FrameRing(frame, looks, pictures, room)
        self.events = Ring(event, EVENT_ROWS, arena.carve(Ring.nbytes(event, EVENT_ROWS)))
        self.log = Ring(event, EVENT_ROWS, arena.carve(Ring.nbytes(event, EVENT_ROWS)))
        self.commands: Words = np.frombuffer(arena.carve(CONTROL_WORDS * 8), np.int64)
        self.supervisor: Words = np.frombuffer(arena.carve(_SUPERVISOR_WORDS * 8), np.int64)
        self.places = {name: Place(arena) for name in PLACES}
        self.world = arena.carve(WORLD_BYTES)
        self.journal = Journal(arena.carve(JOURNAL_BYTES))  # of whoever records
        self.trace: Ring | None = None
        if plan.trace_rows:
            trace = trace_dtype(plan.joints)
            self.trace = Ring(trace, plan.trace_rows, arena.carve(Ring.nbytes(trace, plan.trace_rows)))

    @staticmethod
    def nbytes(plan: Plan) -> int:
        """Bytes of arena that a plan needs."""
        chunk, control, frame, event = dtypes(plan)
        ticks, looks = _rows(plan)
        parts = [
            _IDENTITY_WORDS * 8,
            Seqlock.nbytes(chunk),
            ControlRing.room(control, ticks),
            FrameRing.room(frame, looks, rows.image_bytes(plan.cameras, looks)),
            *[Ring.nbytes(event, EVENT_ROWS)] * 2,
            CONTROL_WORDS * 8,
            _SUPERVISOR_WORDS * 8,
            *Place.sizes() * len(PLACES),
            WORLD_BYTES,
            JOURNAL_BYTES,
        ]
        if plan.trace_rows:
            parts.append(Ring.nbytes(trace_dtype(plan.joints), plan.trace_rows))
        return sum(-(-p // 64) * 64 for p in parts)

    @property
    def nonce(self) -> int:
        """A number that no other robot's memory has; 0 before ``sign``."""
        return int(self.identity[_NONCE])

    def sign(self, nonce: int) -> None:
        """Mark fresh memory as this robot's."""
        self.identity[_NONCE] = nonce


def _rows(plan: Plan) -> tuple[int, int]:
    """Of the control ring and of the frame ring."""
    return round(plan.control_hz * RING_S), max(round(plan.policy_hz * RING_S), 2)


def resolve(name: str) -> Callable[..., Any]:
    """The function behind ``module:function``; ``ConfigError`` if there is none."""
    module, _, function = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"{name!r}: give module:function that can be imported: {e}") from None
    return found


def main(argv: list[str]) -> int:
    """Entry of a child process."""
    from flywheel.edge import roles

    role, fd, place, generation = argv[1], int(argv[2]), argv[3], int(argv[4])
    plan = Plan.model_validate_json(sys.stdin.read())
    shared = Shared(plan, Arena(fd, Shared.nbytes(plan)))
    try:
        roles.ROLES[role](plan, shared, shared.places[place], generation)
    except FlywheelError as e:
        print(f"{role}: {e}", file=sys.stderr)
        shared.places[place].tell(error=str(e)[:2000])
        return EXIT_BAD_PLAN
    return 0


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stdout.flush()
    # Nothing is left to tear down that the kernel would not, and numpy views still hold the mapping.
    os._exit(code)
