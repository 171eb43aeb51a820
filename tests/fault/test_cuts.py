"""A network that cuts connections at any byte and flips bits: never a wrong byte, never a hang."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kvstore.errors import KVStoreError, RemoteProtocolError
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.wire import HEADER_BYTES, FrameType, Header
from tests.support.cluster import (
    BLOCK_BYTES,
    Node,
    chain,
    chain_with_owners,
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
from tests.support.engine import content
from tests.support.peers import CONTROL, FETCH, PUT, Mangle, proxied

HIT, CORRUPT, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.CORRUPT, FetchOutcome.UNAVAILABLE
SMALL = (50, 70)
SIZE = sum(SMALL)


# --- cuts ----------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("step", [29, 41])
async def test_a_fetch_is_cut_at_every_byte(step: int, order: str) -> None:
    keys = chain(6)
    async with serve(1) as nodes, proxied(nodes[0].uri) as proxy:
        async with connected(nodes) as writer:
            await store_blocks(writer, await open_pool(writer, *SMALL), keys)
        at, cut = 1, True
        while cut:
            async with connected(proxy.uri) as client:
                namespace = await open_pool(client, *SMALL)
                proxy.cut_at["down", FETCH] = proxy.passed["down", FETCH] + at
                into = room(6, SIZE)
                handle = client.fetch(namespace, keys, into, order=order, deadline_s=600)
                result = await handle
                await handle.quiesced()
                check_hits(result, keys, into)
                cut = not proxy.cut_at
                proxy.cut_at.clear()
                if cut:
                    assert set(result.outcomes) <= {HIT, UNAVAILABLE}
                    assert all(isinstance(error, KVStoreError) for error in result.errors)
                    assert result.errors or result.ok
                else:
                    assert result.ok
            at += step
        assert at > 6 * SIZE


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_put_is_cut_at_every_byte() -> None:
    async with serve(1) as nodes, proxied(nodes[0].uri) as proxy:
        node = nodes[0]
        at, cut = 1, True
        while cut:
            keys = chain(6, start=100 * at)
            async with connected(proxy.uri) as client:
                namespace = await open_pool(client, *SMALL)
                proxy.cut_at["up", PUT] = proxy.passed["up", PUT] + at
                handle = client.put(namespace, keys, contents(keys, SIZE), deadline_s=600)
                result = await handle
                await handle.quiesced()
                cut = not proxy.cut_at
                proxy.cut_at.clear()
                assert result.ok or (cut and result.outcomes == [PutOutcome.UNAVAILABLE] * 6)
            await node.left_alone()
            node.check_released()
            async with connected(nodes) as reader:
                found = await fetch_blocks(reader, await open_pool(reader, *SMALL), keys)
                assert found.ok or cut
                await reader.delete(await open_pool(reader, *SMALL), keys)
            at += 37
        assert at > 6 * SIZE


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("channel", [CONTROL, FETCH, PUT])
async def test_a_handshake_is_cut_at_every_byte(channel: int, way: str) -> None:
    keys = chain(1)
    async with serve(1) as nodes, proxied(nodes[0].uri) as proxy:
        at = 1
        while True:
            proxy.accepted = 0
            proxy.cut_at[way, channel] = at
            async with connected(proxy.uri) as client:
                first = client.cluster._links[0].up
                try:
                    namespace = await open_pool(client, *SMALL)
                    result = await fetch_blocks(client, namespace, keys)
                    assert result.outcomes in ([FetchOutcome.MISS], [UNAVAILABLE])
                except KVStoreError:
                    pass
            if first and proxy.cut_at:
                break
            proxy.cut_at.clear()
            at += 17
        proxy.cut_at.clear()
        assert at > HEADER_BYTES


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_control_connection_is_cut_under_small_requests() -> None:
    keys = chain(3)
    async with serve(1) as nodes, proxied(nodes[0].uri) as proxy:
        for at in range(1, 400, 41):
            async with connected(proxy.uri) as client:
                namespace = await open_pool(client, *SMALL)
                for way in ("up", "down"):
                    proxy.cut_at[way, CONTROL] = proxy.passed[way, CONTROL] + at
                found = await client.lookup(namespace, keys, lease_s=5)
                assert found.prefix in (0, 3)
                try:
                    await client.release(found.leases)
                    await client.delete(namespace, keys)
                    await client.open_namespace("pool", namespace.layout)
                except KVStoreError:
                    pass
                proxy.cut_at.clear()


# --- flipped bits on the way to the client -------------------------------------------------


def flip(at: int, wanted: Callable[[Header], bool], bit: int = 0) -> tuple[Mangle, list[Header]]:
    """Flip one bit of the first frame that is wanted; the list tells that it happened.

    Args:
        at: Which byte of the frame; negative ones count from its end.
    """
    done: list[Header] = []

    def mangle(header: Header, data: bytearray) -> bytearray:
        if not done and wanted(header):
            done.append(header)
            data[at] ^= 1 << bit
        return data

    return mangle, done


def is_data(header: Header) -> bool:
    return header.type is FrameType.DATA and header.payload_length > 0


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("block", [0, 2, 5])
async def test_a_flipped_bit_costs_its_block_and_no_other(block: int, order: str) -> None:
    keys = chain(6)
    async with (
        serve(1) as nodes,
        proxied(nodes[0].uri) as proxy,
        connected(proxy.uri) as client,
    ):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        at = block * 4096 + 7 - 6 * 4096 if order == "block" else block * 96 + 7 - 6 * 96
        proxy.mangle["down"], done = flip(at, lambda header: is_data(header), bit=block)
        result = await fetch_blocks(client, namespace, keys, order=order)
        assert done
        assert result.outcomes == [CORRUPT if n == block else HIT for n in range(6)]
        assert result.bytes == 5 * BLOCK_BYTES
        # The daemon was told, looked at its own copy, and found it good.
        await until(lambda: nodes[0].counter("requests_corrupt_report"))
        assert nodes[0].stored_count() == 6
        assert nodes[0].counter("blocks_corrupt") == 0
        assert (await fetch_blocks(client, namespace, keys)).ok
        assert proxy.accepted == 3


@pytest.mark.asyncio
@pytest.mark.parametrize("copies", [1, 2])
async def test_a_block_that_is_bad_at_its_daemon_is_dropped_and_healed(copies: int) -> None:
    async with serve(2) as nodes, connected(nodes, copies=copies) as client:
        namespace = await open_pool(client)
        keys = chain_with_owners(uris(nodes), [(0, 1)])
        await store_blocks(client, namespace, keys)
        nodes[0].damage(namespace, keys[3])
        result = await fetch_blocks(client, namespace, keys)
        bad = HIT if copies == 2 else CORRUPT
        assert result.outcomes == [bad if n == 3 else HIT for n in range(64)]
        await until(lambda: nodes[0].counter("blocks_corrupt"))
        assert nodes[0].holds(namespace, keys[3]) == [False]
        put = await client.put(namespace, keys, contents(keys))
        assert put.ok
        assert nodes[0].holds(namespace, keys[3]) == [True]
        assert (await fetch_blocks(client, namespace, keys)).ok


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("order", ["block", "layer"])
async def test_any_flipped_bit_of_an_answer_is_noticed(order: str, seed: int) -> None:
    keys, draws = chain(3), random.Random(seed)
    async with serve(1) as nodes, proxied(nodes[0].uri) as proxy:
        async with connected(nodes) as writer:
            await store_blocks(writer, await open_pool(writer, *SMALL), keys)
        ats = [*range(0, HEADER_BYTES, 5), *(draws.randrange(48, 600) for _ in range(12))]
        for at in ats:
            for kind in (FrameType.DATA, FrameType.DONE):
                async with connected(proxy.uri) as client:
                    namespace = await open_pool(client, *SMALL)
                    mangle, done = _flip_anywhere(kind, at, draws.randrange(8))
                    proxy.mangle["down"] = mangle
                    result = await fetch_blocks(client, namespace, keys, order=order)
                    assert done
                    if at < HEADER_BYTES:
                        assert [type(error) for error in result.errors] == [RemoteProtocolError]
                        assert kind is FrameType.DONE or not result.ok
                    proxy.mangle.clear()


def _flip_anywhere(kind: FrameType, at: int, bit: int) -> tuple[Mangle, list[int]]:
    done: list[int] = []

    def mangle(header: Header, data: bytearray) -> bytearray:
        if not done and header.type is kind:
            done.append(at % len(data))
            data[at % len(data)] ^= 1 << bit
        return data

    return mangle, done


# --- flipped bits on the way to the daemon -------------------------------------------------


@pytest.mark.asyncio
async def test_bytes_that_arrive_wrong_are_not_stored() -> None:
    keys = chain(4)
    async with (
        serve(1) as nodes,
        proxied(nodes[0].uri) as proxy,
        connected(proxy.uri) as client,
    ):
        namespace = await open_pool(client)
        proxy.mangle["up"], done = flip(-1, is_data)
        result = await client.put(namespace, keys, contents(keys))
        assert done
        assert result.outcomes == [PutOutcome.STORED] * 3 + [PutOutcome.CORRUPT]
        assert not result.ok
        assert nodes[0].stored_count() == 3
        healed = await client.put(namespace, keys, contents(keys))
        assert healed.outcomes == [PutOutcome.EXISTS] * 3 + [PutOutcome.STORED]


@pytest.mark.asyncio
@pytest.mark.slow
async def test_any_flipped_bit_of_a_request_is_noticed(seed: int) -> None:
    keys, draws = chain(2), random.Random(seed)
    async with serve(1) as nodes, proxied(nodes[0].uri) as proxy:
        ats = [*range(0, HEADER_BYTES, 7), *(draws.randrange(48, 400) for _ in range(8))]
        for at in ats:
            for kind in (FrameType.PUT, FrameType.DATA, FrameType.FETCH):
                async with connected(proxy.uri) as client:
                    namespace = await open_pool(client, *SMALL)
                    mangle, done = _flip_anywhere(kind, at, draws.randrange(8))
                    proxy.mangle["up"] = mangle
                    blocks = contents(keys, SIZE)
                    result = await client.put(namespace, keys, blocks, deadline_s=600)
                    fetched = await fetch_blocks(client, namespace, keys, deadline_s=600)
                    assert done
                    assert not (result.ok and fetched.ok)
                    proxy.mangle.clear()
                await _everything_stored_is_right(nodes[0], keys)


async def _everything_stored_is_right(node: Node, keys: list[bytes]) -> None:
    async with connected([node]) as client:
        namespace = await open_pool(client, *SMALL)
        await fetch_blocks(client, namespace, keys)  # checks what is a hit
        for name, slot in node.store.pools.namespace(namespace.id).slots.items():
            assert name in keys
            assert bytes(node.store.view(slot)) == content(name, SIZE)
        await client.delete(namespace, keys)


@pytest.mark.asyncio
async def test_a_broken_header_drops_the_connection_and_the_client_comes_back() -> None:
    keys = chain(4)
    async with (
        serve(1) as nodes,
        proxied(nodes[0].uri) as proxy,
        connected(proxy.uri) as client,
    ):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        proxy.mangle["down"], done = flip(17, is_data)
        result = await fetch_blocks(client, namespace, keys)
        assert done
        assert result.outcomes == [UNAVAILABLE] * 4
        assert isinstance(result.errors[0], RemoteProtocolError)
        assert "header checksum" in str(result.errors[0])
        await until(lambda: client.cluster._links[0].up)
        assert (await fetch_blocks(client, namespace, keys)).ok
        assert proxy.accepted == 6
