"""Leased views of a process's own memory: what they keep, and how much of it at a time."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from kvstore.buffers import PAGE_BYTES, Region
from kvstore.checksum import block_seed, layer_checksums
from kvstore.errors import Busy
from kvstore.layout import Geometry, PieceMap
from kvstore.messages import AckLevel, Done, FetchOutcome, ViewReply
from kvstore.protocol.strands import Strands
from kvstore.views import VERIFIED_BYTES_MAX, SessionViews, ViewMemory, ViewSink
from kvstore_daemon.source import ArenaSource
from tests.support.engine import content, key, layout
from tests.support.workers import AtOnce

PAGES = 64
HIT, MISS, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.UNAVAILABLE

pytestmark = pytest.mark.asyncio


class Bed:
    """A store in memory that can be viewed, and one client of it."""

    def __init__(self, region: Region) -> None:
        self.memory = ViewMemory(region)
        self.source = ArenaSource(region.view)
        self.views = SessionViews(asyncio.get_running_loop(), self.memory)

    def store(self, size: int, *numbers: int) -> bytes:
        """Store blocks of one layer; their namespace."""
        namespace = self.source.open_namespace("pool", layout(size)).namespace
        keys = list(map(key, numbers))
        sums = b"".join(
            layer_checksums([content(one, size)], block_seed(namespace, one)) for one in keys
        )
        put = self.source.put(namespace, keys, sums, AckLevel.MEMORY)
        while not put.finished:
            for index in put.reserve(size * len(keys)):
                target = put.target(index)
                assert target is not None
                target[:] = content(keys[index], size)
                put.received(index)
        return namespace

    def view(
        self, namespace: bytes, size: int, *numbers: int, bytes_max: int = 0
    ) -> tuple[ViewSink, ViewReply]:
        """View blocks as a server does, by chunks of so many bytes."""
        keys = list(map(key, numbers))
        pieces = PieceMap(Geometry((size,)), len(keys))
        sink = self.views.sink(namespace, keys, pieces, 1000, True, Strands(AtOnce()))
        stream = self.source.fetch(namespace, keys, pieces)
        stream.locate = True
        while (chunk := stream.next_chunk(bytes_max or sink.chunk_bytes)) is not None:
            sink.take(chunk)
            if sink.failure is not None:
                stream.stop(UNAVAILABLE)
        reply = sink.amend(Done(outcomes=stream.outcomes(), tiers=stream.tiers()))
        assert isinstance(reply, ViewReply)
        return sink, reply


@pytest.fixture
def pages() -> Iterator[Region]:
    """Memory of a process."""
    region = Region(PAGES * PAGE_BYTES)
    yield region
    region.close()


@pytest_asyncio.fixture
async def bed(pages: Region) -> AsyncIterator[Bed]:
    """All of it in one bed; nothing is kept in the end."""
    bed = Bed(pages)
    yield bed
    bed.views.close()
    assert bed.memory.viewed_bytes == 0
    assert not any(bed.source.store.index.pins[1:])
    bed.memory.close()


async def test_what_is_viewed_is_where_it_is_said_to_be(bed: Bed) -> None:
    namespace = bed.store(5000, 1, 2, 3)
    _, reply = bed.view(namespace, 5000, 3, 9, 1)
    assert list(reply.done.outcomes) == [HIT, MISS, HIT]
    offsets = struct.unpack("<3Q", reply.offsets)
    for index, number in ((0, 3), (2, 1)):
        found = bed.memory.view[offsets[index] : offsets[index] + 5000]
        assert found == content(key(number), 5000)


@pytest.mark.parametrize("size", [1, 100, PAGE_BYTES, PAGE_BYTES + 1])
async def test_small_blocks_count_for_the_pages_that_they_take(bed: Bed, size: int) -> None:
    most = PAGES // 2 // -(-size // PAGE_BYTES)
    namespace = bed.store(size, *range(most + 1))
    sink, reply = bed.view(namespace, size, *range(most))
    assert sink.failure is None
    assert list(reply.done.outcomes) == [HIT] * most
    assert bed.memory.viewed_bytes == bed.memory.bytes_max
    sink, reply = bed.view(namespace, size, most)
    assert isinstance(sink.failure, Busy)
    assert list(reply.done.outcomes) == [UNAVAILABLE]


@pytest.mark.parametrize("bytes_max", [1, 700, 3 * PAGE_BYTES - 96, PAGE_BYTES * 5])
async def test_parts_of_a_block_are_counted_once(bed: Bed, bytes_max: int) -> None:
    size = 3 * PAGE_BYTES - 96
    namespace = bed.store(size, 1, 2, 3)
    _, reply = bed.view(namespace, size, 1, 2, 3, bytes_max=bytes_max)
    assert list(reply.done.outcomes) == [HIT] * 3
    assert bed.memory.viewed_bytes == 9 * PAGE_BYTES
    assert bed.views.release(reply.lease)


@pytest.mark.parametrize("size", [100, VERIFIED_BYTES_MAX, 3 * VERIFIED_BYTES_MAX])
async def test_what_is_verified_at_a_time_is_little_or_one_block(bed: Bed, size: int) -> None:
    pieces = PieceMap(Geometry((size,)), 8)
    sink = bed.views.sink(
        bytes(32), [key(number) for number in range(8)], pieces, 1000, True, Strands(AtOnce())
    )
    assert sink.chunk_bytes == max(size, VERIFIED_BYTES_MAX)
