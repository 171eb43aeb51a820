"""RDMA as users see it when something breaks: whatever it is, requests end with an outcome, memory
comes back to its owner, and the next ones work.

Runs on every implementation of verbs that has the fixture `verbs`. Rule: once a handle is quiet
nobody writes into its memory. So tests stain it then, let the other side go on, and look whether
the stain has stayed.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from kvstore.errors import LocalProtocolError, TransportError
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.transport import verbs as verbs_module
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_end import RdmaEnd
from kvstore.transport.rdma_queue import RdmaQueue
from kvstore.transport.verbs import Verbs
from kvstore_client import AsyncClient, AsyncFetchHandle, FetchResult, Namespace, Region
from tests.support.cluster import Node, chain, connected, open_pool, until
from tests.support.engine import content
from tests.support.links import cut, link_of, up_again
from tests.support.memorypeer import descriptors
from tests.support.processes import Daemon
from tests.support.rdmaprocesses import doomed, rdma_daemon
from tests.support.rdmaserved import (
    active_end,
    at_work,
    fetch_into,
    passive_end,
    put_blocks,
    served,
    stop,
    trickle,
)
from tests.support.regions import STAIN, stain, stained
from tests.support.verbsdevices import port_down, queue_pair_count, removed, slow_down

HIT, TIMEOUT, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE
KIB = 1024
COUNT = 32
KEYS = chain(COUNT)
#: Large enough for something to be under way for a while.
BLOCK = 512 * KIB
SIZE = COUNT * BLOCK
ARENA_BYTES = 2 * SIZE


@asynccontextmanager
async def filled() -> AsyncIterator[tuple[Node, AsyncClient, Namespace, Region]]:
    """A daemon that holds large blocks, a client of it, and its memory for them."""
    async with served((BLOCK,), arena_bytes=ARENA_BYTES) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        yield node, client, namespace, await client.allocate(SIZE)


async def under_way(region: Region) -> None:
    """Return when the first bytes have come into memory that was stained."""
    await until(lambda: not stained_at(region, 0) or not stained_at(region, SIZE // 2), "bytes")


def stained_at(region: Region, at: int) -> bool:
    """Whether nobody has written at a place."""
    return bytes(region.view[at : at + 64]) == bytes([STAIN]) * 64


def check_typed(result: FetchResult, region: Region) -> None:
    """What has come is right; for what has not, something says why. Where the loss was noticed
    while nothing was under way there, all of it has come."""
    assert set(result.outcomes) <= {HIT, UNAVAILABLE}
    assert bool(result.errors) is (UNAVAILABLE in result.outcomes), result.errors
    for number, outcome in enumerate(result.outcomes):
        if outcome is HIT:
            block = region.view[number * BLOCK : (number + 1) * BLOCK]
            assert block == content(KEYS[number], BLOCK)


async def trickling(
    node: Node, client: AsyncClient, namespace: Namespace, region: Region
) -> tuple[AsyncFetchHandle, asyncio.Task[None]]:
    """A fetch of which the first bytes have come, and what brings it the next ones."""
    stain(region)
    flow = trickle(node)
    handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
    await under_way(region)
    return handle, flow


async def end_of(handle: AsyncFetchHandle, flow: asyncio.Task[None], node: Node) -> FetchResult:
    """The result of such a fetch; from then on everything may go."""
    result = await handle
    await handle.quiesced()
    await stop(flow, node)
    return result


async def check_other_rail(
    node: Node, client: AsyncClient, namespace: Namespace, region: Region
) -> None:
    """One rail of two is left out, and the other one carries what comes next."""
    await until(lambda: len(active_end(node).queues) == 1, "it is left out")
    await idle(node)
    assert (await fetch_into(client, namespace, KEYS, region)).ok


def take_away(region: Region) -> None:
    """End the registration of memory; its keys are told to peers as before."""
    for registration in region.registrations.values():
        for one in registration._regions:
            assert one is not None
            one.close()


def hold_half(verbs: Verbs, node: Node) -> None:
    """Let a daemon give out half of what it is asked for, in one go, and no more."""
    slow_down(verbs)
    node.gate.chunk_bytes, node.gate.chunks_left = 1024 * KIB, SIZE // 2 // (1024 * KIB)


def go_on(verbs: Verbs, node: Node) -> None:
    """Let everything go."""
    slow_down(verbs, False)
    node.gate.open()


async def idle(node: Node) -> None:
    """Return when a daemon has nothing under way."""
    await until(lambda: not node.server.busy, f"{node.name} is idle")
    await until(lambda: not any(node.store.index.pins[1:]), "nothing is pinned")


class ClientFaultTests:
    """See the module."""

    @pytest.fixture(autouse=True)
    def system(self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clients and servers find these verbs."""
        monkeypatch.setattr(verbs_module, "system_verbs", lambda: verbs)

    # --- given up --------------------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["cancel", "deadline"])
    @pytest.mark.parametrize("order", ["block", "layer"])
    async def test_nothing_is_written_after_a_fetch_that_was_given_up(
        self, verbs: Verbs, end: str, order: str
    ) -> None:
        async with filled() as (node, client, namespace, region):
            hold_half(verbs, node)
            stain(region)
            deadline_s = 0.05 if end == "deadline" else 600
            handle = client.fetch(namespace, KEYS, region.view, order=order, deadline_s=deadline_s)
            if end == "cancel":
                await under_way(region)
                handle.cancel()
            result = await handle
            await handle.quiesced()
            assert set(result.outcomes) <= {HIT, UNAVAILABLE if end == "cancel" else TIMEOUT}
            assert not result.ok
            assert region.users == 0
            stain(region)
            await idle(node)
            go_on(verbs, node)
            other = await client.allocate(SIZE)
            assert (await fetch_into(client, namespace, KEYS, other)).ok
            assert stained(region)

    @pytest.mark.asyncio
    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["cancel", "deadline", "cut", "killed"])
    async def test_nothing_is_read_after_a_put_that_was_given_up(
        self, verbs: Verbs, end: str
    ) -> None:
        async with served((BLOCK,), arena_bytes=ARENA_BYTES) as (node, client, namespace):
            region = await client.allocate(SIZE)
            for number, name in enumerate(KEYS):
                region.view[number * BLOCK : (number + 1) * BLOCK] = content(name, BLOCK)
            slow_down(verbs)
            deadline_s = 0.05 if end == "deadline" else 600
            handle = client.put(namespace, KEYS, region.view, deadline_s=deadline_s)
            if end != "deadline":
                await until(lambda: node.server.counters["requests_put"], "it is under way")
            if end == "cancel":
                handle.cancel()
            elif end == "cut":
                cut(client)
            elif end == "killed":
                await node.kill()
            result = await handle
            await handle.quiesced()
            stain(region)
            if end == "killed":
                await node.start(fresh=False)
            assert set(result.outcomes) <= {
                PutOutcome.STORED,
                PutOutcome.TIMEOUT,
                PutOutcome.UNAVAILABLE,
            }
            await idle(node)
            await until(lambda: node.store.index.reserved_count == 0, "nothing is reserved")
            slow_down(verbs, False)
            await up_again(client, namespace)
            # What is stored is right: nothing of the stain came there.
            found = await fetch_into(client, namespace, KEYS, region)
            assert set(found.outcomes) <= {HIT, FetchOutcome.MISS}

    @pytest.mark.asyncio
    @pytest.mark.slow
    @pytest.mark.parametrize("breaks", ["server", "client", "killed"])
    async def test_nothing_is_written_after_a_lost_link(self, verbs: Verbs, breaks: str) -> None:
        async with filled() as (node, client, namespace, region):
            hold_half(verbs, node)
            stain(region)
            handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
            await under_way(region)
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
            assert result.errors
            stain(region)
            go_on(verbs, node)
            if breaks == "killed":
                await node.start(fresh=False)
            await up_again(client, namespace)
            other = await client.allocate(SIZE)
            assert (await fetch_into(client, namespace, KEYS, other)).ok
            assert stained(region)
            # All regions are there again.
            assert (await fetch_into(client, namespace, KEYS, region)).ok

    @pytest.mark.asyncio
    async def test_closed_client_leaves_memory_that_nobody_writes_into(self, verbs: Verbs) -> None:
        async with filled() as (node, _, _, _):
            client = AsyncClient(node.uri, transport="rdma")
            await client.start()
            region = await client.allocate(SIZE)
            view = region.view[:]
            hold_half(verbs, node)
            stain(region)
            handle = client.fetch(await open_pool(client, BLOCK), KEYS, view, deadline_s=600)
            await under_way(region)
            await client.close()
            assert handle.poll()
            assert handle.quiet.done()
            view[:] = bytes(SIZE)
            await until(lambda: len(node.server.sessions) == 1, "its session is gone")
            await idle(node)
            assert bytes(view) == bytes(SIZE)
            go_on(verbs, node)
            del view, region

    @pytest.mark.asyncio
    async def test_region_in_use_is_not_freed(self, verbs: Verbs) -> None:
        async with filled() as (node, client, namespace, region):
            node.gate.chunks_left = 0
            handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
            await until(lambda: node.gate._waiting, "it is under way")
            with pytest.raises(LocalProtocolError, match="in use by 1 requests: wait for `quiet`"):
                await client.free(region)
            node.gate.open()
            assert (await handle).ok
            await handle.quiesced()
            await client.free(region)
            with pytest.raises(LocalProtocolError, match="was freed before"):
                await client.free(region)

    # --- keys ------------------------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["fetch", "put"])
    async def test_memory_whose_registration_is_gone(self, verbs: Verbs, kind: str) -> None:
        async with (
            filled() as (node, client, namespace, region),
            connected([node], transport="rdma", node_id="other") as other,
        ):
            theirs, good = await open_pool(other, BLOCK), await other.allocate(SIZE)
            names = KEYS if kind == "fetch" else chain(COUNT, start=100)
            if kind == "put":
                assert all(await client.delete(namespace, KEYS))
            take_away(region)
            stain(region)
            begin = client.fetch if kind == "fetch" else client.put
            handle = begin(namespace, names, region.view, deadline_s=600)
            result = await handle
            await handle.quiesced()
            assert {outcome.name for outcome in result.outcomes} == {"UNAVAILABLE"}
            assert "may not be reached" in str(result.errors), result.errors
            assert stained(region)
            # Others do not notice, and with other memory it goes on.
            if kind == "put":
                await put_blocks(other, theirs, KEYS)
            assert (await fetch_into(other, theirs, KEYS, good)).ok
            assert other.cluster.counters["reconnects"] == 0
            await at_work(client)
            await up_again(client, namespace)
            mine = await client.allocate(SIZE)
            assert (await fetch_into(client, namespace, KEYS, mine)).ok

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_registration_that_goes_in_mid_transfer(self, verbs: Verbs) -> None:
        async with filled() as (node, client, namespace, region):
            handle, flow = await trickling(node, client, namespace, region)
            take_away(region)
            before = bytes(region.view)
            result = await end_of(handle, flow, node)
            assert UNAVAILABLE in result.outcomes
            assert "may not be reached" in str(result.errors), result.errors
            assert bytes(region.view) == before
            await at_work(client)
            await up_again(client, namespace)
            mine = await client.allocate(SIZE)
            assert (await fetch_into(client, namespace, KEYS, mine)).ok

    # --- rails -----------------------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_rail_that_dies_in_mid_transfer(self, verbs: Verbs) -> None:
        async with filled() as (node, client, namespace, region):
            if len(passive_end(client).queues) < 2:
                pytest.skip("one device only")
            handle, flow = await trickling(node, client, namespace, region)
            with port_down(verbs, verbs.devices()[1].name):
                check_typed(await end_of(handle, flow, node), region)
                await check_other_rail(node, client, namespace, region)
            assert link_of(client).up

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_device_that_is_removed_in_mid_transfer_and_comes_back(
        self, verbs: Verbs
    ) -> None:
        async with AsyncExitStack() as stack:
            node, client, namespace, region = await stack.enter_async_context(filled())
            if len(passive_end(client).queues) < 2:
                pytest.skip("one device only")
            handle, flow = await trickling(node, client, namespace, region)
            with removed(verbs, verbs.devices()[1].name):
                check_typed(await end_of(handle, flow, node), region)
                await check_other_rail(node, client, namespace, region)
                # Who connects now has one rail.
                async with connected([node], transport="rdma", node_id="late") as late:
                    assert len(passive_end(late).queues) == 1
                    other, theirs = await late.allocate(SIZE), await open_pool(late, BLOCK)
                    assert (await fetch_into(late, theirs, KEYS, other)).ok
                # The kernel lets go of it when all of its users have.
                await stack.aclose()
        async with filled() as (_, client, namespace, region):
            assert len(passive_end(client).queues) == 2
            assert (await fetch_into(client, namespace, KEYS, region)).ok

    # --- processes that end ----------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["fetch", "put"])
    async def test_client_that_is_killed_leaves_nothing_behind(
        self, verbs: Verbs, kind: str
    ) -> None:
        async with filled() as (node, client, namespace, region):
            (server,) = node.server.rdma.values()
            mine = passive_end(client)
            if kind == "put":
                assert all(await client.delete(namespace, KEYS))
            slow_down(verbs)
            async with doomed(verbs, node.uri, kind, COUNT, BLOCK) as process:
                ends = [end for end in server._ends if end.active]
                assert len(ends) == 2
                await until(
                    lambda: any(queue.outstanding for end in ends for queue in end.queues),
                    "something is under way",
                )
                process.kill()
                await process.wait()
            await until(lambda: len(node.server.sessions) == 1, "its session is gone")
            slow_down(verbs, False)
            await idle(node)
            await until(lambda: not node.store.index.reserved_count, "nothing is reserved")
            assert len(server._ends) == 1
            # Nobody else notices.
            assert passive_end(client) is mine
            names = chain(COUNT // 2, start=100)
            await put_blocks(client, namespace, names)
            assert (await fetch_into(client, namespace, names, region)).ok

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_daemon_that_is_killed_costs_what_had_not_come(self, verbs: Verbs) -> None:
        with rdma_daemon(verbs, "--memory", str(ARENA_BYTES)) as process:
            async with _halfway(verbs, process) as (client, namespace, region, handles):
                process.signal(signal.SIGKILL)
                process.wait()
                results = [await handle for handle in handles]
                for handle in handles:
                    await handle.quiesced()
                assert set(results[-1].outcomes) == {UNAVAILABLE}
                assert region.users == 0
                stain(region)
                slow_down(verbs, False)
                with rdma_daemon(verbs, "--memory", str(ARENA_BYTES), listen=process.uri):
                    await up_again(client, namespace)
                    await put_blocks(client, namespace, KEYS[:8])
                    assert stained(region)
                    assert (await fetch_into(client, namespace, KEYS[:8], region)).ok

    @pytest.mark.asyncio
    @pytest.mark.slow
    @pytest.mark.parametrize("end", ["deadline", "cancel"])
    async def test_daemon_that_was_stopped_keeps_no_memory(self, verbs: Verbs, end: str) -> None:
        with rdma_daemon(verbs, "--memory", str(ARENA_BYTES)) as process:
            deadline_s = 0.5 if end == "deadline" else 600
            async with _halfway(verbs, process, deadline_s) as (
                client,
                namespace,
                region,
                handles,
            ):
                process.signal(signal.SIGSTOP)
                try:
                    for handle in handles:
                        if end == "cancel":
                            handle.cancel()
                        result = await handle
                        # It does not hear of it: the queue pairs are taken down here.
                        await handle.quiesced()
                    assert not result.ok
                    assert set(result.outcomes) <= {HIT, TIMEOUT, UNAVAILABLE}
                    assert "does not end a cancelled request" in str(link_of(client).last_error)
                    stain(region)
                finally:
                    process.signal(signal.SIGCONT)
                slow_down(verbs, False)
                await up_again(client, namespace)
                other = await client.allocate(SIZE)
                assert (await fetch_into(client, namespace, KEYS, other)).ok
                assert stained(region)

    # --- leaks -----------------------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.slow
    @pytest.mark.parametrize("quarter", range(4))  # so that none takes minutes
    async def test_a_thousand_connects_leak_nothing(self, verbs: Verbs, quarter: int) -> None:
        async with served((4096,)) as (node, client, namespace):
            keys = KEYS[:4]
            await put_blocks(client, namespace, keys)
            (server,) = node.server.rdma.values()
            before: dict[str, object] = {}
            for number in range(250):
                async with connected([node], transport="rdma", node_id="again") as again:
                    assert link_of(again).up
                    if number % 10 == 2:
                        theirs = await open_pool(again, 4096)
                        region = await again.allocate(4 * 4096)
                        assert (await fetch_into(again, theirs, keys, region)).ok
                        if number % 20 == 2:
                            await again.free(region)
                        del region
                await until(lambda: len(server._ends) == 1, "its session is gone")
                if number == 2:
                    before = _held(verbs, server)
            after = _held(verbs, server)
            assert after == before, (before, after)


@asynccontextmanager
async def _halfway(
    verbs: Verbs, process: Daemon, deadline_s: float = 600
) -> AsyncIterator[tuple[AsyncClient, Namespace, Region, list[AsyncFetchHandle]]]:
    """A client of a daemon in its own process, and fetches of which the first bytes have come:
    several, so that it is long until the last has ended."""
    async with connected(process.uri, transport="rdma", deadline_s=60) as client:
        namespace = await open_pool(client, BLOCK)
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        stain(region)
        slow_down(verbs)
        handles = [
            client.fetch(namespace, KEYS, region.view, deadline_s=deadline_s) for _ in range(8)
        ]
        await under_way(region)
        yield client, namespace, region, handles


def _held(verbs: Verbs, server: RdmaNode) -> dict[str, object]:
    """What this process and its devices hold."""
    gc.collect()  # handles and their jobs know each other
    return {
        "open": Counter(descriptors("self")),
        "threads": len([one for one in threading.enumerate() if "asyncio" not in one.name]),
        "queue pairs": queue_pair_count(verbs),
        "objects": sum(isinstance(one, RdmaEnd | RdmaQueue) for one in gc.get_objects()),
        "registrations": len(server._memory),
        "queues": [(len(rail.queues), rail.reserved) for rail in server._rails],
    }
