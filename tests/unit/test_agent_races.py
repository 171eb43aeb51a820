"""Fetches at an agent, and what others do to the same blocks meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.checksum import block_seed, layer_checksums
from kvstore.messages import FetchOutcome, FetchSource, PutOutcome, ServedBy
from kvstore.transfer import PENDING
from kvstore_client.agent.memory import HeldBlock
from kvstore_client.agent.puts import OfferPut
from kvstore_client.agent.retention import Retentions
from kvstore_client.handles import Run
from kvstore_client.jobs import Job
from tests.support.engine import key
from tests.support.filling import FillBench

HIT, MISS, CORRUPT = FetchOutcome.HIT, FetchOutcome.MISS, FetchOutcome.CORRUPT
UNAVAILABLE, TIMEOUT = FetchOutcome.UNAVAILABLE, FetchOutcome.TIMEOUT
ANY, PEER = FetchSource.ANY, FetchSource.PEER

pytestmark = pytest.mark.asyncio


async def turns() -> None:
    """Let what was put off happen."""
    for _ in range(5):
        await asyncio.sleep(0)


def end_of_run(job: Job, way: ServedBy, *indices: int) -> None:
    """What a job notes when a request for some of its blocks has ended."""
    for index in indices:
        job.served_by[index] = way  # type: ignore[attr-defined]
    run = Run(
        path=way.name.lower(),
        transport="tcp",
        peer="node",
        block_count=len(indices),
        bytes=0,
        elapsed_us=0,
        queued_us=0,
        service_us=0,
    )
    job.add_run(run, indices)


async def test_who_waits_for_a_deleted_block_learns_that_it_does_not_come() -> None:
    bench = FillBench()
    peer = bench.fetch(1, source=PEER, wait_until=bench.loop.time() + 60.0)
    own = bench.fetch(1, source=ANY)
    block = bench.pool.find(bench.namespace.id, key(1))
    assert block is not None
    bench.pool.drop(block)  # while it comes
    bench.jobs[0].fail(UNAVAILABLE)
    bench.jobs[0].end()
    assert own.end() == [UNAVAILABLE]
    assert not block.watchers, "the peer waits for another copy, not for this one"
    peer.stream.stop(TIMEOUT)
    bench.check_idle()


async def test_a_block_that_was_deleted_while_it_was_offered_comes_from_storage() -> None:
    bench = FillBench()
    retentions = Retentions(bench.pool)
    put = OfferPut(
        bench.pool,
        retentions,
        bench.namespace,
        [key(1)],
        range(3),
        bytes(3 * 8),
        bench.loop.time,
        10.0,
        None,
        False,
        bench.counters,
    )
    assert put.reserve(bench.block_bytes) == [0]
    reader = bench.fetch(1)
    assert not bench.jobs
    block = bench.pool.find(bench.namespace.id, key(1))
    assert block is not None
    bench.pool.drop(block)
    put.stop(PutOutcome.TIMEOUT)
    await turns()
    (job,) = bench.jobs
    job.deliver()
    job.end()
    assert reader.end() == [bench.expected(1)]
    bench.check_idle()


def offer(bench: FillBench, number: int, retentions: Retentions, layers: range) -> OfferPut:
    """An offer of layers of a block, all of which have been received."""
    offsets = bench.namespace.geometry.offsets
    data = bench.expected(number)
    parts = [data[offsets[layer] : offsets[layer + 1]] for layer in layers]
    seed = block_seed(bench.namespace.id, key(number))
    put = OfferPut(
        bench.pool,
        retentions,
        bench.namespace,
        [key(number)],
        layers,
        layer_checksums(parts, seed, layers.start),
        bench.loop.time,
        10.0,
        None,
        True,
        bench.counters,
    )
    put.on_decided = bench._on_ready
    assert put.reserve(bench.block_bytes) == [0]
    target = put.target(0)
    assert target is not None
    target[:] = b"".join(parts)
    put.received(0)
    return put


@pytest.mark.parametrize("delivered", [0, 1, 3])
async def test_an_offer_is_here_whatever_becomes_of_the_fill_that_came_before(
    delivered: int,
) -> None:
    bench = FillBench()
    retentions = Retentions(bench.pool)
    reader = bench.fetch(1)
    put = offer(bench, 1, retentions, range(3))
    assert not put.finished, "it depends on others whether the block is here"
    told = bench.ready_count
    (job,) = bench.jobs
    if delivered:
        job.deliver(layers=(0, delivered))
    job.end()
    assert put.finished
    assert bench.ready_count > told
    outcome = PutOutcome.EXISTS if delivered == 3 else PutOutcome.STORED
    assert put.outcomes() == bytes([outcome])
    block = bench.pool.find(bench.namespace.id, key(1))
    assert block is not None
    assert block.complete
    assert block.leases == 1
    assert bytes(block.view) == bench.expected(1)
    if delivered == 3:
        assert reader.end() == [bench.expected(1)]
    reader.stream.stop(TIMEOUT)
    await turns()
    retentions.expire(bench.loop.time() + 60.0)
    bench.check_idle()


async def test_an_offer_that_is_given_up_while_it_waits_for_a_fill_keeps_nothing() -> None:
    bench = FillBench()
    retentions = Retentions(bench.pool)
    reader = bench.fetch(1)
    put = offer(bench, 1, retentions, range(3))
    put.stop(PutOutcome.TIMEOUT)
    assert put.outcomes() == bytes([PutOutcome.TIMEOUT])
    bench.jobs[0].deliver()
    bench.jobs[0].end()
    assert reader.end() == [bench.expected(1)]
    assert retentions.block_count == 0
    bench.check_idle()


async def test_a_key_that_is_offered_twice_is_decided_once_each_when_that_is_given_up() -> None:
    bench = FillBench()
    put = OfferPut(
        bench.pool,
        Retentions(bench.pool),
        bench.namespace,
        [key(1), key(1)],
        range(3),
        bytes(2 * 3 * 8),
        bench.loop.time,
        10.0,
        None,
        False,
        bench.counters,
    )
    assert put.reserve(2 * bench.block_bytes) == [0, 1]
    put.received(1)  # waits for what is to come for the other
    assert put.outcomes() == bytes([PENDING, PENDING])
    put.stop(PutOutcome.TIMEOUT)
    assert put.finished
    assert put.outcomes() == bytes([PutOutcome.TIMEOUT] * 2)
    bench.check_idle()


async def test_no_layer_is_asked_for_twice_when_keeping_a_block_makes_room_for_others() -> None:
    bench = FillBench(blocks=4)
    retentions = Retentions(bench.pool)
    ends_at = bench.loop.time() + 60.0
    part, whole = bench.hold(1, 0, 1), bench.hold(2)
    assert retentions.retain("request", 0, [part, whole], ends_at)
    busy = [bench.hold(3), bench.hold(4)]
    for block in busy:
        bench.pool.pin(block)
    waiting = bench.fetch(9, 1, source=ANY)
    assert not bench.jobs

    def retain(blocks: list[HeldBlock]) -> None:
        # The newer attempt ends the older one, and what was kept for that may go.
        assert retentions.retain("request", 1, blocks, ends_at)

    reader = bench.fetch(1, source=ANY, retain=retain)
    await turns()
    asked = sorted((number, job.job.layers) for job in bench.jobs for number in job.numbers)
    assert asked == [(1, range(1, 3)), (9, range(3))]
    bench.pool.check()
    for job in bench.jobs:
        job.deliver()
        job.end()
    assert reader.end() == [bench.expected(1)]
    await turns()
    assert waiting.end() == [bench.expected(9), bench.expected(1)]
    for block in busy:
        bench.pool.unpin(block)
    retentions.expire(ends_at)
    bench.check_idle()


async def test_who_has_joined_waits_for_its_own_blocks_only() -> None:
    bench = FillBench()
    owner = bench.fetch(1, 2, 3, source=ANY)
    joined = bench.fetch(1, source=ANY)
    (job,) = bench.jobs
    job.deliver(0)
    joined.read()
    await turns()
    assert not joined.stream.finished, "the way of its block is not known"
    end_of_run(job.job, ServedBy.DIRECT, 0)
    await turns()
    assert joined.end() == [bench.expected(1)]
    assert joined.stream.served_by() == bytes([ServedBy.DIRECT])
    owner.stream.stop(TIMEOUT)
    assert job.stopped, "nobody waits for it any more"
    assert bench.counters["fills_cancelled"] == 1
    job.job.let_go()
    await turns()


async def test_layers_that_are_here_are_a_hit_whatever_becomes_of_the_others() -> None:
    bench = FillBench()
    whole = bench.fetch(1)
    part = bench.fetch(1, layers=(0, 1))
    (job,) = bench.jobs
    job.deliver(layers=(0, 1))
    job.fail(MISS)
    job.end()
    assert part.end() == [bench.expected(1, (0, 1))]
    assert whole.end() == [MISS]
    await turns()
    bench.check_idle()


async def test_the_rest_of_a_block_that_comes_damaged_is_asked_for_direct() -> None:
    bench = FillBench()
    reader = bench.fetch(1, source=ANY)
    (job,) = bench.jobs
    assert not job.job.route.direct_only
    job.deliver(layers=(0, 1))
    assert reader.read() == 1
    job.damage(0, layers=(1, 3))
    job.end()
    await turns()
    again = bench.jobs[1]
    assert again.job.route.direct_only
    assert again.job.layers == range(1, 3)
    again.deliver()
    again.end()
    assert reader.end() == [bench.expected(1)]
    await turns()
    bench.check_idle()


async def test_what_is_damaged_direct_too_is_corrupt() -> None:
    bench = FillBench()
    reader = bench.fetch(1, source=ANY)
    bench.jobs[0].deliver(layers=(0, 1))
    reader.read()
    for number in range(2):
        bench.jobs[number].damage(0, layers=(1, 3))
        bench.jobs[number].end()
        await turns()
    assert len(bench.jobs) == 2
    assert reader.end() == [CORRUPT]
    bench.check_idle()
