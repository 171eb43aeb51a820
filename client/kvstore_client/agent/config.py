"""What an operator types after `kvagent`, and the options that it makes.

An option appears here when it works.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec

from kvstore.endpoint import parse_endpoint
from kvstore.errors import ConfigError
from kvstore.service.command import CommandParser
from kvstore.service.linkrate import parse_rate_Bps
from kvstore.service.options import (
    check_drain_s,
    check_log_level,
    default_node_id,
    parse_number,
)
from kvstore.transport.marking import DSCP_MAX, PRIORITY_MAX, RELAY_MARKING
from kvstore.units import format_size_bytes, parse_size_bytes
from kvstore_client.agent.options import LISTEN, MEMORY_BYTES, AgentOptions, check_options
from kvstore_client.placement import OWNERS_MAX
from kvstore_client.selector import Policy
from kvstore_client.transports import AUTO, TRANSPORTS

PROGRAM = "kvagent"
# As the only value of --listen.
NOWHERE = "none"
# Longer than any number that an option takes.
WHOLE_DIGITS_MAX = 20

DESCRIPTION = """\
Agent of a GPU node: loads KV-cache for the engines of this node by two paths, straight from
storage and by way of other nodes' agents, and relays for the loads of other nodes."""

EPILOG = """\
two kinds of socket:
  --listen  is on the compute network, for other nodes: their agents and clients come here for
            what this node reads from storage for them, or holds already
  --local   is on this node, for its engines: what they load here takes both paths, and what
            other nodes load through this agent yields to it. Processes of the user and the
            group that kvagent runs as may connect

a prefill and a decode node, the addresses of whose compute network are 10.2.0.1 and 10.2.0.2,
with storage at 10.1.0.5; on the first:
  kvagent --storage tcp://10.1.0.5:7450 --listen tcp://10.2.0.1:7460 --insecure \\
          --relay tcp://10.2.0.2:7460 --local unix:///run/kvagent/agent.sock \\
          --node-id prefill-1 --memory 16GiB --link-rate 200Gbit/s
and on the second the same with the two addresses exchanged, and its own name.

RATE is in bits or bytes a second: 400Mbit/s, 25gbit, 50MB/s. kvctl shows how an agent fares:
  kvctl --endpoint unix:///run/kvagent/agent.sock status
exit status: 0 after a stop, 2 for an option that cannot be, 1 for anything else."""

# What the user of the command calls the fields of `AgentOptions`.
NAMES = {
    "storage": "--storage",
    "node_id": "--node-id",
    "listen": "--listen",
    "local": "--local",
    "relays": "--relay",
    "policy": "--policy",
    "memory_bytes": "--memory",
    "copies": "--copies",
    "relay_rate_Bps": "--relay-rate",
    "link_rate_Bps": "--link-rate",
    "interface": "--interface",
    "priority": "--priority",
    "dscp": "--dscp",
    "pool": "--pool",
    "transport": "--transport",
    "memory_users": "--memory-user",
    "pool_readers": "--pool-readers",
    "drain_s": "--drain",
    "insecure": "--insecure",
}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one process.

    Attributes:
        agent: Those of the agent in it.
        log_level: Name of the lowest level that is logged.
    """

    agent: AgentOptions
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
    listen = [] if given.listen == [NOWHERE] else given.listen or [LISTEN]
    options = AgentOptions(
        storage=tuple(given.storage),
        node_id=_node_id(given, listen, host_name, process_id),
        listen=tuple(listen),
        local=given.local,
        relays=tuple(given.relay),
        policy=given.policy,
        memory_bytes=parse_size_bytes(given.memory, "--memory"),
        copies=_whole(given.copies, "--copies"),
        drop_idle=given.drop_idle,
        verify_relayed=given.verify_relayed,
        relay_rate_Bps=parse_rate_Bps(given.relay_rate, "--relay-rate"),
        link_rate_Bps=parse_rate_Bps(given.link_rate, "--link-rate"),
        interface=given.interface,
        priority=_whole(given.priority, "--priority"),
        dscp=_whole(given.dscp, "--dscp"),
        pool=given.pool,
        transport=given.transport,
        memory_users=tuple(given.memory_user),
        pool_readers=_pool_readers(given.pool_readers),
        drain_s=check_drain_s(parse_number(given.drain), "--drain", given.drain),
        insecure=given.insecure,
    )
    check_options(options, NAMES)
    return Config(agent=options, log_level=check_log_level(given.log_level, "--log-level"))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(PROGRAM, DESCRIPTION, EPILOG)
    _add_addresses(parser)
    parser.add_argument(
        "--policy",
        default=Policy.BALANCED.value,
        help=f"how loads are spread over the paths: {', '.join(Policy)} (default %(default)s)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        default=format_size_bytes(MEMORY_BYTES),
        help="size of the pool that blocks pass through and stay in, which is allocated and"
        " touched at start, as in 512MiB or 64GiB (default %(default)s)",
    )
    parser.add_argument(
        "--drop-idle",
        action="store_true",
        help="let blocks go as soon as no request needs them: the memory is a buffer, and no cache"
        " (default: they stay until there is no room)",
    )
    parser.add_argument(
        "--node-id",
        metavar="NAME",
        help="stable name of this node in reports and logs, and what engines name as decode node"
        " (default: host name and port)",
    )
    parser.add_argument(
        "--copies",
        metavar="N",
        default="1",
        help=f"daemons that get each block, 1 to {OWNERS_MAX} (default %(default)s)",
    )
    parser.add_argument(
        "--pool",
        metavar="NAME",
        default="",
        help="serve this pool and no other; then engines on this node may map the memory by the"
        " unix socket, and read blocks where they lie (default: any pool, and nobody maps it)",
    )
    parser.add_argument(
        "--transport",
        default=AUTO,
        help="what moves blocks from storage and other nodes to here: auto takes the best that a"
        f" peer offers, {', '.join(TRANSPORTS[1:])} nothing else (default %(default)s)",
    )
    parser.add_argument(
        "--memory-user",
        metavar="USER",
        action="append",
        default=[],
        help="let processes of this user share memory by the unix socket, a name or a number; may"
        " be given several times (default: our own user and root)",
    )
    _add_relaying(parser)
    parser.add_process_options()
    return parser


def _add_addresses(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        metavar="URI",
        action="append",
        default=[],
        help="a daemon, tcp://HOST:PORT, rdma://HOST:PORT[?device=NAME] or unix:///PATH; give"
        " them all, written as everywhere else: their names decide where blocks lie",
    )
    parser.add_argument(
        "--listen",
        metavar="URI",
        action="append",
        help="where other nodes come, tcp://HOST:PORT or rdma://HOST:PORT[?device=NAME]; may be"
        " given several times; "
        f"{NOWHERE}: nowhere (default {LISTEN})",
    )
    parser.add_argument(
        "--local",
        metavar="URI",
        default="",
        help="where engines of this node come, unix:///PATH (default: nowhere)",
    )
    parser.add_argument(
        "--relay",
        metavar="URI",
        action="append",
        default=[],
        help="agent of another node that may relay for loads of this one, tcp://HOST:PORT or"
        " rdma://HOST:PORT; may be given several times (default: none, all loads go straight)",
    )


def _add_relaying(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify-relayed",
        action="store_true",
        help="check the bytes also of what is only relayed; who asked for it does in any case",
    )
    parser.add_argument(
        "--relay-rate",
        metavar="RATE",
        default="0",
        help="cap of what is sent to other nodes; 0: none (default %(default)s)",
    )
    parser.add_argument(
        "--link-rate",
        metavar="RATE",
        default="0",
        help="capacity of the compute network's link: what is sent to other nodes then yields to"
        " all else on it; 0: does not yield (default %(default)s)",
    )
    parser.add_argument(
        "--interface",
        metavar="NAME",
        default="",
        help="network interface of that link (default: the one with the address of --listen)",
    )
    parser.add_argument(
        "--priority",
        metavar="N",
        default=str(RELAY_MARKING.priority),
        help=f"SO_PRIORITY of what is sent to other nodes, 0 to {PRIORITY_MAX} (default"
        " %(default)s, bulk)",
    )
    parser.add_argument(
        "--dscp",
        metavar="N",
        default=str(RELAY_MARKING.dscp),
        help=f"its class of service in the IP header, 0 to {DSCP_MAX} (default %(default)s, lower"
        " effort)",
    )
    parser.add_argument(
        "--pool-readers",
        metavar="POOL=NODE[,NODE...]",
        action="append",
        default=[],
        help="nodes that may read a pool through this agent; may be given several times"
        " (default: any)",
    )


def _node_id(
    given: argparse.Namespace, listen: Sequence[str], host_name: str, process_id: int
) -> str:
    if given.node_id is not None:
        return str(given.node_id)
    # Without any address, the check says what is missing.
    first, option = (listen[0], "--listen") if listen else (given.local or LISTEN, "--local")
    return default_node_id(host_name, process_id, parse_endpoint(first, option))


def _whole(text: str, option: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= WHOLE_DIGITS_MAX):
        raise ConfigError(option, text, "must be a whole number")
    return int(text)


def _pool_readers(texts: Sequence[str]) -> dict[str, frozenset[str]]:
    option = "--pool-readers"
    readers: dict[str, frozenset[str]] = {}
    for text in texts:
        pool, separator, nodes = text.partition("=")
        if not separator:
            remedy = "must be POOL=NODE[,NODE...], as in llama3-70b=prefill-1,prefill-2"
            raise ConfigError(option, text, remedy)
        if pool in readers:
            raise ConfigError(option, text, f"pool {pool!r} must be given once")
        readers[pool] = frozenset(nodes.split(",") if nodes else ())
    return readers
