"""A prefill engine that is to be killed: asks for blocks by way of a relay, and waits.

::

    python -m tests.support.doomed STORAGE RELAY COUNT REQUEST

REQUEST names what the relay retains for the decode engine; "" for nothing.
"""

from __future__ import annotations

import asyncio
import sys

from tests.support.bothways import relay_next
from tests.support.cluster import chain, connected, open_pool, room, until


async def ask(storage: str, relay: str, count: int, request: str) -> None:
    """Fetch, with more time than the test takes."""
    options = {"relays": [relay], "policy": "round_robin", "node_id": "doomed"}
    async with connected([storage], **options) as client:
        namespace = await open_pool(client)
        await relay_next(client)
        (link,) = client.cluster.relays.links
        await until(lambda: not link.refusal(namespace), "it may read there")
        retain_for = (request, 1) if request else None
        keys = chain(count)
        handle = client.fetch(
            namespace,
            keys,
            room(count),
            deadline_s=600,
            decode_node=link.peer,
            retain_for=retain_for,
        )
        await handle


if __name__ == "__main__":
    storage, relay, count, request = sys.argv[1:]
    asyncio.run(ask(storage, relay, int(count), request))
