"""Layers that an engine lays into its agent, for peers that pull them."""

from __future__ import annotations

import pytest

from kvstore.messages import PutOutcome, Retain
from kvstore_client.agent.memory import PAGE_BYTES
from kvstore_client.agent.puts import OfferPut
from tests.support.agentputs import (
    CONFLICT,
    CORRUPT,
    EXISTS,
    FULL,
    MANY_BYTES,
    SIZE,
    SPACE,
    STORED,
    UNAVAILABLE,
    Bed,
    block_bytes,
    outcomes,
    receive,
    sums,
)
from tests.support.engine import key


@pytest.fixture
def bed() -> Bed:
    return Bed()


def test_an_offer_is_kept_and_stored_nowhere(bed: Bed) -> None:
    stream = bed.offer(1, 2)
    assert stream.reserve(MANY_BYTES) == [0, 1]
    told: list[bool] = []
    bed.known(1).watchers["peer"] = lambda b: told.append(b.complete)
    receive(stream, (1, 2), 0, 1)
    assert outcomes(stream) == [STORED, STORED]
    assert told[-1]
    assert bytes(bed.known(1).view) == block_bytes(1)
    assert bed.storage.acks == []
    assert bed.kept.next_end == 110.0
    assert bed.pool.leased_bytes == 2 * SIZE
    assert bed.counters == {"offer_bytes": 2 * SIZE, "offer_stored": 2}
    bed.check()


def test_an_offer_for_a_request_ends_with_it(bed: Bed) -> None:
    retain = Retain(request="turn", attempt=1)
    for layers in (range(1), range(1, 2)):
        stream = bed.offer(1, 2, layers=layers, retain=retain)
        assert stream.reserve(MANY_BYTES) == [0, 1]
        receive(stream, (1, 2), 0, 1, layers=layers)
        assert outcomes(stream) == [STORED, STORED]
    assert bed.kept.block_count == 2
    assert bed.pool.leased_bytes == 2 * SIZE
    claimed = bed.kept.claim("turn", 1, "engine", 10.0, bed.now)
    assert claimed is not None
    assert len(claimed.blocks) == 2
    assert bed.kept.release(claimed.number, "engine")
    assert bed.pool.leased_bytes == 0
    # What comes late is not kept for a request that is over, and nothing is promised.
    late = bed.offer(3, retain=retain)
    assert late.reserve(MANY_BYTES) == [0]
    receive(late, (3,), 0)
    assert outcomes(late) == [FULL]
    bed.check()


def test_a_block_is_offered_layer_by_layer(bed: Bed) -> None:
    second = bed.offer(1, layers=range(1, 2))
    first = bed.offer(1, layers=range(0, 1))
    assert second.reserve(PAGE_BYTES) == [0]
    assert first.reserve(PAGE_BYTES) == [0]
    assert second.reserved_bytes == PAGE_BYTES
    assert bed.known(1).coming == 0b11
    receive(second, (1,), 0, layers=range(1, 2))
    assert (bed.known(1).ready, bed.known(1).coming) == (0b10, 0b01)
    bed.now += 3
    receive(first, (1,), 0, layers=range(0, 1))
    assert bed.known(1).complete
    assert bytes(bed.known(1).view) == block_bytes(1)
    assert bed.known(1).checksums_of(0, 2) == sums(1)
    assert outcomes(first) == outcomes(second) == [STORED]
    bed.kept.expire(112.9)
    assert bed.known(1).leases == 1
    bed.check()


def test_what_was_offered_goes_to_storage_without_coming_again(bed: Bed) -> None:
    stream = bed.offer(1)
    stream.reserve(MANY_BYTES)
    receive(stream, (1,), 0)
    assert bed.put(1).reserve(MANY_BYTES) == []
    assert bed.storage.got == [(key(1), block_bytes(1))]


def test_the_first_stays(bed: Bed) -> None:
    block = bed.hold(1)
    bed.hold(2, layers=range(0, 1))
    assert outcomes_of(bed.offer(1, 2, version=1)) == [CONFLICT, CONFLICT]
    assert bytes(block.view) == block_bytes(1)
    assert block.leases == 0
    assert outcomes_of(bed.offer(1)) == [EXISTS]
    assert block.leases == 1
    bed.check()


def outcomes_of(stream: OfferPut) -> list[PutOutcome]:
    """Of an offer of which nothing is to be received."""
    assert stream.reserve(MANY_BYTES) == []
    return outcomes(stream)


def test_what_is_missing_is_added_to_what_is_here(bed: Bed) -> None:
    block = bed.hold(1, layers=range(1, 2))
    stream = bed.offer(1)
    assert stream.reserve(MANY_BYTES) == [0]
    receive(stream, (1,), 0)
    assert outcomes(stream) == [STORED]
    assert block.complete
    assert bytes(block.view) == block_bytes(1)
    assert block.checksums_of(0, 2) == sums(1)
    bed.check()
    assert bed.pool.free_bytes == 39 * SIZE


def test_an_offer_of_what_is_coming_leaves_it_to_come(bed: Bed) -> None:
    block = bed.pool.reserve(SPACE, key(1))
    assert block is not None
    bed.pool.pin(block)
    block.coming = 0b11
    stream = bed.offer(1)
    assert stream.reserve(MANY_BYTES) == [0]
    receive(stream, (1,), 0)
    assert (block.ready, block.coming, stream.finished) == (0, 0b11, False)
    block.learn(0, sums(1))
    assert outcomes_of(bed.offer(1, version=1)) == [CONFLICT], "it is known what comes"
    assert bed.told == 0
    block.arrived(0, 2)
    assert (outcomes(stream), block.leases, bed.told) == ([EXISTS], 1, 1)
    assert not block.watchers
    bed.check(pinned=1)


def test_a_conflict_may_turn_up_while_an_offer_comes(bed: Bed) -> None:
    block = bed.pool.reserve(SPACE, key(1))
    assert block is not None
    bed.pool.pin(block)
    block.coming = 0b11
    stream = bed.offer(1, version=1)
    assert stream.reserve(MANY_BYTES) == [0]
    block.learn(0, sums(1))
    receive(stream, (1,), 0, version=1)
    assert outcomes(stream) == [CONFLICT]
    bed.check(pinned=1)


@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_found_if_it_is_looked_for(bed: Bed, verify: bool) -> None:
    bed.hold(2, layers=range(0, 1))
    stream = bed.offer(1, 2, verify=verify, layers=range(1, 2))
    stream.reserve(MANY_BYTES)
    receive(stream, (1, 2), 0, 1, layers=range(1, 2), damaged=True)
    assert outcomes(stream) == [CORRUPT if verify else STORED] * 2
    assert (bed.find(1) is None) == verify
    assert (bed.known(2).ready, bed.known(2).coming) == (0b01 if verify else 0b11, 0)
    bed.check()


def test_no_more_is_offered_than_may_be_kept(bed: Bed) -> None:
    for number in range(20):
        bed.kept.offer(bed.hold(number), 200.0)
    bed.hold(30)
    assert outcomes_of(bed.offer(30, 31, 3)) == [FULL, FULL, EXISTS]
    assert bed.find(31) is None
    bed.check()


def test_more_layers_of_what_is_kept_need_no_room(bed: Bed) -> None:
    bed.kept.offer(bed.hold(30, layers=range(1)), 200.0)
    for number in range(19):
        bed.kept.offer(bed.hold(number), 200.0)
    stream = bed.offer(30, 31, layers=range(1, 2))
    assert stream.reserve(MANY_BYTES) == [0]
    receive(stream, (30, 31), 0, layers=range(1, 2))
    assert outcomes(stream) == [STORED, FULL]
    bed.check()


def test_what_is_on_its_way_counts_as_kept(bed: Bed) -> None:
    for number in range(18):
        bed.kept.offer(bed.hold(number), 200.0)
    stream = bed.offer(30, 31, 32)
    assert stream.reserve(MANY_BYTES) == [0, 1]
    receive(stream, (30, 31), 0, 1)
    assert outcomes(stream) == [STORED, STORED, FULL]
    bed.check()


def test_an_offer_for_which_room_was_taken_meanwhile_is_not_promised(bed: Bed) -> None:
    for number in range(19):
        bed.kept.offer(bed.hold(number), 200.0)
    stream = bed.offer(30)
    assert stream.reserve(MANY_BYTES) == [0]
    bed.kept.offer(bed.hold(19), 200.0)
    receive(stream, (30,), 0)
    assert outcomes(stream) == [FULL]
    assert bed.known(30).complete, "it is here for as long as it lasts"
    bed.check()


def test_a_full_pool_takes_no_offer_and_waits_for_its_own() -> None:
    bed = Bed(8)
    for number in range(7):
        bed.pool.pin(bed.hold(number))
    stream = bed.offer(30, 31)
    assert stream.reserve(MANY_BYTES) == [0]
    assert stream.reserve(MANY_BYTES) == []
    receive(stream, (30, 31), 0)
    assert stream.reserve(MANY_BYTES) == [], "what was offered first is kept"
    assert outcomes(stream) == [STORED, FULL]
    bed.check(pinned=7)


def test_an_offer_that_was_deleted_while_it_came_is_not_here(bed: Bed) -> None:
    stream = bed.offer(1)
    stream.reserve(MANY_BYTES)
    bed.pool.drop(bed.known(1))
    receive(stream, (1,), 0)
    assert outcomes(stream) == [UNAVAILABLE]
    assert bed.find(1) is None
    bed.check()


def test_a_stopped_offer_leaves_nothing_that_is_coming(bed: Bed) -> None:
    bed.hold(1, layers=range(0, 1))
    stream = bed.offer(1, 2, 3, layers=range(1, 2))
    assert stream.reserve(2 * PAGE_BYTES) == [0, 1]
    stream.stop(UNAVAILABLE)
    assert outcomes(stream) == [UNAVAILABLE] * 3
    assert (bed.known(1).ready, bed.known(1).coming) == (0b01, 0)
    assert bed.find(2) is None
    bed.check()
