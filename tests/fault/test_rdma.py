"""RDMA when something breaks, on the imitation of verbs; and what only it can put to the test."""

from __future__ import annotations

import pytest

from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.transport.verbs import Verbs
from kvstore_client import link as link_module, spread
from tests.rdma.fault_suite import ClientFaultTests, idle
from tests.support.bothways import relay_next
from tests.support.cluster import chain, contents, until
from tests.support.fakeverbs import PACKET_BYTES, FakeVerbs
from tests.support.links import cut, link_of, reconnected, up_again
from tests.support.loops import turns
from tests.support.rdmaserved import (
    active_end,
    fetch_into,
    put_blocks,
    relayed,
    served,
    ways,
)
from tests.support.regions import stain, stained

HIT, TIMEOUT, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE
COUNT = 8
KEYS = chain(COUNT)
#: Two packets and a bit: so it can be cut in the middle of a block.
BLOCK = 2 * PACKET_BYTES + 1000
SIZE = COUNT * BLOCK


class TestFake(ClientFaultTests):
    """The suite."""

    @pytest.fixture
    def verbs(self, fake: FakeVerbs) -> Verbs:
        """Imitated."""
        return fake


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("end", ["deadline", "cancel", "cut"])
@pytest.mark.parametrize("packets", [0, 1, 5, 12])
async def test_what_is_under_way_is_cut_off_before_memory_is_given_back(
    system: FakeVerbs, end: str, packets: int
) -> None:
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        system.hold()
        deadline_s = 0.05 if end == "deadline" else 600
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=deadline_s)
        await until(lambda: system.waiting() > 0, "it is under way")
        system.step(packets)
        if end == "cancel":
            handle.cancel()
        elif end == "cut":
            cut(client)
        result = await handle
        # The daemon cannot end it: so the queue pairs are.
        await handle.quiesced()
        assert set(result.outcomes) <= {HIT, TIMEOUT, UNAVAILABLE}
        assert not result.ok
        stain(region)
        system.release()
        # In this turn of the loop: so it is not the daemon that has put an end to it.
        system.wait(lambda: system.waiting() == 0, "all packets")
        assert stained(region)
        await idle(node)
        assert stained(region)
        await up_again(client, namespace)
        assert (await fetch_into(client, namespace, KEYS, region)).ok


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["fetch", "put"])
async def test_memory_is_not_given_back_before_the_last_word(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(link_module, "CANCEL_GRACE_S", 3600)
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        names = KEYS if kind == "fetch" else chain(COUNT, start=100)
        system.hold()
        begin = client.fetch if kind == "fetch" else client.put
        handle = begin(namespace, names, region.view, deadline_s=600)
        await until(lambda: system.waiting() > 0, "it is under way")
        system.step(3)
        handle.cancel()
        assert handle.poll()
        await until(lambda: node.server.counters["requests_cancel"] == 1, "the CANCEL")
        await turns()
        assert not handle.quiet.done()
        assert region.users == 1
        system.release()
        await handle.quiesced()
        assert region.users == 0
        stain(region)
        await idle(node)
        assert stained(region)
        # The connection was not given up for it.
        assert node.server.counters["connections_accepted"] == 3
        assert (await fetch_into(client, namespace, KEYS, region)).ok


@pytest.mark.asyncio
@pytest.mark.slow
async def test_device_that_completes_nothing_is_given_up(system: FakeVerbs) -> None:
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        system.hold()
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        result = await handle
        await handle.quiesced()
        assert result.outcomes == [UNAVAILABLE] * COUNT
        assert "nothing has completed for 2 s" in str(result.errors), result.errors
        stain(region)
        system.release()
        await reconnected(client)
        await up_again(client, namespace)
        await idle(node)
        assert stained(region)
        assert (await fetch_into(client, namespace, KEYS, region)).ok
        assert active_end(node).failed is None


@pytest.mark.asyncio
@pytest.mark.slow
async def test_relay_that_is_killed_in_mid_transfer_costs_no_answer(system: FakeVerbs) -> None:
    async with relayed(BLOCK) as (_, agent, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(SIZE)
        await relay_next(client)
        assert ways(await fetch_into(client, namespace, KEYS, region)) == {("relay", "rdma")}
        await relay_next(client)
        stain(region)
        system.hold()  # what it holds is on its way from there
        handle = client.fetch(namespace, KEYS, region.view, deadline_s=600)
        await until(lambda: system.waiting() > 0, "it is under way")
        system.step(5)
        await agent.kill()
        system.release()
        result = await handle
        await handle.quiesced()
        assert result.ok, (result.outcomes, result.errors)
        assert ("direct", "rdma") in ways(result)
        assert region.view == b"".join(contents(KEYS, BLOCK))


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1, 2, 9])
async def test_relay_that_is_killed_between_layers_costs_no_answer(
    system: FakeVerbs, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    # Two blocks of a layer in a request, two requests under way.
    for name in ("CHUNK_BYTES_FIRST", "CHUNK_BYTES_MIN", "CHUNK_BYTES_MAX"):
        monkeypatch.setattr(spread, name, 2 * BLOCK)
    monkeypatch.setattr(spread, "WINDOW_S", 0.0)
    layers = (BLOCK,) * 3
    async with relayed(*layers) as (_, agent, client, namespace):
        await put_blocks(client, namespace, KEYS)
        region = await client.allocate(len(layers) * SIZE)
        await relay_next(client)
        whole = await fetch_into(client, namespace, KEYS, region, order="layer", group_layers=1)
        assert ways(whole) == {("relay", "rdma")}
        assert len(whole.runs) == len(layers) * COUNT // 2
        await relay_next(client)
        stain(region)
        system.hold()
        handle = client.fetch(
            namespace, KEYS, region.view, order="layer", group_layers=1, deadline_s=600
        )
        for _ in range(steps):
            await until(lambda: system.waiting() > 0, "it is under way")
            system.step(min(7, system.waiting()))
        await until(lambda: system.waiting() > 0, "it is under way")
        await agent.kill()
        system.release()
        result = await handle
        await handle.quiesced()
        assert result.ok, (result.outcomes, result.errors)
        assert handle.layers_ready == len(layers)
        assert ("direct", "rdma") in ways(result)
        assert region.view == b"".join(contents(KEYS, len(layers) * BLOCK))
        assert region.users == 0


@pytest.mark.asyncio
async def test_put_that_timed_out_leaves_only_whole_blocks(system: FakeVerbs) -> None:
    async with served((BLOCK,)) as (node, client, namespace):
        region = await client.allocate(SIZE)
        region.view[:] = b"".join(contents(KEYS, BLOCK))
        system.hold()
        handle = client.put(namespace, KEYS, region.view, deadline_s=0.05)
        await until(lambda: system.waiting() > 0, "it is under way")
        system.step(4)
        result = await handle
        system.release()
        await handle.quiesced()
        assert set(result.outcomes) <= {PutOutcome.STORED, PutOutcome.TIMEOUT}
        assert PutOutcome.TIMEOUT in result.outcomes
        stain(region)
        await idle(node)
        await until(lambda: node.store.index.reserved_count == 0, "nothing is reserved")
        await up_again(client, namespace)
        found = await fetch_into(client, namespace, KEYS, region)
        assert set(found.outcomes) <= {HIT, FetchOutcome.MISS}
        assert FetchOutcome.MISS in found.outcomes


@pytest.mark.asyncio
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fetch", "put"])
@pytest.mark.parametrize("loss", ["removed", "down"])
async def test_rail_that_goes_with_work_on_it(system: FakeVerbs, loss: str, kind: str) -> None:
    async with served((BLOCK,)) as (node, client, namespace):
        await put_blocks(client, namespace, KEYS)
        names = KEYS if kind == "fetch" else chain(COUNT, start=100)
        region = await client.allocate(SIZE)
        region.view[:] = b"".join(contents(names, BLOCK))
        # One READ a block: they are on both. A fetch of so little is one chunk.
        node.gate.chunk_bytes = BLOCK
        system.hold()
        begin = client.fetch if kind == "fetch" else client.put
        handle = begin(namespace, names, region.view, deadline_s=600)
        await until(lambda: all(queue.outstanding for queue in active_end(node).queues), "both")
        (system.remove if loss == "removed" else system.take_down)("fake1")
        system.release()
        result = await handle
        await handle.quiesced()
        assert {outcome.name for outcome in result.outcomes} <= {"HIT", "STORED", "UNAVAILABLE"}
        assert not result.ok
        assert "fake1" in str(result.errors), result.errors
        assert link_of(client).up
        await until(lambda: len(active_end(node).queues) == 1, "it is left out")
        await idle(node)
        # The other one carries on.
        assert (await fetch_into(client, namespace, KEYS, region)).ok
        await put_blocks(client, namespace, chain(COUNT, start=200))
        system.bring_up("fake1")
