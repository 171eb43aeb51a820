"""Memory that is registered on all rails, and which registration an address lies in.

Registering pins memory: it is done when a process starts, or when a caller brings a new buffer,
and never for a request.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from itertools import accumulate

from kvstore import memorymessages
from kvstore.errors import LocalProtocolError
from kvstore.transport.verbs import MemoryRegion

# Each pins memory and is looked through where ranges overlap.
REGISTRATIONS_MAX = 4096


class Registration:
    """Memory that the devices of all rails reach, until `close`.

    Ownership: it holds the view, and so the memory, until it is closed. Nothing may be under
    way in the memory when it is closed: here the caller sees to that; of a peer that still
    writes there, the queue pair fails.

    Attributes:
        address, length: Where it is; `address` is the base that peers are told.
        lkeys, rkeys: One for each rail of the node, in its order; 0 for a rail that is of no
            use any more.
    """

    __slots__ = ("_forget", "_regions", "_view", "address", "end", "length", "lkeys", "rkeys")

    def __init__(
        self,
        view: memoryview,
        address: int,
        regions: Sequence[MemoryRegion | None],
        forget: Callable[[Registration], None],
    ) -> None:
        self.address = address
        self.length = view.nbytes
        self.end = address + view.nbytes
        self.lkeys = tuple(region.lkey if region else 0 for region in regions)
        self.rkeys = tuple(region.rkey if region else 0 for region in regions)
        self._view: memoryview | None = view
        self._regions = regions
        self._forget = forget

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._view is None

    def described(self) -> memorymessages.MemoryRegion:
        """What a request says of it, to a server that is to reach it."""
        return memorymessages.MemoryRegion(
            keys=self.rkeys, address=self.address, size_bytes=self.length
        )

    def close(self) -> None:
        """Take the access back; harmless when called again."""
        if self._view is None:
            return
        self._forget(self)
        close_regions(self._regions)
        self._view = None


def close_regions(regions: Sequence[MemoryRegion | None]) -> None:
    """Close all of them, the last one first, and then raise what went wrong, if anything."""
    failure: Exception | None = None
    for region in reversed(regions):
        try:
            if region is not None:
                region.close()
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


class Registrations:
    """All registrations of a node, by address."""

    def __init__(self) -> None:
        self._all: list[Registration] = []
        self._bases: list[int] = []
        # The furthest that one of these, or of those before, goes.
        self._reach: list[int] = []
        self._last: Registration | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def all(self) -> list[Registration]:
        """A copy."""
        return list(self._all)

    def add(self, registration: Registration) -> None:
        """Find it from now on."""
        insort(self._all, registration, key=lambda one: one.address)
        self._note()

    def remove(self, registration: Registration) -> None:
        """Find it no more."""
        self._all = [one for one in self._all if one is not registration]
        self._note()

    def find(self, address: int, length: int) -> Registration | None:
        """A registration that has all of a range; None if there is none."""
        end = address + length
        last = self._last
        if last is not None and last.address <= address and end <= last.end:
            return last
        # The one with the nearest base, mostly; where they overlap, one that begins earlier.
        for index in range(bisect_right(self._bases, address) - 1, -1, -1):
            if self._reach[index] < end:
                break
            found = self._all[index]
            if end <= found.end:
                self._last = found
                return found
        return None

    def get(self, address: int, length: int) -> Registration:
        """As `find`.

        Raises:
            LocalProtocolError: There is none.
        """
        found = self.find(address, length)
        if found is None:
            raise LocalProtocolError(f"{length} bytes at {address:#x} are in no registered memory")
        return found

    def _note(self) -> None:
        self._bases = [one.address for one in self._all]
        self._reach = list(accumulate((one.end for one in self._all), max))
        self._last = None


__all__ = ["REGISTRATIONS_MAX", "Registration", "Registrations", "close_regions"]
