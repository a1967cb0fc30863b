"""What a rollout's log holds. The robots read a part of it (``schema.Assignment``)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from flywheel.config import RolloutSettings
from flywheel.schema import (
    DIGEST,
    EVERYONE,
    ROLLOUT_ID,
    CanaryEvidence,
    Check,
    FleetPlan,
    Release,
    RobotReport,
    RolloutStage,
    ShadowReport,
    Strict,
    sha256_bytes,
)

Natural = Annotated[int, Field(ge=0)]
TWIN_PREFIX = "fleet/twin/"
REPLAY_PREFIX = "fleet/twin-replay/"


class Tail(Strict):
    """A tail figure over the batches of one policy: moments of its logarithm (``stats.Moments``)."""

    n: Natural = 0
    mean: float = 0.0
    var: Annotated[float, Field(ge=0)] = 0.0


class Arm(Strict):
    """How one policy did: the candidate, or the one that it would replace."""

    robots: Natural = 0
    episodes: Natural = 0
    successes: Natural = 0
    invalid: Natural = 0
    tracking: Tail = Tail()  # p99 of joint errors, rad
    misses: Tail = Tail()  # missed deadlines, ppm
    late: Tail = Tail()  # p99 of lateness, ns


class Heard(Strict):
    """What a set of robots says of itself: the cohort, or the whole fleet."""

    known: Natural = 0
    fresh: Natural = 0  # heard of within settings.silence_s
    loaded: Natural = 0  # of the fresh: runs the candidate's bytes, past their trial
    foreign: Natural = 0  # of the fresh: runs neither the candidate nor what it would replace
    refused: Natural = 0  # tried the candidate and gave it back


class Compared(Strict):
    """The cohort's shadow reports, summed up."""

    robots: Natural = 0
    episodes: Natural = 0
    chunks: Natural = 0
    invalid: Natural = 0
    rms_difference: Annotated[float, Field(ge=0)] = 0.0
    infer_p99_ns: Natural = 0  # of the slowest robot


class Evidence(Strict):
    """All that a decision is made of, besides the state, the approvals and the time."""

    gate_digest: str = ""  # of the gate report as it lies in the store now; "" if it is gone
    gate_objection: str = ""  # why that report does not speak for this candidate any more
    superseded_by: str = ""  # another rollout that holds the canary line
    cohort: Heard = Heard()
    fleet: Heard = Heard()
    shadow: Compared = Compared()
    candidate: Arm = Arm()
    current: Arm = Arm()
    site_below: Mapping[str, int] = {}  # bounds that keep each site under its cap, by the robots known now
    inputs_sha256: str = ""  # of ``rollouts/<id>/inputs/<sha256>.json``: every document behind the figures


class Inputs(Strict):
    """``rollouts/<id>/inputs/<sha256>.json``: the documents behind an ``Evidence``, as they were read."""

    schema_version: Literal[1] = 1
    robots: tuple[RobotReport, ...]
    heard: Mapping[str, int] = {}  # by robot: UTC ns at which its report reached the store, by its clock
    plan: FleetPlan = FleetPlan()
    shadow: tuple[ShadowReport, ...]
    batches: tuple[CanaryEvidence, ...]
    ignored: tuple[str, ...]  # keys of documents that were not understood, and why

    def to_bytes(self) -> bytes:
        """JSON in the order of the fields: as definite as sorted keys, and fit for 10,000 robots a look."""
        return self.model_dump_json().encode() + b"\n"


class Decision(StrEnum):
    """What a person may say of a rollout."""

    PROMOTE = "promote"  # to every robot; an approver's alone
    SKIP = "skip"  # what the stage still waits for; an approver's alone
    HOLD = "hold"  # withdraw the candidate without blame
    ROLL_BACK = "roll back"  # withdraw it and blame it; from any stage
    PAUSE = "pause"  # go no further; still rolled back where that is due
    RESUME = "resume"


class Approval(Strict):
    """A person's word about one candidate and one gate report."""

    schema_version: Literal[1] = 1
    rollout_id: str = Field(pattern=ROLLOUT_ID)
    bundle_digest: str = Field(pattern=DIGEST)
    gate_digest: str = Field(pattern=DIGEST)
    state_n: int = Field(ge=1)  # the version of the state that the person saw
    decision: Decision
    by: str = Field(min_length=1, max_length=200)
    reason: Annotated[str, Field(max_length=2000)] = ""
    t_unix_ns: int = Field(ge=0)

    @property
    def digest(self) -> str:
        """What a release names it by."""
        return sha256_bytes(self.to_bytes())


class Seal(Strict):
    """An Ed25519 signature (RFC 8032) over a document's canonical bytes, and the TUF id of its key."""

    keyid: str = Field(pattern=DIGEST)
    sig: str = Field(pattern=r"^[0-9a-f]{128}$")


class SignedWord(Strict):
    """``rollouts/<id>/approvals/<sha256 of the word>.json``."""

    schema_version: Literal[1] = 1
    word: Approval
    seal: Seal

    @property
    def key(self) -> str:
        """Where it lies in the store."""
        return f"rollouts/{self.word.rollout_id}/approvals/{self.word.digest}.json"


class TwinOutcome(Strict):
    """A policy's success in the twin, by its gate, and on the robots, by its rollout."""

    schema_version: Literal[1] = 1
    rollout_id: str = Field(pattern=ROLLOUT_ID)
    bundle_digest: str = Field(pattern=DIGEST)
    check: str  # of the gate report
    twin: float = Field(ge=0, le=1)
    twin_n: int = Field(ge=1)
    robots: float = Field(ge=0, le=1)
    robots_n: int = Field(ge=1)

    @property
    def key(self) -> str:
        """Where it lies in the store."""
        return f"{TWIN_PREFIX}{self.rollout_id}.json"


class TwinReplay(Strict):
    """``fleet/twin-replay/<twin digest>.json``: how far a twin is from recorded episodes that it replays.

    ``errors``: open loop over ``window_s``, rms over the range that the recorded signal covers, the worst
    joint's or axis's of q, dq and tool; None for one that does not move.
    """

    schema_version: Literal[1] = 1
    twin_digest: str = Field(pattern=DIGEST)
    t_unix_ns: Natural
    episodes: int = Field(ge=1)
    robots: tuple[str, ...] = ()
    window_s: float = Field(gt=0)
    errors: dict[str, Annotated[float, Field(ge=0)] | None]

    @property
    def key(self) -> str:
        """Where it lies in the store; the newest replaces the older."""
        return f"{REPLAY_PREFIX}{self.twin_digest}.json"

    @property
    def worst(self) -> float | None:
        """The largest of the errors; None where a signal of the three says nothing."""
        found = [self.errors.get(s) for s in ("q", "dq", "tool")]
        known = [e for e in found if e is not None]
        return max(known) if len(known) == len(found) else None


class TwinTrust(Strict):
    """What past releases, and replayed episodes, say of the twin.

    ``poor`` is true if either speaks against it, false only if both were heard; None while there are too few
    releases, or no replay of the twin that the gate used, and the other has nothing against it.
    """

    schema_version: Literal[1] = 1
    releases: int
    rank_correlation: float | None = None
    rank_violation: float | None = None  # mean maximum, in success
    bias: float | None = None  # mean of twin minus robots, in success
    twin_digest: str = ""  # of the twin that the gate used; "" if it does not say
    replay_error: float | None = None  # worst normalised, see TwinReplay; None: no replay of that twin
    replay_episodes: int = 0
    poor: bool | None = None

    def sentence(self) -> str:
        """For a person."""
        word = {None: "not judged yet", True: "poorly trusted", False: "trusted"}[self.poor]
        ranks = f"{self.releases} releases"
        if self.rank_violation is not None:
            ranks = (
                f"over {self.releases} releases rank correlation {self.rank_correlation:.2f}, "
                f"rank violation {self.rank_violation:.2f}, bias {self.bias:+.2f}"
            )
        replay = "no replay of it"
        if self.replay_error is not None:
            replay = (
                f"replay error {100 * self.replay_error:.2g} % of range over {self.replay_episodes} episodes"
            )
        return f"the twin is {word}: {ranks}; {replay}"


class RolloutState(Strict):
    """``rollouts/<id>/<n>.json``: one decision, with its evidence. Never changed; the highest ``n`` holds."""

    schema_version: Literal[1] = 1
    rollout_id: str = Field(pattern=ROLLOUT_ID)
    n: int = Field(ge=1)
    t_unix_ns: int = Field(ge=0)
    stage: RolloutStage
    reason: str
    since_n: int = Field(ge=1)  # version at which the stage began
    since_unix_ns: int = Field(ge=0)
    bundle_digest: str = Field(pattern=DIGEST)
    gate_digest: str = Field(pattern=DIGEST)
    cohort_below: int = Field(ge=0, le=EVERYONE)
    site_below: Mapping[str, int] = {}  # tighter bounds of sites with more robots than may try it at once
    wave: Natural = 0  # of ``settings.waves``, from 1, once it is wide
    paused: bool = False
    paused_unix_ns: Natural = 0
    heeded: tuple[str, ...] = ()  # digests of the words that took effect
    previous: Release  # what the fleet returns to
    settings: RolloutSettings  # as they were when it started
    twin_trust: TwinTrust | None = None  # then, too
    git_rev: str = ""
    experiment: str = ""
    minimum_runtime: str = "0.1.0"
    tests: Natural = 0  # comparisons of success rates made so far
    tested_episodes: Natural = 0  # episodes of both arms in the last of them
    last_test: Check | None = None
    wide_from: Natural = 0  # the candidate's episodes when it went wide
    approved_by: tuple[str, ...] = ()
    approval_digest: str = ""
    checks: tuple[Check, ...] = ()
    evidence: Evidence | None = None
    prior_sha256: str = ""  # of the version before this one, as it lies in the store
    seal: Seal | None = None

    @property
    def below(self) -> int:
        """The bound on draws of the robots that it is on offer to now: the cohort, then the waves."""
        if self.stage is RolloutStage.DONE or self.last_wave:
            return EVERYONE
        if self.stage is not RolloutStage.WIDE:
            return self.cohort_below
        return max(self.cohort_below, round(self.settings.waves[self.wave - 1] * EVERYONE))

    @property
    def last_wave(self) -> bool:
        """Whether it is on offer to every robot."""
        return self.stage is RolloutStage.WIDE and self.wave >= len(self.settings.waves)

    @property
    def prefix(self) -> str:
        """Where the rollout lies in the store."""
        return f"rollouts/{self.rollout_id}"

    @property
    def over(self) -> bool:
        """Whether looks change nothing any more (a person may still roll back)."""
        return self.stage in (RolloutStage.DONE, RolloutStage.HELD, RolloutStage.ROLLED_BACK)


def rollout_id(bundle_digest: str, gate_digest: str) -> str:
    """A rollout is named by what it brings and what speaks for it; either one changed is another rollout."""
    return f"{bundle_digest[:12]}-{gate_digest[:12]}"
