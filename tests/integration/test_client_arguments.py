"""What callers get wrong: a typed error that names it, before anything is sent."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.errors import ConfigError, LocalProtocolError
from kvstore.layout import KEY_BYTES_MAX
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore_client import AsyncClient, Client, Namespace
from tests.support.agents import run_agents
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    MIB,
    chain,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    room,
    serve,
    store_blocks,
)
from tests.support.engine import key, layout

Call = Callable[[AsyncClient, Namespace], object]
KEYS = chain(2)


def fetch(into: object = None, keys: Any = KEYS, **options: Any) -> Call:
    def call(client: AsyncClient, namespace: Namespace) -> object:
        return client.fetch(namespace, keys, room(2) if into is None else into, **options)

    return call


def put(blocks: object = None, keys: Any = KEYS, **options: Any) -> Call:
    def call(client: AsyncClient, namespace: Namespace) -> object:
        return client.put(namespace, keys, contents(KEYS) if blocks is None else blocks, **options)

    return call


def layer_buffers(*sizes: int) -> list[list[bytearray]]:
    return [[bytearray(size) for size in sizes]] * 2


WRONG = {
    "into: block too small": (fetch([bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES - 1)]),
                              r"into\[1\]: 4095 bytes, expected 4096"),
    "into: block too large": (fetch([bytearray(BLOCK_BYTES + 1)] * 2), r"4097 bytes, .* 4096"),
    "into: layers' size": (fetch(room(2), layers=range(1, 2)), "4096 bytes, expected 3000"),
    "into: too few": (fetch(room(1)), "1 buffers for 2 blocks"),
    "into: too many": (fetch(room(3)), "3 buffers for 2 blocks"),
    "into: whole too small": (fetch(bytearray(2 * BLOCK_BYTES - 1)), "8191 bytes, expected 8192"),
    "into: readonly": (fetch([bytes(BLOCK_BYTES)] * 2), r"into\[0\]: .*read-only"),
    "into: readonly array": (fetch(np.broadcast_to(np.zeros(1, np.uint8), (2, BLOCK_BYTES))),
                             "into: "),
    "into: strided": (fetch(np.zeros((2, BLOCK_BYTES * 2), np.uint8)[:, ::2]), "not contiguous"),
    "into: Fortran order": (fetch(np.zeros((2, BLOCK_BYTES), np.uint8, "F")), "not contiguous"),
    "into: no buffer": (fetch(["text", "text"]), "str offers no buffer"),
    "into: None": (fetch([None, None]), "NoneType offers no buffer"),
    "into: layer missing": (fetch(layer_buffers(1000, 3000)), "2 layer buffers, expected 3"),
    "into: layer's size": (fetch(layer_buffers(1000, 3001, 96)),
                           r"into\[0\]\[1\]: 3001 bytes, expected 3000"),
    "blocks: too small": (put([bytes(BLOCK_BYTES - 1)] * 2), r"blocks\[0\]: 4095 bytes"),
    "blocks: too few": (put([bytes(BLOCK_BYTES)]), "1 buffers for 2 blocks"),
    "blocks: strided": (put(np.zeros((2, BLOCK_BYTES * 2), np.uint8)[:, ::2]), "not contiguous"),
    "key: too short": (fetch(keys=[key(1), bytes(15)]), "key of 15"),
    "key: too long": (put(keys=[bytes(65), key(1)]), "key of 65"),
    "key: text": (fetch(keys=["0" * 32, key(1)]), "key of .*str"),
    "key: number": (fetch(keys=[1, 2]), "key of .*int"),
    "key: bytearray": (fetch(keys=[bytearray(32), key(1)]), "key of 32"),
    "keys: one key": (fetch(keys=key(1)), "key of .*int"),
    "first: beyond": (fetch(first=3), "first=3"),
    "first: negative": (put(first=-1), "first=-1"),
    "layers: beyond": (fetch(layers=range(0, 4)), r"layers=range\(0, 4\)"),
    "layers: none": (fetch(layers=range(2, 2)), "layers="),
    "layers: step": (fetch(layers=range(0, 3, 2)), "layers="),
    "layers: negative": (fetch(layers=range(-1, 2)), "layers="),
    "layers: backwards": (fetch(layers=range(3, 0, -1)), "layers="),
    "order": (fetch(order="random"), "order='random'.*block, layer"),
    "group_layers": (fetch(order="layer", group_layers=0), "group_layers=0"),
    "group_layers: a fraction": (fetch(order="layer", group_layers=1.5), "group_layers=1.5"),
    "retain_for: no attempt": (fetch(retain_for=("name",)), "retain_for="),
    "retain_for: a fraction": (fetch(retain_for=("name", 1.5)), "attempt=1.5"),
    "retain_for: a truth": (fetch(retain_for=("name", True)), "attempt=True"),
    "retain_for: no text": (fetch(retain_for=(b"name", 1)), "request=b'name'"),
    "retain_for: unsayable": (fetch(retain_for=("\ud800", 1)), "request='.ud800'"),
    "decode_node: no text": (fetch(decode_node=b"node"), "decode_node=b'node'"),
    "decode_node: unsayable": (fetch(decode_node="\ud800"), "decode_node='.ud800'"),
    "deadline: nan": (fetch(deadline_s=math.nan), "deadline_s=nan"),
    "deadline: too long": (put(deadline_s=601), "deadline_s=601"),
    "deadline: endless": (fetch(deadline_s=math.inf), "deadline_s=inf"),
    "ack": (put(ack="perhaps"), "ack='perhaps'.*memory, written, synced"),
}  # fmt: skip


@pytest.mark.asyncio
async def test_wrong_arguments_are_named() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        before = nodes[0].counter("requests_fetch") + nodes[0].counter("requests_put")
        for call, message in WRONG.values():
            with pytest.raises(LocalProtocolError, match=message):
                call(client, namespace)
        assert (await fetch_blocks(client, namespace, KEYS)).ok
        after = nodes[0].counter("requests_fetch") + nodes[0].counter("requests_put")
        assert after == before + 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lease_s": -1}, "lease_s=-1"),
        ({"lease_s": 61}, "lease_s=61"),
        ({"lease_s": math.nan}, "lease_s=nan"),
        ({"deadline_s": math.nan}, "deadline_s=nan"),
        ({"first": 3}, "first=3"),
        ({"keys": [b"short"]}, "key of 5"),
        ({"namespaces": []}, "0 namespaces"),
    ],
)
async def test_wrong_arguments_of_a_lookup(options: dict[str, Any], message: str) -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        values = {"namespaces": namespace, "keys": KEYS, **options}
        with pytest.raises(LocalProtocolError, match=message):
            await client.lookup(**values)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("pool", "wanted"),
    [
        ("", layout(8)),
        ("a b", layout(8)),
        ("x" * 129, layout(8)),
        ("pool", layout()),
        ("pool", layout(0)),
        ("pool", layout(*[8] * 1025)),
        ("pool", layout(1 << 40)),
        ("pool", layout(8, tp_rank=2, tp_size=2)),
        ("pool", layout(8, block_tokens=0)),
    ],
)
async def test_impossible_namespaces(pool: str, wanted: Any) -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        with pytest.raises(LocalProtocolError):
            await client.open_namespace(pool, wanted)
        assert list(nodes[0].store.pools) == []


@pytest.mark.parametrize("make", [AsyncClient, Client])
@pytest.mark.parametrize(
    ("endpoints", "options"),
    [
        ([], {}),
        ("", {}),
        ("http://127.0.0.1:1", {}),
        ("tcp://127.0.0.1", {}),
        (["tcp://127.0.0.1:1", "tcp://127.0.0.1:1"], {}),
        ("tcp://127.0.0.1:1", {"copies": 0}),
        ("tcp://127.0.0.1:1", {"copies": 3}),
    ],
)
def test_impossible_clients(make: Any, endpoints: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make(endpoints, **options)


@pytest.mark.asyncio
@pytest.mark.parametrize("deadline_s", [0, -1, -math.inf])
async def test_a_deadline_in_the_past_is_a_timeout_at_once(deadline_s: float) -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        into = room(2)
        handle = client.fetch(namespace, KEYS, into, deadline_s=deadline_s)
        assert handle.poll()
        assert handle.quiet.done()
        assert (await handle).outcomes == [FetchOutcome.TIMEOUT] * 2
        assert into == room(2)
        stored = client.put(namespace, chain(2, 50), contents(KEYS), deadline_s=deadline_s)
        assert stored.poll()
        assert (await stored).outcomes == [PutOutcome.TIMEOUT] * 2
        assert (await client.lookup(namespace, KEYS, deadline_s=deadline_s)).prefix in (0, 2)


@pytest.mark.asyncio
async def test_a_client_that_was_not_started_says_so() -> None:
    client = AsyncClient("tcp://127.0.0.1:1")
    namespace = Namespace("pool", layout(*LAYERS))
    with pytest.raises(LocalProtocolError, match="not started"):
        client.fetch(namespace, KEYS, room(2))
    with pytest.raises(LocalProtocolError, match="not started"):
        client.put(namespace, KEYS, contents(KEYS))
    for call in (
        client.lookup(namespace, KEYS),
        client.open_namespace("pool", layout(*LAYERS)),
        client.delete(namespace, KEYS),
        client.release([]),
        client.status(),
    ):
        with pytest.raises(LocalProtocolError, match="not started"):
            await call
    await client.close()


@pytest.mark.asyncio
async def test_a_client_starts_once() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        with pytest.raises(LocalProtocolError, match="started before"):
            await client.start()
        assert (await client.lookup(await open_pool(client), KEYS)).prefix == 0


@pytest.mark.asyncio
async def test_a_client_that_was_closed_has_nothing() -> None:
    async with serve(1) as nodes:
        async with connected(nodes) as client:
            namespace = await open_pool(client)
            await store_blocks(client, namespace, KEYS)
        into = room(2)
        handle = client.fetch(namespace, KEYS, into)
        assert (await handle).outcomes == [FetchOutcome.UNAVAILABLE] * 2
        await handle.quiesced()
        stored = client.put(namespace, KEYS, contents(KEYS))
        assert (await stored).outcomes == [PutOutcome.UNAVAILABLE] * 2
        found = await client.lookup(namespace, KEYS)
        assert (found.prefix, found.unreachable) == (0, client.endpoints)
        await client.close()


@pytest.mark.asyncio
async def test_who_gives_up_waiting_takes_nothing_from_the_handle() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        handle = client.fetch(namespace, KEYS, room(2))
        for future in (handle.outcome, handle.quiet):
            asyncio.wrap_future(future).cancel()
            await asyncio.sleep(0)
            assert not future.cancelled()
        assert (await handle).ok
        await handle.quiesced()


@pytest.mark.asyncio
async def test_the_callers_list_of_keys_may_change_at_once() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        keys, blocks = list(KEYS), contents(KEYS)
        put = client.put(namespace, keys, blocks)
        keys.append(key(99))
        assert (await put).outcomes == [PutOutcome.STORED] * 2
        fetch = client.fetch(namespace, keys, into := room(3))
        keys.clear()
        assert (await fetch).outcomes == [FetchOutcome.HIT] * 2 + [FetchOutcome.MISS]
        assert into[:2] == blocks


@pytest.mark.asyncio
async def test_the_same_handle_may_be_awaited_by_many() -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, KEYS)
        handle = client.fetch(namespace, KEYS, room(2))
        results = await asyncio.gather(*(_result(handle) for _ in range(5)))
        assert all(result is results[0] for result in results)
        assert handle.result() is results[0]
        handle.cancel()
        assert (await handle).ok


async def _result(handle: Any) -> Any:
    return await handle


@pytest.mark.asyncio
async def test_many_lone_keys_of_many_layers_fit_the_requests_to_an_agent(tmp_path: Path) -> None:
    draws = random.Random(1)
    keys = [draws.randbytes(KEY_BYTES_MAX) for _ in range(1500)]
    layers = (8,) * 80
    async with (
        serve(1, arena_bytes=16 * MIB) as nodes,
        run_agents(nodes, 1, local=tmp_path, memory_bytes=16 * MIB) as (agent,),
        connected(agent.local) as client,
    ):
        namespace = await open_pool(client, *layers)
        await store_blocks(client, namespace, keys, chain=False)
        assert (await fetch_blocks(client, namespace, keys, chain=False)).ok
