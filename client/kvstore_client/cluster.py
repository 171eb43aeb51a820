"""All daemons of a client, and how its requests are spread over them. On the loop's thread.

Rule: placement alone says where a block may be. A daemon that is down costs its own extents:
they are misses, and what is computed again goes to their second owner, where readers look
next.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from kvstore.checksum import CHECKSUM_BYTES
from kvstore.errors import (
    ConfigError,
    Draining,
    KVStoreError,
    LocalProtocolError,
    RefusedError,
    Unsupported,
)
from kvstore.layout import Geometry
from kvstore.loadreport import LoadReport, ReportTable
from kvstore.messages import (
    AckLevel,
    Claim,
    ClaimReply,
    Delete,
    DeleteReply,
    FetchOutcome,
    Message,
    PutOutcome,
    Release,
    ReleaseReply,
    Role,
)
from kvstore.protocol import Reply
from kvstore.wire import FrameType
from kvstore_client.agreement import Agreement
from kvstore_client.clusteroptions import ClusterOptions
from kvstore_client.counters import count_job
from kvstore_client.handles import Lease, LookupResult
from kvstore_client.hashing import ChecksumMaker
from kvstore_client.jobs import FetchJob, PutJob, Route
from kvstore_client.link import KEY_METADATA_BYTES, PeerLink, closed_error
from kvstore_client.lookup import ClusterLookup
from kvstore_client.memory import Region, Regions
from kvstore_client.namespaces import FINAL_REFUSALS, Namespace
from kvstore_client.opening import LinkSetup, parse_peer
from kvstore_client.paths.base import FetchPath
from kvstore_client.paths.direct import AgentPath, DirectPath
from kvstore_client.paths.relay import RelayPath
from kvstore_client.paths.store import StorePath
from kvstore_client.peers import PeerLinks, PeerWay, ready
from kvstore_client.placement import (
    OWNERS_MAX,
    Chain,
    PlacedKeys,
    Placement,
    block_heads,
    block_owners,
    by_owner,
    extents_of,
    parts,
)
from kvstore_client.places import place_bytes_of
from kvstore_client.relays import Relays, check_relays
from kvstore_client.selector import PathMeter, Policy, Span
from kvstore_client.sharing import Sharing
from kvstore_client.spread import Spread, Ways
from kvstore_client.views import Views, view_at
from kvstore_client.voices import Voices

ReplyT = TypeVar("ReplyT", bound=Message)

# How long a peer may take at the end to let go of memory.
CLOSE_S = 1.0

logger = logging.getLogger(__name__)

# Bytes of one PUT: half a millisecond of hashing before the first of them can be sent.
PUT_BYTES_MAX = 16 * 1024 * 1024
# Of an extent in the metadata of a request to an agent, beside the key of its head.
EXTENT_METADATA_BYTES = 4


class Cluster(Ways):
    """Links to all daemons, and the requests that run over them.

    Attributes:
        endpoints: Normal forms, in the caller's order.
        reports: Newest load report of each node.
        regions: Memory that peers may reach by themselves.
        counters: What has been counted since the beginning; see `AsyncClient.counters`.
    """

    def __init__(self, endpoints: Sequence[str], options: ClusterOptions) -> None:
        parsed = [parse_peer(text, "endpoints") for text in endpoints]
        self.endpoints = [str(endpoint) for endpoint in parsed]
        self.reports = ReportTable()
        self.regions = Regions()
        self.counters: Counter[str] = Counter()
        self._parsed = parsed
        self._placement = Placement([endpoint.place for endpoint in parsed])
        if not 1 <= options.copies <= OWNERS_MAX:
            raise ConfigError("copies", options.copies, f"must be 1 to {OWNERS_MAX}")
        self._options = options
        self._relay_endpoints = [
            parse_peer(text, "relays") for text in check_relays(options.relays)
        ]
        for endpoint in self._relay_endpoints:
            if str(endpoint) in self.endpoints:
                raise ConfigError("relays", endpoint, "must not be one of the daemons")
        self._links: list[PeerLink] = []
        self.relays = Relays(
            options.node_id,
            options.policy,
            [],
            [],
            self.reports,
            random.Random(options.seed),
            self.counters,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: set[FetchJob | PutJob] = set()
        self._started = self._closed = False
        self._voices: Voices
        self._loop: asyncio.AbstractEventLoop
        self._direct = DirectPath()
        self._agent = AgentPath()
        self._relay = RelayPath()
        self._store: StorePath
        self._agreement: Agreement
        self._sharing: Sharing
        self._peers: PeerLinks | None = None
        self._namespaces: dict[bytes, Namespace] = {}
        # The newest question for each name whose answer is waited for.
        self._claims: dict[tuple[str, int], object] = {}
        self._checksums: ChecksumMaker

    # --- life ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to connect; return when each daemon has answered or failed once, or
        takes too long."""
        self._started = True
        self._loop = asyncio.get_running_loop()
        self._store = StorePath(self._loop)
        self._agreement = Agreement(self._loop, self._options.transport, self.regions)
        self._sharing = Sharing(self._loop, self.regions, self._all_links)
        self._checksums = ChecksumMaker(self._loop)
        options = self._options
        draws = random.Random(options.seed)
        setup = LinkSetup(
            node_id=options.node_id,
            role=options.role,
            token=options.token,
            request_ids=itertools.count(1),
            timeout_s=options.connect_timeout_s,
            on_report=self._take_report,
            draws=draws,
            counters=self.counters,
            agreement=self._agreement,
            verify=options.verify,
        )
        # One hop only: what an agent takes for storage must be no agent itself.
        daemon_only = options.role is Role.AGENT
        self._links = [
            PeerLink(self._loop, endpoint, setup, daemon_only) for endpoint in self._parsed
        ]
        self._voices = Voices(self.reports, self.counters, self._links)
        agents = [PeerLink(self._loop, endpoint, setup) for endpoint in self._relay_endpoints]
        self.relays = Relays(
            options.node_id,
            options.policy,
            self._links,
            agents,
            self.reports,
            draws,
            self.counters,
        )
        self._peers = PeerLinks(self._loop, setup, self._namespaces)
        tries = [asyncio.ensure_future(link.tried()) for link in (*self._links, *agents)]
        try:
            await asyncio.wait(tries, timeout=2 * options.connect_timeout_s)
        finally:
            for waiter in tries:
                waiter.cancel()
        self.relays.judge()

    async def close(self) -> None:
        """End everything under way; its outcome is UNAVAILABLE."""
        self._closed = True
        if not self._started:
            return
        self._sharing.close()
        for job in list(self._jobs):
            job.give_up(closed_error())
        links = self._all_links()
        for link in links:
            link.close()
        # All of it, even if some of it fails or a wait is cancelled.
        async with contextlib.AsyncExitStack() as ending:
            ending.push_async_callback(self._sharing.unmap)
            ending.callback(self._agreement.close)
            ending.callback(self._sharing.withdraw)
            ending.callback(self._checksums.close)
            ending.push_async_callback(self._end_tasks)
            for link in links:
                await link.ended()
            if self._peers is not None:
                await self._peers.ended()
            await self._agreement.settled(CLOSE_S)
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CLOSE_S)

    async def _end_tasks(self) -> None:
        """A peer that hangs and may touch memory yet keeps it for good, but not us."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- memory ----------------------------------------------------------------------------

    async def allocate(self, size_bytes: int) -> Region:
        """New memory that all peers reach; see `AsyncClient.allocate`."""
        return await self._sharing.allocate(size_bytes)

    async def add_region(self, region: Region) -> Region:
        """Let all peers reach a region, now or when their links come up."""
        return await self._sharing.add(region)

    async def free_region(self, region: Region) -> None:
        """Take a region back from all peers; see `AsyncClient.free`."""
        await self._sharing.free(region)

    def _all_links(self) -> list[PeerLink]:
        return [*self._links, *self._others()]

    # --- small requests --------------------------------------------------------------------

    async def open_namespace(self, namespace: Namespace, relays: bool = True) -> None:
        """Open a namespace on every daemon, now or when it can be reached.

        A daemon that refuses costs its own blocks, as one that is down does; it is asked again
        when the namespace is wanted.

        Args:
            relays: Whether at other nodes' agents too. An agent that was itself asked by one
                does not: two of them would ask each other without end.

        Raises:
            LayoutMismatch: A daemon has the pool pinned to another layout; names the field.
            PermissionDenied: A daemon says that we may not.
            RefusedError: Every daemon refuses; what the first of them says.
        """
        self._namespaces[namespace.id] = namespace
        results, refused = await asyncio.gather(
            asyncio.gather(
                *(link.open_namespace(namespace) for link in self._links), return_exceptions=True
            ),
            asyncio.gather(
                *(link.open_namespace(namespace) for link in (self._others() if relays else ())),
                return_exceptions=True,
            ),
        )
        for link, refusal in zip(self._others(), refused, strict=False):
            if isinstance(refusal, KVStoreError):
                logger.warning("%s: does not relay %r: %s", link.peer, namespace, refusal)
        refusals = 0
        for link, result in zip(self._links, results, strict=True):
            if isinstance(result, FINAL_REFUSALS):
                raise result
            if isinstance(result, KVStoreError):
                logger.warning("%s: opens %r later: %s", link.peer, namespace, result)
            elif isinstance(result, BaseException):
                raise result
            refusals += isinstance(result, RefusedError) and not isinstance(result, Draining)
        if refusals == len(self._links) and isinstance(results[0], RefusedError):
            raise results[0]

    def forget_namespace(self, namespace: Namespace) -> None:
        """Open a namespace nowhere any more: nobody uses it."""
        self._namespaces.pop(namespace.id, None)
        for link in self._all_links():
            link.forget_namespace(namespace)

    async def lookup(
        self,
        namespaces: Sequence[Namespace],
        chain: Chain | PlacedKeys,
        lease_ms: int,
        timeout_s: float,
    ) -> LookupResult:
        """Which blocks of a chain are stored in all namespaces; see `AsyncClient.lookup`."""
        deadline_at = self._loop.time() + timeout_s
        lookup = ClusterLookup(self._loop, self._links, namespaces, chain, lease_ms, deadline_at)
        found = await lookup.run(self._placement.extents(chain))
        self.counters["lookup_requests"] += 1
        self.counters["lookup_keys"] += len(found.hits)
        self.counters["lookup_hits"] += sum(found.hits)
        return found

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
                for part in parts(by_endpoint[endpoint], link.keys_max())
            )
        )
        return sum(counts)

    async def delete(self, namespace: Namespace, chain: Chain | PlacedKeys) -> list[bool]:
        """Remove the blocks of a chain wherever they may be; whether each was there.

        Raises:
            KVStoreError: A daemon that may have some of them did not do it.
        """
        keys = chain.wanted
        deleted = bytearray(len(keys))
        extents = self._placement.extents(chain)

        async def ask(link: PeerLink, indices: Sequence[int]) -> None:
            message = Delete(
                namespace=namespace.id,
                keys=[keys[index] for index in indices],
                extents=extents_of(block_heads(chain), indices) if link.is_agent else (),
            )
            reply = await link.call(FrameType.DELETE, message)
            assert isinstance(reply, DeleteReply)
            for index, gone in zip(indices, reply.deleted, strict=True):
                deleted[index] |= gone

        calls = [
            ask(link, part)
            for rank in range(max((len(extent.owners) for extent in extents), default=0))
            for peer, indices in by_owner(extents, rank).items()
            for link in (self._links[peer],)
            for part in parts(indices, link.keys_max())
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [bool(gone) for gone in deleted]

    async def ask_all(
        self, type: FrameType, message: Message, reply_type: type[ReplyT]
    ) -> dict[str, ReplyT | KVStoreError]:
        """The same question for every daemon: its reply or why there is none, by endpoint."""

        async def ask(link: PeerLink) -> ReplyT | KVStoreError:
            try:
                reply = await link.call(type, message)
            except KVStoreError as error:
                return error
            assert isinstance(reply, reply_type)
            return reply

        replies = await asyncio.gather(*map(ask, self._links))
        return dict(zip(self.endpoints, replies, strict=True))

    def newest_reports(self) -> dict[str, LoadReport | None]:
        """The newest load report of each daemon, None before the first, by endpoint."""
        return {
            endpoint: self.reports.report(link.welcome.node_id) if link.welcome else None
            for endpoint, link in zip(self.endpoints, self._links, strict=True)
        }

    async def claim(self, request: str, attempt: int, lease_ms: int) -> ClaimReply:
        """Take over what the agent of this node has retained; see `AsyncClient.claim`."""
        link = self._agent_link("claim")
        message = Claim(request=request, attempt=attempt, lease_ms=lease_ms)
        name, asked = (request, attempt), object()

        def on_late(reply: Reply) -> None:
            # Who asks again meanwhile gets the same lease.
            again = self._claims.get(name, asked) is not asked
            if isinstance(reply, ClaimReply) and reply.lease and not again:
                link.tell(FrameType.RELEASE, Release(leases=(reply.lease,)))

        self._claims[name] = asked
        try:
            reply = await link.call(FrameType.CLAIM, message, on_late=on_late)
        finally:
            if self._claims.get(name) is asked:
                del self._claims[name]
        assert isinstance(reply, ClaimReply)
        return reply

    def _agent_link(self, what: str) -> PeerLink:
        if not self.attached:
            raise _no_agent(what)
        return self._links[0]

    # --- views -----------------------------------------------------------------------------

    async def view(
        self,
        namespace: Namespace,
        chain: Chain | PlacedKeys,
        lease_ms: int,
        timeout_s: float,
        verify: bool,
    ) -> Views:
        """Leased views of blocks; see `AsyncClient.view`."""
        views = Views(len(chain.wanted))
        try:
            await _all(
                view_at(
                    self._loop, link, namespace, chain, part, views, lease_ms, timeout_s, verify
                )
                for peer, indices in by_owner(self._placement.extents(chain), 0).items()
                for link in (self._links[peer],)
                for part in parts(indices, link.keys_max())
            )
        except BaseException:
            views.abandon()
            raise
        return views

    # --- fetch -----------------------------------------------------------------------------

    def begin_fetch(self, job: FetchJob) -> None:
        """Run a fetch; its handle ends by itself."""
        self._begin(job, partial(self._fetch, job))

    def estimate_s(self, namespace: Namespace, chain: Chain, layers: range, route: Route) -> float:
        """How long a fetch would take if it began now; infinite if nothing can be reached."""
        spans = _spans(block_owners(self._placement.extents(chain)))
        offsets = namespace.geometry.offsets
        block_bytes = offsets[layers.stop] - offsets[layers.start]
        return self.relays.estimate_s(spans, block_bytes, route, self._loop.time())

    async def _fetch(self, job: FetchJob) -> None:
        route = job.route
        asked = route.decode_node
        if route.peer and not self.attached:
            await self._fetch_from_peer(job)
            return
        owners = block_owners(self._placement.extents(job.chain))
        choice = len(self.relays) > 0 and not route.direct_only
        eager = choice and self._options.policy is Policy.BALANCED
        spread = Spread(self._loop, self, job, owners, chunked=choice, eager=eager)
        if not choice:
            if route.retain is not None and not (self.attached or self._is_agent):
                job.add_error(_nobody_retains(asked))
            spread.send(range(len(owners)))
        else:
            node_id = self.relays.node_id(route.decode_node) if route.decode_node else ""
            if node_id != route.decode_node:
                job.route = route = route._replace(decode_node=node_id)
            if not node_id and route.retain is not None and not self._is_agent:
                job.add_error(_nobody_retains(asked))
            now = self._loop.time()
            plan = self.relays.plan(_spans(owners), job.span_bytes, route, now)
            job.plan, job.estimate_s = plan.reason, plan.estimate_s
            for first, last, _, relay in plan.runs:
                spread.send(range(first, last), relay)
            for first, last, daemon in plan.unreachable:
                job.add_error(self._links[daemon].unavailable())
                for index in range(first, last):
                    spread.fail(index, FetchOutcome.UNAVAILABLE)
        await spread.run()

    async def _fetch_from_peer(self, job: FetchJob) -> None:
        assert self._peers is not None
        try:
            with self._peers.used(job.route.peer) as link:
                await ready(link, job.namespace)
                owners = [(0,)] * len(job.keys)
                spread = Spread(self._loop, PeerWay(link), job, owners, chunked=False)
                spread.send(range(len(owners)))
                await spread.run()
        except KVStoreError as error:
            job.give_up(error)

    # --- the ways of a spread --------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        """Whether any daemon can be asked now."""
        return any(link.usable for link in self._links)

    @property
    def _is_agent(self) -> bool:
        """Whether this is an agent's own: it keeps what it loads for its peers itself."""
        return self._options.role is Role.AGENT

    @property
    def attached(self) -> bool:
        """Whether the only endpoint is the agent of this node, or a unix socket of which nobody
        knows yet who listens there."""
        if len(self._links) != 1:
            return False
        (link,) = self._links
        return link.is_agent or (link.welcome is None and link.endpoint.scheme == "unix")

    @property
    def copied(self) -> bool:
        return self._options.copies > 1

    def daemon_way(self, owner: int) -> tuple[FetchPath, PeerLink, PathMeter]:
        link = self._links[owner]
        path = self._agent if link.is_agent else self._direct
        return path, link, self.relays.inflight.direct

    def relay_way(self, node_id: str) -> tuple[FetchPath, PeerLink, PathMeter]:
        return self._relay, self.relays.link(node_id), self.relays.inflight.relays[node_id]

    def spare_relay(self, job: FetchJob) -> str:
        meter = self.relays.spare(job.route, self._loop.time())
        return meter.node_id if meter is not None else ""

    def _others(self) -> list[PeerLink]:
        """Links beside those to daemons."""
        peers = self._peers.links() if self._peers is not None else []
        return [*self.relays.links, *peers]

    # --- put -------------------------------------------------------------------------------

    def begin_put(self, job: PutJob, ack: AckLevel) -> None:
        """Run a put; its handle ends by itself."""
        if job.offer is not None and not self.attached:
            job.give_up(_no_agent("offer"))
            return

        async def run() -> None:
            owners = block_owners(self._placement.extents(job.chain))
            copies = min(self._options.copies, len(self._links))
            await _all(
                self._put_to(job, owners, rank, range(len(owners)), ack, spare=copies == 1)
                for rank in range(copies)
            )

        self._begin(job, run)

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
        place_bytes = place_bytes_of(job.memory[0])
        await _all(
            self._put_run(job, owners, rank, part, ack, spare)
            for peer, group in by_peer.items()
            for part in parts(group, self._put_blocks_max(job.geometry, peer, place_bytes))
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
            if self._over(job):
                return
            checksums = await self._checksums.checksums(job, indices) if link.up else b""
            if self._over(job):
                return
            refusal = link.refusal(job.namespace)
            if checksums and refusal is None and link.allow():
                await self._store.put(link, job, indices, checksums, ack, on_outcome)
            else:
                job.add_error(refusal or link.unavailable())
                for index in indices:
                    on_outcome(index, PutOutcome.UNAVAILABLE)
        if again and not self._over(job):
            await self._put_to(job, owners, rank + 1, again, ack, spare)
        for index in again:
            job.block_done(index, PutOutcome.UNAVAILABLE)

    def _put_blocks_max(self, geometry: Geometry, peer: int, place_bytes: int) -> int:
        """Blocks of one PUT: bounded by the frame of its announcement, and by its bytes."""
        link = self._links[peer]
        each_bytes = KEY_METADATA_BYTES + geometry.layer_count * CHECKSUM_BYTES
        if link.is_agent:
            each_bytes += KEY_METADATA_BYTES + EXTENT_METADATA_BYTES  # the head, if each is one
        if link.memory is not None:
            each_bytes += place_bytes
        sized = PUT_BYTES_MAX // geometry.block_bytes
        return max(1, min(link.keys_max(each_bytes), sized))

    # --- the rest --------------------------------------------------------------------------

    def _take_report(self, link: PeerLink, report: LoadReport) -> None:
        self._voices.take_report(self._loop.time(), link, report)

    def _over(self, job: FetchJob | PutJob) -> bool:
        """Whether nothing is to be sent for a job any more."""
        return job.ended or self._loop.time() >= job.deadline_at

    def _begin(self, job: FetchJob | PutJob, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        job.on_end = partial(count_job, self.counters, job)
        if self._closed:
            job.give_up(closed_error())
            return
        if not job.keys or self._over(job):
            job.time_out()
            return
        self._jobs.add(job)
        timer = self._loop.call_at(job.deadline_at, job.time_out)

        async def supervise() -> None:
            try:
                if not job.ended:  # it may have ended, and the client with it, before this turn
                    await run()
            except Exception as error:
                logger.exception("internal error in a request")
                job.give_up(error)
            finally:
                timer.cancel()
                self._jobs.discard(job)
                job.time_out()  # of what was not even sent; all else is known

        task = self._loop.create_task(supervise())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _nobody_retains(decode_node: str) -> LocalProtocolError:
    if not decode_node:
        return LocalProtocolError("retain_for: without decode_node nobody keeps the blocks")
    return LocalProtocolError(
        f"decode_node={decode_node!r} is none of our relays, or has never answered: nobody keeps"
        " the blocks; it is the --node-id of the other node's agent, or its endpoint"
    )


def _no_agent(what: str) -> Unsupported:
    return Unsupported(
        f"{what}: only the agent of this node does that, and it is not there; its unix socket,"
        " alone, is the endpoint to give"
    )


def _spans(owners: Sequence[tuple[int, ...]]) -> list[Span]:
    """Consecutive blocks with the same first owner."""
    spans: list[Span] = []
    first = 0
    for index in range(1, len(owners) + 1):
        if index == len(owners) or owners[index][0] != owners[first][0]:
            spans.append(Span(first, index, owners[first][0]))
            first = index
    return spans


async def _all(runs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await all of them; the usual one alone costs no task."""
    started = list(runs)
    if len(started) == 1:
        await started[0]
    else:
        await asyncio.gather(*started)
