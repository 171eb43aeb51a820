"""The client of a program that has an event loop of its own."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Sequence
from types import TracebackType

from kvstore.errors import KVStoreError, LocalProtocolError
from kvstore.layout import Layout
from kvstore.loadreport import LoadReport
from kvstore.messages import (
    NAMESPACES_PER_LOOKUP_MAX,
    AckLevel,
    FetchOutcome,
    PutOutcome,
    Status,
)
from kvstore_client.arguments import (
    check_ack,
    check_chain,
    check_deadline,
    check_lease,
    fetch_job,
    put_job,
)
from kvstore_client.cluster import Cluster, ClusterOptions
from kvstore_client.handles import AsyncFetchHandle, AsyncPutHandle, Lease, LookupResult
from kvstore_client.namespaces import Namespace

# An engine waits this long at most for KV-cache before it computes it again.
DEADLINE_S = 5.0


def default_node_id() -> str:
    """Name of this node where none was given: host and process."""
    return f"{platform.node() or 'localhost'}-{os.getpid()}"


class AsyncClient:
    """Blocks of KV-cache at one or many daemons, for asyncio.

    Thread rule: all of it belongs to the loop on which it was entered.

    ::

        async with AsyncClient("tcp://127.0.0.1:7450") as client:
            namespace = await client.open_namespace("llama3-70b", layout)
            found = await client.lookup(namespace, keys, lease_s=10)
            handle = client.fetch(namespace, keys[: found.prefix], buffers)
            result = await handle

    Keys are the chain of a prefix from its beginning: blocks of one prefix lie together,
    and the head of the chain says where. With `first`, a call is about `keys[first:]` only;
    with `chain=False` each key stands for itself.

    Args:
        endpoints: URI of each daemon, or of the only one. All clients must write them alike:
            their names decide where blocks lie.
        node_id: Name of this node in load reports and logs.
        token: Credentials for daemons that ask for them.
        deadline_s: Of fetches and puts that do not say otherwise.
        connect_timeout_s: For connecting and for requests without payload.
        copies: Daemons that get each block; 2 survives the loss of one.
        seed: Makes backoff and ramp-in repeatable.

    Raises:
        ConfigError: Names the endpoint and what is wrong with it.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        node_id: str = "",
        token: str = "",
        deadline_s: float = DEADLINE_S,
        connect_timeout_s: float = 1.0,
        copies: int = 1,
        seed: int | None = None,
    ) -> None:
        self.deadline_s = check_deadline(deadline_s)
        self.cluster = Cluster(
            [endpoints] if isinstance(endpoints, str) else endpoints,
            ClusterOptions(
                node_id=node_id or default_node_id(),
                token=token,
                copies=copies,
                connect_timeout_s=connect_timeout_s,
                seed=seed,
            ),
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Connect. Daemons that cannot be reached are tried again in the background."""
        if self._loop is not None:
            raise LocalProtocolError("this client was started before")
        self._loop = asyncio.get_running_loop()
        try:
            await self.cluster.start()
        except BaseException:
            # Nobody closes what he could not open.
            await self.cluster.close()
            raise

    async def close(self) -> None:
        """Disconnect; what is under way ends as UNAVAILABLE. Harmless when called again."""
        if self._loop is not None:
            await self.cluster.close()

    async def __aenter__(self) -> AsyncClient:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def endpoints(self) -> list[str]:
        """Normal forms of the endpoints."""
        return self.cluster.endpoints

    async def open_namespace(self, pool: str, layout: Layout) -> Namespace:
        """The namespace of a pool and a layout, opened at every daemon that is reachable,
        and at the others when they come.

        Raises:
            LocalProtocolError: The name of the pool or the layout is impossible.
            LayoutMismatch: The pool is pinned to another layout; names the field.
            RefusedError: A daemon says no for another reason.
        """
        self._running()
        namespace = Namespace(pool, layout)
        await self.cluster.open_namespace(namespace)
        return namespace

    async def lookup(
        self,
        namespaces: Namespace | Sequence[Namespace],
        keys: Sequence[bytes],
        *,
        first: int = 0,
        chain: bool = True,
        lease_s: float = 0.0,
        deadline_s: float = 1.0,
    ) -> LookupResult:
        """Which blocks are stored? A daemon that does not answer has none.

        Args:
            namespaces: One, or one for each rank: a block counts only if all have it.
            lease_s: Hits of the leading run at each daemon stay that long, at most 60 s.
            deadline_s: When to do without an answer.
        """
        self._running()
        wanted = [namespaces] if isinstance(namespaces, Namespace) else list(namespaces)
        if not 1 <= len(wanted) <= NAMESPACES_PER_LOOKUP_MAX:
            raise LocalProtocolError(
                f"{len(wanted)} namespaces: must be 1 to {NAMESPACES_PER_LOOKUP_MAX}"
            )
        check_chain(keys, first)
        lease_ms = check_lease(lease_s)
        timeout_s = check_deadline(deadline_s)
        return await self.cluster.lookup(wanted, keys, first, chain, lease_ms, timeout_s)

    def fetch(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        into: object,
        *,
        first: int = 0,
        chain: bool = True,
        layers: range | None = None,
        order: str = "block",
        group_layers: int = 1,
        deadline_s: float | None = None,
    ) -> AsyncFetchHandle:
        """Read blocks into the caller's memory; returns at once.

        Args:
            into: Writable memory of the layers asked for: a list with one contiguous buffer
                a block, or with a list of layer buffers a block; or one buffer whose first
                axis is the block. It is the library's until the handle is `quiet`.
            layers: Consecutive layers; all by default.
            order: "block", or "layer": a group of layers of all blocks before the next
                group, for `wait_layer`.
            group_layers: Layers in such a group.
            deadline_s: From now; what has not arrived by then is TIMEOUT.

        Raises:
            LocalProtocolError: An argument is wrong; names it and what was expected.
        """
        deadline = self.deadline_s if deadline_s is None else check_deadline(deadline_s)
        keys = tuple(keys)  # callers lengthen their chains while we work
        wanted = check_chain(keys, first)
        loop = self._running()
        job = fetch_job(namespace, wanted, into, layers, order, group_layers, loop.time(), deadline)
        handle = AsyncFetchHandle(
            deadline,
            lambda: job.end(FetchOutcome.UNAVAILABLE, loop.time()),
            len(job.layers),
        )
        job.handle = handle
        self.cluster.begin_fetch(job, keys, first, chain)
        return handle

    def put(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        blocks: object,
        *,
        first: int = 0,
        chain: bool = True,
        ack: str = AckLevel.MEMORY,
        deadline_s: float | None = None,
    ) -> AsyncPutHandle:
        """Store blocks; returns at once.

        Args:
            blocks: Memory of all layers, as in `fetch`. It must not change until the handle
                is `quiet`.
            ack: What has happened to a block when it counts as stored.

        Raises:
            LocalProtocolError: An argument is wrong; names it and what was expected.
        """
        deadline = self.deadline_s if deadline_s is None else check_deadline(deadline_s)
        keys = tuple(keys)  # callers lengthen their chains while we work
        wanted = check_chain(keys, first)
        level = check_ack(ack)
        loop = self._running()
        job = put_job(namespace, wanted, blocks, loop.time(), deadline)
        handle = AsyncPutHandle(deadline, lambda: job.end(PutOutcome.UNAVAILABLE, loop.time()))
        job.handle = handle
        self.cluster.begin_put(job, keys, first, chain, level)
        return handle

    async def release(self, leases: Sequence[Lease]) -> int:
        """Give leases back; how many had held until now."""
        self._running()
        return await self.cluster.release(leases)

    async def delete(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        *,
        first: int = 0,
        chain: bool = True,
    ) -> list[bool]:
        """Remove blocks; for each whether it was there.

        Raises:
            KVStoreError: A daemon that may have some of them did not do it.
        """
        self._running()
        check_chain(keys, first)
        return await self.cluster.delete(namespace, keys, first, chain)

    async def status(self) -> dict[str, Status | KVStoreError]:
        """What each daemon says of itself, or why it says nothing, by endpoint."""
        self._running()
        return await self.cluster.status()

    def report(self, node_id: str) -> LoadReport | None:
        """The newest load report of a node."""
        return self.cluster.reports.report(node_id)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise LocalProtocolError("this client is not started")
        return self._loop
