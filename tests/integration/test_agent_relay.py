"""A real agent between real daemons and those who ask it: relay, peer, own loads, and refusals."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import PermissionDenied
from kvstore.messages import Fetch, FetchOutcome, FetchSource, PutOutcome, Retain, ServedBy
from kvstore.wire import FrameType
from kvstore_client import AsyncClient
from kvstore_client.placement import extents_of
from tests.support.agents import MIB, AgentNode, run_agents
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
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
)
from tests.support.engine import content, layout
from tests.support.rawpeer import RawPeer

pytestmark = pytest.mark.asyncio

HIT, MISS = FetchOutcome.HIT, FetchOutcome.MISS


def relay_request(namespace: bytes, keys: list[bytes], **fields: object) -> Fetch:
    values = {
        "layer_first": 0,
        "layer_last": len(LAYERS),
        "deadline_ms": 60_000,
        "source": FetchSource.RELAY,
        "extents": extents_of([keys[at - at % 64] for at in range(len(keys))], range(len(keys))),
        **fields,
    }
    return Fetch(namespace=namespace, keys=keys, **values)  # type: ignore[arg-type]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, for agents that must know each other before they start."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@asynccontextmanager
async def talking(uri: str, **options: Any) -> AsyncIterator[RawPeer]:
    """Somebody who speaks the protocol by hand; what waits for a reply is for a thread."""
    with await asyncio.to_thread(partial(RawPeer, uri, **options)) as peer:
        yield peer


@asynccontextmanager
async def relayed(
    ends: Sequence[Node] | str, agent: AgentNode, **options: Any
) -> AsyncIterator[AsyncClient]:
    """A client that takes turns between storage and an agent, and knows both."""
    async with connected(ends, relays=[agent.uri], policy="round_robin", **options) as client:
        await until(lambda: client.report(agent.name), "the agent has told of its load")
        yield client


def ask(uri: str, keys: list[bytes], **fields: object) -> tuple[bytes, bytes]:
    """Fetch from an agent by hand; runs on a thread."""
    with RawPeer(uri) as peer:
        namespace = peer.open_namespace(layout(*LAYERS))
        peer.send(FrameType.FETCH, relay_request(namespace, keys, **fields))
        return peer.take_fetch()


async def test_a_block_comes_through_an_agent() -> None:
    async with serve(2) as nodes, run_agents(nodes) as (agent,):
        keys = chain(100)
        async with connected(nodes) as client:
            await store_blocks(client, await open_pool(client), keys)
        payload, outcomes = await asyncio.to_thread(ask, agent.uri, keys)
        assert outcomes == bytes(len(keys))
        assert payload == b"".join(content(name, BLOCK_BYTES) for name in keys)
        assert agent.counter("relay_bytes_out") == len(payload)


async def test_a_client_loads_by_both_paths_and_says_which() -> None:
    async with serve(2) as nodes, run_agents(nodes) as (agent,):
        keys = chain(100)
        async with relayed(nodes, agent) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            ways = set()
            for _ in range(4):
                result = await fetch_blocks(client, namespace, keys)
                assert result.ok, result.errors
                ways |= set(result.served_by)
            assert ways == {ServedBy.DIRECT, ServedBy.RELAY}


@pytest.mark.parametrize("order", ["block", "layer"])
async def test_layers_in_order_through_an_agent(order: str) -> None:
    async with serve() as nodes, run_agents(nodes) as (agent,):
        keys = chain(20)
        async with relayed(nodes, agent) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            for _ in range(4):
                result = await fetch_blocks(client, namespace, keys, order=order)
                assert result.ok, result.errors
        assert agent.counter("relay_bytes_out") > 0


async def test_a_relay_keeps_to_its_rate_and_yields(tmp_path: Path) -> None:
    rates = {"relay_rate_Bps": 8 * MIB, "link_rate_Bps": 64 * MIB, "interface": "lo"}
    async with serve() as nodes, run_agents(nodes, local=tmp_path, **rates) as (agent,):
        keys = chain(100)
        async with connected(nodes) as client, connected(agent.local) as engine:
            await store_blocks(client, await open_pool(client), keys)
            payload, outcomes = await asyncio.to_thread(ask, agent.uri, keys)
            assert outcomes == bytes(len(keys))
            assert payload == b"".join(content(name, BLOCK_BYTES) for name in keys)
            result = await fetch_blocks(engine, await open_pool(engine), keys)
            assert result.ok
        assert agent.agent.source._pacer is not None
        assert agent.agent.source._pacer._taken_bytes == len(payload)
        assert agent.agent._counter is not None
    assert agent.agent._counter is None, "its descriptor is given back"


async def test_misses_are_told_and_hide_nothing() -> None:
    async with serve() as nodes, run_agents(nodes) as (agent,):
        keys = chain(6)
        async with connected(nodes) as client:
            await store_blocks(client, await open_pool(client), keys[:2] + keys[4:])
        _, outcomes = await asyncio.to_thread(ask, agent.uri, keys)
        assert outcomes == bytes([HIT, HIT, MISS, MISS, HIT, HIT])


async def test_two_askers_of_one_block_cause_one_read() -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(8)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        node.gate.chunks_left = 0
        asked = [asyncio.create_task(asyncio.to_thread(ask, agent.uri, keys)) for _ in range(3)]
        await until(lambda: agent.counter("relay_requests") == 3)
        node.gate.open()
        for payload, outcomes in await asyncio.gather(*asked):
            assert outcomes == bytes(len(keys))
            assert payload == b"".join(content(name, BLOCK_BYTES) for name in keys)
        assert node.counter("fetch_bytes") == len(keys) * BLOCK_BYTES
        assert agent.counter("relay_joined") >= 2 * len(keys)


async def test_bytes_go_on_before_the_request_is_whole() -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(3)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        node.gate.chunk_bytes = 1000
        node.gate.chunks_left = 1
        async with talking(agent.uri) as peer:
            namespace = await asyncio.to_thread(peer.open_namespace, layout(*LAYERS))
            peer.send(FrameType.FETCH, relay_request(namespace, keys))
            frame = await asyncio.to_thread(peer.receive)
            assert frame.payload == content(keys[0], BLOCK_BYTES)[:1000]
            node.gate.open()
            payload, outcomes = await asyncio.to_thread(peer.take_fetch)
            assert outcomes == bytes(3)
            assert len(payload) == 3 * BLOCK_BYTES - 1000


@pytest.mark.slow
async def test_who_reads_nothing_holds_a_window_and_no_more() -> None:
    size = 512 * 1024
    async with (
        serve(arena_bytes=40 * size, listen="tcp://127.0.0.1:0") as (node,),
        run_agents([node], memory_bytes=16 * MIB) as (agent,),
    ):
        keys = chain(32)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client, size), keys, deadline_s=30)
        async with talking(agent.uri, receive_buffer_bytes=4096) as peer:
            namespace = await asyncio.to_thread(peer.open_namespace, layout(size))
            request = relay_request(namespace, keys, layer_last=1)
            peer.send(FrameType.FETCH, request)
            pool = agent.agent.source.pool
            await until(lambda: pool.pinned_count and not agent.agent.source.fills.under_way)
            # A quarter of the pool.
            assert pool.pinned_count <= 4 * MIB // size
            assert node.counter("fetch_bytes") <= pool.block_count * size < len(keys) * size
            payload, outcomes = await asyncio.to_thread(peer.take_fetch)
        assert outcomes == bytes(len(keys))
        assert payload == b"".join(content(name, size) for name in keys)


@pytest.mark.parametrize("reads", [False, True])
async def test_an_asker_that_dies_leaves_nothing_behind(reads: bool) -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(64)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        node.gate.chunks_left = 1
        node.gate.chunk_bytes = 3000
        async with talking(agent.uri) as peer:
            namespace = await asyncio.to_thread(peer.open_namespace, layout(*LAYERS))
            peer.send(FrameType.FETCH, relay_request(namespace, keys))
            await until(lambda: node.gate.given)
            if reads:
                await asyncio.to_thread(peer.receive)
        await agent.left_alone()
        agent.check_released()
        assert agent.counter("fills_cancelled") == 1
        node.gate.open()


async def test_storage_that_dies_on_the_way_leaves_unavailable_blocks() -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(8)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        node.gate.chunks_left = 2
        node.gate.chunk_bytes = BLOCK_BYTES
        asked = asyncio.create_task(asyncio.to_thread(ask, agent.uri, keys))
        await until(lambda: node.gate.given == 2)
        await until(lambda: agent.counter("relay_bytes_out") == 2 * BLOCK_BYTES)
        await node.kill()
        payload, outcomes = await asked
        assert payload == b"".join(content(name, BLOCK_BYTES) for name in keys[:2])
        assert outcomes == bytes([HIT] * 2 + [FetchOutcome.UNAVAILABLE] * 6)
        assert agent.agent.source.degraded


async def test_the_deadline_of_a_request_ends_it_everywhere() -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(8)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        node.gate.chunks_left = 0
        _, outcomes = await asyncio.to_thread(ask, agent.uri, keys, deadline_ms=50)
        assert outcomes == bytes([FetchOutcome.TIMEOUT]) * 8
        await until(lambda: not agent.agent.source.fills.under_way)
        node.gate.open()


@pytest.mark.slow
async def test_two_agents_that_relay_for_each_other_at_once_do_not_wait_in_a_circle(
    tmp_path: Path,
) -> None:
    async with serve(2) as nodes:
        keys = chain(192)
        async with connected(nodes) as client:
            await store_blocks(client, await open_pool(client), keys)
        uris = [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]
        common = {"local": tmp_path, "policy": "round_robin"}
        there = {"name": "other", "listen": uris[1:], "relays": (uris[0],), **common}
        async with (
            run_agents(nodes, listen=uris[:1], relays=(uris[1],), **common) as (one,),
            run_agents(nodes, **there) as (other,),
            connected(one.local) as engine,
            connected(other.local) as second,
        ):
            for agent, name in ((one, other.name), (other, one.name)):
                await until(partial(agent.agent.cluster.reports.report, name))
            spaces = [await open_pool(engine), await open_pool(second)]
            for at in range(0, len(keys), 64):
                # The same blocks at the same time, each by way of the other.
                results = await asyncio.gather(
                    fetch_blocks(engine, spaces[0], keys[: at + 64], first=0),
                    fetch_blocks(second, spaces[1], keys[: at + 64], first=0),
                )
                for result in results:
                    assert result.ok, result.errors
            assert one.counter("relay_requests") + other.counter("relay_requests") > 0
            # By its engine, and for that of the other node: nobody asks back.
            assert one.counter("requests_open_namespace") == 2
            assert other.counter("requests_open_namespace") == 2


# --- an engine at its own agent ------------------------------------------------------------


async def test_an_engine_puts_looks_up_and_loads_through_its_agent(tmp_path: Path) -> None:
    async with serve(2) as nodes, run_agents(nodes, local=tmp_path) as (agent,):
        keys = chain(100)
        async with connected(agent.local) as engine, connected(nodes) as other:
            namespace = await open_pool(engine)
            await store_blocks(engine, namespace, keys)
            found = await other.lookup(await open_pool(other), keys)
            assert found.prefix == len(keys), "placed where others look"
            found = await engine.lookup(namespace, keys, lease_s=5)
            assert (found.prefix, found.leased) == (len(keys), len(keys))
            assert sum(len(node.store.leases) for node in nodes) > 0
            assert await engine.release(found.leases) == len(found.leases)
            assert sum(len(node.store.leases) for node in nodes) == 0
            result = await fetch_blocks(engine, namespace, keys)
            assert result.ok
            assert set(result.served_by) == {ServedBy.HELD}
            assert await engine.delete(namespace, keys) == [True] * len(keys)
            assert not any((await engine.lookup(namespace, keys)).hits)
            assert agent.block(namespace, keys[0]) is None


async def test_an_engine_hears_why_from_behind_its_agent(tmp_path: Path) -> None:
    async with serve() as (node,), run_agents([node], local=tmp_path) as (agent,):
        keys = chain(4)
        async with connected(agent.local) as engine:
            namespace = await open_pool(engine)
            put = await engine.put(namespace, keys, contents(keys), ack="synced")
            assert put.outcomes == [PutOutcome.UNAVAILABLE] * 4
            assert any("only ack=memory" in str(error) for error in put.errors), put.errors
            await node.kill()
            await until(lambda: not agent.agent.cluster.reachable)
            result = await fetch_blocks(engine, namespace, chain(4, 100))
            assert result.outcomes == [FetchOutcome.UNAVAILABLE] * 4
            assert any(node.uri in str(error) for error in result.errors), result.errors
            found = await engine.lookup(namespace, keys)
            assert (found.prefix, found.unreachable) == (0, [node.uri])
            await node.start()


async def test_an_engine_that_is_gone_leaves_no_lease_at_storage(tmp_path: Path) -> None:
    async with serve() as (node,), run_agents([node], local=tmp_path) as (agent,):
        keys = chain(4)
        async with connected(agent.local) as engine:
            namespace = await open_pool(engine)
            await store_blocks(engine, namespace, keys)
            assert (await engine.lookup(namespace, keys, lease_s=60)).leased == 4
        await until(lambda: not len(node.store.leases), "its leases are given back")


async def test_own_loads_go_by_other_nodes_too(tmp_path: Path) -> None:
    async with serve(2) as nodes, run_agents(nodes) as (relay,):
        keys = chain(256)
        async with connected(nodes) as client:
            await store_blocks(client, await open_pool(client), keys)
        options = {"relays": (relay.uri,), "policy": "round_robin"}
        async with (
            run_agents(nodes, name="other", local=tmp_path, **options) as (agent,),
            connected(agent.local) as engine,
        ):
            await until(lambda: agent.agent.cluster.reports.report(relay.name))
            namespace = await open_pool(engine)
            ways: set[ServedBy] = set()
            for at in range(0, 256, 64):
                result = await fetch_blocks(engine, namespace, keys[at : at + 64], chain=False)
                assert result.hit_count in (0, 64)
                ways |= set(result.served_by)
            result = await fetch_blocks(engine, namespace, keys)
            assert result.ok, result.errors
            ways |= set(result.served_by)
            assert ServedBy.RELAY in ways
            assert relay.counter("relay_bytes_out") > 0


# --- what an engine is to have -------------------------------------------------------------


async def test_a_decode_engine_claims_what_its_agent_has_relayed(tmp_path: Path) -> None:
    async with serve() as (node,), run_agents([node], local=tmp_path) as (agent,):
        keys = chain(8)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        retain = Retain(request="turn-7", attempt=1)
        node.gate.chunks_left = 1
        node.gate.chunk_bytes = BLOCK_BYTES
        asked = asyncio.create_task(asyncio.to_thread(ask, agent.uri, keys, retain=retain))
        async with connected(agent.local) as engine, connected(agent.local) as stranger:
            namespace = await open_pool(engine)
            await until(lambda: agent.counter("relay_bytes_out"))
            claimed = await engine.claim("turn-7", 1)  # while the relay still streams
            assert claimed.block_count == 8
            assert claimed.bytes == BLOCK_BYTES
            node.gate.open()
            await asked
            again = await engine.claim("turn-7", 1)
            assert again.lease == claimed.lease
            assert again.bytes == 8 * BLOCK_BYTES
            assert not (await stranger.claim("turn-7", 1)).found
            assert not (await engine.claim("turn-8", 1)).found
            read = node.counter("fetch_bytes")
            result = await fetch_blocks(engine, namespace, keys)
            assert set(result.served_by) == {ServedBy.HELD}
            assert node.counter("fetch_bytes") == read
            assert await engine.release([claimed.lease]) == 1
            assert agent.counter("retained_blocks") == 0


async def test_what_nobody_claims_ends_by_itself() -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(4)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        retain = Retain(request="turn", lease_ms=1)
        await asyncio.to_thread(ask, agent.uri, keys, retain=retain)
        await until(lambda: agent.counter("retentions_expired") == 1)
        assert agent.counter("retained_blocks") == 0


async def test_retained_blocks_go_on_coming_when_their_asker_has_died() -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(8)
        async with connected([node]) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
        node.gate.chunks_left = 0
        async with talking(agent.uri) as peer:
            opened = await asyncio.to_thread(peer.open_namespace, layout(*LAYERS))
            retain = Retain(request="turn")
            peer.send(FrameType.FETCH, relay_request(opened, keys, retain=retain))
            await until(lambda: agent.counter("relay_requests"))
        await until(lambda: not agent.agent.server.connections)
        node.gate.open()
        await until(lambda: not agent.agent.source.fills.under_way)
        for name in keys:
            block = agent.block(namespace, name)
            assert block is not None
            assert block.complete
        agent.end_leases()


async def test_an_older_attempt_keeps_nothing_any_more() -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(8)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        new, old = Retain(request="turn", attempt=2), Retain(request="turn", attempt=1)
        await asyncio.to_thread(ask, agent.uri, keys[:3], retain=new)
        await asyncio.to_thread(ask, agent.uri, keys, retain=old)
        assert agent.counter("retained_blocks") == 3
        agent.end_leases()


# --- path peer -----------------------------------------------------------------------------


async def test_a_decode_node_pulls_from_a_peer_and_storage_is_read_once(tmp_path: Path) -> None:
    async with serve(2) as nodes, run_agents(nodes, 2, local=tmp_path) as (prefill, decode):
        keys = chain(64)
        async with connected(nodes) as client:
            await store_blocks(client, await open_pool(client), keys)
        async with connected(prefill.local) as first, connected(decode.local) as second:
            space = await open_pool(first)
            assert (await fetch_blocks(first, space, keys, retain_for=("turn", 0))).ok
            result = await fetch_blocks(second, await open_pool(second), keys, peer=prefill.uri)
            assert result.ok
            assert set(result.served_by) == {ServedBy.PEER}
        assert sum(node.counter("fetch_bytes") for node in nodes) == 64 * BLOCK_BYTES
        assert prefill.counter("peer_bytes_out") == 64 * BLOCK_BYTES
        prefill.end_leases()


async def test_what_is_computed_is_pulled_layer_by_layer_while_it_is_offered(
    tmp_path: Path,
) -> None:
    async with serve() as nodes, run_agents(nodes, 2, local=tmp_path) as (prefill, decode):
        keys = chain(8)
        blocks = [memoryview(content(name, BLOCK_BYTES)) for name in keys]
        ends = (0, 1000, 4000, 4096)
        async with connected(prefill.local) as first, connected(decode.local) as second:
            space, pulled = await open_pool(first), await open_pool(second)
            into = room(len(keys))
            handle = second.fetch(
                pulled, keys, into, order="layer", peer=prefill.uri, wait_s=10, deadline_s=20
            )
            for layer in range(3):
                part = [block[ends[layer] : ends[layer + 1]] for block in blocks]
                offered = await first.offer(space, keys, part, layers=range(layer, layer + 1))
                assert offered.ok, offered
                assert await handle.layer(layer), "it comes before the next one is computed"
            result = await handle
            await handle.quiesced()
            assert result.ok
            check_hits(result, keys, into)
        assert nodes[0].counter("fetch_bytes") == 0
        prefill.end_leases()


async def test_what_a_peer_lacks_comes_from_storage(tmp_path: Path) -> None:
    async with serve() as (node,), run_agents([node], 2, local=tmp_path) as (prefill, decode):
        keys = chain(8)
        async with connected([node]) as client:
            await store_blocks(client, await open_pool(client), keys)
        async with connected(prefill.local) as first, connected(decode.local) as second:
            assert (await fetch_blocks(first, await open_pool(first), keys[:5])).ok
            result = await fetch_blocks(second, await open_pool(second), keys, peer=prefill.uri)
            assert result.ok, result.errors
            assert result.served_by == [ServedBy.PEER] * 5 + [ServedBy.DIRECT] * 3
            gone = "tcp://127.0.0.1:1"
            more = chain(4, 100)
            await store_blocks(first, await open_pool(first), more)
            result = await fetch_blocks(second, await open_pool(second), more, peer=gone)
            assert result.ok, result.errors


# --- who may do what -----------------------------------------------------------------------


async def refusal(
    agent: AgentNode, keys: list[bytes], node_id: str = "raw", **fields: object
) -> str:
    """Why an agent refuses a fetch of another node."""

    def talk() -> str:
        with RawPeer(agent.uri) as peer:
            namespace = peer.open_namespace(layout(*LAYERS))
            peer.send(FrameType.FETCH, relay_request(namespace, keys, **fields))
            frame = peer.receive()
            assert frame.header.type is FrameType.ERROR, frame
            return f"{frame.message.code}: {frame.message.message}"

    return await asyncio.to_thread(talk)


async def test_other_nodes_are_refused_what_is_for_engines_of_this_one() -> None:
    async with serve() as nodes, run_agents(nodes) as (agent,):
        keys = chain(2)
        assert "permission" in await refusal(agent, keys, source=FetchSource.ANY)
        assert "one hop only" in await refusal(agent, keys, hops=1)
        assert "extents of 3 keys" in await refusal(agent, keys, extents=((3, keys[0]),))
        async with connected(agent.uri) as client:
            namespace = await open_pool(client)
            result = await client.put(namespace, keys, room(2))
            assert any(isinstance(error, PermissionDenied) for error in result.errors)
            with pytest.raises(PermissionDenied):
                await client.delete(namespace, keys)
        await until(lambda: not agent.agent.server.connections)


async def test_a_pool_is_read_by_its_readers_only() -> None:
    readers = {"pool": frozenset({"friend"})}
    async with serve() as nodes, run_agents(nodes, pool_readers=readers) as (agent,):
        async with connected(agent.uri, node_id="friend") as client:
            namespace = await open_pool(client)
        async with connected(agent.uri, node_id="stranger") as client:
            with pytest.raises(PermissionDenied, match="stranger may not read pool pool"):
                await open_pool(client)

        def guess() -> str:
            with RawPeer(agent.uri, node_id="stranger") as peer:
                peer.send(FrameType.FETCH, relay_request(namespace.id, chain(1)))
                return str(peer.receive().message.code)

        assert await asyncio.to_thread(guess) == "namespace"


async def test_without_memory_an_agent_is_not_willing_and_says_so() -> None:
    async with serve() as nodes, run_agents(nodes, memory_bytes=MIB) as (agent,):
        keys = chain(4)
        async with connected(nodes) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
        source = agent.agent.source
        held = []
        for name in chain(240, 1000):
            block = source.pool.reserve(namespace, name)
            assert block is not None
            source.pool.pin(block)
            held.append(block)
        assert "busy" in await refusal(agent, keys)
        await until(lambda: not agent.agent.server.report().willing)
        assert agent.counter("relay_refused_busy") == 1
        # Then all goes direct.
        async with relayed(nodes, agent) as client:
            result = await fetch_blocks(client, await open_pool(client), keys)
            assert result.ok, result.errors
        for block in held:
            source.pool.unpin(block)
        assert source.willing


async def test_a_report_of_corrupt_blocks_drops_the_bad_copy_only() -> None:
    async with serve() as (node,), run_agents([node]) as (agent,):
        keys = chain(3)
        async with connected([node]) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            await asyncio.to_thread(ask, agent.uri, keys)
            block = agent.block(namespace, keys[1])
            assert block is not None
            block.view[-1] ^= 1
            async with relayed([node], agent) as reader:
                space = await open_pool(reader)
                for _ in range(4):
                    result = await fetch_blocks(reader, space, keys)
                    assert result.ok, (result.outcomes, result.errors)
            assert agent.counter("blocks_corrupt") == 1
            await until(lambda: node.server.counters["requests_corrupt_report"])
            assert agent.block(namespace, keys[0]) is not None


async def test_an_agent_that_drops_idle_blocks_is_a_buffer_and_no_cache(tmp_path: Path) -> None:
    async with (
        serve() as (node,),
        run_agents([node], local=tmp_path, drop_idle=True) as (agent,),
        connected([node]) as writer,
        connected(agent.local) as engine,
    ):
        keys = chain(8)
        await store_blocks(writer, await open_pool(writer), keys)
        namespace = await open_pool(engine)
        pool = agent.agent.source.pool
        for _ in range(2):
            result = await fetch_blocks(engine, namespace, keys)
            assert result.served_by == [ServedBy.DIRECT] * len(keys), "nothing was held"
            await until(lambda: not pool.block_count)
        # What is kept for somebody stays until he lets it go.
        handle = engine.offer(namespace, keys, contents(keys), retain_for=("turn", 1))
        assert (await handle).outcomes == [PutOutcome.STORED] * len(keys)
        await handle.quiesced()
        assert pool.block_count == len(keys)
        claimed = await engine.claim("turn", 1)
        assert claimed.block_count == len(keys)
        assert await engine.release([claimed.lease]) == 1
        await until(lambda: not pool.block_count)
