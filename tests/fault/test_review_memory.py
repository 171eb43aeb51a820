"""Payload beside the stream, looked at from its seams: what breaks between two steps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kvstore import views as views_module
from kvstore.buffers import Region as Kernel
from kvstore.checksum import layer_checksums
from kvstore.endpoint import parse_endpoint
from kvstore.errors import KVStoreError, TransportError
from kvstore.messages import FetchOutcome
from kvstore.protocol.server import PLACED_BYTES_PER_FILL_MAX, ServerProtocol
from kvstore.serving import Server, ServerOptions
from kvstore.transport import verbs as verbs_module
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_queue import RdmaQueue
from kvstore.transport.verbs import QueueAddress, VerbsError
from kvstore_client import AgentOptions, AsyncClient, link as link_module
from kvstore_client.agent.agent import Agent
from kvstore_client.agreement import Agreement
from kvstore_client.linkmemory import LinkMemory, SharedMemory
from kvstore_client.memory import Region, Regions
from kvstore_daemon.source import ArenaSource
from tests.rdma.fault_suite import idle
from tests.support.cluster import (
    BLOCK_BYTES,
    MIB,
    chain,
    connected,
    open_pool,
    serve,
    store_blocks,
    until,
)
from tests.support.engine import layout
from tests.support.fakeverbs import PACKET_BYTES, FakeVerbs
from tests.support.loops import turns
from tests.support.processes import daemon
from tests.support.rdmaserved import (
    active_end,
    link_of,
    passive_end,
    put_blocks,
    served,
    stain,
    stained,
)

COUNT = 8
KEYS = chain(COUNT)
BLOCK = 2 * PACKET_BYTES + 1000
SIZE = COUNT * BLOCK


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVerbs]:
    """Clients and servers find these verbs."""
    fake = FakeVerbs(tmp_path)
    monkeypatch.setattr(verbs_module, "system_verbs", lambda: fake)
    yield fake
    fake.close()


# --- RDMA -----------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("rails", [1, 2])
async def test_packet_of_a_run_that_was_lost_comes_after_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rails: int
) -> None:
    """A queue pair of the daemon fails; what it has sent already is in the network, and the
    client's end takes it, whatever the daemon has given up since."""
    system = FakeVerbs(tmp_path, device_count=rails)
    monkeypatch.setattr(verbs_module, "system_verbs", lambda: system)
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        node.gate.chunk_bytes = BLOCK  # a run a block, on both rails
        system.hold()
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: system.waiting() >= COUNT, "it is under way on all rails")
        end = active_end(node)
        queue = end.queues[0]
        pair = queue.pair
        rail = pair._rail  # type: ignore[attr-defined]
        with rail.lock:
            sending = pair.sends[0]  # type: ignore[attr-defined]
            local = rail._local(sending, PACKET_BYTES)
            packet = rail._request(pair, sending, PACKET_BYTES, local)
        end.fail(queue, TransportError("the peer does not answer"))
        system.release()
        result = await handle
        await handle.quiesced()
        assert FetchOutcome.UNAVAILABLE in result.outcomes
        assert region.users == 0
        stain(region)
        for other in passive_end(client).queues:
            theirs = other.pair._rail  # type: ignore[attr-defined]
            with theirs.lock:
                theirs._answer(memoryview(packet))
        assert stained(region), "written after quiet"


@pytest.mark.asyncio
async def test_memory_is_not_free_when_its_queue_pair_cannot_be_destroyed(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither flushed nor destroyed: nobody can say what the device still does."""
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        system.hold()
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: system.waiting() > 0, "it is under way")
        end = passive_end(client)

        def refuse() -> None:
            raise VerbsError("the system refuses it")

        with monkeypatch.context() as patch:
            for queue in end.queues:
                patch.setattr(queue.pair, "flush", refuse)
                patch.setattr(queue.pair, "close", refuse)
            link_of(client)._take_down(TransportError("cut by the test"))
            await turns()
        quiet = handle.quiet.done()
        system.release()
        handle.cancel()
        assert not quiet
        del node


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 64])
async def test_cancelled_put_ends_when_all_its_reads_end_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """With 64 blocks it waits for room beside the reads that are under way."""
    monkeypatch.setattr(link_module, "CANCEL_GRACE_S", 3600)
    system = FakeVerbs(tmp_path, device_count=1)
    monkeypatch.setattr(verbs_module, "system_verbs", lambda: system)
    async with served((4096,)) as (node, client, namespace):
        region = await client.allocate(count * 4096)
        system.hold()
        handle = client.put(namespace, chain(count, start=100), region.view, deadline_s=600)
        await until(lambda: system.waiting() > 0, "it is under way")
        handle.cancel()
        await until(lambda: node.server.counters["requests_cancel"] == 1, "the CANCEL")
        await turns()
        system.release()
        # In this turn of the loop: so that all of them are found by one look.
        system.wait(lambda: system.waiting() == 0, "all packets")
        await idle(node)
        await until(lambda: node.store.index.reserved_count == 0, "nothing is reserved")
        await until(handle.quiet.done, "the last word on it")


@pytest.mark.asyncio
@pytest.mark.slow
async def test_rail_of_the_client_that_fails_before_news_were_taken(system: FakeVerbs) -> None:
    """The daemon's writes are done, and their news lie in a queue pair that the client gives up:
    nobody says that they are lost."""
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        node.gate.chunk_bytes = BLOCK
        system.hold()
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: system.waiting() >= COUNT, "it is under way on both rails")
        system.release()
        # In this turn of the loop: neither side has looked at its completions.
        system.wait(lambda: system.waiting() == 0, "all packets")
        end = passive_end(client)
        end.fail(end.queues[1], TransportError("the port is down"))
        await until(handle.poll, "its outcome, long before the deadline")
        await handle.quiesced()


@pytest.mark.asyncio
@pytest.mark.slow
async def test_session_whose_old_connections_the_server_still_has(system: FakeVerbs) -> None:
    """Their end got lost in the network: the new ones are the same session to the server."""
    async with served((BLOCK,), transport="auto") as (_, client, _):
        link = link_of(client)
        await until(lambda: link.memory is not None, "rdma")
        assert link._channels is not None
        kept = [os.dup(one.stream.fileno()) for one in link._channels]  # so no FIN is sent
        try:
            link._take_down(TransportError("silent"))
            await until(lambda: link.up, "the link is up again")
            assert link.memory is not None, "the stream is used"
            assert link.memory.transport == "rdma"
        finally:
            for fd in kept:
                os.close(fd)


@pytest.mark.asyncio
@pytest.mark.slow
async def test_rail_that_only_the_client_could_not_connect_carries_nothing(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon was told of it before, and connected its own end: nobody tells it better."""
    real = RdmaNode.connect

    def connect(self: RdmaNode, queue: RdmaQueue, peer: QueueAddress) -> None:
        if queue.place == 1 and not queue.end.active:
            raise VerbsError("no route to the peer")
        real(self, queue, peer)

    monkeypatch.setattr(RdmaNode, "connect", connect)
    async with served((BLOCK,)) as (node, client, namespace):
        await until(lambda: link_of(client).up, "a session without it")
        assert len(passive_end(client).queues) == 1
        monkeypatch.setattr(RdmaNode, "connect", real)
        node.gate.chunk_bytes = BLOCK
        region = await client.allocate(SIZE)
        put = client.put(namespace, KEYS, region.view)
        result = await put
        await put.quiesced()
        assert result.ok, (result.outcomes, result.errors)


@pytest.mark.asyncio
async def test_memory_in_many_regions_says_what_the_limit_is(system: FakeVerbs) -> None:
    """A buffer a layer, as engines have them, and more layers than a request names regions."""
    layers = (256,) * 65
    async with served(layers) as (_, client, namespace):
        regions = [await client.allocate(256) for _ in layers]
        memory = [[region.view for region in regions]]
        result = await client.fetch(namespace, KEYS[:1], memory, deadline_s=5)
        assert result.errors == [] or "64" in str(result.errors), result.errors
        del memory


@pytest.mark.asyncio
async def test_request_of_long_keys_and_many_regions_fits_its_frame(
    system: FakeVerbs, caplog: pytest.LogCaptureFixture
) -> None:
    """Names of regions are more than the kilobyte that is set aside for all but the keys."""
    count, layer_count = 600, 200
    async with served((64,) * layer_count, arena_bytes=16 * MIB) as (_, client, namespace):
        regions = [await client.allocate(64 * count * 4) for _ in range(60)]
        memory = [
            [
                regions[layer % 60].view[at : at + 64]
                for layer in range(layer_count)
                for at in (64 * (index * 4 + layer // 60),)
            ]
            for index in range(count)
        ]
        names = [os.urandom(64) for _ in range(count)]
        handle = client.fetch(namespace, names, memory, chain=False, deadline_s=5)
        result = await handle
        await handle.quiesced()
        assert set(result.outcomes) == {FetchOutcome.MISS}, (set(result.outcomes), result.errors)
        assert [region.users for region in regions] == [0] * len(regions)
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        del memory


@pytest.mark.asyncio
async def test_client_is_closed_though_memory_cannot_be_taken_from_a_device(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One registration cannot be closed; rails and the others are nevertheless."""
    async with served((BLOCK,)) as (_, client, _):
        region = await client.allocate(4096)
        await client.allocate(4096)
        ((node, registration),) = region.registrations.items()
        (taken, _) = registration._regions
        assert taken is not None

        def refuse() -> None:
            raise VerbsError("the system refuses it")

        monkeypatch.setattr(taken, "close", refuse)
        with contextlib.suppress(VerbsError):
            await client.close()
        closed = node.closed
        with contextlib.suppress(VerbsError):
            node.close()
        assert closed, "its rails stay open"


# --- daemons that hang ----------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("which", ["under way", "begun when it is down"])
async def test_puts_to_a_daemon_that_hangs_fail_when_its_link_is_down(
    tmp_path: Path, which: str
) -> None:
    """It may yet read their memory, which is no reason to wait for the outcome, nor to keep
    those that come after from being told."""
    with daemon("--listen", f"unix://{tmp_path}/s", "--memory", "64MiB") as process:
        try:
            async with connected(process.uri, transport="shm", deadline_s=600) as client:
                namespace = await open_pool(client, 4096)
                region = await client.allocate(20 * 4096)
                link = link_of(client)
                assert (await client.put(namespace, KEYS[:1], region.view[:4096])).ok
                process.signal(signal.SIGSTOP)
                views = [region.view[at * 4096 : (at + 1) * 4096] for at in range(20)]
                handles = [
                    client.put(namespace, chain(1, start=100 + number), [view])
                    for number, view in enumerate(views[:17])
                ]
                await until(lambda: region.users >= 16, "they are under way")
                handles[0].cancel()
                await until(lambda: not link.up, "the link is given up")
                if which == "under way":
                    await until(handles[1].poll, "the outcome of one that was under way")
                else:
                    late = client.put(namespace, chain(1, start=200), views[17:18])
                    await until(late.poll, "the outcome of one that nobody was asked for")
                del views
        finally:
            process.signal(signal.SIGCONT)


# --- views ----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_views_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is verified in one turn is bounded, as what is copied is."""
    size, count = MIB // 2, 48
    hashed, most = 0, 0
    real_checksums, real_fill = layer_checksums, ServerProtocol.fill

    def checksums(layers: Sequence[memoryview], *rest: int) -> bytes:
        nonlocal hashed
        hashed += sum(map(len, layers))
        return real_checksums(layers, *rest)

    def fill(self: ServerProtocol) -> None:
        nonlocal hashed, most
        hashed = 0
        real_fill(self)
        most = max(most, hashed)

    monkeypatch.setattr(views_module, "layer_checksums", checksums)
    monkeypatch.setattr(ServerProtocol, "fill", fill)
    arena = Kernel(2 * (count + 2) * size)
    endpoint = parse_endpoint(f"unix://@views-turn-{os.getpid()}")
    options = ServerOptions(node_id="host", pool="pool")
    server = Server(ArenaSource(arena.view), [endpoint], options, memory=arena)
    await server.start()
    try:
        async with AsyncClient(str(endpoint)) as client:
            namespace = await client.open_namespace("pool", layout(size))
            names = chain(count)
            await store_blocks(client, namespace, names)
            found = await client.view(namespace, names)
            assert found.hit_count == count
            assert await found.release()
        await until(lambda: not server.sessions)
    finally:
        await server.stop(0)
    assert most <= PLACED_BYTES_PER_FILL_MAX + size, most


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("count", [60, 100])
async def test_agent_gives_views_of_more_than_a_fetch_has_under_way(
    tmp_path: Path, count: int
) -> None:
    """What a view keeps is not under way: its window must not wait for the lease to end."""
    size = 4096
    async with serve(arena_bytes=2 * MIB) as (node,):
        options = AgentOptions(
            storage=(node.uri,),
            node_id="agent",
            listen=(),
            local=f"unix://{tmp_path}/a",
            memory_bytes=MIB,  # of which views may keep half, and a fetch a quarter
            pool="pool",
            transport="tcp",
        )
        async with Agent(options), AsyncClient(options.local) as client:
            namespace = await client.open_namespace("pool", layout(size))
            names = chain(count)
            await store_blocks(client, namespace, names)
            found = await client.view(namespace, names, deadline_s=1.0)
            held = await found.release()
            assert (found.hit_count, found.errors) == (count, [])
            assert held


# --- regions and links that come up --------------------------------------------------------


class SlowMemory(LinkMemory):
    """A peer that takes regions when a test says so."""

    transport = "shm"

    def __init__(self, loop: asyncio.AbstractEventLoop, regions: Regions) -> None:
        super().__init__(loop, regions)
        self.known: set[int] = set()
        self.gate = asyncio.Event()
        self.asked: list[int] = []

    def knows(self, region: Region) -> bool:
        return region.number in self.known

    def region(self, region: Region) -> object:  # type: ignore[override]
        raise NotImplementedError

    async def add(self, region: Region) -> None:
        self.asked.append(region.number)
        if len(self.asked) > 1:
            await self.gate.wait()
        self.known.add(region.number)

    async def remove(self, region: Region) -> None:
        self.known.discard(region.number)

    def close(self) -> None:
        self.settled.set_result(None)


@pytest.mark.asyncio
async def test_region_that_is_freed_while_another_is_handed_over() -> None:
    """The link is not up yet, so that nobody takes the first one back from its peer."""
    loop, regions = asyncio.get_running_loop(), Regions()
    first, second = regions.allocate(4096), regions.allocate(4096)
    memory = SlowMemory(loop, regions)
    sharing = loop.create_task(Agreement(loop, "auto", regions).share_all(memory, "peer"))
    await turns()
    assert len(memory.known) == 1
    gone = first if memory.knows(first) else second
    regions.remove(gone)  # what `free_region` does while the link has no memory
    memory.gate.set()
    await sharing
    assert not memory.knows(gone)
    for region in regions.all():
        regions.remove(region)
    memory.close()


@pytest.mark.asyncio
async def test_descriptors_of_regions_that_wait_when_the_link_goes_down(tmp_path: Path) -> None:
    """Eight are handed over at a time; the others find a closed socket."""
    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (_,),
        connected(f"unix://{tmp_path}/s", transport="shm") as client,
    ):
        link = link_of(client)
        await until(lambda: link.memory is not None, "shm")
        memory = link.memory
        assert isinstance(memory, SharedMemory)
        regions = [client.cluster.regions.allocate(4096) for _ in range(40)]
        before = len(os.listdir("/proc/self/fd"))
        link._task.cancel()  # it is not to come up again
        await turns()
        adding = [asyncio.ensure_future(memory.add(region)) for region in regions]
        await asyncio.sleep(0)
        link._take_down(TransportError("cut by the test"))
        for result in await asyncio.gather(*adding, return_exceptions=True):
            assert isinstance(result, KVStoreError), result
        await asyncio.wait_for(asyncio.shield(memory.settled), 20)
        # Three connections are closed at either end; none is more.
        await turns()
        assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.asyncio
async def test_way_whose_carriers_were_lost_before_it_was_made(tmp_path: Path) -> None:
    """The peer closes a connection between its WELCOME and the agreement."""
    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (_,),
        connected(f"unix://{tmp_path}/s", transport="shm") as client,
    ):
        link = link_of(client)
        await until(lambda: link.up, "the link")
        channels = link._channels
        assert channels is not None
        link._take_down(TransportError("cut by the test"))

        async def ask(*request: object) -> None:
            raise TransportError("lost")

        memory = SharedMemory(
            asyncio.get_running_loop(),
            client.cluster.regions,
            channels.control,
            (channels.fetch, channels.put),
            ask,  # type: ignore[arg-type]
            False,
        )
        memory.close()
        await turns()
        assert memory.settled.done(), "it never will be"
        await until(lambda: link.up, "again")


@pytest.mark.asyncio
async def test_memory_that_an_old_link_keeps_costs_no_new_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peer of then hangs, and another daemon has its place: what is given up now was never
    asked of the new one."""
    monkeypatch.setattr(link_module, "CANCEL_GRACE_S", 0.01)
    monkeypatch.setattr(SharedMemory, "_ended", lambda self: None)
    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,),
        connected([node], transport="shm") as client,
    ):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        region = await client.allocate(COUNT * BLOCK_BYTES)
        node.gate.chunks_left = 0
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: region.users == 1, "it is under way")
        link = link_of(client)
        link._take_down(TransportError("cut by the test"))
        await until(lambda: link.up, "the link is up again")
        channels = link._channels
        handle.cancel()
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, over.set)
        await over.wait()
        assert link._channels is channels, link.last_error
        node.gate.open()


@pytest.mark.asyncio
async def test_region_of_an_allocate_that_was_cancelled_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else has it who could free it."""
    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,),
        connected([node], transport="shm") as client,
    ):
        asked = asyncio.Event()

        async def hang(self: SharedMemory, region: Region) -> None:
            asked.set()
            await asyncio.sleep(3600)

        monkeypatch.setattr(SharedMemory, "add", hang)
        allocating = asyncio.ensure_future(client.allocate(4096))
        await asked.wait()
        allocating.cancel()
        await asyncio.wait([allocating])
        assert len(client.cluster.regions) == 0
