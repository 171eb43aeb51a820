"""Daemons, agents and clients whose payload goes by RDMA.

The verbs are those that a test's fixture has put in place of the system's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kvstore.messages import PutOutcome
from kvstore.transport.rdma_end import RdmaEnd
from kvstore_client import AsyncClient, FetchResult, Namespace, Region
from kvstore_client.linkmemory import RdmaMemory
from tests.support.agents import AgentNode, run_agents
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    MIB,
    Node,
    connected,
    contents,
    open_pool,
    serve,
    until,
)
from tests.support.links import link_of, reconnected
from tests.support.rdmaprocesses import LISTEN

# Of a daemon whose blocks trickle: 16 MiB take a quarter of a second.
CHUNKS_AT_ONCE = 4
TRICKLE_S = 0.004


@asynccontextmanager
async def served(
    layers: Sequence[int] = LAYERS,
    listen: str = LISTEN,
    arena_bytes: int = 4 * MIB,
    **options: object,
) -> AsyncIterator[tuple[Node, AsyncClient, Namespace]]:
    """A daemon and a client of it, in the test's process.

    Args:
        options: Of the client.
    """
    values = {"transport": "rdma", "deadline_s": 60, **options}
    async with (
        serve(listen=listen, arena_bytes=arena_bytes) as (node,),
        connected([node], **values) as made,
    ):
        yield node, made, await open_pool(made, *layers)


@asynccontextmanager
async def relayed(*layers: int) -> AsyncIterator[tuple[Node, AgentNode, AsyncClient, Namespace]]:
    """A daemon, a relay before it, and a client of both, in the test's process."""
    async with (
        serve(listen=LISTEN, arena_bytes=4 * MIB) as (node,),
        run_agents([node], listen=(LISTEN,), transport="rdma", policy="direct") as (agent,),
        client_of_both(node.uri, agent.uri, *layers) as (client, namespace),
    ):
        yield node, agent, client, namespace


@asynccontextmanager
async def client_of_both(
    daemon: str, relay: str, *layers: int
) -> AsyncIterator[tuple[AsyncClient, Namespace]]:
    """A client of a daemon and of a relay before it, when requests can be sent to both."""
    async with connected(
        daemon, relays=[relay], policy="round_robin", transport="rdma", deadline_s=60
    ) as client:
        namespace = await open_pool(client, *layers)
        (to_relay,) = client.cluster.relays.links
        await until(lambda: to_relay.up and not to_relay.refusal(namespace), "the relay")
        yield client, namespace


async def put_blocks(
    client: AsyncClient, namespace: Namespace, keys: Sequence[bytes]
) -> list[PutOutcome]:
    """Put the blocks that belong to keys, out of memory that peers reach."""
    size = namespace.geometry.block_bytes
    region = await client.allocate(len(keys) * size)
    region.view[:] = b"".join(contents(keys, size))
    handle = client.put(namespace, keys, region.view)
    result = await handle
    await handle.quiesced()
    assert result.ok, (result.outcomes, result.errors)
    assert {run.transport for run in result.runs} == {"rdma"}
    await client.free(region)
    return result.outcomes


async def fetch_into(
    client: AsyncClient,
    namespace: Namespace,
    keys: Sequence[bytes],
    region: Region,
    **options: object,
) -> FetchResult:
    """Fetch whole blocks to the beginning of a region, and check every hit."""
    size = namespace.geometry.block_bytes
    into = region.view[: len(keys) * size]
    handle = client.fetch(namespace, keys, into, **options)  # type: ignore[arg-type]
    result = await handle
    await handle.quiesced()
    for number, block in enumerate(contents(keys, size)):
        if result.outcomes[number] == 0:
            assert region.view[number * size : (number + 1) * size] == block, "wrong bytes"
    return result


def ways(result: FetchResult) -> set[tuple[str, str]]:
    """By which path, and how, the bytes of a fetch came."""
    return {(run.path, run.transport) for run in result.runs if run.bytes}


def passive_end(client: AsyncClient) -> RdmaEnd:
    """The client's side of the queue pairs to its daemon."""
    memory = link_of(client).memory
    assert isinstance(memory, RdmaMemory)
    return memory._end


def active_end(node: Node) -> RdmaEnd:
    """The daemon's side of the queue pairs to its only client."""
    (session,) = node.server.sessions.values()
    assert session.memory.end is not None
    return session.memory.end


async def at_work(client: AsyncClient) -> None:
    """Return when a queue pair works after some have failed: of two rails the one on which
    nothing was under way goes on, and without any the session is a new one."""
    if not (link_of(client).memory and passive_end(client).queues):
        await reconnected(client)


def trickle(node: Node) -> asyncio.Task[None]:
    """Let a daemon give out a little on each rail now and then, so that there is always something
    to come."""
    gate = node.gate
    gate.chunk_bytes, gate.chunks_left = 64 * 1024, 0

    async def flow() -> None:
        while True:
            gate.chunks_left = CHUNKS_AT_ONCE
            waiting, gate._waiting = gate._waiting, []
            for stream in waiting:
                stream.on_ready()
            await asyncio.sleep(TRICKLE_S)

    return asyncio.get_running_loop().create_task(flow())


async def stop(flow: asyncio.Task[None], node: Node) -> None:
    """End `trickle`: everything may go."""
    flow.cancel()
    await asyncio.wait([flow])
    node.gate.chunk_bytes = MIB
    node.gate.open()


__all__ = [
    "BLOCK_BYTES",
    "LISTEN",
    "active_end",
    "at_work",
    "client_of_both",
    "fetch_into",
    "passive_end",
    "put_blocks",
    "relayed",
    "served",
    "stop",
    "trickle",
    "ways",
]
