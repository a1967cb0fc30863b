"""Every type and Arrow schema that crosses a boundary: process, machine or time.

Times are integer nanoseconds, angles rad, torques N·m, lengths m, rates Hz.
A reader refuses a schema version that it does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum, IntFlag, StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

EPISODE_SCHEMA_VERSION = 1
BUNDLE_SCHEMA_VERSION = 1
REPORT_SCHEMA_VERSION = 1

DIGEST = r"^[0-9a-f]{64}$"
ROBOT_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"  # safe as a part of an object key and of a path

CONTROL_FILE = "control.parquet"
FRAMES_FILE = "frames.parquet"
EVENTS_FILE = "events.parquet"
MANIFEST_FILE = "manifest.json"
EPISODE_FILES = (CONTROL_FILE, FRAMES_FILE, EVENTS_FILE)


class Strict(BaseModel):
    """Frozen, unknown keys refused: what every document in the store is built on."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, UTF-8, newline at the end; so a hash of it means something."""
        doc = self.model_dump(mode="json")
        return (json.dumps(doc, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Mode(IntEnum):
    """What System 1 is doing: the stale ladder, then the stops. Order is degradation."""

    FOLLOW = 0
    CARRY_ON = 1
    RAMP = 2
    HOLD = 3
    FALLBACK = 4
    STOP_1 = 5
    STOP_0 = 6


class Limit(IntFlag):
    """Which limit acted in a tick (bits of ``control.parquet: limits``)."""

    NONE = 0
    POSITION = 1
    VELOCITY = 2
    ACCELERATION = 4
    TORQUE = 8
    TOOL_SPEED = 16
    WORKSPACE = 32
    NOT_FINITE = 64
    TRACKING_ERROR = 128
    PROTECTIVE_STOP = 256
    JERK = 512
    SEPARATION = 1024
    CONTACT = 2048


class TriggerKind(StrEnum):
    """Why an episode was recorded."""

    TASK_TIMEOUT = "task_timeout"
    WRONG_OBJECT = "wrong_object"
    DROPPED_OBJECT = "dropped_object"
    SAFETY_STOP = "safety_stop"
    TRACKING_ERROR = "tracking_error"
    INTERVENTION = "intervention"
    BASELINE = "baseline"
    GRASP_LOST = "grasp_lost"
    OPERATOR_SUCCESS = "operator_success"  # a key that the operator pressed
    OPERATOR_FAILURE = "operator_failure"
    POLICY_INVALID = "policy_invalid"  # System 2 made a chunk that was not fit to be followed
    POLICY_LATE = "policy_late"  # System 1 had no fresh chunk to follow
    OUT_OF_DISTRIBUTION = "out_of_distribution"
    PLANT_SIGNAL = "plant_signal"
    CAMPAIGN = "campaign"  # the condition of a signed campaign was met
    REQUEST = "request"  # somebody asked for this window


# Kinds that say nothing of a failure.
NO_FAULT = frozenset(
    {TriggerKind.BASELINE, TriggerKind.CAMPAIGN, TriggerKind.REQUEST, TriggerKind.OPERATOR_SUCCESS}
)


class Outcome(StrEnum):
    """How an attempt at a task ended."""

    SUCCESS = "success"
    TIMEOUT = "timeout"
    WRONG_OBJECT = "wrong_object"
    DROPPED = "dropped"
    STOPPED = "stopped"


@lru_cache(maxsize=64)
def control_schema(joints: int) -> pa.Schema:
    """``control.parquet``: one row per System 1 tick; vectors are ``fixed_size_list<float>[joints]``."""
    vec = pa.list_(pa.float32(), joints)
    return pa.schema(
        [
            pa.field("t_ns", pa.int64(), False),
            pa.field("late_ns", pa.int64(), False),
            pa.field("compute_ns", pa.int64(), False),
            pa.field("mode", pa.uint8(), False),
            pa.field("q", vec, False),
            pa.field("dq", vec, False),
            pa.field("q_ref", vec, False),
            pa.field("tau", vec, False),
            pa.field("tool_cmd", pa.float32(), False),
            pa.field("held", pa.uint8(), False),
            pa.field("chunk_id", pa.int64(), False),
            pa.field("chunk_age_ns", pa.int64(), False),
            pa.field("limits", pa.uint32(), False),
        ]
    )


@lru_cache(maxsize=64)
def frames_schema(cameras: tuple[str, ...], state: int, chunk: int, action: int) -> pa.Schema:
    """``frames.parquet``: one row per System 2 tick.

    ``image.<camera>`` is a JPEG; ``state`` the policy's raw state; ``action`` the absolute target issued
    for the next step by whoever was in control; ``chunk`` the policy's absolute targets, row-major
    ``[chunk, action]`` (zeros when the operator was in control).
    """
    return pa.schema(
        [
            pa.field("t_ns", pa.int64(), False),
            *(pa.field(f"image.{c}", pa.binary(), False) for c in cameras),
            pa.field("state", pa.list_(pa.float32(), state), False),
            pa.field("instruction", pa.string(), False),
            pa.field("action", pa.list_(pa.float32(), action), False),
            pa.field("chunk", pa.list_(pa.float32(), chunk * action), False),
            pa.field("infer_ns", pa.int64(), False),
            pa.field("intervention", pa.bool_(), False),
            pa.field("policy_digest", pa.string(), False),
        ]
    )


EVENTS_SCHEMA = pa.schema(
    [
        pa.field("t_ns", pa.int64(), False),
        pa.field("kind", pa.string(), False),  # trigger | mode | intervention | task | plant | policy
        pa.field("name", pa.string(), False),
        pa.field("detail", pa.string(), False),  # JSON object
    ]
)


class FileEntry(Strict):
    """One file of an episode, as sealed."""

    name: str
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Trigger(Strict):
    """What fired, when, and the window around it that was kept."""

    kind: TriggerKind
    t_ns: int
    detail: dict[str, Any] = {}


RATE_HZ_MAX = 20_000.0  # of what an episode records
ROWS_MAX = 1 << 40


class Manifest(Strict):
    """``manifest.json``: written last, so the commit mark of an episode and its failure log entry."""

    schema_version: Literal[1] = 1
    episode_id: str = Field(pattern=r"^[0-9a-f-]{36}$")  # UUIDv7: time-ordered
    site: str = Field(pattern=ROBOT_NAME)
    robot: str = Field(pattern=ROBOT_NAME)
    joints: int = Field(ge=1, le=64)
    cameras: Annotated[tuple[Annotated[str, Field(pattern=ROBOT_NAME)], ...], Field(max_length=64)]
    state_dim: int = Field(ge=1, le=1024)
    action_dim: int = Field(ge=1, le=1024)
    chunk: int = Field(ge=1, le=1024)
    control_hz: float = Field(gt=0, le=RATE_HZ_MAX)  # what bounds the rows bounds the memory that they take
    policy_hz: float = Field(gt=0, le=RATE_HZ_MAX)
    task: str  # the instruction
    shift: str  # "" on a real robot; the twin's named shift otherwise
    seed: int | None = None  # the twin's scene seed, so that the failure can be replayed
    outcome: Outcome
    operator_outcome: Outcome | None = None  # how the correction ended; None if nobody intervened
    triggers: tuple[Trigger, ...]
    window_ns: tuple[int, int]
    policy_digest: str
    runtime_version: str
    clock: Literal["wall", "lockstep"]
    clock_epoch_ns: int  # UTC ns at t_ns = 0
    gaps: int = Field(default=0, ge=0, le=ROWS_MAX)
    drops: int = Field(default=0, ge=0, le=ROWS_MAX)
    files: tuple[FileEntry, ...]

    @property
    def date(self) -> str:
        """UTC date of the window's start, ``YYYY-MM-DD``."""
        from datetime import UTC, datetime

        t = (self.clock_epoch_ns + self.window_ns[0]) / 1e9
        return datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d")

    @property
    def prefix(self) -> str:
        """Where the episode lies in the store, with a trailing slash."""
        return f"episodes/site={self.site}/robot={self.robot}/date={self.date}/{self.episode_id}/"


class Bundle(Strict):
    """``policy.json`` of a policy bundle: everything the edge must know to run ``policy.onnx``.

    The bundle's *digest* is the sha256 of the canonical list of its files' sha256 (``bundle_digest``).
    """

    schema_version: Literal[1] = 1
    name: str
    cameras: tuple[str, ...]
    image_hw: tuple[int, int]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_space: Literal["tool_position_suction", "joint_position"]
    chunk: int
    execute: int  # steps of a chunk meant to be executed before the next one
    step_ns: int  # time between two steps of a chunk
    max_action_dim: int  # width of the noise input
    tokens: int  # length of the token input
    num_steps: int  # denoising steps
    limits_sha256: str  # the safety limits it was trained under ("" if unknown)
    opset: Annotated[int, Field(ge=0)] = 0  # of ONNX, that policy.onnx is written in; 0: not said
    # Versions of ONNX Runtime that run it, such as ">=1.18,<2.0"; "": not said
    onnxruntime: Annotated[str, Field(pattern=r"^(>=\d+\.\d+,<\d+\.\d+)?$")] = ""
    provenance: dict[str, Any] = {}


BUNDLE_FILES = ("policy.onnx", "tokenizer.json", "policy.json")


def bundle_digest(directory: Path) -> str:
    """Hex sha256 over ``name sha256`` lines of the bundle's three files, in the order of BUNDLE_FILES."""
    return digest_of_hashes({n: sha256_file(directory / n) for n in BUNDLE_FILES})


def digest_of_hashes(sha256: Mapping[str, str]) -> str:
    """``bundle_digest`` from the files' sha256, by file name."""
    return sha256_bytes("".join(f"{n} {sha256[n]}\n" for n in BUNDLE_FILES).encode())


class Proportion(Strict):
    """A success rate with its 95 % interval (Wilson unless said otherwise)."""

    mean: float
    low: float
    high: float
    n: int


class Verdict(StrEnum):
    """What a gate or a look at a rollout concludes."""

    PROMOTE = "promote"
    HOLD = "hold"
    ROLL_BACK = "roll back"


class Check(Strict):
    """One line of a gate report: evidence, interval, verdict."""

    name: str
    verdict: Verdict
    value: float | None
    low: float | None = None
    high: float | None = None
    bar: str
    n: int = 0
    evidence: dict[str, Any] = {}


class GateReport(Strict):
    """What the gate found; its digest is ``sha256_bytes(report.to_bytes())``."""

    schema_version: Literal[1] = 1
    candidate_digest: str
    current_digest: str
    checks: tuple[Check, ...]
    verdict: Verdict
    reasons: tuple[str, ...]

    def objection(self, candidate_digest: str, current_digest: str) -> str | None:
        """Why this report does not let ``candidate`` replace ``current``; None if it does.

        A report speaks of the two bundles that it compared: if either is another one now, it is void.
        """
        if not candidate_digest or self.candidate_digest != candidate_digest:
            about = self.candidate_digest[:12]
            return f"void: the report is about candidate {about}, not {candidate_digest[:12]}"
        if not current_digest or self.current_digest != current_digest:
            return f"void: the report compares with {self.current_digest[:12]}, not {current_digest[:12]}"
        if self.verdict is not Verdict.PROMOTE:
            return f"the gate's verdict is {self.verdict}: {'; '.join(self.reasons)}"
        bad = [c.name for c in self.checks if c.verdict is not Verdict.PROMOTE]
        if bad or not self.checks:
            return f"the report contradicts its verdict: {', '.join(bad) or 'it holds no check'}"
        return None


class RobotReport(Strict):
    """``fleet/robots/<robot>.json``: what a robot says of itself."""

    schema_version: Literal[1] = 1
    site: str
    robot: str
    t_unix_ns: int
    loaded_digest: str  # sha256 of the bytes that were loaded, not of what was asked for
    previous_digest: str = ""
    rollout_id: str = ""
    mode: Mode = Mode.HOLD
    episodes: int = 0
    successes: int = 0
    late_p99_ns: int | None = None
    misses_ppm: float | None = None
    spool_pending: int = 0
    confirmed: bool = True  # False while the loaded policy is on trial
    refused_digest: str = ""  # the last release that this robot tried and gave back, and why
    refused_reason: str = ""
    campaigns: dict[str, int] = {}  # that this robot runs: how often their condition was met


ROLLOUT_ID = r"^[0-9a-f]{12}-[0-9a-f]{12}$"
RELEASES = "releases"  # where signed releases lie in the store
EVERYONE = 1 << 32  # draws lie in [0, EVERYONE)


class Group(StrEnum):
    """The lines of releases. The canary's has keys of its own; the other two share theirs."""

    CANARY = "canary"  # a candidate, for its cohort
    WAVE = "wave"  # a candidate that was approved, for a growing share of the fleet
    STABLE = "stable"  # everybody else's


class Release(Strict):
    """What is signed with every file of a release (the *custom* field of its TUF targets).

    Integers only: the signed form of TUF metadata (canonical JSON) has no floating point.
    """

    schema_version: Literal[1] = 1
    group: Group
    digest: str = Field(pattern=DIGEST)  # bundle digest
    gate_digest: str = ""  # of the gate report; "" for a first policy that replaced nothing
    rollout_id: str = ""
    cohort_below: Annotated[int, Field(ge=0, le=EVERYONE)] = EVERYONE  # smaller draws may take it
    site_below: dict[str, Annotated[int, Field(ge=0, le=EVERYONE)]] = {}  # tighter bounds, by site
    acting: bool = True  # False: a robot may stage and compare it, never act by it
    minimum_runtime: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")] = "0.1.0"
    revokes: tuple[str, ...] = ()  # bundle digests that must not be fallen back to
    approval_digest: str = ""  # sha256 of the approval that put it into ``stable``
    git_rev: str = ""
    experiment: str = ""

    def admits(self, robot: str, site: str) -> bool:
        """Whether a robot is of those that may take it."""
        bound = min(self.cohort_below, self.site_below.get(site, EVERYONE))
        return cohort_draw(self.rollout_id, robot) < bound


class Who(Strict):
    """One robot, or every robot of a site."""

    robot: Annotated[str, Field(pattern=ROBOT_NAME)] | None = None
    site: Annotated[str, Field(pattern=ROBOT_NAME)] | None = None
    by: str = Field(min_length=1, max_length=200)
    reason: str = Field(min_length=1, max_length=2000)

    @model_validator(mode="after")
    def _one(self) -> Who:
        if (self.robot is None) == (self.site is None):
            raise ValueError("name either a robot or a site")
        return self

    def means(self, robot: str, site: str) -> bool:
        """Whether a robot of a site is meant."""
        return robot == self.robot if self.robot is not None else site == self.site


class Pin(Who):
    """Runs this bundle and no other, whatever is released, until the pin is lifted or the bundle revoked."""

    digest: str = Field(pattern=DIGEST)


class HoldBack(Who):
    """Takes no other bundle than it runs before a time, unless that one is revoked."""

    until_unix_ns: int = Field(ge=0)


PLAN_TARGET = "plan/plan.json"


class FleetPlan(Strict):
    """Exceptions from what is released, signed like a stable release; a robot's own go first."""

    schema_version: Literal[1] = 1
    pins: tuple[Pin, ...] = ()
    holds: tuple[HoldBack, ...] = ()

    def pin(self, robot: str, site: str) -> Pin | None:
        """The pin that a robot obeys."""
        meant = [p for p in self.pins if p.means(robot, site)]
        return min(meant, key=lambda p: p.robot is None, default=None)

    def held(self, robot: str, site: str, now_unix_ns: int) -> HoldBack | None:
        """The hold-back that a robot obeys now."""
        meant = [h for h in self.holds if h.means(robot, site) and now_unix_ns < h.until_unix_ns]
        return max(meant, key=lambda h: h.until_unix_ns, default=None)

    def excepts(self, robot: str, site: str, now_unix_ns: int) -> bool:
        """Whether a robot does not follow what is released."""
        return self.pin(robot, site) is not None or self.held(robot, site, now_unix_ns) is not None


def cohort_draw(rollout_id: str, robot: str) -> int:
    """Where a robot stands in a rollout's queue: uniform in [0, EVERYONE), stable, new for each rollout."""
    return int.from_bytes(hashlib.sha256(f"{rollout_id}\n{robot}".encode()).digest()[:4], "big")


class RolloutStage(StrEnum):
    """How far a candidate has come. ``held`` and ``rolled back`` withdraw it; only the latter blames it."""

    SHADOW = "shadow"
    CANARY = "canary"
    APPROVAL = "approval"
    WIDE = "wide"
    DONE = "done"
    HELD = "held"
    ROLLED_BACK = "rolled back"


class Assignment(BaseModel):
    """The part of a rollout's state object that a robot acts on.

    Unknown keys are ignored, unlike elsewhere: a robot that is behind must still read a newer cloud's state.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_version: Literal[1]
    rollout_id: str = Field(pattern=ROLLOUT_ID)
    bundle_digest: str = Field(pattern=DIGEST)
    stage: RolloutStage
    cohort_below: int = Field(ge=0, le=EVERYONE)

    def in_cohort(self, robot: str) -> bool:
        """Whether the robot tries the candidate before the others do."""
        return cohort_draw(self.rollout_id, robot) < self.cohort_below

    def group(self, robot: str) -> Group:
        """Which release the robot acts by."""
        # Still so when it goes wide: the stable release follows the state, and nobody goes back meanwhile.
        trying = self.stage in (RolloutStage.CANARY, RolloutStage.APPROVAL, RolloutStage.WIDE)
        return Group.CANARY if trying and self.in_cohort(robot) else Group.STABLE


class ShadowReport(Strict):
    """``rollouts/<id>/shadow/<robot>.json``: the candidate's System 2 beside the current, never acting."""

    schema_version: Literal[1] = 1
    rollout_id: str = Field(pattern=ROLLOUT_ID)
    robot: str = Field(pattern=ROBOT_NAME)
    digest: str = Field(pattern=DIGEST)  # of the candidate's loaded bytes
    current_digest: str = Field(pattern=DIGEST)
    episodes: int = Field(ge=0)
    chunks: int = Field(ge=0)  # pairs compared
    invalid: int = Field(ge=0)  # candidate's chunks that were not finite or outside the workspace
    rms_difference: float = Field(ge=0)  # over all pairs, executed steps and axes; m for tool actions
    infer_p99_ns: int = Field(ge=0)
    current_infer_p99_ns: int = Field(ge=0)

    @property
    def key(self) -> str:
        """Where it lies in the store; the newest replaces the older."""
        return f"rollouts/{self.rollout_id}/shadow/{self.robot}.json"


class CanaryEvidence(Strict):
    """``rollouts/<id>/evidence/<robot>-<n>.json``: how a robot did in a batch of attempts by one policy."""

    schema_version: Literal[1] = 1
    rollout_id: str = Field(pattern=ROLLOUT_ID)
    robot: str = Field(pattern=ROBOT_NAME)
    n: int = Field(ge=0)  # the robot's own count; a repeat of a number is the same batch
    digest: str = Field(pattern=DIGEST)  # of the loaded bytes: the candidate's or the current one's
    t_unix_ns: int
    episodes: int = Field(ge=0)
    successes: int = Field(ge=0)
    invalid: Annotated[int, Field(ge=0)] = 0  # chunks that System 1 refused
    ticks: Annotated[int, Field(ge=0)] = 0  # of System 1
    misses: Annotated[int, Field(ge=0)] = 0  # ticks that began more than a period late
    late_p99_ns: Annotated[int, Field(ge=0)] = 0
    tracking_rms_rad: float = Field(ge=0)
    tracking_p99_rad: float = Field(ge=0)

    @model_validator(mode="after")
    def _counts(self) -> CanaryEvidence:
        if self.successes > self.episodes or self.misses > self.ticks:
            raise ValueError("successes must be ≤ episodes and misses ≤ ticks")
        return self

    @property
    def key(self) -> str:
        """Where it lies in the store; written once."""
        return f"rollouts/{self.rollout_id}/evidence/{self.robot}-{self.n:06d}.json"
