"""What an agent keeps for others, and that it keeps nothing when they are gone or do not come:
askers that die, requests tried again or given up, pools without room, claims.

The agents are real. Daemons give out as much as a test lets them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstore.blocksource import RelayLoad
from kvstore.errors import Busy, PermissionDenied
from kvstore.loadreport import ReportTable
from kvstore.messages import (
    Error,
    ErrorCode,
    Fetch,
    FetchOutcome,
    FetchSource,
    ServedBy,
)
from kvstore.wire import FrameType
from kvstore_client import AsyncClient, spread
from kvstore_client.agent.memory import HeldBlock
from kvstore_client.jobs import ANY_ROUTE
from tests.support.agents import AgentNode, run_agents
from tests.support.bothways import (
    Scene,
    both_ways,
    counters_of,
    held,
    hold,
    idle,
    relay_next,
    settled,
    split,
    stain,
    stained,
)
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    MIB,
    chain,
    check_hits,
    connected,
    fetch_blocks,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
)
from tests.support.engine import key, layout
from tests.support.peers import FETCH, proxied
from tests.support.processes import agent as agent_process, daemon as daemon_process
from tests.support.rawpeer import RawPeer
from tests.support.tree import PACKAGES, ROOT

pytestmark = pytest.mark.asyncio

UNAVAILABLE = FetchOutcome.UNAVAILABLE
DIRECT, RELAY, HELD = ServedBy.DIRECT, ServedBy.RELAY, ServedBy.HELD
KEYS = chain(40)
RECEIVE_BUFFER_BYTES = 64 * 1024
# Where nobody listens.
NOBODY = "tcp://127.0.0.1:9"


# --- askers that die -----------------------------------------------------------------------


@contextmanager
def doomed(scene: Scene, count: int, request: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that asks for blocks by way of the agent; killed at the end in any case."""
    path = ":".join(dict.fromkeys(str(directory.parent) for directory in PACKAGES.values()))
    options = [scene.node.uri, scene.agent.uri, str(count), request]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.doomed", *options],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{path}"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
async def test_a_prefill_engine_that_is_killed_leaves_nothing_at_the_relay() -> None:
    async with both_ways(KEYS) as scene:
        hold(scene.node, 5)
        with doomed(scene, len(KEYS), "") as process:
            await held(scene.node)
            assert scene.agent.counter("pinned_blocks") > 0
            assert scene.agent.counter("fills_under_way") > 0
            process.send_signal(signal.SIGKILL)
            # While storage still has not sent the rest.
            await idle(scene.agent)
            assert scene.node.gate.chunks_left == 0
        assert scene.agent.counter("fills_cancelled") == 1
        assert scene.agent.counter("requests_abandoned") == 1
        await until(lambda: not any(scene.node.store.index.pins[1:]), "pins at storage")
        scene.node.gate.open()
        assert (await fetch_blocks(scene.client, scene.namespace, KEYS)).ok


@pytest.mark.slow
async def test_what_a_killed_engine_wanted_retained_still_comes_and_ends(tmp_path: Path) -> None:
    async with both_ways(KEYS, tmp_path) as scene:
        hold(scene.node, 5)
        with doomed(scene, len(KEYS), "request") as process:
            await held(scene.node)
            process.send_signal(signal.SIGKILL)
            await until(lambda: scene.agent.counter("requests_abandoned"))
        scene.node.gate.open()
        await idle(scene.agent)
        # The decode engine may have heard of the request already.
        assert scene.agent.counter("retained_blocks") == len(KEYS)
        async with connected(scene.agent.local) as engine:
            assert (await engine.claim("request", 1)).bytes == len(KEYS) * BLOCK_BYTES
        await until(lambda: not scene.agent.counter("retained_blocks"))


@pytest.mark.slow
async def test_connections_that_break_leave_nothing_at_the_relay() -> None:
    async with both_ways(KEYS) as scene:
        hold(scene.node, 5)
        into = room(len(KEYS))
        handle = scene.client.fetch(scene.namespace, KEYS, into)
        await held(scene.node)
        scene.compute.refuse()
        scene.compute.cut()
        await idle(scene.agent)
        assert scene.agent.counter("fills_cancelled") == 1
        scene.node.gate.open()
        result = await handle
        await handle.quiesced()
        check_hits(result, KEYS, into)
        assert result.ok
        assert DIRECT in result.served_by
        assert result.errors
        assert {run.path for run in result.runs} == {"relay", "direct"}
        assert not scene.agent.agent.server.sessions


# --- requests that are tried again, or given up --------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("given_up", ["before", "after", "never"])
async def test_a_newer_attempt_ends_what_the_older_one_retained(
    given_up: str, tmp_path: Path
) -> None:
    async with both_ways(KEYS, tmp_path) as scene:
        client, namespace = scene.client, scene.namespace
        hold(scene.node, 5)
        old, new = room(len(KEYS)), room(len(KEYS))
        decode = {"decode_node": scene.agent.name, "retain_s": 60}
        first = client.fetch(namespace, KEYS, old, retain_for=("request", 1), **decode)
        await held(scene.node)
        await until(lambda: scene.agent.counter("retained_blocks") == len(KEYS))
        if given_up == "before":
            first.cancel()
            await first.quiesced()
            stain(old)
        await relay_next(client)
        second = client.fetch(namespace, KEYS, new, retain_for=("request", 2), **decode)
        await until(lambda: scene.agent.counter("relay_requests") == 2)
        if given_up == "after":
            first.cancel()
            await first.quiesced()
            stain(old)
        scene.node.gate.open()
        result = await second
        await second.quiesced()
        check_hits(result, KEYS, new)
        assert result.served_by == [RELAY] * len(KEYS)
        await first
        await first.quiesced()
        await idle(scene.agent)
        if given_up != "never":
            assert stained(old)
        async with connected(scene.agent.local) as engine:
            assert not (await engine.claim("request", 1)).found
            claimed = await engine.claim("request", 2)
            assert claimed.block_count == len(KEYS)
            assert claimed.bytes == len(KEYS) * BLOCK_BYTES
            own = await fetch_blocks(engine, await open_pool(engine), KEYS)
            assert own.served_by == [HELD] * len(KEYS)
        await until(lambda: not scene.agent.counter("leased_bytes"), "all is given back")
        # One read at storage for all three.
        assert scene.agent.counter("storage_fetch_bytes_direct") == len(KEYS) * BLOCK_BYTES


async def test_a_straggler_of_an_older_attempt_retains_nothing(tmp_path: Path) -> None:
    async with both_ways(KEYS, tmp_path) as scene:
        decode = {"decode_node": scene.agent.name}
        for attempt, keys in ((2, KEYS[:8]), (1, KEYS)):
            await relay_next(scene.client)
            result = await fetch_blocks(
                scene.client, scene.namespace, keys, retain_for=("request", attempt), **decode
            )
            assert result.served_by == [RELAY] * len(keys)
        assert scene.agent.counter("retained_blocks") == 8
        async with connected(scene.agent.local) as engine:
            assert not (await engine.claim("request", 1)).found
            assert (await engine.claim("request", 2)).block_count == 8


@pytest.mark.slow
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("passed_bytes", [30, 5000, 40_000])
async def test_nothing_lands_in_the_memory_of_a_request_that_was_preempted(
    passed_bytes: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with both_ways(KEYS) as scene:
        split(monkeypatch, scene.client, len(KEYS) // 2)
        ways = (scene.direct, scene.compute)
        for way in ways:
            way.hold_at["down", FETCH] = way.passed["down", FETCH] + passed_bytes
        into = room(len(KEYS))
        handle = scene.client.fetch(scene.namespace, KEYS, into, order=order)
        await until(lambda: not any(way.hold_at for way in ways), "both paths are held")
        handle.cancel()
        result = await handle
        await handle.quiesced()
        assert {run.path for run in result.runs} == {"direct", "relay"}
        stain(into)
        at = [way.passed["down", FETCH] for way in ways]
        for way in ways:
            way.let_go()
        # Late bytes come by both, and the connections are good for what follows.
        await until(
            lambda: all(
                way.passed["down", FETCH] > before for way, before in zip(ways, at, strict=True)
            )
        )
        await idle(scene.agent)
        again = await fetch_blocks(scene.client, scene.namespace, KEYS, order=order)
        assert again.ok
        assert not again.errors
        assert stained(into)
        assert scene.client.counters().get("reconnects", 0) == 0


# --- a relay without room ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
async def test_a_relay_whose_pool_is_in_use_is_spared_or_refuses(told: bool) -> None:
    # The agent hears nothing from storage, so that four requests keep all of its pool.
    keys = chain(400)
    async with both_ways(keys, memory_bytes=MIB) as scene:
        source = scene.agent.agent.source
        scene.storage.hold("down")
        if not told:  # as if the news were still on their way
            source.relay_load = lambda: RelayLoad(0, True)  # type: ignore[method-assign]
        relays, endpoint = scene.client.cluster.relays, scene.agent.uri
        async with connected([scene.node], relays=[endpoint], policy="round_robin") as other:
            namespace, waiting = await open_pool(other), []
            for number in range(4):
                await relay_next(other)
                mine, into = keys[number * 64 : number * 64 + 64], room(64)
                handle = other.fetch(namespace, mine, into, chain=False, deadline_s=60)
                waiting.append((mine, into, handle))
                await until(lambda made=number: scene.agent.counter("relay_requests") > made)
            assert source.pool.reclaimable_bytes == 0
            if told:
                loop = asyncio.get_running_loop()
                await until(lambda: relays.spare(ANY_ROUTE, loop.time()) is None, "the news")
            else:
                await relay_next(scene.client)
            result = await fetch_blocks(scene.client, scene.namespace, keys)
            assert result.served_by == [DIRECT] * len(keys)
            assert any(isinstance(error, Busy) for error in result.errors) is not told
            assert (scene.agent.counter("relay_refused_busy") > 0) is not told
            scene.storage.let_go()
            for mine, into, handle in waiting:
                done = await handle
                await handle.quiesced()
                check_hits(done, mine, into)
                assert done.ok, done.errors
        await idle(scene.agent)
        assert source.willing


async def test_a_block_that_finds_no_room_goes_direct() -> None:
    # 64 KiB blocks, and what is free is in holes that are smaller.
    keys, size = chain(4), 64 * 1024
    async with both_ways(keys, memory_bytes=MIB, layers=[size]) as scene:
        pool = scene.agent.agent.source.pool
        small = await open_pool(scene.client)
        pinned: list[HeldBlock] = []
        while (block := pool.reserve(small, key(1000 + len(pinned)))) is not None:
            pool.pin(block)
            pinned.append(block)
        for block in pinned[::4]:
            pool.unpin(block)
        assert scene.agent.agent.source.willing
        await relay_next(scene.client)
        result = await fetch_blocks(scene.client, scene.namespace, keys)
        assert result.served_by == [DIRECT] * len(keys)
        assert {run.path for run in result.runs} == {"relay", "direct"}
        assert scene.agent.counter("relay_no_room") == len(keys)
        await idle_but(scene.agent, len(pinned) - len(pinned[::4]))
        for number, block in enumerate(pinned):
            if number % 4:
                pool.unpin(block)
        await relay_next(scene.client)
        result = await fetch_blocks(scene.client, scene.namespace, keys)
        assert result.served_by == [RELAY] * len(keys)


async def idle_but(agent: AgentNode, count: int) -> None:
    """Return when nothing is pinned beside what the test has pinned."""
    await until(lambda: agent.counter("pinned_blocks") == count)
    assert not agent.counter("fills_under_way")


async def test_what_is_retained_leaves_half_of_the_pool_to_work_with(tmp_path: Path) -> None:
    keys = chain(400)
    async with both_ways(keys, tmp_path, memory_bytes=MIB) as scene:
        decode = {"decode_node": scene.agent.name, "retain_s": 60}
        for name, part in (("one", keys[:192]), ("two", keys[192:])):
            await relay_next(scene.client)
            result = await fetch_blocks(
                scene.client, scene.namespace, part, retain_for=(name, 0), chain=False, **decode
            )
            assert result.served_by == [RELAY] * len(part)
        assert scene.agent.counter("retained_blocks") == MIB // BLOCK_BYTES // 2
        assert scene.agent.counter("leased_bytes") == MIB // 2
        assert scene.agent.counter("retentions_refused") >= 1
        async with connected(scene.agent.local) as engine:
            assert (await engine.claim("one")).block_count == 128
            own = await fetch_blocks(engine, await open_pool(engine), keys, chain=False)
            assert own.ok
            assert own.served_by[:128] == [HELD] * 128
        await idle(scene.agent)


@pytest.mark.slow
async def test_readers_that_stall_do_not_stop_others() -> None:
    keys = chain(18)
    with (
        daemon_process("--memory", "20MiB") as kvstored,
        agent_process("--storage", kvstored.uri, "--memory", "4MiB") as kvagent,
    ):
        async with connected(
            kvstored.uri, relays=[kvagent.uri], policy="round_robin", deadline_s=60.0
        ) as client:
            namespace = await open_pool(client, MIB)
            await store_blocks(client, namespace, keys)
            parts = [keys[:8], keys[8:16]]
            stalled = await asyncio.to_thread(stalled_readers, kvagent.uri, parts)
            # As long as the kernel takes what the readers do not, there is room.
            while not await spared(client):
                result = await fetch_blocks(client, namespace, keys[16:], chain=False)
                assert result.ok, result.errors
            result = await fetch_blocks(client, namespace, keys[16:], chain=False)
            assert result.served_by == [DIRECT] * 2
            counters = await counters_of(kvagent.uri)
            assert counters["pinned_blocks"] >= 2
            for peer in stalled:
                peer.sock.close()
            await settled(kvagent.uri, requests_abandoned=len(stalled), pinned_blocks=0)
            await settled(kvagent.uri, fills_under_way=0)
            await relay_next(client)
            result = await fetch_blocks(client, namespace, keys[16:], chain=False)
            assert result.served_by == [RELAY] * 2


async def spared(client: AsyncClient) -> bool:
    """Whether the next report says that the relay takes nothing more; else it is next in turn."""
    (link,) = client.cluster.relays.links
    last = client.cluster.reports.report(link.peer)
    await until(lambda: client.cluster.reports.report(link.peer) is not last, "a report")
    client.cluster.relays._selector._turn = 1
    report = client.cluster.reports.report(link.peer)
    assert report is not None
    return not report.willing


def stalled_readers(uri: str, parts: list[list[bytes]]) -> list[RawPeer]:
    """Askers that take nothing of what they get; runs on a thread."""
    # What the kernel keeps for them is small beside what each asks for.
    peers = [RawPeer(uri, RECEIVE_BUFFER_BYTES) for _ in parts]
    for peer, keys in zip(peers, parts, strict=True):
        opened = peer.open_namespace(layout(MIB))
        peer.send(FrameType.FETCH, request(opened, keys, layers=1))
    return peers


def request(
    namespace: bytes, keys: list[bytes], layers: int = len(LAYERS), **fields: object
) -> Fetch:
    """A fetch, by relay unless `fields` say otherwise; all keys are of one extent."""
    values = {"deadline_ms": 60_000, "source": FetchSource.RELAY, **fields}
    return Fetch(
        namespace=namespace,
        keys=keys,
        layer_first=0,
        layer_last=layers,
        extents=((len(keys), keys[0]),),
        **values,  # type: ignore[arg-type]
    )


# --- one hop only --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("memory_bytes", [MIB, 8 * MIB])
@pytest.mark.parametrize("same", [True, False])
async def test_two_agents_that_relay_for_each_other_wait_for_nobody(
    same: bool, memory_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is taken back: a deadlock would last until the deadline.
    monkeypatch.setattr(spread, "SILENT_S", 3600)
    monkeypatch.setattr(spread, "STALLED_S", 3600)
    # Nor is a relay passed over because the loop was busy since its last report.
    monkeypatch.setattr(ReportTable, "age", lambda table, now, node_id: 0.0)
    keys = chain(800)
    options = {"local": tmp_path, "memory_bytes": memory_bytes, "policy": "round_robin"}
    async with (
        serve(1, arena_bytes=4 * MIB) as nodes,
        proxied(NOBODY) as second,
        run_agents(nodes, name="first", relays=(second.uri,), **options) as (one,),
        run_agents(nodes, name="second", relays=(one.uri,), **options) as (two,),
    ):
        second.point_at(two.uri)
        async with (
            connected(nodes) as writer,
            connected(one.local, deadline_s=60.0) as engine_one,
            connected(two.local, deadline_s=60.0) as engine_two,
        ):
            await store_blocks(writer, await open_pool(writer), keys)
            fetches = []
            await asyncio.gather(relay_next(one.agent), relay_next(two.agent))
            for engine, mine in ((engine_one, keys[:400]), (engine_two, keys[-400:])):
                namespace = await open_pool(engine)
                wanted = keys[200:600] if same else mine
                fetches.append(fetch_blocks(engine, namespace, wanted, chain=False))
            await asyncio.gather(relay_next(one.agent), relay_next(two.agent))
            for result in await asyncio.gather(*fetches):
                assert result.ok, (result.outcomes, result.errors)
        for agent in (one, two):
            await idle(agent)
            assert agent.counter("relay_requests") > 0
            assert agent.counter("storage_blocks_moved") == 0
            assert agent.counter("requests_refused") == 0


@pytest.mark.parametrize("source", FetchSource)
async def test_what_was_passed_on_is_passed_on_no_further(
    source: FetchSource, tmp_path: Path
) -> None:
    async with both_ways(KEYS, tmp_path) as scene:

        def ask() -> Error:
            with RawPeer(scene.agent.local) as peer:
                opened = peer.open_namespace(layout(*LAYERS))
                message = request(opened, KEYS, source=source, hops=1)
                reply = peer.call(FrameType.FETCH, message)
                assert isinstance(reply, Error)
                return reply

        refusal = await asyncio.to_thread(ask)
        assert refusal.code is ErrorCode.REFUSED
        assert "one hop only" in refusal.message
        assert scene.agent.counter("requests_refused_refused") == 1
        assert scene.agent.counter("fills") == 0


class At(NamedTuple):
    """An address."""

    uri: str


async def test_agents_that_are_each_others_storage_ask_each_other_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # By its unix socket an agent would take the other one for an engine of its node.
    first, second = At(f"unix://{tmp_path}/first-0"), At(f"unix://{tmp_path}/second-0")
    async with (
        serve(1) as nodes,
        run_agents([second], local=tmp_path, name="first") as (one,),
        run_agents([first], local=tmp_path, name="second") as (two,),
    ):
        lines = [f"{agent.name} is the agent of a node" for agent in (one, two)]
        await until(lambda: all(line in caplog.text for line in lines), "both are told")
        # An engine of the node is told by what it gets, and a client by which way it comes.
        async with connected(one.local) as engine:
            result = await fetch_blocks(engine, await open_pool(engine), KEYS)
            assert result.outcomes == [UNAVAILABLE] * len(KEYS)
        async with connected(nodes, relays=[one.uri], policy="round_robin") as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, KEYS)
            for _ in range(2):
                result = await fetch_blocks(client, namespace, KEYS)
                assert result.served_by == [DIRECT] * len(KEYS)
        assert one.counter("requests_fetch") == 1
        assert two.counter("requests_fetch") == 0
        assert two.counter("requests_open_namespace") == 0
        assert one.agent.source.degraded


@pytest.mark.slow
async def test_an_agent_says_in_its_log_that_its_storage_is_an_agent() -> None:
    with (
        daemon_process() as kvstored,
        agent_process("--storage", kvstored.uri, "--node-id", "wrong") as other,
        agent_process("--storage", other.uri) as kvagent,
    ):
        line = await asyncio.to_thread(kvagent.wait_for_line, "is the agent of a node")
        assert "wrong" in line
        assert other.uri in line


@pytest.mark.slow
async def test_a_node_that_may_not_read_a_pool_here_gets_its_blocks_direct(
    caplog: pytest.LogCaptureFixture,
) -> None:
    readers = {"pool": frozenset({"somebody"})}
    async with both_ways(KEYS, pool_readers=readers) as scene:
        assert scene.agent.counter("requests_refused_permission") == 1
        for _ in range(2):
            await relay_next(scene.client)
            result = await fetch_blocks(scene.client, scene.namespace, KEYS)
            assert result.served_by == [DIRECT] * len(KEYS)
            (error,) = result.errors
            assert isinstance(error, PermissionDenied)
        assert "may not read pool pool" in caplog.text
        assert scene.agent.counter("requests_fetch") == 0
        await relay_next(scene.client)
        async with connected(
            [scene.node], relays=[scene.agent.uri], policy="round_robin", node_id="somebody"
        ) as reader:
            namespace = await open_pool(reader)
            await relay_next(reader)
            assert (await fetch_blocks(reader, namespace, KEYS)).served_by == [RELAY] * len(KEYS)


# --- claims --------------------------------------------------------------------------------


@pytest.mark.slow
async def test_an_engine_claims_while_the_relay_still_streams(tmp_path: Path) -> None:
    async with both_ways(KEYS, tmp_path) as scene, connected(scene.agent.local) as engine:
        own = await open_pool(engine)
        hold(scene.node, 5)
        into = room(len(KEYS))
        handle = scene.client.fetch(
            scene.namespace,
            KEYS,
            into,
            decode_node=scene.agent.name,
            retain_for=("request", 0),
        )
        await held(scene.node)
        await until(lambda: scene.agent.counter("relay_bytes_out"), "the first of them is here")
        claimed = await engine.claim("request", lease_s=60)
        assert claimed.block_count == len(KEYS)
        assert 0 < claimed.bytes <= 5 * BLOCK_BYTES
        pulled = asyncio.ensure_future(fetch_blocks(engine, own, KEYS))
        await until(lambda: scene.agent.counter("own_requests") == 1)
        scene.node.gate.open()
        result = await handle
        await handle.quiesced()
        check_hits(result, KEYS, into)
        assert result.served_by == [RELAY] * len(KEYS)
        assert (await pulled).ok
        assert scene.agent.counter("storage_fetch_bytes_direct") == len(KEYS) * BLOCK_BYTES
        again = await engine.claim("request", lease_s=60)
        assert again.lease.number == claimed.lease.number
        assert again.bytes == len(KEYS) * BLOCK_BYTES
        assert await engine.release([claimed.lease]) == 1
        assert scene.agent.counter("retained_blocks") == 0
        assert scene.agent.counter("leased_bytes") == 0


async def retained(scene: Scene, retain_s: float = 60) -> None:
    """Relay some blocks that the decode node's engine is to claim."""
    await relay_next(scene.client)
    result = await fetch_blocks(
        scene.client,
        scene.namespace,
        KEYS,
        decode_node=scene.agent.name,
        retain_for=("request", 3),
        retain_s=retain_s,
    )
    assert result.served_by == [RELAY] * len(KEYS)


@pytest.mark.slow
async def test_only_one_engine_gets_a_claim_and_as_often_as_it_asks(tmp_path: Path) -> None:
    async with (
        both_ways(KEYS, tmp_path) as scene,
        connected(scene.agent.local) as engine,
    ):
        await retained(scene)
        async with connected(scene.agent.local) as other:
            claims = [await other.claim("request", 3) for _ in range(2)]
            assert claims[0].found
            assert claims[0] == claims[1]
            assert not (await engine.claim("request", 3)).found
            assert scene.agent.counter("claims") == 1
            assert scene.agent.counter("claims_missed") == 1
            # It is not the other's to give back either.
            assert await engine.release([claims[0].lease]) == 0
            assert scene.agent.counter("leased_bytes") > 0
        await until(lambda: not scene.agent.counter("leased_bytes"), "whoever had it is gone")
        assert not (await engine.claim("request", 3)).found


async def test_other_nodes_claim_nothing(tmp_path: Path) -> None:
    async with both_ways(KEYS, tmp_path) as scene, connected(scene.agent.uri) as stranger:
        await retained(scene)
        with pytest.raises(PermissionDenied):
            await stranger.claim("request", 3)
        assert scene.agent.counter("claims") == 0


@pytest.mark.slow
@pytest.mark.parametrize("claimed", [False, True])
async def test_what_nobody_takes_or_gives_back_is_free_when_its_time_is_over(
    claimed: bool, tmp_path: Path
) -> None:
    keys = chain(256, start=1000)
    async with (
        both_ways(KEYS, tmp_path, memory_bytes=MIB) as scene,
        connected(scene.agent.local) as engine,
    ):
        pool = scene.agent.agent.source.pool
        await retained(scene, retain_s=60 if claimed else 0.05)
        if claimed:
            assert (await engine.claim("request", 3, lease_s=0.05)).found
        await until(lambda: not scene.agent.counter("retained_blocks"), "the end of its time")
        assert scene.agent.counter("retentions_expired") == (not claimed)
        assert pool.reclaimable_bytes == pool.total_bytes
        assert not (await engine.claim("request", 3)).found
        # Its blocks make room for others.
        await store_blocks(scene.client, scene.namespace, keys)
        await relay_next(scene.client)
        result = await fetch_blocks(scene.client, scene.namespace, keys)
        assert result.served_by == [RELAY] * len(keys)
        assert scene.agent.counter("evicted_blocks") == len(KEYS)
