"""What a caller holds while a fetch or a put is under way, and what it gets at the end.

A handle ends twice. `outcome`: every block has its outcome, at the latest at the deadline.
`quiet`: no peer can write into (fetch) or read from (put) the caller's memory any more. The
memory is the caller's again at `quiet`, not before.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import msgspec

from kvstore.errors import RefusedError, TransportTimeout
from kvstore.messages import FetchOutcome, PutOutcome, ServedBy, Tier

# How much later than its deadline a handle may end before the library is declared stuck
# (a starved loop thread); only then does `result` raise instead of returning outcomes.
STUCK_AFTER_S = 5.0


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of one request that travelled together: who served them, how, and how long.

    Attributes:
        path: "direct"; other paths name themselves.
        transport: What really moved the bytes: "tcp", "unix", ...
        peer: Node id of the peer, or its endpoint if it never answered.
        block_count: Blocks that were asked for in this run.
        bytes: Payload bytes that arrived or were sent.
        elapsed_us: From the request until its last word, by the clock of this process.
        queued_us: Of those, until the peer began to send, as it says itself.
        service_us: Of those, from then until it had sent the last byte, as it says itself.
            Both are 0 where its last word did not come.
    """

    path: str
    transport: str
    peer: str
    block_count: int
    bytes: int
    elapsed_us: int
    queued_us: int = 0
    service_us: int = 0


class FetchResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a fetch ended.

    Attributes:
        outcomes: One a key, in the order of the request.
        tiers: Where each block was found. A peer says so in its last word: where that did not
            come, because of the deadline, a cancel or a broken link, a hit has Tier.NONE too.
        runs: What the blocks travelled in; those tried again are in two.
        run_of_block: For each key the index of its last run, -1 if it was in none. With
            order=layer and relays layers of a block may come by several.
        served_by: By which path each hit came; the last of its layers, if they came by several.
            Through the agent of this node it is the path by which the agent got it, HELD if it
            had it already.
        plan: Why the blocks went which way, for people.
        estimate_s: How long that was expected to take; 0.0 without relays to choose from.
        bytes: Bytes of hits that are in the caller's memory.
        elapsed_s: From the call to the outcome.
        errors: What went wrong, as exceptions, once each; empty when all is well.
    """

    outcomes: list[FetchOutcome]
    tiers: list[Tier]
    runs: list[Run]
    run_of_block: list[int]
    bytes: int
    elapsed_s: float
    errors: list[Exception]
    served_by: list[ServedBy] = []
    plan: str = ""
    estimate_s: float = 0.0

    @property
    def hit_count(self) -> int:
        """Blocks that are in the caller's memory, verified."""
        return self.outcomes.count(FetchOutcome.HIT)

    @property
    def ok(self) -> bool:
        """Whether every block is a hit."""
        return self.hit_count == len(self.outcomes)

    def run(self, index: int) -> Run | None:
        """Who served a block, by which path and transport, and how long it took; None if
        nobody was asked for it."""
        return _run(self.runs, self.run_of_block[index])


class PutResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a put ended; fields as in `FetchResult`. `bytes` counts what was sent."""

    outcomes: list[PutOutcome]
    runs: list[Run]
    run_of_block: list[int]
    bytes: int
    elapsed_s: float
    errors: list[Exception]

    @property
    def ok(self) -> bool:
        """Whether every block is stored, by this put or an earlier one."""
        return all(
            outcome in (PutOutcome.STORED, PutOutcome.EXISTS, PutOutcome.CONFLICT)
            for outcome in self.outcomes
        )

    def run(self, index: int) -> Run | None:
        """As `FetchResult.run`."""
        return _run(self.runs, self.run_of_block[index])


def _run(runs: list[Run], number: int) -> Run | None:
    return runs[number] if number >= 0 else None


ResultT = TypeVar("ResultT", FetchResult, PutResult)


class Handle(Generic[ResultT]):
    """A request under way. All methods may be called from any thread.

    Attributes:
        outcome: Future of the result, set at the deadline at the latest. Never fails:
            whatever happens on the way becomes the outcome of a block.
        quiet: Future that is set when the caller's memory is free.
    """

    def __init__(self, deadline_s: float, on_cancel: Callable[[], object]) -> None:
        self.outcome: Future[ResultT] = Future()
        self.quiet: Future[None] = Future()
        # Or whoever gives up waiting (`wait_for` on a wrapped future) would cancel them, and
        # the memory would never be free.
        for future in (self.outcome, self.quiet):
            future.set_running_or_notify_cancel()
        self._deadline_s = deadline_s
        self._on_cancel = on_cancel

    def _set_quiet(self) -> None:
        """The memory is free, and nothing is left to cancel: whoever keeps the handle keeps the
        memory no longer."""
        self._on_cancel = _nothing
        self.quiet.set_result(None)

    def poll(self) -> bool:
        """Whether the outcome is known."""
        return self.outcome.done()

    def cancel(self) -> None:
        """Stop: what has not arrived yet is not waited for. The outcome follows at once."""
        self._on_cancel()

    def result(self) -> ResultT:
        """Wait for the outcome, until the deadline at the latest.

        Raises:
            TransportTimeout: The library's own thread did not get to run for seconds; the
                memory is not free until `quiet`.
        """
        try:
            return self.outcome.result(self._deadline_s + STUCK_AFTER_S)
        except TimeoutError:
            raise TransportTimeout(
                f"no outcome {STUCK_AFTER_S} s after the deadline of {self._deadline_s} s:"
                " the client's loop thread is starved"
            ) from None

    def wait_quiet(self, timeout_s: float | None = None) -> None:
        """Wait until the caller's memory is free.

        Args:
            timeout_s: How long at most; None for as long as it takes: milliseconds after the
                outcome, and 200 where a peer takes no more of a put.

        Raises:
            TransportTimeout: The memory is not free yet, and must not be touched.
        """
        try:
            self.quiet.result(timeout_s)
        except TimeoutError:
            raise TransportTimeout(
                f"not quiet after {timeout_s} s: the memory is still in use"
            ) from None


def _nothing() -> None:
    """Called where there is nothing to cancel any more."""


class FetchHandle(Handle[FetchResult]):
    """A fetch under way; tells when layers are complete.

    Args:
        layers: Number of layers asked for.
    """

    def __init__(self, deadline_s: float, on_cancel: Callable[[], object], layers: int) -> None:
        super().__init__(deadline_s, on_cancel)
        self._layer_count = layers
        self._layers_ready = 0
        self._layers_good = 0  # of those, how many were there before anything failed
        self._progress = threading.Condition()

    @property
    def layers_ready(self) -> int:
        """Leading layers (of those asked for) that no block waits for any more."""
        return self._layers_ready

    def wait_layer(self, layer: int) -> bool:
        """Wait until layer `layer` of every block has arrived or failed.

        Args:
            layer: Counted from the first layer asked for.

        Returns:
            True if it is there for every block. False if a block has failed (now or in an
            earlier layer); `result` tells which.
        """
        self._check_layer(layer)
        with self._progress:
            self._progress.wait_for(
                lambda: self._layers_ready > layer or self.outcome.done(),
                self._deadline_s + STUCK_AFTER_S,
            )
            return self._layers_good > layer

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self._layer_count:
            raise IndexError(f"layer {layer} of {self._layer_count} asked for")

    def _publish_layers(self, count: int, failed: bool) -> None:
        with self._progress:
            self._layers_ready = count
            if not failed:
                self._layers_good = count
            self._progress.notify_all()

    def _publish_outcome(self, result: FetchResult) -> None:
        with self._progress:
            self.outcome.set_result(result)
            self._progress.notify_all()


class PutHandle(Handle[PutResult]):
    """A put under way."""


class _LoopSide:
    """Waiting on a loop for a future that is set on that loop's own thread. Who gives up
    leaves nothing behind."""

    __slots__ = ("_future", "_waiters", "_watched")

    def __init__(self, future: Future[Any]) -> None:
        self._future = future
        self._waiters: set[asyncio.Future[None]] = set()
        self._watched = False

    async def wait(self) -> Any:
        """Wait for the future; its result."""
        if not self._future.done():
            if not self._watched:
                # Once, since it cannot be taken back.
                self._watched = True
                self._future.add_done_callback(self._wake)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return self._future.result()

    def _wake(self, done: Future[Any]) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class _Awaitable:
    """Awaiting for handles of an `AsyncClient`, on its loop."""

    outcome: Future[Any]
    quiet: Future[None]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._ends = _LoopSide(self.outcome), _LoopSide(self.quiet)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._ends[0].wait().__await__()

    async def quiesced(self) -> None:
        """Wait until the caller's memory is free."""
        await self._ends[1].wait()


class AsyncFetchHandle(_Awaitable, FetchHandle):
    """A fetch under way on a loop; `await handle` gives the result."""

    def __init__(self, deadline_s: float, on_cancel: Callable[[], object], layers: int) -> None:
        super().__init__(deadline_s, on_cancel, layers)
        self._layer_waiters: dict[asyncio.Future[None], int] = {}

    async def layer(self, layer: int) -> bool:
        """As `wait_layer`, without blocking the loop."""
        self._check_layer(layer)
        if self._layers_ready <= layer and not self.poll():
            waiter = asyncio.get_running_loop().create_future()
            self._layer_waiters[waiter] = layer
            try:
                await waiter
            finally:
                self._layer_waiters.pop(waiter, None)
        return self._layers_good > layer

    def _publish_layers(self, count: int, failed: bool) -> None:
        super()._publish_layers(count, failed)
        self._wake(count)

    def _publish_outcome(self, result: FetchResult) -> None:
        super()._publish_outcome(result)
        self._wake(self._layer_count)

    def _wake(self, count: int) -> None:
        for waiter, layer in self._layer_waiters.items():
            if layer < count and not waiter.done():
                waiter.set_result(None)


class AsyncPutHandle(_Awaitable, PutHandle):
    """A put under way on a loop; `await handle` gives the result."""


class Lease(msgspec.Struct, frozen=True):
    """A lease at one peer, as `LookupResult.leases` holds them.

    Attributes:
        duration_s: How long it holds, from the lookup on: less than was asked for where the
            peer grants no more.
    """

    endpoint: str
    number: int
    duration_s: float = 0.0


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent of this node had retained for a request.

    Attributes:
        lease: Keeps the blocks; number 0 if there is nothing.
        block_count: Blocks that are at the agent, or on their way to it.
        bytes: Of those that are there.
    """

    lease: Lease
    block_count: int
    bytes: int

    @property
    def found(self) -> bool:
        """Whether anything was retained, and is ours now."""
        return self.lease.number != 0


class LookupResult(msgspec.Struct, frozen=True, kw_only=True):
    """Which blocks are stored.

    Attributes:
        hits: One a key asked for: stored in all namespaces.
        prefix: Length of the leading run of hits.
        leases: What keeps the hits in place; give them to `release`.
        leased: How many leading blocks of the prefix they keep in place: all of it, unless a
            daemon refused the lease; 0 if none was asked for.
        unreachable: Endpoints that did not answer; their extents count as not stored.
        refused: Endpoints that said no, and why (the namespace is not open there, a limit);
            their extents count as not stored.
    """

    hits: list[bool]
    prefix: int
    leases: list[Lease]
    leased: int = 0
    unreachable: list[str]
    refused: dict[str, RefusedError] = {}
