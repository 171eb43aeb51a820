"""Sessions for tests of RDMA: two nodes in this process, memory on both sides, and requests.

The server's blocks lie apart from each other in its arena, the asker's wherever a test says in
its pool; what lies between them there is looked at, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

from kvstore.blocksource import Chunk
from kvstore.buffers import Region
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymap import MemoryMap
from kvstore.memorymessages import Memory, MemoryRegion
from kvstore.messages import Done
from kvstore.protocol.placing import Placed
from kvstore.transport.rdma import RdmaNode, RdmaOptions
from kvstore.transport.rdma_end import RdmaEnd
from kvstore.transport.rdma_fetch import RdmaSink
from kvstore.transport.rdma_put import RdmaPuller
from kvstore.transport.verbs import Verbs

# A test that waits this long for what should take a moment has failed.
PATIENCE_S = 30.0
# A peer that is gone is noticed after about a quarter of a second, one that stands still late.
QUICK = RdmaOptions(timeout=13, retry_count=3, stall_s=20.0)
MEMORY_BYTES = 8 * 1024 * 1024


class Watch:
    """Lets a test wait for what callbacks change."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notice(self, *_: object) -> None:
        """Something may have changed."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Return when `condition()` is true."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"waited in vain for {what}") from None


class Session:
    """A server's node and an asker's, with an end each, connected.

    Attributes:
        arena, pool: The server's memory, and the asker's.
        active, passive: The ends.
        runs: Numbers that have come to the asker, in order.
        lost: Errors of queue pairs of the active side, and of the passive one.
    """

    def __init__(
        self,
        verbs: Verbs,
        options: RdmaOptions = QUICK,
        memory_bytes: int = MEMORY_BYTES,
        client_loop: asyncio.AbstractEventLoop | None = None,
        server_loop: asyncio.AbstractEventLoop | None = None,
        connect: bool = True,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.watch = Watch()
        self.parts = contextlib.ExitStack()
        self.runs: list[int] = []
        self.lost: tuple[list[Exception], list[Exception]] = ([], [])
        self.arena = Region(memory_bytes, "arena")
        self.parts.callback(self.arena.close)
        self.pool = Region(memory_bytes, "pool")
        self.parts.callback(self.pool.close)
        self.server = RdmaNode(server_loop or loop, verbs, options)
        self.parts.callback(self.server.close)
        self.client = RdmaNode(client_loop or loop, verbs, options)
        self.parts.callback(self.client.close)
        self.arena_memory = self.server.register(self.arena.view)
        self.pool_memory = self.client.register(self.pool.view, remote_write=True, remote_read=True)
        self.active, self.passive = self.ends(connect)
        self.passive.on_run = self._on_run
        for end, lost in zip((self.active, self.passive), self.lost, strict=True):
            end.on_failed = partial(self._on_failed, lost)

    def ends(self, connect: bool = True) -> tuple[RdmaEnd, RdmaEnd]:
        """Two ends of one more session."""
        active = self.server.end("client", active=True)
        passive = self.client.end("server", active=False)
        if connect:
            active.connect(passive.addresses())
            passive.connect(active.addresses())
        return active, passive

    def close(self) -> None:
        """Close everything."""
        self.parts.close()

    def _on_run(self, run: int) -> None:
        self.runs.append(run)
        self.watch.notice()

    def _on_failed(self, lost: list[Exception], error: Exception) -> None:
        lost.append(error)
        self.watch.notice()


@contextlib.asynccontextmanager
async def session(verbs: Verbs, **more: object) -> AsyncIterator[Session]:
    """A session, closed at the end."""
    made = Session(verbs, **more)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


class Request:
    """Blocks of one request, in the server's arena and in the asker's pool.

    Args:
        layered: Whether each layer has a place of its own.
        gap: Bytes between places in the pool.
        first: Offset of the first place.
        layer_first, layer_last, group_layers: As of `PieceMap`.

    Attributes:
        map, pieces: For `RdmaEnd`.
        arena_first: Where the first block lies in the arena.
        places: Offset in the pool and offset in the arena, and how many bytes.
    """

    def __init__(
        self,
        session: Session,
        layer_bytes: Sequence[int] = (3000, 5000),
        key_count: int = 5,
        layered: bool = False,
        gap: int = 64,
        first: int = 128,
        layer_first: int = 0,
        layer_last: int | None = None,
        group_layers: int = 0,
        region: MemoryRegion | None = None,
    ) -> None:
        self.session = session
        geometry = Geometry(layer_bytes)
        last = geometry.layer_count if layer_last is None else layer_last
        self.pieces = PieceMap(geometry, key_count, layer_first, last, group_layers)
        self.block_bytes = geometry.block_bytes
        self.arena_first = 0
        self.places: list[tuple[int, int, int]] = []
        places = bytearray()
        at = first
        for index in range(key_count):
            layers = [(layer, layer + 1) for layer in range(layer_first, last)]
            for begin, end in layers if layered else [(layer_first, last)]:
                start, stop = geometry.offsets[begin], geometry.offsets[end]
                places += struct.pack("<IQ", 0, at)
                self.places.append((at, self.block_at(index) + start, stop - start))
                at += stop - start + gap
        region = region or session.pool_memory.described()
        memory = Memory(regions=(region,), places=bytes(places), layered=layered)
        self.map = MemoryMap(memory, geometry, key_count, layer_first, last)

    def block_at(self, index: int) -> int:
        """Where a block begins in the arena."""
        return self.arena_first + index * (self.block_bytes + 4096)

    def target(self, index: int) -> memoryview:
        """Memory of a block in the arena."""
        at = self.block_at(index)
        return self.session.arena.view[at : at + self.block_bytes]

    def fill(self, region: Region, seed: int) -> None:
        """Give all of a memory bytes that are not the same twice."""
        region.view[:] = random.Random(seed).randbytes(region.size_bytes)

    def expected_pool(self, before: bytes) -> bytes:
        """What the pool holds when all is there."""
        after = bytearray(before)
        for at, source, size in self.places:
            after[at : at + size] = self.session.arena.view[source : source + size]
        return bytes(after)

    def chunks(self, bytes_max: int, on_release: Callable[[int], None]) -> Iterator[Chunk]:
        """All of the request, in chunks."""
        pieces = self.pieces
        buffers: list[memoryview] = []
        begin, length, number = (0, 0), 0, 0
        for piece in range(pieces.piece_count):
            group, index = divmod(piece, pieces.key_count)
            _, _, start, size = pieces.group_ranges[group]
            offset = 0
            while offset < size:
                if not buffers:
                    begin = (piece, offset)
                part = min(size - offset, bytes_max - length)
                at = self.block_at(index) + start + offset
                buffers.append(self.session.arena.view[at : at + part])
                offset += part
                length += part
                if length == bytes_max:
                    yield Chunk(*begin, buffers, length, b"c", partial(on_release, number))
                    buffers, length = [], 0
                    number += 1
        if buffers:
            yield Chunk(*begin, buffers, length, b"c", partial(on_release, number))


class Fetch:
    """A fetch under way.

    Attributes:
        news: Those that came.
        released: Numbers of chunks that were, in order.
        taken: How many chunks were given.
        ready_count: Calls of `on_ready`.
    """

    def __init__(self, request: Request, bytes_max: int = 6000, end: RdmaEnd | None = None) -> None:
        self.request = request
        self.watch = request.session.watch
        self.news: list[Placed] = []
        self.released: list[int] = []
        self.taken = 0
        self.ready_count = 0
        self.sink: RdmaSink = (end or request.session.active).fetch_sink(
            request.map, request.pieces
        )
        self.sink.on_news = self._on_news
        self.sink.on_ready = self._on_ready
        self._chunks = request.chunks(bytes_max, self._release)
        self.finished = False

    def feed(self, chunks_max: int = 1 << 30) -> None:
        """Give as many chunks as are taken now."""
        while self.sink.accepts and chunks_max and not self.finished:
            chunk = next(self._chunks, None)
            self.finished = chunk is None
            if chunk is not None:
                self.taken += 1
                self.sink.take(chunk)
                chunks_max -= 1

    async def run(self) -> None:
        """Give all of it, and wait until it is idle, or has failed."""
        sink = self.sink
        while not self.finished and sink.failure is None:
            self.feed()
            await self.watch.until(
                lambda: self.finished or sink.accepts or sink.failure is not None, "room"
            )
        await self.watch.until(lambda: sink.idle, "the end of a fetch")

    def run_ids(self) -> list[int]:
        """Runs that the news name."""
        return [news.data.run for news in self.news]

    async def arrived(self) -> None:
        """Wait until the asker has news of all runs."""
        wanted = set(self.run_ids())
        await self.watch.until(lambda: wanted <= set(self.request.session.runs), "all runs")

    def lost_runs(self) -> list[int]:
        """Those of DONE."""
        return list(self.sink.amend(Done(outcomes=b"")).lost_runs)

    def _on_news(self, news: Placed) -> None:
        self.news.append(news)
        self.watch.notice()

    def _on_ready(self) -> None:
        self.ready_count += 1
        self.watch.notice()

    def _release(self, number: int) -> None:
        self.released.append(number)
        self.watch.notice()


class Pull:
    """A put under way.

    Attributes:
        pulled: Indices of blocks that are there, in order.
        ready_count: Calls of `on_ready`.
    """

    def __init__(self, request: Request, end: RdmaEnd | None = None) -> None:
        self.request = request
        self.watch = request.session.watch
        self.pulled: list[int] = []
        self.ready_count = 0
        self.puller: RdmaPuller = (end or request.session.active).put_puller(
            request.map, request.pieces
        )
        self.puller.on_pulled = self._on_pulled
        self.puller.on_ready = self._on_ready

    def ask(self, *indices: int) -> None:
        """Have blocks pulled."""
        for index in indices:
            self.puller.pull(index, self.request.target(index))

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        await self.watch.until(lambda: self.puller.idle, "the end of a put")

    def _on_pulled(self, index: int) -> None:
        self.pulled.append(index)
        self.watch.notice()

    def _on_ready(self) -> None:
        self.ready_count += 1
        self.watch.notice()


__all__ = ["PATIENCE_S", "QUICK", "Fetch", "Pull", "Request", "Session", "Watch", "session"]
