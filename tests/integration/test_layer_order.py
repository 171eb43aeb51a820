"""order=layer where there is more than one way: a group of layers of all blocks before the next.

Relays are real agents, but where they have to lie: those are servers that call themselves agents.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.blocksource import FetchStream, RelayLoad
from kvstore.layout import PieceMap
from kvstore.messages import FetchOutcome, Role, ServedBy
from kvstore_client import AsyncClient, Namespace, spread
from kvstore_client.cluster import Cluster
from kvstore_client.selector import Plan, PlannedRun
from tests.support.agents import run_agents
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    PATIENCE_S,
    Gate,
    Node,
    chain,
    check_hits,
    connected,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
)

pytestmark = pytest.mark.asyncio

HIT, MISS = FetchOutcome.HIT, FetchOutcome.MISS
DIRECT, RELAY = ServedBy.DIRECT, ServedBy.RELAY
BLOCKS = 64
WAYS = ["direct", "relay", "both"]
SERVED_BY = {"direct": {DIRECT}, "relay": {RELAY}, "both": {DIRECT, RELAY}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipments of 16 KiB, whatever rate is known: 16 first, 5 second layers, or all third ones.
    Two of them are under way."""
    for name in ("CHUNK_BYTES_FIRST", "CHUNK_BYTES_MIN", "CHUNK_BYTES_MAX"):
        monkeypatch.setattr(spread, name, 4 * BLOCK_BYTES)
    monkeypatch.setattr(spread, "WINDOW_S", 0.0)


class Watched:
    """What is asked of a daemon, or of what calls itself a relay.

    Attributes:
        asked: For each request its keys and its layers.
        on_asked: Called with each request.
        late: What requests have to pass that begin behind the first layer.
    """

    def __init__(self, node: Node, on_asked: Callable[[], None] = lambda: None) -> None:
        self.on_asked = on_asked
        self.asked: list[tuple[list[bytes], range]] = []
        self.late = Gate()
        self._fetch = node.source.fetch
        node.source.fetch = self._note  # type: ignore[method-assign]

    def _note(
        self, namespace: bytes, keys: Sequence[bytes], pieces: PieceMap, *terms: Any
    ) -> FetchStream:
        self.on_asked()
        self.asked.append((list(keys), range(pieces.layer_first, pieces.layer_last)))
        stream: Any = self._fetch(namespace, keys, pieces, *terms)
        if pieces.layer_first:
            stream._gate = self.late
        return stream  # type: ignore[no-any-return]

    def times(self) -> Counter[tuple[bytes, int]]:
        """How often each layer of each block was asked for."""
        return Counter(
            (name, layer) for keys, layers in self.asked for name in keys for layer in layers
        )


def send(cluster: Cluster, way: str, relay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the blocks of each fetch go this way."""
    plan = cluster.relays.plan
    half = {"direct": BLOCKS, "relay": 0, "both": BLOCKS // 2}[way]
    runs = [PlannedRun(0, half, 0), PlannedRun(half, BLOCKS, 0, relay)]

    def planned(*args: Any) -> Plan:
        return plan(*args)._replace(runs=[run for run in runs if run[0] < run[1]])

    monkeypatch.setattr(cluster.relays, "plan", planned)


@contextlib.asynccontextmanager
async def bed(
    keys: Sequence[bytes], way: str, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> AsyncIterator[tuple[AsyncClient, Namespace, Node, Any]]:
    """A daemon that has blocks, an agent in front of it, and a client of both."""
    async with serve(1) as nodes, run_agents(nodes) as (agent,):
        values = {"policy": "round_robin", "deadline_s": 60.0, **options}
        async with connected(nodes, relays=[agent.uri], **values) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            (link,) = client.cluster.relays.links
            await until(lambda: client.report(agent.name), "the agent has told of its load")
            await until(lambda: not link.refusal(namespace))
            send(client.cluster, way, agent.name, monkeypatch)
            yield client, namespace, nodes[0], agent


@contextlib.asynccontextmanager
async def two_sources(
    keys: Sequence[bytes], way: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[AsyncClient, Namespace, Node, Node]]:
    """A daemon and a relay that both have the blocks."""
    async with serve(1) as nodes, serve(1, name="relay", role=Role.AGENT) as (relay,):
        relay.source.relay_load = lambda: RelayLoad(0, True)  # type: ignore[method-assign]
        async with connected([relay]) as writer:
            await store_blocks(writer, await open_pool(writer), keys)
        async with connected(
            nodes, relays=[relay.uri], policy="round_robin", deadline_s=60.0
        ) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            (link,) = client.cluster.relays.links
            await until(lambda: client.report(relay.name), "the relay has told of its load")
            await until(lambda: not link.refusal(namespace))
            send(client.cluster, way, relay.name, monkeypatch)
            yield client, namespace, nodes[0], relay


def once(keys: Sequence[bytes]) -> dict[tuple[bytes, int], int]:
    """Each layer of each block."""
    return {(name, layer): 1 for name in keys for layer in range(len(LAYERS))}


@pytest.mark.parametrize("way", WAYS)
async def test_the_first_layers_are_ready_before_any_other_has_left_storage(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain(BLOCKS)
    async with bed(keys, way, monkeypatch) as (client, namespace, node, _):
        watched, into = Watched(node), room(BLOCKS)
        watched.late.chunks_left = 0
        handle = client.fetch(namespace, keys, into, order="layer", group_layers=1)
        async with asyncio.timeout(PATIENCE_S):
            assert await handle.layer(0)
        assert handle.layers_ready == 1
        assert not watched.late.given
        watched.late.open()
        result = await handle
        await handle.quiesced()
        assert result.ok, result.errors
        check_hits(result, keys, into)
        assert set(result.served_by) == SERVED_BY[way]
        assert watched.times() == once(keys)
        assert sum(run.bytes for run in result.runs) == BLOCKS * BLOCK_BYTES


@pytest.mark.parametrize("way", ["direct", "relay"])
async def test_of_the_last_layers_nothing_is_asked_for_before_the_first_are_ready(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain(BLOCKS)
    async with two_sources(keys, way, monkeypatch) as (client, namespace, node, relay):
        ready: list[int] = []
        watched = Watched(relay if way == "relay" else node, lambda: ready.append(progress()))
        handle = client.fetch(namespace, keys, room(BLOCKS), order="layer", group_layers=1)

        def progress() -> int:
            return handle.layers_ready

        result = await handle
        await handle.quiesced()
        assert result.ok, result.errors
        firsts = [layers.start for _, layers in watched.asked]
        assert firsts == sorted(firsts)
        # 16 first layers in a request, 5 second ones, and what is left.
        assert firsts == [0] * 4 + [1] * 13 + [2] * (len(firsts) - 17)
        assert ready[firsts.index(2)] >= 1
        assert watched.times() == once(keys)


@pytest.mark.parametrize("way", ["direct", "relay"])
async def test_what_is_not_there_is_not_asked_for_again_with_each_group(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain(BLOCKS)
    missing = keys[3::4]
    async with two_sources(keys, way, monkeypatch) as (client, namespace, node, relay):
        for source in (node, relay):
            source.source.delete(namespace.id, missing)
        watched, into = [Watched(one) for one in (node, relay)], room(BLOCKS)
        handle = client.fetch(namespace, keys, into, order="layer", group_layers=1)
        result = await handle
        await handle.quiesced()
        expected = [MISS if name in missing else HIT for name in keys]
        assert result.outcomes == expected
        check_hits(result, keys, into)
        for one in watched:
            times = one.times()
            assert set(times.values()) <= {1}
            assert not {times[name, layer] for name in missing for layer in (1, 2)} - {0}
        assert not await handle.layer(0)


@pytest.mark.parametrize("way", ["relay", "both"])
async def test_an_agent_that_is_lost_between_two_groups_costs_no_answer(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain(BLOCKS)
    async with bed(keys, way, monkeypatch) as (client, namespace, node, agent):
        watched, into = Watched(node), room(BLOCKS)
        watched.late.chunks_left = 0
        handle = client.fetch(namespace, keys, into, order="layer", group_layers=1)
        async with asyncio.timeout(PATIENCE_S):
            assert await handle.layer(0)
        await agent.kill()
        watched.late.open()
        result = await handle
        await handle.quiesced()
        assert result.ok, result.errors
        assert handle.layers_ready == len(LAYERS)
        check_hits(result, keys, into)
        assert set(result.served_by) == {DIRECT}
        # What was here is not asked for again.
        assert {watched.times()[name, 0] for name in keys} == {1}


@pytest.mark.parametrize("way", ["direct", "both"])
async def test_a_daemon_that_is_lost_between_two_groups_costs_no_answer(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain(BLOCKS)
    async with two_sources(keys, way, monkeypatch) as (client, namespace, node, relay):
        watched, other, into = Watched(node), Watched(relay), room(BLOCKS)
        watched.late.chunks_left = 0
        handle = client.fetch(namespace, keys, into, order="layer", group_layers=1)
        async with asyncio.timeout(PATIENCE_S):
            assert await handle.layer(0)
        await node.kill()
        result = await handle
        await handle.quiesced()
        assert result.ok, result.errors
        check_hits(result, keys, into)
        assert RELAY in result.served_by
        assert max(other.times().values()) == 1


@pytest.mark.parametrize("way", WAYS[1:])
async def test_a_relay_that_stalls_between_two_groups_is_left(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "STALLED_S", 0.02)
    monkeypatch.setattr(spread, "LOOK_S", 0.01)
    keys = chain(BLOCKS)
    async with two_sources(keys, way, monkeypatch) as (client, namespace, _, relay):
        watched, into = Watched(relay), room(BLOCKS)
        watched.late.chunks_left = 3
        handle = client.fetch(namespace, keys, into, order="layer", group_layers=1)
        result = await handle
        await handle.quiesced()
        assert result.ok, result.errors
        check_hits(result, keys, into)
        assert client.counters()["blocks_moved"] > 0
        before = [bytes(block) for block in into]
        watched.late.open()
        await until(lambda: not relay.server.busy)
        assert [bytes(block) for block in into] == before


async def test_last_layers_that_a_relay_brings_damaged_come_direct(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = chain(BLOCKS)
    async with two_sources(keys, "relay", monkeypatch) as (client, namespace, node, relay):
        relay.damage(namespace, keys[5])  # its last byte
        watched, into = Watched(node), room(BLOCKS)
        handle = client.fetch(namespace, keys, into, order="layer", group_layers=1)
        result = await handle
        await handle.quiesced()
        assert result.ok, result.errors
        check_hits(result, keys, into)
        assert watched.asked == [([keys[5]], range(2, 3))]
        assert result.served_by == [RELAY] * 5 + [DIRECT] + [RELAY] * (BLOCKS - 6)
        assert client.counters()["corrupt_blocks"] == 1


async def test_a_fetch_that_is_cancelled_between_two_groups_is_quiet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = chain(BLOCKS)
    async with bed(keys, "both", monkeypatch) as (client, namespace, node, _):
        watched, into = Watched(node), room(BLOCKS)
        watched.late.chunks_left = 7
        handle = client.fetch(namespace, keys, into, order="layer", group_layers=1)
        async with asyncio.timeout(PATIENCE_S):
            assert await handle.layer(0)
        handle.cancel()
        await handle.quiesced()
        before = [bytes(block) for block in into]
        watched.late.open()
        await until(lambda: not node.server.busy)
        assert [bytes(block) for block in into] == before
        await until(lambda: not client.cluster._tasks)
        inflight = client.cluster.relays.inflight
        meters = (inflight.direct, *inflight.ring)
        assert [meter.inflight_bytes for meter in meters] == [0] * len(meters)


@pytest.mark.parametrize("way", WAYS)
async def test_an_engine_gets_first_layers_first_through_its_agent(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain(BLOCKS)
    async with serve(1) as nodes, run_agents(nodes) as (relay,):
        async with connected(nodes) as client:
            await store_blocks(client, await open_pool(client), keys)
        options: dict[str, Any] = {"relays": (relay.uri,), "policy": "round_robin"}
        async with (
            run_agents(nodes, name="other", local=tmp_path, **options) as (agent,),
            connected(agent.local, deadline_s=60.0) as engine,
        ):
            cluster = agent.agent.cluster
            await until(lambda: cluster.reports.report(relay.name))
            namespace = await open_pool(engine)
            (link,) = cluster.relays.links
            await until(lambda: not link.refusal(namespace))
            send(cluster, way, relay.name, monkeypatch)
            watched, into = Watched(nodes[0]), room(BLOCKS)
            watched.late.chunks_left = 0
            handle = engine.fetch(namespace, keys, into, order="layer", group_layers=1)
            async with asyncio.timeout(PATIENCE_S):
                assert await handle.layer(0)
            assert handle.layers_ready == 1
            watched.late.open()
            result = await handle
            await handle.quiesced()
            assert result.ok, result.errors
            check_hits(result, keys, into)
            assert watched.times() == once(keys)
            assert set(result.served_by) == SERVED_BY[way]


async def test_what_fits_into_one_request_is_one() -> None:
    keys = chain(3)
    async with (
        serve(1) as nodes,
        run_agents(nodes) as (agent,),
        connected(nodes, relays=[agent.uri], policy="direct") as client,
    ):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        watched = Watched(nodes[0])
        handle = client.fetch(namespace, keys, room(3), order="layer", group_layers=1)
        result = await handle
        await handle.quiesced()
        assert result.ok, result.errors
        assert watched.asked == [(keys, range(3))]
