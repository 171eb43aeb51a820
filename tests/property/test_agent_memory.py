"""The agent's pool against a model: what is kept stays as it was written, and the books agree.

The model knows of each block who pins and leases it. The pool may have forgotten any block
that nobody keeps; one that is kept has the bytes that were written when it was made.
"""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from kvstore.layout import Layout
from kvstore_client import Namespace
from kvstore_client.agent.memory import PAGE_BYTES, BlockPool, HeldBlock, layer_mask
from tests.support.engine import content, key, layout

POOL_PAGES = 16
# From less than a page to almost a third of the pool; two of the same size.
LAYOUTS: list[Layout] = [
    layout(100),
    layout(PAGE_BYTES, 1),
    layout(PAGE_BYTES, PAGE_BYTES, model_id="other"),
    layout(2 * PAGE_BYTES, 3 * PAGE_BYTES - 7),
]
NAMESPACES = [Namespace("pool", one) for one in LAYOUTS]
numbers = st.integers(0, 9)
spaces = st.integers(0, len(NAMESPACES) - 1)


class PoolMachine(RuleBasedStateMachine):
    """Uses a pool as streams, fills and retentions do."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(memoryview(bytearray(POOL_PAGES * PAGE_BYTES)))
        self.pool.on_room = self._room
        self.wanted = False
        self.written: dict[HeldBlock, bytes] = {}
        self.pins: dict[HeldBlock, int] = {}
        self.leases: dict[HeldBlock, int] = {}
        self.dropped: list[HeldBlock] = []
        self.expected_drops: list[HeldBlock] = []
        self.pool.on_dropped = self.dropped.append
        self.versions = 0

    def _room(self) -> None:
        assert self.wanted, "nobody waits for room"
        self.wanted = False

    def _write(self, block: HeldBlock) -> None:
        self.versions += 1
        written = content(block.key + bytes([self.versions % 251]), len(block.view))
        block.view[:] = written
        self.written[block] = written

    def _kept(self, block: HeldBlock) -> bool:
        return bool(self.pins.get(block) or (self.leases.get(block) and not block.dropped))

    @rule(target=blocks, space=spaces, number=numbers)
    def reserve(self, space: int, number: int) -> object:
        namespace = NAMESPACES[space]
        known = self.pool.find(namespace.id, key(number))
        room, free = self.pool.reclaimable_bytes, self.pool.free_bytes
        block = self.pool.reserve(namespace, key(number))
        if known is not None:
            assert block is known
        if block is None:
            self.wanted = True
            # Too much is kept, so that nothing went; or all went, and what is free is in
            # fragments.
            too_much = namespace.geometry.block_bytes > room
            assert self.pool.free_bytes == (free if too_much else self.pool.reclaimable_bytes)
            return multiple()
        assert not block.dropped
        assert block is self.pool.find(namespace.id, key(number))
        if block not in self.written:
            assert block.size_bytes <= room
            self._write(block)
        return block

    @rule(target=blocks, space=spaces, number=numbers)
    def reserve_apart(self, space: int, number: int) -> object:
        namespace = NAMESPACES[space]
        known = self.pool.find(namespace.id, key(number))
        block = self.pool.reserve_apart(namespace, key(number))
        if block is None:
            self.wanted = True
            return multiple()
        assert self.pool.find(namespace.id, key(number)) in (known, None)
        self.pins[block] = 1
        self._write(block)
        return block

    @rule()
    def evict_idle(self) -> None:
        """All that nobody keeps goes, and nothing else."""
        kept = {block for block in self.written if self._kept(block)}
        self.pool.evict_idle()
        assert self.pool.reclaimable_bytes == self.pool.free_bytes
        assert all(block.view for block in kept)

    @rule(block=blocks)
    def pin(self, block: HeldBlock) -> None:
        if self.pins.get(block) or not block.dropped:
            self.pool.pin(block)
            self.pins[block] = self.pins.get(block, 0) + 1

    @rule(block=blocks)
    def unpin(self, block: HeldBlock) -> None:
        if self.pins.get(block):
            if self.pins[block] == 1 and block.coming:
                block.coming = 0
            self.pins[block] -= 1
            self.pool.unpin(block)

    @rule(block=blocks)
    def lease(self, block: HeldBlock) -> None:
        self.pool.lease(block)
        self.leases[block] = self.leases.get(block, 0) + 1

    @rule(block=blocks)
    def unlease(self, block: HeldBlock) -> None:
        if self.leases.get(block):
            self.leases[block] -= 1
            self.pool.unlease(block)

    @rule(block=blocks)
    def touch(self, block: HeldBlock) -> None:
        self.pool.touch(block)

    @rule(block=blocks)
    def drop(self, block: HeldBlock) -> None:
        if not block.dropped:
            self.expected_drops.append(block)
        self.pool.drop(block)
        assert block.dropped
        assert self.pool.find(block.namespace.id, block.key) is not block

    @rule(block=blocks, data=st.data())
    def layers_come(self, block: HeldBlock, data: st.DataObject) -> None:
        if not self.pins.get(block):
            return
        count = block.namespace.geometry.layer_count
        first = data.draw(st.integers(0, count - 1))
        last = data.draw(st.integers(first + 1, count))
        if block.missing(first, last) == layer_mask(first, last):
            block.coming |= layer_mask(first, last)
        elif block.coming & layer_mask(first, last) == layer_mask(first, last):
            block.learn(first, bytes(8 * (last - first)))
            block.arrived(first, last)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()
        assert self.dropped == self.expected_drops

    @invariant()
    def what_is_kept_is_as_it_was_written(self) -> None:
        kept_bytes = 0
        for block, written in self.written.items():
            if self._kept(block):
                kept_bytes += block.size_bytes
                assert block.view == written
                if not block.dropped:
                    assert self.pool.find(block.namespace.id, block.key) is block
            elif not block.dropped:
                assert block.view == written
        assert self.pool.total_bytes - self.pool.reclaimable_bytes == kept_bytes

    def teardown(self) -> None:
        for block, count in self.pins.items():
            for _ in range(count):
                block.coming = 0
                self.pool.unpin(block)
        for block, count in self.leases.items():
            for _ in range(count):
                self.pool.unlease(block)
        self.pool.check()
        assert self.pool.reclaimable_bytes == POOL_PAGES * PAGE_BYTES
        assert (self.pool.pinned_count, self.pool.leased_bytes) == (0, 0)


# Long enough for several blocks to be kept at once in a pool that is full.
PoolMachine.TestCase.settings = settings(stateful_step_count=60)
TestPool = pytest.mark.slow(PoolMachine.TestCase)
