"""A stream that does what its script says, a protocol that says what it is told to, and a
connection between them on a loop that stands still."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvstore.framing import Frame
from kvstore.messages import Empty
from kvstore.protocol import FrameProtocol
from kvstore.transport import Stream
from kvstore.transport.base import Buffer
from kvstore.transport.connection import FrameConnection
from kvstore.wire import FrameType, Header
from tests.support.frames import frame
from tests.support.loops import ManualLoop

DESCRIPTOR = 7
EVERYTHING = 1 << 40
Step = int | Exception


class ScriptedStream(Stream):
    """Nothing behind it.

    Attributes:
        arriving: What the next receives get: bytes, no more in one call than fit; b"" for
            the end of the stream; or an exception. Nothing has arrived beyond that.
        room: What the next sends take: so many bytes, or an exception. All of it after that.
        sent: All that was taken.
        receives, sends, ends: Calls.
        closes: Calls of `close` that found it open.
    """

    transport = "script"
    peer = "the script"

    def __init__(self) -> None:
        self.arriving: deque[bytes | Exception] = deque()
        self.room: deque[Step] = deque()
        self.sent = bytearray()
        self.receives = 0
        self.sends = 0
        self.ends = 0
        self.closes = 0

    def fileno(self) -> int:
        return -1 if self.closes else DESCRIPTOR

    def receive_into(self, buffers: Sequence[memoryview]) -> int:
        assert not self.closes, "used after close"
        self.receives += 1
        if not self.arriving:
            raise BlockingIOError
        step = self.arriving.popleft()
        if isinstance(step, Exception):
            raise step
        rest = memoryview(step)
        for buffer in buffers:
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            rest = rest[count:]
        if rest:
            self.arriving.appendleft(bytes(rest))
        return len(step) - len(rest)

    def send(self, buffers: Sequence[Buffer]) -> int:
        assert not self.closes, "used after close"
        self.sends += 1
        step = self.room.popleft() if self.room else EVERYTHING
        if isinstance(step, Exception):
            raise step
        taken = b"".join(buffers)[:step]
        self.sent += taken
        return len(taken)

    def end_sending(self) -> None:
        assert not self.closes, "used after close"
        self.ends += 1

    def close(self) -> None:
        self.closes += 1


class TalkingProtocol(FrameProtocol):
    """Sends what a test queues, and tells a test what comes.

    Attributes:
        ready: Payload that `fill` may queue, and whom to tell when it is sent. Each call
            takes one.
        frames: What has come.
        losses: Why it was lost.
        at_frame, at_fill, at_loss: Called at these, if set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ready: deque[tuple[bytes, Callable[[], None]]] = deque()
        self.frames: list[Frame] = []
        self.losses: list[Exception] = []
        self.fills = 0
        self.at_frame: Callable[[], None] = lambda: None
        self.at_fill: Callable[[], None] = lambda: None
        self.at_loss: Callable[[], None] = lambda: None

    def say(self, data: bytes, on_sent: Callable[[], None] | None = None) -> None:
        """Queue bytes as a request or a reply."""
        self.writer.push([data], len(data), on_sent)
        self.on_output()

    def fill(self) -> None:
        self.fills += 1
        self.at_fill()
        if self.ready:
            data, on_sent = self.ready.popleft()
            self.writer.push([data], len(data), on_sent)

    def lost(self, error: Exception) -> None:
        self.lost_by = error
        self.losses.append(error)
        self.at_loss()
        self.writer.abort()

    def refuse(self, error: Exception) -> None:
        self.say(b"refused")

    def _route(self, header: Header) -> Sequence[memoryview]:
        return self.reader.scratch(header.payload_length)

    def _frame(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.at_frame()


class Rig:
    """A connection of which every part is in the test's hands.

    Attributes:
        closed: Reasons that `on_closed` was called with.
    """

    def __init__(self, protocol: FrameProtocol | None = None) -> None:
        self.loop = ManualLoop()
        self.stream = ScriptedStream()
        self.talk = TalkingProtocol()
        self.closed: list[Exception] = []
        self.connection = FrameConnection(
            self.loop.as_loop, self.stream, protocol or self.talk, self.closed.append
        )

    def settle(self) -> None:
        """Let the loop do what it was asked to, and forget what there was until now."""
        self.loop.run_soon()
        self.loop.changes.clear()
        self.stream.receives = self.stream.sends = 0

    def arrive(self, *data: bytes | Exception) -> None:
        """Something arrives, and the loop says so."""
        self.stream.arriving.extend(data)
        self.loop.readers[DESCRIPTOR]()

    def writable(self) -> None:
        """The loop says that the stream can take something."""
        self.loop.writers[DESCRIPTOR]()

    @property
    def waits_for(self) -> tuple[bool, bool]:
        """Whether it is registered as reader and as writer."""
        return DESCRIPTOR in self.loop.readers, DESCRIPTOR in self.loop.writers


def ping(request_id: int) -> bytes:
    """A small frame."""
    return frame(FrameType.PING, request_id, Empty())
