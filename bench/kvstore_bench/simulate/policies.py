"""The policies that are compared: the daemon's own, and what others do. Pure.

All stand behind the seam that the daemon's store uses, so that one simulation drives them.
Those here are for comparison only: they spend a Python object or two a block.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvstore_daemon.engine.eviction import GuardedLru
from kvstore_daemon.engine.policy import EvictionPolicy, Fifo

# S3-FIFO as its authors recommend it: a tenth of the capacity for new blocks, ghosts for the
# other nine, frequencies up to 3.
SMALL_DIVISOR = 10
FREQUENCY_MAX = 3


class Lru:
    """Least recently used, one list."""

    def __init__(self, capacity_bytes: int, ticks: Iterable[int]) -> None:
        self._ticks = iter(ticks)
        self._used: OrderedDict[int, int] = OrderedDict()

    def resize(self, capacity_bytes: int) -> None:
        """Means nothing here."""

    def insert(self, slot: int, size_bytes: int, digest: int) -> None:
        """A new block."""
        self._used[slot] = next(self._ticks)

    def touch(self, slot: int) -> None:
        """A block was read."""
        self._used[slot] = next(self._ticks)
        self._used.move_to_end(slot)

    def remove(self, slot: int) -> None:
        """A block is gone."""
        del self._used[slot]

    def evict(self, evictable: Callable[[int], bool]) -> int | None:
        """The least recently used block that may go."""
        for slot in self._used:
            if evictable(slot):
                del self._used[slot]
                return slot
        return None

    def next_tick(self) -> int:
        """When the next candidate was last used."""
        return next(iter(self._used.values()))

    def __len__(self) -> int:
        return len(self._used)


@dataclass(slots=True)
class _Entry:
    size_bytes: int
    digest: int
    tick: int
    frequency: int = 0


class S3Fifo:
    """S3-FIFO (J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

    New blocks go into a small queue. Its oldest goes to the main queue if it was read
    meanwhile, else out, leaving a ghost; what comes back as a ghost goes to the main queue
    at once. The oldest of the main queue is put in again while its frequency lasts.
    """

    def __init__(self, capacity_bytes: int, ticks: Iterable[int]) -> None:
        self._ticks = iter(ticks)
        self._small_bytes_max = capacity_bytes // SMALL_DIVISOR
        self._small: OrderedDict[int, _Entry] = OrderedDict()
        self._main: OrderedDict[int, _Entry] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._small_bytes = 0

    def resize(self, capacity_bytes: int) -> None:
        """The small queue gets its share of another capacity."""
        self._small_bytes_max = capacity_bytes // SMALL_DIVISOR

    def insert(self, slot: int, size_bytes: int, digest: int) -> None:
        """A new block."""
        entry = _Entry(size_bytes, digest, next(self._ticks))
        if digest in self._ghosts:
            del self._ghosts[digest]
            self._main[slot] = entry
        else:
            self._small[slot] = entry
            self._small_bytes += size_bytes

    def touch(self, slot: int) -> None:
        """A block was read."""
        entry = self._main.get(slot) or self._small[slot]
        entry.frequency = min(entry.frequency + 1, FREQUENCY_MAX)

    def remove(self, slot: int) -> None:
        """A block is gone."""
        if slot in self._main:
            del self._main[slot]
        else:
            self._small_bytes -= self._small.pop(slot).size_bytes

    def evict(self, evictable: Callable[[int], bool]) -> int | None:
        """The next block to go; one that may not counts as read."""
        # In the worst case all are read to the maximum, and one stays after that many rounds.
        for _ in range((FREQUENCY_MAX + 2) * len(self)):
            if self._small and (self._small_bytes >= self._small_bytes_max or not self._main):
                slot, entry = self._small.popitem(last=False)
                self._small_bytes -= entry.size_bytes
                if not entry.frequency and evictable(slot):
                    self._remember(entry.digest)
                    return slot
                entry.frequency = 0
            else:
                slot, entry = self._main.popitem(last=False)
                if not entry.frequency and evictable(slot):
                    return slot
                entry.frequency = max(0, entry.frequency - 1)
            self._main[slot] = entry
        return None

    def next_tick(self) -> int:
        """When the next candidate was inserted."""
        queue = self._small if self._small_bytes >= self._small_bytes_max else self._main
        return next(iter((queue or self._small or self._main).values())).tick

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def _remember(self, digest: int) -> None:
        self._ghosts[digest] = None
        while len(self._ghosts) > len(self) - len(self) // SMALL_DIVISOR:
            self._ghosts.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """One policy that can be named.

    Attributes:
        make: Makes it, from a capacity in bytes and a clock; None where it needs the future.
        tail_first: Whether the blocks of a request are inserted and touched in reverse.
        note: What it is.
    """

    make: Callable[[int, Iterable[int]], EvictionPolicy] | None
    tail_first: bool
    note: str

    def policy(self, capacity_bytes: int) -> EvictionPolicy:
        """A new one."""
        assert self.make is not None
        return self.make(capacity_bytes, itertools.count())


OPTIMUM = "optimum"
CHOICES = {
    "guarded": Choice(GuardedLru, True, "the daemon's: LRU with a guard against scans"),
    "s3fifo": Choice(S3Fifo, True, "S3-FIFO, tail of a chain first"),
    "lru": Choice(Lru, False, "LRU, blocks in the order of their chain"),
    "lru-tail": Choice(Lru, True, "LRU, tail of a chain first"),
    "fifo": Choice(Fifo, True, "first in, first out, tail of a chain first"),
    OPTIMUM: Choice(None, True, "knows the future: what is used last goes first (MIN)"),
}

__all__ = ["CHOICES", "OPTIMUM", "Choice", "Lru", "S3Fifo"]
