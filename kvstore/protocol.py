"""The conversation of one connection, sans I/O: who may say what, and when.

`ClientProtocol` and `ServerProtocol` own a `FrameReader` and a `FrameWriter`. The shell
(`kvstore.transport.connection.FrameConnection`) moves bytes between those and a socket; it
calls `receive` when some came and `fill` when the socket can take more. Neither side ever
waits here, and neither looks at a clock.

::

    client                                server
    HELLO (versions, session, channel) →
                                        ← WELCOME (version, limits)   or ERROR
    OPEN_NAMESPACE, LOOKUP, ... →
                                        ← the same type with flag REPLY, or ERROR
    FETCH →
                                        ← DATA* (payload), DONE
    PUT (keys, checksums) →
                                        ← WANT* (blocks to send)
    DATA* (payload) →
                                        ← PUT_DONE

An ERROR carries the id of the request that it refuses; with id 0 it ends the connection.
"""

from __future__ import annotations

import abc
import bisect
import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvstore.blocksource import Chunk, FetchStream, PutStream
from kvstore.errors import (
    KVStoreError,
    LimitExceeded,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
    Unsupported,
    VersionMismatch,
)
from kvstore.framing import Frame, FrameReader, FrameWriter
from kvstore.loadreport import LoadReport
from kvstore.messages import (
    REPLIES,
    REQUESTS,
    Channel,
    Data,
    Done,
    Error,
    ErrorCode,
    Fetch,
    FetchOutcome,
    Goaway,
    Hello,
    Message,
    Put,
    PutDone,
    PutOutcome,
    Want,
    Welcome,
    decode,
    encode,
    error_to_exception,
    exception_to_error,
)
from kvstore.transfer import FetchTransfer, PutTransfer
from kvstore.wire import (
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    VERSION_MAX,
    VERSION_MIN,
    Flags,
    FrameType,
    Header,
    encode_header,
)

# The writer is topped up to this: two frames, so that the socket never runs dry while the
# next one is made, and little enough that a CANCEL finds most of a fetch unsent.
FILL_BYTES = PAYLOAD_BYTES_MAX
# Fetches and puts under way on one connection; an engine batches, it does not flood.
REQUESTS_PER_CONNECTION_MAX = 256
# Requests of ours without a reply. Who waits for one gives up at some time, the peer does not;
# with this many it is no peer to talk to.
CALLS_MAX = 16_384
# Ids of puts that ended while their bytes may still be arriving. A client stops sending when
# it learns of the end, so only the newest matter.
ENDED_PUTS_MAX = 1024
# What a server holds for a peer that asks and does not read: two chunks of payload, which is
# most of the time in memory that exists anyway, and as much again of replies.
OUTPUT_BYTES_MAX = 4 * PAYLOAD_BYTES_MAX

Reply = msgspec.Struct | Exception


class FrameProtocol(abc.ABC):
    """What a `FrameConnection` needs of either side."""

    def __init__(self) -> None:
        self.reader = FrameReader(self._route)
        self.writer = FrameWriter()
        #: Set by the shell: something was queued outside of `receive` and `fill`.
        self.on_output: Callable[[], None] = lambda: None
        #: Why the connection is gone; None while it is not.
        self.lost_by: Exception | None = None

    def receive(self, count: int) -> None:
        """Account for received bytes and handle the frames that are complete.

        Raises:
            RemoteProtocolError: The peer broke the protocol; the connection must be closed.
        """
        for frame in self.reader.received(count):
            self._frame(frame)
            if self.lost_by is not None:
                break

    @abc.abstractmethod
    def fill(self) -> None:
        """Top the writer up with payload."""

    @abc.abstractmethod
    def lost(self, error: Exception) -> None:
        """The connection is gone: everything under way ends, every buffer is given back."""

    @abc.abstractmethod
    def refuse(self, error: Exception) -> None:
        """Queue last words for a peer that broke the protocol."""

    @abc.abstractmethod
    def _route(self, header: Header) -> Sequence[memoryview]: ...

    @abc.abstractmethod
    def _frame(self, frame: Frame) -> None: ...

    def _send(
        self, type: FrameType, request_id: int, message: msgspec.Struct, flags: int = 0
    ) -> None:
        metadata = encode(message)
        header = encode_header(type, request_id, metadata, flags=flags)
        self.writer.push((header + metadata,), HEADER_BYTES + len(metadata))
        self.on_output()

    def _send_chunk(self, request_id: int, chunk: Chunk) -> None:
        metadata = b""
        if chunk.checksums or chunk.failed:
            metadata = encode(Data(checksums=chunk.checksums, failed=chunk.failed))
        try:
            header = encode_header(
                FrameType.DATA, request_id, metadata, chunk.length, chunk.piece, chunk.piece_offset
            )
        except LocalProtocolError:
            chunk.release()  # nobody else knows of it
            raise
        self.writer.push(
            (header, metadata, *chunk.buffers) if metadata else (header, *chunk.buffers),
            HEADER_BYTES + len(metadata) + chunk.length,
            chunk.release,
        )


class _Call:
    """A request of ours that waits for its reply."""

    __slots__ = ("on_reply", "on_report", "replied", "transfer", "type")

    def __init__(
        self,
        type: FrameType,
        on_reply: Callable[[Reply], None],
        transfer: FetchTransfer | PutTransfer | None = None,
        on_report: Callable[[LoadReport], None] | None = None,
    ) -> None:
        self.type = type
        self.replied = False
        self.on_reply = on_reply
        self.transfer = transfer
        self.on_report = on_report


class ClientProtocol(FrameProtocol):
    """The asking side of a connection.

    Args:
        hello: First words; its version window is ours.
        on_welcome: Called with the WELCOME when the server has accepted us.
        on_goaway: Called when the server takes no new requests.
    """

    def __init__(
        self,
        hello: Hello,
        on_welcome: Callable[[Welcome], None],
        on_goaway: Callable[[Goaway], None],
    ) -> None:
        super().__init__()
        self.welcome: Welcome | None = None
        self._on_welcome = on_welcome
        self._on_goaway = on_goaway
        self._calls: dict[int, _Call] = {}
        self._puts: deque[tuple[int, PutTransfer]] = deque()
        self._send(FrameType.HELLO, 0, hello)

    @property
    def call_count(self) -> int:
        """Requests without a reply, abandoned ones among them."""
        return len(self._calls)

    def call(
        self, request_id: int, type: FrameType, message: Message, on_reply: Callable[[Reply], None]
    ) -> None:
        """Send a request with one reply. `on_reply` gets it, or a RefusedError, or the
        error that ended the connection (at once if it is gone already)."""
        self._begin(request_id, message, _Call(type, on_reply))

    def subscribe(
        self,
        request_id: int,
        message: Message,
        on_reply: Callable[[Reply], None],
        on_report: Callable[[LoadReport], None],
    ) -> None:
        """Ask for load reports; `on_report` gets them until the connection closes."""
        call = _Call(FrameType.SUBSCRIBE, on_reply, None, on_report)
        self._begin(request_id, message, call)

    def fetch(
        self,
        request_id: int,
        message: Fetch,
        transfer: FetchTransfer,
        on_reply: Callable[[Reply], None],
    ) -> None:
        """Send a FETCH. `on_reply` gets the DONE after `transfer.done` has taken it."""
        self._begin(request_id, message, _Call(FrameType.FETCH, on_reply, transfer))

    def put(
        self,
        request_id: int,
        message: Put,
        transfer: PutTransfer,
        on_reply: Callable[[Reply], None],
    ) -> None:
        """Send a PUT. `on_reply` gets the PUT_DONE after `transfer.done` has taken it."""
        self._begin(request_id, message, _Call(FrameType.PUT, on_reply, transfer))

    def abandon(self, request_id: int) -> None:
        """Give up the memory of a fetch or a put at once; its DONE may still come.

        After this call nothing is written into the memory of a fetch. The memory of a put
        is free when its transfer is `idle`.
        """
        call = self._calls.get(request_id)
        if call is None:
            return
        if isinstance(call.transfer, FetchTransfer):
            call.transfer.abandon()
            self.reader.divert(request_id)
        elif isinstance(call.transfer, PutTransfer):
            call.transfer.stop()

    def fill(self) -> None:
        writer, puts = self.writer, self._puts
        while puts and writer.queued_bytes < FILL_BYTES:
            request_id, transfer = puts[0]
            chunk = transfer.next_chunk()
            if chunk is None:
                puts.popleft()
            else:
                self._send_chunk(request_id, chunk)

    def lost(self, error: Exception) -> None:
        self.lost_by = error
        calls, self._calls = self._calls, {}
        self._puts.clear()
        for request_id, call in calls.items():
            if isinstance(call.transfer, FetchTransfer):
                call.transfer.abandon()
                self.reader.divert(request_id)
            elif isinstance(call.transfer, PutTransfer):
                call.transfer.stop()
        # The last one first; all of them, even if one fails.
        with contextlib.ExitStack() as ending:
            for call in reversed(calls.values()):
                ending.callback(call.on_reply, error)
            ending.callback(self.writer.abort)

    def refuse(self, error: Exception) -> None:
        """A server has no use for our opinion: closing says enough."""

    def _begin(self, request_id: int, message: Message, call: _Call) -> None:
        if request_id in self._calls or request_id == 0:
            raise LocalProtocolError(f"request id {request_id} is in use")
        if self.lost_by is not None:
            call.on_reply(self.lost_by)
            return
        if len(self._calls) >= CALLS_MAX:
            call.on_reply(
                TransportError(
                    f"{len(self._calls)} requests are without a reply, the limit is {CALLS_MAX}"
                )
            )
            return
        self._send(call.type, request_id, message)
        self._calls[request_id] = call

    def _route(self, header: Header) -> Sequence[memoryview]:
        call = self._calls.get(header.request_id)
        if call is None or not isinstance(call.transfer, FetchTransfer):
            raise RemoteProtocolError(f"DATA for request {header.request_id}, which is no fetch")
        return call.transfer.route(header, self.reader.scratch)

    def _frame(self, frame: Frame) -> None:
        header, metadata = frame
        message_type = REPLIES.get(header.type)
        if message_type is None:
            raise RemoteProtocolError(f"{header.type.name} from a server")
        message: Any = decode(metadata, message_type)
        if self.welcome is None:
            self._handshake(message)
            return
        if header.request_id == 0:
            if isinstance(message, Goaway):
                self._on_goaway(message)
                return
            if isinstance(message, Error):
                raise TransportError(f"the peer closes the connection: {message.message}")
            raise RemoteProtocolError(f"{header.type.name} without a request id")
        call = self._calls.get(header.request_id)
        if call is None:
            raise RemoteProtocolError(
                f"{header.type.name} for request {header.request_id}, which is not under way"
            )
        self._reply(header, message, call)

    def _handshake(self, message: Message) -> None:
        if isinstance(message, Error):
            raise error_to_exception(message)
        if not isinstance(message, Welcome):
            raise RemoteProtocolError(f"{type(message).__name__} instead of WELCOME")
        if not VERSION_MIN <= message.version <= VERSION_MAX:
            raise VersionMismatch(
                f"the peer chose version {message.version},"
                f" this side speaks {VERSION_MIN} to {VERSION_MAX}"
            )
        self.welcome = msgspec.structs.replace(message, limits=message.limits.within_ours())
        self._on_welcome(self.welcome)

    def _reply(self, header: Header, message: Any, call: _Call) -> None:
        transfer = call.transfer
        if isinstance(message, Error):
            del self._calls[header.request_id]
            if isinstance(transfer, PutTransfer):
                transfer.stop()
            elif isinstance(transfer, FetchTransfer):
                transfer.abandon()
            call.on_reply(error_to_exception(message))
        elif isinstance(message, LoadReport):
            if call.on_report is None:
                raise RemoteProtocolError("LOAD_REPORT for a request that is no subscription")
            call.on_report(message)
        elif isinstance(message, Data):
            if not isinstance(transfer, FetchTransfer):
                raise RemoteProtocolError("DATA for a request that is no fetch")
            transfer.data(header, message.checksums, message.failed)
        elif isinstance(message, Want):
            if not isinstance(transfer, PutTransfer):
                raise RemoteProtocolError("WANT for a request that is no put")
            transfer.want(message)
            self._puts.append((header.request_id, transfer))
            self.on_output()
        elif isinstance(message, Done) and isinstance(transfer, FetchTransfer):
            transfer.done(message)
            del self._calls[header.request_id]
            call.on_reply(message)
        elif isinstance(message, PutDone) and isinstance(transfer, PutTransfer):
            transfer.done(message.outcomes)
            transfer.stop()
            del self._calls[header.request_id]
            call.on_reply(message)
        elif (
            transfer is None
            and header.type is call.type
            and header.flags & Flags.REPLY
            and not call.replied
        ):
            call.replied = True
            if call.on_report is None:
                del self._calls[header.request_id]
            call.on_reply(message)
        else:
            raise RemoteProtocolError(f"{header.type.name} does not answer this request")


class ServerHooks(abc.ABC):
    """What a `ServerProtocol` asks its shell to do."""

    @abc.abstractmethod
    def hello(self, hello: Hello, version: int) -> Welcome:
        """A peer introduced itself. Raises RefusedError to turn it away."""

    @abc.abstractmethod
    def request(self, type: FrameType, request_id: int, message: Message) -> None:
        """A valid request came. It is answered, now or later, with `reply`, `refuse_request`,
        `add_fetch` or `add_put`. A KVStoreError that is raised refuses the request."""

    @abc.abstractmethod
    def fetch_done(self, request_id: int, stream: FetchStream) -> Done:
        """A fetch was given out whole or was stopped: make its DONE."""

    @abc.abstractmethod
    def put_done(self, request_id: int, stream: PutStream) -> PutDone:
        """A put has all outcomes: make its PUT_DONE."""


class _PutReceiver:
    """Bytes of one put on their way into reserved blocks."""

    __slots__ = ("block_bytes", "filled", "stream")

    def __init__(self, stream: PutStream, block_bytes: int) -> None:
        self.stream = stream
        self.block_bytes = block_bytes
        self.filled: dict[int, int] = {}

    def route(self, header: Header) -> list[memoryview]:
        """Destination for the payload of a DATA frame: consecutive reserved blocks."""
        index, offset, left = header.piece, header.piece_offset, header.payload_length
        views = []
        while left:
            target = self.stream.target(index)
            if target is None or offset != self.filled.get(index, 0):
                raise RemoteProtocolError(
                    f"DATA for byte {offset} of block {index}, which was not asked for"
                )
            take = min(left, self.block_bytes - offset)
            views.append(target[offset : offset + take])
            self.filled[index] = offset + take
            left -= take
            index += 1
            offset = 0
        return views

    def completed(self, header: Header) -> list[int]:
        """Blocks whose last byte was in this frame."""
        if not header.payload_length:
            return []  # nobody has checked where it claims to begin
        count = -(-(header.piece_offset + header.payload_length) // self.block_bytes)
        done = [
            index
            for index in range(header.piece, header.piece + count)
            if self.filled.get(index) == self.block_bytes
        ]
        for index in done:
            del self.filled[index]
        return done


class ServerProtocol(FrameProtocol):
    """The answering side of a connection.

    Args:
        hooks: The shell.
        in_flight_bytes_max: Bytes of puts that may be reserved and on their way.
    """

    def __init__(self, hooks: ServerHooks, in_flight_bytes_max: int) -> None:
        super().__init__()
        self.peer: Hello | None = None
        self._hooks = hooks
        self._in_flight_bytes_max = in_flight_bytes_max
        # Fetches in the order in which they are served: by priority, then arrival.
        self._fetches: list[tuple[int, int, int, FetchStream]] = []
        self._arrivals = 0
        self._puts: dict[int, _PutReceiver] = {}
        self._ended_puts: OrderedDict[int, None] = OrderedDict()

    @property
    def request_count(self) -> int:
        """Fetches and puts under way."""
        return len(self._fetches) + len(self._puts)

    @property
    def fetch_queued_bytes(self) -> int:
        """Bytes of fetches that were not sent yet, those in the writer included."""
        return self.writer.queued_bytes + sum(entry[3].queued_bytes for entry in self._fetches)

    def reply(self, type: FrameType, request_id: int, message: msgspec.Struct) -> None:
        """Answer a request."""
        self._send(type, request_id, message, Flags.REPLY)

    def refuse_request(self, request_id: int, error: Exception) -> None:
        """Answer a request with an ERROR."""
        self._send(FrameType.ERROR, request_id, exception_to_error(error), Flags.REPLY)

    def report(self, request_id: int, report: LoadReport) -> None:
        """Push a load report to a subscriber."""
        self._send(FrameType.LOAD_REPORT, request_id, report)

    def goaway(self, reason: str) -> None:
        """Tell the peer to send no new requests."""
        self._send(FrameType.GOAWAY, 0, Goaway(reason=reason))

    def add_fetch(self, request_id: int, stream: FetchStream, priority: int) -> None:
        """Serve a fetch after those of the same or a more urgent priority."""
        self.check_room(request_id)
        stream.on_ready = self.on_output
        self._arrivals += 1
        bisect.insort(
            self._fetches, (priority, self._arrivals, request_id, stream), key=lambda e: e[:2]
        )
        self.on_output()

    def add_put(self, request_id: int, stream: PutStream, block_bytes: int) -> None:
        """Take a put: ask for its blocks as the budget allows."""
        self.check_room(request_id)
        stream.on_decided = lambda: self._pump_put(request_id)
        self._puts[request_id] = _PutReceiver(stream, block_bytes)
        self._pump_put(request_id)

    def stop_request(self, request_id: int, timed_out: bool = True) -> bool:
        """End a fetch or a put early; its DONE or PUT_DONE follows. False: not under way."""
        for _, _, fetch_id, fetch in self._fetches:
            if fetch_id == request_id:
                fetch.stop(FetchOutcome.TIMEOUT if timed_out else FetchOutcome.UNAVAILABLE)
                self.on_output()
                return True
        put = self._puts.get(request_id)
        if put is None:
            return False
        self.reader.divert(request_id)
        put.stream.stop(PutOutcome.TIMEOUT if timed_out else PutOutcome.UNAVAILABLE)
        self._pump_put(request_id)
        return True

    def fill(self) -> None:
        writer = self.writer
        position = 0
        while position < len(self._fetches) and writer.queued_bytes < FILL_BYTES:
            _, _, request_id, stream = self._fetches[position]
            chunk = stream.next_chunk(PAYLOAD_BYTES_MAX)
            if chunk is not None:
                self._send_chunk(request_id, chunk)
            elif stream.finished:
                del self._fetches[position]
                self._send(FrameType.DONE, request_id, self._hooks.fetch_done(request_id, stream))
            else:
                position += 1  # waits for its source; others may go on

    def lost(self, error: Exception) -> None:
        self.lost_by = error
        fetches, self._fetches = self._fetches, []
        puts, self._puts = self._puts, {}
        # The last one first; all of them, even if one fails.
        with contextlib.ExitStack() as ending:
            ending.callback(self.writer.abort)
            for request_id, put in puts.items():
                self.reader.divert(request_id)
                ending.callback(self._hooks.put_done, request_id, put.stream)
                ending.callback(put.stream.stop, PutOutcome.UNAVAILABLE)
            for _, _, request_id, fetch in fetches:
                ending.callback(self._hooks.fetch_done, request_id, fetch)
                ending.callback(fetch.stop, FetchOutcome.UNAVAILABLE)

    def refuse(self, error: Exception) -> None:
        message = exception_to_error(error)
        self._send(FrameType.ERROR, 0, message)

    def check_room(self, request_id: int) -> None:
        """Refuse a fetch or a put beyond the limit, or under an id that is in use."""
        if self.request_count >= REQUESTS_PER_CONNECTION_MAX:
            raise LimitExceeded(
                f"{self.request_count} requests under way on this connection,"
                f" the limit is {REQUESTS_PER_CONNECTION_MAX}"
            )
        if request_id in self._puts or any(e[2] == request_id for e in self._fetches):
            raise RemoteProtocolError(f"request id {request_id} is in use")

    def _route(self, header: Header) -> Sequence[memoryview]:
        put = self._puts.get(header.request_id)
        if put is not None:
            return put.route(header)
        if header.request_id in self._ended_puts:
            return self.reader.scratch(header.payload_length)
        raise RemoteProtocolError(f"DATA for request {header.request_id}, which is no put")

    def _frame(self, frame: Frame) -> None:
        header, metadata = frame
        if header.type is FrameType.DATA:
            self._data(header)
            return
        if self.peer is None:
            if header.type is not FrameType.HELLO:
                raise RemoteProtocolError(f"{header.type.name} before HELLO")
            self._hello(decode(metadata, Hello))
            return
        if header.request_id == 0 or header.type is FrameType.HELLO:
            raise RemoteProtocolError(f"{header.type.name} with id {header.request_id}")
        if self.writer.queued_bytes > OUTPUT_BYTES_MAX:
            raise LimitExceeded(
                f"{self.writer.queued_bytes} bytes wait for a peer that asks and does not"
                f" read, the limit is {OUTPUT_BYTES_MAX}"
            )
        try:
            message_type = REQUESTS.get(header.type)
            if message_type is None:
                raise Unsupported(f"{header.type.name} is not supported here")
            message = decode(metadata, message_type)
            self._hooks.request(header.type, header.request_id, message)
        except KVStoreError as error:
            # The frame was whole, so the connection is sound: only this request fails.
            self.refuse_request(header.request_id, error)

    def _hello(self, hello: Hello) -> None:
        version = min(hello.version_max, VERSION_MAX)
        if version < max(hello.version_min, VERSION_MIN):
            raise VersionMismatch(
                f"the peer speaks versions {hello.version_min} to {hello.version_max},"
                f" this side {VERSION_MIN} to {VERSION_MAX}"
            )
        welcome = self._hooks.hello(hello, version)
        self.peer = hello
        self._send(FrameType.WELCOME, 0, welcome)

    def _data(self, header: Header) -> None:
        put = self._puts.get(header.request_id)
        if put is None:
            if header.request_id not in self._ended_puts:
                raise RemoteProtocolError(f"DATA for request {header.request_id}, which is no put")
            return
        for index in put.completed(header):
            if put.stream.target(index) is not None:
                put.stream.received(index)
        self._pump_put(header.request_id)

    def _pump_put(self, request_id: int) -> None:
        """Ask for more blocks of a put, or end it."""
        put = self._puts.get(request_id)
        if put is None:
            return
        if not put.stream.finished:
            reserved = sum(other.stream.reserved_bytes for other in self._puts.values())
            room = self._in_flight_bytes_max - reserved
            # In halves, so that WANT frames name many blocks.
            if room >= self._in_flight_bytes_max // 2 or put.stream.reserved_bytes == 0:
                indices = put.stream.reserve(max(0, room))
                if indices:
                    self._send(FrameType.WANT, request_id, Want(indices=tuple(indices)))
        if put.stream.finished:
            del self._puts[request_id]
            self._ended_puts[request_id] = None
            if len(self._ended_puts) > ENDED_PUTS_MAX:
                self._ended_puts.popitem(last=False)
            self._send(FrameType.PUT_DONE, request_id, self._hooks.put_done(request_id, put.stream))


def hello_message(
    node_id: str, role: Any, session: bytes, channel: Channel, token: str = ""
) -> Hello:
    """HELLO with the version window of this build."""
    return Hello(
        version_min=VERSION_MIN,
        version_max=VERSION_MAX,
        node_id=node_id,
        role=role,
        session=session,
        channel=channel,
        token=token,
    )


__all__ = [
    "FILL_BYTES",
    "ClientProtocol",
    "ErrorCode",
    "FrameProtocol",
    "Reply",
    "ServerHooks",
    "ServerProtocol",
    "hello_message",
]
