"""The answering side of a conversation."""

from __future__ import annotations

import abc
import bisect
import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from kvstore.blocksource import Chunk, FetchStream, PutStream
from kvstore.errorcodes import exception_to_error
from kvstore.errors import (
    KVStoreError,
    LimitExceeded,
    RemoteProtocolError,
    Unsupported,
    VersionMismatch,
)
from kvstore.framing import Frame
from kvstore.messages import (
    REASONS_MAX,
    REQUESTS,
    Done,
    FetchOutcome,
    Goaway,
    Hello,
    Message,
    PutDone,
    PutOutcome,
    ViewReply,
    Want,
    Welcome,
    decode,
    reasons,
)
from kvstore.protocol.base import FrameProtocol
from kvstore.protocol.placing import FetchSink, PutPuller
from kvstore.wire import (
    METADATA_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    VERSION_MAX,
    VERSION_MIN,
    Flags,
    FrameType,
    Header,
)

# The writer is topped up to this: two to three frames, so that the socket never runs dry while
# the next one is made, and little enough that a CANCEL finds most of a fetch unsent. With one
# to two, reads of large blocks were a tenth slower.
FILL_BYTES = 2 * PAYLOAD_BYTES_MAX
# Fetches and puts under way on one connection; an engine batches, it does not flood.
REQUESTS_PER_CONNECTION_MAX = 256
# Metadata of the fetches and puts under way on one connection, which stays for as long as
# they do. As much as a client of ours needs: 128 FETCHes of 4,096 keys of 32 bytes are 17 MiB,
# 16 PUTs 16 MiB; where they name memory, 20 of them with the most places that fit into a frame.
# A key takes two to three times its length here, and its place in the asker's memory its own.
HELD_METADATA_BYTES_MAX = 20 * 1024 * 1024
# Until a peer has said who it is: room for a token, capabilities and names as long as may be.
HELLO_BYTES_MAX = 16 * 1024
# Chunks and ends of fetches in one `fill`, then other connections have their turn: at most a
# few ms, while 32 chunks of 64 blocks are far more than a socket takes.
STEPS_PER_FILL_MAX = 32
# Puts that are given room in one go. Each may have 4,096 keys to look at, about 2 ms.
PUTS_PER_TURN_MAX = 4
# Ids of puts that ended while their bytes may still be arriving. A client stops sending when
# it learns of the end, so only the newest matter.
ENDED_PUTS_MAX = 1024
# What a server holds for a peer that asks and does not read: three chunks of payload, which is
# most of the time in memory that exists anyway, and as much again of replies.
OUTPUT_BYTES_MAX = 6 * PAYLOAD_BYTES_MAX

# A plain number: arithmetic with enumerations costs a microsecond, on each frame.
_REPLY = int(Flags.REPLY)


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
    def refused(self, type: FrameType, error: KVStoreError) -> None:
        """A request was refused, by `request` or because its metadata is none for its type."""

    @abc.abstractmethod
    def fetch_begins(self, request_id: int) -> None:
        """The first bytes of a fetch are about to be sent."""

    @abc.abstractmethod
    def fetch_done(self, request_id: int, stream: FetchStream) -> Done:
        """A fetch was given out whole or was stopped: make its DONE."""

    def moved(self, kind: str, transport: str, size_bytes: int) -> None:  # noqa: B027
        """Payload of a "fetch" was given to its transport, or of a "put" was taken from it.

        Args:
            transport: "" for the stream of this connection.
        """

    @abc.abstractmethod
    def put_done(self, request_id: int, stream: PutStream) -> PutDone:
        """A put has all outcomes: make its PUT_DONE."""


class _Serving(NamedTuple):
    """A fetch under way; they are served by priority, then arrival."""

    priority: int
    arrival: int
    request_id: int
    stream: FetchStream
    sink: FetchSink | None

    def next_chunk(self) -> Chunk | None:
        """What can be brought or sent now."""
        if self.sink is None:
            return self.stream.next_chunk(PAYLOAD_BYTES_MAX)
        return self.stream.next_chunk(self.sink.chunk_bytes) if self.sink.accepts else None


class _PutReceiver:
    """Bytes of one put on their way into reserved blocks.

    Attributes:
        puller: Takes them out of the asker's memory; None if the asker sends them.
        filled: For each block under way, how many of its bytes have a place.
        reserved_bytes: What the stream had reserved when it was last asked.
        ending: How it ends as soon as the puller is idle; None while it goes on.
    """

    __slots__ = ("block_bytes", "ending", "filled", "puller", "reserved_bytes", "stream")

    def __init__(self, stream: PutStream, block_bytes: int, puller: PutPuller | None) -> None:
        self.stream = stream
        self.block_bytes = block_bytes
        self.puller = puller
        self.ending: PutOutcome | None = None
        self.filled: dict[int, int] = {}
        self.reserved_bytes = 0

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

    def stop(self, outcome: PutOutcome) -> None:
        """End early: at once, or as soon as nobody writes into its blocks any more."""
        if self.ending is None:
            self.ending = outcome
            if self.puller is not None:
                self.puller.stop()
        self.end_if_idle()

    def end_if_idle(self) -> None:
        """Stop the stream if that is to be, and nothing is under way any more."""
        if self.ending is not None and (self.puller is None or self.puller.idle):
            self.stream.stop(self.ending)

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


def _told(failure: Exception, errors: Sequence[str]) -> tuple[str, ...]:
    """What is said of a request whose payload could not be moved: why, before all else."""
    return (*reasons((failure,)), *errors)[:REASONS_MAX]


class ServerProtocol(FrameProtocol):
    """The answering side of a connection.

    Args:
        hooks: The shell.
        in_flight_bytes_max: Bytes of puts that may be reserved and on their way, except that
            one block always may.
    """

    def __init__(self, hooks: ServerHooks, in_flight_bytes_max: int) -> None:
        super().__init__()
        self.peer: Hello | None = None
        self._hooks = hooks
        self._in_flight_bytes_max = in_flight_bytes_max
        # In the order in which they are served.
        self._fetches: list[_Serving] = []
        self._arrivals = 0
        self._waiting: set[int] = set()  # fetches of which nothing was sent yet
        self._puts: dict[int, _PutReceiver] = {}
        self._reserved_bytes = 0  # of all puts
        # Puts that may want more blocks, in the order in which they get room for them; and
        # whether there is room that nobody was given yet.
        self._wanting_puts: dict[int, None] = {}
        self._room_left = False
        self._ended_puts: OrderedDict[int, None] = OrderedDict()
        # Metadata of the request that is being handled, and of those under way.
        self._request_bytes = 0
        self._held: dict[int, int] = {}
        self._held_bytes = 0
        self.reader.metadata_bytes_max = HELLO_BYTES_MAX

    @property
    def request_count(self) -> int:
        """Fetches and puts under way."""
        return len(self._fetches) + len(self._puts)

    @property
    def fetch_queued_bytes(self) -> int:
        """Bytes of fetches that were not sent yet, those in the writer included."""
        queued = sum(serving.stream.queued_bytes for serving in self._fetches)
        return self.writer.queued_bytes + queued

    def reply(self, type: FrameType, request_id: int, message: msgspec.Struct) -> None:
        """Answer a request."""
        self._send(type, request_id, message, _REPLY)

    def refuse_request(self, request_id: int, error: Exception) -> None:
        """Answer a request with an ERROR."""
        self._send(FrameType.ERROR, request_id, exception_to_error(error), _REPLY)

    def report(self, request_id: int, encoded: bytes) -> None:
        """Push a load report to a subscriber, encoded once for all of them."""
        self._send_encoded(FrameType.LOAD_REPORT, request_id, encoded)

    def goaway(self, reason: str) -> None:
        """Tell the peer to send no new requests."""
        self._send(FrameType.GOAWAY, 0, Goaway(reason=reason))

    def add_fetch(
        self,
        request_id: int,
        stream: FetchStream,
        priority: int,
        sink: FetchSink | None = None,
    ) -> None:
        """Serve a fetch after those of the same or a more urgent priority.

        Args:
            sink: Brings its bytes into the asker's memory; without it they are sent.
        """
        self.check_room(request_id)
        stream.on_ready = self.on_output
        if sink is not None:
            sink.on_news = partial(self._send_placed, request_id)
            sink.on_ready = self.on_output
        self._arrivals += 1
        self._hold(request_id)
        self._waiting.add(request_id)
        serving = _Serving(priority, self._arrivals, request_id, stream, sink)
        bisect.insort(self._fetches, serving, key=lambda entry: entry[:2])
        self.on_output()

    def add_put(
        self,
        request_id: int,
        stream: PutStream,
        block_bytes: int,
        puller: PutPuller | None = None,
    ) -> None:
        """Take a put: ask for its blocks, or let the puller bring them, as the budget allows."""
        self.check_room(request_id)
        self._hold(request_id)
        stream.on_decided = lambda: self._put_moved(request_id)
        self._puts[request_id] = _PutReceiver(stream, block_bytes, puller)
        if puller is not None:
            puller.on_pulled = partial(self._pulled, request_id)
            puller.on_ready = partial(self._puller_ready, request_id)
        if self._wanting_puts:
            stream.reserve(0)  # what needs no room does not wait for those that do
        self._put_moved(request_id)

    def stop_request(self, request_id: int, timed_out: bool = True) -> bool:
        """End a fetch or a put early; its DONE or PUT_DONE follows. False: not under way."""
        for serving in self._fetches:
            if serving.request_id == request_id:
                outcome = FetchOutcome.TIMEOUT if timed_out else FetchOutcome.UNAVAILABLE
                serving.stream.stop(outcome)
                self.on_output()
                return True
        put = self._puts.get(request_id)
        if put is None:
            return False
        self.reader.divert(request_id)
        put.stop(PutOutcome.TIMEOUT if timed_out else PutOutcome.UNAVAILABLE)
        self._put_moved(request_id)
        return True

    def fill(self) -> None:
        if self._room_left:
            self._pump_puts()
        writer = self.writer
        position = steps = 0
        while position < len(self._fetches) and writer.queued_bytes < FILL_BYTES:
            if steps == STEPS_PER_FILL_MAX:
                self.unfilled = True
                return
            steps += 1
            serving = self._fetches[position]
            request_id, sink = serving.request_id, serving.sink
            if sink is not None and sink.failure is not None and not serving.stream.finished:
                serving.stream.stop(FetchOutcome.UNAVAILABLE)
            chunk = serving.next_chunk()
            if chunk is not None:
                if request_id in self._waiting:
                    self._waiting.remove(request_id)
                    self._hooks.fetch_begins(request_id)
                transport = "" if sink is None else sink.transport
                self._hooks.moved("fetch", transport, chunk.length)
                if sink is None:
                    self._send_chunk(request_id, chunk)
                else:
                    sink.take(chunk)
                continue
            if sink is not None and (serving.stream.finished or sink.accepts):
                sink.flush()  # or it would only wait for itself
            if serving.stream.finished and (sink is None or sink.idle):
                del self._fetches[position]
                self._end_fetch(serving)
            else:
                position += 1  # waits for its source, or its sink; others may go on
                steps -= 1
        self.unfilled = self._room_left

    def _end_fetch(self, serving: _Serving) -> None:
        request_id = serving.request_id
        self._waiting.discard(request_id)
        self._let_go(request_id)
        done: Done | ViewReply = self._hooks.fetch_done(request_id, serving.stream)
        sink = serving.sink
        if sink is not None and isinstance(done, Done):
            if sink.failure is not None:
                done = msgspec.structs.replace(done, errors=_told(sink.failure, done.errors))
            done = sink.amend(done)
        if isinstance(done, ViewReply):
            self.reply(FrameType.VIEW, request_id, done)
        else:
            self._send(FrameType.DONE, request_id, done)

    def lost(self, error: Exception) -> None:
        self.lost_by = error
        fetches, self._fetches = self._fetches, []
        self._waiting.clear()
        puts, self._puts = self._puts, {}
        self._wanting_puts.clear()
        self._room_left = self.unfilled = False
        self._held.clear()
        # The last one first; all of them, even if one fails.
        with contextlib.ExitStack() as ending:
            ending.callback(self.writer.abort)
            for request_id, put in puts.items():
                self.reader.divert(request_id)
                ending.callback(self._lose_put, request_id, put)
            for serving in fetches:
                ending.callback(self._hooks.fetch_done, serving.request_id, serving.stream)
                ending.callback(serving.stream.stop, FetchOutcome.UNAVAILABLE)
                if serving.sink is not None:
                    ending.callback(serving.sink.close)

    def _lose_put(self, request_id: int, put: _PutReceiver) -> None:
        """End a put of a connection that is gone, when nobody writes into its blocks any more."""
        puller = put.puller

        def end_if_idle() -> None:
            if not put.stream.finished:
                put.end_if_idle()
            if put.stream.finished and puller is not None:
                puller.on_ready = _nothing

        if puller is not None:
            puller.on_pulled = _forget
            puller.on_ready = _nothing
        put.stop(PutOutcome.UNAVAILABLE)
        if puller is not None and not put.stream.finished:
            # Only where it has to be waited for: it makes a ring, in which memory would stay.
            puller.on_ready = end_if_idle
        if put.stream.finished:
            self._hooks.put_done(request_id, put.stream)

    def refuse(self, error: Exception) -> None:
        # The connection lingers until the peer has read why; what it holds does not.
        for request_id, put in self._puts.items():
            self.reader.divert(request_id)
            put.stop(PutOutcome.UNAVAILABLE)
        for serving in self._fetches:
            serving.stream.stop(FetchOutcome.UNAVAILABLE)
        self._send(FrameType.ERROR, 0, exception_to_error(error))

    def check_room(self, request_id: int) -> None:
        """Refuse a fetch or a put beyond the limit, or under an id that is in use."""
        if self.request_count >= REQUESTS_PER_CONNECTION_MAX:
            raise LimitExceeded(
                f"{self.request_count} requests under way on this connection,"
                f" the limit is {REQUESTS_PER_CONNECTION_MAX}"
            )
        if request_id in self._puts or any(
            serving.request_id == request_id for serving in self._fetches
        ):
            raise RemoteProtocolError(f"request id {request_id} is in use")

    def _route(self, header: Header) -> Sequence[memoryview]:
        put = self._puts.get(header.request_id)
        if put is not None and put.puller is None:
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
            self._request_bytes = len(metadata)
            if header.type in _HELD_TYPES:
                self._check_held(header.type)
            message_type = REQUESTS.get(header.type)
            if message_type is None:
                raise Unsupported(f"{header.type.name} is not supported here")
            message = decode(metadata, message_type)
            self._hooks.request(header.type, header.request_id, message)
        except KVStoreError as error:
            # The frame was whole, so the connection is sound: only this request fails.
            self._hooks.refused(header.type, error)
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
        self.reader.metadata_bytes_max = METADATA_BYTES_MAX
        self._send(FrameType.WELCOME, 0, welcome)

    def _data(self, header: Header) -> None:
        put = self._puts.get(header.request_id)
        if put is None:
            if header.request_id not in self._ended_puts:
                raise RemoteProtocolError(f"DATA for request {header.request_id}, which is no put")
            return
        if put.puller is not None:
            raise RemoteProtocolError(f"DATA for put {header.request_id}, whose memory was named")
        self._hooks.moved("put", "", header.payload_length)
        for index in put.completed(header):
            if put.stream.target(index) is not None:
                put.stream.received(index)
        self._put_moved(header.request_id)

    # --- puts share the room ---------------------------------------------------------------

    def _pulled(self, request_id: int, index: int) -> None:
        """A puller has brought a block."""
        put = self._puts.get(request_id)
        if put is not None and put.stream.target(index) is not None:
            assert put.puller is not None
            self._hooks.moved("put", put.puller.transport, put.block_bytes)
            put.stream.received(index)
            self._put_moved(request_id)

    def _puller_ready(self, request_id: int) -> None:
        """A puller has failed, or has become idle."""
        put = self._puts.get(request_id)
        if put is None:
            return
        if put.puller is not None and put.puller.failure is not None and put.ending is None:
            put.stop(PutOutcome.UNAVAILABLE)
            self._put_moved(request_id)
        elif put.ending is not None:
            put.end_if_idle()
            self._put_moved(request_id)
        self.on_output()

    def _put_moved(self, request_id: int) -> None:
        """A put is new, has got a block, or has new outcomes: end it or let it go on."""
        put = self._puts.get(request_id)
        if put is None:
            return
        self._count_reserved(put)
        if put.stream.finished:
            self._end_put(request_id, put)
        elif put.ending is None:
            self._wanting_puts.setdefault(request_id)
        else:
            self._wanting_puts.pop(request_id, None)
        self._pump_puts()

    def _pump_puts(self) -> None:
        """Ask for more blocks, first of the put that has waited longest, while there is room."""
        wanting, budget = self._wanting_puts, self._in_flight_bytes_max
        self._room_left = False
        for _ in range(PUTS_PER_TURN_MAX):
            if not wanting:
                return
            request_id = next(iter(wanting))
            put = self._puts[request_id]
            room = budget - self._reserved_bytes
            if not self._reserved_bytes:
                room = max(room, put.block_bytes)
            elif room < max(budget // 2, put.block_bytes):
                return  # room is given in halves, so that WANT frames name many blocks
            del wanting[request_id]
            indices = put.stream.reserve(room)
            self._count_reserved(put)
            if indices:
                wanting[request_id] = None  # it may want more; others come first
                self._ask_for(request_id, put, indices)
            elif put.stream.finished:
                self._end_put(request_id, put)
        self._room_left = bool(wanting)
        self.on_output()

    def _ask_for(self, request_id: int, put: _PutReceiver, indices: Sequence[int]) -> None:
        """Have blocks brought that have room now."""
        if put.puller is None:
            self._send(FrameType.WANT, request_id, Want(indices=tuple(indices)))
            return
        for index in indices:
            target = put.stream.target(index)
            assert target is not None, "it was reserved just now"
            put.puller.pull(index, target)

    def _end_put(self, request_id: int, put: _PutReceiver) -> None:
        del self._puts[request_id]
        self._wanting_puts.pop(request_id, None)
        self._let_go(request_id)
        self._ended_puts[request_id] = None
        if len(self._ended_puts) > ENDED_PUTS_MAX:
            self._ended_puts.popitem(last=False)
        done = self._hooks.put_done(request_id, put.stream)
        if put.puller is not None and put.puller.failure is not None:
            errors = _told(put.puller.failure, done.errors)
            done = msgspec.structs.replace(done, errors=errors)
        self._send(FrameType.PUT_DONE, request_id, done)

    def _count_reserved(self, put: _PutReceiver) -> None:
        reserved_bytes = put.stream.reserved_bytes
        self._reserved_bytes += reserved_bytes - put.reserved_bytes
        put.reserved_bytes = reserved_bytes

    # --- metadata that stays ---------------------------------------------------------------

    def _check_held(self, type: FrameType) -> None:
        wanted = self._held_bytes + self._request_bytes
        if wanted > HELD_METADATA_BYTES_MAX:
            raise LimitExceeded(
                f"{type.name}: metadata of requests under way on this connection would be"
                f" {wanted} bytes, the limit is {HELD_METADATA_BYTES_MAX}"
            )

    def _hold(self, request_id: int) -> None:
        self._held[request_id] = self._request_bytes
        self._held_bytes += self._request_bytes

    def _let_go(self, request_id: int) -> None:
        self._held_bytes -= self._held.pop(request_id)


_HELD_TYPES = frozenset({FrameType.FETCH, FrameType.PUT, FrameType.VIEW})


def _nothing() -> None:
    """Called where there is nothing to do."""


def _forget(index: int) -> None:
    """Called with a block that nobody wants any more."""
