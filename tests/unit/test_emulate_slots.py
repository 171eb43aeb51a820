"""The memory of an emulated engine: who gets which slots, and what is written there."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from contextlib import AsyncExitStack

import pytest

from kvstore.errors import KVStoreError, LimitExceeded
from kvstore_bench.content import BlockContent
from kvstore_bench.emulate.gpu import Gpu
from kvstore_bench.emulate.memory import Memory
from kvstore_bench.emulate.slots import SlotRun, Slots
from tests.support.engine import key

BLOCK_BYTES = 64


def taken(slots: Slots, count: int) -> list[SlotRun]:
    """Take slots of which there are enough."""
    runs = slots.take(count)
    assert runs is not None
    return runs


def rows(runs: list[SlotRun]) -> list[int]:
    """All slots of some runs."""
    return [slot for run in runs for slot in range(run.first, run.first + run.size)]


def test_slots_come_in_one_run_where_there_is_one() -> None:
    slots = Slots(10)
    first, second = taken(slots, 4), taken(slots, 6)
    assert [len(first), len(second)] == [1, 1]
    assert sorted(rows(first) + rows(second)) == list(range(10))
    assert slots.free_count == 0


def test_slots_that_lie_apart_are_enough() -> None:
    slots = Slots(9)
    runs = [taken(slots, 1) for _ in range(9)]
    for at in (1, 2, 4, 7):
        slots.give(runs[at])
    again = taken(slots, 4)
    assert sorted(rows(again)) == sorted(rows([*runs[1], *runs[2], *runs[4], *runs[7]]))
    assert again[0].size == 2  # the largest hole first: few runs
    assert len(again) == 3


def test_there_are_no_more_slots_than_there_are() -> None:
    slots = Slots(3)
    assert slots.take(4) is None
    runs = taken(slots, 2)
    assert slots.take(2) is None
    assert slots.free_count == 1
    slots.give(runs)
    assert len(taken(slots, 3)) == 1
    assert slots.take(0) == []


def test_slots_taken_and_given_back_at_random_never_meet(seed: int) -> None:
    chance, slots = random.Random(seed), Slots(50)
    held: list[list[SlotRun]] = []
    for _ in range(2000):
        if held and chance.random() < 0.5:
            slots.give(held.pop(chance.randrange(len(held))))
        elif (runs := slots.take(chance.randint(0, 20))) is not None:
            held.append(runs)
        slots.check()
        used = [row for runs in held for row in rows(runs)]
        assert len(used) == len(set(used)) == 50 - slots.free_count
    for runs in held:
        slots.give(runs)
    assert rows(taken(slots, 50)) == list(range(50))


# --- memory ------------------------------------------------------------------------------------


def memory(count: int, spare_bytes: int = 0) -> Memory:
    """Memory for so many blocks, with no good bytes in it."""
    return Memory(memoryview(bytearray(b"\xee" * (count * BLOCK_BYTES + spare_bytes))), BLOCK_BYTES)


def test_memory_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(KVStoreError, match="63 bytes for blocks of 64"):
        Memory(memoryview(bytearray(BLOCK_BYTES - 1)), BLOCK_BYTES)


@pytest.mark.asyncio
async def test_what_a_turn_fills_in_steps_is_what_belongs_there() -> None:
    of = memory(7, spare_bytes=9)
    keys = [key(number) for number in range(5)]
    async with AsyncExitStack() as others:
        # Every other slot is somebody's: the room lies apart.
        singles = [AsyncExitStack() for _ in range(7)]
        for single in singles:
            await single.enter_async_context(of.lend(1))
        for at, single in enumerate(singles):
            if at in (0, 2, 3, 4, 6):
                await single.aclose()
            else:
                await others.enter_async_context(single)
        async with of.lend(5) as room:
            assert len(list(room.parts(0, 5))) == 3
            for block in room.blocks(0, 2):
                block[:] = 0
            BlockContent(BLOCK_BYTES).fill(next(iter(room.parts(0, 1)))[1], keys[:1])
            assert of.wrong(room, keys) == [False, True, True, True, True]
            of.fill(room, keys, 1, 0, 24)
            assert of.wrong(room, keys) == [False, True, True, True, True]
            of.fill(room, keys, 1, 24, BLOCK_BYTES)
            assert of.wrong(room, keys) == [False] * 5
            assert of.wrong(room, [keys[1], keys[0], *keys[2:]]) == [True, True] + [False] * 3
            pieces = room.blocks(1, 4, 8, 24)
            assert [len(piece) for piece in pieces] == [16] * 3
            pieces[1][0] ^= 1
            assert of.wrong(room, keys) == [False, False, True, False, False]
    assert of.slots.free_count == 7


@pytest.mark.asyncio
async def test_who_waits_for_room_gets_it_in_turn() -> None:
    of, got = memory(4), list[str]()
    release = {name: asyncio.Event() for name in "abc"}

    async def use(name: str, count: int) -> None:
        async with of.lend(count):
            got.append(name)
            await release[name].wait()

    async with asyncio.TaskGroup() as group:
        for name, count in (("a", 3), ("b", 4), ("c", 1)):
            group.create_task(use(name, count))
            await asyncio.sleep(0)
        assert got == ["a"]  # there is room for c, but b was before it
        release["a"].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert got == ["a", "b"]
        release["b"].set()
        release["c"].set()
    assert got == ["a", "b", "c"]
    assert of.slots.free_count == 4


@pytest.mark.asyncio
async def test_who_is_cancelled_while_he_waits_leaves_the_room_to_others() -> None:
    of = memory(4)

    async def use(count: int) -> None:
        async with of.lend(count):
            await asyncio.Event().wait()

    holder, large, small = (asyncio.create_task(use(count)) for count in (3, 4, 1))
    await asyncio.sleep(0)
    assert of.slots.free_count == 1
    large.cancel()
    await asyncio.wait([large])
    await asyncio.sleep(0)
    assert of.slots.free_count == 0  # small has it
    # Cancelled in the moment in which it gets its room.
    late = asyncio.create_task(use(2))
    await asyncio.sleep(0)
    holder.cancel()
    await asyncio.wait([holder], timeout=0)
    late.cancel()
    for task in (holder, late, small):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert of.slots.free_count == 4


@pytest.mark.asyncio
async def test_a_prompt_that_never_fits_is_refused_at_once() -> None:
    of = memory(4)
    async with of.lend(4):
        with pytest.raises(LimitExceeded, match="a prompt of 5 blocks"):
            async with of.lend(5):
                pass


# --- the GPU -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_gpu_computes_one_thing_at_a_time_and_makes_up_for_late_timers() -> None:
    gpu, began_at = Gpu(), time.monotonic()
    # The second was ready before the first was done, the third long before that.
    ends = await asyncio.gather(
        gpu.compute(began_at, 0.003), gpu.compute(began_at, 0.002), gpu.compute(0.0, 0.001)
    )
    assert [end - began_at for end in ends] == pytest.approx([0.003, 0.005, 0.006])
    assert time.monotonic() >= ends[-1]
    # It does not begin before all is there.
    ready_at = time.monotonic()
    assert await gpu.compute(ready_at, 0.001) - ready_at == pytest.approx(0.001)
