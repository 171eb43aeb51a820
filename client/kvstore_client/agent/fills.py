"""What is on its way into the agent's memory: each layer of a block once, whoever asks.

A *fill* is one request of the agent to other nodes, for the same layers of a run of blocks.
It goes on for as long as somebody waits for one of its blocks, or an engine is to have them.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from kvstore.checksum import CHECKSUM_BYTES
from kvstore.messages import FetchOutcome, ServedBy
from kvstore_client.agent.memory import BlockPool, HeldBlock, layer_mask
from kvstore_client.handles import AsyncFetchHandle
from kvstore_client.jobs import FetchJob, FillJob, Route
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import PlacedKeys

_WAYS = tuple(ServedBy)
_OUTCOMES = tuple(FetchOutcome)
# Nothing is wrong with the bytes that have come before.
_CUT_OFF = (FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE)


class FillKind(enum.IntEnum):
    """How blocks come, in the order in which one node may wait for another.

    ::

        PEER     from another agent's memory, which may wait for its fills of kind ANY
        ANY      by all paths: other agents relay, and wait for their fills of kind STORAGE
        STORAGE  by the own storage link: from daemons, who wait for nobody

    Whoever is asked by another node joins fills of a lower kind only, so that no two nodes
    ever wait for each other.
    """

    STORAGE = 0
    ANY = 1
    PEER = 2

    @property
    def way(self) -> ServedBy:
        """What is said of the blocks; with ANY each has its own."""
        return (ServedBy.DIRECT, ServedBy.UNKNOWN, ServedBy.PEER)[self]


class FillAsker(Protocol):
    """Who waits for blocks of fills."""

    def fill_failed(self, fill: Fill, block: HeldBlock, outcome: FetchOutcome) -> None:
        """One of its blocks does not come. Told before the block itself changes."""

    def fill_over(self, fill: Fill) -> None:
        """A fill has ended: all is known about each of its blocks. Or the ways of some are."""


class Starter(Protocol):
    """What begins a job: `kvstore_client.cluster.Cluster`."""

    def begin_fetch(self, job: FetchJob) -> None:
        """Run a fetch; its handle ends by itself."""


class Fill:
    """Layers of some blocks that are on their way. A `LayerSink`.

    Attributes:
        kind: How they come.
        owner: Who has begun it: its deadline is that of the fill.
        askers: Who waits for some of the blocks.
        blocks: Pinned until nobody writes into them any more.
        over: Whether all is known about each block.
        verified: Whether layers were compared with their checksums before they were told of.
    """

    __slots__ = (
        "_fills",
        "_late",
        "_layers",
        "_mask",
        "_offsets",
        "_open_count",
        "_places",
        "_span_bytes",
        "askers",
        "blocks",
        "job",
        "kind",
        "left_bytes",
        "over",
        "owner",
        "verified",
    )

    job: FillJob

    def __init__(
        self,
        fills: Fills,
        blocks: Sequence[HeldBlock],
        layers: range,
        kind: FillKind,
        owner: FillAsker,
        verified: bool,
    ) -> None:
        self._fills = fills
        self.blocks = blocks
        self.kind = kind
        self.owner = owner
        self.askers: set[FillAsker] = {owner}
        self.over = False
        self.verified = verified
        self._layers = layers
        self._mask = layer_mask(layers.start, layers.stop)
        self._offsets = offsets = blocks[0].namespace.geometry.offsets
        self._span_bytes = offsets[layers.stop] - offsets[layers.start]
        self._open_count = len(blocks)
        self._places: dict[bytes, int] | None = None
        # Blocks with layers that still count as coming, because somebody may write there.
        self._late: list[HeldBlock] = []
        self.left_bytes = self._span_bytes * len(blocks)

    # --- LayerSink -------------------------------------------------------------------------

    def checksums_known(self, index: int, layer_first: int, checksums: bytes) -> None:
        """Checksums of the layers from `layer_first` on that will arrive next."""
        # Nobody is told: their first layer follows, nearly always at once.
        block = self.blocks[index]
        at, size = layer_first * CHECKSUM_BYTES, len(checksums)
        block.checksums[at : at + size] = checksums
        if size == len(self._layers) * CHECKSUM_BYTES:
            block.known |= self._mask
        else:
            block.known |= layer_mask(layer_first, layer_first + size // CHECKSUM_BYTES)

    def layers_arrived(self, index: int, layer_first: int, layer_last: int) -> None:
        """Layers of a block are in its memory."""
        layers, block = self._layers, self.blocks[index]
        if layer_first == layers.start and layer_last == layers.stop:
            mask, size_bytes = self._mask, self._span_bytes
        else:
            mask = layer_mask(layer_first, layer_last)
            size_bytes = self._offsets[layer_last] - self._offsets[layer_first]
        self.left_bytes -= size_bytes
        block.ready |= mask
        if self.verified:
            block.verified |= mask
        block.coming &= ~mask
        for tell in (*block.watchers.values(),):
            tell(block)

    # --- its end ---------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for what has not come, or an engine is to have it."""
        return (
            not self._open_count or bool(self.askers) or any(block.leases for block in self.blocks)
        )

    def way(self, key: bytes) -> int:
        """A `ServedBy`: by which path a block has come; UNKNOWN until that is known."""
        if self.kind is not FillKind.ANY:
            return self.kind.way
        if self._places is None:
            self._places = {name: place for place, name in enumerate(self.job.keys)}
        return self.job.served_by[self._places[key]]

    def block_done(self, index: int, outcome: int) -> None:
        """A block has its outcome."""
        self._open_count -= 1
        block = self.blocks[index]
        self._fills.done(self, block)
        if outcome == FetchOutcome.HIT:
            return
        told = _OUTCOMES[outcome]
        for asker in list(self.askers):
            asker.fill_failed(self, block, told)
        mask = self._mask & ~block.ready
        cut_off = outcome in _CUT_OFF or (self.verified and outcome == FetchOutcome.CORRUPT)
        if cut_off and block.ready and not block.dropped:
            # What is here is good. The rest may come again when nobody writes there any more.
            if self.job.handle.quiet.done():
                block.coming &= ~mask
                block.notify()
            else:
                self._late.append(block)
            return
        block.coming &= ~mask
        if block.dropped or (outcome == FetchOutcome.MISS and (block.ready or block.coming)):
            block.notify()
        else:
            self._fills.pool.drop(block)

    def told(self) -> None:
        """By which way some of the blocks have come is known now."""
        for asker in list(self.askers):
            asker.fill_over(self)

    def ended(self) -> None:
        """All is known about each block."""
        self.over = True
        askers, self.askers = self.askers, set()
        for asker in askers:
            asker.fill_over(self)

    def quiet(self) -> None:
        """Nobody writes into the blocks any more."""
        late, self._late = self._late, []
        for block in late:
            block.coming &= ~(self._mask & ~block.ready)
            block.notify()
        for block in self.blocks:
            self._fills.pool.unpin(block)


class Fills:
    """All fills under way. On the loop's thread.

    Args:
        pool: Where blocks come to.
        starter: Begins the jobs.
        verify: Whether what only passes through is verified here too. What engines of this node
            load always is: only here it is known who brought it and which other way there is.
        counters: Where to count.

    Attributes:
        left_bytes: Asked for and not yet here.
        under_way: Fills whose memory others may still write to.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: BlockPool,
        starter: Starter,
        verify: bool,
        counters: Counter[str],
    ) -> None:
        self.pool = pool
        self.under_way: set[Fill] = set()
        self._loop = loop
        self._starter = starter
        self._verify = verify
        self._counters = counters
        # Fills that bring layers of a block; nearly always one, and then without a tuple.
        self._of: dict[HeldBlock, Fill | tuple[Fill, ...]] = {}

    @property
    def left_bytes(self) -> int:
        """Asked for and not yet here."""
        return sum(fill.left_bytes for fill in self.under_way if not fill.over)

    def now(self) -> float:
        """Loop time."""
        return self._loop.time()

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call in the next turn of the loop."""
        self._loop.call_soon(call)

    def call_at(self, at: float, call: Callable[[], None]) -> Callable[[], None]:
        """Call at a loop time; returns how to take it back."""
        return self._loop.call_at(at, call).cancel

    def of(self, block: HeldBlock) -> tuple[Fill, ...]:
        """Fills that bring layers of a block."""
        found = self._of.get(block, ())
        return found if isinstance(found, tuple) else (found,)

    def begin(
        self,
        namespace: Namespace,
        chain: PlacedKeys,
        blocks: Sequence[HeldBlock],
        layers: range,
        group_layers: int,
        kind: FillKind,
        route: Route,
        deadline_at: float,
        owner: FillAsker,
    ) -> Fill:
        """Ask for the same layers of some blocks, none of which is here or coming.

        Args:
            chain: Keys of the blocks, and where they lie.
            group_layers: Layers in a group for order=layer, 0 for order=block.
            owner: Is told of what fails, now or later.
        """
        verify = self._verify or kind is not FillKind.STORAGE
        fill = Fill(self, blocks, layers, kind, owner, verify)
        mask = layer_mask(layers.start, layers.stop)
        pin, of = self.pool.pin, self._of
        for block in blocks:
            pin(block)
            block.coming |= mask
            of[block] = fill if block not in of else (*self.of(block), fill)
        offsets = namespace.geometry.offsets
        begin, end = offsets[layers.start], offsets[layers.stop]
        now = self._loop.time()
        job = fill.job = FillJob(
            namespace,
            chain,
            [block.view[begin:end] for block in blocks],
            layers,
            group_layers,
            now,
            max(0.0, deadline_at - now),
            fill,
            verify,
            route,
        )
        job.on_block = fill.block_done
        job.on_run = partial(self._loop.call_soon, fill.told)
        handle = job.handle = AsyncFetchHandle(job.deadline_s, job.cancel, len(layers))
        handle.outcome.add_done_callback(lambda done: fill.ended())
        handle.quiet.add_done_callback(partial(self._quiet, fill))
        self.under_way.add(fill)
        self._counters["fills"] += 1
        self._starter.begin_fetch(job)
        return fill

    def done(self, fill: Fill, block: HeldBlock) -> None:
        """A fill has nothing more to do with a block."""
        found = self._of.pop(block, None)
        if isinstance(found, tuple):
            rest = tuple(other for other in found if other is not fill)
            self._of[block] = rest if len(rest) > 1 else rest[0]

    def leave(self, asker: FillAsker, fills: Sequence[Fill]) -> None:
        """Somebody waits no more; what nobody waits for any more, and no engine is to have,
        is cancelled."""
        for fill in fills:
            fill.askers.discard(asker)
            if not fill.wanted and not fill.over:
                self._counters["fills_cancelled"] += 1
                fill.job.cancel()

    def stop(self) -> None:
        """Cancel everything."""
        for fill in list(self.under_way):
            if not fill.over:
                fill.job.cancel()

    def _quiet(self, fill: Fill, done: object) -> None:
        self.under_way.discard(fill)
        fill.quiet()
