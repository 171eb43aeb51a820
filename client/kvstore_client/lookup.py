"""One lookup at all daemons that may have some of its blocks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from kvstore.errors import Draining, KVStoreError, RefusedError
from kvstore.layout import NAMESPACE_ID_BYTES
from kvstore.messages import LOOKUP_PROBES_MAX, Lookup, LookupReply, Release
from kvstore.protocol import Reply
from kvstore.wire import FrameType
from kvstore_client.handles import Lease, LookupResult
from kvstore_client.link import PeerLink
from kvstore_client.namespaces import Namespace
from kvstore_client.placement import (
    Chain,
    Extent,
    PlacedKeys,
    block_heads,
    by_owner,
    extents_of,
    parts,
)

logger = logging.getLogger(__name__)


class ClusterLookup:
    """Which blocks are stored in all namespaces, and leased if that was asked for.

    Args:
        links: Links to all daemons.
        chain: Which blocks the call is about.
        lease_ms: For how long, 0 for no lease.
        deadline_at: Loop time after which nothing is sent, and nothing waited for.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        links: Sequence[PeerLink],
        namespaces: Sequence[Namespace],
        chain: Chain | PlacedKeys,
        lease_ms: int,
        deadline_at: float,
    ) -> None:
        self._loop = loop
        self._links = links
        self._namespaces = namespaces
        self._keys = chain.wanted
        self._chain = chain
        self._lease_ms = lease_ms
        self._deadline_at = deadline_at
        self._hits = bytearray(len(self._keys))
        self._held = bytearray(len(self._keys))
        self._granted: list[tuple[PeerLink, Lease]] = []
        self._silent: set[int] = set()
        self._refused: dict[int, RefusedError] = {}
        self._silent_behind: set[str] = set()
        self._refused_behind: dict[str, RefusedError] = {}

    async def run(self, extents: Sequence[Extent]) -> LookupResult:
        """Ask the first owner of each block, and of what it has not the second.

        Args:
            extents: Where the blocks lie.
        """
        ranks = max((len(extent.owners) for extent in extents), default=0)
        try:
            for rank in range(ranks):
                # A daemon that hangs leaves time to ask the next.
                left_s = (self._deadline_at - self._loop.time()) / (ranks - rank)
                owned = by_owner(extents, rank, lambda index: not self._hits[index])
                await asyncio.gather(
                    *(
                        self._ask(peer, part, left_s)
                        for peer, indices in owned.items()
                        for part in parts(indices, self._keys_max(self._links[peer]))
                    )
                )
        except BaseException:
            for link, lease in self._granted:
                _give_back(link, lease.number)
            raise
        return LookupResult(
            hits=[bool(hit) for hit in self._hits],
            prefix=_run_length(self._hits),
            leases=[lease for _, lease in self._granted],
            leased=_run_length(self._held),
            unreachable=[
                *(str(self._links[peer].endpoint) for peer in sorted(self._silent)),
                *sorted(self._silent_behind),
            ],
            refused={
                **{
                    str(self._links[peer].endpoint): error
                    for peer, error in sorted(self._refused.items())
                },
                **self._refused_behind,
            },
        )

    def _keys_max(self, link: PeerLink) -> int:
        count = len(self._namespaces)
        keys_max = link.keys_max(more_bytes=count * (NAMESPACE_ID_BYTES + 2))
        return max(1, min(keys_max, LOOKUP_PROBES_MAX // count))

    async def _ask(self, peer: int, indices: Sequence[int], left_s: float) -> None:
        link = self._links[peer]
        if left_s <= 0 or not link.allow():
            self._silent.add(peer)
            return
        lease_ms = min(self._lease_ms, link.limits.lease_ms)
        message = Lookup(
            namespaces=tuple(namespace.id for namespace in self._namespaces),
            keys=[self._keys[index] for index in indices],
            lease_ms=lease_ms,
            extents=extents_of(block_heads(self._chain), indices) if link.is_agent else (),
        )
        try:
            reply = await link.call(FrameType.LOOKUP, message, left_s, partial(_too_late, link))
        except KVStoreError as error:
            logger.info("LOOKUP at %s: %s", link.peer, error)
            if isinstance(error, RefusedError) and not isinstance(error, Draining):
                link.refused(error, self._namespaces)
                self._refused[peer] = error
            else:
                self._silent.add(peer)
            return
        assert isinstance(reply, LookupReply)
        if reply.lease:
            lease = Lease(str(link.endpoint), reply.lease, lease_ms / 1e3)
            self._granted.append((link, lease))
        # Behind an agent: its daemons, by their own names.
        self._silent_behind.update(reply.unreachable)
        for name, text in reply.refused:
            self._refused_behind.setdefault(name, RefusedError(text))
        held = reply.lease != 0  # the leading run of hits
        for position, index in enumerate(indices):
            if reply.bitmap[position >> 3] >> (position & 7) & 1:
                self._hits[index] = 1
                self._held[index] = held
            else:
                held = False


def _too_late(link: PeerLink, reply: Reply) -> None:
    if isinstance(reply, LookupReply) and reply.lease:
        _give_back(link, reply.lease)


def _give_back(link: PeerLink, number: int) -> None:
    """A lease that the caller does not know of would keep its blocks until it ends."""
    link.tell(FrameType.RELEASE, Release(leases=(number,)))


def _run_length(flags: bytearray) -> int:
    """Length of the leading run of ones."""
    end = flags.find(0)
    return len(flags) if end < 0 else end
