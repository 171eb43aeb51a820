"""Queue pairs that fail at one side, or never connect: what is still written, and what goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

import pytest

from kvstore.errors import TransportError
from kvstore.messages import FetchOutcome
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_queue import RdmaQueue
from kvstore.transport.verbs import VerbsError
from kvstore_client import (
    AsyncClient,
    AsyncFetchHandle,
    Namespace,
    Region,
    agreement as agreement_module,
    cluster as cluster_module,
    link as link_module,
)
from tests.rdma.fault_suite import idle
from tests.support.cluster import Node, chain, until
from tests.support.fakeverbs import PACKET_BYTES, FakeVerbs
from tests.support.links import cut, link_of, reconnected, up_again
from tests.support.loops import turns
from tests.support.rdmaserved import active_end, fetch_into, passive_end, put_blocks, served
from tests.support.regions import stain, stained
from tests.support.verbsdevices import indestructible

HIT, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.UNAVAILABLE
COUNT = 8
KEYS = chain(COUNT)
#: Two packets and a bit: so it can be cut in the middle of a block.
BLOCK = 2 * PACKET_BYTES + 1000
SIZE = COUNT * BLOCK


class Fetching(NamedTuple):
    """A fetch that is under way."""

    node: Node
    client: AsyncClient
    namespace: Namespace
    region: Region
    handle: AsyncFetchHandle


@asynccontextmanager
async def held(system: FakeVerbs) -> AsyncIterator[Fetching]:
    """A fetch of which every block waits in a device of the daemon, by turns on all rails."""
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        node.gate.chunk_bytes = BLOCK
        system.hold()
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: system.waiting() >= COUNT, "it is under way on all rails")
        yield Fetching(node, client, namespace, region, handle)


def release_unseen(system: FakeVerbs) -> None:
    """Everything moves in this turn of the loop: no side has looked at its completions."""
    system.release()
    system.wait(lambda: system.waiting() == 0, "all packets")


@contextmanager
def no_way_for_the_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It cannot connect its second queue pair while the block lasts; the daemon can."""
    real = RdmaNode.connect

    def connect(self: RdmaNode, queue: RdmaQueue, *rest: object) -> None:
        if queue.place == 1 and not queue.end.active:
            raise VerbsError("no route to the peer")
        real(self, queue, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RdmaNode, "connect", connect)
        yield


# --- what the daemon has lost ---------------------------------------------------------------


@pytest.mark.asyncio
async def test_client_gives_up_its_end_of_a_rail_that_lost_something(system: FakeVerbs) -> None:
    """And of no other: the link stays up, and goes on with what is left."""
    async with held(system) as (node, client, namespace, region, handle):
        end = active_end(node)
        lost = end.queues[1]
        end.fail(lost, TransportError("the peer does not answer"))
        system.release()
        result = await handle
        await handle.quiesced()
        assert set(result.outcomes) == {HIT, UNAVAILABLE}
        assert [queue.place for queue in passive_end(client).queues] == [1 - lost.place]
        assert link_of(client).up
        assert (await fetch_into(client, namespace, KEYS, region)).ok
        assert not client.counters().get("reconnects")


@pytest.mark.asyncio
@pytest.mark.parametrize("fake", [1, 2], indirect=True)
async def test_packet_that_comes_late_is_not_written(system: FakeVerbs) -> None:
    """A queue pair of the daemon fails; what it has sent already is in the network, and comes to
    the client's end, whatever the daemon has given up since."""
    async with held(system) as (node, client, _, region, handle):
        end = active_end(node)
        queue = end.queues[0]
        pair = queue.pair
        rail = pair._rail  # type: ignore[attr-defined]
        with rail.lock:
            sending = pair.sends[0]  # type: ignore[attr-defined]
            local = rail._local(sending, PACKET_BYTES)
            packet = rail._request(pair, sending, PACKET_BYTES, local)
        mine = passive_end(client)
        rails = [other.pair._rail for other in mine.queues]  # type: ignore[attr-defined]
        end.fail(queue, TransportError("the peer does not answer"))
        system.release()
        result = await handle
        await handle.quiesced()
        assert UNAVAILABLE in result.outcomes
        assert region.users == 0
        stain(region)
        assert rails
        for theirs in rails:
            with theirs.lock:
                theirs._answer(memoryview(packet))
        assert stained(region), "written after quiet"


@pytest.mark.asyncio
async def test_memory_stays_in_use_where_a_rail_cannot_be_given_up(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with held(system) as (node, client, _, region, handle):
        mine, end = passive_end(client), active_end(node)
        monkeypatch.setattr(cluster_module, "CLOSE_S", 0.0)  # it never is
        with indestructible(monkeypatch, mine.queues):
            end.fail(end.queues[1], TransportError("the peer does not answer"))
            system.release()
            await until(lambda: mine.stuck, "its end was to be given up")
            await turns()
            assert not handle.quiet.done()
            assert region.users == 1
        handle.cancel()


@pytest.mark.asyncio
async def test_memory_stays_in_use_where_the_queue_pairs_of_a_lost_link_cannot_be_destroyed(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can say what the device still does."""
    async with held(system) as (_, client, _, region, handle):
        monkeypatch.setattr(cluster_module, "CLOSE_S", 0.0)  # it never is
        with indestructible(monkeypatch, passive_end(client).queues):
            cut(client)
            await turns()
        assert not handle.quiet.done()
        assert region.users == 1
        system.release()
        handle.cancel()


# --- news that were not taken ---------------------------------------------------------------


@pytest.mark.asyncio
async def test_rail_of_the_client_that_fails_before_news_were_taken(system: FakeVerbs) -> None:
    """The daemon's writes are done, and their news lie in a queue pair that the client gives up:
    nobody says that they are lost."""
    async with held(system) as (_, client, _, _, handle):
        release_unseen(system)
        end = passive_end(client)
        end.fail(end.queues[1], TransportError("the port is down"))
        await until(handle.poll, "its outcome, long before the deadline")
        await handle.quiesced()


@pytest.mark.asyncio
async def test_news_that_never_come_end_the_session(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were in a device that is broken: nobody else can know that they are missing."""
    monkeypatch.setattr(agreement_module, "NEWS_LOOK_S", 0.01)
    monkeypatch.setattr(RdmaNode, "take_news", lambda self, queue: None)
    async with held(system) as (_, client, namespace, region, handle):
        release_unseen(system)
        end = passive_end(client)
        end.fail(end.queues[1], TransportError("the device is broken"))
        await until(handle.poll, "its outcome, long before the deadline")
        result = await handle
        await handle.quiesced()
        assert UNAVAILABLE in result.outcomes
        assert "news of what it has written are missing" in str(result.errors)
        await reconnected(client)
        await up_again(client, namespace)
        assert (await fetch_into(client, namespace, KEYS, region)).ok


@pytest.mark.asyncio
@pytest.mark.parametrize("fake", [1], indirect=True)
@pytest.mark.parametrize("count", [8, 64])
async def test_cancelled_put_ends_when_all_its_reads_end_at_once(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """With 64 blocks it waits for room beside the reads that are under way."""
    monkeypatch.setattr(link_module, "CANCEL_GRACE_S", 3600)
    async with served((4096,)) as (node, client, namespace):
        region = await client.allocate(count * 4096)
        system.hold()
        handle = client.put(namespace, chain(count, start=100), region.view, deadline_s=600)
        await until(lambda: system.waiting() > 0, "it is under way")
        handle.cancel()
        await until(lambda: node.server.counters["requests_cancel"] == 1, "the CANCEL")
        await turns()
        release_unseen(system)  # so that all of them are found by one look
        await idle(node)
        await until(lambda: node.store.index.reserved_count == 0, "nothing is reserved")
        await until(handle.quiet.done, "the last word on it")


# --- rails that do not connect --------------------------------------------------------------


@pytest.mark.asyncio
async def test_rail_that_only_the_client_could_not_connect_carries_nothing(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon was told of it before, and connected its own end: nobody tells it better."""
    with no_way_for_the_client(monkeypatch):
        async with served((BLOCK,)) as (node, client, namespace):
            await until(lambda: link_of(client).up, "a session without it")
            assert len(passive_end(client).queues) == 1
            node.gate.chunk_bytes = BLOCK
            await put_blocks(client, namespace, KEYS)
            region = await client.allocate(SIZE)
            assert (await fetch_into(client, namespace, KEYS, region)).ok


@pytest.mark.asyncio
async def test_rail_that_only_the_client_cannot_connect_is_left_out_by_auto_too(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is not used for it: there is another rail."""
    with no_way_for_the_client(monkeypatch):
        async with served((BLOCK,), transport="auto") as (_, client, namespace):
            await up_again(client, namespace)
            assert [queue.place for queue in passive_end(client).queues] == [0]
            await put_blocks(client, namespace, KEYS)
