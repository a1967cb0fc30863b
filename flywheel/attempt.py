"""One attempt at the task in the twin, in lockstep: what evaluation counts and what the simulated fleet does.

An attempt depends on (bundle, shift, seed) alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flywheel.config import EdgeSettings
from flywheel.edge.lockstep import Lockstep, LockstepResult
from flywheel.edge.policy import ActionSource, Policy
from flywheel.robot import FloatArray, Observation
from flywheel.robot.twin import ALL_CAMERAS, POLICY_CAMERAS, TwinRobot
from flywheel.schema import Mode, Outcome
from flywheel.twin.cell import Cell
from flywheel.twin.operator import plan
from flywheel.twin.parameters import TwinParameters
from flywheel.twin.shift import shift as named_shift

EPISODE_S = 6.0  # time limit of the policy; the default of params.yaml's twin.episode_s
OPERATOR_S = 10.0  # time limit of the operator's correction
OPERATOR_STEPS = 10
STEP_S = 0.1


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt went. ``tracking_*_rad``: reference against joints while powered.

    ``progress``: the furthest that the task stood by the policy's doing, 0 to 1 (see ``Cell.progress``),
    looked at every 0.1 s.
    """

    outcome: Outcome
    seed: int
    duration_s: float
    steps: int
    tracking_rms_rad: float
    tracking_p99_rad: float
    progress: float
    mode_ticks: dict[str, int] = field(default_factory=dict)
    invalid_chunks: int = 0
    operator_outcome: Outcome | None = None
    infer_ns: tuple[int, ...] = ()


class Attempt:
    """A cell, a policy and the runtime around them, for any number of attempts one after the other.

    With ``record``, both cameras are rendered and every row goes to ``lockstep.rings``, where a recorder
    (``lockstep.recorder``) finds them; with ``operator_takes_over``, the scripted operator finishes what the
    policy did not. ``parameters`` are the twin's, where they were identified.
    """

    def __init__(
        self,
        bundle: Path,
        shift: str,
        *,
        record: bool = False,
        operator_takes_over: bool = False,
        episode_s: float = EPISODE_S,
        settings: EdgeSettings | None = None,
        policy: ActionSource | None = None,
        jpeg_quality: int | Mapping[str, int] = 95,
        parameters: TwinParameters | None = None,
    ) -> None:
        settings = EdgeSettings() if settings is None else settings
        self.cell = Cell(named_shift(shift), parameters)
        self.robot = TwinRobot(
            self.cell, ALL_CAMERAS if record else POLICY_CAMERAS, rate_hz=settings.control_hz
        )
        self.policy: ActionSource = Policy.load(bundle) if policy is None else policy
        self.lockstep = Lockstep(self.robot, self.robot, self.policy, settings, record, jpeg_quality)
        self._latency_ns = self.lockstep.latency_ns
        self._operator = operator_takes_over
        self._episode_s = episode_s
        self._progress = 0.0

    @property
    def digest(self) -> str:
        """Of the bundle's loaded bytes."""
        return self.policy.digest

    def use(self, policy: ActionSource) -> None:
        """Swap the policy between attempts."""
        self.policy = policy
        self.lockstep.system2.policy = policy

    def run(self, seed: int, target: str | None = None, *, latency_ms: float | None = None) -> AttemptResult:
        """One attempt in the scene of ``seed``; ``latency_ms`` is System 2's in this attempt."""
        loop, cell = self.lockstep, self.cell
        loop.latency_ns = self._latency_ns if latency_ms is None else round(latency_ms * 1e6)
        self.robot.reset(seed, target)
        loop.reset()
        self._progress = 0.0
        about = {"instruction": cell.instruction, "seed": seed, "shift": cell.shift.name}
        loop.events.add(loop.now_ns, "task", "start", about)
        ran = loop.run(self._episode_s, cell.instruction, until=self._ended)
        outcome, progress = self._outcome(ran), self._come_so_far()
        loop.events.add(loop.now_ns, "task", "end", {"outcome": outcome.value, "by": "policy"})
        corrected = None
        if self._operator and outcome is not Outcome.SUCCESS and not cell.lost:
            corrected = self._correct()
        return AttemptResult(
            outcome=outcome,
            seed=seed,
            duration_s=ran.sim_s,
            steps=ran.ticks,
            tracking_rms_rad=ran.tracking.rms,
            tracking_p99_rad=ran.tracking.p99,
            progress=progress,
            mode_ticks=ran.modes,
            invalid_chunks=ran.rejected,
            operator_outcome=corrected,
            infer_ns=ran.infer_ns,
        )

    def _correct(self) -> Outcome:
        loop, cell = self.lockstep, self.cell
        if (
            loop.system1.mode >= Mode.STOP_1
        ):  # a stop was acknowledged by the operator before he moves the arm
            loop.system1.reset()
            self.robot.power_on()

        def operate(_: Observation) -> FloatArray:
            held = cell.held >= 0
            return plan(cell.tip, held, cell.held == cell.target, cell.target_top, OPERATOR_STEPS, STEP_S)

        loop.run(OPERATOR_S, cell.instruction, until=lambda: cell.success, override=operate)
        outcome = Outcome.SUCCESS if cell.success else Outcome.TIMEOUT
        loop.events.add(loop.now_ns, "task", "end", {"outcome": outcome.value, "by": "operator"})
        return outcome

    def _ended(self) -> bool:
        cell = self.cell
        self._come_so_far()
        return cell.success or cell.wrong_object or cell.dropped or self.lockstep.system1.mode >= Mode.STOP_1

    def _come_so_far(self) -> float:
        self._progress = max(self._progress, self.cell.progress)
        return self._progress

    def _outcome(self, ran: LockstepResult) -> Outcome:
        cell = self.cell
        if cell.success:
            return Outcome.SUCCESS
        if ran.stopped:
            return Outcome.STOPPED
        if cell.wrong_object:
            return Outcome.WRONG_OBJECT
        return Outcome.DROPPED if cell.dropped else Outcome.TIMEOUT

    def close(self) -> None:
        """Free the cell's rendering context."""
        self.cell.close()
