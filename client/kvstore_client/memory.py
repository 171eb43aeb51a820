"""Memory of the caller that peers may reach by themselves: regions, by address.

A region is handed over, or registered, once; requests then name places in it. What lies in no
region travels through a socket, if it may.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from bisect import bisect_right

from kvstore.buffers import Region as SharedMemory
from kvstore.errors import LocalProtocolError
from kvstore.memorymessages import REGIONS_SHARED_MAX
from kvstore.transfer import as_memory
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_memory import Registration
from kvstore.transport.shm import address_of


class Region:
    """A piece of memory that peers may reach; made by `allocate` or `register` of a client.

    Ownership: of memory that the client allocated `free` gives it back, when the last slice of
    `view` is gone. Memory that was registered stays its owner's, who keeps it alive until `free`
    has returned.

    Attributes:
        number: Its name at peers.
        view: All of it, writable.
        size_bytes: How much that is.
        address: Of its first byte.
        users: Requests that have named it to a peer and are not quiet.
        freed: Whether its owner has taken it back.
        registrations: With RDMA nodes of this process.
    """

    __slots__ = (
        "_owned",
        "_shared",
        "address",
        "freed",
        "number",
        "registrations",
        "size_bytes",
        "users",
        "view",
    )

    def __init__(
        self, number: int, view: memoryview, shared: SharedMemory | None, owned: bool = True
    ) -> None:
        self.number = number
        self.view = view
        self.size_bytes = len(view)
        self.address = address_of(view)
        self.users = 0
        self.freed = False
        self.registrations: dict[RdmaNode, Registration] = {}
        self._shared = shared
        self._owned = owned

    @property
    def fd(self) -> int | None:
        """The memfd behind it; None of memory that cannot be handed to another process."""
        return None if self._shared is None else self._shared.fd

    @classmethod
    def from_dmabuf(cls, fd: int, size_bytes: int) -> Region:
        """Memory of a GPU, by the descriptor that its driver exports for RDMA.

        Foreseen, and not there yet: it cannot be tried without a GPU beside an RDMA device.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "GPU memory as a region (dmabuf) is not supported yet: fetch into host memory"
        )

    def give_back(self) -> None:
        """No peer reaches it any more: what the client has allocated goes back. As `withdraw`,
        and then `unmap`."""
        try:
            self.withdraw()
        finally:
            self.unmap()

    def withdraw(self) -> None:
        """Take it from all devices; on the loop's thread.

        Raises:
            VerbsError: One of them does not let go; it was taken from all others.
        """
        with contextlib.ExitStack() as ending:
            while self.registrations:
                _, registration = self.registrations.popitem()
                ending.callback(registration.close)

    def unmap(self) -> None:
        """Give back what the client has allocated: a third of a second for 1 GiB, on any thread,
        if no slice of it is left."""
        self.view = memoryview(b"")
        shared, self._shared = self._shared, None  # or we would keep what its last slice frees
        if shared is not None and self._owned:
            shared.close()


class Regions:
    """All regions of a client, for any thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._change = threading.Lock()
        # Where they start, and what starts there. Never changed, only replaced: both at once.
        self._table: tuple[list[int], list[Region]] = ([], [])

    def __len__(self) -> int:
        return len(self._table[1])

    def all(self) -> list[Region]:
        """Every region, by address."""
        return list(self._table[1])

    def allocate(self, size_bytes: int) -> Region:
        """New memory that can be handed to other processes; touched. Takes milliseconds for
        100 MiB.

        Raises:
            LocalProtocolError: No size, or too many regions.
            OSError: The system has no memory left.
        """
        self._check_room()
        shared = SharedMemory(size_bytes, "kvstore-region")
        try:
            shared.touch()
        except BaseException:
            shared.close()
            raise
        return self._add(Region(next(self._numbers), shared.view, shared))

    def adopt(self, shared: SharedMemory) -> Region:
        """Memory of this process that is a memfd already; it stays its owner's."""
        self._check_room()
        return self._add(Region(next(self._numbers), shared.view, shared, owned=False))

    def register(self, buffer: object) -> Region:
        """Memory that the caller has.

        Raises:
            LocalProtocolError: No contiguous writable buffer, or it overlaps another region.
        """
        self._check_room()
        flat = as_memory(buffer, "register", _size_of(buffer), writable=True)
        if not len(flat):
            raise LocalProtocolError("register: the buffer is empty")
        return self._add(Region(next(self._numbers), flat, None))

    def check_free(self, region: Region) -> None:
        """Whether a region may go.

        Raises:
            LocalProtocolError: It is none of these, or peers may still touch it.
        """
        if region not in self._table[1]:
            raise LocalProtocolError("this region is none of this client, or was freed before")
        if region.users:
            raise LocalProtocolError(
                f"this region is in use by {region.users} requests: wait for `quiet`"
            )

    def remove(self, region: Region, close: bool = True) -> None:
        """Forget a region; requests name it no more."""
        with self._change:
            left = [one for one in self._table[1] if one is not region]
            self._table = ([one.address for one in left], left)
        region.freed = True
        if close:
            region.give_back()

    def locate(self, view: memoryview) -> tuple[Region, int] | None:
        """The region of a contiguous view, and where in it; None if it is in none."""
        address = address_of(view)
        region = self.at(address, len(view))
        return None if region is None else (region, address - region.address)

    def at(self, address: int, size_bytes: int) -> Region | None:
        """The region that bytes at an address lie in; None if they lie in none."""
        starts, regions = self._table
        at = bisect_right(starts, address) - 1
        if at < 0:
            return None
        region = regions[at]
        return region if address + size_bytes <= region.address + region.size_bytes else None

    def _check_room(self) -> None:
        if len(self) >= REGIONS_SHARED_MAX:
            raise LocalProtocolError(
                f"{len(self)} regions: the limit is {REGIONS_SHARED_MAX}; allocate fewer and"
                " larger ones"
            )

    def _add(self, region: Region) -> Region:
        with self._change:
            starts, regions = self._table
            at = bisect_right(starts, region.address)
            before, after = regions[at - 1 : at], regions[at : at + 1]
            overlaps = any(one.address + one.size_bytes > region.address for one in before) or any(
                region.address + region.size_bytes > one.address for one in after
            )
            if not overlaps:
                self._table = (
                    [*starts[:at], region.address, *starts[at:]],
                    [*regions[:at], region, *regions[at:]],
                )
        if overlaps:
            region.give_back()
            raise LocalProtocolError("register: the buffer overlaps a region of this client")
        return region


def _size_of(buffer: object) -> int:
    """Bytes of a buffer; 0 of what is none."""
    try:
        return memoryview(buffer).nbytes  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        return 0


__all__ = ["Region", "Regions"]
