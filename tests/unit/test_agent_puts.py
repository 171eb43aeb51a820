"""Puts through the agent: on to storage, and offers to peers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from kvstore.checksum import block_seed, layer_checksums
from kvstore.messages import AckLevel, PutOutcome
from kvstore_client import Namespace
from kvstore_client.agent import puts
from kvstore_client.agent.memory import PAGE_BYTES, BlockPool, HeldBlock
from kvstore_client.agent.puts import OfferPut, StoragePut
from kvstore_client.agent.retention import Retentions
from kvstore_client.jobs import PutJob
from kvstore_client.placement import PlacedKeys
from tests.support.engine import content, key, layout

SPACE = Namespace("pool", layout(PAGE_BYTES, PAGE_BYTES))
SIZE = 2 * PAGE_BYTES
ALL = range(2)
MANY_BYTES = 1 << 30

STORED, EXISTS, CONFLICT = PutOutcome.STORED, PutOutcome.EXISTS, PutOutcome.CONFLICT
FULL, TIMEOUT = PutOutcome.FULL, PutOutcome.TIMEOUT
CORRUPT, UNAVAILABLE = PutOutcome.CORRUPT, PutOutcome.UNAVAILABLE


def block_bytes(number: int, version: int = 0) -> bytes:
    return content(key(number), SIZE, version)


def sums(number: int, version: int = 0, layers: range = ALL) -> bytes:
    data, offsets = block_bytes(number, version), SPACE.geometry.offsets
    views = [data[a:b] for a, b in pairwise(offsets[layers.start : layers.stop + 1])]
    return layer_checksums(views, block_seed(SPACE.id, key(number)), layers.start)


class Storage:
    """Takes puts, and decides on them when it is told to.

    Attributes:
        jobs: Those that are under way.
        got: Bytes that each key was put with, in order.
    """

    def __init__(self) -> None:
        self.jobs: list[PutJob] = []
        self.got: list[tuple[bytes, bytes]] = []
        self.acks: list[AckLevel] = []
        self.reading = True
        self.refuses = False

    def begin_put(self, job: PutJob, ack: AckLevel) -> None:
        self.acks.append(ack)
        if self.refuses:
            job.time_out()
            return
        for name, memory in zip(job.keys, job.memory, strict=True):
            assert isinstance(memory, memoryview)
            self.got.append((name, bytes(memory)))
        self.jobs.append(job)
        job.borrow("run", lambda: None)

    def decide(self, *outcomes: PutOutcome, at: int = 0, let_go: bool = True) -> PutJob:
        job = self.jobs.pop(at)
        for index, outcome in enumerate(outcomes or [STORED] * len(job.keys)):
            job.block_done(index, outcome)
        job.time_out()
        if let_go:
            job.let_go()
        return job

    @property
    def numbers(self) -> list[list[int]]:
        """Blocks of the puts under way."""
        known = {key(number): number for number in range(100)}
        return [[known[name] for name in job.keys] for job in self.jobs]


class Bed:
    """A pool of some blocks, storage, and what streams tell their server."""

    def __init__(self, blocks: int = 40) -> None:
        self.now = 100.0
        self.pool = BlockPool(memoryview(bytearray(blocks * SIZE)))
        self.kept = Retentions(self.pool)
        self.storage = Storage()
        self.counters: Counter[str] = Counter()
        self.told = 0

    def _tell(self) -> None:
        self.told += 1

    def put(self, *numbers: int, version: int = 0, deadline_s: float = 5.0) -> StoragePut:
        chain = PlacedKeys([key(n) for n in numbers], [(len(numbers), b"head of the extent")])
        stream = StoragePut(
            self.pool,
            self.storage,
            SPACE,
            chain,
            b"".join(sums(n, version) for n in numbers),
            AckLevel.SYNCED,
            lambda: self.now,
            deadline_s,
            self.counters,
        )
        stream.on_decided = self._tell
        return stream

    def offer(
        self, *numbers: int, version: int = 0, layers: range = ALL, verify: bool = True
    ) -> OfferPut:
        stream = OfferPut(
            self.pool,
            self.kept,
            SPACE,
            [key(n) for n in numbers],
            layers,
            b"".join(sums(n, version, layers) for n in numbers),
            lambda: self.now,
            10.0,
            verify,
            self.counters,
        )
        stream.on_decided = self._tell
        return stream

    def find(self, number: int) -> HeldBlock | None:
        return self.pool.find(SPACE.id, key(number))

    def known(self, number: int) -> HeldBlock:
        block = self.find(number)
        assert block is not None
        return block

    def hold(self, number: int, version: int = 0, layers: range = ALL) -> HeldBlock:
        """A block in the pool, as a fill leaves it."""
        block = self.pool.reserve(SPACE, key(number))
        assert block is not None
        self.pool.pin(block)
        offsets = SPACE.geometry.offsets
        part = slice(offsets[layers.start], offsets[layers.stop])
        block.view[part] = block_bytes(number, version)[part]
        block.learn(layers.start, sums(number, version, layers))
        block.arrived(layers.start, layers.stop)
        self.pool.unpin(block)
        return block

    def check(self, pinned: int = 0) -> None:
        self.pool.check()
        self.kept.check()
        assert self.pool.pinned_count == pinned


def receive(
    stream: StoragePut | OfferPut,
    numbers: Sequence[int],
    *indices: int,
    version: int = 0,
    layers: range = ALL,
    damaged: bool = False,
) -> None:
    offsets = SPACE.geometry.offsets
    for index in indices:
        data = bytearray(block_bytes(numbers[index], version))
        data[offsets[layers.start]] ^= damaged
        target = stream.target(index)
        assert target is not None
        target[:] = data[offsets[layers.start] : offsets[layers.stop]]
        stream.received(index)
        assert stream.target(index) is None


def outcomes(stream: StoragePut | OfferPut) -> list[PutOutcome]:
    assert stream.finished
    return [PutOutcome(number) for number in stream.outcomes()]


@pytest.fixture
def bed() -> Bed:
    return Bed()


# --- to storage --------------------------------------------------------------------------------


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


# --- offers ------------------------------------------------------------------------------------


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
