"""A fetch or a put of a caller, from the call to `quiet`: what is known of each block.

A job is split into *runs*, each one request to one peer by one path. The job owns the
caller's memory and decides when its handle ends; runs only tell it what happened. Lives on
the loop's thread; knows neither sockets nor paths.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.errors import KVStoreError
from kvstore.layout import Geometry, PieceMap
from kvstore.messages import FetchOutcome, PutOutcome, Retain, ServedBy, Tier
from kvstore.relaytransfer import LayerSink, RelayTransfer
from kvstore.transfer import PENDING, BlockMemory, FetchTransfer
from kvstore_client.handles import FetchHandle, FetchResult, PutHandle, PutResult, Run
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import Chain, PlacedKeys, block_heads, extents_of

# By their numbers, since making a member of an enumeration costs more than all else a block.
_FETCH_OUTCOMES = tuple(FetchOutcome)
_PUT_OUTCOMES = tuple(PutOutcome)
_TIERS = tuple(Tier)
_SERVED_BY = tuple(ServedBy)
# From the best to the worst, when two daemons were asked.
_PUT_RANKS = {
    outcome: rank
    for rank, outcome in enumerate(
        (
            PutOutcome.STORED,
            PutOutcome.EXISTS,
            PutOutcome.CONFLICT,
            PutOutcome.FULL,
            PutOutcome.CORRUPT,
            PutOutcome.TIMEOUT,
            PutOutcome.UNAVAILABLE,
        )
    )
}


class Route(NamedTuple):
    """How the blocks of a fetch may travel.

    Attributes:
        direct_only: By this node's own storage link only.
        peer: Endpoint of the agent that holds them: by the path peer, never from storage. At
            the agent of this node, what is not there comes from storage.
        decode_node: Node id of the relay that is best, since its engine needs the bytes too.
        retain: What the decode node is to keep for its engine.
        wait_ms: How long a peer may wait for blocks that it does not hold yet.
        priority: Lower goes first among the requests of this node at a daemon.
        hops: Nodes that have passed the request on.
    """

    direct_only: bool = False
    peer: str = ""
    decode_node: str = ""
    retain: Retain | None = None
    wait_ms: int = 0
    priority: int = 0
    hops: int = 0


#: Any way, nothing special.
ANY_ROUTE = Route()


class Job:
    """What fetches and puts have in common.

    Args:
        chain: Which blocks the call is about, and where they lie.
        now: Loop time of the call.
        deadline_s: From then on, when everything ends.

    Attributes:
        keys: Keys of the blocks that the call is about.
        deadline_at: Loop time at which everything ends.
        timed_out: Whether it was the deadline that ended the job.
        on_end: Called once when every outcome is known, before the handle tells.
    """

    handle: FetchHandle | PutHandle

    def __init__(
        self, namespace: Namespace, chain: Chain | PlacedKeys, now: float, deadline_s: float
    ) -> None:
        keys = chain.wanted
        self.namespace = namespace
        self.chain = chain
        self.keys = keys
        self.deadline_s = deadline_s
        self.deadline_at = now + deadline_s
        self.timed_out = False
        self.on_end: Callable[[], None] = lambda: None
        # Not the loop's time, which goes in steps of a millisecond with uvloop.
        self._begun_at = time.perf_counter()
        self.outcomes = bytearray([PENDING]) * len(keys)
        self.runs: list[Run] = []
        self.run_of_block = [-1] * len(keys)
        self.errors: list[Exception] = []
        self.ended = False
        self.bytes = 0
        # How to stop the runs under way.
        self._heads: list[bytes] | None = None
        self._stops: dict[object, Callable[[], None]] = {}
        # Runs whose peers may still touch the caller's memory.
        self._borrower_count = 0

    def extents(self, indices: Sequence[int]) -> tuple[tuple[int, bytes], ...]:
        """Where some of the blocks lie, for a request to an agent."""
        if self._heads is None:
            self._heads = block_heads(self.chain)
        return extents_of(self._heads, indices)

    def add_run(self, run: Run, indices: Sequence[int]) -> None:
        """A run has ended: note who served which blocks."""
        number = len(self.runs)
        self.runs.append(run)
        for index in indices:
            self.run_of_block[index] = number
        self.bytes += run.bytes

    def add_error(self, error: Exception) -> None:
        """Note what went wrong, once for each message."""
        if str(error) not in map(str, self.errors):
            self.errors.append(error)

    def time_out(self) -> None:
        """The deadline is here: nothing more is waited for."""
        raise NotImplementedError

    def give_up(self, error: Exception) -> None:
        """Nothing more is waited for, because of this; harmless when the job has ended."""
        raise NotImplementedError

    def cancel(self) -> None:
        """The caller does not want it any more."""
        self.give_up(KVStoreError("cancelled by the caller"))

    def pending(self) -> list[int]:
        """Indices of the blocks without an outcome."""
        return [index for index, outcome in enumerate(self.outcomes) if outcome == PENDING]

    def borrow(self, run: object, stop: Callable[[], None]) -> None:
        """A run begins to use the caller's memory.

        Args:
            stop: Called when the job ends first; the run must let go as soon as it can.
        """
        self._stops[run] = stop
        self._borrower_count += 1

    def finished(self, run: object) -> None:
        """A run has its result; it need not be stopped any more."""
        self._stops.pop(run, None)

    def let_go(self) -> None:
        """A run's peer can touch the caller's memory no more."""
        self._borrower_count -= 1
        self._maybe_quiet()

    def _stop(self, timed_out: bool) -> float:
        """End the runs under way; seconds since the call."""
        self.ended = True
        self.timed_out = timed_out
        stops, self._stops = self._stops, {}
        for stop in stops.values():
            stop()
        return time.perf_counter() - self._begun_at

    def _maybe_quiet(self) -> None:
        if self.ended and self._borrower_count == 0 and not self.handle.quiet.done():
            self.handle._set_quiet()


class FetchJob(Job):
    """A fetch: which groups of layers of which blocks are in the caller's memory.

    Args:
        memory: The caller's memory of each block, for the layers asked for.
        group_layers: Layers in a group for order=layer, 0 for order=block.
        route: How the blocks may travel.

    Attributes:
        served_by: One `ServedBy` a key.
        plan: Why the blocks went which way.
        estimate_s: How long that was expected to take; 0.0 if nobody has estimated it.
        moved_count: Blocks that were taken back from one way and sent another.
        corrupt: Blocks that came damaged, by the peer that has been told of it.
        on_block: Called once for each key with its final outcome, as soon as that is known.
    """

    def __init__(
        self,
        namespace: Namespace,
        chain: Chain | PlacedKeys,
        memory: Sequence[BlockMemory],
        layers: range,
        group_layers: int,
        now: float,
        deadline_s: float,
        route: Route = ANY_ROUTE,
    ) -> None:
        super().__init__(namespace, chain, now, deadline_s)
        keys = self.keys
        self.memory = memory
        self.layers = layers
        self.group_layers = group_layers
        self.route = route
        self.tiers = bytearray(len(keys))
        self.served_by = bytearray(len(keys))
        self.plan = ""
        self.estimate_s = 0.0
        self.moved_count = 0
        self.corrupt: defaultdict[str, set[int]] = defaultdict(set)
        self.on_block: Callable[[int, int], None] | None = None
        self.handle: FetchHandle
        self._geometry: Geometry = namespace.geometry
        group_count = self.pieces(1).group_count
        self._group_count = group_count
        self._step = group_layers or len(layers)  # layers in a group
        # For each block a bit a group that is here, by whatever requests.
        self._groups_here = [0] * len(keys)
        self._all_here = (1 << group_count) - 1
        # Blocks that a group still waits for, and the first group that waits for any.
        self._waiting = [len(keys)] * group_count
        self._first_waiting = 0
        self._failed = False

    def pieces(self, key_count: int) -> PieceMap:
        """How a request of `key_count` of the blocks is cut."""
        return PieceMap(
            self._geometry,
            key_count,
            self.layers.start,
            self.layers.stop,
            self.group_layers,
        )

    def first_missing(self, index: int, since: int) -> int:
        """The first layer of a block, not before `since`, that must be asked for."""
        group = (since - self.layers.start) // self._step
        return self.layers.start + _first_zero(self._groups_here[index], group) * self._step

    def group_end(self, layer: int) -> int:
        """The layer behind the group of layers in which a layer lies."""
        first, step = self.layers.start, self._step
        return min(first + ((layer - first) // step + 1) * step, self.layers.stop)

    @property
    def span_bytes(self) -> int:
        """Bytes asked for of each block."""
        return self.size_bytes(self.layers.start, self.layers.stop)

    def size_bytes(self, first: int, last: int) -> int:
        """Bytes of layers `[first, last)` of a block."""
        offsets = self._geometry.offsets
        return offsets[last] - offsets[first]

    def transfer(
        self,
        indices: Sequence[int],
        layers: range,
        on_failed: Callable[[int, FetchOutcome], None],
    ) -> FetchTransfer:
        """What receives some layers of some blocks, none of which is here or was asked for.

        Args:
            layers: Of each block; they begin and end with groups, but what `first_missing` says
                may lie within one.
            on_failed: Called with (index of the job, outcome), see `FetchPath.fetch`.
        """
        pieces = PieceMap(
            self._geometry, len(indices), layers.start, layers.stop, self.group_layers
        )
        memory = [self.memory[index] for index in indices]
        if layers != self.layers:
            memory = [self._cut(block, layers) for block in memory]
        return self._transfer(
            [self.keys[index] for index in indices],
            pieces,
            memory,
            self._on_piece(indices, pieces),
            lambda index, outcome: on_failed(indices[index], _FETCH_OUTCOMES[outcome]),
            indices,
        )

    def _on_piece(self, indices: Sequence[int], pieces: PieceMap) -> Callable[[int, int], None]:
        """What a transfer calls with (its index, its group)."""
        first = (pieces.layer_first - self.layers.start) // self._step
        return lambda index, group: self.piece_arrived(indices[index], first + group)

    def _transfer(
        self,
        keys: Sequence[bytes],
        pieces: PieceMap,
        memory: Sequence[BlockMemory],
        on_piece: Callable[[int, int], None],
        on_failed: Callable[[int, int], None],
        indices: Sequence[int],
    ) -> FetchTransfer:
        return FetchTransfer(self.namespace.id, keys, pieces, memory, on_piece, on_failed)

    def _cut(self, memory: BlockMemory, layers: range) -> BlockMemory:
        """The memory of some layers of a block."""
        first, last = layers.start, layers.stop
        if isinstance(memory, memoryview):
            offsets, base = self._geometry.offsets, self._geometry.offsets[self.layers.start]
            return memory[offsets[first] - base : offsets[last] - base]
        return memory[first - self.layers.start : last - self.layers.start]

    def piece_arrived(self, index: int, group: int) -> None:
        """A group of layers of a block is in the caller's memory and was verified."""
        here = self._groups_here[index]
        assert not here >> group & 1, "each group of a block is asked for once at a time"
        self._groups_here[index] = here = here | 1 << group
        self._waiting[group] -= 1
        if here == self._all_here:
            self.outcomes[index] = FetchOutcome.HIT
            if self.on_block is not None:
                self.on_block(index, FetchOutcome.HIT)
        self._publish()

    def block_failed(self, index: int, outcome: int) -> None:
        """A block has its outcome, and it is no hit; nobody waits for its layers."""
        if self.outcomes[index] != PENDING:
            return
        self.outcomes[index] = outcome
        self._failed = True
        here = self._groups_here[index]
        for group in range(self._group_count):
            if not here >> group & 1:
                self._waiting[group] -= 1
        if self.on_block is not None:
            self.on_block(index, outcome)
        self._publish()

    def time_out(self) -> None:
        self._end(FetchOutcome.TIMEOUT)

    def give_up(self, error: Exception) -> None:
        if not self.ended:
            self.add_error(error)
            self._end(FetchOutcome.UNAVAILABLE)

    def _end(self, outcome: FetchOutcome) -> None:
        """Everything that is not known yet ends with `outcome`; the handle ends."""
        if self.ended:
            return
        if not self.keys:
            self._publish()  # every layer of no block is there
        elapsed_s = self._stop(outcome is FetchOutcome.TIMEOUT)
        for index in self.pending():
            self.block_failed(index, outcome)
        self.on_end()
        outcomes = [_FETCH_OUTCOMES[number] for number in self.outcomes]
        self.handle._publish_outcome(
            FetchResult(
                outcomes=outcomes,
                tiers=[_TIERS[number] for number in self.tiers],
                served_by=[_SERVED_BY[number] for number in self.served_by],
                plan=self.plan,
                estimate_s=self.estimate_s,
                runs=self.runs,
                run_of_block=self.run_of_block,
                bytes=outcomes.count(FetchOutcome.HIT) * self.span_bytes,
                elapsed_s=elapsed_s,
                errors=self.errors,
            )
        )
        self._maybe_quiet()

    def _publish(self) -> None:
        first = self._first_waiting
        while first < self._group_count and self._waiting[first] == 0:
            first += 1
        if first != self._first_waiting and not self.ended:
            self._first_waiting = first
            ready = min(first * self._step, len(self.layers))
            self.handle._publish_layers(ready, self._failed)


class FillJob(FetchJob):
    """A fetch into memory from which the blocks are passed on while they arrive.

    Args:
        sink: Is told of layers as they come; its indices are those of the job.
        verify: Whether layers are compared with their checksums before.
    """

    def __init__(
        self,
        namespace: Namespace,
        chain: Chain | PlacedKeys,
        memory: Sequence[BlockMemory],
        layers: range,
        group_layers: int,
        now: float,
        deadline_s: float,
        sink: LayerSink,
        verify: bool,
        route: Route = ANY_ROUTE,
    ) -> None:
        super().__init__(namespace, chain, memory, layers, group_layers, now, deadline_s, route)
        self._sink = sink
        self._verify = verify
        #: Called when a run has ended, and `served_by` says more.
        self.on_run: Callable[[], object] | None = None
        # For each group a bit a layer.
        self._group_masks = [
            _layer_mask(first, last) for first, last, _, _ in self.pieces(1).group_ranges
        ]
        #: For each block a bit a layer that may have been passed on.
        self.told = [0] * len(self.keys)

    def add_run(self, run: Run, indices: Sequence[int]) -> None:
        super().add_run(run, indices)
        if self.on_run is not None:
            self.on_run()

    def first_missing(self, index: int, since: int) -> int:
        # What was passed on must not be overwritten, with whatever version of the block.
        return _first_zero(self.told[index], since)

    def _on_piece(self, indices: Sequence[int], pieces: PieceMap) -> Callable[[int, int], None]:
        # A request that begins within a group of the job has others; so that a group may be
        # here in full, and that is known with the next one only.
        return lambda index, group: self._layers_here(indices[index])

    def _layers_here(self, index: int) -> None:
        """Layers of a block are in their memory, and a group of some request is complete:
        perhaps some of the job are, however many requests have brought them."""
        told, here = self.told[index], self._groups_here[index]
        for group, mask in enumerate(self._group_masks):
            if told & mask == mask and not here >> group & 1:
                self.piece_arrived(index, group)

    def _transfer(
        self,
        keys: Sequence[bytes],
        pieces: PieceMap,
        memory: Sequence[BlockMemory],
        on_piece: Callable[[int, int], None],
        on_failed: Callable[[int, int], None],
        indices: Sequence[int],
    ) -> FetchTransfer:
        sink = _RunSink(self._sink, indices, self.told)
        return RelayTransfer(
            self.namespace.id, keys, pieces, memory, on_piece, on_failed, sink, self._verify
        )


def _layer_mask(first: int, last: int) -> int:
    """A bit for each of the layers `[first, last)`."""
    return (1 << last) - (1 << first)


def _first_zero(bits: int, since: int) -> int:
    """The lowest place, not below `since`, whose bit is not set."""
    rest = ~bits >> since
    return since + (rest & -rest).bit_length() - 1


class _RunSink:
    """Tells of the layers of a run by the indices of its job."""

    def __init__(self, sink: LayerSink, indices: Sequence[int], told: list[int]) -> None:
        self._sink = sink
        self._indices = indices
        self._told = told

    def checksums_known(self, index: int, layer_first: int, checksums: bytes) -> None:
        self._sink.checksums_known(self._indices[index], layer_first, checksums)

    def layers_arrived(self, index: int, layer_first: int, layer_last: int) -> None:
        number = self._indices[index]
        self._told[number] |= _layer_mask(layer_first, layer_last)
        self._sink.layers_arrived(number, layer_first, layer_last)


class Offer(NamedTuple):
    """Layers of blocks that are kept at the agent of this node, for peers that pull them.

    Attributes:
        layers: Which layers; consecutive.
        lease_ms: How long they are kept.
        retain: The request of the engine for which they are.
    """

    layers: range
    lease_ms: int
    retain: Retain | None = None


class PutJob(Job):
    """A put.

    Args:
        memory: The caller's memory of each block: all layers, or those of the offer.
        offer: What is offered to peers; None for what is to be stored.
        checksums: Of all layers of each block, where their writer has made them already.

    Attributes:
        geometry: Of the layers that the memory of a block holds.
        layer_first: The first of these layers.
    """

    def __init__(
        self,
        namespace: Namespace,
        chain: Chain | PlacedKeys,
        memory: Sequence[BlockMemory],
        now: float,
        deadline_s: float,
        offer: Offer | None = None,
        checksums: Sequence[bytes] | None = None,
    ) -> None:
        super().__init__(namespace, chain, now, deadline_s)
        self.memory = memory
        self.offer = offer
        self.checksums = checksums
        self.geometry = namespace.geometry
        self.layer_first = 0
        if offer is not None:
            layers = offer.layers
            self.layer_first = layers.start
            self.geometry = Geometry(namespace.geometry.layer_bytes[layers.start : layers.stop])
        self.handle: PutHandle

    def block_done(self, index: int, outcome: PutOutcome) -> None:
        """A peer has decided on a block; of two peers the better outcome counts."""
        known = self.outcomes[index]
        if not self.ended and (
            known == PENDING or _PUT_RANKS[outcome] < _PUT_RANKS[PutOutcome(known)]
        ):
            self.outcomes[index] = outcome

    def time_out(self) -> None:
        self._end(PutOutcome.TIMEOUT)

    def give_up(self, error: Exception) -> None:
        if not self.ended:
            self.add_error(error)
            self._end(PutOutcome.UNAVAILABLE)

    def _end(self, outcome: PutOutcome) -> None:
        """Everything that is not known yet ends with `outcome`; the handle ends."""
        if self.ended:
            return
        elapsed_s = self._stop(outcome is PutOutcome.TIMEOUT)
        for index in self.pending():
            self.outcomes[index] = outcome
        self.on_end()
        self.handle.outcome.set_result(
            PutResult(
                outcomes=[_PUT_OUTCOMES[number] for number in self.outcomes],
                runs=self.runs,
                run_of_block=self.run_of_block,
                bytes=self.bytes,
                elapsed_s=elapsed_s,
                errors=self.errors,
            )
        )
        self._maybe_quiet()
