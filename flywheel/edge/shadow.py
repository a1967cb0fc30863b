"""A candidate beside the policy in use: the same observations, its actions compared and thrown away."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flywheel.schema import ShadowReport

FloatArray = npt.NDArray[np.floating]


class Comparison:
    """Sums up how a candidate's chunks differ from those that were acted by.

    ``execute`` is the number of steps of a chunk that are executed before the next one: later steps of it
    never matter. ``low`` and ``high`` (``[A]``) bound what an action may be.
    """

    def __init__(
        self,
        rollout_id: str,
        robot: str,
        digest: str,
        current_digest: str,
        *,
        execute: int,
        low: FloatArray,
        high: FloatArray,
    ) -> None:
        self._rollout_id, self._robot = rollout_id, robot
        self._digest, self._current_digest = digest, current_digest
        self._execute, self._low, self._high = execute, low, high
        self._episodes = self._chunks = self._invalid = self._values = 0
        self._square = 0.0
        self._infer_ns: list[int] = []
        self._current_infer_ns: list[int] = []

    def add(self, candidate: FloatArray, infer_ns: int, current: FloatArray, current_infer_ns: int) -> None:
        """Compare two chunks (absolute actions ``[T, A]``) for one observation."""
        steps = candidate[: self._execute]
        self._chunks += 1
        self._infer_ns.append(infer_ns)
        self._current_infer_ns.append(current_infer_ns)
        sound = np.isfinite(candidate).all() and (steps >= self._low).all() and (steps <= self._high).all()
        if not sound:
            self._invalid += 1
            return
        difference = steps.astype(np.float64) - current[: self._execute]
        self._square += float(np.square(difference).sum())
        self._values += difference.size

    def end_episode(self) -> None:
        """An attempt at the task ended."""
        self._episodes += 1

    def report(self) -> ShadowReport:
        """What was seen so far; the rms is over the sound pairs."""
        return ShadowReport(
            rollout_id=self._rollout_id,
            robot=self._robot,
            digest=self._digest,
            current_digest=self._current_digest,
            episodes=self._episodes,
            chunks=self._chunks,
            invalid=self._invalid,
            rms_difference=float(np.sqrt(self._square / self._values)) if self._values else 0.0,
            infer_p99_ns=_p99(self._infer_ns),
            current_infer_p99_ns=_p99(self._current_infer_ns),
        )


def _p99(values: list[int]) -> int:
    return int(np.quantile(values, 0.99, method="inverted_cdf")) if values else 0
