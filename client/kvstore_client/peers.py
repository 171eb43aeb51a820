"""Ways to the agents of other nodes that a request names, made when one is first asked for."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvstore.errors import LimitExceeded, RefusedError, TransportError
from kvstore_client.jobs import FetchJob
from kvstore_client.link import PeerLink
from kvstore_client.namespaces import Namespace
from kvstore_client.opening import LinkSetup, parse_peer
from kvstore_client.paths.base import FetchPath
from kvstore_client.paths.peer import PeerPath
from kvstore_client.selector import PathMeter
from kvstore_client.selector.gain import GainMeter
from kvstore_client.spread import Ways

# A decode node pulls from the prefill nodes of its requests. Beyond so many the one that was
# used longest ago is let go.
PEERS_MAX = 256


class PeerLinks:
    """Links to peers by endpoint. On the loop's thread.

    Args:
        namespaces: All that are open, by id; a peer is asked for each that it is needed for.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        setup: LinkSetup,
        namespaces: Mapping[bytes, Namespace],
    ) -> None:
        self._loop = loop
        self._setup = setup
        self._namespaces = namespaces
        self._links: OrderedDict[str, PeerLink] = OrderedDict()
        # By how many each is used.
        self._users: Counter[PeerLink] = Counter()
        self._closing: set[asyncio.Task[None]] = set()

    def links(self) -> list[PeerLink]:
        """Those that exist."""
        return list(self._links.values())

    @contextmanager
    def used(self, peer: str) -> Iterator[PeerLink]:
        """The link to a peer, which is not let go before the block ends.

        Raises:
            ConfigError: The name of the peer is no endpoint.
            LimitExceeded: Too many others are used.
        """
        endpoint = parse_peer(peer, "peer")
        name = str(endpoint)
        link = self._links.get(name)
        if link is None:
            self._make_room()
            link = self._links[name] = PeerLink(self._loop, endpoint, self._setup)
        self._links.move_to_end(name)
        self._users[link] += 1
        try:
            yield link
        finally:
            self._users[link] -= 1
            if not self._users[link]:
                del self._users[link]

    async def ended(self) -> None:
        """Wait until nothing is left of links that were let go."""
        if self._closing:
            await asyncio.gather(*self._closing)

    def _make_room(self) -> None:
        if len(self._links) < PEERS_MAX:
            return
        for name, link in self._links.items():
            if link not in self._users:
                del self._links[name]
                link.close()
                task = self._loop.create_task(link.ended())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
                return
        raise LimitExceeded(f"{len(self._links)} peers are in use, the limit is {PEERS_MAX}")


async def ready(link: PeerLink, namespace: Namespace) -> None:
    """Wait until a peer was tried, and has a namespace open.

    Raises:
        KVStoreError: It cannot be reached, or refuses.
    """
    await link.tried()
    if not link.up:
        raise TransportError(f"peer {link.endpoint}: {link.last_error}")
    if not link.is_agent:
        raise RefusedError(f"peer {link.endpoint} is no agent: what it serves comes from storage")
    # Not only whether somebody has asked for it: his question may be under way.
    if not link.answered(namespace):
        await link.open_namespace(namespace)


class PeerWay(Ways):
    """The only way to what a peer holds."""

    copied = False

    def __init__(self, link: PeerLink) -> None:
        self._way = (PeerPath(), link, PathMeter(GainMeter(), link.peer))

    def daemon_way(self, owner: int) -> tuple[FetchPath, PeerLink, PathMeter]:
        return self._way

    def relay_way(self, node_id: str) -> tuple[FetchPath, PeerLink, PathMeter]:
        raise AssertionError("a peer is not asked by relays")

    def spare_relay(self, job: FetchJob) -> str:
        return ""
