"""The agent's block pool: layers, pins, leases, what is evicted, who is told."""

from __future__ import annotations

import pytest

from kvstore.errors import LocalProtocolError
from kvstore_client import Namespace
from kvstore_client.agent.memory import PAGE_BYTES, BlockPool, HeldBlock, layer_mask
from tests.support.engine import key, layout

ONE = Namespace("pool", layout(PAGE_BYTES // 2, PAGE_BYTES // 2))
TWO = Namespace("pool", layout(PAGE_BYTES, PAGE_BYTES))
FIVE = Namespace("pool", layout(5 * PAGE_BYTES))
SUMS = bytes(range(16))


def make(pages: int) -> BlockPool:
    return BlockPool(memoryview(bytearray(pages * PAGE_BYTES)))


def reserve(pool: BlockPool, number: int, namespace: Namespace = ONE) -> HeldBlock:
    block = pool.reserve(namespace, key(number))
    assert block is not None
    return block


def fill(pool: BlockPool, *numbers: int, namespace: Namespace = ONE) -> list[HeldBlock]:
    """Complete blocks, used in this order."""
    blocks = [reserve(pool, number, namespace) for number in numbers]
    for block in blocks:
        pool.pin(block)
        count = namespace.geometry.layer_count
        block.learn(0, SUMS[: 8 * count])
        block.arrived(0, count)
        pool.unpin(block)
    pool.check()
    return blocks


def found(pool: BlockPool, namespace: Namespace = ONE) -> list[int]:
    return [n for n in range(20) if pool.find(namespace.id, key(n)) is not None]


# --- layers ------------------------------------------------------------------------------------


def test_layers_come_one_by_one() -> None:
    block = reserve(make(2), 1, TWO)
    assert not block.has(0, 1)
    assert block.missing(0, 2) == 0b11
    block.coming = layer_mask(1, 2)
    assert block.missing(0, 2) == 0b01
    block.learn(1, SUMS[8:])
    assert block.knows(1, 2)
    assert not block.knows(0, 2)
    block.arrived(1, 2)
    assert (block.ready, block.coming, block.known) == (0b10, 0, 0b10)
    assert block.has(1, 2)
    assert not block.has(0, 2)
    assert not block.complete
    block.learn(0, SUMS[:8])
    block.arrived(0, 1)
    assert block.complete
    assert block.checksums_of(0, 2) == SUMS
    assert block.checksums_of(1, 2) == SUMS[8:]


def test_a_layer_does_not_arrive_without_its_checksum() -> None:
    block = reserve(make(2), 1, TWO)
    block.learn(0, SUMS[:8])
    with pytest.raises(AssertionError):
        block.arrived(0, 2)


def test_the_view_is_the_memory_of_the_pool() -> None:
    memory = memoryview(bytearray(4 * PAGE_BYTES))
    pool = BlockPool(memory)
    first, second = reserve(pool, 1, TWO), reserve(pool, 2, TWO)
    first.view[:] = b"1" * (2 * PAGE_BYTES)
    second.layers(1, 2)[:] = b"2" * PAGE_BYTES
    assert memory.tobytes() == (b"1" * (2 * PAGE_BYTES) + bytes(PAGE_BYTES) + b"2" * PAGE_BYTES)


def test_a_block_of_odd_size_takes_whole_pages() -> None:
    pool = make(4)
    odd = Namespace("pool", layout(PAGE_BYTES, 1))
    assert len(reserve(pool, 1, odd).view) == PAGE_BYTES + 1
    assert pool.free_bytes == 2 * PAGE_BYTES
    pool.check()


@pytest.mark.parametrize("size", [0, PAGE_BYTES - 1])
def test_a_pool_has_at_least_a_page(size: int) -> None:
    with pytest.raises(LocalProtocolError, match="must be 4096 to"):
        BlockPool(memoryview(bytearray(size)))


# --- finding and evicting ----------------------------------------------------------------------


def test_reserving_a_key_twice_gives_the_same_block() -> None:
    pool = make(4)
    assert reserve(pool, 1) is reserve(pool, 1)
    assert reserve(pool, 1) is not reserve(pool, 1, TWO), "another namespace"
    assert pool.block_count == 2
    assert pool.find(ONE.id, key(2)) is None
    pool.check()


def test_the_least_recently_used_goes_first() -> None:
    pool = make(3)
    first, second, third = fill(pool, 1, 2, 3)
    pool.touch(first)
    fill(pool, 4)
    assert second.dropped
    assert found(pool) == [1, 3, 4]
    pool.pin(third)
    pool.unpin(third)
    fill(pool, 5)
    assert found(pool) == [3, 4, 5]
    assert pool.evicted_count == 2


def test_a_block_of_which_nothing_came_goes_before_all_others() -> None:
    pool = make(3)
    fill(pool, 1, 2)
    pool.pin(empty := reserve(pool, 3))
    pool.unpin(empty)
    fill(pool, 4)
    assert found(pool) == [1, 2, 4]


def test_pinned_and_leased_blocks_stay() -> None:
    pool = make(3)
    pinned, leased, _ = fill(pool, 1, 2, 3)
    pool.pin(pinned)
    pool.lease(leased)
    assert pool.reclaimable_bytes == PAGE_BYTES
    assert (pool.pinned_count, pool.leased_bytes) == (1, PAGE_BYTES)
    pool.pin(reserve(pool, 4))
    assert found(pool) == [1, 2, 4]
    assert pool.reserve(ONE, key(5)) is None
    assert found(pool) == [1, 2, 4]
    assert pool.reclaimable_bytes == 0
    pool.check()


def test_a_block_that_is_pinned_and_leased_waits_for_both() -> None:
    pool = make(1)
    (block,) = fill(pool, 1)
    pool.pin(block)
    pool.lease(block)
    pool.unpin(block)
    assert pool.reserve(ONE, key(2)) is None
    pool.pin(block)
    pool.unlease(block)
    assert pool.reserve(ONE, key(2)) is None
    pool.check()
    pool.unpin(block)
    assert reserve(pool, 2)
    pool.check()


def test_what_can_never_fit_evicts_nothing() -> None:
    pool = make(4)
    fill(pool, 1, 2, 3, 4)
    assert pool.reserve(FIVE, key(9)) is None
    assert found(pool) == [1, 2, 3, 4]
    pool.lease(reserve(pool, 1))
    assert pool.reserve(Namespace("pool", layout(4 * PAGE_BYTES)), key(9)) is None
    assert found(pool) == [1, 2, 3, 4]


def test_a_large_block_takes_the_place_of_small_neighbours() -> None:
    pool = make(8)
    fill(pool, *range(8))
    pool.touch(reserve(pool, 0))
    fill(pool, 9, namespace=TWO)
    # 1 was next, and its neighbours are as good as any.
    assert found(pool) in ([2, 3, 4, 5, 6, 7], [0, 3, 4, 5, 6, 7])
    assert found(pool, TWO) == [9]


def test_a_large_block_looks_around_what_stays() -> None:
    pool = make(6)
    blocks = fill(pool, *range(6))
    pool.lease(blocks[1])
    assert reserve(pool, 9, TWO)
    # 0 has no neighbour that may go, so the next victim and its neighbour made the room.
    assert found(pool) == [1, 4, 5]
    pool.check()


def test_a_neighbour_of_the_same_size_is_left_to_the_order_of_use() -> None:
    pool = make(6)
    fill(pool, 1)
    hot, cold = fill(pool, 8, namespace=TWO)[0], fill(pool, 2)[0]
    fill(pool, 9, namespace=TWO)
    pool.touch(hot)
    assert reserve(pool, 10, TWO)
    assert cold.dropped
    assert found(pool, TWO) == [8, 10]


def test_fragments_are_no_room() -> None:
    pool = make(6)
    blocks = fill(pool, *range(6))
    for block in blocks[1::2]:
        pool.lease(block)
    assert pool.reserve(TWO, key(9)) is None
    assert found(pool) == [1, 3, 5]
    assert pool.free_bytes == 3 * PAGE_BYTES
    pool.check()


def test_the_search_for_room_ends() -> None:
    pool = make(400)
    blocks = fill(pool, *range(400))
    for block in blocks[1::2]:
        pool.lease(block)
    assert pool.reserve(TWO, key(999)) is None
    assert pool.evicted_count == 64


# --- dropping ----------------------------------------------------------------------------------


def test_a_dropped_block_is_not_found_and_its_key_is_free() -> None:
    pool = make(2)
    (old,) = fill(pool, 1)
    pool.pin(old)
    old.view[:] = b"o" * PAGE_BYTES
    pool.drop(old)
    pool.drop(old)
    assert pool.find(ONE.id, key(1)) is None
    new = reserve(pool, 1)
    pool.pin(new)
    assert new is not old
    new.view[:] = b"n" * PAGE_BYTES
    assert bytes(old.view) == b"o" * PAGE_BYTES, "whoever has it pinned reads on"
    assert pool.reserve(ONE, key(2)) is None
    pool.check()
    pool.unpin(old)
    assert not len(old.view)
    assert reserve(pool, 2)
    pool.check()


def test_a_dropped_block_is_gone_at_once_if_nobody_uses_it() -> None:
    pool = make(1)
    (block,) = fill(pool, 1)
    pool.drop(block)
    assert pool.free_bytes == PAGE_BYTES
    assert not len(block.view)
    with pytest.raises(AssertionError, match="not its own"):
        pool.pin(block)
    pool.check()


def test_leases_do_not_keep_what_was_dropped() -> None:
    pool = make(1)
    (block,) = fill(pool, 1)
    pool.lease(block)
    pool.drop(block)
    assert (pool.leased_bytes, pool.free_bytes) == (0, PAGE_BYTES)
    pool.lease(block)
    pool.unlease(block)
    pool.unlease(block)
    assert (pool.leased_bytes, pool.free_bytes) == (0, PAGE_BYTES)
    pool.check()


def test_a_block_apart_is_never_found() -> None:
    pool = make(2)
    (known,) = fill(pool, 1)
    apart = pool.reserve_apart(ONE, key(1))
    assert apart is not None
    assert apart.pins == 1
    assert pool.find(ONE.id, key(1)) is known
    assert pool.block_count == 1
    pool.check()
    pool.unpin(apart)
    assert pool.free_bytes == PAGE_BYTES
    pool.pin(known)
    assert pool.reserve_apart(ONE, key(1)) is not None
    assert pool.reserve_apart(ONE, key(1)) is None
    pool.check()


# --- who is told -------------------------------------------------------------------------------


def test_watchers_are_told_of_all_that_changes() -> None:
    pool = make(2)
    block = reserve(pool, 1, TWO)
    told: list[tuple[int, int, bool]] = []
    block.watchers["me"] = lambda b: told.append((b.known, b.ready, b.dropped))
    block.learn(0, SUMS)
    block.arrived(0, 1)
    pool.drop(block)
    assert told == [(0b11, 0, False), (0b11, 1, False), (0b11, 1, True)]


def test_watchers_may_come_and_go_while_they_are_told() -> None:
    block = reserve(make(2), 1)
    told: list[str] = []

    def once(changed: HeldBlock) -> None:
        told.append("once")
        del changed.watchers["once"]
        changed.watchers["late"] = lambda b: told.append("late")

    block.watchers["once"] = once
    block.notify()
    block.notify()
    assert told == ["once", "late"]


def test_watchers_are_told_of_evictions_when_the_books_agree() -> None:
    pool = make(2)
    (victim, _) = fill(pool, 1, 2)
    told: list[HeldBlock | None] = []

    def look(evicted: HeldBlock) -> None:
        assert evicted.dropped
        told.append(pool.reserve(ONE, key(4)))
        pool.check()

    victim.watchers["me"] = look
    block = reserve(pool, 3)
    assert not block.dropped, "the one that asked inside has not taken it"
    assert told == [pool.find(ONE.id, key(4))]
    assert found(pool) == [3, 4]
    pool.check()


def test_room_is_told_once_after_it_was_wanted() -> None:
    pool = make(1)
    told: list[int] = []
    pool.on_room = lambda: told.append(pool.reclaimable_bytes)
    (block,) = fill(pool, 1)
    assert told == []
    pool.pin(block)
    assert pool.reserve(ONE, key(2)) is None
    assert pool.reserve(ONE, key(3)) is None
    pool.lease(block)
    pool.unpin(block)
    assert told == [], "it is leased"
    pool.unlease(block)
    pool.pin(block)
    pool.unpin(block)
    assert told == [PAGE_BYTES]


def test_dropping_makes_room_at_the_last_pin() -> None:
    pool = make(1)
    told: list[int] = []
    pool.on_room = lambda: told.append(pool.free_bytes)
    (block,) = fill(pool, 1)
    pool.pin(block)
    assert pool.reserve(ONE, key(2)) is None
    pool.drop(block)
    assert told == []
    pool.unpin(block)
    assert told == [PAGE_BYTES]
    (leased,) = fill(pool, 2)
    pool.lease(leased)
    assert pool.reserve(ONE, key(3)) is None
    pool.drop(leased)
    assert told == [PAGE_BYTES, PAGE_BYTES]


def test_a_reservation_is_no_news_of_room() -> None:
    """Or whoever waits for room would get the block that was just reserved."""
    pool = make(2)
    blocks = fill(pool, 1, 2)
    for block in blocks:
        pool.pin(block)
    assert pool.reserve(TWO, key(3)) is None
    pool.on_room = lambda: pytest.fail("there is no more room than before")
    pool.lease(blocks[0])
    pool.unpin(blocks[0])
    pool.on_room = lambda: None
    pool.unpin(blocks[1])
    assert pool.reserve(TWO, key(3)) is None
    pool.on_room = lambda: pytest.fail("there is no more room than before")
    assert reserve(pool, 4)


def test_drops_are_told_and_evictions_are_not() -> None:
    pool = make(1)
    told: list[HeldBlock] = []
    pool.on_dropped = told.append
    fill(pool, 1)
    (block,) = fill(pool, 2)
    pool.drop(block)
    pool.drop(block)
    assert told == [block]
