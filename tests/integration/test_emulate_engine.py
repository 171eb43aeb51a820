"""Engines of an emulated cluster: real processes beside real agents, on loopback.

::

    storage ──▶ P, agent and engine ──▶ D, agent and engine ──▶ storage
       └──────▶ D ──▶ P
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from kvstore.messages import PutOutcome
from kvstore_bench.children import Child
from kvstore_bench.content import BlockContent
from kvstore_bench.emulate.engine import NOT_UNDERSTOOD, POOL, layout
from kvstore_bench.emulate.session import EngineSession
from kvstore_bench.emulate.steps import Decode, Decoded, Prefill, Prefilled, Setup
from kvstore_bench.shaped.nodes import NodeFailed
from kvstore_bench.trace import block_key
from tests.support.bothways import counters_of, settled
from tests.support.cluster import connected
from tests.support.processes import AgentProcess, Daemon, agent, daemon

pytestmark = [pytest.mark.asyncio, pytest.mark.slow]

# Layers of several sizes, so that a wrong offset cannot look right; 4,096 bytes together.
LAYERS = (1000, 24, 600, 400, 1000, 72, 504, 496)
BLOCK_BYTES, GROUPS = sum(LAYERS), 4
STEPS_S = (0.001, 0.0, 0.002, 0.001)
PATIENCE_S = 30.0
# The longest prompt: who gives back less than he took lets others wait for ever.
MEMORY_BLOCKS = 96


class Here:
    """Where engines run: on this host, as children of the test."""

    async def start(
        self,
        module: str,
        arguments: tuple[str, ...] = (),
        on_line: Callable[[str], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> Child:
        return await Child.start(module, module, arguments, on_line, on_log)


class Nodes(NamedTuple):
    """Who is there.

    Attributes:
        p, d: Engines of the prefill and of the decode node.
    """

    storage: Daemon
    prefill: AgentProcess
    decode: AgentProcess
    p: EngineSession
    d: EngineSession

    async def counters(self) -> dict[str, Counter[str]]:
        """Of all nodes, as they are."""
        uris = {"storage": self.storage.uri, "P": self.prefill.uris[0], "D": self.decode.uris[0]}
        return {name: Counter(await counters_of(uri)) for name, uri in uris.items()}

    async def turn(
        self,
        name: str,
        blocks: range,
        hit_count: int,
        *,
        overlap: bool = True,
        scope: str = "scope",
    ) -> tuple[Prefilled, Decoded]:
        """A whole turn, as the emulation lets it happen."""
        loaded = asyncio.Event()
        step = prefill(name, blocks, hit_count, overlap=overlap, scope=scope)

        async def then_decode() -> Decoded:
            await loaded.wait()
            return await self.d.decode(
                decode(name, blocks, hit_count, self.prefill.uris[0], scope=scope),
                lambda: self.p.release(name),
            )

        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            first = group.create_task(self.p.prefill(step, loaded.set))
            second = group.create_task(then_decode())
        return first.result(), second.result()


def prefill(
    name: str, blocks: range, hit_count: int, *, overlap: bool = True, scope: str = "scope"
) -> Prefill:
    """The first half of a turn."""
    return Prefill(
        turn=name,
        scope=scope,
        blocks=tuple(blocks),
        hit_count=hit_count,
        decode_node="decode",
        compute_s=STEPS_S,
        overlap=overlap,
        deadline_s=20.0,
    )


def decode(name: str, blocks: range, hit_count: int, peer: str, *, scope: str = "scope") -> Decode:
    """The second half of a turn."""
    return Decode(
        turn=name,
        scope=scope,
        blocks=tuple(blocks),
        hit_count=hit_count,
        peer=peer,
        wait_s=15.0,
        first_token_s=0.001,
        decode_s=0.002,
        deadline_s=20.0,
    )


def setup(of: AgentProcess, memory_blocks: int = MEMORY_BLOCKS) -> Setup:
    """What an engine is told first."""
    return Setup(of.uris[1], 16, LAYERS, GROUPS, memory_blocks * BLOCK_BYTES)


@asynccontextmanager
async def nodes(path: Path) -> AsyncIterator[Nodes]:
    """Run a daemon, two agents that are no caches, and two engines."""
    with (
        daemon() as storage,
        agent(
            *("--storage", storage.uri, "--node-id", "decode", "--local", f"unix://{path}/d"),
            "--drop-idle",
            listeners=2,
        ) as on_d,
        agent(
            *("--storage", storage.uri, "--node-id", "prefill", "--local", f"unix://{path}/p"),
            *("--relay", on_d.uris[0], "--policy", "round_robin", "--drop-idle"),
            listeners=2,
        ) as on_p,
    ):
        p = await EngineSession.start(Here(), setup(on_p))
        try:
            d = await EngineSession.start(Here(), setup(on_d))
            try:
                yield Nodes(storage, on_p, on_d, p, d)
            finally:
                await d.stop()
        finally:
            await p.stop()


async def store(on: Nodes, blocks: range, scope: str = "scope") -> None:
    """Put blocks to storage that no agent has."""
    keys = [block_key(scope, block) for block in blocks]
    filled = np.empty((len(keys), BLOCK_BYTES), np.uint8)
    BlockContent(BLOCK_BYTES).fill(filled, keys)
    async with connected(on.storage.uri) as client:
        namespace = await client.open_namespace(POOL, layout(setup(on.prefill)))
        handle = client.put(namespace, keys, filled)
        assert (await handle).outcomes == [PutOutcome.STORED] * len(keys)
        await handle.quiesced()


async def stored(on: Nodes, blocks: range, scope: str = "scope") -> list[bool]:
    """Which blocks storage has, with the bytes that belong there."""
    keys = [block_key(scope, block) for block in blocks]
    async with connected(on.storage.uri) as client:
        namespace = await client.open_namespace(POOL, layout(setup(on.prefill)))
        into = np.zeros((len(keys), BLOCK_BYTES), np.uint8)
        handle = client.fetch(namespace, keys, into)
        await handle
        await handle.quiesced()
    return [not bad for bad in BlockContent(BLOCK_BYTES).wrong(into, keys)]


async def relay_is_known(on: Nodes) -> None:
    """Return when P has loaded something by the relay."""
    await store(on, range(5000, 5200), "warm")
    for block in range(5000, 5200):
        done = await on.p.prefill(
            prefill(f"warm {block}", range(block, block + 1), 1, scope="warm")
        )
        on.p.release(done.turn)
        on.d.release(done.turn)
        if done.served == {"relay": 1}:
            await nothing_is_held(on)
            return
    raise AssertionError("nothing comes by the relay")


def all_is_well(prefilled: Prefilled, decoded: Decoded) -> None:
    """Nothing is missing, wrong, or in the wrong order."""
    assert (prefilled.error, decoded.error) == ("", "")
    assert (prefilled.missed_blocks, decoded.missed_blocks) == (0, 0)
    assert (decoded.wrong_blocks, decoded.unstored_blocks) == (0, 0)
    assert prefilled.began_at <= prefilled.first_group_at <= prefilled.ended_at
    assert prefilled.began_at <= prefilled.loaded_at <= prefilled.ended_at
    assert decoded.received_at < decoded.first_token_at < decoded.ended_at


def counted(
    before: Mapping[str, Counter[str]], after: Mapping[str, Counter[str]]
) -> dict[str, Counter[str]]:
    """What has happened in between."""
    return {name: after[name] - before[name] for name in before}


async def nothing_is_held(on: Nodes) -> None:
    """Agents keep nothing for anybody."""
    for one in (on.prefill, on.decode):
        await settled(one.uris[0], pinned_blocks=0, fills_under_way=0)
        await settled(one.uris[0], retained_blocks=0, held_blocks=0)


async def test_turns_of_a_conversation_hit_what_earlier_ones_stored(tmp_path: Path) -> None:
    async with nodes(tmp_path) as on:
        for overlap in (True, False):
            scope = f"overlap {overlap}"
            for hits, count in ((0, 32), (32, 64), (64, 96)):
                before = await on.counters()
                prefilled, decoded = await on.turn(
                    f"{scope}.{hits}", range(count), hits, overlap=overlap, scope=scope
                )
                all_is_well(prefilled, decoded)
                assert sum(prefilled.served.values()) == hits
                assert sum(decoded.served.values()) == count
                changed = counted(before, await on.counters())
                assert changed["storage"]["put_bytes"] == (count - hits) * BLOCK_BYTES
                assert changed["storage"]["fetch_bytes"] == hits * BLOCK_BYTES
                assert changed["P"]["offer_bytes"] == (count - hits) * BLOCK_BYTES
                await nothing_is_held(on)
            assert await stored(on, range(97), scope) == [True] * 96 + [False]


async def test_each_hit_leaves_storage_once_and_half_of_them_by_the_other_link(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path) as on:
        await relay_is_known(on)
        await store(on, range(48))
        for overlap in (True, False):
            before = await on.counters()
            ways: Counter[str] = Counter()
            # Whole requests take turns.
            for number in range(2):
                prefilled, decoded = await on.turn(
                    f"{number}.{overlap}", range(64), 48 - 16 * overlap, overlap=overlap
                )
                all_is_well(prefilled, decoded)
                ways.update(prefilled.served)
                way = {"direct": "peer", "relay": "held"}
                hits = Counter({way[name]: count for name, count in prefilled.served.items()})
                assert Counter(decoded.served) - hits == {"peer": 16 + 16 * overlap}
            count = 48 - 16 * overlap
            assert ways == {"direct": count, "relay": count}
            changed = counted(before, await on.counters())
            assert changed["storage"]["fetch_bytes"] == 2 * count * BLOCK_BYTES
            assert changed["P"]["storage_fetch_bytes_relay"] == count * BLOCK_BYTES
            assert changed["P"]["storage_fetch_bytes_direct"] == count * BLOCK_BYTES
            assert changed["D"]["storage_fetch_bytes_direct"] == count * BLOCK_BYTES
            assert changed["D"]["claims"] == 1
            await nothing_is_held(on)


async def test_turns_of_several_sessions_go_side_by_side(tmp_path: Path) -> None:
    async with nodes(tmp_path) as on:
        before = await on.counters()

        async def talk(scope: str, overlap: bool) -> None:
            hits = 0
            for count in (24, 40, 60):
                both = await on.turn(
                    f"{scope}.{count}", range(count), hits, overlap=overlap, scope=scope
                )
                all_is_well(*both)
                hits = count

        async with asyncio.TaskGroup() as group:
            for session in range(6):
                group.create_task(talk(f"session {session}", session < 3))
        changed = counted(before, await on.counters())
        assert changed["storage"]["put_bytes"] == 6 * 60 * BLOCK_BYTES
        assert changed["storage"]["fetch_bytes"] == 6 * (24 + 40) * BLOCK_BYTES
        await nothing_is_held(on)
        # All memory is free again.
        all_is_well(*await on.turn("last", range(MEMORY_BLOCKS), 0))


@pytest.mark.long
async def test_turns_without_hits_or_new_blocks_or_any(tmp_path: Path) -> None:
    async with nodes(tmp_path) as on:
        all_is_well(*await on.turn("new", range(3), 0))
        before = await on.counters()
        prefilled, decoded = await on.turn("old", range(3), 3)
        all_is_well(prefilled, decoded)
        both = await on.turn("empty", range(0), 0)
        all_is_well(*both)
        assert both[1].served == {}
        changed = counted(before, await on.counters())
        assert changed["P"]["offer_bytes"] == 0
        assert changed["storage"]["put_bytes"] == 0


@pytest.mark.long
async def test_a_turn_may_be_told_to_both_at_once(tmp_path: Path) -> None:
    async with nodes(tmp_path) as on:
        await relay_is_known(on)
        await store(on, range(64))
        before = await on.counters()
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            second = group.create_task(
                on.d.decode(decode("early", range(80), 64, on.prefill.uris[0]))
            )
            first = group.create_task(on.p.prefill(prefill("early", range(80), 64)))
        all_is_well(first.result(), second.result())
        changed = counted(before, await on.counters())
        assert changed["storage"]["put_bytes"] == 16 * BLOCK_BYTES
        on.p.release("early")
        await nothing_is_held(on)


@pytest.mark.long
async def test_what_is_missing_or_wrong_is_said_and_not_stored(tmp_path: Path) -> None:
    async with nodes(tmp_path) as on:
        # Storage has three of five hits, one of them with the bytes of another block.
        await store(on, range(2))
        keys = [block_key("scope", 2)]
        wrong = np.empty((1, BLOCK_BYTES), np.uint8)
        BlockContent(BLOCK_BYTES).fill(wrong, [block_key("scope", 3)])
        async with connected(on.storage.uri) as client:
            namespace = await client.open_namespace(POOL, layout(setup(on.prefill)))
            handle = client.put(namespace, keys, wrong)
            assert (await handle).ok
            await handle.quiesced()
        prefilled = await on.p.prefill(prefill("bad", range(8), 5))
        assert prefilled.missed_blocks == 2
        step = decode("bad", range(9), 5, on.prefill.uris[0])  # P knows of no ninth block
        decoded = await on.d.decode(
            Decode(
                **{name: getattr(step, name) for name in step.__struct_fields__} | {"wait_s": 0.1}
            )
        )
        assert decoded.missed_blocks == 3
        assert decoded.wrong_blocks == 1
        assert decoded.unstored_blocks == 1
        assert await stored(on, range(5, 9)) == [True] * 3 + [False]
        # A prompt that never fits; a step that makes no sense. The engine goes on.
        answer = await on.p.prefill(prefill("large", range(MEMORY_BLOCKS + 1), 0))
        assert "memory for 96" in answer.error
        assert answer.missed_blocks == MEMORY_BLOCKS + 1
        answer = await on.p.prefill(prefill("x" * 300, range(3), 3))
        assert "1 to 256 characters" in answer.error
        all_is_well(*await on.turn("good", range(100, 103), 0))


async def test_an_engine_that_dies_in_mid_turn_is_told_to_all_who_wait(tmp_path: Path) -> None:
    async with nodes(tmp_path) as on:
        step = decode("never", range(4), 0, on.prefill.uris[0])
        waiting = [asyncio.create_task(on.d.decode(step))]
        # It has begun.
        await settled(on.prefill.uris[0], peer_requests=1)
        waiting.append(asyncio.create_task(on.d.prefill(prefill("other", range(9, 12), 0))))
        await asyncio.sleep(0)
        os.kill(on.d.child.pid, signal.SIGKILL)
        for one in waiting:
            with pytest.raises(NodeFailed, match="ended with signal 9"):
                await one
        with pytest.raises(NodeFailed, match="ended with signal 9"):
            await on.d.decode(step)
        await nothing_is_held(on)


@pytest.mark.long
async def test_who_waits_no_more_does_not_disturb_the_others(tmp_path: Path) -> None:
    async with nodes(tmp_path) as on:
        step = decode("given up", range(4), 0, on.prefill.uris[0])
        waiting = asyncio.create_task(on.d.decode(step))
        await settled(on.prefill.uris[0], peer_requests=1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        # The answer to this one frees the other, whose answer nobody hears.
        await on.p.prefill(prefill("given up", range(4), 0))
        all_is_well(*await on.turn("next", range(10, 90), 0))


async def test_a_lost_agent_is_said_in_the_answers(tmp_path: Path) -> None:
    async with nodes(tmp_path) as on:
        all_is_well(*await on.turn("first", range(4), 0))
        on.prefill.signal(signal.SIGKILL)
        assert on.prefill.wait() == -signal.SIGKILL
        prefilled = await on.p.prefill(prefill("second", range(6), 4))
        assert prefilled.error
        assert prefilled.missed_blocks == 6
        on.p.release("second")
        decoded = await on.d.decode(decode("second", range(4), 4, on.prefill.uris[0]))
        assert decoded.missed_blocks == 0  # its own agent and storage have them


async def test_an_engine_without_an_agent_or_memory_does_not_start(tmp_path: Path) -> None:
    nobody = Setup(f"unix://{tmp_path}/nobody", 16, LAYERS, GROUPS, 1 << 20)
    with pytest.raises(NodeFailed, match="nobody"):
        await EngineSession.start(Here(), nobody)
    uneven = Setup(f"unix://{tmp_path}/nobody", 16, LAYERS, 3, 1 << 20)
    with pytest.raises(NodeFailed, match="8 layers in 3 groups"):
        await EngineSession.start(Here(), uneven)


@pytest.mark.long
async def test_an_engine_ends_with_its_input_and_at_what_it_does_not_understand(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path) as on:
        on.p.child.say('{"type": "Nonsense"}')
        assert await on.p.child.ended() == NOT_UNDERSTOOD
        assert any("not understood" in line for line in on.p.child.log)
        waiting = asyncio.create_task(on.d.decode(decode("never", range(4), 0, on.prefill.uris[0])))
        await settled(on.prefill.uris[0], peer_requests=1)
        stdin = on.d.child._process.stdin
        assert stdin is not None
        stdin.close()
        assert await on.d.child.ended() == 0
        with pytest.raises(NodeFailed, match="ended with status 0"):
            await waiting
        await nothing_is_held(on)
