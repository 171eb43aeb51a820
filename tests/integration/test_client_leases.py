"""Lookups and leases through a client: what is there, and what keeps it there."""

from __future__ import annotations

import pytest

from kvstore.layout import namespace_id
from kvstore.messages import PutOutcome
from kvstore_client import Namespace, UnknownNamespace
from kvstore_daemon.engine.leases import LEASES_PER_OWNER_MAX
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    chain,
    chain_with_owners,
    connected,
    contents,
    open_pool,
    serve,
    store_blocks,
    until,
    uris,
)
from tests.support.engine import layout


@pytest.mark.asyncio
async def test_a_block_counts_when_all_ranks_have_it() -> None:
    keys = chain(5)
    async with serve(2) as nodes, connected(nodes) as client:
        ranks = [await open_pool(client, tp_rank=rank, tp_size=3) for rank in range(3)]
        for rank, have in zip(ranks, ([0, 1, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]), strict=True):
            await store_blocks(client, rank, [keys[index] for index in have[:1]])
            for index in have[1:]:
                await client.put(rank, keys[: index + 1], contents(keys[index : index + 1]),
                                 first=index)  # fmt: skip
        found = await client.lookup(ranks, keys)
        assert (found.hits, found.prefix) == ([True, True, False, False, True], 2)
        assert (await client.lookup(ranks[0], keys)).hits == [True, True, True, False, True]
        assert (await client.lookup(ranks[2], keys)).prefix == 5


@pytest.mark.asyncio
async def test_a_rank_that_nobody_opened_has_nothing() -> None:
    keys = chain(3)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        other = Namespace("pool", layout(*LAYERS, tp_rank=1, tp_size=2))
        found = await client.lookup([namespace, other], keys)
        assert (found.prefix, found.hits) == (0, [False] * 3)
        assert found.unreachable == []
        assert isinstance(found.refused[nodes[0].uri], UnknownNamespace)
        assert (await client.lookup(namespace, keys)).prefix == 3


@pytest.mark.asyncio
async def test_leases_keep_blocks_until_they_are_given_back() -> None:
    # One session may lease half of an arena.
    async with serve(3, arena_bytes=130 * BLOCK_BYTES) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        keys = chain_with_owners(uris(nodes), [(0,), (1,)])[:70]
        await store_blocks(client, namespace, keys)
        found = await client.lookup(namespace, keys, lease_s=10)
        assert found.prefix == found.leased == 70
        assert len(found.leases) == 2
        assert [lease.duration_s for lease in found.leases] == [10.0, 10.0]
        assert sum(node.store.leases.block_count for node in nodes) == 70
        flood = chain(700, start=1000)
        await client.put(namespace, flood, contents(flood), chain=False)
        assert (await client.lookup(namespace, keys)).prefix == 70
        assert await client.release(found.leases) == 2
        assert await client.release(found.leases) == 0
        assert sum(node.store.leases.block_count for node in nodes) == 0
        flood = chain(700, start=2000)
        await client.put(namespace, flood, contents(flood), chain=False)
        assert (await client.lookup(namespace, keys)).hits.count(True) < 70


@pytest.mark.asyncio
async def test_only_the_leading_run_is_leased() -> None:
    keys = chain(6)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        await client.delete(namespace, keys[:4], first=3)
        found = await client.lookup(namespace, keys, lease_s=1)
        assert found.prefix == 3
        assert nodes[0].store.leases.block_count == 3
        nothing = await client.lookup(namespace, chain(3, start=50), lease_s=1)
        assert (nothing.prefix, nothing.leases) == (0, [])


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_lease_for_which_there_is_no_room_is_told_from_one_that_holds() -> None:
    keys = chain(6)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        for _ in range(LEASES_PER_OWNER_MAX + 1):
            found = await client.lookup(namespace, keys, lease_s=60)
            assert found.prefix == 6
            if not found.leases:
                break
            assert found.leased == 6
        assert (found.leased, found.leases) == (0, [])


@pytest.mark.asyncio
async def test_a_lease_ends_by_itself() -> None:
    keys = chain(4)
    async with (
        serve(1, arena_bytes=4 * BLOCK_BYTES) as nodes,
        connected(nodes) as client,
        connected(nodes) as other,  # one session may lease half of it
    ):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        found = await client.lookup(namespace, keys[:2], lease_s=2.5)
        assert (await other.lookup(await open_pool(other), keys, first=2, lease_s=2.5)).leased == 2
        new = chain(1, start=9)
        nodes[0].now += 2.499
        assert (await client.put(namespace, new, contents(new))).outcomes == [PutOutcome.FULL]
        nodes[0].now += 0.002
        assert await client.release(found.leases) == 0
        assert (await client.put(namespace, new, contents(new))).outcomes == [PutOutcome.STORED]


@pytest.mark.asyncio
async def test_leases_end_with_their_client_and_not_with_another() -> None:
    keys = chain(4)
    async with serve(1) as nodes, connected(nodes) as witness:
        node = nodes[0]
        async with connected(nodes) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            found = await client.lookup(namespace, keys, lease_s=60)
            seen = await witness.lookup(await open_pool(witness), keys[:1], lease_s=60)
            # What is not ours we cannot give back.
            assert await witness.release(found.leases) == 0
            assert len(node.store.leases) == 2
        await until(lambda: len(node.store.leases) == 1, "the client's lease has ended")
        assert await witness.release(seen.leases) == 1


@pytest.mark.asyncio
async def test_a_namespace_is_the_same_for_everyone() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        assert namespace.id == namespace_id("pool", layout(*LAYERS))
        assert [found.namespace for found in nodes[0].source.namespaces("pool")] == [namespace.id]
        assert (await open_pool(client)).id == namespace.id
