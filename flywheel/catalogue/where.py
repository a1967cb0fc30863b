"""What may stand in ``--where``: a condition on the catalogue's columns, and nothing else.

The engine's own parser takes far more than a condition (functions that fetch URLs, subqueries, what stands
behind a semicolon), so what it is given is checked first, token by token, against what is known to be
harmless. Its length and depth are bounded too: it recurses.
"""

from __future__ import annotations

import difflib
import re

from flywheel.catalogue.rows import COLUMNS
from flywheel.errors import ConfigError

LENGTH_MAX = 4000
TOKENS_MAX = 400
DEPTH_MAX = 24

KEYWORDS = frozenset({"and", "or", "not", "in", "like", "ilike", "between", "is", "null", "true", "false"})
FUNCTIONS = frozenset(
    {"lower", "upper", "length", "abs", "contains", "starts_with", "ends_with", "list_contains", "list_count"}
)
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<text>'[^'\\]*(?:''[^'\\]*)*')|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?\b)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<sign><>|!=|<=|>=|[=<>+\-*/%(),])"
)
_SHAPE = "it must be a condition such as outcome = 'timeout' and site = 'lab'"


def check(where: str, option: str = "--where") -> str:
    """``where``, names in lower case and tokens apart, if it is a condition on the catalogue's columns.

    Raises ``ConfigError``, which names what does not belong there and the remedy.
    """
    if not where.strip():
        raise ConfigError(f"{option} is empty: {_SHAPE}")
    if len(where) > LENGTH_MAX:
        raise ConfigError(f"{option}: {len(where)} characters, at most {LENGTH_MAX}; split it in two queries")
    out: list[str] = []
    at = depth = count = 0
    while at < len(where):
        found = _TOKEN.match(where, at)
        if found is None or where.startswith(("--", "/*"), at):
            raise ConfigError(f"{option}: {_excerpt(where, at)} does not belong in a condition; {_SHAPE}")
        at = found.end()
        token = found.group()
        if found.lastgroup == "space":
            continue
        count += 1
        if found.lastgroup == "name":
            if where.startswith("'", at):
                raise ConfigError(f"{option}: {_excerpt(where, at)}: a text in quotes may not follow a name")
            token = _name(token, where[at:].lstrip().startswith("("), option)
        depth += (token == "(") - (token == ")")
        if depth < 0 or depth > DEPTH_MAX or count > TOKENS_MAX:
            what = "more ) than (" if depth < 0 else "too long or too deep"
            raise ConfigError(f"{option}: {what} at {_excerpt(where, found.start())}; {_SHAPE}")
        out.append(token)
    if depth:
        raise ConfigError(f"{option}: {depth} ( without ); {_SHAPE}")
    return " ".join(out)  # so that no two signs make one that the engine knows and this does not


def _name(name: str, called: bool, option: str) -> str:
    lower = name.lower()
    if lower in KEYWORDS:
        return lower
    if called:
        if lower in FUNCTIONS:
            return lower
        raise ConfigError(
            f"{option}: function {name!r} is not allowed; allowed are {', '.join(sorted(FUNCTIONS))}"
        )
    if lower in COLUMNS.names:
        return lower
    near = [c for c in COLUMNS.names if c.startswith(f"{lower}_")]
    near += difflib.get_close_matches(lower, COLUMNS.names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else "texts stand in single quotes; "
    raise ConfigError(f"{option}: unknown column {name!r}; {hint}columns: {', '.join(COLUMNS.names)}")


def _excerpt(where: str, at: int) -> str:
    return repr(where[at : at + 20]) + (" …" if at + 20 < len(where) else "")
