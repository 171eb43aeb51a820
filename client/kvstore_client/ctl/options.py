"""What an operator types, and what is wrong with it. Options common to all commands may stand
before the command's name or after it."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

import msgspec

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.errors import ConfigError
from kvstore.version import VERSION

# Where `kvstored` listens when nobody says otherwise.
ENDPOINT = "tcp://127.0.0.1:7450"
# Each is a connection, and a row on a screen; a fleet has a monitoring system.
ENDPOINTS_MAX = 256
# A node on the same network answers in milliseconds; one that is busy to its limits, or far
# away, within a second.
TIMEOUT_S = 2.0
TIMEOUT_S_MIN = 0.01
TIMEOUT_S_MAX = 600.0

_SCHEMES = ("tcp", "unix")

EXAMPLES = """
examples:
  kvctl status
      what the daemon on this host says of itself
  kvctl --endpoint tcp://10.0.0.7:7450 --endpoint tcp://10.0.0.8:7450 status
      two nodes side by side
  kvctl --endpoint unix:///run/kvstored.sock ping --count 10
      how long a round trip takes
  kvctl top --sort queue
      queues and links, live; q ends it
  kvctl doctor rdma://10.0.0.7:7450
      whether RDMA works here and to that node, and what to type if it does not
  kvctl status --json | jq '.nodes[].counters.fetch_blocks_hit'
      for scripts; the help of each command tells the names

exit status: 0 all went well; 1 an endpoint could not be reached or did not answer, and the
output says which and why; 2 an option cannot be; 130 after Ctrl-C where it is no normal end;
141 the reader of the output has gone. `kvctl COMMAND --help` explains a command.
"""


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """Options of every command.

    Attributes:
        endpoints: Whom to ask, in the order in which they were typed.
        timeout_s: How long a node may take to accept a connection, and to answer.
        json: Whether the output is for programs.
    """

    endpoints: tuple[Endpoint, ...]
    timeout_s: float
    json: bool


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the command is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kvctl: error: {message} (see {self.prog} --help)\n")


Subparsers = argparse._SubParsersAction


def command_parser() -> tuple[argparse.ArgumentParser, Subparsers[Any]]:
    """The parser of `kvctl`, and where commands add their own."""
    parser = _Parser(
        prog="kvctl",
        description="Look at the nodes of a KV-cache store.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvctl {VERSION}")
    _add_common(parser, "")
    subparsers = parser.add_subparsers(
        metavar="COMMAND", required=True, dest="command", parser_class=_Parser
    )
    return parser, subparsers


def add_command(
    subparsers: Subparsers[Any], name: str, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """A parser for one command, with the common options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_common(parser, "after_")
    return parser


def _add_common(parser: argparse.ArgumentParser, prefix: str) -> None:
    # A parser of a command would overwrite what stood before its name: hence the prefix.
    parser.add_argument(
        "--endpoint",
        dest=f"{prefix}endpoints",
        metavar="URI",
        action="append",
        default=[],
        help="whom to ask: tcp://HOST:PORT or unix:///PATH; may be given several times"
        f" (default {ENDPOINT})",
    )
    parser.add_argument(
        "--timeout",
        dest=f"{prefix}timeout",
        metavar="S",
        help="seconds that a node may take to accept a connection, and to answer"
        f" (default {TIMEOUT_S:g})",
    )
    parser.add_argument(
        "--json", dest=f"{prefix}json", action="store_true", help="output for programs"
    )


def common_options(given: argparse.Namespace) -> Common:
    """The options that every command has, checked.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
    """
    timeout = given.after_timeout if given.after_timeout is not None else given.timeout
    return Common(
        endpoints=_endpoints([*given.endpoints, *given.after_endpoints] or [ENDPOINT]),
        timeout_s=TIMEOUT_S
        if timeout is None
        else seconds(timeout, "--timeout", TIMEOUT_S_MIN, TIMEOUT_S_MAX),
        json=given.json or given.after_json,
    )


def seconds(text: str, option: str, least: float, most: float) -> float:
    """A time as it was typed.

    Raises:
        ConfigError: It is no number, or not within the limits.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise ConfigError(option, text, f"must be {least:g} to {most:g} seconds")
    return value


def whole(text: str, option: str, least: int, most: int) -> int:
    """A count as it was typed.

    Raises:
        ConfigError: It is no whole number, or not within the limits.
    """
    # Longer ones are refused before they are converted.
    is_number = text.isascii() and text.isdigit() and len(text) <= 20
    if not (is_number and least <= int(text) <= most):
        raise ConfigError(option, text, f"must be a whole number from {least} to {most}")
    return int(text)


def _endpoints(texts: list[str]) -> tuple[Endpoint, ...]:
    endpoints: list[Endpoint] = []
    for text in texts:
        endpoint = parse_endpoint(text, "--endpoint")
        if endpoint.scheme not in _SCHEMES:
            raise ConfigError("--endpoint", text, f"scheme must be {' or '.join(_SCHEMES)}")
        if endpoint.scheme == "tcp" and not (endpoint.host and endpoint.port):
            raise ConfigError("--endpoint", text, "needs a host and a port from 1 to 65535")
        if endpoint in endpoints:
            raise ConfigError("--endpoint", text, "must be given once")
        endpoints.append(endpoint)
    if len(endpoints) > ENDPOINTS_MAX:
        raise ConfigError("--endpoint", texts[-1], f"at most {ENDPOINTS_MAX} may be given")
    return tuple(endpoints)
