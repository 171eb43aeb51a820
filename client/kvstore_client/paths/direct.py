"""The path `direct`: storage to here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvstore.messages import Done, Fetch, FetchOutcome
from kvstore.protocol import Reply
from kvstore.transfer import FetchTransfer
from kvstore_client.jobs import FetchJob
from kvstore_client.link import PeerLink
from kvstore_client.paths.base import FetchPath
from kvstore_client.paths.exchange import Exchange


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
        exchange = Exchange(self._loop, self.name, link, job, indices)
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
                if isinstance(reply, Done):
                    for index, tier in zip(indices, reply.tiers, strict=False):
                        job.tiers[index] = tier
                if transfer.corrupt:
                    keys = [transfer.keys[index] for index in transfer.corrupt]
                    link.report_corrupt(job.namespace, keys)
                exchange.end(reply, transfer.received_bytes)
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
            deadline_ms=exchange.deadline_ms,
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
