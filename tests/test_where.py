"""What may be asked of the catalogue, and what must not reach the engine."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel.catalogue import COLUMNS
from flywheel.catalogue.engine import load
from flywheel.catalogue.where import DEPTH_MAX, FUNCTIONS, KEYWORDS, LENGTH_MAX, TOKENS_MAX, check
from flywheel.errors import ConfigError

FAIR = [
    "outcome = 'timeout' and site = 'lab'",
    "OUTCOME <> 'success' AND NOT (gaps > 0 or drops > 0)",
    "task like '%red%' and seed in (1, 2, 3)",
    "list_contains(triggers, 'intervention') and seconds between 1 and 2.5e1",
    "operator_outcome is not null and lower(shift) = 'o''clock'",
    "start_ns / 1000000000 >= -5 and bytes % 2 = 0",
    "refused is null or problem ilike '%SELECT; drop -- it%'",
]

ATTACKS = {
    "second statement": "outcome = 'timeout'; drop table episodes",
    "subquery": "gaps in (select 1)",
    "exists": "exists (select 1)",
    "comment": "gaps = 0 -- and site = 'lab'",
    "block comment": "gaps = 0 /* x */",
    "fetch of a URL": "url_download(task) is not null",
    "fetch with a space": "url_download (task) is not null",
    "a model that is asked": "prompt(task) = 'x'",
    "a file that is read": "read_parquet('s3://other/x') = 1",
    "a function named like a column": "task('x') = 'y'",
    "escaped quote": r"task = '\' or url_download(task) is null or ''",
    "escape string": r"task = E'\x41'",
    "unclosed quote": "task = 'x",
    "quoted name": "\"task\" = 'x'",
    "backtick": "`task` = 'x'",
    "parameter": "gaps = $1",
    "cast operator": "gaps::string = '0'",
    "another table": "other.gaps = 0",
    "star": "* = 1 from secrets",
    "case": "case when gaps = 0 then true end",
    "cast": "cast(gaps as string) = '0'",
    "null byte": "gaps = 0\x00",
    "letters that look alike": "gарs = 0",
    "more ) than (": "gaps = 0) or (1 = 1",
    "unclosed (": "(gaps = 0",
    "empty": "  ",
    "too long": "gaps = 0 or " * 400 + "gaps = 0",
    "too many": " or ".join(["gaps=0"] * TOKENS_MAX)[: LENGTH_MAX - 3],
    "too deep": "(" * (DEPTH_MAX + 1) + "gaps = 0" + ")" * (DEPTH_MAX + 1),
}


@pytest.mark.parametrize("where", FAIR)
def test_a_condition_passes_and_daft_understands_it(where: str) -> None:
    daft = load()
    frame = daft.from_arrow(COLUMNS.empty_table()).where(daft.sql_expr(check(where)))
    assert frame.to_arrow().num_rows == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_anything_but_a_condition_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--where"):
        check(ATTACKS[name])


@pytest.mark.parametrize(
    ("wrong", "right"), [("outcom", "outcome"), ("policy", "policy_digest"), ("Shft", "shift")]
)
def test_an_unknown_column_is_named_with_the_nearest_and_all_there_are(wrong: str, right: str) -> None:
    with pytest.raises(
        ConfigError, match=f"unknown column '{wrong}'; did you mean '{right}'.*episode_id.*reader"
    ):
        check(f"{wrong} = 'x'")


@given(st.text(max_size=60) | st.text("()'- ;/*.,=abcdeglnoprstuw_1", max_size=40))
def test_what_passes_consists_of_known_words_alone(text: str) -> None:
    try:
        passed = check(text)
    except ConfigError:
        return
    bare = re.sub(r"'(?:[^']|'')*'", " ", passed)
    words = set(re.findall(r"[^\W\d]\w*", bare)) - {"e", "E"}
    assert words <= {*KEYWORDS, *FUNCTIONS, *COLUMNS.names}
    assert not set(bare) & set('"`;\\$:.@#&|~{}[]\x00') - {"."}
    assert not re.search(r"[-+*/%<>=!]{2}", re.sub("<>|!=|<=|>=", " ", bare)), "signs that make another"


@pytest.mark.parametrize(
    "where",
    [
        "(" * DEPTH_MAX + "gaps = 0" + ")" * DEPTH_MAX,
        "not " * (TOKENS_MAX - 3) + "gaps = 0",
        " or ".join(["gaps = 0"] * (TOKENS_MAX // 4)),
        "gaps in (" + ", ".join("1" * 9 for _ in range(TOKENS_MAX // 2 - 3)) + ")",
        "gaps = " + "- " * (TOKENS_MAX - 3) + "1",
    ],
    ids=["deep", "not", "or", "in", "minus"],
)
def test_the_longest_and_deepest_that_passes_does_not_break_the_engine(where: str) -> None:
    """It recurses, in Rust: a stack that overflows there ends the process."""
    daft = load()
    try:
        frame = daft.from_arrow(COLUMNS.empty_table()).where(daft.sql_expr(check(where)))
        assert frame.to_arrow().num_rows == 0
    except Exception as e:
        assert type(e).__module__.startswith("daft"), e  # a refusal, which `select` turns into one of ours
