"""Leases at storage that an agent holds for engines of its node, under numbers of its own."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.errors import LimitExceeded
from kvstore_client.handles import Lease

# Several times what the engines of a node have under way; each is some hundred bytes here.
LEASES_MAX = 65_536
# Leases that were given back stay in the heap until their time is over, unless they are this
# many more than those that hold: then the heap is made anew.
STALE_ENTRIES_MAX = 1024


class _Passed(NamedTuple):
    owner: object
    leases: Sequence[Lease]
    ends_at: float


class PassedLeases:
    """What storage has granted, by the number that its owner knows. Pure: time is an argument."""

    def __init__(self) -> None:
        self._passed: dict[int, _Passed] = {}
        self._ends: list[tuple[float, int]] = []
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._passed)

    def check_room(self, now: float) -> None:
        """Forget what has ended.

        Raises:
            LimitExceeded: There are too many even so.
        """
        if len(self._passed) < LEASES_MAX:
            return
        self.expire(now)
        if len(self._passed) >= LEASES_MAX:
            raise LimitExceeded(f"{len(self._passed)} leases are held, the limit is {LEASES_MAX}")

    def add(self, owner: object, leases: Sequence[Lease], ends_at: float) -> int:
        """The number under which leases are given back."""
        number = next(self._numbers)
        self._passed[number] = _Passed(owner, leases, ends_at)
        heapq.heappush(self._ends, (ends_at, number))
        if len(self._ends) > 2 * len(self._passed) + STALE_ENTRIES_MAX:
            self._ends = [(passed.ends_at, name) for name, passed in self._passed.items()]
            heapq.heapify(self._ends)
        return number

    def take(self, number: int, owner: object) -> Sequence[Lease]:
        """Leases that their owner gives back; none if they are not his."""
        passed = self._passed.get(number)
        if passed is None or passed.owner is not owner:
            return ()
        del self._passed[number]
        return passed.leases

    def take_all(self, owner: object) -> list[Lease]:
        """All leases of an owner who is gone."""
        numbers = [number for number, passed in self._passed.items() if passed.owner is owner]
        return [lease for number in numbers for lease in self._passed.pop(number).leases]

    def expire(self, now: float) -> None:
        """Forget what storage has ended by itself."""
        while self._ends and self._ends[0][0] <= now:
            self._passed.pop(heapq.heappop(self._ends)[1], None)


__all__ = ["PassedLeases"]
