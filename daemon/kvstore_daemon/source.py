"""The storage engine as a block source: what `kvstored` serves with an arena alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.allowance import Allowance
from kvstore.blocksource import Asker, BlockSource, FetchStream, PutStream
from kvstore.errors import LocalProtocolError, Unsupported
from kvstore.layout import BLOCK_BYTES_MAX, Layout, PieceMap
from kvstore.loadreport import BufferLoad, DiskLoad
from kvstore.messages import (
    LEASE_MS_MAX,
    AckLevel,
    Fetch,
    NamespaceInfo,
    Pool,
    PoolAction,
    PoolInfo,
    Put,
)
from kvstore_daemon.engine.eviction import GuardedLru
from kvstore_daemon.engine.policy import EvictionPolicy
from kvstore_daemon.engine.store import BlockStore
from kvstore_daemon.streams import ArenaFetch, ArenaPut

# What reports of corrupt blocks make the loop hash in a second, and at once after a while
# without any: about 10 ms. A block of the largest size that there is still gets its turn.
CHECK_BYTES_PER_S = BLOCK_BYTES_MAX


class ArenaSource(BlockSource):
    """Blocks in one arena.

    Ownership: borrows `arena` until the last chunk was released and the last put has ended.

    Args:
        arena: Writable memory, touched before; nobody else writes there.
        clock: Seconds of a monotonic clock, for leases.
        make_policy: Makes the eviction policy of a pool, from its capacity in bytes and the
            ticks that all pools share.
        capacities: Quotas of pools in bytes, from the configuration.
        pins: Generations that pools are pinned to, from the configuration.
    """

    def __init__(
        self,
        arena: memoryview,
        *,
        clock: Callable[[], float] = time.monotonic,
        make_policy: Callable[[int, Iterable[int]], EvictionPolicy] = GuardedLru,
        capacities: Mapping[str, int] | None = None,
        pins: Mapping[str, bytes] | None = None,
    ) -> None:
        ticks = itertools.count()
        self.store = BlockStore(arena, lambda capacity: make_policy(capacity, ticks))
        self._clock = clock
        self._checks = Allowance(CHECK_BYTES_PER_S, CHECK_BYTES_PER_S)
        capacities, pins = capacities or {}, pins or {}
        for name in sorted({*capacities, *pins}):
            self.store.pools.configure(name, capacities.get(name, 0), pins.get(name, b""))

    def open_namespace(
        self, pool: str, layout: Layout, asker: Asker | None = None
    ) -> NamespaceInfo:
        return self.store.pools.open(pool, layout).info()

    def namespaces(self, pool: str) -> list[NamespaceInfo]:
        return [namespace.info() for namespace in self.store.pools.namespaces(pool)]

    def administer_pool(self, request: Pool) -> list[PoolInfo]:
        pools, name = self.store.pools, request.pool
        match request.action:
            case PoolAction.LIST:
                return [pool.info() for pool in pools if name in ("", pool.name)]
            case PoolAction.PIN:
                return [pools.pin(name, request.generation).info()]
            case PoolAction.UNPIN:
                return [pools.unpin(name).info()]
            case PoolAction.SET_CAPACITY:
                pool = pools.set_capacity(name, request.capacity_bytes)
                self.store.upkeep(self._clock())
                return [pool.info()]
            case PoolAction.RETIRE:
                pool = pools.pool(name)
                self.store.retire(name, request.generation)
                self.store.upkeep(self._clock())
                return [pool.info()]

    def layer_bytes(self, namespace: bytes) -> tuple[int, ...]:
        return self.store.pools.namespace(namespace).layout.layer_bytes

    def lookup(
        self,
        namespaces: Sequence[bytes],
        keys: Sequence[bytes],
        lease_ms: int,
        owner: object,
        extents: Sequence[tuple[int, bytes]] = (),
    ) -> tuple[bytes, int]:
        opened = [self.store.pools.namespace(id) for id in namespaces]
        slots = [namespace.slots.slots_of(keys) for namespace in opened]
        hits = np.logical_and.reduce(slots)
        self.store.counters["lookup_keys"] += len(keys)
        self.store.counters["lookup_hits"] += int(np.count_nonzero(hits))
        lease = 0
        if lease_ms > 0:
            run = len(keys) if hits.all() else int(hits.argmin())
            lease = self._lease([found[:run] for found in slots], lease_ms, owner)
        return np.packbits(hits, bitorder="little").tobytes(), lease

    def fetch(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        asker: Asker | None = None,
        request: Fetch | None = None,
    ) -> FetchStream:
        return ArenaFetch(self.store, self.store.pools.namespace(namespace), keys, pieces)

    def put(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        checksums: bytes,
        ack: AckLevel,
        asker: Asker | None = None,
        request: Put | None = None,
    ) -> PutStream:
        if request is not None and request.offer:
            raise Unsupported("an offer is for the agent of a node: a daemon stores blocks")
        if ack is not AckLevel.MEMORY:
            raise Unsupported(f"ack={ack}: this daemon has no disk, only ack=memory can be met")
        opened = self.store.pools.namespace(namespace)
        return ArenaPut(self.store, opened, keys, checksums, self._clock)

    def delete(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        asker: Asker | None = None,
        extents: Sequence[tuple[int, bytes]] = (),
    ) -> bytes:
        opened = self.store.pools.namespace(namespace)
        deleted = bytes(self.store.delete(opened, key) for key in keys)
        self.store.counters["blocks_deleted"] += sum(deleted)
        return deleted

    def release(self, leases: Sequence[int], owner: object) -> list[bool]:
        now = self._clock()
        self.store.expire(now)
        return [self.store.release(number, owner, now) for number in leases]

    def check(self, namespace: bytes, keys: Sequence[bytes]) -> bytes:
        """Verify stored blocks now and drop the bad ones.

        What is beyond `CHECK_BYTES_PER_S` counts as good.
        """
        opened, now = self.store.pools.namespace(namespace), self._clock()
        dropped = bytearray(len(keys))
        for index, key in enumerate(keys):
            if not opened.slots.find(key):
                continue
            if not self._checks.take(now, opened.geometry.block_bytes):
                self.store.counters["checks_skipped"] += 1
            elif not self.store.verify(opened, key):
                dropped[index] = self.store.delete(opened, key)
        self.store.counters["blocks_corrupt"] += sum(dropped)
        return bytes(dropped)

    def owner_gone(self, owner: object) -> None:
        self.store.owner_gone(owner)

    def buffer_load(self) -> BufferLoad:
        self.store.upkeep(self._clock())
        return BufferLoad(free_bytes=self.store.free_bytes, total_bytes=self.store.arena_bytes)

    def disk_load(self) -> DiskLoad:
        return DiskLoad()

    def counters(self) -> dict[str, int]:
        return dict(self.store.counters)

    def _lease(self, runs: list[NDArray[np.int32]], lease_ms: int, owner: object) -> int:
        if lease_ms > LEASE_MS_MAX:
            raise LocalProtocolError(f"lease_ms={lease_ms}: at most {LEASE_MS_MAX}")
        slots: list[int] = np.concatenate(runs).tolist()
        if not slots:
            return 0
        # This frees nothing that the lookup has found: what is published stays.
        now = self._clock()
        self.store.expire(now)
        return self.store.lease(owner, slots, now + lease_ms / 1e3)
