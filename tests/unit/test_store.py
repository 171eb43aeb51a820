"""The store: reservation, publication, pins, leases, quotas, eviction, retiring."""

from __future__ import annotations

import itertools

import pytest

from kvstore.errors import LocalProtocolError
from kvstore.messages import PutOutcome
from kvstore_daemon.engine import eviction, leases, store
from kvstore_daemon.engine.policy import Fifo
from kvstore_daemon.engine.pools import Namespace
from kvstore_daemon.engine.recount import check_invariants
from kvstore_daemon.engine.store import PAGE_BYTES, BlockStore, checksums_of
from tests.support.engine import content, key, layout

STORED, EXISTS, CONFLICT = PutOutcome.STORED, PutOutcome.EXISTS, PutOutcome.CONFLICT


def make_store(page_count: int) -> BlockStore:
    # First in, first out: which block goes next is plain to see.
    ticks = itertools.count()
    return BlockStore(
        memoryview(bytearray(page_count * PAGE_BYTES)), lambda capacity: Fifo(capacity, ticks)
    )


def open_pages(blocks: BlockStore, page_count: int, pool: str = "pool") -> Namespace:
    return blocks.pools.open(pool, layout(page_count * PAGE_BYTES))


def put(blocks: BlockStore, namespace: Namespace, number: int, version: int = 0) -> PutOutcome:
    slot = blocks.reserve(namespace)
    if not slot:
        return PutOutcome.FULL
    name = key(number)
    view = blocks.view(slot)
    view[:] = content(name, len(view), version)
    outcome = blocks.publish(namespace, name, slot, checksums_of(view, namespace, name))
    if outcome is STORED:
        blocks.enqueue(namespace, [slot])
    return outcome


def numbers(namespace: Namespace, *candidates: int) -> list[int]:
    return [number for number in candidates if key(number) in namespace.slots]


def read(blocks: BlockStore, namespace: Namespace, number: int) -> bytes:
    return bytes(blocks.view(namespace.slots[key(number)]))


def test_an_arena_smaller_than_a_page_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="4095 bytes"):
        BlockStore(memoryview(bytearray(4095)), lambda capacity: Fifo(capacity, itertools.count()))


def test_a_block_is_found_when_it_is_published_and_not_before() -> None:
    blocks = make_store(4)
    namespace = open_pages(blocks, 1)
    slot = blocks.reserve(namespace)
    assert not namespace.slots
    check_invariants(blocks)
    blocks.view(slot)[:] = content(key(1), PAGE_BYTES)
    assert blocks.publish(namespace, key(1), slot, b"sums") is STORED
    assert namespace.slots == {key(1): slot}
    check_invariants(blocks)
    blocks.enqueue(namespace, [slot])
    assert read(blocks, namespace, 1) == content(key(1), PAGE_BYTES)
    check_invariants(blocks)


def test_an_abandoned_reservation_leaves_nothing() -> None:
    blocks = make_store(4)
    namespace = open_pages(blocks, 3)
    blocks.abandon(blocks.reserve(namespace))
    assert blocks.free_bytes == blocks.arena_bytes
    assert namespace.occupied_count == namespace.pool.used_bytes == 0
    check_invariants(blocks)


def test_of_two_puts_at_the_same_time_the_first_complete_one_stays() -> None:
    blocks = make_store(4)
    namespace = open_pages(blocks, 1)
    first, second, third = (blocks.reserve(namespace) for _ in range(3))
    assert len({first, second, third}) == 3
    assert blocks.publish(namespace, key(1), second, b"sums") is STORED
    blocks.enqueue(namespace, [second])
    assert blocks.publish(namespace, key(1), first, b"sums") is EXISTS
    assert blocks.publish(namespace, key(1), third, b"else") is CONFLICT
    assert namespace.slots == {key(1): second}
    assert namespace.occupied_count == 1
    check_invariants(blocks)


def test_a_full_arena_evicts_what_came_first() -> None:
    blocks = make_store(3)
    namespace = open_pages(blocks, 1)
    assert [put(blocks, namespace, number) for number in range(5)] == [STORED] * 5
    assert numbers(namespace, *range(5)) == [2, 3, 4]
    assert blocks.counters["blocks_evicted"] == blocks.counters["blocks_evicted_arena"] == 2
    for number in (2, 3, 4):
        assert read(blocks, namespace, number) == content(key(number), PAGE_BYTES)
    check_invariants(blocks)


def test_the_tail_of_a_chain_goes_before_its_head() -> None:
    blocks = make_store(4)
    namespace = open_pages(blocks, 1)
    chain = []
    for number in range(4):
        slot = blocks.reserve(namespace)
        blocks.publish(namespace, key(number), slot, b"")
        chain.append(slot)
    blocks.enqueue(namespace, chain)
    put(blocks, namespace, 10)
    put(blocks, namespace, 11)
    assert numbers(namespace, *range(4)) == [0, 1]


def test_what_is_pinned_leased_or_being_written_is_never_evicted() -> None:
    blocks = make_store(4)
    namespace = open_pages(blocks, 1)
    for number in range(3):
        put(blocks, namespace, number)
    blocks.pin(namespace.slots[key(0)])
    blocks.lease("me", [namespace.slots[key(1)]], ends_at=10.0)
    written = blocks.reserve(namespace)
    assert put(blocks, namespace, 3) is STORED
    assert numbers(namespace, *range(4)) == [0, 1, 3]
    blocks.pin(namespace.slots[key(3)])
    assert put(blocks, namespace, 4) is PutOutcome.FULL
    assert blocks.reserve(namespace) == 0
    blocks.unpin([namespace.slots[key(3)]])
    assert put(blocks, namespace, 4) is STORED
    blocks.abandon(written)
    check_invariants(blocks)


def test_a_deleted_block_is_gone_at_once_and_its_memory_with_the_last_pin() -> None:
    blocks = make_store(2)
    namespace = open_pages(blocks, 1)
    put(blocks, namespace, 1)
    written = blocks.reserve(namespace)
    slot = namespace.slots[key(1)]
    blocks.pin(slot)
    lease = blocks.lease("me", [slot], ends_at=10.0)
    assert blocks.delete(namespace, key(1))
    assert not blocks.delete(namespace, key(1))
    assert numbers(namespace, 1) == []
    assert bytes(blocks.view(slot)) == content(key(1), PAGE_BYTES)
    check_invariants(blocks)
    blocks.unpin([slot])
    assert blocks.free_bytes == 0
    assert put(blocks, namespace, 2) is PutOutcome.FULL
    assert blocks.release(lease, "me", now=1.0)
    assert blocks.free_bytes == PAGE_BYTES
    assert put(blocks, namespace, 1, version=1) is STORED
    blocks.abandon(written)
    check_invariants(blocks)


def test_two_versions_of_a_block_live_side_by_side_while_the_first_is_read() -> None:
    blocks = make_store(2)
    namespace = open_pages(blocks, 1)
    put(blocks, namespace, 1)
    old = namespace.slots[key(1)]
    blocks.pin(old)
    blocks.delete(namespace, key(1))
    put(blocks, namespace, 1, version=1)
    assert bytes(blocks.view(old)) == content(key(1), PAGE_BYTES)
    assert read(blocks, namespace, 1) == content(key(1), PAGE_BYTES, version=1)
    blocks.unpin([old])
    assert read(blocks, namespace, 1) == content(key(1), PAGE_BYTES, version=1)
    check_invariants(blocks)


def test_a_block_may_be_deleted_before_it_enters_the_queues() -> None:
    blocks = make_store(2)
    namespace = open_pages(blocks, 1)
    slot = blocks.reserve(namespace)
    blocks.publish(namespace, key(1), slot, b"")
    blocks.delete(namespace, key(1))
    check_invariants(blocks)
    blocks.enqueue(namespace, [slot])
    assert blocks.free_bytes == blocks.arena_bytes
    check_invariants(blocks)


def test_a_slot_pinned_twice_is_unpinned_twice() -> None:
    blocks = make_store(1)
    namespace = open_pages(blocks, 1)
    put(blocks, namespace, 1)
    slot = namespace.slots[key(1)]
    blocks.pin(slot)
    blocks.pin(slot)
    blocks.delete(namespace, key(1))
    blocks.unpin([slot, slot])
    assert blocks.free_bytes == blocks.arena_bytes
    check_invariants(blocks)


def test_a_pool_evicts_inside_its_quota() -> None:
    blocks = make_store(10)
    small, large = open_pages(blocks, 1, "small"), open_pages(blocks, 1, "large")
    blocks.pools.set_capacity("small", 2 * PAGE_BYTES + 100)
    for number in range(4):
        put(blocks, small, number)
        put(blocks, large, number)
    assert numbers(small, *range(4)) == [2, 3]
    assert numbers(large, *range(4)) == [0, 1, 2, 3]
    assert blocks.counters["blocks_evicted_pool"] == 2
    check_invariants(blocks)


def test_a_block_larger_than_the_quota_evicts_nothing() -> None:
    blocks = make_store(10)
    small, large = open_pages(blocks, 1), open_pages(blocks, 3)
    blocks.pools.set_capacity("pool", 2 * PAGE_BYTES)
    put(blocks, small, 1)
    assert put(blocks, large, 2) is PutOutcome.FULL
    assert numbers(small, 1) == [1]


def test_a_quota_of_pinned_blocks_is_full() -> None:
    blocks = make_store(10)
    namespace = open_pages(blocks, 1)
    blocks.pools.set_capacity("pool", PAGE_BYTES)
    put(blocks, namespace, 1)
    blocks.pin(namespace.slots[key(1)])
    assert put(blocks, namespace, 2) is PutOutcome.FULL
    assert blocks.free_bytes == 9 * PAGE_BYTES


def test_a_lowered_quota_is_reached_in_bounded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "OVERDRAFT_BLOCKS_PER_CALL", 3)
    blocks = make_store(10)
    namespace = open_pages(blocks, 1)
    for number in range(10):
        put(blocks, namespace, number)
    blocks.pools.set_capacity("pool", 2 * PAGE_BYTES)
    left = []
    for _ in range(4):
        blocks.upkeep(0.0)
        left.append(len(namespace.slots))
    assert left == [7, 4, 2, 2]
    check_invariants(blocks)


def test_a_full_arena_takes_from_the_pool_whose_next_candidate_is_oldest() -> None:
    blocks = make_store(4)
    a, b = open_pages(blocks, 1, "a"), open_pages(blocks, 1, "b")
    for namespace, number in ((a, 0), (b, 1), (b, 2), (a, 3)):
        put(blocks, namespace, number)
    put(blocks, b, 4)
    assert (numbers(a, 0, 3), numbers(b, 1, 2, 4)) == ([3], [1, 2, 4])
    put(blocks, a, 5)
    assert (numbers(a, 3, 5), numbers(b, 1, 2, 4)) == ([3, 5], [2, 4])
    check_invariants(blocks)


def test_when_all_of_the_oldest_pool_is_pinned_another_gives() -> None:
    blocks = make_store(2)
    a, b = open_pages(blocks, 1, "a"), open_pages(blocks, 1, "b")
    put(blocks, a, 0)
    put(blocks, b, 1)
    blocks.pin(a.slots[key(0)])
    assert put(blocks, a, 2) is STORED
    assert (numbers(a, 0, 2), numbers(b, 1)) == ([0, 2], [])


def test_small_blocks_do_not_wedge_the_arena_for_large_ones() -> None:
    blocks = make_store(100)
    small, large = open_pages(blocks, 1, "small"), open_pages(blocks, 10, "large")
    for number in range(100):
        put(blocks, small, number)
    for number in range(90):
        if number % 20 != 7:
            continue
        blocks.pin(small.slots[key(number)])
    for number in range(200, 205):
        assert put(blocks, large, number) is STORED
        check_invariants(blocks)
    assert blocks.counters["blocks_evicted_window"] > 0
    assert numbers(large, *range(200, 205)) == [200, 201, 202, 203, 204]
    assert numbers(small, 7, 27, 47, 67, 87) == [7, 27, 47, 67, 87]
    for number in range(300, 400):
        put(blocks, small, number)
    assert put(blocks, large, 210) is STORED
    check_invariants(blocks)


def test_the_search_for_space_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "VICTIMS_PER_RESERVATION_MAX", 3)
    blocks = make_store(100)
    small, large = open_pages(blocks, 1), open_pages(blocks, 5)
    for number in range(100):
        put(blocks, small, number)
        if number % 3 == 0:
            blocks.pin(small.slots[key(number)])
    assert put(blocks, large, 200) is PutOutcome.FULL
    assert blocks.counters["blocks_evicted"] == 3
    check_invariants(blocks)


def test_leases_end_and_their_blocks_can_go() -> None:
    blocks = make_store(4)
    namespace = open_pages(blocks, 1)
    put(blocks, namespace, 0)
    put(blocks, namespace, 1)
    written = blocks.reserve(namespace), blocks.reserve(namespace)
    slots = [namespace.slots[key(number)] for number in (0, 1)]
    blocks.lease("me", slots, ends_at=10.0)
    blocks.lease("you", slots[:1], ends_at=20.0)
    blocks.expire(9.0)
    assert put(blocks, namespace, 2) is PutOutcome.FULL
    blocks.expire(10.0)
    assert put(blocks, namespace, 2) is STORED
    assert numbers(namespace, 0, 1, 2) == [0, 2]
    blocks.owner_gone("you")
    assert blocks.index.pins[slots[0]] == 0
    assert blocks.counters["leases_granted"] == 2
    assert blocks.counters["leases_expired"] == 1
    for slot in written:
        blocks.abandon(slot)
    check_invariants(blocks)


@pytest.mark.parametrize("pool_count", [1, 4])
@pytest.mark.parametrize("quota", [False, True])
def test_what_is_all_pinned_is_looked_at_once(
    monkeypatch: pytest.MonkeyPatch, pool_count: int, quota: bool
) -> None:
    monkeypatch.setattr(eviction, "CANDIDATES_MAX", 10)
    monkeypatch.setattr(store, "CANDIDATES_MAX", 10)
    looks: list[int] = []
    evictable = BlockStore._evictable
    monkeypatch.setattr(
        BlockStore, "_evictable", lambda self, slot: looks.append(slot) or evictable(self, slot)
    )
    ticks = itertools.count()
    arena = memoryview(bytearray(40 * PAGE_BYTES))
    blocks = BlockStore(arena, lambda capacity: eviction.GuardedLru(capacity, ticks))
    spaces = [open_pages(blocks, 1, f"pool-{number}") for number in range(pool_count)]
    slots = []
    for number in range(40):
        space = spaces[number % pool_count]
        assert put(blocks, space, number) is STORED
        slots.append(space.slots[key(number)])
        blocks.pin(slots[-1])
    if quota:
        blocks.pools.set_capacity("pool-0", spaces[0].pool.used_bytes)
    costs = []
    for _ in range(30):
        looks.clear()
        assert blocks.reserve(spaces[0]) == 0
        costs.append(len(looks))
    assert max(costs) == 10
    assert sum(costs) == (40 // pool_count if quota else 40)
    # One that is free again is found, wherever it stands.
    free = slots[20]
    blocks.unpin([free])
    results = [put(blocks, spaces[0], 100) for _ in range(4)]
    assert STORED in results
    assert blocks.index.keys[free] == key(100)
    blocks.unpin([slot for slot in slots if slot != free])
    check_invariants(blocks)


def test_a_refused_lease_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASES_PER_OWNER_MAX", 0)
    blocks = make_store(1)
    namespace = open_pages(blocks, 1)
    put(blocks, namespace, 0)
    assert blocks.lease("me", [namespace.slots[key(0)]], ends_at=10.0) == 0
    assert put(blocks, namespace, 1) is STORED
    assert blocks.counters["leases_refused"] == 1


def test_a_retired_generation_gives_its_memory_back_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "RETIRED_BLOCKS_PER_CALL", 4)
    blocks = make_store(10)
    namespace = open_pages(blocks, 1)
    for number in range(10):
        put(blocks, namespace, number)
    pinned = namespace.slots[key(3)]
    blocks.pin(pinned)
    blocks.retire("pool", namespace.generation.id)
    free = []
    for _ in range(4):
        blocks.upkeep(0.0)
        check_invariants(blocks)
        free.append(blocks.free_bytes // PAGE_BYTES)
    assert free[0] <= 4
    assert free[-1] == 9
    assert bytes(blocks.view(pinned)) == content(key(3), PAGE_BYTES)
    blocks.unpin([pinned])
    blocks.upkeep(0.0)
    assert blocks.free_bytes == blocks.arena_bytes
    assert not blocks.pools.by_number
    assert blocks.counters["blocks_retired"] == 10
    assert blocks.counters["blocks_evicted"] == 0
    check_invariants(blocks)


def test_retired_blocks_go_before_live_ones() -> None:
    blocks = make_store(4)
    live, old = open_pages(blocks, 1, "live"), open_pages(blocks, 1, "old")
    put(blocks, live, 0)
    for number in range(1, 4):
        put(blocks, old, number)
    blocks.retire("old", old.generation.id)
    for number in range(10, 13):
        assert put(blocks, live, number) is STORED
    assert numbers(live, 0, 10, 11, 12) == [0, 10, 11, 12]
    check_invariants(blocks)


def test_a_put_that_ends_after_its_generation_was_retired_stores_nothing() -> None:
    blocks = make_store(4)
    namespace = open_pages(blocks, 1)
    slot = blocks.reserve(namespace)
    blocks.retire("pool", namespace.generation.id)
    blocks.upkeep(0.0)
    check_invariants(blocks)
    assert blocks.publish(namespace, key(1), slot, b"") is PutOutcome.UNAVAILABLE
    blocks.upkeep(0.0)
    assert blocks.free_bytes == blocks.arena_bytes
    assert not blocks.pools.by_number
    check_invariants(blocks)


def test_stored_bytes_are_verified_against_their_checksums() -> None:
    blocks = make_store(2)
    namespace = open_pages(blocks, 2)
    put(blocks, namespace, 1)
    assert blocks.verify(namespace, key(1))
    assert blocks.verify(namespace, key(2))
    blocks.view(namespace.slots[key(1)])[5000] ^= 1
    assert not blocks.verify(namespace, key(1))
