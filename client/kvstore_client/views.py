"""Blocks that are read where they lie, in the memory of a daemon or agent on this host."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Sequence
from functools import partial

from kvstore.errors import KVStoreError, Unsupported
from kvstore.memorymessages import Renew, RenewReply
from kvstore.messages import (
    DEADLINE_MS_MAX,
    Fetch,
    FetchOutcome,
    Release,
    ReleaseReply,
    View,
    ViewReply,
)
from kvstore.protocol import Reply
from kvstore.wire import FrameType
from kvstore_client.link import PeerLink
from kvstore_client.linkmemory import SharedMemory
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import Chain, PlacedKeys, block_heads, extents_of

logger = logging.getLogger(__name__)

# A lease is renewed three times in its life: one renewal may be lost, another late.
RENEWALS_PER_LEASE = 3


_OUTCOMES = list(FetchOutcome)


class Views:
    """Leased views of blocks, from `view` of a client until `release`.

    The library renews the leases. What was read counts only if `release` says that they had held
    to the end: copy out (or compute), release, then publish.

    Attributes:
        blocks: For each key its block, read-only, all layers; None for what is no hit.
        outcomes: One a key.
        verify_us: What the server's comparison with the checksums took, of all that was asked
            for together.
        errors: What went wrong.
    """

    def __init__(self, count: int) -> None:
        self.blocks: list[memoryview | None] = [None] * count
        self.outcomes = [FetchOutcome.UNAVAILABLE] * count
        self.verify_us = 0
        self.errors: list[Exception] = []
        self._leases: list[_Lease] = []
        self._released = False

    @property
    def hit_count(self) -> int:
        """Blocks that can be read."""
        return self.outcomes.count(FetchOutcome.HIT)

    @property
    def held(self) -> bool:
        """Whether all leases hold, as far as is known here: a server may have died just now."""
        return not self._released and all(lease.same_session() for lease in self._leases)

    async def release(self) -> bool:
        """Give the leases back; nothing is to be read from now on.

        Returns:
            Whether all had held until now. If not, nothing that was read may be used. When
            called again: False.
        """
        if self._released:
            return False
        self._released = True
        self.blocks = [None] * len(self.blocks)
        held = await asyncio.gather(*(lease.release() for lease in self._leases))
        return all(held)

    def abandon(self) -> None:
        """Give the leases back without waiting for what the server says of them."""
        if not self._released:
            self._released = True
            self.blocks = [None] * len(self.blocks)
            for lease in self._leases:
                lease.abandon()


class _Lease:
    """One lease at one peer, renewed by a timer."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        link: PeerLink,
        memory: SharedMemory,
        number: int,
        lease_ms: int,
    ) -> None:
        self.held = True
        self._loop = loop
        self._link = link
        self._memory = memory  # of the session that the lease belongs to
        self._number = number
        self._lease_ms = lease_ms
        self._timer = self._wait()

    async def release(self) -> bool:
        self._timer.cancel()
        if not self.same_session():
            return False
        try:
            message = Release(leases=(self._number,))
            reply = await self._link.call_carrier(FrameType.RELEASE, message)
        except KVStoreError:
            return False
        assert isinstance(reply, ReleaseReply)
        return self.held and reply.held[0]

    def abandon(self) -> None:
        self._timer.cancel()
        if self.same_session():
            self._link.tell(FrameType.RELEASE, Release(leases=(self._number,)))

    def same_session(self) -> bool:
        """Whether it holds, as far as is known."""
        self.held = self.held and self._link.memory is self._memory
        return self.held

    def _wait(self) -> asyncio.TimerHandle:
        return self._loop.call_later(self._lease_ms / 1e3 / RENEWALS_PER_LEASE, self._renew)

    def _renew(self) -> None:
        if self.same_session():
            message = Renew(leases=(self._number,), lease_ms=self._lease_ms)
            self._link.tell(FrameType.RENEW, message, self._renewed)
            self._timer = self._wait()

    def _renewed(self, reply: Reply) -> None:
        if not (isinstance(reply, RenewReply) and reply.held[0]):
            self.held = False


async def view_at(
    loop: asyncio.AbstractEventLoop,
    link: PeerLink,
    namespace: Namespace,
    chain: Chain | PlacedKeys,
    indices: Sequence[int],
    views: Views,
    lease_ms: int,
    timeout_s: float,
    verify: bool,
) -> None:
    """Ask one peer for views of some blocks, and note in `views` what it says. Never raises for
    what a peer does."""
    memory = link.memory
    try:
        if not isinstance(memory, SharedMemory) or not memory.views:
            raise (
                link.unavailable()
                if not link.up
                else Unsupported(
                    f"{link.peer} gives no views: they need its unix socket, and a server that was"
                    " started for this pool alone (--pool)"
                )
            )
        arena = await memory.map(namespace.id)
        message = View(
            fetch=Fetch(
                namespace=namespace.id,
                keys=[chain.wanted[index] for index in indices],
                layer_first=0,
                layer_last=namespace.geometry.layer_count,
                deadline_ms=max(1, min(int(timeout_s * 1e3), DEADLINE_MS_MAX)),
                extents=extents_of(block_heads(chain), indices) if link.is_agent else (),
            ),
            lease_ms=lease_ms,
            verify=verify,
        )
        on_late = partial(_release_late, link)
        reply = await link.call_carrier(FrameType.VIEW, message, timeout_s, on_late)
    except KVStoreError as error:
        views.errors.append(error)
        return
    assert isinstance(reply, ViewReply)
    views.verify_us += reply.verify_us
    if reply.lease:
        views._leases.append(_Lease(loop, link, memory, reply.lease, reply.lease_ms))
    block_bytes = namespace.geometry.block_bytes
    offsets = struct.unpack(f"<{len(indices)}Q", reply.offsets)
    for position, index in enumerate(indices):
        outcome = _OUTCOMES[reply.done.outcomes[position]]
        views.outcomes[index] = outcome
        if outcome is FetchOutcome.HIT:
            first = offsets[position]
            views.blocks[index] = arena[first : first + block_bytes]
    if FetchOutcome.CORRUPT in reply.done.outcomes:
        bad = [index for index in indices if views.outcomes[index] is FetchOutcome.CORRUPT]
        link.report_corrupt(namespace, [chain.wanted[index] for index in bad])


def _release_late(link: PeerLink, reply: Reply) -> None:
    """Views that nobody waits for any more."""
    if isinstance(reply, ViewReply) and reply.lease:
        link.tell(FrameType.RELEASE, Release(leases=(reply.lease,)))


__all__ = ["Views", "view_at"]
