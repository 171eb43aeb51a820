"""The asking side of a conversation."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvstore.errorcodes import error_to_exception
from kvstore.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
    VersionMismatch,
)
from kvstore.framing import Frame
from kvstore.loadreport import LoadReport
from kvstore.memorymessages import Renew, RenewReply
from kvstore.messages import (
    REPLIES,
    Channel,
    CorruptReply,
    CorruptReport,
    Data,
    Delete,
    DeleteReply,
    Done,
    Error,
    Fetch,
    FetchOutcome,
    Goaway,
    Hello,
    Lookup,
    LookupReply,
    Message,
    Put,
    PutDone,
    Release,
    ReleaseReply,
    View,
    ViewReply,
    Want,
    Welcome,
    decode,
)
from kvstore.protocol.base import FrameProtocol, Reply
from kvstore.transfer import FetchTransfer, PutTransfer
from kvstore.wire import (
    PAYLOAD_BYTES_MAX,
    VERSION_MAX,
    VERSION_MIN,
    Flags,
    FrameType,
    Header,
)

# The writer is topped up to this with the payload of puts: two to three frames. With one to
# two a put of large blocks was a tenth slower; a cancelled one has little more to drain.
PUT_FILL_BYTES = 2 * PAYLOAD_BYTES_MAX
# Requests of ours without a reply. Who waits for one gives up at some time, the peer does not;
# with this many it is no peer to talk to.
CALLS_MAX = 16_384
# Immediates of RDMA that have come before their DATA frames. A server has no more than some
# hundreds of runs under way.
RUNS_EARLY_MAX = 65_536
# Frames of one fetch whose runs have not come: as many.
NEWS_WAITING_MAX = 65_536


# Plain numbers: arithmetic with enumerations costs a microsecond, on each frame.
_REPLY, _PLACED, _VERIFIED = map(int, (Flags.REPLY, Flags.PLACED, Flags.VERIFIED))


class _Call:
    """A request of ours that waits for its reply.

    Args:
        item_count: Keys or leases that the reply says something of, each.
        placed: Whether the request named memory that the server reaches by itself.

    Attributes:
        news: Placed DATA that waits for its payload, or behind such.
        done: The DONE, while it waits behind news.
    """

    __slots__ = (
        "done",
        "item_count",
        "news",
        "on_reply",
        "on_report",
        "placed",
        "replied",
        "transfer",
        "type",
    )

    def __init__(
        self,
        type: FrameType,
        on_reply: Callable[[Reply], None],
        transfer: FetchTransfer | PutTransfer | None = None,
        on_report: Callable[[LoadReport], None] | None = None,
        item_count: int = 0,
        placed: bool = False,
    ) -> None:
        self.placed = placed
        self.news: deque[tuple[Header, Data]] = deque()
        self.done: Done | None = None
        self.type = type
        self.item_count = item_count
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

    Attributes:
        on_news_missing: Called with the id of a fetch whose DONE is here before news by RDMA are
            that it does not call lost. They lie in our device, or never come.
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
        self.on_news_missing: Callable[[int], None] = _nobody_asks
        self._calls: dict[int, _Call] = {}
        self._puts: deque[tuple[int, PutTransfer]] = deque()
        # Runs by RDMA: those that have come and nobody waits for yet, and who waits for which.
        self._runs: set[int] = set()
        self._run_waiters: dict[int, int] = {}
        # Of requests that have ended without them, and that may yet come.
        self._late_runs: set[int] = set()
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
        count = _item_count(message)
        self._begin(request_id, message, _Call(type, on_reply, item_count=count))

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
        placed = message.memory is not None
        call = _Call(FrameType.FETCH, on_reply, transfer, placed=placed)
        self._begin(request_id, message, call)

    def put(
        self,
        request_id: int,
        message: Put,
        transfer: PutTransfer,
        on_reply: Callable[[Reply], None],
    ) -> None:
        """Send a PUT. `on_reply` gets the PUT_DONE after `transfer.done` has taken it."""
        placed = message.memory is not None
        self._begin(request_id, message, _Call(FrameType.PUT, on_reply, transfer, placed=placed))

    def run_arrived(self, run: int) -> None:
        """The immediate of a run has come by RDMA: its payload is in our memory.

        Raises:
            RemoteProtocolError: The news of it break a rule; the connection must be closed.
        """
        if run in self._late_runs:
            self._late_runs.discard(run)
            return
        request_id = self._run_waiters.pop(run, None)
        if request_id is None:
            if len(self._runs) >= RUNS_EARLY_MAX:
                raise RemoteProtocolError(f"{len(self._runs)} runs of which no DATA frame tells")
            self._runs.add(run)
            return
        self._runs.add(run)
        call = self._calls.get(request_id)
        if call is not None:
            self._take_news(request_id, call)

    def news_missing(self, request_id: int) -> bool:
        """Whether a fetch has its DONE and waits for news by RDMA."""
        call = self._calls.get(request_id)
        return call is not None and call.done is not None

    def abandon(self, request_id: int) -> None:
        """Give up the memory of a fetch or a put at once; its DONE may still come.

        After this call nothing is written into the memory of a fetch, unless the request has
        named it to the server: then it is free when `on_reply` is called. The memory of a put
        is free when its transfer is `idle`, and in the same case at `on_reply` too.
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
        while puts and writer.queued_bytes < PUT_FILL_BYTES:
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
        self._runs.clear()
        self._run_waiters.clear()
        self._late_runs.clear()
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

    def _placed(self, header: Header, data: Data, call: _Call, transfer: FetchTransfer) -> None:
        if not call.placed:
            raise RemoteProtocolError("DATA is placed, and the request named no memory")
        if call.done is not None:
            raise RemoteProtocolError("DATA after DONE")
        if data.run or call.news:
            if len(call.news) >= NEWS_WAITING_MAX:
                raise RemoteProtocolError(
                    f"{len(call.news)} placed DATA frames wait for their runs"
                )
            call.news.append((header, data))
            self._take_news(header.request_id, call)
        else:
            _take_placed(header, data, transfer)

    def _take_news(self, request_id: int, call: _Call) -> None:
        """Take placed DATA whose payload is here, in order, and the DONE behind it."""
        transfer, news = call.transfer, call.news
        assert isinstance(transfer, FetchTransfer)
        while news:
            header, data = news[0]
            if data.run and data.run not in self._runs:
                if call.done is not None and data.run in call.done.lost_runs:
                    break
                self._run_waiters[data.run] = request_id
                return
            self._runs.discard(data.run)
            news.popleft()
            _take_placed(header, data, transfer)
        if call.done is not None:
            done = call.done
            if news:  # what lies behind a gap does not count
                transfer.fail_rest(FetchOutcome.UNAVAILABLE)
                self._forget_runs(news, done.lost_runs)
            self._end_fetch(request_id, call, transfer, done)

    def _forget_runs(self, news: Sequence[tuple[Header, Data]], lost: Sequence[int]) -> None:
        """Nobody waits for these any more; each that is not lost comes sooner or later."""
        for run in {data.run for _, data in news if data.run}:
            self._run_waiters.pop(run, None)
            if run in self._runs:
                self._runs.discard(run)
            elif run not in lost:
                self._late_runs.add(run)
        if len(self._late_runs) > RUNS_EARLY_MAX:
            raise RemoteProtocolError(f"{len(self._late_runs)} runs that never came")

    def _end_fetch(self, request_id: int, call: _Call, transfer: FetchTransfer, done: Done) -> None:
        transfer.done(done)
        del self._calls[request_id]
        call.on_reply(done)

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
                self._forget_runs(call.news, ())
            call.on_reply(error_to_exception(message))
        elif isinstance(message, LoadReport):
            if call.on_report is None:
                raise RemoteProtocolError("LOAD_REPORT for a request that is no subscription")
            call.on_report(message)
        elif isinstance(message, Data):
            if not isinstance(transfer, FetchTransfer):
                raise RemoteProtocolError("DATA for a request that is no fetch")
            if header.flags & _PLACED:
                self._placed(header, message, call, transfer)
            else:
                transfer.data(header, message.checksums, message.failed)
        elif isinstance(message, Want):
            if not isinstance(transfer, PutTransfer):
                raise RemoteProtocolError("WANT for a request that is no put")
            transfer.want(message)
            self._puts.append((header.request_id, transfer))
            self.on_output()
        elif isinstance(message, Done) and isinstance(transfer, FetchTransfer):
            if call.done is not None:
                raise RemoteProtocolError("DONE after DONE")
            if call.news:
                call.done = message
                self._take_news(header.request_id, call)
                if self.news_missing(header.request_id):
                    self.on_news_missing(header.request_id)
            else:
                self._end_fetch(header.request_id, call, transfer, message)
        elif isinstance(message, PutDone) and isinstance(transfer, PutTransfer):
            transfer.done(message.outcomes)
            transfer.stop()
            del self._calls[header.request_id]
            call.on_reply(message)
        elif (
            transfer is None
            and header.type is call.type
            and header.flags & _REPLY
            and not call.replied
        ):
            _check_items(header.type, message, call.item_count)
            call.replied = True
            if call.on_report is None:
                del self._calls[header.request_id]
            call.on_reply(message)
        else:
            raise RemoteProtocolError(f"{header.type.name} does not answer this request")


def _nobody_asks(request_id: int) -> None:
    pass


def _take_placed(header: Header, data: Data, transfer: FetchTransfer) -> None:
    verified = bool(header.flags & _VERIFIED)
    transfer.placed(header, data.checksums, data.failed, data.corrupt, verified)


def _item_count(request: Message) -> int:
    """Of how many items the reply to a request speaks, one by one."""
    if isinstance(request, Lookup | Delete | CorruptReport):
        return len(request.keys)
    if isinstance(request, View):
        return len(request.fetch.keys)
    return len(request.leases) if isinstance(request, Release | Renew) else 0


def _check_items(type: FrameType, reply: Message, count: int) -> None:
    """Whether a reply speaks of as many items as were asked for.

    Raises:
        RemoteProtocolError: It does not; a bitmap of a megabyte must not be looked through.
    """
    answer: Sequence[Any]
    if isinstance(reply, LookupReply):
        answer, expected = reply.bitmap, (count + 7) // 8
    elif isinstance(reply, DeleteReply):
        answer, expected = reply.deleted, count
    elif isinstance(reply, CorruptReply):
        answer, expected = reply.dropped, count
    elif isinstance(reply, ReleaseReply | RenewReply):
        answer, expected = reply.held, count
    elif isinstance(reply, ViewReply):
        if len(reply.done.outcomes) != count:
            raise RemoteProtocolError(f"VIEW: {len(reply.done.outcomes)} outcomes for {count} keys")
        answer, expected = reply.offsets, 8 * count
    else:
        return
    if len(answer) != expected:
        what = "bytes" if isinstance(reply, LookupReply | ViewReply) else "answers"
        raise RemoteProtocolError(
            f"{type.name}: {len(answer)} {what} for {count} items, expected {expected}"
        )


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
