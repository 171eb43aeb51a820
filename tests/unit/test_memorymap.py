"""Places of a request: what lies where, and what is refused before a byte moves."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from kvstore.errors import LimitExceeded
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymap import PLACE_BYTES, MemoryMap, describe
from kvstore.memorymessages import REGIONS_PER_REQUEST_MAX, Memory, MemoryRegion
from kvstore.transfer import BlockMemory

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
    assert MemoryMap(told, GEOMETRY, 1, 0, 3).places == [(1, 263)]
    assert PLACE_BYTES == 12


@pytest.mark.parametrize(("count", "cut"), [(0, 0), (1, 0), (3, 0), (2, 1), (2, 12), (2, 23)])
def test_places_must_be_as_many_as_the_blocks(count: int, cut: int) -> None:
    with pytest.raises(LimitExceeded, match="of places for 2 blocks of 1 places, expected 24"):
        MemoryMap(memory([(0, 0)] * count, 1000, cut=cut), GEOMETRY, 2, 0, 3)


def test_layers_have_a_place_each_of_those_that_are_asked_for() -> None:
    told = memory([(0, 0)] * 4, 1000, layered=True)
    assert len(MemoryMap(told, GEOMETRY, 2, 1, 3).places) == 4
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
        assert MemoryMap(told, GEOMETRY, 2, 0, 3).places[1] == place
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
    def cut(number: int, offset: int, size: int) -> memoryview:
        return memoryview(bytes([number, offset, size]))

    whole = MemoryMap(memory([(1, 3), (0, 9)], 999, 999), GEOMETRY, 2, 0, 3).blocks(cut)
    assert [bytes(block) for block in whole if isinstance(block, memoryview)] == [
        bytes([1, 3, BLOCK]),
        bytes([0, 9, BLOCK]),
    ]
    told = memory([(0, 1), (1, 2), (1, 3), (0, 4)], 999, 999, layered=True)
    layered = MemoryMap(told, GEOMETRY, 2, 1, 3).blocks(cut)
    assert [[bytes(view) for view in block] for block in layered] == [
        [bytes([0, 1, 24]), bytes([1, 2, 100])],
        [bytes([1, 3, 24]), bytes([0, 4, 100])],
    ]


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
                    number, at = places.places[index * per_block + layer - pieces.layer_first]
                else:
                    number, at = places.places[index]
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
    blocks = places.blocks(lambda number, offset, size: backing[number][offset : offset + size])
    for index, block in enumerate(blocks):
        for view in [block] if isinstance(block, memoryview) else block:
            view[:] = bytes([index + 1]) * len(view)
    for piece in range(pieces.piece_count):
        size = pieces.group_ranges[piece // pieces.key_count][3]
        for number, at, length in places.spans(pieces, piece, 0, size):
            own = bytes([piece % pieces.key_count + 1])
            assert bytes(backing[number][at : at + length]) == own * length


# --- the asking side -----------------------------------------------------------------------


class Book:
    """Regions of an asker, by number, as `describe` asks for them."""

    def __init__(self, *sizes: int) -> None:
        self.views = [memoryview(bytearray(size)) for size in sizes]

    def locate(self, view: memoryview) -> tuple[int, int] | None:
        """By the buffer behind the view, and what was written there."""
        for number, whole in enumerate(self.views):
            if view.obj is whole.obj:
                return number, whole.obj.index(bytes(view))  # type: ignore[attr-defined]
        return None

    def region(self, number: int) -> MemoryRegion:
        """As its peer knows it."""
        return MemoryRegion(keys=(100 + number,), size_bytes=len(self.views[number]))

    def mark(self) -> None:
        """Make each place findable."""
        for whole in self.views:
            whole[:] = bytes(n % 251 for n in range(len(whole)))


def test_what_is_described_is_what_the_other_side_cuts() -> None:
    book = Book(500, 300)
    book.mark()
    blocks: list[BlockMemory] = [book.views[1][50 : 50 + BLOCK], book.views[0][7 : 7 + BLOCK]]
    told = describe(blocks, book.locate, book.region)
    assert told is not None
    assert [region.keys for region in told.regions] == [(101,), (100,)]
    assert not told.layered
    found = MemoryMap(told, GEOMETRY, 2, 0, 3)
    assert found.places == [(0, 50), (1, 7)]


def test_layers_are_described_one_by_one() -> None:
    book = Book(1000)
    book.mark()
    views = [book.views[0][a : a + size] for a, size in ((0, 40), (50, 24), (80, 100))]
    told = describe([views], book.locate, book.region)
    assert told is not None
    assert told.layered
    assert MemoryMap(told, GEOMETRY, 1, 0, 3).places == [(0, 0), (0, 50), (0, 80)]


def test_memory_that_is_in_no_region_is_not_described() -> None:
    book = Book(500)
    book.mark()
    inside, outside = book.views[0][:BLOCK], memoryview(bytearray(BLOCK))
    assert describe([inside, outside], book.locate, book.region) is None
    assert describe([[inside], [outside]], book.locate, book.region) is None


def test_blocks_of_both_forms_are_not_described() -> None:
    book = Book(500)
    book.mark()
    view = book.views[0][:BLOCK]
    assert describe([view, [view]], book.locate, book.region) is None
    assert describe([[view], view], book.locate, book.region) is None


@pytest.mark.parametrize("count", [REGIONS_PER_REQUEST_MAX, REGIONS_PER_REQUEST_MAX + 1])
def test_a_request_names_no_more_regions_than_it_may(count: int) -> None:
    book = Book(*[10] * count)
    book.mark()
    blocks: list[BlockMemory] = [whole[:4] for whole in book.views]
    told = describe(blocks, book.locate, book.region)
    assert (told is not None) == (count <= REGIONS_PER_REQUEST_MAX)


def test_regions_are_named_once() -> None:
    book = Book(600)
    book.mark()
    blocks: list[BlockMemory] = [book.views[0][a:b] for a, b in pairwise(range(0, 240, 40))]
    told = describe(blocks, book.locate, book.region)
    assert told is not None
    assert len(told.regions) == 1
