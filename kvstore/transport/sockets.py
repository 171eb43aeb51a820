"""TCP and unix-domain stream sockets behind the transport seam."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Sequence

from kvstore.endpoint import Endpoint
from kvstore.errors import TransportError, TransportTimeout
from kvstore.transport.base import Buffer, Listener, Stream

logger = logging.getLogger(__name__)

# Connections that the kernel completes while the loop is busy; a restarted daemon is met by
# all its clients at once.
LISTEN_BACKLOG = 1024
# How long to leave a listener alone when the process has no descriptor for a new connection.
ACCEPT_PAUSE_S = 0.2
# A peer host that died without a word is noticed after about 10 + 3 * 5 seconds.
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3

_DESCRIPTOR_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class SocketStream(Stream):
    """A connected stream socket."""

    def __init__(self, sock: socket.socket, transport: str, peer: str) -> None:
        sock.setblocking(False)
        if transport == "tcp":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        self._sock = sock
        self.transport = transport
        self.peer = peer

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive_into(self, buffers: Sequence[memoryview]) -> int:
        try:
            return self._sock.recvmsg_into(buffers)[0]
        except BlockingIOError:
            raise
        except OSError as error:
            raise TransportError(f"receive from {self.peer}: {error}") from error

    def send(self, buffers: Sequence[Buffer]) -> int:
        try:
            return self._sock.sendmsg(buffers)
        except BlockingIOError:
            raise
        except OSError as error:
            raise TransportError(f"send to {self.peer}: {error}") from error

    def close(self) -> None:
        self._sock.close()


def _address(endpoint: Endpoint) -> tuple[socket.AddressFamily, tuple[str, int] | str]:
    if endpoint.scheme == "unix":
        # An abstract name is written with "@" and begins with a zero byte for the kernel.
        path = endpoint.path
        return socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    return family, (endpoint.host, endpoint.port)


async def connect_socket(
    loop: asyncio.AbstractEventLoop, endpoint: Endpoint, timeout_s: float
) -> SocketStream:
    """Connect a stream socket. Raises as `kvstore.transport.connect` says."""
    family, address = _address(endpoint)
    try:
        async with asyncio.timeout(timeout_s):
            if endpoint.scheme == "tcp":
                found = await loop.getaddrinfo(
                    endpoint.host, endpoint.port, type=socket.SOCK_STREAM
                )
                family, address = found[0][0], found[0][4]  # type: ignore[assignment]
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.setblocking(False)
                await loop.sock_connect(sock, address)
            except BaseException:
                sock.close()
                raise
    except TimeoutError as error:
        raise TransportTimeout(f"connect to {endpoint}: no answer in {timeout_s} s") from error
    except OSError as error:
        raise TransportError(f"connect to {endpoint}: {error}") from error
    return SocketStream(sock, endpoint.scheme, str(endpoint))


class SocketListener(Listener):
    """A bound and listening stream socket."""

    def __init__(self, endpoint: Endpoint) -> None:
        family, address = _address(endpoint)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if endpoint.scheme == "unix":
                _remove_stale_socket(endpoint.path)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(LISTEN_BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            raise TransportError(f"listen on {endpoint}: {error}") from error
        self._sock = sock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_stream: Callable[[Stream], None] | None = None
        self.endpoint = endpoint
        if endpoint.scheme == "tcp":
            self.endpoint = endpoint.with_port(sock.getsockname()[1])

    def start(self, loop: asyncio.AbstractEventLoop, on_stream: Callable[[Stream], None]) -> None:
        self._loop = loop
        self._on_stream = on_stream
        loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        if self.endpoint.scheme == "unix" and not self.endpoint.path.startswith("@"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.endpoint.path)

    def _accept(self) -> None:
        assert self._loop is not None
        assert self._on_stream is not None
        for _ in range(LISTEN_BACKLOG):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _DESCRIPTOR_SHORTAGE:
                    # The connection stays in the backlog and would wake us in a busy loop.
                    logger.error("cannot accept on %s: %s", self.endpoint, error)
                    self._loop.remove_reader(self._sock.fileno())
                    self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
                    return
                logger.info("accept on %s: %s", self.endpoint, error)
                continue
            peer = f"{address[0]}:{address[1]}" if self.endpoint.scheme == "tcp" else "unix peer"
            self._on_stream(SocketStream(sock, self.endpoint.scheme, peer))

    def _resume(self) -> None:
        if self._loop is not None and self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)


def _remove_stale_socket(path: str) -> None:
    """Remove a socket file that no process listens on any more; leave anything else."""
    if path.startswith("@"):
        return
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return
