"""Frames in and out of a byte stream without touching the bytes: sans I/O.

Rule: nothing here reads or writes a socket. `FrameReader` says *where* the next bytes of the
stream belong and is told how many came; `FrameWriter` says *which* bytes go next and is told
how many went. The shell (`kvstore.transport.connection`) does the two system calls.

The reader asks for the rest of the current frame and the header of the next one together, so
that a stream of DATA frames costs one `recvmsg` a frame, straight into the destination.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from kvstore.checksum import short_checksum
from kvstore.errors import RemoteProtocolError
from kvstore.wire import (
    HEADER_BYTES,
    METADATA_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    FrameType,
    Header,
    decode_header,
)

# The kernel takes 1,024 buffers a call (IOV_MAX in <limits.h>).
BUFFERS_PER_CALL_MAX = 1024

Buffer = bytes | bytearray | memoryview


class Frame(NamedTuple):
    """A frame that has arrived whole; its payload is already where `route` said."""

    header: Header
    metadata: bytearray


class FrameReader:
    """Cuts an incoming byte stream into frames.

    Args:
        route: Called with the header of each DATA frame before its payload arrives; returns
            writable views of `payload_length` bytes in all, the destination.
    """

    def __init__(self, route: Callable[[Header], Sequence[memoryview]]) -> None:
        self._route = route
        self._header_bytes = bytearray(HEADER_BYTES)
        self._header_view = memoryview(self._header_bytes)
        self._header_filled = 0
        self._header: Header | None = None
        self._metadata = bytearray()
        self._metadata_left = 0
        self._body_left = 0
        # What is left to fill of the current frame, from _view_index on; after it comes the
        # next header.
        self._views: list[memoryview] = []
        self._view_index = 0
        self._scratch: memoryview | None = None
        #: Longer metadata is refused before there is memory for it.
        self.metadata_bytes_max = METADATA_BYTES_MAX
        #: Bytes that the last `buffers()` asked for.
        self.requested_bytes = 0

    @property
    def mid_frame(self) -> bool:
        """Whether the stream would be cut inside a frame if it ended now."""
        return self._header is not None or self._header_filled > 0

    def buffers(self) -> list[memoryview]:
        """Where the next bytes of the stream belong, in order; never empty."""
        header_rest = self._header_view[self._header_filled :]
        if self._header is None:
            self.requested_bytes = len(header_rest)
            return [header_rest]
        first = self._view_index
        views = self._views[first : first + BUFFERS_PER_CALL_MAX]
        if len(views) < BUFFERS_PER_CALL_MAX:
            views.append(header_rest)
            self.requested_bytes = self._body_left + HEADER_BYTES
        else:
            self.requested_bytes = sum(map(len, views))
        return views

    def received(self, count: int) -> Iterator[Frame]:
        """Account for `count` bytes that were written into the last `buffers()`.

        Must be iterated to its end. Each frame that is complete now is handed out *before*
        the next one is looked at: where a payload belongs depends on what the frames before
        it have said, and the call that completes a frame may bring the next header along.

        Raises:
            RemoteProtocolError: The stream is not ours, or broken; it can't be used any more.
        """
        while True:
            if self._header is None:
                take = min(count, HEADER_BYTES - self._header_filled)
                self._header_filled += take
                count -= take
                if self._header_filled < HEADER_BYTES:
                    return
                self._header_filled = 0
                self._begin(decode_header(self._header_view))
            take = min(count, self._body_left)
            self._advance(take)
            count -= take
            if self._body_left:
                return
            yield self._end()

    def feed(self, data: Buffer) -> list[Frame]:
        """Copy `data` to where it belongs: for streams that carry no payload, and for tests."""
        frames: list[Frame] = []
        source = memoryview(data)
        while len(source):
            target = self.buffers()[0]
            count = min(len(target), len(source))
            target[:count] = source[:count]
            source = source[count:]
            frames += self.received(count)
        return frames

    def divert(self, request_id: int) -> None:
        """Send the rest of a payload that is arriving for `request_id` to scratch memory.

        After this call, no byte of the stream reaches the destination that `route` gave.
        """
        if self._header is None or self._header.request_id != request_id:
            return
        views = self._views[self._view_index :]
        metadata_views = views[:1] if self._metadata_left else []
        payload_left = self._body_left - self._metadata_left
        self._views = metadata_views + self.scratch(payload_left)
        self._view_index = 0

    def scratch(self, length: int) -> list[memoryview]:
        """Memory for bytes that nobody wants, at most a payload."""
        if length == 0:
            return []
        if self._scratch is None:
            self._scratch = memoryview(bytearray(PAYLOAD_BYTES_MAX))
        return [self._scratch[:length]]

    def _begin(self, header: Header) -> None:
        if header.metadata_length > self.metadata_bytes_max:
            raise RemoteProtocolError(
                f"{header.type.name}: metadata of {header.metadata_length} bytes, the limit is"
                f" {self.metadata_bytes_max} here"
            )
        self._metadata = bytearray(header.metadata_length)
        self._metadata_left = header.metadata_length
        views: list[memoryview] = [memoryview(self._metadata)] if header.metadata_length else []
        payload_bytes = header.stream_bytes
        if header.type is FrameType.DATA and payload_bytes:
            views += self._route(header)
            if sum(map(len, views)) != header.metadata_length + payload_bytes:
                raise AssertionError("route() gave views of another length than the payload")
        self._body_left = header.metadata_length + payload_bytes
        self._views = views
        self._view_index = 0
        self._header = header

    def _advance(self, take: int) -> None:
        self._body_left -= take
        self._metadata_left = max(0, self._metadata_left - take)
        views, index = self._views, self._view_index
        while take:
            size = len(views[index])
            if take < size:
                views[index] = views[index][take:]
                break
            take -= size
            index += 1
        self._view_index = index

    def _end(self) -> Frame:
        header = self._header
        assert header is not None
        self._header = None
        self._views = []
        self._view_index = 0
        actual = short_checksum(self._metadata)
        if actual != header.metadata_checksum:
            raise RemoteProtocolError(
                f"{header.type.name}: metadata checksum is {header.metadata_checksum:#010x},"
                f" its bytes give {actual:#010x}"
            )
        return Frame(header, self._metadata)


class FrameWriter:
    """Queue of outgoing frames: buffers of many owners, sent in order, given back when sent."""

    def __init__(self) -> None:
        self._views: deque[Buffer] = deque()
        # (position in the stream at which an entry ends, whom to tell)
        self._ends: deque[tuple[int, Callable[[], None]]] = deque()
        self._pushed_total = 0
        self._sent_total = 0
        #: Bytes that the last `buffers()` offered.
        self.offered_bytes = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes pushed and not yet sent."""
        return self._pushed_total - self._sent_total

    @property
    def sent_total(self) -> int:
        """Bytes sent since the beginning."""
        return self._sent_total

    def push(
        self, buffers: Iterable[Buffer], length: int, on_sent: Callable[[], None] | None = None
    ) -> None:
        """Queue buffers of `length` bytes in all, more than none.

        They must stay unchanged until `on_sent` is called: when the last byte was sent, or
        by `abort`.
        """
        self._views.extend(buffers)
        self._pushed_total += length
        if on_sent is not None:
            self._ends.append((self._pushed_total, on_sent))

    def buffers(self) -> list[Buffer]:
        """The next bytes to send; empty when there are none."""
        views = self._views
        if len(views) <= BUFFERS_PER_CALL_MAX:
            self.offered_bytes = self.queued_bytes
            return list(views)
        batch = list(itertools.islice(views, BUFFERS_PER_CALL_MAX))
        self.offered_bytes = sum(map(len, batch))
        return batch

    def sent(self, count: int) -> None:
        """Account for `count` bytes of the last `buffers()` that were sent."""
        self._sent_total += count
        views = self._views
        if self._sent_total == self._pushed_total:
            views.clear()  # the usual case for small blocks, and hundreds of views
            count = 0
        while count:
            size = len(views[0])
            if count < size:
                views[0] = memoryview(views[0])[count:]
                break
            count -= size
            views.popleft()
        while views and not len(views[0]):
            views.popleft()  # or it would be offered for ever
        ends = self._ends
        while ends and ends[0][0] <= self._sent_total:
            ends.popleft()[1]()

    def abort(self) -> None:
        """Forget what is queued and give all buffers back: the connection is gone."""
        self._views.clear()
        self._pushed_total = self._sent_total
        while self._ends:
            self._ends.popleft()[1]()
