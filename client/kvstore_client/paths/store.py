"""The way of a put: from here to storage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.errors import LocalProtocolError
from kvstore.messages import AckLevel, Put, PutDone, PutOutcome
from kvstore.protocol import Reply
from kvstore.transfer import PutTransfer
from kvstore_client.jobs import PutJob
from kvstore_client.link import PeerLink
from kvstore_client.linkmemory import NamedMemory, named_in_request
from kvstore_client.paths.direct import AgentPath
from kvstore_client.paths.exchange import Exchange

# Outcomes of blocks whose bytes were taken.
_TAKEN = (PutOutcome.STORED, PutOutcome.CORRUPT)


def _terms(link: PeerLink, job: PutJob, indices: Sequence[int]) -> dict[str, Any]:
    """What a PUT to the agent of this node says beside the blocks."""
    if job.offer is not None:
        layers = job.offer.layers
        return {
            "offer": True,
            "layer_first": layers.start,
            "layer_last": layers.stop,
            "lease_ms": job.offer.lease_ms,
            "retain": job.offer.retain,
        }
    return {"extents": job.extents(indices)} if link.is_agent else {}


class StorePath:
    """Announces blocks to a daemon and sends those that it wants, or lets it take them."""

    name = "direct"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    async def put(
        self,
        link: PeerLink,
        job: PutJob,
        indices: Sequence[int],
        checksums: bytes,
        ack: AckLevel,
        on_outcome: Callable[[int, PutOutcome], None],
    ) -> None:
        """Put some blocks of a job to one peer; return when their outcomes are known, and nothing
        of them is half sent. A peer to which memory was named may read there for longer.

        Args:
            indices: Which blocks; not more than the peer takes in one request.
            checksums: Of all their layers, as a PUT announces them.
            on_outcome: Called once with the outcome of every block, unless the job ends first.
        """
        memory = [job.memory[index] for index in indices]
        try:
            named = link.memory.name(memory) if link.memory else None
        except LocalProtocolError as error:
            job.add_error(error)
            for index in indices:
                on_outcome(index, PutOutcome.UNAVAILABLE)
            return
        sending = _Sending(self._loop, self.name, link, job, indices, named, on_outcome)
        await sending.run(checksums, ack)


class _Sending:
    """One PUT under way."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        link: PeerLink,
        job: PutJob,
        indices: Sequence[int],
        named: NamedMemory | None,
        on_outcome: Callable[[int, PutOutcome], None],
    ) -> None:
        memory = [job.memory[index] for index in indices]
        self._loop = loop
        self._link = link
        self._job = job
        self._indices = indices
        self._on_outcome = on_outcome
        self._done: asyncio.Future[None] = loop.create_future()
        self._transfer = PutTransfer(job.geometry, memory)
        self._named = named
        transport = self._named.transport if self._named else link.transport
        path = AgentPath.name if link.is_agent else name
        self._exchange = Exchange(loop, path, link, job, indices, transport)
        self._request_id = 0

    async def run(self, checksums: bytes, ack: AckLevel) -> None:
        """As `StorePath.put`."""
        job, link, transfer, named = self._job, self._link, self._transfer, self._named
        message = Put(
            namespace=job.namespace.id,
            keys=[job.keys[index] for index in self._indices],
            checksums=checksums,
            ack=ack,
            deadline_ms=self._exchange.deadline_ms,
            memory=named.memory if named else None,
            **_terms(link, job, self._indices),
        )
        with named_in_request(named):
            self._request_id = link.put(message, transfer, self._answered)
        job.borrow(transfer, self._stop)
        try:
            await self._done
            job.finished(transfer)
            if not transfer.idle:
                await self._sent()
        finally:
            if not self._done.done() or self._done.cancelled():
                self._cancel()
            job.finished(transfer)
            if named is not None:
                # Who takes the blocks elsewhere need not wait: two may read the same memory.
                named.when_free(job.let_go)
            elif transfer.idle:
                job.let_go()
            else:  # this task was cancelled: the memory is free when the link lets go of it
                transfer.on_idle = job.let_go

    async def _sent(self) -> None:
        """Wait until what is half sent was taken."""
        idle: asyncio.Future[None] = self._loop.create_future()
        self._transfer.on_idle = lambda: None if idle.done() else idle.set_result(None)
        self._link.expect_idle(self._transfer)
        await idle

    def _settle(self, reply: Reply | None) -> None:
        if self._done.done():
            return
        self._done.set_result(None)
        transfer = self._transfer
        self._exchange.end(
            reply, transfer.sent_bytes if self._named is None else self._taken(reply)
        )
        if reply is None:
            return  # the job has ended and knows best
        transfer.fail_rest(PutOutcome.UNAVAILABLE)
        for index, outcome in zip(self._indices, transfer.outcomes, strict=True):
            self._on_outcome(index, PutOutcome(outcome))

    def _taken(self, reply: Reply | None) -> int:
        """Bytes of memory that the peer took by itself, by what it says of it."""
        outcomes = reply.outcomes if isinstance(reply, PutDone) else b""
        return sum(map(outcomes.count, _TAKEN)) * self._job.geometry.block_bytes

    def _answered(self, reply: Reply) -> None:
        self._settle(reply)
        if self._named is not None:
            self._named.answered(reply)

    def _cancel(self) -> None:
        self._link.cancel_put(self._request_id, self._transfer)
        if self._named is not None:
            self._link.expect_free(self._named)

    def _stop(self) -> None:
        self._cancel()
        self._settle(None)
