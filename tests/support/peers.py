"""Peers and networks that misbehave: a proxy that breaks what passes, a server with a script.

Both listen on loopback, in the test's own process. A `Proxy` stands in front of a real node;
a `ScriptedServer` is no node at all and says what its script says.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from kvstore.layout import generation_id, namespace_id
from kvstore.messages import (
    Channel,
    Empty,
    Hello,
    Message,
    NamespaceInfo,
    Namespaces,
    OpenNamespace,
    Role,
    Welcome,
    decode,
)
from kvstore.wire import HEADER_BYTES, VERSION, Flags, FrameType, Header, decode_header
from tests.support.frames import frame

READ_BYTES = 64 * 1024
#: What a slow proxy passes at once, in time.
SLICE_S = 0.01
#: Order in which a client opens the connections of a link.
CONTROL, FETCH, PUT = range(3)

# (header, the whole frame) -> what passes instead.
Mangle = Callable[[Header, bytearray], bytes | bytearray]


class Proxy:
    """A TCP relay in front of one server.

    Connections are numbered as they come; a client's link opens CONTROL, FETCH and PUT, so
    that a connection's number modulo 3 tells its channel.

    Attributes:
        accepted: Connections that ever came.
        mangle: For "down" and "up", what is called with every frame on its way.
        cut_at, hold_at: For (way, channel), after how many bytes of a connection it breaks,
            or its way is held. Each happens once.
        passed: For (way, channel), the bytes that have passed on its newest connection.
        rate_Bps: For a way, what each of its connections passes in a second; else all it can.
    """

    def __init__(self, target: str) -> None:
        self.point_at(target)
        self.accepted = 0
        self.mangle: dict[str, Mangle] = {}
        self.cut_at: dict[tuple[str, int], int] = {}
        self.hold_at: dict[tuple[str, int], int] = {}
        self.passed: dict[tuple[str, int], int] = {}
        self.rate_Bps: dict[str, float] = {}
        self.uri = ""
        self._flows = {"down": asyncio.Event(), "up": asyncio.Event()}
        for event in self._flows.values():
            event.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._refuse = False
        self._listener: asyncio.Server

    def point_at(self, target: str) -> None:
        """Where connections go from now on."""
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 0)

    async def start(self) -> None:
        """Begin to listen."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.uri = f"tcp://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Break everything and listen no more."""
        self._listener.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def open_count(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    def hold(self, *ways: str) -> None:
        """Pass nothing on in these directions ("down": to the client, "up": to the server)."""
        for way in ways:
            self._flows[way].clear()

    def let_go(self, *ways: str) -> None:
        """Pass everything on again, in these directions or in both."""
        for way in ways or self._flows:
            self._flows[way].set()

    def cut(self) -> None:
        """Break all connections with a reset."""
        for writer in list(self._writers):
            writer.transport.abort()

    def refuse(self, refusing: bool = True) -> None:
        """Whether new connections break at once."""
        self._refuse = refusing

    def half_close(self) -> None:
        """Tell the clients that the server has said all; what they say still passes."""
        for writer in list(self._writers):
            if writer.get_extra_info("sockname")[1] == urlsplit(self.uri).port:
                writer.write_eof()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        channel = self.accepted % 3
        self.accepted += 1
        self._writers.add(writer)
        upstream: asyncio.StreamWriter | None = None
        try:
            if self._refuse:
                return
            answers, upstream = await asyncio.open_connection(*self._target)
            self._writers.add(upstream)
            ways = [
                asyncio.ensure_future(self._pump(channel, "up", reader, upstream)),
                asyncio.ensure_future(self._pump(channel, "down", answers, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, upstream):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()
            self._connections.discard(task)

    async def _pump(
        self, channel: int, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        name, passed, rest = (way, channel), 0, bytearray()
        self.passed[name] = 0
        # So that drain waits until the kernel has all, and a break loses none of it.
        writer.transport.set_write_buffer_limits(0)
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                out = bytearray(data)
                if way in self.mangle:
                    rest += data
                    out = self._whole_frames(way, rest)
                while out:
                    await self._flows[way].wait()
                    hold, cut = self.hold_at.get(name), self.cut_at.get(name)
                    stops = [stop - passed for stop in (hold, cut) if stop is not None]
                    rate_Bps = self.rate_Bps.get(way)
                    if rate_Bps:
                        stops.append(max(1, int(rate_Bps * SLICE_S)))
                    part = out[: max(0, min(stops, default=len(out)))]
                    del out[: len(part)]
                    writer.write(part)
                    await writer.drain()
                    passed += len(part)
                    self.passed[name] = passed
                    if rate_Bps:
                        await asyncio.sleep(len(part) / rate_Bps)
                    if cut is not None and passed >= cut:
                        del self.cut_at[name]
                        return
                    if hold is not None and passed >= hold:
                        del self.hold_at[name]
                        self._flows[way].clear()

    def _whole_frames(self, way: str, rest: bytearray) -> bytearray:
        out = bytearray()
        while len(rest) >= HEADER_BYTES:
            header = decode_header(rest[:HEADER_BYTES])
            size = HEADER_BYTES + header.metadata_length + header.payload_length
            if len(rest) < size:
                break
            out += self.mangle[way](header, rest[:size])
            del rest[:size]
        return out


@asynccontextmanager
async def proxied(target: str) -> AsyncIterator[Proxy]:
    """A proxy in front of a server."""
    proxy = Proxy(target)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()


class Talk:
    """One connection of a scripted server.

    Attributes:
        channel: What the client uses it for; None before HELLO.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.channel: Channel | None = None
        self.reader = reader
        self.writer = writer

    def send(
        self,
        type: FrameType,
        request_id: int,
        message: Message | bytes = b"",
        payload: bytes = b"",
        piece: int = 0,
        piece_offset: int = 0,
        reply: bool = False,
    ) -> None:
        """Send one frame with right checksums."""
        flags = Flags.REPLY if reply else Flags.NONE
        self.write(frame(type, request_id, message, payload, piece, piece_offset, flags))

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    def close(self) -> None:
        """Break the connection."""
        self.writer.transport.abort()


# What to do when a frame of some type comes.
Act = Callable[[Talk, Header, bytes], None]


class ScriptedServer:
    """A server that speaks the protocol as far as its script wants.

    Args:
        script: What to do with a frame of a type; HELLO, OPEN_NAMESPACE and SUBSCRIBE are
            answered properly unless the script says otherwise, others are not answered.

    Attributes:
        seen: Metadata of every frame that came, by type.
        talks: Connections that are open.
        reading: Clear it to read no more.
    """

    def __init__(self, script: Mapping[FrameType, Act]) -> None:
        self.script: dict[FrameType, Act] = {
            FrameType.HELLO: welcome,
            FrameType.OPEN_NAMESPACE: open_namespace,
            FrameType.SUBSCRIBE: acknowledge,
            **script,
        }
        self.seen: dict[FrameType, list[bytes]] = {}
        self.talks: list[Talk] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self.uri = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server

    def count(self, type: FrameType) -> int:
        """Frames of a type that came."""
        return len(self.seen.get(type, ()))

    async def start(self) -> None:
        """Begin to listen."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.uri = f"tcp://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Break everything and listen no more."""
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        talk = Talk(reader, writer)
        self.talks.append(talk)
        try:
            while True:
                await self.reading.wait()
                header = decode_header(await reader.readexactly(HEADER_BYTES))
                metadata = await reader.readexactly(header.metadata_length)
                await reader.readexactly(header.payload_length)
                self.seen.setdefault(header.type, []).append(metadata)
                if header.type is FrameType.HELLO:
                    talk.channel = decode(metadata, Hello).channel
                act = self.script.get(header.type)
                if act is not None:
                    act(talk, header, metadata)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.talks.remove(talk)
            writer.transport.abort()
            self._tasks.discard(task)


def welcome(talk: Talk, header: Header, metadata: bytes) -> None:
    """Answer HELLO as a daemon does."""
    message = Welcome(version=VERSION, node_id="liar", boot_id=bytes(16), role=Role.DAEMON)
    talk.send(FrameType.WELCOME, 0, message)


def open_namespace(talk: Talk, header: Header, metadata: bytes) -> None:
    """Answer OPEN_NAMESPACE as a daemon does."""
    wanted = decode(metadata, OpenNamespace)
    info = NamespaceInfo(
        namespace=namespace_id(wanted.pool, wanted.layout),
        pool=wanted.pool,
        generation=generation_id(wanted.pool, wanted.layout),
        layout=wanted.layout,
    )
    reply = Namespaces(namespaces=(info,))
    talk.send(FrameType.OPEN_NAMESPACE, header.request_id, reply, reply=True)


def acknowledge(talk: Talk, header: Header, metadata: bytes) -> None:
    """Answer with an empty reply of the same type."""
    talk.send(header.type, header.request_id, Empty(), reply=True)


@asynccontextmanager
async def scripted(script: Mapping[FrameType, Act]) -> AsyncIterator[ScriptedServer]:
    """A server with a script."""
    server = ScriptedServer(script)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
