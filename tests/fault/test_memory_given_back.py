"""Memory that a daemon may write into: when it is its owner's again, whatever breaks.

Rule: once a handle is quiet nobody writes there. So each test stains the memory then, lets the
other side go on, and looks whether the stain has stayed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import LocalProtocolError, RemoteProtocolError, TransportError
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.protocol import copying
from kvstore.transport.shm import SharedMapping
from kvstore_client import AsyncClient, Namespace
from tests.support.cluster import (
    BLOCK_BYTES,
    MIB,
    Node,
    chain,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    serve,
    store_blocks,
    until,
)
from tests.support.engine import key
from tests.support.links import cut, link_of, on_one_host
from tests.support.loops import turns
from tests.support.memorypeer import MemoryPeer, descriptors, mappings, memfd, refused
from tests.support.regions import NAME, STAIN, mapped, stain, stained
from tests.support.tree import ROOT

HIT, TIMEOUT, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE
COUNT = 8
KEYS = chain(COUNT)
SIZE = COUNT * BLOCK_BYTES


@asynccontextmanager
async def node_and_client(
    tmp_path: Path, **options: Any
) -> AsyncIterator[tuple[Node, AsyncClient, Namespace]]:
    """A daemon that holds blocks, and a client on its host."""
    async with on_one_host(tmp_path, **options) as (node, client):
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        yield node, client, namespace


@pytest.fixture(autouse=True)
def nothing_stays_mapped() -> Iterator[None]:
    """Neither the clients nor the daemons of a test keep memory."""
    yield
    assert not mapped()


# --- the daemon is in this process: it stands where the test wants --------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["deadline", "cancel"])
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize(("chunks", "chunk_bytes"), [(1, 1), (2, 5000), (3, BLOCK_BYTES)])
async def test_nothing_is_written_after_a_fetch_that_was_given_up(
    tmp_path: Path, chunks: int, chunk_bytes: int, order: str, end: str
) -> None:
    async with node_and_client(tmp_path) as (node, client, namespace):
        region = await client.allocate(SIZE)
        node.gate.chunks_left, node.gate.chunk_bytes = chunks, chunk_bytes
        deadline_s = 0.05 if end == "deadline" else 600
        handle = client.fetch(namespace, KEYS, region.view, order=order, deadline_s=deadline_s)
        await until(lambda: node.gate.given == chunks and not node.gate.chunks_left)
        if end == "cancel":
            handle.cancel()
            assert handle.poll()
        result = await handle
        await handle.quiesced()
        assert region.users == 0
        last = TIMEOUT if end == "deadline" else UNAVAILABLE
        assert set(result.outcomes) <= {HIT, last}
        assert last in result.outcomes
        stain(region)
        node.gate.chunk_bytes = MIB
        node.gate.open()
        assert (await fetch_blocks(client, namespace, KEYS)).ok
        assert stained(region)
        # The connection was not given up.
        assert node.counter("connections_accepted") == 3
        await client.free(region)


@pytest.mark.asyncio
@pytest.mark.parametrize("breaks", ["server", "client", "killed"])
async def test_nothing_is_written_after_a_lost_link(tmp_path: Path, breaks: str) -> None:
    async with node_and_client(tmp_path) as (node, client, namespace):
        region = await client.allocate(SIZE)
        node.gate.chunks_left, node.gate.chunk_bytes = 2, BLOCK_BYTES
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: node.gate.given == 2)
        link = link_of(client)
        if breaks == "server":
            for connection in list(node.server.connections):
                connection.connection.close(TransportError("cut by the test"))
        elif breaks == "client":
            cut(client)
        else:
            await node.kill()
        result = await handle
        await handle.quiesced()
        assert UNAVAILABLE in result.outcomes
        stain(region)
        node.gate.chunk_bytes = MIB
        node.gate.open()
        if breaks == "killed":
            await node.start(fresh=False)
        await until(lambda: link.up)
        assert (await fetch_blocks(client, namespace, KEYS)).ok
        assert stained(region)
        # All regions are there again.
        handle = client.fetch(namespace, KEYS, region.view)
        again = await handle
        await handle.quiesced()
        assert [run.transport for run in again.runs] == ["shm"]
        assert region.view == b"".join(contents(KEYS))


@pytest.mark.asyncio
async def test_closed_client_leaves_memory_that_nobody_writes_into(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (node, _, _):
        client = AsyncClient(node.uri, transport="shm")
        await client.start()
        region = await client.allocate(SIZE)
        view = region.view[:]
        node.gate.chunks_left, node.gate.chunk_bytes = 2, BLOCK_BYTES
        handle = client.fetch(await open_pool(client), KEYS, view, deadline_s=600)
        await until(lambda: node.gate.given == 2)
        await client.close()
        assert handle.poll()
        assert handle.quiet.done()
        view[:] = bytes([STAIN]) * SIZE
        node.gate.open()
        await until(lambda: len(node.server.sessions) == 1)
        assert bytes(view) == bytes([STAIN]) * SIZE
        del view, region


@pytest.mark.asyncio
async def test_region_in_use_is_not_freed(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (node, client, namespace):
        region = await client.allocate(SIZE)
        node.gate.chunks_left = 0
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: node.gate._waiting)
        with pytest.raises(LocalProtocolError, match="in use by 1 requests: wait for `quiet`"):
            await client.free(region)
        node.gate.open()
        await handle.quiesced()
        del handle
        await client.free(region)
        await until(lambda: not mapped(), "nobody has it mapped")
        with pytest.raises(LocalProtocolError, match="was freed before"):
            await client.free(region)


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["deadline", "cancel", "lost", "broken", "stop"])
async def test_fetch_is_quiet_when_the_last_copy_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A thread of the daemon is in the middle of copying while everything else has ended."""
    async with node_and_client(tmp_path) as (node, client, namespace):
        region = await client.allocate(SIZE)
        node.gate.chunk_bytes = BLOCK_BYTES
        with gated_copying(monkeypatch, 1) as (left, go):
            deadline_s = 0.05 if end == "deadline" else 600
            handle = client.fetch(namespace, KEYS, region.view, deadline_s=deadline_s)
            await until(lambda: not left[0])
            if end == "cancel":
                handle.cancel()
            elif end == "lost":
                cut(client)
            elif end == "broken":
                for connection in node.server.connections:
                    connection.connection._broken(RemoteProtocolError("of the test"))
            elif end == "stop":
                for connection in list(node.server.connections):
                    connection.connection.close(TransportError("the server has stopped"))
            if end in ("deadline", "cancel"):
                await handle
            await turns(50)  # who tries again waits as well
            assert region.users == 1, "a thread of the daemon may be writing there"
            go.set()
            result = await handle
            await handle.quiesced()
        assert region.users == 0
        stain(region)
        await turns(50)
        assert stained(region)
        assert set(result.outcomes) <= {HIT, TIMEOUT, UNAVAILABLE}
        await until(lambda: link_of(client).up)
        await client.free(region)


@contextmanager
def gated_copying(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> Iterator[tuple[list[int], threading.Event]]:
    """Let a daemon copy so many pieces, and hold it back in the next ones until the event is
    set, or the end."""
    left, go, real = [count], threading.Event(), copying._copy_piece

    def held(target: memoryview, source: memoryview) -> None:
        if not left[0]:
            go.wait()
        else:
            left[0] -= 1
        real(target, source)

    with monkeypatch.context() as patched:
        patched.setattr(copying, "HERE_BYTES_MAX", 0)
        patched.setattr(copying, "_copy_piece", held)
        try:
            yield left, go
        finally:
            go.set()


@pytest.mark.asyncio
@pytest.mark.parametrize("end", ["deadline", "cancel", "lost"])
async def test_nothing_is_read_after_a_put_that_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    names = chain(COUNT, start=100)
    async with node_and_client(tmp_path) as (node, client, namespace):
        region = await client.allocate(SIZE)
        region.view[:] = b"".join(contents(names))
        with gated_copying(monkeypatch, 1) as (left, go):
            deadline_s = 0.05 if end == "deadline" else 600
            handle = client.put(namespace, names, region.view, deadline_s=deadline_s)
            await until(lambda: not left[0])
            if end == "cancel":
                handle.cancel()
            elif end == "lost":
                cut(client)
            if end != "lost":  # which is tried again, when nobody reads there any more
                await handle
            await turns(50)
            assert region.users == 1, "a thread of the daemon may be reading there"
            go.set()
            result = await handle
            await handle.quiesced()
        stain(region)
        outcomes = set(result.outcomes)
        assert outcomes <= {PutOutcome.STORED, PutOutcome.TIMEOUT, PutOutcome.UNAVAILABLE}
        await until(lambda: node.store.index.reserved_count == 0)
        await until(lambda: link_of(client).up)
        # What is stored is right: nothing of the stain came there.
        found = await fetch_blocks(client, namespace, names)
        assert found.hit_count <= 1
        await client.free(region)


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["fetch", "put"])
async def test_killed_client_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with node_and_client(tmp_path) as (node, client, namespace):
        command = [sys.executable, "-m", "tests.support.doomedmemory", node.uri, kind]
        path = ":".join(map(str, (ROOT, ROOT / "client", ROOT / "daemon")))
        node.gate.chunks_left, node.gate.chunk_bytes = 2, BLOCK_BYTES
        if kind == "put":
            assert (await client.delete(namespace, KEYS)) == [True] * COUNT
        with gated_copying(monkeypatch, 2) as (left, go):
            process = await asyncio.create_subprocess_exec(
                *command, str(COUNT), env={**os.environ, "PYTHONPATH": path}
            )
            try:
                await until(
                    lambda: node.gate.given == 2 if kind == "fetch" else not left[0],
                    f"half of a {kind} is done",
                )
                assert len(node.server.sessions) == 2
                assert mappings("self", NAME)
                gc.collect()
                gc.disable()  # it is not left to chance when the memory goes
            finally:
                process.kill()
                await process.wait()
            try:
                await until(lambda: len(node.server.sessions) == 1, "its session is gone")
                go.set()
                await until(lambda: not mappings("self", NAME), "its memory is unmapped")
            finally:
                gc.enable()
        await until(lambda: not node.store.index.reserved_count)
        pinned = [slot for slot, pins in enumerate(node.store.index.pins) if slot and pins]
        assert not pinned
        # Nobody else notices.
        node.gate.open()
        await store_blocks(client, namespace, chain(3, start=50))
        assert (await fetch_blocks(client, namespace, chain(3, start=50))).ok


@pytest.mark.asyncio
async def test_the_daemon_serves_others_while_it_unmaps_a_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    real = SharedMapping.close

    def close(region: SharedMapping) -> None:
        begun.set()
        assert go_on.wait(60)
        real(region)

    async with node_and_client(tmp_path) as (_, client, namespace):
        region, other = await client.allocate(SIZE), await client.allocate(SIZE)
        monkeypatch.setattr(SharedMapping, "close", close)
        try:
            freeing = asyncio.ensure_future(client.free(region))
            await until(begun.is_set, "it is being unmapped")
            assert (await client.fetch(namespace, KEYS, other.view)).ok
            assert not freeing.done(), "told before it is true"
        finally:
            go_on.set()
        await freeing


@pytest.mark.slow
@pytest.mark.asyncio
async def test_connects_leak_neither_descriptors_nor_memory(tmp_path: Path) -> None:
    async with node_and_client(tmp_path) as (node, _, _):
        before: list[str] = []
        for number in range(200):
            async with connected([node], transport="shm") as client:
                namespace = await open_pool(client)
                region = await client.allocate(SIZE)
                handle = client.fetch(namespace, KEYS, region.view)
                assert (await handle).ok
                await handle.quiesced()
                if number % 2:
                    await client.free(region)
                del region, handle
            await until(lambda: len(node.server.sessions) == 1)
            if number == 2:
                assert not mapped()
                before = descriptors("self")
        assert not mapped()
        await until(lambda: descriptors("self") == before, "all of it is closed")


@pytest.mark.asyncio
async def test_other_users_hand_nothing_over(tmp_path: Path) -> None:
    listen = f"unix://{tmp_path}/s"
    async with serve(listen=listen, memory_uids=frozenset()) as (node,):

        def by_hand() -> None:
            fd = memfd(SIZE)
            with MemoryPeer(node.uri) as peer:
                assert refused(peer.share(1, SIZE, fd), "by processes of the users []")
            os.close(fd)

        await asyncio.to_thread(by_hand)
        async with connected([node]) as client:  # auto: the socket itself
            namespace = await open_pool(client)
            region = await client.allocate(BLOCK_BYTES)
            result = await client.put(namespace, [key(1)], region.view)
            assert result.outcomes == [PutOutcome.STORED]
            assert [run.transport for run in result.runs] == ["unix"]
        async with connected([node], transport="shm") as client:
            link = link_of(client)
            assert not link.up
            assert "nothing else is to be used" in str(link.last_error)
    assert not mappings("self", "foreign")
