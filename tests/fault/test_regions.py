"""Regions of a client, from the moment they are made until they are gone, where something fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from pathlib import Path

import pytest

from kvstore.buffers import Region as Kernel
from kvstore.errors import KVStoreError
from kvstore.messages import FetchOutcome, Message, PutOutcome
from kvstore.transport.verbs import VerbsError
from kvstore.wire import FrameType
from kvstore_client.agreement import Agreement
from kvstore_client.linkmemory import LinkMemory, SharedMemory
from kvstore_client.memory import Region, Regions
from tests.support.cluster import MIB, chain, until
from tests.support.engine import content
from tests.support.fakeverbs import FakeVerbs
from tests.support.links import cut, link_of, on_one_host
from tests.support.loops import turns
from tests.support.memorypeer import descriptors
from tests.support.rdmaserved import served, ways

KEYS = chain(8)


# --- made -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_region_whose_allocate_was_cancelled_while_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread makes it, and nobody waits for that any more."""
    making, go_on, gone = threading.Event(), threading.Event(), threading.Event()
    real_touch, real_close = Kernel.touch, Kernel.close

    def touch(self: Kernel) -> None:
        making.set()
        go_on.wait()
        real_touch(self)

    def close(self: Kernel) -> None:
        real_close(self)
        gone.set()

    async with on_one_host(tmp_path) as (node, client):
        monkeypatch.setattr(Kernel, "touch", touch)
        monkeypatch.setattr(Kernel, "close", close)
        allocating = asyncio.ensure_future(client.allocate(4096))
        await until(making.is_set, "it is being made")
        allocating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await allocating
        go_on.set()
        await until(gone.is_set, "it is unmapped")
        assert len(client.cluster.regions) == 0
        (session,) = node.server.sessions.values()
        assert len(session.memory.shared) == 0


@pytest.mark.asyncio
async def test_region_of_an_allocate_that_was_cancelled_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else has it who could free it."""
    async with on_one_host(tmp_path) as (_, client):
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


@pytest.mark.asyncio
async def test_region_whose_sharing_was_cancelled_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer has it, and nobody has heard of that."""
    async with on_one_host(tmp_path) as (node, client):
        (session,) = node.server.sessions.values()
        memory = link_of(client).memory
        assert isinstance(memory, SharedMemory)
        ask, answered = memory._ask, asyncio.Event()

        async def unheard(type: FrameType, message: Message) -> Message:
            reply = await ask(type, message)
            if type is FrameType.SHARE:
                answered.set()
                await asyncio.sleep(3600)
            return reply

        monkeypatch.setattr(memory, "_ask", unheard)
        allocating = asyncio.ensure_future(client.allocate(4096))
        await answered.wait()
        assert len(session.memory.shared) == 1
        allocating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await allocating
        assert len(client.cluster.regions) == 0
        await until(lambda: len(session.memory.shared) == 0, "it was taken back")


# --- handed over to a peer that comes up, or goes -------------------------------------------


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
    async with on_one_host(tmp_path) as (_, client):
        link = link_of(client)
        await until(lambda: link.memory is not None, "shm")
        memory = link.memory
        assert isinstance(memory, SharedMemory)
        regions = [client.cluster.regions.allocate(4096) for _ in range(40)]
        before = len(descriptors("self"))
        link._task.cancel()  # it is not to come up again
        await turns()
        adding = [asyncio.ensure_future(memory.add(region)) for region in regions]
        await asyncio.sleep(0)
        cut(client)
        for result in await asyncio.gather(*adding, return_exceptions=True):
            assert isinstance(result, KVStoreError), result
        await asyncio.wait_for(asyncio.shield(memory.settled), 20)
        # Three connections are closed at either end, and what waited was closed with them.
        await until(lambda: len(descriptors("self")) == before - 6, "nothing is left")


# --- many in one request --------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.slow
async def test_block_whose_layers_lie_in_a_region_each(system: FakeVerbs) -> None:
    """A buffer a layer, as engines have them, and more layers than are usual."""
    size, count = 256, 128
    async with served((size,) * count) as (_, client, namespace):
        regions = [await client.allocate(size) for _ in range(count)]
        memory = [[region.view for region in regions]]
        block = content(KEYS[0], count * size)
        for number, region in enumerate(regions):
            region.view[:] = block[number * size : (number + 1) * size]
        put = client.put(namespace, KEYS[:1], memory)
        assert (await put).outcomes == [PutOutcome.STORED]
        await put.quiesced()
        for region in regions:
            region.view[:] = bytes(size)
        handle = client.fetch(namespace, KEYS[:1], memory)
        result = await handle
        await handle.quiesced()
        assert (result.ok, ways(result)) == (True, {("direct", "rdma")}), result.errors
        assert b"".join(region.view for region in regions) == block
        del memory, put, handle


@pytest.mark.asyncio
@pytest.mark.slow
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


# --- given back -----------------------------------------------------------------------------


def test_region_is_taken_from_all_devices_even_if_one_does_not_let_go() -> None:
    closed: list[str] = []

    class Registered:
        def __init__(self, name: str, fails: bool) -> None:
            self.name, self.fails = name, fails

        def close(self) -> None:
            closed.append(self.name)
            if self.fails:
                raise VerbsError("the system refuses it")

    region = Regions().allocate(4096)
    for name, fails in (("a", False), ("b", True), ("c", False)):
        region.registrations[name] = Registered(name, fails)  # type: ignore[index,assignment]
    with pytest.raises(VerbsError):
        region.give_back()
    assert sorted(closed) == ["a", "b", "c"]
    assert not region.registrations
    assert not region.view  # it was unmapped all the same
    region.give_back()
    assert len(closed) == 3


@pytest.mark.asyncio
async def test_client_is_closed_though_memory_cannot_be_taken_from_a_device(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One registration cannot be closed; rails and the others are nevertheless."""
    async with served((4096,)) as (_, client, _):
        region = await client.allocate(4096)
        await client.allocate(4096)
        ((node, registration),) = region.registrations.items()
        (taken, _) = registration._regions
        assert taken is not None

        def refuse() -> None:
            raise VerbsError("the system refuses it")

        monkeypatch.setattr(taken, "close", refuse)
        with pytest.raises(VerbsError, match="the system refuses it"):
            await client.close()
        assert node.closed, "its rails stay open"


@pytest.mark.asyncio
async def test_memory_is_unmapped_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of a second for 1 GiB."""
    threads: list[int] = []
    real = Kernel.close

    def close(self: Kernel) -> None:
        threads.append(threading.get_ident())
        real(self)

    async with on_one_host(tmp_path) as (_, client):
        regions = [await client.allocate(4096) for _ in range(3)]
        monkeypatch.setattr(Kernel, "close", close)
        await client.free(regions[0])
        assert len(threads) == 1
        await client.close()
        assert len(threads) == 3
        monkeypatch.undo()
    assert threading.get_ident() not in threads
