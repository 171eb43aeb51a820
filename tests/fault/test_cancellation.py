"""Cancelled at every await: whoever gives up leaves nothing behind and blocks nobody.

Each operation runs as a task that is cancelled after 0, 1, 2, ... turns of the loop, until it
ends before it can be cancelled. `serve` then checks that all is as before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from kvstore.messages import FetchOutcome, PutOutcome
from kvstore_client import AsyncClient, Namespace
from tests.support.cluster import (
    Node,
    chain,
    check_hits,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
    uris,
)
from tests.support.engine import layout

KEYS = chain(70)
TURNS_MAX = 500


async def cancelled_after(turns: int, work: Awaitable[object]) -> bool:
    """Cancel a task after some turns of the loop; whether it was still under way."""
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return task.cancelled()


async def try_all(make: Callable[[int], Awaitable[object]]) -> int:
    """Cancel at every turn; how many there are."""
    turns = 0
    while await cancelled_after(turns, make(turns)):
        turns += 1
        assert turns < TURNS_MAX
    return turns


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_start_that_is_given_up_leaves_no_connection() -> None:
    async with serve(2) as nodes:

        async def work(_: int) -> None:
            async with AsyncClient(uris(nodes), node_id="c"):
                pass

        assert await try_all(work) > 3


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_close_that_is_given_up_can_be_repeated() -> None:
    async with serve(2) as nodes:

        async def one(turns: int) -> bool:
            client = AsyncClient(uris(nodes), node_id="c")
            await client.start()
            namespace = await client.open_namespace("pool", layout(64))
            nodes[0].gate.chunks_left = nodes[1].gate.chunks_left = 0
            fetch = client.fetch(namespace, KEYS, room(70, 64), deadline_s=600)
            await asyncio.sleep(0)
            under_way = await cancelled_after(turns, client.close())
            await client.close()
            assert fetch.poll()
            await fetch.quiesced()
            return under_way

        turns = 0
        while await one(turns):
            turns += 1
            assert turns < TURNS_MAX
        assert turns


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lookup", "open", "delete", "release", "status"])
async def test_small_requests_that_are_given_up(name: str) -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        leases = (await client.lookup(namespace, KEYS, lease_s=60)).leases
        calls: dict[str, Callable[[int], Awaitable[object]]] = {
            "lookup": lambda _: client.lookup(namespace, KEYS, lease_s=60),
            "open": lambda turns: open_pool(client, hash_seed=str(turns)),
            "delete": lambda _: client.delete(namespace, KEYS),
            "release": lambda _: client.release(leases),
            "status": lambda _: client.status(),
        }
        assert await try_all(calls[name]) > 1
        assert all(link.up for link in client.cluster._links)
        result = await fetch_blocks(client, namespace, KEYS)
        assert result.ok or name == "delete"


async def steady(client: AsyncClient, namespace: Namespace, nodes: list[Node]) -> None:
    """After all that, the client works, and no node is busy."""
    await until(lambda: not any(c.busy for node in nodes for c in node.server.connections))
    for node in nodes:
        assert not any(node.store.index.pins[1:])
        assert node.store.index.reserved_count == 0
    keys = chain(70, start=100_000)
    put = await client.put(namespace, keys, contents(keys))
    assert put.ok
    assert (await fetch_blocks(client, namespace, keys)).ok
    assert client.cluster._jobs == set()


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("order", ["block", "layer"])
async def test_a_fetch_whose_reader_is_given_up_goes_on_and_ends(order: str) -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)

        async def work(_: int) -> None:
            into = room(70)
            handle = client.fetch(namespace, KEYS, into, order=order)
            try:
                assert (await handle).ok
            finally:
                # The memory is ours only now, whatever became of the task.
                handle.cancel()
                await asyncio.shield(handle.quiesced())
                check_hits(handle.result(), KEYS, into)

        assert await try_all(work) > 1
        await steady(client, namespace, nodes)


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("order", ["block", "layer"])
async def test_a_fetch_is_cancelled_at_every_turn(order: str) -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        for node in nodes:
            node.gate.chunk_bytes = 3 * 4096
        turns = 0
        while True:
            into = room(70)
            handle = client.fetch(namespace, KEYS, into, order=order)
            for _ in range(turns):
                await asyncio.sleep(0)
            under_way = not handle.poll()
            handle.cancel()
            assert handle.poll()
            result = handle.result()
            await handle.quiesced()
            check_hits(result, KEYS, into)
            assert set(result.outcomes) <= {FetchOutcome.HIT, FetchOutcome.UNAVAILABLE}
            for block in into:
                block[:] = bytes(4096)
            if not under_way:
                assert result.ok
                break
            turns += 1
            await asyncio.sleep(0)
            assert into == room(70)
        assert turns > 3
        await steady(client, namespace, nodes)


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_put_is_cancelled_at_every_turn() -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        turns = 0
        while True:
            keys = chain(70, start=1000 * turns)
            blocks = contents(keys)
            handle = client.put(namespace, keys, blocks)
            for _ in range(turns):
                await asyncio.sleep(0)
            under_way = not handle.poll()
            handle.cancel()
            result = handle.result()
            await handle.quiesced()
            assert set(result.outcomes) <= {PutOutcome.STORED, PutOutcome.UNAVAILABLE}
            for block in blocks:
                block[:] = bytes(4096)  # ours again: what was taken must not change
            await fetch_blocks(client, namespace, keys)
            await client.delete(namespace, keys)
            if not under_way:
                break
            turns += 1
        assert turns > 3
        await steady(client, namespace, nodes)


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fetch", "put"])
async def test_a_client_is_closed_at_every_turn_of_a_request(kind: str) -> None:
    async with serve(2) as nodes:
        async with connected(nodes) as writer:
            await store_blocks(writer, await open_pool(writer), KEYS)
        turns = 0
        while True:
            async with connected(nodes) as client:
                namespace = await open_pool(client)
                memory = contents(KEYS, version=1) if kind == "put" else room(70)
                keys = chain(70, start=1000 * turns + 1000) if kind == "put" else KEYS
                call = client.put if kind == "put" else client.fetch
                handle = call(namespace, keys, memory)
                for _ in range(turns):
                    await asyncio.sleep(0)
                under_way = not handle.poll()
            assert handle.poll()
            assert handle.quiet.done()
            for node in nodes:
                await node.left_alone()
                node.check_released()
            if not under_way:
                break
            turns += 1
        assert turns > 3


@pytest.mark.asyncio
async def test_an_abandoned_handle_holds_nothing_up() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        for _ in range(50):
            client.fetch(namespace, KEYS, room(70)).cancel()
        assert (await fetch_blocks(client, namespace, KEYS)).ok
        await steady(client, namespace, nodes)
