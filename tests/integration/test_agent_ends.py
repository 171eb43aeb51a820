"""What an agent does for others ends well: whoever leaves, is refused, or is sent damaged bytes."""

from __future__ import annotations

import asyncio
import gc
import threading
from functools import partial
from pathlib import Path

import pytest

from kvstore import serving
from kvstore.buffers import Region
from kvstore.layout import namespace_id
from kvstore.messages import (
    Error,
    Fetch,
    FetchOutcome,
    FetchSource,
    Lookup,
    LookupReply,
    OpenNamespace,
    Release,
    ServedBy,
    encode,
)
from kvstore.wire import FrameType, encode_header
from kvstore_client import LookupResult
from kvstore_client.agent.agent import Agent
from kvstore_client.agent.options import AgentOptions
from tests.support.agents import MIB, AgentNode, run_agents
from tests.support.cluster import (
    LAYERS,
    chain,
    connected,
    fetch_blocks,
    open_pool,
    serve,
    store_blocks,
    until,
)
from tests.support.engine import layout
from tests.support.rawpeer import RawPeer

pytestmark = pytest.mark.asyncio

POOL_ID = namespace_id("pool", layout(*LAYERS))


def relay_all(uri: str, keys: list[bytes]) -> bytes:
    """Have an agent relay blocks of one extent; their outcomes. Runs on a thread."""
    with RawPeer(uri) as peer:
        request = Fetch(
            namespace=peer.open_namespace(layout(*LAYERS)),
            keys=keys,
            layer_first=0,
            layer_last=len(LAYERS),
            deadline_ms=60_000,
            source=FetchSource.RELAY,
            extents=((len(keys), keys[0]),),
        )
        peer.send(FrameType.FETCH, request)
        return peer.take_fetch()[1]


def forget(agent: AgentNode, keys: list[bytes]) -> None:
    """Have an agent hold none of these blocks."""
    pool = agent.agent.source.pool
    for name in keys:
        block = pool.find(POOL_ID, name)
        if block is not None:
            pool.drop(block)


async def test_damaged_copies_at_a_relay_cost_an_engine_behind_its_agent_nothing(
    tmp_path: Path,
) -> None:
    async with serve() as nodes, run_agents(nodes, name="relay") as (relay,):
        relays = (relay.uri,)
        async with (
            run_agents(nodes, local=tmp_path, name="own", relays=relays, policy="round_robin") as (
                agent,
            ),
            connected(agent.local) as engine,
        ):
            keys = chain(64)
            namespace = await open_pool(engine)
            await store_blocks(engine, namespace, keys)
            await until(lambda: agent.agent.cluster.reports.report(relay.name), "a report")
            assert not any(await asyncio.to_thread(relay_all, relay.uri, keys))
            for name in keys:
                block = relay.block(namespace, name)
                assert block is not None
                block.view[-1] ^= 1
            ways: set[ServedBy] = set()
            for _ in range(4):
                forget(agent, keys)
                result = await fetch_blocks(engine, namespace, keys)
                assert result.outcomes == [FetchOutcome.HIT] * len(keys), result.errors
                ways.update(result.served_by)
            assert ways == {ServedBy.DIRECT, ServedBy.RELAY}
        await until(lambda: relay.counter("blocks_corrupt"), "the relay was told")


def ask_and_vanish(uri: str) -> None:
    """Close the connection right behind a request, in the middle of the next one."""
    with RawPeer(uri) as peer:
        message = Lookup(namespaces=(peer.open_namespace(layout(*LAYERS)),), keys=chain(3))
        metadata = encode(message)
        header = encode_header(FrameType.LOOKUP, 9, metadata)
        peer.sock.sendall(header + metadata + header[:4])


async def test_who_asks_and_vanishes_leaves_no_answer_behind() -> None:
    async with serve() as nodes, run_agents(nodes) as (agent,):
        for _ in range(3):
            await asyncio.to_thread(ask_and_vanish, agent.uri)
        await until(lambda: not agent.agent.server.connections, "the agent has noticed")
        gc.collect()  # says so if an answer was made and never waited for


async def test_an_agent_stops_at_once_while_engines_have_leases(tmp_path: Path) -> None:
    async with serve() as nodes, run_agents(nodes, local=tmp_path) as (agent,):
        keys = chain(5)
        async with connected(agent.local) as engine:
            namespace = await open_pool(engine)
            await store_blocks(engine, namespace, keys)
            found = await engine.lookup(namespace, keys, lease_s=10.0)
            assert found.leases
            await agent.kill()
            gc.collect()


def release_twice(uri: str, keys: list[bytes]) -> None:
    with RawPeer(uri) as peer:
        lookup = Lookup(
            namespaces=(peer.open_namespace(layout(*LAYERS)),),
            keys=keys,
            lease_ms=60_000,
            extents=((len(keys), keys[0]),),
        )
        found = peer.call(FrameType.LOOKUP, lookup)
        assert isinstance(found, LookupReply)
        assert found.lease
        released = peer.call(FrameType.RELEASE, Release(leases=(found.lease, found.lease)))
        assert released.held == (True, True)


async def test_a_lease_that_is_given_back_twice_in_one_request_ends(tmp_path: Path) -> None:
    async with serve() as nodes, run_agents(nodes, local=tmp_path) as (agent,):
        keys = chain(5)
        async with connected(agent.local) as engine:
            await store_blocks(engine, await open_pool(engine), keys)
            await asyncio.to_thread(release_twice, agent.local, keys)
            assert not len(nodes[0].store.leases)


def open_others(uri: str, count: int) -> None:
    """Ask for namespaces that storage refuses."""
    with RawPeer(uri) as peer:
        for number in range(count):
            other = layout(*LAYERS, model_id=f"model {number}")
            refused = peer.call(FrameType.OPEN_NAMESPACE, OpenNamespace(pool="pool", layout=other))
            assert isinstance(refused, Error)


async def test_namespaces_that_storage_refuses_are_not_kept() -> None:
    async with serve() as nodes, run_agents(nodes) as (agent,), connected(nodes) as client:
        await client.pin_pool("pool", (await open_pool(client)).generation)
        await asyncio.to_thread(open_others, agent.uri, 20)
        cluster = agent.agent.cluster
        assert not cluster._namespaces
        for link in cluster._links:
            wanted = link._namespaces
            assert [*wanted._wanted, *wanted._refusals, *wanted._answered] == []
        # Those that it takes are open as before.
        await asyncio.to_thread(partial(relay_all, agent.uri, chain(2)))
        assert set(cluster._namespaces) == {POOL_ID}


async def test_a_stop_waits_for_answers_of_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "DRAIN_POLL_S", 0)
    async with serve() as nodes, run_agents(nodes, local=tmp_path) as (agent,):
        keys = chain(5)
        async with connected(agent.local) as engine:
            namespace = await open_pool(engine)
            await store_blocks(engine, namespace, keys)
            cluster, may_ask = agent.agent.cluster, asyncio.Event()
            ask = cluster.lookup

            async def lookup(*terms: object) -> LookupResult:
                await may_ask.wait()
                return await ask(*terms)  # type: ignore[arg-type]

            monkeypatch.setattr(cluster, "lookup", lookup)
            looking = asyncio.create_task(engine.lookup(namespace, keys))
            await until(lambda: agent.counter("requests_lookup"), "the agent was asked")
            stop = asyncio.create_task(agent.agent.stop(30.0))
            for _ in range(50):
                await asyncio.sleep(0)
            assert not stop.done()
            may_ask.set()
            await stop
            agent.running = False
            assert (await looking).prefix == len(keys)


async def test_memory_is_touched_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    touch = Region.touch

    def noted(region: Region) -> None:
        threads.append(threading.current_thread())
        touch(region)

    monkeypatch.setattr(Region, "touch", noted)
    async with serve() as nodes:
        options = AgentOptions(
            storage=(nodes[0].uri,),
            node_id="agent",
            listen=("tcp://127.0.0.1:0",),
            local="",
            memory_bytes=MIB,
        )
        async with Agent(options):
            pass
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
