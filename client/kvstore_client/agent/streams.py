"""A fetch being answered out of the agent's memory, while blocks are still on their way into it.

::

    key ──▶ taken up ──▶ its layers arrive ──▶ pieces are given out ──▶ sent: let go of
            │ pinned                           │ as layers and their checksums are there
            │ asked for, where nobody has      └ blocks in any order, groups of one in order
            └ as far as the window allows

The window bounds what one fetch has taken up and its reader has not taken yet: a slow reader
slows storage down and fills no memory. A block is pinned all that time.

What is given out to be looked at where it lies (`locate`) stays pinned too, but is not under way:
how much of that there may be is for whoever gives it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.blocksource import CHECKSUM_BYTES_PER_CHUNK_MAX, Chunk
from kvstore.checksum import CHECKSUM_BYTES
from kvstore.layout import PieceMap
from kvstore.messages import FetchOutcome, ServedBy, Tier
from kvstore_client.agent.fills import Fills
from kvstore_client.agent.intake import PENDING, BlockIntake, nothing
from kvstore_client.agent.memory import HeldBlock
from kvstore_client.agent.rooms import WatchedPool
from kvstore_client.agent.terms import FetchTerms
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import PlacedKeys

# Half of what one sendmsg takes (IOV_MAX is 1,024): a chunk and its frame header always fit.
BUFFERS_PER_CHUNK_MAX = 512


class PoolFetch(BlockIntake):
    """A fetch out of a pool that is filled meanwhile; arguments as of `BlockIntake`."""

    def __init__(
        self,
        pool: WatchedPool,
        fills: Fills,
        namespace: Namespace,
        chain: PlacedKeys,
        pieces: PieceMap,
        terms: FetchTerms,
        counters: Counter[str],
    ) -> None:
        super().__init__(pool, fills, namespace, chain, pieces, terms, counters)
        offsets = pieces.geometry.offsets
        self._from = offsets[pieces.layer_first]
        first, last, _, _ = pieces.group_ranges[0]  # the widest
        checksums_max = CHECKSUM_BYTES_PER_CHUNK_MAX // ((last - first) * CHECKSUM_BYTES)
        self._buffers_max = min(BUFFERS_PER_CHUNK_MAX, checksums_max)

    # --- FetchStream -----------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        if self._left_count:
            return False
        # The last word of what brought the blocks comes right behind them.
        return self._stopped or all(fill.over for fill in self._told_by.values())

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def outcomes(self) -> bytes:
        return bytes(self._outcomes)

    def errors(self) -> Sequence[Exception]:
        return self._errors

    def tiers(self) -> bytes:
        tiers = self._tiers
        for index, outcome in enumerate(self._outcomes):
            if outcome != FetchOutcome.HIT:
                tiers[index] = Tier.NONE
        return bytes(tiers)

    def served_by(self) -> bytes:
        ways = self._ways
        for index, fill in self._told_by.items():
            ways[index] = fill.way(self._keys[index])
        for index, outcome in enumerate(self._outcomes):
            if outcome != FetchOutcome.HIT:
                ways[index] = ServedBy.UNKNOWN
        return bytes(ways)

    def next_chunk(self, bytes_max: int) -> Chunk | None:
        chunk = None
        if self._ready:
            if self._pieces.group_count == 1 and self._pieces.span_bytes <= bytes_max:
                chunk = self._whole_blocks(bytes_max)
            chunk = chunk or self._parts(bytes_max)
        if chunk is None and self._failed and not self.finished:
            return Chunk(0, 0, [], 0, b"", nothing, self._take_failed())
        return chunk

    def stop(self, outcome: FetchOutcome) -> None:
        self._stopped = True
        self._queued_bytes = 0
        self._next = len(self._keys)
        self._ready.clear()
        self._is_ready = bytearray(len(self._keys))
        self._failed.clear()
        self._outcomes = self._outcomes.replace(bytes([PENDING]), bytes([outcome]))
        self._left_count = 0
        for index, block in enumerate(self._blocks):
            if block is not None:
                self._let_go(index, block)
        self._end()

    # --- giving out ------------------------------------------------------------------------

    def _whole_blocks(self, bytes_max: int) -> Chunk | None:
        """A run of blocks that are here, each one piece that fits: the hot path."""
        ready, blocks, mask = self._ready, self._blocks, self._mask
        start, end, offsets = self._from, self._until, self._offsets
        pieces, charged, trusted = self._pieces, self._charged, self._trusted
        sums = slice(pieces.layer_first * CHECKSUM_BYTES, pieces.layer_last * CHECKSUM_BYTES)
        count_max = min(bytes_max // (end - start), self._buffers_max)
        first = index = ready[0]
        buffers: list[memoryview] = []
        checksums: list[bytearray] = []
        given: list[HeldBlock] = []
        while ready and ready[0] == index and len(buffers) < count_max:
            block = blocks[index]
            if block is None or offsets[index]:
                break
            if block.ready & (block.verified | trusted) & block.known & mask != mask:
                break
            if not charged[index]:
                if block.dropped and not self._is_kept(index):
                    break
                self._pass_pin(index, block)
            ready.popleft()
            buffers.append(block.view[start:end])
            checksums.append(block.checksums[sums])
            given.append(block)
            blocks[index] = None
            if block in self._indices:
                self._unwatch(index, block)
            index += 1
        count = index - first
        if not count:
            return None
        self._outcomes[first:index] = bytes(count)  # FetchOutcome.HIT is 0
        self._is_ready[first:index] = bytes(count)
        self._left_count -= count
        length = count * (end - start)
        cost_bytes = sum(charged[first:index]) * self._block_bytes
        return self._chunk(first, 0, buffers, length, checksums, given, cost_bytes)

    def _parts(self, bytes_max: int) -> Chunk | None:
        """The next run of pieces that are large, or of some layers only, or not all here."""
        pieces, ready, pool = self._pieces, self._ready, self._pool
        first_piece = first_offset = length = cost_bytes = 0
        next_piece = -1
        buffers: list[memoryview] = []
        checksums: list[bytearray] = []
        given: list[HeldBlock] = []
        while ready and length < bytes_max and len(buffers) < self._buffers_max:
            index = ready[0]
            block, group, at = self._blocks[index], self._groups[index], self._offsets[index]
            assert block is not None, "what is let go of is not ready"
            if block.dropped and not self._is_kept(index):
                self._gone(index, block)
                continue
            first, last, start, size = pieces.group_ranges[group]
            here = self._here(block, group, at)
            if here <= at:
                self._unready(index, block)
                continue
            piece = group * pieces.key_count + index
            room = bytes_max - length
            if buffers and (piece != next_piece or at or (size > room and size <= bytes_max)):
                break  # a gap; or it fits whole into the next chunk
            if not buffers:
                first_piece, first_offset = piece, at
            if not at:
                checksums.append(block.checksums[first * CHECKSUM_BYTES : last * CHECKSUM_BYTES])
            take = min(here - at, room)
            buffers.append(block.view[start + at : start + at + take])
            given.append(block)
            length += take
            if at + take < size:
                self._offsets[index] = at + take
                pool.pin(block)
                break
            next_piece = piece + 1
            ready.popleft()
            self._is_ready[index] = 0
            if group + 1 < pieces.group_count:
                self._groups[index], self._offsets[index] = group + 1, 0
                pool.pin(block)
                self._look(index, block)
            else:
                cost_bytes += self._charged[index] * self._block_bytes
                self._pass_pin(index, block)
                self._done(index, block)
        if not buffers:
            return None
        return self._chunk(first_piece, first_offset, buffers, length, checksums, given, cost_bytes)

    def _chunk(
        self,
        piece: int,
        offset: int,
        buffers: list[memoryview],
        length: int,
        checksums: list[bytearray],
        given: list[HeldBlock],
        cost_bytes: int,
    ) -> Chunk:
        self._queued_bytes -= length
        self._counters[self._source.counter] += length
        if not self._left_count:
            self._end()
        if self.locate:
            # It is kept as long as its reader likes, who has a limit for that: not under way.
            release: Callable[[], None] = partial(_unpin, self._pool, given)
            if cost_bytes:
                self._fills.call_soon(partial(self._passed, cost_bytes))
        else:
            release = partial(self._released, given, cost_bytes)
        return Chunk(
            piece, offset, buffers, length, b"".join(checksums), release, self._take_failed()
        )

    def _done(self, index: int, block: HeldBlock) -> None:
        """All of a block was given out; the last chunk of it has its pin."""
        self._outcomes[index] = FetchOutcome.HIT
        self._left_count -= 1
        self._blocks[index] = None
        self._unwatch(index, block)

    def _released(self, given: list[HeldBlock], cost_bytes: int) -> None:
        """The transport has let go of a chunk."""
        _unpin(self._pool, given)
        if cost_bytes:
            self._passed(cost_bytes)

    def _passed(self, cost_bytes: int) -> None:
        """So much is not under way any more: the window has room for others."""
        self._used_bytes -= cost_bytes
        self._admit()

    def _take_failed(self) -> tuple[int, ...]:
        if not self._failed:
            return ()
        failed = tuple(self._failed)
        self._failed.clear()
        return failed


def _unpin(pool: WatchedPool, given: Sequence[HeldBlock]) -> None:
    for block in given:
        pool.unpin(block)
