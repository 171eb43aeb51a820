"""One request of a job at one peer: what its end tells of the peer, and what the job notes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from kvstore.errors import RefusedError, TransportError
from kvstore.messages import Done, PutDone
from kvstore.protocol import Reply
from kvstore_client.handles import Run
from kvstore_client.jobs import Job
from kvstore_client.link import PeerLink


class Exchange:
    """A request that begins now.

    Args:
        path: Name of the path, for attribution.
        indices: Blocks of the job that the request is about.
        transport: What moves them.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        path: str,
        link: PeerLink,
        job: Job,
        indices: Sequence[int],
        transport: str,
    ) -> None:
        self._path = path
        self._link = link
        self._job = job
        self._indices = indices
        self._transport = transport
        self._begun_at = loop.time()
        self._clock_us = _clock_us()

    @property
    def deadline_ms(self) -> int:
        """What is left of the job's time, as far as the peer allows so much."""
        left_ms = int((self._job.deadline_at - self._begun_at) * 1e3)
        return max(1, min(left_ms, self._link.limits.deadline_ms))

    def end(self, reply: Reply | None, bytes: int, sound: bool = True) -> None:
        """The request has ended.

        Args:
            reply: The peer's last word, or what came in its place; None if it was not waited
                for: the job has ended, or the blocks go another way.
            bytes: Payload that has moved.
            sound: Whether what has moved is worth anything; if not, the peer counts as failing.
        """
        link, job = self._link, self._job
        queued_us = service_us = 0
        if not sound:
            link.failed()
        if isinstance(reply, Done | PutDone):
            if sound:
                link.succeeded()
            if reply.report is not None:
                link.take_report(reply.report)
            for text in reply.errors:
                job.add_error(TransportError(f"{link.peer}: {text}"))
            if isinstance(reply, Done):
                queued_us, service_us = reply.queued_us, reply.service_us
        elif isinstance(reply, RefusedError):
            job.add_error(reply)
            link.refused(reply, (job.namespace,))
        elif isinstance(reply, Exception):
            job.add_error(reply)  # it took the link down, which counts as a failure already
        elif job.timed_out:
            link.timed_out(self._begun_at)
        run = Run(
            path=self._path,
            transport=self._transport,
            peer=link.peer,
            block_count=len(self._indices),
            bytes=bytes,
            elapsed_us=_clock_us() - self._clock_us,
            queued_us=queued_us,
            service_us=service_us,
        )
        job.add_run(run, self._indices)


def _clock_us() -> int:
    # Not the loop's time, which goes in steps of a millisecond with uvloop.
    return time.perf_counter_ns() // 1000
