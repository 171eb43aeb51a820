"""The shell around a protocol: moves bytes between a stream and the event loop, and decides
nothing. One class for both sides.

Why not asyncio's transports: CPython 3.11's `writelines` joins its buffers (a copy of all
payload), and none of them tells when a buffer has been let go of, which is when a block may
be unpinned. Two readiness callbacks and two system calls do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvstore.errors import KVStoreError, ProtocolError, RefusedError, TransportError
from kvstore.protocol import FrameProtocol
from kvstore.transport.base import Stream
from kvstore.wire import PAYLOAD_BYTES_MAX

logger = logging.getLogger(__name__)

# System calls in one callback before other connections get their turn. A call moves at most
# what the socket buffer holds, a few MiB.
CALLS_PER_TURN_MAX = 8
# How long a connection that is being closed may take to send what explains the close, and the
# peer to read it and close.
LAST_WORDS_S = 1.0


class FrameConnection:
    """One connection on the loop's thread.

    Args:
        loop: The running loop; all methods are to be called on its thread.
        stream: Connected; owned from now on.
        protocol: Its reader says where bytes go, its writer which ones to send.
        on_closed: Called once with the reason when the connection is gone, after
            `protocol.lost`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stream: Stream,
        protocol: FrameProtocol,
        on_closed: Callable[[Exception], None],
    ) -> None:
        self.stream = stream
        self.protocol = protocol
        self.closed = False
        #: Loop time at which the last byte came.
        self.received_at = loop.time()
        #: Loop time at which the peer took the last byte, or at which there was one for it to
        #: take after there had been none.
        self.sent_at = self.received_at
        #: Gets the descriptor at the end, and owns it, where it is not to be closed at once.
        self.on_detached: Callable[[int], None] | None = None
        self._loop = loop
        self._on_closed = on_closed
        self._writing = False
        self._flush_scheduled = False
        self._in_turn = False
        self._close_reason: Exception | None = None
        # Of a connection with a reason to close: nothing more comes; nothing more is sent.
        self._input_ended = False
        self._output_ended = False
        protocol.on_output = self._output
        loop.add_reader(stream.fileno(), self._readable)
        self._output()

    def close(self, reason: Exception) -> None:
        """Close at once; what is queued is not sent."""
        if self.closed:
            return
        self.closed = self._output_ended = True
        self._loop.remove_reader(self.stream.fileno())
        if self._writing:
            self._loop.remove_writer(self.stream.fileno())
        try:
            if self.on_detached is not None:
                self.on_detached(self.stream.detach())
            self.stream.close()
            self.protocol.lost(reason)
        except Exception:
            logger.exception("connection to %s: internal error at its end", self.stream.peer)
            self.protocol.writer.abort()  # or blocks would stay pinned for ever
        finally:
            self._on_closed(reason)

    def close_when_sent(self, reason: Exception) -> None:
        """Handle nothing more, send what is queued without waiting for long, then close.

        What still comes is read and dropped until the peer closes: a close with input unread
        resets the connection, and a reset may overtake the last words.
        """
        if self.closed or self._close_reason is not None:
            return
        if not self.protocol.writer.queued_bytes:
            self.close(reason)
            return
        self._close_reason = reason
        self._loop.remove_reader(self.stream.fileno())
        self._loop.add_reader(self.stream.fileno(), self._drop_input)
        self._loop.call_later(LAST_WORDS_S, self.close, reason)
        self._flush()

    def _output(self) -> None:
        # Inside of a turn the flush at its end takes the output along.
        if not (self._in_turn or self._flush_scheduled or self._writing or self._output_ended):
            self._flush_scheduled = True
            self._loop.call_soon(self._scheduled_flush)

    def _scheduled_flush(self) -> None:
        self._flush_scheduled = False
        if not self._writing:
            self._flush()

    def _drop_input(self) -> None:
        assert self._close_reason is not None
        try:
            for _ in range(CALLS_PER_TURN_MAX):
                if not self.stream.receive_into(self.protocol.reader.scratch(PAYLOAD_BYTES_MAX)):
                    self._input_ended = True
                    break
        except BlockingIOError:
            return
        except TransportError:
            self.close(self._close_reason)
            return
        if self._input_ended:
            self._loop.remove_reader(self.stream.fileno())
            if self._output_ended:
                self.close(self._close_reason)

    def _readable(self) -> None:
        reader = self.protocol.reader
        self._in_turn = True
        try:
            for _ in range(CALLS_PER_TURN_MAX):
                try:
                    count = self.stream.receive_into(reader.buffers())
                except BlockingIOError:
                    break
                if count == 0:
                    where = "inside of a frame" if reader.mid_frame else "between frames"
                    raise TransportError(f"{self.stream.peer} closed the connection {where}")
                requested = reader.requested_bytes
                self.protocol.receive(count)
                self.received_at = self._loop.time()
                if self.closed or self._close_reason is not None:
                    break
                # In the middle of a frame more is on its way: asking again costs less than to
                # be woken again.
                if count < requested and not reader.mid_frame:
                    break
        except (ProtocolError, RefusedError) as error:
            self._broken(error)
        except TransportError as error:
            self.close(error)
        except Exception as error:
            logger.exception("connection to %s: internal error", self.stream.peer)
            self.close(TransportError(f"internal error: {error!r}"))
        finally:
            self._in_turn = False
        if not self.closed and not self._writing:
            self._flush()

    def _broken(self, error: KVStoreError) -> None:
        queued_before = self.protocol.writer.queued_bytes
        self.protocol.refuse(error)
        if self.protocol.writer.queued_bytes > queued_before:
            self.close_when_sent(error)
        else:
            self.close(error)  # who explains nothing has no reason to wait

    def _flush(self) -> None:
        """Send until the socket is full or nothing is left."""
        if self._output_ended:
            return
        protocol, writer = self.protocol, self.protocol.writer
        self._in_turn = True
        try:
            for _ in range(CALLS_PER_TURN_MAX):
                if self._close_reason is None:
                    protocol.fill()
                if self.closed:
                    return
                buffers = writer.buffers()
                if not buffers:
                    self._all_sent()
                    return
                offered = writer.offered_bytes
                try:
                    count = self.stream.send(buffers)
                except BlockingIOError:
                    break
                finally:
                    del buffers
                writer.sent(count)
                self.sent_at = self._loop.time()
                if self.closed:
                    return  # by whoever was told that its buffers are free
                if count < offered or protocol.unfilled:
                    break
            self._want_writable(True)
        except TransportError as error:
            self.close(error)
        except Exception as error:
            logger.exception("connection to %s: internal error", self.stream.peer)
            self.close(TransportError(f"internal error: {error!r}"))
        finally:
            self._in_turn = False

    def _all_sent(self) -> None:
        if self._close_reason is None:
            self._want_writable(self.protocol.unfilled)
        elif self._input_ended:
            self.close(self._close_reason)
        else:
            self._want_writable(False)
            self._output_ended = True
            if self.on_detached is None:  # or it is for that one to say when all has ended
                self.stream.end_sending()

    def _want_writable(self, wanted: bool) -> None:
        if wanted and not self._writing:
            self.sent_at = self._loop.time()
            self._loop.add_writer(self.stream.fileno(), self._flush)
        elif not wanted and self._writing:
            self._loop.remove_writer(self.stream.fileno())
        self._writing = wanted
