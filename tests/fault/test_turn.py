"""A whole turn of a conversation over two nodes, in real processes, and what may end it early.

::

    storage ── direct ──▶ P, prefill ── peer, with what is computed ──▶ D, decode ── put ──▶ storage
       └───────────────── D ── relay ──▶ P
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from kvstore.messages import FetchOutcome, PutOutcome, ServedBy
from kvstore_client import AsyncClient, Namespace
from kvstore_client.handles import AsyncFetchHandle
from tests.support.agents import run_agents
from tests.support.bothways import counters_of, relay_next, settled, split
from tests.support.cluster import (
    BLOCK_BYTES,
    LAYERS,
    chain,
    check_hits,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    room,
    serve,
    store_blocks,
)
from tests.support.processes import AgentProcess, Daemon, agent, daemon

pytestmark = pytest.mark.asyncio

HIT, MISS, UNAVAILABLE = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.UNAVAILABLE
DIRECT, RELAY, PEER, HELD = ServedBy.DIRECT, ServedBy.RELAY, ServedBy.PEER, ServedBy.HELD
# The prefix, of which storage has the first blocks. Each half of them is fetched at once.
HITS, HALF = 64, 32
KEYS = chain(96)
NEW = KEYS[HITS:]
# Until the first of them comes by the relay both nodes have found each other.
WARM = chain(400, start=5000)
REQUEST = ("turn", 1)


class Turn(NamedTuple):
    """Processes, and the engines at the sockets of their nodes.

    Attributes:
        before: Counters by node, when all have found each other.
    """

    storage: Daemon
    prefill: AgentProcess
    decode: AgentProcess
    engine_p: AsyncClient
    engine_d: AsyncClient
    namespace: Namespace
    before: dict[str, dict[str, int]]

    @property
    def peer(self) -> str:
        """Where D finds P."""
        return self.prefill.uris[0]

    async def counted(self) -> dict[str, Counter[str]]:
        """What was counted since then, by node."""
        return {
            name: Counter(await counters_of(uri)) - Counter(self.before[name])
            for name, uri in _nodes(self.storage, self.prefill, self.decode).items()
        }


def _nodes(storage: Daemon, prefill: AgentProcess, decode: AgentProcess) -> dict[str, str]:
    return {"storage": storage.uri, "P": prefill.uris[0], "D": decode.uris[0]}


@asynccontextmanager
async def turn(path: Path) -> AsyncIterator[Turn]:
    """Run a daemon that has the first blocks, and two nodes that have found each other."""
    with (
        daemon() as storage,
        agent(
            *("--storage", storage.uri, "--node-id", "decode", "--local", f"unix://{path}/d"),
            listeners=2,
        ) as decode,
        agent(
            *("--storage", storage.uri, "--node-id", "prefill", "--local", f"unix://{path}/p"),
            *("--relay", decode.uris[0], "--policy", "round_robin"),
            listeners=2,
        ) as prefill,
    ):
        async with (
            connected(storage.uri) as writer,
            connected(prefill.uris[1], deadline_s=30.0) as engine_p,
            connected(decode.uris[1], deadline_s=30.0) as engine_d,
        ):
            await store_blocks(writer, await open_pool(writer), [*KEYS[:HITS], *WARM], chain=False)
            namespace = await open_pool(engine_p)
            await open_pool(engine_d)
            await found_each_other(engine_p, namespace)
            nodes = _nodes(storage, prefill, decode)
            before = {name: await counters_of(uri) for name, uri in nodes.items()}
            yield Turn(storage, prefill, decode, engine_p, engine_d, namespace, before)


async def found_each_other(engine: AsyncClient, namespace: Namespace) -> None:
    """Fetch until something comes by the relay."""
    for name in WARM:
        result = await fetch_blocks(engine, namespace, [name])
        if result.served_by == [RELAY]:
            return
        await counters_of(engine.endpoints[0])
    raise AssertionError("nothing comes by the relay")


async def load(on: Turn) -> list[ServedBy]:
    """P's engine loads what storage has, in two requests; by which paths."""
    ways = []
    for first in (0, HALF):
        result = await fetch_part(on, first)
        ways += result
    assert sorted(ways) == sorted([DIRECT, RELAY] * HALF)
    return ways


async def fetch_part(on: Turn, first: int) -> list[ServedBy]:
    """P's engine loads half of the prefix."""
    into = room(HALF)
    handle = on.engine_p.fetch(
        on.namespace,
        KEYS[: first + HALF],
        into,
        first=first,
        decode_node="decode",
        retain_for=REQUEST,
        retain_s=60,
    )
    result = await handle
    await handle.quiesced()
    check_hits(result, KEYS[first : first + HALF], into)
    assert result.ok, (result.outcomes, result.errors)
    return result.served_by


async def offer(on: Turn, layer: int) -> None:
    """P's engine has computed one layer of the blocks that storage has not."""
    begin = sum(LAYERS[:layer])
    blocks = [block[begin : begin + LAYERS[layer]] for block in contents(NEW)]
    handle = on.engine_p.offer(
        on.namespace,
        KEYS,
        blocks,
        layers=range(layer, layer + 1),
        first=HITS,
        offer_s=60,
        retain_for=REQUEST,
    )
    result = await handle
    await handle.quiesced()
    assert result.outcomes == [PutOutcome.STORED] * len(NEW), (result.outcomes, result.errors)


def pull(on: Turn, into: list[bytearray], wait_s: float) -> AsyncFetchHandle:
    """D's engine begins to pull the whole prefix, layer by layer."""
    return on.engine_d.fetch(
        on.namespace, KEYS, into, order="layer", peer=on.peer, wait_s=wait_s, deadline_s=20.0
    )


async def nothing_is_held(*agents: AgentProcess) -> None:
    """What is retained is given back or ends; nothing else is kept."""
    for one in agents:
        await settled(one.uris[0], pinned_blocks=0, fills_under_way=0, leases_passed=0)


@pytest.mark.slow
async def test_in_a_turn_each_byte_leaves_storage_once_and_crosses_where_it_must(
    tmp_path: Path,
) -> None:
    async with turn(tmp_path) as on:
        ways = await load(on)
        into = room(len(KEYS))
        claimed = await on.engine_d.claim(*REQUEST, lease_s=60)
        assert claimed.block_count == HALF
        assert claimed.bytes == HALF * BLOCK_BYTES
        pulled = pull(on, into, wait_s=15.0)
        await settled(on.peer, peer_requests=1)
        for layer in range(len(LAYERS)):
            assert not pulled.poll()
            await offer(on, layer)
            assert await pulled.layer(layer)
        result = await pulled
        await pulled.quiesced()
        check_hits(result, KEYS, into)
        assert result.ok, (result.outcomes, result.errors)
        from_peer = [PEER if way is DIRECT else HELD for way in ways] + [PEER] * len(NEW)
        assert result.served_by == from_peer

        handle = on.engine_d.put(on.namespace, KEYS, contents(NEW), first=HITS)
        assert (await handle).outcomes == [PutOutcome.STORED] * len(NEW)
        await handle.quiesced()
        assert (await on.engine_p.lookup(on.namespace, KEYS)).prefix == len(KEYS)
        assert await on.engine_d.release([claimed.lease]) == 1
        # What P has loaded and computed is kept until its engine lets it go.
        kept = await on.engine_p.claim(*REQUEST)
        assert kept.block_count == len(KEYS)
        assert await on.engine_p.release([kept.lease]) == 1
        await nothing_is_held(on.prefill, on.decode)

        counted, new = await on.counted(), len(NEW)
        blocks = {
            name: {what: size / BLOCK_BYTES for what, size in counters.items() if "bytes" in what}
            for name, counters in counted.items()
        }
        moved = {"fetch_bytes": HITS, "put_bytes": new}
        by_tcp = {f"{what}_by_tcp": count for what, count in moved.items()}
        assert blocks["storage"] == {**moved, **by_tcp}
        p, d = blocks["P"], blocks["D"]
        # Storage to P, storage to D to P, P to D.
        assert p["storage_fetch_bytes_direct"] + d["storage_fetch_bytes_direct"] == HITS
        assert d["storage_fetch_bytes_direct"] == HALF
        assert d["relay_bytes_out"] == p["storage_fetch_bytes_relay"] == HALF
        assert p["peer_bytes_out"] == d["storage_fetch_bytes_peer"] == HALF + new
        # From and to the engines.
        assert p["own_bytes"] == HITS
        assert p["offer_bytes"] == new
        assert d["own_bytes"] == len(KEYS)
        assert d["storage_put_bytes_direct"] == new
        assert counted["P"]["peer_blocks"] == HALF + new
        assert "storage_fetch_bytes_peer" not in p
        assert "storage_fetch_bytes_relay" not in d


@pytest.mark.slow
async def test_a_prefill_node_that_dies_costs_what_only_it_had(tmp_path: Path) -> None:
    async with turn(tmp_path) as on:
        await load(on)
        assert (await on.engine_d.claim(*REQUEST, lease_s=60)).found
        into = room(len(KEYS))
        pulled = pull(on, into, wait_s=15.0)
        await offer(on, 0)
        assert await pulled.layer(0)
        on.prefill.signal(signal.SIGKILL)
        assert on.prefill.wait() == -signal.SIGKILL
        result = await pulled
        await pulled.quiesced()
        check_hits(result, KEYS, into)
        assert result.outcomes[:HITS] == [HIT] * HITS
        assert set(result.outcomes[HITS:]) <= {MISS, UNAVAILABLE}
        await nothing_is_held(on.decode)
        on.decode.wait_for_line("lost prefill")
        # D relays one half, and reads of the other what P did not come to send.
        counters = Counter(await counters_of(on.decode.uris[0])) - Counter(on.before["D"])
        assert counters["storage_fetch_bytes_direct"] <= HITS * BLOCK_BYTES


@pytest.mark.slow
async def test_a_prefill_that_is_given_up_ends_the_pull_when_its_wait_is_over(
    tmp_path: Path,
) -> None:
    async with turn(tmp_path) as on:
        ways = await load(on)
        assert (await on.engine_d.claim(*REQUEST, lease_s=60)).found
        into = room(len(KEYS))
        pulled = pull(on, into, wait_s=0.3)
        await offer(on, 0)
        await on.engine_p.close()
        result = await pulled
        await pulled.quiesced()
        check_hits(result, KEYS, into)
        assert result.outcomes == [HIT] * HITS + [MISS] * len(NEW)
        assert result.served_by[:HITS] == [PEER if way is DIRECT else HELD for way in ways]
        await nothing_is_held(on.prefill, on.decode)
        assert (await on.counted())["D"]["storage_fetch_blocks_miss"] >= len(NEW)


async def test_an_engine_gets_both_paths_through_its_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        serve(1) as nodes,
        run_agents(nodes, name="other") as (other,),
        run_agents(nodes, local=tmp_path, relays=(other.uri,), policy="round_robin") as (own,),
        connected(nodes) as writer,
        connected(own.local) as engine,
    ):
        await store_blocks(writer, await open_pool(writer), NEW)
        namespace = await open_pool(engine)
        await relay_next(own.agent)
        split(monkeypatch, own.agent, 20)
        result = await fetch_blocks(engine, namespace, NEW)
        assert result.served_by == [DIRECT] * 20 + [RELAY] * (len(NEW) - 20)
        assert {run.path for run in result.runs} == {"agent"}
        again = await fetch_blocks(engine, namespace, NEW)
        assert again.served_by == [HELD] * len(NEW)
        assert nodes[0].counter("fetch_bytes") == len(NEW) * BLOCK_BYTES
