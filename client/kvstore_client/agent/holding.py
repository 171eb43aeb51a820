"""Blocks that one fetch has in hand: pinned as far as its window goes, beyond that watched.

::

    charged    is to come for this fetch, or is here and nobody else keeps it: pinned
    spare      others keep it, by a lease or because they bring it: pinned while charged ones
               leave room in the window, since others may end before us
    watched    others keep it: if it goes before its turn it is looked for again

So a reader that takes nothing keeps no more of the pool than its window, whatever it asked for.
"""

from __future__ import annotations

import abc
from bisect import bisect_right
from collections import deque

from kvstore.blocksource import FetchStream
from kvstore.layout import PieceMap
from kvstore.messages import FetchSource
from kvstore_client.agent.memory import HeldBlock, layer_mask
from kvstore_client.agent.rooms import WatchedPool
from kvstore_client.agent.terms import SOURCES, FetchTerms

# No fetch takes more of the pool, so that it always holds those of some.
POOL_SHARE_MAX = 4


class BlockHolding(FetchStream):
    """What a fetch keeps of a pool.

    Args:
        pool: Where blocks are and come to.
        pieces: How the request cuts them.
        terms: How it is to be answered.
        count: How many blocks were asked for.
    """

    def __init__(self, pool: WatchedPool, pieces: PieceMap, terms: FetchTerms, count: int) -> None:
        self._pool = pool
        self._pieces = pieces
        self._terms = terms
        self._source = source = SOURCES[terms.source]
        self._block_bytes = pieces.geometry.block_bytes
        self._window_bytes = max(
            2 * self._block_bytes, min(source.window_bytes, pool.total_bytes // POOL_SHARE_MAX)
        )
        # With so much in use it has no room for one more block.
        self._full_bytes = self._window_bytes - self._block_bytes + 1
        self._mask = layer_mask(pieces.layer_first, pieces.layer_last)
        self._group_masks = [layer_mask(first, last) for first, last, _, _ in pieces.group_ranges]
        # What was taken up: the block of each index, and the indices of each block that is
        # watched (a key may occur twice).
        self._blocks: list[HeldBlock | None] = [None] * count
        self._indices: dict[HeldBlock, tuple[int, ...]] = {}
        self._twins = False  # whether a key occurs twice
        self._tell = self._moved  # one object for all watchers
        self._charged = bytearray(count)
        self._used_bytes = 0  # of the window, by those that are charged
        self._spare: dict[int, None] = {}
        # Layers that are given out without a look at them. For other nodes all are, since
        # whoever reads them verifies them.
        self._trusted = 0 if terms.source is FetchSource.ANY else -1
        # Indices of blocks of which something can be given out, and whether one is there.
        self._ready: deque[int] = deque()
        self._is_ready = bytearray(count)

    @abc.abstractmethod
    def _moved(self, block: HeldBlock) -> None:
        """Layers of a watched block are here or verified, or it was dropped."""

    @abc.abstractmethod
    def _gone(self, index: int, block: HeldBlock) -> None:
        """What a block was is gone for us."""

    @property
    def _room_count(self) -> int:
        """How many blocks more the window takes."""
        return max(0, self._window_bytes - self._used_bytes) // self._block_bytes

    # --- what can be given out -----------------------------------------------------------------

    def _here(self, block: HeldBlock, group: int, at: int) -> int:
        """Up to which byte of a piece it can be given out now, from byte `at` on."""
        mask, ready = self._group_masks[group], self._usable(block)
        first, last, start, size = self._pieces.group_ranges[group]
        if not at and block.known & mask != mask:
            return 0  # its first byte brings all its checksums along
        if ready & mask == mask:
            return size
        offsets = self._pieces.geometry.offsets
        layer = bisect_right(offsets, start + at) - 1 if at else first
        rest = ready >> layer
        count = (~rest & (rest + 1)).bit_length() - 1  # of ones at its end
        return offsets[min(layer + count, last)] - start

    def _usable(self, block: HeldBlock) -> int:
        """Bits of the layers that may be given out."""
        return block.ready & (block.verified | self._trusted)

    # --- pins and watches ----------------------------------------------------------------------

    def _watch(self, index: int, block: HeldBlock) -> None:
        if block in self._indices:
            self._twins = True
            self._indices[block] = (*self._indices[block], index)
        else:
            self._indices[block] = (index,)
        block.watchers[self] = self._tell

    def _keep(self, index: int, block: HeldBlock, charged: bool) -> None:
        """Pin a block: it counts for the window, or is spare and has what that leaves."""
        window_bytes, block_bytes, spare = self._window_bytes, self._block_bytes, self._spare
        if not charged:
            if self._used_bytes + (len(spare) + 1) * block_bytes <= window_bytes:
                self._pool.pin(block)
                spare[index] = None
            return
        self._pool.pin(block)
        self._charged[index] = 1
        self._used_bytes += block_bytes
        while spare and self._used_bytes + len(spare) * block_bytes > window_bytes:
            other, _ = spare.popitem()
            watched = self._blocks[other]
            assert watched is not None, "what is let go of is not spare"
            self._pool.unpin(watched)
            if watched.dropped and self._blocks[other] is watched:
                self._gone(other, watched)

    def _is_kept(self, index: int) -> bool:
        """Whether the memory of a block stays as it is, whatever others do."""
        return bool(self._charged[index]) or index in self._spare

    def _is_lost(self, index: int, block: HeldBlock) -> bool:
        """Whether a block was dropped and what it has is not for us any more."""
        if not block.dropped:
            return False
        return not self._is_kept(index) or bool(self._mask & block.ready & ~self._usable(block))

    def _pass_pin(self, index: int, block: HeldBlock) -> None:
        """The chunk that takes the last of a block has our pin, or one of its own."""
        if self._charged[index]:
            return
        if index in self._spare:
            del self._spare[index]
        else:
            self._pool.pin(block)

    def _let_go(self, index: int, block: HeldBlock) -> None:
        """A block is not wanted any more; chunks that are out have pins of their own."""
        self._blocks[index] = None
        self._unwatch(index, block)
        if self._is_ready[index]:
            self._is_ready[index] = 0
            self._ready.remove(index)
        if self._charged[index]:
            self._charged[index] = 0
            self._used_bytes -= self._block_bytes
            self._pool.unpin(block)
        elif index in self._spare:
            del self._spare[index]
            self._pool.unpin(block)

    def _unwatch(self, index: int, block: HeldBlock) -> None:
        indices = self._indices.pop(block, ())
        if indices == (index,):
            block.watchers.pop(self, None)
        elif rest := tuple(other for other in indices if other != index):
            self._indices[block] = rest


__all__ = ["BlockHolding"]
