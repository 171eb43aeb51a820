"""Regions of a client, and the ways of its links into them, where something goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.buffers import Region as Kernel
from kvstore.errors import LocalProtocolError, TransportError
from kvstore.messages import FetchOutcome, Message
from kvstore.transport import verbs as verbs_module
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_queue import RdmaQueue
from kvstore.transport.verbs import VerbsError
from kvstore.wire import FrameType
from kvstore_client import agreement as agreement_module
from kvstore_client.linkmemory import SharedMemory
from kvstore_client.memory import Regions
from tests.support.cluster import BLOCK_BYTES, MIB, chain, connected, open_pool, serve, until
from tests.support.fakeverbs import PACKET_BYTES, FakeVerbs
from tests.support.loops import turns
from tests.support.rdmaserved import (
    active_end,
    fetch_into,
    link_of,
    passive_end,
    put_blocks,
    reconnected,
    served,
    up_again,
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


# --- queue pairs ----------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.slow
async def test_client_gives_up_its_end_of_a_rail_that_lost_something(system: FakeVerbs) -> None:
    """And of no other: the link stays up, and goes on with what is left."""
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        node.gate.chunk_bytes = BLOCK
        system.hold()
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: system.waiting() >= COUNT, "it is under way on both rails")
        end = active_end(node)
        lost = end.queues[1]
        end.fail(lost, TransportError("the peer does not answer"))
        system.release()
        result = await handle
        await handle.quiesced()
        assert set(result.outcomes) == {FetchOutcome.HIT, FetchOutcome.UNAVAILABLE}
        assert [queue.place for queue in passive_end(client).queues] == [1 - lost.place]
        assert link_of(client).up
        assert (await fetch_into(client, namespace, KEYS, region)).ok
        assert not client.counters().get("reconnects")


@pytest.mark.asyncio
@pytest.mark.slow
async def test_memory_stays_in_use_where_a_rail_cannot_be_given_up(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        node.gate.chunk_bytes = BLOCK
        system.hold()
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: system.waiting() >= COUNT, "it is under way on both rails")
        mine = passive_end(client)

        def refuse() -> None:
            raise VerbsError("the system refuses it")

        with monkeypatch.context() as patch:
            for queue in mine.queues:
                patch.setattr(queue.pair, "flush", refuse)
                patch.setattr(queue.pair, "close", refuse)
            end = active_end(node)
            end.fail(end.queues[1], TransportError("the peer does not answer"))
            system.release()
            await until(lambda: mine.stuck, "its end was to be given up")
            await turns()
            assert not handle.quiet.done()
            assert region.users == 1
        handle.cancel()


@pytest.mark.asyncio
@pytest.mark.slow
async def test_news_that_never_come_end_the_session(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were in a device that is broken: nobody else can know that they are missing."""
    monkeypatch.setattr(agreement_module, "NEWS_LOOK_S", 0.01)
    monkeypatch.setattr(RdmaNode, "take_news", lambda self, queue: None)
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
        end.fail(end.queues[1], TransportError("the device is broken"))
        result = await handle
        await handle.quiesced()
        assert FetchOutcome.UNAVAILABLE in result.outcomes
        assert "news of what it has written are missing" in str(result.errors)
        await reconnected(client)
        await up_again(client, namespace)
        assert (await fetch_into(client, namespace, KEYS, region)).ok


@pytest.mark.asyncio
@pytest.mark.slow
async def test_rail_that_only_the_client_cannot_connect_is_left_out_by_auto_too(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is not used for it: there is another rail."""
    real = RdmaNode.connect

    def connect(self: RdmaNode, queue: RdmaQueue, *rest: object) -> None:
        if queue.place == 1 and not queue.end.active:
            raise VerbsError("no route to the peer")
        real(self, queue, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RdmaNode, "connect", connect)
    async with served((BLOCK,), transport="auto") as (_, client, namespace):
        await up_again(client, namespace)
        assert [queue.place for queue in passive_end(client).queues] == [0]
        await put_blocks(client, namespace, KEYS)


# --- regions --------------------------------------------------------------------------------


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
async def test_memory_is_unmapped_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of a second for 1 GiB."""
    threads: list[int] = []
    real = Kernel.close

    def close(self: Kernel) -> None:
        threads.append(threading.get_ident())
        real(self)

    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,),
        connected([node], transport="shm") as client,
    ):
        regions = [await client.allocate(4096) for _ in range(3)]
        monkeypatch.setattr(Kernel, "close", close)
        await client.free(regions[0])
        assert len(threads) == 1
        await client.close()
        assert len(threads) == 3
        monkeypatch.undo()
    assert threading.get_ident() not in threads


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

    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,),
        connected([node], transport="shm") as client,
    ):
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
async def test_region_whose_sharing_was_cancelled_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer has it, and nobody has heard of that."""
    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,),
        connected([node], transport="shm") as client,
    ):
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


@pytest.mark.asyncio
async def test_only_shared_memory_means_that_no_socket_carries_anything(tmp_path: Path) -> None:
    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,),
        connected([node], transport="shm") as client,
    ):
        namespace = await open_pool(client)
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


@pytest.mark.asyncio
async def test_link_that_comes_up_again_is_another_session(tmp_path: Path) -> None:
    async with (
        serve(listen=f"unix://{tmp_path}/s", arena_bytes=4 * MIB) as (node,),
        connected([node]) as client,
    ):
        (before,) = node.server.sessions
        link_of(client)._take_down(TransportError("cut by the test"))
        await reconnected(client)
        await until(lambda: len(node.server.sessions) == 1, "the old one is gone")
        (after,) = node.server.sessions
        assert after != before
        assert len(node.server.sessions[after].connections) == 3
