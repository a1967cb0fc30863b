"""Mutation testing of the envelope and the mode machine: ``make mutants``.

Each mutant is the module with one small fault: a comparison turned or moved by one value, an operator
exchanged, a condition that always or never holds, a constant off, a statement left out. Its tests run until
one fails; a mutant that none of them notices is a survivor, and is printed with the line.

cosmic-ray and mutmut would do, but the one starts an interpreter for each mutant (4 s of imports, for each of
some five hundred) and the other leaves decorated functions alone, which here are all that matter. This forks
from a process that has imported everything but the module under test. Nothing is compiled
(NUMBA_DISABLE_JIT): that the compiled and the plain functions agree is what the tests themselves check.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.abc
import importlib.machinery
import os
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {
    "flywheel.edge.safety": ("tests/test_safety.py",),
    "flywheel.edge.mode": ("tests/test_mode.py",),
}
TIMEOUT_S = 120
COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
OPERATE: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Line, what was done, and the mutated module, one after another."""
    total = len(list(ast.walk(tree)))
    skipped = _untouched(tree)
    for k in range(total):
        if k in skipped:
            continue
        variant = 0
        while True:
            other = copy.deepcopy(tree)
            node = list(ast.walk(other))[k]
            what = _mutate(node, variant)
            if what is None:
                break
            variant += 1
            if what:
                yield getattr(node, "lineno", 0), what, ast.fix_missing_locations(other)


def _untouched(tree: ast.Module) -> set[int]:
    """Indices of what is no code: docstrings, annotations, messages, imports."""
    at = {id(n): k for k, n in enumerate(ast.walk(tree))}
    out: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            parts = [node]
        elif isinstance(node, ast.AnnAssign | ast.arg):
            parts = [node.annotation] if node.annotation else []
        elif isinstance(node, ast.FunctionDef):
            parts = [*node.decorator_list, *([node.returns] if node.returns else [])]
        elif isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
            parts = [node]
        for part in parts:
            out |= {at[id(n)] for n in ast.walk(part)}
    return out


def _mutate(node: ast.AST, variant: int) -> str | None:
    """Change ``node`` in place: what was done, "" for nothing worth a run, None if no variant is left."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARE and variant < len(COMPARE[type(op)]):
            node.ops = [COMPARE[type(op)][variant]()]
            return f"{type(op).__name__} -> {type(node.ops[0]).__name__}"
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATE and variant == 0:
            node.op = OPERATE[type(op)]()
            return f"{type(op).__name__} -> {type(node.op).__name__}"
        case ast.BoolOp(op=op) if variant == 0:
            node.op = ast.Or() if isinstance(op, ast.And) else ast.And()
            return f"{type(op).__name__} -> {type(node.op).__name__}"
        case ast.UnaryOp(op=ast.Not() | ast.USub()) if variant == 0:
            node.op = ast.UAdd() if isinstance(node.op, ast.USub) else node.op
            if isinstance(node.op, ast.Not):
                node.operand = ast.UnaryOp(ast.Not(), node.operand)
            return "sign or not left out"
        case ast.Constant(value=bool(v)) if variant == 0:
            node.value = not v
            return f"{v} -> {not v}"
        case ast.Constant(value=int() | float() as v) if not isinstance(v, bool) and variant < 2:
            node.value = v + 1 if variant == 0 else (0.5 * v if isinstance(v, float) else v - 1)
            return f"{v} -> {node.value}" if node.value != v else ""
        case ast.If() | ast.While() | ast.IfExp() if variant < 2:
            node.test = ast.Constant(variant == 0)
            return f"condition always {variant == 0}"
        case ast.Call(func=ast.Name(id="min" | "max" as name)) if variant == 0:
            assert isinstance(node.func, ast.Name)
            node.func.id = "max" if name == "min" else "min"
            return f"{name} -> {node.func.id}"
        case ast.FunctionDef() | ast.If() | ast.For() if variant < len(node.body) + 2:
            at = variant - (2 if isinstance(node, ast.If) else 0)
            if not 0 <= at < len(node.body) or not isinstance(
                node.body[at], ast.Assign | ast.AugAssign | ast.Return
            ):
                return ""
            gone = ast.unparse(node.body[at])
            node.body[at] = ast.Pass()
            return f"left out: {gone}"
    return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the mutated module in place of the one on disk."""

    def __init__(self, name: str, code: types.CodeType, path: Path) -> None:
        self._name, self._code, self._path = name, code, path

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=str(self._path))

    def exec_module(self, module: types.ModuleType) -> None:
        module.__file__ = str(self._path)
        exec(self._code, module.__dict__)


def survives(name: str, tree: ast.Module, path: Path, tests: tuple[str, ...]) -> bool:
    """Whether all tests pass with the mutant, in a fork; one that runs for ever does not."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        try:
            import pytest

            sys.meta_path.insert(0, _Finder(name, compile(tree, str(path), "exec"), path))
            options = ["-x", "-q", "-p", "no:cacheprovider", "--timeout", str(TIMEOUT_S)]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # imported before, on purpose
            os._exit(int(pytest.main([*options, "--hypothesis-seed=0", *tests])))
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def main(names: Sequence[str]) -> int:
    """Run every mutant of the modules named, or of all; the survivors go to standard output."""
    os.chdir(ROOT)
    warnings.filterwarnings("ignore", "This process .* is multi-threaded")  # numpy's, idle
    with tempfile.TemporaryDirectory() as storage, contextlib.suppress(KeyboardInterrupt):
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = storage
        for name in names or TESTS:
            path = ROOT / f"{name.replace('.', '/')}.py"
            tree = ast.parse(path.read_text())
            if not survives(name, tree, path, TESTS[name]):
                print(f"{name}: its tests fail without any mutation")
                return 1
            started, total, left = time.monotonic(), 0, 0
            for line, what, mutant in mutants(tree):
                total += 1
                if survives(name, mutant, path, TESTS[name]):
                    left += 1
                    print(f"{path.relative_to(ROOT)}:{line}: {what}", flush=True)
            print(f"{name}: {total} mutants, {left} survived, {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    # Imported once, here, so that no fork has to; the modules under test and their users are not among them.
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    import hypothesis.strategies
    import numba
    import numpy.testing
    import pydantic
    import pytest
    import yaml

    import flywheel.config
    import flywheel.schema

    assert numba.config.DISABLE_JIT  # type: ignore[attr-defined]
    assert all((hypothesis, numpy, pydantic, pytest, yaml, flywheel))
    sys.exit(main(sys.argv[1:]))
