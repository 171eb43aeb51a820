"""What a marking makes of the sockets: from the first packet on, on both ends, in both families."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import ConfigError
from kvstore.transport import RELAY_MARKING, Listener, Marking, Stream, connect, listen
from tests.contract.test_transport_tcp import ipv6_missing
from tests.contract.transport_suite import descriptors, fill, receive, send
from tests.support.loops import LOOPS, run_on

# No value that a socket has by itself, nor one that the kernel derives from the other.
NEAR = Marking(priority=5, dscp=10)
FAR = Marking(priority=3, dscp=46)
PLAIN = Marking(priority=0, dscp=0)
# Of linux/tcp.h: keep the headers of what opens a connection, and give them.
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28
MIB = 1024 * 1024

FAMILIES = {
    "IPv4": ("tcp://127.0.0.1:0", "127.0.0.1"),
    "IPv6": ("tcp://[::1]:0", "::1"),
    "IPv4 at a listener of IPv6": ("tcp://[::]:0", "127.0.0.1"),
}


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    """Name of the event loop."""
    return str(request.param)


@pytest.fixture(params=list(FAMILIES))
def addresses(request: pytest.FixtureRequest) -> tuple[Endpoint, str]:
    """Where to listen, and by which host to connect to it."""
    uri, host = FAMILIES[request.param]
    missing = ipv6_missing() if "[" in uri else ""
    if not missing and uri == "tcp://[::]:0":
        with socket.socket(socket.AF_INET6) as sock:
            if sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                missing = "sockets of IPv6 take no IPv4 here (net.ipv6.bindv6only)"
    if missing:
        pytest.skip(missing)
    return parse_endpoint(uri), host


@contextmanager
def socket_of(descriptor: int) -> Iterator[socket.socket]:
    """A socket that stays with its owner."""
    sock = socket.socket(fileno=descriptor)
    try:
        yield sock
    finally:
        sock.detach()


def mark_of(stream: Stream) -> Marking:
    """What the kernel marks the packets of a stream with."""
    with socket_of(stream.fileno()) as sock:
        tos = sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS)
        if sock.family == socket.AF_INET6 and not sock.getpeername()[0].startswith("::ffff:"):
            tos = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
        assert tos & 0b11 == 0, "the bits of congestion notification are not ours"
        return Marking(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY), tos >> 2)


def first_packet_dscp(stream: Stream) -> int:
    """DSCP of the packet with which the peer has opened the connection."""
    with socket_of(stream.fileno()) as sock:
        packet = sock.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 256)
    if packet[0] >> 4 == 4:
        return packet[1] >> 2
    assert packet[0] >> 4 == 6
    return (packet[0] & 0xF) << 2 | packet[1] >> 6


async def pair(
    listener: Listener, host: str, marking: Marking | None = None
) -> tuple[Stream, Stream]:
    """Both ends of a new connection."""
    running = asyncio.get_running_loop()
    accepted: asyncio.Queue[Stream] = asyncio.Queue()
    listener.start(running, accepted.put_nowait)
    endpoint = listener.endpoint
    if endpoint.scheme == "tcp":
        endpoint = Endpoint("tcp", host, endpoint.port)
    if marking is None:
        near = await connect(running, endpoint)
    else:
        near = await connect(running, endpoint, marking=marking)
    return near, await accepted.get()


def test_each_end_carries_its_own_marking(loop: str, addresses: tuple[Endpoint, str]) -> None:
    endpoint, host = addresses

    async def main() -> None:
        listener = listen(endpoint, FAR)
        near, far = await pair(listener, host, NEAR)
        assert (mark_of(near), mark_of(far)) == (NEAR, FAR)
        await send(near, b"request")
        assert await receive(far, 7) == b"request"
        await send(far, b"reply")
        assert await receive(near, 5) == b"reply"
        # What has come from the peer changes nothing.
        assert (mark_of(near), mark_of(far)) == (NEAR, FAR)
        for closing in (near, far, listener):
            closing.close()

    run_on(loop, main())


def test_first_packet_is_marked(addresses: tuple[Endpoint, str]) -> None:
    endpoint, host = addresses

    async def main() -> None:
        listener = listen(endpoint)
        with socket_of(listener._sock.fileno()) as sock:  # type: ignore[attr-defined]
            sock.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
        near, far = await pair(listener, host, RELAY_MARKING)
        assert first_packet_dscp(far) == RELAY_MARKING.dscp
        for closing in (near, far, listener):
            closing.close()

    run_on("asyncio", main())


def test_listener_marks_every_stream_that_it_accepts(loop: str) -> None:
    async def main() -> None:
        running = asyncio.get_running_loop()
        accepted: asyncio.Queue[Stream] = asyncio.Queue()
        listener = listen(parse_endpoint("tcp://127.0.0.1:0"), RELAY_MARKING)
        listener.start(running, accepted.put_nowait)
        for _ in range(3):
            near = await connect(running, listener.endpoint)
            far = await accepted.get()
            assert (mark_of(near), mark_of(far)) == (PLAIN, RELAY_MARKING)
            near.close()
            far.close()
        listener.close()

    run_on(loop, main())


def test_listener_that_answers_with_its_peers_mark_sets_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with net.ipv4.tcp_reflect_tos, which only a privileged test could set."""
    accept = socket.socket.accept

    def reflecting(listener: socket.socket) -> tuple[socket.socket, object]:
        sock, address = accept(listener)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, NEAR.dscp << 2)
        return sock, address

    monkeypatch.setattr(socket.socket, "accept", reflecting)

    async def main() -> None:
        listener = listen(parse_endpoint("tcp://127.0.0.1:0"), FAR)
        near, far = await pair(listener, "127.0.0.1", NEAR)
        assert mark_of(far) == FAR
        for closing in (near, far, listener):
            closing.close()

    run_on("asyncio", main())


def test_without_a_marking_nothing_is_set(loop: str) -> None:
    async def main() -> None:
        listener = listen(parse_endpoint("tcp://127.0.0.1:0"))
        near, far = await pair(listener, "127.0.0.1")
        assert mark_of(near) == mark_of(far) == PLAIN
        for closing in (near, far, listener):
            closing.close()

    run_on(loop, main())


def test_unix_sockets_ignore_it(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        listener = listen(Endpoint("unix", path=str(tmp_path / "socket")), FAR)
        near, far = await pair(listener, "", NEAR)
        await send(near, b"request")
        assert await receive(far, 7) == b"request"
        for stream in (near, far):
            with socket_of(stream.fileno()) as sock:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 0
        for closing in (near, far, listener):
            closing.close()

    run_on(loop, main())


# --- what the system refuses ---------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, level: int, name: int) -> None:
    """Have the system refuse one option."""
    allowed = socket.socket.setsockopt

    def setsockopt(sock: socket.socket, *option: int) -> None:
        if option[:2] == (level, name):
            raise PermissionError(1, "Operation not permitted")
        allowed(sock, *option)

    monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)


@pytest.mark.parametrize(
    ("level", "name", "named"),
    [
        (socket.IPPROTO_IP, socket.IP_TOS, r"^dscp=10: the system refuses it: .*not permitted"),
        (socket.SOL_SOCKET, socket.SO_PRIORITY, r"^priority=5: the system refuses it: .*not perm"),
    ],
)
def test_refused_marking_names_the_option_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, level: int, name: int, named: str
) -> None:
    endpoint = parse_endpoint("tcp://127.0.0.1:0")

    async def main() -> None:
        before = descriptors()
        with pytest.raises(ConfigError, match=named):
            listen(endpoint, NEAR)
        with socket.create_server(("127.0.0.1", 0)) as server:
            there = Endpoint("tcp", "127.0.0.1", server.getsockname()[1])
            with pytest.raises(ConfigError, match=named) as caught:
                await connect(asyncio.get_running_loop(), there, marking=NEAR)
            assert isinstance(caught.value.__cause__, PermissionError)
        assert descriptors() <= before

    refuse(monkeypatch, level, name)
    run_on("asyncio", main())


def test_refusal_at_one_stream_is_logged_and_the_listener_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        running = asyncio.get_running_loop()
        accepted: asyncio.Queue[Stream] = asyncio.Queue()
        listener = listen(parse_endpoint("tcp://127.0.0.1:0"), FAR)
        listener.start(running, accepted.put_nowait)
        with monkeypatch.context() as refusing:
            refuse(refusing, socket.SOL_SOCKET, socket.SO_PRIORITY)
            near = await connect(running, listener.endpoint)
            assert await receive(near, 1) == b""
            near.close()
        assert accepted.empty()
        near = await connect(running, listener.endpoint)
        far = await accepted.get()
        assert mark_of(far) == FAR
        for closing in (near, far, listener):
            closing.close()

    run_on("asyncio", main())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "priority=3" in caplog.text


# --- what has not left yet -----------------------------------------------------------------


def test_bytes_that_wait_in_the_host_are_told_from_those_that_have_left(loop: str) -> None:
    async def main() -> None:
        listener = listen(parse_endpoint("tcp://127.0.0.1:0"))
        near, far = await pair(listener, "127.0.0.1")
        await send(near, b"request")
        assert await receive(far, 7) == b"request"
        assert near.unsent_bytes() == 0
        # A peer that does not read: its window fills, and the rest waits.
        taken = fill(near, memoryview(bytes(64 * MIB)))
        assert 0 < near.unsent_bytes() <= taken
        near.close()
        assert near.unsent_bytes() == 0
        far.close()
        listener.close()

    run_on(loop, main())


def test_unix_sockets_have_nothing_that_waits_for_a_network(loop: str, tmp_path: Path) -> None:
    async def main() -> None:
        listener = listen(Endpoint("unix", path=str(tmp_path / "socket")))
        near, far = await pair(listener, "")
        fill(near, memoryview(bytes(64 * MIB)))
        assert near.unsent_bytes() == 0
        for closing in (near, far, listener):
            closing.close()

    run_on(loop, main())
