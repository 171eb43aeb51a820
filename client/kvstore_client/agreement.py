"""What is to move payload between us and one peer: what both sides have, and what is wanted."""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

from kvstore.errors import RefusedError
from kvstore.memorymessages import RDMA, SHM, VIEWS
from kvstore.messages import Welcome
from kvstore.transport.connection import FrameConnection
from kvstore_client.linkmemory import Ask, LinkMemory, SharedMemory
from kvstore_client.memory import Regions

logger = logging.getLogger(__name__)

#: The best that a peer offers.
AUTO = "auto"
#: What moves payload; see `AsyncClient`.
TRANSPORTS = (AUTO, "tcp", "unix", SHM, RDMA)


class Channels(NamedTuple):
    """The three connections of a link that is up."""

    control: FrameConnection
    fetch: FrameConnection
    put: FrameConnection


async def agree(
    loop: asyncio.AbstractEventLoop,
    wanted: str,
    regions: Regions,
    welcome: Welcome,
    channels: Channels,
    ask: Ask,
) -> LinkMemory | None:
    """The way into our memory for a link that comes up; None for its sockets alone.

    Args:
        wanted: One of `TRANSPORTS`.
        ask: Sends a request on the control connection.

    Raises:
        RefusedError: Only something is wanted that the peer does not offer.
        TransportError: The connection breaks.
    """
    offered, stream = welcome.capabilities, channels.fetch.stream.transport
    if SHM in offered and wanted in (AUTO, SHM):
        carriers = (channels.fetch, channels.put)
        return SharedMemory(loop, regions, channels.control, carriers, ask, VIEWS in offered)
    if wanted not in (AUTO, stream):
        raise RefusedError(
            f"transport={wanted}, and nothing else is to be used: {welcome.node_id} offers"
            f" {', '.join((stream, *offered))} at this endpoint"
        )
    return None


async def share_all(memory: LinkMemory, regions: Regions, peer: str) -> None:
    """Let a peer reach all regions, those too that are made meanwhile."""
    tried: set[int] = set()
    while True:
        left = [region for region in regions.all() if region.number not in tried]
        if not left:
            return
        for region in left:
            tried.add(region.number)
            try:
                await memory.add(region)
            except RefusedError as error:
                logger.warning("%s: region of %d bytes: %s", peer, region.size_bytes, error)


__all__ = ["AUTO", "TRANSPORTS", "Channels", "agree", "share_all"]
