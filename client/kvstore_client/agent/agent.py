"""An agent: the server of a GPU node, in the engine's process or in one of its own."""

from __future__ import annotations

import logging
from types import TracebackType

from kvstore.buffers import Region
from kvstore.endpoint import Endpoint
from kvstore.messages import Role
from kvstore.serving import Server, ServerOptions
from kvstore.transport import Marking
from kvstore_client.agent.options import AgentOptions, check_options
from kvstore_client.agent.rooms import WatchedPool
from kvstore_client.agent.source import AgentSource
from kvstore_client.cluster import Cluster, ClusterOptions
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
            without it the agent makes some itself, as large as the options say.

    Attributes:
        source: What is served.
        server: Who serves it.
        cluster: Ways to storage and to other nodes' agents.

    Raises:
        ConfigError: Names the option that cannot be.
    """

    def __init__(self, options: AgentOptions, memory: memoryview | None = None) -> None:
        endpoints = check_options(options)
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
            ),
        )
        self._region: Region | None = None
        if memory is None:
            self._region = Region(options.memory_bytes, "kvagent-pool")
            memory = self._region.view
        pool = WatchedPool(memory)
        self.source = AgentSource(self.cluster, pool, options.pool_readers, options.verify_relayed)
        self.server = Server(
            self.source,
            endpoints.served,
            ServerOptions(
                node_id=options.node_id,
                role=Role.AGENT,
                drain_s=options.drain_s,
                insecure=options.insecure,
            ),
            Marking(options.priority, options.dscp),
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
            TransportError: An address is taken or not ours; nothing stays bound.
        """
        try:
            if self._region is not None:
                self._region.touch()
            await self.cluster.start()
            self.source.start()
            await self.server.start()
        except BaseException:
            await self.cluster.close()
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
