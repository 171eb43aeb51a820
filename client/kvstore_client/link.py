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
import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.endpoint import Endpoint
from kvstore.errors import (
    KVStoreError,
    RefusedError,
    TransportError,
    TransportTimeout,
    UnknownNamespace,
)
from kvstore.loadreport import LoadReport
from kvstore.messages import (
    KEYS_PER_REQUEST_MAX,
    Cancel,
    CorruptReport,
    Fetch,
    Goaway,
    Limits,
    Message,
    OpenNamespace,
    Put,
    Role,
    Subscribe,
    Welcome,
)
from kvstore.protocol import ClientProtocol, Reply
from kvstore.transfer import FetchTransfer, PutTransfer
from kvstore.transport.connection import FrameConnection
from kvstore.wire import FrameType
from kvstore_client.agreement import Channels
from kvstore_client.breaker import RAMP_SHARE_MIN, Backoff, BreakerState, CircuitBreaker
from kvstore_client.linkmemory import LinkMemory, NamedMemory
from kvstore_client.memory import Region
from kvstore_client.namespaces import Namespace, WantedNamespaces
from kvstore_client.opening import LinkSetup, Opening

logger = logging.getLogger(__name__)


# A daemon pushes a report at least every 200 ms; this much silence means that it hangs or
# that the network does, long before TCP would notice.
SILENCE_MAX_S = 5.0
# A request or a put whose memory the peer does not let go of after a cancel: its connection
# is taken down.
CANCEL_GRACE_S = 0.2
# Faulting in 100 GiB of a region takes the peer that long.
SHARE_TIMEOUT_S = 30.0
# Requests of each kind that are sent and not answered; more wait their turn here, because a
# server refuses what comes beyond its own limit of 256 a connection.
FETCHES_MAX = 128
# Fewer puts: the checksums of all that are begun at once are made in one turn of the loop.
PUTS_MAX = 16
# A key and its framing in the metadata of a request, and all but the keys, and the names of
# regions, of most requests.
KEY_METADATA_BYTES = 68
FIXED_METADATA_BYTES = 1024
# A bad disk or memory module damages thousands of blocks: one line in ten seconds says so.
CORRUPT_LOG_PAUSE_S = 10.0


def closed_error() -> TransportError:
    """Why nothing is done any more for a client that was closed."""
    return TransportError("the client was closed")


class PeerLink:
    """Keeps the connections to one peer up, on the loop's thread.

    Args:
        endpoint: Where the peer is.
        daemon_only: Refuse a peer that is the agent of a node.

    Attributes:
        wanted: What is to move payload; see `AsyncClient`.
        memory: The way into memory of this client, None without one or while the link is down.
        fetch_slots, put_slots: To be held around `fetch` and `put`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: Endpoint,
        setup: LinkSetup,
        daemon_only: bool = False,
    ) -> None:
        self.endpoint = endpoint
        self._daemon_only = daemon_only
        self.welcome: Welcome | None = None
        self.memory: LinkMemory | None = None
        self.wanted = setup.agreement.wanted
        self.verify = setup.verify
        self.breaker = CircuitBreaker()
        self.last_error: Exception = TransportError(f"{endpoint}: not connected yet")
        self._loop = loop
        self._setup = setup
        self._request_ids = setup.request_ids
        self._timeout_s = setup.timeout_s
        self._draws = setup.draws
        self._counters = setup.counters
        self._namespaces = WantedNamespaces(str(endpoint))
        self._stream_transport = endpoint.scheme
        self._was_up = False
        self._corrupt_count = 0  # that the log has not been told of
        self._corrupt_logged_at: float | None = None
        self._channels: Channels | None = None
        self.fetch_slots = asyncio.Semaphore(FETCHES_MAX)
        self.put_slots = asyncio.Semaphore(PUTS_MAX)
        self._closed = False
        self._going_away = False
        self._down = asyncio.Event()
        self._tried = asyncio.Event()
        self._reopening: set[asyncio.Task[None]] = set()
        self._task = loop.create_task(self._keep_up())

    @property
    def transport(self) -> str:
        """What moves payload that is not named by place; or what was meant to, before the link
        was ever up."""
        return self._channels.fetch.stream.transport if self._channels else self._stream_transport

    @property
    def up(self) -> bool:
        """Whether requests can be sent now."""
        return self._channels is not None

    @property
    def usable(self) -> bool:
        """Whether requests can be sent now to a peer that is not shutting down, as far as is
        known; the breaker has its own say."""
        return self._channels is not None and not self._going_away

    def share(self, now: float) -> float:
        """The share of requests that may be sent now, from 0 to 1."""
        if not self.usable:
            return 0.0
        if self.breaker.state is BreakerState.OPEN and now >= (self.breaker.retry_at or 0.0):
            return RAMP_SHARE_MIN  # somebody must be the probe
        return self.breaker.share(now)

    def silent_s(self, now: float) -> float:
        """How long nothing at all has come from the peer."""
        if self._channels is None:
            return math.inf
        return now - max(connection.received_at for connection in self._channels)

    @property
    def fetched_at(self) -> float:
        """Loop time at which something has last come for any fetch."""
        return self._channels.fetch.received_at if self._channels is not None else -math.inf

    @property
    def is_agent(self) -> bool:
        """Whether the peer is the agent of a node, and no daemon."""
        return self.welcome is not None and self.welcome.role is Role.AGENT

    @property
    def peer(self) -> str:
        """The peer's node id, or its endpoint before it ever answered."""
        return self.welcome.node_id if self.welcome else str(self.endpoint)

    @property
    def limits(self) -> Limits:
        """What the peer takes at most."""
        return self.welcome.limits if self.welcome else Limits()

    def keys_max(self, each_bytes: int = KEY_METADATA_BYTES, more_bytes: int = 0) -> int:
        """Keys in one request, by the limits of both sides; at least one.

        Args:
            each_bytes: Metadata that a key brings along, itself included.
            more_bytes: Metadata beside the keys, where it is much.
        """
        limits = self.limits
        if self.memory is not None:
            more_bytes += self._setup.agreement.regions_bytes
        room = (limits.metadata_bytes - FIXED_METADATA_BYTES - more_bytes) // each_bytes
        return max(1, min(limits.keys_per_request, KEYS_PER_REQUEST_MAX, room))

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
        self._tried.set()  # nobody who waits for the first attempt learns more
        self._task.cancel()
        for task in self._reopening:
            task.cancel()
        self._take_down(closed_error())

    async def ended(self) -> None:
        """Wait until nothing of a closed link is left on the loop."""
        # Not `await self._task`: that could not tell its cancellation from ours.
        await asyncio.wait([self._task, *self._reopening])

    # --- requests --------------------------------------------------------------------------

    async def open_namespace(self, namespace: Namespace) -> None:
        """Open a namespace now if the link is up, and whenever it comes up again.

        Raises:
            RefusedError: The peer says no (another layout, a limit).
        """
        self._namespaces.add(namespace)
        if self._channels is not None:
            await self._namespaces.open(namespace, partial(self._ask_open, self._channels.control))

    def forget_namespace(self, namespace: Namespace) -> None:
        """Open a namespace no more when the link comes up."""
        self._namespaces.forget(namespace)

    def answered(self, namespace: Namespace) -> bool:
        """Whether the peer has ever said yes or no to a namespace."""
        return self._namespaces.answered(namespace)

    def refusal(self, namespace: Namespace) -> RefusedError | None:
        """Why the peer does not serve a namespace; None if it does. What may have changed
        since then is asked again in the background."""
        refusal = self._namespaces.refusal(namespace)
        if refusal is not None:
            self._reopen(namespace)
        return refusal

    def refused(self, error: RefusedError, namespaces: Sequence[Namespace] = ()) -> None:
        """A request about these namespaces was answered with no. Those that the peer does not
        have open (their generation was retired) are opened again, for the requests to come."""
        self.succeeded()  # it answered
        if isinstance(error, UnknownNamespace):
            for namespace in namespaces:
                self._reopen(namespace)

    def unavailable(self) -> TransportError:
        """Why nothing can be sent now."""
        if self._going_away:
            return TransportError(f"{self.peer} is shutting down")
        if self.up:
            return TransportError(f"{self.peer} is left alone: {self.breaker.state}")
        return TransportError(f"{self.endpoint} is down: {self.last_error}")

    async def call(
        self,
        type: FrameType,
        message: Message,
        timeout_s: float | None = None,
        on_late: Callable[[Reply], None] = lambda reply: None,
        carrier: bool = False,
    ) -> Message:
        """A request with one reply.

        Args:
            timeout_s: How long to wait; with 0 or less nothing is sent.
            on_late: Gets a reply that comes when nobody waits for it any more.
            carrier: Not on the control connection, but on that of fetches: what keeps the server
                busy for a while.

        Raises:
            TransportError: The link is down or breaks; TransportTimeout when no reply comes.
            RefusedError: The peer says no.
        """
        channels = self._channels
        if channels is None:
            raise self.unavailable()
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if limit_s <= 0:
            raise TransportTimeout(f"{type.name} to {self.peer}: no time is left, not sent")
        connection = channels.fetch if carrier else channels.control
        return await self._ask(connection, type, message, limit_s, on_late)

    async def _ask(
        self,
        connection: FrameConnection,
        type: FrameType,
        message: Message,
        limit_s: float,
        on_late: Callable[[Reply], None] = lambda reply: None,
    ) -> Message:
        waiter: asyncio.Future[Reply] = self._loop.create_future()

        def on_reply(reply: Reply) -> None:
            if waiter.done():
                on_late(reply)
            else:
                waiter.set_result(reply)

        request_id, begun_at = next(self._request_ids), self._loop.time()
        _client(connection).call(request_id, type, message, on_reply)
        try:
            async with asyncio.timeout(limit_s):
                reply = await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                on_late(waiter.result())  # in the same moment
            if not isinstance(error, TimeoutError):
                raise
            self.timed_out(begun_at)
            raise TransportTimeout(
                f"{type.name} to {self.peer}: no reply in {limit_s:g} s"
            ) from None
        if not isinstance(reply, TransportError):
            self.succeeded()  # a refusal is an answer too
        if isinstance(reply, Exception):
            raise reply
        return reply  # type: ignore[return-value]

    def tell(
        self,
        type: FrameType,
        message: Message,
        on_reply: Callable[[Reply], None] = lambda reply: None,
    ) -> None:
        """A request whose reply nobody waits for; nothing happens while the link is down."""
        if self._channels is not None:
            control = _client(self._channels.control)
            control.call(next(self._request_ids), type, message, on_reply)

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
        """Give a fetch up: nothing is written into its memory from now on; or, if it has named
        the memory to the peer, from the moment its last word is here."""
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

    def expect_free(self, named: NamedMemory) -> None:
        """A request was given up that has named memory: its peer has 200 ms for the last word,
        then the link is taken down."""

        def asked() -> bool:
            # The way of a link that was taken down ends by itself.
            return not named.free.done() and self.memory is named.way

        def check() -> None:
            if asked():
                self._take_down(TransportTimeout(f"{self.peer} does not end a cancelled request"))

        if asked():
            self._loop.call_later(CANCEL_GRACE_S, check)

    async def add_region(self, region: Region) -> None:
        """Let the peer reach a region, if the link is up and moves payload that way. What it
        refuses travels through the socket, if it may."""
        memory = self.memory
        if self._channels is None or memory is None:
            return
        try:
            refusal = await memory.offer(region)
        except KVStoreError as error:
            if self.memory is not memory:
                return  # when the link is up again, all regions are shared
            refusal = str(error)
        if refusal:
            logger.warning("%s: region of %d bytes: %s", self.peer, region.size_bytes, refusal)

    async def remove_region(self, region: Region) -> None:
        """The peer reaches a region no more when this returns."""
        if self.memory is not None:
            with contextlib.suppress(KVStoreError):  # the link is down: nobody reaches it
                await self.memory.remove(region)

    def take_report(self, report: LoadReport) -> None:
        """A load report has come, pushed or with a reply; of nobody but the peer itself: one
        that spoke for others could make all of them look full, or their own reports old."""
        if report.node_id == self.peer:
            self._setup.on_report(self, report)
        else:
            self._counters["reports_refused"] += 1

    def report_corrupt(self, namespace: Namespace, keys: Sequence[bytes]) -> None:
        """Blocks came from the peer that do not match their checksums: it looks at its own."""
        self.tell(FrameType.CORRUPT_REPORT, CorruptReport(namespace=namespace.id, keys=list(keys)))
        self._counters["corrupt_blocks"] += len(keys)
        self._corrupt_count += len(keys)
        now, logged_at = self._loop.time(), self._corrupt_logged_at
        if logged_at is None or now - logged_at >= CORRUPT_LOG_PAUSE_S:
            logger.warning(
                "%s served %d corrupt blocks since the last such line, the latest in %r",
                self.peer,
                self._corrupt_count,
                namespace,
            )
            self._corrupt_count, self._corrupt_logged_at = 0, now

    def succeeded(self) -> None:
        """A request was answered."""
        self.breaker.success(self._loop.time())

    def failed(self, begun_at: float | None = None) -> None:
        """A request was not answered, or a connection broke.

        Args:
            begun_at: Loop time at which the request was begun; None for what happens now.
        """
        was_open = self.breaker.state is BreakerState.OPEN
        self.breaker.failure(self._loop.time(), self._draws.random(), begun_at)
        if self.breaker.state is BreakerState.OPEN and not was_open:
            self._counters["breaker_openings"] += 1

    def timed_out(self, begun_at: float) -> None:
        """A request was not answered in time. That is a failure of the peer if nothing at all
        has come since then, on no connection; else it lives and is busy.

        Args:
            begun_at: Loop time at which the request was begun.
        """
        if self._channels is None:
            return  # its failure was counted when it went down
        if max(connection.received_at for connection in self._channels) > begun_at:
            self.succeeded()
        else:
            self.failed(begun_at)

    # --- keeping up ------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        backoff = Backoff()
        while not self._closed:
            begun_at = self._loop.time()
            try:
                await self._bring_up()
                backoff.reset()
                self._tried.set()
                await self._watch()
            except KVStoreError as error:
                self.last_error = error
                self.failed(begun_at)
                if not self._tried.is_set() or not isinstance(error, TransportError):
                    logger.warning("%s: %s", self.endpoint, error)
            except Exception as error:
                logger.exception("%s: internal error", self.endpoint)
                self._take_down(TransportError(f"internal error: {error!r}"))
            self._tried.set()
            await asyncio.sleep(backoff.next_delay_s(self._draws.random()))

    async def _bring_up(self) -> None:
        opening = Opening(
            self._loop,
            self.endpoint,
            self._setup,
            self._daemon_only,
            self._take_down,
            self._goaway,
        )
        memory: LinkMemory | None = None
        self._down.clear()
        try:
            channels = await opening.channels()
            self.welcome = opening.welcome
            assert self.welcome is not None
            ask = partial(self._ask_memory, channels.control)
            agreement = self._setup.agreement
            memory = await agreement.agree(
                self.endpoint, self.welcome, channels, ask, self._take_down
            )
            await self._namespaces.open_all(partial(self._ask_open, channels.control))
            if memory is not None:
                await agreement.share_all(memory, self.peer)
            # From here on nothing waits, so that nothing comes between.
            if opening.any_closed:
                raise TransportError(f"{self.endpoint}: closed a connection at once")
            if memory is not None and memory.failure is not None:
                raise TransportError(f"{self.endpoint}: {memory.failure}")
            self._going_away = False
            self._channels = channels
            self.memory = memory
            self._stream_transport = channels.fetch.stream.transport
            if self._was_up:
                self._counters["reconnects"] += 1
            self._was_up = True
            self._subscribe()
        except BaseException as error:
            self.welcome = opening.welcome or self.welcome
            self._channels = None
            if memory is not None:
                memory.close()
            opening.close(TransportError(f"{self.endpoint}: {error}"))
            raise
        logger.info("%s: connected to %s", self.endpoint, self.peer)

    async def _ask_memory(
        self,
        control: FrameConnection,
        type: FrameType,
        message: Message,
        on_late: Callable[[Reply], None] = lambda reply: None,
    ) -> Message:
        limit_s = max(self._timeout_s, SHARE_TIMEOUT_S)
        return await self._ask(control, type, message, limit_s, on_late)

    async def _ask_open(self, control: FrameConnection, message: OpenNamespace) -> Message:
        return await self._ask(control, FrameType.OPEN_NAMESPACE, message, self._timeout_s)

    def _reopen(self, namespace: Namespace) -> None:
        if self._channels is None or not self._namespaces.may_reopen(namespace, self._loop.time()):
            return  # what comes up opens them all

        async def reopen() -> None:
            try:
                await self.open_namespace(namespace)
            except KVStoreError as error:
                logger.warning("%s: %r is not opened again: %s", self.peer, namespace, error)
            else:
                logger.info("%s: opened %r again", self.peer, namespace)

        task = self._loop.create_task(reopen())
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)

    def _subscribe(self) -> None:
        assert self._channels is not None
        _client(self._channels.control).subscribe(
            next(self._request_ids), Subscribe(), lambda reply: None, self.take_report
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
        memory, self.memory = self.memory, None
        if memory is not None:
            memory.close()
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
