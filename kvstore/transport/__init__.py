"""Transports: how a hop moves bytes. `connect` and `listen` choose one by the URI's scheme."""

from __future__ import annotations

import asyncio

from kvstore.endpoint import Endpoint
from kvstore.errors import ConfigError
from kvstore.transport.base import CONNECT_TIMEOUT_S, Listener, Stream
from kvstore.transport.marking import RELAY_MARKING, Marking
from kvstore.transport.sockets import SocketListener, connect_socket

__all__ = [
    "CONNECT_TIMEOUT_S",
    "RELAY_MARKING",
    "Listener",
    "Marking",
    "Stream",
    "connect",
    "listen",
]

_SOCKET_SCHEMES = ("tcp", "unix", "rdma")


async def connect(
    loop: asyncio.AbstractEventLoop,
    endpoint: Endpoint,
    timeout_s: float = CONNECT_TIMEOUT_S,
    marking: Marking | None = None,
) -> Stream:
    """Connect to an endpoint.

    Args:
        marking: What all that we send carries, from the first packet on; nothing leaves the
            host by a unix socket, and it is not marked.

    Raises:
        ConfigError: The system refuses the marking; names the part of it.
        TransportTimeout: No answer within `timeout_s`.
        TransportError: Refused or unreachable.
    """
    _check(endpoint)
    return await connect_socket(loop, endpoint, timeout_s, marking)


def listen(endpoint: Endpoint, marking: Marking | None = None) -> Listener:
    """Bind an endpoint.

    Args:
        marking: As of `connect`, for every stream that is accepted.

    Raises:
        ConfigError: The system refuses the marking; names the part of it.
        TransportError: The address is taken or not ours.
    """
    _check(endpoint)
    return SocketListener(endpoint, marking)


def _check(endpoint: Endpoint) -> None:
    if endpoint.scheme not in _SOCKET_SCHEMES:
        raise ConfigError("endpoint", endpoint, f"scheme must be one of {_SOCKET_SCHEMES}")
