"""The way to one peer: three connections, kept up, and the requests that travel on them.

::

    control   requests with small replies, CANCEL, load reports: never behind payload
    fetch     FETCH, DATA towards us
    put       PUT, DATA away from us

If one breaks all three are closed and made anew, after a pause that grows from 50 ms to 5 s.
Nobody waits for that: requests fail at once while a link is down, and the caller goes on.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable
from typing import NamedTuple

from kvstore.endpoint import Endpoint
from kvstore.errors import KVStoreError, RefusedError, TransportError, TransportTimeout
from kvstore.loadreport import LoadReport
from kvstore.messages import (
    KEYS_PER_REQUEST_MAX,
    Cancel,
    Channel,
    Fetch,
    Goaway,
    Limits,
    Message,
    Namespaces,
    OpenNamespace,
    Put,
    Role,
    Subscribe,
    Welcome,
)
from kvstore.protocol import ClientProtocol, Reply, hello_message
from kvstore.transfer import FetchTransfer, PutTransfer
from kvstore.transport import connect
from kvstore.transport.connection import FrameConnection
from kvstore.wire import FrameType
from kvstore_client.breaker import Backoff, CircuitBreaker
from kvstore_client.namespaces import Namespace

logger = logging.getLogger(__name__)

# A daemon pushes a report at least every 200 ms; this much silence means that it hangs or
# that the network does, long before TCP would notice.
SILENCE_MAX_S = 5.0
# A request or a put whose memory the peer does not let go of after a cancel: its connection
# is taken down.
CANCEL_GRACE_S = 0.2
# Requests of each kind that are sent and not answered; more wait their turn here, because a
# server refuses what comes beyond its own limit of 256 a connection.
FETCHES_MAX = 128
# Fewer puts: the checksums of all that are begun at once are made in one turn of the loop.
PUTS_MAX = 16


class Channels(NamedTuple):
    """The three connections of a link that is up."""

    control: FrameConnection
    fetch: FrameConnection
    put: FrameConnection


class PeerLink:
    """Keeps the connections to one peer up, on the loop's thread.

    Args:
        endpoint: Where the peer is.
        node_id, session, token: How we introduce ourselves.
        request_ids: Ids that are unique within the session.
        timeout_s: For connecting, and for requests without payload.

    Attributes:
        fetch_slots, put_slots: To be held around `fetch` and `put`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: Endpoint,
        node_id: str,
        session: bytes,
        token: str,
        request_ids: itertools.count[int],
        timeout_s: float,
        on_report: Callable[[LoadReport], None],
        draws: random.Random,
    ) -> None:
        self.endpoint = endpoint
        self.welcome: Welcome | None = None
        self.transport = endpoint.scheme
        self.breaker = CircuitBreaker()
        self.last_error: Exception = TransportError(f"{endpoint}: not connected yet")
        self._loop = loop
        self._node_id = node_id
        self._session = session
        self._token = token
        self._request_ids = request_ids
        self._timeout_s = timeout_s
        self._on_report = on_report
        self._draws = draws
        self._namespaces: dict[bytes, Namespace] = {}
        self._refused: dict[bytes, Exception] = {}
        self._channels: Channels | None = None
        self.fetch_slots = asyncio.Semaphore(FETCHES_MAX)
        self.put_slots = asyncio.Semaphore(PUTS_MAX)
        self._closed = False
        self._going_away = False
        self._down = asyncio.Event()
        self._tried = asyncio.Event()
        self._task = loop.create_task(self._keep_up())

    @property
    def up(self) -> bool:
        """Whether requests can be sent now."""
        return self._channels is not None

    @property
    def peer(self) -> str:
        """The peer's node id, or its endpoint before it ever answered."""
        return self.welcome.node_id if self.welcome else str(self.endpoint)

    @property
    def limits(self) -> Limits:
        """What the peer takes at most."""
        return self.welcome.limits if self.welcome else Limits()

    @property
    def keys_max(self) -> int:
        """Keys in one request, by the limits of both sides."""
        return max(1, min(self.limits.keys_per_request, KEYS_PER_REQUEST_MAX))

    async def tried(self) -> None:
        """Wait until the first attempt to connect has succeeded or failed."""
        await self._tried.wait()

    def allow(self) -> bool:
        """Whether a request may be sent now: the link is up, its peer is not shutting down,
        and the breaker lets it pass. Who gets True reports the outcome."""
        if self._channels is None or self._going_away:
            return False
        return self.breaker.allow(self._loop.time(), self._draws.random())

    def close(self) -> None:
        """Take the connections down at once; requests under way fail."""
        self._closed = True
        self._task.cancel()
        self._take_down(TransportError("the client was closed"))

    async def ended(self) -> None:
        """Wait until nothing of a closed link is left on the loop."""
        # Not `await self._task`: that could not tell its cancellation from ours.
        await asyncio.wait([self._task])

    # --- requests --------------------------------------------------------------------------

    async def open_namespace(self, namespace: Namespace) -> None:
        """Open a namespace now if the link is up, and whenever it comes up again.

        Raises:
            RefusedError: The peer says no (another layout, a limit).
        """
        self._namespaces[namespace.id] = namespace
        if self._channels is not None:
            await self._open_namespace(self._channels.control, namespace)

    def refusal(self, namespace: Namespace) -> Exception | None:
        """Why the peer does not serve a namespace; None if it does."""
        return self._refused.get(namespace.id)

    def unavailable(self) -> TransportError:
        """Why nothing can be sent now."""
        if self._going_away:
            return TransportError(f"{self.peer} is shutting down")
        if self.up:
            return TransportError(f"{self.peer} is left alone: {self.breaker.state}")
        return TransportError(f"{self.endpoint} is down: {self.last_error}")

    async def call(
        self, type: FrameType, message: Message, timeout_s: float | None = None
    ) -> Message:
        """A request with one reply, on the control connection.

        Raises:
            TransportError: The link is down or breaks; TransportTimeout when no reply comes.
            RefusedError: The peer says no.
        """
        if self._channels is None:
            raise self.unavailable()
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        return await self._ask(self._channels.control, type, message, limit_s)

    async def _ask(
        self, control: FrameConnection, type: FrameType, message: Message, limit_s: float
    ) -> Message:
        waiter: asyncio.Future[Reply] = self._loop.create_future()

        def on_reply(reply: Reply) -> None:
            if not waiter.done():
                waiter.set_result(reply)

        request_id = next(self._request_ids)
        _client(control).call(request_id, type, message, on_reply)
        try:
            async with asyncio.timeout(limit_s):
                reply = await waiter
        except TimeoutError:
            self.failed()
            raise TransportTimeout(
                f"{type.name} to {self.peer}: no reply in {limit_s:g} s"
            ) from None
        if not isinstance(reply, TransportError):
            self.succeeded()  # a refusal is an answer too
        if isinstance(reply, Exception):
            raise reply
        return reply  # type: ignore[return-value]

    def tell(self, type: FrameType, message: Message) -> None:
        """A request whose reply nobody waits for; nothing happens while the link is down."""
        if self._channels is not None:
            _client(self._channels.control).call(
                next(self._request_ids), type, message, lambda reply: None
            )

    def fetch(
        self, message: Fetch, transfer: FetchTransfer, on_reply: Callable[[Reply], None]
    ) -> int:
        """Begin a fetch; the link must be up. Returns the request id."""
        assert self._channels is not None
        request_id = next(self._request_ids)
        _client(self._channels.fetch).fetch(request_id, message, transfer, on_reply)
        return request_id

    def put(self, message: Put, transfer: PutTransfer, on_reply: Callable[[Reply], None]) -> int:
        """Begin a put; the link must be up. Returns the request id."""
        assert self._channels is not None
        request_id = next(self._request_ids)
        _client(self._channels.put).put(request_id, message, transfer, on_reply)
        return request_id

    def cancel_fetch(self, request_id: int) -> None:
        """Give a fetch up: nothing is written into its memory from now on."""
        if self._channels is not None:
            _client(self._channels.fetch).abandon(request_id)
            self._send_cancel(request_id)

    def cancel_put(self, request_id: int, transfer: PutTransfer) -> None:
        """Give a put up. Its memory is free when the transfer is idle; a peer that does not
        take what is half sent has 200 ms, then the link is taken down."""
        channels = self._channels
        if channels is None:
            return
        _client(channels.put).abandon(request_id)
        self._send_cancel(request_id)
        self.expect_idle(transfer)

    def expect_idle(self, transfer: PutTransfer) -> None:
        """A put has ended: its peer has 200 ms to take what is half sent."""
        if self._channels is not None and not transfer.idle:
            self._loop.call_later(CANCEL_GRACE_S, self._check_idle, self._channels, transfer)

    def take_report(self, report: LoadReport) -> None:
        """A reply brought a load report along."""
        self._on_report(report)

    def succeeded(self) -> None:
        """A request was answered."""
        self.breaker.success(self._loop.time())

    def failed(self) -> None:
        """A request was not answered."""
        self.breaker.failure(self._loop.time())

    # --- keeping up ------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        backoff = Backoff()
        while not self._closed:
            try:
                await self._bring_up()
                backoff.reset()
                self._tried.set()
                await self._watch()
            except KVStoreError as error:
                self.last_error = error
                self.failed()
                if not self._tried.is_set() or not isinstance(error, TransportError):
                    logger.warning("%s: %s", self.endpoint, error)
            except Exception as error:
                logger.exception("%s: internal error", self.endpoint)
                self._take_down(TransportError(f"internal error: {error!r}"))
            self._tried.set()
            await asyncio.sleep(backoff.next_delay_s(self._draws.random()))

    async def _bring_up(self) -> None:
        opened: list[FrameConnection] = []
        self._down.clear()
        try:
            for channel in (Channel.CONTROL, Channel.DATA, Channel.DATA):
                opened.append(await self._open(channel))
            channels = Channels(*opened)
            await self._open_namespaces(channels.control)
            # From here on nothing waits, so that nothing comes between.
            if any(connection.closed for connection in opened):
                raise TransportError(f"{self.endpoint}: closed a connection at once")
            self._going_away = False
            self._channels = channels
            self._subscribe()
        except BaseException as error:
            self._channels = None
            for connection in opened:
                connection.close(TransportError(f"{self.endpoint}: {error}"))
            raise
        logger.info("%s: connected to %s", self.endpoint, self.peer)

    async def _open(self, channel: Channel) -> FrameConnection:
        stream = await connect(self._loop, self.endpoint, self._timeout_s)
        welcomed: asyncio.Future[Welcome | Exception] = self._loop.create_future()

        def settle(result: Welcome | Exception) -> None:
            if not welcomed.done():
                welcomed.set_result(result)

        def on_closed(reason: Exception) -> None:
            settle(reason)
            self._take_down(reason)

        hello = hello_message(self._node_id, Role.CLIENT, self._session, channel, self._token)
        protocol = ClientProtocol(hello, settle, self._goaway)
        connection = FrameConnection(self._loop, stream, protocol, on_closed)
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await welcomed
        except BaseException as error:
            connection.close(TransportError("no WELCOME"))
            if isinstance(error, TimeoutError):
                raise TransportTimeout(f"{self.endpoint}: no WELCOME") from None
            raise
        if isinstance(result, Exception):
            raise result
        self.welcome = result
        return connection

    async def _open_namespaces(self, control: FrameConnection) -> None:
        """Open all that are wanted, those too that are added meanwhile, before the first
        request about one of them can be sent."""
        tried: set[bytes] = set()
        while wanted := [name for name in self._namespaces.values() if name.id not in tried]:
            for namespace in wanted:
                tried.add(namespace.id)
                try:
                    await self._open_namespace(control, namespace)
                except RefusedError as error:
                    logger.error("%s: %r: %s", self.endpoint, namespace, error)

    async def _open_namespace(self, control: FrameConnection, namespace: Namespace) -> None:
        self._refused.pop(namespace.id, None)
        message = OpenNamespace(pool=namespace.pool, layout=namespace.layout)
        try:
            reply = await self._ask(control, FrameType.OPEN_NAMESPACE, message, self._timeout_s)
        except RefusedError as error:
            self._refused[namespace.id] = error
            raise
        assert isinstance(reply, Namespaces)
        if [info.namespace for info in reply.namespaces] != [namespace.id]:
            refusal = RefusedError(f"{self.peer} computes another namespace id for {namespace!r}")
            self._refused[namespace.id] = refusal
            raise refusal

    def _subscribe(self) -> None:
        assert self._channels is not None
        _client(self._channels.control).subscribe(
            next(self._request_ids), Subscribe(), lambda reply: None, self._on_report
        )

    async def _watch(self) -> None:
        """Return when the link is down; take it down when the peer has fallen silent."""
        while self._channels is not None:
            try:
                async with asyncio.timeout(SILENCE_MAX_S):
                    await self._down.wait()
            except TimeoutError:
                channels = self._channels
                # What we sent says nothing: the kernel takes it also for a peer that is gone.
                silent_s = self._loop.time() - channels.control.received_at if channels else 0.0
                if silent_s > SILENCE_MAX_S:
                    self._take_down(TransportTimeout(f"{self.peer} is silent for {silent_s:.1f} s"))

    def _goaway(self, goaway: Goaway) -> None:
        if not self._going_away:
            logger.info("%s goes away: %s", self.peer, goaway.reason)
        self._going_away = True

    def _take_down(self, reason: Exception) -> None:
        channels, self._channels = self._channels, None
        if channels is None:
            return
        self.last_error = reason
        if not self._closed:
            logger.warning("lost %s: %s", self.peer, reason)
            self.failed()
        self._down.set()
        for connection in (channels.control, channels.fetch, channels.put):
            connection.close(reason)

    def _check_idle(self, channels: Channels, transfer: PutTransfer) -> None:
        if not transfer.idle and self._channels is channels:
            self._take_down(TransportTimeout(f"{self.peer} does not take a cancelled put"))

    def _send_cancel(self, request_id: int) -> None:
        self.tell(FrameType.CANCEL, Cancel(request_id=request_id))


def _client(connection: FrameConnection) -> ClientProtocol:
    protocol = connection.protocol
    assert isinstance(protocol, ClientProtocol)
    return protocol
