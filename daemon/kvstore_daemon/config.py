"""What an operator may choose: the options of `kvstored`, checked before anything is begun.

An option appears here when it works.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import ConfigError, LocalProtocolError
from kvstore.layout import check_pool
from kvstore.units import format_size_bytes, parse_size_bytes
from kvstore.version import VERSION
from kvstore_daemon.engine.allocator import PAGES_MAX
from kvstore_daemon.engine.pools import POOLS_MAX
from kvstore_daemon.engine.store import PAGE_BYTES

PORT = 7450
# Off loopback anyone who can reach the port could read and write: that has to be asked for.
LISTEN = f"tcp://127.0.0.1:{PORT}"
# Holds a few prefixes of any model, and fits on a developer's machine.
MEMORY = "1GiB"
# Requests end after 5 s by default, so that all but the longest finish in that time.
DRAIN_S = 30.0
# Whoever wants to wait longer stops the clients first.
DRAIN_S_MAX = 3600.0
# Smaller arenas hold no block of a real model.
MEMORY_BYTES_MIN = 1024 * 1024
# What the arena's page numbers reach, in whole TiB.
MEMORY_BYTES_MAX = PAGES_MAX * PAGE_BYTES // 1024**4 * 1024**4
# Each is a descriptor and a link in every load report.
LISTENERS_MAX = 16
# As long as HELLO allows for the node id of a client.
NODE_ID_BYTES_MAX = 256

_SCHEMES = ("tcp", "unix")
_LOG_LEVELS = ("debug", "info", "warning", "error")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one daemon, in the units that the code computes with.

    Attributes:
        endpoints: Where to listen; port 0 lets the system choose.
        memory_bytes: Size of the arena.
        node_id: Stable name of this node in reports, logs and attribution.
        pool_capacities: Quotas in bytes, by name of the pool.
        drain_s: How long a graceful stop waits for requests under way.
        insecure: Allow endpoints off loopback although there is no authentication.
        log_level: Name of the lowest level that is logged.
    """

    endpoints: tuple[Endpoint, ...]
    memory_bytes: int
    node_id: str
    pool_capacities: dict[str, int]
    drain_s: float
    insecure: bool
    log_level: str


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the command is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parse_config(arguments: Sequence[str], host_name: str, process_id: int) -> Config:
    """Options as the operator typed them, checked.

    Args:
        arguments: What follows the command's name.
        host_name, process_id: For the node id where none is given.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
        SystemExit: `--help` or `--version` was asked for, or an option is unknown.
    """
    given = _parser().parse_args(arguments)
    endpoints = _endpoints(given.listen or [LISTEN])
    return Config(
        endpoints=endpoints,
        memory_bytes=_memory_bytes(given.memory),
        node_id=_node_id(given.node_id, host_name, process_id, endpoints[0]),
        pool_capacities=_pool_capacities(given.pool_capacity),
        drain_s=_drain_s(given.drain),
        insecure=given.insecure,
        log_level=_log_level(given.log_level),
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kvstored",
        description="Storage daemon for the KV-cache of LLM inference.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--listen",
        metavar="URI",
        action="append",
        help="where to listen, tcp://HOST:PORT or unix:///PATH; may be given several times"
        f" (default {LISTEN})",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        default=MEMORY,
        help="size of the arena, which is allocated and touched at start, as in 512MiB or 64GiB"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--node-id",
        metavar="NAME",
        help="stable name of this node in reports and logs (default: host name and port)",
    )
    parser.add_argument(
        "--pool-capacity",
        metavar="NAME=SIZE",
        action="append",
        default=[],
        help="quota of a pool; may be given several times (default: a pool may fill the arena)",
    )
    parser.add_argument(
        "--drain",
        metavar="S",
        default=f"{DRAIN_S:g}",
        help="seconds that a stop waits for requests under way (default %(default)s)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen also where other hosts can connect, although nobody has to authenticate",
    )
    parser.add_argument(
        "--log-level",
        metavar="LEVEL",
        default="info",
        help=f"one of {', '.join(_LOG_LEVELS)} (default %(default)s)",
    )
    parser.add_argument("--version", action="version", version=f"kvstored {VERSION}")
    return parser


def _endpoints(texts: Sequence[str]) -> tuple[Endpoint, ...]:
    endpoints: list[Endpoint] = []
    for text in texts:
        endpoint = parse_endpoint(text, "--listen")
        if endpoint.scheme not in _SCHEMES:
            raise ConfigError("--listen", text, f"scheme must be one of {', '.join(_SCHEMES)}")
        if endpoint in endpoints and (endpoint.port or endpoint.scheme == "unix"):
            raise ConfigError("--listen", text, "must be given once")
        endpoints.append(endpoint)
    if len(endpoints) > LISTENERS_MAX:
        raise ConfigError("--listen", texts[-1], f"at most {LISTENERS_MAX} may be given")
    return tuple(endpoints)


def _memory_bytes(text: str) -> int:
    size_bytes = parse_size_bytes(text, "--memory")
    if not MEMORY_BYTES_MIN <= size_bytes <= MEMORY_BYTES_MAX:
        least, most = format_size_bytes(MEMORY_BYTES_MIN), format_size_bytes(MEMORY_BYTES_MAX)
        raise ConfigError("--memory", text, f"must be {least} to {most}")
    return size_bytes


def _node_id(text: str | None, host_name: str, process_id: int, endpoint: Endpoint) -> str:
    if text is None:
        # Several daemons of one host need different names.
        text = f"{host_name}:{endpoint.path or endpoint.port or f'pid{process_id}'}"
    if not (text and text.isprintable() and " " not in text):
        raise ConfigError("--node-id", text, "must be printable characters without spaces")
    if len(text.encode()) > NODE_ID_BYTES_MAX:
        raise ConfigError("--node-id", text, f"at most {NODE_ID_BYTES_MAX} bytes")
    return text


def _pool_capacities(texts: Sequence[str]) -> dict[str, int]:
    option = "--pool-capacity"
    capacities: dict[str, int] = {}
    for text in texts:
        name, separator, size = text.partition("=")
        if not separator:
            raise ConfigError(option, text, "must be NAME=SIZE, as in llama3-70b=64GiB")
        try:
            check_pool(name)
        except LocalProtocolError as error:
            raise ConfigError(option, text, str(error)) from error
        if name in capacities:
            raise ConfigError(option, text, f"pool {name!r} must be given once")
        capacities[name] = parse_size_bytes(size, f"{option} {name}")
        if not capacities[name]:
            raise ConfigError(option, text, "must be at least 1 byte; leave it out for no quota")
    if len(capacities) > POOLS_MAX:
        raise ConfigError(option, texts[-1], f"at most {POOLS_MAX} pools")
    return capacities


def _drain_s(text: str) -> float:
    try:
        drain_s = float(text)
    except ValueError:
        drain_s = math.nan
    if not 0 <= drain_s <= DRAIN_S_MAX:
        raise ConfigError("--drain", text, f"must be 0 to {DRAIN_S_MAX:g} seconds")
    return drain_s


def _log_level(text: str) -> str:
    if text not in _LOG_LEVELS:
        raise ConfigError("--log-level", text, f"must be one of {', '.join(_LOG_LEVELS)}")
    return text
