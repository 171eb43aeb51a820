"""Unix sockets keep the contract of transports, by path and by abstract name; and what
becomes of the file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.endpoint import Endpoint
from kvstore.errors import ConfigError, TransportError
from kvstore.transport import connect, listen
from tests.contract.transport_suite import SocketTransportTests, accepting, receive, send
from tests.support.loops import LOOPS, run_on, turns


@contextlib.contextmanager
def full(endpoint: Endpoint) -> Iterator[socket.socket]:
    """A listener that does not accept, with as many connections as it holds."""
    path = endpoint.path
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(address)
        yield listener


class Unix(SocketTransportTests):
    """Unix stream sockets."""

    @contextlib.contextmanager
    def full_backlog(self, endpoint: Endpoint) -> Iterator[Endpoint]:
        with full(endpoint):
            yield endpoint

    def test_connection_waits_for_room_in_a_full_backlog(
        self, loop: str, endpoint: Endpoint
    ) -> None:
        async def main(listener: socket.socket) -> None:
            task = asyncio.create_task(connect(asyncio.get_running_loop(), endpoint, 20.0))
            await turns()
            assert not task.done()
            with listener.accept()[0]:
                stream = await task
            with listener.accept()[0] as far:
                await send(stream, b"arrived")
                assert far.recv(7) == b"arrived"
            stream.close()

        with full(endpoint) as listener:
            run_on(loop, main(listener))


class TestPath(Unix):
    """By path."""

    @pytest.fixture
    def endpoint(self, tmp_path: Path) -> Endpoint:
        return Endpoint("unix", path=str(tmp_path / "socket"))


class TestAbstract(Unix):
    """By a name in the abstract namespace."""

    @pytest.fixture
    def endpoint(self, tmp_path: Path) -> Endpoint:
        # Unique on the machine: abstract names have no directory.
        return Endpoint("unix", path=f"@kvstore-test-{os.getpid()}-{tmp_path.name}")


# --- the file ------------------------------------------------------------------------------


@pytest.fixture(params=list(LOOPS))
def loop(request: pytest.FixtureRequest) -> str:
    """Name of the event loop."""
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the socket shall be."""
    return tmp_path / "socket"


@pytest.fixture
def endpoint(path: Path) -> Endpoint:
    """Where to listen."""
    return Endpoint("unix", path=str(path))


def leave_stale_socket(path: Path) -> None:
    """What a process leaves that was killed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()


def test_file_is_removed_at_close(path: Path, endpoint: Endpoint) -> None:
    listener = listen(endpoint)
    assert path.is_socket()
    listener.close()
    assert not path.exists()


def test_file_that_is_gone_already_is_no_error(path: Path, endpoint: Endpoint) -> None:
    listener = listen(endpoint)
    path.unlink()
    listener.close()


def test_stale_socket_is_replaced(loop: str, path: Path, endpoint: Endpoint) -> None:
    async def main() -> None:
        async with accepting(endpoint) as found:
            near, far = await found.pair()
            await send(near, b"x")
            assert await receive(far, 1) == b"x"
            near.close()
            far.close()

    leave_stale_socket(path)
    run_on(loop, main())
    assert not path.exists()


def test_live_socket_is_left_alone(path: Path, endpoint: Endpoint) -> None:
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        owner.listen()
        before = path.stat().st_ino
        with pytest.raises(TransportError, match=f"listen on unix://{path}: .*in use"):
            listen(endpoint)
        assert path.stat().st_ino == before


def test_live_socket_that_takes_no_connection_is_left_alone_and_not_waited_for(
    path: Path, endpoint: Endpoint
) -> None:
    with full(endpoint):
        before = path.stat().st_ino
        with pytest.raises(TransportError, match="in use"):
            listen(endpoint)
        assert path.stat().st_ino == before


@pytest.mark.parametrize("kind", ["file", "directory", "link to nowhere"])
def test_what_is_no_socket_is_left_alone(path: Path, endpoint: Endpoint, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.parent / "nowhere")
    before = path.lstat()
    with pytest.raises(TransportError, match="in use"):
        listen(endpoint)
    assert path.lstat() == before


def test_file_of_another_listener_stays_at_close(path: Path, endpoint: Endpoint) -> None:
    first = listen(endpoint)
    path.unlink()  # as an operator may, who believes it to be stale
    second = listen(endpoint)
    first.close()
    assert path.is_socket()
    second.close()
    assert not path.exists()


def test_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    endpoint = Endpoint("unix", path=str(tmp_path / "none" / "socket"))
    with pytest.raises(TransportError, match=rf"listen on unix://{tmp_path}/none/socket: "):
        listen(endpoint)


# --- schemes -------------------------------------------------------------------------------


def test_scheme_without_a_transport_is_refused(loop: str) -> None:
    endpoint = Endpoint("quic", "127.0.0.1", 7450)

    async def main() -> None:
        with pytest.raises(ConfigError, match="scheme must be one of"):
            await connect(asyncio.get_running_loop(), endpoint)

    run_on(loop, main())
    with pytest.raises(ConfigError, match="scheme must be one of"):
        listen(endpoint)
