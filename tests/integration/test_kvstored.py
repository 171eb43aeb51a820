"""The command `kvstored` as a process: start, serve, stop, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import stat
from pathlib import Path

import pytest

from kvstore.messages import (
    Channel,
    Empty,
    FetchOutcome,
    Goaway,
    Pool,
    PoolAction,
    PutOutcome,
    Role,
    encode,
)
from kvstore.protocol import hello_message
from kvstore.wire import HEADER_BYTES, FrameType, encode_header
from kvstore_client import AsyncClient
from tests.support.engine import content, key, layout
from tests.support.processes import Daemon, daemon, failed_start
from tests.support.rawpeer import RawPeer

# Each test starts at least one process.
pytestmark = pytest.mark.slow

MIB = 1024 * 1024
LAYERS = (1000, 3000, 96)
BIG = layout(MIB)
# What the kernel keeps for a reader that does not read is small beside a fetch of this many.
BIG_COUNT = 32
RECEIVE_BUFFER_BYTES = 64 * 1024


def fill(peer: RawPeer, count: int = BIG_COUNT) -> tuple[bytes, list[bytes]]:
    """Put blocks of 1 MiB; their namespace and keys."""
    namespace = peer.open_namespace(BIG)
    keys = [key(number) for number in range(count)]
    for first in range(0, count, 32):
        part = keys[first : first + 32]
        done = peer.put(namespace, BIG, part, [content(name, MIB) for name in part])
        assert set(done.outcomes) == {PutOutcome.STORED}
    return namespace, keys


def ping(uri: str) -> None:
    with RawPeer(uri) as peer:
        assert peer.call(FrameType.PING, Empty()) == Empty()


async def put_and_fetch(uri: str) -> None:
    size, keys = sum(LAYERS), [key(number) for number in range(70)]
    blocks = [content(name, size) for name in keys]
    async with AsyncClient(uri) as client:
        namespace = await client.open_namespace("pool", layout(*LAYERS))
        stored = await client.put(namespace, keys, blocks)
        assert set(stored.outcomes) <= {PutOutcome.STORED, PutOutcome.EXISTS}
        found = await client.lookup(namespace, keys, lease_s=10.0)
        assert found.prefix == len(keys)
        buffers = [bytearray(size) for _ in keys]
        handle = client.fetch(namespace, keys, buffers)
        result = await handle
        await handle.quiesced()
        assert set(result.outcomes) == {FetchOutcome.HIT}
        assert buffers == blocks


# --- serving -----------------------------------------------------------------------------------


def test_serves_on_all_its_listeners(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listen = ("--listen", "tcp://127.0.0.1:0", "--listen", f"unix://{path}")
    with daemon(*listen, "--node-id", "kv-1", listeners=2) as kvstored:
        assert kvstored.uris[1] == f"unix://{path}"
        assert "node kv-1, arena of 16MiB" in kvstored.log
        for uri in kvstored.uris:
            asyncio.run(put_and_fetch(uri), debug=True)
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert not path.exists()


def test_pools_have_the_capacity_that_was_given() -> None:
    options = ("--pool-capacity", "small=64KiB", "--pool-capacity", "large=1M")
    with daemon(*options) as kvstored, RawPeer(kvstored.uri) as peer:
        reply = peer.call(FrameType.POOL, Pool(action=PoolAction.LIST))
        capacities = {pool.pool: pool.capacity_bytes for pool in reply.pools}
        assert capacities == {"small": 64 * 1024, "large": MIB}


def test_the_journal_gets_no_second_time() -> None:
    with daemon(environment={"JOURNAL_STREAM": "8:1"}) as kvstored:
        assert f"kvstored: listening on {kvstored.uri}" in kvstored.lines


def test_garbage_hurts_nobody_else() -> None:
    draw = random.Random(1)
    hello = encode(hello_message("x", Role.CLIENT, bytes(16), Channel.DATA))
    greeting = encode_header(FrameType.HELLO, 0, hello) + hello
    evil = hello_message("evil\nkvstored: listening on x", Role.CLIENT, bytes(16), Channel.DATA)
    evil_greeting = encode_header(FrameType.HELLO, 0, encode(evil)) + encode(evil)
    inputs = [
        draw.randbytes(MIB),
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 4,
        bytes(HEADER_BYTES),
        b"\xff" * HEADER_BYTES,
        greeting + draw.randbytes(1000),
        greeting + greeting,
        evil_greeting + bytes(HEADER_BYTES),
    ]
    with daemon() as kvstored, RawPeer(kvstored.uri) as bystander:
        for data in inputs:
            with RawPeer(kvstored.uri, greet=False) as peer:
                try:
                    peer.sock.sendall(data)
                except (ConnectionResetError, BrokenPipeError):
                    pass  # it has heard enough
                peer.rest()
            assert bystander.call(FrameType.PING, Empty()) == Empty()
        with RawPeer(kvstored.uri, greet=False) as peer:
            peer.sock.sendall(greeting[: HEADER_BYTES + 3])
        asyncio.run(put_and_fetch(kvstored.uri), debug=True)
        kvstored.wait_for_line("dropped")
        assert len(kvstored.uris) == 1, "a peer wrote into the log"
        assert "evil\\nkvstored" in kvstored.log


def test_readers_that_read_nothing_cost_little_memory() -> None:
    # A quarter of it is 80 MiB: room for the process, and not for a copy of 1 MiB a reader.
    arena_bytes, reader_count = 320 * MIB, 64
    with daemon("--memory", str(arena_bytes)) as kvstored, RawPeer(kvstored.uri) as control:
        namespace, keys = fill(control, 64)
        readers: list[RawPeer] = []
        try:
            for _ in range(reader_count):
                readers.append(RawPeer(kvstored.uri, RECEIVE_BUFFER_BYTES))
                readers[-1].ask_for(namespace, BIG, keys)
            fetches = 0
            for _ in range(100_000):
                status = control.call(FrameType.STATUS, Empty())
                fetches = status.counters.get("requests_fetch", 0)
                if fetches == reader_count:
                    break
            assert fetches == reader_count
            # Each reply comes a turn of the loop after the one before.
            for _ in range(100):
                control.call(FrameType.PING, Empty())
            used = kvstored.resident_bytes_max()
            print(f"{used / MIB:.0f} MiB with an arena of {arena_bytes / MIB:.0f} MiB")
            assert arena_bytes < used <= arena_bytes * 1.25
        finally:
            for reader in readers:
                reader.sock.close()


# --- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_an_idle_daemon(number: signal.Signals) -> None:
    with daemon() as kvstored, RawPeer(kvstored.uri) as peer:
        kvstored.signal(number)
        assert peer.receive().header.type is FrameType.GOAWAY
        assert peer.rest() == b""
        assert kvstored.wait() == 0
        assert kvstored.lines[-1].endswith("kvstored: stopped")


def test_a_signal_while_memory_is_touched_ends_the_daemon() -> None:
    kvstored = Daemon("--listen", "tcp://127.0.0.1:0", "--memory", "512MiB")
    try:
        kvstored.wait_for_line("touching 512MiB")
        kvstored.signal(signal.SIGTERM)
        assert kvstored.wait() == 0
        # A machine may be fast enough to serve before the signal arrives.
        assert "SIGTERM while starting" in kvstored.log or "stopped" in kvstored.log
    finally:
        kvstored.close()


def test_a_stop_lets_a_slow_fetch_finish() -> None:
    with daemon("--memory", "64MiB") as kvstored:
        with RawPeer(kvstored.uri, RECEIVE_BUFFER_BYTES) as peer:
            namespace, keys = fill(peer)
            peer.ask_for(namespace, BIG, keys)
            payload = bytearray(peer.receive().payload)
            kvstored.signal(signal.SIGTERM)
            assert "1 requests are under way" in kvstored.wait_for_line("under way")
            while not isinstance((frame := peer.receive()).message, Goaway):
                payload += frame.payload
            assert len(payload) < BIG_COUNT * MIB
            with pytest.raises(ConnectionRefusedError):
                RawPeer(kvstored.uri)
            rest, outcomes = peer.take_fetch()
            assert payload + rest == b"".join(content(name, MIB) for name in keys)
            assert set(outcomes) == {FetchOutcome.HIT}
            assert peer.rest() == b""
        assert kvstored.wait() == 0


def test_a_second_signal_stops_at_once() -> None:
    with (
        daemon("--memory", "64MiB", "--drain", "3600") as kvstored,
        RawPeer(kvstored.uri, RECEIVE_BUFFER_BYTES) as peer,
    ):
        namespace, keys = fill(peer)
        peer.ask_for(namespace, BIG, keys)
        peer.receive()
        kvstored.signal(signal.SIGTERM)
        kvstored.wait_for_line("have 3600 s")
        kvstored.signal(signal.SIGTERM)
        assert kvstored.wait() == 0
        assert "kvstored: second signal" in kvstored.log
        assert len(peer.rest()) < BIG_COUNT * MIB


def test_a_stop_waits_no_longer_than_it_was_told() -> None:
    with (
        daemon("--memory", "64MiB", "--drain", "0.1") as kvstored,
        RawPeer(kvstored.uri, RECEIVE_BUFFER_BYTES) as peer,
    ):
        namespace, keys = fill(peer)
        peer.ask_for(namespace, BIG, keys)
        peer.receive()
        kvstored.signal(signal.SIGTERM)
        assert kvstored.wait() == 0
        assert "kvstored: second signal" not in kvstored.log
        assert len(peer.rest()) < BIG_COUNT * MIB


def test_the_socket_file_of_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with daemon("--listen", f"unix://{path}") as kvstored:
        kvstored.signal(signal.SIGKILL)
        assert kvstored.wait() == -signal.SIGKILL
    assert path.exists()
    with daemon("--listen", f"unix://{path}") as kvstored:
        ping(kvstored.uri)
    assert not path.exists()


# --- not starting ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_an_address_in_use_is_named(scheme: str, tmp_path: Path) -> None:
    listen = "tcp://127.0.0.1:0" if scheme == "tcp" else f"unix://{tmp_path / 's'}"
    with daemon("--listen", listen) as kvstored:
        status, lines = failed_start("--listen", kvstored.uri)
        assert status == 1
        (line,) = lines
        assert line.startswith(f"kvstored: error: listen on {kvstored.uri}: ")
        assert "Address already in use" in line
        ping(kvstored.uri)


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    status, lines = failed_start("--listen", f"unix://{path}")
    assert status == 1
    assert len(lines) == 1
    assert path.read_text() == "mine"


def test_listening_off_loopback_has_to_be_asked_for() -> None:
    # An address that no machine has (RFC 5737), so that nothing is ever opened.
    elsewhere = ("--listen", "tcp://192.0.2.1:0")
    status, lines = failed_start(*elsewhere)
    assert status == 2
    (line,) = lines
    assert line.startswith("kvstored: error: --listen=tcp://192.0.2.1:0: ")
    assert line.endswith("with --insecure")
    status, lines = failed_start(*elsewhere, "--insecure")
    assert status == 1
    assert lines[-1].startswith("kvstored: error: listen on tcp://192.0.2.1:0: ")


def test_memory_that_is_not_there_is_refused() -> None:
    status, lines = failed_start("--listen", "tcp://127.0.0.1:0", "--memory", "15TiB")
    assert status == 2
    (line,) = lines
    assert line.startswith("kvstored: error: --memory=15TiB: does not fit: ")


def test_nobody_is_served_by_a_daemon_that_did_not_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # The first address is free and must not stay bound.
        with daemon() as kvstored:
            free = kvstored.uri
        status, lines = failed_start("--listen", free, "--listen", f"tcp://127.0.0.1:{port}")
        assert status == 1
        assert f"127.0.0.1:{port}" in lines[-1]
        with pytest.raises(ConnectionRefusedError):
            RawPeer(free)
