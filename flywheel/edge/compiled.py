"""The one way in which flywheel compiles a function: the edge, and what curation does to every row.

numba keys its cache on the source file of a function, not on the functions that it inlines: after an edit of
``mode.py`` a cached ``system1.tick`` would still run the old mode machine. So the cache lies in a directory
that is named after the sources of every module whose compiled code calls that of another.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import extending, types
from numba.core import config

MODULES = ("compiled", "control_ring", "link", "mode", "realtime", "safety", "tick", "trace", "tracking")


def compiled[**P, R](fn: Callable[P, R]) -> Callable[P, R]:
    """``numba.njit`` with the options that a control loop needs.

    Division by zero gives inf or NaN instead of raising (``error_model="numpy"``), no fast-math, so that a
    NaN stays a NaN and two runs agree bit for bit. The pure Python function stays reachable as ``.py_func``.
    """
    settings: Any = config
    saved = settings.CACHE_DIR
    settings.CACHE_DIR = str(_CACHE)
    try:
        done: Callable[P, R] = numba.njit(cache=True, error_model="numpy", fastmath=False)(fn)
        return done
    finally:
        settings.CACHE_DIR = saved


def _cache_directory() -> Path:
    here = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for name in MODULES:
        path = here / f"{name}.py"
        digest.update(path.read_bytes() if path.exists() else b"")
    leaf = f"compiled-{digest.hexdigest()[:16]}"
    beside = here / "__pycache__"
    if os.access(beside if beside.exists() else here, os.W_OK):
        return beside / leaf
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flywheel" / leaf


_CACHE = _cache_directory()


# ── memory by its address ─────────────────────────────────────────────────────────────────────────────
# An array that Python passes to compiled code costs one malloc and one free: numba wraps it each time. A
# loop that must not allocate passes addresses, which are plain integers, and makes the views inside.


def intrinsic(fn: Any) -> Any:
    """``numba.extending.intrinsic``, whose own types hide how the function is called from compiled code."""
    return extending.intrinsic(fn)


@intrinsic
def _pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), codegen


_carray: Any = numba.carray  # type: ignore[attr-defined]


@compiled
def words_at(address: int, rows: int, columns: int) -> npt.NDArray[np.int64]:
    """View of ``[rows, columns]`` int64 at ``address``; whoever owns the memory must outlive it."""
    view: npt.NDArray[np.int64] = _carray(_pointer(address), (rows, columns), np.int64)
    return view


@compiled
def floats_at(address: int, rows: int, columns: int) -> npt.NDArray[np.float64]:
    """View of ``[rows, columns]`` float64 at ``address``; whoever owns the memory must outlive it."""
    view: npt.NDArray[np.float64] = _carray(_pointer(address), (rows, columns), np.float64)
    return view
