"""Peers that stall or vanish in the middle: bounded waits, and memory that is free at `quiet`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvstore.errors import TransportError, TransportTimeout
from kvstore.messages import Data, Empty, FetchOutcome, PutDone, PutOutcome, Tier, Want
from kvstore.wire import FrameType, Header
from kvstore_client import AsyncClient, breaker, link
from kvstore_client.breaker import BreakerState, CircuitBreaker
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    MIB,
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
from tests.support.peers import FETCH, PUT, Proxy, Talk, proxied, scripted

HIT, TIMEOUT, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE
SENTINEL = 0xA5


@asynccontextmanager
async def behind_a_proxy(
    arena_bytes: int = 64 * MIB,
) -> AsyncIterator[tuple[Node, Proxy, AsyncClient]]:
    """One node, and a client that reaches it through a proxy."""
    async with (
        serve(1, arena_bytes=arena_bytes) as nodes,
        proxied(nodes[0].uri) as proxy,
        connected(proxy.uri) as client,
    ):
        yield nodes[0], proxy, client


def stain(into: list[bytearray]) -> list[bytearray]:
    """Write over memory that is ours again; how it must stay."""
    for block in into:
        block[:] = bytes([SENTINEL]) * len(block)
    return [bytearray(block) for block in into]


# --- a fetch stalls ------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["deadline", "cancel"])
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("passed_bytes", [1, 60, 1000, 3000, 5000, 9000])
async def test_late_bytes_never_reach_memory_that_was_given_back(
    passed_bytes: int, order: str, end: str
) -> None:
    keys = chain(4)
    async with behind_a_proxy() as (_, proxy, client):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        proxy.hold_at["down", FETCH] = proxy.passed["down", FETCH] + passed_bytes
        into = room(4)
        deadline_s = 0.05 if end == "deadline" else 600
        handle = client.fetch(namespace, keys, into, order=order, deadline_s=deadline_s)
        await until(lambda: not proxy.hold_at)
        if end == "cancel":
            handle.cancel()
            assert handle.poll()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        expected = TIMEOUT if end == "deadline" else UNAVAILABLE
        assert expected in result.outcomes
        assert set(result.outcomes) <= {HIT, expected}
        clean = stain(into)
        before = proxy.passed["down", FETCH]
        proxy.let_go()
        # The connection was not given up: what comes late is drained, then it serves again.
        assert (await fetch_blocks(client, namespace, keys)).ok
        assert proxy.passed["down", FETCH] - before > 4 * BLOCK_BYTES
        assert proxy.accepted == 3
        assert into == clean


@pytest.mark.asyncio
async def test_large_blocks_cut_in_the_middle_of_a_payload() -> None:
    keys = chain(3)
    async with behind_a_proxy() as (_, proxy, client):
        namespace = await open_pool(client, MIB, MIB + 5, 3)
        await store_blocks(client, namespace, keys)
        size = namespace.geometry.block_bytes
        proxy.hold_at["down", FETCH] = proxy.passed["down", FETCH] + size + MIB // 2
        into = room(3, size)
        handle = client.fetch(namespace, keys, into, deadline_s=600)
        await until(lambda: not proxy.hold_at)
        handle.cancel()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.outcomes[1:] == [UNAVAILABLE, UNAVAILABLE]
        clean = stain(into)
        proxy.let_go()
        assert (await fetch_blocks(client, namespace, keys)).ok
        assert into == clean


@pytest.mark.asyncio
async def test_a_server_that_stalls_between_chunks() -> None:
    keys = chain(6)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        gate = nodes[0].gate
        gate.chunk_bytes, gate.chunks_left = BLOCK_BYTES, 2
        into = room(6)
        handle = client.fetch(namespace, keys, into, deadline_s=0.05)
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.outcomes == [HIT, HIT] + [TIMEOUT] * 4
        assert result.bytes == 2 * BLOCK_BYTES
        clean = stain(into)
        gate.open()
        assert (await fetch_blocks(client, namespace, keys)).ok
        assert into == clean
        # The daemon was told, or found out by itself.
        await until(lambda: not any(c.busy for c in nodes[0].server.connections))


@pytest.mark.asyncio
async def test_one_stalled_fetch_holds_up_no_other() -> None:
    async with serve(2) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        stuck, free = (chain_with_owners(uris(nodes), [(node,)])[:4] for node in (0, 1))
        await store_blocks(client, namespace, stuck)
        await store_blocks(client, namespace, free)
        nodes[0].gate.chunks_left = 0
        stalled = client.fetch(namespace, stuck, room(4), deadline_s=600)
        assert (await fetch_blocks(client, namespace, free)).ok
        assert (await client.lookup(namespace, stuck)).prefix == 4
        more = chain_with_owners(uris(nodes), [(0,)], seed=1)[:4]
        await store_blocks(client, namespace, more)
        assert not stalled.poll()
        stalled.cancel()
        await stalled.quiesced()


@pytest.mark.asyncio
async def test_cancelled_layers_wake_those_who_wait_for_them() -> None:
    keys = chain(2)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        gate = nodes[0].gate
        gate.chunk_bytes, gate.chunks_left = LAYERS[0], 2
        handle = client.fetch(namespace, keys, room(2), order="layer", deadline_s=600)
        assert await handle.layer(0)
        waiters = [asyncio.ensure_future(handle.layer(layer)) for layer in (1, 2)]
        await asyncio.sleep(0)
        handle.cancel()
        assert await asyncio.gather(*waiters) == [False, False]


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_peer_that_is_asked_and_never_answers_is_silent_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "SILENCE_MAX_S", 0.3)
    async with behind_a_proxy() as (_, proxy, client):
        peer = client.cluster._links[0]
        assert peer.up
        proxy.hold("down")
        for _ in range(1000):
            with pytest.raises(TransportError) as caught:
                await peer.call(FrameType.STATUS, Empty(), 0.02)
            if "silent" in str(caught.value):
                break
        else:
            pytest.fail("what we sent was taken for a sign of life")
        proxy.let_go()


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_peer_that_falls_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = chain(2)
    monkeypatch.setattr(link, "SILENCE_MAX_S", 0.3)
    async with behind_a_proxy() as (_, proxy, client):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        proxy.hold("down")
        handle = client.fetch(namespace, keys, room(2), deadline_s=600)
        result = await handle  # long before its deadline
        assert result.outcomes == [UNAVAILABLE] * 2
        assert "silent" in str(result.errors[0])
        await handle.quiesced()
        proxy.let_go()
        await until(lambda: client.cluster._links[0].up)
        assert (await fetch_blocks(client, namespace, keys)).ok


# --- busy is not sick ----------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("silent", [False, True])
async def test_fetches_that_time_out_together_are_one_failure_or_none(silent: bool) -> None:
    """A daemon that is late for twenty requests at once has been late once; and one that has
    sent something meanwhile lives."""
    many = 4 * breaker.FAILURES_MAX
    begun: list[tuple[Talk, int]] = []

    def on_fetch(talk: Talk, header: Header, metadata: bytes) -> None:
        begun.append((talk, header.request_id))
        if len(begun) == many and not silent:
            talk, request_id = begun[0]
            message = Data(checksums=bytes(8 * len(LAYERS)))
            talk.send(FrameType.DATA, request_id, message, bytes(100))

    async with scripted({FrameType.FETCH: on_fetch}) as server, connected(server.uri) as client:
        namespace = await open_pool(client)
        handles = [client.fetch(namespace, chain(1), room(1), deadline_s=0.2) for _ in range(many)]
        for handle in handles:
            assert (await handle).outcomes == [TIMEOUT]
            await handle.quiesced()
        assert len(begun) == many
        peer = client.cluster._links[0]
        assert peer.breaker.state is BreakerState.CLOSED
        assert peer.breaker._failure_count == silent
        assert client.counters().get("breaker_openings", 0) == 0


@pytest.mark.asyncio
async def test_nothing_is_sent_past_its_deadline() -> None:
    async with scripted({}) as server, connected(server.uri) as client:
        namespace = await open_pool(client)
        for _ in range(2 * breaker.FAILURES_MAX):
            found = await client.lookup(namespace, chain(3), deadline_s=0)
            assert found.unreachable == [server.uri]
            late = client.fetch(namespace, chain(1), room(1), deadline_s=0)
            assert (await late).outcomes == [TIMEOUT]
            with pytest.raises(TransportTimeout, match="not sent"):
                await client.cluster._links[0].call(FrameType.STATUS, Empty(), 0)
        assert server.count(FrameType.LOOKUP) == server.count(FrameType.FETCH) == 0
        assert server.count(FrameType.STATUS) == 0
        assert client.cluster._links[0].breaker._failure_count == 0


@pytest.mark.asyncio
async def test_a_link_that_cannot_be_brought_up_fails_once_an_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The daemon comes back and does not answer: one failure, not also one a namespace."""
    counted: list[float] = []
    real = CircuitBreaker.failure

    def failure(self: CircuitBreaker, now: float, *more: Any) -> None:
        before = self._failed_at
        real(self, now, *more)
        if self._failed_at != before:
            counted.append(now)

    monkeypatch.setattr(CircuitBreaker, "failure", failure)
    async with scripted({}) as server, connected(server.uri, connect_timeout_s=0.1) as client:
        await open_pool(client)
        del server.script[FrameType.OPEN_NAMESPACE]
        for talk in list(server.talks):
            talk.close()
        await until(lambda: server.count(FrameType.OPEN_NAMESPACE) == 3, "a second attempt")
        assert len(counted) == 2  # the loss, and the first attempt


@pytest.mark.asyncio
async def test_a_pause_is_drawn_and_not_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that lost a daemon together do not come back together."""
    monkeypatch.setattr(breaker, "DELAY_S_MIN", 1000.0)
    monkeypatch.setattr(breaker, "DELAY_S_MAX", 1_000_000.0)
    loop = asyncio.get_running_loop()
    pauses = []
    async with scripted({}) as server:
        for seed in (1, 2):
            async with connected(server.uri, seed=seed) as client:
                peer = client.cluster._links[0]
                for _ in range(breaker.FAILURES_MAX):
                    peer.failed()
                assert peer.breaker.retry_at is not None
                pauses.append(peer.breaker.retry_at - loop.time())
                assert client.counters()["breaker_openings"] == 1
    assert abs(pauses[0] - pauses[1]) > 10
    assert all(900 < pause < 1990 for pause in pauses)


# --- a put stalls --------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("end", ["deadline", "cancel"])
async def test_a_put_that_nobody_takes_gives_its_memory_back(end: str) -> None:
    keys = chain(24)
    async with behind_a_proxy() as (node, proxy, client):
        namespace = await open_pool(client, MIB)
        proxy.hold_at["up", PUT] = proxy.passed["up", PUT] + 3 * MIB // 2
        blocks = contents(keys, MIB)
        handle = client.put(namespace, keys, blocks, deadline_s=0.3 if end == "deadline" else 600)
        await until(lambda: not proxy.hold_at)
        if end == "cancel":
            handle.cancel()
        result = await handle
        await handle.quiesced()
        expected = PutOutcome.TIMEOUT if end == "deadline" else PutOutcome.UNAVAILABLE
        assert result.outcomes[2:] == [expected] * 22
        stain(blocks)
        proxy.let_go()
        await until(lambda: node.store.index.reserved_count == 0)
        # Whatever was acknowledged or stored has the bytes of the time of the put.
        await until(lambda: client.cluster._links[0].up)
        assert (await fetch_blocks(client, namespace, keys)).hit_count <= 3
        await store_blocks(client, namespace, chain(2, start=500))


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_server_that_says_done_and_reads_no_more_gives_the_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer is there, and the bytes that nobody wants any more still are to be read."""
    keys = chain(16)
    monkeypatch.setattr(link, "SILENCE_MAX_S", 600)

    def on_put(talk: Talk, header: Header, metadata: bytes) -> None:
        server.reading.clear()
        talk.send(FrameType.WANT, header.request_id, Want(indices=tuple(range(16))))
        # Later than the client can begin to send: when the socket's buffers are full.
        asyncio.get_running_loop().call_later(0.1, done, talk, header)

    def done(talk: Talk, header: Header) -> None:
        outcomes = bytes([PutOutcome.TIMEOUT]) * 16
        talk.send(FrameType.PUT_DONE, header.request_id, PutDone(outcomes=outcomes))

    async with scripted({FrameType.PUT: on_put}) as server, connected(server.uri) as client:
        namespace = await open_pool(client, MIB)
        handle = client.put(namespace, keys, contents(keys, MIB), deadline_s=600)
        result = await handle
        assert result.outcomes == [PutOutcome.TIMEOUT] * 16
        await handle.quiesced()


# --- someone vanishes ----------------------------------------------------------------------


def told_of_the_abandoned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """How the lines of the server begin that tell of requests without a client."""
    lines = [record.getMessage() for record in caplog.records if record.name == "kvstore.serving"]
    return [line.partition(" ended with")[0] for line in lines if "ended with the conn" in line]


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_client_that_vanishes_in_a_put_leaves_no_reservation(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keys = chain(8)
    async with behind_a_proxy() as (node, proxy, client):
        namespace = await open_pool(client, MIB // 2)
        proxy.hold_at["up", PUT] = proxy.passed["up", PUT] + 3 * MIB // 2
        handle = client.put(namespace, keys, contents(keys, MIB // 2), deadline_s=600)
        await until(lambda: not proxy.hold_at and node.store.index.reserved_count)
        if how == "reset":
            proxy.cut()
        else:
            await client.close()
        result = await handle
        await handle.quiesced()
        assert PutOutcome.UNAVAILABLE in result.outcomes
        proxy.let_go()
        await until(lambda: node.store.index.reserved_count == 0)
        if how == "reset":  # else it may have told the daemon before
            assert node.counter("requests_abandoned") == 1
            assert told_of_the_abandoned(caplog) == ["1 requests under way"]


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_client_that_vanishes_in_a_fetch_leaves_no_pin(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keys = chain(16)
    async with behind_a_proxy() as (node, proxy, client):
        namespace = await open_pool(client, MIB)
        await store_blocks(client, namespace, keys)
        proxy.hold_at["down", FETCH] = proxy.passed["down", FETCH] + 3 * MIB // 2
        into = room(16, MIB)
        handle = client.fetch(namespace, keys, into, deadline_s=600)
        await until(lambda: not proxy.hold_at)
        assert any(node.store.index.pins[1:])
        if how == "reset":
            proxy.cut()
        else:
            await client.close()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.outcomes == [HIT] + [UNAVAILABLE] * 15
        await until(lambda: not any(node.store.index.pins[1:]))
        if how == "reset":  # else it may have told the daemon before
            assert node.counter("requests_abandoned") == 1
            assert told_of_the_abandoned(caplog) == ["1 requests under way"]
        proxy.let_go()


@pytest.mark.asyncio
async def test_a_server_that_vanishes_is_an_error_in_the_result_and_no_exception() -> None:
    keys = chain(6)
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        gate = nodes[0].gate
        gate.chunk_bytes, gate.chunks_left = 1500, 4
        into = room(6)
        handle = client.fetch(namespace, keys, into, deadline_s=600)
        await until(lambda: gate.chunks_left == 0)
        await nodes[0].kill()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.outcomes[2:] == [UNAVAILABLE] * 4
        assert all(isinstance(error, TransportError) for error in result.errors)
        assert result.errors
        # Where a block was found its peer says in its last word, which never came.
        assert result.tiers == [Tier.NONE] * 6
        clean = stain(into)
        await nodes[0].start()
        await until(lambda: client.cluster._links[0].up)
        await store_blocks(client, namespace, keys)
        assert (await fetch_blocks(client, namespace, keys)).ok
        assert into == clean


@pytest.mark.asyncio
async def test_a_server_that_has_said_all_is_a_server_that_is_gone() -> None:
    keys = chain(2)
    async with behind_a_proxy() as (_, proxy, client):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        proxy.half_close()
        await until(lambda: not client.cluster._links[0].up)
        await until(lambda: client.cluster._links[0].up)
        assert (await fetch_blocks(client, namespace, keys)).ok
