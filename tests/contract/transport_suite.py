"""The contract of a transport: what `Stream`, `Listener`, `connect` and `listen` promise.

A transport joins with a subclass of `TransportTests` that says where to listen; those made of
sockets take `SocketTransportTests`. Every test runs on both event loops.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from kvstore.endpoint import Endpoint
from kvstore.errors import TransportError, TransportTimeout
from kvstore.framing import BUFFERS_PER_CALL_MAX
from kvstore.transport import Listener, Stream, connect, listen
from kvstore.transport.base import Buffer
from tests.support.loops import LOOPS, run_on, turns
from tests.support.tree import ROOT

# More than the kernel holds for a peer that does not read: 4 MiB at the sender and 32 MiB
# at the receiver with usual settings.
FLOOD_BYTES = 64 * 1024 * 1024


def descriptors() -> set[str]:
    """What every open descriptor of this process leads to, epoll and the like left out."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{entry}"))
    return {name for name in found if name.startswith("socket:")}


class Accepting:
    """A listener that has started, and the streams it has yielded."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.endpoint = listener.endpoint
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()

    async def pair(self) -> tuple[Stream, Stream]:
        """A new connection: the end that connected, and the one that was accepted."""
        near = await connect(asyncio.get_running_loop(), self.endpoint)
        return near, await self.streams.get()


@contextlib.asynccontextmanager
async def accepting(endpoint: Endpoint) -> AsyncIterator[Accepting]:
    """Listen for as long as the block lasts."""
    found = Accepting(listen(endpoint))
    found.listener.start(asyncio.get_running_loop(), found.streams.put_nowait)
    try:
        yield found
    finally:
        found.listener.close()


@contextlib.asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[tuple[Stream, Stream]]:
    """Two ends of one connection, closed at the end."""
    async with accepting(endpoint) as found:
        near, far = await found.pair()
        try:
            yield near, far
        finally:
            near.close()
            far.close()


async def readable(stream: Stream) -> None:
    """Wait until the loop says that a stream can be received from."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(stream.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(stream.fileno())


async def writable(stream: Stream) -> None:
    """Wait until the loop says that a stream can be sent to."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(stream.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(stream.fileno())


async def receive(stream: Stream, count: int) -> bytes:
    """Exactly `count` bytes, or what comes before the end of the stream."""
    target = memoryview(bytearray(count))
    at = 0
    while at < count:
        try:
            got = stream.receive_into([target[at:]])
        except BlockingIOError:
            await readable(stream)
            continue
        if not got:
            break
        at += got
    return bytes(target[:at])


async def send(stream: Stream, data: Buffer) -> None:
    """All of `data`."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[stream.send([rest]) :]
        except BlockingIOError:
            await writable(stream)


def fill(stream: Stream, data: memoryview) -> int:
    """Send until the transport takes no more; how much it took."""
    sent = 0
    while sent < len(data):
        try:
            count = stream.send([data[sent : sent + 1024 * 1024]])
        except BlockingIOError:
            return sent
        assert count > 0
        sent += count
    raise AssertionError(f"a peer that does not read took {sent} bytes")


def pattern(count: int) -> memoryview:
    """Bytes of which no two places look alike for 251 bytes on."""
    return memoryview((bytes(range(251)) * (count // 251 + 1))[:count])


class TransportTests(abc.ABC):
    """What every transport promises."""

    @pytest.fixture(params=list(LOOPS))
    def loop(self, request: pytest.FixtureRequest) -> str:
        """Name of the event loop."""
        return str(request.param)

    @pytest.fixture
    @abc.abstractmethod
    def endpoint(self, tmp_path: Path) -> Endpoint:
        """Where to listen."""

    # --- a stream --------------------------------------------------------------------------

    def test_carries_bytes_both_ways(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, far):
                await send(near, b"request")
                assert await receive(far, 7) == b"request"
                await send(far, b"reply")
                assert await receive(near, 5) == b"reply"

        run_on(loop, main())

    def test_says_what_it_is(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with accepting(endpoint) as found:
                near, far = await found.pair()
                assert near.transport == far.transport == endpoint.scheme
                assert near.peer == str(found.endpoint)
                assert far.peer
                assert min(near.fileno(), far.fileno()) >= 0
                near.close()
                far.close()

        run_on(loop, main())

    def test_descriptors_do_not_reach_programs_that_are_started(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            async with connected(endpoint) as ends:
                assert not any(os.get_inheritable(stream.fileno()) for stream in ends)

        run_on(loop, main())

    def test_nothing_to_receive_is_told_and_not_waited_for(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, _):
                for _ in range(3):
                    with pytest.raises(BlockingIOError):
                        near.receive_into([memoryview(bytearray(10))])

        run_on(loop, main())

    def test_gathers_and_scatters_in_order(self, loop: str, endpoint: Endpoint) -> None:
        parts: list[Buffer] = [b"a", bytearray(b"bc"), b"", memoryview(b"defg")[1:3], b"h" * 3]

        async def main() -> None:
            async with connected(endpoint) as (near, far):
                assert near.send(parts) == 8
                await readable(far)
                memory = bytearray(12)
                view = memoryview(memory)
                assert far.receive_into([view[8:10], view[:5], view[5:8]]) == 8
                assert bytes(memory) == b"cefhhh\0\0ab\0\0"

        run_on(loop, main())

    def test_one_call_takes_as_many_buffers_as_a_writer_offers(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        data = pattern(3 * BUFFERS_PER_CALL_MAX)

        async def main() -> None:
            async with connected(endpoint) as (near, far):
                assert near.send(_cut(data, 3)) == len(data)
                target = memoryview(bytearray(len(data)))
                at = 0
                while at < len(data):
                    await readable(far)
                    at += far.receive_into(_cut(target[at:], 3))
                assert target == data

        run_on(loop, main())

    def test_peer_that_does_not_read_stops_the_sender_and_loses_nothing(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        data = pattern(FLOOD_BYTES)

        async def main() -> None:
            async with connected(endpoint) as (near, far):
                sent = fill(near, data)
                with pytest.raises(BlockingIOError):
                    near.send([b"more"])
                assert await receive(far, sent) == data[:sent]
                with pytest.raises(BlockingIOError):
                    far.receive_into([memoryview(bytearray(1))])
                await writable(near)
                assert near.send([b"more"]) == 4
                assert await receive(far, 4) == b"more"

        run_on(loop, main())

    def test_memory_that_was_sent_may_be_used_again(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, far):
                memory = bytearray(pattern(1024 * 1024))
                expected = bytes(memory)
                sent = near.send([memory])
                memory[:sent] = bytes(sent)
                assert await receive(far, sent) == expected[:sent]

        run_on(loop, main())

    # --- its end ---------------------------------------------------------------------------

    def test_end_comes_after_all_bytes_and_stays(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, far):
                await send(near, b"last words")
                near.close()
                assert await receive(far, 100) == b"last words"
                for _ in range(2):
                    await readable(far)
                    assert far.receive_into([memoryview(bytearray(10))]) == 0

        run_on(loop, main())

    def test_closing_gives_the_descriptor_back_at_once_and_again_is_harmless(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, _):
                descriptor = near.fileno()
                near.close()
                near.close()
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(descriptor)

        run_on(loop, main())

    def test_closed_stream_is_broken(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, _):
                near.close()
                with pytest.raises(TransportError, match=near.peer.replace("[", r"\[")):
                    near.send([b"x"])
                with pytest.raises(TransportError, match="Bad file descriptor"):
                    near.receive_into([memoryview(bytearray(1))])

        run_on(loop, main())

    def test_sending_to_a_peer_that_has_gone_is_an_error_of_ours(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, far):
                far.close()
                error = await _send_until_it_fails(near)
                assert isinstance(error.__cause__, OSError)
                assert near.peer in str(error)

        run_on(loop, main())

    def test_loop_tells_of_a_peer_that_went_with_our_bytes_unread(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        """A reset, where the transport has one: the loop must not keep that to itself."""

        async def main() -> None:
            async with connected(endpoint) as (near, far):
                await send(near, b"unread")
                await readable(far)
                far.close()
                await readable(near)
                with contextlib.suppress(TransportError):
                    assert near.receive_into([memoryview(bytearray(10))]) == 0

        run_on(loop, main())

    def test_stream_with_unread_bytes_can_be_closed(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with accepting(endpoint) as found:
                near, far = await found.pair()
                await send(near, b"unread")
                await readable(far)
                far.close()
                near.close()
                again, other = await found.pair()
                await send(again, b"x")
                assert await receive(other, 1) == b"x"
                again.close()
                other.close()

        run_on(loop, main())

    # --- connecting ------------------------------------------------------------------------

    def test_many_connect_at_once(self, loop: str, endpoint: Endpoint) -> None:
        async def echo(stream: Stream) -> None:
            await send(stream, await receive(stream, 4))
            stream.close()

        async def ask(found: Accepting, number: int) -> None:
            stream = await connect(asyncio.get_running_loop(), found.endpoint, 5.0)
            await send(stream, number.to_bytes(4, "little"))
            assert await receive(stream, 4) == number.to_bytes(4, "little")
            stream.close()

        async def main() -> None:
            async with accepting(endpoint) as found, asyncio.TaskGroup() as group:
                for number in range(64):
                    group.create_task(ask(found, number))
                for _ in range(64):
                    group.create_task(echo(await found.streams.get()))

        before = descriptors()
        run_on(loop, main())
        assert descriptors() <= before

    def test_connection_of_before_the_start_waits_for_it(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            listener = listen(endpoint)
            running = asyncio.get_running_loop()
            near = await connect(running, listener.endpoint)
            streams: asyncio.Queue[Stream] = asyncio.Queue()
            listener.start(running, streams.put_nowait)
            (await streams.get()).close()
            near.close()
            listener.close()

        run_on(loop, main())

    def test_refused_connection_is_no_timeout_and_leaves_nothing(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            listener = listen(endpoint)
            listener.close()
            with pytest.raises(TransportError) as caught:
                await connect(asyncio.get_running_loop(), listener.endpoint)
            assert not isinstance(caught.value, TransportTimeout)
            assert str(listener.endpoint) in str(caught.value)
            assert isinstance(caught.value.__cause__, OSError)

        before = descriptors()
        run_on(loop, main())
        assert descriptors() <= before

    # --- listening -------------------------------------------------------------------------

    def test_address_in_use_is_named_and_its_owner_goes_on(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            async with accepting(endpoint) as found:
                before = descriptors()
                with pytest.raises(TransportError) as caught:
                    listen(found.endpoint)
                assert str(found.endpoint) in str(caught.value)
                assert "in use" in str(caught.value)
                assert before <= descriptors()
                near = await connect(asyncio.get_running_loop(), found.endpoint)
                await send(near, b"x")
                # The transport may have called before, to see whether the owner lives.
                while await receive(far := await found.streams.get(), 1) != b"x":
                    far.close()
                near.close()
                far.close()

        run_on(loop, main())

    def test_closed_listener_lets_its_streams_live_and_its_address_go(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            async with accepting(endpoint) as found:
                near, far = await found.pair()
                found.listener.close()
                found.listener.close()
                await send(near, b"x")
                assert await receive(far, 1) == b"x"
                async with accepting(found.endpoint) as again:
                    assert again.endpoint == found.endpoint
                    for stream in await again.pair():
                        stream.close()
                near.close()
                far.close()

        run_on(loop, main())

    def test_listener_may_be_closed_before_it_has_started(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            listener = listen(endpoint)
            listener.close()
            listen(listener.endpoint).close()

        run_on(loop, main())

    def test_listener_may_be_closed_by_the_one_it_gives_a_stream_to(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            running = asyncio.get_running_loop()
            listener = listen(endpoint)
            # Two are waiting when the first is accepted.
            ends = [await connect(running, listener.endpoint) for _ in range(2)]
            accepted: list[Stream] = []

            def take(stream: Stream) -> None:
                accepted.append(stream)
                listener.close()

            listener.start(running, take)
            await readable(ends[1])  # reset or ended, with the listener
            assert len(accepted) == 1
            for stream in [*ends, *accepted]:
                stream.close()

        run_on(loop, main())


async def _send_until_it_fails(stream: Stream) -> TransportError:
    """What sending to a peer that has gone comes to. The first bytes may still be taken: the
    news of the close is on its way."""
    for _ in range(1000):
        try:
            stream.send([b"x" * 1000])
        except TransportError as error:
            return error
        await turns(1)
    raise AssertionError("a closed peer takes bytes for ever")


def _cut(view: memoryview, size: int) -> Sequence[memoryview]:
    """Pieces of a view, at most as many as go into one call."""
    last = min(len(view), size * BUFFERS_PER_CALL_MAX)
    return [view[at : at + size] for at in range(0, last, size)]


class SocketTransportTests(TransportTests):
    """What is true of transports made of sockets."""

    @abc.abstractmethod
    def full_backlog(self, endpoint: Endpoint) -> contextlib.AbstractContextManager[Endpoint]:
        """Someone listens, and takes no connection any more; gives the address."""

    def test_peer_that_does_not_accept_is_a_timeout_and_leaves_nothing(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main(full: Endpoint) -> None:
            with pytest.raises(TransportTimeout) as caught:
                await connect(asyncio.get_running_loop(), full, 0.03)
            assert str(full) in str(caught.value)
            assert "0.03 s" in str(caught.value)

        with self.full_backlog(endpoint) as full:
            before = descriptors()
            run_on(loop, main(full))
            assert descriptors() <= before

    def test_connecting_can_be_cancelled_and_leaves_nothing(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main(full: Endpoint) -> None:
            task = asyncio.create_task(connect(asyncio.get_running_loop(), full, 3600.0))
            await turns()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        with self.full_backlog(endpoint) as full:
            before = descriptors()
            run_on(loop, main(full))
            assert descriptors() <= before

    @pytest.mark.slow
    def test_listener_without_descriptors_pauses_and_goes_on(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        program = [sys.executable, "-m", "tests.support.accept_shortage", loop, str(endpoint)]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["paused", "closed", "resumed"]
