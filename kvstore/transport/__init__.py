"""Transports: how a hop moves bytes. `connect` and `listen` choose one by the URI's scheme."""

from __future__ import annotations

import asyncio

from kvstore.endpoint import Endpoint
from kvstore.errors import ConfigError
from kvstore.transport.base import CONNECT_TIMEOUT_S, Listener, Stream
from kvstore.transport.sockets import SocketListener, connect_socket

__all__ = ["CONNECT_TIMEOUT_S", "Listener", "Stream", "connect", "listen"]

_SOCKET_SCHEMES = ("tcp", "unix")


async def connect(
    loop: asyncio.AbstractEventLoop, endpoint: Endpoint, timeout_s: float = CONNECT_TIMEOUT_S
) -> Stream:
    """Connect to an endpoint.

    Raises:
        TransportTimeout: No answer within `timeout_s`.
        TransportError: Refused or unreachable.
    """
    _check(endpoint)
    return await connect_socket(loop, endpoint, timeout_s)


def listen(endpoint: Endpoint) -> Listener:
    """Bind an endpoint.

    Raises:
        TransportError: The address is taken or not ours.
    """
    _check(endpoint)
    return SocketListener(endpoint)


def _check(endpoint: Endpoint) -> None:
    if endpoint.scheme not in _SOCKET_SCHEMES:
        raise ConfigError("endpoint", endpoint, f"scheme must be one of {_SOCKET_SCHEMES}")
