"""An agent: the server of a GPU node, in the engine's process or in one of its own."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType

from kvstore.buffers import Region
from kvstore.endpoint import Endpoint
from kvstore.messages import Role
from kvstore.service.users import parse_users
from kvstore.serving import Server, ServerOptions
from kvstore.transport import Marking
from kvstore.transport.rdma_nodes import endpoint_options
from kvstore_client.agent.egress import EgressBudget
from kvstore_client.agent.interface import InterfaceCounter, interface_of
from kvstore_client.agent.options import AgentOptions, check_options
from kvstore_client.agent.pacing import Pacer
from kvstore_client.agent.rooms import WatchedPool
from kvstore_client.agent.source import AgentSource
from kvstore_client.cluster import Cluster
from kvstore_client.clusteroptions import ClusterOptions
from kvstore_client.selector import Policy

logger = logging.getLogger(__name__)


class Agent:
    """Relays for other nodes, and loads for the engines of its own by all paths.

    Thread rule: all of it belongs to the loop on which it was started.

    ::

        options = AgentOptions(storage=("tcp://10.1.0.5:7450",), node_id="decode-1", ...)
        async with Agent(options) as agent:
            ...

    Args:
        memory: For blocks: writable, and touched before. Borrowed until `stop` has returned;
            without it the agent makes some itself, as large as the options say. Only a region
            can be mapped by engines, or handed to a daemon on this host.

    Attributes:
        source: What is served.
        server: Who serves it.
        cluster: Ways to storage and to other nodes' agents.

    Raises:
        ConfigError: Names the option that cannot be.
    """

    def __init__(self, options: AgentOptions, memory: Region | memoryview | None = None) -> None:
        endpoints = check_options(options)
        for option in ("storage", "listen", "relays"):
            for endpoint in getattr(endpoints, option):
                endpoint_options(endpoint, option)
        self.options = options
        self.cluster = Cluster(
            [str(endpoint) for endpoint in endpoints.storage],
            ClusterOptions(
                node_id=options.node_id,
                token=options.token,
                copies=options.copies,
                connect_timeout_s=options.connect_timeout_s,
                relays=tuple(str(endpoint) for endpoint in endpoints.relays),
                policy=Policy(options.policy),
                role=Role.AGENT,
                transport=options.transport,
            ),
        )
        self._counter: InterfaceCounter | None = None
        self._region: Region | None = None
        if memory is None:
            memory = self._region = Region(options.memory_bytes, "kvagent-pool")
        self._memory = memory
        pool = WatchedPool(memory.view if isinstance(memory, Region) else memory)
        self._pool = pool
        self._dropping = False  # in the next turn of the loop
        if options.drop_idle:
            pool.on_idle = self._drop_soon
        self.source = AgentSource(self.cluster, pool, options.pool_readers, options.verify_relayed)
        self.server = Server(
            self.source,
            endpoints.served,
            ServerOptions(
                node_id=options.node_id,
                role=Role.AGENT,
                pool=options.pool,
                memory_uids=parse_users(options.memory_users, "memory_users"),
                drain_s=options.drain_s,
                insecure=options.insecure,
            ),
            Marking(options.priority, options.dscp),
            memory=memory,
        )

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where it really listens, once started; the one for its own engines last."""
        return self.server.endpoints

    @property
    def busy_count(self) -> int:
        """Requests that are under way."""
        return sum(connection.protocol.request_count for connection in self.server.connections)

    async def start(self) -> None:
        """Connect to storage, as far as it answers, and begin to serve.

        Raises:
            ConfigError: No interface has the address of `listen`, or the name that was given.
            TransportError: An address is taken or not ours; nothing stays bound.
        """
        try:
            if self._region is not None:
                # Seconds for a large one, in which an engine's loop has other things to do.
                await asyncio.to_thread(self._region.touch)
            # So that daemons, and other nodes' agents, write into it by themselves. Memory that
            # engines map is sealed: no other process can map it for writing any more.
            if isinstance(self._memory, Region) and not self.options.pool:
                self.cluster.regions.adopt(self._memory)
            else:
                view = self._memory.view if isinstance(self._memory, Region) else self._memory
                self.cluster.regions.register(view)
            await self.cluster.start()
            self.source.start(self._pacer())
            await self.server.start()
        except BaseException:
            self._close_counter()
            try:
                await self.cluster.close()
            finally:
                self._close_region()
            raise
        if not self.cluster.reachable:
            logger.warning("no daemon answers yet: %s", ", ".join(self.cluster.endpoints))

    async def stop(self, drain_s: float | None = None) -> None:
        """Take no more requests, wait for those under way, and let go of everything.

        Args:
            drain_s: Bound of the wait; default as in the options, 0 stops at once.
        """
        await self.server.stop(drain_s)
        await self.source.stop()
        await self.cluster.close()
        self._close_counter()
        self._close_region()

    def _pacer(self) -> Pacer | None:
        """What bounds what is sent to other nodes, as the options say."""
        options, listen = self.options, self.server.endpoints
        if not (options.link_rate_Bps or options.relay_rate_Bps) or not options.listen:
            return None
        loop = asyncio.get_running_loop()
        budget = EgressBudget(options.link_rate_Bps, options.relay_rate_Bps)
        if not options.link_rate_Bps:
            return Pacer(loop, budget)
        name = options.interface or interface_of(listen[0].host)
        self._counter = InterfaceCounter(name)
        return Pacer(loop, budget, self._counter.tx_bytes, self._unsent_bytes)

    def _unsent_bytes(self) -> int:
        """What the sockets to other nodes have taken and not sent."""
        return sum(
            connection.connection.stream.unsent_bytes()
            for connection in self.server.connections
            if connection.session is not None and not connection.session.local
        )

    def _close_counter(self) -> None:
        if self._counter is not None:
            self._counter.close()
            self._counter = None

    def _drop_soon(self) -> None:
        # Not at once: whoever has made a block idle may be about to lease it.
        if not self._dropping:
            self._dropping = True
            asyncio.get_running_loop().call_soon(self._drop_idle)

    def _drop_idle(self) -> None:
        self._dropping = False
        self._pool.evict_idle()

    def _close_region(self) -> None:
        if self._region is not None:
            self._region.close()

    async def __aenter__(self) -> Agent:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop(0.0 if kind is not None else None)


__all__ = ["Agent"]
