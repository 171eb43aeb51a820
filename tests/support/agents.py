"""Real agents on loopback inside of the test's process, and what must be true after a test.

::

    async with serve(2) as nodes, run_agents(nodes, 1) as (agent,):
        async with connected(nodes, relays=[agent.uri]) as client:
            ...

When `run_agents` ends, every agent must be as if nobody had ever been there: no session, no
pin, no lease, no fill, nobody who waits; the books of its pool in order. (`serve` looks at the
daemons, and at tasks.)
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from kvstore.messages import Role
from kvstore_client import Namespace
from kvstore_client.agent.agent import Agent
from kvstore_client.agent.memory import HeldBlock
from kvstore_client.agent.options import AgentOptions
from tests.support.cluster import until

MIB = 1024 * 1024


class Served(Protocol):
    """What an agent takes for a daemon."""

    @property
    def uri(self) -> str:
        """Where it listens."""


class AgentNode:
    """One agent, as a test sees it.

    Attributes:
        agent: The agent itself.
        name: Its node id.
    """

    def __init__(self, options: AgentOptions) -> None:
        self.name = options.node_id
        self.agent = Agent(options, memoryview(bytearray(options.memory_bytes)))
        self.running = False

    @property
    def uri(self) -> str:
        """Where other nodes find it."""
        return str(self.agent.endpoints[0])

    @property
    def local(self) -> str:
        """Where engines of its node find it."""
        return str(self.agent.endpoints[-1])

    async def start(self) -> None:
        """Begin to serve."""
        await self.agent.start()
        self.running = True

    async def kill(self) -> None:
        """Vanish: every connection breaks at once."""
        self.running = False
        await self.agent.stop(0)
        self.check_released()

    async def left_alone(self) -> None:
        """Wait until nobody is connected, and what was cancelled is gone."""
        source = self.agent.source
        await until(lambda: not self._clients(), f"clients of {self.name} are gone")
        await until(lambda: not source.fills.under_way, f"fills of {self.name} have ended")
        await until(lambda: not source.task_count, f"tasks of {self.name} have ended")

    def _clients(self) -> list[str]:
        """Who is connected; other agents, who pull from this one, stay."""
        peers = [connection.protocol.peer for connection in self.agent.server.connections]
        return [
            peer.node_id if peer is not None else "?"
            for peer in peers
            if peer is None or peer.role is not Role.AGENT
        ]

    def end_leases(self) -> None:
        """As if their time were over."""
        self.agent.source.retentions.expire(math.inf)

    def check_released(self) -> None:
        """Nobody holds anything here."""
        source = self.agent.source
        assert not self._clients()
        assert not self.agent.busy_count
        source.pool.check()
        source.retentions.check()
        assert source.pool.pinned_count == 0, f"{self.name}: pins stay"
        assert source.pool.leased_bytes == 0, f"{self.name}: leases stay"
        assert source.pool.waiting_count == 0, f"{self.name}: somebody waits"
        assert source.counters()["leases_passed"] == 0
        assert not source.fills.under_way
        assert not source.task_count

    def counter(self, name: str) -> int:
        """A counter of the agent or its server."""
        counters = self.agent.server.status().counters
        return counters.get(name, 0)

    def block(self, namespace: Namespace, name: bytes) -> HeldBlock | None:
        """A block of its pool."""
        return self.agent.source.pool.find(namespace.id, name)


@asynccontextmanager
async def run_agents(
    nodes: Sequence[Served],
    count: int = 1,
    local: Path | None = None,
    memory_bytes: int = 4 * MIB,
    name: str = "agent",
    listen: Sequence[str] = ("tcp://127.0.0.1:0",),
    **options: object,
) -> AsyncIterator[list[AgentNode]]:
    """Run agents in front of some daemons; check at the end that nobody holds anything.

    Args:
        local: Directory for their unix sockets; None for none.
        name: What their names begin with.
        listen: Where each of them listens.
        options: Of each agent, as in `AgentOptions`.
    """
    agents = [
        AgentNode(
            AgentOptions(
                storage=tuple(node.uri for node in nodes),
                node_id=f"{name}-{number}",
                listen=tuple(listen),
                local=f"unix://{local}/{name}-{number}" if local is not None else "",
                memory_bytes=memory_bytes,
                **options,  # type: ignore[arg-type]
            )
        )
        for number in range(count)
    ]
    for agent in agents:
        await agent.start()
    try:
        yield agents
        for agent in agents:
            if agent.running:
                await agent.left_alone()
                agent.check_released()
    finally:
        for agent in agents:
            if agent.running:
                await agent.kill()
