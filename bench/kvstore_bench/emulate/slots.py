"""Which blocks of an engine's memory are free: slots of one size. Pure.

A turn takes all its slots at once, as few runs of consecutive ones as there may be; so it never
waits for a hole of some size, only for enough slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.allocator import ExtentAllocator


class SlotRun(NamedTuple):
    """Consecutive slots that one turn has.

    Attributes:
        number: Of the run, for who gives it back.
    """

    first: int
    size: int
    number: int


class Slots:
    """All slots.

    Args:
        count: How many there are, at least one.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._extents = ExtentAllocator(count)

    @property
    def free_count(self) -> int:
        """Slots that nobody has."""
        return self._extents.free_pages

    def take(self, count: int) -> list[SlotRun] | None:
        """So many slots, in any number of runs; None if there are not enough."""
        if count > self.free_count:
            return None
        runs: list[SlotRun] = []
        while count:
            size = min(count, self._extents.largest_hole_pages)
            number = self._extents.allocate(size)
            runs.append(SlotRun(self._extents.starts[number], size, number))
            count -= size
        return runs

    def give(self, runs: Sequence[SlotRun]) -> None:
        """Give back what `take` gave, once."""
        for run in runs:
            self._extents.free(run.number)

    def check(self) -> None:
        """Assert that the books are right."""
        self._extents.check()


__all__ = ["SlotRun", "Slots"]
