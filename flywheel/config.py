"""What can be set, and where it comes from.

Two sources, kept apart on purpose:

* ``Settings``: ``params.yaml``, what an experiment may vary. DVC tracks it by section, so that a stage
  re-runs when its own section changes. Safety limits are not here: an experiment must not be able to
  loosen them. The times of the stale ladder are part of the limits for the same reason.
* ``Deployment``: the environment, where this process runs and where its store is. No secret is held in it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from flywheel.errors import ConfigError
from flywheel.schema import Outcome, TriggerKind

PARAMS_FILE = "params.yaml"
BUCKET = "flywheel"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Frozen; unknown keys and non-finite numbers refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TwinSettings(Section):
    """The simulated robots."""

    shift: str = "factory"  # named shift that the fleet works in
    robots: Count = 4  # robots of the simulated fleet
    episode_s: Positive = 6.0  # time limit of one attempt at the task
    seed: Seed = 0


class EdgeSettings(Section):
    """The dual-rate runtime; its limits and stale ladder lie in the robot's limits file."""

    control_hz: Annotated[float, Field(ge=100, le=4000)] = 1000.0
    policy_hz: Annotated[float, Field(ge=1, le=50)] = 10.0
    onnx_threads: Annotated[int, Field(ge=1, le=16)] = 1
    # simulated time from observation to visible chunk (lockstep only)
    latency_ms: Annotated[float, Field(ge=0, le=1000)] = 20.0


class RecorderSettings(Section):
    """What is kept around a failure."""

    pre_s: Positive = 10.0  # kept before the trigger
    post_s: Positive = 2.0  # kept after the trigger
    tail_s: Positive = 0.5  # kept after the operator let go
    min_interval_s: Annotated[float, Field(ge=0)] = 1.0  # a kind of trigger fires at most this often
    settle_s: Annotated[float, Field(ge=0)] = 0.2  # wait for late rows before sealing
    max_episode_s: Positive = 30.0  # an episode is sealed at this length at the latest
    tracking_error_rad: Positive = 0.15  # joint error that triggers by itself
    baseline_fraction: Fraction = 0.02  # attempts recorded although nothing failed
    ood_score: Positive = 3.0  # a policy event "ood_score" above it is out of distribution
    triggers: tuple[TriggerKind, ...] = tuple(TriggerKind)  # the kinds that record
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90
    jpeg_quality_of: dict[str, Annotated[int, Field(ge=1, le=100)]] = {}  # of cameras that differ
    memory_mb: Positive = 512.0  # pictures that the recorder holds, beside the rings
    spool_quota_mb: Positive = 2048.0  # disk that the spool may fill
    metered: bool = False  # the link costs: manifests at once, data by priority or on request
    metered_priority: Annotated[int, Field(ge=0, le=5)] = 3  # and above: goes over a metered link by itself

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.pre_s + self.post_s > self.max_episode_s:
            raise ValueError("max_episode_s must be at least pre_s + post_s")
        return self

    def quality(self, cameras: Iterable[str]) -> dict[str, int]:
        """JPEG quality by camera. Raises ``ConfigError`` where one is set for a camera that is not there."""
        names = tuple(cameras)
        if strangers := sorted(set(self.jpeg_quality_of) - set(names)):
            raise ConfigError(
                f"recorder.jpeg_quality_of.{strangers[0]}: no such camera; there are {', '.join(names)}"
            )
        return {c: self.jpeg_quality_of.get(c, self.jpeg_quality) for c in names}

    @property
    def link_priority(self) -> int | None:
        """The least priority that goes to the store by itself; None for all."""
        return self.metered_priority if self.metered else None


class CheckSettings(Section):
    """What passes for a true recording; beyond it an episode is quarantined (``flywheel.curate.checks``).

    The worst of 481 sound episodes of the twin is given where there is one. A turn cannot change these.
    """

    robots: tuple[str, ...] = ("flywheel/twin/limits.yaml",)  # their limits files; none: not checked
    joint_slack_rad: Fraction = 0.05  # beyond the soft limits
    window_s: Positive = 0.05  # over which velocities are integrated
    max_drift_rad: Positive = 0.05  # of a joint from its integrated velocity within a window; 0.0006 is seen
    max_unit_ratio: Annotated[float, Field(gt=1)] = 1.5  # between the two; 1.003 is seen
    min_motion_rad: Positive = 0.2  # less of it shows nothing
    frozen_s: Positive = 0.1  # one value to the last bit while the joint is told to move
    frozen_motion_rad: Positive = 0.02
    saturated_s: Positive = 0.2  # cut off at one value, in all
    pose_dims: Annotated[int, Field(ge=0)] = 3  # so many numbers of state and action are the same quantities
    min_pose_per_rad: Positive = 0.02  # path of the state over path of the joints; 0.23 to 0.31 is seen
    max_pose_per_rad: Positive = 5.0
    min_speed_variation: Fraction = 0.3  # deviation over mean; steadier speeds have nothing to correlate
    min_state_joint_r2: Fraction = 0.5  # of the state's steps by the joints'; 0.82 is seen
    min_action_r2: Fraction = 0.5  # of a person's targets; 0.64 is seen
    min_policy_action_r2: Fraction = 0.1  # of a policy's; 0.31 is seen of one that fails
    max_action_ratio: Annotated[float, Field(gt=1)] = 2.0  # of a person's targets to the steps; 1.14 is seen
    max_action_error: Positive = 0.12  # of one step, m or rad; 0.04 is seen
    success_lets_go: bool = True  # a success held something and let go of it when told to
    black_level: Annotated[float, Field(ge=0, le=255)] = 12.0  # 17 is seen in dim light
    white_level: Annotated[float, Field(ge=0, le=255)] = 243.0
    min_contrast: Annotated[float, Field(ge=0)] = 4.0  # of 255; 6.5 is seen
    min_sharpness: Annotated[float, Field(ge=0)] = 0.15  # Laplacian over picture; 0.87 is seen
    bad_images: Annotated[int, Field(ge=0)] = 1  # so many of an episode may be black, white or blurred
    stuck_images: Annotated[int, Field(ge=2)] = 3
    stuck_motion_rad: Positive = 0.02
    min_change_ratio: Annotated[float, Field(ge=1)] = 1.5  # of pictures, fast to slow; 2.1 is seen
    image_motion_mads: Positive = 8.0  # of the correlation of pictures with motion, below the others' median
    repeat_rad: Positive = 0.008  # rms of the joints in all common frames; closer, and alike: a repeat
    repeat_look: Positive = 0.25  # rms of thumbnails of mean 0 and deviation 1
    misplaced_m: Positive = 0.1  # from where the other successes let go, where these agree
    # of 7 others that grasped what looks most alike: so many of one other instruction (0: not looked at)
    neighbours_agree: Annotated[int, Field(ge=0, le=7)] = 6


class CurateSettings(Section):
    """Which episodes become training data."""

    min_frames: Count = 8  # shorter episodes are left out
    max_episodes: Count = 200  # most episodes of one turn
    duplicate_distance: Annotated[float, Field(ge=0)] = 0.02  # closer ones are one; normalised trajectory
    keep_success: bool = False  # fill the budget up with episodes in which nothing failed
    cameras: Annotated[tuple[str, ...], Field(min_length=1)] = ("wrist",)  # what the policy sees
    choice: Literal["coverage", "random", "newest", "all"] = "coverage"  # how the budget is spent
    budget: Annotated[int, Field(ge=0)] = 0  # most episodes that are taken of them; 0: max_episodes
    cluster_distance: Positive = 0.15  # failures closer than this are of one kind; as duplicate_distance
    costs: dict[str, Positive] = {"stopped": 3.0, "dropped": 2.0, "wrong_object": 2.0}  # of a failure; else 1
    seed: Seed = 0  # of the random choice
    checks: CheckSettings = CheckSettings()

    @model_validator(mode="after")
    def _costs_are_of_failures(self) -> Self:
        known = [*Outcome, *TriggerKind]
        if strangers := sorted(set(self.costs) - set(known)):
            raise ValueError(f"costs.{strangers[0]}: no such failure; there are {', '.join(known)}")
        return self


class LabelSettings(Section):
    """How failures are named."""

    min_confidence: Fraction = 0.5  # a failure mode or cause that is less sure asks for a person
    budget: Annotated[int, Field(ge=0)] = 10  # most episodes of one turn that people are asked about
    audit_fraction: Fraction = 0.2  # of the budget that is drawn blindly, to check the confidences
    form_s: Positive = 604_800.0  # how long a form with questions stays open in Airflow
    reference_runs: Annotated[int, Field(ge=0, le=1000)] = 24  # that novelty is measured against; 0: not


class ReplaySettings(Section):
    """Demonstrations that keep old skills alive in training."""

    shift: str = "lab"
    episodes: Count = 240
    seed: Seed = 0


class TrainSettings(Section):
    """Fine-tuning of the current policy."""

    steps: Count = 600  # at least
    # More steps where new data are so many that each frame of them would be drawn less often; 0: never more.
    min_epochs: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    batch_size: Count = 64
    learning_rate: Positive = 3e-4
    replay_fraction: Fraction = 0.5  # share of old data in a batch where no turn came before: the lab's
    later_replay_fraction: Fraction = 0.75  # the same where one did: earlier turns' data and the lab's
    earlier_share: Fraction = 0.8  # of these, what earlier turns were trained on
    # Share of the weights before in those after, where a turn came before.
    kept_weights: Annotated[float, Field(ge=0, lt=1)] = 0.3
    earlier_turns: Annotated[int, Field(ge=0, le=100)] = 8  # as many of them, the newest; 0: none
    seed: Seed = 0
    processes: Annotated[int, Field(ge=1, le=64)] = 1  # that share out each batch
    threads: Annotated[int, Field(ge=1, le=256)] = 2  # of all processes together
    lora_rank: Annotated[int, Field(ge=0)] = 0  # 0 trains all weights; 16 is usual, adapters are merged
    # New frames in which a person acted count so often; 1 as often as any other.
    intervention_weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    checkpoint_steps: Annotated[int, Field(ge=0)] = 200  # what a killed run goes on from; 0: none


class ExportSettings(Section):
    """From checkpoint to bundle."""

    num_steps: Count = 4  # denoising steps
    # Against PyTorch, both: largest error of a normalised action; error of a chunk over its size (rms).
    parity_atol: Annotated[float, Field(gt=0, le=0.01)] = 1e-3
    parity_rtol: Annotated[float, Field(gt=0, le=0.01)] = 1e-3
    parity_observations: Count = 8  # recorded ones where a dataset is given
    precision: Literal["float32", "float16", "int8"] = "float32"  # of the weights
    # A smaller precision is refused beyond these, or if in the twin more success may be lost.
    reduced_atol: Annotated[float, Field(gt=0, le=2.0)] = 0.5
    reduced_rtol: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    closed_loop_shift: str = "lab"
    closed_loop_pairs: Annotated[int, Field(ge=0)] = 120  # 0: not measured
    closed_loop_seed: Seed = 0
    max_success_drop: Annotated[float, Field(gt=0, le=0.2)] = 0.05  # the interval must lie above it


class GateSettings(Section):
    """What a candidate must show."""

    shift: str = "factory"  # where the failures came from; "": where most of this turn's did
    twin: str = ""  # file of the twin's identified parameters (`flywheel twin identify`); "": the model's own
    episodes: Count = 60  # most paired episodes in the shift
    lab_episodes: Count = 200  # most paired episodes in the lab
    look_pairs: Count = 10  # pairs between two looks at success; it may be decided at each look
    max_scenarios: Count = 20  # recorded failures that are replayed, the newest
    sweep_shifts: Annotated[tuple[str, ...], Field(min_length=1)] = ("dim", "table", "camera", "parts")
    sweep_pairs: Count = 5  # in each of them
    latency_ms: Positive = 80.0  # of System 2, injected
    latency_pairs: Count = 10  # with it, in the shift and in the lab each
    seed: Seed = 0  # scenes also depend on the two policies, so that each gate draws fresh ones
    min_lift: Annotated[float, Field(ge=-1, le=1)] = 0.0  # the lift's interval must lie above this
    max_lab_drop: Fraction = 0.05  # success that the lab may lose
    max_progress_drop: Fraction = 0.05  # mean task progress that the shift and the lab may lose
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95  # one-sided, of every check
    wall_s: Positive = 3.0  # length of one run on the wall clock
    wall_pairs: Annotated[int, Field(ge=2)] = 16  # most runs of each policy on the wall clock
    wall_looks: Annotated[int, Field(ge=1, le=10)] = 4  # a machine that is disturbed takes more runs to tell
    max_tracking_rms_rad: Positive = 0.05


class RolloutSettings(Section):
    """How a policy reaches the fleet."""

    shadow_episodes: Count = 4
    canary_fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    canary_episodes: Count = 12
    waves: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)  # shares
    site_cap: Annotated[int, Field(ge=0)] = 0  # robots of one site that try it before the last wave; 0: any
    wide_episodes: Count = 12  # of the candidate, in each wave
    approval_timeout_s: Positive = 24 * 3600.0
    max_drop: Fraction = 0.1  # success that may be lost before it is rolled back
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    look_s: Positive = 5.0  # time between two looks at the fleet
    max_stage_s: Positive = 24 * 3600.0  # shadow or canary that is inconclusive for so long is held
    silence_s: Positive = 900.0  # a robot unheard of for longer is silent
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.8  # share of cohort or fleet that must be heard of
    wide_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of robots heard of, that must run it in the end
    approvals: Count = 1  # different people
    max_tail_ratio: Annotated[float, Field(gt=1)] = 1.25  # tracking error, lateness, misses
    max_invalid_per_episode: Annotated[float, Field(ge=0)] = 0.1  # chunks that are not finite or out of range
    max_infer_ms: Positive = 80.0  # p99 of the candidate's inference on the robots
    twin_releases: Annotated[int, Field(ge=2)] = 4  # past ones that it takes to judge the twin
    twin_rank_violation: Fraction = 0.1  # success lost by believing the twin's order; beyond it, poor trust
    twin_replay_error: Fraction = 0.1  # of a signal's range, replayed open loop; beyond it, poor trust
    twin_poor_factor: Annotated[float, Field(ge=1)] = 2.0  # canary episodes where the twin is poorly trusted
    max_shadow_rms: Positive = 0.3  # of the candidate's from today's actions; beyond it nobody meant this

    @model_validator(mode="after")
    def _waves_grow(self) -> Self:
        if self.waves[-1] != 1.0 or any(a >= b for a, b in pairwise(self.waves)):
            raise ValueError(
                f"waves = {list(self.waves)}: must be growing shares of the fleet, the last one 1.0"
            )
        return self


class TriggerSettings(Section):
    """When failures start a turn."""

    min_episodes: Count = 130  # failures waiting that start a turn
    max_wait_s: Positive = 600.0  # age of the oldest failure that starts a turn
    cooldown_s: Positive = 30.0
    poll_s: Positive = 2.0


class WatchSettings(Section):
    """What is looked after between turns."""

    period_s: Positive = 3600.0  # between two looks; metadata that robots check live for a day or longer
    max_pending: Count = 200  # episodes that wait on one robot
    max_misses_ppm: Positive = 20_000.0  # deadlines that one robot's loop may miss
    turn_s: Positive = 24 * 3600.0  # age of a turn without an end
    keep_runs_s: Positive = 7 * 24 * 3600.0  # of finished turns, on this machine's disk


class TurnSettings(Section):
    """What a turn of the wheel starts from; the wheel sets it in the turn's own workspace."""

    policy: str = "models/base"  # a checkpoint with its bundle/ inside


class Settings(Section):
    """All of ``params.yaml``; a key that is absent has the default given here."""

    twin: TwinSettings = TwinSettings()
    edge: EdgeSettings = EdgeSettings()
    recorder: RecorderSettings = RecorderSettings()
    curate: CurateSettings = CurateSettings()
    label: LabelSettings = LabelSettings()
    replay: ReplaySettings = ReplaySettings()
    train: TrainSettings = TrainSettings()
    export: ExportSettings = ExportSettings()
    gate: GateSettings = GateSettings()
    rollout: RolloutSettings = RolloutSettings()
    trigger: TriggerSettings = TriggerSettings()
    watch: WatchSettings = WatchSettings()
    turn: TurnSettings = TurnSettings()

    @classmethod
    def load(cls, path: Path | str = PARAMS_FILE) -> Settings:
        """Read a params file; ``ConfigError`` names the key, the file and the nearest valid key."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such file; run from the checkout, or name one with --params"
            ) from None
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: cannot be read: {e}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> Settings:
        """``load`` for text that came from ``source`` (a name for messages)."""
        try:
            doc = yaml.load(text, Loader=StrictLoader)
        except yaml.YAMLError as e:
            where = getattr(e, "problem_mark", None)
            line = f" line {where.line + 1}" if where is not None else ""
            raise ConfigError(f"{source}{line}: not valid YAML: {getattr(e, 'problem', None) or e}") from None
        if doc is None:
            doc = {}
        if not isinstance(doc, dict):
            raise ConfigError(f"{source}: must be a mapping of sections, found a {type(doc).__name__}")
        # A section that is present but empty parses as null: same as absent.
        doc = {k: {} if v is None and k in cls.model_fields else v for k, v in doc.items()}
        try:
            # By way of JSON, where strict mode knows that an array is a tuple and true is not 1.
            return cls.model_validate_json(json.dumps(doc, default=str), strict=True)
        except ValidationError as e:
            raise ConfigError(_explain(e.errors()[0], source)) from None


class StrictLoader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def setting_names(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Dotted names of every setting, such as ``train.steps``."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from setting_names(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _explain(error: ErrorDetails, source: str) -> str:
    key = ".".join(str(p) for p in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{source}: {key} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
    names = list(setting_names())
    section = f"{key.split('.')[0]}."
    local = [n for n in names if n.startswith(section)] or list(Settings.model_fields)
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, local, n=1, cutoff=0.75)
    if not near:  # the right name in the wrong section
        near = [n for n in names if n.rsplit(".", 1)[-1] == leaf]
    hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(local)}"
    return f"{source}: unknown key {key!r}; {hint}"


class Deployment(Section):
    """Where this process runs, from the environment.

    ======================  =====================================================================
    ``FLYWHEEL_HOME``       state directory; default ``.flywheel`` in the checkout that holds the
                            working directory, ``~/.local/state/flywheel`` outside of one
    ``FLYWHEEL_STORE``      ``s3://bucket/prefix``; default ``s3://flywheel``
    ``AWS_ENDPOINT_URL``    the store's endpoint; unset with ``FLYWHEEL_STORE`` set means AWS itself
    ``FLYWHEEL_SITE``       site name, default ``local``
    ``FLYWHEEL_ROBOT``      robot name, default the host's name
    ``FLYWHEEL_APPROVERS``  Airflow users who may approve a release, with commas; default ``ops``
    ``FLYWHEEL_RAY``        Ray cluster that scans the catalogue and looks at episodes for curation:
                            ``ray://host:10001``, ``auto`` (this machine's) or ``local`` (one of its
                            own); default: this process does it
    ``FLYWHEEL_GIT_REMOTE`` git remote of the checkout that takes every turn's experiment too, such as
                            ``origin``: for workers whose checkout is their own; default: none does
    ======================  =====================================================================

    With neither store variable set, the store is the embedded one of ``FLYWHEEL_HOME``.
    """

    home: Path
    store_url: str
    endpoint: str | None
    embedded: bool
    site: str
    robot: str
    approvers: tuple[str, ...] = ("ops",)
    ray: str = ""
    git_remote: str = ""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Deployment:
        """Read the environment; ``ConfigError`` names a variable that is malformed."""
        env = os.environ if environ is None else environ
        url = env.get("FLYWHEEL_STORE", "")
        endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None
        if url and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?", url):
            raise ConfigError(f"FLYWHEEL_STORE={url!r}: must look like s3://bucket or s3://bucket/prefix")
        if endpoint and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", endpoint):
            shown = re.sub(r"//[^/]*@", "//…@", endpoint)
            raise ConfigError(f"AWS_ENDPOINT_URL={shown!r}: must look like https://host:port without keys")
        host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:63]
        return cls(
            home=_home(env, cwd or Path.cwd()),
            store_url=url or f"s3://{BUCKET}",
            endpoint=endpoint,
            embedded=not (url or endpoint),
            site=_name(env, "FLYWHEEL_SITE", "local"),
            robot=_name(env, "FLYWHEEL_ROBOT", host or "robot"),
            approvers=_approvers(env),
            ray=_ray(env),
            git_remote=_git_remote(env),
        )


def checkout(start: Path) -> Path | None:
    """The nearest directory at or above ``start`` that is a checkout of this project."""
    for d in (start, *start.parents):
        if (d / PARAMS_FILE).is_file() and (d / "flywheel" / "config.py").is_file():
            return d
    return None


def _home(env: Mapping[str, str], cwd: Path) -> Path:
    if given := env.get("FLYWHEEL_HOME"):
        return Path(given).expanduser().absolute()
    if (root := checkout(cwd)) is not None:
        return root / ".flywheel"
    state = env.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "flywheel"


def _approvers(env: Mapping[str, str]) -> tuple[str, ...]:
    names = tuple(a for part in env.get("FLYWHEEL_APPROVERS", "ops").split(",") if (a := part.strip()))
    if not names:  # to Airflow an empty list would mean everybody
        raise ConfigError("FLYWHEEL_APPROVERS is empty: name the Airflow users who may approve a release")
    return names


def _ray(env: Mapping[str, str]) -> str:
    value = env.get("FLYWHEEL_RAY", "")
    if value and not re.fullmatch(r"auto|local|(ray://)?[A-Za-z0-9.-]+:\d{1,5}", value):
        raise ConfigError(f"FLYWHEEL_RAY={value!r}: must be auto, local or look like ray://host:10001")
    return value


def _git_remote(env: Mapping[str, str]) -> str:
    value = env.get("FLYWHEEL_GIT_REMOTE", "")
    if value and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):  # an address may hold a password
        raise ConfigError("FLYWHEEL_GIT_REMOTE: must be the name of a remote, such as origin, no address")
    return value


def _name(env: Mapping[str, str], variable: str, default: str) -> str:
    """A name that is safe as a part of an object key and of a path."""
    value = env.get(variable) or default
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", value):
        raise ConfigError(
            f"{variable}={value!r}: use lower-case letters, digits, '-' and '_', at most 63 of them"
        )
    return value
