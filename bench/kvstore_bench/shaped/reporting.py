"""A daemon that notes when it pushed each load report: the other end of `Reports` of the worker.

::

    python -m kvstore_bench.shaped.reporting URI MEMORY_BYTES NODE_ID

It serves like `kvstored` until something comes on its standard input; then it prints, as JSON,
its boot id and `[seq, time]` of each report, by the host's clock, which all network namespaces
share.

The note is a subscriber like any other: it gets the reports that go to clients, at the moment
at which they are given to their connections.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence

import uvloop

from kvstore.buffers import Region
from kvstore.endpoint import parse_endpoint
from kvstore.loadreport import PUSH_INTERVAL_S, LoadReport
from kvstore.messages import decode
from kvstore.serving import Server, ServerOptions
from kvstore_daemon.source import ArenaSource


async def serve(uri: str, memory_bytes: int, node_id: str) -> dict[str, object]:
    """Serve until something comes on standard input; what was noted."""
    arena = Region(memory_bytes, "reporting")
    arena.touch()
    options = ServerOptions(node_id=node_id, insecure=True)
    server = Server(ArenaSource(arena.view), [parse_endpoint(uri, "URI")], options)
    await server.start()
    pushed: list[tuple[float, bytes]] = []
    server.reporter.subscribe(
        lambda report: pushed.append((time.monotonic(), report)), round(PUSH_INTERVAL_S * 1e3)
    )
    print(f"listening on {server.endpoints[0]}", file=sys.stderr, flush=True)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(0, ended.set)
    await ended.wait()
    loop.remove_reader(0)
    await server.stop(0)
    notes = [(decode(report, LoadReport).seq, at) for at, report in pushed]
    return {"boot_id": server.boot_id.hex(), "pushed": notes}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon."""
    uri, memory_bytes, node_id = sys.argv[1:] if arguments is None else arguments
    with asyncio.Runner(loop_factory=uvloop.new_event_loop, debug=False) as runner:
        found = runner.run(serve(uri, int(memory_bytes), node_id))
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
