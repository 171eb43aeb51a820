"""kvstored by its client library, as an inference engine in the same process would use it.

Fetches and puts of a batch, `depth` of them on one event loop (uvloop). Every block is verified
against its checksum by who received it, and that is part of the time; nobody else here does
that. A read lands in the caller's memory, from the socket or, with shared memory, by the daemon.
Variants: `tcp` and `unix` by a socket, `shm` by memory that both map.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from kvstore.buffers import PAGE_BYTES, Region
from kvstore.errors import KVStoreError
from kvstore.messages import PutOutcome
from kvstore.version import VERSION
from kvstore_bench.daemons import LOOPBACK, Daemons
from kvstore_client import AsyncClient, Layout, Namespace
from peers.base import CALL_TIMEOUT_S, Driven, Peer, PeerFailed
from peers.work import Memory, Work

POOL = "peers"
# What an arena has beyond its blocks, beside the batches that are under way.
ARENA_SPARE_BYTES = 64 * 1024 * 1024


class KvPeer(Peer):
    """See the module."""

    def __init__(self, work: Work, variant: str = "tcp") -> None:
        super().__init__(work, variant)
        self._keys = [work.keys(batch) for batch in range(work.batches)]
        self._stack = AsyncExitStack()
        self._region: Region | None = None
        self._client: AsyncClient
        self._namespace: Namespace

    async def open(self, folder: Path) -> None:
        """Start a daemon that holds all of it, and connect."""
        work, shared = self.work, self.variant == "shm"
        block_bytes = -(-work.block_bytes // PAGE_BYTES) * PAGE_BYTES
        arena_bytes = (work.batches + 2 * work.lanes) * work.batch * block_bytes
        listen = LOOPBACK if self.variant == "tcp" else f"unix://{folder / 'kvstored'}"
        enter = self._stack.enter_async_context
        try:
            daemon = await enter(Daemons(1, arena_bytes + ARENA_SPARE_BYTES, (), listen))
            self._client = await enter(
                AsyncClient(
                    daemon.endpoints,
                    node_id=f"peers-{self.variant}",
                    transport=self.variant,
                    deadline_s=CALL_TIMEOUT_S,
                )
            )
            if shared:
                view = (await self._client.allocate(work.memory_bytes)).view
            else:
                self._region = Region(work.memory_bytes, "peers")
                view = self._region.view
            layout = Layout(
                model_id="peers",
                dtype="uint8",
                block_tokens=16,
                layer_bytes=(work.block_bytes,),
            )
            self._namespace = await self._client.open_namespace(POOL, layout)
        except KVStoreError as error:
            raise PeerFailed(str(error)) from error
        self.memory = Memory(work, view)
        self.memory.lay_out()
        self.server_pids = daemon.pids
        self.versions = f"kvstored {VERSION}, Python {sys.version.split()[0]}"

    async def drive(
        self, action: str, depth: int, batches: Iterator[int], until: float = float("inf")
    ) -> Driven:
        """As many tasks as batches that may be under way; no threads."""
        driven, memory = Driven(), self.memory
        lanes = [memory.lane(lane) for lane in range(self.work.lanes)]

        async def keep_busy(lane: int) -> None:
            while (began := time.perf_counter()) < until or lane not in driven.last:
                if (batch := next(batches, None)) is None:
                    return
                if action == "get":
                    await self._fetch(batch, lanes[lane])
                else:
                    await self._put(batch, memory.source(batch))
                driven.took_s.append(time.perf_counter() - began)
                driven.last[lane] = batch

        await asyncio.gather(*map(keep_busy, range(depth)))
        return driven

    async def fill(self) -> None:
        """Store all that will be read."""
        area = self.memory.lane(0)
        for batch in range(self.work.read_batches):
            self.memory.fill(area, batch)
            await self._put(batch, area)

    async def forget(self, batches: Sequence[int]) -> None:
        """Delete them: blocks are immutable, and what is there is not stored again."""
        for batch in batches:
            await self._client.delete(self._namespace, self._keys[batch])

    async def close(self) -> None:
        """Disconnect and end the daemon."""
        await self._stack.aclose()

    def get(self, lane: int, batch: int, into: memoryview) -> None:
        """Nobody calls it: see `drive`."""
        raise NotImplementedError

    def put(self, lane: int, batch: int, source: memoryview) -> None:
        """Nobody calls it: see `drive`."""
        raise NotImplementedError

    async def _fetch(self, batch: int, into: memoryview) -> None:
        handle = self._client.fetch(self._namespace, self._keys[batch], into)
        result = await handle
        if not result.ok:
            raise PeerFailed(f"a fetch failed: {result.errors or result.outcomes}")
        if {run.transport for run in result.runs} != {self.variant}:
            raise PeerFailed(f"bytes came by another transport: {result.runs}")
        if not handle.quiet.done():
            await handle.quiesced()

    async def _put(self, batch: int, source: memoryview) -> None:
        handle = self._client.put(self._namespace, self._keys[batch], source, ack="memory")
        result = await handle
        if result.outcomes.count(PutOutcome.STORED) != len(result.outcomes):
            raise PeerFailed(f"a put failed: {result.errors or result.outcomes}")
        if not handle.quiet.done():
            await handle.quiesced()
