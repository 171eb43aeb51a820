"""Blocks in the memory of an agent: found by key, kept by pins and leases, else evicted.

Thread rule: one owner, the loop's thread; every method returns at once, and the work of one
reservation is bounded. Nothing is copied: whoever fills a block writes into its `view`.

The life of a block, whose layers come one by one and from several sides::

    reserve ──▶ pin ──▶ (layers: coming ──▶ arrived) ──▶ unpin ──▶ idle ──▶ evicted
                 └──▶ drop: nobody finds it any more ──▶ its memory is free at the last unpin

Rules for whoever fills one. A layer that is ready is never written again, nor is one that is
`coming` by anybody but the one who set its bit; and whoever set it has the block pinned
until it is cleared. Whoever clears it without an arrival notifies, or drops the block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kvstore.allocator import END, PAGES_MAX, ExtentAllocator
from kvstore.checksum import CHECKSUM_BYTES, block_seed, layer_checksum
from kvstore.errors import LocalProtocolError
from kvstore_client.namespaces import Namespace

# The unit of memory, so that blocks can be shared with other processes page by page.
PAGE_BYTES = 4096
# Victims taken one after the other for a reservation that does not fit. The first makes room
# unless what lies around it is kept; beyond this many most of the pool is, and the block goes
# without.
VICTIMS_PER_RESERVATION_MAX = 64

# What a block has for a view when its memory is no longer its own.
_NO_VIEW = memoryview(bytearray())


def layer_mask(first: int, last: int) -> int:
    """The bits of layers `[first, last)`."""
    return (1 << last) - (1 << first)


class HeldBlock:
    """One block, or as many of its layers as are here.

    Attributes:
        namespace, key: What it is.
        view: Its memory, all layers, writable; empty once the memory is free again.
        ready: Bits of the layers that are here.
        verified: Of those that are ready, the ones that were compared with their checksums, or
            that an engine of this node has made.
        coming: Bits of the layers that somebody fills.
        known: Bits of the layers whose checksums are known; those that are ready are.
        checksums: 8 bytes a layer, meaningful for those that are known.
        pins: Who uses the memory; it stays as long as there is one. See `BlockPool.pin`.
        leases: Who wants the block to be found here later. See `BlockPool.lease`.
        dropped: Whether nobody finds it any more.
        watchers: Told after each change of `ready` or `known`, when layers were verified or come no
            longer, and when the block was dropped; by whom it is that watches.
        extent: Number of its extent in the pool.
        size_bytes: What it takes of the pool: whole pages.
    """

    __slots__ = (
        "checksums",
        "coming",
        "dropped",
        "extent",
        "key",
        "known",
        "leases",
        "namespace",
        "pins",
        "ready",
        "size_bytes",
        "verified",
        "view",
        "watchers",
    )

    def __init__(
        self, namespace: Namespace, key: bytes, view: memoryview, extent: int, size_bytes: int
    ) -> None:
        self.namespace = namespace
        self.key = key
        self.view = view
        self.extent = extent
        self.size_bytes = size_bytes
        self.ready = 0
        self.verified = 0
        self.coming = 0
        self.known = 0
        self.checksums = bytearray(namespace.geometry.layer_count * CHECKSUM_BYTES)
        self.pins = 0
        self.leases = 0
        self.dropped = False
        self.watchers: dict[object, Callable[[HeldBlock], None]] = {}

    def __repr__(self) -> str:
        return f"<HeldBlock {self.key.hex()[:12]} of {self.namespace!r}>"

    @property
    def complete(self) -> bool:
        """Whether all layers are here."""
        return self.has(0, self.namespace.geometry.layer_count)

    def has(self, first: int, last: int) -> bool:
        """Whether layers `[first, last)` are here."""
        wanted = layer_mask(first, last)
        return self.ready & wanted == wanted

    def knows(self, first: int, last: int) -> bool:
        """Whether the checksums of layers `[first, last)` are known."""
        wanted = layer_mask(first, last)
        return self.known & wanted == wanted

    def missing(self, first: int, last: int) -> int:
        """Bits of those of the layers `[first, last)` that are not here and not coming."""
        return layer_mask(first, last) & ~(self.ready | self.coming)

    def layers(self, first: int, last: int) -> memoryview:
        """The memory of layers `[first, last)`."""
        offsets = self.namespace.geometry.offsets
        return self.view[offsets[first] : offsets[last]]

    def checksums_of(self, first: int, last: int) -> bytes:
        """The packed checksums of layers `[first, last)`, which are known."""
        return bytes(self.checksums[first * CHECKSUM_BYTES : last * CHECKSUM_BYTES])

    def learn(self, layer_first: int, checksums: bytes) -> None:
        """The checksums of the layers from `layer_first` on, of as many as there are."""
        count = len(checksums) // CHECKSUM_BYTES
        at = layer_first * CHECKSUM_BYTES
        assert len(checksums) % CHECKSUM_BYTES == 0
        assert at + len(checksums) <= len(self.checksums)
        self.checksums[at : at + len(checksums)] = checksums
        self.known |= layer_mask(layer_first, layer_first + count)
        self.notify()

    def arrived(self, first: int, last: int) -> None:
        """Layers `[first, last)` are in their memory, and their checksums are known."""
        assert self.knows(first, last)
        layers = layer_mask(first, last)
        self.ready |= layers
        self.coming &= ~layers
        self.notify()

    def verify(self, layer: int) -> bool:
        """Compare a layer that is here with its checksum."""
        offsets = self.namespace.geometry.offsets
        view = self.view[offsets[layer] : offsets[layer + 1]]
        seed = block_seed(self.namespace.id, self.key)
        known = int.from_bytes(self.checksums_of(layer, layer + 1), "little")
        good = layer_checksum(view, seed, layer) == known
        self.verified |= good << layer
        return good

    def notify(self) -> None:
        """Tell all who watch."""
        for tell in list(self.watchers.values()):
            tell(self)


class BlockPool:
    """All blocks in one memory; the least recently used go where room is needed.

    Ownership: borrows `memory` for its whole life. Watchers and callbacks may call any
    method, also from within one.

    Args:
        memory: Writable, touched before; whole pages of it are used.

    Attributes:
        total_bytes: Size of the pool.
        leased_bytes: Of that what is leased.
        pinned_count: Blocks that are pinned, dropped ones included.
        evicted_count: Blocks that had to go for others, since the beginning.
        on_room: Told when a reservation that has failed may succeed now. It is told from
            within `unpin`, `unlease` and `drop`, once for all that have failed before.
        on_idle: Told when a block may be evicted from now on, from within what has made it so.
        on_dropped: Told of each block that `drop` is called for, once; not of evictions, since
            nobody has asked to keep those.
    """

    def __init__(self, memory: memoryview) -> None:
        page_count = len(memory) // PAGE_BYTES
        if not 0 < page_count <= PAGES_MAX:
            raise LocalProtocolError(
                f"a pool of {len(memory)} bytes: must be {PAGE_BYTES} to {PAGES_MAX * PAGE_BYTES}"
            )
        self.total_bytes = page_count * PAGE_BYTES
        self.leased_bytes = 0
        self.pinned_count = 0
        self.evicted_count = 0
        self.on_room: Callable[[], None] = _nothing
        self.on_idle: Callable[[], None] = _nothing
        self.on_dropped: Callable[[HeldBlock], None] = _nothing
        self._memory = memory
        self._allocator = ExtentAllocator(page_count)
        self._blocks: dict[tuple[bytes, bytes], HeldBlock] = {}
        # Those too that were dropped and are pinned.
        self._by_extent: dict[int, HeldBlock] = {}
        # Blocks that may be evicted, the least recently used first.
        self._idle: OrderedDict[HeldBlock, None] = OrderedDict()
        self._idle_bytes = 0
        self._room_wanted = False

    @property
    def block_count(self) -> int:
        """Blocks that can be found."""
        return len(self._blocks)

    @property
    def free_bytes(self) -> int:
        """Bytes that hold nothing."""
        return self._allocator.free_pages * PAGE_BYTES

    @property
    def reclaimable_bytes(self) -> int:
        """Bytes that hold nothing, or what could be evicted now."""
        return self.free_bytes + self._idle_bytes

    def size_of(self, namespace: Namespace) -> int:
        """What a block of a namespace takes: whole pages."""
        return -(-namespace.geometry.block_bytes // PAGE_BYTES) * PAGE_BYTES

    def find(self, namespace_id: bytes, key: bytes) -> HeldBlock | None:
        """The block of a key, whatever of it is here."""
        return self._blocks.get((namespace_id, key))

    def reserve(self, namespace: Namespace, key: bytes) -> HeldBlock | None:
        """The block of a key: the one that is there, or a new one without any layer.

        Whoever wants it to stay pins or leases it before anything else is reserved.

        Returns:
            None when there is no room: what would have to go is pinned or leased.
        """
        known = self._blocks.get((namespace.id, key))
        if known is not None:
            return known
        evicted: list[HeldBlock] = []
        block = self._make(namespace, key, evicted)
        if block is not None:
            self._blocks[namespace.id, key] = block
        _tell(evicted)
        if block is None:
            return None
        # No news of room: whoever waits for some would take this block for it.
        self._unpin(block)
        return None if block.dropped else block

    def reserve_apart(self, namespace: Namespace, key: bytes) -> HeldBlock | None:
        """Memory for bytes of a block that must not, or not yet, be found under its key.

        Returns:
            A block that is dropped from the beginning and has one pin, with which its memory
            goes; None when there is no room.
        """
        evicted: list[HeldBlock] = []
        block = self._make(namespace, key, evicted)
        if block is not None:
            block.dropped = True
        _tell(evicted)
        return block

    def pin(self, block: HeldBlock) -> None:
        """Keep the memory of a block as it is until `unpin`."""
        if not block.pins:
            assert not block.dropped, f"{block!r}: its memory is not its own any more"
            self.pinned_count += 1
            if not block.leases:
                self._set_busy(block)
        block.pins += 1

    def unpin(self, block: HeldBlock) -> None:
        """Take back one pin; with the last one the block counts as used just now."""
        if self._unpin(block):
            self._tell_room()

    def lease(self, block: HeldBlock) -> None:
        """Do not evict a block until `unlease`; it may still be dropped."""
        if not (block.leases or block.dropped):
            self.leased_bytes += block.size_bytes
            if not block.pins:
                self._set_busy(block)
        block.leases += 1

    def unlease(self, block: HeldBlock) -> None:
        """Take back one lease; harmless for a block that was dropped meanwhile."""
        assert block.leases > 0
        block.leases -= 1
        if block.leases or block.dropped:
            return
        self.leased_bytes -= block.size_bytes
        if not block.pins:
            self._set_idle(block)
            self._tell_room()

    def touch(self, block: HeldBlock) -> None:
        """A block was used."""
        if block in self._idle:
            self._idle.move_to_end(block)

    def drop(self, block: HeldBlock) -> None:
        """Let nobody find a block any more; its memory is free at the last pin.

        Harmless when called again. The next `reserve` of its key makes a new one.
        """
        if block.dropped:
            return
        if block.leases:
            self.leased_bytes -= block.size_bytes
        elif not block.pins:
            self._set_busy(block)
        freed = self._forget(block) != END
        self.on_dropped(block)
        block.notify()
        if freed:
            self._tell_room()

    def evict_idle(self) -> None:
        """Evict all blocks that nobody keeps, needed or not."""
        evicted: list[HeldBlock] = []
        for block in list(self._idle):
            self._evict(block, evicted)
        _tell(evicted)
        if evicted:
            self._tell_room()

    def check(self) -> None:
        """Assert that the books agree with the blocks."""
        self._allocator.check()
        allocated = [n for n in self._allocator.extents() if not self._allocator.is_free(n)]
        assert sorted(self._by_extent) == sorted(allocated)
        blocks = list(self._by_extent.values())
        for block in blocks:
            block_bytes = block.namespace.geometry.block_bytes
            assert len(block.view) == block_bytes
            assert block.size_bytes == -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
            assert block.size_bytes == self._allocator.pages(block.extent) * PAGE_BYTES
            assert not block.ready & block.coming, f"{block!r}: what is here comes again"
            assert not block.verified & ~block.ready, f"{block!r}: verified and not here"
            assert not block.ready & ~block.known, f"{block!r}: a layer without its checksum"
            assert block.pins or not block.coming, f"{block!r}: filled and not pinned"
            assert block.pins or not block.dropped
            assert block.pins >= 0
            assert block.leases >= 0
        found = [block for block in blocks if not block.dropped]
        assert len(found) == len(self._blocks)
        for block in found:
            assert self._blocks[block.namespace.id, block.key] is block
        idle = [block for block in found if not (block.pins or block.leases)]
        assert set(self._idle) == set(idle)
        assert self._idle_bytes == sum(block.size_bytes for block in idle)
        assert self.leased_bytes == sum(block.size_bytes for block in found if block.leases)
        assert self.pinned_count == sum(block.pins > 0 for block in blocks)

    def _unpin(self, block: HeldBlock) -> bool:
        """Take back one pin; whether there is more room now."""
        assert block.pins > 0
        block.pins -= 1
        if block.pins:
            return False
        self.pinned_count -= 1
        if block.dropped:
            self._free(block)
        elif block.leases:
            return False
        else:
            self._set_idle(block)
        return True

    # --- space -----------------------------------------------------------------------------

    def _make(self, namespace: Namespace, key: bytes, evicted: list[HeldBlock]) -> HeldBlock | None:
        """A block in new memory, with one pin; those that went for it are to be told, when
        the books agree again."""
        size_bytes = self.size_of(namespace)
        page_count = size_bytes // PAGE_BYTES
        extent = self._allocator.allocate(page_count)
        if extent == END:
            extent = self._make_room(page_count, evicted)
            if extent == END:
                self._room_wanted = True
                return None
        start = self._allocator.starts[extent] * PAGE_BYTES
        view = self._memory[start : start + namespace.geometry.block_bytes]
        block = HeldBlock(namespace, key, view, extent, size_bytes)
        block.pins = 1
        self.pinned_count += 1
        self._by_extent[extent] = block
        return block

    def _make_room(self, page_count: int, evicted: list[HeldBlock]) -> int:
        """An allocated extent where no hole was large enough, or END."""
        if page_count * PAGE_BYTES > self.reclaimable_bytes:
            return END
        allocator, by_extent, idle = self._allocator, self._by_extent, self._idle

        def evictable(extent: int) -> bool:
            return by_extent[extent] in idle

        def smaller(extent: int) -> bool:
            # Evicting a block of the wanted size would make room alone, without the victim:
            # that is for the order of use to choose.
            return evictable(extent) and allocator.pages(extent) < page_count

        for left in reversed(range(VICTIMS_PER_RESERVATION_MAX)):
            if not idle:
                return END
            hole = self._evict(next(iter(idle)), evicted)
            window = allocator.window(hole, page_count, smaller if left else evictable)
            if window is None:
                continue
            for extent in window:
                self._evict(by_extent[extent], evicted)
            extent = allocator.allocate(page_count)
            assert extent != END
            return extent
        return END

    def _evict(self, block: HeldBlock, evicted: list[HeldBlock]) -> int:
        """Free an idle block; the hole that it leaves."""
        self._set_busy(block)
        self.evicted_count += 1
        evicted.append(block)
        return self._forget(block)

    def _forget(self, block: HeldBlock) -> int:
        """Nobody finds a block any more; the hole that it leaves, or END while it is pinned."""
        block.dropped = True
        del self._blocks[block.namespace.id, block.key]
        return END if block.pins else self._free(block)

    def _free(self, block: HeldBlock) -> int:
        del self._by_extent[block.extent]
        block.view = _NO_VIEW
        return self._allocator.free(block.extent)

    def _set_idle(self, block: HeldBlock) -> None:
        self._idle[block] = None
        self._idle_bytes += block.size_bytes
        if not block.ready:
            self._idle.move_to_end(block, last=False)  # nobody misses it
        self.on_idle()

    def _set_busy(self, block: HeldBlock) -> None:
        del self._idle[block]
        self._idle_bytes -= block.size_bytes

    def _tell_room(self) -> None:
        if self._room_wanted:
            self._room_wanted = False
            self.on_room()


def _tell(blocks: list[HeldBlock]) -> None:
    for block in blocks:
        block.notify()


def _nothing(block: HeldBlock | None = None) -> None:
    pass


__all__ = ["PAGE_BYTES", "BlockPool", "HeldBlock", "layer_mask"]
