"""The network interface that relays send by: which one it is, and what it has sent.

What sysfs says is not asked: in a network namespace it may show the host's interfaces, and the
speed that it claims is none that a virtual or a rate-limited link has.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

from kvstore.errors import ConfigError

# Of this process's network namespace, unlike /sys/class/net: proc_pid_net(5).
COUNTERS_PATH = "/proc/self/net/dev"
# The kernel gives about a page a call, 30 interfaces. A host with 10,000 of them has 1.3 MB.
READ_BYTES = 64 * 1024
READS_MAX = 1024
# Columns after the name: eight of what was received, then what was sent, bytes first.
_TX_BYTES_COLUMN = 8

# Of linux/netlink.h, rtnetlink.h and if_addr.h; rtnetlink(7) has the messages.
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERROR = struct.Struct("=i")  # its number, negative
_ALIGNMENT = 4
# Dumps come in messages of at most 32 KiB (netlink_dump in net/netlink/af_netlink.c).
_ANSWER_BYTES = 64 * 1024
# The kernel answers at once; this is for a kernel that does not.
_ANSWER_S = 1.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class InterfaceCounter:
    """The counter of the bytes that an interface has sent.

    Args:
        name: Of the interface, as `ip link` shows it.

    Raises:
        ConfigError: There is no such interface.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._label = f"{name}:".encode()
        try:
            self._descriptor = os.open(COUNTERS_PATH, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError("interface", name, f"its counters cannot be read: {error}") from error
        if self.tx_bytes() is None:
            self.close()
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError("interface", name, f"there is none of this name; there are {known}")

    def tx_bytes(self) -> int | None:
        """Bytes that it has sent; None while there is no such interface.

        Some 20 us, with tens of interfaces some more: the kernel counts all of them up.
        """
        text = b""
        try:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            for _ in range(READS_MAX):
                part = os.read(self._descriptor, READ_BYTES)
                whole, _, text = (text + part).rpartition(b"\n")
                for line in whole.split(b"\n"):
                    if line.lstrip().startswith(self._label):
                        return int(line.rpartition(b":")[2].split()[_TX_BYTES_COLUMN])
                if not part:
                    break
        except OSError:
            return None
        return None

    def close(self) -> None:
        """Release the descriptor. Closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def interface_of(host: str) -> str:
    """Name of the interface that a local address belongs to.

    Args:
        host: As in the endpoint of a listener; of a name with both kinds of address, the IPv4
            one counts, as for listening. Asks the resolver where it is a name: for start-up.

    Raises:
        ConfigError: It belongs to none, or to all.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)
        *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        wanted = ipaddress.ip_address(str(address[0]).partition("%")[0])
        scope = address[3] if len(address) == 4 else 0  # of IPv6: which link it is on
        if wanted.is_unspecified:
            remedy = "is every interface; name the one that relays send by"
            raise ConfigError("interface", host, remedy)
        for index, local, prefix_length in _local_addresses():
            network = ipaddress.ip_network((local, prefix_length), strict=False)
            # All of 127.0.0.0/8 is local, although one address of it is assigned.
            ours = wanted in network if wanted.is_loopback else wanted == local
            if ours and scope in (0, index):
                return socket.if_indextoname(index)
    except (OSError, UnicodeError) as error:
        raise ConfigError("interface", host, f"cannot be found: {error}") from error
    raise ConfigError("interface", host, "no interface of this host has this address")


def _local_addresses() -> Iterator[tuple[int, Address, int]]:
    """Index of the interface, address and prefix length, for all addresses of this namespace.

    From netlink, because SIOCGIFADDR knows one address an interface, and of IPv4.
    """
    request = _MESSAGE.pack(
        _MESSAGE.size + _ADDRESS.size, _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0
    ) + _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    kinds = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kinds, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_ANSWER_S)
        netlink.sendto(request, (0, 0))
        for _ in range(READS_MAX):
            answer = netlink.recv(_ANSWER_BYTES)
            for kind, body in _messages(answer):
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    number = -_ERROR.unpack_from(body)[0]
                    raise OSError(number, os.strerror(number))
                if kind == _RTM_NEWADDR and (entry := _address(body)) is not None:
                    yield entry


def _messages(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each message."""
    at = 0
    while at + _MESSAGE.size <= len(answer):
        length, kind, *_ = _MESSAGE.unpack_from(answer, at)
        if length < _MESSAGE.size:
            return
        yield kind, answer[at + _MESSAGE.size : at + length]
        at += _aligned(length)


def _address(body: bytes) -> tuple[int, Address, int] | None:
    """Of one message about an address."""
    family, prefix_length, _, _, index = _ADDRESS.unpack_from(body)
    found: dict[int, bytes] = {}
    at = _ADDRESS.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = body[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)
    # Of a link between two points, IFA_ADDRESS is the other end; IPv6 has often no IFA_LOCAL.
    packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if packed is None or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    return index, ipaddress.ip_address(packed), prefix_length


def _aligned(length: int) -> int:
    return (length + _ALIGNMENT - 1) & ~(_ALIGNMENT - 1)
