"""Daemons that are not there, come, go, and come back: what a client makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence

import pytest

from kvstore.errors import (
    KVStoreError,
    LayoutMismatch,
    LocalProtocolError,
    RefusedError,
    TransportError,
)
from kvstore.layout import generation_id
from kvstore.messages import FetchOutcome, Pool, PoolAction, PoolInfo, PutOutcome
from kvstore_client import AsyncClient, Namespace
from tests.support.cluster import (
    LAYERS,
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
from tests.support.engine import layout

HIT, MISS, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.UNAVAILABLE
FOUR = [(0,), (1,), (2,), (3,)]


def is_up(client: AsyncClient, index: int = 0) -> bool:
    """Whether requests to a node can be sent."""
    return client.cluster._links[index].allow()


async def comes_back(client: AsyncClient, namespace: Namespace, keys: Sequence[bytes]) -> None:
    """Look again and again until every daemon has answered."""
    await until(lambda: client.cluster._links[0].up)
    assert not (await client.lookup(namespace, keys, chain=False)).unreachable


@contextlib.asynccontextmanager
async def starting(count: int) -> AsyncIterator[list[Node]]:
    """Nodes that have addresses and do not run."""
    async with serve(count) as nodes:
        for node in nodes:
            await node.kill()
        yield nodes


# --- dead, and coming ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_node_that_is_dead_at_the_start_comes_later() -> None:
    keys = chain(3)
    async with starting(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        result = await fetch_blocks(client, namespace, keys)
        assert result.outcomes == [UNAVAILABLE] * 3
        assert [type(error) for error in result.errors] == [TransportError]
        assert "127.0.0.1" in str(result.errors[0])
        put = await client.put(namespace, keys, contents(keys))
        assert put.outcomes == [PutOutcome.UNAVAILABLE] * 3
        found = await client.lookup(namespace, keys)
        assert (found.prefix, found.unreachable) == (0, uris(nodes))
        with pytest.raises(TransportError):
            await client.delete(namespace, keys)
        assert isinstance((await client.status())[nodes[0].uri], TransportError)
        assert client.reports() == {nodes[0].uri: None}
        assert await client.release([]) == 0
        await nodes[0].start()
        await comes_back(client, namespace, keys)
        await store_blocks(client, namespace, keys)
        assert (await fetch_blocks(client, namespace, keys)).ok


@pytest.mark.asyncio
async def test_all_is_decided_without_waiting_when_nobody_is_there() -> None:
    keys = chain(200)
    async with starting(4) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        handle = client.fetch(namespace, keys, room(200), deadline_s=600)
        assert (await handle).outcomes == [UNAVAILABLE] * 200
        await handle.quiesced()


@pytest.mark.asyncio
async def test_a_restarted_node_is_found_again_with_its_namespaces() -> None:
    keys = chain(3)
    async with serve(1) as nodes, connected(nodes) as client:
        first, second = await open_pool(client), await open_pool(client, 64)
        await store_blocks(client, first, keys)
        await nodes[0].kill()
        assert (await fetch_blocks(client, first, keys)).outcomes == [UNAVAILABLE] * 3
        await nodes[0].start()
        await comes_back(client, first, keys)
        status = (await client.status())[nodes[0].uri]
        report = client.report(nodes[0].name)
        assert not isinstance(status, Exception)
        assert report is not None
        assert report.boot_id == status.report.boot_id == nodes[0].server.boot_id
        assert client.reports() == {nodes[0].uri: report}
        assert client.counters()["reconnects"] == 1
        # Nobody had opened them in this life but the client by itself.
        for namespace in (first, second):
            assert (await fetch_blocks(client, namespace, keys)).outcomes == [MISS] * 3
            await store_blocks(client, namespace, keys)
            assert (await fetch_blocks(client, namespace, keys)).ok


@pytest.mark.asyncio
@pytest.mark.slow
async def test_no_request_reaches_a_restarted_node_before_its_namespaces() -> None:
    keys = chain(2)
    async with serve(1) as nodes, connected(nodes) as client:
        opened = [await open_pool(client, 64, hash_seed=str(number)) for number in range(12)]
        await nodes[0].kill()
        await nodes[0].start()
        while True:
            results = await asyncio.gather(
                *(fetch_blocks(client, namespace, keys) for namespace in opened)
            )
            if all(result.outcomes == [MISS, MISS] for result in results):
                break
            for result in results:
                assert not any(isinstance(error, RefusedError) for error in result.errors)


@pytest.mark.asyncio
async def test_a_namespace_opened_while_the_node_is_away() -> None:
    keys = chain(2)
    async with serve(1) as nodes, connected(nodes) as client:
        await nodes[0].kill()
        await until(lambda: not is_up(client))
        namespace = await open_pool(client)
        await nodes[0].start()
        await comes_back(client, namespace, keys)
        await store_blocks(client, namespace, keys)


@pytest.mark.asyncio
async def test_the_wrong_kind_of_server_is_no_node() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and never says a word
        uri = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        async with connected(uri, connect_timeout_s=0.05) as client:
            namespace = await open_pool(client)
            result = await fetch_blocks(client, namespace, chain(1))
            assert result.outcomes == [UNAVAILABLE]


# --- pools ---------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dtype": "float8_e4m3"}, "dtype"),
        ({"weights_digest": "v2"}, "weights_digest"),
        ({"block_tokens": 32}, "block_tokens"),
        ({"tp_rank": 1, "tp_size": 2}, "tp_size"),
        ({"extras": (("lora", "a"),)}, "extras"),
    ],
)
async def test_a_pinned_pool_names_what_differs(fields: dict[str, object], field: str) -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        generation = generation_id("pool", layout(*LAYERS))
        for node in nodes:
            node.source.administer_pool(
                Pool(action=PoolAction.PIN, pool="pool", generation=generation)
            )
        with pytest.raises(LayoutMismatch, match=field) as caught:
            await open_pool(client, **fields)
        assert caught.value.field == field
        await store_blocks(client, namespace, chain(2))
        assert (await client.lookup(await open_pool(client), chain(2))).prefix == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("found_out_by", ["fetch", "put", "lookup"])
async def test_a_generation_that_was_retired_is_opened_again_by_itself(found_out_by: str) -> None:
    keys = chain(2)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        nodes[0].source.administer_pool(
            Pool(action=PoolAction.RETIRE, pool="pool",
                 generation=generation_id("pool", layout(*LAYERS)))
        )  # fmt: skip
        if found_out_by == "fetch":
            result = await fetch_blocks(client, namespace, keys)
            assert result.outcomes == [UNAVAILABLE] * 2
            assert "not open" in str(result.errors[0])
        elif found_out_by == "put":
            put = await client.put(namespace, keys, contents(keys))
            assert put.outcomes == [PutOutcome.UNAVAILABLE] * 2
        else:
            found = await client.lookup(namespace, keys)
            assert (found.prefix, list(found.refused)) == (0, [nodes[0].uri])
        await until(lambda: nodes[0].source.namespaces("pool"), "it is open again")
        await until(lambda: client.cluster._links[0].refusal(namespace) is None)
        assert (await fetch_blocks(client, namespace, keys)).outcomes == [MISS] * 2
        await store_blocks(client, namespace, keys)


def info(pools: list[PoolInfo] | KVStoreError) -> PoolInfo:
    """The only pool of an answer."""
    assert not isinstance(pools, KVStoreError), pools
    return pools[0]


@pytest.mark.asyncio
async def test_pools_are_administered_at_all_daemons() -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace, other = await open_pool(client), await open_pool(client, 64)
        ends = uris(nodes)
        assert list(await client.pools()) == ends
        for pool in (await client.pools("pool")).values():
            generations = [generation.generation for generation in info(pool).generations]
            assert generations == [namespace.generation, other.generation]
        assert await client.pools("nobodys") == {end: [] for end in ends}
        bounded = await client.set_pool_capacity("pool", 8192)
        assert [info(pool).capacity_bytes for pool in bounded.values()] == [8192] * 2
        pinned = await client.pin_pool("pool", namespace.generation)
        assert [info(pool).pinned for pool in pinned.values()] == [namespace.generation] * 2
        with pytest.raises(LayoutMismatch, match="layer_bytes"):
            await open_pool(client, 128)
        # Pinned, it cannot be retired: each daemon says so by itself.
        refusals = await client.retire_generation("pool", namespace.generation)
        assert [type(refusal) for refusal in refusals.values()] == [RefusedError] * 2
        assert {info(pool).pinned for pool in (await client.unpin_pool("pool")).values()} == {b""}
        for pool in (await client.retire_generation("pool", other.generation)).values():
            assert [g.generation for g in info(pool).generations] == [namespace.generation]
        # One that is down is named, and the others do it.
        await nodes[0].kill()
        await until(lambda: not is_up(client))
        answers = await client.set_pool_capacity("pool", 0)
        assert isinstance(answers[ends[0]], TransportError)
        assert info(answers[ends[1]]).capacity_bytes == 0


@pytest.mark.asyncio
async def test_what_no_pool_can_be_is_not_asked_for() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        for call, text in (
            (client.pools("a b"), "pool 'a b'"),
            (client.unpin_pool(""), "pool ''"),
            (client.pin_pool("pool", b"short"), "generation=b'short'"),
            (client.retire_generation("pool", "0" * 32), "generation="),  # type: ignore[arg-type]
            (client.set_pool_capacity("pool", -1), "capacity_bytes=-1"),
            (client.set_pool_capacity("pool", 1 << 63), "capacity_bytes=9"),
        ):
            with pytest.raises(LocalProtocolError, match=text):
                await call
        assert nodes[0].counter("requests_pool") == 0
        assert (await client.lookup(namespace, chain(1))).prefix == 0


# --- many nodes ----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_one_of_four_daemons_dead_costs_its_extents_and_not_the_prefix() -> None:
    async with serve(4) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        keys = chain_with_owners(uris(nodes), FOUR)
        await store_blocks(client, namespace, keys)
        assert [node.stored_count() for node in nodes] == [64] * 4
        await nodes[2].kill()
        await until(lambda: not is_up(client, 2))
        lost = [not 128 <= index < 192 for index in range(256)]
        found = await client.lookup(namespace, keys)
        assert (found.hits, found.unreachable) == (lost, [nodes[2].uri])
        result = await fetch_blocks(client, namespace, keys)
        assert [outcome is HIT for outcome in result.outcomes] == lost
        assert set(result.outcomes[128:192]) <= {MISS, UNAVAILABLE}
        # What is computed again goes to the second owner, where readers look next.
        put = await client.put(namespace, keys[:192], contents(keys[128:192]), first=128)
        assert put.outcomes == [PutOutcome.STORED] * 64
        assert (await client.lookup(namespace, keys)).prefix == 256
        assert (await fetch_blocks(client, namespace, keys)).ok
        # And is found there also by those who see the first owner alive again, and empty.
        await nodes[2].start()
        await until(lambda: is_up(client, 2))
        async with connected(nodes) as other:
            assert (await fetch_blocks(other, await open_pool(other), keys)).ok


@pytest.mark.asyncio
async def test_a_daemon_that_dies_under_a_fetch_costs_what_had_not_come() -> None:
    async with serve(4) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        keys = chain_with_owners(uris(nodes), FOUR)
        await store_blocks(client, namespace, keys)
        gate = nodes[1].gate
        gate.chunk_bytes, gate.chunks_left = 4096, 10
        into = room(256)
        handle = client.fetch(namespace, keys, into)
        await until(lambda: gate.chunks_left == 0)
        await nodes[1].kill()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.outcomes.count(HIT) >= 192
        assert HIT not in result.outcomes[74:128]
        assert result.hit_count + result.outcomes.count(UNAVAILABLE) == 256
        assert any(isinstance(error, TransportError) for error in result.errors)


@pytest.mark.asyncio
async def test_two_copies_survive_the_loss_of_any_daemon() -> None:
    async with serve(3) as nodes, connected(nodes, copies=2) as client:
        namespace = await open_pool(client)
        keys = chain_with_owners(uris(nodes), [(0,), (1,), (2,)])
        put = await client.put(namespace, keys, contents(keys))
        assert put.outcomes == [PutOutcome.STORED] * 192
        assert sum(node.stored_count() for node in nodes) == 384
        await nodes[1].kill()
        assert (await fetch_blocks(client, namespace, keys)).ok
        assert (await client.lookup(namespace, keys)).prefix == 192
        # A put reaches the copy that is left.
        more = chain_with_owners(uris(nodes), [(1,)], seed=5)
        stored = await client.put(namespace, more, contents(more))
        assert stored.outcomes == [PutOutcome.STORED] * 64


@pytest.mark.asyncio
async def test_two_copies_of_one_daemon_are_one() -> None:
    keys = chain(3)
    async with serve(1) as nodes, connected(nodes, copies=2) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        assert nodes[0].stored_count() == 3
        assert (await fetch_blocks(client, namespace, keys)).ok


@pytest.mark.asyncio
async def test_a_deletion_reaches_every_copy_or_says_that_it_did_not() -> None:
    async with serve(3) as nodes, connected(nodes, copies=2) as client:
        namespace = await open_pool(client)
        keys = chain_with_owners(uris(nodes), [(0, 1)])
        await store_blocks(client, namespace, keys)
        assert all(await client.delete(namespace, keys))
        assert [node.stored_count() for node in nodes] == [0, 0, 0]
        await nodes[1].kill()
        with pytest.raises(KVStoreError):
            await client.delete(namespace, keys)


# --- going away ----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_daemon_that_drains_finishes_what_it_has_begun() -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        keys = chain_with_owners(uris(nodes), [(0, 1)])
        await store_blocks(client, namespace, keys)
        gate = nodes[0].gate
        gate.chunk_bytes, gate.chunks_left = 4096, 1
        into = room(64)
        running = client.fetch(namespace, keys, into)
        await until(lambda: gate.chunks_left == 0)
        stopping = asyncio.ensure_future(nodes[0].server.stop())
        await until(lambda: not is_up(client), "the client knows")
        # New requests go elsewhere, at once.
        late = await fetch_blocks(client, namespace, keys)
        assert HIT not in late.outcomes
        assert "shutting down" in str(late.errors[0])
        put = await client.put(namespace, keys, contents(keys))
        assert put.outcomes == [PutOutcome.STORED] * 64
        assert nodes[1].stored_count() == 64
        # A namespace is opened without it, and there when it is back.
        assert (await open_pool(client, 64)).id != namespace.id
        gate.open()
        result = await running
        assert result.ok
        check_hits(result, keys, into)
        await stopping
        nodes[0].running = False
        nodes[0].check_released()
        assert (await fetch_blocks(client, namespace, keys)).ok


@pytest.mark.asyncio
async def test_a_drain_that_takes_too_long_breaks_off() -> None:
    keys = chain(4)
    async with serve(1, drain_s=0.01) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        nodes[0].gate.chunks_left = 0
        handle = client.fetch(namespace, keys, room(4))
        await until(lambda: nodes[0].server.connections and any(
            connection.busy for connection in nodes[0].server.connections))  # fmt: skip
        await nodes[0].server.stop()
        nodes[0].running = False
        nodes[0].check_released()
        assert (await handle).outcomes == [UNAVAILABLE] * 4
        await handle.quiesced()
