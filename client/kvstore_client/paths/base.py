"""The seam between a job and a way for its bytes.

Rule: on failure a path gives its blocks back, so that another path or another daemon can be
tried; it never raises for what a peer, a disk or a network did.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.errors import LocalProtocolError
from kvstore.messages import Done, Fetch, FetchOutcome, ServedBy
from kvstore.protocol import Reply
from kvstore.transfer import PENDING
from kvstore_client.jobs import FetchJob
from kvstore_client.link import PeerLink
from kvstore_client.linkmemory import NamedMemory, named_in_request
from kvstore_client.paths.exchange import Exchange


class FetchPath(abc.ABC):
    """One way from storage, or another node, into the caller's memory."""

    #: Name in attribution and metrics.
    name: str
    #: The same for `FetchResult.served_by`.
    way: ServedBy

    @abc.abstractmethod
    def terms(self, link: PeerLink, job: FetchJob, indices: Sequence[int]) -> dict[str, Any]:
        """What a FETCH by this path says beside what is asked for: fields by name."""


class Shipment:
    """Layers of some blocks of a job, on their way from one peer by one path: one request.

    Args:
        indices: Which blocks; not more than the peer takes in one request.
        layers: Which layers of each of them, see `FetchJob.transfer`. What is said of a block
            is meant of these.
        on_failed: Called with the outcome of every block that is no hit, once, as soon as it is
            known. Whether it is final is the caller's decision.
        on_bytes: Called with the bytes that have arrived, a frame at a time.

    Attributes:
        on_known: Called when every block has its outcome and only the last word is missing.
        size_bytes: What was asked for.
        arrived_bytes: What of that has come.
        expected_s: How long it was expected to take; 0.0 if that was not known. Whoever sends
            it says so.
        begun_at: Loop time of the request.
        moved_at: Loop time at which the last of it came, or of the request.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        path: FetchPath,
        link: PeerLink,
        job: FetchJob,
        indices: Sequence[int],
        layers: range,
        on_failed: Callable[[int, FetchOutcome], None],
        on_bytes: Callable[[int], None],
    ) -> None:
        self.indices = indices
        self.layers = layers
        self.on_known: Callable[[], None] | None = None
        self.arrived_bytes = 0
        self.expected_s = 0.0
        self.begun_at = self.moved_at = loop.time()
        self._loop = loop
        self._path = path
        self._link = link
        self._job = job
        self._on_bytes = on_bytes
        self._done: asyncio.Future[None] = loop.create_future()
        self._exchange: Exchange | None = None  # while it is not sent
        self._on_failed = on_failed
        self._given_up = False
        self._transfer = job.transfer(indices, layers, self._failed)
        self._transfer.on_bytes = self._arrived
        self.size_bytes = len(indices) * self._transfer.pieces.span_bytes
        self._request_id = 0
        self._named: NamedMemory | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended or was taken back."""
        return self._done.done()

    def pending(self) -> list[int]:
        """Blocks that have no outcome yet."""
        return [
            index
            for index, outcome in zip(self.indices, self._transfer.outcomes, strict=True)
            if outcome == PENDING
        ]

    async def freed(self) -> None:
        """Wait until no peer writes on its behalf any more, after `run`."""
        if self._named is not None:
            await asyncio.shield(self._named.free)

    async def run(self) -> None:
        """Send the request; return when it has ended, or was taken back.

        Pieces that arrive and verify are reported to the job at once.
        """
        job, link, transfer = self._job, self._link, self._transfer
        pieces = transfer.pieces
        self.begun_at = self.moved_at = self._loop.time()
        transfer.trusting = not link.verify
        try:
            named = self._named = link.memory.name(transfer.memory) if link.memory else None
        except LocalProtocolError as error:
            job.add_error(error)
            self._done.set_result(None)
            transfer.fail_rest(FetchOutcome.UNAVAILABLE)
            return
        transport = named.transport if named else link.transport
        self._exchange = Exchange(self._loop, self._path.name, link, job, self.indices, transport)
        message = Fetch(
            namespace=job.namespace.id,
            keys=list(transfer.keys),
            layer_first=pieces.layer_first,
            layer_last=pieces.layer_last,
            group_layers=job.group_layers,
            deadline_ms=self._exchange.deadline_ms,
            memory=named.memory if named else None,
            **self._path.terms(link, job, self.indices),
        )
        with named_in_request(named):
            self._request_id = link.fetch(message, transfer, self._answered)
        job.borrow(transfer, self._stop)
        try:
            await self._done
        finally:
            if not self._done.done() or self._done.cancelled():
                self._cancel()
            job.finished(transfer)
            # Over a byte stream the peer writes through our own reader, which was diverted.
            self._when_free(job.let_go)

    def take_back(self, then: Callable[[int], None]) -> int:
        """Stop it, so that its blocks can go another way: from now on no byte of it counts.

        Args:
            then: Called with each block that has no outcome yet, when its memory is free: at
                once where it came through a socket.

        Returns:
            How many blocks that are.
        """
        if self._done.done():
            return 0
        left = self.pending()
        self._stop()

        def free() -> None:
            for index in left:
                then(index)

        self._when_free(free)
        return len(left)

    def _when_free(self, call: Callable[[], None]) -> None:
        """Call when no peer writes on behalf of this request any more."""
        if self._named is None:
            call()
        else:
            self._named.when_free(call)

    def _cancel(self) -> None:
        self._link.cancel_fetch(self._request_id)
        if self._named is not None:
            self._link.expect_free(self._named)

    def _answered(self, reply: Reply) -> None:
        """The last word of the peer, or what came in its place."""
        self._settle(reply)
        if self._named is not None:
            self._named.answered(reply)

    def _arrived(self, size_bytes: int) -> None:
        self.arrived_bytes += size_bytes
        self.moved_at = self._loop.time()
        self._on_bytes(size_bytes)
        if self.on_known is not None and PENDING not in self._transfer.outcomes:
            self.on_known()

    def _failed(self, index: int, outcome: FetchOutcome) -> None:
        # The last word on what was taken back may still come.
        if self._given_up:
            return
        if outcome is FetchOutcome.MISS:
            self._on_failed(index, outcome)  # its peer has said that nothing of it will come
        else:
            self._when_free(lambda: self._on_failed(index, outcome))

    def _stop(self) -> None:
        self._given_up = True
        if self._request_id:
            self._cancel()
        self._settle(None)

    def _settle(self, reply: Reply | None) -> None:
        if self._done.done():
            return
        self._done.set_result(None)
        job, transfer, exchange = self._job, self._transfer, self._exchange
        if exchange is None:
            return
        if isinstance(reply, Done):
            if self._path.way is ServedBy.UNKNOWN:
                job.plan = reply.plan
            for index, tier in zip(self.indices, reply.tiers, strict=False):
                job.tiers[index] = tier
        self._attribute(reply)
        if transfer.corrupt:
            # Other layers of a block may have come damaged by another request before.
            bad = {self.indices[position] for position in transfer.corrupt}
            bad -= job.corrupt[self._link.peer]
            job.corrupt[self._link.peer] |= bad
            if bad:
                self._link.report_corrupt(job.namespace, [job.keys[index] for index in sorted(bad)])
        # A daemon may have a few bad blocks; a relay that passes on bad ones is sick.
        sound = not (transfer.corrupt and self._path.way is ServedBy.RELAY)
        exchange.end(reply, transfer.received_bytes, sound)
        if reply is not None:  # else the job has ended, or the blocks go another way
            transfer.fail_rest(FetchOutcome.UNAVAILABLE)

    def _attribute(self, reply: Reply | None) -> None:
        served_by = self._job.served_by
        told = reply.served_by if isinstance(reply, Done) else b""
        way = self._path.way
        for position, index in enumerate(self.indices):
            if self._transfer.outcomes[position] == FetchOutcome.HIT:
                # An agent of this node says how it came by what it gave to us.
                passed = told and way is ServedBy.UNKNOWN
                served_by[index] = told[position] if passed else way
