"""Where the blocks of a request lie in regions of this process, as the request says it.

A request may have 87,000 places, and is made on the loop's thread: a region is looked for only
where a view does not lie in that of the view before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from kvstore.errors import LocalProtocolError
from kvstore.memorymessages import REGIONS_PER_REQUEST_MAX
from kvstore.transfer import BlockMemory
from kvstore.transport.shm import address_of
from kvstore_client.memory import Region, Regions

# As of `kvstore.memorymap`.
_PLACES = np.dtype([("region", "<u4"), ("offset", "<u8")])
PLACE_BYTES = 12
assert _PLACES.itemsize == PLACE_BYTES


class Located(NamedTuple):
    """The memory of a request.

    Attributes:
        regions: Those that it lies in, each once.
        places: For each block, or each layer of each block, the position of its region in
            `regions` and an offset in it; see `Memory`.
        layered: Whether each layer has a place of its own.
    """

    regions: list[Region]
    places: bytes
    layered: bool


def place_bytes_of(memory: BlockMemory) -> int:
    """Metadata that the places of a block take in a request."""
    return PLACE_BYTES * (1 if isinstance(memory, memoryview) else len(memory))


def locate(regions: Regions, memory: Sequence[BlockMemory]) -> Located:
    """Where memory lies.

    Raises:
        LocalProtocolError: It cannot be named; says why.
    """
    layered = not isinstance(memory[0], memoryview)
    if any(isinstance(block, memoryview) is layered for block in memory):
        raise LocalProtocolError("some blocks are in one piece, and others layer by layer")
    blocks = memory if layered else [memory]
    views: list[memoryview] = list(chain.from_iterable(blocks))  # type: ignore[arg-type]
    found: dict[Region, int] = {}
    numbers: list[int] = []
    offsets: list[int] = []
    first, end, number = 0, -1, 0
    for view in views:
        address = address_of(view)
        if address < first or address + len(view) > end:
            region = regions.at(address, len(view))
            if region is None:
                raise LocalProtocolError(
                    f"{len(view)} bytes at {address:#x} lie in no region: get memory by allocate,"
                    " or register it (for RDMA alone)"
                )
            first, end = region.address, region.address + region.size_bytes
            number = found.setdefault(region, len(found))
        numbers.append(number)
        offsets.append(address - first)
    if len(found) > REGIONS_PER_REQUEST_MAX:
        raise LocalProtocolError(
            f"it lies in {len(found)} regions, the limit is {REGIONS_PER_REQUEST_MAX} in a request"
        )
    table = np.empty(len(views), _PLACES)
    table["region"] = numbers
    table["offset"] = offsets
    return Located(list(found), table.tobytes(), layered)


__all__ = ["PLACE_BYTES", "Located", "locate", "place_bytes_of"]
