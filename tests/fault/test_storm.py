"""Everything at once: many clients, daemons that die and return, a network that cuts and flips.

What must hold in the middle of it: a hit has the bytes of its key, memory that was given back
is not touched, every handle ends. What must hold afterwards: nobody holds anything, and it
all works again. `--seed` draws another storm.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from kvstore.errors import KVStoreError
from kvstore.wire import FrameType, Header
from kvstore_client import AsyncClient, Namespace
from tests.support.cluster import (
    BLOCK_BYTES,
    Node,
    chain,
    check_hits,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    serve,
    store_blocks,
)
from tests.support.peers import Proxy, proxied

DOCUMENTS = [chain(150, start=1000 * number) for number in range(12)]
LENGTH_MAX = 150
CLIENTS = 4
WORKERS = 3
OPERATIONS = 40
SENTINEL = b"\xa5" * BLOCK_BYTES


class Worker:
    """Does one thing after another with a client, and checks each."""

    def __init__(self, client: AsyncClient, namespace: Namespace, seed: int) -> None:
        self.client = client
        self.namespace = namespace
        self.draws = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self._memory = [bytearray(SENTINEL) for _ in range(LENGTH_MAX)]

    async def run(self) -> None:
        """Do all operations."""
        kinds = [self.put, self.put, self.fetch, self.fetch, self.fetch, self.lease, self.delete]
        for _ in range(OPERATIONS):
            assert all(block == SENTINEL for block in self._memory), "memory of ours was written"
            await self.draws.choice(kinds)()

    def keys(self) -> list[bytes]:
        """A prefix of some document."""
        document = self.draws.choice(DOCUMENTS)
        return document[: self.draws.randrange(1, len(document) + 1)]

    async def maybe_cancel(self, handle: object) -> None:
        """Give some requests up after a while."""
        if self.draws.random() < 0.25:
            for _ in range(self.draws.randrange(40)):
                await asyncio.sleep(0)
            handle.cancel()  # type: ignore[attr-defined]

    async def put(self) -> None:
        """Store a prefix."""
        keys = self.keys()
        blocks = contents(keys)
        handle = self.client.put(
            self.namespace, keys, blocks, deadline_s=self.draws.choice([0.01, 0.2, 5])
        )
        await self.maybe_cancel(handle)
        result = await handle
        await handle.quiesced()
        self.seen.update(f"put {outcome.name}" for outcome in result.outcomes)
        for block in blocks:
            block[:] = SENTINEL

    async def fetch(self, keys: Sequence[bytes] | None = None) -> None:
        """Read a prefix, and give the memory back when it is ours."""
        keys = self.keys() if keys is None else keys
        into = self._memory[: len(keys)]
        handle = self.client.fetch(
            self.namespace,
            keys,
            into,
            order=self.draws.choice(["block", "layer"]),
            deadline_s=self.draws.choice([0.01, 0.2, 5]),
        )
        await self.maybe_cancel(handle)
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        self.seen.update(f"fetch {outcome.name}" for outcome in result.outcomes)
        for block in into:
            block[:] = SENTINEL

    async def lease(self) -> None:
        """Look, keep, read, and mostly give back."""
        keys = self.keys()
        found = await self.client.lookup(self.namespace, keys, lease_s=60, deadline_s=0.5)
        if found.prefix:
            await self.fetch(keys[: found.prefix])
        if self.draws.random() < 0.8:
            await self.client.release(found.leases)

    async def delete(self) -> None:
        """Remove the end of a prefix."""
        keys = self.keys()
        with contextlib.suppress(KVStoreError):
            await self.client.delete(self.namespace, keys, first=len(keys) // 2)


async def one_client(proxies: Sequence[Proxy], draws: random.Random) -> Counter[str]:
    """A client with its workers; now and then it vanishes and comes again."""
    seen: Counter[str] = Counter()
    for _ in range(2):
        copies = draws.choice([1, 2])
        ends = [proxy.uri for proxy in proxies]
        async with connected(ends, copies=copies, seed=draws.randrange(1 << 30)) as client:
            namespace = await open_pool(client)
            workers = [Worker(client, namespace, draws.randrange(1 << 30)) for _ in range(WORKERS)]
            await asyncio.gather(*(worker.run() for worker in workers))
            for worker in workers:
                seen += worker.seen
    return seen


async def trouble(nodes: Sequence[Node], proxies: Sequence[Proxy], draws: random.Random) -> None:
    """Make trouble until cancelled."""
    while True:
        for _ in range(draws.randrange(20, 400)):
            await asyncio.sleep(0)
        number = draws.randrange(len(nodes))
        node, proxy = nodes[number], proxies[number]
        what = draws.randrange(6)
        if what == 0:
            await node.kill()
            for _ in range(draws.randrange(200)):
                await asyncio.sleep(0)
            await node.start(fresh=draws.random() < 0.5)
        elif what == 1:
            proxy.cut()
        elif what == 2:
            proxy.hold(*draws.choice([("down",), ("up",), ("up", "down")]))
            for _ in range(draws.randrange(300)):
                await asyncio.sleep(0)
            proxy.let_go()
        elif what == 3:
            proxy.cut_at[draws.choice(["up", "down"]), draws.randrange(3)] = draws.randrange(99999)
        elif what == 4:
            node.gate.chunk_bytes = draws.choice([700, 5000, 1 << 20])
        else:
            node.now += draws.randrange(30)


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_storm_hurts_nobodys_bytes(seed: int) -> None:
    draws = random.Random(seed)

    def flip(header: Header, data: bytearray) -> bytearray:
        if header.type is FrameType.DATA and header.payload_length and draws.random() < 0.02:
            data[-1 - draws.randrange(header.payload_length)] ^= 1 << draws.randrange(8)
        elif draws.random() < 0.001:
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        return data

    async with contextlib.AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(serve(3, arena_bytes=500 * BLOCK_BYTES))
        proxies = [await stack.enter_async_context(proxied(node.uri)) for node in nodes]
        for proxy in proxies:
            proxy.mangle = {"down": flip, "up": flip}
        trouble_maker = asyncio.ensure_future(trouble(nodes, proxies, draws))
        try:
            found = await asyncio.gather(*(one_client(proxies, draws) for _ in range(CLIENTS)))
        finally:
            trouble_maker.cancel()
            await asyncio.wait([trouble_maker])
        if not trouble_maker.cancelled():
            trouble_maker.result()
        seen = sum(found, Counter[str]())
        print(dict(seen))
        # The storm blew, and did not blow everything away.
        assert seen["fetch HIT"] > 1000
        assert seen["fetch UNAVAILABLE"] > 100
        for node, proxy in zip(nodes, proxies, strict=True):
            proxy.mangle.clear()
            proxy.cut_at.clear()
            proxy.let_go()
            if not node.running:
                await node.start()
            node.gate.open()
            await node.left_alone()
            node.check_released()
        async with connected([proxy.uri for proxy in proxies]) as client:
            namespace = await open_pool(client)
            keys = chain(150, start=10**6)
            await store_blocks(client, namespace, keys)
            assert (await fetch_blocks(client, namespace, keys)).ok
