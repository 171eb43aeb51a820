"""An agent's pool without a network: storage that a test plays by hand, and a reader.

::

    bench = FillBench(blocks=8)
    stream, reader = bench.fetch(0, 1, 2)        # a fetch of these blocks
    bench.jobs[0].deliver(...)                   # storage answers what was asked for
    reader.read()                                # takes what the fetch gives out, and checks it
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from kvstore.blocksource import Chunk
from kvstore.checksum import block_seed, layer_checksums
from kvstore.layout import PieceMap
from kvstore.messages import Done, FetchOutcome, FetchSource
from kvstore.transfer import PENDING, FetchTransfer
from kvstore.wire import FrameType, Header
from kvstore_client.agent.fills import Fills
from kvstore_client.agent.memory import PAGE_BYTES, HeldBlock
from kvstore_client.agent.rooms import WatchedPool
from kvstore_client.agent.streams import PoolFetch
from kvstore_client.agent.terms import FetchTerms
from kvstore_client.jobs import FetchJob, FillJob
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import PlacedKeys
from tests.support.engine import content, key, layout

CHUNK_BYTES = 1024 * 1024


def data_header(piece: int, offset: int, length: int) -> Header:
    """The header of a DATA frame."""
    return Header(FrameType.DATA, 0, 1, 0, length, piece, offset, 0)


class StorageJob:
    """What was asked of storage, to be answered by hand.

    Attributes:
        job: The job of the fill.
        stopped: Whether the agent does not want it any more.
    """

    def __init__(self, job: FillJob) -> None:
        self.job = job
        self.stopped = False
        self.failed: dict[int, int] = {}
        indices = range(len(job.keys))
        self._transfer = job.transfer(indices, job.layers, self._on_failed)
        job.borrow(self, self._stop)

    @property
    def numbers(self) -> list[int]:
        """Which blocks were asked for."""
        known = {key(number): number for number in range(4096)}
        return [known[name] for name in self.job.keys]

    def deliver(
        self, *indices: int, layers: tuple[int, int] | None = None, version: int = 0
    ) -> None:
        """Bytes of some blocks of the job (all: none given), of some of the layers."""
        pieces = self._transfer.pieces
        for group, (first, last, start, size) in enumerate(pieces.group_ranges):
            for index in indices or range(len(self.job.keys)):
                begin, end = layers or (first, last)
                offsets = pieces.geometry.offsets
                a = max(0, offsets[max(begin, first)] - start)
                b = min(size, offsets[min(end, last)] - start)
                if a < b:
                    self._send(group, index, a, b, version)

    def damage(self, index: int, layers: tuple[int, int]) -> None:
        """Bytes of some layers of a block, within one group, that are not what they should be."""
        _, _, start, _ = self._transfer.pieces.group_ranges[0]
        offsets = self._transfer.pieces.geometry.offsets
        a, b = (offsets[layer] - start for layer in layers)
        self._send(0, index, a, b, 0, damaged=True)

    def _send(
        self, group: int, index: int, a: int, b: int, version: int, damaged: bool = False
    ) -> None:
        pieces, name = self._transfer.pieces, self.job.keys[index]
        first, last, start, _ = pieces.group_ranges[group]
        offsets = pieces.geometry.offsets
        data = content(name, offsets[-1], version)
        header = data_header(group * pieces.key_count + index, a, b - a)
        at = start + a
        for view in self._transfer.route(header, lambda size: [memoryview(bytearray(size))]):
            view[:] = data[at : at + len(view)]
            view[0] ^= damaged
            at += len(view)
        checksums = b""
        if not a:
            layers = [data[offsets[n] : offsets[n + 1]] for n in range(first, last)]
            checksums = layer_checksums(layers, block_seed(self.job.namespace.id, name), first)
        self._transfer.data(header, checksums, ())

    def fail(self, outcome: FetchOutcome, *indices: int) -> None:
        """Some blocks (all: none given) end so."""
        for index in indices or range(len(self.job.keys)):
            if self.job.outcomes[index] == PENDING:
                self.job.block_failed(index, outcome)

    def end(self) -> None:
        """The last word; blocks that are still open end as TIMEOUT."""
        self.job.finished(self)
        self.job.time_out()
        self.job.let_go()

    def _on_failed(self, index: int, outcome: FetchOutcome) -> None:
        self.job.block_failed(index, outcome)

    def _stop(self) -> None:
        self.stopped = True
        self._transfer.abandon()
        self.job.let_go()


class Reader:
    """Takes the chunks of a fetch as a peer does, and verifies what it gets."""

    def __init__(self, namespace: Namespace, keys: Sequence[bytes], pieces: PieceMap) -> None:
        self.stream: PoolFetch
        self.failed: dict[int, int] = {}
        self.pieces = pieces
        self.arrived: list[tuple[int, int]] = []
        self.chunks: list[Chunk] = []  # taken and not released
        self.memory = [memoryview(bytearray(pieces.span_bytes)) for _ in keys]
        self._transfer = FetchTransfer(
            namespace.id,
            keys,
            pieces,
            self.memory,
            lambda index, group: self.arrived.append((index, group)),
            self.failed.__setitem__,
        )

    def read(self, bytes_max: int = CHUNK_BYTES, chunks_max: int = 10**6) -> int:
        """Take what there is, and let go of it at once; returns how many chunks."""
        count = self.take(bytes_max, chunks_max)
        self.release()
        return count

    def take(self, bytes_max: int = CHUNK_BYTES, chunks_max: int = 10**6) -> int:
        """Take chunks and keep them; returns how many."""
        count = 0
        while count < chunks_max and (chunk := self.stream.next_chunk(bytes_max)) is not None:
            count += 1
            self._take(chunk, bytes_max)
        return count

    def release(self) -> None:
        """Let go of all chunks."""
        chunks, self.chunks = self.chunks, []
        for chunk in chunks:
            chunk.release()

    def _take(self, chunk: Chunk, bytes_max: int) -> None:
        assert chunk.length == sum(map(len, chunk.buffers))
        assert chunk.length <= bytes_max
        assert len(chunk.buffers) <= 512
        header = data_header(chunk.piece, chunk.piece_offset, chunk.length)
        if chunk.length:
            views = self._transfer.route(header, lambda size: [memoryview(bytearray(size))])
            data, at = b"".join(chunk.buffers), 0
            for view in views:
                view[:] = data[at : at + len(view)]
                at += len(view)
        self._transfer.data(header, chunk.checksums, chunk.failed)
        self.chunks.append(chunk)

    def end(self) -> list[bytes | FetchOutcome]:
        """Read to the end: for each key its bytes, or its outcome."""
        self.read()
        assert self.stream.finished, "blocks are still on their way"
        assert self.stream.queued_bytes == 0
        self._transfer.done(
            Done(
                outcomes=self.stream.outcomes(),
                tiers=self.stream.tiers(),
                served_by=self.stream.served_by(),
            )
        )
        return [
            bytes(memory) if outcome == FetchOutcome.HIT else FetchOutcome(outcome)
            for memory, outcome in zip(self.memory, self.stream.outcomes(), strict=True)
        ]


class FillBench:
    """A pool, its fills, and storage by hand.

    Args:
        blocks: How many blocks the pool has room for.
        layers: Bytes of each layer.
    """

    def __init__(self, blocks: int = 16, layers: Sequence[int] = (1000, 3000, 96)) -> None:
        self.layout = layout(*layers)
        self.namespace = Namespace("pool", self.layout)
        self.block_bytes = sum(layers)
        pages = -(-self.block_bytes // PAGE_BYTES)
        self.pool = WatchedPool(memoryview(bytearray(blocks * pages * PAGE_BYTES)))
        self.counters: Counter[str] = Counter()
        self.loop = asyncio.get_running_loop()
        self.fills = Fills(self.loop, self.pool, self, verify=False, counters=self.counters)
        self.jobs: list[StorageJob] = []
        self.ready_count = 0

    def begin_fetch(self, job: FetchJob) -> None:
        """As a cluster does."""
        assert isinstance(job, FillJob)
        self.jobs.append(StorageJob(job))

    def fetch(
        self,
        *numbers: int,
        layers: tuple[int, int] | None = None,
        group: int = 0,
        source: FetchSource = FetchSource.RELAY,
        **terms: object,
    ) -> Reader:
        """Begin a fetch; returns who reads it, with the fetch as its `stream`."""
        keys = list(map(key, numbers))
        geometry = self.namespace.geometry
        first, last = layers or (0, geometry.layer_count)
        pieces = PieceMap(geometry, len(keys), first, last, group)
        reader = Reader(self.namespace, keys, pieces)
        values = {"deadline_at": self.loop.time() + 60.0, **terms}
        reader.stream = PoolFetch(
            self.pool,
            self.fills,
            self.namespace,
            PlacedKeys(keys, ()),
            pieces,
            FetchTerms(source=source, **values),  # type: ignore[arg-type]
            self.counters,
        )
        reader.stream.on_ready = self._on_ready
        return reader

    def hold(self, number: int, first: int = 0, last: int | None = None) -> HeldBlock:
        """Have layers of a block in the pool."""
        geometry, name = self.namespace.geometry, key(number)
        until = geometry.layer_count if last is None else last
        block = self.pool.reserve(self.namespace, name)
        assert block is not None
        data = content(name, self.block_bytes)
        offsets = geometry.offsets
        layers = [data[offsets[n] : offsets[n + 1]] for n in range(first, until)]
        self.pool.pin(block)
        block.layers(first, until)[:] = b"".join(layers)
        seed = block_seed(self.namespace.id, name)
        block.learn(first, layer_checksums(layers, seed, first))
        block.arrived(first, until)
        self.pool.unpin(block)
        return block

    def expected(self, number: int, layers: tuple[int, int] | None = None) -> bytes:
        """The bytes of layers of a block."""
        offsets = self.namespace.geometry.offsets
        first, last = layers or (0, len(offsets) - 1)
        return content(key(number), self.block_bytes)[offsets[first] : offsets[last]]

    def check_idle(self) -> None:
        """Nobody holds or waits for anything."""
        self.pool.check()
        assert self.pool.pinned_count == 0
        assert self.pool.waiting_count == 0
        assert not self.fills.under_way
        assert not self.fills._of
        for block in self.pool._blocks.values():
            assert not block.watchers
            assert not block.coming

    def _on_ready(self) -> None:
        self.ready_count += 1
