"""The client of programs with threads, against servers on the test's own loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvstore.errors import (
    KVStoreError,
    LayoutMismatch,
    LocalProtocolError,
    TransportTimeout,
)
from kvstore.layout import generation_id
from kvstore.messages import FetchOutcome, Pool, PoolAction, PutOutcome
from kvstore_client import Client, FetchHandle, Namespace
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    Node,
    chain,
    check_hits,
    contents,
    room,
    serve,
    until,
    uris,
)
from tests.support.engine import layout

HIT, MISS, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.UNAVAILABLE


async def in_thread(nodes: list[Node], work: Callable[[Client, Namespace], None]) -> None:
    """Run `work` in a thread with a client of its own, while the loop serves."""

    def run() -> None:
        with Client(uris(nodes), node_id="threads", seed=1) as client:
            work(client, client.open_namespace("pool", layout(*LAYERS)))

    await asyncio.to_thread(run)


@pytest.mark.asyncio
async def test_what_was_put_is_fetched() -> None:
    keys = chain(70)

    def work(client: Client, namespace: Namespace) -> None:
        blocks = np.frombuffer(b"".join(contents(keys)), np.uint8).reshape(70, BLOCK_BYTES)
        put = client.put(namespace, keys, blocks)
        assert put.result().outcomes == [PutOutcome.STORED] * 70
        put.wait_quiet()
        found = client.lookup(namespace, keys, lease_s=5)
        assert found.prefix == 70
        into = np.zeros((70, BLOCK_BYTES), np.uint8)
        handle = client.fetch(namespace, keys, into)
        result = handle.result()
        handle.wait_quiet()
        assert handle.poll()
        assert result.ok
        assert np.array_equal(into, blocks)
        assert client.release(found.leases) == len(found.leases)
        assert client.delete(namespace, keys, first=69) == [True]
        assert client.fetch(namespace, keys, into).result().outcomes == [HIT] * 69 + [MISS]
        assert sorted(client.status()) == sorted(client.endpoints)
        assert any(client.report(f"node-{number}") for number in range(2))

    async with serve(2) as nodes:
        await in_thread(nodes, work)


@pytest.mark.asyncio
async def test_layers_are_waited_for_while_later_ones_travel() -> None:
    keys = chain(4)

    async with serve(1) as nodes:
        loop, gate = asyncio.get_running_loop(), nodes[0].gate

        def work(client: Client, namespace: Namespace) -> None:
            assert client.put(namespace, keys, contents(keys)).result().ok
            gate.chunk_bytes, gate.chunks_left = LAYERS[0], 4
            into = room(4)
            handle = client.fetch(namespace, keys, into, order="layer")
            assert handle.wait_layer(0)
            assert [block[:1000] for block in into] == [block[:1000] for block in contents(keys)]
            assert not handle.poll()
            loop.call_soon_threadsafe(gate.open)
            assert handle.wait_layer(2)
            assert handle.result().ok
            assert handle.wait_layer(1)
            with pytest.raises(IndexError):
                handle.wait_layer(3)

        await in_thread(nodes, work)


@pytest.mark.asyncio
async def test_a_cancelled_fetch_ends_at_once_and_frees_its_memory() -> None:
    keys = chain(4)

    async with serve(1) as nodes:
        nodes[0].gate.chunks_left = 0

        def work(client: Client, namespace: Namespace) -> None:
            assert client.put(namespace, keys, contents(keys)).result().ok
            handle = client.fetch(namespace, keys, room(4), deadline_s=600)
            handle.cancel()
            assert handle.result().outcomes == [UNAVAILABLE] * 4
            handle.wait_quiet()
            assert not handle.wait_layer(0)

        await in_thread(nodes, work)


def test_a_wait_for_memory_has_an_end_where_one_is_asked_for() -> None:
    handle = FetchHandle(5.0, lambda: None, 1)
    with pytest.raises(TransportTimeout, match="still in use"):
        handle.wait_quiet(0)
    handle.quiet.set_result(None)
    handle.wait_quiet(0)
    handle.wait_quiet()


@pytest.mark.asyncio
async def test_short_times_are_told_too() -> None:
    """The loop's own clock goes in steps of a millisecond."""

    def work(client: Client, namespace: Namespace) -> None:
        for _ in range(20):
            result = client.fetch(namespace, chain(1), room(1)).result()
            assert result.elapsed_s > 0
            assert result.runs[0].elapsed_us > 0

    async with serve(1) as nodes:
        await in_thread(nodes, work)


@pytest.mark.asyncio
async def test_pools_and_counters_are_at_hand_in_threads() -> None:
    def work(client: Client, namespace: Namespace) -> None:
        generation = namespace.generation
        client.put(namespace, chain(2), contents(chain(2))).result()
        for answers in (
            client.pools(),
            client.pin_pool("pool", generation),
            client.unpin_pool("pool"),
            client.set_pool_capacity("pool", 1 << 20),
        ):
            assert list(answers) == client.endpoints
            for pools in answers.values():
                assert not isinstance(pools, KVStoreError)
                assert [pool.pool for pool in pools] == ["pool"]
        for pools in client.retire_generation("pool", generation).values():
            assert not isinstance(pools, KVStoreError)
            assert pools[0].generations == ()
        assert client.counters()["put_blocks_stored"] == 2
        assert list(client.reports()) == client.endpoints
        assert any(client.reports().values())

    async with serve(2) as nodes:
        await in_thread(nodes, work)


@pytest.mark.asyncio
async def test_a_deadline_ends_a_fetch() -> None:
    keys = chain(4)

    async with serve(1) as nodes:
        nodes[0].gate.chunk_bytes, nodes[0].gate.chunks_left = 4096, 2

        def work(client: Client, namespace: Namespace) -> None:
            assert client.put(namespace, keys, contents(keys)).result().ok
            into = room(4)
            handle = client.fetch(namespace, keys, into, deadline_s=0.05)
            result = handle.result()
            handle.wait_quiet()
            assert result.outcomes == [HIT, HIT, FetchOutcome.TIMEOUT, FetchOutcome.TIMEOUT]
            check_hits(result, keys, into)

        await in_thread(nodes, work)


@pytest.mark.asyncio
async def test_errors_reach_the_thread_that_asked() -> None:
    async with serve(1) as nodes:

        def work(client: Client, namespace: Namespace) -> None:
            with pytest.raises(LocalProtocolError, match="key of 3"):
                client.fetch(namespace, [b"key"], room(1))
            with pytest.raises(LocalProtocolError, match="ack="):
                client.put(namespace, chain(1), contents(chain(1)), ack="maybe")
            nodes[0].source.administer_pool(
                Pool(
                    action=PoolAction.PIN,
                    pool="pool",
                    generation=generation_id("pool", layout(*LAYERS)),
                )
            )
            with pytest.raises(LayoutMismatch) as caught:
                client.open_namespace("pool", layout(*LAYERS, dtype="int8"))
            assert caught.value.field == "dtype"

        await in_thread(nodes, work)


def test_a_client_that_does_not_run_says_so() -> None:
    client = Client("tcp://127.0.0.1:1")
    namespace = Namespace("pool", layout(*LAYERS))
    calls: list[Callable[[], Any]] = [
        lambda: client.fetch(namespace, chain(1), room(1)),
        lambda: client.put(namespace, chain(1), contents(chain(1))),
        lambda: client.lookup(namespace, chain(1)),
        lambda: client.open_namespace("pool", layout(*LAYERS)),
        client.status,
        client.pools,
    ]
    for when in ("before", "after"):
        for call in calls:
            with pytest.raises(LocalProtocolError, match="not started, or was closed"):
                call()
        client.close()
        if when == "before":
            client.start()
            client.close()
            client.close()
    with pytest.raises(LocalProtocolError, match="started before"):
        client.start()


@pytest.mark.asyncio
async def test_nobody_waits_for_a_client_that_is_closed() -> None:
    keys = chain(4)

    async with serve(1) as nodes:
        nodes[0].gate.chunks_left = 0

        def work() -> None:
            client = Client(uris(nodes), node_id="threads", deadline_s=600)
            client.start()
            namespace = client.open_namespace("pool", layout(*LAYERS))
            assert client.put(namespace, keys, contents(keys)).result().ok
            handles = [client.fetch(namespace, keys, room(4)) for _ in range(10)]
            with ThreadPoolExecutor(20) as pool:
                waiting = [pool.submit(handle.result) for handle in handles]
                waiting += [pool.submit(handle.wait_layer, 0) for handle in handles]
                client.close()
                for handle in handles:
                    assert handle.result().outcomes == [UNAVAILABLE] * 4
                    handle.wait_quiet()
                    handle.cancel()
                assert all(future.result(60) is not None for future in waiting)

        await asyncio.to_thread(work)


@pytest.mark.asyncio
@pytest.mark.slow
async def test_threads_that_call_while_the_client_is_closed() -> None:
    keys = chain(4)
    stop = threading.Event()

    def call(client: Client, namespace: Namespace) -> int:
        count = 0
        while not stop.is_set():
            try:
                client.lookup(namespace, keys)
                client.fetch(namespace, keys, room(4)).result()
                client.put(namespace, keys, contents(keys)).result()
                client.status()
            except KVStoreError:
                return count
            count += 1
        return count

    def work(nodes: list[Node]) -> None:
        for _ in range(10):
            client = Client(uris(nodes), node_id="threads")
            client.start()
            namespace = client.open_namespace("pool", layout(*LAYERS))
            with ThreadPoolExecutor(8) as pool:
                callers = [pool.submit(call, client, namespace) for _ in range(8)]
                client.lookup(namespace, keys)
                client.close()
                for caller in callers:
                    caller.result(60)

    async with serve(2) as nodes:
        try:
            await asyncio.to_thread(work, nodes)
        finally:
            stop.set()


@pytest.mark.asyncio
@pytest.mark.slow
async def test_many_threads_share_a_client() -> None:
    def one(client: Client, namespace: Namespace, number: int) -> None:
        keys = chain(20, start=1000 * number)
        for _ in range(5):
            assert client.put(namespace, keys, contents(keys)).result().ok
            into = room(20)
            result = client.fetch(namespace, keys, into).result()
            assert result.ok
            check_hits(result, keys, into)
            assert client.lookup(namespace, keys).prefix == 20
            assert all(client.delete(namespace, keys))

    def work(client: Client, namespace: Namespace) -> None:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(one, client, namespace, n) for n in range(8)]:
                future.result()

    async with serve(3) as nodes:
        await in_thread(nodes, work)


@pytest.mark.asyncio
async def test_a_call_on_the_clients_own_thread_is_refused() -> None:
    keys = chain(1)
    errors: list[Exception] = []

    async with serve(1) as nodes:

        def work(client: Client, namespace: Namespace) -> None:
            def inside(_: object) -> None:
                for call in (lambda: client.lookup(namespace, keys), client.close):
                    try:
                        call()
                    except LocalProtocolError as error:
                        errors.append(error)

            handle = client.fetch(namespace, keys, room(1))
            handle.outcome.add_done_callback(inside)
            handle.result()
            handle.wait_quiet()
            assert client.lookup(namespace, keys).prefix == 0

        await in_thread(nodes, work)
        assert len(errors) in (0, 2)  # none if the outcome was there before the callback
        await until(lambda: not nodes[0].server.connections)
