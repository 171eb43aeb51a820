"""The RDMA nodes of a process: one for each network that it reaches, made when first needed.

An agent has two: its storage network, on which it is a client, and its compute network, on
which it serves. Memory is registered with each node that is to reach it.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from kvstore.endpoint import Endpoint
from kvstore.errors import ConfigError
from kvstore.transport import verbs
from kvstore.transport.rdma import RdmaNode
from kvstore.transport.rdma_options import RdmaOptions, check_rdma_options

#: Options of rdma:// endpoints, and the fields of `RdmaOptions` that they are.
_FIELDS = {
    "device": "devices",
    "gid_index": "gid_index",
    "mtu": "mtu_bytes",
    "service_level": "service_level",
    "traffic_class": "traffic_class",
    "timeout": "timeout",
    "retry_count": "retry_count",
}


def endpoint_options(endpoint: Endpoint, option: str) -> RdmaOptions:
    """What an rdma:// endpoint says of RDMA; what it does not say is found.

    Args:
        option: Where the endpoint came from, for errors.

    Raises:
        ConfigError: Names the endpoint and what is wrong with it.
    """
    values: dict[str, object] = {}
    for name, text in endpoint.options:
        if name == "device":
            values["devices"] = tuple(text.split(","))
        elif text.removeprefix("-").isdigit():
            values[_FIELDS[name]] = int(text)
        else:
            raise ConfigError(option, endpoint, f"{name}={text}: must be a whole number")
    try:
        return check_rdma_options(RdmaOptions(**values))  # type: ignore[arg-type]
    except ConfigError as error:
        names = {field: name for name, field in _FIELDS.items()}
        name = names.get(error.option, error.option)
        raise ConfigError(option, endpoint, f"{name}={error.value}: {error.remedy}") from error


class RdmaNodes:
    """Nodes by what they are asked for. On the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._closed = False
        self._nodes: dict[tuple[bytes, str], RdmaNode] = {}

    def node(self, options: RdmaOptions, local_address: str) -> RdmaNode:
        """The node for these options at this address of ours; made when first asked for.

        Raises:
            VerbsMissing, NoDevice, VerbsForbidden, VerbsError: As `RdmaNode`.
            VerbsClosed: After `close`.
        """
        if self._closed:
            raise verbs.VerbsClosed("the RDMA nodes of this process are closed")
        key = (msgspec.msgpack.encode(options), local_address)
        node = self._nodes.get(key)
        if node is None:
            found = verbs.system_verbs()
            node = RdmaNode(self._loop, found, options, local_address or None)
            self._nodes[key] = node
        return node

    def close(self) -> None:
        """Close all of them. Harmless when called again."""
        self._closed = True
        nodes = list(self._nodes.values())
        self._nodes.clear()
        with contextlib.ExitStack() as ending:  # all of them, even if one fails
            for node in nodes:
                ending.callback(node.close)


__all__ = ["RdmaNodes", "endpoint_options"]
