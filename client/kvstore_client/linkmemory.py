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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol

from kvstore.errors import (
    KVStoreError,
    LocalProtocolError,
    RefusedError,
    RemoteProtocolError,
    TransportError,
)
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
from kvstore_client.places import locate

# A peer lets 16 descriptors wait, and with a send go no more than that: one of which the frame has
# gone ahead would later be taken for the memory of another frame.
SHARES_UNDER_WAY_MAX = 8


class Ask(Protocol):
    """A request with one reply on the control connection of the link."""

    def __call__(
        self, type: FrameType, message: Message, on_late: Callable[[Reply], None] = ..., /
    ) -> Awaitable[Message]:
        """`on_late` gets a reply that comes when nobody waits for it any more."""
        ...


class LinkMemory(abc.ABC):
    """One way into memory, for as long as a link is up. On the loop's thread.

    Attributes:
        transport: What moves the bytes, for attribution.
        only: Whether nothing else is to move payload.
        refusals: Why regions are not handed over, by their numbers.
        on_moved: Called when a request has ended whose payload has come where it was to go
            (True), or was lost on the way (False).
    """

    transport: str

    def __init__(
        self, loop: asyncio.AbstractEventLoop, regions: Regions, only: bool = False
    ) -> None:
        self.loop = loop
        self.only = only
        self.refusals: dict[int, str] = {}
        self._regions = regions
        self.on_moved: Callable[[bool], None] = _nobody_asks
        #: Done when the peer can touch no memory any more, after `close`.
        self.settled: asyncio.Future[None] = loop.create_future()

    def name(self, memory: Sequence[BlockMemory]) -> NamedMemory | None:
        """The memory of the blocks of a request; None if some of it lies in no region that the
        peer knows.

        Raises:
            LocalProtocolError: So it is, and it may go no other way; says why.
        """
        try:
            located = locate(self._regions, memory)
            for region in located.regions:
                if not self.knows(region):
                    reason = self.refusals.get(region.number, "it is not handed over yet")
                    raise LocalProtocolError(f"a region of {region.size_bytes} bytes: {reason}")
        except LocalProtocolError as error:
            if not self.only:
                return None
            raise LocalProtocolError(
                f"transport={self.transport}, and memory of these blocks is not reached by it:"
                f" {error}"
            ) from error
        told = Memory(
            regions=tuple(map(self.region, located.regions)),
            places=located.places,
            layered=located.layered,
        )
        return NamedMemory(self, told, located.regions)

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

    async def offer(self, region: Region) -> str:
        """As `add`, and note why it is not done; says why if it is refused, "" if it is done.

        Raises:
            KVStoreError: The link breaks, or this host lacks something.
        """
        try:
            await self.add(region)
        except KVStoreError as error:
            self.refusals[region.number] = str(error)
            if not isinstance(error, RefusedError):
                raise
            return str(error)
        self.refusals.pop(region.number, None)
        return ""

    @abc.abstractmethod
    async def remove(self, region: Region) -> None:
        """The peer reaches a region no more when this returns; raises as `add`."""

    def release(self, lost: Done | None, then: Callable[[], None]) -> None:
        """A request has ended by the peer's last word: call when its memory is free.

        Args:
            lost: The word, where payload was lost on its way.
        """
        then()

    @property
    def failure(self) -> Exception | None:
        """Why nothing can be moved this way any more; None while something can."""
        return None

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
        way: Into it.
        free: Done when the peer has said its last word, or can touch no memory any more.
    """

    def __init__(self, way: LinkMemory, memory: Memory, regions: Sequence[Region]) -> None:
        self.memory = memory
        self.transport = way.transport
        self.free: asyncio.Future[None] = way.loop.create_future()
        self.way = way
        self._sent = False
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
            self.way.on_moved(moved)
        if self._sent and isinstance(reply, Exception) and not isinstance(reply, RefusedError):
            # The connection is gone; its peer may be at work for a moment longer.
            self.way.settled.add_done_callback(lambda _: self._end())
        else:
            lost = reply if isinstance(reply, Done) and reply.lost_runs else None
            self.way.release(lost, self._end)

    def _end(self) -> None:
        if self.free.done():
            return
        for region in self._regions:
            region.users -= 1
        self.free.set_result(None)
        calls, self._calls = self._calls, []
        for call in calls:
            call()


@contextlib.contextmanager
def named_in_request(named: NamedMemory | None) -> Iterator[None]:
    """While a request is sent that names memory. What is answered before it has been sent, or
    cannot be sent, leaves the memory free."""
    try:
        yield
    except BaseException as error:
        if named is not None:
            named.answered(RefusedError(f"it was not sent: {error}"))
        raise
    if named is not None:
        named._sent = True


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
        only: See `LinkMemory`.
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
        only: bool = False,
    ) -> None:
        super().__init__(loop, regions, only)
        self._control = control
        self._ask = ask
        self.views = views
        self._arena: MappedArena | None = None
        self._known: set[int] = set()
        self._sent: set[int] = set()  # the peer may have them, whether it has said so or not
        self._sharing = asyncio.Semaphore(SHARES_UNDER_WAY_MAX)
        # One that is lost already has carried no request.
        left = [connection for connection in carriers if not connection.closed]
        self._left = len(left)  # whose end by the peer is yet to come
        self._watched: set[socket.socket] = set()
        for connection in left:
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
        if region.number in self._known:
            return  # the link has come up, and taken it along, while it was made
        async with self._sharing:
            self._check_open()  # it may have waited
            self._control.stream.send_descriptor(region.fd)
            # Written in the same turn, so that the descriptor goes with this frame.
            message = Share(
                number=region.number,
                size_bytes=region.size_bytes,
                inode=os.fstat(region.fd).st_ino,
            )
            self._sent.add(region.number)
            try:
                await self._ask(FrameType.SHARE, message)
            except RefusedError:
                self._sent.discard(region.number)
                raise
        self._known.add(region.number)

    async def remove(self, region: Region) -> None:
        self._known.discard(region.number)
        if region.number in self._sent:
            self._sent.discard(region.number)
            await self._ask(FrameType.UNSHARE, Unshare(number=region.number))

    async def map(self, namespace: bytes) -> memoryview:
        """The peer's memory, read-only; mapped when first asked for.

        Raises:
            KVStoreError: The peer refuses, or what it hands over is not protected.
        """
        if self._arena is None:
            stream = self._control.stream
            stream.accept_descriptors()
            reply = await self._ask(FrameType.MAP, Map(namespace=namespace), self._mapped_late)
            self._check_open()  # or what came with the reply is closed too
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
        self._sent.clear()
        if self._arena is not None:
            self._arena.close()  # when the last view of it is gone
        if not self._left and not self.settled.done():
            self.settled.set_result(None)

    def give_up(self) -> None:
        for watched in list(self._watched):
            self._unwatch(watched)

    def _check_open(self) -> None:
        if self._control.closed:
            raise TransportError(f"{self._control.stream.peer}: the connection is closed")

    def _mapped_late(self, reply: Reply) -> None:
        """A reply that nobody waits for any more: what came with it would stay open."""
        fd = self._control.stream.take_descriptor() if isinstance(reply, Mapped) else None
        if fd is not None:
            os.close(fd)

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
        super().__init__(loop, regions, only)
        self._node = node
        self._end = end

    @property
    def failure(self) -> Exception | None:
        return self._end.failed

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

    def release(self, lost: Done | None, then: Callable[[], None]) -> None:
        """What was lost may be on its way yet, by the queue pairs that the peer has given up: our
        ends of these must not take it any more."""
        if lost is None:
            then()
        else:
            # Not in the middle of what the connection has to tell of this request.
            self.loop.call_soon(self._give_up_queues, lost.lost_rails, then)

    def close(self) -> None:
        self._end.close()
        # No device touches memory for this peer now, if all queue pairs could be destroyed.
        if not self._end.stuck and not self.settled.done():
            self.settled.set_result(None)

    def _give_up_queues(self, places: Sequence[int], then: Callable[[], None]) -> None:
        for queue in list(self._end.queues):
            if queue.place in places:
                self._end.fail(queue, TransportError(f"rdma {queue.name}: given up by the peer"))
        if self._end.stuck:
            self.settled.add_done_callback(lambda _: then())
        else:
            then()


__all__ = [
    "Ask",
    "LinkMemory",
    "NamedMemory",
    "RdmaMemory",
    "SharedMemory",
    "named_in_request",
]
