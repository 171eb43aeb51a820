"""Endpoints: where a peer is, and by which transport it is reached.

::

    tcp://HOST:PORT                     HOST is a name, an IPv4 or a bracketed IPv6 address
    rdma://HOST:PORT?device=mlx5_0      as tcp, where RDMA is agreed upon; see below
    unix:///run/kvstored.sock           a path; unix://@name is in the abstract namespace

Options of rdma, all of them optional: `device` (several with commas, each with `:PORT` if wanted),
`gid_index`, `mtu`, `service_level`, `traffic_class`, `timeout`, `retry_count`; see
`kvstore.transport.rdma_options`. They are about this side only: who connects may write other
ones than who listens.

Port 0 lets the system choose one, which makes sense for listening only.
"""

from __future__ import annotations

import ipaddress
import re

import msgspec

from kvstore.errors import ConfigError

# Linux keeps 108 bytes for the path of a unix socket, one of them the final (abstract: the
# first) zero byte; see unix(7).
UNIX_PATH_BYTES_MAX = 107
HOST_BYTES_MAX = 253  # RFC 1035, section 2.3.4, without the final dot

_SHAPE = {
    "tcp": "tcp://HOST:PORT",
    "rdma": "rdma://HOST:PORT?device=NAME",
    "unix": "unix:///PATH or unix://@NAME",
}
_RDMA_OPTIONS = (
    "device",
    "gid_index",
    "mtu",
    "service_level",
    "traffic_class",
    "timeout",
    "retry_count",
)
_OPTIONS_ALLOWED = {"tcp": (), "rdma": _RDMA_OPTIONS, "unix": ()}
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
# An address may name its scope: fe80::1%eth0.
_IPV6_SHAPE = re.compile(r"[0-9a-fA-F:.]+(%[A-Za-z0-9_.-]+)?")
_OPTION_VALUE = re.compile(r"[A-Za-z0-9_.:,-]+")


class Endpoint(msgspec.Struct, frozen=True):
    """An address in its normal form; made by `parse_endpoint`.

    Attributes:
        scheme: "tcp", "rdma" or "unix"; names the transport.
        host: Host name or address, IPv6 without brackets; empty for unix.
        port: Port; 0 for unix, or when the system shall choose.
        path: unix only: an absolute path, or "@" and an abstract name.
        options: (name, value) pairs, sorted by name.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        query = "&".join(f"{name}={value}" for name, value in self.options)
        return f"{self.scheme}://{host}:{self.port}{'?' if query else ''}{query}"

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of the same host can reach it.

        Names other than localhost are not resolved and count as reachable from elsewhere.
        """
        if self.scheme == "unix" or self.host == "localhost":
            return True
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback)

    @property
    def place(self) -> str:
        """What tells it from others wherever names decide: RDMA is a way to it, and no other
        place."""
        if self.scheme != "rdma":
            return str(self)
        return str(Endpoint("tcp", self.host, self.port))

    def with_port(self, port: int) -> Endpoint:
        """The same endpoint with another port, as when the system has chosen one."""
        return msgspec.structs.replace(self, port=port)


def parse_endpoint(text: str, option: str = "endpoint") -> Endpoint:
    """Read an endpoint as an operator writes it.

    Args:
        text: The URI.
        option: Name of the option it came from, for the error.

    Raises:
        ConfigError: Names the option, the text and what would be right.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _SHAPE:
        raise ConfigError(option, text, f"must be one of {', '.join(_SHAPE.values())}")
    if scheme == "unix":
        return Endpoint(scheme, path=_unix_path(rest, text, option))
    address, _, query = rest.partition("?")
    host, separator, port_text = address.rpartition(":")
    if not separator or port_text.endswith("]"):
        raise ConfigError(option, text, f"needs a port: {_SHAPE[scheme]}")
    if not (port_text.isascii() and port_text.isdigit() and int(port_text) <= 0xFFFF):
        raise ConfigError(option, text, f"port {port_text!r} must be a number from 0 to 65535")
    return Endpoint(
        scheme,
        _host(host, text, option),
        int(port_text),
        options=_options(scheme, query, text, option),
    )


def _unix_path(path: str, text: str, option: str) -> str:
    """Check a path: taken literally, so that any file name can be written."""
    if not path.startswith(("/", "@")) or path in ("/", "@"):
        raise ConfigError(option, text, f"needs an absolute path: {_SHAPE['unix']}")
    if not path.isprintable():
        raise ConfigError(option, text, "the path must be of printable characters")
    size = len(path.encode())
    if size > UNIX_PATH_BYTES_MAX:
        raise ConfigError(
            option, text, f"path of {size} bytes, a socket's has at most {UNIX_PATH_BYTES_MAX}"
        )
    return path


def _host(host: str, text: str, option: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        if not _IPV6_SHAPE.fullmatch(host[1:-1]):
            raise ConfigError(option, text, f"no IPv6 address in the brackets: {host}")
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError as error:
            raise ConfigError(option, text, f"no IPv6 address in the brackets: {error}") from error
    if ":" in host:
        raise ConfigError(option, text, f"an IPv6 address needs brackets: [{host}]")
    host = host.lower()
    if host and not host.strip("0123456789."):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise ConfigError(option, text, f"no IPv4 address: {error}") from error
    if len(host) > HOST_BYTES_MAX or not _HOST_NAME.fullmatch(host):
        raise ConfigError(option, text, f"host {host!r} must be a host name or an address")
    return host


def _options(scheme: str, query: str, text: str, option: str) -> tuple[tuple[str, str], ...]:
    allowed = _OPTIONS_ALLOWED[scheme]
    pairs: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        if name not in allowed:
            choice = ", ".join(allowed) or "none"
            raise ConfigError(option, text, f"option {name!r}: {scheme} endpoints take {choice}")
        if name in pairs:
            raise ConfigError(option, text, f"option {name!r} must be given once")
        if not _OPTION_VALUE.fullmatch(value):
            raise ConfigError(
                option, text, f"option {name!r} needs a value of letters, digits and _ . : , -"
            )
        pairs[name] = value
    return tuple(sorted(pairs.items()))
