"""The seam to the network: what a transport must offer. TCP, unix, later RDMA and shm.

A `Stream` moves bytes without blocking; who waits for it (the event loop) is not its
business. Errors of the operating system leave a transport as `TransportError`.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Sequence

from kvstore.endpoint import Endpoint
from kvstore.errors import Unsupported

Buffer = bytes | bytearray | memoryview

# A peer on the same network answers in well under a millisecond; one that has not accepted
# within a second is treated as dead.
CONNECT_TIMEOUT_S = 1.0


class Stream(abc.ABC):
    """A connected, non-blocking, ordered byte stream."""

    #: Name used in attribution and metrics: "tcp", "unix", ...
    transport: str
    #: The other end, for logs.
    peer: str

    @abc.abstractmethod
    def fileno(self) -> int:
        """Descriptor that the event loop waits on."""

    @abc.abstractmethod
    def receive_into(self, buffers: Sequence[memoryview]) -> int:
        """Receive straight into `buffers`, filling them in order, with one system call.

        Returns:
            Number of bytes; 0 means that the peer has closed its side.

        Raises:
            BlockingIOError: Nothing has arrived.
            TransportError: The stream is broken.
        """

    @abc.abstractmethod
    def send(self, buffers: Sequence[Buffer]) -> int:
        """Send from `buffers` in order, with one system call and without joining them.

        Returns:
            Number of bytes that the transport has taken; the caller may reuse those.

        Raises:
            BlockingIOError: The transport takes nothing now.
            TransportError: The stream is broken.
        """

    def unsent_bytes(self) -> int:
        """What `send` has taken and the network has not; 0 where the transport cannot tell."""
        return 0

    def send_descriptor(self, fd: int) -> None:
        """Let a descriptor go along with the bytes of the next `send`; several keep their order.

        Sent is a duplicate, made now; `fd` stays the caller's.

        Raises:
            Unsupported: This transport hands no descriptors over.
            TransportError: The process has no descriptor left for the duplicate.
        """
        raise Unsupported(f"descriptors cannot be handed over by {self.transport}")

    def accept_descriptors(self) -> None:
        """Take descriptors from now on; those that come before are closed by the kernel.

        Looking for them makes each `receive_into` a microsecond dearer.

        Raises:
            Unsupported: This transport hands no descriptors over.
        """
        raise Unsupported(f"descriptors cannot be handed over by {self.transport}")

    def take_descriptor(self) -> int | None:
        """The oldest descriptor that has come and was not taken; the taker owns it.

        It is here no later than the first byte that it was sent with.
        """
        return None

    def peer_uid(self) -> int | None:
        """Who the peer is by the word of the kernel; None where it does not tell."""
        return None

    def local_address(self) -> str:
        """Our address on the network that it goes through; "" where there is none."""
        return ""

    @abc.abstractmethod
    def end_sending(self) -> None:
        """Tell the peer that nothing follows; receiving goes on. Never raises."""

    def detach(self) -> int:
        """As `close`, but the descriptor is the caller's from now on; -1 if there is none."""
        self.close()
        return -1

    @abc.abstractmethod
    def close(self) -> None:
        """Release the descriptor at once. Closing twice is harmless."""


class Listener(abc.ABC):
    """A bound address that yields streams."""

    #: Where it listens, with the port that the system chose.
    endpoint: Endpoint

    @abc.abstractmethod
    def start(self, loop: asyncio.AbstractEventLoop, on_stream: Callable[[Stream], None]) -> None:
        """Accept connections from now on; `on_stream` is called on the loop for each."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop accepting, and remove what the address left in the file system."""
