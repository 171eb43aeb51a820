"""Places of a request: what lies where, and what is refused before a byte moves."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given, strategies as st

from kvstore.errors import LimitExceeded
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymap import PLACE_BYTES, MemoryMap
from kvstore.memorymessages import Memory, MemoryRegion

GEOMETRY = Geometry((40, 24, 100))
BLOCK = 164


def regions(*sizes: int) -> tuple[MemoryRegion, ...]:
    return tuple(MemoryRegion(keys=(n,), size_bytes=size) for n, size in enumerate(sizes, 1))


def memory(
    places: list[tuple[int, int]], *sizes: int, layered: bool = False, cut: int = 0
) -> Memory:
    """What a request says; `cut` takes bytes off its end."""
    packed = b"".join(struct.pack("<IQ", *place) for place in places)
    return Memory(regions=regions(*sizes), places=packed[: len(packed) - cut], layered=layered)


def test_place_is_twelve_bytes_region_first() -> None:
    told = Memory(regions=regions(1000, 1000), places=bytes([1, 0, 0, 0, 7, 1] + [0] * 6))
    assert MemoryMap(told, GEOMETRY, 1, 0, 3).place(0) == (1, 263)
    assert PLACE_BYTES == 12


@pytest.mark.parametrize(("count", "cut"), [(0, 0), (1, 0), (3, 0), (2, 1), (2, 12), (2, 23)])
def test_places_must_be_as_many_as_the_blocks(count: int, cut: int) -> None:
    with pytest.raises(LimitExceeded, match="of places for 2 blocks of 1 places, expected 24"):
        MemoryMap(memory([(0, 0)] * count, 1000, cut=cut), GEOMETRY, 2, 0, 3)


def test_layers_have_a_place_each_of_those_that_are_asked_for() -> None:
    told = memory([(0, 0)] * 4, 1000, layered=True)
    assert MemoryMap(told, GEOMETRY, 2, 1, 3).place(3) == (0, 0)
    with pytest.raises(LimitExceeded, match="48 bytes of places for 2 blocks of 3 places"):
        MemoryMap(told, GEOMETRY, 2, 0, 3)


@pytest.mark.parametrize(
    ("place", "fits"),
    [
        ((0, BLOCK), True),
        ((0, BLOCK + 1), False),
        ((1, 0), True),
        ((1, 1), False),
        ((2, 0), False),
        ((0xFFFFFFFF, 0), False),
        ((0, (1 << 64) - 1), False),
        ((0, (1 << 64) - BLOCK), False),
    ],
)
def test_what_lies_outside_of_its_region_is_refused(place: tuple[int, int], fits: bool) -> None:
    told = memory([(0, 0), place], 2 * BLOCK, BLOCK)
    if fits:
        assert MemoryMap(told, GEOMETRY, 2, 0, 3).place(1) == place
    else:
        with pytest.raises(LimitExceeded, match="place 1: 164 bytes at"):
            MemoryMap(told, GEOMETRY, 2, 0, 3)


def test_each_layer_is_held_against_its_own_size() -> None:
    assert MemoryMap(memory([(0, 60), (0, 76), (0, 0)], 100, layered=True), GEOMETRY, 1, 0, 3)
    for places in ([(0, 61), (0, 0), (0, 0)], [(0, 0), (0, 77), (0, 0)], [(0, 0), (0, 0), (0, 1)]):
        with pytest.raises(LimitExceeded, match="lie outside of what was named"):
            MemoryMap(memory(places, 100, layered=True), GEOMETRY, 1, 0, 3)


def test_a_request_of_a_layer_range_needs_room_for_that_only() -> None:
    assert MemoryMap(memory([(0, 0)], 24), GEOMETRY, 1, 1, 2)
    with pytest.raises(LimitExceeded, match="place 0: 124 bytes at 0 of region 0"):
        MemoryMap(memory([(0, 0)], 123), GEOMETRY, 1, 1, 3)


def test_blocks_are_cut_where_they_lie() -> None:
    zero, one = (memoryview(bytes(number + at for at in range(200))) for number in (0, 50))
    whole = MemoryMap(memory([(1, 3), (0, 9)], 200, 200), GEOMETRY, 2, 0, 3).blocks([zero, one])
    assert list(whole) == [one[3 : 3 + BLOCK], zero[9 : 9 + BLOCK]]
    told = memory([(0, 1), (1, 2), (1, 3), (0, 4)], 200, 200, layered=True)
    layered = MemoryMap(told, GEOMETRY, 2, 1, 3).blocks([zero, one])
    assert list(map(list, layered)) == [[zero[1:25], one[2:102]], [one[3:27], zero[4:104]]]


def test_layers_of_a_block_are_those_of_a_list() -> None:
    region = memoryview(bytes(range(200)))
    told = memory([(0, 20), (0, 7), (0, 90), (0, 1), (0, 2), (0, 3)], 200, layered=True)
    for number, block in enumerate(MemoryMap(told, GEOMETRY, 2, 0, 3).blocks([region])):
        assert not isinstance(block, memoryview)
        starts = [20, 7, 90] if not number else [1, 2, 3]
        whole = [
            region[at : at + size] for at, size in zip(starts, GEOMETRY.layer_bytes, strict=True)
        ]
        assert len(block) == 3
        for cut in (slice(None), slice(1, 3), slice(0, 1), slice(2, 2), slice(-2, None)):
            assert block[cut] == whole[cut]
        assert [block[at] for at in (0, 2, -1)] == [whole[at] for at in (0, 2, -1)]
        for beyond in (3, -4):
            with pytest.raises(IndexError):
                block[beyond]


@pytest.mark.parametrize("layered", [False, True])
def test_places_take_no_more_memory_than_they_came_with(layered: bool) -> None:
    geometry, region = Geometry((16,) * 64), memoryview(bytearray(1024))
    count = 500 if layered else 4000
    told = memory([(0, 0)] * (count * (64 if layered else 1)), 1024, layered=layered)
    tracemalloc.start()
    try:
        blocks = MemoryMap(told, geometry, count, 0, 64).blocks([region])
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(blocks) == count
    assert held_bytes < len(told.places)


# --- spans, against a model that goes byte by byte -----------------------------------------


@st.composite
def requests(draw: st.DrawFn) -> tuple[PieceMap, Memory]:
    """A request of any form, and places for it that do not overlap."""
    geometry = Geometry(draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)))
    first = draw(st.integers(0, geometry.layer_count - 1))
    last = draw(st.integers(first + 1, geometry.layer_count))
    count = draw(st.integers(1, 4))
    pieces = PieceMap(geometry, count, first, last, draw(st.integers(0, last - first)))
    layered = draw(st.booleans())
    sizes = list(geometry.layer_bytes[first:last]) if layered else [pieces.span_bytes]
    room = draw(st.permutations(range(count * len(sizes))))
    places = [(slot % 3, (slot // 3) * 64 + draw(st.integers(0, 5))) for slot in room]
    return pieces, memory(places, 4096, 4096, 4096, layered=layered)


def model(pieces: PieceMap, places: MemoryMap) -> list[tuple[int, int]]:
    """Where each byte of a request belongs, in the order in which they travel."""
    geometry, where = pieces.geometry, []
    per_block = pieces.layer_last - pieces.layer_first if places.layered else 1
    base = geometry.offsets[pieces.layer_first]
    for first, last, *_ in pieces.group_ranges:
        for index in range(pieces.key_count):
            for layer in range(first, last):
                start, end = geometry.offsets[layer], geometry.offsets[layer + 1]
                if places.layered:
                    number, at = places.place(index * per_block + layer - pieces.layer_first)
                else:
                    number, at = places.place(index)
                    at += start - base
                where += [(number, at + byte) for byte in range(end - start)]
    return where


@given(requests(), st.data())
def test_spans_are_those_of_the_model(
    request: tuple[PieceMap, Memory], data: st.DataObject
) -> None:
    pieces, told = request
    places = MemoryMap(
        told, pieces.geometry, pieces.key_count, pieces.layer_first, pieces.layer_last
    )
    expected = model(pieces, places)
    start = data.draw(st.integers(0, len(expected) - 1))
    length = data.draw(st.integers(1, len(expected) - start))
    piece, offset = 0, start
    while offset >= pieces.group_ranges[piece // pieces.key_count][3]:
        offset -= pieces.group_ranges[piece // pieces.key_count][3]
        piece += 1
    spans = places.spans(pieces, piece, offset, length)
    assert all(size for *_, size in spans)
    found = [(number, at + byte) for number, at, size in spans for byte in range(size)]
    assert found == expected[start : start + length]


@given(requests())
def test_blocks_and_spans_agree(request: tuple[PieceMap, Memory]) -> None:
    pieces, told = request
    places = MemoryMap(
        told, pieces.geometry, pieces.key_count, pieces.layer_first, pieces.layer_last
    )
    backing = [memoryview(bytearray(4096)) for _ in range(3)]
    blocks = places.blocks(backing)
    for index, block in enumerate(blocks):
        for view in [block] if isinstance(block, memoryview) else block:
            view[:] = bytes([index + 1]) * len(view)
    for piece in range(pieces.piece_count):
        size = pieces.group_ranges[piece // pieces.key_count][3]
        for number, at, length in places.spans(pieces, piece, 0, size):
            own = bytes([piece % pieces.key_count + 1])
            assert bytes(backing[number][at : at + length]) == own * length
