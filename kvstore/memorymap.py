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
from collections.abc import Sequence
from typing import overload

import numpy as np

from kvstore.errors import LimitExceeded
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymessages import Memory
from kvstore.transfer import BlockMemory

_PLACE = struct.Struct("<IQ")
_PLACES = np.dtype([("region", "<u4"), ("offset", "<u8")])
PLACE_BYTES = 12
assert _PLACE.size == _PLACES.itemsize == PLACE_BYTES

# Up to here Python is faster than the calls of numpy, which take 8 us together, and where copying
# has emptied the caches of the processor many times that.
FEW_PLACES_BYTES = 128 * PLACE_BYTES

#: A number of a region and an offset in it.
Place = tuple[int, int]
#: The same, and how many bytes.
Span = tuple[int, int, int]


class MemoryMap:
    """The places of a request: kept as they came, and read one by one when they are needed. As
    objects, or as views of what lies there, they would take ten times the memory.

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
        room = [region.size_bytes for region in memory.regions]
        check = _check_few if len(memory.places) <= FEW_PLACES_BYTES else _check_many
        check(memory.places, room, sizes)
        self._packed = memory.places
        self._key_count = key_count
        self._sizes = sizes

    def place(self, number: int) -> Place:
        """One of them, in the order in which they came."""
        place: Place = _PLACE.unpack_from(self._packed, number * PLACE_BYTES)
        return place

    def spans(self, pieces: PieceMap, piece: int, offset: int, length: int) -> list[Span]:
        """Where consecutive bytes of a request belong, in their order.

        Args:
            pieces: How the request is cut; of the layers that the places are about.
            piece, offset: The first byte.
        """
        spans: list[Span] = []
        key_count, ranges = pieces.key_count, pieces.group_ranges
        offsets, base = pieces.geometry.offsets, pieces.geometry.offsets[pieces.layer_first]
        per_block, place = len(self._sizes), self.place
        while length:
            group, index = divmod(piece, key_count)
            first, _, start, size = ranges[group]
            take = min(length, size - offset)
            length -= take
            if not self.layered:
                number, at = place(index)
                spans.append((number, at + start - base + offset, take))
            else:
                begin = start + offset
                layer = bisect_right(offsets, begin, first) - 1
                while take:
                    number, at = place(index * per_block + layer - pieces.layer_first)
                    part = min(take, offsets[layer + 1] - begin)
                    spans.append((number, at + begin - offsets[layer], part))
                    begin += part
                    take -= part
                    layer += 1
            piece += 1
            offset = 0
        return spans

    def blocks(self, regions: Sequence[memoryview]) -> Sequence[BlockMemory]:
        """The memory of each block, as a transfer wants it; cut whenever it is looked at.

        Args:
            regions: The memory of each region.
        """
        packed, sizes, count = self._packed, self._sizes, self._key_count
        if not self.layered:
            return _Places(packed, regions, sizes * count, 0)
        firsts = range(0, count * len(sizes), len(sizes))
        return [_Places(packed, regions, sizes, first) for first in firsts]


def _check_few(places: bytes, room: Sequence[int], sizes: Sequence[int]) -> None:
    """Whether what lies at each place, of these sizes in turn, lies inside of its region."""
    count = len(sizes)
    for number, (region, start) in enumerate(_PLACE.iter_unpack(places)):
        size = sizes[number % count]
        if region >= len(room) or start + size > room[region]:
            raise _outside(number, size, start, region)


def _check_many(places: bytes, room: Sequence[int], sizes: Sequence[int]) -> None:
    """As `_check_few`: a request may have 87,000 places."""
    table = np.frombuffer(places, _PLACES)
    regions, starts = table["region"], table["offset"]
    spaces = np.array(room, np.int64)
    wanted = np.tile(np.array(sizes, np.int64), len(table) // len(sizes))
    good = regions < len(spaces)
    left = spaces[np.where(good, regions, 0)] - wanted
    good &= (left >= 0) & (starts <= np.maximum(left, 0).astype(np.uint64))
    if not good.all():
        number = int(np.argmin(good))
        raise _outside(number, int(wanted[number]), int(starts[number]), int(regions[number]))


def _outside(number: int, size: int, start: int, region: int) -> LimitExceeded:
    return LimitExceeded(
        f"place {number}: {size} bytes at {start} of region {region} lie outside of what was named"
    )


class _Places(Sequence[memoryview]):
    """What lies at consecutive places.

    Args:
        packed: All places.
        regions: What they are in.
        sizes: Of what lies there.
        first: The first place.
    """

    __slots__ = ("_first", "_packed", "_regions", "_sizes")

    def __init__(
        self, packed: bytes, regions: Sequence[memoryview], sizes: Sequence[int], first: int
    ) -> None:
        self._packed = packed
        self._regions = regions
        self._sizes = sizes
        self._first = first

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, at: int) -> memoryview: ...
    @overload
    def __getitem__(self, at: slice) -> list[memoryview]: ...
    def __getitem__(self, at: int | slice) -> memoryview | list[memoryview]:
        packed, regions = self._packed, self._regions
        if isinstance(at, int):
            size = self._sizes[at]
            place = self._first + (at if at >= 0 else at + len(self._sizes))
            number, offset = _PLACE.unpack_from(packed, place * PLACE_BYTES)
            view: memoryview = regions[number][offset : offset + size]
            return view
        begin = (self._first + at.indices(len(self._sizes))[0]) * PLACE_BYTES
        views: list[memoryview] = []
        for size in self._sizes[at]:
            number, offset = _PLACE.unpack_from(packed, begin)
            views.append(regions[number][offset : offset + size])
            begin += PLACE_BYTES
        return views


__all__ = ["PLACE_BYTES", "MemoryMap", "Place", "Span"]
