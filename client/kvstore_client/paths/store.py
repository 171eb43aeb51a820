"""The way of a put: from here to storage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvstore.errors import RefusedError
from kvstore.messages import AckLevel, Put, PutDone, PutOutcome
from kvstore.protocol import Reply
from kvstore.transfer import PutTransfer
from kvstore_client.handles import Run
from kvstore_client.jobs import PutJob
from kvstore_client.link import PeerLink


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
        started_at = self._loop.time()
        done: asyncio.Future[None] = self._loop.create_future()
        idle: asyncio.Future[None] = self._loop.create_future()
        memory = [job.memory[index] for index in indices]
        keys = [job.keys[index] for index in indices]
        transfer = PutTransfer(job.namespace.geometry, memory)

        def settle(reply: Reply | None) -> None:
            if done.done():
                return
            done.set_result(None)
            self._account(link, job, transfer, indices, reply, started_at)
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
            deadline_ms=max(1, int((job.deadline_at - started_at) * 1e3)),
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

    def _account(
        self,
        link: PeerLink,
        job: PutJob,
        transfer: PutTransfer,
        indices: Sequence[int],
        reply: Reply | None,
        started_at: float,
    ) -> None:
        if isinstance(reply, PutDone):
            link.succeeded()
            if reply.report is not None:
                link.take_report(reply.report)
        elif isinstance(reply, Exception):
            job.add_error(reply)
            if isinstance(reply, RefusedError):
                link.succeeded()  # it answered
        elif transfer.sent_bytes == 0 and self._loop.time() >= job.deadline_at:
            link.failed()
        job.add_run(
            Run(
                path=self.name,
                transport=link.transport,
                peer=link.peer,
                block_count=len(indices),
                bytes=transfer.sent_bytes,
                elapsed_us=int((self._loop.time() - started_at) * 1e6),
            ),
            indices,
        )
