"""Memory of the caller that the daemon of the same host reaches by itself."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import ConfigError, LocalProtocolError
from kvstore.memorymessages import REGIONS_SHARED_MAX
from kvstore.messages import FetchOutcome, PutOutcome, Role, Welcome
from kvstore.serving import Server, ServerOptions
from kvstore.transport.shm import host_name
from kvstore.wire import VERSION, FrameType, Header
from kvstore_client import AsyncClient, Client, FetchResult, Namespace, Region
from kvstore_client.linkmemory import SharedMemory
from kvstore_client.memory import Regions
from kvstore_daemon.source import ArenaSource
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    MIB,
    Node,
    chain,
    check_hits,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    serve,
    store_blocks,
    until,
)
from tests.support.engine import content, layout
from tests.support.links import cut, link_of, on_one_host
from tests.support.loops import LOOPS, run_on, turns
from tests.support.memorypeer import descriptors
from tests.support.peers import Talk, scripted
from tests.support.processes import daemon
from tests.support.regions import mapped

HIT, MISS, CORRUPT = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.CORRUPT
STORED, EXISTS = PutOutcome.STORED, PutOutcome.EXISTS
COUNT = 8
KEYS = chain(COUNT)
SIZE = COUNT * BLOCK_BYTES


@pytest.fixture(autouse=True)
def nothing_stays_mapped() -> Iterator[None]:
    """Neither the clients nor the daemons of a test keep memory."""
    yield
    assert not mapped()


@asynccontextmanager
async def node_and_client(
    tmp_path: Path, transport: str = "shm"
) -> AsyncIterator[tuple[Node, AsyncClient, Namespace]]:
    """A daemon, and a client on its host."""
    async with on_one_host(tmp_path, transport) as (node, client):
        yield node, client, await open_pool(client)


def slices(region: Region, size: int = BLOCK_BYTES, gap: int = 0) -> list[memoryview]:
    """Blocks in a region, the last one first, so that their order says nothing."""
    view, step = region.view, size + gap
    return [view[at : at + size] for at in range(0, len(view) - step + 1, step)][::-1]


async def fetch_into(
    client: AsyncClient,
    namespace: Namespace,
    keys: Sequence[bytes],
    into: object,
    **more: object,
) -> FetchResult:
    """A fetch whose memory is the caller's again."""
    handle = client.fetch(namespace, keys, into, **more)  # type: ignore[arg-type]
    result = await handle
    await handle.quiesced()
    return result


def ways(result: FetchResult) -> set[str]:
    """What moved the bytes."""
    return {run.transport for run in result.runs}


# --- what is moved --------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_blocks_go_and_come_without_a_socket(tmp_path: Path, loop: str) -> None:
    async def main() -> None:
        async with node_and_client(tmp_path) as (node, client, namespace):
            region = await client.allocate(SIZE)
            blocks = slices(region)
            for name, block in zip(KEYS, blocks, strict=True):
                block[:] = content(name, BLOCK_BYTES)
            handle = client.put(namespace, KEYS, blocks)
            stored = await handle
            await handle.quiesced()
            assert stored.outcomes == [STORED] * COUNT
            assert [run.transport for run in stored.runs] == ["shm"]
            assert stored.bytes == SIZE
            region.view[:] = bytes(SIZE)
            sent = sum(c.protocol.writer.sent_total for c in node.server.connections)
            result = await fetch_into(client, namespace, KEYS, blocks)
            assert result.ok, result.errors
            assert ways(result) == {"shm"}
            assert result.bytes == SIZE
            check_hits(result, KEYS, blocks)
            sent = sum(c.protocol.writer.sent_total for c in node.server.connections) - sent
            assert sent < BLOCK_BYTES
            assert region.users == 0
            await client.free(region)
            assert len(client.cluster.regions) == 0
            (session,) = node.server.sessions.values()
            assert len(session.memory.shared) == 0

    run_on(loop, main())


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 3), (1, 2), (2, 3)])
async def test_layers_come_where_they_belong(
    tmp_path: Path, first: int, last: int, layered: bool, order: str
) -> None:
    async with node_and_client(tmp_path) as (_, client, namespace):
        await store_blocks(client, namespace, KEYS)
        offsets = namespace.geometry.offsets
        span = offsets[last] - offsets[first]
        region = await client.allocate(COUNT * (span + 7))
        blocks = slices(region, span, gap=7)
        into: list[object] = list(blocks)
        if layered:
            bounds = [at - offsets[first] for at in offsets[first : last + 1]]
            into = [[block[a:b] for a, b in pairwise(bounds)] for block in blocks]
        handle = client.fetch(namespace, KEYS, into, layers=range(first, last), order=order)
        if order == "layer":
            assert await handle.layer(last - first - 1)
        result = await handle
        await handle.quiesced()
        assert result.ok, result.errors
        assert ways(result) == {"shm"}
        for name, block in zip(KEYS, blocks, strict=True):
            assert bytes(block) == content(name, BLOCK_BYTES)[offsets[first] : offsets[last]]
        for at in range(span, region.size_bytes, span + 7):
            assert region.view[at : at + 7] == bytes(7), "written beside a block"
        del handle, into


@pytest.mark.asyncio
async def test_layers_scattered_over_regions(tmp_path: Path) -> None:
    """A cache of layers has a region each, as engines hold theirs."""
    async with node_and_client(tmp_path) as (_, client, namespace):
        regions = [await client.allocate(COUNT * size) for size in LAYERS]
        memory = [
            [
                region.view[index * size : (index + 1) * size]
                for region, size in zip(regions, LAYERS, strict=True)
            ]
            for index in range(COUNT)
        ]
        offsets = namespace.geometry.offsets
        for name, block in zip(KEYS, memory, strict=True):
            for view, (a, b) in zip(block, pairwise(offsets), strict=True):
                view[:] = content(name, BLOCK_BYTES)[a:b]
        handle = client.put(namespace, KEYS, memory)
        stored = await handle
        await handle.quiesced()
        assert stored.outcomes == [STORED] * COUNT
        assert {run.transport for run in stored.runs} == {"shm"}
        for region in regions:
            region.view[:] = bytes(region.size_bytes)
        result = await fetch_into(client, namespace, KEYS, memory, order="layer", group_layers=2)
        assert result.ok
        assert ways(result) == {"shm"}
        for name, block in zip(KEYS, memory, strict=True):
            assert b"".join(block) == content(name, BLOCK_BYTES)


@pytest.mark.asyncio
async def test_what_is_not_stored_is_a_miss_and_its_memory_stays(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (_, client, namespace):
        await store_blocks(client, namespace, KEYS[::2], chain=False)
        region = await client.allocate(SIZE)
        region.view[:] = b"x" * SIZE
        blocks = slices(region)
        result = await fetch_into(client, namespace, KEYS, blocks, chain=False)
        assert result.outcomes == [HIT, MISS] * (COUNT // 2)
        check_hits(result, KEYS, blocks)
        assert all(bytes(block) == b"x" * BLOCK_BYTES for block in blocks[1::2])
        assert result.bytes == SIZE // 2


@pytest.mark.asyncio
@pytest.mark.parametrize("order", ["block", "layer"])
async def test_corrupt_block_is_found_and_dropped(tmp_path: Path, order: str) -> None:
    async with node_and_client(tmp_path) as (node, client, namespace):
        await store_blocks(client, namespace, KEYS)
        node.damage(namespace, KEYS[3])
        region = await client.allocate(SIZE)
        blocks = slices(region)
        result = await fetch_into(client, namespace, KEYS, blocks, order=order)
        expected = [CORRUPT if name == KEYS[3] else HIT for name in KEYS]
        assert result.outcomes == expected
        check_hits(result, KEYS, blocks)
        assert client.counters()["corrupt_blocks"] == 1
        # Its daemon was told, has looked, and has it no more.
        await until(lambda: node.holds(namespace, KEYS[3]) == [False])
        result = await fetch_into(client, namespace, KEYS, blocks, chain=False)
        assert result.outcomes == [MISS if name == KEYS[3] else HIT for name in KEYS]


@pytest.mark.asyncio
async def test_blocks_that_are_there_are_not_taken_again(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (_, client, namespace):
        await store_blocks(client, namespace, KEYS[:3])
        region = await client.allocate(SIZE)
        region.view[:] = b"".join(contents(KEYS))
        handle = client.put(namespace, KEYS, region.view)
        result = await handle
        await handle.quiesced()
        assert result.outcomes == [EXISTS] * 3 + [STORED] * (COUNT - 3)
        assert result.bytes == (COUNT - 3) * BLOCK_BYTES
        assert (await fetch_blocks(client, namespace, KEYS)).ok


@pytest.mark.asyncio
async def test_put_that_is_larger_than_what_may_be_under_way(tmp_path: Path) -> None:
    async with on_one_host(tmp_path, in_flight_bytes_max=3 * BLOCK_BYTES) as (_, client):
        namespace = await open_pool(client)
        names = chain(200)
        region = await client.allocate(200 * BLOCK_BYTES)
        region.view[:] = b"".join(contents(names))
        handles = [
            client.put(namespace, names[at : at + 50], region.view[at * 4096 : (at + 50) * 4096])
            for at in range(0, 200, 50)
        ]
        for handle in handles:
            assert (await handle).outcomes == [STORED] * 50
            await handle.quiesced()
        assert (await fetch_blocks(client, namespace, names)).ok
        del handle, handles


@pytest.mark.asyncio
async def test_memory_that_lies_in_no_region_goes_through_the_socket(tmp_path: Path) -> None:
    async with node_and_client(tmp_path, "auto") as (_, client, namespace):
        await store_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        mixed: list[object] = [*slices(region)[1:], bytearray(BLOCK_BYTES)]
        for into in (mixed, bytearray(SIZE)):
            result = await fetch_into(client, namespace, KEYS, into)
            assert result.ok
            assert ways(result) == {"unix"}
        own = bytearray(SIZE)
        registered = await client.register(own)
        result = await fetch_into(client, namespace, KEYS, own)
        assert result.ok
        assert ways(result) == {"unix"}  # another process cannot map it
        await client.free(registered)
        assert own == b"".join(contents(KEYS))


@pytest.mark.asyncio
async def test_only_shared_memory_means_that_no_socket_carries_anything(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (_, client, namespace):
        mine = await client.register(bytearray(BLOCK_BYTES))
        for memory, reason in (
            (bytearray(BLOCK_BYTES), "lie in no region: get memory by allocate, or register it"),
            (mine.view, "memory that was registered cannot be handed to another process"),
        ):
            for begin in (client.put, client.fetch):
                handle = begin(namespace, KEYS[:1], [memory])
                result = await handle
                await handle.quiesced()
                assert [outcome.name for outcome in result.outcomes] == ["UNAVAILABLE"]
                (error,) = result.errors
                assert isinstance(error, LocalProtocolError)
                assert "transport=shm" in str(error)
                assert reason in str(error)
        assert mine.users == 0


# --- which way ------------------------------------------------------------------------------


@asynccontextmanager
async def on_both(tmp_path: Path) -> AsyncIterator[tuple[Server, str, str]]:
    """A server on a TCP port and a unix socket, and their URIs."""
    source = ArenaSource(memoryview(bytearray(4 * MIB)))
    listen: list[Endpoint] = [
        parse_endpoint("tcp://127.0.0.1:0", "listen"),
        parse_endpoint(f"unix://{tmp_path}/s", "listen"),
    ]
    server = Server(source, listen, ServerOptions(node_id="both"))
    await server.start()
    try:
        tcp, unix = map(str, server.endpoints)
        yield server, tcp, unix
        await until(lambda: not server.connections)
    finally:
        await server.stop(0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("near", "transport", "expected"),
    [
        (False, "auto", "shm"),
        (True, "auto", "shm"),
        (False, "shm", "shm"),
        (True, "shm", "shm"),
        (False, "tcp", "tcp"),
        (True, "unix", "unix"),
    ],
)
async def test_what_moves_the_bytes(
    tmp_path: Path, near: bool, transport: str, expected: str
) -> None:
    async with (
        on_both(tmp_path) as (_, tcp, unix),
        connected(unix if near else tcp, transport=transport) as client,
    ):
        namespace = await open_pool(client)
        region = await client.allocate(SIZE)
        region.view[:] = b"".join(contents(KEYS))
        handle = client.put(namespace, KEYS, region.view)
        stored = await handle
        await handle.quiesced()
        result = await fetch_into(client, namespace, KEYS, region.view)
        assert result.ok
        assert ways(result) == {expected}
        assert {run.transport for run in stored.runs} == {expected}
        assert [run.path for run in result.runs] == ["direct"]


@pytest.mark.asyncio
@pytest.mark.parametrize(("near", "transport"), [(True, "tcp"), (False, "unix"), (False, "rdma")])
async def test_what_is_not_offered_is_not_used(tmp_path: Path, near: bool, transport: str) -> None:
    async with (
        on_both(tmp_path) as (_, tcp, unix),
        connected(unix if near else tcp, transport=transport) as client,
    ):
        link = link_of(client)
        assert not link.up
        assert "nothing else is to be used" in str(link.last_error)


def test_transport_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="transport"):
        AsyncClient("tcp://127.0.0.1:1", transport="pigeon")


@pytest.mark.asyncio
async def test_socket_of_another_host_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with on_both(tmp_path) as (server, tcp, _):
        server.host = "another"
        async with connected(tcp) as client:
            namespace = await open_pool(client)
            region = await client.allocate(SIZE)
            result = await fetch_into(client, namespace, KEYS, region.view)
            assert ways(result) == {"tcp"}


@pytest.mark.asyncio
async def test_socket_that_cannot_be_used_is_done_without(tmp_path: Path) -> None:
    async with on_both(tmp_path) as (server, tcp, _):
        server.local = f"unix://{tmp_path}/gone"
        async with connected(tcp) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, KEYS)
            region = await client.allocate(SIZE)
            result = await fetch_into(client, namespace, KEYS, region.view)
            assert result.ok
            assert ways(result) == {"tcp"}


@pytest.mark.asyncio
async def test_socket_of_another_server_is_not_taken_for_the_daemons(tmp_path: Path) -> None:
    async with (
        on_both(tmp_path) as (server, tcp, _),
        serve(listen=f"unix://{tmp_path}/other", name="other") as (other,),
    ):
        server.local = other.uri
        async with connected(tcp) as client:
            assert list(await client.status()) == [tcp]
            link = link_of(client)
            assert (link.peer, link.transport) == ("both", "tcp")
        await other.left_alone()


@pytest.mark.asyncio
async def test_client_that_is_closed_while_it_looks_for_the_near_socket_leaves_nothing(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/silent")
        silent.listen(8)

        def welcome(talk: Talk, header: Header, metadata: bytes) -> None:
            message = Welcome(
                version=VERSION,
                node_id="far",
                boot_id=bytes(16),
                role=Role.DAEMON,
                host=host_name(),
                local=f"unix://{tmp_path}/silent",
            )
            talk.send(FrameType.WELCOME, 0, message)

        before = descriptors("self")
        async with scripted({FrameType.HELLO: welcome}) as server:
            client = AsyncClient(server.uri, connect_timeout_s=60)
            starting = asyncio.create_task(client.start())
            await until(lambda: server.count(FrameType.HELLO))
            near, _ = await asyncio.to_thread(silent.accept)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            await client.close()
            near.close()
            await until(lambda: not server.talks, "its connections are closed")
        await until(lambda: descriptors("self") == before)


# --- regions --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_regions_are_handed_over_when_the_daemon_comes(tmp_path: Path) -> None:
    node = Node("late", 4 * MIB, f"unix://{tmp_path}/s")
    async with connected(node.uri, transport="shm") as client:
        region = await client.allocate(SIZE)
        await node.start()
        link = link_of(client)
        await until(lambda: link.up)
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        result = await fetch_into(client, namespace, KEYS, region.view)
        assert result.ok
        assert ways(result) == {"shm"}
    await node.left_alone()
    await node.kill()


@pytest.mark.asyncio
async def test_region_that_overlaps_another_is_refused(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (_, client, _):
        region = await client.allocate(SIZE)
        for view in (region.view, region.view[5:9]):
            with pytest.raises(LocalProtocolError, match="overlaps a region"):
                await client.register(view)
        with pytest.raises(LocalProtocolError, match="read-only"):
            await client.register(bytes(8))
        with pytest.raises(LocalProtocolError, match="must be at least 1"):
            await client.allocate(0)
        assert len(client.cluster.regions) == 1
        del view


@pytest.mark.asyncio
async def test_regions_are_counted(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (_, client, _):
        whole = bytearray(REGIONS_SHARED_MAX * 8)
        for at in range(REGIONS_SHARED_MAX):
            client.cluster.regions.register(memoryview(whole)[at * 8 : (at + 1) * 8])
        with pytest.raises(LocalProtocolError, match=f"the limit is {REGIONS_SHARED_MAX}"):
            await client.allocate(SIZE)
        with pytest.raises(LocalProtocolError, match="allocate fewer and larger ones"):
            await client.register(bytearray(8))


def test_regions_of_many_threads_stay_in_order() -> None:
    """Allocation runs beside the loop, which looks for regions meanwhile."""
    whole, regions, threads = bytearray(800 * 8), Regions(), 4
    pause = sys.getswitchinterval()

    def register(thread: int) -> None:
        for at in range(thread, 800, threads):
            view = memoryview(whole)[at * 8 : (at + 1) * 8]
            region = regions.register(view)
            assert regions.locate(view) == (region, 0)
            if at % 3 == 0:
                regions.remove(region)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(register, range(threads)))
    finally:
        sys.setswitchinterval(pause)
    addresses = [region.address for region in regions.all()]
    assert addresses == sorted(addresses)
    assert len(addresses) == 800 - 267


@pytest.mark.asyncio
async def test_allocations_at_once_keep_apart(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (node, client, namespace):
        await store_blocks(client, namespace, KEYS)
        # Of the same size, so that one taken for another would be found by its bytes only.
        regions = [client.cluster.regions.allocate(SIZE) for _ in range(40)]
        await asyncio.gather(*(client.cluster.add_region(region) for region in regions))
        regions += await asyncio.gather(*(client.allocate(SIZE) for _ in range(10)))
        results = await asyncio.gather(
            *(fetch_into(client, namespace, KEYS, region.view) for region in regions)
        )
        assert all(result.ok and ways(result) == {"shm"} for result in results)
        assert all(region.view == b"".join(contents(KEYS)) for region in regions)
        assert len({region.number for region in regions}) == 50
        starts = [region.address for region in client.cluster.regions.all()]
        assert starts == sorted(starts)
        await asyncio.gather(*(client.free(region) for region in regions))
        (session,) = node.server.sessions.values()
        assert len(session.memory.shared) == 0


@pytest.mark.asyncio
async def test_region_that_is_freed_while_a_link_comes_up_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = SharedMemory.add
    freeing: list[asyncio.Future[None]] = []
    added: list[Region] = []

    async with node_and_client(tmp_path) as (node, client, _):
        regions = sorted([await client.allocate(SIZE) for _ in range(3)], key=lambda r: r.address)

        async def slow(way: SharedMemory, region: Region) -> None:
            added.append(region)
            if region is regions[0]:
                for freed in regions[:2]:
                    freeing.append(asyncio.ensure_future(client.free(freed)))
            await add(way, region)
            await turns()

        link = link_of(client)
        with monkeypatch.context() as patched:
            patched.setattr(SharedMemory, "add", slow)
            cut(client)
            await until(lambda: link.up)
        await asyncio.gather(*freeing)
        await until(lambda: len(node.server.sessions) == 1)
        (session,) = node.server.sessions.values()
        assert len(session.memory.shared) == 1
        assert added == [regions[0], regions[2]]
        assert client.counters()["reconnects"] == 1


@pytest.mark.asyncio
async def test_slices_of_a_freed_region_stay_readable(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (_, client, namespace):
        await store_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        blocks = slices(region)
        assert (await fetch_into(client, namespace, KEYS, blocks)).ok
        await client.free(region)
        assert bytes(blocks[0]) == content(KEYS[0], BLOCK_BYTES)
        result = await fetch_into(client, namespace, KEYS, blocks)
        assert set(result.outcomes) == {FetchOutcome.UNAVAILABLE}  # it is no region any more
        assert "lie in no region" in str(result.errors)


# --- the client with threads ----------------------------------------------------------------


@pytest.mark.slow
def test_client_with_threads(tmp_path: Path) -> None:
    before = descriptors("self")
    with daemon("--listen", f"unix://{tmp_path}/s") as kvstored, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with Client(kvstored.uri) as client:
                namespace = client.open_namespace("pool", layout(*LAYERS))
                region = client.allocate(SIZE)
                region.view[:] = b"".join(contents(KEYS))
                put = client.put(namespace, KEYS, region.view)
                assert put.result().ok
                put.wait_quiet(60)
                region.view[:] = bytes(SIZE)
                fetch = client.fetch(namespace, KEYS, region.view)
                result = fetch.result()
                fetch.wait_quiet(60)
                assert result.ok
                assert ways(result) == {"shm"}
                assert bytes(region.view) == b"".join(contents(KEYS))
                client.free(region)
                kept = client.allocate(SIZE)
                fetch = client.fetch(namespace, KEYS, kept.view)
            # What was under way ended with the client.
            fetch.wait_quiet(0)
            del fetch, put, kept, region
            gc.collect()
    gc.collect()
    assert descriptors("self") == before


@pytest.mark.slow
def test_loop_that_ends_with_its_client_leaves_no_sockets(tmp_path: Path) -> None:
    async def main(uri: str) -> None:
        async with connected(uri, transport="shm") as client:
            await client.allocate(SIZE)

    with daemon("--listen", f"unix://{tmp_path}/s") as kvstored:
        before = descriptors("self")
        for loop in LOOPS:
            run_on(loop, main(kvstored.uri))
            assert descriptors("self") == before
