"""RDMA as users see it: clients, daemons and relays, whose payload devices bring.

Runs on every implementation of verbs that has the fixture `verbs`.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise

import pytest

from kvstore.errors import LocalProtocolError
from kvstore.messages import FetchOutcome, PutOutcome, ServedBy
from kvstore.transport import verbs as verbs_module
from kvstore.transport.rdma_queue import SENDS_MAX
from kvstore.transport.verbs import NoDevice, Verbs, VerbsForbidden, VerbsMissing
from kvstore_client import AsyncClient, Client, FetchResult, Namespace, Region
from tests.support.bothways import counters_of, relay_next
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    MIB,
    chain,
    connected,
    contents,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
)
from tests.support.engine import content, layout
from tests.support.links import cut, link_of, reconnected, up_again
from tests.support.rdmaprocesses import rdma_agent, rdma_daemon
from tests.support.rdmaserved import (
    LISTEN,
    active_end,
    client_of_both,
    fetch_into,
    passive_end,
    put_blocks,
    relayed,
    served,
    ways,
)
from tests.support.verbsdevices import port_down

HIT, CORRUPT, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.CORRUPT, FetchOutcome.UNAVAILABLE
COUNT = 8
KEYS = chain(COUNT)
SIZE = COUNT * BLOCK_BYTES
DIRECT, RELAY = {("direct", "rdma")}, {("relay", "rdma")}


class ClientTests:
    """See the module."""

    @pytest.fixture(autouse=True)
    def system(self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clients and servers find these verbs."""
        monkeypatch.setattr(verbs_module, "system_verbs", lambda: verbs)

    # --- blocks come and go ----------------------------------------------------------------

    @pytest.mark.asyncio
    @pytest.mark.parametrize("order", ["block", "layer"])
    @pytest.mark.parametrize("layers", [range(3), range(1), range(1, 3)])
    @pytest.mark.parametrize("layered", [False, True])
    async def test_blocks_that_were_put_come_back(
        self, verbs: Verbs, order: str, layers: range, layered: bool
    ) -> None:
        async with served() as (node, client, namespace):
            assert await put_blocks(client, namespace, KEYS) == [PutOutcome.STORED] * COUNT
            region = await client.allocate(2 * SIZE)
            sizes = LAYERS[layers.start : layers.stop]
            # Apart, so that what is written beside a block is seen.
            starts = [number * (sum(sizes) + 64) for number in range(COUNT)]
            into: list[object] = [region.view[at : at + sum(sizes)] for at in starts]
            if layered:
                into = []
                for at in starts:
                    ends = [at + sum(sizes[:index]) for index in range(len(sizes) + 1)]
                    into.append([region.view[a:b] for a, b in pairwise(ends)])
            handle = client.fetch(namespace, KEYS, into, layers=layers, order=order)
            result = await handle
            await handle.quiesced()
            assert result.ok, (result.outcomes, result.errors)
            assert ways(result) == DIRECT
            assert result.served_by == [ServedBy.DIRECT] * COUNT
            assert sum(run.bytes for run in result.runs) == COUNT * sum(sizes)
            skipped = sum(LAYERS[: layers.start])
            expected = bytearray(2 * SIZE)
            for at, name in zip(starts, KEYS, strict=True):
                block = content(name, BLOCK_BYTES)
                expected[at : at + sum(sizes)] = block[skipped : skipped + sum(sizes)]
            assert region.view == expected
            assert node.server.counters["connections_accepted"] == 3
            del handle, into

    @pytest.mark.asyncio
    async def test_layers_are_published_as_they_come(self, verbs: Verbs) -> None:
        async with served() as (_, client, namespace):
            await put_blocks(client, namespace, KEYS)
            region = await client.allocate(SIZE)
            handle = client.fetch(namespace, KEYS, region.view, order="layer")
            for layer in range(3):
                assert await handle.layer(layer)
            assert (await handle).ok
            await handle.quiesced()
            assert region.view == b"".join(contents(KEYS))

    @pytest.mark.asyncio
    async def test_memory_of_the_caller_that_was_registered(self, verbs: Verbs) -> None:
        async with served() as (_, client, namespace):
            mine, theirs = bytearray(b"".join(contents(KEYS))), bytearray(SIZE)
            regions = [await client.register(one) for one in (mine, theirs)]
            put = await client.put(namespace, KEYS, mine)
            assert {run.transport for run in put.runs} == {"rdma"}
            result = await fetch_into(client, namespace, KEYS, regions[1])
            assert ways(result) == DIRECT
            assert theirs == mine
            # Blocks of one request may lie in several regions.
            halves = [memoryview(mine)[: SIZE // 2], memoryview(theirs)[SIZE // 2 :]]
            mine[:], theirs[:] = bytes(SIZE), bytes(SIZE)
            into = [
                half[at : at + BLOCK_BYTES]
                for half in halves
                for at in range(0, SIZE // 2, BLOCK_BYTES)
            ]
            handle = client.fetch(namespace, KEYS, into)
            assert ways(await handle) == DIRECT
            await handle.quiesced()
            assert b"".join(into) == b"".join(contents(KEYS))
            for region in regions:
                await client.free(region)

    @pytest.mark.asyncio
    async def test_missing_blocks_leave_their_memory_as_it_is(self, verbs: Verbs) -> None:
        async with served() as (_, client, namespace):
            await put_blocks(client, namespace, KEYS[::2])
            region = await client.allocate(SIZE)
            result = await fetch_into(client, namespace, KEYS, region)
            assert result.outcomes == [HIT, FetchOutcome.MISS] * (COUNT // 2)
            for number in range(1, COUNT, 2):
                block = region.view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                assert block == bytes(BLOCK_BYTES)

    @pytest.mark.asyncio
    async def test_both_hops_of_a_relay(self, verbs: Verbs) -> None:
        async with relayed() as (_, agent, client, namespace):
            await put_blocks(client, namespace, KEYS)
            region = await client.allocate(SIZE)
            result = await _fetch_by_relay(client, namespace, region)
            assert result.served_by == [ServedBy.RELAY] * COUNT
            # From storage to the relay, too: nothing else has moved there.
            counters = agent.agent.cluster.counters
            moved = {name: count for name, count in counters.items() if "_bytes_by_" in name}
            assert moved == {"fetch_bytes_by_rdma": SIZE}
            await relay_next(client, by_relay=False)
            assert ways(await fetch_into(client, namespace, KEYS, region)) == DIRECT

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_both_hops_of_a_relay_between_processes(self, verbs: Verbs) -> None:
        options = ("--transport", "rdma", "--policy", "direct")
        with (
            rdma_daemon(verbs) as kvstored,
            rdma_agent(verbs, "--storage", kvstored.uri, *options) as kvagent,
        ):
            async with client_of_both(kvstored.uri, kvagent.uri) as (client, namespace):
                await put_blocks(client, namespace, KEYS)
                await _fetch_by_relay(client, namespace, await client.allocate(SIZE))
            for uri in (kvstored.uri, kvagent.uri):
                moved = {
                    name: count
                    for name, count in (await counters_of(uri)).items()
                    if "_bytes_by_" in name and count
                }
                more = "put_bytes_by_rdma" if uri == kvstored.uri else "storage_fetch_bytes_by_rdma"
                assert moved == {"fetch_bytes_by_rdma": SIZE, more: SIZE}, moved

    @pytest.mark.asyncio
    async def test_engine_that_calls_from_its_own_thread(self, verbs: Verbs) -> None:
        async with serve(listen=LISTEN, arena_bytes=4 * MIB) as (node,):

            def engine() -> None:
                with Client(node.uri, transport="rdma", deadline_s=60) as client:
                    namespace = client.open_namespace("pool", layout(*LAYERS))
                    region = client.allocate(SIZE)
                    region.view[:] = b"".join(contents(KEYS))
                    put = client.put(namespace, KEYS, region.view).result()
                    assert {run.transport for run in put.runs} == {"rdma"}
                    into = client.register(bytearray(SIZE))
                    handle = client.fetch(namespace, KEYS, into.view)
                    assert ways(handle.result()) == DIRECT
                    handle.quiet.result(60)
                    assert into.view == region.view
                    client.free(into)

            await asyncio.to_thread(engine)

    # --- never by another way --------------------------------------------------------------

    @pytest.mark.asyncio
    async def test_memory_that_no_device_reaches_is_an_error(self, verbs: Verbs) -> None:
        async with served() as (node, client, namespace):
            region = await client.allocate(SIZE)
            blocks: list[bytearray | memoryview] = [*contents(KEYS)]
            put = client.put(namespace, KEYS, blocks)
            result = await put
            await put.quiesced()
            assert result.outcomes == [PutOutcome.UNAVAILABLE] * COUNT
            (error,) = result.errors
            assert isinstance(error, LocalProtocolError)
            assert "allocate, or register it" in str(error)
            await put_blocks(client, namespace, KEYS)
            # One block is enough, wherever it lies.
            into = [region.view[at : at + BLOCK_BYTES] for at in range(0, SIZE, BLOCK_BYTES)]
            into[3] = memoryview(bytearray(BLOCK_BYTES))
            handle = client.fetch(namespace, KEYS, into)
            fetched = await handle
            await handle.quiesced()
            assert fetched.outcomes == [UNAVAILABLE] * COUNT
            (error,) = fetched.errors
            assert isinstance(error, LocalProtocolError)
            assert "allocate, or register it" in str(error)
            assert fetched.runs == []
            assert region.view == bytes(SIZE)
            # Nothing of it was asked, and the peer is not to blame.
            assert node.server.counters["requests_fetch"] == 0
            assert (await fetch_into(client, namespace, KEYS, region)).ok

    @pytest.mark.asyncio
    async def test_auto_takes_the_stream_for_memory_that_no_device_reaches(
        self, verbs: Verbs
    ) -> None:
        async with served(transport="auto") as (_, client, namespace):
            await store_blocks(client, namespace, KEYS)
            into = room(COUNT)
            handle = client.fetch(namespace, KEYS, into)
            assert ways(await handle) == {("direct", "tcp")}
            await handle.quiesced()
            assert into == contents(KEYS)
            region = await client.allocate(SIZE)
            assert ways(await fetch_into(client, namespace, KEYS, region)) == DIRECT

    @pytest.mark.asyncio
    @pytest.mark.parametrize("kind", [NoDevice, VerbsMissing, VerbsForbidden])
    async def test_auto_is_loud_once_where_this_host_cannot(
        self,
        verbs: Verbs,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        kind: type[Exception],
    ) -> None:
        async with serve(listen=LISTEN, arena_bytes=4 * MIB) as (node,):
            _without_devices(monkeypatch, kind("it was taken away by the test"))
            async with connected([node], transport="auto") as client:
                namespace = await open_pool(client)
                region = await client.allocate(SIZE)
                await store_blocks(client, namespace, KEYS)
                assert ways(await fetch_into(client, namespace, KEYS, region)) == {
                    ("direct", "tcp")
                }
                for connection in list(node.server.connections):
                    connection.connection.close(ConnectionError("cut by the test"))
                await reconnected(client)
                assert (await fetch_into(client, namespace, KEYS, region)).ok
        (loud,) = (
            record for record in caplog.records if "taken away by the test" in record.message
        )
        assert loud.levelno == logging.WARNING
        assert "node-0 offers rdma, and tcp is used" in loud.message

    @pytest.mark.asyncio
    async def test_rdma_alone_never_falls_back(
        self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serve(listen=LISTEN, arena_bytes=4 * MIB) as (node,):
            with monkeypatch.context() as patched:
                _without_devices(patched, NoDevice("it was taken away by the test"))
                async with connected([node], transport="rdma") as client:
                    namespace = await open_pool(client)
                    region = await client.allocate(SIZE)
                    result = await fetch_into(client, namespace, KEYS, region)
                    assert result.outcomes == [UNAVAILABLE] * COUNT
                    assert "taken away by the test" in str(result.errors[0])
                    assert result.runs == []
            async with connected([node.uri.replace("rdma", "tcp")], transport="rdma") as client:
                assert link_of(client).up, "by whatever name it is called"

    @pytest.mark.asyncio
    async def test_rdma_alone_where_the_server_has_none(self, verbs: Verbs) -> None:
        async with serve() as (node,), connected([node], transport="rdma") as client:
            link = link_of(client)
            assert not link.up
            assert "transport=rdma, and nothing else is to be used" in str(link.last_error)

    # --- checksums -------------------------------------------------------------------------

    @pytest.mark.asyncio
    async def test_damaged_blocks_are_found_by_their_reader(self, verbs: Verbs) -> None:
        async with served() as (node, client, namespace):
            await put_blocks(client, namespace, KEYS)
            node.damage(namespace, KEYS[2])
            region = await client.allocate(SIZE)
            result = await fetch_into(client, namespace, KEYS, region)
            assert result.outcomes == [HIT, HIT, CORRUPT] + [HIT] * (COUNT - 3)
            assert client.cluster.counters["corrupt_blocks"] == 1
            await until(lambda: node.counter("blocks_corrupt") == 1, "it was dropped")
            await put_blocks(client, namespace, KEYS[2:3])
            assert (await fetch_into(client, namespace, KEYS, region)).ok

    @pytest.mark.asyncio
    async def test_without_verification_damage_is_not_seen(self, verbs: Verbs) -> None:
        async with served(verify=False) as (node, client, namespace):
            await put_blocks(client, namespace, KEYS)
            node.damage(namespace, KEYS[2])
            region = await client.allocate(SIZE)
            handle = client.fetch(namespace, KEYS, region.view)
            result = await handle
            await handle.quiesced()
            assert result.ok
            assert ways(result) == DIRECT
            expected = bytearray(b"".join(contents(KEYS)))
            expected[3 * BLOCK_BYTES - 1] ^= 1
            assert region.view == expected

    @pytest.mark.asyncio
    async def test_wrong_checksums_of_a_put_are_found_by_the_daemon(
        self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with served() as (node, client, namespace):
            region = await client.allocate(SIZE)
            region.view[:] = b"".join(contents(KEYS))
            made = client.cluster._checksums.checksums

            async def damaged(*request: object) -> bytes:
                found = bytearray(await made(*request))  # type: ignore[arg-type]
                found[-1] ^= 1
                return bytes(found)

            monkeypatch.setattr(client.cluster._checksums, "checksums", damaged)
            result = await client.put(namespace, KEYS, region.view)
            assert result.outcomes == [PutOutcome.STORED] * (COUNT - 1) + [PutOutcome.CORRUPT]
            assert node.counter("put_blocks_corrupt") == 1

    # --- rails -----------------------------------------------------------------------------

    @pytest.mark.asyncio
    async def test_two_rails_carry_a_fetch_and_a_put(self, verbs: Verbs) -> None:
        async with served((64 * 1024,), arena_bytes=16 * MIB) as (node, client, namespace):
            if len(passive_end(client).queues) < 2:
                pytest.skip("one device only")
            names = chain(64)
            await put_blocks(client, namespace, names)
            read = [queue.next_id for queue in active_end(node).queues]
            region = await client.allocate(64 * 64 * 1024)
            assert ways(await fetch_into(client, namespace, names, region)) == DIRECT
            written = [queue.next_id for queue in active_end(node).queues]
            assert len(read) == 2
            assert 0 not in read
            assert all(after > before for before, after in zip(read, written, strict=True))

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_rail_that_is_down_is_left_out_and_comes_back(self, verbs: Verbs) -> None:
        async with served() as (node, client, namespace):
            ends = passive_end(client).queues
            if len(ends) < 2:
                pytest.skip("one device only")
            lost = verbs.devices()[1].name
            await put_blocks(client, namespace, KEYS)
            region = await client.allocate(SIZE)
            with port_down(verbs, lost):
                await until(lambda: len(active_end(node).queues) == 1, "it was noticed")
                assert (await fetch_into(client, namespace, KEYS, region)).ok
                cut(client)
                await up_again(client, namespace)
                assert len(passive_end(client).queues) == 1
                assert (await fetch_into(client, namespace, KEYS, region)).ok
            cut(client)
            await up_again(client, namespace)
            assert len(passive_end(client).queues) == 2
            assert (await fetch_into(client, namespace, KEYS, region)).ok
            assert node.counter("rdma_queue_failures") == 1

    @pytest.mark.asyncio
    @pytest.mark.slow
    async def test_auto_takes_the_stream_where_devices_do_not_reach_each_other(
        self, verbs: Verbs, caplog: pytest.LogCaptureFixture
    ) -> None:
        names = [device.name for device in verbs.devices()]
        if len(names) < 2:
            pytest.skip("one device only")
        async with served() as (node, first, namespace):
            await put_blocks(first, namespace, KEYS)
            # Its only rail meets the first one of the daemon, which is on another network.
            uri = f"{node.uri}?device={names[1]}"
            async with connected(uri, transport="auto", deadline_s=60) as client:
                namespace = await open_pool(client)
                region = await client.allocate(SIZE)
                for number in (1, 2):
                    result = await fetch_into(client, namespace, KEYS, region)
                    assert result.outcomes == [UNAVAILABLE] * COUNT
                    assert "does not answer" in str(result.errors)
                    await reconnected(client, number)
                    await up_again(client, namespace)
                result = await fetch_into(client, namespace, KEYS, region)
                assert ways(result) == {("direct", "tcp")}
                assert caplog.text.count("node-0 offers rdma, and tcp is used") == 1
            assert (await fetch_into(first, namespace, KEYS, await first.allocate(SIZE))).ok

    # --- limits ----------------------------------------------------------------------------

    @pytest.mark.asyncio
    async def test_clients_beyond_what_devices_have_room_for(
        self, verbs: Verbs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serve(listen=LISTEN, arena_bytes=4 * MIB) as (node,):
            for rail in next(iter(node.server.rdma.values()))._rails:
                monkeypatch.setattr(rail.rail, "completions_max", SENDS_MAX)
            async with connected([node], transport="rdma") as first:
                namespace = await open_pool(first)
                await put_blocks(first, namespace, KEYS)
                async with (
                    connected([node], transport="rdma", node_id="second") as second,
                    connected([node], transport="auto", node_id="third") as third,
                ):
                    assert not link_of(second).up
                    assert "completions of other sessions" in str(link_of(second).last_error)
                    region = await third.allocate(SIZE)
                    other = await open_pool(third)
                    result = await fetch_into(third, other, KEYS, region)
                    assert ways(result) == {("direct", "tcp")}
                    assert "node-0 offers rdma, and tcp is used" in caplog.text
                    await first.close()
                    namespace = await open_pool(second)
                    await up_again(second, namespace)
                    region = await second.allocate(SIZE)
                    result = await fetch_into(second, namespace, KEYS, region)
                    assert ways(result) == DIRECT


async def _fetch_by_relay(client: AsyncClient, namespace: Namespace, region: Region) -> FetchResult:
    """Fetch all blocks by the relay, which must bring them by RDMA."""
    await relay_next(client)
    result = await fetch_into(client, namespace, KEYS, region)
    assert result.ok, (result.outcomes, result.errors)
    assert ways(result) == RELAY
    return result


def _without_devices(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """From now on nobody finds verbs."""

    def fail() -> Verbs:
        raise error

    monkeypatch.setattr(verbs_module, "system_verbs", fail)
