"""A program that runs out of descriptors while it listens; see the contract of transports.

::

    python -m tests.support.accept_shortage LOOP ENDPOINT
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import sys

from kvstore.endpoint import Endpoint, parse_endpoint
from kvstore.transport import Listener, Stream, listen, sockets
from tests.support.loops import run_on, turns

MESSAGES: list[str] = []


class Notes(logging.Handler):
    """Keeps what was logged."""

    def emit(self, record: logging.LogRecord) -> None:
        MESSAGES.append(record.getMessage())


def client(endpoint: Endpoint) -> tuple[socket.socket, tuple[str, int] | str]:
    """A socket that can connect later, when no descriptor is to be had."""
    if endpoint.scheme == "unix":
        path = endpoint.path
        address = "\0" + path[1:] if path.startswith("@") else path
        return socket.socket(socket.AF_UNIX), address
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    return socket.socket(found[0][0]), found[0][4][:2]  # type: ignore[return-value]


def take_all_descriptors() -> list[int]:
    """Open files until there are no more."""
    taken = [os.open("/dev/null", os.O_RDONLY)]
    try:
        while True:
            taken.append(os.dup(taken[0]))
    except OSError:
        return taken


async def run_out(listener: Listener, streams: list[Stream]) -> tuple[socket.socket, list[int]]:
    """Someone connects while there is no descriptor; returns when the listener has said so."""
    listener.start(asyncio.get_running_loop(), streams.append)
    sock, address = client(listener.endpoint)
    await turns()
    taken = take_all_descriptors()
    MESSAGES.clear()
    sock.connect(address)
    while not MESSAGES:
        await turns()
    assert str(listener.endpoint) in MESSAGES[0]
    assert not streams
    return sock, taken


async def main(endpoint: Endpoint) -> None:
    """Run out of descriptors, see that the listener rests, and give it some again."""
    streams: list[Stream] = []

    sockets.ACCEPT_PAUSE_S = 3600
    listener = listen(endpoint)
    sock, taken = await run_out(listener, streams)
    # The connection still waits, and would wake the loop in every turn.
    await turns(100)
    assert len(MESSAGES) == 1, MESSAGES
    print("paused")
    listener.close()
    for descriptor in taken:
        os.close(descriptor)
    sock.close()
    await turns()
    print("closed")

    sockets.ACCEPT_PAUSE_S = 0.01
    listener = listen(endpoint)
    sock, taken = await run_out(listener, streams)
    for descriptor in taken:
        os.close(descriptor)
    while not streams:
        await turns()
    print("resumed")
    streams[0].close()
    listener.close()
    sock.close()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    logging.getLogger("kvstore").addHandler(Notes())
    run_on(sys.argv[1], main(parse_endpoint(sys.argv[2])))
