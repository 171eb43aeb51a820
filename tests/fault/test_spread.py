"""What one fetch makes of its ways: how much of it is under way, whom it blames, what it must
not ask for twice.

Relays are servers that call themselves agents, as in `test_client_paths.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from kvstore.blocksource import Asker, RelayLoad
from kvstore.messages import Claim, ClaimReply, FetchOutcome, Role, ServedBy
from kvstore.wire import FrameType
from kvstore_client import AsyncClient, Namespace, peers, spread
from kvstore_client.breaker import FAILURES_MAX, BreakerState
from kvstore_client.handles import AsyncFetchHandle, Lease
from kvstore_client.jobs import ANY_ROUTE, FetchJob, FillJob
from kvstore_client.lanes import Lane
from kvstore_client.placement import PlacedKeys
from kvstore_client.selector import PathMeter
from kvstore_client.selector.gain import GainMeter
from kvstore_client.spread import LOOKS_MAX, Spread, Ways
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    PATIENCE_S,
    Node,
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
from tests.support.engine import layout
from tests.support.loops import turns
from tests.support.peers import proxied

pytestmark = pytest.mark.asyncio

CHUNK = 4  # blocks
HIT, TIMEOUT, RELAY = FetchOutcome.HIT, FetchOutcome.TIMEOUT, ServedBy.RELAY


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipments of a few blocks, whatever rate is known."""
    for name in ("CHUNK_BYTES_FIRST", "CHUNK_BYTES_MIN", "CHUNK_BYTES_MAX"):
        monkeypatch.setattr(spread, name, CHUNK * BLOCK_BYTES)
    monkeypatch.setattr(spread, "WINDOW_S", 0.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed soon."""
    monkeypatch.setattr(spread, "STALLED_S", 0.02)
    monkeypatch.setattr(spread, "SILENT_S", 0.02)
    monkeypatch.setattr(spread, "LOOK_S", 0.01)


@contextlib.asynccontextmanager
async def both(
    nodes: Sequence[Node], relay: Node, keys: Sequence[bytes], uri: str
) -> AsyncIterator[tuple[AsyncClient, Namespace]]:
    """A client of daemons and of a relay, who both have the blocks; the relay is next."""
    relay.source.relay_load = lambda: RelayLoad(0, True)  # type: ignore[method-assign]
    async with connected([relay]) as writer:
        await store_blocks(writer, await open_pool(writer), keys)
    async with connected(nodes, relays=[uri], policy="round_robin", deadline_s=60.0) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        await relay_next(client)
        yield client, namespace


@contextlib.asynccontextmanager
async def two_ways(
    keys: Sequence[bytes],
) -> AsyncIterator[tuple[AsyncClient, Namespace, Node, Node]]:
    """The same with both of them."""
    async with (
        serve(1) as (node,),
        serve(1, name="relay", role=Role.AGENT) as (relay,),
        both([node], relay, keys, relay.uri) as (client, namespace),
    ):
        yield client, namespace, node, relay


async def relay_next(client: AsyncClient) -> None:
    """Make the relay the next in turn, as soon as it may be asked."""
    relays, loop = client.cluster.relays, asyncio.get_running_loop()
    await until(lambda: relays.spare(ANY_ROUTE, loop.time()) is not None)
    relays._selector._turn = 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("relayed", [False, True])
async def test_no_more_of_a_fetch_is_sent_than_the_window_of_its_path(relayed: bool) -> None:
    keys = chain(64)
    async with two_ways(keys) as (client, namespace, node, relay):
        asked, inflight = (relay if relayed else node), client.cluster.relays.inflight
        asked.gate.chunks_left = 0
        client.cluster.relays._selector._turn = int(relayed)
        into = room(64)
        handle = client.fetch(namespace, keys, into)
        await until(lambda: asked.server.busy)
        meter = inflight.ring[0] if relayed else inflight.direct
        assert meter.inflight_bytes == 2 * CHUNK * BLOCK_BYTES
        asked.gate.open()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.ok, result.errors
        assert len(result.runs) == 64 // CHUNK
        assert meter.inflight_bytes == 0


@pytest.mark.usefixtures("small_chunks")
async def test_a_shipment_that_never_began_leaves_nothing_on_the_meters() -> None:
    keys = chain(64)
    async with two_ways(keys) as (client, namespace, _, relay):
        relay.gate.chunks_left = 0
        handle = client.fetch(namespace, keys, room(64))
        (meter,) = client.cluster.relays.inflight.ring
        await turns(1)
        assert meter.inflight_bytes
        handle.cancel()  # in the turn in which they were made
        await handle.quiesced()
        await until(lambda: not client.cluster._tasks)
        assert meter.inflight_bytes == 0
        relay.gate.open()


@pytest.mark.slow
async def test_a_relay_of_which_only_reports_come_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Longer than the time between two reports.
    monkeypatch.setattr(spread, "STALLED_S", 0.3)
    keys = chain(8)
    async with two_ways(keys) as (client, namespace, _, relay):
        relay.gate.chunks_left = 0
        (link,) = client.cluster.relays.links
        for count in range(FAILURES_MAX):
            assert link.breaker.state is BreakerState.CLOSED, count
            await relay_next(client)
            result = await fetch_blocks(client, namespace, keys)
            assert result.ok, result.errors
            assert [run.path for run in result.runs] == ["relay", "direct"]
        assert link.up
        assert client.counters()["breaker_openings"] == 1
        relay.gate.open()


@pytest.mark.usefixtures("impatient")
async def test_when_only_the_last_word_is_missing_nobody_waits_for_it() -> None:
    keys = chain(4)
    async with (
        serve(1) as (node,),
        serve(1, name="relay", role=Role.AGENT) as (relay,),
        proxied(relay.uri) as proxy,
    ):
        proxy.mangle["down"] = lambda header, frame: (
            b"" if header.type is FrameType.DONE else bytes(frame)
        )
        async with both([node], relay, keys, proxy.uri) as (client, namespace):
            async with asyncio.timeout(PATIENCE_S):  # much less than the deadline
                result = await fetch_blocks(client, namespace, keys)
            assert result.ok, result.errors
            assert result.served_by == [RELAY] * 4
            assert [run.path for run in result.runs] == ["relay"]


@pytest.mark.usefixtures("impatient")
async def test_a_daemon_that_owes_only_the_last_word_is_not_waited_for_where_it_is_alone() -> None:
    keys = chain(4)
    async with (
        serve(1) as (node,),
        proxied(node.uri) as proxy,
        connected([proxy.uri], deadline_s=60.0) as client,
    ):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        proxy.mangle["down"] = lambda header, frame: (
            b"" if header.type is FrameType.DONE else bytes(frame)
        )
        (link,) = client.cluster._links
        async with asyncio.timeout(PATIENCE_S):
            for count in range(FAILURES_MAX):
                assert link.breaker.state is BreakerState.CLOSED, count
                result = await fetch_blocks(client, namespace, keys)
                assert result.ok, result.errors
                assert result.served_by == [ServedBy.DIRECT] * 4
                assert [run.bytes for run in result.runs] == [4 * BLOCK_BYTES]
        assert link.up
        assert client.counters()["breaker_openings"] == 1


@pytest.mark.usefixtures("impatient")
async def test_a_daemon_that_owes_blocks_is_waited_for_where_it_is_alone() -> None:
    keys = chain(4)
    async with serve(1) as (node,), connected([node], deadline_s=60.0) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        node.gate.chunk_bytes, node.gate.chunks_left = BLOCK_BYTES, 3
        handle = client.fetch(namespace, keys, room(4))
        await until(lambda: node.gate.given == 3)
        (link,), loop = client.cluster._links, asyncio.get_running_loop()
        since = loop.time()
        await until(lambda: loop.time() - since > 3 * spread.STALLED_S)
        assert not handle.poll()  # it has not all
        node.gate.open()
        assert (await handle).ok
        await handle.quiesced()
        assert link.breaker.state is BreakerState.CLOSED


@pytest.mark.usefixtures("impatient")
async def test_a_busy_daemon_is_waited_for_when_a_relay_has_failed_too() -> None:
    keys = chain(8)
    async with (
        serve(2) as nodes,
        serve(1, name="relay", role=Role.AGENT) as (relay,),
        both(nodes, relay, keys, relay.uri) as (client, namespace),
    ):
        client.cluster.relays._selector._turn = 0
        gates = [node.gate for node in (*nodes, relay)]
        for gate in gates:
            gate.chunks_left = 0
        into = room(8)
        handle = client.fetch(namespace, keys, into)
        # From the daemon to the relay, and back.
        (meter,), direct = (
            client.cluster.relays.inflight.ring,
            client.cluster.relays.inflight.direct,
        )
        await until(lambda: meter.inflight_bytes)
        await until(lambda: direct.inflight_bytes)
        for gate in gates:
            gate.open()
        result = await handle
        await handle.quiesced()
        check_hits(result, keys, into)
        assert result.ok, (result.outcomes, result.errors)


class Way:
    """A way of which a spread looks at the rate only."""

    def __init__(self, name: str, node_id: str = "") -> None:
        self.peer = name
        self.usable = True
        self.meter = PathMeter(GainMeter(), node_id)
        self.meter.observed_Bps = 1e6


class TwoDaemons(Ways):
    """Two daemons, and a relay."""

    copied = False

    def __init__(self) -> None:
        self.ways: dict[int | str, Way] = {key: Way(str(key)) for key in (0, 1)}
        self.ways["relay"] = Way("relay", "relay")

    def daemon_way(self, owner: int) -> Any:
        return None, self.ways[owner], self.ways[owner].meter

    def relay_way(self, node_id: str) -> Any:
        return None, self.ways[node_id], self.ways[node_id].meter

    def spare_relay(self, job: Any) -> str:
        return ""


class Looks(Spread):
    """Counts the blocks that are looked at."""

    looks = 0

    def _may_go(self, lane: Lane, index: int) -> bool:
        self.looks += 1
        return super()._may_go(lane, index)


def numbers(lane: Lane) -> list[int]:
    """Blocks that wait in a lane, in its order."""
    return [part[0] for part in lane.waiting]


def forget(lane: Lane) -> None:
    """Let nothing wait in a lane."""
    lane.waiting.clear()
    lane.waiting_bytes = 0


async def test_what_cannot_be_taken_over_is_looked_at_once() -> None:
    # All waits for the relay: in front what the idle daemon has, behind it what it has not.
    mine, others = 64, 2000
    owners = [(0,)] * mine + [(1,)] * others
    namespace = Namespace("pool", layout(*LAYERS))
    places = PlacedKeys(chain(mine + others), ())
    loop = asyncio.get_running_loop()
    job = FetchJob(namespace, places, [], range(len(LAYERS)), 0, loop.time(), 60.0)
    moving = Looks(loop, TwoDaemons(), job, owners, chunked=True, eager=True)
    moving.send(range(len(owners)), "relay")
    victim, thief = moving._lane("relay"), moving._lane(0)
    for _ in range(-(-others // LOOKS_MAX)):
        before = moving.looks
        moving._level()
        assert moving.looks - before <= LOOKS_MAX
    assert numbers(thief) == list(range(mine - len(thief.waiting), mine))
    assert thief.waiting
    assert numbers(victim) == [index for index in range(len(owners)) if index not in numbers(thief)]
    # Until all that may go has gone.
    forget(thief)
    while len(victim.waiting) > others:
        before, left = moving.looks, len(victim.waiting)
        moving._level()
        forget(thief)
        assert len(victim.waiting) < left or moving.looks - before == LOOKS_MAX
    # Then nothing is left to look at.
    for _ in range(-(-others // LOOKS_MAX)):
        moving._level()
    before = moving.looks
    moving._level()
    assert moving.looks == before
    # What comes is looked at.
    moving._put_back((0, 0, len(LAYERS)), "relay")
    moving._level()
    assert numbers(thief) == [0]


async def test_a_deadline_that_the_fetch_sees_before_its_timer_ends_it_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spread, "LOOK_S", 0.01)
    keys = chain(8)
    async with two_ways(keys) as (client, namespace, _, relay):
        relay.gate.chunk_bytes, relay.gate.chunks_left = BLOCK_BYTES, 5
        into = room(8)
        handle = client.fetch(namespace, keys, into)
        (meter,) = client.cluster.relays.inflight.ring
        await until(lambda: meter.inflight_bytes == 3 * BLOCK_BYTES)
        monkeypatch.setattr(Spread, "_over", lambda self: True)
        result = await handle
        await handle.quiesced()
        assert result.outcomes == [HIT] * 5 + [TIMEOUT] * 3
        assert result.served_by[:5] == [RELAY] * 5
        assert [run.bytes for run in result.runs] == [5 * BLOCK_BYTES]
        relay.gate.open()


class Told:
    """Who is told of layers: each must come once."""

    def __init__(self) -> None:
        self.layers: Counter[tuple[int, int]] = Counter()

    def checksums_known(self, index: int, layer_first: int, checksums: bytes) -> None:
        """Nothing to note."""

    def layers_arrived(self, index: int, layer_first: int, layer_last: int) -> None:
        """Layers are in their memory."""
        self.layers.update((index, layer) for layer in range(layer_first, layer_last))


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("how", ["late", "silent", "lost"])
async def test_of_what_was_passed_on_only_the_rest_is_asked_for_again(
    how: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "LOOK_S", 0.01)
    monkeypatch.setattr(spread, "LATE_SHARE", 0.0 if how == "late" else 1.0)
    monkeypatch.setattr(spread, "STALLED_S", 0.02 if how == "silent" else 3600)
    keys = chain(8)
    async with two_ways(keys) as (client, namespace, _, relay):
        # The first layer of the first block, and a part of the second; in groups of two layers
        # what is asked for again begins within the first of them.
        relay.gate.chunk_bytes, relay.gate.chunks_left = LAYERS[0] + 1, 1
        told, into, loop = Told(), room(8), asyncio.get_running_loop()
        places = PlacedKeys(keys, ((8, keys[0]),))
        views = [memoryview(block) for block in into]
        layers = range(len(LAYERS))
        job = FillJob(namespace, places, views, layers, group, loop.time(), 60.0, told, True)
        handle = job.handle = AsyncFetchHandle(60.0, job.cancel, len(LAYERS))
        ends: Counter[int] = Counter()
        job.on_block = lambda index, outcome: ends.update((index,))
        client.cluster.begin_fetch(job)
        if how == "lost":
            await until(lambda: told.layers)
            assert told.layers == {(0, 0): 1}
            await relay.kill()
        else:
            await until(lambda: job.moved_count)
            relay.gate.open()
        result = await handle
        await handle.quiesced()
        assert result.outcomes == [HIT] * 8, result.errors
        assert told.layers == {(index, layer): 1 for index in range(8) for layer in layers}
        assert ends == dict.fromkeys(range(8), 1)
        assert handle.layers_ready == len(LAYERS)
        assert result.served_by == [ServedBy.DIRECT] * 8
        check_hits(result, keys, into)


async def test_a_relay_that_comes_back_under_another_name_is_used_again() -> None:
    keys = chain(8)
    async with (
        serve(1) as nodes,
        serve(2, name="relay", role=Role.AGENT) as relays,
        proxied(relays[0].uri) as proxy,
    ):
        for relay in relays:
            relay.source.relay_load = lambda: RelayLoad(0, True)  # type: ignore[method-assign]
            async with connected([relay]) as writer:
                await store_blocks(writer, await open_pool(writer), keys)
        async with both(nodes, relays[0], [], proxy.uri) as (client, namespace):
            await store_blocks(client, namespace, keys)
            (link,) = client.cluster.relays.links
            assert (await fetch_blocks(client, namespace, keys)).served_by == [RELAY] * 8
            proxy.point_at(relays[1].uri)
            proxy.cut()
            await until(lambda: link.peer == relays[1].name and link.up)
            await relay_next(client)
            result = await fetch_blocks(client, namespace, keys)
            assert result.served_by == [RELAY] * 8, (result.plan, result.errors)
            assert {run.peer for run in result.runs} == {relays[1].name}
            assert [meter.node_id for meter in client.cluster.relays.inflight.ring] == [link.peer]


@pytest.mark.parametrize("first", ["daemon", "relay"])
async def test_a_relay_with_the_name_of_a_daemon_is_no_relay_and_speaks_for_nobody(
    first: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = chain(4)
    async with (
        serve(1, name="same") as (node,),
        serve(1, name="same", role=Role.AGENT) as (relay,),
        proxied(node.uri) as proxy,
    ):
        relay.source.relay_load = lambda: RelayLoad(0, True)  # type: ignore[method-assign]
        proxy.refuse(first == "relay")
        async with connected([proxy.uri], relays=[relay.uri], policy="round_robin") as client:
            cluster, loop = client.cluster, asyncio.get_running_loop()
            relays, reports = cluster.relays, cluster.reports
            if first == "relay":
                # As long as nobody knows better.
                await until(lambda: relays.spare(ANY_ROUTE, loop.time()) is not None)
                proxy.refuse(False)
            (link,) = relays.links
            await until(lambda: cluster.reachable and link.up)
            await until(lambda: client.counters().get("reports_refused", 0))
            known = reports.report("same-0")
            assert known is not None
            assert known.boot_id == node.server.report().boot_id
            assert not known.willing
            assert relays.spare(ANY_ROUTE, loop.time()) is None
            assert not relays.inflight.ring
            namespace = await open_pool(client)
            await store_blocks(client, namespace, keys)
            assert (await fetch_blocks(client, namespace, keys)).served_by == [ServedBy.DIRECT] * 4
    lines = [one.message for one in caplog.records if "load reports of the first" in one.message]
    assert len(lines) == 1


# --- claims --------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
async def test_a_lease_that_is_granted_when_nobody_waits_is_given_back(again: bool) -> None:
    claims: list[Claim] = []
    released: list[int] = []

    def claim(request: Claim, owner: Asker) -> ClaimReply:
        claims.append(request)
        return ClaimReply(lease=7, block_count=1, bytes=1)

    def release(leases: Sequence[int], owner: Asker) -> list[bool]:
        released.extend(leases)
        return [True] * len(leases)

    async with serve(1, role=Role.AGENT) as (node,), proxied(node.uri) as proxy:
        node.source.claim = claim  # type: ignore[method-assign]
        node.source.release = release  # type: ignore[method-assign, assignment]
        async with connected([proxy.uri], connect_timeout_s=60.0) as client:
            for session in node.server.sessions.values():
                session.local = True  # as on a unix socket
            proxy.hold("down")
            asked = asyncio.ensure_future(client.claim("turn"))
            await until(lambda: claims)
            asked.cancel()
            await asyncio.wait([asked])
            if again:
                asked = asyncio.ensure_future(client.claim("turn"))
                await until(lambda: len(claims) == 2)
            proxy.let_go("down")
            if again:
                # The lease is the same: it is kept, and given back when its owner wants that.
                found = await asked
                assert found.lease.number == 7
                await client.release([found.lease])
            await until(lambda: released)
            await client.release([Lease(proxy.uri, 8)])
            assert released == [7, 8]
            assert not client.cluster._claims


# --- peers ---------------------------------------------------------------------------------


async def test_a_client_closes_while_it_connects_to_a_peer() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # HELLO, and the end
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    uri = f"tcp://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    keys = chain(1)
    async with silent, serve(1) as (node,):
        for wait in (True, False):
            async with asyncio.timeout(PATIENCE_S):
                async with connected([node]) as client:
                    namespace = await open_pool(client)
                    handle = client.fetch(namespace, keys, room(1), peer=uri)
                    if wait:
                        await until(client.cluster._others)
            assert (await handle).outcomes == [FetchOutcome.UNAVAILABLE]


@pytest.mark.parametrize("how", ["connects", "opens"])
async def test_a_peer_that_somebody_waits_for_is_not_let_go(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS_MAX", 1)
    keys = chain(4)
    async with (
        serve(1) as (node,),
        serve(2, name="peer", role=Role.AGENT) as nodes,
        proxied(nodes[0].uri) as proxy,
    ):
        for peer in nodes:
            async with connected([peer]) as writer:
                await store_blocks(writer, await open_pool(writer), keys)
        gate, asked = asyncio.Event(), 0
        open_now = nodes[0].source.open_namespace

        async def open_later(*args: Any) -> Any:
            nonlocal asked
            asked += 1
            await gate.wait()
            return open_now(*args)

        if how == "opens":
            nodes[0].source.open_namespace = open_later  # type: ignore[method-assign, assignment]
        else:
            proxy.hold("down")
        async with connected([node], connect_timeout_s=60.0) as client:
            namespace = await open_pool(client)
            fetch = asyncio.ensure_future(fetch_blocks(client, namespace, keys, peer=proxy.uri))
            await until(lambda: asked if how == "opens" else proxy.accepted)
            refused = await fetch_blocks(client, namespace, keys, peer=nodes[1].uri)
            assert refused.outcomes == [FetchOutcome.UNAVAILABLE] * 4
            assert "in use" in str(refused.errors)
            gate.set()
            proxy.let_go("down")
            result = await fetch
            assert result.ok, result.errors
            # Now it may go.
            await until(lambda: not client.cluster._tasks)
            result = await fetch_blocks(client, namespace, keys, peer=nodes[1].uri)
            assert result.ok, result.errors
            await nodes[0].left_alone()


async def test_of_two_peers_with_one_name_the_first_is_believed_while_it_is_there() -> None:
    keys = chain(1)
    async with (
        serve(1) as (node,),
        serve(1, name="same", role=Role.AGENT) as (first,),
        serve(1, name="same", role=Role.AGENT) as (second,),
        connected([node]) as client,
    ):
        namespace, reports = await open_pool(client), client.cluster.reports

        def believed() -> bytes:
            known = reports.report("same-0")
            return known.boot_id if known is not None else b""

        for peer in (first, second):
            await fetch_blocks(client, namespace, keys, peer=peer.uri)
        await until(lambda: client.counters().get("reports_refused", 0))
        assert believed() == first.server.report().boot_id
        second_boot_id = second.server.report().boot_id
        await first.kill()
        await until(lambda: believed() == second_boot_id)


async def test_a_peer_is_not_asked_before_it_has_the_namespace_open() -> None:
    keys = chain(4)
    async with serve(1) as (node,), serve(1, name="peer", role=Role.AGENT) as (peer,):
        async with connected([peer]) as writer:
            await store_blocks(writer, await open_pool(writer), keys)
        gate, opening = asyncio.Event(), 0
        open_now = peer.source.open_namespace

        async def open_later(*args: Any) -> Any:
            nonlocal opening
            opening += 1
            await gate.wait()
            return open_now(*args)

        peer.source.open_namespace = open_later  # type: ignore[method-assign, assignment]
        async with connected([node]) as client:
            namespace = await open_pool(client)
            fetches = [
                asyncio.ensure_future(fetch_blocks(client, namespace, keys, peer=peer.uri))
                for _ in range(3)
            ]
            await until(lambda: opening)
            await until(lambda: opening + peer.counter("requests_fetch") == 3)
            assert not peer.counter("requests_fetch")
            gate.set()
            for result in await asyncio.gather(*fetches):
                assert result.ok, result.errors
