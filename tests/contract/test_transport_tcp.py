"""TCP keeps the contract of transports, by IPv4, IPv6 and name; and what only TCP has."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import TransportError, TransportTimeout
from kvstore.transport import connect, listen
from tests.contract.transport_suite import (
    SocketTransportTests,
    accepting,
    connected,
    descriptors,
    readable,
)
from tests.support.loops import LOOPS, run_on

Found = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int]]


@functools.cache
def ipv6_missing() -> str:
    """Why there is no IPv6 here; empty if there is."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return ""
    except OSError as error:
        return f"no IPv6 on loopback here: {error}"


@contextlib.contextmanager
def full(family: socket.AddressFamily, host: str, port: int = 0) -> Iterator[Endpoint]:
    """A listener that never accepts, with as many connections as it holds."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, port), family=family, backlog=0))
        address = listener.getsockname()
        # Linux holds one more than the backlog says; what comes then is not answered.
        stack.enter_context(socket.create_connection(address[:2]))
        yield Endpoint("tcp", host, address[1])


class Tcp(SocketTransportTests):
    """TCP on an address of loopback."""

    family = socket.AF_INET
    host = "127.0.0.1"

    @pytest.fixture
    def endpoint(self, tmp_path: Path) -> Endpoint:
        return parse_endpoint(f"tcp://{self.host}:0")

    def full_backlog(self, endpoint: Endpoint) -> contextlib.AbstractContextManager[Endpoint]:
        return full(self.family, self.host.strip("[]"))

    def test_system_chooses_the_port(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with accepting(endpoint) as one, accepting(endpoint) as other:
                assert one.endpoint.port != other.endpoint.port
                assert 0 not in (one.endpoint.port, other.endpoint.port)
                assert one.endpoint.host == endpoint.host

        run_on(loop, main())

    def test_streams_send_at_once_and_notice_dead_hosts(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            async with connected(endpoint) as ends:
                for stream in ends:
                    with socket.socket(fileno=stream.fileno()) as sock:
                        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 10
                        sock.detach()

        run_on(loop, main())

    def test_reset_is_an_error_of_ours(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, far):
                with socket.socket(fileno=far.fileno()) as sock:
                    # Closing with a linger time of 0 sends a reset; see socket(7).
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    sock.detach()
                far.close()
                await readable(near)
                with pytest.raises(TransportError, match="reset by peer") as caught:
                    near.receive_into([memoryview(bytearray(1))])
                assert isinstance(caught.value.__cause__, ConnectionResetError)

        run_on(loop, main())

    def test_peer_is_named_as_endpoints_are(self, loop: str, endpoint: Endpoint) -> None:
        async def main() -> None:
            async with connected(endpoint) as (near, far):
                with socket.socket(fileno=near.fileno()) as sock:
                    port = sock.getsockname()[1]
                    sock.detach()
                numeric = self.host.replace("localhost", "127.0.0.1")
                assert far.peer == f"{numeric}:{port}"

        run_on(loop, main())

    def test_address_can_be_listened_on_again_right_after_connections(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main() -> None:
            async with accepting(endpoint) as found:
                near, far = await found.pair()
                # Who closes first keeps the address for a minute (TIME_WAIT).
                far.close()
                await readable(near)
                near.close()
            listen(found.endpoint).close()

        run_on(loop, main())


class TestIPv4(Tcp):
    """By IPv4."""


class TestIPv6(Tcp):
    """By IPv6."""

    family = socket.AF_INET6
    host = "[::1]"

    @pytest.fixture(autouse=True)
    def there(self) -> None:
        """Skip where there is none."""
        if missing := ipv6_missing():
            pytest.skip(missing)


class TestLocalhost(Tcp):
    """By name."""

    host = "localhost"


# --- names ---------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Addresses that names stand for, to be filled by a test; asyncio asks here."""
    known: dict[str, list[str]] = {}

    def getaddrinfo(host: str, port: int, *args: int, **options: int) -> list[Found]:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


def test_all_addresses_of_a_name_are_tried(names: dict[str, list[str]]) -> None:
    async def main() -> None:
        names["store"] = ["127.0.0.1"]
        names["127.0.0.1"] = ["127.0.0.1"]
        async with accepting(parse_endpoint("tcp://127.0.0.1:0")) as found:
            port = found.endpoint.port
            names["store"] = ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
            before = descriptors()
            stream = await connect(asyncio.get_running_loop(), Endpoint("tcp", "store", port))
            far = await found.streams.get()
            assert len(descriptors() - before) == 2, "sockets of failed attempts are left"
            assert stream.peer == f"tcp://store:{port}"
            stream.close()
            far.close()

    run_on("asyncio", main())


def test_address_that_does_not_answer_leaves_time_for_the_next(
    names: dict[str, list[str]],
) -> None:
    async def main() -> None:
        names["127.0.0.1"] = ["127.0.0.1"]
        async with accepting(parse_endpoint("tcp://127.0.0.1:0")) as found:
            port = found.endpoint.port
            names["127.0.0.2"] = ["127.0.0.2"]
            names["store"] = ["127.0.0.2", "127.0.0.1"]
            with full(socket.AF_INET, "127.0.0.2", port):
                loop = asyncio.get_running_loop()
                stream = await connect(loop, Endpoint("tcp", "store", port), 0.4)
            stream.close()
            (await found.streams.get()).close()

    run_on("asyncio", main())


def test_last_address_decides_what_went_wrong(names: dict[str, list[str]]) -> None:
    async def main() -> None:
        names["127.0.0.2"] = ["127.0.0.2"]
        with full(socket.AF_INET, "127.0.0.2") as blocked:
            names["store"] = ["127.0.0.1", "127.0.0.2"]
            endpoint = Endpoint("tcp", "store", blocked.port)
            with pytest.raises(TransportTimeout, match="tcp://store"):
                await connect(asyncio.get_running_loop(), endpoint, 0.05)
            names["store"] = ["127.0.0.1"]
            with pytest.raises(TransportError, match="Errno 111"):
                await connect(asyncio.get_running_loop(), endpoint, 5.0)

    run_on("asyncio", main())


def test_name_that_nobody_knows_is_an_error_of_ours(names: dict[str, list[str]]) -> None:
    endpoint = parse_endpoint("tcp://nowhere:7450")

    async def main() -> None:
        with pytest.raises(TransportError, match=r"tcp://nowhere:7450: .*not known"):
            await connect(asyncio.get_running_loop(), endpoint)

    run_on("asyncio", main())
    with pytest.raises(TransportError, match=r"listen on tcp://nowhere:7450: .*not known"):
        listen(endpoint)


@pytest.mark.parametrize("loop", LOOPS)
def test_name_that_no_host_can_have_is_an_error_of_ours(loop: str) -> None:
    endpoint = parse_endpoint(f"tcp://{'a' * 64}.example:7450")

    async def main() -> None:
        with pytest.raises(TransportError, match="label"):
            await connect(asyncio.get_running_loop(), endpoint)

    run_on(loop, main())
    with pytest.raises(TransportError, match="label"):
        listen(endpoint)


def test_name_with_two_families_is_listened_on_by_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, *args: int, **options: int) -> list[object]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    listener = listen(parse_endpoint("tcp://store:0"))
    monkeypatch.undo()
    with socket.create_connection(("127.0.0.1", listener.endpoint.port)):
        listener.close()


def test_address_that_is_not_ours_is_named() -> None:
    # From the range for documentation (RFC 5737); binding sends nothing.
    with pytest.raises(TransportError, match=r"listen on tcp://192\.0\.2\.1:7450: .*assign"):
        listen(parse_endpoint("tcp://192.0.2.1:7450"))
