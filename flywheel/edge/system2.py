"""System 2: one tick of seeing and deciding, the same in both clocks.

A tick captures an observation, asks the policy (or the operator, if one steps in) for targets, turns them
into joint waypoints, looks them over, and publishes them as a chunk that is anchored at the time of capture.
What does not pass is not published: System 1 then walks down its ladder, which is always safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import simplejpeg

from flywheel.edge.images import FrameRing
from flywheel.edge.link import Records
from flywheel.edge.policy import ActionSource, check_actions, check_waypoints
from flywheel.edge.rows import CHUNK_STEPS, INSTRUCTION_BYTES, EventLog, chunk_dtype, clip_text
from flywheel.edge.safety import SafetyLimits
from flywheel.errors import BundleError, ConfigError
from flywheel.robot import FloatArray, Image, Observation, Perception

# An operator gives one target; it is held for this many steps, then the arm ramps to rest.
OVERRIDE_STEPS = 3
JPEG_QUALITY = 95  # of a camera that is given none

Override = Callable[[Observation], FloatArray | None]
Publish = Callable[[Records], None]


class System2:
    """The loop body of one robot's perception and policy.

    ``publish`` takes the chunk (``rows.chunk_dtype``; reused, so copy or write it at once). ``frames`` may be
    None where nobody records. ``jpeg_quality`` is one for all cameras, or one for each. ``policy`` may be
    replaced between ticks.
    """

    def __init__(
        self,
        perception: Perception,
        policy: ActionSource,
        limits: SafetyLimits,
        publish: Publish,
        events: EventLog,
        frames: FrameRing | None = None,
        jpeg_quality: int | Mapping[str, int] = 95,
        first_chunk_id: int = 0,
    ) -> None:
        missing = [c for c in policy.bundle.cameras if c not in perception.cameras]
        if missing:
            raise ConfigError(
                f"policy {policy.bundle.name!r} needs camera {missing[0]!r}; the robot has "
                f"{', '.join(perception.cameras)}"
            )
        if not 1 <= policy.bundle.chunk <= CHUNK_STEPS:
            raise BundleError(f"chunk={policy.bundle.chunk}: a chunk holds 1 to {CHUNK_STEPS} steps")
        self.perception = perception
        self.policy = policy
        self.chunk_id = first_chunk_id - 1  # of the newest chunk published
        self.rejected = 0
        self.infer_ns = 0  # of the last inference
        self._limits = limits
        self._publish = publish
        self._events = events
        self._frames = frames
        cameras = perception.cameras
        self._quality = (
            dict.fromkeys(cameras, jpeg_quality) if isinstance(jpeg_quality, int) else dict(jpeg_quality)
        )
        self._chunk: Records = np.zeros(1, chunk_dtype(len(limits.joints)))
        self._intervening = False

    def self_test(self, instruction: str) -> None:
        """See and decide once, publish nothing; ``BundleError`` if the policy does not fit the robot."""
        seen = self.perception.observe()
        actions = self.policy.infer(seen.images, seen.state, instruction).actions
        if not np.isfinite(actions).all():
            raise BundleError(f"policy {self.policy.bundle.name!r} gives actions that are not finite")

    def tick(
        self,
        now_ns: int,
        instruction: str,
        override: Override | None = None,
        latency_ns: int | None = None,
    ) -> bool:
        """One period; returns whether a chunk was published.

        ``override`` may take over: the target ``[A]`` or chunk ``[T, A]`` that it returns is used instead of
        the policy's. ``latency_ns`` is given in lockstep, which owns the clock: the observation is then of
        ``now_ns``, and that is the time that inference is said to have taken.
        """
        seen = self.perception.observe()
        t_ns = seen.t_ns if latency_ns is None else now_ns
        target = None if override is None else override(seen)
        self._note_intervention(t_ns, target is not None)
        bundle = self.policy.bundle
        self.infer_ns = 0
        if target is None:
            try:
                result = self.policy.infer(seen.images, seen.state, instruction)
            except BundleError as e:
                return self._reject(t_ns, str(e))
            self.infer_ns = result.infer_ns
            actions = result.actions.copy()
            steps = bundle.execute
        else:
            actions = np.atleast_2d(np.array(target, np.float64))[:CHUNK_STEPS]
            if len(actions) == 1:
                actions = np.tile(actions, (OVERRIDE_STEPS, 1))
            steps = len(actions)
        problem = check_actions(actions, bundle, self._limits)
        if problem is None:
            q, tool = self.perception.to_joint_chunk(actions, seen.q)
            problem = check_waypoints(q, tool, seen, bundle.step_ns, self._limits)
        if problem is not None:
            return self._reject(t_ns, problem)

        self.chunk_id += 1
        chunk = self._chunk
        chunk["chunk_id"] = self.chunk_id
        chunk["t0_ns"] = t_ns
        chunk["step_ns"] = bundle.step_ns
        chunk["steps"] = len(q)
        chunk["valid_ns"] = steps * bundle.step_ns
        chunk["q"][0, : len(q)] = q
        chunk["tool"][0, : len(q)] = tool
        self._publish(chunk)
        if self._frames is not None:
            took = 0 if target is not None else self.infer_ns if latency_ns is None else latency_ns
            self._record(t_ns, took, seen, instruction, actions, target is not None)
        return True

    def _reject(self, t_ns: int, reason: str) -> bool:
        self.rejected += 1
        self._events.add(t_ns, "policy", "rejected", {"reason": reason[:400], "digest": self.policy.digest})
        return False

    def _note_intervention(self, t_ns: int, intervening: bool) -> None:
        if intervening != self._intervening:
            self._intervening = intervening
            self._events.add(t_ns, "intervention", "on" if intervening else "off")

    def _record(
        self,
        t_ns: int,
        took_ns: int,
        seen: Observation,
        instruction: str,
        actions: FloatArray,
        intervention: bool,
    ) -> None:
        assert self._frames is not None
        row = self._frames.record()
        row["t_ns"] = t_ns
        row["infer_ns"] = took_ns
        row["state"] = seen.state
        row["action"] = actions[0]
        row["chunk"] = 0.0 if intervention else actions.reshape(-1)
        row["intervention"] = intervention
        row["instruction"] = clip_text(instruction, INSTRUCTION_BYTES)
        row["policy_digest"] = self.policy.digest
        jpegs = {c: encode_image(i, self._quality.get(c, JPEG_QUALITY)) for c, i in seen.images.items()}
        self._frames.push_frame(row, jpegs)


def encode_image(image: Image, quality: int) -> bytes:
    """A JPEG without chroma subsampling (small saturated objects are the task); deterministic."""
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444", False)
    return data
