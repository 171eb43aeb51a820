"""Two paths and what happens when one is lost, slow, silent or lying.

The relays here are servers that call themselves agents, in front of a store of their own: what
counts is what the reader makes of them. Real agents are in `test_agent_relay.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.blocksource import RelayLoad
from kvstore.errors import ConfigError
from kvstore.messages import FetchOutcome, Role, ServedBy
from kvstore_client import AsyncClient, FetchResult, Namespace, spread
from kvstore_client.breaker import FAILURES_MAX
from kvstore_client.jobs import ANY_ROUTE
from kvstore_client.selector import Plan, PlannedRun
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    Node,
    chain,
    chain_with_owners,
    check_hits,
    connected,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
    uris,
)
from tests.support.engine import layout

HIT, MISS = FetchOutcome.HIT, FetchOutcome.MISS
DIRECT, RELAY = ServedBy.DIRECT, ServedBy.RELAY


@contextlib.asynccontextmanager
async def two_paths(
    keys: Sequence[bytes], daemons: int = 1, policy: str = "round_robin", **options: Any
) -> AsyncIterator[tuple[AsyncClient, Namespace, list[Node], Node]]:
    """Daemons and a relay that all have these blocks, and a client that knows both ways."""
    async with serve(daemons) as nodes, serve(1, name="relay", role=Role.AGENT) as (relay,):
        relay.source.relay_load = lambda: RelayLoad(0, True)  # type: ignore[method-assign]
        async with connected([relay]) as writer:
            await store_blocks(writer, await open_pool(writer), keys)
        async with connected(nodes, relays=[relay.uri], policy=policy, **options) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            (link,) = client.cluster.relays.links
            await until(lambda: link.up)
            await until(lambda: client.cluster.reports.report(link.peer))
            await until(lambda: not link.refusal(namespace))
            yield client, namespace, nodes, relay


async def turn(client: AsyncClient, relay_next: bool = True) -> None:
    """Make the relay the next in turn."""
    await until(lambda: any_willing(client))
    client.cluster.relays._selector._turn = 1 if relay_next else 0


def any_willing(client: AsyncClient) -> bool:
    """Whether a fresh report of a willing relay has come."""
    return client.cluster.relays.spare(ANY_ROUTE, asyncio.get_running_loop().time()) is not None


async def fetched(
    client: AsyncClient, namespace: Namespace, keys: Sequence[bytes], **options: Any
) -> FetchResult:
    """Fetch into fresh memory, and check every hit."""
    into = room(len(keys))
    handle = client.fetch(namespace, keys, into, **options)
    result = await handle
    await handle.quiesced()
    check_hits(result, keys, into)
    return result


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["block", "layer"])
async def test_a_request_goes_by_the_relay_and_says_so(order: str) -> None:
    keys = chain(8)
    async with two_paths(keys) as (client, namespace, _, _):
        await turn(client)
        result = await fetched(client, namespace, keys, order=order)
        assert result.ok
        assert result.served_by == [RELAY] * 8
        assert {(run.path, run.peer) for run in result.runs} == {("relay", "relay-0")}
        assert result.plan.startswith("round_robin: ")
        assert client.counters()["fetch_bytes_relay"] == 8 * BLOCK_BYTES
        again = await fetched(client, namespace, keys, order=order)
        assert again.served_by == [DIRECT] * 8


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["block", "layer"])
async def test_a_relay_that_dies_in_mid_stream_costs_no_answer(order: str) -> None:
    keys = chain(40)
    async with two_paths(keys) as (client, namespace, _, relay):
        await turn(client)
        relay.gate.chunk_bytes, relay.gate.chunks_left = BLOCK_BYTES, 5
        into = room(40)
        handle = client.fetch(namespace, keys, into, order=order)
        await until(lambda: relay.gate.chunks_left == 0)
        await relay.kill()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.ok, result.errors
        assert DIRECT in result.served_by
        assert result.errors
        assert {run.path for run in result.runs} == {"relay", "direct"}


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["block", "layer"])
async def test_a_relay_that_stalls_is_left(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "STALLED_S", 0.02)
    monkeypatch.setattr(spread, "LOOK_S", 0.01)
    keys = chain(40)
    async with two_paths(keys) as (client, namespace, _, relay):
        await turn(client)
        relay.gate.chunk_bytes, relay.gate.chunks_left = BLOCK_BYTES, 5
        into = room(40)
        handle = client.fetch(namespace, keys, into, order=order, deadline_s=60.0)
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.ok, result.errors
        assert result.served_by.count(DIRECT) >= 35
        before = [bytes(block) for block in into]
        relay.gate.open()
        await until(lambda: not relay.server.busy)
        assert [bytes(block) for block in into] == before
        assert client.counters()["blocks_moved"] >= 35


@pytest.mark.asyncio
async def test_the_last_word_on_what_was_taken_back_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spread, "STALLED_S", 0.02)
    monkeypatch.setattr(spread, "LOOK_S", 0.01)
    keys = chain(40)
    async with two_paths(keys) as (client, namespace, (node,), relay):
        await turn(client)
        relay.gate.chunk_bytes, relay.gate.chunks_left = BLOCK_BYTES, 5
        node.gate.chunks_left = 0
        into = room(40)
        handle = client.fetch(namespace, keys, into, deadline_s=60.0)
        await until(lambda: client.cluster.relays.inflight.ring[0].inflight_bytes == 0)
        # The relay answers the cancel while the blocks are on their way direct.
        await until(lambda: not relay.server.busy)
        await until(lambda: node.server.busy)
        node.gate.open()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.ok, result.errors
        assert not result.errors
        assert [run.path for run in result.runs] == ["relay", "direct"]
        assert node.counter("requests_fetch") == 1


@pytest.mark.asyncio
async def test_a_relay_that_trickles_is_left_for_the_idle_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spread, "CHUNK_BYTES_FIRST", 16 * BLOCK_BYTES)
    monkeypatch.setattr(spread, "CHUNK_BYTES_MIN", 16 * BLOCK_BYTES)
    monkeypatch.setattr(spread, "LATE_S_MIN", 0.01)
    monkeypatch.setattr(spread, "LOOK_S", 0.01)
    keys = chain(128)
    async with two_paths(keys, policy="balanced") as (client, namespace, _, relay):
        # Both are known, and the relay as fast.
        client.estimate_s(namespace, keys)
        for meter in (client.cluster.relays.inflight.direct, *client.cluster.relays.inflight.ring):
            meter.observed_Bps = 1e9
        relay.gate.chunk_bytes, relay.gate.chunks_left = BLOCK_BYTES, 1
        slow = asyncio.ensure_future(relay.gate.trickle(0.05))
        plan = client.cluster.relays.plan

        def half(spans: Any, *rest: Any) -> Plan:
            made = plan(spans, *rest)
            runs = [PlannedRun(0, 64, 0), PlannedRun(64, 128, 0, "relay-0")]
            return made._replace(runs=runs)

        monkeypatch.setattr(client.cluster.relays, "plan", half)
        result = await fetched(client, namespace, keys, deadline_s=60.0)
        assert result.ok, result.errors
        assert result.served_by.count(RELAY) < 32
        slow.cancel()
        relay.gate.open()


@pytest.mark.asyncio
async def test_bytes_of_another_block_by_a_relay_are_fetched_direct() -> None:
    keys = chain(8)
    async with two_paths(keys) as (client, namespace, _, relay):
        await turn(client)
        relay.damage(namespace, keys[3])
        result = await fetched(client, namespace, keys)
        assert result.ok
        assert result.served_by == [RELAY] * 3 + [DIRECT] + [RELAY] * 4
        assert client.counters()["corrupt_blocks"] == 1
        # It was told, and has dropped its copy.
        await until(lambda: relay.holds(namespace, keys[3]) == [False])


@pytest.mark.asyncio
async def test_a_relay_that_goes_on_sending_wrong_bytes_is_left_alone() -> None:
    keys = chain(8)
    async with two_paths(keys) as (client, namespace, _, relay):
        relay.damage(namespace, keys[3])
        # It does not mend itself.
        relay.source.check = lambda _, keys: bytes(len(keys))  # type: ignore[method-assign]
        for _ in range(FAILURES_MAX):
            assert "breaker_openings" not in client.counters()
            await turn(client)
            result = await fetched(client, namespace, keys)
            assert result.ok
            assert result.served_by.count(DIRECT) == 1
        assert client.counters()["breaker_openings"] == 1
        client.cluster.relays._refreshed_at = -1.0
        client.cluster.relays._selector._turn = 1
        result = await fetched(client, namespace, keys)
        assert result.served_by == [DIRECT] * 8


@pytest.mark.asyncio
async def test_what_a_relay_does_not_have_comes_direct_and_a_miss_is_a_miss() -> None:
    keys = chain(8)
    async with two_paths(keys[:6]) as (client, namespace, _, relay):
        relay.source.delete(namespace.id, [keys[2]])
        await turn(client)
        result = await fetched(client, namespace, keys)
        assert result.outcomes == [HIT] * 6 + [MISS] * 2
        assert result.served_by[2] == DIRECT


@pytest.mark.asyncio
async def test_blocks_of_a_daemon_that_is_down_here_come_by_the_relay() -> None:
    async with two_paths(chain(1), daemons=2, policy="balanced") as (
        client,
        namespace,
        nodes,
        relay,
    ):
        keys = chain_with_owners(uris(nodes), [(0, 1), (1, 0)])
        async with connected([relay], node_id="writer") as writer:
            await store_blocks(writer, await open_pool(writer), keys)
        await store_blocks(client, namespace, keys)
        await turn(client)
        await nodes[0].kill()
        await until(lambda: not client.cluster._links[0].up)
        result = await fetched(client, namespace, keys)
        assert result.ok, result.errors
        assert result.served_by == [RELAY] * 64 + [DIRECT] * 64


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["block", "layer"])
async def test_a_daemon_that_dies_in_mid_stream_costs_no_answer(order: str) -> None:
    keys = chain(40)
    async with two_paths(keys) as (client, namespace, (node,), _):
        await turn(client, relay_next=False)
        node.gate.chunk_bytes, node.gate.chunks_left = BLOCK_BYTES, 5
        into = room(40)
        handle = client.fetch(namespace, keys, into, order=order)
        await until(lambda: node.gate.chunks_left == 0)
        await node.kill()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.ok, result.errors
        assert RELAY in result.served_by


@pytest.mark.asyncio
async def test_both_paths_dead_is_unavailable_and_no_hang() -> None:
    keys = chain(4)
    async with two_paths(keys) as (client, namespace, (node,), relay):
        await turn(client)
        await relay.kill()
        await node.kill()
        result = await fetched(client, namespace, keys)
        assert result.outcomes == [FetchOutcome.UNAVAILABLE] * 4


@pytest.mark.asyncio
async def test_a_cancelled_fetch_is_quiet_on_both_paths() -> None:
    keys = chain(40)
    async with two_paths(keys) as (client, namespace, (node,), relay):
        for number in range(2):
            await turn(client, relay_next=bool(number))
            for one in (node, relay):
                one.gate.chunk_bytes, one.gate.chunks_left = BLOCK_BYTES, 3
            into = room(40)
            handle = client.fetch(namespace, keys, into)
            await until(lambda: 0 in (node.gate.chunks_left, relay.gate.chunks_left))
            handle.cancel()
            await handle.quiesced()
            before = [bytes(block) for block in into]
            node.gate.open()
            relay.gate.open()
            await until(lambda: not (node.server.busy or relay.server.busy))
            assert [bytes(block) for block in into] == before


@pytest.mark.asyncio
async def test_an_endpoint_that_is_no_agent_is_not_used_as_a_relay() -> None:
    keys = chain(4)
    async with (
        serve(2) as nodes,
        connected(nodes[:1], relays=[nodes[1].uri], policy="round_robin") as client,
    ):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        await until(lambda: client.cluster.relays.links[0].up)
        for _ in range(3):
            assert (await fetched(client, namespace, keys)).served_by == [DIRECT] * 4


@pytest.mark.asyncio
async def test_an_estimate_begins_nothing() -> None:
    keys = chain(4)
    async with two_paths(keys, policy="balanced") as (client, namespace, (node,), _):
        before = node.counter("requests_fetch")
        assert 0 < client.estimate_s(namespace, keys) < 60
        assert client.estimate_s(namespace, keys, layers=range(1)) < client.estimate_s(
            namespace, keys
        )
        assert node.counter("requests_fetch") == before


@pytest.mark.asyncio
async def test_an_engine_that_starts_before_its_agent_goes_round_it_never(tmp_path: Path) -> None:
    keys = chain(4)
    async with (
        serve(1, name="peer", role=Role.AGENT) as (peer,),
        connected(f"unix://{tmp_path}/none.sock") as client,
    ):
        async with connected([peer]) as writer:
            await store_blocks(writer, await open_pool(writer), keys)
        namespace = Namespace("pool", layout(*LAYERS))
        result = await fetched(client, namespace, keys, peer=peer.uri)
        assert result.outcomes == [FetchOutcome.UNAVAILABLE] * 4
        assert "none.sock" in str(result.errors[0])


@pytest.mark.asyncio
async def test_a_daemon_is_no_peer() -> None:
    keys = chain(4)
    async with serve(2) as nodes, connected(nodes[:1]) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        result = await fetched(client, namespace, keys, peer=nodes[0].uri)
        assert result.outcomes == [FetchOutcome.UNAVAILABLE] * 4
        assert "is no agent" in str(result.errors[0])


@pytest.mark.asyncio
async def test_a_decode_node_that_keeps_nothing_is_told_of() -> None:
    keys = chain(4)
    async with two_paths(keys) as (client, namespace, _, _):
        result = await fetched(client, namespace, keys, decode_node="typo", retain_for=("r", 0))
        assert result.ok
        assert ["'typo' is none of our relays" in str(error) for error in result.errors] == [True]
        result = await fetched(client, namespace, keys, retain_for=("r", 0))
        assert ["without decode_node" in str(error) for error in result.errors] == [True]
        for name in ("relay-0", str(client.cluster.relays.links[0].endpoint)):
            result = await fetched(client, namespace, keys, decode_node=name, retain_for=("r", 0))
            assert not result.errors


@pytest.mark.asyncio
async def test_a_node_is_no_relay_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        serve(1) as nodes,
        serve(1, name="client", role=Role.AGENT) as (agent,),
        connected(nodes, relays=[agent.uri], node_id=agent.name) as client,
    ):
        await until(lambda: client.cluster.relays.links[0].up)
        client.cluster.relays.judge()
        assert not client.cluster.relays.inflight.relays
        assert "is this node itself" in caplog.text


def test_relays_are_a_list() -> None:
    with pytest.raises(ConfigError, match="must be a list"):
        AsyncClient("tcp://127.0.0.1:1", relays="tcp://127.0.0.1:2")
