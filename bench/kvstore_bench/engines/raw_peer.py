"""The server of the engine `raw`, a process of its own: sends, or receives, a stream of bytes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from kvstore.buffers import Region
from kvstore_bench.engines.raw import RECEIVED, set_up


def main(arguments: Sequence[str] | None = None) -> int:
    """Touch memory, connect, and stream until the other end hangs up.

    Args:
        arguments: "source" or "sink", port on loopback, bytes of memory, bytes of a call.
    """
    role, port, size, bs = sys.argv[1:] if arguments is None else arguments
    region = Region(int(size), "kvbench-raw-peer")
    region.touch()
    with socket.create_connection(("127.0.0.1", int(port))) as sock:
        set_up(sock)
        sock.recv(1)  # START
        try:
            if role == "source":
                _send(sock, region.view, int(bs))
            else:
                _receive(sock, region.view, int(bs))
        except OSError:
            pass  # the other end has what it wanted, and says itself if it has not
    return 0


def _send(sock: socket.socket, view: memoryview, bs: int) -> None:
    at, size = 0, len(view)
    while True:
        sock.sendall(view[at : at + bs])
        at = (at + bs) % size


def _receive(sock: socket.socket, view: memoryview, bs: int) -> None:
    at, size = 0, len(view)
    while got := sock.recv_into(view[at : at + bs]):
        at = (at + got) % size
    sock.sendall(RECEIVED)


if __name__ == "__main__":
    sys.exit(main())
