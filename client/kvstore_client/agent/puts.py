"""Puts that an agent takes: what goes on to storage, and what it offers to peers.

Both are received straight into blocks of the pool, where peers find them as soon as they
are complete. On the loop's thread; never waits.

A block for storage::

    announced ──▶ received into the pool, verified ──▶ put to storage ──▶ storage's outcome
        └── it is in the pool already, with the same checksums ──▶─┘

Where the pool has other bytes under the key, or somebody else is filling the block, the
bytes are received *apart*: into memory that is free again once storage has them.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from kvstore.blocksource import PutStream
from kvstore.checksum import CHECKSUM_BYTES, block_seed, layer_checksums
from kvstore.messages import REASONS_MAX, AckLevel, PutOutcome, Retain
from kvstore.transfer import PENDING
from kvstore_client.agent.memory import BlockPool, HeldBlock, layer_mask
from kvstore_client.agent.retention import Retentions
from kvstore_client.handles import AsyncPutHandle
from kvstore_client.jobs import PutJob
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import PlacedKeys, block_heads, extents_of

# What one put may have pinned: the room of a connection (64 MiB) on the way in, and as much
# on the way out. A quarter of a small pool, so that four puts leave each other some.
PINNED_BYTES_PER_PUT_MAX = 128 * 1024 * 1024
PINNED_SHARE_DIVISOR = 4
# Blocks of the pool that are hashed in one go: at most 2 ms. Others have their turn until they
# are on their way to storage.
CHECKED_BYTES_PER_CALL_MAX = 16 * 1024 * 1024
# Puts to storage under way for one put: while one is on its way the next is announced.
JOBS_PER_PUT_MAX = 2


class Stores(Protocol):
    """What puts blocks to storage: a `kvstore_client.cluster.Cluster`."""

    def begin_put(self, job: PutJob, ack: AckLevel) -> None:
        """Run a put; its handle ends by itself."""


class _Place(NamedTuple):
    """Where a block of a put is, pinned. `apart`: not where it is found."""

    block: HeldBlock
    apart: bool


class _PoolPut(PutStream):
    """What both have in common: which blocks are announced, on their way, and decided.

    Args:
        layers: Which layers of each block are announced and received.
        checksums: Of those layers of all blocks, as PUT announced them.
        counters: Counts outcomes by the name of the kind and the outcome.
    """

    kind: str

    def __init__(
        self,
        pool: BlockPool,
        namespace: Namespace,
        keys: Sequence[bytes],
        layers: range,
        checksums: bytes,
        clock: Callable[[], float],
        counters: Counter[str],
    ) -> None:
        self.on_decided = _nothing
        self._pool = pool
        self._namespace = namespace
        self._keys = keys
        self._layers = layers
        self._checksums = checksums
        self._clock = clock
        self._counters = counters
        offsets = namespace.geometry.offsets
        self._span_bytes = offsets[layers.stop] - offsets[layers.start]
        self._outcomes = bytearray([PENDING]) * len(keys)
        self._undecided_count = len(keys)
        self._next = 0
        self._errors: list[Exception] = []  # of storage
        # Blocks whose bytes are on their way, by index.
        self._reserved: dict[int, _Place] = {}
        # Whether the server is in a call and looks at the outcomes by itself.
        self._in_call = False

    @property
    def finished(self) -> bool:
        return not self._undecided_count

    @property
    def reserved_bytes(self) -> int:
        return len(self._reserved) * self._span_bytes

    def outcomes(self) -> bytes:
        return bytes(self._outcomes)

    def errors(self) -> Sequence[Exception]:
        return self._errors

    def reserve(self, bytes_max: int) -> list[int]:
        self._in_call = True
        try:
            return self._reserve(bytes_max)
        finally:
            self._in_call = False

    def _reserve(self, bytes_max: int) -> list[int]:
        wanted: list[int] = []
        full = False
        while self._next < len(self._keys) and self._may_go_on():
            index = self._next
            if not self._is_here(index):
                if full:
                    self._decide(index, PutOutcome.FULL)
                elif (len(wanted) + 1) * self._span_bytes > bytes_max:
                    break
                elif place := self._place(self._keys[index]):
                    self._reserved[index] = place
                    wanted.append(index)
                elif self._pinned_count:
                    break  # when these are through there may be room again
                else:
                    full = True
                    continue
            self._next += 1
        self._reserved_some()
        return wanted

    def target(self, index: int) -> memoryview | None:
        place = self._reserved.get(index)
        if place is None:
            return None
        return place.block.layers(self._layers.start, self._layers.stop)

    def received(self, index: int) -> None:
        place = self._reserved.pop(index)
        self._counters[f"{self.kind}_bytes"] += self._span_bytes
        self._in_call = True
        try:
            self._received(index, place)
        finally:
            self._in_call = False

    def stop(self, outcome: PutOutcome) -> None:
        self._in_call = True
        try:
            self._stop(outcome)
        finally:
            self._in_call = False

    def _stop(self, outcome: PutOutcome) -> None:
        self._next = len(self._keys)
        for index, known in enumerate(self._outcomes):
            if known == PENDING:
                self._decide(index, outcome)
        reserved, self._reserved = self._reserved, {}
        for place in reserved.values():
            self._withdraw(place)

    @property
    def _pinned_count(self) -> int:
        """Blocks of this put that are pinned: as they go, there is room for others."""
        return len(self._reserved)

    def _may_go_on(self) -> bool:
        """Whether one more block may be pinned; one at a time always may. If not, some of
        those that are will make `reserve` be called again."""
        count = self._pinned_count
        size_bytes = (count + 1) * self._namespace.geometry.block_bytes
        share_bytes = self._pool.total_bytes // PINNED_SHARE_DIVISOR
        return not count or size_bytes <= min(PINNED_BYTES_PER_PUT_MAX, share_bytes)

    @abc.abstractmethod
    def _is_here(self, index: int) -> bool:
        """Whether the next block need not be received, and if so see to it."""

    @abc.abstractmethod
    def _received(self, index: int, place: _Place) -> None:
        """All bytes of a block are in place."""

    def _reserved_some(self) -> None:
        """`reserve` has looked at all that it can."""

    def _place(self, key: bytes) -> _Place | None:
        """Pinned memory for the layers of a block, marked as coming; None: no room."""
        pool = self._pool
        first, last = self._layers.start, self._layers.stop
        block = pool.reserve(self._namespace, key)
        if block is None:
            return None
        layers = layer_mask(first, last)
        if block.missing(first, last) == layers:
            pool.pin(block)
            block.coming |= layers
            return _Place(block, apart=False)
        apart = pool.reserve_apart(self._namespace, key)
        return None if apart is None else _Place(apart, apart=True)

    def _withdraw(self, place: _Place) -> None:
        """Nothing good comes into a place any more."""
        block = place.block
        if not place.apart:
            block.coming &= ~layer_mask(self._layers.start, self._layers.stop)
            if block.ready or block.coming or block.leases or block.dropped:
                block.notify()
            else:
                self._pool.drop(block)
        self._pool.unpin(block)

    def _publish(self, index: int, block: HeldBlock) -> None:
        """The layers of a block are here and good: let others find them."""
        block.learn(self._layers.start, self._announced(index))
        # An offer that is not verified stays as the engine of this node has made it.
        block.verified |= layer_mask(self._layers.start, self._layers.stop)
        block.arrived(self._layers.start, self._layers.stop)

    def _tell(self) -> None:
        if not self._in_call:
            self.on_decided()

    def _announced(self, index: int) -> bytes:
        size = len(self._layers) * CHECKSUM_BYTES
        return self._checksums[index * size : index * size + size]

    def _is_good(self, index: int, block: HeldBlock) -> bool:
        """Whether the bytes of a block are those that were announced."""
        offsets = self._namespace.geometry.offsets
        first = self._layers.start
        bounds = offsets[first : self._layers.stop + 1]
        layers = [block.view[begin:end] for begin, end in pairwise(bounds)]
        seed = block_seed(self._namespace.id, self._keys[index])
        return layer_checksums(layers, seed, first) == self._announced(index)

    def _decide(self, index: int, outcome: PutOutcome) -> None:
        self._outcomes[index] = outcome
        self._undecided_count -= 1
        self._counters[f"{self.kind}_{outcome.name.lower()}"] += 1


class StoragePut(_PoolPut):
    """A put of an engine of this node that goes on to storage.

    Blocks stay in the pool, for peers, whatever storage says of them. What the pool has is
    compared with its checksums before it is sent, and what came too.

    Args:
        stores: Puts to storage.
        chain: The keys, and where they lie.
        ack: Passed on to storage.
        clock: The loop's time.
        deadline_s: From now on; storage is given as long as is left. The server stops the put.
        counters: Counts `put_bytes` (received), `put_held` (was in the pool), `put_stored`, ...
    """

    kind = "put"

    def __init__(
        self,
        pool: BlockPool,
        stores: Stores,
        namespace: Namespace,
        chain: PlacedKeys,
        checksums: bytes,
        ack: AckLevel,
        clock: Callable[[], float],
        deadline_s: float,
        counters: Counter[str],
    ) -> None:
        layers = range(namespace.geometry.layer_count)
        super().__init__(pool, namespace, chain.wanted, layers, checksums, clock, counters)
        self._stores = stores
        self._heads = block_heads(chain)
        self._ack = ack
        self._deadline_at = clock() + deadline_s
        # Good blocks that are yet to be put to storage, by index, and how many are on the way.
        self._good: dict[int, HeldBlock] = {}
        self._sent_count = 0
        self._jobs: set[PutJob] = set()
        # Blocks that were here, in this call of `reserve`.
        self._checked_bytes = 0

    def reserve(self, bytes_max: int) -> list[int]:
        self._checked_bytes = 0
        return super().reserve(bytes_max)

    def _stop(self, outcome: PutOutcome) -> None:
        super()._stop(outcome)
        good, self._good = self._good, {}
        for block in good.values():
            self._pool.unpin(block)
        # Their blocks stay pinned until nobody reads from them any more.
        for job in list(self._jobs):
            job.cancel()

    @property
    def _pinned_count(self) -> int:
        return len(self._reserved) + len(self._good) + self._sent_count

    def _is_here(self, index: int) -> bool:
        block = self._pool.find(self._namespace.id, self._keys[index])
        if block is None or not block.complete:
            return False
        if block.checksums_of(0, len(self._layers)) != self._announced(index):
            return False
        if not self._is_good(index, block):
            # Or storage would get the damage with checksums that fit it.
            self._counters["corrupt_blocks"] += 1
            self._pool.drop(block)
            return False
        self._counters["put_held"] += 1
        self._checked_bytes += self._span_bytes
        self._pool.pin(block)
        self._good[index] = block
        return True

    def _may_go_on(self) -> bool:
        return self._checked_bytes < CHECKED_BYTES_PER_CALL_MAX and super()._may_go_on()

    def _reserved_some(self) -> None:
        self._send()

    def _received(self, index: int, place: _Place) -> None:
        if not self._is_good(index, place.block):
            self._withdraw(place)
            self._decide(index, PutOutcome.CORRUPT)
        else:
            self._good[index] = place.block
            self._publish(index, place.block)
        self._send()

    def _send(self) -> None:
        """Put to storage what is good; what comes while enough is under way goes together."""
        if not self._good or len(self._jobs) >= JOBS_PER_PUT_MAX:
            return
        good, self._good = self._good, {}
        indices = sorted(good)
        blocks = [good[index] for index in indices]
        keys = [self._keys[index] for index in indices]
        now = self._clock()
        job = PutJob(
            self._namespace,
            PlacedKeys(keys, extents_of(self._heads, indices)),
            [block.view for block in blocks],
            now,
            max(0.0, self._deadline_at - now),
            # As the engine has made them: what is damaged here fails at the daemon.
            checksums=[bytes(block.checksums) for block in blocks],
        )
        handle = job.handle = AsyncPutHandle(job.deadline_s, job.cancel)
        self._jobs.add(job)
        self._sent_count += len(indices)
        handle.outcome.add_done_callback(lambda _: self._stored(job, indices))
        handle.quiet.add_done_callback(lambda _: self._quiet(blocks))
        self._stores.begin_put(job, self._ack)

    def _stored(self, job: PutJob, indices: Sequence[int]) -> None:
        """Storage has decided on the blocks of a job."""
        self._jobs.discard(job)
        self._errors += job.errors[: REASONS_MAX - len(self._errors)]
        for index, outcome in zip(indices, job.outcomes, strict=True):
            if self._outcomes[index] == PENDING:
                self._decide(index, PutOutcome(outcome))
        self._send()
        self._tell()

    def _quiet(self, blocks: Sequence[HeldBlock]) -> None:
        """Nobody reads the memory of these blocks any more."""
        self._sent_count -= len(blocks)
        for block in reversed(blocks):  # the beginning of a chain is wanted longest
            self._pool.unpin(block)
        self._tell()


class OfferPut(_PoolPut):
    """Layers of blocks that an engine of this node offers to peers; stored nowhere else.

    Args:
        retentions: Keep what is offered.
        layers: Which layers.
        clock: Seconds of the clock of `retentions`.
        lease_s: How long it is kept, from when it has come.
        retain: The request of the engine that it is kept for; None for none.
        verify: Whether layers are compared with their checksums; their reader does it anyway.
        counters: Counts `offer_bytes` (received), `offer_stored`, `offer_exists`, ...
    """

    kind = "offer"

    def __init__(
        self,
        pool: BlockPool,
        retentions: Retentions,
        namespace: Namespace,
        keys: Sequence[bytes],
        layers: range,
        checksums: bytes,
        clock: Callable[[], float],
        lease_s: float,
        retain: Retain | None,
        verify: bool,
        counters: Counter[str],
    ) -> None:
        super().__init__(pool, namespace, keys, layers, checksums, clock, counters)
        self._retentions = retentions
        self._lease_s = lease_s
        self._retain = retain
        self._verify = verify
        # Blocks that came apart and of which others still bring layers.
        self._apart: dict[int, HeldBlock] = {}
        self._added: set[int] = set()  # of those, where something was missing that was ours
        self._mask = layer_mask(layers.start, layers.stop)

    @property
    def _pinned_count(self) -> int:
        return len(self._reserved) + len(self._apart)

    def _stop(self, outcome: PutOutcome) -> None:
        # First, for what is withdrawn below may be what they wait for.
        apart, self._apart = self._apart, {}
        super()._stop(outcome)
        for index, block in apart.items():
            found = self._pool.find(self._namespace.id, self._keys[index])
            if found is not None:
                found.watchers.pop((self, index), None)
            self._pool.unpin(block)

    def _is_here(self, index: int) -> bool:
        block = self._pool.find(self._namespace.id, self._keys[index])
        if block is not None:
            if self._differs(index, block):
                self._decide(index, PutOutcome.CONFLICT)
                return True
            if block.has(self._layers.start, self._layers.stop):
                self._decide(index, self._kept(block, PutOutcome.EXISTS))
                return True
            if block.leases:
                return False
        # Those that are on their way will be kept too.
        size_bytes = (self._pinned_count + 1) * self._pool.size_of(self._namespace)
        if self._retentions.has_room(size_bytes):
            return False
        self._decide(index, PutOutcome.FULL)
        return True

    def _received(self, index: int, place: _Place) -> None:
        block = place.block
        if self._verify and not self._is_good(index, block):
            self._withdraw(place)
            self._decide(index, PutOutcome.CORRUPT)
        elif place.apart:
            self._join(index, block)
        elif block.dropped:
            self._withdraw(place)
            self._decide(index, PutOutcome.UNAVAILABLE)
        else:
            self._publish(index, block)
            self._decide(index, self._kept(block, PutOutcome.STORED))
            self._pool.unpin(block)

    def _join(self, index: int, apart: HeldBlock) -> None:
        """Add what came apart, because of others who filled the block, as far as it is missing.
        What they still bring is waited for: if it does not come, ours is all that there is."""
        block = self._pool.reserve(self._namespace, self._keys[index])
        if block is None:
            outcome = PutOutcome.FULL
        elif self._differs(index, block):
            outcome = PutOutcome.CONFLICT
        else:
            self._pool.pin(block)
            added = self._add(index, apart, block)
            if not block.dropped and block.coming & self._mask:
                self._apart[index] = apart
                if added:
                    self._added.add(index)
                block.watchers[self, index] = lambda block: self._moved(index, block)
                self._pool.unpin(block)
                return
            added = added or index in self._added
            outcome = self._kept(block, PutOutcome.STORED if added else PutOutcome.EXISTS)
            self._pool.unpin(block)
        self._added.discard(index)
        self._decide(index, outcome)
        self._pool.unpin(apart)
        self._tell()

    def _add(self, index: int, apart: HeldBlock, block: HeldBlock) -> bool:
        """Copy layers that are missing; whether there were any."""
        announced = self._announced(index)
        added = False
        for at, layer in enumerate(self._layers):
            if block.missing(layer, layer + 1):
                block.layers(layer, layer + 1)[:] = apart.layers(layer, layer + 1)
                block.learn(layer, announced[at * CHECKSUM_BYTES : (at + 1) * CHECKSUM_BYTES])
                block.verified |= 1 << layer
                block.arrived(layer, layer + 1)
                added = True
        return added

    def _moved(self, index: int, block: HeldBlock) -> None:
        """Of a block of which others bring layers that came apart too."""
        if block.dropped or not block.coming & self._mask:
            block.watchers.pop((self, index), None)
            apart = self._apart.pop(index, None)
            if apart is not None:
                self._join(index, apart)

    def _differs(self, index: int, block: HeldBlock) -> bool:
        """Whether layers of a block are here, or about to be, that are not those announced."""
        announced = self._announced(index)
        here = block.ready | (block.coming & block.known)
        for at, layer in enumerate(self._layers):
            if here >> layer & 1:
                known = block.checksums_of(layer, layer + 1)
                if known != announced[at * CHECKSUM_BYTES : (at + 1) * CHECKSUM_BYTES]:
                    return True
        return False

    def _kept(self, block: HeldBlock, outcome: PutOutcome) -> PutOutcome:
        """An outcome that promises to keep a block, or FULL: it may go at any time."""
        retain, ends_at = self._retain, self._clock() + self._lease_s
        if retain is None:
            kept = self._retentions.offer(block, ends_at)
        else:
            kept = self._retentions.retain(retain.request, retain.attempt, [block], ends_at)
        return outcome if kept else PutOutcome.FULL


def _nothing() -> None:
    pass


__all__ = ["OfferPut", "StoragePut", "Stores"]
