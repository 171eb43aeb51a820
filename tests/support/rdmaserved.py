"""Daemons, agents and clients whose payload goes by RDMA, and what tests do to their devices.

The verbs are those that a test's fixture has put in place of the system's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest

from kvstore.messages import PutOutcome
from kvstore.transport.rdma_end import RdmaEnd
from kvstore.transport.verbs import Verbs
from kvstore_client import AsyncClient, FetchResult, Namespace, Region
from kvstore_client.breaker import CircuitBreaker
from kvstore_client.link import PeerLink
from kvstore_client.linkmemory import RdmaMemory
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
from tests.support.fakeverbs import FakeVerbs
from tests.support.rdmaprocesses import LISTEN
from tests.support.verbsends import PATIENCE_S

STAIN = 0xA5
# A packet has 64 KiB: 16 MiB take a tenth of a second.
PACKET_DELAY_US_MAX = 1000
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


def stain(region: Region) -> None:
    """Use memory that is ours again for something else."""
    region.view[:] = bytes([STAIN]) * region.size_bytes


def stained(region: Region) -> bool:
    """Whether nobody has written there since."""
    return bytes(region.view) == bytes([STAIN]) * region.size_bytes


def link_of(client: AsyncClient) -> PeerLink:
    """The link to the only daemon."""
    (link,) = client.cluster._links
    return link


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


async def reconnected(client: AsyncClient, count: int = 1) -> None:
    """Return when links have come up again so often."""
    await until(lambda: client.cluster.counters["reconnects"] >= count, "a new session")


async def at_work(client: AsyncClient) -> None:
    """Return when a queue pair works after some have failed: of two rails the one on which
    nothing was under way goes on, and without any the session is a new one."""
    if not (link_of(client).memory and passive_end(client).queues):
        await reconnected(client)


async def up_again(client: AsyncClient, namespace: Namespace) -> None:
    """Return when requests can be sent again."""
    link = link_of(client)
    await until(lambda: link.up and link.refusal(namespace) is None, "the link is up")
    # What breakers say of it is another matter, and other tests'.
    link.breaker = CircuitBreaker()


def in_guest() -> bool:
    """Whether devices may be taken down: it is the virtual machine of `make test-rdma`."""
    return bool(os.environ.get("RDMA_VM"))


@contextlib.contextmanager
def port_down(verbs: Verbs, device: str) -> Iterator[None]:
    """The port of a device is down for as long as the block lasts."""
    if isinstance(verbs, FakeVerbs):
        verbs.take_down(device)
        yield
        verbs.bring_up(device)
        return
    if not in_guest():
        pytest.skip("would take down a port of this machine")
    netdev = _netdev(verbs, device)
    subprocess.run(["ip", "link", "set", netdev, "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", netdev, "up"], check=True)


@contextlib.contextmanager
def removed(verbs: Verbs, device: str) -> Iterator[None]:
    """A device is gone when the block is entered, and there again when it was left; what uses
    it is closed within the block."""
    if isinstance(verbs, FakeVerbs):
        verbs.remove(device)
        yield
        verbs.bring_up(device)
        return
    if not in_guest():
        pytest.skip("would remove a device of this machine")
    netdev = _netdev(verbs, device)
    # It waits until nobody uses the device any more.
    removal = subprocess.Popen(["rdma", "link", "delete", device])
    while any(one.name == device for one in verbs.devices()):
        assert not removal.poll(), "it was refused"
    try:
        yield
    finally:
        assert removal.wait(PATIENCE_S) == 0
        subprocess.run(["rdma", "link", "add", device, "type", "rxe", "netdev", netdev], check=True)


def slow_down(verbs: Verbs, slow: bool = True) -> None:
    """Let transfers take a while, so that there is a middle of them. Real ones do anyway, where
    the processor is imitated."""
    if isinstance(verbs, FakeVerbs):
        verbs.jitter(1, PACKET_DELAY_US_MAX if slow else 0)


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


def queue_pair_count(verbs: Verbs) -> int:
    """Queue pairs that there are on this machine; 0 where nobody counts them."""
    if isinstance(verbs, FakeVerbs):
        return 0
    told = subprocess.run(["rdma", "-j", "resource", "show", "qp"], check=True, capture_output=True)
    return sum(1 for one in json.loads(told.stdout or b"[]") if one.get("type") == "RC")


def _netdev(verbs: Verbs, device: str) -> str:
    (port,) = (one.ports[0] for one in verbs.devices() if one.name == device)
    return port.netdev


__all__ = [
    "BLOCK_BYTES",
    "LISTEN",
    "STAIN",
    "active_end",
    "fetch_into",
    "in_guest",
    "link_of",
    "passive_end",
    "port_down",
    "put_blocks",
    "queue_pair_count",
    "reconnected",
    "removed",
    "served",
    "slow_down",
    "stain",
    "stained",
    "stop",
    "trickle",
    "up_again",
    "ways",
]
