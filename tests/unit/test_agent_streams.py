"""Fetches out of an agent's pool: cut-through, single flight, the window, and all that ends."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.errors import KVStoreError
from kvstore.messages import FetchOutcome, FetchSource, ServedBy, Tier
from kvstore_client.agent import terms
from kvstore_client.agent.fills import FillKind
from kvstore_client.jobs import Route
from tests.support.engine import key
from tests.support.filling import FillBench

HIT, MISS = FetchOutcome.HIT, FetchOutcome.MISS
UNAVAILABLE, TIMEOUT = FetchOutcome.UNAVAILABLE, FetchOutcome.TIMEOUT
ANY, PEER = FetchSource.ANY, FetchSource.PEER

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("layers", [None, (0, 1), (1, 3), (2, 3)])
async def test_what_is_missing_comes_from_storage(
    group: int, layers: tuple[int, int] | None
) -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2, 3, layers=layers, group=group)
    (job,) = bench.jobs
    assert job.numbers == [1, 2, 3]
    assert reader.read() == 0
    job.deliver()
    job.end()
    assert reader.end() == [bench.expected(number, layers) for number in (1, 2, 3)]
    assert reader.stream.tiers() == bytes([Tier.RELAY]) * 3
    assert reader.stream.served_by() == bytes([ServedBy.DIRECT]) * 3
    bench.check_idle()


@pytest.mark.parametrize("bytes_max", [1, 100, 1000, 4095, 4096, 3 * 4096, 1024 * 1024])
@pytest.mark.parametrize("group", [0, 1])
async def test_chunks_keep_to_their_size(bytes_max: int, group: int) -> None:
    bench = FillBench()
    bench.hold(2)
    reader = bench.fetch(1, 2, 4, group=group)
    bench.jobs[0].deliver()
    bench.jobs[0].end()
    reader.read(bytes_max)
    assert reader.end() == [bench.expected(number) for number in (1, 2, 4)]
    assert reader.stream.tiers() == bytes([Tier.RELAY, Tier.ARENA, Tier.RELAY])
    bench.check_idle()


async def test_blocks_that_are_here_need_no_storage() -> None:
    bench = FillBench()
    bench.hold(1)
    bench.hold(2)
    reader = bench.fetch(2, 1)
    assert reader.end() == [bench.expected(2), bench.expected(1)]
    assert reader.stream.served_by() == bytes([ServedBy.HELD]) * 2
    assert not bench.jobs
    bench.check_idle()


async def test_consecutive_blocks_share_a_chunk() -> None:
    bench = FillBench()
    reader = bench.fetch(0, 1, 2, 3)
    bench.jobs[0].deliver()
    reader.take()
    (chunk,) = reader.chunks
    assert (chunk.piece, len(chunk.buffers), chunk.length) == (0, 4, 4 * bench.block_bytes)


async def test_layers_go_on_before_the_block_is_whole() -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2)
    job = bench.jobs[0]
    job.deliver(0, layers=(0, 1))
    assert reader.read() == 1
    assert not reader.arrived
    job.deliver(0, layers=(1, 3))
    assert reader.read() == 1
    assert reader.arrived == [(0, 0)]
    job.deliver(1)
    job.end()
    assert reader.end() == [bench.expected(1), bench.expected(2)]
    bench.check_idle()


async def test_a_layer_is_passed_on_when_it_is_whole() -> None:
    bench = FillBench()
    reader = bench.fetch(1)
    job = bench.jobs[0]
    job._send(0, 0, 0, 1500, 0)  # the first layer, and half of the second
    assert reader.read() == 1
    assert reader.stream.queued_bytes == bench.block_bytes - 1000
    job._send(0, 0, 1500, 4096, 0)
    job.end()
    assert reader.end() == [bench.expected(1)]


async def test_a_piece_waits_for_all_its_checksums() -> None:
    # Its first byte brings them along, and storage tells of them by groups of its own.
    bench = FillBench()
    other = bench.fetch(1, group=1)
    reader = bench.fetch(1, group=2)
    (job,) = bench.jobs
    job.deliver(layers=(0, 1))
    assert (other.read(), reader.read()) == (1, 0)
    job.deliver(layers=(1, 3))
    job.end()
    assert reader.end() == other.end() == [bench.expected(1)]
    bench.check_idle()


async def test_groups_of_one_block_stay_in_order_whatever_is_here_already() -> None:
    bench = FillBench()
    bench.hold(1, 1, 2)
    reader = bench.fetch(1, 2, group=1)
    assert [(job.numbers, job.job.layers) for job in bench.jobs] == [
        ([1], range(1)),
        ([1], range(2, 3)),
        ([2], range(3)),
    ]
    assert reader.read() == 0
    bench.jobs[1].deliver()
    assert reader.read() == 0
    bench.jobs[0].deliver()
    reader.read()
    assert reader.arrived == [(0, 0), (0, 1), (0, 2)]
    bench.jobs[2].deliver()
    for job in bench.jobs:
        job.end()
    assert reader.end() == [bench.expected(1), bench.expected(2)]
    bench.check_idle()


async def test_the_same_key_twice_is_asked_for_once() -> None:
    bench = FillBench()
    reader = bench.fetch(5, 6, 5)
    for _ in range(3):
        await asyncio.sleep(0)
    for job in bench.jobs:
        job.deliver()
        job.end()
    assert sorted(number for job in bench.jobs for number in job.numbers) == [5, 6]
    assert reader.end() == [bench.expected(5), bench.expected(6), bench.expected(5)]
    bench.check_idle()


# --- single flight -------------------------------------------------------------------------


async def test_two_askers_of_one_block_cause_one_read() -> None:
    bench = FillBench()
    first = bench.fetch(1, 2)
    second = bench.fetch(2, 3)
    assert [job.numbers for job in bench.jobs] == [[1, 2], [3]]
    for job in bench.jobs:
        job.deliver()
        job.end()
    assert first.end() == [bench.expected(1), bench.expected(2)]
    assert second.end() == [bench.expected(2), bench.expected(3)]
    assert bench.counters["relay_joined"] == 1
    bench.check_idle()


async def test_a_fill_goes_on_for_as_long_as_somebody_waits() -> None:
    bench = FillBench()
    first, second = bench.fetch(1), bench.fetch(1)
    first.stream.stop(UNAVAILABLE)
    (job,) = bench.jobs
    assert not job.stopped
    second.stream.stop(UNAVAILABLE)
    assert job.stopped
    assert bench.pool.block_count == 0
    bench.check_idle()


async def test_a_fill_goes_on_for_an_engine_that_is_to_have_the_block() -> None:
    bench = FillBench()
    reader = bench.fetch(1)
    block = bench.pool.find(bench.namespace.id, key(1))
    assert block is not None
    bench.pool.lease(block)
    reader.stream.stop(TIMEOUT)
    (job,) = bench.jobs
    assert not job.stopped
    job.deliver()
    job.end()
    assert block.complete
    bench.pool.unlease(block)
    bench.check_idle()


async def test_who_joined_asks_again_when_the_first_had_less_time() -> None:
    bench = FillBench()
    first, second = bench.fetch(1), bench.fetch(1)
    bench.jobs[0].end()  # the deadline of the first
    assert first.end() == [TIMEOUT]
    await asyncio.sleep(0)
    assert not second.stream.finished
    bench.jobs[1].deliver()
    bench.jobs[1].end()
    assert second.end() == [bench.expected(1)]
    bench.check_idle()


async def test_a_relay_waits_for_no_fill_that_may_wait_for_it() -> None:
    bench = FillBench()
    own = bench.fetch(1, source=ANY)
    relay = bench.fetch(1, 2)
    assert [job.numbers for job in bench.jobs] == [[1], [2]]
    bench.jobs[1].deliver()
    bench.jobs[1].end()
    assert relay.end() == [UNAVAILABLE, bench.expected(2)]
    bench.jobs[0].deliver()
    bench.jobs[0].end()
    assert own.end() == [bench.expected(1)]
    bench.check_idle()


async def test_a_peer_waits_for_fills_from_storage_and_for_none_from_peers() -> None:
    bench = FillBench()
    route = Route(peer="tcp://127.0.0.1:1")
    own = bench.fetch(1, source=ANY, peer_route=route)
    relayed = bench.fetch(2)
    peer = bench.fetch(1, 2, source=PEER)
    assert [job.job.route.peer for job in bench.jobs] == [route.peer, ""]
    for job in bench.jobs:
        job.deliver()
        job.end()
    results = peer.end()
    # It was there when it was looked at again, or it was missed; never waited for.
    assert results[0] in (MISS, bench.expected(1))
    assert results[1] == bench.expected(2)
    assert own.end() == [bench.expected(1)]
    assert relayed.end() == [bench.expected(2)]
    bench.check_idle()


async def test_own_loads_say_by_which_way_each_block_came() -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2, source=ANY)
    (job,) = bench.jobs
    job.deliver()
    reader.read()
    assert not reader.stream.finished  # the last word is still to come
    job.job.served_by[:] = bytes([ServedBy.RELAY, ServedBy.DIRECT])
    told = bench.ready_count
    job.end()
    assert bench.ready_count > told
    reader.end()
    assert reader.stream.served_by() == bytes([ServedBy.RELAY, ServedBy.DIRECT])
    bench.check_idle()


async def test_what_a_peer_does_not_hold_comes_from_storage() -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2, 3, source=ANY, peer_route=Route(peer="tcp://127.0.0.1:1"))
    first = bench.jobs[0]
    first.deliver(1)
    first.fail(MISS, 0)
    first.fail(UNAVAILABLE, 2)
    first.end()
    await asyncio.sleep(0)
    assert [job.numbers for job in bench.jobs] == [[1, 2, 3], [1, 3]]
    assert bench.jobs[1].job.route.peer == ""
    bench.jobs[1].deliver()
    bench.jobs[1].job.served_by[:] = bytes([ServedBy.DIRECT]) * 2
    bench.jobs[1].end()
    assert reader.end() == [bench.expected(number) for number in (1, 2, 3)]
    ways = [ServedBy.DIRECT, ServedBy.PEER, ServedBy.DIRECT]
    assert reader.stream.served_by() == bytes(ways)
    bench.check_idle()


# --- failing -------------------------------------------------------------------------------


async def test_one_missing_block_hides_no_other() -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2, 3)
    job = bench.jobs[0]
    job.fail(MISS, 1)
    assert reader.read() == 1  # nothing but the news
    assert reader.failed == {1: MISS}
    job.deliver()
    job.end()
    assert reader.end() == [bench.expected(1), MISS, bench.expected(3)]
    assert bench.pool.block_count == 2
    bench.check_idle()


@pytest.mark.parametrize("outcome", [FetchOutcome.CORRUPT, TIMEOUT, UNAVAILABLE])
async def test_a_block_that_fails_half_way_ends_so(outcome: FetchOutcome) -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2)
    job = bench.jobs[0]
    job.deliver(0, layers=(0, 1))
    reader.read()
    job.fail(outcome, 0)
    job.deliver(1)
    job.end()
    assert reader.end() == [outcome, bench.expected(2)]
    bench.check_idle()


async def test_a_peer_that_does_not_answer_leaves_time_to_ask_storage() -> None:
    bench = FillBench()
    now = bench.loop.time()
    reader = bench.fetch(
        1,
        group=1,
        source=ANY,
        peer_route=Route(peer="tcp://127.0.0.1:1"),
        wait_until=now + 10,
        deadline_at=now + 20,
    )
    first = bench.jobs[0]
    assert abs(first.job.deadline_at - (now + 15)) < 0.1
    first.deliver(layers=(0, 1))
    assert reader.read() == 1
    first.end()  # its deadline
    await asyncio.sleep(0)
    second = bench.jobs[1]
    assert (second.job.route.peer, second.job.layers) == ("", range(1, 3))
    assert abs(second.job.deadline_at - (now + 20)) < 0.1
    second.deliver()
    second.end()
    assert reader.end() == [bench.expected(1)]
    bench.check_idle()


async def test_what_may_still_be_written_is_not_asked_for_again_before_that_ends() -> None:
    bench = FillBench()
    first, second = bench.fetch(1), bench.fetch(1)
    job = bench.jobs[0]
    job.deliver(layers=(0, 1))
    job.job.finished(job)
    job.job.time_out()  # somebody may still write
    await asyncio.sleep(0)
    assert first.end() == [TIMEOUT]
    assert len(bench.jobs) == 1
    job.job.let_go()
    await asyncio.sleep(0)
    bench.jobs[1].deliver()
    bench.jobs[1].end()
    assert second.end() == [bench.expected(1)]
    bench.check_idle()


async def test_layers_that_were_here_outlive_a_miss_of_the_rest() -> None:
    bench = FillBench()
    held = bench.hold(1, 0, 1)
    reader = bench.fetch(1)
    bench.jobs[0].fail(MISS)
    bench.jobs[0].end()
    assert reader.end() == [MISS]
    assert bench.pool.find(bench.namespace.id, key(1)) is held
    bench.check_idle()


async def test_a_block_that_is_dropped_while_it_comes_is_asked_for_again() -> None:
    bench = FillBench()
    reader = bench.fetch(1)
    block = bench.pool.find(bench.namespace.id, key(1))
    assert block is not None
    bench.pool.drop(block)  # somebody has deleted it
    bench.jobs[0].deliver()
    bench.jobs[0].end()
    assert reader.end() == [bench.expected(1)]
    bench.check_idle()


@pytest.mark.parametrize("group", [0, 1])
async def test_stopping_lets_go_of_everything_but_what_is_being_sent(group: int) -> None:
    bench = FillBench()
    bench.hold(1)
    reader = bench.fetch(1, 2, 3, group=group)
    (job,) = bench.jobs
    job.deliver(0)
    reader.take(bytes_max=1000, chunks_max=2)
    reader.stream.stop(TIMEOUT)
    assert reader.stream.finished
    assert reader.stream.next_chunk(1000) is None
    assert reader.stream.queued_bytes == 0
    assert job.stopped
    assert bench.pool.pinned_count > 0
    reader.release()
    bench.check_idle()


async def test_a_stop_in_the_midst_of_giving_out_keeps_what_was_sent_as_hits() -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2)
    bench.jobs[0].deliver(0)
    reader.read()
    reader.stream.stop(TIMEOUT)
    assert reader.stream.outcomes() == bytes([HIT, TIMEOUT])
    bench.check_idle()


# --- the window, and room ------------------------------------------------------------------


async def test_a_slow_reader_slows_storage_down(monkeypatch: pytest.MonkeyPatch) -> None:
    source = terms.SOURCES[FetchSource.RELAY]
    small = source._replace(window_bytes=4 * 4096, run_bytes=2 * 4096)
    monkeypatch.setitem(terms.SOURCES, FetchSource.RELAY, small)
    bench = FillBench(blocks=64)
    reader = bench.fetch(*range(12))
    assert [job.numbers for job in bench.jobs] == [[0, 1], [2, 3]]
    for job in bench.jobs[:2]:
        job.deliver()
        job.end()
    reader.take(bytes_max=4096)
    assert len(bench.jobs) == 2, "nothing is asked for before something was sent"
    chunks = reader.chunks
    chunks[0].release()
    assert len(bench.jobs) == 2, "a request of one block is not worth it"
    chunks[1].release()
    assert [job.numbers for job in bench.jobs[2:]] == [[4, 5]]
    reader.chunks = chunks[2:]
    for at in range(2, 6):
        if at < len(bench.jobs):
            bench.jobs[at].deliver()
            bench.jobs[at].end()
        reader.read()
    assert reader.end() == [bench.expected(number) for number in range(12)]
    bench.check_idle()


async def test_what_is_looked_at_where_it_lies_is_kept_and_leaves_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = terms.SOURCES[FetchSource.RELAY]
    small = source._replace(window_bytes=4 * 4096, run_bytes=2 * 4096)
    monkeypatch.setitem(terms.SOURCES, FetchSource.RELAY, small)
    bench = FillBench(blocks=64)
    reader = bench.fetch(*range(12))
    reader.stream.locate = True
    for number in range(6):
        assert len(bench.jobs) > number, "it waits for what is not given back"
        bench.jobs[number].deliver()
        bench.jobs[number].end()
        reader.take()
        assert len(bench.jobs) <= number + 3, "no more is under way than the window has"
        await asyncio.sleep(0)
    pinned = {chunk.piece + at for chunk in reader.chunks for at in range(len(chunk.buffers))}
    assert pinned == set(range(12))
    assert reader.stream.finished
    assert sum(bench.hold(number).pins for number in range(12)) == 12
    assert reader.end() == [bench.expected(number) for number in range(12)]
    bench.check_idle()


async def test_failures_make_room_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    source = terms.SOURCES[FetchSource.RELAY]
    small = source._replace(window_bytes=2 * 4096, run_bytes=4096)
    monkeypatch.setitem(terms.SOURCES, FetchSource.RELAY, small)
    bench = FillBench(blocks=64)
    reader = bench.fetch(*range(6))
    while bench.jobs:
        job = bench.jobs.pop(0)
        job.fail(MISS)
        job.end()
    assert reader.end() == [MISS] * 6
    bench.check_idle()


async def test_storage_that_is_closed_ends_a_fetch_larger_than_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = terms.SOURCES[FetchSource.RELAY]
    small = source._replace(window_bytes=2 * 4096, run_bytes=4096)
    monkeypatch.setitem(terms.SOURCES, FetchSource.RELAY, small)
    bench = FillBench(blocks=64)
    closed = KVStoreError("closed")
    monkeypatch.setattr(bench, "begin_fetch", lambda job: job.give_up(closed))  # at once
    reader = bench.fetch(*range(6))
    assert reader.end() == [UNAVAILABLE] * 6
    bench.check_idle()


async def test_without_room_blocks_end_unavailable_after_a_while() -> None:
    bench = FillBench(blocks=2)
    held = [bench.hold(7), bench.hold(8)]
    for block in held:
        bench.pool.lease(block)
    reader = bench.fetch(1, 7, 2)
    assert reader.read() == 0
    assert not reader.stream.finished
    assert reader.stream._room_timer is not None
    reader.stream._do_without_room()  # the timer
    assert reader.end() == [UNAVAILABLE, bench.expected(7), UNAVAILABLE]
    assert bench.counters["relay_no_room"] == 2
    for block in held:
        bench.pool.unlease(block)
    bench.check_idle()


async def test_room_that_comes_in_time_is_used() -> None:
    bench = FillBench(blocks=1)
    held = bench.hold(7)
    bench.pool.lease(held)
    reader, other = bench.fetch(1), bench.fetch(2)
    bench.pool.unlease(held)
    (job,) = bench.jobs
    assert job.numbers == [1], "who has waited longest"
    job.deliver()
    job.end()
    assert reader.end() == [bench.expected(1)]
    bench.jobs[1].deliver()
    bench.jobs[1].end()
    assert other.end() == [bench.expected(2)]
    bench.check_idle()


async def test_a_pool_smaller_than_a_request_is_used_again_and_again() -> None:
    bench = FillBench(blocks=2)
    reader = bench.fetch(*range(7))
    while not reader.stream.finished:
        assert bench.jobs, "it is stuck"
        while bench.jobs:
            job = bench.jobs.pop(0)
            job.deliver()
            job.end()
        reader.read()
    assert reader.end() == [bench.expected(number) for number in range(7)]
    bench.check_idle()


async def test_a_stopped_fetch_waits_for_no_room() -> None:
    bench = FillBench(blocks=1)
    held = bench.hold(7)
    bench.pool.pin(held)
    reader = bench.fetch(1)
    reader.stream.stop(UNAVAILABLE)
    bench.pool.unpin(held)
    assert not bench.jobs
    bench.check_idle()


# --- what may still appear -----------------------------------------------------------------


async def test_a_peer_gets_what_is_here_and_misses_the_rest_at_once() -> None:
    bench = FillBench()
    bench.hold(1)
    reader = bench.fetch(1, 2, source=PEER)
    assert not bench.jobs
    assert reader.end() == [bench.expected(1), MISS]
    bench.check_idle()


async def test_a_peer_waits_for_blocks_that_are_being_computed() -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2, source=PEER, wait_until=bench.loop.time() + 60, group=1)
    assert reader.read() == 0
    bench.hold(2, 0, 1)
    assert reader.read() == 1
    bench.hold(2, 1, 3)
    bench.hold(1)
    assert reader.end() == [bench.expected(1), bench.expected(2)]
    assert not bench.jobs
    bench.check_idle()


async def test_what_does_not_come_in_time_is_a_miss() -> None:
    bench = FillBench()
    until = bench.loop.time() + 60
    reader = bench.fetch(1, 2, 3, source=PEER, wait_until=until)
    bench.hold(2, 0, 1)
    bench.hold(3)
    reader.read()
    reader.stream._waited()  # the timer
    assert reader.end() == [MISS, MISS, bench.expected(3)]
    bench.check_idle()


async def test_a_peer_that_stops_waits_for_nothing() -> None:
    bench = FillBench()
    reader = bench.fetch(1, 2, source=PEER, wait_until=bench.loop.time() + 60)
    reader.stream.stop(UNAVAILABLE)
    bench.hold(1)
    assert reader.stream.next_chunk(4096) is None
    bench.check_idle()


async def test_kinds_are_ordered_so_that_nodes_never_wait_in_a_circle() -> None:
    kinds = {source: terms.SOURCES[source] for source in FetchSource}
    # Asked by another node, it waits for fills of lower kinds than the asker's own.
    assert kinds[FetchSource.RELAY].joined < FillKind.ANY
    assert kinds[FetchSource.PEER].joined < FillKind.PEER
    assert kinds[FetchSource.RELAY].kind is FillKind.STORAGE
    assert kinds[FetchSource.PEER].kind is None
