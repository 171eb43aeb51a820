"""What both sides of a conversation have in common: frames in, frames out."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import msgspec

from kvstore.blocksource import Chunk
from kvstore.errors import (
    LocalProtocolError,
)
from kvstore.framing import Frame, FrameReader, FrameWriter
from kvstore.messages import (
    Data,
    encode,
)
from kvstore.protocol.placing import Placed
from kvstore.wire import (
    HEADER_BYTES,
    Flags,
    FrameType,
    Header,
    encode_header,
)

Reply = msgspec.Struct | Exception

# Plain numbers: arithmetic with enumerations costs a microsecond, on each frame.
_PLACED, _VERIFIED = int(Flags.PLACED), int(Flags.PLACED | Flags.VERIFIED)


class FrameProtocol(abc.ABC):
    """What a `FrameConnection` needs of either side."""

    def __init__(self) -> None:
        self.reader = FrameReader(self._route)
        self.writer = FrameWriter()
        #: Set by the shell: something was queued outside of `receive` and `fill`.
        self.on_output: Callable[[], None] = lambda: None
        #: Set by `fill` when it has more to do and let others have their turn first.
        self.unfilled = False
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
        """Top the writer up with payload: a bounded piece of work, see `unfilled`."""

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
        self._send_encoded(type, request_id, encode(message), flags)

    def _send_encoded(
        self, type: FrameType, request_id: int, metadata: bytes, flags: int = 0
    ) -> None:
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

    def _send_placed(self, request_id: int, news: Placed) -> None:
        data = news.data
        metadata = b"" if data == _NO_DATA else encode(data)
        flags = _VERIFIED if news.verified else _PLACED
        header = encode_header(
            FrameType.DATA,
            request_id,
            metadata,
            news.length,
            news.piece,
            news.piece_offset,
            flags,
        )
        self.writer.push((header + metadata,), HEADER_BYTES + len(metadata))
        self.on_output()


_NO_DATA = Data()
