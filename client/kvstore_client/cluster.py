"""All daemons of a client, and how its requests are spread over them. On the loop's thread.

Rule: placement alone says where a block may be. A daemon that is down costs its own extents:
they are misses, and what is computed again goes to their second owner, where readers look
next.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

import msgspec

from kvstore.checksum import CHECKSUM_BYTES
from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError, Draining, KVStoreError, RefusedError, RemoteProtocolError
from kvstore.loadreport import LoadReport, ReportTable
from kvstore.messages import (
    LOOKUP_PROBES_MAX,
    AckLevel,
    Delete,
    DeleteReply,
    Empty,
    FetchOutcome,
    Lookup,
    LookupReply,
    PutOutcome,
    Release,
    ReleaseReply,
    Status,
)
from kvstore.wire import FrameType
from kvstore_client.handles import Lease, LookupResult
from kvstore_client.hashing import ChecksumMaker
from kvstore_client.jobs import FetchJob, PutJob
from kvstore_client.link import PeerLink
from kvstore_client.namespaces import Namespace
from kvstore_client.paths.direct import DirectPath
from kvstore_client.paths.store import StorePath
from kvstore_client.placement import OWNERS_MAX, Extent, Placement

logger = logging.getLogger(__name__)

# Bytes of one PUT: half a millisecond of hashing before the first of them can be sent.
PUT_BYTES_MAX = 16 * 1024 * 1024
# A key and its framing in the metadata of a request.
KEY_METADATA_BYTES = 68

# From the one that says most to the one that says least, when two daemons were asked.
_FETCH_RANKS = (FetchOutcome.CORRUPT, FetchOutcome.TIMEOUT, FetchOutcome.UNAVAILABLE)


class ClusterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a client introduces itself and how long it waits.

    Attributes:
        node_id: Name of this node, the same for all clients on it.
        token: Credentials.
        copies: Daemons that get each block: 1, or 2 to survive the loss of one.
        connect_timeout_s: For connecting, and for requests without payload.
        seed: Of backoff and ramp-in; None draws one.
    """

    node_id: str
    token: str = ""
    copies: int = 1
    connect_timeout_s: float = 1.0
    seed: int | None = None


class Cluster:
    """Links to all daemons, and the requests that run over them.

    Attributes:
        endpoints: Normal forms, in the caller's order.
        reports: Newest load report of each node.
    """

    def __init__(self, endpoints: Sequence[str], options: ClusterOptions) -> None:
        parsed = [parse_endpoint(text, "endpoints") for text in endpoints]
        self.endpoints = [str(endpoint) for endpoint in parsed]
        self.reports = ReportTable()
        self._parsed = parsed
        self._placement = Placement(self.endpoints)
        if not 1 <= options.copies <= OWNERS_MAX:
            raise ConfigError("copies", options.copies, f"must be 1 to {OWNERS_MAX}")
        self._options = options
        self._links: list[PeerLink] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: set[FetchJob | PutJob] = set()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop
        self._direct: DirectPath
        self._store: StorePath
        self._checksums: ChecksumMaker

    # --- life ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to connect; return when each daemon has answered or failed once, or
        takes too long."""
        self._loop = asyncio.get_running_loop()
        self._direct = DirectPath(self._loop)
        self._store = StorePath(self._loop)
        self._checksums = ChecksumMaker(self._loop)
        options = self._options
        session = os.urandom(16)
        request_ids = itertools.count(1)
        draws = random.Random(options.seed)
        self._links = [
            PeerLink(
                self._loop,
                endpoint,
                options.node_id,
                session,
                options.token,
                request_ids,
                options.connect_timeout_s,
                self._take_report,
                draws,
            )
            for endpoint in self._parsed
        ]
        tries = [asyncio.ensure_future(link.tried()) for link in self._links]
        try:
            await asyncio.wait(tries, timeout=2 * options.connect_timeout_s)
        finally:
            for waiter in tries:
                waiter.cancel()

    async def close(self) -> None:
        """End everything under way; its outcome is UNAVAILABLE."""
        self._closed = True
        now = self._loop.time()
        for job in list(self._jobs):
            if isinstance(job, FetchJob):
                job.end(FetchOutcome.UNAVAILABLE, now)
            else:
                job.end(PutOutcome.UNAVAILABLE, now)
        # All that matters happens before the first wait, in case that is cancelled.
        for link in self._links:
            link.close()
        for link in self._links:
            await link.ended()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._checksums.close()

    # --- small requests --------------------------------------------------------------------

    async def open_namespace(self, namespace: Namespace) -> None:
        """Open a namespace on every daemon, now or when it can be reached.

        Raises:
            RefusedError: A daemon says no; LayoutMismatch names the field.
        """
        results = await asyncio.gather(
            *(link.open_namespace(namespace) for link in self._links), return_exceptions=True
        )
        for link, result in zip(self._links, results, strict=True):
            if isinstance(result, RefusedError) and not isinstance(result, Draining):
                raise result
            if isinstance(result, KVStoreError):
                logger.warning("%s: opens %r later: %s", link.peer, namespace, result)
            elif isinstance(result, BaseException):
                raise result

    async def lookup(
        self,
        namespaces: Sequence[Namespace],
        keys: Sequence[bytes],
        first: int,
        chain: bool,
        lease_ms: int,
        timeout_s: float,
    ) -> LookupResult:
        """Which of `keys[first:]` are stored in all namespaces; see `AsyncClient.lookup`."""
        hits = bytearray(len(keys) - first)
        leases: list[Lease] = []
        failed: set[int] = set()
        ids = tuple(namespace.id for namespace in namespaces)
        deadline_at = self._loop.time() + timeout_s

        async def ask(peer: int, indices: Sequence[int], left_s: float) -> None:
            link = self._links[peer]
            if not link.allow():
                failed.add(peer)
                return
            message = Lookup(
                namespaces=ids, keys=[keys[first + i] for i in indices], lease_ms=lease_ms
            )
            try:
                reply = await link.call(FrameType.LOOKUP, message, left_s)
            except KVStoreError as error:
                logger.info("LOOKUP at %s: %s", link.peer, error)
                failed.add(peer)
                return
            assert isinstance(reply, LookupReply)
            bitmap = int.from_bytes(reply.bitmap, "little")
            for position, index in enumerate(indices):
                if bitmap >> position & 1:
                    hits[index] = 1
            if reply.lease:
                leases.append(Lease(self.endpoints[peer], reply.lease))

        extents = self._placement.split(keys, first, len(keys), chain)
        ranks = max((len(extent.owners) for extent in extents), default=0)
        keys_max = max(1, LOOKUP_PROBES_MAX // len(ids))
        for rank in range(ranks):
            # A daemon that hangs leaves time to ask the next.
            left_s = max(0.001, (deadline_at - self._loop.time()) / (ranks - rank))
            wanted = _by_peer(extents, rank, first, lambda index: not hits[index])
            await asyncio.gather(
                *(
                    ask(peer, part, left_s)
                    for peer, indices in wanted.items()
                    for part in _parts(indices, min(self._links[peer].keys_max, keys_max))
                )
            )
        misses = [index for index, hit in enumerate(hits) if not hit]
        return LookupResult(
            hits=[bool(hit) for hit in hits],
            prefix=misses[0] if misses else len(hits),
            leases=leases,
            unreachable=[self.endpoints[peer] for peer in sorted(failed)],
        )

    async def release(self, leases: Sequence[Lease]) -> int:
        """Give leases back; how many had held until now. The others have ended already."""
        by_endpoint: defaultdict[str, list[int]] = defaultdict(list)
        for lease in leases:
            by_endpoint[lease.endpoint].append(lease.number)

        async def ask(link: PeerLink, numbers: Sequence[int]) -> int:
            try:
                reply = await link.call(FrameType.RELEASE, Release(leases=tuple(numbers)))
            except KVStoreError as error:
                logger.info("RELEASE at %s: %s", link.peer, error)
                return 0
            assert isinstance(reply, ReleaseReply)
            return sum(reply.held)

        counts = await asyncio.gather(
            *(
                ask(link, part)
                for endpoint, link in zip(self.endpoints, self._links, strict=True)
                for part in _parts(by_endpoint[endpoint], link.keys_max)
            )
        )
        return sum(counts)

    async def delete(
        self, namespace: Namespace, keys: Sequence[bytes], first: int, chain: bool
    ) -> list[bool]:
        """Remove `keys[first:]` wherever they may be; whether each was there.

        Raises:
            KVStoreError: A daemon that may have some of them did not do it.
        """
        deleted = bytearray(len(keys) - first)
        extents = self._placement.split(keys, first, len(keys), chain)

        async def ask(peer: int, indices: Sequence[int]) -> None:
            message = Delete(namespace=namespace.id, keys=[keys[first + i] for i in indices])
            reply = await self._links[peer].call(FrameType.DELETE, message)
            assert isinstance(reply, DeleteReply)
            if len(reply.deleted) != len(indices):
                raise RemoteProtocolError(
                    f"DELETE: {len(reply.deleted)} answers for {len(indices)} keys"
                )
            for index, gone in zip(indices, reply.deleted, strict=True):
                deleted[index] |= gone

        calls = [
            ask(peer, part)
            for rank in range(max((len(extent.owners) for extent in extents), default=0))
            for peer, indices in _by_peer(extents, rank, first).items()
            for part in _parts(indices, self._links[peer].keys_max)
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [bool(gone) for gone in deleted]

    async def status(self) -> dict[str, Status | KVStoreError]:
        """What each daemon says of itself, or why it says nothing, by endpoint."""

        async def ask(link: PeerLink) -> Status | KVStoreError:
            try:
                reply = await link.call(FrameType.STATUS, Empty())
            except KVStoreError as error:
                return error
            assert isinstance(reply, Status)
            return reply

        replies = await asyncio.gather(*map(ask, self._links))
        return dict(zip(self.endpoints, replies, strict=True))

    # --- fetch -----------------------------------------------------------------------------

    def begin_fetch(self, job: FetchJob, keys: Sequence[bytes], first: int, chain: bool) -> None:
        """Run a fetch; its handle ends by itself.

        Args:
            keys, first, chain: Where the job's blocks lie: it is about `keys[first:]`.
        """

        async def run() -> None:
            owners = _owners(self._placement.split(keys, first, len(keys), chain))
            failed = [FetchOutcome.MISS] * len(owners)
            await self._fetch_from(job, owners, 0, range(len(owners)), failed)

        self._begin(job, run(), partial(job.end, FetchOutcome.TIMEOUT))

    async def _fetch_from(
        self,
        job: FetchJob,
        owners: Sequence[tuple[int, ...]],
        rank: int,
        indices: Iterable[int],
        failed: list[FetchOutcome],
    ) -> None:
        """Fetch blocks from their owner of this rank, and what it has not from the next."""
        by_peer: defaultdict[int, list[int]] = defaultdict(list)
        for index in indices:
            by_peer[owners[index][rank]].append(index)
        await _all(
            self._fetch_run(job, owners, rank, part, failed)
            for peer, group in by_peer.items()
            for part in _parts(group, self._links[peer].keys_max)
        )

    async def _fetch_run(
        self,
        job: FetchJob,
        owners: Sequence[tuple[int, ...]],
        rank: int,
        indices: Sequence[int],
        failed: list[FetchOutcome],
    ) -> None:
        again: list[int] = []

        def on_failed(index: int, outcome: FetchOutcome) -> None:
            failed[index] = _worse(failed[index], outcome)
            last = rank + 1 == len(owners[index])
            if last or job.ended or not job.may_retry(index):
                job.block_failed(index, failed[index])
            else:
                again.append(index)

        link = self._links[owners[indices[0]][rank]]
        async with link.fetch_slots:
            if job.ended:
                return
            refusal = link.refusal(job.namespace)
            if refusal is None and link.allow():
                await self._direct.fetch(link, job, indices, on_failed)
            else:
                job.add_error(refusal or link.unavailable())
                for index in indices:
                    on_failed(index, FetchOutcome.UNAVAILABLE)
        if again and not job.ended:
            await self._fetch_from(job, owners, rank + 1, again, failed)

    # --- put -------------------------------------------------------------------------------

    def begin_put(
        self, job: PutJob, keys: Sequence[bytes], first: int, chain: bool, ack: AckLevel
    ) -> None:
        """Run a put; its handle ends by itself. Arguments as in `begin_fetch`."""

        async def run() -> None:
            owners = _owners(self._placement.split(keys, first, len(keys), chain))
            copies = min(self._options.copies, len(self._links))
            await _all(
                self._put_to(job, owners, rank, range(len(owners)), ack, spare=copies == 1)
                for rank in range(copies)
            )

        self._begin(job, run(), partial(job.end, PutOutcome.TIMEOUT))

    async def _put_to(
        self,
        job: PutJob,
        owners: Sequence[tuple[int, ...]],
        rank: int,
        indices: Iterable[int],
        ack: AckLevel,
        spare: bool,
    ) -> None:
        """Put blocks to their owner of this rank, with `spare` else to the next."""
        by_peer: defaultdict[int, list[int]] = defaultdict(list)
        for index in indices:
            by_peer[owners[index][rank]].append(index)
        await _all(
            self._put_run(job, owners, rank, part, ack, spare)
            for peer, group in by_peer.items()
            for part in _parts(group, self._put_blocks_max(job.namespace, peer))
        )

    async def _put_run(
        self,
        job: PutJob,
        owners: Sequence[tuple[int, ...]],
        rank: int,
        indices: Sequence[int],
        ack: AckLevel,
        spare: bool,
    ) -> None:
        again: list[int] = []

        def on_outcome(index: int, outcome: PutOutcome) -> None:
            if outcome is PutOutcome.UNAVAILABLE and spare and rank + 1 < len(owners[index]):
                again.append(index)
            else:
                job.block_done(index, outcome)

        link = self._links[owners[indices[0]][rank]]
        async with link.put_slots:
            if job.ended:
                return
            checksums = await self._checksums.checksums(job, indices) if link.up else b""
            if job.ended:
                return
            refusal = link.refusal(job.namespace)
            if checksums and refusal is None and link.allow():
                await self._store.put(link, job, indices, checksums, ack, on_outcome)
            else:
                job.add_error(refusal or link.unavailable())
                for index in indices:
                    on_outcome(index, PutOutcome.UNAVAILABLE)
        if again and not job.ended:
            await self._put_to(job, owners, rank + 1, again, ack, spare)
        for index in again:
            job.block_done(index, PutOutcome.UNAVAILABLE)

    def _put_blocks_max(self, namespace: Namespace, peer: int) -> int:
        """Blocks of one PUT: bounded by the frame of its announcement, and by its bytes."""
        geometry, link = namespace.geometry, self._links[peer]
        each_bytes = KEY_METADATA_BYTES + geometry.layer_count * CHECKSUM_BYTES
        announced = (link.limits.metadata_bytes - 1024) // each_bytes
        sized = PUT_BYTES_MAX // geometry.block_bytes
        return max(1, min(link.keys_max, announced, sized))

    # --- the rest --------------------------------------------------------------------------

    def _take_report(self, report: LoadReport) -> None:
        self.reports.accept(self._loop.time(), report)

    def _begin(
        self, job: FetchJob | PutJob, run: Coroutine[Any, Any, None], end: Callable[[float], None]
    ) -> None:
        if self._closed or job.deadline_at <= job.started_at or not job.keys:
            run.close()
            if self._closed:
                job.fail_all()
            end(self._loop.time())
            return
        self._jobs.add(job)
        timer = self._loop.call_at(job.deadline_at, lambda: end(self._loop.time()))

        async def supervise() -> None:
            try:
                await run
            except Exception as error:
                logger.exception("internal error in a request")
                job.add_error(error)
                job.fail_all()
            finally:
                timer.cancel()
                self._jobs.discard(job)
                end(self._loop.time())

        task = self._loop.create_task(supervise())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _owners(extents: Iterable[Extent]) -> list[tuple[int, ...]]:
    """The owners of each block, in order."""
    return [extent.owners for extent in extents for _ in range(extent.first, extent.last)]


def _by_peer(
    extents: Iterable[Extent],
    rank: int,
    first: int,
    wanted: Callable[[int], bool] = lambda index: True,
) -> dict[int, list[int]]:
    """Indices of blocks by the peer that owns them in this rank."""
    by_peer: defaultdict[int, list[int]] = defaultdict(list)
    for extent in extents:
        if rank < len(extent.owners):
            indices = filter(wanted, range(extent.first - first, extent.last - first))
            by_peer[extent.owners[rank]].extend(indices)
    return {peer: indices for peer, indices in by_peer.items() if indices}


def _parts(items: Sequence[int], size_max: int) -> list[Sequence[int]]:
    return [items[at : at + size_max] for at in range(0, len(items), size_max)]


def _worse(known: FetchOutcome, outcome: FetchOutcome) -> FetchOutcome:
    """What to say of a block that failed at two daemons."""
    for rank in _FETCH_RANKS:
        if rank in (known, outcome):
            return rank
    return FetchOutcome.MISS


async def _all(runs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await all of them; the usual one alone costs no task."""
    started = list(runs)
    if len(started) == 1:
        await started[0]
    else:
        await asyncio.gather(*started)
