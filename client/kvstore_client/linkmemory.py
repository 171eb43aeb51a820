"""Ways for one link's peer into the caller's memory.

A way is agreed on when the link comes up; from then on requests name memory that lies in a
region, and their payload does not pass through the socket.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence

from kvstore.errors import LocalProtocolError, RefusedError, RemoteProtocolError
from kvstore.memorymap import PLACE_BYTES, describe
from kvstore.memorymessages import Map, Mapped, Memory, MemoryRegion, Share, Unshare
from kvstore.messages import Done, FetchOutcome, Message, PutDone, PutOutcome
from kvstore.protocol import Reply
from kvstore.transfer import BlockMemory
from kvstore.transport.connection import FrameConnection
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_end import RdmaEnd
from kvstore.transport.shm import MappedArena
from kvstore.transport.verbs import VerbsError
from kvstore.wire import FrameType
from kvstore_client.memory import Region, Regions

# A peer lets 16 descriptors wait, and with a send go no more than that: one of which the frame has
# gone ahead would later be taken for the memory of another frame.
SHARES_UNDER_WAY_MAX = 8

#: A request with one reply on the control connection of the link.
Ask = Callable[[FrameType, Message], Awaitable[Message]]


def place_bytes_of(memory: BlockMemory) -> int:
    """Metadata that the places of a block take in a request."""
    return PLACE_BYTES * (1 if isinstance(memory, memoryview) else len(memory))


class LinkMemory(abc.ABC):
    """One way into memory, for as long as a link is up. On the loop's thread.

    Attributes:
        transport: What moves the bytes, for attribution.
        only: Whether nothing else is to move payload.
        on_moved: Called when a request has ended whose payload has come where it was to go
            (True), or was lost on the way (False).
    """

    transport: str
    only = False

    def __init__(self, loop: asyncio.AbstractEventLoop, regions: Regions) -> None:
        self.loop = loop
        self._regions = regions
        self.on_moved: Callable[[bool], None] = _nobody_asks
        #: Done when the peer can touch no memory any more, after `close`.
        self.settled: asyncio.Future[None] = loop.create_future()

    def name(self, memory: Sequence[BlockMemory]) -> NamedMemory | None:
        """The memory of the blocks of a request; None if some of it lies in no region that the
        peer knows.

        Raises:
            LocalProtocolError: So it is, and it may go no other way.
        """
        named: dict[int, Region] = {}

        def locate(view: memoryview) -> tuple[int, int] | None:
            found = self._regions.locate(view)
            if found is None or not self.knows(found[0]):
                return None
            named[found[0].number] = found[0]
            return found[0].number, found[1]

        told = describe(memory, locate, lambda number: self.region(named[number]))
        if told is None and self.only:
            raise LocalProtocolError(
                f"transport={self.transport}, and memory of these blocks lies in no region that it"
                " reaches: get it by allocate, or register it"
            )
        return None if told is None else NamedMemory(self, told, list(named.values()))

    @abc.abstractmethod
    def knows(self, region: Region) -> bool:
        """Whether the peer can reach a region."""

    @abc.abstractmethod
    def region(self, region: Region) -> MemoryRegion:
        """A region as requests name it."""

    @abc.abstractmethod
    async def add(self, region: Region) -> None:
        """Let the peer reach a region.

        Raises:
            KVStoreError: It is refused, or the link breaks.
        """

    @abc.abstractmethod
    async def remove(self, region: Region) -> None:
        """The peer reaches a region no more when this returns; raises as `add`."""

    def give_up(self) -> None:  # noqa: B027 - most have nothing to give back
        """Wait for `settled` no more: it never comes."""

    @abc.abstractmethod
    def close(self) -> None:
        """The link is down. `settled` follows, at once or when the peer has seen it."""


class NamedMemory:
    """Memory that one request has named to its peer, until the peer touches it no more.

    Attributes:
        memory: What the request says.
        transport: What moves its payload.
        free: Done when the peer has said its last word, or can touch no memory any more.
    """

    def __init__(self, way: LinkMemory, memory: Memory, regions: Sequence[Region]) -> None:
        self.memory = memory
        self.transport = way.transport
        self.free: asyncio.Future[None] = way.loop.create_future()
        self._way = way
        self._calls: list[Callable[[], None]] = []
        self._regions = regions
        for region in regions:
            region.users += 1

    def when_free(self, call: Callable[[], None]) -> None:
        """Call when the memory is free: now, or later on the loop."""
        if self.free.done():
            call()
        else:
            self._calls.append(call)

    def answered(self, reply: Reply) -> None:
        """The peer's last word, or the error that came in its place."""
        moved = _moved(reply)
        if moved is not None:
            self._way.on_moved(moved)
        if isinstance(reply, Exception) and not isinstance(reply, RefusedError):
            # The connection is gone; its peer may be at work for a moment longer.
            self._way.settled.add_done_callback(lambda _: self._end())
        else:
            self._end()

    def _end(self) -> None:
        if self.free.done():
            return
        for region in self._regions:
            region.users -= 1
        self.free.set_result(None)
        calls, self._calls = self._calls, []
        for call in calls:
            call()


def _moved(reply: Reply) -> bool | None:
    """Whether payload was moved, by the last word on it; None if that does not say."""
    if isinstance(reply, Done):
        if reply.lost_runs:
            return False
        return True if FetchOutcome.HIT in reply.outcomes else None
    if isinstance(reply, PutDone):
        if PutOutcome.STORED in reply.outcomes:
            return True
        # With a reason: it was not taken back.
        return False if reply.errors and PutOutcome.UNAVAILABLE in reply.outcomes else None
    return None


def _nobody_asks(moved: bool) -> None:
    pass


class SharedMemory(LinkMemory):
    """Regions whose memfds the peer has mapped: it copies, and verifies what it has copied.

    It copies on until it sees that we are gone. Its answer to that is the end of its side, or of
    its process: only then is nothing copied any more. So the sockets of requests outlive their
    connections until that has come.

    Args:
        control: Of the link; descriptors go with what it sends.
        carriers: The connections on which requests name memory.
        ask: Sends a request on `control`.
        views: Whether the peer lets us map its own memory.
    """

    transport = "shm"

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        regions: Regions,
        control: FrameConnection,
        carriers: Sequence[FrameConnection],
        ask: Ask,
        views: bool,
    ) -> None:
        super().__init__(loop, regions)
        self._control = control
        self._ask = ask
        self.views = views
        self._arena: MappedArena | None = None
        self._known: set[int] = set()
        self._sharing = asyncio.Semaphore(SHARES_UNDER_WAY_MAX)
        self._left = len(carriers)  # whose end by the peer is yet to come
        self._watched: set[socket.socket] = set()
        for connection in carriers:
            connection.on_detached = self._watch

    def knows(self, region: Region) -> bool:
        return region.number in self._known

    def region(self, region: Region) -> MemoryRegion:
        return MemoryRegion(keys=(region.number,), size_bytes=region.size_bytes)

    async def add(self, region: Region) -> None:
        if region.fd is None:
            raise RefusedError(
                "memory that was registered cannot be handed to another process: allocate it"
            )
        async with self._sharing:
            self._control.stream.send_descriptor(region.fd)
            # Written in the same turn, so that the descriptor goes with this frame.
            message = Share(
                number=region.number,
                size_bytes=region.size_bytes,
                inode=os.fstat(region.fd).st_ino,
            )
            await self._ask(FrameType.SHARE, message)
        self._known.add(region.number)

    async def remove(self, region: Region) -> None:
        if region.number in self._known:
            self._known.discard(region.number)
            await self._ask(FrameType.UNSHARE, Unshare(number=region.number))

    async def map(self, namespace: bytes) -> memoryview:
        """The peer's memory, read-only; mapped when first asked for.

        Raises:
            KVStoreError: The peer refuses, or what it hands over is not protected.
        """
        if self._arena is None:
            stream = self._control.stream
            stream.accept_descriptors()
            reply = await self._ask(FrameType.MAP, Map(namespace=namespace))
            fd = stream.take_descriptor()
            if fd is None:
                raise RemoteProtocolError("MAP was answered without a descriptor")
            assert isinstance(reply, Mapped)
            if self._arena is not None:  # somebody else has asked meanwhile
                os.close(fd)
            else:
                self._arena = MappedArena.adopt(fd, reply.size_bytes, stream.peer)
        return self._arena.view

    def close(self) -> None:
        self._known.clear()
        if self._arena is not None:
            self._arena.close()  # when the last view of it is gone

    def give_up(self) -> None:
        for watched in list(self._watched):
            self._unwatch(watched)

    def _watch(self, fd: int) -> None:
        """A connection has ended here: tell the peer, and wait until it has ended there."""
        if fd < 0:
            self._ended()
            return
        watched = socket.socket(fileno=fd)
        self._watched.add(watched)
        with contextlib.suppress(OSError):  # the peer may be gone
            watched.shutdown(socket.SHUT_WR)
        self.loop.add_reader(watched.fileno(), self._drain, watched)

    def _drain(self, watched: socket.socket) -> None:
        try:
            if watched.recv(65536, socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # reset: it is closed
        self._unwatch(watched)
        self._ended()

    def _unwatch(self, watched: socket.socket) -> None:
        self._watched.discard(watched)
        self.loop.remove_reader(watched.fileno())
        watched.close()

    def _ended(self) -> None:
        self._left -= 1
        if not self._left and not self.settled.done():
            self.settled.set_result(None)


class RdmaMemory(LinkMemory):
    """Regions that are registered with devices: the peer writes and reads them by itself.

    Args:
        node: Rails of this process.
        end: Our side of the queue pairs, connected.
        only: See `LinkMemory`.
    """

    transport = "rdma"

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        regions: Regions,
        node: RdmaNode,
        end: RdmaEnd,
        only: bool,
    ) -> None:
        super().__init__(loop, regions)
        self.only = only
        self._node = node
        self._end = end

    def knows(self, region: Region) -> bool:
        return self._node in region.registrations

    def region(self, region: Region) -> MemoryRegion:
        return region.registrations[self._node].described()

    async def add(self, region: Region) -> None:
        if self._node in region.registrations:
            return
        try:
            registration = self._node.register(region.view, remote_write=True, remote_read=True)
        except VerbsError as error:
            raise RefusedError(str(error)) from error
        region.registrations[self._node] = registration

    async def remove(self, region: Region) -> None:
        """Nothing: the memory is taken back from all peers together, by its owner."""

    def close(self) -> None:
        self._end.close()  # when it returns, no device touches memory for this peer
        if not self.settled.done():
            self.settled.set_result(None)


__all__ = ["Ask", "LinkMemory", "NamedMemory", "RdmaMemory", "SharedMemory", "place_bytes_of"]
