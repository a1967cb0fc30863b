"""Branch coverage of the envelope and the mode machine, measured where they can be measured: uncompiled.

A pytest plugin (``-p tests.branches``, with NUMBA_DISABLE_JIT=1 so that the plain functions run). It counts
every conditional jump of the modules' byte code in both directions, by PEP 669: finer than lines,
since each operand of ``and`` and ``or`` is a jump of its own. Not counted: that an ``except`` does not match.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = ("flywheel/edge/safety.py", "flywheel/edge/mode.py")
ROOT = Path(__file__).parents[1]
_JUMPS = ("POP_JUMP_IF_TRUE", "POP_JUMP_IF_FALSE", "POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE", "FOR_ITER")
_TOOL = sys.monitoring.COVERAGE_ID
_taken: dict[tuple[types.CodeType, int], set[int]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Before anything of the modules runs."""
    monitoring = sys.monitoring
    monitoring.use_tool_id(_TOOL, "branches")
    watched = {str(ROOT / f) for f in FILES}

    def taken(code: types.CodeType, offset: int, to: int) -> object:
        if code.co_filename not in watched:
            return monitoring.DISABLE
        _taken.setdefault((code, offset), set()).add(to)
        return None

    monitoring.register_callback(_TOOL, monitoring.events.BRANCH, taken)
    monitoring.set_events(_TOOL, monitoring.events.BRANCH)


def missing(path: Path) -> tuple[int, list[str]]:
    """How many outcomes there are in a file, and those that never came about."""
    total, left = 0, []
    seen = {
        (c.co_qualname, c.co_firstlineno, at): to
        for (c, at), to in _taken.items()
        if c.co_filename == str(path)
    }
    for code in _codes(compile(path.read_text(), str(path), "exec", dont_inherit=True)):
        line, was = code.co_firstlineno, ""
        for i in dis.get_instructions(code):
            line = (i.positions.lineno if i.positions else None) or line
            caught, was = was == "CHECK_EXC_MATCH", i.opname
            if i.opname in _JUMPS and not caught:
                total += 2
                took = seen.get((code.co_qualname, code.co_firstlineno, i.offset), set())
                if len(took) < 2:
                    left.append(
                        f"{path.relative_to(ROOT)}:{line} {code.co_qualname}: {2 - len(took)} of 2 not taken"
                    )
    return total, left


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            yield from _codes(c)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the run where an outcome is missing."""
    sys.monitoring.set_events(_TOOL, 0)
    sys.monitoring.free_tool_id(_TOOL)
    for f in FILES:
        total, left = missing(ROOT / f)
        print(f"\n{f}: {total - len(left)} of {total} branch outcomes")
        print("\n".join(left))
        if left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
