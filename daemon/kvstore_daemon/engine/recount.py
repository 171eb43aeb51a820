"""Counts everything again and compares it with what the store believes; for tests. Pure."""

from __future__ import annotations

from collections import Counter

from kvstore_daemon.engine.store import PAGE_BYTES, BlockStore


def check_invariants(store: BlockStore) -> None:
    """Assert that extents, index, queues, leases and usage agree. Walks over all blocks."""
    store.allocator.check()
    index, pools = store.index, store.pools
    for namespace in pools.by_number.values():
        namespace.slots.check()
    published = {
        slot: (namespace, key)
        for namespace in pools.by_number.values()
        for key, slot in namespace.slots.items()
    }
    leased = Counter(store.leases.slots())
    occupied: Counter[int] = Counter()
    queued: Counter[str] = Counter()
    reserved = doomed = 0
    for slot in store.allocator.extents():
        if store.allocator.is_free(slot):
            assert slot not in published
            continue
        namespace = pools.by_number[index.namespace_numbers[slot]]
        occupied[namespace.number] += 1
        assert store.allocator.pages(slot) == namespace.block_pages
        assert index.pins[slot] >= leased.pop(slot, 0)
        if slot in published:
            assert published[slot] == (namespace, index.keys[slot])
            assert index.checksums[slot] is not None
            assert index.queued[slot] or index.pins[slot], f"slot {slot} can never be evicted"
            queued[namespace.pool.name] += index.queued[slot]
            continue
        assert index.keys[slot] is None
        assert not index.queued[slot]
        assert index.pins[slot] > 0, f"slot {slot} is lost"
        assert (index.checksums[slot] is not None) == (slot in index.doomed)
        if slot in index.doomed:
            doomed += 1
        else:
            reserved += 1
    assert not leased, f"leases over slots that are not occupied: {leased}"
    assert len(published) == index.published_count
    assert reserved == index.reserved_count
    assert doomed == len(index.doomed)
    used: Counter[str] = Counter()
    for namespace in pools.by_number.values():
        assert namespace.occupied_count == occupied[namespace.number]
        used[namespace.pool.name] += namespace.used_bytes
    for pool in pools:
        assert pool.used_bytes == used[pool.name], (pool.name, pool.used_bytes, used)
        assert len(pool.policy) == queued[pool.name], (pool.name, len(pool.policy), queued)
    used_pages = store.allocator.page_count - store.allocator.free_pages
    assert used_pages * PAGE_BYTES == sum(used.values())
