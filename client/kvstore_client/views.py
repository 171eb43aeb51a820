"""Blocks that are read where they lie, in the memory of a daemon or agent on this host."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from functools import partial

from kvstore.errors import KVStoreError, RemoteProtocolError, TransportError, Unsupported
from kvstore.memorymessages import SHM, Renew, RenewReply
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
from kvstore_client.transports import AUTO

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
        """Give the leases back; nothing is to be read from now on. They are given back too if
        this is cancelled, and then nobody knows whether they had held.

        Returns:
            Whether all had held until now. If not, nothing that was read may be used. When
            called again: False.
        """
        if self._released:
            return False
        self._released = True
        self.blocks = [None] * len(self.blocks)
        try:
            held = await asyncio.gather(*(lease.release() for lease in self._leases))
        except BaseException:
            for lease in self._leases:  # those whose turn had not come yet
                lease.abandon()
            raise
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
        self._over = False  # it was given back
        self._loop = loop
        self._link = link
        self._memory = memory  # of the session that the lease belongs to
        self._number = number
        self._lease_ms = lease_ms
        self._timer = self._wait()

    async def release(self) -> bool:
        if not self._end():
            return False
        try:
            message = Release(leases=(self._number,))
            reply = await self._link.call(FrameType.RELEASE, message, carrier=True)
        except KVStoreError:
            return False
        assert isinstance(reply, ReleaseReply)
        return reply.held[0]

    def abandon(self) -> None:
        if not self._over and self._end():
            self._link.tell(FrameType.RELEASE, Release(leases=(self._number,)))

    def same_session(self) -> bool:
        """Whether it holds, as far as is known."""
        self.held = self.held and self._link.memory is self._memory
        return self.held

    def _end(self) -> bool:
        """Renew it no more; whether the server is to be told."""
        self._over = True
        self._timer.cancel()
        return self.same_session()

    def _wait(self) -> asyncio.TimerHandle:
        return self._loop.call_later(self._lease_ms / 1e3 / RENEWALS_PER_LEASE, self._renew)

    def _renew(self) -> None:
        if self.same_session():
            message = Renew(leases=(self._number,), lease_ms=self._lease_ms)
            self._link.tell(FrameType.RENEW, message, self._renewed)
            self._timer = self._wait()

    def _renewed(self, reply: Reply) -> None:
        # RELEASE may overtake RENEW, by another connection, and has the last word.
        if not self._over and not (isinstance(reply, RenewReply) and reply.held[0]):
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
            raise _no_views(link)
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
        reply = await link.call(FrameType.VIEW, message, timeout_s, on_late, carrier=True)
        assert isinstance(reply, ViewReply)
        if link.memory is not memory:  # lost since the reply came; and the mapping is closed
            raise TransportError(f"{link.peer} is lost: {link.last_error}")
        try:
            blocks = _blocks(reply, arena, namespace.geometry.block_bytes)
        except RemoteProtocolError:
            on_late(reply)
            raise
    except KVStoreError as error:
        views.errors.append(error)
        return
    views.verify_us += reply.verify_us
    if reply.lease:
        views._leases.append(_Lease(loop, link, memory, reply.lease, reply.lease_ms))
    for index, outcome, block in zip(indices, reply.done.outcomes, blocks, strict=True):
        views.outcomes[index] = _OUTCOMES[outcome]
        views.blocks[index] = block
    if FetchOutcome.CORRUPT in reply.done.outcomes:
        bad = [index for index in indices if views.outcomes[index] is FetchOutcome.CORRUPT]
        link.report_corrupt(namespace, [chain.wanted[index] for index in bad])


def _no_views(link: PeerLink) -> KVStoreError:
    if not link.up:
        return link.unavailable()
    ours = ""
    if link.wanted not in (AUTO, SHM):
        ours = f"; and transport={link.wanted} rules them out here: use {AUTO} or {SHM}"
    return Unsupported(
        f"{link.peer} gives no views: they need its unix socket, and a server that was started for"
        f" this pool alone (--pool) and shares memory with this user (--memory-user){ours}"
    )


def _blocks(reply: ViewReply, arena: memoryview, block_bytes: int) -> list[memoryview | None]:
    """What can be read, key by key.

    Raises:
        RemoteProtocolError: It lies nowhere.
    """
    outcomes, blocks = reply.done.outcomes, list[memoryview | None]()
    offsets = struct.unpack(f"<{len(outcomes)}Q", reply.offsets)
    for outcome, first in zip(outcomes, offsets, strict=True):
        if outcome >= len(_OUTCOMES):
            raise RemoteProtocolError(f"VIEW: {outcome} is no outcome")
        if outcome != FetchOutcome.HIT:
            blocks.append(None)
        elif first + block_bytes > len(arena):
            raise RemoteProtocolError(
                f"VIEW: {block_bytes} bytes at {first}, in memory of {len(arena)} bytes"
            )
        else:
            blocks.append(arena[first : first + block_bytes])
    return blocks


def _release_late(link: PeerLink, reply: Reply) -> None:
    """Views that nobody waits for any more."""
    if isinstance(reply, ViewReply) and reply.lease:
        link.tell(FrameType.RELEASE, Release(leases=(reply.lease,)))


__all__ = ["Views", "view_at"]
