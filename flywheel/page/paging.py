"""The bounds of a request: which part of a list it gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIZES = (25, 50, 100, 200)
PAGES_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Part[T]:
    """A page of a list. ``first`` and ``last`` count from 1; both are 0 where there is nothing."""

    items: tuple[T, ...]
    number: int
    pages: int
    first: int
    last: int
    total: int


def part[T](items: Sequence[T], number: int, size: int) -> Part[T]:
    """Page ``number`` (from 1) of ``size``; a number past the end is the last page."""
    pages = max(1, math.ceil(len(items) / size))
    number = min(max(number, 1), pages)
    start = (number - 1) * size
    found = tuple(items[start : start + size])
    return Part(found, number, pages, start + 1 if found else 0, start + len(found), len(items))
