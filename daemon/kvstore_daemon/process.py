"""The process of the daemon: its arena, its limits, its server."""

from __future__ import annotations

import os

import uvloop

from kvstore.service.descriptors import DESCRIPTORS_BESIDE, raise_descriptor_limit
from kvstore.service.lifetime import end_at_once_on_signals, serve, try_addresses
from kvstore.service.log import set_up_log
from kvstore.service.memory import allocate, touch
from kvstore.service.users import SOCKET_UMASK, parse_users
from kvstore.serving import REFUSALS_MAX, Server, ServerOptions
from kvstore.units import format_size_bytes
from kvstore_daemon.config import PROGRAM, Config
from kvstore_daemon.source import ArenaSource


class _Daemon(Server):
    """A server that can say how much is under way, for the log."""

    @property
    def busy_count(self) -> int:
        """Requests that are under way."""
        return sum(connection.protocol.request_count for connection in self.connections)


def run(config: Config) -> None:
    """Serve until a signal comes.

    Raises:
        ConfigError: The arena does not fit, or an endpoint may not be listened on.
        TransportError: An address is taken or not ours.
        OSError: The system refuses something else.
    """
    set_up_log(PROGRAM, config.log_level)
    end_at_once_on_signals(PROGRAM)
    os.umask(SOCKET_UMASK)
    arena = allocate(config.memory_bytes, "kvstored-arena")
    source = ArenaSource(arena.view, capacities=config.pool_capacities)
    options = ServerOptions(
        node_id=config.node_id,
        drain_s=config.drain_s,
        insecure=config.insecure,
        pool=config.pool,
        memory_uids=parse_users(config.memory_users, "--memory-user"),
    )
    daemon = _Daemon(source, config.endpoints, options, memory=arena)
    raise_descriptor_limit(options.connections_max + REFUSALS_MAX + DESCRIPTORS_BESIDE)
    try_addresses(config.endpoints)
    touch(arena, PROGRAM, "arena")
    what = f"node {config.node_id}, arena of {format_size_bytes(config.memory_bytes)}"
    # uvloop: a turn of its loop costs less. 64 blocks of 4 KiB take 3.1 us a block of the
    # server's time and 3.3 to 3.6 on asyncio's own loop; large blocks take the same.
    uvloop.run(serve(daemon, what, config.drain_s))
