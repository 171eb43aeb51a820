"""Blocks that local clients read where they lie: leased views of this process's own memory.

::

    MAP   ──▶ a descriptor of the memory: read-only, sealed, mapped once by the client
    VIEW  ──▶ the blocks are found, pinned, verified ──▶ offsets and a lease
    RENEW ──▶ it holds on          RELEASE, the end of its time, or of the client ──▶ unpinned

The memory of a process is one memfd: whoever maps it can read all of it. So it is handed out
only by a process that serves one pool and no other (`ServerOptions.pool`).

Thread rule: the server's loop.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import struct
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from kvstore.blocksource import Chunk
from kvstore.buffers import PAGE_BYTES, Region
from kvstore.checksum import CHECKSUM_BYTES, block_seed, layer_checksums
from kvstore.errors import Busy
from kvstore.layout import PieceMap
from kvstore.messages import Done, FetchOutcome, ViewReply, reasons
from kvstore.protocol.placing import FetchSink
from kvstore.protocol.strands import Strand, Strands
from kvstore.transport.shm import address_of, read_only_copy
from kvstore.wire import PLACED_BYTES_MAX

# What all views together may keep: as much again stays for new blocks.
VIEWED_SHARE_MAX = 0.5
#: Numbers of leases of views; those of lookups are small.
LEASE_FIRST = 1 << 61
# What is verified in one go, unless it is one block: 30 us.
VERIFIED_BYTES_MAX = 1024 * 1024

#: How chunks are given back.
Releases: TypeAlias = Sequence[Callable[[], None]]


class ViewMemory:
    """The memory of this process, as local clients may map it.

    Ownership: borrows `region`; owns a descriptor of it until `close`.

    Attributes:
        viewed_bytes: What all views together keep, in whole pages.

    Raises:
        Unsupported: The system cannot protect it.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.view = region.view
        self.base = address_of(region.view)
        self.fd = read_only_copy(region)
        self.viewed_bytes = 0
        self.bytes_max = int(region.size_bytes * VIEWED_SHARE_MAX)

    def close(self) -> None:
        """Give the descriptor back. Harmless when called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.view = memoryview(b"")


class _Lease:
    """What one view keeps, until when."""

    __slots__ = ("releases", "size_bytes", "timer")

    def __init__(self, releases: Releases, size_bytes: int, timer: asyncio.TimerHandle) -> None:
        self.releases = releases
        self.size_bytes = size_bytes
        self.timer = timer


class SessionViews:
    """Views of one client."""

    def __init__(self, loop: asyncio.AbstractEventLoop, memory: ViewMemory) -> None:
        self.memory = memory
        self._loop = loop
        self._leases: dict[int, _Lease] = {}
        self._numbers = itertools.count(LEASE_FIRST)

    def __len__(self) -> int:
        return len(self._leases)

    def sink(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        lease_ms: int,
        verify: bool,
        strands: Strands,
    ) -> ViewSink:
        """What collects the blocks of one VIEW."""
        return ViewSink(self, namespace, keys, pieces, lease_ms, verify, strands)

    def lease(self, releases: Releases, size_bytes: int, lease_ms: int) -> int:
        """Keep chunks for so long, of which nothing else is kept; the number of the lease."""
        number = next(self._numbers)
        timer = self._loop.call_later(lease_ms / 1e3, self._end, number)
        self._leases[number] = _Lease(releases, size_bytes, timer)
        return number

    def renew(self, numbers: Sequence[int], lease_ms: int) -> list[bool]:
        """Let leases hold from now on; for each, whether it had held until now."""
        held = []
        for number in numbers:
            lease = self._leases.get(number)
            held.append(lease is not None)
            if lease is not None:
                lease.timer.cancel()
                lease.timer = self._loop.call_later(lease_ms / 1e3, self._end, number)
        return held

    def release(self, number: int) -> bool:
        """Give a lease back; whether it had held until now."""
        return self._end(number)

    def close(self) -> None:
        """The client is gone."""
        for number in list(self._leases):
            self._end(number)

    def _end(self, number: int) -> bool:
        lease = self._leases.pop(number, None)
        if lease is None:
            return False
        lease.timer.cancel()
        self.let_go(lease.releases, lease.size_bytes)
        return True

    def let_go(self, releases: Releases, size_bytes: int) -> None:
        """Nobody looks at chunks any more."""
        self.memory.viewed_bytes -= size_bytes
        for release in releases:
            release()


class ViewSink(FetchSink):
    """Collects the chunks of a fetch instead of moving them, and says where they lie."""

    transport = "views"

    def __init__(
        self,
        views: SessionViews,
        namespace: bytes,
        keys: Sequence[bytes],
        pieces: PieceMap,
        lease_ms: int,
        verify: bool,
        strands: Strands,
    ) -> None:
        super().__init__()
        self._strands = strands
        self._strand = Strand(strands)
        self._views = views
        self._namespace = namespace
        self._keys = keys
        self._pieces = pieces
        self._lease_ms = lease_ms
        self._verify = verify
        self.chunk_bytes = PLACED_BYTES_MAX
        if verify:
            self.chunk_bytes = max(VERIFIED_BYTES_MAX, pieces.span_bytes)
        self._verify_s = 0.0
        self._releases: list[Callable[[], None]] = []
        self._kept_bytes = 0
        # For each key where its block begins, how much of it is there, and its checksums.
        self._offsets = array("Q", bytes(8 * len(keys)))
        self._filled = array("Q", bytes(8 * len(keys)))
        self._expected: dict[int, bytes] = {}
        self._corrupt: set[int] = set()

    @property
    def accepts(self) -> bool:
        return self.failure is None and (not self._verify or self._strands.accepts)

    @property
    def idle(self) -> bool:
        return not self._strand.count

    def take(self, chunk: Chunk) -> None:
        if not chunk.length:
            chunk.release()
            return
        memory, block_bytes = self._views.memory, self._pieces.span_bytes
        # Of whole pages, and all of a block from its first byte on: others cannot have the rest.
        begun_before = 1 if chunk.piece_offset else 0
        begun_count = -(-(chunk.piece_offset + chunk.length) // block_bytes) - begun_before
        kept_bytes = begun_count * (-(-block_bytes // PAGE_BYTES) * PAGE_BYTES)
        if memory.viewed_bytes + kept_bytes > memory.bytes_max:
            chunk.release()
            self.failure = Busy(
                f"views keep {memory.viewed_bytes} bytes, {kept_bytes} more would be beyond the"
                f" limit of {memory.bytes_max}"
            )
            return
        memory.viewed_bytes += kept_bytes
        self._kept_bytes += kept_bytes
        self._releases.append(chunk.release)
        index, at, known = chunk.piece, chunk.piece_offset, 0
        checksum_bytes = self._pieces.geometry.layer_count * CHECKSUM_BYTES
        ended: list[int] = []
        places = chunk.places or [address_of(one) - memory.base for one in chunk.buffers]
        for buffer, offset in zip(chunk.buffers, places, strict=True):
            if not at:
                self._offsets[index] = offset
                if self._verify:
                    self._expected[index] = chunk.checksums[known : known + checksum_bytes]
                    known += checksum_bytes
            assert offset == self._offsets[index] + at, "a block is in one piece in its memory"
            at += len(buffer)
            self._filled[index] = at
            if at == block_bytes:
                ended.append(index)
                index, at = index + 1, 0
        if self._verify and ended:
            self._strand.add(partial(self._check, ended), self._checked)

    def amend(self, done: Done) -> Done | ViewReply:
        outcomes = bytearray(done.outcomes)
        hits = 0
        for index, outcome in enumerate(outcomes):
            if outcome == FetchOutcome.HIT:
                if index in self._corrupt:
                    outcomes[index] = FetchOutcome.CORRUPT
                elif self._filled[index] < self._pieces.span_bytes:
                    outcomes[index] = FetchOutcome.UNAVAILABLE
                else:
                    hits += 1
        errors = done.errors if self.failure is None else reasons([self.failure])
        releases, kept_bytes = self._take_kept()
        lease = 0
        if hits:
            lease = self._views.lease(releases, kept_bytes, self._lease_ms)
        else:
            self._views.let_go(releases, kept_bytes)
        return ViewReply(
            # Without the load report: a client on this host needs none with each batch.
            done=Done(outcomes=bytes(outcomes), tiers=done.tiers, errors=errors),
            offsets=struct.pack(f"<{len(self._offsets)}Q", *self._offsets),
            lease=lease,
            lease_ms=self._lease_ms if lease else 0,
            verify_us=int(self._verify_s * 1e6),
        )

    def close(self) -> None:
        super().close()
        self._strand.drop()
        self._views.let_go(*self._take_kept())

    def _take_kept(self) -> tuple[Releases, int]:
        releases, kept_bytes = self._releases, self._kept_bytes
        self._releases, self._kept_bytes = [], 0
        return releases, kept_bytes

    def _check(self, indices: Sequence[int]) -> tuple[list[int], float]:
        """Compare blocks that are whole with their checksums: which are bad, and how long it
        took. On a thread of the worker."""
        begun_at = time.perf_counter()
        view, corrupt = self._views.memory.view, []
        for index in indices:
            offset, offsets = self._offsets[index], self._pieces.geometry.offsets
            layers = [
                view[offset + first : offset + last] for first, last in itertools.pairwise(offsets)
            ]
            seed = block_seed(self._namespace, self._keys[index])
            if layer_checksums(layers, seed) != self._expected[index]:
                corrupt.append(index)
        return corrupt, time.perf_counter() - begun_at

    def _checked(self, result: tuple[list[int], float] | Exception) -> None:
        if isinstance(result, Exception):
            self.failure = self.failure or result
        else:
            corrupt, took_s = result
            self._corrupt.update(corrupt)
            self._verify_s += took_s
        if self.idle or self.failure is not None:
            self.on_ready()


__all__ = ["LEASE_FIRST", "SessionViews", "ViewMemory", "ViewSink"]
