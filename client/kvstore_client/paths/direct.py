"""The path `direct`: storage to here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvstore.errors import RefusedError
from kvstore.messages import CorruptReport, Done, Fetch, FetchOutcome
from kvstore.protocol import Reply
from kvstore.transfer import FetchTransfer
from kvstore.wire import FrameType
from kvstore_client.handles import Run
from kvstore_client.jobs import FetchJob
from kvstore_client.link import PeerLink
from kvstore_client.paths.base import FetchPath


class DirectPath(FetchPath):
    """Asks a daemon, receives into the caller's memory, verifies there."""

    name = "direct"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    async def fetch(
        self,
        link: PeerLink,
        job: FetchJob,
        indices: Sequence[int],
        on_failed: Callable[[int, FetchOutcome], None],
    ) -> None:
        started_at = self._loop.time()
        done: asyncio.Future[None] = self._loop.create_future()
        transfer = FetchTransfer(
            job.namespace.id,
            [job.keys[index] for index in indices],
            job.pieces(len(indices)),
            [job.memory[index] for index in indices],
            lambda index, group: job.piece_arrived(indices[index], group),
            lambda index, outcome: on_failed(indices[index], FetchOutcome(outcome)),
        )

        def settle(reply: Reply | None) -> None:
            if not done.done():
                done.set_result(None)
                self._account(link, job, transfer, indices, reply, started_at)
                if reply is not None:  # else the job has ended and knows best
                    transfer.fail_rest(FetchOutcome.UNAVAILABLE)

        def stop() -> None:
            link.cancel_fetch(request_id)
            settle(None)

        message = Fetch(
            namespace=job.namespace.id,
            keys=list(transfer.keys),
            layer_first=job.layers.start,
            layer_last=job.layers.stop,
            group_layers=job.group_layers,
            deadline_ms=max(1, int((job.deadline_at - started_at) * 1e3)),
        )
        request_id = link.fetch(message, transfer, settle)
        job.borrow(transfer, stop)
        try:
            await done
        finally:
            if not done.done() or done.cancelled():
                link.cancel_fetch(request_id)
            job.finished(transfer)
            # Over a byte stream the peer writes through our own reader, which was diverted.
            job.let_go()

    def _account(
        self,
        link: PeerLink,
        job: FetchJob,
        transfer: FetchTransfer,
        indices: Sequence[int],
        reply: Reply | None,
        started_at: float,
    ) -> None:
        service_us = 0
        if isinstance(reply, Done):
            link.succeeded()
            service_us = reply.service_us
            for index, tier in zip(indices, reply.tiers, strict=False):
                job.tiers[index] = tier
            if reply.report is not None:
                link.take_report(reply.report)
        elif isinstance(reply, Exception):
            job.add_error(reply)
            if isinstance(reply, RefusedError):
                link.succeeded()  # it answered
            # A TransportError took the link down, which counts as a failure already.
        elif transfer.received_bytes == 0 and self._loop.time() >= job.deadline_at:
            link.failed()
        if transfer.corrupt:
            keys = [transfer.keys[index] for index in transfer.corrupt]
            report = CorruptReport(namespace=job.namespace.id, keys=keys)
            link.tell(FrameType.CORRUPT_REPORT, report)
        job.add_run(
            Run(
                path=self.name,
                transport=link.transport,
                peer=link.peer,
                block_count=len(indices),
                bytes=transfer.received_bytes,
                elapsed_us=int((self._loop.time() - started_at) * 1e6),
                service_us=service_us,
            ),
            indices,
        )
