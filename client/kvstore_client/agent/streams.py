"""A fetch being answered out of the agent's memory, while blocks are still on their way into it.

::

    key ──▶ taken up ──▶ its layers arrive ──▶ pieces are given out ──▶ sent: let go of
            │ pinned                           │ as layers and their checksums are there
            │ asked for, where nobody has      └ blocks in any order, groups of one in order
            └ as far as the window allows

The window bounds what one fetch has taken up and its reader has not taken yet: a slow reader
slows storage down and fills no memory. A block is pinned all that time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from kvstore.blocksource import CHECKSUM_BYTES_PER_CHUNK_MAX, Chunk, FetchStream
from kvstore.checksum import CHECKSUM_BYTES
from kvstore.layout import PieceMap
from kvstore.messages import FetchOutcome, FetchSource, ServedBy, Tier
from kvstore_client.agent.fills import Fill, FillKind, Fills
from kvstore_client.agent.memory import HeldBlock, layer_mask
from kvstore_client.agent.rooms import WatchedPool
from kvstore_client.jobs import ANY_ROUTE, Route
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import PlacedKeys, block_heads, extents_of

# Half of what one sendmsg takes (IOV_MAX is 1,024): a chunk and its frame header always fit.
BUFFERS_PER_CHUNK_MAX = 512
# What a fetch may have taken up and not sent. Four requests of a relay, so that storage is
# never idle; 100 ms at 1.3 Gbit/s. Two blocks at least, or one would wait for the other.
WINDOW_BYTES = 16 * 1024 * 1024
# Of a fetch for an engine of this node. Its blocks are spread over several paths, each of
# which has 100 ms of its rate under way.
OWN_WINDOW_BYTES = 64 * 1024 * 1024
# No fetch takes more of the pool, so that it always holds those of some.
POOL_SHARE_MAX = 4
# A relay asks storage for this much at a time: requests are cheap at that size, and what is
# cancelled is soon gone.
RUN_BYTES = 4 * 1024 * 1024
# What goes by several paths is planned as a whole, as far as the window goes.
OWN_RUN_BYTES = OWN_WINDOW_BYTES
# For blocks of another fetch to go. Longer than a usual frame takes; and who asked can still
# go another way within the time that a request has.
ROOM_WAIT_S = 0.1
# Others have failed to bring a block, or it was dropped: how often it is asked for.
TRIES_MAX = 3

_PENDING = 0xFF


def _nothing() -> None:
    """Called where there is nothing to do."""


class FetchTerms(NamedTuple):
    """How a fetch is to be answered.

    Attributes:
        source: Where blocks that are not here may come from.
        deadline_at: Loop time until which the asker waits.
        wait_until: With source=peer: loop time until which blocks may still appear.
        route: How what is missing travels.
        peer_route: Which way is tried before that; None for none.
        retain: Told of blocks that are taken up, to keep them; None if they need not be kept.
    """

    source: FetchSource
    deadline_at: float
    wait_until: float = 0.0
    route: Route = ANY_ROUTE
    peer_route: Route | None = None
    retain: Callable[[Sequence[HeldBlock]], None] | None = None


class _Source(NamedTuple):
    """What follows from the source of a fetch.

    Attributes:
        kind: What blocks that are missing are filled by.
        joined: The fills of others that it may wait for, up to this kind: no two nodes ever
            wait for each other.
        window_bytes, run_bytes: See `WINDOW_BYTES` and `RUN_BYTES`.
        counter: What counts the bytes that are given out.
    """

    kind: FillKind | None
    joined: FillKind
    window_bytes: int
    run_bytes: int
    counter: str


_SOURCES = {
    FetchSource.ANY: _Source(
        FillKind.ANY, FillKind.PEER, OWN_WINDOW_BYTES, OWN_RUN_BYTES, "own_bytes"
    ),
    FetchSource.RELAY: _Source(
        FillKind.STORAGE, FillKind.STORAGE, WINDOW_BYTES, RUN_BYTES, "relay_bytes_out"
    ),
    FetchSource.PEER: _Source(None, FillKind.ANY, WINDOW_BYTES, RUN_BYTES, "peer_bytes_out"),
}


class PoolFetch(FetchStream):
    """A fetch out of a pool that is filled meanwhile.

    Args:
        pool: Where blocks are and come to.
        fills: Who brings what is missing.
        chain: The keys, and where their blocks lie.
        pieces: How the request cuts them.
        terms: How it is to be answered.
        counters: Where to count.
    """

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
        self.on_ready = _nothing
        self._pool = pool
        self._fills = fills
        self._namespace = namespace
        self._keys = keys = chain.wanted
        self._heads = block_heads(chain)
        self._pieces = pieces
        self._terms = terms
        self._source = source = _SOURCES[terms.source]
        self._counters = counters
        count = len(keys)
        offsets = pieces.geometry.offsets
        self._from, self._until = offsets[pieces.layer_first], offsets[pieces.layer_last]
        self._block_bytes = pieces.geometry.block_bytes
        self._window_bytes = max(
            2 * self._block_bytes, min(source.window_bytes, pool.total_bytes // POOL_SHARE_MAX)
        )
        self._mask = layer_mask(pieces.layer_first, pieces.layer_last)
        self._group_masks = [layer_mask(first, last) for first, last, _, _ in pieces.group_ranges]
        first, last, _, _ = pieces.group_ranges[0]  # the widest
        checksums_max = CHECKSUM_BYTES_PER_CHUNK_MAX // ((last - first) * CHECKSUM_BYTES)
        self._buffers_max = min(BUFFERS_PER_CHUNK_MAX, checksums_max)
        self._outcomes = bytearray([_PENDING]) * count
        self._tiers = bytearray(count)
        self._ways = bytearray(count)
        self._left_count = count
        self._queued_bytes = pieces.span_bytes * count
        # The first key that was not taken up yet, and what was: the block of each index, and
        # the indices of each block that is watched (a key may occur twice).
        self._next = 0
        self._blocks: list[HeldBlock | None] = [None] * count
        self._indices: dict[HeldBlock, tuple[int, ...]] = {}
        self._twins = False  # whether a key occurs twice
        self._tell = self._moved  # one object for all watchers
        self._charged = bytearray(count)  # counts for the window
        self._used_bytes = 0
        # Of each block the next byte to give out: a group, and where in it.
        self._groups = [0] * count
        self._offsets = [0] * count
        # Indices of blocks of which something can be given out, and whether one is there.
        self._ready: deque[int] = deque()
        self._is_ready = bytearray(count)
        self._failed: list[int] = []  # what the peer has yet to hear of
        self._tries = bytearray(count)
        self._again: list[int] = []
        self._awaited: dict[bytes, tuple[int, ...]] = {}
        # Fills whose last word tells which way a block came, by index.
        self._told_by: dict[int, Fill] = {}
        self._asked: set[Fill] = set()
        self._room_timer: Callable[[], None] | None = None
        self._wait_timer: Callable[[], None] | None = None
        self._without_room = False
        self._admitting = self._admit_again = False
        self._stopped = False
        self._admit()
        if self._source.kind is None and self._left_count:
            self._wait_timer = fills.call_at(terms.wait_until, self._waited)

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
            return Chunk(0, 0, [], 0, b"", _nothing, self._take_failed())
        return chunk

    def stop(self, outcome: FetchOutcome) -> None:
        self._stopped = True
        self._queued_bytes = 0
        self._next = len(self._keys)
        self._ready.clear()
        self._failed.clear()
        self._outcomes = self._outcomes.replace(bytes([_PENDING]), bytes([outcome]))
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
        pieces = self._pieces
        sums = slice(pieces.layer_first * CHECKSUM_BYTES, pieces.layer_last * CHECKSUM_BYTES)
        count_max = min(bytes_max // (end - start), self._buffers_max)
        first = index = ready[0]
        buffers: list[memoryview] = []
        checksums: list[bytearray] = []
        given: list[HeldBlock] = []
        while ready and ready[0] == index and len(buffers) < count_max:
            block = blocks[index]
            if block is None or offsets[index] or block.ready & block.known & mask != mask:
                break
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
        cost_bytes = sum(self._charged[first:index]) * self._block_bytes
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
        release = partial(self._released, given, cost_bytes)
        return Chunk(
            piece, offset, buffers, length, b"".join(checksums), release, self._take_failed()
        )

    def _here(self, block: HeldBlock, group: int, at: int) -> int:
        """Up to which byte of a piece it can be given out now, from byte `at` on."""
        mask = self._group_masks[group]
        first, last, start, size = self._pieces.group_ranges[group]
        if not at and block.known & mask != mask:
            return 0  # its first byte brings all its checksums along
        if block.ready & mask == mask:
            return size
        offsets = self._pieces.geometry.offsets
        layer = bisect_right(offsets, start + at) - 1 if at else first
        rest = block.ready >> layer
        count = (~rest & (rest + 1)).bit_length() - 1  # of ones at its end
        return offsets[min(layer + count, last)] - start

    def _done(self, index: int, block: HeldBlock) -> None:
        """All of a block was given out; the last chunk of it has its pin."""
        self._outcomes[index] = FetchOutcome.HIT
        self._left_count -= 1
        self._blocks[index] = None
        self._unwatch(index, block)

    def _released(self, given: list[HeldBlock], cost_bytes: int) -> None:
        """The transport has let go of a chunk."""
        unpin = self._pool.unpin
        for block in given:
            unpin(block)
        if cost_bytes:
            self._used_bytes -= cost_bytes
            self._admit()

    def _take_failed(self) -> tuple[int, ...]:
        if not self._failed:
            return ()
        failed = tuple(self._failed)
        self._failed.clear()
        return failed

    # --- taking up -------------------------------------------------------------------------

    def _admit(self) -> None:
        """Take up more blocks, as far as window and pool allow."""
        if self._next == len(self._keys):
            return
        self._admit_again = True
        if self._admitting:
            return  # whoever is at it looks once more
        self._admitting = True
        try:
            while self._admit_again:
                self._admit_again = False
                self._admit_run()
        finally:
            self._admitting = False

    def _admit_run(self) -> None:
        window_bytes, block_bytes, count = self._window_bytes, self._block_bytes, len(self._keys)
        room_bytes = window_bytes - self._used_bytes
        run_bytes = min(self._source.run_bytes, window_bytes // 2)
        if self._used_bytes and room_bytes < min(run_bytes, (count - self._next) * block_bytes):
            return  # soon there is room for a request of a good size
        taken: list[int] = []
        while self._next < count and self._used_bytes + block_bytes <= window_bytes:
            index = self._next
            if not self._find(index):
                break
            self._next += 1
            if self._blocks[index] is not None:
                taken.append(index)
        self._fill(taken)

    def _find(self, index: int) -> bool:
        """Find or make the block of a key; whether to go on with the next."""
        pool, namespace, key = self._pool, self._namespace, self._keys[index]
        if self._source.kind is None or self._without_room:
            block = pool.find(namespace.id, key)
            if block is None and self._source.kind is None:
                self._await(index)
                return True
        else:
            block = pool.reserve(namespace, key)
            if block is None:
                self._wait_for_room()
                return False
            if self._room_timer is not None:
                self._cancel_room_timer()
        if block is None:
            self._counters["relay_no_room"] += 1
            self._fail(index, FetchOutcome.UNAVAILABLE)
            return True
        self._take_up(index, block)
        return True

    def _take_up(self, index: int, block: HeldBlock) -> None:
        self._pool.pin(block)
        self._blocks[index] = block
        if block.ready & self._mask == self._mask:
            self._pool.touch(block)
            if not (self._tiers[index] or self._groups[index] or self._offsets[index]):
                self._tiers[index], self._ways[index] = Tier.ARENA, ServedBy.HELD
            self._charge(index, not block.leases)
            self._make_ready(index)
            return
        # What others wait for at our node is kept by whoever brings it.
        self._charge(index, self._source.kind is not None)
        if block in self._indices:
            self._twins = True
            self._indices[block] = (*self._indices[block], index)
        else:
            self._indices[block] = (index,)
        block.watchers[self] = self._tell
        self._tiers[index] = Tier.RELAY

    def _charge(self, index: int, charged: bool) -> None:
        if charged:
            self._charged[index] = 1
            self._used_bytes += self._block_bytes

    def _fill(self, taken: Sequence[int]) -> None:
        """Ask for what is missing of blocks that were taken up, and keep them if need be."""
        wanted: list[tuple[int, int]] = []
        kept: list[HeldBlock] = []
        source, mask = self._source, self._mask
        for index in taken:
            block = self._blocks[index]
            if block is None:
                continue
            kept.append(block)
            if self._is_ready[index]:
                continue
            if block.coming & mask and not self._join(index, block):
                continue
            missing = mask & ~(block.ready | block.coming)
            if missing and source.kind is not None:
                self._tries[index] += 1
                wanted.append((index, missing))
            else:
                self._look(index, block)
        if kept and self._terms.retain is not None:
            self._terms.retain(kept)
        if wanted:
            self._ask(wanted)

    def _join(self, index: int, block: HeldBlock) -> bool:
        """Wait for what others bring; False if that may not be, and the block has failed."""
        found = self._fills.of(block)
        if any(fill.kind > self._source.joined for fill in found):
            if self._source.kind is not None:
                self._fail(index, FetchOutcome.UNAVAILABLE)
                return False
            return True  # by the time that it is here
        for fill in found:
            fill.askers.add(self)
            self._asked.add(fill)
            self._note_way(index, fill)
        if found:
            self._counters["relay_joined"] += 1
        return True

    def _ask(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Begin fills of runs of blocks that miss the same layers."""
        terms, source = self._terms, self._source
        assert source.kind is not None
        at = 0
        while at < len(wanted):
            missing = wanted[at][1]
            by_peer = terms.peer_route is not None and self._tries[wanted[at][0]] == 1
            kind = FillKind.PEER if by_peer else source.kind
            route = terms.peer_route if by_peer and terms.peer_route is not None else terms.route
            first = (missing & -missing).bit_length() - 1
            last = first + (~(missing >> first) & ((missing >> first) + 1)).bit_length() - 1
            rest = missing & ~layer_mask(first, last)
            offsets = self._pieces.geometry.offsets
            count_max = max(1, source.run_bytes // (offsets[last] - offsets[first]))
            run: list[int] = []
            while at < len(wanted) and len(run) < count_max and wanted[at][1] == missing:
                if (by_peer and self._tries[wanted[at][0]] > 1) or self._twin(wanted[at][0], run):
                    break
                run.append(wanted[at][0])
                at += 1
            if not run:  # the same block once more: it is on its way by now
                self._look_at(wanted[at][0])
                at += 1
                continue
            self._begin_fill(run, kind, route, first, last)
            if rest:
                self._ask([(index, rest) for index in run])

    def _twin(self, index: int, run: Sequence[int]) -> bool:
        """Whether an earlier index of a run has the same block."""
        block = self._blocks[index]
        if block is None:
            return True
        if not self._twins:
            return False
        return len(self._indices.get(block, ())) > 1 and any(
            self._blocks[other] is block for other in run
        )

    def _begin_fill(
        self, run: Sequence[int], kind: FillKind, route: Route, first: int, last: int
    ) -> None:
        blocks = [block for index in run if (block := self._blocks[index]) is not None]
        if self._twins and not all(block.missing(first, last) for block in blocks):
            # A twin of one that was asked for a moment ago.
            for index in run:
                self._look_at(index)
            return
        keys = [self._keys[index] for index in run]
        chain = PlacedKeys(keys, extents_of(self._heads, run))
        fill = self._fills.begin(
            self._namespace,
            chain,
            blocks,
            range(first, last),
            min(last - first, self._group_layers),
            kind,
            route,
            self._terms.deadline_at,
            self,
        )
        if self._stopped:
            return
        self._asked.add(fill)
        if kind is not FillKind.ANY and not self._told_by:
            way = kind.way
            for index in run:
                self._ways[index] = way
            return
        for index in run:
            if self._blocks[index] is not None:
                self._note_way(index, fill)

    @property
    def _group_layers(self) -> int:
        first, last, _, _ = self._pieces.group_ranges[0]
        return last - first if self._pieces.group_count > 1 else 0

    def _note_way(self, index: int, fill: Fill) -> None:
        self._told_by.pop(index, None)
        if fill.kind is FillKind.ANY:
            self._told_by[index] = fill
        else:
            self._ways[index] = fill.kind.way

    # --- what happens to blocks ------------------------------------------------------------

    def _moved(self, block: HeldBlock) -> None:
        """Layers of a watched block are here, or it was dropped."""
        mask, is_ready = self._mask, self._is_ready
        for index in self._indices.get(block, ()):
            if is_ready[index]:
                continue
            if block.ready & block.known & mask == mask:
                self._make_ready(index)
            else:
                self._look(index, block)

    def _make_ready(self, index: int) -> None:
        self._is_ready[index] = 1
        self._ready.append(index)
        if len(self._ready) == 1:
            self.on_ready()

    def _look_at(self, index: int) -> None:
        block = self._blocks[index]
        if block is not None and not self._is_ready[index]:
            self._look(index, block)

    def _look(self, index: int, block: HeldBlock) -> None:
        """Whether something of a block can be given out, or nobody brings it any more."""
        at = self._offsets[index]
        if self._here(block, self._groups[index], at) > at:
            self._make_ready(index)
        elif self._mask & ~(block.ready | block.coming):
            self._lost(index, block)

    def _unready(self, index: int, block: HeldBlock) -> None:
        """Nothing more of a block can be given out at present."""
        self._ready.popleft()
        self._is_ready[index] = 0
        self._look(index, block)

    def _lost(self, index: int, block: HeldBlock) -> None:
        """Nobody brings what is missing of a block."""
        if self._source.kind is not None:
            self._retry(index)
        elif self._fills.now() >= self._terms.wait_until:
            self._fail(index, FetchOutcome.MISS)
        elif block.dropped:
            if self._groups[index] or self._offsets[index]:
                self._fail(index, FetchOutcome.MISS)
            else:
                self._let_go(index, block)
                self._await(index)

    def fill_failed(self, fill: Fill, block: HeldBlock, outcome: FetchOutcome) -> None:
        """A fill that this fetch waits for does not bring a block."""
        # Whoever began it had less time than we have, or is gone, or asked elsewhere.
        late = outcome in (FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE)
        again = fill.owner is not self and (late or self._terms.peer_route is not None)
        if fill.kind is FillKind.PEER and self._source.kind is FillKind.ANY:
            again = True  # the peer has it not: now from storage
        for index in self._indices.get(block, ()):
            if again:
                self._retry(index)
            elif self._source.kind is not None:
                self._fail(index, outcome)

    def fill_over(self) -> None:
        """A fill has ended that this fetch waited for."""
        if not self._left_count:
            self.on_ready()

    def _retry(self, index: int) -> None:
        """Ask for a block again, together with others that have failed in this turn."""
        if self._tries[index] >= TRIES_MAX:
            self._fail(index, FetchOutcome.UNAVAILABLE)
            return
        if not self._again:
            self._fills.call_soon(self._retry_all)
        if index not in self._again:
            self._again.append(index)

    def _retry_all(self) -> None:
        again, self._again = self._again, []
        taken: list[int] = []
        for index in again:
            block = self._blocks[index]
            if block is None or self._outcomes[index] != _PENDING or self._is_ready[index]:
                continue
            if block.dropped:
                if self._groups[index] or self._offsets[index]:
                    self._fail(index, FetchOutcome.UNAVAILABLE)  # another version of it may come
                    continue
                self._let_go(index, block)
                renewed = self._pool.reserve(self._namespace, self._keys[index])
                if renewed is None:
                    self._fail(index, FetchOutcome.UNAVAILABLE)
                    continue
                self._take_up(index, renewed)
            self._tries[index] = max(1, self._tries[index])  # not by the path peer again
            taken.append(index)
        self._fill(taken)

    def _fail(self, index: int, outcome: int) -> None:
        """A block ends, and it is no hit."""
        if self._outcomes[index] != _PENDING:
            return
        self._outcomes[index] = outcome
        self._left_count -= 1
        if outcome == FetchOutcome.MISS:
            self._failed.append(index)  # a reader takes this news for a miss
        _, _, start, _ = self._pieces.group_ranges[self._groups[index]]
        self._queued_bytes -= self._until - start - self._offsets[index]
        self._told_by.pop(index, None)
        block = self._blocks[index]
        if block is not None:
            if self._is_ready[index]:
                self._ready.remove(index)
                self._is_ready[index] = 0
            self._let_go(index, block)
        if not self._left_count:
            self._end()
        self.on_ready()
        self._admit()

    def _let_go(self, index: int, block: HeldBlock) -> None:
        """A block is not wanted any more; chunks that are out have pins of their own."""
        self._blocks[index] = None
        self._unwatch(index, block)
        if self._charged[index]:
            self._charged[index] = 0
            self._used_bytes -= self._block_bytes
        self._pool.unpin(block)

    def _unwatch(self, index: int, block: HeldBlock) -> None:
        indices = self._indices.pop(block, ())
        if len(indices) > 1:
            self._indices[block] = tuple(other for other in indices if other != index)
        elif indices:
            block.watchers.pop(self, None)

    def _end(self) -> None:
        """Nothing is waited for any more."""
        self._cancel_room_timer()
        if self._wait_timer is not None:
            self._wait_timer()
            self._wait_timer = None
        self._pool.forget(self)
        for key in self._awaited:
            self._pool.expect_no_more(self._namespace.id, key, self)
        self._awaited.clear()
        left = self._asked
        if not self._stopped:
            left = left - set(self._told_by.values())  # their last words are waited for
        self._asked = self._asked - left
        self._fills.leave(self, list(left))

    # --- waiting for room, and for blocks to appear ----------------------------------------

    def _wait_for_room(self) -> None:
        """The pool has none. Blocks of our own that are sent make some; where there are none,
        those of others have a little time."""
        self._pool.wait_for_room(self, self._admit)
        if not self._used_bytes and self._room_timer is None:
            at = self._fills.now() + ROOM_WAIT_S
            self._room_timer = self._fills.call_at(at, self._do_without_room)

    def _do_without_room(self) -> None:
        self._room_timer = None
        self._without_room = True
        self._admit()

    def _cancel_room_timer(self) -> None:
        if self._room_timer is not None:
            self._room_timer()
            self._room_timer = None

    def _await(self, index: int) -> None:
        """With source=peer: a block is not here yet."""
        if self._fills.now() >= self._terms.wait_until:
            self._fail(index, FetchOutcome.MISS)
            return
        key = self._keys[index]
        if key not in self._awaited:
            self._pool.expect(self._namespace.id, key, self, self._appeared)
        self._awaited[key] = (*self._awaited.get(key, ()), index)

    def _appeared(self, block: HeldBlock) -> None:
        """A block that was waited for begins to come."""
        for index in self._awaited.pop(block.key, ()):
            self._take_up(index, block)

    def _waited(self) -> None:
        """With source=peer: what nobody has begun to bring by now is a miss."""
        self._wait_timer = None
        for indices in list(self._awaited.values()):
            for index in indices:
                self._fail(index, FetchOutcome.MISS)
        for index, block in enumerate(self._blocks):
            if block is not None and not self._is_ready[index]:
                self._look(index, block)
