"""What a fetch keeps of an agent's pool, what it gives to engines of its node, and how much of
that it does in one go."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.messages import FetchOutcome, FetchSource, ServedBy, Tier
from kvstore_client.agent import intake
from kvstore_client.agent.memory import HeldBlock
from tests.support.engine import key
from tests.support.filling import FillBench

MISS, UNAVAILABLE = FetchOutcome.MISS, FetchOutcome.UNAVAILABLE
ANY, PEER = FetchSource.ANY, FetchSource.PEER

pytestmark = pytest.mark.asyncio


async def turns(count: int = 5) -> None:
    """Let what was put off happen."""
    for _ in range(count):
        await asyncio.sleep(0)


def of(bench: FillBench, number: int) -> HeldBlock:
    block = bench.pool.find(bench.namespace.id, key(number))
    assert block is not None
    return block


# --- pins --------------------------------------------------------------------------------------


async def test_a_peer_that_reads_nothing_keeps_no_more_than_its_window() -> None:
    bench = FillBench(blocks=16)
    peer = bench.fetch(*range(16), source=PEER, wait_until=bench.loop.time() + 60)
    own = bench.fetch(*range(16), source=ANY)
    while not own.stream.finished:
        assert bench.jobs, "it is stuck"
        while bench.jobs:
            job = bench.jobs.pop(0)
            job.deliver()
            job.end()
        own.read()
        await turns()
    assert own.end() == [bench.expected(number) for number in range(16)]
    assert bench.pool.pinned_count == 4
    # Others find room, and the peer what is left.
    other = bench.fetch(*range(20, 28), source=ANY)
    while not other.stream.finished:
        assert bench.jobs, "no room"
        while bench.jobs:
            job = bench.jobs.pop(0)
            job.deliver()
            job.end()
        other.read()
        await turns()
    peer.read()
    peer.stream._waited()  # the timer
    results = peer.end()
    assert results == [bench.expected(n) if r != MISS else MISS for n, r in enumerate(results)]
    assert results.count(MISS) == 8
    bench.check_idle()


async def test_what_went_before_its_turn_is_taken_when_it_comes_again() -> None:
    bench = FillBench(blocks=16)
    peer = bench.fetch(*range(16), source=PEER, wait_until=bench.loop.time() + 60)
    for number in range(16):
        bench.hold(number)
    gone = [number for number in range(16) if not of(bench, number).pins]
    assert len(gone) == 12
    for number in gone:
        bench.pool.drop(of(bench, number))
    for number in gone:
        bench.hold(number)
    assert peer.end() == [bench.expected(number) for number in range(16)]
    bench.check_idle()


async def test_a_block_that_goes_when_half_of_it_was_sent_is_a_miss() -> None:
    bench = FillBench(blocks=16)
    peer = bench.fetch(*range(6), source=PEER, group=1, wait_until=bench.loop.time() + 60)
    for number in range(6):
        bench.hold(number, 0, 1)
    peer.read()
    watched = [number for number in range(6) if not of(bench, number).pins]
    assert len(watched) == 2
    bench.pool.drop(of(bench, watched[0]))
    for number in range(6):
        if number != watched[0]:
            bench.hold(number, 1, 3)
    expected = [bench.expected(n) if n != watched[0] else MISS for n in range(6)]
    assert peer.end() == expected
    bench.check_idle()


async def test_leased_blocks_that_end_before_their_turn_are_asked_for_within_the_window() -> None:
    bench = FillBench(blocks=16)
    held = [bench.hold(number) for number in range(12)]
    for block in held:
        block.verified = block.ready
        bench.pool.lease(block)
    reader = bench.fetch(*range(12), source=ANY)
    assert bench.pool.pinned_count == 4
    for block in held:
        bench.pool.unlease(block)
    for block in held:
        if not block.pins:
            bench.pool.drop(block)
    while not reader.stream.finished:
        await turns()
        assert bench.pool.pinned_count <= 8
        while bench.jobs:
            job = bench.jobs.pop(0)
            job.deliver()
            job.end()
        assert reader.read(), "it is stuck"
    assert reader.end() == [bench.expected(number) for number in range(12)]
    bench.check_idle()


async def test_a_key_that_occurs_twice_is_watched_until_both_are_given_out() -> None:
    bench = FillBench(blocks=8)
    numbers = (1, 2, 1, 3, 1)
    peer = bench.fetch(*numbers, source=PEER, wait_until=bench.loop.time() + 60)
    for number in (1, 2, 3):
        bench.hold(number)
    peer.read(bytes_max=bench.block_bytes, chunks_max=1)
    bench.pool.drop(of(bench, 1))
    bench.hold(1)
    assert peer.end() == [bench.expected(number) for number in numbers]
    bench.check_idle()


async def test_a_fetch_that_stops_takes_up_nothing_for_which_it_makes_room() -> None:
    bench = FillBench(blocks=2)
    bench.hold(1)
    busy = bench.hold(2)
    bench.pool.pin(busy)
    peer = bench.fetch(9, 1, source=PEER, wait_until=bench.loop.time() + 60)
    relay = bench.fetch(9)
    assert not bench.jobs
    peer.stream.stop(UNAVAILABLE)
    bench.jobs[0].deliver()
    bench.jobs[0].end()
    assert relay.end() == [bench.expected(9)]
    bench.pool.unpin(busy)
    bench.check_idle()


async def test_blocks_that_others_keep_after_all_leave_the_window_to_those_behind() -> None:
    bench = FillBench(blocks=8)
    first = bench.fetch(1, 2)
    reader = bench.fetch(1, 2, 3, source=ANY)
    (job,) = bench.jobs
    for number in (1, 2):
        bench.pool.drop(of(bench, number))  # somebody has deleted them
    for number in (1, 2):
        bench.pool.lease(bench.hold(number))
    job.end()
    assert first.end() == [FetchOutcome.TIMEOUT] * 2
    await turns()
    assert [asked.numbers for asked in bench.jobs[1:]] == [[3]]
    bench.jobs[1].deliver()
    bench.jobs[1].end()
    assert reader.end() == [bench.expected(number) for number in (1, 2, 3)]
    for number in (1, 2):
        bench.pool.unlease(of(bench, number))
    bench.check_idle()


# --- verifying ---------------------------------------------------------------------------------


async def relayed(bench: FillBench, *numbers: int, damaged: int | None = None) -> None:
    """Have blocks that came for another node, one of them damaged."""
    reader = bench.fetch(*numbers)
    job = bench.jobs.pop()
    job.deliver()
    job.end()
    reader.read()
    await turns()
    if damaged is not None:
        of(bench, damaged).view[5] ^= 1


async def test_what_came_for_others_is_verified_before_an_engine_gets_it() -> None:
    bench = FillBench()
    await relayed(bench, 1, 2, 3, damaged=2)
    bad = of(bench, 2)
    reader = bench.fetch(1, 2, 3, source=ANY)
    await turns()
    assert bad.dropped
    (job,) = bench.jobs
    assert job.numbers == [2]
    job.deliver()
    job.job.served_by[:] = bytes([ServedBy.DIRECT])
    job.end()
    assert reader.end() == [bench.expected(number) for number in (1, 2, 3)]
    assert reader.stream.tiers() == bytes([Tier.ARENA, Tier.RELAY, Tier.ARENA])
    assert reader.stream.served_by() == bytes([ServedBy.HELD, ServedBy.DIRECT, ServedBy.HELD])
    assert bench.counters["corrupt_blocks"] == 1
    bench.check_idle()


async def test_what_comes_for_others_meanwhile_is_verified_too() -> None:
    bench = FillBench()
    relay = bench.fetch(1)
    own = bench.fetch(1, source=ANY)
    (job,) = bench.jobs
    job.deliver(layers=(0, 1))
    of(bench, 1).view[5] ^= 1
    job.deliver(layers=(1, 3))
    assert own.read() == 0
    await turns()
    job.end()
    await turns()
    del bench.jobs[0]
    assert [again.numbers for again in bench.jobs] == [[1]]
    bench.jobs[0].deliver()
    bench.jobs[0].end()
    assert own.end() == [bench.expected(1)]
    relay.stream.stop(UNAVAILABLE)
    await turns()
    bench.check_idle()


async def test_each_layer_is_verified_once_and_never_for_other_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = FillBench()
    looked: list[int] = []
    verify = HeldBlock.verify

    def counted(block: HeldBlock, layer: int) -> bool:
        looked.append(layer)
        return verify(block, layer)

    monkeypatch.setattr(HeldBlock, "verify", counted)
    await relayed(bench, 1)
    assert bench.fetch(1).end() == [bench.expected(1)]
    assert looked == []
    for layers in ((1, 2), None, None):
        reader = bench.fetch(1, source=ANY, layers=layers)
        await turns()
        assert reader.end() == [bench.expected(1, layers)]
    assert looked == [1, 0, 2]
    own = bench.fetch(2, source=ANY)
    bench.jobs[0].deliver()  # verified on the way
    bench.jobs[0].end()
    assert own.end() == [bench.expected(2)]
    assert bench.fetch(2, source=ANY).end() == [bench.expected(2)]
    assert looked == [1, 0, 2]
    bench.check_idle()


async def test_what_is_verified_in_one_turn_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = FillBench()
    monkeypatch.setattr(intake, "CHECKED_BYTES_PER_TURN_MAX", 2 * bench.block_bytes)
    await relayed(bench, *range(4))
    reader = bench.fetch(*range(4), source=ANY)
    assert reader.read() == 0
    for count in (2, 4):
        await turns(1)
        verified = [number for number in range(4) if of(bench, number).verified == 0b111]
        assert len(verified) == count
    assert reader.end() == [bench.expected(number) for number in range(4)]
    bench.check_idle()


# --- how much in one turn ----------------------------------------------------------------------


async def test_no_more_than_some_blocks_are_taken_up_in_one_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "BLOCKS_PER_TURN_MAX", 3, raising=False)
    bench = FillBench(blocks=64)
    reader = bench.fetch(*range(8), source=ANY)
    for turn, numbers in enumerate(([0, 1, 2], [3, 4, 5], [6, 7])):
        assert [job.numbers for job in bench.jobs[turn:]] == [numbers]
        reader.stream._admit()  # whoever else lets it go on
        assert len(bench.jobs) == turn + 1
        await turns(1)
    jobs, bench.jobs = bench.jobs, []
    for job in jobs:
        job.fail(UNAVAILABLE)
        job.end()
    assert reader.end() == [UNAVAILABLE] * 8
    bench.check_idle()


async def test_no_more_than_some_blocks_are_asked_for_again_in_one_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "BLOCKS_PER_TURN_MAX", 3, raising=False)
    bench = FillBench(blocks=64)
    first = bench.fetch(*range(3))
    second = bench.fetch(*range(3))
    third = bench.fetch(3, 4)
    joined = bench.fetch(*range(5))
    await turns()
    jobs, bench.jobs = bench.jobs, []
    for job in jobs:
        job.end()  # the deadline of those who asked first
    asked = []
    for _ in range(5):
        asked.append(sum(len(job.numbers) for job in bench.jobs))
        for job in bench.jobs:
            job.deliver()
            job.end()
        bench.jobs.clear()
        await turns(1)
    assert max(asked) <= 3
    assert sum(asked) == 5
    assert second.end() == [bench.expected(number) for number in range(3)]
    assert joined.end() == [bench.expected(number) for number in range(5)]
    for reader in (first, third):
        assert set(reader.end()) == {FetchOutcome.TIMEOUT}
    bench.check_idle()


async def test_a_stopped_fetch_takes_up_nothing_in_later_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "BLOCKS_PER_TURN_MAX", 2, raising=False)
    bench = FillBench(blocks=64)
    reader = bench.fetch(*range(8))
    reader.stream.stop(UNAVAILABLE)
    await turns()
    assert len(bench.jobs) == 1
    bench.check_idle()
