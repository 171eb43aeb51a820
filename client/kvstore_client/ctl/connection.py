"""A control connection to one node: questions, answers and load reports, no payload.

Beside `kvstore_client.link`, which keeps three connections up and never gives up: an operator
asks now, and wants to hear why there is no answer.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
from collections.abc import Callable
from typing import Any, TypeVar

from kvstore.endpoint import Endpoint
from kvstore.errors import KVStoreError, RemoteProtocolError, TransportError, TransportTimeout
from kvstore.loadreport import LoadReport
from kvstore.messages import (
    Channel,
    Empty,
    Goaway,
    Message,
    Role,
    Status,
    Subscribe,
    Welcome,
)
from kvstore.protocol import ClientProtocol, hello_message
from kvstore.transport import Stream, connect
from kvstore.transport.connection import FrameConnection
from kvstore.wire import FrameType

Answer = TypeVar("Answer")


class ControlConnection:
    """One connection on the running loop; made by `open_connection`.

    Attributes:
        endpoint: The other end, as the operator calls it.
        welcome: What the node said of itself.
    """

    welcome: Welcome

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: Endpoint,
        stream: Stream,
        timeout_s: float,
    ) -> None:
        self.endpoint = endpoint
        self._loop = loop
        self._timeout_s = timeout_s
        self._request_ids = itertools.count(1)
        self._welcomed: asyncio.Future[Any] = loop.create_future()
        self._ended: asyncio.Future[Exception] = loop.create_future()
        hello = hello_message(_node_id(), Role.CONTROL, os.urandom(16), Channel.CONTROL)
        self._protocol = ClientProtocol(hello, self._welcome, self._goaway)
        self._connection = FrameConnection(loop, stream, self._protocol, self._closed)

    @property
    def lost(self) -> bool:
        """Whether the connection is gone."""
        return self._ended.done()

    @property
    def received_at(self) -> float:
        """Loop time at which the last byte came."""
        return self._connection.received_at

    async def introduced(self) -> None:
        """Wait for the WELCOME.

        Raises:
            KVStoreError: The node refuses us, or says nothing in time.
        """
        self.welcome = await self._wait(self._welcomed, "HELLO")

    async def status(self) -> Status:
        """What the node says of itself.

        Raises:
            KVStoreError: It refuses, or the connection is lost, or no answer comes in time.
        """
        return await self._call(FrameType.STATUS, Empty(), Status)

    async def ping(self) -> float:
        """Ask for nothing; the seconds until the answer came.

        Raises:
            KVStoreError: As `status`.
        """
        sent_at = self._loop.time()
        await self._call(FrameType.PING, Empty(), Empty)
        return self._loop.time() - sent_at

    async def subscribe(self, on_report: Callable[[LoadReport], None]) -> None:
        """Have `on_report` called with each load report until the connection ends.

        Raises:
            KVStoreError: As `status`.
        """
        waiter: asyncio.Future[Any] = self._loop.create_future()
        self._protocol.subscribe(
            next(self._request_ids), Subscribe(), lambda reply: _settle(waiter, reply), on_report
        )
        await self._wait(waiter, "SUBSCRIBE")

    async def end(self, timeout_s: float) -> Exception | None:
        """Wait for the end of the connection, but not for longer than `timeout_s`; its reason."""
        await asyncio.wait([self._ended], timeout=timeout_s)
        return self._ended.result() if self._ended.done() else None

    def close(self, reason: Exception | None = None) -> None:
        """Hang up. Harmless when called again."""
        self._connection.close(reason or TransportError(f"{self.endpoint}: closed by us"))

    async def _call(self, type: FrameType, message: Message, expected: type[Answer]) -> Answer:
        waiter: asyncio.Future[Any] = self._loop.create_future()
        self._protocol.call(
            next(self._request_ids), type, message, lambda reply: _settle(waiter, reply)
        )
        reply = await self._wait(waiter, type.name)
        if not isinstance(reply, expected):
            raise RemoteProtocolError(f"{self.endpoint}: {_name(reply)} in answer to {type.name}")
        return reply

    async def _wait(self, waiter: asyncio.Future[Any], question: str) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await waiter
        except TimeoutError:
            raise TransportTimeout(
                f"{self.endpoint}: no answer to {question} in {self._timeout_s:g} s"
            ) from None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _welcome(self, welcome: Welcome) -> None:
        _settle(self._welcomed, welcome)

    def _goaway(self, goaway: Goaway) -> None:
        """Load reports tell of it: the node drains, and still answers questions."""

    def _closed(self, reason: Exception) -> None:
        _settle(self._welcomed, reason)
        _settle(self._ended, reason)


async def open_connection(endpoint: Endpoint, timeout_s: float) -> ControlConnection:
    """Connect and introduce ourselves.

    Args:
        timeout_s: For connecting, and for each answer.

    Raises:
        KVStoreError: The node cannot be reached or refuses us; the text names the endpoint.
    """
    loop = asyncio.get_running_loop()
    stream = await connect(loop, endpoint, timeout_s)
    connection = ControlConnection(loop, endpoint, stream, timeout_s)
    try:
        await connection.introduced()
    except BaseException:
        connection.close()
        raise
    return connection


def reason_text(endpoint: Endpoint, error: KVStoreError) -> str:
    """Why an endpoint failed, in words that name it."""
    text = str(error) or type(error).__name__
    return text if str(endpoint) in text else f"{endpoint}: {text}"


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _name(reply: object) -> str:
    return type(reply).__name__


def _node_id() -> str:
    return f"kvctl-{platform.node() or 'localhost'}-{os.getpid()}"
