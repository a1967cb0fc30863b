"""The envelope: what the file may say, and checks that must answer rightly for any input."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flywheel.edge import safety
from flywheel.edge.safety import (
    CATEGORY_0,
    CATEGORY_1,
    CATEGORY_2,
    CHUNK_SLACK,
    NO_STOP,
    SafetyLimits,
    admit_waypoints,
    check_speed,
    check_state,
    check_tool,
    check_tracking,
    clamp_torque,
    speed_allowed,
    speed_scale,
    stop_category,
)
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray
from flywheel.schema import Limit
from tests import robots
from tests.robots import JOINTS, LIMITS

ROOT = Path(__file__).parents[1]
TWIN = Path(safety.__file__).parents[1] / "twin" / "limits.yaml"
BOX = {"clause": "test clause", "lower": [-1.0, -1.0, 0.0], "upper": [1.0, 1.0, 2.0]}
SPEED = {"clause": "test clause", "max": 1.5}
# Round numbers: T_r + T_s = 0.5 s, so that a person needs 1.6 · 0.5 + 0.2 = 1 m and 0.5 s of the tool's way.
NEAR_BY = {
    "clause": "test clause", "human_speed_m_s": 1.6, "reaction_s": 0.1, "stopping_s": 0.4,
    "intrusion_m": 0.1, "sensor_m": 0.06, "robot_m": 0.04,
}  # fmt: skip
# m_R = 8/2 + 1 = 5 kg. Hand: 1/mu = 1/0.6 + 1/5, F = 100 N; arm: F = 200 N/cm2 · 0.5 cm2 = 100 N as well.
TOUCH: dict[str, Any] = {
    "clause": "test clause", "moving_mass_kg": 8.0, "payload_kg": 1.0, "area_cm2": 0.5,
    "regions": [
        {"name": "hand", "force_n": 100.0, "pressure_n_cm2": 900.0, "stiffness_n_m": 75e3, "mass_kg": 0.6},
        {"name": "arm", "force_n": 300.0, "pressure_n_cm2": 200.0, "stiffness_n_m": 30e3, "mass_kg": 3.0},
    ],
}  # fmt: skip
FULL = robots.limits(tool_speed=SPEED, workspace=BOX)
SHARED = robots.limits(tool_speed=SPEED, separation=NEAR_BY, contact=TOUCH).scalars()
APART = robots.limits(tool_speed=SPEED, separation=NEAR_BY).scalars()
CONTACT = robots.limits(tool_speed=SPEED, contact=TOUCH).scalars()
TABLE, SCALARS = FULL.table(), FULL.scalars()
EDGES = sorted(
    {float(x) for x in TABLE.flat}
    | {float(x) for x in SCALARS if math.isfinite(x)}
    | {3.0 * 1.25, 2.0 * 1.25, 2.02, 1.52, -2.02, -1.02, 2.2, 1.7, -2.2, -1.2}
)
NEAR = [s * e for e in EDGES for s in (1.0, -1.0)]
ODD = [math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e308, -1e308]


def numbers() -> st.SearchStrategy[float]:
    """Dense where answers change: at limits, one float beside them, and where arithmetic breaks."""
    beside = st.sampled_from(NEAR).flatmap(
        lambda e: st.sampled_from([e, math.nextafter(e, math.inf), math.nextafter(e, -math.inf)])
    )
    return beside | st.sampled_from(ODD) | st.floats(-4, 4)


def vectors(n: int = JOINTS) -> st.SearchStrategy[FloatArray]:
    return st.lists(numbers(), min_size=n, max_size=n).map(lambda v: np.array(v, np.float64))


def both(fn: Any, *args: Any) -> Any:
    """The compiled answer; the plain function must agree, and leave the same in its arguments."""
    mine = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    theirs = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    with np.errstate(all="ignore"):  # without compilation (coverage, mutants) there is only the plain one
        compiled, plain = fn(*mine), getattr(fn, "py_func", fn)(*theirs)
    assert compiled == plain
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    return compiled


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_twins_limits_load_and_are_hashed_as_sha256sum_does() -> None:
    limits = SafetyLimits.load(TWIN)
    assert limits.sha256 == hashlib.sha256(TWIN.read_bytes()).hexdigest()
    assert limits.table().shape == (6, 5)
    assert limits.tracking_error.max == 0.25


def test_every_limit_names_the_clause_that_it_serves() -> None:
    doc = yaml.safe_load(TWIN.read_text())
    for name, section in doc.items():
        if isinstance(section, dict):
            assert "ISO" in section["clause"] or "IEC" in section["clause"], name
            stripped = doc | {name: {k: v for k, v in section.items() if k != "clause"}}
            with pytest.raises(ConfigError, match=f"{name}.clause"):
                SafetyLimits.parse(yaml.safe_dump(stripped).encode(), "x.yaml")


BAD: list[tuple[str, Any, str]] = [
    ("speed", {"max": 1}, "speed"),
    ("velocity", LIMITS["velocity"] | {"max": [3.0]}, "velocity.max has 1 values, but there are 2 joints"),
    ("velocity", LIMITS["velocity"] | {"max": [3.0, math.nan]}, "velocity.max.1"),
    ("velocity", LIMITS["velocity"] | {"max": [3.0, math.inf]}, "velocity.max.1"),
    ("velocity", LIMITS["velocity"] | {"max": [3.0, -1.0]}, "velocity.max.1 = -1.0"),
    ("velocity", LIMITS["velocity"] | {"max": [3.0, True]}, "velocity.max.1"),
    ("velocity", LIMITS["velocity"] | {"overspeed": 0.9}, "velocity.overspeed = 0.9"),
    ("position", LIMITS["position"] | {"lower": [2.0, -1.0]}, r"lower\[0\]=2.0 must lie below"),
    ("position", LIMITS["position"] | {"lower": [-2.0] * 3}, "position.lower has 3 values"),
    ("torque", None, "torque"),
    ("jerk", LIMITS["jerk"] | {"clause": "ISO"}, "jerk.clause"),
    ("stops", LIMITS["stops"] | {"protective": 0}, "stops.protective = 0"),
    ("ladder", LIMITS["ladder"] | {"ramp_s": 0.0}, "ladder.ramp_s = 0.0"),
    ("ladder", LIMITS["ladder"] | {"hold": 1.0}, "ladder.hold"),
    ("workspace", BOX | {"upper": [1.0, -1.0, 2.0]}, r"workspace.lower\[1\]"),
    ("separation", NEAR_BY | {"reaction_s": 0.0}, "separation.reaction_s = 0.0"),
    ("separation", NEAR_BY | {"intrusion_m": -0.1}, "separation.intrusion_m = -0.1"),
    ("separation", {k: v for k, v in NEAR_BY.items() if k != "clause"}, "separation.clause"),
    ("separation", NEAR_BY, "separation limits the tool's speed: it needs tool_speed"),
    ("contact", TOUCH, "contact limits the tool's speed: it needs tool_speed"),
    ("contact", TOUCH | {"regions": []}, "contact.regions"),
    ("contact", TOUCH | {"regions": [TOUCH["regions"][0] | {"mass_kg": 0}]}, "contact.regions.0.mass_kg"),
    ("schema_version", 2, "schema_version = 2"),
    ("joints", [], "joints"),
]


@pytest.mark.parametrize(("key", "value", "says"), BAD)
def test_a_limits_file_that_is_wrong_is_refused_by_name(key: str, value: Any, says: str) -> None:
    doc = LIMITS | {key: value}
    if value is None:
        del doc[key]
    with pytest.raises(ConfigError, match=says):
        SafetyLimits.parse(yaml.safe_dump(doc).encode(), "tiny.yaml")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe\xff", "not valid YAML"),
        (b"[1]", "must be a mapping"),
        (b"joints: [a]\njoints: [b]\n", "given twice"),
    ],
)
def test_a_file_that_is_no_limits_file_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SafetyLimits.parse(data, "tiny.yaml")


def test_a_limits_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: limits cannot be read: No such file"):
        SafetyLimits.load(tmp_path / "none.yaml")


def test_limits_made_in_code_are_hashed_by_their_content() -> None:
    a = SafetyLimits.model_validate_json(FULL.model_dump_json())
    b = a.model_copy(update={"robot": "other"})
    assert len(a.sha256) == 64
    assert a.sha256 != b.sha256


def test_absent_tool_limits_are_infinite() -> None:
    s = robots.limits().scalars()
    assert np.isinf(s[safety.TOOL_SPEED : safety.TO_REST]).all()
    assert s[safety.TO_REST] == 0.0
    assert s[safety.CONTACT_SPEED] == math.inf
    assert s[safety.WORKSPACE_LOWER] < 0 < s[safety.WORKSPACE_UPPER]


@pytest.mark.parametrize(("category", "code"), [(1, CATEGORY_1), (2, CATEGORY_2)])
def test_the_protective_stop_has_the_category_that_the_file_asks_for(category: int, code: int) -> None:
    limits = robots.limits(stops=LIMITS["stops"] | {"protective": category})
    protective = int(limits.times()[safety.PROTECTIVE])
    assert both(stop_category, int(Limit.PROTECTIVE_STOP), protective) == code


# ── the checks ────────────────────────────────────────────────────────────────────────────────────────


@given(vectors(), vectors(), vectors(), vectors(JOINTS * JOINTS))
@settings(max_examples=150)
def test_check_state(q: FloatArray, dq: FloatArray, bias: FloatArray, mass: FloatArray) -> None:
    flags = both(check_state, q, dq, bias, mass.reshape(JOINTS, JOINTS), TABLE, SCALARS)
    if not np.isfinite(np.concatenate([q, dq, bias, mass])).all():
        assert flags == Limit.NOT_FINITE
        return
    far = bool(np.any(q < TABLE[0] - 0.02) or np.any(q > TABLE[1] + 0.02))
    fast = bool(np.any(np.abs(dq) > TABLE[2] * 1.25))
    assert flags == Limit.POSITION * far | Limit.VELOCITY * fast


@given(vectors(4))
@example(np.array([1.0, -1.0, 0.0, 1.5]))
@example(np.array([1.0, -1.0, 2.0, math.nextafter(1.5, 2.0)]))
@settings(max_examples=120)
def test_check_tool(tool: FloatArray) -> None:
    flags = both(check_tool, tool, SCALARS)
    low, high = np.array(BOX["lower"]), np.array(BOX["upper"])
    outside = bool(np.any(tool[:3] < low) or np.any(tool[:3] > high))
    assert flags == Limit.TOOL_SPEED * bool(tool[3] > 1.5) | Limit.WORKSPACE * outside


def test_a_tool_that_is_not_reported_breaks_no_limit() -> None:
    assert both(check_tool, np.full(4, np.nan), SCALARS) == 0


def test_the_contact_speed_is_that_of_the_two_body_model_for_the_most_sensitive_region() -> None:
    """At v the energy of the impact is what the spring takes up at the permissible force."""
    speeds = []
    for r in TOUCH["regions"]:
        mu = r["mass_kg"] * 5.0 / (r["mass_kg"] + 5.0)
        v = 100.0 / math.sqrt(mu * r["stiffness_n_m"])
        assert 0.5 * mu * v**2 == pytest.approx(100.0**2 / (2 * r["stiffness_n_m"]))
        speeds.append(v)
    assert CONTACT[safety.CONTACT_SPEED] == pytest.approx(min(speeds))
    assert speeds[0] == pytest.approx(0.4989, abs=1e-4)
    lighter = robots.limits(tool_speed=SPEED, contact=TOUCH | {"payload_kg": 0.0}).scalars()
    assert lighter[safety.CONTACT_SPEED] > CONTACT[safety.CONTACT_SPEED]


def test_the_separation_distance_is_formula_1_of_the_technical_specification() -> None:
    assert APART[safety.TO_REST] == pytest.approx(0.5)
    assert APART[safety.KEEP_AWAY] == pytest.approx(1.6 * 0.5 + 0.1 + 0.06 + 0.04)
    tool = np.array([0.0, 0.0, 0.0, 0.8])
    needed = float(APART[safety.KEEP_AWAY] + 0.8 * APART[safety.TO_REST])
    assert both(check_speed, tool, needed, APART) == 0
    assert both(check_speed, tool, math.nextafter(needed, 0.0), APART) == Limit.SEPARATION
    assert both(speed_allowed, needed, APART) == pytest.approx(0.8)


@given(numbers(), numbers(), st.sampled_from(["none", "apart", "contact", "shared"]))
@example(math.nan, math.nan, "shared")
@example(math.nan, 0.0, "contact")
@example(math.inf, 1.5, "apart")
@example(1.0, 0.0, "apart")
@example(-math.inf, -math.inf, "shared")
@settings(max_examples=250)
def test_a_speed_is_a_stop_unless_a_person_is_surely_safe(speed: float, human: float, which: str) -> None:
    s = {"none": SCALARS, "apart": APART, "contact": CONTACT, "shared": SHARED}[which]
    flags = both(check_speed, np.array([0.0, 0.0, 0.0, speed]), human, s)
    v = 1.5 if math.isnan(speed) else speed  # not reported: as fast as the tool may be
    wanted = 0
    if which in ("contact", "shared") and v > s[safety.CONTACT_SPEED]:
        wanted |= Limit.CONTACT
    if which in ("apart", "shared") and not human >= s[safety.KEEP_AWAY] + v * s[safety.TO_REST]:
        wanted |= Limit.SEPARATION
    assert flags == wanted


@given(numbers(), st.sampled_from(["none", "apart", "contact", "shared"]))
@example(math.nan, "apart")
@example(math.inf, "apart")
@example(1.0, "apart")
@settings(max_examples=250)
def test_the_speed_that_is_allowed_breaks_no_limit_and_slows_the_joints(human: float, which: str) -> None:
    s = {"none": SCALARS, "apart": APART, "contact": CONTACT, "shared": SHARED}[which]
    allowed = both(speed_allowed, human, s)
    assert allowed >= 0.0
    if which == "none":
        assert allowed == math.inf
    if which == "contact":
        assert allowed == s[safety.CONTACT_SPEED]
    if which == "apart" and human == math.inf:
        assert allowed == math.inf
    if which in ("apart", "shared") and not human > s[safety.KEEP_AWAY]:
        assert allowed == 0.0  # and any speed at all is a stop
    scale = both(speed_scale, allowed, s)
    assert 0.0 <= scale <= 1.0
    assert scale == (1.0 if allowed >= 1.5 else pytest.approx(safety.SLOWER * allowed / 1.5))
    tool = np.array([0.0, 0.0, 0.0, min(scale * 1.5, allowed)])
    if allowed > 0.0 or which in ("none", "contact"):
        assert check_speed(tool, human, s) == 0


@pytest.mark.parametrize("allowed", [math.nan, -1.0, -math.inf])
def test_no_allowed_speed_can_turn_the_joints_round(allowed: float) -> None:
    assert both(speed_scale, allowed, APART) in (0.0, 1.0)
    assert both(speed_scale, -1.0, APART) == 0.0


@given(vectors(), vectors())
@settings(max_examples=120)
def test_check_tracking_stops_on_any_error_that_is_not_surely_small(q: FloatArray, ref: FloatArray) -> None:
    small = all(abs(float(r) - float(x)) <= 0.25 for r, x in zip(ref, q, strict=True))
    assert both(check_tracking, q, ref, SCALARS) == (0 if small else Limit.TRACKING_ERROR)


@given(st.integers(0, 2**12 - 1), st.sampled_from([CATEGORY_1, CATEGORY_2]))
def test_the_most_severe_broken_limit_decides_the_stop(flags: int, protective: int) -> None:
    stop = both(stop_category, flags, protective)
    controlled = Limit.POSITION | Limit.VELOCITY | Limit.TOOL_SPEED | Limit.WORKSPACE | Limit.TRACKING_ERROR
    wanted = NO_STOP
    if flags & (Limit.PROTECTIVE_STOP | Limit.SEPARATION | Limit.CONTACT):
        wanted = protective
    if flags & controlled:
        wanted = CATEGORY_1
    if flags & Limit.NOT_FINITE:
        wanted = CATEGORY_0
    assert stop == wanted


@given(vectors())
@settings(max_examples=120)
def test_no_torque_leaves_that_is_too_large_or_not_a_number(tau: FloatArray) -> None:
    before = tau.copy()
    flags = both(clamp_torque, tau, TABLE)
    clamp_torque(tau, TABLE)
    assert np.isfinite(tau).all()
    assert (np.abs(tau) <= TABLE[5]).all()
    bad = ~np.isfinite(before)
    assert (tau[bad] == 0).all()
    np.testing.assert_array_equal(tau[~bad], np.clip(before[~bad], -TABLE[5][~bad], TABLE[5][~bad]))
    over = bool(np.any(np.abs(before[~bad]) > TABLE[5][~bad]))
    assert flags == Limit.NOT_FINITE * bool(bad.any()) | Limit.TORQUE * over


@given(st.integers(1, 3), st.lists(vectors(), min_size=3, max_size=3), vectors(3))
@settings(max_examples=150)
def test_waypoints_are_in_range_and_finite_or_refused(
    steps: int, rows: list[FloatArray], tool: FloatArray
) -> None:
    q = np.array(rows)
    before = q.copy()
    flags = both(admit_waypoints, q, tool, steps, TABLE)
    admit_waypoints(q, tool, steps, TABLE)
    used = before[:steps]
    beyond = np.any(used < TABLE[0] - CHUNK_SLACK) or np.any(used > TABLE[1] + CHUNK_SLACK)
    odd = not (np.isfinite(used).all() and np.isfinite(tool[:steps]).all())
    if flags >= 0:
        assert not odd
        assert not beyond
        np.testing.assert_array_equal(q[:steps], np.clip(used, TABLE[0], TABLE[1]))
        assert ((tool[:steps] >= 0) & (tool[:steps] <= 1)).all()
        assert flags == Limit.POSITION * bool(np.any(q[:steps] != used))
    else:
        assert -flags in ({Limit.NOT_FINITE} if odd else set()) | ({Limit.POSITION} if beyond else set())
    np.testing.assert_array_equal(q[steps:], before[steps:])


@pytest.mark.parametrize(("beyond", "acted"), [(0.199, Limit.POSITION), (0.201, -Limit.POSITION)])
def test_a_waypoint_a_fifth_of_a_radian_out_of_range_is_the_last_that_is_forgiven(
    beyond: float, acted: int
) -> None:
    for edge, sign in ((TABLE[0], -1.0), (TABLE[1], 1.0)):
        assert both(admit_waypoints, np.array([edge + sign * beyond]), np.zeros(1), 1, TABLE) == acted


def test_joints_aim_a_tenth_below_the_speed_that_a_persons_nearness_allows() -> None:
    assert both(speed_scale, 0.75, APART) == pytest.approx(0.9 * 0.75 / 1.5)


@pytest.mark.slow
def test_every_branch_of_the_envelope_and_the_mode_machine_is_taken_both_ways() -> None:
    """In a process without compilation, so that it is the functions themselves that are measured."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-s", "-p", "tests.branches", "-p", "no:cacheprovider",
            "tests/test_safety.py", "tests/test_mode.py", "-k", "not every_branch",
        ],
        cwd=ROOT, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    counted = re.findall(r"(\w+)\.py: (\d+) of (\d+) branch outcomes", done.stdout)
    assert {name for name, _, _ in counted} == {"safety", "mode"}
    assert all(a == b and int(b) > 40 for _, a, b in counted)
