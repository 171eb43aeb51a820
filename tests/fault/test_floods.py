"""Clients that misbehave: what they get, and that nobody else notices."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kvstore import loglimit
from kvstore.allowance import Allowance
from kvstore.checksum import short_checksum
from kvstore.endpoint import parse_endpoint
from kvstore.errors import LimitExceeded, TransportError
from kvstore.messages import (
    AckLevel,
    Channel,
    Empty,
    Error,
    ErrorCode,
    Fetch,
    FetchOutcome,
    Hello,
    Put,
    PutDone,
    PutOutcome,
    Role,
    Want,
    decode,
    encode,
)
from kvstore.serving import Server, ServerOptions
from kvstore.wire import HEADER_BYTES, FrameType, Header, decode_header
from kvstore_client.link import FETCHES_MAX
from tests.support.cluster import (
    BLOCK_BYTES,
    MIB,
    GatedSource,
    Node,
    chain,
    connected,
    contents,
    fetch_blocks,
    open_pool,
    room,
    serve,
    store_blocks,
    until,
)
from tests.support.frames import frame
from tests.support.peers import proxied

HELLO = Hello(
    version_min=1,
    version_max=1,
    node_id="raw",
    role=Role.CLIENT,
    session=bytes(16),
    channel=Channel.DATA,
)


class Raw:
    """A connection on which anything can be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read(self) -> tuple[Header, bytes]:
        """The next frame, without its payload."""
        header = decode_header(await self.reader.readexactly(HEADER_BYTES))
        metadata = await self.reader.readexactly(header.metadata_length)
        await self.reader.readexactly(header.payload_length)
        return header, metadata

    async def error(self) -> Error:
        """The next frame, which is an ERROR."""
        header, metadata = await self.read()
        assert header.type is FrameType.ERROR
        return decode(metadata, Error)

    async def ended(self) -> bytes:
        """Everything until the server closes."""
        try:
            return await self.reader.read(-1)
        except ConnectionError:
            return b""


@asynccontextmanager
async def raw(node: Node, hello: Hello | None = HELLO) -> AsyncIterator[Raw]:
    """A raw connection to a node, which has said hello."""
    reader, writer = await asyncio.open_connection("127.0.0.1", node.server.endpoints[0].port)
    found = Raw(reader, writer)
    try:
        if hello is not None:
            writer.write(frame(FrameType.HELLO, 0, hello))
            header, _ = await found.read()
            assert header.type is FrameType.WELCOME
        yield found
    finally:
        writer.transport.abort()


def altered(data: bytes, at: int, value: bytes) -> bytes:
    """A frame with another header field and a right header checksum."""
    head = bytearray(data[: HEADER_BYTES - 4])
    head[at : at + len(value)] = value
    return bytes(head) + short_checksum(head).to_bytes(4, "little") + data[HEADER_BYTES:]


PING = frame(FrameType.PING, 1, Empty())
PUT_DATA = frame(FrameType.DATA, 1, b"", b"x" * 100)
BAD: dict[str, Callable[[], bytes]] = {
    "another magic": lambda: b"HTTP" + PING[4:],
    "another version": lambda: altered(PING, 4, b"\x09"),
    "unknown type": lambda: altered(PING, 5, b"\xfe"),
    "unknown flags": lambda: altered(PING, 6, b"\x80\x00"),
    "metadata too long": lambda: altered(PING, 16, (1 << 31).to_bytes(4, "little")),
    "metadata a byte too long": lambda: altered(PING, 16, (MIB + 1).to_bytes(4, "little")),
    "payload too long": lambda: altered(PUT_DATA, 20, (MIB + 1).to_bytes(4, "little")),
    "payload where none belongs": lambda: altered(PING, 20, b"\x01\0\0\0"),
    "reserved": lambda: altered(PING, 36, b"\x01"),
    "header checksum": lambda: PING[:44] + bytes(4) + PING[48:],
    "metadata checksum": lambda: altered(PING, 32, b"\1\2\3\4"),
    "data for no put": lambda: PUT_DATA,
    "hello again": lambda: frame(FrameType.HELLO, 0, HELLO),
    "no request id": lambda: frame(FrameType.PING, 0, Empty()),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", BAD)
async def test_a_broken_frame_ends_its_connection_with_a_reason(name: str) -> None:
    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, chain(2))
        async with raw(nodes[0]) as peer:
            peer.writer.write(BAD[name]())
            error = await peer.error()
            assert error.code is ErrorCode.PROTOCOL
            assert error.message
            assert await peer.ended() == b""
        await until(lambda: nodes[0].counter("connections_broken") == 1)
        assert (await fetch_blocks(client, namespace, chain(2))).ok


@pytest.mark.asyncio
async def test_versions_that_do_not_meet() -> None:
    async with serve(1) as nodes, raw(nodes[0], None) as peer:
        hello = Hello(
            version_min=7,
            version_max=9,
            node_id="new",
            role=Role.CLIENT,
            session=bytes(16),
            channel=Channel.CONTROL,
        )
        peer.writer.write(frame(FrameType.HELLO, 0, hello))
        error = await peer.error()
        assert error.code is ErrorCode.VERSION
        assert "7 to 9" in error.message
        assert await peer.ended() == b""


@pytest.mark.asyncio
@pytest.mark.slow
async def test_garbage_on_fifty_connections_beside_a_client_at_work(seed: int) -> None:
    draws = random.Random(seed)
    keys = chain(20)

    def trash() -> bytes:
        kind = draws.randrange(5)
        if kind == 0:
            return draws.randbytes(draws.randrange(1, 5000))
        data = bytearray(frame(FrameType.HELLO, 0, HELLO) + PING + PUT_DATA)
        if kind == 1:
            return bytes(data[: draws.randrange(len(data))])
        if kind == 2:
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
            return bytes(data)
        if kind == 3:
            return bytes(data) + draws.randbytes(1000)
        return frame(FrameType.HELLO, 0, HELLO) + draws.choice(list(BAD.values()))()

    async with serve(1) as nodes, connected(nodes) as client:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        writers: list[asyncio.StreamWriter] = []
        try:
            for _ in range(50):
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", nodes[0].server.endpoints[0].port
                )
                writers.append(writer)
                writer.write(trash())
                if len(writers) % 5 == 0:
                    assert (await fetch_blocks(client, namespace, keys)).ok
            assert (await fetch_blocks(client, namespace, keys)).ok
            await until(lambda: nodes[0].counter("connections_broken") > 10)
        finally:
            for writer in writers:
                writer.transport.abort()
        await until(lambda: len(nodes[0].server.connections) == 3)
        assert (await fetch_blocks(client, namespace, keys)).ok


# --- limits --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_too_many_connections_are_refused_with_a_reason() -> None:
    keys = chain(2)
    async with serve(1, connections_max=4) as nodes, connected(nodes) as first:
        namespace = await open_pool(first)
        await store_blocks(first, namespace, keys)
        async with connected(nodes) as second:
            link = second.cluster._links[0]
            await until(lambda: isinstance(link.last_error, LimitExceeded))
            assert "limit is 4" in str(link.last_error)
            result = await fetch_blocks(second, await open_pool(second), keys)
            assert result.outcomes == [FetchOutcome.UNAVAILABLE] * 2
            assert "limit is 4" in str(result.errors[0])
            assert (await fetch_blocks(first, namespace, keys)).ok
            await first.close()
            # There is room now, and it comes by itself.
            await until(lambda: link.up)
            assert (await fetch_blocks(second, await open_pool(second), keys)).ok


@pytest.mark.asyncio
@pytest.mark.slow
async def test_many_requests_at_once_wait_their_turn() -> None:
    keys = chain(8)
    async with serve(1) as nodes, connected(nodes, deadline_s=60) as client:
        namespace = await open_pool(client)
        puts = [
            client.put(namespace, chain(4, start=10 * n), contents(chain(4, start=10 * n)))
            for n in range(300)
        ]
        assert all([(await put).ok for put in puts])
        # None is answered before the server has as many as it gets.
        gate, before = nodes[0].gate, nodes[0].counter("requests_fetch")
        gate.chunks_left = 0
        fetches = [client.fetch(namespace, keys[: 1 + n % 4], room(1 + n % 4)) for n in range(600)]
        await until(lambda: nodes[0].counter("requests_fetch") - before == FETCHES_MAX)
        gate.open()
        results = [await fetch for fetch in fetches]
        assert all(result.errors == [] for result in results)


@pytest.mark.asyncio
async def test_more_requests_than_a_connection_may_have_are_refused() -> None:
    async with serve(1) as nodes, connected(nodes) as client, raw(nodes[0]) as peer:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, chain(1))
        nodes[0].gate.chunks_left = 0
        ask = Fetch(namespace=namespace.id, keys=chain(1), layer_first=0, layer_last=3,
                    deadline_ms=60_000)  # fmt: skip
        for number in range(1, 258):
            peer.writer.write(frame(FrameType.FETCH, number, ask))
        error = await peer.error()
        assert error.code is ErrorCode.LIMIT
        assert "256" in error.message
        nodes[0].gate.open()
        assert (await peer.read())[0].type is FrameType.DATA


@pytest.mark.asyncio
async def test_a_flood_of_refusals_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loglimit, "LOG_LINES_BURST", 5)
    monkeypatch.setattr(loglimit, "LOG_LINES_PER_S", 0)
    async with serve(1) as nodes, raw(nodes[0]) as peer:
        caplog.set_level(logging.INFO, "kvstore.serving")
        for number in range(1, 301):
            peer.writer.write(frame(FrameType.SCRUB, number))
            assert (await peer.error()).code is ErrorCode.UNSUPPORTED
        assert nodes[0].counter("requests_refused_unsupported") == 300
        assert len(caplog.records) == 5
        caplog.clear()
        (lines,) = nodes[0].server._log_limit._lines.values()
        lines.allowance = Allowance(0, 1)  # as if time had passed
        peer.writer.write(frame(FrameType.SCRUB, 301))
        await peer.error()
        left_out, line = (record.getMessage() for record in caplog.records)
        assert left_out == "295 lines like the next one were left out"
        assert line.startswith("SCRUB from raw")


@pytest.mark.asyncio
async def test_requests_that_cannot_be_are_refused_and_the_connection_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serve(1) as nodes, connected(nodes) as client, raw(nodes[0]) as peer:
        namespace = await open_pool(client)
        good = {"namespace": namespace.id, "keys": chain(1), "deadline_ms": 1000}
        bad: list[tuple[FrameType, bytes, ErrorCode]] = [
            (FrameType.FETCH, b"\xc1", ErrorCode.PROTOCOL),
            (FrameType.FETCH, encode(Fetch(**{**good, "namespace": bytes(32)}, layer_first=0,
             layer_last=1)), ErrorCode.NAMESPACE),
            (FrameType.FETCH, encode(Fetch(**good, layer_first=0, layer_last=4)),
             ErrorCode.REFUSED),
            (FrameType.FETCH, encode(Fetch(**good, layer_first=2, layer_last=2)),
             ErrorCode.REFUSED),
            (FrameType.FETCH, encode(Fetch(**{**good, "keys": [b"short"]}, layer_first=0,
             layer_last=1)), ErrorCode.PROTOCOL),
            (FrameType.FETCH, encode(Fetch(**{**good, "keys": chain(4097)}, layer_first=0,
             layer_last=1)), ErrorCode.PROTOCOL),
            (FrameType.PUT, encode(Put(**good, checksums=bytes(23))), ErrorCode.LIMIT),
            (FrameType.PUT, encode(Put(**good, checksums=bytes(24),
             ack=AckLevel.SYNCED)), ErrorCode.UNSUPPORTED),
            (FrameType.SCRUB, b"", ErrorCode.UNSUPPORTED),
            (FrameType.WANT, b"", ErrorCode.UNSUPPORTED),
        ]  # fmt: skip
        caplog.set_level(logging.INFO, "kvstore.serving")
        for number, (type, metadata, code) in enumerate(bad, 1):
            peer.writer.write(frame(type, number, metadata))
            header, answer = await peer.read()
            assert (header.type, header.request_id) == (FrameType.ERROR, number)
            error = decode(answer, Error)
            assert error.code is code, (number, error)
            # Each has a line in the log that says who and why, and a counter.
            line = caplog.records[-1].getMessage()
            assert line.startswith(f"{type.name} from raw (127.0.0.1:"), line
            assert line.endswith(f"refused: {error.message}")
        assert len(caplog.records) == len(bad)
        assert nodes[0].counter("requests_refused") == len(bad)
        for code, count in Counter(code for _, _, code in bad).items():
            assert nodes[0].counter(f"requests_refused_{code}") == count
        peer.writer.write(PING)
        assert (await peer.read())[0].type is FrameType.PING


# --- those who do not read, do not send ----------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_reader_that_reads_nothing_stops_nobody() -> None:
    keys = chain(32)
    async with (
        serve(1, arena_bytes=64 * MIB) as nodes,
        proxied(nodes[0].uri) as proxy,
        connected(proxy.uri) as slow,
        connected(nodes) as good,
    ):
        namespace = await open_pool(good, MIB)
        await store_blocks(good, namespace, keys)
        assert (await open_pool(slow, MIB)).id == namespace.id
        proxy.hold("down")
        into = room(32, MIB)
        handle = slow.fetch(namespace, keys, into, deadline_s=600)
        pins = nodes[0].store.index.pins
        await until(lambda: any(pins[1:]))
        for _ in range(3):
            assert (await fetch_blocks(good, namespace, keys)).ok
        # It keeps no more of the arena than a window.
        await until(lambda: sum(pins[1:]) <= 4)
        assert not handle.poll()
        proxy.let_go()
        assert (await handle).ok
        assert into == contents(keys, MIB)


@pytest.mark.asyncio
@pytest.mark.slow
async def test_those_who_say_nothing_and_those_who_stall_are_closed() -> None:
    async with (
        serve(1, hello_timeout_s=0.1, stall_timeout_s=0.1, arena_bytes=16 * MIB) as nodes,
        connected(nodes) as client,
        raw(nodes[0], None) as silent,
        raw(nodes[0]) as half,
        raw(nodes[0]) as deaf,
    ):
        namespace = await open_pool(client, MIB)
        await store_blocks(client, namespace, chain(8))
        half.writer.write(PING[:20])
        ask = Fetch(namespace=namespace.id, keys=chain(8), layer_first=0, layer_last=1,
                    deadline_ms=600_000)  # fmt: skip
        deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for number in range(1, 5):
            deaf.writer.write(frame(FrameType.FETCH, number, ask))
        await until(lambda: len(nodes[0].server.connections) == 3)
        assert await silent.ended() == b""
        assert await half.ended() == b""
        assert nodes[0].counter("connections_stalled") == 2
        assert not any(nodes[0].store.index.pins[1:])
        assert (await fetch_blocks(client, namespace, chain(8))).ok


@pytest.mark.asyncio
@pytest.mark.slow
async def test_who_reads_nothing_is_closed_however_much_it_says() -> None:
    async with (
        serve(1, stall_timeout_s=0.2, arena_bytes=16 * MIB) as nodes,
        connected(nodes) as client,
        raw(nodes[0]) as deaf,
    ):
        namespace = await open_pool(client, MIB)
        await store_blocks(client, namespace, chain(8))
        ask = Fetch(namespace=namespace.id, keys=chain(8), layer_first=0, layer_last=1,
                    deadline_ms=600_000)  # fmt: skip
        deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for number in range(1, 5):
            deaf.writer.write(frame(FrameType.FETCH, number, ask))

        def still_there() -> bool:
            deaf.writer.write(PING)
            return len(nodes[0].server.connections) > 3

        await until(lambda: not still_there())
        assert nodes[0].counter("connections_stalled") == 1
        assert not any(nodes[0].store.index.pins[1:])


@pytest.mark.asyncio
async def test_a_connection_that_says_much_before_hello_gets_no_memory() -> None:
    async with serve(1) as nodes, raw(nodes[0], None) as peer:
        peer.writer.write(frame(FrameType.HELLO, 0, bytes(MIB))[:HEADER_BYTES])
        error = await peer.error()
        assert error.code is ErrorCode.PROTOCOL
        assert "metadata of 1048576 bytes" in error.message
        assert await peer.ended() == b""


@pytest.mark.asyncio
async def test_the_reason_of_a_close_is_read_although_more_was_said() -> None:
    """A close with input unread resets the connection, and the reset overtakes the reason."""
    async with serve(1) as nodes, raw(nodes[0]) as peer:
        peer.writer.write(b"x" * HEADER_BYTES + bytes(32 * MIB))
        await peer.writer.drain()
        assert (await peer.error()).code is ErrorCode.PROTOCOL
        assert await peer.ended() == b""


@pytest.mark.asyncio
async def test_a_server_that_cannot_start_leaves_nothing_behind() -> None:
    async with serve(1) as nodes:
        source = GatedSource(memoryview(bytearray(MIB)))
        taken = parse_endpoint(nodes[0].uri)
        free = parse_endpoint("tcp://127.0.0.1:0")
        server = Server(source, [free, taken], ServerOptions(node_id="late"))
        with pytest.raises(TransportError, match="listen on"):
            await server.start()
        timer = server.reporter._timer
        assert timer is None or timer.cancelled()
        await server.stop(0)


@pytest.mark.asyncio
async def test_bytes_that_nobody_asked_for_touch_no_block() -> None:
    keys = chain(2)
    async with serve(1) as nodes, connected(nodes) as client, raw(nodes[0]) as peer:
        namespace = await open_pool(client)
        await store_blocks(client, namespace, keys)
        announce = Put(
            namespace=namespace.id,
            keys=chain(2, start=50),
            checksums=bytes(2 * 24),
            deadline_ms=60_000,
        )
        peer.writer.write(frame(FrameType.PUT, 1, announce))
        header, metadata = await peer.read()
        assert header.type is FrameType.WANT
        assert decode(metadata, Want).indices == (0, 1)
        # Wrong bytes: refused for that block. Beyond the block: the connection ends.
        peer.writer.write(frame(FrameType.DATA, 1, b"", b"x" * BLOCK_BYTES))
        peer.writer.write(frame(FrameType.DATA, 1, b"", b"y" * BLOCK_BYTES, 1))
        header, metadata = await peer.read()
        assert header.type is FrameType.PUT_DONE
        assert decode(metadata, PutDone).outcomes == bytes([PutOutcome.CORRUPT] * 2)
        peer.writer.write(frame(FrameType.PUT, 2, announce))
        assert (await peer.read())[0].type is FrameType.WANT
        peer.writer.write(frame(FrameType.DATA, 2, b"", b"z" * (BLOCK_BYTES + 1), 1))
        assert (await peer.error()).code is ErrorCode.PROTOCOL
        await until(lambda: nodes[0].store.index.reserved_count == 0)
        assert (await fetch_blocks(client, namespace, keys)).ok
        assert nodes[0].stored_count() == 2
