"""What an operator may choose: the options of `kvstored`, checked before anything is begun.

An option appears here when it works.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec

from kvstore.allocator import PAGES_MAX
from kvstore.endpoint import Endpoint
from kvstore.errors import ConfigError
from kvstore.service.command import CommandParser
from kvstore.service.options import (
    LISTENERS_MAX,
    check_drain_s,
    check_endpoints,
    check_log_level,
    check_node_id,
    check_pool_name,
    default_node_id,
    parse_memory_bytes,
    parse_number,
)
from kvstore.units import parse_size_bytes
from kvstore_daemon.engine.pools import POOLS_MAX
from kvstore_daemon.engine.store import PAGE_BYTES

PROGRAM = "kvstored"
PORT = 7450
# Off loopback anyone who can reach the port could read and write: that has to be asked for.
LISTEN = f"tcp://127.0.0.1:{PORT}"
# Holds a few prefixes of any model, and fits on a developer's machine.
MEMORY = "1GiB"
# Smaller arenas hold no block of a real model.
MEMORY_BYTES_MIN = 1024 * 1024
# What the arena's page numbers reach, in whole TiB.
MEMORY_BYTES_MAX = PAGES_MAX * PAGE_BYTES // 1024**4 * 1024**4

_SCHEMES = ("tcp", "unix", "rdma")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one daemon, in the units that the code computes with.

    Attributes:
        endpoints: Where to listen; port 0 lets the system choose.
        memory_bytes: Size of the arena.
        node_id: Stable name of this node in reports, logs and attribution.
        pool: The only pool that is served, "" for any.
        memory_users: Who may share memory by unix sockets, beside ourselves and root.
        pool_capacities: Quotas in bytes, by name of the pool.
        drain_s: How long a graceful stop waits for requests under way.
        insecure: Allow endpoints off loopback although there is no authentication.
        log_level: Name of the lowest level that is logged.
    """

    endpoints: tuple[Endpoint, ...]
    memory_bytes: int
    node_id: str
    pool: str
    memory_users: tuple[str, ...]
    pool_capacities: dict[str, int]
    drain_s: float
    insecure: bool
    log_level: str


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
    endpoints = check_endpoints(given.listen or [LISTEN], "--listen", _SCHEMES, LISTENERS_MAX)
    node_id = given.node_id
    if node_id is None:
        node_id = default_node_id(host_name, process_id, endpoints[0])
    return Config(
        endpoints=endpoints,
        memory_bytes=parse_memory_bytes(
            given.memory, "--memory", MEMORY_BYTES_MIN, MEMORY_BYTES_MAX
        ),
        node_id=check_node_id(node_id, "--node-id"),
        pool=check_pool_name(given.pool, "--pool", given.pool) if given.pool else "",
        memory_users=tuple(given.memory_user),
        pool_capacities=_pool_capacities(given.pool_capacity),
        drain_s=check_drain_s(parse_number(given.drain), "--drain", given.drain),
        insecure=given.insecure,
        log_level=check_log_level(given.log_level, "--log-level"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(PROGRAM, "Storage daemon for the KV-cache of LLM inference.")
    parser.add_argument(
        "--listen",
        metavar="URI",
        action="append",
        help="where to listen: tcp://HOST:PORT, unix:///PATH, or rdma://HOST:PORT[?device=NAME],"
        " which is TCP that offers RDMA; may be given several times"
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
        "--pool",
        metavar="NAME",
        default="",
        help="serve this pool and no other; then clients on this host may map the arena by a unix"
        " socket, and read blocks where they lie (default: any pool, and nobody maps it)",
    )
    parser.add_argument(
        "--memory-user",
        metavar="USER",
        action="append",
        default=[],
        help="let processes of this user share memory by the unix socket, a name or a number; may"
        " be given several times (default: our own user and root)",
    )
    parser.add_argument(
        "--pool-capacity",
        metavar="NAME=SIZE",
        action="append",
        default=[],
        help="quota of a pool; may be given several times (default: a pool may fill the arena)",
    )
    parser.add_process_options()
    return parser


def _pool_capacities(texts: Sequence[str]) -> dict[str, int]:
    option = "--pool-capacity"
    capacities: dict[str, int] = {}
    for text in texts:
        name, separator, size = text.partition("=")
        if not separator:
            raise ConfigError(option, text, "must be NAME=SIZE, as in llama3-70b=64GiB")
        check_pool_name(name, option, text)
        if name in capacities:
            raise ConfigError(option, text, f"pool {name!r} must be given once")
        capacities[name] = parse_size_bytes(size, f"{option} {name}")
        if not capacities[name]:
            raise ConfigError(option, text, "must be at least 1 byte; leave it out for no quota")
    if len(capacities) > POOLS_MAX:
        raise ConfigError(option, texts[-1], f"at most {POOLS_MAX} pools")
    return capacities
