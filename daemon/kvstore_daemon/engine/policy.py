"""What the store asks of an eviction policy: the seam between space and choice. Pure."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

# Candidates that are looked at for one eviction. With more pinned ones in a row than this the
# put goes without space instead of holding up the loop.
CANDIDATES_MAX = 4096


class EvictionPolicy(Protocol):
    """Chooses which block of one pool goes next. Knows slots and sizes, not keys or bytes.

    Blocks of one request form a chain in which the tail is useless without the head. The
    store therefore inserts and touches them in reverse chain order: the tail comes first and
    goes first.
    """

    def resize(self, capacity_bytes: int) -> None:
        """The pool may hold another number of bytes from now on."""

    def insert(self, slot: int, size_bytes: int, digest: int) -> None:
        """A new block. `digest`: 64-bit hash of namespace and key, to know it again later."""

    def touch(self, slot: int) -> None:
        """A block was read."""

    def remove(self, slot: int) -> None:
        """A block is gone for another reason than `evict`."""

    def evict(self, evictable: Callable[[int], bool]) -> int | None:
        """Choose a block for which `evictable` is true and take it out of the queues.

        Returns:
            Its slot, or None when nothing is evictable as far as bounded work can tell.
        """

    def next_tick(self) -> int:
        """When the next candidate was inserted or last used, in ticks that all pools share.

        Of pools that share an arena, the one with the smallest gives a block.
        """

    def __len__(self) -> int:
        """Number of blocks."""


class Fifo:
    """First in, first out: the simplest policy, and a floor for the others' hit rates.

    Args:
        ticks: The shared clock of insertions.
    """

    def __init__(self, capacity_bytes: int, ticks: Iterable[int]) -> None:
        self._ticks = iter(ticks)
        self._inserted: OrderedDict[int, int] = OrderedDict()

    def resize(self, capacity_bytes: int) -> None:
        """Means nothing here."""

    def insert(self, slot: int, size_bytes: int, digest: int) -> None:
        self._inserted[slot] = next(self._ticks)

    def touch(self, slot: int) -> None:
        """Means nothing here."""

    def remove(self, slot: int) -> None:
        del self._inserted[slot]

    def evict(self, evictable: Callable[[int], bool]) -> int | None:
        for slot in itertools.islice(self._inserted, CANDIDATES_MAX):
            if evictable(slot):
                del self._inserted[slot]
                return slot
        return None

    def next_tick(self) -> int:
        return next(iter(self._inserted.values()))

    def __len__(self) -> int:
        return len(self._inserted)
