"""Where a request's memory lies in regions of the client, and how a server reads that."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvstore.errors import LocalProtocolError
from kvstore.layout import Geometry
from kvstore.memorymap import MemoryMap
from kvstore.memorymessages import (
    REGION_METADATA_BYTES,
    REGIONS_PER_REQUEST_MAX,
    Memory,
    MemoryRegion,
)
from kvstore.messages import encode
from kvstore.transfer import BlockMemory
from kvstore_client.memory import Region, Regions
from kvstore_client.places import PLACE_BYTES, locate, place_bytes_of

LAYERS = (40, 24, 100)
GEOMETRY = Geometry(LAYERS)
BLOCK = sum(LAYERS)


def made(*sizes: int) -> tuple[Regions, list[Region]]:
    """Regions of these sizes, in the order in which they are given."""
    regions = Regions()
    return regions, [regions.register(bytearray(size)) for size in sizes]


def read(regions: Regions, memory: list[BlockMemory]) -> list[tuple[int, int]]:
    """The places as a server finds them."""
    located = locate(regions, memory)
    told = Memory(
        regions=tuple(
            MemoryRegion(keys=(region.number,), size_bytes=region.size_bytes)
            for region in located.regions
        ),
        places=located.places,
        layered=located.layered,
    )
    found = MemoryMap(told, GEOMETRY, len(memory), 0, len(LAYERS))
    return [found.place(number) for number in range(len(told.places) // PLACE_BYTES)]


def test_what_is_told_is_what_the_other_side_reads() -> None:
    regions, (first, second) = made(500, 300)
    blocks: list[BlockMemory] = [second.view[50 : 50 + BLOCK], first.view[7 : 7 + BLOCK]]
    located = locate(regions, blocks)
    assert located.regions == [second, first]
    assert not located.layered
    assert read(regions, blocks) == [(0, 50), (1, 7)]


def test_layers_are_told_one_by_one() -> None:
    regions, (region,) = made(1000)
    views = [region.view[a : a + size] for a, size in ((0, 40), (50, 24), (80, 100))]
    assert locate(regions, [views]).layered
    assert read(regions, [views]) == [(0, 0), (0, 50), (0, 80)]
    assert place_bytes_of(views) == 3 * PLACE_BYTES
    assert place_bytes_of(views[0]) == PLACE_BYTES


def test_regions_are_told_once_however_views_go_to_and_fro() -> None:
    regions, (first, second) = made(600, 600)
    blocks: list[BlockMemory] = [
        region.view[a:b] for a, b in pairwise(range(0, 600, 200)) for region in (first, second)
    ]
    located = locate(regions, blocks)
    assert located.regions == [first, second]
    assert read(regions, blocks) == [(0, 0), (1, 0), (0, 200), (1, 200)]


def test_views_that_cannot_be_written_are_found_too() -> None:
    regions, (region,) = made(500)
    assert read(regions, [region.view.toreadonly()[9 : 9 + BLOCK]]) == [(0, 9)]


def test_memory_in_no_region_is_refused() -> None:
    regions, (region,) = made(500)
    inside, outside = region.view[:BLOCK], memoryview(bytearray(BLOCK))
    with pytest.raises(LocalProtocolError, match=f"{BLOCK} bytes at 0x.* lie in no region"):
        locate(regions, [inside, outside])
    with pytest.raises(LocalProtocolError, match="in no region"):
        locate(regions, [[inside], [outside]])
    with pytest.raises(LocalProtocolError, match="in no region"):
        locate(Regions(), [inside])


def test_memory_that_juts_out_of_a_region_is_refused() -> None:
    whole = memoryview(bytearray(600))
    regions = Regions()
    regions.register(whole[100:400])
    assert locate(regions, [whole[100:200], whole[300:400]]).regions
    for first, last in ((301, 401), (99, 199), (0, 600)):
        with pytest.raises(LocalProtocolError, match="in no region"):
            locate(regions, [whole[100:200], whole[first:last]])


def test_neighbours_are_told_apart() -> None:
    whole = memoryview(bytearray(600))
    regions = Regions()
    two = [regions.register(whole[:300]), regions.register(whole[300:])]
    located = locate(regions, [whole[0:300], whole[300:600]])
    assert located.regions == two
    with pytest.raises(LocalProtocolError, match="in no region"):
        locate(regions, [whole[200:400]])


def test_blocks_of_both_forms_are_refused() -> None:
    regions, (region,) = made(500)
    view = region.view[:BLOCK]
    for blocks in ([view, [view]], [[view], view]):
        with pytest.raises(LocalProtocolError, match="others layer by layer"):
            locate(regions, blocks)


def test_a_request_names_all_regions_that_there_may_be() -> None:
    whole = memoryview(bytearray(8 * REGIONS_PER_REQUEST_MAX))
    regions = Regions()
    views = [whole[at : at + 8] for at in range(0, len(whole), 8)]
    for view in views:
        regions.register(view)
    assert len(locate(regions, [views]).regions) == REGIONS_PER_REQUEST_MAX


def test_names_of_regions_are_no_longer_than_is_set_aside_for_them() -> None:
    region = MemoryRegion(keys=(0xFFFFFFFF,) * 8, address=1 << 62, size_bytes=1 << 62)
    two, one = (len(encode(Memory(regions=(region,) * n, places=b""))) for n in (2, 1))
    assert two - one <= REGION_METADATA_BYTES
