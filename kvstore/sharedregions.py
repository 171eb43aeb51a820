"""Memory that one client has handed to this server, by the numbers that it gave it (SHARE)."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from kvstore.errors import LimitExceeded, LocalProtocolError
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymap import MemoryMap
from kvstore.memorymessages import REGIONS_SHARED_MAX, Memory
from kvstore.protocol.copying import CopyPuller, CopySink
from kvstore.protocol.strands import Strands
from kvstore.transfer import BlockMemory
from kvstore.transport.shm import SharedMapping


def host_bytes() -> int:
    """Memory of this host: a client has no more to share, whatever a sparse memfd claims."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class SharedRegions:
    """The regions of one session.

    Thread rule: the loop's thread; only `populate` and `close` of a `SharedMapping` may run
    elsewhere, and should, for both take 0.2 s a GiB.

    Args:
        who: The client, for errors.
        bytes_max: Of all regions together.

    Attributes:
        shared_bytes: Of all regions.
    """

    def __init__(self, who: str, bytes_max: int | None = None) -> None:
        self.shared_bytes = 0
        self._who = who
        self._bytes_max = host_bytes() if bytes_max is None else bytes_max
        self._regions: dict[int, SharedMapping] = {}

    def __len__(self) -> int:
        return len(self._regions)

    def share(self, number: int, size_bytes: int, fd: int) -> SharedMapping:
        """Map a region. `fd` is closed, whatever happens.

        Raises:
            LimitExceeded: Too many regions or bytes, or as `SharedMapping.adopt`.
            LocalProtocolError: The number is in use.
            PermissionDenied, Unsupported: As `SharedMapping.adopt`.
        """
        try:
            if number in self._regions:
                raise LocalProtocolError(f"SHARE of region {number}, which is shared already")
            if len(self._regions) >= REGIONS_SHARED_MAX:
                raise LimitExceeded(f"more than {REGIONS_SHARED_MAX} regions of one session")
            if self.shared_bytes + size_bytes > self._bytes_max:
                raise LimitExceeded(
                    f"region {number} of {size_bytes} bytes beside {self.shared_bytes}: one"
                    f" session shares {self._bytes_max} at most"
                )
        except BaseException:
            os.close(fd)
            raise
        region = SharedMapping.adopt(fd, size_bytes, self._who)
        self._regions[number] = region
        self.shared_bytes += size_bytes
        return region

    def unshare(self, number: int) -> SharedMapping:
        """Take a region out. Whoever asks for that closes it; it is unmapped then, or when no
        request under way uses it any more.

        Raises:
            LocalProtocolError: There is no such region.
        """
        region = self._regions.pop(number, None)
        if region is None:
            raise LocalProtocolError(f"UNSHARE of region {number}, which is not shared")
        self.shared_bytes -= region.size_bytes
        return region

    def sink(
        self,
        memory: Memory,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        strands: Strands,
    ) -> CopySink:
        """What brings a fetch into the regions that it names.

        Args:
            strands: Of the connection of the request.

        Raises:
            LimitExceeded: Its places are wrong.
            LocalProtocolError: It names a region that is not shared.
        """
        places = MemoryMap(
            memory, pieces.geometry, len(keys), pieces.layer_first, pieces.layer_last
        )
        return CopySink(namespace, keys, pieces, self._blocks(memory, places), strands)

    def puller(
        self, memory: Memory, geometry: Geometry, key_count: int, strands: Strands
    ) -> CopyPuller:
        """What takes a put out of the regions that it names; raises as `sink`."""
        places = MemoryMap(memory, geometry, key_count, 0, geometry.layer_count)
        return CopyPuller(self._blocks(memory, places), strands)

    def close(self) -> None:
        """Unmap all of them, in a thread, each when nothing uses it any more."""
        regions, self._regions = list(self._regions.values()), {}
        self.shared_bytes = 0
        if not regions:
            return
        try:
            threading.Thread(target=_unmap, args=(regions,), name="unmap").start()
        except RuntimeError:  # the system has no thread left
            _unmap(regions)

    def _blocks(self, memory: Memory, places: MemoryMap) -> Sequence[BlockMemory]:
        views: list[memoryview] = []
        for region in memory.regions:
            (number,) = region.keys if len(region.keys) == 1 else (-1,)
            mapping = self._regions.get(number)
            if mapping is None or region.address or region.size_bytes > mapping.size_bytes:
                raise LocalProtocolError(
                    f"{region}: must name a shared region, and not more of it than there is"
                )
            views.append(mapping.view[: region.size_bytes])  # which keeps it mapped
        return places.blocks(views)


def _unmap(regions: list[SharedMapping]) -> None:
    while regions:
        regions.pop().close()


__all__ = ["SharedRegions", "host_bytes"]
