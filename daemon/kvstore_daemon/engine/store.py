"""The block store: blocks in the arena, found by key, kept by pins, evicted by policy.

Thread rule: one owner, the loop's thread; every method returns at once and its work is
bounded by a named maximum.

The life of a block::

    reserve ──▶ (bytes are written to `view`) ──▶ publish ──▶ pin / unpin ... ──▶ evict
       └──────────▶ abandon                          └──▶ delete, retire ──▶ doomed ──▶ free

Nothing that is reserved, pinned, leased or doomed ever moves or is overwritten.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import pairwise

from kvstore.allocator import END, PAGES_MAX, ExtentAllocator
from kvstore.checksum import block_seed, layer_checksums
from kvstore.errors import LocalProtocolError
from kvstore.layout import Layout
from kvstore.messages import PutOutcome
from kvstore_daemon.engine.index import BlockIndex
from kvstore_daemon.engine.leases import LeaseTable
from kvstore_daemon.engine.policy import CANDIDATES_MAX, EvictionPolicy
from kvstore_daemon.engine.pools import Namespace, Pool, PoolTable

# The unit of direct I/O, so that blocks can go to and come from a disk without a copy.
PAGE_BYTES = 4096
# Victims taken for one reservation that does not fit. The first makes room unless what lies
# around it is pinned; beyond this many, most of the arena is, and the put goes without.
VICTIMS_PER_RESERVATION_MAX = 64
# Blocks that go because a pool is over its quota, in one call. A quota that was lowered is
# reached over several calls, so that none holds up the loop for more than a few ms.
OVERDRAFT_BLOCKS_PER_CALL = 1024
# One session may lease half of the arena: no single one can keep the others from storing, and
# none needs more, since what it has leased is what it is about to fetch.
LEASED_SHARE_DIVISOR = 2
# Blocks of retired generations that are freed in one call: about 1 ms.
RETIRED_BLOCKS_PER_CALL = 512


class BlockStore:
    """Blocks of all pools in one arena.

    Ownership: borrows `arena` for its whole life, and is its only writer except for the
    views of reserved blocks that it gave out.

    Args:
        arena: Writable memory; whole pages of it are used.
        make_policy: Makes the eviction policy of a pool, given its capacity in bytes.

    Attributes:
        index: Columns over slots; read only for others.
        pools: Pools and namespaces.
        leases: Which blocks are promised to whom.
        counters: Everything that was counted, by name.
    """

    def __init__(self, arena: memoryview, make_policy: Callable[[int], EvictionPolicy]) -> None:
        page_count = len(arena) // PAGE_BYTES
        if not 0 < page_count <= PAGES_MAX:
            raise LocalProtocolError(
                f"an arena of {len(arena)} bytes: must be {PAGE_BYTES} to {PAGES_MAX * PAGE_BYTES}"
            )
        self.arena = arena
        self.arena_bytes = page_count * PAGE_BYTES
        self.allocator = ExtentAllocator(page_count)
        self.index = BlockIndex()
        self.index.pins[END] = 1  # the end of the arena is not evictable
        self.pools = PoolTable(PAGE_BYTES, self.arena_bytes, make_policy, self.index.keys)
        self.leases = LeaseTable(self.arena_bytes // LEASED_SHARE_DIVISOR)
        self.counters: Counter[str] = Counter()
        self._pins = self.index.pins
        # Retired namespaces that still have published blocks, or doomed and reserved ones.
        self._retired: deque[Namespace] = deque()
        # Candidates for eviction that were looked at in vain, by pool, since any block came to
        # be evictable: with all of a pool looked at there is no need to look again.
        self._in_vain: dict[str, int] = {}

    @property
    def free_bytes(self) -> int:
        """Arena bytes that hold nothing."""
        return self.allocator.free_pages * PAGE_BYTES

    # --- reading ---------------------------------------------------------------------------

    def view(self, slot: int) -> memoryview:
        """The bytes of a block. Valid while the slot is reserved or pinned."""
        start = self.allocator.starts[slot] * PAGE_BYTES
        number = self.index.namespace_numbers[slot]
        return self.arena[start : start + self.pools.by_number[number].geometry.block_bytes]

    def pin(self, slot: int) -> None:
        """Keep a published block where it is until `unpin`."""
        self._pins[slot] += 1

    def unpin(self, slots: Sequence[int]) -> None:
        """Take back one pin of each slot (of a slot named twice: two)."""
        pins = self._pins
        for slot in slots:
            pins[slot] -= 1
        doomed = self.index.doomed
        if doomed or self._in_vain:
            for slot in slots:
                if not pins[slot]:
                    self._in_vain.clear()
                    if slot in doomed:
                        self._free(slot)

    def touch(self, namespace: Namespace, slots: Sequence[int]) -> None:
        """Blocks of one request were read, in the order of their chain."""
        touch = namespace.pool.policy.touch
        queued = self.index.queued
        for slot in reversed(slots):
            if queued[slot]:
                touch(slot)

    # --- writing ---------------------------------------------------------------------------

    def reserve(self, namespace: Namespace) -> int:
        """Space for one more block, evicting others if need be.

        Returns:
            A slot with one pin, which `publish` or `abandon` must follow; 0 when there is
            no space because what is left is pinned, leased or being written.
        """
        pool = namespace.pool
        if pool.capacity_bytes and not self._fit_quota(
            pool, namespace.slot_bytes, OVERDRAFT_BLOCKS_PER_CALL + namespace.block_pages
        ):
            return 0
        slot = self.allocator.allocate(namespace.block_pages)
        if slot == END:
            slot = self._make_room(namespace.block_pages)
            if slot == END:
                return 0
        self.index.reserve(slot, namespace.number)
        namespace.occupied_count += 1
        pool.used_bytes += namespace.slot_bytes
        return slot

    def publish(self, namespace: Namespace, key: bytes, slot: int, checksums: bytes) -> PutOutcome:
        """The reserved slot holds the verified bytes of a block: let requests find it.

        The reservation's pin stays on a block that was `STORED` until `enqueue`; with any
        other outcome the slot is free again.
        """
        if namespace.retired:
            self.abandon(slot)
            return PutOutcome.UNAVAILABLE
        known = self.index.publish(slot, key, checksums, namespace.slots)
        if known:
            self.abandon(slot)
            return self.compare(known, checksums)
        return PutOutcome.STORED

    def compare(self, slot: int, checksums: bytes) -> PutOutcome:
        """What a put of a key that is stored already comes to."""
        return PutOutcome.EXISTS if self.index.checksums[slot] == checksums else PutOutcome.CONFLICT

    def enqueue(self, namespace: Namespace, slots: Sequence[int]) -> None:
        """Published blocks of one put, in the order of their chain, may be evicted from now on.

        Takes the pin that `publish` left on them.
        """
        index, policy = self.index, namespace.pool.policy
        for slot in reversed(slots):
            key = index.keys[slot]
            if key is not None:  # else it was deleted meanwhile
                policy.insert(slot, namespace.slot_bytes, block_seed(namespace.id, key))
                index.queued[slot] = 1
        self.unpin(slots)

    def abandon(self, slot: int) -> None:
        """Give a reserved slot back: nothing writes to it any more."""
        self.index.abandon(slot)
        self._free_extent(slot)

    def delete(self, namespace: Namespace, key: bytes) -> bool:
        """Remove a block; its memory is free when its last pin goes. False: not stored."""
        slot = namespace.slots.find(key)
        if not slot:
            return False
        namespace.slots.remove(slot)
        self._withdraw(slot)
        return True

    def verify(self, namespace: Namespace, key: bytes) -> bool:
        """Whether the bytes of a stored block match its checksums; a missing one does."""
        slot = namespace.slots.find(key)
        if not slot:
            return True
        expected = self.index.checksums[slot]
        return checksums_of(self.view(slot), namespace, key) == expected

    # --- leases, pools, upkeep -------------------------------------------------------------

    def lease(self, owner: object, slots: Sequence[int], ends_at: float) -> int:
        """Promise published blocks to an owner; the number of the lease, 0 if refused."""
        counts = Counter(map(self.index.namespace_numbers.__getitem__, slots))
        by_number = self.pools.by_number
        size_bytes = sum(by_number[number].slot_bytes * n for number, n in counts.items())
        number = self.leases.grant(owner, slots, size_bytes, ends_at)
        if not number:
            self.counters["leases_refused"] += 1
            return 0
        self.counters["leases_granted"] += 1
        for slot in slots:
            self._pins[slot] += 1
        return number

    def release(self, number: int, owner: object, now: float) -> bool:
        """End a lease; whether it had held until now."""
        slots = self.leases.release(number, owner, now)
        if slots is None:
            return False
        self.unpin(slots)
        return True

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        for slots in self.leases.expire(now):
            self.counters["leases_expired"] += 1
            self.unpin(slots)

    def owner_gone(self, owner: object) -> None:
        """End all leases of an owner."""
        for slots in self.leases.owner_gone(owner):
            self.unpin(slots)

    def open_namespace(self, pool: str, layout: Layout) -> Namespace:
        """See `PoolTable.open`."""
        return self.pools.open(pool, layout)

    def retire(self, pool: str, generation: bytes) -> None:
        """Drop a generation. Its blocks go bit by bit in `upkeep`, or when space is needed."""
        self._retired.extend(self.pools.retire(pool, generation))
        self.counters["generations_retired"] += 1

    def upkeep(self, now: float) -> None:
        """A bounded piece of work that nobody waits for; call it now and then."""
        self.expire(now)
        self._free_retired(RETIRED_BLOCKS_PER_CALL)
        for pool in self.pools:
            if 0 < pool.capacity_bytes < pool.used_bytes:
                self._fit_quota(pool, 0, OVERDRAFT_BLOCKS_PER_CALL)

    # --- space -----------------------------------------------------------------------------

    def _evictable(self, slot: int) -> bool:
        return not self._pins[slot]

    def _fit_quota(self, pool: Pool, size_bytes: int, blocks_max: int) -> bool:
        """Evict inside a pool until `size_bytes` more fit into its quota."""
        limit = pool.capacity_bytes - size_bytes
        if limit < 0:
            return False
        if pool.used_bytes > limit and self._retired:
            self._free_retired(blocks_max)
        while pool.used_bytes > limit:
            victim = self._evict_from(pool) if blocks_max else None
            if victim is None:
                return False
            blocks_max -= 1
            self._discard(victim, "blocks_evicted_pool")
        return True

    def _make_room(self, page_count: int) -> int:
        """An allocated extent where no hole was large enough, or END."""
        if page_count > self.allocator.page_count:
            return END
        allocate = self.allocator.allocate
        if self._retired and self._free_retired(RETIRED_BLOCKS_PER_CALL + page_count):
            slot = allocate(page_count)
            if slot != END:
                return slot

        def smaller(slot: int) -> bool:
            # Evicting a block of the wanted size would make room alone, without the victim:
            # that is for the policy to choose.
            return not self._pins[slot] and self.allocator.pages(slot) < page_count

        for left in reversed(range(VICTIMS_PER_RESERVATION_MAX)):
            victim = self._next_victim()
            if victim is None:
                return END
            hole = self._discard(victim, "blocks_evicted_arena")
            window = self.allocator.window(hole, page_count, smaller if left else self._evictable)
            if window is None:
                continue
            for slot in window:
                self._dequeue(slot)
                self._discard(slot, "blocks_evicted_window")
            slot = allocate(page_count)
            assert slot != END
            return slot
        return END

    def _next_victim(self) -> int | None:
        """The next candidate of the pool whose next candidate is oldest."""
        pools = [pool for pool in self.pools if len(pool.policy)]
        if len(pools) > 1:
            pools.sort(key=lambda pool: pool.policy.next_tick())
        looked_max = sum(self._in_vain.values()) + CANDIDATES_MAX
        for pool in pools:
            victim = self._evict_from(pool)
            if victim is not None:
                return victim
            if sum(self._in_vain.values()) >= looked_max:
                break
        return None

    def _evict_from(self, pool: Pool) -> int | None:
        count, looked = len(pool.policy), self._in_vain.get(pool.name, 0)
        if looked >= count:
            return None
        victim = pool.policy.evict(self._evictable)
        if victim is None:
            self._in_vain[pool.name] = looked + min(count, CANDIDATES_MAX)
        return victim

    def _discard(self, slot: int, counter: str) -> int:
        """Free an unpinned block that the policy let go; returns the hole it left."""
        namespace = self.pools.by_number[self.index.namespace_numbers[slot]]
        namespace.slots.remove(slot)
        self.index.queued[slot] = 0
        vacant = self.index.withdraw(slot)
        assert vacant
        self.counters["blocks_evicted"] += 1
        self.counters[counter] += 1
        return self._free(slot)

    def _withdraw(self, slot: int) -> None:
        self._dequeue(slot)
        if self.index.withdraw(slot):
            self._free(slot)

    def _dequeue(self, slot: int) -> None:
        if self.index.queued[slot]:
            self.index.queued[slot] = 0
            namespace = self.pools.by_number[self.index.namespace_numbers[slot]]
            namespace.pool.policy.remove(slot)

    def _free(self, slot: int) -> int:
        self.index.vacate(slot)
        return self._free_extent(slot)

    def _free_extent(self, slot: int) -> int:
        namespace = self.pools.by_number[self.index.namespace_numbers[slot]]
        namespace.occupied_count -= 1
        namespace.pool.used_bytes -= namespace.slot_bytes
        return self.allocator.free(slot)

    def _free_retired(self, blocks_max: int) -> int:
        """Withdraw blocks of retired generations; returns how many."""
        count = 0
        for _ in range(len(self._retired)):
            namespace = self._retired[0]
            taken = namespace.slots.take(blocks_max - count)
            for slot in taken:
                self._withdraw(slot)
            count += len(taken)
            if namespace.slots:
                break
            self._retired.popleft()
            if namespace.occupied_count:
                self._retired.append(namespace)  # pinned blocks: look again later
            else:
                self.pools.forget(namespace)
        self.counters["blocks_retired"] += count
        return count


def checksums_of(block: memoryview, namespace: Namespace, key: bytes) -> bytes:
    """Packed layer checksums of the bytes of a block."""
    seed = block_seed(namespace.id, key)
    offsets = namespace.geometry.offsets
    return layer_checksums([block[a:b] for a, b in pairwise(offsets)], seed)
