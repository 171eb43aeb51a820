"""Conversations of two connections over real sockets, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from kvstore.errors import RemoteProtocolError, TransportError
from kvstore.framing import BUFFERS_PER_CALL_MAX
from kvstore.messages import FetchOutcome, PutOutcome
from kvstore.protocol import FrameProtocol
from kvstore.transport.connection import FrameConnection
from kvstore.transport.sockets import SocketStream
from kvstore.wire import FrameType
from tests.contract.transport_suite import descriptors
from tests.support.engine import key
from tests.support.frames import FetchCall, Pair, PutCall, Store, sent_types
from tests.support.loops import LOOPS, run_on, turns
from tests.support.scripts import TalkingProtocol, ping

BROKEN = TransportError("the test closes")
# Smallest that the kernel makes of it: every payload is cut into many parts.
SMALL_BYTES = 4096


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    """Name of the event loop."""
    return str(request.param)


@pytest.fixture(autouse=True)
def no_socket_left() -> Iterator[None]:
    """Whatever a test does, its sockets are closed by the connections that own them."""
    before = descriptors()
    yield
    assert descriptors() <= before


class End:
    """One end of a connection.

    Attributes:
        closed: Reasons that `on_closed` was called with.
    """

    def __init__(self, sock: socket.socket, protocol: FrameProtocol) -> None:
        self.closed: list[Exception] = []
        self.over = asyncio.Event()
        self.protocol = protocol
        stream = SocketStream(sock, "unix", "the other end")
        running = asyncio.get_running_loop()
        self.connection = FrameConnection(running, stream, protocol, self._closed)

    def _closed(self, reason: Exception) -> None:
        self.closed.append(reason)
        self.over.set()


def ends(pair: Pair, buffer_bytes: int = 0) -> tuple[End, End]:
    """The two ends of a conversation: client and server."""
    near, far = socket.socketpair()
    for sock in (near, far):
        if buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    return End(near, pair.client), End(far, pair.server)


async def talk(client: End, *calls: FetchCall | PutCall) -> None:
    """Let the loop turn until all calls have their replies."""
    async with asyncio.timeout(60):
        while not all(call.replies for call in calls) and not client.closed:
            await turns(1)
    assert not client.closed, client.closed


async def finish(client: End, server: End) -> None:
    """The client leaves; both ends hear of it once."""
    client.connection.close(BROKEN)
    await server.over.wait()
    await turns()
    assert client.closed == [BROKEN]
    assert len(server.closed) == 1


@pytest.mark.parametrize("buffer_bytes", [0, SMALL_BYTES])
def test_more_buffers_than_the_kernel_takes_arrive_where_they_belong(
    loop: str, buffer_bytes: int
) -> None:
    """Scattered on arrival, gathered from 2,000 blocks on departure."""
    keys = [key(number) for number in range(2000)]
    store = Store(40, 24)
    store.fill(*keys)
    assert len(keys) > BUFFERS_PER_CALL_MAX

    async def main() -> None:
        pair = Pair(store)
        client, server = ends(pair, buffer_bytes)
        fetch = FetchCall(store.geometry, keys, scattered=True)
        pair.begin_fetch(fetch)
        await talk(client, fetch)
        assert fetch.check() == [FetchOutcome.HIT] * len(keys)
        assert store.lent == 0
        await finish(client, server)

    run_on(loop, main())


@pytest.mark.parametrize("buffer_bytes", [0, SMALL_BYTES])
def test_both_directions_at_once(loop: str, buffer_bytes: int) -> None:
    keys = [key(number) for number in range(40)]
    store = Store(20_000, 30_000)
    store.fill(*keys[:20])

    async def main() -> None:
        pair = Pair(store)
        client, server = ends(pair, buffer_bytes)
        fetch = FetchCall(store.geometry, keys[:20], scattered=True)
        put = PutCall(store, keys[20:], scattered=True)
        pair.begin_fetch(fetch)
        pair.begin_put(put)
        await talk(client, fetch, put)
        assert fetch.check() == [FetchOutcome.HIT] * 20
        assert put.outcomes() == [PutOutcome.STORED] * 20
        assert all(store.blocks[name] == store.block(name) for name in keys)
        assert (store.lent, store.held, put.transfer.idle) == (0, 0, True)
        await finish(client, server)

    run_on(loop, main())


@pytest.mark.parametrize("gone", ["client", "server"])
def test_end_that_vanishes_in_mid_stream_gives_everything_back(loop: str, gone: str) -> None:
    keys = [key(number) for number in range(20)]
    store = Store(50_000)
    store.fill(*keys[:10])

    async def main() -> None:
        pair = Pair(store)
        client, server = ends(pair, SMALL_BYTES)
        fetch, put = FetchCall(store.geometry, keys[:10]), PutCall(store, keys[10:])
        pair.begin_fetch(fetch)
        pair.begin_put(put)
        while not (FetchOutcome.HIT in fetch.transfer.outcomes and store.held):
            await turns(1)
        leaving, staying = (client, server) if gone == "client" else (server, client)
        leaving.connection.close(BROKEN)
        async with asyncio.timeout(60):
            await staying.over.wait()
        await turns()
        assert leaving.closed == [BROKEN]
        assert [type(reason) for reason in staying.closed] == [TransportError]
        assert len(fetch.replies) == len(put.replies) == 1
        assert (store.lent, store.held, put.transfer.idle) == (0, 0, True)
        fetch.check()

    run_on(loop, main())


def test_stranger_gets_last_words_and_the_end(loop: str) -> None:
    async def main() -> None:
        pair = Pair(Store(100))
        near, far = socket.socketpair()
        with near:
            server = End(far, pair.server)
            near.setblocking(False)
            running = asyncio.get_running_loop()
            await running.sock_sendall(near, b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" * 10)
            await server.over.wait()
            said = b""
            with contextlib.suppress(ConnectionResetError):  # we had said more than was read
                while data := await running.sock_recv(near, 4096):
                    said += data
        assert sent_types(said) == [FrameType.ERROR]
        assert isinstance(server.closed[0], RemoteProtocolError)

    run_on(loop, main())


def test_mistake_in_one_connection_leaves_the_others_alone(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong() -> None:
        raise ValueError("a mistake")

    async def main() -> None:
        peers = []
        found = []
        for _ in range(3):
            near, far = socket.socketpair()
            peers.append(near)
            found.append(End(far, TalkingProtocol()))
        talks = [end.protocol for end in found]
        talks[1].at_frame = wrong  # type: ignore[attr-defined]
        for peer in peers:
            peer.send(ping(1))
        await found[1].over.wait()
        for peer in peers:
            with contextlib.suppress(BrokenPipeError):
                peer.send(ping(2))
        while not all(len(talks[at].frames) == 2 for at in (0, 2)):  # type: ignore[attr-defined]
            await turns(1)
        assert [len(end.closed) for end in found] == [0, 1, 0]
        for end, peer in zip(found, peers, strict=True):
            end.connection.close(BROKEN)
            peer.close()

    run_on(loop, main())
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_descriptor_that_is_used_again_belongs_to_its_new_owner(loop: str) -> None:
    """Closing unregisters before the number is free: the next connection gets the same."""

    async def main() -> None:
        for _ in range(20):
            near, far = socket.socketpair()
            end = End(far, TalkingProtocol())
            descriptor = end.connection.stream.fileno()
            near.send(ping(1))
            while not end.protocol.frames:  # type: ignore[attr-defined]
                await turns(1)
            # Readable at the moment of the close, and something is still to be flushed.
            near.send(ping(2))
            end.protocol.say(b"x")  # type: ignore[attr-defined]
            end.connection.close(BROKEN)
            replacement = os.dup(near.fileno())
            assert replacement == descriptor
            await turns()
            assert len(end.protocol.frames) == 1  # type: ignore[attr-defined]
            os.close(replacement)
            near.close()

    run_on(loop, main())
