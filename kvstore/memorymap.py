"""Where the blocks of a request lie in its asker's memory: a `Memory` message, checked.

::

    places   block 0       block 1       ...            12 bytes each: region, offset
             block 0/layer first, block 0/layer first+1, ...   where `layered`

A place names the first byte of the asked-for layers of one block, or of one layer of it. What
lies outside of its region is refused before a byte moves.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from kvstore.errors import LimitExceeded
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymessages import REGIONS_PER_REQUEST_MAX, Memory, MemoryRegion
from kvstore.transfer import BlockMemory

_PLACE = struct.Struct("<IQ")
_PLACES = np.dtype([("region", "<u4"), ("offset", "<u8")])
PLACE_BYTES = 12
assert _PLACE.size == _PLACES.itemsize == PLACE_BYTES

#: A number of a region and an offset in it.
Place = tuple[int, int]
#: The same, and how many bytes.
Span = tuple[int, int, int]


class MemoryMap:
    """The places of a request.

    Args:
        memory: As it came.
        geometry: Of the blocks.
        key_count: Blocks of the request.
        layer_first, layer_last: The layers that it is about.

    Raises:
        LimitExceeded: Places that are too few, too many, or outside of their regions.
    """

    def __init__(
        self, memory: Memory, geometry: Geometry, key_count: int, layer_first: int, layer_last: int
    ) -> None:
        self.regions = memory.regions
        self.layered = memory.layered
        offsets = geometry.offsets
        if memory.layered:
            sizes = list(geometry.layer_bytes[layer_first:layer_last])
        else:
            sizes = [offsets[layer_last] - offsets[layer_first]]
        expected = key_count * len(sizes) * PLACE_BYTES
        if len(memory.places) != expected:
            raise LimitExceeded(
                f"{len(memory.places)} bytes of places for {key_count} blocks of"
                f" {len(sizes)} places, expected {expected}"
            )
        # With numpy: a request may have 87,000 places.
        table = np.frombuffer(memory.places, _PLACES)
        numbers, starts = table["region"], table["offset"]
        room = np.array([region.size_bytes for region in memory.regions], np.int64)
        wanted = np.tile(np.array(sizes, np.int64), key_count)
        good = numbers < len(room)
        left = room[np.where(good, numbers, 0)] - wanted
        good &= (left >= 0) & (starts <= np.maximum(left, 0).astype(np.uint64))
        if not good.all():
            place = int(np.argmin(good))
            raise LimitExceeded(
                f"place {place}: {wanted[place]} bytes at {starts[place]} of region"
                f" {numbers[place]} lie outside of what was named"
            )
        self.places: list[Place] = list(zip(numbers.tolist(), starts.tolist(), strict=True))
        self._sizes = sizes

    def spans(self, pieces: PieceMap, piece: int, offset: int, length: int) -> list[Span]:
        """Where consecutive bytes of a request belong, in their order.

        Args:
            pieces: How the request is cut; of the layers that the places are about.
            piece, offset: The first byte.
        """
        spans: list[Span] = []
        key_count, ranges = pieces.key_count, pieces.group_ranges
        offsets, base = pieces.geometry.offsets, pieces.geometry.offsets[pieces.layer_first]
        per_block = len(self._sizes)
        while length:
            group, index = divmod(piece, key_count)
            first, _, start, size = ranges[group]
            take = min(length, size - offset)
            length -= take
            if not self.layered:
                number, at = self.places[index]
                spans.append((number, at + start - base + offset, take))
            else:
                begin = start + offset
                layer = bisect_right(offsets, begin, first) - 1
                while take:
                    number, at = self.places[index * per_block + layer - pieces.layer_first]
                    part = min(take, offsets[layer + 1] - begin)
                    spans.append((number, at + begin - offsets[layer], part))
                    begin += part
                    take -= part
                    layer += 1
            piece += 1
            offset = 0
        return spans

    def blocks(self, cut: Callable[[int, int, int], memoryview]) -> list[BlockMemory]:
        """The memory of each block, as a transfer wants it.

        Args:
            cut: Gives `size` bytes at an offset of a region: (region, offset, size).
        """
        sizes, places = self._sizes, self.places
        if not self.layered:
            (size,) = sizes
            return [cut(number, offset, size) for number, offset in places]
        return [
            [
                cut(number, offset, size)
                for (number, offset), size in zip(
                    places[first : first + len(sizes)], sizes, strict=True
                )
            ]
            for first in range(0, len(places), len(sizes))
        ]


def describe(
    memory: Sequence[BlockMemory],
    locate: Callable[[memoryview], tuple[int, int] | None],
    region: Callable[[int], MemoryRegion],
) -> Memory | None:
    """What a request says of memory; None where some of it is in no region, or in too many.

    Args:
        locate: Gives the region of a view, by a number of the caller's, and the offset in it.
        region: The region of such a number, as the peer knows it.
    """
    numbers: dict[int, int] = {}
    places = bytearray()
    layered = not isinstance(memory[0], memoryview)
    for block in memory:
        if isinstance(block, memoryview) is layered:
            return None
        for view in [block] if isinstance(block, memoryview) else block:
            found = locate(view)
            if found is None:
                return None
            number = numbers.setdefault(found[0], len(numbers))
            places += _PLACE.pack(number, found[1])
    if len(numbers) > REGIONS_PER_REQUEST_MAX:
        return None
    return Memory(regions=tuple(map(region, numbers)), places=bytes(places), layered=layered)


__all__ = ["PLACE_BYTES", "MemoryMap", "Place", "Span", "describe"]
