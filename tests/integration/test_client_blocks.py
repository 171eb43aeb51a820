"""A client and real servers: what was put is fetched, in every form of memory and order."""

from __future__ import annotations

import array
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest

from kvstore.messages import FetchOutcome, PutOutcome, Tier
from kvstore_client import AsyncClient, Namespace
from kvstore_client.placement import EXTENT_BLOCKS
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    MIB,
    chain,
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
from tests.support.engine import content, key

HIT, MISS = FetchOutcome.HIT, FetchOutcome.MISS
STORED, EXISTS, CONFLICT, FULL = (
    PutOutcome.STORED,
    PutOutcome.EXISTS,
    PutOutcome.CONFLICT,
    PutOutcome.FULL,
)
OFFSETS = list(accumulate(LAYERS, initial=0))


# --- forms of memory -----------------------------------------------------------------------


def contiguous(blocks: list[bytearray], cut: list[tuple[int, int]]) -> object:
    return blocks


def layer_lists(blocks: list[bytearray], cut: list[tuple[int, int]]) -> object:
    return [[memoryview(block)[a:b] for a, b in cut] for block in blocks]


def mixed(blocks: list[bytearray], cut: list[tuple[int, int]]) -> object:
    return [
        block if number % 2 else tuple(memoryview(block)[a:b] for a, b in cut)
        for number, block in enumerate(blocks)
    ]


def one_array(blocks: list[bytearray], cut: list[tuple[int, int]]) -> object:
    return np.array([np.frombuffer(block, np.uint8) for block in blocks])


def halves(blocks: list[bytearray], cut: list[tuple[int, int]]) -> object:
    return [np.frombuffer(block, np.float16) for block in blocks]


def one_flat_buffer(blocks: list[bytearray], cut: list[tuple[int, int]]) -> object:
    return array.array("H", b"".join(blocks))


FORMS = [contiguous, layer_lists, mixed, one_array, halves, one_flat_buffer]
Form = Callable[[list[bytearray], list[tuple[int, int]]], object]


def flat(memory: object) -> bytes:
    """All bytes of any form, in order."""
    if isinstance(memory, list | tuple):
        return b"".join(map(flat, memory))
    return memoryview(memory).tobytes()  # type: ignore[arg-type]


@pytest.mark.asyncio
@pytest.mark.parametrize("form", FORMS)
async def test_blocks_come_back_in_every_form_of_memory(form: Form) -> None:
    keys = chain(5)
    whole = list(pairwise(OFFSETS))
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        put = await client.put(namespace, keys, form(contents(keys), whole))
        assert put.outcomes == [STORED] * 5
        assert put.ok
        assert put.bytes == 5 * BLOCK_BYTES
        into = form(room(5), whole)
        result = await client.fetch(namespace, keys, into)
        assert (result.ok, result.hit_count, result.bytes) == (True, 5, 5 * BLOCK_BYTES)
        assert flat(into) == b"".join(contents(keys))


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("layers", [range(0, 3), range(0, 1), range(1, 3), range(2, 3)])
@pytest.mark.parametrize("form", [contiguous, layer_lists, one_array])
async def test_any_layers_alone(form: Form, layers: range, order: str) -> None:
    keys = chain(3)
    start, end = OFFSETS[layers.start], OFFSETS[layers.stop]
    cut = [(a - start, b - start) for a, b in pairwise(OFFSETS[layers.start : layers.stop + 1])]
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        into = form(room(3, end - start), cut)
        result = await client.fetch(namespace, keys, into, layers=layers, order=order)
        assert result.ok, result
        assert result.bytes == 3 * (end - start)
        assert flat(into) == b"".join(block[start:end] for block in contents(keys))


@pytest.mark.asyncio
@pytest.mark.parametrize("group_layers", [1, 2, 3, 1000])
async def test_layers_become_ready_in_order(group_layers: int) -> None:
    keys = chain(4)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        nodes[0].gate.chunk_bytes = 500
        into = room(4)
        handle = client.fetch(namespace, keys, into, order="layer", group_layers=group_layers)
        seen = []
        for layer in range(3):
            assert await handle.layer(layer)
            seen.append(handle.layers_ready)
            for block, expected in zip(into, contents(keys), strict=True):
                assert block[: OFFSETS[layer + 1]] == expected[: OFFSETS[layer + 1]]
        assert seen == sorted(seen)
        assert seen[-1] == 3
        assert (await handle).ok


@pytest.mark.asyncio
async def test_a_layer_is_ready_while_later_ones_are_on_their_way() -> None:
    keys = chain(4)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        gate = nodes[0].gate
        gate.chunk_bytes, gate.chunks_left = LAYERS[0], 4  # layer 0 of every block
        handle = client.fetch(namespace, keys, room(4), order="layer")
        assert await handle.layer(0)
        assert not handle.poll()
        assert handle.layers_ready == 1
        gate.open()
        assert await handle.layer(2)
        assert (await handle).ok


@pytest.mark.asyncio
async def test_a_missing_block_is_told_to_who_waits_for_a_layer() -> None:
    keys = chain(4)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys[:3])
        handle = client.fetch(namespace, keys, room(4), order="layer")
        assert not await handle.layer(0)
        assert (await handle).outcomes == [HIT, HIT, HIT, MISS]
        assert not await handle.layer(2)
        with pytest.raises(IndexError):
            await handle.layer(3)


# --- outcomes ------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_each_block_has_its_own_outcome() -> None:
    keys = chain(7)
    stored = [keys[0], keys[2], keys[3], keys[6]]
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, stored, chain=False)
        into = [bytearray(b"\xee" * BLOCK_BYTES) for _ in keys]
        result = await client.fetch(namespace, keys, into)
        assert result.outcomes == [HIT, MISS, HIT, HIT, MISS, MISS, HIT]
        assert result.tiers == [
            Tier.ARENA if outcome is HIT else Tier.NONE for outcome in result.outcomes
        ]
        assert not result.ok
        assert result.errors == []
        for outcome, name, block in zip(result.outcomes, keys, into, strict=True):
            expected = content(name, BLOCK_BYTES) if outcome is HIT else b"\xee" * BLOCK_BYTES
            assert block == expected


@pytest.mark.asyncio
async def test_the_first_bytes_under_a_key_stay() -> None:
    keys = chain(3)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys[:2])
        same = await client.put(namespace, keys[:1], contents(keys[:1]))
        assert (same.outcomes, same.bytes) == ([EXISTS], 0)
        other = await client.put(namespace, keys, contents(keys, version=1))
        assert other.outcomes == [CONFLICT, CONFLICT, STORED]
        assert other.ok
        assert other.errors == []
        into = room(3)
        assert (await client.fetch(namespace, keys, into)).ok
        assert into == [*contents(keys[:2]), *contents(keys[2:], version=1)]
        assert nodes[0].counter("put_conflicts") == 2


@pytest.mark.asyncio
async def test_an_arena_that_is_leased_is_full_until_the_lease_ends() -> None:
    async with (
        serve(1, arena_bytes=4 * BLOCK_BYTES) as nodes,
        connected(nodes) as client,
        connected(nodes) as other,
    ):
        namespace = await open_pool(client)
        old, new = chain(4), chain(2, start=100)
        await store_blocks(client, namespace, old)
        # One session may lease half of it.
        found = await client.lookup(namespace, old, lease_s=10)
        assert (found.prefix, found.leases) == (4, [])
        assert (await client.lookup(namespace, old[:2], lease_s=10)).leases
        assert (await other.lookup(await open_pool(other), old[2:], lease_s=10)).leases
        refused = await client.put(namespace, new, contents(new))
        assert (refused.outcomes, refused.bytes) == ([FULL, FULL], 0)
        assert not refused.ok
        # What is there is read as ever.
        assert (await fetch_blocks(client, namespace, old)).ok
        nodes[0].now += 10.001
        await store_blocks(client, namespace, new)
        assert (await client.lookup(namespace, new)).prefix == 2


@pytest.mark.asyncio
async def test_deleted_blocks_are_gone() -> None:
    keys = chain(3)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys[:2])
        assert await client.delete(namespace, keys, first=1) == [True, False]
        assert (await client.lookup(namespace, keys)).hits == [True, False, False]
        assert (await fetch_blocks(client, namespace, keys)).outcomes == [HIT, MISS, MISS]
        assert await client.delete(namespace, keys) == [True, False, False]
        assert nodes[0].stored_count() == 0


@pytest.mark.asyncio
async def test_a_block_that_is_deleted_while_it_travels_arrives_whole() -> None:
    keys = chain(1)
    async with serve(1, arena_bytes=64 * MIB) as nodes, connected(nodes) as client:
        namespace = await open_pool(client, 3 * MIB)
        await store_blocks(client, namespace, keys)
        nodes[0].gate.chunks_left = 1
        into = room(1, 3 * MIB)
        handle = client.fetch(namespace, keys, into)
        while not nodes[0].gate.given:
            await client.status()
        assert await client.delete(namespace, keys) == [True]
        # Other bytes take its place under the same key.
        put = await client.put(namespace, keys, contents(keys, 3 * MIB, version=1))
        assert put.outcomes == [STORED]
        nodes[0].gate.open()
        assert (await handle).ok
        assert into == contents(keys, 3 * MIB)


# --- chains --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_call_about_the_rest_of_a_chain() -> None:
    keys = chain(150)
    async with serve(4) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        for first in (1, 63, 64, 100, 149):
            rest = keys[first:]
            assert (await client.lookup(namespace, keys, first=first)).prefix == 150 - first
            into = room(len(rest))
            result = await client.fetch(namespace, keys, into, first=first)
            assert (result.ok, into) == (True, contents(rest))
        more = chain(200)
        grown = await client.put(namespace, more, contents(more[150:]), first=150)
        assert grown.outcomes == [STORED] * 50
        assert (await client.lookup(namespace, more)).prefix == 200


@pytest.mark.asyncio
async def test_lone_keys_lie_each_where_it_says_itself() -> None:
    keys = chain(40)
    async with serve(4) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys, chain=False)
        counts = [node.stored_count() for node in nodes]
        assert sum(counts) == 40
        assert all(counts)
        assert (await fetch_blocks(client, namespace, keys, chain=False)).ok
        # Any of them alone, in any order.
        for name in keys[::-7]:
            assert (await fetch_blocks(client, namespace, [name])).ok
        assert await client.delete(namespace, keys, chain=False) == [True] * 40


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
async def test_more_keys_than_a_request_may_have(count: int) -> None:
    keys = chain(5000)
    async with (
        serve(count, arena_bytes=5200 * 4096) as nodes,
        connected(nodes, deadline_s=30) as client,
    ):
        namespace = await open_pool(client, 64)
        await store_blocks(client, namespace, keys)
        assert sum(node.stored_count() for node in nodes) == 5000
        found = await client.lookup(namespace, keys, lease_s=5, deadline_s=10)
        assert found.prefix == 5000
        result = await fetch_blocks(client, namespace, keys)
        assert result.ok
        assert sum(run.block_count for run in result.runs) == 5000
        assert await client.release(found.leases) == len(found.leases)
        assert all(await client.delete(namespace, keys))


@pytest.mark.asyncio
async def test_no_keys_need_nothing() -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        found = await client.lookup(namespace, [])
        assert (found.hits, found.prefix, found.leases) == ([], 0, [])
        handle = client.fetch(namespace, [], [])
        result = await handle
        await handle.quiesced()
        assert (result.outcomes, result.ok, result.bytes) == ([], True, 0)
        assert handle.layers_ready == 3
        assert await handle.layer(0)
        put = client.put(namespace, [], [])
        assert (await put).ok
        await put.quiesced()
        assert await client.delete(namespace, []) == []
        assert await client.release([]) == 0


@pytest.mark.asyncio
async def test_a_key_twice_in_one_request() -> None:
    keys = [key(1), key(2), key(1)]
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        put = await client.put(namespace, keys, contents(keys))
        assert sorted(put.outcomes) == [STORED, STORED, EXISTS]
        assert (await fetch_blocks(client, namespace, keys)).ok


# --- attribution ---------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_result_says_who_served_each_block_and_how() -> None:
    keys = chain(2 * EXTENT_BLOCKS + 10)
    async with serve(3) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        put = await client.put(namespace, keys, contents(keys))
        assert put.ok
        result = await fetch_blocks(client, namespace, keys[:-5])
        for runs, of_block, count in (
            (put.runs, put.run_of_block, len(keys)),
            (result.runs, result.run_of_block, len(keys) - 5),
        ):
            assert sum(run.block_count for run in runs) == count
            assert sum(run.bytes for run in runs) == count * BLOCK_BYTES
            for index, number in enumerate(of_block):
                run = runs[number]
                assert (run.path, run.transport) == ("direct", "tcp")
                holder = next(node for node in nodes if node.name == run.peer)
                assert holder.holds(namespace, keys[index]) == [True]
                assert run.elapsed_us > 0
        assert all(0 <= run.service_us <= run.elapsed_us for run in result.runs)
        assert 0 < result.elapsed_s <= 5


@pytest.mark.asyncio
async def test_a_unix_socket_is_named_as_such(tmp_path: Path) -> None:
    keys = chain(5)
    listen = f"unix://{tmp_path}/kvstored.sock"
    async with serve(1, listen=listen) as nodes, connected(nodes) as client:
        assert client.endpoints == [listen]
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        result = await fetch_blocks(client, namespace, keys)
        assert result.ok
        assert [(run.transport, run.peer) for run in result.runs] == [("unix", "node-0")]
        await nodes[0].kill()
        await nodes[0].start(fresh=False)
        await until(lambda: not client.cluster._links[0].up)
        await until(lambda: client.cluster._links[0].up)
        assert (await fetch_blocks(client, namespace, keys)).ok


@pytest.mark.asyncio
async def test_reports_and_status_tell_of_every_node() -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        keys = chain(3)
        await store_blocks(client, namespace, keys)
        found = await client.status()
        assert list(found) == uris(nodes) == client.endpoints
        total = 0
        for node, status in zip(nodes, found.values(), strict=True):
            assert not isinstance(status, Exception)
            assert status.node_id == node.name
            total += status.counters.get("put_stored", 0)
        assert total == 3
        served = next(node for node in nodes if node.stored_count())
        report = client.report(served.name)
        assert report is not None
        assert report.buffers.total_bytes == served.store.arena_bytes
        assert client.report("nobody") is None


@pytest.mark.asyncio
async def test_two_clients_share_what_is_stored_and_layouts_do_not() -> None:
    keys = chain(4)
    async with serve(2) as nodes, connected(nodes) as one, connected(nodes[::-1]) as other:
        namespace = await open_pool(one)
        await store_blocks(one, namespace, keys)
        same: tuple[AsyncClient, Namespace] = (other, await open_pool(other))
        assert (await fetch_blocks(*same, keys)).ok
        elsewhere = await open_pool(other, dtype="float16")
        assert (await fetch_blocks(other, elsewhere, keys)).outcomes == [MISS] * 4
        assert (await other.lookup(elsewhere, keys)).prefix == 0


@pytest.mark.asyncio
async def test_a_client_counts_what_became_of_its_blocks() -> None:
    keys = chain(4)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        assert client.counters() == {}
        await store_blocks(client, namespace, keys[:3])
        await client.put(namespace, keys[:2], contents(keys[:2]))
        await client.put(namespace, keys[:1], contents(keys[:1], version=1))
        nodes[0].damage(namespace, keys[1])
        into = room(4)
        result = await client.fetch(namespace, keys, into)
        assert result.hit_count == 2
        await client.lookup(namespace, keys)
        late = client.fetch(namespace, keys, into, deadline_s=0)
        await late
        assert client.counters() == {
            "put_requests": 3,
            "put_blocks_stored": 3,
            "put_blocks_exists": 2,
            "put_blocks_conflict": 1,
            "put_bytes_direct": 3 * BLOCK_BYTES,
            "put_bytes_by_tcp": 3 * BLOCK_BYTES,
            "fetch_requests": 2,
            "fetch_blocks_hit": 2,
            "fetch_blocks_miss": 1,
            "fetch_blocks_corrupt": 1,
            "fetch_blocks_timeout": 4,
            "fetch_bytes_direct": 3 * BLOCK_BYTES,
            "fetch_bytes_by_tcp": 3 * BLOCK_BYTES,
            "corrupt_blocks": 1,
            "lookup_requests": 1,
            "lookup_keys": 4,
            "lookup_hits": 2,  # the daemon was told of the bad one, and has dropped it
        }


@pytest.mark.asyncio
async def test_who_gave_up_is_named() -> None:
    keys = chain(2)
    async with serve(1) as nodes:
        async with connected(nodes) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            nodes[0].gate.chunks_left = 0
            cancelled = client.fetch(namespace, keys, room(2))
            cancelled.cancel()
            cancelled.cancel()
            result = await cancelled
            assert [str(error) for error in result.errors] == ["cancelled by the caller"]
            put = client.put(namespace, chain(2, 7), contents(chain(2, 7)))
            put.cancel()
            assert [str(error) for error in (await put).errors] == ["cancelled by the caller"]
            left = client.fetch(namespace, keys, room(2))
            ended = client.fetch(namespace, [], [])
            ended.cancel()
            assert (await ended).errors == []
        after = client.fetch(namespace, keys, room(2))
        for handle in (left, after):
            result = await handle
            assert result.outcomes == [FetchOutcome.UNAVAILABLE] * 2
            assert [str(error) for error in result.errors] == ["the client was closed"]
