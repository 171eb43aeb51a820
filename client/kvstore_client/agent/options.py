"""What whoever runs an agent may choose, and the checks of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from kvstore.endpoint import Endpoint
from kvstore.errors import ConfigError
from kvstore.loadreport import NODES_MAX
from kvstore.memorymessages import SHM
from kvstore.messages import DEADLINE_MS_MAX
from kvstore.service.options import (
    DRAIN_S,
    LISTENERS_MAX,
    check_drain_s,
    check_endpoints,
    check_node_id,
    check_pool_name,
)
from kvstore.transport.marking import DSCP_MAX, PRIORITY_MAX, RELAY_MARKING
from kvstore.units import format_size_bytes
from kvstore_client.placement import OWNERS_MAX
from kvstore_client.selector import Policy
from kvstore_client.transports import AUTO, TRANSPORTS

PORT = 7460
# Off loopback anyone who can reach the port could read: that has to be asked for.
LISTEN = f"tcp://127.0.0.1:{PORT}"
# A few requests of any model under way at once, and fits on a developer's machine.
MEMORY_BYTES = 1024**3
# Less holds no block of a real model.
MEMORY_BYTES_MIN = 1024**2
# No host has more; `check_memory` says what this one has.
MEMORY_BYTES_MAX = 1024**5
# An engine waits this long at most for KV-cache before it computes it again.
DEADLINE_S = 5.0
CONNECT_TIMEOUT_S_MAX = 60.0
# Both kinds together are half of the nodes whose load reports are kept.
STORAGE_MAX = RELAYS_MAX = NODES_MAX // 4
# As many pools as a daemon has.
POOLS_MAX = 256
READERS_MAX = NODES_MAX
# A frame of 1 MiB takes 4.2 s at 2 Mbit/s: at less, none would arrive within `DEADLINE_S`.
RATE_BYTES_MIN = 250_000
# IFNAMSIZ of linux/if.h is 16, with the final zero byte.
INTERFACE_BYTES_MAX = 15
# Addresses that no single interface has.
EVERYWHERE = ("0.0.0.0", "::")

_STORAGE_SCHEMES = ("tcp", "unix", "rdma")
_NODE_SCHEMES = ("tcp", "rdma")


class AgentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one agent, in the units that the code computes with; see `check_options`.

    Attributes:
        storage: URIs of all daemons, written alike by all clients and agents: the names decide
            where blocks lie.
        node_id: Stable name of this node in reports, logs and attribution; what callers name
            as `decode_node`.
        listen: Where other nodes come for what this one relays or holds, on the compute
            network; empty to serve no other node.
        local: unix URI for the engines of this node; "" for none.
        relays: URIs of other nodes' agents that may relay for this node's loads.
        policy: How loads are spread over the paths; a `kvstore_client.selector.Policy`.
        memory_bytes: Size of the pool that blocks pass through and stay in.
        token: Credentials for daemons and agents that ask for them.
        copies: Daemons that get each block: 1, or 2 to survive the loss of one.
        drop_idle: Evict blocks as soon as no request needs them, instead of keeping them for
            the next one until there is no room.
        verify_relayed: Check also what only passes through; the last reader does in any case.
        relay_rate_Bps: Cap of what is sent to other nodes; 0 for none.
        link_rate_Bps: Capacity of the compute network's interface: what is sent to other
            nodes yields to whatever else uses it. 0: it is not known, and nothing yields.
        interface: Name of that interface; "" for the one that has the address of `listen`.
        priority, dscp: Marks of what is sent to other nodes; see `kvstore.transport.marking`.
        pool: The only pool that is served, "" for any. With it engines of this node may map the
            memory, and read blocks where they lie.
        memory_users: Who may share memory by `local`, by name or number, beside our own user and
            root.
        transport: What is to move payload from storage and other nodes; see `AsyncClient`.
        pool_readers: Node ids that may read a pool through this agent, by name of the pool; a
            pool that is not named may be read by any.
        deadline_s: Of requests to storage that do not say otherwise.
        connect_timeout_s: For connecting, and for requests without payload.
        drain_s: How long a graceful stop waits for requests under way.
        insecure: Allow `listen` off loopback although there is no authentication.
    """

    storage: tuple[str, ...]
    node_id: str
    listen: tuple[str, ...] = (LISTEN,)
    local: str = ""
    relays: tuple[str, ...] = ()
    policy: str = Policy.BALANCED.value
    memory_bytes: int = MEMORY_BYTES
    token: str = ""
    copies: int = 1
    drop_idle: bool = False
    verify_relayed: bool = False
    relay_rate_Bps: int = 0
    link_rate_Bps: int = 0
    interface: str = ""
    priority: int = RELAY_MARKING.priority
    dscp: int = RELAY_MARKING.dscp
    pool: str = ""
    memory_users: tuple[str, ...] = ()
    transport: str = AUTO
    pool_readers: dict[str, frozenset[str]] = {}
    deadline_s: float = DEADLINE_S
    connect_timeout_s: float = 1.0
    drain_s: float = DRAIN_S
    insecure: bool = False


class AgentEndpoints(NamedTuple):
    """The addresses among the options, in their normal forms.

    Attributes:
        storage: The daemons.
        listen: For other nodes.
        local: For the engines of this node.
        relays: Other nodes' agents.
    """

    storage: tuple[Endpoint, ...]
    listen: tuple[Endpoint, ...]
    local: Endpoint | None
    relays: tuple[Endpoint, ...]

    @property
    def served(self) -> tuple[Endpoint, ...]:
        """All that the agent listens on, the one for its own engines last."""
        return self.listen if self.local is None else (*self.listen, self.local)


def check_options(options: AgentOptions, names: Mapping[str, str] | None = None) -> AgentEndpoints:
    """Refuse what cannot be.

    Args:
        names: What the caller calls an option where that is not the name of the field: a
            command's user knows `--memory`.

    Returns:
        The addresses among the options.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
    """
    check = _Check(options, names or {})
    check.types()
    endpoints = check.endpoints()
    check.others()
    return endpoints


class _Check:
    """The options, and what their user calls them."""

    def __init__(self, options: AgentOptions, names: Mapping[str, str]) -> None:
        self._options = options
        self._names = names

    def name(self, field: str) -> str:
        return self._names.get(field, field)

    def error(self, field: str, remedy: str, value: object = None) -> ConfigError:
        shown = getattr(self._options, field) if value is None else value
        return ConfigError(self.name(field), shown, remedy)

    def types(self) -> None:
        """A string where a tuple belongs would be taken for one URI a character."""
        for field in msgspec.structs.fields(AgentOptions):
            value = getattr(self._options, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                raise self.error(field.name, str(error), repr(value)) from error

    def endpoints(self) -> AgentEndpoints:
        options, name = self._options, self.name
        storage = check_endpoints(options.storage, name("storage"), _STORAGE_SCHEMES, STORAGE_MAX)
        if not storage:
            raise self.error("storage", "name at least one daemon", "none")
        listen = check_endpoints(options.listen, name("listen"), _NODE_SCHEMES, LISTENERS_MAX)
        local = None
        if options.local:
            (local,) = check_endpoints([options.local], name("local"), ("unix",), 1)
        relays = check_endpoints(options.relays, name("relays"), _NODE_SCHEMES, RELAYS_MAX)
        for field, others in (("storage", storage), ("relays", relays)):
            for endpoint in others:
                if endpoint.scheme != "unix" and not endpoint.port:
                    raise self.error(field, "needs a port from 1 to 65535", endpoint)
        for endpoint in relays:
            if endpoint in listen:
                raise self.error("relays", "is this agent itself; name others", endpoint)
            if endpoint in storage:
                remedy = f"is a daemon ({name('storage')}); name agents of other nodes"
                raise self.error("relays", remedy, endpoint)
        if local in storage:
            raise self.error("local", f"is a daemon ({name('storage')}); choose another path")
        if not listen and local is None:
            remedy = f"serves nobody; give {name('listen')} or {name('local')}"
            raise self.error("listen", remedy, "none")
        for endpoint in listen:
            if not (endpoint.is_loopback or options.insecure):
                raise self.error("listen", self._unsafe(), endpoint)
            if options.link_rate_Bps and not options.interface and endpoint.host in EVERYWHERE:
                remedy = f"is on all interfaces: {name('interface')} says whose link yields"
                raise self.error("listen", remedy, endpoint)
        return AgentEndpoints(storage, listen, local, relays)

    def _unsafe(self) -> str:
        return (
            "is reachable by other hosts and there is no authentication; bind to 127.0.0.1, or"
            f" allow it with {self.name('insecure')}"
        )

    def others(self) -> None:
        options, name = self._options, self.name
        check_node_id(options.node_id, name("node_id"))
        if options.policy not in list(Policy):
            raise self.error("policy", f"must be one of {', '.join(Policy)}")
        if not MEMORY_BYTES_MIN <= options.memory_bytes <= MEMORY_BYTES_MAX:
            least, most = format_size_bytes(MEMORY_BYTES_MIN), format_size_bytes(MEMORY_BYTES_MAX)
            shown = format_size_bytes(max(0, options.memory_bytes))
            raise self.error("memory_bytes", f"must be {least} to {most}", shown)
        self.within("copies", 1, OWNERS_MAX)
        self.within("priority", 0, PRIORITY_MAX)
        self.within("dscp", 0, DSCP_MAX)
        for field in ("relay_rate_Bps", "link_rate_Bps"):
            rate = getattr(options, field)
            if rate and rate < RATE_BYTES_MIN:
                remedy = f"must be 0, for none, or at least {RATE_BYTES_MIN} bytes/s (2Mbit/s)"
                raise self.error(field, remedy)
        if options.pool:
            check_pool_name(options.pool, name("pool"), options.pool)
        if options.transport not in TRANSPORTS:
            raise self.error("transport", f"must be one of {', '.join(TRANSPORTS)}")
        if options.pool and options.transport == SHM:
            raise self.error(
                "transport",
                f"cannot be together with {name('pool')}: memory that engines map is sealed, and no"
                " daemon can write into it; auto takes a socket or RDMA",
            )
        self.interface()
        self.readers()
        if not 0 < options.deadline_s <= DEADLINE_MS_MAX / 1e3:
            raise self.error("deadline_s", f"more than 0, at most {DEADLINE_MS_MAX / 1e3:g}")
        if not 0 < options.connect_timeout_s <= CONNECT_TIMEOUT_S_MAX:
            remedy = f"more than 0, at most {CONNECT_TIMEOUT_S_MAX:g}"
            raise self.error("connect_timeout_s", remedy)
        check_drain_s(options.drain_s, name("drain_s"), f"{options.drain_s:g}")

    def within(self, field: str, least: int, most: int) -> None:
        if not least <= getattr(self._options, field) <= most:
            raise self.error(field, f"must be a whole number from {least} to {most}")

    def interface(self) -> None:
        """What the kernel takes for a name: `dev_valid_name` of linux/net/core/dev.c."""
        interface = self._options.interface
        if not interface:
            return
        if (
            len(interface.encode()) > INTERFACE_BYTES_MAX
            or interface in (".", "..")
            or not interface.isprintable()
            or any(c in "/: " for c in interface)
        ):
            remedy = f"must be the name of a network interface, at most {INTERFACE_BYTES_MAX} bytes"
            raise self.error("interface", remedy)
        if not self._options.link_rate_Bps:
            remedy = f"has no effect without {self.name('link_rate_Bps')}, the capacity of its link"
            raise self.error("interface", remedy)

    def readers(self) -> None:
        field = "pool_readers"
        readers = self._options.pool_readers
        if len(readers) > POOLS_MAX:
            raise self.error(field, f"at most {POOLS_MAX} pools", f"{len(readers)} pools")
        for pool, nodes in readers.items():
            given = f"{pool}={','.join(sorted(nodes))}"
            check_pool_name(pool, self.name(field), given)
            if not nodes:
                remedy = "name at least one node; that of this agent keeps all others out"
                raise self.error(field, remedy, given)
            if len(nodes) > READERS_MAX:
                shown = f"{pool} with {len(nodes)} nodes"
                raise self.error(field, f"at most {READERS_MAX} nodes a pool", shown)
            for node in nodes:
                check_node_id(node, f"{self.name(field)} {pool}")
