"""What options of daemon and agent have in common: their defaults, limits and checks. Pure.

Each check takes the name of the option, as its caller knows it, for the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import ConfigError, LocalProtocolError
from kvstore.layout import check_pool
from kvstore.messages import NODE_ID_MAX
from kvstore.units import format_size_bytes, parse_size_bytes

# Requests end after 5 s by default, so that all but the longest finish in that time.
DRAIN_S = 30.0
# Whoever wants to wait longer stops the clients first.
DRAIN_S_MAX = 3600.0
# Each is a descriptor and a link in every load report.
LISTENERS_MAX = 16
# As long as HELLO allows for the node id of a client.
NODE_ID_BYTES_MAX = NODE_ID_MAX

LOG_LEVELS = ("debug", "info", "warning", "error")


def check_endpoints(
    texts: Sequence[str], option: str, schemes: Sequence[str], count_max: int
) -> tuple[Endpoint, ...]:
    """Endpoints in the order in which they were given, each once.

    Raises:
        ConfigError: One cannot be, has another scheme, or stands there twice; or there are more
            than `count_max`.
    """
    endpoints: list[Endpoint] = []
    for text in texts:
        endpoint = parse_endpoint(text, option)
        if endpoint.scheme not in schemes:
            raise ConfigError(option, text, f"scheme must be one of {', '.join(schemes)}")
        if endpoint in endpoints and (endpoint.port or endpoint.scheme == "unix"):
            raise ConfigError(option, text, "must be given once")
        endpoints.append(endpoint)
    if len(endpoints) > count_max:
        raise ConfigError(option, texts[-1], f"at most {count_max} may be given")
    return tuple(endpoints)


def default_node_id(host_name: str, process_id: int, endpoint: Endpoint) -> str:
    """Name of a node where none was given: several processes of one host need different ones."""
    return f"{host_name}:{endpoint.path or endpoint.port or f'pid{process_id}'}"


def check_node_id(text: str, option: str) -> str:
    """The name of a node.

    Raises:
        ConfigError: It is empty or too long, or a log or a table could not show it.
    """
    if not (text and text.isprintable() and " " not in text):
        raise ConfigError(option, text, "must be printable characters without spaces")
    if len(text.encode()) > NODE_ID_BYTES_MAX:
        raise ConfigError(option, text, f"at most {NODE_ID_BYTES_MAX} bytes")
    return text


def check_pool_name(name: str, option: str, given: str) -> str:
    """The name of a pool.

    Args:
        given: The whole value that it is part of.

    Raises:
        ConfigError: No pool can have it.
    """
    try:
        check_pool(name)
    except LocalProtocolError as error:
        raise ConfigError(option, given, str(error)) from error
    return name


def parse_memory_bytes(text: str, option: str, least_bytes: int, most_bytes: int) -> int:
    """A size of memory as it was typed.

    Raises:
        ConfigError: It is no size, or not within the limits.
    """
    size_bytes = parse_size_bytes(text, option)
    if not least_bytes <= size_bytes <= most_bytes:
        least, most = format_size_bytes(least_bytes), format_size_bytes(most_bytes)
        raise ConfigError(option, text, f"must be {least} to {most}")
    return size_bytes


def parse_number(text: str) -> float:
    """A number as it was typed; not a number if it is none, which no check lets pass."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_drain_s(seconds: float, option: str, given: object) -> float:
    """How long a stop waits.

    Args:
        given: As it was typed.

    Raises:
        ConfigError: It is not within the limits.
    """
    if not 0 <= seconds <= DRAIN_S_MAX:
        raise ConfigError(option, given, f"must be 0 to {DRAIN_S_MAX:g} seconds")
    return seconds


def check_log_level(text: str, option: str) -> str:
    """The name of a log level.

    Raises:
        ConfigError: There is none of this name.
    """
    if text not in LOG_LEVELS:
        raise ConfigError(option, text, f"must be one of {', '.join(LOG_LEVELS)}")
    return text
