"""Puts through the agent, on to storage."""

from __future__ import annotations

import pytest

from kvstore.messages import AckLevel
from kvstore_client.agent import puts
from kvstore_client.agent.memory import HeldBlock
from kvstore_client.placement import PlacedKeys
from tests.support.agentputs import (
    ALL,
    CONFLICT,
    CORRUPT,
    EXISTS,
    FULL,
    MANY_BYTES,
    SIZE,
    STORED,
    TIMEOUT,
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


def test_what_came_goes_on_to_storage_and_stays_for_peers(bed: Bed) -> None:
    stream = bed.put(1, 2)
    assert stream.reserve(MANY_BYTES) == [0, 1]
    assert stream.reserved_bytes == 2 * SIZE
    assert bed.known(1).coming == 0b11
    receive(stream, (1, 2), 0, 1)
    assert stream.reserved_bytes == 0
    assert bed.known(1).complete, "peers need not wait for storage"
    assert not stream.finished
    assert bed.told == 0
    bed.check(pinned=2)
    job = bed.storage.decide()
    assert (job.deadline_s, job.chain) == (5.0, PlacedKeys([key(1)], ((1, b"head of the extent"),)))
    assert not stream.finished
    bed.storage.decide()
    assert outcomes(stream) == [STORED, STORED]
    assert bed.told > 0
    assert bed.storage.got == [(key(n), block_bytes(n)) for n in (1, 2)]
    assert bed.storage.acks == [AckLevel.SYNCED] * 2
    assert bytes(bed.known(2).view) == block_bytes(2)
    assert bed.known(2).checksums_of(0, 2) == sums(2)
    assert bed.counters == {"put_bytes": 2 * SIZE, "put_stored": 2}
    bed.check()


def test_what_comes_meanwhile_goes_on_together(bed: Bed) -> None:
    numbers = range(6)
    stream = bed.put(*numbers)
    stream.reserve(MANY_BYTES)
    receive(stream, numbers, 0, 1, 2, 5, 3)
    assert bed.storage.numbers == [[0], [1]]
    bed.storage.decide()
    assert bed.storage.numbers == [[1], [2, 3, 5]]
    receive(stream, numbers, 4)
    bed.storage.decide(at=1)
    bed.storage.decide()
    bed.storage.decide()
    assert outcomes(stream) == [STORED] * 6
    bed.check()


def test_storage_has_the_last_word(bed: Bed) -> None:
    numbers = (1, 2, 3, 4)
    stream = bed.put(*numbers)
    stream.reserve(MANY_BYTES)
    receive(stream, numbers, 0, 1, 2, 3)
    bed.storage.decide(EXISTS)
    bed.storage.decide(CONFLICT)
    bed.storage.decide(FULL, UNAVAILABLE)
    assert outcomes(stream) == [EXISTS, CONFLICT, FULL, UNAVAILABLE]
    assert bed.counters["put_conflict"] == 1
    bed.check()


def test_a_block_stays_pinned_until_storage_reads_it_no_more(bed: Bed) -> None:
    stream = bed.put(1)
    stream.reserve(MANY_BYTES)
    receive(stream, (1,), 0)
    job = bed.storage.decide(let_go=False)
    assert outcomes(stream) == [STORED]
    bed.check(pinned=1)
    job.let_go()
    bed.check()


def test_what_the_pool_has_is_not_received_again(bed: Bed) -> None:
    bed.hold(1)
    bed.hold(3)
    stream = bed.put(1, 2, 3)
    assert stream.reserve(0) == []
    assert bed.storage.numbers == [[1]]
    assert stream.reserve(MANY_BYTES) == [1]
    assert bed.storage.numbers == [[1], [3]]
    receive(stream, (1, 2, 3), 1)
    for _ in range(3):
        bed.storage.decide()
    assert outcomes(stream) == [STORED] * 3
    assert bed.counters == {"put_bytes": SIZE, "put_held": 2, "put_stored": 3}
    bed.check()


def test_what_is_damaged_in_the_pool_is_received_again(bed: Bed) -> None:
    bad = bed.hold(1)
    bad.view[5] ^= 1
    stream = bed.put(1)
    assert stream.reserve(MANY_BYTES) == [0]
    assert bad.dropped
    receive(stream, (1,), 0)
    bed.storage.decide()
    assert bed.storage.got == [(key(1), block_bytes(1))]
    assert bed.counters["corrupt_blocks"] == 1
    bed.check()


def test_hashing_what_is_here_is_bounded(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puts, "CHECKED_BYTES_PER_CALL_MAX", 2 * SIZE)
    for number in range(5):
        bed.hold(number)
    stream = bed.put(*range(6))
    assert stream.reserve(0) == []
    assert bed.storage.numbers == [[0, 1]]
    told = bed.told
    bed.storage.decide()
    assert bed.told > told, "or nobody would ask for the rest"
    assert stream.reserve(MANY_BYTES) == []
    assert stream.reserve(MANY_BYTES) == [5]
    receive(stream, range(6), 5)
    for _ in range(3):
        bed.storage.decide()
    assert outcomes(stream) == [STORED] * 6
    bed.check()


@pytest.mark.parametrize("case", ["other bytes", "some layers", "coming"])
def test_what_the_pool_has_otherwise_goes_to_storage_and_changes_nothing(
    bed: Bed, case: str
) -> None:
    block = bed.hold(1, layers=range(1, 2) if case == "some layers" else ALL)
    bed.pool.pin(block)
    if case == "coming":
        block.ready = 0
        block.coming = 0b10
    before = bytes(block.view), block.ready, block.coming
    stream = bed.put(1, version=1)
    assert stream.reserve(MANY_BYTES) == [0]
    receive(stream, (1,), 0, version=1)
    assert bed.storage.got == [(key(1), block_bytes(1, 1))]
    assert (bytes(block.view), block.ready, block.coming) == before
    assert bed.known(1) is block
    bed.storage.decide(CONFLICT)
    assert outcomes(stream) == [CONFLICT]
    bed.check(pinned=1)
    assert bed.pool.free_bytes == 39 * SIZE


def test_the_same_key_twice_in_a_put(bed: Bed) -> None:
    stream = bed.put(1, 1)
    assert stream.reserve(MANY_BYTES) == [0, 1]
    receive(stream, (1, 1), 1, 0)
    bed.storage.decide()
    bed.storage.decide(EXISTS)
    assert outcomes(stream) == [EXISTS, STORED]
    bed.check()


def test_damage_on_the_way_is_neither_stored_nor_found(bed: Bed) -> None:
    stream = bed.put(1, 2)
    stream.reserve(MANY_BYTES)
    told: list[HeldBlock] = []
    bed.known(1).watchers["peer"] = told.append
    waited_for = bed.known(1)
    receive(stream, (1, 2), 0, damaged=True)
    assert bed.find(1) is None
    assert told == [waited_for]
    assert waited_for.dropped
    receive(stream, (1, 2), 1)
    bed.storage.decide()
    assert outcomes(stream) == [CORRUPT, STORED]
    bed.check()


def test_a_put_waits_for_its_own_blocks_and_for_no_others() -> None:
    bed = Bed(3)
    numbers = (1, 2, 3)
    other = bed.hold(9)
    bed.pool.pin(other)
    # A share of the pool is less than a block here: one at a time.
    stream = bed.put(*numbers)
    assert stream.reserve(MANY_BYTES) == [0]
    assert stream.reserve(MANY_BYTES) == []
    receive(stream, numbers, 0)
    assert stream.reserve(MANY_BYTES) == [], "it is on its way to storage"
    told = bed.told
    bed.storage.decide()
    assert bed.told > told
    assert stream.reserve(MANY_BYTES) == [1]
    bed.pool.pin(bed.hold(8))
    receive(stream, numbers, 1)
    bed.storage.decide()
    bed.pool.pin(bed.hold(7))
    assert stream.reserve(MANY_BYTES) == []
    assert outcomes(stream) == [STORED, STORED, FULL]
    bed.check(pinned=3)


def test_blocks_on_their_way_to_storage_are_waited_for(bed: Bed) -> None:
    for number in range(50, 88):
        bed.pool.pin(bed.hold(number))
    numbers = range(4)
    stream = bed.put(*numbers)
    assert stream.reserve(MANY_BYTES) == [0, 1]
    receive(stream, numbers, 0, 1)
    assert stream.reserve(MANY_BYTES) == []
    assert not stream.finished
    bed.storage.decide()
    assert stream.reserve(MANY_BYTES) == [2]
    bed.check(pinned=40)


def test_the_server_hears_of_outcomes_before_the_memory_is_free(bed: Bed) -> None:
    stream = bed.put(1)
    stream.reserve(MANY_BYTES)
    receive(stream, (1,), 0)
    bed.storage.decide(let_go=False)
    assert bed.told == 1


def test_the_beginning_of_a_chain_stays_longest() -> None:
    bed = Bed(12)
    for number in (1, 2, 3):
        bed.hold(number)
    bed.put(1, 2, 3).reserve(0)
    assert bed.storage.numbers == [[1, 2, 3]]
    bed.storage.decide()
    for number in range(20, 30):
        bed.hold(number)
    assert [n for n in (1, 2, 3) if bed.find(n)] == [1, 2]
    bed.check()


def test_a_full_pool_takes_what_needs_no_room() -> None:
    bed = Bed(2)
    bed.pool.pin(bed.hold(1))
    bed.pool.pin(bed.hold(2))
    stream = bed.put(5, 1, 6)
    assert stream.reserve(MANY_BYTES) == []
    assert bed.storage.numbers == [[1]]
    bed.storage.decide()
    stream.reserve(MANY_BYTES)
    assert outcomes(stream) == [FULL, STORED, FULL]


def test_one_put_leaves_room_for_others(bed: Bed) -> None:
    numbers = range(20)
    stream = bed.put(*numbers)
    assert stream.reserve(MANY_BYTES) == list(range(10)), "a quarter of the pool"
    assert stream.reserve(MANY_BYTES) == []
    receive(stream, numbers, 0)
    assert stream.reserve(MANY_BYTES) == []
    bed.storage.decide()
    assert stream.reserve(MANY_BYTES) == [10]


def test_no_more_is_reserved_than_the_server_takes(bed: Bed) -> None:
    stream = bed.put(1, 2, 3, 4)
    assert stream.reserve(SIZE - 1) == []
    assert stream.reserve(2 * SIZE + 1) == [0, 1]
    assert stream.reserve(SIZE) == [2]


def test_stopping_ends_all_at_once_and_memory_when_it_is_free(bed: Bed) -> None:
    numbers = range(5)
    stream = bed.put(*numbers)
    stream.reserve(4 * SIZE)
    receive(stream, numbers, 0, 1, 2)
    bed.storage.decide()
    assert bed.storage.numbers == [[1], [2]]
    told = bed.told
    stream.stop(TIMEOUT)
    assert outcomes(stream) == [STORED] + [TIMEOUT] * 4
    assert stream.reserved_bytes == 0
    assert stream.target(3) is None
    assert bed.find(3) is None
    assert stream.reserve(MANY_BYTES) == []
    assert bed.told == told, "the server knows"
    bed.check(pinned=2)
    for job in bed.storage.jobs:
        assert job.ended
        job.let_go()
    bed.check()


def test_a_stopped_put_sends_nothing_more(bed: Bed) -> None:
    numbers = range(4)
    stream = bed.put(*numbers)
    stream.reserve(MANY_BYTES)
    receive(stream, numbers, 0, 1, 2)
    assert bed.storage.numbers == [[0], [1]]
    stream.stop(UNAVAILABLE)
    for job in bed.storage.jobs:
        job.let_go()
    assert [name for name, _ in bed.storage.got] == [key(0), key(1)]
    bed.check()


def test_a_block_that_is_wanted_by_an_engine_stays_when_its_put_ends(bed: Bed) -> None:
    stream = bed.put(1)
    stream.reserve(MANY_BYTES)
    block = bed.known(1)
    bed.kept.retain("r", 0, [block], 200.0)
    told: list[int] = []
    block.watchers["fetch"] = lambda b: told.append(b.missing(0, 2))
    stream.stop(UNAVAILABLE)
    assert bed.known(1) is block
    assert told == [0b11], "somebody else may fill it now"
    bed.check()


def test_a_put_that_is_late_is_decided_within_the_call(bed: Bed) -> None:
    bed.storage.refuses = True
    stream = bed.put(1)
    stream.reserve(MANY_BYTES)
    bed.now += 6
    receive(stream, (1,), 0)
    assert outcomes(stream) == [TIMEOUT]
    assert bed.told == 0, "the server looks for itself"
    bed.check()
