"""Blocks that one fetch has taken up: pinned, asked for as the window allows, watched until here.

What of them is given out, and how, is for `kvstore_client.agent.streams` to say.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import islice

from kvstore.errors import LimitExceeded
from kvstore.layout import PieceMap
from kvstore.messages import REASONS_MAX, FetchOutcome, ServedBy, Tier
from kvstore_client.agent.fills import Fill, FillKind, Fills
from kvstore_client.agent.holding import BlockHolding
from kvstore_client.agent.memory import HeldBlock, layer_mask
from kvstore_client.agent.rooms import WatchedPool
from kvstore_client.agent.terms import FetchTerms
from kvstore_client.jobs import Route
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import PlacedKeys, block_heads, extents_of

# For blocks of another fetch to go. Longer than a usual frame takes; and who asked can still
# go another way within the time that a request has.
ROOM_WAIT_S = 0.1
# Others have failed to bring a block, or it was dropped: how often it is asked for.
TRIES_MAX = 3
# Blocks that are taken up, or asked for again, in one turn of the loop: about 2 ms.
BLOCKS_PER_TURN_MAX = 256
# What is hashed in one turn of the loop of blocks that nobody has verified: 120 us.
CHECKED_BYTES_PER_TURN_MAX = 4 * 1024 * 1024

PENDING = 0xFF


def nothing() -> None:
    """Called where there is nothing to do."""


class BlockIntake(BlockHolding):
    """What a fetch takes up of a pool that is filled meanwhile.

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
        keys = chain.wanted
        super().__init__(pool, pieces, terms, len(keys))
        self.on_ready = nothing
        self._fills = fills
        self._namespace = namespace
        self._keys = keys
        self._heads = block_heads(chain)
        count = len(keys)
        self._counters = counters
        self._until = pieces.geometry.offsets[pieces.layer_last]
        self._outcomes = bytearray([PENDING]) * count
        self._tiers = bytearray(count)
        self._ways = bytearray(count)
        self._left_count = count
        self._queued_bytes = pieces.span_bytes * count
        self._next = 0  # the first key that was not taken up yet
        self._unchecked: dict[int, None] = {}
        # Of each block the next byte to give out: a group, and where in it.
        self._groups = [0] * count
        self._offsets = [0] * count
        self._failed: list[int] = []  # what the peer has yet to hear of
        self._tries = bytearray(count)
        self._again: dict[int, None] = {}
        self._postponed: deque[int] = deque()  # likewise, as soon as the window has room
        self._damaged = bytearray(count)  # came damaged, some layers aside: not by relays again
        self._awaited: dict[bytes, tuple[int, ...]] = {}
        # Fills whose last word tells which way a block came, by index.
        self._told_by: dict[int, Fill] = {}
        self._asked: set[Fill] = set()
        self._room_timer: Callable[[], None] | None = None
        self._wait_timer: Callable[[], None] | None = None
        self._without_room = False
        self._errors: list[Exception] = []
        self._plan = ""  # of the first fill that had one
        self._wait_over = fills.now() >= terms.wait_until
        self._admitting = self._admit_again = self._admit_later = False
        self._stopped = False
        self._admit()
        if self._source.kind is None and self._left_count and not self._wait_over:
            self._wait_timer = fills.call_at(terms.wait_until, self._waited)

    # --- taking up -------------------------------------------------------------------------

    def _admit(self) -> None:
        """Take up more blocks, as far as window and pool allow."""
        for _ in range(min(len(self._postponed), self._room_count)):
            self._retry_soon(self._postponed.popleft())
        if self._next == len(self._keys) or self._admit_later:
            return
        self._admit_again = True
        if self._admitting:
            return  # whoever is at it looks once more
        self._admitting = True
        try:
            while self._admit_again and not self._admit_later:
                self._admit_again = False
                self._admit_run()
        finally:
            self._admitting = False

    def _admit_next(self) -> None:
        self._admit_later = False
        self._admit()

    def _admit_run(self) -> None:
        window_bytes, block_bytes, count = self._window_bytes, self._block_bytes, len(self._keys)
        room_bytes = window_bytes - self._used_bytes
        run_bytes = min(self._source.run_bytes, window_bytes // 2)
        if self._used_bytes and room_bytes < min(run_bytes, (count - self._next) * block_bytes):
            return  # soon there is room for a request of a good size
        taken: list[int] = []
        until = min(count, self._next + BLOCKS_PER_TURN_MAX)
        while self._next < count and self._used_bytes + block_bytes <= window_bytes:
            index = self._next
            if index == until:
                self._admit_later = True
                self._fills.call_soon(self._admit_next)
                break
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
            self._note([LimitExceeded("no room in the agent's memory for a block")])
            self._fail(index, FetchOutcome.UNAVAILABLE)
            return True
        self._take_up(index, block)
        return True

    def _take_up(self, index: int, block: HeldBlock) -> None:
        self._blocks[index] = block
        mask = self._mask
        if block.ready & mask == mask:
            self._pool.touch(block)
            if not (self._tiers[index] or self._groups[index] or self._offsets[index]):
                self._tiers[index], self._ways[index] = Tier.ARENA, ServedBy.HELD
            charged = not block.leases and self._used_bytes < self._full_bytes
            usable = (block.verified | self._trusted) & mask == mask
            if not (charged and usable):
                self._watch(index, block)
            self._keep(index, block, charged)
            if usable:
                self._make_ready(index)
            else:
                self._check_soon(index)
            return
        self._watch(index, block)
        # What others wait for at our node is kept by whoever brings it.
        self._keep(index, block, self._source.kind is not None)
        self._tiers[index] = Tier.RELAY

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
            if block.ready & mask == mask:
                continue
            if block.coming & mask and not self._join(index, block):
                continue
            missing = mask & ~(block.ready | block.coming)
            if missing and source.kind is not None:
                self._tries[index] += 1
                wanted.append((index, missing))
            else:
                self._look_at(index)
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
            index, missing = wanted[at]
            damaged = self._damaged[index]
            by_peer = terms.peer_route is not None and self._tries[index] == 1
            kind = FillKind.PEER if by_peer else source.kind
            route = terms.peer_route if by_peer and terms.peer_route is not None else terms.route
            if damaged:
                route = route._replace(direct_only=True)
            first = (missing & -missing).bit_length() - 1
            last = first + (~(missing >> first) & ((missing >> first) + 1)).bit_length() - 1
            rest = missing & ~layer_mask(first, last)
            offsets = self._pieces.geometry.offsets
            count_max = max(1, source.run_bytes // (offsets[last] - offsets[first]))
            run: list[int] = []
            while at < len(wanted) and len(run) < count_max and wanted[at][1] == missing:
                index = wanted[at][0]
                if by_peer and self._tries[index] > 1:
                    break
                if self._damaged[index] != damaged or self._twin(index, run):
                    break
                run.append(index)
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
        mask = layer_mask(first, last)
        if any((block.ready | block.coming) & mask for block in blocks):
            # A twin of one that was asked for a moment ago. Or another fetch has asked, for whom
            # there was room when this one let go of something.
            for index, block in zip(run, blocks, strict=True):
                if any(self in fill.askers for fill in self._fills.of(block)):
                    self._look_at(index)
                else:
                    self._retry_soon(index)
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
            self._deadline_at(kind),
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

    def _deadline_at(self, kind: FillKind) -> float:
        """A peer that does not answer leaves storage half of the time, beside what it may wait."""
        terms = self._terms
        if kind is not FillKind.PEER or self._source.kind is not FillKind.ANY:
            return terms.deadline_at
        begin = min(max(terms.wait_until, self._fills.now()), terms.deadline_at)
        return (begin + terms.deadline_at) / 2

    def _note_way(self, index: int, fill: Fill) -> None:
        self._told_by.pop(index, None)
        if fill.kind is FillKind.ANY:
            self._told_by[index] = fill
        else:
            self._ways[index] = fill.kind.way

    # --- what happens to blocks ------------------------------------------------------------

    def _moved(self, block: HeldBlock) -> None:
        """Layers of a watched block are here or verified, or it was dropped."""
        mask, is_ready = self._mask, self._is_ready
        for index in self._indices.get(block, ()):
            if self._blocks[index] is not block or self._stopped:
                continue  # let go of on account of another one, or about to be
            if block.dropped or is_ready[index]:
                if self._is_lost(index, block):
                    self._gone(index, block)
                elif not is_ready[index]:
                    self._look(index, block)
                elif mask & ~(block.ready | block.coming):
                    self._lost(index, block)
            elif self._usable(block) & block.known & mask == mask:
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
        at, mask = self._offsets[index], self._mask
        if self._is_lost(index, block):
            self._gone(index, block)
        elif self._here(block, self._groups[index], at) > at:
            self._make_ready(index)
        elif mask & ~(block.ready | block.coming):
            self._lost(index, block)
        elif mask & block.ready & ~self._usable(block):
            self._check_soon(index)

    def _unready(self, index: int, block: HeldBlock) -> None:
        """Nothing more of a block can be given out at present."""
        self._ready.popleft()
        self._is_ready[index] = 0
        self._look(index, block)

    def _lost(self, index: int, block: HeldBlock) -> None:
        """Nobody brings what is missing of a block."""
        if self._source.kind is not None:
            self._retry(index)
        elif block.dropped:
            self._gone(index, block)
        elif self._wait_over:
            self._fail(index, FetchOutcome.MISS)

    def _gone(self, index: int, block: HeldBlock) -> None:
        """What a block was is gone for us: there may be another one under its key."""
        if self._source.kind is not None:
            if self._is_ready[index]:
                self._is_ready[index] = 0
                self._ready.remove(index)
            self._retry(index)
        elif self._groups[index] or self._offsets[index]:
            self._fail(index, FetchOutcome.MISS)
        else:
            self._let_go(index, block)
            renewed = self._pool.find(self._namespace.id, self._keys[index])
            if renewed is None:
                self._await(index)
            else:
                self._take_up(index, renewed)
                self._look_at(index)
            self._admit()

    # --- verifying what an engine of this node gets ------------------------------------------

    def _check_soon(self, index: int) -> None:
        """Layers of a block are here that nobody has verified: they came for others."""
        if not self._unchecked:
            self._fills.call_soon(self._check_some)
        self._unchecked[index] = None

    def _check_some(self) -> None:
        unchecked, left_bytes = self._unchecked, CHECKED_BYTES_PER_TURN_MAX
        while unchecked and left_bytes > 0:
            index = next(iter(unchecked))
            block = self._blocks[index]
            if block is not None and not block.dropped:
                layers = self._mask & block.ready & ~block.verified
                while layers and left_bytes > 0:
                    layer = (layers & -layers).bit_length() - 1
                    if not block.verify(layer):
                        self._counters["corrupt_blocks"] += 1
                        self._pool.drop(block)  # whoever watches it asks again
                        break
                    left_bytes -= self._pieces.geometry.layer_bytes[layer]
                    layers &= layers - 1
                else:
                    if layers:
                        break  # the rest of it in the next turn
                    block.notify()
            unchecked.pop(index, None)
        if unchecked:
            self._fills.call_soon(self._check_some)

    def fill_failed(self, fill: Fill, block: HeldBlock, outcome: FetchOutcome) -> None:
        """A fill that this fetch waits for does not bring a block."""
        self._note(fill.job.errors)
        # Whoever began it had less time than we have, or is gone, or asked elsewhere.
        late = outcome in (FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE)
        again = fill.owner is not self and (late or self._terms.peer_route is not None)
        if fill.kind is FillKind.PEER and self._source.kind is FillKind.ANY:
            again = True  # the peer has it not: now from storage
        damaged = fill.verified and outcome is FetchOutcome.CORRUPT and block.ready != 0
        for index in self._indices.get(block, ()):
            if block.ready & self._mask == self._mask:
                continue  # what does not come is of others
            if again:
                self._retry(index)
            elif damaged and not self._damaged[index]:
                self._damaged[index] = 1  # the first layers were given out: the rest direct
                self._retry(index)
            elif self._source.kind is not None:
                self._fail(index, outcome)

    def fill_over(self, fill: Fill) -> None:
        """A fill has ended that this fetch waited for, or tells of more ways."""
        self._note(fill.job.errors)
        self._plan = self._plan or fill.job.plan
        if not self._left_count and not self._stopped:
            self._leave_told()
            self.on_ready()

    def _leave_told(self) -> None:
        """Leave the fills but those that have yet to say by which way a block came."""
        told_by = self._told_by
        for index, fill in list(told_by.items()):
            way = fill.way(self._keys[index])
            if way or fill.over or self._stopped:
                self._ways[index] = way
                del told_by[index]
        waiting = set(told_by.values())
        left, self._asked = self._asked - waiting, waiting
        self._fills.leave(self, list(left))

    def plan(self) -> str:
        return self._plan

    def _note(self, errors: Sequence[Exception]) -> None:
        """Keep the first of what went wrong for the asker."""
        if len(self._errors) < REASONS_MAX:
            # Nearly always the same ones: they are told of with each block of a fill.
            found = [error for error in errors if error not in self._errors]
            known = set(map(str, self._errors)) if found else set()
            self._errors += [error for error in found if str(error) not in known]

    def _retry(self, index: int) -> None:
        """Ask for a block again, together with others that have failed in this turn."""
        if self._tries[index] >= TRIES_MAX:
            self._fail(index, FetchOutcome.UNAVAILABLE)
            return
        self._retry_soon(index)

    def _retry_soon(self, index: int) -> None:
        if not self._again:
            self._fills.call_soon(self._retry_all)
        self._again[index] = None

    def _retry_all(self) -> None:
        again = list(islice(self._again, BLOCKS_PER_TURN_MAX))
        for index in again:
            del self._again[index]
        if self._again:
            self._fills.call_soon(self._retry_all)
        self._admitting = True  # what a block lets go of is for its successor
        try:
            self._fill([index for index in again if self._renew(index)])
        finally:
            self._admitting = False
        self._admit()

    def _renew(self, index: int) -> bool:
        """Have a block to ask for again; False if that need not be or there is none."""
        block = self._blocks[index]
        if block is None:
            return False
        if block.ready & self._mask == self._mask and not self._is_lost(index, block):
            return False
        if block.dropped:
            if self._groups[index] or self._offsets[index]:
                self._fail(index, FetchOutcome.UNAVAILABLE)  # another version of it may come
                return False
            if not self._charged[index] and not self._room_count:
                self._postponed.append(index)
                return False
            self._let_go(index, block)
            renewed = self._pool.reserve(self._namespace, self._keys[index])
            if renewed is None:
                self._fail(index, FetchOutcome.UNAVAILABLE)
                return False
            self._take_up(index, renewed)
        self._tries[index] = max(1, self._tries[index])  # not by the path peer again
        return True

    def _fail(self, index: int, outcome: int) -> None:
        """A block ends, and it is no hit."""
        if self._outcomes[index] != PENDING:
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
            self._let_go(index, block)
        if not self._left_count:
            self._end()
        self.on_ready()
        self._admit()

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
        self._leave_told()

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
        if self._wait_over:
            self._fail(index, FetchOutcome.MISS)
            return
        key = self._keys[index]
        if key not in self._awaited:
            self._pool.expect(self._namespace.id, key, self, self._appeared)
        self._awaited[key] = (*self._awaited.get(key, ()), index)

    def _appeared(self, block: HeldBlock) -> None:
        """A block that was waited for begins to come."""
        for index in self._awaited.pop(block.key, ()):
            if not self._stopped:  # what it lets go of makes room for this one
                self._take_up(index, block)

    def _waited(self) -> None:
        """With source=peer: what nobody has begun to bring by now is a miss."""
        self._wait_timer = None
        self._wait_over = True
        for indices in list(self._awaited.values()):
            for index in indices:
                self._fail(index, FetchOutcome.MISS)
        for index, block in enumerate(self._blocks):
            if block is not None and not self._is_ready[index]:
                self._look(index, block)
