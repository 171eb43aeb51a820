"""Promises to keep blocks for a while, which end by themselves. Pure: time is an argument.

A lease covers a set of slots and belongs to an owner, usually a session. It ends when it is
released, when its time is over, or when its owner is gone, whichever is first. Pinning and
unpinning the slots is the store's business.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence

# An engine holds a lease per request under way; 1,024 is more than any batches.
LEASES_PER_OWNER_MAX = 1024
# 16 full requests of 4,096 keys on 4 ranks; bounds what one client can make unevictable, and
# the memory of its leases to 1 MiB.
LEASED_BLOCKS_PER_OWNER_MAX = 262_144
# Released leases stay in the heap until their time is over, unless they are this many more
# than those that hold: then the heap is made anew.
STALE_ENTRIES_MAX = 1024


class _Lease:
    __slots__ = ("ends_at", "owner", "size_bytes", "slots")

    def __init__(self, owner: object, slots: array[int], size_bytes: int, ends_at: float) -> None:
        self.owner = owner
        self.slots = slots
        self.size_bytes = size_bytes
        self.ends_at = ends_at


class _Owner:
    __slots__ = ("block_count", "lease_numbers", "size_bytes")

    def __init__(self) -> None:
        self.lease_numbers: set[int] = set()
        self.block_count = 0
        self.size_bytes = 0


class LeaseTable:
    """All leases that hold. Times are seconds of any monotonic clock.

    Args:
        bytes_per_owner_max: What one owner may have leased, one block twice counted twice.

    Attributes:
        block_count: Leased blocks, one that is leased twice counted twice.
    """

    def __init__(self, bytes_per_owner_max: int) -> None:
        self.block_count = 0
        self._bytes_per_owner_max = bytes_per_owner_max
        self._leases: dict[int, _Lease] = {}
        self._owners: dict[object, _Owner] = {}
        self._ends: list[tuple[float, int]] = []
        self._last_number = 0

    def __len__(self) -> int:
        """Number of leases that hold."""
        return len(self._leases)

    def grant(self, owner: object, slots: Sequence[int], size_bytes: int, ends_at: float) -> int:
        """A new lease of an owner over slots that the caller has pinned, `size_bytes` in all.

        Returns:
            Its number, or 0 when the owner would have more than it may.
        """
        account = self._owners.get(owner)
        if account is None:
            account = _Owner()
        if (
            len(account.lease_numbers) >= LEASES_PER_OWNER_MAX
            or account.block_count + len(slots) > LEASED_BLOCKS_PER_OWNER_MAX
            or account.size_bytes + size_bytes > self._bytes_per_owner_max
        ):
            return 0
        self._owners[owner] = account
        self._last_number += 1
        number = self._last_number
        account.lease_numbers.add(number)
        account.block_count += len(slots)
        account.size_bytes += size_bytes
        self.block_count += len(slots)
        self._leases[number] = _Lease(owner, array("i", slots), size_bytes, ends_at)
        heapq.heappush(self._ends, (ends_at, number))
        return number

    def release(self, number: int, owner: object, now: float) -> Sequence[int] | None:
        """Give a lease back.

        Returns:
            The slots to unpin if it had held until now. None if it had ended before, or is
            not this owner's; one whose time is over is left for `expire`.
        """
        lease = self._leases.get(number)
        if lease is None or lease.owner is not owner or lease.ends_at <= now:
            return None
        if len(self._ends) > 2 * len(self._leases) + STALE_ENTRIES_MAX:
            self._ends = [(known.ends_at, name) for name, known in self._leases.items()]
            heapq.heapify(self._ends)
        return self._end(number)

    def expire(self, now: float) -> list[Sequence[int]]:
        """End the leases whose time is over; for each, the slots to unpin."""
        ended: list[Sequence[int]] = []
        while self._ends and self._ends[0][0] <= now:
            _, number = heapq.heappop(self._ends)
            if number in self._leases:
                ended.append(self._end(number))
        return ended

    def owner_gone(self, owner: object) -> list[Sequence[int]]:
        """End all leases of an owner; for each, the slots to unpin."""
        account = self._owners.get(owner)
        if account is None:
            return []
        return [self._end(number) for number in sorted(account.lease_numbers)]

    def slots(self) -> list[int]:
        """Every leased slot, once for each lease over it; for checks."""
        return [slot for lease in self._leases.values() for slot in lease.slots]

    def _end(self, number: int) -> Sequence[int]:
        lease = self._leases.pop(number)
        account = self._owners[lease.owner]
        account.lease_numbers.remove(number)
        account.block_count -= len(lease.slots)
        account.size_bytes -= lease.size_bytes
        self.block_count -= len(lease.slots)
        if not account.lease_numbers:
            del self._owners[lease.owner]
        return lease.slots
