"""The way of a put: from here to storage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from kvstore.messages import AckLevel, Put, PutOutcome
from kvstore.protocol import Reply
from kvstore.transfer import PutTransfer
from kvstore_client.jobs import PutJob
from kvstore_client.link import PeerLink
from kvstore_client.paths.direct import AgentPath
from kvstore_client.paths.exchange import Exchange


def _terms(link: PeerLink, job: PutJob, indices: Sequence[int]) -> dict[str, Any]:
    """What a PUT to the agent of this node says beside the blocks."""
    if job.offer is not None:
        layers = job.offer.layers
        return {
            "offer": True,
            "layer_first": layers.start,
            "layer_last": layers.stop,
            "lease_ms": job.offer.lease_ms,
        }
    return {"extents": job.extents(indices)} if link.is_agent else {}


class StorePath:
    """Announces blocks to a daemon and sends those that it wants."""

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
        """Put some blocks of a job to one peer; return when the peer reads from the caller's
        memory no more.

        Args:
            indices: Which blocks; not more than the peer takes in one request.
            checksums: Of all their layers, as a PUT announces them.
            on_outcome: Called once with the outcome of every block, unless the job ends first.
        """
        name = AgentPath.name if link.is_agent else self.name
        exchange = Exchange(self._loop, name, link, job, indices)
        done: asyncio.Future[None] = self._loop.create_future()
        idle: asyncio.Future[None] = self._loop.create_future()
        memory = [job.memory[index] for index in indices]
        keys = [job.keys[index] for index in indices]
        transfer = PutTransfer(job.geometry, memory)

        def settle(reply: Reply | None) -> None:
            if done.done():
                return
            done.set_result(None)
            exchange.end(reply, transfer.sent_bytes)
            if reply is None:
                return  # the job has ended and knows best
            transfer.fail_rest(PutOutcome.UNAVAILABLE)
            for index, outcome in zip(indices, transfer.outcomes, strict=True):
                on_outcome(index, PutOutcome(outcome))

        def stop() -> None:
            link.cancel_put(request_id, transfer)
            settle(None)

        def on_idle() -> None:
            if not idle.done():
                idle.set_result(None)

        message = Put(
            namespace=job.namespace.id,
            keys=keys,
            checksums=checksums,
            ack=ack,
            deadline_ms=exchange.deadline_ms,
            **_terms(link, job, indices),
        )
        request_id = link.put(message, transfer, settle)
        job.borrow(transfer, stop)
        try:
            await done
            job.finished(transfer)
            if not transfer.idle:
                transfer.on_idle = on_idle
                link.expect_idle(transfer)
                await idle
        finally:
            if not done.done() or done.cancelled():
                link.cancel_put(request_id, transfer)
            job.finished(transfer)
            if transfer.idle:
                job.let_go()
            else:  # this task was cancelled: the memory is free when the link lets go of it
                transfer.on_idle = job.let_go
