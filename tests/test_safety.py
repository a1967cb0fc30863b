"""The envelope: what the file may say, and checks that must answer rightly for any input."""

from __future__ import annotations

import hashlib
import math
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
    check_state,
    check_tool,
    check_tracking,
    clamp_torque,
    stop_category,
)
from flywheel.errors import ConfigError
from flywheel.robot import FloatArray
from flywheel.schema import Limit
from tests import robots
from tests.robots import JOINTS, LIMITS

TWIN = Path(safety.__file__).parents[1] / "twin" / "limits.yaml"
BOX = {"clause": "test clause", "lower": [-1.0, -1.0, 0.0], "upper": [1.0, 1.0, 2.0]}
FULL = robots.limits(tool_speed={"clause": "test clause", "max": 1.5}, workspace=BOX)
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


def both(fn: Any, *args: Any) -> int:
    """The compiled answer; the plain function must agree, and leave the same in its arguments."""
    mine = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    theirs = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    with np.errstate(all="ignore"):
        compiled, plain = fn(*mine), fn.py_func(*theirs)
    assert compiled == plain
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    return int(compiled)


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
@settings(max_examples=150, deadline=None)
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
@settings(max_examples=120, deadline=None)
def test_check_tool(tool: FloatArray) -> None:
    flags = both(check_tool, tool, SCALARS)
    low, high = np.array(BOX["lower"]), np.array(BOX["upper"])
    outside = bool(np.any(tool[:3] < low) or np.any(tool[:3] > high))
    assert flags == Limit.TOOL_SPEED * bool(tool[3] > 1.5) | Limit.WORKSPACE * outside


def test_a_tool_that_is_not_reported_breaks_no_limit() -> None:
    assert both(check_tool, np.full(4, np.nan), SCALARS) == 0


@given(vectors(), vectors())
@settings(max_examples=120, deadline=None)
def test_check_tracking_stops_on_any_error_that_is_not_surely_small(q: FloatArray, ref: FloatArray) -> None:
    small = all(abs(float(r) - float(x)) <= 0.25 for r, x in zip(ref, q, strict=True))
    assert both(check_tracking, q, ref, SCALARS) == (0 if small else Limit.TRACKING_ERROR)


@given(st.integers(0, 2**10 - 1), st.sampled_from([CATEGORY_1, CATEGORY_2]))
@settings(deadline=None)
def test_the_most_severe_broken_limit_decides_the_stop(flags: int, protective: int) -> None:
    stop = both(stop_category, flags, protective)
    controlled = Limit.POSITION | Limit.VELOCITY | Limit.TOOL_SPEED | Limit.WORKSPACE | Limit.TRACKING_ERROR
    wanted = NO_STOP
    if flags & Limit.PROTECTIVE_STOP:
        wanted = protective
    if flags & controlled:
        wanted = CATEGORY_1
    if flags & Limit.NOT_FINITE:
        wanted = CATEGORY_0
    assert stop == wanted


@given(vectors())
@settings(max_examples=120, deadline=None)
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
@settings(max_examples=150, deadline=None)
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
