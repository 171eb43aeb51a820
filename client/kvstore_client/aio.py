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
    Empty,
    Pool,
    PoolAction,
    PoolInfo,
    Pools,
    Status,
)
from kvstore.wire import FrameType
from kvstore_client.arguments import (
    check_ack,
    check_chain,
    check_deadline,
    check_layers,
    check_lease,
    check_offer,
    check_pool_request,
    check_request,
    check_transport,
    fetch_job,
    fetch_route,
    put_job,
)
from kvstore_client.cluster import Cluster
from kvstore_client.clusteroptions import ClusterOptions
from kvstore_client.handles import AsyncFetchHandle, AsyncPutHandle, Claimed, Lease, LookupResult
from kvstore_client.memory import Region
from kvstore_client.namespaces import Namespace
from kvstore_client.relays import check_policy, check_relays
from kvstore_client.selector import Policy
from kvstore_client.transports import AUTO
from kvstore_client.views import Views

# How long an agent keeps blocks for an engine that has not claimed them yet: as long as two
# requests with the default deadline.
RETAIN_S = 10.0
# How long a view's blocks stay when their reader has died; it is renewed three times as often.
VIEW_LEASE_S = 5.0
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
            their names decide where blocks lie. Or, alone, the unix socket of the agent of this
            node, who then does all of it.
        node_id: Name of this node in load reports and logs.
        token: Credentials for daemons that ask for them.
        deadline_s: Of fetches and puts that do not say otherwise.
        connect_timeout_s: For connecting and for requests without payload.
        copies: Daemons that get each block; 2 survives the loss of one.
        relays: Endpoints of agents of other nodes that may relay for this one: the second path.
        policy: How fetches are spread over the paths: "balanced", "direct", "round_robin" or
            "shortest_queue", see `kvstore_client.selector.Policy`.
        transport: What moves payload. "auto": into memory that was allocated or registered here,
            the best that a peer offers, else through its socket. "tcp", "unix": sockets of that
            kind only. "shm", "rdma": that only; peers that do not offer it count as down. With
            "rdma" blocks whose memory was not allocated or registered, and with "shm" those whose
            memory was not allocated, are UNAVAILABLE, and `errors` say why. With "auto", when RDMA
            has lost something of two requests in a row, a link that comes up within a minute uses
            its socket until it comes up again: devices that see no way to each other find out no
            sooner.
        verify: Whether payload is compared with its checksums; without, wrong bytes are not
            noticed: for measurements only.
        seed: Makes backoff, ramp-in and the selector's draws repeatable.

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
        relays: Sequence[str] = (),
        policy: str = Policy.BALANCED,
        transport: str = AUTO,
        verify: bool = True,
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
                relays=tuple(check_relays(relays)),
                policy=check_policy(policy),
                transport=check_transport(transport),
                verify=verify,
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
        """Disconnect; what is under way ends as UNAVAILABLE. Harmless when called again.

        Waits up to 2 s for peers that may still touch memory of the caller. Handles of one that
        hangs for longer never become `quiet`: their memory is not to be used again.
        """
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

        It stays open: a daemon that has retired it meanwhile opens it again, empty, soon after
        a request has found that out. A daemon that refuses it (its pools are full) costs its
        own blocks: the `errors` of results say why.

        Raises:
            LocalProtocolError: The name of the pool or the layout is impossible.
            LayoutMismatch: The pool is pinned to another layout; names the field.
            PermissionDenied: A daemon says that we may not.
            RefusedError: All daemons say no for another reason.
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
        """Which blocks are stored? A daemon that does not answer, or says no, has none: the
        result names it.

        Args:
            namespaces: One, or one for each rank: a block counts only if all have it.
            lease_s: Hits of the leading run at each daemon stay that long, at most 60 s. A
                daemon may grant less, and none when it has no room: see `Lease.duration_s` and
                `LookupResult.leased`.
            deadline_s: When to do without an answer.
        """
        self._running()
        wanted = [namespaces] if isinstance(namespaces, Namespace) else list(namespaces)
        if not 1 <= len(wanted) <= NAMESPACES_PER_LOOKUP_MAX:
            raise LocalProtocolError(
                f"{len(wanted)} namespaces: must be 1 to {NAMESPACES_PER_LOOKUP_MAX}"
            )
        blocks = check_chain(keys, first, chain)
        lease_ms = check_lease(lease_s)
        timeout_s = check_deadline(deadline_s)
        return await self.cluster.lookup(wanted, blocks, lease_ms, timeout_s)

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
        decode_node: str = "",
        retain_for: tuple[str, int] | None = None,
        retain_s: float = RETAIN_S,
        peer: str = "",
        wait_s: float = 0.0,
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
            decode_node: Node id or endpoint of the relay that is best, since its engine needs
                the blocks too.
            retain_for: Name and attempt of the engine's request: the decode node keeps what it
                relays until its engine claims it, and the agent of this node what it loads
                until the decode node has pulled it.
            retain_s: How long they are kept at most.
            peer: Endpoint of another node's agent that holds the blocks, or is about to. The
                agent of this node takes from there what it does not hold, and what does not
                come, from storage. Without an agent all comes from there and nothing from
                storage.
            wait_s: How long the peer may wait for blocks that are not there yet.

        Raises:
            LocalProtocolError: An argument is wrong; names it and what was expected.
        """
        job = fetch_job(
            namespace,
            keys,
            into,
            first=first,
            chain=chain,
            layers=layers,
            order=order,
            group_layers=group_layers,
            deadline_s=self.deadline_s if deadline_s is None else deadline_s,
            now=self._running().time(),
            route=fetch_route(decode_node, retain_for, retain_s, peer, wait_s),
        )
        handle = job.handle = AsyncFetchHandle(job.deadline_s, job.cancel, len(job.layers))
        self.cluster.begin_fetch(job)
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
        level = check_ack(ack)
        job = put_job(
            namespace,
            keys,
            blocks,
            first=first,
            chain=chain,
            deadline_s=self.deadline_s if deadline_s is None else deadline_s,
            now=self._running().time(),
        )
        handle = job.handle = AsyncPutHandle(job.deadline_s, job.cancel)
        self.cluster.begin_put(job, level)
        return handle

    def offer(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        blocks: object,
        *,
        layers: range | None = None,
        first: int = 0,
        chain: bool = True,
        offer_s: float = RETAIN_S,
        retain_for: tuple[str, int] | None = None,
        deadline_s: float | None = None,
    ) -> AsyncPutHandle:
        """Lay blocks, or some layers of them, into the agent of this node, where peers pull
        them: nothing goes to storage. Returns at once.

        A prefill engine offers layer after layer while it computes the next one.

        Args:
            blocks: Memory of the offered layers, as in `fetch`. It must not change until the
                handle is `quiet`.
            layers: Consecutive layers; all by default.
            offer_s: How long they are kept.
            retain_for: Name and attempt of the engine's request, as of `fetch`: `claim` and
                `release` end the offer before its time, with what was retained of the fetch. So
                the memory is free when who decodes has it all.

        Raises:
            LocalProtocolError: An argument is wrong; names it and what was expected. Without an
                agent all outcomes are UNAVAILABLE, and `errors` say so.
        """
        job = put_job(
            namespace,
            keys,
            blocks,
            first=first,
            chain=chain,
            deadline_s=self.deadline_s if deadline_s is None else deadline_s,
            now=self._running().time(),
            offer=check_offer(namespace, layers, offer_s, retain_for),
        )
        handle = job.handle = AsyncPutHandle(job.deadline_s, job.cancel)
        self.cluster.begin_put(job, AckLevel.MEMORY)
        return handle

    async def claim(self, request: str, attempt: int = 0, *, lease_s: float = RETAIN_S) -> Claimed:
        """Take over what the agent of this node has retained for a request: a decode engine
        does that before it fetches the blocks. What is still on its way is claimed too.

        Repeated by the same client it is answered alike.

        Returns:
            The lease that keeps the blocks, for `release`; `lease.number` 0 if nothing is
            retained: never was, no more, or claimed by another client.

        Raises:
            LocalProtocolError: No such request can be.
            Unsupported: This client has no agent.
            TransportError: The agent does not answer.
        """
        self._running()
        name, number = check_request(request, attempt)
        reply = await self.cluster.claim(name, number, max(1, check_lease(lease_s)))
        lease = Lease(self.endpoints[0], reply.lease, lease_s if reply.lease else 0.0)
        return Claimed(lease=lease, block_count=reply.block_count, bytes=reply.bytes)

    def estimate_s(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        *,
        first: int = 0,
        chain: bool = True,
        layers: range | None = None,
        decode_node: str = "",
    ) -> float:
        """How long a fetch of these blocks would take if it began now, for the choice between
        loading and computing again. It knows links and queues, not the daemons' disks; infinite
        if nothing can be reached. Begins nothing."""
        self._running()
        route = fetch_route(decode_node, None, RETAIN_S, "", 0.0)
        span = check_layers(namespace, layers)
        return self.cluster.estimate_s(namespace, check_chain(keys, first, chain), span, route)

    async def view(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        *,
        first: int = 0,
        chain: bool = True,
        lease_s: float = VIEW_LEASE_S,
        deadline_s: float | None = None,
        verify: bool = True,
    ) -> Views:
        """Read blocks where they lie, in the memory of a daemon or agent on this host that was
        started for this pool alone (`--pool`): nothing is copied.

        Args:
            lease_s: How long the blocks stay if this process dies or hangs; the library renews
                the lease while it lives.
            deadline_s: When to do without an answer.
            verify: Whether the server compares them with their checksums first.

        Returns:
            The views; call their `release`, whose answer says whether what was read counts.
        """
        self._running()
        blocks = check_chain(keys, first, chain)
        timeout_s = check_deadline(self.deadline_s if deadline_s is None else deadline_s)
        lease_ms = max(1, check_lease(lease_s))
        return await self.cluster.view(namespace, blocks, lease_ms, timeout_s, verify)

    async def allocate(self, size_bytes: int) -> Region:
        """Memory for blocks that peers reach by themselves, by shared memory or RDMA: what is
        fetched into it, or put from it, passes through no socket where a peer offers that.

        It is touched, and handed to peers, before this returns: seconds for 10 GiB.

        Raises:
            LocalProtocolError: No size; or more regions than peers take.
            TransportError: The client was closed.
            OSError: The system has no memory left.
        """
        self._running()
        return await self.cluster.allocate(size_bytes)

    async def register(self, buffer: object) -> Region:
        """As `allocate`, with memory of the caller: for RDMA. Other processes cannot map it.

        Ownership: the memory stays alive, and where it is, until `free` has returned.

        Raises:
            LocalProtocolError: No contiguous writable buffer, or it overlaps another region.
            TransportError: The client was closed.
        """
        self._running()
        return await self.cluster.add_region(self.cluster.regions.register(buffer))

    async def free(self, region: Region) -> None:
        """Take a region back from all peers, and give back what `allocate` made when the last
        slice of it is gone.

        Raises:
            LocalProtocolError: A request that uses it is not quiet; or it was freed before.
        """
        self._running()
        await self.cluster.free_region(region)

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
        return await self.cluster.delete(namespace, check_chain(keys, first, chain))

    async def status(self) -> dict[str, Status | KVStoreError]:
        """What each daemon says of itself, or why it says nothing, by endpoint."""
        self._running()
        return await self.cluster.ask_all(FrameType.STATUS, Empty(), Status)

    # --- pools -----------------------------------------------------------------------------
    #
    # What each daemon answers, or why it does not, by endpoint. Nothing is undone where some
    # daemons did it and others did not: the call may be repeated.

    async def pools(self, pool: str = "") -> dict[str, list[PoolInfo] | KVStoreError]:
        """The pools of each daemon, or one of them, with their generations, by endpoint."""
        return await self._administer(check_pool_request(PoolAction.LIST, pool))

    async def pin_pool(
        self, pool: str, generation: bytes
    ) -> dict[str, list[PoolInfo] | KVStoreError]:
        """Refuse other layouts than that of one generation from now on; as `pools`.

        Args:
            generation: Its id, as `Namespace.generation` or `pools` tell it.

        Raises:
            LocalProtocolError: An argument that cannot be; daemons are not asked.
        """
        return await self._administer(check_pool_request(PoolAction.PIN, pool, generation))

    async def unpin_pool(self, pool: str) -> dict[str, list[PoolInfo] | KVStoreError]:
        """Take any layout again; as `pools`."""
        return await self._administer(check_pool_request(PoolAction.UNPIN, pool))

    async def retire_generation(
        self, pool: str, generation: bytes
    ) -> dict[str, list[PoolInfo] | KVStoreError]:
        """Drop a generation with all its blocks; arguments and answers as of `pin_pool`.

        Clients that still use it open it again, unless the pool is pinned to another one.
        """
        return await self._administer(check_pool_request(PoolAction.RETIRE, pool, generation))

    async def set_pool_capacity(
        self, pool: str, capacity_bytes: int
    ) -> dict[str, list[PoolInfo] | KVStoreError]:
        """Bound what a pool may hold at each daemon, 0 for no bound; as `pools`."""
        request = check_pool_request(PoolAction.SET_CAPACITY, pool, capacity_bytes=capacity_bytes)
        return await self._administer(request)

    async def _administer(self, request: Pool) -> dict[str, list[PoolInfo] | KVStoreError]:
        self._running()
        replies = await self.cluster.ask_all(FrameType.POOL, request, Pools)
        return {
            endpoint: list(reply.pools) if isinstance(reply, Pools) else reply
            for endpoint, reply in replies.items()
        }

    # --- what is known ---------------------------------------------------------------------

    def report(self, node_id: str) -> LoadReport | None:
        """The newest load report of a node."""
        return self.cluster.reports.report(node_id)

    def reports(self) -> dict[str, LoadReport | None]:
        """The newest load report of each daemon by endpoint; None before the first."""
        self._running()
        return self.cluster.newest_reports()

    def counters(self) -> dict[str, int]:
        """What has happened since the client was made, by name; what never did is missing.

        ::

            fetch_requests, fetch_blocks_hit, _miss, _corrupt, _timeout, _unavailable
            put_requests, put_blocks_stored, _exists, _conflict, _full, ...
            fetch_bytes_direct, _relay, _peer, _agent    payload that came, by path
            put_bytes_direct, _agent                     payload that went, by path
            fetch_bytes_by_tcp, _unix, _shm, _rdma       the same, by what really moved it;
            put_bytes_by_tcp, ...                        put too
            blocks_moved       sent again another way, since the first was slow or silent
            lookup_requests, lookup_keys, lookup_hits
            corrupt_blocks     came damaged; those too of which another daemon had a good copy
            reconnects         links that were lost and are up again
            breaker_openings   times that a daemon was left alone
            plans_within_16us, _32us, ... _1024us, plans_later
                               choices of paths, by how long they took
            reports_refused    load reports in which a peer spoke for another node, or under a
                               name that another peer has already
        """
        return dict(self.cluster.counters)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise LocalProtocolError("this client is not started")
        return self._loop
