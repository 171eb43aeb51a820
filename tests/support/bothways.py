"""A client of both paths with a real agent behind one of them; what is sent which way, how far
it comes, and what is left of it.

::

    async with both_ways(keys, tmp_path) as scene:
        await relay_next(scene.client)
        ...
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvstore.messages import Empty
from kvstore.wire import FrameType
from kvstore_client import AsyncClient, Namespace
from kvstore_client.agent.agent import Agent
from kvstore_client.jobs import ANY_ROUTE
from kvstore_client.selector import Plan, PlannedRun
from tests.support.agents import AgentNode, run_agents
from tests.support.cluster import (
    BLOCK_BYTES,
    MIB,
    Node,
    connected,
    open_pool,
    serve,
    store_blocks,
    until,
)
from tests.support.peers import Proxy, proxied
from tests.support.rawpeer import RawPeer

#: What memory that was given back is filled with.
PATTERN = 0xA5
# A test that asks so often for what should come after a few times has failed.
ASKS_MAX = 2000


class Scene(NamedTuple):
    """Who is there.

    Attributes:
        client: Of the prefill node; takes whole requests by turns.
        node: The only daemon.
        agent: Of the decode node.
        storage: Between the agent and the daemon.
        compute: Between the client and the agent.
        direct: Between the client and the daemon.
    """

    client: AsyncClient
    namespace: Namespace
    node: Node
    agent: AgentNode
    storage: Proxy
    compute: Proxy
    direct: Proxy


@contextlib.asynccontextmanager
async def both_ways(
    keys: Sequence[bytes],
    local: Path | None = None,
    arena_bytes: int = 4 * MIB,
    memory_bytes: int = 4 * MIB,
    layers: Sequence[int] = (),
    **options: Any,
) -> AsyncIterator[Scene]:
    """Run a daemon that has these blocks, an agent, and a client that knows both ways.

    Args:
        local: Directory for the agent's own unix socket.
        memory_bytes: The agent's pool.
        layers: As of `open_pool`.
        options: Of the agent.
    """
    async with (
        serve(1, arena_bytes) as (node,),
        proxied(node.uri) as storage,
        proxied(node.uri) as direct,
        run_agents([storage], 1, local, memory_bytes, **options) as (agent,),
        proxied(agent.uri) as compute,
        connected(
            [direct.uri], relays=[compute.uri], policy="round_robin", deadline_s=60.0
        ) as client,
    ):
        namespace = await open_pool(client, *layers)
        await store_blocks(client, namespace, keys)
        await relay_next(client)
        yield Scene(client, namespace, node, agent, storage, compute, direct)
        agent.end_leases()


async def relay_next(chooser: AsyncClient | Agent, by_relay: bool = True) -> None:
    """Make the relay the next in turn, as soon as one is known to be willing."""
    cluster, loop = chooser.cluster, asyncio.get_running_loop()
    await until(lambda: cluster.relays.spare(ANY_ROUTE, loop.time()) is not None, "a willing relay")
    cluster.relays._selector._turn = 1 if by_relay else 0


def split(monkeypatch: pytest.MonkeyPatch, chooser: AsyncClient | Agent, direct_count: int) -> None:
    """Send the first blocks of each request direct, and the others by the relay."""
    relays = chooser.cluster.relays
    plan = relays.plan

    def forced(spans: Any, *rest: Any) -> Plan:
        (span,) = spans
        (name,) = relays.inflight.relays
        runs = [
            PlannedRun(span.first, direct_count, span.daemon),
            PlannedRun(direct_count, span.last, span.daemon, name),
        ]
        return plan(spans, *rest)._replace(runs=runs)

    monkeypatch.setattr(relays, "plan", forced)


def stain(into: Sequence[bytearray]) -> None:
    """Use memory that is ours again for something else."""
    for block in into:
        block[:] = bytes([PATTERN]) * len(block)


def stained(into: Sequence[bytearray]) -> bool:
    """Whether nobody has written there since."""
    return all(block.count(PATTERN) == len(block) for block in into)


def hold(node: Node, chunks: int) -> None:
    """Let a daemon give out so many blocks, one at a time, and no more."""
    node.gate.chunk_bytes, node.gate.chunks_left = BLOCK_BYTES, chunks


async def held(node: Node) -> None:
    """Return when a daemon has given out all that it may."""
    await until(lambda: node.gate.chunks_left == 0, "the gate is shut")


async def counters_of(uri: str) -> dict[str, int]:
    """Counters of a node, which may be a process of its own."""

    def ask() -> dict[str, int]:
        with RawPeer(uri) as peer:
            return dict(peer.call(FrameType.STATUS, Empty()).counters)

    return await asyncio.to_thread(ask)


async def settled(uri: str, **wanted: int) -> dict[str, int]:
    """The counters of a node as soon as some of them have these values."""
    for _ in range(ASKS_MAX):
        counters = await counters_of(uri)
        if all(counters.get(name, 0) == value for name, value in wanted.items()):
            return counters
    raise AssertionError(f"waited in vain for {wanted}: {counters}")


async def idle(agent: AgentNode) -> None:
    """Return when an agent has nothing under way."""
    names = ("pinned_blocks", "fills_under_way")
    await until(lambda: not any(map(agent.counter, names)), f"{agent.name} is idle")
    assert agent.agent.source.pool.waiting_count == 0
    assert not agent.agent.busy_count
