"""The answering side of a conversation."""

from __future__ import annotations

import abc
import bisect
import contextlib
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from kvstore.blocksource import FetchStream, PutStream
from kvstore.errors import (
    KVStoreError,
    LimitExceeded,
    RemoteProtocolError,
    Unsupported,
    VersionMismatch,
)
from kvstore.framing import Frame
from kvstore.loadreport import LoadReport
from kvstore.messages import (
    REQUESTS,
    Done,
    FetchOutcome,
    Goaway,
    Hello,
    Message,
    PutDone,
    PutOutcome,
    Want,
    Welcome,
    decode,
    exception_to_error,
)
from kvstore.protocol.base import FILL_BYTES, FrameProtocol
from kvstore.wire import (
    PAYLOAD_BYTES_MAX,
    VERSION_MAX,
    VERSION_MIN,
    Flags,
    FrameType,
    Header,
)

# Fetches and puts under way on one connection; an engine batches, it does not flood.
REQUESTS_PER_CONNECTION_MAX = 256
# Ids of puts that ended while their bytes may still be arriving. A client stops sending when
# it learns of the end, so only the newest matter.
ENDED_PUTS_MAX = 1024
# What a server holds for a peer that asks and does not read: two chunks of payload, which is
# most of the time in memory that exists anyway, and as much again of replies.
OUTPUT_BYTES_MAX = 4 * PAYLOAD_BYTES_MAX


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
    def fetch_begins(self, request_id: int) -> None:
        """The first bytes of a fetch are about to be sent."""

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
        self._waiting: set[int] = set()  # fetches of which nothing was sent yet
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
        self._waiting.add(request_id)
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
                if request_id in self._waiting:
                    self._waiting.remove(request_id)
                    self._hooks.fetch_begins(request_id)
                self._send_chunk(request_id, chunk)
            elif stream.finished:
                del self._fetches[position]
                self._waiting.discard(request_id)
                self._send(FrameType.DONE, request_id, self._hooks.fetch_done(request_id, stream))
            else:
                position += 1  # waits for its source; others may go on

    def lost(self, error: Exception) -> None:
        self.lost_by = error
        fetches, self._fetches = self._fetches, []
        self._waiting.clear()
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
