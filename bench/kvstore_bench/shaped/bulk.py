"""One TCP stream without a protocol, to measure a link itself.

::

    python -m kvstore_bench.shaped.bulk receive ADDRESS:PORT         in one node, first
    python -m kvstore_bench.shaped.bulk send ADDRESS:PORT BYTES      in another

`receive` says "listening on ..." in its log, takes one stream, and prints how many bytes came in
how many seconds, as JSON. So does `send`, whose seconds end when the last byte was given to the
kernel.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence

PIECE_BYTES = 256 * 1024


def receive(address: tuple[str, int]) -> dict[str, float]:
    """Take one stream until its end."""
    with socket.create_server(address) as listener:
        print(f"listening on tcp://{address[0]}:{address[1]}", file=sys.stderr, flush=True)
        stream, _ = listener.accept()
    piece = bytearray(PIECE_BYTES)
    total_bytes, began_at = 0, 0.0
    with stream:
        while count := stream.recv_into(piece):
            began_at = began_at or time.monotonic()
            total_bytes += count
    return {"bytes": total_bytes, "seconds": time.monotonic() - began_at}


def send(address: tuple[str, int], size_bytes: int) -> dict[str, float]:
    """Send zeros."""
    piece = bytes(PIECE_BYTES)
    began_at = time.monotonic()
    with socket.create_connection(address) as stream:
        left_bytes = size_bytes
        while left_bytes:
            part = memoryview(piece)[: min(left_bytes, PIECE_BYTES)]
            stream.sendall(part)
            left_bytes -= len(part)
    return {"bytes": size_bytes, "seconds": time.monotonic() - began_at}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one end."""
    verb, where, *rest = sys.argv[1:] if arguments is None else arguments
    host, _, port = where.rpartition(":")
    address = (host, int(port))
    result = receive(address) if verb == "receive" else send(address, int(rest[0]))
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
