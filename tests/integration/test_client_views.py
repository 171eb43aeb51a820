"""Leased views: blocks that a client of the same host reads where they lie."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvstore import views as views_module
from kvstore.buffers import Region
from kvstore.checksum import layer_checksums
from kvstore.endpoint import parse_endpoint
from kvstore.errors import KVStoreError, PermissionDenied, Unsupported
from kvstore.messages import FetchOutcome
from kvstore.serving import Server, ServerOptions
from kvstore.views import LEASE_FIRST
from kvstore_client import AgentOptions, AsyncClient, Namespace, Views
from kvstore_client.agent.agent import Agent
from kvstore_daemon.source import ArenaSource
from tests.support.cluster import BLOCK_BYTES, LAYERS, MIB, until
from tests.support.engine import content, key, layout

POOL = "pool"
KEYS = [key(number) for number in range(8)]
HIT, MISS, CORRUPT = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.CORRUPT


class Host:
    """A daemon that serves one pool, on a unix socket in the abstract namespace and on TCP."""

    def __init__(self, arena_bytes: int, pool: str, **options: Any) -> None:
        self.arena = Region(arena_bytes)
        self.source = ArenaSource(self.arena.view)
        endpoints = [
            parse_endpoint(f"unix://@views-{id(self)}"),
            parse_endpoint("tcp://127.0.0.1:0"),
        ]
        node = ServerOptions(node_id="host", pool=pool, **options)
        self.server = Server(self.source, endpoints, node, memory=self.arena)

    @property
    def uris(self) -> list[str]:
        return [str(endpoint) for endpoint in self.server.endpoints]

    @property
    def pins(self) -> int:
        return sum(self.source.store.index.pins[1:])

    def slot_view(self, namespace: Namespace, wanted: bytes) -> memoryview:
        opened = self.source.store.pools.namespace(namespace.id)
        return self.source.store.view(opened.slots.find(wanted))


@asynccontextmanager
async def host(arena_bytes: int = MIB, pool: str = POOL, **options: Any) -> AsyncIterator[Host]:
    """A daemon; when it ends nothing may be pinned any more."""
    one = Host(arena_bytes, pool, **options)
    await one.server.start()
    try:
        yield one
        await until(lambda: not one.server.sessions, "clients are gone")
        assert one.pins == 0
        assert one.server.views is None or one.server.views.viewed_bytes == 0
    finally:
        await one.server.stop(0)


async def store(client: AsyncClient, keys: Sequence[bytes] = KEYS) -> Namespace:
    """Open the pool and put blocks there."""
    namespace = await client.open_namespace(POOL, layout(*LAYERS))
    blocks = [content(wanted, BLOCK_BYTES) for wanted in keys]
    assert (await client.put(namespace, keys, blocks)).ok
    return namespace


def read(views: Views) -> list[bytes | None]:
    """Copies of what can be seen."""
    return [None if block is None else bytes(block) for block in views.blocks]


@pytest.mark.asyncio
async def test_blocks_are_seen_where_they_lie() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:4])
        views = await client.view(namespace, KEYS[:5])
        assert views.outcomes == [HIT] * 4 + [MISS]
        assert read(views) == [*(content(wanted, BLOCK_BYTES) for wanted in KEYS[:4]), None]
        assert views.errors == []
        # It is the daemon's own memory, not a copy, and cannot be written.
        assert views.blocks[0] is not None
        assert views.blocks[0].readonly
        one.slot_view(namespace, KEYS[0])[0] ^= 1
        assert bytes(views.blocks[0]) != content(KEYS[0], BLOCK_BYTES)
        one.slot_view(namespace, KEYS[0])[0] ^= 1
        assert one.pins == 4
        assert views.held
        assert await views.release() is True
        assert one.pins == 0
        assert views.blocks == [None] * 5
        assert not views.held
        assert await views.release() is False


@pytest.mark.asyncio
async def test_a_damaged_block_is_no_view_and_is_dropped() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:3])
        one.slot_view(namespace, KEYS[1])[5] ^= 1
        views = await client.view(namespace, KEYS[:3])
        assert views.outcomes == [HIT, CORRUPT, HIT]
        assert views.blocks[1] is None
        await views.release()
        await until(lambda: one.source.store.counters["blocks_corrupt"] == 1)
        seen = await client.view(namespace, KEYS[:3], verify=False)
        assert seen.outcomes == [HIT, MISS, HIT]
        assert seen.verify_us == 0
        assert await seen.release()


@pytest.mark.asyncio
async def test_what_is_seen_is_not_evicted() -> None:
    room = 8 * BLOCK_BYTES  # one page each
    async with host(room) as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2])
        for number in range(100, 160):
            wanted = key(number)
            await client.put(namespace, [wanted], [content(wanted, BLOCK_BYTES)], chain=False)
        assert read(views) == [content(wanted, BLOCK_BYTES) for wanted in KEYS[:2]]
        assert await views.release() is True


@pytest.mark.asyncio
async def test_views_keep_no_more_than_half_of_the_memory() -> None:
    async with host(8 * BLOCK_BYTES) as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:6])
        views = [await client.view(namespace, [wanted], chain=False) for wanted in KEYS[:6]]
        assert [one.outcomes[0] for one in views] == [HIT] * 4 + [FetchOutcome.UNAVAILABLE] * 2
        for seen in views:
            await seen.release()
        again = await client.view(namespace, KEYS[:4])
        assert again.hit_count == 4
        await again.release()


@pytest.mark.asyncio
async def test_a_lease_that_is_not_renewed_ends() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2], lease_s=0.05)
        # A process that hangs renews nothing.
        (lease,) = views._leases
        lease._timer.cancel()
        await until(lambda: one.pins == 0, "the lease has ended")
        assert await views.release() is False


@pytest.mark.slow
@pytest.mark.asyncio
async def test_a_lease_is_renewed_for_as_long_as_it_is_wanted() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2], lease_s=1.5)
        await until(lambda: one.server.counters["requests_renew"] >= 4, "four renewals")
        assert one.pins == 2
        assert await views.release() is True


@pytest.mark.asyncio
async def test_a_client_that_is_gone_gives_all_back() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as other:
        async with AsyncClient(one.uris[0]) as client:
            namespace = await store(client, KEYS[:4])
            first, second = [await client.view(namespace, KEYS[:4]) for _ in range(2)]
            assert one.pins == 8
        await until(lambda: one.pins == 0, "pins are given back")
        assert not first.held
        assert await second.release() is False
        # Its mapping stays for as long as somebody holds a view, whoever was closed.
        assert len(one.server.sessions) == 1
        assert await other.lookup(await other.open_namespace(POOL, layout(*LAYERS)), KEYS[:4])


@pytest.mark.asyncio
async def test_views_of_another_session_cannot_be_released() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client, AsyncClient(one.uris[0]) as thief:
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2])
        (lease,) = views._leases
        assert lease._number >= LEASE_FIRST
        await thief.open_namespace(POOL, layout(*LAYERS))
        stolen = await thief.view(namespace, KEYS[:2])
        assert await stolen.release()
        assert one.pins == 2
        assert await views.release()


@pytest.mark.asyncio
async def test_a_daemon_of_many_pools_gives_no_views() -> None:
    async with host(pool="") as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2])
        assert views.hit_count == 0
        (error,) = views.errors
        assert isinstance(error, Unsupported)
        assert "--pool" in str(error)
        assert await views.release() is True  # of nothing


@pytest.mark.asyncio
async def test_a_daemon_of_one_pool_serves_no_other() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client:
        with pytest.raises(PermissionDenied, match="--pool"):
            await client.open_namespace("other", layout(*LAYERS))


@pytest.mark.asyncio
async def test_another_user_maps_nothing() -> None:
    async with (
        host(memory_uids=frozenset({12345})) as one,
        AsyncClient(one.uris[0]) as client,
    ):
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2])
        assert [type(error) for error in views.errors] == [Unsupported]


@pytest.mark.asyncio
async def test_over_tcp_there_are_none() -> None:
    async with host() as one, AsyncClient(one.uris[1], transport="tcp") as client:
        namespace = await store(client, KEYS[:2])
        views = await client.view(namespace, KEYS[:2])
        assert views.hit_count == 0
        assert isinstance(views.errors[0], KVStoreError)


@asynccontextmanager
async def agent_of(one: Host) -> AsyncIterator[tuple[Agent, AsyncClient]]:
    """An agent of one pool before a daemon, and a client of it; views may keep half of its
    memory, and what a fetch has under way a quarter."""
    options = AgentOptions(
        storage=(one.uris[1],),
        node_id="agent",
        listen=(),
        local=f"unix://@views-agent-{id(one)}",
        memory_bytes=MIB,
        pool=POOL,
        transport="tcp",
    )
    async with Agent(options) as agent, AsyncClient(options.local) as client:
        yield agent, client


@pytest.mark.asyncio
async def test_an_agent_of_one_pool_gives_views_of_what_it_loads() -> None:
    async with host() as one, agent_of(one) as (agent, client):
        namespace = await store(client, KEYS[:4])
        views = await client.view(namespace, KEYS[:6])
        assert views.outcomes == [HIT] * 4 + [MISS] * 2
        assert read(views)[:4] == [content(wanted, BLOCK_BYTES) for wanted in KEYS[:4]]
        assert agent.source.pool.pinned_count == 4
        assert await views.release() is True
        assert agent.source.pool.pinned_count == 0


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("count", [60, 100])
async def test_an_agent_gives_views_of_more_than_a_fetch_has_under_way(count: int) -> None:
    """What a view keeps is not under way: its window must not wait for the lease to end."""
    names = [key(number) for number in range(count)]
    async with host(2 * MIB) as one, agent_of(one) as (_, client):
        namespace = await store(client, names)
        found = await client.view(namespace, names, deadline_s=1.0)
        held = await found.release()
        assert (found.hit_count, found.errors) == (count, [])
        assert held


@pytest.mark.asyncio
async def test_views_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are verified beside the loop, which goes on to answer."""
    threads: set[int] = set()

    def checksums(*given: Any) -> bytes:
        threads.add(threading.get_ident())
        return layer_checksums(*given)

    monkeypatch.setattr(views_module, "layer_checksums", checksums)
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client)
        found = await client.view(namespace, KEYS)
        assert found.hit_count == len(KEYS)
        assert await found.release()
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.asyncio
async def test_a_cancelled_question_leaves_nothing() -> None:
    async with host() as one, AsyncClient(one.uris[0]) as client:
        namespace = await store(client, KEYS[:4])
        for turns in range(8):
            task = asyncio.ensure_future(client.view(namespace, KEYS[:4]))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled():
                await task.result().release()
        await until(lambda: one.pins == 0, "nothing is kept")
