"""The server's half of one client: its session, and each of its connections.

Turns requests into calls of the block source, and what that answers into replies.

Thread rule: everything runs on the server's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvstore.blocksource import Answer, Asker, FetchStream, PutStream, lookup_reply
from kvstore.checksum import CHECKSUM_BYTES
from kvstore.errorcodes import exception_to_error
from kvstore.errors import (
    Draining,
    KVStoreError,
    LimitExceeded,
    LocalProtocolError,
    PermissionDenied,
    RefusedError,
    TransportError,
    TransportTimeout,
    Unsupported,
)
from kvstore.layout import Geometry, PieceMap
from kvstore.memorymessages import RDMA
from kvstore.memoryrequests import MemoryRequests
from kvstore.messages import (
    LOOKUP_PROBES_MAX,
    Cancel,
    CancelReply,
    Claim,
    CorruptReply,
    CorruptReport,
    Delete,
    DeleteReply,
    Done,
    Empty,
    Fetch,
    FetchOutcome,
    Hello,
    Limits,
    ListNamespaces,
    Lookup,
    Message,
    NamespaceInfo,
    Namespaces,
    OpenNamespace,
    Pool,
    Pools,
    Put,
    PutDone,
    PutOutcome,
    Release,
    ReleaseReply,
    Subscribe,
    Welcome,
    reasons,
)
from kvstore.protocol import ServerHooks, ServerProtocol
from kvstore.protocol.strands import Strands
from kvstore.sessionmemory import SessionMemory
from kvstore.transport import Stream
from kvstore.transport.connection import FrameConnection
from kvstore.views import LEASE_FIRST, SessionViews
from kvstore.wire import FrameType

if TYPE_CHECKING:
    from kvstore.serving import Server

logger = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

# Ids of requests that were cancelled before they arrived on their own connection.
EARLY_CANCELS_MAX = 256
# What comes over a socket of the file system comes from this host.
LOCAL_SCHEME = "unix:"
# Requests of one connection that wait for other nodes.
ANSWERS_PENDING_MAX = 256


class Session(Asker):
    """One client: its connections, and the owner of its leases."""

    def __init__(self, node_id: str, local: bool = False) -> None:
        super().__init__(node_id, local)
        self.connections: set[ServerConnection] = set()
        self.early_cancels: OrderedDict[int, None] = OrderedDict()
        self.memory = SessionMemory(node_id)
        self.views: SessionViews | None = None

    def close(self, reason: Exception) -> None:
        """Close all connections."""
        for connection in list(self.connections):
            connection.connection.close(TransportError(str(reason)))

    def cancel(self, request_id: int) -> bool:
        """Stop a request on whichever connection it runs; remember it if it is yet to come."""
        for connection in self.connections:
            if connection.protocol.stop_request(request_id, timed_out=False):
                return True
        self.early_cancels[request_id] = None
        if len(self.early_cancels) > EARLY_CANCELS_MAX:
            self.early_cancels.popitem(last=False)
        return False


class _Timing:
    """When a request came and when its first bytes went out, in loop time."""

    __slots__ = ("arrived_at", "begun_at", "deadline")

    def __init__(self, arrived_at: float, deadline: asyncio.TimerHandle) -> None:
        self.arrived_at = arrived_at
        self.begun_at = arrived_at
        self.deadline = deadline


class ServerConnection(ServerHooks):
    """One accepted connection: turns requests into calls of the block source."""

    def __init__(self, server: Server, stream: Stream, link: str) -> None:
        self.server = server
        self.link = link
        self.session: Session | None = None
        self.session_key: tuple[str, bytes, bool] | None = None
        self._answers: set[asyncio.Task[None]] = set()
        self.opened_at = server.loop.time()
        self._timings: dict[int, _Timing] = {}
        self._subscription: int | None = None
        self._reported_until = 0  # position in the output at which the last report ends
        self._sent_seen = 0
        self._written_bytes = 0  # by RDMA
        self._abandoned_count = 0  # requests that were under way when the connection ended
        self.protocol = ServerProtocol(self, server.options.in_flight_bytes_max)
        trusted = stream.peer_uid() in server.options.memory_uids
        if trusted:
            stream.accept_descriptors()
        self.memory_requests = MemoryRequests(self, trusted)
        self._share_handled = False
        self.strands = Strands(server.copier)
        self.strands.on_ready = self.protocol.on_output
        self.connection = FrameConnection(server.loop, stream, self.protocol, self._closed)

    @property
    def busy(self) -> bool:
        """Whether requests are under way or output is queued."""
        protocol = self.protocol
        return bool(protocol.request_count or self._answers or protocol.writer.queued_bytes)

    # --- ServerHooks -----------------------------------------------------------------------

    def hello(self, hello: Hello, version: int) -> Welcome:
        server = self.server
        if server.draining:
            raise Draining(f"{server.options.node_id} is shutting down")
        if len(server.connections) > server.options.connections_max:
            server.counters["connections_refused"] += 1
            raise LimitExceeded(
                f"{len(server.connections) - 1} connections are open,"
                f" the limit is {server.options.connections_max}"
            )
        local = self.link.startswith(LOCAL_SCHEME)
        key = (hello.node_id, hello.session, local)
        self.session_key = key
        self.session = server.sessions.setdefault(key, Session(hello.node_id, local))
        self.session.connections.add(self)
        return Welcome(
            version=version,
            node_id=server.options.node_id,
            boot_id=server.boot_id,
            role=server.options.role,
            capabilities=self.memory_requests.capabilities(),
            limits=Limits(in_flight_bytes=server.options.in_flight_bytes_max),
            host=server.host,
            local=server.local,
        )

    def request(self, type: FrameType, request_id: int, message: Message) -> None:
        server = self.server
        server.counters[f"requests_{type.name.lower()}"] += 1
        if server.draining and type not in _ALLOWED_WHILE_DRAINING:
            raise Draining(f"{server.options.node_id} is shutting down")
        handler = _HANDLERS.get(type)
        if handler is None:
            raise Unsupported(f"{type.name} is not supported here")
        self._share_handled = type is FrameType.SHARE
        try:
            handler(self, request_id, message)
        except LocalProtocolError as error:
            # The source calls a wrong request our own mistake; here it is the peer's.
            raise RefusedError(str(error)) from error
        self._share_handled = False

    def refused(self, type: FrameType, error: KVStoreError) -> None:
        if type is FrameType.SHARE and not self._share_handled:
            # It was read no further, and its memory came along.
            self.memory_requests.drop_descriptor()
        self._share_handled = False
        self._count_refusal(type, error)

    def _count_refusal(self, type: FrameType, error: KVStoreError) -> None:
        told = exception_to_error(error)
        counters = self.server.counters
        counters["requests_refused"] += 1
        counters[f"requests_refused_{told.code}"] += 1
        text = "%s from %s refused: %s"
        self.server.note(logging.INFO, text, type.name, self.peer_name(), told.message)

    def fetch_begins(self, request_id: int) -> None:
        self._timings[request_id].begun_at = self.server.loop.time()

    def fetch_done(self, request_id: int, stream: FetchStream) -> Done:
        timing = self._end(request_id)
        outcomes = stream.outcomes()
        for outcome in FetchOutcome:
            count = outcomes.count(outcome)
            if count:
                self.server.counters[f"fetch_blocks_{outcome.name.lower()}"] += count
        queued_s = service_s = 0.0
        if timing is not None:
            queued_s = timing.begun_at - timing.arrived_at
            service_s = self.server.loop.time() - timing.begun_at
        return Done(
            outcomes=outcomes,
            tiers=stream.tiers(),
            served_by=stream.served_by(),
            errors=reasons(stream.errors()),
            plan=stream.plan(),
            queued_us=int(max(0.0, queued_s) * 1e6),
            service_us=int(max(0.0, service_s) * 1e6),
            report=self.server.report(),
        )

    def put_done(self, request_id: int, stream: PutStream) -> PutDone:
        self._end(request_id)
        outcomes = stream.outcomes()
        for outcome in PutOutcome:
            count = outcomes.count(outcome)
            if count:
                self.server.counters[f"put_blocks_{outcome.name.lower()}"] += count
        return PutDone(
            outcomes=outcomes, errors=reasons(stream.errors()), report=self.server.report()
        )

    def moved(self, kind: str, transport: str, size_bytes: int) -> None:
        name = transport or self.connection.stream.transport
        self.server.counters[f"{kind}_bytes_by_{name}"] += size_bytes
        if transport == RDMA and kind == "fetch":
            self._written_bytes += size_bytes

    # --- requests --------------------------------------------------------------------------

    def _open_namespace(self, request_id: int, message: OpenNamespace) -> None:
        session = self.session
        assert session is not None

        only = self.server.options.pool
        if only and message.pool != only:
            raise PermissionDenied(
                f"pool {message.pool!r}: this process serves pool {only!r} alone (--pool)"
            )

        def reply(info: NamespaceInfo) -> Message:
            session.namespaces.add(info.namespace)
            return Namespaces(namespaces=(info,))

        answer = self.server.source.open_namespace(message.pool, message.layout, session)
        self.answer(FrameType.OPEN_NAMESPACE, request_id, answer, reply)

    def _namespaces(self, request_id: int, message: ListNamespaces) -> None:
        reply = Namespaces(namespaces=tuple(self.server.source.namespaces(message.pool)))
        self.protocol.reply(FrameType.NAMESPACES, request_id, reply)

    def _pool(self, request_id: int, message: Pool) -> None:
        reply = Pools(pools=tuple(self.server.source.administer_pool(message)))
        self.protocol.reply(FrameType.POOL, request_id, reply)

    def _lookup(self, request_id: int, message: Lookup) -> None:
        probes = len(message.keys) * len(message.namespaces)
        if probes > LOOKUP_PROBES_MAX:
            raise LimitExceeded(
                f"LOOKUP of {len(message.keys)} keys in {len(message.namespaces)} namespaces:"
                f" their product is {probes}, the limit is {LOOKUP_PROBES_MAX}"
            )
        assert self.session is not None
        answer: Any = self.server.source.lookup(
            message.namespaces, message.keys, message.lease_ms, self.session, message.extents
        )
        self.answer(FrameType.LOOKUP, request_id, answer, lookup_reply)

    def _fetch(self, request_id: int, message: Fetch) -> None:
        self.protocol.check_room(request_id)
        source = self.server.source
        pieces = PieceMap(
            Geometry(source.layer_bytes(message.namespace)),
            len(message.keys),
            message.layer_first,
            message.layer_last,
            message.group_layers,
        )
        session = self.session
        assert session is not None
        sink = None
        if message.memory is not None:
            self._hold_end(session)
            sink = session.memory.sink(
                message.memory, message.namespace, message.keys, pieces, self.strands
            )
        stream = source.fetch(message.namespace, message.keys, pieces, session, message)
        self.begin(request_id, message.deadline_ms)
        self.protocol.add_fetch(request_id, stream, message.priority, sink)
        self.cancelled_early(request_id)

    def _put(self, request_id: int, message: Put) -> None:
        self.protocol.check_room(request_id)
        source = self.server.source
        layer_bytes = _offered(source.layer_bytes(message.namespace), message)
        expected = len(message.keys) * len(layer_bytes) * CHECKSUM_BYTES
        if len(message.checksums) != expected:
            raise LimitExceeded(
                f"PUT with {len(message.checksums)} bytes of checksums for {len(message.keys)}"
                f" blocks of {len(layer_bytes)} layers, expected {expected}"
            )
        session = self.session
        assert session is not None
        puller = None
        if message.memory is not None:
            geometry = Geometry(layer_bytes)
            self._hold_end(session)
            puller = session.memory.puller(
                message.memory, geometry, len(message.keys), self.strands
            )
        stream = source.put(
            message.namespace, message.keys, message.checksums, message.ack, session, message
        )
        self.begin(request_id, message.deadline_ms)
        self.protocol.add_put(request_id, stream, sum(layer_bytes), puller)
        self.cancelled_early(request_id)

    def _delete(self, request_id: int, message: Delete) -> None:
        assert self.session is not None
        answer = self.server.source.delete(
            message.namespace, message.keys, self.session, message.extents
        )
        self.answer(
            FrameType.DELETE, request_id, answer, lambda deleted: DeleteReply(deleted=deleted)
        )

    def _release(self, request_id: int, message: Release) -> None:
        assert self.session is not None
        if all(number >= LEASE_FIRST for number in message.leases):
            views = self.session.views
            held = [views is not None and views.release(number) for number in message.leases]
            self.protocol.reply(FrameType.RELEASE, request_id, ReleaseReply(held=tuple(held)))
            return
        answer = self.server.source.release(message.leases, self.session)
        self.answer(
            FrameType.RELEASE, request_id, answer, lambda held: ReleaseReply(held=tuple(held))
        )

    def _claim(self, request_id: int, message: Claim) -> None:
        assert self.session is not None
        if not self.session.local:
            raise PermissionDenied("only an engine of this node, on its unix socket, may claim")
        reply = self.server.source.claim(message, self.session)
        self.protocol.reply(FrameType.CLAIM, request_id, reply)

    def _cancel(self, request_id: int, message: Cancel) -> None:
        assert self.session is not None
        found = self.session.cancel(message.request_id)
        self.protocol.reply(FrameType.CANCEL, request_id, CancelReply(found=found))

    def _corrupt_report(self, request_id: int, message: CorruptReport) -> None:
        dropped = self.server.source.check(message.namespace, message.keys)
        self.server.note(
            logging.WARNING,
            "%s reports %d corrupt blocks, %d of ours were bad and are dropped",
            self.peer_name(),
            len(message.keys),
            sum(dropped),
        )
        self.protocol.reply(FrameType.CORRUPT_REPORT, request_id, CorruptReply(dropped=dropped))

    def _subscribe(self, request_id: int, message: Subscribe) -> None:
        if self._subscription is not None:
            raise LimitExceeded("this connection has a subscription already")
        self._subscription = request_id
        self.protocol.reply(FrameType.SUBSCRIBE, request_id, Empty())
        self.server.reporter.subscribe(self._push_report, message.interval_ms)

    def _status(self, request_id: int, message: Empty) -> None:
        self.protocol.reply(FrameType.STATUS, request_id, self.server.status())

    def _ping(self, request_id: int, message: Empty) -> None:
        self.protocol.reply(FrameType.PING, request_id, Empty())

    # --- the rest --------------------------------------------------------------------------

    def _push_report(self, encoded: bytes) -> None:
        assert self._subscription is not None
        writer = self.protocol.writer
        # A subscriber that reads nothing gets no second report to hold for it.
        if writer.sent_total >= self._reported_until:
            self.protocol.report(self._subscription, encoded)
            self._reported_until = writer.sent_total + writer.queued_bytes

    def answer(
        self,
        type: FrameType,
        request_id: int,
        answer: Answer[AnswerT],
        reply: Callable[[AnswerT], Message],
    ) -> None:
        """Reply now, or when the source knows."""
        if not isinstance(answer, Awaitable):
            self.protocol.reply(type, request_id, reply(answer))
            return
        if len(self._answers) >= ANSWERS_PENDING_MAX:
            if asyncio.iscoroutine(answer):
                answer.close()
            raise LimitExceeded(
                f"{len(self._answers)} requests of this connection wait for other nodes, the"
                f" limit is {ANSWERS_PENDING_MAX}"
            )
        task = self.server.loop.create_task(self._answer_later(type, request_id, answer, reply))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        if asyncio.iscoroutine(answer):
            close = answer.close  # it has not begun if the task is cancelled at once
            task.add_done_callback(lambda _: close())

    async def _answer_later(
        self,
        type: FrameType,
        request_id: int,
        answer: Awaitable[AnswerT],
        reply: Callable[[AnswerT], Message],
    ) -> None:
        try:
            self.protocol.reply(type, request_id, reply(await answer))
        except KVStoreError as error:
            if isinstance(error, LocalProtocolError):
                error = RefusedError(str(error))
            self._count_refusal(type, error)
            self.protocol.refuse_request(request_id, error)
        except Exception as error:
            logger.exception("%s: internal error in an answer", type.name)
            self.protocol.refuse_request(request_id, RefusedError(f"internal error: {error!r}"))

    def begin(self, request_id: int, deadline_ms: int) -> None:
        deadline = self.server.loop.call_later(deadline_ms / 1e3, self._deadline, request_id)
        self._timings[request_id] = _Timing(self.server.loop.time(), deadline)
        self.server.reporter.touch()

    def _end(self, request_id: int) -> _Timing | None:
        timing = self._timings.pop(request_id, None)
        if timing is not None:
            timing.deadline.cancel()
        if self.protocol.lost_by is not None:
            self._abandoned_count += 1
        self.server.reporter.touch()
        return timing

    def _deadline(self, request_id: int) -> None:
        self.server.counters["requests_timed_out"] += 1
        self.protocol.stop_request(request_id)

    def cancelled_early(self, request_id: int) -> None:
        assert self.session is not None
        if request_id in self.session.early_cancels:
            del self.session.early_cancels[request_id]
            self.protocol.stop_request(request_id, timed_out=False)

    def sweep(self, now: float) -> None:
        """Close the connection if its peer has left it hanging."""
        options = self.server.options
        connection, protocol = self.connection, self.protocol
        # Each direction by itself: who sends PING after PING may still read nothing.
        stalled_s = 0.0
        if protocol.writer.queued_bytes:
            stalled_s = now - connection.sent_at
        if protocol.reader.mid_frame:
            stalled_s = max(stalled_s, now - connection.received_at)
        if self.session is None and now - self.opened_at > options.hello_timeout_s:
            self.connection.close(TransportTimeout("no HELLO"))
        elif stalled_s > options.stall_timeout_s:
            self.server.counters["connections_stalled"] += 1
            self.connection.close(TransportTimeout(f"{self.peer_name()} has stalled"))

    def take_sent_bytes(self) -> int:
        """Bytes that were sent, or written by RDMA, since the last call."""
        total = self.protocol.writer.sent_total + self._written_bytes
        sent, self._sent_seen = total - self._sent_seen, total
        return sent

    def peer_name(self) -> str:
        node = self.session.node_id if self.session else "?"
        return f"{node} ({self.connection.stream.peer})"

    def _hold_end(self, session: Session) -> None:
        """The end of the socket will tell the peer that nobody touches its memory any more."""
        if session.memory.end is None:  # with RDMA it has queue pairs to end
            self.connection.on_detached = self._end_when_idle

    def _end_when_idle(self, fd: int) -> None:
        if fd >= 0:
            self.strands.when_idle(partial(os.close, fd))

    def _closed(self, reason: Exception) -> None:
        server = self.server
        for timing in self._timings.values():
            timing.deadline.cancel()
        self._timings.clear()
        for task in self._answers:
            task.cancel()
        if self._subscription is not None:
            server.reporter.unsubscribe(self._push_report)
        server.reporter.account(self)
        server.connections.discard(self)
        server.counters["connections_closed"] += 1
        if isinstance(reason, TransportError):
            logger.debug("%s: %s", self.peer_name(), reason)
        else:
            server.counters["connections_broken"] += 1
            text = "connection of %s dropped: %s"
            server.note(logging.WARNING, text, self.peer_name(), reason)
        if self._abandoned_count:
            server.counters["requests_abandoned"] += self._abandoned_count
            text = "%d requests under way ended with the connection of %s: %s"
            server.note(logging.INFO, text, self._abandoned_count, self.peer_name(), reason)
        if self.session is not None and self.session_key is not None:
            self.session.connections.discard(self)
            if not self.session.connections:
                server.sessions.pop(self.session_key, None)
                # The last one first; all of them, even if one fails.
                with contextlib.ExitStack() as ending:
                    if self.session.views is not None:
                        ending.callback(self.session.views.close)
                    ending.callback(self.session.memory.close)
                    ending.callback(server.source.owner_gone, self.session)
        server.reporter.touch()


def _offered(layer_bytes: tuple[int, ...], message: Put) -> tuple[int, ...]:
    """Bytes of the layers that a put brings: all, or those of an offer."""
    first, last = message.layer_first, message.layer_last
    if not last and not first:
        return layer_bytes
    if not message.offer or not first < last <= len(layer_bytes):
        raise LocalProtocolError(
            f"PUT of layers [{first}, {last}): must be a non-empty range within"
            f" [0, {len(layer_bytes)}), and only offers are in parts"
        )
    return layer_bytes[first:last]


_ALLOWED_WHILE_DRAINING = frozenset(
    {
        FrameType.CANCEL,
        FrameType.RELEASE,
        FrameType.STATUS,
        FrameType.PING,
        FrameType.SUBSCRIBE,
        FrameType.UNSHARE,
        FrameType.RENEW,
    }
)
_HANDLERS: dict[FrameType, Callable[[ServerConnection, int, Any], None]] = {
    FrameType.OPEN_NAMESPACE: ServerConnection._open_namespace,
    FrameType.NAMESPACES: ServerConnection._namespaces,
    FrameType.POOL: ServerConnection._pool,
    FrameType.LOOKUP: ServerConnection._lookup,
    FrameType.FETCH: ServerConnection._fetch,
    FrameType.PUT: ServerConnection._put,
    FrameType.DELETE: ServerConnection._delete,
    FrameType.RELEASE: ServerConnection._release,
    FrameType.CLAIM: ServerConnection._claim,
    FrameType.CANCEL: ServerConnection._cancel,
    FrameType.CORRUPT_REPORT: ServerConnection._corrupt_report,
    FrameType.SUBSCRIBE: ServerConnection._subscribe,
    FrameType.STATUS: ServerConnection._status,
    FrameType.PING: ServerConnection._ping,
    FrameType.SHARE: lambda one, *request: one.memory_requests.share(*request),
    FrameType.UNSHARE: lambda one, *request: one.memory_requests.unshare(*request),
    FrameType.RAILS: lambda one, *request: one.memory_requests.rails(*request),
    FrameType.MAP: lambda one, *request: one.memory_requests.map(*request),
    FrameType.VIEW: lambda one, *request: one.memory_requests.view(*request),
    FrameType.RENEW: lambda one, *request: one.memory_requests.renew(*request),
}

__all__ = ["ServerConnection", "Session"]
