"""What the supervisor decides, over every order of events: pure, on an injected clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import ValidationError

from flywheel.edge.supervision import Backoff, Conduct, Heartbeat, SupervisionSettings, Verdict

S = SupervisionSettings()


# ── back-off ──────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.floats(0.0, 1e4), min_size=1, max_size=200))
def test_pauses_grow_to_their_bound_and_start_over_after_a_settled_run(ran: list[float]) -> None:
    state, before = Backoff(), 0.0
    for seconds in ran:
        state, pause = state.ended(seconds, S)
        assert S.backoff_first_s <= pause <= S.backoff_max_s
        if seconds >= S.settled_s:
            assert pause == S.backoff_first_s
        else:
            assert pause >= before
            assert pause == S.backoff_max_s or pause >= 2 * before
        before = pause


# ── heartbeats ────────────────────────────────────────────────────────────────────────────────────────


def test_a_process_that_stands_still_is_noticed_within_its_limit_and_one_look() -> None:
    beat = Heartbeat(2.0)
    assert not beat.stalled(7, 100.0)
    looks = [beat.stalled(7, 100.0 + 0.05 * k) for k in range(1, 60)]
    assert looks.index(True) == 39
    assert not beat.stalled(8, 103.0)


def test_a_supervisor_that_was_itself_stopped_blames_nobody() -> None:
    beat = Heartbeat(2.0)
    beat.stalled(7, 0.0)
    assert not beat.stalled(7, 3600.0)  # both were stopped: an hour says nothing
    assert not beat.stalled(7, 3600.05)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.0, 10.0)), max_size=100))
def test_a_beat_always_counts(steps: list[tuple[int, float]]) -> None:
    beat, beats, now, still = Heartbeat(2.0), 0, 0.0, 0.0
    beat.stalled(0, 0.0)
    for more, seconds in steps:
        beats, now = beats + more, now + seconds
        stalled = beat.stalled(beats, now)
        still = 0.0 if more else still + seconds
        assert not (stalled and more)
        assert not (stalled and still < 2.0 - 1e-9)


# ── conduct of a policy ───────────────────────────────────────────────────────────────────────────────


def test_one_outlier_is_no_reason() -> None:
    conduct = Conduct(S, 0.0, trial=True)
    conduct.output(60_000.0)
    for _ in range(100):
        conduct.output(5.0)
        assert conduct.verdict(1.0)[0] is Verdict.KEEP


def test_latency_over_budget_counts_over_the_window() -> None:
    conduct = Conduct(S, 0.0, trial=False)
    allowed = int(S.late_max * S.window)
    for _ in range(allowed):
        conduct.output(S.latency_budget_ms + 1.0)
        assert conduct.verdict(0.0)[0] is Verdict.KEEP
    conduct.output(S.latency_budget_ms)  # exactly the budget is within it
    assert conduct.verdict(0.0)[0] is Verdict.KEEP
    conduct.output(S.latency_budget_ms + 1.0)
    verdict, why = conduct.verdict(0.0)
    assert verdict is Verdict.GIVE_BACK
    assert f"{allowed + 1} of its last" in why


def test_a_crash_on_trial_counts_at_once_and_later_only_if_repeated() -> None:
    trial, settled = Conduct(S, 0.0, trial=True), Conduct(S, 0.0, trial=False)
    trial.crashed(1.0)
    assert trial.verdict(1.0)[0] is Verdict.GIVE_BACK
    for k in range(S.crashes_max):
        settled.crashed(float(k))
        assert settled.verdict(float(k))[0] is Verdict.KEEP
    settled.crashed(10.0)
    assert settled.verdict(10.0)[0] is Verdict.GIVE_BACK
    assert settled.verdict(10.0 + 2 * S.crash_s)[0] is Verdict.KEEP


def test_a_policy_that_says_nothing_is_never_confirmed() -> None:
    conduct = Conduct(S, 0.0, trial=True)
    assert conduct.verdict(1e9)[0] is Verdict.KEEP


class Judging(RuleBasedStateMachine):
    """Against a model that keeps everything and counts."""

    @initialize(trial=st.booleans(), window=st.integers(2, 8), invalid=st.integers(0, 1))
    def begin(self, trial: bool, window: int, invalid: int) -> None:
        self.s = SupervisionSettings(window=window, invalid_max=invalid, trial_s=5.0, crash_s=10.0)
        self.conduct = Conduct(self.s, 0.0, trial)
        self.trial, self.now = trial, 0.0
        self.outputs: list[tuple[bool, float]] = []
        self.crashes: list[float] = []
        self.valid = 0

    @rule(ms=st.sampled_from([0.0, 99.9, 100.0, 100.1, 1e6]))
    def output(self, ms: float) -> None:
        self.conduct.output(ms)
        self.outputs.append((True, ms))
        self.valid += 1

    @rule()
    def invalid(self) -> None:
        self.conduct.invalid()
        self.outputs.append((False, 0.0))

    @rule()
    def crash(self) -> None:
        self.conduct.crashed(self.now)
        self.crashes.append(self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 10.0]))
    def passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def verdict(self) -> None:
        s, recent = self.s, self.outputs[-self.s.window :]
        crashes = sum(self.now - t <= s.crash_s for t in self.crashes)
        bad = (
            crashes > (0 if self.trial else s.crashes_max)
            or sum(not ok for ok, _ in recent) > s.invalid_max
            or sum(ms > s.latency_budget_ms for _, ms in recent) > s.late_max * s.window
        )
        verdict, why = self.conduct.verdict(self.now)
        assert (verdict is Verdict.GIVE_BACK) == bad
        assert bool(why) == (verdict is not Verdict.KEEP)
        if verdict is Verdict.CONFIRM:
            assert self.trial
            assert self.now >= s.trial_s
            assert self.valid >= s.window
            self.trial = False

    @precondition(lambda self: hasattr(self, "conduct"))
    @invariant()
    def agrees_on_the_trial(self) -> None:
        assert self.conduct.trial == self.trial


TestJudging = Judging.TestCase


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beat_s", 0.0),
        ("window", 0),
        ("late_max", 1.0),
        ("invalid_max", 20),
        ("backoff_max_s", 0.1),
        ("x", 1),
    ],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        SupervisionSettings.model_validate({field: value})
