"""What an agent serves: blocks of its pool, which is filled from other nodes.

Who may do what::

                               other nodes                engines of this node
    FETCH source=relay, peer   if they may read the pool  yes
    FETCH source=any, PUT,     no                         yes
    DELETE, CLAIM
    LOOKUP                     if they may read the pool  yes
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from kvstore.allowance import Allowance
from kvstore.blocksource import Answer, Asker, BlockSource, FetchStream, PutStream, RelayLoad
from kvstore.checksum import block_seed, layer_checksum
from kvstore.errors import (
    Busy,
    KVStoreError,
    LimitExceeded,
    PermissionDenied,
    RefusedError,
    UnknownNamespace,
    Unsupported,
)
from kvstore.layout import BLOCK_BYTES_MAX, Layout, PieceMap, check_layout, check_pool
from kvstore.loadreport import BufferLoad, DiskLoad, LinkLoad
from kvstore.messages import (
    REASON_MAX,
    AckLevel,
    Claim,
    ClaimReply,
    CorruptReply,
    CorruptReport,
    Fetch,
    FetchSource,
    LookupReply,
    NamespaceInfo,
    Pool,
    PoolInfo,
    Put,
    Retain,
)
from kvstore.wire import FrameType
from kvstore_client.agent.fills import Fills
from kvstore_client.agent.leases import PassedLeases
from kvstore_client.agent.memory import HeldBlock
from kvstore_client.agent.pacing import PacedFetch, Pacer
from kvstore_client.agent.puts import OfferPut, StoragePut
from kvstore_client.agent.retention import Retentions
from kvstore_client.agent.rooms import WatchedPool
from kvstore_client.agent.storagelink import StorageLink, StorageMeter
from kvstore_client.agent.streams import PoolFetch
from kvstore_client.agent.terms import FetchTerms
from kvstore_client.cluster import Cluster
from kvstore_client.handles import Lease
from kvstore_client.jobs import Route
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import PlacedKeys

logger = logging.getLogger(__name__)

# As many as a daemon has.
NAMESPACES_MAX = 4096
# No new relay work below the first share of the pool that could be used at once, until there is
# the second again: relays would take turns in finding no room.
UNWILLING_SHARE = 1 / 8
WILLING_SHARE = 1 / 4
# Own loads have priority 0 at daemons: a node's decode traffic comes before what it relays.
RELAY_PRIORITY = 1
# What reports of corrupt blocks make the loop hash in a second; as of a daemon.
CHECK_BYTES_PER_S = BLOCK_BYTES_MAX
# Of a lookup that is passed on to storage.
LOOKUP_TIMEOUT_S = 1.0
# An offer that does not say how long it is kept.
OFFER_LEASE_MS = 10_000


class AgentSource(BlockSource):
    """Blocks of a pool, and all that is passed on to storage.

    Ownership: borrows `pool` until `stop` has returned.

    Args:
        cluster: Not started yet; the caller starts and closes it.
        pool: Where blocks lie.
        pool_readers: Node ids that may read a pool through this agent, by its name; a pool
            that is not named may be read by any.
        verify_relayed: Whether what only passes through is verified here too.
    """

    def __init__(
        self,
        cluster: Cluster,
        pool: WatchedPool,
        pool_readers: Mapping[str, frozenset[str]],
        verify_relayed: bool,
    ) -> None:
        self.pool = pool
        self.retentions = Retentions(pool)
        self.fills: Fills
        self._cluster = cluster
        self._readers = pool_readers
        self._verify = verify_relayed
        self._counts: Counter[str] = Counter()
        self._namespaces: dict[bytes, Namespace] = {}
        self._opening: Counter[bytes] = Counter()  # requests that wait for storage
        self._at_relays: set[bytes] = set()  # namespaces that are open there too
        self._leases = PassedLeases()
        self._relays: set[PoolFetch] = set()
        self._willing = True
        self._checks = Allowance(CHECK_BYTES_PER_S, CHECK_BYTES_PER_S)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop
        self._storage_link: StorageLink
        self._pacer: Pacer | None = None

    # --- life ------------------------------------------------------------------------------

    def start(self, pacer: Pacer | None = None) -> None:
        """Begin to answer, on the running loop; the cluster has been started.

        Args:
            pacer: Of what is sent to other nodes; None if nothing bounds it.
        """
        self._pacer = pacer
        self._loop = loop = asyncio.get_running_loop()
        inflight = self._cluster.relays.inflight
        inflight.direct = meter = StorageMeter(inflight.gain)
        self._storage_link = StorageLink(meter, loop.time())
        self.fills = Fills(loop, self.pool, self._cluster, self._verify, self._counts)

    async def stop(self) -> None:
        """Cancel what is under way; no session is left."""
        self.fills.stop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def task_count(self) -> int:
        """Requests to storage that nobody waits for."""
        return len(self._tasks)

    # --- namespaces and pools --------------------------------------------------------------

    def open_namespace(self, pool: str, layout: Layout, asker: Asker) -> Answer[NamespaceInfo]:
        check_pool(pool)
        check_layout(layout)
        self._check_reader(pool, asker)
        namespace = Namespace(pool, layout)
        known = self._namespaces.get(namespace.id)
        if known is not None and (namespace.id in self._at_relays or not asker.local):
            return _info(known)
        count = len(self._namespaces) + len(self._opening)
        if known is None and count >= NAMESPACES_MAX:
            raise LimitExceeded(f"{count} namespaces are open, the limit is {NAMESPACES_MAX}")
        return self._open(known or namespace, asker.local)

    async def _open(self, namespace: Namespace, relays: bool) -> NamespaceInfo:
        name = namespace.id
        self._opening[name] += 1
        try:
            await self._cluster.open_namespace(namespace, relays)
            self._namespaces.setdefault(name, namespace)
        finally:
            self._opening[name] -= 1
            if not self._opening[name]:
                del self._opening[name]
                if name not in self._namespaces:
                    # Or what others are refused would be kept, and asked for again, for ever.
                    self._cluster.forget_namespace(namespace)
        if relays:
            self._at_relays.add(name)
        return _info(namespace)

    def namespaces(self, pool: str) -> list[NamespaceInfo]:
        return [_info(known) for known in self._namespaces.values() if pool in ("", known.pool)]

    def administer_pool(self, request: Pool) -> list[PoolInfo]:
        raise Unsupported("pools are administered at the daemons, this is the agent of a node")

    def layer_bytes(self, namespace: bytes) -> tuple[int, ...]:
        return self._known(namespace).layout.layer_bytes

    def _known(self, namespace: bytes) -> Namespace:
        known = self._namespaces.get(namespace)
        if known is None:
            raise UnknownNamespace(f"namespace {namespace.hex()[:12]} is not open here")
        return known

    def _opened(self, namespace: bytes, asker: Asker) -> Namespace:
        """A namespace that was opened for the asker: that is when its rights were checked."""
        if namespace not in asker.namespaces:
            raise UnknownNamespace(f"namespace {namespace.hex()[:12]} was not opened for you")
        return self._known(namespace)

    def _check_reader(self, pool: str, asker: Asker) -> None:
        readers = self._readers.get(pool)
        if readers is not None and not asker.local and asker.node_id not in readers:
            self._counts["readers_refused"] += 1
            raise PermissionDenied(f"{asker.node_id} may not read pool {pool} here")

    def _check_local(self, asker: Asker, what: str) -> None:
        if not asker.local:
            raise PermissionDenied(f"{what}: only engines of this node, on its unix socket, may")

    # --- lookups and leases ----------------------------------------------------------------

    def lookup(
        self,
        namespaces: Sequence[bytes],
        keys: Sequence[bytes],
        lease_ms: int,
        owner: Asker,
        extents: Sequence[tuple[int, bytes]] = (),
    ) -> Answer[LookupReply]:
        opened = [self._opened(namespace, owner) for namespace in namespaces]
        if lease_ms:
            self._leases.check_room(self._loop.time())
        chain = PlacedKeys(keys, extents)
        chain.heads()
        return self._lookup(opened, chain, lease_ms, owner)

    async def _lookup(
        self, namespaces: Sequence[Namespace], chain: PlacedKeys, lease_ms: int, owner: Asker
    ) -> LookupReply:
        ends_at = self._loop.time() + lease_ms / 1e3 + LOOKUP_TIMEOUT_S
        found = await self._cluster.lookup(namespaces, chain, lease_ms, LOOKUP_TIMEOUT_S)
        bitmap = bytearray((len(found.hits) + 7) // 8)
        for index, hit in enumerate(found.hits):
            bitmap[index >> 3] |= hit << (index & 7)
        number = 0
        # The asker takes a lease for one of the whole leading run of hits.
        if found.leases and found.leased == found.prefix:
            number = 2 * self._leases.add(owner, found.leases, ends_at) + 1
        elif found.leases:
            self._give_back(found.leases)
        return LookupReply(
            bitmap=bytes(bitmap),
            lease=number,
            unreachable=tuple(found.unreachable),
            refused=tuple((name, str(error)[:REASON_MAX]) for name, error in found.refused.items()),
        )

    def release(self, leases: Sequence[int], owner: Asker) -> Answer[list[bool]]:
        self.retentions.expire(self._loop.time())
        # Claims have even numbers, leases of lookups odd ones.
        numbers = dict.fromkeys(leases)  # each once
        passed = {number: self._leases.take(number >> 1, owner) for number in numbers if number & 1}
        held = {
            number: self.retentions.release(number >> 1, owner)
            for number in numbers
            if not number & 1
        }
        if not any(passed.values()):
            return [held.get(number, False) for number in leases]
        return self._release(leases, held, passed)

    async def _release(
        self,
        numbers: Sequence[int],
        held: dict[int, bool],
        passed: Mapping[int, Sequence[Lease]],
    ) -> list[bool]:
        async def ask(number: int, leases: Sequence[Lease]) -> None:
            held[number] = await self._cluster.release(leases) == len(leases)

        await asyncio.gather(*(ask(number, found) for number, found in passed.items() if found))
        return [held.get(number, False) for number in numbers]

    def claim(self, request: Claim, owner: Asker) -> ClaimReply:
        now = self._loop.time()
        self.retentions.expire(now)
        claimed = self.retentions.claim(
            request.request, request.attempt, owner, request.lease_ms / 1e3, now
        )
        if claimed is None:
            return ClaimReply()
        return ClaimReply(
            lease=2 * claimed.number,
            block_count=len(claimed.blocks),
            bytes=sum(map(_here_bytes, claimed.blocks)),
        )

    def owner_gone(self, owner: Asker) -> None:
        self.retentions.owner_gone(owner)
        leases = self._leases.take_all(owner)
        if leases:
            self._give_back(leases)

    def _give_back(self, leases: Sequence[Lease]) -> None:
        async def release() -> None:
            await self._cluster.release(leases)

        self._spawn(release())

    # --- blocks ----------------------------------------------------------------------------

    def fetch(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        asker: Asker,
        request: Fetch,
    ) -> FetchStream:
        opened = self._opened(namespace, asker)
        if request.hops:
            raise RefusedError("one hop only: this request was passed on by another node already")
        relayed = request.source is FetchSource.RELAY
        if request.source is FetchSource.ANY and not asker.local:
            raise PermissionDenied(
                "this is the agent of another node: it relays (name it in relays=, or as peer=),"
                " and loads for the engines of its own node only"
            )
        if relayed and not self.willing:
            self._counts["relay_refused_busy"] += 1
            raise Busy(
                f"no relay work at present: {self.pool.reclaimable_bytes} of"
                f" {self.pool.total_bytes} bytes could be used"
            )
        chain = PlacedKeys(keys, request.extents)
        stream = PoolFetch(
            self.pool, self.fills, opened, chain, pieces, self._terms(request), self._counts
        )
        if relayed:
            self._relays.add(stream)
        self._counts[f"{_PREFIXES[request.source]}_requests"] += 1
        self._counts[f"{_PREFIXES[request.source]}_blocks"] += len(keys)
        if self._pacer is not None and not asker.local:
            return PacedFetch(stream, self._pacer)
        return stream

    def _terms(self, request: Fetch) -> FetchTerms:
        now = self._loop.time()
        retain = request.retain
        if request.source is FetchSource.RELAY:
            route = Route(direct_only=True, priority=RELAY_PRIORITY, hops=1)
        else:
            route = Route(decode_node=request.decode_node, retain=retain, priority=request.priority)
        peer_route = None
        if request.peer and request.source is FetchSource.ANY:
            peer_route = Route(
                peer=request.peer, wait_ms=request.wait_ms, priority=request.priority
            )
        return FetchTerms(
            source=request.source,
            deadline_at=now + request.deadline_ms / 1e3,
            wait_until=now + request.wait_ms / 1e3,
            route=route,
            peer_route=peer_route,
            retain=partial(self._retain, retain) if retain is not None else None,
        )

    def _retain(self, retain: Retain, blocks: Sequence[HeldBlock]) -> None:
        now = self._loop.time()
        self.retentions.expire(now)
        ends_at = now + retain.lease_ms / 1e3
        self.retentions.retain(retain.request, retain.attempt, blocks, ends_at)

    def put(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        checksums: bytes,
        ack: AckLevel,
        asker: Asker,
        request: Put,
    ) -> PutStream:
        self._check_local(asker, "PUT")
        opened = self._opened(namespace, asker)
        clock = self._loop.time
        if not request.offer:
            chain = PlacedKeys(keys, request.extents)
            deadline_s = request.deadline_ms / 1e3
            return StoragePut(
                self.pool,
                self._cluster,
                opened,
                chain,
                checksums,
                ack,
                clock,
                deadline_s,
                self._counts,
            )
        layer_last = request.layer_last or opened.geometry.layer_count
        self.retentions.expire(clock())
        return OfferPut(
            self.pool,
            self.retentions,
            opened,
            keys,
            range(request.layer_first, layer_last),
            checksums,
            clock,
            (request.lease_ms or OFFER_LEASE_MS) / 1e3,
            request.retain,
            self._verify,
            self._counts,
        )

    def delete(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        asker: Asker,
        extents: Sequence[tuple[int, bytes]] = (),
    ) -> Answer[bytes]:
        self._check_local(asker, "DELETE")
        opened = self._opened(namespace, asker)
        chain = PlacedKeys(keys, extents)
        chain.heads()
        return self._delete(opened, chain)

    async def _delete(self, namespace: Namespace, chain: PlacedKeys) -> bytes:
        self._drop(namespace, chain.wanted)
        deleted = await self._cluster.delete(namespace, chain)
        self._drop(namespace, chain.wanted)  # what has come from storage meanwhile
        return bytes(deleted)

    def _drop(self, namespace: Namespace, keys: Sequence[bytes]) -> None:
        for key in keys:
            block = self.pool.find(namespace.id, key)
            if block is not None:
                self.pool.drop(block)

    def check(self, namespace: bytes, keys: Sequence[bytes]) -> bytes:
        """Verify our copies now and drop the bad ones; storage then looks at its own.

        What is beyond `CHECK_BYTES_PER_S` counts as good.
        """
        opened, now = self._known(namespace), self._loop.time()
        dropped = bytearray(len(keys))
        for index, key in enumerate(keys):
            block = self.pool.find(namespace, key)
            if block is None or not block.ready:
                continue
            if not self._checks.take(now, opened.geometry.block_bytes):
                self._counts["checks_skipped"] += 1
            elif not _is_good(block):
                self.pool.drop(block)
                dropped[index] = 1
        bad = [key for key, gone in zip(keys, dropped, strict=True) if gone]
        self._counts["blocks_corrupt"] += len(bad)
        if bad:
            self._spawn(self._pass_on(CorruptReport(namespace=namespace, keys=bad)))
        return bytes(dropped)

    async def _pass_on(self, report: CorruptReport) -> None:
        # To all of them: a report does not say where the blocks lie.
        await self._cluster.ask_all(FrameType.CORRUPT_REPORT, report, CorruptReply)

    # --- load ------------------------------------------------------------------------------

    @property
    def willing(self) -> bool:
        """Whether new relay work is welcome."""
        share = WILLING_SHARE if not self._willing else UNWILLING_SHARE
        self._willing = self.pool.reclaimable_bytes >= share * self.pool.total_bytes
        return self._willing

    def buffer_load(self) -> BufferLoad:
        now = self._loop.time()
        self.retentions.expire(now)
        self._leases.expire(now)
        return BufferLoad(free_bytes=self.pool.reclaimable_bytes, total_bytes=self.pool.total_bytes)

    def disk_load(self) -> DiskLoad:
        return DiskLoad()

    def links(self) -> tuple[LinkLoad, ...]:
        return (self._storage_link.sample(self._loop.time()),)

    def relay_load(self) -> RelayLoad:
        self._relays = {stream for stream in self._relays if not stream.finished}
        queued_bytes = sum(stream.queued_bytes for stream in self._relays)
        return RelayLoad(queued_bytes=queued_bytes, willing=self.willing)

    @property
    def degraded(self) -> bool:
        return not self._cluster.reachable

    def counters(self) -> dict[str, int]:
        retentions, pool = self.retentions, self.pool
        return {
            **dict.fromkeys(_FROM_ZERO, 0),
            **self._counts,
            **retentions.counters,
            **{f"storage_{name}": count for name, count in self._cluster.counters.items()},
            "held_blocks": pool.block_count,
            "pinned_blocks": pool.pinned_count,
            "retained_blocks": retentions.block_count,
            "evicted_blocks": pool.evicted_count,
            "leased_bytes": pool.leased_bytes,
            "fills_under_way": len(self.fills.under_way),
            "leases_passed": len(self._leases),
        }

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except KVStoreError as error:
                logger.info("at storage: %s", error)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            work.close()  # it has not begun if the task was cancelled at once

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(ended)


# What is told also while it has never happened, so that who watches need not know when.
_FROM_ZERO = (
    *("own_requests", "own_blocks", "own_bytes"),
    *("relay_requests", "relay_blocks", "relay_bytes_out"),
    *("relay_joined", "relay_refused_busy", "relay_no_room"),
    *("peer_requests", "peer_blocks", "peer_bytes_out"),
    *("offer_bytes", "put_bytes", "put_corrupt", "fills", "fills_cancelled"),
    *("claims", "claims_missed", "retentions_expired", "retentions_refused"),
    *("readers_refused", "checks_skipped", "blocks_corrupt"),
    *("storage_fetch_bytes_direct", "storage_fetch_bytes_relay", "storage_fetch_bytes_peer"),
    *("storage_blocks_moved", "storage_corrupt_blocks", "storage_breaker_openings"),
    *("storage_reconnects", "storage_reports_refused"),
)

_PREFIXES = {FetchSource.ANY: "own", FetchSource.RELAY: "relay", FetchSource.PEER: "peer"}


def _info(namespace: Namespace) -> NamespaceInfo:
    return NamespaceInfo(
        namespace=namespace.id,
        pool=namespace.pool,
        generation=namespace.generation,
        layout=namespace.layout,
    )


def _here_bytes(block: HeldBlock) -> int:
    """Bytes of the layers that are here."""
    geometry = block.namespace.geometry
    if block.complete:
        return geometry.block_bytes
    return sum(size for layer, size in enumerate(geometry.layer_bytes) if block.ready >> layer & 1)


def _is_good(block: HeldBlock) -> bool:
    """Whether the layers that are here match their checksums."""
    seed = block_seed(block.namespace.id, block.key)
    offsets = block.namespace.geometry.offsets
    for layer, (begin, end) in enumerate(pairwise(offsets)):
        if block.ready >> layer & 1:
            known = int.from_bytes(block.checksums_of(layer, layer + 1), "little")
            if layer_checksum(block.view[begin:end], seed, layer) != known:
                return False
    return True


__all__ = ["AgentSource"]
