"""Fetches and puts under way at the storage engine.

Nothing here copies or allocates memory of block size: a fetch gives out slices of the arena,
a put takes bytes into them. A block is pinned from the moment it is given out until the
transport has let go of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kvstore.blocksource import CHECKSUM_BYTES_PER_CHUNK_MAX, Chunk, FetchStream, PutStream
from kvstore.checksum import CHECKSUM_BYTES
from kvstore.layout import PieceMap
from kvstore.messages import FetchOutcome, PutOutcome, Tier
from kvstore_daemon.engine.pools import Namespace
from kvstore_daemon.engine.store import PAGE_BYTES, BlockStore, checksums_of

# Half of what one sendmsg takes (IOV_MAX is 1,024): a chunk and its frame header always fit.
BUFFERS_PER_CHUNK_MAX = 512
# Keys found missing in one go, about 0.1 ms; then others have their turn, and the peer hears
# which ones there are.
MISSES_PER_CHUNK_MAX = 512
# What a fetch in layer order may keep pinned between the groups of a block. Beyond that a
# block is looked up again for each group, so that slow readers cannot pin the whole arena.
HELD_BYTES_PER_FETCH_MAX = 64 * 1024 * 1024
# What a put may keep out of the eviction queues, to enter it there in reverse chain order.
HELD_BYTES_PER_PUT_MAX = 64 * 1024 * 1024

_PENDING = 0xFF
_TIERS = bytes(Tier.ARENA if outcome == FetchOutcome.HIT else Tier.NONE for outcome in range(256))
_PUT_COUNTERS = {
    PutOutcome.STORED: "put_stored",
    PutOutcome.EXISTS: "put_exists",
    PutOutcome.CONFLICT: "put_conflicts",
    PutOutcome.FULL: "put_full",
    PutOutcome.TIMEOUT: "put_stopped",
    PutOutcome.UNAVAILABLE: "put_stopped",
    PutOutcome.CORRUPT: "put_corrupt",
}


def _nothing() -> None:
    """Called where there is nothing to do."""


class ArenaFetch(FetchStream):
    """A fetch out of the arena. All that is found is ready at once.

    The bytes of one block always belong to one stored version of it: a block stays pinned
    from its first byte to its last, or what is found later is compared with what was found
    first.
    """

    def __init__(
        self, store: BlockStore, namespace: Namespace, keys: Sequence[bytes], pieces: PieceMap
    ) -> None:
        self.on_ready = _nothing
        self._store = store
        self._namespace = namespace
        self._keys = keys
        self._pieces = pieces
        self._outcomes = bytearray([_PENDING]) * len(keys)
        self._queued_bytes = pieces.span_bytes * len(keys)
        # The widest group comes first; all are as wide, the last perhaps less.
        first, last, _, _ = pieces.group_ranges[0]
        checksums_max = CHECKSUM_BYTES_PER_CHUNK_MAX // ((last - first) * CHECKSUM_BYTES)
        self._buffers_max = min(BUFFERS_PER_CHUNK_MAX, checksums_max)
        # The next byte to give out: a group, which of the blocks that are left, and where in
        # that piece. Inside of a piece its block is pinned by `_cut`.
        self._group = 0
        self._left: Sequence[int] = range(len(keys))
        self._position = 0
        self._offset = 0
        self._cut = 0
        # What the peer has yet to hear of; and whether some of `_left` have failed.
        self._failed: list[int] = []
        self._fewer = False
        # Between groups (order=layer): slots that stay pinned, and the versions of those
        # that do not, both by index of the key.
        self._held: dict[int, int] = {}
        self._versions: dict[int, bytes] = {}

    @property
    def finished(self) -> bool:
        return self._group == self._pieces.group_count

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def outcomes(self) -> bytes:
        return bytes(self._outcomes)

    def tiers(self) -> bytes:
        return bytes(self._outcomes.translate(_TIERS))

    def next_chunk(self, bytes_max: int) -> Chunk | None:
        pieces = self._pieces
        if self.finished:
            return None
        if not (self._group or self._offset) and not self._skip_missing():
            return self._news()
        if pieces.group_count == 1 and not self._offset and pieces.span_bytes <= bytes_max:
            return self._whole_blocks(bytes_max)
        return self._parts(bytes_max)

    def stop(self, outcome: FetchOutcome) -> None:
        self._group = self._pieces.group_count
        self._queued_bytes = 0
        self._outcomes = self._outcomes.replace(bytes([_PENDING]), bytes([outcome]))
        self._store.unpin([*self._held.values(), *([self._cut] if self._cut else [])])
        self._held.clear()
        self._cut = 0

    def _skip_missing(self) -> bool:
        """Fail the next keys, as far as they are missing; whether a stored one follows soon."""
        keys, find, first = self._keys, self._namespace.slots.find, self._position
        end = min(len(keys), first + MISSES_PER_CHUNK_MAX)
        found = first
        while found < end and not find(keys[found]):
            found += 1
        if found > first:
            self._fail(0, first, found - first)
            self._go_to(found)
        return found < end

    def _whole_blocks(self, bytes_max: int) -> Chunk:
        """A run of stored blocks, each one piece that fits: the hot path."""
        store, keys, known = self._store, self._keys, self._namespace.slots
        _, _, start, size = self._pieces.group_ranges[0]
        first = self._position
        pins, starts, arena = store.index.pins, store.allocator.starts, store.arena
        wanted = keys[first : first + min(bytes_max // size, self._buffers_max)]
        slots = known.run_of(wanted)
        buffers: list[memoryview] = []
        for slot in slots:
            pins[slot] += 1
            begin = starts[slot] * PAGE_BYTES + start
            buffers.append(arena[begin : begin + size])
        places: Sequence[int] = ()
        if self.locate:
            places = [starts[slot] * PAGE_BYTES + start for slot in slots]
        count = len(slots)
        after = first + count
        self._outcomes[first:after] = bytes(count)  # FetchOutcome.HIT is 0
        if count < len(wanted):
            self._fail(0, after)
            after += 1
        self._go_to(after)
        length = count * size
        self._queued_bytes -= length
        store.counters["fetch_hits"] += count
        store.counters["fetch_bytes"] += length
        store.touch(self._namespace, slots)
        return Chunk(
            first,
            0,
            buffers,
            length,
            self._checksums(0, slots),
            partial(store.unpin, slots),
            self._take_failed(),
            places,
        )

    def _parts(self, bytes_max: int) -> Chunk | None:
        """The next run of pieces that are large, or of some layers only."""
        store, pieces = self._store, self._pieces
        first_piece = first_offset = next_piece = -1
        slots: list[int] = []
        buffers: list[memoryview] = []
        begun: list[int] = []
        checksums: list[bytes] = []
        places: list[int] = []
        length = miss_count = 0
        while not self.finished and length < bytes_max and len(buffers) < self._buffers_max:
            group, index = self._group, self._left[self._position]
            piece = group * pieces.key_count + index
            _, _, start, size = pieces.group_ranges[group]
            left, room = size - self._offset, bytes_max - length
            if buffers and (piece != next_piece or (left > room and size <= bytes_max)):
                break  # a gap; or it fits whole into the next chunk
            slot = self._cut or self._find(group, index)
            if not slot:
                self._go_to(self._position + 1)
                miss_count += 1
                if buffers or miss_count == MISSES_PER_CHUNK_MAX:
                    break
                continue
            if not buffers:
                first_piece, first_offset = piece, self._offset
            if not self._offset:
                begun.append(slot)
                checksums.append(self._checksums(group, [slot]))
            take = min(left, room)
            begin = store.allocator.starts[slot] * PAGE_BYTES + start + self._offset
            buffers.append(store.arena[begin : begin + take])
            places.append(begin)
            store.pin(slot)
            slots.append(slot)
            length += take
            next_piece = piece + 1
            self._advance(group, index, slot, take, size)
        if not buffers:
            return self._news()
        self._queued_bytes -= length
        store.counters["fetch_bytes"] += length
        if first_piece < pieces.key_count:
            store.touch(self._namespace, begun)
        return Chunk(
            first_piece,
            first_offset,
            buffers,
            length,
            b"".join(checksums),
            partial(store.unpin, slots),
            self._take_failed(),
            places if self.locate else (),
        )

    def _news(self) -> Chunk | None:
        """No payload: a chunk that tells of misses only, or none at the end, for DONE tells all."""
        if self.finished:
            return None
        piece = self._group * self._pieces.key_count + self._left[self._position]
        return Chunk(piece, 0, [], 0, b"", _nothing, self._take_failed())

    def _advance(self, group: int, index: int, slot: int, take: int, size: int) -> None:
        """`take` bytes of a piece were given out; the chunk has a pin of its own."""
        store = self._store
        if self._offset + take < size:
            self._offset += take
            if not self._cut:
                store.pin(slot)
                self._cut = slot
            return
        self._offset = 0
        if self._cut:
            self._cut = 0
            store.unpin([slot])
        if group == self._pieces.group_count - 1:
            self._outcomes[index] = FetchOutcome.HIT
            store.counters["fetch_hits"] += 1
            if self._held.pop(index, 0):
                store.unpin([slot])
        self._go_to(self._position + 1)

    def _go_to(self, position: int) -> None:
        """Go on with another of the blocks that are left, or with the next group."""
        self._position = position
        if position < len(self._left):
            return
        self._position = 0
        self._group += 1
        if self._fewer:
            outcomes = self._outcomes
            self._left = [index for index in self._left if outcomes[index] == _PENDING]
            self._fewer = False
        if not self._left:
            self._group = self._pieces.group_count

    def _find(self, group: int, index: int) -> int:
        """The slot of a block of which a piece is due, 0 if the block is missing by now."""
        if index in self._held:
            return self._held[index]
        slot = self._namespace.slots.find(self._keys[index])
        if not slot:
            self._fail(group, index)
            return 0
        version = self._store.index.checksums[slot]
        assert version is not None
        if group:
            if self._versions[index] is not version:
                self._fail(group, index)
                return 0
        elif self._pieces.group_count > 1:
            slot_bytes = self._namespace.slot_bytes
            if (len(self._held) + 1) * slot_bytes <= HELD_BYTES_PER_FETCH_MAX:
                self._held[index] = slot
                self._store.pin(slot)
            else:
                self._versions[index] = version
        return slot

    def _fail(self, group: int, index: int, count: int = 1) -> None:
        """From a group on, some consecutive blocks are missing."""
        self._outcomes[index : index + count] = bytes([FetchOutcome.MISS]) * count
        self._failed.extend(range(index, index + count))
        self._fewer = True
        pieces = self._pieces
        end = pieces.geometry.offsets[pieces.layer_last]
        self._queued_bytes -= (end - pieces.group_ranges[group][2]) * count
        self._store.counters["fetch_misses"] += count

    def _take_failed(self) -> tuple[int, ...]:
        failed = tuple(self._failed)
        self._failed.clear()
        return failed

    def _checksums(self, group: int, slots: list[int]) -> bytes:
        """Checksums of the layers of a group, of several blocks."""
        first, last, _, _ = self._pieces.group_ranges[group]
        stored: list[bytes] = [self._store.index.checksums[slot] or b"" for slot in slots]
        if last - first < self._pieces.geometry.layer_count:
            part = slice(first * CHECKSUM_BYTES, last * CHECKSUM_BYTES)
            stored = [packed[part] for packed in stored]
        return b"".join(stored)


class ArenaPut(PutStream):
    """A put into the arena.

    A second put of a key that is still on its way gets a reservation of its own: waiting for
    the first would let a stalled client stall others. The first that is complete stays.
    """

    def __init__(
        self,
        store: BlockStore,
        namespace: Namespace,
        keys: Sequence[bytes],
        checksums: bytes,
        clock: Callable[[], float],
    ) -> None:
        self.on_decided = _nothing
        self._store = store
        self._clock = clock
        self._namespace = namespace
        self._keys = keys
        self._checksums = checksums
        self._outcomes = bytearray([_PENDING]) * len(keys)
        self._undecided_count = len(keys)
        self._next = 0
        # Slot and memory of the blocks that are on their way, by index.
        self._reserved: dict[int, tuple[int, memoryview]] = {}
        # Stored and not yet in the eviction queues: they enter in reverse chain order.
        self._stored: list[int] = []

    @property
    def finished(self) -> bool:
        return not self._undecided_count

    @property
    def reserved_bytes(self) -> int:
        return len(self._reserved) * self._namespace.geometry.block_bytes

    def outcomes(self) -> bytes:
        return bytes(self._outcomes)

    def reserve(self, bytes_max: int) -> list[int]:
        store, namespace = self._store, self._namespace
        store.expire(self._clock())
        block_bytes = namespace.geometry.block_bytes
        wanted: list[int] = []
        full = False
        while self._next < len(self._keys):
            index = self._next
            known = namespace.slots.find(self._keys[index])
            if known:
                self._decide(index, store.compare(known, self._announced(index)))
            elif namespace.retired:
                self._decide(index, PutOutcome.UNAVAILABLE)
            elif full:
                self._decide(index, PutOutcome.FULL)
            elif (len(wanted) + 1) * block_bytes > bytes_max:
                break
            elif slot := store.reserve(namespace):
                self._reserved[index] = (slot, store.view(slot))
                wanted.append(index)
            elif self._reserved:
                break  # when these have arrived there may be space again
            else:
                full = True
                continue
            self._next += 1
        self._enqueue_if_finished()
        return wanted

    def target(self, index: int) -> memoryview | None:
        reserved = self._reserved.get(index)
        return reserved[1] if reserved is not None else None

    def received(self, index: int) -> None:
        slot, target = self._reserved.pop(index)
        store, namespace, key = self._store, self._namespace, self._keys[index]
        store.counters["put_bytes"] += len(target)
        announced = self._announced(index)
        if checksums_of(target, namespace, key) != announced:
            store.abandon(slot)
            self._decide(index, PutOutcome.CORRUPT)
        else:
            outcome = store.publish(namespace, key, slot, announced)
            self._decide(index, outcome)
            if outcome is PutOutcome.STORED:
                self._stored.append(slot)
                if len(self._stored) * namespace.slot_bytes >= HELD_BYTES_PER_PUT_MAX:
                    self._enqueue()
        self._enqueue_if_finished()

    def stop(self, outcome: PutOutcome) -> None:
        for slot, _ in self._reserved.values():
            self._store.abandon(slot)
        self._reserved.clear()
        self._next = len(self._keys)
        for index, known in enumerate(self._outcomes):
            if known == _PENDING:
                self._decide(index, outcome)
        self._enqueue_if_finished()

    def _announced(self, index: int) -> bytes:
        size = self._namespace.geometry.layer_count * CHECKSUM_BYTES
        return self._checksums[index * size : index * size + size]

    def _decide(self, index: int, outcome: PutOutcome) -> None:
        self._outcomes[index] = outcome
        self._undecided_count -= 1
        self._store.counters[_PUT_COUNTERS[outcome]] += 1

    def _enqueue_if_finished(self) -> None:
        if not self._undecided_count:
            self._enqueue()

    def _enqueue(self) -> None:
        if self._stored:
            self._store.enqueue(self._namespace, self._stored)
            self._stored = []
