"""Real servers on loopback inside of the test's process, and what must be true after a test.

::

    async with serve(4) as nodes, connected(nodes) as client:
        ...

When `serve` ends, every node must be as if nobody had ever been there: no session, no lease,
no pin, no reservation, all its books in order; and no task may be left on the loop.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kvstore.blocksource import Chunk, FetchStream
from kvstore.endpoint import parse_endpoint
from kvstore.layout import PieceMap
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.serving import Server, ServerOptions
from kvstore_client import AsyncClient, FetchResult, Namespace
from kvstore_client.placement import Placement
from kvstore_daemon.engine.recount import check_invariants
from kvstore_daemon.engine.store import BlockStore
from kvstore_daemon.source import ArenaSource
from tests.support.engine import content, key, layout

MIB = 1024 * 1024
#: Sizes that are no powers of two, so that a wrong offset cannot look right. 4,096 together.
LAYERS = (1000, 3000, 96)
BLOCK_BYTES = sum(LAYERS)
# A test that waits this long for what should take milliseconds has failed.
PATIENCE_S = 20.0


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Let the loop turn until something has happened; fail if it never does."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"waited in vain: {what or condition}"
        await asyncio.sleep(0.001)


class Gate:
    """Decides how much fetches may give out.

    Attributes:
        chunks_left: Chunks that may still go; None for all.
        chunk_bytes: Largest chunk.
        given: Chunks that have gone.
    """

    def __init__(self) -> None:
        self.chunks_left: int | None = None
        self.chunk_bytes = MIB
        self.given = 0
        self._waiting: list[_GatedFetch] = []

    def open(self) -> None:
        """Let everything go."""
        self.chunks_left = None
        waiting, self._waiting = self._waiting, []
        for stream in waiting:
            stream.on_ready()

    async def trickle(self, interval_s: float) -> None:
        """Let a chunk go now and then, until cancelled."""
        while True:
            self.chunks_left = 1
            waiting, self._waiting = self._waiting, []
            for stream in waiting:
                stream.on_ready()
            await asyncio.sleep(interval_s)

    def wait(self, stream: _GatedFetch) -> None:
        """A fetch has come to a closed gate."""
        if stream not in self._waiting:
            self._waiting.append(stream)


class _GatedFetch(FetchStream):
    """A fetch that gives out what its gate lets pass."""

    def __init__(self, inner: FetchStream, gate: Gate) -> None:
        self.on_ready = lambda: None
        self._inner = inner
        self._gate = gate

    @property
    def finished(self) -> bool:
        return self._inner.finished

    @property
    def queued_bytes(self) -> int:
        return self._inner.queued_bytes

    def next_chunk(self, bytes_max: int) -> Chunk | None:
        gate = self._gate
        if gate.chunks_left == 0 and not self.finished:
            gate.wait(self)
            return None
        chunk = self._inner.next_chunk(min(bytes_max, gate.chunk_bytes))
        if chunk is not None:
            gate.given += 1
            if gate.chunks_left is not None:
                gate.chunks_left -= 1
        return chunk

    def stop(self, outcome: FetchOutcome) -> None:
        self._inner.stop(outcome)

    def outcomes(self) -> bytes:
        return self._inner.outcomes()

    def tiers(self) -> bytes:
        return self._inner.tiers()


class GatedSource(ArenaSource):
    """The real engine, its fetches behind a gate."""

    def __init__(self, arena: memoryview, **options: Any) -> None:
        super().__init__(arena, **options)
        self.gate = Gate()

    def fetch(
        self, namespace: bytes, keys: Sequence[bytes], pieces: PieceMap, *terms: Any
    ) -> FetchStream:
        return _GatedFetch(super().fetch(namespace, keys, pieces, *terms), self.gate)


class Node:
    """One daemon: a real server in front of a real engine.

    Attributes:
        now: What the engine's clock shows; leases go by it.
        source: The engine.
        server: The server of this life.
    """

    def __init__(self, name: str, arena_bytes: int, listen: str, **options: Any) -> None:
        self.name = name
        self.now = 0.0
        self._arena = memoryview(bytearray(arena_bytes))
        self._options = ServerOptions(node_id=name, **options)
        self._endpoint = parse_endpoint(listen, "listen")
        self.running = False
        self.source = self._make_source()
        self.server: Server

    @property
    def uri(self) -> str:
        """Where it listens, in this life and the next."""
        return str(self._endpoint)

    @property
    def store(self) -> BlockStore:
        """The engine's store."""
        return self.source.store

    @property
    def gate(self) -> Gate:
        """What its fetches have to pass."""
        return self.source.gate

    async def start(self, fresh: bool = True) -> None:
        """Start, on the port of the life before.

        Args:
            fresh: With an empty arena, as a process that was killed and started again.
        """
        if fresh:
            self.source = self._make_source()
        self.server = Server(self.source, [self._endpoint], self._options, memory=self._arena)
        await self.server.start()
        self._endpoint = self.server.endpoints[0]
        self.running = True

    async def kill(self) -> None:
        """Vanish: every connection breaks at once."""
        self.running = False
        await self.server.stop(0)
        self.check_released()

    async def left_alone(self) -> None:
        """Wait until nobody is connected."""
        await until(lambda: not self.server.connections, f"clients of {self.name} are gone")

    def check_released(self) -> None:
        """Nobody holds anything here."""
        assert not self.server.connections
        assert not self.server.sessions
        assert not len(self.store.leases)
        pinned = [slot for slot, pins in enumerate(self.store.index.pins) if slot and pins]
        assert not pinned, f"{self.name}: pins stay on slots {pinned}"
        assert self.store.index.reserved_count == 0
        check_invariants(self.store)

    def stored_count(self) -> int:
        """Blocks that it holds."""
        return self.store.index.published_count

    def holds(self, namespace: Namespace, *keys: bytes) -> list[bool]:
        """Which blocks lie here."""
        slots = self.store.pools.namespace(namespace.id).slots
        return [name in slots for name in keys]

    def damage(self, namespace: Namespace, name: bytes) -> None:
        """Flip a bit of a stored block."""
        slot = self.store.pools.namespace(namespace.id).slots[name]
        self.store.view(slot)[-1] ^= 1

    def counter(self, name: str) -> int:
        """A counter of the server or the engine."""
        return self.server.counters[name] + self.store.counters[name]

    def _make_source(self) -> GatedSource:
        return GatedSource(self._arena, clock=lambda: self.now)


@asynccontextmanager
async def serve(
    count: int = 1,
    arena_bytes: int = 256 * 4096,
    listen: str = "tcp://127.0.0.1:0",
    name: str = "node",
    **options: Any,
) -> AsyncIterator[list[Node]]:
    """Run nodes; check at the end that nobody holds anything and no task is left.

    Args:
        name: What their names begin with.
        options: Of each server, as in `ServerOptions`.
    """
    tasks_before = asyncio.all_tasks()
    nodes = [Node(f"{name}-{number}", arena_bytes, listen, **options) for number in range(count)]
    for node in nodes:
        await node.start()
    try:
        yield nodes
        for node in nodes:
            if node.running:
                await node.left_alone()
                node.check_released()
    finally:
        for node in nodes:
            if node.running:
                await node.kill()
    await until(lambda: not asyncio.all_tasks() - tasks_before, "no task is left")
    left = [thread.name for thread in threading.enumerate() if "kvstore" in thread.name]
    assert not left, f"threads are left: {left}"


def uris(nodes: Sequence[Node]) -> list[str]:
    """Where they listen."""
    return [node.uri for node in nodes]


@asynccontextmanager
async def connected(
    endpoints: Sequence[Node] | Sequence[str] | str, **options: Any
) -> AsyncIterator[AsyncClient]:
    """A client of some nodes, or of some URIs."""
    found = [endpoints] if isinstance(endpoints, str) else endpoints
    texts = [end.uri if isinstance(end, Node) else end for end in found]
    values = {"node_id": "client", "seed": 1, **options}
    async with AsyncClient(texts, **values) as client:
        yield client


async def open_pool(client: AsyncClient, *layers: int, **fields: object) -> Namespace:
    """The namespace that most tests use."""
    return await client.open_namespace("pool", layout(*(layers or LAYERS), **fields))


def chain(count: int, start: int = 0) -> list[bytes]:
    """Keys of a prefix."""
    return [key(number) for number in range(start, start + count)]


def chain_with_owners(
    endpoints: Sequence[str], extents: Sequence[tuple[int, ...]], seed: int = 0
) -> list[bytes]:
    """Keys of a prefix of whole extents, each of which has the owners that were asked for.

    Args:
        extents: For each extent the indices of its first owners in `endpoints`.
    """
    placement, draws = Placement(endpoints), random.Random(seed)
    keys: list[bytes] = []
    for owners in extents:
        part = [draws.randbytes(32) for _ in range(64)]
        while placement.owners(part[0])[: len(owners)] != owners:
            part[0] = draws.randbytes(32)
        keys += part
    return keys


def contents(keys: Sequence[bytes], size: int = BLOCK_BYTES, version: int = 0) -> list[bytearray]:
    """The blocks that belong to keys."""
    return [bytearray(content(name, size, version)) for name in keys]


def room(count: int, size: int = BLOCK_BYTES) -> list[bytearray]:
    """Memory for blocks."""
    return [bytearray(size) for _ in range(count)]


@asynccontextmanager
async def lent(
    client: AsyncClient, count: int, size: int
) -> AsyncIterator[Sequence[bytearray | memoryview]]:
    """Memory for blocks, which peers reach where nothing else is to be used."""
    if client.cluster._agreement.wanted != "shm":
        yield room(count, size)
        return
    region = await client.allocate(count * size)
    yield [region.view[at * size : (at + 1) * size] for at in range(count)]
    await client.free(region)


def check_hits(
    result: FetchResult, keys: Sequence[bytes], into: Sequence[bytearray | memoryview]
) -> None:
    """What is called a hit has the bytes that belong to its key."""
    for outcome, name, memory in zip(result.outcomes, keys, into, strict=True):
        if outcome is FetchOutcome.HIT:
            assert bytes(memory) == content(name, len(memory)), "wrong bytes"


async def store_blocks(
    client: AsyncClient, namespace: Namespace, keys: Sequence[bytes], **options: Any
) -> None:
    """Put the blocks that belong to keys; all must be stored."""
    size = namespace.geometry.block_bytes
    async with lent(client, len(keys), size) as blocks:
        for block, filled in zip(blocks, contents(keys, size), strict=True):
            block[:] = filled
        handle = client.put(namespace, keys, blocks, **options)
        result = await handle
        await handle.quiesced()
    assert result.outcomes == [PutOutcome.STORED] * len(keys), (result.outcomes, result.errors)


async def fetch_blocks(
    client: AsyncClient, namespace: Namespace, keys: Sequence[bytes], **options: Any
) -> FetchResult:
    """Fetch into fresh memory, wait until it is ours again, check every hit."""
    async with lent(client, len(keys), namespace.geometry.block_bytes) as into:
        handle = client.fetch(namespace, keys, into, **options)
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
    return result
