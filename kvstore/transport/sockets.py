"""TCP and unix-domain stream sockets behind the transport seam."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from kvstore.endpoint import Endpoint
from kvstore.errors import ConfigError, TransportError, TransportTimeout, Unsupported
from kvstore.transport.base import Buffer, Listener, Stream
from kvstore.transport.marking import Marking

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

# How long until a full backlog of a unix socket is tried again; nothing tells of room there.
BACKLOG_RETRY_S = 0.01

# Of linux/sockios.h: bytes in the send queue of a TCP socket that were never sent; those that
# wait for an acknowledgement are not counted.
_SIOCOUTQNSD = 0x894B
_INT = struct.Struct("i")

# Descriptors of a peer that wait to be taken. A request needs one; who sends more than a few
# ahead wants to use ours up.
DESCRIPTORS_WAITING_MAX = 16
_ANCILLARY_BYTES = socket.CMSG_SPACE(DESCRIPTORS_WAITING_MAX * _INT.size)
# SO_PEERCRED: process, user and group.
_CREDENTIALS = struct.Struct("iII")

# Plain numbers: arithmetic with enumerations costs a microsecond, on each receive.
_CTRUNC, _CLOEXEC = int(socket.MSG_CTRUNC), int(socket.MSG_CMSG_CLOEXEC)

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
        self._unix = transport == "unix"
        self._accepting = False
        # Descriptors that go out with the next bytes, and those that came and wait.
        self._outgoing: deque[int] = deque()
        self._incoming: deque[int] = deque()

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive_into(self, buffers: Sequence[memoryview]) -> int:
        try:
            if self._accepting:
                count, ancillary, flags, _ = self._sock.recvmsg_into(
                    buffers, _ANCILLARY_BYTES, _CLOEXEC
                )
                if ancillary or flags & _CTRUNC:
                    self._keep(ancillary, flags)
                return count
            return self._sock.recvmsg_into(buffers)[0]
        except BlockingIOError:
            raise
        except OSError as error:
            raise TransportError(f"receive from {self.peer}: {error}") from error

    def send(self, buffers: Sequence[Buffer]) -> int:
        try:
            if self._outgoing:
                return self._send_descriptors(buffers)
            return self._sock.sendmsg(buffers)
        except BlockingIOError:
            raise
        except OSError as error:
            raise TransportError(f"send to {self.peer}: {error}") from error

    def unsent_bytes(self) -> int:
        try:
            answer = fcntl.ioctl(self._sock.fileno(), _SIOCOUTQNSD, bytes(_INT.size))
        except (OSError, ValueError):
            return 0  # a unix socket, which has no network below it, or one that is closed
        return int(_INT.unpack(answer)[0])

    def send_descriptor(self, fd: int) -> None:
        if not self._unix:
            raise Unsupported(f"descriptors cannot be handed over by {self.transport}")
        try:
            self._outgoing.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0))
        except OSError as error:
            raise TransportError(f"descriptor {fd} for {self.peer}: {error}") from error

    def accept_descriptors(self) -> None:
        if not self._unix:
            raise Unsupported(f"descriptors cannot be handed over by {self.transport}")
        self._accepting = True

    def take_descriptor(self) -> int | None:
        return self._incoming.popleft() if self._incoming else None

    def peer_uid(self) -> int | None:
        if not self._unix:
            return None
        try:
            answer = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return None  # it is closed
        return int(_CREDENTIALS.unpack(answer)[1])

    def local_address(self) -> str:
        if self._unix:
            return ""
        try:
            return str(self._sock.getsockname()[0])
        except OSError:
            return ""  # it is closed

    def end_sending(self) -> None:
        with contextlib.suppress(OSError):  # the peer may be gone
            self._sock.shutdown(socket.SHUT_WR)

    def detach(self) -> int:
        fd = self._sock.detach()
        self.close()
        return fd

    def close(self) -> None:
        self._sock.close()
        for waiting in (self._outgoing, self._incoming):
            _close_all(waiting)
            waiting.clear()

    def _send_descriptors(self, buffers: Sequence[Buffer]) -> int:
        """Send, and with the first byte as many descriptors as the peer lets wait."""
        fds = list(self._outgoing)[:DESCRIPTORS_WAITING_MAX]
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        count = self._sock.sendmsg(buffers, [rights])
        if count:  # the kernel has them, also when it took a part of the bytes only
            for _ in fds:
                os.close(self._outgoing.popleft())
        return count

    def _keep(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        """Let what came wait to be taken.

        Raises:
            TransportError: There are too many, or the kernel dropped some; all that came now
                are closed.
        """
        came = [
            fd
            for level, kind, content in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for (fd,) in _INT.iter_unpack(content[: len(content) // _INT.size * _INT.size])
        ]
        if flags & _CTRUNC:
            _close_all(came)
            raise TransportError(
                f"{self.peer} sent more than {DESCRIPTORS_WAITING_MAX} descriptors at once,"
                " or this process can have no more"
            )
        if len(self._incoming) + len(came) > DESCRIPTORS_WAITING_MAX:
            _close_all(came)
            raise TransportError(
                f"{self.peer} sent descriptors that nothing asked for: more than"
                f" {DESCRIPTORS_WAITING_MAX} wait"
            )
        self._incoming.extend(came)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):  # what a peer's file says to its close is not ours
            os.close(fd)


def _transport(endpoint: Endpoint) -> str:
    """What the bytes of a stream travel by: RDMA is beside a stream of TCP."""
    return "unix" if endpoint.scheme == "unix" else "tcp"


def _unix_address(path: str) -> str:
    # An abstract name is written with "@" and begins with a zero byte for the kernel.
    return "\0" + path[1:] if path.startswith("@") else path


def _peer_name(endpoint: Endpoint, address: tuple[str, int]) -> str:
    if endpoint.scheme == "unix":
        return "unix peer"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _mark(sock: socket.socket, marking: Marking | None) -> None:
    """Have a TCP socket mark what it sends.

    Raises:
        ConfigError: The system refuses it.
    """
    if marking is None:
        return
    # The upper six bits of the byte that IPv4 calls type of service and IPv6 traffic class;
    # the kernel keeps the lower two, congestion notification, to itself.
    tos = marking.dscp << 2
    # A socket of IPv6 sends by IPv4 to mapped addresses, and has both. The priority comes
    # last: the kernel derives another from IP_TOS.
    options = [
        ("dscp", marking.dscp, socket.IPPROTO_IP, socket.IP_TOS, tos),
        ("priority", marking.priority, socket.SOL_SOCKET, socket.SO_PRIORITY, marking.priority),
    ]
    if sock.family == socket.AF_INET6:
        ipv6 = socket.IPPROTO_IPV6
        options.insert(0, ("dscp", marking.dscp, ipv6, socket.IPV6_TCLASS, tos))
    for option, value, level, name, number in options:
        try:
            sock.setsockopt(level, name, number)
        except OSError as error:
            raise ConfigError(option, value, f"the system refuses it: {error}") from error


async def connect_socket(
    loop: asyncio.AbstractEventLoop,
    endpoint: Endpoint,
    timeout_s: float,
    marking: Marking | None = None,
) -> SocketStream:
    """Connect a stream socket. Raises as `kvstore.transport.connect` says."""
    try:
        async with asyncio.timeout(timeout_s):
            if endpoint.scheme == "unix":
                sock = await _connect_unix(_unix_address(endpoint.path))
            else:
                sock = await _connect_tcp(loop, endpoint, loop.time() + timeout_s, marking)
    except TimeoutError as error:
        raise TransportTimeout(f"connect to {endpoint}: no answer in {timeout_s:g} s") from error
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have this name
        raise TransportError(f"connect to {endpoint}: {error}") from error
    return SocketStream(sock, _transport(endpoint), str(endpoint))


async def _connect_tcp(
    loop: asyncio.AbstractEventLoop, endpoint: Endpoint, deadline: float, marking: Marking | None
) -> socket.socket:
    """Try all addresses of a host: "localhost" has two, and a peer may listen on one."""
    found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    failure = OSError(f"{endpoint.host} has no address")
    for position, (family, _, _, _, address) in enumerate(found):
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            _mark(sock, marking)
            # An address that does not answer leaves time for the next.
            share_s = (deadline - loop.time()) / (len(found) - position)
            async with asyncio.timeout(share_s):
                await loop.sock_connect(sock, address)
        except OSError as error:  # TimeoutError is one, too
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


async def _connect_unix(address: str) -> socket.socket:
    """Connect, or wait for room in the backlog.

    Not by `sock_connect` of the loop: a full backlog is EAGAIN here and never completes by
    itself (connect(2)), which loops take for a connection in progress, and then for one that
    is made.
    """
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            sock.connect(address)
        except BlockingIOError:
            sock.close()
            await asyncio.sleep(BACKLOG_RETRY_S)
        except BaseException:
            sock.close()
            raise
        else:
            return sock


def _bind(endpoint: Endpoint, marking: Marking | None) -> socket.socket:
    """A bound and listening socket.

    Raises:
        ConfigError: The system refuses the marking.
        OSError, UnicodeError: The address is taken, not ours, or no address.
    """
    family = socket.AF_UNIX
    address: tuple[str | int, ...] | tuple[int, bytes] | str
    if endpoint.scheme == "unix":
        address = _unix_address(endpoint.path)
    else:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        # Of a name with both, IPv4: that is what clients that know one of them know.
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if endpoint.scheme == "unix":
            _remove_stale_socket(endpoint.path)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _mark(sock, marking)  # for the answers to who connects, which the kernel gives
        sock.bind(address)
        sock.listen(LISTEN_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class SocketListener(Listener):
    """A bound and listening stream socket."""

    def __init__(self, endpoint: Endpoint, marking: Marking | None = None) -> None:
        try:
            sock = _bind(endpoint, marking)
        except (OSError, UnicodeError) as error:
            hint = "; its directory must exist" if isinstance(error, FileNotFoundError) else ""
            raise TransportError(f"listen on {endpoint}: {error}{hint}") from error
        self._sock = sock
        self._marking = marking if endpoint.scheme != "unix" else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_stream: Callable[[Stream], None] | None = None
        self.endpoint = endpoint
        self._file = _file_id(endpoint)
        if endpoint.scheme != "unix":
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
        # Whoever has replaced the file meanwhile keeps theirs. Asked before the close, after
        # which another file may get this one's number.
        ours = self._file is not None and self._file == _file_id(self.endpoint)
        self._sock.close()
        if ours:
            with contextlib.suppress(OSError):
                os.unlink(self.endpoint.path)

    def _accept(self) -> None:
        assert self._loop is not None
        assert self._on_stream is not None
        for _ in range(LISTEN_BACKLOG):
            if self._sock.fileno() < 0:
                return  # closed by whom the last stream was given to
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
            try:
                # Not left to what the listener bequeaths: where the host mirrors its peers
                # (net.ipv4.tcp_reflect_tos) it is the peer's mark.
                _mark(sock, self._marking)
            except ConfigError as error:
                logger.error("cannot accept on %s: %s", self.endpoint, error)
                sock.close()
                continue
            peer = _peer_name(self.endpoint, address)
            self._on_stream(SocketStream(sock, _transport(self.endpoint), peer))

    def _resume(self) -> None:
        if self._loop is not None and self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)


def _file_id(endpoint: Endpoint) -> tuple[int, int] | None:
    """What tells the socket's file from another of the same name; None if there is none."""
    if endpoint.scheme != "unix" or endpoint.path.startswith("@"):
        return None
    try:
        found = os.lstat(endpoint.path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
        # A full backlog is a sign of life, and not to be waited for.
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return
