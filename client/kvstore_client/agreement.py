"""What is to move payload between us and one peer: what both sides have, and what is wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from kvstore.endpoint import Endpoint
from kvstore.errors import RefusedError, RemoteProtocolError, TransportError, TransportTimeout
from kvstore.memorymessages import (
    RDMA,
    REGION_METADATA_BYTES,
    REGIONS_PER_REQUEST_MAX,
    SHM,
    VIEWS,
    Rails,
)
from kvstore.messages import Welcome
from kvstore.protocol import ClientProtocol
from kvstore.transport.connection import FrameConnection
from kvstore.transport.rdma_end import RailsUnreached
from kvstore.transport.rdma_nodes import RdmaNodes, endpoint_options
from kvstore.wire import FrameType
from kvstore_client.linkmemory import Ask, LinkMemory, RdmaMemory, SharedMemory
from kvstore_client.memory import Region, Regions
from kvstore_client.transports import AUTO

logger = logging.getLogger(__name__)

# For a peer that has seen our last queue pair fail to say how its requests have ended, and why:
# twice what it takes itself until it closes the session.
LAST_WORDS_S = 0.2
# For news that lie in a device of ours when DONE is here: they may be gone with a rail that failed
# at this side, of which the peer knows nothing. Twice, since this loop may have had no time.
NEWS_LOOK_S = 0.1
NEWS_LOOKS = 2
# Queue pairs come up without a word between their devices: that these reach each other is seen
# only when something moves. After so many requests in a row that lost something, a session that
# begins within so long uses the stream, where it may: a network that passes no RDMA costs no
# answers.
LOST_MAX = 2
STREAM_S = 60.0

#: What to do where a peer does not offer the only thing that is wanted.
_REMEDIES = {
    "tcp": "name it by tcp://HOST:PORT",
    "unix": "name it by its unix socket (unix:///PATH)",
    SHM: "name it by its unix socket (unix:///PATH), and let it share memory with this user"
    " (--memory-user)",
    RDMA: "let it listen on rdma://HOST:PORT, and name it by that",
}


class Channels(NamedTuple):
    """The three connections of a link that is up."""

    control: FrameConnection
    fetch: FrameConnection
    put: FrameConnection


class Agreement:
    """How links of one client agree on what moves payload. On the loop's thread.

    Args:
        wanted: One of `TRANSPORTS`.
        regions: Memory that peers may reach.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wanted: str, regions: Regions) -> None:
        self.wanted = wanted
        self.regions = regions
        self._loop = loop
        self._nodes = RdmaNodes(loop)
        self._complained: set[str] = set()
        self._unsettled: set[LinkMemory] = set()
        # By endpoint: requests in a row that lost what they carried, and when the last one did.
        self._lost: dict[str, tuple[int, float]] = {}

    async def agree(
        self,
        endpoint: Endpoint,
        welcome: Welcome,
        channels: Channels,
        ask: Ask,
        on_failed: Callable[[Exception], None],
    ) -> LinkMemory | None:
        """The way into our memory for a link that comes up; None for its sockets alone.

        Args:
            endpoint: Of the peer.
            ask: Sends a request on the control connection.
            on_failed: Called when nothing can be moved that way any more.

        Raises:
            RefusedError: Only something is wanted that the peer does not offer.
            TransportError: Only RDMA is wanted, and this host cannot do it; or the connection
                breaks.
        """
        offered, stream = welcome.capabilities, channels.fetch.stream.transport
        wanted = self.wanted
        if SHM in offered and wanted in (AUTO, SHM):
            carriers = (channels.fetch, channels.put)
            memory = SharedMemory(
                self._loop,
                self.regions,
                channels.control,
                carriers,
                ask,
                views=VIEWS in offered,
                only=wanted == SHM,
            )
            return self._kept(memory)
        if RDMA in offered and wanted in (AUTO, RDMA):
            try:
                if wanted == AUTO:
                    self._check_reached(endpoint)
                return self._kept(await self._by_rdma(endpoint, welcome, channels, ask, on_failed))
            except (TransportError, RefusedError) as error:
                # With rails that are not to be used, another session can be had.
                if wanted == RDMA or isinstance(error, RailsUnreached) or channels.control.closed:
                    raise
                self._complain(f"{welcome.node_id} offers rdma, and {stream} is used: {error}")
                return None
        if wanted not in (AUTO, stream):
            raise RefusedError(
                f"transport={wanted}, and nothing else is to be used: {welcome.node_id} offers"
                f" {', '.join((stream, *offered))} at {endpoint}; {_REMEDIES[wanted]}, or use"
                f" transport={AUTO}"
            )
        return None

    def _kept(self, memory: LinkMemory) -> LinkMemory:
        """The same, which is waited for at the end."""
        self._unsettled.add(memory)
        memory.settled.add_done_callback(lambda _: self._unsettled.discard(memory))
        return memory

    async def share_all(self, memory: LinkMemory, peer: str) -> None:
        """Let a peer reach all regions, those too that are made meanwhile."""
        tried: dict[int, Region] = {}
        while True:
            # Nobody else takes back from this peer what was freed meanwhile.
            gone = [region for region in tried.values() if region.freed and memory.knows(region)]
            left = [region for region in self.regions.all() if region.number not in tried]
            if not left and not gone:
                return
            for region in gone:
                del tried[region.number]
                await memory.remove(region)
            for region in left:
                tried[region.number] = region
                if region.freed:
                    continue
                refusal = await memory.offer(region)
                if refusal:
                    logger.warning("%s: region of %d bytes: %s", peer, region.size_bytes, refusal)

    @property
    def regions_bytes(self) -> int:
        """Metadata that the names of regions take in a request at most."""
        return REGION_METADATA_BYTES * min(len(self.regions), REGIONS_PER_REQUEST_MAX)

    async def settled(self, timeout_s: float) -> None:
        """All links are down: wait until their peers can touch our memory no more; not longer
        for one that hangs."""
        waiting = [memory.settled for memory in self._unsettled]
        if waiting:
            await asyncio.wait(waiting, timeout=timeout_s)

    def close(self) -> None:
        """Close the rails, and wait for no peer any more; after `settled`. What one may touch yet
        stays its own for as long as we live."""
        for memory in list(self._unsettled):
            memory.give_up()
        self._nodes.close()

    async def _by_rdma(
        self,
        endpoint: Endpoint,
        welcome: Welcome,
        channels: Channels,
        ask: Ask,
        on_failed: Callable[[Exception], None],
    ) -> LinkMemory:
        options = endpoint_options(endpoint, "endpoint")  # none, of one that is not rdma://
        node = self._nodes.node(options, channels.control.stream.local_address())
        end = node.end(welcome.node_id, active=False)
        protocol, fetch = channels.fetch.protocol, channels.fetch
        assert isinstance(protocol, ClientProtocol)

        def on_run(run: int) -> None:
            try:
                protocol.run_arrived(run)
            except RemoteProtocolError as error:
                fetch.close(error)

        def give_up(error: Exception) -> None:
            if not channels.control.closed:
                on_failed(error)

        def on_error(error: Exception) -> None:
            logger.warning("rdma to %s: %s", welcome.node_id, error)
            if end.failed is not None:
                self._loop.call_later(LAST_WORDS_S, give_up, error)

        def look_for_news(request_id: int, looks: int = NEWS_LOOKS) -> None:
            if not protocol.news_missing(request_id):
                return
            if looks:
                self._loop.call_later(NEWS_LOOK_S, look_for_news, request_id, looks - 1)
                return
            name = welcome.node_id
            give_up(TransportTimeout(f"rdma to {name}: news of what it has written are missing"))

        try:
            end.on_run, end.on_failed = on_run, on_error
            protocol.on_news_missing = look_for_news
            reply = await ask(FrameType.RAILS, end.addresses())
            assert isinstance(reply, Rails)
            end.connect(reply)
        except BaseException:
            end.close()
            raise
        memory = RdmaMemory(self._loop, self.regions, node, end, self.wanted == RDMA)
        memory.on_moved = partial(self._moved, str(endpoint))
        return memory

    def _moved(self, endpoint: str, moved: bool) -> None:
        """A request that went by RDMA has ended."""
        if moved:
            self._lost.pop(endpoint, None)
        else:
            count, _ = self._lost.get(endpoint, (0, 0.0))
            self._lost[endpoint] = (count + 1, self._loop.time())

    def _check_reached(self, endpoint: Endpoint) -> None:
        """Whether there is hope that our devices and the peer's reach each other.

        Raises:
            TransportError: Lately they did not.
        """
        count, lost_at = self._lost.get(str(endpoint), (0, 0.0))
        if count >= LOST_MAX and self._loop.time() < lost_at + STREAM_S:
            raise TransportError(
                f"the last {LOST_MAX} requests to {endpoint} lost what they carried by rdma; it is"
                f" tried again when the link comes up after {STREAM_S:g} s"
            )

    def _complain(self, text: str) -> None:
        """Loud, and once: the same is true each time that the link comes up."""
        if text not in self._complained:
            self._complained.add(text)
            logger.warning("%s", text)


__all__ = ["Agreement", "Channels"]
