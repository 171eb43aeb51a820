"""The server shell: listeners, sessions, deadlines, drain. What it serves is a `BlockSource`.

One client is one *session* (16 random bytes in HELLO) of several connections: requests and
reports travel on the control connection, payload on data connections. Leases belong to the
session; a CANCEL on one connection stops a request on another.

Thread rule: everything runs on one loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

import msgspec

from kvstore.blocksource import BlockSource
from kvstore.buffers import Region
from kvstore.copier import Copier
from kvstore.endpoint import Endpoint
from kvstore.errors import ConfigError, TransportError
from kvstore.loadreport import LoadReport, NodeState
from kvstore.loglimit import LogLimit
from kvstore.messages import Role, Status
from kvstore.reporter import LoadReporter
from kvstore.session import ServerConnection, Session
from kvstore.transport import Listener, Marking, Stream, listen
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_nodes import RdmaNodes, endpoint_options
from kvstore.transport.shm import address_of, host_name
from kvstore.version import VERSION
from kvstore.views import ViewMemory

logger = logging.getLogger(__name__)


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a server, each with its reason.

    Attributes:
        node_id: Stable name of this node in reports, logs and attribution.
        role: What this node is.
        connections_max: A client has three connections; 1,024 are 340 GPU nodes. Bounded
            because each connection may pin a window of blocks.
        in_flight_bytes_max: Reserved for the puts of one connection: 100 ms at 5 Gbit/s.
        hello_timeout_s: A connection that has not introduced itself by then is closed.
        stall_timeout_s: A connection whose peer takes or gives nothing for that long, in the
            middle of something, is closed.
        drain_s: How long a graceful stop waits for requests under way.
        insecure: Allow listeners off loopback although there is no authentication yet.
        pool: The only pool that may be opened, "" for any.
        memory_uids: Users whose processes may hand memory over and map ours, on unix sockets.
    """

    node_id: str
    role: Role = Role.DAEMON
    connections_max: int = 1024
    in_flight_bytes_max: int = 64 * 1024 * 1024
    hello_timeout_s: float = 5.0
    stall_timeout_s: float = 30.0
    drain_s: float = 30.0
    insecure: bool = False
    pool: str = ""
    memory_uids: frozenset[int] = msgspec.field(
        default_factory=lambda: frozenset({0, os.geteuid()})
    )


# Connections beyond the limit that are kept until they can be told why they are refused; in
# a flood, further ones are closed without a word.
REFUSALS_MAX = 64
# How often a server that drains looks whether it is done.
DRAIN_POLL_S = 0.01
# How often stalled connections are looked for.
SWEEP_INTERVAL_S = 1.0


class Server:
    """Puts a block source on the network.

    Args:
        source: What is served; called on the loop's thread only.
        endpoints: Where to listen.
        options: Names and limits.
        marking: What the packets that it sends carry.
        memory: What the source gives out blocks of, for RDMA. With `options.pool` and a region
            clients on this host may map it.

    Attributes:
        rdma: Nodes of the rdma:// endpoints, by where these really listen.
        views: Of the memory; None if nobody may map it.
        endpoints: Where it really listens, once started (ports that the system chose).
        counters: Everything it has counted, by name.
    """

    def __init__(
        self,
        source: BlockSource,
        endpoints: Sequence[Endpoint],
        options: ServerOptions,
        marking: Marking | None = None,
        memory: Region | memoryview | None = None,
    ) -> None:
        for endpoint in endpoints:
            if not (endpoint.is_loopback or options.insecure):
                raise ConfigError(
                    "--listen",
                    endpoint,
                    "is reachable by other hosts and there is no authentication; bind to"
                    " 127.0.0.1 or a unix socket, or allow it with --insecure",
                )
            if endpoint.scheme == "rdma" and memory is None:
                raise ConfigError(
                    "--listen", endpoint, "offers RDMA, and this process has no memory for it"
                )
        self.source = source
        self.options = options
        self.boot_id = os.urandom(16)
        self.counters: Counter[str] = Counter()
        mapped = memory if isinstance(memory, Region) and options.pool else None
        self.views = ViewMemory(mapped) if mapped is not None else None
        self.rdma: dict[str, RdmaNode] = {}
        self._memory = memory
        self._nodes: RdmaNodes
        #: For clients on this host: what tells it from others, and our unix socket there.
        self.host = self.local = ""
        self.connections: set[ServerConnection] = set()
        self.sessions: dict[tuple[str, bytes, bool], Session] = {}
        self.draining = False
        self.endpoints: list[Endpoint] = list(endpoints)
        self.loop: asyncio.AbstractEventLoop
        self.reporter: LoadReporter
        self.copier: Copier  # starts no thread before it is asked for something
        self._marking = marking
        self._listeners: list[Listener] = []
        self._started_at = 0.0
        self._sweep: asyncio.TimerHandle | None = None
        self._log_limit = LogLimit(logger)

    async def start(self) -> None:
        """Bind and begin to serve.

        Raises:
            TransportError: An address is taken or not ours; nothing stays bound.
        """
        self.loop = asyncio.get_running_loop()
        self._started_at = time.monotonic()
        self.copier = Copier(self.loop)
        self.reporter = LoadReporter(self)
        self._nodes = RdmaNodes(self.loop)
        try:
            for endpoint in self.endpoints:
                self._listeners.append(listen(endpoint, self._marking))
            self._set_up_rdma()
        except BaseException:
            with contextlib.ExitStack() as ending:
                ending.callback(self._nodes.close)
                ending.callback(self.reporter.close)
                ending.callback(self._listeners.clear)
                for listener in self._listeners:
                    ending.callback(listener.close)
            raise
        self.endpoints = [listener.endpoint for listener in self._listeners]
        local = [str(endpoint) for endpoint in self.endpoints if endpoint.scheme == "unix"]
        # An agent's is for engines of its node, which may ask for more than others.
        if local and self.options.role is Role.DAEMON:
            self.host, self.local = host_name(), local[0]
        for listener in self._listeners:
            name = str(listener.endpoint)
            listener.start(self.loop, partial(self._accept, name))
        self._sweep = self.loop.call_later(SWEEP_INTERVAL_S, self._sweep_connections)

    async def stop(self, drain_s: float | None = None) -> None:
        """Stop gracefully: no new connections or requests, those under way finish.

        Args:
            drain_s: Bound of the wait; default as in the options, 0 stops at once.
        """
        limit_s = self.options.drain_s if drain_s is None else drain_s
        self.draining = True
        # The last one first; all of them, even if one fails, or the wait is cancelled.
        with contextlib.ExitStack() as ending:
            if self.views is not None:
                ending.callback(self.views.close)
            ending.callback(self._nodes.close)
            ending.callback(self.rdma.clear)
            ending.callback(self.copier.close)
            ending.callback(self._close_connections)
            ending.callback(self.reporter.close)
            for listener in self._listeners:
                listener.close()
            self.reporter.state_changed()
            for connection in list(self.connections):
                if connection.session is not None:
                    connection.protocol.goaway("shutting down")
            deadline = self.loop.time() + limit_s
            # Polled, once in the life of a process: an event would cost each request something.
            while self.busy and self.loop.time() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(DRAIN_POLL_S)

    def _close_connections(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        with contextlib.ExitStack() as ending:
            for connection in self.connections:
                reason = TransportError("the server has stopped")
                ending.callback(connection.connection.close, reason)

    def _set_up_rdma(self) -> None:
        """Open the rails of rdma:// endpoints, and register the memory with them.

        Raises:
            ConfigError: An option of an endpoint cannot be.
            TransportError: There is no such device, or it cannot be used; says why.
        """
        for listener in self._listeners:
            endpoint = listener.endpoint
            if endpoint.scheme == "rdma":
                assert self._memory is not None
                options = endpoint_options(endpoint, "--listen")
                node = self._nodes.node(options, endpoint.host)
                view = self._memory.view if isinstance(self._memory, Region) else self._memory
                if node.find(address_of(view), len(view)) is None:
                    node.register(view)  # for us alone: peers get no key of it
                self.rdma[str(endpoint)] = node
                logger.info("%s: rdma by %s", endpoint, ", ".join(node.rail_names))

    def status(self) -> Status:
        """What an operator sees of this node."""
        sessions = self.sessions.values()
        return Status(
            node_id=self.options.node_id,
            version=VERSION,
            role=self.options.role,
            uptime_s=time.monotonic() - self._started_at,
            report=self.report(),
            counters={
                **self.counters,
                **self.source.counters(),
                "connections": len(self.connections),
                "sessions": len(self.sessions),
                "sessions_by_rdma": sum(one.memory.end is not None for one in sessions),
                "shared_bytes": sum(one.memory.shared.shared_bytes for one in sessions),
                "viewed_bytes": self.views.viewed_bytes if self.views is not None else 0,
            },
        )

    @property
    def busy(self) -> bool:
        """Whether requests are under way or output is queued on any connection."""
        return any(connection.busy for connection in self.connections)

    @property
    def state(self) -> NodeState:
        """What this node says of itself."""
        if self.draining:
            return NodeState.DRAINING
        return NodeState.DEGRADED if self.source.degraded else NodeState.READY

    def report(self) -> LoadReport:
        """A new load report."""
        return self.reporter.make()

    def note(self, level: int, text: str, *args: object) -> None:
        """Log what peers can cause as often as they like; see `LogLimit`."""
        self._log_limit.log(self.loop.time(), level, text, *args)

    def _accept(self, link: str, stream: Stream) -> None:
        if len(self.connections) >= self.options.connections_max + REFUSALS_MAX:
            self.counters["connections_refused"] += 1
            stream.close()
            return
        self.counters["connections_accepted"] += 1
        self.connections.add(ServerConnection(self, stream, link))

    def _sweep_connections(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            connection.sweep(now)
        self._sweep = self.loop.call_later(SWEEP_INTERVAL_S, self._sweep_connections)


__all__ = ["Server", "ServerConnection", "ServerOptions", "Session"]
