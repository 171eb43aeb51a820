"""A client, a relay and storage, with a network between each two of them that can be broken.

::

    client ──── direct ────▶ daemon ◀──── storage ──── agent
      └────────────────── compute ──────────────────────▶┘

`in_process` runs real nodes inside of the test's process, and checks at the end that nobody
holds anything; `in_processes` runs `kvstored` and `kvagent`, which can be killed and stopped.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, NamedTuple, TypeVar

from kvstore.messages import Empty, PutOutcome, ServedBy, Status
from kvstore.wire import FrameType
from kvstore_client import AsyncClient, FetchResult, Namespace
from kvstore_client.jobs import ANY_ROUTE
from kvstore_client.link import PeerLink
from tests.support.agents import AgentNode, run_agents
from tests.support.cluster import (
    PATIENCE_S,
    Node,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    serve,
    store_blocks,
    until,
)
from tests.support.peers import FETCH, Proxy, proxied
from tests.support.processes import AgentProcess, Daemon, agent, daemon

#: Node id of the agent.
AGENT = "agent-0"
#: Of the blocks. A relay passes on what a frame has brought, and frames have up to 1 MiB: some
#: dozens of blocks are several of them.
LAYERS = (16_000, 48_000, 1536)
BLOCK_BYTES = sum(LAYERS)
MIB = 1024 * 1024
# What a node that nobody asks anything of holds none of.
_NONE_HELD = (
    "pinned_blocks",
    "retained_blocks",
    "leased_bytes",
    "fills_under_way",
    "leases_passed",
)

ValueT = TypeVar("ValueT")


class Networks(NamedTuple):
    """What lies between the nodes: see the picture of the module."""

    direct: Proxy
    storage: Proxy
    compute: Proxy


class Bed:
    """A client that knows both ways to some blocks.

    Attributes:
        direct, storage, compute: The networks.
        client, namespace: Who asks for the blocks, and where they are.
        keys: Of the blocks.
    """

    def __init__(
        self, networks: Networks, client: AsyncClient, namespace: Namespace, keys: Sequence[bytes]
    ) -> None:
        self.direct, self.storage, self.compute = networks
        self.client = client
        self.namespace = namespace
        self.keys = keys

    @property
    def daemon_link(self) -> PeerLink:
        """The client's link to the daemon."""
        return self.client.cluster._links[0]

    @property
    def agent_link(self) -> PeerLink:
        """The client's link to the agent."""
        return self.client.cluster.relays.links[0]

    @property
    def willing(self) -> bool:
        """Whether a fresh report of a relay that can be used has come."""
        now = asyncio.get_running_loop().time()
        return self.client.cluster.relays.spare(ANY_ROUTE, now) is not None

    async def connected(self) -> None:
        """Wait until both ways are up."""
        await until(lambda: self.daemon_link.up and self.agent_link.up)
        await until(lambda: not self.agent_link.refusal(self.namespace))

    async def relay_next(self) -> None:
        """Make the relay the next in turn, for the policy round_robin."""
        await until(lambda: self.willing)
        self.client.cluster.relays._selector._turn = 1

    def hold_in_mid_stream(self, network: Proxy, size_bytes: int) -> None:
        """Hold what comes by a network after so many bytes of the next fetch."""
        network.hold_at["down", FETCH] = network.passed["down", FETCH] + size_bytes

    async def fetched(self, **options: Any) -> FetchResult:
        """Fetch all blocks into fresh memory, and check every hit."""
        return await fetch_blocks(self.client, self.namespace, self.keys, **options)

    async def relays_again(self, always: bool = True) -> FetchResult:
        """Fetch until the relay brings something; breakers let a part of requests pass.

        Args:
            always: Whether the other way is there, so that nothing may be missing meanwhile.
        """
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            await self.relay_next()
            result = await self.fetched()
            assert result.ok or not always, (result.outcomes, result.errors)
            if result.ok and ServedBy.RELAY in result.served_by:
                return result
            assert asyncio.get_running_loop().time() < deadline, result.errors

    async def stored_again(self) -> None:
        """Put until all blocks are stored."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        blocks = contents(self.keys, BLOCK_BYTES)
        while True:
            handle = self.client.put(self.namespace, self.keys, blocks)
            result = await handle
            await handle.quiesced()
            if set(result.outcomes) <= {PutOutcome.STORED, PutOutcome.EXISTS}:
                return
            assert asyncio.get_running_loop().time() < deadline, result.errors

    async def settled(self) -> Status:
        """Wait until neither node holds or awaits anything; what the agent says then."""
        await _settled(self.daemon_link)
        return await _settled(self.agent_link)


async def _settled(link: PeerLink) -> Status:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    await until(lambda: link.up)
    while True:
        status = await link.call(FrameType.STATUS, Empty())
        assert isinstance(status, Status)
        report = status.report
        held = {name: status.counters.get(name, 0) for name in _NONE_HELD}
        held["relay_queued_bytes"] = report.relay_queued_bytes
        held["links"] = sum(one.queued_bytes for one in report.links)
        held["requests"] = sum(one.inflight_requests for one in report.requesters)
        if not any(held.values()):
            return status
        assert asyncio.get_running_loop().time() < deadline, f"{link.peer} holds {held}"


@asynccontextmanager
async def _asked(
    networks: Networks, keys: Sequence[bytes], reports: bool, policy: str, **options: Any
) -> AsyncIterator[Bed]:
    values = {"relays": [networks.compute.uri], "policy": policy, "deadline_s": 60.0, **options}
    async with connected(networks.direct.uri, **values) as client:
        bed = Bed(networks, client, await open_pool(client, *LAYERS), keys)
        await store_blocks(client, bed.namespace, keys)
        await bed.connected()
        if reports:
            await until(lambda: bed.willing)
        yield bed


@asynccontextmanager
async def in_process(
    keys: Sequence[bytes], policy: str = "round_robin", reports: bool = True, **options: Any
) -> AsyncIterator[tuple[Bed, Node, AgentNode]]:
    """A daemon that has some blocks and an agent in front of it, in the test's process.

    Args:
        reports: Whether to wait for the first load report of the agent.
        options: Of the client, as in `AsyncClient`.
    """
    async with (
        serve(1, arena_bytes=16 * MIB) as (node,),
        proxied(node.uri) as direct,
        proxied(node.uri) as storage,
        run_agents([storage], memory_bytes=16 * MIB) as (relay,),  # type: ignore[list-item]
        proxied(relay.uri) as compute,
    ):
        networks = Networks(direct, storage, compute)
        async with _asked(networks, keys, reports, policy, **options) as bed:
            yield bed, node, relay


@asynccontextmanager
async def in_processes(
    keys: Sequence[bytes], policy: str = "round_robin", **options: Any
) -> AsyncIterator[tuple[Bed, Daemon, AgentProcess]]:
    """The same with `kvstored` and `kvagent` as processes of their own."""
    async with (
        beside(daemon()) as kvstored,
        proxied(kvstored.uri) as direct,
        proxied(kvstored.uri) as storage,
        beside(agent("--storage", storage.uri, "--node-id", AGENT)) as kvagent,
        proxied(kvagent.uri) as compute,
    ):
        networks = Networks(direct, storage, compute)
        async with _asked(networks, keys, True, policy, **options) as bed:
            yield bed, kvstored, kvagent


@asynccontextmanager
async def beside(process: AbstractContextManager[ValueT]) -> AsyncIterator[ValueT]:
    """What a process does that waits for it, on a thread: proxies of the test go on."""
    value = await asyncio.to_thread(process.__enter__)
    try:
        yield value
    except BaseException:
        if not await asyncio.to_thread(process.__exit__, *sys.exc_info()):
            raise
    else:
        await asyncio.to_thread(process.__exit__, None, None, None)
