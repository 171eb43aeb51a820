"""Opening the connections of a link: by which of the peer's addresses, and as which session.

All connections that are opened together are one session at the peer, and no other is: what it has
left of those before, whose end got lost in the network, must not be joined. What it keeps for a
session, memory and queue pairs and leases, is gone here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import KVStoreError, RefusedError, TransportError, TransportTimeout
from kvstore.loadreport import LoadReport
from kvstore.memorymessages import SHM
from kvstore.messages import Channel, Goaway, Role, Welcome
from kvstore.protocol import ClientProtocol, hello_message
from kvstore.transport import connect
from kvstore.transport.connection import FrameConnection
from kvstore.transport.rdma_nodes import endpoint_options
from kvstore.transport.shm import host_name
from kvstore_client.agreement import Agreement, Channels
from kvstore_client.transports import AUTO

if TYPE_CHECKING:
    from kvstore_client.link import PeerLink

logger = logging.getLogger(__name__)

SESSION_BYTES = 16


class LinkSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What all links of a client have in common.

    Attributes:
        node_id, role, token: How we introduce ourselves.
        request_ids: Ids that are unique within a session.
        timeout_s: For connecting, and for requests without payload.
        on_report: Called with every load report that comes, and the link that brought it.
        draws: Chance, for backoff and ramp-in.
        counters: Where to count.
        agreement: On what is to move payload.
        verify: Whether what peers have not verified in our memory is verified.
    """

    node_id: str
    role: Role = Role.CLIENT
    token: str
    request_ids: itertools.count[int]
    timeout_s: float
    on_report: Callable[[PeerLink, LoadReport], None]
    draws: random.Random
    counters: Counter[str]
    agreement: Agreement
    verify: bool = True


def parse_peer(text: str, option: str) -> Endpoint:
    """Where a peer is; what its endpoint says of RDMA is checked too.

    Args:
        option: Name of the option it came from, for the error.

    Raises:
        ConfigError: Names the option, the text and what would be right.
    """
    endpoint = parse_endpoint(text, option)
    endpoint_options(endpoint, option)
    return endpoint


class Opening:
    """Connections to one peer that are being opened, as one session. On the loop's thread.

    Args:
        endpoint: Where the peer is.
        daemon_only: Refuse a peer that is the agent of a node.
        on_closed: Called with the reason when one of them is gone.
        on_goaway: Called when the peer takes no new requests.

    Attributes:
        endpoint: By which the peer is reached; its own socket where it is nearer.
        welcome: The newest that was accepted; None before.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: Endpoint,
        setup: LinkSetup,
        daemon_only: bool,
        on_closed: Callable[[Exception], None],
        on_goaway: Callable[[Goaway], None],
    ) -> None:
        self.endpoint = endpoint
        self.welcome: Welcome | None = None
        self._loop = loop
        self._setup = setup
        self._session = os.urandom(SESSION_BYTES)
        self._daemon_only = daemon_only
        self._on_closed = on_closed
        self._on_goaway = on_goaway
        self._opened: list[FrameConnection] = []

    @property
    def any_closed(self) -> bool:
        """Whether one of them is gone again."""
        return any(connection.closed for connection in self._opened)

    async def channels(self) -> Channels:
        """Open all three.

        Raises:
            KVStoreError: The peer is not there, or wants none of us.
        """
        self._opened.append(await self._control())
        for _ in range(2):
            self._opened.append(await self._open(Channel.DATA, self.endpoint))
        return Channels(*self._opened)

    def close(self, reason: Exception) -> None:
        """Close what was opened."""
        for connection in self._opened:
            connection.close(reason)

    async def _control(self) -> FrameConnection:
        """The first connection; by the peer's unix socket if it is on this host, and has one."""
        control = await self._open(Channel.CONTROL, self.endpoint)
        welcome = self.welcome
        assert welcome is not None
        if (
            self._setup.agreement.wanted not in (AUTO, SHM)
            or not welcome.local
            or self.endpoint.scheme == "unix"
            or welcome.host != host_name()
        ):
            return control
        try:
            local = parse_endpoint(welcome.local)
            nearer = await self._open(Channel.CONTROL, local)
        except KVStoreError as error:
            name, path = welcome.node_id, welcome.local
            logger.info("%s: its socket %s cannot be used: %s", name, path, error)
            self.welcome = welcome
            return control
        except BaseException:
            control.close(TransportError("given up"))
            raise
        found = self.welcome
        if found is None or found.boot_id != welcome.boot_id:  # another daemon has its path
            nearer.close(TransportError("another server"))
            self.welcome = welcome
            return control
        control.close(TransportError("not needed"))
        self.endpoint = local
        return nearer

    async def _open(self, channel: Channel, endpoint: Endpoint) -> FrameConnection:
        setup = self._setup
        stream = await connect(self._loop, endpoint, setup.timeout_s)
        welcomed: asyncio.Future[Welcome | Exception] = self._loop.create_future()

        def settle(result: Welcome | Exception) -> None:
            if not welcomed.done():
                welcomed.set_result(result)

        def on_closed(reason: Exception) -> None:
            settle(reason)
            self._on_closed(reason)

        hello = hello_message(setup.node_id, setup.role, self._session, channel, setup.token)
        protocol = ClientProtocol(hello, settle, self._on_goaway)
        connection = FrameConnection(self._loop, stream, protocol, on_closed)
        try:
            async with asyncio.timeout(setup.timeout_s):
                result = await welcomed
        except BaseException as error:
            connection.close(TransportError("no WELCOME"))
            if isinstance(error, TimeoutError):
                raise TransportTimeout(f"{endpoint}: no WELCOME") from None
            raise
        if isinstance(result, Exception):
            raise result
        if self._daemon_only and result.role is Role.AGENT:
            # Two of them that are each other's storage would ask each other without end.
            refusal = RefusedError(
                f"{result.node_id} is the agent of a node: an agent reads from daemons only"
            )
            connection.close(refusal)
            raise refusal
        self.welcome = result
        return connection


__all__ = ["LinkSetup", "Opening", "parse_peer"]
